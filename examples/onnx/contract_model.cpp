// SPDX-License-Identifier: Apache-2.0
#include "onnx/contract_model.hpp"

#include "onnx/regions.hpp"
#include "text.hpp"

#include <concertina/contract.hpp>
#include <concertina/detail/channel_map.hpp>
#include <concertina/exactness.hpp>
#include <concertina/layers.hpp>

#include <algorithm>
#include <cmath>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <set>
#include <span>
#include <tuple>

namespace tool {

namespace {

using concertina::ChannelMap;
using concertina::Conv;
using concertina::ConvShape;
using concertina::Expr;
using concertina::PerAxis;
using Kind = LinearNode::Kind;
using Segments = std::span<const Segment>;  // the last applied first

/// Calls f with the rank as a constant.
template <class F>
auto with_rank(int rank, const F& f) {
  switch (rank) {
    case 0: return f(std::integral_constant<int, 0>());
    case 1: return f(std::integral_constant<int, 1>());
    case 2: return f(std::integral_constant<int, 2>());
    default: return f(std::integral_constant<int, 3>());
  }
}

template <int Rank>
PerAxis<Rank> per_axis(const Dims& dims) {
  PerAxis<Rank> result;
  for (int axis = 0; axis < Rank; ++axis) result[axis] = dims.at(static_cast<std::size_t>(axis));
  return result;
}

int rank_of(Segments segments) {
  int rank = 0;
  for (const Segment& segment : segments) {
    for (const LinearNode* map : segment.maps) rank = std::max(rank, map->spatial_axes);
  }
  return rank;
}

std::size_t count_nodes(Segments segments) {
  std::size_t count = 0;
  for (const Segment& segment : segments) {
    for (const LinearNode* map : segment.maps) count += map->nodes.size();
  }
  return count;
}

bool has_layer(Segments segments) {
  return std::ranges::any_of(segments, [](const Segment& segment) {
    return std::ranges::any_of(segment.maps, [](const LinearNode* map) {
      return map->kind == Kind::conv || map->kind == Kind::linear ||
             map->kind == Kind::conv_transpose;
    });
  });
}

/// A region that cannot be what it was taken for.
struct NotLinear : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// Where each tensor of a region has its channels.
class Layouts {
 public:
  /// Throws NotLinear where operators disagree.
  explicit Layouts(Segments segments) {
    do {
      changed_ = false;
      for (const Segment& segment : segments) {
        for (const LinearNode* map : segment.maps) join(*map);
      }
    } while (changed_);
  }

  Layout operator[](int tensor) const { return find(tensor).value_or(Layout::channels_first); }

 private:
  std::optional<Layout> find(int tensor) const {
    const auto found = layouts_.find(tensor);
    return found == layouts_.end() ? std::nullopt : std::optional(found->second);
  }

  void set(std::span<const int> tensors, const std::optional<Layout>& layout) {
    if (!layout) return;
    for (const int tensor : tensors) {
      const auto [at, added] = layouts_.emplace(tensor, *layout);
      if (!added && at->second != *layout)
        throw NotLinear("operators take different axes for its channels");
      changed_ = changed_ || added;
    }
  }

  void join(const LinearNode& map) {
    std::optional<Layout> in = map.in, out = map.out;
    const auto across = [&](const std::optional<Layout>& layout) -> std::optional<Layout> {
      if (!layout || map.kind != Kind::move_channels) return layout;
      return *layout == Layout::channels_first ? Layout::channels_last : Layout::channels_first;
    };
    for (const int operand : map.operands) in = in ? in : find(operand);
    for (const int output : map.outputs) out = out ? out : find(output);
    set(map.operands, in ? in : across(out));
    set(map.outputs, out ? out : across(in));
  }

  std::map<int, Layout> layouts_;
  bool changed_ = false;
};

/// A region's expression, with the layers that it views.
template <int Rank>
class RegionExpression {
 public:
  /// Throws NotLinear where the region is no map of this rank.
  RegionExpression(const Graph& graph, Segments segments) : graph_(graph), layouts_(segments) {
    const int source = segments.back().from;
    channels_ = channels_of(source, segments);
    for (auto segment = segments.rbegin(); segment != segments.rend(); ++segment) {
      makers_.clear();
      for (const LinearNode* map : segment->maps) {
        for (const int output : map->outputs) makers_.emplace(output, map);
      }
      made_.clear();
      from_ = segment->from;
      const Part part = make(segment->to, channels_);
      if (part.expression)
        expression_ = expression_ ? then(*expression_, *part.expression) : part.expression;
      channels_ = part.channels;
    }
    if (!expression_) expression_ = identity();
  }
  RegionExpression(const RegionExpression&) = delete;

  const Expr<double, Rank>& operator*() const { return *expression_; }
  const Expr<double, Rank>* operator->() const { return &*expression_; }
  const Layouts& layouts() const { return layouts_; }

 private:
  /// No expression: the identity.
  struct Part {
    std::optional<Expr<double, Rank>> expression;
    Index channels;
  };

  static Expr<double, Rank> then(const Expr<double, Rank>& inner, const Expr<double, Rank>& outer) {
    return Expr<double, Rank>(concertina::Join::chain, inner, outer);
  }
  Expr<double, Rank> identity() const {
    if (channels_ == unknown) throw NotLinear("the number of its channels is not known");
    return Expr<double, Rank>(concertina::identity<double>(channels_));
  }

  /// Channels of the source: declared, or as the maps that read it say.
  Index channels_of(int source, Segments segments) const {
    const auto& dims = graph_[source].dims;
    if (dims && dims->size() >= 2) {
      const Index declared = layouts_[source] == Layout::channels_first ? (*dims)[1] : dims->back();
      if (declared != unknown) return declared;
    }
    for (const LinearNode* map : segments.back().maps) {
      if (std::ranges::find(map->operands, source) == map->operands.end()) continue;
      if (map->kind == Kind::conv) return map->weight->dims[1] * map->groups;
      if (map->kind == Kind::conv_transpose) return map->weight->dims[0];
      if (map->channels != unknown) return map->channels;
    }
    return unknown;
  }

