// SPDX-License-Identifier: Apache-2.0
#include "training.hpp"

#include "folder_lock.hpp"
#include "on_tape.hpp"
#include "similarity.hpp"
#include "text.hpp"
#include "text_file.hpp"

#include <concertina/io/safetensors.hpp>
#include <concertina/random.hpp>

#include <nlohmann/json.hpp>

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <iostream>
#include <limits>
#include <numeric>
#include <random>
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
          std::span<const std::uint8_t> labels, std::span<const std::uint32_t> which,
          const Augmentation* augmentation, bool training) {
  std::array<std::uint8_t, 4096> batch_labels;
  for (std::size_t i = 0; i < which.size(); ++i) batch_labels[i] = labels[which[i]];
  network.loss().set_labels({batch_labels.data(), which.size()});
  network.set_source([&](Index chunk, Scalar* to) {
    const auto first = static_cast<std::size_t>(chunk * lanes);
    const auto count = std::min<std::size_t>(lanes, which.size() - first);
    load_images<Scalar, lanes>(data, images, which.subspan(first, count), augmentation, to);
  });
  network.tape().forward(std::ssize(which), training);
  network.set_source({});
  return {network.loss().loss(), network.loss().correct(), std::ssize(which)};
}

Score score_of(const cuda::Steps& steps, Index batch, Index images) {
  TotalScore total;
  for (std::size_t step = 0; step < steps.losses.size(); ++step, images -= batch) {
    total.add({steps.losses[step], steps.corrects[step], std::min(batch, images)});
  }
  return total.score();
}

/// A number that says whether two files hold the same tensors.
/// Source  the Fowler-Noll-Vo hash, 1a
std::uint64_t fingerprint(const concertina::io::Safetensors& file) {
  std::uint64_t hash = 0xcbf29ce484222325U;
  const auto add = [&](auto byte) {
    hash = (hash ^ static_cast<std::uint8_t>(byte)) * 0x100000001b3U;
  };
  for (const auto& [name, tensor] : file.tensors) {
    std::ranges::for_each(name, add);
    std::ranges::for_each(tensor.bytes, add);
  }
  return hash;
}

}  // namespace

const tool::Names<Transfer> transfer_names{"transfer",
                                           {{Transfer::none, "none"},
                                            {Transfer::kd, "kd"},
                                            {Transfer::hint, "hint"},
                                            {Transfer::pkt, "pkt"}}};

const tool::Names<Device> device_names{"device", {{Device::cpu, "cpu"}, {Device::cuda, "cuda"}}};

void require_teacher(Transfer transfer, bool teacher) {
  if (teacher == (transfer != Transfer::none)) return;
  throw Error(teacher ? "a teacher without a transfer; there are kd, hint, pkt"
                      : "the transfer " + transfer_names.of(transfer) + " needs a teacher");
}

void Recipe::validate() const {
  require_option(epochs >= 1 && epochs <= 1'000'000, "epochs", epochs,
                 "1 to 1,000,000 are possible");
  require_option(batch >= 1 && batch <= 4096, "batch", batch, "1 to 4096 are possible");
  require_option(learning_rate > 0 && std::isfinite(learning_rate), "learning rate", learning_rate,
                 "it is positive");
  require_option(momentum >= 0 && momentum < 1, "momentum", momentum,
                 "0 to less than 1 are possible");
  require_option(weight_decay >= 0 && std::isfinite(weight_decay), "weight decay", weight_decay,
                 "it is not negative");
  require_option(corrupted >= 0 && corrupted <= 1, "corrupted", corrupted, "0 to 1 are possible");
  require_option(transfer.temperature > 0 && std::isfinite(transfer.temperature), "temperature",
                 transfer.temperature, "it is positive");
  require_option(transfer.weight >= 0 && transfer.weight <= 1, "transfer weight", transfer.weight,
                 "0 to 1 are possible");
}

void require_accelerable(const NetworkOptions& network) {
  const auto require = [](bool holds, const std::string& option, const char* instead) {
    if (holds) return;
    throw UnsupportedError(option + " is not computed on a device, only " + instead +
                           "; choose that, or leave it to --device cpu");
  };
  require(network.model != "dbb", "the model dbb", "blocks without average pools");
  require(!network.is_block() || network.compute != Compute::contracted,
          "--compute contracted of " + network.model, "layer by layer (--compute layered)");
}

