// A view of a temporary layer would dangle at once.
// SPDX-License-Identifier: Apache-2.0
// expect: deleted.*ConvView|ConvView.*deleted
#include <concertina/conv.hpp>

using concertina::Conv2d;
using concertina::ConvView;

Conv2d<float> make() { return Conv2d<float>({.out = 1, .in = 1}); }

#ifdef CONCERTINA_CONTROL
const Conv2d<float> named = make();
const ConvView<const float, 2> view = named;
#else
const ConvView<const float, 2> view = make();
#endif
