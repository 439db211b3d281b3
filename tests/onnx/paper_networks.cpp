// The networks of the paper: what they cost to the last digit, how they expand and contract, and
// what is refused.
// SPDX-License-Identifier: Apache-2.0
#include "networks/paper_networks.hpp"

#include "maximum.hpp"
#include "networks/expansion.hpp"
#include "onnx/builder.hpp"
#include "onnx/compare_models.hpp"
#include "onnx/contract_model.hpp"
#include "onnx/evaluate.hpp"
#include "text.hpp"

#include <concertina/random.hpp>

#include <catch2/catch.hpp>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <map>
#include <random>
#include <string>
#include <utility>
#include <variant>
#include <vector>

using namespace tool;

namespace {

Cost cost(const std::string& name, const std::string& strategy = "", bool stride_last = true) {
  const Architecture network = paper_network(name);
  if (strategy.empty()) return total(layer_costs(network));
  return total(layer_costs(expanded(
      network, {.strategy = strategy, .stride_last = stride_last && strategy.starts_with("cl")})));
}

std::map<std::string, Dims> shapes(const onnx::Model& model) {
  std::map<std::string, Dims> result;
  for (const onnx::Tensor& tensor : model.initializers) result[tensor.name] = tensor.dims;
  return result;
}

std::map<std::string, std::string> types(const onnx::Model& model) {
  std::map<std::string, std::string> result;
  for (const onnx::Node& node : model.nodes) result[node.name] = node.op_type;
  return result;
}

/// Every kind of layer and connection, on a map of odd extents.
Architecture small_network() {
  using Shape = concertina::ConvShape<2>;
  Builder net("small", onnx::DataType::float32, {unknown, 2, 9, 11});
  net.conv("conv1", Shape{.out = 4, .kernel_size = 5, .stride = 2, .padding = 2, .bias = true})
      .batch_norm("norm")
      .leaky_relu(0.25F);
  Builder inner = net.branch();
  inner.conv("depthwise", Shape{.out = 4, .kernel_size = 3, .padding = 1, .groups = 4}).relu6();
  net.sum({net.branch(), inner});
  Builder below = net.branch(), beside = net.branch();
  below.max_pool({3, 3}, {2, 2}, {1, 1}).conv_transpose("up", 3, 2).channel_slice(1, 3);
  const auto padding = concertina::Padding<2>::sides({1, 0}, 0);
  beside.avg_pool({1, 1}, {1, 1}, {0, 0})
      .conv("side", Shape{.out = 2, .kernel_size = 1, .padding = padding});
  net.concat({below, beside}).channel_shuffle(2).relu();
  net.flatten().linear("fc1", 6).relu().linear("fc2", 3);
  return {.name = "small", .title = "Small", .model = net.finish()};
}

/// Of one random image, in double.
Array<double> output(const onnx::Model& model) {
  Dims dims = {1};
  for (const onnx::Dimension& extent : *model.inputs.front().shape) {
    if (extent.value) dims.push_back(*extent.value);
  }
  Index count = 1;
  for (const Index extent : dims) count *= extent;
  std::mt19937_64 generator(1);
  Array<double> input{{dims.begin(), dims.end()}, {}};
  for (Index i = 0; i < count; ++i) {
    input.values.push_back(concertina::random_uniform(generator, 1));
  }
  return std::get<Array<double>>(Evaluator(model, true)({{"input", input}}).at("output"));
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
  for (const LayerCost& layer : layer_costs(small_network())) found[layer.name] = layer.cost;
  CHECK(found["conv1"] == Cost{4 * (2 * 25 + 1), 4 * (2 * 25 + 1) * 5 * 6});
  CHECK(found["norm"] == Cost{8, 2 * 4 * 5 * 6});
  CHECK(found["leakyrelu"] == Cost{0, 4 * 5 * 6});
  CHECK(found["depthwise"] == Cost{4 * 9, 4 * 9 * 5 * 6});
  CHECK(found["relu6"] == Cost{0, 4 * 5 * 6});
  CHECK(found["add"] == Cost{});
  CHECK(found["max_pool"] == Cost{0, 4 * 5 * 6});  // reads 5x6, writes 3x3
  CHECK(found["up"] == Cost{4 * 3 * 4, 4 * 3 * 4 * 3 * 3});
  CHECK(found["slice"] == Cost{});
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
      CHECK(layer_costs(wide).back().output == layer_costs(compact).back().output);
    }
  }
}

