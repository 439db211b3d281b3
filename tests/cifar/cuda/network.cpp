// SmallNet's programs, on the host or on a device, against the CPU's training: the same seed sees
// the same images, and ends with the same numbers but for rounding.
// SPDX-License-Identifier: Apache-2.0
#include "cifar/cuda/network.hpp"

#include "cifar/cuda/expansion.hpp"
#include "cifar/cuda/training.hpp"
#include "cifar/training.hpp"
#ifdef CONCERTINA_ON_DEVICE
#include "cuda/on_device.hpp"
#else
#include "backend.hpp"
#include "cuda/on_host.hpp"
#endif
#include "support.hpp"

#include <concertina/contract.hpp>

#include <catch2/catch.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
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
const std::vector<MakeAccelerator<double>> accelerators = {cuda::cuda_accelerator<double>};
constexpr MakeAccelerator<float> in_float = cuda::cuda_accelerator<float>;
#else
constexpr double tolerance = 1e-12;

using test::HostBackend;
using OnHost = cuda::BackendTraining<double, HostBackend>;

/// Contracts on the host what lies on the backend, by the library itself.
class HostContractor final : public cuda::Contractor {
 public:
  HostContractor(HostBackend& backend, const cuda::ExpandedLayer<double>& layer,
                 cuda::Stream stream)
      : backend_(backend), stream_(stream) {
    std::visit(
        [&]<int Rank>(const std::vector<concertina::ConvShape<Rank>>& shapes) {
          chain_ = std::make_unique<Chain<Rank>>(layer, shapes);
        },
        layer.shapes);
  }

  void forward() override {
    backend_.issue(stream_, [this] { chain_->forward(backend_); });
  }
  void backward() override {
    backend_.issue(stream_, [this] { chain_->backward(backend_); });
  }

 private:
  struct AnyChain {
    virtual ~AnyChain() = default;
    virtual void forward(HostBackend& backend) = 0;
    virtual void backward(HostBackend& backend) = 0;
  };

  template <int Rank>
  struct Chain final : AnyChain {
    using Conv = concertina::Conv<double, Rank>;

    Chain(const cuda::ExpandedLayer<double>& layer_,
          const std::vector<concertina::ConvShape<Rank>>& shapes)
        : layer(layer_),
          contraction(shapes),
          convs(convs_of(shapes)),
          gradient(contraction.shape()) {}

    static std::vector<Conv> convs_of(const std::vector<concertina::ConvShape<Rank>>& shapes) {
      return {shapes.begin(), shapes.end()};
    }
    void forward(HostBackend& backend) override {
      for (std::size_t l = 0; l < convs.size(); ++l) {
        backend.download(layer.layers[l].weight, convs[l].weight());
        backend.download(layer.layers[l].bias, convs[l].bias());
      }
      const auto& product = contraction.forward(convs);
      backend.upload(product.weight(), layer.product.weight);
      backend.upload(product.bias(), layer.product.bias);
    }
    void backward(HostBackend& backend) override {
      backend.download(layer.product.weight_gradient, gradient.weight());
      backend.download(layer.product.bias_gradient, gradient.bias());
      const auto gradients = contraction.backward(convs, gradient);
      for (std::size_t l = 0; l < convs.size(); ++l) {
        backend.upload(gradients[l].weight(), layer.layers[l].weight_gradient);
        backend.upload(gradients[l].bias(), layer.layers[l].bias_gradient);
      }
    }

    cuda::ExpandedLayer<double> layer;
    concertina::Contraction<double, Rank> contraction;
    std::vector<Conv> convs;
    Conv gradient;
  };

  HostBackend& backend_;
  cuda::Stream stream_;
  std::unique_ptr<AnyChain> chain_;
};

