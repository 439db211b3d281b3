// The gradient of every operation that networks are recorded from, by one test on the processor's
// tape and on the device's, whose programs run on the host: against central differences of the
// loss that each computes itself, and against each other.
// SPDX-License-Identifier: Apache-2.0
#include "cifar/cuda/training.hpp"
#include "cifar/on_tape.hpp"
#include "cuda/backend.hpp"
#include "support.hpp"
#include "training/contractions.hpp"
#include "training/data.hpp"

#include <concertina/random.hpp>

#include <catch2/catch.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <deque>
#include <functional>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

namespace cifar {
namespace {

using concertina::ConvShape, concertina::test::Rng;
using cuda::Part;
using Recorder = cuda::Recorder<double>;
using Map = Recorder::Map;

constexpr Index images = 3, classes = 4;

/// Tensors with random numbers, the same on either side.
class Tensors {
 public:
  explicit Tensors(Tape<double>& tape) : tape_(tape) {}

  Tensor<double>& tensor(const std::vector<Index>& shape, double middle = 0) {
    Tensor<double>& made = tape_.tensor("layer" + std::to_string(all.size()) + ".weight", shape);
    for (double& value : made.value) value = middle + concertina::random_uniform(rng_, 0.5);
    all.push_back(&made);
    return made;
  }
  template <int Rank>
  Weights<double> weights(const ConvShape<Rank>& shape) {
    return {&tensor(weight_extents(shape)), shape.bias ? &tensor({shape.out}) : nullptr};
  }
  NormTensors<double> norm(Index channels) {
    NormTensors<double> made{&tensor({channels}, 1), &tensor({channels}), nullptr, nullptr};
    made.running_mean = &tape_.tensor("running_mean", {channels});
    made.running_var = &tape_.tensor("running_var", {channels});
    std::ranges::fill(made.running_var->value, 1);
    return made;
  }

  std::vector<Tensor<double>*> all;  // but running statistics

