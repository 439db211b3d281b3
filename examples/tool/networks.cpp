// concertina networks, info --network, expand: the paper's networks without a file.
// SPDX-License-Identifier: Apache-2.0
#include "networks.hpp"

#include "networks/expansion.hpp"
#include "networks/paper_networks.hpp"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <iostream>

namespace tool {
namespace {

Architecture described(const NetworkOptions& options) {
  const Architecture network = paper_network(options.network);
  if (options.expand.empty()) return network;
  return expanded(network, {.strategy = options.expand,
                            .rate = options.rate,
                            .stride_last = options.stride == "last",
                            .layers = options.layers});
}

/// How the paper expands a network: cl, cl+fc, ...
std::vector<std::string> published(const Architecture& network) {
  const bool fc =
      std::ranges::find(network.recipes, "fc", &Recipe::strategy) != network.recipes.end();
  std::vector<std::string> strategies;
  for (const Recipe& recipe : network.recipes) {
    if (recipe.strategy == "fc") continue;
    strategies.push_back(recipe.strategy);
    if (fc) strategies.push_back(recipe.strategy + "+fc");
  }
  return strategies;
}

}  // namespace

ExitCode networks(const NetworkOptions& options) {
  std::vector<std::vector<std::string>> cells{
      {"name", "network", "input", "parameters", "multiply-adds", "expanded by"}};
  nlohmann::json list = nlohmann::json::array();
  for (const std::string& name : paper_network_names()) {
    const Architecture network = paper_network(name);
    const Cost cost = total(layer_costs(network));
    const std::vector<std::string> strategies = published(network);
    cells.push_back({name, network.title, to_text(image_of(network)), grouped(cost.parameters),
                     grouped(cost.multiply_adds), listed(strategies)});
    list.push_back({{"name", name},
                    {"title", network.title},
                    {"input", image_of(network)},
                    {"parameters", cost.parameters},
                    {"multiply_adds", cost.multiply_adds},
                    {"expanded_by", strategies}});
  }
  if (options.json) {
    std::cout << list.dump(2) << '\n';
  } else {
    std::cout << table(cells);
  }
  return ok;
}

ExitCode network_info(const NetworkOptions& options) {
  const Architecture network = described(options);
  const std::vector<LayerCost> layers = layer_costs(network);
  const Cost sum = total(layers);
  nlohmann::json json{{"network", network.name},
                      {"title", network.title},
                      {"input", image_of(network)},
                      {"parameters", sum.parameters},
                      {"multiply_adds", sum.multiply_adds},
                      {"layers", nlohmann::json::array()}};
  std::vector<std::vector<std::string>> cells{
      {"layer", "shape", "output", "parameters", "multiply-adds"}};
  for (const LayerCost& layer : layers) {
    cells.push_back({layer.name, layer.layer, to_text(layer.output), grouped(layer.cost.parameters),
                     grouped(layer.cost.multiply_adds)});
    json["layers"].push_back({{"name", layer.name},
                              {"layer", layer.layer},
                              {"output", layer.output},
                              {"parameters", layer.cost.parameters},
                              {"multiply_adds", layer.cost.multiply_adds}});
  }
  cells.push_back({"total", "", "", grouped(sum.parameters), grouped(sum.multiply_adds)});
  if (options.json) {
    std::cout << json.dump(2) << '\n';
  } else {
    std::cout << network.title << ", one image of " << to_text(image_of(network)) << '\n'
              << table(cells);
  }
  return ok;
}

ExitCode write_network(const NetworkOptions& options) {
  if (!options.out.ends_with(".onnx")) {
    throw UsageError("-o: " + in_quotes(options.out) + " is to be an ONNX model; name it .onnx");
  }
  const Architecture network = described(options);
  const Cost cost = total(layer_costs(network));
  onnx::write_model(options.out, initialized(network, options.seed));
  std::cout << network.title << ": wrote " << printable(options.out) << ", "
            << grouped(cost.parameters) << " parameters\n";
  return ok;
}

}  // namespace tool
