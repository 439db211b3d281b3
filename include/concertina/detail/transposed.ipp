// How transposed layers are applied, seen as layers of stride 1, joined, contracted and
// differentiated.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/detail/apply_matrix.hpp>
#include <concertina/transposed.hpp>

#include <algorithm>
#include <cstddef>
#include <map>
#include <optional>
#include <ranges>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace concertina {

namespace detail {

/// The kernel flipped along each axis, the channels of each group exchanged, and dilation * (kernel
/// - 1) - padding on each side, with stride 1 whatever the layer's: with zeros between the
/// positions of its input, this is the layer's adjoint, and flipped twice a layer is itself.
template <int Rank>
ConvShape<Rank> flipped(const ConvShape<Rank>& f) {
  ConvShape<Rank> shape{.out = f.in,
                        .in = f.out,
                        .kernel_size = f.kernel_size,
                        .dilation = f.dilation,
                        .groups = f.groups};
  for (int axis = 0; axis < Rank; ++axis) {
    shape.padding.start[axis] = effective_kernel_size(f, axis) - 1 - f.padding.start[axis];
    shape.padding.end[axis] = effective_kernel_size(f, axis) - 1 - f.padding.end[axis];
  }
  return shape;
}

/// Writes the weight of the flipped layer.
template <class Scalar, int Rank>
void write_flipped(const ConvView<const Scalar, Rank>& layer, std::span<Scalar> weight) {
  const ConvShape<Rank>& f = layer.shape();
  const Index in = f.in / f.groups, out = f.out / f.groups;
  const Index taps = numel(f.kernel_size);
  const Scalar* from = layer.weight().data();
  for (Index o = 0; o < f.out; ++o) {
    for (Index c = o / out * in; c < (o / out + 1) * in; ++c, from += taps) {
      std::reverse_copy(from, from + taps, weight.data() + (c * out + o % out) * taps);
    }
  }
}

template <class Scalar, int Rank>
Conv<Scalar, Rank> flipped(const ConvView<const Scalar, Rank>& layer,
                           std::span<const Scalar> bias = {}) {
  ConvShape<Rank> shape = flipped(layer.shape());
  shape.bias = !bias.empty();
  Conv<Scalar, Rank> result(shape);
  write_flipped(layer, result.weight());
  std::ranges::copy(bias, result.bias().begin());
  return result;
}

/// The transposed layer of which `layer`, of stride 1, is the dense form: after stride - 1 zeros
/// between the positions of the input the two are the same map.
template <class Scalar, int Rank>
Transposed<Scalar, Rank> from_dense(const ConvView<const Scalar, Rank>& layer,
                                    const PerAxis<Rank>& stride) {
  const Conv<Scalar, Rank> f = flipped(layer);
  ConvShape<Rank> shape = f.shape();
  shape.stride = stride;
  return Transposed<Scalar, Rank>(ConvView<const Scalar, Rank>(shape, f.weight()),
                                  {layer.bias().begin(), layer.bias().end()});
}

/// The inverse of from_dense.
template <class Scalar, int Rank>
Conv<Scalar, Rank> to_dense(const Transposed<Scalar, Rank>& adjoint) {
  return flipped(ConvView<const Scalar, Rank>(adjoint.layer()), adjoint.bias());
}

/// size positions and spacing - 1 zeros between any two.
template <int Rank>
PerAxis<Rank> dense_size(const PerAxis<Rank>& size, const PerAxis<Rank>& spacing) {
  PerAxis<Rank> result;
  for (int axis = 0; axis < Rank; ++axis) {
    result[axis] = size[axis] < 1
                       ? size[axis]
                       : checked_multiply(size[axis] - 1, spacing[axis], "transposed") + 1;
  }
  return result;
}

template <int Rank>
std::optional<PerAxis<Rank>> dense_size(const std::optional<PerAxis<Rank>>& size,
                                        const PerAxis<Rank>& spacing) {
  return size ? std::optional(dense_size(*size, spacing)) : std::nullopt;
}

/// The map with spacing - 1 zeros between its positions.
template <class Scalar, int Rank>
FeatureMap<Scalar, Rank> dense_map(const FeatureMapView<const Scalar, Rank>& x,
                                   const PerAxis<Rank>& spacing) {
  const MapShape<Rank>& shape = x.shape();
  const PerAxis<Rank> size = dense_size(shape.size, spacing);
  FeatureMap<Scalar, Rank> result({.batch = shape.batch, .channels = shape.channels, .size = size});
  auto from = x.values().begin();
  for (Index map = 0; map < shape.batch * shape.channels; ++map) {
    for_each_position(shape.size, [&](PerAxis<Rank> position) {
      for (int axis = 0; axis < Rank; ++axis) position[axis] *= spacing[axis];
      result.values()[static_cast<std::size_t>(map * numel(size) + flat(position, size))] = *from++;
    });
  }
  return result;
}

/// The layer that makes a stride, if one tap of it writes each position and nothing is cut off, as
/// in pixel shuffles and nearest upsampling; none where it is otherwise, or a sum makes the stride.
template <class Scalar, int Rank>
std::optional<Leaf<Scalar, Rank>> layer_of_stride(const Tree<Leaf<Scalar, Rank>>& outer,
                                                  const PerAxis<Rank>& stride) {
  if (!outer.is_leaf()) return {};
  const ConvShape<Rank>& shape = outer.leaf().view()->shape();
  for (int axis = 0; axis < Rank; ++axis) {
    const Index last = stride[axis] - 1;
    if (shape.kernel_size[axis] != stride[axis] || (last > 0 && shape.dilation[axis] != 1) ||
        shape.padding.start[axis] != last || shape.padding.end[axis] != last) {
      return {};
    }
  }
  return outer.leaf();
}

/// What a bias before such a layer is behind it, its own left out; none where positions of a
/// channel get different ones.
template <class Scalar, int Rank>
std::optional<std::vector<Scalar>> bias_behind(std::span<const Scalar> bias,
                                               const ConvView<const Scalar, Rank>& layer) {
  const ConvShape<Rank>& shape = layer.shape();
  const Index in = shape.in / shape.groups, out = shape.out / shape.groups;
  const Index taps = numel(shape.kernel_size);
  std::vector<Scalar> behind(static_cast<std::size_t>(shape.out), Scalar(0));
  for (Index o = 0; o < shape.out; ++o) {
    Scalar& here = behind[static_cast<std::size_t>(o)];
    for (Index tap = 0; tap < taps; ++tap) {
      Scalar sum(0);
      for (Index c = 0; c < in; ++c) {
        sum = sum + layer.weight()[static_cast<std::size_t>((o * in + c) * taps + tap)] *
                        bias[static_cast<std::size_t>(o / out * in + c)];
      }
      if (tap == 0) here = sum;
      if (!(here == sum)) return {};
    }
  }
  return behind;
}

/// From the gradient of a bias behind such a layer to that of the one before; zero for channels
/// whose taps differ, which alone would make it vary from position to position.
template <class Scalar, int Rank>
std::vector<Scalar> bias_gradient_before(std::span<const Scalar> gradient,
                                         const ConvView<const Scalar, Rank>& layer) {
  const ConvShape<Rank>& shape = layer.shape();
  const Index in = shape.in / shape.groups, out = shape.out / shape.groups;
  const Index taps = numel(shape.kernel_size);
  std::vector<Scalar> before(static_cast<std::size_t>(shape.in), Scalar(0));
  std::vector<bool> varies(before.size());
  const Scalar* weight = layer.weight().data();
  for (Index o = 0; o < shape.out; ++o) {
    for (Index c = 0; c < in; ++c, weight += taps) {
      const auto channel = static_cast<std::size_t>(o / out * in + c);
      const auto differs = [&](const Scalar& tap) { return !(tap == weight[0]); };
      varies[channel] = varies[channel] || std::any_of(weight, weight + taps, differs);
      before[channel] = before[channel] + weight[0] * gradient[static_cast<std::size_t>(o)];
    }
  }
  for (std::size_t c = 0; c < before.size(); ++c) {
    if (varies[c]) before[c] = Scalar(0);
  }
  return before;
}

/// Takes away the gradient of elements that read a channel of such a bias: any one of them alone
/// would make what is behind vary from position to position.
template <class Scalar, int Rank>
void keep_passing(const std::vector<Scalar>& bias, const ConvView<Scalar, Rank>& gradient) {
  const ConvShape<Rank>& shape = gradient.shape();
  const Index in = shape.in / shape.groups, out = shape.out / shape.groups;
  const Index taps = numel(shape.kernel_size);
  Scalar* weight = gradient.weight().data();
  for (Index o = 0; o < shape.out; ++o) {
    for (Index c = 0; c < in; ++c, weight += taps) {
      const bool is_zero = bias[static_cast<std::size_t>(o / out * in + c)] == Scalar(0);
      if (!is_zero) std::fill_n(weight, taps, Scalar(0));
    }
  }
}

template <class Scalar, int Rank>
bool has_bias(const Tree<Leaf<Scalar, Rank>>& tree) {
  bool has = false;
  tree.for_each_leaf([&](const auto& leaf) { has = has || leaf.shape().bias; });
  return has;
}

bool all_zero(const std::ranges::input_range auto& bias) {
  return std::ranges::all_of(
      bias, []<class Scalar>(const Scalar& element) { return element == Scalar(0); });
}

/// The bias of the one layer that acts as the expression does, on elements so far apart: at every
/// position, whatever the border of its linear part. Throws InexactError where it is not.
template <class Scalar, int Rank>
std::vector<Scalar> bias_of(const Tree<Leaf<Scalar, Rank>>& tree, const PerAxis<Rank>& spacing) {
  using Wide = WideFor<Scalar>;
  const auto rounded = [](const Conv<Wide, Rank>& layer) {
    std::vector<Scalar> bias(static_cast<std::size_t>(layer.shape().out), Scalar(0));
    std::ranges::transform(layer.bias(), bias.begin(), convert<Scalar, Wide>);
    return bias;
  };
  if (tree.is_leaf()) return rounded(tree.leaf().template to<Wide>());
  if (tree.join() == Join::chain) {  // most often only the last layer has one
    const auto& parts = tree.parts();
    const bool is_last =
        std::ranges::none_of(std::span(parts).first(parts.size() - 1), has_bias<Scalar, Rank>);
    if (is_last) return bias_of(parts.back(), spacing);
  }
  std::vector<Scalar> bias = rounded(evaluate<Wide>(tree));
  if (all_zero(bias)) return bias;
  if (const auto found = find_exactness<Rank>(Form<Rank>(form_of(tree)), {}, spacing); !found) {
    fail<InexactError>(
        {"a bias before a transposed layer is another at the border: ", found.reason});
  }
  return bias;
}

/// The linear part of a leaf before zeros are put between the positions of its output, as a leaf
/// that does the same after they were put between those of its input: dilation and padding grow,
/// the elements stay.
template <class Scalar, int Rank>
Leaf<Scalar, Rank> dilated(const Leaf<Scalar, Rank>& leaf, const PerAxis<Rank>& spacing) {
  ConvShape<Rank> shape = leaf.shape();
  const ChannelMap<Scalar>* map = leaf.channel_map();
  shape.bias = false;
  if (map) {
    ChannelMap<Scalar> linear = *map;
    linear.mean.clear();
    linear.bias.clear();
    Leaf<Scalar, Rank> result(linear);
    result.fixed = leaf.fixed;
    return result;
  }
  const auto scale = [&](PerAxis<Rank>& values) {
    for (int axis = 0; axis < Rank; ++axis) {
      values[axis] = checked_multiply(values[axis], spacing[axis], "transposed");
    }
  };
  scale(shape.dilation);
  scale(shape.padding.start);
  scale(shape.padding.end);
  return leaf.reshaped(shape);
}

/// What to accept of the dense form, where `border` accepts the expression. Throws InexactError
/// where it does not.
template <class Scalar, int Rank>
Border<Rank> dense_border(const TransposedExpr<Scalar, Rank>& expression,
                          const Border<Rank>& border) {
  const Exactness<Rank> found =
      border.interior_only ? Exactness<Rank>{} : exactness(expression, border.input_size);
  if (!found) {
    fail<InexactError>({"no single transposed layer equals this product",
                        border.input_size ? " at input size " : "",
                        border.input_size ? concertina::to_string(*border.input_size) : "",
                        ": seen as layers of stride 1 on ", expression.stride(),
                        " spaced elements, ", found.reason, "; a border of ", found.start,
                        " outputs at the start and ", found.end, " at the end differs"});
  }
  return {.interior_only = true, .input_size = dense_size(border.input_size, expression.stride())};
}

}  // namespace detail

