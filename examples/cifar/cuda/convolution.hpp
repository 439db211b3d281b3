// The convolutions of a small network as block programs: of a batch of maps, and their gradients
// for the maps and for the kernel. Stride 1, no dilation, one group.
// Maps are [image][channel][y][x].
//
// In all of them a thread keeps a tile of sums in registers, 8 channels by 4 neighbouring positions
// (or by the taps of a kernel's row), and a row of the map slides past the kernel's row there. All
// that is read from shared memory comes in fours. Of a multiprocessor's cycle, 4 warps multiply and
// add while shared memory serves one access of a warp to 128 bytes, so each of these accesses must
// feed more than 4 multiply-adds of a warp. For a row of K taps:
//
//           of a thread, of a warp:                       multiply-adds for an access
//           multiply-adds   map       other   accesses    K = 3      5      7      9
//   maps    32 K            M fours   2 K     4 M + 2 K     6.9    8.9    8.6    9.6
//   kernel  32 K            M fours   8       4 M + 8       6.0   10.0   11.2   14.4
//
// with M = (K + 3) / 4 rounded up. A warp's threads read different fours of the map, an access for
// eight of them, and all the same of the other: a kernel's taps, or the gradient of the output.
// From the device's memory a number is read once for each block that needs it, and then feeds 8 K^2
// multiply-adds (a map), one for each position of the block's tile (a kernel).
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/cuda/block.hpp>
#include <concertina/error.hpp>
#include <concertina/geometry.hpp>

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
  Index padding = 0;            ///< 0 .. kernel - 1

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
  const concertina::ConvShape<2> layer{.out = shape.out,
                                       .in = shape.in,
                                       .kernel = shape.kernel,
                                       .geometry = {.padding = shape.padding}};
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
  if (shape.padding < 0 || shape.padding >= shape.kernel) {
    refuse("paddings are 0 .. kernel - 1");
  }
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

template <class Scalar, concertina::cuda::Block B, class Memory>
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

}  // namespace detail

/// y = the convolution of x, plus a bias, or its adjoint: the program of both
/// convolution_forward() and convolution_input_gradient(), which say how to make it.
/// Kernel 0 takes the kernel's size at run time; the others know it and unroll its rows.
template <class Scalar, int Kernel>
class Convolve {
  using Four = detail::Four<Scalar>;
  static constexpr int strip = detail::strip, channels = detail::channels;

 public:
  static constexpr int threads = detail::convolve_threads;

  /// From maps of shape.in channels to maps of shape.out. Of an adjoint, shape is the adjoint's and
  /// the kernel still that of the convolution.
  struct Arguments {
    ConvolutionShape shape;
    const Scalar* x;
    const Scalar* weight;
    const Scalar* bias;  ///< or null
    Scalar* y;
    bool adjoint;
  };

  /// Requires  a valid shape, of this Kernel unless that is 0
  Convolve(const Arguments& arguments, Index busy)
      : x_(arguments.x),
        weight_(arguments.weight),
        bias_(arguments.bias),
        y_(arguments.y),
        adjoint_(arguments.adjoint) {
    const ConvolutionShape& shape = arguments.shape;
    const auto number = [](Index value) { return static_cast<int>(value); };
    const detail::ConvolveTile tile = detail::choose_convolve_tile(shape, sizeof(Four), busy);
    blocks_ = tile.blocks(shape);
    detail::require_blocks(blocks_, shape);
    shared_bytes_ = concertina::cuda::shared_size<Four>(static_cast<std::size_t>(tile.fours));
    fours_ = number(tile.fours);

    batch_ = number(shape.batch);
    in_ = number(shape.in), out_ = number(shape.out);
    height_ = number(shape.height), width_ = number(shape.width);
    out_height_ = number(shape.out_height()), out_width_ = number(shape.out_width());
    kernel_ = number(shape.kernel), padding_ = number(shape.padding);

    images_ = number(tile.images), rows_ = number(tile.rows), strips_ = number(tile.strips);
    groups_ = number(tile.groups), splits_ = number(tile.splits);
    weight_step_ = number(tile.weight_step);
    lanes_ = number(tile.lanes());
    row_tiles_ = number(tile.row_tiles(shape));
    column_tiles_ = number(tile.column_tiles(shape));
    group_tiles_ = number(tile.group_tiles(shape));

    map_.images = images_, map_.channels = number(tile.in);
    map_.rows = number(tile.used_rows(shape)), map_.fours = number(tile.used_fours(shape));
    map_.row_step = number(tile.row_step);
    map_.channel_step = map_.rows * map_.row_step;
    map_.image_step = map_.channels * map_.channel_step;
    map_.set_divisors();
    weights_at_ = map_.images * map_.image_step;
    by_taps_ = detail::Divisor(shape.taps());
    by_chunk_ = detail::Divisor(tile.in * shape.taps());
    by_strips_ = detail::Divisor(strips_), by_rows_ = detail::Divisor(rows_);
    by_images_ = detail::Divisor(images_), by_groups_ = detail::Divisor(groups_);
  }

