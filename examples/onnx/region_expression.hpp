// Regions as expressions of the library. Those of fewer than two spatial axes get further ones, of
// one position, so that less is compiled.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "onnx/layer.hpp"
#include "onnx/regions.hpp"
#include "text.hpp"

#include <concertina/channel_map.hpp>
#include <concertina/exactness.hpp>
#include <concertina/join.hpp>
#include <concertina/layers.hpp>
#include <concertina/transposed.hpp>

#include <algorithm>
#include <cmath>
#include <concepts>
#include <deque>
#include <map>
#include <optional>
#include <span>
#include <utility>
#include <vector>

namespace tool {

using concertina::ChannelMap, concertina::Conv, concertina::ConvShape, concertina::Expr,
    concertina::Join, concertina::PerAxis;
using Kind = LinearNode::Kind;

/// A region as an expression, Expr or TransposedExpr of double.
template <class Expression>
class RegionExpression {
  static constexpr int Rank = Expression::Rank;
  static constexpr bool is_transposed =
      std::same_as<Expression, concertina::TransposedExpr<double, Rank>>;

 public:
  /// `stand_in`, where given, is viewed in place of the weights of convolutions and linear layers,
  /// of which then only the shapes are right: as long as the largest. It must outlive this.
  /// Throws NotLinear where the region is no such map.
  RegionExpression(const Graph& graph, Segments segments, std::span<const double> stand_in = {})
      : graph_(graph), stand_in_(stand_in), layouts_(segments), rank_(rank_of(segments)) {
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
      if (part.expression) {
        expression_ = expression_ ? *part.expression * *expression_ : *part.expression;
      }
      channels_ = part.channels;
    }
    if (!expression_) expression_ = identity();
  }
  RegionExpression(const RegionExpression&) = delete;

  const Expression& operator*() const { return *expression_; }
  const Layouts& layouts() const { return layouts_; }

 private:
  /// No expression: the identity.
  struct Part {
    std::optional<Expression> expression;
    Index channels;
  };

  Expression identity() {
    require_channels();
    require_memory(channels_, 1);
    return Expression(Expr<double, Rank>(concertina::identity<double>(channels_)));
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
    if constexpr (!is_transposed) {
      const auto slices =
          map.kind == Kind::concat ? slices_of(map, source_channels) : std::vector<Slice>();
      if (!slices.empty()) return side_by_side(map, slices);
    }
    if (map.kind == Kind::sum || map.kind == Kind::concat) return joined(map, source_channels);
    Part part = make(map.operands.front(), source_channels);
    if (map.kind == Kind::identity || map.kind == Kind::move_channels) return part;
    channels_ = part.channels;
    const std::size_t output =
        static_cast<std::size_t>(std::ranges::find(map.outputs, tensor) - map.outputs.begin());
    Part own = layer(map, output);
    if (part.expression) own.expression = *own.expression * *part.expression;
    return own;
  }

  Part joined(const LinearNode& map, Index source_channels) {
    std::vector<Expression> parts;
    Index channels = 0;
    for (std::size_t i = 0; i < map.operands.size(); ++i) {
      Part part = make(map.operands[i], source_channels);
      channels_ = part.channels;
      parts.push_back(part.expression ? *part.expression : identity());
      if (!map.signs.empty() && map.signs[i] < 0) parts.back() = -1.0 * parts.back();
      channels = map.kind == Kind::concat ? channels + part.channels : part.channels;
    }
    if constexpr (is_transposed) {
      if (map.kind == Kind::concat) throw NotLinear("a transposed convolution among those joined");
      Expression sum = parts.front();
      for (std::size_t i = 1; i < parts.size(); ++i) sum = sum + parts[i];
      return {sum, channels};
    } else {
      const auto join = map.kind == Kind::concat ? Join::concat_outputs : Join::sum;
      return {Expression(join, parts), channels};
    }
  }

  /// Consecutive channels of the segment's source, and the tensor that has them alone.
  struct Slice {
    int tensor;
    Index channels;
  };

