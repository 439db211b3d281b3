// Expansions: their shapes, and layers that contract back to the one they came from.
// SPDX-License-Identifier: Apache-2.0
#include <concertina/expand.hpp>

#include <concertina/modular.hpp>
#include <concertina/verify.hpp>

#include "support.hpp"

#include <limits>
#include <string>

namespace concertina::test {
namespace {

using Catch::Contains;

template <int Rank>
std::string text(const std::vector<ConvShape<Rank>>& shapes) {
  std::string all;
  for (const ConvShape<Rank>& shape : shapes) all += (all.empty() ? "" : ", ") + to_string(shape);
  return all;
}

template <int Rank>
std::vector<Index> widths_of(const std::vector<ConvShape<Rank>>& shapes) {
  std::vector<Index> widths{shapes.front().in};
  for (const ConvShape<Rank>& shape : shapes) widths.push_back(shape.out);
  return widths;
}

/// A kernel of one position along an axis has no dilation there; products write 1.
template <int Rank>
ConvShape<Rank> without_idle_dilation(ConvShape<Rank> shape) {
  for (int axis = 0; axis < Rank; ++axis) {
    if (shape.kernel_size[axis] == 1) shape.dilation[axis] = 1;
  }
  return shape;
}

template <class Scalar, int Rank>
Conv<Scalar, Rank> random_layer(const ConvShape<Rank>& shape, Rng& rng) {
  Conv<Scalar, Rank> layer(shape);
  initialize_uniform(layer, rng);
  return layer;
}

/// The number after "relative residual of".
double residual_in(const std::string& message) {
  const std::string before = "relative residual of ";
  const auto at = message.find(before);
  REQUIRE(at != std::string::npos);
  return std::stod(message.substr(at + before.size()));
}

/// Everything that a function-preserving expansion promises of a floating-point layer.
template <class Scalar, int Rank>
void check_preserving(const ConvShape<Rank>& shape, const std::vector<ConvShape<Rank>>& shapes,
                      Ends ends = Ends::orthonormal) {
  INFO(to_string(shape) << " into " << text(shapes));
  Rng rng(11);
  const auto layer = random_layer<Scalar>(shape, rng);
  const auto layers = preserve(layer, shapes, rng, ends);
  REQUIRE(Form(layers).leaves() == shapes);
  const Report report = prove_rounding(layers, layer);
  INFO(report);
  CHECK(report);
  CHECK(report.compared == std::ssize(layer.weight()) + std::ssize(layer.bias()));
  const Conv<Scalar, Rank> product = contract(layers);
  CHECK(product.shape() == without_idle_dilation(shape));
  if (ends == Ends::shift) CHECK(product == layer);
  CHECK(std::ranges::equal(layers.back().bias(), layer.bias()));
  for (std::size_t l = 0; l + 1 < layers.size(); ++l) {
    CHECK(std::ranges::count(layers[l].bias(), Scalar(0)) == std::ssize(layers[l].bias()));
  }
}

TEST_CASE("CL is 1x1, kxk, 1x1", "[expand]") {
  const ConvShape<2> shape{
      .out = 8, .in = 3, .kernel_size = {3, 5}, .stride = 2, .padding = {1, 2}, .bias = true};
  CHECK(text(expand_cl(shape)) ==
        "conv2d 3->12 @1x1 p1x2 +bias, conv2d 12->32 @3x5 s2x2 +bias, conv2d 32->8 @1x1 +bias");
  CHECK(text(expand_cl(shape, {.inner_bias = false})) ==
        "conv2d 3->12 @1x1 p1x2, conv2d 12->32 @3x5 s2x2, conv2d 32->8 @1x1 +bias");
  ConvShape<2> unbiased = shape;
  unbiased.bias = false;
  CHECK(text(expand_cl(unbiased)) ==
        "conv2d 3->12 @1x1 p1x2, conv2d 12->32 @3x5 s2x2, conv2d 32->8 @1x1");
  CHECK(text(expand_cl(ConvShape<1>{.out = 2,
                                    .in = 1,
                                    .kernel_size = 4,
                                    .padding = Padding<1>::sides(2, -1),
                                    .dilation = 3})) ==
        "conv1d 1->4 @1 p2:-1, conv1d 4->8 @4 d3, conv1d 8->2 @1");
  CHECK(text(expand_cl(ConvShape<3>{.out = 1, .in = 2, .kernel_size = {3, 1, 2}, .dilation = 2})) ==
        "conv3d 2->8 @1x1x1, conv3d 8->4 @3x1x2 d2x1x2, conv3d 4->1 @1x1x1");
}

TEST_CASE("CK is a chain of 3x3", "[expand]") {
  const auto kernels = [](const auto& shape) {
    std::string all;
    for (const auto& layer : expand_ck(shape))
      all += (all.empty() ? "" : " ") + to_string(layer.kernel_size);
    return all;
  };
  const auto square = [](const PerAxis<2>& kernel) {
    return ConvShape<2>{.out = 2, .in = 2, .kernel_size = kernel};
  };
  CHECK(kernels(square(5)) == "3x3 3x3");
  CHECK(kernels(square(7)) == "3x3 3x3 3x3");
  CHECK(kernels(square(11)) == "3x3 3x3 3x3 3x3 3x3");
  CHECK(kernels(square(4)) == "3x3 2x2");
  CHECK(kernels(square(6)) == "3x3 3x3 2x2");
  CHECK(kernels(square({7, 3})) == "3x3 3x1 3x1");
  CHECK(kernels(square({1, 5})) == "1x3 1x3");
  CHECK(kernels(square({4, 7})) == "3x3 2x3 1x3");
  CHECK(kernels(ConvShape<1>{.out = 1, .in = 1, .kernel_size = 6}) == "3 3 2");
  CHECK(kernels(ConvShape<3>{.out = 1, .in = 1, .kernel_size = {5, 3, 2}}) == "3x3x2 3x1x1");

  CHECK(text(expand_ck(ConvShape<2>{.out = 8,
                                    .in = 3,
                                    .kernel_size = 7,
                                    .stride = 2,
                                    .padding = 3,
                                    .dilation = 2,
                                    .bias = true})) ==
        "conv2d 3->12 @3x3 p3x3 d2x2 +bias, conv2d 12->32 @3x3 d2x2 +bias, "
        "conv2d 32->8 @3x3 s2x2 d2x2 +bias");

  CHECK_THAT(message_of<ShapeError>([&] { expand_ck(square(3)); }),
             Contains("CK expands kernels larger than 3") && Contains("CL") && Contains("@3x3"));
  CHECK_THROWS_AS(expand_ck(square({1, 2})), ShapeError);
  CHECK_THAT(message_of<ShapeError>([&] { expand_ck(square({1, 4097})); }),
             Contains("1x4097 has too many layers"));
  CHECK_THAT(message_of<ShapeError>([&] { expand_ck(square(5), {.depthwise_middle = true}); }),
             Contains("a form of CL, not of CK"));
}

TEST_CASE("FC is three linear layers", "[expand]") {
  CHECK(text(expand_fc({.out = 10, .in = 7, .bias = true}, {.rate = 2})) ==
        "linear 7->14 +bias, linear 14->20 +bias, linear 20->10 +bias");
}

TEST_CASE("groups stay the layer's, and a depthwise middle has its own", "[expand]") {
  CHECK(text(expand_cl(ConvShape<2>{.out = 6, .in = 6, .kernel_size = 3, .groups = 6})) ==
        "conv2d 6->24 @1x1 g6, conv2d 24->24 @3x3 g6, conv2d 24->6 @1x1 g6");
  CHECK(text(expand_ck(ConvShape<2>{.out = 12, .in = 6, .kernel_size = 7, .groups = 6})) ==
        "conv2d 6->24 @3x3 g6, conv2d 24->48 @3x3 g6, conv2d 48->12 @3x3 g6");
  const ConvShape<2> shape{.out = 4, .in = 4, .kernel_size = 3, .stride = 2, .bias = true};
  CHECK(text(expand_cl(shape, {.rate = 2, .depthwise_middle = true})) ==
        "conv2d 4->8 @1x1 +bias, conv2d 8->8 @3x3 s2x2 g8 +bias, conv2d 8->4 @1x1 +bias");
  ConvShape<2> grouped = shape;
  grouped.groups = 2;
  CHECK(
      text(expand_cl(grouped, {.widths = {6, 6}, .inner_bias = false, .depthwise_middle = true})) ==
      "conv2d 4->6 @1x1 g2, conv2d 6->6 @3x3 s2x2 g6, conv2d 6->4 @1x1 g2 +bias");
  CHECK_THAT(message_of<ShapeError>(
                 [&] { expand_cl(shape, {.widths = {6, 8}, .depthwise_middle = true}); }),
             Contains("a depthwise middle needs equal widths on both sides") && Contains("6->8"));
}

TEST_CASE("widths are a multiple, rounded per group, or given", "[expand]") {
  const auto widths = [](const ConvShape<1>& shape, const ExpandOptions& options) {
    return widths_of(expand_cl(shape, options));
  };
  using Widths = std::vector<Index>;
  const ConvShape<1> shape{.out = 5, .in = 3, .kernel_size = 3};
  const ConvShape<1> grouped{.out = 10, .in = 6, .kernel_size = 3, .groups = 2};
  CHECK(widths(shape, {}) == Widths{3, 12, 20, 5});
  CHECK(widths(shape, {.rate = 1}) == Widths{3, 3, 5, 5});
  CHECK(widths(shape, {.rate = 2.5}) == Widths{3, 8, 13, 5});
  CHECK(widths(shape, {.rate = 0.5}) == Widths{3, 2, 3, 5});
  CHECK(widths(shape, {.rate = 0.01}) == Widths{3, 1, 1, 5});
  CHECK(widths(grouped, {.rate = 2.5}) == Widths{6, 16, 26, 10});
  CHECK(widths(grouped, {.rate = 0.01}) == Widths{6, 2, 2, 10});
  CHECK(widths(shape, {.rate = -1, .widths = {7, 9}}) == Widths{3, 7, 9, 5});
  CHECK(widths_of(expand_ck(ConvShape<1>{.out = 5, .in = 3, .kernel_size = 9}, {.rate = 2})) ==
        Widths{3, 6, 10, 10, 5});

  for (const double rate : {0.0, -1.0, 1e6, std::numeric_limits<double>::infinity(),
                            std::numeric_limits<double>::quiet_NaN()}) {
    CHECK_THAT(message_of<ShapeError>([&] { expand_cl(shape, {.rate = rate}); }),
               Contains("expansion rate " + std::to_string(rate) + " is not in"));
  }
  CHECK_THAT(message_of<ShapeError>([&] { expand_cl(shape, {.widths = {7}}); }),
             Contains("an expansion into 3 layers takes 2 widths, not 1 (conv1d 3->5 @3)"));
  CHECK_THROWS_AS(expand_cl(shape, {.widths = {7, 8, 9}}), ShapeError);
  CHECK_THAT(message_of<ShapeError>([&] { expand_cl(shape, {.widths = {7, 0}}); }),
             Contains("at least one channel") && Contains("7->0"));
  CHECK_THAT(message_of<ShapeError>([&] { expand_cl(grouped, {.widths = {8, 9}}); }),
             Contains("groups must divide") && Contains("8->9"));
  CHECK_THROWS_AS(expand_cl(ConvShape<1>{.out = 5, .in = 3, .kernel_size = 0}), ShapeError);
  CHECK_THROWS_AS(expand_ck(ConvShape<1>{.out = 5, .in = 3, .kernel_size = 5, .groups = 2}),
                  ShapeError);
  CHECK_THROWS_AS(expand_fc({.out = Index{1} << 40, .in = 1}), SizeError);
}

TEST_CASE("the stride stands where it spreads no taps", "[expand]") {
  const ConvShape<2> shape{.out = 4, .in = 2, .kernel_size = 5, .stride = 2, .padding = 2};
  const auto strided = [](const auto& layers) {
    std::vector<std::size_t> where;
    for (std::size_t l = 0; l < layers.size(); ++l) {
      if (layers[l].stride != 1) where.push_back(l);
    }
    return where;
  };
  using Where = std::vector<std::size_t>;
  CHECK(strided(expand_cl(shape)) == Where{1});
  CHECK(strided(expand_cl(shape, {.stride_on = 1})) == Where{1});
  CHECK(strided(expand_cl(shape, {.stride_on = 2})) == Where{2});
  CHECK(strided(expand_ck(shape)) == Where{1});
  const auto refused = [&](auto&& expand) { return message_of<ShapeError>([&] { expand(); }); };
  CHECK_THAT(refused([&] { expand_cl(shape, {.stride_on = 0}); }),
             Contains("the stride cannot stand on layer 0 of 3") &&
                 Contains("only 1x1 layers may follow") && Contains("s2x2"));
  CHECK_THAT(refused([&] { expand_cl(shape, {.stride_on = 3}); }), Contains("layer 3 of 3"));
  CHECK_THAT(refused([&] { expand_ck(shape, {.stride_on = 0}); }), Contains("layer 0 of 2"));

  ConvShape<2> unstrided = shape;
  unstrided.stride = 1;  // nothing to place, but a layer that is not there is still a mistake
  CHECK(strided(expand_cl(unstrided, {.stride_on = 0})).empty());
  CHECK_THAT(refused([&] { expand_cl(unstrided, {.stride_on = 7}); }), Contains("layer 7 of 3"));
  ConvShape<2> across = shape;  // along the strided axis all later kernels are 1
  across.kernel_size = {3, 7};
  across.stride = {2, 1};
  CHECK(strided(expand_ck(across, {.stride_on = 0})) == Where{0});
}

template <int Rank>
void check_expansion(const ConvShape<Rank>& shape, const std::vector<ConvShape<Rank>>& layers,
                     const ExpandOptions& options) {
  INFO(to_string(shape) << " into " << text(layers));
  CHECK(Form(layers).shape() == without_idle_dilation(shape));
  CHECK(layers.front().padding == shape.padding);
  CHECK(layers.back().bias == shape.bias);
  for (std::size_t l = 0; l < layers.size(); ++l) {
    CHECK_NOTHROW(validate(layers[l]));
    if (l > 0) CHECK(layers[l].in == layers[l - 1].out);
    if (l > 0) CHECK(layers[l].padding == Padding<Rank>(0));
    if (l + 1 < layers.size()) CHECK(layers[l].bias == (shape.bias && options.inner_bias));
  }
}

TEMPLATE_TEST_CASE_SIG("an expansion contracts to the shape it came from", "[expand]",
                       ((int Rank), Rank), 0, 1, 2, 3) {
  Rng rng(1);
  std::vector<ConvShape<Rank>> shapes = edge_shapes<Rank>();
  for (int n = 0; n < 60; ++n) shapes.push_back(random_shape<Rank>(rng, {.kernel_size = 9}));
  int chains = 0;
  for (const ConvShape<Rank>& shape : shapes) {
    ExpandOptions options{.rate = static_cast<double>(random_index(rng, 1, 20)) / 4,
                          .inner_bias = random_index(rng, 0, 1) == 1};
    check_expansion(shape, expand_cl(shape, options), options);
    options.stride_on = 2;
    check_expansion(shape, expand_cl(shape, options), options);
    options.stride_on.reset();
    options.widths.assign(2, shape.groups * random_index(rng, 1, 5));
    options.depthwise_middle = true;
    check_expansion(shape, expand_cl(shape, options), options);
    if constexpr (Rank > 0) {
      if (*std::ranges::max_element(shape.kernel_size) <= 3) continue;
      options = {.rate = options.rate, .inner_bias = options.inner_bias};
      check_expansion(shape, expand_ck(shape, options), options);
      ++chains;
    }
  }
  CHECK((chains > 20 || Rank == 0));
}

TEST_CASE("random layers come from one generator in order", "[expand]") {
  const auto shapes = expand_ck(ConvShape<2>{.out = 3, .in = 2, .kernel_size = 5, .bias = true});
  Rng a(5), b(5), c(6);
  const auto layers = initialize<float>(shapes, a);
  REQUIRE(Form(layers).leaves() == shapes);
  for (const auto& layer : layers) CHECK(layer == random_layer<float>(layer.shape(), b));
  CHECK(a == b);
  CHECK(initialize<float>(shapes, c)[0] != layers[0]);
  CHECK(prove_rounding(layers, contract(layers)));
}

TEST_CASE("orthonormal: CL at any rate from 1", "[expand]") {
  const ConvShape<2> shape{
      .out = 5, .in = 3, .kernel_size = 3, .stride = 2, .padding = 1, .bias = true};
  for (const double rate : {1.0, 1.4, 2.0, 4.0}) {
    check_preserving<float>(shape, expand_cl(shape, {.rate = rate}));
    check_preserving<double>(shape, expand_cl(shape, {.rate = rate}));
  }
  check_preserving<double>(shape, expand_cl(shape, {.stride_on = 2, .inner_bias = false}));
}

TEST_CASE("the ends of an orthonormal CL are orthonormal", "[expand]") {
  const ConvShape<2> shape{.out = 5, .in = 3, .kernel_size = 3};
  Rng rng(2);
  const auto layers = preserve(random_layer<double>(shape, rng), expand_cl(shape), rng);
  using Matrix = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  const Eigen::Map<const Matrix> first(layers[0].weight().data(), 12, 3),
      last(layers[2].weight().data(), 5, 20);
  CHECK((first.transpose() * first).isIdentity(1e-14));
  CHECK((last * last.transpose()).isIdentity(1e-14));
  Rng other(3);
  const auto others = preserve(contract(layers), expand_cl(shape), other);
  CHECK(others[0] != layers[0]);  // and random
}

TEMPLATE_TEST_CASE("orthonormal: CK at the kernels it reaches", "[expand]", float, double) {
  const auto check = [](Index out, Index in, Index kernel, double rate) {
    const ConvShape<2> shape{
        .out = out, .in = in, .kernel_size = kernel, .padding = kernel / 2, .bias = true};
    check_preserving<TestType>(shape, expand_ck(shape, {.rate = rate}));
  };
  for (const Index kernel : {4, 5, 6, 7, 9, 11}) check(3, 2, kernel, 4);
  check(3, 2, 5, 3);
  check(4, 3, 5, 3);
  check(3, 2, 7, 3);
  check(1, 1, 5, 4);
}

/// Layers with each option that changes how one is expanded.
std::vector<std::pair<ConvShape<2>, std::vector<ConvShape<2>>>> optional_shapes() {
  const ConvShape<2> grouped{
      .out = 6, .in = 4, .kernel_size = 5, .padding = 2, .groups = 2, .bias = true};
  const ConvShape<2> depthwise{.out = 3, .in = 3, .kernel_size = 3, .groups = 3};
  const ConvShape<2> twofold{.out = 6, .in = 3, .kernel_size = 5, .groups = 3, .bias = true};
  const ConvShape<2> strided{.out = 3, .in = 2, .kernel_size = 5, .stride = {2, 3}};
  const ConvShape<2> dilated{.out = 3,
                             .in = 2,
                             .kernel_size = 5,
                             .padding = Padding<2>::sides({4, -1}, 3),
                             .dilation = {2, 3}};
  const ConvShape<2> oblong{.out = 2, .in = 2, .kernel_size = {7, 2}, .bias = true};
  const ConvShape<2> middle{.out = 3, .in = 3, .kernel_size = 3, .padding = 1, .bias = true};
  ConvShape<2> grouped_middle = grouped;
  grouped_middle.out = 4;
  return {{grouped, expand_cl(grouped)},
          {grouped, expand_ck(grouped)},
          {depthwise, expand_cl(depthwise)},
          {twofold, expand_ck(twofold)},
          {strided, expand_cl(strided)},
          {strided, expand_ck(strided)},
          {dilated, expand_cl(dilated)},
          {dilated, expand_ck(dilated)},
          {oblong, expand_ck(oblong)},
          {middle, expand_cl(middle, {.depthwise_middle = true})},
          {grouped_middle, expand_cl(grouped_middle, {.depthwise_middle = true})}};
}

TEST_CASE("groups, strides, dilations and depthwise middles are preserved", "[expand]") {
  for (const auto& [shape, shapes] : optional_shapes()) {
    check_preserving<float>(shape, shapes);
    check_preserving<double>(shape, shapes);
    check_preserving<float>(shape, shapes, Ends::shift);
    check_preserving<double>(shape, shapes, Ends::shift);
  }
}

TEST_CASE("shift: CL at any rate from 1, CK at rate 4", "[expand]") {
  for (const double rate : {1.0, 1.5, 4.0}) {
    const ConvShape<2> shape{.out = 3, .in = 2, .kernel_size = 3, .bias = true};
    check_preserving<float>(shape, expand_cl(shape, {.rate = rate}), Ends::shift);
  }
  for (const Index kernel : {4, 5, 6, 7, 8, 9}) {
    const ConvShape<2> shape{.out = 3, .in = 2, .kernel_size = kernel, .bias = true};
    check_preserving<float>(shape, expand_ck(shape), Ends::shift);
    check_preserving<double>(shape, expand_ck(shape), Ends::shift);
  }
}

TEMPLATE_TEST_CASE("shift: exact in every scalar", "[expand]", std::int64_t, PrimeField) {
  Rng rng(4);
  const auto check = [&](const ConvShape<2>& shape, const std::vector<ConvShape<2>>& shapes) {
    INFO(to_string(shape) << " into " << text(shapes));
    const auto layer = small_integers<TestType>(shape, rng);
    const auto layers = preserve(layer, shapes, rng, Ends::shift);
    CHECK(Form(layers).leaves() == shapes);
    CHECK(contract(layers) == layer);
  };
  for (const auto& [shape, shapes] : optional_shapes()) check(shape, shapes);
  for (const Index kernel : {5, 7, 9}) {
    const ConvShape<2> shape{.out = 2, .in = 3, .kernel_size = kernel, .bias = true};
    check(shape, expand_ck(shape));
  }
}

TEST_CASE("shifted copies leave no channel dead", "[expand]") {
  const ConvShape<2> shape{.out = 3, .in = 2, .kernel_size = 5};
  Rng rng(5);
  const auto layers =
      preserve(random_layer<float>(shape, rng), expand_ck(shape, {.rate = 6}), rng, Ends::shift);
  // Between the layers are 12 channels: each is written, or read, so that its gradient is not zero.
  const auto width = layers[0].shape().out;
  for (Index channel = 0; channel < width; ++channel) {
    bool alive = false;
    const Index row = 2 * 9;
    for (Index n = 0; n < row; ++n)
      alive = alive || layers[0].weight()[static_cast<std::size_t>(channel * row + n)] != 0;
    for (Index o = 0; o < 3; ++o) {
      for (Index n = 0; n < 9; ++n) {
        alive = alive ||
                layers[1].weight()[static_cast<std::size_t>((o * width + channel) * 9 + n)] != 0;
      }
    }
    CHECK(alive);
  }
}

TEST_CASE("layers of any rank are preserved, and wider scalars solved in themselves", "[expand]") {
  const ConvShape<0> linear{.out = 5, .in = 4, .bias = true};
  check_preserving<double>(linear, expand_fc(linear));
  check_preserving<double>(linear, expand_fc(linear, {.rate = 1}), Ends::shift);
  const ConvShape<1> line{
      .out = 2, .in = 3, .kernel_size = 7, .stride = 2, .padding = 3, .bias = true};
  check_preserving<long double>(line, expand_cl(line));
  check_preserving<long double>(line, expand_ck(line));
  check_preserving<long double>(line, expand_ck(line), Ends::shift);
}

TEST_CASE("zeros and the views of foreign memory are layers too", "[expand]") {
  const ConvShape<2> shape{.out = 3, .in = 2, .kernel_size = 5};
  Rng rng(6);
  const Conv2d<double> zeros(shape);
  for (const Ends ends : {Ends::orthonormal, Ends::shift}) {
    CHECK(contract(preserve(zeros, expand_ck(shape), rng, ends)) == zeros);
  }
  const auto layer = random_layer<double>(shape, rng);
  Rng a(7), b(7);
  const auto from_owner = preserve(layer, expand_ck(shape), a);
  const auto from_view = preserve(ConvView<const double, 2>(layer), expand_ck(shape), b);
  REQUIRE(from_owner.size() == from_view.size());
  for (std::size_t l = 0; l < from_owner.size(); ++l) CHECK(from_owner[l] == from_view[l]);
}

TEST_CASE("widths that cannot represent a kernel are refused with the residual", "[expand]") {
  Rng rng(8);
  const auto refused = [&](const ConvShape<2>& shape, const std::vector<ConvShape<2>>& shapes) {
    const auto layer = random_layer<double>(shape, rng);
    const std::string message = message_of<ExpansionError>([&] { preserve(layer, shapes, rng); });
    CHECK_THAT(message, Contains("cannot represent the kernel") && Contains(to_string(shape)) &&
                            Contains(text(shapes)));
    return residual_in(message);
  };
  const auto bounded = [](double residual) { return residual > 1e-3 && residual < 1; };
  const ConvShape<2> seven{.out = 8, .in = 3, .kernel_size = 7};
  CHECK(bounded(refused(seven, expand_ck(seven, {.widths = {3, 32}}))));
  const ConvShape<2> five{.out = 4, .in = 1, .kernel_size = 5};
  CHECK(bounded(refused(five, expand_ck(five, {.rate = 3}))));
  const ConvShape<2> narrow{.out = 3, .in = 3, .kernel_size = 3};
  CHECK(bounded(refused(narrow, expand_cl(narrow, {.widths = {2, 3}}))));
  // Eight kernels cannot be the nine of three by three channels.
  CHECK(bounded(refused(narrow, expand_cl(narrow, {.widths = {8, 8}, .depthwise_middle = true}))));
  const auto nine = expand_cl(narrow, {.widths = {9, 9}, .depthwise_middle = true});
  check_preserving<double>(narrow, nine);
  check_preserving<double>(narrow, nine, Ends::shift);
}

TEST_CASE("maps too narrow for the shifted copies are refused", "[expand]") {
  Rng rng(9);
  const auto refused = [&](const ConvShape<2>& shape, const std::vector<ConvShape<2>>& shapes) {
    const auto layer = random_layer<double>(shape, rng);
    return message_of<ExpansionError>([&] { preserve(layer, shapes, rng, Ends::shift); });
  };
  for (const Index kernel : {5, 7, 9}) {
    const ConvShape<2> shape{.out = 3, .in = 2, .kernel_size = kernel};
    CHECK_THAT(refused(shape, expand_ck(shape, {.rate = 3})),
               Contains("too narrow to hold the shifted copies") && Contains(to_string(shape)) &&
                   Contains("higher rate"));
  }
  const ConvShape<2> eleven{.out = 3, .in = 2, .kernel_size = 11},
      three{.out = 3, .in = 3, .kernel_size = 3};
  CHECK_THAT(refused(eleven, expand_ck(eleven)), Contains("too narrow"));
  CHECK_THAT(refused(three, expand_cl(three, {.widths = {8, 8}, .depthwise_middle = true})),
             Contains("too narrow"));
  CHECK_THAT(refused(three, expand_cl(three, {.widths = {2, 3}})), Contains("too narrow"));
}

TEST_CASE("layers that do not contract to the layer are refused", "[expand]") {
  const ConvShape<2> shape{.out = 3, .in = 2, .kernel_size = 3, .padding = 1, .bias = true};
  Rng rng(10);
  const auto layer = random_layer<double>(shape, rng);
  const auto refused = [&](const std::vector<ConvShape<2>>& shapes) {
    for (const Ends ends : {Ends::orthonormal, Ends::shift}) {
      CHECK_THROWS_AS(preserve(layer, shapes, rng, ends), ShapeError);
    }
    return message_of<ShapeError>([&] { preserve(layer, shapes, rng); });
  };
  ConvShape<2> other = shape;
  other.kernel_size = 5;
  CHECK_THAT(refused(expand_cl(other)),
             Contains("these layers contract to conv2d 2->3 @5x5 p1x1 +bias, "
                      "not to conv2d 2->3 @3x3 p1x1 +bias"));
  other = shape;
  other.bias = false;
  CHECK_THAT(refused(expand_cl(other)), Contains("not to"));
  other = shape;
  other.padding = 0;
  CHECK_THAT(refused(expand_cl(other)), Contains("not to"));
  other = shape;
  other.out = 4;
  CHECK_THAT(refused(expand_cl(other)), Contains("2->4"));
  CHECK_THAT(refused({}), Contains("no layers"));

  auto shapes = expand_cl(shape);
  shapes[1].in = 5;
  CHECK_THAT(refused(shapes), Contains("reads 5 channels") && Contains("writes 8"));
  shapes = expand_cl(shape);
  shapes[1].groups = 2;
  CHECK_THAT(refused(shapes), Contains("layer 2 (conv2d 8->12 @3x3 g2 +bias)") &&
                                  Contains("must have the groups of the layer it expands"));
  // The last layer takes the bias, so it must have one.
  shapes = expand_cl(shape);
  shapes[2].bias = false;
  CHECK_THAT(refused(shapes), Contains("bias"));
  // A depthwise middle stands between 1x1 layers only.
  other = {.out = 3, .in = 2, .kernel_size = 3, .padding = 1};
  const std::vector<ConvShape<2>> kernels_around{
      {.out = 8, .in = 2, .kernel_size = 2, .padding = 1},
      {.out = 8, .in = 8, .kernel_size = 2, .groups = 8},
      {.out = 3, .in = 8}};
  REQUIRE(Form(kernels_around).shape() == other);
  const auto unbiased = random_layer<double>(other, rng);
  CHECK_THROWS_AS(preserve(unbiased, kernels_around, rng), ShapeError);
  CHECK_THROWS_AS(preserve(unbiased, kernels_around, rng, Ends::shift), ShapeError);

  const Conv2d<std::int64_t> whole({.out = 1, .in = 1, .kernel_size = 3});
  CHECK_THAT(message_of<ShapeError>([&] { preserve(whole, expand_cl(whole.shape()), rng); }),
             Contains("orthonormal ends need a floating-point scalar; use Ends::shift"));
}

TEST_CASE("a layer that is not finite is refused", "[expand]") {
  const double number =
      GENERATE(std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity(),
               -std::numeric_limits<double>::infinity());
  const Ends ends = GENERATE(Ends::orthonormal, Ends::shift);
  const ConvShape<2> shape{.out = 2, .in = 2, .kernel_size = 5, .bias = true};
  Rng rng(12);
  auto layer = random_layer<double>(shape, rng);
  SECTION("weight") { layer.weight()[37] = number; }
  SECTION("bias") { layer.bias()[1] = number; }
  CHECK_THROWS_AS(preserve(layer, expand_cl(shape), rng, ends), ExpansionError);
  CHECK_THROWS_AS(preserve(layer, expand_ck(shape), rng, ends), ExpansionError);
  CHECK_THROWS_AS(preserve(layer.cast<float>(), expand_cl(shape), rng, ends), ExpansionError);
}

}  // namespace
}  // namespace concertina::test
