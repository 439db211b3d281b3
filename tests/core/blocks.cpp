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
    auto acnet = AcNet<float>::initialize(shape, rng);
    auto repvgg = RepVgg<float, 2>::initialize(shape, rng);
    auto dbb = DiverseBranchBlock<float, 2>::initialize(shape, rng);
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

TEST_CASE("initialised MobileOne, RepMixer, QARepVGG and ECB contract and preserve", "[blocks]") {
  Rng rng(16);
  for (const ConvShape<2>& shape : block_shapes()) {
    for (const Index branches : {1, 3}) {
      auto block = MobileOne<float, 2>::initialize(shape, branches, rng);
      CHECK(std::ssize(block.dense) == branches);
      CHECK(block.skip.has_value() == RepVgg<float, 2>::initialize(shape, rng).skip.has_value());
      check_preserves(block, shape, rng);
      for (auto& branch : block.dense) randomise(branch.norm, rng);
      check_contracts(block);
      check_preserves(block, shape, rng);
    }
    auto block = QaRepVgg<float, 2>::initialize(shape, rng);
    check_preserves(block, shape, rng);
    randomise(block.dense.norm, rng);
    randomise(block.norm, rng);
    check_contracts(block);
    check_preserves(block, shape, rng);
  }
  const ConvShape<2> pointwise{.out = 4, .in = 6};
  CHECK_FALSE(MobileOne<float, 2>::initialize(pointwise, 2, rng).scale);
  CHECK_THROWS_AS((MobileOne<float, 2>::initialize(pointwise, 0, rng)), ShapeError);

  const ConvShape<2> depthwise{
      .out = 6, .in = 6, .kernel_size = {3, 5}, .padding = {1, 2}, .groups = 6, .bias = true};
  auto mixer = RepMixer<float, 2>::initialize(depthwise, rng);
  check_contracts(mixer);
  check_preserves(mixer, depthwise, rng);
  randomise(mixer.norm, rng);
  randomise(mixer.mixer.dense[0].norm, rng);
  check_preserves(mixer, depthwise, rng);
  mixer.layer_scale[3] = 0;
  CHECK_THAT(
      message_of<NumericalError>([&] { preserve(random_layer<float>(depthwise, rng), mixer); }),
      Contains("output channel 3 is not finite"));
  ConvShape<2> strided = depthwise, dense = depthwise;
  strided.stride = 2;
  dense.groups = 1;
  CHECK_THROWS_AS((RepMixer<float, 2>::initialize(strided, rng)), ShapeError);
  CHECK_THROWS_AS((RepMixer<float, 2>::initialize(dense, rng)), ShapeError);

  for (const Index out : {4, 5}) {
    const ConvShape<2> shape{.out = out, .in = 4, .kernel_size = 3, .padding = 1, .bias = true};
    auto block = Ecb<float>::initialize(shape, rng);
    CHECK(block.skips == (out == 4));
    CHECK(block.widen.shape().out == 2 * out);
    check_contracts(block);
    check_preserves(block, shape, rng);
    ConvShape<2> without = shape, five = shape, halved = shape, grouped = shape;
    without.bias = false;
    block.dense = random_layer<float>(without, rng);
    CHECK_THAT(message_of<ShapeError>([&] { preserve(random_layer<float>(shape, rng), block); }),
               Contains("without a bias"));
    five.kernel_size = 5;
    halved.stride = 2;
    grouped.groups = 4;
    for (const ConvShape<2>& refused : {five, halved, grouped}) {
      CHECK_THROWS_AS(Ecb<float>::initialize(refused, rng), ShapeError);
    }
  }
}

TEST_CASE("a skip connection stands where input and output fit", "[blocks]") {
  Rng rng(2);
  const ConvShape<2> same{.out = 4, .in = 4, .kernel_size = 3, .padding = 1};
  ConvShape<2> strided = same, wide = same, cropped = same;
  strided.stride = 2;
  wide.out = 8;
  cropped.padding = 0;
  CHECK(RepVgg<float, 2>::initialize(same, rng).skip);
  CHECK_FALSE(RepVgg<float, 2>::initialize(strided, rng).skip);
  CHECK_FALSE(RepVgg<float, 2>::initialize(wide, rng).skip);
  CHECK_FALSE(RepVgg<float, 2>::initialize(cropped, rng).skip);
}

