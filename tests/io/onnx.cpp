// ONNX models: what is read, what is refused and with which words, and what is left as it was.
// SPDX-License-Identifier: Apache-2.0
#include <concertina/io/onnx.hpp>  // first: the header must stand alone

#include <catch2/catch.hpp>

#include <vector>

using namespace concertina;
using namespace concertina::onnx;

TEST_CASE("a model reads as it was written", "[onnx]") {
  Model model;
  model.opsets = {{"", 17}};
  model.inputs = {{.name = "x", .type = DataType::float32}};
  model.outputs = {{.name = "y", .type = DataType::float32}};
  model.initializers = {Tensor::of<float>("w", {3}, std::vector<float>{1, 2, 3})};
  model.nodes = {{.op_type = "Mul", .inputs = {"x", "w"}, .outputs = {"y"}}};
  const std::vector<std::byte> bytes = serialize_model(model);
  const Model again = parse_model(bytes);
  CHECK(serialize_model(again) == bytes);
  CHECK(again.initializers.at(0).values<double>() == std::vector<double>{1, 2, 3});
}
