// The compact network of a file: expanded layers contracted, batch norms folded.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "graph.hpp"
#include "linear_map.hpp"

#include <concertina/conv.hpp>
#include <concertina/io/safetensors.hpp>

#include <optional>
#include <string>

namespace tool {

/// The dtype that contracted layers are written in unless another is asked for: F32 for 16 bits.
concertina::io::Dtype compact_dtype(concertina::io::Dtype layers);

/// Adds NAME.weight and, if there is one, NAME.bias (weight and bias for no name), rounded to the
/// dtype. F16 and BF16 are rounded twice, as the layer's elements are rounded already.
/// Throws  Error where an element is not finite; FormatError where a name is taken
template <class Scalar, int Rank>
void add_layer(concertina::io::Safetensors& file, const std::string& name,
               const concertina::Conv<Scalar, Rank>& layer, concertina::io::Dtype dtype);

struct CompactNetwork {
  concertina::io::Safetensors file;  // a graph of the same format
  Index contracted = 0;              // expanded layers
  Index folded = 0;                  // batch norms, and scales, that became part of a layer
};

/// The network in which every expanded layer is one layer, and every batch norm or scale right
/// after a layer is part of it. Expanded is what has an expected layer or a name, and a
/// linear node of several layers that contracts to no more parameters than it has. Layers have the
/// names of those expected, or of their nodes, otherwise their own.
/// Ensures  the same map as the file's, before rounding; tensors of other layers are copied
/// Throws   InexactError naming the node where no single layer equals it; what reading throws
CompactNetwork compact_network(const concertina::io::Safetensors& file, const Node& graph,
                               std::optional<concertina::io::Dtype> dtype = {});

}  // namespace tool
