// SPDX-License-Identifier: Apache-2.0
#include "onnx/regions.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <set>

namespace tool {

LinearGraph::LinearGraph(const Graph& graph, Flattenings flattenings) : graph_(graph) {
  const std::size_t count = graph.model().nodes.size();
  nodes_.resize(count);
  reasons_.resize(count);
  Budget lists = graph.budget().part(1.0 / 32);  // copied where layers are made of them
  for (std::size_t n = 0; n < count; ++n) {
    const int node = static_cast<int>(n);
    nodes_[n] = linear_node(graph, node, flattenings, lists, reasons_[n]);
    if (std::string why = graph.unfolded(node); !why.empty()) reasons_[n] = std::move(why);
  }
}

const LinearNode* LinearGraph::maker(int tensor) const {
  const int producer = graph_[tensor].producer;
  if (producer < 0) return nullptr;
  const auto& node = nodes_[static_cast<std::size_t>(producer)];
  return node ? &*node : nullptr;
}

namespace {

/// Whether tensors may be of one type, as far as that is known.
bool same_type(onnx::DataType a, onnx::DataType b) {
  return a == b || a == onnx::DataType::undefined || b == onnx::DataType::undefined;
}

}  // namespace

std::vector<Segment> segments_to(const LinearGraph& linear, int tensor,
                                 const std::function<bool(int)>& taken) {
  const Graph& graph = linear.graph();
  std::set<int> nodes;
  std::vector<Segment> segments;
  Segment current{.to = tensor};
  std::size_t count = 0;

  // The map that makes a tensor, if it can be taken in: everything that reads what it writes is.
  const auto addable = [&](int t) -> const LinearNode* {
    const LinearNode* map = linear.maker(t);
    if (!map || std::ranges::any_of(map->nodes, taken) ||
        !same_type(graph[t].type, graph[tensor].type))
      return nullptr;
    for (const int output : map->outputs) {
      if (output == tensor) continue;
      const GraphTensor& written = graph[output];
      if (written.escapes) return nullptr;
      if (!std::ranges::all_of(written.consumers, [&](int node) { return nodes.contains(node); }))
        return nullptr;
    }
    return map;
  };

  // The latest first, so that what everything passes through is seen alone. Ties cannot be: a
  // producer writes several tensors only where it splits channels, which it does once.
  const auto later = [&](int a, int b) {
    return std::pair(graph[a].producer, a) > std::pair(graph[b].producer, b);
  };
  std::set<int, decltype(later)> frontier({tensor}, later);
  while (count < longest_region) {
    if (frontier.size() == 1 && !current.maps.empty()) {
      current.from = *frontier.begin();
      segments.push_back(std::move(current));
      current = {.to = segments.back().from};
    }
    const auto next = std::ranges::find_if(frontier, [&](int t) { return addable(t) != nullptr; });
    if (next == frontier.end()) break;
    const LinearNode* map = addable(*next);
    for (const int output : map->outputs) frontier.erase(output);
    for (const int operand : map->operands) {
      if (operand < 0 || graph[operand].constant) return segments;
      frontier.insert(operand);
    }
    nodes.insert(map->nodes.begin(), map->nodes.end());
    current.maps.push_back(map);
    ++count;
  }
  return segments;
}

int rank_of(Segments segments) {
  int rank = 0;
  for (const Segment& segment : segments) {
    for (const LinearNode* map : segment.maps) rank = std::max(rank, map->spatial_axes);
  }
  return rank;
}

onnx::DataType type_of(Segments segments) {
  onnx::DataType type = onnx::DataType::undefined;
  for (const Segment& segment : segments) {
    for (const LinearNode* map : segment.maps) {
      if (!same_type(type, map->type)) throw NotLinear("its constants are of several types");
      if (map->type != onnx::DataType::undefined) type = map->type;
    }
  }
  return type;
}

std::size_t count_nodes(Segments segments) {
  std::size_t count = 0;
  for (const Segment& segment : segments) {
    for (const LinearNode* map : segment.maps) count += map->nodes.size();
  }
  return count;
}

double count_maps(Segments segments) {
  std::size_t count = 0;
  for (const Segment& segment : segments) count += segment.maps.size();
  return static_cast<double>(count);
}

std::string not_finite(const Graph& graph, Segments segments) {
  constexpr std::array floating = {onnx::DataType::float16, onnx::DataType::bfloat16,
                                   onnx::DataType::float32, onnx::DataType::float64};
  for (const Segment& segment : segments) {
    for (const LinearNode* map : segment.maps) {
      for (const int node : map->nodes) {
        for (std::size_t i = 0; i < graph.node(node).inputs.size(); ++i) {
          const onnx::Tensor* const tensor = graph.constant(node, i);
          if (!tensor || !std::ranges::count(floating, tensor->type)) continue;
          const auto elements = tensor->values<double>();
          if (!std::ranges::all_of(elements, [](double x) { return std::isfinite(x); })) {
            return graph.node(node).inputs[i];
          }
        }
      }
    }
  }
  return {};
}

bool contains(Segments segments, std::initializer_list<LinearNode::Kind> kinds) {
  return std::ranges::any_of(segments, [&](const Segment& segment) {
    return std::ranges::any_of(segment.maps, [&](const LinearNode* map) {
      return std::ranges::find(kinds, map->kind) != kinds.end();
    });
  });
}

}  // namespace tool
