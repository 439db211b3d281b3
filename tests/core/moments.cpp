// Batch norms in training: statistics, outputs and gradients beside layer by layer.
// SPDX-License-Identifier: Apache-2.0
#include <concertina/moments.hpp>

#include <concertina/blocks.hpp>
#include <concertina/expand.hpp>
#include <concertina/threads.hpp>

#include "core/layered.hpp"
#include "support.hpp"

#include <catch2/catch.hpp>

#include <cmath>
#include <functional>
#include <iterator>
#include <limits>
#include <map>
#include <string>
#include <vector>

namespace concertina::test {
namespace {

using Catch::Contains;

template <class F>
long double largest_of(const F& values) {
  long double largest = 0;
  for (const auto& value : values) {
    largest = std::max(largest, std::abs(static_cast<long double>(value)));
  }
  return largest;
}

/// The largest difference relative to the largest value, or to `least` where that is larger;
/// infinity where one is not a number.
template <class F, class G>
double distance(const F& found, const G& expected, long double least = 0) {
  REQUIRE(found.size() == expected.size());
  long double difference = 0;
  for (std::size_t i = 0; i < expected.size(); ++i) {
    const long double error =
        std::abs(static_cast<long double>(found[i]) - static_cast<long double>(expected[i]));
    if (std::isnan(error)) return std::numeric_limits<double>::infinity();
    difference = std::max(difference, error);
  }
  const long double largest = std::max(largest_of(expected), least);
  return static_cast<double>(largest == 0 ? difference : difference / largest);
}

template <class T, int Rank, class Scalar>
Maps<T, Rank> maps_of(const FeatureMap<Scalar, Rank>& x) {
  return {x.shape().batch, x.shape().channels, x.shape().size,
          std::vector<T>(x.values().begin(), x.values().end())};
}

template <class Scalar, int Rank>
FeatureMap<Scalar, Rank> random_maps(const MapShape<Rank>& shape, Rng& rng, double mean = 0.5,
                                     double width = 1) {
  FeatureMap<Scalar, Rank> x(shape);
  for (Scalar& value : x.values()) {
    value = static_cast<Scalar>(mean + random_uniform(rng, width));
  }
  return x;
}

template <class Scalar, int Rank>
Conv<Scalar, Rank> random_layer(const ConvShape<Rank>& shape, Rng& rng) {
  Conv<Scalar, Rank> layer(shape);
  initialize_uniform(layer, rng);
  return layer;
}

/// Weights of both signs.
template <class Scalar>
BatchNorm<Scalar> random_norm(Index channels, Rng& rng) {
  auto norm = BatchNorm<Scalar>::initialize(channels);
  for (std::size_t c = 0; c < norm.weight.size(); ++c) {
    norm.weight[c] = static_cast<Scalar>(random_uniform(rng, 2));
    norm.bias[c] = static_cast<Scalar>(random_uniform(rng, 1));
  }
  return norm;
}

/// A step's errors, of everything that it computes.
struct Errors {
  double output = 0, statistics = 0, layers = 0, input = 0;

  double largest() const { return std::max({output, statistics, layers, input}); }
};

/// A step layer by layer in T, with a random gradient of its output, and what the terms of its
/// gradients sum to without their signs.
template <class T, int Rank>
struct LayeredStep {
  Layered<T, Rank> layers, terms;
  Maps<T, Rank> output, gradient, input_gradient, input_terms;

  template <class Scalar>
  LayeredStep(const Expr<Scalar, Rank>& expression, const FeatureMap<Scalar, Rank>& x,
              const std::vector<Padding<Rank>>& margins = {})
      : layers(expression, margins),
        terms(expression, margins),
        output(layers.forward(maps_of<T>(x))),
        gradient(output) {
    Rng rng(7);
    for (T& value : gradient.values) value = static_cast<Scalar>(random_uniform(rng, 1));
    input_gradient = layers.backward(gradient);
    terms.forward(maps_of<T>(x));
    terms.make_absolute();
    Maps<T, Rank> sizes = gradient;
    for (T& value : sizes.values) value = std::abs(value);
    input_terms = terms.backward(sizes);
  }

  /// Errors of gradients are judged beside the largest gradient; where its terms cancel, as they do
  /// where a norm undoes what a layer does, beside as much of the terms as rounding errs by. In n
  /// additions errors add up to sqrt(n) u of the terms (Higham, Mary, A new approach to
  /// probabilistic rounding error analysis, 2019), so that 1e-12 of this is 16 times that.
  long double rounded(long double of_terms) const {
    const auto additions = static_cast<long double>(2 * layers.additions);  // forward, backward
    return of_terms * 16 * std::sqrt(additions) * 0x1p-53L / 1e-12L;
  }

