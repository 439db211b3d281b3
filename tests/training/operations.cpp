// The training program's operations: each result against loops written from its definition, each
// gradient against the transposed map or central differences; empty lanes, threads, contractions.
// SPDX-License-Identifier: Apache-2.0
#include "training/operations.hpp"  // first: the header must stand alone

#include "maximum.hpp"
#include "support.hpp"
#include "training/contractions.hpp"

#include <concertina/contract.hpp>
#include <concertina/error.hpp>
#include <concertina/random.hpp>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <initializer_list>
#include <limits>
#include <memory>
#include <numeric>
#include <optional>
#include <span>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

using namespace training;
using Catch::Matchers::Contains;
using concertina::ConvShape, concertina::Padding, concertina::ShapeError, concertina::to_string;
using concertina::test::counted_positions, concertina::test::maximum, concertina::test::message_of,
    concertina::test::random_index, concertina::test::Rng;

namespace {

/// Batches that fill no chunk, one, and a part of the next one.
constexpr std::array<Index, 5> batches = {1, 15, 16, 17, 33};

std::size_t at(Index index) { return static_cast<std::size_t>(index); }

/// Maps of a batch [image][channel][y][x], in which everything is computed a second time. Small
/// integers are exact in double as well, so one reference does for float and double.
struct Batch {
  Batch(Index images_, Index channels_, Index height_, Index width_)
      : images(images_),
        channels(channels_),
        height(height_),
        width(width_),
        values(::at(images * channels * height * width)) {}

  double& at(Index image, Index channel, Index y, Index x) {
    return values[::at(((image * channels + channel) * height + y) * width + x)];
  }
  double at(Index image, Index channel, Index y, Index x) const {
    return const_cast<Batch&>(*this).at(image, channel, y, x);
  }
  Index numbers() const { return channels * height * width; }

  /// Calls each(image, channel, y, x) for every number.
  template <class Each>
  void for_each(Each&& each) const {
    for (Index number = 0; number < images * numbers(); ++number) {
      each(number / numbers(), number / (height * width) % channels, number / width % height,
           number % width);
    }
  }

  friend bool operator==(const Batch&, const Batch&) = default;

  Index images, channels, height, width;
  std::vector<double> values;
};

Batch small_integers(Index images, Index channels, Index height, Index width, Rng& rng) {
  Batch batch(images, channels, height, width);
  concertina::test::fill_small_integers(std::span(batch.values), rng);
  return batch;
}

/// Uniform in -1 .. 1.
double random_number(Rng& rng) { return static_cast<double>(rng() >> 11) * 0x1p-52 - 1; }

Batch random_batch(Index images, Index channels, Index height, Index width, Rng& rng) {
  Batch batch(images, channels, height, width);
  for (double& value : batch.values) value = random_number(rng);
  return batch;
}

/// Calls each(lane's number, batch's number), the latter null for lanes without an image.
template <class Scalar, class AnyBatch, class Each>
void for_each_lane(Maps<Scalar>& maps, AnyBatch& batch, bool gradients, Each&& each) {
  for (Index chunk = 0; chunk * lanes < batch.images; ++chunk) {
    Scalar* number = gradients ? maps.gradients(chunk) : maps.values(chunk);
    for (Index i = 0; i < batch.numbers(); ++i) {
      for (Index image = chunk * lanes; image < (chunk + 1) * lanes; ++image, ++number) {
        each(*number,
             image < batch.images ? &batch.values[at(image * batch.numbers() + i)] : nullptr);
      }
    }
  }
}

/// Sets the maps' values, or their gradients, and lanes without an image to `rest`.
template <class Scalar>
void put(Maps<Scalar>& maps, const Batch& batch, Scalar rest = 0, bool gradients = false) {
  for_each_lane(maps, batch, gradients, [&](Scalar& number, const double* value) {
    number = value ? static_cast<Scalar>(*value) : rest;
  });
}

template <class Scalar>
Batch values_of(Maps<Scalar>& maps, Index images, bool gradients = false) {
  Batch batch(images, maps.channels, maps.height, maps.width);
  for_each_lane(maps, batch, gradients, [](Scalar number, double* value) {
    if (value) *value = static_cast<double>(number);
  });
  return batch;
}
template <class Scalar>
Batch gradients_of(Maps<Scalar>& maps, Index images) {
  return values_of(maps, images, true);
}

template <class Numbers>
std::vector<double> doubles(const Numbers& numbers) {
  return {numbers.begin(), numbers.end()};
}

/// A tape with its pool.
template <class Scalar>
struct Rig {
  explicit Rig(Index capacity, Index threads = 1) : pool(threads), tape(capacity, pool) {}

  Maps<Scalar>& input(const Batch& x, bool differentiable = true) {
    Maps<Scalar>& maps = tape.maps(x.channels, x.height, x.width, differentiable);
    put(maps, x);
    return maps;
  }

  Tensor<Scalar>& tensor(const std::string& name, const std::vector<Index>& shape,
                         const std::function<double()>& draw) {
    Tensor<Scalar>& tensor = tape.tensor(name, shape);
    for (Scalar& value : tensor.value) value = static_cast<Scalar>(draw());
    return tensor;
  }

  template <int Rank>
  Weights<Scalar> weights(const ConvShape<Rank>& shape, const std::function<double()>& draw) {
    return {.weight = &tensor("weight", weight_extents(shape), draw),
            .bias = shape.bias ? &tensor("bias", {shape.out}, draw) : nullptr};
  }

  NormTensors<Scalar> norm(Index channels, const std::function<double()>& draw) {
    return {&tensor("norm.weight", {channels}, draw), &tensor("norm.bias", {channels}, draw),
            &tensor("norm.running_mean", {channels}, draw),
            &tensor("norm.running_var", {channels}, [&] { return 1.5 + draw() / 8; })};
  }

  /// Ends the tape: the loss is the sum of products of y with `direction`, as seed() returns it.
  std::function<double()> seed(Maps<Scalar>& y, const Batch& direction) {
    static_cast<void>(tape.first_writer(y));
    Operation operation;
    operation.backward.each([&y, direction](Index chunk, Index) {
      if (chunk == 0) put(y, direction, Scalar(0), true);
    });
    operation.backward.then([] {});
    tape.record(std::move(operation));
    return [&y, direction] {
      const Batch values = values_of(y, direction.images);
      return std::inner_product(values.values.begin(), values.values.end(),
                                direction.values.begin(), 0.0);
    };
  }