  Index blocks() const { return blocks_; }
  std::size_t shared_bytes() const { return shared_bytes_; }

  template <concertina::cuda::Block B>
  CONCERTINA_DEVICE void operator()(B& block, Index number) const {
    const auto memory = block.template shared<Four>(fours_);
    typename B::template PerThread<Sums> sums(block);
    const Tile tile = tile_of(static_cast<int>(number));
    block.each_thread([&](int thread) { start(block, tile, lane_of(thread), sums[thread]); });
    for (int first = 0; first < in_; first += map_.channels) {
      const int rest = in_ - first, count = rest < map_.channels ? rest : map_.channels;
      block.each_thread([&](int thread) {
        const int map = height_ * width_;
        const Index plane = static_cast<Index>(tile.image) * in_ + first;
        detail::fill_maps<Scalar>(block, memory, thread, map_,
                                  {.maps = x_ + plane * map,
                                   .images = batch_ - tile.image,
                                   .channels = count,
                                   .image_step = in_ * map,
                                   .height = height_,
                                   .width = width_,
                                   .top = tile.row - padding_,
                                   .left = tile.column - padding_});
        fill_weights(block, memory, thread, tile.channel, first, count);
      });
      block.each_thread([&](int thread) {
        const Lane lane = lane_of(thread);
        if (lane.split < splits_) accumulate(memory, lane, count, sums[thread]);
      });
    }
    if (splits_ > 1) {
      block.each_thread([&](int thread) {
        if (thread < lanes_ || thread >= splits_ * lanes_) return;
        CONCERTINA_UNROLL
        for (int o = 0; o < channels; ++o) {
          memory.set(o * (splits_ - 1) * lanes_ + thread - lanes_, sums[thread].of[o]);
        }
      });
    }
    block.each_thread([&](int thread) {
      if (thread >= lanes_) return;
      const Lane lane = lane_of(thread);
      for (int split = 0; split < splits_ - 1; ++split) {
        CONCERTINA_UNROLL
        for (int o = 0; o < channels; ++o) {
          add(memory.get((o * (splits_ - 1) + split) * lanes_ + thread), sums[thread].of[o]);
        }
      }
      store(block, tile, lane, sums[thread]);
    });
  }

 private:
  /// Of a strip, [channel][position].
  struct Sums {
    Four of[channels];
  };
  /// The first image, channel, row and column of the output that a block computes.
  struct Tile {
    int image, channel, row, column;
  };
  /// What a thread computes of a tile. Positions come first, so that a warp's threads read the same
  /// weights.
  struct Lane {
    int strip, row, image, group, split;
  };

  CONCERTINA_DEVICE int kernel() const { return Kernel == 0 ? kernel_ : Kernel; }

  /// Blocks that read the same maps are neighbours.
  CONCERTINA_DEVICE Tile tile_of(int number) const {
    const int group = number % group_tiles_, position = number / group_tiles_;
    const int column = position % column_tiles_, line = position / column_tiles_;
    return {.image = line / row_tiles_ * images_,
            .channel = group * groups_ * channels,
            .row = line % row_tiles_ * rows_,
            .column = column * strips_ * strip};
  }

