// What device code is written against: a block of threads that meet at barriers. On the device it
// is one of CUDA's blocks; tests run the same programs on the host.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/shape.hpp>

#include <concepts>
#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__
#define CONCERTINA_DEVICE __device__
#define CONCERTINA_HOST_DEVICE __host__ __device__
#define CONCERTINA_UNROLL _Pragma("unroll")
#define CONCERTINA_UNROLL_BY(times) _Pragma(CONCERTINA_TEXT(unroll times))
#define CONCERTINA_TEXT(text) #text
#else
#define CONCERTINA_DEVICE
#define CONCERTINA_HOST_DEVICE
#define CONCERTINA_UNROLL
#define CONCERTINA_UNROLL_BY(times)
#endif

namespace concertina::cuda {

/// A thread block, and what a program asks of it:
/// - each_thread(f) calls f(thread) for every thread, and is a barrier;
/// - shared<T>(count) is shared memory, uninitialised: get(i), set(i, value), and get(i, to)
///   for as many neighbours as `to` has, a power of two of them from a multiple of it on;
/// - share(object) is a copy of what no launch writes, in shared memory, and is a barrier;
/// - PerThread<T> is a T for each thread, x[thread], kept across barriers;
/// - read(address) and write(address, value) access global memory;
/// - wait() returns once the stream's earlier launches have ended, where a launch may begin before;
///   until then a block reads what no launch writes.
///
/// Between two barriers no thread may touch what another one writes, and between two launches no
/// block may touch what another block writes.
template <class B>
concept ThreadBlock =
    requires(B& block, const float* from, float* to, float element, float (&neighbours)[4]) {
      { B::threads } -> std::convertible_to<int>;
      { block.read(from) } -> std::same_as<float>;
      block.write(to, element);
      block.template shared<float>(1).get(0);
      block.template shared<float>(1).get(0, neighbours);
      block.template shared<float>(1).set(0, element);
      typename B::template PerThread<float>;
    };

/// A program that each block of a launch runs, a value that is copied to the device: blocks(), the
/// number of blocks; shared_bytes(), what it asks of shared() at most; and the call operator, with
/// the block and its index.
template <class P>
concept BlockProgram = std::copyable<P> && requires(const P& program) {
  { P::threads } -> std::convertible_to<int>;
  { program.blocks() } -> std::convertible_to<Index>;
  { program.shared_bytes() } -> std::convertible_to<std::size_t>;
};

/// Bytes that shared<T>(count) takes: allocations start at multiples of 16.
template <class T>
CONCERTINA_HOST_DEVICE constexpr std::size_t shared_size(std::size_t count) {
  constexpr std::size_t alignment = 16;
  return (count * sizeof(T) + alignment - 1) / alignment * alignment;
}

}  // namespace concertina::cuda
