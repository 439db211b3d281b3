// The product as an expression: what it keeps and what it views, and that it leaves others'
// operators alone.
// SPDX-License-Identifier: Apache-2.0
#include <concertina/contract.hpp>

#include "support.hpp"

#include <array>
#include <list>
#include <optional>
#include <span>
#include <type_traits>

namespace concertina::test {
namespace {

using Catch::Contains;
using Layer2 = Conv2d<int>;

/// Small enough that nothing is inexact, different enough that order matters.
struct Chain3 {
  Layer2 a, b, c;  // applied in this order
  FeatureMap<int, 2> x;
};

Chain3 chain(Rng& rng) {
  return {small_integers<int, 2>({.out = 3, .in = 2, .kernel_size = 3, .padding = 1}, rng),
          small_integers<int, 2>({.out = 4, .in = 3, .bias = true}, rng),
          small_integers<int, 2>({.out = 2, .in = 4, .kernel_size = 2, .bias = true}, rng),
          small_integers<int, 2>({.batch = 2, .channels = 2, .size = {5, 4}}, rng)};
}

/// Overwrites what a dangling view would look at, as far as one can.
void churn_memory() {
  std::vector<std::vector<int>> blocks;
  for (std::size_t size = 1; size < 200; ++size) blocks.emplace_back(size, 0x5a5a5a5a);
}

template <class A, class B>
concept Multiply = requires(A a, B b) { static_cast<A>(a) * static_cast<B>(b); };

// What may become a product and what must not.
static_assert(Multiply<Layer2&, Layer2&>);
static_assert(Multiply<Expr<int, 2>, Layer2>);
static_assert(Multiply<int, Layer2>);
static_assert(!Multiply<Layer2&, Conv2d<float>&>);
static_assert(!Multiply<Layer2&, Conv1d<int>&>);
static_assert(!Multiply<Expr<int, 2>, Expr<int, 1>>);
static_assert(!Multiply<Layer2&, FeatureMap<int, 2>&>);
static_assert(!Multiply<Layer2&, int>);
static_assert(!Multiply<Eigen::MatrixXi&, Layer2&>);
static_assert(!Multiply<Layer2&, Eigen::MatrixXi&>);
static_assert(!std::is_convertible_v<Eigen::MatrixXf, Linear<float>>);
static_assert(!std::is_constructible_v<ConvView<int, 2>, Layer2>);
static_assert(!std::is_constructible_v<Expr<int, 2>, const Layer2>);

TEST_CASE("a product is a flat list of views, the first applied first", "[expression]") {
  Rng rng(1);
  const auto [a, b, c, x] = chain(rng);
  const auto product = c * b * a;
  static_assert(std::is_same_v<decltype(product), const Expr<int, 2>>);
  const auto factors = product.layers();
  REQUIRE(factors.size() == 3);
  CHECK(factors[0].weight().data() == a.weight().data());
  CHECK(factors[1].weight().data() == b.weight().data());
  CHECK(factors[2].weight().data() == c.weight().data());
  CHECK(shapes(product) == std::vector{a.shape(), b.shape(), c.shape()});
  CHECK(product(x) == c(b(a(x))));
  CHECK(Layer2(product)(x) == c(b(a(x))));
  CHECK(Expr<int, 2>(a)(x) == a(x));
  CHECK(Layer2(Expr<int, 2>(a)) == a);
}

TEST_CASE("parentheses do not matter", "[expression]") {
  Rng rng(2);
  const auto [a, b, c, x] = chain(rng);
  const Layer2 flat = c * b * a, right = c * (b * a), left = (c * b) * a;
  const auto inner = b * a;
  const auto outer = c * b;
  const Layer2 named_inner = c * inner, named_outer = outer * a;
  for (const Layer2& layer : {right, left, named_inner, named_outer}) {
    CHECK(layer == flat);
    CHECK(layer.shape() == flat.shape());
  }
  const auto last = small_integers<int, 2>({.out = 2, .in = 2}, rng);
  const Layer2 balanced = (last * c) * (b * a);
  CHECK(balanced(x) == last(c(b(a(x)))));
  CHECK(shapes((last * c) * (b * a)).size() == 4);
  // Evaluated on the way, it is the same layer too.
  CHECK(Layer2(contract(c * b) * a) == flat);
}

TEST_CASE("temporaries are kept, wherever they stand", "[expression]") {
  Rng rng(3);
  const auto [a, b, c, x] = chain(rng);
  const FeatureMap<int, 2> expected = c(b(a(x)));
  const auto left = Layer2(c) * b * a;
  const auto middle = c * Layer2(b) * a;
  const auto right = c * b * Layer2(a);
  const auto all = Layer2(c) * (Layer2(b) * Layer2(a));
  const auto scaled = c * b * (1 * a);
  const auto contracted = contract(c * b) * a;
  churn_memory();
  for (const Expr<int, 2>& product : {left, middle, right, all, scaled, contracted}) {
    CHECK(product(x) == expected);
    CHECK(Layer2(product)(x) == expected);
  }
}

TEST_CASE("a moved layer is kept without a copy", "[expression]") {
  Rng rng(4);
  auto [a, b, c, x] = chain(rng);
  const FeatureMap<int, 2> expected = b(a(x));
  const int* const memory = a.weight().data();
  const auto product = b * std::move(a);
  CHECK(product.layers()[0].weight().data() == memory);
  CHECK(product(x) == expected);
}

TEST_CASE("copies share what is kept and outlive the original", "[expression]") {
  Rng rng(5);
  const auto [a, b, c, x] = chain(rng);
  const FeatureMap<int, 2> expected = c(b(a(x)));
  std::optional<Expr<int, 2>> original = c * (Layer2(b) * Layer2(a));
  const Expr<int, 2> copy = *original;
  Expr<int, 2> assigned(a);
  assigned = *original;
  CHECK(copy.layers()[0].weight().data() == original->layers()[0].weight().data());
  original.reset();
  churn_memory();
  CHECK(copy(x) == expected);
  CHECK(Layer2(assigned)(x) == expected);

  Expr<int, 2> grown = copy;  // growing a copy leaves the original as it is
  grown.then(small_integers<int, 2>({.out = 1, .in = 2}, rng));
  CHECK(shapes(grown).size() == 4);
  CHECK(shapes(copy).size() == 3);
  const Expr<int, 2> moved = std::move(grown);
  CHECK(moved(x).shape().channels == 1);
}

TEST_CASE("a function may return the product of its own layers", "[expression]") {
  Rng rng(6);
  const auto [a, b, c, x] = chain(rng);
  const auto make = [&] {
    Layer2 first = a;
    Layer2 second = b;
    return std::move(second) * std::move(first);
  };
  const auto product = c * make();
  churn_memory();
  CHECK(product(x) == c(b(a(x))));
}

TEST_CASE("a named layer is viewed: its later numbers count", "[expression]") {
  Linear<int> a({.out = 1, .in = 1}, {2}), b({.out = 1, .in = 1}, {3});
  const auto product = b * a;
  CHECK(Linear<int>(product).weight()[0] == 6);
  a.weight()[0] = 5;
  CHECK(Linear<int>(product).weight()[0] == 15);
}

TEST_CASE("a layer may be assigned a product of itself", "[expression]") {
  Rng rng(7);
  const auto [first, b, c, x] = chain(rng);
  Layer2 layer = first;
  const auto after =
      small_integers<int, 2>({.out = 3, .in = 3, .kernel_size = 2, .bias = true}, rng);
  layer = after * layer;
  CHECK(layer(x) == after(first(x)));
  Layer2 power = small_integers<int, 2>({.out = 2, .in = 2, .kernel_size = 2}, rng);
  const Layer2 original = power;
  power = power * power;
  CHECK(power(x) == original(original(x)));
}

TEST_CASE("run-time lists are chains as products are", "[expression]") {
  Rng rng(8);
  const auto [a, b, c, x] = chain(rng);
  const Layer2 expected = c * b * a;
  const std::vector<Layer2> owners{a, b, c};
  const std::vector<ConvView<int, 2>> views{a, b, c};
  CHECK(contract(owners) == expected);
  CHECK(contract(views) == expected);
  CHECK(contract(std::span(owners)) == expected);
  CHECK(contract(std::span(views).first(2)) == Layer2(b * a));
  CHECK(contract(std::array{a, b, c}) == expected);
  CHECK(contract(std::list<Layer2>{a, b, c}) == expected);
  CHECK(contract(std::vector{a}) == a);
  CHECK(shapes(views) == shapes(c * b * a));
  CHECK(exactness(owners).exact());
  static_assert(std::is_same_v<ScalarOf<decltype(views)>, int> && rank_of<decltype(owners)> == 2);
  static_assert(Expression<std::vector<Layer2>> && Expression<Expr<int, 2>> &&
                !Expression<Layer2> && !Expression<std::vector<int>>);

  CHECK_THAT(message_of<ShapeError>([] { contract(std::vector<Layer2>{}); }),
             Contains("contract: no layers"));
  CHECK_THAT(message_of<ShapeError>([&] { contract(std::vector{b, a}); }),
             Contains("contract: layer 2 reads 2 channels (conv2d 2->3 @3x3 p1x1)") &&
                 Contains("layer 1 writes 4 (conv2d 3->4 @1x1 +bias)"));
}

TEST_CASE("views multiply as their owners do", "[expression]") {
  Rng rng(9);
  const auto [a, b, c, x] = chain(rng);
  const ConvView<int, 2> view_a = a, view_b = b;
  const Layer2 expected = b * a;
  CHECK(Layer2(view_b * a) == expected);
  CHECK(Layer2(b * view_a) == expected);
  CHECK(Layer2(ConvView<int, 2>(b) * ConvView<int, 2>(a)) == expected);  // a temporary view is fine
  CHECK((view_b * view_a).operator Layer2() == expected);
}

TEST_CASE("channels that do not fit are refused when the product is written", "[expression]") {
  Rng rng(10);
  const auto [a, b, c, x] = chain(rng);
  const auto refused = [](auto&& product) { return message_of<ShapeError>([&] { product(); }); };
  CHECK_THAT(refused([&] { return a * b; }),
             Contains("product: layer 2 reads 2 channels (conv2d 2->3 @3x3 p1x1)") &&
                 Contains("layer 1 writes 4 (conv2d 3->4 @1x1 +bias)"));
  CHECK_THAT(refused([&] { return c * (a * c); }),
             Contains("reads 4 channels") && Contains("writes 3"));
  CHECK_THAT(refused([&] { return (a * a) * c; }),
             Contains("reads 2 channels") && Contains("writes 3"));
  Expr<int, 2> product(a);
  CHECK_THROWS_AS(product.then(c), ShapeError);
  CHECK(shapes(product).size() == 1);  // as it was
}

TEST_CASE("Eigen's own products are untouched", "[expression]") {
  using namespace concertina;
  const Eigen::Matrix2i a{{1, 2}, {3, 4}}, b{{0, 1}, {1, 0}};
  static_assert(
      std::is_same_v<decltype(a * b), const Eigen::Product<Eigen::Matrix2i, Eigen::Matrix2i>>);
  CHECK((Eigen::Matrix2i(a * b) == Eigen::Matrix2i{{2, 1}, {4, 3}}));
  CHECK((Eigen::Matrix2i(2 * a) == a + a));
  CHECK((a == a));
  CHECK(a.cwiseProduct(b).sum() == 5);
  CHECK((Eigen::Vector2i(a * Eigen::Vector2i(1, 1)) == Eigen::Vector2i(3, 7)));
}

}  // namespace
}  // namespace concertina::test
