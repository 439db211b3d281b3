// Layers joined by `*`, `+` and `-`, or in lists, not yet evaluated: what stands where, what is
// viewed and what is kept; and the form of that, without weights.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/channel_map.hpp>
#include <concertina/conv.hpp>
#include <concertina/detail/form.hpp>
#include <concertina/detail/leaf.hpp>
#include <concertina/detail/tree.hpp>
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

template <class Scalar, int Rank>
class Expr;

namespace detail {

/// Scalar and rank of what is linear: a layer, an expression, or a list of these, which is a chain.
template <class F>
struct LinearTraits;
template <Layer F>
struct LinearTraits<F> {
  using Scalar = typename F::Scalar;
  static constexpr int Rank = F::Rank;
};
template <class S, int R>
struct LinearTraits<Expr<S, R>> {
  using Scalar = S;
  static constexpr int Rank = R;
};
template <std::ranges::forward_range F>
  requires(!std::ranges::range<std::ranges::range_value_t<F>>) &&
          requires { typename LinearTraits<std::ranges::range_value_t<F>>::Scalar; }
struct LinearTraits<F> : LinearTraits<std::ranges::range_value_t<F>> {};

/// What operators join: one map, not a list.
template <class F>
concept Factor =
    requires { typename LinearTraits<std::remove_cvref_t<F>>::Scalar; } && !std::ranges::range<F>;

template <Factor F>
using FactorScalar = typename LinearTraits<std::remove_cvref_t<F>>::Scalar;
template <Factor F>
inline constexpr int factor_rank = LinearTraits<std::remove_cvref_t<F>>::Rank;

/// Mixed scalars or ranks do not compile: `layer.cast<double>()` converts.
template <class F, class G>
concept Joinable =
    Factor<F> && Factor<G> && std::same_as<FactorScalar<F>, FactorScalar<G>> &&
    (factor_rank<F> == factor_rank<G> || factor_rank<F> == any_rank || factor_rank<G> == any_rank);

/// Layers that an expression would view.
template <class F>
concept NamedLayer = std::is_lvalue_reference_v<F> && Layer<std::remove_cvref_t<F>> &&
                     std::same_as<std::remove_cvref_t<F>, Conv<FactorScalar<F>, factor_rank<F>>>;

template <class F, class G>
using JoinOf = Expr<FactorScalar<F>, std::max(factor_rank<F>, factor_rank<G>)>;

}  // namespace detail

/// Anything that can be contracted: a layer, layers joined by operators, or a list of these one
/// after another, the first applied first.
template <class E>
concept LinearMap = requires { typename detail::LinearTraits<std::remove_cvref_t<E>>::Scalar; } &&
                    detail::LinearTraits<std::remove_cvref_t<E>>::Rank >= 0;

/// The scalar and the rank of what can be contracted.
template <LinearMap E>
using ScalarOf = typename detail::LinearTraits<std::remove_cvref_t<E>>::Scalar;
template <LinearMap E>
inline constexpr int rank_of = detail::LinearTraits<std::remove_cvref_t<E>>::Rank;

// ---- the form ----------------------------------------------------------------------------------

template <int Rank>
class Form;

namespace detail {

template <class E>
struct FormTraits;
template <LinearMap E>
struct FormTraits<E> {
  static constexpr int Rank = rank_of<E>;
};
template <int R>
struct FormTraits<ConvShape<R>> {
  static constexpr int Rank = R;
};
template <int R>
struct FormTraits<Form<R>> {
  static constexpr int Rank = R;
};
template <std::ranges::forward_range E>
  requires(!LinearMap<E>) && requires { FormTraits<std::ranges::range_value_t<E>>::Rank; }
struct FormTraits<E> : FormTraits<std::ranges::range_value_t<E>> {};

template <class E>
  requires requires { FormTraits<std::remove_cvref_t<E>>::Rank; }
inline constexpr int form_rank = FormTraits<std::remove_cvref_t<E>>::Rank;

/// The form of whatever has shapes, as a tree.
template <class E>
AnyForm any_form(const E& source);

template <int Rank>
std::optional<Axes> any_size(const std::optional<PerAxis<Rank>>& size) {
  return size ? std::optional(all_axes(*size, 1)) : std::nullopt;
}

}  // namespace detail

/// What has a form: anything contractible, a shape, or a list of shapes one after another.
template <class E>
concept FormSource = requires { detail::FormTraits<std::remove_cvref_t<E>>::Rank; };

/// An expression without its weights: everything that is decided by shapes is asked of it.
template <int Rank>
class Form {
 public:
  /// Throws ShapeError where channels do not fit, naming both layers, or there are none.
  template <FormSource E>
    requires(detail::form_rank<E> == Rank && !std::same_as<std::remove_cvref_t<E>, Form>)
  Form(const E& source) : tree_(detail::any_form(source)) {}

