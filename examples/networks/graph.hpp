// A whole network as a file's metadata describes it: layers, chains, sums and concatenations; names
// and geometry, no elements yet.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "layer_description.hpp"

#include <concertina/io/safetensors.hpp>

#include <nlohmann/json.hpp>

#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace tool {

enum class LayerType {
  conv,
  linear,
  batch_norm,
  scale,
  avg_pool,
  max_pool,
  global_avg_pool,
  relu,
  relu6,
  leaky_relu,
  conv_transpose,
  flatten,
  channel_slice,
  channel_shuffle,
  normalize
};

/// The single layer that somebody else made of a node.
struct Expectation {
  LayerDescription layer;     // linear if its geometry is null
  bool has_geometry = false;  // the geometry is stated, be it null
};

/// A map from one input to one output.
struct Node {
  enum class Kind { layer, chain, sum, concat };

  Kind kind = Kind::chain;
  std::vector<Node> parts;  // of a chain, first-applied first (none: the identity); branches, at
                            // least one; none of a layer

  // Of a layer, but for the name. What its type does not have keeps its default.
  LayerType type = LayerType::conv;
  LayerDescription layer;     // the name of its tensors, of a chain that of the layer it contracts
                              // to; the geometry of a conv, stride and padding of a pool, groups
                              // of a channel_shuffle
  std::vector<Index> kernel;  // avg_pool, max_pool: one number per spatial axis, or one for all
  double eps = 0;             // batch_norm
  double negative_slope = 0;  // leaky_relu
  Index begin = 0, end = 0;   // channel_slice: begin <= channel < end
  double divide = 1;          // normalize: (x / divide - mean[channel]) / std[channel]
  std::vector<double> mean, std;

  // What the tensors of a conv, conv_transpose, linear or batch_norm (out) say, kernel included;
  // known of networks that a program describes (architecture.hpp), not of those that a file does.
  Index out = 0, in = 0;
  bool bias = false;

  std::optional<Expectation> expected;
  std::optional<bool> exact;  // what the root's field "exact" claims: everywhere, or in the
                              // interior only
  std::string where;          // the place, for messages: FILE: metadata "chain".layers[3]
};

/// The network that the metadata key "chain" describes; without this key, the one layer whose
/// geometry the key "conv" has and whose tensors are weight and bias.
/// Ensures  what the fields of one node can tell: strides, dilations, kernels and groups are
///          positive, no window of a max_pool is all padding, normalize has a mean and std each
/// Throws   FormatError naming the place, for what is unknown also with what is supported
Node parse_graph(const concertina::io::Safetensors& file);

/// Calls visit(layer) for every layer, in the order in which they are written down.
template <class Visit>
void for_each_layer(const Node& node, const Visit& visit) {
  if (node.kind == Node::Kind::layer) visit(node);
  for (const Node& part : node.parts) for_each_layer(part, visit);
}

/// A layer of this shape; linear for rank 0.
template <int Rank>
Node layer_node(const std::string& name, const concertina::ConvShape<Rank>& shape) {
  const auto list = [](const concertina::PerAxis<Rank>& values) {
    return std::vector<Index>(values.begin(), values.end());
  };
  const auto& padding = shape.padding;
  Node node;
  node.kind = Node::Kind::layer;
  node.type = Rank == 0 ? LayerType::linear : LayerType::conv;
  node.kernel = list(shape.kernel_size);
  node.layer = {.name = name,
                .linear = Rank == 0,
                .stride = list(shape.stride),
                .padding = list(padding.start),
                .padding_end = {},
                .dilation = list(shape.dilation),
                .groups = shape.groups};
  if (padding.end != padding.start) node.layer.padding_end = list(padding.end);
  node.out = shape.out;
  node.in = shape.in;
  node.bias = shape.bias;
  node.where = name;
  return node;
}

/// Whether a node is a linear map, biases aside: conv, linear, batch_norm, scale, avg_pool,
/// channel_slice, channel_shuffle, and what is made of only such.
bool is_linear(const Node& node);

/// Whether a node says that it stands for one layer: with an expected one, or as a chain with a
/// name.
bool is_expanded(const Node& node);

/// The layer's name in the compact network. Requires is_expanded.
const std::string& compact_name(const Node& node);

/// As the format writes it; parse_graph reads it back, but for expected layers and the root's claim
/// "exact", which are not written.
nlohmann::json to_json(const Node& node);

/// As the format writes it.
std::string_view name_of(LayerType type);

}  // namespace tool
