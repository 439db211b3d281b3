// The two rules by which shapes become the shape of one layer: the serial one, of a product, and
// the parallel one, of sums and concatenations. Everything here is decided without weights.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/detail/tree.hpp>

#include <algorithm>
#include <array>
#include <numeric>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace concertina::detail {

/// Shapes joined: an expression without its weights.
using AnyForm = Tree<AnyShape>;

/// "(conv2d 3->8 @3x3, conv2d 8->4 @1x1)" for a chain, with " + " for sums, " | " and " & " for
/// concatenated outputs and inputs, " (+) " for direct sums.
inline std::string to_string(const AnyForm& form) {
  if (form.is_leaf()) return to_string(form.leaf());
  const char* between = form.join() == Join::chain            ? ", "
                        : form.join() == Join::sum            ? " + "
                        : form.join() == Join::concat_outputs ? " | "
                        : form.join() == Join::concat_inputs  ? " & "
                                                              : " (+) ";
  std::string result;
  for (const AnyForm& part : form.parts()) {
    result += text({result.empty() ? "(" : between, part});
  }
  return result + ")";
}

/// Throws ShapeError where the channels of parts that are to be joined differ.
inline void require_channels(Join join, std::span<const AnyForm> parts) {
  std::vector<Channels> all;
  for (const AnyForm& part : parts) all.push_back(channels(part));
  require_channels(join, all, [&](std::size_t p) { return to_string(parts[p]); });
}

inline int rank_in(const AnyForm& form) {
  return form.is_leaf() ? form.leaf().rank : rank_in(form.parts().front());
}

/// The serial rule, `inner`, then `outer`: strides multiply, the outer layer's padding and taps are
/// spaced by the inner one's stride, the dilation is the greatest common divisor of the taps'
/// spacings and the groups are that of the groups.
/// Ensures   T(outer) T(inner) has this shape
/// Throws    ShapeError naming both shapes where the channels differ, SizeError where the kernel
///           overflows
inline AnyShape product_shape(const AnyShape& outer, const AnyShape& inner) {
  constexpr const char* what = "product";
  validate(inner);
  validate(outer);
  const AnyShape* const both[] = {&inner, &outer};
  require_channels(Join::chain,
                   std::array{Channels{inner.in, inner.out}, Channels{outer.in, outer.out}},
                   [&](std::size_t layer) { return to_string(*both[layer]); });
  AnyShape product = outer;
  product.in = inner.in;
  product.bias = outer.bias || inner.bias;
  product.fixed = outer.fixed && inner.fixed;
  product.groups = std::gcd(outer.groups, inner.groups);
  for (int axis = 0; axis < max_rank; ++axis) {
    const auto after = [&](Index second, Index first) {  // second * inner.stride + first
      return checked_add(checked_multiply(second, inner.stride[axis], what), first, what);
    };
    product.stride[axis] = after(outer.stride[axis], 0);
    product.padding.start[axis] = after(outer.padding.start[axis], inner.padding.start[axis]);
    product.padding.end[axis] = after(outer.padding.end[axis], inner.padding.end[axis]);
    const Index last_tap =
        after(effective_kernel_size(outer, axis) - 1, effective_kernel_size(inner, axis) - 1);
    const Index spacing = std::gcd(outer.kernel_size[axis] > 1 ? after(outer.dilation[axis], 0) : 0,
                                   inner.kernel_size[axis] > 1 ? inner.dilation[axis] : 0);
    product.dilation[axis] = std::max<Index>(spacing, 1);
    product.kernel_size[axis] = last_tap / product.dilation[axis] + 1;
  }
  validate(product);
  return product;
}

/// How much larger than its input an output is at stride 1, less one; with the stride it decides
/// the output's size.
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

