// The shapes of products and of sums, by the serial and the sum rule.
// SPDX-License-Identifier: Apache-2.0
#include <concertina/detail/form.hpp>

#include "support.hpp"

#include <catch2/catch.hpp>

#include <array>
#include <vector>

namespace concertina::test {

TEST_CASE("the shape of a product follows the rule", "[form]") {
  const ConvShape<2> inner{.out = 6,
                           .in = 4,
                           .kernel_size = {3, 1},
                           .stride = {2, 3},
                           .padding = Padding<2>::sides({1, -1}, {2, 0}),
                           .dilation = {3, 5},
                           .groups = 2};
  const ConvShape<2> outer{.out = 8,
                           .in = 6,
                           .kernel_size = {2, 4},
                           .stride = {3, 1},
                           .padding = Padding<2>::sides({1, 2}, {0, 1}),
                           .dilation = {3, 2},
                           .groups = 2,
                           .bias = true};
  const ConvShape<2> expected{
      .out = 8,
      .in = 4,
      .kernel_size = {5,
                      4},  // taps at 0, 3, 6 plus 0, 6: spacing 3; and at 0, 6, 12, 18: spacing 6
      .stride = {6, 3},
      .padding = Padding<2>::sides({1 * 2 + 1, 2 * 3 - 1}, {0 * 2 + 2, 1 * 3 + 0}),
      .dilation = {3, 6},
      .groups = 2,
      .bias = true};
  CHECK(detail::product_shape(outer, inner).as<2>() == expected);

  const ConvShape<1> pointwise{.out = 1, .in = 1, .dilation = 7};
  CHECK(detail::product_shape(pointwise, pointwise).as<1>().dilation ==
        PerAxis<1>(1));  // the gcd
                         // of nothing
}

TEST_CASE("the sum's dilation divides every difference of tap offsets, the alignment included",
          "[form]") {
  const auto dilated = [](Index kernel, Index dilation, Index padding) {
    return ConvShape<1>{
        .out = 1, .in = 1, .kernel_size = kernel, .padding = padding, .dilation = dilation};
  };
  const auto of = [](const ConvShape<1>& f, const ConvShape<1>& g) {
    return detail::sum_shape(Join::sum, std::array<detail::AnyShape, 2>{f, g}).as<1>();
  };
  CHECK(of(dilated(3, 2, 2), dilated(5, 2, 4)) == dilated(5, 2, 4));
  CHECK(of(dilated(3, 2, 2), dilated(3, 4, 4)) == dilated(5, 2, 4));
  CHECK(of(dilated(3, 4, 4), dilated(1, 7, 0)) == dilated(3, 4, 4));  // one tap has no dilation
  CHECK(of(dilated(3, 6, 6), dilated(3, 4, 4)) == dilated(7, 2, 6));
  CHECK(of(dilated(1, 5, 0), dilated(1, 9, 0)) == dilated(1, 1, 0));  // the gcd of nothing
  // Equal kernels, one shifted by one: the alignment alone makes the dilation 1.
  ConvShape<1> shifted = dilated(3, 2, 0);
  shifted.padding = Padding<1>::sides(1, 3);
  CHECK(
      of(dilated(3, 2, 2), shifted) ==
      ConvShape<1>{
          .out = 1, .in = 1, .kernel_size = 6, .padding = Padding<1>::sides(2, 3), .dilation = 1});
}

TEST_CASE("a form is contracted to the shape that its parts make", "[form]") {
  const ConvShape<2> first{.out = 6, .in = 3, .kernel_size = 1, .padding = 1};
  const ConvShape<2> second{.out = 4, .in = 6, .kernel_size = 3, .bias = true};
  const std::vector<ConvShape<2>> layers = {first, second};
  const ConvShape<2> whole = detail::product_shape(second, first).as<2>();
  CHECK(Form(layers).shape() == whole);
  CHECK(detail::contracted_shape(Form(layers).tree()).as<2>() == whole);
  CHECK(whole == ConvShape<2>{.out = 4, .in = 3, .kernel_size = 3, .padding = 1, .bias = true});
}

}  // namespace concertina::test
