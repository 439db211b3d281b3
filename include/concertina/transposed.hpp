// The adjoint of a layer: transposed convolutions, which spread each element where the layer would
// have read; and their products with each other and with layers of stride 1.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/contract.hpp>
#include <concertina/detail/transposed_traits.hpp>
#include <concertina/layers.hpp>

#include <concepts>
#include <optional>
#include <span>
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
                      const PerAxis<Rank>& output_padding = 0);

  /// F, without its bias, and with what is output padding taken off its padding at the end.
  const Conv<Scalar, Rank>& layer() const noexcept { return layer_; }
  std::span<const Scalar> bias() const noexcept { return bias_; }

  /// The smallest map that F takes to one of `size`: (size - 1) * stride - padding + dilation *
  /// (kernel - 1) + 1 along each axis, which with the output padding is PyTorch's size; or 1
  /// where that is less and 1 will do.
  /// Throws  ShapeError where there is none
  PerAxis<Rank> output_size(const PerAxis<Rank>& size) const;

  /// The map of output_size() that the transposed matrix gives, plus the bias.
  /// Ensures  <F x, y> == <x, transposed(F)(y)> for every x and y, but for F's bias
  /// Cost     batch * weight elements * y's positions multiply-adds
  /// Throws   ShapeError where the channels differ or the map would be empty
  FeatureMap<Scalar, Rank> operator()(const FeatureMapView<const Scalar, Rank>& y) const {
    return (*this)(y, output_size(y.shape().size));
  }

  /// The same for any `size` that F takes to y's: a strided layer takes several, whose last
  /// positions it does not read. Throws ShapeError, naming the sizes, for one that it takes to
  /// another.
  FeatureMap<Scalar, Rank> operator()(const FeatureMapView<const Scalar, Rank>& y,
                                      const PerAxis<Rank>& size) const;

  /// For stride 1 the same map as a layer: the kernel flipped along each axis, the channels of each
  /// group exchanged, and dilation * (kernel - 1) - padding on each side.
  /// Ensures  t.as_conv()(y) == t(y) for every y
  /// Throws   ShapeError for larger strides
  Conv<Scalar, Rank> as_conv() const;

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
                                                const PerAxis<Rank>& output_padding);

  /// Throws ShapeError unless F takes a map of size `to` to one of size `from`.
  void require_sizes(const PerAxis<Rank>& from, const PerAxis<Rank>& to) const;

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

// ---- products ----------------------------------------------------------------------------------

/// Transposed layers joined with each other and with layers of stride 1, not yet evaluated: C2 *
/// transposed(F) * C1, several in a row, sums of such. It is kept in its *dense form*: stride - 1
/// zeros are put between the positions of the input, and an expression of stride 1 follows. There a
/// transposed layer is its flipped kernel, and a layer before it has its taps and padding spread by
/// the stride, so all that is known of expressions holds.
/// Lifetime  as Expr: named layers are viewed, and must outlive it; transposed ones are copied, so
///           that a training step writes the product anew
/// Source    Dumoulin, Visin, A guide to convolution arithmetic for deep learning, 2016, Section 4
template <class Scalar_, int Rank_>
class TransposedExpr {
 public:
  using Scalar = Scalar_;
  static constexpr int Rank = Rank_;

  /// A Conv for a layer, for a channel map the gradient of its layer; a Transposed for a transposed
  /// one, with the gradients of F's weight and of the bias.
  using Gradient = std::variant<Conv<Scalar, Rank>, Transposed<Scalar, Rank>>;

  TransposedExpr(const Transposed<Scalar, Rank>& adjoint);

  /// Layers of stride 1, which operators join with transposed ones. Throws ShapeError, naming the
  /// layer, for another stride.
  explicit TransposedExpr(Expr<Scalar, Rank> expression);

  /// The expression of stride 1 that follows the zeros, and how far elements of the input are apart
  /// there.
  /// Throws  InexactError where a bias before a stride has become one that none stands for
  Expr<Scalar, Rank> dense() const;
  const PerAxis<Rank>& stride() const noexcept { return stride_; }
  Form<Rank> form() const { return dense_; }  ///< of dense()

  /// `inner`, then `outer`. The bias of what `inner` contracts to goes on behind the strides of
  /// `outer`, as a leaf of its own, where every position gets the same of it: after nearest
  /// upsampling always, after a pixel shuffle if it is alike for all positions that a channel
  /// becomes. A product of products is the same however it is put in parentheses. Throws ShapeError
  /// where channels differ; InexactError where `inner` has another bias that is not zero and
  /// `outer` a stride.
  static TransposedExpr product(const TransposedExpr& outer, const TransposedExpr& inner);

  /// The sum of two. Throws ShapeError where channels or strides differ.
  static TransposedExpr sum(const TransposedExpr& f, const TransposedExpr& g);

  /// The same map without gradients.
  TransposedExpr fixed() const {
    TransposedExpr result = *this;
    result.dense_ = concertina::fixed(dense_);
    for (TransposedExpr& factor : result.factors_) factor = factor.fixed();
    return result;
  }

  /// The contraction; see `contract`.
  operator Transposed<Scalar, Rank>() const { return contract(*this); }