/// Contracts as a device does: the plan's programs, on the numbers where they lie.
template <class Scalar>
class PlannedContractor final : public cuda::Contractor {
 public:
  PlannedContractor(HostBackend& backend, const cuda::ExpandedLayer<Scalar>& layer,
                    cuda::Stream stream)
      : backend_(backend),
        stream_(stream),
        at_(layer),
        plan_(at_.forms),
        workspace_(backend.allocate<Scalar>(plan_.workspace())) {}

  void forward() override {
    concertina::cuda::AddressTable table(plan_);
    table.add<const Scalar>(Role::layer, at_.layers);
    table.add<Scalar>(Role::result, at_.products);
    run(plan_.forward(), table);
  }
  void backward() override {
    concertina::cuda::AddressTable table(plan_);
    table.add<const Scalar>(Role::layer, at_.layers);
    table.add<const Scalar>(Role::result_gradient, at_.product_gradients);
    table.add<Scalar>(Role::layer_gradient, at_.layer_gradients);
    run(plan_.backward(), table);
  }

 private:
  using Role = concertina::cuda::TensorUse::Role;

  void run(const concertina::cuda::Sequence& sequence,
           const concertina::cuda::AddressTable& table) {
    constexpr int most = concertina::cuda::ContractionPlan::most_tensors;
    const auto addresses = table.addresses<most>();
    const concertina::cuda::ContractionTables tables{
        sequence.jobs.data(), sequence.taps.data(), sequence.pairs.data(), sequence.branches.data(),
        sequence.phases.data()};
    for (const concertina::cuda::Launch& launch : sequence.launches) {
      const auto index = static_cast<std::size_t>(launch.index);
      if (launch.kind == concertina::cuda::Launch::Kind::gemm) {
        const auto& gemm = sequence.gemms[index];
        backend_.issue(stream_, [this, addresses, &gemm] {
          using At = concertina::cuda::ContractionMemory<Scalar, Scalar>;
          execute(gemm, At{addresses.at, workspace_.data()}, backend_.memory());
        });
      } else {
        const concertina::cuda::Phase& phase = sequence.phases[index];
        const concertina::cuda::PhaseProgram<Scalar, Scalar, most> program{
            tables, workspace_.data(), phase, sequence.first_tiles(phase), addresses};
        backend_.issue(stream_,
                       [this, program] { concertina::test::execute(program, backend_.memory()); });
      }
    }
  }

  HostBackend& backend_;
  cuda::Stream stream_;
  cuda::Expansion<Scalar> at_;
  concertina::cuda::ContractionPlan plan_;
  HostBackend::Buffer<Scalar> workspace_;
};

template <class Scalar, class Contractor>
Accelerator<Scalar> on_host(const cuda::TrainingPlan& plan) {
  return std::make_unique<cuda::BackendTraining<Scalar, HostBackend>>(
      plan, [](HostBackend& backend, const auto& layer, cuda::Stream stream) {
        return std::make_unique<Contractor>(backend, layer, stream);
      });
}
const std::vector<MakeAccelerator<double>> accelerators = {
    on_host<double, PlannedContractor<double>>, on_host<double, HostContractor>};
constexpr MakeAccelerator<float> in_float = on_host<float, PlannedContractor<float>>;
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

