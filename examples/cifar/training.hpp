// A training: epochs over a data set by the paper's recipe, with a log and checkpoints from which
// it goes on to the bit.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/accelerator.hpp"
#include "log.hpp"
#include "network.hpp"
#include "training/data.hpp"
#include "training/optimizer.hpp"
#include "transfer.hpp"

#include <concertina/error.hpp>

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace cifar {

using namespace training;

/// What a network learns from a teacher, besides or instead of the labels.
enum class Transfer {
  none,
  kd,    ///< the labels and the teacher's softened classes, weighed against each other
  hint,  ///< features like a projection of the teacher's; the last layer learns the labels on them
  pkt    ///< features with similarities like the teacher's; the last layer as with hint
};

extern const tool::Names<Transfer> transfer_names;

/// Throws Error where there is a teacher and no transfer, or the other way round.
void require_teacher(Transfer transfer, bool teacher);

struct TransferOptions {
  Transfer method = Transfer::none;
  double temperature = 4;           ///< of kd
  double weight = 0.9;              ///< of the teacher in kd; the labels have the rest
  bool learned_projection = false;  ///< of hint; otherwise it stays as it was drawn
};

/// The published recipe; see Recipe's members for what it is.
struct Recipe {
  Index epochs = 150;
  Index batch = 128;
  bool adam = false;            ///< instead of stochastic gradient descent with momentum
  double learning_rate = 0.01;  ///< divided by 10 after a third of the epochs, and after two
  double momentum = 0.9;
  bool keep_momentum = false;  ///< the published optimizer is made anew each epoch
  double weight_decay = 0;
  bool decay_products = false;  ///< decay an expanded layer's contraction, not its layers
  double corrupted = 0;         ///< share of the training labels that are drawn at random
  TransferOptions transfer = {};
  bool uniform_norms = false;  ///< weights of batch norms start in 0 .. 1, as published, not at 1
  std::uint64_t seed = 1;

  /// Throws Error naming the option where one makes no sense.
  void validate() const;

  /// Batches of an epoch of so many images.
  Index batches(Index images) const { return (images + batch - 1) / batch; }

  /// In an epoch counted from 1: the full rate until epoch 50 of 150, and so on in proportion. Of
  /// Adam, which scales its steps itself, the full rate.
  double rate_in(Index epoch) const;
};

/// Mean loss and accuracy over a set.
struct Score {
  double loss = 0;
  Index correct = 0, images = 0;
  double accuracy() const {
    return images == 0 ? 0 : static_cast<double>(correct) / static_cast<double>(images);
  }
};

/// The score of all batches that were added.
class TotalScore {
 public:
  void add(const Score& batch) {
    losses_ += batch.loss * static_cast<double>(batch.images);
    correct_ += batch.correct;
    images_ += batch.images;
  }
  Score score() const { return {losses_ / static_cast<double>(images_), correct_, images_}; }

 private:
  double losses_ = 0;
  Index correct_ = 0, images_ = 0;
};

/// The network on all images of a set in inference.
template <class Scalar>
Score evaluate(Network<Scalar>& network, const Dataset& data, const Images& images);

/// What computes a training's epochs and tests.
enum class Device { cpu, cuda };

extern const tool::Names<Device> device_names;

/// An option of a training that the device does not compute; the message names it.
struct UnsupportedError : concertina::Error {
  using Error::Error;
};

/// Throws UnsupportedError unless such a training can be computed by an accelerator.
void require_accelerable(const NetworkOptions& network);

/// Throws UnsupportedError where the program was built without the device.
void require_built_for(Device device);

/// A training in memory: what a step is, and where it stands.
template <class Scalar>
class Training {
 public:
  /// The network is initialised by the recipe's seed. A transfer takes its teacher from a file, a
  /// network that cifar trained or a ResNet-18 of torchvision.
  /// Throws  FormatError where the teacher is for other classes or images normalised otherwise;
  ///         Error where there is a teacher and no transfer, or the other way round
  Training(const NetworkOptions& network, const Recipe& recipe, const Dataset& data,
           ThreadPool& pool, const concertina::io::Safetensors* teacher = nullptr);

  /// One epoch, the next.
  /// Throws  NumericalError where a loss is not finite
  Score epoch() {
    begin_epoch();
    if (accelerator_) return accelerated_epoch();
    TotalScore total;
    while (more_batches()) total.add(step());
    return total.score();
  }

  /// The parts of epoch(): forward, backward and update on the next batch; `reversed` turns the
  /// order of its images around, which changes nothing but the order of summation.
  /// Throws  NumericalError where the loss is not finite
  void begin_epoch();
  bool more_batches() const { return next_ < std::ssize(order_); }
  Score step(bool reversed = false);

  /// The network on the test set.
  Score test();

  /// From now on epochs and tests are the accelerator's; steps and gradients remain here.
  void compute_on(std::unique_ptr<cuda::Accelerator<Scalar>> accelerator) {
    if (accelerator) record(accelerator->recorder());
    accelerator_ = std::move(accelerator);
  }
  /// Throws  as require_accelerable() and require_built_for(); DeviceError where there is none
  void compute_on(Device device, const cuda::Overlap& overlap = {});

  /// What an accelerator has to know. It refers to the training and its data set.
  /// Throws  as require_accelerable()
  cuda::TrainingPlan accelerator_plan() const;

  /// Gradients of the loss, without decay, on the first `batches` batches of the last epoch,
  /// augmented as in it, by the parameters as they are: those of the network that is computed (a
  /// contraction's in the place of its layers'), or those that are trained. Changes nothing.
  /// Returns  [batch][all parameters]
  /// Throws   Error before the first epoch
  std::vector<std::vector<Scalar>> gradients(Index batches, bool trained = false);

  Index epochs_done() const { return epoch_; }
  Network<Scalar>& network() { return network_; }

  /// Takes the parameters and statistics of a file, such as those of a nonlinear counterpart.
  /// Throws  as Network::load
  void start_from(const concertina::io::Safetensors& file);

  /// Everything that the next epoch depends on: the network, where it stands, the recipe, and the
  /// velocities where they are kept.
  concertina::io::Safetensors checkpoint() const;

  /// Goes on from a checkpoint.
  /// Throws  FormatError where it is of another network, recipe or data set, naming the difference,
  ///         and where an element is not finite, naming its tensor
  void restore(const concertina::io::Safetensors& file);

 private:
  std::string settings() const;
  void learn_from(const concertina::io::Safetensors& teacher, ThreadPool& pool);
  /// Features and logits.
  template <class On>
  using Heads = std::pair<typename On::Map, typename On::Map>;
  /// The teacher's loss, on the processor's tape or a device's.
  template <class On>
  void record_transfer(On& on, const Heads<On>& own, const Heads<On>& given) const;
  void record(cuda::Recorder<Scalar>& on) const;
  std::unique_ptr<Optimizer<Scalar>> make_optimizer();
  Score accelerated_epoch();
  [[noreturn]] void diverged(Index image) const;
  /// Forward on a batch of the training set, the teacher first.
  Score forward(std::span<const std::uint32_t> which);

  Recipe recipe_;
  const Dataset& data_;
  std::vector<std::uint8_t> labels_;  // of the training set, perhaps corrupted
  Network<Scalar> network_;
  std::unique_ptr<Network<Scalar>> teacher_;
  std::string teacher_name_, init_name_;
  Tensor<Scalar>* projection_ = nullptr;
  std::unique_ptr<Optimizer<Scalar>> optimizer_;
  std::unique_ptr<cuda::Accelerator<Scalar>> accelerator_;
  Index epoch_ = 0;  // epochs begun; between epochs, done
  std::vector<std::uint32_t> order_;
  Index next_ = 0;  // in order_
};

/// Trains and writes into a folder: log.csv, a row an epoch; checkpoint.safetensors after each
/// epoch; best.onnx, the network of the best test accuracy. Each file is replaced when its
/// successor is complete, so a kill at any moment loses an unfinished epoch and nothing else. With
/// similarities, similarities.csv has a row for each pair of the last epoch's gradients.
struct TrainOptions {
  NetworkOptions network;
  Recipe recipe;
  std::filesystem::path out;
  std::filesystem::path init =
      {};  ///< a file whose tensors a new training starts from; empty for none
  std::filesystem::path teacher = {};  ///< a file; empty for none
  Index similarities = 0;              ///< batches whose gradients are compared after each epoch
  bool trained_gradients = false;  ///< those by the trained parameters, not by the computed ones
  bool resume = false;
  std::string command;  ///< for the log
  bool in_double = false;
  Device device = Device::cpu;
  std::function<void(const EpochRecord&)> report = {};  ///< of each epoch, instead of a line

  /// Throws Error naming what makes no sense, alone or together; UnsupportedError for what the
  /// device does not compute, or where the program was built without it.
  void validate() const;
};

/// The best and the last test score.
struct TrainResult {
  double best_accuracy = 0, last_accuracy = 0;
  Index best_epoch = 0, parameters = 0;
};

/// How far apart ways of computing the same training are: the largest relative difference of the
/// losses of the first steps, all from one seed.
struct Drift {
  double contracted_in_double = 0;  ///< contracted and layered, in double
  double contracted = 0;            ///< contracted and layered, in float
  double reversed = 0;              ///< layered and layered with each batch's images in reverse
};
Drift drift(NetworkOptions network, const Recipe& recipe, const Dataset& data, Index steps,
            ThreadPool& pool);

/// Throws  IoError, also where another process trains in `out`; FormatError; NumericalError where
///         the loss is not finite, and then nothing of that epoch is written; Error where `out`
///         holds a training already and resume is not asked for
TrainResult train(const TrainOptions& options, const Dataset& data, ThreadPool& pool);

}  // namespace cifar
