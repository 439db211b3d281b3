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
  int batch = 0;
  int in = 0, out = 0;
  int height = 0, width = 0;  ///< of the input
  int kernel = 1;             ///< 1 .. 31; 3, 5, 7 and 9 have programs of their own
  int padding = 0;            ///< below 0 it crops

  CONCERTINA_HOST_DEVICE constexpr int out_height() const {
    return height + 2 * padding - kernel + 1;
  }
  CONCERTINA_HOST_DEVICE constexpr int out_width() const {
    return width + 2 * padding - kernel + 1;
  }
  constexpr int taps() const { return kernel * kernel; }
  constexpr Index weights() const { return Index{out} * in * taps(); }

  /// The convolution that takes the gradient of the output to that of the input, of the same kernel
  /// with its channels exchanged and its taps in reverse.
  constexpr ConvolutionShape adjoint() const {
    return {batch, out, in, out_height(), out_width(), kernel, kernel - 1 - padding};
  }
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
}

/// Blocks that keep the device busy: two for each of an H100's 132 multiprocessors, or a little
/// less, so that a power of two of images fills them evenly.
inline constexpr int busy_blocks = 256;

namespace detail {

inline constexpr int strip = 4;     // positions of a row that a thread computes, a Four
inline constexpr int channels = 8;  // that a thread computes, two Fours

/// What shared memory is read in: a warp's access to 16 bytes costs as many cycles as its bytes
/// take, so nothing is lost against single numbers and three of four instructions are saved.
template <class Scalar>
struct alignas(16) Four {
  Scalar at[4];
};

CONCERTINA_HOST_DEVICE constexpr int divide_up(int a, int b) { return (a - 1) / b + 1; }

/// The size of parts of which there are as few as parts of `most` at most would be, but even.
constexpr int even_part(int count, int most) { return divide_up(count, divide_up(count, most)); }

/// A number that small numbers are divided by, known before the launch: in two instructions, where
/// the device needs some twenty for a division. Exact for n * divisor < 2^31.
class Divisor {
 public:
  constexpr Divisor(int divisor = 1)
      : divisor_(divisor),
        factor_((std::uint32_t{1} << 31) / static_cast<std::uint32_t>(divisor) + 1) {}

  CONCERTINA_HOST_DEVICE constexpr operator int() const { return divisor_; }

  /// Replaces n by its quotient, and returns the remainder.
  CONCERTINA_HOST_DEVICE int take(int& n) const {
    const int whole = static_cast<int>((static_cast<std::uint64_t>(n) * factor_) >> 31);
    const int rest = n - whole * divisor_;
    n = whole;
    return rest;
  }

 private:
  int divisor_;
  std::uint32_t factor_;
};

/// A tile of maps in a block's memory, in Fours: [image][channel][row][four] in any order.
struct MapTile {
  int images = 1;
  Divisor channels{}, rows{}, fours{};
  int image_step = 0, channel_step = 0, row_step = 0;
  int first = 0;  ///< where it starts there

