// Every call of CUDA and cuBLAS is checked; what fails says which call it was and what for.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/error.hpp>

#include <cublas_v2.h>
#include <cuda_runtime_api.h>

#include <string>
#include <type_traits>

namespace concertina::cuda {

/// A call of CUDA or cuBLAS that failed; the message has the call, its reason and its purpose.
struct DeviceError : Error {
  using Error::Error;
};

namespace detail {

/// `purpose` is text, or what makes it once it is needed.
template <class Purpose>
[[noreturn]] void throw_device_error(const char* call, const char* reason, const char* name,
                                     const Purpose& purpose) {
  std::string text;
  if constexpr (std::is_invocable_v<const Purpose&>) {
    text = purpose();
  } else {
    text = purpose;
  }
  throw DeviceError(std::string(call) + ": " + reason + " (" + name + "), for " + text);
}

}  // namespace detail

/// Throws DeviceError unless the call succeeded: check(cudaFree(p), "cudaFree", "the workspace").
/// The purpose may be a function that makes the text, called only for the message.
template <class Purpose>
void check(cudaError_t status, const char* call, const Purpose& purpose) {
  if (status == cudaSuccess) return;
  static_cast<void>(cudaGetLastError());  // or the next call would report it again
  detail::throw_device_error(call, cudaGetErrorString(status), cudaGetErrorName(status), purpose);
}
template <class Purpose>
void check(cublasStatus_t status, const char* call, const Purpose& purpose) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  detail::throw_device_error(call, cublasGetStatusString(status), cublasGetStatusName(status),
                             purpose);
}

}  // namespace concertina::cuda
