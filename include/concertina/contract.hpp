// An expression as one layer: contracted in the cheapest order, refused where no layer equals it.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/exactness.hpp>
#include <concertina/expression.hpp>
#include <concertina/product.hpp>
#include <concertina/sum.hpp>

#include <Eigen/Core>

#include <concepts>
#include <optional>
#include <type_traits>
#include <variant>

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

/// Contract although the result differs from the chain at the border that `exactness` states.
struct InteriorOnly {};
inline constexpr InteriorOnly interior_only{};

/// Contract if the result equals the chain at this input size, even if it does not at all sizes.
template <int Rank>
struct ExactAt {
  PerAxis<Rank> input_size;
};

/// exact_at(224, 224): one extent per spatial axis.
template <std::integral... Extents>
ExactAt<static_cast<int>(sizeof...(Extents))> exact_at(Extents... extents) {
  return {{static_cast<Index>(extents)...}};
}

/// What a caller accepts at the border; by default equality at every input size.
template <int Rank>
class BorderPolicy {
 public:
  BorderPolicy() = default;
  BorderPolicy(InteriorOnly policy) : policy_(policy) {}
  BorderPolicy(const ExactAt<Rank>& policy) : policy_(policy) {}

  /// The input size that is named, if one is.
  std::optional<PerAxis<Rank>> input_size() const {
    const auto* at = std::get_if<ExactAt<Rank>>(&policy_);
    return at ? std::optional(at->input_size) : std::nullopt;
  }

  /// Throws InexactError, with the border's widths and what to do, unless the expression satisfies
  /// the policy.
  void require(const Form<Rank>& form) const;

 private:
  std::variant<std::monostate, InteriorOnly, ExactAt<Rank>> policy_;
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
