// Loops over the positions of a box.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/shape.hpp>

#include <utility>

namespace concertina::detail {

/// Calls visit(position) for every position of a box, the last axis fastest; once for Rank 0.
template <int Rank, class Visit>
void for_each_position(const PerAxis<Rank>& size, Visit&& visit) {
  if (numel(size) == 0) return;
  PerAxis<Rank> position = 0;
  for (int axis = Rank; axis >= 0;) {
    visit(std::as_const(position));
    for (axis = Rank - 1; axis >= 0 && ++position[axis] == size[axis]; --axis) position[axis] = 0;
  }
}

/// Row-major index of a position in a box.
template <int Rank>
constexpr Index flat(const PerAxis<Rank>& position, const PerAxis<Rank>& size) {
  Index index = 0;
  for (int axis = 0; axis < Rank; ++axis) index = index * size[axis] + position[axis];
  return index;
}

}  // namespace concertina::detail
