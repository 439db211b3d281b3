// Trainings: the recipe, contracted beside layered over a hundred steps, checkpoints.
// SPDX-License-Identifier: Apache-2.0
#include "cifar/training.hpp"

#include "cifar/log.hpp"
#include "support.hpp"

#include <concertina/io/safetensors.hpp>

#include <catch2/catch.hpp>

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <string>
#include <vector>

namespace cifar {
namespace {

using Catch::Matchers::Contains;
using concertina::test::message_of;

struct Folder {
  std::filesystem::path path =
      std::filesystem::temp_directory_path() / ("cifar_training_" + std::to_string(getpid()));
  Folder() { std::filesystem::remove_all(path); }
  ~Folder() { std::filesystem::remove_all(path); }
};

template <class Scalar>
std::vector<double> losses(const std::string& model, Index kernel, Compute compute) {
  ThreadPool pool(2);
  const Dataset data = generated_dataset(10, 512, 16, 2);
  Training<Scalar> training({.model = model, .kernel = kernel, .rate = 2, .compute = compute},
                            {.batch = 16, .seed = 4}, data, pool);
  std::vector<double> result;
  for (int step = 0; step < 100; ++step) {
    if (!training.more_batches() || step == 0) training.begin_epoch();
    result.push_back(training.step().loss);
  }
  return result;
}

TEST_CASE("contracted training is layered training, in double", "[cifar]") {
  for (const auto& [model, kernel] : {std::pair("cl+fc", 3), std::pair("ck", 5)}) {
    INFO(model);
    const auto contracted = losses<double>(model, kernel, Compute::contracted);
    const auto layered = losses<double>(model, kernel, Compute::layered);
    for (std::size_t step = 0; step < contracted.size(); ++step) {
      INFO("step " << step);
      CHECK(std::abs(contracted[step] - layered[step]) <= 1e-9 * layered[step]);
    }
    CHECK(contracted.back() < contracted.front());  // it does learn
  }
}

TEST_CASE("drift tells ways of computing a training from rounding", "[cifar]") {
  ThreadPool pool(2);
  const Dataset data = generated_dataset(10, 512, 16, 2);
  const Drift found =
      drift({.model = "cl", .kernel = 3, .rate = 2}, {.batch = 16, .seed = 4}, data, 20, pool);
  CHECK(found.contracted_in_double <= 1e-9);
  CHECK(found.reversed > found.contracted_in_double);  // float rounds, so orders differ
  CHECK(found.contracted > found.contracted_in_double);
}

TEST_CASE("a training whose loss is not finite stops, and leaves what it had", "[cifar]") {
  const Folder folder;
  ThreadPool pool(2);
  const Dataset data = generated_dataset(10, 256, 16, 3);
  TrainOptions options{.network = {.model = "compact", .kernel = 3},
                       .recipe = {.epochs = 3, .batch = 32, .learning_rate = 1e30},
                       .out = folder.path,
                       .command = "test"};
  CHECK_THAT(message_of<concertina::NumericalError>([&] { train(options, data, pool); }),
             Contains("not finite") && Contains("learning rate"));
  CHECK_FALSE(std::filesystem::exists(folder.path / "checkpoint.safetensors"));
  CHECK(CsvLog::read(folder.path / "log.csv").empty());
}

TEST_CASE("the learning rate falls after a third and two of the epochs", "[cifar]") {
  const Recipe recipe;
  CHECK(recipe.rate_in(1) == 0.01);
  CHECK(recipe.rate_in(50) == 0.01);
  CHECK(recipe.rate_in(51) == Approx(0.001).epsilon(1e-15));
  CHECK(recipe.rate_in(100) == Approx(0.001).epsilon(1e-15));
  CHECK(recipe.rate_in(101) == Approx(0.0001).epsilon(1e-15));
  CHECK(recipe.rate_in(150) == Approx(0.0001).epsilon(1e-15));
  const Recipe one{.epochs = 1};
  CHECK(one.rate_in(1) == 0.01);
}

TEST_CASE("a step is that of torch.optim.SGD", "[cifar]") {
  ThreadPool pool(2);
  Tape<double> tape(1, pool);
  constexpr std::size_t count = 70'000;  // more than a block
  Tensor<double>& tensor = tape.tensor("w", {count});
  std::vector<double> gradient(count), velocity(count, 0), expected(count);
  concertina::test::Rng rng(1);
  for (std::size_t i = 0; i < count; ++i) {
    tensor.value[i] = expected[i] = concertina::random_uniform(rng, 1.0);
    gradient[i] = concertina::random_uniform(rng, 1.0);
  }
  tensor.gradient = gradient;
  Sgd<double> optimizer(tape, {&tensor}, 0.5, 0.25);
  for (const double rate : {0.5, 0.25}) {
    optimizer.step(rate);
    for (std::size_t i = 0; i < count; ++i) {
      velocity[i] = 0.5 * velocity[i] + gradient[i] + 0.25 * expected[i];
      expected[i] -= rate * velocity[i];
    }
  }
  double difference = 0;  // a fused multiply-add rounds once where the loop rounds twice
  for (std::size_t i = 0; i < count; ++i) {
    difference = std::max(difference, std::abs(tensor.value[i] - expected[i]));
  }
  CHECK(difference < 1e-15);
}

TEST_CASE("a training that was interrupted goes on to the bit", "[cifar]") {
  const Folder folder;
  const Dataset data = generated_dataset(10, 150, 20, 3);
  for (const bool keep_momentum : {false, true}) {
    for (const bool in_double : {false, true}) {
      std::filesystem::remove_all(folder.path);
      ThreadPool pool(2), alone(1);
      TrainOptions options{
          .network = {.model = "cl", .kernel = 3, .rate = 2},
          .recipe = {.epochs = 4, .batch = 64, .keep_momentum = keep_momentum, .seed = 8},
          .out = folder.path / "whole",
          .command = "test",
          .in_double = in_double};
      const TrainResult whole = train(options, data, pool);

      // The same recipe by hand, stopped after two epochs, then taken up by train().
      const auto stop = [&]<class Scalar>(Scalar) {
        Training<Scalar> first(options.network, options.recipe, data, alone);
        for (int epoch = 0; epoch < 2; ++epoch) first.epoch([](Index, double, double) {});
        std::filesystem::create_directories(folder.path / "parts");
        auto checkpoint = first.checkpoint();
        checkpoint.metadata["best"] = R"({"epoch":1,"test accuracy":0,"last":0})";
        concertina::io::write_safetensors(folder.path / "parts/checkpoint.safetensors", checkpoint);
      };
      in_double ? stop(double()) : stop(float());
      options.out = folder.path / "parts";
      CHECK_THAT(message_of<concertina::Error>([&] { train(options, data, alone); }),
                 Contains("--resume"));
      options.resume = true;
      const TrainResult parts = train(options, data, alone);
      CHECK(parts.last_accuracy == whole.last_accuracy);
      const auto final_of = [&](const char* name) {
        auto file = concertina::io::read_safetensors(folder.path / name / "checkpoint.safetensors");
        CHECK(file.metadata.erase("best") == 1);  // of the epochs that train() itself ran
        return file;
      };
      CHECK(final_of("parts") == final_of("whole"));

      // Once more does nothing.
      const auto rows = CsvLog::read(folder.path / "parts/log.csv").size();
      CHECK(train(options, data, pool).last_accuracy == whole.last_accuracy);
      CHECK(CsvLog::read(folder.path / "parts/log.csv").size() == rows);
    }
  }
}

TEST_CASE("a checkpoint of another training is refused", "[cifar]") {
  ThreadPool pool(1);
  const Dataset data = generated_dataset(10, 32, 16, 3);
  const NetworkOptions network{.model = "compact", .kernel = 3};
  const Recipe recipe{.epochs = 3, .batch = 16};
  const auto checkpoint = Training<float>(network, recipe, data, pool).checkpoint();
  const auto refused = [&](const NetworkOptions& other, const Recipe& otherwise,
                           const concertina::io::Safetensors& file) {
    Training<float> training(other, otherwise, data, pool);
    return message_of<concertina::FormatError>([&] { training.restore(file); });
  };
  CHECK_THAT(refused({.model = "compact", .kernel = 5}, recipe, checkpoint),
             Contains("another network"));
  CHECK_THAT(refused(network, {.epochs = 3, .batch = 16, .seed = 2}, checkpoint),
             Contains("another training") && Contains("\"seed\":2"));
  auto broken = checkpoint;
  broken.metadata["epochs done"] = "many";
  CHECK_THAT(refused(network, recipe, broken), Contains("epochs done"));
  broken.metadata.erase("epochs done");
  CHECK_THAT(refused(network, recipe, broken), Contains("no checkpoint"));
}

TEST_CASE("recipes that make no sense are refused", "[cifar]") {
  ThreadPool pool(1);
  const Dataset data = generated_dataset(10, 32, 16, 3);
  const auto refused = [&](const Recipe& recipe) {
    return message_of<concertina::Error>(
        [&] { Training<float>({.kernel = 3}, recipe, data, pool); });
  };
  CHECK_THAT(refused({.epochs = 0}), Contains("epochs 0"));
  CHECK_THAT(refused({.batch = 0}), Contains("batch 0"));
  CHECK_THAT(refused({.learning_rate = -1}), Contains("learning rate"));
  CHECK_THAT(refused({.momentum = 1}), Contains("momentum"));
  CHECK_THAT(refused({.weight_decay = -1}), Contains("weight decay"));
  CHECK_THAT(message_of<concertina::Error>(
                 [&] { Training<float>({.kernel = 3, .classes = 100}, {}, data, pool); }),
             Contains("10 classes"));
}

TEST_CASE("a set is evaluated whole, whatever the batch", "[cifar]") {
  ThreadPool pool(2);
  const Dataset data = generated_dataset(10, 32, 75, 3);
  const auto score = [&](Index capacity) {
    Network<double> network({.model = "cl", .kernel = 3}, capacity, pool);
    network.initialize(1);
    return evaluate(network, data, data.test);
  };
  const Score once = score(75), by_seven = score(7);
  CHECK(once.images == 75);
  CHECK(once.correct == by_seven.correct);
  CHECK(once.loss == Approx(by_seven.loss).epsilon(1e-12));
}

}  // namespace
}  // namespace cifar
