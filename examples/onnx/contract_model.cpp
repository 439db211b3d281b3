// SPDX-License-Identifier: Apache-2.0
#include "onnx/contract_model.hpp"

#include "onnx/data_types.hpp"
#include "onnx/plan.hpp"
#include "onnx/region_expression.hpp"
#include "onnx/rewriter.hpp"
#include "text.hpp"

#include <concertina/contract.hpp>

#include <algorithm>
#include <cmath>
#include <concepts>
#include <limits>
#include <set>
#include <string_view>

namespace tool {

/// "conv2d 3->8 @3x3 p1x1 +bias".
std::string describe(const NewLayer& layer) {
  return with_rank(layer.rank, [&](auto rank) {
    constexpr int Rank = rank();
    const concertina::ConvShape<Rank> shape{
        .out = layer.out,
        .in = layer.in,
        .kernel_size = per_axis<Rank>(layer.kernel, 1),
        .stride = per_axis<Rank>(layer.strides, 1),
        .padding = concertina::Padding<Rank>::sides(per_axis<Rank>(layer.pads_begin, 0),
                                                    per_axis<Rank>(layer.pads_end, 0)),
        .dilation = per_axis<Rank>(layer.dilations, 1),
        .groups = layer.groups,
        .bias = layer.has_bias};
    return (layer.transposed ? "transposed " : "") + concertina::to_string(shape);
  });
}

namespace {

template <int Rank>
TapNorms tap_norms(const Conv<double, Rank>& layer, const std::string& name) {
  const concertina::PerAxis<Rank>& kernel = layer.shape().kernel_size;
  std::vector<double> norms(static_cast<std::size_t>(concertina::numel(kernel)));
  for (std::size_t i = 0; i < layer.weight().size(); ++i) {
    double& norm = norms[i % norms.size()];
    norm = std::hypot(norm, layer.weight()[i]);
  }
  return {.layer = name, .kernel = Dims(kernel.begin(), kernel.end()), .norms = std::move(norms)};
}

/// Of a region whose maps have `rank` spatial axes.
template <int Rank>
TapNorms tap_norms(const Expr<double, Rank>& expression, int rank) {
  const auto& tree = expression.tree();
  if (tree.is_leaf()) {
    return tap_norms(tree.leaf().template to<double>(),
                     tree.leaf().channel_map()
                         ? concertina::to_string(expression)
                         : describe(layer_of_shape(tree.leaf().shape(), rank)));
  }
  TapNorms result{.join = tree.join()};
  for (const auto& part : tree.parts()) {
    result.parts.push_back(tap_norms(Expr<double, Rank>(part), rank));
  }
  return result;
}

/// As a type stores it.
double stored(onnx::DataType type, double value) {
  return with_float(
      type, [&]<class Stored>(Stored) { return static_cast<double>(static_cast<Stored>(value)); });
}

/// Whether the largest element of a weight is below the type's normal numbers, so that rounding it
/// loses much of the whole.
bool underflows(onnx::DataType type, std::span<const double> weight) {
  double largest = 0;
  for (const double element : weight) largest = std::max(largest, std::abs(element));
  return with_float(type, [&]<class Stored>(Stored) {
    return largest > 0 && largest < static_cast<double>(std::numeric_limits<Stored>::min());
  });
}

/// Puts the region's contraction in its place; into `result` the norms of taps, where wanted.
void contract_region(const Graph& graph, Segments segments, const Plan& plan, bool with_norms,
                     Budget& budget, ContractedRegion& result, Rewriter& rewriter) {
  with_expression({segments}, [&](auto type) {
    using Expression = typename decltype(type)::type;
    constexpr int Rank = Expression::Rank;
    const auto size = size_of<Rank>(graph[segments.back().from], plan.layer.in_layout);
    concertina::Border<Rank> border{.interior_only = plan.where == Equality::interior};
    if (plan.where == Equality::size) border.input_size = size;
    const Segments layers = segments.first(segments.size() - plan.shifted),
                   shifted = segments.subspan(layers.size());
    // The expression's layers are gone when the result is written.
    const auto contraction = [&] {
      const RegionExpression<Expression> region(graph, layers);
      const Expression expression = shifted_expression(*region, shifted);
      budget.take(graph.model().origin + ": contracting the region that makes " +
                      in_quotes(graph[segments.front().to].name),
                  0, static_cast<double>(form_of(expression).multiply_adds(border.input_size)));
      if constexpr (std::same_as<Expression, Expr<double, Rank>>) {
        if (with_norms) result.taps_before = tap_norms(expression, rank_of(segments));
      }
      return type_of(segments) == onnx::DataType::float64
                 ? concertina::contract<long double>(expression, border)
                 : concertina::contract(expression, border);
    }();
    std::vector<double> shift;
    if (!shifted.empty()) shift = split_affine(shifted, layer_of(contraction).shape().in).shift;
    const onnx::DataType wanted = type_of(segments);
    const auto holds = [&](double element) { return std::isfinite(stored(wanted, element)); };
    if (!std::ranges::all_of(layer_of(contraction).weight(), holds) ||
        !std::ranges::all_of(contraction.bias(), holds) || !std::ranges::all_of(shift, holds)) {
      if (const std::string name = not_finite(graph, segments); !name.empty()) {
        throw concertina::NumericalError(graph.model().origin + ": the region that makes " +
                                         in_quotes(graph[segments.front().to].name) +
                                         " has weights that are not finite, such as " +
                                         in_quotes(name));
      }
      throw NotLinear("it contracts to numbers that " + onnx::to_string(wanted) + " does not hold");
    }
    if (underflows(wanted, layer_of(contraction).weight())) {
      throw NotLinear("it contracts to numbers that are too small for " + onnx::to_string(wanted));
    }
    if (wanted == onnx::DataType::bfloat16 && graph.opset() < 22 &&
        rewriter.writes_convolution(segments, plan.layer)) {
      throw NotLinear("Conv takes bfloat16 from opset 22 on");
    }
    if constexpr (std::same_as<Expression, Expr<double, Rank>>) {
      if (with_norms) result.taps_after = tap_norms(contraction, result.layer);
    }
    rewriter.replace(segments, plan.layer, layer_of(contraction).weight(), contraction.bias(),
                     shift);
  });
}

/// How many segments a chain begins with of which the best groups are known: all but those near the
/// place where it may have been cut.
std::size_t count_settled(Segments segments) {
  std::size_t maps = 0;
  for (const Segment& segment : segments) maps += segment.maps.size();
  if (maps < longest_region / 2) return segments.size();
  std::size_t settled = segments.size();
  maps = 0;
  while (segments.size() - settled < longest_group && maps < longest_region / 2)
    maps += segments[--settled].maps.size();
  return settled;
}

/// The node's name, or that of what it makes.
std::string name_of(const Graph& graph, int node) {
  const onnx::Node& n = graph.node(node);
  return n.name.empty() ? n.outputs.front() : n.name;
}

}  // namespace

ContractedModel contract_model(const onnx::Model& model, const ModelOptions& options) {
  const Graph graph(model, options.graph);
  std::set<std::string, std::less<>> only(options.only.begin(), options.only.end());
  for (const std::string& name : only) {
    const bool node =
        std::ranges::any_of(model.nodes, [&](const onnx::Node& each) { return each.name == name; });
    if (!node && graph.find(name) < 0)
      throw UsageError("--only: no tensor or node " + in_quotes(name));
  }
  const LinearGraph linear(graph);
  Budget budget = options.graph.budget;
  Planner planner(graph, options, budget);
  Rewriter rewriter(graph);
  ContractedModel result;
  result.before = cost_of(linear);
  std::set<std::pair<int, int>> reported;
  std::set<int> planned;  // tensors from which the best groups are known

  const auto wanted = [&](const Segments& segments) {
    if (only.empty() || only.contains(graph[segments.front().to].name)) return true;
    return std::ranges::any_of(segments, [&](const Segment& segment) {
      return std::ranges::any_of(segment.maps, [&](const LinearNode* map) {
        return std::ranges::any_of(map->nodes,
                                   [&](int node) { return only.contains(graph.node(node).name); });
      });
    });
  };
  const auto leave = [&](Segments segments, const Plan& plan) {
    if (plan.reason.empty() || !reported.emplace(segments.front().to, segments.back().from).second)
      return;
    result.left.push_back(
        {graph[segments.back().from].name + " to " + graph[segments.front().to].name, plan.reason,
         plan.remedy});
  };

  for (int n = static_cast<int>(model.nodes.size()) - 1; n >= 0; --n) {
    for (std::size_t o = 0; graph.output(n, o) >= 0; ++o) {
      const int tensor = graph.output(n, o);
      const LinearNode* map = linear.maker(tensor);
      if (!map || rewriter.removed(n) || planned.contains(tensor)) continue;
      const auto all =
          segments_to(linear, tensor, [&](int node) { return rewriter.removed(node); });
      if (count_nodes(all) < 2) continue;
      const std::size_t known = count_settled(all);
      const std::vector<Group> groups = best_groups(planner, all, options.when);
      for (std::size_t g = 0; g < groups.size(); ++g) {
        const auto& [begin, end, plan] = groups[g];
        if (begin <= known) planned.insert(all[begin].to);
        const Segments segments = Segments(all).subspan(begin, end - begin);
        if (!plan.possible || !wanted(segments)) {
          leave(segments, plan);
        } else {
          ContractedRegion region{
              .source = graph[segments.back().from].name,
              .result = graph[segments.front().to].name,
              .nodes = {},
              .layer = describe(plan.layer) + (plan.shifted > 0 ? ", after a shift" : ""),
              .where = plan.where,
              .border = plan.border,
              .before = plan.before,
              .after = plan.after};
          try {
            contract_region(graph, segments, plan, options.tap_norms, budget, region, rewriter);
          } catch (const NotLinear& error) {
            Plan left = plan;
            left.reason = error.what();
            leave(segments, left);
            continue;
          }
          for (auto segment = segments.rbegin(); segment != segments.rend(); ++segment) {
            for (auto each = segment->maps.rbegin(); each != segment->maps.rend(); ++each) {
              for (const int node : (*each)->nodes) region.nodes.push_back(name_of(graph, node));
            }
          }
          result.regions.push_back(std::move(region));
          if (plan.shifted > 0) leave(segments, plan);
        }
        if (g > 0) {
          const Segments pair =
              Segments(all).subspan(groups[g - 1].begin, end - groups[g - 1].begin);
          Plan together = planner.plan(pair);
          const double apart = groups[g - 1].plan.cost().multiply_adds + plan.cost().multiply_adds;
          if (together.possible && together.after.multiply_adds > apart) {
            together.reason =
                "multiply-adds would grow, " + change(apart, together.after.multiply_adds);
            together.remedy = "--when always";
          } else if (together.possible) {
            together.reason = "the layers cost no less together";
          }
          leave(pair, together);
        }
      }
    }
  }
  std::set<std::string_view> replaceable;  // by a caller: initializers that are inputs too
  for (const onnx::Tensor& tensor : model.initializers) {
    if (!graph[graph.find(tensor.name)].constant) replaceable.insert(tensor.name);
  }
  for (int n = 0; n < static_cast<int>(model.nodes.size()); ++n) {
    const bool constant = graph.output(n) >= 0 && graph[graph.output(n)].constant;
    if (!linear.reason(n).empty() && !rewriter.removed(n) && !constant) {
      const bool replaced = std::ranges::any_of(
          graph.node(n).inputs, [&](const auto& name) { return replaceable.contains(name); });
      result.left.push_back(
          {graph.node(n).op_type + " " + name_of(graph, n), linear.reason(n),
           replaced ? "--initializers-are-constant, if no caller replaces it" : ""});
    }
  }
  std::ranges::reverse(result.regions);
  result.assumed_size = std::ranges::any_of(model.inputs, [&](const onnx::ValueInfo& input) {
    const GraphTensor& tensor = graph[graph.find(input.name)];
    return !tensor.constant && tensor.dims && tensor.dims->size() > 1 &&  // the batch is no size
           std::find(tensor.dims->begin() + 1, tensor.dims->end(), unknown) != tensor.dims->end();
  });
  result.model = std::move(rewriter).finished();
  const Graph after(result.model, options.graph);
  result.after = cost_of(LinearGraph(after));
  return result;
}

}  // namespace tool
