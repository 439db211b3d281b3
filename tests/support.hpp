// What tests share: small integers, in which floats are exact, and shapes with every option.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/conv.hpp>
#include <concertina/expression.hpp>
#include <concertina/feature_map.hpp>
#include <concertina/random.hpp>

#include <catch2/catch.hpp>

#include <algorithm>
#include <cstdint>
#include <random>
#include <span>
#include <string>
#include <vector>

namespace concertina::test {

using Rng = std::mt19937_64;

/// Uniform in least .. most; the remainder's bias is of no matter here.
inline Index random_index(Rng& rng, Index least, Index most) {
  return least + static_cast<Index>(rng() % static_cast<std::uint64_t>(most - least + 1));
}

/// Integers in -4 .. 4: sums of up to a million of their products are exact in float.
template <class Scalar>
void fill_small_integers(std::span<Scalar> numbers, Rng& rng) {
  for (Scalar& number : numbers) number = static_cast<Scalar>(random_index(rng, -4, 4));
}

/// A layer of small integers, its bias too where the shape has one.
template <class Scalar, int Rank>
Conv<Scalar, Rank> small_integers(const ConvShape<Rank>& shape, Rng& rng) {
  Conv<Scalar, Rank> layer(shape);
  fill_small_integers(layer.weight(), rng);
  fill_small_integers(layer.bias(), rng);
  return layer;
}

/// A batch of small integers.
template <class Scalar, int Rank>
FeatureMap<Scalar, Rank> small_integers(const MapShape<Rank>& shape, Rng& rng) {
  FeatureMap<Scalar, Rank> map(shape);
  fill_small_integers(map.values(), rng);
  return map;
}

/// Each element of a batch mapped by change(element, channel).
template <class Scalar, int Rank, class Change>
FeatureMap<Scalar, Rank> each_channel(FeatureMap<Scalar, Rank> x, Change&& change) {
  const Index size = numel(x.shape().size);
  for (std::size_t i = 0; i < x.values().size(); ++i) {
    const auto channel =
        static_cast<std::size_t>(static_cast<Index>(i) / size % x.shape().channels);
    x.values()[i] = change(x.values()[i], channel);
  }
  return x;
}

/// The largest that random_shape draws; the least is 1, but for paddings, whose least is -most.
struct Largest {
  Index channels = 3;  ///< of one group
  Index groups = 3;
  Index kernel_size = 3;
  Index stride = 3;
  Index dilation = 3;
  Index padding = 2;
};

/// A shape with every option drawn at random: asymmetric and negative paddings, dilations, groups,
/// bias or none.
template <int Rank>
ConvShape<Rank> random_shape(Rng& rng, const Largest& largest = {}) {
  ConvShape<Rank> shape;
  auto& padding = shape.padding;
  auto& groups = shape.groups;
  groups = random_index(rng, 1, largest.groups);
  shape.out = groups * random_index(rng, 1, largest.channels);
  shape.in = groups * random_index(rng, 1, largest.channels);
  shape.bias = random_index(rng, 0, 1) == 1;
  for (int axis = 0; axis < Rank; ++axis) {
    shape.kernel_size[axis] = random_index(rng, 1, largest.kernel_size);
    shape.stride[axis] = random_index(rng, 1, largest.stride);
    shape.dilation[axis] = random_index(rng, 1, largest.dilation);
    padding.start[axis] = random_index(rng, -largest.padding, largest.padding);
    padding.end[axis] = random_index(rng, -largest.padding, largest.padding);
  }
  return shape;
}

/// A shape to follow `inner`: as many channels as it writes.
template <int Rank>
ConvShape<Rank> random_shape_after(const ConvShape<Rank>& inner, Rng& rng,
                                   const Largest& largest = {}) {
  ConvShape<Rank> shape = random_shape<Rank>(rng, largest);
  Index& groups = shape.groups;
  shape.out /= groups;
  while (inner.out % groups != 0) --groups;
  shape.out *= groups;
  shape.in = inner.out;
  return shape;
}

/// The shape with its positive paddings left out: after any other layer it is exact.
template <int Rank>
ConvShape<Rank> unpadded(ConvShape<Rank> shape) {
  auto& [start, end] = shape.padding;
  for (int axis = 0; axis < Rank; ++axis) {
    start[axis] = std::min<Index>(start[axis], 0);
    end[axis] = std::min<Index>(end[axis], 0);
  }
  return shape;
}

/// Random elements of a finite field, for which equality by chance is out of the question.
template <class Field>
void fill_random(std::span<Field> numbers, Rng& rng) {
  for (Field& number : numbers) number = random_bits(rng);
}

/// Positions of the kernel along an axis, by counting them: a second opinion on output_size().
template <int Rank>
Index counted_positions(const ConvShape<Rank>& shape, Index size, int axis) {
  const auto& padding = shape.padding;
  const Index last_tap = shape.dilation[axis] * (shape.kernel_size[axis] - 1);
  Index count = 0;
  while (count * shape.stride[axis] + last_tap < size + padding.start[axis] + padding.end[axis])
    ++count;
  return count;
}

/// A size that these layers take one after another: the smallest there is, or up to `extra` more
/// along each axis.
template <int Rank>
PerAxis<Rank> random_input_size(const std::vector<ConvShape<Rank>>& layers, Rng& rng,
                                Index extra = 4) {
  PerAxis<Rank> size;
  for (int axis = 0; axis < Rank; ++axis) {
    const auto fits = [&](Index extent) {
      return std::ranges::all_of(layers, [&](const ConvShape<Rank>& layer) {
        extent = counted_positions(layer, extent, axis);
        return extent > 0;
      });
    };
    size[axis] = 1;
    while (!fits(size[axis])) ++size[axis];
    size[axis] += random_index(rng, 0, extra);
  }
  return size;
}

/// A size that the layer takes.
template <int Rank>
PerAxis<Rank> random_input_size(const ConvShape<Rank>& shape, Rng& rng, Index extra = 4) {
  return random_input_size(std::vector{shape}, rng, extra);
}

/// Plain 1x1, then each option alone at a value where it bites, then all of them; never empty, for
/// any rank.
template <int Rank>
std::vector<ConvShape<Rank>> edge_shapes() {
  PerAxis<Rank> start, end;
  for (int axis = 0; axis < Rank; ++axis) start[axis] = 2 - axis, end[axis] = axis - 1;
  const Padding<Rank> uneven = Padding<Rank>::sides(start, end);
  return {{.out = 1, .in = 1},
          {.out = 2, .in = 3, .kernel_size = 3, .bias = true},
          {.out = 3, .in = 2, .kernel_size = 2, .padding = 1},
          {.out = 2, .in = 2, .kernel_size = 3, .stride = 2, .padding = 1, .bias = true},
          {.out = 2, .in = 1, .kernel_size = 2, .stride = 3},
          {.out = 1, .in = 2, .kernel_size = 3, .dilation = 2, .bias = true},
          {.out = 2, .in = 2, .kernel_size = 3, .padding = -1},
          {.out = 2, .in = 2, .kernel_size = 2, .padding = uneven, .bias = true},
          {.out = 4, .in = 4, .kernel_size = 3, .padding = 1, .groups = 4},
          {.out = 6, .in = 4, .kernel_size = 2, .groups = 2, .bias = true},
          {.out = 4,
           .in = 6,
           .kernel_size = 3,
           .stride = 2,
           .padding = uneven,
           .dilation = 2,
           .groups = 2,
           .bias = true}};
}

/// Forms joined without weights, as expressions are.
template <int Rank>
Form<Rank> joined(Join join, const std::vector<Form<Rank>>& parts) {
  std::vector<detail::AnyForm> trees;
  for (const Form<Rank>& part : parts) trees.push_back(part.tree());
  return Form<Rank>(detail::AnyForm(join, trees));
}

/// Edge shapes, then `count` random ones.
template <int Rank>
std::vector<ConvShape<Rank>> all_shapes(Rng& rng, int count) {
  std::vector<ConvShape<Rank>> shapes = edge_shapes<Rank>();
  for (int n = 0; n < count; ++n) shapes.push_back(random_shape<Rank>(rng));
  return shapes;
}

/// The sum of products of two batches.
template <class Scalar, int Rank>
Scalar inner_product(const FeatureMap<Scalar, Rank>& x, const FeatureMap<Scalar, Rank>& y) {
  REQUIRE(x.shape() == y.shape());
  Scalar sum(0);
  for (std::size_t n = 0; n < x.values().size(); ++n) sum = sum + x.values()[n] * y.values()[n];
  return sum;
}

/// What an exception of this type says, to look for numbers in it.
template <class Exception, class Call>
std::string message_of(Call&& call) {
  try {
    call();
  } catch (const Exception& thrown) {
    return thrown.what();
  }
  FAIL("nothing was thrown");
  return "";
}

}  // namespace concertina::test
