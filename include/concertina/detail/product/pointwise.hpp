// A product with a 1x1 layer on one side: matrix products.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/detail/product/algorithm.hpp>
#include <concertina/detail/product/gemm.hpp>
#include <concertina/detail/product/operands.hpp>
#include <concertina/detail/product/panels.hpp>

#include <algorithm>

namespace concertina::detail {

/// Both gradients of a matrix product outer * inner, in panels: outer_gradient = gradient inner^T
/// and inner_gradient = outer^T gradient, of which gradient is rows x columns; but for null ones.
template <class Scalar>
void backward_gemm(Index multiply_adds, Index rows, Index columns, Index hidden,
                   Matrix<const Scalar> gradient, Matrix<const Scalar> outer,
                   Matrix<const Scalar> inner, Matrix<Scalar> outer_gradient,
                   Matrix<Scalar> inner_gradient, const ParallelFor& run) {
  const Panels of_outer(rows, hidden, columns), of_inner(hidden, columns, rows);
  const Index outer_panels = outer_gradient.data ? of_outer.count() : 0,
              inner_panels = inner_gradient.data ? of_inner.count() : 0;
  share_out(2 * multiply_adds, outer_panels + inner_panels, run, [&](Index i) {
    if (i < outer_panels) {
      const auto [row, column, height, width] = of_outer[i];
      gemm<Scalar>(Op::none, Op::transpose, height, width, columns, gradient.block(row, 0),
                   inner.block(column, 0), false, outer_gradient.block(row, column));
    } else {
      const auto [row, column, height, width] = of_inner[i - outer_panels];
      gemm<Scalar>(Op::transpose, Op::none, height, width, rows, outer.block(0, row),
                   gradient.block(0, column), false, inner_gradient.block(row, column));
    }
  });
}

/// 1x1 after kxk: one matrix product, in place.
template <class Scalar>
struct OuterPointwise {
  static void forward(const ProductPlan& plan, const DenseBlock& block,
                      const ForwardOperands<Scalar>& at, const ParallelFor& run) {
    const Matrix<const Scalar> outer{at.outer, block.outer_ld}, inner{at.inner, block.inner_ld};
    const Matrix<Scalar> result{at.result, block.result_ld};
    const Panels panels(block.out, block.in * plan.taps, block.hidden);
    share_out(plan.multiply_adds_of(block), panels.count(), run, [&](Index i) {
      const auto [row, column, rows, columns] = panels[i];
      gemm<Scalar>(Op::none, Op::none, rows, columns, block.hidden, outer.block(row, 0),
                   inner.block(0, column), false, result.block(row, column));
    });
  }

  static void backward(const ProductPlan& plan, const DenseBlock& block,
                       const BackwardOperands<Scalar>& at, const ParallelFor& run) {
    backward_gemm<Scalar>(plan.multiply_adds_of(block), block.out, block.in * plan.taps,
                          block.hidden, {at.result_gradient, block.result_ld},
                          {at.outer, block.outer_ld}, {at.inner, block.inner_ld},
                          {at.outer_gradient, block.outer_ld}, {at.inner_gradient, block.inner_ld},
                          run);
  }
};

/// kxk after 1x1. For one output channel the result [in][taps] is a matrix product with few
/// columns. Taking several output channels side by side makes it wide: their kernels are copied
/// into [hidden][channel, tap], whose copies are contiguous runs of a kernel, as are those of the
/// result.
template <class Scalar>
struct InnerPointwise {
  static Index forward_scratch(const ProductPlan& plan, const DenseBlock& block, bool parallel) {
    return (has_panels_apart(plan, block, parallel) ? plan.kernel_panels(block) : 1) *
           width(plan, block) * (block.hidden + block.in);
  }

  static void forward(const ProductPlan& plan, const DenseBlock& block,
                      const ForwardOperands<Scalar>& at, Scalar* scratch, bool parallel,
                      const ParallelFor& run) {
    const Index taps = plan.outer_count(), wide = width(plan, block);
    const Index apart =
        has_panels_apart(plan, block, parallel) ? wide * (block.hidden + block.in) : 0;
    share_out(plan.multiply_adds_of(block), plan.kernel_panels(block), run, [&](Index i) {
      const auto [first, count] = panel(plan, block, i);
      const Matrix<Scalar> kernels{scratch + i * apart, wide},
          products{kernels.data + block.hidden * wide, wide};
      gather({at.outer + first * block.outer_ld, block.outer_ld}, block.hidden, count, taps,
             kernels);
      gemm<Scalar>(Op::transpose, Op::none, block.in, count * taps, block.hidden,
                   {at.inner, block.inner_ld}, kernels, false, products);
      scatter(products, block.in, count, taps,
              {at.result + first * block.result_ld, block.result_ld});
    });
  }

