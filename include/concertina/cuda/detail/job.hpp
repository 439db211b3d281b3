// What a launch of a contraction consists of: jobs, each a strided GEMM or what has to happen
// before or after one, the tiles that they are cut into, and the tables that describe them.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/cuda/block.hpp>
#include <concertina/cuda/detail/tuning.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace concertina::cuda::detail {

using Offset = std::int64_t;
/// Of an element of a tensor, which has less than 2^31.
using ElementIndex = std::uint32_t;

struct Quotient {
  int quotient, remainder;
};

/// Divisors are often 1, or greater than the number.
CONCERTINA_HOST_DEVICE constexpr Quotient divide(ElementIndex number, int divisor) {
  const auto by = static_cast<ElementIndex>(divisor);
  if (by == 1) return {static_cast<int>(number), 0};
  if (number < by) return {0, static_cast<int>(number)};
  return {static_cast<int>(number / by), static_cast<int>(number % by)};
}

/// A size by which indices are divided, again and again, as a product and a shift.
/// Source  Granlund and Montgomery, "Division by invariant integers using multiplication", 1994
class Extent {
 public:
  CONCERTINA_HOST_DEVICE constexpr Extent(int size) : size_(size) {
    while (size > std::int64_t{1} << shift_) ++shift_;
    shift_ += 31;  // so that it is exact for numbers of 31 bits
    factor_ = static_cast<std::uint32_t>(
        (std::uint64_t{1} << shift_) / static_cast<ElementIndex>(size) + 1);
  }

  CONCERTINA_HOST_DEVICE constexpr operator int() const { return size_; }

  /// Requires  number < 2^31
  CONCERTINA_HOST_DEVICE constexpr Quotient divide(ElementIndex number) const {
    const auto quotient = static_cast<int>(std::uint64_t{number} * factor_ >> shift_);
    return {quotient, static_cast<int>(number) - quotient * size_};
  }

 private:
  int size_, shift_ = 0;
  std::uint32_t factor_ = 0;
};

/// The strides of a mode of two: index i stands for (i / extent, i % extent), where `extent` is
/// that of the inner mode, and lies at their inner product with (outer, inner). So channels and
/// taps can be one mode of a GEMM although other channels lie between. With extent 1 it is an
/// ordinary stride. Offsets fit an int: no tensor has 2^31 elements.
struct TwoModeStride {
  int outer = 0, inner = 0;

  CONCERTINA_HOST_DEVICE constexpr int operator()(int i, const Extent& extent) const {
    const auto at = extent.divide(static_cast<ElementIndex>(i));
    return at.quotient * outer + at.remainder * inner;
  }
};

/// A matrix of a tensor: its first element, and the stride between the matrices of a job's groups.
struct TensorRef {
  static constexpr int workspace = -1, none = -2;

  int tensor = none;  ///< index into the table of addresses, or one of the above
  Offset offset = 0, group_stride = 0;

  CONCERTINA_HOST_DEVICE constexpr bool exists() const { return tensor != none; }
  CONCERTINA_HOST_DEVICE constexpr Offset of_group(int group) const {
    return offset + group * group_stride;
  }
};

/// Added to C as it is written: bias(m) + u(m / m_inner_extent) v(n).
struct Epilogue {
  TensorRef bias = {}, u = {}, v = {};
};

/// C(m, n) = sum over a tap's pairs, and over k, of A(m, k) B(k, n), for every group and tap; plus
/// the epilogue.
struct alignas(16) Job {
  enum class Kind {
    multiply,         ///< tiles of 64 x 64
    multiply_small,   ///< tiles of 32 x 32
    multiply_narrow,  ///< tiles of 128 x 8
    reduce,           ///< a dot product for each element of C
    depthwise_chain,  ///< for each element of C a sum of products of three operands, see Inner
    multiply_bf16x6,  ///< tiles of 128 x 128 on tensor cores, in a kernel of their own
    combine,          ///< C = sum of the split-K partial sums of a product, at A
    combine_tiles,    ///< the same of a multiply_bf16x6, whose partial sums lie tile by tile
    fold,             ///< C(m, n, tap) = the sum of A(m, n) at the tap's pairs
    unfold,           ///< C(m, n) at the tap's pairs = A(m, n, tap)
    copy,             ///< n contiguous elements; zeros where there is no A
    add_branches,     ///< C(m, n, tap) = the sum of the branches' elements there
    take_branch       ///< C(m, n, tap) = A's element at the branch's place
  };

