// SPDX-License-Identifier: Apache-2.0
#include "similarity.hpp"

#include "text_file.hpp"

#include <concertina/error.hpp>

#include <Eigen/Core>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <string>

namespace cifar {

template <class Scalar>
std::vector<double> cosine_similarities(const std::vector<std::vector<Scalar>>& gradients) {
  const auto count = static_cast<Eigen::Index>(gradients.size());
  if (count < 2) {
    throw concertina::ShapeError("similarities of " + std::to_string(count) +
                                 " gradients; two or more are needed");
  }
  const auto numbers = static_cast<Eigen::Index>(gradients.front().size());
  Eigen::MatrixXd directions(numbers, count);
  for (Eigen::Index g = 0; g < count; ++g) {
    const auto& gradient = gradients[static_cast<std::size_t>(g)];
    if (std::ssize(gradient) != numbers) {
      throw concertina::ShapeError("gradients of " + std::to_string(numbers) + " and of " +
                                   std::to_string(gradient.size()) + " numbers");
    }
    directions.col(g) =
        Eigen::Map<const Eigen::VectorX<Scalar>>(gradient.data(), numbers).template cast<double>();
    const double norm = directions.col(g).norm();
    if (!(norm > 0 && std::isfinite(norm))) {
      throw concertina::NumericalError("gradient " + std::to_string(g) + " has the norm " +
                                       std::to_string(norm) + ", and so no direction");
    }
    directions.col(g) /= norm;
  }
  const Eigen::MatrixXd cosines = directions.transpose() * directions;
  std::vector<double> result;
  for (Eigen::Index a = 0; a < count; ++a) {
    for (Eigen::Index b = a + 1; b < count; ++b) {
      result.push_back(std::clamp(cosines(a, b), -1.0, 1.0));
    }
  }
  return result;
}

void write_similarities(const std::filesystem::path& path, std::span<const double> similarities) {
  std::string text = "cosine_similarity\n";
  for (const double similarity : similarities) text += shortest(similarity) + '\n';
  write_text(path, text);
}

template std::vector<double> cosine_similarities(const std::vector<std::vector<float>>&);
template std::vector<double> cosine_similarities(const std::vector<std::vector<double>>&);

}  // namespace cifar
