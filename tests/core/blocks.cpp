// Blocks: contracted, proved, exact at the border, and made to go on from a given kernel.
// SPDX-License-Identifier: Apache-2.0
#include <concertina/blocks.hpp>

#include <concertina/verify.hpp>

#include "support.hpp"

#include <catch2/catch.hpp>

#include <limits>
#include <vector>

namespace concertina::test {
namespace {

using Catch::Contains;

template <class Scalar>
void randomise(BatchNorm<Scalar>& norm, Rng& rng) {
  for (std::size_t c = 0; c < norm.running_mean.size(); ++c) {
    norm.running_mean[c] = static_cast<Scalar>(random_uniform(rng, 1));
    norm.running_var[c] = static_cast<Scalar>(1.1 + random_uniform(rng, 1));
    norm.weight[c] = static_cast<Scalar>(random_uniform(rng, 2));
    norm.bias[c] = static_cast<Scalar>(random_uniform(rng, 1));
  }
}

template <class Scalar, int Rank>
Conv<Scalar, Rank> random_layer(const ConvShape<Rank>& shape, Rng& rng) {
  Conv<Scalar, Rank> layer(shape);
  initialize_uniform(layer, rng);
  return layer;
}

/// Shapes that blocks take: groups, depthwise, strides, uneven kernels, padding other than half the
/// kernel.
std::vector<ConvShape<2>> block_shapes() {
  return {{.out = 7, .in = 5, .kernel_size = 3, .padding = 1, .bias = true},
          {.out = 6, .in = 6, .kernel_size = 3, .padding = 1, .bias = true},
          {.out = 6, .in = 6, .kernel_size = 3, .padding = 1, .groups = 6, .bias = true},
          {.out = 8, .in = 6, .kernel_size = 5, .stride = 2, .padding = 2, .groups = 2},
          {.out = 4, .in = 3, .kernel_size = {3, 5}, .stride = {1, 2}, .padding = {1, 2}},
          {.out = 3, .in = 2, .kernel_size = 5, .padding = 1, .bias = true}};
}

/// That a block contracts, exactly at the border, to a layer that the proofs hold.
template <class Block>
void check_contracts(const Block& block) {
  const auto expression = block.expression();
  const auto layer = contract<double>(expression);
  INFO(to_string(Form(expression)) << "\n" << verify<double>(expression, layer));
  CHECK(exactness(expression).exact());
  CHECK(verify<double>(expression, layer));
}

template <class Block>
void check_preserves(Block block, const ConvShape<2>& shape, Rng& rng) {
  const auto trained = random_layer<float>(shape, rng);
  const Block preserved = preserve(trained, std::move(block));
  const auto expression = preserved.expression();
  INFO(to_string(shape) << "\n" << prove_rounding(expression, trained));
  CHECK(prove_rounding(expression, trained));
  // The kernel of the principal branch is rounded to float, so it is not the very same layer.
  CHECK(prove_rounding<double>(expression, contract<double>(expression)));
}

}  // namespace

TEST_CASE("initialised blocks contract and preserve a trained kernel", "[blocks]") {
  Rng rng(1);
  for (const ConvShape<2>& shape : block_shapes()) {
    auto acnet = initialize_acnet<float>(shape, rng);
    auto repvgg = initialize_repvgg<float>(shape, rng);
    auto dbb = initialize_diverse_branch_block<float>(shape, rng);
    check_contracts(acnet);
    check_contracts(repvgg);
    check_contracts(dbb);
    check_preserves(acnet, shape, rng);
    check_preserves(repvgg, shape, rng);
    check_preserves(dbb, shape, rng);
    // Trained further: whatever the statistics are.
    for (auto* branch : {&acnet.square, &acnet.vertical, &acnet.horizontal}) {
      randomise(branch->norm, rng);
    }
    randomise(repvgg.dense.norm, rng);
    if (repvgg.skip) randomise(*repvgg.skip, rng);
    randomise(dbb.origin.norm, rng);
    randomise(dbb.reduce.norm, rng);
    randomise(dbb.spatial.norm, rng);
    randomise(dbb.pool_norm, rng);
    check_contracts(acnet);
    check_contracts(repvgg);
    check_contracts(dbb);
    check_preserves(acnet, shape, rng);
    check_preserves(repvgg, shape, rng);
    check_preserves(dbb, shape, rng);
  }
}

TEST_CASE("a skip connection stands where input and output fit", "[blocks]") {
  Rng rng(2);
  const ConvShape<2> same{.out = 4, .in = 4, .kernel_size = 3, .padding = 1};
  ConvShape<2> strided = same, wide = same, cropped = same;
  strided.stride = 2;
  wide.out = 8;
  cropped.padding = 0;
  CHECK(initialize_repvgg<float>(same, rng).skip);
  CHECK_FALSE(initialize_repvgg<float>(strided, rng).skip);
  CHECK_FALSE(initialize_repvgg<float>(wide, rng).skip);
  CHECK_FALSE(initialize_repvgg<float>(cropped, rng).skip);
}

TEST_CASE("DBB's padding before the 1x1 is exact, zeros after its batch norm are not", "[blocks]") {
  Rng rng(3);
  const ConvShape<2> shape{.out = 3, .in = 3, .kernel_size = 3, .padding = 1};
  auto block = initialize_diverse_branch_block<double>(shape, rng);
  randomise(block.reduce.norm, rng);
  const auto published = block.spatial.expression() * block.reduce.expression();
  CHECK(exactness(published).exact());

  // The same kernels, zeros placed after the batch norm.
  const auto moved = [](const Conv2d<double>& conv, Index padding) {
    ConvShape<2> changed = conv.shape();
    changed.padding = padding;
    return Conv2d<double>(changed, {conv.weight().begin(), conv.weight().end()});
  };
  const auto zeros_between = batch_norm(block.spatial.norm) * moved(block.spatial.conv, 1) *
                             batch_norm(block.reduce.norm) * moved(block.reduce.conv, 0);
  CHECK_FALSE(exactness(zeros_between).exact());

  // What DBB does: the border is what the batch norm gives to zero.
  FeatureMap<double, 2> x({.channels = 3, .size = {5, 4}});
  for (double& number : x.values()) number = random_uniform(rng, 1);
  const auto inside = (batch_norm(block.reduce.norm) * moved(block.reduce.conv, 0))(x);
  const Conv2d<double> norm = Expr<double, 2>(batch_norm(block.reduce.norm));
  const auto zero = norm.bias();
  FeatureMap<double, 2> padded({.channels = 3, .size = {7, 6}});
  for (Index c = 0; c < 3; ++c) {
    for (Index i = 0; i < 7; ++i) {
      for (Index j = 0; j < 6; ++j) {
        const bool on_map = i > 0 && i < 6 && j > 0 && j < 5;
        padded.values()[static_cast<std::size_t>((c * 7 + i) * 6 + j)] =
            on_map ? inside.values()[static_cast<std::size_t>((c * 5 + i - 1) * 4 + j - 1)]
                   : zero[static_cast<std::size_t>(c)];
      }
    }
  }
  const auto expected = (batch_norm(block.spatial.norm) * moved(block.spatial.conv, 0))(padded);
  const auto y = contract(published)(x);
  REQUIRE(y.shape() == expected.shape());
  for (std::size_t i = 0; i < y.values().size(); ++i) {
    CHECK(std::abs(y.values()[i] - expected.values()[i]) < 1e-13);
  }
}

TEST_CASE("MobileOne, OREPA and SESR contract", "[blocks]") {
  Rng rng(4);
  const ConvShape<2> shape{.out = 4, .in = 4, .kernel_size = 3, .padding = 1};
  const ConvShape<2> pointwise{.out = 4, .in = 4};
  MobileOne<float, 2> mobile;
  for (int n = 0; n < 3; ++n) {
    mobile.dense.push_back({random_layer<float>(shape, rng), initial_batch_norm<float>(4)});
    randomise(mobile.dense.back().norm, rng);
  }
  check_contracts(mobile);
  mobile.scale = {random_layer<float>(pointwise, rng), initial_batch_norm<float>(4)};
  mobile.skip = initial_batch_norm<float>(4);
  randomise(*mobile.skip, rng);
  check_contracts(mobile);
  check_preserves(mobile, shape, rng);

  Orepa<float, 2> orepa{.branches = {}, .norm = initial_batch_norm<float>(4)};
  randomise(orepa.norm, rng);
  ConvShape<2> padded = pointwise, unpadded_square = shape;
  padded.padding = 1;
  unpadded_square.padding = 0;
  using Layers = std::vector<Conv2d<float>>;
  const std::vector<float> factors{0.5F, -1.25F, 3, 0.75F};
  orepa.branches.push_back({Layers{random_layer<float>(shape, rng)}, factors});
  orepa.branches.push_back({Layers{random_layer<float>(pointwise, rng)}, factors});
  orepa.branches.push_back(
      {Layers{random_layer<float>(padded, rng), random_layer<float>(unpadded_square, rng)},
       factors});
  check_contracts(orepa);

  ConvShape<2> widen = shape;
  widen.out = 16;
  const ConvShape<2> narrow{.out = 4, .in = 16, .bias = true};
  check_contracts(
      Sesr<float, 2>{random_layer<float>(widen, rng), random_layer<float>(narrow, rng)});
}

TEST_CASE("a kernel that a block cannot hold is refused", "[blocks]") {
  Rng rng(5);
  const ConvShape<2> shape{.out = 4, .in = 4, .kernel_size = 3, .padding = 1};
  ConvShape<2> larger = shape, strided = shape;
  larger.kernel_size = 5;
  strided.stride = 2;
  const auto block = initialize_acnet<float>(shape, rng);
  CHECK_THAT(message_of<ShapeError>([&] { preserve(Conv2d<float>(larger), block); }),
             Contains("conv2d 4->4 @3x3 p1x1 +bias") && Contains("conv2d 4->4 @5x5 p1x1"));
  CHECK_THROWS_AS(preserve(Conv2d<float>(strided), block), ShapeError);
  auto dead = block;
  dead.square.norm.weight[2] = 0;
  CHECK_THAT(message_of<NumericalError>([&] { preserve(random_layer<float>(shape, rng), dead); }),
             Contains("output channel 2 is not finite"));
  Conv2d<float> broken(shape);
  broken.weight()[5] = std::numeric_limits<float>::quiet_NaN();
  CHECK_THROWS_AS(preserve(broken, block), NumericalError);
  for (const ConvShape<2>& refused :
       {ConvShape<2>{.out = 2, .in = 2, .kernel_size = {3, 2}},
        ConvShape<2>{.out = 2, .in = 2, .kernel_size = 3, .dilation = 2},
        ConvShape<2>{.out = 2, .in = 0, .kernel_size = 3}}) {
    CHECK_THROWS_AS(initialize_acnet<float>(refused, rng), ShapeError);
    CHECK_THROWS_AS(initialize_repvgg<float>(refused, rng), ShapeError);
    CHECK_THROWS_AS(initialize_diverse_branch_block<float>(refused, rng), ShapeError);
  }
}

}  // namespace concertina::test
