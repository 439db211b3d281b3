// What the block programs of a training share.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "training/tensor.hpp"

#include <concertina/cuda/block.hpp>
#include <concertina/shape.hpp>

#include <cstddef>
#include <cstdint>

namespace cifar::cuda {

using namespace training;

using concertina::cuda::shared_size, concertina::cuda::ThreadBlock;

/// Where a training stands, in the device's memory: launches are the same in every step, so that a
/// graph of them can be replayed.
struct Clock {
  Index epoch = 0, step = 0;  ///< the step within the epoch; the loss counts it on
  Index steps_before = 0;     ///< of the optimizer, before the epoch
  double learning_rate = 0;
};

/// A set of images on the device, and a pass over it in batches.
template <class Scalar>
struct Pass {
  const std::uint8_t *pixels = nullptr, *labels = nullptr;  ///< [image][3][32][32], [image]
  std::uint32_t* order = nullptr;
  Clock* clock = nullptr;
  const Scalar* values = nullptr;    ///< of normalized_values
  double* losses = nullptr;          ///< [step]
  std::int32_t* corrects = nullptr;  ///< [step]
  int batch = 0;
  bool augmented = false;
  std::uint64_t seed = 0;
};

namespace detail {

inline constexpr int program_threads = 256;

/// The first of each becomes the sum of all, always in the same order.
template <int count, class B, class... Parts>
CONCERTINA_DEVICE void add_up(B& block, const Parts&... parts) {
  static_assert((count & (count - 1)) == 0, "halves");
  for (int half = count / 2; half > 0; half /= 2) {
    block.each_thread([&](int thread) {
      if (thread >= half) return;
      (parts.set(thread, parts.get(thread) + parts.get(thread + half)), ...);
    });
  }
}

constexpr Index blocks_for(Index count, int each) { return (count + each - 1) / each; }

/// Program::at(block, i) for each i < count, a thread for each.
template <class Program>
struct Elementwise {
  static constexpr int threads = program_threads;

  Index count;

  Index blocks() const { return blocks_for(count, threads); }
  std::size_t shared_bytes() const { return 0; }

  template <ThreadBlock B>
  CONCERTINA_DEVICE void operator()(B& block, Index index) const {
    block.each_thread([&](int thread) {
      const Index i = index * threads + thread;
      if (i < count) static_cast<const Program&>(*this).at(block, i);
    });
  }
};

}  // namespace detail

}  // namespace cifar::cuda
