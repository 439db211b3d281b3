// A view of a temporary vector would dangle at once.
// SPDX-License-Identifier: Apache-2.0
// expect: deleted
#include <concertina/conv.hpp>

#include <vector>

using concertina::ConvView;

#ifdef CONCERTINA_CONTROL
const std::vector<float> named{1};
const ConvView<const float, 0> view({.out = 1, .in = 1}, named);
#else
const ConvView<const float, 0> view({.out = 1, .in = 1}, std::vector<float>{1});
#endif