void require_built_for([[maybe_unused]] Device device) {
#ifndef CONCERTINA_CUDA
  if (device == Device::cpu) return;
  throw UnsupportedError(
      "--device cuda: this program was built without CUDA; build it with the preset cuda");
#endif
}

double Recipe::rate_in(Index epoch) const {
  if (adam) return learning_rate;
  const Index third = std::max<Index>(1, (epochs + 2) / 3);
  return learning_rate *
         std::pow(10.0, -static_cast<double>(std::min<Index>((epoch - 1) / third, 2)));
}

template <class Scalar>
Score evaluate(Network<Scalar>& network, const Dataset& data, const Images& images) {
  std::vector<std::uint32_t> all(static_cast<std::size_t>(images.count()));
  std::iota(all.begin(), all.end(), 0U);
  TotalScore total;
  const auto batch = static_cast<std::size_t>(std::min<Index>(network.tape().capacity(), 4096));
  for (std::size_t first = 0; first < all.size(); first += batch) {
    const auto which = std::span(all).subspan(first, std::min(batch, all.size() - first));
    total.add(run(network, data, images, images.labels, which, nullptr, false));
  }
  return total.score();
}

template <class Scalar>
Training<Scalar>::Training(const NetworkOptions& network, const Recipe& recipe, const Dataset& data,
                           ThreadPool& pool, const concertina::io::Safetensors* teacher)
    : recipe_((recipe.validate(), recipe)),
      data_(data),
      labels_(corrupted_labels(data.train.labels, data.classes, recipe.corrupted, recipe.seed)),
      network_(
          network, recipe.batch, pool,
          recipe.transfer.method == Transfer::hint || recipe.transfer.method == Transfer::pkt) {
  if (data.classes != network.classes) {
    throw Error("the data set " + data.name + " has " + std::to_string(data.classes) +
                " classes, the network " + std::to_string(network.classes));
  }
  require_teacher(recipe.transfer.method, teacher != nullptr);
  network_.initialize(recipe.seed, recipe.uniform_norms);
  network_.set_normalization({data.mean, data.deviation});
  if (teacher) learn_from(*teacher, pool);
  optimizer_ = make_optimizer();
}

template <class Scalar>
void Training<Scalar>::learn_from(const concertina::io::Safetensors& file, ThreadPool& pool) {
  const NetworkOptions options = options_of(file);
  if (options.classes != data_.classes) {
    throw FormatError(file.origin + ": a teacher of " + std::to_string(options.classes) +
                      " classes; the data set " + data_.name + " has " +
                      std::to_string(data_.classes));
  }
  const auto normalization = normalization_of(file);
  if (normalization && *normalization != Normalization{data_.mean, data_.deviation}) {
    throw FormatError(file.origin +
                      ": the teacher reads images normalised otherwise than those of " +
                      data_.name);
  }
  teacher_ = std::make_unique<Network<Scalar>>(file, recipe_.batch, pool);
  teacher_name_ = options.model + ", " + std::to_string(fingerprint(file));
  const TransferOptions& transfer = recipe_.transfer;
  if (transfer.method == Transfer::kd) network_.loss().set_weight(1 - transfer.weight);
  if (transfer.method == Transfer::hint) {
    const Index in = teacher_->features().numbers();
    projection_ = &network_.tape().tensor("hint.weight", {network_.features().numbers(), in});
    std::mt19937_64 generator(~recipe_.seed);  // not the weights' own numbers
    for (Scalar& number : projection_->value) {
      number = static_cast<Scalar>(
          concertina::random_uniform(generator, 1 / std::sqrt(static_cast<double>(in))));
    }
  }
  OnTape<Scalar> on{network_.tape()};
  record_transfer(on, {&network_.features(), &network_.logits()},
                  {&teacher_->features(), &teacher_->logits()});
}