  /// Where each operand of a concatenation reads a slice of its own, in order, all channels in one:
  /// these. Otherwise none.
  std::vector<Slice> slices_of(const LinearNode& concat, Index source_channels) const {
    std::vector<Slice> slices;
    Index next = 0;
    for (int tensor : concat.operands) {
      const LinearNode* map = nullptr;
      for (; tensor != from_; tensor = map->operands.front()) {
        map = makers_.at(tensor);
        if (map->operands.size() != 1) return {};
        if (map->operands.front() == from_) break;
      }
      if (tensor == from_ || map->kind != Kind::channel_select) return {};
      const auto output = std::ranges::find(map->outputs, tensor) - map->outputs.begin();
      const auto& source =
          output == 0 ? map->source : map->more_sources[static_cast<std::size_t>(output) - 1];
      for (const Index channel : source) {
        if (channel != next++) return {};
      }
      slices.push_back({tensor, static_cast<Index>(source.size())});
    }
    return next == source_channels ? slices : std::vector<Slice>();
  }

  /// The operands of a concatenation on slices: groups where they allow.
  Part side_by_side(const LinearNode& concat, const std::vector<Slice>& slices) {
    std::vector<Expression> parts;
    Index channels = 0;
    const int source = from_;
    for (std::size_t i = 0; i < slices.size(); ++i) {
      from_ = slices[i].tensor;
      channels_ = slices[i].channels;
      Part part = make(concat.operands[i], channels_);
      channels_ = part.channels;
      parts.push_back(part.expression ? *part.expression : identity());
      channels += part.channels;
    }
    from_ = source;
    return {Expression(Join::direct_sum, parts), channels};
  }

  /// One map as a leaf.
  Part layer(const LinearNode& map, std::size_t output) {
    switch (map.kind) {
      case Kind::conv: return conv(map);
      case Kind::conv_transpose: return conv_transpose(map);
      case Kind::linear: return linear(map);
      case Kind::batch_norm: return batch_norm(map);
      case Kind::channel_scale: return channel_scale(map);
      case Kind::channel_select: {
        require_channels();
        require_memory(channels_, 1);
        const auto& source = output == 0 ? map.source : map.more_sources[output - 1];
        return part(concertina::channel_select<double>(channels_, source),
                    static_cast<Index>(source.size()));
      }
      case Kind::average_pool:
        require_memory(
            map.channels,
            static_cast<double>(concertina::numel(per_axis<Rank>(map.windows->kernel, 1))));
        return part(concertina::average_pool<double, Rank>(
                        map.channels, per_axis<Rank>(map.windows->kernel, 1),
                        per_axis<Rank>(map.windows->strides, 1), padding(*map.windows)),
                    map.channels);
      case Kind::pad: {
        require_memory(map.channels, 1);
        Conv<double, Rank> ones({.out = map.channels,
                                 .in = map.channels,
                                 .padding = padding(*map.windows),
                                 .groups = map.channels});
        std::ranges::fill(ones.weight(), 1.0);
        return part(std::move(ones), map.channels);
      }
      case Kind::space_to_depth:
      case Kind::depth_to_space:
      case Kind::upsample: return resampled(map);
      default: throw NotLinear("no map");
    }
  }

  Part resampled(const LinearNode& map) {
    require_channels();
    if (map.spatial_axes != rank_) {
      throw NotLinear("its layers have other numbers of spatial axes");
    }
    const Index factor = map.factors.front(), positions = factor * factor;
    double taps = 1;  // of each channel that it reads, twice: they are copied
    for (const Index along : map.factors) taps *= static_cast<double>(along);
    require_memory(channels_, 2 * (map.kind == Kind::space_to_depth ? taps * taps : taps));
    if (map.kind == Kind::space_to_depth) {
      const Index out = channels_ * positions;
      return part(concertina::channel_shuffle<double>(out, channels_) *
                      concertina::pixel_unshuffle<double, Rank>(channels_, factor),
                  out);
    }
    if constexpr (is_transposed) {
      if (map.kind == Kind::upsample) {
        return {
            concertina::upsample_nearest<double, Rank>(channels_, per_axis<Rank>(map.factors, 1)),
            channels_};
      }
      const Index out = channels_ / positions;
      if (out * positions != channels_) throw NotLinear("its blocks do not divide its channels");
      const auto shuffle = concertina::pixel_shuffle<double, Rank>(out, factor);
      if (!map.positions_first) return {shuffle, out};
      return {shuffle * concertina::channel_shuffle<double>(channels_, positions), out};
    } else {
      throw NotLinear("a transposed convolution");
    }
  }

