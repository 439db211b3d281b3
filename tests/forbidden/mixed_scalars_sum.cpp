// Layers of two scalars do not add; one is cast first.
// SPDX-License-Identifier: Apache-2.0
// expect: no match for .operator\+.|invalid operands to binary expression
#include <concertina/contract.hpp>

using concertina::Conv2d;

#ifdef CONCERTINA_CONTROL
using Second = Conv2d<float>;
#else
using Second = Conv2d<double>;
#endif

auto sum(const Conv2d<float>& f, const Second& g) { return f + g; }
