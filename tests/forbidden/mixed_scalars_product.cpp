// A product of layers of different scalars would round in silence.
// SPDX-License-Identifier: Apache-2.0
// expect: no match for .operator\*.|invalid operands to binary expression
#include <concertina/contract.hpp>

using concertina::Conv2d;

Conv2d<float> product(const Conv2d<float>& first, const Conv2d<double>& second) {
#ifdef CONCERTINA_CONTROL
  return second.cast<float>() * first;
#else
  return second * first;
#endif
}
