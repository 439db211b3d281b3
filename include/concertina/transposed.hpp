// The adjoint of a layer: transposed convolutions, which spread each element where the layer would
// have read; and their products with each other and with layers of stride 1.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/contract.hpp>
#include <concertina/detail/apply_matrix.hpp>
#include <concertina/layers.hpp>

#include <algorithm>
#include <concepts>
#include <optional>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

namespace concertina {

/// The adjoint of a layer F: from F's output maps to its input maps, by the transposed matrix, plus
/// a bias of its own. This is PyTorch's ConvTranspose and ONNX's, with F's weight as it lies: their
/// [in][out / groups][kernel] is F's [out][in / groups][kernel]. Their output padding, positions at
/// the end that get the bias only, is so much less padding of F there. Complex numbers are not
/// conjugated, and F's own bias plays no part. For stride 1 prefer as_conv(): there the adjoint is
/// a layer like any other.
template <class Scalar_, int Rank_>
class Transposed {
 public:
  using Scalar = Scalar_;
  static constexpr int Rank = Rank_;

  /// bias [F.in], or empty for none; copies F's weight. Throws ShapeError for a bias of another
  /// length, and unless 0 <= output_padding < max(stride, dilation) along each axis.
  explicit Transposed(const ConvView<const Scalar, Rank>& layer, std::vector<Scalar> bias = {},
                      const PerAxis<Rank>& output_padding = 0)
      : layer_(with_output_padding(layer, output_padding)), bias_(std::move(bias)) {
    if (!bias_.empty() && static_cast<Index>(bias_.size()) != layer_.shape().in) {
      throw ShapeError("transposed: bias has " + std::to_string(bias_.size()) +
                       " elements instead of " + std::to_string(layer_.shape().in) +
                       ", the input channels of " + to_string(layer_.shape()));
    }
  }

  /// F, without its bias, and with what is output padding taken off its padding at the end.
  const Conv<Scalar, Rank>& layer() const noexcept { return layer_; }
  std::span<const Scalar> bias() const noexcept { return bias_; }

