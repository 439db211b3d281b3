// The block programs of the gradient of a convolution's kernel and bias.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "convolution_tiles.hpp"

#include <concertina/cuda/block.hpp>

#include <cstddef>

namespace cifar::cuda {

template <class Scalar>
struct ConvolutionWeightGradient {
  ConvolutionShape shape;
  const Scalar* x = nullptr;    ///< [batch][in][height][width]
  const Scalar* dy = nullptr;   ///< [batch][out][out height][out width]
  Scalar* workspace = nullptr;  ///< convolution_workspace() numbers, of any values
  Scalar* dw = nullptr;         ///< [out][in][kernel][kernel], overwritten
  Scalar* db = nullptr;         ///< [out], overwritten, or null for none
  int busy = busy_blocks;
};

/// The first of the two programs of convolution_weight_gradient(): sums over slices of the
/// positions of the batch. Of a valid shape, of this Kernel unless that is 0, and its tile.
template <class Scalar, int Kernel>
struct KernelGradientSlices {
  using Four = detail::Four<Scalar>;
  static constexpr int strip = detail::strip, channels = detail::channels;
  static constexpr int taps = Kernel == 0 ? strip : Kernel;
  static constexpr int window = (strip + taps - 1 + strip - 1) / strip;
  static constexpr int threads = detail::kernel_threads(Kernel);

  ConvolutionWeightGradient<Scalar> maps;
  detail::KernelTile tile;

  Index blocks() const { return tile.blocks; }
  std::size_t shared_bytes() const {
    return concertina::cuda::shared_size<Four>(static_cast<std::size_t>(tile.fours));
  }

  template <concertina::cuda::ThreadBlock B>
  CONCERTINA_DEVICE void operator()(B& block, Index index) const {
    const auto memory = block.template shared<Four>(tile.fours);
    typename B::template PerThread<Sums> sums(block);
    const int line = static_cast<int>(index) / tile.groups;
    const int channel = static_cast<int>(index) % tile.groups * channels;
    const int in_tile = line % tile.in_tiles, slice = line / tile.in_tiles;
    const bool bias = maps.db != nullptr && in_tile == 0;
    block.each_thread([&](int thread) { sums[thread] = Sums{}; });
    const int first = slice * tile.items_each, next = first + tile.items_each;
    for (int item = first; item < (next < tile.items ? next : tile.items); ++item) {
      block.each_thread(
          [&](int thread) { fill_item(block, memory, thread, item, channel, in_tile * tile.in); });
      block.each_thread([&](int thread) {
        const Lane lane = lane_of(thread);
        if (lane.split >= tile.splits) return;
        if (lane.unit < tile.units) accumulate(memory, lane, sums[thread]);
        if (bias && lane.unit < channels) accumulate_bias(memory, lane, sums[thread]);
      });
    }
    const int splits = tile.splits, lanes = tile.lanes;
    const int others = (splits - 1) * lanes;
    if (splits > 1) {
      block.each_thread([&](int thread) {
        const int other = thread - lanes;
        if (other < 0 || other >= others) return;
        CONCERTINA_UNROLL
        for (int n = 0; n < 2 * taps; ++n) memory.set(n * others + other, sums[thread].weight[n]);
        Four of_bias{};
        of_bias.at[0] = sums[thread].bias;
        memory.set(2 * taps * others + other, of_bias);
      });
    }
    block.each_thread([&](int thread) {
      if (thread >= lanes) return;
      Sums& sum = sums[thread];
      for (int split = 0; split < splits - 1; ++split) {
        CONCERTINA_UNROLL
        for (int n = 0; n < 2 * taps; ++n) {
          const Four more = memory.get(n * others + split * lanes + thread);
          CONCERTINA_UNROLL
          for (int i = 0; i < 4; ++i) sum.weight[n].at[i] += more.at[i];
        }
        sum.bias += memory.get(2 * taps * others + split * lanes + thread).at[0];
      }
      const int unit = in_tile * tile.units + thread;
      Scalar* const to = maps.workspace + slice * tile.slice_numbers;
      if (thread < tile.units && unit < tile.all_units) {
        Scalar* const column = to + static_cast<Index>(channel) * taps * tile.all_units + unit;
        CONCERTINA_UNROLL
        for (int t = 0; t < taps; ++t) {
          CONCERTINA_UNROLL
          for (int o = 0; o < channels; ++o) {
            block.write(column + (t * channels + o) * tile.all_units,
                        sum.weight[2 * t + o / 4].at[o % 4]);
          }
        }
      }
      if (bias && thread < channels) {
        const Index weights = static_cast<Index>(tile.groups) * channels * taps * tile.all_units;
        block.write(to + weights + channel + thread, sum.bias);
      }
    });
  }

 private:
  /// Of a unit, [tap][channel], and of the bias of one output channel.
  struct Sums {
    Four weight[2 * taps];
    Scalar bias;
  };
  struct Lane {
    int unit, split;
  };

  CONCERTINA_DEVICE Lane lane_of(int thread) const {
    Lane lane;
    lane.unit = tile.lanes.take(thread);
    lane.split = thread;
    return lane;
  }

