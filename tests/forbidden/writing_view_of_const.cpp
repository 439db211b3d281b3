// A layer that must not change has no view that writes to it.
// SPDX-License-Identifier: Apache-2.0
// expect: no matching function for call to .*ConvView|no matching conversion
#include <concertina/conv.hpp>

using concertina::Conv2d;
using concertina::ConvView;

#ifdef CONCERTINA_CONTROL
using Element = const float;
#else
using Element = float;
#endif

auto view(const Conv2d<float>& layer) { return ConvView<Element, 2>(layer); }
