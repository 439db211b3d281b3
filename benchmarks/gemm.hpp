// The limit that contractions are held against: Eigen's own rate for a 1024^3 product, in the same
// run.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <Eigen/Core>

#include <algorithm>
#include <cstddef>
#include <ctime>
#include <vector>

namespace concertina::benchmarks {

/// Processor seconds of one call, the mean over as many calls as take `at_least`.
template <class Call>
double seconds_of(Call&& call, double at_least) {
  const std::clock_t start = std::clock();
  double seconds = 0;
  int calls = 0;
  while (calls == 0 || seconds < at_least) {
    call();
    ++calls;
    seconds = static_cast<double>(std::clock() - start) / CLOCKS_PER_SEC;
  }
  return seconds / calls;
}

/// The rate of `work` multiply-adds in `call` as a share of Eigen's for a product of two 1024 x
/// 1024 matrices, on one thread. Machines are shared and their clocks move, so the two alternate,
/// and the median of the rounds' ratios counts.
template <class Scalar, class Call>
double share_of_gemm(double work, Call&& call, int rounds = 15) {
  using Matrix = Eigen::Matrix<Scalar, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  constexpr Eigen::Index n = 1024;
  const Matrix a = Matrix::Random(n, n), b = Matrix::Random(n, n);
  Matrix c(n, n);
  const auto multiply = [&] { c.noalias() = a * b; };
  multiply();
  call();
  std::vector<double> shares;
  for (int round = 0; round < rounds; ++round) {
    const double limit = static_cast<double>(n * n * n) / seconds_of(multiply, 0.05);
    shares.push_back(work / seconds_of(call, 0.05) / limit);
  }
  std::ranges::nth_element(shares, shares.begin() + rounds / 2);
  return shares[static_cast<std::size_t>(rounds / 2)];
}

}  // namespace concertina::benchmarks