template <class Scalar_, int Rank_>
Transposed<Scalar_, Rank_>::Transposed(const ConvView<const Scalar, Rank>& layer,
                                       std::vector<Scalar> bias,
                                       const PerAxis<Rank>& output_padding)
    : layer_(with_output_padding(layer, output_padding)), bias_(std::move(bias)) {
  if (!bias_.empty() && static_cast<Index>(bias_.size()) != layer_.shape().in) {
    throw ShapeError("transposed: bias has " + std::to_string(bias_.size()) +
                     " elements instead of " + std::to_string(layer_.shape().in) +
                     ", the input channels of " + to_string(layer_.shape()));
  }
}

template <class Scalar_, int Rank_>
auto Transposed<Scalar_, Rank_>::output_size(const PerAxis<Rank>& size) const -> PerAxis<Rank> {
  const auto& stride = layer_.shape().stride;
  const auto& padding = layer_.shape().padding;
  PerAxis<Rank> result;
  for (int axis = 0; axis < Rank; ++axis) {
    constexpr const char* what = "transposed";
    Index& extent = result[axis];
    extent =
        detail::checked_multiply(detail::checked_add(size[axis], -1, what), stride[axis], what);
    extent = detail::checked_add(extent, effective_kernel_size(layer_.shape(), axis), what);
    extent = detail::checked_add(extent, -padding.start[axis], what);
    extent = std::max<Index>(1, detail::checked_add(extent, -padding.end[axis], what));
  }
  require_sizes(size, result);
  return result;
}

