// Sums and concatenations: shapes from the rule, maps against the branches' own, refusals.
// SPDX-License-Identifier: Apache-2.0
#include <concertina/sum.hpp>

#include <concertina/contract.hpp>

#include "support.hpp"

#include <catch2/catch.hpp>

#include <cstdint>
#include <type_traits>
#include <utility>
#include <vector>

namespace concertina::test {
namespace {

using Catch::Contains;
using Layer2 = Conv2d<std::int64_t>;

Layer2 layer(const ConvShape<2>& shape, std::uint64_t seed) {
  Rng rng(seed);
  return small_integers<std::int64_t, 2>(shape, rng);
}

FeatureMap<std::int64_t, 2> input(Index channels, PerAxis<2> size) {
  Rng rng(99);
  return small_integers<std::int64_t, 2>({.batch = 2, .channels = channels, .size = size}, rng);
}

/// f(x) + g(x), element by element.
FeatureMap<std::int64_t, 2> added(FeatureMap<std::int64_t, 2> y,
                                  const FeatureMap<std::int64_t, 2>& z) {
  REQUIRE(y.shape() == z.shape());
  for (std::size_t i = 0; i < y.values().size(); ++i) y.values()[i] += z.values()[i];
  return y;
}

/// Channels first .. first + count of a batch.
FeatureMap<std::int64_t, 2> channels_of(const FeatureMap<std::int64_t, 2>& x, Index first,
                                        Index count) {
  MapShape<2> shape = x.shape();
  shape.channels = count;
  std::vector<std::int64_t> values;
  const Index size = numel(shape.size);
  for (Index n = 0; n < shape.batch; ++n) {
    const auto from = x.values().begin() + (n * x.shape().channels + first) * size;
    values.insert(values.end(), from, from + count * size);
  }
  return {shape, std::move(values)};
}

}  // namespace

TEST_CASE("kernels of different extents are aligned by their paddings and united", "[sum]") {
  const Layer2 square = layer({.out = 2, .in = 3, .kernel_size = 3, .padding = 1}, 1);
  const Layer2 pointwise = layer({.out = 2, .in = 3, .bias = true}, 2);
  const Layer2 row = layer({.out = 2, .in = 3, .kernel_size = {1, 3}, .padding = {0, 1}}, 3);
  const Layer2 united = square + pointwise + row;
  CHECK(united.shape() ==
        ConvShape<2>{.out = 2, .in = 3, .kernel_size = 3, .padding = 1, .bias = true});
  for (std::size_t pair = 0; pair < 6; ++pair) {  // the middle row, and the middle
    const auto number = [&](std::size_t tap) { return united.weight()[9 * pair + tap]; };
    const auto own = [&](std::size_t tap) { return square.weight()[9 * pair + tap]; };
    CHECK(number(0) == own(0));
    CHECK(number(3) == own(3) + row.weight()[3 * pair]);
    CHECK(number(4) == own(4) + row.weight()[3 * pair + 1] + pointwise.weight()[pair]);
    CHECK(number(7) == own(7));
  }
  const auto x = input(3, {5, 6});
  CHECK(united(x) == added(added(square(x), pointwise(x)), row(x)));
  CHECK((square + pointwise + row)(x) == united(x));
}

TEST_CASE("groups become their greatest common divisor", "[sum]") {
  const Layer2 four = layer({.out = 12, .in = 24, .kernel_size = 3, .padding = 1, .groups = 4}, 4);
  const Layer2 six = layer({.out = 12, .in = 24, .groups = 6, .bias = true}, 5);
  const Layer2 united = six + four;
  CHECK(united.shape().groups == 2);
  const auto x = input(24, {4, 3});
  CHECK(united(x) == added(six(x), four(x)));
}

TEST_CASE("a negative padding is a crop, and sums like any other", "[sum]") {
  // ACNet with padding 1 around a 5x5: its column crops the columns that it does not read.
  const Layer2 square = layer({.out = 2, .in = 2, .kernel_size = 5, .padding = 1}, 6);
  const Layer2 column = layer({.out = 2, .in = 2, .kernel_size = {5, 1}, .padding = {1, -1}}, 7);
  const Layer2 row = layer({.out = 2, .in = 2, .kernel_size = {1, 5}, .padding = {-1, 1}}, 8);
  const Layer2 united = square + column + row;
  CHECK(united.shape() == square.shape());
  const auto x = input(2, {6, 7});
  CHECK(united(x) == added(added(square(x), column(x)), row(x)));
}

TEST_CASE("differences, factors and equality of expressions", "[sum]") {
  const Layer2 f = layer({.out = 3, .in = 3, .kernel_size = 3, .padding = 1, .bias = true}, 9);
  const Layer2 g = layer({.out = 3, .in = 3}, 10);
  const ConvView<std::int64_t, 2> view = g;
  CHECK(Layer2(f - f) == 0 * f);
  CHECK(f - g == f + (-1) * g);
  CHECK(f - view == f + (-view));
  CHECK(2 * (f + g) == f + f + 2 * g);
  CHECK(-(g * f) == (-g) * f);
  CHECK(3 * (g * f) == g * (3 * f));
  CHECK(g * (f + g) == g * f + g * g);  // the distributive laws
  CHECK((f + g) * g == f * g + g * g);
  CHECK_FALSE(f + g == f);
  CHECK(view * f == g * f);
  static_assert(std::is_same_v<decltype(f - g), Expr<std::int64_t, 2>>);
}

TEST_CASE("products of sums are exact where every path is", "[sum]") {
  const Layer2 padded = layer({.out = 2, .in = 2, .kernel_size = 3, .padding = 1}, 11);
  const Layer2 unbiased = layer({.out = 2, .in = 2}, 12),
               biased = layer({.out = 2, .in = 2, .bias = true}, 13);
  CHECK(exactness(padded * (unbiased + unbiased)).exact());
  CHECK_FALSE(exactness(padded * (unbiased + biased)).exact());
  CHECK_FALSE(exactness(padded * (unbiased + padded)).exact());
  CHECK(exactness((padded + unbiased) * unbiased).exact());
  CHECK(exactness(biased * (padded + padded) + biased).exact());
  const auto message = message_of<InexactError>([&] { contract(unbiased + padded * biased); });
  CHECK_THAT(message,
             Contains("layer 2 (conv2d 2->2 @3x3 p1x1) pads") && Contains("border of 1x1"));
}

TEST_CASE("outputs side by side", "[sum]") {
  const Layer2 f = layer({.out = 2, .in = 4, .kernel_size = 3, .padding = 1}, 14);
  const Layer2 g = layer({.out = 4, .in = 4, .groups = 2, .bias = true}, 15);
  const std::vector<Expr<std::int64_t, 2>> parts{f, g};
  const auto both = concat_outputs(parts);
  const Layer2 joined = both;
  CHECK(joined.shape() ==
        ConvShape<2>{.out = 6, .in = 4, .kernel_size = 3, .padding = 1, .bias = true});
  const auto x = input(4, {4, 5});
  const auto y = joined(x);
  CHECK(y == both(x));
  CHECK(channels_of(y, 0, 2) == f(x));
  CHECK(channels_of(y, 2, 4) == g(x));
}

TEST_CASE("inputs side by side", "[sum]") {
  const Layer2 f = layer({.out = 2, .in = 3, .kernel_size = 3, .stride = 2, .padding = 1}, 16);
  const Layer2 g = layer({.out = 2, .in = 4, .stride = 2, .groups = 2, .bias = true}, 17);
  const std::vector<Layer2> parts{f, g};
  const auto both = concat_inputs(parts);
  const Layer2 joined = both;
  CHECK(joined.shape() ==
        ConvShape<2>{.out = 2, .in = 7, .kernel_size = 3, .stride = 2, .padding = 1, .bias = true});
  const auto x = input(7, {5, 6});
  CHECK(joined(x) == both(x));
  CHECK(joined(x) == added(f(channels_of(x, 0, 3)), g(channels_of(x, 3, 4))));
  // Cutting a layer along its channels and joining the halves gives the layer.
  const Layer2 whole = layer({.out = 6, .in = 4, .bias = true}, 18);
  CHECK_THROWS_AS(both(input(6, {5, 6})), ShapeError);
  CHECK_THROWS_AS(joined * whole, ShapeError);
}

TEST_CASE("run-time lists sum as operators do", "[sum]") {
  const std::vector<Layer2> layers{layer({.out = 2, .in = 2}, 19),
                                   layer({.out = 2, .in = 2, .kernel_size = 3, .padding = 1}, 20),
                                   layer({.out = 2, .in = 2, .bias = true}, 21)};
  CHECK(sum(layers) == layers[0] + layers[1] + layers[2]);
  CHECK(chain(std::span(layers)) == layers[2] * layers[1] * layers[0]);
  const std::vector<Expr<std::int64_t, 2>> nested{chain(std::span(layers).first(2)), layers[1]};
  CHECK(sum(nested) == layers[1] * layers[0] + layers[1]);
  CHECK_THAT(message_of<ShapeError>([] { sum(std::vector<Expr<int, 2>>{}); }),
             Contains("no layers"));
}

TEST_CASE("branches that do not fit are refused, naming both", "[sum]") {
  const Layer2 f = layer({.out = 2, .in = 3, .kernel_size = 3, .padding = 1}, 22);
  const auto refused = [&](const ConvShape<2>& shape) {
    const Layer2 g = layer(shape, 23);
    return message_of<ShapeError>([&] { contract(f + g); });
  };
  CHECK_THAT(refused({.out = 2, .in = 4}), Contains("read 3 and 4 channels") &&
                                               Contains("conv2d 3->2 @3x3 p1x1") &&
                                               Contains("conv2d 4->2 @1x1"));
  CHECK_THAT(refused({.out = 1, .in = 3}),
             Contains("write 2 and 1 channels") && Contains("conv2d 3->1 @1x1"));
  CHECK_THAT(refused({.out = 2, .in = 3, .stride = 2}),
             Contains("branch 1 (conv2d 3->2 @3x3 p1x1) and branch 2 (conv2d 3->2 @1x1 s2x2)") &&
                 Contains("strides differ, 1x1 and 2x2"));
  CHECK_THAT(
      refused({.out = 2, .in = 3, .kernel_size = 3}),
      Contains("output sizes differ along axis 0, by 0 and -2") && Contains("conv2d 3->2 @3x3)"));
  const Layer2 g = layer({.out = 2, .in = 3, .kernel_size = 3}, 24);
  CHECK_THROWS_AS((f + g)(input(3, {5, 5})), ShapeError);
}

TEST_CASE("sizes that agree only for some inputs need the input size named", "[sum]") {
  // With stride 2 a 2x2 kernel and a 1x1 kernel have as many positions on even maps, not on odd
  // ones.
  const Layer2 f = layer({.out = 2, .in = 2, .kernel_size = 2, .stride = 2}, 25);
  const Layer2 g = layer({.out = 2, .in = 2, .stride = 2, .bias = true}, 26);
  CHECK_THROWS_AS(contract(f + g), ShapeError);
  CHECK_THROWS_AS(contract(f + g, interior_only), ShapeError);
  const Layer2 united = contract(f + g, exact_at(6, 8));
  const auto x = input(2, {6, 8});
  CHECK(united(x) == added(f(x), g(x)));
  CHECK_THAT(message_of<ShapeError>([&] { contract(f + g, exact_at(6, 7)); }),
             Contains("their outputs have 3 and 4 positions for an input of size 6x7"));
  // Behind a layer that changes the size, it is the size there that counts.
  const Layer2 first = layer({.out = 2, .in = 2, .kernel_size = 2}, 27);
  CHECK(contract((f + g) * first, exact_at(7, 9))(input(2, {7, 9})) ==
        ((f + g) * first)(input(2, {7, 9})));
}

TEST_CASE("a sum that would be almost only zeros is refused before it is made", "[sum]") {
  const ConvShape<1> near{.out = 64, .in = 64, .kernel_size = 2};
  ConvShape<1> far = near;
  far.padding = Padding<1>::sides(Index{1} << 30, -(Index{1} << 30));
  CHECK(sum_shape<1>(std::vector{near, far}).kernel_size == PerAxis<1>((Index{1} << 30) + 2));
  const Conv1d<int> f(near), g(far);
  CHECK_THAT(message_of<SizeError>([&] { contract(f + g); }), Contains("almost only zeros"));
}

TEST_CASE("half layers add in float", "[sum]") {
  using Half = Conv<Eigen::half, 0>;
  const Half one({.out = 1, .in = 1}, {Eigen::half(2048)}),
      small({.out = 1, .in = 1}, {Eigen::half(1)});
  // 2048 + 1 is a tie in half precision; in float 2048 + 1 + 1 is 2050, which half holds.
  const Half total = one + small + small;
  CHECK(static_cast<float>(total.weight()[0]) == 2050);
}

}  // namespace concertina::test
