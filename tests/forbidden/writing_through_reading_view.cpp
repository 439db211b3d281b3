// A view of const elements reads only.
// SPDX-License-Identifier: Apache-2.0
// expect: read-only|cannot assign to return value|const-qualified
#include <concertina/conv.hpp>

using concertina::ConvView;

#ifdef CONCERTINA_CONTROL
using Element = float;
#else
using Element = const float;
#endif

void clear(const ConvView<Element, 2>& view) { view.weight()[0] = 0; }
