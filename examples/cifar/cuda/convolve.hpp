// The block program of a convolution of maps, and of the gradient of its input.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "convolution_tiles.hpp"

#include <concertina/cuda/block.hpp>

#include <cstddef>

namespace cifar::cuda {

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

  template <concertina::cuda::ThreadBlock B>
  CONCERTINA_DEVICE void operator()(B& block, Index index) const {
    const auto memory = block.template shared<Four>(fours_);
    typename B::template PerThread<Sums> sums(block);
    const Tile tile = tile_of(static_cast<int>(index));
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

}  // namespace cifar::cuda