  /// The error of gradients of the leaves.
  template <class Weight, class Bias>
  double layers_error(Weight&& weight, Bias&& bias) const {
    double error = 0;
    for (std::size_t leaf = 0; leaf < layers.leaves.size(); ++leaf) {
      const auto &of = layers.leaves[leaf], &sizes = terms.leaves[leaf];
      error = std::max(error, distance(weight(leaf), of.weight_gradient,
                                       rounded(largest_of(sizes.weight_gradient))));
      if (!of.shape.bias) continue;
      error = std::max(
          error, distance(bias(leaf), of.bias_gradient, rounded(largest_of(sizes.bias_gradient))));
    }
    return error;
  }
  double input_error(const auto& found) const {
    return distance(found, input_gradient.values, rounded(largest_of(input_terms.values)));
  }
  double statistics_error(const auto& mean, const auto& variance) const {
    double error = 0;
    for (std::size_t norm = 0; norm < layers.means.size(); ++norm) {
      error = std::max({error, distance(mean(norm), layers.means[norm]),
                        distance(variance(norm), layers.variances[norm])});
    }
    return error;
  }
};

/// The errors of a step contracted, the layer run in T.
template <class T, class Scalar, int Rank, class Reference>
Errors contracted_errors(const Expr<Scalar, Rank>& expression, const FeatureMap<Scalar, Rank>& x,
                         const LayeredStep<Reference, Rank>& step,
                         const std::vector<Padding<Rank>>& margins = {}) {
  TrainingContraction<Scalar, Rank> block(expression, x.shape().size, margins);
  const Conv<Scalar, Rank>& layer = block.forward(expression, x);
  Layered<T, Rank> run{Expr<Scalar, Rank>(layer)};
  const Maps<T, Rank> y = run.forward(maps_of<T>(x));
  Maps<T, Rank> dy = y;
  dy.values.assign(step.gradient.values.begin(), step.gradient.values.end());
  const Maps<T, Rank> dx = run.backward(dy);
  const auto cast = [](const std::vector<T>& from) {
    return std::vector<Scalar>(from.begin(), from.end());
  };
  const ConvShape<Rank> shape = layer.shape();
  const Conv<Scalar, Rank> dlayer(
      shape, cast(run.leaves.front().weight_gradient),
      shape.bias ? cast(run.leaves.front().bias_gradient) : std::vector<Scalar>());
  const auto gradients = block.backward(dlayer);
  std::vector<Scalar> to = cast(dx.values);
  block.add_input_gradient(x, {x.shape(), to});
  const auto statistics = block.statistics();
  REQUIRE(statistics.size() == step.layers.means.size());
  REQUIRE(gradients.size() == step.layers.leaves.size());
  return {
      .output = distance(y.values, step.output.values),
      .statistics = step.statistics_error([&](std::size_t n) { return statistics[n].mean; },
                                          [&](std::size_t n) { return statistics[n].variance; }),
      .layers = step.layers_error([&](std::size_t l) { return gradients[l].weight(); },
                                  [&](std::size_t l) { return gradients[l].bias(); }),
      .input = step.input_error(to)};
}

/// The errors of a step in double, beside layer by layer in double.
template <int Rank>
Errors step_errors(const Expr<double, Rank>& expression, const FeatureMap<double, Rank>& x,
                   const std::vector<Padding<Rank>>& margins = {}) {
  return contracted_errors<double>(expression, x, LayeredStep<double, Rank>(expression, x, margins),
                                   margins);
}

template <int Rank>
void check_step(const Expr<double, Rank>& expression, const FeatureMap<double, Rank>& x,
                const std::vector<Padding<Rank>>& margins = {}) {
  const Errors errors = step_errors(expression, x, margins);
  INFO(to_string(Form<Rank>(expression)) << " on " << to_string(x.shape().size));
  CAPTURE(errors.output / 1e-15, errors.statistics / 1e-15, errors.layers / 1e-15,
          errors.input / 1e-15);
  CHECK(errors.largest() < 1e-12);
}

/// Moments by their definition: patches in rows.
template <int Rank>
void check_moments(const ConvShape<Rank>& shape, const FeatureMap<double, Rank>& x) {
  const Moments found = patch_moments(shape, x);
  const Index taps = numel(shape.kernel_size), width = shape.in / shape.groups;
  const PerAxis<Rank> size = x.shape().size;
  const auto patch = static_cast<std::size_t>(taps * width);
  for (Index group = 0; group < shape.groups; ++group) {
    std::vector<std::vector<double>> rows;
    for (Index n = 0; n < x.shape().batch; ++n) {
      detail::for_each_position(output_size(shape, size), [&](const PerAxis<Rank>& t) {
        std::vector<double>& row = rows.emplace_back(patch);
        std::size_t i = 0;
        detail::for_each_position(shape.kernel_size, [&](const PerAxis<Rank>& a) {
          for (Index c = 0; c < width; ++c, ++i) {
            Index at = n * shape.in + group * width + c;
            bool inside = true;
            for (int axis = 0; axis < Rank; ++axis) {
              const Index p = t[axis] * shape.stride[axis] - shape.padding.start[axis] +
                              a[axis] * shape.dilation[axis];
              inside = inside && p >= 0 && p < size[axis];
              at = at * size[axis] + p;
            }
            if (inside) row[i] = x.values()[static_cast<std::size_t>(at)];
          }
        });
      });
    }
    REQUIRE(found.count == std::ssize(rows));
    std::vector<double> mean(patch), scatter(patch * patch);
    for (const auto& row : rows) {
      for (std::size_t i = 0; i < patch; ++i) mean[i] += row[i] / static_cast<double>(rows.size());
    }
    for (const auto& row : rows) {
      for (std::size_t i = 0; i < patch * patch; ++i) {
        scatter[i] += (row[i / patch] - mean[i / patch]) * (row[i % patch] - mean[i % patch]);
      }
    }
    const auto own = [&](const std::vector<double>& of, std::size_t elements) {
      const auto begin = of.begin() + group * static_cast<Index>(elements);
      return std::vector<double>(begin, begin + static_cast<Index>(elements));
    };
    INFO(to_string(shape) << " on " << to_string(size));
    CHECK(distance(own(found.mean, patch), mean) < 1e-13);
    CHECK(distance(own(found.scatter, patch * patch), scatter) < 1e-12);
  }
}

}  // namespace

TEMPLATE_TEST_CASE_SIG("moments are those of the patches, by lags and by patches", "[moments]",
                       ((int Rank), Rank), 1, 2, 3) {
  Rng rng(1);
  std::vector<ConvShape<Rank>> shapes = all_shapes<Rank>(rng, 30);
  shapes.push_back({.out = 1, .in = 12, .kernel_size = 3, .padding = 1});
  shapes.push_back({.out = 1, .in = 4, .kernel_size = 3, .padding = 4});
  shapes.push_back({.out = 1, .in = 4, .kernel_size = 3, .padding = 2, .dilation = 2});
  shapes.push_back({.out = 6, .in = 6, .kernel_size = 3, .padding = 1, .groups = 6});
  shapes.push_back({.out = 6, .in = 6, .kernel_size = 3, .padding = 2, .dilation = 2, .groups = 6});
  shapes.push_back({.out = 2, .in = 2, .kernel_size = 3, .padding = -1, .groups = 2});
  bool lags = false, patches = false;
  for (const ConvShape<Rank>& shape : shapes) {
    const PerAxis<Rank> size = random_input_size(shape, rng, Rank == 3 ? 3 : 12);
    const Index batch = random_index(rng, 1, 10);
    const auto x =
        random_maps<double, Rank>({.batch = batch, .channels = shape.in, .size = size}, rng, 3);
    const detail::PatchGeometry geometry(shape, detail::all_axes(size, 1));
    (geometry.prefers_lags() ? lags : patches) = true;
    check_moments(shape, x);
  }
  CHECK(lags);
  CHECK(patches);
}

TEST_CASE("moments of workers add up to those of all", "[moments]") {
  Rng rng(2);
  const ConvShape<2> shape{.out = 4, .in = 4, .kernel_size = 3, .padding = 1, .groups = 2};
  const auto all = random_maps<double, 2>({.batch = 7, .channels = 4, .size = {5, 6}}, rng, 1e4);
  const auto part = [&](Index first, Index count) {
    const auto begin = all.values().begin() + first * 120;
    return FeatureMap<double, 2>({.batch = count, .channels = 4, .size = {5, 6}},
                                 std::vector<double>(begin, begin + count * 120));
  };
  Moments sum;
  sum += patch_moments(shape, part(0, 2));
  sum += patch_moments(shape, part(2, 4));
  sum += patch_moments(shape, part(6, 1));
  const Moments whole = patch_moments(shape, all);
  CHECK(sum.count == whole.count);
  CHECK(distance(sum.mean, whole.mean) < 1e-14);
  CHECK(distance(sum.scatter, whole.scatter) < 1e-13);
  CHECK_THROWS_AS(sum += patch_moments({.out = 1, .in = 4}, all), ShapeError);

  // A worker that has no images.
  const std::size_t elements = whole.mean.size(), pairs = whole.scatter.size();
  const Moments none{.mean = std::vector<double>(elements), .scatter = std::vector<double>(pairs)};
  Moments with_none = whole, from_none = none;
  with_none += none;
  from_none += whole;
  for (const Moments& same : {with_none, from_none}) {
    CHECK(same.count == whole.count);
    CHECK(same.mean == whole.mean);
    CHECK(same.scatter == whole.scatter);
  }
}

TEST_CASE("threads do not change a bit", "[moments]") {
  Rng rng(3);
  for (const Index groups : {1, 2, 12}) {
    const ConvShape<2> shape{.out = 12, .in = 12, .kernel_size = 3, .padding = 1, .groups = groups};
    const auto x = random_maps<float, 2>({.batch = 9, .channels = 12, .size = {8, 7}}, rng);
    const Moments serial = patch_moments(shape, x), threads = patch_moments(shape, x, Threads{3});
    CHECK(serial.mean == threads.mean);
    CHECK(serial.scatter == threads.scatter);
  }
}

TEMPLATE_TEST_CASE_SIG("a step of a layer and its norm is that of layer by layer", "[moments]",
                       ((int Rank), Rank), 1, 2, 3) {
  Rng rng(4);
  std::vector<ConvShape<Rank>> shapes = all_shapes<Rank>(rng, 20);
  shapes.push_back({.out = 5, .in = 10, .kernel_size = 3, .padding = 1});
  shapes.push_back({.out = 6, .in = 6, .kernel_size = 3, .padding = 1, .groups = 6});
  shapes.push_back({.out = 4, .in = 6, .kernel_size = 3, .padding = 2, .dilation = 2, .groups = 2});
  int steps = 0;
  for (const ConvShape<Rank>& shape : shapes) {
    const PerAxis<Rank> size = random_input_size(shape, rng, Rank == 3 ? 2 : 6);
    const auto layer = random_layer<double>(shape, rng);
    const auto norm = random_norm<double>(shape.out, rng);
    const auto x = random_maps<double, Rank>({.batch = 5, .channels = shape.in, .size = size}, rng);
    Layered<double, Rank> first(batch_norm(norm) * layer);
    first.forward(maps_of<double>(x));
    if (std::ranges::min(first.variances.front()) < 1e-20) continue;  // reads padding alone
    ++steps;
    check_step<Rank>(batch_norm(norm) * layer, x);
  }
  CHECK(steps > 25);
}

namespace {

/// Blocks of every structure: each with a batch that it takes.
void for_each_block(Rng& rng, const std::function<void(const std::string&, const Expr<double, 2>&,
                                                       const FeatureMap<double, 2>&,
                                                       const std::vector<Padding<2>>&)>& visit) {
  const auto batch = [&](Index channels, const PerAxis<2>& size) {
    return random_maps<double, 2>({.batch = 4, .channels = channels, .size = size}, rng);
  };
  const auto conv = [&](const ConvShape<2>& shape) { return random_layer<double>(shape, rng); };
  const auto bn = [&](Index channels) { return batch_norm(random_norm<double>(channels, rng)); };
  const ConvShape<2> same{.out = 6, .in = 6, .kernel_size = 3, .padding = 1};

  visit("RepVGG", bn(6) * conv(same) + bn(6) * conv({.out = 6, .in = 6}) + bn(6), batch(6, {7, 6}),
        {});
  visit("ACNet",
        bn(5) * conv({.out = 5, .in = 4, .kernel_size = 3, .padding = 1}) +
            bn(5) * conv({.out = 5, .in = 4, .kernel_size = {3, 1}, .padding = {1, 0}}) +
            bn(5) * conv({.out = 5, .in = 4, .kernel_size = {1, 3}, .padding = {0, 1}}),
        batch(4, {6, 7}), {});
  visit("CL with norms",
        bn(4) * conv({.out = 4, .in = 12}) * bn(12) *
            conv({.out = 12, .in = 10, .kernel_size = 3}) * bn(10) *
            conv({.out = 10, .in = 5, .padding = 1}),
        batch(5, {6, 6}), {});
  {
    const ConvShape<2> depthwise{.out = 6, .in = 6, .kernel_size = 3, .padding = 1, .groups = 6};
    visit("MobileOne, depthwise",
          bn(6) * conv(depthwise) + bn(6) * conv(depthwise) +
              bn(6) * conv({.out = 6, .in = 6, .groups = 6}) + bn(6),
          batch(6, {6, 6}), {});
  }
  visit("MobileOne, 1x1",
        bn(6) * conv({.out = 6, .in = 6}) + bn(6) * conv({.out = 6, .in = 6}) + bn(6),
        batch(6, {5, 4}), {});
  {
    auto dbb = DiverseBranchBlock<double, 2>::initialize(
        ConvShape<2>{.out = 5, .in = 4, .kernel_size = 3, .padding = 1}, rng);
    dbb.reduce.conv = random_layer<double>(dbb.reduce.conv.shape(), rng);
    const Expr<double, 2> expression = dbb.expression();
    visit("DBB", expression, batch(4, {6, 7}), dbb.margins());
    CHECK(dbb.margins() == std::vector<Padding<2>>{0, 1, 0, 0, 1, 0});
    visit("DBB, statistics of the padded maps", expression, batch(4, {6, 7}), {});
  }
  visit("strided",
        bn(4) * conv({.out = 4, .in = 3, .kernel_size = 3, .stride = 2, .padding = 1}) +
            bn(4) * conv({.out = 4, .in = 3, .stride = 2}),
        batch(3, {7, 9}), {});
  visit("norm before a norm, sum in a chain",
        bn(4) * (bn(4) * conv({.out = 4, .in = 5, .groups = 1}) + conv({.out = 4, .in = 5})) *
            bn(5) * conv({.out = 5, .in = 3, .kernel_size = 3, .padding = 1}),
        batch(3, {6, 6}), {});
  visit("concatenated outputs",
        bn(5) * concat_outputs(std::vector<Expr<double, 2>>{
                    bn(3) * conv({.out = 3, .in = 4, .kernel_size = 3, .padding = 1}),
                    bn(2) * conv({.out = 2, .in = 4})}),
        batch(4, {5, 5}), {});
  visit("concatenated inputs",
        concat_inputs(std::vector<Expr<double, 2>>{
            bn(3) * conv({.out = 3, .in = 4, .kernel_size = 3, .padding = 1}),
            bn(3) * conv({.out = 3, .in = 2})}),
        batch(6, {5, 5}), {});
  visit("a direct sum, its norms within and after it",
        bn(6) * direct_sum(std::vector<Expr<double, 2>>{
                    bn(3) * conv({.out = 3, .in = 4, .kernel_size = 3, .padding = 1}),
                    conv({.out = 3, .in = 4, .groups = 1})}),
        batch(8, {5, 5}), {});
  visit("fixed layers",
        bn(4) * conv({.out = 4, .in = 4}) *
                fixed(conv({.out = 4, .in = 3, .kernel_size = 3, .padding = 1})) +
            bn(4) * fixed(conv({.out = 4, .in = 3})) +
            bn(4) * conv({.out = 4, .in = 4}) * fixed(bn(4)) * conv({.out = 4, .in = 3}),
        batch(3, {6, 6}), {});
  visit("scales, biases and shuffles between",
        bn(4) * channel_bias(std::vector<double>{1, 2, 3, 4}) *
            channel_scale(std::vector<double>{1, -2, 3, 0.5}) * channel_shuffle<double>(4, 2) *
            conv({.out = 4, .in = 4, .kernel_size = 3, .bias = true}),
        batch(4, {6, 6}), {});
  visit("no norm at all", conv({.out = 3, .in = 4, .kernel_size = 3}) * conv({.out = 4, .in = 2}),
        batch(2, {5, 5}), {});
  visit(
      "kernels far apart share no moments",
      bn(4) * conv({.out = 4, .in = 4, .kernel_size = {1, 7}, .padding = {0, 3}, .groups = 4}) +
          bn(4) * conv({.out = 4, .in = 4, .kernel_size = {7, 1}, .padding = {3, 0}, .groups = 4}),
      batch(4, {8, 9}), {});
  {
    auto plain = BatchNorm<double>::initialize(4);
    plain.weight.clear();
    plain.bias.clear();
    visit("a norm without weight and bias",
          batch_norm(plain) * conv({.out = 4, .in = 3, .kernel_size = 3, .padding = 1}),
          batch(3, {6, 6}), {});
  }
}

}  // namespace

TEST_CASE("a step of a block is that of layer by layer", "[moments]") {
  for (unsigned seed = 0; seed < 5; ++seed) {
    Rng rng(seed);
    for_each_block(rng,
                   [&](const std::string& name, const Expr<double, 2>& expression,
                       const FeatureMap<double, 2>& x, const std::vector<Padding<2>>& margins) {
                     INFO(name << ", seed " << seed);
                     check_step(expression, x, margins);
                   });
  }
}

namespace {

/// Layers and norms in memory that steps of descent move, and the expression of them.
template <class Scalar>
struct Trainable {
  std::vector<Conv<Scalar, 2>> layers;
  std::vector<BatchNorm<Scalar>> norms;
  std::function<Expr<Scalar, 2>(const Trainable&)> join;

