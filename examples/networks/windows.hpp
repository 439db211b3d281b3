// Windows that move over images: convolutions as matrix products, pools as loops.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "tensor.hpp"

#include <concertina/conv.hpp>

#include <Eigen/Core>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <string>

namespace tool {

using concertina::Conv, concertina::ConvShape, concertina::PerAxis;

template <class Scalar>
using Matrix = Eigen::Matrix<Scalar, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

/// What a layer of this shape writes for this input. Throws ShapeError or SizeError with the place.
template <class Scalar>
Tensor<Scalar> windowed_output(const ConvShape<2>& shape, const Tensor<Scalar>& x,
                               const std::string& where) {
  require_axes(x, 4, where);
  require_channels(x, shape.in, where);
  try {
    const PerAxis<2> size = output_size(shape, PerAxis<2>{x.shape[2], x.shape[3]});
    return zeros<Scalar>({x.shape[0], shape.out, size[0], size[1]}, where);
  } catch (const concertina::ShapeError& error) {
    refuse_shape(where, error.what());
  }
}

/// begin <= position < end
struct Range {
  Index begin, end;
};

/// The positions, of so many, at which a tap of an axis falls on an input of `size`.
inline Range positions_on_map(const ConvShape<2>& shape, int axis, Index tap, Index size,
                              Index positions) {
  using concertina::detail::floor_divide;
  const Index stride = shape.stride[axis];
  const Index offset = tap * shape.dilation[axis] - shape.padding.start[axis];
  const Index begin = std::clamp<Index>(-floor_divide(offset, stride), 0, positions);
  const Index end = floor_divide(size - 1 - offset, stride) + 1;
  return {begin, std::clamp(end, begin, positions)};
}

/// One channel's sizes, and the rows of the output that are wanted.
struct Window {
  const ConvShape<2>& shape;
  PerAxis<2> in, out;
  Range rows;
};

/// Calls each(tap, to, from, length) for every wanted row that a tap of the kernel reads: output
/// to + i reads input from + i * stride, i < length. What falls on the padding is left out.
template <class Each>
void for_each_tap(const Window& window, Each&& each) {
  const auto& [shape, in, out, rows] = window;
  const auto& stride = shape.stride;
  const auto& padding = shape.padding;
  const auto& dilation = shape.dilation;
  Index tap = 0;
  for (Index ky = 0; ky < shape.kernel_size[0]; ++ky) {
    for (Index kx = 0; kx < shape.kernel_size[1]; ++kx, ++tap) {
      const Range y = positions_on_map(shape, 0, ky, in[0], out[0]);
      const Range x = positions_on_map(shape, 1, kx, in[1], out[1]);
      if (x.begin == x.end) continue;
      const Index column = x.begin * stride[1] - padding.start[1] + kx * dilation[1];
      for (Index j = std::max(y.begin, rows.begin); j < std::min(y.end, rows.end); ++j) {
        const Index row = j * stride[0] - padding.start[0] + ky * dilation[0];
        each(tap, j * out[1] + x.begin, row * in[1] + column, x.end - x.begin);
      }
    }
  }
}

template <class Scalar>
Window whole(const ConvShape<2>& shape, const Tensor<Scalar>& x, const Tensor<Scalar>& y) {
  return {shape, {x.shape[2], x.shape[3]}, {y.shape[2], y.shape[3]}, {0, y.shape[2]}};
}

// ---- convolutions

/// One input channel a group: adds the shifted channel, tap for tap.
template <class Scalar>
void convolve_depthwise(const Conv<Scalar, 2>& layer, const Tensor<Scalar>& x, Tensor<Scalar>& y) {
  const ConvShape<2>& shape = layer.shape();
  const Window window = whole(shape, x, y);
  const Index multiplier = shape.out / shape.in, taps = numel(shape.kernel_size);
  const Index stride = shape.stride[1];
  const Scalar* image = x.values.data();
  Index output = 0;
  for_each_channel(y, [&](Index c, Row<Scalar> sums) {
    if (shape.bias) sums = layer.bias()[static_cast<std::size_t>(c)];
    const Scalar* channel = image + output++ / multiplier * numel(window.in);
    const Scalar* weight = layer.weight().data() + c * taps;
    for_each_tap(window, [&](Index tap, Index to, Index from, Index length) {
      Scalar* sum = sums.data() + to;
      const Scalar *in = channel + from, factor = weight[tap];
      if (stride == 1) {  // so that the compiler sees it
        for (Index i = 0; i < length; ++i) sum[i] += factor * in[i];
      } else {
        for (Index i = 0; i < length; ++i) sum[i] += factor * in[i * stride];
      }
    });
  });
}

/// Writes what each output position reads: a row for each channel and tap, a column for each
/// position of the wanted rows.
template <class Scalar>
void gather(const Window& window, const Scalar* channels, Matrix<Scalar>& columns) {
  const auto& [start, end] = window.shape.padding;
  const Index stride = window.shape.stride[1], taps = numel(window.shape.kernel_size);
  if (std::max({start[0], start[1], end[0], end[1]}) > 0) columns.setZero();
  const Index first = window.rows.begin * window.out[1];
  for (Index c = 0; c < columns.rows() / taps; ++c, channels += numel(window.in)) {
    for_each_tap(window, [&](Index tap, Index to, Index from, Index length) {
      Scalar* column = columns.row(c * taps + tap).data() + (to - first);
      const Scalar* in = channels + from;
      if (stride == 1) {
        std::copy_n(in, length, column);
      } else {
        for (Index i = 0; i < length; ++i) column[i] = in[i * stride];
      }
    });
  }
}

/// The product of weight and gathered columns, some rows of the output at a time.
template <class Scalar>
void convolve_dense(const Conv<Scalar, 2>& layer, const Tensor<Scalar>& x, Tensor<Scalar>& y,
                    const std::string& where) {
  const ConvShape<2>& shape = layer.shape();
  const auto& groups = shape.groups;
  Window window = whole(shape, x, y);
  const Index in = shape.in / groups, out = shape.out / groups,
              depth = in * numel(shape.kernel_size);
  const Index positions = numel(window.out);
  const bool pointwise = numel(shape.kernel_size) == 1 && shape.stride == 1 &&
                         shape.padding == concertina::Padding<2>(0);
  // Numbers at once. With 2^17 a network of 7x7 kernels takes an eighth longer, with 2^15 twice as
  // long: the product then has too few columns for its depth.
  constexpr Index gathered = Index{1} << 19;
  const Index rows = pointwise
                         ? window.out[0]
                         : std::clamp<Index>(gathered / depth / window.out[1], 1, window.out[0]);
  Matrix<Scalar> columns;
  if (!pointwise) {
    modest_count<Scalar>({depth, rows, window.out[1]}, where);
    columns.resize(depth, rows * window.out[1]);
  }
  for (Index block = 0; block < x.shape[0] * groups; ++block) {
    const Index g = block % groups;
    const Eigen::Map<const Matrix<Scalar>> weight(layer.weight().data() + g * out * depth, out,
                                                  depth);
    const Scalar* channels = x.values.data() + block * in * numel(window.in);
    Scalar* result = y.values.data() + block * out * positions;
    for (Index top = 0; top < window.out[0]; top += rows) {
      window.rows = {top, std::min(top + rows, window.out[0])};
      const Index width = (window.rows.end - top) * window.out[1];
      Eigen::Map<Matrix<Scalar>, Eigen::Unaligned, Eigen::OuterStride<>> sums(
          result + top * window.out[1], out, width, Eigen::OuterStride<>(positions));
      if (pointwise) {
        sums.noalias() = weight * Eigen::Map<const Matrix<Scalar>>(channels, depth, positions);
      } else {
        gather(window, channels, columns);
        sums.noalias() = weight * columns.leftCols(width);
      }
      if (shape.bias) {
        sums.colwise() +=
            Eigen::Map<const Eigen::VectorX<Scalar>>(layer.bias().data() + g * out, out);
      }
    }
  }
}

/// The definition's sums, of products in another order.
template <class Scalar>
Tensor<Scalar> convolve(const Conv<Scalar, 2>& layer, const Tensor<Scalar>& x,
                        const std::string& where) {
  Tensor<Scalar> y = windowed_output(layer.shape(), x, where);
  if (layer.shape().groups == layer.shape().in) {
    convolve_depthwise(layer, x, y);
  } else {
    convolve_dense(layer, x, y, where);
  }
  return y;
}

/// The adjoint of an unpadded convolution of this shape, weight [in][out][kernel] of the map x ->
/// y: input position j adds its elements times the kernel at j * stride. One product an image; each
/// of its rows is then added where its channel and tap say.
template <class Scalar>
Tensor<Scalar> convolve_transposed(const ConvShape<2>& adjoint, const std::vector<Scalar>& weight,
                                   const std::vector<Scalar>& bias, const Tensor<Scalar>& x,
                                   const std::string& where) {
  require_axes(x, 4, where);
  require_channels(x, adjoint.out, where);
  const auto& stride = adjoint.stride;
  const PerAxis<2> in = {x.shape[2], x.shape[3]};
  if (in[0] < 1 || in[1] < 1) refuse_shape(where, "a map without positions, " + to_text(x.shape));
  PerAxis<2> out;
  for (int axis = 0; axis < 2; ++axis) {
    out[axis] = concertina::detail::checked_add(
        concertina::detail::checked_multiply(in[axis] - 1, stride[axis], "conv_transpose"),
        adjoint.kernel_size[axis], "conv_transpose");
  }
  Tensor<Scalar> y = zeros<Scalar>({x.shape[0], adjoint.in, out[0], out[1]}, where);
  const Index taps = numel(adjoint.kernel_size), rows = adjoint.in * taps, positions = numel(in);
  const Eigen::Map<const Matrix<Scalar>> factors(weight.data(), adjoint.out, rows);
  for_each_channel(y, [&](Index c, Row<Scalar> row) { row = bias[static_cast<std::size_t>(c)]; });
  Matrix<Scalar> added;  // of one row of the map at a time, so that it stays small
  for (Index n = 0; n < x.shape[0]; ++n) {
    const Scalar* image = x.values.data() + n * adjoint.out * positions;
    for (Index j = 0; j < in[0]; ++j) {
      const Eigen::Map<const Matrix<Scalar>, Eigen::Unaligned, Eigen::OuterStride<>> line(
          image + j * in[1], adjoint.out, in[1], Eigen::OuterStride<>(positions));
      added.noalias() = factors.transpose() * line;
      for (Index r = 0; r < rows; ++r) {
        const Index c = r / taps, ky = r % taps / adjoint.kernel_size[1],
                    kx = r % adjoint.kernel_size[1];
        Scalar* to =
            y.values.data() + ((n * adjoint.in + c) * out[0] + j * stride[0] + ky) * out[1] + kx;
        for (Index i = 0; i < in[1]; ++i) to[i * stride[1]] += added(r, i);
      }
    }
  }
  return y;
}

// ---- pools

enum class Pooling { max, average };

/// Each window's largest element, or its mean with the padding's zeros; the channels of `shape`
/// do not count.
template <class Scalar>
Tensor<Scalar> pool(Pooling pooling, ConvShape<2> shape, const Tensor<Scalar>& x,
                    const std::string& where) {
  require_axes(x, 4, where);
  shape.in = shape.out = x.shape[1];
  Tensor<Scalar> y = windowed_output(shape, x, where);
  const Window window = whole(shape, x, y);
  const Index stride = shape.stride[1];
  const Scalar* in = x.values.data();
  for_each_channel(y, [&](Index, Row<Scalar> out) {
    if (pooling == Pooling::max) {
      out = -std::numeric_limits<Scalar>::infinity();
      for_each_tap(window, [&](Index, Index to, Index from, Index length) {
        for (Index i = 0; i < length; ++i) {
          const Scalar value = in[from + i * stride];
          if (value > out[to + i] || std::isnan(value)) out[to + i] = value;
        }
      });
    } else {
      for_each_tap(window, [&](Index, Index to, Index from, Index length) {
        for (Index i = 0; i < length; ++i) out[to + i] += in[from + i * stride];
      });
      out /= static_cast<Scalar>(numel(shape.kernel_size));
    }
    in += numel(window.in);
  });
  return y;
}

}  // namespace tool
