// Integers modulo a prime: a field in which arithmetic is exact, so that equality proves.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/detail/modular.hpp>
#include <concertina/error.hpp>

#include <Eigen/Core>

#include <concepts>
#include <cstdint>
#include <ostream>

namespace concertina {

/// An integer modulo the prime P < 2^63. A signed integer n stands for its residue: Modular<7>(-1)
/// == 6. Division is by the multiplicative inverse; dividing by zero throws Error.
template <std::uint64_t P>
  requires(P >= 2 && P < (std::uint64_t{1} << 63))
class Modular {
 public:
  static constexpr std::uint64_t modulus = P;

  constexpr Modular() = default;
  constexpr Modular(std::signed_integral auto n)
      : value_(n >= 0 ? static_cast<std::uint64_t>(n) % P
                      : P - 1 - static_cast<std::uint64_t>(-(n + 1)) % P) {}
  constexpr Modular(std::unsigned_integral auto n) : value_(n % P) {}

  /// The representative in 0 .. P-1.
  constexpr std::uint64_t value() const noexcept { return value_; }

  constexpr Modular operator-() const noexcept { return residue(value_ == 0 ? 0 : P - value_); }
  constexpr Modular& operator+=(Modular b) noexcept {
    value_ = value_ >= P - b.value_ ? value_ - (P - b.value_) : value_ + b.value_;
    return *this;
  }
  constexpr Modular& operator-=(Modular b) noexcept { return *this += -b; }
  constexpr Modular& operator*=(Modular b) noexcept {
    value_ = detail::multiply_modulo(value_, b.value_, P);
    return *this;
  }
  constexpr Modular& operator/=(Modular b) { return *this *= b.inverse(); }

  /// By Fermat: b^(P-2). Throws Error for zero.
  constexpr Modular inverse() const {
    if (value_ == 0) throw Error("Modular: zero has no inverse");
    Modular power = 1, square = *this;
    for (std::uint64_t exponent = P - 2; exponent != 0; exponent >>= 1, square *= square) {
      if (exponent & 1) power *= square;
    }
    return power;
  }

  friend constexpr Modular operator+(Modular a, Modular b) noexcept { return a += b; }
  friend constexpr Modular operator-(Modular a, Modular b) noexcept { return a -= b; }
  friend constexpr Modular operator*(Modular a, Modular b) noexcept { return a *= b; }
  friend constexpr Modular operator/(Modular a, Modular b) { return a /= b; }
  friend constexpr bool operator==(Modular, Modular) = default;
  friend std::ostream& operator<<(std::ostream& out, Modular a) { return out << a.value_; }

 private:
  static constexpr Modular residue(std::uint64_t value) noexcept {
    Modular result;
    result.value_ = value;
    return result;
  }

  std::uint64_t value_ = 0;
};

/// The field in which `verify.hpp` proves: the Mersenne prime 2^61 - 1 makes reduction two
/// additions.
using PrimeField = Modular<(std::uint64_t{1} << 61) - 1>;

}  // namespace concertina

/// What Eigen's products ask of a scalar.
template <std::uint64_t P>
struct Eigen::NumTraits<concertina::Modular<P>> : Eigen::GenericNumTraits<concertina::Modular<P>> {
  using Real = concertina::Modular<P>;
  using NonInteger = Real;
  using Nested = Real;
  using Literal = Real;
  static constexpr int IsComplex = 0, IsInteger = 1, IsSigned = 0, RequireInitialization = 1;
  static constexpr int ReadCost = 1, AddCost = 3, MulCost = 6;
};
