// Products of two layers: every algorithm against the definition, panels, refusals.
// SPDX-License-Identifier: Apache-2.0
#include <concertina/contract.hpp>
#include <concertina/detail/product/product.hpp>
#include <concertina/detail/verify/rounding.hpp>
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
      {{.out = 24, .in = 40, .kernel_size = 1, .bias = true},
       {.out = 40, .in = 16, .kernel_size = 7, .padding = 3, .bias = true}},
      {{.out = 33, .in = 20, .kernel_size = {5, 3}, .stride = 2, .bias = true},
       {.out = 20, .in = 17, .kernel_size = 1, .padding = 2, .bias = true}},
      {{.out = 10, .in = 12, .kernel_size = 3},
       {.out = 12, .in = 9, .kernel_size = 3, .bias = true}},
      {{.out = 10, .in = 12, .kernel_size = {2, 3}, .dilation = {3, 1}, .bias = true},
       {.out = 12, .in = 9, .kernel_size = {3, 2}, .stride = {1, 3}, .dilation = {1, 2}}},
      {{.out = 12, .in = 48, .kernel_size = 1, .groups = 12, .bias = true},
       {.out = 48, .in = 12, .kernel_size = 3, .groups = 12, .bias = true}},
      {{.out = 12, .in = 36, .kernel_size = 3, .groups = 3},
       {.out = 36, .in = 20, .kernel_size = 3, .groups = 4, .bias = true}},
      {{.out = 40, .in = 36, .kernel_size = 1, .groups = 2},
       {.out = 36, .in = 30, .kernel_size = 3, .groups = 6, .bias = true}},
      {{.out = 6, .in = 6, .kernel_size = 1, .stride = 2, .groups = 6, .bias = true},
       {.out = 6, .in = 4, .kernel_size = {3, 1}, .stride = 2, .groups = 2, .bias = true}},
      {{.out = 9, .in = 6, .kernel_size = {2, 3}, .dilation = 2, .groups = 3},
       {.out = 6, .in = 6, .kernel_size = 1, .stride = 2, .padding = 1, .groups = 6, .bias = true}},
      {{.out = 7, .in = 5, .kernel_size = 1}, {.out = 5, .in = 3, .kernel_size = 1}},
      {{.out = 1, .in = 1, .kernel_size = 1}, {.out = 1, .in = 1, .kernel_size = 1}},
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

TEST_CASE("the pairs above take every algorithm", "[product]") {
  std::set<detail::Algorithm> algorithms;
  for (const auto& [outer, inner] : pairs()) algorithms.insert(detail::algorithm_for(outer, inner));
  CHECK(algorithms.size() == 6);
}

TEST_CASE("panels cover a result once, and never its inner length", "[product]") {
  Rng rng(11);
  for (int n = 0; n < 300; ++n) {
    const Index rows = random_index(rng, 1, 700), columns = random_index(rng, 1, 2500),
                inner = random_index(rng, 1, 3000);
    const detail::Panels panels(rows, columns, inner);
    Index covered = 0;
    for (Index i = 0; i < panels.count(); ++i) {
      const auto panel = panels[i];
      REQUIRE(panel.rows > 0);
      REQUIRE(panel.columns > 0);
      REQUIRE(panel.row + panel.rows <= rows);
      REQUIRE(panel.column + panel.columns <= columns);
      covered += panel.rows * panel.columns;
      for (Index k = 0; k < i; ++k) {
        const auto other = panels[k];
        REQUIRE((other.row + other.rows <= panel.row || panel.row + panel.rows <= other.row ||
                 other.column + other.columns <= panel.column ||
                 panel.column + panel.columns <= other.column));
      }
    }
    CHECK(covered == rows * columns);
  }
}

TEST_CASE("products that make no sense are refused with both shapes", "[product]") {
  const Conv2d<float> f({.out = 4, .in = 3, .kernel_size = 3}),
      g({.out = 2, .in = 5, .kernel_size = 1});
  const std::string message = message_of<ShapeError>([&] { static_cast<void>(g * f); });
  CHECK_THAT(message, Catch::Contains("conv2d 5->2 @1x1") && Catch::Contains("conv2d 3->4 @3x3") &&
                          Catch::Contains("reads 5 channels") && Catch::Contains("writes 4"));
  CHECK_THROWS_AS(contract(std::vector<Conv2d<float>>{}), ShapeError);

  constexpr Index most = std::numeric_limits<Index>::max();
  const Conv1d<float> stride({.out = 1, .in = 1, .kernel_size = 2, .stride = most / 2});
  const Conv1d<float> wide({.out = 1, .in = 1, .kernel_size = 2, .dilation = 4});
  CHECK_THROWS_AS(contract(wide * stride), SizeError);
  const Conv1d<float> far({.out = 1, .in = 1, .kernel_size = 2, .stride = Index{1} << 40});
  CHECK_THROWS_AS(contract(far * far * far), SizeError);
  CHECK_THROWS_AS(contract(far * far * far * far), SizeError);
  const Conv1d<float> sparse({.out = 1, .in = 1, .kernel_size = 2, .dilation = 1'000'000'007});
  const std::string almost =
      message_of<SizeError>([&] { static_cast<void>(contract(sparse * wide)); });
  CHECK_THAT(almost, Catch::Contains("almost only zeros"));
}

}  // namespace concertina::test
