// A convolution kept as its kernel and used as a matrix: its owner, its view, and what one does to
// a single layer.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/feature_map.hpp>
#include <concertina/shape.hpp>

#include <bit>
#include <cmath>
#include <concepts>
#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace concertina {

template <class Scalar, int Rank>
class Conv;
template <class Scalar, int Rank>
class ConvView;
template <class Scalar, int Rank>
class Expr;

/// A layer of known shape whose numbers lie in memory: a Conv or a view of one.
template <class L>
concept Layer = requires(const L& layer) {
  typename L::Scalar;
  { layer.shape() } -> std::convertible_to<ConvShape<L::Rank>>;
  { layer.weight() } -> std::convertible_to<std::span<const typename L::Scalar>>;
  { layer.bias() } -> std::convertible_to<std::span<const typename L::Scalar>>;
};

/// The rank of what takes its neighbour's: batch norms, scales, identities, permutations.
inline constexpr int any_rank = -1;

/// What operators join: a layer, or layers that are joined already.
template <class F>
concept Factor =
    Layer<std::remove_cvref_t<F>> ||
    std::same_as<std::remove_cvref_t<F>,
                 Expr<typename std::remove_cvref_t<F>::Scalar, std::remove_cvref_t<F>::Rank>>;

namespace detail {

template <class F>
inline constexpr int rank_of_factor = std::remove_cvref_t<F>::Rank;

/// Mixed scalars or ranks do not compile: `layer.cast<double>()` converts.
template <class F, class G>
concept Joinable = Factor<F> && Factor<G> &&
                   std::same_as<typename std::remove_cvref_t<F>::Scalar,
                                typename std::remove_cvref_t<G>::Scalar> &&
                   (rank_of_factor<F> == rank_of_factor<G> || rank_of_factor<F> == any_rank ||
                    rank_of_factor<G> == any_rank);

template <class F, class G>
using JoinOf =
    Expr<typename std::remove_cvref_t<F>::Scalar,
         (rank_of_factor<F> > rank_of_factor<G> ? rank_of_factor<F> : rank_of_factor<G>)>;

template <class Scalar, int Rank>
bool same_map(const ConvView<Scalar, Rank>& f, const ConvView<Scalar, Rank>& g);

/// Lends its operators to Conv, ConvView and Expr, and through argument-dependent lookup to nothing
/// else. Named layers are viewed and must outlive the expression; temporaries are kept in it.
struct Operand {
  /// `inner`, then `outer`: the product of their matrices. Throws ShapeError naming both layers
  /// where channels differ.
  template <class Outer, class Inner>
    requires Joinable<Outer, Inner>
  friend auto operator*(Outer&& outer, Inner&& inner) {
    return JoinOf<Outer, Inner>::product(std::forward<Inner>(inner), std::forward<Outer>(outer));
  }

  /// Parallel branches: the sum of their matrices. Throws ShapeError where channels differ; strides
  /// and output sizes are compared when the sum is contracted.
  template <class F, class G>
    requires Joinable<F, G>
  friend auto operator+(F&& f, G&& g) {
    return JoinOf<F, G>::sum(std::forward<F>(f), std::forward<G>(g));
  }
  template <class F, class G>
    requires Joinable<F, G>
  friend auto operator-(F&& f, G&& g) {
    return JoinOf<F, G>::sum(std::forward<F>(f), -std::forward<G>(g));
  }

  /// The map s * F; a layer at once, an expression when it is contracted. Integer layers are not
  /// scaled by fractions.
  template <class S, Factor F>
    requires(!Factor<S>) && std::convertible_to<S, typename std::remove_cvref_t<F>::Scalar> &&
            (!std::integral<typename std::remove_cvref_t<F>::Scalar> || std::integral<S>)
  friend auto operator*(const S& factor, F&& f) {
    return std::forward<F>(f).scaled(typename std::remove_cvref_t<F>::Scalar(factor));
  }
  template <Factor F>
  friend auto operator-(F&& f) {
    return std::forward<F>(f).scaled(-typename std::remove_cvref_t<F>::Scalar(1));
  }

