// The jobs of sums and concatenations, and of their gradients.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/cuda/detail/plan/form_planner.ipp>

#include <algorithm>
#include <cstddef>
#include <vector>

namespace concertina::cuda::detail {

inline std::vector<BranchPlace> FormPlanner::places_of(const Instruction& instruction) const {
  return concertina::detail::branch_places(instruction.join, instruction.shape,
                                           program_.shapes_of(instruction.operands));
}

/// The entry of the device's table.
inline Branch FormPlanner::entry(const TensorRef& weight, const BranchPlace& place) {
  const AnyShape &shape = place.branch(), &whole = place.whole();
  return {.tensor = weight,
          .first_m = narrow(place.first_out()),
          .m = narrow(shape.out),
          .group_m = narrow(shape.out / shape.groups),
          .first_n = narrow(place.first_in()),
          .n = narrow(shape.in / shape.groups),
          .whole_n = narrow(whole.in / whole.groups),
          .taps = narrow(numel(shape.kernel_size))};
}

inline void FormPlanner::add_branches(const Instruction& instruction, PlannedValue& result) {
  Schedule& schedule = planning_.forward;
  const AnyShape& whole = instruction.shape;
  const std::vector<Value>& branches = instruction.operands;
  const std::vector<BranchPlace> places = places_of(instruction);
  int level = 0;
  for (const Value branch : branches) level = std::max(level, values_[branch].ready);
  std::vector<std::vector<TapPair>> reaching(
      static_cast<std::size_t>(numel(whole.kernel_size)));  // each tap of the whole
  for (std::size_t b = 0; b < branches.size(); ++b) {
    const std::vector<Index>& taps = places[b].taps();
    for (std::size_t t = 0; t < taps.size(); ++t) {
      reaching[static_cast<std::size_t>(taps[t])].push_back(
          {static_cast<int>(b), static_cast<int>(t)});
    }
  }
  schedule.add(level, Job{.kind = Job::Kind::add_branches,
                          .taps = static_cast<int>(reaching.size()),
                          .m = narrow(whole.out),
                          .n = narrow(whole.in / whole.groups),
                          .c = result.weight,
                          .first_tap = schedule.next_tap(),
                          .first_branch = schedule.next_branch()});
  for (std::size_t t = 0; t < reaching.size(); ++t) {
    schedule.add_tap(static_cast<int>(t), reaching[t]);
  }
  for (std::size_t b = 0; b < branches.size(); ++b) {
    schedule.add_branch(entry(values_[branches[b]].weight, places[b]));
  }
  result.ready = level + 1;
  if (!whole.bias) return;

  std::vector<TapPair> biased;
  const int first_branch = schedule.next_branch();
  for (std::size_t b = 0; b < branches.size(); ++b) {
    const PlannedValue& value = values_[branches[b]];
    if (!value.shape.bias) continue;
    biased.push_back({static_cast<int>(biased.size()), 0});
    const int out = narrow(value.shape.out);
    schedule.add_branch({.tensor = value.bias,
                         .first_m = narrow(places[b].first_out()),
                         .m = out,
                         .group_m = out,
                         .n = 1,
                         .whole_n = 1});
  }
  schedule.add(level, Job{.kind = Job::Kind::add_branches,
                          .m = narrow(whole.out),
                          .c = result.bias,
                          .first_tap = schedule.next_tap(),
                          .first_branch = first_branch});
  schedule.add_tap(0, biased);
}

inline void FormPlanner::take_branches(const Instruction& instruction, const PlannedValue& result) {
  Schedule& schedule = planning_.backward;
  const AnyShape& whole = instruction.shape;
  const Index taps = numel(whole.kernel_size);
  const int level = result.gradient_ready;
  const std::vector<BranchPlace> places = places_of(instruction);
  for (std::size_t b = 0; b < places.size(); ++b) {
    const BranchPlace& place = places[b];
    PlannedValue& value = values_[instruction.operands[b]];
    const AnyShape& shape = value.shape;
    schedule.add(level, Job{.kind = Job::Kind::take_branch,
                            .taps = static_cast<int>(place.taps().size()),
                            .m = narrow(shape.out),
                            .n = narrow(shape.in / shape.groups),
                            .a = result.weight_gradient,
                            .c = value.weight_gradient,
                            .a_m = stride(whole.in / whole.groups * taps),
                            .a_n = narrow(taps),
                            .first_tap = schedule.next_tap(),
                            .first_branch = schedule.next_branch()});
    for (const Index tap : place.taps()) schedule.add_tap(narrow(tap), {});
    schedule.add_branch(entry(value.weight, place));
    if (shape.bias) {
      schedule.add(level, copy(shifted(result.bias_gradient, place.first_out()),
                               value.bias_gradient, shape.out));
    }
    value.gradient_ready = level + 1;
  }
}

}  // namespace concertina::cuda::detail