  static Part part(Expr<double, Rank> expression, Index channels) {
    return {Expression(std::move(expression)), channels};
  }

  /// Before elements are made that no constant has. Throws NotLinear above the budget.
  void require_memory(Index channels, double each) {
    made_bytes_ += sizeof(double) * each * static_cast<double>(channels);
    if (made_bytes_ <= graph_.budget().memory) return;
    throw NotLinear("its layers would take " + brief(made_bytes_) +
                    " bytes; allow that with --memory " + megabytes(made_bytes_));
  }

  void require_channels() const {
    if (channels_ == unknown) throw NotLinear("the number of its channels is not known");
  }

  static concertina::Padding<Rank> padding(const Windows& windows) {
    return concertina::Padding<Rank>::sides(per_axis<Rank>(windows.pads_begin, 0),
                                            per_axis<Rank>(windows.pads_end, 0));
  }

  /// Of a weight as Conv has it, without bias.
  ConvShape<Rank> shape_of(const LinearNode& map) const {
    const auto& dims = map.weight->dims;
    if (static_cast<int>(dims.size()) != rank_ + 2) {
      throw NotLinear("its layers have other numbers of spatial axes");
    }
    return {.out = dims[0],
            .in = dims[1] * map.groups,
            .kernel_size = per_axis<Rank>(map.windows->kernel, 1),
            .stride = per_axis<Rank>(map.windows->strides, 1),
            .padding = padding(*map.windows),
            .dilation = per_axis<Rank>(map.windows->dilations, 1),
            .groups = map.groups};
  }

  Part conv_transpose(const LinearNode& map) {
    if constexpr (is_transposed) {
      // The weight as it lies is that of the layer of which this is the adjoint.
      const ConvShape<Rank> shape = shape_of(map);
      const Conv<double, Rank> layer(shape, map.weight->template values<double>());
      return {Expression(concertina::Transposed<double, Rank>(
                  layer, bias_of(map.bias), per_axis<Rank>(map.output_padding, 0))),
              shape.in};
    } else {
      throw NotLinear("a transposed convolution");
    }
  }

  /// Elements of a bias; none where all are zero, which a border does not show.
  static std::vector<double> bias_of(const onnx::Tensor* tensor) {
    if (!tensor) return {};
    std::vector<double> bias = tensor->values<double>();
    if (std::ranges::all_of(bias, [](double element) { return element == 0; })) bias.clear();
    return bias;
  }

  /// A leaf of that weight, which is only read where it is wanted.
  template <class Weight>
  Part weighted(ConvShape<Rank> shape, const Weight& weight, std::vector<double> bias) {
    shape.bias = !bias.empty();
    if (stand_in_.empty()) {
      return part(Conv<double, Rank>(shape, weight(), std::move(bias)), shape.out);
    }
    biases_.push_back(std::move(bias));
    const auto size = static_cast<std::size_t>(weight_numel(shape));
    const concertina::ConvView<const double, Rank> view(shape, stand_in_.first(size),
                                                        biases_.back());
    return part(view, shape.out);
  }

  Part conv(const LinearNode& map) {
    return weighted(
        shape_of(map), [&] { return map.weight->template values<double>(); }, bias_of(map.bias));
  }