  ThreadPool pool;
  Tape<Scalar> tape;
};

// ---- definitions --------------------------------------------------------------------------------

/// What an operation computes on x, by its definition, and its gradients along a direction.
struct Definition {
  Batch direction, y, x_gradient;
  std::vector<double> weight_gradient = {}, bias_gradient = {};
};

/// Of an operation whose results are sums of factor * x: terms(definition so far, image, channel,
/// i, j, each) calls each(channel, row, column, factor) for the terms of one of them.
template <class Terms>
Definition definition(const Batch& x, Index channels, Index height, Index width, Rng& rng,
                      Terms&& terms) {
  Definition result{small_integers(x.images, channels, height, width, rng),
                    Batch(x.images, channels, height, width),
                    Batch(x.images, x.channels, x.height, x.width)};
  result.y.for_each([&](Index n, Index c, Index i, Index j) {
    const double gradient = result.direction.at(n, c, i, j);
    double& sum = result.y.at(n, c, i, j);
    terms(result, n, c, i, j, [&](Index channel, Index row, Index column, double factor) {
      sum += factor * x.at(n, channel, row, column);
      result.x_gradient.at(n, channel, row, column) += factor * gradient;
    });
  });
  return result;
}

/// Compares what is recorded with its definition.
template <class Scalar>
void check(Rig<Scalar>& rig, Maps<Scalar>& input, const Batch& x, Maps<Scalar>& output,
           const Definition& expected, const Weights<Scalar>& weights = {}) {
  rig.seed(output, expected.direction);
  // Twice: gradients are set, not added to those of the last batch.
  for (const Scalar rest : {Scalar(0), Scalar(1000)}) {
    put(input, x, rest);
    rig.tape.forward(x.images, true);
    REQUIRE(values_of(output, x.images) == expected.y);
    rig.tape.backward();
    if (weights.weight) CHECK(doubles(weights.weight->gradient) == expected.weight_gradient);
    if (weights.bias) CHECK(doubles(weights.bias->gradient) == expected.bias_gradient);
    if (input.differentiable) CHECK(gradients_of(input, x.images) == expected.x_gradient);
  }
}

// ---- convolution, linear ------------------------------------------------------------------------

template <class Scalar>
Maps<Scalar>& layer(Tape<Scalar>& tape, Maps<Scalar>& x, const ConvShape<2>& shape,
                    const Weights<Scalar>& weights) {
  return convolution(tape, x, shape, weights);
}
template <class Scalar>
Maps<Scalar>& layer(Tape<Scalar>& tape, Maps<Scalar>& x, const ConvShape<0>& shape,
                    const Weights<Scalar>& weights) {
  return linear(tape, x, shape, weights);
}

Definition convolved(const ConvShape<2>& shape, const Batch& x, const std::vector<double>& weight,
                     const std::vector<double>& bias, Rng& rng) {
  const Index kernel_height = shape.kernel_size[0], kernel_width = shape.kernel_size[1];
  std::vector<double> weight_gradient(weight.size()), bias_gradient(bias.size());
  const Index height = counted_positions(shape, x.height, 0);
  const Index width = counted_positions(shape, x.width, 1);
  const auto terms = [&](Definition& now, Index n, Index o, Index i, Index j, auto&& each) {
    const double gradient = now.direction.at(n, o, i, j);
    if (!bias.empty()) {
      now.y.at(n, o, i, j) = bias[at(o)];
      bias_gradient[at(o)] += gradient;
    }
    std::size_t tap = at(o * x.channels * kernel_height * kernel_width);
    const Index top = i * shape.stride[0] - shape.padding.start[0];
    const Index left = j * shape.stride[1] - shape.padding.start[1];
    for (Index c = 0; c < x.channels; ++c) {
      for (Index y = top; y < top + kernel_height; ++y) {
        for (Index z = left; z < left + kernel_width; ++z, ++tap) {
          if (y < 0 || y >= x.height || z < 0 || z >= x.width) continue;
          each(c, y, z, weight[tap]);
          weight_gradient[tap] += gradient * x.at(n, c, y, z);
        }
      }
    }
  };
  Definition result = definition(x, shape.out, height, width, rng, terms);
  result.weight_gradient = std::move(weight_gradient);
  result.bias_gradient = std::move(bias_gradient);
  return result;
}

/// A linear layer is the convolution whose kernel covers the maps.
template <class Scalar, int Rank>
void check_layer(const ConvShape<Rank>& shape, const Batch& x, Rng& rng) {
  INFO(to_string(shape) << (shape.bias ? " with bias on " : " on ") << x.images << " images of "
                        << x.height << "x" << x.width);
  Rig<Scalar> rig(x.images);
  Maps<Scalar>& input = rig.input(x, random_index(rng, 0, 3) != 0);
  const Weights<Scalar> weights =
      rig.weights(shape, [&] { return static_cast<double>(random_index(rng, -4, 4)); });
  ConvShape<2> whole{.out = shape.out, .in = x.channels, .kernel_size = {x.height, x.width}};
  if constexpr (Rank == 2) whole = shape;
  const auto bias = weights.bias ? doubles(weights.bias->value) : std::vector<double>();
  check(rig, input, x, layer(rig.tape, input, shape, weights),
        convolved(whole, x, doubles(weights.weight->value), bias, rng), weights);
}

template <class Scalar>
void check_convolutions() {
  Rng rng(11);
  const std::vector<concertina::PerAxis<2>> kernels = {1,      2,      3,      5,     7,
                                                       {3, 1}, {1, 5}, {2, 3}, {7, 1}};
  std::size_t batch = 0;
  const auto check = [&](Index out, Index in, concertina::PerAxis<2> kernel,
                         concertina::PerAxis<2> padding, Index stride = 1) {
    const ConvShape<2> shape{.out = out,
                             .in = in,
                             .kernel_size = kernel,
                             .stride = stride,
                             .padding = padding,
                             .bias = random_index(rng, 0, 1) == 1};
    const auto size = [&](int axis) {  // on which the kernel stands somewhere
      return std::max<Index>(1, kernel[axis] - 2 * padding[axis]) + random_index(rng, 0, 4);
    };
    const Index images = batches[batch++ % batches.size()], height = size(0), width = size(1);
    check_layer<Scalar>(shape, small_integers(images, in, height, width, rng), rng);
  };
  for (const auto& kernel : kernels) {
    for (Index vertical = -2; vertical <= kernel[0]; ++vertical) {
      check(random_index(rng, 1, 4), random_index(rng, 1, 4), kernel,
            {vertical, random_index(rng, -2, kernel[1])});
    }
    for (Index horizontal = -2; horizontal <= kernel[1]; ++horizontal) {
      check(random_index(rng, 1, 4), random_index(rng, 1, 4), kernel,
            {random_index(rng, -2, kernel[0]), horizontal});
    }
  }
  for (const Index out : {1, 2, 3, 7, 8, 9, 13, 16}) {
    for (const Index in : {1, 2, 3, 7, 8, 9, 13, 16}) {
      check(out, in, random_index(rng, 1, 3), random_index(rng, 0, 1));
    }
  }
  for (const auto& kernel : kernels) {  // sizes of all remainders
    for (Index padding = -1; padding <= 3; ++padding) {
      for (int repeat = 0; repeat < 3; ++repeat) {
        check(random_index(rng, 1, 9), random_index(rng, 1, 9), kernel, padding, 2);
      }
    }
  }
}

}  // namespace

TEMPLATE_TEST_CASE("a convolution and its gradients are those of the definition",
                   "[training][operations]", float, double) {
  check_convolutions<TestType>();
}

TEST_CASE("a convolution of maps wider than a band of the weight gradient",
          "[training][operations]") {
  Rng rng(12);
  const auto check = [&](const ConvShape<2>& shape, Index images, Index height, Index width) {
    check_layer<float>(shape, small_integers(images, shape.in, height, width, rng), rng);
  };
  check({.out = 9, .in = 2, .kernel_size = 3, .padding = 1}, 2, 3, 41);
  check({.out = 2, .in = 3, .kernel_size = 3, .bias = true}, 17, 33, 9);
  check({.out = 9, .in = 2, .kernel_size = 3, .stride = 2, .padding = 1}, 2, 67, 19);
}

TEMPLATE_TEST_CASE("a linear layer and its gradients are those of the definition",
                   "[training][operations]", float, double) {
  Rng rng(13);
  for (const Index images : batches) {
    for (const Index out : {1, 2, 10, 15, 16, 17, 64}) {
      const Batch x = small_integers(images, random_index(rng, 1, 9), random_index(rng, 1, 3),
                                     random_index(rng, 1, 3), rng);
      const bool bias = random_index(rng, 0, 1) == 1;
      check_layer<TestType, 0>({.out = out, .in = x.numbers(), .bias = bias}, x, rng);
    }
  }
}

// ---- max pool, average pool, add, relu ----------------------------------------------------------

TEMPLATE_TEST_CASE("a max pool gives the largest, and its gradient to the first of equal ones",
                   "[training][operations]", float, double) {
  Rng rng(14);
  for (const Index images : batches) {
    for (const Index height : {2, 3, 4, 7}) {
      for (const Index width : {2, 3, 6, 5}) {
        // Integers in -4 .. 4: most windows have equal ones.
        const Batch x = small_integers(images, random_index(rng, 1, 5), height, width, rng);
        INFO(images << " images of " << x.channels << "x" << height << "x" << width);
        Rig<TestType> rig(images);
        Maps<TestType>& input = rig.input(x);
        check(rig, input, x, max_pool(rig.tape, input),
              definition(x, x.channels, height / 2, width / 2, rng,
                         [&](auto&, Index n, Index c, Index i, Index j, auto&& each) {
                           Index row = 2 * i, column = 2 * j;
                           for (Index k = 1; k < 4; ++k) {
                             const Index y = 2 * i + k / 2, z = 2 * j + k % 2;
                             if (x.at(n, c, y, z) > x.at(n, c, row, column)) row = y, column = z;
                           }
                           each(c, row, column, 1);
                         }));
      }
    }
  }
}

TEST_CASE("a relu works in place and has no gradient at zero", "[training][operations]") {
  Rng rng(15);
  for (const Index images : batches) {
    const Batch x = small_integers(images, 3, 3, 2, rng);
    Rig<float> rig(images);
    Maps<float>& maps = rig.input(x);
    relu(rig.tape, maps);
    check(rig, maps, x, maps,
          definition(x, 3, 3, 2, rng, [&](auto&, Index n, Index c, Index i, Index j, auto&& each) {
            each(c, i, j, x.at(n, c, i, j) > 0);
          }));
  }
}

TEST_CASE("an average pool is the mean of each window, and shares its gradient",
          "[training][operations]") {
  Rng rng(161);
  for (const concertina::PerAxis<2>& kernel :
       {concertina::PerAxis<2>{4, 2}, {1, 2}, {2, 1}, {2, 2}}) {
    for (const Index images : batches) {
      const double share = 1.0 / static_cast<double>(kernel[0] * kernel[1]);  // exact
      const Batch x = small_integers(images, 3, 4, 2, rng);
      Rig<float> rig(images);
      Maps<float>& maps = rig.input(x);
      check(rig, maps, x, average_pool(rig.tape, maps, kernel),
            definition(x, 3, 5 - kernel[0], 3 - kernel[1], rng,
                       [&](auto&, Index, Index c, Index i, Index j, auto&& each) {
                         for (Index tap = 0; tap < kernel[0] * kernel[1]; ++tap) {
                           each(c, i + tap / kernel[1], j + tap % kernel[1], share);
                         }
                       }));
    }
  }
}

