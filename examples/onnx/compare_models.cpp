// SPDX-License-Identifier: Apache-2.0
#include "onnx/compare_models.hpp"

#include "onnx/value_numbers.hpp"
#include "text.hpp"

#include <algorithm>
#include <functional>
#include <map>
#include <optional>
#include <set>
#include <string_view>
#include <utility>

namespace tool {

bool ModelComparison::proved() const {
  return std::ranges::all_of(regions, &ComparedRegion::proved);
}

bool ModelComparison::failed() const {
  return std::ranges::any_of(regions, &ComparedRegion::failed);
}

namespace {

/// Multiply-adds that take as long as following a chain by one map.
constexpr double each_followed = 500;

/// Multiply-adds that take as long as planning what is contracted and proved of a chain.
double planning(Segments segments) {
  const double maps = count_maps(segments);
  return (60'000 + 1000 * maps) * maps;
}

/// Fingerprints of two regions that may be equal, rounded to 16 bits or not.
constexpr double most_apart = 0.01;

/// The fields of a ModelProto that hold functions, which decide what nodes compute.
constexpr std::uint32_t functions = 25;

/// The fields of one number, of those that are kept as bytes.
std::vector<std::byte> kept(const std::vector<onnx::Field>& fields, std::uint32_t number) {
  std::vector<std::byte> bytes;
  for (const onnx::Field& field : fields) {
    if (field.number == number) {
      bytes.insert(bytes.end(), field.encoded.begin(), field.encoded.end());
    }
  }
  return bytes;
}

/// Whether a tensor may be of both declarations: what one leaves open, the other says.
bool compatible(const onnx::ValueInfo& a, const onnx::ValueInfo& b) {
  if (a.type != b.type && a.type != onnx::DataType::undefined &&
      b.type != onnx::DataType::undefined) {
    return false;
  }
  if (!a.shape || !b.shape) return true;
  return std::ranges::equal(*a.shape, *b.shape, [](const auto& p, const auto& q) {
    return !p.value || !q.value || *p.value == *q.value;
  });
}

/// The versions of the operators that a model uses; of all that it imports where graphs of nodes or
/// functions may use them.
std::map<std::string, std::int64_t> versions_of(const Graph& graph) {
  const onnx::Model& model = graph.model();
  const auto name = [](const std::string& domain) {
    return domain == "ai.onnx" ? std::string() : domain;
  };
  std::set<std::string> used{""};
  bool all = !kept(model.model_fields, functions).empty();
  for (const onnx::Node& node : model.nodes) {
    used.insert(name(node.domain));
    all = all || !std::ranges::all_of(node.attributes, is_plain);
  }
  std::map<std::string, std::int64_t> versions;
  for (const onnx::OperatorSet& each : model.opsets) {
    if (all || used.contains(name(each.domain))) versions[name(each.domain)] = each.version;
  }
  return versions;
}

/// Why two models are not to be compared node by node; empty where they may be.
std::string differing_frames(const Graph& a, const Graph& b) {
  const auto values = [](const std::vector<onnx::ValueInfo>& list, const Graph& graph) {
    std::vector<std::pair<std::string, onnx::DataType>> result;
    for (const onnx::ValueInfo& info : list) {
      if (!graph[graph.find(info.name)].constant) result.emplace_back(info.name, info.type);
    }
    return result;
  };
  const onnx::Model &f = a.model(), &g = b.model();
  if (values(f.inputs, a) != values(g.inputs, b)) return "their inputs are others";
  if (!std::ranges::equal(f.outputs, g.outputs, {}, &onnx::ValueInfo::name,
                          &onnx::ValueInfo::name)) {
    return "their outputs are others";
  }
  for (const auto list : {&onnx::Model::inputs, &onnx::Model::outputs}) {
    std::map<std::string_view, const onnx::ValueInfo*> others;
    for (const onnx::ValueInfo& info : g.*list) others.emplace(info.name, &info);
    for (const onnx::ValueInfo& info : f.*list) {
      const auto other = others.find(info.name);
      if (other != others.end() && !compatible(info, *other->second)) {
        return "they declare " + in_quotes(info.name) + " of other types or shapes";
      }
    }
  }
  if (versions_of(a) != versions_of(b)) return "they import operators of other versions";
  constexpr std::uint32_t sparse_initializers = 15;
  if (kept(f.model_fields, functions) != kept(g.model_fields, functions)) {
    return "their functions differ";
  }
  if (kept(f.graph_fields, sparse_initializers) != kept(g.graph_fields, sparse_initializers)) {
    return "their sparse initializers differ";
  }
  // Initializers that a caller may replace, and those that are outputs, are read by name.
  const auto named = [](const Graph& graph) {
    std::map<std::string_view, const onnx::Tensor*> result;
    for (const onnx::Tensor& tensor : graph.model().initializers) {
      const GraphTensor& t = graph[graph.find(tensor.name)];
      if (!t.constant || t.escapes) result.emplace(tensor.name, &tensor);
    }
    return result;
  };
  const auto same = [](const auto& p, const auto& q) {
    return p.first == q.first && same_constant(*p.second, *q.second);
  };
  if (!std::ranges::equal(named(a), named(b), same)) {
    return "their initializers that are inputs or outputs differ";
  }
  return {};
}

/// Tensors that have to be compared, each with the segments that make it, which are none where no
/// map does.
using Regions = std::map<int, std::vector<Segment>>;

/// Whether two tensors may have the same extents, as far as they are known.
bool may_be_of_same_size(const GraphTensor& a, const GraphTensor& b) {
  if (!a.dims || !b.dims) return true;
  return std::ranges::equal(
      *a.dims, *b.dims, [](Index p, Index q) { return p == q || p == unknown || q == unknown; });
}

/// What could not be proved of a tensor.
struct Failure {
  ComparedRegion region;
  int tensor = -1;           ///< of `b`
  int other = -1;            ///< of `a`, that it is by its name; -1 where none is
  int from = -1;             ///< of `b`, the source of the region
  std::set<int> nodes = {};  ///< of `b`, that make it
};

/// Sweeps over `b` from the inputs on: what has the value number of a tensor of `a` is it. What has
/// not is compared, by proof, with what `a` makes of the same source; then it has its number.
class Comparison {
 public:
  Comparison(const Graph& a, const Graph& b, const RegionProofs& how, const Budget& budget)
      : a_(a),
        b_(b),
        how_(how),
        budget_(budget),
        inner_(budget.part(0.25)),
        within_{.a = LinearGraph(a), .b = LinearGraph(b)},
        a_numbers_(within_.a, table_),
        b_numbers_(within_.b, table_made_by_a(), &a_numbers_),
        uncertain_(b.tensors().size()) {}

  ModelComparison run() {
    std::vector<int> wanted, made;  // outputs that differ
    for (const onnx::ValueInfo& output : b_.model().outputs) {
      const int tensor = b_.find(output.name), other = a_.find(output.name);
      outputs_.insert(tensor);
      if (other < 0 || a_numbers_[other] == b_numbers_[tensor]) continue;
      wanted.push_back(other);
      made.push_back(tensor);
    }
    try {
      sweep(wanted, made);
    } catch (const BudgetError& error) {
      comparison_.regions.push_back({.result = "the model", .unproved = error.what()});
    }
    const auto is_proved = [&](int tensor) {
      return is_settled(tensor) && !uncertain_[at(tensor)];
    };
    if (std::ranges::all_of(made, is_proved)) {
      // What differs on the way to them does not matter.
      std::erase_if(comparison_.regions, [](const ComparedRegion& each) { return !each.proved(); });
    } else if (comparison_.proved()) {
      comparison_.regions.push_back(
          {.result = "the model", .unproved = "its outputs are not known to be the same"});
    }
    if (const std::string why = differing_frames(a_, b_); !why.empty()) {
      comparison_.regions.push_back({.result = "the model", .unproved = why});
    }
    count_identical();
    return std::move(comparison_);
  }

 private:
  /// Both models' maps, and regions of `a` that tensors of `b` may be.
  struct Sides {
    LinearGraph a, b;
    Regions regions = {};
    struct Place {
      int end;
      std::size_t depth;  // of the segment that begins there
    };
    std::map<int, std::vector<Place>> through = {};  // by value numbers
  };

  ValueTable& table_made_by_a() {
    known_ = table_.count();
    return table_;
  }

  bool is_known(int tensor) const { return b_numbers_[tensor] < known_; }
  static bool is_leaf(const Graph& graph, int tensor) {
    return graph[tensor].constant || graph[tensor].producer < 0;
  }
  /// The tensor of `a` that one of `b` has to be, or may be by its name; -1 where there is none.
  int namesake(int tensor) const { return a_.find(b_[tensor].name); }

  void sweep(const std::vector<int>& wanted, const std::vector<int>& made) {
    if (made.empty()) return;
    shared_.clear();
    for (int t = 0; t < std::ssize(b_.tensors()); ++t) shared_.insert(b_numbers_[t]);
    wanted_ = wanted;
    is_shared_ = [this](int tensor) { return shared_.contains(a_numbers_[tensor]); };
    find_regions(within_);
    const Regions regions =
        regions_to(within_.b, made, [this](int tensor) { return is_known(tensor); });
    for (int n = 0; n < std::ssize(b_.model().nodes); ++n) {
      update(n);
      for (std::size_t o = 0; o < b_.node(n).outputs.size(); ++o) {
        const int output = b_.output(n, o);
        if (output < 0 || b_[output].constant) continue;
        const auto region = regions.find(output);
        if (region == regions.end()) continue;
        if (is_settled(output)) continue;
        if (!region->second.empty()) {
          compare(output, region->second);
        } else if (!is_namesakes(n, output)) {
          report_node(n, output);
        }
      }
    }
    judge_names();
  }

  template <class Visit>
  static void for_each_input(const Graph& graph, int node, const Visit& visit) {
    for (std::size_t i = 0; i < graph.node(node).inputs.size(); ++i) {
      if (const int input = graph.input(node, i); input >= 0) visit(input);
    }
    for (const std::string& name : graph.node(node).captured) {
      if (const int input = graph.find(name); input >= 0) visit(input);
    }
  }

  /// Numbers what a node makes, which is as uncertain as what it reads.
  void update(int node) {
    b_numbers_.update(node);
    bool uncertain = false;
    for_each_input(b_, node, [&](int input) { uncertain = uncertain || uncertain_[at(input)]; });
    for (std::size_t o = 0; uncertain && o < b_.node(node).outputs.size(); ++o) {
      if (const int output = b_.output(node, o); output >= 0) uncertain_[at(output)] = true;
    }
  }

  static std::size_t at(int tensor) { return static_cast<std::size_t>(tensor); }

  std::vector<Segment> follow(const LinearGraph& linear, int tensor) {
    std::vector<Segment> segments = segments_to(linear, tensor, [](int) { return false; });
    budget_.take("finding what it is made of", 0, each_followed * (1 + count_maps(segments)));
    return segments;
  }

  /// From some tensors back: those that operators read which are no linear maps, up to what is
  /// settled.
  Regions regions_to(const LinearGraph& linear, std::vector<int> tensors,
                     const std::function<bool(int tensor)>& is_settled) {
    const Graph& graph = linear.graph();
    Regions regions;
    while (!tensors.empty()) {
      const int tensor = tensors.back();
      tensors.pop_back();
      if (is_leaf(graph, tensor) || regions.contains(tensor)) continue;
      const std::vector<Segment>& segments = regions[tensor] = follow(linear, tensor);
      if (is_settled(tensor)) continue;
      if (segments.empty()) {
        for_each_input(graph, graph[tensor].producer, [&](int each) { tensors.push_back(each); });
      } else if (std::ranges::none_of(segments, is_settled, &Segment::from)) {
        tensors.push_back(segments.back().from);
      }
    }
    return regions;
  }

  /// Finds the regions of `a` that have to be compared.
  void find_regions(Sides& sides) {
    sides.regions = regions_to(sides.a, wanted_, is_shared_);
    for (const auto& [tensor, segments] : sides.regions) {
      for (std::size_t depth = 0; depth < segments.size(); ++depth) {
        sides.through[a_numbers_[segments[depth].from]].push_back({.end = tensor, .depth = depth});
      }
    }
  }

  /// Whether an operator is the other model's of the same name, as what it reads is proved to be
  /// what that reads, although it is other values of the other model too.
  bool is_namesakes(int node, int tensor) {
    const int other = namesake(tensor);
    if (other < 0 || !is_made_alike(other, node)) return false;
    const int twin = a_[other].producer;
    const std::size_t inputs = b_.node(node).inputs.size();
    if (a_.node(twin).inputs.size() != inputs) return false;
    std::vector<std::pair<int, int>> before;  // tensors and their numbers
    for (std::size_t i = 0; i < inputs; ++i) {
      const int read = a_.input(twin, i), own = b_.input(node, i);
      if (read < 0 || own < 0 || a_numbers_[read] == b_numbers_[own]) continue;
      if (is_leaf(a_, read) || is_leaf(b_, own) || !is_known(own)) break;
      before.emplace_back(own, b_numbers_[own]);
      if (prove_alone(own, read, follow(within_.b, own), within_, false, budget_)) break;
    }
    b_numbers_.update(node);
    for (const auto& [own, number] : before) b_numbers_.set(own, number);
    return is_settled(tensor);
  }

  /// An operator that is no map, or of maps of several tensors, and is none of the other model's.
  void report_node(int node, int tensor) {
    bool settled = true;  // else what it reads was reported
    for_each_input(
        b_, node, [&](int input) { settled = settled && (is_known(input) || is_leaf(b_, input)); });
    if (!settled) return;
    if (differing_.insert(node).second) {  // one report of all that it makes
      comparison_.regions.push_back({.result = b_[tensor].name,
                                     .unproved = "the other model has no " + b_.node(node).op_type +
                                                 " like " + describe(b_, node) +
                                                 ", of the same inputs and attributes"});
    }
    const int other = namesake(tensor);
    if (other >= 0 && (outputs_.contains(tensor) || is_made_alike(other, node))) {
      b_numbers_.set(tensor, a_numbers_[other]);
      uncertain_[at(tensor)] = true;
    }
  }

  bool is_made_alike(int other, int node) const {
    const int producer = a_[other].producer;
    return producer >= 0 && a_.node(producer).op_type == b_.node(node).op_type;
  }

  /// Compares a tensor, and what is before it in its region. That has to be equal only where what
  /// follows is not known to be.
  void compare(int tensor, const std::vector<Segment>& segments) {
    std::optional<Failure> failure;
    for (std::size_t i = segments.size(); i-- > 0;) {
      for (std::size_t m = segments[i].maps.size(); m-- > 0;) {
        const LinearNode& map = *segments[i].maps[m];
        for (const int node : map.nodes) update(node);
        for (const int made : map.outputs) {
          if (made == tensor || is_known(made)) continue;
          std::optional<Failure> inner = prove_inner(made, made == segments[i].to);
          if (!inner || !inner->region.failed() || inner->other < 0) continue;
          alike_ = true;
          if (!failure) failure = prove(tensor, segments);
          alike_ = false;
          if (!failure) return;
          report(*inner);
        }
      }
    }
    if (is_settled(tensor)) return;
    failure = prove(tensor, segments);
    if (failure) report(*failure);
  }

  /// A tensor within a region, if the budget for such allows it.
  std::optional<Failure> prove_inner(int tensor, bool all_pass) {
    if (!all_pass && namesake(tensor) < 0) return std::nullopt;
    try {
      // From what is known on, if that is one tensor.
      std::vector<Segment> segments = segments_to(within_.b, tensor, [&](int node) {
        const int made = b_.output(node);
        return made >= 0 && made != tensor && is_known(made);
      });
      if (segments.empty()) segments = follow(within_.b, tensor);
      return prove_alone(tensor, namesake(tensor), segments, within_,
                         all_pass && !outputs_.contains(tensor), inner_);
    } catch (const BudgetError&) {
      return std::nullopt;
    }
  }

  std::optional<Failure> prove(int tensor, const std::vector<Segment>& segments) {
    const bool any = !outputs_.contains(tensor);
    std::optional<Failure> failure =
        prove_alone(tensor, namesake(tensor), segments, within_, any, budget_);
    if (!failure) return std::nullopt;
    // A linear layer may come right after a flattening in one of them alone.
    if (!apart_) {
      apart_.emplace(Sides{.a = LinearGraph(a_, Flattenings::apart),
                           .b = LinearGraph(b_, Flattenings::apart)});
      find_regions(*apart_);
    }
    const std::vector<Segment> otherwise = follow(apart_->b, tensor);
    const bool same = std::ranges::equal(otherwise, segments, {}, &Segment::from, &Segment::from);
    if (same && (alike_ || !failure->region.proofs.empty())) return failure;
    std::optional<Failure> second =
        prove_alone(tensor, namesake(tensor), otherwise, *apart_, any, budget_);
    if (!second) return std::nullopt;
    return failure->region.proofs.empty() && !second->region.proofs.empty() ? second : failure;
  }

  void report(const Failure& failure) {
    comparison_.regions.push_back(failure.region);
    differing_.insert(failure.nodes.begin(), failure.nodes.end());
    ComparedRegion& region = comparison_.regions.back();
    if (failure.from >= 0 && uncertain_[at(failure.from)]) {
      region.doubt("what it begins with is not proved");
    }
    if (failure.other < 0) return;
    // Whether what follows is the same may be asked all the same.
    b_numbers_.set(failure.tensor, a_numbers_[failure.other]);
    uncertain_[at(failure.tensor)] = true;
  }

  bool is_settled(int tensor) const {
    if (!outputs_.contains(tensor)) return is_known(tensor);
    const int other = namesake(tensor);
    return other >= 0 && b_numbers_[tensor] == a_numbers_[other];
  }

  struct Candidate {
    int tensor;
    Segments segments;  // from the source
  };

  /// The namesake, where `a` makes it of the value.
  std::vector<Candidate> namesake_of(int same, int source, Sides& sides) {
    if (same < 0) return {};
    const auto [at, added] = sides.regions.try_emplace(same);
    if (added) at->second = follow(sides.a, same);
    const Segments segments = at->second;
    const auto from = std::ranges::find(
        segments, source, [&](const Segment& segment) { return a_numbers_[segment.from]; });
    if (from == segments.end()) return {};
    return {{same, segments.first(static_cast<std::size_t>(from - segments.begin()) + 1)}};
  }

  /// What else `a` makes of the value of which the region makes the tensor, with the same extents;
  /// of many what is like it, the closest first.
  std::vector<Candidate> others_of(int tensor, int same, Segments part, Sides& sides,
                                   Budget& budget) {
    const int source = b_numbers_[part.back().from];
    std::vector<Candidate> candidates;
    const auto places = sides.through.find(source);
    if (places == sides.through.end()) return candidates;
    std::set<int> seen{same};
    for (const auto& [end, depth] : places->second) {
      budget.take("comparing it", 0, 1000 * static_cast<double>(depth + 1));
      const Segments segments = sides.regions.at(end);
      for (std::size_t i = 0; i <= depth; ++i) {
        const int other = segments[i].to;
        if (may_be_of_same_size(a_[other], b_[tensor]) && seen.insert(other).second) {
          candidates.push_back({other, segments.subspan(i, depth - i + 1)});
        }
      }
    }
    if (candidates.size() < 2) return candidates;
    budget.take("comparing it", 0, planning(part) / 10);
    const Fingerprint own = fingerprint(b_, part, budget);
    std::vector<std::pair<double, Candidate>> alike;
    for (const Candidate& each : candidates) {
      const auto [at, added] = fingerprints_.try_emplace({each.tensor, source});
      if (added) {
        budget.take("comparing it", 0, planning(each.segments) / 10);
        at->second = fingerprint(a_, each.segments, budget);
      }
      const double distance = own.distance(at->second);
      if (distance < most_apart) alike.emplace_back(distance, each);
    }
    std::ranges::sort(alike, {},
                      [](const auto& each) { return std::pair(each.first, each.second.tensor); });
    candidates.clear();
    for (const auto& each : alike) candidates.push_back(each.second);
    return candidates;
  }

  /// The same of the tensor alone, which may be `same` of `a`, if that is not -1: from the nearest
  /// value on of which `a` makes that, or if `any` something of the kind.
  std::optional<Failure> prove_alone(int tensor, int same, Segments segments, Sides& sides,
                                     bool any, Budget& budget) {
    std::optional<Failure> failure;
    for (std::size_t depth = 0; depth < segments.size() && !failure; ++depth) {
      const int from = segments[depth].from;
      if (!is_known(from)) continue;
      const Segments part = segments.first(depth + 1);
      const auto prove_one_of = [&](const std::vector<Candidate>& candidates) {
        return std::ranges::any_of(candidates, [&](const Candidate& each) {
          return prove_pair(tensor, part, each, same, budget, failure);
        });
      };
      if (prove_one_of(namesake_of(same, b_numbers_[from], sides)) ||
          (any && prove_one_of(others_of(tensor, same, part, sides, budget)))) {
        return std::nullopt;
      }
    }
    if (!failure) {
      failure = Failure{.region = {.result = b_[tensor].name,
                                   .unproved = "no tensor that both models have leads to it by "
                                               "linear maps alone"},
                        .tensor = tensor,
                        .other = same};
    } else if (failure->other < 0) {
      failure->region.doubt("it may be none of the other model's tensors");
    }
    return failure;
  }

  /// Whether a tensor is proved to be the candidate; else that is the failure, if it tells more.
  bool prove_pair(int tensor, Segments part, const Candidate& candidate, int same, Budget& budget,
                  std::optional<Failure>& failure) {
    std::set<int> nodes;
    for (const Segment& segment : part) {
      for (const LinearNode* map : segment.maps) nodes.insert(map->nodes.begin(), map->nodes.end());
    }
    const int from = part.back().from;
    ComparedRegion region{.source = a_[candidate.segments.back().from].name,
                          .result = b_[tensor].name};
    try {
      budget.take("comparing it", 0,
                  (planning(part) + planning(candidate.segments)) / (alike_ ? 10 : 1));
      const bool far =
          alike_ &&
          fingerprint(b_, part, budget).distance(fingerprint(a_, candidate.segments, budget)) >
              most_apart;
      if (far) {
        region.unproved = "it is another map";
      } else {
        prove_region(a_, candidate.segments, b_, part, how_, budget, region);
      }
    } catch (const BudgetError& error) {
      region.unproved = error.what();
    }
    if (region.proved()) {
      comparison_.regions.push_back(std::move(region));
      differing_.merge(nodes);
      b_numbers_.set(tensor, a_numbers_[candidate.tensor]);
      uncertain_[at(tensor)] = uncertain_[at(from)];
      return true;
    }
    // What is not wrong may be it.
    const bool may_be = region.unproved.empty() && !region.failed();
    if (!failure || (may_be && failure->region.failed())) {
      const int other = candidate.tensor == same ? same : -1;
      failure = Failure{std::move(region), tensor, other, from, std::move(nodes)};
    }
    return false;
  }

  /// Where names are of other tensors, what is compared by its name may be another one.
  void judge_names() {
    const auto misleads = [&](int tensor) {
      const int other = namesake(tensor);
      return !is_leaf(b_, tensor) && !outputs_.contains(tensor) && is_known(tensor) &&
             !uncertain_[at(tensor)] && other >= 0 && a_numbers_[other] != b_numbers_[tensor];
    };
    bool misled = false;
    for (int t = 0; t < std::ssize(b_.tensors()); ++t) misled = misled || misleads(t);
    if (!misled) return;
    for (ComparedRegion& region : comparison_.regions) {
      const int tensor = b_.find(region.result);
      if (tensor >= 0 && outputs_.contains(tensor)) continue;
      region.doubt("the models' names are not of the same tensors");
    }
  }

  /// Counts the nodes that matter and are the other model's.
  void count_identical() {
    std::set<int> seen;
    std::vector<int> tensors(outputs_.begin(), outputs_.end());
    while (!tensors.empty()) {
      const int tensor = tensors.back(), node = b_[tensor].producer;
      tensors.pop_back();
      if (is_leaf(b_, tensor) || !seen.insert(node).second) continue;
      if (!b_numbers_.passes_on(node) && !differing_.contains(node) && is_known(tensor)) {
        ++comparison_.identical;
      }
      for_each_input(b_, node, [&](int input) { tensors.push_back(input); });
    }
  }

  const Graph &a_, &b_;
  const RegionProofs& how_;
  Budget budget_, inner_;  // of what has to be compared, and of what is in between
  Sides within_;
  std::optional<Sides> apart_;  // with flattenings apart
  bool alike_ = false;          // whether only regions of like fingerprints are compared
  ValueTable table_;
  int known_ = 0;  // numbers below it are of `a`
  ValueNumbers a_numbers_, b_numbers_;
  std::set<int> outputs_;  // of `b`
  std::vector<int> wanted_;
  std::set<int> shared_;  // numbers that `b` had when the sweep began
  std::function<bool(int)> is_shared_;
  std::map<std::pair<int, int>, Fingerprint> fingerprints_;  // of tensors of `a`, by source
  std::vector<bool> uncertain_;  // tensors of `b`, as is what they are made of
  std::set<int> differing_;      // nodes of `b`
  ModelComparison comparison_;
};

}  // namespace

ModelComparison compare_models(const onnx::Model& model, const onnx::Model& result,
                               const GraphOptions& options, const RegionProofs& how) {
  const Graph a(model, options), b(result, options);
  return Comparison(a, b, how, options.budget).run();
}

}  // namespace tool
