// Trainings on the CUDA device that is current.
// SPDX-License-Identifier: Apache-2.0
#include "training.hpp"

#include "backend.cuh"

#include <memory>

namespace cifar::cuda {

template <class Scalar>
std::unique_ptr<Accelerator<Scalar>> cuda_accelerator(const TrainingPlan& plan) {
  return std::make_unique<BackendTraining<Scalar, CudaBackend>>(plan);
}

template std::unique_ptr<Accelerator<float>> cuda_accelerator(const TrainingPlan&);
template std::unique_ptr<Accelerator<double>> cuda_accelerator(const TrainingPlan&);

}  // namespace cifar::cuda
