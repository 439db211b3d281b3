// A product of two kernels larger than 1x1: a matrix product for each run of tap pairs.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/detail/product/pointwise.hpp>

#include <algorithm>

namespace concertina::detail {

/// The result's tap t is the sum over tap pairs (b, a) that meet there of the matrix products W2_b
/// W1_a. Pairs that are neighbours in the outer kernel's last axis are neighbours, in reverse, in
/// the inner one's; so with W2 stored [out][b][hidden] and W1 stored [reversed a][hidden][in] such
/// a run of pairs is one matrix product, whose inner length is hidden * pairs. It needs no atomics,
/// no scatter, and no multiplications by zero.
template <class Scalar>
struct General {
  static Index forward_scratch(const ProductPlan& plan, const DenseBlock& block) {
    return block.out * block.hidden * plan.outer_count() +
           block.hidden * block.in * plan.inner_count() + block.out * block.in * plan.taps;
  }

  static void forward(const ProductPlan& plan, const DenseBlock& block,
                      const ForwardOperands<Scalar>& at, Scalar* scratch, const ParallelFor& run) {
    const Index outer_taps = plan.outer_count(), inner_taps = plan.inner_count(), taps = plan.taps;
    const Matrix<Scalar> outer{scratch, outer_taps * block.hidden},
        inner{outer.at(block.out, 0), block.in},
        sums{inner.at(inner_taps * block.hidden, 0), block.in};
    for (Index o = 0; o < block.out; ++o) {
      transpose<Scalar>({at.outer + o * block.outer_ld, outer_taps}, block.hidden, outer_taps,
                        {outer.at(o, 0), block.hidden});
    }
    for (Index m = 0; m < block.hidden; ++m) {
      transpose<Scalar>(
          {at.inner + m * block.inner_ld, inner_taps}, block.in, inner_taps,
          {inner.at((inner_taps - 1) * block.hidden + m, 0), -block.hidden * block.in});
    }

    // All of [tap][out][in] first, then transposed as a whole.
    share_out(plan.multiply_adds_of(block), taps, run, [&](Index t) {
      const Matrix<Scalar> sum = sums.block(t * block.out, 0);
      bool accumulate = false;
      for (const PairRun& pairs : plan.runs_of(t)) {
        gemm<Scalar>(Op::none, Op::none, block.out, block.in, pairs.length * block.hidden,
                     outer.block(0, pairs.b * block.hidden),
                     inner.block((inner_taps - 1 - pairs.a) * block.hidden, 0), accumulate, sum);
        accumulate = true;
      }
      if (!accumulate)
        std::fill_n(sum.data, block.out * block.in, Scalar(0));  // between dilated taps
    });
    constexpr Index panel = tuning::transposed_columns;
    for (Index o = 0; o < block.out; ++o) {
      for (Index first = 0; first < block.in; first += panel) {
        transpose<Scalar>({sums.at(o, first), block.out * block.in}, taps,
                          std::min(panel, block.in - first),
                          {at.result + o * block.result_ld + first * taps, taps});
      }
    }
  }

  static Index backward_scratch(const ProductPlan& plan, const DenseBlock& block) {
    const Index rows = block.out * plan.outer_count(), columns = plan.inner_count() * block.in;
    return block.out * plan.taps * block.in + rows * columns + 2 * rows * block.hidden +
           2 * block.hidden * columns;
  }

  /// Rows (o, b) and columns (a, c) of G[o][c][b + a]: with that matrix both gradients are one
  /// matrix product each. Neighbouring taps a are neighbours in the result, so where G is stored
  /// [o][tap][c] its rows are copied in long runs.
  static void backward(const ProductPlan& plan, const DenseBlock& block,
                       const BackwardOperands<Scalar>& at, Scalar* scratch,
                       const ParallelFor& run) {
    const Index outer_taps = plan.outer_count(), inner_taps = plan.inner_count();
    const Index rows = block.out * outer_taps, columns = inner_taps * block.in;
    const auto matrix = [&](Index height, Index width) {
      const Matrix<Scalar> result{scratch, width};
      scratch += height * width;
      return result;
    };
    const Matrix<Scalar> taps_first = matrix(block.out * plan.taps, block.in),
                         gradient = matrix(rows, columns), outer = matrix(rows, block.hidden),
                         inner = matrix(block.hidden, columns),
                         outer_gradient = at.outer_gradient ? matrix(rows, block.hidden)
                                                            : Matrix<Scalar>{nullptr, 0},
                         inner_gradient = at.inner_gradient ? matrix(block.hidden, columns)
                                                            : Matrix<Scalar>{nullptr, 0};
    for (Index o = 0; o < block.out; ++o) {
      transpose<Scalar>({at.result_gradient + o * block.result_ld, plan.taps}, block.in, plan.taps,
                        taps_first.block(o * plan.taps, 0));
      transpose<Scalar>({at.outer + o * block.outer_ld, outer_taps}, block.hidden, outer_taps,
                        outer.block(o * outer_taps, 0));
    }
    for (Index m = 0; m < block.hidden; ++m) {
      transpose<Scalar>({at.inner + m * block.inner_ld, inner_taps}, block.in, inner_taps,
                        {inner.at(m, 0), block.in});
    }
    for (Index o = 0; o < block.out; ++o) {
      for (Index b = 0; b < outer_taps; ++b) {
        const Index first = o * plan.taps + plan.outer_taps[static_cast<std::size_t>(b)];
        Scalar* to = gradient.at(o * outer_taps + b, 0);
        for (std::size_t a = 0; a < plan.inner_taps.size();) {
          const std::size_t start = a++;
          while (a < plan.inner_taps.size() && plan.inner_taps[a] == plan.inner_taps[a - 1] + 1)
            ++a;
          to = std::copy_n(taps_first.at(first + plan.inner_taps[start], 0),
                           static_cast<Index>(a - start) * block.in, to);
        }
      }
    }
    backward_gemm<Scalar>(plan.multiply_adds_of(block), rows, columns, block.hidden, gradient,
                          outer, inner, outer_gradient, inner_gradient, run);
    for (Index o = 0; at.outer_gradient && o < block.out; ++o) {
      transpose<Scalar>(outer_gradient.block(o * outer_taps, 0), outer_taps, block.hidden,
                        {at.outer_gradient + o * block.outer_ld, outer_taps});
    }
    for (Index m = 0; at.inner_gradient && m < block.hidden; ++m) {
      transpose<Scalar>({inner_gradient.at(m, 0), block.in}, inner_taps, block.in,
                        {at.inner_gradient + m * block.inner_ld, inner_taps});
    }
  }
};

}  // namespace concertina::detail
