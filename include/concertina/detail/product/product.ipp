// How a product is computed: one algorithm for each pair of shapes.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/detail/product/plan.hpp>
#include <concertina/product.hpp>

#include <Eigen/Core>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <numeric>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace concertina {

namespace detail {

template <class Scalar>
using RowMajor = Eigen::Matrix<Scalar, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
template <class Scalar>
using ConstMatrix = Eigen::Map<const RowMajor<Scalar>, 0, Eigen::OuterStride<>>;
template <class Scalar>
using MutableMatrix = Eigen::Map<RowMajor<Scalar>, 0, Eigen::OuterStride<>>;

/// Products of fewer multiply-adds are not shared out: threads take some 10 us to start, one takes
/// 100 for these.
inline constexpr Index least_shared = Index{1} << 22;

/// Calls task(i) for every i in 0 .. count - 1 in turn.
struct InTurn {
  template <class Task>
  void operator()(Index count, Task&& task) const {
    for (Index i = 0; i < count; ++i) task(i);
  }
};

/// Calls task(i) for every i in 0 .. count - 1: as `run` does where the work is worth it.
template <class Run, class Task>
void share_out(Index work, Index count, Run& run, Task&& task) {
  if (count < 2 || work < least_shared) return InTurn()(count, task);
  run(count, task);
}

/// A matrix product's result cut into panels that are computed on their own, each with the whole
/// inner length. The cut depends on the sizes only, so every number is computed in one and the same
/// way, whoever computes which panel.
class Panels {
 public:
  struct Panel {
    Index row, column, rows, columns;
  };

  Panels(Index rows, Index columns, Index inner)
      : rows_(rows), columns_(columns), height_(rows), width_(std::min(columns, widest)) {
    while (count() < enough && height_ * width_ * inner > 2 * least_work &&
           std::max(height_, width_) > 2 * least_side) {
      Index& longer = width_ >= height_ ? width_ : height_;
      longer = (longer / 2 + least_side - 1) / least_side * least_side;
    }
  }

  Index count() const { return down() * across(); }

  Panel operator[](Index i) const {
    const Index row = i / across() * height_, column = i % across() * width_;
    return {row, column, std::min(height_, rows_ - row), std::min(width_, columns_ - column)};
  }

 private:
  // Eigen sizes its blocks by the last-level cache, which for a very wide product spills the
  // second: 512 x 2048 x 18432 in float took 41 G multiply-adds/s at once and 51 in panels of 1024
  // (Xeon, AVX-512).
  static constexpr Index widest = 1024;
  // Eight threads have two panels each where a panel keeps enough work and is not so narrow that
  // packing its operands costs more than threads gain.
  static constexpr Index enough = 16, least_work = Index{1} << 21, least_side = 64;

  Index down() const { return (rows_ + height_ - 1) / height_; }
  Index across() const { return (columns_ + width_ - 1) / width_; }

  Index rows_, columns_;
  Index height_, width_;  // of a panel
};

/// From [rows][columns] to [columns][rows]. Eight rows at a time, so that what is written with a
/// stride is written eight numbers at a time: a number at a time took twice as long.
template <class Scalar>
void transpose(const Scalar* from, Index from_step, Index rows, Index columns, Scalar* to,
               Index to_step) {
  constexpr Index together = 8;
  Index row = 0;
  for (; row + together <= rows; row += together) {
    const Scalar* at = from + row * from_step;
    for (Index column = 0; column < columns; ++column) {
      for (Index i = 0; i < together; ++i) {
        to[column * to_step + row + i] = at[i * from_step + column];
      }
    }
  }
  for (; row < rows; ++row) {
    for (Index column = 0; column < columns; ++column) {
      to[column * to_step + row] = from[row * from_step + column];
    }
  }
}

/// Numbers of no value until they are written.
template <class Scalar>
using Scratch = Eigen::Array<Scalar, Eigen::Dynamic, 1>;

/// One product after another of the same shapes. Space for what is copied on the way is made once.
template <class Scalar, int Rank>
class PairProduct {
 public:
  /// With `shares` panels that are copied have space of their own, so that they can be computed at
  /// the same time.
  PairProduct(PairPlan<Rank> plan, bool shares) : plan_(std::move(plan)), shares_(shares) {
    Index numbers = 0;
    plan_.for_each_block([&](const Block& block) { numbers = std::max(numbers, space(block)); });
    if (plan_.inner.bias) numbers = std::max(numbers, numel(plan_.outer.kernel_size));
    scratch_.resize(numbers);
  }

