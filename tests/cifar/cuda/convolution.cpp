// The device's convolutions and their gradients, run on the host: against loops written from the
// definitions, with small integers, so that every sum is exact.
// SPDX-License-Identifier: Apache-2.0
#include "cifar/cuda/convolution.hpp"  // first: the header must stand alone

#include "cuda/executor.hpp"
#include "support.hpp"

#include <concertina/error.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <utility>
#include <vector>

using namespace cifar::cuda;
using concertina::Index, concertina::ShapeError, concertina::SizeError;
using concertina::test::execute, concertina::test::Memory;
using concertina::test::message_of, concertina::test::Rng;

namespace {

std::size_t at(Index index) { return static_cast<std::size_t>(index); }
int random_int(Rng& rng, int least, int most) {
  return static_cast<int>(concertina::test::random_index(rng, least, most));
}

/// A convolution's numbers, in doubles; its sizes by counting positions.
struct Problem {
  Problem(const ConvolutionShape& shape_, Rng& rng) : shape(shape_) {
    while (rows + shape.kernel <= shape.height + 2 * shape.padding) ++rows;
    while (columns + shape.kernel <= shape.width + 2 * shape.padding) ++columns;
    x.resize(at(shape.batch * shape.in * shape.height * shape.width));
    weight.resize(at(shape.out * shape.in * shape.kernel * shape.kernel));
    bias.resize(at(shape.out));
    dy.resize(at(shape.batch * shape.out * rows * columns));
    for (auto* numbers : {&x, &weight, &bias, &dy}) {
      concertina::test::fill_small_integers(std::span(*numbers), rng);
    }
  }

  /// Calls f(number of y, of weight, of x) for every product of the definition.
  template <class F>
  void for_each_product(F&& f) const {
    const auto& [batch, in, out, height, width, kernel, padding] = shape;
    for (int n = 0; n < batch; ++n) {
      for (int o = 0; o < out; ++o) {
        for (int i = 0; i < rows * columns; ++i) {
          for (int c = 0; c < in; ++c) {
            for (int a = 0; a < kernel * kernel; ++a) {
              const int row = i / columns - padding + a / kernel;
              const int column = i % columns - padding + a % kernel;
              if (row < 0 || row >= height || column < 0 || column >= width) continue;
              f(at((n * out + o) * rows * columns + i), at((o * in + c) * kernel * kernel + a),
                at(((n * in + c) * height + row) * width + column));
            }
          }
        }
      }
    }
  }

  /// The output channel of a number of y.
  std::size_t channel(std::size_t number) const {
    return number / at(rows * columns) % at(shape.out);
  }

  ConvolutionShape shape;
  int rows = 0, columns = 0;
  std::vector<double> x, weight, bias, dy;
};

/// What the programs compute, by the definition.
struct Results {
  explicit Results(const Problem& problem, bool with_bias)
      : y(problem.dy.size()),
        dx(problem.x.size()),
        dw(problem.weight.size()),
        db(problem.bias.size()) {
    for (std::size_t i = 0; i < y.size(); ++i) {
      if (with_bias) y[i] = problem.bias[problem.channel(i)];
      db[problem.channel(i)] += problem.dy[i];
    }
    problem.for_each_product([&](std::size_t i, std::size_t w, std::size_t from) {
      y[i] += problem.weight[w] * problem.x[from];
      dx[from] += problem.weight[w] * problem.dy[i];
      dw[w] += problem.dy[i] * problem.x[from];
    });
  }

