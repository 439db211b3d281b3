// Two layers tap by tap, wherever their kernels lie: what equality as maps and the proofs stand on.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/conv.hpp>

namespace concertina::detail {

/// Why two layers of these shapes cannot be the same map whatever their numbers; empty where they
/// can.
template <int Rank>
std::string incomparable(const ConvShape<Rank>& f, const ConvShape<Rank>& g) {
  const auto growth = [](const ConvShape<Rank>& shape, int axis) {
    const Padding<Rank>& padding = shape.padding;
    return padding.start[axis] + padding.end[axis] - span(shape, axis);
  };
  if (f.in != g.in || f.out != g.out) return "channels differ";
  if (f.stride != g.stride) return "strides differ";
  for (int axis = 0; axis < Rank; ++axis) {
    if (growth(f, axis) != growth(g, axis)) return "output sizes differ";
  }
  return "";
}

/// The number that ties output channel o to input channel c at `offset` from the start of the
/// stride; zero where the layer has no tap there.
template <class Scalar, int Rank>
Scalar tap_at(const ConvView<Scalar, Rank>& layer, Index o, Index c, const PerAxis<Rank>& offset) {
  const auto& dilation = layer.shape().dilation;
  const auto& groups = layer.shape().groups;
  const Index in = layer.shape().in / groups, group = o / (layer.shape().out / groups);
  if (c / in != group) return Scalar(0);
  PerAxis<Rank> tap;
  for (int axis = 0; axis < Rank; ++axis) {
    const Index distance = offset[axis] + layer.shape().padding.start[axis];
    tap[axis] = distance / dilation[axis];
    if (distance < 0 || distance % dilation[axis] != 0 ||
        tap[axis] >= layer.shape().kernel_size[axis]) {
      return Scalar(0);
    }
  }
  const Index row = (o * in + c - group * in) * numel(layer.shape().kernel_size);
  return layer.weight()[static_cast<std::size_t>(row + flat(tap, layer.shape().kernel_size))];
}

/// Calls visit(o, c, offset, number) for every number in the weight.
template <class Scalar, int Rank, class Visit>
void for_each_tap(const ConvView<Scalar, Rank>& layer, Visit&& visit) {
  const auto& groups = layer.shape().groups;
  const Index in = layer.shape().in / groups, out = layer.shape().out / groups;
  auto number = layer.weight().begin();
  for (Index o = 0; o < layer.shape().out; ++o) {
    for (Index c = o / out * in; c < (o / out + 1) * in; ++c) {
      for_each_position(layer.shape().kernel_size, [&](const PerAxis<Rank>& tap) {
        PerAxis<Rank> offset;
        for (int axis = 0; axis < Rank; ++axis) {
          offset[axis] =
              tap[axis] * layer.shape().dilation[axis] - layer.shape().padding.start[axis];
        }
        visit(o, c, offset, *number++);
      });
    }
  }
}

template <class Scalar, int Rank>
bool same_map(const ConvView<Scalar, Rank>& f, const ConvView<Scalar, Rank>& g) {
  if (!incomparable(f.shape(), g.shape()).empty()) return false;
  const auto holds = [](const ConvView<Scalar, Rank>& a, const ConvView<Scalar, Rank>& b) {
    bool same = true;
    for_each_tap(a, [&](Index o, Index c, const PerAxis<Rank>& offset, const Scalar& number) {
      same = same && number == tap_at(b, o, c, offset);
    });
    return same;
  };
  for (Index o = 0; o < f.shape().out; ++o) {
    const auto at = static_cast<std::size_t>(o);
    const Scalar zero(0);
    if (!((f.bias().empty() ? zero : f.bias()[at]) == (g.bias().empty() ? zero : g.bias()[at]))) {
      return false;
    }
  }
  return holds(f, g) && holds(g, f);
}

}  // namespace concertina::detail