TEST_CASE("what is detached is a copy without a gradient", "[training][operations]") {
  Rng rng(162);
  const Batch x = small_integers(17, 2, 3, 2, rng), direction = small_integers(17, 2, 3, 2, rng);
  Rig<float> rig(17);
  Maps<float>& maps = rig.input(x);
  Maps<float>& copy = detached(rig.tape, maps);
  rig.seed(maps, direction);
  const ConvShape<0> shape{.out = 2, .in = 12};
  static_cast<void>(linear(rig.tape, copy, shape, rig.weights(shape, [] { return 1.0; })));
  rig.tape.forward(17, true);
  CHECK(values_of(copy, 17) == x);
  rig.tape.backward();
  CHECK(gradients_of(maps, 17) == direction);
}

TEST_CASE("branches add up, and each has the gradient of the sum", "[training][operations]") {
  Rng rng(16);
  for (const Index images : batches) {
    const Batch a = small_integers(images, 2, 3, 5, rng), b = small_integers(images, 2, 3, 5, rng),
                c = small_integers(images, 2, 3, 5, rng);
    const Batch direction = small_integers(images, 2, 3, 5, rng);
    Rig<float> rig(images);
    Maps<float>&x = rig.input(a), &y = rig.input(b), &z = rig.input(c);
    Maps<float>& sum = add(rig.tape, {&x, &y, &z, &y});  // one of them twice
    rig.seed(sum, direction);
    Batch expected = a, doubled = direction;
    for (std::size_t i = 0; i < a.values.size(); ++i) {
      expected.values[i] += 2 * b.values[i] + c.values[i];
      doubled.values[i] *= 2;
    }
    for (int time = 0; time < 2; ++time) {
      rig.tape.forward(images, true);
      CHECK(values_of(sum, images) == expected);
      rig.tape.backward();
      CHECK(gradients_of(x, images) == direction);
      CHECK(gradients_of(y, images) == doubled);
      CHECK(gradients_of(z, images) == direction);
    }
  }
}

// ---- central differences ------------------------------------------------------------------------

namespace {

/// dL/dnumber to the fourth order of the step.
template <class Loss>
double difference(double& number, double step, Loss&& loss) {
  const double start = number;
  const auto moved = [&](double by) {
    number = start + by;
    return loss();
  };
  const double near = moved(step) - moved(-step), far = moved(2 * step) - moved(-2 * step);
  number = start;
  return (8 * near - far) / (12 * step);
}

/// Numbers whose gradient is checked: of an input's batch or of a tensor.
struct Variable {
  std::string name;
  std::span<double> numbers;
  std::vector<double> gradient;
};

/// Compares at most `count` numbers of each variable, evenly spread.
template <class Loss>
void check_differences(std::vector<Variable> variables, double step, double tolerance, Loss&& loss,
                       std::size_t count = 40) {
  for (const Variable& variable : variables) {
    REQUIRE(variable.gradient.size() == variable.numbers.size());
    const std::size_t stride = std::max<std::size_t>(1, variable.numbers.size() / count);
    for (std::size_t i = 0; i < variable.numbers.size(); i += stride) {
      INFO(variable.name << ", number " << i);
      CHECK(
          variable.gradient[i] ==
          Approx(difference(variable.numbers[i], step, loss)).epsilon(tolerance).margin(tolerance));
    }
  }
}

Variable variable_of(const std::string& name, Tensor<double>& tensor) {
  return {name, tensor.value, doubles(tensor.gradient)};
}

}  // namespace

TEST_CASE("a batch norm's gradients are those of the whole batch", "[training][operations]") {
  Rng rng(17);
  const auto draw = [&] { return 1 + random_number(rng) / 2; };
  for (const auto& [height, width, margin] :
       {std::tuple(3, 2, Padding<2>(0)), std::tuple(4, 5, Padding<2>::sides({1, 0}, {0, 3}))}) {
    for (const Index images : batches) {
      INFO(images << " images of " << height << "x" << width);
      Batch x = random_batch(images, 3, height, width, rng);
      for (double& value : x.values) value = 2 * value + 0.75;
      const Batch direction = random_batch(images, 3, height, width, rng);
      Rig<double> rig(images);
      Maps<double>& input = rig.input(x);
      const NormTensors<double> norm = rig.norm(3, draw);
      const auto product = rig.seed(batch_norm(rig.tape, input, norm, margin), direction);
      const auto loss = [&] {
        put(input, x, 1000.0);
        rig.tape.forward(images, true);
        return product();
      };
      loss();
      rig.tape.backward();
      check_differences({{"x", x.values, gradients_of(input, images).values},
                         variable_of("weight", *norm.weight),
                         variable_of("bias", *norm.bias)},
                        1e-3, 1e-8, loss);
    }
  }
}

TEST_CASE("a batch norm with a margin has the statistics of what is inside",
          "[training][operations]") {
  Rng rng(171);
  const Batch x = random_batch(17, 2, 5, 6, rng);
  Batch inside(17, 2, 3, 3);
  inside.for_each([&](Index n, Index c, Index i, Index j) {
    inside.at(n, c, i, j) = x.at(n, c, i + 2, j + 1);
  });
  const auto run = [](const Batch& on, const Padding<2>& margin, Batch& y) {
    Rng own(172);
    Rig<double> rig(17);
    Maps<double>& input = rig.input(on);
    const NormTensors<double> norm = rig.norm(2, [&] { return random_number(own); });
    Maps<double>& output = batch_norm(rig.tape, input, norm, margin);
    put(input, on, 1000.0);
    rig.tape.forward(17, true);
    y = values_of(output, 17);
    return std::pair(norm.running_mean->value, norm.running_var->value);
  };
  Batch whole = x, cropped = inside;
  CHECK(run(x, Padding<2>::sides({2, 1}, {0, 2}), whole) == run(inside, 0, cropped));
  inside.for_each([&](Index n, Index c, Index i, Index j) {
    CHECK(whole.at(n, c, i + 2, j + 1) == cropped.at(n, c, i, j));
  });
}

TEST_CASE("a cross-entropy's gradient has its weight", "[training][operations]") {
  Rng rng(18);
  for (const Index images : batches) {
    INFO(images << " images");
    Batch z = random_batch(images, 7, 1, 1, rng);
    for (double& value : z.values) value *= 4;
    Rig<double> rig(images);
    Maps<double>& logits = rig.input(z);
    CrossEntropy<double> entropy(rig.tape, logits);
    entropy.set_weight(0.25);
    std::vector<std::uint8_t> labels(at(images));
    for (auto& label : labels) label = static_cast<std::uint8_t>(random_index(rng, 0, 6));
    entropy.set_labels(labels);
    const auto loss = [&] {
      put(logits, z, 5.0);
      rig.tape.forward(images, true);
      return entropy.loss() / 4;
    };
    loss();
    rig.tape.backward();
    check_differences({{"logits", z.values, gradients_of(logits, images).values}}, 1e-3, 1e-8, loss,
                      200);
  }
}

TEST_CASE("maps that many operations read, in any order, have the sum of their gradients",
          "[training][operations]") {
  constexpr Index images = 17;
  constexpr std::size_t kinds = 7;
  Rng rng(19);
  const Batch x = small_integers(images, 2, 4, 5, rng);
  // Reads the maps by one kind of operation; its numbers are the same each time.
  const auto read = [](Rig<double>& rig, Maps<double>& maps, std::size_t kind) {
    Rng own(kind);
    const auto draw = [&] { return static_cast<double>(random_index(own, -4, 4)); };
    const auto apply = [&]() -> Maps<double>& {
      const ConvShape<2> conv{.out = 3, .in = 2, .kernel_size = 3, .padding = 1};
      const ConvShape<0> full{.out = 3, .in = 40, .bias = true};
      switch (kind) {
        case 0: return convolution(rig.tape, maps, conv, rig.weights(conv, draw));
        case 1: return linear(rig.tape, maps, full, rig.weights(full, draw));
        case 2: return max_pool(rig.tape, maps);
        case 3: return add(rig.tape, {&maps, &maps});
        case 4: return average_pool(rig.tape, maps, {4, 2});
        case 5: return linear(rig.tape, detached(rig.tape, maps), full, rig.weights(full, draw));
        default: return batch_norm(rig.tape, maps, rig.norm(2, draw));
      }
    };
    Maps<double>& y = apply();
    rig.seed(y, small_integers(images, y.channels, y.height, y.width, own));
  };
  const auto gradient = [&](const std::vector<std::size_t>& readers) {
    Rig<double> rig(images);
    Maps<double>& maps = rig.input(x);
    for (const std::size_t kind : readers) read(rig, maps, kind);
    for (int time = 0; time < 2; ++time) {  // the second is not added to the first
      rig.tape.forward(images, true);
      rig.tape.backward();
    }
    return gradients_of(maps, images).values;
  };
  std::vector<std::vector<double>> each;
  for (std::size_t kind = 0; kind < kinds; ++kind) each.push_back(gradient({kind}));
  std::vector<std::size_t> order(kinds);
  std::iota(order.begin(), order.end(), std::size_t{0});
  do {
    const std::vector<double> sum = gradient(order);
    double distance = 0;
    for (std::size_t i = 0; i < sum.size(); ++i) {
      double expected = 0;
      for (const auto& one : each) expected += one[i];
      distance = maximum(distance, std::abs(sum[i] - expected));
    }
    INFO("order " << order[0] << order[1] << order[2] << order[3] << order[4]);
    CHECK(distance < 1e-13);  // rounding of the batch norm's part; the others are integers
  } while (std::ranges::next_permutation(order).found);
}

