// How transposed layers are applied, seen as layers of stride 1, joined, contracted and
// differentiated.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/detail/apply_matrix.hpp>
#include <concertina/transposed.hpp>

#include <algorithm>
#include <cstddef>
#include <string>

namespace concertina {

namespace detail {

/// The kernel flipped along each axis, the channels of each group exchanged, and dilation * (kernel
/// - 1) - padding on each side, with stride 1 whatever the layer's: with zeros between the
/// positions of its input, this is the layer's adjoint, and flipped twice a layer is itself.
template <class Scalar, int Rank>
Conv<Scalar, Rank> flipped(const ConvView<const Scalar, Rank>& layer,
                           std::span<const Scalar> bias = {}) {
  const ConvShape<Rank>& f = layer.shape();
  ConvShape<Rank> shape{.out = f.in,
                        .in = f.out,
                        .kernel_size = f.kernel_size,
                        .dilation = f.dilation,
                        .groups = f.groups,
                        .bias = !bias.empty()};
  for (int axis = 0; axis < Rank; ++axis) {
    shape.padding.start[axis] = effective_kernel_size(f, axis) - 1 - f.padding.start[axis];
    shape.padding.end[axis] = effective_kernel_size(f, axis) - 1 - f.padding.end[axis];
  }
  Conv<Scalar, Rank> result(shape);
  const Index in = f.in / f.groups, out = f.out / f.groups;
  const Index taps = numel(f.kernel_size);
  const Scalar* from = layer.weight().data();
  for (Index o = 0; o < f.out; ++o) {
    for (Index c = o / out * in; c < (o / out + 1) * in; ++c, from += taps) {
      std::reverse_copy(from, from + taps, result.weight().data() + (c * out + o % out) * taps);
    }
  }
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
FeatureMap<Scalar, Rank> dense_map(const FeatureMapView<Scalar, Rank>& x,
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

/// Whether channels are at most selected.
template <class Scalar, int Rank>
bool selects(const Leaf<Scalar, Rank>& leaf) {
  const ChannelMap<Scalar>* map = leaf.channel_map();
  return map && *map == ChannelMap<Scalar>{.in = map->in, .out = map->out, .source = map->source};
}

template <class Scalar>
std::vector<Scalar> selected(std::vector<Scalar> from, const std::vector<Index>& source) {
  if (source.empty() || from.empty()) return from;
  std::vector<Scalar> result;
  for (const Index channel : source) result.push_back(from[static_cast<std::size_t>(channel)]);
  return result;
}

/// The bias of a chain's last layer, after which channels are at most selected: what every position
/// gets; empty where it is zero. `place` becomes that layer's among the leaves.
template <class Scalar, int Rank>
std::vector<Scalar> last_bias(const Tree<Leaf<Scalar, Rank>>& tree, std::size_t& place) {
  if (!tree.is_leaf()) {
    const auto& parts = tree.parts();
    if (tree.join() != Join::chain || !parts.back().is_leaf()) return {};
    const Leaf<Scalar, Rank>& last = parts.back().leaf();
    const std::span before(parts.data(), parts.size() - 1);
    place = 0;
    if (!selects(last)) {
      for (const auto& part : before) part.for_each_leaf([&](const auto&) { ++place; });
      return last_bias(parts.back(), place);
    }
    return selected(last_bias(Tree<Leaf<Scalar, Rank>>(Join::chain, before), place),
                    last.channel_map()->source);
  }
  const ChannelMap<Scalar>* map = tree.leaf().channel_map();
  std::vector<Scalar> bias;
  if (map && map->mean.empty()) bias = map->bias;
  if (!map) bias.assign(tree.leaf().view()->bias().begin(), tree.leaf().view()->bias().end());
  const bool zero = std::ranges::all_of(bias, [](const Scalar& b) { return b == Scalar(0); });
  return zero ? std::vector<Scalar>() : bias;
}

/// What a bias before a chain becomes behind the layer that makes the last of its strides, that
/// layer's own included: where one tap of each layer writes each position, as in pixel shuffles and
/// nearest upsampling, and all positions of a channel get the same. Empty where not. `strides` are
/// those of the layers as they were given, `place` becomes that layer's among them.
template <class Scalar, int Rank>
std::vector<Scalar> bias_behind(std::vector<Scalar> bias, const Tree<Leaf<Scalar, Rank>>& outer,
                                const std::vector<PerAxis<Rank>>& strides, PerAxis<Rank> remaining,
                                std::size_t& place) {
  if (!outer.is_leaf() && outer.join() != Join::chain) return {};
  for (place = 0; !bias.empty(); ++place) {
    const Tree<Leaf<Scalar, Rank>>& part = outer.is_leaf() ? outer : outer.parts()[place];
    if (part.is_leaf() && selects(part.leaf())) {
      bias = selected(std::move(bias), part.leaf().channel_map()->source);
      continue;
    }
    if (!part.is_leaf() || !part.leaf().view()) return {};
    const ConvView<const Scalar, Rank>& layer = *part.leaf().view();
    const ConvShape<Rank>& shape = layer.shape();
    const PerAxis<Rank>& stride = strides[place];
    for (int axis = 0; axis < Rank; ++axis) {
      remaining[axis] /= stride[axis];
      const Index reach = (stride[axis] - 1) * remaining[axis];
      if (shape.kernel_size[axis] != stride[axis] ||
          (stride[axis] > 1 && shape.dilation[axis] != remaining[axis]) ||
          shape.padding.start[axis] != reach || shape.padding.end[axis] != reach) {
        return {};
      }
    }
    std::vector<Scalar> behind(static_cast<std::size_t>(shape.out));
    const Index in = shape.in / shape.groups, out = shape.out / shape.groups;
    const Index taps = numel(shape.kernel_size);
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
      if (shape.bias) here = here + layer.bias()[static_cast<std::size_t>(o)];
    }
    bias = std::move(behind);
    if (remaining == 1) return bias;
  }
  return {};
}

template <class Scalar, int Rank>
Conv<Scalar, Rank> with_bias(const ConvView<const Scalar, Rank>& layer, std::vector<Scalar> bias) {
  ConvShape<Rank> shape = layer.shape();
  shape.bias = true;
  return {shape, {layer.weight().begin(), layer.weight().end()}, std::move(bias)};
}

/// A leaf before zeros are put between the positions of its output as one that does the same after
/// they were put between those of its input: dilation and padding grow, the elements stay. Throws
/// InexactError for a bias that is not zero, as it would stand at every position, unless it
/// `moves`.
template <class Scalar, int Rank>
Leaf<Scalar, Rank> spread(const Leaf<Scalar, Rank>& leaf, const PerAxis<Rank>& spacing,
                          bool moves) {
  if (spacing == 1) return leaf;
  ConvShape<Rank> shape = leaf.shape();
  const auto zero = [](const auto& list) {
    return std::ranges::all_of(list, [](const Scalar& element) { return element == Scalar(0); });
  };
  const ChannelMap<Scalar>* map = leaf.channel_map();
  if (!moves && (map ? !zero(map->mean) || !zero(map->bias) : !zero(leaf.view()->bias()))) {
    fail<InexactError>({"no bias stands for that of a layer (", shape,
                        ") before a transposed one: its sum varies from position to position; "
                        "before a pixel shuffle it has to be the same for all positions that a "
                        "channel becomes"});
  }
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
auto Transposed<Scalar_, Rank_>::operator()(const FeatureMapView<Scalar, Rank>& y,
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
Conv<Scalar, Rank> as_conv(const Transposed<Scalar, Rank>& adjoint) {
  if (adjoint.layer().shape().stride != 1) {
    throw ShapeError(
        "as_conv: the adjoint of a strided layer writes more positions than it reads, as no layer "
        "does (" +
        to_string(adjoint.layer().shape()) + ")");
  }
  return detail::to_dense(adjoint);
}

template <class Scalar_, int Rank_>
auto TransposedExpr<Scalar_, Rank_>::product(const TransposedExpr& outer,
                                             const TransposedExpr& inner) -> TransposedExpr {
  TransposedExpr result = inner;
  Expr<Scalar, Rank> after = outer.dense_;
  std::size_t moved = inner.given_.size();  // the leaf whose bias goes on behind the strides
  if (outer.stride_ != 1) {
    std::vector<PerAxis<Rank>> strides;
    for (const Given& each : outer.given_) {
      strides.push_back(each.transposed ? each.shape.stride : PerAxis<Rank>(1));
    }
    std::size_t from = 0, to = 0, leaf = 0;
    const auto bias = detail::bias_behind(detail::last_bias(inner.dense_.tree(), from),
                                          after.tree(), strides, outer.stride_, to);
    if (!bias.empty()) {
      moved = from;  // to a leaf that so has a gradient, fixed or not
      after = Expr<Scalar, Rank>(after.tree().map([&](const auto& at) {
        return leaf++ == to ? detail::Leaf<Scalar, Rank>(detail::with_bias(*at.view(), bias)) : at;
      }));
    }
  }
  for (int axis = 0; axis < Rank; ++axis) {
    result.stride_[axis] =
        detail::checked_multiply(inner.stride_[axis], outer.stride_[axis], "transposed");
  }
  result.given_.clear();
  result.dense_ = after * Expr<Scalar, Rank>(inner.dense_.tree().map([&](const auto& leaf) {
                    const auto spaced =
                        detail::spread(leaf, outer.stride_, result.given_.size() == moved);
                    result.given_.push_back(inner.given_[result.given_.size()]);
                    result.given_.back().shape.bias &= spaced.shape().bias;
                    return spaced;
                  }));
  result.given_.insert(result.given_.end(), outer.given_.begin(), outer.given_.end());
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
  result.dense_ = f.dense_ + g.dense_;
  result.given_.insert(result.given_.end(), g.given_.begin(), g.given_.end());
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
    given_.push_back({shape, false});
  }
}

template <class Scalar_, int Rank_>
TransposedExpr<Scalar_, Rank_>::TransposedExpr(const Transposed<Scalar, Rank>& adjoint)
    : dense_(detail::to_dense(adjoint)),
      stride_(adjoint.layer().shape().stride),
      given_{{adjoint.layer().shape(), true}} {}

template <class Scalar_, int Rank_>
auto TransposedExpr<Scalar_, Rank_>::output_size(const PerAxis<Rank>& size) const -> PerAxis<Rank> {
  return Form(dense_).output_size(detail::dense_size(size, stride_));
}

template <class Scalar_, int Rank_>
auto TransposedExpr<Scalar_, Rank_>::operator()(const FeatureMapView<Scalar, Rank>& x) const
    -> FeatureMap<Scalar, Rank> {
  return dense_(detail::dense_map(x, stride_));
}

template <class Scalar, int Rank>
Exactness<Rank> exactness(const TransposedExpr<Scalar, Rank>& expression,
                          const std::type_identity_t<std::optional<PerAxis<Rank>>>& input_size) {
  return detail::find_exactness<Rank>(Form(expression.dense()),
                                      detail::dense_size(input_size, expression.stride()),
                                      expression.stride());
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
auto TransposedContraction<Scalar_, Rank_>::forward(const Expression& expression,
                                                    const ParallelFor& run)
    -> Transposed<Scalar, Rank> {
  require_stride(expression.stride());
  return detail::from_dense<Scalar, Rank>(dense_.forward(expression.dense(), run), stride_);
}

template <class Scalar_, int Rank_>
auto TransposedContraction<Scalar_, Rank_>::backward(const Expression& expression,
                                                     const Transposed<Scalar, Rank>& gradient,
                                                     const ParallelFor& run)
    -> std::vector<Gradient> {
  require_stride(gradient.layer().shape().stride);
  const Conv<Scalar, Rank> dense = detail::to_dense(gradient);
  std::vector<Gradient> result;
  for (const Conv<Scalar, Rank>& leaf : dense_.backward(expression.dense(), dense, run)) {
    const auto& [shape, transposed] = expression.given()[result.size()];
    if (transposed) {
      const Conv<Scalar, Rank> f = detail::flipped(ConvView<const Scalar, Rank>(leaf));
      result.emplace_back(Transposed<Scalar, Rank>(ConvView<const Scalar, Rank>(shape, f.weight()),
                                                   {leaf.bias().begin(), leaf.bias().end()}));
    } else {
      result.emplace_back(
          Conv<Scalar, Rank>(ConvView<const Scalar, Rank>(shape, leaf.weight(), leaf.bias())));
    }
  }
  return result;
}

template <class Scalar_, int Rank_>
void TransposedContraction<Scalar_, Rank_>::require_stride(const PerAxis<Rank>& stride) const {
  if (stride == stride_) return;
  throw ShapeError("a contraction of stride " + to_string(stride_) + ", given one of stride " +
                   to_string(stride));
}

template <class Scalar_, int Rank_>
TransposedContraction<Scalar_, Rank_>::TransposedContraction(
    const TransposedExpr<Scalar_, Rank_>& expression,
    const std::type_identity_t<Border<Rank_>>& border)
    : stride_(expression.stride()),
      dense_(Form(expression.dense()), detail::dense_border(expression, border)) {}

}  // namespace concertina
