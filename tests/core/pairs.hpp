// Pairs of layers for the tests of products and contractions.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/shape.hpp>

#include <utility>
#include <vector>

namespace concertina::test {

/// Pairs of layers as real networks have them, and one or more for each algorithm, with tails that
/// fill no panel; outer, inner.
inline std::vector<std::pair<ConvShape<2>, ConvShape<2>>> pairs() {
  return {
      {{.out = 24, .in = 40, .kernel_size = 1, .bias = true},
       {.out = 40, .in = 16, .kernel_size = 7, .padding = 3, .bias = true}},
      {{.out = 33, .in = 20, .kernel_size = {5, 3}, .stride = 2, .bias = true},
       {.out = 20, .in = 17, .kernel_size = 1, .padding = 2, .bias = true}},
      {{.out = 10, .in = 12, .kernel_size = 3},
       {.out = 12, .in = 9, .kernel_size = 3, .bias = true}},
      {{.out = 10, .in = 12, .kernel_size = {2, 3}, .dilation = {3, 1}, .bias = true},
       {.out = 12, .in = 9, .kernel_size = {3, 2}, .stride = {1, 3}, .dilation = {1, 2}}},
      {{.out = 12, .in = 48, .kernel_size = 1, .groups = 12, .bias = true},
       {.out = 48, .in = 12, .kernel_size = 3, .groups = 12, .bias = true}},
      {{.out = 12, .in = 36, .kernel_size = 3, .groups = 3},
       {.out = 36, .in = 20, .kernel_size = 3, .groups = 4, .bias = true}},
      {{.out = 24, .in = 24, .kernel_size = 3, .groups = 2, .bias = true},
       {.out = 24, .in = 36, .kernel_size = 1, .groups = 3, .bias = true}},
      {{.out = 40, .in = 36, .kernel_size = 1, .groups = 2},
       {.out = 36, .in = 30, .kernel_size = 3, .groups = 6, .bias = true}},
      {{.out = 6, .in = 6, .kernel_size = 1, .stride = 2, .groups = 6, .bias = true},
       {.out = 6, .in = 4, .kernel_size = {3, 1}, .stride = 2, .groups = 2, .bias = true}},
      {{.out = 9, .in = 6, .kernel_size = {2, 3}, .dilation = 2, .groups = 3},
       {.out = 6, .in = 6, .kernel_size = 1, .stride = 2, .padding = 1, .groups = 6, .bias = true}},
      {{.out = 7, .in = 5, .kernel_size = 1}, {.out = 5, .in = 3, .kernel_size = 1}},
      {{.out = 1, .in = 1, .kernel_size = 1}, {.out = 1, .in = 1, .kernel_size = 1}},
  };
}

}  // namespace concertina::test