TEST_CASE("DBB's padding before the 1x1 is exact, zeros after its batch norm are not", "[blocks]") {
  Rng rng(3);
  const ConvShape<2> shape{.out = 3, .in = 3, .kernel_size = 3, .padding = 1};
  auto block = DiverseBranchBlock<double, 2>::initialize(shape, rng);
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
    mobile.dense.push_back({random_layer<float>(shape, rng), BatchNorm<float>::initialize(4)});
    randomise(mobile.dense.back().norm, rng);
  }
  check_contracts(mobile);
  mobile.scale = {random_layer<float>(pointwise, rng), BatchNorm<float>::initialize(4)};
  mobile.skip = BatchNorm<float>::initialize(4);
  randomise(*mobile.skip, rng);
  check_contracts(mobile);
  check_preserves(mobile, shape, rng);

  Orepa<float, 2> orepa{.branches = {}, .norm = BatchNorm<float>::initialize(4)};
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

namespace {

/// A batch norm that multiplies and shifts by integers exactly: (x - mean) * weight + bias.
BatchNorm<double> integer_norm(Index channels, Rng& rng) {
  auto norm = BatchNorm<double>::initialize(channels);
  norm.eps = 0;
  for (auto* values : {&norm.running_mean, &norm.weight, &norm.bias}) {
    fill_small_integers(std::span<double>(*values), rng);
  }
  return norm;
}

using Map = FeatureMap<double, 2>;

/// norm(x) by its definition.
Map applied(const BatchNorm<double>& norm, Map x) {
  const Index pixels = numel(x.shape().size);
  for (std::size_t i = 0; i < x.values().size(); ++i) {
    const auto c = static_cast<std::size_t>(static_cast<Index>(i) / pixels % x.shape().channels);
    x.values()[i] = (x.values()[i] - norm.running_mean[c]) * norm.weight[c] + norm.bias[c];
  }
  return x;
}
Map applied(const ConvBatchNorm<double, 2>& branch, const Map& x) {
  return applied(branch.norm, branch.conv(x));
}

/// f + factors[c] * g.
Map combined(Map f, const std::vector<double>& factors, const Map& g) {
  REQUIRE(f.shape() == g.shape());
  const Index pixels = numel(f.shape().size);
  for (std::size_t i = 0; i < f.values().size(); ++i) {
    const auto c = static_cast<std::size_t>(static_cast<Index>(i) / pixels % f.shape().channels);
    f.values()[i] += factors[c] * g.values()[i];
  }
  return f;
}
Map combined(Map f, double factor, const Map& g) {
  const auto channels = static_cast<std::size_t>(f.shape().channels);
  return combined(std::move(f), std::vector<double>(channels, factor), g);
}

/// With integers every rounding is exact.
template <class Block>
void check_definition(const Block& block, const Map& x, const Map& expected) {
  const auto expression = block.expression();
  CHECK(exactness(expression).exact());
  CHECK(contract(expression)(x) == expected);
  CHECK(verify<double>(expression, contract(expression)));
}

}  // namespace

