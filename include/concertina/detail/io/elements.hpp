// Elements as files store them, read as another type where that is exact.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <Eigen/Core>  // numeric_limits of half and bfloat16

#include <algorithm>
#include <array>
#include <bit>
#include <concepts>
#include <cstddef>
#include <limits>
#include <span>
#include <type_traits>
#include <vector>

namespace concertina::io::detail {

/// Same bits, same meaning: long and long long are both I64 where both have 64 bits.
template <class A, class B>
inline constexpr bool same_storage =
    std::same_as<A, B> ||
    (std::integral<A> && std::integral<B> && !std::same_as<A, bool> && !std::same_as<B, bool> &&
     sizeof(A) == sizeof(B) && std::is_signed_v<A> == std::is_signed_v<B>);

/// Whether To represents every value of From.
template <class To, class From>
constexpr bool holds_exactly() {
  using T = std::numeric_limits<To>;
  using F = std::numeric_limits<From>;
  if constexpr (std::same_as<To, From>) return true;
  if (F::digits > T::digits || (F::is_signed && !T::is_signed)) return false;
  if (F::is_integer) return T::is_integer || F::digits < T::max_exponent;
  const bool holds_subnormal = F::min_exponent - F::digits >= T::min_exponent - T::digits;
  return !T::is_integer && F::max_exponent <= T::max_exponent && holds_subnormal;
}

/// The elements, stored one after another at any alignment, as a Scalar that holds each exactly.
template <class Scalar, class T>
  requires(holds_exactly<Scalar, T>())
std::vector<Scalar> widened(std::span<const std::byte> bytes) {
  std::vector<Scalar> result(bytes.size() / sizeof(T));
  for (std::size_t i = 0; i < result.size(); ++i) {
    std::array<std::byte, sizeof(T)> element;
    std::ranges::copy(bytes.subspan(i * sizeof(T), sizeof(T)), element.begin());
    if constexpr (std::same_as<T, bool>) {
      result[i] = static_cast<Scalar>(element[0] != std::byte{0});
    } else {
      result[i] = static_cast<Scalar>(std::bit_cast<T>(element));
    }
  }
  return result;
}

}  // namespace concertina::io::detail
