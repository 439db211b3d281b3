// The checks of one file.
// SPDX-License-Identifier: Apache-2.0
#include "proofs.hpp"

#include "networks/compact_network.hpp"
#include "networks/contraction.hpp"
#include "networks/inference.hpp"
#include "networks/read_layer.hpp"

#include <algorithm>
#include <cmath>
#include <map>
#include <optional>
#include <span>
#include <type_traits>

namespace tool {

using concertina::ComputedBy;
using concertina::Conv;
using concertina::ConvShape;
using concertina::Exactness;
using concertina::FeatureMap;
using concertina::MapShape;
using concertina::PerAxis;
using concertina::Report;
using concertina::detail::Precision;
using concertina::io::Dtype;

namespace {

constexpr std::size_t structure_limit = std::size_t{256} << 20;
constexpr Index most_elements = Index{1} << 27;  // in one feature map
constexpr Index most_padding = 4096;  // of layers after the first, whose borders are followed

/// Throws SizeError for metadata that would make the proofs run for hours: the library's are made
/// for layers.
template <int Rank>
void require_provable(const concertina::Form<Rank>& form, const std::string& file) {
  for (const ConvShape<Rank>& layer : form.leaves()) {
    for (int axis = 0; axis < Rank; ++axis) {
      const auto& padding = layer.padding;
      const auto sides = {padding.start[axis], padding.end[axis]};
      if (std::ranges::any_of(sides,
                              [](Index p) { return p < -most_padding || p > most_padding; })) {
        throw concertina::SizeError(file + ": a padding of " + to_string(padding.start) + ":" +
                                    to_string(padding.end) + " (" + to_string(layer) +
                                    ") is too large to verify; at most " +
                                    std::to_string(most_padding) + " is supported");
      }
    }
  }
}

/// Throws SizeError where a map on the way would not be modest. Returns the output's shape.
template <int Rank>
MapShape<Rank> require_modest_maps(const concertina::Form<Rank>& form, const MapShape<Rank>& map,
                                   const std::string& file) {
  if (numel(map) > most_elements) {
    throw concertina::SizeError(file + ": a map before " + to_string(form).substr(0, 200) +
                                " has " + std::to_string(numel(map)) + " elements, more than the " +
                                std::to_string(most_elements) + " that are applied");
  }
  MapShape<Rank> result = map;
  for (const concertina::Form<Rank>& part : form.parts()) {
    MapShape<Rank> reads = form.join() == concertina::Join::chain ? result : map;
    reads.channels = concertina::detail::channels(part.tree()).in;
    result = require_modest_maps(part, reads, file);
  }
  result = {.batch = map.batch,
            .channels = concertina::detail::channels(form.tree()).out,
            .size = form.output_size(map.size)};
  if (numel(result) > most_elements) {
    throw concertina::SizeError(file + ": the output of " + to_string(form).substr(0, 200) +
                                " has " + std::to_string(numel(result)) +
                                " elements, more than the " + std::to_string(most_elements) +
                                " that are applied");
  }
  return result;
}

/// Entries of the sparse matrices that prove_structure makes on the way.
template <int Rank>
Index structure_entries(const concertina::Form<Rank>& form, PerAxis<Rank> size) {
  using concertina::detail::checked_add, concertina::detail::toeplitz_entries;
  Index entries = toeplitz_entries(form.shape(size), size);
  for (const concertina::Form<Rank>& part : form.parts()) {
    entries = checked_add(entries, structure_entries(part, size), "structure");
    if (form.join() == concertina::Join::chain) size = part.output_size(size);
  }
  return entries;
}

/// Their bytes, twice: values and absolute values.
template <int Rank>
Index structure_bytes(const concertina::Form<Rank>& form, const PerAxis<Rank>& size) {
  constexpr Index entry = sizeof(long double) + sizeof(int);
  return concertina::detail::checked_multiply(2 * entry, structure_entries(form, size),
                                              "structure");
}

/// How far a value that was rounded to x can have been from it.
template <class Scalar>
Scalar half_ulp(const Precision& precision, Scalar x) {
  const long double least = precision.subnormal / 2;
  return static_cast<Scalar>(x == 0 ? least
                                    : std::max(std::ldexp(precision.unit, std::ilogb(x)), least));
}

/// Calls use(std::type_identity<Scalar>()) with a tensor's scalar, one that rounds.
template <class Use>
auto with_scalar_of(const concertina::io::Safetensors& file, const std::string& name, Use&& use) {
  switch (file.tensor(name).dtype) {
    case Dtype::F64: return use(std::type_identity<double>());
    case Dtype::F32: return use(std::type_identity<float>());
    case Dtype::F16: return use(std::type_identity<Eigen::half>());
    case Dtype::BF16: return use(std::type_identity<Eigen::bfloat16>());
    default:
      throw concertina::FormatError(file.origin + ": tensor " + in_quotes(name) + " is " +
                                    std::string(dtype_name(file.tensor(name))) +
                                    ", where floating point is expected");
  }
}

Precision precision_of(const concertina::io::Safetensors& file, const std::string& name) {
  return with_scalar_of(file, name, []<class Scalar>(std::type_identity<Scalar>) {
    return concertina::detail::precision_of<Scalar>();
  });
}

/// A tensor [batch, channels, spatial...].
template <class Ref, int Rank>
FeatureMap<Ref, Rank> read_map(const concertina::io::Safetensors& file, const std::string& name) {
  const auto& shape = file.tensor(name).shape;
  if (shape.size() != static_cast<std::size_t>(Rank) + 2) {
    throw concertina::FormatError(
        file.origin + ": tensor " + in_quotes(name) + " has " + std::to_string(shape.size()) +
        " axes, expected batch, channels and " + std::to_string(Rank) + " spatial ones");
  }
  MapShape<Rank> map{.batch = shape[0], .channels = shape[1]};
  for (int axis = 0; axis < Rank; ++axis)
    map.size[axis] = shape[static_cast<std::size_t>(axis) + 2];
  return {map, file.values<Ref>(name)};
}

template <class Scalar, int Rank>
class Prover {
 public:
  Prover(const concertina::io::Safetensors& file, const Node& graph,
         const Expr<Scalar, Rank>& expression, Progress& progress)
      : file_(file),
        graph_(graph),
        expression_(expression),
        form_(concertina::Form(expression)),
        progress_(progress) {}

