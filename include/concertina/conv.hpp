// A convolution kept as its kernel and used as a matrix: its owner and its view.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/detail/box.hpp>
#include <concertina/feature_map.hpp>
#include <concertina/scalar.hpp>
#include <concertina/shape.hpp>

#include <concepts>
#include <ranges>
#include <span>
#include <type_traits>
#include <utility>
#include <vector>

namespace concertina {

template <class Scalar, int Rank>
class Conv;

namespace detail {

/// A container that dies at the end of the statement, with its elements.
template <class R>
concept TemporaryRange =
    !std::is_lvalue_reference_v<R> && std::ranges::range<R> && !std::ranges::borrowed_range<R>;

}  // namespace detail

/// A layer of known shape whose elements lie in memory: a Conv or a view of one.
template <class L>
concept Layer = requires(const L& layer) {
  typename L::Scalar;
  { layer.shape() } -> std::convertible_to<ConvShape<L::Rank>>;
  { layer.weight() } -> std::convertible_to<std::span<const typename L::Scalar>>;
  { layer.bias() } -> std::convertible_to<std::span<const typename L::Scalar>>;
};

/// A layer in memory that somebody else owns and that must outlive the view. As for std::span,
/// ConvView<const float, 2> reads and ConvView<float, 2> writes too; a view of a temporary Conv
/// does not compile.
template <class Element, int Rank_>
class ConvView {
 public:
  using Scalar = std::remove_const_t<Element>;
  static constexpr int Rank = Rank_;

  /// weight [out][in / groups][kernel_size...], row-major; bias [out], or empty for none.
  /// Throws ShapeError for an impossible shape, or where a length or `shape.bias` disagrees.
  ConvView(ConvShape<Rank> shape, std::span<Element> weight,
           std::type_identity_t<std::span<Element>> bias = {})
      : shape_(shape), weight_(weight), bias_(bias) {
    if (shape_.bias && bias_.empty()) {
      detail::fail<ShapeError>({"the shape has a bias, but none was given (", shape_, ")"});
    }
    shape_.bias = !bias_.empty();
    validate(shape_);
    const auto require_length = [&](std::span<Element> given, Index expected, const char* what) {
      if (std::ssize(given) == expected) return;
      detail::fail<ShapeError>(
          {what, " has ", given.size(), " elements instead of ", expected, " (", shape_, ")"});
    };
    require_length(weight_, weight_numel(shape_), "weight");
    if (shape_.bias) require_length(bias_, shape_.out, "bias");
  }

  ConvView(const ConvShape<Rank>&, std::vector<Scalar>&&, std::span<Element> = {}) = delete;
  ConvView(const ConvShape<Rank>&, std::span<Element>, std::vector<Scalar>&&) = delete;
  template <detail::TemporaryRange W>
  ConvView(const ConvShape<Rank>&, W&&, std::span<Element> = {}) = delete;
  template <detail::TemporaryRange B>
  ConvView(const ConvShape<Rank>&, std::span<Element>, B&&) = delete;

  ConvView(const Conv<Scalar, Rank>& owner CONCERTINA_LIFETIMEBOUND)
    requires std::is_const_v<Element>
      : shape_(owner.shape()), weight_(owner.weight()), bias_(owner.bias()) {}
  ConvView(Conv<Scalar, Rank>& owner CONCERTINA_LIFETIMEBOUND)
    requires(!std::is_const_v<Element>)
      : shape_(owner.shape()), weight_(owner.weight()), bias_(owner.bias()) {}
  ConvView(const Conv<Scalar, Rank>&&) = delete;

  /// A view that writes becomes one that reads.
  template <class Mutable>
    requires std::is_const_v<Element> && std::same_as<Mutable, Scalar>
  ConvView(const ConvView<Mutable, Rank>& view)
      : shape_(view.shape()), weight_(view.weight()), bias_(view.bias()) {}

  const ConvShape<Rank>& shape() const noexcept { return shape_; }
  std::span<Element> weight() const noexcept { return weight_; }
  std::span<Element> bias() const noexcept { return bias_; }

