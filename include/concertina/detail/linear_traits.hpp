// What is linear: its scalar and rank, and what operators join.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/conv.hpp>

#include <algorithm>
#include <concepts>
#include <ranges>
#include <type_traits>

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

}  // namespace concertina
