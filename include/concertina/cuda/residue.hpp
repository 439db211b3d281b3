// Elements of PrimeField as a device computes with them.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/cuda/block.hpp>

#include <cstdint>

namespace concertina::cuda {

/// An integer modulo 2^61 - 1 with the bytes of a PrimeField: its representative below that. A
/// contraction of these is exact, so one of random ones proves the plan for all weights.
class Residue {
 public:
  static constexpr std::uint64_t modulus = (std::uint64_t{1} << 61) - 1;

  Residue() = default;
  CONCERTINA_HOST_DEVICE constexpr explicit Residue(std::uint64_t value)
      : value_(value % modulus) {}

  CONCERTINA_HOST_DEVICE constexpr std::uint64_t value() const { return value_; }

  CONCERTINA_HOST_DEVICE constexpr Residue& operator+=(Residue b) {
    value_ = reduced(value_ + b.value_);
    return *this;
  }
  friend CONCERTINA_HOST_DEVICE constexpr Residue operator+(Residue a, Residue b) { return a += b; }

  /// The product of 122 bits is high * 2^61 + low, and 2^61 is 1.
  friend CONCERTINA_HOST_DEVICE constexpr Residue operator*(Residue a, Residue b) {
    Residue product;
    product.value_ = reduced((a.value_ * b.value_ & modulus) +
                             (high(a.value_, b.value_) << 3 | a.value_ * b.value_ >> 61));
    return product;
  }

  friend constexpr bool operator==(Residue, Residue) = default;

 private:
  CONCERTINA_HOST_DEVICE static constexpr std::uint64_t reduced(std::uint64_t value) {
    return value >= modulus ? value - modulus : value;
  }

  /// The upper 64 bits of a product.
  CONCERTINA_HOST_DEVICE static constexpr std::uint64_t high(std::uint64_t a, std::uint64_t b) {
#ifdef __CUDA_ARCH__
    return __umul64hi(a, b);
#else
    constexpr std::uint64_t low = 0xffff'ffff;
    const std::uint64_t middle = (a >> 32) * (b & low) + ((a & low) * (b & low) >> 32),
                        other = (a & low) * (b >> 32) + (middle & low);
    return (a >> 32) * (b >> 32) + (middle >> 32) + (other >> 32);
#endif
  }

  std::uint64_t value_;
};

}  // namespace concertina::cuda