  CONCERTINA_DEVICE Lane lane_of(int thread) const {
    Lane lane;
    lane.strip = by_strips_.take(thread);
    lane.row = by_rows_.take(thread);
    lane.image = by_images_.take(thread);
    lane.group = by_groups_.take(thread);
    lane.split = thread;
    return lane;
  }

  /// Weights stand as [in][tap][out], so that a Four is that of four output channels. Threads take
  /// taps in turn, which are neighbours where they come from.
  template <class B, class Memory>
  CONCERTINA_DEVICE void fill_weights(B& block, const Memory& memory, int thread, int channel,
                                      int first, int count) const {
    const int taps = kernel() * kernel();
    const int in_step = adjoint_ ? out_ * taps : taps, out_step = adjoint_ ? taps : in_ * taps;
    detail::fill<threads, Scalar>(
        memory, 2 * groups_ * map_.channels * taps, thread, [&](int rest) {
          const int row = by_chunk_.take(rest), half = rest;
          int in = row;
          const int tap = by_taps_.take(in), from_tap = adjoint_ ? taps - 1 - tap : tap;
          const int out = channel + half * 4;
          const int offset = out * out_step + (first + in) * in_step + from_tap;
          detail::Placed<Scalar> placed;
          placed.at = weights_at_ + row * weight_step_ + half;
          CONCERTINA_UNROLL
          for (int i = 0; i < 4; ++i) {
            const bool there = in < count && out + i < out_;
            placed.value.at[i] = there ? block.read(weight_ + (offset + i * out_step)) : Scalar(0);
          }
          return placed;
        });
  }

  template <class Memory>
  CONCERTINA_DEVICE void accumulate(const Memory& memory, const Lane& lane, int count,
                                    Sums& sums) const {
    const int map = lane.image * map_.image_step + lane.row * map_.row_step + lane.strip;
    const int weights = weights_at_ + 2 * lane.group;
    for (int in = lane.split; in < count; in += splits_) {
      for (int ky = 0; ky < kernel(); ++ky) {
        const int row = map + in * map_.channel_step + ky * map_.row_step;
        const int taps = weights + (in * kernel() + ky) * kernel() * weight_step_;
        Scalar near[2 * strip] = {};  // of the row, from the first position at the tap on
        put(memory.get(row), near);
        CONCERTINA_UNROLL
        for (int kx = 0; kx < kernel(); kx += strip) {
          if (kx + 1 < kernel()) put(memory.get(row + kx / strip + 1), near + strip);
          CONCERTINA_UNROLL
          for (int tap = 0; tap < strip; ++tap) {
            if (kx + tap < kernel()) {
              CONCERTINA_UNROLL
              for (int half = 0; half < 2; ++half) {
                const Four weight = memory.get(taps + (kx + tap) * weight_step_ + half);
                CONCERTINA_UNROLL
                for (int o = 0; o < 4; ++o) {
                  CONCERTINA_UNROLL
                  for (int i = 0; i < strip; ++i) {
                    sums.of[half * 4 + o].at[i] += weight.at[o] * near[tap + i];
                  }
                }
              }
            }
          }
          CONCERTINA_UNROLL
          for (int i = 0; i < strip; ++i) near[i] = near[strip + i];
        }
      }
    }
  }

  CONCERTINA_DEVICE static void put(const Four& four, Scalar* to) {
    CONCERTINA_UNROLL
    for (int i = 0; i < strip; ++i) to[i] = four.at[i];
  }

  CONCERTINA_DEVICE static void add(const Four& four, Four& sum) {
    CONCERTINA_UNROLL
    for (int i = 0; i < strip; ++i) sum.at[i] += four.at[i];
  }

  /// One of the splits starts with the bias, which is then there before anything waits for it.
  template <class B>
  CONCERTINA_DEVICE void start(B& block, const Tile& tile, const Lane& lane, Sums& sums) const {
    CONCERTINA_UNROLL
    for (int o = 0; o < channels; ++o) {
      const int channel = tile.channel + lane.group * channels + o;
      const bool biased = bias_ != nullptr && lane.split == 0 && channel < out_;
      const Scalar bias = biased ? block.read(bias_ + channel) : Scalar(0);
      CONCERTINA_UNROLL
      for (int i = 0; i < strip; ++i) sums.of[o].at[i] = bias;
    }
  }