  const PairPlan<Rank>& plan() const { return plan_; }

  /// outer * inner. Requires the product's structural zeros to be zeros.
  template <class Run>
  void operator()(const ConvView<Scalar, Rank>& outer, const ConvView<Scalar, Rank>& inner,
                  Conv<Scalar, Rank>& product, Run& run) {
    weight(outer.weight().data(), inner.weight().data(), product.weight().data(), run);
    if (product.shape().bias) bias(outer, inner, product.bias());
  }

 private:
  struct Factors {
    const Scalar *outer, *inner;
    Scalar* result;
  };
  using Vector = Eigen::Matrix<Scalar, Eigen::Dynamic, 1>;

  bool has_panels_apart(const Block& block) const {
    return shares_ && plan_.work(block) >= least_shared;
  }

  /// Numbers of scratch that a block takes.
  Index space(const Block& block) const {
    if (plan_.path == PairPath::inner_pointwise) {
      return (has_panels_apart(block) ? plan_.kernel_panels(block) : 1) *
             plan_.kernels_in_panel(block) * plan_.outer_count() * (block.between + block.in);
    }
    if (plan_.path != PairPath::general) return 0;
    return block.out * block.between * plan_.outer_count() +
           block.between * block.in * plan_.inner_count() + block.out * block.in * plan_.taps;
  }

  template <class Run>
  void weight(const Scalar* outer, const Scalar* inner, Scalar* product, Run& run) {
    if (plan_.is_diagonal()) return diagonal(outer, inner, product);
    if (plan_.path == PairPath::direct) {
      std::fill_n(product, weight_numel(plan_.product), Scalar(0));
    }
    plan_.for_each_block([&](const Block& block) {
      const Factors factors{outer + block.outer, inner + block.inner, product + block.result};
      switch (plan_.path) {
        case PairPath::outer_diagonal:
        case PairPath::inner_diagonal: break;
        case PairPath::direct: direct(block, factors); break;
        case PairPath::outer_pointwise: outer_pointwise(block, factors, run); break;
        case PairPath::inner_pointwise: inner_pointwise(block, factors, run); break;
        case PairPath::general: general(block, factors, run); break;
      }
    });
  }

  /// Inlined into the loop over blocks, GCC 12 keeps addresses in memory: 1.3 times as slow.
  [[gnu::noinline]] void direct(const Block& block, const Factors& at) const {
    const std::span<const Index> outer_taps(plan_.outer_taps), inner_taps(plan_.inner_taps);
    const Index outer_count = std::ssize(outer_taps), inner_count = std::ssize(inner_taps);
    for (Index o = 0; o < block.out; ++o) {
      for (Index m = 0; m < block.between; ++m) {
        const Scalar* w2 = at.outer + o * block.outer_step + m * outer_count;
        for (Index c = 0; c < block.in; ++c) {
          const Scalar* w1 = at.inner + m * block.inner_step + c * inner_count;
          Scalar* result = at.result + o * block.result_step + c * plan_.taps;
          for (const Index b : outer_taps) {
            const Scalar& factor = *w2++;
            for (std::size_t a = 0; a < inner_taps.size(); ++a) {
              Scalar& sum = result[b + inner_taps[a]];
              sum = sum + factor * w1[a];
            }
          }
          w2 -= outer_count;
        }
      }
    }
  }

  /// One matrix product, in place.
  template <class Run>
  void outer_pointwise(const Block& block, const Factors& at, Run& run) const {
    const Panels panels(block.out, block.in * plan_.taps, block.between);
    share_out(plan_.work(block), panels.count(), run, [&](Index i) {
      const Panels::Panel panel = panels[i];
      MutableMatrix<Scalar>(at.result + panel.row * block.result_step + panel.column, panel.rows,
                            panel.columns, Eigen::OuterStride<>(block.result_step))
          .noalias() = ConstMatrix<Scalar>(at.outer + panel.row * block.outer_step, panel.rows,
                                           block.between, Eigen::OuterStride<>(block.outer_step)) *
                       ConstMatrix<Scalar>(at.inner + panel.column, block.between, panel.columns,
                                           Eigen::OuterStride<>(block.inner_step));
    });
  }