  CONCERTINA_HOST_DEVICE int count() const { return images * channels * rows * fours; }
};

/// Maps in the device's memory, [batch][channels][height][width]; beside them is zero.
template <class Scalar>
struct Maps {
  const Scalar* numbers;
  int batch, channels, height, width;
};

/// Where a tile of maps starts.
struct Corner {
  int image, channel, top, left;
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
                                 const Maps<Scalar>& maps, const Corner& at) {
  const int images = maps.batch - at.image, planes = maps.channels - at.channel;
  const int map = maps.height * maps.width;
  const Scalar* const from =
      maps.numbers + (static_cast<Index>(at.image) * maps.channels + at.channel) * map;
  fill<B::threads, Scalar>(memory, tile.count(), thread, [&](int rest) {
    const int four = tile.fours.take(rest), row = tile.rows.take(rest);
    const int channel = tile.channels.take(rest), image = rest;
    const int y = at.top + row, x = at.left + four * strip;
    const bool there = image < images && channel < planes && 0 <= y && y < maps.height;
    const int offset = (image * maps.channels + channel) * map + y * maps.width + x;
    Placed<Scalar> placed;
    placed.at = tile.first + image * tile.image_step + channel * tile.channel_step +
                row * tile.row_step + four;
    CONCERTINA_UNROLL
    for (int i = 0; i < strip; ++i) {
      const bool inside = there && 0 <= x + i && x + i < maps.width;
      placed.value.at[i] = inside ? block.read(from + (offset + i)) : Scalar(0);
    }
    return placed;
  });
}

/// The step between rows, at least `least`, for which the fours that the first eight threads read
/// meet the fewest others in their bank; a warp reads fours in groups of eight threads.
inline int conflict_free_step(int least, int strips) {
  int best = least, fewest = 9;
  for (int step = least; step < least + 8; ++step) {
    int in_bank[8] = {}, most = 0;
    for (int thread = 0; thread < 8; ++thread) {
      int& bank = in_bank[(thread / strips * step + thread % strips) % 8];
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

/// The tile of the least estimated time among those that for_each(consider) considers and that fit.
/// Throws  SizeError where it has more blocks than a grid
template <class Tile, class ForEach>
Tile choose_tile(const ConvolutionShape& shape, std::size_t four_bytes, int busy,
                 ForEach&& for_each) {
  Tile best;
  double least = std::numeric_limits<double>::infinity();
  for (const std::size_t limit : memory_limits) {
    for_each([&](Tile tile) {
      if (!tile.complete(shape, static_cast<int>(limit / four_bytes), busy)) return;
      const double blocks = static_cast<double>(std::max<Index>(tile.blocks, busy));
      const double time = tile.block_time(shape) * blocks;
      if (time < least) best = tile, least = time;
    });
    if (best.fours > 0) break;
  }
  if (best.fours == 0 || best.blocks > std::numeric_limits<int>::max()) {
    throw concertina::SizeError("it takes more blocks than a grid has (" + to_string(shape) + ")");
  }
  return best;
}

/// Calls f with the size of one of 1, 2, 4 .. parts of so many, rounded up, down to 1.
template <class F>
void for_each_part(int count, F&& f) {
  int part = 0;
  for (int parts = 1; part != 1; parts *= 2) f(part = divide_up(count, parts));
}

inline int strips_of_tile(const ConvolutionShape& shape) {
  constexpr int widest = 16;
  return even_part(divide_up(shape.out_width(), strip), widest);
}

inline constexpr int convolve_threads = 128;

/// How the maps of a convolution are divided into blocks.
struct ConvolveTile {
  Divisor images{}, rows{}, strips{};  ///< of the output
  Divisor groups{};                    ///< of `channels` channels of the output
  int splits = 1;                      ///< threads that share the input channels of a position
  MapTile map{};  ///< of the input; its channels are those in the block's memory at a time
  int weight_step = 1, weights_at = 0, fours = 0;  ///< Fours of memory
  int lanes = 1;                                   ///< threads of a split
  int row_tiles = 1, column_tiles = 1, group_tiles = 1;
  Index blocks = 0;

  /// Fills in what follows from the others; false where it needs more than `most` Fours.
  bool complete(const ConvolutionShape& shape, int most, int) {
    lanes = images * rows * strips * groups;
    // An odd step spares conflicts when it is filled; a single group has few fours to fill.
    weight_step = groups == 1 ? 2 : 2 * groups + 1;
    map.images = images;
    map.rows = rows + shape.kernel - 1;
    map.fours = strips + divide_up(shape.kernel + strip - 1, strip) - 1;
    map.row_step = conflict_free_step(map.fours, strips);
    map.channel_step = map.rows * map.row_step;
    const int each = images * map.channel_step + shape.taps() * weight_step;
    const int sums = (splits - 1) * lanes * channels;
    if (each > most || sums > most) return false;
    map.channels = even_part(shape.in, std::min(most / each, shape.in));
    map.image_step = map.channels * map.channel_step;
    weights_at = images * map.image_step;
    fours = std::max(map.channels * each, sums);
    row_tiles = divide_up(shape.out_height(), rows);
    column_tiles = divide_up(divide_up(shape.out_width(), strip), strips);
    group_tiles = divide_up(divide_up(shape.out, channels), groups);
    blocks = Index{divide_up(shape.batch, images)} * row_tiles * column_tiles * group_tiles;
    return true;
  }

  double block_time(const ConvolutionShape& shape) const {
    const int chunks = divide_up(shape.in, map.channels);
    const double filled = images * map.rows * map.fours + shape.taps() * groups * 2;
    return static_cast<double>(chunks * divide_up(map.channels, splits) * shape.taps()) *
               (channels * strip) +
           fill_cost * (shape.in * filled) / convolve_threads + wait_cost * chunks +
           (splits - 1.0) * 2 * channels;
  }
};

inline ConvolveTile choose_convolve_tile(const ConvolutionShape& shape, std::size_t four_bytes,
                                         int busy) {
  const int strips = strips_of_tile(shape), all_groups = divide_up(shape.out, channels);
  return choose_tile<ConvolveTile>(shape, four_bytes, busy, [&](const auto& consider) {
    for_each_part(shape.out_height(), [&](int rows) {
      for (int splits = 1; splits <= std::min(shape.in, 8); splits *= 2) {
        for (int groups = 1; groups < 2 * all_groups; groups *= 2) {
          // Tiles of several images hold the whole of each.
          int images = rows == shape.out_height() ? shape.batch : 1;
          images = std::min(images, convolve_threads / (rows * strips * splits * groups));
          for (; images > 0; images /= 2) consider({images, rows, strips, groups, splits});
        }
      }
    });
  });
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

/// 31 rows of 31 taps, 8 parts each, are 248 units.
constexpr int kernel_threads(int kernel) { return kernel == 0 ? 256 : 128; }

/// How a kernel's gradient is divided. A thread has the taps of a row of the kernel, or four of
/// them where programs do not know how many there are, for one input channel and 8 of the output's:
/// a unit. Splits of the rows of a tile have threads for the same units.
struct KernelTile {
  int threads = 0;
  int in = 1;                            ///< input channels of a block
  int images = 1, rows = 1, strips = 1;  ///< of the output, at a time
  int taps = 1;                          ///< of a unit
  Divisor parts{}, kernel{};             ///< units of a row of the kernel; its rows
  Divisor lanes{};                       ///< threads of a split; at least one for each channel
  int splits = 1;
  MapTile x{}, dy{};
  int fours = 0;  ///< of memory
  int row_tiles = 1, column_tiles = 1, in_tiles = 1, groups = 1;
  int items = 1, items_each = 1, slices = 1;  ///< tiles of positions; those of a block; such blocks
  int units = 1, all_units = 1;               ///< of a block; of a row of the workspace
  /// Numbers of the workspace that hold a slice's sums: [group][tap][out][unit], so that a warp
  /// writes neighbours, and then of the bias.
  Index slice_numbers = 0;
  Index blocks = 0;

  bool complete(const ConvolutionShape& shape, int most, int busy) {
    units = in * shape.kernel * parts;
    dy = {images, channels, rows, strips, rows * strips, images * rows * strips, strips};
    if (units > threads || dy.channel_step > most / channels) return false;
    lanes = std::max(units, channels);
    splits = std::min(threads / lanes, images * rows);
    const int window = divide_up(strip + taps - 1, strip);  // Fours of a row of x, for a unit
    x = {images, in, rows + shape.kernel - 1, strips + window + parts - 2};
    // Rows an odd step apart, and channels as if the kernel's rows went on: then eight neighbouring
    // units, which read rows one after another, find them in eight banks.
    x.row_step = x.fours | 1;
    x.image_step = x.rows * x.row_step;
    const int plane = images * x.image_step;
    x.channel_step = plane + ((shape.kernel * x.row_step - plane) % 8 + 8) % 8;
    dy.first = in * x.channel_step;
    fours = std::max(dy.first + channels * dy.channel_step,
                     (splits - 1) * lanes * (2 * taps + 1));  // maps, and then sums
    if (fours > most) return false;
    row_tiles = divide_up(shape.out_height(), rows);
    column_tiles = divide_up(divide_up(shape.out_width(), strip), strips);
    in_tiles = divide_up(shape.in, in);
    groups = divide_up(shape.out, channels);
    kernel = shape.kernel;
    all_units = shape.in * shape.kernel * parts;
    slice_numbers = Index{groups} * channels * (Index{taps} * all_units + 1);
    const Index all = Index{divide_up(shape.batch, images)} * row_tiles * column_tiles;
    if (all > std::numeric_limits<int>::max()) return false;
    items = static_cast<int>(all);
    items_each = divide_up(items, std::min(items, divide_up(busy, in_tiles * groups)));
    slices = divide_up(items, items_each);
    blocks = Index{slices} * in_tiles * groups;
    return true;
  }

  double block_time(const ConvolutionShape&) const {
    const int filled = images * (in * x.rows * x.fours + channels * rows * strips);
    const double work =
        static_cast<double>(divide_up(images * rows, splits) * strips * taps) * (strip * channels);
    const double item = work + fill_cost * filled / threads + wait_cost;
    const double stores = 4.0 * channels * taps;
    return items_each * item + stores;
  }
};

template <class Scalar>
KernelTile choose_kernel_tile(const ConvolutionShape& shape, int busy) {
  KernelTile tile;
  with_kernel(shape.kernel, [&](auto known) {
    tile.threads = kernel_threads(known);
    tile.taps = known == 0 ? strip : known;
  });
  tile.strips = strips_of_tile(shape);
  tile.parts = divide_up(shape.kernel, tile.taps);
  return choose_tile<KernelTile>(shape, sizeof(Four<Scalar>), busy, [&](const auto& consider) {
    for_each_part(shape.in, [&](int in) {
      for_each_part(shape.out_height(), [&](int rows) {
        // Tiles of several images hold the whole of each.
        const int most = rows == shape.out_height() ? std::min(shape.batch, 64) : 1;
        tile.in = in, tile.rows = rows;
        for (tile.images = 1; tile.images <= most; tile.images *= 2) consider(tile);
      });
    });
  });
}

}  // namespace detail

}  // namespace cifar::cuda
