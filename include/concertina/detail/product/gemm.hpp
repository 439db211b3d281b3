// The matrix product that everything else is made of, instantiated once for each scalar.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/detail/tuning.hpp>

#include <Eigen/Core>

#include <algorithm>
#include <type_traits>

namespace concertina::detail {

enum class Op { none, transpose };

/// A row-major matrix in memory: the element (i, j) is at data[i * ld + j].
template <class Element>
struct Matrix {
  Element* data;
  Index ld;  ///< leading dimension

  Element* at(Index row, Index column) const { return data + row * ld + column; }
  Matrix block(Index row, Index column) const { return {at(row, column), ld}; }
  operator Matrix<const Element>() const
    requires(!std::is_const_v<Element>)
  {
    return {data, ld};
  }
};

/// y += factor * x.
template <class Scalar>
void axpy(Index count, const Scalar& factor, const Scalar* x, Scalar* y) {
  for (Index i = 0; i < count; ++i) y[i] = y[i] + factor * x[i];
}

template <class Scalar>
Scalar dot(Index count, const Scalar* x, const Scalar* y) {
  constexpr Index lanes = tuning::dot_lanes;
  Scalar sum(0);
  Index i = 0;
  if (count >= lanes) {
    Scalar partial[lanes];
    for (Index l = 0; l < lanes; ++l) partial[l] = x[l] * y[l];
    for (i = lanes; i + lanes <= count; i += lanes) {
      for (Index l = 0; l < lanes; ++l) partial[l] = partial[l] + x[i + l] * y[i + l];
    }
    for (Index l = 0; l < lanes; ++l) sum = sum + partial[l];
  }
  for (; i < count; ++i) sum = sum + x[i] * y[i];
  return sum;
}

/// c = op_a(a) op_b(b), or c += where `accumulate`; c is rows x columns, the sum over `inner`
/// terms. Eigen's own BLAS calls its kernels in this way: one instantiation for each pair of
/// storage orders instead of one for each expression type, which is most of what a contraction
/// compiles.
template <class Scalar>
void gemm(Op op_a, Op op_b, Index rows, Index columns, Index inner, Matrix<const Scalar> a,
          Matrix<const Scalar> b, bool accumulate, Matrix<Scalar> c) {
  if (!accumulate) {
    for (Index i = 0; i < rows; ++i) std::fill_n(c.at(i, 0), columns, Scalar(0));
  }
  if ((rows == 1 || inner == 1) && op_b == Op::none) {  // packing would cost more than it saves
    for (Index i = 0; i < rows; ++i) {
      for (Index k = 0; k < inner; ++k) {
        axpy(columns, *(op_a == Op::none ? a.at(i, k) : a.at(k, i)), b.at(k, 0), c.at(i, 0));
      }
    }
    return;
  }
  const auto run = [&]<int AOrder, int BOrder>() {
    // In column-major order: c' = op_b(b)' op_a(a)'.
    using Kernel =
        Eigen::internal::general_matrix_matrix_product<Index, Scalar, BOrder, false, Scalar, AOrder,
                                                       false, Eigen::ColMajor, 1>;
    using Blocking =
        Eigen::internal::gemm_blocking_space<Eigen::ColMajor, Scalar, Scalar, Eigen::Dynamic,
                                             Eigen::Dynamic, Eigen::Dynamic, 1, false>;
    Blocking blocking(columns, rows, inner, 1, true);
    Kernel::run(columns, rows, inner, b.data, b.ld, a.data, a.ld, c.data, 1, c.ld, Scalar(1),
                blocking, nullptr);
  };
  constexpr int plain = Eigen::ColMajor, transposed = Eigen::RowMajor;
  if (op_a == Op::transpose) {
    run.template operator()<transposed, plain>();
  } else if (op_b == Op::transpose) {
    run.template operator()<plain, transposed>();
  } else {
    run.template operator()<plain, plain>();
  }
}

/// From [rows][columns], rows `ld` apart, to [columns][rows]. A negative leading dimension of `to`
/// writes the columns in reverse.
template <class Scalar>
void transpose(Matrix<const Scalar> from, Index rows, Index columns, Matrix<Scalar> to) {
  constexpr Index together = tuning::transposed_rows;
  Index row = 0;
  for (; row + together <= rows; row += together) {
    for (Index column = 0; column < columns; ++column) {
      for (Index i = 0; i < together; ++i) *to.at(column, row + i) = *from.at(row + i, column);
    }
  }
  for (; row < rows; ++row) {
    for (Index column = 0; column < columns; ++column) *to.at(column, row) = *from.at(row, column);
  }
}

}  // namespace concertina::detail
