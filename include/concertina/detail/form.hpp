// Shapes joined, an expression without its weights: the shape of the layer that it is, its sizes
// and costs.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/detail/serial_rule.hpp>
#include <concertina/detail/sum_rule.hpp>
#include <concertina/detail/tree.hpp>

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

/// The shape of a join of parts of these shapes.
inline AnyShape joined_shape(Join join, std::span<const AnyShape> parts) {
  if (join != Join::chain) return sum_shape(join, parts);
  AnyShape product = parts.front();
  for (const AnyShape& part : parts.subspan(1)) product = product_shape(part, product);
  return product;
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
