// The limit that contractions are held against: Eigen's own rate for a 1024^3 product, measured in
// the same run.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <Eigen/Core>

#include <algorithm>
#include <cstddef>
#include <ctime>
#include <vector>

namespace concertina::benchmarks {

/// Multiply-adds per second of Eigen's product of two 1024 x 1024 matrices on one thread: the
/// median of `runs`. Machines are shared and their clocks move, so each benchmark asks again, right
/// before it is timed.
template <class Scalar>
double gemm_rate(int runs = 9) {
  using Matrix = Eigen::Matrix<Scalar, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  constexpr Eigen::Index n = 1024;
  static const Matrix a = Matrix::Random(n, n), b = Matrix::Random(n, n);
  static Matrix c(n, n);
  std::vector<double> seconds;
  for (int run = 0; run <= runs; ++run) {
    const std::clock_t start = std::clock();  // processor time, as the benchmarks' rates
    c.noalias() = a * b;
    if (run > 0) seconds.push_back(static_cast<double>(std::clock() - start) / CLOCKS_PER_SEC);
  }
  std::ranges::nth_element(seconds, seconds.begin() + runs / 2);
  return static_cast<double>(n * n * n) / seconds[static_cast<std::size_t>(runs / 2)];
}

}  // namespace concertina::benchmarks
