// Landscapes of the loss.
// SPDX-License-Identifier: Apache-2.0
#include "cifar/landscape.hpp"  // first: the header must stand alone

#include "support.hpp"

#include <catch2/catch.hpp>

#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

namespace cifar {
namespace {

using Catch::Matchers::Contains;
using concertina::test::message_of;

TEST_CASE("a landscape is the loss around a network, which stays", "[cifar]") {
  ThreadPool pool(2);
  const Dataset data = generated_dataset(10, 40, 16, 3);
  Network<float> network({.model = "cl", .kernel = 3, .rate = 2}, 16, pool);
  network.initialize(1);
  const auto before = network.save();
  const LandscapeOptions options{.points = 5, .range = 0.5, .images = 24};
  const Landscape found = landscape(network, data, options);
  CHECK(network.save() == before);
  CHECK(found.coordinates == std::vector<double>{-0.5, -0.25, 0, 0.25, 0.5});
  REQUIRE(found.losses.size() == 25);
  Images first = data.train;
  first.labels.resize(24), first.pixels.resize(24 * image_size);
  CHECK(found.losses[12] == evaluate(network, data, first).loss);  // the middle, to the bit
  CHECK(landscape(network, data, options).losses == found.losses);
  for (std::size_t i = 0; i < 25; ++i) {
    if (i != 12) CHECK(found.losses[i] != found.losses[12]);
  }
  CHECK(landscape(network, data, {.points = 5, .range = 0.5, .images = 24, .seed = 2}).losses !=
        found.losses);
}

TEST_CASE("directions have the norm of each filter, and leave biases and norms", "[cifar]") {
  std::mt19937_64 generator(1);
  Tensor<double> weight{"w", {3, 2, 2}, {1, 2, 3, 4, 0, 0, 0, 0, -5, 6, -7, 8}, {}};
  const auto direction = filter_direction(weight, generator);
  REQUIRE(direction.size() == 12);
  for (std::size_t filter = 0; filter < 3; ++filter) {
    double own = 0, drawn = 0, product = 0;
    for (std::size_t i = 4 * filter; i < 4 * filter + 4; ++i) {
      own += weight.value[i] * weight.value[i], drawn += direction[i] * direction[i];
      product += weight.value[i] * direction[i];
    }
    CHECK(drawn == Approx(own).epsilon(1e-12));
    CHECK((own == 0 || std::abs(product) < 0.999 * own));  // random, not its own
  }
  CHECK(filter_direction(weight, generator) != direction);
  const Tensor<double> bias{"b", {3}, {1, 2, 3}, {}};
  CHECK(filter_direction(bias, generator) == std::vector<double>{0, 0, 0});
  // Gaussian: of many numbers in one filter, the share within one deviation is 0.6827.
  const Tensor<double> many{"m", {1, 100'000}, std::vector<double>(100'000, 1.0), {}};
  double within = 0;
  for (const double number : filter_direction(many, generator)) within += std::abs(number) < 1;
  CHECK(within / 100'000 == Approx(0.6827).margin(5 * 0.00147));  // five deviations
}

TEST_CASE("a landscape that leaves the finite numbers is refused", "[cifar]") {
  ThreadPool pool(1);
  const Dataset data = generated_dataset(10, 32, 16, 3);
  Network<float> network({.model = "compact", .kernel = 3}, 16, pool);
  network.initialize(1);
  CHECK_THAT(message_of<concertina::NumericalError>(
                 [&] { landscape(network, data, {.points = 3, .range = 1e38, .images = 16}); }),
             Contains("choose a smaller range"));
}

TEST_CASE("impossible landscapes are refused", "[cifar]") {
  const auto refused = [](const LandscapeOptions& options) {
    return message_of<concertina::Error>([&] { options.validate(); });
  };
  CHECK_THAT(refused({.points = 4}), Contains("points 4"));
  CHECK_THAT(refused({.points = 1}), Contains("points 1"));
  CHECK_THAT(refused({.range = 0}), Contains("range"));
  CHECK_THAT(refused({.range = std::numeric_limits<double>::infinity()}), Contains("range"));
  CHECK_THAT(refused({.images = 0}), Contains("images 0"));
}

}  // namespace
}  // namespace cifar
