// Layers joined by `*`, `+` and `-`, or in lists, not yet evaluated: what stands where, what is
// viewed and what is kept.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/channel_map.hpp>
#include <concertina/conv.hpp>
#include <concertina/detail/leaf.hpp>
#include <concertina/detail/linear_traits.hpp>
#include <concertina/detail/tree.hpp>
#include <concertina/form.hpp>
#include <concertina/join.hpp>

#include <concepts>
#include <optional>
#include <ranges>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace concertina {

namespace detail {

/// What to_string of an expression prints.
template <class Scalar, int Rank>
std::string algebra(const Tree<Leaf<Scalar, Rank>>& tree);

template <class Scalar, int Rank>
FeatureMap<Scalar, Rank> apply(const Tree<Leaf<Scalar, Rank>>& node,
                               const FeatureMapView<const Scalar, Rank>& x);

/// What an expression holds and becomes; stand-ins that nothing converts to where it has no rank.
template <class Scalar, int Rank>
struct LayerTypes {
  using Owner = Conv<Scalar, Rank>;
  using View = ConvView<const Scalar, Rank>;
  using WritingView = ConvView<Scalar, Rank>;
};
template <class Scalar>
struct LayerTypes<Scalar, any_rank> {
  struct Owner {};
  struct View {};
  struct WritingView {};
};

}  // namespace detail

/// Layers joined by `*`, `+` and `-`, evaluated when they become a Conv. It is a tree whose
/// products and sums are flat lists, so `(a * b) * c` and `a * (b * c)` are the same, and the
/// cheapest order is found whatever the parentheses. With Rank any_rank it holds only what has no
/// rank of its own (batch norms, scales, identities, permutations) and takes that of its neighbour.
/// Lifetime  named layers are viewed, and must outlive it; temporaries are kept in it
/// Moved     one that was moved from is empty: used in any way, it throws ShapeError
template <class Scalar_, int Rank_>
class Expr {
 public:
  using Scalar = Scalar_;
  static constexpr int Rank = Rank_;
  using Tree = detail::Tree<detail::Leaf<Scalar, Rank>>;
  using Owner = typename detail::LayerTypes<Scalar, Rank>::Owner;
  using View = typename detail::LayerTypes<Scalar, Rank>::View;

  Expr(const Owner& layer CONCERTINA_LIFETIMEBOUND)
    requires(Rank >= 0)
      : tree_(detail::Leaf<Scalar, Rank>(View(layer))) {}
  Expr(const View& view)
    requires(Rank >= 0)
      : tree_(detail::Leaf<Scalar, Rank>(view)) {}
  Expr(const typename detail::LayerTypes<Scalar, Rank>::WritingView& view)
    requires(Rank >= 0)
      : Expr(View(view)) {}
  Expr(Owner&& layer)
    requires(Rank >= 0)
      : tree_(detail::Leaf<Scalar, Rank>(std::move(layer))) {}
  Expr(const Owner&&) = delete;

  Expr(const ChannelMap<Scalar>& map) : tree_(detail::Leaf<Scalar, Rank>(map)) {}

  /// What has no rank takes this one.
  template <int R>
    requires(R == any_rank && Rank >= 0)
  Expr(const Expr<Scalar, R>& expression)
      : tree_(expression.tree().map([](const auto& leaf) {
          detail::Leaf<Scalar, Rank> ranked(*leaf.channel_map());
          ranked.fixed = leaf.fixed;
          return ranked;
        })) {}

  explicit Expr(Tree tree) : tree_(std::move(tree)) {}

  /// Parts joined; see `chain`, `sum`, `concat_outputs`, `concat_inputs` and `direct_sum`.
  /// Throws ShapeError naming two parts whose channels differ.
  Expr(Join join, const std::vector<Expr>& parts);
  Expr(Join join, Expr first, Expr second);

  /// The map factor * expression.
  Expr scaled(const Scalar& factor) const {
    const Index channels = detail::channels(tree_).out;
    return {Join::chain, *this,
            ChannelMap<Scalar>{.in = channels,
                               .out = channels,
                               .weight = detail::per_channel(channels, factor, "channel_scale")}};
  }

  /// This, then `outer`. Throws ShapeError where channels differ.
  void then(Expr outer) { *this = Expr(Join::chain, *this, std::move(outer)); }

  const Tree& tree() const& noexcept { return tree_; }
  Tree tree() && noexcept { return std::move(tree_); }

