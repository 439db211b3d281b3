// Regions of a graph that are one linear map: from one tensor to another, with nothing in between
// that is read elsewhere.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "onnx/linear.hpp"

#include <functional>
#include <map>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

namespace tool {

/// The linear nodes of a graph.
class LinearGraph {
 public:
  explicit LinearGraph(const Graph& graph, Flattenings flattenings = Flattenings::within);

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

inline constexpr std::size_t longest_region = 512;  // maps; a longer chain is cut there

/// Segments one after another, the last applied first: the longest linear map that ends in a
/// tensor. `taken` says which nodes are not to be used.
/// Ensures  no tensor between is read outside, is an output of the graph, or of another type
std::vector<Segment> segments_to(const LinearGraph& linear, int tensor,
                                 const std::function<bool(int node)>& taken);

/// A region that cannot be what it was taken for.
struct NotLinear : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// Neighbouring segments, the last applied first.
using Segments = std::span<const Segment>;

/// The most spatial axes that a map of the region reads.
int rank_of(Segments segments);
/// The type of the region's constants; undefined where it has none. Throws NotLinear for several.
onnx::DataType type_of(Segments segments);
std::size_t count_nodes(Segments segments);
/// What budgets count.
double count_maps(Segments segments);
/// The name of the region's first constant with an element that is not finite; empty where all are.
std::string not_finite(const Graph& graph, Segments segments);
/// Whether a map of the region is of one of these kinds.
bool contains(Segments segments, std::initializer_list<LinearNode::Kind> kinds);

/// Where each tensor of a region has its channels.
class Layouts {
 public:
  /// Throws NotLinear where operators disagree.
  explicit Layouts(Segments segments) {
    do {
      changed_ = false;
      for (const Segment& segment : segments) {
        for (const LinearNode* map : segment.maps) join(*map);
      }
    } while (changed_);
    for (const Segment& segment : segments) {
      for (const LinearNode* map : segment.maps) {
        if (map->kind == LinearNode::Kind::move_channels && !find(map->operands.front()))
          throw NotLinear("no operator says along which axis its channels lie");
      }
    }
  }

  Layout operator[](int tensor) const { return find(tensor).value_or(Layout::channels_first); }

 private:
  std::optional<Layout> find(int tensor) const {
    const auto found = layouts_.find(tensor);
    return found == layouts_.end() ? std::nullopt : std::optional(found->second);
  }

  void set(std::span<const int> tensors, const std::optional<Layout>& layout) {
    if (!layout) return;
    for (const int tensor : tensors) {
      const auto [at, added] = layouts_.emplace(tensor, *layout);
      if (!added && at->second != *layout)
        throw NotLinear("operators take different axes for its channels");
      changed_ = changed_ || added;
    }
  }

  void join(const LinearNode& map) {
    std::optional<Layout> in = map.in, out = map.out;
    const auto across = [&](const std::optional<Layout>& layout) -> std::optional<Layout> {
      if (!layout || map.kind != LinearNode::Kind::move_channels) return layout;
      return *layout == Layout::channels_first ? Layout::channels_last : Layout::channels_first;
    };
    for (const int operand : map.operands) in = in ? in : find(operand);
    for (const int output : map.outputs) out = out ? out : find(output);
    set(map.operands, in ? in : across(out));
    set(map.outputs, out ? out : across(in));
  }

  std::map<int, Layout> layouts_;
  bool changed_ = false;
};

}  // namespace tool