  template <class B>
  CONCERTINA_DEVICE void store(B& block, const Tile& tile, const Lane& lane,
                               const Sums& sums) const {
    const int image = tile.image + lane.image, channel = tile.channel + lane.group * channels;
    const int y = tile.row + lane.row, x = tile.column + lane.strip * strip;
    if (image >= batch_ || y >= out_height_) return;
    const int map = out_height_ * out_width_;
    Scalar* const to = y_ + (static_cast<Index>(image) * out_ + channel) * map + y * out_width_ + x;
    CONCERTINA_UNROLL
    for (int o = 0; o < channels; ++o) {
      CONCERTINA_UNROLL
      for (int i = 0; i < strip; ++i) {
        if (channel + o < out_ && x + i < out_width_) {
          block.write(to + (o * map + i), sums.of[o].at[i]);
        }
      }
    }
  }

  const Scalar* x_;
  const Scalar* weight_;
  const Scalar* bias_;
  Scalar* y_;
  Index blocks_;
  std::size_t shared_bytes_;
  int fours_;
  int batch_, in_, out_, height_, width_, out_height_, out_width_, kernel_, padding_;
  int images_, rows_, strips_, groups_, splits_, weight_step_, weights_at_, lanes_;
  int row_tiles_, column_tiles_, group_tiles_;
  detail::MapTile map_;
  detail::Divisor by_taps_, by_chunk_, by_strips_, by_rows_, by_images_, by_groups_;
  bool adjoint_;
};

namespace detail {

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

/// The first of the two programs of convolution_weight_gradient(): sums over slices of the
/// positions of the batch.
template <class Scalar, int Kernel>
class KernelGradientSlices {
  using Four = detail::Four<Scalar>;
  static constexpr int strip = detail::strip, channels = detail::channels;
  static constexpr int taps = Kernel == 0 ? strip : Kernel;
  static constexpr int window = (strip + taps - 1 + strip - 1) / strip;

 public:
  static constexpr int threads = detail::kernel_threads(Kernel);

  struct Arguments {
    ConvolutionShape shape;
    const Scalar* x;
    const Scalar* dy;
    Scalar* workspace;
    bool bias;
  };

  /// Requires  a valid shape, of this Kernel unless that is 0, and its tile
  KernelGradientSlices(const Arguments& arguments, const detail::KernelTile& tile)
      : x_(arguments.x), dy_(arguments.dy), workspace_(arguments.workspace), bias_(arguments.bias) {
    const ConvolutionShape& shape = arguments.shape;
    const auto number = [](Index value) { return static_cast<int>(value); };
    blocks_ = tile.blocks(shape);
    detail::require_blocks(blocks_, shape);
    shared_bytes_ = concertina::cuda::shared_size<Four>(static_cast<std::size_t>(tile.fours));
    fours_ = number(tile.fours);
    slice_numbers_ = tile.slice_numbers(shape);

    batch_ = number(shape.batch);
    in_ = number(shape.in), out_ = number(shape.out);
    height_ = number(shape.height), width_ = number(shape.width);
    out_height_ = number(shape.out_height()), out_width_ = number(shape.out_width());
    kernel_ = number(shape.kernel), padding_ = number(shape.padding);

    images_ = number(tile.images), rows_ = number(tile.rows), strips_ = number(tile.strips);
    lanes_ = number(tile.lanes), splits_ = number(tile.splits), parts_ = number(tile.parts);
    units_ = number(tile.in * shape.kernel * tile.parts);
    all_units_ = number(tile.all_units(shape));
    items_each_ = number(tile.items_each), items_ = number(tile.items(shape));
    row_tiles_ = number(tile.row_tiles(shape));
    column_tiles_ = number(tile.column_tiles(shape));
    in_tiles_ = number(tile.in_tiles(shape)), groups_ = number(tile.groups(shape));

    map_.images = images_, map_.channels = number(tile.in);
    map_.rows = number(tile.used_rows(shape)), map_.fours = number(tile.used_fours());
    map_.row_step = number(tile.x_row_step);
    map_.image_step = map_.rows * map_.row_step;
    map_.channel_step = number(tile.x_channel_step);
    map_.set_divisors();
    gradient_.first = map_.channels * map_.channel_step;
    gradient_.images = images_, gradient_.channels = channels;
    gradient_.rows = rows_, gradient_.fours = strips_;
    gradient_.row_step = strips_;
    gradient_.image_step = rows_ * strips_;
    gradient_.channel_step = number(tile.dy_channel_step);
    gradient_.set_divisors();
    by_lanes_ = detail::Divisor(lanes_);
    by_parts_ = detail::Divisor(parts_), by_kernel_ = detail::Divisor(kernel_);
  }

