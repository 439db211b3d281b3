// The block programs of a SmallNet on a device, each against loops written from its definition.
// SPDX-License-Identifier: Apache-2.0
#include "cifar/cuda/operations.hpp"
#include "cifar/cuda/norm.hpp"
#include "cifar/cuda/product.hpp"

#include "cuda/executor.hpp"
#include "support.hpp"
#include "training/data.hpp"

#include <catch2/catch.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

namespace cifar::cuda {
namespace {

using concertina::test::execute, concertina::test::Memory, concertina::test::Rng;
using concertina::test::random_index;
using Real = long double;

std::size_t size(Index count) { return static_cast<std::size_t>(count); }

template <class Scalar>
constexpr Real rounding = std::numeric_limits<Scalar>::epsilon() / Real(2);

template <class Scalar>
std::vector<Scalar> integers(Index count, Rng& rng) {
  std::vector<Scalar> numbers(size(count));
  concertina::test::fill_small_integers(std::span(numbers), rng);
  return numbers;
}

template <class... Numbers>
void lend(Memory& memory, Numbers&... numbers) {
  (memory.lend(numbers), ...);
}
template <class... Numbers>
void lend_unwritten(Memory& memory, Numbers&... numbers) {
  (memory.lend_unwritten(numbers), ...);
}

// ---- images -------------------------------------------------------------------------------------

TEMPLATE_TEST_CASE("images are loaded to the bit as on the host", "[cuda][cifar]", float, double) {
  constexpr int batch = 7;
  const Dataset data = generated_dataset(10, 20, 1, 3);
  const auto values = normalized_values<TestType>(data.mean, data.deviation);
  auto order = epoch_order(20, 5, 9);
  const bool augmented = GENERATE(true, false);
  const Augmentation augmentation{.seed = 5, .epoch = 9};
  for (const auto& [step, images] : {std::pair(0, 7), std::pair(1, 7), std::pair(2, 6)}) {
    std::vector<Clock> clock = {{.epoch = 9, .step = step}};
    std::vector<TestType> to(size(images * image_size));
    Memory memory;
    lend(memory, data.train.pixels, std::as_const(order), std::as_const(clock), values);
    memory.lend_unwritten(to);
    const Pass<TestType> pass{.pixels = data.train.pixels.data(),
                              .order = order.data(),
                              .clock = clock.data(),
                              .values = values.data(),
                              .batch = batch,
                              .augmented = augmented,
                              .seed = 5};
    execute(LoadImages<TestType>{pass, to.data(), images}, memory);
    memory.require_written(to);
    std::vector<TestType> expected(size(image_size * 16));
    const auto which = std::span(order).subspan(size(step * batch), size(images));
    load_images<TestType, 16>(data, data.train, which, augmented ? &augmentation : nullptr,
                              expected.data());
    Index different = 0;
    for (Index image = 0; image < images; ++image) {
      for (Index i = 0; i < image_size; ++i) {
        different += to[size(image * image_size + i)] != expected[size(i * 16 + image)];
      }
    }
    CHECK(different == 0);
  }
}

// ---- batch norm, ReLU and pool ------------------------------------------------------------------

/// A norm's tensors, and what its programs write.
template <class Scalar>
struct NormNumbers {
  std::vector<Scalar> weight, bias, mean, var, batch, weight_gradient, bias_gradient;
  std::vector<double> sums;

  NormNumbers(int channels, Rng& rng) {
    for (int c = 0; c < channels; ++c) {
      weight.push_back(static_cast<Scalar>(c % 3 == 2 ? -0.75 : 0.5 + c));
      bias.push_back(static_cast<Scalar>(0.30078125 * (c % 2 == 0 ? 1 : -1)));
      mean.push_back(static_cast<Scalar>(concertina::random_uniform(rng, 1.0)));
      var.push_back(static_cast<Scalar>(0.5 + c));
    }
    batch.resize(4 * weight.size());
    weight_gradient.resize(weight.size());
    bias_gradient.resize(weight.size());
    sums.resize(2 * Slices::most * weight.size());
  }

