// Layers that are special cases of a convolution: batch norms (batch_norm.hpp), scales, biases,
// identities, pooling, selected channels, fully connected layers at each position or after a
// flatten.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/batch_norm.hpp>
#include <concertina/conv.hpp>
#include <concertina/expression.hpp>

#include <concepts>
#include <optional>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace concertina {

/// The map that changes nothing: a skip connection. Throws ShapeError unless there is a channel.
template <class Scalar>
Expr<Scalar, any_rank> identity(Index channels) {
  if (channels < 1) throw ShapeError("identity: no channels");
  return ChannelMap<Scalar>{.in = channels, .out = channels};
}

/// Channel c times factors[c]. The same factor for all: `s * F`. Throws ShapeError for no factors.
template <class Scalar>
Expr<Scalar, any_rank> channel_scale(std::vector<Scalar> factors) {
  if (factors.empty()) throw ShapeError("channel_scale: no factors");
  const auto count = static_cast<Index>(factors.size());
  return ChannelMap<Scalar>{.in = count, .out = count, .weight = std::move(factors)};
}

/// Channel c plus bias[c]. Throws ShapeError for no channels.
template <class Scalar>
Expr<Scalar, any_rank> channel_bias(std::vector<Scalar> bias) {
  if (bias.empty()) throw ShapeError("channel_bias: no channels");
  const auto count = static_cast<Index>(bias.size());
  return ChannelMap<Scalar>{.in = count, .out = count, .bias = std::move(bias)};
}
/// The same for all channels.
template <class Scalar>
Expr<Scalar, any_rank> channel_bias(Index channels, const std::type_identity_t<Scalar>& bias) {
  return channel_bias(detail::per_channel<Scalar>(channels, bias, "channel_bias"));
}

/// Output channel o is input channel source[o]. Channels may be left out or used twice, so slices
/// are such maps too.
/// Cost    an index for each channel; in a contraction the product with a dense 1x1 layer
/// Throws  ShapeError naming the index that is not one of `channels`
template <class Scalar>
Expr<Scalar, any_rank> channel_select(Index channels, std::vector<Index> source) {
  if (source.empty()) throw ShapeError("channel_select: no channels are selected");
  for (std::size_t o = 0; o < source.size(); ++o) {
    if (source[o] >= 0 && source[o] < channels) continue;
    throw ShapeError("channel_select: output channel " + std::to_string(o) + " is input channel " +
                     std::to_string(source[o]) + " of " + std::to_string(channels));
  }
  const auto count = static_cast<Index>(source.size());
  return ChannelMap<Scalar>{.in = channels, .out = count, .source = std::move(source)};
}

/// Channels seen as [groups, n] become [n, groups], as torch.nn.ChannelShuffle does. Throws
/// ShapeError where groups do not divide the channels, SizeError for more than fit a layer.
/// Source  Zhang et al., ShuffleNet, CVPR 2018
template <class Scalar>
Expr<Scalar, any_rank> channel_shuffle(Index channels, Index groups) {
  if (groups < 1 || channels < 1 || channels % groups != 0) {
    throw ShapeError("channel_shuffle: " + std::to_string(groups) + " groups of " +
                     std::to_string(channels) + " channels");
  }
  constexpr const char* what = "channel_shuffle";
  detail::require_addressable(detail::checked_multiply(channels, channels, what), what);
  std::vector<Index> source;
  const Index width = channels / groups;
  for (Index i = 0; i < width; ++i) {
    for (Index group = 0; group < groups; ++group) source.push_back(group * width + i);
  }
  return channel_select<Scalar>(channels, std::move(source));
}

/// Average pooling, as torch.nn.AvgPool2d with ceil_mode=False and count_include_pad=True: sums
/// over the window, then divided by its volume, so the padding counts. With ceil_mode the input
/// size is named, and the pool is for that size. Its layers are fixed.
/// Throws  ShapeError for an empty window; for a divisor that leaves the padding out, and where
///         ceil_mode adds windows that hang over, which no layer with zero padding equals
template <class Scalar, int Rank>
  requires(!std::integral<Scalar>)
Expr<Scalar, Rank> average_pool(
    Index channels, const PerAxis<Rank>& kernel, const std::type_identity_t<PerAxis<Rank>>& stride,
    const std::type_identity_t<Padding<Rank>>& padding = 0, bool ceil_mode = false,
    bool count_include_pad = true,
    const std::type_identity_t<std::optional<PerAxis<Rank>>>& input_size = {}) {
  const ConvShape<Rank> shape{.out = channels,
                              .in = channels,
                              .kernel_size = kernel,
                              .stride = stride,
                              .padding = padding,
                              .groups = channels};
  validate(shape);
  const auto refuse = [&](const std::string& why) {
    throw ShapeError("average_pool of a " + to_string(kernel) + " window: " + why);
  };
  if (ceil_mode && !input_size) {
    refuse("with ceil_mode the last windows may hang over; name the input size where none does");
  }
  bool padded = false;
  for (int axis = 0; axis < Rank; ++axis) {
    padded = padded || padding.start[axis] > 0 || padding.end[axis] > 0;
    if (!ceil_mode) continue;
    // PyTorch's windows: those that hang over count too, unless they begin in the padding after it.
    const Index size = (*input_size)[axis], windows = output_size(shape, size, axis);
    const Index last = -detail::floor_divide(
        kernel[axis] - size - padding.start[axis] - padding.end[axis], stride[axis]);
    if (last + (last * stride[axis] < size + padding.start[axis] ? 1 : 0) != windows) {
      refuse("with ceil_mode the last window hangs over an input of size " +
             to_string(*input_size) + "; only floor is a convolution");
    }
  }
  if (padded && !count_include_pad) {
    refuse("without count_include_pad border windows have divisors of their own; no layer has");
  }
  Conv<Scalar, Rank> window(shape);
  for (Scalar& element : window.weight()) element = Scalar(1);
  const Expr<Scalar, Rank> mean(
      ChannelMap<Scalar>{.in = channels, .out = channels, .divisor = numel(kernel)});
  return fixed(mean * std::move(window));
}