  Index blocks() const { return blocks_; }
  std::size_t shared_bytes() const { return shared_bytes_; }

  template <concertina::cuda::Block B>
  CONCERTINA_DEVICE void operator()(B& block, Index number) const {
    const auto memory = block.template shared<Four>(fours_);
    typename B::template PerThread<Sums> sums(block);
    const int line = static_cast<int>(number) / groups_;
    const int channel = static_cast<int>(number) % groups_ * channels;
    const int in_tile = line % in_tiles_, slice = line / in_tiles_;
    const bool bias = bias_ && in_tile == 0;
    block.each_thread([&](int thread) { clear(sums[thread]); });
    const int end = (slice + 1) * items_each_ < items_ ? (slice + 1) * items_each_ : items_;
    for (int item = slice * items_each_; item < end; ++item) {
      block.each_thread([&](int thread) {
        fill_item(block, memory, thread, item, channel, in_tile * map_.channels);
      });
      block.each_thread([&](int thread) {
        const Lane lane = lane_of(thread);
        if (lane.split >= splits_) return;
        if (lane.unit < units_) accumulate(memory, lane, sums[thread]);
        if (bias && lane.unit < channels) accumulate_bias(memory, lane, sums[thread]);
      });
    }
    const int others = (splits_ - 1) * lanes_;
    if (splits_ > 1) {
      block.each_thread([&](int thread) {
        const int other = thread - lanes_;
        if (other < 0 || other >= others) return;
        CONCERTINA_UNROLL
        for (int n = 0; n < 2 * taps; ++n) memory.set(n * others + other, sums[thread].four(n));
        Four of_bias{};
        of_bias.at[0] = sums[thread].bias;
        memory.set(2 * taps * others + other, of_bias);
      });
    }
    block.each_thread([&](int thread) {
      if (thread >= lanes_) return;
      Sums& sum = sums[thread];
      for (int split = 0; split < splits_ - 1; ++split) {
        CONCERTINA_UNROLL
        for (int n = 0; n < 2 * taps; ++n) {
          sum.add(n, memory.get(n * others + split * lanes_ + thread));
        }
        sum.bias += memory.get(2 * taps * others + split * lanes_ + thread).at[0];
      }
      const int unit = in_tile * units_ + thread;
      Scalar* const to = workspace_ + slice * slice_numbers_;
      if (thread < units_ && unit < all_units_) {
        Scalar* const column = to + static_cast<Index>(channel) * taps * all_units_ + unit;
        CONCERTINA_UNROLL
        for (int t = 0; t < taps; ++t) {
          CONCERTINA_UNROLL
          for (int o = 0; o < channels; ++o) {
            block.write(column + (t * channels + o) * all_units_, sum.weight[t][o]);
          }
        }
      }
      if (bias && thread < channels) {
        const Index weights = static_cast<Index>(groups_) * channels * taps * all_units_;
        block.write(to + weights + channel + thread, sum.bias);
      }
    });
  }

 private:
  /// Of a unit, and of the bias of one output channel.
  struct Sums {
    Scalar weight[taps][channels];
    Scalar bias;

    CONCERTINA_DEVICE Four four(int n) const {
      Four result;
      CONCERTINA_UNROLL
      for (int i = 0; i < 4; ++i) result.at[i] = weight[n / 2][n % 2 * 4 + i];
      return result;
    }
    CONCERTINA_DEVICE void add(int n, const Four& four) {
      CONCERTINA_UNROLL
      for (int i = 0; i < 4; ++i) weight[n / 2][n % 2 * 4 + i] += four.at[i];
    }
  };
  struct Lane {
    int unit, split;
  };

