// What holds in every graph that is read or written: names that are there once, and before they are
// read.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/detail/io/text.hpp>
#include <concertina/detail/text.hpp>
#include <concertina/error.hpp>
#include <concertina/io/onnx.hpp>

#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <string_view>
#include <unordered_map>

namespace concertina::onnx::detail {

using concertina::detail::fail;
using io::detail::in_quotes;
using io::detail::shown;

inline std::string about(const Tensor& tensor) { return "tensor " + in_quotes(tensor.name); }

/// node 3, "conv1" (Conv)
inline std::string about(const Node& node, std::size_t index) {
  return "node " + std::to_string(index) + ", " + in_quotes(node.name) + " (" +
         shown(node.op_type) + ")";
}

/// Refuses a tensor whose elements are not as many as its shape says; of a type whose elements
/// have no size here, any bytes fit.
inline void check_size(const std::string& where, const Tensor& tensor, std::size_t bytes) {
  const auto size = static_cast<std::int64_t>(size_of(tensor.type));
  const std::int64_t count = tensor.numel();
  if (size == 0) return;
  if (count > std::numeric_limits<std::int64_t>::max() / size) {
    fail<FormatError>({where, ": shape ", shown(tensor.dims), " of ", to_string(tensor.type),
                       " takes 2^63 bytes or more"});
  }
  if (std::cmp_not_equal(count * size, bytes)) {
    fail<FormatError>({where, ": ", to_string(tensor.type), " of shape ", shown(tensor.dims),
                       " takes ", count * size, " bytes, but there are ", bytes});
  }
}

/// Refuses what Model promises not to be.
inline void check_graph(const Model& model) {
  constexpr std::ptrdiff_t no_node = -1;
  std::unordered_map<std::string_view, std::ptrdiff_t> writers;  // of each tensor so far
  const auto writer = [&](std::ptrdiff_t index) {
    return index == no_node ? std::string("an input or initializer")
                            : about(model.nodes[static_cast<std::size_t>(index)],
                                    static_cast<std::size_t>(index));
  };
  const auto refuse = [&](const std::string& what) {
    fail<FormatError>({model.origin, ": ", what});
  };
  const auto add = [&](const std::string& name, std::ptrdiff_t index, const char* what) {
    if (name.empty()) refuse(std::string(what) + " without a name");
    const auto [at, added] = writers.emplace(name, index);
    if (!added) {
      refuse(std::string(what) + ' ' + in_quotes(name) + " of " + writer(index) +
             ": the name is taken by " + writer(at->second));
    }
  };

  for (const ValueInfo& input : model.inputs) add(input.name, no_node, "graph input");
  std::unordered_map<std::string_view, std::ptrdiff_t> inputs;
  inputs.swap(writers);
  for (const Tensor& tensor : model.initializers) add(tensor.name, no_node, "initializer");
  for (const std::string& name : model.sparse_initializers) {
    add(name, no_node, "sparse initializer");
  }
  writers.merge(inputs);  // before version 4 of the format, each initializer is an input too

  for (std::size_t i = 0; i < model.nodes.size(); ++i) {
    const Node& node = model.nodes[i];
    const auto index = static_cast<std::ptrdiff_t>(i);
    if (node.op_type.empty()) refuse(about(node, i) + ": there is no operator");
    const auto check_read = [&](const std::string& name) {
      if (name.empty() || writers.contains(name)) return;
      std::string why = "which nothing writes";
      for (std::size_t later = i; later < model.nodes.size(); ++later) {
        if (std::ranges::find(model.nodes[later].outputs, name) ==
            model.nodes[later].outputs.end()) {
          continue;
        }
        why = later == i ? "which it writes itself"
                         : "which " + about(model.nodes[later], later) + " writes after it";
        break;
      }
      refuse(about(node, i) + " reads tensor " + in_quotes(name) + ", " + why);
    };
    for (const std::string& name : node.inputs) check_read(name);
    for (const std::string& name : node.captured) check_read(name);
    for (const std::string& name : node.outputs) {
      if (!name.empty()) add(name, index, "output");
    }
  }
  for (const ValueInfo& output : model.outputs) {
    if (!writers.contains(output.name)) {
      refuse("graph output " + in_quotes(output.name) + " is written by no node");
    }
  }
}

}  // namespace concertina::onnx::detail
