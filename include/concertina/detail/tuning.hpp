// Constants that a machine decides, each with its measurement; none changes a result by more than
// rounding.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/shape.hpp>

namespace concertina::detail::tuning {

/// Multiply-adds of a dense block below which plain loops are as fast as a matrix product, whose
/// packing and call cost about what they do.
inline constexpr Index smallest_gemm = 256;

/// Multiply-adds that an element moved costs, and a multiply-add outside a matrix product (AVX-512,
/// both from cache).
inline constexpr double slow = 16;

/// Output channels side by side in one matrix product of kxk after 1x1 make so many columns.
inline constexpr Index panel_columns = 512;

/// Products of fewer multiply-adds are not shared out: threads take some 10 us to start, one takes
/// 100 for these.
inline constexpr Index least_shared = Index{1} << 22;

/// Eigen sizes its blocks by the last-level cache, which for a very wide product spills the second:
/// 512 x 2048 x 18432 in float took 41 G multiply-adds/s at once and 51 in panels of 1024 columns
/// (Xeon, AVX-512).
inline constexpr Index widest_panel = 1024;

/// Eight threads have two panels each where a panel keeps enough multiply-adds and is not so narrow
/// that packing its operands costs more than threads gain.
inline constexpr Index enough_panels = 16, least_panel = Index{1} << 21, least_panel_side = 64;

/// Rows transposed together, so that what is written with a stride is written so many elements at a
/// time: an element at a time took twice as long.
inline constexpr Index transposed_rows = 8;

/// Columns transposed together stay in the first-level cache.
inline constexpr Index transposed_columns = 256;

/// Partial sums of a dot product, which vectorise and do not wait for each other.
inline constexpr Index dot_lanes = 16;

/// Elements of the maps of which moments are summed together: what a second-level cache holds.
inline constexpr Index moment_elements = Index{1} << 17;

/// Pixels, or patches, whose products are summed by one matrix product, so that its operands stay
/// in the second-level cache; and rows of the symmetric sum that are taken together, from the
/// diagonal on.
inline constexpr Index moment_rows = 256, moment_side = 64;

/// Parts of a batch whose moments, and gradients, are found side by side: enough for threads; of so
/// many doubles together.
inline constexpr Index moment_shares = 8, moment_share_elements = Index{1} << 25;

/// Pixels, or patches, whose gradients are found by one matrix product.
inline constexpr Index gradient_rows = 128;

/// Products of pixels that are summed in registers: others' channels times lanes of pixels.
inline constexpr Index product_channels = 4, product_lanes = 64;

/// Of so few channels products at a lag are summed pixel by pixel: as small matrix products, 3
/// channels of 32x32 took 4.2 times as long for a 3x3, 2.1 times for a 7x7; but 8 channels of 15x15
/// three quarters of it.
inline constexpr Index few_channels = 4;

/// A multiply-add by lags, in many small matrix products, beside one by patches, in few large ones:
/// 16 channels of 6x6 took 5.9 times as long by lags, 32 of 16x16 half as long.
inline constexpr Index lag_price = 2;

}  // namespace concertina::detail::tuning
