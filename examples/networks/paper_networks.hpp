// The networks of the ExpandNets paper as it ran them, and two small ones of other re-parameterised
// blocks.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "architecture.hpp"

#include <string>
#include <vector>

namespace tool {

/// Names for the command line, in the order of the paper's Table S10; then AlexNets, RepVGG and
/// MobileOne.
std::vector<std::string> paper_network_names();

/// A compact network with its recipes. Throws UsageError with the names for an unknown one.
/// Source  Guo, Alvarez, Salzmann, ExpandNets, NeurIPS 2020, Sections 4 and A; sizes and widths of
///         YOLO-LITE and U-Net are those that give the published cost, see
///         docs/results/complexity.md; Ding et al., RepVGG, CVPR 2021; Vasu et al., MobileOne, CVPR
///         2023
Architecture paper_network(const std::string& name);

}  // namespace tool