  /// y[n][o][j] = bias[o] + sum of weight[o][c][a] * x[n][c][j * stride - padding + a * dilation],
  /// over the input channels c of o's group and the taps a that fall on the map.
  /// This is the definition, slow on purpose: everything else is compared with it.
  /// Cost    batch * weight elements * output positions multiply-adds
  /// Throws  ShapeError where the channels differ or the padded map is smaller than the kernel
  FeatureMap<Scalar, Rank> operator()(const FeatureMapView<const Scalar, Rank>& x) const {
    validate(shape_);  // one that was moved from would fit a map that was, too
    if (x.shape().channels != shape_.in) {
      detail::fail<ShapeError>({"a map of ", x.shape().channels,
                                " channels, where the layer reads ", shape_.in, " (", shape_, ")"});
    }
    const PerAxis<Rank> size = x.shape().size, positions = output_size(shape_, size);
    const Index in = shape_.in / shape_.groups, out = shape_.out / shape_.groups;
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

  /// The same layer in another scalar, each element converted on its own (and so rounded at most
  /// once).
  template <class To>
  Conv<To, Rank> cast() const {
    const auto convert = [](std::span<Element> from) {
      std::vector<To> to(from.size(), To(0));
      for (std::size_t i = 0; i < from.size(); ++i) to[i] = concertina::convert<To>(from[i]);
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
  std::span<Element> weight_;
  std::span<Element> bias_;
};

/// An affine map between feature maps, y = T(weight) x + bias, where T is the block-Toeplitz matrix
/// that a kernel determines. Rank 0 is a fully connected layer, ranks 1 to 3 are the usual
/// convolutions. Scalar may be any commutative ring: default-constructible,
/// copied, made from 0 and 1, added (+, +=) and multiplied.
/// Moved   one that was moved from has no channels: applied or joined, it throws ShapeError
/// Source  Guo, Alvarez, Salzmann, ExpandNets, NeurIPS 2020, Section 3
template <class Scalar_, int Rank_>
class Conv {
 public:
  using Scalar = Scalar_;
  static constexpr int Rank = Rank_;
  using View = ConvView<const Scalar, Rank>;

  /// All elements zero. Throws as ConvView does, SizeError where the weight would overflow.
  explicit Conv(const ConvShape<Rank>& shape)
      : shape_((validate(shape), shape)),
        weight_(static_cast<std::size_t>(weight_numel(shape)), Scalar(0)),
        bias_(shape.bias ? static_cast<std::size_t>(shape.out) : 0, Scalar(0)) {}

  /// Takes the vectors over: weight [out][in / groups][kernel_size...], bias [out] or empty. Throws
  /// as ConvView does.
  Conv(const ConvShape<Rank>& shape, std::vector<Scalar> weight, std::vector<Scalar> bias = {})
      : shape_(View(shape, weight, bias).shape()),
        weight_(std::move(weight)),
        bias_(std::move(bias)) {}

  /// A copy of what the view shows.
  explicit Conv(const View& view)
      : shape_(view.shape()),
        weight_(view.weight().begin(), view.weight().end()),
        bias_(view.bias().begin(), view.bias().end()) {}

  Conv(const Conv&) = default;
  Conv(Conv&& other) noexcept
      : shape_(std::exchange(other.shape_, {})),
        weight_(std::exchange(other.weight_, {})),
        bias_(std::exchange(other.bias_, {})) {}
  Conv& operator=(const Conv&) = default;
  Conv& operator=(Conv&& other) noexcept {
    if (this == &other) return *this;
    shape_ = std::exchange(other.shape_, {});
    weight_ = std::exchange(other.weight_, {});
    bias_ = std::exchange(other.bias_, {});
    return *this;
  }
  ~Conv() = default;

  const ConvShape<Rank>& shape() const noexcept { return shape_; }
  std::span<const Scalar> weight() const noexcept CONCERTINA_LIFETIMEBOUND { return weight_; }
  std::span<const Scalar> bias() const noexcept CONCERTINA_LIFETIMEBOUND { return bias_; }
  std::span<Scalar> weight() noexcept CONCERTINA_LIFETIMEBOUND { return weight_; }
  std::span<Scalar> bias() noexcept CONCERTINA_LIFETIMEBOUND { return bias_; }

  /// Application to a batch, by the definition; see ConvView.
  FeatureMap<Scalar, Rank> operator()(const FeatureMapView<const Scalar, Rank>& x) const {
    return View(*this)(x);
  }

  /// The same layer in another scalar, each element rounded at most once.
  template <class To>
  Conv<To, Rank> cast() const {
    return View(*this).template cast<To>();
  }

  /// Every element times `factor`, as `factor * layer` is.
  Conv scaled(const Scalar& factor) const& { return Conv(*this).scaled(factor); }
  Conv scaled(Scalar factor) && {
    for (Scalar& element : weight_) element = factor * element;
    for (Scalar& element : bias_) element = factor * element;
    return std::move(*this);
  }

 private:
  ConvShape<Rank> shape_;
  std::vector<Scalar> weight_;
  std::vector<Scalar> bias_;
};

/// Layers by their rank: fully connected, and convolutions of one to three axes.
template <class Scalar>
using Linear = Conv<Scalar, 0>;
template <class Scalar>
using Conv1d = Conv<Scalar, 1>;
template <class Scalar>
using Conv2d = Conv<Scalar, 2>;
template <class Scalar>
using Conv3d = Conv<Scalar, 3>;

namespace detail {

template <class Scalar, int Rank>
bool same_map(const ConvView<const Scalar, Rank>& f, const ConvView<const Scalar, Rank>& g);

}  // namespace detail

/// Equality as maps: the same output for every input, of any size. Kernels may differ in extent,
/// dilation, padding and groups, as long as they do the same; a bias of zeros equals none.
/// Cost  one look at each tap of either layer
template <Layer F, Layer G>
  requires std::same_as<typename F::Scalar, typename G::Scalar> && (F::Rank == G::Rank)
bool operator==(const F& f, const G& g) {
  using View = ConvView<const typename F::Scalar, F::Rank>;
  return detail::same_map(View(f), View(g));
}

}  // namespace concertina

#include <concertina/detail/same_map.hpp>
