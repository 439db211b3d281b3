// A layer is not applied to a map of another scalar.
// SPDX-License-Identifier: Apache-2.0
// expect: no match for call to|no matching function for call to object
#include <concertina/conv.hpp>

using concertina::Conv2d;
using concertina::FeatureMap;

FeatureMap<double, 2> apply(const Conv2d<float>& layer, const FeatureMap<double, 2>& x) {
#ifdef CONCERTINA_CONTROL
  return layer.cast<double>()(x);
#else
  return layer(x);
#endif
}
