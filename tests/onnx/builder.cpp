// Models built layer by layer: their names, shapes and parameters, and what is refused.
// SPDX-License-Identifier: Apache-2.0
#include "onnx/builder.hpp"
#include "onnx/evaluate.hpp"

#include <concertina/error.hpp>

#include <catch2/catch.hpp>

#include <numeric>
#include <string>
#include <variant>
#include <vector>

using namespace tool;
using concertina::ConvShape, concertina::ShapeError;
using onnx::DataType;

namespace {

Builder images(Dims size = {8, 8}, DataType type = DataType::float32) {
  return {"test", type, {unknown, 4, size[0], size[1]}};
}

/// 0, 1, 2, ... in each parameter.
onnx::Tensor counting(const std::string& name, const Dims& dims) {
  const Index count = std::accumulate(dims.begin(), dims.end(), Index{1}, std::multiplies<>());
  std::vector<double> values(static_cast<std::size_t>(count));
  std::iota(values.begin(), values.end(), 0.0);
  return onnx::Tensor::of<double>(name, dims, values);
}

Array<double> run(const onnx::Model& model, Array<double> input) {
  const onnx::Model read = onnx::parse_model(onnx::serialize_model(model));
  const Value input_value = std::move(input);
  return std::get<Array<double>>(Evaluator(read, true)({{"input", input_value}}).at("output"));
}

std::vector<std::string> names(const auto& list) {
  std::vector<std::string> result;
  for (const auto& each : list) result.push_back(each.name);
  return result;
}

}  // namespace

TEST_CASE("layers have PyTorch's names, nodes without one that of their operator", "[builder]") {
  Builder net = images();
  net.conv("a.0", ConvShape<2>{.out = 6, .kernel_size = 3, .groups = 2, .bias = true})
      .batch_norm("a.1")
      .relu()
      .scale("s", true)
      .relu();
  net.flatten().linear("fc", 3, false);
  const onnx::Model model = net.finish();
  CHECK(names(model.inputs) == std::vector<std::string>{"input", "a.0.weight", "a.0.bias",
                                                        "a.1.weight", "a.1.bias",
                                                        "a.1.running_mean", "a.1.running_var",
                                                        "s.weight", "s.bias", "fc.weight"});
  CHECK(names(model.nodes) ==
        std::vector<std::string>{"a.0", "a.1", "relu", "s", "s.add", "relu_1", "flatten", "fc"});
  CHECK(model.outputs.front().name == "output");
  CHECK(model.outputs.front().shape->back().value == 3);
  CHECK_FALSE(model.outputs.front().shape->front().value);
}

TEST_CASE("extents that are not known stay so", "[builder]") {
  Builder net = images({unknown, 8});
  net.conv("a", ConvShape<2>{.out = 2, .kernel_size = 3, .stride = 2});
  CHECK(net.dims() == Dims{unknown, 2, unknown, unknown});
  CHECK_THROWS_WITH(net.flatten(), Catch::Contains("known size"));
  net.global_avg_pool();
  CHECK(net.dims() == Dims{unknown, 2});
}

TEST_CASE("parameters get elements of their shape", "[builder]") {
  Builder net = images({2, 2}, DataType::float64);
  net.conv("a", ConvShape<2>{.out = 1, .kernel_size = 2, .bias = true});
  const onnx::Model model = net.finish(counting);
  CHECK(names(model.inputs) == std::vector<std::string>{"input"});
  std::vector<double> input(16, 1.0);
  CHECK(run(model, {{1, 4, 2, 2}, input}).values == std::vector{120.0});
  Builder other = images();
  other.batch_norm("n");
  CHECK_THROWS_AS(
      other.finish([](const std::string& name, const Dims&) { return counting(name, {3}); }),
      ShapeError);
}

TEST_CASE("a double batch norm has the epsilon that a float does not hold", "[builder]") {
  Builder net = images({1, 1}, DataType::float64);
  net.batch_norm("n", 1e-5);
  const onnx::Model model = net.finish([](const std::string& name, const Dims& dims) {
    const double value = name == "n.weight" ? 1 : 0;
    return onnx::Tensor::of<double>(name, dims, std::vector<double>(4, value));
  });
  const double y = run(model, {{1, 4, 1, 1}, {1, 1, 1, 1}}).values.front();
  CHECK(y == Approx(1 / std::sqrt(1e-5)).epsilon(1e-15));
}

TEST_CASE("branches join, and a model ends where its builder stands", "[builder]") {
  Builder net = images({2, 2}, DataType::float64);
  Builder other = net.branch();
  other.max_pool({2, 2}, {1, 1}, {0, 0});
  const Builder average = net.branch().avg_pool({2, 2}, {1, 1}, {0, 0});
  CHECK(net.branch().sum({other, average}).dims() == Dims{unknown, 4, 1, 1});
  net.concat({other, average}).channel_shuffle(2).channel_slice(0, 3);
  net.branch().relu();  // of which nothing comes
  const std::vector<double> input = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  CHECK(run(net.finish(counting), {{1, 4, 2, 2}, input}) ==
        Array<double>{{1, 3, 1, 1}, {3, 1.5, 7}});
  CHECK(run(images({1, 1}, DataType::float64).finish(), {{1, 4, 1, 1}, {1, 2, 3, 4}}).values ==
        std::vector<double>{1, 2, 3, 4});
}

TEST_CASE("layers that do not fit are refused by name", "[builder]") {
  using Catch::Contains;
  const ConvShape<2> shape{.out = 4, .kernel_size = 9};
  CHECK_THROWS_WITH(images().conv("big", shape), Contains("layer big"));
  const ConvShape<2> grouped{.out = 4, .kernel_size = 1, .groups = 3};
  CHECK_THROWS_WITH(images().conv("grouped", grouped), Contains("layer grouped"));
  CHECK_THROWS_WITH(images().conv("line", ConvShape<1>{.out = 4}), Contains("1 spatial axes"));
  CHECK_THROWS_WITH(images().linear("fc", 3), Contains("layer fc") && Contains("?x4x8x8"));
  CHECK_THROWS_AS(images().channel_slice(2, 5), ShapeError);
  CHECK_THROWS_AS(images().channel_shuffle(3), ShapeError);
  CHECK_THROWS_AS(images().max_pool({9, 9}, {1, 1}, {0, 0}), ShapeError);
  CHECK_THROWS_AS(images().max_pool({2}, {1}, {0}), ShapeError);
  Builder narrow = images().channel_slice(0, 2);
  Builder wide = images();
  CHECK_THROWS_WITH(wide.sum({wide.branch(), narrow}), Contains("?x2x8x8"));
}
