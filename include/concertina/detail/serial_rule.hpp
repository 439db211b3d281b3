// The serial rule: the shape of a product, decided without weights.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/detail/tree.hpp>

#include <numeric>

namespace concertina::detail {

/// The serial rule, `inner`, then `outer`: strides multiply, the outer layer's padding and taps are
/// spaced by the inner one's stride, the dilation is the greatest common divisor of the taps'
/// spacings and the groups are that of the groups.
/// Ensures   T(outer) T(inner) has this shape
/// Throws    ShapeError naming both shapes where the channels differ, SizeError where the kernel
///           overflows
inline AnyShape product_shape(const AnyShape& outer, const AnyShape& inner) {
  constexpr const char* what = "product";
  validate(inner);
  validate(outer);
  const AnyShape* const both[] = {&inner, &outer};
  require_channels(Join::chain,
                   std::array{Channels{inner.in, inner.out}, Channels{outer.in, outer.out}},
                   [&](std::size_t layer) { return to_string(*both[layer]); });
  AnyShape product = outer;
  product.in = inner.in;
  product.bias = outer.bias || inner.bias;
  product.fixed = outer.fixed && inner.fixed;
  product.groups = std::gcd(outer.groups, inner.groups);
  for (int axis = 0; axis < max_rank; ++axis) {
    const auto after = [&](Index second, Index first) {  // second * inner.stride + first
      return checked_add(checked_multiply(second, inner.stride[axis], what), first, what);
    };
    product.stride[axis] = after(outer.stride[axis], 0);
    product.padding.start[axis] = after(outer.padding.start[axis], inner.padding.start[axis]);
    product.padding.end[axis] = after(outer.padding.end[axis], inner.padding.end[axis]);
    const Index last_tap =
        after(effective_kernel_size(outer, axis) - 1, effective_kernel_size(inner, axis) - 1);
    const Index spacing = std::gcd(outer.kernel_size[axis] > 1 ? after(outer.dilation[axis], 0) : 0,
                                   inner.kernel_size[axis] > 1 ? inner.dilation[axis] : 0);
    product.dilation[axis] = std::max<Index>(spacing, 1);
    product.kernel_size[axis] = checked_add(last_tap / product.dilation[axis], 1, what);
  }
  validate(product);
  return product;
}

}  // namespace concertina::detail