  /// The map from the segment's source to a tensor.
  Part make(int tensor, Index source_channels) {
    if (tensor == from_) return {std::nullopt, source_channels};
    if (made_.size() > 4096) throw NotLinear("too many paths lead through it");
    const LinearNode& map = *makers_.at(tensor);
    made_.push_back(tensor);
    if (map.kind == Kind::sum || map.kind == Kind::concat) return joined(map, source_channels);
    Part part = make(map.operands.front(), source_channels);
    if (map.kind == Kind::identity || map.kind == Kind::move_channels) return part;
    channels_ = part.channels;
    const std::size_t output =
        static_cast<std::size_t>(std::ranges::find(map.outputs, tensor) - map.outputs.begin());
    Part own = layer(map, output);
    if (part.expression) own.expression = then(*part.expression, *own.expression);
    return own;
  }

  Part joined(const LinearNode& map, Index source_channels) {
    std::vector<Expr<double, Rank>> parts;
    Index channels = 0;
    for (std::size_t i = 0; i < map.operands.size(); ++i) {
      Part part = make(map.operands[i], source_channels);
      channels_ = part.channels;
      parts.push_back(part.expression ? *part.expression : identity());
      if (!map.signs.empty() && map.signs[i] < 0) parts.back() = parts.back().scaled(-1.0);
      channels = map.kind == Kind::concat ? channels + part.channels : part.channels;
    }
    const auto join =
        map.kind == Kind::concat ? concertina::Join::concat_outputs : concertina::Join::sum;
    return {Expr<double, Rank>(join, parts), channels};
  }

  /// One map as a leaf.
  Part layer(const LinearNode& map, std::size_t output) {
    switch (map.kind) {
      case Kind::conv: return conv(map);
      case Kind::linear: return linear(map);
      case Kind::batch_norm: return batch_norm(map);
      case Kind::channel_scale: return channel_scale(map);
      case Kind::channel_select: {
        require_channels();
        const auto& source = output == 0 ? map.source : map.more_sources[output - 1];
        return {Expr<double, Rank>(concertina::channel_select<double>(channels_, source)),
                static_cast<Index>(source.size())};
      }
      case Kind::average_pool:
        return {concertina::average_pool<double, Rank>(
                    map.channels, per_axis<Rank>(map.windows->kernel),
                    per_axis<Rank>(map.windows->strides), padding(*map.windows)),
                map.channels};
      case Kind::pad: {
        Conv<double, Rank> ones({.out = map.channels,
                                 .in = map.channels,
                                 .padding = padding(*map.windows),
                                 .groups = map.channels});
        std::ranges::fill(ones.weight(), 1.0);
        return {Expr<double, Rank>(std::move(ones)), map.channels};
      }
      default: throw NotLinear("a transposed convolution among branches");
    }
  }

  void require_channels() const {
    if (channels_ == unknown) throw NotLinear("the number of its channels is not known");
  }

  static concertina::Padding<Rank> padding(const Windows& windows) {
    return concertina::Padding<Rank>::sides(per_axis<Rank>(windows.pads_begin),
                                            per_axis<Rank>(windows.pads_end));
  }

  /// Elements of a bias; none where all are zero, which a border does not show.
  static std::vector<double> bias_of(const onnx::Tensor* tensor) {
    if (!tensor) return {};
    std::vector<double> bias = tensor->values<double>();
    if (std::ranges::all_of(bias, [](double element) { return element == 0; })) bias.clear();
    return bias;
  }

  Part conv(const LinearNode& map) {
    const auto& dims = map.weight->dims;
    if (static_cast<int>(dims.size()) != Rank + 2)
      throw NotLinear("its layers have other numbers of spatial axes");
    std::vector<double> bias = bias_of(map.bias);
    const ConvShape<Rank> shape{.out = dims[0],
                                .in = dims[1] * map.groups,
                                .kernel_size = per_axis<Rank>(map.windows->kernel),
                                .stride = per_axis<Rank>(map.windows->strides),
                                .padding = padding(*map.windows),
                                .dilation = per_axis<Rank>(map.windows->dilations),
                                .groups = map.groups,
                                .bias = !bias.empty()};
    return {Expr<double, Rank>(
                Conv<double, Rank>(shape, map.weight->values<double>(), std::move(bias))),
            dims[0]};
  }

  Part linear(const LinearNode& map) {
    const Index out = map.weight->dims[map.transposed ? 1 : 0],
                in = map.weight->dims[map.transposed ? 0 : 1];
    std::vector<double> weight = map.weight->values<double>();
    if (map.transposed) {
      std::vector<double> rows(weight.size());
      for (Index i = 0; i < in; ++i) {
        for (Index o = 0; o < out; ++o) {
          rows[static_cast<std::size_t>(o * in + i)] =
              weight[static_cast<std::size_t>(i * out + o)];
        }
      }
      weight = std::move(rows);
    }
    for (double& element : weight) element *= map.alpha;
    std::vector<double> bias = map.beta == 0 ? std::vector<double>() : bias_of(map.bias);
    if (bias.size() == 1) bias.assign(static_cast<std::size_t>(out), bias.front());
    for (double& element : bias) element *= map.beta;
    ConvShape<Rank> shape{.out = out, .in = in, .bias = !bias.empty()};
    if (!map.size.empty()) {
      shape.in = map.channels;
      shape.kernel_size = per_axis<Rank>(map.size);
    }
    return {Expr<double, Rank>(Conv<double, Rank>(shape, std::move(weight), std::move(bias))), out};
  }

  Part batch_norm(const LinearNode& map) {
    const auto list = [&](std::size_t i) { return map.statistics[i]->values<double>(); };
    const Index channels = map.statistics.front()->dims[0];
    return {Expr<double, Rank>(concertina::batch_norm<double>({.running_mean = list(2),
                                                               .running_var = list(3),
                                                               .weight = list(0),
                                                               .bias = list(1),
                                                               .eps = map.eps})),
            channels};
  }

