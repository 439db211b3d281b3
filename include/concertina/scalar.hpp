// Scalars: how one becomes another, in which one layers of another are contracted, how they round.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <concepts>
#include <cstdint>
#include <limits>
#include <type_traits>

namespace Eigen {
struct half;
struct bfloat16;
template <class Scalar>
struct NumTraits;
}  // namespace Eigen

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

namespace detail {

/// The accumulator that a caller names, or the default where that is void.
template <class A, class Scalar>
using AccumulatorOf =
    std::conditional_t<std::is_void_v<A>, typename DefaultAccumulator<Scalar>::type, A>;

/// True for types that round; integers, primes and rationals are exact.
template <class Scalar>
inline constexpr bool rounds =
    std::numeric_limits<Scalar>::is_specialized && !std::numeric_limits<Scalar>::is_exact;

/// A value in another scalar, rounded at most once. Half and bfloat16 are made from float; a wider
/// value therefore becomes a float rounded to odd first, which keeps what the second rounding has
/// to know.
/// Source  Boldo, Melquiond, Emulation of FMA and correctly rounded sums, IEEE Trans. Computers 2008
template <class To, class From>
To convert(const From& value) {
  constexpr bool narrow = rounds<To> && std::numeric_limits<To>::digits < 24;
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

/// Where A has fewer digits than double, the factors of batch norms and scales are computed in
/// double and rounded once.
template <class A>
using WideFor = std::conditional_t<rounds<A> && (std::numeric_limits<A>::digits < 53), double, A>;

/// The scalar in which a computation in A is checked: the next wider one. Exact scalars check
/// themselves, and so does the widest, with a bound that counts both roundings.
template <class A>
using Reference = std::conditional_t<
    !rounds<A>, A, std::conditional_t<(std::numeric_limits<A>::digits < 53), double, long double>>;

/// Whether the proofs know how a scalar rounds, if it does: complex numbers of rounding parts they
/// do not.
template <class Scalar>
inline constexpr bool provable = rounds<Scalar> || !rounds<typename Eigen::NumTraits<Scalar>::Real>;

/// Largest relative error of one rounding to nearest.
template <class Scalar>
long double unit_roundoff() {
  return std::ldexp(1.0L, -std::numeric_limits<Scalar>::digits);
}

template <class Scalar>
long double smallest_subnormal() {
  return std::ldexp(
      1.0L, std::numeric_limits<Scalar>::min_exponent - std::numeric_limits<Scalar>::digits);
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

}  // namespace detail
}  // namespace concertina
