// Regions of a graph that are one linear map: from one tensor to another, with nothing in between
// that is read elsewhere.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "onnx/linear.hpp"

#include <functional>
#include <optional>
#include <string>
#include <vector>

namespace tool {

/// The linear nodes of a graph.
class LinearGraph {
 public:
  explicit LinearGraph(const Graph& graph);

  const Graph& graph() const { return graph_; }
  /// The map that makes a tensor; null where none does.
  const LinearNode* maker(int tensor) const;
  /// Why a node is none of them; empty where it is, or is plainly another operator.
  const std::string& reason(int node) const { return reasons_[static_cast<std::size_t>(node)]; }

 private:
  const Graph& graph_;
  std::vector<std::optional<LinearNode>> nodes_;  // by the last node of each
  std::vector<std::string> reasons_;
};

/// What stands between two tensors through which everything passes.
struct Segment {
  int from = -1, to = -1;
  std::vector<const LinearNode*> maps = {};  ///< the last applied first
};

/// Segments one after another, the last applied first: the longest linear map that ends in a
/// tensor. `taken` says which nodes are not to be used.
/// Ensures  no tensor between is read outside, is an output of the graph, or of another type
std::vector<Segment> segments_to(const LinearGraph& linear, int tensor,
                                 const std::function<bool(int node)>& taken);

}  // namespace tool