template <class Scalar_, int Rank_>
auto Transposed<Scalar_, Rank_>::operator()(const FeatureMapView<const Scalar, Rank>& y,
                                            const PerAxis<Rank>& size) const
    -> FeatureMap<Scalar, Rank> {
  const ConvShape<Rank>& shape = layer_.shape();
  validate(shape);
  if (y.shape().channels != shape.out) {
    throw ShapeError("transposed: a map of " + std::to_string(y.shape().channels) +
                     " channels, where the layer writes " + std::to_string(shape.out) + " (" +
                     to_string(shape) + ")");
  }
  require_sizes(y.shape().size, size);
  FeatureMap<Scalar, Rank> x({.batch = y.shape().batch, .channels = shape.in, .size = size});
  const std::vector<detail::TapRun> runs = detail::tap_runs(shape, size);
  const Index from = shape.out * numel(y.shape().size), to = shape.in * numel(size);
  for (Index n = 0; n < y.shape().batch; ++n) {
    Scalar* map = x.values().data() + n * to;
    for (std::size_t c = 0; c < bias_.size(); ++c, map += numel(size)) {
      std::fill_n(map, numel(size), bias_[c]);
    }
    detail::apply_matrix<Scalar, Rank>(detail::Direction::adjoint, layer_, size, runs,
                                       y.values().data() + n * from, x.values().data() + n * to);
  }
  return x;
}

