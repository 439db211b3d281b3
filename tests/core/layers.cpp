// What becomes a convolution: each against its definition in plain loops, and what is refused.
// SPDX-License-Identifier: Apache-2.0
#include <concertina/layers.hpp>

#include <concertina/contract.hpp>
#include <concertina/detail/verify/rounding.hpp>
#include <concertina/modular.hpp>
#include <concertina/random.hpp>
#include <concertina/verify.hpp>

#include "support.hpp"

#include <catch2/catch.hpp>

#include <array>
#include <cstdint>
#include <numeric>
#include <string>
#include <vector>

namespace concertina::test {

using Catch::Contains;

TEST_CASE("identity, scales and selections of channels", "[layers]") {
  Rng rng(4);
  const auto layer = small_integers<std::int64_t, 2>(
      ConvShape<2>{.out = 6, .in = 4, .kernel_size = 3, .groups = 2, .bias = true}, rng);
  const auto x =
      small_integers<std::int64_t, 2>(MapShape<2>{.batch = 2, .channels = 4, .size = {4, 5}}, rng);
  const auto y = layer(x);
  using Layer2 = Conv2d<std::int64_t>;
  CHECK(identity<std::int64_t>(6) * layer == layer);
  CHECK(layer * identity<std::int64_t>(4) == layer);
  CHECK(Layer2(identity<std::int64_t>(6) * layer).shape() == layer.shape());

  const std::vector<std::int64_t> factors{3, -1, 0, 2, 5, 7};
  CHECK(Layer2(channel_scale(factors) * layer)(x) ==
        each_channel(y, [&](std::int64_t n, std::size_t c) { return factors[c] * n; }));
  CHECK(Layer2(channel_scale(factors) * layer).shape().groups == 2);

  const auto selected = [&](const std::vector<Index>& source) {
    FeatureMap<std::int64_t, 2> result(
        {.batch = 2, .channels = std::ssize(source), .size = y.shape().size});
    const Index size = numel(y.shape().size);
    for (Index n = 0; n < 2; ++n) {
      for (Index o = 0; o < std::ssize(source); ++o) {
        std::copy_n(y.values().begin() + (n * 6 + source[static_cast<std::size_t>(o)]) * size, size,
                    result.values().begin() + (n * std::ssize(source) + o) * size);
      }
    }
    return result;
  };
  const std::vector<Index> order{5, 0, 3, 1, 4, 2}, slice{2, 3, 3};
  CHECK(Layer2(channel_select<std::int64_t>(6, order) * layer)(x) == selected(order));
  CHECK(Layer2(channel_select<std::int64_t>(6, slice) * layer)(x) == selected(slice));
  // Seen as [2, 3], then [3, 2].
  CHECK(Layer2(channel_shuffle<std::int64_t>(6, 2) * layer)(x) == selected({0, 3, 1, 4, 2, 5}));
  // A permutation and its inverse.
  CHECK(channel_shuffle<std::int64_t>(6, 3) * (channel_shuffle<std::int64_t>(6, 2) * layer) ==
        layer);

  CHECK_THAT(message_of<ShapeError>([] { channel_select<int>(3, {0, -1}); }),
             Contains("output channel 1 is input channel -1 of 3"));
  CHECK_THROWS_AS(channel_select<int>(3, {}), ShapeError);
  CHECK_THROWS_AS(channel_select<int>(3, {3}), ShapeError);
  CHECK_THROWS_AS(channel_shuffle<int>(6, 4), ShapeError);
  CHECK_THROWS_AS(channel_shuffle<int>(6, 0), ShapeError);
  CHECK_THROWS_AS(channel_shuffle<int>(0, 2), ShapeError);
  CHECK_THROWS_AS(identity<int>(0), ShapeError);
  CHECK_THROWS_AS(channel_scale<int>({}), ShapeError);
  CHECK_THROWS_AS(identity<std::int64_t>(5) * layer, ShapeError);
}

TEST_CASE("an average pool is the mean over windows whose padding counts", "[layers]") {
  Rng rng(5);
  const Index channels = 3;
  const PerAxis<2> kernel{3, 2}, stride{2, 1}, size{6, 5};
  const Padding<2> padding{1, 0};
  // In a prime field the division by 6 is exact.
  const auto pool = average_pool<PrimeField, 2>(channels, kernel, stride, padding);
  FeatureMap<PrimeField, 2> x({.batch = 2, .channels = channels, .size = size});
  fill_random(x.values(), rng);
  const auto y = Conv2d<PrimeField>(pool)(x);
  REQUIRE(y.shape() == MapShape<2>{.batch = 2, .channels = channels, .size = {3, 4}});
  const PrimeField sixth = PrimeField(1) / PrimeField(6);
  std::size_t at = 0;
  for (Index map = 0; map < 2 * channels; ++map) {
    for (Index i = 0; i < 3; ++i) {
      for (Index j = 0; j < 4; ++j) {
        PrimeField sum = 0;
        for (Index a = 0; a < 3; ++a) {
          for (Index b = 0; b < 2; ++b) {
            const Index row = 2 * i - 1 + a, column = j + b;
            if (row < 0 || row >= 6) continue;
            sum += x.values()[static_cast<std::size_t>((map * 6 + row) * 5 + column)];
          }
        }
        REQUIRE(y.values()[at++] == sum * sixth);
      }
    }
  }
  // A ninth is rounded once, in the accumulator's precision.
  const auto ninth = contract<double>(average_pool<float, 2>(1, 3, 1));
  CHECK(ninth.weight()[4] == static_cast<float>(1.0 / 9.0));

  CHECK_THAT(message_of<ShapeError>([] { average_pool<float, 2>(1, 3, 2, 1, true); }),
             Contains("3x3 window") && Contains("ceil_mode") && Contains("name the input size"));
  CHECK_THAT(message_of<ShapeError>([] { average_pool<float, 2>(1, 3, 2, 1, false, false); }),
             Contains("count_include_pad"));
  CHECK_NOTHROW(average_pool<float, 2>(1, 3, 2, 0, false, false));  // nothing is padded
  CHECK_THROWS_AS((average_pool<float, 2>(1, 0, 1)), ShapeError);
}

/// PyTorch's pooling_output_shape.
Index pooled_positions(Index size, Index kernel, Index stride, Index start, Index end, bool ceil) {
  const Index room = size + start + end - kernel;
  Index positions = room / stride + 1;
  if (ceil) {
    positions = (room + stride - 1) / stride + 1;
    if ((positions - 1) * stride >= size + start) --positions;
  }
  return positions;
}

TEST_CASE("ceil_mode is a layer at the sizes where it changes nothing", "[layers]") {
  Index same = 0, refused = 0;
  for (Index size = 1; size <= 9; ++size) {
    for (Index kernel = 1; kernel <= 4; ++kernel) {
      for (Index stride = 1; stride <= 4; ++stride) {
        for (const auto& [start, end] : {std::array<Index, 2>{0, 0}, {1, 1}, {0, 2}, {2, 0}}) {
          if (size + start + end < kernel) continue;
          const auto positions = [&](bool ceil) {
            return pooled_positions(size, kernel, stride, start, end, ceil);
          };
          const auto pool = [&] {
            return average_pool<float, 2>(1, {kernel, 1}, {stride, 1},
                                          Padding<2>::sides({start, 0}, {end, 0}), true, true,
                                          PerAxis<2>{size, 3});
          };
          INFO(size << " " << kernel << " " << stride << " " << start << " " << end);
          if (positions(true) == positions(false)) {
            CHECK(Form(pool()).output_size({size, 3}) == PerAxis<2>{positions(true), 3});
            ++same;
          } else {
            CHECK_THAT(message_of<ShapeError>(pool),
                       Contains("hangs over an input of size " + std::to_string(size) + "x3"));
            ++refused;
          }
        }
      }
    }
  }
  CHECK(same > 100);
  CHECK(refused > 50);
  CHECK(Form(average_pool<float, 2>(2, 2, 2, 0, true, false, PerAxis<2>(4))) ==
        Form(average_pool<float, 2>(2, 2, 2)));
}

TEST_CASE("biases of channels, each its own or one for all", "[layers]") {
  Rng rng(8);
  const auto layer = small_integers<std::int64_t, 2>(
      ConvShape<2>{.out = 4, .in = 3, .kernel_size = 2, .bias = true}, rng);
  const auto x =
      small_integers<std::int64_t, 2>(MapShape<2>{.batch = 2, .channels = 3, .size = 4}, rng);
  using Layer2 = Conv2d<std::int64_t>;
  const std::vector<std::int64_t> bias{3, 0, -2, 5};
  const auto shifted = channel_bias(bias) * layer;
  const auto right =
      each_channel(layer(x), [&](std::int64_t n, std::size_t c) { return n + bias[c]; });
  CHECK(shifted(x) == right);
  CHECK(Layer2(shifted)(x) == right);
  CHECK(verify(shifted, Layer2(shifted)));
  const auto seven = each_channel(x, [&](std::int64_t n, std::size_t) { return n + 7; });
  CHECK((channel_bias<std::int64_t>(3, 7) * identity<std::int64_t>(3)).tree().parts().size() == 2);
  CHECK(Layer2(layer * channel_bias<std::int64_t>(3, 7))(x) == layer(seven));
  CHECK(Layer2(layer + channel_bias<std::int64_t>(4, 7) * (layer - layer))(x) ==
        each_channel(layer(x), [&](std::int64_t n, std::size_t) { return n + 7; }));
  CHECK_THROWS_AS(channel_bias<int>({}), ShapeError);
  CHECK_THROWS_AS(channel_bias<int>(0, 1), ShapeError);
  CHECK_THROWS_AS(channel_bias<std::int64_t>(3, 7) * layer, ShapeError);
  // It is a bias also for what comes after: padding stands on zeros.
  const auto padded = small_integers<std::int64_t, 2>(
      ConvShape<2>{.out = 2, .in = 4, .kernel_size = 3, .padding = 1}, rng);
  CHECK_FALSE(exactness(padded * shifted));
  // A batch norm of which only the bias is learnt.
  const Conv2d<double> wide = layer.cast<double>();
  const Conv2d<double> normed = batch_norm(BatchNorm<double>{.running_mean = {0, 0, 0, 0},
                                                             .running_var = {1, 1, 1, 1},
                                                             .bias = {3, 0, -2, 5},
                                                             .eps = 0}) *
                                wide;
  CHECK(normed == Layer2(shifted).cast<double>());
}

TEMPLATE_TEST_CASE_SIG("a linear layer at every position is a view of the same elements",
                       "[layers]", ((int Rank), Rank), 0, 1, 2, 3) {
  Rng rng(9);
  const auto linear = small_integers<std::int64_t, 0>(
      ConvShape<0>{.out = 4, .in = 6, .groups = 2, .bias = true}, rng);
  const auto x =
      small_integers<std::int64_t, Rank>(MapShape<Rank>{.batch = 2, .channels = 6, .size = 3}, rng);
  const ConvView<const std::int64_t, Rank> view = pointwise<Rank>(linear);
  CHECK(view.weight().data() == linear.weight().data());
  const auto y = view(x);
  const Index pixels = numel(x.shape().size);
  REQUIRE(y.shape() == MapShape<Rank>{.batch = 2, .channels = 4, .size = 3});
  for (Index n = 0; n < 2; ++n) {
    for (Index pixel = 0; pixel < pixels; ++pixel) {
      FeatureMap<std::int64_t, 0> channels({.channels = 6});
      for (Index c = 0; c < 6; ++c) {
        channels.values()[static_cast<std::size_t>(c)] =
            x.values()[static_cast<std::size_t>((n * 6 + c) * pixels + pixel)];
      }
      const auto right = linear(channels);
      for (Index o = 0; o < 4; ++o) {
        CHECK(y.values()[static_cast<std::size_t>((n * 4 + o) * pixels + pixel)] ==
              right.values()[static_cast<std::size_t>(o)]);
      }
    }
  }
  const auto conv = small_integers<std::int64_t, Rank>(
      ConvShape<Rank>{.out = 6, .in = 2, .kernel_size = 2, .padding = 1}, rng);
  const auto scale = channel_scale<std::int64_t>({1, 2, 3, 4});
  const auto product = scale * pointwise<Rank>(linear) * conv;
  const Conv<std::int64_t, Rank> whole = product;
  const auto z =
      small_integers<std::int64_t, Rank>(MapShape<Rank>{.batch = 2, .channels = 2, .size = 3}, rng);
  CHECK(whole(z) == product(z));
  CHECK(verify(product, whole));
  CHECK(pointwise<Rank>(ConvView<const std::int64_t, 0>(linear)).weight().data() ==
        linear.weight().data());
}

TEST_CASE("a linear layer after a flatten is a layer as large as the map", "[layers]") {
  Rng rng(6);
  const auto linear =
      small_integers<std::int64_t, 0>(ConvShape<0>{.out = 4, .in = 24, .bias = true}, rng);
  const Conv2d<std::int64_t> layer = linear_as_conv(linear, 2, PerAxis<2>{3, 4});
  CHECK(linear_as_conv(ConvView<const std::int64_t, 0>(linear), 2, PerAxis<2>{3, 4}) == layer);
  const auto x =
      small_integers<std::int64_t, 2>(MapShape<2>{.batch = 3, .channels = 2, .size = {3, 4}}, rng);
  const auto y = layer(x);
  CHECK(y.shape() == MapShape<2>{.batch = 3, .channels = 4, .size = 1});
  const auto flat = linear({{.batch = 3, .channels = 24}, x.values()});
  CHECK(std::ranges::equal(y.values(), flat.values()));
  CHECK_THAT(message_of<ShapeError>([&] { linear_as_conv(linear, 2, PerAxis<2>{3, 5}); }),
             Contains("linear 24->4 +bias") && Contains("30 elements"));
}

TEST_CASE("pixel unshuffle moves blocks of positions to channels", "[layers]") {
  Rng rng(31);
  const auto layer = pixel_unshuffle<double, 2>(3, 2);
  const auto x = small_integers<double, 2>({.batch = 2, .channels = 3, .size = {4, 6}}, rng);
  const auto y = layer(x);
  REQUIRE(y.shape() == MapShape<2>{.batch = 2, .channels = 12, .size = {2, 3}});
  for (Index n = 0; n < 2; ++n) {
    for (Index c = 0; c < 3; ++c) {
      for (Index i = 0; i < 4; ++i) {
        for (Index j = 0; j < 6; ++j) {
          const Index channel = c * 4 + i % 2 * 2 + j % 2;
          CHECK(
              y.values()[static_cast<std::size_t>(((n * 12 + channel) * 2 + i / 2) * 3 + j / 2)] ==
              x.values()[static_cast<std::size_t>(((n * 3 + c) * 4 + i) * 6 + j)]);
        }
      }
    }
  }
  // Focus: a 3x3 after it is a 6x6 of stride 2 at even sizes.
  const auto conv =
      small_integers<double>(ConvShape<2>{.out = 2, .in = 12, .kernel_size = 3, .padding = 1}, rng);
  const auto focus = contract(conv * layer, exact_at(4, 6));
  CHECK(focus.shape() ==
        ConvShape<2>{.out = 2, .in = 3, .kernel_size = 6, .stride = 2, .padding = 2});
  CHECK(focus(x) == conv(y));
  CHECK_THROWS_AS((pixel_unshuffle<double, 2>(3, 0)), ShapeError);
}

TEST_CASE("a blur pool is its filter along every axis", "[layers]") {
  Rng rng(32);
  const auto x = small_integers<double, 2>({.batch = 1, .channels = 2, .size = {5, 6}}, rng);
  const Conv2d<double> pool = blur_pool<double, 2>(2, {1, 2, 1}, 2, 1);
  CHECK(pool.shape() ==
        ConvShape<2>{.out = 2, .in = 2, .kernel_size = 3, .stride = 2, .padding = 1, .groups = 2});
  const double expected[] = {1, 2, 1, 2, 4, 2, 1, 2, 1};
  for (std::size_t i = 0; i < 18; ++i) CHECK(pool.weight()[i] == expected[i % 9] / 16);
  const auto conv = small_integers<double>(
      ConvShape<2>{.out = 2, .in = 2, .kernel_size = 3, .padding = 2, .groups = 2}, rng);
  const Expr<double, 2> valid = blur_pool<double, 2>(2, {1, 2, 1}, 2);
  CHECK(contract(valid * conv)(x) == valid(conv(x)));
  CHECK_THROWS_AS((blur_pool<double, 2>(2, {1, -1}, 2)), ShapeError);
  CHECK_THROWS_AS((blur_pool<double, 2>(2, {}, 2)), ShapeError);
}

namespace {

/// A leaf after a layer: proved, and along any direction of the layer its gradient is exact.
template <int Rank, class Leaf>
void check_after(const ConvShape<Rank>& shape, const Leaf& leaf, Rng& rng) {
  const auto random = [&] {
    Conv<PrimeField, Rank> layer(shape);
    fill_random(layer.weight(), rng);
    fill_random(layer.bias(), rng);
    return layer;
  };
  Conv<float, Rank> rounding(shape);
  initialize_uniform(rounding, rng);
  const Expr<float, Rank> of_floats = leaf.template operator()<float>() * rounding;
  INFO(to_string(Form(of_floats)));
  CHECK(exactness(of_floats).exact());
  CHECK(verify<double>(of_floats, contract<double>(of_floats)));

  const Conv<PrimeField, Rank> layer = random(), direction = random();
  const Expr<PrimeField, Rank> before = leaf.template operator()<PrimeField>();
  Contraction<PrimeField, Rank> contraction{Form(before * layer)};
  const auto product = [](const Conv<PrimeField, Rank>& f, const Conv<PrimeField, Rank>& g) {
    PrimeField sum(0);
    for (std::size_t i = 0; i < f.weight().size(); ++i) sum = sum + f.weight()[i] * g.weight()[i];
    for (std::size_t i = 0; i < f.bias().size(); ++i) sum = sum + f.bias()[i] * g.bias()[i];
    return sum;
  };
  const Conv<PrimeField, Rank> whole = contraction.forward(before * layer);
  Conv<PrimeField, Rank> gradient = whole;
  fill_random(gradient.weight(), rng);
  fill_random(gradient.bias(), rng);
  const Conv<PrimeField, Rank> of_layer = contraction.backward(before * layer, gradient)[0];
  Conv<PrimeField, Rank> moved = layer;
  for (std::size_t i = 0; i < moved.weight().size(); ++i)
    moved.weight()[i] = moved.weight()[i] + direction.weight()[i];
  for (std::size_t i = 0; i < moved.bias().size(); ++i)
    moved.bias()[i] = moved.bias()[i] + direction.bias()[i];
  CHECK(product(gradient, contraction.forward(before * moved)) ==
        product(gradient, whole) + product(of_layer, direction));
}

}  // namespace

TEMPLATE_TEST_CASE_SIG("unshuffles and blur pools after any layer are proved, and differentiated",
                       "[layers]", ((int Rank), Rank), 1, 2, 3) {
  Rng rng(33);
  for (const ConvShape<Rank>& shape : all_shapes<Rank>(rng, 10)) {
    check_after(
        shape, [&]<class S>() { return Expr<S, Rank>(pixel_unshuffle<S, Rank>(shape.out, 2)); },
        rng);
    check_after(shape, [&]<class S>() { return blur_pool<S, Rank>(shape.out, {1, 3, 2}, 2); }, rng);
  }
}

TEST_CASE("more channels than fit are refused before their memory", "[layers]") {
  CHECK_THAT(message_of<SizeError>([] { channel_shuffle<float>(Index{1} << 62, 2); }),
             Catch::StartsWith("channel_shuffle: "));
  constexpr Index many = Index{1} << 62;
  CHECK_THAT(message_of<SizeError>([] { channel_bias<float>(many, 1); }),
             Catch::StartsWith("channel_bias: "));
  CHECK_THROWS_AS(2.0F * identity<float>(many), SizeError);
  CHECK_THROWS_AS(BatchNorm<float>::initialize(many), SizeError);
  CHECK_THROWS_AS(BatchNorm<float>::initialize(0), ShapeError);
}

}  // namespace concertina::test
