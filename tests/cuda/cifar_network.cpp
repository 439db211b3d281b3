// SmallNet's programs, on the host or on a device, against the CPU's training: the same seed sees
// the same images, and ends with the same numbers but for rounding.
// SPDX-License-Identifier: Apache-2.0
#include "cifar/cuda/network.hpp"

#include "cifar/cuda/expansion.hpp"
#include "cifar/cuda/training.hpp"
#include "cifar/training.hpp"
#ifdef CONCERTINA_ON_DEVICE
#include "on_device.hpp"
#else
#include "cifar_backend.hpp"
#include "on_host.hpp"
#endif
#include "support.hpp"

#include <concertina/pullback.hpp>

#include <catch2/catch.hpp>

#include <algorithm>
#include <cmath>
#include <memory>
#include <string>
#include <variant>
#include <vector>

namespace cifar {
namespace {

using Catch::Matchers::Contains;
using concertina::test::can_run, concertina::test::message_of;
using Accelerator = std::unique_ptr<cuda::Accelerator<double>>;
using MakeAccelerator = Accelerator (*)(const cuda::TrainingPlan& plan);

#ifdef CONCERTINA_ON_DEVICE
// The first epoch launches programs, the second records them, the third replays what it recorded.
constexpr int epochs = 3;
constexpr double tolerance = 1e-10;
const std::vector<MakeAccelerator> accelerators = {cuda::cuda_accelerator<double>};
#else
constexpr int epochs = 1;
constexpr double tolerance = 1e-12;

using test::HostBackend;
using OnHost = cuda::BackendTraining<double, HostBackend>;

/// Contracts on the host what lies on the backend, by the library itself.
class HostContractor final : public cuda::Contractor {
 public:
  HostContractor(HostBackend& backend, const std::vector<cuda::ExpandedLayer<double>>& layers)
      : backend_(backend) {
    for (const auto& layer : layers) {
      std::visit(
          [&]<int Rank>(const std::vector<concertina::ConvShape<Rank>>& shapes) {
            chains_.push_back(std::make_unique<Chain<Rank>>(layer, shapes));
          },
          layer.shapes);
    }
  }

  void forward() override {
    for (const auto& chain : chains_) chain->forward(backend_);
  }
  void pullback() override {
    for (const auto& chain : chains_) chain->pullback(backend_);
  }

 private:
  struct AnyChain {
    virtual ~AnyChain() = default;
    virtual void forward(HostBackend& backend) = 0;
    virtual void pullback(HostBackend& backend) = 0;
  };

  template <int Rank>
  struct Chain final : AnyChain {
    using Conv = concertina::Conv<double, Rank>;

    Chain(const cuda::ExpandedLayer<double>& layer_,
          const std::vector<concertina::ConvShape<Rank>>& shapes)
        : layer(layer_),
          contraction(concertina::form(convs_of(shapes))),
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
    void pullback(HostBackend& backend) override {
      backend.download(layer.product.weight_gradient, gradient.weight());
      backend.download(layer.product.bias_gradient, gradient.bias());
      const auto gradients = contraction.pullback(convs, gradient);
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
  std::vector<std::unique_ptr<AnyChain>> chains_;
};

/// Contracts as a device does: the plan's programs, on the numbers where they lie.
class PlannedContractor final : public cuda::Contractor {
 public:
  PlannedContractor(HostBackend& backend, const std::vector<cuda::ExpandedLayer<double>>& layers)
      : memory_(backend.memory()),
        at_(layers),
        plan_(at_.chains),
        workspace_(backend.allocate<double>(plan_.workspace())) {}

  void forward() override {
    concertina::cuda::AddressTable table(plan_);
    table.add<const double>(Role::layer, at_.layers);
    table.add<double>(Role::result, at_.products);
    run(plan_.forward(), table);
  }
  void pullback() override {
    concertina::cuda::AddressTable table(plan_);
    table.add<const double>(Role::layer, at_.layers);
    table.add<const double>(Role::result_gradient, at_.product_gradients);
    table.add<double>(Role::layer_gradient, at_.layer_gradients);
    run(plan_.pullback(), table);
  }

