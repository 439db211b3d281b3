// Trainings: the recipe, contracted beside layered over a hundred steps, checkpoints.
// SPDX-License-Identifier: Apache-2.0
#include "cifar/training.hpp"

#include "cifar/log.hpp"
#include "cifar/text_file.hpp"
#include "maximum.hpp"
#include "support.hpp"

#include <concertina/io/safetensors.hpp>

#include <catch2/catch.hpp>

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <functional>
#include <string>
#include <string_view>
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
  for (const auto& [model, kernel] :
       {std::pair("cl+fc", 3), std::pair("ck", 5), std::pair("acnet", 3), std::pair("repvgg", 3),
        std::pair("mobileone", 3), std::pair("dbb", 3), std::pair("dbb", 5),
        std::pair("cl+norms", 3)}) {
    INFO(model);
    const auto contracted = losses<double>(model, kernel, Compute::contracted);
    const auto layered = losses<double>(model, kernel, Compute::layered);
    const auto automatic = losses<double>(model, kernel, Compute::automatic);  // of either
    for (std::size_t step = 0; step < contracted.size(); ++step) {
      INFO("step " << step);
      CHECK(std::abs(contracted[step] - layered[step]) <= 1e-9 * layered[step]);
      CHECK(std::abs(automatic[step] - layered[step]) <= 1e-9 * layered[step]);
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
  const auto left = concertina::io::read_safetensors(folder.path / "checkpoint.safetensors");
  CHECK(left.metadata.at("epochs done") == "0");
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
  Sgd<double> optimizer(tape, {{&tensor, 0.25}}, 0.5);
  for (const double rate : {0.5, 0.25}) {
    optimizer.step(rate);
    for (std::size_t i = 0; i < count; ++i) {
      velocity[i] = 0.5 * velocity[i] + gradient[i] + 0.25 * expected[i];
      expected[i] -= rate * velocity[i];
    }
  }
  double difference = 0;  // a fused multiply-add rounds once where the loop rounds twice
  for (std::size_t i = 0; i < count; ++i) {
    difference = concertina::test::maximum(difference, std::abs(tensor.value[i] - expected[i]));
  }
  CHECK(difference < 1e-15);
}

TEST_CASE("a step is that of torch.optim.Adam", "[cifar]") {
  ThreadPool pool(2);
  Tape<double> tape(1, pool);
  Tensor<double>&first = tape.tensor("a", {50'000}), &second = tape.tensor("b", {3});
  std::vector<std::vector<double>> gradients, weights, means, squares;
  concertina::test::Rng rng(2);
  for (Tensor<double>* tensor : {&first, &second}) {
    for (double& number : tensor->value) number = concertina::random_uniform(rng, 1.0);
    weights.push_back(tensor->value);
    auto& gradient = gradients.emplace_back(tensor->value.size());
    for (double& number : gradient) number = concertina::random_uniform(rng, 1.0);
    tensor->gradient = gradient;
    means.emplace_back(gradient.size()), squares.emplace_back(gradient.size());
  }
  Adam<double> optimizer(tape, {{&first, 0.25}, {&second, 0}});
  double difference = 0;
  for (int step = 1; step <= 3; ++step) {
    optimizer.step(0.125);
    for (std::size_t p = 0; p < 2; ++p) {
      const auto& now = p == 0 ? first.value : second.value;
      for (std::size_t i = 0; i < now.size(); ++i) {
        // As torch writes it: bias-corrected moments, eps outside the root.
        const double gradient = gradients[p][i] + (p == 0 ? 0.25 : 0) * weights[p][i];
        means[p][i] = 0.9 * means[p][i] + 0.1 * gradient;
        squares[p][i] = 0.999 * squares[p][i] + 0.001 * gradient * gradient;
        const double mean = means[p][i] / (1 - std::pow(0.9, step));
        const double square = squares[p][i] / (1 - std::pow(0.999, step));
        weights[p][i] -= 0.125 * mean / (std::sqrt(square) + 1e-8);
        difference = concertina::test::maximum(difference, std::abs(now[i] - weights[p][i]));
      }
    }
  }
  CHECK(difference < 1e-14);
  CHECK(optimizer.steps() == 3);
  optimizer.reset();
  CHECK(optimizer.steps() == 0);
  for (const auto& state : optimizer.states()) {
    for (const double number : state.numbers[0]) REQUIRE(number == 0);
  }
}

TEST_CASE("a training that was interrupted goes on to the bit", "[cifar]") {
  const Folder folder;
  const Dataset data = generated_dataset(10, 150, 20, 3);
  struct Kind {
    bool keep_momentum, adam;
    Transfer transfer;
  };
  for (const auto& [keep_momentum, adam, transfer] :
       {Kind{false, false, Transfer::none}, Kind{true, false, Transfer::kd},
        Kind{false, true, Transfer::hint}, Kind{false, true, Transfer::pkt}}) {
    for (const bool in_double : {false, true}) {
      std::filesystem::remove_all(folder.path);
      ThreadPool pool(2), alone(1);
      TrainOptions options{.network = {.model = "cl", .kernel = 3, .rate = 2},
                           .recipe = {.epochs = 4,
                                      .batch = 64,
                                      .adam = adam,
                                      .keep_momentum = keep_momentum,
                                      .corrupted = 0.25,
                                      .transfer = {.method = transfer, .learned_projection = true},
                                      .seed = 8},
                           .out = folder.path / "whole",
                           .command = "test",
                           .in_double = in_double};
      concertina::io::Safetensors teacher;
      if (transfer != Transfer::none) {
        const auto make = [&]<class Scalar>(Scalar) {
          Network<Scalar> network({.model = "resnet18", .width = 2}, 1, alone);
          network.initialize(5);
          return network.model();
        };
        const auto model = in_double ? make(double()) : make(float());
        teacher = tensors_of(model);
        options.teacher = folder.path / "teacher.onnx";
        std::filesystem::create_directories(folder.path);
        concertina::onnx::write_model(options.teacher, model);
      }
      const TrainResult whole = train(options, data, pool);

      // The same, stopped after two epochs and taken up again.
      options.out = folder.path / "parts";
      struct Stop {};
      options.report = [](const EpochRecord& epoch) {
        if (epoch.epoch == 2) throw Stop();
      };
      CHECK_THROWS_AS(train(options, data, alone), Stop);
      options.report = [](const EpochRecord&) {};
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

TEST_CASE("a checkpoint of which an element is not finite is refused", "[cifar]") {
  ThreadPool pool(1);
  const Dataset data = generated_dataset(10, 32, 16, 3);
  const NetworkOptions network{.model = "compact", .kernel = 3};
  const Recipe recipe{.epochs = 3, .batch = 16, .keep_momentum = true};
  Training<float> training(network, recipe, data, pool);
  const auto checkpoint = training.checkpoint();
  for (const auto& [name, tensor] : checkpoint.tensors) {  // parameters, statistics, velocities
    for (const float element : {std::nanf(""), HUGE_VALF, -HUGE_VALF}) {
      INFO(name << " " << element);
      auto values = checkpoint.values<float>(name);
      values.back() = element;
      auto broken = checkpoint;
      broken.tensors.erase(name);
      broken.add(name, tensor.shape, values);
      CHECK_THAT(message_of<concertina::FormatError>([&] { training.restore(broken); }),
                 Contains("'" + name + "' has NaN or infinity"));
      CHECK(training.checkpoint() == checkpoint);  // nothing was taken
    }
  }
}

TEST_CASE("a training goes on only from a folder whose files agree", "[cifar]") {
  ThreadPool pool(1);
  const Dataset data = generated_dataset(10, 32, 16, 3);
  TrainOptions options{.network = {.model = "compact", .kernel = 3},
                       .recipe = {.epochs = 3, .batch = 16},
                       .out = {},
                       .resume = true,
                       .command = "test",
                       .report = {}};
  using Damage = std::function<void(const std::filesystem::path&)>;
  const auto refused = [&](Index epochs, const Damage& damage) {
    const Folder folder;
    options.out = folder.path;
    struct Stop {};
    options.report = [&](const EpochRecord& epoch) {
      if (epoch.epoch == epochs) throw Stop();
    };
    CHECK_THROWS_AS(train(options, data, pool), Stop);
    options.report = [](const EpochRecord&) {};
    damage(folder.path);
    return message_of<concertina::Error>([&] { train(options, data, pool); });
  };
  const auto in_checkpoint = [](const std::string& key, const std::string& value) -> Damage {
    return [=](const std::filesystem::path& folder) {
      auto file = concertina::io::read_safetensors(folder / "checkpoint.safetensors");
      file.metadata[key] = value;
      concertina::io::write_safetensors(folder / "checkpoint.safetensors", file);
    };
  };
  const auto without = [](const char* name) -> Damage {
    return [=](const std::filesystem::path& folder) { std::filesystem::remove(folder / name); };
  };
  const auto in_log = [](std::size_t lines, const std::string& more) -> Damage {
    return [=](const std::filesystem::path& folder) {
      std::string text = read_text(folder / "log.csv", 1 << 20, "a log"), kept;
      for (const std::string_view line : split(text, '\n')) {
        if (line.starts_with('#') || line.starts_with("epoch")) continue;
        if (std::ranges::count(kept, '\n') < static_cast<Index>(lines)) (kept += line) += '\n';
      }
      const std::size_t head = text.find("min_gradient_similarity\n") + 24;
      write_text(folder / "log.csv", text.substr(0, head) + kept + more);
    };
  };
  for (const Index epochs : {2, 3}) {  // interrupted, and at the end
    INFO(epochs);
    CHECK_THAT(refused(epochs, without("checkpoint.safetensors")),
               Contains("log.csv is of a training whose checkpoint.safetensors is missing"));
    CHECK_THAT(refused(epochs, without("log.csv")), Contains("log.csv"));
    CHECK_THAT(refused(epochs, without("best.onnx")), Contains("best.onnx"));
    CHECK_THAT(refused(epochs, in_log(1, "")), Contains("log.csv: 1 epoch with a best"));
    CHECK_THAT(refused(epochs, in_log(1, "2,0.01,1,0.5,nan,0.5,0.5,1,1,\n")),
               Contains("test_loss"));
    CHECK_THAT(refused(epochs, in_checkpoint("similarities", "4")), Contains("--similarities 4"));
    for (const char* best : {R"({"epoch":1,"test accuracy":5.0,"last":0.1})",
                             R"({"epoch":1e300,"test accuracy":0.1,"last":0.1})",
                             R"({"epoch":0,"test accuracy":0.1,"last":0.1})",
                             R"({"epoch":1,"test accuracy":-0.1,"last":0.1})", "{}"}) {
      CHECK_THAT(refused(epochs, in_checkpoint("best", best)), Contains("metadata 'best'"));
    }
    for (const char* done : {"0x2", " +2", "2abc", "-1", "4", ""}) {
      CHECK_THAT(refused(epochs, in_checkpoint("epochs done", done)), Contains("epochs done"));
    }
    CHECK_THAT(refused(epochs,
                       [](const std::filesystem::path& folder) {
                         const auto path = folder / "checkpoint.safetensors";
                         auto file = concertina::io::read_safetensors(path);
                         file.add("other", {1}, std::vector<float>{1});
                         concertina::io::write_safetensors(path, file);
                       }),
               Contains("'other' is none of this training's"));
  }
}

TEST_CASE("one training at a time has a folder", "[cifar]") {
  const Folder folder;
  ThreadPool pool(1);
  const Dataset data = generated_dataset(10, 32, 16, 3);
  TrainOptions options{.network = {.model = "compact", .kernel = 3},
                       .recipe = {.epochs = 2, .batch = 16},
                       .out = folder.path,
                       .command = "test"};
  int refused = 0;
  options.report = [&](const EpochRecord&) {  // while it trains
    auto second = options;
    second.report = {};
    for (const bool resume : {false, true}) {
      second.resume = resume;
      CHECK_THAT(message_of<concertina::IoError>([&] { train(second, data, pool); }),
                 Contains(folder.path.string()) && Contains("another process trains in it"));
      ++refused;
    }
  };
  train(options, data, pool);
  CHECK(refused == 4);
  options.report = {};
  options.resume = true;
  train(options, data, pool);  // nobody holds it any more
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
  CHECK_THAT(refused({.corrupted = 1.5}), Contains("corrupted 1.5"));
  CHECK_THAT(refused({.transfer = {.temperature = 0}}), Contains("temperature"));
  CHECK_THAT(refused({.transfer = {.weight = 2}}), Contains("transfer weight"));
  CHECK_THAT(refused({.transfer = {.method = Transfer::kd}}), Contains("needs a teacher"));
  CHECK_THAT(message_of<concertina::Error>([] { transfer_names.of("osmosis"); }), Contains("pkt"));
  CHECK_THAT(message_of<concertina::Error>([&] {
               Training<float>({.model = "fc", .kernel = 3, .compute = Compute::layered},
                               {.decay_products = true}, data, pool);
             }),
             Contains("contracted"));
  CHECK_THAT(message_of<concertina::Error>(
                 [&] { Training<float>({.kernel = 3, .classes = 100}, {}, data, pool); }),
             Contains("10 classes"));
}

TEST_CASE("teachers that do not fit are refused", "[cifar]") {
  ThreadPool pool(1);
  const Dataset data = generated_dataset(10, 32, 16, 3);
  const auto teacher = [&](Index classes, Normalization normalization) {
    Network<float> network({.model = "resnet18", .width = 1, .classes = classes}, 1, pool);
    network.set_normalization(normalization);
    auto file = network.save();
    file.origin = "teacher.safetensors";
    return file;
  };
  const auto refused = [&](const concertina::io::Safetensors& file, Transfer method) {
    return message_of<concertina::Error>([&] {
      Training<float>({.model = "compact", .kernel = 3}, {.transfer = {.method = method}}, data,
                      pool, &file);
    });
  };
  CHECK_THAT(refused(teacher(100, {data.mean, data.deviation}), Transfer::kd),
             Contains("teacher.safetensors") && Contains("100 classes"));
  CHECK_THAT(refused(teacher(10, {data.mean, {1, 1, 1}}), Transfer::hint), Contains("normalised"));
  CHECK_THAT(refused(teacher(10, {data.mean, data.deviation}), Transfer::none),
             Contains("without a transfer"));
}

TEST_CASE("a teacher teaches", "[cifar]") {
  // Labels that say nothing, and a teacher that knows: what the student gets right is transferred.
  ThreadPool pool(2);
  const Dataset data = generated_dataset(3, 600, 150, 11);
  const NetworkOptions network{.model = "compact", .kernel = 3, .classes = 3};
  Training<float> knowing(network, {.epochs = 6, .batch = 32, .learning_rate = 0.05}, data, pool);
  for (int epoch = 0; epoch < 6; ++epoch) knowing.epoch();
  const double known = evaluate(knowing.network(), data, data.test).accuracy();
  REQUIRE(known > 0.8);
  const auto teacher = knowing.network().save();
  const auto learned = [&](const Recipe& recipe, const concertina::io::Safetensors& from) {
    Training<float> student(network, recipe, data, pool, &from);
    for (int epoch = 0; epoch < 6; ++epoch) student.epoch();
    return evaluate(student.network(), data, data.test).accuracy();
  };
  CHECK(learned({.epochs = 6,
                 .batch = 32,
                 .learning_rate = 0.05,
                 .corrupted = 1,
                 .transfer = {.method = Transfer::kd, .weight = 1},
                 .seed = 2},
                teacher) > 0.6);
  // Features learn from the teacher alone, the classifier from the labels on them: from a teacher
  // whose features are all alike there is less to learn.
  auto silent = teacher;
  for (auto& [name, tensor] : silent.tensors) {
    if (name == "fc1.weight") std::ranges::fill(tensor.bytes, std::byte{0});
  }
  for (const Transfer method : {Transfer::hint, Transfer::pkt}) {
    INFO(transfer_names.of(method));
    const Recipe recipe{.epochs = 6,
                        .batch = 32,
                        .adam = true,
                        .learning_rate = 0.003,
                        .transfer = {.method = method},
                        .seed = 2};
    CHECK(learned(recipe, teacher) > 0.7);
    CHECK(learned(recipe, silent) < learned(recipe, teacher) - 0.1);
  }
}

TEST_CASE("gradients of batches are those of the compact network or of the trained one",
          "[cifar]") {
  ThreadPool pool(2);
  const Dataset data = generated_dataset(10, 80, 16, 3);
  const Recipe recipe{.epochs = 4, .batch = 16, .seed = 5};
  Training<double> expanded({.model = "cl", .kernel = 3, .rate = 2}, recipe, data, pool);
  expanded.epoch();
  const auto before = expanded.checkpoint();
  Training<double> restored({.model = "cl", .kernel = 3, .rate = 2}, recipe, data, pool);
  CHECK_THAT(message_of<concertina::Error>([&] { restored.gradients(2); }),
             Contains("first epoch"));
  restored.restore(before);
  const auto computed = expanded.gradients(4);
  CHECK(computed.size() == 4);
  CHECK(restored.gradients(4) == computed);
  Training<double> decayed({.model = "cl", .kernel = 3, .rate = 2},
                           {.epochs = 4, .batch = 16, .weight_decay = 1, .decay_products = true},
                           data, pool);
  decayed.epoch();
  const auto other = decayed.gradients(2, true);
  decayed.network().decay_contractions(0);
  CHECK(decayed.gradients(2, true) == other);  // of the loss alone
  CHECK(expanded.checkpoint() == before);
  CHECK(expanded.gradients(100).size() == 5);  // as many as there are
  CHECK(static_cast<Index>(expanded.gradients(1, true).front().size()) ==
        expanded.network().parameter_count());

  // The compact network with the same numbers, on the same batches.
  Training<double> compact({.model = "compact", .kernel = 3}, recipe, data, pool);
  compact.epoch();  // to the same epoch
  compact.network().load(tensors_of(expanded.network().contract()));
  const auto own = compact.gradients(4);
  for (std::size_t b = 0; b < own.size(); ++b) {
    REQUIRE(own[b].size() == computed[b].size());
    // The same parameters in another order: those of a contraction follow its layers.
    auto a = own[b], c = computed[b];
    std::ranges::sort(a), std::ranges::sort(c);
    double furthest = 0, largest = 0;
    for (std::size_t i = 0; i < a.size(); ++i) {
      furthest = std::max(furthest, std::abs(a[i] - c[i]));
      largest = std::max(largest, std::abs(a[i]));
    }
    CHECK(furthest <= 1e-9 * largest);
  }
}

TEST_CASE("a start from other parameters keeps the images' normalisation, and is remembered",
          "[cifar]") {
  ThreadPool pool(1);
  Dataset data = generated_dataset(10, 32, 16, 3);
  const NetworkOptions network{.model = "cl", .kernel = 3, .rate = 2};
  const Recipe recipe{.epochs = 3, .batch = 16};
  Network<float> other(network, 1, pool);
  other.initialize(77);
  other.set_normalization({{1, 2, 3}, {4, 5, 6}});
  const auto start = other.save();
  Training<float> training(network, recipe, data, pool);
  training.start_from(start);
  const auto checkpoint = training.checkpoint();
  CHECK(checkpoint.tensors.at("conv1.0.weight") == start.tensors.at("conv1.0.weight"));
  CHECK(normalization_of(checkpoint) == Normalization{data.mean, data.deviation});
  Training<float> without(network, recipe, data, pool);
  CHECK_THAT(message_of<concertina::FormatError>([&] { without.restore(checkpoint); }),
             Contains("another training"));
}

TEST_CASE("options of a training that make no sense together are refused", "[cifar]") {
  const auto refused = [](const TrainOptions& options) {
    return message_of<concertina::Error>([&] { options.validate(); });
  };
  const auto options = [](const std::string& model, Compute compute) {
    return TrainOptions{.network = {.model = model, .compute = compute},
                        .recipe = {},
                        .out = {},
                        .similarities = 2,
                        .command = {}};
  };
  CHECK_NOTHROW(options("cl", Compute::contracted).validate());
  CHECK_THAT(refused(options("cl", Compute::layered)), Contains("--trained-gradients"));
  CHECK_THAT(refused(options("acnet", Compute::contracted)), Contains("acnet"));
  auto own = options("cl", Compute::layered);
  own.trained_gradients = true;
  CHECK_NOTHROW(own.validate());
  own.recipe.decay_products = true;
  CHECK_THAT(refused(own), Contains("contracted"));
}

TEST_CASE("similarities are logged, and kept at the end", "[cifar]") {
  const Folder folder;
  ThreadPool pool(2);
  const Dataset data = generated_dataset(10, 96, 16, 3);
  TrainOptions options{.network = {.model = "cl", .kernel = 3, .rate = 2},
                       .recipe = {.epochs = 2, .batch = 16},
                       .out = folder.path,
                       .similarities = 4,
                       .command = "test"};
  std::vector<EpochRecord> reported;
  options.report = [&](const EpochRecord& epoch) { reported.push_back(epoch); };
  train(options, data, pool);
  CHECK(CsvLog::read(folder.path / "log.csv") == reported);
  const std::string text = read_text(folder.path / "similarities.csv", 1 << 20, "similarities");
  std::vector<double> similarities;
  for (const std::string_view line : split(text, '\n')) {
    if (const auto number = number_in<double>(line)) similarities.push_back(*number);
  }
  CHECK(similarities.size() == 6);
  REQUIRE(reported.size() == 2);
  CHECK(reported.back().min_similarity == *std::ranges::min_element(similarities));
  options.out = folder.path / "more";
  options.similarities = 7;
  CHECK_THAT(message_of<concertina::Error>([&] { train(options, data, pool); }),
             Contains("similarities of 7 batches; an epoch has 6"));
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
