// The smallest input that shows all of a contraction.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/verify.hpp>

#include <optional>

namespace concertina {

namespace detail {

/// The form along one axis, of a single channel. Channels do not matter there: concatenations
/// become sums.
inline AnyForm along(const AnyForm& form, int axis) {
  if (form.is_leaf()) {
    const AnyShape& layer = form.leaf();
    return AnyForm(AnyShape(ConvShape<1>{
        .out = 1,
        .in = 1,
        .kernel_size = layer.kernel_size[axis],
        .stride = layer.stride[axis],
        .padding = Padding<1>::sides(layer.padding.start[axis], layer.padding.end[axis]),
        .dilation = layer.dilation[axis],
        .bias = layer.bias}));
  }
  std::vector<AnyForm> parts;
  for (const AnyForm& part : form.parts()) parts.push_back(along(part, axis));
  return {form.join() == Join::chain ? Join::chain : Join::sum, parts};
}

/// A size along one axis.
inline Axes line(Index size) { return all_axes(PerAxis<1>(size), 1); }

/// Whether every layer of a form along one axis fits on an input of this size.
inline bool fits(const AnyForm& form, Index size) {
  if (size < 1) return false;
  if (form.is_leaf()) return concertina::output_size(form.leaf(), size, 0) >= 1;
  for (const AnyForm& part : form.parts()) {
    if (!fits(part, size)) return false;
    if (form.join() == Join::chain) size = output_size(part, line(size))[0];
  }
  return true;
}

/// Whether every layer fits, every tap of the contraction reads an element of the map, of which
/// every `spacing`-th position has one, and an output lies off the border.
inline bool shows_everything(const AnyForm& form, const AnyShape& contraction, Index size,
                             Index spacing) {
  if (!fits(form, size)) return false;
  const Index positions = output_size(form, line(size))[0], stride = contraction.stride[0];
  for (Index tap = 0; tap < contraction.kernel_size[0]; ++tap) {
    const Index offset = tap * contraction.dilation[0] - contraction.padding.start[0];
    Index output = std::max<Index>(0, -floor_divide(offset, stride));
    while ((output * stride + offset) % spacing != 0) ++output;  // then the stride is 1
    if (output >= positions || output * stride + offset >= size) return false;
  }
  const AnyExactness found = find_exactness(form, line(size), spacing);
  return found.start[0] + found.end[0] < positions;
}

/// A proof that looked at nothing proves nothing.
template <int Rank>
void refuse_empty(Report& report, const PerAxis<Rank>& input_size) {
  if (report) {
    report.failure = "at input size " + to_string(input_size) +
                     " every output is on the border; take a larger input";
  }
}

/// Whether a position is a multiple of `spacing`.
template <int Rank>
bool is_spaced(const PerAxis<Rank>& position, const PerAxis<Rank>& spacing) {
  for (int axis = 0; axis < Rank; ++axis) {
    if (position[axis] % spacing[axis] != 0) return false;
  }
  return true;
}

template <int Rank>
bool off_border(const PerAxis<Rank>& position, const PerAxis<Rank>& size,
                const Exactness<Rank>& border) {
  for (int axis = 0; axis < Rank; ++axis) {
    if (position[axis] < border.start[axis]) return false;
    if (position[axis] >= size[axis] - border.end[axis]) return false;
  }
  return true;
}

/// The smallest size that shows everything; where one is named, of those that leave the same
/// remainders.
template <int Rank>
PerAxis<Rank> smallest_size(const Form<Rank>& form, const std::optional<PerAxis<Rank>>& input_size,
                            const PerAxis<Rank>& spacing) {
  const ConvShape<Rank> contraction = form.shape(input_size);
  PerAxis<Rank> size;
  for (int axis = 0; axis < Rank; ++axis) {
    const AnyForm line = along(form.tree(), axis);
    const AnyShape whole = along(AnyForm(contraction), axis).leaf();
    const Index step = (input_size ? contraction.stride[axis] : 1) * spacing[axis];
    Index& extent = size[axis];
    extent = std::max<Index>(
        1, effective_kernel_size(whole, 0) - whole.padding.start[0] - whole.padding.end[0]);
    const Index more = (input_size ? (*input_size)[axis] : 1) - extent;
    extent += more - step * floor_divide(more, step);
    constexpr Index most_steps = 4096;  // real layers take a few
    const Index most = extent + most_steps * step;
    while (!shows_everything(line, whole, extent, spacing[axis])) {
      extent += step;
      if (extent >= most) {
        throw SizeError("no input up to " + std::to_string(extent) +
                        " shows every tap and an output off the border (" +
                        concertina::to_string(contraction) + ")");
      }
    }
  }
  return size;
}

}  // namespace detail

template <int Rank>
PerAxis<Rank> smallest_input(const Form<Rank>& form,
                             const std::type_identity_t<std::optional<PerAxis<Rank>>>& input_size) {
  return detail::smallest_size<Rank>(form, input_size, 1);
}

template <class Scalar, int Rank>
PerAxis<Rank> smallest_input(const TransposedExpr<Scalar, Rank>& expression) {
  PerAxis<Rank> size =
      detail::smallest_size<Rank>(Form(expression.dense()), {}, expression.stride());
  for (int axis = 0; axis < Rank; ++axis) size[axis] = size[axis] / expression.stride()[axis] + 1;
  return size;
}

}  // namespace concertina
