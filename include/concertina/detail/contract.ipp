// How an expression is contracted, and how a contraction is differentiated.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/contract.hpp>

#include <algorithm>
#include <ranges>
#include <string>
#include <utility>

namespace concertina {

namespace detail {

template <class Layer>
auto data_of(Layer&& layer) -> LayerData<std::remove_reference_t<decltype(layer.weight()[0])>> {
  return {layer.weight().data(), layer.bias().empty() ? nullptr : layer.bias().data()};
}

/// The tree as one layer, computed in A. Requires what contracted_shape checks.
template <class A, class Scalar, int Rank>
Conv<A, Rank> evaluate(const Tree<Leaf<Scalar, Rank>>& tree, const ParallelFor& run = serial_for,
                       bool parallel = false) {
  Program program(form_of(tree));
  Conv<A, Rank> result(program.shape(program.result()).template as<Rank>());
  std::vector<const Leaf<Scalar, Rank>*> leaves;
  tree.for_each_leaf([&](const Leaf<Scalar, Rank>& leaf) { leaves.push_back(&leaf); });
  std::vector<std::optional<Conv<A, Rank>>> made(leaves.size());  // in A where they are not
  const auto load = [&](Value leaf) -> LayerData<const A> {
    if constexpr (std::is_same_v<A, Scalar>) {
      if (leaves[leaf]->view()) return data_of(*leaves[leaf]->view());
    }
    if (!made[leaf]) made[leaf] = leaves[leaf]->template to<A>();
    return data_of(std::as_const(*made[leaf]));
  };
  using Once = Evaluator<A>;
  Once(std::move(program), Once::Keep::nothing, parallel)
      .forward(load, [&](Value leaf) { made[leaf].reset(); }, data_of(result), run);
  return result;
}

template <class Scalar, int Rank>
bool has_form(const Tree<Leaf<Scalar, Rank>>& tree, const AnyForm& form) {
  if (tree.join() != form.join()) return false;
  if (tree.is_leaf()) {
    return tree.leaf().shape() == form.leaf().template as<Rank>() &&
           tree.leaf().fixed == form.leaf().fixed;
  }
  return std::ranges::equal(tree.parts(), form.parts(), [](const auto& part, const auto& planned) {
    return has_form(part, planned);
  });
}

}  // namespace detail

namespace detail {

/// Contracts a tree whatever it was made of.
template <class A, class Scalar, int Rank>
Conv<Scalar, Rank> contract_tree(const Tree<Leaf<Scalar, Rank>>& tree, const Border<Rank>& border,
                                 const ParallelFor& run) {
  const Form<Rank> form(form_of(tree));
  static_cast<void>(form.shape(border.input_size));  // throws where it overflows
  border.require(form);
  Conv<A, Rank> result = evaluate<A>(tree, run, !run.is_serial());
  if constexpr (std::is_same_v<A, Scalar>) {
    return result;
  } else {
    return result.template cast<Scalar>();
  }
}

}  // namespace detail

template <class A, LinearMap E>
Conv<ScalarOf<E>, rank_of<E>> contract(const E& expression,
                                       const std::type_identity_t<Border<rank_of<E>>>& border,
                                       const ParallelFor& run) {
  return detail::contract_tree<detail::AccumulatorOf<A, ScalarOf<E>>>(detail::tree_of(expression),
                                                                      border, run);
}

template <class Scalar_, int Rank_>
Contraction<Scalar_, Rank_>::Contraction(const Form<Rank>& form, const Border<Rank>& border)
    : form_(form),
      shape_(form.shape(border.input_size)),
      leaf_shapes_(form.leaves()),
      evaluator_((border.require(form), detail::Program(form.tree())),
                 detail::Evaluator<Scalar>::Keep::everything),
      leaves_(leaf_shapes_.size()),
      maps_(leaf_shapes_.size()) {
  for (std::size_t leaf = 0; leaf < maps_.size(); ++leaf) {
    if (detail::is_diagonal(leaf_shapes_[leaf])) maps_[leaf].emplace(leaf_shapes_[leaf]);
  }
}

template <class Scalar_, int Rank_>
template <class E>
bool Contraction<Scalar_, Rank_>::has_form_of(const E& expression) const {
  if constexpr (Layer<E>) {
    return form_.join() == Join::none && expression.shape() == leaf_shapes_.front();
  } else if constexpr (requires { expression.tree(); }) {
    return detail::has_form(expression.tree(), form_.tree());
  } else if constexpr (Layer<std::ranges::range_value_t<E>>) {
    if (form_.join() != Join::none &&
        (form_.join() != Join::chain || form_.tree().parts().size() != leaf_shapes_.size())) {
      return false;
    }
    return std::ranges::equal(expression, leaf_shapes_, {},
                              [](const auto& layer) { return layer.shape(); });
  } else {
    return detail::has_form(detail::tree_of(expression), form_.tree());
  }
}

template <class Scalar_, int Rank_>
void Contraction<Scalar_, Rank_>::bind_map(std::size_t leaf, const ChannelMap<Scalar>& map,
                                           bool write) {
  std::optional<Conv<Scalar, Rank>>& layer = maps_[leaf];
  if (!layer) layer.emplace(leaf_shapes_[leaf]);
  if (write) {
    if (!map.source.empty()) std::ranges::fill(layer->weight(), Scalar(0));
    detail::write_layer(map, *layer);
  }
  leaves_[leaf] = detail::data_of(std::as_const(*layer));
}

template <class Scalar_, int Rank_>
template <class E>
void Contraction<Scalar_, Rank_>::bind(const E& expression, bool write_maps) {
  static_assert(std::is_same_v<ScalarOf<E>, Scalar> && rank_of<E> == Rank,
                "the expression is of another scalar or rank than the contraction");
  if constexpr (std::ranges::range<E> && !Layer<E>) {
    using Part = std::ranges::range_reference_t<const E&>;
    static_assert(
        std::is_lvalue_reference_v<Part> || std::is_same_v<Part, ConvView<const Scalar, Rank>> ||
            std::is_same_v<Part, ConvView<Scalar, Rank>>,
        "the list makes its layers as it is read: they are gone before they are contracted");
  }
  if (!has_form_of(expression)) {
    detail::fail<ShapeError>(
        {"a contraction of ", form_, ", given an expression of ", Form<Rank>(expression)});
  }
  std::size_t leaf = 0;
  const auto bind_leaves = [&](const auto& tree) {
    tree.for_each_leaf([&](const detail::Leaf<Scalar, Rank>& at) {
      if (at.view()) {
        leaves_[leaf] = detail::data_of(*at.view());
      } else {
        bind_map(leaf, *at.channel_map(), write_maps);
      }
      ++leaf;
    });
  };
  if constexpr (Layer<E>) {
    leaves_[leaf] = detail::data_of(ConvView<const Scalar, Rank>(expression));
  } else if constexpr (requires { expression.tree(); }) {
    bind_leaves(expression.tree());
  } else {
    for (const auto& part : expression) {
      if constexpr (Layer<std::remove_cvref_t<decltype(part)>>) {
        leaves_[leaf++] = detail::data_of(ConvView<const Scalar, Rank>(part));
      } else {
        bind_leaves(part.tree());
      }
    }
  }
}

template <class Scalar_, int Rank_>
template <LinearMap E>
void Contraction<Scalar_, Rank_>::forward(const E& expression, const ConvView<Scalar, Rank>& result,
                                          const ParallelFor& run) {
  computed_ = false;  // also where `run` throws midway
  if (result.shape() != shape_) {
    detail::fail<ShapeError>(
        {"forward: a result of shape ", result.shape(), ", where the contraction is ", shape_});
  }
  bind(expression, true);
  evaluator_.forward([&](detail::Value leaf) { return leaves_[leaf]; }, [](detail::Value) {},
                     detail::data_of(result), run);
  computed_ = true;
}

template <class Scalar_, int Rank_>
template <LinearMap E>
auto Contraction<Scalar_, Rank_>::forward(const E& expression, const ParallelFor& run)
    -> const Conv<Scalar, Rank>& {
  if (!result_) result_.emplace(shape_);
  forward(expression, ConvView<Scalar, Rank>(*result_), run);
  return *result_;
}

template <class Scalar_, int Rank_>
template <LinearMap E>
void Contraction<Scalar_, Rank_>::backward(
    const E& expression, const std::type_identity_t<ConvView<const Scalar, Rank>>& gradient,
    std::span<const ConvView<Scalar, Rank>> leaf_gradients, const ParallelFor& run) {
  if (!computed_) throw Error("backward: forward has not been called");
  if (gradient.shape() != shape_) {
    detail::fail<ShapeError>({"backward: a gradient of shape ", gradient.shape(),
                              ", where the contraction is ", shape_});
  }
  if (leaf_gradients.size() != leaf_shapes_.size()) {
    detail::fail<ShapeError>(
        {"backward: ", leaf_gradients.size(), " gradients for ", leaf_shapes_.size(), " layers"});
  }
  for (std::size_t leaf = 0; leaf < leaf_shapes_.size(); ++leaf) {
    if (evaluator_.program().leaves()[leaf].fixed) continue;
    if (leaf_gradients[leaf].shape() == leaf_shapes_[leaf]) continue;
    detail::fail<ShapeError>({"backward: gradient ", leaf + 1, " of shape ",
                              leaf_gradients[leaf].shape(), ", where the layer is ",
                              leaf_shapes_[leaf]});
  }
  bind(expression, false);
  evaluator_.backward([&](detail::Value leaf) { return leaves_[leaf]; }, detail::data_of(gradient),
                      [&](detail::Value leaf) { return detail::data_of(leaf_gradients[leaf]); },
                      run);
}

template <class Scalar_, int Rank_>
template <LinearMap E>
auto Contraction<Scalar_, Rank_>::backward(
    const E& expression, const std::type_identity_t<ConvView<const Scalar, Rank>>& gradient,
    const ParallelFor& run) -> std::span<const Conv<Scalar, Rank>> {
  if (gradients_.empty()) {
    for (const ConvShape<Rank>& shape : leaf_shapes_) gradients_.emplace_back(shape);
  }
  gradient_views_.clear();  // of a copy they would be the original's
  for (Conv<Scalar, Rank>& each : gradients_) gradient_views_.emplace_back(each);
  backward(expression, gradient, gradient_views_, run);
  return gradients_;
}

}  // namespace concertina

#include <concertina/detail/compiled/contract.hpp>
