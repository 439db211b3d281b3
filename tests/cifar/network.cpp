// The CIFAR networks: their parameters, what is computed three ways, files, contraction.
// SPDX-License-Identifier: Apache-2.0
#include "cifar/network.hpp"

#include "maximum.hpp"
#include "onnx/contract_model.hpp"
#include "onnx/evaluate.hpp"
#include "support.hpp"

#include <catch2/catch.hpp>

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <limits>
#include <map>
#include <string>
#include <vector>

namespace cifar {
namespace {

using Catch::Matchers::Contains;
using concertina::test::message_of;

/// Images and labels that depend on their number alone.
template <class Scalar>
void fill(Network<Scalar>& network, Index images) {
  std::vector<std::uint8_t> labels;
  for (Index image = 0; image < images; ++image) {
    labels.push_back(static_cast<std::uint8_t>(image * 7 % network.options().classes));
  }
  network.loss().set_labels(labels);
  network.set_source([images](Index chunk, Scalar* to) {
    concertina::test::Rng rng(static_cast<std::uint64_t>(chunk));
    for (Index i = 0; i < 3 * 32 * 32; ++i) {
      for (int lane = 0; lane < lanes; ++lane) {
        const double number = concertina::random_uniform(rng, 2.0);
        *to++ = chunk * lanes + lane < images ? static_cast<Scalar>(number) : Scalar(0);
      }
    }
  });
}

template <class Scalar>
std::map<std::string, std::vector<double>> gradients(Network<Scalar>& network) {
  std::map<std::string, std::vector<double>> result;
  for (const Tensor<Scalar>* tensor : network.parameters()) {
    result[tensor->name] = {tensor->gradient.begin(), tensor->gradient.end()};
  }
  return result;
}

template <class Scalar>
std::map<std::string, std::vector<double>> gradients_of(NetworkOptions options, Compute compute,
                                                        Index images) {
  ThreadPool pool(2);
  options.compute = compute;
  Network<Scalar> network(options, images, pool);
  network.initialize(3);
  fill(network, images);
  network.tape().forward(images, true);
  network.tape().backward();
  return gradients(network);
}

double largest(const std::vector<double>& numbers) {
  double most = 0;
  for (const double number : numbers) most = std::max(most, std::abs(number));
  return most;
}

TEST_CASE("networks have the published numbers of parameters", "[cifar]") {
  const auto count = [](const std::string& model, Index kernel, Index blocks = 3) {
    ThreadPool pool(1);
    const NetworkOptions options{.model = model, .kernel = kernel, .blocks = blocks};
    return Network<float>(options, 1, pool).parameter_count();
  };
  CHECK(count("compact", 7) == 66'186);
  CHECK(count("cl", 7) == 547'102);
  CHECK(count("cl+fc", 7) == 2'105'886);
  CHECK(count("ck", 7) == 186'982);
  CHECK(count("ck+fc", 7) == 1'745'766);
  CHECK(count("compact", 3) == 15'050);
  // By hand: three branches without bias and their norms in the place of each convolution.
  const Index norms = 2 * (8 + 16 + 32);
  CHECK(count("acnet", 3) ==
        15'050 - (216 + 8 + 1152 + 16 + 4608 + 32) + 15 * (24 + 128 + 512) + 2 * norms);
  // The deeper one: 64 channels more, and 64 * 2 * 2 numbers after the last pool.
  CHECK(count("compact", 5, 4) == (75 + 1) * 8 + (200 + 1) * 16 + (400 + 1) * 32 + (800 + 1) * 64 +
                                      2 * (8 + 16 + 32 + 64) + (256 + 1) * 64 + (64 + 1) * 10);
}

TEST_CASE("ResNet-18 has the layers and the names of torchvision's, for CIFAR", "[cifar]") {
  ThreadPool pool(1);
  Network<float> network({.model = "resnet18"}, 1, pool);
  CHECK(network.parameter_count() == 11'173'962);  // as everybody's with a 3x3 stem and 10 classes
  CHECK(network.features().numbers() == 512);
  auto file = network.save();
  CHECK(file.tensor("layer3.0.downsample.0.weight").shape == std::vector<Index>{256, 128, 1, 1});
  CHECK(file.tensor("layer4.1.bn2.running_var").shape == std::vector<Index>{512});
  CHECK(file.tensor("fc.weight").shape == std::vector<Index>{10, 512});
  CHECK(file.tensors.size() == 20 * 5 + 20 + 2 - 20);  // convolutions, norms of four; fc
  // A file of torchvision has no metadata, and a tensor more for each norm.
  file.metadata.clear();
  file.add("bn1.num_batches_tracked", {}, std::vector<std::int64_t>{3});
  CHECK(options_of(file) == network.options());
  network.load(file);
  file.tensors.erase("fc.weight");
  CHECK_THROWS_AS(options_of(file), concertina::FormatError);
  CHECK_THAT(message_of<concertina::Error>([&] { network.contract(); }), Contains("resnet18"));
}

TEST_CASE("ResNet-18's gradients are those of its loss", "[cifar]") {
  ThreadPool pool(2);
  constexpr Index images = 3;
  Network<double> network({.model = "resnet18", .width = 2}, images, pool);
  network.initialize(3, true);
  fill(network, images);
  const auto loss = [&] {
    network.tape().tensors_changed();
    network.tape().forward(images, true);
    return network.loss().loss();
  };
  loss();
  network.tape().backward();
  const auto found = gradients(network);
  for (Tensor<double>* tensor : network.parameters()) {
    INFO(tensor->name);
    const auto& gradient = found.at(tensor->name);
    const std::size_t i = gradient.size() / 2;
    const double start = tensor->value[i], step = 1e-6;
    tensor->value[i] = start + step;
    const double above = loss();
    tensor->value[i] = start - step;
    const double below = loss();
    tensor->value[i] = start;
    // A ReLU that changes sides within the step costs some of it; few do.
    CHECK(gradient[i] == Approx((above - below) / (2 * step)).epsilon(1e-3).margin(1e-6));
  }
}

TEST_CASE("every model computes at every kernel, in both depths", "[cifar]") {
  ThreadPool pool(2);
  for (const std::string& model : model_names()) {
    for (const Index blocks : {3, 4}) {
      for (const Index kernel : {3, 5, 7, 9}) {
        if (model.starts_with("ck") && kernel == 3) continue;
        INFO(model << ", kernel " << kernel << ", " << blocks << " blocks");
        const NetworkOptions options{.model = model,
                                     .kernel = kernel,
                                     .rate = 2,
                                     .blocks = blocks,
                                     .width = 3,
                                     .classes = 100};
        Network<float> network(options, 2, pool);
        network.initialize(1);
        fill(network, 2);
        network.tape().forward(2, true);
        network.tape().backward();
        CHECK(network.loss().loss() > 1);
        CHECK(network.loss().loss() < 20);
        CHECK(network.logits().numbers() == 100);
        for (const Tensor<float>* tensor : network.parameters()) {
          INFO(tensor->name);
          CHECK(tensor->gradient.size() == tensor->value.size());
        }
      }
    }
  }
}

TEST_CASE("contracted and layered networks have the same gradients", "[cifar]") {
  // In double the two differ by rounding only: 1e-9 is 2^22 ulps of the largest number, and the
  // longest sums here have 2^18 terms. In float, 1e-4 of the largest is what is promised.
  for (const std::string model : {"cl", "cl+fc", "ck", "ck+fc", "fc"}) {
    const NetworkOptions options{.model = model, .kernel = 7, .rate = 2};
    INFO(model);
    const auto contracted = gradients_of<double>(options, Compute::contracted, 17);
    const auto layered = gradients_of<double>(options, Compute::layered, 17);
    const auto in_float = gradients_of<float>(options, Compute::contracted, 17);
    const auto in_float_layered = gradients_of<float>(options, Compute::layered, 17);
    REQUIRE(contracted.size() == layered.size());
    double scale = 0;
    for (const auto& [name, expected] : layered) scale = std::max(scale, largest(expected));
    for (const auto& [name, expected] : layered) {
      INFO(name);
      const auto& given = contracted.at(name);
      const auto &single = in_float.at(name), &single_layered = in_float_layered.at(name);
      REQUIRE(given.size() == expected.size());
      double difference = 0, difference_in_float = 0;
      for (std::size_t i = 0; i < expected.size(); ++i) {
        difference = concertina::test::maximum(difference, std::abs(given[i] - expected[i]));
        difference_in_float =
            concertina::test::maximum(difference_in_float, std::abs(single[i] - single_layered[i]));
      }
      // A bias before a batch norm has a gradient of zero, so only rounding is left of it.
      const bool before_norm = name.starts_with("conv") && name.ends_with(".bias");
      CHECK(difference <= 1e-9 * (before_norm ? scale : largest(expected)));
      CHECK(difference_in_float <= 1e-4 * (before_norm ? scale : largest(expected)));
    }
  }
}

TEST_CASE("the nonlinear counterpart has ReLUs and the same tensors", "[cifar]") {
  const NetworkOptions options{.model = "ck+fc", .kernel = 7, .rate = 2};
  const auto linear = gradients_of<double>(options, Compute::layered, 3);
  const auto nonlinear = gradients_of<double>(options, Compute::nonlinear, 3);
  REQUIRE(linear.size() == nonlinear.size());
  bool differ = false;
  for (const auto& [name, gradient] : linear) {
    REQUIRE(nonlinear.contains(name));
    differ = differ || nonlinear.at(name) != gradient;
  }
  CHECK(differ);
  ThreadPool pool(1);
  NetworkOptions given = options;
  given.compute = Compute::nonlinear;
  const Network<float> network(given, 1, pool);
  CHECK_THAT(message_of<concertina::Error>([&] { static_cast<void>(network.contract()); }),
             Contains("contracts to nothing smaller"));
}

TEST_CASE("results do not depend on the number of threads, to the bit", "[cifar]") {
  const auto outcome = [](const std::string& model, Index threads) {
    ThreadPool pool(threads);
    Network<float> network({.model = model, .kernel = 3}, 40, pool);
    network.initialize(5);
    fill(network, 40);
    network.tape().forward(40, true);
    network.tape().backward();
    return std::pair(network.loss().loss(), gradients(network));
  };
  for (const char* model : {"cl+fc", "cl+norms"}) {
    const auto alone = outcome(model, 1);
    for (const Index threads : {2, 3, 5}) CHECK(outcome(model, threads) == alone);
  }
}

TEST_CASE("a contracted network is the compact one, also in inference", "[cifar]") {
  ThreadPool pool(2);
  constexpr Index images = 5;
  for (const std::string model : {"cl", "cl+fc", "ck", "ck+fc", "fc", "acnet", "repvgg",
                                  "mobileone", "dbb", "cl+norms", "compact"}) {
    for (const Index kernel : {3, 7}) {
      if (model.starts_with("ck") && kernel == 3) continue;
      INFO(model << ", kernel " << kernel);
      Network<double> network({.model = model, .kernel = kernel, .rate = 2}, images, pool);
      network.initialize(7);
      fill(network, images);
      network.tape().forward(images, true);  // moves the running statistics
      network.tape().forward(images, false);
      const auto contracted = network.contract();
      CHECK(std::ranges::count(contracted.nodes, "Conv", &concertina::onnx::Node::op_type) == 3);
      const auto file = tensors_of(contracted);
      CHECK(options_of(file).model == "compact");
      Network<double> compact(options_of(file), images, pool);
      compact.load(file);
      fill(compact, images);
      compact.tape().forward(images, false);
      const double* expected = network.logits().values(0);
      const double* given = compact.logits().values(0);
      for (Index i = 0; i < 10 * lanes; ++i) {
        if (i % lanes >= images) continue;
        // Some thousand operations of rounding 2^-53 on logits of order one.
        CHECK(std::abs(given[i] - expected[i]) < 1e-11);
      }
    }
  }
}

TEST_CASE("a saved network is the same network", "[cifar]") {
  ThreadPool pool(1);
  const NetworkOptions options{.model = "cl+fc", .kernel = 3, .rate = 3, .classes = 100};
  Network<float> network(options, 4, pool);
  network.initialize(9);
  const auto file = network.save();
  CHECK(options_of(file) == options);
  Network<float> other(options_of(file), 4, pool);
  other.initialize(10);
  CHECK(other.save() != file);
  other.load(file);
  CHECK(other.save() == file);
}

/// The map [image][number] in lanes.
template <class Scalar>
std::vector<double> by_image(Maps<Scalar>& maps, Index images) {
  std::vector<double> result;
  for (Index image = 0; image < images; ++image) {
    for (Index i = 0; i < maps.numbers(); ++i) {
      result.push_back(static_cast<double>(maps.values(image / lanes)[i * lanes + image % lanes]));
    }
  }
  return result;
}

/// How far a network's logits are from those of its model, from the same images.
template <class Scalar>
double deviation(const NetworkOptions& options, bool normalised) {
  constexpr Index images = 3, pixels = 3 * 32 * 32;
  ThreadPool pool(2);
  Network<Scalar> network(options, images, pool);
  network.initialize(7, true);
  const Normalization normalization{{0.25, 0.5, 0.75}, {0.2, 0.3, 0.4}};
  if (normalised) network.set_normalization(normalization);
  tool::Array<std::int64_t> bytes{{images, 3, 32, 32}, {}};
  tool::Array<Scalar> numbers{bytes.shape, {}};
  for (Index i = 0; i < images * pixels; ++i) {
    bytes.values.push_back(i * i % 251);
    const auto colour = static_cast<std::size_t>(i % pixels / 1024);
    const double pixel = static_cast<double>(bytes.values.back()) / 255;
    numbers.values.push_back(static_cast<Scalar>((pixel - normalization.mean[colour]) /
                                                 normalization.deviation[colour]));
  }
  network.loss().set_labels(std::vector<std::uint8_t>(images));
  network.set_source([&](Index, Scalar* to) {
    for (Index i = 0; i < pixels * lanes; ++i) {
      const Index image = i % lanes;
      to[i] = image < images ? numbers.values[static_cast<std::size_t>(image * pixels + i / lanes)]
                             : Scalar(0);
    }
  });
  network.tape().forward(images, true);  // moves the running statistics
  network.tape().forward(images, false);
  const auto model =
      concertina::onnx::parse_model(concertina::onnx::serialize_model(network.model()));
  CHECK(tensors_of(model).metadata == network.save().metadata);
  for (const auto& [name, tensor] : network.save().tensors) {
    INFO(name);
    CHECK(tensors_of(model).tensors.at(name) == tensor);
  }
  const tool::Value input = normalised ? tool::Value(bytes) : tool::Value(numbers);
  const auto outputs = tool::Evaluator(model)({{"input", input}});
  const auto& logits = std::get<tool::Array<Scalar>>(outputs.at("output"));
  CHECK(logits.shape == std::vector<std::int64_t>{images, options.classes});
  const auto expected = by_image(network.logits(), images);
  double difference = 0;
  for (std::size_t i = 0; i < expected.size(); ++i) {
    const double given = static_cast<double>(logits.values.at(i));
    difference = concertina::test::maximum(difference, std::abs(given - expected[i]));
  }
  return difference;
}

TEST_CASE("a network's model gives its logits", "[cifar]") {
  for (const std::string& name : model_names()) {
    for (const Compute compute : {Compute::automatic, Compute::contracted, Compute::nonlinear}) {
      for (const Index kernel : {3, 5}) {
        const NetworkOptions options{
            .model = name, .kernel = kernel, .rate = 2, .width = 3, .compute = compute};
        if (name.starts_with("ck") && kernel == 3) continue;
        if (compute == Compute::nonlinear && !options.is_expanded()) continue;
        INFO(name << ", kernel " << kernel << ", " << compute_names.of(compute));
        // Some thousand operations of rounding 2^-53 on logits of order one, and the eps.
        CHECK(deviation<double>(options, false) < 1e-11);
        CHECK(deviation<double>(options, true) < 1e-11);
        CHECK(deviation<float>(options, true) < 1e-3);
      }
    }
  }
}

TEST_CASE("auto contracts the expansions for which that is cheaper at the batch", "[cifar]") {
  ThreadPool pool(1);
  const auto network = [&](Index batch) {
    auto made = std::make_unique<Network<double>>(
        NetworkOptions{.model = "cl+fc", .kernel = 3, .rate = 4, .compute = Compute::automatic},
        batch, pool);
    made->initialize(7);
    return made;
  };
  using Names = std::vector<std::string>;
  // fc1's chain 128-512-256-64 has 213,000 multiply-adds an image, its contraction 42 million.
  const auto one = network(1), few = network(16), many = network(300);
  CHECK(few->contracted() == Names{"conv1", "conv2", "conv3"});
  CHECK(few->layered() == Names{"fc1"});
  CHECK(few->options().compute == Compute::automatic);
  CHECK(many->contracted() == Names{"conv1", "conv2", "conv3", "fc1"});
  CHECK(many->options().compute == Compute::contracted);
  CHECK(one->contracted() == Names{"conv1", "conv2"});
  const Network<double> compact({.compute = Compute::automatic}, 1, pool);
  CHECK(compact.options().compute == Compute::contracted);

  for (Network<double>* each : {one.get(), few.get(), many.get()}) fill(*each, 1);
  for (Network<double>* each : {one.get(), few.get(), many.get()}) each->tape().forward(1, false);
  const auto expected = by_image(one->logits(), 1);
  for (Network<double>* each : {few.get(), many.get()}) {
    const auto logits = by_image(each->logits(), 1);
    for (std::size_t i = 0; i < logits.size(); ++i) {
      CHECK(std::abs(logits[i] - expected[i]) < 1e-12);
    }
  }
}

TEST_CASE("models of a network and of what it contracts to contract alike", "[cifar]") {
  ThreadPool pool(1);
  for (const auto& [model, kernel] :
       {std::pair("cl+fc", 3), std::pair("ck", 5), std::pair("acnet", 3), std::pair("acnet", 5),
        std::pair("repvgg", 3), std::pair("mobileone", 5), std::pair("dbb", 3), std::pair("dbb", 5),
        std::pair("cl+norms", 3)}) {
    INFO(model << ", kernel " << kernel);
    Network<float> network({.model = model, .kernel = kernel, .rate = 2}, 4, pool);
    network.initialize(7);
    network.set_normalization({{0.25, 0.5, 0.75}, {0.2, 0.3, 0.4}});
    fill(network, 4);
    network.tape().forward(4, true);  // moves the running statistics, and so the biases from zero
    const auto nodes = [](const concertina::onnx::Model& from) {
      return tool::contract_model(from, {}).model.nodes.size();
    };
    CHECK(nodes(network.model()) == nodes(network.contract()));
  }
}

TEST_CASE("networks are read from models and from safetensors", "[cifar]") {
  const auto path =
      std::filesystem::temp_directory_path() / ("cifar_network_" + std::to_string(getpid()));
  const auto model_path = path.string() + ".onnx", file_path = path.string() + ".safetensors";
  ThreadPool pool(1);
  Network<double> network({.model = "cl", .kernel = 3, .rate = 2}, 1, pool);
  network.initialize(7);
  auto model = network.model();
  const std::vector<std::uint16_t> half(32);
  model.initializers.push_back(concertina::onnx::Tensor::of<std::uint16_t>("other", {32}, half));
  concertina::onnx::write_model(model_path, model);
  concertina::io::write_safetensors(file_path, network.save());
  auto file = read_network(model_path);
  CHECK(file.origin == model_path);
  CHECK_THAT(message_of<concertina::FormatError>([&] { file.view<double>("other"); }),
             Contains("other") && Contains("uint16"));
  CHECK(file.tensors.erase("other") == 1);
  CHECK(file == read_network(file_path));
  Network<float> single(network.options(), 1, pool);
  CHECK_THAT(message_of<concertina::FormatError>([&] { single.load(file); }),
             Contains(model_path) && Contains("conv1.0.weight") && Contains("F64"));
  std::filesystem::remove(file_path);
  CHECK_THROWS_AS(read_network(file_path), concertina::IoError);
  std::filesystem::rename(model_path, file_path);
  CHECK_THROWS_AS(read_network(file_path), concertina::FormatError);
  std::filesystem::remove(file_path);
}

TEST_CASE("batch norms start as the identity, or with weights in 0 to 1", "[cifar]") {
  ThreadPool pool(1);
  Network<double> network({.model = "cl", .kernel = 3}, 1, pool);
  network.initialize(1, true);
  const auto uniform = network.save();
  network.initialize(1);
  const auto ones = network.save();
  for (const auto& [name, tensor] : ones.tensors) {
    INFO(name);
    if (!name.ends_with("_bn.weight")) {
      CHECK(uniform.tensors.at(name) == tensor);
      continue;
    }
    for (const double number : ones.values<double>(name)) CHECK(number == 1);
    for (const double number : uniform.values<double>(name)) CHECK((number >= 0 && number < 1));
    const auto numbers = uniform.values<double>(name);
    CHECK(*std::ranges::max_element(numbers) - *std::ranges::min_element(numbers) > 0.3);
  }
}

TEST_CASE("files that are not the network's are refused, and change nothing", "[cifar]") {
  ThreadPool pool(1);
  Network<float> network({.model = "compact", .kernel = 3}, 1, pool);
  network.initialize(1);
  const auto before = network.save();
  auto file = before;
  file.origin = "some.safetensors";
  const auto refused = [&] {
    return message_of<concertina::FormatError>([&] { network.load(file); });
  };
  file.tensors.erase("fc2.bias");
  CHECK_THAT(refused(), Contains("some.safetensors") && Contains("fc2.bias"));
  file = before;
  file.tensors.erase("conv2.weight");
  file.add("conv2.weight", {16, 8, 3, 1}, std::vector<float>(16 * 8 * 3));
  CHECK_THAT(refused(), Contains("conv2.weight") && Contains("16x8x3x1") && Contains("16x8x3x3"));
  file = before;
  file.tensors.erase("fc1.bias");
  file.add("fc1.bias", {64}, std::vector<double>(64));
  CHECK_THAT(refused(), Contains("fc1.bias"));
  CHECK(network.save() == before);

  file = before;
  file.metadata.erase("network");
  CHECK_THAT(message_of<concertina::FormatError>([&] { options_of(file); }),
             Contains("no metadata 'network'"));
  for (const std::string text : {"", "[]", "{}", "{\"model\":3}", "null"}) {
    file.metadata["network"] = text;
    CHECK_THROWS_AS(options_of(file), concertina::FormatError);
  }
}

TEST_CASE("numbers of a file that are none are refused", "[cifar]") {
  ThreadPool pool(1);
  Network<double> network({.model = "compact", .kernel = 3}, 1, pool);
  network.initialize(1);
  const auto path =
      std::filesystem::temp_directory_path() / ("cifar_network_" + std::to_string(getpid()));
  const auto refused = [&](const std::string& name, double number, const char* extension) {
    auto file = network.save();
    const auto shape = file.tensor(name).shape;
    auto values = file.values<double>(name);
    values.back() = number;
    file.tensors.erase(name);
    file.add(name, shape, values);
    const std::filesystem::path written = path.string() + extension;
    if (extension == std::string(".onnx")) {
      Network<double> other(network.options(), 1, pool);
      other.load(file);
      concertina::onnx::write_model(written, other.model());
    } else {
      concertina::io::write_safetensors(written, file);
    }
    const std::string message = message_of<concertina::FormatError>([&] { read_network(written); });
    std::filesystem::remove(written);
    return message;
  };
  for (const char* extension : {".onnx", ".safetensors"}) {
    for (const double number : {std::nan(""), HUGE_VAL, -HUGE_VAL}) {
      CHECK_THAT(refused("conv1.weight", number, extension), Contains("'conv1.weight' has "));
      CHECK_THAT(refused("fc2.bias", number, extension),
                 Contains("as element 9; elements must be finite"));
    }
    CHECK_THAT(refused("conv2_bn.running_var", -1, extension),
               Contains("variances must be finite"));
  }
}

TEST_CASE("a file's network takes no more memory than its tensors", "[cifar]") {
  ThreadPool pool(1);
  concertina::io::Safetensors file{.origin = "some.safetensors", .metadata = {}, .tensors = {}};
  for (const char* huge :
       {R"({"model":"ck+fc","kernel":31,"rate":64,"blocks":4,"classes":10,"norms":true,
            "compute":"contracted"})",
        R"({"model":"resnet18","kernel":7,"rate":4,"blocks":3,"width":256,"classes":10,
            "norms":true,"compute":"contracted"})"}) {
    file.metadata["network"] = huge;
    CHECK_THAT(message_of<concertina::FormatError>([&] { Network<float>(file, 128, pool); }),
               Contains("some.safetensors") && Contains("weight"));
  }
  file.metadata["network"] = R"({"model":"compact","kernel":3.7,"rate":4,"blocks":3,"classes":10,
                                 "norms":true,"compute":"contracted"})";
  CHECK_THAT(message_of<concertina::FormatError>([&] { options_of(file); }),
             Contains("kernel is 3.7, expected a whole number"));
}

TEST_CASE("impossible networks are refused with the choices", "[cifar]") {
  const auto refused = [](NetworkOptions options) {
    ThreadPool pool(1);
    return message_of<concertina::Error>([&] { Network<float>(options, 1, pool); });
  };
  CHECK_THAT(refused({.model = "resnet"}), Contains("resnet") && Contains("cl+fc"));
  CHECK_THAT(refused({.kernel = 4}), Contains("kernel 4"));
  CHECK_THAT(refused({.rate = 0}), Contains("rate"));
  CHECK_THAT(refused({.rate = std::numeric_limits<double>::quiet_NaN()}), Contains("rate"));
  CHECK_THAT(refused({.blocks = 5}), Contains("blocks 5"));
  CHECK_THAT(refused({.model = "resnet18", .width = 0}), Contains("width 0"));
  CHECK_THAT(refused({.classes = 1}), Contains("classes 1"));
  CHECK_THAT(refused({.model = "ck", .kernel = 3}), Contains("CL"));
  CHECK_THAT(message_of<concertina::Error>([] { compute_names.of("fast"); }), Contains("layered"));
}

}  // namespace
}  // namespace cifar
