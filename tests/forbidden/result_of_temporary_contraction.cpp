// What forward() returns is the contraction's own memory.
// SPDX-License-Identifier: Apache-2.0
// expect: temporary
// clang: -Werror=dangling
#include <concertina/contract.hpp>

using concertina::Conv2d;

void keep(const Conv2d<float>& f) {
#ifdef CONCERTINA_CONTROL
  const Conv2d<float> kept =
#else
  const Conv2d<float>& kept =
#endif
      concertina::Contraction<float, 2>(concertina::Form<2>(f)).forward(f);
  static_cast<void>(kept);
}
