// What a command may take, decided from shapes before anything is computed.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "text.hpp"

#include <concertina/error.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>

namespace tool {

/// Of a shape with more axes nothing is known, and no array has more.
inline constexpr std::size_t most_axes = 64;

/// As the option --memory takes it, a little more.
inline std::string megabytes(double bytes) {
  return std::to_string(static_cast<std::int64_t>(std::ceil(1.01e-6 * bytes))) + "MB";
}

/// More is needed than a budget allows.
struct BudgetError : concertina::SizeError {
  using concertina::SizeError::SizeError;
};

/// Bytes of memory at once, and multiply-adds of a processor in all, each of about a nanosecond;
/// what costs more, such as arithmetic in a prime field or a hyperbolic tangent, counts as several.
struct Budget {
  double memory = std::numeric_limits<double>::infinity();
  double effort = std::numeric_limits<double>::infinity();
  double taken = 0;  ///< of the effort
  double kept = 0;   ///< of the memory, at the moment
  double share = 1;  ///< of what the options say

  /// A part of both, for one of several things that are done or held together.
  Budget part(double of) const {
    return {.memory = of * memory, .effort = of * effort, .share = of * share};
  }

  /// Takes an amount of effort from it. `done` is the share of all such work that is done with it,
  /// as far as that is known.
  /// Throws  BudgetError naming `what`, the amount that it takes and the option that allows it
  void take(const std::string& what, double bytes, double multiply_adds, double done = 1) {
    if (bytes > 0 && kept + bytes > memory) {
      refuse(what, bytes, "bytes", "memory", std::max(memory - kept, 0.0), (kept + bytes) / share);
    }
    if (multiply_adds > effort) {
      refuse(what, multiply_adds, "multiply-adds", "effort", effort,
             (taken + multiply_adds) / done / share);
    }
    effort -= multiply_adds;
    taken += multiply_adds;
  }

 private:
  [[noreturn]] static void refuse(const std::string& what, double amount, const char* unit,
                                  const char* option, double left, double enough) {
    throw BudgetError(what + " takes " + brief(amount) + " " + unit + ", but " + brief(left) +
                      " are left; allow that with --" + option + " " +
                      (option == std::string("memory") ? megabytes(enough) : brief(1.01 * enough)));
  }
};

}  // namespace tool
