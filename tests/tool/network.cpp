// Whole networks: how their description is read and refused, each layer against its definition.
// SPDX-License-Identifier: Apache-2.0
#include "networks/graph.hpp"
#include "networks/inference.hpp"
#include "support.hpp"

#include <concertina/io/safetensors.hpp>

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace concertina::test {
namespace {

using Catch::Contains;
using io::Safetensors;
using tool::Form;
using tool::LayerType;
using tool::Network;
using tool::Node;
using tool::parse_graph;
using tool::Tensor;

/// A file with this description and no tensors yet.
Safetensors described(const std::string& chain) {
  Safetensors file;
  file.origin = "f";
  file.metadata["chain"] = chain;
  return file;
}

/// A list of layers as a chain.
Safetensors chain_of(const std::string& layers) {
  return described(R"({"kind":"chain","layers":[)" + layers + "]}");
}

template <class Scalar>
Tensor<Scalar> small_integers(std::vector<Index> shape, Rng& rng) {
  Index count = 1;
  for (const Index extent : shape) count *= extent;
  Tensor<Scalar> x{std::move(shape), std::vector<Scalar>(static_cast<std::size_t>(count))};
  fill_small_integers(std::span(x.values), rng);
  return x;
}

template <class Scalar>
Tensor<Scalar> run(const Safetensors& file, const Tensor<Scalar>& x, Form form = Form::expanded) {
  return Network<Scalar>(file, parse_graph(file), form)(x);
}

/// The number at a position, or `outside` beyond the map.
template <class Scalar>
Scalar at(const Tensor<Scalar>& x, Index n, Index c, Index i, Index j, Scalar outside = 0) {
  if (i < 0 || j < 0 || i >= x.shape[2] || j >= x.shape[3]) return outside;
  return x
      .values[static_cast<std::size_t>(((n * x.shape[1] + c) * x.shape[2] + i) * x.shape[3] + j)];
}

/// Where windows of this extent start on an axis, one after another until one does not fit.
std::vector<Index> starts(const ConvShape<2>& shape, int axis, Index size) {
  std::vector<Index> result;
  const auto& padding = shape.padding;
  const Index extent = shape.dilation[axis] * (shape.kernel_size[axis] - 1) + 1;
  for (Index start = -padding.start[axis]; start + extent <= size + padding.end[axis];
       start += shape.stride[axis]) {
    result.push_back(start);
  }
  return result;
}

/// Calls each(n, o, start, start) for every output, in order, and appends what it returns.
template <class Scalar, class Each>
Tensor<Scalar> by_window(const ConvShape<2>& shape, const Tensor<Scalar>& x, const Each& each) {
  const auto rows = starts(shape, 0, x.shape[2]), columns = starts(shape, 1, x.shape[3]);
  Tensor<Scalar> y{{x.shape[0], shape.out, std::ssize(rows), std::ssize(columns)}, {}};
  for (Index n = 0; n < x.shape[0]; ++n) {
    for (Index o = 0; o < shape.out; ++o) {
      for (const Index i : rows) {
        for (const Index j : columns) y.values.push_back(each(n, o, i, j));
      }
    }
  }
  return y;
}

template <class Scalar>
Tensor<Scalar> by_definition(const Conv<Scalar, 2>& layer, const Tensor<Scalar>& x) {
  const ConvShape<2>& shape = layer.shape();
  const Index in = shape.in / shape.groups, out = shape.out / shape.groups;
  return by_window(shape, x, [&](Index n, Index o, Index i, Index j) {
    Scalar sum = shape.bias ? layer.bias()[static_cast<std::size_t>(o)] : Scalar(0);
    auto weight = layer.weight().begin() + o * in * shape.kernel_size[0] * shape.kernel_size[1];
    for (Index c = 0; c < in; ++c) {
      for (Index a = 0; a < shape.kernel_size[0]; ++a) {
        for (Index b = 0; b < shape.kernel_size[1]; ++b) {
          sum += *weight++ *
                 at(x, n, o / out * in + c, i + a * shape.dilation[0], j + b * shape.dilation[1]);
        }
      }
    }
    return sum;
  });
}

/// A file with one convolution.
template <class Scalar>
Safetensors file_of(const Conv<Scalar, 2>& layer) {
  const ConvShape<2>& shape = layer.shape();
  auto node = tool::geometry_json(shape);
  node["name"] = "F";
  Safetensors file = described(node.dump());
  file.add("F.weight",
           {shape.out, shape.in / shape.groups, shape.kernel_size[0], shape.kernel_size[1]},
           layer.weight());
  if (shape.bias) file.add("F.bias", {shape.out}, layer.bias());
  return file;
}

// ---- descriptions

TEST_CASE("a network is read as a tree of nodes", "[network]") {
  const Node root = parse_graph(described(R"(
    {"kind":"chain","exact":"interior","layers":[
      {"name":"a","stride":[2,1],"padding":1,"padding_end":[0,0],"groups":2},
      {"kind":"sum","branches":[
        {"kind":"chain","layers":[]},
        {"name":"b","type":"batch_norm","eps":0.5}],
       "expected":"c","expected_geometry":{"padding":[1,2]}},
      {"kind":"concat","branches":[
        {"type":"avg_pool","kernel":[3,2],"padding":[1,0],"ceil_mode":false},
        {"type":"channel_slice","begin":1,"end":4}]},
      {"type":"normalize","divide":255,"mean":[0.5],"std":[0.25]},
      {"type":"channel_shuffle","groups":3},
      {"name":"d","type":"linear","expected":"e","expected_geometry":null},
      {"name":"g","type":"scale","expected":"h"}]})"));
  CHECK(root.kind == Node::Kind::chain);
  CHECK(root.exact == false);
  CHECK(root.where == R"(f: metadata "chain")");
  REQUIRE(root.parts.size() == 7);

  const Node& conv = root.parts[0];
  CHECK(conv.kind == Node::Kind::layer);
  CHECK(conv.type == LayerType::conv);
  CHECK(conv.layer.tensor("weight") == "a.weight");
  CHECK(conv.layer.stride == std::vector<Index>{2, 1});
  CHECK(conv.layer.padding_end == std::vector<Index>{0, 0});
  CHECK(conv.layer.groups == 2);
  CHECK_FALSE(conv.expected);

  const Node& sum = root.parts[1];
  CHECK(sum.kind == Node::Kind::sum);
  REQUIRE(sum.parts.size() == 2);
  CHECK(sum.parts[0].parts.empty());
  CHECK(sum.parts[1].where == R"(f: metadata "chain".layers[1].branches[1])");
  CHECK(sum.parts[1].eps == 0.5);
  REQUIRE(sum.expected);
  CHECK(sum.expected->has_geometry);
  CHECK(sum.expected->layer.name == "c");
  CHECK(sum.expected->layer.padding == std::vector<Index>{1, 2});
  CHECK_FALSE(sum.expected->layer.linear);

  const Node& pool = root.parts[2].parts[0];
  CHECK(root.parts[2].kind == Node::Kind::concat);
  CHECK(pool.kernel == std::vector<Index>{3, 2});
  CHECK(pool.layer.stride == pool.kernel);
  CHECK(root.parts[2].parts[1].end == 4);
  CHECK(root.parts[3].divide == 255);
  CHECK(root.parts[4].layer.groups == 3);
  CHECK(root.parts[5].layer.linear);
  CHECK(root.parts[5].expected->layer.linear);
  CHECK_FALSE(root.parts[6].expected->has_geometry);

  CHECK_FALSE(is_linear(root));  // for the normalize
  for (const int linear : {0, 1, 2, 4, 5, 6}) {
    CHECK(is_linear(root.parts[static_cast<std::size_t>(linear)]));
  }
  for (const char* type : {"relu", "relu6", "flatten", "global_avg_pool"}) {
    const auto name = std::string(type);
    const Node node = parse_graph(described(R"({"type":")" + name + R"("})"));
    CHECK(name_of(node.type) == name);
    CHECK_FALSE(is_linear(node));
  }
}

TEST_CASE("without a chain, the metadata's conv is the network", "[network]") {
  Safetensors file;
  file.origin = "f";
  CHECK_THAT(message_of<FormatError>([&] { parse_graph(file); }), Contains("no metadata"));
  file.metadata["conv"] = R"({"stride":[2]})";
  CHECK(parse_graph(file).layer.tensor("weight") == "weight");
  CHECK(parse_graph(file).layer.stride == std::vector<Index>{2});
}

TEST_CASE("a description is refused by its place", "[network]") {
  std::string deep = R"({"type":"relu"})";
  for (int i = 0; i < 33; ++i) deep = R"({"kind":"sum","branches":[)" + deep + "]}";
  const std::string pool = R"({"type":"max_pool","kernel":3,"stride":2,)";
  const auto [description, place, complaint] =
      GENERATE_COPY(table<std::string, std::string, std::string>({
          {"[", "\"chain\"", "not valid JSON"},
          {"[]", "\"chain\"", "expected an object"},
          {R"({"kind":"product"})", "", "\"product\" are unknown; supported are chain, sum and"},
          {R"({"kind":"sum","layers":[]})", "", "\"layers\" of a sum is unknown"},
          {R"({"kind":"sum","branches":[]})", "", "at least one branch"},
          {R"({"kind":"chain"})", "", "needs a list of layers"},
          {R"({"kind":"chain","layers":[{"kind":"chain","layers":[],"exact":"interior"}]})",
           ".layers[0]", "\"exact\""},
          {R"({"kind":"chain","layers":[],"exact":"nowhere"})", ".exact", "\"everywhere\""},
          {deep, ".branches[0].branches[0]", "more than 32 deep"},
          {R"({"type":"gelu"})", "", "\"gelu\" are unknown; supported are conv, linear, batch"},
          {R"({"type":"relu","slope":1})", "", "\"slope\" of a layer of type relu is unknown"},
          {R"({"name":"a","stride":[0,1]})", ".stride", "at least 1"},
          {R"({"name":"a","dilation":1.5})", ".dilation", "expected an integer"},
          {R"({"name":"a","groups":0})", ".groups", "groups start at 1"},
          {R"({"stride":1})", "", "no name"},
          {R"({"type":"batch_norm","name":"a"})", "", "needs the field eps"},
          {R"({"type":"batch_norm","eps":1})", "", "needs the field name"},
          {R"({"type":"scale","name":3})", ".name", "expected a string"},
          {R"({"type":"avg_pool","kernel":2,"ceil_mode":true})", ".ceil_mode", "not supported"},
          {R"({"type":"avg_pool","kernel":2,"count_include_pad":false})", ".count_include_pad",
           "not supported"},
          {R"({"type":"avg_pool","kernel":[]})", ".kernel", "one for each axis"},
          {R"({"type":"avg_pool","kernel":0})", ".kernel", "at least 1"},
          {R"({"type":"avg_pool","kernel":[3,9999999]})", ".kernel", "at most 4096"},
          {R"({"type":"avg_pool","kernel":[3,3],"divisor_override":1})", "", "divisor_override"},
          {pool + R"("ceil_mode":false})", "", "\"ceil_mode\""},
          {pool + R"("dilation":1})", "", "\"dilation\""},
          {pool + R"("padding":[1,2]})", ".padding", "half of the kernel"},
          {pool + R"("padding":-1})", ".padding", "half of the kernel"},
          {R"({"type":"channel_slice","begin":2,"end":2})", "", "begin < end"},
          {R"({"type":"channel_slice","begin":-1,"end":2})", "", "begin < end"},
          {R"({"type":"channel_slice","begin":0})", "", "needs the field end"},
          {R"({"type":"channel_shuffle","groups":0})", ".groups", "at least 1"},
          {R"({"type":"normalize","divide":0,"mean":[1],"std":[1]})", "", "zero"},
          {R"({"type":"normalize","divide":1,"mean":[1],"std":[0]})", "", "zero"},
          {R"({"type":"normalize","divide":1,"mean":[1,2],"std":[1]})", "", "2 numbers in mean"},
          {R"({"type":"normalize","divide":1,"mean":1,"std":[1]})", ".mean", "list of numbers"},
          {R"({"type":"relu","expected_geometry":null})", "", "no field \"expected\""},
          {R"({"type":"relu","expected":"a","expected_geometry":{"stride":0}})",
           ".expected_geometry.stride", "at least 1"},
          {R"({"type":"relu","expected":"a","expected_geometry":{"name":"a"}})",
           ".expected_geometry", "\"name\" is unknown"},
      }));
  CAPTURE(description);
  CHECK_THAT(message_of<FormatError>([&] { parse_graph(described(description)); }),
             Contains("f: metadata \"chain\"" + (place == "\"chain\"" ? "" : place)) &&
                 Contains(complaint));
}

TEST_CASE("a network has a limit of nodes", "[network]") {
  std::string layers = R"({"type":"relu"})";
  for (int i = 0; i < 16; ++i) layers += "," + layers;
  CHECK_THAT(message_of<FormatError>([&] { parse_graph(chain_of(layers)); }),
             Contains("more than 65536 nodes"));
}

// ---- layers

TEMPLATE_TEST_CASE("a convolution follows its definition", "[network]", float, double) {
  Rng rng(1);
  std::vector<ConvShape<2>> shapes = all_shapes<2>(rng, 150);
  shapes.push_back({.out = 5, .in = 3});  // pointwise
  shapes.push_back({.out = 6, .in = 4, .groups = 2, .bias = true});
  shapes.push_back({.out = 6, .in = 3, .kernel_size = 3, .stride = 2, .groups = 3});
  shapes.push_back({.out = 2, .in = 90, .kernel_size = 7, .padding = 3});  // in parts
  for (const ConvShape<2>& shape : shapes) {
    CAPTURE(to_string(shape));
    const auto layer = test::small_integers<TestType>(shape, rng);
    for (const Index size : {1, 4, 7, 12}) {
      const auto x = small_integers<TestType>({2, shape.in, size, size + 5}, rng);
      const Tensor<TestType> expected = by_definition(layer, x);
      if (expected.values.empty()) {
        CHECK_THAT(message_of<ShapeError>([&] { run(file_of(layer), x); }),
                   Contains("f: metadata \"chain\": an input of size"));
      } else {
        CHECK(run(file_of(layer), x) == expected);
      }
    }
  }
}

TEST_CASE("a linear layer multiplies each image", "[network]") {
  Rng rng(2);
  const auto weight = small_integers<float>({3, 5}, rng), bias = small_integers<float>({3}, rng);
  Safetensors file = described(R"({"name":"F","type":"linear"})");
  file.add("F.weight", {3, 5}, weight.values);
  file.add("F.bias", {3}, bias.values);
  const auto x = small_integers<float>({4, 5}, rng);
  Tensor<float> expected{{4, 3}, {}};
  for (std::size_t n = 0; n < 4; ++n) {
    for (std::size_t o = 0; o < 3; ++o) {
      float sum = bias.values[o];
      for (std::size_t i = 0; i < 5; ++i) sum += weight.values[o * 5 + i] * x.values[n * 5 + i];
      expected.values.push_back(sum);
    }
  }
  CHECK(run(file, x) == expected);
  CHECK_THAT(message_of<ShapeError>([&] { run(file, small_integers<float>({4, 6}, rng)); }),
             Contains("reads 5 channels, but is given 6"));
  CHECK_THAT(message_of<ShapeError>([&] { run(file, small_integers<float>({4, 5, 1, 1}, rng)); }),
             Contains("reads 2 axes"));
}

TEST_CASE("half and bfloat16 weights are widened, F64 does not become float", "[network]") {
  const std::string layer = R"({"name":"F","type":"linear"})";
  const Tensor<float> x{{1, 1}, {3}};
  Safetensors half = described(layer), brain = described(layer), wide = described(layer);
  half.add("F.weight", {1, 1}, std::vector{Eigen::half(1.5F)});
  brain.add("F.weight", {1, 1}, std::vector{Eigen::bfloat16(1.5F)});
  wide.add("F.weight", {1, 1}, std::vector{1.5});
  CHECK(run(half, x).values == std::vector{4.5F});
  CHECK(run(brain, x).values == std::vector{4.5F});
  CHECK_THROWS_AS(run(wide, x), FormatError);
  CHECK(run(wide, Tensor<double>{{1, 1}, {3}}).values == std::vector{4.5});
}

TEST_CASE("layers by channel follow their definitions", "[network]") {
  Rng rng(3);
  const auto x = small_integers<double>({2, 2, 3, 2}, rng);
  const auto check = [&](const Safetensors& file, const auto& definition) {
    Tensor<double> expected = x;
    for (std::size_t i = 0; i < x.values.size(); ++i) {
      expected.values[i] = definition(i / 6 % 2, x.values[i]);
    }
    CHECK(run(file, x) == expected);
  };
  SECTION("batch norm") {
    Safetensors file = described(R"({"name":"F","type":"batch_norm","eps":1})");
    const std::vector<double> weight{3, -2}, bias{1, 5}, mean{2, -1}, variance{3, 15};
    file.add("F.weight", {2}, weight);
    file.add("F.bias", {2}, bias);
    file.add("F.running_mean", {2}, mean);
    file.add("F.running_var", {2}, variance);
    check(file, [&](std::size_t c, double value) {
      return (value - mean[c]) / (c == 0 ? 2 : 4) * weight[c] + bias[c];
    });
    CHECK_THAT(
        message_of<ShapeError>([&] { run(file, small_integers<double>({1, 3, 2, 2}, rng)); }),
        Contains("reads 2 channels, but is given 3"));
    file.tensors.at("F.running_var") = file.tensors.at("F.running_mean");
    CHECK_THAT(message_of<FormatError>([&] { run(file, x); }), Contains("not always positive"));
    file.tensors.erase("F.bias");
    file.add("F.bias", {3}, std::vector<double>{1, 2, 3});
    CHECK_THAT(message_of<ShapeError>([&] { run(file, x); }), Contains("differ in length"));
  }
  SECTION("scale") {
    Safetensors file = described(R"({"name":"F","type":"scale"})");
    file.add("F.weight", {2}, std::vector{3.0, -2.0});
    check(file, [](std::size_t c, double value) { return value * (c == 0 ? 3 : -2); });
  }
  SECTION("normalize") {
    check(described(R"({"type":"normalize","divide":2,"mean":[1,-3],"std":[4,0.5]})"),
          [](std::size_t c, double value) {
            return c == 0 ? (value / 2 - 1) / 4 : (value / 2 + 3) / 0.5;
          });
  }
  SECTION("relu and relu6") {
    check(described(R"({"type":"relu"})"),
          [](std::size_t, double value) { return std::max(value, 0.0); });
    Safetensors file = chain_of(R"({"name":"F","type":"scale"},{"type":"relu6"})");
    file.add("F.weight", {2}, std::vector{3.0, 3.0});
    check(file, [](std::size_t, double value) { return std::clamp(3 * value, 0.0, 6.0); });
  }
}

TEST_CASE("what is not a number stays so", "[network]") {
  const Tensor<float> x{{1, 1, 2, 2}, {1, std::numeric_limits<float>::quiet_NaN(), 2, 3}};
  CHECK(std::isnan(run(described(R"({"type":"relu"})"), x).values[1]));
  CHECK(std::isnan(run(described(R"({"type":"relu6"})"), x).values[1]));
  CHECK(std::isnan(run(described(R"({"type":"max_pool","kernel":2})"), x).values[0]));
}

TEST_CASE("pools follow their definitions", "[network]") {
  Rng rng(4);
  const auto [fields, shape] = GENERATE(table<std::string, ConvShape<2>>({
      {R"("kernel":[2,2])", {.kernel_size = 2, .stride = 2}},
      {R"("kernel":4,"stride":1,"padding":[1,2])", {.kernel_size = 4, .padding = {1, 2}}},
      {R"("kernel":[2,1],"stride":[3,1],"padding":[1,0])",
       {.kernel_size = {2, 1}, .stride = {3, 1}, .padding = {1, 0}}},
  }));
  for (const Index size : {4, 5, 8}) {
    const auto x = small_integers<double>({2, 3, size, size + 3}, rng);
    ConvShape<2> window = shape;
    window.in = window.out = 3;
    const auto over = [&](Index n, Index c, Index i, Index j, double start, const auto& combine) {
      for (Index a = 0; a < window.kernel_size[0]; ++a) {
        for (Index b = 0; b < window.kernel_size[1]; ++b) {
          start = combine(start, at(x, n, c, i + a, j + b, start));
        }
      }
      return start;
    };
    CHECK(run(described(R"({"type":"max_pool",)" + fields + "}"), x) ==
          by_window(window, x, [&](Index n, Index c, Index i, Index j) {
            return over(n, c, i, j, -1e9, [](double p, double q) { return std::max(p, q); });
          }));
    CHECK(run(described(R"({"type":"avg_pool",)" + fields + "}"), x) ==
          by_window(window, x, [&](Index n, Index c, Index i, Index j) {
            double sum = 0;
            for (Index a = 0; a < window.kernel_size[0]; ++a) {
              for (Index b = 0; b < window.kernel_size[1]; ++b) sum += at(x, n, c, i + a, j + b);
            }
            return sum / static_cast<double>(window.kernel_size[0] * window.kernel_size[1]);
          }));
  }
  CHECK_THAT(message_of<FormatError>([] {
               run(described(R"({"type":"avg_pool","kernel":[1,1,1]})"), Tensor<float>{});
             }),
             Contains("two spatial axes"));
}

TEST_CASE("channels are averaged, flattened, sliced and shuffled", "[network]") {
  Tensor<double> x{{2, 6, 1, 2}, std::vector<double>(24)};
  for (std::size_t i = 0; i < 24; ++i) x.values[i] = static_cast<double>(i * i);
  const auto channels = [&](const std::vector<Index>& from) {
    Tensor<double> y{{2, std::ssize(from), 1, 2}, {}};
    for (Index n = 0; n < 2; ++n) {
      for (const Index c : from) {
        for (Index j = 0; j < 2; ++j) y.values.push_back(at(x, n, c, 0, j));
      }
    }
    return y;
  };
  CHECK(run(described(R"({"type":"channel_slice","begin":2,"end":5})"), x) == channels({2, 3, 4}));
  CHECK(run(described(R"({"type":"channel_shuffle","groups":2})"), x) ==
        channels({0, 3, 1, 4, 2, 5}));
  CHECK(run(described(R"({"type":"flatten"})"), x) == Tensor<double>{{2, 12}, x.values});
  const Tensor<double> means = run(described(R"({"type":"global_avg_pool"})"), x);
  CHECK(means.shape == std::vector<Index>{2, 6});
  for (std::size_t c = 0; c < 12; ++c) {
    CHECK(means.values[c] == (x.values[2 * c] + x.values[2 * c + 1]) / 2);
  }
  CHECK_THROWS_AS(run(described(R"({"type":"channel_slice","begin":2,"end":7})"), x), ShapeError);
  CHECK_THROWS_AS(run(described(R"({"type":"channel_shuffle","groups":4})"), x), ShapeError);
  CHECK_THROWS_AS(run(described(R"({"type":"global_avg_pool"})"), means), ShapeError);
}

// ---- composites and forms

TEST_CASE("branches are added and joined", "[network]") {
  Rng rng(5);
  const auto x = small_integers<float>({2, 3, 2, 2}, rng);
  const std::string identity = R"({"kind":"chain","layers":[]})", relu = R"({"type":"relu"})";
  const auto branches = [](const std::string& kind, const std::string& list) {
    return described(R"({"kind":")" + kind + R"(","branches":[)" + list + "]}");
  };
  Tensor<float> sum = x;
  for (float& value : sum.values) value += std::max(value, 0.F);
  CHECK(run(branches("sum", identity + "," + relu), x) == sum);

  const std::string slice = R"({"type":"channel_slice","begin":1,"end":2})";
  const Tensor<float> joined = run(branches("concat", slice + "," + identity), x);
  CHECK(joined.shape == std::vector<Index>{2, 4, 2, 2});
  for (Index n = 0; n < 2; ++n) {
    for (Index c = 0; c < 4; ++c) {
      CHECK(at(joined, n, c, 1, 0) == at(x, n, c == 0 ? 1 : c - 1, 1, 0));
    }
  }

  CHECK_THAT(message_of<ShapeError>([&] { run(branches("sum", identity + "," + slice), x); }),
             Contains("f: metadata \"chain\": branch 0 gives [2, 3, 2, 2], branch 1 [2, 1, 2, 2]"));
  const std::string pool = R"({"type":"avg_pool","kernel":2})";
  CHECK_THAT(message_of<ShapeError>([&] { run(branches("concat", identity + "," + pool), x); }),
             Contains("branch 1 gives [2, 3, 1, 1]"));
  CHECK_THROWS_AS(run(branches("sum", identity), Tensor<float>{{2, 3}, {1}}), ShapeError);
  CHECK_THROWS_AS(run(branches("sum", identity), Tensor<float>{{2}, {1, 2}}), ShapeError);
}

TEST_CASE("the compact form takes the expected layer", "[network]") {
  const std::string scale = R"({"name":"a","type":"scale"})";
  const auto file = [&](const std::string& expected) {
    Safetensors result = chain_of(R"({"kind":"chain","layers":[)" + scale + "," + scale + "]" +
                                  expected + "}," + scale);
    result.add("a.weight", {1}, std::vector{3.0F});
    result.add("b.weight", {1, 1}, std::vector{7.0F});
    result.add("b.bias", {1}, std::vector{1.0F});
    return result;
  };
  const Tensor<float> x{{1, 1}, {2}};
  const Safetensors stated = file(R"(,"expected":"b","expected_geometry":null)");
  CHECK(run(stated, x).values == std::vector{54.0F});
  CHECK(run(stated, x, Form::compact).values == std::vector{45.0F});
  CHECK(run(file(""), x, Form::compact).values == std::vector{54.0F});
  CHECK_THAT(message_of<FormatError>([&] { run(file(R"(,"expected":"b")"), x, Form::compact); }),
             Contains(R"("chain".layers[0]: without expected_geometry)"));
}

TEST_CASE("a padding beyond memory is refused before it is computed", "[network]") {
  Safetensors file = described(R"({"name":"F","padding":1000000})");
  file.add("F.weight", {1, 1, 1, 1}, std::vector{1.0F});
  CHECK_THAT(message_of<SizeError>([&] { run(file, Tensor<float>{{1, 1, 1, 1}, {1}}); }),
             Contains("more than 4 GiB"));
}

}  // namespace
}  // namespace concertina::test
