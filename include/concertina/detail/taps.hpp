// Which outputs a tap reaches.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/conv.hpp>

#include <algorithm>
#include <vector>

namespace concertina::detail {

/// Output positions first .. last - 1 of an axis: those at which a tap reads the map rather than
/// its padding.
struct Reach {
  Index first, last;

  Index count() const noexcept { return std::max<Index>(0, last - first); }
};

template <int Rank>
Reach reach(const ConvShape<Rank>& shape, Index input_size, Index tap, int axis) {
  const auto& stride = shape.stride;
  const auto& padding = shape.padding;
  const auto& dilation = shape.dilation;
  const Index offset = tap * dilation[axis] - padding.start[axis];
  return {.first = std::max<Index>(0, -floor_divide(offset, stride[axis])),
          .last = std::min(output_size(shape, input_size, axis),
                           floor_divide(input_size - 1 - offset, stride[axis]) + 1)};
}

/// Neighbouring outputs that read evenly spaced inputs through one tap: positions row, row + 1, ...
/// of an output channel, and column, column + step, ... of an input channel. All are row-major, the
/// tap in the kernel too.
struct TapRun {
  Index tap, row, column, count;
};

/// Every run of one pair of channels, the same for each pair: the block of a Toeplitz matrix,
/// diagonal by diagonal.
template <int Rank>
std::vector<TapRun> tap_runs(const ConvShape<Rank>& shape, const PerAxis<Rank>& input_size) {
  const auto& stride = shape.stride;
  const auto& padding = shape.padding;
  const auto& dilation = shape.dilation;
  const PerAxis<Rank> positions = output_size(shape, input_size);
  std::vector<TapRun> result;
  Index index = 0;
  for_each_position(shape.kernel_size, [&](const PerAxis<Rank>& tap) {
    PerAxis<Rank> first, starts;  // one start for each line of the box of outputs
    Index count = 1;
    for (int axis = 0; axis < Rank; ++axis) {
      const Reach along = reach(shape, input_size[axis], tap[axis], axis);
      first[axis] = along.first;
      count = along.count();
      starts[axis] = axis == Rank - 1 ? std::min<Index>(count, 1) : count;
    }
    for_each_position(starts, [&](const PerAxis<Rank>& start) {
      PerAxis<Rank> j, i;
      for (int axis = 0; axis < Rank; ++axis) {
        j[axis] = first[axis] + start[axis];
        i[axis] = j[axis] * stride[axis] - padding.start[axis] + tap[axis] * dilation[axis];
      }
      result.push_back({index, flat(j, positions), flat(i, input_size), count});
    });
    ++index;
  });
  return result;
}

}  // namespace concertina::detail
