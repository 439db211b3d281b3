// Shapes of which the rank is known at run time, so that rules and plans are compiled once; and
// what follows from a shape.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/shape.hpp>

namespace concertina {

template <int Rank>
constexpr Index weight_numel(const ConvShape<Rank>& shape) {
  return detail::checked_multiply(
      detail::checked_multiply(shape.out, shape.in / shape.groups, "weight"),
      numel(shape.kernel_size), "weight");
}

template <int Rank>
constexpr Index effective_kernel_size(const ConvShape<Rank>& shape, int axis) {
  constexpr const char* what = "effective kernel size";
  return detail::checked_add(
      detail::checked_multiply(shape.dilation[axis], shape.kernel_size[axis] - 1, what), 1, what);
}

namespace detail {

/// Spatial axes that a layer may have. Layers of lower rank are planned as layers of this one,
/// whose further axes have a single position.
inline constexpr int max_rank = 3;
using Axes = PerAxis<max_rank>;

template <int Rank>
constexpr Axes all_axes(const PerAxis<Rank>& values, Index otherwise) {
  static_assert(Rank <= max_rank);
  Axes result = otherwise;
  for (int axis = 0; axis < Rank; ++axis) result[axis] = values[axis];
  return result;
}
template <int Rank>
constexpr PerAxis<Rank> first_axes(const Axes& values) {
  PerAxis<Rank> result;
  for (int axis = 0; axis < Rank; ++axis) result[axis] = values[axis];
  return result;
}

/// A shape of which the rank is known at run time, so that rules and plans are compiled once.
struct AnyShape : ConvShape<max_rank> {
  int rank = 0;
  bool fixed = false;  ///< has no gradient: of a form's leaf, and of what only such make

  constexpr AnyShape() = default;
  template <int Rank>
  constexpr AnyShape(const ConvShape<Rank>& shape)
      : ConvShape<max_rank>{.out = shape.out,
                            .in = shape.in,
                            .kernel_size = all_axes(shape.kernel_size, 1),
                            .stride = all_axes(shape.stride, 1),
                            .padding = Padding<max_rank>::sides(all_axes(shape.padding.start, 0),
                                                                all_axes(shape.padding.end, 0)),
                            .dilation = all_axes(shape.dilation, 1),
                            .groups = shape.groups,
                            .bias = shape.bias},
        rank(Rank) {}

  /// Requires Rank to be its rank.
  template <int Rank>
  constexpr ConvShape<Rank> as() const {
    return {.out = out,
            .in = in,
            .kernel_size = first_axes<Rank>(kernel_size),
            .stride = first_axes<Rank>(stride),
            .padding = Padding<Rank>::sides(first_axes<Rank>(padding.start),
                                            first_axes<Rank>(padding.end)),
            .dilation = first_axes<Rank>(dilation),
            .groups = groups,
            .bias = bias};
  }

  friend constexpr bool operator==(const AnyShape&, const AnyShape&) = default;
};

inline std::string to_string(const Axes& values, int rank) {
  std::string result;
  for (int axis = 0; axis < rank; ++axis) result += text({axis == 0 ? "" : "x", values[axis]});
  return result;
}

/// The first `rank` of some axes, in a message.
struct Extents {
  const Axes& values;
  int rank;
};
inline std::string to_string(const Extents& extents) {
  return to_string(extents.values, extents.rank);
}

inline std::string to_string(const AnyShape& shape) {
  const int rank = shape.rank;
  std::string result = rank == 0 ? "linear" : text({"conv", rank, "d"});
  result += text({" ", shape.in, "->", shape.out});
  const auto add = [&](const char* mark, const Axes& values) {
    result += text({mark, Extents{values, rank}});
  };
  if (rank > 0) add(" @", shape.kernel_size);
  if (shape.stride != 1) add(" s", shape.stride);
  const auto& [start, end] = shape.padding;
  if (start != 0 || end != 0) add(" p", start);
  if (start != end) add(":", end);
  if (shape.dilation != 1) add(" d", shape.dilation);
  if (shape.groups != 1) result += text({" g", shape.groups});
  return shape.bias ? result + " +bias" : result;
}

constexpr void validate(const AnyShape& shape) {
  const auto refuse = [&](const char* why) { fail<ShapeError>({why, " (", shape, ")"}); };
  if (shape.out < 1 || shape.in < 1) refuse("a layer needs at least one channel on each side");
  if (shape.groups < 1 || shape.in % shape.groups != 0 || shape.out % shape.groups != 0) {
    refuse("groups must divide the channels on both sides");
  }
  for (int axis = 0; axis < max_rank; ++axis) {
    if (shape.kernel_size[axis] < 1) refuse("an empty kernel");
    if (shape.stride[axis] < 1) refuse("strides start at 1");
    if (shape.dilation[axis] < 1) refuse("dilations start at 1");
    static_cast<void>(effective_kernel_size(shape, axis));
    constexpr Index farthest = Index{1} << 48;  // so that sums of paddings and positions fit
    for (const Index padding : {shape.padding.start[axis], shape.padding.end[axis]}) {
      if (padding > farthest || padding < -farthest) {
        fail<SizeError>({"a padding beyond any map (", shape, ")"});
      }
    }
  }
  require_addressable(weight_numel(shape), "weight");
}

constexpr Axes output_size(const AnyShape& shape, const Axes& input_size) {
  Axes result;
  for (int axis = 0; axis < max_rank; ++axis) {
    result[axis] =
        input_size[axis] < 1 ? 0 : concertina::output_size(shape, input_size[axis], axis);
    if (result[axis] < 1) {
      fail<ShapeError>({"an input of size ", Extents{input_size, shape.rank},
                        " is smaller than the kernel (", shape, ")"});
    }
  }
  return result;
}

}  // namespace detail

template <int Rank>
std::string to_string(const PerAxis<Rank>& values) {
  return detail::to_string(detail::all_axes(values, 1), Rank);
}

template <int Rank>
std::string to_string(const ConvShape<Rank>& shape) {
  return detail::to_string(detail::AnyShape(shape));
}

template <int Rank>
constexpr void validate(const ConvShape<Rank>& shape) {
  detail::validate(detail::AnyShape(shape));
}

template <int Rank>
constexpr Index output_size(const ConvShape<Rank>& shape, Index size, int axis) {
  constexpr const char* what = "output size";
  if (shape.stride[axis] < 1) {
    detail::fail<ShapeError>({"strides start at 1 (", detail::AnyShape(shape), ")"});
  }
  Index room = detail::checked_add(size, shape.padding.start[axis], what);
  room = detail::checked_add(room, shape.padding.end[axis], what);
  room = detail::checked_add(room, -effective_kernel_size(shape, axis), what);
  return detail::floor_divide(room, shape.stride[axis]) + 1;
}

template <int Rank>
constexpr PerAxis<Rank> output_size(const ConvShape<Rank>& shape, const PerAxis<Rank>& input_size) {
  return detail::first_axes<Rank>(
      detail::output_size(detail::AnyShape(shape), detail::all_axes(input_size, 1)));
}

}  // namespace concertina