TEST_CASE("RepMixer, QARepVGG and the dilated block are their definitions", "[blocks]") {
  Rng rng(6);
  const auto branch = [&](const ConvShape<2>& shape) {
    return ConvBatchNorm<double, 2>{small_integers<double>(shape, rng), integer_norm(6, rng)};
  };
  const auto x = small_integers<double, 2>({.batch = 2, .channels = 6, .size = {9, 8}}, rng);
  const ConvShape<2> depthwise{.out = 6, .in = 6, .kernel_size = 3, .padding = 1, .groups = 6},
      diagonal{.out = 6, .in = 6, .groups = 6};
  {
    RepMixer<double, 2> block{.mixer = {.dense = {branch(depthwise), branch(depthwise)},
                                        .scale = branch(diagonal),
                                        .skip = integer_norm(6, rng)},
                              .norm = integer_norm(6, rng),
                              .layer_scale = {1, -2, 3, 0, 2, -1}};
    Map mixed = applied(block.mixer.dense[0], x);
    mixed = combined(mixed, 1, applied(block.mixer.dense[1], x));
    mixed = combined(mixed, 1, applied(*block.mixer.scale, x));
    mixed = combined(mixed, 1, applied(*block.mixer.skip, x));
    mixed = combined(mixed, -1, applied(block.norm, x));
    check_definition(block, x, combined(x, block.layer_scale, mixed));
  }
  for (const bool skips : {false, true}) {
    QaRepVgg<double, 2> block{
        .dense = branch({.out = 6, .in = 6, .kernel_size = 3, .padding = 1}),
        .pointwise = small_integers<double>(ConvShape<2>{.out = 6, .in = 6}, rng),
        .skips = skips,
        .norm = integer_norm(6, rng)};
    Map sum = combined(applied(block.dense, x), 1, block.pointwise(x));
    if (skips) sum = combined(sum, 1, x);
    check_definition(block, x, applied(block.norm, sum));
  }
  {
    const ConvShape<2> large{.out = 6, .in = 6, .kernel_size = 7, .padding = 3, .groups = 6};
    auto block = DilatedBlock<double, 2>::initialize(large, rng);
    REQUIRE(block.dilated.size() == 3);
    const std::vector<ConvShape<2>> published{
        {.out = 6, .in = 6, .kernel_size = 5, .padding = 2, .groups = 6},
        {.out = 6, .in = 6, .kernel_size = 3, .padding = 2, .dilation = 2, .groups = 6},
        {.out = 6, .in = 6, .kernel_size = 3, .padding = 3, .dilation = 3, .groups = 6}};
    block.large = branch(large);
    Map expected = applied(block.large, x);
    for (std::size_t b = 0; b < published.size(); ++b) {
      CHECK(block.dilated[b].conv.shape() == published[b]);
      block.dilated[b] = branch(published[b]);
      expected = combined(expected, 1, applied(block.dilated[b], x));
    }
    check_definition(block, x, expected);
  }
}

TEST_CASE("dilated blocks of the published sizes contract and preserve", "[blocks]") {
  Rng rng(7);
  for (const Index size : {5, 9, 11, 13, 15, 17, 19}) {
    const ConvShape<2> shape{
        .out = 3, .in = 3, .kernel_size = size, .padding = size / 2, .groups = 3, .bias = true};
    const auto block = DilatedBlock<float, 2>::initialize(shape, rng);
    CHECK(contract(block.expression()).shape() == shape);
    check_preserves(block, shape, rng);
  }
  CHECK_THROWS_AS((DilatedBlock<float, 2>::initialize({.out = 1, .in = 1, .kernel_size = 3}, rng)),
                  ShapeError);
}

TEST_CASE("ECB is its definition", "[blocks]") {
  Rng rng(8);
  const auto x = small_integers<double, 2>({.batch = 2, .channels = 4, .size = {5, 6}}, rng);
  const auto layer = [&](const ConvShape<2>& shape) { return small_integers<double>(shape, rng); };
  const ConvShape<2> padded{.out = 4, .in = 4, .padding = 1, .bias = true};
  const auto edge = [&] {
    Ecb<double>::Edge result{layer(padded), std::vector<double>(4), std::vector<double>(4)};
    fill_small_integers(std::span<double>(result.factors), rng);
    fill_small_integers(std::span<double>(result.bias), rng);
    return result;
  };
  const Ecb<double> block{
      .dense = layer({.out = 4, .in = 4, .kernel_size = 3, .padding = 1, .bias = true}),
      .widen = layer({.out = 8, .in = 4, .padding = 1, .bias = true}),
      .narrow = layer({.out = 4, .in = 8, .kernel_size = 3, .bias = true}),
      .sobel_x = edge(),
      .sobel_y = edge(),
      .laplace = edge(),
      .skips = true};
  Map expected = combined(combined(block.dense(x), 1, block.narrow(block.widen(x))), 1, x);
  const double filters[3][3][3] = {{{1, 0, -1}, {2, 0, -2}, {1, 0, -1}},
                                   {{1, 2, 1}, {0, 0, 0}, {-1, -2, -1}},
                                   {{0, 1, 0}, {1, -4, 1}, {0, 1, 0}}};
  int number = 0;
  for (const auto* branch : {&block.sobel_x, &block.sobel_y, &block.laplace}) {
    const Map y = branch->pointwise(x);  // 7 x 8
    const auto& filter = filters[number++];
    for (Index n = 0; n < 2; ++n) {
      for (Index c = 0; c < 4; ++c) {
        const auto channel = static_cast<std::size_t>(c);
        for (Index i = 0; i < 5; ++i) {
          for (Index j = 0; j < 6; ++j) {
            double sum = 0;
            for (Index a = 0; a < 3; ++a) {
              for (Index b = 0; b < 3; ++b) {
                sum += filter[a][b] *
                       y.values()[static_cast<std::size_t>(((n * 4 + c) * 7 + i + a) * 8 + j + b)];
              }
            }
            expected.values()[static_cast<std::size_t>(((n * 4 + c) * 5 + i) * 6 + j)] +=
                branch->factors[channel] * sum + branch->bias[channel];
          }
        }
      }
    }
  }
  check_definition(block, x, expected);
}

