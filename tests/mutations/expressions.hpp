// What errors are planted in: expressions of every kind, of any rank and scalar, at five scales.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/concertina.hpp>

#include <cmath>
#include <cstddef>
#include <numeric>
#include <random>
#include <span>
#include <variant>
#include <vector>

namespace concertina::mutations {

using Rng = std::mt19937_64;

/// Layers of any rank and scalar, so that what makes and changes them is compiled once: along axes
/// that the rank lacks they are 1x1, and double represents the scalar's values.
using Kernel = Conv<double, 3>;
using Shape = ConvShape<3>;
using Expression = Expr<double, 3>;
using Leaf = detail::Leaf<double, 3>;
using Tree = detail::Tree<Leaf>;

/// One after another, some of them transposed.
using Part = std::variant<Expression, Transposed<double, 3>>;
using Parts = std::vector<Part>;

inline std::size_t pick(Rng& rng, std::size_t count) { return rng() % count; }

// ---- from one scalar and rank to another -------------------------------------------------------

template <class To, class From>
std::vector<To> converted(std::span<const From> from) {
  std::vector<To> to;
  for (const From& number : from) to.push_back(convert<To>(number));
  return to;
}

template <class To, int ToRank, class From, int Rank>
Conv<To, ToRank> converted(const ConvView<const From, Rank>& layer) {
  return {detail::AnyShape(layer.shape()).template as<ToRank>(),
          converted<To, From>(layer.weight()), converted<To, From>(layer.bias())};
}

template <class To, int ToRank, class From, int Rank>
Expr<To, ToRank> converted(const Expr<From, Rank>& expression) {
  using ToLeaf = detail::Leaf<To, ToRank>;
  return Expr<To, ToRank>(expression.tree().map([](const detail::Leaf<From, Rank>& leaf) {
    const auto list = [](const std::vector<From>& from) { return converted<To, From>(from); };
    const ChannelMap<From>* map = leaf.channel_map();
    ToLeaf result = !map ? ToLeaf(converted<To, ToRank>(*leaf.view()))
                         : ToLeaf(ChannelMap<To>{.in = map->in,
                                                 .out = map->out,
                                                 .source = map->source,
                                                 .mean = list(map->mean),
                                                 .variance = list(map->variance),
                                                 .weight = list(map->weight),
                                                 .bias = list(map->bias),
                                                 .eps = map->eps,
                                                 .divisor = map->divisor});
    result.fixed = leaf.fixed;
    return result;
  }));
}

// ---- expressions -------------------------------------------------------------------------------

/// Without what the rank has no axes for.
inline Shape fit(Shape shape, int rank) {
  for (int axis = 0; axis < 3; ++axis) {
    if (axis >= rank) shape.kernel_size[axis] = shape.stride[axis] = 1;
    if (axis >= rank) shape.padding.start[axis] = shape.padding.end[axis] = 0;
    if (shape.kernel_size[axis] == 1) shape.dilation[axis] = 1;
  }
  return shape;
}

/// Expressions of every kind, with biases and without; one more is a line.
inline std::vector<Parts> expressions(int rank, Rng& rng) {
  std::vector<Parts> all;
  const auto add = [&](auto... parts) { all.push_back({Part(parts)...}); };
  const auto list = [](auto... parts) { return std::vector<Expression>{parts...}; };
  const auto then = [&](auto... parts) { return chain(list(parts...)); };
  const auto numbers = [&](Index count, double least, double most) {
    std::vector<double> result;
    while (std::ssize(result) < count) {
      result.push_back((least + most) / 2 + random_uniform(rng, (most - least) / 2));
    }
    return result;
  };
  for (const bool bias : {false, true}) {
    const auto small = [&](Shape shape) {  // 3x1x3 instead of 3x3x3
      if (numel(fit(shape, rank).kernel_size) > 9) {
        shape.kernel_size[1] = 1;
        shape.padding.start[1] = shape.padding.end[1] = 0;
      }
      return fit(shape, rank);
    };
    const auto layer = [&](const Shape& shape) {
      Kernel result(small(shape));
      initialize_uniform(result, rng);
      return result;
    };
    const auto conv = [&](Shape shape) -> Expression {
      shape.bias = bias;
      return layer(shape);
    };
    const auto spread = [&](const Shape& shape, bool may_have_bias = true) {
      const Kernel f = layer(shape);
      return Transposed<double, 3>(f, numbers(bias && may_have_bias ? shape.in : 0, -1, 1));
    };
    const auto norm = [&]() -> Expression {
      return batch_norm<double>({.running_mean = numbers(4, -1, 1),
                                 .running_var = numbers(4, 0.25, 2),
                                 .weight = numbers(4, -1, 1),
                                 .bias = numbers(4, -1, 1)});
    };
    const auto scale = [&]() -> Expression { return channel_scale(numbers(4, -2, 2)); };
    const auto shift = [&]() -> Expression { return channel_bias(numbers(4, -1, 1)); };
    const auto pool = [&](Shape shape) {
      shape = small(shape);
      return average_pool<double, 3>(4, shape.kernel_size, shape.stride, shape.padding);
    };
    const Expression skip = identity<double>(4), shuffle = channel_shuffle<double>(4, 2),
                     select = channel_select<double>(4, {3, 1, 1});
    const Shape first{.out = 4, .in = 3, .kernel_size = 3, .padding = 1}, point{.out = 4, .in = 4},
        last{.out = 3, .in = 4}, end{.out = 3, .in = 4, .kernel_size = 3},
        square{.out = 4, .in = 4, .kernel_size = 3, .padding = 1},
        two{.out = 4, .in = 4, .kernel_size = 2, .stride = 2}, half{.out = 2, .in = 2},
        half_square{.out = 2, .in = 2, .kernel_size = 3, .padding = 1},
        depthwise{.out = 4, .in = 4, .kernel_size = 2, .groups = 4},
        grouped{.out = 4, .in = 4, .groups = 2}, join{.out = 3, .in = 8};
    Shape strided = first, dilated = first, flat = first, unpadded = first, cropped = first;
    strided.stride = 2;
    dilated.dilation = 2;
    flat.kernel_size = {1, 3, 1};
    flat.padding = {0, 1, 0};
    unpadded.padding = 0;
    cropped.padding = Padding<3>::sides(2, -1);

    // Chains.
    for (const Shape& start : {first, strided, dilated, flat, unpadded, cropped}) {
      add(conv(start), conv(point), conv(last));
      add(conv(start), conv(grouped), conv(last));
      add(conv(start), conv(point), conv(point), conv(last));
    }
    add(conv(first), conv(last));
    add(conv(first), conv(depthwise), conv(last));
    add(conv(unpadded), conv({.out = 8, .in = 4}), conv(join));
    add(conv(unpadded), conv(end));
    add(conv(unpadded), conv(depthwise), conv(end));
    add(conv({.out = 2, .in = 12}), conv({.out = 12, .in = 2}));

    // Batch norms and other channel maps.
    add(conv(square), norm());
    add(norm(), conv(end));
    add(conv(first), norm(), conv(last));
    add(conv(first), norm(), conv(square), norm());
    add(conv(grouped), shuffle, conv(grouped));
    add(conv(first), select, conv(unpadded));
    add(scale(), conv(last));
    add(conv(first), shift(), conv(point));

    // Sums: skip connections, RepVGG, ACNet, DBB, a difference, a sum in a sum.
    add(sum(list(conv(square), skip)));
    add(sum(list(then(conv(square), conv(point)), skip)), conv(last));
    add(sum(list(then(conv(square), norm()), then(conv(point), norm()), norm())));
    add(sum(list(conv(first), conv(flat))), norm(), conv(last));
    add(sum(list(then(conv(point), conv(square), norm()), conv(square),
                 then(conv(point), pool(square)))));
    add(conv(square) - scale());
    add(sum(list(conv(point), then(sum(list(conv(square), skip)), scale()))), conv(last));

    // Concatenations, direct sums, pools, fixed layers.
    add(concat_outputs(list(conv(first), conv(flat))), conv(join));
    add(conv(first), concat_inputs(list(conv(half_square), conv(half))));
    add(concat_outputs(list(then(conv(square), norm()), skip, sum(list(skip, scale())))));
    add(conv(first), direct_sum(list(conv(half_square), conv(half))), conv(last));
    add(conv(first), direct_sum(list(conv(half), conv(half))), norm());
    add(conv(first), pool(two));
    add(fixed(conv(first)), conv(point), fixed(conv(last)));

    // Transposed layers, which go from `out` to `in`; pixel shuffles and upsampling.
    if (rank == 0) continue;
    Shape overlap = strided, longer = overlap;  // by one position, an output padding
    longer.padding.end = 0;
    add(spread(overlap), conv(first));
    add(spread(longer), conv(unpadded), norm());
    add(spread(two), spread(square));
    add(spread(two, false), spread(overlap));
    add(conv(point), norm(), upsample_nearest<double, 3>(4, fit(two, rank).stride), conv(end));
    if (rank != 2) continue;
    const Conv2d<double> blocks = pixel_unshuffle<double, 2>(1, 2);
    const Kernel unshuffle = converted<double, 3>(ConvView<const double, 2>(blocks));
    add(Expression(layer(point)), Transposed<double, 3>(unshuffle),
        conv({.out = 2, .in = 1, .kernel_size = 3}));
  }
  return all;
}

// ---- scales ------------------------------------------------------------------------------------

/// Powers of two that multiply the parts of a chain, for the exponents of float.
struct Scale {
  const char* name;
  double first, even, odd;
  bool dead_channels = false;
};
inline constexpr Scale scales[] = {{"one", 0, 0, 0},
                                   {"2^73 2^-73", 73, 73, -73},
                                   {"2^-12", -12, -12, -12},
                                   {"2^60 first", 60, 0, 0},
                                   {"dead channels", 0, 0, 0, true}};

/// The parts at a scale, but for transposed ones; `range`: exponents of the scalar for each of
/// float's. Dead channels are those of a branch of 2^83 beside the first part, which none reads.
inline Parts scaled(Parts parts, const Scale& scale, double range) {
  int p = -1;
  for (Part& each : parts) {
    auto* part = std::get_if<Expression>(&each);
    if (!part) continue;
    const double power = ++p == 0 ? scale.first : p % 2 == 0 ? scale.even : scale.odd;
    const auto by = [&](double exponent) {
      const double factor = std::exp2(std::trunc(range * exponent));
      const bool is_layer = part->tree().is_leaf() && part->tree().leaf().view();
      return is_layer ? Expression(part->layers().front().scaled(factor)) : part->scaled(factor);
    };
    if (power != 0) *part = by(power);
    if (!scale.dead_channels || p > 0) continue;
    std::vector<Index> alive(static_cast<std::size_t>(detail::channels(part->tree()).out));
    std::iota(alive.begin(), alive.end(), Index{0});
    const Index both = 2 * std::ssize(alive);
    *part = channel_select<double>(both, alive) * concat_outputs(std::vector{*part, by(83)});
  }
  return parts;
}

}  // namespace concertina::mutations
