// Contraction and its gradient on a device, of whole networks' expanded layers: a pass captured in
// a CUDA graph, timed by events, beside cuBLAS's own rate for about as many multiply-adds.
// SPDX-License-Identifier: Apache-2.0
#include "networks.hpp"

#include <concertina/cuda/contraction.cuh>
#include <concertina/random.hpp>

#include <benchmark/benchmark.h>

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdio>
#include <memory>
#include <optional>
#include <random>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace concertina::benchmarks {
namespace {

using cuda::Buffer, cuda::check, cuda::TensorUse;

constexpr const char* what = "a benchmark";

/// Work captured in a graph, and the milliseconds of one launch of it.
class Graph {
 public:
  template <std::invocable<cudaStream_t> Record>
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

/// Random elements in the device's memory.
Buffer<float> random_elements(Index count) {
  std::mt19937_64 generator(1);
  std::vector<float> elements(static_cast<std::size_t>(count));
  for (float& element : elements) element = static_cast<float>(random_uniform(generator, 1));
  return Buffer<float>(elements, what);
}

struct Blas {
  cublasHandle_t handle = nullptr;

  Blas() { check(cublasCreate(&handle), "cublasCreate", what); }
  Blas(const Blas&) = delete;
  Blas& operator=(const Blas&) = delete;
  ~Blas() { static_cast<void>(cublasDestroy(handle)); }
};

/// Multiply-adds per second of cuBLAS for a square product of at least as many. Its side is a
/// multiple of 64: for others cuBLAS has slower kernels.
double blas_rate(Index multiply_adds) {
  constexpr int tile = 64;
  const int side =
      tile * static_cast<int>(std::ceil(std::cbrt(static_cast<double>(multiply_adds)) / tile));
  const Index elements = Index{side} * side;
  const auto a = random_elements(elements), b = random_elements(elements);
  const Buffer<float> c(elements, what);
  constexpr Index workspace_bytes = Index{32} << 20;
  const Buffer<unsigned char> workspace(workspace_bytes, what);
  const Blas blas;
  const Graph graph([&](cudaStream_t stream) {
    const float one = 1, zero = 0;
    check(cublasSetStream(blas.handle, stream), "cublasSetStream", what);
    check(cublasSetWorkspace(blas.handle, workspace.data(), workspace_bytes), "cublasSetWorkspace",
          what);
    check(cublasSgemm(blas.handle, CUBLAS_OP_N, CUBLAS_OP_N, side, side, side, &one, a.data(), side,
                      b.data(), side, &zero, c.data(), side),
          "cublasSgemm", what);
  });
  std::vector<double> seconds;
  for (int round = 0; round < 15; ++round) seconds.push_back(graph.seconds(20));
  std::ranges::nth_element(seconds, seconds.begin() + 7);
  return static_cast<double>(elements) * side / seconds[7];
}

enum class Pass { forward, both };

/// A network with random tensors on the device, whose contraction has been compared with the
/// host's.
class Network {
 public:
  explicit Network(const NamedForms& network)
      : name_(network.name), contraction_(cuda::ContractionPlan(network.forms)) {
    for (const TensorUse& use : plan().tensors()) {
      const bool is_used = use.role != Role::layer_gradient;  // read, or compared
      buffers_.push_back(is_used ? random_elements(use.size) : Buffer<float>(use.size, what));
    }
    constexpr std::type_identity<const float> read;
    constexpr std::type_identity<float> written;
    layers_ = layers(Role::layer, read);
    given_ = layers(Role::result_gradient, read);
    results_ = layers(Role::result, written);
    gradients_ = layers(Role::layer_gradient, written);
    contraction_.forward(layers_, results_, nullptr);
    check(cudaStreamSynchronize(nullptr), "cudaStreamSynchronize", what);
    is_right_ = are_contracted(network.forms, on_host(Role::layer), on_host(Role::result));
  }

  const std::string& name() const { return name_; }
  const cuda::ContractionPlan& plan() const { return contraction_.plan(); }
  bool is_right() const { return is_right_; }

