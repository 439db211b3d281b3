// A batch of feature maps of any rank, and what is asked of its shape.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/error.hpp>
#include <concertina/io/safetensors.hpp>

#include <Eigen/Core>

#include <cmath>
#include <cstddef>
#include <functional>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

namespace tool {

using concertina::Index;

/// A batch: [batch, channels, spatial...], row-major.
template <class Scalar>
struct Tensor {
  std::vector<Index> shape;
  std::vector<Scalar> values;

  friend bool operator==(const Tensor&, const Tensor&) = default;
};

/// A file's tensor, widened. Throws FormatError where Scalar does not hold its values exactly.
template <class Scalar>
Tensor<Scalar> read_tensor(const concertina::io::Safetensors& file, const std::string& name) {
  return {file.tensor(name).shape, file.values<Scalar>(name)};
}

inline std::string to_text(const std::vector<Index>& shape) {
  std::string text;
  for (const Index extent : shape) text += (text.empty() ? "" : ", ") + std::to_string(extent);
  return "[" + text + "]";
}

[[noreturn]] inline void refuse_shape(const std::string& where, const std::string& what) {
  throw concertina::ShapeError(where + ": " + what);
}

/// The product of extents. Throws SizeError where so many elements take more than 4 GiB: a padding
/// can ask for anything.
template <class Scalar>
Index modest_count(const std::vector<Index>& extents, const std::string& where) {
  constexpr Index most = (Index{1} << 32) / static_cast<Index>(sizeof(Scalar));
  Index count = 1;
  for (const Index extent : extents) {
    if (extent > 0 && count > most / extent) {
      throw concertina::SizeError(where + ": an array of " + to_text(extents) +
                                  " takes more than 4 GiB");
    }
    count *= extent;
  }
  return count;
}

template <class Scalar>
Tensor<Scalar> zeros(std::vector<Index> shape, const std::string& where) {
  const Index count = modest_count<Scalar>(shape, where);
  return {std::move(shape), std::vector<Scalar>(static_cast<std::size_t>(count))};
}

/// Elements in one channel of one image.
template <class Scalar>
Index per_channel(const Tensor<Scalar>& x) {
  return std::accumulate(x.shape.begin() + 2, x.shape.end(), Index{1}, std::multiplies<>());
}

template <class Scalar>
void require_channels(const Tensor<Scalar>& x, Index channels, const std::string& where) {
  if (x.shape[1] != channels) {
    refuse_shape(where, "it reads " + std::to_string(channels) + " channels, but is given " +
                            std::to_string(x.shape[1]) + " (" + to_text(x.shape) + ")");
  }
}

template <class Scalar>
void require_axes(const Tensor<Scalar>& x, std::size_t axes, const std::string& where) {
  if (x.shape.size() != axes) {
    refuse_shape(where,
                 "it reads " + std::to_string(axes) + " axes, but is given " + to_text(x.shape));
  }
}

/// The largest |a - b|; NaN where there is one. Throws ShapeError where shapes differ.
template <class Scalar>
Scalar largest_difference(const Tensor<Scalar>& a, const Tensor<Scalar>& b) {
  if (a.shape != b.shape) {
    refuse_shape("difference", "of " + to_text(a.shape) + " and " + to_text(b.shape));
  }
  Scalar largest = 0;
  for (std::size_t i = 0; i < a.values.size(); ++i) {
    const Scalar difference = std::abs(a.values[i] - b.values[i]);
    if (!(difference <= largest)) largest = difference;  // NaN stays
  }
  return largest;
}

/// One channel's elements.
template <class Scalar>
using Row = Eigen::Map<Eigen::Array<Scalar, 1, Eigen::Dynamic>>;

/// Calls each(channel, row) with every channel of every image.
template <class Scalar, class Each>
void for_each_channel(Tensor<Scalar>& x, Each&& each) {
  const Index size = per_channel(x);
  Scalar* at = x.values.data();
  for (Index n = 0; n < x.shape[0]; ++n) {
    for (Index c = 0; c < x.shape[1]; ++c, at += size) each(c, Row<Scalar>(at, size));
  }
}

}  // namespace tool