  Norm<Scalar> lent_to(Memory& memory) {
    lend(memory, std::as_const(weight), std::as_const(bias));
    lend(memory, mean, var);
    lend_unwritten(memory, batch, weight_gradient, bias_gradient);
    memory.lend_unwritten(sums);
    return {weight.data(),
            bias.data(),
            mean.data(),
            var.data(),
            sums.data(),
            batch.data(),
            weight_gradient.data(),
            bias_gradient.data()};
  }
};

/// What the definitions say, a channel at a time, with bounds of the rounding.
struct Reference {
  std::vector<Real> y, y_bound, dx, dx_bound;
  std::vector<Real> mean, var, weight_gradient, weight_bound, bias_gradient, bias_bound;
  Real nearest = 1;  // of a value before the ReLU to 0, where rounding decides
};

template <class Scalar>
Reference reference(const MapSize& maps, const std::vector<Scalar>& x,
                    const std::vector<Scalar>& dy, const NormNumbers<Scalar>& norm, bool exists,
                    bool training, int side = 2, Real floor = 0) {
  // Of a thread's sum of at most 32 numbers, of squares, and of what is done with it.
  constexpr Real relative = 50 * rounding<Scalar>;
  const int positions = maps.positions(), pooled = maps.pooled(side).positions();
  Reference result;
  result.y.resize(size(Index{maps.images} * maps.channels * pooled));
  result.y_bound = result.y;
  result.dx.resize(x.size());
  result.dx_bound = result.dx;
  const Real all = Real(maps.images) * positions;
  for (int c = 0; c < maps.channels; ++c) {
    const auto at = [&](int image, int y, int column) {
      return size(((Index{image} * maps.channels + c) * maps.height + y) * maps.width + column);
    };
    const auto each = [&](auto&& visit) {
      for (int image = 0; image < maps.images; ++image) {
        for (int row = 0; row < maps.height; ++row) {
          for (int column = 0; column < maps.width; ++column) visit(at(image, row, column));
        }
      }
    };
    Real mean = 0, squares = 0;
    each([&](std::size_t i) { mean += x[i] / all; });
    each([&](std::size_t i) { squares += (x[i] - mean) * (x[i] - mean); });
    result.mean.push_back(0.9L * norm.mean[size(c)] + 0.1L * mean);
    result.var.push_back(0.9L * norm.var[size(c)] + 0.1L * squares / std::max<Real>(all - 1, 1));
    Real variance = squares / all;
    if (!training) mean = norm.mean[size(c)], variance = norm.var[size(c)];
    const Real inverse = 1 / std::sqrt(variance + 1e-5L);
    const Real factor = exists ? norm.weight[size(c)] * inverse : 1,
               bias = exists ? norm.bias[size(c)] : 0;
    if (!exists) mean = 0;
    const auto value = [&](std::size_t i) { return factor * (x[i] - mean) + bias; };

    std::vector<Real> gradient(x.size());  // of value
    for (int image = 0; image < maps.images; ++image) {
      for (int row = 0; row < maps.height / side; ++row) {
        for (int column = 0; column < maps.width / side; ++column) {
          std::size_t first = at(image, side * row, side * column);
          for (int i = 0; i < side * side; ++i) {
            const std::size_t next = at(image, side * row + i / side, side * column + i % side);
            if (value(next) > value(first)) first = next;
          }
          const std::size_t to = size((Index{image} * maps.channels + c) * pooled +
                                      row * (maps.width / side) + column);
          result.y[to] = std::max(value(first), floor);
          result.y_bound[to] =
              exists ? relative * (std::abs(factor) * (std::abs(x[first]) + std::abs(mean)) + 1)
                     : 0;
          if (exists) result.nearest = std::min(result.nearest, std::abs(value(first)));
          if (value(first) > floor) gradient[first] = dy[to];
        }
      }
    }
    Real sum = 0, product = 0, sum_size = 0, product_size = 0;
    each([&](std::size_t i) {
      const Real normalised = (x[i] - mean) * inverse;
      sum += gradient[i], product += gradient[i] * normalised;
      sum_size += std::abs(gradient[i]), product_size += std::abs(gradient[i] * normalised);
    });
    result.bias_gradient.push_back(sum), result.weight_gradient.push_back(product);
    result.bias_bound.push_back(relative * sum_size);
    // Of x - mean too, which is rounded once more.
    result.weight_bound.push_back(relative * (product_size + sum_size * std::abs(mean) * inverse));
    each([&](std::size_t i) {
      if (!exists) {
        result.dx[i] = gradient[i];
        return;
      }
      const Real normalised = (x[i] - mean) * inverse;
      result.dx[i] = factor * (gradient[i] - sum / all - normalised * product / all);
      const Real distance = std::abs(normalised) + std::abs(mean) * inverse;
      result.dx_bound[i] = 2 * relative * std::abs(factor) *
                           (std::abs(gradient[i]) + sum_size / all +
                            distance * (product_size + sum_size * std::abs(mean) * inverse) / all);
    });
  }
  return result;
}

template <class Scalar>
Index beyond(const std::vector<Scalar>& found, const std::vector<Real>& expected,
             const std::vector<Real>& bound) {
  REQUIRE(found.size() == expected.size());
  Index count = 0;
  for (std::size_t i = 0; i < found.size(); ++i) {
    count += !(std::abs(found[i] - expected[i]) <= bound[i]);
  }
  return count;
}

std::vector<MapSize> map_sizes() {
  return {{1, 1, 2, 2}, {1, 3, 3, 2},    {3, 2, 2, 5},    {5, 3, 7, 5},
          {2, 4, 4, 4}, {33, 2, 12, 12}, {37, 1, 30, 30}, {70, 1, 3, 3}};
}

/// With a norm or without, a ReLU or none, in windows of so many rows.
template <class Scalar, int side>
void check_norms(bool exists, bool relu) {
  const Scalar floor = relu ? Scalar(0) : -std::numeric_limits<Scalar>::infinity();
  Rng rng(4);
  for (const MapSize& maps : map_sizes()) {
    INFO(maps.images << " images of " << maps.channels << "x" << maps.height << "x" << maps.width
                     << (exists ? "" : ", no norm") << (relu ? "" : ", no ReLU"));
    const auto x = integers<Scalar>(maps.numbers(), rng);
    const Index pooled = Index{maps.images} * maps.channels * maps.pooled(side).positions();
    const auto dy = integers<Scalar>(pooled, rng);
    NormNumbers<Scalar> numbers(maps.channels, rng);
    const auto expected = reference(maps, x, dy, numbers, exists, true, side, floor);
    REQUIRE(expected.nearest > 1e-4);
    std::vector<Scalar> y(size(pooled)), dx(x.size());
    Memory memory(size(maps.images));
    lend(memory, x, dy);
    lend_unwritten(memory, y, dx);
    const auto norm = exists ? numbers.lent_to(memory) : Norm<Scalar>{};
    const detail::NormProgram<Scalar, side> program{maps, x.data(), norm, floor};
    if (exists) execute(NormMoments<Scalar, side>{program}, memory);
    execute(NormReluPool<Scalar, side>{program, y.data(), true}, memory);
    if (exists) execute(NormReluPoolSums<Scalar, side>{program, dy.data()}, memory);
    execute(NormReluPoolGradient<Scalar, side>{program, dy.data(), dx.data()}, memory);
    memory.require_written(y);
    memory.require_written(dx);
    CHECK(beyond(y, expected.y, expected.y_bound) == 0);
    CHECK(beyond(dx, expected.dx, expected.dx_bound) == 0);
    if (!exists) continue;
    memory.require_written(numbers.batch);
    CHECK(beyond(numbers.weight_gradient, expected.weight_gradient, expected.weight_bound) == 0);
    CHECK(beyond(numbers.bias_gradient, expected.bias_gradient, expected.bias_bound) == 0);
    for (std::size_t c = 0; c < expected.mean.size(); ++c) {
      CHECK(std::abs(numbers.mean[c] - expected.mean[c]) <= 8 * rounding<Scalar>);
      CHECK(std::abs(numbers.var[c] - expected.var[c]) <= 50 * rounding<Scalar> * expected.var[c]);
    }
  }
}

TEMPLATE_TEST_CASE("batch norm, ReLU and pool, and their gradient", "[cuda][cifar]", float,
                   double) {
  const bool exists = GENERATE(true, false), relu = GENERATE(true, false);
  check_norms<TestType, 1>(exists, relu);
  check_norms<TestType, 2>(exists, relu);
}

TEMPLATE_TEST_CASE("batch norm in inference goes by the running statistics", "[cuda][cifar]", float,
                   double) {
  Rng rng(4);
  const MapSize maps{5, 3, 7, 6};
  const auto x = integers<TestType>(maps.numbers(), rng);
  NormNumbers<TestType> numbers(maps.channels, rng);
  std::vector<TestType> y(size(Index{maps.images} * maps.channels * maps.pooled(2).positions()));
  const auto expected = reference(maps, x, std::vector<TestType>(y.size()), numbers, true, false);
  const auto before = numbers;
  Memory memory;
  memory.lend(x);
  memory.lend_unwritten(y);
  const auto norm = numbers.lent_to(memory);
  execute(NormReluPool<TestType, 2>{{maps, x.data(), norm}, y.data(), false}, memory);
  memory.require_written(y);
  CHECK(beyond(y, expected.y, expected.y_bound) == 0);
  CHECK(numbers.mean == before.mean);
  CHECK(numbers.var == before.var);
}

TEST_CASE("slices are whole images, all of them, few enough", "[cuda][cifar]") {
  for (const int images : {1, 2, 31, 33, 128, 1000, 4096}) {
    for (const int edge : {1, 2, 4, 15, 32}) {
      const Slices slices = Slices::of({images, 8, edge, edge});
      int sum = 0;
      for (int s = 0; s < slices.count; ++s) {
        CHECK(slices.images_of(s) > 0);
        sum += slices.images_of(s);
      }
      CHECK(sum == images);
      CHECK(slices.count <= Slices::most);
    }
  }
}

TEST_CASE("a pool keeps NaN, and gives it no gradient", "[cuda][cifar]") {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const MapSize maps{1, 4, 2, 2};
  const std::vector<double> x = {nan, 1, 2, 3, 1, nan, 2, 3, 1, 2, 3, nan, -1, -1, -1, -1},
                            dy = {5, 6, 7, 8};
  std::vector<double> y(4), dx(16);
  Memory memory;
  lend(memory, x, dy);
  lend_unwritten(memory, y, dx);
  execute(NormReluPool<double, 2>{{maps, x.data(), {}}, y.data(), true}, memory);
  execute(NormReluPoolGradient<double, 2>{{maps, x.data(), {}}, dy.data(), dx.data()}, memory);
  for (std::size_t c = 0; c < 3; ++c) CHECK(std::isnan(y[c]));
  CHECK(y[3] == 0);
  CHECK(dx == std::vector<double>(16));
}

// ---- grids and sums of maps ---------------------------------------------------------------------

TEST_CASE("a grid takes positions of planes, and spreads them", "[cuda][cifar]") {
  Rng rng(8);
  constexpr int planes = 70;
  for (const GridShape& c :
       {GridShape{planes, 3, 4, 5, 7, 2}, GridShape{planes, 3, 3, 6, 6, 2},
        GridShape{planes, 3, 1, 3, 3, 1, 0, 1}, GridShape{planes, 1, 2, 4, 6, 3, 2, 1},
        GridShape{planes, 1, 1, 1, 1, 2}}) {
    const int small = c.small_height * c.small_width, all = c.height * c.width;
    const auto from = integers<float>(planes * all, rng),
               back = integers<float>(planes * small, rng);
    std::vector<float> taken(back.size()), spread(from.size());
    Memory memory;
    lend(memory, from, back);
    lend_unwritten(memory, taken, spread);
    const auto grid = [&](const auto& source, auto& to, bool spreads) {
      execute(Grid<float>(c, source.data(), to.data(), spreads), memory);
      memory.require_written(to);
    };
    grid(from, taken, false);
    grid(back, spread, true);
    std::vector<float> expected(from.size());
    for (int p = 0; p < planes; ++p) {
      for (int i = 0; i < small; ++i) {
        const std::size_t at = size(p * all + (c.row + i / c.small_width * c.step) * c.width +
                                    c.column + i % c.small_width * c.step);
        CHECK(taken[size(p * small + i)] == from[at]);
        expected[at] = back[size(p * small + i)];
      }
    }
    CHECK(spread == expected);
  }
}

TEST_CASE("a sum of maps, and a copy", "[cuda][cifar]") {
  Rng rng(9);
  const auto a = integers<float>(300, rng), b = integers<float>(300, rng);
  std::vector<float> sum = b, copy(300);
  Memory memory;
  lend(memory, a, sum);
  memory.lend_unwritten(copy);
  execute(Sum<float>{{300}, a.data(), sum.data(), sum.data(), 0.5F}, memory);
  execute(Sum<float>{{300}, a.data(), nullptr, copy.data()}, memory);
  for (std::size_t i = 0; i < 300; ++i) CHECK(sum[i] == a[i] + b[i] / 2);
  CHECK(copy == a);
}

// ---- fully connected layers ---------------------------------------------------------------------

TEMPLATE_TEST_CASE("fully connected layers and their gradients", "[cuda][cifar]", float, double) {
  Rng rng(5);
  for (const auto& [images, in, out] :
       {std::tuple(1, 1, 1), std::tuple(7, 127, 8), std::tuple(8, 128, 9), std::tuple(9, 129, 10),
        std::tuple(130, 5, 17), std::tuple(17, 300, 64)}) {
    INFO(images << " images, " << in << " -> " << out);
    const bool biased = in != 5, relu = in % 2 == 0;
    const auto x = integers<TestType>(images * in, rng), weight = integers<TestType>(out * in, rng),
               bias = integers<TestType>(out, rng), dy = integers<TestType>(images * out, rng);
    std::vector<TestType> y(dy.size()), dx(x.size()), masked(x.size()), dw(weight.size()),
        db(bias.size());
    Memory memory(size(in));
    lend(memory, x, weight, bias, dy);
    lend_unwritten(memory, y, dx, masked, dw, db);
    execute(linear(images, in, out, x.data(), weight.data(), biased ? bias.data() : nullptr,
                   y.data(), relu),
            memory);
    execute(linear_input_gradient(images, in, out, dy.data(), weight.data(), dx.data()), memory);
    execute(
        linear_input_gradient(images, in, out, dy.data(), weight.data(), masked.data(), x.data()),
        memory);
    execute(linear_weight_gradient(images, in, out, x.data(), dy.data(), dw.data(),
                                   biased ? db.data() : nullptr),
            memory);
    for (auto* each : {&y, &dx, &masked, &dw}) memory.require_written(*each);
    if (biased) memory.require_written(db);
    std::vector<TestType> y_expected(y.size()), dx_expected(x.size()), masked_expected(x.size()),
        dw_expected(weight.size()), db_expected(bias.size());
    for (int i = 0; i < images; ++i) {
      for (int o = 0; o < out; ++o) {
        const std::size_t at = size(i * out + o);
        y_expected[at] = biased ? bias[size(o)] : TestType(0);
        for (int k = 0; k < in; ++k) {
          y_expected[at] += x[size(i * in + k)] * weight[size(o * in + k)];
          dx_expected[size(i * in + k)] += dy[at] * weight[size(o * in + k)];
          dw_expected[size(o * in + k)] += dy[at] * x[size(i * in + k)];
        }
        if (relu) y_expected[at] = std::max(y_expected[at], TestType(0));
        db_expected[size(o)] += dy[at];
      }
    }
    for (std::size_t i = 0; i < x.size(); ++i) {
      masked_expected[i] = x[i] > 0 ? dx_expected[i] : TestType(0);
    }
    CHECK(y == y_expected);
    CHECK(dx == dx_expected);
    CHECK(masked == masked_expected);
    CHECK(dw == dw_expected);
    if (biased) CHECK(db == db_expected);
  }
}

TEST_CASE("a ReLU behind a fully connected layer keeps NaN", "[cuda][cifar]") {
  const std::vector<double> x = {std::numeric_limits<double>::quiet_NaN(), -1}, weight = {1};
  std::vector<double> y(2);
  Memory memory;
  lend(memory, x, weight);
  memory.lend_unwritten(y);
  execute(linear<double>(2, 1, 1, x.data(), weight.data(), nullptr, y.data(), true), memory);
  CHECK(std::isnan(y[0]));
  CHECK(y[1] == 0);
}

// ---- the loss -----------------------------------------------------------------------------------

TEMPLATE_TEST_CASE("cross-entropy, its gradient, and what was right", "[cuda][cifar]", float,
                   double) {
  const bool differentiate = GENERATE(true, false);
  Rng rng(6);
  for (const auto& [images, classes] :
       {std::pair(1, 2), std::pair(5, 10), std::pair(300, 3), std::pair(16, 256)}) {
    INFO(images << " images of " << classes << " classes");
    const int batch = images + 2;
    constexpr Index step = 1;
    std::vector<TestType> logits(size(images * classes));
    for (TestType& logit : logits) {
      logit = static_cast<TestType>(random_index(rng, -8, 8)) / 2;  // ties too
    }
    std::vector<std::uint8_t> labels(size(3 * batch));
    for (auto& label : labels) {
      label = static_cast<std::uint8_t>(random_index(rng, 0, classes - 1));
    }
    auto order = epoch_order(3 * batch, 1, 1);
    std::vector<Clock> clock = {{.epoch = 4, .step = step, .learning_rate = 0.5}};
    std::vector<double> losses(3);
    std::vector<std::int32_t> corrects(3);
    std::vector<TestType> gradient(logits.size());
    Memory memory(size(images));
    lend(memory, std::as_const(logits), std::as_const(labels), std::as_const(order), clock, losses,
         corrects);
    memory.lend_unwritten(gradient);
    const Pass<TestType> pass{.labels = labels.data(),
                              .order = order.data(),
                              .clock = clock.data(),
                              .losses = losses.data(),
                              .corrects = corrects.data(),
                              .batch = batch};
    execute(CrossEntropy<TestType>{pass, logits.data(), differentiate ? gradient.data() : nullptr,
                                   images, classes},
            memory);
    Real loss = 0;
    std::int32_t correct = 0;
    Index wrong = 0;
    for (int image = 0; image < images; ++image) {
      const TestType* z = logits.data() + image * classes;
      const int label = labels[order[size(step * batch + image)]];
      Real sum = 0;
      for (int k = 0; k < classes; ++k) sum += std::exp(Real(z[k]));
      loss += (std::log(sum) - z[label]) / images;
      correct += std::max_element(z, z + classes) - z == label;
      if (!differentiate) continue;
      for (int k = 0; k < classes; ++k) {
        const Real expected = (std::exp(Real(z[k])) / sum - (k == label)) / images;
        // The sum of the exponentials is rounded once for each class, each of them a few times.
        const Real bound = (classes + 8) * rounding<TestType> / images;
        wrong += !(std::abs(gradient[size(image * classes + k)] - expected) <= bound);
      }
    }
    CHECK(wrong == 0);
    CHECK(std::abs(losses[step] - loss) <= (classes + 8) * rounding<TestType> * (loss + 8));
    CHECK(corrects[step] == correct);
    CHECK(losses[0] == 0);
    CHECK(losses[2] == 0);
    CHECK(clock[0].step == step + 1);
    CHECK(clock[0].epoch == 4);
    CHECK(clock[0].learning_rate == 0.5);
    if (differentiate) memory.require_written(gradient);
  }
}

TEST_CASE("the loss of a logit that is not a number is none", "[cuda][cifar]") {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const std::vector<double> logits = {0, 1, 0, nan};
  const std::vector<std::uint8_t> labels = {1, 0};
  std::vector<std::uint32_t> order = {0, 1};
  std::vector<Clock> clock(1);
  std::vector<double> losses(1);
  std::vector<std::int32_t> corrects(1);
  Memory memory;
  lend(memory, logits, labels, order, clock, losses, corrects);
  const Pass<double> pass{.labels = labels.data(),
                          .order = order.data(),
                          .clock = clock.data(),
                          .losses = losses.data(),
                          .corrects = corrects.data(),
                          .batch = 2};
  execute(CrossEntropy<double>{pass, logits.data(), nullptr, 2, 2}, memory);
  CHECK(std::isnan(losses[0]));
}

// ---- the descent --------------------------------------------------------------------------------

TEMPLATE_TEST_CASE("a descent is that of torch.optim.SGD", "[cuda][cifar]", float, double) {
  Rng rng(7);
  for (const Index count : {1, 255, 256, 257, 600}) {
    auto weights = integers<TestType>(count, rng), velocities = integers<TestType>(count, rng);
    const auto gradients = integers<TestType>(count, rng);
    const std::vector<Clock> clock = {{.learning_rate = 0.25}};
    std::vector<TestType> expected_weights = weights, expected_velocities = velocities;
    for (std::size_t i = 0; i < weights.size(); ++i) {
      TestType &w = expected_weights[i], &v = expected_velocities[i];
      v = TestType(0.5) * v + gradients[i] + TestType(0.125) * w;
      w -= TestType(0.25) * v;
    }
    Memory memory(size(count));
    lend(memory, weights, velocities, gradients, clock);
    execute(Descend<TestType>{{count},
                              weights.data(),
                              gradients.data(),
                              velocities.data(),
                              clock.data(),
                              TestType(0.5),
                              TestType(0.125)},
            memory);
    CHECK(weights == expected_weights);
    CHECK(velocities == expected_velocities);
  }
}

TEST_CASE("numbers are filled", "[cuda][cifar]") {
  for (const Index count : {1, 256, 300}) {
    std::vector<float> filled(size(count));
    Memory memory;
    memory.lend_unwritten(filled);
    execute(Fill<float>{{count}, filled.data(), 7}, memory);
    CHECK(filled == std::vector<float>(size(count), 7));
  }
}

}  // namespace
}  // namespace cifar::cuda
