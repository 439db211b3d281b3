// Whether two layers are the same map: element by element of what ties two channels at an offset.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/conv.hpp>

#include <cstddef>
#include <string>

namespace concertina::detail {

/// Why two layers of these shapes cannot be the same map whatever their weights; empty where they
/// can.
template <int Rank>
std::string incomparable(const ConvShape<Rank>& f, const ConvShape<Rank>& g) {
  const auto growth = [](const ConvShape<Rank>& shape, int axis) {
    return shape.padding.start[axis] + shape.padding.end[axis] - effective_kernel_size(shape, axis);
  };
  if (f.in != g.in || f.out != g.out) return "channels differ";
  if (f.stride != g.stride) return "strides differ";
  for (int axis = 0; axis < Rank; ++axis) {
    if (growth(f, axis) != growth(g, axis)) return "output sizes differ";
  }
  return "";
}

/// The weight that ties output channel o to input channel c at `offset` from the start of the
/// stride; zero where the layer has no tap there.
template <class Scalar, int Rank>
Scalar tap_at(const ConvView<const Scalar, Rank>& layer, Index o, Index c,
              const PerAxis<Rank>& offset) {
  const auto& padding = layer.shape().padding;
  const auto& dilation = layer.shape().dilation;
  const auto& groups = layer.shape().groups;
  const Index in = layer.shape().in / groups, group = o / (layer.shape().out / groups);
  if (c / in != group) return Scalar(0);
  PerAxis<Rank> tap;
  for (int axis = 0; axis < Rank; ++axis) {
    const Index distance = offset[axis] + padding.start[axis];
    tap[axis] = distance / dilation[axis];
    if (distance < 0 || distance % dilation[axis] != 0 ||
        tap[axis] >= layer.shape().kernel_size[axis]) {
      return Scalar(0);
    }
  }
  const Index row = (o * in + c - group * in) * numel(layer.shape().kernel_size);
  return layer.weight()[static_cast<std::size_t>(row + flat(tap, layer.shape().kernel_size))];
}

/// Calls visit(o, c, offset, element) for every element of the weight, in memory order.
template <class Scalar, int Rank, class Visit>
void for_each_weight(const ConvView<const Scalar, Rank>& layer, Visit&& visit) {
  const auto& padding = layer.shape().padding;
  const auto& dilation = layer.shape().dilation;
  const auto& groups = layer.shape().groups;
  const Index in = layer.shape().in / groups, out = layer.shape().out / groups;
  auto element = layer.weight().begin();
  for (Index o = 0; o < layer.shape().out; ++o) {
    for (Index c = o / out * in; c < (o / out + 1) * in; ++c) {
      for_each_position(layer.shape().kernel_size, [&](const PerAxis<Rank>& tap) {
        PerAxis<Rank> offset;
        for (int axis = 0; axis < Rank; ++axis) {
          offset[axis] = tap[axis] * dilation[axis] - padding.start[axis];
        }
        visit(o, c, offset, *element++);
      });
    }
  }
}

template <class Scalar, int Rank>
bool same_map(const ConvView<const Scalar, Rank>& f, const ConvView<const Scalar, Rank>& g) {
  if (!incomparable(f.shape(), g.shape()).empty()) return false;
  const auto holds = [](const ConvView<const Scalar, Rank>& a,
                        const ConvView<const Scalar, Rank>& b) {
    bool same = true;
    for_each_weight(a, [&](Index o, Index c, const PerAxis<Rank>& offset, const Scalar& element) {
      same = same && element == tap_at(b, o, c, offset);
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
