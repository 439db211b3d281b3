// A sum views its layers, so those of a function must not die before it.
// SPDX-License-Identifier: Apache-2.0
// expect: address of stack memory
// clang: -Werror=return-stack-address
#include <concertina/contract.hpp>

using concertina::Conv2d;

auto sum() {
  const Conv2d<float> f({.out = 1, .in = 1});
#ifdef CONCERTINA_CONTROL
  return concertina::contract(f + f);
#else
  return f + f;
#endif
}
