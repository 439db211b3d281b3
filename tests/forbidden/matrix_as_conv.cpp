// A matrix does not turn into a layer by itself: it says nothing about kernel, stride or padding.
// SPDX-License-Identifier: Apache-2.0
// expect: could not convert .matrix.|no viable conversion from
#include <concertina/contract.hpp>

using concertina::Linear;

Linear<float> layer(const Eigen::MatrixXf& matrix) {
#ifdef CONCERTINA_CONTROL
  return Linear<float>({.out = matrix.rows(), .in = matrix.cols()});
#else
  return matrix;
#endif
}
