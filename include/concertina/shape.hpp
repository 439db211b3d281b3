// The shape of a layer: channels, kernel size, stride, padding, dilation and groups, and what
// follows from them.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/detail/text.hpp>
#include <concertina/error.hpp>

#include <array>
#include <compare>
#include <concepts>
#include <cstddef>
#include <initializer_list>
#include <limits>
#include <numeric>
#include <ostream>
#include <string>

namespace concertina {

/// Channels, extents and positions; the same type as Eigen::Index.
using Index = std::ptrdiff_t;

namespace detail {

/// a * b or a + b; throws SizeError with `what` where the result does not fit an Index.
constexpr Index checked_multiply(Index a, Index b, const char* what) {
  constexpr Index most = std::numeric_limits<Index>::max(),
                  least = std::numeric_limits<Index>::min();
  const bool fits =
      a == 0 || b == 0 ||
      (a > 0 ? (b > 0 ? a <= most / b : b >= least / a)
             : (b > 0 ? a >= least / b : a != least && b != least && -a <= most / -b));
  if (!fits) {
    fail<SizeError>({what, ": ", a, " * ", b, " overflows"});
  }
  return a * b;
}

constexpr Index checked_add(Index a, Index b, const char* what) {
  constexpr Index most = std::numeric_limits<Index>::max(),
                  least = std::numeric_limits<Index>::min();
  if (b > 0 ? a > most - b : a < least - b) {
    fail<SizeError>({what, ": ", a, " + ", b, " overflows"});
  }
  return a + b;
}

/// floor(a / b) for b > 0; the built-in operator rounds towards zero.
constexpr Index floor_divide(Index a, Index b) noexcept {
  return a / b - (a % b != 0 && (a < 0) != (b < 0) ? 1 : 0);
}

}  // namespace detail

/// One value per spatial axis, outermost axis first. A single one means all axes:
/// `PerAxis<2> s = 2;` and `PerAxis<2> s = {2, 1};`.
template <int Rank>
  requires(Rank >= 0)
class PerAxis {
 public:
  constexpr PerAxis() = default;
  constexpr PerAxis(std::integral auto all) { values_.fill(static_cast<Index>(all)); }
  constexpr PerAxis(const std::array<Index, Rank>& values) : values_(values) {}

  /// Throws ShapeError unless there is one value for each axis.
  constexpr PerAxis(std::initializer_list<Index> values) {
    if (values.size() != static_cast<std::size_t>(Rank)) {
      detail::fail<ShapeError>({"PerAxis: ", values.size(), " values for ", Rank, " spatial axes"});
    }
    auto to = values_.begin();
    for (const Index value : values) *to++ = value;
  }

  constexpr Index& operator[](int axis) { return values_[static_cast<std::size_t>(axis)]; }
  constexpr Index operator[](int axis) const { return values_[static_cast<std::size_t>(axis)]; }
  constexpr auto begin() const noexcept { return values_.begin(); }
  constexpr auto end() const noexcept { return values_.end(); }

  friend constexpr bool operator==(const PerAxis&, const PerAxis&) = default;

 private:
  std::array<Index, Rank> values_{};
};

/// The product over all axes; 1 for Rank 0. Throws SizeError on overflow.
template <int Rank>
constexpr Index numel(const PerAxis<Rank>& extents) {
  Index product = 1;
  for (const Index extent : extents) {
    product = detail::checked_multiply(product, extent, "numel");
  }
  return product;
}

/// Zeros added before and after a map, per axis; a negative one crops instead.
/// One value means every side: `Padding<2> p = 1;`, one per axis both its sides: `{1, 2}`.
template <int Rank>
struct Padding {
  PerAxis<Rank> start = 0;
  PerAxis<Rank> end = 0;

  constexpr Padding() = default;
  constexpr Padding(std::integral auto all) : start(all), end(all) {}
  constexpr Padding(std::initializer_list<Index> each) : start(each), end(each) {}
  constexpr Padding(const PerAxis<Rank>& each) : start(each), end(each) {}

