// The adjoint of a layer: against the definition, by hand, as a layer, and in products.
// SPDX-License-Identifier: Apache-2.0
#include <concertina/transposed.hpp>

#include <concertina/layers.hpp>
#include <concertina/modular.hpp>
#include <concertina/random.hpp>
#include <concertina/verify.hpp>

#include "support.hpp"

#include <algorithm>
#include <cstddef>
#include <optional>
#include <variant>
#include <vector>

namespace concertina::test {
namespace {

template <int Rank>
struct Pair {
  Conv<PrimeField, Rank> layer, linear;  // the same but for the bias
};

template <int Rank>
Pair<Rank> random_pair(ConvShape<Rank> shape, Rng& rng) {
  Conv<PrimeField, Rank> layer(shape);
  fill_random(layer.weight(), rng);
  fill_random(layer.bias(), rng);
  shape.bias = false;
  return {layer, {shape, {layer.weight().begin(), layer.weight().end()}}};
}

template <int Rank>
FeatureMap<PrimeField, Rank> random_map(const MapShape<Rank>& shape, Rng& rng) {
  FeatureMap<PrimeField, Rank> map(shape);
  fill_random(map.values(), rng);
  return map;
}

/// The smallest extent that the layer takes to this many positions, by trying them all.
template <int Rank>
std::optional<Index> smallest_extent(const ConvShape<Rank>& shape, Index positions, int axis) {
  for (Index size = 1; counted_positions(shape, size, axis) <= positions; ++size) {
    if (counted_positions(shape, size, axis) == positions) return size;
  }
  return std::nullopt;
}

TEMPLATE_TEST_CASE_SIG("<F x, y> == <x, transposed(F)(y)> for every input size of F",
                       "[transposed]", ((int Rank), Rank), 0, 1, 2, 3) {
  Rng rng(1);
  for (const ConvShape<Rank>& shape : all_shapes<Rank>(rng, 40)) {
    INFO(to_string(shape));
    const auto [layer, linear] = random_pair(shape, rng);
    const PerAxis<Rank> size = random_input_size(shape, rng);
    const auto x = random_map<Rank>({.batch = 2, .channels = shape.in, .size = size}, rng);
    const auto y = random_map<Rank>(layer(x).shape(), rng);
    CHECK(inner_product(linear(x), y) == inner_product(x, transposed(layer)(y, size)));
  }
}

TEMPLATE_TEST_CASE_SIG("without a size it is the smallest that F takes there", "[transposed]",
                       ((int Rank), Rank), 0, 1, 2, 3) {
  Rng rng(2);
  for (const ConvShape<Rank>& shape : all_shapes<Rank>(rng, 40)) {
    const auto adjoint = transposed(small_integers<float>(shape, rng));
    PerAxis<Rank> from, to;
    bool exists = true;
    for (int axis = 0; axis < Rank; ++axis) {
      from[axis] = random_index(rng, 1, 5);
      const auto smallest = smallest_extent(shape, from[axis], axis);
      exists = exists && smallest;
      to[axis] = smallest.value_or(0);
    }
    INFO(to_string(shape) << " from " << to_string(from));
    const auto y = small_integers<float, Rank>({.channels = shape.out, .size = from}, rng);
    if (exists) {
      CHECK(adjoint.output_size(from) == to);
      CHECK(adjoint(y).shape() == MapShape<Rank>{.channels = shape.in, .size = to});
      CHECK(adjoint(y) == adjoint(y, to));
    } else {
      CHECK_THROWS_AS(adjoint.output_size(from), ShapeError);
      CHECK_THROWS_AS(adjoint(y), ShapeError);
    }
  }
}

TEST_CASE("a stride spreads numbers, by hand", "[transposed]") {
  const Conv1d<int> layer({.out = 1, .in = 1, .kernel_size = 3, .stride = 2}, {1, 2, 3});
  const FeatureMap<int, 1> y({.size = 2}, {1, 10});
  CHECK(transposed(layer)(y) == FeatureMap<int, 1>({.size = 5}, {1, 2, 13, 20, 30}));
  CHECK(transposed(layer)(y, 6) == FeatureMap<int, 1>({.size = 6}, {1, 2, 13, 20, 30, 0}));
  CHECK(transposed(layer, {100})(y, 6) ==
        FeatureMap<int, 1>({.size = 6}, {101, 102, 113, 120, 130, 100}));
}

TEST_CASE("groups exchange their channels, by hand", "[transposed]") {
  // PyTorch's ConvTranspose1d(2, 4, 1, groups=2): channel 0 writes channels 0 and 1, channel 1
  // writes 2 and 3.
  const Conv1d<int> layer({.out = 2, .in = 4, .groups = 2}, {1, 2, 3, 4});
  const FeatureMap<int, 1> y({.channels = 2}, {1, 10});
  CHECK(transposed(layer)(y) == FeatureMap<int, 1>({.channels = 4}, {1, 2, 30, 40}));
}

TEST_CASE("sizes are PyTorch's", "[transposed]") {
  const auto sizes = [](const ConvShape<2>& shape) { return transposed(Conv2d<float>(shape)); };
  const auto unet = sizes({.out = 64, .in = 32, .kernel_size = 2, .stride = 2});
  CHECK(unet.output_size({28, 14}) == PerAxis<2>{56, 28});
  const auto gan = sizes({.out = 8, .in = 4, .kernel_size = {4, 3}, .stride = 2, .padding = 1});
  CHECK(gan.output_size(7) == PerAxis<2>{14, 13});
  CHECK(gan({{.channels = 8, .size = 7}, std::vector<float>(8 * 49)}, {15, 14}).shape().size ==
        PerAxis<2>{15, 14});
}

TEMPLATE_TEST_CASE_SIG("twice transposed is F without its bias", "[transposed]", ((int Rank), Rank),
                       0, 1, 2, 3) {
  Rng rng(3);
  for (const ConvShape<Rank>& shape : all_shapes<Rank>(rng, 10)) {
    const auto [layer, linear] = random_pair(shape, rng);
    const auto twice = transposed(transposed(layer));
    CHECK(twice.shape() == linear.shape());
    CHECK(twice == linear);
  }
}

TEMPLATE_TEST_CASE_SIG("for stride 1 it is a layer", "[transposed]", ((int Rank), Rank), 0, 1, 2,
                       3) {
  Rng rng(4);
  for (ConvShape<Rank> shape : all_shapes<Rank>(rng, 40)) {
    INFO(to_string(shape));
    if (shape.stride != 1) {
      CHECK_THROWS_AS(transposed(Conv<int, Rank>(shape)).as_conv(), ShapeError);
      shape.stride = 1;
    }
    const auto [layer, linear] = random_pair(shape, rng);
    std::vector<PrimeField> bias(shape.bias ? static_cast<std::size_t>(shape.in) : 0);
    fill_random(std::span(bias), rng);
    const auto adjoint = transposed(layer, bias);
    const auto y = random_map<Rank>({.batch = 2, .channels = shape.out, .size = 5}, rng);
    bool exists = true;
    for (int axis = 0; axis < Rank; ++axis) exists = exists && smallest_extent(shape, 5, axis);
    if (exists) {
      CHECK(adjoint.as_conv()(y) == adjoint(y));
    } else {
      CHECK_THROWS_AS(adjoint.as_conv()(y), ShapeError);
    }
    CHECK(transposed(transposed(layer).as_conv()).as_conv() == linear);
  }
}

TEMPLATE_TEST_CASE_SIG("transposed(A) * transposed(B) == transposed(B * A)", "[transposed]",
                       ((int Rank), Rank), 0, 1, 2, 3) {
  Rng rng(5);
  int compared = 0;
  for (const ConvShape<Rank>& shape : all_shapes<Rank>(rng, 40)) {
    const ConvShape<Rank> after = unpadded(random_shape_after(shape, rng));
    const auto [a, linear_a] = random_pair(shape, rng);
    const auto [b, linear_b] = random_pair(after, rng);
    INFO(to_string(shape) << ", " << to_string(after));
    std::vector<PrimeField> bias(static_cast<std::size_t>(shape.in));
    fill_random(std::span(bias), rng);
    const Transposed<PrimeField, Rank> product = transposed(a, bias) * transposed(b);
    CHECK(product == transposed(b * a, bias));
    CHECK(product == transposed(contract(linear_b * linear_a), bias));
    CHECK_FALSE(product == transposed(b * a));
    const auto y = random_map<Rank>({.batch = 2, .channels = after.out, .size = 3}, rng);
    try {
      const auto x = transposed(a, bias)(transposed(b)(y));
      CHECK(product(y) == x);
      ++compared;
    } catch (const ShapeError&) {  // paddings that leave no map
    }
  }
  CHECK(compared > 20);
}

// ---- products -----------------------------------------------------------------------------------

/// PyTorch's ConvTranspose from its definition: each element is added where its taps reach.
template <class Scalar, int Rank>
FeatureMap<Scalar, Rank> spread_by_definition(const Conv<Scalar, Rank>& layer,
                                              const std::vector<Scalar>& bias,
                                              const PerAxis<Rank>& output_padding,
                                              const FeatureMap<Scalar, Rank>& y) {
  const ConvShape<Rank>& f = layer.shape();
  PerAxis<Rank> size;
  for (int axis = 0; axis < Rank; ++axis) {
    size[axis] = (y.shape().size[axis] - 1) * f.stride[axis] - f.padding.start[axis] -
                 f.padding.end[axis] + f.dilation[axis] * (f.kernel_size[axis] - 1) +
                 output_padding[axis] + 1;
    if (size[axis] < 1) throw ShapeError("an empty map");
  }
  FeatureMap<Scalar, Rank> x({.batch = y.shape().batch, .channels = f.in, .size = size});
  const Index pixels = numel(size), in = f.in / f.groups, taps = numel(f.kernel_size);
  for (std::size_t i = 0; i < x.values().size() && !bias.empty(); ++i) {
    x.values()[i] = bias[static_cast<std::size_t>(static_cast<Index>(i) / pixels % f.in)];
  }
  const Scalar* from = y.values().data();
  for (Index n = 0; n < y.shape().batch; ++n) {
    for (Index o = 0; o < f.out; ++o) {
      detail::for_each_position(y.shape().size, [&](const PerAxis<Rank>& j) {
        const Scalar element = *from++;
        detail::for_each_position(f.kernel_size, [&](const PerAxis<Rank>& a) {
          PerAxis<Rank> i;
          for (int axis = 0; axis < Rank; ++axis) {
            i[axis] = j[axis] * f.stride[axis] - f.padding.start[axis] + a[axis] * f.dilation[axis];
            if (i[axis] < 0 || i[axis] >= size[axis]) return;
          }
          for (Index c = 0; c < in; ++c) {
            const Index channel = o / (f.out / f.groups) * in + c;
            Scalar& to = x.values()[static_cast<std::size_t>((n * f.in + channel) * pixels +
                                                             detail::flat(i, size))];
            to = to + layer.weight()[static_cast<std::size_t>((o * in + c) * taps +
                                                              detail::flat(a, f.kernel_size))] *
                          element;
          }
        });
      });
    }
  }
  return x;
}

/// A layer, of stride 1, or a transposed one, as its F, bias and output padding.
template <int Rank>
struct Stage {
  bool transposed;
  Conv<PrimeField, Rank> layer;
  std::vector<PrimeField> bias = {};
  PerAxis<Rank> output_padding = 0;

