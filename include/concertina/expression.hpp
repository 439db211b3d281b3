// Layers joined by operators, not yet evaluated: what stands where, what is viewed and what is
// kept.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/channel_map.hpp>
#include <concertina/conv.hpp>
#include <concertina/form.hpp>

#include <algorithm>
#include <concepts>
#include <memory>
#include <optional>
#include <ranges>
#include <span>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

namespace concertina {

namespace detail {

/// A leaf of an expression: a layer, viewed or kept, or a channel map.
template <class Scalar, int Rank>
class Operator {
 public:
  Index in, out;  ///< channels

  Operator(const ConvView<Scalar, Rank>& view)
      : in(view.shape().in), out(view.shape().out), layer_(view) {}
  Operator(Conv<Scalar, Rank>&& layer)
      : Operator(std::make_shared<const Conv<Scalar, Rank>>(std::move(layer))) {}
  Operator(const ChannelMap<Scalar>& map)
      : in(map.in), out(map.out), layer_(std::make_shared<const ChannelMap<Scalar>>(map)) {}

  /// Null for a channel map, and the other way round.
  const ConvView<Scalar, Rank>* view() const { return std::get_if<0>(&layer_); }
  const ChannelMap<Scalar>* channel_map() const {
    const auto* map = std::get_if<1>(&layer_);
    return map ? map->get() : nullptr;
  }

  ConvShape<Rank> shape() const {
    return view() ? view()->shape() : channel_map()->template shape<Rank>();
  }

  /// The layer in A, rounded at most once where it is stored and as to_conv says where it is not.
  template <class A>
  Conv<A, Rank> to() const {
    return view() ? view()->template cast<A>() : to_conv<A, Rank>(*channel_map());
  }

 private:
  explicit Operator(std::shared_ptr<const Conv<Scalar, Rank>> owner)
      : Operator(ConvView<Scalar, Rank>(*owner)) {
    owner_ = std::move(owner);
  }

  std::shared_ptr<const Conv<Scalar, Rank>> owner_;  // null for a layer that is only viewed
  std::variant<ConvView<Scalar, Rank>, std::shared_ptr<const ChannelMap<Scalar>>> layer_;
};

/// What has no rank of its own is only ever a channel map.
template <class Scalar>
class Operator<Scalar, any_rank> {
 public:
  Index in, out;

  Operator(const ChannelMap<Scalar>& map)
      : in(map.in), out(map.out), map_(std::make_shared<const ChannelMap<Scalar>>(map)) {}

  const ChannelMap<Scalar>* channel_map() const { return map_.get(); }

 private:
  std::shared_ptr<const ChannelMap<Scalar>> map_;
};

/// What an expression holds and becomes; stand-ins that nothing converts to where it has no rank.
template <class Scalar, int Rank>
struct LayerTypes {
  using Owner = Conv<Scalar, Rank>;
  using View = ConvView<Scalar, Rank>;
};
template <class Scalar>
struct LayerTypes<Scalar, any_rank> {
  struct Owner {};
  struct View {};
};

}  // namespace detail

/// Layers joined by `*`, `+` and `-`, evaluated when they become a Conv. It is a tree whose
/// products and sums are flat lists, so `(a * b) * c` and `a * (b * c)` are the same, and the
/// cheapest order is found whatever the parentheses. With Rank any_rank it holds only what has no
/// rank of its own (batch norms, scales, identities, permutations) and takes that of its neighbour.
/// Lifetime  named layers are viewed, and must outlive it; temporaries are kept in it
template <class Scalar_, int Rank_>
class Expr : public detail::Operand {
 public:
  using Scalar = Scalar_;
  static constexpr int Rank = Rank_;
  using Tree = concertina::Tree<detail::Operator<Scalar, Rank>>;
  using Owner = typename detail::LayerTypes<Scalar, Rank>::Owner;
  using View = typename detail::LayerTypes<Scalar, Rank>::View;

  Expr(const Owner& layer)
    requires(Rank >= 0)
      : tree_(detail::Operator<Scalar, Rank>(View(layer))) {}
  Expr(const View& view)
    requires(Rank >= 0)
      : tree_(detail::Operator<Scalar, Rank>(view)) {}
  Expr(Owner&& layer)
    requires(Rank >= 0)
      : tree_(detail::Operator<Scalar, Rank>(std::move(layer))) {}
  Expr(const Owner&&) = delete;

