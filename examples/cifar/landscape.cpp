// SPDX-License-Identifier: Apache-2.0
#include "landscape.hpp"

#include "text_file.hpp"

#include <concertina/error.hpp>
#include <concertina/random.hpp>

#include <algorithm>
#include <cmath>
#include <numbers>
#include <random>
#include <string>

namespace cifar {
namespace {

/// Source  Box, Muller, Annals of Mathematical Statistics 1958
template <class Generator>
double gaussian(Generator& generator) {
  const auto uniform = [&] { return (concertina::random_uniform(generator, 1) + 1) / 2; };
  const double radius = std::sqrt(-2 * std::log(1 - uniform()));
  return radius * std::cos(2 * std::numbers::pi * uniform());
}

}  // namespace

void LandscapeOptions::validate() const {
  require_option(points >= 3 && points <= 1001 && points % 2 == 1, "points", points,
                 "odd ones from 3 to 1001 are possible");
  require_option(range > 0 && std::isfinite(range), "range", range, "it is positive");
  require_option(images >= 1, "images", images, "there must be one");
}

template <class Scalar>
std::vector<double> filter_direction(const Tensor<Scalar>& tensor, std::mt19937_64& generator) {
  std::vector<double> result(tensor.value.size());
  if (tensor.shape.size() < 2) return result;
  const std::size_t filter = result.size() / static_cast<std::size_t>(tensor.shape.front());
  for (std::size_t first = 0; first < result.size(); first += filter) {
    double own = 0, drawn = 0;
    for (std::size_t i = first; i < first + filter; ++i) {
      const auto value = static_cast<double>(tensor.value[i]);
      result[i] = gaussian(generator);
      own += value * value;
      drawn += result[i] * result[i];
    }
    for (std::size_t i = first; i < first + filter; ++i) result[i] *= std::sqrt(own / drawn);
  }
  return result;
}

template <class Scalar>
Landscape landscape(Network<Scalar>& network, const Dataset& data,
                    const LandscapeOptions& options) {
  options.validate();
  const auto& parameters = network.parameters();
  std::vector<std::vector<Scalar>> origin;
  std::vector<std::vector<double>> first, second;
  std::mt19937_64 generator(options.seed);
  for (const Tensor<Scalar>* tensor : parameters) {
    origin.push_back(tensor->value);
    first.push_back(filter_direction(*tensor, generator));
    second.push_back(filter_direction(*tensor, generator));
  }
  Images images;
  const Index count = std::min(options.images, data.train.count());
  images.labels.assign(data.train.labels.begin(), data.train.labels.begin() + count);
  images.pixels.assign(data.train.pixels.begin(), data.train.pixels.begin() + count * image_size);
  Landscape result;
  for (Index i = 0; i < options.points; ++i) {
    const double share = 2 * static_cast<double>(i) / static_cast<double>(options.points - 1) - 1;
    result.coordinates.push_back(share * options.range);
  }
  for (const double b : result.coordinates) {
    for (const double a : result.coordinates) {
      for (std::size_t p = 0; p < origin.size(); ++p) {
        for (std::size_t i = 0; i < origin[p].size(); ++i) {
          parameters[p]->value[i] = static_cast<Scalar>(static_cast<double>(origin[p][i]) +
                                                        a * first[p][i] + b * second[p][i]);
        }
      }
      network.tape().tensors_changed();
      result.losses.push_back(evaluate(network, data, images).loss);
      if (std::isfinite(result.losses.back())) continue;
      throw concertina::NumericalError("the loss at (" + shortest(a) + ", " + shortest(b) +
                                       ") is not finite; choose a smaller range");
    }
  }
  for (std::size_t p = 0; p < origin.size(); ++p) parameters[p]->value = origin[p];
  network.tape().tensors_changed();
  return result;
}

void write_landscape(const std::filesystem::path& path, const Landscape& landscape) {
  std::string text = "first,second,loss\n";
  auto loss = landscape.losses.begin();
  for (const double b : landscape.coordinates) {
    for (const double a : landscape.coordinates) {
      text += shortest(a) + ',' + shortest(b) + ',' + shortest(*loss++) + '\n';
    }
    text += '\n';
  }
  write_text(path, text);
}

template std::vector<double> filter_direction(const Tensor<float>&, std::mt19937_64&);
template std::vector<double> filter_direction(const Tensor<double>&, std::mt19937_64&);
template Landscape landscape(Network<float>&, const Dataset&, const LandscapeOptions&);
template Landscape landscape(Network<double>&, const Dataset&, const LandscapeOptions&);

}  // namespace cifar
