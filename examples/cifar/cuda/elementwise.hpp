// The block programs of grids and sums of maps, and of the optimizers: a thread for each number.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "program.hpp"

#include <cmath>
#include <cstddef>

namespace cifar::cuda {

template <class Scalar>
struct Fill : detail::Elementwise<Fill<Scalar>> {
  Scalar* to;
  Scalar value;

  template <class B>
  CONCERTINA_DEVICE void at(B& block, Index i) const {
    block.write(to + i, value);
  }
};

/// y = scale * (a + factor * b), without b scale * a; y may be either.
template <class Scalar>
struct Sum : detail::Elementwise<Sum<Scalar>> {
  const Scalar *a, *b;
  Scalar* y;
  Scalar factor = 1, scale = 1;

  template <class B>
  CONCERTINA_DEVICE void at(B& block, Index i) const {
    const Scalar more = b ? factor * block.read(b + i) : Scalar(0);
    block.write(y + i, scale * (block.read(a + i) + more));
  }
};

/// The positions (row, column) + step * (i, j) of planes.
struct GridShape {
  Index planes;
  int small_height, small_width, height, width, step = 1, row = 0, column = 0;

  Index count(bool spread) const {
    return planes * (spread ? height * width : small_height * small_width);
  }
};

/// Those positions, as smaller planes; or if `spread` the other way round, with zeros between. It
/// is a stride, what is around a smaller kernel, and the gradient of either.
template <class Scalar>
struct Grid : detail::Elementwise<Grid<Scalar>> {
  GridShape shape;
  const Scalar* from;
  Scalar* to;
  bool spread;

  Grid(const GridShape& shape_, const Scalar* from_, Scalar* to_, bool spread_)
      : detail::Elementwise<Grid>{shape_.count(spread_)},
        shape(shape_),
        from(from_),
        to(to_),
        spread(spread_) {}

  template <class B>
  CONCERTINA_DEVICE void at(B& block, Index index) const {
    const auto& [planes, small_height, small_width, height, width, step, row, column] = shape;
    const int columns = spread ? width : small_width,
              each = columns * (spread ? height : small_height);
    const Index plane = index / each;
    const int i = static_cast<int>(index % each), y = i / columns, x = i % columns;
    if (!spread) {
      const int place = (row + step * y) * width + column + step * x;
      return block.write(to + index, block.read(from + plane * height * width + place));
    }
    const int down = y - row, right = x - column;
    const bool there = down >= 0 && right >= 0 && down % step == 0 && right % step == 0 &&
                       down / step < small_height && right / step < small_width;
    const Scalar* const source = from + plane * small_height * small_width;
    block.write(to + index,
                there ? block.read(source + down / step * small_width + right / step) : Scalar(0));
  }
};

/// v = momentum * v + gradient + decay * w; w -= learning_rate * v, as Sgd; for tensors that lie
/// one behind the other.
template <class Scalar>
struct Descend : detail::Elementwise<Descend<Scalar>> {
  Scalar* weights;
  const Scalar* gradients;
  Scalar* velocities;
  const Clock* clock;
  Scalar momentum, decay;

  template <class B>
  CONCERTINA_DEVICE void at(B& block, Index i) const {
    const auto rate = static_cast<Scalar>(block.read(clock).learning_rate);
    const Scalar weight = block.read(weights + i);
    const Scalar gradient = block.read(gradients + i) + decay * weight;
    const Scalar velocity = momentum * block.read(velocities + i) + gradient;
    block.write(velocities + i, velocity);
    block.write(weights + i, weight - rate * velocity);
  }
};

/// The same as Adam: its mean and square of each gradient, and the step that they make.
template <class Scalar>
struct DescendByAdam {
  static constexpr int threads = detail::program_threads;

  Index count;
  Scalar* weights;
  const Scalar* gradients;
  Scalar *means, *squares;
  const Clock* clock;
  Scalar decay;

  Index blocks() const { return detail::blocks_for(count, threads); }
  std::size_t shared_bytes() const { return shared_size<Scalar>(2); }

  template <ThreadBlock B>
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
