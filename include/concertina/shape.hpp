// The shape of a layer: channels, kernel, stride, dilation, padding and groups, and what follows
// from them.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/error.hpp>

#include <array>
#include <compare>
#include <concepts>
#include <cstddef>
#include <initializer_list>
#include <limits>
#include <numeric>
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
    throw SizeError(std::string(what) + ": " + std::to_string(a) + " * " + std::to_string(b) +
                    " overflows");
  }
  return a * b;
}

constexpr Index checked_add(Index a, Index b, const char* what) {
  constexpr Index most = std::numeric_limits<Index>::max(),
                  least = std::numeric_limits<Index>::min();
  if (b > 0 ? a > most - b : a < least - b) {
    throw SizeError(std::string(what) + ": " + std::to_string(a) + " + " + std::to_string(b) +
                    " overflows");
  }
  return a + b;
}

/// floor(a / b) for b > 0; the built-in operator rounds towards zero.
constexpr Index floor_divide(Index a, Index b) noexcept {
  return a / b - (a % b != 0 && (a < 0) != (b < 0) ? 1 : 0);
}

}  // namespace detail

/// One number per spatial axis, outermost axis first. A single number means all axes:
/// `PerAxis<2> s = 2;` and `PerAxis<2> s = {2, 1};`.
template <int Rank>
  requires(Rank >= 0)
class PerAxis {
 public:
  constexpr PerAxis() = default;
  constexpr PerAxis(std::integral auto all) { values_.fill(static_cast<Index>(all)); }
  constexpr PerAxis(const std::array<Index, Rank>& values) : values_(values) {}

  /// Throws ShapeError unless there is one number for each axis.
  constexpr PerAxis(std::initializer_list<Index> values) {
    if (values.size() != static_cast<std::size_t>(Rank)) {
      throw ShapeError("PerAxis: " + std::to_string(values.size()) + " numbers for " +
                       std::to_string(Rank) + " spatial axes");
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

/// Zeros added before and after a map, per axis; a negative number crops instead.
/// One number means every side: `Padding<2> p = 1;`, one per axis both its sides: `{1, 2}`.
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

/// Numbers in weight: out * in / groups * taps.
template <int Rank>
constexpr Index weight_numel(const ConvShape<Rank>& shape) {
  return detail::checked_multiply(
      detail::checked_multiply(shape.out, shape.in / shape.groups, "weight"),
      numel(shape.kernel_size), "weight");
}

/// Distance from the first tap to the last along an axis: dilation * (kernel - 1).
template <int Rank>
constexpr Index span(const ConvShape<Rank>& shape, int axis) {
  return detail::checked_multiply(shape.dilation[axis], shape.kernel_size[axis] - 1, "span");
}

/// "3x3", "2", or "" for Rank 0.
template <int Rank>
std::string to_string(const PerAxis<Rank>& values) {
  std::string text;
  for (const Index value : values) text += (text.empty() ? "" : "x") + std::to_string(value);
  return text;
}

/// "conv2d 64->32 @3x3 s2x2 p1x1 d1x1 g4 +bias"; what is trivial is left out.
template <int Rank>
std::string to_string(const ConvShape<Rank>& shape) {
  const auto& stride = shape.stride;
  const auto& padding = shape.padding;
  const auto& dilation = shape.dilation;
  const auto& groups = shape.groups;
  std::string text = Rank == 0 ? "linear" : "conv" + std::to_string(Rank) + "d";
  text += " " + std::to_string(shape.in) + "->" + std::to_string(shape.out);
  if (Rank > 0) text += " @" + to_string(shape.kernel_size);
  if (stride != 1) text += " s" + to_string(stride);
  if (padding.start != 0 || padding.end != 0) {
    text += " p" + to_string(padding.start);
    if (padding.start != padding.end) text += ":" + to_string(padding.end);
  }
  if (dilation != 1) text += " d" + to_string(dilation);
  if (groups != 1) text += " g" + std::to_string(groups);
  return shape.bias ? text + " +bias" : text;
}

/// Throws ShapeError naming the shape, or SizeError where its weight does not fit an Index, unless
/// channels, kernel, stride, dilation and groups are positive and the groups divide the channels.
template <int Rank>
constexpr void validate(const ConvShape<Rank>& shape) {
  const auto refuse = [&](const std::string& why) {
    throw ShapeError(why + " (" + to_string(shape) + ")");
  };
  const Index groups = shape.groups;
  if (shape.out < 1 || shape.in < 1) refuse("a layer needs at least one channel on each side");
  if (groups < 1 || shape.in % groups != 0 || shape.out % groups != 0) {
    refuse("groups must divide the channels on both sides");
  }
  for (int axis = 0; axis < Rank; ++axis) {
    if (shape.kernel_size[axis] < 1) refuse("an empty kernel");
    if (shape.stride[axis] < 1) refuse("strides start at 1");
    if (shape.dilation[axis] < 1) refuse("dilations start at 1");
    static_cast<void>(span(shape, axis));
    constexpr Index farthest = Index{1}
                               << 48;  // so that sums of paddings and positions fit an Index
    const Index start = shape.padding.start[axis], end = shape.padding.end[axis];
    if (start > farthest || start < -farthest || end > farthest || end < -farthest) {
      throw SizeError("a padding beyond any map (" + to_string(shape) + ")");
    }
  }
  constexpr Index largest_scalar = 256;  // bytes
  static_cast<void>(detail::checked_multiply(weight_numel(shape), largest_scalar, "weight"));
}

/// Positions of the kernel along `axis` on an input of `size`, 0 or less where the kernel does not
/// fit.
/// Source  ONNX Conv: floor((size + padding - span - 1) / stride) + 1
template <int Rank>
constexpr Index output_size(const ConvShape<Rank>& shape, Index size, int axis) {
  const auto& padding = shape.padding;
  Index room = detail::checked_add(size, padding.start[axis], "output size");
  room = detail::checked_add(room, padding.end[axis], "output size");
  room = detail::checked_add(room, -span(shape, axis) - 1, "output size");
  return detail::floor_divide(room, shape.stride[axis]) + 1;
}

/// The spatial size of the output. Throws ShapeError where the padded input is smaller than the
/// kernel.
template <int Rank>
constexpr PerAxis<Rank> output_size(const ConvShape<Rank>& shape, const PerAxis<Rank>& input_size) {
  PerAxis<Rank> result;
  for (int axis = 0; axis < Rank; ++axis) {
    result[axis] = input_size[axis] < 1 ? 0 : output_size(shape, input_size[axis], axis);
    if (result[axis] < 1) {
      throw ShapeError("an input of size " + to_string(input_size) +
                       " is smaller than the kernel (" + to_string(shape) + ")");
    }
  }
  return result;
}

}  // namespace concertina
