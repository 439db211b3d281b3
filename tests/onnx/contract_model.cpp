// Models contracted: which nodes become which, and the same outputs to the bit, as all weights are
// small integers.
// SPDX-License-Identifier: Apache-2.0
#include "onnx/contract_model.hpp"
#include "onnx/compare_models.hpp"
#include "onnx/evaluate.hpp"

#include "text.hpp"

#include <catch2/catch.hpp>

#include <algorithm>
#include <numeric>
#include <optional>
#include <random>
#include <string>
#include <vector>

namespace {

using namespace tool;
using onnx::Attribute, onnx::DataType;
using Ints = std::vector<std::int64_t>;

/// A model from x to y, one node after another.
class Builder {
 public:
  explicit Builder(Ints input, std::int64_t opset = 17) : input_(input) {
    model_.opsets = {{"", opset}};
    model_.inputs = {info("x", std::move(input))};
    model_.graph_name = "test";
  }

  /// Small integers.
  std::string constant(const Ints& dims) {
    std::vector<float> values;
    const auto count =
        std::accumulate(dims.begin(), dims.end(), std::int64_t{1}, std::multiplies<>());
    for (std::int64_t i = 0; i < count; ++i) {
      values.push_back(static_cast<float>(static_cast<int>(generator_() % 5)) - 2);
    }
    return constant(dims, values);
  }
  template <class Scalar>
  std::string constant(const Ints& dims, const std::vector<Scalar>& values) {
    std::string name = "c" + std::to_string(model_.initializers.size());
    model_.initializers.push_back(onnx::Tensor::of<Scalar>(name, dims, values));
    return name;
  }

  std::string node(const std::string& op, std::vector<std::string> inputs,
                   std::vector<Attribute> attributes = {}) {
    const std::string output = "t" + std::to_string(model_.nodes.size());
    model_.nodes.push_back({.name = "n" + output,
                            .op_type = op,
                            .inputs = std::move(inputs),
                            .outputs = {output},
                            .attributes = std::move(attributes)});
    return output;
  }

  std::string conv(const std::string& x, const Ints& weight, std::int64_t pad = 0, bool bias = true,
                   std::int64_t stride = 1, std::int64_t group = 1) {
    const std::size_t rank = weight.size() - 2;
    std::vector<std::string> inputs = {x, constant(weight)};
    if (bias) inputs.push_back(constant({weight[0]}));
    return node("Conv", inputs,
                {Attribute::of("pads", Ints(2 * rank, pad)),
                 Attribute::of("strides", Ints(rank, stride)), Attribute::of("group", group)});
  }

  /// Of variance 4 less epsilon, so that nothing rounds.
  std::string batch_norm(const std::string& x, std::int64_t channels) {
    const auto count = static_cast<std::size_t>(channels);
    std::vector<std::string> inputs = {x};
    std::vector<float> even(count), variance(count, 3.5F);
    for (float& value : even)
      value = 2 * static_cast<float>(static_cast<int>(generator_() % 3)) - 2;
    inputs.push_back(constant({channels}, even));
    inputs.push_back(constant({channels}));
    inputs.push_back(constant({channels}));
    inputs.push_back(constant({channels}, variance));
    return node("BatchNormalization", inputs, {Attribute::of("epsilon", 0.5F)});
  }

  onnx::Model finish(const std::string& y) {
    model_.nodes.push_back({.name = "last", .op_type = "Relu", .inputs = {y}, .outputs = {"y"}});
    model_.outputs = {{.name = "y", .type = DataType::float32}};
    return std::move(model_);
  }

  onnx::Model& model() { return model_; }

  static onnx::ValueInfo info(const std::string& name, const Ints& dims) {
    onnx::ValueInfo result{
        .name = name, .type = DataType::float32, .shape = std::vector<onnx::Dimension>()};
    for (const auto extent : dims) {
      onnx::Dimension dimension;
      if (extent > 0) dimension.value = extent;
      result.shape->push_back(dimension);
    }
    return result;
  }

