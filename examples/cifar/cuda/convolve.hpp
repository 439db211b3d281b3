// The block program of a convolution of maps, and of the gradient of its input.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "convolution_tiles.hpp"

#include <concertina/cuda/block.hpp>

#include <cstddef>

namespace cifar::cuda {

/// Of a convolution; or of its adjoint, from the gradient of its output to that of its input.
template <class Scalar>
struct Convolution {
  ConvolutionShape shape;          ///< of the convolution
  const Scalar* from = nullptr;    ///< maps, [image][channel][y][x]
  const Scalar* weight = nullptr;  ///< [out][in][kernel][kernel]
  const Scalar* bias = nullptr;    ///< [channel of `to`], or null for none
  Scalar* to = nullptr;            ///< overwritten
  int busy = busy_blocks;
};

/// The program of a convolution of maps, plus a bias, or of an adjoint, whose shape is the
/// adjoint's with the kernel still that of the convolution.
/// Kernel 0 takes the kernel's size at run time; the others know it and unroll its rows.
template <class Scalar, int Kernel>
class Convolve {
  using Four = detail::Four<Scalar>;
  static constexpr int strip = detail::strip, channels = detail::channels;

 public:
  static constexpr int threads = detail::convolve_threads;

  /// Requires  a valid shape, of this Kernel unless that is 0
  Convolve(const Convolution<Scalar>& given, bool adjoint)
      : maps_(given),
        shape_(adjoint ? given.shape.adjoint() : given.shape),
        tile_(detail::choose_convolve_tile(shape_, sizeof(Four), given.busy)),
        by_taps_(shape_.taps()),
        by_chunk_(tile_.map.channels * shape_.taps()),
        adjoint_(adjoint) {}

  Index blocks() const { return tile_.blocks; }
  std::size_t shared_bytes() const {
    return concertina::cuda::shared_size<Four>(static_cast<std::size_t>(tile_.fours));
  }

  template <concertina::cuda::ThreadBlock B>
  CONCERTINA_DEVICE void operator()(B& block, Index index) const {
    const auto memory = block.template shared<Four>(tile_.fours);
    typename B::template PerThread<Sums> sums(block);
    const detail::Corner at = corner_of(static_cast<int>(index));
    const int splits = tile_.splits, lanes = tile_.lanes;
    block.each_thread([&](int thread) { start(block, at, lane_of(thread), sums[thread]); });
    for (int first = 0; first < shape_.in; first += tile_.map.channels) {
      const int rest = shape_.in - first, most = tile_.map.channels;
      const int count = rest < most ? rest : most;
      block.each_thread([&](int thread) {
        detail::fill_maps<Scalar>(
            block, memory, thread, tile_.map,
            {maps_.from, shape_.batch, shape_.in, shape_.height, shape_.width},
            {at.image, first, at.top - shape_.padding, at.left - shape_.padding});
        fill_weights(block, memory, thread, at.channel, first, count);
      });
      block.each_thread([&](int thread) {
        const Lane lane = lane_of(thread);
        if (lane.split < splits) accumulate(memory, lane, count, sums[thread]);
      });
    }
    const int others = (splits - 1) * lanes;
    if (splits > 1) {
      block.each_thread([&](int thread) {
        if (thread < lanes || thread >= splits * lanes) return;
        CONCERTINA_UNROLL
        for (int o = 0; o < channels; ++o) {
          memory.set(o * others + thread - lanes, sums[thread].of[o]);
        }
      });
    }
    block.each_thread([&](int thread) {
      if (thread >= lanes) return;
      for (int other = thread; other < others; other += lanes) {
        CONCERTINA_UNROLL
        for (int o = 0; o < channels; ++o) {
          const Four more = memory.get(o * others + other);
          CONCERTINA_UNROLL
          for (int i = 0; i < strip; ++i) sums[thread].of[o].at[i] += more.at[i];
        }
      }
      store(block, at, lane_of(thread), sums[thread]);
    });
  }

 private:
  /// Of a strip, [channel][position].
  struct Sums {
    Four of[channels];
  };
  /// What a thread computes of a tile. Positions come first, so that a warp's threads read the same
  /// weights.
  struct Lane {
    int strip, row, image, group, split;
  };

  CONCERTINA_DEVICE int kernel() const { return Kernel == 0 ? shape_.kernel : Kernel; }

