// Launches of block programs on the device.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/cuda/block.hpp>
#include <concertina/cuda/detail/device_block.cuh>
#include <concertina/cuda/error.cuh>

#include <cuda_runtime.h>

#include <cstddef>
#include <limits>
#include <string>

namespace concertina::cuda {

namespace detail {

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

}  // namespace detail

/// Launches a program; returns before the device has run it. Nothing where it has no blocks.
/// Throws  DeviceError naming `purpose` where the launch is refused; SizeError for more blocks than
///         a grid has
template <BlockProgram Program>
void launch(const Program& program, cudaStream_t stream, const std::string& purpose) {
  const Index blocks = program.blocks();
  if (blocks == 0) return;
  if (blocks > std::numeric_limits<int>::max()) {
    throw SizeError(purpose + ": " + std::to_string(blocks) + " blocks are more than a grid has");
  }
  const std::size_t bytes = program.shared_bytes();
  detail::allow_shared_bytes(&detail::run_program<Program>, bytes, purpose);
  detail::run_program<Program>
      <<<static_cast<unsigned>(blocks), Program::threads, bytes, stream>>>(program);
  check(cudaGetLastError(), "cudaLaunchKernel", purpose);
}

}  // namespace concertina::cuda