 private:
  onnx::Model model_;
  Ints input_;
  std::mt19937 generator_{1};
};

Array<float> integers(const Ints& dims) {
  Array<float> array{dims, {}};
  const auto count =
      std::accumulate(dims.begin(), dims.end(), std::int64_t{1}, std::multiplies<>());
  std::mt19937 generator(2);
  for (std::int64_t i = 0; i < count; ++i) {
    array.values.push_back(static_cast<float>(static_cast<int>(generator() % 7)) - 3);
  }
  return array;
}

std::vector<std::string> operators(const onnx::Model& model) {
  std::vector<std::string> result;
  for (const onnx::Node& node : model.nodes) result.push_back(node.op_type);
  return result;
}

/// Contracts, runs both at these input shapes, proves the result, and returns what is left.
std::vector<std::string> contracted(const onnx::Model& model, const std::vector<Ints>& shapes,
                                    ModelOptions options = {.when = When::always}) {
  const ContractedModel result = contract_model(model, options);
  for (const Ints& shape : shapes) {
    const Values inputs = {{"x", integers(shape)}};
    const auto a = Evaluator(model)(inputs), b = Evaluator(result.model)(inputs);
    CHECK(std::get<Array<float>>(a.at("y")) == std::get<Array<float>>(b.at("y")));
  }
  const ModelComparison comparison =
      compare_models(model, result.model, options.graph, {.equality = options.equality});
  CHECK(comparison.proved());
  CHECK(comparison.regions.size() == result.regions.size());
  // Every constant that is left is read.
  for (const onnx::Tensor& tensor : result.model.initializers) {
    CHECK(std::ranges::any_of(result.model.nodes, [&](const onnx::Node& node) {
      return std::ranges::find(node.inputs, tensor.name) != node.inputs.end();
    }));
  }
  return operators(result.model);
}

using Ops = std::vector<std::string>;

}  // namespace

TEST_CASE("a chain of convolutions and batch norms is one layer", "[onnx]") {
  Builder b({-1, 4, -1, -1});
  auto t = b.conv("x", {6, 4, 1, 1}, 1);
  t = b.conv(t, {6, 6, 3, 3});
  t = b.batch_norm(t, 6);
  t = b.conv(t, {5, 6, 1, 1});
  CHECK(contracted(b.finish(t), {{1, 4, 6, 7}, {2, 4, 9, 5}}) == Ops{"Conv", "Relu"});
}

TEST_CASE("branches that rejoin are one layer", "[onnx]") {
  Builder b({-1, 4, -1, -1});
  const auto x = b.node("Relu", {"x"});
  const auto sum = b.node("Add", {b.batch_norm(b.conv(x, {4, 4, 3, 3}, 1, false), 4),
                                  b.batch_norm(b.conv(x, {4, 4, 1, 1}, 0, false), 4)});
  const auto y = b.node("Sub", {sum, b.batch_norm(x, 4)});
  CHECK(contracted(b.finish(y), {{1, 4, 6, 7}, {2, 4, 3, 5}}) == Ops{"Relu", "Conv", "Relu"});
}

TEST_CASE("nested branches are one layer, and the chain before them too", "[onnx]") {
  Builder b({1, 3, -1, -1});
  const auto first = b.conv("x", {4, 3, 3, 3});
  const auto inner =
      b.node("Sum", {b.conv(first, {4, 4, 1, 1}), first, b.conv(first, {4, 4, 3, 3}, 1, false)});
  const auto y = b.node("Add", {b.conv(inner, {4, 4, 1, 1}), first});
  // With its bias the first layer is not to be continued beyond the border of the padded one.
  CHECK(contracted(b.finish(y), {{1, 3, 6, 7}}) == Ops{"Conv", "Conv", "Relu"});
}