  Part channel_scale(const LinearNode& map) {
    if (channels_ == unknown) channels_ = map.channels;
    require_channels();
    const auto each = [&](const std::vector<double>& values) {
      return values.size() == 1
                 ? std::vector<double>(static_cast<std::size_t>(channels_), values.front())
                 : values;
    };
    ChannelMap<double> scale{
        .in = channels_, .out = channels_, .weight = each(map.scale), .bias = each(map.shift)};
    if (std::ranges::all_of(scale.bias, [](double element) { return element == 0; }))
      scale.bias.clear();
    const auto fits = [&](const std::vector<double>& list) {
      return list.empty() || static_cast<Index>(list.size()) == channels_;
    };
    if (!fits(scale.weight) || !fits(scale.bias))
      throw NotLinear("a constant of other channels broadcasts");
    return {Expr<double, Rank>(scale), channels_};
  }

  const Graph& graph_;
  Layouts layouts_;
  Index channels_ = unknown;  // of what the next layer reads
  int from_ = -1;
  std::map<int, const LinearNode*> makers_;
  std::vector<int> made_;
  std::optional<Expr<double, Rank>> expression_;
};

// ---- costs -------------------------------------------------------------------------------------

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

// ---- one region --------------------------------------------------------------------------------

/// A contracted layer, of any rank.
struct NewLayer {
  int rank = 0;
  Index out = 0, in = 0, groups = 1;
  Dims kernel = {}, strides = {}, dilations = {}, pads_begin = {}, pads_end = {};
  bool has_bias = false;
  std::vector<double> weight = {}, bias = {};
  Layout in_layout = Layout::channels_first, out_layout = Layout::channels_first;
  bool flat = false;  // the result has no spatial axes, the source has
};

template <int Rank>
NewLayer layer_of_shape(const ConvShape<Rank>& shape) {
  const auto list = [](const PerAxis<Rank>& axes) { return Dims(axes.begin(), axes.end()); };
  return {.rank = Rank,
          .out = shape.out,
          .in = shape.in,
          .groups = shape.groups,
          .kernel = list(shape.kernel_size),
          .strides = list(shape.stride),
          .dilations = list(shape.dilation),
          .pads_begin = list(shape.padding.start),
          .pads_end = list(shape.padding.end),
          .has_bias = shape.bias};
}

bool is_pointwise(const NewLayer& layer) {
  const auto all = [](const Dims& dims, Index value) {
    return std::ranges::all_of(dims, [&](Index d) { return d == value; });
  };
  return layer.groups == 1 && all(layer.kernel, 1) && all(layer.strides, 1) &&
         all(layer.pads_begin, 0) && all(layer.pads_end, 0);
}

/// What becomes of a region if it is contracted, decided without weights; or why it cannot be.
struct Plan {
  bool possible = false;
  std::string reason, remedy;  // otherwise
  NewLayer layer = {};         // without elements
  Equality where = Equality::everywhere;
  std::string border = {};
  ModelCost before, after;
  double nodes_before = 0, nodes_after = 0;
};

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

/// The spatial size of a region's source, where it is known.
template <int Rank>
std::optional<PerAxis<Rank>> size_of(const GraphTensor& source, Layout layout) {
  if constexpr (Rank == 0) return std::nullopt;
  if (!source.dims || source.dims->size() != static_cast<std::size_t>(Rank) + 2)
    return std::nullopt;
  const auto begin = source.dims->begin() + (layout == Layout::channels_first ? 2 : 1);
  const Dims size(begin, begin + Rank);
  if (std::ranges::any_of(size, [](Index extent) { return extent < 1; })) return std::nullopt;
  return per_axis<Rank>(size);
}

std::string percent(double before, double after) {
  if (before <= 0) return brief(after);
  return grouped(static_cast<std::ptrdiff_t>(before)) + " to " +
         grouped(static_cast<std::ptrdiff_t>(after));
}

class Planner {
 public:
  Planner(const Graph& graph, const ModelOptions& options) : graph_(graph), options_(options) {}

  Plan plan(Segments segments) const {
    Plan result;
    result.nodes_before = static_cast<double>(count_nodes(segments));
    result.before.parameters = parameters(graph_, segments);
    for (const Segment& segment : segments) {
      for (const LinearNode* map : segment.maps)
        result.before.multiply_adds += multiply_adds(graph_, *map);
    }
    if (!has_layer(segments) || result.nodes_before < 2) return result;
    try {
      with_rank(rank_of(segments), [&](auto rank) { this->judge<rank()>(segments, result); });
    } catch (const NotLinear& error) {
      result.reason = error.what();
    } catch (const concertina::Error& error) {
      result.reason = error.what();
    }
    return result;
  }

