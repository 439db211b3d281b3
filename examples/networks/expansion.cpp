// From a strategy's name to the layers of a whole network.
// SPDX-License-Identifier: Apache-2.0
#include "expansion.hpp"

#include "onnx/builder.hpp"
#include "text.hpp"

#include <concertina/expand.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <iterator>
#include <map>
#include <string_view>

namespace tool {
namespace {

using concertina::ConvShape;

constexpr std::array<std::string_view, 5> strategies = {"cl", "ck", "fc", "cl+fc", "ck+fc"};

bool applies(const std::string& strategy, const Graph& graph, int node) {
  const std::string& type = graph.node(node).op_type;
  if (strategy == "fc") return type == "Gemm";
  if (type != "Conv") return false;
  return std::ranges::max(conv_shape(graph, node).kernel_size) > (strategy == "ck" ? 3 : 1);
}

std::string reason(const std::string& strategy) {
  if (strategy == "ck") return "CK expands convolutions with kernels larger than 3";
  return strategy == "cl" ? "CL expands convolutions with kernels larger than 1"
                          : "FC expands linear layers";
}

/// What is done to each layer, by name.
class Expander {
 public:
  Expander(const Architecture& network, const Expansion& expansion)
      : network_(network), expansion_(expansion), graph_(network.model, {}) {
    const std::string& all = expansion.strategy;
    if (std::ranges::find(strategies, all) == strategies.end()) {
      throw UsageError("there is no expansion " + in_quotes(all) + "; there are " +
                       listed(strategies));
    }
    if (expansion.stride_last && !all.starts_with("cl")) {
      throw UsageError("a stride on the last layer is a choice of CL; " + all +
                       " leaves none, the last is where it stands");
    }
    const std::size_t plus = all.find('+');
    add(all.substr(0, plus));
    if (plus != std::string::npos) add(all.substr(plus + 1));
    for (const std::string& name : expansion.layers) {
      if (!recipes_.contains(name)) {
        throw UsageError("layer " + in_quotes(name) + " of " + network.title +
                         " is not there or not expanded by " + all);
      }
    }
  }

  onnx::Model model() const {
    onnx::Model result = network_.model;
    result.nodes.clear();
    for (int n = 0; n < static_cast<int>(network_.model.nodes.size()); ++n) {
      const onnx::Node& from = graph_.node(n);
      const auto recipe = recipes_.find(from.name);
      if (recipe == recipes_.end()) {
        result.nodes.push_back(from);
        continue;
      }
      try {
        replace(from, recipe->second.strategy == "fc" ? fc(n) : conv(n, recipe->second), result);
      } catch (const concertina::Error& error) {
        throw UsageError(network_.title + ": " + from.name + " at rate " + brief(expansion_.rate) +
                         ": " + error.what());
      }
    }
    return result;
  }

 private:
  void add(const std::string& strategy) {
    const auto published = std::ranges::find(network_.recipes, strategy, &Recipe::strategy);
    Recipe recipe{.strategy = strategy, .layers = {}};
    if (published != network_.recipes.end()) recipe = *published;
    const std::vector<std::string>& wanted = expansion_.layers;
    const std::size_t before = recipes_.size();
    const std::vector<std::string>& among = wanted.empty() ? recipe.layers : wanted;
    for (const std::string& name : layers_for(strategy)) {
      if (among.empty() || std::ranges::find(among, name) != among.end()) {
        recipes_.emplace(name, recipe);
      }
    }
    if (recipes_.size() > before) return;
    const std::vector<std::string> possible = layers_for(strategy);
    if (!possible.empty()) {
      throw UsageError("none of the layers " + listed(wanted) + " of " + network_.title +
                       " is there and expanded by " + strategy + "; it expands " +
                       listed(possible));
    }
    std::vector<std::string> choices;
    for (const char* other : {"cl", "ck", "fc"}) {
      if (!layers_for(other).empty()) choices.emplace_back(other);
    }
    throw UsageError(reason(strategy) + ", of which " + network_.title + " has none; it has " +
                     "layers for " + listed(choices));
  }

