// A model's graph with what follows from it: who makes and reads each tensor, constants, shapes.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "onnx/budget.hpp"

#include <concertina/io/onnx.hpp>
#include <concertina/shape.hpp>

#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace tool {

using concertina::Index;
namespace onnx = concertina::onnx;

/// Extents of a tensor; -1 is not known.
using Dims = std::vector<Index>;
inline constexpr Index unknown = -1;

/// "1x3x?x?".
std::string to_text(const Dims& dims);

/// A tensor of the graph, by its place in Graph::tensors().
struct GraphTensor {
  std::string name;
  int producer = -1;                       ///< a node; -1 for graph inputs and initializers
  std::vector<int> consumers = {};         ///< nodes, each as often as it reads the tensor
  bool escapes = false;                    ///< a graph output, or read by a graph in an attribute
  const onnx::Tensor* constant = nullptr;  ///< also of a node that reads only constants
  onnx::DataType type = onnx::DataType::undefined;
  std::optional<Dims> dims = {};   ///< none: not even the rank is known
  std::optional<Dims> sizes = {};  ///< the same with an assumption for each input's unknown extent:
                                   ///< for costs only
};

struct GraphOptions {
  std::map<std::string, Dims> inputs = {};  ///< shapes of graph inputs, in place of declared ones
  bool initializers_are_constant = false;   ///< also those that are graph inputs
  std::vector<std::string> keep = {};       ///< tensors that nothing takes in
  Budget budget = {};                       ///< of each thing that is done with it
};

/// The model must outlive it.
class Graph {
 public:
  /// Throws FormatError for a model of an opset below 7, or of a later one than is known;
  /// UsageError for options that name no input, or contradict a declared shape.
  Graph(const onnx::Model& model, const GraphOptions& options);

  const onnx::Model& model() const { return model_; }
  Index opset() const { return opset_; }
  const Budget& budget() const { return budget_; }
  std::span<const GraphTensor> tensors() const { return tensors_; }
  const GraphTensor& operator[](int tensor) const {
    return tensors_[static_cast<std::size_t>(tensor)];
  }
  const onnx::Node& node(int index) const { return model_.nodes[static_cast<std::size_t>(index)]; }

  /// -1 where there is none, or the name is empty.
  int find(std::string_view name) const;
  /// The node's i-th input or output; -1 where it is left out.
  int input(int node, std::size_t i) const;
  int output(int node, std::size_t i = 0) const;
  /// The constant that is the node's i-th input; null where it is none.
  const onnx::Tensor* constant(int node, std::size_t i) const;
  /// Why what a node makes of constants is none; empty where it is one, or reads others.
  std::string unfolded(int node) const;
  /// Its elements, where it is a constant of integers.
  std::optional<std::vector<Index>> integers(int node, std::size_t i) const;

 private:
  int add(const std::string& name);

  const onnx::Model& model_;
  Index opset_ = 0;
  Budget budget_;
  std::vector<GraphTensor> tensors_;
  std::unordered_map<std::string, int> index_;
  std::vector<std::vector<int>> inputs_, outputs_;  // of nodes
  std::vector<std::unique_ptr<onnx::Tensor>>
      made_;                             // of Constant nodes, and of others from constants
  std::map<int, std::string> unfolded_;  // nodes above the budget
};

/// Windows of a convolution or pool as the node says them, with padding that auto_pad asks for.
struct Windows {
  Dims kernel, strides, dilations, pads_begin, pads_end;
};

/// None where auto_pad depends on a size that is not known. Throws FormatError naming the node for
/// lengths that differ.
std::optional<Windows> windows_of(const Graph& graph, int node, Dims kernel);

/// "Conv /features/0/Conv", "Add node 12 (-> y)".
std::string describe(const Graph& graph, int node);

}  // namespace tool
