// How far rounding can carry a contraction from the exact one: constants, counts of terms, and a
// plain reference.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/product.hpp>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

namespace concertina::detail {

/// True for types that round; integers, primes and rationals are exact.
template <class Scalar>
inline constexpr bool rounds =
    std::numeric_limits<Scalar>::is_specialized && !std::numeric_limits<Scalar>::is_exact;

/// Whether the proofs know how a scalar rounds, if it does: complex numbers of rounding parts they
/// do not.
template <class Scalar>
inline constexpr bool provable = rounds<Scalar> || !rounds<typename Eigen::NumTraits<Scalar>::Real>;

/// The scalar in which a computation in A is checked: the next wider one. Exact scalars check
/// themselves, and so does the widest, with a bound that counts both roundings.
template <class A>
using Reference = std::conditional_t<
    !rounds<A>, A, std::conditional_t<(std::numeric_limits<A>::digits < 53), double, long double>>;

/// Largest relative error of one rounding to nearest.
template <class Scalar>
long double unit_roundoff() {
  return std::ldexp(1.0L, -std::numeric_limits<Scalar>::digits);
}

template <class Scalar>
long double smallest_subnormal() {
  return std::ldexp(
      1.0L, std::numeric_limits<Scalar>::min_exponent - std::numeric_limits<Scalar>::digits);
}

/// Distance between neighbouring numbers of type Scalar at the size of x.
template <class Scalar>
long double ulp(long double x) {
  constexpr int least = std::numeric_limits<Scalar>::min_exponent;
  const int exponent = x == 0 ? least : std::max(std::ilogb(x) + 1, least);
  return std::ldexp(1.0L, exponent - std::numeric_limits<Scalar>::digits);
}

/// gamma_n(u) = n*u / (1 - n*u) bounds the relative error of n roundings in a row (Higham, Accuracy
/// and Stability of Numerical Algorithms, Lemma 3.1). Throws VerificationError where n*u reaches 1
/// and it bounds nothing.
inline long double gamma(Index n, long double u) {
  const long double product = static_cast<long double>(n) * u;
  if (!(product < 1)) {
    throw VerificationError(
        "a sum of " + std::to_string(n) +
        " terms is too long for this precision to bound; use a wider accumulator");
  }
  return product / (1 - product);
}

/// Roundings on the way to one tap of a contraction and to one bias, whatever the order of the
/// chain.
struct Terms {
  Index weight = 0, bias = 0;
};

/// At the boundary between two layers, an element of the product sums over the channels there and
/// over the tap pairs that meet. In every order the two sides are parts of what stands left and
/// right of the boundary, so the counts for the whole sides bound them all.
template <int Rank>
Terms terms(std::span<const ConvShape<Rank>> layers) {
  Terms count;
  for (std::size_t boundary = 1; boundary < layers.size(); ++boundary) {
    const ConvShape<Rank> inner = product_shape(layers.first(boundary));
    const ConvShape<Rank> outer = product_shape(layers.subspan(boundary));
    const Index channels =
        std::min(outer.in / outer.geometry.groups, inner.out / inner.geometry.groups);
    Index pairs = 1;
    for (int axis = 0; axis < Rank; ++axis) {
      pairs = checked_multiply(pairs, std::min(outer.kernel[axis], inner.kernel[axis]), "terms");
    }
    count.weight += checked_multiply(channels, pairs, "terms");
    count.bias += outer.in / outer.geometry.groups + volume(outer.kernel) + 1;
  }
  count.bias += count.weight;
  return count;
}

/// `inner`, then `outer`, written from the rule of a product in plain loops: a second opinion for
/// the proofs, which shares no code with the contraction.
template <class Scalar, int Rank>
Conv<Scalar, Rank> multiply_by_definition(const Conv<Scalar, Rank>& outer,
                                          const Conv<Scalar, Rank>& inner) {
  Conv<Scalar, Rank> product(product_shape(outer.shape(), inner.shape()));
  const Index outer_taps = volume(outer.shape().kernel), inner_taps = volume(inner.shape().kernel);
  const Index taps = volume(product.shape().kernel);
  std::vector<Index> meet;
  for_each_position(outer.shape().kernel, [&](const PerAxis<Rank>& b) {
    for_each_position(inner.shape().kernel, [&](const PerAxis<Rank>& a) {
      PerAxis<Rank> tap;
      for (int axis = 0; axis < Rank; ++axis) {
        tap[axis] = (b[axis] * outer.geometry().dilation[axis] * inner.geometry().stride[axis] +
                     a[axis] * inner.geometry().dilation[axis]) /
                    product.geometry().dilation[axis];
      }
      meet.push_back(flat(tap, product.shape().kernel));
    });
  });
  const auto width = [](const auto& layer) { return layer.shape().in / layer.geometry().groups; };
  const auto height = [](const auto& layer) { return layer.shape().out / layer.geometry().groups; };
  for (Index o = 0; o < product.shape().out; ++o) {
    const auto at = static_cast<std::size_t>(o);
    if (outer.shape().bias) product.bias()[at] = outer.bias()[at];
    for (Index between = 0; between < width(outer); ++between) {
      const Index m = o / height(outer) * width(outer) + between;
      const Scalar* w2 = outer.weight().data() + (o * width(outer) + between) * outer_taps;
      for (Index b = 0; b < outer_taps && inner.shape().bias; ++b) {
        product.bias()[at] = product.bias()[at] + w2[b] * inner.bias()[static_cast<std::size_t>(m)];
      }
      for (Index in = 0; in < width(inner); ++in) {
        const Index c = m / height(inner) * width(inner) + in;
        const Scalar* w1 = inner.weight().data() + (m * width(inner) + in) * inner_taps;
        Scalar* result = product.weight().data() + (o * width(product) + c % width(product)) * taps;
        const Index* to = meet.data();
        for (Index b = 0; b < outer_taps; ++b) {
          for (Index a = 0; a < inner_taps; ++a, ++to) result[*to] = result[*to] + w2[b] * w1[a];
        }
      }
    }
  }
  return product;
}

/// A chain in the reference scalar, each factor mapped by `each`, contracted from the first layer
/// on in plain loops.
template <class Ref, class Scalar, int Rank, class Each>
Conv<Ref, Rank> contract_by_definition(const std::vector<ConvView<Scalar, Rank>>& layers,
                                       Each&& each) {
  const auto factor = [&](const ConvView<Scalar, Rank>& view) {
    Conv<Ref, Rank> layer = view.template cast<Ref>();
    for (Ref& number : layer.weight()) number = each(number);
    for (Ref& number : layer.bias()) number = each(number);
    return layer;
  };
  Conv<Ref, Rank> product = factor(layers.front());
  for (std::size_t l = 1; l < layers.size(); ++l) {
    product = multiply_by_definition(factor(layers[l]), product);
  }
  return product;
}

/// Bounds what underflow adds to any number of a contraction: each of `terms` products loses at
/// most one smallest subnormal, which the remaining factors then scale, by no more than the largest
/// absolute row or column sum of their matrices [weight bias; 0 1].
template <class A, class Scalar, int Rank>
long double underflow(const std::vector<ConvView<Scalar, Rank>>& layers, Index terms) {
  long double scale = 1;
  for (const auto& layer : layers) {
    std::vector<long double> rows(static_cast<std::size_t>(layer.shape().out));
    std::vector<long double> columns(static_cast<std::size_t>(layer.shape().in + 1));
    for_each_tap(layer, [&](Index o, Index c, const PerAxis<Rank>&, const Scalar& number) {
      const long double size = std::abs(static_cast<long double>(number));
      rows[static_cast<std::size_t>(o)] += size;
      columns[static_cast<std::size_t>(c)] += size;
    });
    for (std::size_t o = 0; o < layer.bias().size(); ++o) {
      const long double size = std::abs(static_cast<long double>(layer.bias()[o]));
      rows[o] += size;
      columns.back() += size;
    }
    scale *= std::max({1.0L, *std::ranges::max_element(rows), *std::ranges::max_element(columns)});
  }
  return static_cast<long double>(terms) * smallest_subnormal<A>() * scale;
}

/// Bounds |computed - reference| for a number whose factors' absolute values contract to
/// `magnitude`.
template <class Scalar, class A>
struct ErrorBound {
  using Ref = Reference<A>;

  ErrorBound(Index terms, long double lost)
      : relative_(gamma(terms, unit_roundoff<A>()) + gamma(terms, unit_roundoff<Ref>())),
        // The magnitude is itself computed in the reference scalar.
        inflation_(1 / (1 - gamma(terms, unit_roundoff<Ref>()))),
        lost_(2 * lost) {}

  long double operator()(long double magnitude, long double computed, long double reference) const {
    const long double final_rounding =
        std::is_same_v<A, Scalar>
            ? 0
            : ulp<Scalar>(std::max(std::abs(computed), std::abs(reference))) / 2;
    return relative_ * inflation_ * magnitude + lost_ + final_rounding;
  }

 private:
  long double relative_, inflation_, lost_;
};

}  // namespace concertina::detail