  std::vector<std::string> layers_for(const std::string& strategy) const {
    std::vector<std::string> names;
    for (int n = 0; n < static_cast<int>(network_.model.nodes.size()); ++n) {
      if (applies(strategy, graph_, n)) names.push_back(graph_.node(n).name);
    }
    return names;
  }

  /// Puts a chain's nodes in the place of one, and its parameters in that of the node's.
  static void replace(const onnx::Node& from, onnx::Model chain, onnx::Model& to) {
    chain.nodes.front().inputs.front() = from.inputs.front();
    chain.nodes.back().outputs = from.outputs;
    std::ranges::move(chain.nodes, std::back_inserter(to.nodes));
    const auto is_parameter = [&](const onnx::ValueInfo& input) {
      return std::ranges::find(from.inputs.begin() + 1, from.inputs.end(), input.name) !=
             from.inputs.end();
    };
    const auto at = std::ranges::find_if(to.inputs, is_parameter) - to.inputs.begin();
    std::erase_if(to.inputs, is_parameter);
    to.inputs.insert(to.inputs.begin() + at, chain.inputs.begin() + 1, chain.inputs.end());
  }

  /// What reads what the node reads.
  Builder builder(int node) const {
    return {network_.name, onnx::DataType::float32, graph_[graph_.input(node, 0)].dims.value()};
  }

  onnx::Model fc(int node) const {
    Builder chain = builder(node);
    const auto shapes = expand_fc(linear_shape(graph_, node), {.rate = expansion_.rate});
    for (std::size_t l = 0; l < shapes.size(); ++l) {
      chain.linear(part(node, l), shapes[l].out, shapes[l].bias);
    }
    return chain.finish();
  }

  std::string part(int node, std::size_t l) const {
    return graph_.node(node).name + "." + std::to_string(l);
  }

  onnx::Model conv(int node, const Recipe& recipe) const {
    const ConvShape<2> shape = conv_shape(graph_, node);
    const bool cl = recipe.strategy == "cl";
    concertina::ExpandOptions options{.rate = expansion_.rate};
    options.depthwise_middle = recipe.depthwise_middle && shape.groups > 1;
    if (cl && expansion_.stride_last) options.stride_on = 2;
    const Index largest = std::ranges::max(shape.kernel_size);
    const Index layers = cl ? 3 : largest / 2;
    if (recipe.narrow_first && shape.in == image_of(network_).front() && layers > 2) {
      const double width = expansion_.rate * static_cast<double>(shape.out);
      options.widths.assign(static_cast<std::size_t>(layers - 1),
                            std::max<Index>(std::llround(width), 1));
      options.widths.front() = shape.in;
    }
    std::vector<ConvShape<2>> shapes = cl ? expand_cl(shape, options) : expand_ck(shape, options);
    for (std::size_t l = 0; recipe.inner_bias && l + 1 < shapes.size(); ++l) shapes[l].bias = true;
    Builder chain = builder(node);
    for (std::size_t l = 0; l < shapes.size(); ++l) chain.conv(part(node, l), shapes[l]);
    return chain.finish();
  }

  const Architecture& network_;
  const Expansion& expansion_;
  Graph graph_;
  std::map<std::string, Recipe> recipes_;
};

}  // namespace

Architecture expanded(const Architecture& network, const Expansion& expansion) {
  if (!(expansion.rate > 0 && expansion.rate < 1e6)) {
    throw UsageError("an expansion rate of " + brief(expansion.rate) +
                     "; rates are larger than 0 and smaller than a million");
  }
  Architecture result = network;
  result.name += "-" + expansion.strategy;
  result.title += ", expanded by " + expansion.strategy;
  result.model = Expander(network, expansion).model();
  return result;
}

}  // namespace tool