TEST_CASE("concatenated branches, slices, splits and shuffles are one layer", "[onnx]") {
  Builder b({1, 4, 6, 5});
  auto t = b.node("Concat", {b.conv("x", {4, 4, 1, 1}), b.conv("x", {2, 4, 3, 3}, 1)},
                  {Attribute::of("axis", std::int64_t{1})});
  t = b.node("Reshape", {t, b.constant<std::int64_t>({5}, {1, 2, 3, 6, 5})});
  t = b.node("Transpose", {t}, {Attribute::of("perm", Ints{0, 2, 1, 3, 4})});
  t = b.node("Reshape", {t, b.constant<std::int64_t>({4}, {1, 6, 6, 5})});
  t = b.node("Slice", {t, b.constant<std::int64_t>({1}, {1}), b.constant<std::int64_t>({1}, {6}),
                       b.constant<std::int64_t>({1}, {1})});
  t = b.node("Gather", {t, b.constant<std::int64_t>({4}, {3, 0, 4, -1})},
             {Attribute::of("axis", std::int64_t{1})});
  CHECK(contracted(b.finish(t), {{1, 4, 6, 5}}) == Ops{"Conv", "Relu"});
}

TEST_CASE("branches on channels of their own are one grouped layer", "[onnx]") {
  // Of layers of so many channels each, in groups of `width`.
  const auto groups_of = [](const Ints& parts, std::int64_t width) {
    const std::int64_t channels = std::accumulate(parts.begin(), parts.end(), std::int64_t{0});
    Builder b({-1, channels, 6, 5});
    onnx::Node split{.op_type = "Split",
                     .inputs = {"x", b.constant({std::ssize(parts)}, parts)},
                     .attributes = {Attribute::of("axis", std::int64_t{1})}};
    std::vector<std::string> branches;
    for (const std::int64_t part : parts) {
      const std::string slice =
          split.outputs.emplace_back("part" + std::to_string(branches.size()));
      const auto inner = b.conv(slice, {part, width, 3, 3}, 1, false, 1, part / width);
      branches.push_back(b.conv(inner, {part, width, 1, 1}, 0, true, 1, part / width));
    }
    b.model().nodes.insert(b.model().nodes.begin(), split);
    const auto joined = b.node("Concat", branches, {Attribute::of("axis", std::int64_t{1})});
    const onnx::Model model = b.finish(b.batch_norm(joined, channels));
    CHECK(contracted(model, {{1, channels, 6, 5}}) == Ops{"Conv", "Relu"});
    const onnx::Node conv = contract_model(model, {.when = When::always}).model.nodes.front();
    return std::ranges::find(conv.attributes, "group", &Attribute::name)->i;
  };
  CHECK(groups_of({4, 4}, 4) == 2);
  CHECK(groups_of({4, 6, 2}, 2) == 6);
  CHECK(groups_of({3, 3}, 1) == 6);
}