TEST_CASE("LoRA starts as its base, and adds its update", "[blocks]") {
  Rng rng(9);
  const auto linear = small_integers<double>(ConvShape<0>{.out = 5, .in = 7, .bias = true}, rng);
  auto lora = LoRa<double, 0>::initialize(linear, 2, 4, rng);
  CHECK(contract(lora.expression()) == linear);
  fill_small_integers(lora.down.weight(), rng);
  fill_small_integers(lora.up.weight(), rng);
  const Linear<double> updated = contract(lora.expression());
  for (std::size_t o = 0; o < 5; ++o) {
    for (std::size_t i = 0; i < 7; ++i) {
      const double update = lora.up.weight()[o * 2] * lora.down.weight()[i] +
                            lora.up.weight()[o * 2 + 1] * lora.down.weight()[7 + i];
      CHECK(updated.weight()[o * 7 + i] == linear.weight()[o * 7 + i] + 2 * update);
    }
  }
  const auto conv = small_integers<double>(
      ConvShape<2>{.out = 4, .in = 3, .kernel_size = 3, .stride = 2, .padding = 1, .bias = true},
      rng);
  auto locon = LoRa<double, 2>::initialize(conv, 2, 2, rng);
  CHECK(contract(locon.expression()) == conv);
  fill_small_integers(locon.down.weight(), rng);
  fill_small_integers(locon.up.weight(), rng);
  const auto x = small_integers<double, 2>({.batch = 2, .channels = 3, .size = {6, 5}}, rng);
  check_definition(locon, x, combined(conv(x), 1, locon.up(locon.down(x))));
  CHECK_THROWS_AS((LoRa<double, 2>::initialize(conv, 0, 2, rng)), ShapeError);
  const Conv2d<double> grouped({.out = 4, .in = 6, .groups = 2});
  CHECK_THROWS_AS((LoRa<double, 2>::initialize(grouped, 2, 2, rng)), ShapeError);
  const Conv2d<double> whole({.out = 4, .in = 6});
  CHECK_THROWS_AS((LoKr<double, 2>::initialize(grouped, 2, 2, rng)), ShapeError);
  CHECK_THROWS_AS((LoKr<double, 2>::initialize(whole, 0, 2, rng)), ShapeError);
  CHECK_THROWS_AS((LoKr<double, 2>::initialize(whole, 2, 4, rng)),
                  ShapeError);  // 6 is no multiple of 4
}

TEST_CASE("Monarch is two block-diagonal matrices with transpositions between", "[blocks]") {
  Rng rng(10);
  constexpr std::size_t p = 3, q = 2;
  const Monarch<double> block{
      small_integers<double>(ConvShape<0>{.out = 6, .in = 6, .groups = p}, rng),
      small_integers<double>(ConvShape<0>{.out = 6, .in = 6, .groups = q}, rng)};
  const Linear<double> dense = contract(block.expression());
  REQUIRE(dense.shape() == ConvShape<0>{.out = 6, .in = 6});
  // x[i][j] -> sum over j of R_i[l][j] x[i][j] -> sum over i of L_l[k][i], at [k][l]
  for (std::size_t k = 0; k < p; ++k) {
    for (std::size_t l = 0; l < q; ++l) {
      for (std::size_t i = 0; i < p; ++i) {
        for (std::size_t j = 0; j < q; ++j) {
          const double right = block.first.weight()[(i * q + l) * q + j];
          const double left = block.second.weight()[(l * p + k) * p + i];
          CHECK(dense.weight()[(k * q + l) * 6 + i * q + j] == left * right);
        }
      }
    }
  }
  const auto initial = Monarch<double>::initialize(Index{p}, Index{q}, rng);
  CHECK(initial.first.shape() == block.first.shape());
  CHECK(initial.second.shape() == block.second.shape());
  CHECK(verify<double>(initial.expression(), contract(initial.expression())));
  CHECK_THROWS_AS(Monarch<double>::initialize(0, 2, rng), ShapeError);
}

