// The form of an expression: a tree of products, sums and concatenations with shapes at its leaves,
// and the shape of the one layer that it contracts to. Everything here is decided without a number.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/shape.hpp>

#include <algorithm>
#include <array>
#include <numeric>
#include <optional>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace concertina {

/// How the parts of a node make one map.
enum class Join {
  none,            ///< a leaf
  chain,           ///< one after another, the first part first
  sum,             ///< all on the same input, outputs added
  concat_outputs,  ///< all on the same input, outputs side by side along the channels
  concat_inputs    ///< each on channels of its own, outputs added
};

/// Leaves, joined. Chains of chains and sums of sums are flattened, and one part alone is that
/// part, so equal expressions have equal trees whatever their parentheses.
template <class Leaf>
class Tree {
 public:
  Tree(Leaf leaf) : leaf_(std::move(leaf)) {}

  /// Throws ShapeError where there are no parts.
  Tree(Join join, std::vector<Tree> parts) : join_(join) {
    if (parts.empty()) throw ShapeError("an expression of no layers");
    for (Tree& part : parts) {
      if (part.join_ == join) {
        parts_.insert(parts_.end(), std::make_move_iterator(part.parts_.begin()),
                      std::make_move_iterator(part.parts_.end()));
      } else {
        parts_.push_back(std::move(part));
      }
    }
    if (parts_.size() == 1) *this = Tree(std::move(parts_.front()));
  }

  Join join() const noexcept { return join_; }
  bool is_leaf() const noexcept { return join_ == Join::none; }
  const Leaf& leaf() const { return *leaf_; }
  const std::vector<Tree>& parts() const noexcept { return parts_; }

  /// The same tree with each(leaf) at its leaves.
  template <class Each>
  auto map(Each&& each) const -> Tree<std::invoke_result_t<Each&, const Leaf&>> {
    using Result = Tree<std::invoke_result_t<Each&, const Leaf&>>;
    if (is_leaf()) return Result(each(*leaf_));
    std::vector<Result> parts;
    parts.reserve(parts_.size());
    for (const Tree& part : parts_) parts.push_back(part.map(each));
    return Result(join_, std::move(parts));
  }

  /// Calls visit(leaf) for every leaf, in the order in which they are written down.
  template <class Visit>
  void for_each_leaf(Visit&& visit) const {
    if (is_leaf()) return static_cast<void>(visit(*leaf_));
    for (const Tree& part : parts_) part.for_each_leaf(visit);
  }

  friend bool operator==(const Tree&, const Tree&) = default;

 private:
  Join join_ = Join::none;
  std::optional<Leaf> leaf_;
  std::vector<Tree> parts_;
};

/// An expression without its numbers.
template <int Rank>
using Form = Tree<ConvShape<Rank>>;

/// The form of layers one after another, the first applied first.
template <int Rank>
Form<Rank> chain_form(std::span<const ConvShape<Rank>> layers) {
  return Form<Rank>(Join::chain, {layers.begin(), layers.end()});
}

/// "(conv2d 3->8 @3x3, conv2d 8->4 @1x1)" for a chain, with " + " for sums, " | " and " & " for
/// concatenated outputs and inputs.
template <int Rank>
std::string to_string(const Form<Rank>& form) {
  if (form.is_leaf()) return to_string(form.leaf());
  const char* between = form.join() == Join::chain            ? ", "
                        : form.join() == Join::sum            ? " + "
                        : form.join() == Join::concat_outputs ? " | "
                                                              : " & ";
  std::string text;
  for (const Form<Rank>& part : form.parts())
    text += (text.empty() ? "" : between) + to_string(part);
  return "(" + text + ")";
}

/// The shape of the product: `inner`, then `outer`.
/// Ensures   T(outer) T(inner) has this shape: stride s2*s1, padding p2*s1 + p1 on each side,
///           dilation the greatest common divisor of the taps' spacings, groups gcd(g1, g2)
/// Throws    ShapeError naming both shapes where the channels differ, SizeError where the kernel
///           overflows
template <int Rank>
ConvShape<Rank> product_shape(const ConvShape<Rank>& outer, const ConvShape<Rank>& inner);

/// The shape of a whole chain, the first layer applied first.
template <int Rank>
ConvShape<Rank> product_shape(std::span<const ConvShape<Rank>> layers);

