// Channel maps as layers.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/channel_map.hpp>

#include <cmath>

namespace concertina::detail {

/// What a map divides channel o by but its divisor: the root of its variance plus eps, or 1.
template <class Wide, class Scalar>
Wide deviation(const ChannelMap<Scalar>& map, std::size_t o) {
  if constexpr (rounds<Wide>) {
    using std::sqrt;
    if (!map.variance.empty()) {
      return sqrt(convert<Wide>(map.variance[o]) + static_cast<Wide>(map.eps));
    }
  }
  return Wide(1);
}

/// Where the factor of channel o stands in the weight of the map's layer.
template <class Scalar>
std::size_t factor_position(const ChannelMap<Scalar>& map, std::size_t o) {
  return map.source.empty()
             ? o
             : o * static_cast<std::size_t>(map.in) + static_cast<std::size_t>(map.source[o]);
}

/// Writes the map as a layer; see to_conv. Requires the layer to be of the map's shape, and all
/// zeros where no channel's factor stands.
template <class A, int Rank, class Scalar>
void write_layer(const ChannelMap<Scalar>& map, Conv<A, Rank>& layer) {
  using Wide = WideFor<A>;
  for (std::size_t o = 0; o < static_cast<std::size_t>(map.out); ++o) {
    Wide factor = map.weight.empty() ? Wide(1) : convert<Wide>(map.weight[o]);
    if constexpr (requires { factor / factor; }) {
      if (!map.variance.empty()) factor = factor / deviation<Wide>(map, o);
      if (map.divisor != 1) factor = factor / static_cast<Wide>(map.divisor);
    }
    layer.weight()[factor_position(map, o)] = convert<A>(factor);
    if (!layer.shape().bias) continue;
    Wide bias = map.bias.empty() ? Wide(0) : convert<Wide>(map.bias[o]);
    if constexpr (requires { bias - bias; }) {
      if (!map.mean.empty()) bias = bias - convert<Wide>(map.mean[o]) * factor;
    }
    layer.bias()[o] = convert<A>(bias);
  }
}

/// The map in A as a layer. Where A has fewer digits than double, each element is computed in
/// double and rounded once.
/// Ensures  factors within 4 roundings of A of the exact ones, the bias within 7, relative to the
///          absolute values of its terms
template <class A, int Rank, class Scalar>
Conv<A, Rank> to_conv(const ChannelMap<Scalar>& map) {
  Conv<A, Rank> layer(map.template shape<Rank>());
  write_layer(map, layer);
  return layer;
}

}  // namespace concertina::detail