 private:
  using Role = concertina::cuda::TensorUse::Role;

  void run(const concertina::cuda::Sequence& sequence, concertina::cuda::AddressTable& table) {
    concertina::test::execute<double, double>(
        sequence, table.addresses<concertina::cuda::ContractionPlan::most_tensors>(),
        workspace_.data(), memory_);
  }

  concertina::test::Memory& memory_;
  cuda::Expansions<double> at_;
  concertina::cuda::ContractionPlan plan_;
  HostBackend::Buffer<double> workspace_;
};

template <class Contractor>
Accelerator on_host(const cuda::TrainingPlan& plan) {
  return std::make_unique<OnHost>(plan, [](HostBackend& backend, const auto& layers) {
    return std::make_unique<Contractor>(backend, layers);
  });
}
const std::vector<MakeAccelerator> accelerators = {on_host<PlannedContractor>,
                                                   on_host<HostContractor>};
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
  return {{{.model = "compact", .kernel = 3}, {.batch = 8, .seed = 3}},
          {{.model = "compact", .kernel = 5},
           {.batch = 5, .momentum = 0.5, .keep_momentum = true, .weight_decay = 0.01, .seed = 4}},
          {{.model = "compact", .kernel = 3, .blocks = 4, .classes = 7},
           {.batch = 6, .corrupted = 0.5, .uniform_norms = true, .seed = 5}},
          {{.model = "compact", .kernel = 3, .norms = false}, {.batch = 6, .seed = 6}}};
}

std::vector<Case> expanded_cases() {
  return {
      {{.model = "cl+fc", .kernel = 3, .rate = 1}, {.batch = 6, .weight_decay = 0.02, .seed = 7}},
      {{.model = "ck", .kernel = 5, .rate = 1},
       {.batch = 6, .weight_decay = 0.02, .decay_products = true, .seed = 8}}};
}

void check_alike(const Score& a, const Score& b) {
  CHECK(a.images == b.images);
  CHECK(a.correct == b.correct);
  CHECK(a.loss == Approx(b.loss).epsilon(tolerance));
}

/// Epochs of two steps, the second with fewer images, here and there; and then tests.
void compare(const Case& what, MakeAccelerator make_accelerator) {
  INFO(what.network.model << ", kernel " << what.network.kernel << ", " << what.network.blocks
                          << " blocks" << (what.network.norms ? "" : ", no norms"));
  ThreadPool pool(2);
  const Dataset data =
      generated_dataset(what.network.classes, what.recipe.batch + 3, what.recipe.batch + 1, 11);
  Training<double> cpu(what.network, what.recipe, data, pool),
      accelerated(what.network, what.recipe, data, pool);
  accelerated.compute_on(make_accelerator(accelerated.accelerator_plan()));
  for (int epoch = 0; epoch < epochs; ++epoch) {
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
    for (const MakeAccelerator make_accelerator : accelerators) compare(each, make_accelerator);
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
  const auto& purposes = accelerator->backend().purposes;
  training.compute_on(std::move(accelerator));
  training.epoch([](Index, double, double) {});
  // Images, loss, descent; three convolutions of three and of three for the gradients, but for the
  // input of the first; norms of two and two; fully connected layers of one and two.
  CHECK(purposes.size() == 3 + 3 * (1 + 3) - 1 + 3 * (2 + 2) + 2 * (1 + 2));
  CHECK(std::ranges::find(purposes, "conv2, a convolution") != purposes.end());
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
  CHECK(device_of("cuda") == Device::cuda);
  CHECK_THAT(message_of<concertina::Error>([] { device_of("gpu"); }), Contains("cpu, cuda"));
}

}  // namespace
}  // namespace cifar
