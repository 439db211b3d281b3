// SPDX-License-Identifier: Apache-2.0
#include "passes.hpp"

#include <concertina/cuda/contraction.cuh>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <vector>

namespace concertina::test {

bool can_run() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) == cudaSuccess && devices > 0) return true;
  std::puts("skipped: no CUDA device");
  return false;
}

namespace {

using cuda::Buffer, cuda::check;

/// Tensors in the device's memory.
template <class T>
class DeviceTensors {
 public:
  template <class Bits>
  explicit DeviceTensors(const std::vector<std::vector<Bits>>& tensors) {
    static_assert(sizeof(Bits) == sizeof(T));
    for (const auto& tensor : tensors) buffers_.emplace_back(std::ssize(tensor), "a tensor");
  }

  /// Every byte.
  void fill(int byte) const {
    for (const Buffer<T>& buffer : buffers_) {
      if (buffer.size() == 0) continue;
      check(cudaMemset(buffer.data(), byte, static_cast<std::size_t>(buffer.size()) * sizeof(T)),
            "cudaMemset", "a test");
    }
  }

  template <class Bits>
  void copy_from(const std::vector<std::vector<Bits>>& tensors) const {
    for (std::size_t t = 0; t < tensors.size(); ++t) {
      if (tensors[t].empty()) continue;
      check(cudaMemcpy(buffers_[t].data(), tensors[t].data(), tensors[t].size() * sizeof(T),
                       cudaMemcpyDefault),
            "cudaMemcpy", "a test");
    }
  }

  template <class Const>
  std::vector<cuda::DeviceLayer<Const>> layers() const {
    std::vector<cuda::DeviceLayer<Const>> layers;
    for (std::size_t t = 0; t < buffers_.size(); t += 2) {
      layers.push_back({buffers_[t].span(), buffers_[t + 1].span()});
    }
    return layers;
  }

  template <class Bits>
  void copy_to(std::vector<std::vector<Bits>>& tensors) const {
    for (std::size_t t = 0; t < tensors.size(); ++t) {
      if (tensors[t].empty()) continue;
      check(cudaMemcpy(tensors[t].data(), buffers_[t].data(), tensors[t].size() * sizeof(T),
                       cudaMemcpyDefault),
            "cudaMemcpy", "a test");
    }
  }

 private:
  std::vector<Buffer<T>> buffers_;
};

/// Captured in a graph on a stream that does not wait for the default one, and launched twice:
/// first on zeros, so that whatever the second launch reads too early is wrong. In a workspace of
/// its own, or a lent one that nobody has written.
template <class T, class Bits>
void run_as(const cuda::ContractionPlan& plan, Passes<Bits>& passes, cuda::Workspace workspace) {
  cuda::Contraction<T> contraction(plan, workspace);
  const bool is_lent = workspace == cuda::Workspace::lent;
  const Buffer<std::byte> lent(is_lent ? contraction.workspace_bytes() : 0, "a test");
  const DeviceTensors<T> layers(passes.layers), results(passes.results),
      result_gradients(passes.result_gradients), layer_gradients(passes.layer_gradients);
  const auto reads = layers.template layers<const T>();
  const auto gradients = result_gradients.template layers<const T>();
  const auto writes = results.template layers<T>(), gives = layer_gradients.template layers<T>();

  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreateWithFlags",
        "a test");
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "cudaStreamBeginCapture",
        "a test");
  if (is_lent) {
    contraction.forward(reads, writes, stream, lent.span());
    contraction.backward(reads, gradients, gives, stream, lent.span());
  } else {
    contraction.forward(reads, writes, stream);
    contraction.backward(reads, gradients, gives, stream);
  }
  check(cudaStreamEndCapture(stream, &graph), "cudaStreamEndCapture", "a test");
  check(cudaGraphInstantiate(&executable, graph, 0), "cudaGraphInstantiate", "a test");

  for (const bool zeros : {true, false}) {
    if (zeros) {
      layers.fill(0), result_gradients.fill(0);
    } else {
      layers.copy_from(passes.layers), result_gradients.copy_from(passes.result_gradients);
    }
    constexpr int poison = 0xff;
    results.fill(poison), layer_gradients.fill(poison);
    check(cudaDeviceSynchronize(), "cudaDeviceSynchronize", "a test");
    check(cudaGraphLaunch(executable, stream), "cudaGraphLaunch", "a test");
    check(cudaStreamSynchronize(stream), "cudaStreamSynchronize", "a test");
  }
  results.copy_to(passes.results);
  layer_gradients.copy_to(passes.layer_gradients);
  check(cudaGraphExecDestroy(executable), "cudaGraphExecDestroy", "a test");
  check(cudaGraphDestroy(graph), "cudaGraphDestroy", "a test");
  check(cudaStreamDestroy(stream), "cudaStreamDestroy", "a test");
}

/// Of both, the second's results are kept, and the same if they are right.
template <class T, class Bits>
void run_as(const cuda::ContractionPlan& plan, Passes<Bits>& passes) {
  Passes<Bits> first = passes;
  run_as<T>(plan, first, cuda::Workspace::lent);
  run_as<T>(plan, passes, cuda::Workspace::own);
  if (first.results == passes.results && first.layer_gradients == passes.layer_gradients) return;
  throw Error("a contraction in a lent workspace has another result");
}

}  // namespace

template <class Bits>
void run_on_device(Storage storage, const cuda::ContractionPlan& plan, Passes<Bits>& passes) {
  if constexpr (sizeof(Bits) == 8) {
    if (storage == Storage::residue) return run_as<cuda::Residue>(plan, passes);
    return run_as<double>(plan, passes);
  }
  if constexpr (sizeof(Bits) == 4) return run_as<float>(plan, passes);
  if constexpr (sizeof(Bits) == 2) {
    if (storage == Storage::float16) return run_as<__half>(plan, passes);
    return run_as<__nv_bfloat16>(plan, passes);
  }
}

template void run_on_device(Storage, const cuda::ContractionPlan&, Passes<std::uint16_t>&);
template void run_on_device(Storage, const cuda::ContractionPlan&, Passes<std::uint32_t>&);
template void run_on_device(Storage, const cuda::ContractionPlan&, Passes<std::uint64_t>&);

}  // namespace concertina::test