// ---- batch norm ---------------------------------------------------------------------------------

namespace {

/// Statistics of a channel, and what bounds the rounding of ours.
struct Statistics {
  long double mean = 0, variance = 0, unbiased = 0;
  long double magnitude = 0;  ///< mean of |x|
};

Statistics statistics_of(const Batch& x, Index channel) {
  Statistics all;
  std::vector<long double> values;
  x.for_each([&](Index n, Index c, Index y, Index z) {
    if (c == channel) values.push_back(x.at(n, c, y, z));
  });
  const auto count = static_cast<long double>(values.size());
  for (const long double value : values) {
    all.mean += value / count, all.magnitude += std::abs(value) / count;
  }
  for (const long double value : values) {
    all.variance += (value - all.mean) * (value - all.mean) / count;
  }
  all.unbiased = count > 1 ? all.variance * count / (count - 1) : 0;
  return all;
}

/// The image's numbers and the statistics, within what rounding allows. With u the unit roundoff,
/// P positions, A the mean of |x|, s the deviation, to first order:
///   the mean errs by (P + 1) u A: P sums per lane in Scalar, the rest in double
///   the variance by (P + 3) u times itself, and 2 s times the mean's error between chunks
///   y = factor * x + offset by four roundings of its terms, and by the above through factor
/// All doubled, for terms of second order and the reference's own rounding.
template <class Scalar>
void check_batch_norm(Index images, Index channels, Index height, Index width, double level,
                      double spread, Rng& rng) {
  INFO(images << " images of " << channels << "x" << height << "x" << width << " around " << level);
  const long double u = std::numeric_limits<Scalar>::epsilon() / 2;
  const auto count = static_cast<long double>(height * width);
  Batch x = random_batch(images, channels, height, width, rng);
  for (double& value : x.values) {
    value = static_cast<double>(static_cast<Scalar>(level + spread * value));
  }
  Rig<Scalar> rig(images);
  Maps<Scalar>& input = rig.input(x);
  const NormTensors<Scalar> norm = rig.norm(channels, [&] { return random_number(rng); });
  const std::vector<Scalar> old_mean = norm.running_mean->value, old_var = norm.running_var->value;
  Maps<Scalar>& output = batch_norm(rig.tape, input, norm);
  put(input, x, Scalar(1000));

  // Inference first: running statistics are used and left alone.
  rig.tape.forward(images, false);
  CHECK(norm.running_mean->value == old_mean);
  CHECK(norm.running_var->value == old_var);
  /// The worst error of y = weight * (x - mean) / sqrt(variance + eps) + bias, of what is allowed.
  const auto worst = [&](const Batch& y, auto&& statistics, auto&& bound) {
    long double ratio = 0;
    x.for_each([&](Index n, Index c, Index i, Index j) {
      const Statistics& all = statistics[at(c)];
      const long double inverse = 1 / std::sqrt(all.variance + 1e-5L);
      const long double factor = static_cast<long double>(norm.weight->value[at(c)]) * inverse;
      const auto bias = static_cast<long double>(norm.bias->value[at(c)]);
      const long double value = x.at(n, c, i, j), distance = value - all.mean;
      const long double four =
          4 * (std::abs(factor) * (std::abs(value) + std::abs(all.mean)) + std::abs(bias));
      const long double error =
          std::abs(static_cast<long double>(y.at(n, c, i, j)) - (factor * distance + bias));
      const long double from_statistics =
          std::abs(factor) * bound(all, std::abs(distance), std::abs(distance) * inverse);
      ratio = maximum(ratio, error / (2 * u * (four + from_statistics)));
    });
    return static_cast<double>(ratio);
  };
  std::vector<Statistics> running, batch;
  for (Index c = 0; c < channels; ++c) {
    running.push_back({.mean = static_cast<long double>(old_mean[at(c)]),
                       .variance = static_cast<long double>(old_var[at(c)])});
    batch.push_back(statistics_of(x, c));
  }
  CHECK(worst(values_of(output, images), running, [](auto&&...) { return 0.0L; }) < 1);

  rig.tape.forward(images, true);
  CHECK(worst(values_of(output, images), batch,
              [&](const Statistics& all, long double distance, long double normalised) {
                return (count + 1) * all.magnitude * (1 + normalised) + distance * (count + 3) / 2;
              }) < 1);
  for (Index c = 0; c < channels; ++c) {
    const Statistics& all = batch[at(c)];
    const long double mean_error = (count + 1) * all.magnitude;
    const long double mean = 0.9L * static_cast<long double>(old_mean[at(c)]) + 0.1L * all.mean;
    const long double variance =
        0.9L * static_cast<long double>(old_var[at(c)]) + 0.1L * all.unbiased;
    CHECK(std::abs(static_cast<long double>(norm.running_mean->value[at(c)]) - mean) <=
          2 * u * (2 * std::abs(mean) + std::abs(0.9L * old_mean[at(c)]) + 0.1L * mean_error));
    CHECK(std::abs(static_cast<long double>(norm.running_var->value[at(c)]) - variance) <=
          2 * u *
              (2 * variance +
               0.1L * ((count + 3) * all.unbiased + 4 * std::sqrt(all.unbiased) * mean_error)));
  }
}

}  // namespace

TEST_CASE("a batch norm is that of PyTorch, by batch and by running statistics",
          "[training][operations]") {
  Rng rng(20);
  for (const Index images : batches) {
    for (const double level : {0.0, -3.0, 40.0}) {
      check_batch_norm<float>(images, random_index(rng, 1, 5), random_index(rng, 1, 5),
                              random_index(rng, 2, 5), level, 1, rng);
      check_batch_norm<double>(images, 2, 3, 2, level, 0.5, rng);
    }
  }
  check_batch_norm<float>(1, 3, 1, 1, 0.5, 1, rng);  // one number: its variance is 0
  check_batch_norm<float>(33, 2, 32, 31, 1, 2, rng);
}

TEST_CASE("running statistics move with every batch in training", "[training][operations]") {
  // Two batches of 1, 3 and of 5, 9 in one channel: means 2 and 7, unbiased variances 2 and 8.
  Rig<double> rig(2);
  Maps<double>& input = rig.tape.maps(1, 1, 1);
  const NormTensors<double> norm = rig.norm(1, [] { return 0.0; });
  norm.running_var->value = {1};
  batch_norm(rig.tape, input, norm);
  Batch x(2, 1, 1, 1);
  x.values = {1, 3};
  put(input, x);
  rig.tape.forward(2, true);
  CHECK(norm.running_mean->value[0] == Approx(0.2).epsilon(1e-15));
  CHECK(norm.running_var->value[0] == Approx(1.1).epsilon(1e-15));
  x.values = {5, 9};
  put(input, x);
  rig.tape.forward(2, true);
  CHECK(norm.running_mean->value[0] == Approx(0.88).epsilon(1e-15));
  CHECK(norm.running_var->value[0] == Approx(1.79).epsilon(1e-15));
}

// ---- cross-entropy ------------------------------------------------------------------------------

namespace {

/// Loss and gradient within what rounding allows. With u the unit roundoff, K classes and S the
/// largest distance to the largest logit, to first order: an exponential errs by (S + 4) u times
/// itself, from its argument's rounding and its own; their sum, and so its logarithm, by
/// (S + K + 4) u. All doubled, as above.
template <class Scalar>
void check_cross_entropy(Index images, Index classes, double spread, Rng& rng) {
  INFO(images << " images, " << classes << " classes, logits within " << spread);
  const long double u = std::numeric_limits<Scalar>::epsilon() / 2;
  Batch z = random_batch(images, classes, 1, 1, rng);
  for (double& value : z.values) {
    value = static_cast<double>(static_cast<Scalar>(spread * value));
  }
  Rig<Scalar> rig(images);
  Maps<Scalar>& logits = rig.input(z);
  CrossEntropy<Scalar> entropy(rig.tape, logits);
  std::vector<std::uint8_t> labels;
  for (Index n = 0; n < images; ++n) {
    labels.push_back(static_cast<std::uint8_t>(random_index(rng, 0, classes - 1)));
  }
  entropy.set_labels(labels);
  put(logits, z, Scalar(3));
  rig.tape.forward(images, false);

  long double loss = 0, bound = 0;
  Index correct = 0;
  Batch gradient(images, classes, 1, 1), gradient_bound = gradient;
  for (Index n = 0; n < images; ++n) {
    const Index label = labels[at(n)];
    Index found = 0;
    for (Index k = 0; k < classes; ++k) {
      if (z.at(n, k, 0, 0) > z.at(n, found, 0, 0)) found = k;
    }
    correct += found == label;
    const long double largest = z.at(n, found, 0, 0);
    long double sum = 0, furthest = 0;
    for (Index k = 0; k < classes; ++k) {
      const long double shifted = z.at(n, k, 0, 0) - largest;
      sum += std::exp(shifted);
      furthest = std::max(furthest, -shifted);
    }
    const auto terms = static_cast<long double>(classes);
    const long double product = z.at(n, label, 0, 0) - largest;
    loss += std::log(sum) - product;
    bound += furthest + terms + 4 + (terms + 3) * std::log(sum) - (terms + 2) * product;
    for (Index k = 0; k < classes; ++k) {
      const long double share = std::exp(z.at(n, k, 0, 0) - largest) / sum;
      const long double count = static_cast<long double>(images);
      gradient.at(n, k, 0, 0) = static_cast<double>((share - (k == label)) / count);
      gradient_bound.at(n, k, 0, 0) = static_cast<double>(
          2 * u * (share * (2 * furthest + 2 * terms + 12) + (k == label ? 4 : 0)) / count);
    }
  }
  CHECK(entropy.correct() == correct);
  CHECK(std::abs(entropy.loss() - loss / static_cast<long double>(images)) <=
        2 * u * bound / static_cast<long double>(images));
  const Batch ours = gradients_of(logits, images);
  double worst = 0;
  for (std::size_t i = 0; i < ours.values.size(); ++i) {
    worst =
        std::max(worst, std::abs(ours.values[i] - gradient.values[i]) / gradient_bound.values[i]);
  }
  CHECK(worst <= 1);
}

}  // namespace

