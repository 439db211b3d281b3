// A layer's Toeplitz matrix applied without being written out.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/detail/taps.hpp>

#include <span>

namespace concertina::detail {

/// y[n * y_stride] += factor * x[n * x_stride]. The contiguous case is spelt out so that it is
/// vectorised.
template <class Scalar>
void add_scaled(Index count, const Scalar factor, const Scalar* x, Index x_stride, Scalar* y,
                Index y_stride) {
  if (x_stride == 1 && y_stride == 1) {
    for (Index n = 0; n < count; ++n) y[n] = y[n] + factor * x[n];
  } else {
    for (Index n = 0; n < count; ++n) y[n * y_stride] = y[n * y_stride] + factor * x[n * x_stride];
  }
}

/// Which of a matrix and its transpose is applied.
enum class Direction { forward, adjoint };

/// to += T(layer) from, or to += T(layer)^T from; both flat, [channels][positions].
/// Cost  one multiply-add for each entry of the matrix that is not structurally zero
template <class Scalar, int Rank>
void apply_matrix(Direction direction, const ConvView<const Scalar, Rank>& layer,
                  const PerAxis<Rank>& input_size, std::span<const TapRun> runs, const Scalar* from,
                  Scalar* to) {
  const ConvShape<Rank>& shape = layer.shape();
  const Index in = shape.in / shape.groups, out = shape.out / shape.groups;
  const Index positions = numel(output_size(shape, input_size)), size = numel(input_size);
  const Index taps = numel(shape.kernel_size);
  Index last_stride = 1;
  for (const Index stride : shape.stride) last_stride = stride;
  const Scalar* weight = layer.weight().data();
  for (Index o = 0; o < shape.out; ++o) {
    for (Index c = o / out * in; c < (o / out + 1) * in; ++c, weight += taps) {
      for (const TapRun& run : runs) {
        const Index row = o * positions + run.row, column = c * size + run.column;
        if (direction == Direction::forward) {
          add_scaled(run.count, weight[run.tap], from + column, last_stride, to + row, 1);
        } else {
          add_scaled(run.count, weight[run.tap], from + row, 1, to + column, last_stride);
        }
      }
    }
  }
}

template <class Scalar, int Rank>
Conv<Scalar, Rank> linear_part(const ConvView<const Scalar, Rank>& layer) {
  ConvShape<Rank> shape = layer.shape();
  shape.bias = false;
  return Conv<Scalar, Rank>(ConvView<const Scalar, Rank>(shape, layer.weight()));
}

}  // namespace concertina::detail
