// Channel maps as layers, and from the gradient of such a layer to the map's.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/channel_map.hpp>

#include <algorithm>
#include <cmath>

namespace concertina {
namespace detail {

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

}  // namespace detail

template <class Scalar>
template <int Rank>
ChannelMap<Scalar> ChannelMap<Scalar>::backward(const Conv<Scalar, Rank>& gradient) const {
  if (gradient.shape() != shape<Rank>()) {
    detail::fail<ShapeError>({"channel map: a gradient of shape ", gradient.shape(),
                              ", where the map's layer is ", shape<Rank>()});
  }
  using Wide = detail::WideFor<Scalar>;
  ChannelMap result = *this;
  for (auto* field : {&result.mean, &result.variance, &result.weight, &result.bias}) {
    std::ranges::fill(*field, Scalar(0));
  }
  // factor = weight / sqrt(variance + eps) / divisor, shift = bias - mean * factor
  for (std::size_t o = 0; o < static_cast<std::size_t>(out); ++o) {
    Wide of_factor = convert<Wide>(gradient.weight()[detail::factor_position(*this, o)]);
    Wide scale(1);  // factor / weight
    if constexpr (requires { scale / scale; }) {
      if (!variance.empty()) scale = scale / detail::deviation<Wide>(*this, o);
      if (divisor != 1) scale = scale / static_cast<Wide>(divisor);
    }
    const Wide own = weight.empty() ? Wide(1) : convert<Wide>(weight[o]);
    if (!bias.empty()) result.bias[o] = gradient.bias()[o];
    if constexpr (requires { -scale; }) {
      if (!mean.empty()) {
        const Wide of_shift = convert<Wide>(gradient.bias()[o]);
        of_factor = of_factor + -(of_shift * convert<Wide>(mean[o]));
        result.mean[o] = convert<Scalar>(-(of_shift * own * scale));
      }
    }
    if (!weight.empty()) result.weight[o] = convert<Scalar>(of_factor * scale);
    if constexpr (detail::rounds<Wide>) {
      if (!variance.empty()) {
        const Wide deviation = detail::deviation<Wide>(*this, o);
        result.variance[o] =
            convert<Scalar>(-of_factor * own * scale / 2 / (deviation * deviation));
      }
    }
  }
  return result;
}

}  // namespace concertina
