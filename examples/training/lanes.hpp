// Sixteen images side by side: the unit in which a batch is computed, stored and divided among
// threads.
//
// A number of a feature map is kept for sixteen images at once, [channel][y][x][lane]. Every
// operation thus works on whole vectors whatever the size of the map, without a remainder; and
// sums over the batch are sums of chunks in a fixed order, whatever thread computed them.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/shape.hpp>

#include <array>
#include <cstddef>
#include <utility>

namespace training {

using concertina::Index;

inline constexpr int lanes = 16;

/// Memory of one number for each lane, aligned such that no vector straddles cache lines.
template <class Scalar>
struct alignas(64) Row {
  std::array<Scalar, lanes> image;
};

/// A row as the compiler's vector type, which it keeps in registers. Wider than the machine's
/// vectors it is computed in parts.
template <class Scalar>
struct VectorType {
  typedef Scalar type  // an attribute of an alias template is lost
      __attribute__((vector_size(lanes * sizeof(Scalar)), aligned(alignof(Scalar)), may_alias));
};
template <class Scalar>
using Vector = typename VectorType<Scalar>::type;

template <class Scalar>
Vector<Scalar>& vector_at(Scalar* row) {
  return *reinterpret_cast<Vector<Scalar>*>(row);
}
template <class Scalar>
const Vector<Scalar>& vector_at(const Scalar* row) {
  return *reinterpret_cast<const Vector<Scalar>*>(row);
}

namespace detail {

/// From a and b, each of blocks of 2n lanes, the vector of blocks of n lanes in which the two
/// halves of each block are added; a's blocks first.
template <int n, class Scalar, int... Lane>
void add_halves(const Vector<Scalar>& a, const Vector<Scalar>& b, Vector<Scalar>& sum,
                std::integer_sequence<int, Lane...>) {
  constexpr int blocks = lanes / (2 * n);
  constexpr auto source = [](int lane, int half) {
    const int block = lane / n;
    const int first = block < blocks ? block * 2 * n : lanes + (block - blocks) * 2 * n;
    return first + half * n + lane % n;
  };
  sum = __builtin_shufflevector(a, b, source(Lane, 0)...) +
        __builtin_shufflevector(a, b, source(Lane, 1)...);
}

template <int n, class Scalar>
void add_pairs(Vector<Scalar>* rows) {
  for (int pair = 0; pair < n; ++pair) {
    add_halves<n, Scalar>(rows[2 * pair], rows[2 * pair + 1], rows[pair],
                          std::make_integer_sequence<int, lanes>());
  }
  if constexpr (n > 1) add_pairs<n / 2, Scalar>(rows);
}

}  // namespace detail

/// sums[i] = the sum over the lanes of rows[i], for 16 * blocks rows. Four steps of shuffles for
/// sixteen sums at a time: one by one they cost a fifth of a weight gradient.
template <class Scalar>
void sum_lanes(const Scalar* rows, Index blocks, Scalar* sums) {
  for (Index block = 0; block < blocks; ++block) {
    Vector<Scalar> part[lanes];
    for (int row = 0; row < lanes; ++row)
      part[row] = vector_at(rows + (block * lanes + row) * lanes);
    detail::add_pairs<lanes / 2, Scalar>(part);
    vector_at(sums + block * lanes) = part[0];
  }
}

/// The sum over the lanes of one row, in double.
template <class Scalar>
double sum_lanes(const Vector<Scalar>& row) {
  double sum = 0;
  for (int lane = 0; lane < lanes; ++lane) sum += static_cast<double>(row[lane]);
  return sum;
}

}  // namespace training
