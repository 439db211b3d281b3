// A product but for its numbers: multiply-adds, the blocks that matrix products fill, the taps that
// meet, and the cheapest order of a chain.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/conv.hpp>
#include <concertina/form.hpp>

#include <algorithm>
#include <cstddef>
#include <limits>
#include <numeric>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace concertina {

template <int Rank>
Index multiply_adds(const ConvShape<Rank>& outer, const ConvShape<Rank>& inner) {
  constexpr const char* what = "multiply-adds";
  const Index taps =
      detail::checked_multiply(numel(outer.kernel_size), numel(inner.kernel_size), what);
  const Index block =
      detail::checked_multiply(outer.out / outer.groups, inner.in / inner.groups, what);
  return detail::checked_multiply(detail::checked_multiply(taps, block, what), inner.out, what);
}

namespace detail {

/// The algorithms of a dense block. Which one runs depends on shapes only, never on the scalar, so
/// that what is proved over a prime field is what runs on floats.
enum class PairPath {
  outer_diagonal,  ///< 1x1 depthwise after kxk: the rows scaled
  inner_diagonal,  ///< kxk after 1x1 depthwise: the columns scaled
  direct,  ///< plain loops: depthwise and tiny blocks, where a matrix product costs more than it
           ///< saves
  outer_pointwise,  ///< 1x1 after kxk: one matrix product, in place
  inner_pointwise,  ///< kxk after 1x1: matrix products over panels of output channels
  general           ///< kxk after kxk: for each tap of the result one product per row of tap pairs
};

/// One factor for each channel: a batch norm or a scale as a layer.
template <int Rank>
bool is_diagonal(const ConvShape<Rank>& shape) {
  return numel(shape.kernel_size) == 1 && shape.in == shape.groups && shape.out == shape.groups;
}

template <int Rank>
PairPath pair_path(const ConvShape<Rank>& outer, const ConvShape<Rank>& inner) {
  if (is_diagonal(outer)) return PairPath::outer_diagonal;
  if (is_diagonal(inner)) return PairPath::inner_diagonal;
  const Index out = outer.out / outer.groups, in = inner.in / inner.groups;
  const Index between = std::min(outer.in / outer.groups, inner.out / inner.groups);
  // Below this, Eigen's packing and call cost about what the loops do.
  constexpr Index smallest_block = 256;
  const bool outer_pointwise = numel(outer.kernel_size) == 1,
             inner_pointwise = numel(inner.kernel_size) == 1;
  const Index columns = outer_pointwise ? numel(inner.kernel_size) : 1;
  if (out * between * in * columns < smallest_block) return PairPath::direct;
  if (outer_pointwise) return PairPath::outer_pointwise;
  return inner_pointwise ? PairPath::inner_pointwise : PairPath::general;
}

/// Time of one product in units of a multiply-add at full speed. Moving a number costs about what
/// 16 of them do, and so does a multiply-add outside a matrix product (AVX-512, both from cache).
template <int Rank>
double pair_cost(const ConvShape<Rank>& outer, const ConvShape<Rank>& inner) {
  constexpr double slow = 16;
  const auto flops = static_cast<double>(multiply_adds(outer, inner));
  const auto numbers = [](const ConvShape<Rank>& shape) {
    return static_cast<double>(weight_numel(shape));
  };
  const double result = numbers(product_shape(outer, inner));
  switch (pair_path(outer, inner)) {
    case PairPath::outer_diagonal:
    case PairPath::inner_diagonal: return 2 * result;  // streamed, so bound by memory
    case PairPath::direct: return slow * (flops + result);
    case PairPath::outer_pointwise: return flops + slow * result;
    case PairPath::inner_pointwise: return flops + slow * (numbers(outer) + 2 * result);
    case PairPath::general: break;
  }
  return flops + slow * (numbers(outer) + numbers(inner) + 2 * result);
}

/// Row-major index in the result's kernel of each tap of a factor: the taps (b, a) meet at outer[b]
/// + inner[a].
template <int Rank>
std::vector<Index> tap_positions(const ConvShape<Rank>& factor, const PerAxis<Rank>& spacing,
                                 const ConvShape<Rank>& product) {
  std::vector<Index> positions;
  for_each_position(factor.kernel_size, [&](const PerAxis<Rank>& tap) {
    PerAxis<Rank> at;
    for (int axis = 0; axis < Rank; ++axis) {
      at[axis] = tap[axis] * spacing[axis] / product.dilation[axis];
    }
    positions.push_back(flat(at, product.kernel_size));
  });
  return positions;
}

/// The channels between two layers that one group of each shares form a segment. There the product
/// of two block-diagonal matrices is dense, and each segment fills a block of the result of its
/// own: where its first numbers are in the three weights, and how far apart its rows. Weights are
/// [out][between][outer taps] and [between][in][inner taps], the result [out][in][taps].
struct Block {
  Index out = 0, between = 0, in = 0;
  Index outer = 0, inner = 0, result = 0;
  Index outer_step = 0, inner_step = 0, result_step = 0;
};

/// Neighbouring taps b, b + 1, ... of the outer kernel, which meet a, a - 1, ... of the inner one
/// at the same tap of the result.
struct PairRun {
  Index b, a, length;
};

/// A product but for its numbers: all that follows from its factors' shapes.
template <int Rank>
struct PairPlan {
  ConvShape<Rank> outer, inner, product;
  PairPath path;
  std::vector<Index> outer_taps, inner_taps;  // their positions in the product's kernel
  Index taps;                                 // of the product
  std::vector<PairRun> runs;                  // general: those of tap t are
  std::vector<std::size_t> first_run;         // first_run[t] .. first_run[t + 1]