/// The shape of the sum of parallel layers: kernels aligned by their paddings and united, the
/// dilation the greatest common divisor of all differences between tap offsets, groups the greatest
/// common divisor.
/// Requires  equal channels and strides; output sizes equal for every input, or, where
///           `input_size` is given, for that one
/// Throws    ShapeError naming both branches; SizeError where the kernel overflows
template <int Rank>
ConvShape<Rank> sum_shape(std::span<const ConvShape<Rank>> branches,
                          const std::optional<PerAxis<Rank>>& input_size = {});

/// The shape of the one layer that acts as the expression. Naming the input size admits sums whose
/// branches have equal output sizes for it but not for every input.
/// Throws  ShapeError, SizeError as product_shape and sum_shape do
template <int Rank>
ConvShape<Rank> contracted_shape(const Form<Rank>& form,
                                 const std::optional<PerAxis<Rank>>& input_size = {});

namespace detail {

struct Channels {
  Index in, out;
};

template <class Leaf>
Channels channels(const Tree<Leaf>& tree) {
  if (tree.is_leaf()) return {tree.leaf().in, tree.leaf().out};
  Channels first = channels(tree.parts().front()), last = channels(tree.parts().back());
  if (tree.join() == Join::chain) return {first.in, last.out};
  for (const Tree<Leaf>& part : std::span(tree.parts()).subspan(1)) {
    const Channels more = channels(part);
    if (tree.join() == Join::concat_outputs) first.out = checked_add(first.out, more.out, "concat");
    if (tree.join() == Join::concat_inputs) first.in = checked_add(first.in, more.in, "concat");
  }
  return first;
}

/// Throws ShapeError unless `outer` reads as many channels as `inner` writes; `number` is outer's.
template <int Rank>
void require_fit(const Form<Rank>& inner, const Form<Rank>& outer, std::size_t number,
                 const char* what) {
  const Index writes = channels(inner).out, reads = channels(outer).in;
  if (writes == reads) return;
  throw ShapeError(std::string(what) + ": layer " + std::to_string(number) + " reads " +
                   std::to_string(reads) + " channels (" + to_string(outer) + "), layer " +
                   std::to_string(number - 1) + " writes " + std::to_string(writes) + " (" +
                   to_string(inner) + ")");
}

/// Throws ShapeError unless each layer is valid and reads as many channels as the one before it
/// writes.
template <int Rank>
void require_chain(std::span<const ConvShape<Rank>> layers, const char* what) {
  if (layers.empty()) throw ShapeError(std::string(what) + ": no layers");
  for (std::size_t l = 0; l < layers.size(); ++l) {
    validate(layers[l]);
    if (l > 0) require_fit<Rank>(layers[l - 1], layers[l], l + 1, what);
  }
}

/// How much larger than its input an output is at stride 1; with the stride it decides the output's
/// size.
template <int Rank>
Index growth(const ConvShape<Rank>& shape, int axis) {
  const Padding<Rank>& padding = shape.padding;
  return checked_add(checked_add(padding.start[axis], padding.end[axis], "padding"),
                     -span(shape, axis), "padding");
}

/// Throws ShapeError where the channels of parts that are to be joined differ. describe(part) names
/// one in the message.
template <class Leaf, class Describe>
void require_channels(Join join, const std::vector<Tree<Leaf>>& parts, Describe&& describe) {
  for (std::size_t p = 1; p < parts.size(); ++p) {
    const Channels before = channels(parts[p - 1]), here = channels(parts[p]);
    if (join == Join::chain && before.out != here.in) {
      throw ShapeError("product: layer " + std::to_string(p + 1) + " reads " +
                       std::to_string(here.in) + " channels (" + describe(parts[p]) + "), layer " +
                       std::to_string(p) + " writes " + std::to_string(before.out) + " (" +
                       describe(parts[p - 1]) + ")");
    }
    const bool shares_input = join == Join::sum || join == Join::concat_outputs,
               shares_output = join == Join::sum || join == Join::concat_inputs;
    const bool reads_other = shares_input && before.in != here.in;
    if (!reads_other && !(shares_output && before.out != here.out)) continue;
    throw ShapeError(
        "branch " + std::to_string(p) + " (" + describe(parts[p - 1]) + ") and branch " +
        std::to_string(p + 1) + " (" + describe(parts[p]) + ") cannot be joined: they " +
        (reads_other ? "read " + std::to_string(before.in) + " and " + std::to_string(here.in)
                     : "write " + std::to_string(before.out) + " and " + std::to_string(here.out)) +
        " channels");
  }
}

/// Throws ShapeError unless branches of these shapes have equal strides and as many outputs as each
/// other: for every input, or for the size that is named.
template <int Rank>
void require_same_outputs(std::span<const ConvShape<Rank>> branches,
                          const std::optional<PerAxis<Rank>>& input_size) {
  const ConvShape<Rank>& first = branches.front();
  for (std::size_t b = 1; b < branches.size(); ++b) {
    const ConvShape<Rank>& branch = branches[b];
    const auto refuse = [&](const std::string& why) {
      throw ShapeError("branch 1 (" + to_string(first) + ") and branch " + std::to_string(b + 1) +
                       " (" + to_string(branch) + ") cannot be joined: " + why);
    };
    if (branch.stride != first.stride) {
      refuse("strides differ, " + to_string(first.stride) + " and " + to_string(branch.stride));
    }
    for (int axis = 0; axis < Rank; ++axis) {
      if (input_size) {
        const Index size = (*input_size)[axis], a = output_size(first, size, axis),
                    c = output_size(branch, size, axis);
        if (a == c) continue;
        refuse("their outputs have " + std::to_string(a) + " and " + std::to_string(c) +
               " positions for an input of size " + to_string(*input_size));
      }
      if (growth(first, axis) == growth(branch, axis)) continue;
      refuse("output sizes differ along axis " + std::to_string(axis) + ", by " +
             std::to_string(growth(first, axis)) + " and " + std::to_string(growth(branch, axis)) +
             " from the input's before striding; pad alike, or name the input size where they "
             "agree");
    }
  }
}

/// Everything but the channels of branches that are added or stand side by side: those are the
/// first one's.
template <int Rank>
ConvShape<Rank> united(std::span<const ConvShape<Rank>> branches) {
  constexpr const char* what = "sum";
  const ConvShape<Rank>& first = branches.front();
  ConvShape<Rank> result = first;
  for (const ConvShape<Rank>& branch : branches) {
    result.groups = std::gcd(result.groups, branch.groups);
    result.bias = result.bias || branch.bias;
  }
  for (int axis = 0; axis < Rank; ++axis) {
    Index start = first.padding.start[axis], last = checked_add(span(first, axis), -start, what);
    Index spacing = 0;
    for (const ConvShape<Rank>& branch : branches) {
      const Index padding = branch.padding.start[axis];
      start = std::max(start, padding);
      last = std::max(last, checked_add(span(branch, axis), -padding, what));
      if (branch.kernel_size[axis] > 1) spacing = std::gcd(spacing, branch.dilation[axis]);
      spacing = std::gcd(spacing, checked_add(padding, -first.padding.start[axis], what));
    }
    result.dilation[axis] = std::max<Index>(spacing, 1);
    result.kernel_size[axis] = checked_add(last, start, what) / result.dilation[axis] + 1;
    result.padding.start[axis] = start;
    result.padding.end[axis] = checked_add(growth(first, axis), last, what);
  }
  return result;
}

/// Throws SizeError for a layer of many numbers that `work`, the multiply-adds or additions that
/// make it, would leave almost all zero; origin() says from what it is made.
template <int Rank, class Origin>
void require_few_zeros(const ConvShape<Rank>& shape, Index work, Origin&& origin) {
  const Index numbers = weight_numel(shape);
  constexpr Index sizeable = Index{1} << 24, zeros_per_number = 1024;
  if (numbers <= sizeable || numbers / zeros_per_number <= work) return;
  throw SizeError("a layer of " + std::to_string(numbers) +
                  " numbers would be almost only zeros (" + to_string(shape) +
                  "); check strides, dilations and paddings: " + origin());
}

/// The shape of a join of parts of these shapes, which fit: see require_channels and
/// require_same_outputs.
template <int Rank>
ConvShape<Rank> joined_shape(Join join, std::span<const ConvShape<Rank>> parts) {
  if (join == Join::chain) return product_shape(parts);
  ConvShape<Rank> result = united(parts);
  for (const ConvShape<Rank>& part : parts.subspan(1)) {
    if (join == Join::concat_outputs) result.out = checked_add(result.out, part.out, "concat");
    if (join == Join::concat_inputs) result.in = checked_add(result.in, part.in, "concat");
  }
  if (join != Join::sum) result.groups = 1;  // groups of a part are not those of the whole
  validate(result);
  return result;
}

/// Throws as contracted_shape does but for overflow of a chain's kernel, which it does not compute.
template <int Rank>
void require_valid(const Form<Rank>& form, const char* what,
                   const std::optional<PerAxis<Rank>>& input_size = {}) {
  if (form.is_leaf()) return validate(form.leaf());
  if (form.join() != Join::chain) return static_cast<void>(contracted_shape(form, input_size));
  std::optional<PerAxis<Rank>> size = input_size;
  for (std::size_t p = 0; p < form.parts().size(); ++p) {
    const Form<Rank>& part = form.parts()[p];
    require_valid(part, what, size);
    if (p > 0) require_fit<Rank>(form.parts()[p - 1], part, p + 1, what);
    if (size) size = output_size(part, *size);
  }
}

}  // namespace detail