  /// Equality as maps: the same output for every input, of any size. Kernels may differ in extent,
  /// dilation, padding and groups, as long as they do the same; a bias of zeros equals none.
  /// Expressions are contracted first.
  /// Cost  one look at each tap of either layer
  template <Layer F, Layer G>
    requires std::same_as<typename F::Scalar, typename G::Scalar> && (F::Rank == G::Rank)
  friend bool operator==(const F& f, const G& g) {
    return same_map(ConvView<typename F::Scalar, F::Rank>(f),
                    ConvView<typename G::Scalar, G::Rank>(g));
  }
  template <class F, class G>
    requires Joinable<F, G> && (!Layer<F> || !Layer<G>) && (JoinOf<F, G>::Rank >= 0)
  friend bool operator==(const F& f, const G& g) {
    using Result = Conv<typename F::Scalar, JoinOf<F, G>::Rank>;
    return Result(JoinOf<F, G>(f)) == Result(JoinOf<F, G>(g));
  }
};

/// A number in another scalar, rounded at most once. Half and bfloat16 are made from float; a wider
/// number therefore becomes a float rounded to odd first, which keeps what the second rounding has
/// to know.
/// Source  Boldo, Melquiond, Emulation of FMA and correctly rounded sums, IEEE Trans. Computers 2008
template <class To, class From>
To convert(const From& number) {
  constexpr bool narrow = std::numeric_limits<To>::is_specialized &&
                          !std::numeric_limits<To>::is_integer &&
                          std::numeric_limits<To>::digits < 24;
  if constexpr (narrow && std::floating_point<From> && !std::same_as<From, float>) {
    float nearest = static_cast<float>(number);
    if (static_cast<From>(nearest) == number || number != number) return static_cast<To>(nearest);
    if (std::abs(static_cast<From>(nearest)) > std::abs(number))
      nearest = std::nextafter(nearest, 0.0F);
    return static_cast<To>(std::bit_cast<float>(std::bit_cast<std::uint32_t>(nearest) | 1U));
  } else {
    return static_cast<To>(number);
  }
}

/// Calls visit(position) for every position of a box, the last axis fastest; once for Rank 0.
template <int Rank, class Visit>
void for_each_position(const PerAxis<Rank>& size, Visit&& visit) {
  if (numel(size) == 0) return;
  PerAxis<Rank> position = 0;
  for (int axis = Rank; axis >= 0;) {
    visit(std::as_const(position));
    for (axis = Rank - 1; axis >= 0 && ++position[axis] == size[axis]; --axis) position[axis] = 0;
  }
}

/// Row-major index of a position in a box.
template <int Rank>
constexpr Index flat(const PerAxis<Rank>& position, const PerAxis<Rank>& size) {
  Index index = 0;
  for (int axis = 0; axis < Rank; ++axis) index = index * size[axis] + position[axis];
  return index;
}

}  // namespace detail

/// Read-only layer over memory that somebody else owns, so that weights are contracted where they
/// lie. The memory must outlive the view; a view of a temporary Conv does not compile.
template <class Scalar_, int Rank_>
class ConvView : public detail::Operand {
 public:
  using Scalar = Scalar_;
  static constexpr int Rank = Rank_;

  /// weight [out][in / groups][kernel...], row-major; bias [out], or empty for none.
  /// Throws ShapeError for an impossible shape, or where a length or `shape.bias` disagrees.
  ConvView(ConvShape<Rank> shape, std::span<const Scalar> weight,
           std::type_identity_t<std::span<const Scalar>> bias = {})
      : shape_(shape), weight_(weight), bias_(bias) {
    if (shape_.bias && bias_.empty()) {
      throw ShapeError("the shape has a bias, but none was given (" + to_string(shape_) + ")");
    }
    shape_.bias = !bias_.empty();
    validate(shape_);
    const auto length = [&](std::span<const Scalar> given, Index expected, const char* what) {
      if (static_cast<Index>(given.size()) != expected) {
        throw ShapeError(std::string(what) + " has " + std::to_string(given.size()) +
                         " numbers instead of " + std::to_string(expected) + " (" +
                         to_string(shape_) + ")");
      }
    };
    length(weight_, weight_numel(shape_), "weight");
    if (shape_.bias) length(bias_, shape_.out, "bias");
  }

  ConvView(const ConvShape<Rank>&, std::vector<Scalar>&&, std::span<const Scalar> = {}) = delete;
  ConvView(const ConvShape<Rank>&, std::span<const Scalar>, std::vector<Scalar>&&) = delete;

  ConvView(const Conv<Scalar, Rank>& owner)
      : shape_(owner.shape()), weight_(owner.weight()), bias_(owner.bias()) {}
  ConvView(const Conv<Scalar, Rank>&&) = delete;

  const ConvShape<Rank>& shape() const noexcept { return shape_; }
  std::span<const Scalar> weight() const noexcept { return weight_; }
  std::span<const Scalar> bias() const noexcept { return bias_; }

  /// y[n][o][j] = bias[o] + sum of weight[o][c][a] * x[n][c][j * stride - padding + a * dilation],
  /// over the input channels c of o's group and the taps a that fall on the map.
  /// This is the definition, slow on purpose: everything else is compared with it.
  /// Cost    batch * weight elements * output positions multiply-adds
  /// Throws  ShapeError where the channels differ or the padded map is smaller than the kernel
  FeatureMap<Scalar, Rank> operator()(const FeatureMapView<Scalar, Rank>& x) const {
    if (x.shape().channels != shape_.in) {
      throw ShapeError("a map of " + std::to_string(x.shape().channels) +
                       " channels, where the layer reads " + std::to_string(shape_.in) + " (" +
                       to_string(shape_) + ")");
    }
    const auto& groups = shape_.groups;
    const PerAxis<Rank> size = x.shape().size, positions = output_size(shape_, size);
    const Index in = shape_.in / groups, out = shape_.out / groups;
    const Index taps = numel(shape_.kernel_size), pixels = numel(size);
    FeatureMap<Scalar, Rank> y(
        {.batch = x.shape().batch, .channels = shape_.out, .size = positions});
    auto to = y.values().begin();
    for (Index n = 0; n < x.shape().batch; ++n) {
      for (Index o = 0; o < shape_.out; ++o) {
        const Scalar* weight = weight_.data() + o * in * taps;
        const Scalar* maps = x.values().data() + (n * shape_.in + o / out * in) * pixels;
        detail::for_each_position(positions, [&](const PerAxis<Rank>& j) {
          Scalar sum = shape_.bias ? bias_[static_cast<std::size_t>(o)] : Scalar(0);
          detail::for_each_position(shape_.kernel_size, [&](const PerAxis<Rank>& a) {
            PerAxis<Rank> i;
            for (int axis = 0; axis < Rank; ++axis) {
              i[axis] = j[axis] * shape_.stride[axis] - shape_.padding.start[axis] +
                        a[axis] * shape_.dilation[axis];
              if (i[axis] < 0 || i[axis] >= size[axis]) return;
            }
            const Scalar* w = weight + detail::flat(a, shape_.kernel_size);
            const Scalar* pixel = maps + detail::flat(i, size);
            for (Index c = 0; c < in; ++c) sum = sum + w[c * taps] * pixel[c * pixels];
          });
          *to++ = sum;
        });
      }
    }
    return y;
  }

