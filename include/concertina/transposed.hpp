// The adjoint of a layer: transposed convolutions, which spread each number where the layer would
// have read.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/contract.hpp>
#include <concertina/conv.hpp>

#include <algorithm>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace concertina {

namespace detail {

/// Output positions first .. last - 1 of an axis: those at which a tap reads the map rather than
/// its padding.
struct Reach {
  Index first, last;

  Index count() const noexcept { return std::max<Index>(0, last - first); }
};

template <int Rank>
Reach reach(const ConvShape<Rank>& shape, Index input_size, Index tap, int axis) {
  const auto& stride = shape.stride;
  const Index offset = tap * shape.dilation[axis] - shape.padding.start[axis];
  return {.first = std::max<Index>(0, -floor_divide(offset, stride[axis])),
          .last = std::min(output_size(shape, input_size, axis),
                           floor_divide(input_size - 1 - offset, stride[axis]) + 1)};
}

/// Neighbouring outputs that read evenly spaced inputs through one tap: positions row, row + 1, ...
/// of an output channel, and column, column + step, ... of an input channel. All are row-major, the
/// tap in the kernel too.
struct TapRun {
  Index tap, row, column, count;
};

/// Every run of one pair of channels, the same for each pair: the block of a Toeplitz matrix,
/// diagonal by diagonal.
template <int Rank>
std::vector<TapRun> tap_runs(const ConvShape<Rank>& shape, const PerAxis<Rank>& input_size) {
  const PerAxis<Rank> positions = output_size(shape, input_size);
  std::vector<TapRun> result;
  Index index = 0;
  for_each_position(shape.kernel_size, [&](const PerAxis<Rank>& tap) {
    PerAxis<Rank> first, starts;  // one start for each line of the box of outputs
    Index count = 1;
    for (int axis = 0; axis < Rank; ++axis) {
      const Reach along = reach(shape, input_size[axis], tap[axis], axis);
      first[axis] = along.first;
      count = along.count();
      starts[axis] = axis == Rank - 1 ? std::min<Index>(count, 1) : count;
    }
    for_each_position(starts, [&](const PerAxis<Rank>& start) {
      PerAxis<Rank> j, i;
      for (int axis = 0; axis < Rank; ++axis) {
        j[axis] = first[axis] + start[axis];
        i[axis] = j[axis] * shape.stride[axis] - shape.padding.start[axis] +
                  tap[axis] * shape.dilation[axis];
      }
      result.push_back({index, flat(j, positions), flat(i, input_size), count});
    });
    ++index;
  });
  return result;
}

/// y[n * y_step] += factor * x[n * x_step]. The contiguous case is spelt out so that it is
/// vectorised.
template <class Scalar>
void add_scaled(Index count, const Scalar factor, const Scalar* x, Index x_step, Scalar* y,
                Index y_step) {
  if (x_step == 1 && y_step == 1) {
    for (Index n = 0; n < count; ++n) y[n] = y[n] + factor * x[n];
  } else {
    for (Index n = 0; n < count; ++n) y[n * y_step] = y[n * y_step] + factor * x[n * x_step];
  }
}

/// Which of a matrix and its transpose is applied.
enum class Direction { forward, adjoint };

/// to += T(layer) from, or to += T(layer)^T from; both flat, [channels][positions].
/// Cost  one multiply-add for each entry of the matrix that is not structurally zero
template <class Scalar, int Rank>
void apply_matrix(Direction direction, const ConvView<Scalar, Rank>& layer,
                  const PerAxis<Rank>& input_size, std::span<const TapRun> runs, const Scalar* from,
                  Scalar* to) {
  const ConvShape<Rank>& shape = layer.shape();
  const Index in = shape.in / shape.groups, out = shape.out / shape.groups;
  const Index positions = numel(output_size(shape, input_size)), size = numel(input_size);
  const Index taps = numel(shape.kernel_size);
  Index step = 1;
  for (const Index stride : shape.stride) step = stride;  // that of the last axis
  const Scalar* weight = layer.weight().data();
  for (Index o = 0; o < shape.out; ++o) {
    for (Index c = o / out * in; c < (o / out + 1) * in; ++c, weight += taps) {
      for (const TapRun& run : runs) {
        const Index row = o * positions + run.row, column = c * size + run.column;
        if (direction == Direction::forward) {
          add_scaled(run.count, weight[run.tap], from + column, step, to + row, 1);
        } else {
          add_scaled(run.count, weight[run.tap], from + row, 1, to + column, step);
        }
      }
    }
  }
}

template <class Scalar, int Rank>
Conv<Scalar, Rank> linear_part(const ConvView<Scalar, Rank>& layer) {
  ConvShape<Rank> shape = layer.shape();
  shape.bias = false;
  return Conv<Scalar, Rank>(ConvView<Scalar, Rank>(shape, layer.weight()));
}

}  // namespace detail

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
  explicit Transposed(const ConvView<Scalar, Rank>& layer, std::vector<Scalar> bias = {})
      : layer_(detail::linear_part(layer)), bias_(std::move(bias)) {
    if (!bias_.empty() && static_cast<Index>(bias_.size()) != layer_.shape().in) {
      throw ShapeError("transposed: bias has " + std::to_string(bias_.size()) +
                       " numbers instead of " + std::to_string(layer_.shape().in) +
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
    const auto& padding = layer_.shape().padding;
    PerAxis<Rank> result;
    for (int axis = 0; axis < Rank; ++axis) {
      constexpr const char* what = "transposed";
      Index& extent = result[axis];
      extent = detail::checked_multiply(detail::checked_add(size[axis], -1, what),
                                        layer_.shape().stride[axis], what);
      extent = detail::checked_add(extent, span(layer_.shape(), axis) + 1, what);
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
template <Factor F>
Transposed<typename F::Scalar, F::Rank> transposed(const F& layer,
                                                   std::vector<typename F::Scalar> bias = {}) {
  if constexpr (Layer<F>) {
    return Transposed<typename F::Scalar, F::Rank>(layer, std::move(bias));
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
    shape.padding.start[axis] = span(f, axis) - f.padding.start[axis];
    shape.padding.end[axis] = span(f, axis) - f.padding.end[axis];
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
