// Sums and products of sizes that throw where they do not fit.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/detail/text.hpp>
#include <concertina/error.hpp>

#include <cstddef>
#include <limits>
#include <vector>

namespace concertina::detail {

using Index = std::ptrdiff_t;  // concertina::Index, whose header needs this one

/// a * b or a + b; throws SizeError with `what` where the result does not fit an Index.
constexpr Index checked_multiply(Index a, Index b, const char* what) {
  constexpr Index most = std::numeric_limits<Index>::max(),
                  least = std::numeric_limits<Index>::min();
  const bool fits =
      a == 0 || b == 0 ||
      (a > 0 ? (b > 0 ? a <= most / b : b >= least / a)
             : (b > 0 ? a >= least / b : a != least && b != least && -a <= most / -b));
  if (!fits) {
    fail<SizeError>({what, ": ", a, " * ", b, " overflows"});
  }
  return a * b;
}

/// Throws SizeError where the bytes of so many elements overflow, of any scalar: up to 256 each.
constexpr void require_addressable(Index elements, const char* what) {
  static_cast<void>(checked_multiply(elements, 256, what));
}

constexpr Index checked_add(Index a, Index b, const char* what) {
  constexpr Index most = std::numeric_limits<Index>::max(),
                  least = std::numeric_limits<Index>::min();
  if (b > 0 ? a > most - b : a < least - b) {
    fail<SizeError>({what, ": ", a, " + ", b, " overflows"});
  }
  return a + b;
}

/// One element for each channel. Throws ShapeError for no channels, SizeError where the bytes
/// overflow.
template <class Scalar>
std::vector<Scalar> per_channel(Index channels, const Scalar& value, const char* what) {
  if (channels < 1) fail<ShapeError>({what, ": no channels"});
  checked_multiply(channels, sizeof(Scalar), what);
  return std::vector<Scalar>(static_cast<std::size_t>(channels), value);
}

/// floor(a / b) for b > 0; the built-in operator rounds towards zero.
constexpr Index floor_divide(Index a, Index b) noexcept {
  return a / b - (a % b != 0 && (a < 0) != (b < 0) ? 1 : 0);
}

}  // namespace concertina::detail
