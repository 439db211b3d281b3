// Products modulo a prime.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace concertina::detail {

/// a * b mod p without 128-bit integers, for compilers that lack them; a, b < p < 2^63.
/// Adds a's doublings, so it takes 64 steps where the built-in type takes one division.
constexpr std::uint64_t multiply_modulo_portable(std::uint64_t a, std::uint64_t b,
                                                 std::uint64_t p) noexcept {
  std::uint64_t product = 0;
  for (; b != 0; b >>= 1) {
    if (b & 1) product = product >= p - a ? product - (p - a) : product + a;
    a = a >= p - a ? a - (p - a) : a + a;
  }
  return product;
}

constexpr std::uint64_t multiply_modulo(std::uint64_t a, std::uint64_t b,
                                        std::uint64_t p) noexcept {
#if defined(__SIZEOF_INT128__)
  __extension__ using Wide = unsigned __int128;
  const Wide product = static_cast<Wide>(a) * b;
  if (p == (std::uint64_t{1} << 61) - 1) {  // 2^61 = 1, so the high part is simply added
    const auto low = static_cast<std::uint64_t>(product) & p;
    const std::uint64_t sum = low + static_cast<std::uint64_t>(product >> 61);
    return sum >= p ? sum - p : sum;
  }
  return static_cast<std::uint64_t>(product % p);
#else
  return multiply_modulo_portable(a, b, p);
#endif
}

}  // namespace concertina::detail