  /// Views of the layers that it holds, in the order in which they are applied, branch after
  /// branch.
  std::vector<View> layers() const&
    requires(Rank >= 0)
  {
    std::vector<View> views;
    tree_.for_each_leaf([&](const auto& leaf) {
      if (leaf.view()) views.push_back(*leaf.view());
    });
    return views;
  }
  void layers() && = delete;

  /// The contraction; see `contract`, whose header has to be included.
  operator Owner() const
    requires(Rank >= 0)
  {
    return contract(*this);
  }

  /// One layer after another, each by its definition: what the contraction must equal.
  /// Throws  ShapeError where channels or a map's size do not fit, or branches differ in size
  template <int R = Rank>
    requires(R >= 0 && R == Rank)
  FeatureMap<Scalar, R> operator()(
      const std::type_identity_t<FeatureMapView<const Scalar, R>>& x) const {
    return detail::apply<Scalar, R>(tree_, x);
  }

 private:
  void require_channels() const;

  Tree tree_;
};

/// As it is written, the last layer applied first: "batch_norm[4] * [conv2d 3->4 @3x3] + scale[4]".
/// Concatenations are "concat_outputs(.., ..)", "concat_inputs(.., ..)" and "direct_sum(.., ..)".
template <class Scalar, int Rank>
std::string to_string(const Expr<Scalar, Rank>& expression) {
  return detail::algebra(expression.tree());
}
/// Writes to_string of it.
template <class Scalar, int Rank>
std::ostream& operator<<(std::ostream& out, const Expr<Scalar, Rank>& expression) {
  return out << to_string(expression);
}

/// `inner`, then `outer`: the product of their matrices. Named layers are viewed and must outlive
/// the expression; temporaries are kept in it.
/// Ensures  (outer * inner)(x) == outer(inner(x))
/// Throws   ShapeError naming both layers where channels differ
template <class Outer, class Inner>
  requires detail::Joinable<Outer, Inner>
auto operator*(Outer&& outer, Inner&& inner) {
  using Result = detail::JoinOf<Outer, Inner>;
  return Result(Join::chain, Result(std::forward<Inner>(inner)),
                Result(std::forward<Outer>(outer)));
}

template <class Outer, class Inner>
  requires detail::Joinable<Outer, Inner> && detail::NamedLayer<Outer> && detail::NamedLayer<Inner>
auto operator*(Outer&& outer CONCERTINA_LIFETIMEBOUND, Inner&& inner CONCERTINA_LIFETIMEBOUND) {
  using Result = detail::JoinOf<Outer, Inner>;
  return Result(Join::chain, Result(inner), Result(outer));
}

/// Parallel branches: the sum of their matrices. Layers live as those of a product do.
/// Ensures  (f + g)(x) == f(x) + g(x), before rounding
/// Throws   ShapeError where channels differ; where strides or output sizes do, when it is
///          contracted
template <class F, class G>
  requires detail::Joinable<F, G>
auto operator+(F&& f, G&& g) {
  using Result = detail::JoinOf<F, G>;
  return Result(Join::sum, Result(std::forward<F>(f)), Result(std::forward<G>(g)));
}

template <class F, class G>
  requires detail::Joinable<F, G> && detail::NamedLayer<F> && detail::NamedLayer<G>
auto operator+(F&& f CONCERTINA_LIFETIMEBOUND, G&& g CONCERTINA_LIFETIMEBOUND) {
  using Result = detail::JoinOf<F, G>;
  return Result(Join::sum, Result(f), Result(g));
}

/// The map s * F; a layer at once, an expression when it is contracted. Integer layers are not
/// scaled by fractions.
template <class S, detail::Factor F>
  requires(!detail::Factor<S>) && std::convertible_to<S, detail::FactorScalar<F>> &&
          (!std::integral<detail::FactorScalar<F>> || std::integral<S>)
auto operator*(const S& factor, F&& f) {
  return std::forward<F>(f).scaled(detail::FactorScalar<F>(factor));
}
/// The map -F, and F + -G.
template <detail::Factor F>
auto operator-(F&& f) {
  return std::forward<F>(f).scaled(-detail::FactorScalar<F>(1));
}
template <class F, class G>
  requires detail::Joinable<F, G>
auto operator-(F&& f, G&& g) {
  return std::forward<F>(f) + -std::forward<G>(g);
}

