// A view of a temporary array would dangle at once, for the bias too.
// SPDX-License-Identifier: Apache-2.0
// expect: deleted
#include <concertina/conv.hpp>

#include <array>

using concertina::ConvView;

#ifdef CONCERTINA_CONTROL
const std::array<float, 1> named{1};
const ConvView<const float, 0> view({.out = 1, .in = 1}, named);
#else
const ConvView<const float, 0> view({.out = 1, .in = 1}, std::array<float, 1>{1});
#endif
