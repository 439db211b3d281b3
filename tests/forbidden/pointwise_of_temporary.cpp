// A linear layer at every position is a view of it, so a temporary one has none.
// SPDX-License-Identifier: Apache-2.0
// expect: use of deleted function|deleted function|has been explicitly deleted
#include <concertina/layers.hpp>

#ifdef CONCERTINA_CONTROL
using Loaded = const concertina::Linear<float>&;
#else
using Loaded = concertina::Linear<float>;
#endif

auto everywhere(Loaded (&load)()) { return concertina::pointwise<2>(load()); }
