// Two models compared by proof, whoever made the one of the other.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "onnx/prove_region.hpp"

#include <cstddef>
#include <vector>

namespace tool {

struct ModelComparison {
  std::size_t identical = 0;  ///< nodes
  std::vector<ComparedRegion> regions = {};

  bool proved() const;
  bool failed() const;
};

/// Proves that `result` computes what `model` does. Names matter of inputs and outputs alone: what
/// else is the same is found from the inputs on, nodes by what they do to what, and linear regions
/// by proof. Those that differ are told by the names that both models have.
ModelComparison compare_models(const onnx::Model& model, const onnx::Model& result,
                               const GraphOptions& options = {}, const RegionProofs& how = {});

}  // namespace tool
