// Every call of CUDA and cuBLAS is checked; what fails says which call it was and what for.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/error.hpp>

#include <cublas_v2.h>
#include <cuda_runtime_api.h>

#include <string>

namespace concertina::cuda {

/// A call of CUDA or cuBLAS that failed; the message has the call, its reason and its purpose.
struct DeviceError : Error {
  using Error::Error;
};

/// Throws DeviceError unless the call succeeded: check(cudaFree(p), "cudaFree", "the workspace").
inline void check(cudaError_t status, const char* call, const std::string& purpose) {
  if (status == cudaSuccess) return;
  static_cast<void>(cudaGetLastError());  // or the next call would report it again
  throw DeviceError(std::string(call) + ": " + cudaGetErrorString(status) + " (" +
                    cudaGetErrorName(status) + "), for " + purpose);
}
inline void check(cublasStatus_t status, const char* call, const std::string& purpose) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  throw DeviceError(std::string(call) + ": " + cublasGetStatusString(status) + " (" +
                    cublasGetStatusName(status) + "), for " + purpose);
}

}  // namespace concertina::cuda
