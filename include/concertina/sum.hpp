// Parallel layers as one: their sum, and layers side by side.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/conv.hpp>
#include <concertina/expression.hpp>
#include <concertina/form.hpp>

#include <ranges>
#include <span>
#include <type_traits>
#include <utility>
#include <vector>

namespace concertina {

namespace detail {

template <class F>
using ExprOf = Expr<typename std::remove_cvref_t<F>::Scalar, std::remove_cvref_t<F>::Rank>;

template <class R>
concept FactorRange = std::ranges::forward_range<R> && Factor<std::ranges::range_value_t<R>>;

/// A list whose layers would die with it.
template <class R>
concept TemporaryLayers = FactorRange<R> && !std::ranges::borrowed_range<R> &&
                          requires(std::ranges::range_value_t<R>& layer) { layer.weight()[0] = 0; };

template <FactorRange R>
auto join(Join join, const R& parts) {
  using Result = ExprOf<std::ranges::range_value_t<R>>;
  return Result(join, std::vector<Result>(std::ranges::begin(parts), std::ranges::end(parts)));
}

}  // namespace detail

/// The elements of a list one after another, the first applied first: the run-time form of `*`.
/// Elements are layers, which must outlive the result, or expressions.
template <detail::FactorRange R>
auto chain(const R& layers) {
  return detail::join(Join::chain, layers);
}
template <detail::TemporaryLayers R>
void chain(const R&&) = delete;

/// All elements on the same input, outputs added: the run-time form of `+`.
/// Ensures  sum({f, g})(x) == f(x) + g(x), before rounding
/// Throws   ShapeError naming both branches where channels differ; where strides or output sizes
///          do, when it is contracted
/// Source   RepVGG (CVPR 2021), ACNet (ICCV 2019), DBB (CVPR 2021)
template <detail::FactorRange R>
auto sum(const R& branches) {
  return detail::join(Join::sum, branches);
}
template <detail::TemporaryLayers R>
void sum(const R&&) = delete;

/// All elements on the same input, outputs side by side along the channels: torch.cat of outputs,
/// so of weights along the first axis. Contracted to one group.
/// Throws  ShapeError naming both branches where input channels differ
/// Source  DBB (CVPR 2021), transform IV
template <detail::FactorRange R>
auto concat_outputs(const R& branches) {
  return detail::join(Join::concat_outputs, branches);
}
template <detail::TemporaryLayers R>
void concat_outputs(const R&&) = delete;

/// Each element on channels of its own, in order, outputs added: what a layer after a torch.cat is,
/// cut along its input channels; its inverse, so of weights along the second axis. Contracted to
/// one group.
/// Throws  ShapeError naming both branches where output channels differ
template <detail::FactorRange R>
auto concat_inputs(const R& branches) {
  return detail::join(Join::concat_inputs, branches);
}
template <detail::TemporaryLayers R>
void concat_inputs(const R&&) = delete;

namespace detail {

/// A branch's place in a layer that spans it: where each of its numbers is added.
template <int Rank>
class BranchPlace {
 public:
  BranchPlace(const ConvShape<Rank>& branch, Index first_out, Index first_in,
              const ConvShape<Rank>& sum)
      : branch_(branch), first_out_(first_out), first_in_(first_in), sum_(sum) {
    for_each_position(branch.kernel_size, [&](const PerAxis<Rank>& tap) {
      PerAxis<Rank> position;
      for (int axis = 0; axis < Rank; ++axis) {
        position[axis] = (tap[axis] * branch.dilation[axis] + sum.padding.start[axis] -
                          branch.padding.start[axis]) /
                         sum.dilation[axis];
      }
      taps_.push_back(flat(position, sum.kernel_size));
    });
  }

