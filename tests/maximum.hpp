// A maximum from which what is not a number does not vanish.
// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace concertina::test {

/// IEEE 754's maximum: NaN where one is. std::max of a running maximum and NaN is the former, and a
/// test of differences so passes.
template <class T>
T maximum(T a, T b) {
  return a > b || a != a ? a : b;
}

}  // namespace concertina::test