  CONCERTINA_DEVICE int kernel() const { return Kernel == 0 ? kernel_ : Kernel; }

  CONCERTINA_DEVICE static void clear(Sums& sums) {
    CONCERTINA_UNROLL
    for (int t = 0; t < taps; ++t) {
      CONCERTINA_UNROLL
      for (int o = 0; o < channels; ++o) sums.weight[t][o] = Scalar(0);
    }
    sums.bias = Scalar(0);
  }

  CONCERTINA_DEVICE Lane lane_of(int thread) const {
    Lane lane;
    lane.unit = by_lanes_.take(thread);
    lane.split = thread;
    return lane;
  }

  template <class B, class Memory>
  CONCERTINA_DEVICE void fill_item(B& block, const Memory& memory, int thread, int item, int out,
                                   int in) const {
    const int column = item % column_tiles_ * strips_ * strip, line = item / column_tiles_;
    const int row = line % row_tiles_ * rows_, image = line / row_tiles_ * images_;
    const int map = height_ * width_, out_map = out_height_ * out_width_;
    detail::fill_maps<Scalar>(block, memory, thread, map_,
                              {.maps = x_ + (static_cast<Index>(image) * in_ + in) * map,
                               .images = batch_ - image,
                               .channels = in_ - in,
                               .image_step = in_ * map,
                               .height = height_,
                               .width = width_,
                               .top = row - padding_,
                               .left = column - padding_});
    detail::fill_maps<Scalar>(block, memory, thread, gradient_,
                              {.maps = dy_ + (static_cast<Index>(image) * out_ + out) * out_map,
                               .images = batch_ - image,
                               .channels = out_ - out,
                               .image_step = out_ * out_map,
                               .height = out_height_,
                               .width = out_width_,
                               .top = row,
                               .left = column});
  }

  template <class Memory>
  CONCERTINA_DEVICE void accumulate(const Memory& memory, const Lane& lane, Sums& sums) const {
    int rest = lane.unit;
    const int part = by_parts_.take(rest), ky = by_kernel_.take(rest), in = rest;
    for (int line = lane.split; line < images_ * rows_; line += splits_) {
      int image = line;
      const int row = gradient_.by_rows.take(image);
      const int x =
          in * map_.channel_step + image * map_.image_step + (row + ky) * map_.row_step + part;
      const int dy = gradient_.first + line * strips_;
      for (int s = 0; s < strips_; ++s) {
        Scalar near[window * strip];
        CONCERTINA_UNROLL
        for (int w = 0; w < window; ++w) {
          const Four four = memory.get(x + s + w);
          CONCERTINA_UNROLL
          for (int i = 0; i < strip; ++i) near[w * strip + i] = four.at[i];
        }
        CONCERTINA_UNROLL
        for (int o = 0; o < channels; ++o) {
          const Four gradient = memory.get(dy + o * gradient_.channel_step + s);
          CONCERTINA_UNROLL
          for (int i = 0; i < strip; ++i) {
            CONCERTINA_UNROLL
            for (int t = 0; t < taps; ++t) sums.weight[t][o] += gradient.at[i] * near[i + t];
          }
        }
      }
    }
  }

  /// Each of the first units has a channel, or the first one would have as much again to add.
  template <class Memory>
  CONCERTINA_DEVICE void accumulate_bias(const Memory& memory, const Lane& lane, Sums& sums) const {
    const int channel = gradient_.first + lane.unit * gradient_.channel_step;
    for (int line = lane.split; line < images_ * rows_; line += splits_) {
      for (int s = 0; s < strips_; ++s) {
        const Four gradient = memory.get(channel + line * strips_ + s);
        sums.bias += (gradient.at[0] + gradient.at[1]) + (gradient.at[2] + gradient.at[3]);
      }
    }
  }

