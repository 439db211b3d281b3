// ONNX's types of elements as C++'s.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/io/onnx.hpp>
#include <concertina/scalar.hpp>

#include <cstdint>
#include <span>
#include <string>
#include <vector>

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

/// Calls f with a floating-point number of the type; with float where it is none.
template <class F>
auto with_float(concertina::onnx::DataType type, const F& f) {
  using concertina::onnx::DataType;
  switch (type) {
    case DataType::float64: return f(double{});
    case DataType::float16: return f(Eigen::half{});
    case DataType::bfloat16: return f(Eigen::bfloat16{});
    default: return f(float{});
  }
}

template <class Stored>
std::vector<Stored> rounded(std::span<const double> values) {
  std::vector<Stored> elements;
  elements.reserve(values.size());
  for (const double value : values) elements.push_back(concertina::convert<Stored>(value));
  return elements;
}

/// Elements rounded to the type, one of floating-point numbers.
inline concertina::onnx::Tensor rounded_tensor(const std::string& name,
                                               const std::vector<std::int64_t>& dims,
                                               std::span<const double> values,
                                               concertina::onnx::DataType type) {
  return with_float(type, [&]<class Stored>(Stored) {
    return concertina::onnx::Tensor::of<Stored>(name, dims, rounded<Stored>(values));
  });
}

}  // namespace tool
