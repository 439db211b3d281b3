// The matrix that a layer is: written out, sparse or dense; as an operator for Eigen's solvers; and
// back to the kernel.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/conv.hpp>
#include <concertina/detail/apply_matrix.hpp>

#include <Eigen/Core>
#include <Eigen/SparseCore>

#include <concepts>
#include <cstddef>
#include <memory>
#include <type_traits>
#include <vector>

namespace concertina {

/// What a matrix may take; a larger one is refused before anything is allocated.
struct MemoryLimit {
  std::size_t bytes = std::size_t{4} << 30;
};

namespace detail {

struct MatrixSize {
  Index rows, columns;
};

}  // namespace detail

/// The matrix of a layer's linear part on maps of `input_size`. Rows are outputs, (channel,
/// position) row-major, and columns inputs, so the matrix times a flat map is the flat output, but
/// for the bias. One channel, kernel 2x2, input 3x3:
///
///     w00 w01  0  w10 w11  0   0   0   0
///      0  w00 w01  0  w10 w11  0   0   0
///      0   0   0  w00 w01  0  w10 w11  0
///      0   0   0   0  w00 w01  0  w10 w11
///
/// Every tap that falls on the map has an entry, even where its weight is zero: the pattern depends
/// on shapes only. Eigen makes it dense: Eigen::MatrixXf(toeplitz(F, n)).
/// Ensures  toeplitz(F, n) * x + b == F(x), and toeplitz(G * F, n) == toeplitz(G, m) * toeplitz(F, n) where the
///          product is exact and F takes size n to m
/// Cost     the entries, each with an index of 32 bits
/// Throws   SizeError where it would exceed `limit` or the index; ShapeError for an input smaller than the kernel
/// Source   ExpandNets (NeurIPS 2020), supplement
template <Layer F>
Eigen::SparseMatrix<typename F::Scalar, Eigen::RowMajor> toeplitz(
    const F& layer, const PerAxis<F::Rank>& input_size, MemoryLimit limit = {});

/// The whole affine map as one matrix, [T b; 0 1]: products of layers are products of these, biases
/// included. A layer without a bias has no entries in b. Cost and errors as for toeplitz().
template <Layer F>
Eigen::SparseMatrix<typename F::Scalar, Eigen::RowMajor> augmented(
    const F& layer, const PerAxis<F::Rank>& input_size, MemoryLimit limit = {});

/// A layer on maps of `input_size` as a fully connected layer on flat maps, bias included, so that
/// it joins sums and products of fully connected ones. Groups stay. The inverse of linear_as_conv
/// for a kernel as large as the map.
/// Ensures  conv_as_linear(F, n)(flat x) == flat F(x), bit for bit where zeros add nothing
/// Cost     out * positions * in / groups * numel(input_size) elements, most of them zero
/// Throws   ShapeError for an input smaller than the kernel, SizeError on overflow
/// Gradient conv_as_linear_gradient
/// Source   Ding et al., RepMLP, CVPR 2022
template <Layer F>
Conv<typename F::Scalar, 0> conv_as_linear(const F& layer, const PerAxis<F::Rank>& input_size);

/// From dL/d(conv_as_linear(F, n)) to dL/dF for a layer of this shape: each tap gets the sum over
/// the positions at which it reads the map.
/// Ensures  <conv_as_linear(F, n), G> == <F, conv_as_linear_gradient(F.shape(), n, G)> for every F
/// Cost     one addition for each entry of the matrix that is not structurally zero
/// Throws   as conv_as_linear(); ShapeError where the gradient is of another shape
template <Layer F, int Rank>
  requires(F::Rank == 0)
Conv<typename F::Scalar, Rank> conv_as_linear_gradient(
    const ConvShape<Rank>& shape, const std::type_identity_t<PerAxis<Rank>>& input_size,
    const F& gradient);

/// The layer of this shape, without a bias, whose matrix on maps of `input_size` this is, compared
/// exactly. The matrix may be sparse or dense, in either order; shape.bias plays no part.
/// Ensures  conv_from_toeplitz(toeplitz(F, n), F.shape(), n) has F's weight
/// Cost     one look at each entry; a copy of the matrix unless it is row-major already
/// Throws   NotToeplitzError naming the first entry, row by row, that differs from the first one of its tap, or that
///          is not zero where the form has a zero; ShapeError where the matrix has another size, or
///          where the map is too small to show every tap, naming it
template <class Matrix, int Rank>
  requires std::derived_from<Matrix, Eigen::MatrixBase<Matrix>> ||
           std::derived_from<Matrix, Eigen::SparseMatrixBase<Matrix>>
Conv<typename Matrix::Scalar, Rank> conv_from_toeplitz(
    const Matrix& matrix, ConvShape<Rank> shape,
    const std::type_identity_t<PerAxis<Rank>>& input_size);

template <class Scalar, int Rank>
class ToeplitzOperator;

}  // namespace concertina

