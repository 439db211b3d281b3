// From a strategy's name to the layers of a whole network.
// SPDX-License-Identifier: Apache-2.0
#include "expansion.hpp"

#include "text.hpp"

#include <concertina/expand.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <string_view>

namespace tool {
namespace {

using concertina::ConvShape;

constexpr std::array<std::string_view, 5> strategies = {"cl", "ck", "fc", "cl+fc", "ck+fc"};

bool applies(const std::string& strategy, const Node& node) {
  if (strategy == "fc") return node.type == LayerType::linear;
  if (node.type != LayerType::conv) return false;
  return std::ranges::max(node.kernel) > (strategy == "ck" ? 3 : 1);
}

std::string reason(const std::string& strategy) {
  if (strategy == "ck") return "CK expands convolutions with kernels larger than 3";
  return strategy == "cl" ? "CL expands convolutions with kernels larger than 1"
                          : "FC expands linear layers";
}

/// What is done to each layer, by name.
class Plan {
 public:
  Plan(const Architecture& network, const Expansion& expansion)
      : network_(network), expansion_(expansion) {
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

  Node node(const Node& from) const {
    Node to = from;
    for (Node& part : to.parts) part = node(part);
    const auto recipe = recipes_.find(from.layer.name);
    if (from.kind != Node::Kind::layer || recipe == recipes_.end()) return to;
    try {
      return recipe->second.strategy == "fc" ? fc(from) : conv(from, recipe->second);
    } catch (const concertina::Error& error) {
      throw UsageError(network_.title + ": " + from.layer.name + " at rate " +
                       brief(expansion_.rate) + ": " + error.what());
    }
  }

 private:
  void add(const std::string& strategy) {
    const auto published = std::ranges::find(network_.recipes, strategy, &Recipe::strategy);
    Recipe recipe{.strategy = strategy, .layers = {}};
    if (published != network_.recipes.end()) recipe = *published;
    const std::vector<std::string>& wanted = expansion_.layers;
    const std::size_t before = recipes_.size();
    for_each_layer(network_.graph, [&](const Node& node) {
      const std::string& name = node.layer.name;
      const auto among = [&](const std::vector<std::string>& names) {
        return names.empty() || std::ranges::find(names, name) != names.end();
      };
      if (applies(strategy, node) && among(wanted.empty() ? recipe.layers : wanted)) {
        recipes_.emplace(name, recipe);
      }
    });
    if (recipes_.size() > before) return;
    const auto names_for = [&](const std::string& which) {
      std::vector<std::string> names;
      for_each_layer(network_.graph, [&](const Node& node) {
        if (applies(which, node)) names.push_back(node.layer.name);
      });
      return names;
    };
    const std::vector<std::string> possible = names_for(strategy);
    if (!possible.empty()) {
      throw UsageError("none of the layers " + listed(wanted) + " of " + network_.title +
                       " is there and expanded by " + strategy + "; it expands " +
                       listed(possible));
    }
    std::vector<std::string> choices;
    for (const char* other : {"cl", "ck", "fc"}) {
      if (!names_for(other).empty()) choices.emplace_back(other);
    }
    throw UsageError(reason(strategy) + ", of which " + network_.title + " has none; it has " +
                     "layers for " + listed(choices));
  }

  template <int Rank>
  static Node chain(const std::string& name, const std::vector<ConvShape<Rank>>& shapes) {
    Node node;
    node.layer.name = node.where = name;
    for (std::size_t l = 0; l < shapes.size(); ++l) {
      node.parts.push_back(layer_node(name + "." + std::to_string(l), shapes[l]));
    }
    return node;
  }

  Node fc(const Node& from) const {
    return chain(from.layer.name, expand_fc(linear_shape(from), {.rate = expansion_.rate}));
  }

  Node conv(const Node& from, const Recipe& recipe) const {
    const ConvShape<2> shape = conv_shape(from);
    const bool cl = recipe.strategy == "cl";
    concertina::ExpandOptions options{.rate = expansion_.rate};
    options.depthwise_middle = recipe.depthwise_middle && shape.groups > 1;
    if (cl && expansion_.stride_last) options.stride_on = 2;
    const Index largest = std::ranges::max(from.kernel);
    const Index layers = cl ? 3 : largest / 2;
    if (recipe.narrow_first && shape.in == network_.input.channels && layers > 2) {
      const double width = expansion_.rate * static_cast<double>(shape.out);
      options.widths.assign(static_cast<std::size_t>(layers - 1),
                            std::max<Index>(std::llround(width), 1));
      options.widths.front() = shape.in;
    }
    std::vector<ConvShape<2>> shapes = cl ? expand_cl(shape, options) : expand_ck(shape, options);
    for (std::size_t l = 0; recipe.inner_bias && l + 1 < shapes.size(); ++l) shapes[l].bias = true;
    return chain(from.layer.name, shapes);
  }

  const Architecture& network_;
  const Expansion& expansion_;
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
  result.graph = Plan(network, expansion).node(network.graph);
  return result;
}

}  // namespace tool