  Part linear(const LinearNode& map) {
    const Index out = map.weight->dims[map.transposed ? 1 : 0],
                in = map.weight->dims[map.transposed ? 0 : 1];
    const auto weight = [&] {
      std::vector<double> elements = map.weight->values<double>();
      if (map.transposed) {
        const std::vector<double> columns = elements;
        for (Index i = 0; i < in; ++i) {
          for (Index o = 0; o < out; ++o) {
            elements[static_cast<std::size_t>(o * in + i)] =
                columns[static_cast<std::size_t>(i * out + o)];
          }
        }
      }
      for (double& element : elements) element *= map.alpha;
      return elements;
    };
    std::vector<double> bias = map.beta == 0 ? std::vector<double>() : bias_of(map.bias);
    if (bias.size() == 1) bias.assign(static_cast<std::size_t>(out), bias.front());
    for (double& element : bias) element *= map.beta;
    ConvShape<Rank> shape{.out = out, .in = in};
    if (!map.size.empty()) {
      shape.in = map.channels;
      shape.kernel_size = per_axis<Rank>(map.size, 1);
    }
    return weighted(shape, weight, std::move(bias));
  }

  Part batch_norm(const LinearNode& map) {
    const auto list = [&](std::size_t i) { return map.statistics[i]->values<double>(); };
    const Index channels = map.statistics.front()->dims[0];
    return part(concertina::batch_norm<double>({.running_mean = list(2),
                                                .running_var = list(3),
                                                .weight = list(0),
                                                .bias = list(1),
                                                .eps = map.eps}),
                channels);
  }

  Part channel_scale(const LinearNode& map) {
    if (channels_ == unknown) channels_ = map.channels;
    require_channels();
    require_memory(channels_, 2);
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
    return part(scale, channels_);
  }

  const Graph& graph_;
  std::span<const double> stand_in_;
  std::deque<std::vector<double>> biases_;  // that leaves view
  Layouts layouts_;
  int rank_;                  // spatial axes
  Index channels_ = unknown;  // of what the next layer reads
  int from_ = -1;
  std::map<int, const LinearNode*> makers_;
  std::vector<int> made_;
  double made_bytes_ = 0;
  std::optional<Expression> expression_;
};

/// Maps of channels that a region begins with, as one: scale x + shift.
struct ChannelAffine {
  std::vector<double> scale, shift;
};

/// How many segments at a region's source are one batch norm, scale or shift each.
inline std::size_t count_leading_affine(Segments segments) {
  const auto affine = [](const Segment& segment) {
    return segment.maps.size() == 1 && (segment.maps.front()->kind == Kind::batch_norm ||
                                        segment.maps.front()->kind == Kind::channel_scale);
  };
  std::size_t count = 0;
  while (count < segments.size() && affine(segments[segments.size() - 1 - count])) ++count;
  return count;
}

/// Segments of which each is such a map. Throws NotLinear where one has other channels.
inline ChannelAffine affine_of(Segments segments, Index channels) {
  const auto count = static_cast<std::size_t>(channels);
  ChannelAffine result{std::vector<double>(count, 1), std::vector<double>(count, 0)};
  for (auto segment = segments.rbegin(); segment != segments.rend(); ++segment) {
    const LinearNode& map = *segment->maps.front();
    std::vector<double> scale = map.scale, shift = map.shift;
    if (map.kind == Kind::batch_norm) {
      scale = map.statistics[0]->values<double>();
      shift = map.statistics[1]->values<double>();
      const auto mean = map.statistics[2]->values<double>(),
                 variance = map.statistics[3]->values<double>();
      for (std::size_t c = 0; c < scale.size(); ++c) {
        scale[c] /= std::sqrt(variance[c] + map.eps);
        shift[c] -= mean[c] * scale[c];
      }
    }
    const auto fits = [&](const std::vector<double>& list) {
      return list.size() <= 1 || list.size() == count;
    };
    if (!fits(scale) || !fits(shift)) throw NotLinear("a constant of other channels broadcasts");
    const auto at = [](const std::vector<double>& list, std::size_t c, double otherwise) {
      return list.empty() ? otherwise : list[list.size() == 1 ? 0 : c];
    };
    for (std::size_t c = 0; c < count; ++c) {
      result.scale[c] *= at(scale, c, 1);
      result.shift[c] = at(scale, c, 1) * result.shift[c] + at(shift, c, 0);
    }
  }
  return result;
}

