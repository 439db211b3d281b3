// Launches of block programs on the device.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/cuda/block.hpp>
#include <concertina/cuda/detail/run_program.cuh>
#include <concertina/cuda/error.cuh>

#include <cuda_runtime.h>

#include <cstddef>
#include <limits>
#include <string>

namespace concertina::cuda {

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