template <class Scalar_, int Rank_>
auto Transposed<Scalar_, Rank_>::with_output_padding(const ConvView<const Scalar, Rank>& layer,
                                                     const PerAxis<Rank>& output_padding)
    -> Conv<Scalar, Rank> {
  ConvShape<Rank> shape = layer.shape();
  for (int axis = 0; axis < Rank; ++axis) {
    const Index most = std::max(shape.stride[axis], shape.dilation[axis]) - 1;
    if (output_padding[axis] < 0 || output_padding[axis] > most) {
      throw ShapeError("transposed: an output padding of " + to_string(output_padding) +
                       ", which is not in 0 .. " + std::to_string(most) + " along axis " +
                       std::to_string(axis) + " (" + to_string(shape) + ")");
    }
    shape.padding.end[axis] -= output_padding[axis];
  }
  shape.bias = false;
  return Conv<Scalar, Rank>(ConvView<const Scalar, Rank>(shape, layer.weight()));
}

template <class Scalar_, int Rank_>
void Transposed<Scalar_, Rank_>::require_sizes(const PerAxis<Rank>& from,
                                               const PerAxis<Rank>& to) const {
  PerAxis<Rank> taken;
  bool fits = true;
  for (int axis = 0; axis < Rank; ++axis) {
    taken[axis] = concertina::output_size(layer_.shape(), to[axis], axis);
    fits = fits && from[axis] > 0 && to[axis] > 0 && taken[axis] == from[axis];
  }
  if (fits) return;
  throw ShapeError("transposed: a map of size " + to_string(from) +
                   " does not become one of size " + to_string(to) + ", which the layer takes to " +
                   to_string(taken) + " (" + to_string(layer_.shape()) + ")");
}

