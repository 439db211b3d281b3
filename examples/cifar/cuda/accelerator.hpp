// What computes a training's epochs in the place of the CPU, as the host sees it: plain C++, for
// the sources on either side of CUDA's compiler.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/shape.hpp>  // Index

#include <array>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace cifar::cuda {

using concertina::Index;

/// A tensor by its name and shape, as Network's.
struct NamedShape {
  std::string name;
  std::vector<Index> shape;

  Index count() const {
    Index count = 1;
    for (const Index extent : shape) count *= extent;
    return count;
  }
};

/// A SmallNet, compact or expanded, by its tensors.
struct NetworkPlan {
  Index kernel = 7, blocks = 3;
  bool norms = true;
  std::vector<NamedShape> parameters, statistics;
};

/// Stochastic gradient descent with momentum.
struct Descent {
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
  NetworkPlan network;
  Descent descent;
  Index batch = 128;
  std::uint64_t seed = 1;  ///< of the crops
  bool augmented = true;
  Overlap overlap{};
  std::array<double, 3> mean{}, deviation{};
  ImageSet train, test;
};

/// A training's numbers on the host, each list in the order of the plan's tensors; velocities as
/// parameters.
template <class Scalar>
struct Numbers {
  std::vector<std::span<Scalar>> parameters, statistics, velocities;
};

/// Of each step, the mean loss of its images and how many were right.
struct Steps {
  std::vector<double> losses;
  std::vector<std::int32_t> corrects;
};

/// An epoch: its number, the order of its images, the learning rate.
struct Epoch {
  Index number = 1;
  double learning_rate = 0.01;
  std::span<const std::uint32_t> order;
};

/// Computes epochs, and keeps nothing from one to the next: numbers come from the host and return
/// there, so that files and what is done with them are the CPU's.
template <class Scalar>
class Accelerator {
 public:
  virtual ~Accelerator() = default;

  /// Changes the numbers, unless a loss is not finite.
  /// Throws  ShapeError where the numbers are not those of the plan's tensors, or the order is not
  ///         one of the set's images
  virtual Steps epoch(const Epoch& epoch, const Numbers<Scalar>& numbers) = 0;

  /// In inference, on the test set in its order; velocities are not looked at.
  /// Throws  ShapeError as epoch()
  virtual Steps test(const Numbers<Scalar>& numbers) = 0;
};

/// One on the CUDA device that is current. Defined where the program is built with CUDA.
/// Throws  DeviceError where there is none
template <class Scalar>
std::unique_ptr<Accelerator<Scalar>> cuda_accelerator(const TrainingPlan& plan);

}  // namespace cifar::cuda
