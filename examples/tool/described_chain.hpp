// A file's layers with their numbers, at the rank and precision that are known when it is read.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "layer_description.hpp"

#include <concertina/conv.hpp>
#include <concertina/io/safetensors.hpp>

#include <filesystem>
#include <string>
#include <variant>
#include <vector>

namespace tool {

template <class Scalar, int Rank>
using Layers = std::vector<concertina::Conv<Scalar, Rank>>;

/// F16 and BF16 are widened to float when they are read, which is exact: less code to compile.
using AnyLayers =
    std::variant<Layers<float, 0>, Layers<float, 1>, Layers<float, 2>, Layers<float, 3>,
                 Layers<double, 0>, Layers<double, 1>, Layers<double, 2>, Layers<double, 3>>;

struct DescribedChain {
  concertina::io::Safetensors file;
  ChainDescription description;
  concertina::io::Dtype dtype;  // the widest of the layers
  AnyLayers layers;
};

/// When a chain is read as double: if a layer is F64; also if an expected layer is; always.
enum class Precision { of_layers, of_expected, full };

/// Reads a file and the layers that it describes, or that `chain` names (the option --chain) unless
/// it is empty.
/// Throws  IoError; FormatError or ShapeError naming file and layer; UsageError for `chain`
DescribedChain read_chain(const std::filesystem::path& path, const std::string& chain,
                          Precision precision = Precision::of_layers);

/// One layer. Throws FormatError or ShapeError naming file and layer. Defined for float and double,
/// ranks 0 to 3.
template <class Scalar, int Rank>
concertina::Conv<Scalar, Rank> read_layer(const concertina::io::Safetensors& file,
                                          const LayerDescription& layer);

/// Spatial axes of a layer's weight. Throws FormatError where it is not a weight.
int rank_of_layer(const concertina::io::Safetensors& file, const LayerDescription& layer);

/// Weights and biases of a layer of this shape.
template <int Rank>
Index parameters(const concertina::ConvShape<Rank>& shape) {
  return weight_count(shape) + (shape.bias ? shape.out : 0);
}

template <class Scalar, int Rank>
Index parameters(const Layers<Scalar, Rank>& layers) {
  Index sum = 0;
  for (const auto& layer : layers) sum += parameters(layer.shape());
  return sum;
}

}  // namespace tool
