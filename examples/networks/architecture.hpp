// The architecture of a network: a model whose parameters have no elements yet, from which cost and
// expansion follow.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "onnx/graph.hpp"

#include <concertina/shape.hpp>

#include <cstdint>
#include <string>
#include <vector>

namespace tool {

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
  onnx::Model model;        // of a Builder, any number of images; parameters are graph inputs
  bool functional = false;  // activations and pools are function calls, which the paper's count
                            // does not see
  std::vector<Recipe> recipes = {};
};

/// What one image is: "3x32x32".
Dims image_of(const Architecture& network);

/// The shape of a Conv node, and of a Gemm node, as a Builder makes them.
concertina::ConvShape<2> conv_shape(const Graph& graph, int node);
concertina::ConvShape<0> linear_shape(const Graph& graph, int node);

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
  std::string name, layer;  // its shape, or its operator
  Dims output;              // of one image
  Cost cost;
};

/// The nodes' costs in the order in which they run. Throws SizeError where a count overflows.
std::vector<LayerCost> layer_costs(const Architecture& network);
Cost total(const std::vector<LayerCost>& layers);

/// The model with random elements: layers initialised as PyTorch does, batch norms with random
/// factors and statistics. Reproducible from the seed.
/// Throws  SizeError for more than 4 GiB of elements, before any is made
onnx::Model initialized(const Architecture& network, std::uint64_t seed);

}  // namespace tool