  explicit Form(detail::AnyForm tree) : tree_(std::move(tree)) {}

  /// The shape of the one layer that acts as the expression. Naming the input size admits sums
  /// whose branches have equal output sizes for it but not for every input.
  /// Throws  ShapeError naming two layers or branches that do not fit; SizeError where a kernel
  ///         overflows
  ConvShape<Rank> shape(const std::optional<PerAxis<Rank>>& input_size = {}) const {
    return detail::contracted_shape(tree_, detail::any_size(input_size)).template as<Rank>();
  }

  /// The spatial size of the output. Throws ShapeError where a map on the way is smaller than the
  /// next kernel, or branches differ.
  PerAxis<Rank> output_size(const PerAxis<Rank>& input_size) const {
    return detail::first_axes<Rank>(detail::output_size(tree_, detail::all_axes(input_size, 1)));
  }

  /// Multiply-adds of the contraction, in the order that it takes; additions of branches not
  /// counted. Throws as shape() does.
  Index multiply_adds(const std::optional<PerAxis<Rank>>& input_size = {}) const;

  /// Multiply-adds of Contraction::backward, to all leaves that are not fixed.
  Index backward_multiply_adds(const std::optional<PerAxis<Rank>>& input_size = {}) const;

  /// Multiply-adds of applying its layers, one after another, to one map of this size; additions
  /// of branches and biases not counted. Throws as output_size() does.
  Index applied_multiply_adds(const PerAxis<Rank>& input_size) const {
    static_cast<void>(output_size(input_size));  // throws where branches differ
    detail::Axes size = detail::all_axes(input_size, 1);
    return detail::applied_multiply_adds(tree_, size);
  }

  /// Whether a training step on `batch` maps takes fewer multiply-adds if it contracts the
  /// expression and applies the one layer, than if it applies its layers one after another:
  ///
  ///     multiply_adds() + batch * contraction's < batch * applied_multiply_adds()
  ///
  /// A step's backward pass costs twice the forward pass on either side, so that this decides for
  /// both together. Does not say that the two are equal, see exactness(). Throws as shape() does
  /// for this size; ShapeError for a batch below 1.
  bool cheaper_contracted(Index batch, const PerAxis<Rank>& input_size) const;

  /// The shapes of the layers, in the order in which they are applied, branch after branch.
  std::vector<ConvShape<Rank>> leaves() const {
    std::vector<ConvShape<Rank>> result;
    tree_.for_each_leaf(
        [&](const detail::AnyShape& leaf) { result.push_back(leaf.template as<Rank>()); });
    return result;
  }

  /// How its parts are joined; Join::none for one layer.
  Join join() const { return tree_.join(); }
  std::vector<Form> parts() const {
    std::vector<Form> result;
    for (const detail::AnyForm& part : tree_.parts()) result.emplace_back(part);
    return result;
  }

  const detail::AnyForm& tree() const& noexcept { return tree_; }
  detail::AnyForm tree() && noexcept { return std::move(tree_); }

  friend bool operator==(const Form&, const Form&) = default;

 private:
  detail::AnyForm tree_;
};

template <FormSource E>
Form(const E&) -> Form<detail::form_rank<E>>;

/// "(conv2d 3->8 @3x3, conv2d 8->4 @1x1)" for a chain, with " + " for sums, " | " and " & " for
/// concatenated outputs and inputs, " (+) " for direct sums.
template <int Rank>
std::string to_string(const Form<Rank>& form) {
  return detail::to_string(form.tree());
}
template <int Rank>
std::ostream& operator<<(std::ostream& out, const Form<Rank>& form) {
  return out << to_string(form);
}

// ---- the expression ----------------------------------------------------------------------------

namespace detail {

/// What to_string of an expression prints.
template <class Scalar, int Rank>
std::string algebra(const Tree<Leaf<Scalar, Rank>>& tree);

template <class Scalar, int Rank>
FeatureMap<Scalar, Rank> apply(const Tree<Leaf<Scalar, Rank>>& node,
                               const FeatureMapView<Scalar, Rank>& x);

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
  FeatureMap<Scalar, R> operator()(const std::type_identity_t<FeatureMapView<Scalar, R>>& x) const {
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
/// Writes to_string of it; a Form likewise.
template <class Scalar, int Rank>
std::ostream& operator<<(std::ostream& out, const Expr<Scalar, Rank>& expression) {
  return out << to_string(expression);
}

/// `inner`, then `outer`: the product of their matrices. Named layers are viewed and must outlive
/// the expression; temporaries are kept in it. Throws ShapeError naming both layers where channels
/// differ.
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

/// Parallel branches: the sum of their matrices. Throws ShapeError where channels differ; strides
/// and output sizes are compared when the sum is contracted.
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
