// An expression as one layer, once or again and again with its gradient: contracted in the cheapest
// order, refused where no layer equals it.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/detail/evaluator.hpp>
#include <concertina/exactness.hpp>
#include <concertina/expression.hpp>
#include <concertina/parallel.hpp>

#include <optional>
#include <span>
#include <type_traits>
#include <vector>

namespace concertina {

/// One layer that acts as the expression does.
///
/// Computed in A (by default the layers' own scalar; float for half and bfloat16), in which
/// intermediates stay; the result is rounded once to the layers' scalar. `contract<double>(float
/// layers)` is thus correct to about half an ulp. Large matrix products are shared out by `run`:
/// contract(e, {}, Threads{2}).
/// Ensures   contract(e)(x) == e(x) for every x, before rounding; under `interior_only` away from
///           the border; the same bits whatever `run` does
/// Cost      for each chain the least multiply-adds of any order, found in (number of layers)^3
///           steps; the intermediate kernels
/// Throws    InexactError where the border is not accepted; ShapeError naming both layers where
///           channels or branches do not fit; SizeError where a size overflows or a kernel would be
///           almost only structural zeros
/// Gradient  Contraction
/// Source    ExpandNets (NeurIPS 2020), Section 3 and supplement; padding rules in docs/exactness.md
template <class A = void, LinearMap E>
Conv<ScalarOf<E>, rank_of<E>> contract(const E& expression,
                                       const std::type_identity_t<Border<rank_of<E>>>& border = {},
                                       const ParallelFor& run = serial_for);

/// A contraction that is computed again and again, with its gradient. Everything that follows from
/// the form is decided at construction: the order of products, each one's algorithm, and storage
/// for every intermediate and its gradient. Neither pass allocates, except the packing buffers of
/// Eigen's matrix products and, in the first pass, what it returns by reference and the layer that
/// stands for a channel permutation.
///
/// Large matrix products are cut into panels and handed to `run`. Sizes alone decide the cut, so
/// results are the same bit for bit whatever `run` does.
///
/// Scalar is the accumulator: where layers are used in half or bfloat16, keep their master weights
/// in float, contract and differentiate those, and convert the contraction.
///
/// Expressions are anything that contract() takes and that has this form: an Expr that is built
/// once and views layers whose elements change in place, or a list of layers (a list of expressions
/// is joined in every pass, which allocates). A list has its elements in memory: one that makes
/// layers as it is read does not compile.
/// Cost    backward() two multiply-adds for each of forward(); kernels of all intermediates and
///         their gradients, what the algorithms copy
/// Source  reverse accumulation: Griewank, Walther, Evaluating Derivatives, SIAM 2008, Chapter 3;
///         docs/backward.md
template <class Scalar_, int Rank_>
class Contraction {
 public:
  using Scalar = Scalar_;
  static constexpr int Rank = Rank_;
  static_assert(std::is_same_v<typename DefaultAccumulator<Scalar>::type, Scalar>,
                "half and bfloat16 only store: differentiate master weights in float");

  /// Plans for expressions of this form. Leaves that are fixed here get no gradient, whatever those
  /// of the expressions.
  /// Throws  as contract() does: InexactError where the border is not accepted; ShapeError,
  ///         SizeError
  explicit Contraction(const Form<Rank>& form, const Border<Rank>& border = {});

  const Form<Rank>& form() const noexcept { return form_; }

  /// Of the contraction.
  const ConvShape<Rank>& shape() const noexcept { return shape_; }

  /// Writes the layer that acts as the expression does to `result`, a view of shape().
  /// Requires  a result that does not overlap the expression's elements
  /// Ensures   result == contract(e) bit for bit
  /// Throws    ShapeError naming both forms where the expression has another one, or `result` is of
  ///           another shape
  /// Gradient  backward()
  template <LinearMap E>
  void forward(const E& expression, const ConvView<Scalar, Rank>& result,
               const ParallelFor& run = serial_for);

  /// The same in storage of its own, valid until the next call.
  template <LinearMap E>
  const Conv<Scalar, Rank>& forward(const E& expression,
                                    const ParallelFor& run = serial_for) CONCERTINA_LIFETIMEBOUND;

  /// From dL/dF, a layer of the contraction's shape whose elements are the derivatives of L with
  /// respect to the contraction's, to dL/d(leaf) in the same way: one for each leaf in the order of
  /// Form::leaves (for a chain the layer applied first comes first), with a bias where the leaf has
  /// one. Where a leaf is a channel map it is the gradient of its layer, from which
  /// ChannelMap::backward goes on. Of a fixed leaf there is none: what is given for it is not
  /// touched, and may be of any shape.
  /// Requires  the expression's elements to be those that forward() last saw; gradients that do not
  ///           overlap each other or anything that is read
  /// Ensures   for each leaf and direction V, <dL/dF, F(.., leaf + V, ..) - F(.., leaf, ..)> ==
  ///           <gradient, V>, before rounding: F is linear in each leaf's weight and bias
  /// Throws    ShapeError where the expression is of another form or a gradient of another shape;
  ///           Error where forward() has not been called
  template <LinearMap E>
  void backward(const E& expression,
                const std::type_identity_t<ConvView<const Scalar, Rank>>& gradient,
                std::span<const ConvView<Scalar, Rank>> leaf_gradients,
                const ParallelFor& run = serial_for);

  /// The same in storage of its own, valid until the next call.
  template <LinearMap E>
  std::span<const Conv<Scalar, Rank>> backward(
      const E& expression, const std::type_identity_t<ConvView<const Scalar, Rank>>& gradient,
      const ParallelFor& run = serial_for);

 private:
  template <class E>
  bool has_form_of(const E& expression) const;
  template <class E>
  void bind(const E& expression, bool write_maps);
  void bind_map(std::size_t leaf, const ChannelMap<Scalar>& map, bool write);

  Form<Rank> form_;
  ConvShape<Rank> shape_;
  std::vector<ConvShape<Rank>> leaf_shapes_;
  detail::Evaluator<Scalar> evaluator_;
  std::vector<detail::LayerData<const Scalar>> leaves_;  // of the expression at hand
  std::vector<std::optional<Conv<Scalar, Rank>>> maps_;  // the layers of leaves that are maps
  std::optional<Conv<Scalar, Rank>> result_;             // where the caller names none
  std::vector<Conv<Scalar, Rank>> gradients_;            // likewise
  std::vector<ConvView<Scalar, Rank>> gradient_views_;   // of these
  bool computed_ = false;
};

}  // namespace concertina

#include <concertina/detail/contract.ipp>