  static Index backward_scratch(const ProductPlan& plan, const DenseBlock& block) {
    const Index panels = plan.kernel_panels(block);
    return (panels * (block.hidden + block.in) +
            (has_panels_apart(plan, block, true) ? panels : 1) * block.hidden) *
           width(plan, block);
  }

  /// Kernels [hidden][channel, tap] and gradients [in][channel, tap], panel after panel, are kept
  /// until the inner gradient, which sums over all panels, is computed.
  static void backward(const ProductPlan& plan, const DenseBlock& block,
                       const BackwardOperands<Scalar>& at, Scalar* scratch,
                       const ParallelFor& run) {
    const Index taps = plan.outer_count(), panels = plan.kernel_panels(block),
                wide = width(plan, block), both = (block.hidden + block.in) * wide;
    const Index apart = has_panels_apart(plan, block, true) ? block.hidden * wide : 0;
    const auto kernels = [&](Index i) { return Matrix<Scalar>{scratch + i * both, wide}; };
    const auto gradients = [&](Index i) {
      return Matrix<Scalar>{kernels(i).data + block.hidden * wide, wide};
    };
    share_out(plan.multiply_adds_of(block), panels, run, [&](Index i) {
      const auto [first, count] = panel(plan, block, i);
      const Matrix<Scalar> result{scratch + panels * both + i * apart, wide};
      gather({at.outer + first * block.outer_ld, block.outer_ld}, block.hidden, count, taps,
             kernels(i));
      gather({at.result_gradient + first * block.result_ld, block.result_ld}, block.in, count, taps,
             gradients(i));
      if (!at.outer_gradient) return;
      gemm<Scalar>(Op::none, Op::none, block.hidden, count * taps, block.in,
                   {at.inner, block.inner_ld}, gradients(i), false, result);
      scatter(result, block.hidden, count, taps,
              {at.outer_gradient + first * block.outer_ld, block.outer_ld});
    });
    if (!at.inner_gradient) return;
    const Matrix<Scalar> inner_gradient{at.inner_gradient, block.inner_ld};
    const Panels of_inner(block.hidden, block.in, block.out * taps);
    share_out(plan.multiply_adds_of(block), of_inner.count(), run, [&](Index p) {
      const auto [row, column, rows, columns] = of_inner[p];
      for (Index i = 0; i < panels; ++i) {
        gemm<Scalar>(Op::none, Op::transpose, rows, columns, panel(plan, block, i).count * taps,
                     kernels(i).block(row, 0), gradients(i).block(column, 0), i > 0,
                     inner_gradient.block(row, column));
      }
    });
  }

 private:
  struct Channels {
    Index first, count;
  };

  static Index width(const ProductPlan& plan, const DenseBlock& block) {
    return plan.kernels_in_panel(block) * plan.outer_count();
  }
  /// Panels that are computed at the same time have scratch of their own.
  static bool has_panels_apart(const ProductPlan& plan, const DenseBlock& block, bool parallel) {
    return parallel && plan.multiply_adds_of(block) >= tuning::least_shared;
  }
  static Channels panel(const ProductPlan& plan, const DenseBlock& block, Index i) {
    const Index first = i * plan.kernels_in_panel(block);
    return {first, std::min(plan.kernels_in_panel(block), block.out - first)};
  }

  /// From [channel][row][tap] to [row][channel, tap].
  static void gather(Matrix<const Scalar> from, Index rows, Index channels, Index taps,
                     Matrix<Scalar> to) {
    for (Index row = 0; row < rows; ++row) {
      for (Index o = 0; o < channels; ++o) {
        std::copy_n(from.at(o, row * taps), taps, to.at(row, o * taps));
      }
    }
  }
  /// The other way round.
  static void scatter(Matrix<const Scalar> from, Index rows, Index channels, Index taps,
                      Matrix<Scalar> to) {
    for (Index o = 0; o < channels; ++o) {
      for (Index row = 0; row < rows; ++row) {
        std::copy_n(from.at(row, o * taps), taps, to.at(o, row * taps));
      }
    }
  }
};

}  // namespace concertina::detail
