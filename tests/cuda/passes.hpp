// Both passes of a plan, to be run on the host or on a device.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/cuda/detail/tensor_table.hpp>
#include <concertina/cuda/plan.hpp>

#include <bit>
#include <cstddef>
#include <vector>

namespace concertina::test {

/// What a tensor's elements are.
enum class Storage { float32, float64, float16, bfloat16, residue };

/// The tensors of a network's forms, each weight followed by its bias: what passes read, and what
/// they write.
template <class Stored>
struct Passes {
  using Tensors = std::vector<std::vector<Stored>>;
  Tensors layers, results, result_gradients, layer_gradients;
};

/// The same bytes as elements of another type.
template <class To, class From>
std::vector<std::vector<To>> cast(const std::vector<std::vector<From>>& tensors) {
  std::vector<std::vector<To>> result;
  for (const auto& tensor : tensors) {
    auto& elements = result.emplace_back();
    for (const From& element : tensor) elements.push_back(std::bit_cast<To>(element));
  }
  return result;
}
template <class To, class From>
Passes<To> cast(const Passes<From>& passes) {
  return {cast<To>(passes.layers), cast<To>(passes.results), cast<To>(passes.result_gradients),
          cast<To>(passes.layer_gradients)};
}

/// Pairs of tensors as layers.
template <class T, class Tensors>
std::vector<cuda::DeviceLayer<T>> layers_of(Tensors& tensors) {
  std::vector<cuda::DeviceLayer<T>> layers;
  for (std::size_t t = 0; t < tensors.size(); t += 2) {
    layers.push_back(
        {{tensors[t].data(), tensors[t].size()}, {tensors[t + 1].data(), tensors[t + 1].size()}});
  }
  return layers;
}

}  // namespace concertina::test