template <class Scalar, int Rank>
auto Transposed<Scalar, Rank>::as_conv() const -> Conv<Scalar, Rank> {
  if (layer_.shape().stride != 1) {
    throw ShapeError(
        "as_conv: the adjoint of a strided layer writes more positions than it reads, as no layer "
        "does (" +
        to_string(layer_.shape()) + ")");
  }
  return detail::to_dense(*this);
}

template <class Scalar_, int Rank_>
auto TransposedExpr<Scalar_, Rank_>::product(const TransposedExpr& outer,
                                             const TransposedExpr& inner) -> TransposedExpr {
  std::vector<TransposedExpr> factors(inner.factors().begin(), inner.factors().end());
  factors.insert(factors.end(), outer.factors().begin(), outer.factors().end());
  TransposedExpr result = inner;
  for (const TransposedExpr& next : outer.factors()) result = multiply(next, result);
  result.factors_ = std::move(factors);
  return result;
}

template <class Scalar_, int Rank_>
auto TransposedExpr<Scalar_, Rank_>::multiply(const TransposedExpr& outer,
                                              const TransposedExpr& inner) -> TransposedExpr {
  TransposedExpr result = inner;
  result.factors_.clear();
  for (int axis = 0; axis < Rank; ++axis) {
    result.stride_[axis] =
        detail::checked_multiply(inner.stride_[axis], outer.stride_[axis], "transposed");
  }
  if (outer.stride_ == 1) {
    result.dense_ = outer.dense_ * inner.dense_;
    return result.append(outer);
  }
  result.dense_ = Expr<Scalar, Rank>(inner.dense_.tree().map(
      [&](const auto& leaf) { return detail::dilated(leaf, outer.stride_); }));
  if (!detail::has_bias(inner.dense_.tree())) {
    result.dense_ = outer.dense_ * result.dense_;
    return result.append(outer);
  }

  // Its bias goes on behind the stride, as a leaf of its own.
  BiasBehind moved{inner.dense_, inner.stride_,
                   detail::layer_of_stride(outer.dense_.tree(), outer.stride_)};
  const auto bias = moved.value();
  if (!moved.layer) {
    result.dense_ = outer.dense_ * result.dense_;
    result.append(outer);
    result.biases_.push_back(std::move(moved));
    return result;
  }
  moved.leaf = inner.leaves_.size() + 1;
  bool is_fixed = true;
  inner.dense_.tree().for_each_leaf([&](const auto& leaf) { is_fixed = is_fixed && leaf.fixed; });
  const Expr<Scalar, any_rank> behind = channel_bias(*bias);
  result.dense_ = (is_fixed ? concertina::fixed(behind) : behind) * (outer.dense_ * result.dense_);
  result.append(outer);
  const Index channels = std::ssize(*bias);
  result.leaves_.push_back(
      {.shape = {.out = channels, .in = channels, .groups = channels, .bias = true},
       .is_bias = true});
  result.biases_.push_back(std::move(moved));
  return result;
}

