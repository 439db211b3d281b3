// The networks of the ExpandNets paper as it ran them.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "architecture.hpp"

#include <string>
#include <vector>

namespace tool {

/// Names for the command line, in the order of the paper's Table S10, AlexNets last.
std::vector<std::string> paper_network_names();

/// A compact network with its recipes. Throws UsageError with the names for an unknown one.
/// Source  Guo, Alvarez, Salzmann, ExpandNets, NeurIPS 2020, Sections 4 and A; sizes and widths of
///         YOLO-LITE and U-Net are those that give the published cost, see
///         docs/results/complexity.md
Architecture paper_network(const std::string& name);

}  // namespace tool
