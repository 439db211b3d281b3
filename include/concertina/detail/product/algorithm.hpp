// A product of two layers without its weights: which algorithm computes it, its dense blocks, the
// taps that meet, and what it costs.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/detail/box.hpp>
#include <concertina/detail/form.hpp>
#include <concertina/detail/tuning.hpp>

#include <algorithm>
#include <cstddef>
#include <span>
#include <utility>
#include <vector>

namespace concertina::detail {

/// Multiply-adds of one product, as it is computed.
inline Index multiply_adds(const AnyShape& outer, const AnyShape& inner) {
  constexpr const char* what = "multiply-adds";
  const Index taps = checked_multiply(numel(outer.kernel_size), numel(inner.kernel_size), what);
  const Index block = checked_multiply(outer.out / outer.groups, inner.in / inner.groups, what);
  return checked_multiply(checked_multiply(taps, block, what), inner.out, what);
}

/// Which one runs depends on shapes only, never on the scalar, so that what is proved over a prime
/// field is what runs on floats.
enum class Algorithm {
  outer_diagonal,   ///< 1x1 depthwise after kxk: the rows scaled
  inner_diagonal,   ///< kxk after 1x1 depthwise: the columns scaled
  direct,           ///< plain loops: depthwise and tiny blocks
  outer_pointwise,  ///< 1x1 after kxk: one matrix product, in place
  inner_pointwise,  ///< kxk after 1x1: matrix products over panels of output channels
  general           ///< kxk after kxk: for each tap of the result one product per row of tap pairs
};

/// One factor for each channel: a batch norm or a scale as a layer.
inline bool is_diagonal(const AnyShape& shape) {
  return numel(shape.kernel_size) == 1 && shape.in == shape.groups && shape.out == shape.groups;
}

inline Algorithm algorithm_for(const AnyShape& outer, const AnyShape& inner) {
  if (is_diagonal(outer)) return Algorithm::outer_diagonal;
  if (is_diagonal(inner)) return Algorithm::inner_diagonal;
  const Index out = outer.out / outer.groups, in = inner.in / inner.groups;
  const Index hidden = std::min(outer.in / outer.groups, inner.out / inner.groups);
  const bool outer_pointwise = numel(outer.kernel_size) == 1,
             inner_pointwise = numel(inner.kernel_size) == 1;
  const Index columns = outer_pointwise ? numel(inner.kernel_size) : 1;
  if (out * hidden * in * columns < tuning::smallest_gemm) return Algorithm::direct;
  if (outer_pointwise) return Algorithm::outer_pointwise;
  return inner_pointwise ? Algorithm::inner_pointwise : Algorithm::general;
}

/// Time of one product on the processor, in units of a multiply-add at full speed.
struct ProcessorCost {
  double operator()(const AnyShape& outer, const AnyShape& inner, const AnyShape& product) const {
    constexpr double slow = tuning::slow;
    const auto elements = [](const AnyShape& shape) {
      return static_cast<double>(weight_numel(shape));
    };
    const auto work = static_cast<double>(multiply_adds(outer, inner));
    const double result = elements(product);
    switch (algorithm_for(outer, inner)) {
      case Algorithm::outer_diagonal:
      case Algorithm::inner_diagonal: return 2 * result;  // streamed, so bound by memory
      case Algorithm::direct: return slow * (work + result);
      case Algorithm::outer_pointwise: return work + slow * result;
      case Algorithm::inner_pointwise: return work + slow * (elements(outer) + 2 * result);
      case Algorithm::general: break;
    }
    return work + slow * (elements(outer) + elements(inner) + 2 * result);
  }
};
inline constexpr ProcessorCost processor_cost{};

/// Row-major index in the product's kernel of each tap of a factor: the taps (b, a) meet at
/// outer[b] + inner[a].
inline std::vector<Index> tap_positions(const AnyShape& factor, const Axes& spacing,
                                        const AnyShape& product) {
  std::vector<Index> positions;
  for_each_position(factor.kernel_size, [&](const Axes& tap) {
    Axes at;
    for (int axis = 0; axis < max_rank; ++axis) {
      at[axis] = tap[axis] * spacing[axis] / product.dilation[axis];
    }
    positions.push_back(flat(at, product.kernel_size));
  });
  return positions;
}

/// The hidden channels between two layers that one group of each shares. There the product of two
/// block-diagonal matrices is dense and fills a block of the result of its own: the offsets of its
/// first elements in the three weights, and their leading dimensions. Weights are
/// [out][hidden][outer taps] and [hidden][in][inner taps], the result [out][in][taps].
struct DenseBlock {
  Index out = 0, hidden = 0, in = 0;
  Index outer = 0, inner = 0, result = 0;
  Index outer_ld = 0, inner_ld = 0, result_ld = 0;
};

/// Neighbouring taps b, b + 1, ... of the outer kernel, which meet a, a - 1, ... of the inner one
/// at the same tap of the result.
struct PairRun {
  Index b, a, length;
};

/// The shape-only plan of a product: algorithm, dense blocks, tap positions. No weights.
struct ProductPlan {
  AnyShape outer, inner, product;
  Algorithm algorithm;
  std::vector<DenseBlock> blocks;             // none where a factor is diagonal
  std::vector<Index> outer_taps, inner_taps;  // their positions in the product's kernel
  Index taps;                                 // of the product
  std::vector<PairRun> runs;                  // general: those of tap t are
  std::vector<std::size_t> first_run;         // first_run[t] .. first_run[t + 1]

