// The operators on CUDA devices, over the device's contraction: a library of its own, loaded where
// PyTorch has CUDA.
// SPDX-License-Identifier: Apache-2.0
#include "chain.hpp"

#include <concertina/cuda/contraction.cuh>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <dlfcn.h>

#include <algorithm>
#include <compare>
#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <span>
#include <type_traits>
#include <utility>
#include <vector>

namespace {

using namespace concertina::torch_operators;
namespace cuda = concertina::cuda;
using concertina::ConvShape;
using concertina::Index;

/// PyTorch's current stream of a device. The function is in a library that only a PyTorch with CUDA
/// has, and has loaded by now; so this one needs no such PyTorch to be built or loaded.
cudaStream_t current_stream(int device) {
  static const auto get = [] {
    void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* const symbol = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
    STD_TORCH_CHECK(symbol, "concertina: this PyTorch has no CUDA streams");
    return reinterpret_cast<AOTITorchError (*)(std::int32_t, void**)>(symbol);
  }();
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(get(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

/// Chains that are contracted together: how many layers each has, and all their layers.
struct Chains {
  Integers counts, form;

  auto operator<=>(const Chains&) const = default;
};

/// A plan with its tables on a device; passes are lent their workspace by PyTorch's allocator, in
/// which tensors belong to streams and graphs.
template <class Scalar>
struct Planned {
  std::vector<ConvShape<rank>> results;
  cuda::Contraction<Scalar> contraction;
  std::uint64_t last_use = 0;
  bool in_graph = false;

  /// On the current device.
  explicit Planned(const Chains& chains) : Planned(divided(decoded(chains.form), chains.counts)) {}

 private:
  explicit Planned(const std::vector<std::vector<ConvShape<rank>>>& chains)
      : contraction(plan(results, chains), cuda::Workspace::lent) {}

  static cuda::ContractionPlan plan(std::vector<ConvShape<rank>>& results,
                                    const std::vector<std::vector<ConvShape<rank>>>& chains) {
    std::vector<cuda::PlannedForm> forms;
    for (const auto& chain : chains) {
      forms.emplace_back(chain, concertina::interior_only);
      results.push_back(forms.back().contracted());
    }
    return cuda::ContractionPlan(forms, {.math = cuda::fastest_math<Scalar>()});
  }
};

/// Everything planned so far in one scalar, for the thread that holds the lock. What a graph has
/// captured stays; of the rest the least recently used goes where there is too much.
template <class Scalar>
class Plans {
 public:
  std::mutex lock;

  Planned<Scalar>& get(const Chains& chains, int device, cudaStream_t stream) {
    cudaStreamCaptureStatus capture{};
    cuda::check(cudaStreamIsCapturing(stream, &capture), "cudaStreamIsCapturing", "a contraction");
    const bool captured = capture != cudaStreamCaptureStatusNone;
    auto found = plans_.find({device, chains});
    if (found == plans_.end()) {
      STD_TORCH_CHECK(!captured,
                      "concertina: these layers are contracted for the first time while "
                      "a CUDA graph is captured; run the model once before that");
      found = plans_.try_emplace({device, chains}, chains).first;
    }
    found->second.last_use = ++uses_;
    found->second.in_graph |= captured;
    if (!captured && std::ssize(plans_) > most) drop_one();
    return found->second;
  }

 private:
  static constexpr Index most = 256;

  /// The latest use is of what was asked for. A plan's tables may still be read: cudaFree waits, on
  /// the plan's own device.
  void drop_one() {
    const auto oldest = std::ranges::min_element(plans_, {}, [](const auto& entry) {
      const auto& [key, planned] = entry;
      return std::pair(planned.in_graph, planned.last_use);
    });
    if (oldest->second.in_graph || oldest->second.last_use == uses_) return;
    const torch::stable::accelerator::DeviceGuard guard(oldest->first.first);
    plans_.erase(oldest);
  }

  std::map<std::pair<int, Chains>, Planned<Scalar>> plans_;
  std::uint64_t uses_ = 0;
};

/// Never destroyed: at exit CUDA may be gone before it.
template <class Scalar>
Plans<Scalar>& plans() {
  static auto& all = *new Plans<Scalar>;
  return all;
}

template <class Scalar>
std::vector<cuda::DeviceLayer<const Scalar>> read(const std::vector<Tensor>& tensors) {
  std::vector<cuda::DeviceLayer<const Scalar>> layers;
  for (const Tensor& tensor : tensors) {
    layers.push_back({std::span(static_cast<const Scalar*>(tensor.const_data_ptr()),
                                static_cast<std::size_t>(tensor.numel()))});
  }
  return layers;
}
template <class Scalar>
std::vector<cuda::DeviceLayer<Scalar>> written(const std::vector<Tensor>& tensors) {
  std::vector<cuda::DeviceLayer<Scalar>> layers;
  for (const Tensor& tensor : tensors) {
    layers.push_back({std::span(static_cast<Scalar*>(tensor.mutable_data_ptr()),
                                static_cast<std::size_t>(tensor.numel()))});
  }
  return layers;
}

/// One pass on PyTorch's current stream of the tensors' device, which the caller has made current.
template <class Scalar>
class Pass {
 public:
  Pass(const std::vector<Tensor>& weights, const Chains& chains)
      : weights_(weights),
        stream_(current_stream(weights.front().get_device_index())),
        lock_(plans<Scalar>().lock),
        planned_(plans<Scalar>().get(chains, weights.front().get_device_index(), stream_)),
        memory_(torch::stable::new_empty(
            weights.front(), Integers{planned_.contraction.workspace_bytes()}, ScalarType::Byte)),
        workspace_(static_cast<std::byte*>(memory_.mutable_data_ptr()),
                   static_cast<std::size_t>(memory_.numel())) {
    std::size_t layer = 0;
    for (std::size_t chain = 0; chain < chains.counts.size(); ++chain) {
      STD_TORCH_CHECK(layer < weights.size(), "concertina: fewer weights than layers");
      results_.push_back(torch::stable::new_empty(
          weights.front(), weight_sizes(planned_.results[chain], own_rank(weights[layer]))));
      layer += static_cast<std::size_t>(chains.counts[chain]);
    }
    planned_.contraction.forward(read<Scalar>(weights), written<Scalar>(results_), stream_,
                                 workspace_);
  }

  const std::vector<Tensor>& results() const { return results_; }

  std::vector<Tensor> backward(const std::vector<Tensor>& gradients) {
    std::vector<Tensor> result;
    for (const Tensor& weight : weights_) result.push_back(torch::stable::empty_like(weight));
    planned_.contraction.backward(read<Scalar>(weights_), read<Scalar>(gradients),
                                  written<Scalar>(result), stream_, workspace_);
    return result;
  }

 private:
  const std::vector<Tensor>& weights_;
  cudaStream_t stream_;
  std::scoped_lock<std::mutex> lock_;
  Planned<Scalar>& planned_;
  Tensor memory_;
  std::span<std::byte> workspace_;
  std::vector<Tensor> results_;
};

void require_one_device(const std::vector<Tensor>& tensors, const Tensor& like) {
  for (const Tensor& tensor : tensors) {
    STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == like.get_device_index(),
                    "concertina: tensors on several devices");
  }
}

/// Calls `use` with a value of the tensors' scalar type.
template <class Use>
auto with_scalar(const Tensor& tensor, Use&& use) {
  const ScalarType type = tensor.scalar_type();
  if (type == ScalarType::Float) return use(float());
  STD_TORCH_CHECK(type == ScalarType::Double, "concertina: weights are float or double");
  return use(double());
}

std::vector<Tensor> contract_many(std::vector<Tensor> weights, Integers counts, Integers form) {
  STD_TORCH_CHECK(!weights.empty(), "concertina: no layers");
  require_one_device(weights, weights.front());
  const torch::stable::accelerator::DeviceGuard guard(weights.front().get_device_index());
  weights = contiguous(weights, weights.front());
  return with_scalar(weights.front(), [&]<class Scalar>(Scalar) {
    return Pass<Scalar>(weights, {std::move(counts), std::move(form)}).results();
  });
}

/// Contracts again, since nothing is kept of the last time.
std::vector<Tensor> contract_many_backward(std::vector<Tensor> gradients,
                                           std::vector<Tensor> weights, Integers counts,
                                           Integers form) {
  STD_TORCH_CHECK(!weights.empty(), "concertina: no layers");
  require_one_device(weights, weights.front());
  require_one_device(gradients, weights.front());
  const torch::stable::accelerator::DeviceGuard guard(weights.front().get_device_index());
  gradients = contiguous(gradients, weights.front());
  weights = contiguous(weights, weights.front());
  return with_scalar(weights.front(), [&]<class Scalar>(Scalar) {
    return Pass<Scalar>(weights, {std::move(counts), std::move(form)}).backward(gradients);
  });
}

Tensor contract(std::vector<Tensor> weights, Integers form) {
  Integers counts{static_cast<std::int64_t>(weights.size())};
  return contract_many(std::move(weights), std::move(counts), std::move(form)).front();
}

std::vector<Tensor> contract_backward(Tensor gradient, std::vector<Tensor> weights, Integers form) {
  Integers counts{static_cast<std::int64_t>(weights.size())};
  return contract_many_backward({gradient}, std::move(weights), std::move(counts), std::move(form));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(concertina, CUDA, library) {
  library.impl("contract", TORCH_BOX(&contract));
  library.impl("contract_backward", TORCH_BOX(&contract_backward));
  library.impl("contract_many", TORCH_BOX(&contract_many));
  library.impl("contract_many_backward", TORCH_BOX(&contract_many_backward));
}
