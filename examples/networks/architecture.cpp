// Descriptions, what they cost, and their first elements.
// SPDX-License-Identifier: Apache-2.0
#include "architecture.hpp"

#include "tensor.hpp"

#include <concertina/conv.hpp>
#include <concertina/random.hpp>

#include <cmath>
#include <random>
#include <utility>

namespace tool {

using concertina::ConvShape, concertina::PerAxis;
using concertina::detail::checked_add, concertina::detail::checked_multiply;

std::string to_text(const MapShape<2>& map) {
  const std::string channels = std::to_string(map.channels);
  return numel(map.size) == 1 ? channels : channels + "x" + to_string(map.size);
}

// ---- described layers

ConvShape<2> conv_shape(const Node& node) {
  ConvShape<2> shape = geometry_of<2>(node.layer, node.where);
  shape.out = node.out;
  shape.in = node.in;
  shape.bias = node.bias;
  if (!node.kernel.empty()) shape.kernel_size = {node.kernel.front(), node.kernel.back()};
  return shape;
}

ConvShape<0> linear_shape(const Node& node) {
  return {.out = node.out, .in = node.in, .bias = node.bias};
}

namespace {

/// A layer of this type, its fields to be filled in.
Node node_of(LayerType type, const std::string& name = "") {
  Node node;
  node.kind = Node::Kind::layer;
  node.type = type;
  node.layer.name = name;
  node.where = name.empty() ? std::string(name_of(type)) : name;
  return node;
}

}  // namespace

MapShape<2> output_of(const Node& node, const MapShape<2>& x) {
  const auto require = [&](bool holds, const std::string& what) {
    if (!holds) refuse_shape(node.where, what + ", but is given " + to_text(x));
  };
  const auto windows = [&](const ConvShape<2>& shape) -> MapShape<2> {
    try {
      return {.channels = shape.out, .size = output_size(shape, x.size)};
    } catch (const concertina::ShapeError& error) {
      refuse_shape(node.where, error.what());
    }
  };
  switch (node.kind) {
    case Node::Kind::chain: {
      MapShape<2> map = x;
      for (const Node& part : node.parts) map = output_of(part, map);
      return map;
    }
    case Node::Kind::sum:
    case Node::Kind::concat: {
      MapShape<2> joined = output_of(node.parts.front(), x);
      for (std::size_t b = 1; b < node.parts.size(); ++b) {
        MapShape<2> branch = output_of(node.parts[b], x);
        const Index channels = branch.channels;
        if (node.kind == Node::Kind::concat) branch.channels = joined.channels;
        require(branch == joined, "branches write " + to_text(joined) + " and " + to_text(branch));
        if (node.kind == Node::Kind::concat) joined.channels += channels;
      }
      return joined;
    }
    case Node::Kind::layer: break;
  }
  switch (node.type) {
    case LayerType::conv:
      require(x.channels == node.in, "it reads " + std::to_string(node.in) + " channels");
      return windows(conv_shape(node));
    case LayerType::conv_transpose: {
      require(x.channels == node.in, "it reads " + std::to_string(node.in) + " channels");
      const Index stride = node.layer.stride.front(), kernel = node.kernel.front();
      return {.channels = node.out,
              .size = {(x.size[0] - 1) * stride + kernel, (x.size[1] - 1) * stride + kernel}};
    }
    case LayerType::linear:
      require(x == MapShape<2>{.channels = node.in},
              "it reads " + std::to_string(node.in) + " elements");
      return {.channels = node.out};
    case LayerType::batch_norm:
      require(x.channels == node.out, "it reads " + std::to_string(node.out) + " channels");
      return x;
    case LayerType::avg_pool:
    case LayerType::max_pool: {
      ConvShape<2> shape = geometry_of<2>(node.layer, node.where);
      shape.out = shape.in = x.channels;
      shape.kernel_size = {node.kernel.front(), node.kernel.back()};
      return windows(shape);
    }
    case LayerType::global_avg_pool: return {.channels = x.channels};
    case LayerType::flatten: return {.channels = numel(x)};
    case LayerType::channel_slice:
      require(node.end <= x.channels, "it takes channels up to " + std::to_string(node.end));
      return {.channels = node.end - node.begin, .size = x.size};
    default: return x;
  }
}

// ---- builder

Builder& Builder::add(Node node) {
  map_ = output_of(node, map_);
  chain_.parts.push_back(std::move(node));
  return *this;
}

Builder& Builder::conv(const std::string& name, ConvShape<2> shape) {
  shape.in = map_.channels;
  validate(shape);
  return add(layer_node(name, shape));
}

Builder& Builder::conv_transpose(const std::string& name, Index out, Index kernel) {
  Node node = node_of(LayerType::conv_transpose, name);
  node.kernel = node.layer.stride = {kernel, kernel};
  node.out = out;
  node.in = map_.channels;
  return add(std::move(node));
}

Builder& Builder::linear(const std::string& name, Index out) {
  return add(layer_node<0>(name, {.out = out, .in = map_.channels, .bias = true}));
}

Builder& Builder::batch_norm(const std::string& name) {
  Node node = node_of(LayerType::batch_norm, name);
  node.eps = 1e-5;
  node.out = map_.channels;
  return add(std::move(node));
}

Builder& Builder::plain(LayerType type) { return add(node_of(type)); }

Builder& Builder::leaky_relu(double negative_slope) {
  Node node = node_of(LayerType::leaky_relu);
  node.negative_slope = negative_slope;
  return add(std::move(node));
}

Builder& Builder::pool(LayerType type, Index kernel, Index stride, Index padding) {
  Node node = node_of(type);
  node.kernel = {kernel, kernel};
  node.layer.stride = {stride, stride};
  node.layer.padding = {padding, padding};
  return add(std::move(node));
}

Builder& Builder::max_pool(Index kernel, Index stride, Index padding) {
  return pool(LayerType::max_pool, kernel, stride, padding);
}

Builder& Builder::avg_pool(Index kernel, Index stride) {
  return pool(LayerType::avg_pool, kernel, stride, 0);
}

Builder& Builder::channel_slice(Index begin, Index end) {
  Node node = node_of(LayerType::channel_slice);
  node.begin = begin;
  node.end = end;
  return add(std::move(node));
}

Builder& Builder::channel_shuffle(Index groups) {
  Node node = node_of(LayerType::channel_shuffle);
  node.layer.groups = groups;
  return add(std::move(node));
}

Builder& Builder::join(Node::Kind kind, const std::vector<Builder>& branches) {
  Node node;
  node.kind = kind;
  node.where = kind == Node::Kind::sum ? "sum" : "concat";
  for (const Builder& branch : branches) node.parts.push_back(branch.chain_);
  return add(std::move(node));
}

Builder& Builder::sum(const std::vector<Builder>& branches) {
  return join(Node::Kind::sum, branches);
}

Builder& Builder::concat(const std::vector<Builder>& branches) {
  return join(Node::Kind::concat, branches);
}

// ---- cost

namespace {

Index times(Index a, Index b) { return checked_multiply(a, b, "cost"); }

Index weights(const Node& node) {
  Index taps = 1;
  for (const Index extent : node.kernel) taps = times(taps, extent);
  return times(times(node.out, node.in / node.layer.groups), taps);
}

Cost cost_of(const Node& node, const MapShape<2>& x, const MapShape<2>& y, bool functional) {
  const Index bias = node.bias ? node.out : 0;
  switch (node.type) {
    case LayerType::conv:
      return {checked_add(weights(node), bias, "cost"),
              times(checked_add(weights(node), bias, "cost"), numel(y.size))};
    case LayerType::conv_transpose: return {weights(node), times(weights(node), numel(x.size))};
    case LayerType::linear: return {checked_add(weights(node), bias, "cost"), weights(node)};
    case LayerType::batch_norm: return {2 * node.out, times(2, numel(y))};
    case LayerType::relu:
    case LayerType::relu6:
    case LayerType::leaky_relu: return {0, functional ? 0 : numel(y)};
    case LayerType::avg_pool:
    case LayerType::max_pool: return {0, functional ? 0 : numel(x)};
    default: return {};
  }
}

std::string described(const Node& node) {
  switch (node.type) {
    case LayerType::conv: return to_string(conv_shape(node));
    case LayerType::linear: return to_string(linear_shape(node));
    case LayerType::conv_transpose:
      return "conv_transpose2d " + std::to_string(node.in) + "->" + std::to_string(node.out) +
             " @" + std::to_string(node.kernel.front()) + "x" + std::to_string(node.kernel.back()) +
             " s" + std::to_string(node.layer.stride.front()) + "x" +
             std::to_string(node.layer.stride.back());
    default: return std::string(name_of(node.type));
  }
}

MapShape<2> add_costs(const Node& node, const MapShape<2>& x, bool functional,
                      std::vector<LayerCost>& layers) {
  if (node.kind == Node::Kind::layer) {
    const MapShape<2> y = output_of(node, x);
    layers.push_back({node.layer.name, described(node), y, cost_of(node, x, y, functional)});
    return y;
  }
  if (node.kind == Node::Kind::chain) {
    MapShape<2> map = x;
    for (const Node& part : node.parts) map = add_costs(part, map, functional, layers);
    return map;
  }
  for (const Node& part : node.parts) add_costs(part, x, functional, layers);
  return output_of(node, x);
}

}  // namespace

std::vector<LayerCost> layer_costs(const Architecture& network) {
  std::vector<LayerCost> layers;
  add_costs(network.graph, network.input, network.functional, layers);
  return layers;
}

Cost total(const std::vector<LayerCost>& layers) {
  Cost sum;
  for (const LayerCost& layer : layers) {
    sum.parameters = checked_add(sum.parameters, layer.cost.parameters, "parameters");
    sum.multiply_adds = checked_add(sum.multiply_adds, layer.cost.multiply_adds, "multiply-adds");
  }
  return sum;
}

// ---- first elements

namespace {

class Initializer {
 public:
  explicit Initializer(std::uint64_t seed) : generator_(seed) {}

