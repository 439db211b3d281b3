// Random layers: the very numbers, so that they are the same on every platform, and their range.
// SPDX-License-Identifier: Apache-2.0
#include <concertina/random.hpp>

#include "support.hpp"

#include <cmath>
#include <limits>

namespace concertina::test {
namespace {

/// Says the same thing every time.
template <class Bits>
struct Constant {
  using result_type = Bits;
  static constexpr Bits min() { return 0; }
  static constexpr Bits max() { return std::numeric_limits<Bits>::max(); }
  Bits operator()() { return value; }

  Bits value = 0;
};

static_assert(BitGenerator<std::mt19937_64> && BitGenerator<std::mt19937>);
static_assert(BitGenerator<Constant<std::uint32_t>> && BitGenerator<Constant<std::uint64_t>>);
static_assert(!BitGenerator<std::minstd_rand>, "starts at 1");
static_assert(!BitGenerator<std::ranlux24>, "has 24 bits");
static_assert(!BitGenerator<Constant<std::uint16_t>>, "has 16 bits");

TEST_CASE("the generators' bits are taken in order", "[random]") {
  std::mt19937_64 wide;  // seed 5489; the standard prescribes the 10000th number of both
  CHECK(random_bits(wide) == 0xc96d191cf6f6aea6);
  CHECK(random_bits(wide) == 0x401f7ac78bc80f1c);
  wide.discard(9997);
  CHECK(random_bits(wide) == 9981545732273789042u);

  std::mt19937 narrow;  // 0xd091bb5c, 0x22ae9ef6, 0xe7e1faee, 0xd5c31f79: the high half first
  CHECK(random_bits(narrow) == 0xd091bb5c22ae9ef6);
  CHECK(random_bits(narrow) == 0xe7e1faeed5c31f79);
}

TEST_CASE("uniform numbers are known to the last bit", "[random]") {
  // bits >> 11 out of 2^53, doubled, less 1: the third of seed 1, 0x7382d1e77ae6459a, thus gives
  // 2 * 0x0e705a3cef5cc8 - 2^53 = -439417081733944 * 2, all in units of 2^-53.
  std::mt19937_64 one(1), standard;
  CHECK(random_uniform(one, 1) == -3297746019193587 * 0x1p-52);
  CHECK(random_uniform(one, 1) == -3274954271071457 * 0x1p-52);
  CHECK(random_uniform(one, 1) == -439417081733944 * 0x1p-52);
  CHECK(random_uniform(one, 1) == -4314230212843848 * 0x1p-52);
  CHECK(random_uniform(standard, 1) == 2583453490929365 * 0x1p-52);
  CHECK(random_uniform(standard, 2) == -2247473289398015 * 0x1p-51);
  std::mt19937 narrow;
  CHECK(random_uniform(narrow, 1) == 2834779003442643 * 0x1p-52);
  CHECK(random_uniform(narrow, 0.5) == 3655048808282211 * 0x1p-53);
}

TEST_CASE("uniform numbers lie in [-bound, bound)", "[random]") {
  const double bound = GENERATE(1.0, 0.25, 3.0, 0.1, 1e-300, 1e300);
  Constant<std::uint64_t> low{0}, middle{std::uint64_t{1} << 63},
      high{std::numeric_limits<std::uint64_t>::max()};
  CHECK(random_uniform(low, bound) == -bound);
  CHECK(random_uniform(middle, bound) == 0);
  CHECK(random_uniform(high, bound) < bound);
  CHECK(random_uniform(high, bound) >= bound * (1 - 0x1p-52));

  Rng rng(3);
  int below = 0, beyond_half = 0;
  for (int n = 0; n < 4000; ++n) {
    const double number = random_uniform(rng, bound);
    if (!(number >= -bound && number < bound)) FAIL_CHECK(number);
    below += number < 0;
    beyond_half += std::abs(number) >= bound / 2;
  }
  CHECK(std::abs(below - 2000) < 200);  // six standard deviations
  CHECK(std::abs(beyond_half - 2000) < 200);
}

TEST_CASE("a layer is initialised within 1 / sqrt of what an output reads", "[random]") {
  // Four channels a group and four taps: 1 / sqrt(16).
  Conv2d<double> layer({.out = 6, .in = 12, .kernel_size = {2, 2}, .groups = 3, .bias = true});
  std::mt19937_64 generator(1), again(1);
  initialize_uniform(layer, generator);
  CHECK(layer.weight()[0] == -3297746019193587 * 0x1p-54);
  CHECK(layer.weight()[3] == -4314230212843848 * 0x1p-54);
  double largest = 0;
  for (const double number : layer.weight()) {
    CHECK(number == random_uniform(again, 0.25));
    largest = std::max(largest, std::abs(number));
  }
  for (const double number : layer.bias()) CHECK(number == random_uniform(again, 0.25));
  CHECK(generator == again);
  CHECK(largest <= 0.25);
  CHECK(largest > 0.2);
}

TEST_CASE("a float layer has the double layer's numbers, rounded", "[random]") {
  const ConvShape<0> shape{.out = 3, .in = 4, .bias = true};
  Linear<float> narrow(shape);
  Linear<double> wide(shape);
  std::mt19937 a(7), b(7);
  initialize_uniform(narrow, a);
  initialize_uniform(wide, b);
  CHECK(narrow == wide.cast<float>());
  CHECK(wide != Linear<double>(shape));
  Linear<float> unbiased({.out = 3, .in = 4});
  initialize_uniform(unbiased, a);
  CHECK(unbiased.bias().empty());
}

}  // namespace
}  // namespace concertina::test