TEST_CASE("a network with random elements is complete and reproducible", "[paper_networks]") {
  const auto bytes = [](std::uint64_t seed) {
    return onnx::serialize_model(initialized(small_network(), seed));
  };
  const onnx::Model small = onnx::parse_model(bytes(7));
  CHECK(small.inputs.size() == 1);
  CHECK(output(small).shape == std::vector<Index>{1, 3});
  CHECK(bytes(7) == bytes(7));
  CHECK(bytes(7) != bytes(8));
  CHECK(types(small).at("up") == "ConvTranspose");
  for (const char* name : {"smallnet3", "mobilenetv2", "shufflenetv2"}) {
    const Architecture network = paper_network(name);
    Index trained = 0;
    for (const onnx::Tensor& tensor : initialized(network, 1).initializers) {
      const bool statistic = tensor.name.find("running_") != std::string::npos;
      const bool layer = tensor.name.ends_with(".weight") || tensor.name.ends_with(".bias");
      CHECK((layer || statistic || tensor.numel() <= 5));  // bounds, shapes
      trained += layer ? tensor.numel() : 0;
    }
    CHECK(trained == total(layer_costs(network)).parameters);
  }
}

TEST_CASE("elements are within PyTorch's bounds", "[paper_networks]") {
  const onnx::Model model = initialized(small_network(), 1);
  const auto extremes = [&](const std::string& name) {
    const auto tensor = std::ranges::find(model.initializers, name, &onnx::Tensor::name);
    const auto [least, most] = std::ranges::minmax(tensor->values<float>());
    return std::pair<double, double>{least, most};
  };
  for (const auto& [name, fan_in] : std::map<std::string, Index>{{"conv1.weight", 50},
                                                                 {"conv1.bias", 50},
                                                                 {"depthwise.weight", 9},
                                                                 {"up.weight", 4},
                                                                 {"fc1.weight", 144}}) {
    INFO(name);
    const double bound = 1 / std::sqrt(static_cast<double>(fan_in));
    const auto [least, most] = extremes(name);
    CHECK(least >= -bound);
    CHECK(least < 0);
    CHECK(most <= bound);
    CHECK(most > 0);
  }
  CHECK(extremes("norm.running_var").first >= 0.1);
}

