// SPDX-License-Identifier: Apache-2.0
#include <concertina/cuda/residue.hpp>

#include "support.hpp"

#include <concertina/modular.hpp>
#include <concertina/random.hpp>

#include <catch2/catch.hpp>

#include <bit>
#include <cstdint>
#include <vector>

namespace concertina::test {
namespace {

TEST_CASE("residues have the bytes, sums and products of PrimeField", "[cuda]") {
  constexpr std::uint64_t modulus = PrimeField::modulus;
  std::vector<std::uint64_t> values = {0,           1,           2,           modulus - 2,
                                       modulus - 1, 1ULL << 31U, 1ULL << 32U, 1ULL << 60U};
  Rng rng(1);
  for (int i = 0; i < 100; ++i) values.push_back(random_bits(rng));
  values.insert(values.end(), {modulus, modulus + 1, ~std::uint64_t{0}});  // reduced
  for (const std::uint64_t a : values) {
    CHECK(std::bit_cast<PrimeField>(cuda::Residue(a)) == PrimeField(a));
    for (const std::uint64_t b : values) {
      const cuda::Residue x(a), y(b);
      CHECK((x + y).value() == (PrimeField(a) + PrimeField(b)).value());
      CHECK((x * y).value() == (PrimeField(a) * PrimeField(b)).value());
    }
  }
}

}  // namespace
}  // namespace concertina::test
