// Memory of the device that is freed by itself.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/cuda/error.cuh>
#include <concertina/shape.hpp>

#include <cuda_runtime_api.h>

#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace concertina::cuda {

/// Elements in the device's memory, uninitialised unless they are copied from the host.
template <class T>
  requires std::is_trivially_copyable_v<T>
class Buffer {
 public:
  Buffer() = default;

  /// Throws DeviceError naming `purpose` where there is no room.
  Buffer(Index count, const std::string& purpose) : count_(count) {
    if (count > 0) check(cudaMalloc(&data_, bytes()), "cudaMalloc", purpose);
  }
  /// Copies on the thread's own stream, and returns when that is done: the legacy default stream
  /// may not be used while another thread captures a stream that waits for it.
  Buffer(std::span<const T> elements, const std::string& purpose)
      : Buffer(std::ssize(elements), purpose) {
    if (count_ == 0) return;
    check(cudaMemcpyAsync(data_, elements.data(), bytes(), cudaMemcpyHostToDevice,
                          cudaStreamPerThread),
          "cudaMemcpyAsync", purpose);
    check(cudaStreamSynchronize(cudaStreamPerThread), "cudaStreamSynchronize", purpose);
  }
  Buffer(Buffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), count_(std::exchange(other.count_, 0)) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(count_, other.count_);
    return *this;
  }
  ~Buffer() { static_cast<void>(cudaFree(data_)); }

  T* data() const { return data_; }
  Index size() const { return count_; }

  /// The device's addresses, of which the host knows no more than how many they are.
  std::span<T> span() const { return {data_, static_cast<std::size_t>(count_)}; }

  /// A copy that waits for all streams but non-blocking ones, and returns when it is done; not
  /// while a stream is captured. Throws ShapeError where the counts differ.
  void copy_to(std::span<T> elements, const std::string& purpose) const {
    if (std::ssize(elements) != count_) {
      throw ShapeError("a copy to " + std::to_string(elements.size()) +
                       " elements, where the buffer has " + std::to_string(count_) + ", for " +
                       purpose);
    }
    if (count_ == 0) return;
    check(cudaMemcpy(elements.data(), data_, bytes(), cudaMemcpyDeviceToHost), "cudaMemcpy",
          purpose);
  }

 private:
  std::size_t bytes() const { return static_cast<std::size_t>(count_) * sizeof(T); }

  T* data_ = nullptr;
  Index count_ = 0;
};

}  // namespace concertina::cuda