  const Scalar* x_;
  const Scalar* dy_;
  Scalar* workspace_;
  Index blocks_, slice_numbers_;
  std::size_t shared_bytes_;
  int fours_;
  int batch_, in_, out_, height_, width_, out_height_, out_width_, kernel_, padding_;
  int images_, rows_, strips_, lanes_, splits_, parts_, units_, all_units_;
  int items_each_, items_, row_tiles_, column_tiles_, in_tiles_, groups_;
  detail::MapTile map_, gradient_;
  detail::Divisor by_lanes_, by_parts_, by_kernel_;
  bool bias_;
};

/// The second program: the slices' sums, added up in an order that depends on nothing but the
/// shape.
template <class Scalar>
class KernelGradientSum {
  // 32 neighbouring numbers, and eight threads to read the slices of each: 256 slices are 32 reads.
  static constexpr int numbers = 32, readers = 8;

 public:
  static constexpr int threads = numbers * readers;

  struct Arguments {
    ConvolutionShape shape;
    const Scalar* workspace;
    Scalar* dw;
    Scalar* db;  ///< or null
  };

  KernelGradientSum(const Arguments& arguments, const detail::KernelTile& tile)
      : workspace_(arguments.workspace), dw_(arguments.dw), db_(arguments.db) {
    const ConvolutionShape& shape = arguments.shape;
    slice_numbers_ = tile.slice_numbers(shape);
    slices_ = static_cast<int>(tile.slices);
    in_ = static_cast<int>(shape.in), out_ = static_cast<int>(shape.out);
    kernel_ = static_cast<int>(shape.kernel);
    taps_ = static_cast<int>(tile.taps), parts_ = static_cast<int>(tile.parts);
    all_units_ = static_cast<int>(tile.all_units(shape));
    group_numbers_ = detail::channels * taps_ * all_units_;
    weights_ = static_cast<int>(tile.groups(shape)) * group_numbers_;
  }

  Index blocks() const { return detail::divide_up(slice_numbers_, numbers); }
  std::size_t shared_bytes() const { return concertina::cuda::shared_size<Scalar>(threads); }

  template <concertina::cuda::Block B>
  CONCERTINA_DEVICE void operator()(B& block, Index number) const {
    const auto parts = block.template shared<Scalar>(threads);
    const int first = static_cast<int>(number) * numbers;
    block.each_thread([&](int thread) {
      Scalar sum(0);
      const int at = first + thread % numbers;
      if (target(at) != nullptr) {
        const Scalar* from = workspace_ + at;
        for (int slice = thread / numbers; slice < slices_; slice += readers) {
          sum += block.read(from + slice * slice_numbers_);
        }
      }
      parts.set(thread, sum);
    });
    block.each_thread([&](int thread) {
      if (thread >= numbers) return;
      Scalar* const to = target(first + thread);
      if (to == nullptr) return;
      Scalar sum(0);
      CONCERTINA_UNROLL
      for (int reader = 0; reader < readers; ++reader) sum += parts.get(reader * numbers + thread);
      block.write(to, sum);
    });
  }

 private:
  /// Where a number of the workspace belongs; null for those that fill up groups and parts.
  CONCERTINA_DEVICE Scalar* target(int at) const {
    if (at >= weights_) {
      const int out = at - weights_;
      return db_ != nullptr && out < out_ ? db_ + out : nullptr;
    }
    const int group = at / group_numbers_, row = at % group_numbers_ / all_units_;
    const int unit = at % all_units_, line = unit / parts_;
    const int out = group * detail::channels + row % detail::channels;
    const int kx = unit % parts_ * taps_ + row / detail::channels;
    if (out >= out_ || kx >= kernel_) return nullptr;
    const int in = line / kernel_, ky = line % kernel_;
    return dw_ + (((static_cast<Index>(out) * in_ + in) * kernel_ + ky) * kernel_ + kx);
  }

