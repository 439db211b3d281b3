// The shape of a convolution of a batch of maps, and the tiles into which it is divided: chosen on
// the host, from shapes alone.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/cuda/block.hpp>
#include <concertina/error.hpp>
#include <concertina/shape.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <type_traits>
#include <utility>

namespace cifar::cuda {

using concertina::Index;

/// A convolution of a batch of maps; the kernel is square and the padding the same on all sides.
struct ConvolutionShape {
  Index batch = 0;
  Index in = 0, out = 0;
  Index height = 0, width = 0;  ///< of the input
  Index kernel = 1;             ///< 1 .. 31; 3, 5, 7 and 9 have programs of their own
  Index padding = 0;            ///< below 0 it crops

  constexpr Index out_height() const { return height + 2 * padding - kernel + 1; }
  constexpr Index out_width() const { return width + 2 * padding - kernel + 1; }
  constexpr Index taps() const { return kernel * kernel; }
  constexpr Index weights() const { return out * in * taps(); }

  /// The convolution that takes the gradient of the output to that of the input, of the same kernel
  /// with its channels exchanged and its taps in reverse.
  constexpr ConvolutionShape adjoint() const {
    return {.batch = batch,
            .in = out,
            .out = in,
            .height = out_height(),
            .width = out_width(),
            .kernel = kernel,
            .padding = kernel - 1 - padding};
  }

  friend constexpr bool operator==(const ConvolutionShape&, const ConvolutionShape&) = default;
};

/// "conv2d 3->8 @7x7 p3x3 of 128 maps of 32x32"
inline std::string to_string(const ConvolutionShape& shape) {
  const concertina::ConvShape<2> layer{
      .out = shape.out, .in = shape.in, .kernel_size = shape.kernel, .padding = shape.padding};
  return concertina::to_string(layer) + " of " + std::to_string(shape.batch) + " maps of " +
         std::to_string(shape.height) + "x" + std::to_string(shape.width);
}

/// Throws ShapeError unless the programs can compute it, and SizeError where the maps of an image
/// have more than 2^23 numbers or the kernel more than 2^26: device code counts in ints those of
/// 128 images, and of a kernel with its channels rounded up.
inline void validate(const ConvolutionShape& shape) {
  const auto refuse = [&](const std::string& why) {
    throw concertina::ShapeError(why + " (" + to_string(shape) + ")");
  };
  if (shape.batch < 1 || shape.in < 1 || shape.out < 1 || shape.height < 1 || shape.width < 1) {
    refuse("a convolution needs images, channels and positions");
  }
  if (shape.kernel < 1 || shape.kernel > 31) refuse("kernels have sizes 1 .. 31");
  if (shape.out_height() < 1 || shape.out_width() < 1) refuse("the kernel is larger than the map");
  const auto at_most = [&](Index most, const char* what, Index a, Index b, Index c) {
    using concertina::detail::checked_multiply;
    if (checked_multiply(checked_multiply(a, b, what), c, what) > most) {
      throw concertina::SizeError(std::string(what) + " has more than " + std::to_string(most) +
                                  " numbers (" + to_string(shape) + ")");
    }
  };
  constexpr Index most_map = Index{1} << 23, most_kernel = Index{1} << 26;
  at_most(most_map, "an input", shape.in, shape.height, shape.width);
  at_most(most_map, "an output", shape.out, shape.out_height(), shape.out_width());
  at_most(most_kernel, "a kernel", shape.out, shape.in, shape.taps());
  at_most(std::numeric_limits<int>::max(), "a batch", shape.batch, 1, 1);
}

/// Blocks that keep the device busy: two for each of an H100's 132 multiprocessors, or a little
/// less, so that a power of two of images fills them evenly.
inline constexpr Index busy_blocks = 256;

namespace detail {

inline constexpr int strip = 4;     // positions of a row that a thread computes, a Four
inline constexpr int channels = 8;  // that a thread computes, two Fours

/// What shared memory is read in: a warp's access to 16 bytes costs as many cycles as its bytes
/// take, so nothing is lost against single numbers and three of four instructions are saved.
template <class Scalar>
struct alignas(16) Four {
  Scalar at[4];
};

CONCERTINA_HOST_DEVICE constexpr Index divide_up(Index a, Index b) { return (a + b - 1) / b; }

/// The size of parts of which there are as few as parts of `most` at most would be, but even.
constexpr Index even_part(Index count, Index most) {
  return divide_up(count, divide_up(count, most));
}

/// Division of small numbers by one that is known before the launch: two instructions, where the
/// device needs some twenty for a division. Exact for n * divisor < 2^31.
class Divisor {
 public:
  Divisor() = default;
  explicit Divisor(Index divisor)
      : divisor_(static_cast<int>(divisor)),
        factor_((std::uint32_t{1} << 31) / static_cast<std::uint32_t>(divisor) + 1) {}

