// Trainings on the CUDA device that is current.
// SPDX-License-Identifier: Apache-2.0
#include "training.hpp"

#include "backend.cuh"
#include "expansion.hpp"

#include <concertina/cuda/contraction.cuh>

#include <memory>
#include <vector>

namespace cifar::cuda {
namespace {

/// All expanded layers of a network by the library's contraction.
template <class Scalar>
class CudaContractor final : public Contractor {
 public:
  CudaContractor(CudaBackend& backend, const std::vector<ExpandedLayer<Scalar>>& layers)
      : backend_(backend),
        at_(layers),
        contraction_(concertina::cuda::ContractionPlan(at_.forms)) {}

  void forward() override { contraction_.forward(at_.layers, at_.products, backend_.stream()); }
  void backward() override {
    contraction_.backward(at_.layers, at_.product_gradients, at_.layer_gradients,
                          backend_.stream());
  }

 private:
  CudaBackend& backend_;
  Expansions<Scalar> at_;
  concertina::cuda::Contraction<Scalar> contraction_;
};

}  // namespace

template <class Scalar>
std::unique_ptr<Accelerator<Scalar>> cuda_accelerator(const TrainingPlan& plan) {
  return std::make_unique<BackendTraining<Scalar, CudaBackend>>(
      plan, [](CudaBackend& backend, const auto& layers) {
        return std::make_unique<CudaContractor<Scalar>>(backend, layers);
      });
}

template std::unique_ptr<Accelerator<float>> cuda_accelerator(const TrainingPlan&);
template std::unique_ptr<Accelerator<double>> cuda_accelerator(const TrainingPlan&);

}  // namespace cifar::cuda