  /// For one output channel the result [in][taps] is a matrix product with few columns. Taking
  /// several output channels side by side makes it wide: their kernels are copied into
  /// [between][channel, tap], whose copies are contiguous runs of a kernel, as are those of the
  /// result.
  template <class Run>
  void inner_pointwise(const Block& block, const Factors& at, Run& run) {
    const Index taps = plan_.outer_count(), kernels_in_panel = plan_.kernels_in_panel(block),
                width = kernels_in_panel * taps;
    const Index apart = has_panels_apart(block) ? width * (block.between + block.in) : 0;
    const ConstMatrix<Scalar> inner(at.inner, block.between, block.in,
                                    Eigen::OuterStride<>(block.inner_step));
    share_out(plan_.work(block), plan_.kernel_panels(block), run, [&](Index i) {
      const Index first = i * kernels_in_panel,
                  rows = std::min(kernels_in_panel, block.out - first);
      Eigen::Map<RowMajor<Scalar>> kernels(scratch_.data() + i * apart, block.between, width);
      Eigen::Map<RowMajor<Scalar>> products(kernels.data() + kernels.size(), block.in, width);
      for (Index m = 0; m < block.between; ++m) {
        for (Index o = 0; o < rows; ++o) {
          std::copy_n(at.outer + (first + o) * block.outer_step + m * taps, taps,
                      &kernels(m, o * taps));
        }
      }
      products.leftCols(rows * taps).noalias() = inner.transpose() * kernels.leftCols(rows * taps);
      for (Index o = 0; o < rows; ++o) {
        for (Index c = 0; c < block.in; ++c) {
          std::copy_n(&products(c, o * taps), taps,
                      at.result + (first + o) * block.result_step + c * taps);
        }
      }
    });
  }

  /// The result's tap t is the sum over tap pairs (b, a) that meet there of the matrix products
  /// W2_b W1_a. Pairs that are neighbours in the outer kernel's last axis are neighbours, in
  /// reverse, in the inner one's; so with W2 stored [out][b][between] and W1 stored [reversed
  /// a][between][in] such a row of pairs is one matrix product, whose inner length is between *
  /// pairs. It needs no atomics, no scatter, and no multiplications by zero.
  template <class Run>
  void general(const Block& block, const Factors& at, Run& run) {
    const Index outer_taps = plan_.outer_count(), inner_taps = plan_.inner_count(),
                taps = plan_.taps;
    Eigen::Map<RowMajor<Scalar>> outer(scratch_.data(), block.out, outer_taps * block.between);
    for (Index o = 0; o < block.out; ++o) {
      transpose(at.outer + o * block.outer_step, outer_taps, block.between, outer_taps,
                &outer(o, 0), block.between);
    }
    Eigen::Map<RowMajor<Scalar>> inner(outer.data() + outer.size(), inner_taps * block.between,
                                       block.in);
    for (Index m = 0; m < block.between; ++m) {
      transpose(at.inner + m * block.inner_step, inner_taps, block.in, inner_taps,
                &inner((inner_taps - 1) * block.between + m, 0), -block.between * block.in);
    }

    // All of [tap][out][in] first, then transposed as a whole.
    Eigen::Map<RowMajor<Scalar>> sums(inner.data() + inner.size(), taps * block.out, block.in);
    share_out(plan_.work(block), taps, run, [&](Index t) {
      auto sum = sums.middleRows(t * block.out, block.out);
      const std::span<const PairRun> runs = plan_.runs_of(t);
      if (runs.empty()) sum.setZero();  // between spread taps
      for (const PairRun& pairs : runs) {
        const auto left = outer.middleCols(pairs.b * block.between, pairs.length * block.between);
        const auto right = inner.middleRows((inner_taps - 1 - pairs.a) * block.between,
                                            pairs.length * block.between);
        if (&pairs == &runs.front()) {
          sum.noalias() = left * right;
        } else {
          sum.noalias() += left * right;
        }
      }
    });
    // In panels of columns, which stay in the first-level cache.
    constexpr Index panel = 256;
    for (Index o = 0; o < block.out; ++o) {
      for (Index first = 0; first < block.in; first += panel) {
        transpose(&sums(o, first), block.out * block.in, taps, std::min(panel, block.in - first),
                  at.result + o * block.result_step + first * taps, taps);
      }
    }
  }

