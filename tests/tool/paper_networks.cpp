// The networks of the paper: what they cost to the last digit, how they expand and contract, and
// what is refused.
// SPDX-License-Identifier: Apache-2.0
#include "networks/paper_networks.hpp"

#include "networks/compact_network.hpp"
#include "networks/expansion.hpp"
#include "networks/inference.hpp"
#include "text.hpp"

#include <concertina/io/onnx.hpp>

#include <catch2/catch.hpp>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

using namespace tool;
using concertina::PerAxis;
using concertina::io::Safetensors;

namespace {

Cost cost(const std::string& name, const std::string& strategy = "", bool stride_last = true) {
  const Architecture network = paper_network(name);
  if (strategy.empty()) return total(layer_costs(network));
  return total(layer_costs(expanded(
      network, {.strategy = strategy, .stride_last = stride_last && strategy.starts_with("cl")})));
}

std::map<std::string, std::vector<Index>> shapes(const Safetensors& file) {
  std::map<std::string, std::vector<Index>> result;
  for (const auto& [name, tensor] : file.tensors) result[name] = tensor.shape;
  return result;
}

/// Every kind of layer and connection, on a map of odd extents.
Architecture small_network() {
  const MapShape<2> input{.channels = 2, .size = {9, 11}};
  Builder net(input);
  net.conv("conv1", {.out = 4, .kernel_size = 5, .stride = 2, .padding = 2, .bias = true})
      .batch_norm("norm")
      .leaky_relu(0.25);
  Builder inner = net.branch();
  inner.conv("depthwise", {.out = 4, .kernel_size = 3, .padding = 1, .groups = 4})
      .plain(LayerType::relu6);
  net.sum({net.branch(), inner});
  Builder below = net.branch(), beside = net.branch();
  below.max_pool(3, 2, 1).conv_transpose("up", 3, 2).channel_slice(1, 3);
  beside.avg_pool(1, 1).conv(
      "side", {.out = 2, .kernel_size = 1, .padding = concertina::Padding<2>::sides({1, 0}, 0)});
  net.concat({below, beside}).channel_shuffle(2).plain(LayerType::relu);
  net.plain(LayerType::flatten).linear("fc1", 6).plain(LayerType::relu).linear("fc2", 3);
  return {.name = "small", .title = "Small", .input = input, .graph = net.graph()};
}

Tensor<double> output(const Safetensors& file) {
  return run(Network<double>(file, parse_graph(file)), read_tensor<double>(file, "input"));
}

double largest(const Tensor<double>& x) {
  return largest_difference(x, {x.shape, std::vector<double>(x.values.size())});
}

}  // namespace

