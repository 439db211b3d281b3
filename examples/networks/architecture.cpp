// Descriptions, what they cost, and their first numbers.
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

std::string to_text(const Extent& extent) {
  std::string text = std::to_string(extent.channels);
  if (extent.height == 1 && extent.width == 1) return text;
  return text + "x" + std::to_string(extent.height) + "x" + std::to_string(extent.width);
}

Index count(const Extent& extent) {
  return checked_multiply(checked_multiply(extent.channels, extent.height, "map"), extent.width,
                          "map");
}

// ---- described layers

ConvShape<2> conv_shape(const Node& node) {
  return {.out = node.out,
          .in = node.in,
          .kernel = {node.kernel.front(), node.kernel.back()},
          .geometry = geometry_of<2>(node.layer, node.where),
          .bias = node.bias};
}

ConvShape<0> linear_shape(const Node& node) {
  return {.out = node.out, .in = node.in, .bias = node.bias};
}

namespace {

Node layer_node(LayerType type, const std::string& name = "") {
  Node node;
  node.kind = Node::Kind::layer;
  node.type = type;
  node.layer.name = name;
  node.where = name.empty() ? std::string(name_of(type)) : name;
  return node;
}

}  // namespace

Node conv_node(const std::string& name, const ConvShape<2>& shape) {
  Node node = layer_node(LayerType::conv, name);
  const auto list = [](const PerAxis<2>& values) { return std::vector{values[0], values[1]}; };
  node.kernel = list(shape.kernel);
  node.layer.stride = list(shape.geometry.stride);
  node.layer.padding = list(shape.geometry.padding.start);
  if (shape.geometry.padding.end != shape.geometry.padding.start) {
    node.layer.padding_end = list(shape.geometry.padding.end);
  }
  node.layer.dilation = list(shape.geometry.dilation);
  node.layer.groups = shape.geometry.groups;
  node.out = shape.out;
  node.in = shape.in;
  node.bias = shape.bias;
  return node;
}

Node linear_node(const std::string& name, const ConvShape<0>& shape) {
  Node node = layer_node(LayerType::linear, name);
  node.layer.linear = true;
  node.out = shape.out;
  node.in = shape.in;
  node.bias = shape.bias;
  return node;
}