TEST_CASE("linear layers are one, with or without a batch norm, an image's flattening or positions",
          "[onnx]") {
  SECTION("Gemm") {
    Builder b({-1, 5});
    auto t = b.node("Gemm", {"x", b.constant({7, 5}), b.constant({7})},
                    {Attribute::of("transB", std::int64_t{1}), Attribute::of("alpha", 2.0F)});
    t = b.batch_norm(t, 7);
    t = b.node("Gemm", {t, b.constant({7, 3})});
    CHECK(contracted(b.finish(t), {{1, 5}, {3, 5}}) == Ops{"Gemm", "Relu"});
  }
  SECTION("MatMul at every position") {
    Builder b({-1, -1, 5});
    auto t = b.node("Add", {b.node("MatMul", {"x", b.constant({5, 7})}), b.constant({7})});
    t = b.node("Mul",
               {b.node("MatMul", {t, b.constant({7, 3})}), b.constant({1}, std::vector<float>{2})});
    CHECK(contracted(b.finish(t), {{1, 4, 5}, {2, 3, 5}}) == Ops{"MatMul", "Add", "Relu"});
  }
  SECTION("after a flattening") {
    Builder b({-1, 2, 3, 4});
    auto t = b.node("Flatten", {b.batch_norm("x", 2)});
    t = b.node("Gemm", {t, b.constant({24, 6}), b.constant({6})});
    t = b.node("Gemm", {t, b.constant({6, 3}), b.constant({3})});
    CHECK(contracted(b.finish(t), {{1, 2, 3, 4}, {2, 2, 3, 4}}) == Ops{"Flatten", "Gemm", "Relu"});
  }
  SECTION("between a convolution's channels moved last and back") {
    Builder b({1, 3, -1});
    auto t = b.node("Transpose", {b.conv("x", {4, 3, 3})}, {Attribute::of("perm", Ints{0, 2, 1})});
    t = b.node("Add", {b.node("MatMul", {t, b.constant({4, 6})}), b.constant({6})});
    t = b.node("Transpose", {t}, {Attribute::of("perm", Ints{0, 2, 1})});
    CHECK(contracted(b.finish(b.batch_norm(t, 6)), {{1, 3, 6}, {1, 3, 9}}) == Ops{"Conv", "Relu"});
  }
}

TEST_CASE("a transposed convolution takes in its neighbours", "[onnx]") {
  Builder b({-1, 3, -1, -1});
  auto t = b.node(
      "ConvTranspose",
      {b.conv("x", {4, 3, 1, 1}, 0, false), b.constant({4, 2, 4, 4}), b.constant({4})},
      {Attribute::of("strides", Ints{2, 2}), Attribute::of("pads", Ints{1, 1, 1, 1}),
       Attribute::of("group", std::int64_t{2}), Attribute::of("output_padding", Ints{1, 0})});
  t = b.conv(b.batch_norm(t, 4), {5, 4, 1, 1});
  CHECK(contracted(b.finish(t), {{1, 3, 4, 5}, {2, 3, 2, 3}}) == Ops{"ConvTranspose", "Relu"});
}

TEST_CASE("paddings and crops are taken in, and a crop is written", "[onnx]") {
  const std::int64_t opset = GENERATE(10, 17);
  const auto pad = [&](Builder& b, const std::string& x, const Ints& pads) {
    return opset < 11 ? b.node("Pad", {x}, {Attribute::of("pads", pads)})
                      : b.node("Pad", {x, b.constant<std::int64_t>({8}, pads)});
  };
  Builder b({1, 2, -1, -1}, opset);
  const auto padded = b.conv(pad(b, "x", {0, 0, 2, 0, 0, 0, 1, 0}), {3, 2, 3, 2}, 0, false);
  CHECK(contracted(b.finish(padded), {{1, 2, 5, 6}}) == Ops{"Conv", "Relu"});
  Builder c({1, 2, -1, -1}, opset);
  const auto cropped = c.conv(pad(c, "x", {0, 0, -1, 0, 0, 0, 0, -2}), {3, 2, 3, 2});
  const auto narrow = c.node("Mul", {cropped, c.constant({3, 1, 1})});
  CHECK(contracted(c.finish(narrow), {{1, 2, 7, 8}}) == Ops{"Pad", "Conv", "Relu"});
}

