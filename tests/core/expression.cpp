// Expressions: what they keep and what they view, products, sums and concatenations against their
// own parts, forms, refusals, and that others' operators are left alone.
// SPDX-License-Identifier: Apache-2.0
#include <concertina/contract.hpp>
#include <concertina/expression.hpp>
#include <concertina/layers.hpp>
#include <concertina/modular.hpp>

#include "support.hpp"

#include <array>
#include <list>
#include <optional>
#include <span>
#include <sstream>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace concertina::test {
namespace {

using Catch::Contains;
using Layer2 = Conv2d<int>;

/// Small enough that nothing is inexact, different enough that order matters.
struct Chain3 {
  Layer2 a, b, c;  // applied in this order
  FeatureMap<int, 2> x;
};

Chain3 three(Rng& rng) {
  return {small_integers<int, 2>({.out = 3, .in = 2, .kernel_size = 3, .padding = 1}, rng),
          small_integers<int, 2>({.out = 4, .in = 3, .bias = true}, rng),
          small_integers<int, 2>({.out = 2, .in = 4, .kernel_size = 2, .bias = true}, rng),
          small_integers<int, 2>({.batch = 2, .channels = 2, .size = {5, 4}}, rng)};
}

Layer2 layer(const ConvShape<2>& shape, std::uint64_t seed) {
  Rng rng(seed);
  return small_integers<int, 2>(shape, rng);
}

FeatureMap<int, 2> input(Index channels, PerAxis<2> size) {
  Rng rng(99);
  return small_integers<int, 2>({.batch = 2, .channels = channels, .size = size}, rng);
}

/// f(x) + g(x), element by element.
FeatureMap<int, 2> added(FeatureMap<int, 2> y, const FeatureMap<int, 2>& z) {
  REQUIRE(y.shape() == z.shape());
  for (std::size_t i = 0; i < y.values().size(); ++i) y.values()[i] += z.values()[i];
  return y;
}

/// Channels first .. first + count of a batch.
FeatureMap<int, 2> channels_of(const FeatureMap<int, 2>& x, Index first, Index count) {
  MapShape<2> shape = x.shape();
  shape.channels = count;
  std::vector<int> values;
  const Index size = numel(shape.size);
  for (Index n = 0; n < shape.batch; ++n) {
    const auto from = x.values().begin() + (n * x.shape().channels + first) * size;
    values.insert(values.end(), from, from + count * size);
  }
  return {shape, std::move(values)};
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
static_assert(!std::is_constructible_v<ConvView<const int, 2>, Layer2>);
static_assert(!std::is_constructible_v<Expr<int, 2>, const Layer2>);

TEST_CASE("a product is a flat list of views, the first applied first", "[expression]") {
  Rng rng(1);
  const auto [a, b, c, x] = three(rng);
  const auto product = c * b * a;
  static_assert(std::is_same_v<decltype(product), const Expr<int, 2>>);
  const auto factors = product.layers();
  REQUIRE(factors.size() == 3);
  CHECK(factors[0].weight().data() == a.weight().data());
  CHECK(factors[1].weight().data() == b.weight().data());
  CHECK(factors[2].weight().data() == c.weight().data());
  CHECK(Form(product).leaves() == std::vector{a.shape(), b.shape(), c.shape()});
  CHECK(product(x) == c(b(a(x))));
  CHECK(Layer2(product)(x) == c(b(a(x))));
  CHECK(Expr<int, 2>(a)(x) == a(x));
  CHECK(Layer2(Expr<int, 2>(a)) == a);
}

TEST_CASE("parentheses do not matter", "[expression]") {
  Rng rng(2);
  const auto [a, b, c, x] = three(rng);
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
  CHECK(Form((last * c) * (b * a)).leaves().size() == 4);
  // Evaluated on the way, it is the same layer too.
  CHECK(Layer2(contract(c * b) * a) == flat);
}

TEST_CASE("temporaries are kept, wherever they stand", "[expression]") {
  Rng rng(3);
  const auto [a, b, c, x] = three(rng);
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
  auto [a, b, c, x] = three(rng);
  const FeatureMap<int, 2> expected = b(a(x));
  const int* const memory = a.weight().data();
  const auto product = b * std::move(a);
  CHECK(product.layers()[0].weight().data() == memory);
  CHECK(product(x) == expected);
}

TEST_CASE("copies share what is kept and outlive the original", "[expression]") {
  Rng rng(5);
  const auto [a, b, c, x] = three(rng);
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
  CHECK(Form(grown).leaves().size() == 4);
  CHECK(Form(copy).leaves().size() == 3);
  const Expr<int, 2> moved = std::move(grown);
  CHECK(moved(x).shape().channels == 1);
}

TEST_CASE("a function may return the product of its own layers", "[expression]") {
  Rng rng(6);
  const auto [a, b, c, x] = three(rng);
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
  const auto [first, b, c, x] = three(rng);
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
  const auto [a, b, c, x] = three(rng);
  const Layer2 expected = c * b * a;
  const std::vector<Layer2> owners{a, b, c};
  const std::vector<ConvView<const int, 2>> views{a, b, c};
  CHECK(contract(owners) == expected);
  CHECK(contract(views) == expected);
  CHECK(contract(std::span(owners)) == expected);
  CHECK(contract(std::span(views).first(2)) == Layer2(b * a));
  CHECK(contract(std::array{a, b, c}) == expected);
  CHECK(contract(std::list<Layer2>{a, b, c}) == expected);
  CHECK(contract(std::vector{a}) == a);
  CHECK(Form(views).leaves() == Form(c * b * a).leaves());
  CHECK(exactness(owners).exact());
  static_assert(std::is_same_v<ScalarOf<decltype(views)>, int> && rank_of<decltype(owners)> == 2);
  static_assert(LinearMap<std::vector<Layer2>> && LinearMap<Expr<int, 2>> && LinearMap<Layer2> &&
                LinearMap<ConvView<int, 2>> && LinearMap<std::vector<Expr<int, 2>>> &&
                !LinearMap<std::vector<int>> && !LinearMap<Expr<int, any_rank>> &&
                !LinearMap<FeatureMap<int, 2>> && !LinearMap<std::vector<std::vector<Layer2>>>);

  CHECK_THAT(message_of<ShapeError>([] { contract(std::vector<Layer2>{}); }),
             Contains("an expression of no layers"));
  CHECK_THAT(message_of<ShapeError>([&] { contract(std::vector{b, a}); }),
             Contains("product: layer 2 reads 2 channels (conv2d 2->3 @3x3 p1x1)") &&
                 Contains("layer 1 writes 4 (conv2d 3->4 @1x1 +bias)"));
}

TEST_CASE("views multiply as their owners do", "[expression]") {
  Rng rng(9);
  const auto [a, b, c, x] = three(rng);
  const ConvView<const int, 2> view_a = a, view_b = b;
  const Layer2 expected = b * a;
  CHECK(Layer2(view_b * a) == expected);
  CHECK(Layer2(b * view_a) == expected);
  CHECK(Layer2(ConvView<const int, 2>(b) * ConvView<const int, 2>(a)) ==
        expected);  // a temporary view is fine
  CHECK((view_b * view_a).operator Layer2() == expected);
}

TEST_CASE("a view that writes stands wherever one that reads does", "[expression]") {
  Rng rng(3);
  auto f = small_integers<int, 2>({.out = 2, .in = 3}, rng),
       g = small_integers<int, 2>({.out = 1, .in = 2}, rng);
  const ConvView<int, 2> inner(f), outer(g);
  Expr<int, 2> grown = inner;
  grown.then(outer);
  CHECK(Conv2d<int>(grown) == Conv2d<int>(g * f));
}

TEST_CASE("a temporary form gives its tree away", "[expression]") {
  const auto& tree = Form(ConvShape<1>{.out = 2, .in = 3}).tree();
  CHECK(tree.leaf().in == 3);
}

TEST_CASE("channels that do not fit are refused when the product is written", "[expression]") {
  Rng rng(10);
  const auto [a, b, c, x] = three(rng);
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
  CHECK(Form(product).leaves().size() == 1);  // as it was
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

// ---- forms --------------------------------------------------------------------------------------

TEST_CASE("a form is what an expression is without its weights", "[expression]") {
  Rng rng(31);
  const auto [a, b, c, x] = three(rng);
  const std::vector<ConvShape<2>> shapes{a.shape(), b.shape(), c.shape()};
  const Form form(c * b * a);
  static_assert(std::is_same_v<decltype(form), const Form<2>>);
  CHECK(form.leaves() == shapes);
  CHECK(form == Form(shapes));
  CHECK(form == Form(std::span(shapes)));
  CHECK(form == Form(std::vector{a, b, c}));
  CHECK(form == Form(std::vector<ConvView<const int, 2>>{a, b, c}));
  CHECK(form == Form(std::vector<Expr<int, 2>>{a, c * b}));
  CHECK(form == Form(std::vector{Form(b * a), Form(c)}));
  CHECK(form == Form(std::vector{std::vector{shapes[0], shapes[1]}, std::vector{shapes[2]}}));
  CHECK(form == Form(std::vector{std::vector{a, b}, std::vector{c}}));
  CHECK(form == Form<2>(form));
  CHECK_FALSE(form == Form(b * a));
  CHECK_FALSE(Form(b + b) == Form(b + identity<int>(4) * b));
  static_assert(FormSource<Layer2> && FormSource<ConvShape<2>> && FormSource<Form<1>> &&
                FormSource<std::vector<ConvShape<0>>> && FormSource<std::list<Form<3>>> &&
                !FormSource<Expr<int, any_rank>> && !FormSource<int> &&
                !FormSource<std::vector<int>>);

  CHECK(form.join() == Join::chain);
  REQUIRE(form.parts().size() == 3);
  CHECK(form.parts()[1] == Form(b.shape()));
  CHECK(form.parts()[1].join() == Join::none);
  CHECK(form.parts()[1].parts().empty());
  CHECK(form.shape() == Layer2(c * b * a).shape());
  CHECK(form.output_size({5, 4}) == (c * b * a)(x).shape().size);
  CHECK(to_string(form) ==
        "(conv2d 2->3 @3x3 p1x1, conv2d 3->4 @1x1 +bias, conv2d 4->2 @2x2 +bias)");
  CHECK(Form(a).shape() == a.shape());
  CHECK(Form(a).leaves() == std::vector{a.shape()});
  CHECK(to_string(Form(a)) == to_string(a.shape()));

  const Form nested(c * (b + identity<int>(4) * b) * identity<int>(3));
  CHECK(nested.leaves().size() == 5);
  CHECK(nested.leaves()[0] == ConvShape<2>{.out = 3, .in = 3, .groups = 3});
  CHECK(nested.join() == Join::chain);
  CHECK(nested.parts()[1].join() == Join::sum);
  CHECK(nested.parts()[1].parts()[1].join() == Join::chain);
  CHECK(to_string(nested.parts()[1]) ==
        "(conv2d 3->4 @1x1 +bias + (conv2d 3->4 @1x1 +bias, conv2d 4->4 @1x1 g4))");
  CHECK(to_string(Form(concat_outputs(std::vector<Expr<int, 2>>{b, b}))) ==
        "(conv2d 3->4 @1x1 +bias | conv2d 3->4 @1x1 +bias)");
  CHECK(to_string(Form(concat_inputs(std::vector<Expr<int, 2>>{b, b}))) ==
        "(conv2d 3->4 @1x1 +bias & conv2d 3->4 @1x1 +bias)");
}

TEST_CASE("an expression prints as it is written", "[expression]") {
  Rng rng(33);
  const auto [a, b, c, x] = three(rng);
  const auto scale = channel_scale(std::vector<int>{1, 2, 3, 4});
  CHECK(to_string(scale * (b + identity<int>(4) * b) * a) ==
        "scale[4] * ([conv2d 3->4 @1x1 +bias] + identity[4] * [conv2d 3->4 @1x1 +bias]) * "
        "[conv2d 2->3 @3x3 p1x1]");
  CHECK(to_string(channel_bias<int>(4, 1) * channel_select<int>(3, {0, 1, 1, 2})) ==
        "bias[4] * select[3->4]");
  CHECK(to_string(batch_norm(BatchNorm<float>{.running_mean = {0}, .running_var = {1}})) ==
        "batch_norm[1]");
  CHECK(to_string(average_pool<float, 2>(3, 3, 2)) == "1/9[3] * [conv2d 3->3 @3x3 s2x2 g3]");
  const std::vector<Expr<int, 2>> parts{b + b, b};
  CHECK(to_string(concat_outputs(parts)) ==
        "concat_outputs([conv2d 3->4 @1x1 +bias] + [conv2d 3->4 @1x1 +bias], "
        "[conv2d 3->4 @1x1 +bias])");
  CHECK(to_string(concat_inputs(parts)).starts_with("concat_inputs("));

  const auto printed = [](const auto& value) { return (std::ostringstream() << value).str(); };
  CHECK(printed(c * b) == to_string(c * b));
  CHECK(printed(Form(c * b)) == to_string(Form(c * b)));
  CHECK(printed(c.shape()) == to_string(c.shape()));
  CHECK(printed(PerAxis<2>{3, 5}) == "3x5");
}

TEST_CASE("a form counts the multiply-adds of the order that is taken", "[expression]") {
  Rng rng(32);
  const auto [a, b, c, x] = three(rng);
  CHECK(Form(a).multiply_adds() == 0);
  CHECK(Form(b * a).multiply_adds() == 4 * 3 * 2 * 9);
  CHECK(Form(b + b).multiply_adds() == 0);
  CHECK(Form((b + b) * a).multiply_adds() == 4 * 3 * 2 * 9);
  CHECK(Form(b * a + b * a).multiply_adds() == 2 * 4 * 3 * 2 * 9);
}

TEST_CASE("a form counts the multiply-adds of its layers", "[expression]") {
  const ConvShape<2> a{.out = 6, .in = 4, .kernel_size = {3, 1}, .padding = {1, 0}, .groups = 2},
      b{.out = 5, .in = 6, .kernel_size = 2, .stride = 2};
  const Form<2> chain(std::vector{a, b});
  CHECK(Form(a).applied_multiply_adds({7, 9}) == 7 * 9 * 6 * 2 * 3);
  CHECK(chain.applied_multiply_adds({7, 9}) == 7 * 9 * 6 * 2 * 3 + 3 * 4 * 5 * 6 * 4);
  CHECK(joined<2>(Join::sum, {chain, chain}).applied_multiply_adds({7, 9}) ==
        2 * chain.applied_multiply_adds({7, 9}));
  CHECK_THROWS_AS(chain.applied_multiply_adds({1, 1}), ShapeError);
}

TEST_CASE("contracting pays from a number of output positions on", "[expression]") {
  // CL of 256->256, 3x3, r = 4: the contraction takes 3.02 G, a position 9.96 M against 0.59 M.
  const Form<2> cl(std::vector<ConvShape<2>>{{.out = 1024, .in = 256, .padding = 1},
                                             {.out = 1024, .in = 1024, .kernel_size = 3},
                                             {.out = 256, .in = 1024}});
  CHECK(cl.multiply_adds() == Index{9} * 256 * 1024 * (1024 + 256));
  CHECK_FALSE(cl.cheaper_contracted(4, {7, 7}));
  CHECK_FALSE(cl.cheaper_contracted(6, {7, 7}));
  CHECK(cl.cheaper_contracted(7, {7, 7}));
  CHECK(cl.cheaper_contracted(1, {56, 56}));
  CHECK_FALSE(Form(cl.leaves().front()).cheaper_contracted(100, {7, 7}));  // nothing to contract
  CHECK_THROWS_AS(cl.cheaper_contracted(0, {7, 7}), ShapeError);
}

TEST_CASE("forms that do not fit are refused", "[expression]") {
  const ConvShape<2> first{.out = 6, .in = 3, .kernel_size = 3}, second{.out = 4, .in = 5};
  CHECK_THAT(message_of<ShapeError>([&] { Form(std::vector{first, second}); }),
             Contains("layer 2 reads 5 channels (conv2d 5->4 @1x1)") &&
                 Contains("layer 1 writes 6 (conv2d 3->6 @3x3)"));
  CHECK_THAT(message_of<ShapeError>([] { Form(std::vector<ConvShape<2>>{}); }),
             Contains("no layers"));
  CHECK_THAT(message_of<ShapeError>([] { Form(std::vector<Layer2>{}); }), Contains("no layers"));
  CHECK_THROWS_AS(Form(first).output_size({2, 9}), ShapeError);
  const ConvShape<2> strided{.out = 6, .in = 3, .kernel_size = 2, .stride = 2},
      beside{.out = 6, .in = 3, .stride = 2};
  const Form<2> both = joined<2>(Join::sum, {Form(strided), Form(beside)});
  CHECK_THROWS_AS(both.shape(), ShapeError);
  CHECK_THROWS_AS(both.multiply_adds(), ShapeError);
  CHECK(both.shape(PerAxis<2>{6, 8}) ==
        ConvShape<2>{.out = 6, .in = 3, .kernel_size = 2, .stride = 2});
  CHECK(both.output_size({6, 8}) == PerAxis<2>{3, 4});
  CHECK_THROWS_AS(both.shape(PerAxis<2>{6, 7}), ShapeError);
  CHECK_THROWS_AS(both.output_size({6, 7}), ShapeError);
  const Form far(std::vector<ConvShape<1>>(3, {.out = 1, .in = 1, .stride = Index{1} << 40}));
  CHECK_THROWS_AS(far.shape(), SizeError);
  constexpr Index wide = (Index{1} << 62) - 1;  // whose last tap, one further, is the largest Index
  const Form taps(
      std::vector<ConvShape<1>>{{.out = 1, .in = 1, .kernel_size = 2},
                                {.out = 1, .in = 1, .kernel_size = 3, .dilation = wide}});
  CHECK_THROWS_AS(taps.shape(), SizeError);
}

// ---- sums and concatenations --------------------------------------------------------------------

TEST_CASE("kernels of different extents are aligned by their paddings and united", "[expression]") {
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

TEST_CASE("groups become their greatest common divisor", "[expression]") {
  const Layer2 four = layer({.out = 12, .in = 24, .kernel_size = 3, .padding = 1, .groups = 4}, 4);
  const Layer2 six = layer({.out = 12, .in = 24, .groups = 6, .bias = true}, 5);
  const Layer2 united = six + four;
  CHECK(united.shape().groups == 2);
  const auto x = input(24, {4, 3});
  CHECK(united(x) == added(six(x), four(x)));
}

TEST_CASE("a negative padding is a crop, and sums like any other", "[expression]") {
  // ACNet with padding 1 around a 5x5: its column crops the columns that it does not read.
  const Layer2 square = layer({.out = 2, .in = 2, .kernel_size = 5, .padding = 1}, 6);
  const Layer2 column = layer({.out = 2, .in = 2, .kernel_size = {5, 1}, .padding = {1, -1}}, 7);
  const Layer2 row = layer({.out = 2, .in = 2, .kernel_size = {1, 5}, .padding = {-1, 1}}, 8);
  const Layer2 united = square + column + row;
  CHECK(united.shape() == square.shape());
  const auto x = input(2, {6, 7});
  CHECK(united(x) == added(added(square(x), column(x)), row(x)));
}

TEST_CASE("differences, factors and equality of expressions", "[expression]") {
  const Layer2 f = layer({.out = 3, .in = 3, .kernel_size = 3, .padding = 1, .bias = true}, 9);
  const Layer2 g = layer({.out = 3, .in = 3}, 10);
  const ConvView<const int, 2> view = g;
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
  static_assert(std::is_same_v<decltype(f - g), Expr<int, 2>>);
}

TEST_CASE("products of sums are exact where every path is", "[expression]") {
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

TEST_CASE("outputs side by side", "[expression]") {
  const Layer2 f = layer({.out = 2, .in = 4, .kernel_size = 3, .padding = 1}, 14);
  const Layer2 g = layer({.out = 4, .in = 4, .groups = 2, .bias = true}, 15);
  const std::vector<Expr<int, 2>> parts{f, g};
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

TEST_CASE("inputs side by side", "[expression]") {
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

TEST_CASE("a direct sum acts on channels apart, and keeps groups", "[expression]") {
  const auto groups_of = [](const std::vector<ConvShape<2>>& shapes) {
    return Form<2>(detail::AnyForm(Join::direct_sum,
                                   std::vector<detail::AnyForm>(shapes.begin(), shapes.end())))
        .shape()
        .groups;
  };
  const auto of = [](Index out, Index in, Index groups) {
    return ConvShape<2>{.out = out, .in = in, .groups = groups};
  };
  CHECK(groups_of({of(2, 3, 1), of(2, 3, 1)}) == 2);
  CHECK(groups_of({of(2, 3, 1), of(4, 6, 1)}) == 1);  // a third is cut nowhere within the second
  CHECK(groups_of({of(2, 3, 1), of(4, 6, 2)}) == 3);
  CHECK(groups_of({of(4, 4, 4), of(6, 6, 6)}) == 10);  // depthwise stays depthwise
  CHECK(groups_of({of(4, 4, 4), of(6, 6, 3)}) == 5);
  CHECK(groups_of({of(1, 2, 1), of(2, 1, 1)}) == 1);
  CHECK(groups_of({of(1, 2, 1), of(2, 1, 1), of(3, 3, 1)}) == 2);  // two of them share a group
  for (const auto& [first, second] :
       {std::pair(ConvShape<2>{.out = 2, .in = 3, .kernel_size = 3, .padding = 1},
                  ConvShape<2>{.out = 4, .in = 6, .groups = 2, .bias = true}),
        std::pair(
            ConvShape<2>{.out = 4, .in = 4, .kernel_size = 3, .padding = 1, .groups = 4},
            ConvShape<2>{.out = 3, .in = 3, .kernel_size = {1, 3}, .padding = {0, 1}, .groups = 3}),
        std::pair(ConvShape<2>{.out = 1, .in = 3, .stride = 2},
                  ConvShape<2>{.out = 5, .in = 2, .kernel_size = 3, .stride = 2, .padding = 1})}) {
    const Layer2 f = layer(first, 24), g = layer(second, 25);
    const auto both = direct_sum(std::vector<Expr<int, 2>>{f, g});
    const Layer2 joined = both;
    const auto x = input(first.in + second.in, {5, 6});
    const auto y = joined(x);
    CHECK(y == both(x));
    CHECK(channels_of(y, 0, first.out) == f(channels_of(x, 0, first.in)));
    CHECK(channels_of(y, first.out, second.out) == g(channels_of(x, first.in, second.in)));
    CHECK(weight_numel(joined.shape()) ==
          joined.shape().out * joined.shape().in / joined.shape().groups * 9);
    CHECK(exactness(both).exact());
    CHECK_THROWS_AS(both(input(first.in, {5, 6})), ShapeError);
  }
  const Layer2 f = layer({.out = 2, .in = 3}, 26), g = layer({.out = 2, .in = 3, .stride = 2}, 27);
  CHECK_THAT(message_of<ShapeError>([&] { contract(direct_sum(std::vector<Expr<int, 2>>{f, g})); }),
             Contains("strides differ"));
  CHECK(to_string(direct_sum(std::vector<Expr<int, 2>>{f, f})) ==
        "direct_sum([conv2d 3->2 @1x1], [conv2d 3->2 @1x1])");
  CHECK(to_string(Form(direct_sum(std::vector<Expr<int, 2>>{f, f}))) ==
        "(conv2d 3->2 @1x1 (+) conv2d 3->2 @1x1)");
}

TEST_CASE("run-time lists sum as operators do", "[expression]") {
  const std::vector<Layer2> layers{layer({.out = 2, .in = 2}, 19),
                                   layer({.out = 2, .in = 2, .kernel_size = 3, .padding = 1}, 20),
                                   layer({.out = 2, .in = 2, .bias = true}, 21)};
  CHECK(sum(layers) == layers[0] + layers[1] + layers[2]);
  CHECK(chain(std::span(layers)) == layers[2] * layers[1] * layers[0]);
  const std::vector<Expr<int, 2>> nested{chain(std::span(layers).first(2)), layers[1]};
  CHECK(sum(nested) == layers[1] * layers[0] + layers[1]);
  CHECK_THAT(message_of<ShapeError>([] { sum(std::vector<Expr<int, 2>>{}); }),
             Contains("no layers"));
}

TEST_CASE("branches that do not fit are refused, naming both", "[expression]") {
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

TEST_CASE("sizes that agree only for some inputs need the input size named", "[expression]") {
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

TEST_CASE("a sum that would be almost only zeros is refused before it is made", "[expression]") {
  const ConvShape<1> near{.out = 64, .in = 64, .kernel_size = 2};
  ConvShape<1> far = near;
  far.padding = Padding<1>::sides(Index{1} << 30, -(Index{1} << 30));
  const Conv1d<int> f(near), g(far);
  CHECK(Form(f + g).shape().kernel_size == PerAxis<1>((Index{1} << 30) + 2));
  CHECK_THAT(message_of<SizeError>([&] { contract(f + g); }), Contains("almost only zeros"));
}

TEST_CASE("half layers add in float", "[expression]") {
  using Half = Conv<Eigen::half, 0>;
  const Half one({.out = 1, .in = 1}, {Eigen::half(2048)}),
      small({.out = 1, .in = 1}, {Eigen::half(1)});
  // 2048 + 1 is a tie in half precision; in float 2048 + 1 + 1 is 2050, which half holds.
  const Half total = one + small + small;
  CHECK(static_cast<float>(total.weight()[0]) == 2050);
}

}  // namespace
// ---- what was moved from, and what is nested deep -----------------------------------------------

TEST_CASE("what was moved from is empty, and using it throws", "[expression]") {
  Rng rng(1);
  auto first = small_integers<int, 2>({.out = 2, .in = 3, .kernel_size = 3, .bias = true}, rng);
  const auto second = small_integers<int, 2>({.out = 4, .in = 2}, rng);
  auto map = small_integers<int, 2>({.channels = 3, .size = 5}, rng);
  Expr<int, 2> product = second * first;

  const Conv2d<int> kept = std::move(first);
  CHECK(first.shape() == ConvShape<2>{});
  CHECK(first.weight().empty());
  CHECK(first.bias().empty());
  CHECK_THROWS_AS(first(map), ShapeError);
  CHECK_THROWS_AS(second * first, ShapeError);
  CHECK_THROWS_AS(contract(first), ShapeError);
  first = kept;
  CHECK(first == kept);

  const Expr<int, 2> taken = std::move(product);
  CHECK(Conv2d<int>(taken) == second * kept);
  CHECK_THROWS_AS(product(map), ShapeError);
  CHECK_THROWS_AS(contract(product), ShapeError);
  CHECK_THROWS_AS(second * product, ShapeError);
  CHECK_THROWS_AS(product + taken, ShapeError);
  CHECK_THROWS_AS(product.scaled(2), ShapeError);
  CHECK_THROWS_AS(Form(product), ShapeError);
  CHECK_THROWS_AS(product.layers(), ShapeError);
  product = taken;
  CHECK(Conv2d<int>(product) == Conv2d<int>(taken));

  const FeatureMap<int, 2> moved = std::move(map);
  CHECK(map.values().empty());
  CHECK(map.shape() == MapShape<2>{.batch = 0, .channels = 0});
  CHECK_THROWS_AS(kept(map), ShapeError);
  const Conv2d<int> again = std::move(first);
  CHECK_THROWS_AS(first(map), ShapeError);
  CHECK(again == kept);
  map = moved;
  CHECK(map == moved);
}

TEST_CASE("expressions nested deep are contracted, too deep ones refused", "[expression]") {
  Conv2d<double> one({.out = 1, .in = 1}, {1.0});
  const auto nested = [&](int levels) {
    Expr<double, 2> expression(one);
    for (int i = 0; i < levels; ++i) {
      const std::vector parts{expression, Expr<double, 2>(one)};
      expression = Expr<double, 2>(i % 2 == 0 ? Join::chain : Join::sum, parts);
    }
    return expression;
  };
  CHECK(contract(nested(900)).weight()[0] == 451);
  CHECK(Form(nested(900)).output_size({5, 6}) == PerAxis<2>{5, 6});
  CHECK_THAT(message_of<SizeError>([&] { nested(10000); }), Catch::Contains("nested deeper"));
  // Parentheses are no nesting.
  Expr<double, 2> chain(one);
  for (int i = 0; i < 2000; ++i) chain = chain + one;
  CHECK(chain.tree().parts().size() == 2001);
  const std::vector ones(10'000, Linear<int>({.out = 1, .in = 1}, {1}));
  CHECK(contract(ones) == ones.front());
}

TEST_CASE("chains longer than the order of all their products is sought for", "[expression]") {
  Rng rng(2);
  const Index count = GENERATE(31, 32, 33, 64, 65, 1025, 1057);
  std::vector<Linear<PrimeField>> layers;
  for (Index n = 0, in = 3; n < count; ++n) {
    const Index out = random_index(rng, 1, 4);
    Linear<PrimeField>& layer =
        layers.emplace_back(ConvShape<0>{.out = out, .in = in, .bias = true});
    fill_random(layer.weight(), rng);
    fill_random(layer.bias(), rng);
    in = out;
  }
  FeatureMap<PrimeField, 0> x({.channels = 3});
  fill_random(x.values(), rng);
  FeatureMap<PrimeField, 0> y = x;
  for (const auto& layer : layers) y = layer(y);
  CHECK(contract(layers)(x) == y);
}

}  // namespace concertina::test
