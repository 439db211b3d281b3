// Everything that can be checked about one file's chain: the three proofs, and what the file says
// must come out.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "networks/linear_map.hpp"
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

/// Contracts a file's layers and checks the result:
///   algebra, rounding, structure   the library's proofs; structure is skipped above 256 MiB of
///                                  matrices
///   NAME                           the single layer that the file expects of a node, as a map
///                                  within its rounding bound
///   output                         the contraction on `input`, off the border, against the file's
///   output.contracted              the same against the output of the single layer, everywhere
///   exact                          what the metadata claims about the border
/// Of a network (a graph that is not linear) each node that is_expanded, also on its own
/// input (the first image's), and the whole on the file's `images` or `input`:
///   logits                         the contracted network's float error no more than twice the
///                                  expanded one's, both against a double run
///   predictions                    the same classes, also as the stored logits'
/// Throws  what reading and contracting throw; FormatError for tensors of the wrong shape
FileProof prove(const concertina::io::Safetensors& file, const Node& graph, Progress& progress);

}  // namespace tool
