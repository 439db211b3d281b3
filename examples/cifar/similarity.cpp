// SPDX-License-Identifier: Apache-2.0
#include "similarity.hpp"

#include "text_file.hpp"

#include <concertina/error.hpp>

#include <Eigen/Core>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <numbers>
#include <string>
#include <string_view>

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

namespace {
constexpr std::string_view similarity_header = "cosine_similarity";
}

void write_similarities(const std::filesystem::path& path, std::span<const double> similarities) {
  std::string text(similarity_header);
  for (const double similarity : similarities) text += '\n' + shortest(similarity);
  write_text(path, text + '\n');
}

std::vector<double> read_similarities(const std::filesystem::path& path) {
  const std::string text = read_text(path, 2ULL << 30, "the similarities of gradients");
  std::vector<std::string_view> lines = split(text, '\n');
  std::vector<double> result;
  if (lines.back().empty()) lines.pop_back();
  for (std::size_t n = 0; n < lines.size(); ++n) {
    const auto number = number_in<double>(lines[n]);
    if (n == 0 ? lines[n] == similarity_header : number && std::abs(*number) <= 1) {
      if (n > 0) result.push_back(*number);
      continue;
    }
    throw concertina::FormatError(
        path.string() + ": line " + std::to_string(n + 1) + ": expected " +
        (n == 0 ? '"' + std::string(similarity_header) + '"' : "a number from -1 to 1"));
  }
  return result;
}

std::vector<double> density(std::vector<double> samples, std::span<const double> points) {
  const auto count = static_cast<double>(samples.size());
  std::ranges::sort(samples);
  double mean = 0, squares = 0;
  for (const double sample : samples) mean += sample / count;
  for (const double sample : samples) squares += (sample - mean) * (sample - mean);
  const double deviation = std::sqrt(squares / (count - 1));
  const auto quantile = [&](double share) {
    const double at = share * (count - 1);
    const auto below = static_cast<std::size_t>(at);
    const auto above = std::min(below + 1, samples.size() - 1);
    return std::lerp(samples[below], samples[above], at - std::floor(at));
  };
  if (samples.size() < 2 || !(deviation > 0)) {
    throw concertina::NumericalError("the density of " + std::to_string(samples.size()) +
                                     " samples that do not differ");
  }
  double spread = (quantile(0.75) - quantile(0.25)) / 1.34;
  spread = spread > 0 ? std::min(spread, deviation) : deviation;
  const double bandwidth = 0.9 * spread * std::pow(count, -0.2);
  std::vector<double> result;
  for (const double point : points) {
    double sum = 0;
    for (const double sample : samples) {
      const double distance = (point - sample) / bandwidth;
      sum += std::exp(-distance * distance / 2);
    }
    result.push_back(sum / (count * bandwidth * std::sqrt(2 * std::numbers::pi)));
  }
  return result;
}

template std::vector<double> cosine_similarities(const std::vector<std::vector<float>>&);
template std::vector<double> cosine_similarities(const std::vector<std::vector<double>>&);

}  // namespace cifar