  std::vector<double> y, dx, dw, db;
};

template <class Scalar>
std::vector<Scalar> as(const std::vector<double>& numbers) {
  return {numbers.begin(), numbers.end()};
}

/// Runs all programs; every output is lent without values, and must be written as a whole.
template <class Scalar>
void check(const ConvolutionShape& shape, bool with_bias, int busy, Rng& rng) {
  INFO(to_string(shape) << ", bias " << with_bias << ", for " << busy << " blocks");
  const Problem problem(shape, rng);
  const Results expected(problem, with_bias);
  const auto x = as<Scalar>(problem.x), weight = as<Scalar>(problem.weight);
  const auto bias = as<Scalar>(problem.bias), dy = as<Scalar>(problem.dy);
  std::vector<Scalar> y(expected.y.size()), dx(x.size()), dw(weight.size()), db(bias.size());
  std::vector<Scalar> workspace(at(convolution_workspace<Scalar>(shape, busy)));

  Memory memory(rng());
  for (const auto* numbers : {&x, &weight, &bias, &dy}) memory.lend(*numbers);
  for (auto* numbers : {&y, &dx, &dw, &workspace}) memory.lend_unwritten(*numbers);
  if (with_bias) memory.lend_unwritten(db);
  const auto run = [&](const auto& program, const std::string&) { execute(program, memory); };
  convolution_forward<Scalar>({.shape = shape,
                               .from = x.data(),
                               .weight = weight.data(),
                               .bias = with_bias ? bias.data() : nullptr,
                               .to = y.data(),
                               .busy = busy},
                              run);
  memory.require_written(y);
  CHECK(y == as<Scalar>(expected.y));
  convolution_input_gradient<Scalar>(
      {.shape = shape, .from = dy.data(), .weight = weight.data(), .to = dx.data(), .busy = busy},
      run);
  memory.require_written(dx);
  CHECK(dx == as<Scalar>(expected.dx));
  convolution_weight_gradient<Scalar>({.shape = shape,
                                       .x = x.data(),
                                       .dy = dy.data(),
                                       .workspace = workspace.data(),
                                       .dw = dw.data(),
                                       .db = with_bias ? db.data() : nullptr,
                                       .busy = busy},
                                      run);
  memory.require_written(dw);
  CHECK(dw == as<Scalar>(expected.dw));
  if (!with_bias) return;
  memory.require_written(db);
  CHECK(db == as<Scalar>(expected.db));
}

/// With and without a bias, in blocks as for a large device and in as few as there can be.
template <class Scalar>
void check(const ConvolutionShape& shape, Rng& rng) {
  for (const bool bias : {false, true}) {
    for (const int busy : {busy_blocks, 1}) check<Scalar>(shape, bias, busy, rng);
  }
}

template <class Scalar>
struct Planned {
  detail::ConvolveTile forward, backward;
  detail::KernelTile kernel;
};
template <class Scalar>
Planned<Scalar> plan(const ConvolutionShape& shape, int busy = busy_blocks) {
  constexpr std::size_t four = sizeof(detail::Four<Scalar>);
  return {detail::choose_convolve_tile(shape, four, busy),
          detail::choose_convolve_tile(shape.adjoint(), four, busy),
          detail::choose_kernel_tile<Scalar>(shape, busy)};
}

/// Maps that keep their size.
ConvolutionShape layer(int batch, int in, int out, int height, int width, int kernel) {
  return {batch, in, out, height, width, kernel, (kernel - 1) / 2};
}
ConvolutionShape layer(int batch, int in, int out, int size, int kernel) {
  return layer(batch, in, out, size, size, kernel);
}

}  // namespace

TEMPLATE_TEST_CASE("a convolution and its gradients are as defined, for every kernel and padding",
                   "[cuda][convolution]", float, double) {
  const int kernel = GENERATE(1, 2, 3, 5, 7, 9, 11);  // 2 and 11 have no program of their own
  Rng rng(at(kernel));
  std::vector<int> paddings = {-1, 0, (kernel - 1) / 2, kernel, kernel + 2};
  if (kernel > 1) paddings.push_back(kernel - 1);
  if (kernel > 3) paddings.push_back(1), paddings.push_back(kernel - 2);
  for (const int padding : paddings) {
    const int least = kernel - 2 * padding;  // that leaves a position
    const int height = std::max(least, 1) + random_int(rng, 0, 4);
    const int width = std::max(least, 1) + random_int(rng, 0, 6);
    const int batch = random_int(rng, 1, 3), in = random_int(rng, 1, 5);
    const int out = random_int(rng, 1, 10);
    check<TestType>({batch, in, out, height, width, kernel, padding}, rng);
  }
}

TEMPLATE_TEST_CASE("the largest kernel fits, on the smallest map and on a wide one",
                   "[cuda][convolution]", float, double) {
  Rng rng(31);
  for (const int width : {1, 70}) {
    check<TestType>(layer(1, 1, 2, 1, width, 31), true, busy_blocks, rng);
  }
}

TEST_CASE("channels, positions and images around the ends of a tile", "[cuda][convolution]") {
  const int kernel = GENERATE(1, 3, 5);
  Rng rng(at(100 + kernel));
  for (const int channels : {7, 8, 9, 17}) {
    check<float>(layer(2, channels, 18 - channels, 3, channels, kernel), rng);
  }
  for (const int width : {1, 3, 4, 5, 65}) {
    for (const int height : {1, 4, 9}) {
      check<float>(layer(1, 2, 3, height, width, kernel), rng);
    }
  }
  for (const int batch : {1, 2, 31, 33}) {
    check<float>(layer(batch, 2, 9, 2, 3, kernel), rng);
  }
}

