// Two models run on the same inputs: how far apart their outputs are. Reported, never judged: how
// one network's rounding compares with another's is chance.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "onnx/graph.hpp"

#include <filesystem>
#include <string>
#include <vector>

namespace tool {

/// One output of two models for one input.
struct OutputDifference {
  std::string input;     ///< "random", or the folder of the test data
  std::string output;    ///< the tensor
  double largest = 0;    ///< absolute difference, at `where`
  double magnitude = 0;  ///< of the largest element of the first model's
  std::string where;     ///< "[0][3][12][7]"
};

struct OutputComparison {
  std::vector<OutputDifference> differences;
  std::string skipped;  ///< why there are none; empty where there are some
};

/// Runs both on each test_data_set_N beside the model's file, or on random input where there is
/// none. An operator that is not implemented, or an input that is no array of floats, is a reason
/// to skip.
OutputComparison compare_outputs(const onnx::Model& model, const onnx::Model& result,
                                 const GraphOptions& options, const std::filesystem::path& path);

}  // namespace tool