  /// Throws SizeError where the product would be almost only zeros.
  PairPlan(const ConvShape<Rank>& outer_shape, const ConvShape<Rank>& inner_shape)
      : PairPlan(outer_shape, inner_shape, pair_path(outer_shape, inner_shape)) {}

  /// With an algorithm that is chosen elsewhere.
  PairPlan(const ConvShape<Rank>& outer_shape, const ConvShape<Rank>& inner_shape,
           PairPath chosen_path)
      : outer(outer_shape),
        inner(inner_shape),
        product(product_shape(outer, inner)),
        path(chosen_path),
        taps(numel(product.kernel_size)) {
    require_few_zeros(product, multiply_adds(outer, inner),
                      [&] { return to_string(outer) + " after " + to_string(inner); });
    if (is_diagonal()) return;
    PerAxis<Rank> spacing;
    for (int axis = 0; axis < Rank; ++axis) {
      spacing[axis] = outer.dilation[axis] * inner.stride[axis];
    }
    outer_taps = tap_positions(outer, spacing, product);
    inner_taps = tap_positions(inner, inner.dilation, product);
    if (path == PairPath::general) find_runs();
  }

  bool is_diagonal() const {
    return path == PairPath::outer_diagonal || path == PairPath::inner_diagonal;
  }
  Index outer_count() const { return std::ssize(outer_taps); }
  Index inner_count() const { return std::ssize(inner_taps); }

  /// Calls visit(block) for every block of a product neither of whose factors is diagonal.
  template <class Visit>
  void for_each_block(Visit&& visit) const {
    if (is_diagonal()) return;
    const Index out = outer.out / outer.groups, inner_out = inner.out / inner.groups;
    const Index outer_in = outer.in / outer.groups, inner_in = inner.in / inner.groups,
                product_in = product.in / product.groups;
    Block block{.out = out,
                .in = inner_in,
                .outer_step = outer_in * outer_count(),
                .inner_step = inner_in * inner_count(),
                .result_step = product_in * taps};
    Index outer_end = 0, inner_end = 0;            // of the groups that share the segment
    Index first_out = -out, first_in = -inner_in;  // of those groups' channels
    for (Index begin = 0; begin < inner.out; begin += block.between) {
      if (begin == outer_end) outer_end += outer_in, first_out += out;
      if (begin == inner_end) inner_end += inner_out, first_in += inner_in;
      block.between = std::min(outer_end, inner_end) - begin;
      block.outer = first_out * block.outer_step + (begin - (outer_end - outer_in)) * outer_count();
      block.inner = begin * block.inner_step;
      block.result = first_out * block.result_step + first_in % product_in * taps;
      visit(std::as_const(block));
    }
  }

