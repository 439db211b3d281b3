// concertina info: what the layers cost, and what their contraction would.
// SPDX-License-Identifier: Apache-2.0
#include "commands.hpp"
#include "networks/contraction.hpp"
#include "networks/read_layer.hpp"

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

/// Positions at which each layer is computed: on a map of `size`, or for one position of the output
/// far from borders, where a layer computes as many as the strides after it skip.
template <int Rank>
void count_positions(const concertina::Form<Rank>& form, std::optional<PerAxis<Rank>> size,
                     Index outputs, std::vector<Index>& positions) {
  if (form.join() == concertina::Join::none) {
    positions.push_back(size ? numel(form.output_size(*size)) : outputs);
    return;
  }
  const auto& parts = form.parts();
  for (std::size_t p = 0; p < parts.size(); ++p) {
    Index here = outputs;
    if (form.join() == concertina::Join::chain) {
      for (std::size_t after = p + 1; after < parts.size(); ++after) {
        here = concertina::detail::checked_multiply(here, numel(parts[after].shape().stride),
                                                    "strides");
      }
    }
    count_positions(parts[p], size, here, positions);
    if (size && form.join() == concertina::Join::chain) size = parts[p].output_size(*size);
  }
}

/// Names of a node's layers, as many as its expression has leaves.
void list_names(const Node& node, std::vector<std::string>& names) {
  const bool identity = node.kind == Node::Kind::chain && node.parts.empty();
  if (node.kind == Node::Kind::layer || identity) {
    const std::string type = identity ? "identity" : std::string(name_of(node.type));
    const bool unnamed = node.layer.name.empty();
    const bool alone = node.type == LayerType::conv || node.type == LayerType::linear;
    names.push_back(!unnamed ? node.layer.name : alone && !identity ? "weight" : type);
    if (node.type == LayerType::avg_pool) names.push_back("  divided by its window");
  }
  for (const Node& part : node.parts) list_names(part, names);
}

template <int Rank>
std::optional<PerAxis<Rank>> input_size(const concertina::io::Safetensors& file,
                                        const FilesOptions& options) {
  if (!options.input_size.empty()) return parse_input_size<Rank>(options.input_size);
  if (!file.contains("input")) return std::nullopt;
  const auto& shape = file.tensor("input").shape;
  if (shape.size() != static_cast<std::size_t>(Rank) + 2) return std::nullopt;
  PerAxis<Rank> size;
  for (int axis = 0; axis < Rank; ++axis) size[axis] = shape[static_cast<std::size_t>(axis) + 2];
  return size;
}

template <class Scalar, int Rank>
nlohmann::json describe(const std::string& path, const concertina::io::Safetensors& file,
                        const Node& graph, const Expr<Scalar, Rank>& expression,
                        const FilesOptions& options) {
  const concertina::Form<Rank> form = concertina::Form(expression);
  const ConvShape<Rank> product = form.shape();
  const auto size = input_size<Rank>(file, options);
  const std::string dtype(name_of(dtype_of(file, graph).value_or(concertina::io::Dtype::F32)));
  std::vector<Row> rows;
  Row total{"all layers", "", 0, 0};
  std::vector<Index> positions;
  count_positions(form, size, 1, positions);
  std::vector<std::string> names;
  list_names(graph, names);
  const auto row_of = [](const std::string& name, const ConvShape<Rank>& shape, Index at) {
    return Row{name, to_string(shape), parameters(shape),
               concertina::detail::checked_multiply(weight_numel(shape), at, "multiply-adds")};
  };
  for (const ConvShape<Rank>& shape : form.leaves()) {
    rows.push_back(row_of(names.at(rows.size()), shape, positions[rows.size()]));
    total.parameters += rows.back().parameters;
    total.multiply_adds = concertina::detail::checked_add(
        total.multiply_adds, rows.back().multiply_adds, "multiply-adds");
  }
  rows.push_back(total);
  std::vector<Index> whole;
  count_positions(concertina::Form<Rank>(product), size, 1, whole);
  rows.push_back(row_of("contracted", product, whole.front()));
  const auto found = exactness(form, size);
  const std::string where = size ? (Rank > 0 ? "on an input of " + to_string(*size) : "a sample")
                                 : "a position of the output";

  nlohmann::json json{{"file", path},
                      {"dtype", dtype},
                      {"exact", found.exact()},
                      {"multiply_adds_are", where},
                      {"contraction_multiply_adds", form.multiply_adds()},
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
    std::cout << printable(path) << " (" << dtype << "), multiply-adds " << where << "\n"
              << table(cells)
              << (found ? "exact at the border" : "not exact at the border: " + found.reason)
              << "; contracting takes " << grouped(form.multiply_adds()) << " multiply-adds\n";
  }
  return json;
}

}  // namespace

ExitCode info(const FilesOptions& options) {
  nlohmann::json results = nlohmann::json::array();
  const ExitCode code = for_each_file(options.paths, results, [&](const std::string& path) {
    const auto file = concertina::io::read_safetensors(path);
    const Node graph = graph_of(file, options.chain);
    if (!is_linear(graph)) {
      throw concertina::FormatError(
          path +
          ": a whole network, of which info shows nothing; contract and verify take it, and "
          "info --network shows those of the paper");
    }
    results.push_back(std::visit(
        [&](const auto& expression) { return describe(path, file, graph, expression, options); },
        read_file_map(file, graph)));
    return ok;
  });
  if (options.json) std::cout << results.dump(2) << '\n';
  return code;
}

}  // namespace tool