/// A low-pass filter before a stride, the same for each channel and along each axis: of {1, 2, 1},
/// the weights of a 2-D one are {1, 2, 1, 2, 4, 2, 1, 2, 1} / 16. Padding is with zeros; the
/// published one reflects, as no layer does. Its layers are fixed.
/// Throws  ShapeError for a filter whose sum is not positive, or no channels
/// Source  Zhang, Making convolutional networks shift-invariant again, ICML 2019
template <class Scalar, int Rank>
  requires(!std::integral<Scalar>)
Expr<Scalar, Rank> blur_pool(Index channels, const std::vector<Index>& filter,
                             const std::type_identity_t<PerAxis<Rank>>& stride,
                             const std::type_identity_t<Padding<Rank>>& padding = 0) {
  Index sum = 0;
  for (const Index tap : filter) sum = detail::checked_add(sum, tap, "blur_pool");
  if (sum < 1) throw ShapeError("blur_pool: a filter whose sum is " + std::to_string(sum));
  const auto taps = static_cast<Index>(filter.size());
  Conv<Scalar, Rank> window({.out = channels,
                             .in = channels,
                             .kernel_size = taps,
                             .stride = stride,
                             .padding = padding,
                             .groups = channels});
  auto weight = window.weight().begin();
  for (Index c = 0; c < channels; ++c) {
    detail::for_each_position(window.shape().kernel_size, [&](const PerAxis<Rank>& tap) {
      Index product = 1;
      for (const Index at : tap) {
        product =
            detail::checked_multiply(product, filter[static_cast<std::size_t>(at)], "blur_pool");
      }
      *weight++ = static_cast<Scalar>(product);
    });
  }
  const Expr<Scalar, Rank> mean(
      ChannelMap<Scalar>{.in = channels, .out = channels, .divisor = numel(PerAxis<Rank>(sum))});
  return fixed(mean * std::move(window));
}

/// Each block of `factor` positions along every axis becomes channels of one position:
/// torch.nn.PixelUnshuffle, space to depth. Output channel c * factor^Rank + t is position t of the
/// block, row-major, of channel c. Its inverse is pixel_shuffle, in transposed.hpp.
/// Throws  ShapeError for no channels or factor
/// Source  YOLOv5's Focus is one before a layer, in another order of channels
template <class Scalar, int Rank>
Conv<Scalar, Rank> pixel_unshuffle(Index channels, Index factor) {
  const Index positions = numel(PerAxis<Rank>(factor));
  Conv<Scalar, Rank> layer({.out = detail::checked_multiply(channels, positions, "pixel_unshuffle"),
                            .in = channels,
                            .kernel_size = factor,
                            .stride = factor,
                            .groups = channels});
  for (Index o = 0; o < layer.shape().out; ++o) {
    layer.weight()[static_cast<std::size_t>(o * positions + o % positions)] = Scalar(1);
  }
  return layer;
}

/// A fully connected layer on the channels of each position, as a 1x1 of any rank: a view of the
/// same elements.
template <int Rank, Layer F>
  requires(F::Rank == 0)
ConvView<const typename F::Scalar, Rank> pointwise(const F& linear) {
  const ConvShape<0>& shape = linear.shape();
  return {{.out = shape.out, .in = shape.in, .groups = shape.groups, .bias = shape.bias},
          linear.weight(),
          linear.bias()};
}
template <int Rank, class Scalar>
void pointwise(const Conv<Scalar, 0>&&) = delete;

/// A fully connected layer on a flattened map [channels, size...] as a layer of which the kernel is
/// the whole map. Its output has size 1.
/// Throws  ShapeError where the layer does not read channels * numel(size) elements
template <Layer F, int Rank>
  requires(F::Rank == 0)
Conv<typename F::Scalar, Rank> linear_as_conv(const F& linear, Index channels,
                                              const PerAxis<Rank>& size) {
  const Index elements = detail::checked_multiply(channels, numel(size), "linear_as_conv");
  const ConvShape<0>& shape = linear.shape();
  if (shape.groups != 1 || shape.in != elements) {
    throw ShapeError("linear_as_conv: " + to_string(shape) + " on a map of " +
                     std::to_string(channels) + " channels of size " + to_string(size) +
                     ", which has " + std::to_string(elements) + " elements");
  }
  return {{.out = shape.out, .in = channels, .kernel_size = size},
          {linear.weight().begin(), linear.weight().end()},
          {linear.bias().begin(), linear.bias().end()}};
}

}  // namespace concertina
