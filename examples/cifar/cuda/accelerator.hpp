// What computes a training's epochs in the place of the CPU, as the host sees it: plain C++, for
// the sources on either side of CUDA's compiler.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "training/tensor.hpp"

#include <concertina/shape.hpp>

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <vector>

namespace cifar::cuda {

using namespace training;

/// Layers that are trained, those among them without weight decay, and those of a teacher: as in
/// inference, and in training alone.
enum class Part { trained, undecayed, frozen };

/// What a network is recorded on, an operation at a time; the operations are those of OnTape. Maps
/// are named by their index.
template <class Scalar>
class Recorder {
 public:
  using Map = std::size_t;
  static constexpr bool contracts = true;

  virtual ~Recorder() = default;
  virtual Map images() = 0;
  // Those that no program computes throw ShapeError or SizeError.
  /// A convolution, or a fully connected layer: of its own weights, or of those that an expansion
  /// contracts to.
  virtual Map layer(Map x, const concertina::ConvShape<2>& shape, const Weights<Scalar>& weights,
                    const Chain<Scalar, 2>& expansion) = 0;
  virtual Map layer(Map x, const concertina::ConvShape<0>& shape, const Weights<Scalar>& weights,
                    const Chain<Scalar, 0>& expansion) = 0;
  virtual Map norm(Map x, const NormTensors<Scalar>& tensors,
                   const concertina::Padding<2>& margin = 0) = 0;
  virtual Map relu(Map x) = 0;
  virtual Map max_pool(Map x) = 0;
  virtual Map mean_pool(Map x) = 0;
  virtual Map average_pool(Map x, const concertina::PerAxis<2>& kernel) = 0;
  virtual Map sum(const std::vector<Map>& branches) = 0;
  virtual Map detached(Map x) = 0;

  /// What the layers that follow are: a training's, at first.
  virtual void begin(Part part) = 0;
  virtual void loss(Map logits, double weight) = 0;  ///< of its gradient
  // Those of transfer.hpp, in training alone.
  virtual void distill(Map logits, Map teacher, double temperature, double weight) = 0;
  virtual void hint(Map features, Map hint) = 0;
  virtual void match_similarities(Map features, Map teacher) = 0;
  virtual void end() = 0;  ///< after all
};

/// Stochastic gradient descent with momentum, or Adam.
struct Descent {
  bool adam = false;
  double momentum = 0.9, decay = 0;
  bool decay_products = false;  ///< expanded layers' contractions decay, not the layers
};

/// Images as their files hold them, and their classes: [image][3][32][32], [image].
struct ImageSet {
  std::span<const std::uint8_t> pixels, labels;
};

/// What of a step runs side by side; numbers are the same whatever it is.
struct Overlap {
  bool forked = true;
};

struct TrainingPlan {
  Descent descent;
  Index batch = 128;
  std::uint64_t seed = 1;  ///< of the crops
  bool augmented = true;
  Overlap overlap{};
  std::array<double, 3> mean{}, deviation{};
  ImageSet train, test;
};

/// Of each step, the mean loss of its images and how many were right.
struct Steps {
  std::vector<double> losses;
  std::vector<std::int32_t> corrects;
};

/// An epoch: its number, the optimizer's steps before it, the learning rate, the order of its
/// images.
struct Epoch {
  Index number = 1, steps = 0;
  double learning_rate = 0.01;
  std::span<const std::uint32_t> order;
};

/// Each of the optimizer's states, of each parameter.
template <class Scalar>
using States = std::vector<std::map<const Tensor<Scalar>*, std::span<Scalar>>>;

/// Computes epochs of the network that has been recorded on it. It keeps nothing from one to the
/// next: tensors are the host's and return there, so that files and what is done with them are the
/// CPU's.
template <class Scalar>
class Accelerator {
 public:
  virtual ~Accelerator() = default;

  /// For one network, and its teacher, whose tensors must outlive this; before the first epoch or
  /// test.
  virtual Recorder<Scalar>& recorder() = 0;

  /// Changes tensors and states, unless a loss is not finite.
  virtual Steps epoch(const Epoch& epoch, const States<Scalar>& states) = 0;

  /// In inference, on the test set in its order.
  virtual Steps test() = 0;
};

/// One on the CUDA device that is current. Defined where the program is built with CUDA.
/// Throws  DeviceError where there is none
template <class Scalar>
std::unique_ptr<Accelerator<Scalar>> cuda_accelerator(const TrainingPlan& plan);

}  // namespace cifar::cuda
