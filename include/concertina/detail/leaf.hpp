// A leaf of an expression: a layer, viewed or kept, or a channel map.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/channel_map.hpp>
#include <concertina/conv.hpp>

#include <memory>
#include <optional>
#include <span>
#include <utility>

namespace concertina::detail {

template <class Scalar, int Rank>
class Leaf {
 public:
  using View = ConvView<const Scalar, Rank>;

  Index in, out;       ///< channels
  bool fixed = false;  ///< has no gradient

  Leaf(const View& view) : in(view.shape().in), out(view.shape().out), view_(view) {}
  Leaf(Conv<Scalar, Rank>&& layer)
      : Leaf(std::make_shared<const Conv<Scalar, Rank>>(std::move(layer))) {}
  Leaf(const ChannelMap<Scalar>& map)
      : in(map.in), out(map.out), map_(std::make_shared<const ChannelMap<Scalar>>(map)) {}

  /// Null for a channel map, and the other way round.
  const View* view() const { return view_ ? &*view_ : nullptr; }
  const ChannelMap<Scalar>* channel_map() const { return map_.get(); }

  ConvShape<Rank> shape() const { return view_ ? view_->shape() : map_->template shape<Rank>(); }

  /// The same elements as a layer of another shape, without its bias where that has none. Requires
  /// a layer.
  Leaf reshaped(const ConvShape<Rank>& shape) const {
    Leaf result = *this;
    result.view_ =
        View(shape, view_->weight(), shape.bias ? view_->bias() : std::span<const Scalar>());
    return result;
  }

  /// The shape, with what a form knows besides.
  AnyShape form() const {
    AnyShape result(shape());
    result.fixed = fixed;
    return result;
  }

  /// The layer in A, rounded at most once where it is stored and as to_conv says where it is not.
  template <class A>
  Conv<A, Rank> to() const {
    return view_ ? view_->template cast<A>() : to_conv<A, Rank>(*map_);
  }

 private:
  explicit Leaf(std::shared_ptr<const Conv<Scalar, Rank>> owner) : Leaf(View(*owner)) {
    owner_ = std::move(owner);
  }

  std::optional<View> view_;
  std::shared_ptr<const Conv<Scalar, Rank>> owner_;  // null for a layer that is only viewed
  std::shared_ptr<const ChannelMap<Scalar>> map_;
};

/// What has no rank of its own is only ever a channel map.
template <class Scalar>
class Leaf<Scalar, any_rank> {
 public:
  Index in, out;
  bool fixed = false;

  Leaf(const ChannelMap<Scalar>& map)
      : in(map.in), out(map.out), map_(std::make_shared<const ChannelMap<Scalar>>(map)) {}

  const ChannelMap<Scalar>* channel_map() const { return map_.get(); }

 private:
  std::shared_ptr<const ChannelMap<Scalar>> map_;
};

}  // namespace concertina::detail
