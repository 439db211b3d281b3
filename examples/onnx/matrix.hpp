// Memory seen as a matrix.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <Eigen/Core>

namespace tool::evaluation {

template <class Scalar>
using Matrix = Eigen::Matrix<Scalar, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

template <class Scalar>
Eigen::Map<Matrix<Scalar>> matrix(Scalar* data, Eigen::Index rows, Eigen::Index columns) {
  return {data, rows, columns};
}
template <class Scalar>
Eigen::Map<const Matrix<Scalar>> matrix(const Scalar* data, Eigen::Index rows,
                                        Eigen::Index columns) {
  return {data, rows, columns};
}

}  // namespace tool::evaluation
