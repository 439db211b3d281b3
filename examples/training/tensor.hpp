// What a network has besides its operations: tensors, and which of them make up a layer.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/conv.hpp>
#include <concertina/error.hpp>
#include <concertina/shape.hpp>

#include <cstddef>
#include <functional>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace training {

using concertina::Index;

/// Numbers that belong to the network, not to an image: weights, biases, statistics.
template <class Scalar>
struct Tensor {
  std::string name;  ///< as PyTorch's state_dict names it; empty for one that is computed
  std::vector<Index> shape;
  std::vector<Scalar> value;
  std::span<const Scalar> gradient;  ///< set by the one operation that reads it; empty for none
  std::vector<Scalar> memory = {};   ///< of the gradient, where that operation takes it here
  bool read = false;                 ///< there is that operation
  /// Of one that is computed from others: sets their gradients from its own, when that is set.
  std::function<void()> pullback = {};
  bool late = false;  ///< computed within the pass forward, not before it
};

/// Counts the one operation that reads a tensor, and so sets its gradient.
template <class Scalar>
void mark_read(Tensor<Scalar>& tensor) {
  if (std::exchange(tensor.read, true)) {
    throw concertina::Error((tensor.name.empty() ? "a computed tensor" : tensor.name) +
                            " is read by two operations; only one sets its gradient");
  }
}

/// Memory where the one operation that reads a tensor sets its gradient.
template <class Scalar>
std::span<Scalar> gradient_memory(Tensor<Scalar>& tensor) {
  mark_read(tensor);
  tensor.memory.resize(tensor.value.size());
  tensor.gradient = tensor.memory;
  return tensor.memory;
}

/// A layer's numbers: its own, or those that a contraction makes of other layers'.
template <class Scalar>
struct Weights {
  Tensor<Scalar>* weight = nullptr;  ///< [out][in][kernel...]
  Tensor<Scalar>* bias = nullptr;    ///< [out]; null for none
};

/// Where a layer's numbers are, as the library reads them.
template <class Scalar, int Rank>
concertina::ConvView<Scalar, Rank> view_of(const concertina::ConvShape<Rank>& shape,
                                           const Weights<Scalar>& weights) {
  return {shape, weights.weight->value,
          weights.bias ? std::span(weights.bias->value) : std::span<Scalar>()};
}

/// The shape of a layer's weight, [out][in][kernel...].
template <int Rank>
std::vector<Index> weight_extents(const concertina::ConvShape<Rank>& shape) {
  std::vector<Index> extents = {shape.out, shape.in};
  extents.insert(extents.end(), shape.kernel_size.begin(), shape.kernel_size.end());
  return extents;
}

/// The tensors of a batch norm, as torch.nn.BatchNorm2d names them.
template <class Scalar>
struct NormTensors {
  Tensor<Scalar>*weight, *bias, *running_mean, *running_var;
};

/// Layers in a row, the first applied first, that are computed as the one they contract to.
template <class Scalar, int Rank>
struct Chain {
  std::vector<concertina::ConvShape<Rank>> shapes;
  std::vector<Weights<Scalar>> layers;

  std::vector<concertina::ConvView<const Scalar, Rank>> views() const {
    std::vector<concertina::ConvView<const Scalar, Rank>> all;
    for (std::size_t l = 0; l < shapes.size(); ++l) all.push_back(view_of(shapes[l], layers[l]));
    return all;
  }
};

}  // namespace training
