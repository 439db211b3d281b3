// What transposed layers are joined with.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/detail/linear_traits.hpp>

#include <concepts>
#include <type_traits>
#include <utility>

namespace concertina {

template <class Scalar, int Rank>
class Transposed;
template <class Scalar, int Rank>
class TransposedExpr;

namespace detail {

template <class T>
struct TransposedTraits;
template <class S, int R>
struct TransposedTraits<Transposed<S, R>> {
  using Expression = TransposedExpr<S, R>;
};
template <class S, int R>
struct TransposedTraits<TransposedExpr<S, R>> : TransposedTraits<Transposed<S, R>> {};

/// A transposed layer or a product with one.
template <class T>
concept TransposedFactor =
    requires { typename TransposedTraits<std::remove_cvref_t<T>>::Expression; };
template <TransposedFactor T>
using TransposedExprOf = typename TransposedTraits<std::remove_cvref_t<T>>::Expression;

/// What can be joined with the transposed layer T.
template <class F, class T>
concept JoinsTransposed =
    (TransposedFactor<F> && std::same_as<TransposedExprOf<F>, TransposedExprOf<T>>) ||
    (Factor<F> && std::same_as<FactorScalar<F>, typename TransposedExprOf<T>::Scalar> &&
     (factor_rank<F> == any_rank || factor_rank<F> == TransposedExprOf<T>::Rank));

/// F as an expression like T's.
template <TransposedFactor T, JoinsTransposed<T> F>
TransposedExprOf<T> as_transposed_expr(F&& factor) {
  using Result = TransposedExprOf<T>;
  if constexpr (TransposedFactor<F>) {
    return Result(std::forward<F>(factor));
  } else {
    return Result(Expr<typename Result::Scalar, Result::Rank>(std::forward<F>(factor)));
  }
}

}  // namespace detail

}  // namespace concertina
