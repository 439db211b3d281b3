// Landscapes of the loss.
// SPDX-License-Identifier: Apache-2.0
#include "cifar/landscape.hpp"  // first: the header must stand alone

#include "support.hpp"

#include <catch2/catch.hpp>

#include <cmath>
#include <limits>
#include <string>

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
  // In a network that is zero but for its last bias nothing moves, whatever the directions.
  ThreadPool pool(1);
  const Dataset data = generated_dataset(10, 20, 16, 3);
  Network<double> network({.model = "compact", .kernel = 3}, 16, pool);
  for (Tensor<double>* tensor : network.parameters()) {
    for (double& number : tensor->value) number = 0;
  }
  network.tape().tensors_changed();
  for (const double loss : landscape(network, data, {.points = 3, .range = 9}).losses) {
    CHECK(loss == Approx(std::log(10)).epsilon(1e-12));
  }
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