 private:
  Tape<double>& tape_;
  Rng rng_{31};
};

/// Maps and how many numbers of an image are in them.
struct Output {
  Map map;
  Index numbers;
};

/// An operation on maps of 4 channels of 8 x 8.
struct Case {
  std::string name;
  std::function<Output(Recorder& on, Map x, Tensors& make)> operation;
  bool differences = true;  ///< what the loss says of them is its gradient
  bool teaches = false;     ///< the other maps are a teacher's
  /// Of features and logits, a loss that is not in what a backend says of it.
  std::function<void(Recorder& on, Map features, Map logits, Map other)> transfer = {};
};

template <int Rank>
Map layer(Recorder& on, Map x, Tensors& make, const ConvShape<Rank>& shape) {
  return on.layer(x, shape, make.weights(shape), {});
}

/// An expanded layer, which is contracted.
template <int Rank>
Map contracted(Recorder& on, Map x, Tensors& make, const std::vector<ConvShape<Rank>>& shapes,
               const ConvShape<Rank>& whole) {
  Chain<double, Rank> chain{.shapes = shapes, .layers = {}};
  for (const ConvShape<Rank>& each : shapes) chain.layers.push_back(make.weights(each));
  return on.layer(x, whole, {}, chain);
}

std::vector<Case> cases() {
  const ConvShape<2> square{.out = 3, .in = 4, .kernel_size = 3, .padding = 1, .bias = true};
  std::vector<Case> all;
  const auto add = [&](const char* name, auto operation) { all.push_back({name, operation}); };
  const auto convolution = [&](const char* name, auto change, Index numbers) {
    ConvShape<2> shape = square;
    change(shape);
    add(name, [=](Recorder& on, Map x, Tensors& make) {
      return Output{layer(on, x, make, shape), numbers};
    });
  };
  convolution("convolution", [](auto&) {}, 3 * 64);
  convolution("convolution without bias", [](auto& s) { s.bias = false; }, 3 * 64);
  convolution("convolution of stride 2", [](auto& s) { s.stride = 2; }, 3 * 16);
  convolution(
      "pointwise of stride 2", [](auto& s) { s.kernel_size = 1, s.padding = 0, s.stride = 2; },
      3 * 16);
  convolution("column", [](auto& s) { s.kernel_size = {3, 1}, s.padding = {1, 0}; }, 3 * 64);
  convolution(
      "row that crops", [](auto& s) { s.kernel_size = {1, 3}, s.padding = {-1, 0}; }, 3 * 36);
  add("contracted convolutions", [=](Recorder& on, Map x, Tensors& make) {
    ConvShape<2> first{.out = 4, .in = 4, .kernel_size = 1, .padding = 1, .bias = true},
        last{.out = 3, .in = 5, .kernel_size = 1, .bias = true};
    ConvShape<2> middle{.out = 5, .in = 4, .kernel_size = 3, .bias = true};
    return Output{contracted<2>(on, x, make, {first, middle, last}, square), 3 * 64};
  });
  add("contracted linear layers", [](Recorder& on, Map x, Tensors& make) {
    const ConvShape<0> first{.out = 6, .in = 256, .bias = true},
        last{.out = 5, .in = 6, .bias = true}, whole{.out = 5, .in = 256, .bias = true};
    return Output{contracted<0>(on, x, make, {first, last}, whole), 5};
  });
  add("linear and ReLU", [](Recorder& on, Map x, Tensors& make) {
    const ConvShape<0> shape{.out = 9, .in = 256};
    return Output{on.relu(layer(on, x, make, shape)), 9};
  });
  add("norm",
      [](Recorder& on, Map x, Tensors& make) { return Output{on.norm(x, make.norm(4)), 256}; });
  add("norm, ReLU and pool", [](Recorder& on, Map x, Tensors& make) {
    return Output{on.max_pool(on.relu(on.norm(x, make.norm(4)))), 64};
  });
  add("ReLU", [](Recorder& on, Map x, Tensors&) { return Output{on.relu(x), 256}; });
  add("pool", [](Recorder& on, Map x, Tensors&) { return Output{on.max_pool(x), 64}; });
  add("mean of maps", [](Recorder& on, Map x, Tensors&) { return Output{on.mean_pool(x), 4}; });
  add("maps that three read, and their sum", [=](Recorder& on, Map x, Tensors& make) {
    ConvShape<2> shape = square;
    shape.out = 4;
    const Map pooled = on.max_pool(x), left = layer(on, pooled, make, shape);
    shape.bias = false;  // it has no gradient before a norm
    Map right = layer(on, pooled, make, shape);
    right = on.norm(right, make.norm(4));
    return Output{on.relu(on.sum({left, pooled, right})), 64};
  });
  add("detached",
      [](Recorder& on, Map x, Tensors&) { return Output{on.sum({x, on.detached(x)}), 256}; });
  all.back().differences = false;
  const auto transfer = [&](const char* name, bool teaches, auto loss) {
    all.push_back({name,
                   [](Recorder& on, Map x, Tensors& make) {
                     const ConvShape<0> shape{.out = classes, .in = 256, .bias = true};
                     return Output{layer(on, x, make, shape), classes};
                   },
                   false, teaches, loss});
  };
  transfer("distillation", true,
           [](Recorder& on, Map, Map logits, Map other) { on.distill(logits, other, 3, 0.75); });
  transfer("hint", false,
           [](Recorder& on, Map features, Map, Map other) { on.hint(features, other); });
  transfer("similarities", true, [](Recorder& on, Map features, Map, Map other) {
    on.match_similarities(features, other);
  });
  return all;
}

/// The case between a layer that gives it maps and one that reads its output, and the loss.
void record(Recorder& on, Tensors& make, const Case& which) {
  const ConvShape<2> half{.out = 4, .in = 4, .kernel_size = 1, .stride = 2};
  ConvShape<2> colours_in = half;
  colours_in.in = 3;
  const Map x = layer(on, layer(on, on.images(), make, colours_in), make, half);
  const ConvShape<0> teacher{.out = classes, .in = 256};
  on.begin(which.teaches ? Part::frozen : Part::trained);
  const Map other = which.transfer ? layer(on, x, make, teacher) : Map();
  on.begin(Part::trained);
  const Output y = which.operation(on, x, make);
  const ConvShape<0> last{.out = classes, .in = y.numbers, .bias = true};
  const Map logits = layer(on, y.map, make, last);
  on.loss(logits, 1);
  if (which.transfer) which.transfer(on, y.map, logits, other);
  on.end();
}

/// The processor's tape as a recorder.
class OnProcessor final : public Recorder {
 public:
  explicit OnProcessor(const Dataset& data) : data_(data) {}