template <class Scalar>
template <class On>
void Training<Scalar>::record_transfer(On& on, const Heads<On>& own, const Heads<On>& given) const {
  const auto& [features, logits] = given;
  const TransferOptions& transfer = recipe_.transfer;
  switch (transfer.method) {
    case Transfer::none: return;
    case Transfer::kd: return on.distill(own.second, logits, transfer.temperature, transfer.weight);
    case Transfer::pkt: return on.match_similarities(own.first, features);
    case Transfer::hint:
      on.begin(transfer.learned_projection ? cuda::Part::undecayed : cuda::Part::frozen);
      const concertina::ConvShape<0> shape{.out = projection_->shape[0],
                                           .in = projection_->shape[1]};
      const auto hint = on.layer(on.detached(features), shape, {projection_, nullptr}, {});
      on.begin(cuda::Part::trained);
      on.hint(own.first, hint);
  }
}

template <class Scalar>
void Training<Scalar>::record(cuda::Recorder<Scalar>& on) const {
  using cuda::Part;
  const auto images = on.images();
  Heads<cuda::Recorder<Scalar>> given{};
  on.begin(Part::frozen);
  if (teacher_) given = teacher_->record(on, images);
  on.begin(Part::trained);
  const auto own = network_.record(on, images);
  const bool kd = recipe_.transfer.method == Transfer::kd;
  on.loss(own.second, kd ? 1 - recipe_.transfer.weight : 1);
  record_transfer(on, own, given);
  on.end();
}

template <class Scalar>
void Training<Scalar>::start_from(const concertina::io::Safetensors& file) {
  network_.load(file);
  network_.set_normalization({data_.mean, data_.deviation});  // the file's was of its own images
  init_name_ = std::to_string(fingerprint(file));
}

template <class Scalar>
std::unique_ptr<Optimizer<Scalar>> Training<Scalar>::make_optimizer() {
  std::vector<const Tensor<Scalar>*> without;  // parameters whose product is decayed
  if (recipe_.decay_products) without = network_.decay_contractions(recipe_.weight_decay);
  std::vector<Trained<Scalar>> parameters;
  for (Tensor<Scalar>* tensor : network_.parameters()) {
    const bool own = std::ranges::find(without, tensor) == without.end();
    parameters.push_back({tensor, own ? recipe_.weight_decay : 0});
  }
  if (recipe_.transfer.learned_projection && projection_) parameters.push_back({projection_});
  if (recipe_.adam) {
    return std::make_unique<Adam<Scalar>>(network_.tape(), std::move(parameters));
  }
  return std::make_unique<Sgd<Scalar>>(network_.tape(), std::move(parameters), recipe_.momentum);
}

template <class Scalar>
void Training<Scalar>::begin_epoch() {
  ++epoch_;
  order_ = epoch_order(data_.train.count(), recipe_.seed, epoch_);
  next_ = 0;
  if (!recipe_.keep_momentum && !recipe_.adam) optimizer_->reset();
}

template <class Scalar>
Score Training<Scalar>::forward(std::span<const std::uint32_t> which) {
  const Augmentation drawn{recipe_.seed, epoch_};
  const Augmentation* const augmentation = data_.augmented ? &drawn : nullptr;
  if (teacher_) run(*teacher_, data_, data_.train, labels_, which, augmentation, false);
  return run(network_, data_, data_.train, labels_, which, augmentation, true);
}

template <class Scalar>
void Training<Scalar>::compute_on(Device device, [[maybe_unused]] const cuda::Overlap& overlap) {
  require_built_for(device);
#ifdef CONCERTINA_CUDA
  if (device != Device::cuda) return;
  cuda::TrainingPlan plan = accelerator_plan();
  plan.overlap = overlap;
  compute_on(cuda::cuda_accelerator<Scalar>(plan));
#endif
}

template <class Scalar>
Score Training<Scalar>::test() {
  if (!accelerator_) return evaluate(network_, data_, data_.test);
  return score_of(accelerator_->test(), recipe_.batch, data_.test.count());
}

