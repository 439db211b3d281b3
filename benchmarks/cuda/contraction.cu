// Contraction and its gradient on a device, of whole networks' expanded layers: a pass captured in
// a CUDA graph, timed by events, beside cuBLAS's own rate for as many multiply-adds.
// SPDX-License-Identifier: Apache-2.0
#include "networks.hpp"

#include <concertina/cuda/contraction.cuh>
#include <concertina/random.hpp>

#include <benchmark/benchmark.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

namespace concertina::benchmarks {
namespace {

using cuda::Buffer, cuda::check, cuda::TensorUse;

constexpr const char* what = "a benchmark";

/// Work captured in a graph, and the milliseconds of one launch of it.
class Graph {
 public:
  template <class Record>
  explicit Graph(Record&& record) {
    check(cudaStreamCreate(&stream_), "cudaStreamCreate", what);
    check(cudaEventCreate(&start_), "cudaEventCreate", what);
    check(cudaEventCreate(&stop_), "cudaEventCreate", what);
    cudaGraph_t graph = nullptr;
    check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeGlobal), "cudaStreamBeginCapture",
          what);
    record(stream_);
    check(cudaStreamEndCapture(stream_, &graph), "cudaStreamEndCapture", what);
    check(cudaGraphInstantiate(&graph_, graph, 0), "cudaGraphInstantiate", what);
    check(cudaGraphDestroy(graph), "cudaGraphDestroy", what);
    for (int warm = 0; warm < 3; ++warm) launch();
    check(cudaStreamSynchronize(stream_), "cudaStreamSynchronize", what);
  }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  ~Graph() {
    cudaGraphExecDestroy(graph_);
    cudaEventDestroy(start_);
    cudaEventDestroy(stop_);
    cudaStreamDestroy(stream_);
  }

  /// Of one launch, the mean of so many one after another.
  double seconds(int launches) const {
    check(cudaEventRecord(start_, stream_), "cudaEventRecord", what);
    for (int n = 0; n < launches; ++n) launch();
    check(cudaEventRecord(stop_, stream_), "cudaEventRecord", what);
    check(cudaEventSynchronize(stop_), "cudaEventSynchronize", what);
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, start_, stop_), "cudaEventElapsedTime", what);
    return static_cast<double>(milliseconds) / 1e3 / launches;
  }

 private:
  void launch() const { check(cudaGraphLaunch(graph_, stream_), "cudaGraphLaunch", what); }

  cudaStream_t stream_ = nullptr;
  cudaEvent_t start_ = nullptr, stop_ = nullptr;
  cudaGraphExec_t graph_ = nullptr;
};

/// Random numbers in the device's memory.
Buffer<float> random_numbers(Index count) {
  std::mt19937_64 generator(1);
  std::vector<float> numbers(static_cast<std::size_t>(count));
  for (float& number : numbers) number = static_cast<float>(random_uniform(generator, 1));
  return Buffer<float>(numbers, what);
}

/// Multiply-adds per second of cuBLAS for the square product that takes as many.
double blas_rate(Index multiply_adds) {
  const int side = std::max(16, static_cast<int>(std::cbrt(static_cast<double>(multiply_adds))));
  const Index numbers = Index{side} * side;
  const auto a = random_numbers(numbers), b = random_numbers(numbers);
  const Buffer<float> c(numbers, what);
  constexpr Index workspace_bytes = Index{32} << 20;
  const Buffer<unsigned char> workspace(workspace_bytes, what);
  cublasHandle_t handle = nullptr;
  check(cublasCreate(&handle), "cublasCreate", what);
  const Graph graph([&](cudaStream_t stream) {
    const float one = 1, zero = 0;
    check(cublasSetStream(handle, stream), "cublasSetStream", what);
    check(cublasSetWorkspace(handle, workspace.data(), workspace_bytes), "cublasSetWorkspace",
          what);
    check(cublasSgemm(handle, CUBLAS_OP_N, CUBLAS_OP_N, side, side, side, &one, a.data(), side,
                      b.data(), side, &zero, c.data(), side),
          "cublasSgemm", what);
  });
  std::vector<double> seconds;
  for (int round = 0; round < 15; ++round) seconds.push_back(graph.seconds(20));
  std::ranges::nth_element(seconds, seconds.begin() + 7);
  check(cublasDestroy(handle), "cublasDestroy", what);
  return static_cast<double>(numbers) * side / seconds[7];
}