template <class Scalar_, int Rank_>
auto TransposedExpr<Scalar_, Rank_>::sum(const TransposedExpr& f, const TransposedExpr& g)
    -> TransposedExpr {
  if (f.stride_ != g.stride_) {
    throw ShapeError("transposed layers of strides " + to_string(f.stride_) + " and " +
                     to_string(g.stride_) + " cannot be added");
  }
  TransposedExpr result = f;
  result.factors_.clear();
  result.dense_ = f.dense_ + g.dense_;
  return result.append(g);
}

template <class Scalar_, int Rank_>
auto TransposedExpr<Scalar_, Rank_>::append(const TransposedExpr& other) -> TransposedExpr& {
  const std::size_t before = leaves_.size();
  leaves_.insert(leaves_.end(), other.leaves_.begin(), other.leaves_.end());
  for (BiasBehind moved : other.biases_) {
    moved.first += before;
    if (moved.leaf) *moved.leaf += before;
    biases_.push_back(std::move(moved));
  }
  return *this;
}

template <class Scalar_, int Rank_>
auto TransposedExpr<Scalar_, Rank_>::BiasBehind::before() const -> std::vector<Scalar> {
  return detail::bias_of(of.tree(), stride);
}

template <class Scalar_, int Rank_>
auto TransposedExpr<Scalar_, Rank_>::BiasBehind::value() const
    -> std::optional<std::vector<Scalar>> {
  const std::vector<Scalar> bias = before();
  std::optional<std::vector<Scalar>> behind;
  if (layer) behind = detail::bias_behind<Scalar, Rank>(bias, *layer->view());
  if (behind || detail::all_zero(bias)) return behind;
  detail::fail<InexactError>(
      {"no bias stands for that of ", Form(of),
       " before a transposed layer: its sum varies from position to position; "
       "before a pixel shuffle it has to be the same for all positions that a "
       "channel becomes"});
}

template <class Scalar_, int Rank_>
auto TransposedExpr<Scalar_, Rank_>::current() const -> TransposedExpr {
  TransposedExpr result = *this;
  std::map<std::size_t, std::vector<Scalar>> values;  // of the leaves that are biases
  const auto updated = [&](const Expr<Scalar, Rank>& expression, std::size_t leaf) {
    return Expr<Scalar, Rank>(expression.tree().map([&](const detail::Leaf<Scalar, Rank>& at) {
      const auto found = values.find(leaf++);
      // One that moved on from there has left an identity.
      if (found == values.end() || at.channel_map()->bias.empty()) return at;
      ChannelMap<Scalar> map = *at.channel_map();
      map.bias = found->second;
      detail::Leaf<Scalar, Rank> changed(map);
      changed.fixed = at.fixed;
      return changed;
    }));
  };
  for (BiasBehind& moved : result.biases_) {
    moved.of = updated(moved.of, moved.first);
    const auto value = moved.value();
    if (moved.leaf) values[*moved.leaf] = *value;
  }
  result.dense_ = updated(dense_, 0);
  return result;
}

template <class Scalar_, int Rank_>
auto TransposedExpr<Scalar_, Rank_>::dense() const -> Expr<Scalar, Rank> {
  return biases_.empty() ? dense_ : current().dense_;
}