TEST_CASE("a cross-entropy is that of the definition", "[training][operations]") {
  Rng rng(21);
  for (const Index images : batches) {
    for (const double spread : {0.0, 1.0, 30.0}) {
      check_cross_entropy<float>(images, 10, spread, rng);
      check_cross_entropy<double>(images, random_index(rng, 1, 12), spread, rng);
    }
  }
}

TEST_CASE("a cross-entropy of logits that overflow exponentials", "[training][operations]") {
  Rig<float> rig(1);
  Batch z(1, 3, 1, 1);
  z.values = {1000, 990, -1000};
  Maps<float>& logits = rig.input(z);
  CrossEntropy<float> entropy(rig.tape, logits);
  entropy.set_labels(std::vector<std::uint8_t>{1});
  rig.tape.forward(1, false);
  CHECK(entropy.loss() == Approx(10 + std::log1p(std::exp(-10.0))).epsilon(1e-6));
  CHECK(entropy.correct() == 0);
}

TEST_CASE("labels of images beyond the batch change nothing", "[training][operations]") {
  Rng rng(29);
  const Batch z = random_batch(17, 4, 1, 1, rng);
  const auto results = [&](std::size_t labels) {
    Rig<float> rig(33);
    Maps<float>& logits = rig.tape.maps(4, 1, 1);
    CrossEntropy<float> entropy(rig.tape, logits);
    entropy.set_labels(std::vector<std::uint8_t>(labels));
    put(logits, z, 2.0f);
    rig.tape.forward(17, true);
    for_each_lane(logits, z, true, [](float gradient, const double* value) {
      if (!value && gradient != 0) FAIL("a lane without an image has gradient " << gradient);
    });
    return std::tuple(entropy.loss(), entropy.correct(), gradients_of(logits, 17));
  };
  CHECK(results(33) == results(17));
}

// ---- a network of everything --------------------------------------------------------------------

namespace {

/// Layers in a row: contracted to one, or one after another.
template <class Scalar, int Rank>
struct Layers {
  std::vector<ConvShape<Rank>> shapes;
  std::vector<Weights<Scalar>> weights;
  std::optional<std::pair<Weights<Scalar>, ConvShape<Rank>>> contracted = {};

  Maps<Scalar>& apply(Tape<Scalar>& tape, Maps<Scalar>& x) const {
    if (contracted) return layer(tape, x, contracted->second, contracted->first);
    Maps<Scalar>* y = &x;
    for (std::size_t l = 0; l < shapes.size(); ++l) y = &layer(tape, *y, shapes[l], weights[l]);
    return *y;
  }
};

/// All operations: a chain of convolutions, a norm, a relu, a pool, parallel branches with norms, a
/// chain of linear layers with a relu, a linear layer and the loss. Chains are contracted or not.
template <class Scalar>
struct Everything {
  struct Options {
    Index capacity = 33;
    Index threads = 1;
    bool contract = true;
    bool norm = true;  ///< after the first convolutions, whose biases have no gradient then
    std::vector<ConvShape<2>> convolutions = {
        {.out = 5, .in = 3, .kernel_size = 1, .padding = 1, .bias = true},
        {.out = 6, .in = 5, .kernel_size = 3, .bias = true},
        {.out = 9, .in = 6, .kernel_size = 1, .bias = true}};
    std::vector<Index> linears = {20, 12};  ///< between the flattened maps and the last layer
  };

  explicit Everything(const Options& options)
      : rig(options.capacity, options.threads), contractions(rig.tape) {
    Rng rng(22);
    // Scaled such that nothing grows through the layers.
    const auto add_layer = [&]<int Rank>(const ConvShape<Rank>& shape) {
      const double bound =
          std::sqrt(3.0 / static_cast<double>(shape.in * numel(shape.kernel_size)));
      return rig.weights(shape, [&] { return bound * random_number(rng); });
    };
    const auto add_layers = [&]<int Rank>(std::vector<ConvShape<Rank>> shapes) {
      Layers<Scalar, Rank> chain{std::move(shapes), {}};
      for (const auto& shape : chain.shapes) chain.weights.push_back(add_layer(shape));
      if (options.contract) {
        chain.contracted = contractions.add(Chain<Scalar, Rank>{chain.shapes, chain.weights});
      }
      return chain;
    };
    const auto norm = [&](Index channels) {
      return rig.norm(channels, [&] { return 1 + random_number(rng) / 2; });
    };
    const auto convolutions = add_layers(options.convolutions);
    Index channels = options.convolutions.back().out;
    std::vector<ConvShape<0>> linears;
    Index in = 4 * 4 * 4;
    for (const Index out : options.linears) {
      linears.push_back({.out = out, .in = in, .bias = true});
      in = out;
    }
    const auto fully_connected = add_layers(linears);

    Tape<Scalar>& tape = rig.tape;
    images = &tape.maps(options.convolutions.front().in, 9, 8, false);
    Maps<Scalar>* x = &convolutions.apply(tape, *images);
    if (options.norm) x = &batch_norm(tape, *x, norm(channels));
    relu(tape, *x);
    x = &max_pool(tape, *x);
    REQUIRE(x->height == 4);
    REQUIRE(x->width == 4);
    std::vector<Maps<Scalar>*> branches;
    for (const ConvShape<2>& shape :
         {ConvShape<2>{.out = 4, .in = channels, .kernel_size = 3, .padding = 1},
          ConvShape<2>{.out = 4, .in = channels, .kernel_size = {3, 1}, .padding = {1, 0}},
          ConvShape<2>{.out = 4, .in = channels, .kernel_size = {1, 3}, .padding = {0, 1}}}) {
      branches.push_back(
          &batch_norm(tape, convolution(tape, *x, shape, add_layer(shape)), norm(4)));
    }
    x = &add(tape, branches);
    relu(tape, *x);
    x = &fully_connected.apply(tape, *x);
    relu(tape, *x);
    const ConvShape<0> last{.out = 10, .in = in, .bias = true};
    logits = &linear(tape, *x, last, add_layer(last));
    entropy.emplace(tape, *logits);
  }

  /// One batch, forwards and backwards.
  void run(const Batch& batch, std::span<const std::uint8_t> labels, Scalar rest = 0) {
    put(*images, batch, rest);
    entropy->set_labels(labels);
    rig.tape.forward(batch.images, true);
    rig.tape.backward();
  }

  /// The loss, the logits, all tensors' numbers and gradients.
  std::vector<Scalar> results(Index count) {
    std::vector<Scalar> all = {static_cast<Scalar>(entropy->loss())};
    const Batch last = values_of(*logits, count);
    for (const double logit : last.values) all.push_back(static_cast<Scalar>(logit));
    for (Tensor<Scalar>& tensor : rig.tape.tensors()) {
      all.insert(all.end(), tensor.value.begin(), tensor.value.end());
      all.insert(all.end(), tensor.gradient.begin(), tensor.gradient.end());
    }
    return all;
  }

  Rig<Scalar> rig;
  Contractions<Scalar> contractions;
  Maps<Scalar>*images = nullptr, *logits = nullptr;
  std::optional<CrossEntropy<Scalar>> entropy;
};

std::vector<std::uint8_t> random_labels(Index images, Rng& rng) {
  std::vector<std::uint8_t> labels;
  for (Index n = 0; n < images; ++n) {
    labels.push_back(static_cast<std::uint8_t>(random_index(rng, 0, 9)));
  }
  return labels;
}

}  // namespace

TEST_CASE("lanes without an image change nothing", "[training][operations]") {
  Rng rng(24);
  for (const Index images : {1, 15, 17}) {
    INFO(images << " images");
    const Batch x = random_batch(images, 3, 9, 8, rng), more = random_batch(33, 3, 9, 8, rng);
    const auto labels = random_labels(images, rng), more_labels = random_labels(33, rng);
    const auto results = [&](auto&& before, float rest) {
      Everything<float> network({});
      before(network);
      for (Tensor<float>& tensor : network.rig.tape.tensors()) {
        // The running statistics are those of the last batch alone.
        if (tensor.name == "norm.running_mean") std::ranges::fill(tensor.value, 0.0f);
        if (tensor.name == "norm.running_var") std::ranges::fill(tensor.value, 1.0f);
      }
      network.run(x, labels, rest);
      return network.results(images);
    };
    const std::vector<float> expected = results([](auto&) {}, 0);
    CHECK(results([](auto&) {}, 1e6f) == expected);
    CHECK(results([](auto&) {}, -1e20f) == expected);
    CHECK(results([&](Everything<float>& network) { network.run(more, more_labels); }, 7) ==
          expected);
  }
}