  /// Where a block's tile of the output starts. Blocks that read the same maps are neighbours.
  CONCERTINA_DEVICE detail::Corner corner_of(int number) const {
    const int group = number % tile_.group_tiles, position = number / tile_.group_tiles;
    const int column = position % tile_.column_tiles, line = position / tile_.column_tiles;
    return {line / tile_.row_tiles * tile_.images, group * tile_.groups * channels,
            line % tile_.row_tiles * tile_.rows, column * tile_.strips * strip};
  }

  CONCERTINA_DEVICE Lane lane_of(int thread) const {
    Lane lane;
    lane.strip = tile_.strips.take(thread);
    lane.row = tile_.rows.take(thread);
    lane.image = tile_.images.take(thread);
    lane.group = tile_.groups.take(thread);
    lane.split = thread;
    return lane;
  }

  /// Weights stand as [in][tap][out], so that a Four is that of four output channels. Threads take
  /// taps in turn, which are neighbours where they come from.
  template <class B, class Memory>
  CONCERTINA_DEVICE void fill_weights(B& block, const Memory& memory, int thread, int channel,
                                      int first, int count) const {
    const int taps = kernel() * kernel();
    const int in_step = adjoint_ ? shape_.out * taps : taps;
    const int out_step = adjoint_ ? taps : shape_.in * taps;
    detail::fill<threads, Scalar>(
        memory, 2 * tile_.groups * tile_.map.channels * taps, thread, [&](int rest) {
          const int row = by_chunk_.take(rest), half = rest;
          int in = row;
          const int tap = by_taps_.take(in), from_tap = adjoint_ ? taps - 1 - tap : tap;
          const int out = channel + half * 4;
          const int offset = out * out_step + (first + in) * in_step + from_tap;
          detail::Placed<Scalar> placed;
          placed.at = tile_.weights_at + row * tile_.weight_step + half;
          CONCERTINA_UNROLL
          for (int i = 0; i < 4; ++i) {
            const bool there = in < count && out + i < shape_.out;
            placed.value.at[i] =
                there ? block.read(maps_.weight + (offset + i * out_step)) : Scalar(0);
          }
          return placed;
        });
  }

  template <class Memory>
  CONCERTINA_DEVICE void accumulate(const Memory& memory, const Lane& lane, int count,
                                    Sums& sums) const {
    const detail::MapTile& tile = tile_.map;
    const int map = lane.image * tile.image_step + lane.row * tile.row_step + lane.strip;
    const int weights = tile_.weights_at + 2 * lane.group;
    for (int in = lane.split; in < count; in += tile_.splits) {
      for (int ky = 0; ky < kernel(); ++ky) {
        const int row = map + in * tile.channel_step + ky * tile.row_step;
        const int taps = weights + (in * kernel() + ky) * kernel() * tile_.weight_step;
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
                const Four weight = memory.get(taps + (kx + tap) * tile_.weight_step + half);
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

  /// One of the splits starts with the bias, which is then there before anything waits for it.
  template <class B>
  CONCERTINA_DEVICE void start(B& block, const detail::Corner& at, const Lane& lane,
                               Sums& sums) const {
    CONCERTINA_UNROLL
    for (int o = 0; o < channels; ++o) {
      const int channel = at.channel + lane.group * channels + o;
      const bool biased = maps_.bias != nullptr && lane.split == 0 && channel < shape_.out;
      const Scalar bias = biased ? block.read(maps_.bias + channel) : Scalar(0);
      CONCERTINA_UNROLL
      for (int i = 0; i < strip; ++i) sums.of[o].at[i] = bias;
    }
  }

  template <class B>
  CONCERTINA_DEVICE void store(B& block, const detail::Corner& at, const Lane& lane,
                               const Sums& sums) const {
    const int image = at.image + lane.image, channel = at.channel + lane.group * channels;
    const int y = at.top + lane.row, x = at.left + lane.strip * strip;
    const int height = shape_.out_height(), width = shape_.out_width(), map = height * width;
    if (image >= shape_.batch || y >= height) return;
    Scalar* const to =
        maps_.to + (static_cast<Index>(image) * shape_.out + channel) * map + y * width + x;
    CONCERTINA_UNROLL
    for (int o = 0; o < channels; ++o) {
      CONCERTINA_UNROLL
      for (int i = 0; i < strip; ++i) {
        if (channel + o < shape_.out && x + i < width) {
          block.write(to + (o * map + i), sums.of[o].at[i]);
        }
      }
    }
  }

  Convolution<Scalar> maps_;
  ConvolutionShape shape_;
  detail::ConvolveTile tile_;
  detail::Divisor by_taps_, by_chunk_;
  bool adjoint_;
};

}  // namespace cifar::cuda
