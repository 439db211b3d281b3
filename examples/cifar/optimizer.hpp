// Stochastic gradient descent.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "tape.hpp"

#include <algorithm>
#include <cstddef>
#include <vector>

namespace cifar {

/// v = momentum * v + gradient + weight_decay * w; w -= learning_rate * v, as torch.optim.SGD.
template <class Scalar>
class Sgd {
 public:
  Sgd(Tape<Scalar>& tape, std::vector<Tensor<Scalar>*> parameters, double momentum,
      double weight_decay)
      : tape_(tape),
        parameters_(std::move(parameters)),
        momentum_(static_cast<Scalar>(momentum)),
        weight_decay_(static_cast<Scalar>(weight_decay)) {
    for (std::size_t p = 0; p < parameters_.size(); ++p) {
      const Index count = std::ssize(parameters_[p]->value);
      velocities_.emplace_back(static_cast<std::size_t>(count), Scalar(0));
      constexpr Index longest = 1 << 15;  // so that threads share a large tensor
      for (Index first = 0; first < count; first += longest) {
        blocks_.push_back({p, first, std::min(longest, count - first)});
      }
    }
  }

  void step(double learning_rate) {
    const auto rate = static_cast<Scalar>(learning_rate);
    tape_.pool().run(std::ssize(blocks_), [&](Index task, Index) {
      const auto& [p, first, count] = blocks_[static_cast<std::size_t>(task)];
      Scalar* const weight = parameters_[p]->value.data() + first;
      Scalar* const velocity = velocities_[p].data() + first;
      const Scalar* const gradient = parameters_[p]->gradient.data() + first;
      // One loop over what does not fit a cache; Eigen would make two.
      for (Index i = 0; i < count; ++i) {
        const Scalar v = momentum_ * velocity[i] + gradient[i] + weight_decay_ * weight[i];
        velocity[i] = v;
        weight[i] -= rate * v;
      }
    });
    tape_.tensors_changed();
  }

  /// Forgets the past, as an optimizer made anew.
  void reset() {
    for (auto& velocity : velocities_) std::ranges::fill(velocity, Scalar(0));
  }

  /// In the order of the parameters.
  std::vector<std::vector<Scalar>>& velocities() { return velocities_; }

 private:
  struct Block {
    std::size_t parameter;
    Index first, count;
  };
  Tape<Scalar>& tape_;
  std::vector<Tensor<Scalar>*> parameters_;
  Scalar momentum_, weight_decay_;
  std::vector<std::vector<Scalar>> velocities_;
  std::vector<Block> blocks_;
};

}  // namespace cifar
