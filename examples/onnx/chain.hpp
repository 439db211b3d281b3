// Chains of layers whose tensors are in a safetensors file: described in a line, read as a model.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "onnx/graph.hpp"

#include <concertina/io/safetensors.hpp>

#include <map>
#include <optional>
#include <string>
#include <vector>

namespace tool {

/// For --help.
inline constexpr const char* chain_grammar =
    "LAYER,LAYER,...  the first one applied first. A LAYER is NAME or NAME:GEOMETRY, and what it "
    "is "
    "follows from the tensor NAME.weight: of 3 to 5 axes, a convolution; of 2, a linear layer; of "
    "1, "
    "with NAME.running_mean and NAME.running_var, a batch norm; of 1 without them, a factor for "
    "each "
    "channel; each with NAME.bias if that is there. The layer avg_pool has no tensors. A single "
    "layer may have no name, and the tensors weight and bias. GEOMETRY of a convolution is any of "
    "s "
    "(stride), p (padding, negative to crop), e (padding at the end, where it differs), d "
    "(dilation), g (groups); of avg_pool k (kernel), s (by default the kernel), p; each followed "
    "by "
    "an integer, or by one for each axis: s2, p1x0, s2p1g4. Of a batch norm it is eps, by default "
    "eps1e-5. Example: conv1:p1,bn1,avg_pool:k2,conv2:s2g4";

/// A layer as a chain has it: each letter of its geometry with one number, or one per axis.
struct ChainLayer {
  std::string text, name;  // what is written; of it, what is before the colon
  std::map<char, Dims> geometry = {};
  std::optional<double> eps = {};

  bool is_pool() const { return name == "avg_pool"; }
  std::string tensor(const std::string& suffix) const {
    return name.empty() ? suffix : name + "." + suffix;
  }
};

/// Throws UsageError naming the layer that does not follow the grammar.
std::vector<ChainLayer> parse_chain(const std::string& text);

/// How a chain is read.
struct ChainOptions {
  std::optional<std::string> chain = {};  ///< in place of the file's metadata "chain"
  bool wide = false;                      ///< in float64 even if no tensor is F64
  std::optional<Dims> input = {};         ///< the input's shape: N x C x H x W, or N x C x unknown
};

/// The file's chain as a model from "input" to "output": of float64 if one of its tensors is, of
/// float32 otherwise.
/// Throws  UsageError for a chain or an input that does not follow the grammar; FormatError,
///         ShapeError or SizeError naming the file and the layer for what does not fit
onnx::Model chain_model(const concertina::io::Safetensors& file, const ChainOptions& options);

/// The dtype of this name that layers may have; none if it is another.
std::optional<concertina::io::Dtype> layer_dtype(const std::string& name);

/// A model with its constants, inputs and outputs of the type. Throws NumericalError where it does
/// not hold a constant.
onnx::Model rounded(onnx::Model model, concertina::io::Dtype dtype);

/// A model with the elements of its rounded one, in its own types; `stored` becomes the type of
/// those where it is another.
onnx::Model as_rounded(onnx::Model model, const onnx::Model& rounded, onnx::DataType& stored);

}  // namespace tool