enum class Pass { forward, both };

void run(benchmark::State& state, const std::vector<cuda::Chain>& chains, Pass pass) {
  cuda::Contraction<float> contraction{cuda::ContractionPlan(chains)};
  const cuda::ContractionPlan& plan = contraction.plan();
  std::vector<Buffer<float>> buffers;
  for (const TensorUse& use : plan.tensors()) buffers.push_back(random_numbers(use.numbers));
  const auto layers = [&]<class T>(TensorUse::Role role, std::type_identity<T>) {
    std::vector<cuda::DeviceLayer<T>> of_role;
    const auto uses = plan.tensors(role);
    const auto first = static_cast<std::size_t>(uses.data() - plan.tensors().data());
    for (std::size_t t = first; t < first + uses.size(); t += 2) {
      of_role.push_back({buffers[t].span(), buffers[t + 1].span()});
    }
    return of_role;
  };
  using Role = TensorUse::Role;
  constexpr std::type_identity<const float> read;
  constexpr std::type_identity<float> written;
  const auto reads = layers(Role::layer, read), given = layers(Role::result_gradient, read);
  const auto results = layers(Role::result, written),
             gradients = layers(Role::layer_gradient, written);
  const Graph graph([&](cudaStream_t stream) {
    contraction.forward(reads, results, stream);
    if (pass == Pass::both) contraction.backward(reads, given, gradients, stream);
  });
  const auto on_host = [&](Role role) {
    std::vector<std::vector<float>> tensors;
    const auto uses = plan.tensors(role);
    const auto first = static_cast<std::size_t>(uses.data() - plan.tensors().data());
    for (std::size_t t = first; t < first + uses.size(); ++t) {
      buffers[t].copy_to(tensors.emplace_back(static_cast<std::size_t>(buffers[t].size())), what);
    }
    return tensors;
  };
  graph.seconds(1);
  if (!are_contracted(chains, on_host(Role::layer), on_host(Role::result))) {
    state.SkipWithError("the contraction is wrong");
    return;
  }
  constexpr int launches = 20;
  for (auto _ : state) state.SetIterationTime(graph.seconds(launches));
  Index multiply_adds = plan.forward().multiply_adds;
  int kernels = plan.forward().launches(), gemms = static_cast<int>(plan.forward().gemms.size());
  if (pass == Pass::both) {
    multiply_adds += plan.backward().multiply_adds;
    kernels += plan.backward().launches();
    gemms += static_cast<int>(plan.backward().gemms.size());
  }
  using Counter = benchmark::Counter;
  const auto work = static_cast<double>(multiply_adds);
  state.counters["MAC"] = work;
  state.counters["flop/s"] = {2 * work, Counter::kIsIterationInvariantRate};
  state.counters["launches"] = kernels;
  state.counters["gemms"] = gemms;
  state.counters["share_of_cublas"] = {work / blas_rate(multiply_adds),
                                       Counter::kIsIterationInvariantRate};
}

}  // namespace
}  // namespace concertina::benchmarks

int main(int argc, char** argv) {
  using namespace concertina::benchmarks;
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::fputs("bench_cuda_contraction: there is no CUDA device; nothing measured\n", stderr);
    return 1;
  }
  cudaDeviceProp properties{};
  concertina::cuda::check(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties", what);
  benchmark::AddCustomContext("device", properties.name);
  for (const auto& network : networks()) {
    for (const Pass pass : {Pass::forward, Pass::both}) {
      const std::string name = network.name + (pass == Pass::both ? "_with_gradient" : "");
      benchmark::RegisterBenchmark(name.c_str(), run, network.chains, pass)
          ->UseManualTime()
          ->Repetitions(5)
          ->ReportAggregatesOnly()
          ->Unit(benchmark::kMicrosecond);
    }
  }
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 2;
  benchmark::RunSpecifiedBenchmarks();
}
