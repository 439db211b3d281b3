// Batch norms in inference: the definition in plain loops, one rounding, and what is refused.
// SPDX-License-Identifier: Apache-2.0
#include <concertina/batch_norm.hpp>

#include <concertina/contract.hpp>
#include <concertina/detail/verify/rounding.hpp>
#include <concertina/random.hpp>
#include <concertina/verify.hpp>

#include "support.hpp"

#include <catch2/catch.hpp>

#include <cmath>
#include <limits>

namespace concertina::test {
namespace {

using Catch::Contains;

template <class Scalar>
BatchNorm<Scalar> random_batch_norm(Index channels, Rng& rng, double eps = 1e-3) {
  BatchNorm<Scalar> norm{.running_mean = {}, .running_var = {}, .eps = eps};
  for (Index c = 0; c < channels; ++c) {
    norm.running_mean.push_back(static_cast<Scalar>(random_uniform(rng, 1)));
    norm.running_var.push_back(static_cast<Scalar>(1.1 + random_uniform(rng, 1)));
    norm.weight.push_back(static_cast<Scalar>(random_uniform(rng, 2)));
    norm.bias.push_back(static_cast<Scalar>(random_uniform(rng, 1)));
  }
  return norm;
}

template <class Scalar, int Rank>
FeatureMap<Scalar, Rank> random_map(Index channels, Rng& rng) {
  FeatureMap<Scalar, Rank> x({.batch = 2, .channels = channels, .size = 5});
  for (Scalar& number : x.values()) number = static_cast<Scalar>(random_uniform(rng, 1));
  return x;
}

}  // namespace

TEMPLATE_TEST_CASE_SIG("a batch norm is what its definition says", "[batch_norm]",
                       ((int Rank), Rank), 0, 1, 2, 3) {
  Rng rng(1);
  const Index channels = 5;
  const auto norm = random_batch_norm<double>(channels, rng);
  const auto x = random_map<double, Rank>(channels, rng);
  const Conv<double, Rank> layer = Expr<double, Rank>(batch_norm(norm));
  CHECK(layer.shape() == ConvShape<Rank>{.out = 5, .in = 5, .groups = 5, .bias = true});
  const auto expected = each_channel(x, [&](double number, std::size_t c) {
    return (number - norm.running_mean[c]) / std::sqrt(norm.running_var[c] + norm.eps) *
               norm.weight[c] +
           norm.bias[c];
  });
  const auto y = layer(x);
  for (std::size_t i = 0; i < y.values().size(); ++i) {
    // A dozen roundings of numbers below 16.
    REQUIRE(std::abs(y.values()[i] - expected.values()[i]) < 12 * 16 * 0x1p-53);
  }
}

TEST_CASE("a batch norm without factors, and one without an eps", "[batch_norm]") {
  const Conv2d<float> plain =
      Expr<float, 2>(batch_norm<float>({.running_mean = {1, 2}, .running_var = {4, 16}, .eps = 0}));
  CHECK(plain.weight()[0] == 0.5F);
  CHECK(plain.weight()[1] == 0.25F);
  CHECK(plain.bias()[0] == -0.5F);
  CHECK(plain.bias()[1] == -0.5F);
  const Conv2d<float> zero_variance =
      Expr<float, 2>(batch_norm<float>({.running_mean = {0}, .running_var = {0}, .eps = 0.25}));
  CHECK(zero_variance.weight()[0] == 2.0F);
}

TEST_CASE("a batch norm that divides by nothing is refused, naming the channel", "[batch_norm]") {
  const auto refused = [](float variance, double eps) {
    return message_of<NumericalError>([&] {
      batch_norm<float>({.running_mean = {0, 0}, .running_var = {1, variance}, .eps = eps});
    });
  };
  constexpr float infinity = std::numeric_limits<float>::infinity();
  CHECK_THAT(refused(0, 0), Contains("running_var[1] + eps = 0 + 0"));
  CHECK_THAT(refused(-1, 1e-5), Contains("running_var[1]") && Contains("not positive"));
  CHECK_THAT(refused(infinity, 1e-5), Contains("inf"));
  CHECK_THAT(refused(std::numeric_limits<float>::quiet_NaN(), 1e-5), Contains("nan"));
  const double nan = std::numeric_limits<double>::quiet_NaN();
  CHECK_THROWS_AS(batch_norm<float>({.running_mean = {0}, .running_var = {1}, .eps = nan}),
                  NumericalError);
  CHECK_THAT(message_of<ShapeError>(
                 [] { batch_norm<float>({.running_mean = {0, 0}, .running_var = {1}}); }),
             Contains("running_var has 1 elements, running_mean 2"));
  CHECK_THROWS_AS(batch_norm<float>({.running_mean = {0}, .running_var = {1}, .weight = {1, 2}}),
                  ShapeError);
  CHECK_THROWS_AS(batch_norm<float>({.running_mean = {0}, .running_var = {1}, .bias = {1, 2}}),
                  ShapeError);
  CHECK_THROWS_AS(batch_norm<float>({.running_mean = {}, .running_var = {}}), ShapeError);
}

TEST_CASE("what a batch norm multiplies is rounded once, not its factors too", "[batch_norm]") {
  Rng rng(2);
  Index tight = 0;
  for (int n = 0; n < 50; ++n) {
    const auto conv = [&] {
      Conv2d<float> layer({.out = 4, .in = 3, .kernel_size = 3, .padding = 1, .bias = true});
      initialize_uniform(layer, rng);
      return layer;
    }();
    const auto norm = random_batch_norm<float>(4, rng);
    const Conv2d<float> folded = contract<double>(batch_norm(norm) * conv);
    for (std::size_t i = 0; i < folded.weight().size(); ++i) {
      const std::size_t o = i / 27;
      const long double right = static_cast<long double>(conv.weight()[i]) *
                                static_cast<long double>(norm.weight[o]) /
                                std::sqrt(static_cast<long double>(norm.running_var[o]) + 1e-3L);
      const long double error = std::abs(static_cast<long double>(folded.weight()[i]) - right);
      // Half an ulp, and five roundings in double before it.
      REQUIRE(error <= ulp<float>(right) * (0.5L + 5 * 0x1p-29L));
      ++tight;
    }
    CHECK(verify<double>(batch_norm(norm) * conv, folded));
  }
  CHECK(tight == 50 * 108);
}

}  // namespace concertina::test
