// The proofs that a linear region of one model is that of another.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "onnx/contract_model.hpp"
#include "onnx/regions.hpp"

#include <concertina/verify.hpp>

#include <string>
#include <vector>

namespace tool {

/// One piece of a model that another one computes otherwise.
struct ComparedRegion {
  std::string source = {}, result = {};
  std::vector<concertina::Report> proofs = {};
  std::vector<std::string> skipped = {};  ///< proofs that were too large, and why
  std::string unproved = {};  ///< why nothing could be proved; empty where something was

  bool proved() const;
  bool failed() const;
  /// Takes back that it is wrong, and says why.
  void doubt(const std::string& why);
};

struct RegionProofs {
  Equality equality = Equality::size;
  concertina::RowSample sample = {};
  /// F16 or BF16 where a file had constants of it, which are wider now: those of whichever region
  /// was contracted are held to what they were made of, rounded.
  onnx::DataType stored_before = onnx::DataType::undefined,
                 stored_after = onnx::DataType::undefined;
};

/// Proves the two regions, of the same source and result, to be the same map, whichever was made of
/// the other. Adds to `region` the proofs, or why there are none.
void prove_region(const Graph& a, Segments expanded, const Graph& b, Segments contracted,
                  const RegionProofs& how, Budget& budget, ComparedRegion& region);

/// A weighted sum of what a region does off its border: the same of equal regions, but for
/// rounding, and hardly of others. NaN where nothing is known.
struct Fingerprint {
  double sum = 0, scale = 0;  ///< and that of absolute values

  /// Of the scale.
  double distance(const Fingerprint& other) const;
};
Fingerprint fingerprint(const Graph& graph, Segments region, Budget& budget);

}  // namespace tool
