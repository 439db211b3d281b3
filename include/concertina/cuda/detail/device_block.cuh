// CUDA's block of threads and its grid, as block programs see them.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/cuda/block.hpp>

#include <cuda_runtime.h>

#include <cstddef>

namespace concertina::cuda::detail {

/// A block of CUDA's, one-dimensional.
template <int Threads>
class DeviceBlock {
 public:
  static constexpr int threads = Threads;

  /// With the launch's dynamic shared memory.
  __device__ explicit DeviceBlock(unsigned char* memory) : memory_(memory) {}

  template <class T>
  class PerThread {
   public:
    __device__ explicit PerThread(const DeviceBlock&) {}
    __device__ T& operator[](int) { return value_; }

   private:
    T value_;
  };

  template <class T>
  class Shared {
   public:
    __device__ explicit Shared(T* elements) : elements_(elements) {}
    __device__ T get(int i) const { return elements_[i]; }
    /// In one access of up to 16 bytes.
    template <int N>
    __device__ void get(int i, T (&to)[N]) const {
      constexpr int at_once = N * sizeof(T) <= 16 ? N : static_cast<int>(16 / sizeof(T));
      struct alignas(at_once * sizeof(T)) Neighbours {
        T elements[at_once];
      };
      CONCERTINA_UNROLL
      for (int n = 0; n < N; n += at_once) {
        const auto some = *reinterpret_cast<const Neighbours*>(elements_ + i + n);
        CONCERTINA_UNROLL
        for (int k = 0; k < at_once; ++k) to[n + k] = some.elements[k];
      }
    }
    __device__ void set(int i, T value) const { elements_[i] = value; }
    __device__ const T* address(int i) const { return elements_ + i; }

   private:
    T* elements_;
  };

  template <class F>
  __device__ void each_thread(F&& f) {
    f(static_cast<int>(threadIdx.x));
    __syncthreads();
  }

  template <class T>
  __device__ Shared<T> shared(int count) {
    T* const elements = reinterpret_cast<T*>(memory_ + used_);
    used_ += shared_size<T>(static_cast<std::size_t>(count));
    return Shared<T>(elements);
  }

  /// Its bytes side by side: loads that depend on no other, whatever is read of it.
  template <class T>
  __device__ const T& share(const T& object) {
    using Bytes = uint4;
    static_assert(alignof(T) % sizeof(Bytes) == 0 && sizeof(T) <= Threads * sizeof(Bytes));
    T* const copy = reinterpret_cast<T*>(memory_ + used_);
    used_ += shared_size<T>(1);
    if (const unsigned i = threadIdx.x; i < sizeof(T) / sizeof(Bytes)) {
      reinterpret_cast<Bytes*>(copy)[i] = reinterpret_cast<const Bytes*>(&object)[i];
    }
    __syncthreads();
    return *copy;
  }

  __device__ void wait() const {
#if __CUDA_ARCH__ >= 900
    cudaGridDependencySynchronize();
#endif
  }

  template <class T>
  __device__ T read(const T* address) const {
    return *address;
  }
  template <class T>
  __device__ void write(T* address, T value) const {
    *address = value;
  }

 private:
  unsigned char* memory_;
  std::size_t used_ = 0;
};

/// A grid of CUDA's, one-dimensional.
template <int Threads, class Block = DeviceBlock<Threads>>
class DeviceGrid {
 public:
  static constexpr int threads = Threads;

  /// With the launch's dynamic shared memory.
  __device__ explicit DeviceGrid(unsigned char* memory) : memory_(memory) {}

  __device__ int index() const { return static_cast<int>(blockIdx.x); }
  __device__ int blocks() const { return static_cast<int>(gridDim.x); }
  template <class F>
  __device__ void run(F&& f) const {
    Block block(memory_);
    f(block);
  }

 private:
  unsigned char* memory_;
};

}  // namespace concertina::cuda::detail
