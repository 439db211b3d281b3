// Maps by channel: their shape, and how they join layers of any rank.
// SPDX-License-Identifier: Apache-2.0
#include <concertina/channel_map.hpp>

#include <concertina/contract.hpp>
#include <concertina/layers.hpp>

#include "support.hpp"

#include <catch2/catch.hpp>

#include <type_traits>

namespace concertina::test {

TEST_CASE("a map by channel is a 1x1, depthwise unless channels change places", "[channel_map]") {
  const ChannelMap<float> scale{.in = 3, .out = 3, .weight = {1, 2, 3}};
  CHECK(scale.shape<2>() == ConvShape<2>{.out = 3, .in = 3, .groups = 3});
  const ChannelMap<float> moved{.in = 3, .out = 2, .source = {2, 0}, .bias = {1, 1}};
  CHECK(moved.shape<1>() == ConvShape<1>{.out = 2, .in = 3, .bias = true});
  const ChannelMap<float> centred{.in = 2, .out = 2, .mean = {1, 2}};
  CHECK(centred.shape<0>().bias);
}

TEST_CASE("what has no rank takes its neighbour's", "[channel_map]") {
  Rng rng(3);
  // The roots of its variances are whole numbers, so everything is exact.
  const BatchNorm<double> norm{.running_mean = {1, -2, 3},
                               .running_var = {3, 8, 15},
                               .weight = {4, 6, -8},
                               .bias = {1, 0, -1},
                               .eps = 1};
  const auto check = [&]<int Rank>(std::integral_constant<int, Rank>) {
    const auto layer = small_integers<double, Rank>(ConvShape<Rank>{.out = 3, .in = 3}, rng);
    const auto x = small_integers<double, Rank>(MapShape<Rank>{.channels = 3, .size = 4}, rng);
    static_assert(std::is_same_v<decltype(batch_norm(norm) * layer), Expr<double, Rank>>);
    static_assert(std::is_same_v<decltype(layer + batch_norm(norm)), Expr<double, Rank>>);
    // Among themselves they have none, in whatever order they are written.
    static_assert(
        std::is_same_v<decltype(batch_norm(norm) * identity<double>(3)), Expr<double, any_rank>>);
    const auto after = 2.0 * (batch_norm(norm) * channel_scale<double>({2, 4, 8})) * layer;
    const auto beside = identity<double>(3) + identity<double>(3) + layer;
    CHECK(after(x) == (2.0 * batch_norm(norm) * (channel_scale<double>({2, 4, 8}) * layer))(x));
    CHECK(beside == layer + 2.0 * identity<double>(3));
    CHECK(layer - layer + identity<double>(3) == Expr<double, Rank>(identity<double>(3)));
  };
  check(std::integral_constant<int, 0>());
  check(std::integral_constant<int, 1>());
  check(std::integral_constant<int, 2>());
  check(std::integral_constant<int, 3>());
}

}  // namespace concertina::test
