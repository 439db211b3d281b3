// The proofs: they hold for right contractions, and every single wrong element makes one fail.
// SPDX-License-Identifier: Apache-2.0
#include <concertina/verify.hpp>

#include <concertina/expand.hpp>
#include <concertina/layers.hpp>

#include "support.hpp"

#include <catch2/catch.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <sstream>
#include <vector>

namespace concertina::test {
namespace {

template <class Scalar>
std::vector<Conv<Scalar, 2>> chain(std::uint64_t seed = 1) {
  std::mt19937_64 generator(seed);
  return initialize<Scalar>(
      expand_cl<2>({.out = 3, .in = 2, .kernel_size = 3, .stride = 2, .padding = 1, .bias = true}),
      generator);
}

template <class Scalar>
Scalar next_up(Scalar x) {
  return std::nextafter(x, std::numeric_limits<Scalar>::infinity());
}

}  // namespace

TEST_CASE("all proofs hold for contractions", "[verify]") {
  SECTION("float in float") { CHECK(verify(chain<float>(), contract(chain<float>()))); }
  SECTION("float in double") {
    const auto layers = chain<float>();
    const Verification found = verify<double>(layers, contract<double>(layers));
    CHECK(found);
    CHECK(found.rounding.ulps <= 0.5001L);
    CHECK(found.rounding.compared == 3 * 2 * 9 + 3);
  }
  SECTION("long double") { CHECK(verify(chain<long double>(), contract(chain<long double>()))); }
  SECTION("bfloat16 in float") {
    std::vector<Conv<Eigen::bfloat16, 2>> layers;
    for (const auto& layer : chain<float>()) layers.push_back(layer.cast<Eigen::bfloat16>());
    CHECK(verify(layers, contract(layers)));
  }
  SECTION("a layer alone") {
    const Conv2d<float> layer = chain<float>()[1];
    CHECK(verify(layer, layer));
    CHECK(verify(layer, contract(layer)));
    Conv2d<float> wrong = layer;
    wrong.weight()[7] = next_up(next_up(wrong.weight()[7]));
    CHECK_FALSE(prove_rounding(layer, wrong));
    CHECK_FALSE(prove_structure(layer, wrong));
  }
  SECTION("a list of expressions, and views") {
    const auto layers = chain<float>();
    const std::vector<Expr<float, 2>> parts{layers[1] * layers[0], layers[2]};
    const std::vector<ConvView<const float, 2>> views(layers.begin(), layers.end());
    const Conv2d<float> product = contract(parts);
    CHECK(verify(parts, product));
    CHECK(verify(views, ConvView<const float, 2>(product)));
  }
  SECTION("integers") {
    Rng rng(4);
    std::vector<Conv2d<std::int64_t>> layers;
    for (const auto& layer : chain<float>()) {
      layers.push_back(small_integers<std::int64_t>(layer.shape(), rng));
    }
    CHECK(verify(layers, contract(layers)));
  }
}

TEST_CASE("one wrong element fails rounding and structure, in floats and in integers", "[verify]") {
  const auto layers = chain<float>();
  const Conv2d<float> right = contract<double>(layers);
  const PerAxis<2> size = smallest_input(Form(layers));
  Rng rng(6);
  std::vector<Conv2d<std::int64_t>> integers;
  for (const auto& layer : layers)
    integers.push_back(small_integers<std::int64_t>(layer.shape(), rng));
  const Conv2d<std::int64_t> whole = contract(integers);
  for (std::size_t i = 0; i < right.weight().size() + right.bias().size(); ++i) {
    const auto number = [&](auto& layer) -> auto& {
      return i < layer.weight().size() ? layer.weight()[i]
                                       : layer.bias()[i - layer.weight().size()];
    };
    Conv2d<float> wrong = right;
    number(wrong) = next_up(next_up(number(wrong)));  // two units in the last place
    CHECK_FALSE(prove_rounding<double>(layers, wrong));
    CHECK_FALSE(prove_structure<double>(layers, wrong, {.input_size = size}));
    Conv2d<std::int64_t> off_by_one = whole;
    number(off_by_one) += 1;
    CHECK_FALSE(prove_rounding(integers, off_by_one));
    CHECK_FALSE(prove_structure(integers, off_by_one, {.input_size = size}));
  }
}

TEST_CASE("an element that is not finite fails", "[verify]") {
  const auto layers = chain<float>();
  for (const float bad :
       {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
    Conv2d<float> wrong = contract(layers);
    wrong.weight()[5] = bad;
    const Report report = prove_rounding(layers, wrong);
    CHECK_FALSE(report);
    CHECK_THAT(report.failure, Catch::Contains("is not finite"));
  }
  const Linear<float> big({.out = 1, .in = 1}, {0x1p100F});
  const std::vector<Linear<float>> overflow{big, big};
  CHECK_FALSE(prove_rounding(overflow, contract(overflow)));
}

TEST_CASE("a kernel of another geometry fails every proof, one with more zeros around it none",
          "[verify]") {
  const auto layers = chain<float>();
  const Conv2d<float> right = contract(layers);
  ConvShape<2> shape = right.shape();
  shape.padding = 0;
  const ConvView<const float, 2> moved(shape, right.weight(), right.bias());
  CHECK_THAT(prove_algebra(layers, moved).failure, Catch::Contains("output sizes differ"));
  CHECK_FALSE(prove_rounding(layers, moved));
  CHECK_FALSE(prove_structure(layers, moved, {.input_size = PerAxis<2>(9)}));

  shape.kernel_size = 5;
  shape.padding = 2;
  Conv2d<float> larger(shape);
  std::ranges::copy(right.bias(), larger.bias().begin());
  for (Index pair = 0; pair < 6; ++pair) {
    for (Index y = 0; y < 3; ++y) {
      for (Index x = 0; x < 3; ++x) {
        larger.weight()[static_cast<std::size_t>(pair * 25 + (y + 1) * 5 + x + 1)] =
            right.weight()[static_cast<std::size_t>(pair * 9 + y * 3 + x)];
      }
    }
  }
  CHECK(verify(layers, larger));
  larger.weight()[0] = 1e-30F;  // where the chain has no tap
  CHECK_FALSE(prove_rounding(layers, larger));
}

TEST_CASE("where a chain is exact in the interior only, the proofs are about the interior",
          "[verify]") {
  std::mt19937_64 generator(2);
  const ConvShape<2> padded{.out = 3, .in = 3, .kernel_size = 3, .padding = 1, .bias = true};
  const auto layers = initialize<double>(std::vector{padded, padded}, generator);
  CHECK(verify(layers, contract(layers, interior_only)));
}

TEST_CASE("a proof that sees no output off the border does not hold", "[verify]") {
  std::mt19937_64 generator(2);
  const ConvShape<2> padded{.out = 2, .in = 2, .kernel_size = 3, .padding = 1};
  const auto layers = initialize<float>(std::vector{padded, padded}, generator);
  const Conv2d<float> product = contract(layers, interior_only);
  CHECK_THAT(prove_algebra(layers, product, {.input_size = PerAxis<2>(2)}).failure,
             Catch::Contains("every output is on the border"));
  CHECK_FALSE(prove_structure(layers, product, {.input_size = PerAxis<2>(2)}));
}

TEST_CASE("outputs are allowed the roundings of their layers and of the contraction", "[verify]") {
  // Ones throughout, so that errors are multiples of the unit roundoff u of float. The contraction
  // counts 1 term for its weight and 2 more for a bias, 3; its application in double next to
  // nothing. A layer has 2 terms, and 8 for what it may be else: 20 for both in turn. A contraction
  // of somebody else's counts 3 and 2.
  const std::vector<Linear<float>> layers(2, Linear<float>({.out = 1, .in = 1}, {1.0F}));
  const Linear<float> product = contract(layers);
  const FeatureMap<float, 0> x({.channels = 1}, {1.0F});
  const auto given = [](auto value) { return FeatureMap<decltype(value), 0>({}, {value}); };
  const auto off = [&](int roundings) { return given(1 + std::ldexp(float(roundings), -24)); };
  CHECK(prove_outputs(layers, product, x, off(22)));
  CHECK_FALSE(prove_outputs(layers, product, x, off(24)));  // the next float
  CHECK(prove_outputs(layers, product, x, off(-23)));
  CHECK_FALSE(prove_outputs(layers, product, x, off(-24)));
  CHECK(prove_outputs(layers, product, x, off(8), ComputedBy::contraction));
  CHECK_FALSE(prove_outputs(layers, product, x, off(10), ComputedBy::contraction));
  // Rounded once more to float, the contraction in double has 1 rounding.
  CHECK(prove_outputs<double>(layers, product, x, off(-21)));
  CHECK_FALSE(prove_outputs<double>(layers, product, x, off(-22)));
  // Half stores what float computed: one rounding of 2^-11, by a contraction one of its weight too.
  const auto half = [&](float value) { return given(Eigen::half(value)); };
  CHECK(prove_outputs(layers, product, x, half(1 - 0x1p-11F)));
  CHECK_FALSE(prove_outputs(layers, product, x, half(1 - 0x1p-10F)));
  CHECK(prove_outputs(layers, product, x, half(1 - 0x1p-10F), ComputedBy::contraction));
  CHECK_FALSE(prove_outputs(layers, product, x, half(1 - 0x1.8p-10F), ComputedBy::contraction));
}

TEST_CASE("right outputs hold, and a fault in any is found", "[verify]") {
  const auto layers = chain<float>();
  const Conv2d<float> product = contract(layers);
  Rng rng(3);
  FeatureMap<float, 2> x({.batch = 2, .channels = 2, .size = {6, 5}});
  for (float& element : x.values()) element = static_cast<float>(random_uniform(rng, 1));
  const FeatureMap<float, 2> y = Expr<float, 2>(chain(layers))(x), contracted = product(x);
  const Report right = prove_outputs(layers, product, x, y);
  CHECK(right);
  CHECK(right.proof == "outputs");
  CHECK(right.compared == std::ssize(y.values()));
  CHECK(right.error <= right.bound);
  CHECK(prove_outputs(layers, product, x, contracted, ComputedBy::contraction));
  for (std::size_t i = 0; i < y.values().size(); ++i) {
    for (const float fault : {1e-3F, std::numeric_limits<float>::quiet_NaN()}) {
      FeatureMap<float, 2> wrong = y;
      wrong.values()[i] += fault;
      const Report report = prove_outputs(layers, product, x, wrong);
      CHECK_FALSE(report);
      CHECK_THAT(report.failure, Catch::StartsWith("output["));
      CHECK_FALSE(prove_outputs(layers, product, x, wrong, ComputedBy::contraction));
    }
  }
  Conv2d<float> wrong = product;
  wrong.weight()[7] += 1e-3F;
  CHECK_FALSE(prove_outputs(layers, wrong, x, y));
}

TEST_CASE("outputs of other scalars", "[verify]") {
  SECTION("integers are equal or wrong") {
    Rng rng(4);
    std::vector<Conv2d<std::int64_t>> layers;
    for (const auto& layer : chain<float>()) {
      layers.push_back(small_integers<std::int64_t>(layer.shape(), rng));
    }
    const Conv2d<std::int64_t> product = contract(layers);
    const auto x = small_integers<std::int64_t, 2>({.channels = 2, .size = 5}, rng);
    FeatureMap<std::int64_t, 2> y = product(x);
    CHECK(prove_outputs(layers, product, x, y));
    y.values()[3] += 1;
    CHECK_FALSE(prove_outputs(layers, product, x, y));
  }
  SECTION("double") {
    const auto layers = chain<double>();
    const Conv2d<double> product = contract(layers);
    const FeatureMap<double, 2> x({.channels = 2, .size = 5}, std::vector<double>(50, 0.1));
    CHECK(prove_outputs(layers, product, x, Expr<double, 2>(chain(layers))(x)));
    CHECK_FALSE(prove_outputs(layers, product, x, contract(chain<float>()).cast<double>()(x)));
  }
  SECTION("subnormals") {
    const Linear<float> small({.out = 1, .in = 1}, {0x1.8p-80F});
    const std::vector<Linear<float>> layers{Linear<float>({.out = 1, .in = 1}, {0x1.8p60F}), small};
    const FeatureMap<float, 0> x({.channels = 1}, {0x1.fp-125F});
    CHECK(prove_outputs(layers, contract(layers), x, Expr<float, 0>(chain(layers))(x)));
  }
}

TEST_CASE("outputs of the layers are compared off the border, a contraction's everywhere",
          "[verify]") {
  std::mt19937_64 generator(2);
  const ConvShape<2> padded{.out = 2, .in = 2, .kernel_size = 3, .padding = 1};
  const auto layers = initialize<float>(std::vector{padded, padded}, generator);
  const Conv2d<float> product = contract(layers, interior_only);
  const FeatureMap<float, 2> x({.channels = 2, .size = 6}, std::vector<float>(72, 0.5F));
  const FeatureMap<float, 2> of_layers = Expr<float, 2>(chain(layers))(x);
  const Report report = prove_outputs(layers, product, x, of_layers);
  CHECK(report);
  CHECK(report.compared == 2 * 4 * 4);
  CHECK_FALSE(prove_outputs(layers, product, x, of_layers, ComputedBy::contraction));
  CHECK(prove_outputs(layers, product, x, product(x), ComputedBy::contraction));
  const FeatureMap<float, 2> tiny({.channels = 2, .size = 2});
  CHECK_THAT(prove_outputs(layers, product, tiny, product(tiny)).failure,
             Catch::Contains("every output is on the border"));
  CHECK_THROWS_AS(prove_outputs(layers, product, x, tiny), ShapeError);
  CHECK_THROWS_AS(prove_outputs(layers, product, FeatureMap<float, 2>({.size = 6}), of_layers),
                  ShapeError);
}

// ---- bounds that cannot be emptied --------------------------------------------------------------

namespace {

/// Layers of normally sized elements times the scales, each a power of two.
std::vector<Conv2d<float>> scaled_chain(const std::vector<float>& scales) {
  std::mt19937_64 generator(5);
  std::vector<ConvShape<2>> shapes(scales.size(), {.out = 4, .in = 4});
  shapes.front() = {.out = 4, .in = 3, .kernel_size = 3};
  shapes.back().out = 3;
  auto layers = initialize<float>(shapes, generator);
  for (std::size_t i = 0; i < layers.size(); ++i) layers[i] = scales[i] * layers[i];
  return layers;
}

/// Every proof of a wrong layer fails, or says that it cannot tell.
template <class E>
void check_refused(const E& expression, const Conv2d<float>& wrong) {
  const Report rounding = prove_rounding(expression, wrong),
               structure = prove_structure(expression, wrong);
  INFO(rounding << '\n' << structure);
  CHECK_FALSE(rounding);
  CHECK_FALSE(rounding.undecided);
  CHECK_FALSE(structure);
  CHECK_FALSE(structure.undecided);
}

}  // namespace

TEST_CASE("layers of far apart scales leave no room for another kernel", "[verify]") {
  for (const auto& scales :
       {std::vector{0x1p73F, 0x1p-73F, 0x1p73F, 0x1p-73F}, std::vector{0x1p-73F, 0x1p73F, 1.0F},
        std::vector{0x1p60F, 0x1p-50F, 1.0F}, std::vector{0x1p-60F, 0x1p-40F, 0x1p90F}}) {
    const auto layers = scaled_chain(scales);
    const Conv2d<float> right = contract(layers);
    INFO(verify(layers, right));
    CHECK(verify(layers, right));
    check_refused(layers, -1 * right);
    check_refused(layers, Conv2d<float>(right.shape()));
    FeatureMap<float, 2> x({.channels = 3, .size = 6});
    Rng rng(1);
    for (float& element : x.values()) element = static_cast<float>(random_uniform(rng, 1));
    const FeatureMap<float, 2> y = Expr<float, 2>(chain(layers))(x);
    CHECK(prove_outputs(layers, right, x, y));
    FeatureMap<float, 2> negated = y;
    for (float& element : negated.values()) element = -element;
    const Report report = prove_outputs(layers, right, x, negated);
    CHECK_FALSE(report);
    CHECK_FALSE(report.undecided);
    CHECK_FALSE(prove_outputs(layers, right, x, negated, ComputedBy::contraction));
  }
}

TEST_CASE("a dead channel of huge weights leaves the others no room", "[verify]") {
  auto layers = scaled_chain({1, 1, 1});
  const auto row = [](Conv2d<float>& layer, std::size_t channel, float value) {
    const std::size_t width = layer.weight().size() / static_cast<std::size_t>(layer.shape().out);
    std::ranges::fill(layer.weight().subspan(channel * width, width), value);
  };
  const auto column = [](Conv2d<float>& layer, std::size_t channel, float value) {
    for (std::size_t i = channel; i < layer.weight().size(); i += 4) layer.weight()[i] = value;
  };
  row(layers[0], 3, 1e25F);
  column(layers[1], 3, 0);
  row(layers[1], 3, 1e25F);
  layers[1].weight()[15] = 0;
  column(layers[2], 3, 0);
  const Conv2d<float> right = contract(layers);
  CHECK(verify(layers, right));
  Conv2d<float> flipped = right;
  for (float& element : flipped.weight().first(27)) element = -element;
  check_refused(layers, flipped);
}

TEST_CASE("where all that an element is made of may have underflowed, nothing is proved",
          "[verify]") {
  // In one order of the chain the two in the middle make 0.
  const auto layers = scaled_chain({0x1p100F, 0x1p-100F, 0x1p-100F, 0x1p100F});
  Conv2d<float> right = contract<double>(layers);
  right.weight()[0] = next_up(right.weight()[0]);
  for (const Report& report : {prove_rounding(layers, right), prove_rounding(layers, -1 * right),
                               prove_structure(layers, -1 * right)}) {
    CHECK_FALSE(report);
    CHECK(report.undecided);
    std::ostringstream text;
    text << report;
    CHECK_THAT(text.str(), Catch::Contains("not proved: the bound of "));
  }
  CHECK(prove_rounding<double>(layers, contract<double>(layers)));
}

TEST_CASE("subnormal elements are judged by what their format resolves", "[verify]") {
  auto layers = scaled_chain({1, 1, 1});
  std::ranges::fill(layers[2].weight().first(4), 0x1p-148F);  // one output channel has died
  const Conv2d<float> right = contract(layers);
  CHECK(verify(layers, right));
  Conv2d<float> wrong = right;
  wrong.weight()[0] += 0x1p-100F;
  CHECK_FALSE(prove_rounding(layers, wrong));

  const Linear<float> tiny({.out = 1, .in = 1}, {0x1p-148F}), half({.out = 1, .in = 1}, {0.5F});
  const std::vector<Linear<float>> all_tiny{tiny, half};
  const Report report = prove_rounding(all_tiny, Linear<float>({.out = 1, .in = 1}, {-0x1p-149F}));
  CHECK_FALSE(report);
  CHECK(report.undecided);
  CHECK(prove_rounding(all_tiny, contract(all_tiny)));
}

TEST_CASE("where a single bound exceeds its element, the others do not speak for it", "[verify]") {
  // Exactly [1 0; 0 1]; sums in float may be off by more than 1.
  const Linear<float> a({.out = 3, .in = 2}, {1e7F + 1, 0, 1e7F, 0, 0, 1}),
      b({.out = 2, .in = 3}, {1, -1, 0, 0, 0, 1});
  CHECK(verify(b * a, contract(b * a)));
  CHECK(verify(b * a, Linear<float>({.out = 2, .in = 2}, {1 - 0x1p-12F, 0, 0, 1})));
  for (const float wrong : {-1.0F, 0.0F, 0.5F, 0.9375F, 1 - 0x1p-11F}) {
    const Linear<float> layer({.out = 2, .in = 2}, {wrong, 0, 0, 1});
    for (const Report& report : {prove_rounding(b * a, layer), prove_structure(b * a, layer)}) {
      CHECK_FALSE(report);
      CHECK(report.undecided);
    }
    CHECK_FALSE(prove_rounding<double>(b * a, layer).undecided);
    CHECK_FALSE(prove_rounding<double>(b * a, layer));
  }
  // What cancels to nothing beside the others does not matter.
  const Linear<double> c({.out = 2, .in = 2}, {0.1, 1, 0.3, 1}), d({.out = 1, .in = 2}, {3, -1});
  Linear<double> zero = contract(d * c);
  REQUIRE(std::abs(zero.weight()[0]) < 1e-16);
  zero.weight()[0] = 0x1p-55;
  CHECK(verify(d * c, zero));
}

TEST_CASE("contractions that are zero are right", "[verify]") {
  const auto layers = chain<float>();
  const Conv2d<float> product = contract(layers);
  CHECK(prove_rounding(product - product, Conv2d<float>(product.shape())));
  CHECK(verify(0.0F * product, Conv2d<float>(product.shape())));
  CHECK_FALSE(prove_rounding(0.0F * product, product));
}

TEST_CASE("an element that no output reads changes nothing", "[verify]") {
  std::mt19937_64 generator(7);
  const auto layers = initialize<float>(
      std::vector<ConvShape<2>>{{.out = 3, .in = 3, .stride = 2}, {.out = 2, .in = 3}}, generator);
  const Conv2d<float> product = contract(layers);
  for (const float unread : {0.0F, 1e38F, std::numeric_limits<float>::infinity(),
                             std::numeric_limits<float>::quiet_NaN()}) {
    FeatureMap<float, 2> x({.channels = 3, .size = 5}, std::vector<float>(75, 0.5F));
    x.values()[1] = unread;
    const FeatureMap<float, 2> y = Expr<float, 2>(chain(layers))(x);
    for (const ComputedBy by : {ComputedBy::layers, ComputedBy::contraction}) {
      INFO(prove_outputs(layers, product, x, y, by));
      CHECK(prove_outputs(layers, product, x, y, by));
      FeatureMap<float, 2> negated = y;
      for (float& element : negated.values()) element = -element;
      CHECK_FALSE(prove_outputs(layers, product, x, negated, by));
    }
    x.values()[0] = unread;
    CHECK(bool(prove_outputs(layers, product, x, Expr<float, 2>(chain(layers))(x))) ==
          std::isfinite(unread));
  }
}

TEST_CASE("outputs stored in 16 bits are held to their own rounding", "[verify]") {
  const auto check = [](auto stored, float scale) {
    using Stored = decltype(stored);
    const auto layers = scaled_chain({4, 4, 4});
    const Conv2d<float> product = contract(layers);
    FeatureMap<float, 2> x({.channels = 3, .size = 6});
    Rng rng(3);
    for (float& element : x.values()) element = scale * static_cast<float>(random_uniform(rng, 1));
    const FeatureMap<float, 2> y = Expr<float, 2>(chain(layers))(x);
    const auto given = [&](float factor, float shift) {
      FeatureMap<Stored, 2> map(y.shape());
      for (std::size_t i = 0; i < y.values().size(); ++i) {
        map.values()[i] = convert<Stored>(factor * y.values()[i] + shift);
      }
      return map;
    };
    float mean = 0;
    for (const float element : y.values()) mean += std::abs(element);
    mean /= static_cast<float>(y.values().size());
    INFO(prove_outputs(layers, product, x, given(1, 0)));
    CHECK(prove_outputs(layers, product, x, given(1, 0)));
    for (const auto& wrong : {given(-1, 0), given(1, mean / 10), given(0, 0), given(1.2F, 0)}) {
      CHECK_FALSE(prove_outputs(layers, product, x, wrong));
      CHECK_FALSE(prove_outputs(layers, product, x, wrong, ComputedBy::contraction));
    }
  };
  for (const float scale : {1.0F, 0x1p-8F, 0x1p6F}) {
    check(Eigen::half(), scale);
    check(Eigen::bfloat16(), scale);
  }
}

TEST_CASE("nothing compared is nothing proved", "[verify]") {
  const auto layers = chain<float>();
  const Conv2d<float> product = contract(layers);
  const FeatureMap<float, 2> none({.batch = 0, .channels = 2, .size = 5});
  const Report report = prove_outputs(layers, product, none, product(none));
  CHECK_FALSE(report);
  CHECK_THAT(report.failure, Catch::Contains("batch is empty"));
}

// ---- transposed layers
// ---------------------------------------------------------------------------

namespace {

/// A layer after two transposed ones with one between them, and what joins them.
template <class Scalar>
struct Upsampling {
  explicit Upsampling(Rng& rng) {
    const auto fill = [&](auto numbers) {
      for (auto& number : numbers) {
        number = std::is_integral_v<Scalar> ? static_cast<Scalar>(random_index(rng, -4, 4))
                                            : static_cast<Scalar>(random_uniform(rng, 1));
      }
    };
    for (Conv2d<Scalar>* layer : {&first, &second, &before, &after}) {
      fill(layer->weight());
      fill(layer->bias());
    }
    fill(std::span(bias));
  }

  TransposedExpr<Scalar, 2> expression() const {
    return after * transposed(second, bias, {1, 0}) * transposed(first) * before;
  }

  Conv2d<Scalar> first{{.out = 4, .in = 2, .kernel_size = {2, 3}, .stride = {2, 3}, .groups = 2}},
      second{{.out = 2, .in = 3, .kernel_size = 2, .stride = {2, 1}, .dilation = {1, 2}}},
      before{{.out = 4, .in = 3, .kernel_size = {1, 3}, .padding = {0, 2}}},
      after{{.out = 2, .in = 3, .bias = true}};
  std::vector<Scalar> bias = std::vector<Scalar>(3);
};

}  // namespace

TEST_CASE("all proofs hold for products with transposed layers, and a wrong element fails them",
          "[verify]") {
  Rng rng(10);
  const Upsampling<float> floats(rng);
  const auto expression = floats.expression();
  CHECK(verify(expression, contract(expression)));
  const Transposed<float, 2> right = contract<double>(expression);
  const Verification found = verify<double>(expression, right);
  CHECK(found);
  CHECK(found.rounding.ulps <= 0.5001L);
  const PerAxis<2> size = smallest_input(expression);
  const Upsampling<std::int64_t> integers(rng);
  const auto exact = integers.expression();
  const Transposed<std::int64_t, 2> whole = contract(exact);
  CHECK(verify(exact, whole));
  for (std::size_t i = 0; i < right.layer().weight().size() + right.bias().size(); ++i) {
    const auto wrong = [&](const auto& adjoint, auto&& change) {
      auto layer = adjoint.layer();
      std::vector bias(adjoint.bias().begin(), adjoint.bias().end());
      const std::size_t weights = layer.weight().size();
      auto& element = i < weights ? layer.weight()[i] : bias[i - weights];
      element = change(element);
      return transposed(layer, bias);
    };
    const auto off = wrong(right, [](float x) { return next_up(next_up(x)); });
    CHECK_FALSE(prove_rounding<double>(expression, off));
    CHECK_FALSE(prove_structure<double>(expression, off, {.input_size = size}));
    const auto off_by_one = wrong(whole, [](std::int64_t x) { return x + 1; });
    CHECK_FALSE(prove_rounding(exact, off_by_one));
    CHECK_FALSE(prove_structure(exact, off_by_one, {.input_size = size}));
  }
  const Transposed<float, 2> moved = transposed(right.layer(), {0, 0}, {1, 0});
  CHECK_THAT(prove_algebra(expression, moved).failure, Catch::Contains("output sizes differ"));
  ConvShape<2> shape = right.layer().shape();
  shape.stride[0] = 5;
  const auto slower = transposed(ConvView<const float, 2>(shape, right.layer().weight()), {0, 0});
  for (const Report& report :
       {prove_algebra(expression, slower), prove_rounding(expression, slower),
        prove_structure(expression, slower, {.input_size = size})}) {
    CHECK_THAT(report.failure, Catch::Contains("strides differ"));
  }
  CHECK(verify(transposed(floats.first), transposed(floats.first)));
}

TEST_CASE("zeros between the positions are not looked at, nor the border of a product",
          "[verify]") {
  // The flipped kernel pads, and reads beyond the map before it where only zeros stand between.
  const Conv1d<float> before({.out = 1, .in = 1, .kernel_size = 3, .padding = 1}, {1, 2, 3}),
      up({.out = 1, .in = 1, .kernel_size = 3, .stride = 2, .padding = 1}, {4, 5, 6}),
      after({.out = 1, .in = 1, .kernel_size = 3, .padding = 1}, {7, 8, 9});
  const auto exact = transposed(up) * before;
  CHECK(exactness(exact));
  CHECK_FALSE(exactness(exact.dense()));
  const Transposed<float, 1> whole = contract(exact);
  CHECK(verify(exact, whole));
  CHECK(prove_algebra(exact, whole, {.input_size = PerAxis<1>(4)}).compared == 7);
  const FeatureMap<float, 1> x({.size = 4}, {1, 2, 3, 4});
  CHECK(prove_outputs(exact, whole, x, whole(x)).compared == 7);
  Index entries = 1;  // of the matrix; the last row is [0 1]
  for (std::size_t i = 0; i < 4; ++i) {
    FeatureMap<float, 1> unit({.size = 4});
    unit.values()[i] = 1;
    entries += std::ranges::count_if(whole(unit).values(), [](float y) { return y != 0; });
  }
  CHECK(prove_structure(exact, whole, {.input_size = PerAxis<1>(4)}).compared == entries);
  const auto bordered = after * exact;
  const Transposed<float, 1> product = contract(bordered, interior_only);
  CHECK_FALSE(exactness(bordered));
  CHECK(verify(bordered, product));
  CHECK_THAT(prove_algebra(bordered, product, {.input_size = PerAxis<1>(1)}).failure,
             Catch::Contains("border"));
}

TEST_CASE("the smallest input of a transposed layer shows every tap", "[verify]") {
  // Two elements of which only the last and the first tap reach the map that the crop leaves.
  const Conv1d<float> cropped({.out = 1, .in = 1, .kernel_size = 3, .stride = 3, .padding = 2});
  CHECK(smallest_input(TransposedExpr<float, 1>(transposed(cropped))) == PerAxis<1>(3));
  const Conv1d<float> plain({.out = 1, .in = 1, .kernel_size = 3, .stride = 3});
  CHECK(smallest_input(TransposedExpr<float, 1>(transposed(plain))) == PerAxis<1>(1));
}

TEST_CASE("outputs of transposed layers are judged as those of others", "[verify]") {
  Rng rng(11);
  const Upsampling<float> layers(rng);
  const auto expression = layers.expression();
  const Transposed<float, 2> product = contract(expression);
  FeatureMap<float, 2> x({.batch = 2, .channels = 3, .size = {2, 3}});
  for (float& element : x.values()) element = static_cast<float>(random_uniform(rng, 1));
  FeatureMap<float, 2> y = layers.after(
      transposed(layers.second, layers.bias, {1, 0})(transposed(layers.first)(layers.before(x))));
  const Report right = prove_outputs(expression, product, x, y);
  CHECK(right);
  CHECK(right.compared == std::ssize(y.values()));
  CHECK(prove_outputs(expression, product, x, product(x), ComputedBy::contraction));
  y.values()[5] += 1e-3F;
  CHECK_FALSE(prove_outputs(expression, product, x, y));
}

// ---- branches that agree at some sizes only -----------------------------------------------------

TEST_CASE("branches that agree at even sizes only are proved at one", "[verify]") {
  Rng rng(12);
  const auto square = small_integers<float, 2>(
      {.out = 3, .in = 2, .kernel_size = 2, .stride = 2, .bias = true}, rng);
  const auto point = small_integers<float, 2>({.out = 3, .in = 2, .stride = 2}, rng);
  const auto after = small_integers<float, 2>({.out = 2, .in = 3, .kernel_size = 2}, rng);
  const auto branches = after * (square + point);
  const PerAxis<2> size{6, 8};
  const Conv2d<float> product = contract(branches, exact_at(6, 8));
  CHECK(exactness(branches, size));
  CHECK_THROWS_AS(verify(branches, product), ShapeError);
  CHECK_THROWS_AS(prove_rounding(branches, product), ShapeError);
  const Verification found = verify(branches, product, {.input_size = size});
  CHECK(found);
  CHECK(found.structure.compared > 0);
  CHECK(prove_algebra(branches, product, {.input_size = size}));
  CHECK(prove_structure(branches, product, {.input_size = size}));
  const PerAxis<2> smallest = smallest_input(Form(branches), size);
  CHECK(smallest == PerAxis<2>(4));
  CHECK(contract(after * (point + square), exact_at(6, 8)).shape() == product.shape());
  CHECK(smallest_input(Form(branches), PerAxis<2>{100, 102}) == smallest);
  const auto x = small_integers<float, 2>({.channels = 2, .size = size}, rng);
  CHECK(prove_outputs(branches, product, x, Expr<float, 2>(branches)(x)));
  Conv2d<float> wrong = product;
  wrong.weight()[3] += 1;
  CHECK_FALSE(prove_rounding(branches, wrong, {.input_size = size}));
  CHECK_FALSE(prove_structure(branches, wrong, {.input_size = smallest}));
  CHECK_FALSE(prove_outputs(branches, wrong, x, Expr<float, 2>(branches)(x)));
  CHECK_THROWS_AS(verify(branches, product, {.input_size = PerAxis<2>(7)}), ShapeError);
}

TEST_CASE("space to depth and a 3x3 are a 6x6 of stride 2 at even sizes", "[verify]") {
  Rng rng(13);
  std::vector<Conv2d<std::int64_t>> slices;
  for (const PerAxis<2>& at : {PerAxis<2>{0, 0}, {1, 0}, {0, 1}, {1, 1}}) {
    const PerAxis<2> crop{-at[0], -at[1]};
    slices.push_back(Conv2d<std::int64_t>(
        {.out = 2, .in = 2, .stride = 2, .padding = Padding<2>::sides(crop, 0)}, {1, 0, 0, 1}));
  }
  const auto square = small_integers<std::int64_t, 2>(
      {.out = 3, .in = 8, .kernel_size = 3, .padding = 1, .bias = true}, rng);
  const auto focus = square * concat_outputs(slices);
  const Conv2d<std::int64_t> product = contract(focus, exact_at(8, 6));
  CHECK(product.shape() ==
        ConvShape<2>{.out = 3, .in = 2, .kernel_size = 6, .stride = 2, .padding = 2, .bias = true});
  CHECK(verify(focus, product, {.input_size = PerAxis<2>{8, 6}}));
  const auto x = small_integers<std::int64_t, 2>({.channels = 2, .size = {8, 6}}, rng);
  CHECK(product(x) == focus(x));
}

TEST_CASE("where cancellation leaves less than the bound, nothing is proved", "[verify]") {
  // 1/3 * 3 - 1/3 * 3 + 2^-60: gone in float, kept in double.
  const float third = 1.0F / 3;
  const Linear<float> outer({.out = 1, .in = 3}, {third, -third, 0x1p-30F});
  const Linear<float> inner({.out = 3, .in = 1}, {3.0F, next_up(3.0F), 0x1p-30F});
  const std::vector<Linear<float>> layers{inner, outer};
  const Report plain = prove_rounding(layers, contract(layers));
  CHECK(plain.undecided);
  CHECK(plain.error <= plain.bound);
  CHECK_FALSE(plain);  // the negated layer is as near
  CHECK(prove_rounding<double>(layers, contract<double>(layers)));
}

TEST_CASE("an element that cancellation lost is judged beside its own channel", "[verify]") {
  // A row of 1e4 and one of half, what cancellation leaves of 64 times 1e4: float sums might make
  // anything of it.
  constexpr Index terms = 65;
  const auto chain = [](float left) {
    Linear<float> inner({.out = terms, .in = 1}), outer({.out = 2, .in = terms});
    std::ranges::fill(inner.weight(), 1.0F);
    outer.weight()[0] = 1e4F;
    const std::span<float> row = outer.weight().last(terms);
    for (std::size_t i = 0; i < terms; ++i) row[i] = i % 2 ? -1e4F : 1e4F;
    row.back() = left;
    return std::vector<Linear<float>>{inner, outer};
  };
  const auto negated = [](Linear<float> layer) {
    layer.weight()[1] = -layer.weight()[1];
    return layer;
  };
  const auto layers = chain(0.5F);
  const Linear<float> right = contract<double>(layers);
  CHECK(right.weight()[1] == 0.5F);
  CHECK(prove_rounding(layers, right));
  CHECK(prove_rounding(layers, negated(right)).undecided);
  CHECK(prove_structure(layers, negated(right)).undecided);
  Linear<float> half_more = right;
  half_more.weight()[1] *= 1.5F;
  CHECK(prove_rounding(layers, half_more).undecided);
  CHECK_FALSE(prove_rounding<double>(layers, negated(right)));

  // An identity of layers that cancel each other makes the bound as wide as one likes.
  const auto inflated = [](float factor, float large) {
    return std::vector<Linear<float>>{Linear<float>({.out = 1, .in = 1}, {factor}),
                                      Linear<float>({.out = 2, .in = 1}, {large, large - 1}),
                                      Linear<float>({.out = 1, .in = 2}, {1, -1})};
  };
  const Linear<float> one({.out = 1, .in = 1}, {1});
  for (const float large : {1e5F, 3e5F, 1e7F}) {
    CHECK(prove_rounding(inflated(1, large), one));
    for (const float factor : {0.8F, 0.9F, 1.1F, -1.0F}) {
      CHECK_FALSE(prove_rounding(inflated(factor, large), one));
      CHECK_FALSE(prove_structure(inflated(factor, large), one));
      CHECK_FALSE(prove_rounding<double>(inflated(factor, large), one));
    }
  }

  // What is left within an ulp of its terms might as well be zero.
  const auto zero = chain(0x1p-10F);
  CHECK(prove_rounding(zero, contract(zero)));
  CHECK(prove_rounding(zero, negated(contract(zero))));
}

TEST_CASE("products that underflow stay within the bound", "[verify]") {
  const Linear<float> small({.out = 2, .in = 2}, {0x1p-80F, 0x1.8p-75F, 0x1p70F, 0x1p73F});
  const Linear<float> tiny({.out = 2, .in = 1}, {0x1.fp-72F, 0x1.2p-73F});
  const Linear<float> large({.out = 2, .in = 2, .groups = 2}, {0x1p20F, 1.0F});
  const std::vector<Linear<float>> layers{tiny, small, large};
  const Linear<float> right = contract(layers);
  CHECK(prove_rounding(layers, right).error > 0);
  CHECK(prove_rounding(layers, right));
  const std::vector<Linear<float>> underflowed{
      tiny, Linear<float>({.out = 1, .in = 2}, {0x1p-80F, 0x1.8p-75F}),
      Linear<float>({.out = 1, .in = 1}, {0x1p20F})};
  CHECK(prove_rounding(underflowed, contract(underflowed)).undecided);
  CHECK(prove_rounding<double>(layers, contract<double>(layers)));
}

TEST_CASE("underflow stays within the bound through norms, sums and concatenations", "[verify]") {
  int underflowed = 0, proved = 0;
  for (std::uint64_t seed = 0; seed < 100; ++seed) {
    Rng rng(seed);
    // Around a power of two: b * a may underflow, the norm's factor of 2^20 to 2^75 lifts it again.
    const auto fill = [&](auto&& elements, int least, int most) {
      const int scale = least + static_cast<int>(rng() % static_cast<unsigned>(most - least + 1));
      for (float& element : elements) {
        const auto size = static_cast<float>(1 + random_uniform(rng, 0.9));
        element = std::ldexp(rng() % 2 ? size : -size, scale + static_cast<int>(rng() % 4));
      }
    };
    const auto layer = [&](const ConvShape<0>& shape, int least, int most) {
      Linear<float> filled(shape);
      fill(filled.weight(), least, most);
      fill(filled.bias(), least, most);
      return filled;
    };
    // b * a is the cheaper product, so it comes first. Beside a bias an output's underflow is
    // nothing.
    const bool bias = seed % 2;
    const Linear<float> a = layer({.out = 2, .in = 1, .bias = bias}, -90, -50),
                        b = layer({.out = 2, .in = 2, .bias = bias}, -80, -40),
                        c = layer({.out = 3, .in = 2}, -20, 20);
    BatchNorm<float> norm{{0, 0}, {0, 0}, {0, 0}, {0, 0}, 0};
    fill(norm.weight, 20, 60);
    fill(norm.running_var, -30, 0);
    if (bias) fill(norm.running_mean, -90, -40);
    if (bias) fill(norm.bias, -90, -40);
    for (float& variance : norm.running_var) variance = std::abs(variance);
    const Expr<float, 0> lifted = batch_norm(norm) * b * a;
    FeatureMap<float, 0> x({.batch = 2, .channels = 1});
    fill(x.values(), -30, 0);
    using List = std::vector<Expr<float, 0>>;
    for (const Expr<float, 0>& expression :
         List{channel_scale<float>({3, 5}) * lifted, lifted + a, c * (lifted + a),
              concat_outputs(List{lifted, batch_norm(norm) * a}),
              concat_inputs(List{c, c}) * concat_outputs(List{lifted, a})}) {
      const Linear<float> right = contract(expression), exact = contract<double>(expression);
      bool lost = false;  // more than rounding explains
      for (std::size_t i = 0; i < right.weight().size(); ++i) {
        const float off = std::abs(right.weight()[i] - exact.weight()[i]);
        lost = lost || off > 0x1p-15F * std::abs(exact.weight()[i]);
      }
      const Report rounding = prove_rounding(expression, right);
      INFO(seed << ": " << expression << '\n' << rounding);
      CHECK((rounding || rounding.undecided));
      underflowed += lost;
      proved += lost && rounding;
      CHECK_FALSE(prove_rounding(expression, -1 * right));
      const Report of_layers = prove_outputs(expression, right, x, expression(x)),
                   of_contraction =
                       prove_outputs(expression, right, x, right(x), ComputedBy::contraction);
      INFO(of_layers << '\n' << of_contraction);
      CHECK((of_layers || of_layers.undecided));
      CHECK((of_contraction || of_contraction.undecided));
    }
  }
  INFO(underflowed << " with underflow, of which " << proved << " are proved");
  CHECK(underflowed >= 50);
  CHECK(proved >= 20);
}

TEST_CASE("the bound is refused where it bounds nothing", "[verify]") {
  CHECK_THROWS_AS(detail::gamma(Index{1} << 24, detail::unit_roundoff<float>()), VerificationError);
  CHECK(detail::gamma(10, 0.01L) == Approx(0.1 / 0.9));
  const std::vector<ConvShape<0>> long_chain(2047, {.out = 1, .in = 1});
  std::vector<Linear<float>> layers(long_chain.begin(), long_chain.end());
  CHECK_THROWS_AS(prove_algebra(layers, layers.front()), VerificationError);
}

TEST_CASE("terms count the roundings of any order", "[verify]") {
  // 1x1, 3x3, 1x1 of widths 2, 8, 12, 3: sums of 8 channels and of 12, one tap pair each.
  CHECK(detail::terms(Form(chain<float>()).tree()).weight == 8 + 12);
  const ConvShape<2> kernel{.out = 5, .in = 5, .kernel_size = 3};
  CHECK(detail::terms(Form(std::vector{kernel, kernel}).tree()).weight == 5 * 9);
  CHECK(detail::terms(Form(std::vector{kernel, kernel}).tree()).bias == 5 * 9 + 5 * 9 + 1);
}

TEST_CASE("biases may be summed one after another over channels and taps", "[verify]") {
  std::vector<Conv<float, 2>> layers = {
      Conv<float, 2>({.out = 32, .in = 1, .bias = true}),
      Conv<float, 2>({.out = 1, .in = 32, .kernel_size = 7}),
  };
  for (auto& layer : layers) std::ranges::fill(layer.weight(), 1.0F);
  // Just below half a unit in the last place of sums from 1024 on, which all are rounded down.
  const float term = 1 + 0x1p-14F - 0x1p-23F;
  std::ranges::fill(layers[0].bias(), term);
  auto contraction = contract(layers);
  float sum = 0;
  for (int i = 0; i < 32 * 7 * 7; ++i) sum += term;
  CHECK(std::abs(sum - 1568 * static_cast<double>(term)) > 0.03);
  contraction.bias()[0] = sum;
  CHECK(prove_rounding(layers, contraction));
  contraction.bias()[0] = 1.001F * sum;
  CHECK_FALSE(prove_rounding(layers, contraction));
}

TEST_CASE("the smallest input shows every tap and an output off the border", "[verify]") {
  const ConvShape<1> strided{.out = 1, .in = 1, .kernel_size = 1, .stride = 3, .padding = 1};
  CHECK(smallest_input(Form(strided)) == PerAxis<1>(3));
  const ConvShape<1> plain{.out = 1, .in = 1, .kernel_size = 3, .padding = 1};
  CHECK(smallest_input(Form(plain)) == PerAxis<1>(2));
  CHECK(smallest_input(Form(std::vector{plain, plain})) == PerAxis<1>(3));
}

TEST_CASE("matrices that would not fit are refused", "[verify]") {
  const auto layers = chain<float>();
  CHECK_THROWS_AS(prove_structure(layers, contract(layers),
                                  {.input_size = PerAxis<2>(64), .limit = {.bytes = 1 << 16}}),
                  SizeError);
}

// ---- structure on a sample of rows --------------------------------------------------------------

TEST_CASE("a sample of as many rows as there are is all of them", "[verify]") {
  const auto layers = chain<float>();
  const Conv2d<float> product = contract(layers);
  const PerAxis<2> size{9, 9};
  const Report whole = prove_structure(layers, product, {.input_size = size});
  const Index rows = product.shape().out * numel(output_size(product.shape(), size));
  for (const Index more : {Index(0), Index(1)}) {
    const Report report =
        prove_structure(layers, product, {.input_size = size, .sample = {.rows = rows + more}});
    CHECK(report);
    CHECK(report.compared == whole.compared);
    CHECK(report.sampled == 0);
    CHECK(report.missable(1e-6L) == 0);
  }
  const Report most =
      prove_structure(layers, product, {.input_size = size, .sample = {.rows = rows - 1}});
  CHECK(most.sampled == rows - 1);
  CHECK(most.rows == rows);
  CHECK(most.compared < whole.compared);
}

TEST_CASE("a sample's rows are those of the product, of every kind of expression", "[verify]") {
  Rng rng(21);
  const auto layer = [&](ConvShape<2> shape) {
    return Expr<std::int64_t, 2>(small_integers<std::int64_t, 2>(shape, rng));
  };
  const auto a = layer({.out = 3, .in = 2, .kernel_size = 3, .padding = 1, .bias = true}),
             b = layer({.out = 3, .in = 2, .bias = true}),
             c = layer({.out = 2, .in = 3, .kernel_size = 2, .stride = 2, .bias = true}),
             d = layer({.out = 4, .in = 6, .groups = 2, .bias = true});
  for (const auto& expression :
       {c * a, a + b, c * (a + b), d * concat_outputs(std::vector{a, b}), c * (a + b + a),
        concat_inputs(std::vector{c, c}) * concat_outputs(std::vector{a, a + b}),
        direct_sum(std::vector{a, b}), d * direct_sum(std::vector{a, a})}) {
    const Form<2> form(expression);
    INFO(form.shape(PerAxis<2>{8, 8}));
    const auto right = contract(expression, Border<2>{.interior_only = true});
    const PerAxis<2> size{8, 8};
    for (std::uint64_t seed = 0; seed < 20; ++seed) {
      CHECK(prove_structure(expression, right,
                            {.input_size = size, .sample = {.rows = 7, .seed = seed}}));
    }
    for (std::size_t i = 0; i < right.weight().size();
         i += 5) {  // wrong in all of a channel's rows
      auto wrong = right;
      wrong.weight()[i] += 1;
      const Index rows =
          prove_structure(expression, right, {.input_size = size, .sample = {.rows = 1}}).rows;
      CHECK_FALSE(
          prove_structure(expression, wrong, {.input_size = size, .sample = {.rows = rows - 1}}));
    }
  }
}

TEST_CASE("a wrong row is missed as often as is stated", "[verify]") {
  constexpr Index rows = 20, sampled = 3, wrong_rows = 4;
  constexpr int runs = 4000;
  Rng rng(22);
  const std::vector layers{small_integers<std::int64_t, 0>({.out = 5, .in = 2}, rng),
                           small_integers<std::int64_t, 0>({.out = rows, .in = 5}, rng)};
  Conv<std::int64_t, 0> wrong = contract(layers);
  for (Index row = 0; row < wrong_rows; ++row)
    wrong.weight()[static_cast<std::size_t>(10 * row)] += 1;
  int missed = 0;
  for (int run = 0; run < runs; ++run) {
    const Report report = prove_structure(
        layers, wrong, {.sample = {.rows = sampled, .seed = static_cast<std::uint64_t>(run)}});
    CHECK(report.sampled == sampled);
    CHECK(report.rows == rows);
    missed += bool(report);
  }
  // Of 20 rows three right ones, without putting one back; within five standard deviations.
  const double exact = (16.0 * 15 * 14) / (20.0 * 19 * 18), stated = std::pow(1 - 0.2, 3);
  const double five = 5 * std::sqrt(exact * (1 - exact) / runs);
  CHECK(std::abs(double(missed) / runs - exact) < five);
  CHECK(exact < stated);
  const Report report = prove_structure(layers, contract(layers), {.sample = {.rows = sampled}});
  CHECK(std::abs(double(report.missable(stated)) - 0.2) < 1e-12);
}

TEST_CASE("a sample of rows fits where the matrices do not", "[verify]") {
  const auto layers = chain<float>();
  const Conv2d<float> product = contract(layers);
  constexpr MemoryLimit limit{.bytes = 1 << 20};
  CHECK_THROWS_AS(prove_structure(layers, product, {.input_size = PerAxis<2>(64), .limit = limit}),
                  SizeError);
  CHECK(prove_structure(layers, product,
                        {.input_size = PerAxis<2>(64), .limit = limit, .sample = {.rows = 5}}));
  CHECK_THROWS_AS(
      prove_structure(layers, product,
                      {.input_size = PerAxis<2>(64), .limit = limit, .sample = {.rows = 3000}}),
      SizeError);
}

TEST_CASE("reports print on a line", "[verify]") {
  const auto layers = chain<float>();
  Conv2d<float> wrong = contract(layers);
  wrong.weight()[4] += 1;
  std::ostringstream good, bad;
  good << prove_rounding(layers, contract(layers));
  bad << prove_rounding(layers, wrong);
  CHECK_THAT(good.str(), Catch::StartsWith("rounding: holds for 57 elements; worst "));
  CHECK_THAT(bad.str(),
             Catch::StartsWith("rounding: FAILS: weight[0][0] at offset 0x0 exceeds its bound"));
  std::ostringstream sample;
  sample << prove_structure(layers, contract(layers),
                            {.input_size = PerAxis<2>(9), .sample = {.rows = 10}});
  CHECK_THAT(
      sample.str(),
      Catch::Contains(
          "; sampled 10 of 75 rows: were a share of 0.749 of them wrong, that is missed with "
          "probability at most 1e-06"));
}

}  // namespace concertina::test