template <class Scalar>
Score Training<Scalar>::accelerated_epoch() {
  cuda::States<Scalar> states;
  for (auto& [name, numbers] : optimizer_->states()) {
    auto& of_tensors = states.emplace_back();
    for (std::size_t p = 0; p < numbers.size(); ++p) {
      of_tensors[optimizer_->parameters()[p].tensor] = numbers[p];
    }
  }
  const cuda::Steps steps = accelerator_->epoch({.number = epoch_,
                                                 .steps = optimizer_->steps(),
                                                 .learning_rate = recipe_.rate_in(epoch_),
                                                 .order = order_},
                                                states);
  for (std::size_t step = 0; step < steps.losses.size(); ++step) {
    if (!std::isfinite(steps.losses[step])) diverged(static_cast<Index>(step) * recipe_.batch);
  }
  network_.tape().tensors_changed();
  optimizer_->set_steps(optimizer_->steps() + std::ssize(steps.losses));
  next_ = std::ssize(order_);
  return score_of(steps, recipe_.batch, data_.train.count());
}

template <class Scalar>
cuda::TrainingPlan Training<Scalar>::accelerator_plan() const {
  require_accelerable(network_.options());
  return {.descent = {.adam = recipe_.adam,
                      .momentum = recipe_.momentum,
                      .decay = recipe_.weight_decay,
                      .decay_products = recipe_.decay_products},
          .batch = recipe_.batch,
          .seed = recipe_.seed,
          .augmented = data_.augmented,
          .mean = data_.mean,
          .deviation = data_.deviation,
          .train = {data_.train.pixels, labels_},
          .test = {data_.test.pixels, data_.test.labels}};
}

template <class Scalar>
void Training<Scalar>::diverged(Index image) const {
  throw concertina::NumericalError("epoch " + std::to_string(epoch_) + ", image " +
                                   std::to_string(image) +
                                   ": the loss is not finite; try a "
                                   "lower learning rate, in a new folder");
}

template <class Scalar>
std::vector<std::vector<Scalar>> Training<Scalar>::gradients(Index batches, bool trained) {
  if (order_.empty()) throw Error("there are no gradients before the first epoch");
  if (recipe_.decay_products) network_.decay_contractions(0);
  std::vector<std::vector<Scalar>> statistics, result;
  for (const Tensor<Scalar>* tensor : network_.statistics()) statistics.push_back(tensor->value);
  const std::span<const std::uint32_t> order = order_;
  const auto count = static_cast<std::size_t>(recipe_.batch);
  for (std::size_t first = 0; std::ssize(result) < batches && first < order.size();
       first += count) {
    forward(order.subspan(first, std::min(count, order.size() - first)));
    network_.tape().backward();
    auto& gradient = result.emplace_back();
    for (const Tensor<Scalar>* tensor :
         trained ? network_.parameters() : network_.computed_parameters()) {
      gradient.insert(gradient.end(), tensor->gradient.begin(), tensor->gradient.end());
    }
  }
  for (std::size_t t = 0; t < statistics.size(); ++t) {
    network_.statistics()[t]->value = std::move(statistics[t]);
  }
  if (recipe_.decay_products) network_.decay_contractions(recipe_.weight_decay);
  return result;
}

template <class Scalar>
Score Training<Scalar>::step(bool reversed) {
  const Index count = std::min(recipe_.batch, std::ssize(order_) - next_);
  const auto which =
      std::span(order_).subspan(static_cast<std::size_t>(next_), static_cast<std::size_t>(count));
  if (reversed) std::ranges::reverse(which);
  const Score score = forward(which);
  if (!std::isfinite(score.loss)) diverged(next_);
  network_.tape().backward();
  optimizer_->step(recipe_.rate_in(epoch_));
  next_ += count;
  return score;
}

template <class Scalar>
std::string Training<Scalar>::settings() const {
  const TransferOptions& transfer = recipe_.transfer;
  json settings{{"epochs", recipe_.epochs},
                {"batch", recipe_.batch},
                {"learning rate", recipe_.learning_rate},
                {"momentum", recipe_.momentum},
                {"keep momentum", recipe_.keep_momentum},
                {"weight decay", recipe_.weight_decay},
                {"decay of products", recipe_.decay_products},
                {"corrupted", recipe_.corrupted},
                {"transfer", transfer_names.of(transfer.method)},
                {"adam", recipe_.adam},
                {"uniform norms", recipe_.uniform_norms},
                {"seed", recipe_.seed},
                {"double", sizeof(Scalar) == sizeof(double)},
                {"data set", data_.name},
                {"training images", data_.train.count()},
                {"test images", data_.test.count()}};
  if (!init_name_.empty()) settings["init"] = init_name_;
  if (transfer.method != Transfer::none) settings["teacher"] = teacher_name_;
  if (transfer.method == Transfer::kd) {
    settings["temperature"] = transfer.temperature;
    settings["transfer weight"] = transfer.weight;
  }
  if (transfer.method == Transfer::hint) {
    settings["learned projection"] = transfer.learned_projection;
  }
  return settings.dump();
}