  void run(Pass pass, cudaStream_t stream) {
    contraction_.forward(layers_, results_, stream);
    if (pass == Pass::both) contraction_.backward(layers_, given_, gradients_, stream);
  }

 private:
  using Role = TensorUse::Role;

  std::span<const Buffer<float>> buffers(Role role) const {
    const auto uses = plan().tensors(role);
    return std::span(buffers_).subspan(
        static_cast<std::size_t>(uses.data() - plan().tensors().data()), uses.size());
  }
  template <class T>
  std::vector<cuda::DeviceLayer<T>> layers(Role role, std::type_identity<T>) const {
    std::vector<cuda::DeviceLayer<T>> of_role;
    const auto tensors = buffers(role);
    for (std::size_t t = 0; t < tensors.size(); t += 2) {
      of_role.push_back({tensors[t].span(), tensors[t + 1].span()});
    }
    return of_role;
  }
  std::vector<std::vector<float>> on_host(Role role) const {
    std::vector<std::vector<float>> tensors;
    for (const Buffer<float>& buffer : buffers(role)) {
      buffer.copy_to(tensors.emplace_back(static_cast<std::size_t>(buffer.size())), what);
    }
    return tensors;
  }

  std::string name_;
  cuda::Contraction<float> contraction_;
  std::vector<Buffer<float>> buffers_;
  std::vector<cuda::DeviceLayer<const float>> layers_, given_;
  std::vector<cuda::DeviceLayer<float>> results_, gradients_;
  bool is_right_ = false;
};

/// What is timed. Made once, however often it is repeated: drawing and comparing the elements of a
/// large network takes the host seconds.
struct Timed {
  std::shared_ptr<Network> network;
  Pass pass;
  Graph graph;
  double blas_rate;

  Timed(std::shared_ptr<Network> of, Pass of_pass)
      : network(std::move(of)),
        pass(of_pass),
        graph([this](cudaStream_t stream) { network->run(pass, stream); }),
        blas_rate(benchmarks::blas_rate(multiply_adds())) {}

  Index multiply_adds() const {
    return sum([](const cuda::detail::Sequence& sequence) { return sequence.multiply_adds; });
  }
  template <class Count>
  Index sum(Count&& count) const {
    const cuda::ContractionPlan& plan = network->plan();
    return count(plan.forward()) + (pass == Pass::both ? count(plan.backward()) : 0);
  }
};

/// The last one asked for; benchmarks run one after another.
const Timed& timed(const NamedForms& forms, Pass pass) {
  static std::optional<Timed> last;
  if (last && last->network->name() == forms.name && last->pass == pass) return *last;
  auto network = last && last->network->name() == forms.name ? last->network : nullptr;
  last.reset();  // its memory, before more is asked for
  if (!network) network = std::make_shared<Network>(forms);
  return last.emplace(std::move(network), pass);
}

void run(benchmark::State& state, const NamedForms& forms, Pass pass) {
  const Timed& work = timed(forms, pass);
  if (!work.network->is_right()) {
    state.SkipWithError("the contraction is wrong");
    return;
  }
  constexpr int launches = 20;  // iterations in one go
  while (state.KeepRunningBatch(launches)) {
    state.SetIterationTime(launches * work.graph.seconds(launches));
  }
  using Counter = benchmark::Counter;
  const auto multiply_adds = static_cast<double>(work.multiply_adds());
  state.counters["MAC"] = multiply_adds;
  state.counters["flop/s"] = {2 * multiply_adds, Counter::kIsIterationInvariantRate};
  state.counters["launches"] = static_cast<double>(
      work.sum([](const cuda::detail::Sequence& sequence) { return std::ssize(sequence.phases); }));
  state.counters["gemms"] = static_cast<double>(
      work.sum([](const cuda::detail::Sequence& sequence) { return std::ssize(sequence.gemms); }));
  state.counters["share_of_cublas"] = {multiply_adds / work.blas_rate,
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
      benchmark::RegisterBenchmark(name.c_str(), run, network, pass)
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
