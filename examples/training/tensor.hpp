// What a network has besides its operations: tensors, and which of them make up a layer.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/shape.hpp>

#include <functional>
#include <span>
#include <string>
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
  bool read = false;                 ///< there is that operation
  /// Of one that is computed from others: sets their gradients from its own, when that is set.
  std::function<void()> pullback = {};
  bool late = false;  ///< computed within the pass forward, not before it
};

/// A layer's numbers: its own, or those that a contraction makes of other layers'.
template <class Scalar>
struct Weights {
  Tensor<Scalar>* weight = nullptr;  ///< [out][in][kernel...]
  Tensor<Scalar>* bias = nullptr;    ///< [out]; null for none
};

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
};

}  // namespace training
