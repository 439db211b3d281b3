// How a contraction is planned, computed and differentiated.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/pullback.hpp>

#include <algorithm>
#include <ranges>
#include <string>
#include <utility>

namespace concertina {

namespace detail {

template <class Scalar, int Rank>
bool has_form(const Tree<Operator<Scalar, Rank>>& tree, const Form<Rank>& form) {
  if (tree.join() != form.join()) return false;
  if (tree.is_leaf()) return tree.leaf().shape() == form.leaf();
  return std::ranges::equal(tree.parts(), form.parts(), [](const auto& part, const auto& planned) {
    return has_form(part, planned);
  });
}

}  // namespace detail

template <class Scalar_, int Rank_>
Contraction<Scalar_, Rank_>::Contraction(const Form<Rank>& form,
                                         const std::type_identity_t<BorderPolicy<Rank>>& policy)
    : form_(form), shape_(contracted_shape(form, policy.input_size())) {
  policy.require(form);
  form.for_each_leaf([&](const ConvShape<Rank>& shape) { gradients_.emplace_back(shape); });
  for (const Conv<Scalar, Rank>& gradient : gradients_) {
    leaves_.emplace_back(gradient);  // until an expression is given
    maps_.emplace_back();
    if (detail::is_diagonal(gradient.shape())) maps_.back().emplace(gradient.shape());
  }
  std::size_t leaf = 0;
  plan(form, leaf);
  if (steps_.empty()) copy_.emplace(shape_);
  for (std::size_t s = 0; s + 1 < steps_.size(); ++s) {
    step_gradients_.emplace_back(steps_[s].value.shape());
  }
}

template <class Scalar_, int Rank_>
auto Contraction<Scalar_, Rank_>::plan(const Form<Rank>& node, std::size_t& leaf) -> Operand {
  if (node.is_leaf()) return leaf++;
  std::vector<Operand> parts;
  std::vector<ConvShape<Rank>> shapes;
  for (const Form<Rank>& part : node.parts()) {
    parts.push_back(plan(part, leaf));
    shapes.push_back(shape_of(parts.back()));
  }
  if (node.join() == Join::chain) {
    const detail::ChainOrder<Rank> order(std::span<const ConvShape<Rank>>{shapes});
    return plan_run(order, parts, 0, parts.size() - 1);
  }
  const ConvShape<Rank> joined = detail::joined_shape<Rank>(node.join(), shapes);
  detail::require_few_zeros<Rank>(joined, shapes);
  steps_.push_back(
      {Parallel{detail::branch_places<Rank>(node.join(), joined, shapes), std::move(parts)},
       Conv<Scalar, Rank>(joined)});
  return gradients_.size() + steps_.size() - 1;
}

template <class Scalar_, int Rank_>
auto Contraction<Scalar_, Rank_>::plan_run(const detail::ChainOrder<Rank>& order,
                                           std::span<const Operand> parts, std::size_t first,
                                           std::size_t last) -> Operand {
  if (first == last) return parts[first];
  const std::size_t middle = order.split(first, last);
  const Operand inner = plan_run(order, parts, first, middle - 1),
                outer = plan_run(order, parts, middle, last);
  const detail::PairPlan<Rank> pair(shape_of(outer), shape_of(inner));
  steps_.push_back({Product{detail::PairProduct<Scalar, Rank>(pair, true),
                            detail::PairGradient<Scalar, Rank>(pair), outer, inner},
                    Conv<Scalar, Rank>(pair.product)});
  return gradients_.size() + steps_.size() - 1;
}

template <class Scalar_, int Rank_>
auto Contraction<Scalar_, Rank_>::shape_of(Operand operand) const -> const ConvShape<Rank>& {
  return operand < gradients_.size() ? gradients_[operand].shape()
                                     : steps_[operand - gradients_.size()].value.shape();
}

template <class Scalar_, int Rank_>
auto Contraction<Scalar_, Rank_>::value_of(Operand operand) const -> ConvView<Scalar, Rank> {
  if (operand < leaves_.size()) return leaves_[operand];
  return steps_[operand - leaves_.size()].value;
}

template <class Scalar_, int Rank_>
auto Contraction<Scalar_, Rank_>::gradient_of(Operand operand) -> Conv<Scalar, Rank>& {
  return operand < gradients_.size() ? gradients_[operand]
                                     : step_gradients_[operand - gradients_.size()];
}

template <class Scalar_, int Rank_>
template <class E>
bool Contraction<Scalar_, Rank_>::has_form_of(const E& expression) const {
  if constexpr (LayerRange<E>) {
    const bool one = form_.is_leaf();
    if (!one && form_.join() != Join::chain) return false;
    std::size_t number = 0;
    for (const auto& layer : expression) {
      if (number == gradients_.size()) return false;
      const bool is_leaf = one || form_.parts()[number].is_leaf();
      if (!is_leaf || layer.shape() != gradients_[number].shape()) return false;
      ++number;
    }
    return number == gradients_.size();
  } else {
    return detail::has_form(expression.tree(), form_);
  }
}

template <class Scalar_, int Rank_>
void Contraction<Scalar_, Rank_>::bind_map(std::size_t leaf, const ChannelMap<Scalar>& map,
                                           bool write) {
  std::optional<Conv<Scalar, Rank>>& layer = maps_[leaf];
  if (!layer) layer.emplace(gradients_[leaf].shape());
  if (write) {
    if (!map.source.empty()) std::ranges::fill(layer->weight(), Scalar(0));
    detail::write_layer(map, *layer);
  }
  leaves_[leaf] = *layer;
}

template <class Scalar_, int Rank_>
template <class E>
void Contraction<Scalar_, Rank_>::bind(const E& expression, bool write_maps) {
  static_assert(std::is_same_v<ScalarOf<E>, Scalar> && rank_of<E> == Rank,
                "the expression is of another scalar or rank than the contraction");
  if (!has_form_of(expression)) {
    throw ShapeError("a contraction of " + to_string(form_) + ", given an expression of " +
                     to_string(concertina::form(expression)));
  }
  std::size_t leaf = 0;
  if constexpr (LayerRange<E>) {
    for (const auto& layer : expression) leaves_[leaf++] = ConvView<Scalar, Rank>(layer);
  } else {
    expression.tree().for_each_leaf([&](const detail::Operator<Scalar, Rank>& at) {
      if (at.view()) {
        leaves_[leaf] = *at.view();
      } else {
        bind_map(leaf, *at.channel_map(), write_maps);
      }
      ++leaf;
    });
  }
}

template <class Scalar_, int Rank_>
template <Expression E, class Run>
auto Contraction<Scalar_, Rank_>::forward(const E& expression, Run&& run)
    -> const Conv<Scalar, Rank>& {
  computed_ = false;  // also where `run` throws midway
  bind(expression, true);
  if (steps_.empty()) {
    std::ranges::copy(leaves_.front().weight(), copy_->weight().begin());
    std::ranges::copy(leaves_.front().bias(), copy_->bias().begin());
    computed_ = true;
    return *copy_;
  }
  for (Step& step : steps_) {
    if (auto* product = std::get_if<Product>(&step.how)) {
      product->multiply(value_of(product->outer), value_of(product->inner), step.value, run);
      continue;
    }
    const auto& [places, branches] = std::get<Parallel>(step.how);
    std::ranges::fill(step.value.weight(), Scalar(0));
    std::ranges::fill(step.value.bias(), Scalar(0));
    for (std::size_t b = 0; b < branches.size(); ++b) {
      detail::add_branch(places[b], value_of(branches[b]), step.value);
    }
  }
  computed_ = true;
  return steps_.back().value;
}

template <class Scalar_, int Rank_>
template <Expression E, class Run>
auto Contraction<Scalar_, Rank_>::backward(const E& expression,
                                           const ConvView<Scalar, Rank>& gradient, Run&& run)
    -> std::span<const Conv<Scalar, Rank>> {
  if (!computed_) throw Error("backward: forward has not been called");
  if (gradient.shape() != shape_) {
    throw ShapeError("backward: a gradient of shape " + to_string(gradient.shape()) +
                     ", where the contraction is " + to_string(shape_));
  }
  bind(expression, false);
  if (steps_.empty()) {
    std::ranges::copy(gradient.weight(), gradients_.front().weight().begin());
    std::ranges::copy(gradient.bias(), gradients_.front().bias().begin());
    return gradients_;
  }
  for (std::size_t s = steps_.size(); s-- > 0;) {
    const ConvView<Scalar, Rank> given =
        s + 1 == steps_.size() ? gradient : ConvView<Scalar, Rank>(step_gradients_[s]);
    if (auto* product = std::get_if<Product>(&steps_[s].how)) {
      const ConvView<Scalar, Rank> outer = value_of(product->outer),
                                   inner = value_of(product->inner);
      Conv<Scalar, Rank>&outer_gradient = gradient_of(product->outer),
                   &inner_gradient = gradient_of(product->inner);
      product->gradient(product->multiply.plan(), outer, inner, given, outer_gradient,
                        inner_gradient, run);
      continue;
    }
    const auto& [places, branches] = std::get<Parallel>(steps_[s].how);
    const auto take = [](Scalar& number, const Scalar& total) { number = total; };
    for (std::size_t b = 0; b < branches.size(); ++b) {
      Conv<Scalar, Rank>& branch = gradient_of(branches[b]);
      places[b].for_each_weight(branch.weight().data(), given.weight().data(), take);
      places[b].for_each_bias(branch.bias(), given.bias(), take);
    }
  }
  return gradients_;
}

template <class Scalar, int Rank>
ChannelMap<Scalar> channel_map_gradient(const ChannelMap<Scalar>& map,
                                        const Conv<Scalar, Rank>& gradient) {
  if (gradient.shape() != map.template shape<Rank>()) {
    throw ShapeError("channel_map_gradient: a gradient of shape " + to_string(gradient.shape()) +
                     ", where the map's layer is " + to_string(map.template shape<Rank>()));
  }
  using Wide = detail::WideFor<Scalar>;
  ChannelMap<Scalar> result{.in = map.in,
                            .out = map.out,
                            .source = map.source,
                            .mean = std::vector<Scalar>(map.mean.size(), Scalar(0)),
                            .variance = std::vector<Scalar>(map.variance.size(), Scalar(0)),
                            .weight = std::vector<Scalar>(map.weight.size(), Scalar(0)),
                            .bias = std::vector<Scalar>(map.bias.size(), Scalar(0)),
                            .eps = map.eps,
                            .divisor = map.divisor};
  // factor = weight / sqrt(variance + eps) / divisor, shift = bias - mean * factor
  for (std::size_t o = 0; o < static_cast<std::size_t>(map.out); ++o) {
    Wide of_factor = detail::convert<Wide>(gradient.weight()[detail::factor_position(map, o)]);
    Wide scale(1);  // factor / weight
    if constexpr (requires { scale / scale; }) {
      if (!map.variance.empty()) scale = scale / detail::deviation<Wide>(map, o);
      if (map.divisor != 1) scale = scale / static_cast<Wide>(map.divisor);
    }
    const Wide weight = map.weight.empty() ? Wide(1) : detail::convert<Wide>(map.weight[o]);
    if (!map.bias.empty()) result.bias[o] = gradient.bias()[o];
    if constexpr (requires { -scale; }) {
      if (!map.mean.empty()) {
        const Wide of_shift = detail::convert<Wide>(gradient.bias()[o]);
        of_factor = of_factor + -(of_shift * detail::convert<Wide>(map.mean[o]));
        result.mean[o] = detail::convert<Scalar>(-(of_shift * weight * scale));
      }
    }
    if (!map.weight.empty()) result.weight[o] = detail::convert<Scalar>(of_factor * scale);
    if constexpr (detail::rounds<Wide>) {
      if (!map.variance.empty()) {
        const Wide deviation = detail::deviation<Wide>(map, o);
        result.variance[o] =
            detail::convert<Scalar>(-of_factor * weight * scale / 2 / (deviation * deviation));
      }
    }
  }
  return result;
}

}  // namespace concertina
