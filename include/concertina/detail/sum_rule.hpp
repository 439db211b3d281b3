// The sum rule: the shape of a sum, a concatenation or a direct sum, decided without weights.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/detail/tree.hpp>

#include <algorithm>
#include <array>
#include <numeric>
#include <optional>
#include <span>
#include <vector>

namespace concertina::detail {

/// How much larger than its input an output is at stride 1; with the stride it decides the output's
/// size.
inline Index growth(const AnyShape& shape, int axis) {
  return checked_add(checked_add(shape.padding.start[axis], shape.padding.end[axis], "padding"),
                     1 - effective_kernel_size(shape, axis), "padding");
}

/// The most groups of a block-diagonal layer: cut where both channels' shares end together with
/// those of a group of a part.
inline Index direct_sum_groups(std::span<const AnyShape> parts) {
  Index in = 0, out = 0;
  for (const AnyShape& part : parts) in += part.in, out += part.out;
  Index groups = std::gcd(in, out);
  const auto ends_at = [&](Index in_channel, Index out_channel) {
    for (const AnyShape& part : parts) {
      if (in_channel <= part.in && out_channel <= part.out) {
        return in_channel % (part.in / part.groups) == 0 &&
               in_channel / (part.in / part.groups) == out_channel / (part.out / part.groups) &&
               out_channel % (part.out / part.groups) == 0;
      }
      in_channel -= part.in, out_channel -= part.out;
      if (in_channel < 0 || out_channel < 0) return false;
    }
    return false;
  };
  for (;; --groups) {
    if (in % groups != 0 || out % groups != 0) continue;
    bool fits = true;
    for (Index g = 1; fits && g < groups; ++g)
      fits = ends_at(g * (in / groups), g * (out / groups));
    if (fits) return groups;
  }
}

/// The sum rule, for parts that are added or stand side by side: kernels aligned by their
/// paddings and united, the dilation the greatest common divisor of all differences between tap
/// offsets, groups that of all groups; one group for concatenations, of which a part's groups are
/// none; as many as there can be for direct sums.
/// Requires  what require_same_outputs checks
/// Throws    SizeError where the kernel overflows
inline AnyShape sum_shape(Join join, std::span<const AnyShape> parts) {
  constexpr const char* what = "sum";
  const AnyShape& first = parts.front();
  AnyShape result = first;
  for (const AnyShape& part : parts) {
    result.groups = std::gcd(result.groups, part.groups);
    result.bias = result.bias || part.bias;
    result.fixed = result.fixed && part.fixed;
  }
  for (int axis = 0; axis < max_rank; ++axis) {
    const auto last_tap = [&](const AnyShape& part) {  // relative to the output's position
      return checked_add(effective_kernel_size(part, axis) - 1, -part.padding.start[axis], what);
    };
    Index start = first.padding.start[axis], last = last_tap(first), spacing = 0;
    Index least = growth(first, axis);  // where they differ, at the named size each will do
    for (const AnyShape& part : parts) {
      least = std::min(least, growth(part, axis));
      start = std::max(start, part.padding.start[axis]);
      last = std::max(last, last_tap(part));
      if (part.kernel_size[axis] > 1) spacing = std::gcd(spacing, part.dilation[axis]);
      spacing = std::gcd(spacing,
                         checked_add(part.padding.start[axis], -first.padding.start[axis], what));
    }
    result.dilation[axis] = std::max<Index>(spacing, 1);
    result.kernel_size[axis] =
        checked_add(checked_add(last, start, what) / result.dilation[axis], 1, what);
    result.padding.start[axis] = start;
    result.padding.end[axis] = checked_add(least, last, what);
  }
  for (const AnyShape& part : parts.subspan(1)) {
    if (splits_outputs(join)) result.out = checked_add(result.out, part.out, "concat");
    if (splits_inputs(join)) result.in = checked_add(result.in, part.in, "concat");
  }
  if (join != Join::sum) result.groups = join == Join::direct_sum ? direct_sum_groups(parts) : 1;
  validate(result);
  return result;
}

/// Throws ShapeError unless branches of these shapes have equal strides and as many outputs as each
/// other: for every input, or for the size that is named.
inline void require_same_outputs(std::span<const AnyShape> branches,
                                 const std::optional<Axes>& input_size) {
  const AnyShape& first = branches.front();
  for (std::size_t b = 1; b < branches.size(); ++b) {
    const AnyShape& branch = branches[b];
    const auto refuse = [&](const std::string& why) {
      fail<ShapeError>(
          {"branch 1 (", first, ") and branch ", b + 1, " (", branch, ") cannot be joined: ", why});
    };
    if (branch.stride != first.stride) {
      refuse(text({"strides differ, ", Extents{first.stride, first.rank}, " and ",
                   Extents{branch.stride, branch.rank}}));
    }
    for (int axis = 0; axis < first.rank; ++axis) {
      if (input_size) {
        const Index size = (*input_size)[axis], a = concertina::output_size(first, size, axis),
                    c = concertina::output_size(branch, size, axis);
        if (a == c) continue;
        refuse(text({"their outputs have ", a, " and ", c, " positions for an input of size ",
                     Extents{*input_size, first.rank}}));
      }
      const Index a = growth(first, axis), c = growth(branch, axis);
      if (a == c) continue;
      constexpr const char* remedy = "pad alike, or name the input size where they agree";
      refuse(text({"output sizes differ along axis ", axis, ", by ", a, " and ", c,
                   " from the input's before striding; ", remedy}));
    }
  }
}

}  // namespace concertina::detail