TEST_CASE("DO-Conv starts as its layer", "[blocks]") {
  Rng rng(11);
  for (const ConvShape<2>& shape : edge_shapes<2>()) {
    const auto layer = small_integers<double>(shape, rng);
    auto block = DoConv<double, 2>::initialize(layer);
    CHECK(contract(block.expression()) == layer);
    CHECK(contract(block.expression()).shape() == shape);
    // Trained on: the kernel is the composition of the two, tap by tap.
    fill_small_integers(block.depthwise.weight(), rng);
    const Conv2d<double> trained = contract(block.expression());
    const Index taps = numel(shape.kernel_size), in = shape.in / shape.groups;
    for (Index o = 0; o < shape.out; ++o) {
      for (Index c = 0; c < in; ++c) {
        const Index channel = o / (shape.out / shape.groups) * in + c;
        for (Index t = 0; t < taps; ++t) {
          double sum = 0;
          for (Index d = 0; d < taps; ++d) {
            sum +=
                block.pointwise.weight()[static_cast<std::size_t>((o * in + c) * taps + d)] *
                block.depthwise.weight()[static_cast<std::size_t>((channel * taps + d) * taps + t)];
          }
          CHECK(trained.weight()[static_cast<std::size_t>((o * in + c) * taps + t)] == sum);
        }
      }
    }
  }
}

TEST_CASE("LoKr starts as its base, and adds a Kronecker product", "[blocks]") {
  Rng rng(12);
  for (const Index rows : {1, 2, 6}) {
    for (const Index columns : {1, 4}) {
      const ConvShape<2> shape{
          .out = 6, .in = 4, .kernel_size = {3, 2}, .stride = 2, .padding = 1, .bias = true};
      const auto conv = small_integers<double>(shape, rng);
      auto block = LoKr<double, 2>::initialize(conv, rows, columns, rng);
      CHECK(contract(block.expression()) == conv);
      fill_small_integers(block.first.weight(), rng);
      fill_small_integers(block.second.weight(), rng);
      block.scale = -2;
      check_contracts(block);
      const Conv2d<double> updated = contract(block.expression());
      REQUIRE(updated.shape() == shape);
      const Index n = 6 / rows, m = 4 / columns;
      for (Index o = 0; o < 6; ++o) {
        for (Index c = 0; c < 4; ++c) {
          for (Index t = 0; t < 6; ++t) {
            const auto at = static_cast<std::size_t>((o * 4 + c) * 6 + t);
            const double first =
                block.first.weight()[static_cast<std::size_t>(o / n * columns + c / m)];
            const double second =
                block.second.weight()[static_cast<std::size_t>((o % n * m + c % m) * 6 + t)];
            CHECK(updated.weight()[at] == conv.weight()[at] - 2 * first * second);
          }
        }
      }
    }
  }
  const auto linear = small_integers<double>(ConvShape<0>{.out = 4, .in = 6}, rng);
  const auto flat = LoKr<double, 0>::initialize(linear, 2, 3, rng);
  CHECK(contract(flat.expression()) == linear);
  CHECK_THROWS_AS((LoKr<double, 0>::initialize(linear, 3, 3, rng)), ShapeError);
  CHECK_THROWS_AS((LoKr<double, 0>::initialize(linear, 2, 0, rng)), ShapeError);
}

