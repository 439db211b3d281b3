// Random layers from the caller's generator, the same on every platform.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/conv.hpp>
#include <concertina/detail/any_generator.hpp>
#include <concertina/parallel.hpp>

#include <cmath>
#include <cstdint>
#include <limits>
#include <random>

namespace concertina {

/// A generator whose output is 32 or 64 uniform bits, such as std::mt19937_64. The standard's
/// distributions are not used, because their results differ between implementations.
template <class G>
concept BitGenerator = std::uniform_random_bit_generator<G> && G::min() == 0 &&
                       (G::max() == std::numeric_limits<std::uint32_t>::max() ||
                        G::max() == std::numeric_limits<std::uint64_t>::max());

/// 64 uniform bits; a 32-bit generator is asked twice, the high half first.
template <BitGenerator Generator>
std::uint64_t random_bits(Generator& generator) {
  if constexpr (Generator::max() == std::numeric_limits<std::uint64_t>::max()) {
    return generator();
  } else {
    const std::uint64_t high = generator();
    return high << 32 | generator();
  }
}

/// Uniform in [-bound, bound), a multiple of bound * 2^-52.
template <BitGenerator Generator>
double random_uniform(Generator& generator, double bound) {
  const auto fraction = static_cast<double>(random_bits(generator) >> 11) * 0x1p-53;
  return (2 * fraction - 1) * bound;  // the bracket is exact
}

/// Fills a layer as PyTorch initialises one: weight and bias uniform within 1 / sqrt(fan_in), where
/// fan_in is how many elements one output reads, in / groups * taps. Weight first, in memory order,
/// then bias.
/// Source  torch.nn.Conv2d and torch.nn.Linear, "Variables"
template <class Scalar, int Rank, BitGenerator Generator>
void initialize_uniform(Conv<Scalar, Rank>& layer, Generator& generator) {
  const ConvShape<Rank>& shape = layer.shape();
  const Index fan_in = shape.in / shape.groups * numel(shape.kernel_size);
  const double bound = 1 / std::sqrt(static_cast<double>(fan_in));
  for (Scalar& element : layer.weight()) {
    element = static_cast<Scalar>(random_uniform(generator, bound));
  }
  for (Scalar& element : layer.bias()) {
    element = static_cast<Scalar>(random_uniform(generator, bound));
  }
}

}  // namespace concertina
