// SPDX-License-Identifier: Apache-2.0
#include "onnx/compare_models.hpp"

#include "onnx/proof_cost.hpp"
#include "onnx/region_expression.hpp"
#include "text.hpp"

#include <concertina/detail/io/protobuf.hpp>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <functional>
#include <map>
#include <new>
#include <numeric>
#include <optional>
#include <set>
#include <string_view>
#include <utility>

namespace tool {

bool ModelComparison::proved() const {
  return std::ranges::all_of(regions, [](const ComparedRegion& region) {
    return region.unproved.empty() &&
           std::ranges::all_of(region.proofs, [](const auto& report) { return bool(report); });
  });
}

bool ModelComparison::failed() const {
  return std::ranges::any_of(regions, [](const ComparedRegion& region) {
    return std::ranges::any_of(region.proofs,
                               [](const auto& report) { return !report && !report.undecided; });
  });
}

namespace {

/// Multiply-adds that take as long as following a chain by one map.
constexpr double each_followed = 500;

/// What a file says of a tensor but its name: of strings and types that are not known the elements,
/// which are kept in no other way.
std::vector<std::byte> encoded(const onnx::Tensor& tensor) {
  constexpr std::uint32_t name = 8, doc_string = 12;
  const onnx::detail::Source source{tensor.name, tensor.encoded};
  onnx::detail::Message fields(source, tensor.encoded, "TensorProto");
  std::vector<std::byte> bytes;
  while (fields.next()) {
    if (fields.number() == name || fields.number() == doc_string) continue;
    bytes.insert(bytes.end(), fields.encoded().begin(), fields.encoded().end());
  }
  return bytes;
}

bool same_constant(const onnx::Tensor& a, const onnx::Tensor& b) {
  return a.type == b.type && a.dims == b.dims && std::ranges::equal(a.elements, b.elements) &&
         (onnx::size_of(a.type) > 0 || encoded(a) == encoded(b));
}

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

/// A model whose tensors are what they hold: what Identity makes, and Dropout that drops nothing,
/// is their input.
class Resolved {
 public:
  explicit Resolved(const LinearGraph& linear)
      : linear_(linear), origins_(graph().tensors().size()) {
    std::iota(origins_.begin(), origins_.end(), 0);
    for (int n = 0; n < std::ssize(graph().model().nodes); ++n) {
      const std::string& op = graph().node(n).op_type;
      const int output = graph().output(n);
      if (output < 0 || (op != "Identity" && op != "Dropout")) continue;
      const LinearNode* const map = linear.maker(output);
      if (!map || map->nodes.back() != n) continue;
      origins_[static_cast<std::size_t>(output)] = origin(graph().input(n, 0));
    }
  }

  const Graph& graph() const { return linear_.graph(); }
  const LinearGraph& linear() const { return linear_; }
  /// -1 of -1.
  int origin(int tensor) const {
    return tensor < 0 ? -1 : origins_[static_cast<std::size_t>(tensor)];
  }
  /// That of a name; -1 where there is none.
  int find(std::string_view name) const { return origin(graph().find(name)); }
  /// Whether the node only passes on what it reads.
  bool passes_on(int node) const {
    const int output = graph().output(node);
    return output >= 0 && origin(output) != output;
  }

 private:
  const LinearGraph& linear_;
  std::vector<int> origins_;
};

/// Tensors of one model by those of the other, where names differ: found from the outputs back, as
/// what equal nodes read.
class Renamed {
 public:
  /// The other model's name of a tensor.
  const std::string& operator()(const std::string& name) const {
    const auto found = names_.find(name);
    return found == names_.end() ? name : found->second;
  }
  /// Takes a tensor for another one, which it was not yet.
  void take(const std::string& name, const std::string& other) { names_.emplace(name, other); }
  void forget(const std::string& name) { names_.erase(name); }
  bool knows(const std::string& name) const { return names_.contains(name); }
  /// same_constant, of which each pair that many nodes read is compared once.
  bool same(const onnx::Tensor& a, const onnx::Tensor& b) {
    const auto [at, added] = same_.emplace(std::pair(&a, &b), false);
    if (added) at->second = same_constant(a, b);
    return at->second;
  }