  const Scalar* workspace_;
  Scalar* dw_;
  Scalar* db_;
  Index slice_numbers_;
  int slices_, in_, out_, kernel_, taps_, parts_, all_units_, group_numbers_, weights_;
};

// What callers call. Each makes its programs and calls run(program, what for) with them, in order:
// launch() on the device, execute() in tests.

template <class Scalar>
struct ConvolutionForward {
  ConvolutionShape shape;
  const Scalar* x = nullptr;       ///< [batch][in][height][width]
  const Scalar* weight = nullptr;  ///< [out][in][kernel][kernel]
  const Scalar* bias = nullptr;    ///< [out], or null for none
  Scalar* y = nullptr;             ///< [batch][out][out height][out width]
  Index busy = busy_blocks;
};

/// y[n][o][j] = bias[o] + the sum of weight[o][c][a] * x[n][c][j - padding + a], x zero outside, as
/// torch.nn.Conv2d.
/// Throws  what validate() throws
template <class Scalar, class Run>
void convolution_forward(const ConvolutionForward<Scalar>& arguments, Run&& run) {
  validate(arguments.shape);
  detail::with_kernel(arguments.shape.kernel, [&](auto kernel) {
    run(Convolve<Scalar, kernel>({.shape = arguments.shape,
                                  .x = arguments.x,
                                  .weight = arguments.weight,
                                  .bias = arguments.bias,
                                  .y = arguments.y,
                                  .adjoint = false},
                                 arguments.busy),
        "a convolution");
  });
}

template <class Scalar>
struct ConvolutionInputGradient {
  ConvolutionShape shape;          ///< of the convolution
  const Scalar* dy = nullptr;      ///< [batch][out][out height][out width]
  const Scalar* weight = nullptr;  ///< [out][in][kernel][kernel]
  Scalar* dx = nullptr;            ///< [batch][in][height][width], overwritten
  Index busy = busy_blocks;
};

/// dx[n][c][i] = the sum of weight[o][c][a] * dy[n][o][i + padding - a], dy zero outside.
/// Throws  what validate() throws
template <class Scalar, class Run>
void convolution_input_gradient(const ConvolutionInputGradient<Scalar>& arguments, Run&& run) {
  validate(arguments.shape);
  detail::with_kernel(arguments.shape.kernel, [&](auto kernel) {
    run(Convolve<Scalar, kernel>({.shape = arguments.shape.adjoint(),
                                  .x = arguments.dy,
                                  .weight = arguments.weight,
                                  .bias = nullptr,
                                  .y = arguments.dx,
                                  .adjoint = true},
                                 arguments.busy),
        "a convolution's gradient for its input");
  });
}

template <class Scalar>
struct ConvolutionWeightGradient {
  ConvolutionShape shape;
  const Scalar* x = nullptr;    ///< [batch][in][height][width]
  const Scalar* dy = nullptr;   ///< [batch][out][out height][out width]
  Scalar* workspace = nullptr;  ///< convolution_workspace() numbers, of any values
  Scalar* dw = nullptr;         ///< [out][in][kernel][kernel], overwritten
  Scalar* db = nullptr;         ///< [out], overwritten, or null for none
  Index busy = busy_blocks;
};

/// Numbers of a workspace.
/// Throws  what validate() throws
template <class Scalar>
Index convolution_workspace(const ConvolutionShape& shape, Index busy = busy_blocks) {
  validate(shape);
  const detail::KernelTile tile = detail::kernel_tile<Scalar>(shape, busy);
  return tile.slices * tile.slice_numbers(shape);
}

/// dw[o][c][a] = the sum of dy[n][o][j] * x[n][c][j - padding + a], x zero outside; db[o] = the sum
/// of dy[n][o][j]. The same numbers every time: sums are added up in one order.
/// Throws  what validate() throws
template <class Scalar, class Run>
void convolution_weight_gradient(const ConvolutionWeightGradient<Scalar>& arguments, Run&& run) {
  validate(arguments.shape);
  const detail::KernelTile tile = detail::kernel_tile<Scalar>(arguments.shape, arguments.busy);
  detail::with_kernel(arguments.shape.kernel, [&](auto kernel) {
    run(KernelGradientSlices<Scalar, kernel>({.shape = arguments.shape,
                                              .x = arguments.x,
                                              .dy = arguments.dy,
                                              .workspace = arguments.workspace,
                                              .bias = arguments.db != nullptr},
                                             tile),
        "a convolution's gradient for its kernel");
  });
  run(KernelGradientSum<Scalar>({.shape = arguments.shape,
                                 .workspace = arguments.workspace,
                                 .dw = arguments.dw,
                                 .db = arguments.db},
                                tile),
      "the sum of a gradient's slices");
}

}  // namespace cifar::cuda
