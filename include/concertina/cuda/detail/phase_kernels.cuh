// The kernels that run the phases of a contraction, and how half precision is loaded and stored in
// them.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/cuda/detail/device_block.cuh>
#include <concertina/cuda/detail/matrices.hpp>
#include <concertina/cuda/detail/tensor_core.cuh>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace concertina::cuda::detail {

/// By intrinsics: PyTorch's flags for extensions take the conversions of CUDA's half types away.
template <>
struct Conversion<__half, float> {
  __device__ static float load(__half element) { return __half2float(element); }
  __device__ static __half store(float sum) { return __float2half_rn(sum); }
};
template <>
struct Conversion<__nv_bfloat16, float> {
  __device__ static float load(__nv_bfloat16 element) { return __bfloat162float(element); }
  __device__ static __nv_bfloat16 store(float sum) { return __float2bfloat16_rn(sum); }
};

template <class Program>
__global__ void __maxnreg__(Program::most_registers)
    run_phase(const __grid_constant__ Program program, bool is_followed) {
#if __CUDA_ARCH__ >= 900
  // Of the next phase, which waits by itself. What else follows must not begin before the end.
  if (is_followed) cudaTriggerProgrammaticLaunchCompletion();
#endif
  extern __shared__ __align__(16) unsigned char memory[];
  DeviceBlock<Program::threads> block(memory);
  program(block, static_cast<Index>(blockIdx.x));
}

/// A phase on tensor cores. One block of a multiprocessor's, which takes most of its registers and
/// shared memory.
template <class Program>
__global__ void __launch_bounds__(Program::threads, 1)
    run_tensor_cores(const __grid_constant__ Program program) {
  extern __shared__ __align__(1024) unsigned char tiles[];
  DeviceGrid<Program::threads, TensorCoreDeviceBlock<Program::threads>> grid(tiles);
  program(grid);
}

}  // namespace concertina::cuda::detail