/// The spatial size of the expression's output. Throws ShapeError where a map on the way is smaller
/// than the next kernel, or branches differ.
template <int Rank>
PerAxis<Rank> output_size(const Form<Rank>& form, const PerAxis<Rank>& input_size) {
  if (form.is_leaf()) return output_size(form.leaf(), input_size);
  if (form.join() == Join::chain) {
    PerAxis<Rank> size = input_size;
    for (const Form<Rank>& part : form.parts()) size = output_size(part, size);
    return size;
  }
  const PerAxis<Rank> size = output_size(form.parts().front(), input_size);
  for (const Form<Rank>& part : form.parts()) {
    const PerAxis<Rank> other = output_size(part, input_size);
    if (other != size) {
      throw ShapeError("branches of sizes " + to_string(size) + " (" +
                       to_string(form.parts().front()) + ") and " + to_string(other) + " (" +
                       to_string(part) + ") on an input of size " + to_string(input_size));
    }
  }
  return size;
}

template <int Rank>
ConvShape<Rank> product_shape(const ConvShape<Rank>& outer, const ConvShape<Rank>& inner) {
  constexpr const char* what = "product";
  detail::require_chain<Rank>(std::array{inner, outer}, what);
  ConvShape<Rank> product{.out = outer.out, .in = inner.in, .bias = outer.bias || inner.bias};
  product.groups = std::gcd(outer.groups, inner.groups);
  for (int axis = 0; axis < Rank; ++axis) {
    const Index s1 = inner.stride[axis];
    const auto after = [&](Index second, Index first) {  // second * s1 + first
      return detail::checked_add(detail::checked_multiply(second, s1, what), first, what);
    };
    product.stride[axis] = after(outer.stride[axis], 0);
    product.padding.start[axis] = after(outer.padding.start[axis], inner.padding.start[axis]);
    product.padding.end[axis] = after(outer.padding.end[axis], inner.padding.end[axis]);
    const Index reach = after(span(outer, axis), span(inner, axis));
    const Index spacing = std::gcd(outer.kernel_size[axis] > 1 ? after(outer.dilation[axis], 0) : 0,
                                   inner.kernel_size[axis] > 1 ? inner.dilation[axis] : 0);
    product.dilation[axis] = std::max<Index>(spacing, 1);
    product.kernel_size[axis] = reach / product.dilation[axis] + 1;
  }
  validate(product);
  return product;
}