  /// With `own_input` the layers of a network, compared on that; otherwise those of a file,
  /// compared on its tensors.
  FileProof prove(const Tensor<double>* own_input = nullptr) {
    require_modest(form_, file_.origin);
    require_provable(form_, file_.origin);
    const Conv<Scalar, Rank> contraction =
        step("contracting", [&] { return contracted(expression_); });
    proof_.layers = layer_count(graph_);
    proof_.contracted = to_string(contraction.shape());
    library_proofs(contraction);
    for (const Node* node : expected_nodes(graph_)) compare_expected(*node);
    for (const Node* node : inner_expected_nodes()) compare_expected(*node);
    if (own_input) {
      compare_with_layers(contraction, *own_input);
    } else {
      judge_border();
      if (file_.contains("input")) compare_outputs(contraction);
    }
    return std::move(proof_);
  }

 private:
  using Ref = concertina::detail::Reference<Scalar>;

  template <class Do>
  auto step(const std::string& what, Do&& work) {
    progress_.show(file_.origin + ": " + what);
    return work();
  }

  /// Expected nodes within the root, if it is one itself.
  std::vector<const Node*> inner_expected_nodes() const {
    std::vector<const Node*> nodes;
    if (!graph_.expected) return nodes;
    for (const Node& part : graph_.parts) {
      const auto more = expected_nodes(part);
      nodes.insert(nodes.end(), more.begin(), more.end());
    }
    return nodes;
  }

  void library_proofs(const Conv<Scalar, Rank>& contraction) {
    const PerAxis<Rank> size = concertina::smallest_input(form_);
    require_modest_maps(form_, MapShape<Rank>{.channels = contraction.shape().in, .size = size},
                        file_.origin);
    add(step("algebra", [&] { return prove_algebra(expression_, contraction); }));
    add(step("rounding", [&] {
      return concertina::prove_rounding<Accumulator<Scalar>>(expression_, contraction);
    }));
    std::string skipped;
    try {
      const Index bytes = structure_bytes(form_, size);
      if (static_cast<std::size_t>(bytes) > structure_limit) {
        skipped = "its matrices take " + std::to_string(bytes >> 20) + " MiB, more than " +
                  std::to_string(structure_limit >> 20);
      }
    } catch (const concertina::SizeError& error) {
      skipped = error.what();
    }
    if (!skipped.empty()) return skip("structure", skipped);
    add(step("structure", [&] {
      return concertina::prove_structure<Accumulator<Scalar>>(expression_, contraction, size);
    }));
  }