TEST_CASE("gradients of lanes without an image are zero", "[training][operations]") {
  Rng rng(25);
  Everything<float> network({});
  network.run(random_batch(33, 3, 9, 8, rng), random_labels(33, rng));
  const Batch x = random_batch(17, 3, 9, 8, rng);
  network.run(x, random_labels(17, rng), 1000);
  Index beyond = 0;
  const Batch logits = values_of(*network.logits, 17);
  for_each_lane(*network.logits, logits, true, [&](float gradient, const double* value) {
    if (value) return;
    CHECK(gradient == 0);
    ++beyond;
  });
  CHECK(beyond == 15 * 10);
}

TEST_CASE("any number of threads gives the same result, bit for bit", "[training][operations]") {
  Rng rng(26);
  const Batch x = random_batch(83, 3, 9, 8, rng);
  const auto labels = random_labels(83, rng);
  std::vector<std::vector<float>> results;
  for (const Index threads : {1, 2, 3, 5}) {
    // The chain of linear layers is large enough for all threads to contract it together.
    typename Everything<float>::Options options{.capacity = 83, .threads = threads};
    options.linears = {700, 900};
    const std::vector<ConvShape<0>> chain{{.out = 700, .in = 64}, {.out = 900, .in = 700}};
    REQUIRE(concertina::Form(chain).multiply_adds() >= 40'000'000);
    Everything<float> network(options);
    for (int time = 0; time < 3; ++time) {
      network.run(x, labels);
      for (Tensor<float>& tensor : network.rig.tape.tensors()) {  // a step down the gradient
        if (tensor.name.empty()) continue;
        for (std::size_t i = 0; i < tensor.gradient.size(); ++i) {
          tensor.value[i] -= 0.01f * tensor.gradient[i];
        }
      }
      network.rig.tape.tensors_changed();
    }
    results.push_back(network.results(83));
    CHECK(std::ranges::all_of(results.back(), [](float number) { return std::isfinite(number); }));
    CHECK(results.back() == results.front());
  }
}

// ---- contractions -------------------------------------------------------------------------------

namespace {

/// The largest difference, as a part of the largest number.
double distance(std::span<const double> a, std::span<const double> b) {
  REQUIRE(a.size() == b.size());
  double difference = 0, largest = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    difference = maximum(difference, std::abs(a[i] - b[i]));
    largest = std::max({largest, std::abs(a[i]), std::abs(b[i])});
  }
  return largest == 0 ? difference : difference / largest;
}

}  // namespace

TEST_CASE("contracted chains have the loss and the gradients of their layers",
          "[training][operations]") {
  using Shapes = std::vector<ConvShape<2>>;
  constexpr bool bias = true;
  const std::vector<std::pair<std::string, Shapes>> chains = {
      {"1x1, 3x3, 1x1",
       {{.out = 5, .in = 3, .kernel_size = 1, .padding = 1, .bias = bias},
        {.out = 6, .in = 5, .kernel_size = 3, .bias = bias},
        {.out = 9, .in = 6, .kernel_size = 1, .bias = bias}}},
      {"1x1, 7x7, 1x1 as published, biases on the last",
       {{.out = 3, .in = 3, .kernel_size = 1, .padding = 3},
        {.out = 32, .in = 3, .kernel_size = 7},
        {.out = 8, .in = 32, .kernel_size = 1, .bias = bias}}},
      {"3x3, 3x3, 3x3",
       {{.out = 12, .in = 3, .kernel_size = 3, .padding = 3, .bias = bias},
        {.out = 12, .in = 12, .kernel_size = 3, .bias = bias},
        {.out = 8, .in = 12, .kernel_size = 3, .bias = bias}}},
      {"3x1, 1x3, without biases",
       {{.out = 5, .in = 2, .kernel_size = {3, 1}, .padding = 1},
        {.out = 3, .in = 5, .kernel_size = {1, 3}}}}};
  for (const auto& [name, shapes] : chains) {
    for (const Index images : {16, 17}) {
      INFO(name << ", " << images << " images");
      Rng rng(27);
      const Batch x = random_batch(images, shapes.front().in, 9, 8, rng);
      const auto labels = random_labels(images, rng);
      const auto network = [&](bool contract) {
        Everything<double>::Options options{
            .capacity = images, .contract = contract, .norm = false};
        options.convolutions = shapes;
        options.linears = {48, 37, 12};
        auto made = std::make_unique<Everything<double>>(options);
        made->run(x, labels);
        return made;
      };
      const auto contracted = network(true), layered = network(false);
      CHECK(contracted->entropy->loss() == Approx(layered->entropy->loss()).epsilon(1e-12));
      CHECK(contracted->entropy->correct() == layered->entropy->correct());
      // The same tensors in the same order, but for those that hold the contractions.
      std::deque<Tensor<double>>& tensors = contracted->rig.tape.tensors();
      auto own = tensors.begin();
      for (const Tensor<double>& tensor : layered->rig.tape.tensors()) {
        while (own->name.empty()) ++own;
        INFO(tensor.name << " of " << tensor.value.size());
        REQUIRE(own->name == tensor.name);
        REQUIRE(own->shape == tensor.shape);
        // Running statistics are values; those of weights are equal anyhow.
        CHECK(distance(own->value, tensor.value) < 1e-12);
        if (tensor.name.find("running") == std::string::npos) {
          REQUIRE_FALSE(tensor.gradient.empty());
          CHECK(distance(own->gradient, tensor.gradient) < 1e-12);
        }
        ++own;
      }
    }
  }
}

namespace {

/// A block of a geometry, run on a batch forward and back, its layers one by one or contracted.
template <class Scalar>
struct BlockRun {
  Batch y, x_gradient;
  std::vector<double> gradients;
  std::vector<std::vector<double>> statistics;
  Batch inference;
};

/// A layer of a branch, and the batch norm after it.
struct Part {
  Part(const ConvShape<2>& shape_, const Padding<2>& margin_ = 0, bool pool_ = false)
      : shape(shape_), margin(margin_), pool(pool_) {}

  ConvShape<2> shape;
  Padding<2> margin;
  bool pool;
};
using Geometry = std::vector<std::vector<Part>>;  // branches

template <class Scalar>
NormedBranches<Scalar> branches_of(const Geometry& geometry, Rig<Scalar>& rig,
                                   const std::function<double()>& draw) {
  NormedBranches<Scalar> branches;
  for (const auto& parts : geometry) {
    auto& branch = branches.emplace_back();
    for (const auto& [shape, margin, pool] : parts) {
      branch.push_back({shape, pool ? Weights<Scalar>{} : rig.weights(shape, draw),
                        rig.norm(shape.out, [&] { return 0.5 + std::abs(draw()); }), margin});
    }
  }
  return branches;
}

template <class Scalar>
BlockRun<Scalar> run_block(const Geometry& geometry, const Batch& x, Index threads,
                           bool contracted) {
  Rng rng(5);
  const auto draw = [&] { return concertina::random_uniform(rng, 1); };
  Rig<Scalar> rig(x.images + 3, threads);
  Maps<Scalar>& input = rig.input(x);
  const NormedBranches<Scalar> branches = branches_of(geometry, rig, draw);
  std::vector<Tensor<Scalar>*> parameters, statistics;
  for (const auto& branch : branches) {
    for (const auto& [shape, weights, norm, margin] : branch) {
      for (Tensor<Scalar>* tensor : {weights.weight, weights.bias, norm.weight, norm.bias}) {
        if (tensor) parameters.push_back(tensor);
      }
      statistics.insert(statistics.end(), {norm.running_mean, norm.running_var});
    }
  }
  Maps<Scalar>* y = nullptr;
  if (contracted) {
    y = &contracted_block(rig.tape, input, branches);
  } else {
    std::vector<Maps<Scalar>*> summands;
    for (const auto& branch : branches) {
      Maps<Scalar>* from = &input;
      for (const auto& [shape, weights, norm, margin] : branch) {
        from = weights.weight ? &convolution(rig.tape, *from, shape, weights)
                              : &average_pool(rig.tape, *from, shape.kernel_size);
        from = &batch_norm(rig.tape, *from, norm, margin);
      }
      summands.push_back(from);
    }
    y = summands.size() == 1 ? summands.front() : &add(rig.tape, summands);
  }
  Batch direction(x.images, y->channels, y->height, y->width);
  for (double& value : direction.values) value = draw();
  rig.seed(*y, direction);
  for (const Scalar rest : {Scalar(1000), Scalar(0)}) {  // twice: gradients are set, not added
    put(input, x, rest);
    rig.tape.forward(x.images, true);
    rig.tape.backward();
  }
  BlockRun<Scalar> result{values_of(*y, x.images), gradients_of(input, x.images), {}, {}, x};
  for (const auto* tensor : parameters) {
    result.gradients.insert(result.gradients.end(), tensor->gradient.begin(),
                            tensor->gradient.end());
  }
  for (const auto* tensor : statistics) result.statistics.push_back(doubles(tensor->value));
  rig.tape.forward(x.images, false);
  result.inference = values_of(*y, x.images);
  return result;
}

}  // namespace

