// Products: shapes from the rule, weights against the definition on every path, orders,
// accumulators, refusals.
// SPDX-License-Identifier: Apache-2.0
#include <concertina/contract.hpp>

#include <concertina/detail/rounding.hpp>
#include <concertina/modular.hpp>

#include "support.hpp"

#include <catch2/catch.hpp>

#include <cstdint>
#include <limits>
#include <set>
#include <utility>
#include <vector>

namespace concertina::test {
namespace {

/// Pairs of layers as real networks have them, and one for each algorithm with tails that fill no
/// panel.
std::vector<std::pair<ConvShape<2>, ConvShape<2>>> pairs() {
  return {
      // outer, inner
      {{.out = 24, .in = 40, .kernel = 1, .bias = true},
       {.out = 40, .in = 16, .kernel = 7, .geometry = {.padding = 3}, .bias = true}},
      {{.out = 33, .in = 20, .kernel = {5, 3}, .geometry = {.stride = 2}, .bias = true},
       {.out = 20, .in = 17, .kernel = 1, .geometry = {.padding = 2}, .bias = true}},
      {{.out = 10, .in = 12, .kernel = 3}, {.out = 12, .in = 9, .kernel = 3, .bias = true}},
      {{.out = 10, .in = 12, .kernel = {2, 3}, .geometry = {.dilation = {3, 1}}, .bias = true},
       {.out = 12, .in = 9, .kernel = {3, 2}, .geometry = {.stride = {1, 3}, .dilation = {1, 2}}}},
      {{.out = 12, .in = 48, .kernel = 1, .geometry = {.groups = 12}, .bias = true},
       {.out = 48, .in = 12, .kernel = 3, .geometry = {.groups = 12}, .bias = true}},
      {{.out = 12, .in = 36, .kernel = 3, .geometry = {.groups = 3}},
       {.out = 36, .in = 20, .kernel = 3, .geometry = {.groups = 4}, .bias = true}},
      {{.out = 40, .in = 36, .kernel = 1, .geometry = {.groups = 2}},
       {.out = 36, .in = 30, .kernel = 3, .geometry = {.groups = 6}, .bias = true}},
      {{.out = 6, .in = 6, .kernel = 1, .geometry = {.stride = 2, .groups = 6}, .bias = true},
       {.out = 6, .in = 4, .kernel = {3, 1}, .geometry = {.stride = 2, .groups = 2}, .bias = true}},
      {{.out = 9, .in = 6, .kernel = {2, 3}, .geometry = {.dilation = 2, .groups = 3}},
       {.out = 6,
        .in = 6,
        .kernel = 1,
        .geometry = {.stride = 2, .padding = 1, .groups = 6},
        .bias = true}},
      {{.out = 7, .in = 5, .kernel = 1}, {.out = 5, .in = 3, .kernel = 1}},
      {{.out = 1, .in = 1, .kernel = 1}, {.out = 1, .in = 1, .kernel = 1}},
  };
}

template <class Scalar>
void check_pairs() {
  Rng rng(5);
  for (const auto& [outer_shape, inner_shape] : pairs()) {
    const auto outer = small_integers<Scalar>(outer_shape, rng);
    const auto inner = small_integers<Scalar>(inner_shape, rng);
    const Conv<Scalar, 2> product = outer * inner;
    INFO(to_string(outer_shape) << " after " << to_string(inner_shape));
    CHECK(product == detail::multiply_by_definition(outer, inner));
    const auto x = small_integers<Scalar>(
        MapShape<2>{.batch = 2, .channels = inner_shape.in, .size = {17, 16}}, rng);
    CHECK(product(x) == outer(inner(x)));
  }
}

}  // namespace

TEST_CASE("a product acts like its factors in turn", "[product]") {
  SECTION("float") { check_pairs<float>(); }
  SECTION("int64") { check_pairs<std::int64_t>(); }
  SECTION("prime field") { check_pairs<PrimeField>(); }
}

TEST_CASE("the pairs above take every path", "[product]") {
  std::set<detail::PairPath> paths;
  for (const auto& [outer, inner] : pairs()) paths.insert(detail::pair_path(outer, inner));
  CHECK(paths.size() == 6);
}

TEST_CASE("the shape of a product follows the rule", "[product]") {
  const ConvShape<2> inner{.out = 6,
                           .in = 4,
                           .kernel = {3, 1},
                           .geometry = {.stride = {2, 3},
                                        .padding = Padding<2>::sides({1, -1}, {2, 0}),
                                        .dilation = {3, 5},
                                        .groups = 2}};
  const ConvShape<2> outer{.out = 8,
                           .in = 6,
                           .kernel = {2, 4},
                           .geometry = {.stride = {3, 1},
                                        .padding = Padding<2>::sides({1, 2}, {0, 1}),
                                        .dilation = {3, 2},
                                        .groups = 2},
                           .bias = true};
  const ConvShape<2> expected{
      .out = 8,
      .in = 4,
      .kernel = {5, 4},  // taps at 0, 3, 6 plus 0, 6: spacing 3; and at 0, 6, 12, 18: spacing 6
      .geometry = {.stride = {6, 3},
                   .padding = Padding<2>::sides({1 * 2 + 1, 2 * 3 - 1}, {0 * 2 + 2, 1 * 3 + 0}),
                   .dilation = {3, 6},
                   .groups = 2},
      .bias = true};
  CHECK(product_shape(outer, inner) == expected);

  const ConvShape<1> pointwise{.out = 1, .in = 1, .geometry = {.dilation = 7}};
  CHECK(product_shape(pointwise, pointwise).geometry.dilation ==
        PerAxis<1>(1));  // the gcd of nothing
}

TEST_CASE("every order of a chain gives the same layer, whatever the parentheses", "[product]") {
  Rng rng(3);
  const auto a = small_integers<std::int64_t>(
      ConvShape<2>{.out = 12, .in = 3, .kernel = 3, .bias = true}, rng);
  const auto b = small_integers<std::int64_t>(
      ConvShape<2>{.out = 8, .in = 12, .kernel = 3, .bias = true}, rng);
  const auto c =
      small_integers<std::int64_t>(ConvShape<2>{.out = 5, .in = 8, .kernel = 2, .bias = true}, rng);
  const auto d =
      small_integers<std::int64_t>(ConvShape<2>{.out = 7, .in = 5, .kernel = 1, .bias = true}, rng);
  const Conv2d<std::int64_t> whole = d * c * b * a;
  CHECK(whole == contract(d * (c * (b * a))));
  CHECK(whole == contract((d * c) * (b * a)));
  CHECK(whole == contract(contract(d * c) * contract(b * a)));
  CHECK(whole == contract(contract(contract(d * c) * b) * a));
  CHECK(whole == contract(std::vector{a, b, c, d}));
  CHECK(whole == contract(std::vector<ConvView<std::int64_t, 2>>{a, b, c, d}));
  CHECK(contract(std::vector{a}) == a);
}

TEST_CASE("the cheapest order is taken", "[product]") {
  // Fully connected 1000 -> 10 -> 1000 -> 1: from the left 10,000 + 10,000, from the right 20
  // million.
  const std::vector<ConvShape<0>> shapes{
      {.out = 10, .in = 1000}, {.out = 1000, .in = 10}, {.out = 1, .in = 1000}};
  const detail::ChainOrder<0> order{std::span<const ConvShape<0>>(shapes)};
  CHECK(order.split(0, 2) == 1);
  const std::vector<ConvShape<0>> mirrored{
      {.out = 1000, .in = 1}, {.out = 10, .in = 1000}, {.out = 1000, .in = 10}};
  const detail::ChainOrder<0> other{std::span<const ConvShape<0>>(mirrored)};
  CHECK(other.split(0, 2) == 2);
}

TEST_CASE("multiply-adds are counted as they are computed", "[product]") {
  const ConvShape<2> squeeze{.out = 64, .in = 256, .kernel = 1};
  const ConvShape<2> spatial{.out = 256, .in = 32, .kernel = 3};
  CHECK(multiply_adds(squeeze, spatial) == 64 * 256 * 32 * 9);
  const ConvShape<2> depthwise{.out = 256, .in = 256, .kernel = 3, .geometry = {.groups = 256}};
  CHECK(multiply_adds(depthwise, depthwise) == 256 * 81);
}

TEST_CASE("contract<double> rounds float layers once", "[product]") {
  // 2^24 + 1 - 2^24 is 1 only where the sum is kept in double.
  const Linear<float> ones({.out = 1, .in = 3}, {1, 1, 1});
  const Linear<float> numbers({.out = 3, .in = 1}, {0x1p24F, 1, -0x1p24F});
  CHECK(contract<double>(ones * numbers).weight()[0] == 1);
  CHECK(contract<float>(ones * numbers).weight()[0] != 1);
}

TEST_CASE("a sum in double becomes a half or a bfloat16 by one rounding", "[product]") {
  // Just above the middle of 1 and the next half (or bfloat16); as a float it is the middle.
  const auto tap = [](double middle) {
    const Linear<double> layer({.out = 1, .in = 1}, {1 + middle + 0x1p-40});
    return layer;
  };
  CHECK(static_cast<float>(tap(0x1p-11).cast<Eigen::half>().weight()[0]) == 1 + 0x1p-10F);
  CHECK(static_cast<float>(tap(0x1p-8).cast<Eigen::bfloat16>().weight()[0]) == 1 + 0x1p-7F);
  CHECK(static_cast<float>((-tap(0x1p-11)).cast<Eigen::half>().weight()[0]) == -1 - 0x1p-10F);
}

TEST_CASE("half and bfloat16 store, float computes", "[product]") {
  // 256 + 1 is no bfloat16; accumulated in float, 256 + 1 + 1 + ... reaches 264.
  std::vector<float> column(9, 1.0F);
  column[0] = 256;
  const Linear<float> ones({.out = 1, .in = 9}, std::vector<float>(9, 1.0F));
  const Linear<float> sum({.out = 9, .in = 1}, column);
  CHECK(static_cast<float>(
            contract(ones.cast<Eigen::bfloat16>() * sum.cast<Eigen::bfloat16>()).weight()[0]) ==
        264);
  CHECK(static_cast<float>(
            contract(ones.cast<Eigen::half>() * sum.cast<Eigen::half>()).weight()[0]) == 264);
}

TEST_CASE("products that make no sense are refused with both shapes", "[product]") {
  const Conv2d<float> f({.out = 4, .in = 3, .kernel = 3}), g({.out = 2, .in = 5, .kernel = 1});
  const std::string message = message_of<ShapeError>([&] { static_cast<void>(g * f); });
  CHECK_THAT(message, Catch::Contains("conv2d 5->2 @1x1") && Catch::Contains("conv2d 3->4 @3x3") &&
                          Catch::Contains("reads 5 channels") && Catch::Contains("writes 4"));
  CHECK_THROWS_AS(contract(std::vector<Conv2d<float>>{}), ShapeError);

  constexpr Index most = std::numeric_limits<Index>::max();
  const Conv1d<float> stride({.out = 1, .in = 1, .kernel = 2, .geometry = {.stride = most / 2}});
  const Conv1d<float> wide({.out = 1, .in = 1, .kernel = 2, .geometry = {.dilation = 4}});
  CHECK_THROWS_AS(contract(wide * stride), SizeError);
  const Conv1d<float> far({.out = 1, .in = 1, .kernel = 2, .geometry = {.stride = Index{1} << 40}});
  CHECK_THROWS_AS(contract(far * far * far), SizeError);
  CHECK_THROWS_AS(contract(far * far * far * far), SizeError);
  const Conv1d<float> sparse(
      {.out = 1, .in = 1, .kernel = 2, .geometry = {.dilation = 1'000'000'007}});
  const std::string almost =
      message_of<SizeError>([&] { static_cast<void>(contract(sparse * wide)); });
  CHECK_THAT(almost, Catch::Contains("almost only zeros"));
}

}  // namespace concertina::test
