// y = T x four ways: the operator without a matrix, Eigen's sparse and dense matrices, and im2col
// with one product of matrices. Each is compared with the layer before it is timed.
// SPDX-License-Identifier: Apache-2.0
#include <concertina/toeplitz.hpp>

#include <benchmark/benchmark.h>

#include <Eigen/Dense>

#include <random>
#include <vector>

namespace {

using namespace concertina;

/// A 3x3 layer of so many channels on maps of `size` x `size`, of small integers, so that every
/// order of sums gives the same floats.
struct Problem {
  Conv2d<float> layer;
  PerAxis<2> size;
  Eigen::VectorXf x, y;

  Problem(Index channels, Index extent)
      : layer({.out = channels, .in = channels, .kernel_size = 3, .padding = 1}),
        size(extent),
        x(channels * extent * extent),
        y(x.size()) {
    std::minstd_rand random(1);
    const auto small = [&] { return static_cast<float>(random() % 5) - 2; };
    for (float& element : layer.weight()) element = small();
    for (float& element : x) element = small();
    const FeatureMap<float, 2> map({.channels = channels, .size = size},
                                   std::vector<float>(x.begin(), x.end()));
    const FeatureMap<float, 2> result = layer(map);
    std::copy(result.values().begin(), result.values().end(), y.begin());
  }
};

/// Times apply(x), and what takes the matrix not at all.
template <class Apply>
void run(benchmark::State& state, const Problem& problem, const Apply& apply) {
  Eigen::VectorXf y = apply(problem.x);
  if (y != problem.y) return state.SkipWithError("not what the layer gives");
  for (auto _ : state) {
    y = apply(problem.x);
    benchmark::DoNotOptimize(y.data());
  }
}

void Operator(benchmark::State& state) {
  const Problem problem(state.range(0), state.range(1));
  const auto t = ToeplitzOperator(problem.layer, problem.size);
  run(state, problem, [&](const Eigen::VectorXf& x) -> Eigen::VectorXf { return t * x; });
}

void Sparse(benchmark::State& state) {
  const Problem problem(state.range(0), state.range(1));
  const auto t = toeplitz(problem.layer, problem.size);
  run(state, problem, [&](const Eigen::VectorXf& x) -> Eigen::VectorXf { return t * x; });
}

void Dense(benchmark::State& state) {
  const Problem problem(state.range(0), state.range(1));
  const Eigen::MatrixXf t = toeplitz(problem.layer, problem.size);
  run(state, problem, [&](const Eigen::VectorXf& x) -> Eigen::VectorXf { return t * x; });
}

void Im2col(benchmark::State& state) {
  const Problem problem(state.range(0), state.range(1));
  using Matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  const Index channels = state.range(0), n = state.range(1), taps = 9;
  const Eigen::Map<const Matrix> weight(problem.layer.weight().data(), channels, channels * taps);
  run(state, problem, [&](const Eigen::VectorXf& x) {
    Matrix columns = Matrix::Zero(channels * taps, n * n);
    for (Index c = 0; c < channels; ++c) {
      for (Index tap = 0; tap < taps; ++tap) {
        const Index dy = tap / 3 - 1, dx = tap % 3 - 1;
        for (Index row = std::max<Index>(0, -dy); row < std::min(n, n - dy); ++row) {
          for (Index column = std::max<Index>(0, -dx); column < std::min(n, n - dx); ++column) {
            columns(c * taps + tap, row * n + column) = x[(c * n + row + dy) * n + column + dx];
          }
        }
      }
    }
    Eigen::VectorXf y(x.size());
    Eigen::Map<Matrix>(y.data(), channels, n * n).noalias() = weight * columns;
    return y;
  });
}

void sizes(benchmark::internal::Benchmark* each) {
  each->ArgNames({"channels", "size"})->Args({4, 16})->Args({16, 16})->Args({16, 32});
  each->Unit(benchmark::kMicrosecond);
}
BENCHMARK(Operator)->Apply(sizes);
BENCHMARK(Sparse)->Apply(sizes);
BENCHMARK(Dense)
    ->ArgNames({"channels", "size"})
    ->Args({4, 16})
    ->Args({16, 16})
    ->Unit(benchmark::kMicrosecond);  // of 16 channels of 32x32 it would be 1 GB
BENCHMARK(Im2col)->Apply(sizes);

}  // namespace
