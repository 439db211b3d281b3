// The block program of fully connected layers and their gradients.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "program.hpp"

#include <cstddef>

namespace cifar::cuda {

/// Numbers with a row and a place in the sum of a product: row i's k-th at i * row + k * inner.
template <class Scalar>
struct Factor {
  const Scalar* numbers;
  int row, inner;
};

/// result[i][j] = the sum over k of left(i, k) * right(j, k): the forward pass of a fully connected
/// layer and both of its gradients, by their strides.
///
/// The products are small and many blocks hide what waits: tiles of 8 x 8 numbers, four threads for
/// each of a tile's, and an inner length of 128 at a time, so that fc1's 512 are four rounds.
template <class Scalar>
struct Product {
  static constexpr int threads = detail::program_threads;

  Factor<Scalar> left, right;
  Scalar* result;
  int rows, columns, inner;
  const Scalar* bias = nullptr;  ///< added, [column]
  bool relu = false;             ///< and then what is negative becomes 0; NaN stays
  const Scalar* mask = nullptr;  ///< [row][column]: the result is 0 but where this is positive
  Scalar* row_sums = nullptr;    ///< of left: a bias's gradient

  Index blocks() const {
    return detail::blocks_for(rows, tile) * detail::blocks_for(columns, tile);
  }
  std::size_t shared_bytes() const {
    return 2 * shared_size<Scalar>(tile * step) + 2 * shared_size<Scalar>(threads);
  }

  template <ThreadBlock B>
  CONCERTINA_DEVICE void operator()(B& block, Index index) const {
    const int column_tiles = (columns + tile - 1) / tile, at = static_cast<int>(index);
    const int first_row = at / column_tiles * tile, first_column = at % column_tiles * tile;
    auto left_tile = block.template shared<Scalar>(tile * step),
         right_tile = block.template shared<Scalar>(tile * step);
    auto sums = block.template shared<Scalar>(threads),
         side_sums = block.template shared<Scalar>(threads);
    typename B::template PerThread<Scalar> sum(block), side_sum(block);
    block.each_thread([&](int thread) { sum[thread] = side_sum[thread] = Scalar(0); });
    for (int first = 0; first < inner; first += depth) {
      block.each_thread([&](int thread) {
        load(block, left, first_row, rows, first, thread, left_tile);
        load(block, right, first_column, columns, first, thread, right_tile);
      });
      block.each_thread([&](int thread) {
        const int row = thread / tile % tile, column = thread % tile, part = thread / (tile * tile);
        CONCERTINA_UNROLL
        for (int i = 0; i < depth / parts; ++i) {
          const int k = i * parts + part;
          const Scalar number_left = left_tile.get(row * step + k);
          sum[thread] += number_left * right_tile.get(column * step + k);
          side_sum[thread] += number_left;
        }
      });
    }
    block.each_thread([&](int thread) {
      sums.set(thread, sum[thread]);
      side_sums.set(thread, side_sum[thread]);
    });
    block.each_thread([&](int thread) {
      const int row = first_row + thread / tile, column = first_column + thread % tile;
      if (thread >= tile * tile || row >= rows || column >= columns) return;
      Scalar value(0), side_value(0);
      for (int part = 0; part < parts; ++part) {
        value += sums.get(part * tile * tile + thread);
        side_value += side_sums.get(part * tile * tile + thread);
      }
      const Index place = static_cast<Index>(row) * columns + column;
      if (bias != nullptr) value += block.read(bias + column);
      if (relu && value < Scalar(0)) value = Scalar(0);
      if (mask != nullptr && !(block.read(mask + place) > Scalar(0))) value = Scalar(0);
      block.write(result + place, value);
      if (row_sums != nullptr && column == 0) block.write(row_sums + row, side_value);
    });
  }

 private:
  static constexpr int tile = 8, parts = threads / (tile * tile), depth = 128;
  static constexpr int step = depth + 1;  // so that rows of a tile start on different banks

  /// Neighbours in memory by neighbouring threads; zeros beyond the matrix.
  template <class B, class Tile>
  CONCERTINA_DEVICE void load(B& block, const Factor<Scalar>& from, int first_row, int count,
                              int first, int thread, const Tile& to) const {
    CONCERTINA_UNROLL
    for (int i = 0; i < tile * depth / threads; ++i) {
      const int number = i * threads + thread;
      const int row = from.inner == 1 ? number / depth : number % tile,
                k = from.inner == 1 ? number % depth : number / tile;
      const bool inside = first_row + row < count && first + k < inner;
      to.set(row * step + k,
             inside ? block.read(from.numbers + static_cast<Index>(first_row + row) * from.row +
                                 static_cast<Index>(first + k) * from.inner)
                    : Scalar(0));
    }
  }
};

/// y = x W^T + b, with x[images][in] and W[out][in].
template <class Scalar>
Product<Scalar> linear(int images, int in, int out, const Scalar* x, const Scalar* weight,
                       const Scalar* bias, Scalar* y, bool relu = false) {
  return {.left = {x, in, 1},
          .right = {weight, in, 1},
          .result = y,
          .rows = images,
          .columns = out,
          .inner = in,
          .bias = bias,
          .relu = relu};
}

/// dL/dx from dL/dy; where x came from a ReLU, `mask` is x.
template <class Scalar>
Product<Scalar> linear_input_gradient(int images, int in, int out, const Scalar* y_gradient,
                                      const Scalar* weight, Scalar* x_gradient,
                                      const Scalar* mask = nullptr) {
  return {.left = {y_gradient, out, 1},
          .right = {weight, 1, in},
          .result = x_gradient,
          .rows = images,
          .columns = in,
          .inner = out,
          .mask = mask};
}

/// dL/dW and dL/db from dL/dy.
template <class Scalar>
Product<Scalar> linear_weight_gradient(int images, int in, int out, const Scalar* x,
                                       const Scalar* y_gradient, Scalar* weight_gradient,
                                       Scalar* bias_gradient) {
  return {.left = {y_gradient, 1, out},
          .right = {x, 1, in},
          .result = weight_gradient,
          .rows = out,
          .columns = in,
          .inner = images,
          .row_sums = bias_gradient};
}

}  // namespace cifar::cuda
