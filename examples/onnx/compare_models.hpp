// Two models compared by proof, whoever made the one of the other.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "onnx/contract_model.hpp"

#include <concertina/verify.hpp>

#include <string>
#include <vector>

namespace tool {

/// One piece of a model that another one computes otherwise.
struct ComparedRegion {
  std::string source, result;
  std::vector<concertina::Report> proofs;
  std::vector<std::string> skipped;  ///< proofs that were too large, and why
  std::string unproved;              ///< why nothing could be proved; empty where something was
};

struct ModelComparison {
  std::size_t identical = 0;  ///< nodes
  std::vector<ComparedRegion> regions;

  bool proved() const;
  bool failed() const;
};

/// Proves that `result` computes what `model` does, wherever their tensors have names in common:
/// nodes by identity, what differs by contraction; structure on a sample of rows where one is
/// named. `stored` is F16 or BF16 where the file of `result` had constants of it, which are wider
/// now, and `model_stored` that of `model`: the constants of whichever was contracted are held to
/// what they were made of, rounded.
ModelComparison compare_models(const onnx::Model& model, const onnx::Model& result,
                               const GraphOptions& options = {}, Equality equality = Equality::size,
                               const concertina::RowSample& sample = {},
                               onnx::DataType stored = onnx::DataType::undefined,
                               onnx::DataType model_stored = onnx::DataType::undefined);

}  // namespace tool