template <class Scalar>
concertina::io::Safetensors Training<Scalar>::checkpoint() const {
  concertina::io::Safetensors file = network_.save();
  file.metadata["training"] = settings();
  file.metadata["epochs done"] = std::to_string(epoch_);
  if (recipe_.keep_momentum || recipe_.adam) {
    file.metadata["optimizer steps"] = std::to_string(optimizer_->steps());
    for (const auto& [name, numbers] : optimizer_->states()) {
      for (std::size_t p = 0; p < numbers.size(); ++p) {
        const Tensor<Scalar>& parameter = *optimizer_->parameters()[p].tensor;
        file.add(name + "." + parameter.name, parameter.shape, numbers[p]);
      }
    }
  }
  if (projection_) file.add(projection_->name, projection_->shape, projection_->value);
  return file;
}

template <class Scalar>
void Training<Scalar>::restore(const concertina::io::Safetensors& file) {
  const auto metadata = [&](const std::string& key) {
    const auto found = file.metadata.find(key);
    if (found != file.metadata.end()) return found->second;
    throw FormatError(file.origin + ": no metadata '" + key + "', so it is no checkpoint");
  };
  if (options_of(file) != network_.options()) {
    throw FormatError(file.origin + ": a checkpoint of another network, " + metadata("network"));
  }
  if (metadata("training") != settings()) {
    throw FormatError(file.origin + ": a checkpoint of another training, " + metadata("training") +
                      ", while this one is " + settings());
  }
  const auto count = [&](const std::string& key, Index most) {
    const Index number = number_in<Index>(metadata(key)).value_or(-1);
    if (number >= 0 && number <= most) return number;
    throw FormatError(file.origin + ": metadata '" + key + "' is no number up to " +
                      std::to_string(most));
  };
  const Index done = count("epochs done", recipe_.epochs);
  const concertina::io::Safetensors own = checkpoint();
  for (const auto& [name, tensor] : file.tensors) {
    if (own.contains(name)) continue;
    throw FormatError(file.origin + ": tensor '" + name + "' is none of this training's");
  }
  for (const auto& [name, tensor] : file.tensors) {
    if (std::ranges::all_of(file.view<Scalar>(name), [](Scalar x) { return std::isfinite(x); })) {
      continue;
    }
    throw FormatError(file.origin + ": tensor '" + name +
                      "' has NaN or infinity, which training would spread; begin again, in a new "
                      "folder");
  }
  network_.load(file);
  const auto load = [&](const std::string& name, std::vector<Scalar>& to) {
    const auto numbers = file.view<Scalar>(name);
    if (numbers.size() != to.size()) {
      throw FormatError(file.origin + ": '" + name + "' is of another length than its parameter");
    }
    std::ranges::copy(numbers, to.begin());
  };
  if (projection_) load(projection_->name, projection_->value);
  if (recipe_.keep_momentum || recipe_.adam) {
    optimizer_->set_steps(count("optimizer steps", std::numeric_limits<Index>::max()));
    for (auto& [name, numbers] : optimizer_->states()) {
      for (std::size_t p = 0; p < numbers.size(); ++p) {
        load(name + "." + optimizer_->parameters()[p].tensor->name, numbers[p]);
      }
    }
  }
  epoch_ = done;
  if (done > 0) order_ = epoch_order(data_.train.count(), recipe_.seed, done);
  next_ = std::ssize(order_);
}

