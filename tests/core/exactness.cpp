// Where contractions are exact: the known cases. Random chains are in
// property.cpp.
// SPDX-License-Identifier: Apache-2.0
#include <concertina/exactness.hpp>

#include "support.hpp"

#include <catch2/catch.hpp>

#include <vector>

namespace concertina::test {
namespace {

ConvShape<2> conv(Index kernel, Index padding, bool bias, Index stride = 1) {
  return {
      .out = 2, .in = 2, .kernel_size = kernel, .stride = stride, .padding = padding, .bias = bias};
}

Exactness<2> worst(const std::vector<ConvShape<2>>& shapes) { return exactness(shapes); }
Exactness<2> at(const std::vector<ConvShape<2>>& shapes, const PerAxis<2>& size) {
  return exactness(shapes, size);
}

}  // namespace

TEST_CASE("padding on the first layer only is exact", "[exactness]") {
  CHECK(worst({conv(3, 5, true), conv(3, 0, true), conv(1, 0, true)}));
  CHECK(worst({conv(3, 5, true, 2), conv(3, -1, true), conv(5, 0, true, 3)}));
  CHECK(worst({conv(3, 1, true)}));
}

TEST_CASE("an unbiased 1x1 may stand before a padded 3x3, a biased one may not", "[exactness]") {
  CHECK(worst({conv(1, 0, false), conv(3, 1, true)}));
  const Exactness<2> biased = worst({conv(1, 0, true), conv(3, 1, true)});
  CHECK_FALSE(biased);
  CHECK(biased.start == PerAxis<2>(1));
  CHECK(biased.end == PerAxis<2>(1));
}

TEST_CASE("padding in the middle leaves a border", "[exactness]") {
  const Exactness<2> found = worst({conv(3, 1, false), conv(3, 1, false)});
  CHECK(found.start == PerAxis<2>(1));
  CHECK(found.end == PerAxis<2>(1));
  CHECK_THAT(found.reason, Catch::StartsWith("layer 2 (conv2d 2->2 @3x3 p1x1)"));
  CHECK(worst({conv(3, 2, false), conv(3, 1, false)}));  // the first layer writes its zeros itself
}

TEST_CASE("a border may depend on the input size", "[exactness]") {
  const std::vector<ConvShape<2>> chain{conv(3, 1, false), conv(3, 1, false, 2)};
  CHECK(at(chain, {8, 9}).start == PerAxis<2>(1));
  CHECK(at(chain, {8, 9}).end == PerAxis<2>{0, 1});
  CHECK(at(chain, {1'000'008, 1'000'009}).end == PerAxis<2>{0, 1});
  CHECK(worst(chain).end == PerAxis<2>(1));
}

TEST_CASE("neighbouring pairs may be exact where the chain is not", "[exactness]") {
  const ConvShape<2> padded = conv(3, 1, false), pointwise = conv(1, 0, false);
  CHECK(worst({padded, pointwise}));
  CHECK(worst({pointwise, padded}));
  CHECK_FALSE(worst({padded, pointwise, padded}));
}

TEST_CASE("a crop after the border makes a chain exact, one before a padding does not",
          "[exactness]") {
  CHECK(worst({conv(3, 1, true), conv(3, 1, true), conv(1, -1, true)}));
  // -1 and +1 cancel in the sum of paddings, but the maps differ.
  CHECK_FALSE(worst({conv(1, 0, true), conv(1, -1, true), conv(1, 1, true)}));
}

TEST_CASE("a padding that no output reads does not matter", "[exactness]") {
  // Kernel 2, dilation 2, stride 2, padding 2 reads -2, 0, 2, ...: with stride 3 before it, -2 sees
  // no input.
  const ConvShape<1> first{.out = 1, .in = 1, .kernel_size = 3, .stride = 2};
  const ConvShape<1> skips{.out = 1,
                           .in = 1,
                           .kernel_size = 2,
                           .stride = 2,
                           .padding = Padding<1>::sides({2}, {0}),
                           .dilation = 2};
  CHECK(exactness(std::vector{first, skips}));
  // By the pairwise rule it would need padding 1 on the first layer: position -1 would see the
  // input.
  ConvShape<1> reads = skips;
  reads.dilation = 1;
  CHECK_FALSE(exactness(std::vector{first, reads}));
}

TEST_CASE("along an axis on which outputs see only padding, all is zero on either side",
          "[exactness]") {
  // On two columns the first layer reads columns -2 and -1.
  const ConvShape<2> beside{
      .out = 2, .in = 2, .kernel_size = {3, 1}, .padding = Padding<2>::sides({1, 2}, {1, -2})};
  ConvShape<2> padded = conv(3, 1, false);
  padded.kernel_size[1] = 1;
  padded.padding = Padding<2>::sides({1, 0}, {1, 0});
  CHECK(at({beside, padded}, {5, 2}));
  CHECK(at({beside, padded}, {5, 3}).start == PerAxis<2>{1, 0});  // reads column 0 too
  CHECK_FALSE(worst({beside, padded}));
  padded.bias = true;
  CHECK(at({beside, padded}, {5, 2}));
}

TEST_CASE("branches that agree at a size only are judged there", "[exactness]") {
  const Form<2> branches =
      joined<2>(Join::sum, {Form(conv(2, 0, true, 2)), Form(conv(1, 0, false, 2))});
  CHECK(exactness(branches, PerAxis<2>{6, 8}));
  CHECK_THROWS_AS(exactness(branches), ShapeError);
  CHECK_THROWS_AS(exactness(branches, PerAxis<2>{6, 7}), ShapeError);
  const Exactness<2> padded =
      exactness(joined<2>(Join::chain, {branches, Form(conv(3, 1, false))}), PerAxis<2>{6, 8});
  CHECK(padded.start == PerAxis<2>(1));
  CHECK(padded.end == PerAxis<2>(1));
  CHECK_THAT(padded.reason, Catch::StartsWith("layer 2 (conv2d 2->2 @3x3 p1x1)"));
  // On maps of a pixel after striding, and far from the start.
  CHECK(exactness(branches, PerAxis<2>{2, 1'000'000}));
}

TEST_CASE("exactness needs a chain that fits, and an input that fits it", "[exactness]") {
  CHECK_THROWS_AS(at({conv(5, 0, false), conv(5, 0, false)}, {8, 20}), ShapeError);
  ConvShape<2> other = conv(1, 0, false);
  other.in = 3;
  CHECK_THROWS_AS(worst({conv(1, 0, false), other}), ShapeError);
  CHECK_THROWS_AS(worst({}), ShapeError);
  CHECK_THROWS_AS(worst({conv(3, 1, true, 1'000'000), conv(3, 1, true, 1'000'000)}), SizeError);
  CHECK_THAT(message_of<SizeError>([] { worst({conv(3, 1, true, 1000), conv(3, 1, true, 1000)}); }),
             Catch::Contains("strides of 1000000 in all are too many input sizes"));
  CHECK_THAT(message_of<SizeError>([] {
               at({conv(20'000, 1, true), conv(20'000, 1, true)}, {1'000'000, 1'000'000});
             }),
             Catch::Contains("pad the first layer only"));
  const Index far = (Index{1} << 40) + 1;
  for (const ConvShape<2>& layer : {conv(3, far, false), conv(3, 1, false, far)})
    CHECK_THROWS_AS(worst({conv(3, 1, false), layer}), SizeError);
}

}  // namespace concertina::test
