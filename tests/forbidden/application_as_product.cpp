// A layer is applied as a function; `*` multiplies layers.
// SPDX-License-Identifier: Apache-2.0
// expect: no match for .operator\*.|invalid operands to binary expression
#include <concertina/contract.hpp>

using concertina::Conv2d;
using concertina::FeatureMap;

FeatureMap<float, 2> apply(const Conv2d<float>& layer, const FeatureMap<float, 2>& x) {
#ifdef CONCERTINA_CONTROL
  return layer(x);
#else
  return layer * x;
#endif
}
