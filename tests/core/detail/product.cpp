// Products of two layers: every algorithm against the definition, panels, refusals.
// SPDX-License-Identifier: Apache-2.0
#include <concertina/contract.hpp>
#include <concertina/detail/product/product.hpp>
#include <concertina/detail/verify/rounding.hpp>
#include <concertina/modular.hpp>

#include "core/pairs.hpp"
#include "support.hpp"

#include <catch2/catch.hpp>

#include <cstdint>
#include <limits>
#include <set>
#include <utility>
#include <vector>

namespace concertina::test {
namespace {

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