TEST_CASE("RefConv starts as its base, and refocuses its kernels", "[blocks]") {
  Rng rng(13);
  for (const Index groups : {1, 2, 4}) {
    const ConvShape<2> shape{
        .out = 4, .in = 4, .kernel_size = {3, 5}, .padding = 1, .groups = groups, .bias = true};
    const auto conv = small_integers<double>(shape, rng);
    auto block = RefConv<double, 2>::initialize(conv, 3);
    const Index kernels = 4 * 4 / groups;  // the published map: kernels / groups groups
    REQUIRE(block.map.shape() == ConvShape<2>{.out = kernels,
                                              .in = kernels,
                                              .kernel_size = 3,
                                              .padding = 1,
                                              .groups = kernels / groups});
    CHECK(contract(block.expression()) == conv);
    fill_small_integers(block.map.weight(), rng);
    const Conv2d<double> refocused = contract(block.expression());
    REQUIRE(refocused.shape() == shape);
    for (Index k = 0; k < kernels; ++k) {
      for (Index i = 0; i < 3; ++i) {
        for (Index j = 0; j < 5; ++j) {
          const auto at = [&](Index kernel, Index y, Index x) {
            const bool inside = y >= 0 && y < 3 && x >= 0 && x < 5;
            return inside ? conv.weight()[static_cast<std::size_t>((kernel * 3 + y) * 5 + x)] : 0;
          };
          double sum = at(k, i, j);
          for (Index from = 0; from < groups; ++from) {
            for (Index t = 0; t < 9; ++t) {
              sum += block.map.weight()[static_cast<std::size_t>((k * groups + from) * 9 + t)] *
                     at(k / groups * groups + from, i + t / 3 - 1, j + t % 3 - 1);
            }
          }
          CHECK(refocused.weight()[static_cast<std::size_t>((k * 3 + i) * 5 + j)] == sum);
        }
      }
    }
    check_contracts(block);
    CHECK_THROWS_AS((RefConv<double, 2>::initialize(conv, 2)), ShapeError);
    const Conv2d<double> shrinking({.out = kernels, .in = kernels, .kernel_size = 3});
    CHECK_THROWS_AS((RefConv<double, 2>{conv, shrinking}.kernel()), ShapeError);
  }
}

TEST_CASE("RepMLP is its definition on flat maps", "[blocks]") {
  Rng rng(14);
  const auto x = small_integers<double, 2>({.batch = 2, .channels = 3, .size = {4, 5}}, rng);
  auto block = RepMlp<double, 2>::initialize(3, {4, 5}, {1, 3}, rng);
  fill_small_integers(block.fc.weight(), rng);
  block.norm = integer_norm(3, rng);
  const auto values = [](const auto& map) {
    return std::vector<double>(map.values().begin(), map.values().end());
  };
  const FeatureMap<double, 0> flat_x({.batch = 2, .channels = 60}, values(x));
  Map expected = applied(block.norm, Map(x.shape(), values(block.fc(flat_x))));
  for (auto& branch : block.local) {
    fill_small_integers(branch.conv.weight(), rng);
    branch.norm = integer_norm(3, rng);
    expected = combined(expected, 1, applied(branch, x));
  }
  check_contracts(block);
  const Linear<double> flat = contract(block.expression());
  CHECK(flat.shape() == ConvShape<0>{.out = 60, .in = 60, .groups = 3, .bias = true});
  CHECK(values(flat(flat_x)) == values(expected));
  CHECK_THROWS_AS((RepMlp<double, 2>::initialize(3, {4, 5}, {2}, rng)), ShapeError);

  Linear<double> wanted = small_integers<double>(flat.shape(), rng);
  CHECK_THAT(message_of<ShapeError>([&] { preserve(wanted, block); }),
             Contains("shares its bias with 19 others"));
  for (std::size_t i = 0; i < wanted.bias().size(); ++i) wanted.bias()[i] = double(i / 20);
  const auto preserved = preserve(wanted, block);
  CHECK(prove_rounding(preserved.expression(), wanted));
}