  CONCERTINA_HOST_DEVICE int quotient(int n) const {
    return static_cast<int>((static_cast<std::uint64_t>(n) * factor_) >> 31);
  }

  /// Replaces n by its quotient, and returns the remainder.
  CONCERTINA_HOST_DEVICE int take(int& n) const {
    const int whole = quotient(n), rest = n - whole * divisor_;
    n = whole;
    return rest;
  }

 private:
  int divisor_ = 1;
  std::uint32_t factor_ = (std::uint32_t{1} << 31) + 1;
};

/// A tile of maps in a block's memory, in Fours: [image][channel][row][four] in any order.
struct MapTile {
  int first = 0;  ///< where it starts there
  int images = 1, channels = 1, rows = 1, fours = 1;
  int image_step = 0, channel_step = 0, row_step = 0;
  Divisor by_channels, by_rows, by_fours;

  void set_divisors() {
    by_channels = Divisor(channels);
    by_rows = Divisor(rows);
    by_fours = Divisor(fours);
  }
  CONCERTINA_HOST_DEVICE int count() const { return images * channels * rows * fours; }
};

/// Maps in the device's memory, and where on them a tile stands. What is beside them is zero.
template <class Scalar>
struct MapSource {
  const Scalar* maps;    // of the tile's first image and channel
  int images, channels;  // that there are from there on
  int image_step, height, width;
  int top, left;
};

/// A Four and where it belongs in a block's memory.
template <class Scalar>
struct Placed {
  int at;
  Four<Scalar> value;
};

/// Sets `count` Fours to what load(i) says. A thread's loads are issued four at a time, before any
/// of them is waited for.
template <int Threads, class Scalar, class Memory, class Load>
CONCERTINA_DEVICE void fill(const Memory& memory, int count, int thread, const Load& load) {
  constexpr int in_flight = 4;
  for (int first = thread; first < count; first += in_flight * Threads) {
    Placed<Scalar> placed[in_flight];
    CONCERTINA_UNROLL
    for (int i = 0; i < in_flight; ++i) {
      const int wanted = first + i * Threads;
      placed[i] = load(wanted < count ? wanted : count - 1);  // without a branch around the loads
    }
    CONCERTINA_UNROLL
    for (int i = 0; i < in_flight; ++i) {
      if (first + i * Threads < count) memory.set(placed[i].at, placed[i].value);
    }
  }
}

template <class Scalar, concertina::cuda::ThreadBlock B, class Memory>
CONCERTINA_DEVICE void fill_maps(B& block, const Memory& memory, int thread, const MapTile& tile,
                                 const MapSource<Scalar>& from) {
  fill<B::threads, Scalar>(memory, tile.count(), thread, [&](int rest) {
    const int four = tile.by_fours.take(rest), row = tile.by_rows.take(rest);
    const int channel = tile.by_channels.take(rest), image = rest;
    const int y = from.top + row, x = from.left + four * strip;
    const bool there = image < from.images && channel < from.channels && 0 <= y && y < from.height;
    const int offset = image * from.image_step + (channel * from.height + y) * from.width + x;
    Placed<Scalar> placed;
    placed.at = tile.first + image * tile.image_step + channel * tile.channel_step +
                row * tile.row_step + four;
    CONCERTINA_UNROLL
    for (int i = 0; i < strip; ++i) {
      const bool inside = there && 0 <= x + i && x + i < from.width;
      placed.value.at[i] = inside ? block.read(from.maps + (offset + i)) : Scalar(0);
    }
    return placed;
  });
}

/// The step between rows, at least `least`, for which the fours that the first eight threads read
/// meet the fewest others in their bank; a warp reads fours in groups of eight threads.
inline Index conflict_free_step(Index least, Index strips) {
  Index best = least, fewest = 9;
  for (Index step = least; step < least + 8; ++step) {
    Index in_bank[8] = {}, most = 0;
    for (Index thread = 0; thread < 8; ++thread) {
      Index& bank = in_bank[(thread / strips * step + thread % strips) % 8];
      most = std::max(most, ++bank);
    }
    if (most < fewest) best = step, fewest = most;
  }
  return best;
}

// Tiles are those for which an estimate of the time is least, in instructions of a thread: its
// multiply-adds, what fills the block's memory, and waits. The loops over taps are nine tenths
// multiply-adds, and the loop that fills a Four has 56 to 65 instructions, counted in the compiled
// programs; the wait is an order of magnitude. None of it is measured.
inline constexpr double fill_cost = 60;
inline constexpr double wait_cost = 1000;  // until the first numbers arrive, and for barriers

/// A block's memory: if a tile fits, so much that four blocks share a multiprocessor, and otherwise
/// what the smallest device has. A tile for the second always exists: 31 rows of taps of a double
/// are 62 KiB and as many rows of a map 31 KiB.
inline constexpr std::size_t memory_limits[] = {48 * 1024, 96 * 1024};

/// How the maps of a convolution are divided into blocks.
struct ConvolveTile {
  Index images = 1, rows = 1, strips = 1;  ///< of the output
  Index groups = 1;                        ///< of `channels` channels of the output
  Index splits = 1;                        ///< threads that share the input channels of a position
  Index in = 1;                            ///< input channels in the block's memory at a time
  Index row_step = 1, weight_step = 1;     ///< in Fours
  Index fours = 0;                         ///< of memory