  Expr(const ChannelMap<Scalar>& map) : tree_(detail::Operator<Scalar, Rank>(map)) {}

  /// What has no rank takes this one.
  template <int R>
    requires(R == any_rank && Rank >= 0)
  Expr(const Expr<Scalar, R>& expression)
      : tree_(expression.tree().map([](const auto& leaf) {
          return detail::Operator<Scalar, Rank>(*leaf.channel_map());
        })) {}

  explicit Expr(Tree tree) : tree_(std::move(tree)) {}

  /// Parts joined; see `chain`, `sum`, `concat_outputs` and `concat_inputs`.
  /// Throws ShapeError naming two parts whose channels differ.
  Expr(Join join, std::vector<Expr> parts);

  static Expr product(Expr inner, Expr outer) {
    return {Join::chain, {std::move(inner), std::move(outer)}};
  }
  static Expr sum(Expr f, Expr g) { return {Join::sum, {std::move(f), std::move(g)}}; }

  /// The map factor * expression.
  Expr scaled(const Scalar& factor) const {
    const detail::Channels channels = detail::channels(tree_);
    const std::vector<Scalar> factors(static_cast<std::size_t>(channels.out), factor);
    return product(*this,
                   ChannelMap<Scalar>{.in = channels.out, .out = channels.out, .weight = factors});
  }

  /// This, then `outer`. Throws ShapeError where channels differ.
  void then(Expr outer) { *this = Expr(Join::chain, {*this, std::move(outer)}); }

  const Tree& tree() const& noexcept { return tree_; }
  const Tree& tree() && = delete;

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

  /// The contraction; see `contract`.
  operator Owner() const
    requires(Rank >= 0);

  /// One layer after another, each by its definition: what the contraction must equal.
  /// Throws  ShapeError where channels or a map's size do not fit, or branches differ in size
  template <int R = Rank>
    requires(R >= 0 && R == Rank)
  FeatureMap<Scalar, R> operator()(const std::type_identity_t<FeatureMapView<Scalar, R>>& x) const {
    return apply<R>(tree_, x);
  }

 private:
  template <int R>
  static FeatureMap<Scalar, R> apply(const Tree& node, const FeatureMapView<Scalar, R>& x);

