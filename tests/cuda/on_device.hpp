// A plan run on a device, as a training loop runs it: captured in a CUDA graph.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "passes.hpp"

#include <concertina/modular.hpp>

#include <Eigen/Core>

#include <cstdint>
#include <type_traits>

namespace concertina::test {

/// False where there is no device: says so, and by that ctest knows that the test was skipped.
bool can_run();

/// Both passes, each tensor's elements as 16, 32 or 64 bits.
template <class Bits>
void run_on_device(Storage storage, const cuda::ContractionPlan& plan, Passes<Bits>& passes);

/// Both passes on the device.
template <class Stored>
void run(const cuda::ContractionPlan& plan, Passes<Stored>& passes, std::uint64_t) {
  using Bits =
      std::conditional_t<sizeof(Stored) == 2, std::uint16_t,
                         std::conditional_t<sizeof(Stored) == 4, std::uint32_t, std::uint64_t>>;
  constexpr Storage storage = std::is_same_v<Stored, double>        ? Storage::float64
                              : std::is_same_v<Stored, PrimeField>  ? Storage::residue
                              : std::is_same_v<Stored, Eigen::half> ? Storage::float16
                              : std::is_same_v<Stored, float>       ? Storage::float32
                                                                    : Storage::bfloat16;
  Passes<Bits> bits = cast<Bits>(passes);
  run_on_device(storage, plan, bits);
  passes = cast<Stored>(bits);
}

}  // namespace concertina::test