  Index used_rows(const ConvolutionShape& shape) const { return rows + shape.kernel - 1; }
  Index used_fours(const ConvolutionShape& shape) const {
    return strips + divide_up(shape.kernel - 1, strip);
  }
  Index lanes() const { return images * rows * strips * groups; }
  Index row_tiles(const ConvolutionShape& shape) const {
    return divide_up(shape.out_height(), rows);
  }
  Index column_tiles(const ConvolutionShape& shape) const {
    return divide_up(divide_up(shape.out_width(), strip), strips);
  }
  Index group_tiles(const ConvolutionShape& shape) const {
    return divide_up(divide_up(shape.out, channels), groups);
  }
  Index blocks(const ConvolutionShape& shape) const {
    return divide_up(shape.batch, images) * row_tiles(shape) * column_tiles(shape) *
           group_tiles(shape);
  }
};

inline constexpr int convolve_threads = 128;
inline constexpr Index widest_tile = 16;  // strips

/// Fills in what follows from the others; false where it needs more than `limit` bytes.
inline bool complete(ConvolveTile& tile, const ConvolutionShape& shape, std::size_t four_bytes,
                     std::size_t limit) {
  // An odd step spares conflicts when it is filled; a single group has few fours to fill.
  tile.weight_step = tile.groups == 1 ? 2 : 2 * tile.groups + 1;
  const Index map = tile.images * tile.used_rows(shape) * tile.row_step;
  const Index each = map + shape.taps() * tile.weight_step;
  const Index sums = (tile.splits - 1) * tile.lanes() * channels;
  const Index most = static_cast<Index>(limit / four_bytes);
  if (each > most || sums > most) return false;
  tile.in = even_part(shape.in, std::min(most / each, shape.in));
  tile.fours = std::max(tile.in * each, sums);
  return true;
}

inline double estimate(const ConvolveTile& tile, const ConvolutionShape& shape, Index busy) {
  const Index chunks = divide_up(shape.in, tile.in);
  const Index filled =
      tile.images * tile.used_rows(shape) * tile.used_fours(shape) + shape.taps() * tile.groups * 2;
  const double time = static_cast<double>(chunks * divide_up(tile.in, tile.splits) * shape.taps()) *
                          (channels * strip) +
                      fill_cost * static_cast<double>(shape.in * filled) / convolve_threads +
                      wait_cost * static_cast<double>(chunks) +
                      static_cast<double>(tile.splits - 1) * 2 * channels;
  return time * static_cast<double>(std::max(tile.blocks(shape), busy));
}

inline ConvolveTile choose_convolve_tile(const ConvolutionShape& shape, std::size_t four_bytes,
                                         Index busy) {
  ConvolveTile best;
  double least = std::numeric_limits<double>::infinity();
  const Index strips = even_part(divide_up(shape.out_width(), strip), widest_tile);
  const Index all_groups = divide_up(shape.out, channels);
  const auto consider = [&](ConvolveTile tile, std::size_t limit) {
    if (!complete(tile, shape, four_bytes, limit)) return;
    const double time = estimate(tile, shape, busy);
    if (time < least) best = tile, least = time;
  };
  for (const std::size_t limit : memory_limits) {
    for (Index parts = 1, rows = 0; rows != 1; parts *= 2) {
      rows = divide_up(shape.out_height(), parts);
      ConvolveTile tile{.rows = rows, .strips = strips};
      tile.row_step = conflict_free_step(tile.used_fours(shape), strips);
      for (tile.splits = 1; tile.splits <= std::min<Index>(shape.in, 8); tile.splits *= 2) {
        for (tile.groups = 1; tile.groups < 2 * all_groups; tile.groups *= 2) {
          const Index room = convolve_threads / (rows * strips * tile.splits * tile.groups);
          // Tiles of several images hold the whole of each.
          tile.images = parts == 1 ? std::min(room, shape.batch) : std::min<Index>(room, 1);
          for (; tile.images > 0; tile.images /= 2) consider(tile, limit);
        }
      }
    }
    if (best.fours > 0) break;
  }
  return best;
}

inline void require_blocks(Index blocks, const ConvolutionShape& shape) {
  if (blocks <= std::numeric_limits<int>::max()) return;
  throw concertina::SizeError(std::to_string(blocks) + " blocks are more than a grid has (" +
                              to_string(shape) + ")");
}

/// Calls f(std::integral_constant<int, Kernel>()) with the kernel where programs know it, else 0.
template <class F>
void with_kernel(Index kernel, F&& f) {
  switch (kernel) {
    case 3: return f(std::integral_constant<int, 3>());
    case 5: return f(std::integral_constant<int, 5>());
    case 7: return f(std::integral_constant<int, 7>());
    case 9: return f(std::integral_constant<int, 9>());
    default: return f(std::integral_constant<int, 0>());
  }
}

/// How a kernel's gradient is divided. A thread has the taps of a row of the kernel, or four of
/// them where programs do not know how many there are, for one input channel and 8 of the output's:
/// a unit. Splits of the rows of a tile have threads for the same units.
struct KernelTile {
  Index in = 1;                            ///< input channels of a block
  Index images = 1, rows = 1, strips = 1;  ///< of the output, at a time
  Index taps = 1, parts = 1;               ///< of a unit, of a row of the kernel
  Index lanes = 1, splits = 1;             ///< threads of a split; at least one for each channel
  Index items_each = 1, slices = 1;        ///< tiles of positions that a block adds up; such blocks
  Index x_row_step = 1, x_channel_step = 1, dy_channel_step = 1;  ///< in Fours
  Index fours = 0;                                                ///< of memory

