// Whole networks in inference: what a graph computes for a batch, expanded as it was trained or
// compact as it ships.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "graph.hpp"
#include "tensor.hpp"

#include <concertina/io/safetensors.hpp>

#include <functional>

namespace tool {

enum class Form {
  expanded,  // every layer as it was trained
  compact    // nodes with an expected layer replaced by it
};

/// A graph with its elements, ready to run. Defined for float and double.
template <class Scalar>
class Network {
 public:
  /// Told of each node that is_expanded, and of the batch that it is given.
  using Observer = std::function<void(const Node&, const Tensor<Scalar>&)>;

  /// Takes the weights from the file, widened; F64 only fits double. Neither file nor graph is
  /// needed afterwards, but by an observer.
  /// Throws  FormatError or ShapeError naming file and layer; FormatError too for convolutions and
  ///         pools of other than two spatial axes
  Network(const concertina::io::Safetensors& file, const Node& graph, Form form = Form::expanded,
          Observer observe = {});

  /// Everything is computed in Scalar; images are independent of each other. May be called from
  /// several threads at once.
  /// Throws  ShapeError or SizeError naming the node that the batch does not fit
  Tensor<Scalar> operator()(Tensor<Scalar> batch) const;

 private:
  std::function<Tensor<Scalar>(Tensor<Scalar>)> map_;
};

/// The same of a batch in double, rounded to Scalar, and its result widened.
template <class Scalar>
Tensor<double> run(const Network<Scalar>& network, const Tensor<double>& batch) {
  const Tensor<Scalar> y = network({batch.shape, {batch.values.begin(), batch.values.end()}});
  return {y.shape, {y.values.begin(), y.values.end()}};
}

}  // namespace tool
