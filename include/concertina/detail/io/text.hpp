// What messages about files say: text from a file made safe to print, lists cut short.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/error.hpp>  // FormatError

#include <concepts>
#include <cstddef>
#include <ranges>
#include <string>
#include <string_view>
#include <vector>

namespace concertina::io::detail {

[[noreturn]] inline void refuse(const std::string& where, const std::string& what) {
  throw FormatError(where + ": " + what);
}

/// Text from a file, safe to print: everything but printable ASCII as \xNN, and no longer than a
/// line.
inline std::string shown(std::string_view text, std::size_t limit = 100) {
  constexpr std::string_view digits = "0123456789abcdef";
  std::string result;
  for (const char c : text.substr(0, limit)) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte >= 0x20 && byte < 0x7f) {
      result += c;
    } else {
      result += {'\\', 'x', digits[byte / 16], digits[byte % 16]};
    }
  }
  return text.size() > limit ? result + "..." : result;
}

inline std::string in_quotes(std::string_view text) { return '"' + shown(text) + '"'; }

/// The first items, as [2, 3, 5], [2, 3, ...] or "F.bias", "F.weight", ...
template <std::ranges::input_range Items, class Show>
std::string listed(const Items& items, const Show& show, int limit = 8) {
  std::string result;
  for (const auto& item : items) {
    result += (result.empty() ? "" : ", ") + (limit > 0 ? show(item) : std::string("..."));
    if (--limit < 0) break;
  }
  return result;
}

template <std::integral Integer>
std::string shown(const std::vector<Integer>& integers) {
  return '[' + listed(integers, [](Integer i) { return std::to_string(i); }) + ']';
}

}  // namespace concertina::io::detail
