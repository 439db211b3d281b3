// What holds in every graph that is read or written: names that are there once, and before they are
// read.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/detail/io/text.hpp>
#include <concertina/detail/text.hpp>
#include <concertina/error.hpp>
#include <concertina/io/onnx.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <string_view>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

namespace concertina::onnx::detail {

using concertina::detail::fail;
using io::detail::in_quotes;
using io::detail::shown;

inline constexpr std::int64_t integer_limit = std::numeric_limits<std::int64_t>::max();

inline std::string about(const Tensor& tensor) { return "tensor " + in_quotes(tensor.name); }

/// node 3, "conv1" (Conv)
inline std::string about(const Node& node, std::size_t index) {
  return "node " + std::to_string(index) + ", " + in_quotes(node.name) + " (" +
         shown(node.op_type) + ")";
}

/// Elements in the shape. Refuses negative dimensions and a product that overflows, even if the
/// zeros in it are left out.
inline std::int64_t count(const std::string& where, const std::vector<std::int64_t>& dims) {
  std::int64_t product = 1;
  bool empty = false;
  for (const std::int64_t dimension : dims) {
    if (dimension < 0) {
      fail<FormatError>({where, ": shape ", shown(dims), " has a negative dimension"});
    }
    empty = empty || dimension == 0;
    const std::int64_t factor = std::max<std::int64_t>(dimension, 1);
    if (product > integer_limit / factor) {
      fail<FormatError>({where, ": shape ", shown(dims), " has 2^63 elements or more"});
    }
    product *= factor;
  }
  return empty ? 0 : product;
}

/// Bytes that the shape takes; 0 for a type whose elements have no size here.
inline std::int64_t bytes_in(const std::string& where, const Tensor& tensor) {
  const auto size = static_cast<std::int64_t>(size_of(tensor.type));
  const std::int64_t elements = count(where, tensor.dims);
  if (size > 0 && elements > integer_limit / size) {
    fail<FormatError>({where, ": shape ", shown(tensor.dims), " of ", to_string(tensor.type),
                       " takes 2^63 bytes or more"});
  }
  return elements * size;
}

/// Refuses elements that are not as many bytes as the shape takes, where that is known.
inline void check_size(const std::string& where, const Tensor& tensor) {
  const std::int64_t needed = bytes_in(where, tensor);
  if (size_of(tensor.type) != 0 && std::cmp_not_equal(needed, tensor.elements.size())) {
    fail<FormatError>({where, ": ", to_string(tensor.type), " of shape ", shown(tensor.dims),
                       " takes ", needed, " bytes, but there are ", tensor.elements.size()});
  }
}

/// Refuses what Model promises not to be.
inline void check_graph(const Model& model) {
  const auto& nodes = model.nodes;
  std::unordered_map<std::string_view, std::size_t> writers;  // of each tensor, by node
  const std::size_t no_node = nodes.size();                   // writes inputs and initializers
  const auto refuse = [&](const std::string& what) {
    fail<FormatError>({model.origin, ": ", what});
  };
  const auto add = [&](const std::string& what, const std::string& name) {
    if (name.empty()) refuse(what + " without a name");
    if (!writers.emplace(name, no_node).second) {
      refuse(what + ' ' + in_quotes(name) + " is there twice");
    }
  };

  const auto once = [&](const auto& list, auto name, const std::string& what) {
    std::unordered_set<std::string_view> names;
    for (const auto& each : list) {
      if (!names.insert(each.*name).second)
        refuse(what + ' ' + in_quotes(each.*name) + " is there twice");
    }
  };
  once(model.opsets, &OperatorSet::domain, "operators of the domain");
  for (const OperatorSet& each : model.opsets) {
    if ((each.domain.empty() || each.domain == "ai.onnx") && each.version != model.opset())
      refuse("its operators are of the versions " + std::to_string(model.opset()) + " and " +
             std::to_string(each.version) + ", under both names of their domain");
  }

  for (const ValueInfo& input : model.inputs) add("graph input", input.name);
  const auto inputs = std::exchange(writers, {});  // an initializer may be an input too
  for (const Tensor& tensor : model.initializers) add("initializer", tensor.name);
  for (const std::string& name : model.sparse_initializers) add("initializer", name);
  writers.insert(inputs.begin(), inputs.end());

  for (std::size_t i = 0; i < nodes.size(); ++i) {
    if (nodes[i].op_type.empty()) refuse(about(nodes[i], i) + ": there is no operator");
    once(nodes[i].attributes, &Attribute::name, about(nodes[i], i) + ": attribute");
    const auto check_read = [&](const std::string& name) {
      if (name.empty() || writers.contains(name)) return;
      const auto later = std::find_if(
          nodes.begin() + static_cast<std::ptrdiff_t>(i), nodes.end(), [&](const Node& node) {
            return std::ranges::find(node.outputs, name) != node.outputs.end();
          });
      const auto at = static_cast<std::size_t>(later - nodes.begin());
      refuse(about(nodes[i], i) + " reads tensor " + in_quotes(name) + ", which " +
             (at == no_node ? "nothing writes"
              : at == i     ? "it writes itself"
                            : about(*later, at) + " writes after it"));
    };
    std::ranges::for_each(nodes[i].inputs, check_read);
    std::ranges::for_each(nodes[i].captured, check_read);
    for (const std::string& name : nodes[i].outputs) {
      if (name.empty()) continue;
      const auto [writer, added] = writers.emplace(name, i);
      if (added) continue;
      refuse(about(nodes[i], i) + " writes tensor " + in_quotes(name) + ", which " +
             (writer->second == no_node
                  ? "is a graph input or initializer"
                  : about(nodes[writer->second], writer->second) +
                        (writer->second == i ? " writes twice" : " writes too")));
    }
  }
  for (const ValueInfo& output : model.outputs) {
    if (!writers.contains(output.name)) {
      refuse("graph output " + in_quotes(output.name) + " is not a tensor of the graph");
    }
  }
}

}  // namespace concertina::onnx::detail
