// Where the elements of parallel branches are in the one layer that they become.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/detail/box.hpp>
#include <concertina/detail/product/operands.hpp>
#include <concertina/detail/tree.hpp>

#include <span>
#include <vector>

namespace concertina::detail {

/// Where each element of a branch is added in a layer that spans all branches.
class BranchPlace {
 public:
  /// `first_out` and `first_in` are the channels of the whole before the branch's.
  BranchPlace(const AnyShape& branch, Index first_out, Index first_in, const AnyShape& whole)
      : branch_(branch), first_out_(first_out), first_in_(first_in), whole_(whole) {
    for_each_position(branch.kernel_size, [&](const Axes& tap) {
      Axes position;
      for (int axis = 0; axis < max_rank; ++axis) {
        position[axis] = (tap[axis] * branch.dilation[axis] + whole.padding.start[axis] -
                          branch.padding.start[axis]) /
                         whole.dilation[axis];
      }
      taps_.push_back(flat(position, whole.kernel_size));
    });
  }

  const AnyShape& branch() const { return branch_; }
  const AnyShape& whole() const { return whole_; }
  Index first_out() const { return first_out_; }
  Index first_in() const { return first_in_; }
  /// The position of each of the branch's taps in the whole's kernel.
  const std::vector<Index>& taps() const { return taps_; }

  /// Calls visit(element of the branch, element of the whole) for the weights, in memory order of
  /// the branch, and then for the biases of a branch that has them.
  template <class Branch, class Whole, class Visit>
  void for_each(LayerData<Branch> branch, LayerData<Whole> whole, Visit&& visit) const {
    const Index in = branch_.in / branch_.groups, out = branch_.out / branch_.groups;
    const Index whole_in = whole_.in / whole_.groups, taps = numel(whole_.kernel_size);
    for (Index o = 0; o < branch_.out; ++o) {
      const Index first = (first_in_ + o / out * in) % whole_in;  // within the whole's group
      Whole* at = whole.weight + ((first_out_ + o) * whole_in + first) * taps;
      for (Index c = 0; c < in; ++c, at += taps) {
        for (const Index tap : taps_) visit(*branch.weight++, at[tap]);
      }
    }
    for (Index o = 0; branch_.bias && o < branch_.out; ++o) {
      visit(branch.bias[o], whole.bias[first_out_ + o]);
    }
  }

 private:
  AnyShape branch_;
  Index first_out_, first_in_;
  AnyShape whole_;
  std::vector<Index> taps_;
};

/// Where each of the branches is in a layer of their joined shape.
inline std::vector<BranchPlace> branch_places(Join join, const AnyShape& whole,
                                              std::span<const AnyShape> branches) {
  std::vector<BranchPlace> places;
  Index out = 0, in = 0;  // channels of the branches before
  for (const AnyShape& branch : branches) {
    places.emplace_back(branch, out, in, whole);
    if (splits_outputs(join)) out += branch.out;
    if (splits_inputs(join)) in += branch.in;
  }
  return places;
}

}  // namespace concertina::detail
