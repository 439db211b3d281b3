// Trainings on the CUDA device that is current.
// SPDX-License-Identifier: Apache-2.0
#include "training.hpp"

#include "backend.cuh"
#include "expansion.hpp"

#include <concertina/cuda/contraction.cuh>

#include <memory>
#include <type_traits>

namespace cifar::cuda {
namespace {

/// An expanded layer by the library's contraction.
template <class Scalar>
class CudaContractor final : public Contractor {
 public:
  CudaContractor(CudaBackend& backend, const ExpandedLayer<Scalar>& layer, Stream stream)
      : stream_(backend.handle(stream)),
        at_(layer),
        contraction_(concertina::cuda::ContractionPlan(at_.forms, {.math = math})) {}

  void forward() override { contraction_.forward(at_.layers, at_.products, stream_); }
  void backward() override {
    contraction_.backward(at_.layers, at_.product_gradients, at_.layer_gradients, stream_);
  }

 private:
  using Math = concertina::cuda::Math;
  static constexpr Math math = std::is_same_v<Scalar, double> ? Math::fp64 : Math::bf16x6;

  cudaStream_t stream_;
  Expansion<Scalar> at_;
  concertina::cuda::Contraction<Scalar> contraction_;
};

}  // namespace

template <class Scalar>
std::unique_ptr<Accelerator<Scalar>> cuda_accelerator(const TrainingPlan& plan) {
  return std::make_unique<BackendTraining<Scalar, CudaBackend>>(
      plan, [](CudaBackend& backend, const auto& layer, Stream stream) {
        return std::make_unique<CudaContractor<Scalar>>(backend, layer, stream);
      });
}

template std::unique_ptr<Accelerator<float>> cuda_accelerator(const TrainingPlan&);
template std::unique_ptr<Accelerator<double>> cuda_accelerator(const TrainingPlan&);

}  // namespace cifar::cuda