  TransposedExpr<PrimeField, Rank> expression() const {
    if (transposed) return concertina::transposed(layer, bias, output_padding);
    return TransposedExpr<PrimeField, Rank>(Expr<PrimeField, Rank>(layer));
  }
  FeatureMap<PrimeField, Rank> operator()(const FeatureMap<PrimeField, Rank>& x) const {
    return transposed ? spread_by_definition(layer, bias, output_padding, x) : layer(x);
  }
};

/// One to three layers of any options, at least one of them transposed. Without a bias before a
/// stride, or with one of zeros, and then half the kernels as large as their stride.
template <int Rank>
std::vector<Stage<Rank>> random_stages(Rng& rng, bool with_zeros = false) {
  const Index count = random_index(rng, 1, 3), adjoint = random_index(rng, 0, count - 1);
  std::vector<Stage<Rank>> stages;
  Index channels = 0;
  for (Index n = 0; n < count; ++n) {
    const Largest small{.channels = 2, .groups = 2, .stride = 3, .dilation = 2};
    ConvShape<Rank> shape = random_shape<Rank>(rng, small);
    const bool transposed = n == adjoint || random_index(rng, 0, 2) == 0;
    Index &in = transposed ? shape.out : shape.in, &out = transposed ? shape.in : shape.out;
    if (n > 0) {
      const Index width = out / shape.groups;
      while (channels % shape.groups != 0) --shape.groups;
      in = channels;
      out = width * shape.groups;
    }
    channels = out;
    PerAxis<Rank> output_padding = 0;
    std::vector<PrimeField> bias;
    const bool passes = with_zeros && random_index(rng, 0, 1) == 0;
    if (transposed && passes) {
      shape.kernel_size = shape.stride;
      shape.dilation = 1;
      shape.padding = 0;
    }
    if (transposed) {
      for (int axis = 0; axis < Rank && !passes; ++axis) {
        output_padding[axis] =
            random_index(rng, 0, std::max(shape.stride[axis], shape.dilation[axis]) - 1);
      }
      if (shape.stride != 1) {
        for (Stage<Rank>& before : stages) {
          if (with_zeros) {
            std::ranges::fill(before.bias, PrimeField(0));
            std::ranges::fill(before.layer.bias(), PrimeField(0));
          } else {
            before.bias.clear();
            before.layer = random_pair(before.layer.shape(), rng).linear;
          }
        }
      }
      if (shape.bias) bias.resize(static_cast<std::size_t>(shape.in));
      fill_random(std::span(bias), rng);
    } else {
      shape.stride = 1;
    }
    stages.push_back({transposed, random_pair(shape, rng).layer, bias, output_padding});
  }
  return stages;
}

template <int Rank>
TransposedExpr<PrimeField, Rank> product_of(const std::vector<Stage<Rank>>& stages) {
  TransposedExpr<PrimeField, Rank> expression = stages.front().expression();
  for (std::size_t n = 1; n < stages.size(); ++n) expression = stages[n].expression() * expression;
  return expression;
}

struct Tally {
  int chains = 0, exact = 0, bordered = 0;
  int exact_here = 0;  ///< and not at every size
};

/// Applies stages and their contraction to a map of this size; whether every map on the way was a
/// map.
template <int Rank>
bool check(const std::vector<Stage<Rank>>& stages, Index extent, Rng& rng, Tally& tally) {
  const TransposedExpr<PrimeField, Rank> expression = product_of(stages);
  const ConvShape<Rank>& first = stages.front().layer.shape();
  const MapShape<Rank> shape{
      .batch = 2, .channels = stages.front().transposed ? first.out : first.in, .size = extent};
  const auto y = random_map<Rank>(shape, rng);
  FeatureMap<PrimeField, Rank> x = y;
  try {
    for (const Stage<Rank>& stage : stages) x = stage(x);
  } catch (const ShapeError&) {
    return false;
  }
  INFO(to_string(Form(expression.dense()))
       << " of stride " << to_string(expression.stride()) << " on a map of size " << extent);
  CHECK(expression(y) == x);
  CHECK(expression.output_size(shape.size) == x.shape().size);
  const Transposed<PrimeField, Rank> whole = contract(expression, interior_only);
  CHECK(whole.layer().shape().stride == expression.stride());
  const FeatureMap<PrimeField, Rank> z = whole(y);
  REQUIRE(z.shape() == x.shape());
  const Exactness<Rank> here = exactness(expression, shape.size), every = exactness(expression);
  PerAxis<Rank> start = 0, end = 0;  // of what differs within the border
  bool outside = false;
  std::size_t at = 0;
  for (Index map = 0; map < 2 * x.shape().channels; ++map) {
    detail::for_each_position(x.shape().size, [&](const PerAxis<Rank>& position) {
      const bool same = z.values()[at] == x.values()[at];
      ++at;
      if (same) return;
      bool covered = false;
      for (int axis = 0; axis < Rank; ++axis) {
        const Index from_start = position[axis] + 1,
                    from_end = x.shape().size[axis] - position[axis];
        covered = covered || from_start <= here.start[axis] || from_end <= here.end[axis];
        if (from_start <= here.start[axis]) start[axis] = std::max(start[axis], from_start);
        if (from_end <= here.end[axis]) end[axis] = std::max(end[axis], from_end);
      }
      outside = outside || !covered;
    });
  }
  CHECK_FALSE(outside);
  CHECK(start == here.start);
  CHECK(end == here.end);
  for (int axis = 0; axis < Rank; ++axis) {
    CHECK(here.start[axis] <= every.start[axis]);
    CHECK(here.end[axis] <= every.end[axis]);
  }
  if (every) {
    CHECK(contract(expression) == whole);
  } else {
    CHECK_THROWS_AS(contract(expression), InexactError);
  }
  const Border<Rank> named{.input_size = shape.size};
  if (here) {
    CHECK(contract(expression, named) == whole);
  } else {
    CHECK_THROWS_AS(contract(expression, named), InexactError);
  }
  ++tally.chains;
  ++(here ? tally.exact : tally.bordered);
  if (here && !every) ++tally.exact_here;
  return true;
}

TEMPLATE_TEST_CASE_SIG(
    "layers and transposed layers in a row act as their contraction, off a border as stated",
    "[transposed]", ((int Rank), Rank), 1, 2, 3) {
  Rng rng(6);
  Tally tally;
  while (tally.chains < (Rank == 1 ? 3000 : Rank == 2 ? 1500 : 300)) {
    const auto stages = random_stages<Rank>(rng);
    for (Index extent = 1; extent < (Rank == 3 ? 3 : 5); ++extent)
      check(stages, extent, rng, tally);
  }
  CHECK(tally.exact > tally.chains / 5);
  CHECK(tally.bordered > tally.chains / 5);
  CHECK(tally.exact_here > 0);
}

TEST_CASE("the worst border over all sizes is that of some size", "[transposed]") {
  Rng rng(15);
  int bordered = 0;
  for (int n = 0; n < 400; ++n) {
    const TransposedExpr<PrimeField, 1> expression = product_of(random_stages<1>(rng));
    INFO(to_string(Form(expression.dense())) << " of stride " << to_string(expression.stride()));
    const Exactness<1> worst = exactness(expression);
    Index start = 0, end = 0;
    for (Index size = 1; size <= 60; ++size) {
      try {
        const Exactness<1> here = exactness(expression, PerAxis<1>(size));
        start = std::max(start, here.start[0]);
        end = std::max(end, here.end[0]);
      } catch (const ShapeError&) {  // paddings that leave no map
      }
    }
    CHECK(worst.start[0] == start);
    CHECK(worst.end[0] == end);
    if (!worst) ++bordered;
  }
  CHECK(bordered > 50);
}

TEST_CASE("a batch norm after a transposed convolution, by hand", "[transposed]") {
  // PyTorch's ConvTranspose2d(4, 6, 1, groups=2) and BatchNorm2d(6): the factors belong to the
  // channels that are written, which are F's input channels.
  const Conv2d<double> f({.out = 4, .in = 6, .groups = 2}, {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12});
  const auto norm = batch_norm(BatchNorm<double>{.running_mean = {0, 1, 0, 0, 1, 0},
                                                 .running_var = {1, 1, 4, 1, 1, 1},
                                                 .weight = {1, 2, 2, 4, 5, 6},
                                                 .bias = {0, 0, 0, 0, 0, 7},
                                                 .eps = 0});
  const Transposed<double, 2> fused = norm * transposed(f, {1, 1, 1, 1, 1, 1});
  CHECK(fused.layer() == Conv2d<double>(f.shape(), {1, 4, 3, 4, 10, 6, 28, 40, 54, 40, 55, 72}));
  CHECK(std::ranges::equal(fused.bias(), std::vector<double>{1, 0, 1, 4, 0, 13}));
}

TEST_CASE("output padding is zeros and the bias, and a later layer reads it", "[transposed]") {
  const Conv1d<int> f({.out = 1, .in = 1, .kernel_size = 3, .stride = 2, .padding = 1}, {1, 2, 3});
  const Conv1d<int> next({.out = 1, .in = 1, .kernel_size = 3, .padding = Padding<1>::sides(0, 1)},
                         {1, 1, 1});
  const FeatureMap<int, 1> y({.size = 2}, {1, 10});
  const auto padded = transposed(f, {100}, 1);
  CHECK(transposed(f)(y) == FeatureMap<int, 1>({.size = 3}, {2, 13, 20}));
  CHECK(padded.output_size(2) == PerAxis<1>(4));
  CHECK(padded(y) == FeatureMap<int, 1>({.size = 4}, {102, 113, 120, 130}));
  CHECK_FALSE(padded == transposed(f, {100}));
  // Without output padding the position after the last, which the sum reads, has been cut off.
  CHECK_FALSE(exactness(next * transposed(f)));
  CHECK(exactness(next * transposed(f, {}, 1)));
  CHECK(contract(next * transposed(f, {}, 1))(y) == FeatureMap<int, 1>({.size = 3}, {35, 63, 50}));
  CHECK_FALSE(exactness(next * padded));  // the padding is zero, and not the bias
  // A dilation admits more than the stride does.
  const Conv1d<int> wide({.out = 1, .in = 1, .kernel_size = 2, .dilation = 4}, {1, 2});
  CHECK(transposed(wide, {}, 3)(y) ==
        FeatureMap<int, 1>({.size = 9}, {1, 10, 0, 0, 2, 20, 0, 0, 0}));
  for (const Index wrong : {-1, 4}) CHECK_THROWS_AS(transposed(wide, {}, wrong), ShapeError);
}

TEST_CASE("sums, scales and permutations join transposed layers", "[transposed]") {
  Rng rng(7);
  const auto f =
      small_integers<int, 2>({.out = 3, .in = 4, .kernel_size = {2, 3}, .stride = 2}, rng);
  const auto g = small_integers<int, 2>(
      {.out = 3, .in = 4, .kernel_size = {4, 1}, .stride = 2, .padding = {1, -1}}, rng);
  const auto square =
      small_integers<int, 2>({.out = 4, .in = 4, .kernel_size = 3, .padding = 1}, rng);
  const auto point = small_integers<int, 2>({.out = 4, .in = 4}, rng);
  const auto before =
      small_integers<int, 2>({.out = 3, .in = 2, .kernel_size = 2, .padding = 1}, rng);
  const auto y = small_integers<int, 2>({.batch = 2, .channels = 3, .size = {3, 4}}, rng);
  const auto x = spread_by_definition<int, 2>(f, {}, 0, y);
  const auto sum = [](FeatureMap<int, 2> a, const FeatureMap<int, 2>& b) {
    for (std::size_t i = 0; i < a.values().size(); ++i) a.values()[i] += b.values()[i];
    return a;
  };
  const auto acts_as = [](const TransposedExpr<int, 2>& expression, const FeatureMap<int, 2>& from,
                          const FeatureMap<int, 2>& to) {
    const PerAxis<2>& size = from.shape().size;
    const Transposed<int, 2> whole = contract(expression);
    return whole(from) == to && expression(from) == to &&
           contract(expression, exact_at(size[0], size[1])) == whole;
  };
  CHECK(acts_as((square + point) * transposed(f), y, sum(square(x), point(x))));
  CHECK(
      acts_as(transposed(f) + transposed(g), y, sum(x, spread_by_definition<int, 2>(g, {}, 0, y))));
  CHECK(acts_as(3 * transposed(f), y, sum(x, sum(x, x))));
  CHECK(acts_as(channel_shuffle<int>(4, 2) * (identity<int>(4) * transposed(f)), y,
                Conv2d<int>({.out = 4, .in = 4}, {1, 0, 0, 0, 0, 0, 1, 0,  //
                                                  0, 1, 0, 0, 0, 0, 0, 1})(x)));
  const auto z = small_integers<int, 2>({.channels = 2, .size = {4, 3}}, rng);
  CHECK(acts_as(transposed(f) * before * identity<int>(2), z,
                spread_by_definition<int, 2>(f, {}, 0, before(z))));
  CHECK(acts_as(point * (transposed(f) * Conv2d<int>(before)), z,
                point(spread_by_definition<int, 2>(f, {}, 0, before(z)))));
  CHECK(acts_as(ConvView<const int, 2>(point) * transposed(f), y, point(x)));
}

TEST_CASE("a chain of floats is rounded once where it is computed in double", "[transposed]") {
  Rng rng(8);
  const auto random = [&](const ConvShape<2>& shape) {
    Conv2d<float> layer(shape);
    for (float& element : layer.weight()) element = static_cast<float>(random_uniform(rng, 1));
    for (float& element : layer.bias()) element = static_cast<float>(random_uniform(rng, 1));
    return layer;
  };
  const auto f = random({.out = 5, .in = 4, .kernel_size = 3, .stride = 2});
  const auto before = random({.out = 5, .in = 3, .kernel_size = 2, .padding = 1}),
             after = random({.out = 2, .in = 4, .kernel_size = 2, .bias = true});
  const std::vector<float> bias{0.1F, 0.2F, 0.3F, 0.4F};
  const Transposed<float, 2> whole = contract<double>(after * transposed(f, bias) * before);
  const auto wide = after.cast<double>(), wide_before = before.cast<double>();
  const Transposed<double, 2> exact =
      wide * transposed(f.cast<double>(), {bias.begin(), bias.end()}) * wide_before;
  CHECK(whole.layer() == exact.layer().cast<float>());
  for (std::size_t o = 0; o < 2; ++o) CHECK(whole.bias()[o] == static_cast<float>(exact.bias()[o]));
  CHECK_FALSE(Transposed<float, 2>(after * transposed(f, bias) * before) == whole);
}

TEST_CASE("a bias before a stride is refused unless it is zero", "[transposed]") {
  const auto strided = transposed(
      Conv1d<double>({.out = 2, .in = 2, .kernel_size = 2, .stride = 2}, {1, 2, 3, 4, 5, 6, 7, 8}));
  const ConvShape<1> point{.out = 2, .in = 2, .bias = true};
  const Conv1d<double> biased(point, {1, 2, 3, 4}, {0, 5}), zero(point, {1, 2, 3, 4}, {0, 0});
  BatchNorm<double> norm{.running_mean = {0, 0}, .running_var = {1, 1}, .bias = {0, 1}, .eps = 0};

  CHECK_THAT(message_of<InexactError>([&] { strided* biased; }),
             Catch::Contains("conv1d 2->2 @1 +bias") && Catch::Contains("varies"));
  CHECK_THROWS_AS(strided * transposed(biased, {0, 1}), InexactError);
  CHECK_THROWS_AS(strided * batch_norm(norm), InexactError);
  norm.bias = {0, 0};
  const FeatureMap<double, 1> y({.channels = 2, .size = 2}, {1, 2, 3, 4});
  CHECK(contract(strided * batch_norm(norm))(y) == strided(y));
  CHECK(contract(strided * zero)(y) == strided(zero(y)));
  CHECK(contract(strided * transposed(zero, {0, 0}))(y) == strided(transposed(zero)(y)));

  // For stride 1 a transposed layer is one of those that keep a bias, where they pad nothing.
  const Conv1d<double> cropped({.out = 2, .in = 2, .kernel_size = 2, .padding = 1},
                               {1, 2, 3, 4, 5, 6, 7, 8});
  CHECK(contract(transposed(cropped) * biased)(y) == transposed(cropped)(biased(y)));
  const Conv1d<double> plain({.out = 2, .in = 2, .kernel_size = 2}, {1, 2, 3, 4, 5, 6, 7, 8});
  CHECK_THAT(message_of<InexactError>([&] { contract(transposed(plain) * biased); }),
             Catch::Contains("a border of 1 outputs at the start and 1 at the end"));
  CHECK_THAT(message_of<InexactError>([&] { contract(transposed(plain) * biased, exact_at(9)); }),
             Catch::Contains("at input size 9"));
}

TEST_CASE("layers with strides of their own do not join transposed ones", "[transposed]") {
  const auto up = transposed(Conv1d<int>({.out = 2, .in = 2, .kernel_size = 2, .stride = 2}));
  const Conv1d<int> down({.out = 2, .in = 2, .stride = 3}), other({.out = 3, .in = 3});
  CHECK_THAT(message_of<ShapeError>([&] { up* down; }), Catch::Contains("conv1d 2->2 @1 s3"));
  CHECK_THAT(message_of<ShapeError>([&] { down* up; }), Catch::Contains("conv1d 2->2 @1 s3"));
  CHECK_THROWS_AS(up + transposed(down), ShapeError);
  CHECK_THROWS_AS(up * other, ShapeError);
  CHECK_THROWS_AS(other * up, ShapeError);
}

template <class F, class G>
concept Multiplies = requires(const F& f, const G& g) { f* g; };
static_assert(Multiplies<Conv1d<int>, Transposed<int, 1>>);
static_assert(Multiplies<TransposedExpr<int, 1>, Expr<int, any_rank>>);
static_assert(!Multiplies<Conv2d<int>, Transposed<int, 1>>);
static_assert(!Multiplies<Transposed<int, 1>, Conv1d<float>>);

// ---- gradients ----------------------------------------------------------------------------------

/// The sum of products of all elements of two layers, biases included.
template <int Rank>
PrimeField inner_product(const Conv<PrimeField, Rank>& f, const Conv<PrimeField, Rank>& g,
                         std::span<const PrimeField> bias = {},
                         std::span<const PrimeField> other = {}) {
  REQUIRE(f.shape() == g.shape());
  REQUIRE(bias.size() == other.size());
  PrimeField sum(0);
  const auto add = [&](std::span<const PrimeField> a, std::span<const PrimeField> b) {
    for (std::size_t i = 0; i < a.size(); ++i) sum = sum + a[i] * b[i];
  };
  add(f.weight(), g.weight());
  add(f.bias(), g.bias());
  add(bias, other);
  return sum;
}

template <int Rank>
PrimeField inner_product(const Transposed<PrimeField, Rank>& f,
                         const Transposed<PrimeField, Rank>& g) {
  return inner_product(f.layer(), g.layer(), f.bias(), g.bias());
}

TEMPLATE_TEST_CASE_SIG(
    "gradients are those of each layer in its own layout: exact along any direction",
    "[transposed]", ((int Rank), Rank), 1, 2, 3) {
  // The contraction is linear in each layer, so <dL/dF, F(A + V) - F(A)> == <dL/dA, V>. Biases of
  // zeros stand before a stride, and stay.
  Rng rng(9);
  for (int n = 0; n < 120; ++n) {
    const std::vector<Stage<Rank>> stages = random_stages<Rank>(rng, n % 2 == 1);
    const TransposedExpr<PrimeField, Rank> expression = product_of(stages);
    INFO(to_string(Form(expression.dense())) << " of stride " << to_string(expression.stride()));
    TransposedContraction contraction(expression, interior_only);
    const Transposed<PrimeField, Rank> whole = contraction.forward(expression);
    CHECK(whole == contract(expression, interior_only));
    REQUIRE(contraction.shape() == whole.layer().shape());
    Conv<PrimeField, Rank> written(contraction.shape());
    std::vector<PrimeField> shifts(whole.bias().size());
    contraction.forward(expression, written, shifts);
    CHECK(std::ranges::equal(written.weight(), whole.layer().weight()));
    CHECK(std::ranges::equal(shifts, whole.bias()));

    const auto random_like = [&](const Conv<PrimeField, Rank>& layer,
                                 std::span<const PrimeField> bias) {
      std::vector<PrimeField> random(bias.size());
      if (!detail::all_zero(bias)) fill_random(std::span(random), rng);
      return transposed(random_pair(layer.shape(), rng).linear, random);
    };
    const auto gradient = random_like(whole.layer(), whole.bias());
    const auto gradients = contraction.backward(expression, gradient);
    REQUIRE(gradients.size() == stages.size());
    for (std::size_t l = 0; l < stages.size(); ++l) {
      std::vector<Stage<Rank>> moved = stages;
      PrimeField along;
      if (stages[l].transposed) {
        const Transposed adjoint =
            transposed(stages[l].layer, stages[l].bias, stages[l].output_padding);
        const auto direction = random_like(adjoint.layer(), adjoint.bias());
        along = inner_product(std::get<Transposed<PrimeField, Rank>>(gradients[l]), direction);
        for (std::size_t i = 0; i < direction.layer().weight().size(); ++i) {
          moved[l].layer.weight()[i] = moved[l].layer.weight()[i] + direction.layer().weight()[i];
        }
        for (std::size_t i = 0; i < direction.bias().size(); ++i) {
          moved[l].bias[i] = moved[l].bias[i] + direction.bias()[i];
        }
      } else {
        auto direction = random_pair(stages[l].layer.shape(), rng).layer;
        if (detail::all_zero(stages[l].layer.bias())) {
          std::ranges::fill(direction.bias(), PrimeField(0));
        }
        along = inner_product(std::get<Conv<PrimeField, Rank>>(gradients[l]), direction);
        for (std::size_t i = 0; i < direction.weight().size(); ++i) {
          moved[l].layer.weight()[i] = moved[l].layer.weight()[i] + direction.weight()[i];
        }
        for (std::size_t i = 0; i < direction.bias().size(); ++i) {
          moved[l].layer.bias()[i] = moved[l].layer.bias()[i] + direction.bias()[i];
        }
      }
      const auto further = contraction.forward(product_of(moved));
      CHECK(inner_product(gradient, further) == inner_product(gradient, whole) + along);
      static_cast<void>(contraction.forward(expression));
    }
  }
}

TEST_CASE("the gradient of a batch norm after a transposed layer goes on to its fields",
          "[transposed]") {
  const Conv1d<double> f({.out = 1, .in = 2, .kernel_size = 2, .stride = 2}, {1, 2, 3, 4});
  const BatchNorm<double> norm{.running_mean = {1, 2},
                               .running_var = {3, 5},
                               .weight = {0.5, -0.25},
                               .bias = {1, 2},
                               .eps = 0.125};
  const std::vector<double> bias{7, 8};
  const auto expression_of = [&](const BatchNorm<double>& values) {
    return batch_norm(values) * transposed(f, bias);
  };
  const auto expression = expression_of(norm);
  TransposedContraction contraction(expression);
  const Transposed<double, 1> whole = contraction.forward(expression);
  const auto gradient = transposed(Conv1d<double>(whole.layer().shape(), {1, -2, 3, 4}), {5, 6});
  const auto gradients = contraction.backward(expression, gradient);
  const auto map = *expression.dense().tree().parts()[1].leaf().channel_map();
  const ChannelMap<double> of_norm = map.backward(std::get<Conv1d<double>>(gradients[1]));
  const auto loss = [&](const BatchNorm<double>& values) {
    const Transposed<double, 1> at = expression_of(values);
    double sum = 0;
    for (std::size_t i = 0; i < 4; ++i)
      sum += at.layer().weight()[i] * gradient.layer().weight()[i];
    for (std::size_t i = 0; i < 2; ++i) sum += at.bias()[i] * gradient.bias()[i];
    return sum;
  };
  const auto difference = [&](std::vector<double> BatchNorm<double>::* field, std::size_t c) {
    BatchNorm<double> more = norm, less = norm;
    (more.*field)[c] += 1e-5;
    (less.*field)[c] -= 1e-5;
    return (loss(more) - loss(less)) / 2e-5;
  };
  for (std::size_t c = 0; c < 2; ++c) {
    CHECK(of_norm.weight[c] == Approx(difference(&BatchNorm<double>::weight, c)));
    CHECK(of_norm.bias[c] == Approx(difference(&BatchNorm<double>::bias, c)));
    CHECK(of_norm.mean[c] == Approx(difference(&BatchNorm<double>::running_mean, c)));
    CHECK(of_norm.variance[c] == Approx(difference(&BatchNorm<double>::running_var, c)));
  }
}

TEST_CASE("what a transposed contraction is written to has its shape and its bias's length",
          "[transposed]") {
  const Conv1d<int> f({.out = 1, .in = 2, .kernel_size = 2, .stride = 2}, {1, 2, 3, 4});
  const auto up = transposed(f, {5, 6}), without = transposed(f);
  TransposedContraction contraction(2 * up);
  Conv1d<int> layer(contraction.shape());
  std::vector<int> bias(2), none;
  contraction.forward(2 * up, layer, bias);
  CHECK(transposed(layer, bias) == transposed(Conv1d<int>(f.shape(), {2, 4, 6, 8}), {10, 12}));
  CHECK_THROWS_AS(contraction.forward(2 * up, layer, none), ShapeError);
  Conv1d<int> of_stride_1({.out = 1, .in = 2, .kernel_size = 2});
  CHECK_THROWS_AS(contraction.forward(2 * up, of_stride_1, bias), ShapeError);

  TransposedContraction linear(2 * without);
  linear.forward(2 * without, layer, none);
  CHECK(layer == Conv1d<int>(f.shape(), {2, 4, 6, 8}));
  CHECK_THROWS_AS(linear.forward(2 * without, layer, bias), ShapeError);
}

TEST_CASE("a bias of zeros before a stride that it cannot pass has no gradient", "[transposed]") {
  const auto up =
      transposed(Conv1d<int>({.out = 1, .in = 1, .kernel_size = 2, .stride = 2}, {3, 4}));
  const Conv1d<int> zero({.out = 1, .in = 1, .bias = true}, {5}, {0});
  TransposedContraction contraction(up * zero);
  const Transposed<int, 1> whole = contraction.forward(up * zero);
  CHECK(whole.layer().weight()[1] == 20);
  const auto gradients = contraction.backward(up * zero, whole);
  const auto& of_zero = std::get<Conv1d<int>>(gradients[0]);
  CHECK(of_zero.shape() == zero.shape());
  CHECK(of_zero.bias()[0] == 0);
  CHECK(of_zero.weight()[0] == 3 * 15 + 4 * 20);
}

TEST_CASE("behind a bias of zeros a transposed layer is trained as behind none", "[transposed]") {
  // A decoder as it is initialised: convolution, batch norm, kernel and stride 2.
  Rng rng(51);
  auto before = small_integers<double, 2>(
      {.out = 3, .in = 2, .kernel_size = 3, .padding = 1, .bias = true}, rng);
  std::ranges::fill(before.bias(), 0);
  ConvShape<2> shape = before.shape();
  shape.bias = false;
  const Conv2d<double> linear(shape, {before.weight().begin(), before.weight().end()});
  auto norm = BatchNorm<double>::initialize(3);
  norm.eps = 0;
  const auto scale = channel_scale<double>({1, 1, 1});
  for (const Index kernel : {2, 4}) {
    const auto f = small_integers<double, 2>(
        {.out = 3, .in = 2, .kernel_size = kernel, .stride = 2, .padding = kernel / 2 - 1}, rng);
    const auto up = transposed(f, {2, -3});
    const auto product = up * (batch_norm(norm) * before), without = up * (scale * linear);
    TransposedContraction contraction(product, interior_only), of_linear(without, interior_only);
    const Transposed<double, 2> whole = contraction.forward(product);
    CHECK(whole == of_linear.forward(without));
    const auto gradients = contraction.backward(product, whole);
    const auto expected =
        of_linear.backward(without, transposed(whole.layer(), {whole.bias()[0], whole.bias()[1]}));
    REQUIRE(gradients.size() == 3);
    for (std::size_t leaf = 0; leaf < 2; ++leaf) {
      const auto &own = std::get<Conv2d<double>>(gradients[leaf]),
                 &other = std::get<Conv2d<double>>(expected[leaf]);
      CHECK(std::ranges::equal(own.weight(), other.weight()));
      // Their kernel's taps differ, so no bias of another value would do.
      CHECK(std::ranges::all_of(own.bias(), [](double element) { return element == 0; }));
    }
    const auto& of_up = std::get<Transposed<double, 2>>(gradients[2]);
    CHECK(of_up == std::get<Transposed<double, 2>>(expected[2]));
    CHECK(std::ranges::equal(of_up.bias(), whole.bias()));
    CHECK(std::ranges::any_of(of_up.layer().weight(), [](double element) { return element != 0; }));
  }
}

TEST_CASE("which taps a bias passes decides for each channel what is trained", "[transposed]") {
  // Channel 0 has no bias and any taps, channel 1 a bias and equal ones.
  using F = PrimeField;
  Conv1d<F> conv({.out = 2, .in = 1, .bias = true}, {F(3), F(4)}, {F(0), F(5)});
  Conv1d<F> f({.out = 2, .in = 1, .kernel_size = 2, .stride = 2}, {F(6), F(7), F(8), F(8)});
  std::vector<F> bias{F(9)};
  const auto product = [&] { return transposed(f, bias) * conv; };
  const auto from = transposed(
      Conv1d<F>({.out = 1, .in = 1, .kernel_size = 2, .stride = 2}, {F(11), F(12)}), {F(13)});
  TransposedContraction contraction(product());
  const Transposed<F, 1> whole = contraction.forward(product());
  CHECK(whole.bias()[0] == F(9 + 8 * 5));
  const auto gradients = contraction.backward(product(), from);
  const auto& of_conv = std::get<Conv1d<F>>(gradients[0]);
  const auto& of_f = std::get<Transposed<F, 1>>(gradients[1]);
  const auto check = [&](F& element, F gradient) {
    const F kept = element;
    element = element + F(1);
    CHECK(inner_product(contraction.forward(product()), from) ==
          inner_product(whole, from) + gradient);
    element = kept;
  };
  check(conv.weight()[0], of_conv.weight()[0]);
  check(conv.weight()[1], of_conv.weight()[1]);
  check(conv.bias()[1], of_conv.bias()[1]);
  check(f.weight()[0], of_f.layer().weight()[0]);
  check(f.weight()[1], of_f.layer().weight()[1]);
  check(bias[0], of_f.bias()[0]);
  // The others have none: each alone would make the bias vary from position to position.
  for (F* const element : {&conv.bias()[0], &f.weight()[2], &f.weight()[3]}) {
    const F kept = *element;
    *element = kept + F(1);
    CHECK_THROWS_AS(contraction.forward(product()), InexactError);
    *element = kept;
  }
  CHECK(of_conv.bias()[0] == F(0));
  CHECK(of_f.layer().weight()[2] == F(0));
  CHECK(of_f.layer().weight()[3] == F(0));
}

TEST_CASE("a kept contraction is of one form and stride", "[transposed]") {
  const ConvShape<1> shape{.out = 2, .in = 2, .kernel_size = 2, .stride = 2};
  ConvShape<1> slower = shape;
  slower.stride = 3;
  const auto up = transposed(Conv1d<float>(shape)), other = transposed(Conv1d<float>(slower));
  const auto norm = channel_scale<float>({1, 2});
  TransposedContraction contraction(norm * up);
  CHECK_THROWS_AS(contraction.forward(up), ShapeError);
  CHECK_THROWS_AS(contraction.forward(norm * other), ShapeError);
  static_cast<void>(contraction.forward(norm * up));
  CHECK_THROWS_AS(contraction.backward(norm * up, other), ShapeError);
  CHECK_THROWS_AS(contraction.backward(norm * up, transposed(Conv1d<float>(shape), {1, 2})),
                  ShapeError);
  const Conv1d<float> padded({.out = 2, .in = 2, .kernel_size = 3, .padding = 1});
  CHECK_NOTHROW(TransposedContraction(padded * up));
  CHECK_THROWS_AS(TransposedContraction(padded * transposed(Conv1d<float>(shape), {1, 2})),
                  InexactError);
}

TEST_CASE("a bias of zeros equals none", "[transposed]") {
  const Linear<int> layer({.out = 1, .in = 2}, {1, 2});
  CHECK(transposed(layer) == transposed(layer, {0, 0}));
  CHECK_FALSE(transposed(layer) == transposed(layer, {0, 1}));
  CHECK_FALSE(transposed(layer) == transposed(-layer));
}

TEST_CASE("temporaries, views and products can be transposed", "[transposed]") {
  const Linear<int> layer({.out = 1, .in = 2}, {1, 2});
  const FeatureMap<int, 0> y({}, {3});
  CHECK(transposed(ConvView<const int, 0>(layer))(y) == transposed(layer)(y));
  CHECK(transposed(Linear<int>(layer))(y) == transposed(layer)(y));
  const Linear<int> twice({.out = 1, .in = 1}, {2});
  CHECK(transposed(twice * layer)(y) == FeatureMap<int, 0>({.channels = 2}, {6, 12}));
}

TEST_CASE("what cannot be transposed is refused with its numbers", "[transposed]") {
  const Conv1d<int> layer({.out = 2, .in = 3, .kernel_size = 3, .padding = 1});
  const Conv1d<int> strided({.out = 3, .in = 2, .kernel_size = 2, .stride = 2});
  const auto adjoint = transposed(layer);
  const FeatureMap<int, 1> y({.channels = 2, .size = 4}), wrong({.channels = 5, .size = 4});

  CHECK_THAT(message_of<ShapeError>([&] { transposed(layer, {1, 2}); }),
             Catch::Contains("2 elements instead of 3"));
  CHECK_THAT(message_of<ShapeError>([&] { adjoint(wrong); }),
             Catch::Contains("5 channels") && Catch::Contains("writes 2"));
  CHECK_THAT(message_of<ShapeError>([&] { adjoint(y, 6); }),
             Catch::Contains("size 4") && Catch::Contains("size 6"));
  const Conv1d<int> wide({.out = 2, .in = 3, .padding = 2});
  CHECK_THAT(message_of<ShapeError>([&] { transposed(wide)(y, 0); }),
             Catch::Contains("does not become one of size 0"));  // though 0 + 2 + 2 is 4
  CHECK_THROWS_AS(adjoint.output_size(0), ShapeError);
  CHECK_THAT(message_of<ShapeError>([&] { static_cast<void>(transposed(strided).as_conv()); }),
             Catch::Contains("s2"));
  CHECK_THROWS_AS(adjoint * adjoint, ShapeError);
  CHECK_THROWS_AS(contract(adjoint * transposed(strided, {1, 2})), InexactError);
  const Conv1d<int> padded({.out = 1, .in = 2, .kernel_size = 3, .padding = 1});
  CHECK_THROWS_AS(contract(adjoint * transposed(padded)), InexactError);
  CHECK_NOTHROW(transposed(contract(padded * layer, interior_only)));
}

}  // namespace
TEST_CASE("pixel shuffle undoes pixel unshuffle, and nearest upsampling repeats", "[transposed]") {
  Rng rng(41);
  const auto shuffle = pixel_shuffle<double, 2>(2, 3);
  const auto y = small_integers<double, 2>({.batch = 2, .channels = 18, .size = {2, 3}}, rng);
  const auto x = shuffle(y);
  REQUIRE(x.shape() == MapShape<2>{.batch = 2, .channels = 2, .size = {6, 9}});
  CHECK(pixel_unshuffle<double, 2>(2, 3)(x) == y);
  const auto conv =
      small_integers<double>(ConvShape<2>{.out = 18, .in = 4, .kernel_size = 3, .padding = 1}, rng);
  const auto z = small_integers<double, 2>({.batch = 2, .channels = 4, .size = {3, 4}}, rng);
  const Transposed<double, 2> both = contract(shuffle * conv);
  CHECK(both(z) == shuffle(conv(z)));

  const auto up = upsample_nearest<double, 2>(2, {2, 3});
  const auto small = small_integers<double, 2>({.batch = 1, .channels = 2, .size = {2, 2}}, rng);
  const auto large = up(small);
  REQUIRE(large.shape() == MapShape<2>{.batch = 1, .channels = 2, .size = {4, 6}});
  for (Index c = 0; c < 2; ++c) {
    for (Index i = 0; i < 4; ++i) {
      for (Index j = 0; j < 6; ++j) {
        CHECK(large.values()[static_cast<std::size_t>((c * 4 + i) * 6 + j)] ==
              small.values()[static_cast<std::size_t>((c * 2 + i / 2) * 2 + j / 3)]);
      }
    }
  }
}

TEST_CASE("a bias before a stride stands behind it where every position gets the same",
          "[transposed]") {
  Rng rng(42);
  const auto z = small_integers<int, 2>({.batch = 2, .channels = 3, .size = {3, 4}}, rng);
  auto conv = small_integers<int>(
      ConvShape<2>{.out = 8, .in = 3, .kernel_size = 3, .padding = 1, .bias = true}, rng);
  const auto after = small_integers<int>(ConvShape<2>{.out = 3, .in = 2, .bias = true}, rng);
  const auto padded =
      small_integers<int>(ConvShape<2>{.out = 3, .in = 8, .kernel_size = 3, .padding = 1}, rng);
  const auto up = upsample_nearest<int, 2>(8, {2, 3});
  conv.bias()[5] = 7;

  CHECK(contract(up * conv)(z) == up(conv(z)));
  const Transposed<int, 2> far = contract(up * upsample_nearest<int, 2>(8, {3, 1}) * conv);
  CHECK(far(z) == up(upsample_nearest<int, 2>(8, {3, 1})(conv(z))));
  // A padding after the bias reads zeros where the bias goes on.
  CHECK_THROWS_AS(contract(padded * (up * conv)), InexactError);

  const auto shuffle = pixel_shuffle<int, 2>(2, 2);
  std::ranges::fill(conv.bias().first(4), 5);
  std::ranges::fill(conv.bias().subspan(4), -3);
  CHECK(contract(shuffle * conv).bias()[1] == -3);
  CHECK(contract(shuffle * conv)(z) == shuffle(conv(z)));
  CHECK(contract(after * (shuffle * conv))(z) == after(shuffle(conv(z))));
  CHECK(contract((after * shuffle) * conv)(z) == after(shuffle(conv(z))));
  CHECK(contract(shuffle * channel_bias<int>({1, 1, 1, 1, 2, 2, 2, 2}))(conv(z)).values()[0] ==
        conv(z).values()[0] + 1);

  // Positions first, as ONNX's DepthToSpace has them.
  const auto order = channel_shuffle<int>(8, 4);
  auto other = conv;
  for (std::size_t c = 0; c < 8; ++c) other.bias()[c] = c % 2 == 0 ? 5 : -3;
  const FeatureMap<int, 2> expected = shuffle((order * Expr<int, 2>(other))(z));
  CHECK(contract(shuffle * order * other)(z) == expected);
  CHECK_THROWS_AS(contract(shuffle * order * conv), InexactError);

  conv.bias()[6] = 4;
  CHECK_THAT(message_of<InexactError>([&] { contract(shuffle * conv); }),
             Catch::Contains("the same for all positions"));
  CHECK_THROWS_AS(contract(shuffle * (conv + conv)), InexactError);
  // What other taps write too, or none, gets another sum.
  for (const PerAxis<2>& kernel : {PerAxis<2>{3, 2}, PerAxis<2>{1, 2}}) {
    Conv2d<int> sums({.out = 8, .in = 1, .kernel_size = kernel, .stride = 2});
    std::ranges::fill(sums.weight(), 1);
    CHECK_THROWS_AS(contract(transposed(sums) * conv), InexactError);
  }
  Conv2d<int> cropped({.out = 8, .in = 1, .kernel_size = 2, .stride = 2, .padding = 1});
  std::ranges::fill(cropped.weight(), 1);
  CHECK_THROWS_AS(contract(transposed(cropped) * conv), InexactError);
  CHECK_THROWS_AS(contract(transposed(cropped, {}, 1) * conv), InexactError);

  // Its gradient is that of the bias behind; the upsampling has none.
  TransposedContraction contraction(up * conv);
  const Transposed<int, 2> whole = contraction.forward(up * conv);
  const auto gradients = contraction.backward(up * conv, whole);
  CHECK(std::ranges::equal(std::get<Conv2d<int>>(gradients[0]).bias(), whole.bias()));
  CHECK(std::get<Transposed<int, 2>>(gradients[1]).bias().empty());
}

TEMPLATE_TEST_CASE_SIG("shuffles and upsampling after any layer are proved, and differentiated",
                       "[transposed]", ((int Rank), Rank), 1, 2, 3) {
  Rng rng(43);
  PerAxis<Rank> factors;
  for (int axis = 0; axis < Rank; ++axis) factors[axis] = 2 + axis % 2;
  const auto check = [&](const ConvShape<Rank>& shape, const auto& leaf) {
    Conv<float, Rank> rounding(shape);
    initialize_uniform(rounding, rng);
    const auto of_floats = leaf.template operator()<float>() * rounding;
    INFO(to_string(Form(of_floats.dense())));
    CHECK(exactness(of_floats).exact());
    CHECK(verify<double>(of_floats, contract<double>(of_floats)));

    const auto [layer, direction] =
        std::pair(random_pair(shape, rng).layer, random_pair(shape, rng).layer);
    const auto up = leaf.template operator()<PrimeField>();
    TransposedContraction contraction(up * layer);
    const Transposed<PrimeField, Rank> whole = contraction.forward(up * layer);
    const auto gradients = contraction.backward(up * layer, whole);
    Conv<PrimeField, Rank> moved = layer;
    PrimeField along(0);
    const auto& of_layer = std::get<Conv<PrimeField, Rank>>(gradients[0]);
    for (std::size_t i = 0; i < moved.weight().size(); ++i) {
      moved.weight()[i] = moved.weight()[i] + direction.weight()[i];
      along = along + of_layer.weight()[i] * direction.weight()[i];
    }
    CHECK(inner_product(whole, contraction.forward(up * moved)) ==
          inner_product(whole, whole) + along);
  };
  for (ConvShape<Rank> shape : all_shapes<Rank>(rng, 4)) {
    shape.stride = 1;
    shape.bias = false;
    check(shape, [&]<class S>() { return upsample_nearest<S, Rank>(shape.out, factors); });
    shape.out *= numel(PerAxis<Rank>(2));
    check(shape, [&]<class S>() {
      return pixel_shuffle<S, Rank>(shape.out / numel(PerAxis<Rank>(2)), 2);
    });
  }
}

TEST_CASE("fixed transposed layers have no gradient, and cost none", "[transposed]") {
  Rng rng(47);
  const auto conv = random_pair<2>({.out = 3, .in = 2}, rng).linear;
  const auto f = random_pair<2>({.out = 3, .in = 4, .kernel_size = 4, .stride = 2}, rng).linear;
  const auto trained = transposed(f) * conv, kept = fixed(transposed(f)) * conv;
  const Transposed<PrimeField, 2> whole = contract(kept);
  CHECK(whole == contract(trained));
  CHECK(Form(kept.dense()).backward_multiply_adds() == Form(trained.dense()).multiply_adds());

  TransposedContraction<PrimeField, 2> contraction(kept), of_trained(trained);
  CHECK(contraction.forward(kept) == of_trained.forward(trained));
  const auto gradients = contraction.backward(kept, whole);
  const auto expected = of_trained.backward(trained, whole);
  CHECK(std::get<Conv2d<PrimeField>>(gradients[0]) == std::get<Conv2d<PrimeField>>(expected[0]));
  const auto& none = std::get<Transposed<PrimeField, 2>>(gradients[1]);
  CHECK(std::ranges::all_of(none.layer().weight(), [](auto w) { return w == PrimeField(0); }));
  CHECK_FALSE(none == std::get<Transposed<PrimeField, 2>>(expected[1]));
  CHECK(Form(fixed(kept).dense()).backward_multiply_adds() == 0);
}

TEST_CASE("a transposed layer that was moved from throws", "[transposed]") {
  Rng rng(48);
  auto layer = transposed(random_pair<2>({.out = 3, .in = 2, .kernel_size = 3}, rng).layer);
  auto map = random_map<2>({.channels = 3, .size = 5}, rng);
  const auto kept = std::move(layer);
  const auto kept_map = std::move(map);
  CHECK_THROWS_AS(layer(map), ShapeError);
  CHECK(kept(kept_map).shape().channels == 2);
}

namespace {

/// What stands before a nearest upsampling in the test below: layers with biases in a chain, a sum,
/// or between scales and shuffles.
using Before = Expr<PrimeField, 2> (*)(const std::vector<Conv2d<PrimeField>>&);

constexpr Before before_upsampling[] = {
    [](const auto& f) { return Expr<PrimeField, 2>(f[0]); },
    [](const auto& f) { return f[1] * f[0]; }, [](const auto& f) { return f[0] + f[2]; },
    [](const auto& f) -> Expr<PrimeField, 2> {
      return channel_bias(std::vector<PrimeField>{5, 6, 7, 8}) * channel_shuffle<PrimeField>(4, 2) *
             (f[1] * f[0] + f[2]);
    }};

}  // namespace

TEST_CASE("any bias before a nearest upsampling goes on behind it, and is differentiated",
          "[transposed]") {
  Rng rng(49);
  const ConvShape<2> shape{.out = 4, .in = 4, .kernel_size = 3, .padding = 1, .bias = true},
      one{.out = 4, .in = 4, .bias = true};
  std::vector<Conv2d<PrimeField>> layers;
  const auto randomise = [&](Conv2d<PrimeField>& layer) {
    fill_random(layer.weight(), rng);
    fill_random(layer.bias(), rng);
  };
  for (const ConvShape<2>& of : {shape, one, shape, one}) randomise(layers.emplace_back(of));
  const Conv2d<PrimeField>& last = layers[3];
  const auto up = upsample_nearest<PrimeField, 2>(4, {2, 3});
  const auto twice = upsample_nearest<PrimeField, 2>(4, 2);
  const auto x = random_map<2>({.batch = 2, .channels = 4, .size = {4, 5}}, rng);
  const std::vector<std::vector<std::size_t>> orders{{0}, {0, 1}, {0, 2}, {0, 1, 2}};
  for (std::size_t b = 0; b < orders.size(); ++b) {
    const Expr<PrimeField, 2> inner = before_upsampling[b](layers);
    INFO(to_string(Form(inner)));
    const auto applied = up(inner(x));
    const TransposedExpr<PrimeField, 2> product = up * inner;
    CHECK(contract(product)(x) == applied);
    CHECK(contract(last * product)(x) == last(applied));
    CHECK(contract(twice * product)(x) == twice(applied));
    CHECK(contract(product + product)(x).values()[7] == applied.values()[7] + applied.values()[7]);
    const auto from_the_left = twice * last * up * inner;
    CHECK(contract(from_the_left)(x) == twice(last(applied)));

    const auto whole = twice * (last * (fixed(up) * inner));
    CHECK(contract(whole)(x) == twice(last(applied)));
    TransposedContraction contraction(whole);
    const Transposed<PrimeField, 2> from = contraction.forward(whole);
    const auto gradients = contraction.backward(whole, from);
    const std::size_t leaves = Form(inner).leaves().size();
    REQUIRE(gradients.size() == leaves + 3);
    for (const std::size_t upsampling : {leaves, leaves + 2}) {
      const auto& none = std::get<Transposed<PrimeField, 2>>(gradients[upsampling]);
      CHECK(none.bias().empty());
      CHECK(std::ranges::count(none.layer().weight(), PrimeField(0)) ==
            std::ssize(none.layer().weight()));
    }
    std::vector<std::size_t> order = orders[b];
    order.resize(leaves + 1);  // what is no layer is not moved
    order.push_back(3);
    for (std::size_t g = 0; g < order.size(); ++g) {
      if (g >= orders[b].size() && g <= leaves) continue;
      Conv2d<PrimeField>& layer = layers[order[g]];
      const Conv2d<PrimeField> kept = layer;
      randomise(layer);
      // The product views it, its bias too.
      CHECK(contract(whole)(x) == twice(last(up(before_upsampling[b](layers)(x)))));
      const auto& gradient = std::get<Conv2d<PrimeField>>(gradients[g]);
      PrimeField along(0);
      for (std::size_t i = 0; i < kept.weight().size(); ++i) {
        along = along + gradient.weight()[i] * (layer.weight()[i] - kept.weight()[i]);
      }
      for (std::size_t i = 0; i < kept.bias().size(); ++i) {
        along = along + gradient.bias()[i] * (layer.bias()[i] - kept.bias()[i]);
      }
      CHECK(inner_product(from, contraction.forward(whole)) == inner_product(from, from) + along);
      layer = kept;
    }
  }
}

TEST_CASE("parentheses change neither products with upsampling nor their gradients",
          "[transposed]") {
  Rng rng(50);
  const auto up = upsample_nearest<PrimeField, 2>(3, 2);
  const auto layer = [&](ConvShape<2> shape) {
    Conv2d<PrimeField> result(shape);
    fill_random(result.weight(), rng);
    fill_random(result.bias(), rng);
    return result;
  };
  const auto first =
      layer({.out = 4, .in = 2, .kernel_size = 3, .padding = 1, .bias = GENERATE(false, true)});
  const auto second = layer({.out = 3, .in = 4, .kernel_size = GENERATE(1, 2), .bias = true});
  const auto other = layer(second.shape());
  const Expr<PrimeField, 2> middle = GENERATE(0, 1, 2) == 0  ? Expr<PrimeField, 2>(second)
                                     : GENERATE(false, true) ? second + other
                                                             : Expr<PrimeField, 2>(fixed(second));
  const auto x = random_map<2>({.batch = 1, .channels = 2, .size = {4, 5}}, rng);
  const auto from_the_left = up * middle * first, from_the_right = up * (middle * first);
  const Transposed<PrimeField, 2> whole = contract(from_the_left);
  CHECK(whole(x) == up(middle(first(x))));
  CHECK(contract(from_the_right) == whole);
  TransposedContraction left(from_the_left), right(from_the_right);
  static_cast<void>(left.forward(from_the_left));
  static_cast<void>(right.forward(from_the_right));
  const auto of_left = left.backward(from_the_left, whole),
             of_right = right.backward(from_the_right, whole);
  REQUIRE(of_left.size() == of_right.size());
  for (std::size_t i = 0; i + 1 < of_left.size(); ++i) {
    CHECK(std::get<Conv2d<PrimeField>>(of_left[i]) == std::get<Conv2d<PrimeField>>(of_right[i]));
  }
}

TEST_CASE("a bias before a stride that later differs is refused, not forgotten", "[transposed]") {
  Conv1d<int> conv({.out = 2, .in = 1, .bias = true}, {1, 2}, {0, 0});
  const auto shuffled = pixel_shuffle<int, 1>(1, 2) * conv;
  const auto strided = transposed(Conv1d<int>({.out = 2, .in = 1, .kernel_size = 3, .stride = 2},
                                              {1, 2, 3, 4, 5, 6})) *
                       conv;
  CHECK_NOTHROW(contract(shuffled));
  CHECK_NOTHROW(contract(strided));
  std::ranges::fill(conv.bias(), 3);
  CHECK(contract(shuffled).bias()[0] == 3);
  CHECK_THROWS_AS(contract(strided), InexactError);
  conv.bias()[1] = 4;
  CHECK_THROWS_AS(contract(shuffled), InexactError);
}

}  // namespace concertina::test
