// An expression as one layer: contracted in the cheapest order, refused where no layer equals it.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/exactness.hpp>
#include <concertina/expression.hpp>
#include <concertina/product.hpp>
#include <concertina/sum.hpp>

#include <Eigen/Core>

#include <type_traits>

namespace concertina {

/// The scalar in which a contraction of layers of this scalar is computed unless the caller names
/// another: half and bfloat16 only store. Specialise it for a storage type of your own.
template <class Scalar>
struct DefaultAccumulator {
  using type = Scalar;
};
template <>
struct DefaultAccumulator<Eigen::half> {
  using type = float;
};
template <>
struct DefaultAccumulator<Eigen::bfloat16> {
  using type = float;
};

/// Multiply-adds of a contraction, in the order that it takes; additions of branches not counted.
/// Throws  ShapeError, SizeError as contracted_shape does
template <int Rank>
Index multiply_adds(const Form<Rank>& form);

/// Where contracting this expression is exact: at every input size, or at the one given; see
/// exactness.hpp.
template <Expression E>
Exactness<rank_of<E>> exactness(const E& expression) {
  return exactness(form(expression));
}
template <Expression E>
Exactness<rank_of<E>> exactness(const E& expression,
                                std::type_identity_t<PerAxis<rank_of<E>>> input_size) {
  return exactness(form(expression), input_size);
}

/// One layer that acts as the expression does.
///
/// Computed in A (by default the layers' own scalar; float for half and bfloat16), in which
/// intermediates stay; the result is rounded once to the layers' scalar. `contract<double>(float
/// layers)` is thus correct to about half an ulp.
/// Ensures   contract(e)(x) == e(x) for every x, before rounding; under `interior_only` away from
///           the border
/// Cost      for each chain the least multiply-adds of any order, found in (number of layers)^3
///           steps; the intermediate kernels
/// Throws    InexactError where the policy is not met; ShapeError naming both layers where channels
///           or branches do not fit; SizeError where a size overflows or a kernel would be almost
///           only structural zeros
/// Gradient  Contraction, in pullback.hpp
/// Source    ExpandNets (NeurIPS 2020), Section 3 and supplement; padding rules in docs/exactness.md
template <class A = void, Expression E>
Conv<ScalarOf<E>, rank_of<E>> contract(
    const E& expression, const std::type_identity_t<BorderPolicy<rank_of<E>>>& policy = {});

}  // namespace concertina

#include <concertina/detail/contract.ipp>