  void compare_expected(const Node& node) {
    const Expectation& expected = *node.expected;
    const Expr<Scalar, Rank> part =
        &node == &graph_ ? expression_ : read_linear_map<Scalar, Rank>(file_, node);
    LayerDescription description = expected.layer;
    if (!expected.has_geometry) {
      const auto geometry = concertina::Form(part).shape();
      const auto list = [](const PerAxis<Rank>& values) {
        return std::vector<Index>(values.begin(), values.end());
      };
      description.stride = list(geometry.stride);
      description.padding = list(geometry.padding.start);
      description.padding_end = list(geometry.padding.end);
      description.dilation = list(geometry.dilation);
      description.groups = geometry.groups;
    }
    auto layer = read_layer<Scalar, Rank>(file_, description);
    const auto storage = [&](const char* suffix) -> std::optional<Precision> {
      const std::string name = description.tensor(suffix);
      if (!file_.contains(name)) return std::nullopt;
      const Precision precision = precision_of(file_, name);
      if (precision.unit <= concertina::detail::unit_roundoff<Scalar>()) return std::nullopt;
      return precision;
    };
    const auto weight = storage("weight"), bias = storage("bias");
    Report report = step(description.name, [&] {
      // The file's kernel was computed in its own precision; in float where that only stores.
      if (!weight && !bias) return concertina::prove_rounding(part, layer);
      undo_storage(layer, contracted(part), weight, bias);
      return concertina::prove_rounding<float>(part, layer);
    });
    report.proof = description.name;
    add(std::move(report));
  }

  /// Replaces each element that was rounded once more to be stored: of those up to half an ulp
  /// away, any of which it may have been, by the nearest to the contraction's. So what then exceeds
  /// a bound exceeds it by more than storing explains.
  static void undo_storage(Conv<Scalar, Rank>& layer, const Conv<Scalar, Rank>& contraction,
                           const std::optional<Precision>& weight,
                           const std::optional<Precision>& bias) {
    if (!concertina::detail::incomparable(layer.shape(), contraction.shape()).empty()) return;
    const auto nearest = [](const Precision& storage, Scalar stored, Scalar wanted) {
      const Scalar most = half_ulp(storage, stored);
      // No rounding: both ends have one digit more than what is stored.
      return std::clamp(wanted, stored - most, stored + most);
    };
    const concertina::ConvView<const Scalar, Rank> view(contraction);
    std::size_t at = 0;
    if (weight) {
      const Conv<Scalar, Rank> stored = layer;
      concertina::detail::for_each_weight(
          concertina::ConvView<const Scalar, Rank>(stored),
          [&](Index o, Index c, const PerAxis<Rank>& offset, Scalar element) {
            layer.weight()[at++] =
                nearest(*weight, element, concertina::detail::tap_at(view, o, c, offset));
          });
    }
    for (std::size_t o = 0; bias && o < layer.bias().size(); ++o) {
      layer.bias()[o] =
          nearest(*bias, layer.bias()[o], view.bias().empty() ? Scalar(0) : view.bias()[o]);
    }
  }

  void judge_border() {
    const Exactness<Rank> everywhere = concertina::exactness(expression_);
    Exactness<Rank> found = everywhere;
    std::string size;
    if (!everywhere && file_.contains("input")) {
      const PerAxis<Rank> input = read_map<Ref, Rank>(file_, "input").shape().size;
      found = concertina::exactness(expression_, input);
      size = " at " + to_string(input);
    }
    proof_.exact = found.exact();
    proof_.border = "exact" + size;
    if (!proof_.exact) {
      proof_.border = "interior" + size + " (border " + to_string(found.start) + ":" +
                      to_string(found.end) + ")";
    }
    if (!graph_.exact) return;
    Report report{.proof = "exact", .compared = 1};
    if (*graph_.exact != proof_.exact) {
      report.failure = std::string("the file says ") + (*graph_.exact ? "everywhere" : "interior") +
                       ", the shapes say " + proof_.border;
    }
    add(std::move(report));
  }

  void compare_outputs(const Conv<Scalar, Rank>& contraction) {
    const FeatureMap<Ref, Rank> input = read_map<Ref, Rank>(file_, "input");
    const Index channels = contraction.shape().in;
    if (input.shape().channels != channels) {
      throw concertina::FormatError(file_.origin + ": an input of " +
                                    std::to_string(input.shape().channels) +
                                    " channels, the first layer reads " + std::to_string(channels));
    }
    const auto compare = [&](const std::string& name, ComputedBy by) {
      if (!file_.contains(name)) return;
      with_scalar_of(file_, name, [&]<class Stored>(std::type_identity<Stored>) {
        compare_output(name, contraction, input, read_map<Stored, Rank>(file_, name), by);
      });
    };
    compare("output", ComputedBy::layers);
    compare("output.contracted", ComputedBy::contraction);
  }

