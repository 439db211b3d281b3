// Sixteen images side by side: the unit in which a batch is computed, stored and divided among
// threads.
//
// A number of a feature map is kept for sixteen images at once, [channel][y][x][lane]. Every
// operation thus works on whole vectors whatever the size of the map, without a remainder; and
// sums over the batch are sums of chunks in a fixed order, whatever thread computed them and
// however wide the machine's vectors are.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/shape.hpp>

#include <algorithm>
#include <array>
#include <cstddef>
#include <numeric>
#include <utility>

namespace training {

using concertina::Index;

inline constexpr int lanes = 16;

// The machine's vector registers.
#if defined(__AVX512F__)
inline constexpr int vector_bytes = 64, vector_registers = 32;
#elif defined(__AVX__)
inline constexpr int vector_bytes = 32, vector_registers = 16;
#elif defined(__x86_64__)
inline constexpr int vector_bytes = 16, vector_registers = 16;
#else
inline constexpr int vector_bytes = 16, vector_registers = 32;
#endif

/// Memory of one number for each lane, aligned such that no vector straddles cache lines.
template <class Scalar>
struct alignas(64) Row {
  std::array<Scalar, lanes> image;
};

/// Lanes that one register holds: a row is one vector or several. The compiler keeps wider ones in
/// memory.
template <class Scalar>
inline constexpr int vector_lanes = std::min<int>(lanes, vector_bytes / sizeof(Scalar));
template <class Scalar>
inline constexpr int row_vectors = lanes / vector_lanes<Scalar>;

template <class Scalar>
struct VectorType {
  typedef Scalar type  // an attribute of an alias template is lost
      __attribute__((vector_size(vector_lanes<Scalar> * sizeof(Scalar)), aligned(alignof(Scalar)),
                     may_alias));
};
/// A row, or a part of it, as the compiler's vector type.
template <class Scalar>
using Vector = typename VectorType<Scalar>::type;

template <class Scalar>
Vector<Scalar>& vector_at(Scalar* numbers) {
  return *reinterpret_cast<Vector<Scalar>*>(numbers);
}
template <class Scalar>
const Vector<Scalar>& vector_at(const Scalar* numbers) {
  return *reinterpret_cast<const Vector<Scalar>*>(numbers);
}

/// sum += term(at, lane) over the vectors of rows `begin` to `end`, of each its first number's
/// place and lane.
template <class Scalar, class Term>
void add_rows(Index begin, Index end, Row<Scalar>& sum, const Term& term) {
  constexpr int width = vector_lanes<Scalar>;
  Vector<Scalar> part[row_vectors<Scalar>];
  for (int v = 0; v < row_vectors<Scalar>; ++v) part[v] = vector_at(sum.image.data() + v * width);
  for (Index i = begin * lanes; i < end * lanes; i += lanes) {
#pragma GCC unroll 8
    for (int v = 0; v < row_vectors<Scalar>; ++v) part[v] += term(i + v * width, v * width);
  }
  for (int v = 0; v < row_vectors<Scalar>; ++v) vector_at(sum.image.data() + v * width) = part[v];
}

namespace detail {

/// From a and b, each of blocks of 2n lanes, the vector of blocks of n lanes in which the two
/// halves of each block are added; a's blocks first.
template <int n, class Scalar, int... Lane>
void add_halves(const Vector<Scalar>& a, const Vector<Scalar>& b, Vector<Scalar>& sum,
                std::integer_sequence<int, Lane...>) {
  constexpr int width = sizeof...(Lane), blocks = width / (2 * n);
  constexpr auto source = [](int lane, int half) {
    const int block = lane / n;
    const int first = block < blocks ? block * 2 * n : width + (block - blocks) * 2 * n;
    return first + half * n + lane % n;
  };
  sum = __builtin_shufflevector(a, b, source(Lane, 0)...) +
        __builtin_shufflevector(a, b, source(Lane, 1)...);
}

template <int n, class Scalar>
void add_pairs(Vector<Scalar>* rows) {
  for (int pair = 0; pair < n; ++pair) {
    add_halves<n, Scalar>(rows[2 * pair], rows[2 * pair + 1], rows[pair],
                          std::make_integer_sequence<int, vector_lanes<Scalar>>());
  }
  if constexpr (n > 1) add_pairs<n / 2, Scalar>(rows);
}

}  // namespace detail

/// sums[i] = the sum over the lanes of rows[i], for 16 * blocks rows, by halves: of a row's
/// vectors, then of their lanes. Steps of shuffles for as many sums at a time as a vector has
/// lanes: one by one they cost a fifth of a weight gradient.
template <class Scalar>
void sum_lanes(const Scalar* rows, Index blocks, Scalar* sums) {
  constexpr int width = vector_lanes<Scalar>;
  for (Index first = 0; first < blocks * lanes; first += width) {
    Vector<Scalar> part[width];
    for (int row = 0; row < width; ++row, rows += lanes) {
      Vector<Scalar> vectors[row_vectors<Scalar>];
      for (int v = 0; v < row_vectors<Scalar>; ++v) vectors[v] = vector_at(rows + v * width);
      for (int half = row_vectors<Scalar> / 2; half > 0; half /= 2) {
        for (int v = 0; v < half; ++v) vectors[v] += vectors[half + v];
      }
      part[row] = vectors[0];
    }
    detail::add_pairs<width / 2, Scalar>(part);
    vector_at(sums + first) = part[0];
  }
}

/// The sum over the lanes of one row, in double.
template <class Scalar>
double sum_lanes(const Row<Scalar>& row) {
  return std::accumulate(row.image.begin(), row.image.end(), 0.0);
}

}  // namespace training