template <class Scalar_, int Rank_>
auto TransposedExpr<Scalar_, Rank_>::gradients(std::span<const Conv<Scalar, Rank>> of_leaves,
                                               const ParallelFor& run) const
    -> std::vector<Gradient> {
  std::vector<Conv<Scalar, Rank>> sums;  // in the layers' own shapes, with their biases
  for (std::size_t i = 0; i < leaves_.size(); ++i) {
    ConvShape<Rank> shape = of_leaves[i].shape();
    shape.bias = shape.bias || leaves_[i].shape.bias;
    Conv<Scalar, Rank>& sum = sums.emplace_back(shape);
    std::ranges::copy(of_leaves[i].weight(), sum.weight().begin());
    std::ranges::copy(of_leaves[i].bias(), sum.bias().begin());
  }
  // A bias moved last may have been made of others.
  const TransposedExpr now = current();
  for (const BiasBehind& moved : std::views::reverse(now.biases_)) {
    if (!moved.leaf) continue;
    detail::keep_passing(moved.before(), ConvView<Scalar, Rank>(sums[*moved.leaf - 1]));
    const std::span<const Scalar> behind = std::as_const(sums[*moved.leaf]).bias();
    const auto before = detail::bias_gradient_before<Scalar, Rank>(behind, *moved.layer->view());
    Contraction<Scalar, Rank> inner{Form(moved.of), interior_only};
    static_cast<void>(inner.forward(moved.of, run));
    Conv<Scalar, Rank> gradient(inner.shape());
    std::ranges::copy(before, gradient.bias().begin());
    std::size_t at = moved.first;
    for (const Conv<Scalar, Rank>& leaf : inner.backward(moved.of, gradient, run)) {
      Conv<Scalar, Rank>& sum = sums[at++];
      const auto add = [](std::span<Scalar> to, std::span<const Scalar> more) {
        for (std::size_t i = 0; i < more.size(); ++i) to[i] = to[i] + more[i];
      };
      add(sum.weight(), leaf.weight());
      add(sum.bias(), leaf.bias());
    }
  }
  std::vector<Gradient> result;
  for (std::size_t i = 0; i < leaves_.size(); ++i) {
    auto [shape, transposed, is_bias] = leaves_[i];
    const Conv<Scalar, Rank>& sum = sums[i];
    if (is_bias) continue;
    if (transposed) {
      shape.bias = false;
      const Conv<Scalar, Rank> f = detail::flipped(ConvView<const Scalar, Rank>(sum));
      result.emplace_back(Transposed<Scalar, Rank>(ConvView<const Scalar, Rank>(shape, f.weight()),
                                                   {sum.bias().begin(), sum.bias().end()}));
    } else {
      result.emplace_back(
          Conv<Scalar, Rank>(ConvView<const Scalar, Rank>(shape, sum.weight(), sum.bias())));
    }
  }
  return result;
}

template <class Scalar_, int Rank_>
TransposedExpr<Scalar_, Rank_>::TransposedExpr(Expr<Scalar, Rank> expression)
    : dense_(std::move(expression)) {
  for (const ConvShape<Rank>& shape : Form(dense_).leaves()) {
    if (shape.stride != 1) {
      throw ShapeError(
          "beside a transposed layer others have stride 1, or no single layer is "
          "their product (" +
          to_string(shape) + ")");
    }
    leaves_.push_back({.shape = shape});
  }
}

template <class Scalar_, int Rank_>
TransposedExpr<Scalar_, Rank_>::TransposedExpr(const Transposed<Scalar, Rank>& adjoint)
    : dense_(detail::to_dense(adjoint)),
      stride_(adjoint.layer().shape().stride),
      leaves_{{.shape = adjoint.layer().shape(), .transposed = true}} {
  leaves_.front().shape.bias = !adjoint.bias().empty();
}