TEST_CASE("factors before a padded layer fold, their shift stays", "[onnx]") {
  const auto shifted = [](std::vector<float> factors, std::int64_t group, bool last) {
    Builder b(last ? Ints{-1, -1, 4} : Ints{-1, 4, -1, -1});
    const Ints dims = last ? Ints{4} : Ints{4, 1, 1};
    auto x = b.node("Mul", {"x", b.constant<float>(dims, factors)});
    x = b.node("Add", {x, b.constant<float>(dims, {3, -1, 0, 2})});
    x = b.node("Mul", {x, b.constant<float>(dims, {1, -1, 2, 4})});
    if (last) x = b.node("Transpose", {x}, {Attribute::of("perm", Ints{0, 2, 1})});
    const Ints weight = last ? Ints{8, 4 / group, 3} : Ints{8, 4 / group, 3, 3};
    return b.finish(b.batch_norm(b.conv(x, weight, 1, true, 1, group), 8));
  };
  const std::vector<Ints> images = {{1, 4, 5, 6}, {2, 4, 3, 7}};
  const ModelOptions smaller;
  // Quotients of shifts and factors are exact.
  CHECK(contracted(shifted({1, -2, 4, 0.5F}, 1, false), images, smaller) ==
        Ops{"Add", "Conv", "Relu"});
  CHECK(contracted(shifted({1, -2, 4, 0.5F}, 4, false), images, smaller) ==
        Ops{"Add", "Conv", "Relu"});
  // Nothing can be added before a factor of zero.
  CHECK(contracted(shifted({1, 0, 4, 0.5F}, 1, false), images, smaller) ==
        Ops{"Mul", "Add", "Conv", "Relu"});
  CHECK(contracted(shifted({1, -2, 4, 0.5F}, 1, true), {{1, 5, 4}, {2, 3, 4}}, smaller) ==
        Ops{"Add", "Transpose", "Conv", "Relu"});
  SECTION("another shift is found out") {
    const onnx::Model model = shifted({1, -2, 4, 0.5F}, 1, false);
    ContractedModel result = contract_model(model, smaller);
    REQUIRE(result.regions.size() == 1);
    CHECK(result.regions.front().layer.find("after a shift") != std::string::npos);
    for (onnx::Tensor& tensor : result.model.initializers) {
      std::vector<float> values = tensor.values<float>();
      const onnx::Tensor right = tensor;
      values.back() += 1.F / 64;
      tensor = onnx::Tensor::of<float>(tensor.name, tensor.dims, values);
      CHECK(compare_models(model, result.model).failed());
      tensor = right;
    }
  }
}

TEST_CASE("what differs at the border is left, or taken where that is allowed", "[onnx]") {
  const auto build = [](const Ints& input) {
    Builder b(input);
    return b.finish(b.conv(b.batch_norm("x", 3), {4, 3, 3, 3}, 1));
  };
  CHECK(contracted(build({1, 3, 6, 6}), {{1, 3, 6, 6}}) ==
        Ops{"BatchNormalization", "Conv", "Relu"});
  const ContractedModel left = contract_model(build({1, 3, 6, 6}), {.when = When::always});
  REQUIRE(left.left.size() == 1);
  CHECK(left.left.front().remedy.find("--border interior") != std::string::npos);

  // 2x2 and 1x1 of stride 2 agree at even sizes only.
  Builder b({1, 3, 6, 8});
  const auto sum =
      b.node("Add", {b.conv("x", {4, 3, 2, 2}, 0, true, 2), b.conv("x", {4, 3, 1, 1}, 0, true, 2)});
  const onnx::Model model = b.finish(sum);
  CHECK(contracted(model, {{1, 3, 6, 8}}) == Ops{"Conv", "Relu"});
  CHECK(contracted(model, {}, {.when = When::always, .equality = Equality::everywhere}) ==
        Ops{"Conv", "Conv", "Add", "Relu"});
}

TEST_CASE("what would cost more is left", "[onnx]") {
  Builder b({1, 4, 16, 16});
  const auto depthwise = b.conv("x", {4, 1, 3, 3}, 1, false, 1, 4);
  const onnx::Model model = b.finish(b.conv(depthwise, {8, 4, 1, 1}));
  const Ops separable{"Conv", "Conv", "Relu"};
  CHECK(contracted(model, {{1, 4, 16, 16}}, {.when = When::smaller}) == separable);
  CHECK(contracted(model, {{1, 4, 16, 16}}, {.when = When::faster}) == separable);
  CHECK(contracted(model, {{1, 4, 16, 16}}, {.when = When::always}) == Ops{"Conv", "Relu"});
}

