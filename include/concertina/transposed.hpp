// The adjoint of a layer: transposed convolutions, which spread each element where the layer would
// have read.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/contract.hpp>
#include <concertina/detail/apply_matrix.hpp>

#include <algorithm>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace concertina {

/// The adjoint of a layer F: from F's output maps to its input maps, by the transposed matrix, plus
/// a bias of its own. This is PyTorch's ConvTranspose and ONNX's, with F's weight as it lies: their
/// [in][out / groups][kernel] is F's [out][in / groups][kernel]. Complex numbers are not
/// conjugated, and F's own bias plays no part. For stride 1 prefer as_conv(): there the adjoint is
/// a layer like any other.
template <class Scalar_, int Rank_>
class Transposed {
 public:
  using Scalar = Scalar_;
  static constexpr int Rank = Rank_;

  /// bias [F.in], or empty for none; copies F's weight. Throws ShapeError for a bias of another
  /// length.
  explicit Transposed(const ConvView<const Scalar, Rank>& layer, std::vector<Scalar> bias = {})
      : layer_(detail::linear_part(layer)), bias_(std::move(bias)) {
    if (!bias_.empty() && static_cast<Index>(bias_.size()) != layer_.shape().in) {
      throw ShapeError("transposed: bias has " + std::to_string(bias_.size()) +
                       " elements instead of " + std::to_string(layer_.shape().in) +
                       ", the input channels of " + to_string(layer_.shape()));
    }
  }

  /// F, without its bias.
  const Conv<Scalar, Rank>& layer() const noexcept { return layer_; }
  std::span<const Scalar> bias() const noexcept { return bias_; }

  /// The smallest map that F takes to one of `size`: (size - 1) * stride - padding + dilation *
  /// (kernel - 1) + 1 along each axis, PyTorch's size for output_padding = 0; or 1 where that is
  /// less and 1 will do.
  /// Throws  ShapeError where there is none
  PerAxis<Rank> output_size(const PerAxis<Rank>& size) const {
    const auto& stride = layer_.shape().stride;
    const auto& padding = layer_.shape().padding;
    PerAxis<Rank> result;
    for (int axis = 0; axis < Rank; ++axis) {
      constexpr const char* what = "transposed";
      Index& extent = result[axis];
      extent =
          detail::checked_multiply(detail::checked_add(size[axis], -1, what), stride[axis], what);
      extent = detail::checked_add(extent, effective_kernel_size(layer_.shape(), axis), what);
      extent = detail::checked_add(extent, -padding.start[axis], what);
      extent = std::max<Index>(1, detail::checked_add(extent, -padding.end[axis], what));
    }
    require_sizes(size, result);
    return result;
  }

  /// The map of output_size() that the transposed matrix gives, plus the bias.
  /// Ensures  <F x, y> == <x, transposed(F)(y)> for every x and y, but for F's bias
  /// Cost     batch * weight elements * y's positions multiply-adds
  /// Throws   ShapeError where the channels differ or the map would be empty
  FeatureMap<Scalar, Rank> operator()(const FeatureMapView<Scalar, Rank>& y) const {
    return (*this)(y, output_size(y.shape().size));
  }

  /// The same for any `size` that F takes to y's: a strided layer takes several, whose last
  /// positions it does not read. Throws ShapeError, naming the sizes, for one that it takes to
  /// another.
  FeatureMap<Scalar, Rank> operator()(const FeatureMapView<Scalar, Rank>& y,
                                      const PerAxis<Rank>& size) const {
    const ConvShape<Rank>& shape = layer_.shape();
    if (y.shape().channels != shape.out) {
      throw ShapeError("transposed: a map of " + std::to_string(y.shape().channels) +
                       " channels, where the layer writes " + std::to_string(shape.out) + " (" +
                       to_string(shape) + ")");
    }
    require_sizes(y.shape().size, size);
    FeatureMap<Scalar, Rank> x({.batch = y.shape().batch, .channels = shape.in, .size = size});
    const std::vector<detail::TapRun> runs = detail::tap_runs(shape, size);
    const Index from = shape.out * numel(y.shape().size), to = shape.in * numel(size);
    for (Index n = 0; n < y.shape().batch; ++n) {
      Scalar* map = x.values().data() + n * to;
      for (std::size_t c = 0; c < bias_.size(); ++c, map += numel(size)) {
        std::fill_n(map, numel(size), bias_[c]);
      }
      detail::apply_matrix<Scalar, Rank>(detail::Direction::adjoint, layer_, size, runs,
                                         y.values().data() + n * from, x.values().data() + n * to);
    }
    return x;
  }

