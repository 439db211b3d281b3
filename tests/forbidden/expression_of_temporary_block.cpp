// A block's expression views its layers, so a temporary block has none.
// SPDX-License-Identifier: Apache-2.0
// expect: use of deleted function|deleted function|has been explicitly deleted
#include <concertina/blocks.hpp>

using concertina::RepVgg;

#ifdef CONCERTINA_CONTROL
using Loaded = const RepVgg<float, 2>&;
#else
using Loaded = RepVgg<float, 2>;
#endif

auto fuse(Loaded (&load)()) { return load().expression(); }