 private:
  template <int Rank>
  void judge(Segments segments, Plan& plan) const {
    const RegionExpression<Rank> region(graph_, segments);
    const GraphTensor &source = graph_[segments.back().from], &result = graph_[segments.front().to];
    const auto size = size_of<Rank>(source, region.layouts()[segments.back().from]);
    const concertina::Form<Rank> form(*region);
    std::optional<ConvShape<Rank>> shape;
    concertina::Exactness<Rank> border;
    std::string differing;
    try {
      shape = form.shape();
      border = concertina::exactness(form);
    } catch (const concertina::ShapeError& error) {
      if (!size) throw;
      differing = error.what();  // branches may agree at the size
    }
    if (!shape || !border.exact()) {
      plan.border = shape ? border.reason : differing;
      const bool at_size = size && options_.equality != Equality::everywhere;
      if (at_size && !shape) shape = form.shape(size);
      if (at_size && concertina::exactness(form, size).exact()) {
        plan.where = Equality::size;
      } else if (shape && options_.equality == Equality::interior) {
        plan.where = Equality::interior;
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
    plan.layer = layer_of_shape(*shape);
    plan.layer.in_layout = region.layouts()[segments.back().from];
    plan.layer.out_layout = region.layouts()[segments.front().to];
    plan.layer.flat = is_flat(segments);
    const double taps = static_cast<double>(shape->in / shape->groups) *
                        static_cast<double>(numel(shape->kernel_size));
    plan.after.parameters = static_cast<double>(shape->out) * (taps + (shape->bias ? 1 : 0));
    plan.after.multiply_adds = elements(result) * (taps + (shape->bias ? 1 : 0));
    const bool bigger = plan.after.parameters > plan.before.parameters,
               slower = plan.after.multiply_adds > plan.before.multiply_adds;
    if ((options_.when == When::smaller && (bigger || slower)) ||
        (options_.when == When::faster && slower)) {
      plan.reason = slower ? "multiply-adds would grow, " +
                                 percent(plan.before.multiply_adds, plan.after.multiply_adds)
                           : "parameters would grow, " +
                                 percent(plan.before.parameters, plan.after.parameters);
      plan.remedy = slower ? "--when always" : "--when faster";
      return;
    }
    plan.nodes_after =
        count_nodes(plan.layer, result.dims && result.dims->size() == 2, graph_.opset());
    plan.possible = plan.nodes_after < plan.nodes_before || bigger || slower ||
                    plan.after.parameters < plan.before.parameters ||
                    plan.after.multiply_adds < plan.before.multiply_adds;
  }

  static bool is_flat(Segments segments) {
    return std::ranges::any_of(segments, [](const Segment& segment) {
      return std::ranges::any_of(segment.maps, [](const LinearNode* map) { return map->flat; });
    });
  }

  const Graph& graph_;
  const ModelOptions& options_;
};

/// "conv2d 3->8 @3x3 p1x1 +bias".
std::string describe(const NewLayer& layer) {
  return with_rank(layer.rank, [&](auto rank) {
    constexpr int Rank = rank();
    const ConvShape<Rank> shape{
        .out = layer.out,
        .in = layer.in,
        .kernel_size = per_axis<Rank>(layer.kernel),
        .stride = per_axis<Rank>(layer.strides),
        .padding = concertina::Padding<Rank>::sides(per_axis<Rank>(layer.pads_begin),
                                                    per_axis<Rank>(layer.pads_end)),
        .dilation = per_axis<Rank>(layer.dilations),
        .groups = layer.groups,
        .bias = layer.has_bias};
    return concertina::to_string(shape);
  });
}

/// The layer that a region becomes, its elements not yet rounded to their type.
NewLayer contract_region(const Graph& graph, Segments segments, const Plan& plan, bool wide) {
  return with_rank(plan.layer.rank, [&](auto rank) {
    constexpr int Rank = rank();
    const RegionExpression<Rank> region(graph, segments);
    const auto size = size_of<Rank>(graph[segments.back().from], plan.layer.in_layout);
    concertina::Border<Rank> border{.interior_only = plan.where == Equality::interior};
    if (plan.where == Equality::size) border.input_size = size;
    const Conv<double, Rank> layer = wide ? concertina::contract<long double>(*region, border)
                                          : concertina::contract(*region, border);
    NewLayer result = plan.layer;
    result.weight.assign(layer.weight().begin(), layer.weight().end());
    result.bias.assign(layer.bias().begin(), layer.bias().end());
    const auto finite = [](double element) { return std::isfinite(element); };
    if (!std::ranges::all_of(result.weight, finite) || !std::ranges::all_of(result.bias, finite)) {
      throw concertina::NumericalError(graph.model().origin + ": the region that makes " +
                                       in_quotes(graph[segments.front().to].name) +
                                       " has weights that are not finite, or contracts to such");
    }
    return result;
  });
}

// ---- the model rewritten -----------------------------------------------------------------------

template <class Stored>
onnx::Tensor rounded(const std::string& name, const Dims& dims, const std::vector<double>& values) {
  std::vector<Stored> elements;
  elements.reserve(values.size());
  for (const double value : values) elements.push_back(concertina::detail::convert<Stored>(value));
  return onnx::Tensor::of<Stored>(name, dims, elements);
}

onnx::Tensor tensor_of(const std::string& name, const Dims& dims, const std::vector<double>& values,
                       onnx::DataType type) {
  switch (type) {
    case onnx::DataType::float16: return rounded<Eigen::half>(name, dims, values);
    case onnx::DataType::bfloat16: return rounded<Eigen::bfloat16>(name, dims, values);
    case onnx::DataType::float64: return onnx::Tensor::of<double>(name, dims, values);
    default: return rounded<float>(name, dims, values);
  }
}

/// A model in which nodes are replaced.
class Rewriter {
 public:
  explicit Rewriter(const Graph& graph) : graph_(graph), model_(graph.model()) {
    for (const GraphTensor& tensor : graph.tensors()) names_.insert(tensor.name);
    removed_.resize(model_.nodes.size());
    inserted_.resize(model_.nodes.size());
  }

  bool removed(int node) const { return removed_[static_cast<std::size_t>(node)]; }

  void replace(Segments segments, const NewLayer& layer) {
    for (const Segment& segment : segments) {
      for (const LinearNode* map : segment.maps) {
        for (const int node : map->nodes) removed_[static_cast<std::size_t>(node)] = true;
      }
    }
    const GraphTensor& result = graph_[segments.front().to];
    result_ = &result;
    const auto last = static_cast<std::size_t>(result.producer);
    nodes_ = &inserted_[last];
    node_name_ = model_.nodes[last].name;
    type_ = type_of(segments);
    write(layer, graph_[segments.back().from].name);
    // In the order in which they run, the last one under the old node's name.
    nodes_->back().name = node_name_;
    nodes_->back().outputs = {result.name};
  }

  onnx::Model finished() && {
    remove_dead();
    onnx::Model result = model_;
    result.nodes.clear();
    for (std::size_t n = 0; n < model_.nodes.size(); ++n) {
      if (!removed_[n]) result.nodes.push_back(model_.nodes[n]);
      for (onnx::Node& node : inserted_[n]) result.nodes.push_back(std::move(node));
    }
    std::set<std::string, std::less<>> alive;
    for (const onnx::Node& node : result.nodes) {
      alive.insert(node.outputs.begin(), node.outputs.end());
      alive.insert(node.inputs.begin(), node.inputs.end());
    }
    const auto lost = [&](const std::string& name) {
      if (alive.contains(name)) return false;
      const int tensor = graph_.find(name);
      return tensor >= 0 && !graph_[tensor].escapes && !graph_[tensor].consumers.empty();
    };
    std::set<std::string, std::less<>> gone;
    std::erase_if(result.initializers, [&](const onnx::Tensor& tensor) {
      return lost(tensor.name) && graph_[graph_.find(tensor.name)].constant &&
             gone.insert(tensor.name).second;
    });
    std::erase_if(result.inputs,
                  [&](const onnx::ValueInfo& input) { return gone.contains(input.name); });
    std::erase_if(result.values, [&](const onnx::ValueInfo& value) { return lost(value.name); });
    for (onnx::Tensor& tensor : constants_) {
      if (model_.ir_version < 4) {  // every initializer is an input there
        onnx::ValueInfo info{.name = tensor.name,
                             .type = tensor.type,
                             .shape = std::vector<onnx::Dimension>(),
                             .encoded = {}};
        for (const auto extent : tensor.dims) info.shape->push_back({.value = extent, .name = {}});
        result.inputs.push_back(std::move(info));
      }
      result.initializers.push_back(std::move(tensor));
    }
    return result;
  }

 private:
  onnx::DataType type_of(Segments segments) const {
    for (const Segment& segment : segments) {
      for (const LinearNode* map : segment.maps) {
        if (map->weight) return map->weight->type;
      }
    }
    return onnx::DataType::float32;
  }

  std::string fresh(const std::string& suffix) {
    std::string name = result_->name + suffix;
    for (int i = 2; !names_.insert(name).second; ++i)
      name = result_->name + suffix + "_" + std::to_string(i);
    return name;
  }
  std::string constant(const std::string& suffix, const Dims& dims,
                       const std::vector<double>& values) {
    constants_.push_back(tensor_of(fresh(suffix), dims, values, type_));
    return constants_.back().name;
  }
  std::string constant(const std::string& suffix, const Dims& values) {
    constants_.push_back(
        onnx::Tensor::of<std::int64_t>(fresh(suffix), {std::ssize(values)},
                                       std::vector<std::int64_t>(values.begin(), values.end())));
    return constants_.back().name;
  }

  /// Appends a node; its output has a new name until another is given.
  std::string node(const std::string& op, std::vector<std::string> inputs,
                   std::vector<onnx::Attribute> attributes = {}) {
    std::string output = fresh("." + op);
    nodes_->push_back({.name = node_name_.empty() ? "" : node_name_ + "." + op,
                       .op_type = op,
                       .inputs = std::move(inputs),
                       .outputs = {output},
                       .attributes = std::move(attributes)});
    return output;
  }
  std::string move_channels(const std::string& x, int rank, Layout to) {
    const Index axes = rank + 2;
    Dims perm = {0};
    if (to == Layout::channels_first) perm.push_back(axes - 1);
    for (Index axis = 1; axis < axes - 1; ++axis)
      perm.push_back(to == Layout::channels_first ? axis : axis + 1);
    if (to == Layout::channels_last) perm.push_back(1);
    return node("Transpose", {x}, {onnx::Attribute::of("perm", perm)});
  }

  void write(const NewLayer& layer, std::string x) {
    const bool two_axes = result_->dims && result_->dims->size() == 2;
    if (layer.rank == 0 || (is_pointwise(layer) && layer.in_layout == Layout::channels_last &&
                            layer.out_layout == Layout::channels_last)) {
      const bool gemm = layer.rank == 0 && two_axes && layer.groups == 1;
      return write_linear(layer, x, gemm);
    }
    if (layer.in_layout == Layout::channels_last)
      x = move_channels(x, layer.rank, Layout::channels_first);
    if (layer.flat && covers(layer)) {
      x = node("Flatten", {x}, {onnx::Attribute::of("axis", std::int64_t{1})});
      NewLayer rows = layer;
      for (const Index extent : layer.kernel) rows.in *= extent;
      return write_linear(rows, x, true);
    }
    x = write_conv(layer, x);
    if (layer.flat) {
      node("Flatten", {x}, {onnx::Attribute::of("axis", std::int64_t{1})});
    } else if (layer.out_layout == Layout::channels_last) {
      move_channels(x, layer.rank, Layout::channels_last);
    }
  }

  /// Whether the kernel is the whole map.
  bool covers(const NewLayer& layer) const {
    const auto zero = [](Index pad) { return pad == 0; };
    return layer.groups == 1 && std::ranges::all_of(layer.pads_begin, zero) &&
           std::ranges::all_of(layer.pads_end, zero);
  }

  void write_linear(const NewLayer& layer, const std::string& x, bool gemm) {
    const Index in = layer.in / layer.groups;
    if (layer.groups != 1) throw NotLinear("groups of a linear layer");
    if (gemm && (layer.has_bias || graph_.opset() >= 11)) {
      std::vector<std::string> inputs = {x, constant(".weight", {layer.out, in}, layer.weight)};
      if (layer.has_bias) inputs.push_back(constant(".bias", {layer.out}, layer.bias));
      node("Gemm", std::move(inputs), {onnx::Attribute::of("transB", std::int64_t{1})});
      return;
    }
    std::vector<double> columns(layer.weight.size());
    for (Index o = 0; o < layer.out; ++o) {
      for (Index i = 0; i < in; ++i) {
        columns[static_cast<std::size_t>(i * layer.out + o)] =
            layer.weight[static_cast<std::size_t>(o * in + i)];
      }
    }
    const std::string product = node("MatMul", {x, constant(".weight", {in, layer.out}, columns)});
    if (layer.has_bias) node("Add", {product, constant(".bias", {layer.out}, layer.bias)});
  }

  std::string write_conv(const NewLayer& layer, std::string x) {
    Dims pads, crops = {0, 0};
    const auto parts = [&](const Dims& list) {
      for (const Index pad : list) {
        pads.push_back(std::max<Index>(pad, 0));
        crops.push_back(std::min<Index>(pad, 0));
      }
    };
    parts(layer.pads_begin);
    crops.insert(crops.end(), {0, 0});
    parts(layer.pads_end);
    if (std::ranges::any_of(crops,
                            [](Index crop) { return crop < 0; })) {  // Conv has no negative pads
      if (graph_.opset() >= 11) {
        x = node("Pad", {x, constant(".crop", crops)});
      } else {
        x = node("Pad", {x}, {onnx::Attribute::of("pads", crops)});
      }
    }
    Dims weight = {layer.out, layer.in / layer.groups};
    weight.insert(weight.end(), layer.kernel.begin(), layer.kernel.end());
    std::vector<std::string> inputs = {x, constant(".weight", weight, layer.weight)};
    if (layer.has_bias) inputs.push_back(constant(".bias", {layer.out}, layer.bias));
    return node("Conv", std::move(inputs),
                {onnx::Attribute::of("dilations", layer.dilations),
                 onnx::Attribute::of("group", layer.groups),
                 onnx::Attribute::of("kernel_shape", layer.kernel),
                 onnx::Attribute::of("pads", pads), onnx::Attribute::of("strides", layer.strides)});
  }

  /// Nodes that only made what removed ones read: constants, shapes.
  void remove_dead() {
    for (int n = static_cast<int>(removed_.size()) - 1; n >= 0; --n) {
      if (removed(n)) continue;
      const onnx::Node& each = graph_.node(n);
      bool used = each.outputs.empty();
      for (std::size_t o = 0; o < each.outputs.size() && !used; ++o) {
        const int tensor = graph_.output(n, o);
        if (tensor < 0) continue;
        const GraphTensor& written = graph_[tensor];
        used = written.escapes || written.consumers.empty() ||
               std::ranges::any_of(written.consumers, [&](int node) { return !removed(node); }) ||
               still_read_.contains(tensor);
      }
      if (!used) removed_[static_cast<std::size_t>(n)] = true;
    }
  }

 public:
  /// A region's source: made still, although all that read it may have gone.
  void keep(int tensor) { still_read_.insert(tensor); }

 private:
  const Graph& graph_;
  const onnx::Model& model_;
  std::vector<bool> removed_;
  std::vector<std::vector<onnx::Node>> inserted_;  // after the node of this index
  std::vector<onnx::Tensor> constants_;
  std::set<std::string, std::less<>> names_;
  std::set<int> still_read_;
  // Of the region at hand:
  const GraphTensor* result_ = nullptr;
  std::vector<onnx::Node>* nodes_ = nullptr;
  std::string node_name_;
  onnx::DataType type_ = onnx::DataType::float32;
};

ModelCost cost_of(const LinearGraph& linear) {
  const Graph& graph = linear.graph();
  ModelCost cost;
  for (const GraphTensor& tensor : graph.tensors()) {
    if (tensor.constant && tensor.type != onnx::DataType::int64 &&
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

/// How a chain of segments is best cut: groups [begin, end), the last applied first.
struct Group {
  std::size_t begin, end;
  Plan plan;
};

std::vector<Group> best_groups(const Planner& planner, Segments segments, When when) {
  using Cost = std::tuple<double, double, double>;
  const auto cost = [&](const ModelCost& model, double nodes) {
    return when == When::always ? Cost(nodes, model.multiply_adds, model.parameters)
                                : Cost(model.multiply_adds, model.parameters, nodes);
  };
  const auto plus = [](const Cost& a, const Cost& b) {
    return Cost(std::get<0>(a) + std::get<0>(b), std::get<1>(a) + std::get<1>(b),
                std::get<2>(a) + std::get<2>(b));
  };
  constexpr std::size_t longest = 24;
  struct Best {
    std::optional<Cost> cost;
    Group last;
  };
  std::vector<Best> best(segments.size() + 1);
  best[0].cost = Cost(0, 0, 0);
  for (std::size_t end = 1; end <= segments.size(); ++end) {
    for (std::size_t begin = end; begin-- > 0 && end - begin <= longest;) {
      Plan plan = planner.plan(segments.subspan(begin, end - begin));
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
  const Planner planner(graph, options);
  Rewriter rewriter(graph);
  ContractedModel result;
  result.before = cost_of(linear);
  std::set<std::pair<int, int>> reported;

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
    result.left.push_back({in_quotes(graph[segments.back().from].name) + " to " +
                               in_quotes(graph[segments.front().to].name),
                           plan.reason, plan.remedy});
  };

  for (int n = static_cast<int>(model.nodes.size()) - 1; n >= 0; --n) {
    for (std::size_t o = 0; graph.output(n, o) >= 0; ++o) {
      const int tensor = graph.output(n, o);
      const LinearNode* map = linear.maker(tensor);
      if (!map || rewriter.removed(n)) continue;
      const auto all =
          segments_to(linear, tensor, [&](int node) { return rewriter.removed(node); });
      if (count_nodes(all) < 2) continue;
      const std::vector<Group> groups = best_groups(planner, all, options.when);
      for (std::size_t g = 0; g < groups.size(); ++g) {
        const auto& [begin, end, plan] = groups[g];
        const Segments segments = Segments(all).subspan(begin, end - begin);
        if (!plan.possible || !wanted(segments)) {
          leave(segments, plan);
        } else {
          const bool wide = graph[tensor].type == onnx::DataType::float64;
          rewriter.replace(segments, contract_region(graph, segments, plan, wide));
          rewriter.keep(segments.back().from);
          ContractedRegion region{.source = graph[segments.back().from].name,
                                  .result = graph[segments.front().to].name,
                                  .nodes = {},
                                  .layer = describe(plan.layer),
                                  .where = plan.where,
                                  .border = plan.border,
                                  .before = plan.before,
                                  .after = plan.after};
          for (auto segment = segments.rbegin(); segment != segments.rend(); ++segment) {
            for (auto each = segment->maps.rbegin(); each != segment->maps.rend(); ++each) {
              for (const int node : (*each)->nodes) region.nodes.push_back(describe(graph, node));
            }
          }
          result.regions.push_back(std::move(region));
        }
        if (g > 0) {
          const Segments pair = Segments(all).subspan(begin - 1, 2);
          leave(pair, planner.plan(pair));
        }
      }
    }
  }
  for (int n = 0; n < static_cast<int>(model.nodes.size()); ++n) {
    if (!linear.reason(n).empty() && !rewriter.removed(n)) {
      result.left.push_back({describe(graph, n), linear.reason(n), ""});
    }
  }
  std::ranges::reverse(result.regions);
  result.assumed_size = std::ranges::any_of(model.inputs, [&](const onnx::ValueInfo& input) {
    const GraphTensor& tensor = graph[graph.find(input.name)];
    return !tensor.constant && tensor.dims &&
           std::ranges::find(*tensor.dims, unknown) != tensor.dims->end();
  });
  result.model = std::move(rewriter).finished();
  const Graph after(result.model, options.graph);
  result.after = cost_of(LinearGraph(after));
  return result;
}

// ---- two models compared -----------------------------------------------------------------------

bool ModelComparison::proved() const {
  return std::ranges::all_of(
             regions, [](const ComparedRegion& region) { return region.unproved.empty(); }) &&
         !failed();
}

bool ModelComparison::failed() const {
  return std::ranges::any_of(regions, [](const ComparedRegion& region) {
    return std::ranges::any_of(region.proofs,
                               [](const concertina::Report& report) { return !report; });
  });
}

namespace {

bool same_constant(const onnx::Tensor& a, const onnx::Tensor& b) {
  return a.type == b.type && a.dims == b.dims && std::ranges::equal(a.elements, b.elements);
}

/// Tensors of one model by those of the other, where names differ: found from the outputs back, as
/// what equal nodes read.
class Renamed {
 public:
  /// The other model's name of a tensor.
  const std::string& operator()(const std::string& name) const {
    const auto found = names_.find(name);
    return found == names_.end() ? name : found->second;
  }
  /// Takes a tensor for another one, unless it is taken for something else.
  bool take(const std::string& name, const std::string& other) {
    return names_.emplace(name, other).first->second == other;
  }

 private:
  std::map<std::string, std::string, std::less<>> names_;
};

/// Whether two nodes do the same to the same tensors and equal constants. Tensors of `b` that `a`
/// does not have are taken for those that its node reads.
bool same_node(const Graph& a, int m, const Graph& b, int n, Renamed& renamed) {
  const onnx::Node &f = a.node(m), &g = b.node(n);
  if (f.op_type != g.op_type || f.domain != g.domain || f.inputs.size() != g.inputs.size() ||
      !std::ranges::equal(f.outputs, g.outputs, {}, {}, renamed)) {
    return false;
  }
  if (f.attributes.size() != g.attributes.size()) return false;
  for (std::size_t i = 0; i < f.attributes.size(); ++i) {
    const onnx::Attribute &p = f.attributes[i], &q = g.attributes[i];
    const bool tensors =
        p.tensor && q.tensor ? same_constant(*p.tensor, *q.tensor) : p.tensor == q.tensor;
    if (p.name != q.name || p.type != q.type || p.f != q.f || p.i != q.i || p.s != q.s ||
        p.floats != q.floats || p.ints != q.ints || p.strings != q.strings || !tensors) {
      return false;
    }
  }
  // Graphs and the like are only compared as bytes.
  const bool plain = std::ranges::all_of(f.attributes, [](const onnx::Attribute& attribute) {
    return attribute.type != onnx::AttributeType::graph &&
           attribute.type < onnx::AttributeType::tensors;
  });
  if (!plain && !std::ranges::equal(f.encoded, g.encoded)) return false;
  for (std::size_t i = 0; i < f.inputs.size(); ++i) {
    const onnx::Tensor *p = a.constant(m, i), *q = b.constant(n, i);
    if ((p != nullptr) != (q != nullptr)) return false;
    if (p) {
      if (!same_constant(*p, *q)) return false;
    } else if (f.inputs[i] != renamed(g.inputs[i])) {
      const bool free =
          !f.inputs[i].empty() && a.find(g.inputs[i]) < 0 && !b[b.input(n, i)].escapes;
      if (!free || !renamed.take(g.inputs[i], f.inputs[i])) return false;
    }
  }
  return true;
}

/// The three proofs that `layer` is the region's contraction. Rounding is judged as of sums in A.
template <class A, int Rank>
void prove(const Expr<double, Rank>& region, const Conv<double, Rank>& layer,
           const std::optional<PerAxis<Rank>>& size, std::vector<concertina::Report>& proofs,
           std::vector<std::string>& skipped) {
  const auto attempt = [&](const char* name, const auto& proof) {
    try {
      proofs.push_back(proof());
    } catch (const concertina::SizeError& error) {
      skipped.push_back(std::string(name) + ": " + error.what());
    } catch (const concertina::VerificationError& error) {
      skipped.push_back(std::string(name) + ": " + error.what());
    }
  };
  attempt("algebra", [&] { return concertina::prove_algebra(region, layer, 1, size); });
  attempt("rounding", [&] { return concertina::prove_rounding<A>(region, layer); });
  attempt("structure", [&] {
    const auto input = size ? *size : concertina::smallest_input(concertina::Form<Rank>(region));
    return concertina::prove_structure<A>(region, layer, input);
  });
}

/// Whether a stored 16-bit layer is the contraction, rounded: to a neighbour, as who computes in
/// float rounds twice.
template <class Stored, int Rank>
concertina::Report prove_storage(const Conv<double, Rank>& stored,
                                 const Conv<double, Rank>& contraction) {
  concertina::Report report{.proof = "storage"};
  if (stored.shape() != contraction.shape()) {
    report.failure = "it is a " + concertina::to_string(stored.shape()) + ", not a " +
                     concertina::to_string(contraction.shape());
    return report;
  }
  const auto compare = [&](const auto& a, const auto& b, const char* name) {
    for (std::size_t i = 0; i < a.size(); ++i, ++report.compared) {
      const long double error =
          std::abs(static_cast<long double>(a[i]) - static_cast<long double>(b[i]));
      const long double bound = concertina::detail::ulp<Stored>(b[i]);
      if (error <= bound * report.fraction() && report.compared > 0) continue;
      report.worst = std::string(name) + "[" + std::to_string(i) + "]";
      report.error = error;
      report.bound = bound;
      if (!(error <= bound))
        report.failure =
            report.worst + " is off by " + brief(error) + ", more than one unit in the last place";
    }
  };
  compare(stored.weight(), contraction.weight(), "weight");
  compare(stored.bias(), contraction.bias(), "bias");
  return report;
}

/// Proves one region of each model, of the same source and result, to be the same map.
template <int Rank>
void prove_region(const Graph& a, Segments expanded, const Graph& b, Segments contracted,
                  Equality equality, ComparedRegion& region) {
  const RegionExpression<Rank> before(a, expanded), after(b, contracted);
  const onnx::DataType type = a[expanded.front().to].type;
  const auto size = size_of<Rank>(a[expanded.back().from], before.layouts()[expanded.back().from]);

  const auto prove_at = [&](const std::optional<PerAxis<Rank>>& at, bool interior) {
    if (!interior && !concertina::exactness(concertina::Form<Rank>(*before), at).exact())
      return false;
    const concertina::Border<Rank> border{.interior_only = interior, .input_size = at};
    const auto contract = [&](const Expr<double, Rank>& e) {
      return type == onnx::DataType::float64 ? concertina::contract<long double>(e, border)
                                             : concertina::contract(e, border);
    };
    const Conv<double, Rank> stored = contract(*after);
    if (type == onnx::DataType::float64) {
      prove<double, Rank>(*before, stored, at, region.proofs, region.skipped);
    } else if (type == onnx::DataType::float32) {
      prove<float, Rank>(*before, stored, at, region.proofs, region.skipped);
    } else {
      const Conv<double, Rank> contraction = contract(*before);
      prove<double, Rank>(*before, contraction, at, region.proofs, region.skipped);
      region.proofs.push_back(type == onnx::DataType::float16
                                  ? prove_storage<Eigen::half>(stored, contraction)
                                  : prove_storage<Eigen::bfloat16>(stored, contraction));
    }
    return true;
  };

  std::string why;
  for (const auto& at : {std::optional<PerAxis<Rank>>(), size}) {
    try {
      if (prove_at(at, false)) return;
      why = concertina::exactness(concertina::Form<Rank>(*before), at).reason;
    } catch (const concertina::ShapeError& error) {
      why = error.what();
    }
    if (equality == Equality::everywhere) break;
  }
  if (equality != Equality::interior || !prove_at(std::nullopt, true)) region.unproved = why;
}

}  // namespace

ModelComparison compare_models(const onnx::Model& model, const onnx::Model& result,
                               const GraphOptions& options, Equality equality) {
  const Graph a(model, options), b(result, options);
  const LinearGraph before(a), after(b);
  ModelComparison comparison;
  const auto none = [](int) { return false; };
  // Regions of `result` that are not the model's own nodes, from the outputs back.
  std::vector<bool> done(result.nodes.size());
  Renamed renamed;
  for (int n = static_cast<int>(result.nodes.size()) - 1; n >= 0; --n) {
    const onnx::Node& node = b.node(n);
    if (done[static_cast<std::size_t>(n)] || node.outputs.empty()) continue;
    if (b[b.output(n)].constant) continue;
    const int same = a.find(renamed(node.outputs.front()));
    if (same >= 0 && a[same].producer >= 0 && same_node(a, a[same].producer, b, n, renamed)) {
      ++comparison.identical;
      continue;
    }
    ComparedRegion region{
        .source = {}, .result = node.outputs.front(), .proofs = {}, .skipped = {}, .unproved = {}};
    if (same < 0) {
      region.unproved = describe(b, n) + " makes a tensor that the other model does not have";
      comparison.regions.push_back(std::move(region));
      continue;
    }
    // The nearest tensor that both regions pass through.
    const auto there = segments_to(before, same, none),
               here = segments_to(after, b.output(n), none);
    std::size_t i = 0, j = 0;
    bool found = false;
    for (j = 0; j < here.size() && !found; ++j) {
      for (i = 0; i < there.size() && !found; ++i)
        found = a[there[i].from].name == renamed(b[here[j].from].name);
    }
    if (!found) {
      region.unproved = "no tensor that both models have leads to it by linear maps alone";
      comparison.regions.push_back(std::move(region));
      continue;
    }
    const Segments expanded = Segments(there).first(i), contracted = Segments(here).first(j);
    for (const Segment& segment : contracted) {
      for (const LinearNode* map : segment.maps) {
        for (const int each : map->nodes) done[static_cast<std::size_t>(each)] = true;
      }
    }
    region.source = a[expanded.back().from].name;
    try {
      with_rank(std::max(rank_of(expanded), rank_of(contracted)), [&](auto rank) {
        prove_region<rank()>(a, expanded, b, contracted, equality, region);
      });
    } catch (const NotLinear& error) {
      region.unproved = error.what();
    } catch (const concertina::Error& error) {
      region.unproved = error.what();
    }
    comparison.regions.push_back(std::move(region));
  }
  const auto names = [](const std::vector<onnx::ValueInfo>& list, const Graph& graph) {
    std::vector<std::string> result_names;
    for (const onnx::ValueInfo& info : list) {
      if (!graph[graph.find(info.name)].constant) result_names.push_back(info.name);
    }
    return result_names;
  };
  if (names(model.inputs, a) != names(result.inputs, b) ||
      names(model.outputs, a) != names(result.outputs, b)) {
    comparison.regions.push_back({.source = {},
                                  .result = "the model",
                                  .proofs = {},
                                  .skipped = {},
                                  .unproved = "their inputs or outputs have other names"});
  }
  std::ranges::reverse(comparison.regions);
  return comparison;
}

}  // namespace tool
