// SPDX-License-Identifier: Apache-2.0
#include "training.hpp"

#include "log.hpp"

#include <concertina/io/safetensors.hpp>

#include <nlohmann/json.hpp>

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <numeric>
#include <span>
#include <sstream>
#include <string>
#include <vector>

namespace cifar {
namespace {

using concertina::Error, concertina::FormatError;
using nlohmann::json;

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

/// Runs the network forward on these images of a set.
template <class Scalar>
Score run(Network<Scalar>& network, const Dataset& data, const Images& images,
          std::span<const std::uint32_t> which, const Augmentation* augmentation, bool training) {
  std::array<std::uint8_t, 4096> labels;
  for (std::size_t i = 0; i < which.size(); ++i) labels[i] = images.labels[which[i]];
  network.loss().set_labels({labels.data(), which.size()});
  network.set_source([&](Index chunk, Scalar* to) {
    const auto first = static_cast<std::size_t>(chunk * lanes);
    const auto count = std::min<std::size_t>(lanes, which.size() - first);
    load_images<Scalar, lanes>(data, images, which.subspan(first, count), augmentation, to);
  });
  network.tape().forward(std::ssize(which), training);
  network.set_source({});
  return {network.loss().loss(), network.loss().correct(), std::ssize(which)};
}

}  // namespace

void Recipe::validate() const {
  const auto require = [](bool holds, const char* option, const auto& value, const char* choices) {
    if (holds) return;
    std::ostringstream text;
    text << option << ' ' << value << "; " << choices;
    throw Error(text.str());
  };
  require(epochs >= 1 && epochs <= 1'000'000, "epochs", epochs, "1 to 1,000,000 are possible");
  require(batch >= 1 && batch <= 4096, "batch", batch, "1 to 4096 are possible");
  require(learning_rate > 0 && std::isfinite(learning_rate), "learning rate", learning_rate,
          "it is positive");
  require(momentum >= 0 && momentum < 1, "momentum", momentum, "0 to less than 1 are possible");
  require(weight_decay >= 0 && std::isfinite(weight_decay), "weight decay", weight_decay,
          "it is not negative");
}

double Recipe::rate_in(Index epoch) const {
  const Index third = std::max<Index>(1, (epochs + 2) / 3);
  return learning_rate *
         std::pow(10.0, -static_cast<double>(std::min<Index>((epoch - 1) / third, 2)));
}

template <class Scalar>
Score evaluate(Network<Scalar>& network, const Dataset& data, const Images& images) {
  std::vector<std::uint32_t> all(static_cast<std::size_t>(images.count()));
  std::iota(all.begin(), all.end(), 0U);
  Score sum;
  const auto batch = static_cast<std::size_t>(std::min<Index>(network.tape().capacity(), 4096));
  for (std::size_t first = 0; first < all.size(); first += batch) {
    const auto which = std::span(all).subspan(first, std::min(batch, all.size() - first));
    const Score score = run(network, data, images, which, nullptr, false);
    sum.loss += score.loss * static_cast<double>(score.images);
    sum.correct += score.correct;
    sum.images += score.images;
  }
  sum.loss /= static_cast<double>(sum.images);
  return sum;
}

template <class Scalar>
Training<Scalar>::Training(const NetworkOptions& network, const Recipe& recipe, const Dataset& data,
                           ThreadPool& pool)
    : network_options_(network),
      recipe_((recipe.validate(), recipe)),
      data_(data),
      network_(network, recipe.batch, pool),
      optimizer_(network_.tape(), network_.parameters(), recipe.momentum, recipe.weight_decay) {
  if (data.classes != network.classes) {
    throw Error("the data set " + data.name + " has " + std::to_string(data.classes) +
                " classes, the network " + std::to_string(network.classes));
  }
  network_.initialize(recipe.seed, recipe.uniform_norms);
  network_.set_normalization({data.mean, data.deviation});
}

template <class Scalar>
void Training<Scalar>::begin_epoch() {
  ++epoch_;
  order_ = epoch_order(data_.train.count(), recipe_.seed, epoch_);
  next_ = 0;
  if (!recipe_.keep_momentum) optimizer_.reset();
}

template <class Scalar>
Score Training<Scalar>::step(bool reversed) {
  const Index count = std::min(recipe_.batch, std::ssize(order_) - next_);
  const Augmentation augmentation{recipe_.seed, epoch_};
  const auto which =
      std::span(order_).subspan(static_cast<std::size_t>(next_), static_cast<std::size_t>(count));
  if (reversed) std::ranges::reverse(which);
  const Score score = run(network_, data_, data_.train, which, &augmentation, true);
  if (!std::isfinite(score.loss)) {
    throw concertina::NumericalError("epoch " + std::to_string(epoch_) + ", image " +
                                     std::to_string(next_) +
                                     ": the loss is not finite; try a "
                                     "lower learning rate, in a new folder");
  }
  network_.tape().backward();
  optimizer_.step(recipe_.rate_in(epoch_));
  next_ += count;
  return score;
}

template <class Scalar>
std::string Training<Scalar>::settings() const {
  return json{{"epochs", recipe_.epochs},
              {"batch", recipe_.batch},
              {"learning rate", recipe_.learning_rate},
              {"momentum", recipe_.momentum},
              {"keep momentum", recipe_.keep_momentum},
              {"weight decay", recipe_.weight_decay},
              {"uniform norms", recipe_.uniform_norms},
              {"seed", recipe_.seed},
              {"double", sizeof(Scalar) == sizeof(double)},
              {"data set", data_.name},
              {"training images", data_.train.count()},
              {"test images", data_.test.count()}}
      .dump();
}

template <class Scalar>
concertina::io::Safetensors Training<Scalar>::checkpoint() const {
  concertina::io::Safetensors file = network_.save();
  file.metadata["training"] = settings();
  file.metadata["epochs done"] = std::to_string(epoch_);
  if (recipe_.keep_momentum) {
    const auto& velocities = const_cast<Training*>(this)->optimizer_.velocities();
    for (std::size_t p = 0; p < velocities.size(); ++p) {
      const Tensor<Scalar>& parameter = *network_.parameters()[p];
      file.add("velocity." + parameter.name, parameter.shape, velocities[p]);
    }
  }
  return file;
}

template <class Scalar>
void Training<Scalar>::restore(const concertina::io::Safetensors& file) {
  const auto metadata = [&](const std::string& key) {
    const auto found = file.metadata.find(key);
    if (found != file.metadata.end()) return found->second;
    throw FormatError(file.origin + ": no metadata '" + key + "', so it is no checkpoint");
  };
  if (options_of(file) != network_options_) {
    throw FormatError(file.origin + ": a checkpoint of another network, " + metadata("network"));
  }
  if (metadata("training") != settings()) {
    throw FormatError(file.origin + ": a checkpoint of another training, " + metadata("training") +
                      ", while this one is " + settings());
  }
  Index done = 0;
  try {
    done = std::stol(metadata("epochs done"));
  } catch (const std::logic_error&) {
    done = -1;
  }
  if (done < 0 || done > recipe_.epochs) {
    throw FormatError(file.origin + ": metadata 'epochs done' is no number of epochs");
  }
  network_.load(file);
  if (recipe_.keep_momentum) {
    for (std::size_t p = 0; p < optimizer_.velocities().size(); ++p) {
      const auto velocity = file.view<Scalar>("velocity." + network_.parameters()[p]->name);
      auto& to = optimizer_.velocities()[p];
      if (velocity.size() != to.size()) {
        throw FormatError(file.origin + ": a velocity of another length than its parameter");
      }
      std::ranges::copy(velocity, to.begin());
    }
  }
  epoch_ = done;
}

namespace {

template <class Scalar>
TrainResult train_in(const TrainOptions& options, const Dataset& data, ThreadPool& pool) {
  const auto checkpoint_path = options.out / "checkpoint.safetensors";
  const bool exists = std::filesystem::exists(checkpoint_path);
  if (exists && !options.resume) {
    throw Error(options.out.string() +
                " holds a training already: go on with --resume, or name another folder");
  }
  Training<Scalar> training(options.network, options.recipe, data, pool);
  TrainResult result{.parameters = training.network().parameter_count()};
  if (exists) {
    const auto checkpoint = concertina::io::read_safetensors(checkpoint_path);
    training.restore(checkpoint);
    const auto found = checkpoint.metadata.find("best");
    try {
      const json best = json::parse(found == checkpoint.metadata.end() ? "" : found->second);
      result.best_accuracy = best.at("test accuracy");
      result.best_epoch = best.at("epoch");
      result.last_accuracy = best.at("last");
    } catch (const json::exception&) {
      throw FormatError(checkpoint_path.string() + ": metadata 'best' has no epoch and accuracy");
    }
  } else if (!options.init.empty()) {
    training.network().load(concertina::io::read_safetensors(options.init));
  }
  std::error_code failure;
  std::filesystem::create_directories(options.out, failure);
  if (failure) {
    throw concertina::IoError(options.out.string() + ": cannot be made a folder, " +
                              failure.message());
  }
  const Index done = training.epochs_done(), epochs = options.recipe.epochs;
  const std::vector<std::string> comments = {
      options.command, "model " + options.network.model + ", " +
                           std::to_string(training.network().parameter_count()) +
                           " parameters, data set " + data.name};
  const auto log_path = options.out / "log.csv";
  CsvLog log = exists ? CsvLog::resume(log_path, comments, done) : CsvLog(log_path, comments);

  ProgressBar progress(epochs, data.train.count(), done);
  while (training.epochs_done() < epochs) {
    const auto start = std::chrono::steady_clock::now();
    progress.begin_epoch(training.epochs_done() + 1);
    const Score trained = training.epoch([&](Index images, double loss, double accuracy) {
      progress.update(images, loss, accuracy);
    });
    const double seconds = seconds_since(start);
    const Score tested = evaluate(training.network(), data, data.test);
    if (!std::isfinite(tested.loss)) {
      throw concertina::NumericalError("epoch " + std::to_string(training.epochs_done()) +
                                       ": the test loss is not finite; try a lower learning rate, "
                                       "in a new folder");
    }
    const EpochRecord record{.epoch = training.epochs_done(),
                             .learning_rate = options.recipe.rate_in(training.epochs_done()),
                             .train_loss = trained.loss,
                             .train_accuracy = trained.accuracy(),
                             .test_loss = tested.loss,
                             .test_accuracy = tested.accuracy(),
                             .images_per_second = static_cast<double>(trained.images) / seconds,
                             .seconds = seconds_since(start)};
    const bool best = record.epoch == 1 || tested.accuracy() > result.best_accuracy;
    if (best) result.best_accuracy = tested.accuracy(), result.best_epoch = record.epoch;
    result.last_accuracy = tested.accuracy();
    concertina::io::Safetensors checkpoint = training.checkpoint();
    checkpoint.metadata["best"] = json{
        {"epoch", result.best_epoch},
        {"test accuracy", result.best_accuracy},
        {"last",
         result.last_accuracy}}.dump();
    if (best) concertina::io::write_safetensors(options.out / "best.safetensors", checkpoint);
    log.add(record);
    concertina::io::write_safetensors(checkpoint_path, checkpoint);
    progress.end_epoch(record);
  }

  return result;
}

/// The losses of the first steps.
template <class Scalar>
std::vector<double> losses(const NetworkOptions& network, const Recipe& recipe, const Dataset& data,
                           Index steps, bool reversed, ThreadPool& pool) {
  Training<Scalar> training(network, recipe, data, pool);
  std::vector<double> result;
  while (std::ssize(result) < steps) {
    if (!training.more_batches()) training.begin_epoch();
    result.push_back(training.step(reversed).loss);
  }
  return result;
}

double largest_difference(const std::vector<double>& a, const std::vector<double>& b) {
  double most = 0;
  for (std::size_t i = 0; i < a.size(); ++i) most = std::max(most, std::abs(a[i] - b[i]) / b[i]);
  return most;
}

}  // namespace

TrainResult train(const TrainOptions& options, const Dataset& data, ThreadPool& pool) {
  return options.in_double ? train_in<double>(options, data, pool)
                           : train_in<float>(options, data, pool);
}

Drift drift(NetworkOptions network, const Recipe& recipe, const Dataset& data, Index steps,
            ThreadPool& pool) {
  const auto run = [&]<class Scalar>(Scalar, Compute compute, bool reversed) {
    network.compute = compute;
    return losses<Scalar>(network, recipe, data, steps, reversed, pool);
  };
  const auto layered = run(float(), Compute::layered, false);
  return {.contracted_in_double = largest_difference(run(double(), Compute::contracted, false),
                                                     run(double(), Compute::layered, false)),
          .contracted = largest_difference(run(float(), Compute::contracted, false), layered),
          .reversed = largest_difference(run(float(), Compute::layered, true), layered)};
}

template class Training<float>;
template class Training<double>;
template Score evaluate(Network<float>&, const Dataset&, const Images&);
template Score evaluate(Network<double>&, const Dataset&, const Images&);

}  // namespace cifar
