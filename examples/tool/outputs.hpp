// Two models run on the same inputs: how far apart their outputs are, and how far from stored ones.
// Between the models that is reported, not judged, for how one network's rounding compares with
// another's is chance; but a NaN is no rounding, and what is stored is held to a bound.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "onnx/graph.hpp"

#include <filesystem>
#include <limits>
#include <string>
#include <vector>

namespace tool {

/// An output of two models for one input, or of one and as it is stored.
struct OutputDifference {
  std::string input;        ///< "random", or the folder of the test data
  std::string output;       ///< the tensor
  std::string model = {};   ///< "model" or "result", against what is stored; empty: both models
  std::string stored = {};  ///< the file
  double largest = 0;       ///< absolute difference, at `where`; NaN if one is
  double magnitude = 0;     ///< of the largest finite element of the first model's; of what is
                            ///< stored, in the channel that is furthest off; NaN: none is
  double bound = infinite;  ///< of what rounding moves; of what is stored only
  std::string where = {};   ///< "[0][3][12][7]"
  std::ptrdiff_t nans = 0;  ///< elements that are NaN in either

  bool failed() const;
  static constexpr double infinite = std::numeric_limits<double>::infinity();
};

struct OutputComparison {
  std::vector<OutputDifference> differences;
  double before = 0, after = 0;    ///< seconds that a run took, all inputs together
  std::vector<std::string> notes;  ///< files of the test data that are missing, or not read
  std::string skipped;             ///< why there are no differences; empty where there are some

  /// Whether an element is NaN, or is not what is stored.
  bool failed() const;
};

/// Whether there is a test_data_set_N beside a model's file.
bool has_test_data(const std::filesystem::path& path);

/// Runs both on each test_data_set_N beside the model's file, and compares with its output_N.pb; or
/// on random input where there is none. Stored outputs are held to a thousandth of their largest
/// element, of 16 bits to a fiftieth. What cannot be read or compared, and files of no input or
/// output, are in the notes. An operator that is not implemented, or an input that is no array of
/// floats, is a reason to skip.
OutputComparison compare_outputs(const onnx::Model& model, const onnx::Model& result,
                                 const GraphOptions& options, const std::filesystem::path& path);

}  // namespace tool
