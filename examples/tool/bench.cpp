// concertina bench: the contraction of the user's own layers, beside what the machine's matrix
// product reaches.
// SPDX-License-Identifier: Apache-2.0
#include "commands.hpp"
#include "networks/contraction.hpp"

#include <concertina/contract.hpp>

#include <Eigen/Core>

#include <algorithm>
#include <chrono>
#include <iostream>

namespace tool {
namespace {

struct Times {
  double best, median;  // seconds
  std::size_t runs;
};

/// At least five runs, and as many seconds in all.
template <class Work>
Times measure(double least_seconds, Work&& work) {
  using Clock = std::chrono::steady_clock;
  std::vector<double> seconds;
  work();  // touches memory for the first time
  for (double total = 0; seconds.size() < 5 || total < least_seconds;) {
    const auto begin = Clock::now();
    work();
    seconds.push_back(std::chrono::duration<double>(Clock::now() - begin).count());
    total += seconds.back();
  }
  std::ranges::sort(seconds);
  return {seconds.front(), seconds[seconds.size() / 2], seconds.size()};
}

/// Multiply-adds per second of Eigen's product of 1024x1024 matrices, the best of the runs.
template <class Scalar>
double gemm_peak() {
  static const double peak = [] {
    constexpr Index size = 1024;
    using Matrix = Eigen::Matrix<Scalar, Eigen::Dynamic, Eigen::Dynamic>;
    const Matrix a = Matrix::Random(size, size), b = Matrix::Random(size, size);
    Matrix c(size, size);
    return static_cast<double>(size * size * size) /
           measure(0.5, [&] { c.noalias() = a * b; }).best;
  }();
  return peak;
}

struct Row {
  std::string file, layers, scalar;
  Index multiply_adds;
  Times times;
  double peak;
};

template <class Scalar, int Rank>
Row time(const std::string& path, Index layers, const Expr<Scalar, Rank>& expression) {
  const concertina::Form<Rank> form = concertina::Form(expression);
  require_modest(form, path);
  Progress progress;
  progress.show("timing a matrix product of 1024x1024");
  const double peak = gemm_peak<Scalar>();
  progress.show("timing " + path);
  const Times times =
      measure(0.2, [&] { concertina::contract(expression, concertina::interior_only); });
  return {.file = path,
          .layers = counted(layers, "layer") + " -> " + to_string(form.shape()),
          .scalar = std::is_same_v<Scalar, float> ? "float" : "double",
          .multiply_adds = form.multiply_adds(),
          .times = times,
          .peak = peak};
}

}  // namespace

ExitCode bench(const FilesOptions& options) {
  nlohmann::json results = nlohmann::json::array();
  std::vector<std::vector<std::string>> cells{
      {"file", "layers", "in", "multiply-adds", "best ms", "median ms", "GFLOP/s", "of GEMM peak"}};
  const ExitCode code = for_each_file(options.paths, results, [&](const std::string& path) {
    const auto file = concertina::io::read_safetensors(path);
    const Node graph = graph_of(file, options.chain);
    const Row row = std::visit(
        [&](const auto& expression) { return time(path, layer_count(graph), expression); },
        read_file_map(file, graph));
    const double rate = static_cast<double>(row.multiply_adds) / row.times.best;
    cells.push_back({printable(path), row.layers, row.scalar, grouped(row.multiply_adds),
                     brief(row.times.best * 1e3), brief(row.times.median * 1e3), brief(2e-9 * rate),
                     brief(100 * rate / row.peak) + " %"});
    results.push_back({{"file", path},
                       {"layers", row.layers},
                       {"scalar", row.scalar},
                       {"multiply_adds", row.multiply_adds},
                       {"runs", row.times.runs},
                       {"best_ms", row.times.best * 1e3},
                       {"median_ms", row.times.median * 1e3},
                       {"gflops", 2e-9 * rate},
                       {"gemm_peak_gflops", 2e-9 * row.peak},
                       {"share_of_peak", rate / row.peak}});
    return ok;
  });
  if (options.json) {
    std::cout << results.dump(2) << '\n';
  } else if (cells.size() > 1) {
    std::cout << table(cells)
              << "GEMM peak: the product of two 1024x1024 matrices in the same scalar, by Eigen, "
                 "in this run\n";
  }
  return code;
}

}  // namespace tool
