// An expanded layer as the library's contraction takes it.
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

/// Its form, and where the numbers are that the two passes read and write.
template <class Scalar>
struct Expansion {
  explicit Expansion(const ExpandedLayer<Scalar>& layer)
      : forms{std::visit([](const auto& shapes) { return concertina::cuda::PlannedForm(shapes); },
                         layer.shapes)} {
    const auto span = [](auto* numbers, Index count) {
      return std::span(numbers, static_cast<std::size_t>(count));
    };
    const auto add = [&](const LayerNumbers<Scalar>& from, auto& values, auto& gradients) {
      values.push_back({span(from.weight, from.weights), span(from.bias, from.biases)});
      gradients.push_back(
          {span(from.weight_gradient, from.weights), span(from.bias_gradient, from.biases)});
    };
    for (const LayerNumbers<Scalar>& each : layer.layers) add(each, layers, layer_gradients);
    add(layer.product, products, product_gradients);
  }

  std::vector<concertina::cuda::PlannedForm> forms;  // one, and so of the products
  std::vector<concertina::cuda::DeviceLayer<const Scalar>> layers, product_gradients;
  std::vector<concertina::cuda::DeviceLayer<Scalar>> products, layer_gradients;
};

}  // namespace cifar::cuda
