// Linear maps that treat every position alike and read at most one channel for each that they
// write: batch norms, scales, permutations. Kept as vectors until they are multiplied.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/conv.hpp>

#include <string>
#include <vector>

namespace concertina {

/// y[o] = (x[source[o]] - mean[o]) / sqrt(variance[o] + eps) / divisor * weight[o] + bias[o], at
/// every position. What is empty or 1 does nothing; no source means channel o itself. The fields
/// are as they were given: what follows from them is computed in the scalar of the contraction, so
/// nothing is rounded twice. Made by the functions of layers.hpp and batch_norm.hpp, which
/// check it.
template <class Scalar>
struct ChannelMap {
  Index in = 0;
  Index out = 0;
  std::vector<Index> source = {};
  std::vector<Scalar> mean = {}, variance = {}, weight = {}, bias = {};
  double eps = 0;
  Index divisor = 1;

  /// As a layer: 1x1, depthwise unless channels change places.
  template <int Rank>
  ConvShape<Rank> shape() const {
    return {.out = out,
            .in = in,
            .groups = source.empty() ? in : 1,
            .bias = !bias.empty() || !mean.empty()};
  }

  /// From the gradient of its layer, as Contraction::backward gives it, to those of its own fields:
  /// weight, bias, mean and variance of a batch norm, the factors of a scale. A map of the same
  /// channels, source, eps and divisor of which those fields are the gradients; empty where they
  /// are here. Statistics count as constants of the map, not as functions of a batch.
  /// Throws  ShapeError where the gradient is not of the map's shape
  template <int Rank>
  ChannelMap backward(const Conv<Scalar, Rank>& gradient) const;

  friend bool operator==(const ChannelMap&, const ChannelMap&) = default;
};

/// What it is and its channels, "batch_norm[8]", "select[8->4]"; "1/9[8]" is the division in a
/// pool.
template <class Scalar>
std::string to_string(const ChannelMap<Scalar>& map) {
  const std::string in = std::to_string(map.in), out = std::to_string(map.out);
  if (!map.variance.empty()) return "batch_norm[" + out + "]";
  if (!map.source.empty()) return "select[" + in + "->" + out + "]";
  if (map.divisor != 1) return "1/" + std::to_string(map.divisor) + "[" + out + "]";
  return (!map.weight.empty() ? "scale[" : !map.bias.empty() ? "bias[" : "identity[") + out + "]";
}

}  // namespace concertina

#include <concertina/detail/channel_map.ipp>