/// The same with what is added before the factors: scale (x + shift). Throws NotLinear where there
/// is no such shift.
inline ChannelAffine split_affine(Segments segments, Index channels) {
  ChannelAffine affine = affine_of(segments, channels);
  for (std::size_t c = 0; c < affine.scale.size(); ++c) {
    affine.shift[c] /= affine.scale[c];
    if (affine.scale[c] == 0 || !std::isfinite(affine.shift[c])) {
      throw NotLinear("a factor of zero, before which no shift can stand");
    }
  }
  return affine;
}

/// The spatial size of a region's source, where it is known.
template <int Rank>
std::optional<PerAxis<Rank>> size_of(const GraphTensor& source, Layout layout) {
  if (!source.dims || source.dims->size() < 3 || source.dims->size() > std::size_t{Rank} + 2) {
    return std::nullopt;
  }
  const auto begin = source.dims->begin() + (layout == Layout::channels_first ? 2 : 1);
  const Dims size(begin, begin + std::ssize(*source.dims) - 2);
  if (std::ranges::any_of(size, [](Index extent) { return extent < 1; })) return std::nullopt;
  return per_axis<Rank>(size, 1);
}

/// Whether no output of a map lies off the border; of a result without spatial axes there is one.
template <int Rank>
bool covers(const concertina::Exactness<Rank>& border, const GraphTensor& result, Layout layout) {
  const bool flat = result.dims && result.dims->size() < 3;
  const auto size = flat ? std::optional(PerAxis<Rank>(1)) : size_of<Rank>(result, layout);
  for (int axis = 0; size && axis < Rank; ++axis) {
    if (border.start[axis] + border.end[axis] >= (*size)[axis]) return true;
  }
  return false;
}

/// Calls f with the type of expression that these regions are.
template <class F>
auto with_expression(std::initializer_list<Segments> regions, const F& f) {
  int rank = 0;
  bool transposed = false;
  for (const Segments region : regions) {
    rank = std::max(rank, rank_of(region));
    transposed = transposed ||
                 contains(region, {Kind::conv_transpose, Kind::depth_to_space, Kind::upsample});
  }
  const auto at_rank = [&]<int Rank>(std::integral_constant<int, Rank>) {
    return transposed ? f(std::type_identity<concertina::TransposedExpr<double, Rank>>())
                      : f(std::type_identity<Expr<double, Rank>>());
  };
  return rank <= 2 ? at_rank(std::integral_constant<int, 2>())
                   : at_rank(std::integral_constant<int, 3>());
}

/// The layer that has a contraction's weight.
template <int Rank>
const Conv<double, Rank>& layer_of(const Conv<double, Rank>& layer) {
  return layer;
}
template <int Rank>
const Conv<double, Rank>& layer_of(const concertina::Transposed<double, Rank>& layer) {
  return layer.layer();
}

/// The form of what is contracted: of transposed layers the dense form.
template <int Rank>
concertina::Form<Rank> form_of(const Expr<double, Rank>& expression) {
  return concertina::Form<Rank>(expression);
}
template <int Rank>
concertina::Form<Rank> form_of(const concertina::TransposedExpr<double, Rank>& expression) {
  return expression.form();
}

/// How far apart the input lies in what is contracted: of transposed layers their stride.
template <int Rank>
PerAxis<Rank> spacing_of(const Expr<double, Rank>&) {
  return 1;
}
template <int Rank>
PerAxis<Rank> spacing_of(const concertina::TransposedExpr<double, Rank>& expression) {
  return expression.stride();
}

/// The layers after the factors of maps of channels; without their shift.
template <class Expression>
Expression shifted_expression(const Expression& layers, Segments shifted) {
  if (shifted.empty()) return layers;
  if constexpr (std::same_as<Expression, Expr<double, Expression::Rank>>) {
    return layers * concertina::channel_scale<double>(
                        split_affine(shifted, form_of(layers).shape().in).scale);
  } else {
    throw NotLinear("a transposed convolution after a shift");
  }
}

}  // namespace tool
