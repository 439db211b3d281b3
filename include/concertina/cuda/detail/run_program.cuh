// The kernel that runs a block program.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/cuda/block.hpp>
#include <concertina/cuda/detail/device_block.cuh>
#include <concertina/cuda/error.cuh>

#include <cuda_runtime.h>

#include <cstddef>
#include <string>

namespace concertina::cuda::detail {

template <BlockProgram Program>
__global__ void __launch_bounds__(Program::threads)
    run_program(const __grid_constant__ Program program) {
  extern __shared__ __align__(16) unsigned char memory[];
  DeviceBlock<Program::threads> block(memory);
  program(block, static_cast<Index>(blockIdx.x));
}

/// A block gets more than 48 KiB of shared memory only where its kernel asks for it.
template <class Kernel>
void allow_shared_bytes(Kernel* kernel, std::size_t bytes, const std::string& purpose) {
  constexpr std::size_t granted = 48 * 1024;
  if (bytes <= granted) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(bytes)),
        "cudaFuncSetAttribute", purpose);
}

}  // namespace concertina::cuda::detail
