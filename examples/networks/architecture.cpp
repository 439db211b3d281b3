// What architectures cost, and their first elements.
// SPDX-License-Identifier: Apache-2.0
#include "architecture.hpp"

#include "onnx/builder.hpp"

#include <concertina/error.hpp>
#include <concertina/random.hpp>

#include <cmath>
#include <functional>
#include <map>
#include <numeric>
#include <random>

namespace tool {

using concertina::ConvShape, concertina::PerAxis;
using concertina::detail::checked_add, concertina::detail::checked_multiply;

namespace {

Index times(Index a, Index b) { return checked_multiply(a, b, "cost"); }

/// The product of the extents from an axis on.
Index product(const Dims& dims, std::size_t axis = 0) {
  return std::accumulate(dims.begin() + static_cast<std::ptrdiff_t>(axis), dims.end(), Index{1},
                         times);
}

const Dims& dims_of(const Graph& graph, int tensor) { return graph[tensor].sizes.value(); }

/// Of the node's i-th input.
const Dims& input_dims(const Graph& graph, int node, std::size_t i) {
  return dims_of(graph, graph.input(node, i));
}

bool has_bias(const Graph& graph, int node) { return graph.node(node).inputs.size() > 2; }

}  // namespace

Dims image_of(const Architecture& network) {
  Dims image;
  for (const onnx::Dimension& extent : network.model.inputs.front().shape.value()) {
    if (extent.value) image.push_back(*extent.value);
  }
  return image;
}

ConvShape<2> conv_shape(const Graph& graph, int node) {
  const Dims& weight = input_dims(graph, node, 1);
  const onnx::Node& conv = graph.node(node);
  const auto pair = [&](const char* name) -> PerAxis<2> {
    const Dims values = conv.integers(name, {});
    return {values.at(0), values.at(1)};
  };
  const Dims pads = conv.integers("pads", {});
  ConvShape<2> shape{.out = weight.at(0),
                     .kernel_size = pair("kernel_shape"),
                     .stride = pair("strides"),
                     .dilation = pair("dilations"),
                     .groups = conv.integer("group", 1),
                     .bias = has_bias(graph, node)};
  shape.in = weight.at(1) * shape.groups;
  shape.padding = concertina::Padding<2>::sides({pads.at(0), pads.at(1)}, {pads.at(2), pads.at(3)});
  return shape;
}

ConvShape<0> linear_shape(const Graph& graph, int node) {
  const Dims& weight = input_dims(graph, node, 1);
  return {.out = weight.at(0), .in = weight.at(1), .bias = has_bias(graph, node)};
}

// ---- cost

namespace {

Cost cost_of(const Graph& graph, int node, bool functional) {
  const std::string& type = graph.node(node).op_type;
  const Dims &x = input_dims(graph, node, 0), &y = dims_of(graph, graph.output(node));
  if (type == "Conv" || type == "ConvTranspose" || type == "Gemm") {
    const Dims& weight = input_dims(graph, node, 1);
    const Index weights = product(weight), bias = has_bias(graph, node) ? weight.front() : 0;
    const Index parameters = checked_add(weights, bias, "cost");
    if (type == "Gemm") return {parameters, weights};
    return {parameters, times(parameters, product(type == "Conv" ? y : x, 2))};
  }
  if (type == "BatchNormalization") return {2 * y[1], times(2, product(y, 1))};
  if (functional) return {};
  if (type == "Relu" || type == "Clip" || type == "LeakyRelu") return {0, product(y, 1)};
  if (type == "AveragePool" || type == "MaxPool") return {0, product(x, 1)};
  return {};
}

std::string described(const Graph& graph, int node) {
  const std::string& type = graph.node(node).op_type;
  if (type == "Conv") return to_string(conv_shape(graph, node));
  if (type == "Gemm") return to_string(linear_shape(graph, node));
  if (type != "ConvTranspose") return type;
  const Dims& weight = input_dims(graph, node, 1);
  const Dims strides = graph.node(node).integers("strides", {});
  return "conv_transpose2d " + std::to_string(weight[0]) + "->" + std::to_string(weight[1]) + " @" +
         std::to_string(weight[2]) + "x" + std::to_string(weight[3]) + " s" +
         std::to_string(strides.at(0)) + "x" + std::to_string(strides.at(1));
}

}  // namespace

std::vector<LayerCost> layer_costs(const Architecture& network) {
  const Graph graph(network.model, {});
  std::vector<LayerCost> layers;
  for (int node = 0; node < static_cast<int>(network.model.nodes.size()); ++node) {
    const Dims& y = dims_of(graph, graph.output(node));
    layers.push_back({.name = graph.node(node).name,
                      .layer = described(graph, node),
                      .output = {y.begin() + 1, y.end()},
                      .cost = cost_of(graph, node, network.functional)});
  }
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

onnx::Model initialized(const Architecture& network, std::uint64_t seed) {
  constexpr Index most = (Index{1} << 32) / static_cast<Index>(sizeof(float));
  if (total(layer_costs(network)).parameters > most) {
    throw concertina::SizeError(network.title + ": its parameters take more than 4 GiB");
  }
  struct Range {
    double least, most;
  };
  std::map<std::string, Range> ranges;
  const Graph graph(network.model, {});
  for (int node = 0; node < static_cast<int>(network.model.nodes.size()); ++node) {
    const std::string& type = graph.node(node).op_type;
    const std::vector<std::string>& inputs = graph.node(node).inputs;
    if (type == "BatchNormalization") {
      ranges[inputs[1]] = {0.5, 1.5};
      ranges[inputs[2]] = {-0.5, 0.5};
      ranges[inputs[3]] = {-0.1, 0.1};
      ranges[inputs[4]] = {0.1, 0.3};
    } else if (type == "Conv" || type == "Gemm" || type == "ConvTranspose") {
      const Dims& weight = input_dims(graph, node, 1);
      const Index fan_in = type == "ConvTranspose" ? weight.front() : product(weight, 1);
      const double bound = 1 / std::sqrt(static_cast<double>(fan_in));
      for (std::size_t i = 1; i < inputs.size(); ++i) ranges[inputs[i]] = {-bound, bound};
    }
  }
  onnx::Model model = network.model;
  std::mt19937_64 generator(seed);
  initialize(model, [&](const std::string& name, const Dims& dims) {
    const auto [least, greatest] = ranges.at(name);
    std::vector<float> values(static_cast<std::size_t>(product(dims)));
    for (float& value : values) {
      value = static_cast<float>((least + greatest) / 2 +
                                 concertina::random_uniform(generator, (greatest - least) / 2));
    }
    return onnx::Tensor::of<float>(name, dims, values);
  });
  return model;
}

}  // namespace tool
