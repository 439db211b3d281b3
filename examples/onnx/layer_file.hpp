// The one layer that a model is, as a safetensors file.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "onnx/graph.hpp"

#include <concertina/io/safetensors.hpp>

#include <optional>

namespace tool {

/// A model of one linear node, and of the Pads, constants and Transposes about it, as a file of
/// `weight`, `bias` and metadata "chain", in the dtype of its constants; none for any other model.
std::optional<concertina::io::Safetensors> layer_file(const onnx::Model& model);

}  // namespace tool