namespace {

/// How many batches' gradients are compared, as a checkpoint says it.
std::string similarities_of(const TrainOptions& options) {
  return std::to_string(options.similarities) + (options.trained_gradients ? ", trained" : "");
}
std::string similarities_of(const concertina::io::Safetensors& checkpoint) {
  const auto found = checkpoint.metadata.find("similarities");
  return found == checkpoint.metadata.end() ? "0" : found->second;
}

/// What a checkpoint says of the epochs that are done.
void read_best(const concertina::io::Safetensors& checkpoint, Index done, TrainResult& result) {
  const auto found = checkpoint.metadata.find("best");
  try {
    const json best = json::parse(found == checkpoint.metadata.end() ? "" : found->second);
    result.best_accuracy = best.at("test accuracy");
    result.last_accuracy = best.at("last");
    const json& epoch = best.at("epoch");
    const auto is_accuracy = [](double value) { return value >= 0 && value <= 1; };
    if (epoch.is_number_integer() && epoch >= (done > 0 ? 1 : 0) && epoch <= done &&
        is_accuracy(result.best_accuracy) && is_accuracy(result.last_accuracy)) {
      result.best_epoch = epoch;
      return;
    }
  } catch (const json::exception&) {
  }
  throw FormatError(checkpoint.origin + ": metadata 'best' has no epoch up to " +
                    std::to_string(done) + " and accuracies from 0 to 1");
}

template <class Scalar>
TrainResult train_in(const TrainOptions& options, const Dataset& data, ThreadPool& pool) {
  std::optional<concertina::io::Safetensors> teacher;
  if (!options.teacher.empty()) teacher = read_network(options.teacher);
  NetworkOptions network = options.network;
  const bool needs_contractions = options.recipe.decay_products || options.device != Device::cpu ||
                                  (options.similarities > 0 && !options.trained_gradients);
  if (network.compute == Compute::automatic && needs_contractions) {
    network.compute = network.is_block() ? Compute::layered : Compute::contracted;
  }
  Training<Scalar> training(network, options.recipe, data, pool, teacher ? &*teacher : nullptr);
  if (!options.init.empty()) training.start_from(read_network(options.init));
  const Index batches = options.recipe.batches(data.train.count());
  if (options.similarities > batches) {
    throw Error("similarities of " + std::to_string(options.similarities) +
                " batches; an epoch has " + std::to_string(batches));
  }
  const FolderLock lock(options.out);
  const auto checkpoint_path = options.out / "checkpoint.safetensors";
  const auto log_path = options.out / "log.csv", best_path = options.out / "best.onnx";
  const bool resumes = is_there(checkpoint_path);
  if (resumes && !options.resume) {
    throw Error(options.out.string() +
                " holds a training already: go on with --resume, or name another folder");
  }
  for (const auto& path : {log_path, best_path}) {
    if (resumes || !is_there(path)) continue;
    throw Error(path.string() +
                " is of a training whose checkpoint.safetensors is missing; name "
                "another folder");
  }
  TrainResult result{.parameters = training.network().parameter_count()};
  if (resumes) {
    const auto checkpoint = concertina::io::read_safetensors(checkpoint_path);
    training.restore(checkpoint);
    if (similarities_of(checkpoint) != similarities_of(options)) {
      throw FormatError(checkpoint_path.string() + ": a checkpoint with --similarities " +
                        similarities_of(checkpoint) + ", while this training has " +
                        similarities_of(options));
    }
    read_best(checkpoint, training.epochs_done(), result);
  }
  const Index done = training.epochs_done(), epochs = options.recipe.epochs;
  if (done > 0) {
    for (const auto& path : {log_path, best_path}) {
      if (is_there(path)) continue;
      throw FormatError(path.string() + " is missing; remove the folder to train again");
    }
    static_cast<void>(read_network(best_path));
  }
  const auto require_log = [&](Index rows, double best) {
    if (rows == done && best == result.best_accuracy) return;
    throw FormatError(log_path.string() + ": " + tool::counted(rows, "epoch") +
                      " with a best test accuracy of " + shortest(best) +
                      ", where the checkpoint has " + std::to_string(done) + " and " +
                      shortest(result.best_accuracy));
  };
  if (resumes && done == epochs) {
    double best = 0;
    const std::vector<EpochRecord> rows = CsvLog::read(log_path);
    for (const EpochRecord& row : rows) best = std::max(best, row.test_accuracy);
    require_log(std::ssize(rows), best);
    return result;
  }
  training.compute_on(options.device);
  std::vector<std::string> comments = {options.command,
                                       "model " + options.network.model + ", " +
                                           std::to_string(training.network().parameter_count()) +
                                           " parameters, data set " + data.name};
  for (const auto& [how, layers] : {std::pair("contracted: ", training.network().contracted()),
                                    std::pair("layer by layer: ", training.network().layered())}) {
    if (options.network.compute != Compute::automatic || layers.empty()) continue;
    comments.push_back(how + tool::listed(layers));
    if (!options.report) std::cerr << comments.back() << '\n';
  }
  const auto write_checkpoint = [&] {
    concertina::io::Safetensors checkpoint = training.checkpoint();
    checkpoint.metadata["similarities"] = similarities_of(options);
    checkpoint.metadata["best"] = json{
        {"epoch", result.best_epoch},
        {"test accuracy", result.best_accuracy},
        {"last",
         result.last_accuracy}}.dump();
    concertina::io::write_safetensors(checkpoint_path, checkpoint);
  };
  if (!resumes) write_checkpoint();  // before the log, so that one without it is damaged
  CsvLog log = resumes ? CsvLog::resume(log_path, comments, done) : CsvLog(log_path, comments);
  require_log(log.epochs(), log.best_test_accuracy());

  std::vector<double> similarities;
  while (training.epochs_done() < epochs) {
    const auto start = std::chrono::steady_clock::now();
    const Score trained = training.epoch();
    const double seconds = seconds_since(start);
    const Score tested = training.test();
    if (!std::isfinite(tested.loss)) {
      throw concertina::NumericalError("epoch " + std::to_string(training.epochs_done()) +
                                       ": the test loss is not finite; try a lower learning rate, "
                                       "in a new folder");
    }
    std::optional<double> min_similarity;
    if (options.similarities > 0) {
      try {
        similarities = cosine_similarities(
            training.gradients(options.similarities, options.trained_gradients));
        min_similarity = std::ranges::min(similarities);
      } catch (const concertina::NumericalError&) {
        similarities.clear();  // a gradient that is zero has no direction: not measured
      }
    }
    const EpochRecord record{.epoch = training.epochs_done(),
                             .learning_rate = options.recipe.rate_in(training.epochs_done()),
                             .train_loss = trained.loss,
                             .train_accuracy = trained.accuracy(),
                             .test_loss = tested.loss,
                             .test_accuracy = tested.accuracy(),
                             .images_per_second = static_cast<double>(trained.images) / seconds,
                             .seconds = seconds_since(start),
                             .min_similarity = min_similarity};
    const bool best = record.epoch == 1 || tested.accuracy() > result.best_accuracy;
    if (best) result.best_accuracy = tested.accuracy(), result.best_epoch = record.epoch;
    result.last_accuracy = tested.accuracy();
    if (best) concertina::onnx::write_model(best_path, training.network().model());
    if (min_similarity && record.epoch == epochs) {
      write_similarities(options.out / "similarities.csv", similarities);
    }
    log.add(record);
    write_checkpoint();
    if (options.report) {
      options.report(record);
    } else {
      std::cerr << epoch_line(record, epochs) << std::endl;
    }
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

void TrainOptions::validate() const {
  network.validate();
  recipe.validate();
  require_teacher(recipe.transfer.method, !teacher.empty());
  const bool can_contract =
      network.compute == Compute::contracted || network.compute == Compute::automatic;
  if (similarities > 0 && !trained_gradients && network.model != "compact" &&
      (!can_contract || network.is_block())) {
    throw Error("similarities of a compact network's gradients, of " + network.model +
                " computed " + compute_names.of(network.compute) +
                ": it has no compact network in training; compare --trained-gradients");
  }
  if (recipe.decay_products && network.is_block()) {
    throw Error("the decay of products is of expansions without norms, not of " + network.model);
  }
  if (recipe.decay_products && !can_contract) {
    throw Error("the decay of products needs contracted expansions; these are " +
                compute_names.of(network.compute));
  }
  if (device == Device::cpu) return;
  require_accelerable(network);
  if (similarities > 0) {
    throw UnsupportedError("--similarities is not computed on a device; leave it to --device cpu");
  }
  require_built_for(device);
}

TrainResult train(const TrainOptions& options, const Dataset& data, ThreadPool& pool) {
  options.validate();
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