TEST_CASE("contracted blocks train as their layers and batch norms do, one by one",
          "[training][operations]") {
  const ConvShape<2> dense{.out = 5, .in = 3, .kernel_size = 3, .padding = 1},
      one{.out = 5, .in = 3, .kernel_size = 1},
      column{.out = 5, .in = 3, .kernel_size = {3, 1}, .padding = {1, 0}},
      down{.out = 4, .in = 3, .kernel_size = 3, .stride = 2, .padding = 1, .bias = true},
      inside{.out = 5, .in = 3, .kernel_size = 3}, cropped{.out = 5, .in = 3, .padding = -1};
  const ConvShape<2> widen{.out = 7, .in = 3, .kernel_size = 1, .padding = 1, .bias = true},
      middle{.out = 6, .in = 7, .kernel_size = 3}, narrow{.out = 4, .in = 6, .kernel_size = 1};
  // DBB's chains, padded and not: norms before the window leave the padding out.
  const ConvShape<2> pool{.out = 5, .in = 5, .kernel_size = 3, .groups = 5},
      window{.out = 5, .in = 5, .kernel_size = 3};
  const auto diverse = [&](Index padding) {
    ConvShape<2> origin = dense, point = one, first = one;
    origin.padding = padding, point.padding = padding - 1, first.padding = padding;
    return Geometry{
        {origin}, {point}, {{first, padding}, {pool, 0, true}}, {{first, padding}, window}};
  };
  Rng rng(3);
  for (const Geometry& geometry :
       {Geometry{{dense}, {one}}, Geometry{{dense}, {column}}, Geometry{{dense}, {dense}, {one}},
        Geometry{{down}}, Geometry{{inside}, {cropped}}, Geometry{{widen, middle, narrow}},
        diverse(0), diverse(1), diverse(3)}) {
    for (const Index images : {2, 16, 21}) {
      Batch x(images, 3, 6, 7);
      for (double& value : x.values) value = 1 + concertina::random_uniform(rng, 1);
      INFO(images << " images, " << to_string(geometry.front().front().shape));
      const auto layered = run_block<double>(geometry, x, 1, false);
      for (const Index threads : {1, 2, 3}) {
        const auto contracted = run_block<double>(geometry, x, threads, true);
        CHECK(distance(contracted.y.values, layered.y.values) < 1e-12);
        CHECK(distance(contracted.x_gradient.values, layered.x_gradient.values) < 1e-12);
        CHECK(distance(contracted.inference.values, layered.inference.values) < 1e-12);
        // All together: biases before a norm have no effect, and rounding's rest as gradient.
        CHECK(distance(contracted.gradients, layered.gradients) < 1e-12);
        for (std::size_t t = 0; t < layered.statistics.size(); ++t) {
          CHECK(distance(contracted.statistics[t], layered.statistics[t]) < 1e-12);
        }
      }
    }
  }
}

TEST_CASE("whether a block with norms costs less contracted", "[training][operations]") {
  const auto cheaper = [](const Geometry& geometry, Index images) {
    Rig<float> rig(1);
    return cheaper_contracted(branches_of(geometry, rig, [] { return 1; }), {16, 16}, images);
  };
  const ConvShape<2> dense{.out = 32, .in = 32, .kernel_size = 3, .padding = 1},
      one{.out = 32, .in = 32, .kernel_size = 1}, widen{.out = 128, .in = 32, .padding = 1},
      middle{.out = 128, .in = 128, .kernel_size = 3}, narrow{.out = 32, .in = 128};
  CHECK(cheaper({{widen, middle, narrow}}, 128));  // CL with norms: docs/moments.md has 6.9 times
  CHECK_FALSE(cheaper({{dense}, {one}}, 128));     // RepVGG: 0.47
  // MobileOne: 2.1 times at kernel 3 and at 7, where moments take longer.
  const auto mobileone = [&](Index kernel) {
    const ConvShape<2> large{.out = 16, .in = 8, .kernel_size = kernel, .padding = kernel / 2};
    const ConvShape<2> small{.out = 16, .in = 8, .kernel_size = 1};
    return Geometry{{large}, {large}, {large}, {large}, {small}};
  };
  CHECK(cheaper(mobileone(3), 128));
  CHECK_FALSE(cheaper(mobileone(7), 128));
}

TEST_CASE("the decay of a contraction is that of a compact layer, pulled back",
          "[training][operations]") {
  // Of small integers, so every number is exact.
  constexpr double decay = 3;
  const std::vector<ConvShape<2>> shapes = {{.out = 4, .in = 2, .kernel_size = 1, .bias = true},
                                            {.out = 3, .in = 4, .kernel_size = 3, .bias = true}};
  Rng rng(28);
  const auto draw = [&] { return static_cast<double>(random_index(rng, -3, 3)); };
  const Batch x = small_integers(5, 2, 4, 4, rng), direction = small_integers(5, 3, 2, 2, rng);
  Rig<double> rig(5);
  Contractions<double> contractions(rig.tape);
  const Chain<double, 2> chain{shapes,
                               {rig.weights(shapes[0], draw), rig.weights(shapes[1], draw)}};
  const auto [weights, shape] = contractions.add(chain);
  Maps<double>& input = rig.input(x);
  rig.seed(convolution(rig.tape, input, shape, weights), direction);
  const auto gradients = [&](double by) {
    contractions.set_decay(by);
    rig.tape.forward(5, true);
    rig.tape.backward();
    std::vector<double> result;
    for (const Weights<double>& layer : chain.layers) {
      for (const Tensor<double>* tensor : {layer.weight, layer.bias}) {
        result.insert(result.end(), tensor->gradient.begin(), tensor->gradient.end());
      }
    }
    return result;
  };
  const std::vector<double> without = gradients(0), with = gradients(decay);
  // By the definition: F = sum_m B[o][m] A[m][i], b = B a + c, over all taps; its gradient is
  // decay * F.
  const auto& A = chain.layers[0].weight->value;
  const auto& a = chain.layers[0].bias->value;
  const auto& B = chain.layers[1].weight->value;
  const auto& c = chain.layers[1].bias->value;
  std::vector<double> dA(A.size()), da(a.size()), dB(B.size()), dc(c.size());
  for (std::size_t o = 0; o < 3; ++o) {
    double bias = c[o];
    for (std::size_t m = 0; m < 4; ++m) {
      for (std::size_t tap = 0; tap < 9; ++tap) bias += B[(o * 4 + m) * 9 + tap] * a[m];
    }
    dc[o] += decay * bias;
    for (std::size_t tap = 0; tap < 9; ++tap) {
      for (std::size_t m = 0; m < 4; ++m) {
        da[m] += decay * bias * B[(o * 4 + m) * 9 + tap];
        dB[(o * 4 + m) * 9 + tap] += decay * bias * a[m];
      }
      for (std::size_t i = 0; i < 2; ++i) {
        double F = 0;
        for (std::size_t m = 0; m < 4; ++m) F += B[(o * 4 + m) * 9 + tap] * A[m * 2 + i];
        for (std::size_t m = 0; m < 4; ++m) {
          dA[m * 2 + i] += decay * F * B[(o * 4 + m) * 9 + tap];
          dB[(o * 4 + m) * 9 + tap] += decay * F * A[m * 2 + i];
        }
      }
    }
  }
  std::vector<double> expected;
  for (const auto* part : {&dA, &da, &dB, &dc}) {
    expected.insert(expected.end(), part->begin(), part->end());
  }
  for (std::size_t i = 0; i < expected.size(); ++i) expected[i] += without[i];
  CHECK(with == expected);
}

TEST_CASE("a contraction follows its layers only when told that they changed",
          "[training][operations]") {
  Rig<double> rig(1);
  Contractions<double> contractions(rig.tape);
  const std::vector<ConvShape<0>> shapes = {{.out = 1, .in = 1}, {.out = 1, .in = 1, .bias = true}};
  double next = 1;
  const auto draw = [&] { return ++next; };
  Chain<double, 0> chain{shapes, {rig.weights(shapes[0], draw), rig.weights(shapes[1], draw)}};
  const auto [weights, shape] = contractions.add(chain);
  REQUIRE(shape == ConvShape<0>{.out = 1, .in = 1, .bias = true});
  Batch x(1, 1, 1, 1);
  x.values = {5};
  Maps<double>& y = linear(rig.tape, rig.input(x), shape, weights);
  rig.tape.forward(1, false);
  CHECK(values_of(y, 1).values[0] == 2 * 3 * 5 + 4);
  chain.layers[0].weight->value[0] = 7;
  rig.tape.tensors_changed();
  rig.tape.forward(1, false);
  CHECK(values_of(y, 1).values[0] == 7 * 3 * 5 + 4);
}