Extent output_of(const Node& node, const Extent& x) {
  const auto require = [&](bool holds, const std::string& what) {
    if (!holds) refuse_shape(node.where, what + ", but is given " + to_text(x));
  };
  const auto windows = [&](ConvShape<2> shape) -> Extent {
    try {
      const PerAxis<2> size = output_size(shape, PerAxis<2>{x.height, x.width});
      return {shape.out, size[0], size[1]};
    } catch (const concertina::ShapeError& error) {
      refuse_shape(node.where, error.what());
    }
  };
  switch (node.kind) {
    case Node::Kind::chain: {
      Extent extent = x;
      for (const Node& part : node.parts) extent = output_of(part, extent);
      return extent;
    }
    case Node::Kind::sum:
    case Node::Kind::concat: {
      Extent joined = output_of(node.parts.front(), x);
      for (std::size_t b = 1; b < node.parts.size(); ++b) {
        Extent branch = output_of(node.parts[b], x);
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
      return {node.out, (x.height - 1) * stride + kernel, (x.width - 1) * stride + kernel};
    }
    case LayerType::linear:
      require(x == Extent{node.in}, "it reads " + std::to_string(node.in) + " numbers");
      return {node.out};
    case LayerType::batch_norm:
      require(x.channels == node.out, "it reads " + std::to_string(node.out) + " channels");
      return x;
    case LayerType::avg_pool:
    case LayerType::max_pool:
      return windows({.out = x.channels,
                      .in = x.channels,
                      .kernel = {node.kernel.front(), node.kernel.back()},
                      .geometry = geometry_of<2>(node.layer, node.where)});
    case LayerType::global_avg_pool: return {x.channels};
    case LayerType::flatten: return {count(x)};
    case LayerType::channel_slice:
      require(node.end <= x.channels, "it takes channels up to " + std::to_string(node.end));
      return {node.end - node.begin, x.height, x.width};
    default: return x;
  }
}

// ---- builder

Builder& Builder::add(Node node) {
  extent_ = output_of(node, extent_);
  chain_.parts.push_back(std::move(node));
  return *this;
}

Builder& Builder::conv(const std::string& name, ConvShape<2> shape) {
  shape.in = extent_.channels;
  validate(shape);
  return add(conv_node(name, shape));
}

Builder& Builder::conv_transpose(const std::string& name, Index out, Index kernel) {
  Node node = layer_node(LayerType::conv_transpose, name);
  node.kernel = node.layer.stride = {kernel, kernel};
  node.out = out;
  node.in = extent_.channels;
  return add(std::move(node));
}

Builder& Builder::linear(const std::string& name, Index out) {
  return add(linear_node(name, {.out = out, .in = extent_.channels, .bias = true}));
}

Builder& Builder::batch_norm(const std::string& name) {
  Node node = layer_node(LayerType::batch_norm, name);
  node.eps = 1e-5;
  node.out = extent_.channels;
  return add(std::move(node));
}

Builder& Builder::plain(LayerType type) { return add(layer_node(type)); }

Builder& Builder::leaky_relu(double negative_slope) {
  Node node = layer_node(LayerType::leaky_relu);
  node.negative_slope = negative_slope;
  return add(std::move(node));
}

Builder& Builder::pool(LayerType type, Index kernel, Index stride, Index padding) {
  Node node = layer_node(type);
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
  Node node = layer_node(LayerType::channel_slice);
  node.begin = begin;
  node.end = end;
  return add(std::move(node));
}

Builder& Builder::channel_shuffle(Index groups) {
  Node node = layer_node(LayerType::channel_shuffle);
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

Cost cost_of(const Node& node, const Extent& x, const Extent& y, bool functional) {
  const Index bias = node.bias ? node.out : 0;
  switch (node.type) {
    case LayerType::conv:
      return {checked_add(weights(node), bias, "cost"),
              times(checked_add(weights(node), bias, "cost"), times(y.height, y.width))};
    case LayerType::conv_transpose:
      return {weights(node), times(weights(node), times(x.height, x.width))};
    case LayerType::linear: return {checked_add(weights(node), bias, "cost"), weights(node)};
    case LayerType::batch_norm: return {2 * node.out, times(2, count(y))};
    case LayerType::relu:
    case LayerType::relu6:
    case LayerType::leaky_relu: return {0, functional ? 0 : count(y)};
    case LayerType::avg_pool:
    case LayerType::max_pool: return {0, functional ? 0 : count(x)};
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

Extent add_costs(const Node& node, const Extent& x, bool functional,
                 std::vector<LayerCost>& layers) {
  if (node.kind == Node::Kind::layer) {
    const Extent y = output_of(node, x);
    layers.push_back({node.layer.name, described(node), y, cost_of(node, x, y, functional)});
    return y;
  }
  if (node.kind == Node::Kind::chain) {
    Extent extent = x;
    for (const Node& part : node.parts) extent = add_costs(part, extent, functional, layers);
    return extent;
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

// ---- first numbers

namespace {

class Initializer {
 public:
  explicit Initializer(std::uint64_t seed) : generator_(seed) {}

  concertina::io::Safetensors run(const Architecture& network) {
    modest_count<float>({total(layer_costs(network)).parameters}, network.title + ": parameters");
    file_.origin = network.name;
    file_.metadata = {{"chain", to_json(network.graph).dump()}, {"title", network.title}};
    fill(network.graph);
    const Extent& x = network.input;
    add("input", {1, x.channels, x.height, x.width}, -1, 1);
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
    std::vector<Index> extents{shape.out, shape.in / shape.geometry.groups};
    for (int axis = 0; axis < Rank; ++axis) extents.push_back(shape.kernel[axis]);
    concertina::Conv<float, Rank> layer(shape);
    concertina::initialize_uniform(layer, generator_);
    file_.add(node.layer.tensor("weight"), extents, layer.weight());
    if (shape.bias) file_.add(node.layer.tensor("bias"), {shape.out}, layer.bias());
  }

  void fill(const Node& node) {
    for (const Node& part : node.parts) fill(part);
    if (node.kind != Node::Kind::layer) return;
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
