// Similarities of gradients: cosines, their density, their file.
// SPDX-License-Identifier: Apache-2.0
#include "cifar/similarity.hpp"  // first: the header must stand alone

#include "support.hpp"

#include <concertina/error.hpp>

#include <catch2/catch.hpp>

#include <unistd.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

using namespace cifar;
using Catch::Matchers::Contains;
using concertina::test::message_of;

TEST_CASE("cosines of all pairs, in order", "[cifar]") {
  const std::vector<std::vector<float>> gradients = {
      {3, 4, 0}, {6, 8, 0}, {-4, 3, 0}, {-3, -4, 0}, {0, 0, 2}};
  const auto found = cosine_similarities(gradients);
  const std::vector<double> expected = {1, 0, -1, 0, 0, -1, 0, 0, 0, 0};
  REQUIRE(found.size() == expected.size());
  for (std::size_t i = 0; i < expected.size(); ++i) {
    CHECK(found[i] == Approx(expected[i]).margin(1e-15));
    CHECK(std::abs(found[i]) <= 1);
  }
  CHECK_THAT(message_of<concertina::ShapeError>(
                 [] { cosine_similarities(std::vector<std::vector<float>>{{1}}); }),
             Contains("two or more"));
  CHECK_THAT(message_of<concertina::ShapeError>(
                 [] { cosine_similarities(std::vector<std::vector<float>>{{1}, {1, 2}}); }),
             Contains("1 and of 2"));
  CHECK_THAT(message_of<concertina::NumericalError>(
                 [] { cosine_similarities(std::vector<std::vector<float>>{{1}, {0}}); }),
             Contains("gradient 1"));
}

TEST_CASE("a density is a mean of Gaussians of Silverman's width", "[cifar]") {
  // Four samples: deviation sqrt(5/3) = 1.29, quartiles 0.75 and 2.25, so 1.5 / 1.34 is less.
  const std::vector<double> samples = {3, 0, 2, 1};
  const double bandwidth = 0.9 * (1.5 / 1.34) * std::pow(4, -0.2);
  std::vector<double> points;
  for (int i = 0; i <= 2000; ++i) points.push_back(-5 + 0.0065 * i);
  const auto found = density(samples, points);
  double integral = 0;
  for (std::size_t i = 0; i < points.size(); ++i) {
    double expected = 0;
    for (const double sample : samples) {
      expected += std::exp(-std::pow((points[i] - sample) / bandwidth, 2) / 2) /
                  (4 * bandwidth * std::sqrt(2 * M_PI));
    }
    CHECK(found[i] == Approx(expected).epsilon(1e-12).margin(1e-300));
    integral += found[i] * 0.0065;
  }
  CHECK(integral == Approx(1).epsilon(1e-6));
  CHECK_THROWS_AS(density({1, 1, 1}, points), concertina::NumericalError);
  CHECK_THROWS_AS(density({1}, points), concertina::NumericalError);
  CHECK(density({1, 1, 1, 1, 2}, points).size() == points.size());  // quartiles that are equal
}

TEST_CASE("similarities read back bit by bit, and other files are refused", "[cifar]") {
  const auto path = std::filesystem::temp_directory_path() /
                    ("cifar_similarity_" + std::to_string(getpid()) + ".csv");
  const std::vector<double> numbers = {1, -1, 1.0 / 3, -0.0, 1e-300};
  write_similarities(path, numbers);
  CHECK(read_similarities(path) == numbers);
  const auto refusal = [&](const std::string& text) {
    std::ofstream(path) << text;
    return message_of<concertina::FormatError>([&] { read_similarities(path); });
  };
  CHECK_THAT(refusal("epoch\n1\n"), Contains("line 1") && Contains("cosine_similarity"));
  CHECK_THAT(refusal("cosine_similarity\n0.5\n2\n"), Contains("line 3"));
  CHECK_THAT(refusal("cosine_similarity\nx\n"), Contains("line 2"));
  std::filesystem::remove(path);
  CHECK_THROWS_AS(read_similarities(path), concertina::IoError);
}
