// In which order the layers of an expansion are tried as the one that is solved for.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/shape.hpp>

#include <algorithm>
#include <numeric>
#include <utility>
#include <vector>

namespace concertina::detail {

/// Indices of the layers with the most weights, and so the most freedom, first; in the chain's
/// order where equal.
inline std::vector<std::size_t> largest_first(const std::vector<ConvShape<max_rank>>& shapes) {
  std::vector<std::size_t> order(shapes.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::ranges::sort(order, {},
                    [&](std::size_t l) { return std::pair(-weight_numel(shapes[l]), l); });
  return order;
}

}  // namespace concertina::detail
