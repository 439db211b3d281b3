// The convolution of a chunk of sixteen images, its gradient for the input and for the kernel.
//
// All three are the same loop in other places: a block of O channels by X positions (or taps) of
// sums stays in registers while O + X vectors are read for O * X multiply-adds, so the arithmetic
// units are the limit and not the cache. O = 8 and X = 3 take 28 of 32 registers, O = 4 all of 16.
// Maps are [channel][y][x][lane], so a row is sixteen images and a weight is one factor for all;
// where registers are narrower than rows, one part of the lanes follows the other.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "lanes.hpp"

#include <concertina/shape.hpp>

#include <algorithm>
#include <type_traits>

namespace training {

/// Where a kernel stands on maps of one size; padding may be negative.
struct ConvSize {
  Index out = 0, in = 0;
  Index kernel_height = 1, kernel_width = 1;
  Index pad_height = 0, pad_width = 0;  ///< on both sides
  Index height = 0, width = 0;          ///< of the input
  Index stride = 1;                     ///< 1 or 2, of both axes

  Index out_height() const { return (dense_height() - 1) / stride + 1; }
  Index out_width() const { return (dense_width() - 1) / stride + 1; }
  /// Of the output without stride.
  Index dense_height() const { return height + 2 * pad_height - kernel_height + 1; }
  Index dense_width() const { return width + 2 * pad_width - kernel_width + 1; }
  Index taps() const { return kernel_height * kernel_width; }
  Index weights() const { return out * in * taps(); }

