// How expressions are made, taken as trees, and applied by their definition.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/expression.hpp>

#include <algorithm>
#include <array>

namespace concertina {

namespace detail {

template <class Scalar, int Rank>
AnyForm form_of(const Tree<Leaf<Scalar, Rank>>& tree) {
  return tree.map([](const Leaf<Scalar, Rank>& leaf) { return leaf.form(); });
}

/// The tree of anything contractible. It owns no layer that is only viewed.
template <LinearMap E>
Tree<Leaf<ScalarOf<E>, rank_of<E>>> tree_of(const E& source) {
  using Result = Tree<Leaf<ScalarOf<E>, rank_of<E>>>;
  if constexpr (Layer<E>) {
    return Result(ConvView<const ScalarOf<E>, rank_of<E>>(source));
  } else if constexpr (std::ranges::range<E>) {
    return chain(source).tree();
  } else {
    return source.tree();
  }
}

template <class E>
AnyForm any_form(const E& source) {
  if constexpr (LinearMap<E>) {
    return form_of(tree_of(source));
  } else if constexpr (std::ranges::range<E>) {
    std::vector<AnyForm> parts;
    for (const auto& part : source) parts.push_back(any_form(part));
    if (parts.empty()) throw ShapeError("an expression of no layers");
    require_channels(Join::chain, parts);
    return {Join::chain, parts};
  } else if constexpr (requires { source.tree(); }) {
    return source.tree();
  } else {
    return AnyForm(AnyShape(source));
  }
}

}  // namespace detail

template <class Scalar, int Rank>
Expr<Scalar, Rank>::Expr(Join join, const std::vector<Expr>& parts)
    : tree_(join, [&] {
        std::vector<Tree> trees;
        for (const Expr& part : parts) trees.push_back(part.tree_);
        return trees;
      }()) {
  require_channels();
}

template <class Scalar, int Rank>
Expr<Scalar, Rank>::Expr(Join join, Expr first, Expr second)
    : tree_(join, std::array{std::move(first.tree_), std::move(second.tree_)}) {
  require_channels();
}

template <class Scalar, int Rank>
void Expr<Scalar, Rank>::require_channels() const {
  std::vector<detail::Channels> parts;
  for (const Tree& part : tree_.parts()) parts.push_back(detail::channels(part));
  detail::require_channels(tree_.join(), parts, [&](std::size_t p) {
    if constexpr (Rank >= 0) return detail::to_string(detail::form_of(tree_.parts()[p]));
    return detail::text({parts[p].in, "->", parts[p].out});
  });
}

namespace detail {

template <class Scalar, int Rank>
std::string algebra(const Tree<Leaf<Scalar, Rank>>& tree) {
  if (tree.is_leaf()) {
    if constexpr (Rank >= 0) {
      if (tree.leaf().view()) return "[" + to_string(tree.leaf().shape()) + "]";
    }
    return to_string(*tree.leaf().channel_map());
  }
  const Join join = tree.join();
  const char* const concatenated = join == Join::concat_outputs  ? "concat_outputs("
                                   : join == Join::concat_inputs ? "concat_inputs("
                                   : join == Join::direct_sum    ? "direct_sum("
                                                                 : nullptr;
  std::string result;
  for (const auto& part : tree.parts()) {
    std::string factor = algebra(part);
    if (join == Join::chain) {
      if (part.join() == Join::sum) factor = "(" + factor + ")";
      result = result.empty() ? factor : factor + " * " + result;
    } else {
      result += (result.empty() ? "" : concatenated ? ", " : " + ") + factor;
    }
  }
  return concatenated ? concatenated + result + ")" : result;
}

/// Channels first .. first + count - 1 of a map.
template <class Scalar, int Rank>
FeatureMap<Scalar, Rank> slice(const FeatureMapView<const Scalar, Rank>& x, Index first,
                               Index count) {
  const MapShape<Rank>& shape = x.shape();
  const Index width = numel(shape.size);
  FeatureMap<Scalar, Rank> result({.batch = shape.batch, .channels = count, .size = shape.size});
  for (Index n = 0; n < shape.batch; ++n) {
    std::copy_n(x.values().begin() + (n * shape.channels + first) * width, count * width,
                result.values().begin() + n * count * width);
  }
  return result;
}

/// One layer after another, branches beside each other, each by its definition.
template <class Scalar, int Rank>
FeatureMap<Scalar, Rank> apply(const Tree<Leaf<Scalar, Rank>>& node,
                               const FeatureMapView<const Scalar, Rank>& x) {
  if (node.is_leaf()) {
    const auto& leaf = node.leaf();
    return leaf.view() ? (*leaf.view())(x) : leaf.template to<Scalar>()(x);
  }
  const auto& parts = node.parts();
  if (node.join() == Join::chain) {
    FeatureMap<Scalar, Rank> y = apply<Scalar, Rank>(parts.front(), x);
    for (auto part = parts.begin() + 1; part != parts.end(); ++part) {
      y = apply<Scalar, Rank>(*part, y);
    }
    return y;
  }
  const MapShape<Rank>& given = x.shape();
  const Channels whole = channels(node);
  if (given.channels != whole.in) {
    fail<ShapeError>(
        {"a map of ", given.channels, " channels, where the expression reads ", whole.in});
  }
  std::optional<FeatureMap<Scalar, Rank>> y;
  Index in = 0, out = 0;  // channels of the parts before
  for (const auto& part : parts) {
    const Channels own = channels(part);
    const FeatureMap<Scalar, Rank> z = splits_inputs(node.join())
                                           ? apply<Scalar, Rank>(part, slice(x, in, own.in))
                                           : apply<Scalar, Rank>(part, x);
    const PerAxis<Rank>& size = z.shape().size;
    if (!y) y.emplace(MapShape<Rank>{.batch = given.batch, .channels = whole.out, .size = size});
    if (size != y->shape().size) {
      fail<ShapeError>({"branches of sizes ", y->shape().size, " and ", size,
                        " on an input of size ", given.size});
    }
    const Index elements = own.out * numel(size);
    for (Index n = 0; n < given.batch; ++n) {
      const Scalar* from = z.values().data() + n * elements;
      Scalar* to = y->values().data() + (n * whole.out + out) * numel(size);
      for (Index i = 0; i < elements; ++i) to[i] = to[i] + from[i];
    }
    in += own.in;
    if (splits_outputs(node.join())) out += own.out;
  }
  return *std::move(y);
}

}  // namespace detail
}  // namespace concertina
