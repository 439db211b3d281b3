// Layers of different scalars are compared after a cast that says in which.
// SPDX-License-Identifier: Apache-2.0
// expect: no match for .operator==.|invalid operands to binary expression
#include <concertina/conv.hpp>

using concertina::Conv2d;

bool same(const Conv2d<float>& narrow, const Conv2d<double>& wide) {
#ifdef CONCERTINA_CONTROL
  return narrow.cast<double>() == wide;
#else
  return narrow == wide;
#endif
}
