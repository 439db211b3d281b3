// Function-preserving expansions of float and double.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/detail/compiled/config.hpp>
#include <concertina/expand.hpp>

#ifdef CONCERTINA_COMPILED

namespace concertina {

#define CONCERTINA_INSTANTIATE(Scalar, Rank)                                                     \
  template std::vector<Conv<Scalar, Rank>> detail::preserve(const ConvView<const Scalar, Rank>&, \
                                                            const std::vector<ConvShape<Rank>>&, \
                                                            AnyGenerator, Ends);
#define CONCERTINA_DECLARE(Scalar, Rank) extern CONCERTINA_INSTANTIATE(Scalar, Rank)

#ifdef CONCERTINA_COMPILING_EXPANSIONS_OF
CONCERTINA_FOR_EACH_RANK(CONCERTINA_INSTANTIATE, CONCERTINA_COMPILING_EXPANSIONS_OF)
#else
CONCERTINA_FOR_EACH_LAYER(CONCERTINA_DECLARE)
#endif

#define CONCERTINA_LAY_OUT(name, Rank)                                                 \
  CONCERTINA_EXTERN template std::vector<ConvShape<Rank>> name(const ConvShape<Rank>&, \
                                                               const ExpandOptions&);
#ifdef CONCERTINA_COMPILING_LAYOUTS
#define CONCERTINA_EXTERN
#else
#define CONCERTINA_EXTERN extern
#endif
CONCERTINA_FOR_EACH_RANK(CONCERTINA_LAY_OUT, expand_cl)
CONCERTINA_LAY_OUT(expand_ck, 1)
CONCERTINA_LAY_OUT(expand_ck, 2)
CONCERTINA_LAY_OUT(expand_ck, 3)
#undef CONCERTINA_EXTERN
#undef CONCERTINA_LAY_OUT

#undef CONCERTINA_DECLARE
#undef CONCERTINA_INSTANTIATE

}  // namespace concertina

#endif
