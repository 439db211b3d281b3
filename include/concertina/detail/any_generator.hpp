// A generator of bits whose type is known at run time alone.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/parallel.hpp>

#include <cstdint>
#include <limits>

namespace concertina::detail {

/// Any generator behind one type, so that what draws from it is compiled once.
class AnyGenerator {
 public:
  using result_type = std::uint64_t;
  static constexpr result_type min() { return 0; }
  static constexpr result_type max() { return std::numeric_limits<result_type>::max(); }

  explicit AnyGenerator(FunctionRef<std::uint64_t()> bits) : bits_(bits) {}
  result_type operator()() { return bits_(); }

 private:
  FunctionRef<std::uint64_t()> bits_;
};

}  // namespace concertina::detail
