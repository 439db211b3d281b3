// Contracts the paper's networks end to end, and checks what comes out.
// SPDX-License-Identifier: Apache-2.0
//
//     contract_networks [NAME...]
//
// Each network is expanded with random weights, and once more from the weights of a compact network
// such that it computes the same; it is written as an ONNX model, read back and contracted.
// Checked: every contracted region by the three proofs; that the contraction has the layers of the
// contracted compact network, in number and shape; and, where the expanded layers were made from
// the compact network's, that each computes what the compact layer does, within rounding. Reported:
// the time and memory that contracting takes, and how far outputs in float are from the expanded
// network's in double.
#include "networks/expansion.hpp"
#include "networks/paper_networks.hpp"
#include "onnx/compare_models.hpp"
#include "onnx/contract_model.hpp"
#include "onnx/evaluate.hpp"
#include "text.hpp"

#include <concertina/contract.hpp>
#include <concertina/expand.hpp>
#include <concertina/random.hpp>
#include <concertina/verify.hpp>

#include <CLI/CLI.hpp>

#include <malloc.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <map>
#include <random>
#include <set>
#include <string>
#include <vector>

namespace {

using namespace tool;
using Layer = concertina::Conv<float, 2>;

// ---- layers of models

onnx::Tensor& initializer(onnx::Model& model, const std::string& name) {
  return *std::ranges::find(model.initializers, name, &onnx::Tensor::name);
}

/// A layer of an initialized network; a linear one as a 1x1 convolution.
Layer layer_of(const Architecture& network, onnx::Model& model, const std::string& name) {
  const Graph graph(network.model, {});
  const auto node = std::ranges::find(network.model.nodes, name, &onnx::Node::name);
  const int index = static_cast<int>(node - network.model.nodes.begin());
  concertina::ConvShape<2> shape;
  if (node->op_type == "Gemm") {
    const concertina::ConvShape<0> linear = linear_shape(graph, index);
    shape = {.out = linear.out, .in = linear.in, .bias = linear.bias};
  } else {
    shape = conv_shape(graph, index);
  }
  const auto elements = [&](std::size_t input) {
    return initializer(model, node->inputs.at(input)).values<float>();
  };
  return {shape, elements(1), shape.bias ? elements(2) : std::vector<float>()};
}

/// The layers that an expanded network has in the place of each of a compact one's: NAME.0, ...
std::map<std::string, std::vector<std::string>> chains(const Architecture& compact,
                                                       const Architecture& wide) {
  std::set<std::string> kept;
  for (const onnx::Node& node : wide.model.nodes) kept.insert(node.name);
  std::map<std::string, std::vector<std::string>> result;
  for (const onnx::Node& node : compact.model.nodes) {
    if (kept.contains(node.name)) continue;
    auto& parts = result[node.name];
    for (int l = 0; kept.contains(node.name + "." + std::to_string(l)); ++l) {
      parts.push_back(node.name + "." + std::to_string(l));
    }
  }
  return result;
}

// ---- memory

/// A line of /proc/self/status, in bytes.
Index status(const std::string& field) {
  std::ifstream in("/proc/self/status");
  for (std::string line; std::getline(in, line);) {
    if (line.starts_with(field + ":")) return std::stol(line.substr(field.size() + 1)) * 1024;
  }
  throw concertina::IoError("/proc/self/status: no " + field);
}

/// Memory beyond that in use at the start, at its most.
class PeakMemory {
 public:
  PeakMemory() {
    malloc_trim(0);  // so that memory freed earlier is counted when it is used again
    std::ofstream reset("/proc/self/clear_refs");
    if (!(reset << "5" << std::flush)) {
      throw concertina::IoError("/proc/self/clear_refs: the peak of memory cannot be reset");
    }
    start_ = status("VmRSS");
  }
  Index bytes() const { return std::max<Index>(status("VmHWM") - start_, 0); }

