// ONNX's integer types as C++'s.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/io/onnx.hpp>

#include <cstdint>

namespace tool {

/// Calls f with an integer of the type; false where it is none.
template <class F>
bool with_integer(concertina::onnx::DataType type, const F& f) {
  using concertina::onnx::DataType;
  switch (type) {
    case DataType::uint8: f(std::uint8_t{}); return true;
    case DataType::int8: f(std::int8_t{}); return true;
    case DataType::uint16: f(std::uint16_t{}); return true;
    case DataType::int16: f(std::int16_t{}); return true;
    case DataType::uint32: f(std::uint32_t{}); return true;
    case DataType::int32: f(std::int32_t{}); return true;
    case DataType::int64: f(std::int64_t{}); return true;
    default: return false;
  }
}

}  // namespace tool
