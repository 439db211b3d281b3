// A const temporary could be neither kept by a product without a copy nor viewed without dangling.
// SPDX-License-Identifier: Apache-2.0
// expect: deleted.*Expr|Expr.*deleted
#include <concertina/contract.hpp>

using concertina::Conv2d;

#ifdef CONCERTINA_CONTROL
Conv2d<float> make();
#else
const Conv2d<float> make();
#endif

auto product(const Conv2d<float>& outer) { return outer * make(); }