  /// The same layer in another scalar, each number converted on its own (and so rounded at most
  /// once).
  template <class To>
  Conv<To, Rank> cast() const {
    const auto convert = [](std::span<const Scalar> from) {
      std::vector<To> to(from.size(), To(0));
      for (std::size_t i = 0; i < from.size(); ++i) to[i] = detail::convert<To>(from[i]);
      return to;
    };
    return Conv<To, Rank>(shape_, convert(weight_), convert(bias_));
  }

  /// The layer `factor * view`.
  Conv<Scalar, Rank> scaled(const Scalar& factor) const {
    return Conv<Scalar, Rank>(*this).scaled(factor);
  }

 private:
  ConvShape<Rank> shape_;
  std::span<const Scalar> weight_;
  std::span<const Scalar> bias_;
};

/// An affine map between feature maps, y = T(weight) x + bias, where T is the block-Toeplitz matrix
/// that a kernel determines. Rank 0 is a fully connected layer, ranks 1 to 3 are the usual
/// convolutions. Scalar may be any commutative ring: copied, made from
/// 0 and 1, added (+, +=) and multiplied.
/// Source  Guo, Alvarez, Salzmann, ExpandNets, NeurIPS 2020, Section 3
template <class Scalar_, int Rank_>
class Conv : public detail::Operand {
 public:
  using Scalar = Scalar_;
  static constexpr int Rank = Rank_;
  using View = ConvView<Scalar, Rank>;

  /// All numbers zero. Throws as ConvView does, SizeError where the weight would overflow.
  explicit Conv(const ConvShape<Rank>& shape)
      : shape_((validate(shape), shape)),
        weight_(static_cast<std::size_t>(weight_numel(shape)), Scalar(0)),
        bias_(shape.bias ? static_cast<std::size_t>(shape.out) : 0, Scalar(0)) {}

  /// Takes the vectors over: weight [out][in / groups][kernel...], bias [out] or empty. Throws as
  /// ConvView does.
  Conv(const ConvShape<Rank>& shape, std::vector<Scalar> weight, std::vector<Scalar> bias = {})
      : shape_(View(shape, weight, bias).shape()),
        weight_(std::move(weight)),
        bias_(std::move(bias)) {}

  /// A copy of what the view shows.
  explicit Conv(const View& view)
      : shape_(view.shape()),
        weight_(view.weight().begin(), view.weight().end()),
        bias_(view.bias().begin(), view.bias().end()) {}

  const ConvShape<Rank>& shape() const noexcept { return shape_; }
  std::span<const Scalar> weight() const noexcept { return weight_; }
  std::span<const Scalar> bias() const noexcept { return bias_; }
  std::span<Scalar> weight() noexcept { return weight_; }
  std::span<Scalar> bias() noexcept { return bias_; }

  /// Application to a batch, by the definition; see ConvView.
  FeatureMap<Scalar, Rank> operator()(const FeatureMapView<Scalar, Rank>& x) const {
    return View(*this)(x);
  }

  template <class To>
  Conv<To, Rank> cast() const {
    return View(*this).template cast<To>();
  }

  /// Every number times `factor`, as `factor * layer` is.
  Conv scaled(const Scalar& factor) const& { return Conv(*this).scaled(factor); }
  Conv scaled(const Scalar& factor) && {
    for (Scalar& number : weight_) number = factor * number;
    for (Scalar& number : bias_) number = factor * number;
    return std::move(*this);
  }

 private:
  ConvShape<Rank> shape_;
  std::vector<Scalar> weight_;
  std::vector<Scalar> bias_;
};

template <class Scalar>
using Linear = Conv<Scalar, 0>;
template <class Scalar>
using Conv1d = Conv<Scalar, 1>;
template <class Scalar>
using Conv2d = Conv<Scalar, 2>;
template <class Scalar>
using Conv3d = Conv<Scalar, 3>;

}  // namespace concertina

#include <concertina/detail/taps.hpp>
