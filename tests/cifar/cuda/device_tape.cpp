// Networks on the device's tape, on the host or on a device, against the CPU's training: the same
// seed sees the same images, and ends with the same numbers but for rounding.
// SPDX-License-Identifier: Apache-2.0
#include "cifar/cuda/device_tape.hpp"

#include "cifar/cuda/training.hpp"
#include "cifar/training.hpp"
#ifdef CONCERTINA_ON_DEVICE
#include "cuda/on_device.hpp"
#else
#include "backend.hpp"
#endif
#include "support.hpp"

#include <catch2/catch.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <future>
#include <memory>
#include <span>
#include <sstream>
#include <string>
#include <utility>
#include <variant>
#include <vector>

namespace cifar {
namespace {

using Catch::Matchers::Contains;
using concertina::test::can_run, concertina::test::message_of;
template <class Scalar>
using Accelerator = std::unique_ptr<cuda::Accelerator<Scalar>>;
template <class Scalar>
using MakeAccelerator = Accelerator<Scalar> (*)(const cuda::TrainingPlan& plan);

// The first epoch launches programs, the second records them, the third replays what was recorded;
// and each has another learning rate.
constexpr Index epochs = 3;

#ifdef CONCERTINA_ON_DEVICE
constexpr double tolerance = 1e-10;
constexpr MakeAccelerator<double> make_accelerator = cuda::cuda_accelerator<double>;
constexpr MakeAccelerator<float> in_float = cuda::cuda_accelerator<float>;
#else
constexpr double tolerance = 1e-12;

using test::HostBackend;
using OnHost = cuda::BackendTraining<double, HostBackend>;

template <class Scalar>
Accelerator<Scalar> on_host(const cuda::TrainingPlan& plan) {
  return std::make_unique<cuda::BackendTraining<Scalar, HostBackend>>(plan);
}
constexpr MakeAccelerator<double> make_accelerator = on_host<double>;
constexpr MakeAccelerator<float> in_float = on_host<float>;
#endif

/// The largest difference of numbers that ought to be alike, relative to the largest of them; or
/// to 0.01, because a bias in front of a norm has a gradient that is nothing but rounding.
double difference(std::span<const double> a, std::span<const double> b) {
  REQUIRE(a.size() == b.size());
  double most = 0, largest = 0.01;
  for (std::size_t i = 0; i < a.size(); ++i) {
    const double distance = std::abs(a[i] - b[i]);
    most = distance <= most ? most : distance;  // NaN too
    largest = std::max(largest, std::abs(a[i]));
  }
  return most / largest;
}

void check_alike(const concertina::io::Safetensors& a, const concertina::io::Safetensors& b) {
  REQUIRE(a.tensors.size() == b.tensors.size());
  CHECK(a.metadata == b.metadata);
  for (const auto& [name, tensor] : a.tensors) {
    INFO(name);
    CHECK(difference(a.view<double>(name), b.view<double>(name)) < tolerance);
  }
}

/// A training's numbers at its end, in float on an accelerator.
concertina::io::Safetensors trained(const NetworkOptions& network, const Recipe& recipe,
                                    const Dataset& data, bool forked = true) {
  ThreadPool pool(1);
  Training<float> training(network, recipe, data, pool);
  cuda::TrainingPlan plan = training.accelerator_plan();
  plan.overlap.forked = forked;
  training.compute_on(in_float(plan));
  for (Index epoch = 0; epoch < epochs; ++epoch) training.epoch();
  return training.checkpoint();
}

struct Case {
  NetworkOptions network;
  Recipe recipe;
  NetworkOptions teacher = {};  ///< where the recipe has a transfer
};

std::vector<Case> compact_cases() {
  std::vector<Case> cases = {
      {{.model = "compact", .kernel = 3}, {.epochs = epochs, .batch = 8, .seed = 3}},
      {{.model = "compact", .kernel = 5},
       {.epochs = epochs,
        .batch = 5,
        .momentum = 0.5,
        .keep_momentum = true,
        .weight_decay = 0.01,
        .seed = 4}},
      {{.model = "compact", .kernel = 3, .blocks = 4, .classes = 7},
       {.epochs = epochs, .batch = 6, .corrupted = 0.5, .uniform_norms = true, .seed = 5}},
      {{.model = "compact", .kernel = 3, .norms = false},
       {.epochs = epochs, .batch = 6, .seed = 6}}};
#ifdef CONCERTINA_ON_DEVICE
  for (const Index kernel : {7, 9, 11}) {
    cases.push_back({{.model = "compact", .kernel = kernel},
                     {.epochs = epochs, .batch = 6, .weight_decay = 0.01, .seed = 10}});
  }
#endif
  return cases;
}

std::vector<Case> expanded_cases() {
  const Recipe recipe{.epochs = epochs, .batch = 4, .weight_decay = 0.02, .seed = 7};
  Recipe of_products = recipe;
  of_products.decay_products = true;
  return {{{.model = "cl+fc", .kernel = 3, .rate = 1}, recipe},
          {{.model = "cl", .kernel = 5, .rate = 1}, recipe},
          {{.model = "ck", .kernel = 5, .rate = 1}, of_products},
          {{.model = "ck", .kernel = 5, .rate = 1, .blocks = 4}, recipe}};
}

/// What a device computes otherwise than the CPU's tape does, in the same operations: layers one by
/// one, strides, branches, kernels that are no squares, paddings that crop, sums and means.
std::vector<Case> other_cases() {
  const Recipe recipe{.epochs = epochs, .batch = 4, .weight_decay = 0.02, .seed = 8};
  const auto layered = Compute::layered;
  return {{{.model = "cl+fc", .kernel = 5, .rate = 1, .compute = layered}, recipe},
          {{.model = "ck+fc", .kernel = 5, .rate = 1, .compute = Compute::nonlinear}, recipe},
          {{.model = "acnet", .kernel = 5, .compute = layered}, recipe},
          {{.model = "repvgg", .kernel = 3, .compute = layered}, recipe},
          {{.model = "mobileone", .kernel = 5, .compute = layered}, recipe},
          {{.model = "cl+norms", .kernel = 3, .rate = 1, .compute = layered}, recipe},
          {{.model = "resnet18", .width = 2}, {.epochs = epochs, .batch = 2, .seed = 9}}};
}

/// Teachers of all kinds, contracted ones among them, and Adam.
std::vector<Case> recipe_cases() {
  const NetworkOptions student{.model = "compact", .kernel = 3},
      expanded{.model = "cl+fc", .kernel = 3, .rate = 1};
  const Recipe adam{
      .epochs = epochs, .batch = 4, .adam = true, .learning_rate = 1e-3, .weight_decay = 0.02};
  Recipe of_products = adam;
  of_products.decay_products = true;
  std::vector<Case> cases = {{student, adam}, {expanded, of_products}};
  const auto learn = [&](const NetworkOptions& teacher, const TransferOptions& transfer) {
    cases.push_back(
        {student,
         {.epochs = epochs, .batch = 4, .weight_decay = 0.02, .transfer = transfer, .seed = 16},
         teacher});
  };
  learn(expanded, {.method = Transfer::kd});
  learn({.model = "resnet18", .width = 2}, {.method = Transfer::hint});
  learn(expanded, {.method = Transfer::hint, .learned_projection = true});
  learn(student, {.method = Transfer::pkt});
  cases.back().recipe.adam = true;
  return cases;
}

void check_alike(const Score& a, const Score& b) {
  CHECK(a.images == b.images);
  CHECK(a.correct == b.correct);
  CHECK(a.loss == Approx(b.loss).epsilon(tolerance));
}

/// Epochs of two steps, the second with fewer images, here and there; and then tests.
void compare(const Case& what) {
  INFO(what.network.model << ", kernel " << what.network.kernel << ", " << what.network.blocks
                          << " blocks" << (what.network.norms ? "" : ", no norms"));
  ThreadPool pool(2);
  const Dataset data =
      generated_dataset(what.network.classes, what.recipe.batch + 3, what.recipe.batch + 1, 11);
  concertina::io::Safetensors teacher;
  const bool learns = what.recipe.transfer.method != Transfer::none;
  if (learns) {
    Network<double> network(what.teacher, 1, pool);
    network.initialize(17, true);
    teacher = network.save();
  }
  const auto* const given = learns ? &teacher : nullptr;
  Training<double> cpu(what.network, what.recipe, data, pool, given),
      accelerated(what.network, what.recipe, data, pool, given);
  accelerated.compute_on(make_accelerator(accelerated.accelerator_plan()));
  for (Index epoch = 0; epoch < epochs; ++epoch) {
    INFO("epoch " << epoch + 1);
    const Score expected = cpu.epoch(), found = accelerated.epoch();
    CHECK(found.images == what.recipe.batch + 3);
    CHECK_FALSE(accelerated.more_batches());
    check_alike(found, expected);
    check_alike(accelerated.checkpoint(), cpu.checkpoint());
    check_alike(accelerated.test(), cpu.test());
  }
}

TEST_CASE("a compact network trains and tests as on the CPU", "[cuda][cifar]") {
  if (!can_run()) return;
  for (const Case& each : compact_cases()) compare(each);
}

TEST_CASE("an expanded network trains and tests as on the CPU", "[cuda][cifar]") {
  if (!can_run()) return;
  for (const Case& each : expanded_cases()) compare(each);
}

TEST_CASE("layers, blocks and residual networks train and test as on the CPU", "[cuda][cifar]") {
  if (!can_run()) return;
  for (const Case& each : other_cases()) compare(each);
}

TEST_CASE("teachers and Adam train as on the CPU", "[cuda][cifar]") {
  if (!can_run()) return;
  for (const Case& each : recipe_cases()) {
    INFO(transfer_names.of(each.recipe.transfer.method) << (each.recipe.adam ? ", Adam" : ""));
    compare(each);
  }
}

/// An epoch in float: the losses of its steps are the CPU's, and it is the same to the bit when it
/// is run again, from the same numbers and then by recorded programs.
void compare_in_float(const NetworkOptions& network, Index images, Index batch) {
  INFO(network.model << ", kernel " << network.kernel);
  ThreadPool pool(2);
  const Dataset data = generated_dataset(network.classes, images, 1, 12);
  const Recipe recipe{.batch = batch, .seed = 13};
  Training<float> cpu(network, recipe, data, pool), accelerated(network, recipe, data, pool);
  accelerated.compute_on(in_float(accelerated.accelerator_plan()));
  const auto start = accelerated.checkpoint();
  std::vector<concertina::io::Safetensors> ends;
  for (int run = 0; run < 3; ++run) {
    accelerated.restore(start);
    const Score score = accelerated.epoch();
    ends.push_back(accelerated.checkpoint());
    CHECK(ends.back() == ends.front());
    if (run == 0) CHECK(score.loss == Approx(cpu.epoch().loss).epsilon(1e-3));
  }
}

TEST_CASE("an epoch in float follows the CPU's and repeats to the bit", "[cuda][cifar]") {
  if (!can_run()) return;
#ifdef CONCERTINA_ON_DEVICE
  for (const std::string model : {"compact", "cl", "ck"}) {
    compare_in_float({.model = model, .kernel = 7}, 1027, 512);
  }
#else
  compare_in_float({.model = "compact", .kernel = 3}, 9, 4);
  compare_in_float({.model = "cl", .kernel = 3, .rate = 1}, 9, 4);
#endif
}

TEST_CASE("streams of a step change no bit", "[cuda][cifar]") {
  if (!can_run()) return;
#ifdef CONCERTINA_ON_DEVICE
  const Index kernel = 7, images = 1600, batch = 128;
  const double rate = 4;
  const std::vector<std::string> models = {"compact", "cl", "cl+fc", "ck", "ck+fc"};
#else
  const Index kernel = 3, images = 5, batch = 2;
  const double rate = 1;
  const std::vector<std::string> models = {"compact", "cl+fc"};
#endif
  const Dataset data = generated_dataset(10, images, 1, 12);
  for (const std::string& model : models) {
    INFO(model);
    const NetworkOptions network{.model = model, .kernel = kernel, .rate = rate};
    const Recipe recipe{.batch = batch, .weight_decay = 0.01, .seed = 13};
    const auto plain = trained(network, recipe, data, false);
    for (int order = 0; order < 3; ++order) {  // each with another order of streams
      CHECK(trained(network, recipe, data) == plain);
    }
  }
}

TEST_CASE("trainings side by side are as one alone", "[cuda][cifar]") {
  if (!can_run()) return;
#ifdef CONCERTINA_ON_DEVICE
  constexpr int side_by_side = 4, each = 3;
#else
  constexpr int side_by_side = 2, each = 1;
#endif
  const Dataset data = generated_dataset(10, 3, 1, 14);
  const NetworkOptions network{.model = "cl+fc", .kernel = 3, .rate = 1};
  const Recipe recipe{.batch = 2, .weight_decay = 0.01, .seed = 15};
  const auto alone = trained(network, recipe, data);
  // Each begins, records its graphs and ends while others are anywhere in theirs.
  std::vector<std::future<bool>> equal;
  for (int thread = 0; thread < side_by_side; ++thread) {
    equal.push_back(std::async(std::launch::async, [&] {
      for (int training = 0; training < each; ++training) {
        if (trained(network, recipe, data) != alone) return false;
      }
      return true;
    }));
  }
  for (auto& one : equal) CHECK(one.get());
}

TEST_CASE("a training goes on from a checkpoint of the other device", "[cuda][cifar]") {
  if (!can_run()) return;
  ThreadPool pool(2);
  const Dataset data = generated_dataset(10, 4, 2, 11);
  const NetworkOptions network{.model = "compact", .kernel = 3};
  const Recipe recipe{.epochs = 9, .batch = 4, .keep_momentum = true};
  Training<double> cpu(network, recipe, data, pool), accelerated(network, recipe, data, pool);
  accelerated.compute_on(make_accelerator(accelerated.accelerator_plan()));
  cpu.epoch();
  accelerated.restore(cpu.checkpoint());
  cpu.epoch();
  accelerated.epoch();
  check_alike(accelerated.checkpoint(), cpu.checkpoint());
  cpu.restore(accelerated.checkpoint());
  check_alike(accelerated.test(), cpu.test());
}

TEST_CASE("an epoch that diverges is told, and leaves the numbers", "[cuda][cifar]") {
  if (!can_run()) return;
  ThreadPool pool(2);
  const Dataset data = generated_dataset(10, 5, 2, 11);
  const NetworkOptions network{.model = "compact", .kernel = 3};
  Training<double> training(network, {.batch = 2, .learning_rate = 1e300}, data, pool);
  training.compute_on(make_accelerator(training.accelerator_plan()));
  const auto before = training.network().save();
  CHECK_THAT(message_of<concertina::NumericalError>([&] { training.epoch(); }),
             Contains("epoch 1, image 2: the loss is not finite"));
  CHECK(training.network().save() == before);
}

#ifndef CONCERTINA_ON_DEVICE
/// What is launched in a step of a training on 128 images, and then in one of a test.
std::vector<std::string> launches_of(const NetworkOptions& options, const Recipe& recipe) {
  ThreadPool pool(1);
  Network<float> network(options, 1, pool);
  HostBackend backend;
  cuda::DeviceTape<float, HostBackend> tape(
      backend, {.decay = recipe.weight_decay, .decay_products = recipe.decay_products}, 128, 0,
      true);
  tape.loss(network.record(tape, tape.images()).second, 1);
  tape.end();
  backend.sequence.clear();
  const cuda::Pass<float> pass{};
  tape.train(pass, 128);
  tape.test(pass, 128);
  return backend.sequence;
}

// Each is one program with a purpose; a change here is a change of the device's time.
TEST_CASE("SmallNet is few programs, in this order, of these sizes", "[cuda][cifar]") {
  std::vector<std::string> expected;
  std::istringstream lines(R"(1 after 0
1: contraction
2 after 0
2: contraction
3 after 0
3: contraction
0: images, 128x256, 0
0 after 1
0: conv1, a convolution, 256x128, 15264
0: conv1, moments, 256x256, 4096
0: conv1, pool, 256x256, 784
0 after 2
0: conv2, a convolution, 256x128, 46336
0: conv2, moments, 128x256, 4096
0: conv2, pool, 128x256, 784
0 after 3
0: conv3, a convolution, 256x128, 34048
0: conv3, moments, 64x256, 4096
0: conv3, pool, 64x256, 784
0: fc1, 128x256, 10304
0: fc2, 32x256, 10304
0: the loss, 1x256, 3072
5 after 0
5: fc2, gradient, 16x256, 10304
0: fc2, gradient of its input, 128x256, 10304
4 after 0
4: fc1, gradient, 512x256, 10304
0: fc1, gradient of its input, 1024x256, 10304
0: conv3, norm's sums, 64x256, 4096
0: conv3, gradient of its maps, 64x256, 528
3 after 0
3: conv3, a convolution's gradient for its kernel, 256x128, 41728
3: conv3, the sum of a gradient's slices, 785x256, 1024
3: conv3, the decay of its product, 99x256, 0
3: gradient of a contraction
3: conv3, the descent, 1589x256, 0
0: conv3, a convolution's gradient for its input, 256x128, 46592
0: conv2, norm's sums, 128x256, 4096
0: conv2, gradient of its maps, 128x256, 528
2 after 0
2: conv2, a convolution's gradient for its kernel, 256x128, 28800
2: conv2, the sum of a gradient's slices, 197x256, 1024
2: conv2, the decay of its product, 25x256, 0
2: gradient of a contraction
2: conv2, the descent, 398x256, 0
0: conv2, a convolution's gradient for its input, 256x128, 34048
0: conv1, norm's sums, 256x256, 4096
0: conv1, gradient of its maps, 256x256, 528
1 after 0
1: conv1, a convolution's gradient for its kernel, 256x128, 28144
1: conv1, the sum of a gradient's slices, 37x256, 1024
1: conv1, the decay of its product, 5x256, 0
1: gradient of a contraction
1: conv1, the descent, 20x256, 0
0 after 4
0 after 5
0: the descent, 132x256, 0
0 after 1
0 after 2
0 after 3
0: images, 128x256, 0
0: conv1, a convolution, 256x128, 15264
0: conv1, pool, 256x256, 784
0: conv2, a convolution, 256x128, 46336
0: conv2, pool, 128x256, 784
0: conv3, a convolution, 256x128, 34048
0: conv3, pool, 64x256, 784
0: fc1, 128x256, 10304
0: fc2, 32x256, 10304
0: the loss, 1x256, 3072)");
  for (std::string line; std::getline(lines, line);) expected.push_back(line);
  CHECK(launches_of({.model = "cl", .kernel = 7}, {.decay_products = true}) == expected);
}

TEST_CASE("numbers are copied in few pieces, velocities only for an epoch", "[cuda][cifar]") {
  ThreadPool pool(1);
  const Dataset data = generated_dataset(10, 2, 1, 11);
  Training<double> training({.model = "compact", .kernel = 3}, {.batch = 2}, data, pool);
  auto accelerator = std::make_unique<OnHost>(training.accelerator_plan());
  HostBackend& backend = accelerator->backend();
  training.compute_on(std::move(accelerator));
  const auto copies_of = [&](const auto& call) {
    backend.uploads = backend.downloads = 0;
    call();
    return std::pair(backend.uploads, backend.downloads);
  };
  // Weights, velocities and statistics, order and clock; and back with losses and what was right.
  CHECK(copies_of([&] { training.epoch(); }) == std::pair(5, 5));
  CHECK(copies_of([&] { training.test(); }) == std::pair(3, 2));
}

TEST_CASE("what was recorded goes before what it refers to", "[cuda][cifar]") {
  ThreadPool pool(1);
  const Dataset data = generated_dataset(10, 2, 1, 11);
  Training<double> training({.model = "cl", .kernel = 3, .rate = 1}, {.batch = 2}, data, pool);
  static std::vector<std::size_t> recorded;
  recorded.clear();
  HostBackend::on_end_of_contraction = [](std::size_t count) { recorded.push_back(count); };
  auto accelerator = std::make_unique<OnHost>(training.accelerator_plan());
  const HostBackend& backend = accelerator->backend();
  training.compute_on(std::move(accelerator));
  for (int i = 0; i < 2; ++i) training.test();
  CHECK(backend.recordings() == 1);
  training.compute_on(nullptr);
  HostBackend::on_end_of_contraction = {};
  CHECK(recorded == std::vector<std::size_t>{0, 0, 0});  // of three layers
}

TEST_CASE("operations that no program computes are refused as they are recorded", "[cuda][cifar]") {
  using concertina::ConvShape, concertina::Padding, concertina::ShapeError;
  HostBackend backend;
  cuda::DeviceTape<double, HostBackend> tape(backend, {}, 2, 0, false);
  const auto images = tape.images();
  const auto refused = [&](const ConvShape<2>& shape) {
    return message_of<ShapeError>([&] { tape.layer(images, shape, {}, {}); });
  };
  CHECK_THAT(refused({.out = 3, .in = 3, .kernel_size = 3, .groups = 3}), Contains("groups 1"));
  CHECK_THAT(refused({.out = 3, .in = 3, .kernel_size = 3, .dilation = 2}), Contains("groups 1"));
  CHECK_THAT(refused({.out = 3, .in = 3, .kernel_size = 3, .stride = {1, 2}}), Contains("alike"));
  CHECK_THAT(refused({.out = 3, .in = 3, .kernel_size = 3, .padding = {1, 2}}), Contains("square"));
  CHECK_THAT(refused({.out = 3, .in = 3, .kernel_size = {2, 3}}), Contains("square"));
  CHECK_THAT(message_of<ShapeError>([&] { tape.sum({images, images}); }), Contains("twice"));
  CHECK_THAT(message_of<ShapeError>([&] { tape.sum({images, tape.max_pool(images)}); }),
             Contains("of another"));
  CHECK_THAT(message_of<ShapeError>([&] { tape.average_pool(images, 2); }), Contains("whole maps"));
  CHECK_THAT(message_of<ShapeError>([&] { tape.norm(images, {}, 1); }), Contains("margin"));
  CHECK_THROWS_AS(tape.loss(tape.norm(images, {}, 0), 1), concertina::Error);
  const auto pooled = tape.max_pool(images);
  CHECK_THAT(message_of<ShapeError>([&] { tape.distill(images, pooled, 1, 1); }),
             Contains("the student has 3072 numbers, the teacher 768"));
  CHECK_THAT(message_of<ShapeError>([&] { tape.hint(pooled, images); }), Contains("hint: "));
}

TEST_CASE("maps that nothing gives a gradient are refused", "[cuda][cifar]") {
  ThreadPool pool(1);
  Tape<double> tensors(1, pool);
  HostBackend backend;
  cuda::DeviceTape<double, HostBackend> tape(backend, {}, 2, 0, false);
  const auto layer = [&](std::size_t x, Index in, Index out) {
    return tape.layer(x, concertina::ConvShape<0>{.out = out, .in = in},
                      {&tensors.tensor("fc.weight", {out, in}), nullptr}, {});
  };
  tape.loss(layer(tape.detached(layer(tape.images(), 3072, 4)), 4, 2), 1);
  CHECK_THAT(message_of<concertina::Error>([&] { tape.end(); }),
             Contains("nothing that reads fc gives it a gradient"));
}

TEST_CASE("tensors start at multiples of 128 bytes in float", "[cuda][cifar]") {
  cuda::Layout layout;
  CHECK(layout.add(1) == 0);
  CHECK(layout.add(64) == 32);
  CHECK(layout.add(33) == 96);
  CHECK(layout.count() == 160);
  REQUIRE(layout.gaps().size() == 2);
  CHECK(layout.gaps()[0].first == 1);
  CHECK(layout.gaps()[0].count == 31);
  CHECK(layout.gaps()[1].first == 129);
  CHECK(layout.gaps()[1].count == 31);
}

#endif

#ifndef CONCERTINA_CUDA
TEST_CASE("a program that was built without CUDA says so", "[cuda][cifar]") {
  const TrainOptions options{
      .network = {}, .recipe = {}, .out = {}, .command = {}, .device = Device::cuda};
  CHECK_THAT(message_of<UnsupportedError>([&] { options.validate(); }), Contains("preset cuda"));
}
#endif

TEST_CASE("what a device does not compute is refused by name", "[cuda][cifar]") {
  const auto refused = [](const NetworkOptions& network) {
    return message_of<UnsupportedError>([&] { require_accelerable(network); });
  };
  CHECK_THAT(refused({.model = "acnet"}), Contains("contracted of acnet"));
  CHECK_THAT(refused({.model = "dbb", .compute = Compute::layered}), Contains("model dbb"));
  for (const char* model : {"acnet", "resnet18", "ck+fc"}) {
    CHECK_NOTHROW(require_accelerable({.model = model, .compute = Compute::layered}));
  }
  const TrainOptions options{.network = {},
                             .recipe = {},
                             .out = {},
                             .similarities = 2,
                             .command = {},
                             .device = Device::cuda};
  CHECK_THAT(message_of<UnsupportedError>([&] { options.validate(); }), Contains("--similarities"));
  CHECK(device_names.of("cuda") == Device::cuda);
  CHECK_THAT(message_of<concertina::Error>([] { device_names.of("gpu"); }), Contains("cpu, cuda"));
}

}  // namespace
}  // namespace cifar