template <class Scalar_, int Rank_>
auto TransposedExpr<Scalar_, Rank_>::output_size(const PerAxis<Rank>& size) const -> PerAxis<Rank> {
  return form().output_size(detail::dense_size(size, stride_));
}

template <class Scalar_, int Rank_>
auto TransposedExpr<Scalar_, Rank_>::operator()(const FeatureMapView<const Scalar, Rank>& x) const
    -> FeatureMap<Scalar, Rank> {
  return dense()(detail::dense_map(x, stride_));
}

template <class Scalar, int Rank>
Exactness<Rank> exactness(const TransposedExpr<Scalar, Rank>& expression,
                          const std::type_identity_t<std::optional<PerAxis<Rank>>>& input_size) {
  return detail::find_exactness<Rank>(
      expression.form(), detail::dense_size(input_size, expression.stride()), expression.stride());
}

template <class A, class Scalar, int Rank>
Transposed<Scalar, Rank> contract(const TransposedExpr<Scalar, Rank>& expression,
                                  const std::type_identity_t<Border<Rank>>& border,
                                  const ParallelFor& run) {
  const Conv<Scalar, Rank> dense =
      contract<A>(expression.dense(), detail::dense_border(expression, border), run);
  return detail::from_dense<Scalar, Rank>(dense, expression.stride());
}

template <class Scalar_, int Rank_>
void TransposedContraction<Scalar_, Rank_>::forward(const Expression& expression,
                                                    const ConvView<Scalar, Rank>& layer,
                                                    std::span<Scalar> bias,
                                                    const ParallelFor& run) {
  if (layer.shape() != shape_) {
    detail::fail<ShapeError>({"forward: a result that is the adjoint of ", layer.shape(),
                              ", where the contraction is that of ", shape_});
  }
  if (std::ssize(bias) != bias_length()) {
    detail::fail<ShapeError>({"forward: a bias of ", bias.size(),
                              " elements, where the contraction has ", bias_length()});
  }
  require_stride(expression.stride());
  const Conv<Scalar, Rank>& dense = dense_.forward(expression.dense(), run);
  detail::write_flipped(ConvView<const Scalar, Rank>(dense), layer.weight());
  std::ranges::copy(dense.bias(), bias.begin());
}

template <class Scalar_, int Rank_>
auto TransposedContraction<Scalar_, Rank_>::forward(const Expression& expression,
                                                    const ParallelFor& run)
    -> Transposed<Scalar, Rank> {
  Conv<Scalar, Rank> layer(shape_);
  std::vector<Scalar> bias(static_cast<std::size_t>(bias_length()), Scalar(0));
  forward(expression, layer, bias, run);
  return Transposed<Scalar, Rank>(layer, std::move(bias));
}

template <class Scalar_, int Rank_>
auto TransposedContraction<Scalar_, Rank_>::backward(const Expression& expression,
                                                     const Transposed<Scalar, Rank>& gradient,
                                                     const ParallelFor& run)
    -> std::vector<Gradient> {
  require_stride(gradient.layer().shape().stride);
  const Conv<Scalar, Rank> dense = detail::to_dense(gradient);
  return expression.gradients(dense_.backward(expression.dense(), dense, run), run);
}

template <class Scalar_, int Rank_>
void TransposedContraction<Scalar_, Rank_>::require_stride(const PerAxis<Rank>& stride) const {
  if (stride == shape_.stride) return;
  throw ShapeError("a contraction of stride " + to_string(shape_.stride) +
                   ", given one of stride " + to_string(stride));
}

template <class Scalar_, int Rank_>
TransposedContraction<Scalar_, Rank_>::TransposedContraction(
    const TransposedExpr<Scalar_, Rank_>& expression,
    const std::type_identity_t<Border<Rank_>>& border)
    : dense_(expression.form(), detail::dense_border(expression, border)),
      shape_(detail::flipped(dense_.shape())) {
  shape_.stride = expression.stride();
}

}  // namespace concertina
