// How blocks are initialised, and how one is made to contract to a given layer.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/blocks.hpp>

#include <algorithm>
#include <cmath>
#include <string>

namespace concertina {
namespace detail {

/// Throws ShapeError unless kernels can be aligned at their centre.
template <int Rank>
void require_block_shape(const ConvShape<Rank>& shape, const char* block) {
  validate(shape);
  for (int axis = 0; axis < Rank; ++axis) {
    if (shape.kernel_size[axis] % 2 == 1 && shape.dilation[axis] == 1) continue;
    throw ShapeError(std::string(block) + " needs odd kernels of dilation 1 (" + to_string(shape) +
                     ")");
  }
}

/// A randomly initialised convolution and an initial batch norm. The kernel keeps the centre of the
/// block's, wherever that lies: the padding may be negative.
template <class Scalar, int Rank, class Generator>
ConvBatchNorm<Scalar, Rank> initialize_branch(const ConvShape<Rank>& shape,
                                              const PerAxis<Rank>& kernel, Generator& generator) {
  ConvShape<Rank> branch = shape;
  branch.bias = false;
  branch.kernel_size = kernel;
  for (int axis = 0; axis < Rank; ++axis) {
    const Index less = (shape.kernel_size[axis] - kernel[axis]) / 2;
    branch.padding.start[axis] -= less;
    branch.padding.end[axis] -= less;
  }
  Conv<Scalar, Rank> conv(branch);
  initialize_uniform(conv, generator);
  return {std::move(conv), BatchNorm<Scalar>::initialize(shape.out)};
}

/// Whether a skip connection fits beside a layer of this shape.
template <int Rank>
bool takes_skip(const ConvShape<Rank>& shape) {
  bool takes = shape.in == shape.out && shape.stride == PerAxis<Rank>(1);
  for (int axis = 0; axis < Rank; ++axis) {
    const Index centre = shape.kernel_size[axis] / 2;
    takes = takes && shape.padding.start[axis] == centre && shape.padding.end[axis] == centre;
  }
  return takes;
}

}  // namespace detail

template <class Scalar, int Rank>
Conv<Scalar, Rank> detail::repeated(const Conv<Scalar, Rank>& layer, Index times) {
  ConvShape<Rank> shape = layer.shape();
  shape.out = checked_multiply(shape.out, times, "repeated");
  shape.in = checked_multiply(shape.in, times, "repeated");
  shape.groups *= times;
  Conv<Scalar, Rank> result(shape);
  const auto fill = [](std::span<const Scalar> from, std::span<Scalar> to) {
    for (std::size_t i = 0; i < to.size(); ++i) to[i] = from[i % from.size()];
  };
  fill(layer.weight(), result.weight());
  fill(layer.bias(), result.bias());
  return result;
}

template <class Scalar>
BatchNorm<Scalar> detail::repeated(const BatchNorm<Scalar>& norm, Index times) {
  const auto each = [&](const std::vector<Scalar>& list) {
    std::vector<Scalar> result;
    for (const Scalar& value : list) {
      result.insert(result.end(), static_cast<std::size_t>(times), value);
    }
    return result;
  };
  return {each(norm.running_mean), each(norm.running_var), each(norm.weight), each(norm.bias),
          norm.eps};
}

template <class Scalar, int Rank>
Conv<Scalar, Rank> RefConv<Scalar, Rank>::kernel() const {
  using Wide = detail::WideFor<Scalar>;
  Conv<Scalar, Rank> result = base;
  const ConvShape<Rank>& shape = base.shape();
  const Index kernels = shape.out * (shape.in / shape.groups);
  const Conv<Wide, Rank> wide = base.template cast<Wide>();
  const FeatureMap<Wide, Rank> before({.channels = kernels, .size = shape.kernel_size},
                                      {wide.weight().begin(), wide.weight().end()});
  const FeatureMap<Wide, Rank> refocused = map.template cast<Wide>()(before);
  if (refocused.shape() != before.shape()) {
    detail::fail<ShapeError>({"RefConv: ", map.shape(), " does not map the ", kernels,
                              " kernels of ", shape, " to others of their size"});
  }
  for (std::size_t i = 0; i < result.weight().size(); ++i) {
    result.weight()[i] = convert<Scalar>(before.values()[i] + refocused.values()[i]);
  }
  return result;
}

template <class Scalar>
template <BitGenerator Generator>
AcNet<Scalar> AcNet<Scalar>::initialize(const ConvShape<2>& shape, Generator& generator) {
  detail::require_block_shape(shape, "AcNet");
  const auto branch = [&](const PerAxis<2>& kernel) {
    return detail::initialize_branch<Scalar>(shape, kernel, generator);
  };
  auto square = branch(shape.kernel_size);
  auto vertical = branch({shape.kernel_size[0], 1});
  auto horizontal = branch({1, shape.kernel_size[1]});
  return {std::move(square), std::move(vertical), std::move(horizontal)};
}

template <class Scalar, int Rank>
template <BitGenerator Generator>
RepVgg<Scalar, Rank> RepVgg<Scalar, Rank>::initialize(const ConvShape<Rank>& shape,
                                                      Generator& generator) {
  detail::require_block_shape(shape, "RepVgg");
  auto dense = detail::initialize_branch<Scalar>(shape, shape.kernel_size, generator);
  auto pointwise = detail::initialize_branch<Scalar>(shape, PerAxis<Rank>(1), generator);
  RepVgg<Scalar, Rank> block{std::move(dense), std::move(pointwise)};
  if (detail::takes_skip(shape)) block.skip = BatchNorm<Scalar>::initialize(shape.in);
  return block;
}

template <class Scalar, int Rank>
template <BitGenerator Generator>
DiverseBranchBlock<Scalar, Rank> DiverseBranchBlock<Scalar, Rank>::initialize(
    const ConvShape<Rank>& shape, Generator& generator) {
  detail::require_block_shape(shape, "DiverseBranchBlock");
  const Index groups = shape.groups;
  const bool depthwise = groups == shape.out;
  using Branch = ConvBatchNorm<Scalar, Rank>;
  ConvShape<Rank> plain = shape;  // of a 1x1 before the window
  plain.kernel_size = 1;
  plain.stride = 1;
  ConvShape<Rank> window = shape;  // of what follows it
  window.padding = 0;
  const auto branch = [&](const ConvShape<Rank>& of, const PerAxis<Rank>& kernel) {
    return detail::initialize_branch<Scalar>(of, kernel, generator);
  };
  Branch origin = branch(shape, shape.kernel_size);
  std::optional<Branch> pointwise, before_pool;
  if (!depthwise) {
    pointwise = branch(shape, PerAxis<Rank>(1));
    before_pool = branch(plain, PerAxis<Rank>(1));
  }
  auto pool = average_pool<Scalar, Rank>(shape.out, shape.kernel_size, shape.stride,
                                         depthwise ? shape.padding : Padding<Rank>(0));
  // As many channels between as it reads; twice as many where each group has one, as published.
  ConvShape<Rank> inner = plain;
  inner.out = depthwise ? 2 * shape.in : shape.in;
  ConvShape<Rank> outer = window;
  outer.in = inner.out;
  Branch reduce = branch(inner, PerAxis<Rank>(1)), spatial = branch(outer, shape.kernel_size);
  if (!depthwise) {  // the published 1x1 starts as the identity
    const Index width = shape.in / groups;
    for (Index i = 0; i < shape.in * width; ++i) {
      reduce.conv.weight()[static_cast<std::size_t>(i)] = Scalar(i % width == i / width % width);
    }
  }
  return {std::move(origin),
          std::move(pointwise),
          std::move(before_pool),
          std::move(pool),
          BatchNorm<Scalar>::initialize(shape.out),
          std::move(reduce),
          std::move(spatial)};
}

template <class Scalar, int Rank>
template <BitGenerator Generator>
MobileOne<Scalar, Rank> MobileOne<Scalar, Rank>::initialize(const ConvShape<Rank>& shape,
                                                            Index branches, Generator& generator) {
  detail::require_block_shape(shape, "MobileOne");
  if (branches < 1) detail::fail<ShapeError>({"MobileOne of ", branches, " branches"});
  MobileOne<Scalar, Rank> block;
  for (Index i = 0; i < branches; ++i) {
    block.dense.push_back(detail::initialize_branch<Scalar>(shape, shape.kernel_size, generator));
  }
  if (shape.kernel_size != PerAxis<Rank>(1)) {
    block.scale = detail::initialize_branch<Scalar>(shape, PerAxis<Rank>(1), generator);
  }
  if (detail::takes_skip(shape)) block.skip = BatchNorm<Scalar>::initialize(shape.in);
  return block;
}

template <class Scalar, int Rank>
template <BitGenerator Generator>
RepMixer<Scalar, Rank> RepMixer<Scalar, Rank>::initialize(const ConvShape<Rank>& shape,
                                                          Generator& generator) {
  auto mixer = MobileOne<Scalar, Rank>::initialize(shape, 1, generator);
  if (!mixer.skip || shape.groups != shape.in) {
    detail::fail<ShapeError>(
        {"RepMixer needs a depthwise shape that keeps maps' size (", shape, ")"});
  }
  return {std::move(mixer), BatchNorm<Scalar>::initialize(shape.in),
          std::vector<Scalar>(static_cast<std::size_t>(shape.in), static_cast<Scalar>(1e-5))};
}

template <class Scalar>
template <BitGenerator Generator>
Ecb<Scalar> Ecb<Scalar>::initialize(const ConvShape<2>& shape, Generator& generator) {
  detail::require_block_shape(shape, "Ecb");
  if (shape.kernel_size != PerAxis<2>(3) || shape.stride != PerAxis<2>(1) || shape.groups != 1) {
    detail::fail<ShapeError>({"Ecb needs a 3x3 of stride 1 and one group (", shape, ")"});
  }
  const auto layer = [&](const ConvShape<2>& of) {
    Conv<Scalar, 2> conv(of);
    initialize_uniform(conv, generator);
    return conv;
  };
  const Index in = shape.in, out = shape.out;
  ConvShape<2> dense = shape;
  dense.bias = true;
  const auto reduce = [&](Index width) {
    return layer({.out = width, .in = in, .padding = shape.padding, .bias = true});
  };
  const auto small = [&] {
    std::vector<Scalar> values(static_cast<std::size_t>(out));
    for (Scalar& value : values) {
      value = static_cast<Scalar>(random_uniform(generator, 1e-3 * std::sqrt(3.0)));
    }
    return values;
  };
  const auto edge = [&] {
    auto pointwise = reduce(out);
    auto factors = small();
    return typename Ecb<Scalar>::Edge{std::move(pointwise), std::move(factors), small()};
  };
  Ecb<Scalar> block{layer(dense),
                    reduce(2 * out),
                    layer({.out = out, .in = 2 * out, .kernel_size = 3, .bias = true}),
                    edge(),
                    edge(),
                    edge()};
  block.skips = detail::takes_skip(shape);
  return block;
}

template <class Scalar>
template <BitGenerator Generator>
Monarch<Scalar> Monarch<Scalar>::initialize(Index p, Index q, Generator& generator) {
  const Index channels = detail::checked_multiply(p, q, "Monarch");
  const auto blocks = [&](Index groups) {
    Conv<Scalar, 0> layer(ConvShape<0>{.out = channels, .in = channels, .groups = groups});
    initialize_uniform(layer, generator);
    return layer;
  };
  auto first = blocks(p);
  return {std::move(first), blocks(q)};
}

template <class Scalar, int Rank>
template <BitGenerator Generator>
DilatedBlock<Scalar, Rank> DilatedBlock<Scalar, Rank>::initialize(const ConvShape<Rank>& shape,
                                                                  Generator& generator) {
  detail::require_block_shape(shape, "DilatedBlock");
  const Index least = std::ranges::min(shape.kernel_size);
  if (least < 5) {
    throw ShapeError("DilatedBlock needs kernels of size 5 or more (" + to_string(shape) + ")");
  }
  struct Small {
    Index kernel_size, dilation;
  };
  const auto small = [&]() -> std::vector<Small> {
    switch (least) {
      case 5: return {{3, 1}, {3, 2}};
      case 7: return {{5, 1}, {3, 2}, {3, 3}};
      case 9: return {{5, 1}, {5, 2}, {3, 3}, {3, 4}};
      case 11: return {{5, 1}, {5, 2}, {3, 3}, {3, 4}, {3, 5}};
      case 13: return {{5, 1}, {7, 2}, {3, 3}, {3, 4}, {3, 5}};
      case 15: return {{5, 1}, {7, 2}, {3, 3}, {3, 5}, {3, 7}};
      case 17: return {{5, 1}, {9, 2}, {3, 4}, {3, 5}, {3, 7}};
      default: break;
    }
    std::vector<Small> all;
    for (Index dilation = 1; 2 * dilation + 1 <= least; ++dilation) all.push_back({3, dilation});
    return all;
  }();
  DilatedBlock<Scalar, Rank> block{
      detail::initialize_branch<Scalar>(shape, shape.kernel_size, generator), {}};
  for (const Small& branch : small) {
    ConvShape<Rank> dilated = shape;
    dilated.bias = false;
    dilated.kernel_size = branch.kernel_size;
    dilated.dilation = branch.dilation;
    for (int axis = 0; axis < Rank; ++axis) {
      const Index less = (shape.kernel_size[axis] - effective_kernel_size(dilated, axis)) / 2;
      dilated.padding.start[axis] -= less;
      dilated.padding.end[axis] -= less;
    }
    Conv<Scalar, Rank> conv(dilated);
    initialize_uniform(conv, generator);
    block.dilated.push_back({std::move(conv), BatchNorm<Scalar>::initialize(shape.out)});
  }
  return block;
}

template <class Scalar, int Rank>
template <BitGenerator Generator>
QaRepVgg<Scalar, Rank> QaRepVgg<Scalar, Rank>::initialize(const ConvShape<Rank>& shape,
                                                          Generator& generator) {
  auto block = RepVgg<Scalar, Rank>::initialize(shape, generator);
  return {std::move(block.dense), std::move(block.pointwise.conv), block.skip.has_value(),
          BatchNorm<Scalar>::initialize(shape.out)};
}

template <class Scalar, int Rank>
template <BitGenerator Generator>
LoRa<Scalar, Rank> LoRa<Scalar, Rank>::initialize(Conv<Scalar, Rank> base, Index rank, double alpha,
                                                  Generator& generator) {
  ConvShape<Rank> down = base.shape();
  if (down.groups != 1 || rank < 1) {
    throw ShapeError("LoRa: rank " + std::to_string(rank) + " for " + to_string(down) +
                     ", where one group and a rank of 1 or more are needed");
  }
  const ConvShape<Rank> up{.out = down.out, .in = rank};
  down.out = rank;
  down.bias = false;
  LoRa<Scalar, Rank> block{std::move(base), Conv<Scalar, Rank>(down), Conv<Scalar, Rank>(up),
                           static_cast<Scalar>(alpha / static_cast<double>(rank))};
  initialize_uniform(block.down, generator);
  return block;
}

template <class Scalar, int Rank>
template <BitGenerator Generator>
LoKr<Scalar, Rank> LoKr<Scalar, Rank>::initialize(Conv<Scalar, Rank> base, Index rows,
                                                  Index columns, Generator& generator) {
  ConvShape<Rank> second = base.shape();
  if (second.groups != 1 || rows < 1 || columns < 1 || second.out % rows != 0 ||
      second.in % columns != 0) {
    detail::fail<ShapeError>({"LoKr: a factor of ", rows, " rows and ", columns, " columns for ",
                              second, ", whose channels they have to divide"});
  }
  second.out /= rows;
  second.in /= columns;
  second.bias = false;
  LoKr<Scalar, Rank> block{std::move(base),
                           Conv<Scalar, 0>(ConvShape<0>{.out = rows, .in = columns}),
                           Conv<Scalar, Rank>(second)};
  initialize_uniform(block.first, generator);
  return block;
}

template <class Scalar, int Rank>
RefConv<Scalar, Rank> RefConv<Scalar, Rank>::initialize(Conv<Scalar, Rank> base, Index map_size) {
  const ConvShape<Rank>& shape = base.shape();
  const Index kernels = detail::checked_multiply(shape.out, shape.in / shape.groups, "RefConv");
  const ConvShape<Rank> map{.out = kernels,
                            .in = kernels,
                            .kernel_size = map_size,
                            .padding = map_size / 2,
                            .groups = kernels / shape.groups};
  detail::require_block_shape(map, "RefConv");
  return {std::move(base), Conv<Scalar, Rank>(map)};
}

template <class Scalar, int Rank>
template <BitGenerator Generator>
RepMlp<Scalar, Rank> RepMlp<Scalar, Rank>::initialize(Index channels, const PerAxis<Rank>& size,
                                                      const std::vector<Index>& kernel_sizes,
                                                      Generator& generator) {
  const Index elements = detail::checked_multiply(channels, numel(size), "RepMlp");
  RepMlp<Scalar, Rank> block{
      size,
      Conv<Scalar, 0>(ConvShape<0>{.out = elements, .in = elements, .groups = channels}),
      BatchNorm<Scalar>::initialize(channels),
      {}};
  initialize_uniform(block.fc, generator);
  for (const Index kernel_size : kernel_sizes) {
    const ConvShape<Rank> shape{.out = channels,
                                .in = channels,
                                .kernel_size = kernel_size,
                                .padding = kernel_size / 2,
                                .groups = channels};
    detail::require_block_shape(shape, "RepMlp");
    block.local.push_back(
        detail::initialize_branch<Scalar>(shape, PerAxis<Rank>(kernel_size), generator));
  }
  return block;
}

template <class Scalar, int Rank>
DoConv<Scalar, Rank> DoConv<Scalar, Rank>::initialize(const Conv<Scalar, Rank>& layer) {
  const ConvShape<Rank>& shape = layer.shape();
  const Index taps = numel(shape.kernel_size);
  ConvShape<Rank> depthwise = shape;
  depthwise.out = detail::checked_multiply(shape.in, taps, "DoConv");
  depthwise.groups = shape.in;
  depthwise.bias = false;
  Conv<Scalar, Rank> copies(depthwise);
  for (Index i = 0; i < depthwise.out; ++i) {  // output i copies tap i % taps
    copies.weight()[static_cast<std::size_t>(i * taps + i % taps)] = Scalar(1);
  }
  const auto copy = [](std::span<const Scalar> from) {
    return std::vector<Scalar>(from.begin(), from.end());
  };
  return {std::move(copies),
          Conv<Scalar, Rank>(
              {.out = shape.out, .in = depthwise.out, .groups = shape.groups, .bias = shape.bias},
              copy(layer.weight()), copy(layer.bias()))};
}

template <class Block, Layer F>
Block preserve(const F& layer, Block block) {
  using Scalar = typename F::Scalar;
  constexpr int Rank = F::Rank;
  static_assert(std::numeric_limits<Scalar>::digits >= 24,
                "half and bfloat16 only store: preserve master weights in float");
  using Wide = std::conditional_t<(std::numeric_limits<Scalar>::digits > 53), long double, double>;
  const ConvView<const Scalar, Rank> target(layer);
  const Principal<Scalar, Rank> principal = block.principal();
  auto& [conv, bias, after_conv, after_bias] = principal;

  // What the other branches do: the block without its principal kernel and bias.
  std::ranges::fill(conv.weight(), Scalar(0));
  std::ranges::fill(bias, Scalar(0));
  const Expr<Scalar, Rank> expression = block.expression();
  const ConvShape<Rank> shape = Form(expression).shape();
  ConvShape<Rank> wanted = target.shape(), held = conv.shape();
  wanted.bias = held.bias = shape.bias;
  if (shape != wanted || held != wanted || bias.empty()) {
    detail::fail<ShapeError>({"preserve: the block contracts to ", shape,
                              ", its principal branch being ", conv.shape(),
                              bias.empty() ? " without a bias" : "", ", not to ", target.shape()});
  }
  const auto in_wide = [](const Expr<Scalar, Rank>& linear) {
    return detail::evaluate<Wide>(linear.tree());
  };
  const Conv<Wide, Rank> others = in_wide(expression), of_conv = in_wide(after_conv),
                         of_bias = in_wide(after_bias);
  const auto size = [](const auto& list) { return static_cast<Index>(list.size()); };
  const Index channels = target.shape().out, row = size(target.weight()) / channels;
  const Index neighbours = channels / size(bias);
  for (Index o = 0; o < channels; ++o) {
    const auto at = static_cast<std::size_t>(o);
    const auto solved = [&](Wide total, Wide there, Wide factor) {
      const Wide value = total - there;
      const auto result = convert<Scalar>(value / factor);
      const Wide error = std::abs(convert<Wide>(result) * factor - value),
                 unit = static_cast<Wide>(std::numeric_limits<Scalar>::epsilon());
      if (!(error <= unit * (std::abs(total) + std::abs(there)))) {  // nor a number
        throw NumericalError(
            "preserve: output channel " + std::to_string(o) +
            " is not finite, or underflows; what follows its kernel is a factor of " +
            std::to_string(static_cast<double>(factor)));
      }
      return result;
    };
    for (Index i = o * row; i < (o + 1) * row; ++i) {
      const auto n = static_cast<std::size_t>(i);
      conv.weight()[n] =
          solved(convert<Wide>(target.weight()[n]), others.weight()[n], of_conv.weight()[at]);
    }
    const Wide added = target.shape().bias ? convert<Wide>(target.bias()[at]) : Wide(0);
    const Scalar value = solved(added, others.bias()[at], of_bias.weight()[at]);
    Scalar& held_bias = bias[static_cast<std::size_t>(o / neighbours)];
    if (o % neighbours == 0) held_bias = value;
    if (held_bias != value) {
      detail::fail<ShapeError>({"preserve: output channel ", o, " shares its bias with ",
                                neighbours - 1, " others, which need a different one"});
    }
  }
  return block;
}

}  // namespace concertina
