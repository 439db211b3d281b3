// What a scalar is: whether it rounds and how much, what it is computed and checked in.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>
#include <limits>
#include <type_traits>

namespace Eigen {
struct half;
struct bfloat16;
template <class Scalar>
struct NumTraits;
}  // namespace Eigen

namespace concertina {

template <class Scalar>
struct DefaultAccumulator;

namespace detail {

/// The accumulator that a caller names, or the default where that is void.
template <class A, class Scalar>
using AccumulatorOf =
    std::conditional_t<std::is_void_v<A>, typename DefaultAccumulator<Scalar>::type, A>;

/// True for types that round; integers, primes and rationals are exact.
template <class Scalar>
inline constexpr bool rounds =
    std::numeric_limits<Scalar>::is_specialized && !std::numeric_limits<Scalar>::is_exact;

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

}  // namespace detail
}  // namespace concertina
