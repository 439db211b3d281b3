// How an expression is evaluated: parts first, then their join.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/contract.hpp>

#include <deque>
#include <span>
#include <vector>

namespace concertina {

namespace detail {

/// A node as one layer, computed in A. Requires what contracted_shape checks.
template <class A, class Scalar, int Rank>
Conv<A, Rank> evaluate(const Tree<Operator<Scalar, Rank>>& node) {
  if (node.is_leaf()) return node.leaf().template to<A>();
  std::deque<Conv<A, Rank>> made;  // which views point into
  std::vector<ConvView<A, Rank>> parts;
  std::vector<ConvShape<Rank>> shapes;
  for (const auto& part : node.parts()) {
    if constexpr (std::is_same_v<A, Scalar>) {
      if (part.is_leaf() && part.leaf().view()) {
        parts.push_back(*part.leaf().view());
        shapes.push_back(parts.back().shape());
        continue;
      }
    }
    made.push_back(evaluate<A>(part));
    parts.emplace_back(made.back());
    shapes.push_back(parts.back().shape());
  }
  if (node.join() == Join::chain) return multiply<A, Rank>(parts);
  return add<A, Rank>(node.join(), joined_shape<Rank>(node.join(), shapes), parts);
}

}  // namespace detail

template <int Rank>
Index multiply_adds(const Form<Rank>& form) {
  if (form.is_leaf()) return 0;
  constexpr const char* what = "multiply-adds";
  Index sum = 0;
  std::vector<ConvShape<Rank>> shapes;
  for (const Form<Rank>& part : form.parts()) {
    sum = detail::checked_add(sum, multiply_adds(part), what);
    shapes.push_back(contracted_shape(part));
  }
  if (form.join() != Join::chain) return sum;
  const std::span<const ConvShape<Rank>> all(shapes);
  const detail::ChainOrder<Rank> order(all);
  const auto count = [&](const auto& self, std::size_t first, std::size_t last) -> void {
    if (first == last) return;
    const std::size_t middle = order.split(first, last);
    const auto inner = product_shape<Rank>(all.subspan(first, middle - first));
    const auto outer = product_shape<Rank>(all.subspan(middle, last - middle + 1));
    sum = detail::checked_add(sum, multiply_adds(outer, inner), what);
    self(self, first, middle - 1);
    self(self, middle, last);
  };
  count(count, 0, shapes.size() - 1);
  return sum;
}

template <class A, Expression E>
Conv<ScalarOf<E>, rank_of<E>> contract(
    const E& expression, const std::type_identity_t<BorderPolicy<rank_of<E>>>& policy) {
  using Scalar = ScalarOf<E>;
  constexpr int Rank = rank_of<E>;
  using Accumulator =
      std::conditional_t<std::is_void_v<A>, typename DefaultAccumulator<Scalar>::type, A>;
  const auto tree = detail::tree_of(expression, "contract");
  const Form<Rank> form = detail::form_of(tree);
  static_cast<void>(contracted_shape(form, policy.input_size()));  // throws where it overflows
  policy.require(form);
  Conv<Accumulator, Rank> result = detail::evaluate<Accumulator>(tree);
  if constexpr (std::is_same_v<Accumulator, Scalar>) {
    return result;
  } else {
    return result.template cast<Scalar>();
  }
}

template <class Scalar, int Rank>
Expr<Scalar, Rank>::operator Owner() const
  requires(Rank >= 0)
{
  return contract(*this);
}

}  // namespace concertina
