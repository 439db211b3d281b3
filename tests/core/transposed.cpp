// The adjoint of a layer: against the definition, by hand, as a layer, and in products.
// SPDX-License-Identifier: Apache-2.0
#include <concertina/transposed.hpp>

#include <concertina/modular.hpp>

#include "support.hpp"

#include <optional>

namespace concertina::test {
namespace {

template <int Rank>
struct Pair {
  Conv<PrimeField, Rank> layer, linear;  // the same but for the bias
};

template <int Rank>
Pair<Rank> random_pair(ConvShape<Rank> shape, Rng& rng) {
  Conv<PrimeField, Rank> layer(shape);
  fill_random(layer.weight(), rng);
  fill_random(layer.bias(), rng);
  shape.bias = false;
  return {layer, {shape, {layer.weight().begin(), layer.weight().end()}}};
}

template <int Rank>
FeatureMap<PrimeField, Rank> random_map(const MapShape<Rank>& shape, Rng& rng) {
  FeatureMap<PrimeField, Rank> map(shape);
  fill_random(map.values(), rng);
  return map;
}

/// The smallest extent that the layer takes to this many positions, by trying them all.
template <int Rank>
std::optional<Index> smallest_extent(const ConvShape<Rank>& shape, Index positions, int axis) {
  for (Index size = 1; counted_positions(shape, size, axis) <= positions; ++size) {
    if (counted_positions(shape, size, axis) == positions) return size;
  }
  return std::nullopt;
}

TEMPLATE_TEST_CASE_SIG("<F x, y> == <x, transposed(F)(y)> for every input size of F",
                       "[transposed]", ((int Rank), Rank), 0, 1, 2, 3) {
  Rng rng(1);
  for (const ConvShape<Rank>& shape : all_shapes<Rank>(rng, 40)) {
    INFO(to_string(shape));
    const auto [layer, linear] = random_pair(shape, rng);
    const PerAxis<Rank> size = random_input_size(shape, rng);
    const auto x = random_map<Rank>({.batch = 2, .channels = shape.in, .size = size}, rng);
    const auto y = random_map<Rank>(layer(x).shape(), rng);
    CHECK(inner_product(linear(x), y) == inner_product(x, transposed(layer)(y, size)));
  }
}

TEMPLATE_TEST_CASE_SIG("without a size it is the smallest that F takes there", "[transposed]",
                       ((int Rank), Rank), 0, 1, 2, 3) {
  Rng rng(2);
  for (const ConvShape<Rank>& shape : all_shapes<Rank>(rng, 40)) {
    const auto adjoint = transposed(small_integers<float>(shape, rng));
    PerAxis<Rank> from, to;
    bool exists = true;
    for (int axis = 0; axis < Rank; ++axis) {
      from[axis] = random_index(rng, 1, 5);
      const auto smallest = smallest_extent(shape, from[axis], axis);
      exists = exists && smallest;
      to[axis] = smallest.value_or(0);
    }
    INFO(to_string(shape) << " from " << to_string(from));
    const auto y = small_integers<float, Rank>({.channels = shape.out, .size = from}, rng);
    if (exists) {
      CHECK(adjoint.output_size(from) == to);
      CHECK(adjoint(y).shape() == MapShape<Rank>{.channels = shape.in, .size = to});
      CHECK(adjoint(y) == adjoint(y, to));
    } else {
      CHECK_THROWS_AS(adjoint.output_size(from), ShapeError);
      CHECK_THROWS_AS(adjoint(y), ShapeError);
    }
  }
}

TEST_CASE("a stride spreads numbers, by hand", "[transposed]") {
  const Conv1d<int> layer({.out = 1, .in = 1, .kernel_size = 3, .stride = 2}, {1, 2, 3});
  const FeatureMap<int, 1> y({.size = 2}, {1, 10});
  CHECK(transposed(layer)(y) == FeatureMap<int, 1>({.size = 5}, {1, 2, 13, 20, 30}));
  CHECK(transposed(layer)(y, 6) == FeatureMap<int, 1>({.size = 6}, {1, 2, 13, 20, 30, 0}));
  CHECK(transposed(layer, {100})(y, 6) ==
        FeatureMap<int, 1>({.size = 6}, {101, 102, 113, 120, 130, 100}));
}

TEST_CASE("groups exchange their channels, by hand", "[transposed]") {
  // PyTorch's ConvTranspose1d(2, 4, 1, groups=2): channel 0 writes channels 0 and 1, channel 1
  // writes 2 and 3.
  const Conv1d<int> layer({.out = 2, .in = 4, .groups = 2}, {1, 2, 3, 4});
  const FeatureMap<int, 1> y({.channels = 2}, {1, 10});
  CHECK(transposed(layer)(y) == FeatureMap<int, 1>({.channels = 4}, {1, 2, 30, 40}));
}

TEST_CASE("sizes are PyTorch's", "[transposed]") {
  const auto sizes = [](const ConvShape<2>& shape) { return transposed(Conv2d<float>(shape)); };
  const auto unet = sizes({.out = 64, .in = 32, .kernel_size = 2, .stride = 2});
  CHECK(unet.output_size({28, 14}) == PerAxis<2>{56, 28});
  const auto gan = sizes({.out = 8, .in = 4, .kernel_size = {4, 3}, .stride = 2, .padding = 1});
  CHECK(gan.output_size(7) == PerAxis<2>{14, 13});
  CHECK(gan({{.channels = 8, .size = 7}, std::vector<float>(8 * 49)}, {15, 14}).shape().size ==
        PerAxis<2>{15, 14});
}

TEMPLATE_TEST_CASE_SIG("twice transposed is F without its bias", "[transposed]", ((int Rank), Rank),
                       0, 1, 2, 3) {
  Rng rng(3);
  for (const ConvShape<Rank>& shape : all_shapes<Rank>(rng, 10)) {
    const auto [layer, linear] = random_pair(shape, rng);
    const auto twice = transposed(transposed(layer));
    CHECK(twice.shape() == linear.shape());
    CHECK(twice == linear);
  }
}

TEMPLATE_TEST_CASE_SIG("for stride 1 it is a layer", "[transposed]", ((int Rank), Rank), 0, 1, 2,
                       3) {
  Rng rng(4);
  for (ConvShape<Rank> shape : all_shapes<Rank>(rng, 40)) {
    INFO(to_string(shape));
    if (shape.stride != 1) {
      CHECK_THROWS_AS(as_conv(transposed(Conv<int, Rank>(shape))), ShapeError);
      shape.stride = 1;
    }
    const auto [layer, linear] = random_pair(shape, rng);
    std::vector<PrimeField> bias(shape.bias ? static_cast<std::size_t>(shape.in) : 0);
    fill_random(std::span(bias), rng);
    const auto adjoint = transposed(layer, bias);
    const auto y = random_map<Rank>({.batch = 2, .channels = shape.out, .size = 5}, rng);
    bool exists = true;
    for (int axis = 0; axis < Rank; ++axis) exists = exists && smallest_extent(shape, 5, axis);
    if (exists) {
      CHECK(as_conv(adjoint)(y) == adjoint(y));
    } else {
      CHECK_THROWS_AS(as_conv(adjoint)(y), ShapeError);
    }
    CHECK(as_conv(transposed(as_conv(transposed(layer)))) == linear);
  }
}

TEMPLATE_TEST_CASE_SIG("transposed(A) * transposed(B) == transposed(B * A)", "[transposed]",
                       ((int Rank), Rank), 0, 1, 2, 3) {
  Rng rng(5);
  int compared = 0;
  for (const ConvShape<Rank>& shape : all_shapes<Rank>(rng, 40)) {
    const ConvShape<Rank> after = unpadded(random_shape_after(shape, rng));
    const auto [a, linear_a] = random_pair(shape, rng);
    const auto [b, linear_b] = random_pair(after, rng);
    INFO(to_string(shape) << ", " << to_string(after));
    std::vector<PrimeField> bias(static_cast<std::size_t>(shape.in));
    fill_random(std::span(bias), rng);
    const auto product = transposed(a, bias) * transposed(b);
    CHECK(product == transposed(b * a, bias));
    CHECK(product == transposed(contract(linear_b * linear_a), bias));
    CHECK_FALSE(product == transposed(b * a));
    const auto y = random_map<Rank>({.batch = 2, .channels = after.out, .size = 3}, rng);
    try {
      const auto x = transposed(a, bias)(transposed(b)(y));
      CHECK(product(y) == x);
      ++compared;
    } catch (const ShapeError&) {  // paddings that leave no map
    }
  }
  CHECK(compared > 20);
}

TEST_CASE("a bias of zeros equals none", "[transposed]") {
  const Linear<int> layer({.out = 1, .in = 2}, {1, 2});
  CHECK(transposed(layer) == transposed(layer, {0, 0}));
  CHECK_FALSE(transposed(layer) == transposed(layer, {0, 1}));
  CHECK_FALSE(transposed(layer) == transposed(-layer));
}

TEST_CASE("temporaries, views and products can be transposed", "[transposed]") {
  const Linear<int> layer({.out = 1, .in = 2}, {1, 2});
  const FeatureMap<int, 0> y({}, {3});
  CHECK(transposed(ConvView<const int, 0>(layer))(y) == transposed(layer)(y));
  CHECK(transposed(Linear<int>(layer))(y) == transposed(layer)(y));
  const Linear<int> twice({.out = 1, .in = 1}, {2});
  CHECK(transposed(twice * layer)(y) == FeatureMap<int, 0>({.channels = 2}, {6, 12}));
}

TEST_CASE("what cannot be transposed is refused with its numbers", "[transposed]") {
  const Conv1d<int> layer({.out = 2, .in = 3, .kernel_size = 3, .padding = 1});
  const Conv1d<int> strided({.out = 3, .in = 2, .kernel_size = 2, .stride = 2});
  const auto adjoint = transposed(layer);
  const FeatureMap<int, 1> y({.channels = 2, .size = 4}), wrong({.channels = 5, .size = 4});

  CHECK_THAT(message_of<ShapeError>([&] { transposed(layer, {1, 2}); }),
             Catch::Contains("2 elements instead of 3"));
  CHECK_THAT(message_of<ShapeError>([&] { adjoint(wrong); }),
             Catch::Contains("5 channels") && Catch::Contains("writes 2"));
  CHECK_THAT(message_of<ShapeError>([&] { adjoint(y, 6); }),
             Catch::Contains("size 4") && Catch::Contains("size 6"));
  const Conv1d<int> wide({.out = 2, .in = 3, .padding = 2});
  CHECK_THAT(message_of<ShapeError>([&] { transposed(wide)(y, 0); }),
             Catch::Contains("does not become one of size 0"));  // though 0 + 2 + 2 is 4
  CHECK_THROWS_AS(adjoint.output_size(0), ShapeError);
  CHECK_THAT(message_of<ShapeError>([&] { as_conv(transposed(strided)); }), Catch::Contains("s2"));
  CHECK_THROWS_AS(adjoint * adjoint, ShapeError);
  CHECK_THROWS_AS(adjoint * transposed(strided, {1, 2}), InexactError);
  const Conv1d<int> padded({.out = 1, .in = 2, .kernel_size = 3, .padding = 1});
  CHECK_THROWS_AS(adjoint * transposed(padded), InexactError);
  CHECK_NOTHROW(transposed(contract(padded * layer, interior_only)));
}

}  // namespace
}  // namespace concertina::test
