// Scalars: how one becomes another, in which one layers of another are contracted, how they round.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/detail/scalar.hpp>

#include <algorithm>
#include <bit>
#include <cmath>
#include <concepts>
#include <cstdint>
#include <limits>

namespace concertina {

/// The scalar in which a contraction of layers of this scalar is computed unless the caller names
/// another: half and bfloat16 only store. Specialise it for a storage type of your own.
template <class Scalar>
struct DefaultAccumulator {
  using type = Scalar;
};
template <>
struct DefaultAccumulator<Eigen::half> {
  using type = float;
};
template <>
struct DefaultAccumulator<Eigen::bfloat16> {
  using type = float;
};

/// A value in another scalar, rounded at most once, to nearest: what is beyond the largest becomes
/// infinite, and NaN stays; integers are made as static_cast does. Half and bfloat16 are made from
/// float; a wider value therefore becomes a float rounded to odd first, which keeps what the second
/// rounding has to know.
/// Source  Boldo, Melquiond, Emulation of FMA and correctly rounded sums, IEEE Trans. Computers 2008
template <class To, class From>
To convert(const From& value) {
  constexpr bool narrow = detail::rounds<To> && std::numeric_limits<To>::digits < 24;
  if constexpr (narrow && std::floating_point<From> && !std::same_as<From, float>) {
    float nearest = static_cast<float>(value);
    if (static_cast<From>(nearest) == value || value != value) return static_cast<To>(nearest);
    if (std::abs(static_cast<From>(nearest)) > std::abs(value))
      nearest = std::nextafter(nearest, 0.0F);
    return static_cast<To>(std::bit_cast<float>(std::bit_cast<std::uint32_t>(nearest) | 1U));
  } else {
    return static_cast<To>(value);
  }
}

/// Distance between neighbouring values of type Scalar at the size of x; the smallest there is
/// where x is 0, or not finite.
template <class Scalar>
long double ulp(long double x) {
  constexpr int least = std::numeric_limits<Scalar>::min_exponent;
  const bool sized = x != 0 && std::isfinite(x);
  const int exponent = sized ? std::max(std::ilogb(x) + 1, least) : least;
  return std::ldexp(1.0L, exponent - std::numeric_limits<Scalar>::digits);
}

}  // namespace concertina
