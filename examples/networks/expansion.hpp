// A network's expansion: some of its layers replaced by several linear ones.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "architecture.hpp"

#include <string>
#include <vector>

namespace tool {

struct Expansion {
  std::string strategy;      // cl, ck, fc, cl+fc or ck+fc
  double rate = 4;           // of width, as in ExpandOptions
  bool stride_last = false;  // cl: the stride on the last 1x1, as the paper counts, instead
                             // of the kxk layer; the same map at more multiply-adds
  std::vector<std::string> layers = {};  // only these; by default those that the paper expands, or
                                         // all that the strategy applies to
};

/// The network with layers NAME replaced by chains NAME.0, NAME.1, ... named NAME.
/// Ensures  each chain contracts to the layer's shape (with a bias where the recipe has inner ones)
/// Throws   UsageError, naming the choices, for an unknown strategy or layer, for one that does not
///          apply, and for a rate that gives no layers or too large ones
Architecture expanded(const Architecture& network, const Expansion& expansion);

}  // namespace tool