struct Case {
  NetworkOptions network;
  Recipe recipe;
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

void check_alike(const Score& a, const Score& b) {
  CHECK(a.images == b.images);
  CHECK(a.correct == b.correct);
  CHECK(a.loss == Approx(b.loss).epsilon(tolerance));
}

/// Epochs of two steps, the second with fewer images, here and there; and then tests.
void compare(const Case& what, MakeAccelerator<double> make_accelerator) {
  INFO(what.network.model << ", kernel " << what.network.kernel << ", " << what.network.blocks
                          << " blocks" << (what.network.norms ? "" : ", no norms"));
  ThreadPool pool(2);
  const Dataset data =
      generated_dataset(what.network.classes, what.recipe.batch + 3, what.recipe.batch + 1, 11);
  Training<double> cpu(what.network, what.recipe, data, pool),
      accelerated(what.network, what.recipe, data, pool);
  accelerated.compute_on(make_accelerator(accelerated.accelerator_plan()));
  for (Index epoch = 0; epoch < epochs; ++epoch) {
    INFO("epoch " << epoch + 1);
    std::vector<Index> images;
    const Score expected = cpu.epoch([](Index, double, double) {}),
                found =
                    accelerated.epoch([&](Index seen, double, double) { images.push_back(seen); });
    CHECK(images == std::vector<Index>{what.recipe.batch + 3});
    CHECK_FALSE(accelerated.more_batches());
    check_alike(found, expected);
    check_alike(accelerated.checkpoint(), cpu.checkpoint());
    check_alike(accelerated.test(), cpu.test());
  }
}

TEST_CASE("a compact network trains and tests as on the CPU", "[cuda][cifar]") {
  if (!can_run()) return;
  for (const Case& each : compact_cases()) compare(each, accelerators.front());
}

TEST_CASE("an expanded network trains and tests as on the CPU", "[cuda][cifar]") {
  if (!can_run()) return;
  for (const Case& each : expanded_cases()) {
    for (const auto make_accelerator : accelerators) compare(each, make_accelerator);
  }
}

/// An accelerator's numbers, kept apart from a training's.
template <class Scalar>
struct OwnNumbers {
  std::vector<std::vector<Scalar>> parameters, statistics, velocities;