  Kind kind = Kind::multiply;
  int first_tile = 0;  ///< in its phase
  int groups = 1;
  Extent taps = 1, m = 1, n = 1;
  int k = 0;
  Extent m_inner_extent = 1, k_inner_extent = 1;
  Extent k_outer_extent = 1;  ///< reduce: k / k_inner_extent
  TensorRef a = {}, b = {}, c = {};
  TwoModeStride a_m = {}, a_k = {}, b_k = {}, c_m = {};
  int b_n = 0, c_n = 0, a_n = 0;  ///< strides along n; a_n: fold, unfold, take_branch
  int first_tap = 0;
  int first_branch = 0;         ///< add_branches: that of pair 0; take_branch
  int splits = 1, split_k = 0;  ///< of split-K: how many, and the k of one; all of k where a tap's
                                ///< pairs are shared out instead
  int threads_per_element = 1;  ///< reduce and combine; a power of two
  bool has_several = false;     ///< reduce and depthwise_chain: elements of a thread, side by side
  /// multiply_bf16x6, combine_tiles: which of C's tiles, counted along m, then n, taps and groups.
  int first_c_tile = 0, c_tiles = 0;
  bool a_is_k_major = true;  ///< neighbours along k lie nearer than along m
  bool b_is_n_major = true;  ///< neighbours along n lie nearer than along k
  Epilogue epilogue = {};
  /// Of a depthwise_chain, C(m, n) = sum over k_outer of A(m, k_outer) times the sum over k_inner
  /// of B(n_outer, k_inner) D(m, n, k).
  struct Inner {
    TensorRef d = {};
    int d_m = 0;
    Extent n_inner_extent = 1;
    TwoModeStride d_n = {}, d_k = {};
  };
  Inner inner = {};
  int form = 0;  ///< for messages

  /// The first of the table's, for a job of one tap: at offset 0, and so is its one pair, the first
  /// of that table's. Neither is loaded.
  static constexpr int identity_tap = 0;

  CONCERTINA_HOST_DEVICE constexpr bool shares_pairs() const { return splits > 1 && split_k >= k; }

  /// Elements of C.
  CONCERTINA_HOST_DEVICE constexpr Offset size() const {
    return static_cast<Offset>(groups) * taps * m * n;
  }
};

/// A tap of C, at offset c, and the pairs of operands' taps that contribute to it.
struct Tap {
  int c = 0, first_pair = 0, last_pair = 0;
};
/// Offsets of two taps, read at once; of add_branches the branch, counted from the job's first, and
/// its tap; of fold and unfold one offset, `a`.
struct alignas(8) TapPair {
  int a = 0, b = 0;
};

/// Where a branch lies in a sum or concatenation: its output channels in rows first_m .. first_m +
/// m - 1, and the input channels of each of its groups, in order, from first_n on, counted within
/// a group of the whole, which has whole_n. Weights of both are [m][n][tap].
struct Branch {
  TensorRef tensor;
  int first_m = 0, m = 0, group_m = 0;
  int first_n = 0, n = 0, whole_n = 0;
  int taps = 1;

  /// The whole's input channel that is the first of the branch's row m.
  CONCERTINA_HOST_DEVICE constexpr int n_of(int row) const {
    return (first_n + row / group_m * n) % whole_n;
  }
};

/// A launch: jobs that do not depend on each other, and the tiles that they have together.
struct Phase {
  int first_job = 0, last_job = 0, tiles = 0;
};

CONCERTINA_HOST_DEVICE constexpr int tiles_along(Offset count, int side) {
  return static_cast<int>((count + side - 1) / side);
}

/// Where a tile of C starts.
struct TilePlace {
  int group, tap, row, column;
};

/// Of a multiply_bf16x6 or its combine_tiles.
CONCERTINA_HOST_DEVICE constexpr TilePlace tile_place(const Job& job, int c_tile) {
  constexpr int side = tuning::tensor_core_side;
  const int rows = tiles_along(job.m, side), columns = tiles_along(job.n, side),
            matrix = c_tile / rows / columns;
  return {matrix / job.taps, matrix % job.taps, c_tile % rows * side,
          c_tile / rows % columns * side};
}

/// Of a kind of product.
constexpr TileShape tile_shape(Job::Kind kind) {
  return kind == Job::Kind::multiply         ? tuning::large_tile
         : kind == Job::Kind::multiply_small ? tuning::small_tile
                                             : tuning::narrow_tile;
}

constexpr bool is_product(Job::Kind kind) {
  return kind == Job::Kind::multiply || kind == Job::Kind::multiply_small ||
         kind == Job::Kind::multiply_narrow;
}

/// What a block folds at a time: some columns of a row, and some of their taps.
struct FoldTile {
  int columns, taps;

