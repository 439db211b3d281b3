// SPDX-License-Identifier: Apache-2.0
#include "onnx/plan.hpp"

#include "onnx/region_expression.hpp"
#include "text.hpp"

#include <algorithm>
#include <map>
#include <optional>
#include <set>
#include <tuple>

namespace tool {

namespace {

/// Elements of a tensor at the assumed size; 0 where even that is not known.
double elements(const GraphTensor& tensor) {
  if (!tensor.sizes) return 0;
  double result = 1;
  for (const Index extent : *tensor.sizes)
    result *= extent == unknown ? 1 : static_cast<double>(extent);
  return result;
}

double multiply_adds(const Graph& graph, const LinearNode& map) {
  double written = 0;
  for (const int output : map.outputs) written += elements(graph[output]);
  const auto taps = [](const onnx::Tensor& weight, std::size_t first) {
    double product = 1;
    for (std::size_t axis = first; axis < weight.dims.size(); ++axis)
      product *= static_cast<double>(weight.dims[axis]);
    return product;
  };
  const double bias = map.bias ? 1 : 0;
  switch (map.kind) {
    case Kind::conv: return written * (taps(*map.weight, 1) + bias);
    case Kind::conv_transpose:
      return elements(graph[map.operands.front()]) * taps(*map.weight, 1) + written * bias;
    case Kind::linear:
      return written * (static_cast<double>(map.weight->dims[map.transposed ? 0 : 1]) + bias);
    case Kind::batch_norm: return 2 * written;
    case Kind::channel_scale:
      return written * ((map.scale.empty() ? 0 : 1) + (map.shift.empty() ? 0 : 1));
    case Kind::average_pool: {
      double volume = 1;
      for (const Index extent : map.windows->kernel) volume *= static_cast<double>(extent);
      return written * volume;
    }
    case Kind::sum: return written * static_cast<double>(map.operands.size() - 1);
    default: return 0;
  }
}

/// Elements of the constants that nodes read, those that others read too in part.
double parameters(const Graph& graph, Segments segments) {
  std::map<int, std::size_t> uses;
  for (const Segment& segment : segments) {
    for (const LinearNode* map : segment.maps) {
      for (const int node : map->nodes) {
        for (std::size_t i = 0; i < graph.node(node).inputs.size(); ++i) {
          const int input = graph.input(node, i);
          if (input >= 0 && graph[input].constant) ++uses[input];
        }
      }
    }
  }
  double count = 0;
  for (const auto& [tensor, used] : uses) {
    const auto type = graph[tensor].constant->type;
    if (type == onnx::DataType::int64 || type == onnx::DataType::int32) continue;
    count += static_cast<double>(graph[tensor].constant->numel()) * static_cast<double>(used) /
             static_cast<double>(graph[tensor].consumers.size());
  }
  return count;
}

/// Nodes that Rewriter writes for a layer.
double count_nodes(const NewLayer& layer, bool two_axes, Index opset) {
  const bool last = layer.in_layout == Layout::channels_last;
  if (layer.rank == 0 ||
      (is_pointwise(layer) && last && layer.out_layout == Layout::channels_last)) {
    return two_axes || !layer.has_bias ? 1 : 2;
  }
  const auto crops = [](Index pad) { return pad < 0; };
  double count = last ? 2 : 1;
  if (layer.flat || layer.out_layout == Layout::channels_last) ++count;
  if (std::ranges::any_of(layer.pads_begin, crops) || std::ranges::any_of(layer.pads_end, crops))
    ++count;
  return opset < 11 && layer.flat && !layer.has_bias ? count + 1 : count;
}

/// ONNX's ConvTranspose crops with pads, and extends with output_padding less than a stride.
void require_writable(const NewLayer& layer) {
  for (std::size_t axis = 0; axis < layer.kernel.size(); ++axis) {
    if (layer.pads_begin[axis] < 0 ||
        -layer.pads_end[axis] >= std::max(layer.strides[axis], layer.dilations[axis])) {
      throw NotLinear("as one ConvTranspose it would need zeros around its output");
    }
  }
}

bool is_flat(Segments segments) {
  return std::ranges::any_of(segments, [](const Segment& segment) {
    return std::ranges::any_of(segment.maps, [](const LinearNode* map) { return map->flat; });
  });
}

/// Taps that finding the border follows at most.
template <int Rank>
double border_taps(const concertina::Form<Rank>& form, const PerAxis<Rank>& spacing) {
  if (!concertina::detail::pads_between(form.tree())) return 0;
  const auto layers = form.leaves();
  double taps = 0;
  for (int axis = 0; axis < Rank; ++axis) {
    const concertina::detail::AxisPaths paths(form.tree(), axis, spacing[axis]);
    double along = 0;
    for (const ConvShape<Rank>& layer : layers)
      along += static_cast<double>(layer.kernel_size[axis]);
    const auto period = static_cast<double>(paths.period());
    taps += along * period * 1.25 * (static_cast<double>(paths.settled_size()) + period);
  }
  // Then the part of a chain is sought to which the border is due.
  return taps * (1 + static_cast<double>(form.parts().size()) / 3);
}

// Multiply-adds that take as long.
constexpr double each_counted = 150, each_judged = 1500, each_tap = 1.5;

}  // namespace

std::string change(double before, double after) {
  if (before <= 0) return brief(after);
  return grouped(static_cast<std::ptrdiff_t>(before)) + " to " +
         grouped(static_cast<std::ptrdiff_t>(after));
}

Planner::Planner(const Graph& graph, const ModelOptions& options, Budget& budget)
    : graph_(graph),
      options_(options),
      budget_(budget),
      reached_(static_cast<int>(graph.model().nodes.size()) - 1) {
  for (const GraphTensor& tensor : graph.tensors()) {
    if (!tensor.constant || tensor.consumers.empty()) continue;
    if (onnx::size_of(tensor.constant->type) == 0) continue;  // of its shape there may be nothing
    most_elements_ = std::max(most_elements_, static_cast<std::size_t>(tensor.constant->numel()));
  }
  elements_ = std::make_unique_for_overwrite<double[]>(most_elements_);
}

void Planner::take(Segments segments, double multiply_adds) const {
  const auto nodes = static_cast<double>(graph_.model().nodes.size());
  budget_.take(graph_.model().origin + ": planning the regions down to that which makes " +
                   in_quotes(graph_[segments.front().to].name),
               0, multiply_adds, (nodes - static_cast<double>(reached_)) / nodes);
}

std::optional<Planner::Shape> Planner::shape_of(const Segment& segment) const {
  const Segments alone(&segment, 1);
  take(alone, each_judged * count_maps(alone));
  try {
    return with_expression({alone}, [&](auto type) -> std::optional<Shape> {
      using Expression = typename decltype(type)::type;
      if constexpr (std::same_as<Expression, Expr<double, Expression::Rank>>) {
        const RegionExpression<Expression> region(graph_, alone,
                                                  std::span(elements_.get(), most_elements_));
        return Shape(form_of(*region).shape());
      } else {
        return std::nullopt;
      }
    });
  } catch (const NotLinear&) {
    return std::nullopt;
  } catch (const concertina::Error&) {
    return std::nullopt;
  }
}

ModelCost Planner::cost_before(Segments segments) const {
  ModelCost cost{.parameters = parameters(graph_, segments)};
  for (const Segment& segment : segments) {
    for (const LinearNode* map : segment.maps) cost.multiply_adds += multiply_adds(graph_, *map);
  }
  return cost;
}

ModelCost Planner::least_cost(Segments segments, const Shape& shape) const {
  double taps = static_cast<double>(shape.in / shape.groups);
  for (const Index extent : shape.kernel_size) taps *= static_cast<double>(extent);
  return {.parameters = taps * static_cast<double>(shape.out),
          .multiply_adds = taps * elements(graph_[segments.front().to])};
}

template <class Expression>
void Planner::judge(Segments segments, Plan& plan) const {
  constexpr int Rank = Expression::Rank;
  const Segments layers = segments.first(segments.size() - plan.shifted);
  const RegionExpression<Expression> region(graph_, layers,
                                            std::span(elements_.get(), most_elements_));
  const Expression expression = shifted_expression(*region, segments.subspan(layers.size()));
  const GraphTensor &source = graph_[segments.back().from], &result = graph_[segments.front().to];
  const auto size = size_of<Rank>(source, region.layouts()[layers.back().from]);
  const concertina::Form<Rank> form = form_of(expression);
  take(segments, each_judged * static_cast<double>(form.leaves().size()));
  std::optional<ConvShape<Rank>> shape;
  concertina::Exactness<Rank> border;
  std::string differing;
  try {
    shape = form.shape();
    take(segments, each_tap * border_taps(form, spacing_of(expression)));
    border = concertina::exactness(expression);
  } catch (const concertina::ShapeError& error) {
    if (!size) throw;
    take(segments, each_tap * border_taps(form, spacing_of(expression)));
    differing = error.what();  // branches may agree at the size
  }
  if (!shape || !border.exact()) {
    plan.border = shape ? border.reason : differing;
    const bool at_size = size && options_.equality != Equality::everywhere;
    if (at_size && !shape) shape = form.shape(size);
    if (at_size && concertina::exactness(expression, size).exact()) {
      plan.where = Equality::size;
    } else if (shape && options_.equality == Equality::interior) {
      plan.where = Equality::interior;
      const auto& layouts = region.layouts();
      if (size && covers<Rank>(concertina::exactness(expression, size), result,
                               layouts[segments.front().to])) {
        plan.reason =
            "the border covers all of its result at the model's input size, " + plan.border;
        return;
      }
    } else {
      plan.reason = plan.border;
      plan.remedy = size && options_.equality == Equality::everywhere
                        ? "--border size, if the input size never changes"
                    : !size ? "--input NAME=SHAPE, if it is exact at a size that never changes; "
                              "or --border interior"
                            : "--border interior, where the border does not matter";
      return;
    }
  }
  // A file can ask for any stride and dilation.
  constexpr Index most_elements = Index{1} << 29;
  constexpr double bytes_each = 32;  // while the layer is made, and written
  const double bytes = bytes_each * static_cast<double>(weight_numel(*shape));
  if (weight_numel(*shape) > most_elements || bytes > graph_.budget().memory) {
    throw NotLinear("as " + to_string(*shape) + " it would have " +
                    std::to_string(weight_numel(*shape)) + " weights" +
                    (weight_numel(*shape) > most_elements
                         ? ""
                         : "; allow that with --memory " + megabytes(bytes)));
  }
  if constexpr (std::same_as<Expression, concertina::TransposedExpr<double, Rank>>) {
    plan.layer = layer_of_dense_shape(*shape, expression.stride(), rank_of(segments));
    require_writable(plan.layer);
  } else {
    plan.layer = layer_of_shape(*shape, rank_of(segments));
  }
  plan.layer.in_layout = region.layouts()[layers.back().from];
  plan.layer.out_layout = region.layouts()[segments.front().to];
  plan.layer.flat = is_flat(segments);
  const double taps = static_cast<double>(shape->in / shape->groups) *
                      static_cast<double>(numel(shape->kernel_size));
  plan.after.parameters = static_cast<double>(shape->out) * (taps + (shape->bias ? 1 : 0));
  // A transposed layer writes all its taps for each position that it reads.
  plan.after.multiply_adds = plan.layer.transposed
                                 ? elements(source) * taps * static_cast<double>(shape->out) /
                                           static_cast<double>(shape->in) +
                                       (shape->bias ? elements(result) : 0)
                                 : elements(result) * (taps + (shape->bias ? 1 : 0));
  if (plan.shifted > 0) {
    const bool first = plan.layer.in_layout == Layout::channels_first;
    const bool has_channels = source.dims && source.dims->size() >= 2;
    if (!has_channels || (first ? (*source.dims)[1] : source.dims->back()) == unknown) {
      plan.reason = "the shift before its layers would add to channels whose number is not known";
      plan.remedy = "--input NAME=SHAPE";
      return;
    }
    plan.after.parameters += static_cast<double>(shape->in);
    plan.after.multiply_adds += elements(source);
  }
  const bool bigger = plan.after.parameters > plan.before.parameters,
             slower = plan.after.multiply_adds > plan.before.multiply_adds;
  if ((options_.when == When::smaller && (bigger || slower)) ||
      (options_.when == When::faster && slower)) {
    plan.reason =
        slower ? "multiply-adds would grow, " +
                     change(plan.before.multiply_adds, plan.after.multiply_adds)
               : "parameters would grow, " + change(plan.before.parameters, plan.after.parameters);
    plan.remedy = slower ? "--when always" : "--when faster";
    return;
  }
  plan.nodes_after =
      count_nodes(plan.layer, result.dims && result.dims->size() == 2, graph_.opset()) +
      (plan.shifted > 0 ? 1 : 0);
  // As one ConvTranspose a Conv and its pixel shuffle take 1.1 to 2.6 times as long in onnxruntime
  // 1.32 (one core, 96x96, factors 2 and 4): that saves no node worth having.
  const bool shuffles = contains(segments, {Kind::depth_to_space});
  if (shuffles && options_.when != When::always) plan.nodes_after = plan.nodes_before;
  plan.possible = plan.nodes_after < plan.nodes_before || bigger || slower ||
                  plan.after.parameters < plan.before.parameters ||
                  plan.after.multiply_adds < plan.before.multiply_adds;
  if (!plan.possible && shuffles) {
    plan.reason = "as one ConvTranspose it would take as many multiply-adds";
    plan.remedy = "--when always";
  }
}

Plan Planner::plan(Segments segments) const { return plan(segments, 0); }

Plan Planner::plan_with_shift(Segments segments) const {
  const std::size_t leading = count_leading_affine(segments);
  if (leading == 0 || leading == segments.size()) return {};
  // In 16 bits factor and shift would each be rounded too coarsely.
  const onnx::DataType type = type_of(segments);
  const bool wide = type == onnx::DataType::float32 || type == onnx::DataType::float64;
  return wide ? plan(segments, leading) : Plan();
}

Plan Planner::plan(Segments segments, std::size_t shifted) const {
  take(segments, each_counted * count_maps(segments));
  Plan result;
  result.shifted = shifted;
  result.nodes_before = static_cast<double>(count_nodes(segments));
  result.before = cost_before(segments);
  const bool layers = contains(segments, {Kind::conv, Kind::linear, Kind::conv_transpose});
  if (!layers || result.nodes_before < 2) return result;
  try {
    static_cast<void>(type_of(segments));
    with_expression({segments}, [&](auto type) {
      this->judge<typename decltype(type)::type>(segments, result);
    });
  } catch (const NotLinear& error) {
    result.reason = error.what();
  } catch (const BudgetError&) {
    throw;
  } catch (const concertina::Error& error) {
    result.reason = error.what();
  }
  return result;
}

namespace {

/// The shape of what is applied after another; none where they do not fit, or are too large.
std::optional<Planner::Shape> product_of(const std::optional<Planner::Shape>& outer,
                                         const std::optional<Planner::Shape>& inner) {
  if (!outer || !inner) return std::nullopt;
  try {
    return concertina::detail::product_shape(*outer, *inner);
  } catch (const concertina::Error&) {
    return std::nullopt;
  }
}

}  // namespace

std::vector<Group> best_groups(Planner& planner, Segments segments, When when) {
  using Cost = std::tuple<double, double, double>;
  const auto cost = [&](const ModelCost& model, double nodes) {
    return when == When::always ? Cost(nodes, model.multiply_adds, model.parameters)
                                : Cost(model.multiply_adds, model.parameters, nodes);
  };
  const auto plus = [](const Cost& a, const Cost& b) {
    return Cost(std::get<0>(a) + std::get<0>(b), std::get<1>(a) + std::get<1>(b),
                std::get<2>(a) + std::get<2>(b));
  };
  struct Best {
    std::optional<Cost> cost;
    Group last;
  };
  std::vector<Best> best(segments.size() + 1);
  best[0].cost = Cost(0, 0, 0);
  std::vector<std::optional<Planner::Shape>> shapes;
  std::vector<ModelCost> before;
  for (std::size_t s = 0; s < segments.size(); ++s) {
    shapes.push_back(planner.shape_of(segments[s]));
    before.push_back(planner.cost_before(segments.subspan(s, 1)));
  }
  const auto grows = [&](const ModelCost& from, const ModelCost& to) {
    constexpr double rounding = 1 + 1e-9;  // of shares of parameters
    const bool bigger = to.parameters > rounding * from.parameters,
               slower = to.multiply_adds > rounding * from.multiply_adds;
    return when == When::smaller ? bigger || slower : when == When::faster && slower;
  };
  for (std::size_t end = 1; end <= segments.size(); ++end) {
    planner.reach(segments[end - 1].maps.front()->nodes.back());
    const std::size_t most = std::min(end, longest_group);
    std::vector<std::optional<Planner::Shape>> products(most);  // of the last 1, 2, ...
    std::vector<ModelCost> sums(most);
    for (std::size_t i = 0; i < most; ++i) {
      const std::size_t own = end - 1 - i;
      products[i] = i == 0 ? shapes[own] : product_of(shapes[own], products[i - 1]);
      sums[i] = before[own];
      if (i == 0) continue;
      sums[i].parameters += sums[i - 1].parameters;
      sums[i].multiply_adds += sums[i - 1].multiply_adds;
    }
    // One alone, as it can always stay; then the longest first, which leave the least to others.
    for (std::size_t i = 0; i < most; ++i) {
      const std::size_t begin = i == 0 ? end - 1 : end - most + i - 1;
      const Segments group = segments.subspan(begin, end - begin);
      if (const auto& shape = products[group.size() - 1]; shape && best[end].cost) {
        const ModelCost least = planner.least_cost(group, *shape);
        if (grows(sums[group.size() - 1], least)) continue;
        if (!(plus(*best[begin].cost, cost(least, 1)) < *best[end].cost)) continue;
      }
      Plan plan = planner.plan(group);
      if (!plan.possible && !plan.border.empty()) {
        Plan shifted = planner.plan_with_shift(group);
        if (shifted.possible) {
          shifted.reason = plan.reason;
          shifted.remedy = plan.remedy;
          plan = std::move(shifted);
        }
      }
      if (!plan.possible && end - begin > 1) continue;
      const Cost own =
          plan.possible ? cost(plan.after, plan.nodes_after) : cost(plan.before, plan.nodes_before);
      const Cost total = plus(*best[begin].cost, own);
      if (!best[end].cost || total < *best[end].cost)
        best[end] = {total, {begin, end, std::move(plan)}};
    }
  }
  std::vector<Group> groups;
  for (std::size_t end = segments.size(); end > 0; end = groups.back().begin)
    groups.push_back(best[end].last);
  std::ranges::reverse(groups);
  return groups;
}

ModelCost cost_of(const LinearGraph& linear) {
  const Graph& graph = linear.graph();
  ModelCost cost;
  for (const GraphTensor& tensor : graph.tensors()) {
    const bool stored = tensor.producer < 0 || graph.node(tensor.producer).op_type == "Constant";
    if (tensor.constant && stored && tensor.type != onnx::DataType::int64 &&
        tensor.type != onnx::DataType::int32) {
      cost.parameters += static_cast<double>(tensor.constant->numel());
    }
  }
  std::set<const LinearNode*> seen;
  for (std::size_t t = 0; t < graph.tensors().size(); ++t) {
    const LinearNode* map = linear.maker(static_cast<int>(t));
    if (map && seen.insert(map).second) cost.multiply_adds += multiply_adds(graph, *map);
  }
  return cost;
}

}  // namespace tool
