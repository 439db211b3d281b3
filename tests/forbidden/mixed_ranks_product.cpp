// A product of layers of different ranks has no meaning.
// SPDX-License-Identifier: Apache-2.0
// expect: no match for .operator\*.|invalid operands to binary expression
#include <concertina/contract.hpp>

using concertina::Conv1d;
using concertina::Conv2d;

#ifdef CONCERTINA_CONTROL
using Second = Conv2d<float>;
#else
using Second = Conv1d<float>;
#endif

auto product(const Conv2d<float>& first, const Second& second) { return second * first; }
