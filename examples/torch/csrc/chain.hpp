// What the operators on the processor and on CUDA devices share: chains that come as integers, and
// their tensors.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/shape.hpp>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstddef>
#include <cstdint>
#include <vector>

namespace concertina::torch_operators {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Integers = std::vector<std::int64_t>;

constexpr int rank = 3;  // layers of lower rank are those of rank 3 with leading axes of 1

constexpr std::size_t encoded_length = 12;

/// Layers as concertina/torch/operators.py encodes them: channels in and out, groups; kernel size,
/// stride and dilation of three axes. Paddings do not enter a weight.
inline std::vector<ConvShape<rank>> decoded(const Integers& form) {
  STD_TORCH_CHECK(!form.empty() && form.size() % encoded_length == 0,
                  "concertina: not an encoded chain");
  std::vector<ConvShape<rank>> shapes;
  for (std::size_t at = 0; at < form.size(); at += encoded_length) {
    ConvShape<rank> shape{.out = form[at + 1], .in = form[at], .groups = form[at + 2]};
    for (int axis = 0; axis < rank; ++axis) {
      const std::size_t first = at + 3 + static_cast<std::size_t>(axis);
      shape.kernel_size[axis] = form[first];
      shape.stride[axis] = form[first + 3];
      shape.dilation[axis] = form[first + 6];
    }
    shapes.push_back(shape);
  }
  return shapes;
}

/// What several chains that follow each other have, for each: so many layers of that many elements.
template <class Element>
std::vector<std::vector<Element>> divided(const std::vector<Element>& all, const Integers& counts,
                                          std::ptrdiff_t elements = 1) {
  std::vector<std::vector<Element>> result;
  auto from = all.begin();
  for (const std::int64_t count : counts) {
    STD_TORCH_CHECK(0 < count && count <= (all.end() - from) / elements,
                    "concertina: chains of other lengths than their layers");
    result.emplace_back(from, from + count * elements);
    from += count * elements;
  }
  STD_TORCH_CHECK(from == all.end(), "concertina: layers in no chain");
  return result;
}

/// The sizes of a layer's weight whose own rank may be lower.
inline Integers weight_sizes(const ConvShape<rank>& shape, int own_rank) {
  Integers sizes{shape.out, shape.in / shape.groups};
  for (int axis = rank - own_rank; axis < rank; ++axis) sizes.push_back(shape.kernel_size[axis]);
  return sizes;
}

inline int own_rank(const Tensor& weight) {
  STD_TORCH_CHECK(2 <= weight.dim() && weight.dim() <= 2 + rank, "concertina: a weight of ",
                  weight.dim(), " dimensions, not 2 to ", 2 + rank);
  return static_cast<int>(weight.dim()) - 2;
}

inline std::vector<Tensor> contiguous(const std::vector<Tensor>& tensors, const Tensor& like) {
  std::vector<Tensor> result;
  for (const Tensor& tensor : tensors) {
    STD_TORCH_CHECK(tensor.scalar_type() == like.scalar_type(), "concertina: dtypes differ");
    result.push_back(torch::stable::contiguous(tensor));
  }
  return result;
}

}  // namespace concertina::torch_operators
