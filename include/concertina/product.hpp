// Layers one after another as one layer: the product of their matrices, and the order in which a
// chain is multiplied.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/conv.hpp>
#include <concertina/exactness.hpp>

#include <Eigen/Core>

#include <concepts>
#include <memory>
#include <ranges>
#include <span>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

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

  /// Throws InexactError, with the border's widths and what to do, unless `layers` satisfy the
  /// policy.
  void require(std::span<const ConvShape<Rank>> layers) const;

 private:
  std::variant<std::monostate, InteriorOnly, ExactAt<Rank>> policy_;
};

/// The shape of the product: `inner`, then `outer`.
/// Ensures   T(outer) T(inner) has this shape: stride s2*s1, padding p2*s1 + p1 on each side, dilation the greatest
///           common divisor of the taps' spacings, groups gcd(g1, g2)
/// Throws    ShapeError naming both shapes where the channels differ, SizeError where the kernel overflows
template <int Rank>
ConvShape<Rank> product_shape(const ConvShape<Rank>& outer, const ConvShape<Rank>& inner);

/// The shape of a whole chain, the first layer applied first.
template <int Rank>
ConvShape<Rank> product_shape(std::span<const ConvShape<Rank>> layers);

/// Multiply-adds of one product, as it is computed.
template <int Rank>
Index multiply_adds(const ConvShape<Rank>& outer, const ConvShape<Rank>& inner);

/// A product of layers that is evaluated when it becomes a Conv: a flat list, so `(a * b) * c` and
/// `a * (b * c)` are the same and the cheapest order is found, whatever the parentheses.
/// Lifetime  named layers are viewed, and must outlive it; temporaries are kept in it
template <class Scalar_, int Rank_>
class Expr : public detail::Operand {
 public:
  using Scalar = Scalar_;
  static constexpr int Rank = Rank_;

  Expr(const Conv<Scalar, Rank>& layer) : factors_{{nullptr, layer}} {}
  Expr(const ConvView<Scalar, Rank>& view) : factors_{{nullptr, view}} {}
  Expr(Conv<Scalar, Rank>&& layer) {
    auto owner = std::make_shared<const Conv<Scalar, Rank>>(std::move(layer));
    const ConvView<Scalar, Rank> view(*owner);
    factors_.push_back({std::move(owner), view});
  }

  Expr(const Conv<Scalar, Rank>&&) = delete;

  /// Appends the factors of `outer`, to be applied after these. Throws ShapeError where channels
  /// differ.
  void then(Expr outer) {
    detail::require_chain<Rank>(
        std::array{factors_.back().view.shape(), outer.factors_.front().view.shape()}, "product");
    factors_.insert(factors_.end(), std::make_move_iterator(outer.factors_.begin()),
                    std::make_move_iterator(outer.factors_.end()));
  }

  /// The factors, the first applied first; they view what the expression views or keeps.
  std::vector<ConvView<Scalar, Rank>> factors() const& {
    std::vector<ConvView<Scalar, Rank>> views;
    for (const auto& factor : factors_) views.push_back(factor.view);
    return views;
  }
  std::vector<ConvView<Scalar, Rank>> factors() && = delete;

  /// The contraction; see `contract`.
  operator Conv<Scalar, Rank>() const;

  /// One factor after another, each by its definition: what the contraction must equal.
  FeatureMap<Scalar, Rank> operator()(const FeatureMapView<Scalar, Rank>& x) const {
    FeatureMap<Scalar, Rank> y = factors_.front().view(x);
    for (auto factor = factors_.begin() + 1; factor != factors_.end(); ++factor) {
      y = factor->view(y);
    }
    return y;
  }

 private:
  struct Factor {
    std::shared_ptr<const Conv<Scalar, Rank>> owner;  // null for a layer that is only viewed
    ConvView<Scalar, Rank> view;
  };
  std::vector<Factor> factors_;
};

/// A list of layers known at run time, the first applied first: a vector or span of Conv or
/// ConvView.
template <class R>
concept LayerRange = std::ranges::forward_range<R> && Layer<std::ranges::range_value_t<R>>;

namespace detail {

template <class E>
struct ChainOf;
template <class Scalar_, int Rank_>
struct ChainOf<Expr<Scalar_, Rank_>> {
  using Scalar = Scalar_;
  static constexpr int Rank = Rank_;
};
template <LayerRange R>
struct ChainOf<R> {
  using Scalar = typename std::ranges::range_value_t<R>::Scalar;
  static constexpr int Rank = std::ranges::range_value_t<R>::Rank;
};

}  // namespace detail

/// Anything that stands for layers one after another: a product, or a list known at run time.
template <class E>
concept Chain = requires { typename detail::ChainOf<std::remove_cvref_t<E>>::Scalar; };

template <Chain E>
using ScalarOf = typename detail::ChainOf<std::remove_cvref_t<E>>::Scalar;
template <Chain E>
inline constexpr int rank_of = detail::ChainOf<std::remove_cvref_t<E>>::Rank;

namespace detail {

/// Views of a chain's layers, the first applied first. They hold no memory of their own.
template <Chain E>
std::vector<ConvView<ScalarOf<E>, rank_of<E>>> factors(const E& chain) {
  if constexpr (LayerRange<E>) {
    return {std::ranges::begin(chain), std::ranges::end(chain)};
  } else {
    return chain.factors();
  }
}

}  // namespace detail

/// The shapes of a chain's layers, the first applied first.
template <Chain E>
std::vector<ConvShape<rank_of<E>>> shapes(const E& chain) {
  std::vector<ConvShape<rank_of<E>>> result;
  for (const auto& layer : detail::factors(chain)) result.push_back(layer.shape());
  return result;
}

/// Where contracting this chain is exact: at every input size, or at the one given; see
/// exactness.hpp.
template <Chain E>
Exactness<rank_of<E>> exactness(const E& chain) {
  return exactness<rank_of<E>>(std::span<const ConvShape<rank_of<E>>>(shapes(chain)));
}
template <Chain E>
Exactness<rank_of<E>> exactness(const E& chain,
                                std::type_identity_t<PerAxis<rank_of<E>>> input_size) {
  return exactness<rank_of<E>>(std::span<const ConvShape<rank_of<E>>>(shapes(chain)), input_size);
}

/// One layer that acts as the chain does.
///
/// Computed in A (by default the layers' own scalar; float for half and bfloat16), in which
/// intermediates stay; the result is rounded once to the layers' scalar. `contract<double>(float
/// layers)` is thus correct to about half an ulp.
/// Ensures   contract(e)(x) == e(x) for every x, before rounding; under `interior_only` away from the border
/// Cost      the least multiply-adds of any order, found in (number of layers)^3 steps; the intermediate kernels
/// Throws    InexactError where the policy is not met; ShapeError naming both layers where channels do not fit;
///           SizeError where a size overflows or a kernel would be almost only structural zeros
/// Source    ExpandNets (NeurIPS 2020), Section 3 and supplement; padding rules in docs/exactness.md
template <class A = void, Chain E>
Conv<ScalarOf<E>, rank_of<E>> contract(
    const E& chain, const std::type_identity_t<BorderPolicy<rank_of<E>>>& policy = {});

}  // namespace concertina

#include <concertina/detail/product.ipp>
