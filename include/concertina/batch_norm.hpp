// Batch norms in inference.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/expression.hpp>

#include <cmath>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

namespace concertina {

/// The tensors of a batch norm, one element for each channel, as PyTorch names them; weight and
/// bias are empty where it has none (affine=False).
template <class Scalar>
struct BatchNorm {
  std::vector<Scalar> running_mean, running_var;
  std::vector<Scalar> weight = {}, bias = {};
  double eps = 1e-5;

  /// As PyTorch initialises one: it divides by sqrt(1 + eps). Throws ShapeError for no channels.
  static BatchNorm initialize(Index channels) {
    const auto all = [&](int value) {
      return detail::per_channel(channels, Scalar(value), "BatchNorm");
    };
    return {.running_mean = all(0), .running_var = all(1), .weight = all(1), .bias = all(0)};
  }
};

/// A batch norm in inference, (x - running_mean) / sqrt(running_var + eps) * weight + bias. Its
/// factors are computed in the accumulator of the contraction, so they are not rounded to Scalar.
/// Throws  ShapeError where lengths differ, NumericalError naming the channel where running_var +
///         eps is not positive and finite; eps may be 0
/// Source  Ioffe, Szegedy, Batch normalization, ICML 2015; torch.nn.BatchNorm2d
template <class Scalar>
  requires detail::rounds<Scalar>
Expr<Scalar, any_rank> batch_norm(BatchNorm<Scalar> norm) {
  const std::size_t channels = norm.running_mean.size();
  const auto require_length = [&](const std::vector<Scalar>& list, const char* name,
                                  bool optional) {
    if (list.size() == channels || (optional && list.empty())) return;
    throw ShapeError("batch_norm: " + std::string(name) + " has " + std::to_string(list.size()) +
                     " elements, running_mean " + std::to_string(channels));
  };
  if (channels == 0) throw ShapeError("batch_norm: no channels");
  require_length(norm.running_var, "running_var", false);
  require_length(norm.weight, "weight", true);
  require_length(norm.bias, "bias", true);
  for (std::size_t c = 0; c < channels; ++c) {
    const auto variance = convert<long double>(norm.running_var[c]);
    const long double sum = variance + static_cast<long double>(norm.eps);
    if (sum > 0 && std::isfinite(sum)) continue;
    std::ostringstream message;
    message << "batch_norm: running_var[" << c << "] + eps = " << variance << " + " << norm.eps
            << ", which is not positive and finite";
    throw NumericalError(message.str());
  }
  const auto count = static_cast<Index>(channels);
  return ChannelMap<Scalar>{.in = count,
                            .out = count,
                            .mean = std::move(norm.running_mean),
                            .variance = std::move(norm.running_var),
                            .weight = std::move(norm.weight),
                            .bias = std::move(norm.bias),
                            .eps = norm.eps};
}

}  // namespace concertina
