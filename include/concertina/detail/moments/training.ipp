// How a block whose batch norms are in training is cut into prefixes, and contracted with its
// gradient.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/detail/moments/input_gradient.hpp>
#include <concertina/detail/moments/sums.hpp>
#include <concertina/moments.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <sstream>
#include <utility>

namespace concertina {

inline Moments& Moments::operator+=(const Moments& other) {
  if (mean.empty()) return *this = other;
  if (other.mean.size() != mean.size() || other.scatter.size() != scatter.size()) {
    throw ShapeError("Moments: those of patches of " + std::to_string(mean.size()) + " and " +
                     std::to_string(other.mean.size()) + " elements cannot be added");
  }
  if (other.count == 0) return *this;
  if (count == 0) return *this = other;
  const auto own = static_cast<double>(count), theirs = static_cast<double>(other.count);
  const double share = theirs / (own + theirs);
  const std::size_t patch = scatter.size() / mean.size();
  for (std::size_t i = 0; i < mean.size(); ++i) {
    const std::size_t group = i / patch * patch;
    for (std::size_t j = 0; j < patch; ++j) {
      const double product = (other.mean[i] - mean[i]) * (other.mean[group + j] - mean[group + j]);
      scatter[i * patch + j] += other.scatter[i * patch + j] + own * share * product;
    }
  }
  for (std::size_t i = 0; i < mean.size(); ++i) mean[i] += share * (other.mean[i] - mean[i]);
  count += other.count;
  return *this;
}

namespace detail {

/// Throws ShapeError unless a batch has images of these channels.
template <int Rank>
void require_batch(const MapShape<Rank>& batch, Index channels) {
  if (batch.batch > 0 && batch.channels == channels) return;
  fail<ShapeError>({"moments of ", batch.batch, " maps of ", batch.channels,
                    " channels, where the layers read ", channels});
}

}  // namespace detail

template <std::floating_point Scalar, int Rank>
Moments patch_moments(const ConvShape<Rank>& shape, const FeatureMapView<const Scalar, Rank>& x,
                      const ParallelFor& run) {
  validate(shape);
  detail::require_batch(x.shape(), shape.in);
  const detail::PatchGeometry geometry(shape, detail::all_axes(x.shape().size, 1));
  return detail::patch_moments(geometry, x.values().data(), x.shape().batch, run);
}

template <class Scalar>
void update_running_statistics(BatchNorm<Scalar>& norm, const BatchStatistics& batch,
                               double momentum) {
  if (norm.running_mean.size() != batch.mean.size() ||
      norm.running_var.size() != batch.variance.size()) {
    throw ShapeError("update_running_statistics: a batch norm of " +
                     std::to_string(norm.running_mean.size()) + " channels, statistics of " +
                     std::to_string(batch.mean.size()));
  }
  if (batch.count < 2) {
    throw ShapeError("update_running_statistics: statistics of " + std::to_string(batch.count) +
                     " values; an unbiased variance needs two");
  }
  const auto count = static_cast<double>(batch.count);
  for (std::size_t c = 0; c < batch.mean.size(); ++c) {
    const auto move = [&](Scalar& running, double value) {
      running =
          static_cast<Scalar>((1 - momentum) * static_cast<double>(running) + momentum * value);
    };
    move(norm.running_mean[c], batch.mean[c]);
    move(norm.running_var[c], batch.variance[c] * count / (count - 1));
  }
}

template <std::floating_point Scalar_, int Rank_>
TrainingContraction<Scalar_, Rank_>::TrainingContraction(const Expr<Scalar, Rank>& expression,
                                                         const PerAxis<Rank>& input_size,
                                                         const std::vector<Padding<Rank>>& margins)
    : form_(expression),
      input_size_(input_size),
      plan_(plan_of(expression.tree(), {}, margins)),
      whole_(form_of(plan_), Border<Rank>{.input_size = input_size}),
      layers_(leaf_shapes_.size()),
      leaf_maps_(leaf_shapes_.size()),
      result_(whole_.shape()) {
  if (!margins.empty() && margins.size() != prefixes_.size()) {
    detail::fail<ShapeError>({"TrainingContraction: ", margins.size(), " margins for ",
                              prefixes_.size(), " batch norms"});
  }
  for (const ConvShape<Rank>& shape : leaf_shapes_) {
    leaf_gradients_.emplace_back(shape);
    gradients_.emplace_back(shape);
  }
  choose_patches();
  statistics_.resize(prefixes_.size());
  // Layered multiply-adds, at the size of each layer's own output.
  const auto count = [&](auto& self, const detail::AnyForm& form,
                         const detail::Axes& size) -> detail::Axes {
    if (form.is_leaf()) {
      const detail::Axes positions = detail::output_size(form.leaf(), size);
      if (!detail::is_diagonal(form.leaf())) {
        layered_ += weight_numel(form.leaf()) * numel(positions);
      }
      return positions;
    }
    detail::Axes at = size;
    for (const detail::AnyForm& part : form.parts()) {
      const detail::Axes output = self(self, part, form.join() == Join::chain ? at : size);
      at = output;
    }
    return at;
  };
  count(count, Form<Rank>(expression).tree(), detail::all_axes(input_size, 1));
}

template <std::floating_point Scalar_, int Rank_>
auto TrainingContraction<Scalar_, Rank_>::add_map(ChannelMap<double> map) -> Plan {
  maps_.push_back(std::move(map));
  return PlanLeaf{PlanLeaf::Kind::map, maps_.size() - 1, maps_.back().template shape<Rank>()};
}

/// The plan of what stands at a node; `before` is what stands between the block's input and its
/// own. Where that is nothing, a chain goes on from the contraction of a norm's prefix.
template <std::floating_point Scalar_, int Rank_>
auto TrainingContraction<Scalar_, Rank_>::plan_of(
    const detail::Tree<detail::Leaf<Scalar, Rank>>& node, const std::optional<Plan>& before,
    std::span<const Padding<Rank>> margins) -> Plan {
  const auto chained = [](const std::optional<Plan>& first, const std::optional<Plan>& second) {
    if (!first || !second) return first ? first : second;
    return std::optional(Plan(Join::chain, std::array{*first, *second}));
  };
  const auto is_norm = [](const detail::Tree<detail::Leaf<Scalar, Rank>>& part) {
    return part.is_leaf() && part.leaf().channel_map() &&
           !part.leaf().channel_map()->variance.empty();
  };
  if (node.is_leaf()) {
    const std::size_t index = leaf_shapes_.size();
    leaf_shapes_.push_back(node.leaf().shape());
    is_norm_.push_back(is_norm(node));
    if (!is_norm_.back()) {
      return PlanLeaf{PlanLeaf::Kind::leaf, index, leaf_shapes_.back(), node.leaf().fixed};
    }
    const Index channels = node.leaf().in;
    const Plan prefix =
        before ? *before : add_map(ChannelMap<double>{.in = channels, .out = channels});
    add_prefix(prefix, index, margins);
    prefixes_.back().fixed = node.leaf().fixed;
    return PlanLeaf{PlanLeaf::Kind::norm, prefixes_.size() - 1, leaf_shapes_.back()};
  }
  if (node.join() == Join::chain) {
    std::optional<Plan> inside;
    for (const auto& part : node.parts()) {
      const Plan plan = plan_of(part, chained(before, inside), margins);
      if (is_norm(part) && inside && !before) {
        const Prefix& prefix = prefixes_.back();
        inside = PlanLeaf{PlanLeaf::Kind::prefix, prefixes_.size() - 1, prefix.kernel.shape()};
      }
      inside = chained(inside, plan);
    }
    return *inside;
  }
  std::vector<Plan> parts;
  Index in = 0;  // channels of the parts before
  for (const auto& part : node.parts()) {
    std::optional<Plan> own = before;
    if (detail::splits_inputs(node.join())) {
      const Index width = detail::channels(part).in;
      std::vector<Index> source(static_cast<std::size_t>(width));
      std::iota(source.begin(), source.end(), in);
      own = chained(
          before, add_map(ChannelMap<double>{
                      .in = detail::channels(node).in, .out = width, .source = std::move(source)}));
      in += width;
    }
    parts.push_back(plan_of(part, own, margins));
  }
  return Plan(node.join(), parts);
}

template <std::floating_point Scalar_, int Rank_>
void TrainingContraction<Scalar_, Rank_>::add_prefix(const Plan& plan, std::size_t leaf,
                                                     std::span<const Padding<Rank>> margins) {
  Contraction<double, Rank> contraction(form_of(plan), Border<Rank>{.input_size = input_size_});
  const ConvShape<Rank> shape = contraction.shape();
  const std::size_t norm = prefixes_.size();
  const Padding<Rank> margin = norm < margins.size() ? margins[norm] : Padding<Rank>(0);
  const detail::PatchGeometry geometry(shape, detail::all_axes(input_size_, 1),
                                       detail::all_axes(margin.start, 0),
                                       detail::all_axes(margin.end, 0));
  Conv<double, Rank> kernel(shape), norm_gradient(leaf_shapes_[leaf]);
  prefixes_.push_back({.plan = plan,
                       .contraction = std::move(contraction),
                       .leaf = leaf,
                       .geometry = geometry,
                       .kernel = kernel,
                       .norm = {},
                       .kernel_gradient = kernel,
                       .norm_gradient = std::move(norm_gradient)});
}

/// Kernels that read at the same positions share moments where that takes no more work than two.
template <std::floating_point Scalar_, int Rank_>
void TrainingContraction<Scalar_, Rank_>::choose_patches() {
  using detail::PatchGeometry;
  const auto united = [](const PatchGeometry& f, const PatchGeometry& g) {
    PatchGeometry both = f;
    both.groups = std::gcd(f.groups, g.groups);
    for (int axis = 0; axis < detail::max_rank; ++axis) {
      const auto last = [&](const PatchGeometry& of) {
        return of.offset(axis, of.kernel_size[axis] - 1);
      };
      Index spacing =
          std::gcd(f.first[axis] - g.first[axis], f.kernel_size[axis] > 1 ? f.dilation[axis] : 0);
      spacing = std::gcd(spacing, g.kernel_size[axis] > 1 ? g.dilation[axis] : 0);
      both.dilation[axis] = std::max<Index>(spacing, 1);
      both.first[axis] = std::min(f.first[axis], g.first[axis]);
      both.kernel_size[axis] =
          (std::max(last(f), last(g)) - both.first[axis]) / both.dilation[axis] + 1;
    }
    return both;
  };
  const auto work = [](const PatchGeometry& geometry) {
    return geometry.multiply_adds() + geometry.gradient_multiply_adds();
  };
  for (Prefix& prefix : prefixes_) {
    const PatchGeometry& own = prefix.geometry;
    prefix.patches = patches_.size();
    for (std::size_t p = 0; p < patches_.size(); ++p) {
      if (own.stride != patches_[p].stride || own.positions != patches_[p].positions) continue;
      const PatchGeometry both = united(patches_[p], own);
      if (work(both) > work(patches_[p]) + work(own)) continue;
      patches_[p] = both;
      prefix.patches = p;
      break;
    }
    if (prefix.patches == patches_.size()) patches_.push_back(own);
  }
  for (Prefix& prefix : prefixes_) {
    const PatchGeometry &own = prefix.geometry, &all = patches_[prefix.patches];
    for (Index group = 0; group < own.groups; ++group) {
      const Index first = group * own.width() % all.width();
      for (Index c = 0; c < own.width(); ++c) {
        detail::for_each_position(own.kernel_size, [&](const detail::Axes& tap) {
          detail::Axes at;
          for (int axis = 0; axis < detail::max_rank; ++axis) {
            at[axis] = (own.offset(axis, tap[axis]) - all.first[axis]) / all.dilation[axis];
          }
          prefix.elements.push_back(detail::flat(at, all.kernel_size) * all.width() + first + c);
        });
      }
    }
  }
}

template <std::floating_point Scalar_, int Rank_>
auto TrainingContraction<Scalar_, Rank_>::cost(Index batch) const -> Cost {
  Index images = 3 * weight_numel(shape()) * numel(output_size(shape(), input_size_));
  for (const detail::PatchGeometry& patches : patches_) {
    images += patches.multiply_adds() + patches.gradient_multiply_adds();
  }
  const auto step = [&](const Form<Rank>& form) {
    return form.multiply_adds(input_size_) + form.backward_multiply_adds(input_size_);
  };
  Index once = step(whole_.form());
  for (const Prefix& prefix : prefixes_) {
    once += step(prefix.contraction.form()) +
            2 * weight_numel(prefix.kernel.shape()) * prefix.geometry.patch();
  }
  return {.layered = 3 * layered_ * batch, .contracted = once + images * batch};
}

template <std::floating_point Scalar_, int Rank_>
auto TrainingContraction<Scalar_, Rank_>::moments(const FeatureMapView<const Scalar, Rank>& x,
                                                  const ParallelFor& run) const
    -> std::vector<Moments> {
  if (leaf_shapes_.empty()) throw ShapeError("moments: of a contraction that was moved from");
  detail::require_batch(x.shape(), shape().in);
  if (x.shape().size != input_size_) {
    detail::fail<ShapeError>(
        {"moments: maps of size ", x.shape().size, ", where the contraction is for ", input_size_});
  }
  std::vector<Moments> result;
  for (const detail::PatchGeometry& patches : patches_) {
    result.push_back(detail::patch_moments(patches, x.values().data(), x.shape().batch, run));
  }
  return result;
}

/// Reads the leaves into double. Throws as forward does.
template <std::floating_point Scalar_, int Rank_>
void TrainingContraction<Scalar_, Rank_>::load(const Expr<Scalar, Rank>& expression) {
  std::size_t leaf = 0, norm = 0;
  expression.tree().for_each_leaf([&](const detail::Leaf<Scalar, Rank>& at) {
    if (at.view()) {
      std::optional<Conv<double, Rank>>& layer = layers_[leaf];
      if (!layer) layer.emplace(leaf_shapes_[leaf]);
      std::ranges::copy(at.view()->weight(), layer->weight().begin());
      std::ranges::copy(at.view()->bias(), layer->bias().begin());
      leaf_maps_[leaf++].reset();
      return;
    }
    const ChannelMap<Scalar>& map = *at.channel_map();
    const auto wide = [](const std::vector<Scalar>& values) {
      return std::vector<double>(values.begin(), values.end());
    };
    ChannelMap<double> copy{.in = map.in,
                            .out = map.out,
                            .source = map.source,
                            .weight = wide(map.weight),
                            .bias = wide(map.bias),
                            .eps = map.eps,
                            .divisor = map.divisor};
    if (is_norm_[leaf]) {
      const auto channels = static_cast<std::size_t>(map.out);
      if (copy.weight.empty()) copy.weight.assign(channels, 1);
      if (copy.bias.empty()) copy.bias.assign(channels, 0);
      prefixes_[norm++].norm = std::move(copy);
    } else {
      leaf_maps_[leaf] = std::move(copy);
    }
    ++leaf;
  });
}

template <std::floating_point Scalar_, int Rank_>
auto TrainingContraction<Scalar_, Rank_>::expression_of(const Plan& plan) const
    -> Expr<double, Rank> {
  using Kind = typename PlanLeaf::Kind;
  using Leaf = detail::Leaf<double, Rank>;
  const auto at = [&](const PlanLeaf& leaf) -> Leaf {
    switch (leaf.kind) {
      case Kind::norm: return prefixes_[leaf.index].norm;
      case Kind::prefix: return Leaf(ConvView<const double, Rank>(prefixes_[leaf.index].kernel));
      case Kind::map: return maps_[leaf.index];
      case Kind::leaf: break;
    }
    if (leaf_maps_[leaf.index]) return *leaf_maps_[leaf.index];
    return Leaf(ConvView<const double, Rank>(*layers_[leaf.index]));
  };
  return Expr<double, Rank>(plan.map([&](const PlanLeaf& leaf) {
    Leaf result = at(leaf);
    result.fixed = leaf.fixed;
    return result;
  }));
}

/// Mean and variance of each output of a norm's prefix: w m + b, and w C w' of the covariance C.
template <std::floating_point Scalar_, int Rank_>
void TrainingContraction<Scalar_, Rank_>::find_statistics(std::size_t norm) {
  Prefix& prefix = prefixes_[norm];
  const detail::PatchGeometry &own = prefix.geometry, &all = patches_[prefix.patches];
  const Moments& moments = moments_[prefix.patches];
  BatchStatistics& statistics = statistics_[norm];
  const ConvShape<Rank>& shape = prefix.kernel.shape();
  const Index out = shape.out / own.groups, row = own.patch(), patch = all.patch();
  statistics.count = moments.count;
  statistics.mean.assign(static_cast<std::size_t>(shape.out), 0);
  statistics.variance = statistics.mean;
  prefix.weight_covariance.resize(static_cast<std::size_t>(shape.out * row));
  std::vector<double> covariance(static_cast<std::size_t>(row * row));
  for (Index group = 0; group < own.groups; ++group) {
    const Index* elements = prefix.elements.data() + group * row;
    const Index whole = prefix.group_of(group, all);
    for (Index i = 0; i < row; ++i) {
      const double* from = moments.scatter.data() + (whole * patch + elements[i]) * patch;
      for (Index j = 0; j < row; ++j) {
        covariance[static_cast<std::size_t>(i * row + j)] =
            from[elements[j]] / static_cast<double>(moments.count);
      }
    }
    const double* weight = prefix.kernel.weight().data() + group * out * row;
    double* weight_covariance = prefix.weight_covariance.data() + group * out * row;
    detail::gemm<double>(detail::Op::none, detail::Op::none, out, row, row, {weight, row},
                         {covariance.data(), row}, false, {weight_covariance, row});
    for (Index o = 0; o < out; ++o, weight += row, weight_covariance += row) {
      const auto channel = static_cast<std::size_t>(group * out + o);
      double mean = shape.bias ? prefix.kernel.bias()[channel] : 0;
      for (Index i = 0; i < row; ++i) {
        mean += weight[i] * moments.mean[static_cast<std::size_t>(whole * patch + elements[i])];
      }
      statistics.mean[channel] = mean;
      // Rounding may take what is zero below it; NaN stays.
      const double variance = detail::dot(row, weight, weight_covariance);
      statistics.variance[channel] = variance < 0 ? 0 : variance;
      const double sum = statistics.variance[channel] + prefix.norm.eps;
      if (sum > 0 && std::isfinite(sum)) continue;
      std::ostringstream message;
      message << "batch norm " << norm + 1 << ": the batch's variance of channel " << channel
              << " + eps = " << statistics.variance[channel] << " + " << prefix.norm.eps
              << ", which is not positive and finite";
      throw NumericalError(message.str());
    }
  }
  prefix.norm.mean = statistics.mean;
  prefix.norm.variance = statistics.variance;
}

template <std::floating_point Scalar_, int Rank_>
void TrainingContraction<Scalar_, Rank_>::require_form(const Expr<Scalar, Rank>& expression) const {
  std::size_t leaf = 0;
  bool same = detail::has_form(expression.tree(), form_.tree());
  if (same) {
    expression.tree().for_each_leaf([&](const detail::Leaf<Scalar, Rank>& at) {
      const bool norm = at.channel_map() && !at.channel_map()->variance.empty();
      same = same && norm == is_norm_[leaf++];
    });
  }
  if (same) return;
  detail::fail<ShapeError>(
      {"TrainingContraction: an expression of another form, ", Form<Rank>(expression)});
}

template <std::floating_point Scalar_, int Rank_>
void TrainingContraction<Scalar_, Rank_>::forward(const Expr<Scalar, Rank>& expression,
                                                  std::vector<Moments> moments,
                                                  const ConvView<Scalar, Rank>& result,
                                                  const ParallelFor& run) {
  computed_ = differentiated_ = false;
  require_form(expression);
  if (result.shape() != shape()) {
    detail::fail<ShapeError>(
        {"forward: a result of shape ", result.shape(), ", where the contraction is ", shape()});
  }
  bool fit = moments.size() == patches_.size();
  for (std::size_t p = 0; fit && p < patches_.size(); ++p) {
    const auto elements = static_cast<std::size_t>(patches_[p].groups * patches_[p].patch());
    fit = moments[p].mean.size() == elements &&
          moments[p].scatter.size() == elements * static_cast<std::size_t>(patches_[p].patch());
    if (fit && moments[p].count < 2) {
      detail::fail<ShapeError>(
          {"batch norms in training need more than one value for each "
           "channel, and have ",
           moments[p].count});
    }
  }
  if (!fit) throw ShapeError("forward: moments of other patches than the contraction's");
  moments_ = std::move(moments);
  load(expression);
  for (std::size_t norm = 0; norm < prefixes_.size(); ++norm) {
    Prefix& prefix = prefixes_[norm];
    prefix.contraction.forward(expression_of(prefix.plan), ConvView<double, Rank>(prefix.kernel),
                               run);
    find_statistics(norm);
  }
  const Conv<double, Rank>& whole = whole_.forward(expression_of(plan_), run);
  const auto narrow = [](double element) { return static_cast<Scalar>(element); };
  std::ranges::transform(whole.weight(), result.weight().begin(), narrow);
  std::ranges::transform(whole.bias(), result.bias().begin(), narrow);
  computed_ = true;
}

/// Adds the gradients of a plan's leaves to those of what they stand for.
template <std::floating_point Scalar_, int Rank_>
void TrainingContraction<Scalar_, Rank_>::distribute(
    const Plan& plan, std::span<const Conv<double, Rank>> gradients) {
  using Kind = typename PlanLeaf::Kind;
  auto gradient = gradients.begin();
  plan.for_each_leaf([&](const PlanLeaf& leaf) {
    const Conv<double, Rank>& from = *gradient++;
    if (leaf.fixed) return;
    Conv<double, Rank>& to = leaf.kind == Kind::leaf   ? leaf_gradients_[leaf.index]
                             : leaf.kind == Kind::norm ? prefixes_[leaf.index].norm_gradient
                                                       : prefixes_[leaf.index].kernel_gradient;
    detail::axpy(std::ssize(from.weight()), 1.0, from.weight().data(), to.weight().data());
    detail::axpy(std::ssize(from.bias()), 1.0, from.bias().data(), to.bias().data());
  });
}

/// From the gradient of a norm's factors and shifts to those of its weight and bias, and through
/// its mean and variance to its prefix and to the moments.
template <std::floating_point Scalar_, int Rank_>
void TrainingContraction<Scalar_, Rank_>::add_statistics_gradient(std::size_t norm) {
  Prefix& prefix = prefixes_[norm];
  const detail::PatchGeometry &own = prefix.geometry, &all = patches_[prefix.patches];
  const Moments& moments = moments_[prefix.patches];
  detail::MomentGradient& gradient = moment_gradients_[prefix.patches];
  const ChannelMap<double> of = prefix.norm.backward(prefix.norm_gradient);
  if (!prefix.fixed) {
    Conv<double, Rank>& leaf = leaf_gradients_[prefix.leaf];
    std::ranges::copy(of.weight, leaf.weight().begin());
    std::ranges::copy(of.bias, leaf.bias().begin());
  }
  const ConvShape<Rank>& shape = prefix.kernel.shape();
  const Index out = shape.out / own.groups, row = own.patch(), patch = all.patch();
  std::vector<double> scaled(static_cast<std::size_t>(out * row)),
      quadratic(static_cast<std::size_t>(row * row));
  for (Index group = 0; group < own.groups; ++group) {
    const Index* elements = prefix.elements.data() + group * row;
    const Index whole = prefix.group_of(group, all);
    const Index first = group * out * row;
    for (Index o = 0; o < out; ++o) {
      const auto channel = static_cast<std::size_t>(group * out + o);
      const double mean = of.mean[channel], variance = of.variance[channel];
      if (shape.bias) prefix.kernel_gradient.bias()[channel] += mean;
      const Index at = first + o * row;
      const double* weight = prefix.kernel.weight().data() + at;
      double* to = prefix.kernel_gradient.weight().data() + at;
      for (Index i = 0; i < row; ++i) {
        const auto element = static_cast<std::size_t>(whole * patch + elements[i]);
        to[i] += mean * moments.mean[element] +
                 2 * variance * prefix.weight_covariance[static_cast<std::size_t>(at + i)];
        gradient.mean[element] += mean * weight[i];
        scaled[static_cast<std::size_t>(o * row + i)] = variance * weight[i];
      }
    }
    detail::gemm<double>(detail::Op::transpose, detail::Op::none, row, row, out,
                         {scaled.data(), row}, {prefix.kernel.weight().data() + first, row}, false,
                         {quadratic.data(), row});
    for (Index i = 0; i < row; ++i) {
      double* to = gradient.quadratic.data() + (whole * patch + elements[i]) * patch;
      for (Index j = 0; j < row; ++j) {
        to[elements[j]] += quadratic[static_cast<std::size_t>(i * row + j)];
      }
    }
  }
}

template <std::floating_point Scalar_, int Rank_>
auto TrainingContraction<Scalar_, Rank_>::backward(const ConvView<const Scalar, Rank>& gradient,
                                                   const ParallelFor& run)
    -> std::span<const Conv<Scalar, Rank>> {
  if (!computed_) throw Error("backward: forward has not been called");
  if (gradient.shape() != shape()) {
    detail::fail<ShapeError>({"backward: a gradient of shape ", gradient.shape(),
                              ", where the contraction is ", shape()});
  }
  const auto clear = [](Conv<double, Rank>& layer) {
    std::ranges::fill(layer.weight(), 0.0);
    std::ranges::fill(layer.bias(), 0.0);
  };
  for (Conv<double, Rank>& leaf : leaf_gradients_) clear(leaf);
  for (Prefix& prefix : prefixes_) {
    clear(prefix.kernel_gradient);
    clear(prefix.norm_gradient);
  }
  moment_gradients_.resize(patches_.size());
  for (std::size_t p = 0; p < patches_.size(); ++p) {
    moment_gradients_[p].mean.assign(moments_[p].mean.size(), 0);
    moment_gradients_[p].quadratic.assign(moments_[p].scatter.size(), 0);
  }
  const Conv<double, Rank> wide = gradient.template cast<double>();
  distribute(plan_, whole_.backward(expression_of(plan_), wide, run));
  for (std::size_t norm = prefixes_.size(); norm-- > 0;) {
    add_statistics_gradient(norm);
    Prefix& prefix = prefixes_[norm];
    distribute(prefix.plan, prefix.contraction.backward(expression_of(prefix.plan),
                                                        prefix.kernel_gradient, run));
  }
  for (std::size_t leaf = 0; leaf < gradients_.size(); ++leaf) {
    gradients_[leaf] = leaf_gradients_[leaf].template cast<Scalar>();
  }
  differentiated_ = true;
  return gradients_;
}

template <std::floating_point Scalar_, int Rank_>
void TrainingContraction<Scalar_, Rank_>::add_input_gradient(
    const FeatureMapView<const Scalar, Rank>& x, const FeatureMapView<Scalar, Rank>& gradient,
    const ParallelFor& run) const {
  if (!differentiated_) throw Error("add_input_gradient: backward has not been called");
  if (x.shape().size != input_size_ || x.shape().channels != shape().in ||
      gradient.shape() != x.shape()) {
    const MapShape<Rank>&read = x.shape(), &written = gradient.shape();
    detail::fail<ShapeError>({"add_input_gradient: ", read.batch, " maps of ", read.channels,
                              " channels of size ", read.size, " and a gradient of ", written.batch,
                              " maps of ", written.channels, " channels of size ", written.size,
                              ", where the contraction reads ", shape().in, " channels of size ",
                              input_size_});
  }
  for (std::size_t p = 0; p < patches_.size(); ++p) {
    detail::add_input_gradient(patches_[p], moments_[p], moment_gradients_[p], x.values().data(),
                               x.shape().batch, gradient.values().data(), run);
  }
}

}  // namespace concertina

#include <concertina/detail/compiled/moments.hpp>