  concertina::io::Safetensors run(const Architecture& network) {
    modest_count<float>({total(layer_costs(network)).parameters}, network.title + ": parameters");
    file_.origin = network.name;
    file_.metadata = {{"chain", to_json(network.graph).dump()}, {"title", network.title}};
    for_each_layer(network.graph, [this](const Node& node) { fill(node); });
    const auto& [batch, channels, size] = network.input;
    add("input", {batch, channels, size[0], size[1]}, -1, 1);
    return std::move(file_);
  }

 private:
  /// Uniform from `least` to `most`.
  void add(const std::string& name, std::vector<Index> shape, double least, double most) {
    std::vector<float> values(static_cast<std::size_t>(modest_count<float>(shape, name)));
    for (float& value : values) {
      value = static_cast<float>((least + most) / 2 +
                                 concertina::random_uniform(generator_, (most - least) / 2));
    }
    file_.add(name, std::move(shape), values);
  }

  template <int Rank>
  void add_layer(const Node& node, const ConvShape<Rank>& shape) {
    std::vector<Index> extents{shape.out, shape.in / shape.groups};
    for (int axis = 0; axis < Rank; ++axis) extents.push_back(shape.kernel_size[axis]);
    concertina::Conv<float, Rank> layer(shape);
    concertina::initialize_uniform(layer, generator_);
    file_.add(node.layer.tensor("weight"), extents, layer.weight());
    if (shape.bias) file_.add(node.layer.tensor("bias"), {shape.out}, layer.bias());
  }

  void fill(const Node& node) {
    if (node.type == LayerType::conv) {
      add_layer(node, conv_shape(node));
    } else if (node.type == LayerType::linear) {
      add_layer(node, linear_shape(node));
    } else if (node.type == LayerType::conv_transpose) {
      const double bound = 1 / std::sqrt(static_cast<double>(node.in));
      add(node.layer.tensor("weight"), {node.in, node.out, node.kernel.front(), node.kernel.back()},
          -bound, bound);
    } else if (node.type == LayerType::batch_norm) {
      add(node.layer.tensor("weight"), {node.out}, 0.5, 1.5);
      add(node.layer.tensor("bias"), {node.out}, -0.5, 0.5);
      add(node.layer.tensor("running_mean"), {node.out}, -0.1, 0.1);
      add(node.layer.tensor("running_var"), {node.out}, 0.1, 0.3);
    }
  }

  std::mt19937_64 generator_;
  concertina::io::Safetensors file_;
};

}  // namespace

concertina::io::Safetensors initialized(const Architecture& network, std::uint64_t seed) {
  return Initializer(seed).run(network);
}

}  // namespace tool
