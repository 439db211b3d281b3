// The subcommands on ONNX models.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "text.hpp"

#include <filesystem>
#include <string>
#include <vector>

namespace tool {

/// What the options for ONNX models say, as they are written.
struct ModelCommand {
  std::string in, out;  // verify: both are models
  std::vector<std::string> inputs, only, keep;
  std::string border = "size", when = "smaller", external_data;
  bool verify = false, initializers_are_constant = false, json = false;
};

/// Whether a file is taken for an ONNX model, and not for a safetensors file: by its first bytes,
/// where they tell, otherwise by its name.
bool is_model(const std::filesystem::path& path);

/// Contracts the linear regions of a model, and writes it where `out` is not empty.
ExitCode contract_model_file(const ModelCommand& command);

/// Proves that `out` computes what `in` does.
ExitCode verify_models(const ModelCommand& command);

/// What could be contracted, what it would save, why the rest is left.
ExitCode model_info(ModelCommand command);

}  // namespace tool