 private:
  Index start_;
};

// ---- networks

/// The largest error of the layers' contraction as a fraction of its bound, against the layer that
/// they were made from, on a random input of which an 8x8 output is made.
double fraction_of_bound(const std::vector<Layer>& layers, const Layer& made_from) {
  const auto& shape = made_from.shape();
  concertina::MapShape<2> map{.channels = shape.in};
  for (int axis = 0; axis < 2; ++axis) {
    map.size[axis] = 8 * shape.stride[axis] + shape.dilation[axis] * shape.kernel_size[axis];
  }
  concertina::FeatureMap<double, 2> input(map);
  std::mt19937_64 generator(1);
  for (double& element : input.values()) element = concertina::random_uniform(generator, 1);
  const auto right = made_from.cast<double>()(input);
  const concertina::FeatureMap<float, 2> original(right.shape(),
                                                  {right.values().begin(), right.values().end()});
  const concertina::Report report = prove_outputs(layers, concertina::contract(layers), input,
                                                  original, concertina::ComputedBy::contraction);
  return report ? static_cast<double>(report.fraction()) : INFINITY;
}

struct Preserved {
  std::set<std::string> refused;  // layers too narrow to represent the compact one's; still random
  double worst = 0;               // fraction_of_bound of the others
};

/// Gives the chains' layers elements that contract to those of `compact`.
Preserved preserve(const Architecture& from, onnx::Model& compact, const Architecture& wide,
                   onnx::Model& model) {
  Preserved result;
  std::mt19937_64 generator(1);
  for (const auto& [name, parts] : chains(from, wide)) {
    const Layer made_from = layer_of(from, compact, name);
    std::vector<Layer> layers;
    std::vector<concertina::ConvShape<2>> shapes;
    for (const std::string& part : parts) {
      layers.push_back(layer_of(wide, model, part));
      shapes.push_back(layers.back().shape());
      // Biases that only the recipe has become zero.
      shapes.back().bias = shapes.back().bias && made_from.shape().bias;
    }
    try {
      const auto preserving = concertina::preserve(made_from, shapes, generator);
      for (std::size_t l = 0; l < layers.size(); ++l) {
        std::ranges::copy(preserving[l].weight(), layers[l].weight().begin());
        std::ranges::fill(layers[l].bias(), 0.F);
        std::ranges::copy(preserving[l].bias(), layers[l].bias().begin());
        const auto replace = [&](const char* suffix, std::span<const float> values) {
          onnx::Tensor& tensor = initializer(model, parts[l] + suffix);
          tensor = onnx::Tensor::of<float>(tensor.name, tensor.dims, values);
        };
        replace(".weight", layers[l].weight());
        if (!layers[l].bias().empty()) replace(".bias", layers[l].bias());
      }
      result.worst = std::max(result.worst, fraction_of_bound(layers, made_from));
    } catch (const concertina::ExpansionError&) {
      result.refused.insert(name);
    }
  }
  return result;
}

/// Written and read again.
onnx::Model through_file(const onnx::Model& model) {
  const auto path = std::filesystem::temp_directory_path() /
                    ("contract_networks-" + std::to_string(getpid()) + ".onnx");
  struct Removal {
    const std::filesystem::path& path;
    ~Removal() {
      std::error_code ignored;
      std::filesystem::remove(path, ignored);
    }
  } const removal{path};
  onnx::write_model(path, model);
  return onnx::read_model(path);
}

/// Operators, and the shapes of the constants that they read.
std::vector<std::vector<std::string>> layers_of(const onnx::Model& model) {
  std::map<std::string, std::string> shapes;
  for (const onnx::Tensor& tensor : model.initializers) shapes[tensor.name] = to_text(tensor.dims);
  std::vector<std::vector<std::string>> layers;
  for (const onnx::Node& node : model.nodes) {
    layers.push_back({node.op_type});
    for (const std::string& input : node.inputs) layers.back().push_back(shapes[input]);
  }
  return layers;
}

/// One image.
Value random_image(const Dims& image) {
  Array<float> x{{1}, {}};
  x.shape.insert(x.shape.end(), image.begin(), image.end());
  Index count = 1;
  for (const Index extent : image) count *= extent;
  std::mt19937_64 generator(1);
  for (Index i = 0; i < count; ++i) {
    x.values.push_back(static_cast<float>(concertina::random_uniform(generator, 1)));
  }
  return x;
}

/// The largest difference of float outputs from double ones, relative to the largest of these.
double relative_error(const Value& found, const Value& right) {
  const auto& x = std::get<Array<float>>(found).values;
  const auto& y = std::get<Array<double>>(right).values;
  double error = 0, largest = 0;
  for (std::size_t i = 0; i < y.size(); ++i) {
    const double off = std::abs(double{x.at(i)} - y[i]);
    if (!(off <= error)) error = off;  // NaN stays
    largest = std::max(largest, std::abs(y[i]));
  }
  return error / largest;
}

std::string mebibytes(Index bytes) { return brief(static_cast<long double>(bytes) / (1 << 20)); }

/// Prints a row of the table. Returns whether all checks hold.
bool contract_network(const Architecture& compact, const std::string& strategy, bool preserving,
                      Progress& progress) {
  const Architecture wide = expanded(compact, {.strategy = strategy});
  Preserved preserved;
  progress.show(wide.title + ": expanding");
  onnx::Model small = initialized(compact, 2), model = initialized(wide, 1);
  if (preserving) preserved = preserve(compact, small, wide, model);
  Index largest = 0;
  for (const onnx::Tensor& tensor : model.initializers) {
    largest = std::max(largest, std::ssize(tensor.elements));
  }
  model = through_file(model);

  progress.show(wide.title + ": contracting");
  const PeakMemory memory;
  const auto begin = std::chrono::steady_clock::now();
  const ContractedModel contracted = contract_model(model, {});
  const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - begin;
  const Index peak = memory.bytes();
  const onnx::Model result = through_file(contracted.model);

  progress.show(wide.title + ": proving");
  const ModelComparison comparison = compare_models(model, result);
  double worst = preserved.worst;
  for (const ComparedRegion& region : comparison.regions) {
    for (const concertina::Report& report : region.proofs) {
      worst = std::max(worst, static_cast<double>(report.fraction()));
    }
  }
  // Only layers that keep the image's channels may be too narrow to preserve.
  const bool narrow = std::ranges::any_of(compact.recipes, &Recipe::narrow_first);
  const ContractedModel expected = contract_model(small, {});
  const bool compact_again = contracted.after.parameters < expected.after.parameters ||
                             layers_of(result) == layers_of(expected.model);
  const bool good = worst <= 1 && comparison.proved() && compact_again &&
                    preserved.refused.size() <= (narrow ? 1U : 0U);

  progress.show(wide.title + ": in double");
  const Values input{{"input", random_image(image_of(compact))}};
  const Value right = Evaluator(model, true)(input).at("output");
  progress.show(wide.title + ": in float");
  const double of_wide = relative_error(Evaluator(model)(input).at("output"), right);
  const double of_result = relative_error(Evaluator(result)(input).at("output"), right);
  progress.clear();

  std::string start = preserving ? "preserving" : "random";
  for (const std::string& name : preserved.refused) start += ", but for " + name;
  const auto numbers = [](double count) { return grouped(std::llround(count)); };
  std::cout << "| " << compact.title << " | " << strategy << " | " << start << " | "
            << chains(compact, wide).size() << " | " << numbers(contracted.before.parameters)
            << " -> " << numbers(contracted.after.parameters) << " | "
            << brief(1e3L * taken.count()) << " | " << mebibytes(peak) << " | "
            << brief(static_cast<long double>(peak) / static_cast<long double>(largest)) << " | "
            << brief(worst) << " | " << brief(of_wide) << " | " << brief(of_result)
            << (good ? "" : " **fails**") << " |" << std::endl;
  return good;
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Contracts the paper's networks end to end and checks the results; prints Markdown.",
               "contract_networks");
  std::vector<std::string> names = paper_network_names();
  app.add_option("NAME", names,
                 "The networks, as concertina networks lists them; by default all. "
                 "U-Net takes ten minutes and 6 GiB");
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return finish("contract_networks", app.exit(error));
  }
  try {
    bool good = true;
    Progress progress;
    for (const std::string& name : names) static_cast<void>(paper_network(name));  // or refuses it
    std::cout
        << "| network | expanded by | start | layers | parameters | time, ms | memory, MiB | of "
           "the largest layer | error / bound | float error | contracted |\n"
           "|---|---|---|---|---|---|---|---|---|---|---|\n";
    for (const std::string& name : names) {
      const Architecture network = paper_network(name);
      for (const Recipe& recipe : network.recipes) {
        if (recipe.strategy == "fc") continue;
        const bool fc =
            std::ranges::find(network.recipes, "fc", &Recipe::strategy) != network.recipes.end();
        const std::string strategy = recipe.strategy + (fc ? "+fc" : "");
        for (const bool preserving : {false, true}) {
          good = contract_network(network, strategy, preserving, progress) && good;
        }
      }
    }
    return finish("contract_networks", good ? ok : failed);
  } catch (...) {
    return report_error("contract_networks");
  }
}