/// Copied, not referred to, in Eigen's expressions, so that `op.adjoint() * x` keeps what it needs.
template <class Scalar_, int Rank>
struct Eigen::internal::traits<concertina::ToeplitzOperator<Scalar_, Rank>>
    : traits<SparseMatrix<Scalar_>> {
  static constexpr int Flags = 0;
};

namespace concertina {

/// The matrix of toeplitz() without its entries, for Eigen's iterative solvers. It keeps a copy of
/// the layer, which its own copies, transposes and adjoints share. It has no diagonal to offer, so
/// name the preconditioner:
///
///     Eigen::LeastSquaresConjugateGradient<ToeplitzOperator<double, 2>,
///     Eigen::IdentityPreconditioner> solver(op);
///
/// For many products with one small layer prefer toeplitz(); what is short here is memory, not
/// time.
template <class Scalar_, int Rank_>
class ToeplitzOperator : public Eigen::EigenBase<ToeplitzOperator<Scalar_, Rank_>> {
 public:
  using Scalar = Scalar_;
  using RealScalar = typename Eigen::NumTraits<Scalar>::Real;
  using StorageIndex = int;
  static constexpr int Rank = Rank_;
  static constexpr int ColsAtCompileTime = Eigen::Dynamic, MaxColsAtCompileTime = Eigen::Dynamic;
  static constexpr bool IsRowMajor = false;

  /// Throws ShapeError for an input smaller than the kernel, SizeError where a map overflows.
  ToeplitzOperator(const ConvView<const Scalar, Rank>& layer, const PerAxis<Rank>& input_size);
  template <Layer F>
    requires std::same_as<typename F::Scalar, Scalar>
  ToeplitzOperator(const F& layer, const PerAxis<Rank>& input_size)
      : ToeplitzOperator(ConvView<const Scalar, Rank>(layer), input_size) {}

  Index rows() const noexcept { return adjoint_ ? size_.columns : size_.rows; }
  Index cols() const noexcept { return adjoint_ ? size_.rows : size_.columns; }

  ToeplitzOperator transpose() const {
    ToeplitzOperator result = *this;
    result.adjoint_ = !adjoint_;
    return result;
  }
  ToeplitzOperator conjugate() const {
    ToeplitzOperator result = *this;
    result.conjugate_ = Eigen::NumTraits<Scalar>::IsComplex && !conjugate_;
    return result;
  }
  /// Transposed and conjugated, as Eigen's adjoint() is.
  ToeplitzOperator adjoint() const { return transpose().conjugate(); }

  /// The product with a dense vector, or with each column of a matrix; evaluated as Eigen's own
  /// are.
  /// Cost    one multiply-add for each entry of the matrix, and a vector for the result
  /// Throws  ShapeError where the lengths differ, and of one that was moved from
  template <class Rhs>
  Eigen::Product<ToeplitzOperator, Rhs> operator*(const Eigen::MatrixBase<Rhs>& x) const;

 private:
  template <class, class, class, class, int>
  friend struct Eigen::internal::generic_product_impl;

  struct Parts {
    Conv<Scalar, Rank> layer;
    PerAxis<Rank> input_size;
    std::vector<detail::TapRun> runs;
  };

  Eigen::VectorX<Scalar> apply(Eigen::VectorX<Scalar> x) const;

  detail::MatrixSize size_;
  std::shared_ptr<const Parts> parts_;
  bool adjoint_ = false, conjugate_ = false;
};

template <Layer F>
ToeplitzOperator(const F&, const PerAxis<F::Rank>&)
    -> ToeplitzOperator<typename F::Scalar, F::Rank>;

}  // namespace concertina

#include <concertina/detail/toeplitz.ipp>
