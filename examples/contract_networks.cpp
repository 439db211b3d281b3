// Contracts the paper's networks end to end, and checks what comes out.
// SPDX-License-Identifier: Apache-2.0
//
//     contract_networks [NAME...]
//
// Each network is expanded with random weights, and once more from the weights of a compact network
// such that it computes the same. Every expanded layer is then contracted, in float, from where its
// layers lie; the time and the memory that this takes are those of that step alone. Checked: each
// contraction has the shape of the compact layer, and is within its rounding bound on a window of
// its own input, of the expanded layers and, where these were made from it, of the compact layer
// too; the contracted network's error, against the expanded one in double, is no more than twice
// that of the expanded network in float.
#include "networks/expansion.hpp"
#include "networks/inference.hpp"
#include "networks/linear_map.hpp"
#include "networks/paper_networks.hpp"
#include "networks/windows.hpp"
#include "text.hpp"

#include <concertina/contract.hpp>
#include <concertina/expand.hpp>
#include <concertina/random.hpp>
#include <concertina/verify.hpp>

#include <CLI/CLI.hpp>

#include <malloc.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <fstream>
#include <iostream>
#include <map>
#include <random>
#include <set>
#include <span>
#include <string>
#include <vector>

namespace {

using namespace tool;
using concertina::ConvView;
using concertina::io::Safetensors;

/// A layer where the file has it.
ConvView<const float, 2> view_of(const Safetensors& file, const Node& node) {
  const auto bias =
      node.bias ? file.view<float>(node.layer.tensor("bias")) : std::span<const float>();
  return {conv_shape(node), file.view<float>(node.layer.tensor("weight")), bias};
}

std::vector<ConvView<const float, 2>> views_of(const Safetensors& file, const Node& chain) {
  std::vector<ConvView<const float, 2>> layers;
  for (const Node& part : chain.parts) layers.push_back(view_of(file, part));
  return layers;
}

/// Puts a layer's elements where the file has others; its bias also where there is none.
void replace(Safetensors& file, const Node& node, const ConvView<const float, 2>& layer) {
  const auto put = [&](const char* suffix, std::vector<Index> shape,
                       std::span<const float> elements) {
    const std::string name = node.layer.tensor(suffix);
    file.tensors.erase(name);
    file.add(name, std::move(shape), elements);
  };
  put("weight", file.tensor(node.layer.tensor("weight")).shape, layer.weight());
  if (!layer.bias().empty()) put("bias", {node.out}, layer.bias());
}

using Chains = std::map<std::string, const Node*>;  // of expanded layers, by the compact one's name

/// Gives the chains' layers elements that contract to those of `compact`. Returns the layers that
/// their widths cannot represent; they stay random.
std::set<std::string> preserve(Safetensors& file, const Safetensors& compact,
                               const Architecture& from, const Chains& chains) {
  std::mt19937_64 generator(1);
  std::set<std::string> refused;
  for_each_layer(from.graph, [&](const Node& node) {
    const auto chain = chains.find(node.layer.name);
    if (chain == chains.end()) return;
    std::vector<ConvShape<2>> shapes;
    for (const Node& part : chain->second->parts) {
      shapes.push_back(conv_shape(part));
      shapes.back().bias = part.bias && node.bias;  // biases that only the recipe has become zero
    }
    try {
      const auto layers = concertina::preserve(view_of(compact, node), shapes, generator);
      for (std::size_t l = 0; l < layers.size(); ++l) {
        Conv<float, 2> layer(conv_shape(chain->second->parts[l]));
        std::ranges::copy(layers[l].weight(), layer.weight().begin());
        std::ranges::copy(layers[l].bias(), layer.bias().begin());
        replace(file, chain->second->parts[l], layer);
      }
    } catch (const concertina::ExpansionError&) {
      refused.insert(node.layer.name);
    }
  });
  return refused;
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

// ---- checks

/// The part of the first image's map that the first outputs, of at most 8x8, read.
Tensor<double> window(const Tensor<double>& x, const ConvShape<2>& shape) {
  if (x.shape.size() == 2) {
    return {{1, x.shape[1], 1, 1}, {x.values.begin(), x.values.begin() + x.shape[1]}};
  }
  Tensor<double> part{x.shape, {}};
  for (int axis = 0; axis < 2; ++axis) {
    auto& extent = part.shape[static_cast<std::size_t>(axis) + 2];
    extent = std::min(extent, 8 * shape.stride[axis] + shape.kernel_size[axis]);
  }
  part.shape[0] = 1;
  const Index rows = part.shape[2], columns = part.shape[3];
  for (Index c = 0; c < x.shape[1]; ++c) {
    for (Index r = 0; r < rows; ++r) {
      const auto from = x.values.begin() + (c * x.shape[2] + r) * x.shape[3];
      part.values.insert(part.values.end(), from, from + columns);
    }
  }
  return part;
}

template <class Scalar>
concertina::FeatureMap<Scalar, 2> map_of(const Tensor<double>& x) {
  return {{.batch = x.shape[0], .channels = x.shape[1], .size = {x.shape[2], x.shape[3]}},
          {x.values.begin(), x.values.end()}};
}

/// The largest error of a contraction on this input, as a fraction of its bound: against the layers
/// in turn, in double, and against the layer that they were made from, if any, whose weights are
/// theirs contracted in float.
double fraction_of_bound(const std::vector<ConvView<const float, 2>>& layers,
                         const Conv<float, 2>& layer, const ConvView<const float, 2>* made_from,
                         const Tensor<double>& input) {
  using concertina::ComputedBy, concertina::prove_outputs;
  const Tensor<double> x = window(input, layer.shape());
  Tensor<double> y = x;
  for (const ConvView<const float, 2>& each : layers) {
    y = convolve(each.cast<double>(), y, "expanded");
  }
  const auto fraction = [](const concertina::Report& report) {
    return report ? static_cast<double>(report.fraction()) : INFINITY;
  };
  const double of_layers =
      fraction(prove_outputs(layers, layer, map_of<double>(x), map_of<double>(y)));
  if (!made_from) return of_layers;
  const Tensor<double> original = convolve(made_from->cast<double>(), x, "compact");
  return std::max(of_layers,
                  fraction(prove_outputs(layers, layer, map_of<double>(x), map_of<float>(original),
                                         ComputedBy::contraction)));
}

/// A batch of images, as many as make up for few logits: the largest of a handful of errors is a
/// matter of luck. One where it is large.
Tensor<double> images(MapShape<2> map) {
  map.batch = std::clamp<Index>((1 << 19) / numel(map), 1, 128);
  Tensor<double> x{{map.batch, map.channels, map.size[0], map.size[1]}, {}};
  std::mt19937_64 generator(1);
  for (Index i = 0; i < numel(map); ++i) {
    x.values.push_back(static_cast<float>(concertina::random_uniform(generator, 1)));
  }
  return x;
}

/// Trainable elements of a file.
Index trained(const Safetensors& file) {
  Index sum = 0;
  for (const auto& [name, tensor] : file.tensors) {
    if (name == "input" || name.find("running_") != std::string::npos) continue;
    sum += std::ssize(tensor.bytes) / static_cast<Index>(sizeof(float));
  }
  return sum;
}

std::string mebibytes(Index bytes) { return brief(static_cast<long double>(bytes) / (1 << 20)); }

/// Prints a row of the table. Returns whether all checks hold.
bool contract_network(const Architecture& compact, const std::string& strategy, bool preserving,
                      Progress& progress) {
  const Architecture wide = expanded(compact, {.strategy = strategy});
  Chains chains;
  for (const Node* node : expanded_nodes(wide.graph)) chains[compact_name(*node)] = node;
  progress.show(wide.title + ": expanding");
  Safetensors file = initialized(wide, 1);
  std::set<std::string> refused;
  const Safetensors original = initialized(compact, 2);
  if (preserving) refused = preserve(file, original, compact, chains);

  progress.show(wide.title + ": contracting");
  std::map<std::string, Conv<float, 2>> contracted;
  const PeakMemory memory;
  const auto begin = std::chrono::steady_clock::now();
  for (const auto& [name, chain] : chains) {
    contracted.emplace(name, concertina::contract(views_of(file, *chain)));
  }
  const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - begin;
  const Index peak = memory.bytes();

  // The compact network's file: what was not expanded stays.
  Safetensors small{.origin = compact.name,
                    .metadata = {{"chain", to_json(compact.graph).dump()}},
                    .tensors = {}};
  Index largest = 0;
  for (const auto& [name, tensor] : file.tensors) {
    if (name.ends_with("weight")) largest = std::max(largest, std::ssize(tensor.bytes));
  }
  for (const auto& [name, tensor] : original.tensors) {
    small.tensors.insert({name, file.contains(name) ? file.tensor(name) : tensor});
  }
  bool good = true;
  std::map<std::string, ConvView<const float, 2>> made_from;
  for_each_layer(compact.graph, [&](const Node& node) {
    const auto layer = contracted.find(node.layer.name);
    if (layer == contracted.end()) return;
    ConvShape<2> shape = conv_shape(node);
    shape.bias = layer->second.shape().bias;  // it may come from inner ones
    good = good && layer->second.shape() == shape;
    replace(small, node, layer->second);
    if (preserving && !refused.contains(node.layer.name)) {
      made_from.insert({node.layer.name, view_of(original, node)});
    }
  });

  const Tensor<double> input = images(compact.input);
  const Node wide_graph = parse_graph(file), small_graph = parse_graph(small);
  double worst = 0;
  std::size_t seen = 0;
  progress.show(wide.title + ": in double");
  const Tensor<double> right =
      run(Network<double>(file, wide_graph, Form::expanded,
                          [&](const Node& node, const Tensor<double>& x) {
                            const std::string& name = compact_name(node);
                            const auto from = made_from.find(name);
                            const double fraction = fraction_of_bound(
                                views_of(file, *chains.at(name)), contracted.at(name),
                                from == made_from.end() ? nullptr : &from->second, x);
                            ++seen;
                            if (!(fraction <= worst)) worst = fraction;
                          }),
          input);
  progress.show(wide.title + ": in float");
  const double error_wide = largest_difference(run(Network<float>(file, wide_graph), input), right);
  progress.show(wide.title + ": contracted");
  const double error = largest_difference(run(Network<float>(small, small_graph), input), right);
  progress.clear();

  // Only the layers that keep the image's channels may be too narrow to preserve.
  const auto narrow = std::ranges::count_if(compact.recipes, &Recipe::narrow_first);
  good = good && seen == chains.size() && worst <= 1 && error <= 2 * error_wide &&
         std::ssize(refused) <= (narrow > 0 ? 1 : 0);
  std::string start = preserving ? "preserving" : "random";
  for (const std::string& name : refused) start += ", but for " + name;
  std::cout << "| " << compact.title << " | " << strategy << " | " << start << " | "
            << chains.size() << " | " << grouped(trained(file)) << " -> " << grouped(trained(small))
            << " | " << brief(1e3L * taken.count()) << " | " << mebibytes(peak) << " | "
            << brief(static_cast<long double>(peak) / static_cast<long double>(largest)) << " | "
            << brief(worst) << " | " << brief(error / (2 * error_wide))
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
  CLI11_PARSE(app, argc, argv);
  try {
    bool good = true;
    Progress progress;
    for (const std::string& name : names) static_cast<void>(paper_network(name));  // or refuses it
    std::cout
        << "| network | expanded by | start | layers | parameters | time, ms | memory, MiB | of "
           "the largest layer | layer: error / bound | network: error / bound |\n"
           "|---|---|---|---|---|---|---|---|---|---|\n";
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
    if (!std::cout.flush()) throw concertina::IoError("standard output: not all could be written");
    return good ? ok : failed;
  } catch (...) {
    return report_error(nullptr, "contract_networks");
  }
}