  /// The spatial size of the output for an input of this size.
  /// Throws  ShapeError where a map on the way is smaller than the next kernel
  PerAxis<Rank> output_size(const PerAxis<Rank>& size) const;

  /// One layer after another by its definition, in the dense form: what the contraction must equal.
  /// Throws  ShapeError where channels or a map's size do not fit
  FeatureMap<Scalar, Rank> operator()(const FeatureMapView<const Scalar, Rank>& x) const;

  /// From the gradients of dense()'s leaves to those of the layers as they were given.
  std::vector<Gradient> gradients(std::span<const Conv<Scalar, Rank>> of_leaves,
                                  const ParallelFor& run = serial_for) const;

 private:
  /// A leaf as it was given, before it was flipped or spread; or a bias that moved.
  struct Given {
    ConvShape<Rank> shape;
    bool transposed = false, is_bias = false;
  };
  /// The bias of an expression before a stride.
  struct BiasBehind {
    Expr<Scalar, Rank> of;
    PerAxis<Rank> stride;                             // its own
    std::optional<detail::Leaf<Scalar, Rank>> layer;  // that it goes through; none if none stands
    std::size_t first = 0;                            // the expression's first leaf
    std::optional<std::size_t> leaf = {};             // the bias, just behind the layer's

    std::vector<Scalar> before() const;

    /// What it is now behind the layer, none where it is zero before it and none stands.
    std::optional<std::vector<Scalar>> value() const;
  };

  /// The same with biases behind strides of what the layers' are now.
  TransposedExpr current() const;

  /// The product with an `outer` that is none.
  static TransposedExpr multiply(const TransposedExpr& outer, const TransposedExpr& inner);

  /// The factors of a product, the one applied first first; itself where it is none.
  std::span<const TransposedExpr> factors() const {
    return factors_.empty() ? std::span(this, 1) : std::span(factors_);
  }

  /// Adds the leaves of `other`.
  TransposedExpr& append(const TransposedExpr& other);

  Expr<Scalar, Rank> dense_;
  PerAxis<Rank> stride_ = 1;
  std::vector<Given> leaves_;  // of dense_
  std::vector<BiasBehind> biases_;
  std::vector<TransposedExpr> factors_;
};

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
      .weight = detail::per_channel(channels, Scalar(factor), "channel_scale")};
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
    const std::type_identity_t<std::optional<PerAxis<Rank>>>& input_size = {});

/// One transposed layer that acts as the expression does, computed as contract() says.
/// Ensures   contract(e)(y) == e(y) for every y, before rounding; under `interior_only` away from
///           the border
/// Throws    InexactError where the border is not accepted; ShapeError, SizeError as for others
/// Gradient  TransposedContraction
template <class A = void, class Scalar, int Rank>
Transposed<Scalar, Rank> contract(const TransposedExpr<Scalar, Rank>& expression,
                                  const std::type_identity_t<Border<Rank>>& border = {},
                                  const ParallelFor& run = serial_for);

/// Contraction for products with transposed layers: computed again and again, with its gradient for
/// every layer, each in the layout in which it was given.
template <class Scalar_, int Rank_>
class TransposedContraction {
 public:
  using Scalar = Scalar_;
  static constexpr int Rank = Rank_;
  using Expression = TransposedExpr<Scalar, Rank>;

  using Gradient = typename Expression::Gradient;

  /// Plans for expressions of this form. Throws as contract() does.
  explicit TransposedContraction(const TransposedExpr<Scalar_, Rank_>& expression,
                                 const std::type_identity_t<Border<Rank_>>& border = {});

  /// Of the layer F whose adjoint is the contraction: that of the contraction's layer().
  const ConvShape<Rank>& shape() const noexcept { return shape_; }

  /// Writes F to `layer`, a view of shape(), and the contraction's bias to `bias` [F.in], empty
  /// where it has none.
  /// Requires  views that overlap neither each other nor the expression's elements
  /// Ensures   transposed(layer, bias) == contract(e) bit for bit
  /// Throws    ShapeError where the expression has another form, `layer` another shape or `bias`
  ///           another length
  void forward(const Expression& expression, const ConvView<Scalar, Rank>& layer,
               std::span<Scalar> bias, const ParallelFor& run = serial_for);

  /// The same as a layer of its own.
  Transposed<Scalar, Rank> forward(const Expression& expression,
                                   const ParallelFor& run = serial_for);

  /// From dL/d(contraction) to the gradient of each layer, in the order in which they are applied,
  /// branch after branch; see Contraction::backward. Zeros of fixed layers, and of what alone would
  /// make the bias behind a stride vary from position to position: of elements of the stride's
  /// kernel that read a channel with a bias that is not zero; and of a channel's bias before the
  /// stride, unless all taps that read the channel are equal, as nearest upsampling's. That bias
  /// then counts as a constant of what makes it.
  std::vector<Gradient> backward(const Expression& expression,
                                 const Transposed<Scalar, Rank>& gradient,
                                 const ParallelFor& run = serial_for);

 private:
  void require_stride(const PerAxis<Rank>& stride) const;
  Index bias_length() const { return dense_.shape().bias ? shape_.in : 0; }

  Contraction<Scalar, Rank> dense_;
  ConvShape<Rank> shape_;
};

}  // namespace concertina

#include <concertina/detail/transposed.ipp>
