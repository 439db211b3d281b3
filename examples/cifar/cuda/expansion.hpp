// A network's expanded layers as the library's contraction takes them.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "network.hpp"

#include <concertina/cuda/contraction.hpp>
#include <concertina/cuda/detail/tensor_table.hpp>

#include <cstddef>
#include <span>
#include <variant>
#include <vector>

namespace cifar::cuda {

/// Their forms, and where the numbers are that the two passes read and write.
template <class Scalar>
struct Expansions {
  explicit Expansions(const std::vector<ExpandedLayer<Scalar>>& expanded) {
    const auto span = [](auto* numbers, Index count) {
      return std::span(numbers, static_cast<std::size_t>(count));
    };
    const auto add = [&](const LayerNumbers<Scalar>& from, auto& values, auto& gradients) {
      values.push_back({span(from.weight, from.weights), span(from.bias, from.biases)});
      gradients.push_back(
          {span(from.weight_gradient, from.weights), span(from.bias_gradient, from.biases)});
    };
    for (const ExpandedLayer<Scalar>& layer : expanded) {
      std::visit([&](const auto& shapes) { forms.emplace_back(shapes); }, layer.shapes);
      for (const LayerNumbers<Scalar>& each : layer.layers) add(each, layers, layer_gradients);
      add(layer.product, products, product_gradients);
    }
  }

  std::vector<concertina::cuda::PlannedForm> forms;
  std::vector<concertina::cuda::DeviceLayer<const Scalar>> layers, product_gradients;
  std::vector<concertina::cuda::DeviceLayer<Scalar>> products, layer_gradients;
};

}  // namespace cifar::cuda
