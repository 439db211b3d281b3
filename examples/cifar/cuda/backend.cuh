// The CUDA device that is current, as a backend of the tape: streams, whose launches are
// recorded and replayed.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "device_tape.hpp"

#include <concertina/cuda/buffer.cuh>
#include <concertina/cuda/contraction.cuh>
#include <concertina/cuda/error.cuh>
#include <concertina/cuda/launch.cuh>

#include <cuda_runtime_api.h>

#include <map>
#include <memory>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace cifar::cuda {

class CudaBackend {
 public:
  /// Throws  DeviceError where there is no device; so do all calls that fail
  CudaBackend() {
    const std::string purpose = "a training on a device; without one use --device cpu";
    int least = 0;
    check(cudaDeviceGetStreamPriorityRange(&least, &first_priority_),
          "cudaDeviceGetStreamPriorityRange", purpose);
    add_stream(first_priority_, purpose);
    cudaEvent_t event = nullptr;
    check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreateWithFlags",
          purpose);
    event_.reset(event);
  }
  CudaBackend(const CudaBackend&) = delete;
  CudaBackend& operator=(const CudaBackend&) = delete;

  cudaStream_t handle(Stream stream = Stream::origin) const {
    return streams_[static_cast<std::size_t>(stream)].get();
  }

  /// The smaller a priority's number, the earlier; the device takes what is out of its range as the
  /// nearest that is not.
  Stream stream(int rank) {
    add_stream(first_priority_ + rank, "a layer's stream");
    return static_cast<Stream>(streams_.size() - 1);
  }

  template <class T>
  T* allocate(Index count) {
    using concertina::cuda::Buffer;
    const auto buffer = std::make_shared<Buffer<T>>(count, "a training's numbers");
    numbers_.push_back(buffer);
    return buffer->data();
  }

  template <class T>
  void upload(std::span<const T> from, T* to) {
    copy(to, from.data(), from.size_bytes(), cudaMemcpyHostToDevice);
  }
  template <class T>
  void download(const T* from, std::span<T> to) {
    copy(to.data(), from, to.size_bytes(), cudaMemcpyDeviceToHost);
  }

  template <class Program>
  void run(const Program& program, const std::string& purpose, Stream stream) {
    concertina::cuda::launch(program, handle(stream), purpose);
  }

  template <class Scalar>
  class Contraction {
   public:
    Contraction(CudaBackend& backend, const concertina::cuda::PlannedForm& form, Stream stream)
        : stream_(backend.handle(stream)), contraction_(plan_of(form)) {}

    void forward(const Expansion<Scalar>& at) {
      contraction_.forward(at.layers, at.products, stream_);
    }
    void backward(const Expansion<Scalar>& at) {
      contraction_.backward(at.layers, at.product_gradients, at.layer_gradients, stream_);
    }

   private:
    static concertina::cuda::ContractionPlan plan_of(const concertina::cuda::PlannedForm& form) {
      return concertina::cuda::ContractionPlan(std::vector{form},
                                               {.math = concertina::cuda::fastest_math<Scalar>()});
    }

    cudaStream_t stream_;
    concertina::cuda::Contraction<Scalar> contraction_;
  };

  /// An event that is recorded again does not change what waits for it already.
  void wait(Stream later, Stream earlier) {
    if (later == earlier) return;
    const std::string purpose = "the streams of a step";
    check(cudaEventRecord(event_.get(), handle(earlier)), "cudaEventRecord", purpose);
    check(cudaStreamWaitEvent(handle(later), event_.get(), 0), "cudaStreamWaitEvent", purpose);
  }

  /// The first time they are just launched: what kernels load and libraries allocate when they are
  /// first used cannot be recorded. The second time they become a graph. Some thirty launches of a
  /// few microseconds each would otherwise wait for the host.
  template <class Launches>
  void repeat(const StepKind& kind, Launches&& launches) {
    const auto found = graphs_.find(kind);
    if (found == graphs_.end()) {
      launches();
      graphs_.try_emplace(kind);
      return;
    }
    if (!found->second) found->second = recorded(launches);
    check(cudaGraphLaunch(found->second.get(), handle()), "cudaGraphLaunch", "a step");
  }

  void forget() noexcept {
    // A failure is thrown where numbers are copied; here nobody waits for them any more.
    for (const auto& stream : streams_) static_cast<void>(cudaStreamSynchronize(stream.get()));
    graphs_.clear();
  }

 private:
  struct Deleter {
    void operator()(cudaStream_t stream) const { static_cast<void>(cudaStreamDestroy(stream)); }
    void operator()(cudaEvent_t event) const { static_cast<void>(cudaEventDestroy(event)); }
    void operator()(cudaGraph_t graph) const { static_cast<void>(cudaGraphDestroy(graph)); }
    void operator()(cudaGraphExec_t graph) const { static_cast<void>(cudaGraphExecDestroy(graph)); }
  };
  template <class Handle>
  using Owner = std::unique_ptr<std::remove_pointer_t<Handle>, Deleter>;

  static void check(cudaError_t status, const char* call, const std::string& purpose) {
    concertina::cuda::check(status, call, purpose);
  }

  /// A non-blocking one: another thread may use the default stream while this one is captured.
  void add_stream(int priority, const std::string& purpose) {
    cudaStream_t stream = nullptr;
    check(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, priority),
          "cudaStreamCreateWithPriority", purpose);
    streams_.emplace_back(stream);
  }

  void copy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind) {
    if (bytes == 0) return;
    check(cudaMemcpyAsync(to, from, bytes, kind, handle()), "cudaMemcpyAsync",
          "a training's numbers");
    check(cudaStreamSynchronize(handle()), "cudaStreamSynchronize", "a training");
  }

  template <class Launches>
  Owner<cudaGraphExec_t> recorded(Launches&& launches) {
    const std::string purpose = "the graph of a step";
    check(cudaStreamBeginCapture(handle(), cudaStreamCaptureModeThreadLocal),
          "cudaStreamBeginCapture", purpose);
    cudaGraph_t graph = nullptr;
    try {
      launches();
    } catch (...) {  // or the stream would go on recording
      static_cast<void>(cudaStreamEndCapture(handle(), &graph));
      const Owner<cudaGraph_t> owner(graph);
      static_cast<void>(cudaGetLastError());
      throw;
    }
    check(cudaStreamEndCapture(handle(), &graph), "cudaStreamEndCapture", purpose);
    const Owner<cudaGraph_t> owner(graph);
    cudaGraphExec_t executable = nullptr;
    check(cudaGraphInstantiate(&executable, graph, cudaGraphInstantiateFlagUseNodePriority),
          "cudaGraphInstantiate", purpose);
    return Owner<cudaGraphExec_t>(executable);
  }

  int first_priority_ = 0;
  std::vector<std::shared_ptr<void>> numbers_;
  std::vector<Owner<cudaStream_t>> streams_;  // the origin first
  Owner<cudaEvent_t> event_;
  std::map<StepKind, Owner<cudaGraphExec_t>> graphs_;
};

static_assert(Backend<CudaBackend>);

}  // namespace cifar::cuda
