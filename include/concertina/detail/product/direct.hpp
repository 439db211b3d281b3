// A product in plain loops: depthwise and tiny blocks, where a matrix product costs more than it
// saves.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/detail/product/algorithm.hpp>
#include <concertina/detail/product/operands.hpp>

#include <span>

namespace concertina::detail {

template <class Scalar>
struct Direct {
  /// Adds to the result. Inlined into the loop over blocks, GCC 12 keeps addresses in memory: 1.3
  /// times as slow.
  [[gnu::noinline]] static void forward(const ProductPlan& plan, const DenseBlock& block,
                                        const ForwardOperands<Scalar>& at) {
    const std::span<const Index> outer_taps(plan.outer_taps), inner_taps(plan.inner_taps);
    const Index outer_count = std::ssize(outer_taps), inner_count = std::ssize(inner_taps);
    for (Index o = 0; o < block.out; ++o) {
      for (Index m = 0; m < block.hidden; ++m) {
        const Scalar* w2 = at.outer + o * block.outer_ld + m * outer_count;
        for (Index c = 0; c < block.in; ++c) {
          const Scalar* w1 = at.inner + m * block.inner_ld + c * inner_count;
          Scalar* result = at.result + o * block.result_ld + c * plan.taps;
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

  /// Adds to both gradients.
  static void backward(const ProductPlan& plan, const DenseBlock& block,
                       const BackwardOperands<Scalar>& at) {
    if (at.outer_gradient && at.inner_gradient) return add_gradients<true, true>(plan, block, at);
    if (at.outer_gradient) return add_gradients<true, false>(plan, block, at);
    add_gradients<false, true>(plan, block, at);
  }

 private:
  template <bool Outer, bool Inner>
  static void add_gradients(const ProductPlan& plan, const DenseBlock& block,
                            const BackwardOperands<Scalar>& at) {
    const std::span<const Index> outer_taps(plan.outer_taps), inner_taps(plan.inner_taps);
    const Index taps = plan.taps;
    for (Index o = 0; o < block.out; ++o) {
      const Scalar *w2 = at.outer + o * block.outer_ld, *row = at.inner;
      Scalar *g2 = Outer ? at.outer_gradient + o * block.outer_ld : nullptr,
             *row_gradient = at.inner_gradient;
      for (Index m = 0; m < block.hidden; ++m) {
        const Scalar *w1 = row, *gradient = at.result_gradient + o * block.result_ld;
        Scalar* g1 = row_gradient;
        for (Index c = 0; c < block.in; ++c) {
          for (std::size_t b = 0; b < outer_taps.size(); ++b) {
            const Scalar* const at_b = gradient + outer_taps[b];
            Scalar sum = Outer ? g2[b] : Scalar(0);
            for (std::size_t a = 0; a < inner_taps.size(); ++a) {
              const Scalar& g = at_b[inner_taps[a]];
              if constexpr (Outer) sum = sum + g * w1[a];
              if constexpr (Inner) g1[a] = g1[a] + w2[b] * g;
            }
            if constexpr (Outer) g2[b] = sum;
          }
          w1 += inner_taps.size(), gradient += taps;
          if constexpr (Inner) g1 += inner_taps.size();
        }
        w2 += outer_taps.size(), row += block.inner_ld;
        if constexpr (Outer) g2 += outer_taps.size();
        if constexpr (Inner) row_gradient += block.inner_ld;
      }
    }
  }
};

}  // namespace concertina::detail
