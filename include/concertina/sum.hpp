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

/// Adds a branch's numbers into a layer that spans it, its first channels at these.
/// Cost  one addition for each of the branch's numbers
template <class Scalar, int Rank>
void add_branch(const ConvView<Scalar, Rank>& branch, Index first_out, Index first_in,
                Conv<Scalar, Rank>& sum) {
  const auto& [stride, padding, dilation, groups] = sum.geometry();
  std::vector<Index> at;  // of each of the branch's taps, in the sum's kernel
  for_each_position(branch.shape().kernel, [&](const PerAxis<Rank>& tap) {
    PerAxis<Rank> position;
    for (int axis = 0; axis < Rank; ++axis) {
      position[axis] = (tap[axis] * branch.geometry().dilation[axis] + padding.start[axis] -
                        branch.geometry().padding.start[axis]) /
                       dilation[axis];
    }
    at.push_back(flat(position, sum.shape().kernel));
  });
  const Index in = branch.shape().in / branch.geometry().groups;
  const Index out = branch.shape().out / branch.geometry().groups;
  const Index sum_in = sum.shape().in / groups, taps = volume(sum.shape().kernel);
  const Scalar* from = branch.weight().data();
  for (Index o = 0; o < branch.shape().out; ++o) {
    const Index first = (first_in + o / out * in) % sum_in;  // within the sum's group
    Scalar* to = sum.weight().data() + ((first_out + o) * sum_in + first) * taps;
    for (Index c = 0; c < in; ++c, to += taps) {
      for (const Index tap : at) to[tap] = to[tap] + *from++;
    }
    if (branch.shape().bias) {
      Scalar& bias = sum.bias()[static_cast<std::size_t>(first_out + o)];
      bias = bias + branch.bias()[static_cast<std::size_t>(o)];
    }
  }
}

/// Parallel layers of which the joined shape is `shape`, as one.
template <class Scalar, int Rank>
Conv<Scalar, Rank> add(Join join, const ConvShape<Rank>& shape,
                       std::span<const ConvView<Scalar, Rank>> branches) {
  Index numbers = 0;
  for (const auto& branch : branches) numbers += weight_count(branch.shape());
  require_few_zeros(shape, numbers, [&] { return std::to_string(branches.size()) + " branches"; });
  Conv<Scalar, Rank> result(shape);
  Index out = 0, in = 0;  // channels of the branches before
  for (const auto& branch : branches) {
    add_branch(branch, out, in, result);
    if (join == Join::concat_outputs) out += branch.shape().out;
    if (join == Join::concat_inputs) in += branch.shape().in;
  }
  return result;
}

}  // namespace detail
}  // namespace concertina