  /// The other factor's kernel is the product's, so its numbers stay where they are.
  void diagonal(const Scalar* outer, const Scalar* inner, Scalar* product) const {
    const bool scales_rows = plan_.path == PairPath::outer_diagonal;
    const ConvShape<Rank>& layer = scales_rows ? plan_.inner : plan_.outer;
    const Scalar *factors = scales_rows ? outer : inner, *from = scales_rows ? inner : outer;
    const Index in = layer.in / layer.groups, out = layer.out / layer.groups;
    const Index taps = plan_.taps;
    for (Index o = 0; o < layer.out; ++o) {
      if (scales_rows) {
        scale(factors[o], from, product, in * taps);
        from += in * taps, product += in * taps;
        continue;
      }
      for (Index c = 0; c < in; ++c, from += taps, product += taps) {
        scale(factors[o / out * in + c], from, product, taps);
      }
    }
  }

  /// b2 plus the outer layer on a map that is b1 everywhere. Channels are summed first and taps
  /// last, which rounds channels + taps times.
  void bias(const ConvView<Scalar, Rank>& outer, const ConvView<Scalar, Rank>& inner,
            std::span<Scalar> product) {
    if (outer.shape().bias) {
      std::ranges::copy(outer.bias(), product.begin());
    } else {
      std::ranges::fill(product, Scalar(0));
    }
    if (!inner.shape().bias) return;
    const Index groups = outer.shape().groups, in = outer.shape().in / groups,
                out = outer.shape().out / groups, taps = numel(outer.shape().kernel_size);
    for (Index g = 0; g < groups; ++g) {
      const Scalar* weight = outer.weight().data() + g * out * in * taps;
      const Eigen::Map<const Vector> b1(inner.bias().data() + g * in, in);
      Eigen::Map<Vector> biases(product.data() + g * out, out);
      if (taps == 1) {
        biases.noalias() += Eigen::Map<const RowMajor<Scalar>>(weight, out, in) * b1;
        continue;
      }
      Eigen::Map<Vector> sums(scratch_.data(), taps);
      for (Index o = 0; o < out; ++o, weight += in * taps) {
        sums.noalias() = Eigen::Map<const RowMajor<Scalar>>(weight, in, taps).transpose() * b1;
        biases[o] = biases[o] + sums.sum();
      }
    }
  }

  /// to[i] = factor * from[i].
  static void scale(const Scalar& factor, const Scalar* from, Scalar* to, Index count) {
    for (Index i = 0; i < count; ++i) to[i] = factor * from[i];
  }

  PairPlan<Rank> plan_;
  bool shares_;
  Scratch<Scalar> scratch_;
};

/// outer * inner, as one layer.
template <class Scalar, int Rank>
Conv<Scalar, Rank> multiply(const ConvView<Scalar, Rank>& outer,
                            const ConvView<Scalar, Rank>& inner) {
  PairProduct<Scalar, Rank> pair(PairPlan<Rank>(outer.shape(), inner.shape()), false);
  Conv<Scalar, Rank> product(pair.plan().product);
  InTurn run;
  pair(outer, inner, product, run);
  return product;
}

/// The product of layers first..last.
template <class Scalar, int Rank>
Conv<Scalar, Rank> multiply_run(std::span<const ConvView<Scalar, Rank>> layers,
                                const ChainOrder<Rank>& order, std::size_t first,
                                std::size_t last) {
  const std::size_t middle = order.split(first, last);
  const auto part = [&](std::size_t from, std::size_t to, auto&& use) {
    if (from == to) return use(layers[from]);
    const Conv<Scalar, Rank> product = multiply_run(layers, order, from, to);
    return use(ConvView<Scalar, Rank>(product));
  };
  return part(first, middle - 1, [&](const ConvView<Scalar, Rank>& inner) {
    return part(middle, last,
                [&](const ConvView<Scalar, Rank>& outer) { return multiply(outer, inner); });
  });
}

/// The product of a chain, the first layer applied first.
template <class Scalar, int Rank>
Conv<Scalar, Rank> multiply(std::span<const ConvView<Scalar, Rank>> layers) {
  if (layers.size() == 1) return Conv<Scalar, Rank>(layers.front());
  std::vector<ConvShape<Rank>> shapes;
  for (const auto& layer : layers) shapes.push_back(layer.shape());
  const ChainOrder<Rank> order(std::span<const ConvShape<Rank>>{shapes});
  return multiply_run(layers, order, 0, layers.size() - 1);
}

}  // namespace detail
}  // namespace concertina