  Map images() override {
    Maps<double>& maps = tape.maps(colours, side, side, false);
    record_source<double>(tape, maps, [this](Index chunk, double* to) {
      if (chunk > 0) return;
      const std::vector<std::uint32_t> which = {0, 1, 2};
      load_images<double, lanes>(data_, data_.train, which, nullptr, to);
    });
    return add(&maps);
  }
  Map layer(Map x, const ConvShape<2>& shape, const Weights<double>& weights,
            const Chain<double, 2>& chain) override {
    return any_layer(x, shape, weights, chain);
  }
  Map layer(Map x, const ConvShape<0>& shape, const Weights<double>& weights,
            const Chain<double, 0>& chain) override {
    return any_layer(x, shape, weights, chain);
  }
  Map norm(Map x, const NormTensors<double>& norm, const concertina::Padding<2>& margin) override {
    return add(on_.norm(maps_[x], norm, margin));
  }
  /// Of a copy, for others may read x.
  Map relu(Map x) override { return add(on_.relu(on_.sum({maps_[x]}))); }
  Map max_pool(Map x) override { return add(on_.max_pool(maps_[x])); }
  Map mean_pool(Map x) override { return add(on_.mean_pool(maps_[x])); }
  Map average_pool(Map x, const concertina::PerAxis<2>& kernel) override {
    return add(on_.average_pool(maps_[x], kernel));
  }
  Map sum(const std::vector<Map>& branches) override {
    std::vector<Maps<double>*> maps;
    for (const Map branch : branches) maps.push_back(maps_[branch]);
    return add(on_.sum(maps));
  }
  Map detached(Map x) override { return add(on_.detached(maps_[x])); }
  void begin(Part) override {}
  void loss(Map logits, double weight) override {
    entropy = std::make_unique<CrossEntropy<double>>(tape, *maps_[logits]);
    entropy->set_weight(weight);
  }
  void distill(Map logits, Map teacher, double temperature, double weight) override {
    on_.distill(maps_[logits], maps_[teacher], temperature, weight);
  }
  void hint(Map features, Map hint) override { on_.hint(maps_[features], maps_[hint]); }
  void match_similarities(Map features, Map teacher) override {
    on_.match_similarities(maps_[features], maps_[teacher]);
  }
  void end() override {}

  ThreadPool pool{1};
  Tape<double> tape{cifar::images, pool};
  std::unique_ptr<CrossEntropy<double>> entropy;

 private:
  Map add(Maps<double>* maps) {
    maps_.push_back(maps);
    return maps_.size() - 1;
  }
  template <int Rank>
  Map any_layer(Map x, const ConvShape<Rank>& shape, const Weights<double>& weights,
                const Chain<double, Rank>& chain) {
    if (chain.layers.empty()) return add(on_.layer(maps_[x], shape, weights, chain));
    Contractions<double>& contraction = contractions_.emplace_back(tape);
    const auto [whole, contracted_shape] = contraction.add(chain);
    CHECK(contracted_shape == shape);
    return add(on_.layer(maps_[x], shape, whole, chain));
  }

