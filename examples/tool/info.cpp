// concertina info: what the layers cost, and what their contraction would.
// SPDX-License-Identifier: Apache-2.0
#include "commands.hpp"
#include "contraction.hpp"

#include <concertina/contract.hpp>

#include <iostream>

namespace tool {
namespace {

using concertina::ConvShape;
using concertina::PerAxis;

struct Row {
  std::string name, shape;
  Index parameters, multiply_adds;
};

/// Multiply-adds of each layer for one sample: on a map of `size`, or for one position of the
/// chain's output, far from borders, where a layer computes as many positions as the strides after
/// it skip.
template <int Rank>
std::vector<Index> costs(const std::vector<ConvShape<Rank>>& layers,
                         const std::optional<PerAxis<Rank>>& size) {
  std::vector<Index> result;
  PerAxis<Rank> map = size.value_or(1);
  Index positions = 1;
  for (const ConvShape<Rank>& layer : layers) {
    if (!size)
      positions =
          concertina::detail::checked_multiply(positions, volume(layer.geometry.stride), "strides");
  }
  for (const ConvShape<Rank>& layer : layers) {
    if (size) {
      map = output_size(layer, map);
      positions = volume(map);
    } else {
      positions /= volume(layer.geometry.stride);
    }
    result.push_back(
        concertina::detail::checked_multiply(weight_count(layer), positions, "multiply-adds"));
  }
  return result;
}

template <class Scalar, int Rank>
std::optional<PerAxis<Rank>> input_size(const DescribedChain& chain, const FilesOptions& options) {
  if (!options.input_size.empty()) return parse_input_size<Rank>(options.input_size);
  if (!chain.file.contains("input")) return std::nullopt;
  const auto& shape = chain.file.tensor("input").shape;
  if (shape.size() != static_cast<std::size_t>(Rank) + 2) return std::nullopt;
  PerAxis<Rank> size;
  for (int axis = 0; axis < Rank; ++axis) size[axis] = shape[static_cast<std::size_t>(axis) + 2];
  return size;
}

template <class Scalar, int Rank>
nlohmann::json describe(const std::string& path, const DescribedChain& chain,
                        const Layers<Scalar, Rank>& layers, const FilesOptions& options) {
  const std::vector<ConvShape<Rank>> shapes = concertina::shapes(layers);
  const ConvShape<Rank> product = concertina::product_shape<Rank>(shapes);
  const auto size = input_size<Scalar, Rank>(chain, options);
  std::vector<Row> rows;
  Row total{"all layers", "", 0, 0};
  const std::vector<Index> cost = costs(shapes, size);
  for (std::size_t l = 0; l < shapes.size(); ++l) {
    const std::string& name = chain.description.layers[l].name;
    rows.push_back(
        {name.empty() ? "weight" : name, to_string(shapes[l]), parameters(shapes[l]), cost[l]});
    total.parameters += rows.back().parameters;
    total.multiply_adds =
        concertina::detail::checked_add(total.multiply_adds, cost[l], "multiply-adds");
  }
  rows.push_back(total);
  rows.push_back({"contracted", to_string(product), parameters(product),
                  costs(std::vector<ConvShape<Rank>>{product}, size).front()});
  const auto found = size ? concertina::exactness(layers, *size) : concertina::exactness(layers);
  const std::string where = size ? (Rank > 0 ? "on an input of " + to_string(*size) : "a sample")
                                 : "a position of the output";

  nlohmann::json json{{"file", path},
                      {"dtype", name_of(chain.dtype)},
                      {"exact", found.exact()},
                      {"multiply_adds_are", where},
                      {"contraction_multiply_adds", multiply_adds(concertina::form(layers))},
                      {"rows", nlohmann::json::array()}};
  std::vector<std::vector<std::string>> cells{{"layer", "shape", "parameters", "multiply-adds"}};
  for (const Row& row : rows) {
    cells.push_back(
        {printable(row.name, 40), row.shape, grouped(row.parameters), grouped(row.multiply_adds)});
    json["rows"].push_back({{"layer", row.name},
                            {"shape", row.shape},
                            {"parameters", row.parameters},
                            {"multiply_adds", row.multiply_adds}});
  }
  if (!options.json) {
    std::cout << printable(path) << " (" << name_of(chain.dtype) << "), multiply-adds " << where
              << "\n"
              << table(cells)
              << (found ? "exact at the border" : "not exact at the border: " + found.reason)
              << "; contracting takes " << grouped(multiply_adds(concertina::form(layers)))
              << " multiply-adds\n";
  }
  return json;
}

}  // namespace

ExitCode info(const FilesOptions& options) {
  nlohmann::json results = nlohmann::json::array();
  const ExitCode code = for_each_file(options.paths, [&](const std::string& path) {
    try {
      const DescribedChain chain = read_chain(path, options.chain);
      results.push_back(
          std::visit([&](const auto& layers) { return describe(path, chain, layers, options); },
                     chain.layers));
      return ok;
    } catch (...) {
      std::string message;
      const ExitCode error = report_error(&message);
      results.push_back({{"file", path}, {"error", message}});
      return error;
    }
  });
  if (options.json) std::cout << results.dump(2) << '\n';
  return code;
}

}  // namespace tool
