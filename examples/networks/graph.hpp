// A whole network as a file's metadata describes it: layers, chains, sums and concatenations; names
// and geometry, no numbers yet.
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

/// Whether a node is a linear map, biases aside: conv, linear, batch_norm, scale, avg_pool,
/// channel_slice, channel_shuffle, and what is made of only such.
bool is_linear(const Node& node);

/// Whether a node says that it stands for one layer: with an expected one, or as a chain with a
/// name.
bool is_expanded(const Node& node);

/// The layer's name in the compact network. Requires is_expanded.
const std::string& compact_name(const Node& node);

/// As the format writes it: the inverse of parse_graph, but for tensors and expected layers.
nlohmann::json to_json(const Node& node);

/// As the format writes it.
std::string_view name_of(LayerType type);

}  // namespace tool
