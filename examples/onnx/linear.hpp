// Which nodes of a graph are linear maps, and which: decided node by node, from operators and
// constants.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "onnx/graph.hpp"

#include <optional>
#include <string>
#include <vector>

namespace tool {

/// Where a tensor has its channels: [n, channels, spatial...] or [n, ..., channels].
enum class Layout { channels_first, channels_last };

/// A linear map that one node (or a few that only move channels) stands for.
struct LinearNode {
  enum class Kind {
    identity,
    conv,
    conv_transpose,
    linear,  ///< a matrix over the channels of every position
    batch_norm,
    channel_scale,  ///< and shift: what Mul, Div, Add, Sub and Neg with a constant do
    channel_select,
    average_pool,
    pad,
    space_to_depth,
    depth_to_space,
    upsample,       ///< each position `factors` times
    move_channels,  ///< a Transpose between the layouts
    sum,            ///< of the operands times `signs`
    concat
  };

  Kind kind = Kind::identity;
  onnx::DataType type = onnx::DataType::undefined;  ///< of what it reads, as its constants say;
                                                    ///< undefined where it has none
  std::vector<int> operands = {};                   ///< tensors: one but for sum and concat
  std::vector<int> outputs = {};                    ///< tensors: one but for channel_select
  std::vector<int> nodes = {};  ///< that it stands for, in order; the last makes its outputs
  int spatial_axes = -1;        ///< of what it reads; -1: it fits any number
  bool flat = false;            ///< what it writes has none: [n, channels]
  std::optional<Layout> in = {}, out = {};  ///< none: either

  std::optional<Windows> windows = {};  ///< conv, conv_transpose, average_pool; kernel 1 of a pad
  Dims output_padding = {};             ///< conv_transpose
  Index groups = 1;
  const onnx::Tensor* weight = nullptr;  ///< conv, conv_transpose, linear
  bool transposed = false;               ///< linear: the weight is [in, out]
  double alpha = 1, beta = 1;            ///< linear: of weight and bias
  const onnx::Tensor* bias = nullptr;
  std::vector<const onnx::Tensor*> statistics = {};  ///< batch_norm: scale, B, mean, var
  double eps = 0;
  std::vector<double> scale = {},
                      shift = {};  ///< channel_scale: none, one for all, or one a channel
  Index channels = unknown;        ///< read by maps that do not tell it otherwise
  std::vector<Index> source = {};  ///< channel_select: of its first output's channels
  std::vector<std::vector<Index>> more_sources = {};  ///< of further outputs, as Split has them
  std::vector<double> signs = {};                     ///< sum
  Dims size = {};               ///< linear, after a flatten: of what that reads
  Dims factors = {};            ///< space_to_depth, depth_to_space, upsample: along each axis
  bool positions_first = true;  ///< depth: channels are [positions, channels], as in mode DCR
};

/// Whether a linear layer has the flattening before it within, as a layer of the size that this
/// reads.
enum class Flattenings { within, apart };

/// What the node is; none, with the reason, where it is no linear map or cannot be taken for one.
/// An empty reason: it is plainly another operator. Lists of channels are kept, by what `lists` has
/// left.
/// Throws FormatError naming the node where its constants contradict its attributes.
std::optional<LinearNode> linear_node(const Graph& graph, int node, Flattenings flattenings,
                                      Budget& lists, std::string& reason);

}  // namespace tool