  /// Sides that differ, as ONNX's `pads` allows.
  static constexpr Padding sides(const PerAxis<Rank>& start, const PerAxis<Rank>& end) {
    Padding padding;
    padding.start = start;
    padding.end = end;
    return padding;
  }

  friend constexpr bool operator==(const Padding&, const Padding&) = default;
};

/// Everything about a layer but its weights, in PyTorch's words. Tap a of output j reads input
/// j * stride - padding.start + a * dilation. Algorithms are chosen and exactness is judged from
/// this alone.
template <int Rank>
struct ConvShape {
  Index out = 0;
  Index in = 0;
  PerAxis<Rank> kernel_size = 1;
  PerAxis<Rank> stride = 1;
  Padding<Rank> padding = 0;
  PerAxis<Rank> dilation = 1;
  Index groups = 1;
  bool bias = false;

  friend constexpr bool operator==(const ConvShape&, const ConvShape&) = default;
};

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

}  // namespace detail

/// Elements of weight: out * in / groups * taps.
template <int Rank>
constexpr Index weight_numel(const ConvShape<Rank>& shape) {
  return detail::checked_multiply(
      detail::checked_multiply(shape.out, shape.in / shape.groups, "weight"),
      numel(shape.kernel_size), "weight");
}

/// Extent of the kernel along an axis, with what the dilation leaves out: dilation * (kernel_size -
/// 1) + 1.
template <int Rank>
constexpr Index effective_kernel_size(const ConvShape<Rank>& shape, int axis) {
  constexpr const char* what = "effective kernel size";
  return detail::checked_add(
      detail::checked_multiply(shape.dilation[axis], shape.kernel_size[axis] - 1, what), 1, what);
}

/// "3x3", "2", or "" for Rank 0.
template <int Rank>
std::string to_string(const PerAxis<Rank>& values) {
  return detail::to_string(detail::all_axes(values, 1), Rank);
}

/// "conv2d 64->32 @3x3 s2x2 p1x1 d1x1 g4 +bias"; what is trivial is left out.
template <int Rank>
std::string to_string(const ConvShape<Rank>& shape) {
  return detail::to_string(detail::AnyShape(shape));
}

/// Writes to_string of it.
template <int Rank>
std::ostream& operator<<(std::ostream& out, const PerAxis<Rank>& values) {
  return out << to_string(values);
}
template <int Rank>
std::ostream& operator<<(std::ostream& out, const ConvShape<Rank>& shape) {
  return out << to_string(shape);
}

namespace detail {

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
  constexpr Index largest_scalar = 256;  // bytes
  static_cast<void>(checked_multiply(weight_numel(shape), largest_scalar, "weight"));
}

}  // namespace detail

/// Throws ShapeError naming the shape, or SizeError where its weight does not fit an Index, unless
/// channels, kernel size, stride, dilation and groups are positive and the groups divide the
/// channels.
template <int Rank>
constexpr void validate(const ConvShape<Rank>& shape) {
  detail::validate(detail::AnyShape(shape));
}

/// Positions of the kernel along `axis` on an input of `size`, 0 or less where the kernel does not
/// fit.
/// Source  ONNX Conv: floor((size + padding - effective kernel size) / stride) + 1
template <int Rank>
constexpr Index output_size(const ConvShape<Rank>& shape, Index size, int axis) {
  constexpr const char* what = "output size";
  Index room = detail::checked_add(size, shape.padding.start[axis], what);
  room = detail::checked_add(room, shape.padding.end[axis], what);
  room = detail::checked_add(room, -effective_kernel_size(shape, axis), what);
  return detail::floor_divide(room, shape.stride[axis]) + 1;
}

namespace detail {

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

/// The spatial size of the output. Throws ShapeError where the padded input is smaller than the
/// kernel.
template <int Rank>
constexpr PerAxis<Rank> output_size(const ConvShape<Rank>& shape, const PerAxis<Rank>& input_size) {
  return detail::first_axes<Rank>(
      detail::output_size(detail::AnyShape(shape), detail::all_axes(input_size, 1)));
}

}  // namespace concertina