  ProductPlan(const AnyShape& outer_shape, const AnyShape& inner_shape)
      : ProductPlan(outer_shape, inner_shape, algorithm_for(outer_shape, inner_shape)) {}

  /// With an algorithm that is chosen elsewhere.
  ProductPlan(const AnyShape& outer_shape, const AnyShape& inner_shape, Algorithm chosen)
      : outer(outer_shape),
        inner(inner_shape),
        product(product_shape(outer, inner)),
        algorithm(chosen),
        taps(numel(product.kernel_size)) {
    if (is_diagonal()) return;
    Axes spacing;
    for (int axis = 0; axis < max_rank; ++axis) {
      spacing[axis] = outer.dilation[axis] * inner.stride[axis];
    }
    outer_taps = tap_positions(outer, spacing, product);
    inner_taps = tap_positions(inner, inner.dilation, product);
    find_blocks();
    if (algorithm == Algorithm::general) find_runs();
  }

  bool is_diagonal() const {
    return algorithm == Algorithm::outer_diagonal || algorithm == Algorithm::inner_diagonal;
  }
  Index outer_count() const { return std::ssize(outer_taps); }
  Index inner_count() const { return std::ssize(inner_taps); }

  /// Whether the algorithm writes every element of the product; others are zeros that stay.
  bool covers_product() const {
    if (is_diagonal()) return true;
    if (algorithm == Algorithm::direct) return false;  // adds
    Index written = 0;
    for (const DenseBlock& block : blocks) written += block.out * block.in * taps;
    return written == weight_numel(product);
  }

  Index multiply_adds_of(const DenseBlock& block) const {
    return block.out * block.hidden * block.in * outer_count() * inner_count();
  }

  /// Output channels of an inner pointwise product that are side by side in one matrix product.
  Index kernels_in_panel(const DenseBlock& block) const {
    return std::clamp<Index>(tuning::panel_columns / outer_count(), 1, block.out);
  }
  Index kernel_panels(const DenseBlock& block) const {
    return (block.out + kernels_in_panel(block) - 1) / kernels_in_panel(block);
  }

  std::span<const PairRun> runs_of(Index tap) const {
    const auto t = static_cast<std::size_t>(tap);
    return std::span(runs).subspan(first_run[t], first_run[t + 1] - first_run[t]);
  }

 private:
  void find_blocks() {
    const Index out = outer.out / outer.groups, inner_out = inner.out / inner.groups;
    const Index outer_in = outer.in / outer.groups, inner_in = inner.in / inner.groups,
                product_in = product.in / product.groups;
    DenseBlock block{.out = out,
                     .in = inner_in,
                     .outer_ld = outer_in * outer_count(),
                     .inner_ld = inner_in * inner_count(),
                     .result_ld = product_in * taps};
    Index outer_end = 0, inner_end = 0;            // of the groups that share the hidden channels
    Index first_out = -out, first_in = -inner_in;  // of those groups' channels
    for (Index begin = 0; begin < inner.out; begin += block.hidden) {
      if (begin == outer_end) outer_end += outer_in, first_out += out;
      if (begin == inner_end) inner_end += inner_out, first_in += inner_in;
      block.hidden = std::min(outer_end, inner_end) - begin;
      block.outer = first_out * block.outer_ld + (begin - (outer_end - outer_in)) * outer_count();
      block.inner = begin * block.inner_ld;
      block.result = first_out * block.result_ld + first_in % product_in * taps;
      blocks.push_back(block);
    }
  }

  void find_runs() {
    std::vector<Index> inner_at(static_cast<std::size_t>(taps), -1);  // the tap there
    for (Index a = 0; a < inner_count(); ++a) {
      inner_at[static_cast<std::size_t>(inner_taps[static_cast<std::size_t>(a)])] = a;
    }
    first_run.push_back(0);
    for (Index t = 0; t < taps; ++t) {
      for (Index b = 0; b < outer_count(); ++b) {
        const Index rest = t - outer_taps[static_cast<std::size_t>(b)];
        const Index a = rest < 0 ? -1 : inner_at[static_cast<std::size_t>(rest)];
        if (a < 0) continue;
        const bool is_first = runs.size() == first_run.back();
        if (!is_first && runs.back().b + runs.back().length == b &&
            runs.back().a - runs.back().length == a) {
          ++runs.back().length;
        } else {
          runs.push_back({b, a, 1});
        }
      }
      first_run.push_back(runs.size());
    }
  }
};

}  // namespace concertina::detail