  /// Fours that a strip needs of a row of x, for its taps.
  Index window() const { return divide_up(strip + taps - 1, strip); }
  Index used_rows(const ConvolutionShape& shape) const { return rows + shape.kernel - 1; }
  Index used_fours() const { return strips + window() + parts - 2; }
  Index row_tiles(const ConvolutionShape& shape) const {
    return divide_up(shape.out_height(), rows);
  }
  Index column_tiles(const ConvolutionShape& shape) const {
    return divide_up(divide_up(shape.out_width(), strip), strips);
  }
  Index items(const ConvolutionShape& shape) const {
    return divide_up(shape.batch, images) * row_tiles(shape) * column_tiles(shape);
  }
  Index in_tiles(const ConvolutionShape& shape) const { return divide_up(shape.in, in); }
  Index groups(const ConvolutionShape& shape) const { return divide_up(shape.out, channels); }
  Index blocks(const ConvolutionShape& shape) const {
    return slices * in_tiles(shape) * groups(shape);
  }

  /// Of all units, a row of the workspace.
  Index all_units(const ConvolutionShape& shape) const { return shape.in * shape.kernel * parts; }
  /// Numbers of the workspace that hold a slice's sums: [group][tap][out][unit], so that a warp
  /// writes neighbours, and then of the bias.
  Index slice_numbers(const ConvolutionShape& shape) const {
    return groups(shape) * channels * (taps * all_units(shape) + 1);
  }
};

/// 31 rows of 31 taps, 8 parts each, are 248 units.
constexpr int kernel_threads(Index kernel) { return kernel == 0 ? 256 : 128; }

inline bool complete(KernelTile& tile, const ConvolutionShape& shape, int threads,
                     std::size_t four_bytes, std::size_t limit, Index busy) {
  const Index units = tile.in * shape.kernel * tile.parts;
  if (units > threads) return false;
  tile.lanes = std::max<Index>(units, channels);
  tile.splits = std::min(threads / tile.lanes, tile.images * tile.rows);
  // Rows an odd step apart, and channels as if the kernel's rows went on: then eight neighbouring
  // units, which read rows one after another, find them in eight banks.
  tile.x_row_step = tile.used_fours() | 1;
  const Index plane = tile.images * tile.used_rows(shape) * tile.x_row_step;
  tile.x_channel_step = plane + ((shape.kernel * tile.x_row_step - plane) % 8 + 8) % 8;
  tile.dy_channel_step = tile.images * tile.rows * tile.strips;
  const Index maps = tile.in * tile.x_channel_step + channels * tile.dy_channel_step;
  const Index sums = (tile.splits - 1) * tile.lanes * (2 * tile.taps + 1);
  tile.fours = std::max(maps, sums);
  if (tile.fours > static_cast<Index>(limit / four_bytes)) return false;
  const Index items = tile.items(shape);
  const Index wanted = divide_up(busy, tile.in_tiles(shape) * tile.groups(shape));
  tile.items_each = divide_up(items, std::min(items, wanted));
  tile.slices = divide_up(items, tile.items_each);
  return true;
}

inline double estimate(const KernelTile& tile, const ConvolutionShape& shape, int threads,
                       Index busy) {
  const Index filled = tile.images * (tile.in * tile.used_rows(shape) * tile.used_fours() +
                                      channels * tile.rows * tile.strips);
  const double work = static_cast<double>(divide_up(tile.images * tile.rows, tile.splits) *
                                          tile.strips * tile.taps) *
                      (strip * channels);
  const double item = work + fill_cost * static_cast<double>(filled) / threads + wait_cost;
  const double stores = 4.0 * channels * static_cast<double>(tile.taps);
  return (static_cast<double>(tile.items_each) * item + stores) *
         static_cast<double>(std::max(tile.blocks(shape), busy));
}

/// Kernel as programs have it, 0 where they do not know it.
inline KernelTile choose_kernel_tile(const ConvolutionShape& shape, Index kernel,
                                     std::size_t four_bytes, Index busy) {
  KernelTile best;
  double least = std::numeric_limits<double>::infinity();
  const int threads = kernel_threads(kernel);
  KernelTile tile{.strips = even_part(divide_up(shape.out_width(), strip), widest_tile),
                  .taps = kernel == 0 ? strip : kernel};
  tile.parts = divide_up(shape.kernel, tile.taps);
  constexpr Index most_images = 64;
  for (const std::size_t limit : memory_limits) {
    for (Index in_parts = 1, in = 0; in != 1; in_parts *= 2) {
      tile.in = in = divide_up(shape.in, in_parts);
      for (Index row_parts = 1, rows = 0; rows != 1; row_parts *= 2) {
        tile.rows = rows = divide_up(shape.out_height(), row_parts);
        // Tiles of several images hold the whole of each.
        const Index images = row_parts == 1 ? std::min(shape.batch, most_images) : 1;
        for (tile.images = 1; tile.images <= images; tile.images *= 2) {
          if (!complete(tile, shape, threads, four_bytes, limit, busy)) continue;
          const double time = estimate(tile, shape, threads, busy);
          if (time < least) best = tile, least = time;
        }
      }
    }
    if (best.fours > 0) break;
  }
  return best;
}

template <class Scalar>
KernelTile kernel_tile(const ConvolutionShape& shape, Index busy) {
  KernelTile tile;
  with_kernel(shape.kernel, [&](auto kernel) {
    tile = choose_kernel_tile(shape, kernel, sizeof(Four<Scalar>), busy);
  });
  return tile;
}

}  // namespace detail

}  // namespace cifar::cuda
