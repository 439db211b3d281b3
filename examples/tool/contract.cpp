// concertina contract: one layer from a file's layers, or the compact network from a network's.
// SPDX-License-Identifier: Apache-2.0
#include "commands.hpp"
#include "networks/compact_network.hpp"
#include "networks/contraction.hpp"
#include "networks/read_layer.hpp"

#include <concertina/contract.hpp>

#include <Eigen/Core>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <iostream>

namespace tool {
namespace {

using concertina::Conv;
using concertina::io::Dtype;

/// Where the contraction is exact, in words. Throws InexactError where that is less than what was
/// asked for.
template <class Scalar, int Rank>
std::string judge_border(const Expr<Scalar, Rank>& expression, const ContractOptions& options) {
  const auto refuse = [&](const concertina::Exactness<Rank>& found, const std::string& where,
                          const std::string& or_instead) {
    throw concertina::InexactError(
        options.in + ": no single layer equals this chain at " + where + ": " + found.reason +
        "; the first " + to_string(found.start) + " and the last " + to_string(found.end) +
        " outputs of each axis differ. Pad the first layer instead, or accept a result " +
        or_instead + "that is right in the interior with --interior");
  };
  if (!options.input_size.empty()) {
    const auto size = parse_input_size<Rank>(options.input_size);
    const auto found = concertina::exactness(expression, size);
    if (!found) refuse(found, "input size " + to_string(size), "");
    return "exact at input size " + to_string(size);
  }
  const auto found = concertina::exactness(expression);
  if (found) return "exact";
  if (!options.interior) {
    refuse(found, "every input size", "for one size with --input-size, or one ");
  }
  return "interior only: the first " + to_string(found.start) + " and the last " +
         to_string(found.end) + " outputs of each axis differ";
}

/// The option, or none where it is empty. Throws UsageError for what is not a dtype of layers.
std::optional<Dtype> dtype_option(const std::string& option) {
  if (option.empty()) return std::nullopt;
  for (const Dtype dtype : {Dtype::F64, Dtype::F32, Dtype::F16, Dtype::BF16}) {
    if (option == name_of(dtype)) return dtype;
  }
  throw UsageError("--dtype: " + in_quotes(option) + " is none of F64, F32, F16, BF16");
}

struct Source {
  const concertina::io::Safetensors& file;
  const Node& graph;
  Dtype dtype;  // the widest of its layers
};

template <class Scalar, int Rank>
ExitCode contract(const Source& source, const Expr<Scalar, Rank>& expression, Dtype dtype,
                  const ContractOptions& options) {
  require_modest(concertina::Form(expression), options.in);
  const std::string border = judge_border(expression, options);
  Progress progress;
  progress.show("contracting " + options.in);
  const Conv<Scalar, Rank> layer = contracted(expression);
  concertina::io::Safetensors file{.origin = options.out.empty() ? options.in : options.out,
                                   .metadata = {{"conv", geometry_json(layer.shape()).dump()}},
                                   .tensors = {}};
  add_layer(file, "", layer, dtype);
  if (!options.out.empty()) concertina::io::write_safetensors(options.out, file);
  progress.clear();
  const Index before = parameters(source.file, source.graph), after = parameters(layer.shape());
  const Index layers = layer_count(source.graph);
  if (options.json) {
    std::cout << nlohmann::json{{"file", options.in},
                                {"layers", layers},
                                {"contracted", to_string(layer.shape())},
                                {"conv", geometry_json(layer.shape())},
                                {"dtype", name_of(dtype)},
                                {"exact", border.starts_with("exact")},
                                {"border", border},
                                {"parameters", {{"before", before}, {"after", after}}},
                                {"written", options.out.empty() ? nlohmann::json()
                                                                : nlohmann::json(options.out)}}
                     .dump(2)
              << '\n';
  } else {
    std::cout << options.in << ": " << counted(layers, "layer") << " (" << name_of(source.dtype)
              << ") -> " << to_string(layer.shape()) << ", " << border << "; " << grouped(before)
              << " -> " << grouped(after) << " parameters; "
              << (options.out.empty() ? "nothing written, name a file with -o"
                                      : "wrote " + options.out)
              << " (" << name_of(dtype) << ")\n";
  }
  return ok;
}

ExitCode contract_network(const Source& source, const ContractOptions& options) {
  if (options.interior || !options.input_size.empty()) {
    throw UsageError(
        "--interior and --input-size are for single layers; a network's are contracted where "
        "they are exact");
  }
  Progress progress;
  progress.show("contracting " + options.in);
  CompactNetwork compact = compact_network(source.file, source.graph, dtype_option(options.dtype));
  if (!options.out.empty()) {
    compact.file.origin = options.out;
    concertina::io::write_safetensors(options.out, compact.file);
  }
  progress.clear();
  const Index before = parameters(source.file, source.graph),
              after = parameters(compact.file, parse_graph(compact.file));
  if (options.json) {
    std::cout << nlohmann::json{{"file", options.in},
                                {"contracted", compact.contracted},
                                {"batch_norms_folded", compact.folded},
                                {"parameters", {{"before", before}, {"after", after}}},
                                {"written", options.out.empty() ? nlohmann::json()
                                                                : nlohmann::json(options.out)}}
                     .dump(2)
              << '\n';
  } else {
    std::cout << options.in << ": " << counted(compact.contracted, "expanded layer")
              << " contracted, " << counted(compact.folded, "batch norm") << " folded; "
              << grouped(before) << " -> " << grouped(after) << " parameters; "
              << (options.out.empty() ? "nothing written, name a file with -o"
                                      : "wrote " + options.out)
              << '\n';
  }
  return ok;
}

}  // namespace

ExitCode contract(const ContractOptions& options) {
  std::error_code ignored;
  if (!options.out.empty() && std::filesystem::equivalent(options.in, options.out, ignored)) {
    throw UsageError("-o: " + in_quotes(options.out) +
                     " is the input, which would be lost; name another file");
  }
  if (options.interior && !options.input_size.empty()) {
    throw UsageError(
        "--interior and --input-size exclude each other: what is exact at a size needs no leave");
  }
  const std::optional<Dtype> wanted = dtype_option(options.dtype);
  const concertina::io::Safetensors file = concertina::io::read_safetensors(options.in);
  const Node graph = graph_of(file, options.chain);
  const Source source{file, graph, dtype_of(file, graph).value_or(Dtype::F32)};
  if (!is_linear(graph)) return contract_network(source, options);
  const Dtype dtype = wanted.value_or(compact_dtype(source.dtype));
  std::optional<Index> channels;
  if (file.contains("input") && file.tensor("input").shape.size() > 1) {
    channels = file.tensor("input").shape[1];
  }
  const AnyExpression expression =
      read_linear_map(file, graph, wanted == Dtype::F64 || source.dtype == Dtype::F64, channels);
  return std::visit([&](const auto& each) { return contract(source, each, dtype, options); },
                    expression);
}

}  // namespace tool
