// Memory of the device that is freed by itself.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/cuda/detail/error.cuh>
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
  Buffer(std::span<const T> elements, const std::string& purpose)
      : Buffer(std::ssize(elements), purpose) {
    copy_from(elements, purpose);
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

  /// Copies that return when they are done. Throw ShapeError where the counts differ.
  void copy_from(std::span<const T> elements, const std::string& purpose) {
    require_count(elements.size(), purpose);
    if (count_ == 0) return;
    check(cudaMemcpy(data_, elements.data(), bytes(), cudaMemcpyHostToDevice), "cudaMemcpy",
          purpose);
    // From pageable memory it returns when the elements are on their way, which streams that do not
    // wait for the default one would not notice.
    check(cudaStreamSynchronize(cudaStreamLegacy), "cudaStreamSynchronize", purpose);
  }
  void copy_to(std::span<T> elements, const std::string& purpose) const {
    require_count(elements.size(), purpose);
    if (count_ == 0) return;
    check(cudaMemcpy(elements.data(), data_, bytes(), cudaMemcpyDeviceToHost), "cudaMemcpy",
          purpose);
  }

 private:
  std::size_t bytes() const { return static_cast<std::size_t>(count_) * sizeof(T); }
  void require_count(std::size_t count, const std::string& purpose) const {
    if (static_cast<Index>(count) == count_) return;
    throw ShapeError("a copy of " + std::to_string(count) + " elements, where the buffer has " +
                     std::to_string(count_) + ", for " + purpose);
  }

  T* data_ = nullptr;
  Index count_ = 0;
};

}  // namespace concertina::cuda
