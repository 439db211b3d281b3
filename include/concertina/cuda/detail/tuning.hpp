// Constants of the device planner and its kernels that a machine decides. None changes a result by
// more than rounding. "Estimated" ones follow from an H100's data sheet (132 multiprocessors, 67
// Tflop/s of float, 3.35 TB/s), not from a measurement.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/cuda/block.hpp>

namespace concertina::cuda::detail {

/// Of every thread block. Estimated: two blocks of 64x64 tiles fit a multiprocessor's registers.
inline constexpr int contraction_threads = 256;

inline constexpr int warp_size = 32;

/// A thread block's tile of C, m x n, staged through shared memory k deep, and the part of it that
/// one thread keeps in registers. Where the tile takes fewer threads than a block has, slices of
/// them share k out.
struct TileShape {
  int m, n, k, thread_m, thread_n;

  /// Threads along a row, and of a slice.
  CONCERTINA_HOST_DEVICE constexpr int threads_n() const { return n / thread_n; }
  CONCERTINA_HOST_DEVICE constexpr int threads() const { return m / thread_m * threads_n(); }
  CONCERTINA_HOST_DEVICE constexpr int slices() const { return contraction_threads / threads(); }
};

namespace tuning {

/// Estimated: 4x4 for each thread reads shared memory twice, 16 bytes each, for 16 multiply-adds;
/// with 2x2 or 4x1 instead of slices of k, the smaller tiles waited for shared memory.
inline constexpr TileShape large_tile{64, 64, 16, 4, 4};
/// Estimated: four times as many tiles of products that do not fill the device.
inline constexpr TileShape small_tile{32, 32, 32, 4, 4};
/// Estimated: for depth-wise expansions and biases, of a few columns.
inline constexpr TileShape narrow_tile{128, 8, 16, 4, 4};

/// Side of the tiles of products on tensor cores, how deep they are staged, and the elements of
/// one.
inline constexpr int tensor_core_side = 128, tensor_core_depth = 32,
                     tensor_core_tile_size = tensor_core_side * tensor_core_side;

/// Elements of shared memory between columns of a tile beyond its height, so that a warp's accesses
/// fall on different banks, and are still aligned to 16 bytes.
inline constexpr int bank_padding = 4;

/// Elements for each block of an elementwise job. Estimated.
inline constexpr int elementwise_tile = 4 * contraction_threads;

/// Elements of shared memory in which a block folds or unfolds: what the tiles above take; and the
/// most taps of one column there, so that they have at least a warp of columns. Estimated.
inline constexpr int fold_elements = 9 * contraction_threads, most_fold_taps = 64;

/// Default of PlanOptions::least_gemm. Estimated: some 10 us on an H100, about what a launch and
/// the copies for cuBLAS cost.
inline constexpr Index least_gemm = Index{1} << 27;

/// Elements of the unfolded product of two kernels larger than 1x1, at most: 1 GiB of float.
inline constexpr Index most_unfolded = Index{1} << 28;

/// Default of PlanOptions::least_unfolded. On an H100 SmallNet CK with its gradient takes 98 us for
/// 112 with four times as many, and 138 where nothing is unfolded.
inline constexpr Index least_unfolded = Index{1} << 18;

/// Defaults of PlanOptions. On an H100 products of 1.4 G multiply-adds are faster on cuBLAS, those
/// of 4 G here. Terms: the bound is derived in docs/cuda.md, for 80.
inline constexpr Index least_bf16x6 = Index{1} << 31;
inline constexpr int least_bf16x6_terms = 128;
/// Products of fewer rows or columns leave most of a tile empty.
inline constexpr int least_bf16x6_side = 32;
/// In steps of a tile on tensor cores: what a tile takes besides its own, and adding partial sums.
/// Estimated.
inline constexpr int tensor_core_tile_overhead = 2, combine_tiles_overhead = 3;

/// Default of PlanOptions::wanted_tiles: two for each of an H100's 132 multiprocessors, which is
/// how many blocks are resident.
inline constexpr int wanted_tiles = 264;

/// Default of PlanOptions::least_split. Estimated.
inline constexpr int least_split = 128;
/// Microseconds that a block keeps its place on a device full of others: of a tile, besides its
/// steps, and of a step of each shape; of dot products, besides their rounds of loads, of a round,
/// and of each exchange between the threads of an element; of an elementwise job. Fitted to the
/// phases of SmallNet and MobileNet on an H200.
inline constexpr double tile_time = 3.7, large_step_time = 0.8, small_step_time = 0.45,
                        narrow_step_time = 0.35, reduce_time = 1.6, round_time = 0.5,
                        several_round_time = 0.7, exchange_time = 0.2, elementwise_time = 2;
/// Of adding up partial sums, which is a launch more.
inline constexpr double combine_time = 4;
/// Sums of more terms are not computed several for each thread.
inline constexpr Index most_terms_of_several = 8;
/// A depthwise chain with more elements in the middle layer's group is two products.
inline constexpr Index most_depthwise_chain_elements = 1024;

/// Products of at most so many columns, at least so many rows and terms, have narrow tiles.
/// Estimated.
inline constexpr int narrow_n = 16, narrow_least_m = 32, narrow_least_k = 8;

/// A product of fewer rows or columns fills tiles less than halfway, and is computed as one dot
/// product for each element. Estimated.
inline constexpr int least_tiled_side = 8;
/// Terms whose loads are in flight together there. Estimated.
inline constexpr int loads_in_flight = 4;
/// With more threads for each element, a sum of partial sums would read less than 32 neighbours,
/// a cache line. Estimated.
inline constexpr int most_combining_threads = contraction_threads / 32;

/// Multiply-adds in the time of moving an element to or from memory: 33.5 T/s of the ones, 0.84 T/s
/// of the others is 40; about half of the elements are found in the second-level cache. Estimated.
inline constexpr double multiply_adds_per_element = 16;

/// Elements to whose multiples tensors in the workspace are aligned: 256 bytes of float, as
/// cudaMalloc aligns, so that cuBLAS chooses its vectorised kernels.
inline constexpr Index workspace_alignment = 64;

}  // namespace tuning
}  // namespace concertina::cuda::detail
