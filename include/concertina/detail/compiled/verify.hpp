// The proofs for float and double.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/detail/compiled/config.hpp>
#include <concertina/verify.hpp>

#ifdef CONCERTINA_COMPILED

#ifdef CONCERTINA_COMPILING_PROOFS
#define CONCERTINA_EXTERN
#else
#define CONCERTINA_EXTERN extern
#endif

namespace concertina {

#define CONCERTINA_INSTANTIATE_PROOFS(A, Scalar, Rank)                                      \
  CONCERTINA_EXTERN template Report detail::prove_rounding<A>(                              \
      const detail::Tree<detail::Leaf<Scalar, Rank>>&, const ConvView<const Scalar, Rank>&, \
      const std::optional<PerAxis<Rank>>&);                                                 \
  CONCERTINA_EXTERN template Report detail::prove_structure<A>(                             \
      const detail::Tree<detail::Leaf<Scalar, Rank>>&, const ConvView<const Scalar, Rank>&, \
      const PerAxis<Rank>&, const PerAxis<Rank>&, MemoryLimit, const RowSample&);
#define CONCERTINA_INSTANTIATE(Scalar, Rank)                                                \
  CONCERTINA_INSTANTIATE_PROOFS(Scalar, Scalar, Rank)                                       \
  CONCERTINA_EXTERN template Report detail::prove_outputs<Scalar, Rank>(                    \
      const detail::Tree<detail::Leaf<Scalar, Rank>>&, const ConvView<const Scalar, Rank>&, \
      const FeatureMap<detail::Reference<Scalar>, Rank>&, const PerAxis<Rank>&,             \
      const FeatureMap<detail::Reference<Scalar>, Rank>&, const detail::Precision&,         \
      const detail::Precision&, ComputedBy);
CONCERTINA_FOR_EACH_LAYER(CONCERTINA_INSTANTIATE)
#undef CONCERTINA_INSTANTIATE
#define CONCERTINA_INSTANTIATE(Scalar, Rank)                                         \
  CONCERTINA_INSTANTIATE_PROOFS(double, Scalar, Rank)                                \
  CONCERTINA_EXTERN template PerAxis<Rank> detail::smallest_size(                    \
      const Form<Rank>&, const std::optional<PerAxis<Rank>>&, const PerAxis<Rank>&); \
  CONCERTINA_EXTERN template Report detail::prove_algebra(                           \
      const Form<Rank>&, const ConvShape<Rank>&, std::uint64_t,                      \
      const std::optional<PerAxis<Rank>>&, const PerAxis<Rank>&);
CONCERTINA_FOR_EACH_RANK(CONCERTINA_INSTANTIATE, float)
#undef CONCERTINA_INSTANTIATE
#undef CONCERTINA_INSTANTIATE_PROOFS

CONCERTINA_EXTERN template class detail::Evaluator<PrimeField>;

}  // namespace concertina

#undef CONCERTINA_EXTERN

#endif