TEST_CASE("tensors that are read elsewhere stay", "[onnx]") {
  const auto build = [] {
    Builder b({1, 3, -1, -1});
    const auto t = b.conv("x", {4, 3, 1, 1});
    b.model().nodes.back().name = "first";
    return b.finish(b.conv(b.conv(t, {6, 4, 1, 1}), {4, 6, 1, 1}));
  };
  CHECK(contracted(build(), {{1, 3, 4, 4}}) == Ops{"Conv", "Relu"});
  onnx::Model output = build();
  output.outputs.push_back({.name = "t0", .type = DataType::float32});
  CHECK(contracted(output, {{1, 3, 4, 4}}) == Ops{"Conv", "Conv", "Relu"});
  CHECK(contracted(build(), {}, {.graph = {.keep = {"t1"}}, .when = When::always}) ==
        Ops{"Conv", "Conv", "Relu"});
  CHECK(contracted(build(), {}, {.when = When::always, .only = {"first"}}) == Ops{"Conv", "Relu"});
  CHECK_THROWS_AS(contract_model(build(), {.only = {"nothing"}}), UsageError);
  CHECK_THROWS_AS(contract_model(build(), {.graph = {.keep = {"nothing"}}}), UsageError);
}

TEST_CASE("constants that a caller may replace are none", "[onnx]") {
  const auto build = [](std::int64_t ir) {
    Builder b({1, 3, -1, -1});
    onnx::Model model = b.finish(b.conv(b.conv("x", {4, 3, 1, 1}), {4, 4, 1, 1}));
    model.ir_version = ir;
    for (const onnx::Tensor& tensor : model.initializers)
      model.inputs.push_back(Builder::info(tensor.name, tensor.dims));
    return model;
  };
  const ContractedModel replaceable = contract_model(build(8), {});
  CHECK(operators(replaceable.model) == Ops{"Conv", "Conv", "Relu"});
  REQUIRE(replaceable.left.size() == 2);
  for (const LeftAlone& left : replaceable.left)
    CHECK(left.remedy.starts_with("--initializers-are-constant"));
  const ContractedModel constant =
      contract_model(build(8), {.graph = {.initializers_are_constant = true}});
  CHECK(operators(constant.model) == Ops{"Conv", "Relu"});
  CHECK(constant.model.inputs.size() == 1);
  const ContractedModel old = contract_model(build(3), {});
  CHECK(operators(old.model) == Ops{"Conv", "Relu"});
  CHECK(old.model.inputs.size() == 3);  // x, and every initializer
}

TEST_CASE("taps are measured over all channels", "[onnx]") {
  const auto build = [](const std::string& op, const std::vector<float>& outer) {
    Builder b({1, 2, -1, -1});
    const std::string inner = b.node("Conv", {"x", b.constant<float>({1, 2, 1, 2}, {3, 0, 4, -2})});
    return b.finish(b.node(op, {inner, b.constant<float>({1, 1, 1, 1}, outer)}));
  };
  ModelOptions options{.when = When::always, .tap_norms = true};
  const ContractedModel result = contract_model(build("Conv", {2}), options);
  REQUIRE(result.regions.size() == 1);
  const TapNorms &before = result.regions[0].taps_before, &after = result.regions[0].taps_after;
  CHECK(before.join == concertina::Join::chain);
  REQUIRE(before.parts.size() == 2);
  CHECK(before.parts[0].layer == "conv2d 2->1 @1x2");
  CHECK(before.parts[0].kernel == Ints{1, 2});
  CHECK(before.parts[0].norms == std::vector<double>{5, 2});  // 3 and 4, 0 and -2
  CHECK(before.parts[1].norms == std::vector<double>{2});
  CHECK(after.layer == "conv2d 2->1 @1x2");
  CHECK(after.norms == std::vector<double>{10, 4});

  const ContractedModel transposed = contract_model(build("ConvTranspose", {2}), options);
  REQUIRE(transposed.regions.size() == 1);
  CHECK(transposed.regions[0].taps_after.norms.empty());
  options.tap_norms = false;
  CHECK(contract_model(build("Conv", {2}), options).regions.at(0).taps_after.norms.empty());
}

