// The architecture of a network, without its elements: layers, shapes and connections, from which
// cost and expansion follow.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "graph.hpp"

#include <concertina/feature_map.hpp>
#include <concertina/io/safetensors.hpp>
#include <concertina/shape.hpp>

#include <cstdint>
#include <string>
#include <vector>

namespace tool {

/// One image's map, after a flatten only channels: "3x32x32", "512".
using concertina::MapShape;
std::string to_text(const MapShape<2>& map);

/// How the paper expands some layers of a network by one strategy; what it leaves to the default
/// is as ExpandOptions has it.
struct Recipe {
  std::string strategy;             // cl, ck or fc
  std::vector<std::string> layers;  // their names
  bool narrow_first = false;        // the first map between keeps the image's channels
  bool depthwise_middle = false;    // cl: the middle layer mixes no channels
  bool inner_bias = false;          // biases on all layers but the last, of layers without one
};

struct Architecture {
  std::string name = {}, title;
  MapShape<2> input;  // of one image
  Node graph;
  bool functional = false;  // activations and pools are function calls, which the paper's count
                            // does not see
  std::vector<Recipe> recipes = {};
};

/// The shape of a described layer; a linear one as a convolution is a 1x1 on a map of one position.
concertina::ConvShape<2> conv_shape(const Node& node);
concertina::ConvShape<0> linear_shape(const Node& node);

/// What a described node writes for one image. Throws ShapeError naming the layer that it does not
/// fit.
MapShape<2> output_of(const Node& node, const MapShape<2>& input);

/// Describes a chain of layers, each reading what the one before writes.
class Builder {
 public:
  explicit Builder(const MapShape<2>& input) : map_(input) {}

  /// A branch that reads what the next layer here would.
  Builder branch() const { return Builder(map_); }
  Index channels() const { return map_.channels; }
  Node graph() const { return chain_; }

  /// `shape.in` is filled in.
  Builder& conv(const std::string& name, concertina::ConvShape<2> shape);
  /// Windows of `kernel` side by side, without bias.
  Builder& conv_transpose(const std::string& name, Index out, Index kernel);
  Builder& linear(const std::string& name, Index out);
  Builder& batch_norm(const std::string& name);
  /// relu, relu6, flatten, global_avg_pool.
  Builder& plain(LayerType type);
  Builder& leaky_relu(double negative_slope);
  Builder& max_pool(Index kernel, Index stride, Index padding = 0);
  Builder& avg_pool(Index kernel, Index stride);
  Builder& channel_slice(Index begin, Index end);
  Builder& channel_shuffle(Index groups);
  Builder& sum(const std::vector<Builder>& branches);
  Builder& concat(const std::vector<Builder>& branches);

 private:
  Builder& add(Node node);
  Builder& pool(LayerType type, Index kernel, Index stride, Index padding);
  Builder& join(Node::Kind kind, const std::vector<Builder>& branches);

  Node chain_;
  MapShape<2> map_;
};

/// Trainable elements and multiply-adds, counted as the paper's Table S10 counts them.
///
/// Multiply-adds of one image: a convolution's taps for each element it writes, and one more if it
/// has a bias; a transposed convolution's for each position it reads; a linear layer's weights; 2
/// for each element that a batch norm writes; 1 for each that an activation writes or a pool reads,
/// unless the network calls these as functions. Means over the whole map count nothing.
struct Cost {
  Index parameters = 0, multiply_adds = 0;

  friend bool operator==(const Cost&, const Cost&) = default;
};

struct LayerCost {
  std::string name, layer;  // its shape, or its type
  MapShape<2> output;
  Cost cost;
};

/// The layers' costs in the order in which they run. Throws ShapeError for layers that do not fit,
/// SizeError where a count overflows.
std::vector<LayerCost> layer_costs(const Architecture& network);
Cost total(const std::vector<LayerCost>& layers);

/// The file of a network with random weights: layers initialised as PyTorch does, batch norms with
/// random factors and statistics, and an `input` of one image, uniform in -1 to 1. Reproducible
/// from the seed.
/// Throws  SizeError for more than 4 GiB of elements, before any is made
concertina::io::Safetensors initialized(const Architecture& network, std::uint64_t seed);

}  // namespace tool
