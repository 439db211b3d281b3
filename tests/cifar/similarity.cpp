// Similarities of gradients: cosines, and their file.
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

TEST_CASE("similarities are written such that they read back bit by bit", "[cifar]") {
  const auto path = std::filesystem::temp_directory_path() /
                    ("cifar_similarity_" + std::to_string(getpid()) + ".csv");
  const std::vector<double> numbers = {1, -1, 1.0 / 3, -0.0, 1e-300};
  write_similarities(path, numbers);
  std::ifstream file(path);
  std::string line;
  REQUIRE(std::getline(file, line));
  CHECK(line == "cosine_similarity");
  std::vector<double> read;
  while (std::getline(file, line)) read.push_back(std::stod(line));
  CHECK(read == numbers);
  std::filesystem::remove(path);
}