TEST_CASE("the convolutions of a RepMLP are differentiated through its matrix", "[blocks]") {
  Rng rng(17);
  auto block = RepMlp<double, 2>::initialize(3, {4, 5}, {3}, rng);
  const auto integers = [&] {
    fill_small_integers(block.local[0].conv.weight(), rng);
    return contract(block.expression());
  };
  const Conv2d<double> before = block.local[0].conv;
  const Linear<double> from = contract(block.expression());
  const auto direction = small_integers<double>(from.shape(), rng);
  Contraction<double, 0> contraction{Form(block.expression())};
  contraction.forward(block.expression());
  const auto gradients = contraction.backward(block.expression(), direction);
  REQUIRE(gradients.size() == 4);  // dense, its norm, the convolution, its norm
  const auto of_conv = conv_as_linear_gradient(before.shape(), block.size, gradients[2]);
  const Linear<double> to = integers();
  double gained = 0, along = 0;
  for (std::size_t i = 0; i < to.weight().size(); ++i) {
    gained += direction.weight()[i] * (to.weight()[i] - from.weight()[i]);
  }
  for (std::size_t i = 0; i < before.weight().size(); ++i) {
    along += of_conv.weight()[i] * (block.local[0].conv.weight()[i] - before.weight()[i]);
  }
  CHECK(gained == Approx(along).epsilon(1e-12));
}

namespace {

/// A user's own: a gain for each channel after a kernel with a bias, beside a 1x1 and a skip.
struct GainBlock {
  Conv2d<double> dense, pointwise;
  std::vector<double> gain;

  Expr<double, 2> expression() const& {
    return channel_scale(gain) * dense + pointwise + identity<double>(dense.shape().in);
  }
  void expression() && = delete;
  Principal<double, 2> principal() {
    return {dense, dense.bias(), channel_scale(gain), channel_scale(gain)};
  }
};

}  // namespace

TEST_CASE("a block of one's own that names its kernel and bias is preserved", "[blocks]") {
  Rng rng(18);
  const ConvShape<2> shape{.out = 3, .in = 3, .kernel_size = 3, .padding = 1, .bias = true};
  const GainBlock block{small_integers<double>(shape, rng),
                        small_integers<double>(ConvShape<2>{.out = 3, .in = 3}, rng),
                        {2, -0.5, 4}};
  const auto wanted = small_integers<double>(shape, rng);
  const GainBlock preserved = preserve(wanted, block);
  CHECK(contract(preserved.expression()) == wanted);
  CHECK(preserved.pointwise == block.pointwise);
  CHECK(preserved.gain == block.gain);
}

TEST_CASE("a kernel that a block cannot hold is refused", "[blocks]") {
  Rng rng(5);
  const ConvShape<2> shape{.out = 4, .in = 4, .kernel_size = 3, .padding = 1};
  ConvShape<2> larger = shape, strided = shape;
  larger.kernel_size = 5;
  strided.stride = 2;
  const auto block = AcNet<float>::initialize(shape, rng);
  CHECK_THAT(message_of<ShapeError>([&] { preserve(Conv2d<float>(larger), block); }),
             Contains("conv2d 4->4 @3x3 p1x1 +bias") && Contains("conv2d 4->4 @5x5 p1x1"));
  CHECK_THROWS_AS(preserve(Conv2d<float>(strided), block), ShapeError);
  auto dead = block;
  dead.square.norm.weight[2] = 0;
  CHECK_THAT(message_of<NumericalError>([&] { preserve(random_layer<float>(shape, rng), dead); }),
             Contains("output channel 2 is not finite"));
  auto faint = MobileOne<float, 2>::initialize(shape, 1, rng);
  faint.dense[0].norm.weight.assign(4, 1e38F);
  CHECK_THAT(message_of<NumericalError>([&] { preserve(random_layer<float>(shape, rng), faint); }),
             Contains("underflows"));
  Conv2d<float> broken(shape);
  broken.weight()[5] = std::numeric_limits<float>::quiet_NaN();
  CHECK_THROWS_AS(preserve(broken, block), NumericalError);
  for (const ConvShape<2>& refused :
       {ConvShape<2>{.out = 2, .in = 2, .kernel_size = {3, 2}},
        ConvShape<2>{.out = 2, .in = 2, .kernel_size = 3, .dilation = 2},
        ConvShape<2>{.out = 2, .in = 0, .kernel_size = 3}}) {
    CHECK_THROWS_AS(AcNet<float>::initialize(refused, rng), ShapeError);
    CHECK_THROWS_AS((RepVgg<float, 2>::initialize(refused, rng)), ShapeError);
    CHECK_THROWS_AS((DiverseBranchBlock<float, 2>::initialize(refused, rng)), ShapeError);
  }
}

}  // namespace concertina::test
