// What the block programs of a training share.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "training/tensor.hpp"

#include <concertina/cuda/block.hpp>
#include <concertina/shape.hpp>

#include <cstddef>

namespace cifar::cuda {

using namespace training;

using concertina::cuda::shared_size;

/// Where a training stands, in the device's memory: launches are the same in every step, so that a
/// graph of them can be replayed.
struct Clock {
  Index epoch = 0, step = 0;  ///< the step within the epoch; the loss counts it on
  Index steps_before = 0;     ///< of the optimizer, before the epoch
  double learning_rate = 0;
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

}  // namespace detail

template <class T>
struct Fill {
  static constexpr int threads = detail::program_threads;

  T* to;
  Index count;
  T value;

  Index blocks() const { return detail::blocks_for(count, threads); }
  std::size_t shared_bytes() const { return 0; }

  template <concertina::cuda::ThreadBlock B>
  CONCERTINA_DEVICE void operator()(B& block, Index index) const {
    block.each_thread([&](int thread) {
      const Index i = index * threads + thread;
      if (i < count) block.write(to + i, value);
    });
  }
};

}  // namespace cifar::cuda