/// The same map without gradients: Contraction::backward does no work for its layers, such as
/// filters that are given and what is not trained.
template <detail::Factor F>
auto fixed(F&& f) {
  using Result = Expr<detail::FactorScalar<F>, detail::factor_rank<F>>;
  return Result(Result(std::forward<F>(f)).tree().map([](auto leaf) {
    leaf.fixed = true;
    return leaf;
  }));
}

/// Equality as maps of expressions, which are contracted first; see operator== of layers.
template <class F, class G>
  requires detail::Joinable<F, G> && (!Layer<F> || !Layer<G>) && (detail::JoinOf<F, G>::Rank >= 0)
bool operator==(const F& f, const G& g) {
  using Common = detail::JoinOf<F, G>;
  using Result = typename Common::Owner;
  return Result(Common(f)) == Result(Common(g));
}

namespace detail {

/// A list of maps, and whether its layers would die with it.
template <class R>
concept FactorRange = std::ranges::forward_range<R> && Factor<std::ranges::range_value_t<R>>;
template <class R>
concept TemporaryLayers =
    FactorRange<R> && !std::ranges::borrowed_range<R> &&
    std::same_as<std::ranges::range_value_t<R>, Conv<FactorScalar<std::ranges::range_value_t<R>>,
                                                     factor_rank<std::ranges::range_value_t<R>>>>;

template <FactorRange R>
auto join(Join join, const R& parts) {
  using Result =
      Expr<FactorScalar<std::ranges::range_value_t<R>>, factor_rank<std::ranges::range_value_t<R>>>;
  return Result(join, std::vector<Result>(std::ranges::begin(parts), std::ranges::end(parts)));
}

}  // namespace detail

/// The elements of a list one after another, the first applied first: the run-time form of `*`.
/// Elements are layers, which must outlive the result, or expressions.
/// Ensures  chain({f, g})(x) == g(f(x))
/// Throws   ShapeError naming both layers where channels differ, and for an empty list
template <detail::FactorRange R>
auto chain(const R& layers) {
  return detail::join(Join::chain, layers);
}
template <detail::TemporaryLayers R>
void chain(const R&&) = delete;

/// All elements on the same input, outputs added: the run-time form of `+`.
/// Ensures  sum({f, g})(x) == f(x) + g(x), before rounding
/// Throws   ShapeError naming both branches where channels differ; where strides or output sizes
///          do, when it is contracted
/// Source   RepVGG (CVPR 2021), ACNet (ICCV 2019), DBB (CVPR 2021)
template <detail::FactorRange R>
auto sum(const R& branches) {
  return detail::join(Join::sum, branches);
}
template <detail::TemporaryLayers R>
void sum(const R&&) = delete;

/// All elements on the same input, outputs side by side along the channels: torch.cat of outputs,
/// so of weights along the first axis. Contracted to one group.
/// Throws  ShapeError naming both branches where input channels differ
/// Source  DBB (CVPR 2021), transform IV
template <detail::FactorRange R>
auto concat_outputs(const R& branches) {
  return detail::join(Join::concat_outputs, branches);
}
template <detail::TemporaryLayers R>
void concat_outputs(const R&&) = delete;

/// Each element on channels of its own, in order, outputs added: what a layer after a torch.cat is,
/// cut along its input channels; its inverse, so of weights along the second axis. Contracted to
/// one group.
/// Throws  ShapeError naming both branches where output channels differ
template <detail::FactorRange R>
auto concat_inputs(const R& branches) {
  return detail::join(Join::concat_inputs, branches);
}
template <detail::TemporaryLayers R>
void concat_inputs(const R&&) = delete;

/// Each element on channels of its own, in order, outputs side by side: torch.split, the elements,
/// torch.cat; a block-diagonal matrix. Contracted to the most groups that no element's group is
/// wider than: equal layers side by side are one grouped layer, with their elements and no more.
/// Ensures  direct_sum({f, g}) of x and y side by side == f(x) and g(y) side by side
/// Throws   ShapeError where strides or output sizes differ, when it is contracted
/// Source   InceptionNeXt (CVPR 2024), MixConv (BMVC 2019)
template <detail::FactorRange R>
auto direct_sum(const R& parts) {
  return detail::join(Join::direct_sum, parts);
}
template <detail::TemporaryLayers R>
void direct_sum(const R&&) = delete;

}  // namespace concertina

#include <concertina/detail/expression.ipp>
