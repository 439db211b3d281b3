// The block programs of grids and sums of maps.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "program.hpp"

#include <concertina/cuda/block.hpp>

#include <cstddef>

namespace cifar::cuda {

/// The positions (row, column) + step * (i, j) of planes, as smaller planes; or if `spread` the
/// other way round, with zeros between. It is a stride, what is around a smaller kernel, and the
/// gradient of either.
template <class Scalar>
struct Grid {
  static constexpr int threads = detail::program_threads;

  const Scalar* from;
  Scalar* to;
  Index planes;
  int small_height, small_width, height, width, row, column, step;
  bool spread;

  Index count() const { return planes * (spread ? height * width : small_height * small_width); }
  Index blocks() const { return detail::blocks_for(count(), threads); }
  std::size_t shared_bytes() const { return 0; }

  template <concertina::cuda::ThreadBlock B>
  CONCERTINA_DEVICE void operator()(B& block, Index index) const {
    block.each_thread([&](int thread) {
      const int columns = spread ? width : small_width,
                each = columns * (spread ? height : small_height);
      const Index at = index * threads + thread, plane = at / each;
      if (plane >= planes) return;
      const int i = static_cast<int>(at % each), y = i / columns, x = i % columns;
      if (!spread) {
        const int place = (row + step * y) * width + column + step * x;
        return block.write(to + at, block.read(from + plane * height * width + place));
      }
      const int down = y - row, right = x - column;
      const bool there = down >= 0 && right >= 0 && down % step == 0 && right % step == 0 &&
                         down / step < small_height && right / step < small_width;
      const Scalar* const source = from + plane * small_height * small_width;
      block.write(to + at, there ? block.read(source + down / step * small_width + right / step)
                                 : Scalar(0));
    });
  }
};

/// y = scale * (a + factor * b), without b scale * a; y may be either.
template <class Scalar>
struct Sum {
  static constexpr int threads = detail::program_threads;

  const Scalar *a, *b;
  Scalar* y;
  Index count;
  Scalar factor = 1, scale = 1;

  Index blocks() const { return detail::blocks_for(count, threads); }
  std::size_t shared_bytes() const { return 0; }

  template <concertina::cuda::ThreadBlock B>
  CONCERTINA_DEVICE void operator()(B& block, Index index) const {
    block.each_thread([&](int thread) {
      const Index i = index * threads + thread;
      if (i >= count) return;
      const Scalar more = b ? factor * block.read(b + i) : Scalar(0);
      block.write(y + i, scale * (block.read(a + i) + more));
    });
  }
};

}  // namespace cifar::cuda