  explicit OwnNumbers(Network<Scalar>& network) {
    for (const auto* tensor : network.parameters()) {
      parameters.emplace_back(tensor->value.begin(), tensor->value.end());
      velocities.emplace_back(tensor->value.size());
    }
    for (const auto* tensor : network.statistics()) {
      statistics.emplace_back(tensor->value.begin(), tensor->value.end());
    }
  }
  cuda::Numbers<Scalar> spans() {
    return {{parameters.begin(), parameters.end()},
            {statistics.begin(), statistics.end()},
            {velocities.begin(), velocities.end()}};
  }
  friend bool operator==(const OwnNumbers&, const OwnNumbers&) = default;
};

/// An epoch in float: the losses of its steps are the CPU's, and it is the same to the bit when it
/// is run again, from the same numbers and then by recorded programs.
void compare_in_float(const NetworkOptions& network, Index images, Index batch) {
  INFO(network.model << ", kernel " << network.kernel);
  ThreadPool pool(2);
  const Dataset data = generated_dataset(network.classes, images, 1, 12);
  const Recipe recipe{.batch = batch, .seed = 13};
  Training<float> cpu(network, recipe, data, pool);
  OwnNumbers<float> once(cpu.network());
  OwnNumbers<float> again = once;
  const auto accelerator = in_float(cpu.accelerator_plan());
  const auto order = epoch_order(images, recipe.seed, 1);
  const cuda::Epoch epoch{.number = 1, .learning_rate = recipe.rate_in(1), .order = order};
  const cuda::Steps steps = accelerator->epoch(epoch, once.spans());
  const cuda::Steps steps_again = accelerator->epoch(epoch, again.spans());
  CHECK(steps.losses == steps_again.losses);
  CHECK(steps.corrects == steps_again.corrects);
  CHECK(once == again);
  REQUIRE(std::ssize(steps.losses) == recipe.batches(images));
  cpu.begin_epoch();
  for (const double loss : steps.losses) CHECK(loss == Approx(cpu.step().loss).epsilon(1e-3));
  CHECK_FALSE(cpu.more_batches());
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

/// What epochs in float leave.
struct Outcome {
  std::vector<double> losses;
  OwnNumbers<float> numbers;
  friend bool operator==(const Outcome&, const Outcome&) = default;
};
Outcome outcome_of(cuda::TrainingPlan plan, const cuda::Overlap& overlap, Network<float>& network,
                   const Recipe& recipe) {
  plan.overlap = overlap;
  const auto accelerator = in_float(plan);
  Outcome outcome{{}, OwnNumbers<float>(network)};
  for (Index number = 1; number <= epochs; ++number) {
    const auto order = epoch_order(std::ssize(plan.train.labels), recipe.seed, number);
    const cuda::Steps steps = accelerator->epoch(
        {.number = number, .learning_rate = 0.1, .order = order}, outcome.numbers.spans());
    outcome.losses.insert(outcome.losses.end(), steps.losses.begin(), steps.losses.end());
  }
  return outcome;
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
  ThreadPool pool(2);
  const Dataset data = generated_dataset(10, images, 1, 12);
  for (const std::string& model : models) {
    INFO(model);
    const Recipe recipe{.batch = batch, .weight_decay = 0.01, .seed = 13};
    Training<float> training({.model = model, .kernel = kernel, .rate = rate}, recipe, data, pool);
    const auto outcome = [&](const cuda::Overlap& overlap) {
      return outcome_of(training.accelerator_plan(), overlap, training.network(), recipe);
    };
    const Outcome plain = outcome({.forked = false});
    for (int order = 0; order < 3; ++order) {  // each with another order of streams
      CHECK(outcome({.forked = true}) == plain);
    }
  }
}

TEST_CASE("a training goes on from a checkpoint of the other device", "[cuda][cifar]") {
  if (!can_run()) return;
  ThreadPool pool(2);
  const Dataset data = generated_dataset(10, 4, 2, 11);
  const NetworkOptions network{.model = "compact", .kernel = 3};
  const Recipe recipe{.epochs = 9, .batch = 4, .keep_momentum = true};
  const auto nothing = [](Index, double, double) {};
  Training<double> cpu(network, recipe, data, pool), accelerated(network, recipe, data, pool);
  accelerated.compute_on(accelerators.front()(accelerated.accelerator_plan()));
  cpu.epoch(nothing);
  accelerated.restore(cpu.checkpoint());
  cpu.epoch(nothing);
  accelerated.epoch(nothing);
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
  training.compute_on(accelerators.front()(training.accelerator_plan()));
  const auto before = training.network().save();
  CHECK_THAT(
      message_of<concertina::NumericalError>([&] { training.epoch([](Index, double, double) {}); }),
      Contains("epoch 1, image 2: the loss is not finite"));
  CHECK(training.network().save() == before);
}

#ifndef CONCERTINA_ON_DEVICE
TEST_CASE("a step runs few programs, each with a purpose", "[cuda][cifar]") {
  ThreadPool pool(1);
  const Dataset data = generated_dataset(10, 2, 1, 11);
  Training<double> training({.model = "compact", .kernel = 3}, {.batch = 2}, data, pool);
  auto accelerator = std::make_unique<OnHost>(training.accelerator_plan());
  auto& purposes = accelerator->backend().purposes;
  purposes.clear();  // of what is run once
  training.compute_on(std::move(accelerator));
  training.epoch([](Index, double, double) {});
  // Images, loss, descent; three convolutions of three and of three for the gradients, but for the
  // input of the first; norms of two and two; fully connected layers of one and two.
  CHECK(purposes.size() == 3 + 3 * (1 + 3) - 1 + 3 * (2 + 2) + 2 * (1 + 2));
  CHECK(std::ranges::find(purposes, "conv2, a convolution") != purposes.end());
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
  CHECK(copies_of([&] { training.epoch([](Index, double, double) {}); }) == std::pair(5, 5));
  CHECK(copies_of([&] { training.test(); }) == std::pair(3, 2));
}

/// Notes what is recorded when it is destroyed.
class NotingContractor final : public cuda::Contractor {
 public:
  NotingContractor(HostBackend& backend, const cuda::ExpandedLayer<double>& layer,
                   cuda::Stream stream, std::vector<std::size_t>& recorded)
      : backend_(backend), contractor_(backend, layer, stream), recorded_(recorded) {}
  ~NotingContractor() override { recorded_.push_back(backend_.recordings()); }

  void forward() override { contractor_.forward(); }
  void backward() override { contractor_.backward(); }

 private:
  HostBackend& backend_;
  PlannedContractor<double> contractor_;
  std::vector<std::size_t>& recorded_;
};

TEST_CASE("what was recorded goes before what it refers to", "[cuda][cifar]") {
  ThreadPool pool(1);
  const Dataset data = generated_dataset(10, 2, 1, 11);
  Training<double> training({.model = "cl", .kernel = 3, .rate = 1}, {.batch = 2}, data, pool);
  std::vector<std::size_t> recorded;
  auto accelerator = std::make_unique<OnHost>(
      training.accelerator_plan(),
      [&](HostBackend& backend, const auto& layer, cuda::Stream stream) {
        return std::make_unique<NotingContractor>(backend, layer, stream, recorded);
      });
  const HostBackend& backend = accelerator->backend();
  training.compute_on(std::move(accelerator));
  for (int i = 0; i < 2; ++i) training.test();
  CHECK(backend.recordings() == 1);
  training.compute_on(nullptr);
  CHECK(recorded == std::vector<std::size_t>{0, 0, 0});  // of three layers
}

TEST_CASE("tensors start at multiples of 128 bytes in float", "[cuda][cifar]") {
  ThreadPool pool(1);
  const Dataset data = generated_dataset(10, 2, 1, 11);
  Training<double> training({.model = "cl+fc", .kernel = 3, .rate = 1}, {.batch = 2}, data, pool);
  std::vector<cuda::LayerNumbers<double>> numbers, products;
  const OnHost accelerator(training.accelerator_plan(), [&](HostBackend& backend, const auto& layer,
                                                            cuda::Stream stream) {
    numbers.insert(numbers.end(), layer.layers.begin(), layer.layers.end());
    products.push_back(layer.product);
    return std::make_unique<PlannedContractor<double>>(backend, layer, stream);
  });
  REQUIRE(products.size() == 4);  // three convolutions and fc1
  const auto check_places = [](const auto& layer, const auto& first) {
    CHECK((layer.weight - first.weight) % 32 == 0);
    CHECK((layer.weight_gradient - first.weight_gradient) % 32 == 0);
    if (layer.biases == 0) return;
    CHECK((layer.bias - first.weight) % 32 == 0);
    CHECK((layer.bias_gradient - first.weight_gradient) % 32 == 0);
  };
  for (const auto& layer : numbers) check_places(layer, numbers.front());
  for (const auto& product : products) check_places(product, product);
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

TEST_CASE("a plan's sets and tensors must fit", "[cuda][cifar]") {
  ThreadPool pool(1);
  const Dataset data = generated_dataset(3, 4, 2, 11);
  Training<double> training({.model = "compact", .kernel = 3, .classes = 3}, {.batch = 2}, data,
                            pool);
  const cuda::TrainingPlan plan = training.accelerator_plan();
  const auto refused = [](const cuda::TrainingPlan& wrong) {
    return message_of<concertina::ShapeError>([&] { OnHost without(wrong); });
  };
  cuda::TrainingPlan wrong = plan;
  wrong.train.pixels = wrong.train.pixels.first(3 * 3072 + 7);
  CHECK_THAT(refused(wrong), Contains("training set has 9223 pixels for 4 images of 3072"));
  wrong = plan;
  std::vector<std::uint8_t> labels = {2, 3};
  wrong.test.labels = labels;
  CHECK_THAT(refused(wrong),
             Contains("the test set's image 1 has class 3, where the network has 3"));
  wrong = plan;
  wrong.network.parameters.push_back({"fc3.weight", {5, 2}});
  CHECK_THAT(refused(wrong), Contains("no layer uses the tensor fc3.weight of 10 numbers"));
  wrong = plan;
  wrong.network.parameters.push_back({"conv4.0.weight", {5, 2}});
  CHECK_THAT(refused(wrong), Contains("no layer uses the tensor conv4.0.weight"));
  wrong = plan;
  wrong.network.norms = false;
  CHECK_THAT(refused(wrong), Contains("no layer uses the tensor conv1_bn.weight of 8 numbers"));
}

TEST_CASE("an epoch's order and numbers must fit", "[cuda][cifar]") {
  ThreadPool pool(1);
  const Dataset data = generated_dataset(10, 4, 2, 11);
  Training<double> training({.model = "compact", .kernel = 3}, {.batch = 2}, data, pool);
  OnHost accelerator(training.accelerator_plan());
  OwnNumbers<double> own(training.network());
  const auto refused = [&](const std::vector<std::uint32_t>& order,
                           const cuda::Numbers<double>& numbers) {
    return message_of<concertina::ShapeError>(
        [&] { accelerator.epoch({.order = order}, numbers); });
  };
  const auto numbers = own.spans();
  CHECK_THAT(refused({0, 1, 2}, numbers),
             Contains("an order of 3 images, where the training set has 4"));
  CHECK_THAT(refused({0, 1, 4, 2}, numbers),
             Contains("the order's entry 2 is image 4, where the training set has 4"));
  const auto first = [](auto& tensors) { tensors.front() = tensors.front().first(5); };
  auto wrong = numbers;
  first(wrong.parameters);
  CHECK_THAT(refused({0, 1, 2, 3}, wrong),
             Contains("parameters: 5 numbers for conv1.weight, which has 216"));
  CHECK_THAT(message_of<concertina::ShapeError>([&] { accelerator.test(wrong); }),
             Contains("parameters: 5 numbers for conv1.weight, which has 216"));
  wrong = numbers;
  first(wrong.velocities);
  CHECK_THAT(refused({0, 1, 2, 3}, wrong),
             Contains("velocities: 5 numbers for conv1.weight, which has 216"));
  CHECK_NOTHROW(accelerator.test(wrong));
  wrong = numbers;
  first(wrong.statistics);
  CHECK_THAT(refused({0, 1, 2, 3}, wrong), Contains("statistics: 5 numbers for conv1_bn."));
  wrong = numbers;
  wrong.statistics.pop_back();
  CHECK_THAT(refused({0, 1, 2, 3}, wrong),
             Contains("statistics of 5 tensors, where the network has 6"));
}

TEST_CASE("an expanded network needs something to contract it", "[cuda][cifar]") {
  ThreadPool pool(1);
  const Dataset data = generated_dataset(10, 2, 1, 11);
  Training<double> training({.model = "cl", .kernel = 3, .rate = 1}, {.batch = 2}, data, pool);
  const cuda::TrainingPlan plan = training.accelerator_plan();
  CHECK_THAT(message_of<concertina::ShapeError>([&] { OnHost without(plan); }),
             Contains("conv1 is expanded"));
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
  const auto refused = [](const NetworkOptions& network, const Recipe& recipe) {
    return message_of<UnsupportedError>([&] { require_accelerable(network, recipe); });
  };
  CHECK_THAT(refused({.model = "acnet"}, {}), Contains("acnet"));
  CHECK_THAT(refused({.model = "resnet18"}, {}), Contains("resnet18"));
  CHECK_THAT(refused({.model = "cl", .compute = Compute::layered}, {}), Contains("layered"));
  CHECK_THAT(refused({.model = "cl", .compute = Compute::nonlinear}, {}), Contains("nonlinear"));
  CHECK_THAT(refused({}, {.adam = true}), Contains("adam"));
  CHECK_THAT(refused({}, {.transfer = {.method = Transfer::kd}}), Contains("--transfer kd"));
  CHECK_NOTHROW(require_accelerable({.model = "ck+fc"}, {.corrupted = 0.5}));
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