  /// Multiply-adds.
  Index work(const Block& block) const {
    return block.out * block.between * block.in * outer_count() * inner_count();
  }

  /// Output channels of an inner pointwise pair that are side by side in one matrix product.
  Index kernels_in_panel(const Block& block) const {
    constexpr Index wanted_columns = 512;
    return std::clamp<Index>(wanted_columns / outer_count(), 1, block.out);
  }
  Index kernel_panels(const Block& block) const {
    return (block.out + kernels_in_panel(block) - 1) / kernels_in_panel(block);
  }

  std::span<const PairRun> runs_of(Index tap) const {
    const auto t = static_cast<std::size_t>(tap);
    return std::span(runs).subspan(first_run[t], first_run[t + 1] - first_run[t]);
  }

 private:
  void find_runs() {
    std::vector<std::vector<PairRun>> found(static_cast<std::size_t>(taps));
    for (Index b = 0; b < outer_count(); ++b) {
      for (Index a = 0; a < inner_count(); ++a) {
        const Index t =
            outer_taps[static_cast<std::size_t>(b)] + inner_taps[static_cast<std::size_t>(a)];
        auto& at = found[static_cast<std::size_t>(t)];
        if (!at.empty() && at.back().b + at.back().length == b &&
            at.back().a - at.back().length == a) {
          ++at.back().length;
        } else {
          at.push_back({b, a, 1});
        }
      }
    }
    first_run.push_back(0);
    for (const auto& at : found) {
      runs.insert(runs.end(), at.begin(), at.end());
      first_run.push_back(runs.size());
    }
  }
};

/// The cheapest order of a chain: for each run of layers, where its last product splits it.
/// Source  Cormen et al., Introduction to Algorithms, "Matrix-chain multiplication"
template <int Rank>
class ChainOrder {
 public:
  /// cost(outer, inner) is that of one product.
  template <class Cost>
  ChainOrder(std::span<const ConvShape<Rank>> layers, Cost&& cost) : count_(layers.size()) {
    shapes_.resize(count_ * count_);
    cost_.assign(count_ * count_, 0);
    split_.assign(count_ * count_, 0);
    for (std::size_t i = 0; i < count_; ++i) shapes_[at(i, i)] = layers[i];
    for (std::size_t length = 1; length < count_; ++length) {
      for (std::size_t i = 0; i + length < count_; ++i) decide(i, i + length, cost);
    }
  }

  /// With the cost of products on the processor.
  explicit ChainOrder(std::span<const ConvShape<Rank>> layers)
      : ChainOrder(layers, pair_cost<Rank>) {}

  /// The layer before which the product of first..last splits.
  std::size_t split(std::size_t first, std::size_t last) const { return split_[at(first, last)]; }

 private:
  std::size_t at(std::size_t first, std::size_t last) const { return first * count_ + last; }

  template <class Cost>
  void decide(std::size_t first, std::size_t last, Cost& pair_cost) {
    double& best = cost_[at(first, last)];
    split_[at(first, last)] = last;  // where every split overflows, multiply_run meets that
    best = std::numeric_limits<double>::infinity();
    for (std::size_t middle = first + 1; middle <= last; ++middle) {
      const double parts = cost_[at(first, middle - 1)] + cost_[at(middle, last)];
      if (!(parts < best)) continue;
      try {
        const auto &inner = shapes_[at(first, middle - 1)], &outer = shapes_[at(middle, last)];
        const double cost = parts + pair_cost(outer, inner);
        if (!(cost < best)) continue;
        best = cost;
        split_[at(first, last)] = middle;
        shapes_[at(first, last)] = product_shape(outer, inner);  // the same for every split
      } catch (const SizeError&) {
        continue;  // an intermediate that overflows is never chosen
      }
    }
  }

  std::size_t count_;
  std::vector<ConvShape<Rank>> shapes_;
  std::vector<double> cost_;
  std::vector<std::size_t> split_;
};

}  // namespace detail
}  // namespace concertina
