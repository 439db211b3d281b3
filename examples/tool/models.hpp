// The subcommands on networks: ONNX models, and safetensors files whose layers a chain describes.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "text.hpp"

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace tool {

/// What the options say, as they are written.
struct ModelCommand {
  std::string in, out;  // verify: what it is compared with
  std::optional<std::string> chain;
  std::vector<std::string> inputs, only, keep;
  std::string border = "size", when, external_data, dtype;
  std::optional<std::uint64_t> memory;  // bytes
  std::optional<double> effort;         // multiply-adds
  std::ptrdiff_t sample = 0;            // rows of the structure proof; 0 for all
  bool verify = false, initializers_are_constant = false, json = false, svg = false;
};

/// Contracts the linear regions of a model, and writes it, or the one layer that is left, where
/// `out` is not empty. Throws InexactError where no single layer equals the model at the border.
ExitCode contract_file(const ModelCommand& command);

/// Proves that `out` computes what `in` does.
ExitCode verify_files(const ModelCommand& command);

/// What could be contracted, what it would save, why the rest is left.
ExitCode show_file(ModelCommand command);

}  // namespace tool
