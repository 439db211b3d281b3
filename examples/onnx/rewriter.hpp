// A model in which regions are replaced by contracted layers.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "onnx/layer.hpp"
#include "onnx/regions.hpp"

#include <map>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace tool {

class Rewriter {
 public:
  /// The graph must outlive it.
  explicit Rewriter(const Graph& graph);

  /// Whether replace would write a convolution, or a transposed one.
  bool writes_convolution(Segments region, const NewLayer& layer) const;

  bool removed(int node) const { return removed_[static_cast<std::size_t>(node)]; }

  /// Writes the layer in place of the region's nodes, under the name of the last; its elements
  /// rounded once to the type of the region's. A `shift`, one number a channel, is added to what
  /// the layer reads.
  void replace(Segments region, const NewLayer& layer, std::span<const double> weight,
               std::span<const double> bias, std::span<const double> shift = {});

  /// The model, without nodes and constants of which nothing is left that read them.
  onnx::Model finished() &&;

 private:
  /// A name that nothing has yet.
  std::string fresh(const std::string& wanted, std::set<std::string, std::less<>>& names);
  /// Whether a graph that a node holds may have the name.
  bool is_in_bodies(const std::string& name);
  std::string constant(const std::string& suffix, const Dims& dims, std::span<const double> values);
  std::string constant(const std::string& suffix, const Dims& values);
  /// Appends a node; its output has a new name until another is given.
  std::string node(const std::string& op, std::vector<std::string> inputs,
                   std::vector<onnx::Attribute> attributes = {});
  std::string move_channels(const std::string& x, int rank, Layout to);
  void write(const NewLayer& layer, std::string x);
  /// A linear layer that reads `in` channels.
  void write_linear(Index in, Index out, const std::string& x, bool gemm);
  /// Its weight, of this shape, and its bias where it has one, after x.
  std::vector<std::string> inputs_of(const std::string& x, const Dims& weight);
  std::string write_conv(const NewLayer& layer, std::string x);
  std::string write_pad(const Dims& begin, const Dims& end, const std::string& x);
  std::string write_conv_transpose(const NewLayer& layer, const std::string& x);
  void remove_dead();

  const Graph& graph_;
  const onnx::Model& model_;
  std::vector<bool> removed_;
  std::vector<std::vector<onnx::Node>> inserted_;  // after the node of this index
  std::vector<onnx::Tensor> constants_;
  std::set<std::string, std::less<>> names_, node_names_;
  std::vector<std::string_view> bodies_;  // of nodes that hold graphs, as they are encoded
  std::map<std::string, std::vector<std::string_view>> up_to_suffix_;  // of them, to each of it
  std::set<int> sources_;  // of regions: made still, although all that read them may have gone
  // Of the region at hand:
  const GraphTensor *source_ = nullptr, *result_ = nullptr;
  std::vector<onnx::Node>* nodes_ = nullptr;
  std::string node_name_;
  onnx::DataType type_ = onnx::DataType::float32;
  std::span<const double> weight_, bias_;
};

}  // namespace tool
