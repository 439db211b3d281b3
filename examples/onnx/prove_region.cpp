// SPDX-License-Identifier: Apache-2.0
#include "onnx/prove_region.hpp"

#include "onnx/proof_cost.hpp"
#include "onnx/region_expression.hpp"
#include "text.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <new>
#include <numeric>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace tool {

bool ComparedRegion::proved() const {
  return unproved.empty() && std::ranges::all_of(proofs, &concertina::Report::operator bool);
}

bool ComparedRegion::failed() const {
  return std::ranges::any_of(
      proofs, [](const concertina::Report& report) { return !report && !report.undecided; });
}

void ComparedRegion::doubt(const std::string& why) {
  for (concertina::Report& report : proofs) {
    if (report || report.undecided) continue;
    report.undecided = true;
    report.failure += ", but " + why;
  }
}

namespace {

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
    case onnx::DataType::float16: return concertina::ulp<Eigen::half>(value);
    case onnx::DataType::bfloat16: return concertina::ulp<Eigen::bfloat16>(value);
    default: return concertina::ulp<float>(value);
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
  constexpr bool transposed = !std::same_as<Layer, Conv<double, Layer::Rank>>;
  const auto& shape = layer_of(contraction).shape();
  const auto output_channel = [&](std::size_t i) {
    const Index pair = static_cast<Index>(i) / numel(shape.kernel_size);
    const Index in = shape.in / shape.groups, o = pair / in, c = pair % in;
    return static_cast<std::size_t>(transposed ? o / (shape.out / shape.groups) * in + c : o);
  };
  struct Elements {
    bool differ = false, told = false;  ///< by one that is not smaller than its bound
  };
  const auto whole = static_cast<std::size_t>(transposed ? shape.in : shape.out);
  std::vector<Elements> rows(whole + 1);  // weights of each output channel, and the whole layer
  const auto compare = [&](const auto& a, const auto& b, const char* name, auto&& row) {
    for (std::size_t i = 0; i < a.size(); ++i, ++report.compared) {
      const long double error =
          std::abs(static_cast<long double>(a[i]) - static_cast<long double>(b[i]));
      const long double bound = ulp(type, b[i]);
      for (Elements* elements : {&rows[row(i)], &rows[whole]}) {
        elements->differ = elements->differ || error > 0;
        elements->told = elements->told || std::abs(b[i]) > bound;
      }
      if (error <= bound * report.fraction() && report.compared > 0) continue;
      report.worst = std::string(name) + "[" + std::to_string(i) + "]";
      report.error = error;
      report.bound = bound;
      if (!(error <= bound))
        report.failure =
            report.worst + " is off by " + brief(error) + ", more than one unit in the last place";
    }
  };
  compare(layer_of(stored).weight(), layer_of(contraction).weight(), "weight", output_channel);
  compare(stored.bias(), contraction.bias(), "bias", [&](std::size_t) { return whole; });
  const auto lost =
      std::ranges::find_if(rows, [](const Elements& each) { return each.differ && !each.told; });
  if (report.failure.empty() && lost != rows.end()) {
    report.undecided = true;
    const auto channel = static_cast<std::size_t>(lost - rows.begin());
    report.failure = "every " +
                     (channel == whole ? std::string("element")
                                       : "weight of output channel " + std::to_string(channel)) +
                     " is smaller than a unit in the last place of what is stored; store a wider "
                     "type, or layers of another scale";
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

template <class Expression>
void prove_same_map(const Graph& a, Segments expanded, const Graph& b, Segments contracted,
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
      if (region.proved()) return true;
      // Bounds of sums in float say nothing about some long chains, and know nothing of a constant
      // that is rounded once. Those in double may, where that is what was stored, rounded.
      prove_as_double(as_double);
      if (as_double.proved()) region = as_double;
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

/// Between 1 and 2, another one for each list of numbers.
double factor_of(std::initializer_list<Index> numbers) {
  std::uint64_t hash = 0;
  for (const Index number : numbers) {
    hash = (hash + static_cast<std::uint64_t>(number)) * 0x9E3779B97F4A7C15;
    hash ^= hash >> 32;
  }
  return 1 + static_cast<double>(hash >> 11) * 0x1p-53;
}

}  // namespace

double Fingerprint::distance(const Fingerprint& other) const {
  return std::abs(sum - other.sum) / std::max(scale, other.scale);
}

Fingerprint fingerprint(const Graph& graph, Segments region, Budget& budget) {
  Fingerprint result;
  const auto add = [&](double factor, double element) {
    result.sum += factor * element;
    result.scale += std::abs(factor * element);
  };
  try {
    with_expression({region}, [&](auto type) {
      using Expression = typename decltype(type)::type;
      constexpr int Rank = Expression::Rank;
      const RegionExpression<Expression> expression(graph, region);
      budget.take("contracting it", 0, static_cast<double>(form_of(*expression).multiply_adds()));
      const auto layer = concertina::contract(*expression, {.interior_only = true});
      concertina::detail::for_each_weight(
          concertina::ConvView<const double, Rank>(layer_of(layer)),
          [&](Index o, Index c, const PerAxis<Rank>& offset, double weight) {
            add(factor_of({o, c, offset[0], offset[1], Rank > 2 ? offset[Rank - 1] : 0}), weight);
          });
      for (Index o = 0; o < std::ssize(layer.bias()); ++o) {
        add(factor_of({o}), layer.bias()[static_cast<std::size_t>(o)]);
      }
    });
  } catch (const NotLinear&) {
    result.sum = std::numeric_limits<double>::quiet_NaN();
  } catch (const concertina::Error&) {
    result.sum = std::numeric_limits<double>::quiet_NaN();
  }
  return result;
}

void prove_region(const Graph& a, Segments expanded, const Graph& b, Segments contracted,
                  const RegionProofs& how, Budget& budget, ComparedRegion& region) {
  try {
    with_expression({expanded, contracted}, [&](auto type) {
      using Expression = typename decltype(type)::type;
      // Whichever was made of the other: rounding is that of the longer one's layers.
      if (count_layers(expanded) < count_layers(contracted)) {
        prove_same_map<Expression>(b, contracted, a, expanded, how.equality, how.sample,
                                   how.stored_before, budget, region);
      } else {
        prove_same_map<Expression>(a, expanded, b, contracted, how.equality, how.sample,
                                   how.stored_after, budget, region);
      }
    });
    if (region.failed() && !not_finite(a, expanded).empty() && !not_finite(b, contracted).empty()) {
      region.doubt("neither has finite weights alone");
    }
  } catch (const NotLinear& error) {
    region.unproved = error.what();
  } catch (const concertina::Error& error) {
    region.unproved = error.what();
  }
}

}  // namespace tool
