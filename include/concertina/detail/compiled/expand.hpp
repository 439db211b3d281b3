// Function-preserving expansions of float and double.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/detail/compiled/config.hpp>
#include <concertina/expand.hpp>

#ifdef CONCERTINA_COMPILED

namespace concertina {

#ifdef CONCERTINA_COMPILING_EXPANSIONS
#define CONCERTINA_EXTERN
#else
#define CONCERTINA_EXTERN extern
#endif
#define CONCERTINA_PRESERVE(Scalar)                                                        \
  CONCERTINA_EXTERN template std::vector<Conv<Scalar, detail::max_rank>> detail::preserve( \
      const ConvView<const Scalar, detail::max_rank>&,                                     \
      const std::vector<ConvShape<detail::max_rank>>&, int, AnyGenerator, Ends);
CONCERTINA_PRESERVE(float)
CONCERTINA_PRESERVE(double)

#define CONCERTINA_LAY_OUT(name, Rank)                                                 \
  CONCERTINA_EXTERN template std::vector<ConvShape<Rank>> name(const ConvShape<Rank>&, \
                                                               const ExpandOptions&);
CONCERTINA_FOR_EACH_RANK(CONCERTINA_LAY_OUT, expand_cl)
CONCERTINA_LAY_OUT(expand_ck, 1)
CONCERTINA_LAY_OUT(expand_ck, 2)
CONCERTINA_LAY_OUT(expand_ck, 3)
#undef CONCERTINA_LAY_OUT
#undef CONCERTINA_PRESERVE
#undef CONCERTINA_EXTERN

}  // namespace concertina

#endif
