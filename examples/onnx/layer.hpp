// One contracted layer, of any rank: what a region becomes.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "onnx/linear.hpp"

#include <concertina/shape.hpp>
#include <concertina/transposed.hpp>

#include <algorithm>
#include <string>
#include <type_traits>
#include <vector>

namespace tool {

/// Calls f with the rank as a constant.
template <class F>
auto with_rank(int rank, const F& f) {
  switch (rank) {
    case 0: return f(std::integral_constant<int, 0>());
    case 1: return f(std::integral_constant<int, 1>());
    case 2: return f(std::integral_constant<int, 2>());
    default: return f(std::integral_constant<int, 3>());
  }
}

/// Further axes get `otherwise`.
template <int Rank>
concertina::PerAxis<Rank> per_axis(const Dims& dims, Index otherwise) {
  concertina::PerAxis<Rank> result = otherwise;
  for (std::size_t axis = 0; axis < std::min<std::size_t>(dims.size(), Rank); ++axis) {
    result[static_cast<int>(axis)] = dims[axis];
  }
  return result;
}

/// A contracted layer, of any rank, without its elements.
struct NewLayer {
  int rank = 0;
  Index out = 0, in = 0, groups = 1;
  Dims kernel = {}, strides = {}, dilations = {}, pads_begin = {}, pads_end = {};
  bool has_bias = false;
  Layout in_layout = Layout::channels_first, out_layout = Layout::channels_first;
  bool flat = false;        // the result has no spatial axes, the source has
  bool transposed = false;  // a ConvTranspose; pads_end may be negative, an output padding
};

/// The layer of which the shape has further axes, of one position.
template <int Rank>
NewLayer layer_of_shape(const concertina::ConvShape<Rank>& shape, int rank) {
  const auto list = [&](const concertina::PerAxis<Rank>& axes) {
    return Dims(axes.begin(), axes.begin() + rank);
  };
  return {.rank = rank,
          .out = shape.out,
          .in = shape.in,
          .groups = shape.groups,
          .kernel = list(shape.kernel_size),
          .strides = list(shape.stride),
          .dilations = list(shape.dilation),
          .pads_begin = list(shape.padding.start),
          .pads_end = list(shape.padding.end),
          .has_bias = shape.bias};
}

inline bool is_pointwise(const NewLayer& layer) {
  const auto all = [](const Dims& dims, Index value) {
    return std::ranges::all_of(dims, [&](Index d) { return d == value; });
  };
  return !layer.transposed && layer.groups == 1 && all(layer.kernel, 1) && all(layer.strides, 1) &&
         all(layer.pads_begin, 0) && all(layer.pads_end, 0);
}

/// The same of the layer whose adjoint has this dense form, after zeros between the input's
/// positions.
template <int Rank>
NewLayer layer_of_dense_shape(const concertina::ConvShape<Rank>& dense,
                              const concertina::PerAxis<Rank>& stride, int rank) {
  NewLayer layer = layer_of_shape(dense, rank);
  layer.transposed = true;
  layer.strides.assign(stride.begin(), stride.begin() + rank);
  for (std::size_t axis = 0; axis < layer.kernel.size(); ++axis) {
    const Index reach = layer.dilations[axis] * (layer.kernel[axis] - 1);
    layer.pads_begin[axis] = reach - layer.pads_begin[axis];
    layer.pads_end[axis] = reach - layer.pads_end[axis];
  }
  return layer;
}

/// "conv2d 3->8 @3x3 p1x1 +bias".
std::string describe(const NewLayer& layer);

}  // namespace tool