TEST_CASE("the description of an ImageNet network is the published code's", "[paper_networks]") {
  const char* const reference = std::getenv("CONCERTINA_REFERENCE");
  if (!reference || !*reference) {
    WARN("skipped: CONCERTINA_REFERENCE is empty");
    return;
  }
  for (const auto& [name, path] : std::map<std::string, std::string>{
           {"mobilenet", "mobilenetv1"}, {"mobilenetv2", "mobilenetv2"}}) {
    const onnx::Model published = onnx::read_model(std::filesystem::path(reference) / "imagenet" /
                                                   (path + "-expand") / "model.onnx");
    const auto layers = [](const onnx::Model& model) {
      std::vector<Dims> found;
      for (const auto& [tensor, dims] : shapes(model)) {
        if (dims.size() > 1 || tensor.ends_with("weight")) found.push_back(dims);
      }
      std::ranges::sort(found);
      return found;
    };
    CHECK(layers(initialized(expanded(paper_network(name), {.strategy = "cl"}), 1)) ==
          layers(published));
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
    // A large kernel of three channels may be cheaper as two layers.
    const ModelOptions options{.when = strategy == "ck+fc" ? When::always : When::smaller};
    const onnx::Model wide = initialized(expanded(compact, {.strategy = strategy}), 3);
    const onnx::Model contracted = contract_model(wide, options).model;
    const auto layers = [](const onnx::Model& model) {
      std::map<std::string, Dims> dims = shapes(model);
      std::vector<std::vector<Dims>> found;
      for (const onnx::Node& node : model.nodes) {
        found.emplace_back();
        for (const std::string& input : node.inputs) found.back().push_back(dims[input]);
      }
      return found;
    };
    CHECK(layers(contracted) == layers(contract_model(initialized(compact, 1), options).model));
    CHECK(compare_models(wide, contracted).proved());
    const Array<double> right = output(wide), found = output(contracted);
    if (strategy == "cl") {  // where the stride stands changes nothing
      const onnx::Model paper =
          initialized(expanded(compact, {.strategy = "cl", .stride_last = true}), 3);
      CHECK(shapes(paper) == shapes(wide));
      CHECK((onnx::serialize_model(paper) == onnx::serialize_model(wide)) == (name == "smallnet3"));
      CHECK(output(contract_model(paper, options).model) == found);
    }
    double largest = 0, difference = 0;
    for (std::size_t i = 0; i < right.values.size(); ++i) {
      largest = std::max(largest, std::abs(right.values[i]));
      difference =
          concertina::test::maximum(difference, std::abs(right.values[i] - found.values.at(i)));
    }
    // Kernels are rounded to float once; activations in between neither grow nor shrink by much.
    CHECK(difference <= 1e-5 * largest);
  }
}

TEST_CASE("recipes say which layers an expansion has", "[paper_networks]") {
  const auto convolutions = [](const Architecture& network) {
    std::map<std::string, concertina::ConvShape<2>> layers;
    const Graph graph(network.model, {});
    for (int node = 0; node < static_cast<int>(network.model.nodes.size()); ++node) {
      if (graph.node(node).op_type == "Conv") {
        layers[graph.node(node).name] = conv_shape(graph, node);
      }
    }
    return layers;
  };
  auto layers = convolutions(expanded(paper_network("alexnet128"), {.strategy = "ck"}));
  REQUIRE(layers.contains("conv1.4"));
  CHECK_FALSE(layers.contains("conv1.5"));
  CHECK(layers.at("conv1.4").stride == concertina::PerAxis<2>(4));
  CHECK(layers.contains("conv2.1"));
  CHECK_FALSE(layers.contains("conv2.2"));
  CHECK(layers.contains("conv3"));

  Architecture biased = small_network();
  biased.recipes = {{.strategy = "cl", .layers = {"depthwise"}, .inner_bias = true}};
  const Architecture wide = expanded(biased, {.strategy = "cl"});
  layers = convolutions(wide);
  CHECK(layers.at("depthwise.0").bias);
  CHECK(layers.at("depthwise.1").bias);
  CHECK_FALSE(layers.at("depthwise.2").bias);
  CHECK(compare_models(initialized(wide, 1), contract_model(initialized(wide, 1), {}).model)
            .proved());
}

TEST_CASE("a network of its own expands where a strategy applies", "[paper_networks]") {
  const Architecture wide = expanded(small_network(), {.strategy = "ck+fc", .rate = 2});
  const auto all = shapes(initialized(wide, 1));
  CHECK(all.contains("conv1.1.weight"));
  CHECK(all.contains("depthwise.weight"));
  CHECK(all.at("fc1.0.weight") == Dims{288, 144});
  CHECK(all.contains("fc2.2.bias"));
  const auto one = shapes(
      initialized(expanded(small_network(), {.strategy = "cl", .layers = {"depthwise"}}), 1));
  CHECK(one.at("depthwise.1.weight") == Dims{16, 4, 3, 3});
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