/// The parallel rule, for parts that are added or stand side by side: kernels aligned by their
/// paddings and united, the dilation the greatest common divisor of all differences between tap
/// offsets, groups that of all groups; one group for concatenations, of which a part's groups are
/// none; as many as there can be for direct sums.
/// Requires  what require_same_outputs checks
/// Throws    SizeError where the kernel overflows
inline AnyShape parallel_shape(Join join, std::span<const AnyShape> parts) {
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
    result.kernel_size[axis] = checked_add(last, start, what) / result.dilation[axis] + 1;
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

/// The shape of a join of parts of these shapes.
inline AnyShape joined_shape(Join join, std::span<const AnyShape> parts) {
  if (join != Join::chain) return parallel_shape(join, parts);
  AnyShape product = parts.front();
  for (const AnyShape& part : parts.subspan(1)) product = product_shape(part, product);
  return product;
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

/// The spatial size of the form's output. Throws ShapeError where a map on the way is smaller than
/// the next kernel, or branches differ.
inline Axes output_size(const AnyForm& form, const Axes& input_size) {
  if (form.is_leaf()) return output_size(form.leaf(), input_size);
  if (form.join() == Join::chain) {
    Axes size = input_size;
    for (const AnyForm& part : form.parts()) size = output_size(part, size);
    return size;
  }
  const AnyForm& first = form.parts().front();
  const Axes size = output_size(first, input_size);
  for (const AnyForm& part : std::span(form.parts()).subspan(1)) {
    const Axes other = output_size(part, input_size);
    if (other == size) continue;
    const int rank = rank_in(part);
    fail<ShapeError>({"branches of sizes ", Extents{size, rank}, " (", first, ") and ",
                      Extents{other, rank}, " (", part, ") on an input of size ",
                      Extents{input_size, rank}});
  }
  return size;
}

/// Multiply-adds of applying the form's layers to one map, which becomes the last one's output.
inline Index applied_multiply_adds(const AnyForm& form, Axes& size) {
  if (form.is_leaf()) {
    size = output_size(form.leaf(), size);
    return checked_multiply(weight_numel(form.leaf()), numel(size), "multiply-adds");
  }
  const Axes input_size = size;
  Index total = 0;
  for (const AnyForm& part : form.parts()) {
    if (form.join() != Join::chain) size = input_size;
    total = checked_add(total, applied_multiply_adds(part, size), "multiply-adds");
  }
  return total;
}

/// The shape of the one layer that acts as the form does. Naming the input size admits sums whose
/// branches have equal output sizes for it but not for every input.
inline AnyShape contracted_shape(const AnyForm& form, const std::optional<Axes>& input_size = {}) {
  if (form.is_leaf()) {
    validate(form.leaf());
    return form.leaf();
  }
  std::optional<Axes> size = input_size;
  std::vector<AnyShape> parts;
  for (const AnyForm& part : form.parts()) {
    parts.push_back(contracted_shape(part, size));
    if (size && form.join() == Join::chain) size = output_size(part, *size);
  }
  require_channels(form.join(), form.parts());
  if (form.join() != Join::chain) require_same_outputs(parts, input_size);
  return joined_shape(form.join(), parts);
}

/// Validates as contracted_shape does, except that it does not detect overflow of a chain's kernel
/// size, which it does not compute.
inline void require_valid(const AnyForm& form, const std::optional<Axes>& input_size = {}) {
  if (form.is_leaf()) return validate(form.leaf());
  if (form.join() != Join::chain) return static_cast<void>(contracted_shape(form, input_size));
  std::optional<Axes> size = input_size;
  for (const AnyForm& part : form.parts()) {
    require_valid(part, size);
    if (size) size = output_size(part, *size);
  }
  require_channels(Join::chain, form.parts());
}

/// Throws SizeError for a layer of many elements that `work`, the multiply-adds or additions that
/// make it, would leave almost all zero; origin() says from what it is made.
inline void require_few_zeros(const AnyShape& shape, Index work,
                              FunctionRef<std::string()> origin) {
  const Index elements = weight_numel(shape);
  constexpr Index sizeable = Index{1} << 24, zeros_per_element = 1024;
  if (elements <= sizeable || elements / zeros_per_element <= work) return;
  fail<SizeError>({"a layer of ", elements, " elements would be almost only zeros (", shape,
                   "); check strides, dilations and paddings: ", origin()});
}

}  // namespace concertina::detail
