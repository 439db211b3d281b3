// A layer in a device's memory.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <span>

namespace concertina::cuda {

/// A layer's elements in the device's memory: weight [out][in / groups][kernel...], and bias [out]
/// or nothing; const where they are only read.
template <class T>
struct DeviceLayer {
  std::span<T> weight;
  std::span<T> bias = {};
};

}  // namespace concertina::cuda