TEST_CASE("the layers of SmallNet, of few images", "[cuda][convolution]") {
  const int kernel = GENERATE(3, 5, 7, 9);
  Rng rng(at(200 + kernel));
  check<float>(layer(1, 3, 8, 32, kernel), true, busy_blocks, rng);
  check<float>(layer(3, 8, 16, 8, kernel), true, 8, rng);
  check<float>(layer(2, 16, 32, 4, kernel), true, busy_blocks, rng);
}

// Each way of dividing the work, met where it divides and where it does not.
TEST_CASE("tiles divide images, rows, columns, groups, channels and batches",
          "[cuda][convolution]") {
  Rng rng(17);
  SECTION("images, and slices of them") {
    const ConvolutionShape shape = layer(33, 2, 9, 2, 3, 3);
    const Planned<float> many = plan<float>(shape), few = plan<float>(shape, 1);
    CHECK(many.kernel.slices > 1);
    CHECK(few.kernel.slices == 1);
    CHECK(few.kernel.items_each > 1);
    CHECK(few.kernel.images > 1);
    CHECK(few.forward.images > 1);
    CHECK(many.forward.splits > 1);
    CHECK(few.forward.splits == 1);
    check<float>(shape, rng);
  }
  SECTION("rows and columns, into parts that do not divide them") {
    const ConvolutionShape shape = layer(1, 2, 3, 17, 65, 3);
    const Planned<float> tiles = plan<float>(shape, 4);
    CHECK(tiles.forward.rows == 9);
    CHECK(tiles.forward.column_tiles == 2);
    CHECK(tiles.kernel.rows == 9);
    CHECK(tiles.kernel.column_tiles == 2);
    check<float>(shape, true, 4, rng);
    check<float>(shape, rng);
  }
  SECTION("groups of output channels, more than there are") {
    const ConvolutionShape shape = layer(2, 1, 17, 6, 3);
    CHECK(plan<float>(shape).forward.groups == 1);
    CHECK(plan<float>(shape, 1).forward.groups == 4);
    CHECK(plan<float>(shape, 1).forward.images == 2);
    check<float>(shape, rng);
  }
  SECTION("input channels, into parts that do not divide them") {
    const ConvolutionShape shape = layer(1, 17, 2, 3, 11);
    const Planned<double> tiles = plan<double>(shape);
    CHECK(tiles.forward.map.channels > 1);
    CHECK(tiles.forward.map.channels < 17);
    check<double>(shape, rng);
  }
  SECTION("input channels of a gradient's blocks, into parts that do not divide them") {
    const ConvolutionShape shape = layer(1, 17, 9, 9, 3);
    CHECK(plan<float>(shape).kernel.in == 2);
    check<float>(shape, rng);
  }
}

TEMPLATE_TEST_CASE("there is a tile for every kernel, and it fits the smallest device",
                   "[cuda][convolution]", float, double) {
  for (int kernel = 1; kernel <= 31; ++kernel) {
    for (const int width : {31, 64, 65, 300}) {
      for (const int channels : {1, 8, 70}) {
        const Planned<TestType> tiles =
            plan<TestType>({200, channels, channels, 33, width, kernel, kernel / 2});
        for (const int fours : {tiles.forward.fours, tiles.backward.fours, tiles.kernel.fours}) {
          REQUIRE(fours > 0);
          REQUIRE(at(fours) * sizeof(detail::Four<TestType>) <= 96 * 1024);
        }
      }
    }
  }
}

// The device's time is not tested here, but what it depends on is: blocks for all multiprocessors,
// of busy threads, that leave shared memory for three more.
TEST_CASE("SmallNet's layers keep a device busy from 128 images on", "[cuda][convolution]") {
  const int kernel = GENERATE(3, 5, 7, 9), batch = GENERATE(128, 256, 512);
  std::vector<ConvolutionShape> layers = {layer(batch, 3, 8, 32, kernel),
                                          layer(batch, 8, 16, 16, kernel),
                                          layer(batch, 16, 32, 8, kernel)};
  for (const ConvolutionShape& shape : layers) {
    INFO(to_string(shape));
    const auto run = [&](const auto& program, const std::string& purpose) {
      CHECK(program.shared_bytes() <= 48 * 1024);
      if (purpose.find("sum") == std::string::npos) CHECK(program.blocks() >= 256);
    };
    convolution_forward<float>({.shape = shape}, run);
    convolution_weight_gradient<float>({.shape = shape}, run);
    const Planned<float> tiles = plan<float>(shape);
    CHECK(tiles.forward.lanes * tiles.forward.splits >= 112);
    CHECK(tiles.kernel.lanes * tiles.kernel.splits >= 96);
    if (shape.in == 3) continue;
    convolution_input_gradient<float>({.shape = shape}, run);
    CHECK(tiles.backward.lanes * tiles.backward.splits >= 112);
  }
}

