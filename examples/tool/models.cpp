// SPDX-License-Identifier: Apache-2.0
#include "models.hpp"

#include "draw.hpp"
#include "input_shape.hpp"
#include "onnx/chain.hpp"
#include "onnx/compare_models.hpp"
#include "onnx/contract_model.hpp"
#include "onnx/layer_file.hpp"
#include "outputs.hpp"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <iostream>
#include <map>
#include <random>
#include <ranges>
#include <set>
#include <utility>

namespace tool {

namespace {

using nlohmann::json;

/// In ASCII, as a terminal shows it; bytes that are no UTF-8, as paths may have, become U+FFFD.
std::string dumped(const json& document) {
  return document.dump(2, ' ', true, json::error_handler_t::replace);
}

/// As the options say; by default a second or two of a processor and a gigabyte, more for files of
/// more than a megabyte.
Budget budget_of(const ModelCommand& command) {
  std::error_code ignored;
  double bytes = 0, larger = 0;
  for (const std::string& path : {command.in, command.out}) {
    const auto size = std::filesystem::file_size(path, ignored);
    if (ignored) continue;
    bytes += static_cast<double>(size);
    larger = std::max(larger, static_cast<double>(size));
  }
  // A file under a megabyte takes some seconds at most; of a larger one the weights are real work.
  const double more = std::max(0.0, larger - 1e6);
  Budget budget{.memory = 9e8 + 64 * bytes, .effort = 1.5e9 + 1.5e3 * larger + 2e4 * more};
  if (command.memory) budget.memory = static_cast<double>(*command.memory);
  if (command.effort) budget.effort = *command.effort;
  return budget;
}

GraphOptions graph_options(const ModelCommand& command) {
  GraphOptions options{.budget = budget_of(command)};
  for (const std::string& text : command.inputs) {
    if (options.inputs.insert(parse_input(text)).second) continue;
    throw UsageError("--input " + in_quotes(text) + ": the input has a shape already");
  }
  options.initializers_are_constant = command.initializers_are_constant;
  options.keep = command.keep;
  return options;
}

Equality equality_of(const std::string& border) {
  if (border == "everywhere") return Equality::everywhere;
  if (border == "interior") return Equality::interior;
  return Equality::size;
}

/// By default layers that a chain describes become one, whatever that costs.
When when_of(const std::string& when, bool chain) {
  if (when == "always" || (when.empty() && chain)) return When::always;
  return when == "faster" ? When::faster : When::smaller;
}

const char* name_of(Equality where) {
  if (where == Equality::size) return "at this size";
  return where == Equality::interior ? "off the border" : "everywhere";
}

/// 5,208; 40.6 M; 1.82 G.
std::string amount(double count) {
  if (count < 1e6) return grouped(std::llround(count));
  return count < 1e9 ? fixed(count / 1e6, 1) + " M" : fixed(count / 1e9, 2) + " G";
}

std::string change(double before, double after) {
  const std::string text = amount(before) + " -> " + amount(after);
  if (before <= 0) return text;
  const double percent = 100 * (after - before) / before;
  return text + " (" + (percent > 0 ? "+" : "") + fixed(percent, 1) + "%)";
}

json to_json(const ModelCost& before, const ModelCost& after) {
  return {{"parameters", {{"before", before.parameters}, {"after", after.parameters}}},
          {"multiply_adds", {{"before", before.multiply_adds}, {"after", after.multiply_adds}}}};
}

json to_json(const ContractedModel& result, const ModelCommand& command, const onnx::Model& model) {
  json regions = json::array(), left = json::array();
  for (const ContractedRegion& region : result.regions) {
    json each = to_json(region.before, region.after);
    each.update({{"source", region.source},
                 {"result", region.result},
                 {"nodes", region.nodes},
                 {"layer", region.layer},
                 {"exact", name_of(region.where)}});
    regions.push_back(std::move(each));
  }
  for (const LeftAlone& each : result.left) {
    left.push_back({{"where", each.where}, {"reason", each.reason}, {"remedy", each.remedy}});
  }
  json document = to_json(result.before, result.after);
  document.update(
      {{"file", command.in},
       {"nodes", {{"before", model.nodes.size()}, {"after", result.model.nodes.size()}}},
       {"assumed_size", result.assumed_size},
       {"regions", std::move(regions)},
       {"left", std::move(left)},
       {"written", command.out.empty() ? json() : json(command.out)}});
  return document;
}

/// The first of each kind, and how many there are. All are in the JSON.
void print_left(const std::vector<LeftAlone>& left) {
  struct Kind {
    const LeftAlone* first;
    std::size_t count;
  };
  std::vector<Kind> kinds;
  std::map<std::string, std::size_t> index;
  for (const LeftAlone& each : left) {
    // Two layers that stay apart are of a kind by the remedy; other nodes by operator and reason.
    const bool apart = !each.remedy.empty();
    const std::string kind = apart ? each.remedy + each.reason.substr(0, 5)
                                   : each.where.substr(0, each.where.find(' ')) + each.reason;
    const auto [at, added] = index.emplace(kind, kinds.size());
    if (added) kinds.push_back({&each, 0});
    ++kinds[at->second].count;
  }
  for (const auto& [first, count] : kinds) {
    std::cout << "  left: " << printable(first->where, 120) << ": " << printable(first->reason, 160)
              << (first->remedy.empty() ? "" : " (" + first->remedy + ")")
              << (count > 1 ? ", and " + std::to_string(count - 1) + " more like it" : "") << '\n';
  }
}

void print(const ContractedModel& result, const onnx::Model& model) {
  std::vector<std::vector<std::string>> rows = {
      {"makes", "nodes", "becomes", "exact", "parameters", "multiply-adds"}};
  for (const ContractedRegion& region : result.regions) {
    rows.push_back(
        {printable(region.result, 40), std::to_string(region.nodes.size()), region.layer,
         name_of(region.where),
         amount(region.before.parameters) + " -> " + amount(region.after.parameters),
         amount(region.before.multiply_adds) + " -> " + amount(region.after.multiply_adds)});
  }
  if (rows.size() > 1) std::cout << table(rows);
  print_left(result.left);
  std::cout << "nodes " << model.nodes.size() << " -> " << result.model.nodes.size()
            << "; parameters " << change(result.before.parameters, result.after.parameters)
            << "; multiply-adds " << change(result.before.multiply_adds, result.after.multiply_adds)
            << (result.assumed_size ? ", for an image of 224x224 where the model states no size"
                                    : "")
            << '\n';
}

ExitCode code_of(const ModelComparison& comparison, const OutputComparison& outputs) {
  if (comparison.failed() || outputs.failed()) return failed;
  return comparison.proved() ? ok : not_proved;
}

json to_json(const ModelComparison& comparison) {
  json regions = json::array();
  for (const ComparedRegion& region : comparison.regions) {
    json proofs = json::array();
    for (const concertina::Report& report : region.proofs) {
      proofs.push_back({{"proof", report.proof},
                        {"holds", static_cast<bool>(report)},
                        {"failure", report.failure},
                        {"undecided", report.undecided},
                        {"compared", report.compared},
                        {"fraction_of_bound", static_cast<double>(report.fraction())}});
      if (report.sampled > 0) {
        proofs.back()["sampled"] = {{"rows", report.sampled}, {"of", report.rows}};
      }
    }
    regions.push_back({{"source", region.source},
                       {"result", region.result},
                       {"proofs", std::move(proofs)},
                       {"skipped", region.skipped},
                       {"unproved", region.unproved}});
  }
  return {{"identical_nodes", comparison.identical},
          {"regions", std::move(regions)},
          {"proved", comparison.proved()},
          {"failed", comparison.failed()}};
}

void print(const ModelComparison& comparison) {
  std::size_t proved = 0, partly = 0;
  long double closest = 0;
  for (const ComparedRegion& region : comparison.regions) {
    bool holds = region.unproved.empty(), sampled = false;
    if (!holds) {
      std::cout << "  not proved: " << in_quotes(region.result) << ": "
                << printable(region.unproved, 300) << '\n';
    }
    for (const concertina::Report& report : region.proofs) {
      if (report) {
        closest = std::max(closest, report.fraction());
        if (report.sampled > 0) {
          std::cout << "  " << in_quotes(region.result) << ": " << report << '\n';
          sampled = true;
        }
      } else {
        holds = false;
        std::cout << (report.undecided ? "  not proved: " : "  WRONG: ") << in_quotes(region.result)
                  << ": " << report << '\n';
      }
    }
    for (const std::string& skipped : region.skipped) {
      std::cout << "  " << in_quotes(region.result) << ": without the proof of "
                << printable(skipped, 300) << '\n';
    }
    if (holds) ++proved;
    if (holds && (sampled || !region.skipped.empty())) ++partly;
  }
  std::cout << "proved: " << proved << " of " << counted(std::ssize(comparison.regions), "region")
            << " that differ"
            << (partly > 0 ? ", " + std::to_string(partly) + " not by all proofs in full" : "")
            << (closest > 0 ? ", at most " + brief(closest) + " of the rounding bound" : "") << "; "
            << counted(static_cast<std::ptrdiff_t>(comparison.identical), "node") << " identical\n";
}

json to_json(const OutputComparison& comparison) {
  json differences = json::array(), stored = json::array();
  for (const OutputDifference& each : comparison.differences) {
    json one = {{"input", each.input},         {"output", each.output}, {"largest", each.largest},
                {"magnitude", each.magnitude},  // null for NaN
                {"where", each.where},         {"nans", each.nans},     {"failed", each.failed()}};
    if (each.stored.empty()) {
      differences.push_back(std::move(one));
    } else {
      one.update({{"model", each.model}, {"file", each.stored}, {"bound", each.bound}});
      stored.push_back(std::move(one));
    }
  }
  return {{"differences", std::move(differences)},
          {"stored", std::move(stored)},
          {"seconds", {{"before", comparison.before}, {"after", comparison.after}}},
          {"notes", comparison.notes},
          {"skipped", comparison.skipped}};
}

void print(const OutputComparison& comparison) {
  for (const OutputDifference& each : comparison.differences) {
    std::cout << (each.failed() ? "WRONG: " : "") << "run on " << each.input << " input, "
              << (each.stored.empty() ? "" : "the " + each.model + "'s ") << in_quotes(each.output)
              << " differs " << (each.stored.empty() ? "" : "from stored " + each.stored + " ")
              << "by ";
    if (each.largest == 0) {
      std::cout << "nothing";
    } else {
      std::cout << (std::isnan(each.largest) ? "NaN" : "at most " + brief(each.largest)) << " at "
                << each.where;
    }
    std::cout << (std::isnan(each.magnitude) ? ", of no finite values"
                                             : ", of values up to " + brief(each.magnitude));
    if (each.largest > 0 && each.magnitude > 0) {
      std::cout << " (" << brief(each.largest / each.magnitude) << " of that)";
    }
    if (each.failed() && each.nans == 0) std::cout << ", more than " << brief(each.bound);
    std::cout << (each.nans > 0 ? "; NaN in " + counted(each.nans, "element") : "") << '\n';
  }
  if (comparison.after > 0) {
    std::cout << "run one operator after another: " << brief(1e3 * comparison.before) << " ms -> "
              << brief(1e3 * comparison.after) << " ms\n";
  }
  for (const std::string& note : comparison.notes) {
    std::cout << "  " << printable(note, 300) << '\n';
  }
  if (!comparison.skipped.empty()) {
    std::cout << "not run: " << printable(comparison.skipped, 300) << '\n';
  }
}

/// Where large tensors go. Throws UsageError for what is no name of a file beside the output, or
/// is one of those that the input is in.
std::string external_data(const ModelCommand& command, const onnx::Model& model) {
  namespace fs = std::filesystem;
  const fs::path in(command.in), out(command.out);
  const bool external = std::ranges::any_of(
      model.initializers, [](const onnx::Tensor& tensor) { return !tensor.external.empty(); });
  std::string name = command.external_data;
  if (name.empty()) name = external ? out.filename().string() + ".data" : std::string();
  if (name.empty()) return name;
  if (fs::path(name).filename() != name || name == "." || name == ".." || name == out.filename()) {
    throw UsageError("--external-data: " + in_quotes(name) +
                     " is no name of a file beside the output");
  }
  std::set<fs::path> read = {in};
  for (const onnx::Tensor& tensor : model.initializers) {
    if (!tensor.external.empty()) read.insert(in.parent_path() / tensor.external);
  }
  for (const fs::path& file : read) {
    std::error_code ignored;
    if (fs::equivalent(file, out.parent_path() / name, ignored) ||
        fs::equivalent(file, out, ignored)) {
      throw UsageError("--external-data: " + in_quotes(name) + " would replace " +
                       in_quotes(file.string()) + ", which the input is in; name another file");
    }
  }
  return name;
}

/// Whether a file is taken for an ONNX model, and not for a safetensors file: by its first bytes,
/// where they tell, otherwise by its name.
bool is_model(const std::filesystem::path& path) {
  const bool named = path.extension() == ".onnx";
  std::error_code error;  // what is no file, such as a pipe, whoever reads it refuses
  if (!std::filesystem::is_regular_file(path, error)) return named;
  std::ifstream file(path, std::ios::binary);
  char head[9] = {};
  // The length of a safetensors header, then its brace; an ONNX model's first field is a small one.
  if (file.read(head, sizeof head) && head[8] == '{') return false;
  return named || (head[0] == 0x08 && head[1] > 0 && head[1] < 32);
}

/// A model, whether it is of a safetensors file's chain, and what of that no layer reads.
struct Source {
  onnx::Model model;
  bool chain = false;
  std::vector<std::string> unread = {};
  onnx::DataType stored = onnx::DataType::undefined;  // of all its tensors, where that is narrower
};

/// `described`: its metadata, where it has one, comes before --chain.
Source read(const ModelCommand& command, const std::string& path, bool described = false) {
  if (is_model(path)) {
    if (!command.dtype.empty()) throw UsageError("--dtype is for safetensors files");
    return {onnx::read_model(path)};
  }
  ChainOptions options{.chain = command.chain, .wide = command.dtype == "F64", .input = {}};
  const auto inputs = graph_options(command).inputs;
  if (const auto given = inputs.find("input"); given != inputs.end()) options.input = given->second;
  const concertina::io::Safetensors file = concertina::io::read_safetensors(path);
  if (described && file.metadata.contains("chain")) options.chain.reset();
  Source source{chain_model(file, options), true};
  std::set<concertina::io::Dtype> dtypes;
  for (const auto& [name, tensor] : file.tensors) {
    if (!std::ranges::count(source.model.initializers, name, &onnx::Tensor::name)) {
      source.unread.push_back(name);
    } else {
      dtypes.insert(tensor.dtype);
    }
  }
  using concertina::io::Dtype;
  if (dtypes == std::set{Dtype::F16}) source.stored = onnx::DataType::float16;
  if (dtypes == std::set{Dtype::BF16}) source.stored = onnx::DataType::bfloat16;
  return source;
}

/// "not read: 3 tensors that the chain does not name, such as "x""; nothing where all are.
void print_unread(const Source& source) {
  if (source.unread.empty()) return;
  std::cout << "  not read: " << counted(std::ssize(source.unread), "tensor") << " of "
            << printable(source.model.origin) << " that the chain does not name, such as "
            << in_quotes(source.unread.front()) << '\n';
}

/// Calls a chain's tensors, and the operators' version, as the model that it is compared with does.
void name_like(const onnx::Model& model, onnx::Model& chain) {
  const auto rename = [&](std::vector<onnx::ValueInfo>& infos, const std::string& name) {
    const std::string old = std::exchange(infos.front().name, name);
    infos.front().encoded = {};
    for (onnx::Node& node : chain.nodes) {
      node.encoded = {};
      std::ranges::replace(node.inputs, old, name);
      std::ranges::replace(node.outputs, old, name);
    }
  };
  const auto given = [&](const onnx::ValueInfo& input) {
    return std::ranges::find(model.initializers, input.name, &onnx::Tensor::name) ==
           model.initializers.end();
  };
  if (std::ranges::count_if(model.inputs, given) != 1 || model.outputs.size() != 1) return;
  rename(chain.inputs, std::ranges::find_if(model.inputs, given)->name);
  rename(chain.outputs, model.outputs.front().name);
  chain.opsets = model.opsets;
}

/// Throws UsageError for --chain where no file has layers to name.
void refuse_chain(const ModelCommand& command, bool read) {
  if (command.chain && !read)
    throw UsageError("--chain is for safetensors files, not for ONNX models");
}

/// Both run on the same input; a chain of unknown size is not, for it may be of images of any size.
OutputComparison run_both(const Source& source, const onnx::Model& result,
                          const ModelCommand& command) {
  const auto open = [](const onnx::Dimension& extent) { return !extent.value; };
  if (source.chain && !has_test_data(command.in) &&
      std::ranges::any_of(*source.model.inputs.front().shape | std::views::drop(1), open)) {
    OutputComparison comparison;
    comparison.skipped = "the size of the input is not known; name it with --input";
    return comparison;
  }
  return compare_outputs(source.model, result, graph_options(command), command.in);
}

/// What `out` is to be: a safetensors file of one layer, or a model.
bool is_layer(const std::string& out) {
  return std::filesystem::path(out).extension() == ".safetensors";
}

/// Throws InexactError, or FormatError where the border is not the reason.
[[noreturn]] void refuse_several(const Source& source, const ContractedModel& result,
                                 const ModelCommand& command) {
  const std::string where = command.in + ": no single layer equals this ";
  const std::string what = source.chain ? "chain" : "model";
  for (const LeftAlone& each : result.left) {
    if (each.remedy.find("--border") == std::string::npos) continue;
    const auto& input = source.model.inputs.front();
    const auto dims = input.shape.value_or(std::vector<onnx::Dimension>());
    std::string size;
    for (std::size_t axis = 0; axis < dims.size(); ++axis) {
      const std::size_t left = dims.size() - axis;
      const std::string name = axis == 0 ? "1" : left <= 3 ? std::string(1, "WHD"[left - 1]) : "C";
      size += (axis > 0 ? "x" : "") + (dims[axis].value ? std::to_string(*dims[axis].value) : name);
    }
    const bool open = each.remedy.find("--input") != std::string::npos;
    throw concertina::InexactError(
        where + what + (open ? " at every input size" : " at its input size") + ", from " +
        each.where + ": " + each.reason +
        "; pad the first layer instead, or accept one that is right " +
        (open ? "at one size, with --input " + input.name + "=" + size + ", or " : "") +
        "in the interior, with --border interior");
  }
  if (result.left.empty()) {
    throw concertina::FormatError(
        where + what +
        " as such a file holds it, a convolution or linear layer; write a model, -o NAME.onnx");
  }
  const LeftAlone& first = result.left.back();
  throw concertina::FormatError(where + what + ", from " + first.where + ": " + first.reason +
                                (first.remedy.empty() ? "" : " (" + first.remedy + ")"));
}

/// Throws UsageError for a file that must not be written.
void check_output(const ModelCommand& command, bool chain) {
  std::error_code ignored;
  if (std::filesystem::equivalent(command.in, command.out, ignored)) {
    throw UsageError("-o: " + in_quotes(command.out) +
                     " is the input, which would be lost; name another file");
  }
  if (is_layer(command.out)) {
    if (command.external_data.empty()) return;
    throw UsageError("--external-data is for ONNX models, not for a safetensors file");
  }
  if (chain && std::filesystem::path(command.out).extension() != ".onnx") {
    throw UsageError("-o: " + in_quotes(command.out) + " ends in neither .onnx nor .safetensors");
  }
}

/// Of rows that whoever made a model could not know.
std::uint64_t unforeseeable_seed() {
  std::random_device device;
  return std::uint64_t{device()} << 32 | device();
}

}  // namespace

ExitCode contract_file(const ModelCommand& command) {
  if (command.out.empty() && !(command.dtype.empty() && command.external_data.empty())) {
    throw UsageError("--dtype and --external-data are of what is written; name a file with -o");
  }
  if (!command.out.empty()) check_output(command, !is_model(command.in));
  Progress progress;
  progress.show("contracting " + command.in);
  const Source source = read(command, command.in);
  refuse_chain(command, source.chain);
  const ModelOptions options{.graph = graph_options(command),
                             .when = when_of(command.when, source.chain),
                             .equality = equality_of(command.border),
                             .only = command.only};
  const bool one_layer = is_layer(command.out);
  const std::string external =
      command.out.empty() || one_layer ? "" : external_data(command, source.model);
  const ContractedModel result = contract_model(source.model, options);
  onnx::Model wanted = result.model;
  if (!command.dtype.empty()) wanted = rounded(std::move(wanted), *layer_dtype(command.dtype));
  std::optional<concertina::io::Safetensors> layer;
  if (one_layer && !(layer = layer_file(wanted))) refuse_several(source, result, command);
  std::optional<ModelComparison> comparison;
  OutputComparison outputs;
  if (command.verify) {
    progress.show("verifying " + (command.out.empty() ? command.in : command.out));
    onnx::DataType stored = onnx::DataType::undefined;
    const onnx::Model written = as_rounded(result.model, wanted, stored);
    comparison = compare_models(source.model, written, options.graph,
                                {.equality = options.equality, .stored_after = stored});
    outputs = run_both(source, written, command);
  }
  const ExitCode code = comparison ? code_of(*comparison, outputs) : ok;
  const bool written = !command.out.empty() && code == ok;
  if (written && layer) {
    concertina::io::write_safetensors(command.out, *layer);
  } else if (written) {
    onnx::WriteOptions write;
    write.external_data = external;
    onnx::write_model(command.out, wanted, write);
  }
  progress.clear();
  if (command.json) {
    json document = to_json(result, command, source.model);
    if (comparison) {
      document["verification"] = to_json(*comparison);
      document["outputs"] = to_json(outputs);
    }
    if (!written) document["written"] = nullptr;
    document["unread"] = source.unread;
    std::cout << dumped(document) << '\n';
  } else {
    print(result, source.model);
    print_unread(source);
    if (comparison) {
      print(*comparison);
      print(outputs);
    }
    std::cout << (written               ? "wrote " + printable(command.out)
                  : command.out.empty() ? "nothing written, name a file with -o"
                                        : "nothing written: the result could not be verified")
              << '\n';
  }
  return code;
}

ExitCode verify_files(const ModelCommand& command) {
  Source source = read(command, command.in, true), result = read(command, command.out, true);
  refuse_chain(command, source.chain || result.chain);
  if (source.chain && !result.chain) name_like(result.model, source.model);
  if (result.chain && !source.chain) name_like(source.model, result.model);
  const ModelComparison comparison =
      compare_models(source.model, result.model, graph_options(command),
                     {.equality = equality_of(command.border),
                      .sample = {.rows = command.sample, .seed = unforeseeable_seed()},
                      .stored_before = source.stored,
                      .stored_after = result.stored});
  OutputComparison outputs = run_both(source, result.model, command);
  const auto folder_of = [](const std::string& path) {
    return std::filesystem::path(path).parent_path();
  };
  if (folder_of(command.in) != folder_of(command.out) && has_test_data(command.out)) {
    outputs.notes.push_back("test data beside " + command.out + " are not read");
  }
  if (command.json) {
    json document = to_json(comparison);
    document.update({{"file", command.in}, {"result", command.out}, {"outputs", to_json(outputs)}});
    document["unread"] = json::array({source.unread, result.unread});
    std::cout << dumped(document) << '\n';
  } else {
    print_unread(source);
    print_unread(result);
    print(comparison);
    print(outputs);
  }
  return code_of(comparison, outputs);
}

ExitCode show_file(ModelCommand command) {
  command.out.clear();
  const Source source = read(command, command.in);
  refuse_chain(command, source.chain);
  const onnx::Model& model = source.model;
  const ContractedModel result = contract_model(model, {.graph = graph_options(command),
                                                        .when = when_of(command.when, source.chain),
                                                        .equality = equality_of(command.border),
                                                        .only = command.only,
                                                        .tap_norms = command.svg});
  if (command.svg) {
    std::cout << draw_taps(result);
  } else if (command.json) {
    json document = to_json(result, command, model);
    document["unread"] = source.unread;
    std::cout << dumped(document) << '\n';
  } else {
    std::cout << printable(command.in) << ": " << counted(std::ssize(model.nodes), "node")
              << ", opset " << model.opset() << ", IR " << model.ir_version << '\n';
    print(result, model);
    print_unread(source);
  }
  return ok;
}

}  // namespace tool