  template <class B, class Memory>
  CONCERTINA_DEVICE void fill_item(B& block, const Memory& memory, int thread, int item, int out,
                                   int in) const {
    const ConvolutionShape& shape = maps.shape;
    const int left = item % tile.column_tiles * tile.strips * strip;
    const int line = item / tile.column_tiles;
    const int top = line % tile.row_tiles * tile.rows, image = line / tile.row_tiles * tile.images;
    detail::fill_maps<Scalar>(block, memory, thread, tile.x,
                              {maps.x, shape.batch, shape.in, shape.height, shape.width},
                              {image, in, top - shape.padding, left - shape.padding});
    detail::fill_maps<Scalar>(
        block, memory, thread, tile.dy,
        {maps.dy, shape.batch, shape.out, shape.out_height(), shape.out_width()},
        {image, out, top, left});
  }

  template <class Memory>
  CONCERTINA_DEVICE void accumulate(const Memory& memory, const Lane& lane, Sums& sums) const {
    int rest = lane.unit;
    const int part = tile.parts.take(rest), ky = tile.kernel.take(rest), in = rest;
    for (int line = lane.split; line < tile.images * tile.rows; line += tile.splits) {
      int image = line;
      const int row = tile.dy.rows.take(image);
      const int x = in * tile.x.channel_step + image * tile.x.image_step +
                    (row + ky) * tile.x.row_step + part;
      const int dy = tile.dy.first + line * tile.strips;
      for (int s = 0; s < tile.strips; ++s) {
        Scalar near[window * strip];
        CONCERTINA_UNROLL
        for (int w = 0; w < window; ++w) {
          const Four four = memory.get(x + s + w);
          CONCERTINA_UNROLL
          for (int i = 0; i < strip; ++i) near[w * strip + i] = four.at[i];
        }
        CONCERTINA_UNROLL
        for (int o = 0; o < channels; ++o) {
          const Four gradient = memory.get(dy + o * tile.dy.channel_step + s);
          CONCERTINA_UNROLL
          for (int i = 0; i < strip; ++i) {
            CONCERTINA_UNROLL
            for (int t = 0; t < taps; ++t) {
              sums.weight[2 * t + o / 4].at[o % 4] += gradient.at[i] * near[i + t];
            }
          }
        }
      }
    }
  }

  /// Each of the first units has a channel, or the first one would have as much again to add.
  template <class Memory>
  CONCERTINA_DEVICE void accumulate_bias(const Memory& memory, const Lane& lane, Sums& sums) const {
    const int channel = tile.dy.first + lane.unit * tile.dy.channel_step;
    for (int line = lane.split; line < tile.images * tile.rows; line += tile.splits) {
      for (int s = 0; s < tile.strips; ++s) {
        const Four gradient = memory.get(channel + line * tile.strips + s);
        sums.bias += (gradient.at[0] + gradient.at[1]) + (gradient.at[2] + gradient.at[3]);
      }
    }
  }
};

/// The second program: the slices' sums, added up in an order that depends on nothing but the
/// shape.
template <class Scalar>
struct KernelGradientSum {
  // 32 neighbouring numbers, and eight threads to read the slices of each: 256 slices are 32 reads.
  static constexpr int numbers = 32, readers = 8, threads = numbers * readers;

  ConvolutionWeightGradient<Scalar> maps;
  detail::KernelTile tile;

  Index blocks() const { return (tile.slice_numbers - 1) / numbers + 1; }
  std::size_t shared_bytes() const { return concertina::cuda::shared_size<Scalar>(threads); }

  template <concertina::cuda::ThreadBlock B>
  CONCERTINA_DEVICE void operator()(B& block, Index index) const {
    const auto parts = block.template shared<Scalar>(threads);
    const int first = static_cast<int>(index) * numbers;
    block.each_thread([&](int thread) {
      Scalar sum(0);
      const int at = first + thread % numbers;
      if (target(at) != nullptr) {
        const Scalar* from = maps.workspace + at;
        for (int slice = thread / numbers; slice < tile.slices; slice += readers) {
          sum += block.read(from + slice * tile.slice_numbers);
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
    const ConvolutionShape& shape = maps.shape;
    const int group_numbers = detail::channels * tile.taps * tile.all_units;
    const int group = at / group_numbers, row = at % group_numbers / tile.all_units;
    if (group >= tile.groups) {
      const int out = at - tile.groups * group_numbers;
      return maps.db != nullptr && out < shape.out ? maps.db + out : nullptr;
    }
    const int unit = at % tile.all_units, line = unit / tile.parts;
    const int out = group * detail::channels + row % detail::channels;
    const int kx = unit % tile.parts * tile.taps + row / detail::channels;
    if (out >= shape.out || kx >= shape.kernel) return nullptr;
    const int in = line / shape.kernel, ky = line % shape.kernel;
    return maps.dw +
           (((static_cast<Index>(out) * shape.in + in) * shape.kernel + ky) * shape.kernel + kx);
  }
};

}  // namespace cifar::cuda
