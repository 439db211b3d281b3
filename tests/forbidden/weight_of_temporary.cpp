// The elements of a temporary layer are gone once the statement ends.
// SPDX-License-Identifier: Apache-2.0
// expect: temporary
// clang: -Werror=dangling
#include <concertina/conv.hpp>

int size() {
#ifdef CONCERTINA_CONTROL
  const concertina::Conv<float, 0> f({.out = 1, .in = 1});
  const auto weight = f.weight();
#else
  const auto weight = concertina::Conv<float, 0>({.out = 1, .in = 1}).weight();
#endif
  return static_cast<int>(weight.size());
}
