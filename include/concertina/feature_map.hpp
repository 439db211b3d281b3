// A batch of feature maps, [batch][channels][spatial...], and a view of one that somebody else
// owns.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/detail/lifetimebound.hpp>
#include <concertina/shape.hpp>

#include <concepts>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace concertina {

/// Shape of a batch; `size` is the spatial part, empty for Rank 0.
template <int Rank>
struct MapShape {
  Index batch = 1;
  Index channels = 1;
  PerAxis<Rank> size = 1;

  friend constexpr bool operator==(const MapShape&, const MapShape&) = default;
};

/// Elements of a batch. Throws SizeError on overflow and ShapeError for a negative extent.
template <int Rank>
Index numel(const MapShape<Rank>& shape) {
  bool negative = shape.batch < 0 || shape.channels < 0;
  for (const Index extent : shape.size) negative = negative || extent < 0;
  if (negative) throw ShapeError("a feature map of negative size");
  const Index count =
      detail::checked_multiply(detail::checked_multiply(shape.batch, shape.channels, "feature map"),
                               numel(shape.size), "feature map");
  detail::require_addressable(count, "feature map");
  return count;
}

/// Feature maps of Rank spatial axes, contiguous and row-major as in PyTorch and ONNX. One that was
/// moved from is as one made without a shape: empty, of no channels.
template <class Scalar_, int Rank_>
class FeatureMap {
 public:
  using Scalar = Scalar_;
  static constexpr int Rank = Rank_;

  FeatureMap() = default;

  /// Zeros. Throws SizeError where the number of elements overflows.
  explicit FeatureMap(const MapShape<Rank>& shape)
      : shape_(shape), values_(static_cast<std::size_t>(numel(shape)), Scalar(0)) {}

  /// Takes `values` over. Throws ShapeError unless there are as many as the shape says.
  FeatureMap(const MapShape<Rank>& shape, std::vector<Scalar> values)
      : shape_(shape), values_(std::move(values)) {
    if (static_cast<Index>(values_.size()) != numel(shape_)) {
      throw ShapeError("FeatureMap: " + std::to_string(values_.size()) + " values for a shape of " +
                       std::to_string(numel(shape_)));
    }
  }

  FeatureMap(const FeatureMap&) = default;
  FeatureMap(FeatureMap&& other) noexcept { swap(other); }
  FeatureMap& operator=(FeatureMap other) noexcept {
    swap(other);
    return *this;
  }
  ~FeatureMap() = default;

  const MapShape<Rank>& shape() const noexcept { return shape_; }
  std::span<const Scalar> values() const noexcept CONCERTINA_LIFETIMEBOUND { return values_; }
  std::span<Scalar> values() noexcept CONCERTINA_LIFETIMEBOUND { return values_; }

  friend bool operator==(const FeatureMap&, const FeatureMap&) = default;

 private:
  void swap(FeatureMap& other) noexcept {
    std::swap(shape_, other.shape_);
    values_.swap(other.values_);
  }

  MapShape<Rank> shape_{.batch = 0, .channels = 0};
  std::vector<Scalar> values_;
};

/// Feature maps in memory that somebody else owns: FeatureMapView<const float, 2> reads, and is
/// implicitly convertible from FeatureMap; FeatureMapView<float, 2> writes too.
template <class Element_, int Rank_>
class FeatureMapView {
 public:
  using Element = Element_;
  using Scalar = std::remove_const_t<Element>;
  static constexpr int Rank = Rank_;

  /// Throws ShapeError unless `values` has as many elements as the shape says.
  FeatureMapView(const MapShape<Rank>& shape, std::span<Element> values)
      : shape_(shape), values_(values) {
    if (static_cast<Index>(values_.size()) != numel(shape_)) {
      throw ShapeError("FeatureMapView: " + std::to_string(values_.size()) +
                       " values for a shape of " + std::to_string(numel(shape_)));
    }
  }
  FeatureMapView(const FeatureMap<Scalar, Rank>& owner CONCERTINA_LIFETIMEBOUND)
    requires std::is_const_v<Element>
      : shape_(owner.shape()), values_(owner.values()) {}
  FeatureMapView(FeatureMap<Scalar, Rank>& owner CONCERTINA_LIFETIMEBOUND)
    requires(!std::is_const_v<Element>)
      : shape_(owner.shape()), values_(owner.values()) {}

  /// A view that writes becomes one that reads.
  template <class Mutable>
    requires std::is_const_v<Element> && std::same_as<Mutable, Scalar>
  FeatureMapView(const FeatureMapView<Mutable, Rank>& view)
      : shape_(view.shape()), values_(view.values()) {}

  const MapShape<Rank>& shape() const noexcept { return shape_; }
  std::span<Element> values() const noexcept { return values_; }

 private:
  MapShape<Rank> shape_;
  std::span<Element> values_;
};

template <class Scalar, int Rank>
FeatureMapView(const FeatureMap<Scalar, Rank>&) -> FeatureMapView<const Scalar, Rank>;
template <class Scalar, int Rank>
FeatureMapView(FeatureMap<Scalar, Rank>&) -> FeatureMapView<Scalar, Rank>;

}  // namespace concertina