  /// The contraction against the layers one after another, both on this input.
  void compare_with_layers(const Conv<Scalar, Rank>& contraction, const Tensor<double>& input) {
    MapShape<Rank> shape{.batch = input.shape[0], .channels = input.shape[1]};
    for (int axis = 0; axis < Rank; ++axis) {
      shape.size[axis] = input.shape[static_cast<std::size_t>(axis) + 2];
    }
    const FeatureMap<Ref, Rank> x(shape,
                                  std::vector<Ref>(input.values.begin(), input.values.end()));
    require_modest_maps(form_, shape, file_.origin);
    using Leaf = concertina::detail::Leaf<Ref, Rank>;
    const Expr<Ref, Rank> layers(
        expression_.tree().map([](const auto& leaf) { return Leaf(leaf.template to<Ref>()); }));
    compare_output("on its own input", contraction, x, layers(x), ComputedBy::layers);
  }

  template <class Given>
  void compare_output(const std::string& name, const Conv<Scalar, Rank>& contraction,
                      const FeatureMap<Ref, Rank>& input, const FeatureMap<Given, Rank>& given,
                      ComputedBy by) {
    const MapShape<Rank> shape = require_modest_maps(form_, input.shape(), file_.origin);
    if (given.shape() != shape) {
      throw concertina::FormatError(file_.origin + ": tensor " + in_quotes(name) + " has " +
                                    std::to_string(given.shape().channels) + " channels of size " +
                                    to_string(given.shape().size) + ", the chain writes " +
                                    std::to_string(shape.channels) + " of size " +
                                    to_string(shape.size));
    }
    try {
      Report report = step(name, [&] {
        return concertina::prove_outputs<Accumulator<Scalar>>(expression_, contraction, input,
                                                              given, by);
      });
      if (report.compared == 0) return skip(name, "the border covers the whole map");
      report.proof = name;
      add(std::move(report));
    } catch (const concertina::VerificationError& error) {
      skip(name, error.what());
    }
  }

  void add(Report report) { proof_.findings.push_back({std::move(report), ""}); }
  void skip(const std::string& name, const std::string& why) {
    proof_.findings.push_back({Report{.proof = name}, why});
  }

