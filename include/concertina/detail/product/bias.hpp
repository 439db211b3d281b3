// The bias of a product.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/detail/product/algorithm.hpp>
#include <concertina/detail/product/gemm.hpp>

#include <algorithm>

namespace concertina::detail {

/// b2 plus the outer layer on a map that is b1 everywhere.
template <class Scalar>
struct ProductBias {
  static Index forward_scratch(const ProductPlan& plan) {
    return plan.inner.bias ? numel(plan.outer.kernel_size) : 0;
  }

  /// Channels are summed first and taps last, which rounds channels + taps times. Null for a bias
  /// that is not there.
  static void forward(const ProductPlan& plan, const Scalar* outer, const Scalar* b2,
                      const Scalar* b1, Scalar* result, Scalar* scratch) {
    if (b2) {
      std::copy_n(b2, plan.outer.out, result);
    } else {
      std::fill_n(result, plan.outer.out, Scalar(0));
    }
    if (!b1) return;
    const Index in = plan.outer.in / plan.outer.groups, out = plan.outer.out / plan.outer.groups,
                taps = numel(plan.outer.kernel_size);
    for (Index o = 0; o < plan.outer.out; ++o, outer += in * taps) {
      const Scalar* const bias = b1 + o / out * in;
      if (taps == 1) {
        result[o] = result[o] + dot(in, outer, bias);
        continue;
      }
      std::fill_n(scratch, taps, Scalar(0));
      for (Index m = 0; m < in; ++m) axpy(taps, bias[m], outer + m * taps, scratch);
      Scalar sum(0);
      for (Index t = 0; t < taps; ++t) sum = sum + scratch[t];
      result[o] = result[o] + sum;
    }
  }

  static Index backward_scratch(const ProductPlan& plan) {
    return plan.inner.bias ? plan.outer.in / plan.outer.groups * numel(plan.outer.kernel_size) : 0;
  }

  /// What the term of the product's bias that b1 is in, (sum over the taps of W2) b1, gives: it
  /// adds to the outer weight's gradient. Either gradient may be null.
  static void backward(const ProductPlan& plan, const Scalar* outer, const Scalar* b1,
                       const Scalar* gradient, Scalar* outer_gradient, Scalar* b1_gradient,
                       Scalar* scratch) {
    const Index groups = plan.outer.groups, in = plan.outer.in / groups,
                out = plan.outer.out / groups, taps = numel(plan.outer.kernel_size);
    for (Index g = 0; g < groups; ++g, b1 += in) {
      std::fill_n(scratch, in * taps, Scalar(0));  // W2^T times the gradient
      for (Index o = 0; o < out; ++o, ++gradient, outer += in * taps) {
        if (b1_gradient) axpy(in * taps, *gradient, outer, scratch);
        if (!outer_gradient) continue;
        if (taps == 1) {
          axpy(in, *gradient, b1, outer_gradient);
        } else {
          for (Index m = 0; m < in; ++m) {
            const Scalar added = *gradient * b1[m];
            Scalar* to = outer_gradient + m * taps;
            for (Index t = 0; t < taps; ++t) to[t] = to[t] + added;
          }
        }
        outer_gradient += in * taps;
      }
      if (!b1_gradient) continue;
      for (Index m = 0; m < in; ++m) {
        Scalar sum(0);
        for (Index t = 0; t < taps; ++t) sum = sum + scratch[m * taps + t];
        b1_gradient[m] = sum;
      }
      b1_gradient += in;
    }
  }
};

}  // namespace concertina::detail