template <int Rank>
ConvShape<Rank> product_shape(std::span<const ConvShape<Rank>> layers) {
  detail::require_chain(layers, "product");
  ConvShape<Rank> product = layers.front();
  for (const ConvShape<Rank>& layer : layers.subspan(1)) product = product_shape(layer, product);
  return product;
}

template <int Rank>
ConvShape<Rank> sum_shape(std::span<const ConvShape<Rank>> branches,
                          const std::optional<PerAxis<Rank>>& input_size) {
  return contracted_shape(Form<Rank>(Join::sum, {branches.begin(), branches.end()}), input_size);
}

template <int Rank>
ConvShape<Rank> contracted_shape(const Form<Rank>& form,
                                 const std::optional<PerAxis<Rank>>& input_size) {
  if (form.is_leaf()) {
    validate(form.leaf());
    return form.leaf();
  }
  std::optional<PerAxis<Rank>> size = input_size;
  std::vector<ConvShape<Rank>> parts;
  for (const Form<Rank>& part : form.parts()) {
    parts.push_back(contracted_shape(part, size));
    if (size && form.join() == Join::chain) size = output_size(part, *size);
  }
  detail::require_channels(form.join(), form.parts(),
                           [](const Form<Rank>& part) { return to_string(part); });
  if (form.join() != Join::chain) detail::require_same_outputs<Rank>(parts, input_size);
  return detail::joined_shape<Rank>(form.join(), parts);
}

}  // namespace concertina
