// One layer of a file with its elements.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "layer_description.hpp"
#include "text.hpp"

#include <concertina/conv.hpp>
#include <concertina/error.hpp>
#include <concertina/io/safetensors.hpp>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

namespace tool {

/// A layer's elements. Throws FormatError, which begins with `where`, unless all are finite.
template <class Scalar>
std::vector<Scalar> finite_values(const concertina::io::Safetensors& file,
                                  const std::string& tensor, const std::string& where) {
  std::vector<Scalar> elements = file.values<Scalar>(tensor);
  const auto found =
      std::ranges::find_if_not(elements, [](Scalar element) { return std::isfinite(element); });
  if (found == elements.end()) return elements;
  throw concertina::FormatError(where + ": tensor " + in_quotes(tensor) +
                                " is not finite, element " +
                                std::to_string(found - elements.begin()) + " is " +
                                (std::isnan(*found) ? "NaN" : "infinite"));
}

/// The dtype of a layer's tensor. Throws FormatError unless it is F64, F32, F16 or BF16.
concertina::io::Dtype supported_dtype(const concertina::io::Safetensors& file,
                                      const std::string& tensor);

/// One layer. Throws FormatError or ShapeError naming file and layer. Defined for float and double,
/// ranks 0 to 3.
template <class Scalar, int Rank>
concertina::Conv<Scalar, Rank> read_layer(const concertina::io::Safetensors& file,
                                          const LayerDescription& layer);

/// Spatial axes of a layer's weight. Throws FormatError where it is not a weight.
int rank_of_layer(const concertina::io::Safetensors& file, const LayerDescription& layer);

/// Weights and biases of a layer of this shape.
template <int Rank>
Index parameters(const concertina::ConvShape<Rank>& shape) {
  return weight_numel(shape) + (shape.bias ? shape.out : 0);
}

}  // namespace tool