  /// The smallest map that F takes to one of `size`: (size - 1) * stride - padding + dilation *
  /// (kernel - 1) + 1 along each axis, which with the output padding is PyTorch's size; or 1
  /// where that is less and 1 will do.
  /// Throws  ShapeError where there is none
  PerAxis<Rank> output_size(const PerAxis<Rank>& size) const {
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

  /// The map of output_size() that the transposed matrix gives, plus the bias.
  /// Ensures  <F x, y> == <x, transposed(F)(y)> for every x and y, but for F's bias
  /// Cost     batch * weight elements * y's positions multiply-adds
  /// Throws   ShapeError where the channels differ or the map would be empty
  FeatureMap<Scalar, Rank> operator()(const FeatureMapView<Scalar, Rank>& y) const {
    return (*this)(y, output_size(y.shape().size));
  }

  /// The same for any `size` that F takes to y's: a strided layer takes several, whose last
  /// positions it does not read. Throws ShapeError, naming the sizes, for one that it takes to
  /// another.
  FeatureMap<Scalar, Rank> operator()(const FeatureMapView<Scalar, Rank>& y,
                                      const PerAxis<Rank>& size) const {
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

  /// Equality as maps, as for layers; a bias of zeros equals none.
  friend bool operator==(const Transposed& f, const Transposed& g) {
    const auto bias = [](const Transposed& layer) {
      const auto channels = static_cast<std::size_t>(layer.layer_.shape().in);
      return layer.bias_.empty() ? std::vector<Scalar>(channels, Scalar(0)) : layer.bias_;
    };
    return f.layer_ == g.layer_ && bias(f) == bias(g);
  }

 private:
  static Conv<Scalar, Rank> with_output_padding(const ConvView<const Scalar, Rank>& layer,
                                                const PerAxis<Rank>& output_padding) {
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

  /// Throws ShapeError unless F takes a map of size `to` to one of size `from`.
  void require_sizes(const PerAxis<Rank>& from, const PerAxis<Rank>& to) const {
    PerAxis<Rank> taken;
    bool fits = true;
    for (int axis = 0; axis < Rank; ++axis) {
      taken[axis] = concertina::output_size(layer_.shape(), to[axis], axis);
      fits = fits && from[axis] > 0 && to[axis] > 0 && taken[axis] == from[axis];
    }
    if (fits) return;
    throw ShapeError("transposed: a map of size " + to_string(from) +
                     " does not become one of size " + to_string(to) +
                     ", which the layer takes to " + to_string(taken) + " (" +
                     to_string(layer_.shape()) + ")");
  }

  Conv<Scalar, Rank> layer_;
  std::vector<Scalar> bias_;
};

static_assert(!Layer<Transposed<float, 2>>, "it reads what a layer of its shape would write");

/// The adjoint of F's linear part, with `bias` [F.in] or none; F is copied. A product is contracted
/// first.
template <LinearMap F>
Transposed<ScalarOf<F>, rank_of<F>> transposed(const F& layer, std::vector<ScalarOf<F>> bias = {},
                                               const PerAxis<rank_of<F>>& output_padding = 0) {
  if constexpr (Layer<F>) {
    return Transposed<ScalarOf<F>, rank_of<F>>(layer, std::move(bias), output_padding);
  } else {
    return transposed(contract(layer), std::move(bias), output_padding);
  }
}

/// F's linear part again.
template <class Scalar, int Rank>
Conv<Scalar, Rank> transposed(const Transposed<Scalar, Rank>& adjoint) {
  return adjoint.layer();
}

/// Blocks of factor^Rank channels become positions: torch.nn.PixelShuffle, depth to space, the
/// adjoint and inverse of pixel_unshuffle. It makes a transposed convolution of a layer before it,
/// if that has the same bias, or none, for all positions that a channel becomes.
/// Throws  ShapeError for no channels or factor
/// Source  Shi et al., Sub-pixel convolution, CVPR 2016
template <class Scalar, int Rank>
Transposed<Scalar, Rank> pixel_shuffle(Index out_channels, Index factor) {
  const Conv<Scalar, Rank> unshuffle = pixel_unshuffle<Scalar, Rank>(out_channels, factor);
  return Transposed<Scalar, Rank>(unshuffle);
}

/// Every position `factor` times along each axis: torch.nn.Upsample with mode "nearest" and a whole
/// factor. The adjoint of a sum over windows. Throws ShapeError for no channels or factor.
template <class Scalar, int Rank>
Transposed<Scalar, Rank> upsample_nearest(Index channels, const PerAxis<Rank>& factor) {
  Conv<Scalar, Rank> window({.out = channels,
                             .in = channels,
                             .kernel_size = factor,
                             .stride = factor,
                             .groups = channels});
  for (Scalar& element : window.weight()) element = Scalar(1);
  return Transposed<Scalar, Rank>(window);
}

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

}  // namespace detail

/// For stride 1 the adjoint as a layer: the kernel flipped along each axis, the channels of each
/// group exchanged, and dilation * (kernel - 1) - padding on each side.
/// Ensures  as_conv(t)(y) == t(y) for every y
/// Throws   ShapeError for larger strides
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

// ---- products ----------------------------------------------------------------------------------

namespace detail {

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

}  // namespace detail

/// Transposed layers joined with each other and with layers of stride 1, not yet evaluated: C2 *
/// transposed(F) * C1, several in a row, sums of such. It is kept in its *dense form*: stride - 1
/// zeros are put between the positions of the input, and an expression of stride 1 follows. There a
/// transposed layer is its flipped kernel, and a layer before it has its taps and padding spread by
/// the stride, so all that is known of expressions holds.
/// Lifetime  as Expr: named layers are viewed, and must outlive it; transposed ones are copied
/// Source    Dumoulin, Visin, A guide to convolution arithmetic for deep learning, 2016, Section 4
template <class Scalar_, int Rank_>
class TransposedExpr {
 public:
  using Scalar = Scalar_;
  static constexpr int Rank = Rank_;

  /// A layer as it was given, before it was flipped or spread.
  struct Given {
    ConvShape<Rank> shape;
    bool transposed;
  };

  TransposedExpr(const Transposed<Scalar, Rank>& adjoint)
      : dense_(detail::to_dense(adjoint)),
        stride_(adjoint.layer().shape().stride),
        given_{{adjoint.layer().shape(), true}} {}

  /// Layers of stride 1, which operators join with transposed ones. Throws ShapeError, naming the
  /// layer, for another stride.
  explicit TransposedExpr(Expr<Scalar, Rank> expression) : dense_(std::move(expression)) {
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

  /// The expression of stride 1 that follows the zeros, and how far elements of the input are apart
  /// there.
  const Expr<Scalar, Rank>& dense() const noexcept { return dense_; }
  const PerAxis<Rank>& stride() const noexcept { return stride_; }

  /// The layers as they were given, in the order of dense()'s leaves.
  const std::vector<Given>& given() const noexcept { return given_; }

  /// `inner`, then `outer`. A bias that ends `inner` becomes one of the first layer of `outer`
  /// where every position gets the same of it: after nearest upsampling always, after a pixel
  /// shuffle if it is alike for all positions that a channel becomes. Throws ShapeError where
  /// channels differ; InexactError where `inner` has another bias and `outer` a stride.
  static TransposedExpr product(const TransposedExpr& outer, const TransposedExpr& inner) {
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
          return leaf++ == to ? detail::Leaf<Scalar, Rank>(detail::with_bias(*at.view(), bias))
                              : at;
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

  /// The sum of two. Throws ShapeError where channels or strides differ.
  static TransposedExpr sum(const TransposedExpr& f, const TransposedExpr& g) {
    if (f.stride_ != g.stride_) {
      throw ShapeError("transposed layers of strides " + to_string(f.stride_) + " and " +
                       to_string(g.stride_) + " cannot be added");
    }
    TransposedExpr result = f;
    result.dense_ = f.dense_ + g.dense_;
    result.given_.insert(result.given_.end(), g.given_.begin(), g.given_.end());
    return result;
  }

  /// The same map without gradients.
  TransposedExpr fixed() const {
    TransposedExpr result = *this;
    result.dense_ = concertina::fixed(dense_);
    return result;
  }

  /// The contraction; see `contract`.
  operator Transposed<Scalar, Rank>() const { return contract(*this); }

  PerAxis<Rank> output_size(const PerAxis<Rank>& size) const {
    return Form(dense_).output_size(detail::dense_size(size, stride_));
  }

  /// One layer after another by its definition, in the dense form: what the contraction must equal.
  /// Throws  ShapeError where channels or a map's size do not fit
  FeatureMap<Scalar, Rank> operator()(const FeatureMapView<Scalar, Rank>& x) const {
    return dense_(detail::dense_map(x, stride_));
  }

 private:
  Expr<Scalar, Rank> dense_;
  PerAxis<Rank> stride_ = 1;
  std::vector<Given> given_;
};

namespace detail {

template <class T>
struct TransposedTraits;
template <class S, int R>
struct TransposedTraits<Transposed<S, R>> {
  using Expression = TransposedExpr<S, R>;
};
template <class S, int R>
struct TransposedTraits<TransposedExpr<S, R>> : TransposedTraits<Transposed<S, R>> {};

/// A transposed layer or a product with one.
template <class T>
concept TransposedFactor =
    requires { typename TransposedTraits<std::remove_cvref_t<T>>::Expression; };
template <TransposedFactor T>
using TransposedExprOf = typename TransposedTraits<std::remove_cvref_t<T>>::Expression;

/// What can be joined with the transposed layer T.
template <class F, class T>
concept JoinsTransposed =
    (TransposedFactor<F> && std::same_as<TransposedExprOf<F>, TransposedExprOf<T>>) ||
    (Factor<F> && std::same_as<FactorScalar<F>, typename TransposedExprOf<T>::Scalar> &&
     (factor_rank<F> == any_rank || factor_rank<F> == TransposedExprOf<T>::Rank));

/// F as an expression like T's.
template <TransposedFactor T, JoinsTransposed<T> F>
TransposedExprOf<T> as_transposed_expr(F&& factor) {
  using Result = TransposedExprOf<T>;
  if constexpr (TransposedFactor<F>) {
    return Result(std::forward<F>(factor));
  } else {
    return Result(Expr<typename Result::Scalar, Result::Rank>(std::forward<F>(factor)));
  }
}

}  // namespace detail

/// `inner`, then `outer`, one or both of them transposed, the other of stride 1: a batch norm or
/// convolution after a transposed convolution, a convolution before one.
/// Throws  ShapeError naming both layers where channels differ, and for another stride;
///         InexactError for a bias before a stride that varies from position to position
template <detail::TransposedFactor Outer, detail::JoinsTransposed<Outer> Inner>
auto operator*(Outer&& outer, Inner&& inner) {
  return detail::TransposedExprOf<Outer>::product(
      detail::as_transposed_expr<Outer>(std::forward<Outer>(outer)),
      detail::as_transposed_expr<Outer>(std::forward<Inner>(inner)));
}
template <class Outer, detail::TransposedFactor Inner>
  requires(!detail::TransposedFactor<Outer>) && detail::JoinsTransposed<Outer, Inner>
auto operator*(Outer&& outer, Inner&& inner) {
  return detail::TransposedExprOf<Inner>::product(
      detail::as_transposed_expr<Inner>(std::forward<Outer>(outer)),
      detail::as_transposed_expr<Inner>(std::forward<Inner>(inner)));
}

/// The map s * T.
template <class S, detail::TransposedFactor T>
  requires std::convertible_to<S, typename detail::TransposedExprOf<T>::Scalar> &&
           (!std::integral<typename detail::TransposedExprOf<T>::Scalar> || std::integral<S>)
auto operator*(const S& factor, T&& t) {
  using Result = detail::TransposedExprOf<T>;
  using Scalar = typename Result::Scalar;
  const Result expression(std::forward<T>(t));
  const Index channels = detail::channels(expression.dense().tree()).out;
  const ChannelMap<Scalar> scale{
      .in = channels,
      .out = channels,
      .weight = std::vector<Scalar>(static_cast<std::size_t>(channels), Scalar(factor))};
  return Expr<Scalar, Result::Rank>(scale) * expression;
}

/// Transposed layers of equal stride on the same input, outputs added. Throws ShapeError where
/// channels or strides differ; where output sizes do, when it is contracted.
template <detail::TransposedFactor F, detail::TransposedFactor G>
  requires detail::JoinsTransposed<F, G>
auto operator+(F&& f, G&& g) {
  return detail::TransposedExprOf<F>::sum(std::forward<F>(f), std::forward<G>(g));
}

/// The same map without gradients, as for others.
template <detail::TransposedFactor T>
auto fixed(T&& t) {
  return detail::TransposedExprOf<T>(std::forward<T>(t)).fixed();
}

/// Where the contraction equals the expression, as for others: over all input sizes, or at one.
template <class Scalar, int Rank>
Exactness<Rank> exactness(
    const TransposedExpr<Scalar, Rank>& expression,
    const std::type_identity_t<std::optional<PerAxis<Rank>>>& input_size = {}) {
  return detail::find_exactness<Rank>(Form(expression.dense()),
                                      detail::dense_size(input_size, expression.stride()),
                                      expression.stride());
}

namespace detail {

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

/// One transposed layer that acts as the expression does, computed as contract() says.
/// Ensures   contract(e)(y) == e(y) for every y, before rounding; under `interior_only` away from
///           the border
/// Throws    InexactError where the border is not accepted; ShapeError, SizeError as for others
/// Gradient  TransposedContraction
template <class A = void, class Scalar, int Rank>
Transposed<Scalar, Rank> contract(const TransposedExpr<Scalar, Rank>& expression,
                                  const std::type_identity_t<Border<Rank>>& border = {},
                                  const ParallelFor& run = serial_for) {
  const Conv<Scalar, Rank> dense =
      contract<A>(expression.dense(), detail::dense_border(expression, border), run);
  return detail::from_dense<Scalar, Rank>(dense, expression.stride());
}

/// Contraction for products with transposed layers: computed again and again, with its gradient for
/// every layer, each in the layout in which it was given.
template <class Scalar_, int Rank_>
class TransposedContraction {
 public:
  using Scalar = Scalar_;
  static constexpr int Rank = Rank_;
  using Expression = TransposedExpr<Scalar, Rank>;

  /// A Conv for a layer, for a channel map the gradient of its layer; a Transposed for a transposed
  /// one, with the gradients of F's weight and of the bias.
  using Gradient = std::variant<Conv<Scalar, Rank>, Transposed<Scalar, Rank>>;

  /// Plans for expressions of this form. Throws as contract() does.
  explicit TransposedContraction(const TransposedExpr<Scalar_, Rank_>& expression,
                                 const std::type_identity_t<Border<Rank_>>& border = {})
      : stride_(expression.stride()),
        dense_(Form(expression.dense()), detail::dense_border(expression, border)) {}

  /// Ensures  forward(e) == contract(e) bit for bit
  /// Throws   ShapeError where the expression has another form
  Transposed<Scalar, Rank> forward(const Expression& expression,
                                   const ParallelFor& run = serial_for) {
    require_stride(expression.stride());
    return detail::from_dense<Scalar, Rank>(dense_.forward(expression.dense(), run), stride_);
  }

  /// From dL/d(contraction) to the gradient of each layer, in the order in which they are applied,
  /// branch after branch; see Contraction::backward. A bias before a stride has none: where it
  /// stands behind it, its gradient is that of the transposed layer's bias. Of fixed layers zeros.
  std::vector<Gradient> backward(const Expression& expression,
                                 const Transposed<Scalar, Rank>& gradient,
                                 const ParallelFor& run = serial_for) {
    require_stride(gradient.layer().shape().stride);
    const Conv<Scalar, Rank> dense = detail::to_dense(gradient);
    std::vector<Gradient> result;
    for (const Conv<Scalar, Rank>& leaf : dense_.backward(expression.dense(), dense, run)) {
      const auto& [shape, transposed] = expression.given()[result.size()];
      if (transposed) {
        const Conv<Scalar, Rank> f = detail::flipped(ConvView<const Scalar, Rank>(leaf));
        result.emplace_back(
            Transposed<Scalar, Rank>(ConvView<const Scalar, Rank>(shape, f.weight()),
                                     {leaf.bias().begin(), leaf.bias().end()}));
      } else {
        result.emplace_back(
            Conv<Scalar, Rank>(ConvView<const Scalar, Rank>(shape, leaf.weight(), leaf.bias())));
      }
    }
    return result;
  }

 private:
  void require_stride(const PerAxis<Rank>& stride) const {
    if (stride == stride_) return;
    throw ShapeError("a contraction of stride " + to_string(stride_) + ", given one of stride " +
                     to_string(stride));
  }

  PerAxis<Rank> stride_;
  Contraction<Scalar, Rank> dense_;
};

}  // namespace concertina
