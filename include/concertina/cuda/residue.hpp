// Elements of PrimeField as a device computes with them.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/cuda/detail/block.hpp>

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
    std::uint64_t high = 0;
    const std::uint64_t low = a.value_ * b.value_;
#ifdef __CUDA_ARCH__
    high = __umul64hi(a.value_, b.value_);
#else
    __extension__ using Wide = unsigned __int128;
    high = static_cast<std::uint64_t>(static_cast<Wide>(a.value_) * b.value_ >> 64);
#endif
    Residue product;
    product.value_ = reduced((low & modulus) + (high << 3 | low >> 61));
    return product;
  }

  friend constexpr bool operator==(Residue, Residue) = default;

 private:
  CONCERTINA_HOST_DEVICE static constexpr std::uint64_t reduced(std::uint64_t value) {
    return value >= modulus ? value - modulus : value;
  }

  std::uint64_t value_;
};

}  // namespace concertina::cuda