TEST_CASE("constants may come from nodes that read only constants", "[onnx]") {
  Builder b({-1, 3});
  const auto transposed =
      b.node("Transpose", {b.constant({5, 3})}, {Attribute::of("perm", Ints{1, 0})});
  const auto half = b.constant({5}, std::vector<Eigen::half>(5, Eigen::half(2)));
  const auto cast = b.node("Cast", {half}, {Attribute::of("to", std::int64_t{1})});
  const auto t = b.node("Add", {b.node("MatMul", {"x", transposed}), cast});
  CHECK(contracted(b.finish(b.node("Gemm", {t, b.constant({5, 4})})), {{1, 3}, {4, 3}}) ==
        Ops{"Gemm", "Relu"});
}

TEST_CASE("a contraction that its type does not hold is left, by name", "[onnx]") {
  Builder b({1, 2, 4, 4});
  onnx::Model model = b.finish(b.conv(b.conv("x", {2, 2, 1, 1}), {2, 2, 1, 1}));
  const auto all = [&](float value) {
    for (onnx::Tensor& tensor : model.initializers) {
      const std::vector<float> values(static_cast<std::size_t>(tensor.numel()), value);
      tensor = onnx::Tensor::of<float>(tensor.name, tensor.dims, values);
    }
    return contract_model(model, {});
  };
  CHECK(compare_models(model, all(1e18F).model).proved());
  const ContractedModel kept = all(1e20F);
  CHECK(kept.regions.empty());
  REQUIRE(kept.left.size() == 1);
  CHECK(kept.left.front().reason == "it contracts to numbers that float32 does not hold");
  CHECK(kept.model.nodes.size() == model.nodes.size());
}

TEST_CASE("a constant of no known type takes no memory for its shape", "[onnx]") {
  Builder b({1, 2, 4, 4});
  onnx::Model model = b.finish(b.conv(b.conv("x", {2, 2, 1, 1}), {2, 2, 1, 1}));
  for (onnx::Tensor& tensor : model.initializers) {
    onnx::Tensor untyped;
    untyped.name = tensor.name;
    untyped.dims = {std::int64_t{1} << 40};
    tensor = std::move(untyped);
    CHECK(contract_model(model, {}).regions.empty());
  }
}

TEST_CASE("extents that would overflow are not known", "[onnx]") {
  constexpr std::int64_t huge = std::int64_t{1} << 62;
  const auto last_of = [](const char* op, std::vector<Attribute> attributes) {
    Builder b({1, 4, 4, 4}, 10);
    const std::string y = b.node(op, {"x"}, std::move(attributes));
    onnx::Model model = b.finish(y);
    for (onnx::ValueInfo& output : model.outputs) output.shape.reset();
    const Graph graph(model, {});
    const auto& dims = graph[graph.find(y)].dims;
    return dims ? dims->back() : unknown;
  };
  const auto pad = [&](std::int64_t side) {
    return last_of(
        "Pad", {Attribute::of("pads", std::vector<std::int64_t>{0, 0, 0, side, 0, 0, 0, side})});
  };
  CHECK(pad(1) == 6);
  CHECK(pad(huge) == unknown);
  CHECK(last_of("SpaceToDepth", {Attribute::of("blocksize", std::int64_t{2})}) == 2);
  CHECK(last_of("SpaceToDepth", {Attribute::of("blocksize", huge)}) == unknown);
}

