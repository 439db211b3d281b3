// Scalars: conversion by one rounding, default accumulators, and how scalars round.
// SPDX-License-Identifier: Apache-2.0
#include <concertina/scalar.hpp>

#include <concertina/conv.hpp>
#include <concertina/modular.hpp>

#include "support.hpp"

#include <catch2/catch.hpp>

#include <cmath>
#include <complex>
#include <cstdint>
#include <limits>
#include <type_traits>

namespace concertina::test {
namespace {

using Eigen::bfloat16;
using Eigen::half;

template <class Scalar>
double value_of(Scalar x) {
  return static_cast<double>(static_cast<float>(x));
}

/// The finite value of that number of bits, 0 and up.
template <class Narrow>
Narrow from_bits(std::uint16_t bits) {
  return Eigen::numext::bit_cast<Narrow>(bits);
}

/// Every pair of neighbours that are not negative, in double: each of them, the middle between
/// them, which goes to the one of even bits, and numbers nearer to the middle than a float is.
template <class Narrow>
void check_neighbours(std::uint16_t infinity) {
  const auto bits = [](Narrow x) { return Eigen::numext::bit_cast<std::uint16_t>(x); };
  Index wrong = 0;
  for (std::uint16_t b = 0; b + 1 < infinity; ++b) {
    const auto next = static_cast<std::uint16_t>(b + 1);
    const double low = value_of(from_bits<Narrow>(b)), high = value_of(from_bits<Narrow>(next));
    const double middle = low + (high - low) / 2, nudge = (high - low) * 0x1p-30;
    const auto becomes = [&](double from, std::uint16_t expected) {
      wrong += bits(convert<Narrow>(from)) != expected;
      wrong += convert<Narrow>(-from) != -from_bits<Narrow>(expected);
      wrong += bits(convert<Narrow>(static_cast<long double>(from))) != expected;
    };
    becomes(low, b);
    becomes(middle - nudge, b);
    becomes(middle, b % 2 == 0 ? b : next);
    becomes(middle + nudge, next);
  }
  CHECK(wrong == 0);
}

}  // namespace

TEST_CASE("a half or a bfloat16 is a double rounded once", "[scalar]") {
  SECTION("half") { check_neighbours<half>(0x7c00); }
  SECTION("bfloat16") { check_neighbours<bfloat16>(0x7f80); }
}

TEST_CASE("a layer in double becomes halves or bfloat16s by one rounding", "[scalar]") {
  // Just above the middle of 1 and the next half (or bfloat16); as a float it is the middle.
  const auto tap = [](double middle) {
    const Linear<double> layer({.out = 1, .in = 1}, {1 + middle + 0x1p-40});
    return layer;
  };
  CHECK(static_cast<float>(tap(0x1p-11).cast<half>().weight()[0]) == 1 + 0x1p-10F);
  CHECK(static_cast<float>(tap(0x1p-8).cast<bfloat16>().weight()[0]) == 1 + 0x1p-7F);
  CHECK(static_cast<float>((-tap(0x1p-11)).cast<half>().weight()[0]) == -1 - 0x1p-10F);
}

TEST_CASE("what is not finite stays so, and what is too large becomes infinite", "[scalar]") {
  const double infinity = std::numeric_limits<double>::infinity(),
               nan = std::numeric_limits<double>::quiet_NaN();
  const auto check = [&]<class To>(To) {
    CHECK(value_of(convert<To>(infinity)) == infinity);
    CHECK(value_of(convert<To>(-infinity)) == -infinity);
    CHECK(std::isnan(value_of(convert<To>(nan))));
    CHECK(value_of(convert<To>(1e300)) == infinity);
    CHECK(value_of(convert<To>(-1e300)) == -infinity);
    CHECK(value_of(convert<To>(1e-300)) == 0);
    CHECK(std::signbit(value_of(convert<To>(-1e-300))));
  };
  check(half());
  check(bfloat16());
  check(float());
}

TEST_CASE("other scalars are converted as the language does", "[scalar]") {
  CHECK(convert<float>(1 + 0x1p-30) == 1);
  CHECK(convert<int>(2.9) == 2);
  CHECK(convert<double>(half(0.5F)) == 0.5);
  CHECK(convert<half>(0.25F) == half(0.25F));
  CHECK(convert<PrimeField>(std::int64_t{-1}) + PrimeField(1) == PrimeField(0));
  CHECK(convert<std::complex<double>>(3.0) == std::complex<double>(3, 0));
}

TEST_CASE("half and bfloat16 are computed in float, everything else in itself", "[scalar]") {
  const auto same = []<class Scalar, class A>(Scalar, A) {
    static_assert(std::is_same_v<typename DefaultAccumulator<Scalar>::type, A>);
    static_assert(std::is_same_v<detail::AccumulatorOf<void, Scalar>, A>);
    static_assert(std::is_same_v<detail::AccumulatorOf<long double, Scalar>, long double>);
  };
  same(half(), float());
  same(bfloat16(), float());
  same(float(), float());
  same(double(), double());
  same(int(), int());
  same(PrimeField(0), PrimeField(0));

  static_assert(detail::rounds<half> && detail::rounds<bfloat16> && detail::rounds<float> &&
                detail::rounds<long double>);
  static_assert(!detail::rounds<int> && !detail::rounds<PrimeField> &&
                !detail::rounds<std::complex<double>>);
  static_assert(detail::provable<float> && detail::provable<int> &&
                !detail::provable<std::complex<double>>);
  static_assert(std::is_same_v<detail::WideFor<half>, double> &&
                std::is_same_v<detail::WideFor<float>, double> &&
                std::is_same_v<detail::WideFor<double>, double> &&
                std::is_same_v<detail::WideFor<long double>, long double> &&
                std::is_same_v<detail::WideFor<PrimeField>, PrimeField>);
  static_assert(std::is_same_v<detail::Reference<float>, double> &&
                std::is_same_v<detail::Reference<double>, long double> &&
                std::is_same_v<detail::Reference<long double>, long double> &&
                std::is_same_v<detail::Reference<std::int64_t>, std::int64_t>);
}

TEST_CASE("units in the last place", "[scalar]") {
  CHECK(detail::unit_roundoff<float>() == 0x1p-24L);
  CHECK(detail::unit_roundoff<double>() == 0x1p-53L);
  CHECK(detail::unit_roundoff<half>() == 0x1p-11L);
  CHECK(ulp<float>(1) == 0x1p-23L);
  CHECK(ulp<float>(-1) == 0x1p-23L);
  CHECK(ulp<float>(0.99L) == 0x1p-24L);
  CHECK(ulp<float>(0) == static_cast<long double>(std::numeric_limits<float>::denorm_min()));
  for (const long double none : {std::numeric_limits<long double>::infinity(),
                                 std::numeric_limits<long double>::quiet_NaN()}) {
    CHECK(ulp<float>(none) == detail::smallest_subnormal<float>());
  }
  CHECK(ulp<float>(1e-44L) == static_cast<long double>(std::numeric_limits<float>::denorm_min()));
  CHECK(detail::smallest_subnormal<float>() ==
        static_cast<long double>(std::numeric_limits<float>::denorm_min()));
  CHECK(detail::smallest_subnormal<double>() ==
        static_cast<long double>(std::numeric_limits<double>::denorm_min()));
  CHECK(ulp<double>(std::numeric_limits<double>::max()) == 0x1p971L);
}

}  // namespace concertina::test