  Expr<Scalar, 2> expression() const { return join(*this); }

  /// From gradients in the order of leaves. Filters that are fixed, scales and identities stay.
  template <class Weight, class Bias>
  void descend(std::size_t leaves, Weight&& weight, Bias&& bias, double rate) {
    enum class Kind { layer, norm, constant };
    std::vector<Kind> kinds;
    expression().tree().for_each_leaf([&](const auto& leaf) {
      const auto* map = leaf.channel_map();
      kinds.push_back(leaf.fixed || (map && map->mean.empty()) ? Kind::constant
                      : map                                    ? Kind::norm
                                                               : Kind::layer);
    });
    REQUIRE(kinds.size() == leaves);
    auto layer = layers.begin();
    auto norm = norms.begin();
    const auto move = [&](auto&& to, auto&& gradient) {
      for (std::size_t i = 0; i < to.size(); ++i) {
        to[i] = static_cast<Scalar>(to[i] - rate * static_cast<double>(gradient[i]));
      }
    };
    for (std::size_t leaf = 0; leaf < leaves; ++leaf) {
      if (kinds[leaf] == Kind::norm) {
        move(norm->weight, weight(leaf));
        move(norm++->bias, bias(leaf));
      } else if (kinds[leaf] == Kind::layer) {
        move(layer->weight(), weight(leaf));
        move(layer++->bias(), bias(leaf));
      }
    }
    REQUIRE(layer == layers.end());
    REQUIRE(norm == norms.end());
  }
};

/// RepVGG, a CL expansion with a norm after each layer, MobileOne's depthwise block, DBB's chain,
/// RepMixer, QARepVGG, UniRepLKNet's dilated block, ECB: layers in the order of leaves.
template <class Scalar>
std::vector<Trainable<Scalar>> trainable_blocks(Rng& rng) {
  const auto make = [&](const std::vector<ConvShape<2>>& shapes, const std::vector<Index>& norms,
                        std::function<Expr<Scalar, 2>(const Trainable<Scalar>&)> join) {
    Trainable<Scalar> block{.layers = {}, .norms = {}, .join = std::move(join)};
    for (const ConvShape<2>& shape : shapes) {
      block.layers.push_back(random_layer<double>(shape, rng).template cast<Scalar>());
    }
    for (const Index channels : norms) block.norms.push_back(random_norm<Scalar>(channels, rng));
    return block;
  };
  const ConvShape<2> same{.out = 6, .in = 6, .kernel_size = 3, .padding = 1},
      depthwise{.out = 6, .in = 6, .kernel_size = 3, .padding = 1, .groups = 6},
      diagonal{.out = 6, .in = 6, .groups = 6},
      padded{.out = 6, .in = 6, .padding = 1, .bias = true};
  const auto dilated = [&](Index kernel_size, Index dilation) {
    ConvShape<2> shape = depthwise;
    shape.kernel_size = kernel_size;
    shape.dilation = dilation;
    shape.padding = dilation * (kernel_size / 2);
    return shape;
  };
  using Block = Trainable<Scalar>;
  return {make({same, {.out = 6, .in = 6}}, {6, 6, 6},
               [](const Block& b) {
                 return batch_norm(b.norms[0]) * b.layers[0] +
                        batch_norm(b.norms[1]) * b.layers[1] + batch_norm(b.norms[2]);
               }),
          make({{.out = 12, .in = 6, .padding = 1},
                {.out = 10, .in = 12, .kernel_size = 3},
                {.out = 6, .in = 10}},
               {12, 10, 6},
               [](const Block& b) {
                 return batch_norm(b.norms[2]) * b.layers[2] * batch_norm(b.norms[1]) *
                        b.layers[1] * batch_norm(b.norms[0]) * b.layers[0];
               }),
          make({depthwise, depthwise, {.out = 6, .in = 6, .groups = 6}}, {6, 6, 6, 6},
               [](const Block& b) {
                 return batch_norm(b.norms[0]) * b.layers[0] +
                        batch_norm(b.norms[1]) * b.layers[1] +
                        batch_norm(b.norms[2]) * b.layers[2] + batch_norm(b.norms[3]);
               }),
          make({{.out = 6, .in = 6, .padding = 1}, {.out = 6, .in = 6, .kernel_size = 3}}, {6, 6},
               [](const Block& b) {
                 return batch_norm(b.norms[1]) * b.layers[1] * batch_norm(b.norms[0]) * b.layers[0];
               }),
          make({depthwise, diagonal}, {6, 6, 6, 6},
               [](const Block& b) {
                 const auto mixer = batch_norm(b.norms[0]) * b.layers[0] +
                                    batch_norm(b.norms[1]) * b.layers[1] + batch_norm(b.norms[2]);
                 return identity<Scalar>(6) + channel_scale(std::vector<Scalar>(6, Scalar(0.5))) *
                                                  (mixer - batch_norm(b.norms[3]));
               }),
          make({same, {.out = 6, .in = 6}}, {6, 6},
               [](const Block& b) {
                 return batch_norm(b.norms[1]) *
                        (batch_norm(b.norms[0]) * b.layers[0] + b.layers[1] + identity<Scalar>(6));
               }),
          make({dilated(7, 1), dilated(5, 1), dilated(3, 2), dilated(3, 3)}, {6, 6, 6, 6},
               [](const Block& b) {
                 std::vector<Expr<Scalar, 2>> branches;
                 for (std::size_t i = 0; i < 4; ++i) {
                   branches.push_back(batch_norm(b.norms[i]) * b.layers[i]);
                 }
                 return sum(branches);
               }),
          make({{.out = 6, .in = 6, .kernel_size = 3, .padding = 1, .bias = true},
                {.out = 12, .in = 6, .padding = 1, .bias = true},
                {.out = 6, .in = 12, .kernel_size = 3, .bias = true},
                padded},
               {}, [](const Block& b) {
                 Conv<Scalar, 2> sobel({.out = 6, .in = 6, .kernel_size = 3, .groups = 6});
                 for (std::size_t i = 0; i < sobel.weight().size(); ++i) {
                   sobel.weight()[i] =
                       static_cast<Scalar>(std::array{1, 0, -1, 2, 0, -2, 1, 0, -1}[i % 9]);
                 }
                 return b.layers[0] + b.layers[2] * b.layers[1] +
                        channel_scale(std::vector<Scalar>(6, Scalar(0.25))) *
                            fixed(std::move(sobel)) * b.layers[3] +
                        identity<Scalar>(6);
               })};
}

}  // namespace

TEST_CASE("twenty steps of descent stay with those of layer by layer", "[moments]") {
  Rng rng(8);
  std::vector<Trainable<double>> blocks = trainable_blocks<double>(rng);
  std::ranges::move(trainable_blocks<double>(rng), std::back_inserter(blocks));
  for (Trainable<double>& block : blocks) {
    Trainable<double> layered = block;
    const double rate = block.norms.empty() ? 1e-4 : 1e-3;
    const auto target = random_maps<double, 2>({.batch = 4, .channels = 6, .size = {6, 7}}, rng);
    TrainingContraction<double, 2> contraction(block.expression(), {6, 7});
    double loss = 0, first_loss = 0;
    for (int step = 0; step < 20; ++step) {
      const auto x = random_maps<double, 2>({.batch = 4, .channels = 6, .size = {6, 7}}, rng);
      // L = |y - target|^2 / 2
      const auto gradient_of = [&](const Maps<double, 2>& y) {
        Maps<double, 2> gradient = y;
        loss = 0;
        for (std::size_t i = 0; i < y.values.size(); ++i) {
          gradient.values[i] -= target.values()[i];
          loss += gradient.values[i] * gradient.values[i] / 2;
        }
        return gradient;
      };
      Layered<double, 2> exact(layered.expression());
      exact.backward(gradient_of(exact.forward(maps_of<double>(x))));
      layered.descend(
          exact.leaves.size(), [&](std::size_t l) { return exact.leaves[l].weight_gradient; },
          [&](std::size_t l) { return exact.leaves[l].bias_gradient; }, rate);
      const Conv2d<double>& layer = contraction.forward(block.expression(), x);
      Layered<double, 2> run{Expr<double, 2>(layer)};
      run.backward(gradient_of(run.forward(maps_of<double>(x))));
      if (step == 0) first_loss = loss;
      const Conv2d<double> gradient(layer.shape(), run.leaves[0].weight_gradient,
                                    run.leaves[0].bias_gradient);
      const auto gradients = contraction.backward(gradient);
      block.descend(
          gradients.size(), [&](std::size_t l) { return gradients[l].weight(); },
          [&](std::size_t l) { return gradients[l].bias(); }, rate);
    }
    CHECK(loss < 0.9 * first_loss);
    for (std::size_t l = 0; l < block.layers.size(); ++l) {
      CHECK(distance(block.layers[l].weight(), layered.layers[l].weight()) < 1e-9);
    }
    for (std::size_t n = 0; n < block.norms.size(); ++n) {
      CHECK(distance(block.norms[n].weight, layered.norms[n].weight) < 1e-9);
      CHECK(distance(block.norms[n].bias, layered.norms[n].bias) < 1e-9);
    }
  }
}

namespace {

/// The errors of a step in float, contracted and layer by layer, against long double.
std::pair<Errors, Errors> float_errors(const Expr<float, 2>& expression,
                                       const FeatureMap<float, 2>& x) {
  const LayeredStep<long double, 2> exact(expression, x);
  const LayeredStep<float, 2> plain(expression, x);
  const auto& of = plain.layers;
  const Errors layered{
      .output = distance(plain.output.values, exact.output.values),
      .statistics = exact.statistics_error([&](std::size_t n) { return of.means[n]; },
                                           [&](std::size_t n) { return of.variances[n]; }),
      .layers = exact.layers_error([&](std::size_t l) { return of.leaves[l].weight_gradient; },
                                   [&](std::size_t l) { return of.leaves[l].bias_gradient; }),
      .input = exact.input_error(plain.input_gradient.values)};
  return {contracted_errors<float>(expression, x, exact), layered};
}

}  // namespace

TEST_CASE("in float a step errs at most four times as much as layer by layer", "[moments]") {
  // The largest errors of several batches: far from zero, single ones are chance.
  std::map<std::string, std::pair<Errors, Errors>> largest;
  const auto check = [&](const std::string& name, const Expr<float, 2>& expression,
                         const FeatureMap<float, 2>& x) {
    const auto take = [](Errors& to, const Errors& from) {
      to = {std::max(to.output, from.output), std::max(to.statistics, from.statistics),
            std::max(to.layers, from.layers), std::max(to.input, from.input)};
    };
    const auto [contracted, layered] = float_errors(expression, x);
    take(largest[name].first, contracted);
    take(largest[name].second, layered);
  };
  for (unsigned seed = 10; seed < 13; ++seed) {
    Rng rng(seed);
    int number = 0;
    for (const Trainable<float>& block : trainable_blocks<float>(rng)) {
      const std::string name = "block " + std::to_string(++number);
      const MapShape<2> shape{.batch = 8, .channels = 6, .size = {9, 8}};
      check(name, block.expression(), random_maps<float, 2>(shape, rng));
      auto constant = random_maps<float, 2>(shape, rng);
      for (Index n = 0; n < 8; ++n) std::fill_n(constant.values().begin() + n * 432 + 72, 72, 0.3F);
      check(name + ", a constant channel", block.expression(), constant);
      check(name + ", one image", block.expression(),
            random_maps<float, 2>({.batch = 1, .channels = 6, .size = {9, 8}}, rng));
      check(name + ", mean 1e4", block.expression(), random_maps<float, 2>(shape, rng, 1e4, 1e-2));
    }
    // Without padding no border hides the small deviations.
    const auto conv = [&](const ConvShape<2>& of) {
      return random_layer<double>(of, rng).template cast<float>();
    };
    const auto bn = [&] { return batch_norm(random_norm<float>(6, rng)); };
    const MapShape<2> shape{.batch = 8, .channels = 6, .size = {9, 8}};
    const ConvShape<2> one{.out = 6, .in = 6}, valid{.out = 6, .in = 6, .kernel_size = 3},
        depthwise{.out = 6, .in = 6, .groups = 6};
    const auto far = random_maps<float, 2>(shape, rng, 1e4, 1e-2);
    check("1x1 + 1x1, mean 1e4", bn() * conv(one) + bn() * conv(one), far);
    check("3x3, mean 1e4", bn() * conv(valid), far);
    check("3x3 after 1x1, mean 1e4", bn() * conv(valid) * bn() * conv(one), far);
    check("depthwise 1x1, mean 1e4", bn() * conv(depthwise), far);
  }
  for (const auto& [name, errors] : largest) {
    const auto& [contracted, layered] = errors;
    constexpr double ulp = 0x1p-23;
    INFO(name);
    CAPTURE(contracted.output / ulp, layered.output / ulp, contracted.statistics / ulp,
            layered.statistics / ulp, contracted.layers / ulp, layered.layers / ulp,
            contracted.input / ulp, layered.input / ulp);
    // Where layer by layer has no digit right, as in gradients far from zero, nothing compares.
    const auto fits = [](double own, double other) { return own <= 4 * other || other > 0.5; };
    CHECK(contracted.output <= 4 * layered.output);
    CHECK(contracted.statistics <= 4 * layered.statistics);
    CHECK(fits(contracted.layers, layered.layers));
    CHECK(fits(contracted.input, layered.input));
  }
}

namespace {

/// What an expression makes of a batch without any signs, in layers, factors and means, with these
/// variances of its norms: of what each element of a contraction and its output is a sum.
FeatureMap<double, 2> magnitude(const detail::Tree<detail::Leaf<double, 2>>& tree,
                                const FeatureMap<double, 2>& x,
                                std::span<const std::vector<long double>> variances,
                                std::size_t& norm) {
  if (tree.join() == Join::none) {
    Conv2d<double> layer = tree.leaf().to<double>();
    const ChannelMap<double>* map = tree.leaf().channel_map();
    FeatureMap<double, 2> from = x;
    if (map && !map->variance.empty()) {
      const std::vector<long double>& variance = variances[norm++];
      const Index pixels = numel(x.shape().size);
      for (std::size_t c = 0; c < variance.size(); ++c) {
        const double factor =
            std::abs(map->weight[c]) / std::sqrt(static_cast<double>(variance[c]) + map->eps);
        double mean = 0;
        const auto channel = [&](Index n) {
          const auto at = (n * x.shape().channels + static_cast<Index>(c)) * pixels;
          return std::span(from.values())
              .subspan(static_cast<std::size_t>(at), static_cast<std::size_t>(pixels));
        };
        for (Index n = 0; n < x.shape().batch; ++n) {
          for (const double value : channel(n)) mean += value;
        }
        mean /= static_cast<double>(pixels * x.shape().batch);
        for (Index n = 0; n < x.shape().batch; ++n) {
          for (double& value : channel(n)) {
            value = factor * (value + mean) + std::abs(map->bias[c]);
          }
        }
      }
      return from;
    }
    for (double& weight : layer.weight()) weight = std::abs(weight);
    for (double& bias : layer.bias()) bias = std::abs(bias);
    return layer(from);
  }
  FeatureMap<double, 2> result = x;
  bool first = true;
  for (const auto& part : tree.parts()) {
    if (tree.join() == Join::chain) {
      result = magnitude(part, result, variances, norm);
      continue;
    }
    REQUIRE(tree.join() == Join::sum);
    const FeatureMap<double, 2> branch = magnitude(part, x, variances, norm);
    for (std::size_t i = 0; i < branch.values().size() && !first; ++i) {
      result.values()[i] += branch.values()[i];
    }
    if (first) result = branch;
    first = false;
  }
  return result;
}

}  // namespace

TEST_CASE("hard statistics err by roundings of the layer's own magnitude at most", "[moments]") {
  // Outputs are sums of products of weights, factors, means and inputs, in no more additions, one
  // after another, than layer by layer. These err by some sqrt(n) u of the terms without signs, as
  // above, and a norm of variance v makes terms 1 / sqrt(v + eps) times as large.
  Rng rng(15);
  const auto conv = [&](const ConvShape<2>& shape) { return random_layer<double>(shape, rng); };
  const auto bn = [&] { return batch_norm(random_norm<double>(6, rng)); };
  const ConvShape<2> one{.out = 6, .in = 6},
      same{.out = 6, .in = 6, .kernel_size = 3, .padding = 1},
      channels{.out = 6, .in = 6, .groups = 6};
  ConvShape<2> depthwise = same;
  depthwise.groups = 6;
  const std::vector<std::pair<std::string, Expr<double, 2>>> blocks{
      {"norm first", bn() * conv(one) * bn()},
      {"norm after norm", bn() * conv(channels) * bn() * conv(channels) * bn()},
      {"depthwise, two norms", bn() * conv(channels) * bn() * conv(channels)},
      {"MobileOne, depthwise",
       bn() * conv(depthwise) + bn() * conv(depthwise) + bn() * conv(channels) + bn()},
      {"RepVGG", bn() * conv(same) + bn() * conv(one) + bn()}};
  const MapShape<2> shape{.batch = 4, .channels = 6, .size = {8, 7}};
  const auto constant = [&](double value) {
    auto x = random_maps<double, 2>(shape, rng);
    for (Index n = 0; n < 4; ++n) std::fill_n(x.values().begin() + n * 336 + 56, 56, value);
    return x;
  };
  const std::vector<std::pair<std::string, FeatureMap<double, 2>>> batches{
      {"usual", random_maps<double, 2>(shape, rng)},
      {"a channel of 0.7", constant(0.7)},
      {"a channel of 1e4", constant(1e4)},
      {"mean 1e4, deviation 1e-2", random_maps<double, 2>(shape, rng, 1e4, 1e-2)}};
  for (const auto& [block, expression] : blocks) {
    for (const auto& [batch, x] : batches) {
      INFO(block << ", " << batch);
      Layered<long double, 2> exact(expression);
      const auto y = exact.forward(maps_of<long double>(x));
      TrainingContraction<double, 2> contraction(expression, shape.size);
      const FeatureMap<double, 2> found = contraction.forward(expression, x)(x);
      FeatureMap<double, 2> sizes = x;
      for (double& value : sizes.values()) value = std::abs(value);
      std::size_t norm = 0;
      sizes = magnitude(expression.tree(), sizes, exact.variances, norm);
      const double rounding = 4 * std::sqrt(static_cast<double>(exact.additions)) * 0x1p-53;
      bool within = true;
      for (std::size_t i = 0; i < y.values.size(); ++i) {
        const auto difference = static_cast<double>(
            std::abs(static_cast<long double>(found.values()[i]) - y.values[i]));
        within = within && difference <= rounding * sizes.values()[i];
      }
      CHECK(within);
    }
  }
}

TEST_CASE("without variance eps decides, and without eps the channel is named", "[moments]") {
  Rng rng(11);
  BatchNorm<double> norm = random_norm<double>(2, rng);
  const Conv2d<double> layer({.out = 2, .in = 2}, {2, -1, 1, 3});
  FeatureMap<double, 2> x({.batch = 3, .channels = 2, .size = {2, 2}});
  std::ranges::fill(x.values(), 0.1);
  TrainingContraction block(batch_norm(norm) * layer, {2, 2});
  const Conv2d<double>& contracted = block.forward(batch_norm(norm) * layer, x);
  CHECK(block.statistics()[0].variance == std::vector<double>{0, 0});
  const FeatureMap<double, 2> y = contracted(x);
  for (Index i = 0; i < 24; ++i) {  // beta, whatever the factor of 1 / sqrt(eps)
    CHECK(y.values()[static_cast<std::size_t>(i)] ==
          Approx(norm.bias[static_cast<std::size_t>(i / 4 % 2)]).epsilon(1e-10));
  }
  norm.eps = 0;
  const std::string message =
      message_of<NumericalError>([&] { block.forward(batch_norm(norm) * layer, x); });
  CHECK_THAT(message, Contains("batch norm 1") && Contains("channel 0"));
}

TEST_CASE("taps that read nothing have no variance", "[moments]") {
  // Of 41 * 1e4 / 41 and the like, some are not 1e4.
  Rng rng(77);
  for (Index images = 2; images < 60; ++images) {
    FeatureMap<double, 2> x({.batch = images, .channels = 1, .size = 1});
    for (double& element : x.values()) element = 1e4 + random_uniform(rng, 1.0);
    const Moments moments =
        patch_moments(ConvShape<2>{.out = 1, .in = 1, .kernel_size = 3, .padding = 1}, x);
    for (std::size_t i = 0; i < moments.scatter.size(); ++i) {
      if (i != 40) CHECK(moments.scatter[i] == 0);  // the middle's with itself
    }
  }
}

TEST_CASE("a channel map may become a layer of its shape", "[moments]") {
  Rng rng(78);
  const auto layer = random_layer<double>(ConvShape<2>{.out = 3, .in = 2}, rng);
  const auto depthwise = random_layer<double>(ConvShape<2>{.out = 3, .in = 3, .groups = 3}, rng);
  const auto norm = random_norm<double>(3, rng);
  const Expr<double, 2> scaled =
      channel_scale(std::vector<double>{2, -1, 3}) * batch_norm(norm) * layer;
  const Expr<double, 2> applied = depthwise * batch_norm(norm) * layer;
  const auto x = random_maps<double, 2>({.batch = 2, .channels = 2, .size = 3}, rng);
  TrainingContraction<double, 2> reused(scaled, 3), fresh(applied, 3);
  reused.forward(scaled, x);
  CHECK(reused.forward(applied, x) == fresh.forward(applied, x));
}

TEST_CASE("what cancels in a float's layer leaves no variance", "[moments]") {
  // A Laplacian of ramps: 0, though the moments that it is found from are of the order of 255^2.
  Rng rng(12);
  for (const Index channels : {1, 6}) {  // by lags pixel by pixel, and by matrix products
    BatchNorm<float> norm = random_norm<float>(1, rng);
    Conv2d<float> layer({.out = 1, .in = channels, .kernel_size = 3});
    for (Index c = 0; c < channels; ++c) {
      std::ranges::copy(std::array{0, 1, 0, 1, -4, 1, 0, 1, 0}, layer.weight().begin() + 9 * c);
    }
    FeatureMap<float, 2> x({.batch = 16, .channels = channels, .size = {16, 16}});
    for (auto at = x.values().begin(); at != x.values().end(); at += 256) {
      const Index start = random_index(rng, 0, 255), slope = random_index(rng, -15, 15);
      for (Index p = 0; p < 256; ++p) at[p] = static_cast<float>(start + slope * (p / 16));
    }
    TrainingContraction block(batch_norm(norm) * layer, {16, 16});
    block.forward(batch_norm(norm) * layer, x);
    const double variance = block.statistics()[0].variance[0];
    CHECK((variance >= 0 && variance < 1e-3 * norm.eps));
  }
}

TEST_CASE("two workers with shared statistics train as one", "[moments]") {
  Rng rng(12);
  const MapShape<2> shape{.batch = 5, .channels = 6, .size = {6, 7}};
  const auto both = random_maps<double, 2>(shape, rng, 10);
  const auto part = [&](const FeatureMap<double, 2>& of, Index first, Index count) {
    const auto begin = of.values().begin() + first * 252;
    return FeatureMap<double, 2>({.batch = count, .channels = 6, .size = {6, 7}},
                                 std::vector<double>(begin, begin + count * 252));
  };
  for (const Trainable<double>& block : trainable_blocks<double>(rng)) {
    const Expr<double, 2> expression = block.expression();
    const FeatureMap<double, 2> mine = part(both, 0, 2), theirs = part(both, 2, 3);
    const LayeredStep<double, 2> step(expression, both);
    TrainingContraction one(expression, {6, 7}), two(expression, {6, 7});
    std::vector<Moments> moments = one.moments(mine);
    const std::vector<Moments> other = two.moments(theirs);
    for (std::size_t m = 0; m < moments.size(); ++m) moments[m] += other[m];
    const Conv2d<double>& layer = one.forward(expression, moments);
    CHECK(two.forward(expression, moments) == layer);
    Layered<double, 2> run{Expr<double, 2>(layer)};
    CHECK(distance(run.forward(maps_of<double>(both)).values, step.output.values) < 1e-12);
    std::vector<double> dx = run.backward(step.gradient).values;
    const Conv2d<double> gradient(layer.shape(), run.leaves[0].weight_gradient,
                                  run.leaves[0].bias_gradient);
    const auto gradients = one.backward(gradient);
    two.backward(gradient);
    CHECK(step.layers_error([&](std::size_t l) { return gradients[l].weight(); },
                            [&](std::size_t l) { return gradients[l].bias(); }) < 1e-12);
    one.add_input_gradient(mine, {mine.shape(), std::span(dx).first(mine.values().size())});
    two.add_input_gradient(theirs, {theirs.shape(), std::span(dx).last(theirs.values().size())});
    CHECK(step.input_error(dx) < 1e-12);
  }
}

TEST_CASE("running statistics move as PyTorch's do", "[moments]") {
  auto norm = BatchNorm<float>::initialize(2);
  norm.running_mean = {4, -8};
  update_running_statistics(norm, {.count = 5, .mean = {8, 8}, .variance = {4, 0}}, 0.25);
  CHECK(norm.running_mean == std::vector<float>{5, -4});
  CHECK(norm.running_var == std::vector<float>{2, 0.75F});  // 0.75 + 0.25 * 4 * 5 / 4
  CHECK_THROWS_AS(update_running_statistics(norm, {.count = 1, .mean = {1, 1}, .variance = {0, 0}}),
                  ShapeError);
  CHECK_THROWS_AS(update_running_statistics(norm, {.count = 5, .mean = {1}, .variance = {1}}),
                  ShapeError);
  CHECK_THROWS_AS(update_running_statistics(norm, {.count = 5, .mean = {1, 1}, .variance = {1}}),
                  ShapeError);
}

TEST_CASE("what does not fit is refused", "[moments]") {
  Rng rng(13);
  const auto norm = random_norm<double>(4, rng);
  const auto layer =
      random_layer<double>(ConvShape<2>{.out = 4, .in = 3, .kernel_size = 3, .padding = 1}, rng);
  const auto other = random_layer<double>(ConvShape<2>{.out = 4, .in = 3}, rng);
  const Expr<double, 2> expression = batch_norm(norm) * layer;
  TrainingContraction block(expression, {4, 5});
  const auto batch = [&](Index n, Index channels, const PerAxis<2>& size) {
    return random_maps<double, 2>({.batch = n, .channels = channels, .size = size}, rng);
  };
  Conv2d<double> gradient(block.shape());
  CHECK_THROWS_AS(block.backward(gradient), Error);
  CHECK_THROWS_AS(block.moments(batch(0, 3, {4, 5})), ShapeError);
  CHECK_THROWS_AS(block.moments(batch(2, 4, {4, 5})), ShapeError);
  CHECK_THROWS_AS(block.moments(batch(2, 3, {5, 5})), ShapeError);
  CHECK_THROWS_AS(block.forward(batch_norm(norm) * other, batch(2, 3, {4, 5})), ShapeError);
  const auto square = random_layer<double>(ConvShape<2>{.out = 4, .in = 4}, rng);
  TrainingContraction product(batch_norm(norm) * (square * square), {4, 5});
  CHECK_THROWS_AS(
      product.forward(batch_norm(norm) * (square + square), product.moments(batch(2, 4, {4, 5}))),
      ShapeError);
  CHECK_THROWS_AS(block.forward(batch_norm(norm) * fixed(layer), batch(2, 3, {4, 5})), ShapeError);
  auto taken = block;
  const auto kept = std::move(taken);
  CHECK_THROWS_AS(taken.moments(batch(2, 3, {4, 5})), ShapeError);
  CHECK_THROWS_AS(block.forward(expression, std::vector<Moments>{}), ShapeError);
  CHECK_THROWS_AS(block.forward(expression, std::vector<Moments>(1)), ShapeError);
  std::vector<Moments> moments = block.moments(batch(2, 3, {4, 5}));
  moments.front().scatter.pop_back();
  CHECK_THROWS_AS(block.forward(expression, moments), ShapeError);
  block.forward(expression, batch(1, 3, {4, 5}));
  CHECK_THROWS_AS(block.backward(other), ShapeError);
  FeatureMap<double, 2> input_gradient({.batch = 1, .channels = 3, .size = {4, 5}});
  CHECK_THROWS_AS(block.add_input_gradient(batch(1, 3, {4, 5}), input_gradient), Error);
  block.backward(gradient);
  CHECK_THROWS_AS(block.add_input_gradient(batch(1, 3, {4, 4}), input_gradient), ShapeError);
  CHECK_THROWS_AS(block.add_input_gradient(batch(1, 2, {4, 5}), input_gradient), ShapeError);
  CHECK_THROWS_AS(block.add_input_gradient(batch(2, 3, {4, 5}), input_gradient), ShapeError);
  FeatureMap<double, 2> turned({.batch = 1, .channels = 3, .size = {5, 4}});
  CHECK_THROWS_AS(block.add_input_gradient(batch(1, 3, {4, 5}), turned), ShapeError);

  // PyTorch: expected more than 1 value per channel when training.
  TrainingContraction single(batch_norm(norm) * other, {1, 1});
  const std::string message = message_of<ShapeError>(
      [&] { single.forward(batch_norm(norm) * other, batch(1, 3, {1, 1})); });
  CHECK_THAT(message, Contains("more than one value"));

  // A padding after a norm is not one layer, whatever the statistics.
  const auto padded =
      random_layer<double>(ConvShape<2>{.out = 4, .in = 4, .kernel_size = 3, .padding = 1}, rng);
  CHECK_THROWS_AS((TrainingContraction<double, 2>(padded * expression, {4, 5})), InexactError);
  CHECK_THROWS_AS((TrainingContraction<double, 2>(expression, {4, 5}, {2})), ShapeError);
  CHECK_THROWS_AS((TrainingContraction<double, 2>(expression, {4, 5}, {0, 0})), ShapeError);
}

TEST_CASE("costs are counted", "[moments]") {
  Rng rng(14);
  // The input has 16 x 16 positions, so as many outputs, at every layer.
  const auto cl =
      initialize<double>(std::vector<ConvShape<2>>{{.out = 128, .in = 32, .padding = 1},
                                                   {.out = 128, .in = 128, .kernel_size = 3},
                                                   {.out = 32, .in = 128}},
                         rng);
  const auto bn = [&](Index channels) { return batch_norm(random_norm<double>(channels, rng)); };
  TrainingContraction block(Expr<double, 2>(bn(32) * cl[2] * bn(128) * cl[1] * bn(128) * cl[0]),
                            {16, 16}, {1, 0, 0});
  const auto cost = block.cost(128);
  // 32 -> 128 at 18 x 18, 128 -> 128 3x3 and 128 -> 32 at 16 x 16, three passes
  CHECK(cost.layered == Index{3} * 128 * (32 * 128 * 324 + (128 * 128 * 9 + 128 * 32) * 256));
  CHECK(cost.layered > 6 * cost.contracted);
  CHECK(cost.layered < 8 * cost.contracted);
}

}  // namespace concertina::test
