// The gradient of a contraction with respect to every layer in it, for training loops: contract,
// run the compact convolution on the batch, pull dL/dF back to all layers.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/contract.hpp>
#include <concertina/detail/product/gradient.hpp>

#include <concepts>
#include <cstddef>
#include <optional>
#include <span>
#include <type_traits>
#include <variant>
#include <vector>

namespace concertina {

/// A contraction that is computed again and again, with its gradient. Everything that follows from
/// the form is decided at construction: the order of products, each pair's algorithm, and storage
/// for every intermediate and its gradient. Neither pass allocates, but for the packing buffers of
/// Eigen's matrix products and, in the first forward(), the layer that stands for a channel
/// permutation.
///
/// Large matrix products are cut into panels and handed to `run`: run(count, task) must call
/// task(i) once for each i in 0 .. count - 1, in any order, at the same time if it likes, and
/// return when all are done. Sizes alone decide the cut, so results are the same bit for bit
/// whatever `run` does; by default it is a plain loop.
///
/// Scalar is the accumulator: where layers are used in half or bfloat16, keep their master weights
/// in float, contract and differentiate those, and convert the contraction.
///
/// Expressions are anything that contract() takes and that has this form: an Expr that is built
/// once and views layers whose numbers change in place, or a list of layers.
/// Cost    backward() two multiply-adds for each of forward(); kernels of all intermediates and
///         their gradients, what the algorithms copy, and a gradient for each leaf
/// Source  reverse accumulation: Griewank, Walther, Evaluating Derivatives, SIAM 2008, Chapter 3;
///         docs/pullback.md
template <class Scalar_, int Rank_>
class Contraction {
 public:
  using Scalar = Scalar_;
  static constexpr int Rank = Rank_;
  static_assert(std::is_same_v<typename DefaultAccumulator<Scalar>::type, Scalar>,
                "half and bfloat16 only store: differentiate master weights in float");

  /// Plans for expressions of this form.
  /// Throws  as contract() does: InexactError where the policy is not met; ShapeError, SizeError
  explicit Contraction(const Form<Rank>& form,
                       const std::type_identity_t<BorderPolicy<Rank>>& policy = {});

  const Form<Rank>& form() const noexcept { return form_; }

  /// Of the contraction.
  const ConvShape<Rank>& shape() const noexcept { return shape_; }

  /// One layer that acts as the expression does; valid until the next call.
  /// Ensures   forward(e) == contract(e) bit for bit
  /// Throws    ShapeError naming both forms where the expression has another one
  /// Gradient  backward()
  template <Expression E>
  const Conv<Scalar, Rank>& forward(const E& expression) {
    return forward(expression, detail::InTurn());
  }
  template <Expression E, class Run>
  const Conv<Scalar, Rank>& forward(const E& expression, Run&& run);

  /// From dL/dF, a layer of the contraction's shape whose numbers are the derivatives of L with
  /// respect to the contraction's, to dL/d(leaf) in the same way: one for each leaf in the order of
  /// Tree::for_each_leaf (for a chain the layer applied first comes first), with a bias where the
  /// leaf has one. Where a leaf is a channel map it is the gradient of its layer, from which
  /// channel_map_gradient goes on. Valid until the next call.
  /// Requires  the expression's numbers to be those that forward() last saw
  /// Ensures   for each leaf and direction V, <dL/dF, F(.., leaf + V, ..) - F(.., leaf, ..)> ==
  ///           <gradient, V>, before rounding: F is linear in each leaf's weight and bias
  /// Throws    ShapeError where the expression is of another form or the gradient of another shape;
  ///           Error where forward() has not been called
  template <Expression E>
  std::span<const Conv<Scalar, Rank>> backward(const E& expression,
                                               const ConvView<Scalar, Rank>& gradient) {
    return backward(expression, gradient, detail::InTurn());
  }
  template <Expression E, class Run>
  std::span<const Conv<Scalar, Rank>> backward(const E& expression,
                                               const ConvView<Scalar, Rank>& gradient, Run&& run);

 private:
  /// A leaf by its number, or a step by its number after all leaves.
  using Operand = std::size_t;

  struct Product {
    detail::PairProduct<Scalar, Rank> multiply;
    detail::PairGradient<Scalar, Rank> gradient;
    Operand outer, inner;
  };
  struct Parallel {
    std::vector<detail::BranchPlace<Rank>> places;
    std::vector<Operand> branches;
  };
  struct Step {
    std::variant<Product, Parallel> how;
    Conv<Scalar, Rank> value;
  };

  Operand plan(const Form<Rank>& node, std::size_t& leaf);
  Operand plan_run(const detail::ChainOrder<Rank>& order, std::span<const Operand> parts,
                   std::size_t first, std::size_t last);
  const ConvShape<Rank>& shape_of(Operand operand) const;
  ConvView<Scalar, Rank> value_of(Operand operand) const;
  Conv<Scalar, Rank>& gradient_of(Operand operand);

  template <class E>
  bool has_form_of(const E& expression) const;
  template <class E>
  void bind(const E& expression, bool write_maps);
  void bind_map(std::size_t leaf, const ChannelMap<Scalar>& map, bool write);

  Form<Rank> form_;
  ConvShape<Rank> shape_;
  std::vector<Conv<Scalar, Rank>> gradients_;            // of the leaves
  std::vector<ConvView<Scalar, Rank>> leaves_;           // of the expression at hand
  std::vector<std::optional<Conv<Scalar, Rank>>> maps_;  // the layers of leaves that are maps
  std::vector<Step> steps_;                              // each after those that it reads
  std::vector<Conv<Scalar, Rank>> step_gradients_;       // but for the last step's, which is given
  std::optional<Conv<Scalar, Rank>> copy_;               // of an expression that is one leaf
  bool computed_ = false;
};

/// From the gradient of a channel map's layer, as Contraction::backward gives it, to those of the
/// map's own fields: weight, bias, mean and variance of a batch norm, the factors of a scale. A map
/// of the same channels, source, eps and divisor of which those fields are the gradients; empty
/// where the map's are. Statistics count as constants of the map, not as functions of a batch.
/// Throws    ShapeError where the gradient is not of the map's shape
template <class Scalar, int Rank>
ChannelMap<Scalar> channel_map_gradient(const ChannelMap<Scalar>& map,
                                        const Conv<Scalar, Rank>& gradient);

}  // namespace concertina

#include <concertina/detail/pullback.ipp>