  /// The convolution that takes the gradient of the output to that of the input. Of a stride it
  /// reads the gradient spread(), on the map of the output without stride.
  ConvSize adjoint() const {
    return {.out = in,
            .in = out,
            .kernel_height = kernel_height,
            .kernel_width = kernel_width,
            .pad_height = kernel_height - 1 - pad_height,
            .pad_width = kernel_width - 1 - pad_width,
            .height = dense_height(),
            .width = dense_width()};
  }
};

namespace detail {

inline constexpr int widest_block = vector_registers >= 32 ? 8 : 4;  // of channels
inline constexpr int widest_span = 3;                                // of positions or taps

/// Calls each(first, N) for parts of `count`: as many as there are of `most`, then one at most of
/// half as many, and so on; N a constant.
template <int most, class Each>
void for_each_part(Index count, Each&& each, Index first = 0) {
  for (; count - first >= most; first += most) each(first, std::integral_constant<int, most>());
  if constexpr (most > 1) for_each_part<(most + 1) / 2>(count, each, first);
}
/// The rows of the kernel that meet the map at this row of the output.
struct TapRows {
  Index first, last;
};
inline TapRows tap_rows(const ConvSize& size, Index row) {
  const Index top = row * size.stride - size.pad_height;
  return {std::max<Index>(0, -top), std::min(size.kernel_height, size.height - top)};
}

/// Maps whose rows are padded on both sides, so that no tap falls beside them; rows above and below
/// are never read.
template <class Scalar>
struct PaddedRows {
  const Scalar* maps;
  Index row_step, channel_step;
};

template <class Scalar>
PaddedRows<Scalar> padded_rows(const ConvSize& size, const Scalar* x, Scalar* scratch) {
  if (size.pad_width == 0) return {x, size.width * lanes, size.height * size.width * lanes};
  const Index width = size.width + 2 * size.pad_width;
  const Index zeros = std::max<Index>(size.pad_width, 0) * lanes;
  const Index cropped = std::max<Index>(-size.pad_width, 0) * lanes;
  const Index numbers = size.width * lanes - 2 * cropped;
  Scalar* to = scratch;
  for (Index row = 0; row < size.in * size.height; ++row, x += size.width * lanes) {
    to = std::fill_n(to, zeros, Scalar(0));
    to = std::copy_n(x + cropped, numbers, to);
    to = std::fill_n(to, zeros, Scalar(0));
  }
  return {scratch, width * lanes, size.height * width * lanes};
}

/// y[o][i] (+)= the sum over input channels, rows of taps and taps, for O channels and X positions
/// of one row, every `Stride`-th of the input's, and a vector's lanes. `weight` is packed
/// [in][tap][O].
template <int O, int X, int Stride, class Scalar>
void convolve_block(const ConvSize& size, const PaddedRows<Scalar>& x, const Scalar* first,
                    TapRows rows, const Scalar* weight, Scalar* y, Index y_channel_step) {
  Vector<Scalar> sum[O][X];
#pragma GCC unroll 8
  for (int o = 0; o < O; ++o) {
#pragma GCC unroll 8
    for (int i = 0; i < X; ++i) sum[o][i] = vector_at(y + o * y_channel_step + i * lanes);
  }
  for (Index c = 0; c < size.in; ++c) {
    for (Index ky = rows.first; ky < rows.last; ++ky) {
      const Scalar* from = first + c * x.channel_step + ky * x.row_step;
      const Scalar* w = weight + (c * size.kernel_height + ky) * size.kernel_width * O;
      for (Index kx = 0; kx < size.kernel_width; ++kx, from += lanes, w += O) {
        Vector<Scalar> in[X];
#pragma GCC unroll 8
        for (int i = 0; i < X; ++i) in[i] = vector_at(from + i * Stride * lanes);
#pragma GCC unroll 8
        for (int o = 0; o < O; ++o) {
#pragma GCC unroll 8
          for (int i = 0; i < X; ++i) sum[o][i] += w[o] * in[i];
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int o = 0; o < O; ++o) {
#pragma GCC unroll 8
    for (int i = 0; i < X; ++i) vector_at(y + o * y_channel_step + i * lanes) = sum[o][i];
  }
}

/// sums[k][o] += the sum over `count` positions of a row of dy[o] times x shifted by k, for O
/// channels, K taps and a vector's lanes; x goes on by `stride` positions for each of dy's.
template <int O, int K, class Scalar>
void correlate_block(const Scalar* dy, Index dy_channel_step, const Scalar* x, Index stride,
                     Index count, Scalar* sums) {
  Vector<Scalar> sum[K][O];
#pragma GCC unroll 8
  for (int k = 0; k < K; ++k) {
#pragma GCC unroll 8
    for (int o = 0; o < O; ++o) sum[k][o] = vector_at(sums + (k * O + o) * lanes);
  }
  for (Index i = 0; i < count; ++i, dy += lanes, x += stride * lanes) {
    Vector<Scalar> in[K];
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) in[k] = vector_at(x + k * lanes);
#pragma GCC unroll 8
    for (int o = 0; o < O; ++o) {
      const Vector<Scalar> gradient = vector_at(dy + o * dy_channel_step);
#pragma GCC unroll 8
      for (int k = 0; k < K; ++k) sum[k][o] += gradient * in[k];
    }
  }
#pragma GCC unroll 8
  for (int k = 0; k < K; ++k) {
#pragma GCC unroll 8
    for (int o = 0; o < O; ++o) vector_at(sums + (k * O + o) * lanes) = sum[k][o];
  }
}

}  // namespace detail

/// A kernel [out][in][ky][kx] as the loops read it: blocks of channels, each [in][tap][channel].
template <class Scalar>
void pack_kernel(const ConvSize& size, const Scalar* weight, Scalar* packed) {
  const Index taps = size.taps(), row = size.in * taps;
  detail::for_each_part<detail::widest_block>(size.out, [&](Index first, auto block) {
    for (Index i = 0; i < row; ++i) {
      for (int o = 0; o < block; ++o) *packed++ = weight[(first + o) * row + i];
    }
  });
}

/// The kernel of the adjoint, packed: channels exchanged, taps in reverse.
template <class Scalar>
void pack_adjoint_kernel(const ConvSize& size, const Scalar* weight, Scalar* packed) {
  const Index taps = size.taps(), row = size.in * taps;
  detail::for_each_part<detail::widest_block>(size.in, [&](Index first, auto block) {
    for (Index o = 0; o < size.out; ++o) {
      for (Index tap = taps - 1; tap >= 0; --tap) {
        for (int c = 0; c < block; ++c) *packed++ = weight[o * row + (first + c) * taps + tap];
      }
    }
  });
}

/// Numbers of scratch that convolve needs.
inline Index convolve_scratch(const ConvSize& size) {
  return size.pad_width == 0 ? 0
                             : size.in * size.height * (size.width + 2 * size.pad_width) * lanes;
}

/// y += the convolution of x with a packed kernel.
/// Shapes  x[in][height][width][lane], y[out][out height][out width][lane]
/// Cost    out * in * taps * positions vector multiply-adds, but for rows of taps beside the map
template <class Scalar>
void convolve(const ConvSize& size, const Scalar* x, const Scalar* packed, Scalar* y,
              Scalar* scratch) {
  const detail::PaddedRows<Scalar> rows = detail::padded_rows(size, x, scratch);
  const Index width = size.out_width(), map = size.out_height() * width * lanes;
  const auto with_stride = [&](auto stride) {
    constexpr int Stride = decltype(stride)::value;
    for (Index row = 0; row < size.out_height(); ++row) {
      const Scalar* first = rows.maps + (row * Stride - size.pad_height) * rows.row_step;
      const detail::TapRows taps = detail::tap_rows(size, row);
      const Scalar* weight = packed;
      detail::for_each_part<detail::widest_block>(size.out, [&](Index o, auto block) {
        constexpr int O = decltype(block)::value;
        Scalar* to = y + o * map + row * width * lanes;
        detail::for_each_part<detail::widest_span>(width, [&](Index i, auto count) {
          for (int lane = 0; lane < lanes; lane += vector_lanes<Scalar>) {
            detail::convolve_block<O, decltype(count)::value, Stride>(
                size, rows, first + i * Stride * lanes + lane, taps, weight, to + i * lanes + lane,
                map);
          }
        });
        weight += size.in * size.taps() * O;
      });
    }
  };
  if (size.stride == 1) {
    with_stride(std::integral_constant<int, 1>());
  } else {
    with_stride(std::integral_constant<int, 2>());
  }
}

/// The gradient of the output on the map of the output without stride: zeros between.
/// Shapes  dy[out][out height][out width][lane], dense[out][dense height][dense width][lane]
template <class Scalar>
void spread(const ConvSize& size, const Scalar* dy, Scalar* dense) {
  const Index height = size.dense_height(), width = size.dense_width();
  std::fill_n(dense, size.out * height * width * lanes, Scalar(0));
  for (Index o = 0; o < size.out; ++o) {
    for (Index y = 0; y < height; y += size.stride) {
      for (Index x = 0; x < width; x += size.stride, dy += lanes) {
        std::copy_n(dy, lanes, dense + ((o * height + y) * width + x) * lanes);
      }
    }
  }
}

/// Numbers of scratch that correlate needs.
inline Index correlate_scratch(const ConvSize& size) {
  const Index rows = (size.in * size.taps() * detail::widest_block + lanes - 1) / lanes * lanes;
  return convolve_scratch(size) + rows * lanes + rows;
}

/// The gradient of a kernel, summed over the lanes.
/// Shapes  x[in][height][width][lane], dy[out][out height][out width][lane], weight[out][in][ky][kx]
/// Cost    as convolve; some rows of dy stay in the first-level cache while all taps pass over them
template <class Scalar>
void correlate(const ConvSize& size, const Scalar* x, const Scalar* dy, Scalar* weight,
               Scalar* scratch) {
  const detail::PaddedRows<Scalar> rows = detail::padded_rows(size, x, scratch);
  const Index height = size.out_height(), width = size.out_width();
  const Index kernel_height = size.kernel_height, kernel_width = size.kernel_width;
  const Index row_weights = size.in * size.taps(), stride = size.stride;
  constexpr Index positions = 32;  // of eight channels: 16 KiB in float
  const Index band = std::max<Index>(1, positions / width);
  Scalar* const sums = scratch + convolve_scratch(size);  // [in][tap][channel][lane]
  detail::for_each_part<detail::widest_block>(size.out, [&](Index o, auto block) {
    constexpr int O = decltype(block)::value;
    const Index sum_blocks = (row_weights * O + lanes - 1) / lanes;
    std::fill_n(sums, sum_blocks * lanes * lanes, Scalar(0));
    const Scalar* gradients = dy + o * height * width * lanes;
    for (Index top = 0; top < height; top += band) {
      const Index bottom = std::min(top + band, height);
      Scalar* to = sums;
      for (Index c = 0; c < size.in; ++c) {
        for (Index ky = 0; ky < kernel_height; ++ky) {
          const Index above = size.pad_height - ky;  // rows of the input above row 0 of dy
          const Index begin = std::max(top, (std::max<Index>(above, 0) + stride - 1) / stride);
          const Index below = size.height + above;
          const Index end = below <= 0 ? 0 : std::min(bottom, (below - 1) / stride + 1);
          detail::for_each_part<detail::widest_span>(kernel_width, [&](Index kx, auto count) {
            for (int lane = 0; lane < lanes; lane += vector_lanes<Scalar>) {
              for (Index row = begin; row < end; ++row) {
                detail::correlate_block<O, decltype(count)::value>(
                    gradients + row * width * lanes + lane, height * width * lanes,
                    rows.maps + c * rows.channel_step + (row * stride - above) * rows.row_step +
                        kx * lanes + lane,
                    stride, width, to + kx * O * lanes + lane);
              }
            }
          });
          to += kernel_width * O * lanes;
        }
      }
    }
    Scalar* const reduced = sums + sum_blocks * lanes * lanes;  // whole rows, so aligned
    sum_lanes(sums, sum_blocks, reduced);
    for (Index i = 0; i < row_weights; ++i) {
      for (int c = 0; c < O; ++c) weight[(o + c) * row_weights + i] = reduced[i * O + c];
    }
  });
}

}  // namespace training