 private:
  std::map<std::pair<const onnx::Tensor*, const onnx::Tensor*>, bool> same_;
  std::map<std::string, std::string, std::less<>> names_;
};

/// Whether all that an attribute may hold is kept as numbers, strings or a tensor, whatever type it
/// says it is of; graphs and the like are not.
bool is_plain(const onnx::Attribute& attribute) {
  if (attribute.type == onnx::AttributeType::graph ||
      attribute.type >= onnx::AttributeType::tensors) {
    return false;
  }
  constexpr std::uint32_t known[] = {1, 2, 3, 4, 5, 7, 8, 9, 13, 20};  // of AttributeProto
  const onnx::detail::Source source{attribute.name, attribute.encoded};
  onnx::detail::Message fields(source, attribute.encoded, "AttributeProto");
  while (fields.next()) {
    if (!std::ranges::count(known, fields.number())) return false;
  }
  return true;
}

/// Whether a node or a caller reads it; not where there is none.
bool is_read(const Graph& graph, int tensor) {
  return tensor >= 0 && (graph[tensor].escapes || !graph[tensor].consumers.empty());
}

/// Whether two runs of a node on the same inputs may differ, so that two nodes are two results; or
/// nobody knows.
bool is_random(const onnx::Node& node) {
  static const std::set<std::string, std::less<>> random = {
      "Bernoulli",     "Dropout",           "Multinomial", "RandomNormal", "RandomNormalLike",
      "RandomUniform", "RandomUniformLike", "If",          "Loop",         "Scan"};
  return (!node.domain.empty() && node.domain != "ai.onnx") || random.contains(node.op_type);
}

/// What is taken for the same tensor of both models.
enum class Matching {
  names,     ///< what has one name; names of `b` alone stand for what the same node of `a` reads
  structure  ///< what the same node reads, whatever names it has
};

/// Whether tensor q of `b` is p of `a`, as far as is known, or may be: then it is taken for it.
/// What makes it is compared later.
bool same_tensor(const Resolved& a, int p, const Resolved& b, int q, Matching matching,
                 Renamed& renamed, std::vector<std::string>& taken) {
  p = a.origin(p), q = b.origin(q);
  if (p < 0 || q < 0) return p == q;
  const GraphTensor &f = a.graph()[p], &g = b.graph()[q];
  if (f.constant || g.constant) {
    return f.constant && g.constant && renamed.same(*f.constant, *g.constant);
  }
  if (renamed.knows(g.name)) return a.find(renamed(g.name)) == p;
  const int named = a.find(g.name);
  // Whoever reads an input or an output knows its name.
  const bool free = !g.escapes && f.producer >= 0 && g.producer >= 0 &&
                    (named < 0 || matching == Matching::structure);
  if (named != p && !free) return false;
  renamed.take(g.name, f.name);
  taken.push_back(g.name);
  return true;
}

/// Whether two nodes do the same to the same tensors and equal constants.
bool same_node(const Resolved& before, int m, const Resolved& after, int n, Matching matching,
               Renamed& renamed) {
  const Graph &a = before.graph(), &b = after.graph();
  const onnx::Node &f = a.node(m), &g = b.node(n);
  if (f.op_type != g.op_type || f.domain != g.domain || f.inputs.size() != g.inputs.size() ||
      f.outputs.size() != g.outputs.size()) {
    return false;
  }
  for (std::size_t o = 0; o < f.outputs.size(); ++o) {
    if (!is_read(a, a.output(m, o)) && !is_read(b, b.output(n, o))) continue;
    if (before.origin(a.output(m, o)) != before.find(renamed(g.outputs[o]))) return false;
  }
  if (f.attributes.size() != g.attributes.size()) return false;
  for (std::size_t i = 0; i < f.attributes.size(); ++i) {
    const onnx::Attribute &p = f.attributes[i], &q = g.attributes[i];
    const bool tensors =
        p.tensor && q.tensor ? same_constant(*p.tensor, *q.tensor) : p.tensor == q.tensor;
    const auto bits = [](float x) { return std::bit_cast<std::uint32_t>(x); };  // of -0 too
    if (p.name != q.name || p.type != q.type || bits(p.f) != bits(q.f) || p.i != q.i ||
        p.s != q.s || !std::ranges::equal(p.floats, q.floats, {}, bits, bits) || p.ints != q.ints ||
        p.strings != q.strings || !tensors) {
      return false;
    }
  }
  constexpr std::uint32_t overload = 8;  // which function of a name it is
  if (kept(f.fields, overload) != kept(g.fields, overload)) return false;
  // The others are only compared as bytes.
  const bool plain =
      std::ranges::all_of(f.attributes, is_plain) && std::ranges::all_of(g.attributes, is_plain);
  if (!plain && !std::ranges::equal(f.encoded, g.encoded)) return false;
  std::vector<std::string> taken;  // only if all inputs agree
  const auto differ = [&] {
    for (const std::string& name : taken) renamed.forget(name);
    return false;
  };
  for (std::size_t i = 0; i < f.inputs.size(); ++i) {
    if (!same_tensor(before, a.input(m, i), after, b.input(n, i), matching, renamed, taken)) {
      return differ();
    }
  }
  // What graphs of a node read has its name in them; what varies is compared where it is made.
  for (const std::string& name : f.captured) {
    const int p = a.find(name), q = b.find(name);
    const onnx::Tensor* const constant = p < 0 ? nullptr : a[p].constant;
    const onnx::Tensor* const other = q < 0 ? nullptr : b[q].constant;
    if (constant && other ? !renamed.same(*constant, *other) : constant != other) return differ();
  }
  return true;
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
  if (f.opsets != g.opsets) return "they import operators of other versions";
  // What is kept as bytes and decides what nodes compute.
  constexpr std::uint32_t functions = 25, sparse_initializers = 15;
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

template <int Rank>
PerAxis<Rank> smallest(const Expr<double, Rank>& expression) {
  return concertina::smallest_input(concertina::Form<Rank>(expression));
}
template <int Rank>
PerAxis<Rank> smallest(const concertina::TransposedExpr<double, Rank>& expression) {
  return concertina::smallest_input(expression);
}

/// The three proofs that `layer` is the region's contraction, of those that the budget allows.
/// Rounding is judged as of sums in A.
template <class A, class Expression, class Layer>
void prove(const Expression& expression, const Layer& layer,
           const std::optional<PerAxis<Expression::Rank>>& size,
           const concertina::RowSample& sample, Budget& budget, ComparedRegion& region) {
  constexpr int Rank = Expression::Rank;
  const concertina::Form<Rank> form = form_of(expression);
  const PerAxis<Rank> shown = size ? *size : smallest(expression),
                      dense = concertina::detail::dense_size(shown, spacing_of(expression));
  constexpr auto in = std::same_as<A, float> ? proof_cost::In::float64 : proof_cost::In::extended;
  const auto attempt = [&](const char* name, const ProofCost& cost, const auto& proof) {
    try {
      budget.take("it", cost.bytes, cost.multiply_adds);
      region.proofs.push_back(proof());
    } catch (const concertina::SizeError& error) {
      region.skipped.push_back(std::string(name) + ": " + error.what());
    } catch (const concertina::VerificationError& error) {
      region.skipped.push_back(std::string(name) + ": " + error.what());
    } catch (const std::bad_alloc&) {
      region.skipped.push_back(std::string(name) + ": not enough memory");
    }
  };
  attempt("algebra", proof_cost::algebra(form, dense),
          [&] { return concertina::prove_algebra(expression, layer, {.input_size = size}); });
  attempt("rounding", proof_cost::rounding(form, in),
          [&] { return concertina::prove_rounding<A>(expression, layer, {.input_size = size}); });
  attempt("structure", proof_cost::structure(form, dense, in, sample.rows), [&] {
    return concertina::prove_structure<A>(expression, layer,
                                          {.input_size = shown, .sample = sample});
  });
  // The algebra is of shapes alone.
  const auto of_elements = [](const concertina::Report& report) {
    return report.proof != "algebra";
  };
  if (std::ranges::none_of(region.proofs, of_elements)) {
    region.unproved = "the proofs that look at its elements are too large";
  }
}

/// The unit in the last place of what is stored.
long double ulp(onnx::DataType stored, double value) {
  switch (stored) {
    case onnx::DataType::float16: return concertina::detail::ulp<Eigen::half>(value);
    case onnx::DataType::bfloat16: return concertina::detail::ulp<Eigen::bfloat16>(value);
    default: return concertina::detail::ulp<float>(value);
  }
}

/// Whether a stored layer of 32 or 16 bits is the contraction, rounded: to a neighbour, as who
/// computes in float rounds to 16 bits twice.
template <class Layer>
concertina::Report prove_storage(onnx::DataType type, const Layer& stored,
                                 const Layer& contraction) {
  concertina::Report report{.proof = "storage"};
  if (layer_of(stored).shape() != layer_of(contraction).shape()) {
    report.failure = "it is a " + concertina::to_string(layer_of(stored).shape()) + ", not a " +
                     concertina::to_string(layer_of(contraction).shape());
    return report;
  }
  bool differs = false, told = false;  // by an element that is not smaller than its bound
  const auto compare = [&](const auto& a, const auto& b, const char* name) {
    for (std::size_t i = 0; i < a.size(); ++i, ++report.compared) {
      const long double error =
          std::abs(static_cast<long double>(a[i]) - static_cast<long double>(b[i]));
      const long double bound = ulp(type, b[i]);
      differs = differs || error > 0;
      told = told || std::abs(b[i]) > bound;
      if (error <= bound * report.fraction() && report.compared > 0) continue;
      report.worst = std::string(name) + "[" + std::to_string(i) + "]";
      report.error = error;
      report.bound = bound;
      if (!(error <= bound))
        report.failure =
            report.worst + " is off by " + brief(error) + ", more than one unit in the last place";
    }
  };
  compare(layer_of(stored).weight(), layer_of(contraction).weight(), "weight");
  compare(stored.bias(), contraction.bias(), "bias");
  if (report.failure.empty() && differs && !told) {
    report.undecided = true;
    report.failure =
        "every element is smaller than a unit in the last place of what is stored; "
        "store a wider type, or layers of another scale";
  }
  return report;
}

/// Whether each number of a region's contraction is one of its constants.
bool is_one_layer(Segments segments) {
  return count_nodes(segments) == 1 && !contains(segments, {Kind::batch_norm});
}

/// The layer as one of the geometry of `contraction`, where it acts as such a one: on maps of this
/// size if there is one, where taps that read nothing but padding in every output do not matter,
/// which are then those of the contraction. Otherwise the layer as it is.
template <int Rank>
Conv<double, Rank> conformed(Conv<double, Rank> layer, const Conv<double, Rank>& contraction,
                             const std::optional<PerAxis<Rank>>& size) {
  using View = concertina::ConvView<const double, Rank>;
  ConvShape<Rank> given = layer.shape();
  const ConvShape<Rank>& wanted = contraction.shape();
  if (given.in != wanted.in || given.out != wanted.out) return layer;
  std::optional<PerAxis<Rank>> outputs;
  if (size) {
    outputs = concertina::output_size(wanted, *size);
    if (concertina::output_size(given, *size) != *outputs) return layer;
    for (int axis = 0; axis < Rank; ++axis) {
      if ((*outputs)[axis] == 1) given.stride[axis] = wanted.stride[axis];
    }
  }
  if (given.stride != wanted.stride ||
      (!size && !concertina::detail::incomparable(given, wanted).empty())) {
    return layer;
  }
  const auto is_read = [&](const PerAxis<Rank>& offset) {
    for (int axis = 0; outputs && axis < Rank; ++axis) {
      const Index stride = wanted.stride[axis];
      const Index first =
          std::max<Index>(0, -concertina::detail::floor_divide(offset[axis], stride));
      if (first >= (*outputs)[axis] || first * stride + offset[axis] >= (*size)[axis]) return false;
    }
    return true;
  };
  ConvShape<Rank> shape = wanted;
  shape.groups = std::gcd(given.groups, wanted.groups);
  shape.bias = wanted.bias || given.bias;
  // Zeros of wide kernels between groups would be many.
  const auto elements = [](const ConvShape<Rank>& of) {
    return static_cast<double>(of.out) * static_cast<double>(of.in / of.groups) *
           static_cast<double>(numel(of.kernel_size));
  };
  if (elements(shape) > 4 * std::max(elements(given), elements(wanted))) return layer;
  Conv<double, Rank> result(shape);
  std::ranges::copy(layer.bias(), result.bias().begin());
  auto element = result.weight().begin();
  const auto set = [&](Index o, Index c, const PerAxis<Rank>& offset, double) {
    *element++ =
        concertina::detail::tap_at(View(is_read(offset) ? layer : contraction), o, c, offset);
  };
  concertina::detail::for_each_weight(View(result), set);
  bool lost = false;
  concertina::detail::for_each_weight(
      View(layer), [&](Index o, Index c, const PerAxis<Rank>& offset, double weight) {
        lost = lost || (weight != 0 && is_read(offset) &&
                        concertina::detail::tap_at(View(result), o, c, offset) == 0);
      });
  return lost ? layer : result;
}
/// A region whose shift is a channel of its own: of [x; 1], with padding's zeros after the shift,
/// as the region has them. So shifts before padded layers compare, which no single layer of x
/// shows. Between them and the layers is an identity, whose roundings are those of splitting a
/// factor from its shift.
template <class Expression>
Expression with_shift_as_channel(const Graph& graph, Segments segments) {
  constexpr int Rank = Expression::Rank;
  const std::size_t leading = count_leading_affine(segments);
  if (leading == segments.size()) throw NotLinear("it has no layer");
  const Segments layers = segments.first(segments.size() - leading);
  const RegionExpression<Expression> region(graph, layers);
  const Index channels = form_of(*region).shape().in;
  const ChannelAffine affine = affine_of(segments.subspan(layers.size()), channels);
  Conv<double, Rank> lifted({.out = channels, .in = channels + 1});
  for (Index c = 0; c < channels; ++c) {
    const auto at = static_cast<std::size_t>(c);
    lifted.weight()[static_cast<std::size_t>(c * (channels + 1) + c)] = affine.scale[at];
    lifted.weight()[static_cast<std::size_t>(c * (channels + 1) + channels)] = affine.shift[at];
  }
  Conv<double, Rank> identity({.out = channels, .in = channels, .groups = channels});
  std::ranges::fill(identity.weight(), 1.0);
  return *region * Expression(std::move(identity)) * Expression(std::move(lifted));
}

/// Proves one region of each model, of the same source and result, to be the same map.
template <class Expression>
void prove_region(const Graph& a, Segments expanded, const Graph& b, Segments contracted,
                  Equality equality, const concertina::RowSample& sample,
                  onnx::DataType stored_type, Budget& budget, ComparedRegion& region) {
  constexpr int Rank = Expression::Rank;
  const RegionExpression<Expression> before(a, expanded), after(b, contracted);
  const auto is_typed = [](onnx::DataType type) { return type != onnx::DataType::undefined; };
  const onnx::DataType before_type = type_of(expanded), after_type = type_of(contracted);
  if (is_typed(before_type) && is_typed(after_type) && before_type != after_type) {
    throw NotLinear("its constants are of another type");
  }
  // A sign or a pool has no constants; what they stand for is of double.
  const bool untyped = !is_typed(before_type) || !is_typed(after_type);
  const onnx::DataType type = is_typed(after_type)    ? after_type
                              : is_typed(before_type) ? before_type
                                                      : onnx::DataType::float64;
  const bool rounded = is_typed(stored_type);
  // The same layer along another axis, or of a result with other axes, is another map.
  const auto layout = [](const auto& one, int tensor) { return one.layouts()[tensor]; };
  if (layout(before, expanded.back().from) != layout(after, contracted.back().from) ||
      layout(before, expanded.front().to) != layout(after, contracted.front().to)) {
    throw NotLinear("it takes another axis for its channels");
  }
  const auto &dims = a[expanded.front().to].dims, &other = b[contracted.front().to].dims;
  if (!dims || !other || dims->size() != other->size()) {
    throw NotLinear("its result has other axes, or not known which");
  }
  const auto size = size_of<Rank>(a[expanded.back().from], before.layouts()[expanded.back().from]);

  const auto prove_at = [&](const Expression& expanded_map, const Expression& contracted_map,
                            const std::optional<PerAxis<Rank>>& at, bool interior) {
    if (!interior && !concertina::exactness(expanded_map, at).exact()) return false;
    const concertina::Border<Rank> border{.interior_only = interior, .input_size = at};
    const auto contract = [&](const Expression& e) {
      return type == onnx::DataType::float64 ? concertina::contract<long double>(e, border)
                                             : concertina::contract(e, border);
    };
    for (const Expression* map : {&contracted_map, &expanded_map}) {
      budget.take("contracting it", 0, static_cast<double>(form_of(*map).multiply_adds(at)));
    }
    auto stored = contract(contracted_map);
    if constexpr (std::same_as<Expression, Expr<double, Rank>>) {
      if (size || stored.shape() != form_of(expanded_map).shape(at)) {
        const auto wanted = contract(expanded_map);
        // What they differ in may not matter at the size.
        const bool by_size = !at && !interior && size && equality != Equality::everywhere;
        if (by_size && conformed(stored, wanted, size) != conformed(stored, wanted, at)) {
          return false;
        }
        stored = conformed(std::move(stored), wanted, at);
      }
    }
    const auto prove_as_double = [&](ComparedRegion& compared) {
      const auto contraction = contract(expanded_map);
      prove<double>(expanded_map, contraction, at, sample, budget, compared);
      concertina::Report storage = prove_storage(rounded ? stored_type : type, stored, contraction);
      if (rounded && !storage && !is_one_layer(contracted)) {
        storage.undecided = true;
        storage.failure += ", as the roundings of several constants may explain";
      }
      compared.proofs.push_back(std::move(storage));
    };
    if (rounded || (untyped && type != onnx::DataType::float64)) {
      prove_as_double(region);
    } else if (type == onnx::DataType::float64) {
      prove<double>(expanded_map, stored, at, sample, budget, region);
    } else if (type == onnx::DataType::float32) {
      ComparedRegion as_double = region;
      prove<float>(expanded_map, stored, at, sample, budget, region);
      if (!std::ranges::any_of(region.proofs, &concertina::Report::undecided)) return true;
      // Bounds of sums in float say nothing about some long chains. Those in double may, where
      // that is what was stored, rounded.
      prove_as_double(as_double);
      if (std::ranges::all_of(as_double.proofs, &concertina::Report::operator bool))
        region = as_double;
    } else {
      prove_as_double(region);
    }
    return true;
  };

  std::string why;
  for (const auto& at : {std::optional<PerAxis<Rank>>(), size}) {
    try {
      if (prove_at(*before, *after, at, false)) return;
      why = concertina::exactness(*before, at).reason;
    } catch (const concertina::ShapeError& error) {
      why = error.what();
    } catch (const concertina::InexactError& error) {  // of the other one
      why = error.what();
    }
    if (equality == Equality::everywhere) break;
  }
  if constexpr (std::same_as<Expression, Expr<double, Rank>>) {
    const bool wide = type == onnx::DataType::float32 || type == onnx::DataType::float64;
    if (wide && count_leading_affine(expanded) > 0) {
      const auto x = with_shift_as_channel<Expression>(a, expanded),
                 y = with_shift_as_channel<Expression>(b, contracted);
      const ComparedRegion unproved = region;
      for (const auto& at : {std::optional<PerAxis<Rank>>(), size}) {
        if (!prove_at(x, y, at, false)) continue;
        const bool proved = std::ranges::all_of(region.proofs, &concertina::Report::operator bool);
        if (proved || equality != Equality::interior) return;
        region = unproved;  // what differs at the border may be as claimed off it
        break;
      }
    }
  }
  const auto is_all_border = [&](const Graph& graph, const auto& map, Segments segments) {
    const int result = segments.front().to;
    return size &&
           covers<Rank>(concertina::exactness(*map, size), graph[result], map.layouts()[result]);
  };
  if (equality != Equality::interior) {
    region.unproved = why;
  } else if (is_all_border(a, before, expanded) || is_all_border(b, after, contracted)) {
    region.unproved = "the border covers all of its result at the model's input size, " + why;
  } else {
    prove_at(*before, *after, std::nullopt, true);
  }
}

/// Maps but for those that a contraction may add to its one layer.
std::size_t count_layers(Segments segments) {
  std::size_t count = 0;
  for (const Segment& segment : segments) {
    for (const LinearNode* map : segment.maps) {
      count +=
          map->kind != Kind::identity && map->kind != Kind::pad && map->kind != Kind::move_channels;
    }
  }
  return count;
}

using RegionPair = std::pair<std::vector<Segment>, std::vector<Segment>>;

/// The segments that make a tensor of each model.
RegionPair regions_to(const Resolved& a, int tensor, const Resolved& b, int other) {
  const auto none = [](int) { return false; };
  return {segments_to(a.linear(), tensor, none), segments_to(b.linear(), other, none)};
}

/// Cuts them to those from the nearest tensor on that both pass through; false where there is no
/// such.
bool cut_to_common(const Resolved& a, const Resolved& b, const Renamed& renamed,
                   RegionPair& regions) {
  auto& [there, here] = regions;
  std::map<int, std::size_t> places;
  for (std::size_t i = 0; i < there.size(); ++i) {
    places.emplace(a.origin(there[i].from), i + 1);
  }
  for (std::size_t j = 0; j < here.size(); ++j) {
    const GraphTensor& from = b.graph()[b.origin(here[j].from)];
    const auto place = places.find(a.find(renamed(from.name)));
    if (place == places.end() || from.constant || a.graph()[place->first].constant) continue;
    there.resize(place->second);
    here.resize(j + 1);
    return true;
  }
  return false;
}

/// compare_models, of tensors matched in one way.
ModelComparison compare(const Resolved& before, const Resolved& after, Matching matching,
                        Equality equality, const concertina::RowSample& sample,
                        onnx::DataType stored, onnx::DataType model_stored, Budget& budget) {
  const Graph &a = before.graph(), &b = after.graph();
  const onnx::Model& result = b.model();
  std::optional<LinearGraph> flat_before, flat_after;  // with flattenings apart
  std::optional<Resolved> apart_before, apart_after;
  ModelComparison comparison;
  std::set<int> taken_once;  // nodes of `a` that a random one of `b` is
  // Regions of `result` that are not the model's own nodes, from the outputs back.
  std::vector<bool> done(result.nodes.size());
  Renamed renamed;
  const auto compare_tensor = [&](int n, const std::string& name) {
    ComparedRegion region{
        .source = {}, .result = name, .proofs = {}, .skipped = {}, .unproved = {}};
    const int made = b.find(name), same = a.find(renamed(name));
    if (same < 0) {
      region.unproved = describe(b, n) + " makes a tensor that the other model does not have";
      return region;
    }
    RegionPair regions;
    bool found = false;
    try {
      const auto follow = [&](const Resolved& f, const Resolved& g) {
        regions = regions_to(f, same, g, made);
        budget.take("finding what it is made of", 0,
                    each_followed * (1 + count_maps(regions.first) + count_maps(regions.second)));
        found = cut_to_common(f, g, renamed, regions);
      };
      follow(before, after);
      const RegionPair whole = regions;
      if (!found) {  // a linear layer may come right after a flattening in one of them alone
        if (!flat_before) {
          flat_before.emplace(a, Flattenings::apart);
          flat_after.emplace(b, Flattenings::apart);
          apart_before.emplace(*flat_before);
          apart_after.emplace(*flat_after);
        }
        follow(*apart_before, *apart_after);
      }
      if (!found && !whole.first.empty() && !whole.second.empty()) {
        regions = whole;
        std::vector<std::string> taken;
        found = same_tensor(before, whole.first.back().from, after, whole.second.back().from,
                            matching, renamed, taken);
      }
    } catch (const BudgetError& error) {
      region.unproved = error.what();
      return region;
    }
    if (!found) {
      region.unproved = "no tensor that both models have leads to it by linear maps alone";
      return region;
    }
    const Segments expanded = regions.first, contracted = regions.second;
    // What something else was found to read is compared by itself.
    const auto is_inside = [&](int node) {
      return std::ranges::all_of(b.node(node).outputs, [&](const std::string& output) {
        return output == name || !renamed.knows(output);
      });
    };
    for (const Segment& segment : contracted) {
      for (const LinearNode* map : segment.maps) {
        for (const int each : map->nodes) {
          if (is_inside(each)) done[static_cast<std::size_t>(each)] = true;
        }
      }
    }
    region.source = a[expanded.back().from].name;
    renamed.take(b[after.origin(contracted.back().from)].name,
                 a[before.origin(expanded.back().from)].name);
    try {
      with_expression({expanded, contracted}, [&](auto type) {
        using Expression = typename decltype(type)::type;
        // Whichever was made of the other: rounding is that of the longer one's layers.
        if (count_layers(expanded) < count_layers(contracted)) {
          prove_region<Expression>(b, contracted, a, expanded, equality, sample, model_stored,
                                   budget, region);
        } else {
          prove_region<Expression>(a, expanded, b, contracted, equality, sample, stored, budget,
                                   region);
        }
      });
    } catch (const NotLinear& error) {
      region.unproved = error.what();
    } catch (const concertina::Error& error) {
      region.unproved = error.what();
    }
    return region;
  };
  for (int n = static_cast<int>(result.nodes.size()) - 1; n >= 0; --n) {
    if (done[static_cast<std::size_t>(n)]) continue;
    // What nothing reads does not matter, and constants are compared where they are read.
    std::vector<std::string> names;
    for (const std::string& name : b.node(n).outputs) {
      const GraphTensor* const tensor = name.empty() ? nullptr : &b[b.find(name)];
      if (tensor && (tensor->escapes || (!tensor->constant && !tensor->consumers.empty()))) {
        names.push_back(name);
      }
    }
    if (names.empty()) continue;
    const int same = before.find(renamed(names.front()));
    if (after.passes_on(n)) {
      std::vector<std::string> taken;
      if (!b[b.output(n)].escapes ||
          same_tensor(before, same, after, b.output(n), matching, renamed, taken)) {
        continue;
      }
    } else if (same >= 0 && a[same].producer >= 0 &&
               (!is_random(b.node(n)) || !taken_once.contains(a[same].producer)) &&
               same_node(before, a[same].producer, after, n, matching, renamed)) {
      if (is_random(b.node(n))) taken_once.insert(a[same].producer);
      ++comparison.identical;
      continue;
    }
    for (const std::string& name : names) comparison.regions.push_back(compare_tensor(n, name));
  }
  if (const std::string why = differing_frames(a, b); !why.empty()) {
    comparison.regions.push_back(
        {.source = {}, .result = "the model", .proofs = {}, .skipped = {}, .unproved = why});
  }
  std::ranges::reverse(comparison.regions);
  return comparison;
}

}  // namespace

ModelComparison compare_models(const onnx::Model& model, const onnx::Model& result,
                               const GraphOptions& options, Equality equality,
                               const concertina::RowSample& sample, onnx::DataType stored,
                               onnx::DataType model_stored) {
  const Graph a(model, options), b(result, options);
  const LinearGraph linear_before(a), linear_after(b);
  const Resolved before(linear_before), after(linear_after);
  const auto compare_by = [&](Matching matching) {
    Budget budget = options.budget;
    return compare(before, after, matching, equality, sample, stored, model_stored, budget);
  };
  ModelComparison comparison = compare_by(Matching::names);
  if (comparison.proved()) return comparison;
  // Names may mislead: what is wrong is so whatever they are.
  ModelComparison other = compare_by(Matching::structure);
  return other.proved() || (comparison.failed() && !other.failed()) ? other : comparison;
}

}  // namespace tool
