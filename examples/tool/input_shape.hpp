// The grammar of --input.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "onnx/graph.hpp"
#include "text.hpp"

#include <charconv>
#include <string>
#include <system_error>
#include <utility>

namespace tool {

/// NAME=1x3x224x224; the name may contain equals signs.
/// Throws UsageError for what does not follow that.
inline std::pair<std::string, Dims> parse_input(const std::string& text) {
  const auto wrong = [&]() -> UsageError {
    return UsageError("--input " + in_quotes(text) + ": write NAME=1x3x224x224");
  };
  const std::size_t equals = text.rfind('=');
  if (equals == std::string::npos || equals == 0) throw wrong();
  Dims dims;
  const char *at = text.data() + equals + 1, *const end = text.data() + text.size();
  while (true) {
    Index extent = 0;
    const auto [after, error] = std::from_chars(at, end, extent);
    if (error != std::errc() || extent < 1) throw wrong();
    dims.push_back(extent);
    if (after == end) break;
    if (*after != 'x' && *after != ',') throw wrong();
    at = after + 1;
  }
  return {text.substr(0, equals), dims};
}

}  // namespace tool