  const Dataset& data_;
  OnTape<double> on_{tape};
  std::deque<Contractions<double>> contractions_;
  std::vector<Maps<double>*> maps_;
};

/// A backend's loss and gradients, with the tensors as they are.
struct Backend {
  std::vector<Tensor<double>*> tensors;
  std::function<double(std::vector<std::vector<double>>& gradients)> run;
};

/// Along a random direction of each tensor.
void check_differences(const Backend& backend) {
  std::vector<std::vector<double>> gradients, ignored;
  backend.run(gradients);
  Rng rng(32);
  for (std::size_t t = 0; t < gradients.size(); ++t) {
    INFO("tensor " << t);
    std::vector<double>& value = backend.tensors[t]->value;
    const std::vector<double> start = value;
    std::vector<double> direction(value.size());
    for (double& each : direction) each = concertina::random_uniform(rng, 1);
    const auto moved = [&](double by) {
      for (std::size_t i = 0; i < value.size(); ++i) value[i] = start[i] + by * direction[i];
      return backend.run(ignored);
    };
    constexpr double step = 1e-5;
    const double difference = (moved(step) - moved(-step)) / (2 * step);
    value = start;
    const double product =
        std::inner_product(direction.begin(), direction.end(), gradients[t].begin(), 0.0);
    CHECK(product == Approx(difference).epsilon(1e-6).margin(1e-8));
  }
}

TEST_CASE("gradients of each operation, on the processor and on a device", "[cuda][cifar]") {
  const Dataset data = generated_dataset(classes, images, 1, 33);
  std::vector<std::uint32_t> order(images);
  std::iota(order.begin(), order.end(), 0U);
  for (const Case& which : cases()) {
    INFO(which.name);
    OnProcessor processor(data);
    Tensors of_processor(processor.tape);
    record(processor, of_processor, which);
    processor.entropy->set_labels(data.train.labels);
    const auto on_processor = [&](std::vector<std::vector<double>>& gradients) {
      processor.tape.tensors_changed();
      processor.tape.forward(images, true);
      processor.tape.backward();
      gradients.clear();
      for (const Tensor<double>* tensor : of_processor.all) {
        gradients.emplace_back(tensor->gradient.begin(), tensor->gradient.end());
      }
      return processor.entropy->loss();
    };

    cuda::BackendTraining<double, test::HostBackend> device(
        {.descent = {.momentum = 0},
         .batch = images,
         .augmented = false,
         .mean = data.mean,
         .deviation = data.deviation,
         .train = {data.train.pixels, data.train.labels},
         .test = {data.test.pixels, data.test.labels}});
    ThreadPool pool(1);
    Tape<double> tape(1, pool);
    Tensors of_device(tape);
    record(device.recorder(), of_device, which);
    // Without momentum the velocities are the gradients; at a rate of 0 no tensor moves.
    const auto on_device = [&](std::vector<std::vector<double>>& gradients) {
      gradients.clear();
      cuda::States<double> states(1);
      for (const Tensor<double>* tensor : of_device.all) {
        gradients.emplace_back(tensor->value.size());
      }
      for (std::size_t t = 0; t < gradients.size(); ++t) {
        states.front()[of_device.all[t]] = gradients[t];
      }
      return device.epoch({.learning_rate = 0, .order = order}, states).losses.front();
    };

    if (which.differences) {
      check_differences({of_processor.all, on_processor});
      check_differences({of_device.all, on_device});
    }
    std::vector<std::vector<double>> expected, found;
    CHECK(on_device(found) == Approx(on_processor(expected)).epsilon(1e-12));
    REQUIRE(found.size() == expected.size());
    for (std::size_t t = 0; t < found.size(); ++t) {
      INFO("tensor " << t);
      const auto magnitude = [](double x) { return std::abs(x); };
      const double largest = std::abs(std::ranges::max(expected[t], {}, magnitude));
      CHECK(((largest > 1e-9) || (which.teaches && t == 2)));
      for (std::size_t i = 0; i < found[t].size(); ++i) {
        CHECK(std::abs(found[t][i] - expected[t][i]) <= 1e-12 * std::max(largest, 1e-2));
      }
    }
  }
}

}  // namespace
}  // namespace cifar
