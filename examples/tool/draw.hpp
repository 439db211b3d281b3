// Pictures of contractions: the taps of a region's layers, and of the one that they become.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "onnx/contract_model.hpp"

#include <string>

namespace tool {

/// A row for each region, as SVG: a square for each tap, the darker the larger its weights beside
/// the kernel's largest. Requires the regions' tap norms.
/// Throws  UsageError where no region is contracted, or a picture would have too many taps; naming
///         the region, for transposed layers
std::string draw_taps(const ContractedModel& contracted);

}  // namespace tool