  const concertina::io::Safetensors& file_;
  const Node& graph_;
  const Expr<Scalar, Rank>& expression_;
  concertina::Form<Rank> form_;
  Progress& progress_;
  FileProof proof_;
};

}  // namespace

bool FileProof::holds() const { return std::ranges::all_of(findings, &Finding::holds); }

const Finding& FileProof::finding(const std::string& name) const {
  return *std::ranges::find(findings, name,
                            [](const Finding& finding) { return finding.report.proof; });
}

namespace {

std::optional<Index> input_channels(const concertina::io::Safetensors& file) {
  if (!file.contains("input") || file.tensor("input").shape.size() < 2) return std::nullopt;
  return file.tensor("input").shape[1];
}

FileProof prove_linear_map(const concertina::io::Safetensors& file, const Node& graph,
                           Progress& progress, const Tensor<double>* own_input) {
  const AnyExpression expression =
      read_linear_map(file, graph, is_wide(file, graph),
                      own_input ? std::optional(own_input->shape[1]) : input_channels(file));
  return std::visit(
      [&]<class Scalar, int Rank>(const Expr<Scalar, Rank>& each) {
        return Prover<Scalar, Rank>(file, graph, each, progress).prove(own_input);
      },
      expression);
}

/// Keeps in `all` the worst of several reports, with what they compared added up.
void merge(Report& all, const Report& one, const std::string& layer) {
  all.compared += one.compared;
  all.ulps = std::max(all.ulps, one.ulps);
  if (all &&
      (!one || (!one.worst.empty() && (all.worst.empty() || one.fraction() > all.fraction())))) {
    all.worst = one.worst.empty() ? "" : layer + " " + one.worst;
    all.error = one.error;
    all.bound = one.bound;
  }
  if (all && !one) all.failure = layer + ": " + one.failure;
}

/// The batch that the file has for its network, bytes or floats.
Tensor<double> network_input(const concertina::io::Safetensors& file) {
  for (const char* name : {"images", "input"}) {
    if (file.contains(name)) return read_tensor<double>(file, name);
  }
  return {};
}

/// The class with the largest logit, for each row.
std::vector<Index> classes(const Tensor<double>& logits) {
  std::vector<Index> result;
  const Index width = logits.shape.at(1);
  for (auto row = logits.values.begin(); row != logits.values.end(); row += width) {
    result.push_back(std::max_element(row, row + width) - row);
  }
  return result;
}

/// The contracted network's float error no more than twice the expanded one's, both against a run
/// of the expanded network in double; and the same predictions, also as those that the file has.
void compare_networks(const concertina::io::Safetensors& file, const Node& graph,
                      const Tensor<double>& batch, FileProof& proof) {
  const CompactNetwork compact = compact_network(file, graph, Dtype::F32);
  const Node compact_graph = parse_graph(compact.file);
  const Tensor<double> right = run(Network<double>(file, graph), batch);
  const Tensor<double> expanded = run(Network<float>(file, graph), batch);
  const Tensor<double> contracted = run(Network<float>(compact.file, compact_graph), batch);
  Report logits{.proof = "logits", .compared = std::ssize(right.values), .worst = "float run"};
  logits.error = largest_difference(contracted, right);
  logits.bound = 2 * largest_difference(expanded, right);
  if (!(logits.error <= logits.bound)) {
    logits.failure = "the contracted network's float run is off by " + brief(logits.error) +
                     ", the expanded one's by " + brief(logits.bound / 2);
  }
  proof.findings.push_back({logits, ""});

  Report predictions{.proof = "predictions", .compared = right.shape.at(0)};
  const auto require_same = [&](const Tensor<double>& other, const std::string& whose) {
    if (predictions && classes(other) != classes(contracted)) {
      predictions.failure = "the contracted network predicts other classes than " + whose;
    }
  };
  require_same(right, "the expanded one in double");
  require_same(expanded, "the expanded one");
  for (const char* name : {"logits.expanded", "logits.compact"}) {
    if (!file.contains(name)) continue;
    const Tensor<double> stored = read_tensor<double>(file, name);
    if (stored.shape != right.shape) {
      throw concertina::FormatError(file.origin + ": tensor " + in_quotes(name) + " is " +
                                    to_text(stored.shape) + ", the network gives " +
                                    to_text(right.shape));
    }
    require_same(stored, name);
  }
  proof.findings.push_back({predictions, ""});
}

FileProof prove_network(const concertina::io::Safetensors& file, const Node& graph,
                        Progress& progress) {
  const std::vector<const Node*> nodes = expanded_nodes(graph);
  const Tensor<double> batch = network_input(file);
  std::map<const Node*, Tensor<double>> inputs;  // each layer's own, of one image
  if (!batch.values.empty()) {
    Tensor<double> image{batch.shape, {}};
    image.shape[0] = 1;
    image.values.assign(batch.values.begin(),
                        batch.values.begin() + std::ssize(batch.values) / batch.shape[0]);
    progress.show(file.origin + ": running the network");
    static_cast<void>(Network<double>(file, graph, Form::expanded,
                                      [&](const Node& node, const Tensor<double>& x) {
                                        inputs.insert_or_assign(&node, x);
                                      })(image));
  }
  FileProof proof;
  proof.layers = layer_count(graph);
  proof.contracted = counted(std::ssize(nodes), "contracted layer");
  proof.exact = true;
  proof.border = "exact";
  for (const Node* node : nodes) {
    const auto input = inputs.find(node);
    const std::string& name = compact_name(*node);
    const FileProof one =
        prove_linear_map(file, *node, progress, input == inputs.end() ? nullptr : &input->second);
    for (const Finding& finding : one.findings) {
      const std::string proof_name =
          finding.report.proof == name ? "expected layers" : finding.report.proof;
      auto all = std::ranges::find(proof.findings, proof_name,
                                   [](const Finding& each) { return each.report.proof; });
      if (all == proof.findings.end()) {
        proof.findings.push_back({Report{.proof = proof_name}, ""});
        all = proof.findings.end() - 1;
      }
      if (!finding.skipped.empty()) {
        all->skipped = name + ": " + finding.skipped;
      } else {
        merge(all->report, finding.report, name);
      }
    }
  }
  if (nodes.empty()) {
    proof.findings.push_back(
        {Report{.proof = "rounding"}, "no node has a name or an expected layer"});
  }
  progress.show(file.origin + ": running the contracted network");
  if (!batch.values.empty()) compare_networks(file, graph, batch, proof);
  return proof;
}

}  // namespace

FileProof prove(const concertina::io::Safetensors& file, const Node& graph, Progress& progress) {
  return is_linear(graph) ? prove_linear_map(file, graph, progress, nullptr)
                          : prove_network(file, graph, progress);
}

}  // namespace tool
