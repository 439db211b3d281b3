// Layers, expressions and contractions of float and double.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/contract.hpp>
#include <concertina/detail/compiled/config.hpp>

#ifdef CONCERTINA_COMPILED

#ifdef CONCERTINA_COMPILING_CONTRACT
#define CONCERTINA_EXTERN
#else
#define CONCERTINA_EXTERN extern
#endif

namespace concertina {

namespace detail {

/// Defined for the alignment that the library was compiled with, so that linking it with what was
/// compiled for another processor fails instead of crashing.
template <int MaxAlignBytes>
struct CompiledFor {
  static const char processor;
};
#ifdef CONCERTINA_COMPILING_CONTRACT
template <int MaxAlignBytes>
const char CompiledFor<MaxAlignBytes>::processor = 0;
#endif
CONCERTINA_EXTERN template struct CompiledFor<EIGEN_MAX_ALIGN_BYTES>;
[[gnu::used]] inline const char* const compiled_for =
    &CompiledFor<EIGEN_MAX_ALIGN_BYTES>::processor;

}  // namespace detail

#define CONCERTINA_INSTANTIATE(Scalar, Rank)                                                       \
  CONCERTINA_EXTERN template class Conv<Scalar, Rank>;                                             \
  CONCERTINA_EXTERN template class ConvView<const Scalar, Rank>;                                   \
  CONCERTINA_EXTERN template class ConvView<Scalar, Rank>;                                         \
  CONCERTINA_EXTERN template class FeatureMap<Scalar, Rank>;                                       \
  CONCERTINA_EXTERN template class detail::Tree<detail::Leaf<Scalar, Rank>>;                       \
  CONCERTINA_EXTERN template class Expr<Scalar, Rank>;                                             \
  CONCERTINA_EXTERN template class Contraction<Scalar, Rank>;                                      \
  CONCERTINA_EXTERN template detail::AnyForm detail::form_of(                                      \
      const detail::Tree<detail::Leaf<Scalar, Rank>>&);                                            \
  CONCERTINA_EXTERN template FeatureMap<Scalar, Rank> detail::apply(                               \
      const detail::Tree<detail::Leaf<Scalar, Rank>>&, const FeatureMapView<const Scalar, Rank>&); \
  CONCERTINA_EXTERN template Conv<Scalar, Rank> detail::contract_tree<Scalar>(                     \
      const detail::Tree<detail::Leaf<Scalar, Rank>>&, const Border<Rank>&, const ParallelFor&);
CONCERTINA_FOR_EACH_LAYER(CONCERTINA_INSTANTIATE)
#undef CONCERTINA_INSTANTIATE

#define CONCERTINA_INSTANTIATE(Scalar, Rank)                                   \
  CONCERTINA_EXTERN template Conv<Scalar, Rank> detail::contract_tree<double>( \
      const detail::Tree<detail::Leaf<Scalar, Rank>>&, const Border<Rank>&, const ParallelFor&);
CONCERTINA_FOR_EACH_RANK(CONCERTINA_INSTANTIATE, float)
#undef CONCERTINA_INSTANTIATE

CONCERTINA_EXTERN template class Form<0>;
CONCERTINA_EXTERN template class Form<1>;
CONCERTINA_EXTERN template class Form<2>;
CONCERTINA_EXTERN template class Form<3>;
CONCERTINA_EXTERN template class detail::Tree<detail::AnyShape>;
CONCERTINA_EXTERN template class detail::Evaluator<float>;
CONCERTINA_EXTERN template class detail::Evaluator<double>;

}  // namespace concertina

#undef CONCERTINA_EXTERN

#endif
