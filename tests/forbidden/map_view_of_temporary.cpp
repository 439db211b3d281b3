// A view of a temporary feature map, or of its values, dangles once the statement ends.
// SPDX-License-Identifier: Apache-2.0
// expect: temporary
// clang: -Werror=dangling
#include <concertina/feature_map.hpp>

using concertina::FeatureMap, concertina::FeatureMapView;

int size() {
#ifdef CONCERTINA_CONTROL
  const FeatureMap<float, 0> x;
  const FeatureMapView<const float, 0> view = x;
#else
  const FeatureMapView<const float, 0> view = FeatureMap<float, 0>();
#endif
  return static_cast<int>(view.values().size());
}