  /// Calls visit(number of the branch, number of the sum) for the weights, each in memory order of
  /// the branch.
  /// Cost  one call for each of the branch's numbers
  template <class Branch, class Sum, class Visit>
  void for_each_weight(Branch* branch, Sum* sum, Visit&& visit) const {
    const Index in = branch_.in / branch_.groups;
    const Index out = branch_.out / branch_.groups;
    const Index sum_in = sum_.in / sum_.groups, taps = numel(sum_.kernel_size);
    for (Index o = 0; o < branch_.out; ++o) {
      const Index first = (first_in_ + o / out * in) % sum_in;  // within the sum's group
      Sum* at = sum + ((first_out_ + o) * sum_in + first) * taps;
      for (Index c = 0; c < in; ++c, at += taps) {
        for (const Index tap : taps_) visit(*branch++, at[tap]);
      }
    }
  }

  /// The same for the biases of a branch that has them.
  template <class Branch, class Sum, class Visit>
  void for_each_bias(std::span<Branch> branch, std::span<Sum> sum, Visit&& visit) const {
    for (std::size_t o = 0; o < branch.size(); ++o) {
      visit(branch[o], sum[static_cast<std::size_t>(first_out_) + o]);
    }
  }

 private:
  ConvShape<Rank> branch_;
  Index first_out_, first_in_;  // channels of the sum before the branch's
  ConvShape<Rank> sum_;
  std::vector<Index> taps_;  // the position of each of the branch's taps in the sum's kernel
};

template <class Scalar, int Rank>
void add_branch(const BranchPlace<Rank>& place, const ConvView<Scalar, Rank>& branch,
                Conv<Scalar, Rank>& sum) {
  const auto add = [](const Scalar& number, Scalar& total) { total = total + number; };
  place.for_each_weight(branch.weight().data(), sum.weight().data(), add);
  place.for_each_bias(branch.bias(), sum.bias(), add);
}

/// Adds a branch's numbers into a layer that spans it, its first channels at these.
/// Cost  one addition for each of the branch's numbers
template <class Scalar, int Rank>
void add_branch(const ConvView<Scalar, Rank>& branch, Index first_out, Index first_in,
                Conv<Scalar, Rank>& sum) {
  add_branch(BranchPlace<Rank>(branch.shape(), first_out, first_in, sum.shape()), branch, sum);
}

/// Throws SizeError where the sum of branches of these shapes would be almost only zeros.
template <int Rank>
void require_few_zeros(const ConvShape<Rank>& sum, std::span<const ConvShape<Rank>> branches) {
  Index numbers = 0;
  for (const auto& branch : branches) numbers += weight_numel(branch);
  require_few_zeros(sum, numbers, [&] { return std::to_string(branches.size()) + " branches"; });
}

/// Where each of the branches is in a layer of their joined shape.
template <int Rank>
std::vector<BranchPlace<Rank>> branch_places(Join join, const ConvShape<Rank>& joined,
                                             std::span<const ConvShape<Rank>> branches) {
  std::vector<BranchPlace<Rank>> places;
  Index out = 0, in = 0;  // channels of the branches before
  for (const ConvShape<Rank>& branch : branches) {
    places.emplace_back(branch, out, in, joined);
    if (join == Join::concat_outputs) out += branch.out;
    if (join == Join::concat_inputs) in += branch.in;
  }
  return places;
}

/// Parallel layers of which the joined shape is `shape`, as one.
template <class Scalar, int Rank>
Conv<Scalar, Rank> add(Join join, const ConvShape<Rank>& shape,
                       std::span<const ConvView<Scalar, Rank>> branches) {
  std::vector<ConvShape<Rank>> shapes;
  for (const auto& branch : branches) shapes.push_back(branch.shape());
  require_few_zeros<Rank>(shape, shapes);
  Conv<Scalar, Rank> result(shape);
  const std::vector<BranchPlace<Rank>> places = branch_places<Rank>(join, shape, shapes);
  for (std::size_t b = 0; b < branches.size(); ++b) add_branch(places[b], branches[b], result);
  return result;
}

}  // namespace detail
}  // namespace concertina