TEST_CASE("the paper's networks cost what was derived from its table", "[paper_networks]") {
  CHECK(cost("smallnet7") == Cost{66'186, 4'491'904});
  CHECK(cost("smallnet7", "cl") == Cost{547'102, 57'487'280});
  CHECK(cost("smallnet7", "cl+fc") == Cost{2'105'886, 59'043'760});
  CHECK(cost("smallnet7", "ck") == Cost{186'982, 23'947'968});
  CHECK(cost("smallnet7", "ck+fc") == Cost{1'745'766, 25'504'448});
  CHECK(cost("mobilenet") == Cost{4'231'976, 583'918'592});
  CHECK(cost("mobilenet", "cl") == Cost{4'958'348, 1'764'775'568});
  CHECK(cost("mobilenetv2") == Cost{3'504'872, 320'236'288});
  CHECK(cost("mobilenetv2", "cl") == Cost{3'666'108, 1'338'429'776});
  CHECK(cost("shufflenetv2") == Cost{1'366'792, 43'646'944});
  CHECK(cost("shufflenetv2", "cl") == Cost{1'414'972, 601'750'864});
  CHECK(cost("yololite") == Cost{572'941, 1'813'616'709});
  CHECK(cost("yololite", "cl") == Cost{4'482'433, 28'586'053'333});
  CHECK(cost("unet") == Cost{7'763'188, 389'256'577'024});
  CHECK(cost("unet", "cl") == Cost{82'969'028, 2'586'015'128'768});
}

TEST_CASE("cost follows its rule layer by layer", "[paper_networks]") {
  std::map<std::string, Cost> found;
  for (const LayerCost& layer : layer_costs(small_network())) {
    found[layer.name.empty() ? layer.layer : layer.name] = layer.cost;
  }
  CHECK(found["conv1"] == Cost{4 * (2 * 25 + 1), 4 * (2 * 25 + 1) * 5 * 6});
  CHECK(found["norm"] == Cost{8, 2 * 4 * 5 * 6});
  CHECK(found["leaky_relu"] == Cost{0, 4 * 5 * 6});
  CHECK(found["depthwise"] == Cost{4 * 9, 4 * 9 * 5 * 6});
  CHECK(found["relu6"] == Cost{0, 4 * 5 * 6});
  CHECK(found["max_pool"] == Cost{0, 4 * 5 * 6});  // reads 5x6, writes 3x3
  CHECK(found["up"] == Cost{4 * 3 * 4, 4 * 3 * 4 * 3 * 3});
  CHECK(found["channel_slice"] == Cost{});
  CHECK(found["avg_pool"] == Cost{0, 4 * 5 * 6});
  CHECK(found["fc1"] == Cost{6 * 144 + 6, 6 * 144});
  Architecture functional = small_network();
  functional.functional = true;
  CHECK(total(layer_costs(functional)).multiply_adds ==
        total(layer_costs(small_network())).multiply_adds - 4 * 5 * 6 * 4 - 4 * 6 * 6 - 6);
}

TEST_CASE("a stride on the kxk layer costs less and keeps the shapes", "[paper_networks]") {
  for (const auto& [name, percent] :
       std::map<std::string, long>{{"mobilenet", 39}, {"mobilenetv2", 54}, {"shufflenetv2", 66}}) {
    const Cost kernel = cost(name, "cl", false), last = cost(name, "cl", true);
    CHECK(kernel.parameters == last.parameters);
    CHECK(std::lround(100 - 100.0 * static_cast<double>(kernel.multiply_adds) /
                                static_cast<double>(last.multiply_adds)) == percent);
    const Architecture compact = paper_network(name);
    for (const bool stride_last : {false, true}) {
      const Architecture wide = expanded(compact, {.strategy = "cl", .stride_last = stride_last});
      CHECK(output_of(wide.graph, wide.input) == output_of(compact.graph, compact.input));
    }
  }
}

TEST_CASE("a described network is what its file says", "[paper_networks]") {
  const Safetensors file = initialized(small_network(), 7);
  CHECK(to_json(parse_graph(file)) == to_json(small_network().graph));
  CHECK(output(file).shape == std::vector<Index>{1, 3});
  CHECK(initialized(small_network(), 7) == file);
  CHECK_FALSE(initialized(small_network(), 8) == file);
  for (const char* name : {"smallnet3", "mobilenetv2", "shufflenetv2"}) {
    const Architecture network = paper_network(name);
    const Safetensors described = initialized(network, 1);
    Index numbers = 0;
    for (const auto& [tensor, shape] : shapes(described)) {
      Index count = 1;
      for (const Index extent : shape) count *= extent;
      numbers += tensor == "input" || tensor.find("running_") != std::string::npos ? 0 : count;
    }
    CHECK(numbers == total(layer_costs(network)).parameters);
  }
}

TEST_CASE("the description of an ImageNet network is the published code's", "[paper_networks]") {
  const char* const reference = std::getenv("CONCERTINA_REFERENCE");
  if (!reference || !*reference) {
    WARN("skipped: CONCERTINA_REFERENCE is empty");
    return;
  }
  for (const auto& [name, path] : std::map<std::string, std::string>{
           {"mobilenet", "mobilenetv1"}, {"mobilenetv2", "mobilenetv2"}}) {
    const auto folder = std::filesystem::path(reference) / "imagenet" / (path + "-expand");
    std::vector<std::vector<Index>> published, ours;
    for (const auto& tensor : concertina::onnx::read_model(folder / "model.onnx").initializers) {
      if (tensor.type == concertina::onnx::DataType::int64 || tensor.dims.empty()) continue;
      published.emplace_back(tensor.dims.begin(), tensor.dims.end());
    }
    for (const auto& [tensor, shape] :
         shapes(initialized(expanded(paper_network(name), {.strategy = "cl"}), 1))) {
      if (tensor != "input") ours.push_back(shape);
    }
    std::ranges::sort(published);
    std::ranges::sort(ours);
    CHECK(ours == published);
  }
}

TEST_CASE("expanded networks contract to the compact ones", "[paper_networks]") {
  for (const auto& [name, strategy] :
       std::vector<std::pair<std::string, std::string>>{{"smallnet7", "cl+fc"},
                                                        {"smallnet7", "ck+fc"},
                                                        {"smallnet3", "cl"},
                                                        {"shufflenetv2", "cl"}}) {
    INFO(name << " " << strategy);
    const Architecture compact = paper_network(name);
    const Safetensors wide = initialized(expanded(compact, {.strategy = strategy}), 3);
    CompactNetwork contracted =
        compact_network(wide, parse_graph(wide), concertina::io::Dtype::F64);
    for (const auto& [tensor, shape] : shapes(initialized(compact, 1))) {
      if (tensor.ends_with(".weight") && shape.size() > 1) {
        CHECK(contracted.file.tensor(tensor).shape == shape);
      }
    }
    if (strategy == "cl") {  // where the stride stands changes nothing
      const Safetensors paper =
          initialized(expanded(compact, {.strategy = "cl", .stride_last = true}), 3);
      CHECK(paper.tensors == wide.tensors);
      CHECK((paper.metadata == wide.metadata) == (name == "smallnet3"));
      CHECK(compact_network(paper, parse_graph(paper), concertina::io::Dtype::F64).file ==
            contracted.file);
    }
    contracted.file.tensors.insert({"input", wide.tensor("input")});
    const Tensor<double> right = output(wide);
    // Two runs in double of some hundred layers, whose sums have at most some thousand terms.
    CHECK(largest_difference(output(contracted.file), right) <= 1e-10 * largest(right));
  }
}

TEST_CASE("recipes say which layers an expansion has", "[paper_networks]") {
  std::map<std::string, concertina::ConvShape<2>> layers;
  const auto list = [&](const Node& node) {
    if (node.type == LayerType::conv) layers[node.layer.name] = conv_shape(node);
  };
  for_each_layer(expanded(paper_network("alexnet128"), {.strategy = "ck"}).graph, list);
  REQUIRE(layers.contains("conv1.4"));
  CHECK_FALSE(layers.contains("conv1.5"));
  CHECK(layers.at("conv1.4").stride == concertina::PerAxis<2>(4));
  CHECK(layers.contains("conv2.1"));
  CHECK_FALSE(layers.contains("conv2.2"));
  CHECK(layers.contains("conv3"));

  Architecture biased = small_network();
  biased.recipes = {{.strategy = "cl", .layers = {"depthwise"}, .inner_bias = true}};
  const Architecture wide = expanded(biased, {.strategy = "cl"});
  for_each_layer(wide.graph, list);
  CHECK(layers.at("depthwise.0").bias);
  CHECK(layers.at("depthwise.1").bias);
  CHECK_FALSE(layers.at("depthwise.2").bias);
  const Safetensors file = initialized(wide, 1);
  CHECK(compact_network(file, parse_graph(file)).file.contains("depthwise.bias"));
}

TEST_CASE("a network of its own expands where a strategy applies", "[paper_networks]") {
  const Architecture wide = expanded(small_network(), {.strategy = "ck+fc", .rate = 2});
  const auto all = shapes(initialized(wide, 1));
  CHECK(all.contains("conv1.1.weight"));
  CHECK(all.contains("depthwise.weight"));
  CHECK(all.at("fc1.0.weight") == std::vector<Index>{288, 144});
  CHECK(all.contains("fc2.2.bias"));
  const auto one = shapes(
      initialized(expanded(small_network(), {.strategy = "cl", .layers = {"depthwise"}}), 1));
  CHECK(one.at("depthwise.1.weight") == std::vector<Index>{16, 4, 3, 3});
  CHECK(one.contains("conv1.weight"));
}

TEST_CASE("what cannot be expanded is refused with the choices", "[paper_networks]") {
  using Catch::Contains;
  CHECK_THROWS_WITH(paper_network("vgg"), Contains("vgg") && Contains("smallnet7, smallnet3"));
  const Architecture net = paper_network("mobilenet");
  CHECK_THROWS_WITH(expanded(net, {.strategy = "ck"}),
                    Contains("larger than 3") && Contains("MobileNet") && Contains("cl, fc"));
  CHECK_THROWS_WITH(expanded(net, {.strategy = "xl"}), Contains("cl, ck, fc, cl+fc, ck+fc"));
  CHECK_THROWS_WITH(expanded(net, {.strategy = "cl", .rate = 0}), Contains("rate of 0"));
  CHECK_THROWS_WITH(expanded(net, {.strategy = "cl", .rate = 1e6}), Contains("million"));
  CHECK_THROWS_WITH(expanded(net, {.strategy = "cl", .layers = {"model.0.9"}}),
                    Contains("model.0.9") && Contains("model.0.0, model.1.0"));
  CHECK_THROWS_WITH(expanded(net, {.strategy = "cl", .layers = {"model.0.0", "fc"}}),
                    Contains("\"fc\""));
  CHECK_THROWS_WITH(expanded(net, {.strategy = "cl+fc", .layers = {"model.0.0"}}),
                    Contains("expanded by fc; it expands fc"));
  CHECK_THROWS_WITH(expanded(net, {.strategy = "fc", .stride_last = true}), Contains("CL"));
  CHECK_THROWS_WITH(expanded(net, {.strategy = "cl", .rate = std::nan("")}), Contains("rate"));
  CHECK_THROWS_WITH(expanded(paper_network("unet"), {.strategy = "cl", .rate = 999'999}),
                    Contains("U-Net: down") && Contains("at rate"));
  for (const double rate : {60.0, 1000.0}) {
    CHECK_THROWS_AS(
        initialized(expanded(paper_network("unet"), {.strategy = "cl", .rate = rate}), 1),
        concertina::SizeError);
  }
}

TEMPLATE_TEST_CASE("a transposed convolution follows its definition", "[paper_networks]", float,
                   double) {
  std::mt19937_64 generator(5);
  for (const PerAxis<2>& stride : {PerAxis<2>{1, 1}, {2, 2}, {1, 3}, {3, 2}}) {
    for (const PerAxis<2>& kernel : {PerAxis<2>{1, 1}, {2, 2}, {2, 3}, {3, 1}}) {
      const Index in = 3, out = 2, height = 3, width = 4, batch = 2;
      const auto integers = [&](Index count) {
        std::vector<TestType> values(static_cast<std::size_t>(count));
        for (TestType& value : values) value = static_cast<TestType>(Index(generator() % 7) - 3);
        return values;
      };
      Safetensors file;
      const auto weight = integers(in * out * numel(kernel)), bias = integers(out);
      file.add("up.weight", {in, out, kernel[0], kernel[1]}, weight);
      file.add("up.bias", {out}, bias);
      file.metadata["chain"] = R"({"type":"conv_transpose","name":"up","stride":[)" +
                               std::to_string(stride[0]) + "," + std::to_string(stride[1]) + "]}";
      const Tensor<TestType> x{{batch, in, height, width}, integers(batch * in * height * width)};
      const Tensor<TestType> y = Network<TestType>(file, parse_graph(file))(x);
      const Index rows = (height - 1) * stride[0] + kernel[0];
      const Index columns = (width - 1) * stride[1] + kernel[1];
      REQUIRE(y.shape == std::vector<Index>{batch, out, rows, columns});
      std::vector<TestType> expected;
      for (Index n = 0; n < batch; ++n) {
        for (Index o = 0; o < out; ++o) {
          for (Index r = 0; r < rows; ++r) {
            for (Index c = 0; c < columns; ++c) {
              TestType sum = bias[static_cast<std::size_t>(o)];
              for (Index i = 0; i < in; ++i) {
                for (Index h = 0; h < height; ++h) {
                  for (Index w = 0; w < width; ++w) {
                    const Index ky = r - h * stride[0], kx = c - w * stride[1];
                    if (ky < 0 || ky >= kernel[0] || kx < 0 || kx >= kernel[1]) continue;
                    sum +=
                        weight[static_cast<std::size_t>(
                            ((i * out + o) * kernel[0] + ky) * kernel[1] + kx)] *
                        x.values[static_cast<std::size_t>(((n * in + i) * height + h) * width + w)];
                  }
                }
              }
              expected.push_back(sum);
            }
          }
        }
      }
      CHECK(y.values == expected);
    }
  }
}

TEST_CASE("a leaky ReLU scales what is negative", "[paper_networks]") {
  Safetensors file;
  file.metadata["chain"] = R"({"type":"leaky_relu","negative_slope":0.25})";
  const Tensor<double> x{{1, 4}, {-2, 0, 3, -0.5}};
  CHECK(Network<double>(file, parse_graph(file))(x).values ==
        std::vector<double>{-0.5, 0, 3, -0.125});
}

TEST_CASE("malformed layers and names are refused by their place", "[paper_networks]") {
  using Catch::Contains;
  const auto refused = [](const std::string& chain, const std::vector<Index>& weight,
                          const std::vector<Index>& bias) {
    Safetensors file;
    const auto add = [&](const std::string& name, const std::vector<Index>& shape) {
      Index count = 1;
      for (const Index extent : shape) count *= extent;
      file.add(name, shape, std::vector<float>(static_cast<std::size_t>(count)));
    };
    add("up.weight", weight);
    add("up.bias", bias);
    file.metadata["chain"] = chain;
    try {
      static_cast<void>(Network<float>(file, parse_graph(file)));
    } catch (const concertina::Error& error) {
      return std::string(error.what());
    }
    return std::string("accepted");
  };
  const std::string up = R"({"type":"conv_transpose","name":"up","stride":2})";
  CHECK(refused(up, {3, 2, 2, 2}, {2}) == "accepted");
  CHECK_THAT(refused(up, {3, 0, 2, 2}, {0}), Contains("[3, 0, 2, 2]"));
  CHECK_THAT(refused(up, {3, 2, 2}, {2}), Contains("[3, 2, 2]"));
  CHECK_THAT(refused(up, {3, 2, 2, 2}, {1, 2}), Contains("bias of [1, 2]"));
  CHECK_THAT(refused(R"({"type":"conv_transpose","name":"up","padding":1})", {3, 2, 2, 2}, {2}),
             Contains("padding"));
  CHECK_THAT(refused(R"({"type":"leaky_relu"})", {1}, {1}), Contains("negative_slope"));
  CHECK_THAT(refused(R"({"type":"leaky_relu","negative_slope":1e300})", {1}, {1}),
             Contains("negative_slope"));
  CHECK_THAT(refused(R"({"kind":"chain","name":"","layers":[]})", {1}, {1}), Contains(".name"));
  CHECK_THAT(refused(R"({"kind":"chain","name":"a","expected":"b","layers":[]})", {1}, {1}),
             Contains(".name"));
  CHECK_THAT(refused(R"({"kind":"sum","name":"a","branches":[]})", {1}, {1}), Contains("name"));
}
