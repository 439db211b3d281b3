// Eigen's matrices in the order in which weights lie.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <Eigen/Core>

namespace concertina::detail {

template <class Scalar>
using RowMajor = Eigen::Matrix<Scalar, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

}  // namespace concertina::detail
