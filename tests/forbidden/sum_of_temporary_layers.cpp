// A run-time sum views the layers of its list, so a temporary list has none.
// SPDX-License-Identifier: Apache-2.0
// expect: use of deleted function|deleted function|has been explicitly deleted
#include <concertina/contract.hpp>

#include <vector>

using Layers = std::vector<concertina::Conv2d<float>>;

#ifdef CONCERTINA_CONTROL
using Loaded = const Layers&;
#else
using Loaded = Layers;
#endif

auto add(Loaded (&load)()) { return concertina::sum(load()); }
