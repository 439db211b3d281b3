// Fields of JSON from a file, taken with distrust: of the right type and of modest size, or refused
// by their place.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "text.hpp"

#include <concertina/error.hpp>
#include <concertina/shape.hpp>

#include <nlohmann/json.hpp>

#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

namespace tool::fields {

using concertina::Index;
using Json = nlohmann::json;

inline constexpr Index most_magnitude = Index{1} << 40;  // of strides, paddings and dilations

[[noreturn]] inline void refuse(const std::string& where, const std::string& what) {
  throw concertina::FormatError(where + ": " + what);
}

inline Json parse(const std::string& text, const std::string& where) try {
  return Json::parse(text);
} catch (const Json::exception& error) {
  refuse(where, std::string("is not valid JSON; ") + error.what());
}

/// Sums and differences of such numbers are far from overflowing.
inline bool is_modest(Index number) {
  return -most_magnitude <= number && number <= most_magnitude;
}

inline Index integer(const Json& value, const std::string& where) {
  const bool fits = value.is_number_unsigned()
                        ? value.get<std::uint64_t>() <= static_cast<std::uint64_t>(most_magnitude)
                        : value.is_number_integer() && is_modest(value.get<Index>());
  if (!fits) refuse(where, "found " + shown(value) + ", expected an integer of at most 2^40");
  return value.get<Index>();
}

/// One for all spatial axes, or a list with one for each.
inline std::vector<Index> integers(const Json& value, const std::string& where) {
  if (!value.is_array()) return {integer(value, where)};
  if (value.size() > 3) {
    refuse(where, "found " + std::to_string(value.size()) +
                      " numbers, expected one for each of at most 3 axes");
  }
  std::vector<Index> result;
  for (const Json& each : value) result.push_back(integer(each, where));
  return result;
}

inline double number(const Json& value, const std::string& where) {
  if (!value.is_number() || !std::isfinite(value.get<double>())) {
    refuse(where, "found " + shown(value) + ", expected a finite number");
  }
  return value.get<double>();
}

inline std::vector<double> numbers(const Json& value, const std::string& where) {
  if (!value.is_array()) refuse(where, "found " + shown(value) + ", expected a list of numbers");
  std::vector<double> result;
  for (const Json& each : value) result.push_back(number(each, where));
  return result;
}

inline bool boolean(const Json& value, const std::string& where) {
  if (!value.is_boolean()) refuse(where, "found " + shown(value) + ", expected true or false");
  return value.get<bool>();
}

inline std::string string(const Json& value, const std::string& where) {
  if (!value.is_string()) refuse(where, "found " + shown(value) + ", expected a string");
  return value.get<std::string>();
}

inline const Json& object(const Json& value, const std::string& where) {
  if (!value.is_object()) refuse(where, "found " + shown(value) + ", expected an object");
  return value;
}

}  // namespace tool::fields
