// The entries of the matrix that a layer is: counted, written out, applied, and read back.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/detail/row_major.hpp>
#include <concertina/toeplitz.hpp>

#include <algorithm>
#include <limits>
#include <sstream>
#include <string>

namespace concertina {

namespace detail {

/// Throws ShapeError for a layer that was moved from and where the input is smaller than the
/// kernel, SizeError on overflow.
template <int Rank>
MatrixSize toeplitz_size(const ConvShape<Rank>& shape, const PerAxis<Rank>& input_size) {
  validate(shape);
  return {checked_multiply(shape.out, numel(output_size(shape, input_size)), "toeplitz"),
          checked_multiply(shape.in, numel(input_size), "toeplitz")};
}

/// Entries that are not structurally zero: for each pair of connected channels, pairs of a tap and
/// an output that meet on the map, which are independent from axis to axis.
template <int Rank>
Index toeplitz_entries(const ConvShape<Rank>& shape, const PerAxis<Rank>& input_size) {
  Index entries = checked_multiply(shape.out, shape.in / shape.groups, "toeplitz");
  for (int axis = 0; axis < Rank; ++axis) {
    Index meetings = 0;
    for (Index tap = 0; tap < shape.kernel_size[axis]; ++tap) {
      meetings =
          checked_add(meetings, reach(shape, input_size[axis], tap, axis).count(), "toeplitz");
    }
    entries = checked_multiply(entries, meetings, "toeplitz");
  }
  return entries;
}

inline std::string matrix_text(const MatrixSize& size) {
  return "a " + std::to_string(size.rows) + "x" + std::to_string(size.columns) + " matrix";
}

inline void require_memory(const MatrixSize& size, Index bytes, MemoryLimit limit) {
  if (static_cast<std::size_t>(bytes) <= limit.bytes) return;
  throw SizeError("toeplitz: " + matrix_text(size) + " takes " + std::to_string(bytes) +
                  " bytes, more than the limit of " + std::to_string(limit.bytes));
}

/// An entry of one row: its column, and the index of the weight that stands there.
struct Entry {
  Index column, weight;
};

/// Calls visit(row, entries) for each row of the matrix; entries by ascending column, none of rows
/// that `wanted` does not have.
template <int Rank, class Visit>
void for_each_row(const ConvShape<Rank>& shape, const PerAxis<Rank>& input_size, Visit&& visit,
                  const std::vector<bool>* wanted = nullptr) {
  const auto& stride = shape.stride;
  const auto& padding = shape.padding;
  const auto& dilation = shape.dilation;
  const auto& groups = shape.groups;
  const Index in = shape.in / groups, out = shape.out / groups;
  const Index taps = numel(shape.kernel_size), size = numel(input_size);
  std::vector<Entry> reads, entries;
  Index row = 0;
  for (Index o = 0; o < shape.out; ++o) {
    for_each_position(output_size(shape, input_size), [&](const PerAxis<Rank>& j) {
      entries.clear();
      if (wanted && !(*wanted)[static_cast<std::size_t>(row)]) return visit(row++, entries);
      reads.clear();  // of one channel
      for_each_position(shape.kernel_size, [&](const PerAxis<Rank>& a) {
        PerAxis<Rank> i;
        for (int axis = 0; axis < Rank; ++axis) {
          i[axis] = j[axis] * stride[axis] - padding.start[axis] + a[axis] * dilation[axis];
          if (i[axis] < 0 || i[axis] >= input_size[axis]) return;
        }
        reads.push_back({flat(i, input_size), flat(a, shape.kernel_size)});
      });
      for (Index c = 0; c < in; ++c) {
        for (const Entry& read : reads) {
          entries.push_back(
              {(o / out * in + c) * size + read.column, (o * in + c) * taps + read.weight});
        }
      }
      visit(row++, entries);
    });
  }
}

template <class Scalar>
using RowMajorSparse = Eigen::SparseMatrix<Scalar, Eigen::RowMajor>;

/// The matrix T, or [T b; 0 1]; rows that `wanted` does not have are left empty.
template <class Scalar, int Rank>
RowMajorSparse<Scalar> sparse(const ConvView<const Scalar, Rank>& layer,
                              const PerAxis<Rank>& input_size, bool augment, MemoryLimit limit,
                              const std::vector<bool>* wanted = nullptr) {
  using StorageIndex = typename RowMajorSparse<Scalar>::StorageIndex;
  constexpr const char* what = "toeplitz";
  MatrixSize size = toeplitz_size(layer.shape(), input_size);
  const Index last = size.columns;
  Index entries = toeplitz_entries(layer.shape(), input_size);
  if (wanted) {
    const Index in_a_row =
                    layer.shape().in / layer.shape().groups * numel(layer.shape().kernel_size),
                rows = std::ranges::count(*wanted, true);
    entries = std::min(entries, checked_multiply(rows, in_a_row, what));
  }
  if (augment) {
    entries = checked_add(entries, checked_add(layer.shape().bias ? size.rows : 0, 1, what), what);
    size = {checked_add(size.rows, 1, what), checked_add(size.columns, 1, what)};
  }
  constexpr Index index_bytes = sizeof(StorageIndex), entry_bytes = sizeof(Scalar) + index_bytes;
  require_memory(
      size,
      checked_add(checked_multiply(entries, entry_bytes, what),
                  checked_multiply(checked_add(size.rows, 1, what), index_bytes, what), what),
      limit);
  constexpr Index most = std::numeric_limits<StorageIndex>::max();
  if (size.rows >= most || size.columns >= most || entries >= most) {
    throw SizeError("toeplitz: " + matrix_text(size) + " with " + std::to_string(entries) +
                    " entries is too large for Eigen's " + std::to_string(8 * index_bytes) +
                    "-bit indices");
  }

  RowMajorSparse<Scalar> matrix(size.rows, size.columns);
  matrix.reserve(entries);
  const Index positions = numel(output_size(layer.shape(), input_size));
  for_each_row(
      layer.shape(), input_size,
      [&](Index row, const std::vector<Entry>& reads) {
        matrix.startVec(row);
        if (wanted && !(*wanted)[static_cast<std::size_t>(row)]) return;
        for (const Entry& read : reads) {
          matrix.insertBack(row, read.column) =
              layer.weight()[static_cast<std::size_t>(read.weight)];
        }
        if (augment && layer.shape().bias) {
          matrix.insertBack(row, last) = layer.bias()[static_cast<std::size_t>(row / positions)];
        }
      },
      wanted);
  if (augment) {
    matrix.startVec(size.rows - 1);
    matrix.insertBack(size.rows - 1, last) = Scalar(1);
  }
  matrix.finalize();
  return matrix;
}

}  // namespace detail

template <Layer F>
Eigen::SparseMatrix<typename F::Scalar, Eigen::RowMajor> toeplitz(
    const F& layer, const PerAxis<F::Rank>& input_size, MemoryLimit limit) {
  return detail::sparse<typename F::Scalar, F::Rank>(layer, input_size, false, limit);
}

template <Layer F>
Eigen::SparseMatrix<typename F::Scalar, Eigen::RowMajor> augmented(
    const F& layer, const PerAxis<F::Rank>& input_size, MemoryLimit limit) {
  return detail::sparse<typename F::Scalar, F::Rank>(layer, input_size, true, limit);
}

template <Layer F>
Conv<typename F::Scalar, 0> conv_as_linear(const F& layer, const PerAxis<F::Rank>& input_size) {
  using Scalar = typename F::Scalar;
  const ConvShape<F::Rank>& shape = layer.shape();
  const detail::MatrixSize size = detail::toeplitz_size(shape, input_size);
  Conv<Scalar, 0> linear(
      {.out = size.rows, .in = size.columns, .groups = shape.groups, .bias = shape.bias});
  const Index columns = size.columns / shape.groups, rows = size.rows / shape.groups;
  const Index positions = size.rows / shape.out;
  detail::for_each_row(shape, input_size, [&](Index row, const std::vector<detail::Entry>& reads) {
    for (const detail::Entry& read : reads) {
      const Index column = read.column - row / rows * columns;
      linear.weight()[static_cast<std::size_t>(row * columns + column)] =
          layer.weight()[static_cast<std::size_t>(read.weight)];
    }
    if (!shape.bias) return;
    linear.bias()[static_cast<std::size_t>(row)] =
        layer.bias()[static_cast<std::size_t>(row / positions)];
  });
  return linear;
}

template <Layer F, int Rank>
  requires(F::Rank == 0)
Conv<typename F::Scalar, Rank> conv_as_linear_gradient(
    const ConvShape<Rank>& shape, const std::type_identity_t<PerAxis<Rank>>& input_size,
    const F& gradient) {
  using Scalar = typename F::Scalar;
  using Sum = detail::AccumulatorOf<void, Scalar>;
  Conv<Sum, Rank> result(shape);
  const detail::MatrixSize size = detail::toeplitz_size(shape, input_size);
  const ConvShape<0> linear{
      .out = size.rows, .in = size.columns, .groups = shape.groups, .bias = shape.bias};
  if (gradient.shape() != linear) {
    detail::fail<ShapeError>({"conv_as_linear_gradient: ", gradient.shape(), ", where ", shape,
                              " on maps of size ", input_size, " is ", linear});
  }
  const Index columns = size.columns / shape.groups, rows = size.rows / shape.groups;
  const Index positions = size.rows / shape.out;
  const auto add = [](Sum& to, const Scalar& value) { to = to + convert<Sum>(value); };
  detail::for_each_row(shape, input_size, [&](Index row, const std::vector<detail::Entry>& reads) {
    for (const detail::Entry& read : reads) {
      const Index column = read.column - row / rows * columns;
      add(result.weight()[static_cast<std::size_t>(read.weight)],
          gradient.weight()[static_cast<std::size_t>(row * columns + column)]);
    }
    if (!shape.bias) return;
    add(result.bias()[static_cast<std::size_t>(row / positions)],
        gradient.bias()[static_cast<std::size_t>(row)]);
  });
  return result.template cast<Scalar>();
}

template <class Matrix, int Rank>
  requires std::derived_from<Matrix, Eigen::MatrixBase<Matrix>> ||
           std::derived_from<Matrix, Eigen::SparseMatrixBase<Matrix>>
Conv<typename Matrix::Scalar, Rank> conv_from_toeplitz(
    const Matrix& matrix, ConvShape<Rank> shape,
    const std::type_identity_t<PerAxis<Rank>>& input_size) {
  using Scalar = typename Matrix::Scalar;
  using Rows = std::conditional_t<std::is_base_of_v<Eigen::MatrixBase<Matrix>, Matrix>,
                                  detail::RowMajor<Scalar>, detail::RowMajorSparse<Scalar>>;
  shape.bias = false;
  Conv<Scalar, Rank> layer(shape);
  const auto size = detail::toeplitz_size(shape, input_size);
  if (matrix.rows() != size.rows || matrix.cols() != size.columns) {
    throw ShapeError("conv_from_toeplitz: " + detail::matrix_text({matrix.rows(), matrix.cols()}) +
                     ", where " + to_string(shape) + " on maps of size " + to_string(input_size) +
                     " is " + detail::matrix_text(size));
  }
  detail::for_each_position(shape.kernel_size, [&](const PerAxis<Rank>& tap) {
    for (int axis = 0; axis < Rank; ++axis) {
      if (detail::reach(shape, input_size[axis], tap[axis], axis).count() > 0) continue;
      throw ShapeError("conv_from_toeplitz: maps of size " + to_string(input_size) +
                       " are too small to show tap " + to_string(tap) + " of " + to_string(shape));
    }
  });

  const auto refuse = [&](Index row, Index column, const Scalar& found, const Scalar& expected) {
    std::ostringstream message;
    const auto end = [&](const char* what, Index flat, PerAxis<Rank> extent) {
      message << what << flat / numel(extent);
      flat %= numel(extent);
      PerAxis<Rank> position;
      for (int axis = Rank; axis-- > 0; flat /= extent[axis]) position[axis] = flat % extent[axis];
      if (Rank > 0) message << " at position " << to_string(position);
    };
    message << "conv_from_toeplitz: entry (" << row << ", " << column << ")";
    end(", output channel ", row, output_size(shape, input_size));
    end(" and input channel ", column, input_size);
    message << ", is " << found << " instead of " << expected << " (" << to_string(shape) << ")";
    throw NotToeplitzError(message.str());
  };
  const Eigen::Ref<const Rows> rows(matrix);
  std::vector<bool> seen(layer.weight().size());
  detail::for_each_row(shape, input_size,
                       [&](Index row, const std::vector<detail::Entry>& entries) {
                         Eigen::InnerIterator<Eigen::Ref<const Rows>> given(rows, row);
                         const auto zeros_before = [&](Index column) {
                           for (; given && given.index() < column; ++given) {
                             if (!(given.value() == Scalar(0)))
                               refuse(row, given.index(), given.value(), Scalar(0));
                           }
                         };
                         for (const detail::Entry& entry : entries) {
                           zeros_before(entry.column);
                           const bool present = given && given.index() == entry.column;
                           const Scalar found = present ? given.value() : Scalar(0);
                           if (present) ++given;
                           const auto at = static_cast<std::size_t>(entry.weight);
                           Scalar& weight = layer.weight()[at];
                           if (!seen[at]) weight = found;
                           if (!(weight == found)) refuse(row, entry.column, found, weight);
                           seen[at] = true;
                         }
                         zeros_before(size.columns);
                       });
  return layer;
}

template <class Scalar_, int Rank_>
ToeplitzOperator<Scalar_, Rank_>::ToeplitzOperator(const ConvView<const Scalar, Rank>& layer,
                                                   const PerAxis<Rank>& input_size)
    : size_(detail::toeplitz_size(layer.shape(), input_size)),
      parts_(std::make_shared<const Parts>(Parts{detail::linear_part(layer), input_size,
                                                 detail::tap_runs(layer.shape(), input_size)})) {}

template <class Scalar_, int Rank_>
template <class Rhs>
Eigen::Product<ToeplitzOperator<Scalar_, Rank_>, Rhs> ToeplitzOperator<Scalar_, Rank_>::operator*(
    const Eigen::MatrixBase<Rhs>& x) const {
  if (!parts_) throw ShapeError("ToeplitzOperator: one that was moved from");
  if (x.rows() != cols()) {
    throw ShapeError("ToeplitzOperator: " + detail::matrix_text({rows(), cols()}) +
                     " times a vector of length " + std::to_string(x.rows()));
  }
  return {*this, x.derived()};
}

template <class Scalar_, int Rank_>
Eigen::VectorX<Scalar_> ToeplitzOperator<Scalar_, Rank_>::apply(Eigen::VectorX<Scalar> x) const {
  if (conjugate_) x = x.conjugate();
  Eigen::VectorX<Scalar> y = Eigen::VectorX<Scalar>::Constant(rows(), Scalar(0));
  detail::apply_matrix<Scalar, Rank>(
      adjoint_ ? detail::Direction::adjoint : detail::Direction::forward, parts_->layer,
      parts_->input_size, parts_->runs, x.data(), y.data());
  if (conjugate_) y = y.conjugate();
  return y;
}

}  // namespace concertina

/// What evaluates `op * x` in Eigen.
template <class Scalar_, int Rank, class Rhs, int ProductTag>
struct Eigen::internal::generic_product_impl<concertina::ToeplitzOperator<Scalar_, Rank>, Rhs,
                                             Eigen::SparseShape, Eigen::DenseShape, ProductTag>
    : generic_product_impl_base<concertina::ToeplitzOperator<Scalar_, Rank>, Rhs,
                                generic_product_impl<concertina::ToeplitzOperator<Scalar_, Rank>,
                                                     Rhs, SparseShape, DenseShape, ProductTag>> {
  template <class Dest>
  static void scaleAndAddTo(Dest& to, const concertina::ToeplitzOperator<Scalar_, Rank>& op,
                            const Rhs& x, const Scalar_& factor) {
    for (Eigen::Index column = 0; column < x.cols(); ++column) {
      to.col(column) += factor * op.apply(x.col(column));
    }
  }
};
