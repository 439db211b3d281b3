// From names in a file to layers.
// SPDX-License-Identifier: Apache-2.0
#include "read_layer.hpp"

#include "text.hpp"

#include <concertina/exactness.hpp>

#include <algorithm>

namespace tool {

using concertina::ConvShape;
using concertina::io::Dtype;
using concertina::io::Safetensors;

namespace {

std::string about(const Safetensors& file, const LayerDescription& layer) {
  return file.origin + ": layer " + in_quotes(layer.name.empty() ? "weight" : layer.name);
}

}  // namespace

Dtype supported_dtype(const Safetensors& file, const std::string& tensor) {
  const Dtype dtype = file.tensor(tensor).dtype;
  switch (dtype) {
    case Dtype::F64:
    case Dtype::F32:
    case Dtype::F16:
    case Dtype::BF16: return dtype;
    default:
      throw concertina::FormatError(file.origin + ": tensor " + in_quotes(tensor) + " is " +
                                    std::string(dtype_name(file.tensor(tensor))) +
                                    "; layers may be F64, F32, F16 and BF16");
  }
}

int rank_of_layer(const Safetensors& file, const LayerDescription& layer) {
  const auto& weight = file.tensor(layer.tensor("weight"));
  const int rank = static_cast<int>(std::min<std::size_t>(weight.shape.size(), 6)) - 2;
  if (rank < 0 || rank > 3 || (layer.linear && rank != 0)) {
    throw concertina::FormatError(
        about(file, layer) + ": its weight has " + std::to_string(weight.shape.size()) +
        (layer.linear ? " axes, expected [out, in]"
                      : " axes, expected [out, in / groups] and at most 3 spatial ones"));
  }
  return rank;
}

template <class Scalar, int Rank>
concertina::Conv<Scalar, Rank> read_layer(const Safetensors& file, const LayerDescription& layer) {
  const std::string where = about(file, layer);
  const auto& weight = file.tensor(layer.tensor("weight"));
  const int rank = rank_of_layer(file, layer);
  if (rank != Rank) {
    throw concertina::FormatError(where + ": its weight has " + std::to_string(rank) +
                                  " spatial axes, where " + std::to_string(Rank) +
                                  " are expected from the layers before");
  }
  ConvShape<Rank> shape = geometry_of<Rank>(layer, where);
  shape.out = weight.shape[0];
  for (int axis = 0; axis < Rank; ++axis)
    shape.kernel_size[axis] = weight.shape[static_cast<std::size_t>(axis) + 2];
  const std::string bias = layer.tensor("bias");
  shape.bias = file.contains(bias);
  if (shape.bias && file.tensor(bias).shape != std::vector<Index>{shape.out}) {
    throw concertina::ShapeError(where + ": its bias is not a list of " +
                                 std::to_string(shape.out) + " elements");
  }
  try {
    shape.in =
        concertina::detail::checked_multiply(weight.shape[1], layer.groups, "input channels");
    return {shape, finite_values<Scalar>(file, layer.tensor("weight"), where),
            shape.bias ? finite_values<Scalar>(file, bias, where) : std::vector<Scalar>()};
  } catch (const concertina::ShapeError& error) {
    throw concertina::ShapeError(where + ": " + error.what());
  } catch (const concertina::SizeError& error) {
    throw concertina::SizeError(where + ": " + error.what());
  }
}

template concertina::Conv<float, 0> read_layer(const Safetensors&, const LayerDescription&);
template concertina::Conv<float, 1> read_layer(const Safetensors&, const LayerDescription&);
template concertina::Conv<float, 2> read_layer(const Safetensors&, const LayerDescription&);
template concertina::Conv<float, 3> read_layer(const Safetensors&, const LayerDescription&);
template concertina::Conv<double, 0> read_layer(const Safetensors&, const LayerDescription&);
template concertina::Conv<double, 1> read_layer(const Safetensors&, const LayerDescription&);
template concertina::Conv<double, 2> read_layer(const Safetensors&, const LayerDescription&);
template concertina::Conv<double, 3> read_layer(const Safetensors&, const LayerDescription&);

}  // namespace tool