  /// `inner`, then `outer`, evaluated at once: transposed(A) * transposed(B) == transposed(B * A).
  /// The bias of `outer` is kept. To accept a border, contract first: transposed(contract(B * A,
  /// interior_only)).
  /// Throws  InexactError where contract(B * A) does, and where `inner` has a bias: the adjoint of a constant map
  ///         is not constant at the border, nor between strides; ShapeError where the channels
  ///         differ
  friend Transposed operator*(const Transposed& outer, const Transposed& inner) {
    if (!inner.bias_.empty()) {
      throw InexactError("no bias stands for that of a transposed layer (" +
                         to_string(inner.layer_.shape()) + ") before another (" +
                         to_string(outer.layer_.shape()) +
                         "): its sum varies from position to position");
    }
    const Conv<Scalar, Rank> product = contract(inner.layer_ * outer.layer_);
    return Transposed(product, outer.bias_);
  }

  /// Equality as maps, as for layers; a bias of zeros equals none.
  friend bool operator==(const Transposed& f, const Transposed& g) {
    const auto bias = [](const Transposed& layer) {
      const auto channels = static_cast<std::size_t>(layer.layer_.shape().in);
      return layer.bias_.empty() ? std::vector<Scalar>(channels, Scalar(0)) : layer.bias_;
    };
    return f.layer_ == g.layer_ && bias(f) == bias(g);
  }

 private:
  /// Throws ShapeError unless F takes a map of size `to` to one of size `from`.
  void require_sizes(const PerAxis<Rank>& from, const PerAxis<Rank>& to) const {
    PerAxis<Rank> taken;
    bool fits = true;
    for (int axis = 0; axis < Rank; ++axis) {
      taken[axis] = concertina::output_size(layer_.shape(), to[axis], axis);
      fits = fits && from[axis] > 0 && to[axis] > 0 && taken[axis] == from[axis];
    }
    if (fits) return;
    throw ShapeError("transposed: a map of size " + to_string(from) +
                     " does not become one of size " + to_string(to) +
                     ", which the layer takes to " + to_string(taken) + " (" +
                     to_string(layer_.shape()) + ")");
  }

  Conv<Scalar, Rank> layer_;
  std::vector<Scalar> bias_;
};

static_assert(!Layer<Transposed<float, 2>>, "it reads what a layer of its shape would write");

/// The adjoint of F's linear part, with `bias` [F.in] or none; F is copied. A product is contracted
/// first.
template <LinearMap F>
Transposed<ScalarOf<F>, rank_of<F>> transposed(const F& layer, std::vector<ScalarOf<F>> bias = {}) {
  if constexpr (Layer<F>) {
    return Transposed<ScalarOf<F>, rank_of<F>>(layer, std::move(bias));
  } else {
    return transposed(contract(layer), std::move(bias));
  }
}

/// F's linear part again.
template <class Scalar, int Rank>
Conv<Scalar, Rank> transposed(const Transposed<Scalar, Rank>& adjoint) {
  return adjoint.layer();
}

/// For stride 1 the adjoint as a layer: the kernel flipped along each axis, the channels of each
/// group exchanged, and dilation * (kernel - 1) - padding on each side.
/// Ensures  as_conv(t)(y) == t(y) for every y
/// Throws   ShapeError for larger strides
template <class Scalar, int Rank>
Conv<Scalar, Rank> as_conv(const Transposed<Scalar, Rank>& adjoint) {
  const ConvShape<Rank>& f = adjoint.layer().shape();
  if (f.stride != 1) {
    throw ShapeError(
        "as_conv: the adjoint of a strided layer writes more positions than it reads, as no layer "
        "does (" +
        to_string(f) + ")");
  }
  ConvShape<Rank> shape{.out = f.in,
                        .in = f.out,
                        .kernel_size = f.kernel_size,
                        .stride = f.stride,
                        .padding = f.padding,
                        .dilation = f.dilation,
                        .groups = f.groups,
                        .bias = !adjoint.bias().empty()};
  for (int axis = 0; axis < Rank; ++axis) {
    shape.padding.start[axis] = effective_kernel_size(f, axis) - 1 - f.padding.start[axis];
    shape.padding.end[axis] = effective_kernel_size(f, axis) - 1 - f.padding.end[axis];
  }
  Conv<Scalar, Rank> result(shape);
  const Index in = f.in / f.groups, out = f.out / f.groups;
  const Index taps = numel(f.kernel_size);
  const Scalar* from = adjoint.layer().weight().data();
  for (Index o = 0; o < f.out; ++o) {
    for (Index c = o / out * in; c < (o / out + 1) * in; ++c, from += taps) {
      std::reverse_copy(from, from + taps, result.weight().data() + (c * out + o % out) * taps);
    }
  }
  std::ranges::copy(adjoint.bias(), result.bias().begin());
  return result;
}

}  // namespace concertina
