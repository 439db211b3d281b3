// What a command may take, decided from shapes before anything is computed.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "text.hpp"

#include <concertina/error.hpp>

#include <limits>
#include <string>

namespace tool {

/// More is needed than a budget allows.
struct BudgetError : concertina::SizeError {
  using concertina::SizeError::SizeError;
};

/// Bytes of memory at once, and multiply-adds of a processor in all; what costs more each, such as
/// arithmetic in a prime field, counts as several.
struct Budget {
  double memory = std::numeric_limits<double>::infinity();
  double effort = std::numeric_limits<double>::infinity();
  double taken = 0;  ///< of the effort

  /// Takes an amount of effort from it. `done` is the share of all such work that is done with it,
  /// as far as that is known.
  /// Throws  BudgetError naming `what`, the amount that it takes and the option that allows it
  void take(const std::string& what, double bytes, double multiply_adds, double done = 1) {
    if (bytes > memory) refuse(what, bytes, "bytes", "memory", memory, bytes);
    if (multiply_adds > effort) {
      refuse(what, multiply_adds, "multiply-adds", "effort", effort,
             (taken + multiply_adds) / done);
    }
    effort -= multiply_adds;
    taken += multiply_adds;
  }

 private:
  [[noreturn]] static void refuse(const std::string& what, double amount, const char* unit,
                                  const char* option, double left, double enough) {
    throw BudgetError(what + " takes " + brief(amount) + " " + unit + ", but " + brief(left) +
                      " are left; allow that with --" + option + " " + brief(1.01 * enough));
  }
};

}  // namespace tool
