// The block programs of the gradient of a convolution's kernel and bias.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "convolution_tiles.hpp"

#include <concertina/cuda/block.hpp>

#include <cstddef>

namespace cifar::cuda {

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

  template <concertina::cuda::ThreadBlock B>
  CONCERTINA_DEVICE void operator()(B& block, Index index) const {
    const auto memory = block.template shared<Four>(fours_);
    typename B::template PerThread<Sums> sums(block);
    const int line = static_cast<int>(index) / groups_;
    const int channel = static_cast<int>(index) % groups_ * channels;
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

  template <concertina::cuda::ThreadBlock B>
  CONCERTINA_DEVICE void operator()(B& block, Index index) const {
    const auto parts = block.template shared<Scalar>(threads);
    const int first = static_cast<int>(index) * numbers;
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

}  // namespace cifar::cuda
