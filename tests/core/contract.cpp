// Contractions: orders, accumulators, scalars that store, and the refusal of inexact ones.
// SPDX-License-Identifier: Apache-2.0
#include <concertina/contract.hpp>
#include <concertina/threads.hpp>

#include "support.hpp"

#include <catch2/catch.hpp>

#include <algorithm>
#include <cstdint>
#include <string>
#include <type_traits>
#include <vector>

namespace concertina::test {

TEST_CASE("every order of a chain gives the same layer, whatever the parentheses", "[contract]") {
  Rng rng(3);
  const auto a = small_integers<std::int64_t>(
      ConvShape<2>{.out = 12, .in = 3, .kernel_size = 3, .bias = true}, rng);
  const auto b = small_integers<std::int64_t>(
      ConvShape<2>{.out = 8, .in = 12, .kernel_size = 3, .bias = true}, rng);
  const auto c = small_integers<std::int64_t>(
      ConvShape<2>{.out = 5, .in = 8, .kernel_size = 2, .bias = true}, rng);
  const auto d = small_integers<std::int64_t>(
      ConvShape<2>{.out = 7, .in = 5, .kernel_size = 1, .bias = true}, rng);
  const Conv2d<std::int64_t> whole = d * c * b * a;
  CHECK(whole == contract(d * (c * (b * a))));
  CHECK(whole == contract((d * c) * (b * a)));
  CHECK(whole == contract(contract(d * c) * contract(b * a)));
  CHECK(whole == contract(contract(contract(d * c) * b) * a));
  CHECK(whole == contract(std::vector{a, b, c, d}));
  CHECK(whole == contract(std::vector<ConvView<const std::int64_t, 2>>{a, b, c, d}));
  CHECK(whole == contract(std::vector<Expr<std::int64_t, 2>>{b * a, d * c}));
  CHECK(contract(std::vector{a}) == a);
}

TEST_CASE("a layer alone is its own contraction", "[contract]") {
  Rng rng(4);
  const auto layer = small_integers<float>(
      ConvShape<2>{.out = 4, .in = 3, .kernel_size = 3, .padding = 1, .bias = true}, rng);
  const ConvView<const float, 2> view = layer;
  static_assert(std::is_same_v<decltype(contract(layer)), Conv2d<float>>);
  for (const Conv2d<float>& same :
       {contract(layer), contract(view), contract<double>(layer), contract(Expr<float, 2>(layer)),
        contract(std::vector{view}), contract(layer, exact_at(8, 8), Threads{2})}) {
    CHECK(same == layer);
    CHECK(same.shape() == layer.shape());
  }
  CHECK(static_cast<float>(contract(layer.cast<Eigen::half>()).weight()[5]) == layer.weight()[5]);
}

TEST_CASE("any caller of tasks will do, and the result is the same bit for bit", "[contract]") {
  Rng rng(5);
  const auto random = [&](const ConvShape<2>& shape) {
    Conv2d<float> layer(shape);
    initialize_uniform(layer, rng);
    return layer;
  };
  const auto inner = random({.out = 128, .in = 64, .bias = true});
  const auto outer = random({.out = 96, .in = 128, .kernel_size = 3, .bias = true});
  const Conv2d<float> expected = outer * inner;
  Index tasks = 0;
  const auto backwards = [&tasks](Index count, auto task) {
    for (Index i = count; i-- > 0;) task(i), ++tasks;
  };
  const auto check = [&](const ParallelFor& run) {
    const Conv2d<float> product = contract(outer * inner, {}, run);
    CHECK(std::ranges::equal(product.weight(), expected.weight()));
    CHECK(std::ranges::equal(product.bias(), expected.bias()));
    CHECK(contract<double>(outer * inner, {}, run) == contract<double>(outer * inner));
  };
  check(serial_for);
  check(backwards);
  check(Threads{2});
  check(Threads{3});
  check(Threads{});
  CHECK(tasks > 2);
}

TEST_CASE("the cheapest order is taken", "[contract]") {
  // Fully connected 1000 -> 10 -> 1000 -> 1: from the left 10,000 + 10,000, from the right 20
  // million.
  const auto order_of = [](const std::vector<ConvShape<0>>& layers) {
    const std::vector<detail::AnyShape> shapes(layers.begin(), layers.end());
    return detail::ChainOrder(shapes);
  };
  const std::vector<ConvShape<0>> shapes{
      {.out = 10, .in = 1000}, {.out = 1000, .in = 10}, {.out = 1, .in = 1000}};
  CHECK(order_of(shapes).split(0, 2) == 1);
  const std::vector<ConvShape<0>> mirrored{
      {.out = 1000, .in = 1}, {.out = 10, .in = 1000}, {.out = 1000, .in = 10}};
  CHECK(order_of(mirrored).split(0, 2) == 2);
}

TEST_CASE("multiply-adds are counted as they are computed", "[contract]") {
  const ConvShape<2> squeeze{.out = 64, .in = 256, .kernel_size = 1};
  const ConvShape<2> spatial{.out = 256, .in = 32, .kernel_size = 3};
  CHECK(detail::multiply_adds(squeeze, spatial) == 64 * 256 * 32 * 9);
  const ConvShape<2> depthwise{.out = 256, .in = 256, .kernel_size = 3, .groups = 256};
  CHECK(detail::multiply_adds(depthwise, depthwise) == 256 * 81);
  CHECK(Form(std::vector{spatial, squeeze}).multiply_adds() == 64 * 256 * 32 * 9);
  CHECK(Form(squeeze).multiply_adds() == 0);
  // In the order that is taken: 1000 -> 10 -> 1000 -> 1.
  const std::vector<ConvShape<0>> linear{
      {.out = 10, .in = 1000}, {.out = 1000, .in = 10}, {.out = 1, .in = 1000}};
  CHECK(Form(linear).multiply_adds() == 10 * 1000 + 10 * 1000);
}

TEST_CASE("contract<double> rounds float layers once", "[contract]") {
  // 2^24 + 1 - 2^24 is 1 only where the sum is kept in double.
  const Linear<float> ones({.out = 1, .in = 3}, {1, 1, 1});
  const Linear<float> numbers({.out = 3, .in = 1}, {0x1p24F, 1, -0x1p24F});
  CHECK(contract<double>(ones * numbers).weight()[0] == 1);
  CHECK(contract<float>(ones * numbers).weight()[0] != 1);
}

TEST_CASE("half and bfloat16 store, float computes", "[contract]") {
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

TEST_CASE("contracting inexactly is refused unless the caller opts in by name", "[contract]") {
  Rng rng(1);
  const ConvShape<2> padded{.out = 2, .in = 2, .kernel_size = 3, .padding = 1};
  ConvShape<2> strided = padded;
  strided.stride = 2;
  strided.bias = true;
  const auto f1 = small_integers<float>(padded, rng);
  const auto f2 = small_integers<float>(strided, rng);
  const std::string message = message_of<InexactError>([&] { const Conv2d<float> f = f2 * f1; });
  CHECK_THAT(message, Catch::Contains("border of 1x1 outputs at the start and 1x1 at the end") &&
                          Catch::Contains("layer 2") && Catch::Contains("interior_only"));
  CHECK(contract(f2 * f1, interior_only).shape().kernel_size == PerAxis<2>(5));
  CHECK_THROWS_AS(contract(f2 * f1, exact_at(8, 8)), InexactError);

  const auto one_sided = small_integers<float>(
      ConvShape<2>{
          .out = 2, .in = 2, .kernel_size = 3, .stride = 2, .padding = Padding<2>::sides(0, 1)},
      rng);
  CHECK_THROWS_AS(contract(one_sided * f1), InexactError);
  const Conv2d<float> even = contract(one_sided * f1, exact_at(9, 9));
  const auto x = small_integers<float>(MapShape<2>{.channels = 2, .size = 9}, rng);
  CHECK(even(x) == one_sided(f1(x)));
  CHECK_THROWS_AS(contract(one_sided * f1, exact_at(8, 8)), InexactError);
}

}  // namespace concertina::test
