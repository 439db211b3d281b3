// The block programs of the optimizers.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "program.hpp"

#include <concertina/cuda/block.hpp>

#include <cmath>
#include <cstddef>

namespace cifar::cuda {

/// v = momentum * v + gradient + decay * w; w -= learning_rate * v, as Sgd; for tensors that lie
/// one behind the other.
template <class Scalar>
struct Descend {
  static constexpr int threads = detail::program_threads;

  Scalar* weights;
  const Scalar* gradients;
  Scalar* velocities;
  const Clock* clock;
  Index count;
  Scalar momentum, decay;

  Index blocks() const { return detail::blocks_for(count, threads); }
  std::size_t shared_bytes() const { return 0; }

  template <concertina::cuda::ThreadBlock B>
  CONCERTINA_DEVICE void operator()(B& block, Index index) const {
    block.each_thread([&](int thread) {
      const Index i = index * threads + thread;
      if (i >= count) return;
      const auto rate = static_cast<Scalar>(block.read(clock).learning_rate);
      const Scalar weight = block.read(weights + i);
      const Scalar gradient = block.read(gradients + i) + decay * weight;
      const Scalar velocity = momentum * block.read(velocities + i) + gradient;
      block.write(velocities + i, velocity);
      block.write(weights + i, weight - rate * velocity);
    });
  }
};

/// The same as Adam: its mean and square of each gradient, and the step that they make.
template <class Scalar>
struct DescendByAdam {
  static constexpr int threads = detail::program_threads;

  Scalar* weights;
  const Scalar* gradients;
  Scalar *means, *squares;
  const Clock* clock;
  Index count;
  Scalar decay;

  Index blocks() const { return detail::blocks_for(count, threads); }
  std::size_t shared_bytes() const { return shared_size<Scalar>(2); }

  template <concertina::cuda::ThreadBlock B>
  CONCERTINA_DEVICE void operator()(B& block, Index index) const {
    constexpr double beta1 = 0.9, beta2 = 0.999;
    constexpr auto b1 = static_cast<Scalar>(beta1), b2 = static_cast<Scalar>(beta2),
                   eps = static_cast<Scalar>(1e-8);
    auto factors = block.template shared<Scalar>(2);
    block.each_thread([&](int thread) {
      if (thread != 0) return;
      const Clock now = block.read(clock);
      const auto steps = static_cast<double>(now.steps_before + now.step);  // this one included
      factors.set(0, static_cast<Scalar>(now.learning_rate / (1 - std::pow(beta1, steps))));
      factors.set(1, static_cast<Scalar>(1 / std::sqrt(1 - std::pow(beta2, steps))));
    });
    block.each_thread([&](int thread) {
      const Index i = index * threads + thread;
      if (i >= count) return;
      const Scalar weight = block.read(weights + i);
      const Scalar gradient = block.read(gradients + i) + decay * weight;
      Scalar mean = block.read(means + i), square = block.read(squares + i);
      mean += (1 - b1) * (gradient - mean);
      square = b2 * square + (1 - b2) * gradient * gradient;
      block.write(means + i, mean);
      block.write(squares + i, square);
      block.write(weights + i,
                  weight - factors.get(0) * mean / (factors.get(1) * std::sqrt(square) + eps));
    });
  }
};

}  // namespace cifar::cuda