// ---- refusals -----------------------------------------------------------------------------------

TEST_CASE("operations refuse what they cannot compute, with numbers", "[training][operations]") {
  Rig<float> rig(16);
  const auto zero = [] { return 0.0; };
  Maps<float>& x = rig.tape.maps(3, 5, 4);
  const auto check = [](auto&& record, std::initializer_list<std::string> parts) {
    const std::string message = message_of<ShapeError>(record);
    for (const std::string& part : parts) CHECK_THAT(message, Contains(part));
  };
  const auto by = [&](const auto& shape, const auto& given) {
    return [&rig, &x, zero, shape, given] { layer(rig.tape, x, shape, rig.weights(given, zero)); };
  };
  const ConvShape<2> plain{.out = 2, .in = 3, .kernel_size = 3};
  const auto other = [&](auto change) {
    ConvShape<2> shape = plain;
    change(shape);
    return shape;
  };
  const auto refused = [&](auto change, std::initializer_list<std::string> parts) {
    check(by(other(change), other(change)), parts);
  };
  refused([](auto& shape) { shape.in = 4; }, {"3 channels", "4->2"});
  refused([](auto& shape) { shape.kernel_size = 5; }, {"5x4", "smaller than the kernel"});
  refused([](auto& shape) { shape.stride = 3; }, {"stride"});
  refused([](auto& shape) { shape.stride = {1, 2}; }, {"stride"});
  refused([](auto& shape) { shape.kernel_size = shape.dilation = 2; }, {"dilation"});
  refused([](auto& shape) { shape.out = shape.groups = 3; }, {"groups"});
  refused([](auto& shape) { shape.padding = Padding<2>::sides({1, 1}, {1, 0}); }, {"both sides"});
  check(by(plain, other([](auto& shape) { shape.kernel_size = 2; })),
        {"24 weights and 0 biases", "without bias"});
  check(by(plain, other([](auto& shape) { shape.bias = true; })), {"54 weights and 2 biases"});

  const ConvShape<0> full{.out = 2, .in = 59}, fits{.out = 2, .in = 60, .bias = true};
  check(by(full, full), {"60 numbers", "59->2"});
  check(by(fits, full), {"118 weights and 0 biases", "with bias"});
  check([&] { batch_norm(rig.tape, x, rig.norm(4, zero)); },
        {"norm.weight", "4 numbers", "3 channels"});
  check([&] { batch_norm(rig.tape, x, rig.norm(3, zero), 2); }, {"margin", "2x2", "5x4"});
  check([&] { average_pool(rig.tape, x, {1, 6}); }, {"5x4", "1x6"});
  check([&] { max_pool(rig.tape, rig.tape.maps(3, 1, 4)); }, {"1x4", "2x2"});
  check([&] { add(rig.tape, {&x, &rig.tape.maps(3, 4, 5)}); }, {"3x5x4", "3x4x5"});
}

TEST_CASE("a relu in place is refused where others have read the maps", "[training][operations]") {
  Rig<float> rig(16);
  Maps<float>& x = rig.tape.maps(3, 4, 4);
  relu(rig.tape, x);
  max_pool(rig.tape, x);
  CHECK_THAT(message_of<concertina::Error>([&] { relu(rig.tape, x); }), Contains("relu"));
}

TEST_CASE("a tensor that two operations read is refused", "[training][operations]") {
  Rig<float> rig(16);
  const auto zero = [] { return 0.0; };
  Maps<float>& x = rig.tape.maps(3, 5, 4);
  const auto refused = [](const std::string& tensor, auto&& call) {
    CHECK_THAT(message_of<concertina::Error>(call),
               Contains(tensor + " is read by two operations"));
  };
  const ConvShape<2> conv{.out = 3, .in = 3, .kernel_size = 3};
  const Weights<float> kernel = rig.weights(conv, zero);
  convolution(rig.tape, x, conv, kernel);
  refused("weight", [&] { convolution(rig.tape, x, conv, kernel); });

  const ConvShape<0> full{.out = 2, .in = 60, .bias = true};
  const Weights<float> weights = rig.weights(full, zero);
  linear(rig.tape, x, full, weights);
  const Weights<float> shared{rig.weights(full, zero).weight, weights.bias};
  refused("bias", [&] { linear(rig.tape, x, full, shared); });

  const NormTensors<float> norm = rig.norm(3, zero);
  batch_norm(rig.tape, x, norm);
  refused("norm.weight", [&] { batch_norm(rig.tape, x, norm); });

  // A chain reads its layers, and one operation reads the contraction.
  Contractions<float> contractions(rig.tape);
  refused("weight", [&] { contractions.add(Chain<float, 2>{{conv}, {kernel}}); });
  const Weights<float> own = rig.weights(conv, zero), next = rig.weights(conv, zero);
  const auto [whole, shape] = contractions.add(Chain<float, 2>{{conv, conv}, {own, next}});
  refused("weight", [&] { convolution(rig.tape, x, conv, own); });
  Maps<float>& large = rig.tape.maps(3, 7, 7);
  convolution(rig.tape, large, shape, whole);
  refused("a computed tensor",
          [&, &all = whole, &of = shape] { convolution(rig.tape, large, of, all); });
}

TEST_CASE("labels that do not fit are refused", "[training][operations]") {
  Rig<float> rig(16);
  CrossEntropy<float> entropy(rig.tape, rig.tape.maps(10, 1, 1));
  CHECK_THAT(
      message_of<ShapeError>([&] { entropy.set_labels(std::vector<std::uint8_t>{1, 2, 10}); }),
      Contains("label 10 of image 2") && Contains("10 classes"));
  CHECK_THAT(message_of<ShapeError>([&] { entropy.set_labels(std::vector<std::uint8_t>(17)); }),
             Contains("17 labels") && Contains("16"));
}

// ---- lanes and packed kernels -------------------------------------------------------------------

TEMPLATE_TEST_CASE("lanes of each row are summed", "[training][operations]", float, double) {
  Rng rng(28);
  for (const Index blocks : {1, 2, 5}) {
    std::vector<Row<TestType>> rows(at(blocks * lanes)), sums(at(blocks));
    for (Row<TestType>& row : rows) {
      concertina::test::fill_small_integers(std::span<TestType>(row.image), rng);
    }
    sum_lanes(rows.front().image.data(), blocks, sums.front().image.data());
    for (Index i = 0; i < blocks * lanes; ++i) {
      const auto& row = rows[at(i)].image;
      const TestType expected = std::accumulate(row.begin(), row.end(), TestType(0));
      CHECK(sums[at(i / lanes)].image[at(i % lanes)] == expected);
      CHECK(sum_lanes(rows[at(i)]) == static_cast<double>(expected));
    }
  }
}

TEST_CASE("kernels are packed in blocks of channels", "[training][operations]") {
  for (const Index out : {1, 2, 3, 7, 8, 9, 13, 16, 31}) {
    for (const Index in : {1, 3, 8, 11}) {
      for (const auto& [height, width] : {std::pair<Index, Index>(1, 1), {3, 2}, {1, 5}}) {
        INFO(out << "x" << in << "x" << height << "x" << width);
        const ConvSize size{.out = out,
                            .in = in,
                            .kernel_height = height,
                            .kernel_width = width,
                            .pad_height = 1,
                            .pad_width = -1,
                            .height = 9,
                            .width = 8};
        const Index taps = height * width;
        std::vector<float> weight(at(out * in * taps)), packed(weight.size()), back(weight.size()),
            adjoint(weight.size());
        std::iota(weight.begin(), weight.end(), 1.0f);
        pack_kernel(size, weight.data(), packed.data());
        // Blocks of as many channels as registers hold, then 4, 2 and 1, [in][tap][channel] each.
        Index first = 0;
        auto number = packed.begin();
        while (first < out) {
          const auto left =
              static_cast<Index>(std::bit_floor(static_cast<std::uint64_t>(out - first)));
          const Index block = std::min<Index>(training::detail::widest_block, left);
          for (Index i = 0; i < in * taps; ++i) {
            for (Index o = first; o < first + block; ++o) {
              CHECK(*number++ == weight[at(o * in * taps + i)]);
            }
          }
          first += block;
        }
        CHECK(number == packed.end());

        // The adjoint's kernel as [in][out][ky][kx]: channels exchanged, taps in reverse.
        for (Index o = 0; o < out; ++o) {
          for (Index c = 0; c < in; ++c) {
            for (Index tap = 0; tap < taps; ++tap) {
              adjoint[at((c * out + o) * taps + taps - 1 - tap)] =
                  weight[at((o * in + c) * taps + tap)];
            }
          }
        }
        pack_adjoint_kernel(size, weight.data(), packed.data());
        pack_kernel(size.adjoint(), adjoint.data(), back.data());
        CHECK(back == packed);

        const ConvSize twice = size.adjoint().adjoint();
        CHECK(size.adjoint().out_height() == size.height);
        CHECK(size.adjoint().out_width() == size.width);
        CHECK(std::array{twice.out, twice.in, twice.pad_height, twice.pad_width, twice.height,
                         twice.width} == std::array{size.out, size.in, size.pad_height,
                                                    size.pad_width, size.height, size.width});
      }
    }
  }
}