TEST_CASE("comparing finds what is wrong, and says what it cannot prove", "[onnx]") {
  Builder b({1, 3, -1, -1});
  const onnx::Model model =
      b.finish(b.conv(b.batch_norm(b.conv("x", {4, 3, 3, 3}), 4), {4, 4, 1, 1}));
  const ContractedModel result = contract_model(model, {});
  REQUIRE(compare_models(model, result.model).proved());
  CHECK(compare_models(model, model).identical == model.nodes.size());

  onnx::Model wrong = result.model;
  auto values = wrong.initializers.front().values<float>();
  values[5] += 0.5F;
  wrong.initializers.front() = onnx::Tensor::of<float>(wrong.initializers.front().name,
                                                       wrong.initializers.front().dims, values);
  CHECK(compare_models(model, wrong).failed());

  onnx::Model shifted = result.model;
  for (Attribute& attribute : shifted.nodes.front().attributes) {
    if (attribute.name == "pads") attribute.ints = {1, 0, 0, 1};
  }
  CHECK(!compare_models(model, shifted).proved());

  onnx::Model other = result.model;
  other.nodes.back().op_type = "Tanh";
  const ModelComparison unproved = compare_models(model, other);
  CHECK(!unproved.proved());
  CHECK(!unproved.failed());
}

TEST_CASE("models that equal nodes do not make equal are not proved", "[onnx]") {
  SECTION("the same matrix along another axis") {
    const auto build = [](bool along_channels) {
      Builder b({1, 4, 4});
      std::vector<float> matrix;
      for (int i = 0; i < 16; ++i) matrix.push_back(static_cast<float>(i % 5));
      std::vector<float> transposed;
      for (std::size_t i = 0; i < 16; ++i) transposed.push_back(matrix[i % 4 * 4 + i / 4]);
      return b.finish(along_channels ? b.node("Conv", {"x", b.constant({4, 4, 1}, transposed)})
                                     : b.node("MatMul", {"x", b.constant({4, 4}, matrix)}));
    };
    CHECK(!compare_models(build(true), build(false)).proved());
    CHECK(!compare_models(build(false), build(true)).proved());
  }
  SECTION("a mean without its axes") {
    const auto build = [](std::int64_t keep) {
      Builder b({1, 3, 4, 4});
      const auto t = b.node("ReduceMean", {b.conv("x", {4, 3, 1, 1})},
                            {Attribute::of("axes", Ints{2, 3}), Attribute::of("keepdims", keep)});
      return b.finish(t);
    };
    CHECK(!compare_models(build(1), build(0)).proved());
  }
  SECTION("an output that is a constant") {
    const auto build = [](float value) {
      Builder b({1, 3});
      onnx::Model model = b.finish("x");
      model.nodes.push_back({.name = "c",
                             .op_type = "Constant",
                             .outputs = {"z"},
                             .attributes = {Attribute::of("value_float", value)}});
      model.outputs.push_back({.name = "z", .type = DataType::float32});
      return model;
    };
    CHECK(compare_models(build(1), build(1)).proved());
    CHECK(!compare_models(build(1), build(2)).proved());
    onnx::Model initialized = build(1);
    initialized.nodes.pop_back();
    initialized.initializers.push_back(onnx::Tensor::of<float>("z", {}, std::vector<float>{2}));
    CHECK(!compare_models(build(1), initialized).proved());
    CHECK(compare_models(initialized, initialized).proved());
  }
  SECTION("a constant that a caller may replace, whose default is another") {
    const auto build = [](float value) {
      Builder b({1, 3});
      onnx::Model model =
          b.finish(b.node("Add", {"x", b.constant({3}, std::vector<float>(3, value))}));
      model.inputs.push_back(Builder::info("c0", {3}));
      return model;
    };
    CHECK(compare_models(build(1), build(1)).proved());
    CHECK(!compare_models(build(1), build(2)).proved());
  }
  SECTION("operators of another version") {
    const auto build = [](std::int64_t opset) {
      Builder b({1, 3, 2}, opset);
      return b.finish(b.node("Softmax", {"x"}));
    };
    CHECK(!compare_models(build(12), build(13)).proved());
  }
}