TEST_CASE("the order of the sums depends on nothing but the shape", "[cuda][convolution]") {
  const ConvolutionShape shape = layer(5, 2, 9, 6, 5);
  Rng rng(3);
  std::vector<float> x(at(5 * 2 * 36)), dy(at(5 * 9 * 36)), db(9);
  for (auto* numbers : {&x, &dy}) {
    for (float& number : *numbers) number = static_cast<float>(rng() >> 11) * 0x1p-52F - 1;
  }
  const auto gradient = [&](std::uint64_t order) {
    std::vector<float> dw(at(shape.weights())), all(at(convolution_workspace<float>(shape)));
    Memory memory(order);  // of threads and blocks
    for (const auto* numbers : {&x, &dy}) memory.lend(std::as_const(*numbers));
    for (auto* numbers : {&dw, &db, &all}) memory.lend_unwritten(*numbers);
    convolution_weight_gradient<float>(
        {.shape = shape,
         .x = x.data(),
         .dy = dy.data(),
         .workspace = all.data(),
         .dw = dw.data(),
         .db = db.data()},
        [&](const auto& program, const std::string&) { execute(program, memory); });
    dw.insert(dw.end(), db.begin(), db.end());
    return dw;
  };
  CHECK(gradient(1) == gradient(2));
}

TEST_CASE("what the programs cannot compute is refused, with its shape", "[cuda][convolution]") {
  using Catch::Matchers::Contains;
  const ConvolutionShape good = layer(2, 3, 8, 8, 5);
  CHECK(to_string(good) == "conv2d 3->8 @5x5 p2x2 of 2 maps of 8x8");
  const auto never = [](const auto&, const std::string&) { FAIL("a program was made"); };
  const auto refused = [&](auto change) {
    ConvolutionShape shape = good;
    change(shape);
    const std::string message =
        message_of<ShapeError>([&] { convolution_forward<float>({.shape = shape}, never); });
    CHECK(message_of<ShapeError>(
              [&] { convolution_input_gradient<float>({.shape = shape}, never); }) == message);
    CHECK(message_of<ShapeError>(
              [&] { convolution_weight_gradient<float>({.shape = shape}, never); }) == message);
    CHECK(message_of<ShapeError>([&] { convolution_workspace<float>(shape); }) == message);
    CHECK_THAT(message, Contains(to_string(shape)));
    return message;
  };
  CHECK_THAT(refused([](auto& shape) { shape.batch = 0; }), Contains("images"));
  CHECK_THAT(refused([](auto& shape) { shape.in = 0; }), Contains("channels"));
  CHECK_THAT(refused([](auto& shape) { shape.out = -1; }), Contains("channels"));
  CHECK_THAT(refused([](auto& shape) { shape.width = 0; }), Contains("positions"));
  CHECK_THAT(refused([](auto& shape) { shape.kernel = 0; }), Contains("1 .. 31"));
  CHECK_THAT(refused([](auto& shape) { shape.kernel = 32; }), Contains("1 .. 31"));
  CHECK_THAT(refused([](auto& shape) { shape.padding = -2; }), Contains("larger than the map"));
  CHECK_THAT(refused([](auto& shape) { shape.kernel = 13; }), Contains("larger than the map"));

  const auto too_large = [&](auto change) {
    ConvolutionShape shape = good;
    change(shape);
    return message_of<SizeError>([&] { convolution_forward<float>({.shape = shape}, never); });
  };
  constexpr int huge = std::numeric_limits<int>::max();
  CHECK_THAT(too_large([](auto& shape) { shape.height = 1 << 23; }), Contains("an input"));
  CHECK_THAT(too_large([](auto& shape) { shape.in = huge; }), Contains("an input"));
  CHECK_THAT(too_large([](auto& shape) { shape.out = 1 << 23; }), Contains("an output"));
  CHECK_THAT(too_large([](auto& shape) {
               shape.out = shape.in = 1 << 13;
               shape.height = shape.width = 5;
             }),
             Contains("a kernel"));
  CHECK_THAT(too_large([](auto& shape) {
               shape.batch = std::numeric_limits<int>::max();
               shape.height = shape.width = 256;
             }),
             Contains("blocks"));
}
