// Batch norms in training for float and double.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/detail/compiled/config.hpp>
#include <concertina/moments.hpp>

#ifdef CONCERTINA_COMPILED

#ifdef CONCERTINA_COMPILING_MOMENTS
#define CONCERTINA_EXTERN
#else
#define CONCERTINA_EXTERN extern
#endif

namespace concertina {

#define CONCERTINA_INSTANTIATE(Scalar, Rank)                          \
  CONCERTINA_EXTERN template class TrainingContraction<Scalar, Rank>; \
  CONCERTINA_EXTERN template Moments patch_moments<Scalar, Rank>(     \
      const ConvShape<Rank>&, const FeatureMapView<const Scalar, Rank>&, const ParallelFor&);
CONCERTINA_FOR_EACH_LAYER(CONCERTINA_INSTANTIATE)
#undef CONCERTINA_INSTANTIATE

}  // namespace concertina

#undef CONCERTINA_EXTERN

#endif
