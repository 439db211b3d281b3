// Everything that can be checked about one file's chain: the three proofs, and what the file says
// must come out.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "described_chain.hpp"
#include "text.hpp"

#include <concertina/verify.hpp>

#include <string>
#include <vector>

namespace tool {

/// One check. `report.proof` names it; `skipped` says why there is no report, and is empty
/// otherwise.
struct Finding {
  concertina::Report report;
  std::string skipped;

  bool holds() const { return static_cast<bool>(report); }
};

struct FileProof {
  std::ptrdiff_t layers = 0;
  std::string contracted;  // shape
  bool exact = false;      // everywhere, or at the size of the file's input
  std::string border;      // the same in words
  std::vector<Finding> findings;

  bool holds() const;
  const Finding& finding(const std::string& name) const;
};

/// Contracts the chain and checks the result:
///   algebra, rounding, structure   the library's proofs; structure is skipped above 256 MiB of
///   matrices NAME                           the single layer that the file expects, as a map
///   within its rounding bound output                         the contraction on `input`, off the
///   border, against the file's `output` output.contracted              the same against the output
///   of the single layer, at every position exact                          what the metadata claims
///   about the border
/// Throws  what reading and contracting throw; FormatError for tensors of the wrong shape
FileProof prove(const DescribedChain& chain, Progress& progress);

}  // namespace tool