  Tree tree_;
};

/// A list of layers known at run time, the first applied first: a vector or span of Conv or
/// ConvView.
template <class R>
concept LayerRange = std::ranges::forward_range<R> && Layer<std::ranges::range_value_t<R>>;

namespace detail {

template <class E>
struct ExpressionOf;
template <class Scalar_, int Rank_>
  requires(Rank_ >= 0)
struct ExpressionOf<Expr<Scalar_, Rank_>> {
  using Scalar = Scalar_;
  static constexpr int Rank = Rank_;
};
template <LayerRange R>
struct ExpressionOf<R> {
  using Scalar = typename std::ranges::range_value_t<R>::Scalar;
  static constexpr int Rank = std::ranges::range_value_t<R>::Rank;
};

}  // namespace detail

/// Anything that can be contracted: layers joined by operators, or a list of layers one after
/// another.
template <class E>
concept Expression = requires { typename detail::ExpressionOf<std::remove_cvref_t<E>>::Scalar; };

template <Expression E>
using ScalarOf = typename detail::ExpressionOf<std::remove_cvref_t<E>>::Scalar;
template <Expression E>
inline constexpr int rank_of = detail::ExpressionOf<std::remove_cvref_t<E>>::Rank;

namespace detail {

template <class Scalar, int Rank>
Form<Rank> form_of(const Tree<Operator<Scalar, Rank>>& tree) {
  return tree.map([](const Operator<Scalar, Rank>& leaf) { return leaf.shape(); });
}

/// The expression's tree. It owns no layer that the expression only views.
template <Expression E>
Tree<Operator<ScalarOf<E>, rank_of<E>>> tree_of(const E& expression, const char* what) {
  if constexpr (LayerRange<E>) {
    using Leaf = Operator<ScalarOf<E>, rank_of<E>>;
    std::vector<Tree<Leaf>> parts;
    std::vector<ConvShape<rank_of<E>>> shapes;
    for (const auto& layer : expression) {
      parts.push_back(Leaf(ConvView<ScalarOf<E>, rank_of<E>>(layer)));
      shapes.push_back(layer.shape());
    }
    require_chain<rank_of<E>>(shapes, what);
    return {Join::chain, std::move(parts)};
  } else {
    return expression.tree();
  }
}

}  // namespace detail

/// The form of an expression: its tree with shapes at the leaves.
template <Expression E>
Form<rank_of<E>> form(const E& expression) {
  return detail::form_of(detail::tree_of(expression, "form"));
}

/// The shapes of an expression's layers, in the order in which they are applied, branch after
/// branch.
template <Expression E>
std::vector<ConvShape<rank_of<E>>> shapes(const E& expression) {
  std::vector<ConvShape<rank_of<E>>> result;
  form(expression).for_each_leaf([&](const auto& shape) { result.push_back(shape); });
  return result;
}

template <class Scalar, int Rank>
Expr<Scalar, Rank>::Expr(Join join, std::vector<Expr> parts)
    : tree_([&] {
        std::vector<Tree> trees;
        for (Expr& part : parts) trees.push_back(std::move(part.tree_));
        return Tree(join, std::move(trees));
      }()) {
  detail::require_channels(tree_.join(), tree_.parts(), [](const Tree& part) {
    if constexpr (Rank >= 0) return to_string(detail::form_of(part));
    const detail::Channels channels = detail::channels(part);
    return std::to_string(channels.in) + "->" + std::to_string(channels.out);
  });
}

template <class Scalar, int Rank>
template <int R>
FeatureMap<Scalar, R> Expr<Scalar, Rank>::apply(const Tree& node,
                                                const FeatureMapView<Scalar, R>& x) {
  if (node.is_leaf()) {
    const auto& leaf = node.leaf();
    return leaf.view() ? (*leaf.view())(x) : leaf.template to<Scalar>()(x);
  }
  const std::vector<Tree>& parts = node.parts();
  if (node.join() == Join::chain) {
    FeatureMap<Scalar, R> y = apply<R>(parts.front(), x);
    for (auto part = parts.begin() + 1; part != parts.end(); ++part) y = apply<R>(*part, y);
    return y;
  }
  const MapShape<R>& given = x.shape();
  const Index width = numel(given.size);
  const detail::Channels whole = detail::channels(node);
  if (given.channels != whole.in) {
    throw ShapeError("a map of " + std::to_string(given.channels) +
                     " channels, where the expression reads " + std::to_string(whole.in));
  }
  const auto part_of_input = [&](Index first, Index count) {
    FeatureMap<Scalar, R> map({.batch = given.batch, .channels = count, .size = given.size});
    for (Index n = 0; n < given.batch; ++n) {
      std::copy_n(x.values().begin() + (n * given.channels + first) * width, count * width,
                  map.values().begin() + n * count * width);
    }
    return map;
  };
  std::optional<FeatureMap<Scalar, R>> y;
  Index in = 0, out = 0;  // channels of the parts before
  for (const Tree& part : parts) {
    const detail::Channels channels = detail::channels(part);
    const FeatureMap<Scalar, R> z = node.join() == Join::concat_inputs
                                        ? apply<R>(part, part_of_input(in, channels.in))
                                        : apply<R>(part, x);
    const PerAxis<R>& size = z.shape().size;
    if (!y) y.emplace(MapShape<R>{.batch = given.batch, .channels = whole.out, .size = size});
    if (size != y->shape().size) {
      throw ShapeError("branches of sizes " + to_string(y->shape().size) + " and " +
                       to_string(size) + " on an input of size " + to_string(given.size));
    }
    const Index numbers = channels.out * numel(size);
    for (Index n = 0; n < given.batch; ++n) {
      const Scalar* from = z.values().data() + n * numbers;
      Scalar* to = y->values().data() + (n * whole.out + out) * numel(size);
      for (Index i = 0; i < numbers; ++i) to[i] = to[i] + from[i];
    }
    in += channels.in;
    if (node.join() == Join::concat_outputs) out += channels.out;
  }
  return *std::move(y);
}

}  // namespace concertina
