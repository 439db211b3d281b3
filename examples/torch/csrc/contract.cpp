// The contraction of a chain and its gradient as operators of PyTorch, on its stable ABI: no
// Python.h, and one binary for every PyTorch from 2.10 on.
// SPDX-License-Identifier: Apache-2.0
#include "chain.hpp"

#include <concertina/contract.hpp>

#include <torch/csrc/stable/library.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <utility>
#include <vector>

namespace {

using namespace concertina::torch_operators;
using concertina::ConvView;
using concertina::Index;

/// Planned once for each chain that a thread meets.
template <class Scalar>
concertina::Contraction<Scalar, rank>& planned(const Integers& form) {
  thread_local std::map<Integers, concertina::Contraction<Scalar, rank>> plans;
  auto found = plans.find(form);
  if (found == plans.end()) {
    const concertina::Form<rank> shapes(decoded(form));
    found = plans.try_emplace(form, shapes, concertina::interior_only).first;
  }
  return found->second;
}

template <class Element>
std::vector<ConvView<Element, rank>> views(const std::vector<Tensor>& weights,
                                           const Integers& form) {
  const auto shapes = decoded(form);
  STD_TORCH_CHECK(weights.size() == shapes.size(), "concertina: ", shapes.size(), " layers, ",
                  weights.size(), " weights");
  std::vector<ConvView<Element, rank>> result;
  for (std::size_t l = 0; l < shapes.size(); ++l) {
    Element* data = nullptr;
    if constexpr (std::is_const_v<Element>) {
      data = static_cast<Element*>(weights[l].const_data_ptr());
    } else {
      data = static_cast<Element*>(weights[l].mutable_data_ptr());
    }
    result.emplace_back(shapes[l], std::span(data, static_cast<std::size_t>(weights[l].numel())));
  }
  return result;
}

/// PyTorch's own threads.
const auto run = [](Index count, concertina::ParallelFor::Task task) {
  torch::stable::parallel_for(0, count, 1, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t i = first; i < last; ++i) task(i);
  });
};

template <class Scalar>
Tensor forward(const std::vector<Tensor>& weights, const Integers& form) {
  auto& contraction = planned<Scalar>(form);
  const auto& shape = contraction.shape();
  const Tensor result =
      torch::stable::new_empty(weights.front(), weight_sizes(shape, own_rank(weights.front())));
  contraction.forward(
      views<const Scalar>(weights, form),
      ConvView<Scalar, rank>(shape, std::span(static_cast<Scalar*>(result.mutable_data_ptr()),
                                              static_cast<std::size_t>(result.numel()))),
      run);
  return result;
}

/// Contracts again, since what the last contraction kept may be of other weights.
template <class Scalar>
std::vector<Tensor> backward(const Tensor& gradient, const std::vector<Tensor>& weights,
                             const Integers& form) {
  auto& contraction = planned<Scalar>(form);
  const auto layers = views<const Scalar>(weights, form);
  contraction.forward(layers, run);
  std::vector<Tensor> result;
  for (const Tensor& weight : weights) result.push_back(torch::stable::empty_like(weight));
  const std::span elements(static_cast<const Scalar*>(gradient.const_data_ptr()),
                           static_cast<std::size_t>(gradient.numel()));
  contraction.backward(layers, ConvView<const Scalar, rank>(contraction.shape(), elements),
                       views<Scalar>(result, form), run);
  return result;
}

Tensor contract(std::vector<Tensor> weights, Integers form) {
  STD_TORCH_CHECK(!weights.empty(), "concertina: no layers");
  weights = contiguous(weights, weights.front());
  const ScalarType type = weights.front().scalar_type();
  if (type == ScalarType::Float) return forward<float>(weights, form);
  STD_TORCH_CHECK(type == ScalarType::Double, "concertina: weights are float or double");
  return forward<double>(weights, form);
}

std::vector<Tensor> contract_backward(Tensor gradient, std::vector<Tensor> weights, Integers form) {
  weights = contiguous(weights, gradient);
  gradient = torch::stable::contiguous(gradient);
  const ScalarType type = gradient.scalar_type();
  if (type == ScalarType::Float) return backward<float>(gradient, weights, form);
  STD_TORCH_CHECK(type == ScalarType::Double, "concertina: weights are float or double");
  return backward<double>(gradient, weights, form);
}

std::vector<Tensor> contract_many(std::vector<Tensor> weights, Integers counts, Integers form) {
  const auto layers = divided(weights, counts);
  const auto forms = divided(form, counts, encoded_length);
  std::vector<Tensor> results;
  for (std::size_t c = 0; c < layers.size(); ++c) results.push_back(contract(layers[c], forms[c]));
  return results;
}

std::vector<Tensor> contract_many_backward(std::vector<Tensor> gradients,
                                           std::vector<Tensor> weights, Integers counts,
                                           Integers form) {
  const auto layers = divided(weights, counts);
  const auto forms = divided(form, counts, encoded_length);
  STD_TORCH_CHECK(gradients.size() == layers.size(), "concertina: ", layers.size(), " chains, ",
                  gradients.size(), " gradients");
  std::vector<Tensor> results;
  for (std::size_t c = 0; c < layers.size(); ++c) {
    for (auto& each : contract_backward(gradients[c], layers[c], forms[c])) {
      results.push_back(std::move(each));
    }
  }
  return results;
}

}  // namespace

STABLE_TORCH_LIBRARY(concertina, library) {
  library.def("contract(Tensor[] weights, int[] form) -> Tensor");
  library.def("contract_backward(Tensor gradient, Tensor[] weights, int[] form) -> Tensor[]");
  // Several chains at once: how many layers each has, and all layers.
  library.def("contract_many(Tensor[] weights, int[] counts, int[] form) -> Tensor[]");
  library.def(
      "contract_many_backward(Tensor[] gradients, Tensor[] weights, int[] counts, int[] form) -> "
      "Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(concertina, CPU, library) {
  library.impl("contract", TORCH_BOX(&contract));
  library.impl("contract_backward", TORCH_BOX(&contract_backward));
  library.impl("contract_many", TORCH_BOX(&contract_many));
  library.impl("contract_many_backward", TORCH_BOX(&contract_many_backward));
}