  /// Odd, so that neither neighbouring columns nor neighbouring taps share a bank.
  CONCERTINA_HOST_DEVICE constexpr int ld() const { return taps | 1; }
};
CONCERTINA_HOST_DEVICE constexpr FoldTile fold_tile(int taps) {
  FoldTile tile{0, taps < tuning::most_fold_taps ? taps : tuning::most_fold_taps};
  tile.columns = tuning::fold_elements / tile.ld() / warp_size * warp_size;
  return tile;
}

/// Tiles that a job has.
constexpr int tiles_of(const Job& job) {
  switch (job.kind) {
    case Job::Kind::multiply:
    case Job::Kind::multiply_small:
    case Job::Kind::multiply_narrow: {
      const TileShape tile = tile_shape(job.kind);
      return job.groups * job.taps * job.splits * tiles_along(job.m, tile.m) *
             tiles_along(job.n, tile.n);
    }
    case Job::Kind::reduce:
    case Job::Kind::depthwise_chain:
    case Job::Kind::combine:
      return tiles_along(job.size(), job.has_several
                                         ? contraction_threads * tuning::loads_in_flight
                                         : contraction_threads / job.threads_per_element);
    case Job::Kind::fold:
    case Job::Kind::unfold: {
      const FoldTile tile = fold_tile(job.taps);
      return job.m * tiles_along(job.n, tile.columns) * tiles_along(job.taps, tile.taps);
    }
    case Job::Kind::copy: return tiles_along(job.n, tuning::elementwise_tile);
    case Job::Kind::multiply_bf16x6: return job.c_tiles * job.splits;
    case Job::Kind::combine_tiles:
      return tiles_along(Offset{job.c_tiles} * tuning::tensor_core_tile_size,
                         tuning::elementwise_tile);
    case Job::Kind::add_branches:
    case Job::Kind::take_branch: break;
  }
  return tiles_along(job.size(), tuning::elementwise_tile);
}

/// Of a tile's operands, and later its slices' sums.
CONCERTINA_HOST_DEVICE constexpr int shared_elements(TileShape tile) {
  const int operands = (tile.m + tile.n + 2 * tuning::bank_padding) * tile.k,
            sums = tile.slices() > 1 ? tile.slices() * tile.m * tile.n : 0;
  return operands > sums ? operands : sums;
}

template <class Sum>
constexpr std::size_t contraction_shared_bytes() {
  int most = tuning::fold_elements;
  for (const TileShape tile : {tuning::large_tile, tuning::small_tile, tuning::narrow_tile}) {
    most = shared_elements(tile) > most ? shared_elements(tile) : most;
  }
  return shared_size<Sum>(static_cast<std::size_t>(most)) + shared_size<Job>(1);
}

/// The tables of a sequence of phases, in the device's memory.
struct ContractionTables {
  const Job* jobs;
  const Tap* taps;
  const TapPair* pairs;
  const Branch* branches;
  const Phase* phases;
};

/// First tiles of a phase's jobs, as far as they have room among the kernel's parameters: loads of
/// the table, each of which depends on the one before, take longer than a small job.
struct FirstTiles {
  static constexpr int most = 256;
  int of[most];
};

/// Addresses of tensors by their index in the plan, passed as a kernel parameter.
template <int Capacity>
struct Addresses {
  void* at[Capacity];
};

/// A GEMM for cuBLAS, row-major: C = op(A) op(B), C m x n, either operand transposed or not.
struct Gemm {
  TensorRef a, b, c;
  int m, n, k;
  Offset lda, ldb, ldc;
  bool transpose_a, transpose_b;
  int form = 0;  ///< for messages
};

/// What run() issues one after another.
struct Launch {
  enum class Kind {
    phase,         ///< in a launch
    tensor_cores,  ///< a phase of multiply_bf16x6 only, in a launch
    gemm
  };
  Kind kind;
  int index;  ///< of the phase or GEMM
};

/// What one pass runs.
struct Sequence {
  std::vector<Job> jobs;
  std::vector<Tap> taps;
  std::vector<TapPair> pairs;
  std::vector<Branch> branches;
  std::vector<Phase> phases;
  std::vector<Gemm> gemms;
  std::vector<Launch> launches;
  Index multiply_adds = 0;  ///< of products; additions of branches not counted

  /// Whether any of a phase's jobs is a tiled product.
  bool has_products(const Phase& phase) const {
    return std::any_of(jobs.begin() + phase.first_job, jobs.begin() + phase.last_job,
                       [](const Job& job) { return is_product(job.kind); });
  }
  FirstTiles first_tiles(const Phase& phase) const {
    FirstTiles tiles{};
    for (int j = 0; j < std::min(phase.last_job - phase.first_job, FirstTiles::most); ++j) {
      tiles.of[j] = jobs.begin()[phase.first_job + j].first_tile;
    }
    return tiles;
  }
};

}  // namespace concertina::cuda::detail
