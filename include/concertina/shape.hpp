// The shape of a layer: channels, kernel size, stride, padding, dilation and groups, and what
// follows from them.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/detail/checked.hpp>
#include <concertina/error.hpp>

#include <array>
#include <concepts>
#include <cstddef>
#include <initializer_list>
#include <ostream>
#include <string>

namespace concertina {

/// Channels, extents and positions; the same type as Eigen::Index.
using Index = detail::Index;

/// The rank of what takes its neighbour's: batch norms, scales, identities, permutations.
inline constexpr int any_rank = -1;

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

/// Elements of weight: out * in / groups * taps.
template <int Rank>
constexpr Index weight_numel(const ConvShape<Rank>& shape);

/// Extent of the kernel along an axis, with what the dilation leaves out: dilation * (kernel_size -
/// 1) + 1.
template <int Rank>
constexpr Index effective_kernel_size(const ConvShape<Rank>& shape, int axis);

/// "3x3", "2", or "" for Rank 0.
template <int Rank>
std::string to_string(const PerAxis<Rank>& values);

/// "conv2d 64->32 @3x3 s2x2 p1x1 d1x1 g4 +bias"; what is trivial is left out.
template <int Rank>
std::string to_string(const ConvShape<Rank>& shape);

/// Writes to_string of it.
template <int Rank>
std::ostream& operator<<(std::ostream& out, const PerAxis<Rank>& values) {
  return out << to_string(values);
}
template <int Rank>
std::ostream& operator<<(std::ostream& out, const ConvShape<Rank>& shape) {
  return out << to_string(shape);
}

/// Throws ShapeError naming the shape, or SizeError where its weight does not fit an Index, unless
/// channels, kernel size, stride, dilation and groups are positive and the groups divide the
/// channels.
template <int Rank>
constexpr void validate(const ConvShape<Rank>& shape);

/// Positions of the kernel along `axis` on an input of `size`, 0 or less where the kernel does not
/// fit.
/// Throws  ShapeError for a stride below 1, SizeError where a sum of sizes does not fit an Index
/// Source  ONNX Conv: floor((size + padding - effective kernel size) / stride) + 1
template <int Rank>
constexpr Index output_size(const ConvShape<Rank>& shape, Index size, int axis);

/// The spatial size of the output. Throws ShapeError where the padded input is smaller than the
/// kernel.
template <int Rank>
constexpr PerAxis<Rank> output_size(const ConvShape<Rank>& shape, const PerAxis<Rank>& input_size);

}  // namespace concertina

#include <concertina/detail/shape.ipp>
