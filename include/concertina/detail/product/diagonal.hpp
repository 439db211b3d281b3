// A product with one factor for each channel: batch norms and scales.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/detail/product/algorithm.hpp>
#include <concertina/detail/product/operands.hpp>

#include <algorithm>

namespace concertina::detail {

/// 1x1 depthwise after kxk: the rows scaled. The other factor's kernel is the product's, so its
/// elements stay where they are.
template <class Scalar>
struct OuterDiagonal {
  static void forward(const ProductPlan& plan, const ForwardOperands<Scalar>& at) {
    const Index row = row_size(plan);
    for (Index o = 0; o < plan.inner.out; ++o) {
      const Scalar factor = at.outer[o];
      const Scalar* from = at.inner + o * row;
      Scalar* to = at.result + o * row;
      for (Index i = 0; i < row; ++i) to[i] = factor * from[i];
    }
  }

  static void backward(const ProductPlan& plan, const BackwardOperands<Scalar>& at) {
    const Index row = row_size(plan);
    for (Index o = 0; o < plan.inner.out; ++o) {
      const Scalar factor = at.outer[o];
      const Scalar *gradient = at.result_gradient + o * row, *from = at.inner + o * row;
      if (at.inner_gradient) {
        Scalar* to = at.inner_gradient + o * row;
        for (Index i = 0; i < row; ++i) to[i] = factor * gradient[i];
      }
      if (!at.outer_gradient) continue;
      Scalar sum(0);
      for (Index i = 0; i < row; ++i) sum = sum + gradient[i] * from[i];
      at.outer_gradient[o] = sum;
    }
  }

 private:
  static Index row_size(const ProductPlan& plan) {
    return plan.inner.in / plan.inner.groups * plan.taps;
  }
};

/// kxk after 1x1 depthwise: the columns scaled.
template <class Scalar>
struct InnerDiagonal {
  static void forward(const ProductPlan& plan, const ForwardOperands<Scalar>& at) {
    const Index taps = plan.taps;
    for_each_column(plan, [&](Index channel, Index first) {
      const Scalar factor = at.inner[channel];
      for (Index t = first; t < first + taps; ++t) at.result[t] = factor * at.outer[t];
    });
  }

  static void backward(const ProductPlan& plan, const BackwardOperands<Scalar>& at) {
    const Index taps = plan.taps;
    if (at.inner_gradient) std::fill_n(at.inner_gradient, plan.outer.in, Scalar(0));
    for_each_column(plan, [&](Index channel, Index first) {
      if (at.outer_gradient) {
        const Scalar factor = at.inner[channel];
        for (Index t = first; t < first + taps; ++t) {
          at.outer_gradient[t] = factor * at.result_gradient[t];
        }
      }
      if (!at.inner_gradient) return;
      Scalar sum(0);
      for (Index t = first; t < first + taps; ++t) sum = sum + at.result_gradient[t] * at.outer[t];
      at.inner_gradient[channel] = at.inner_gradient[channel] + sum;
    });
  }

 private:
  /// Calls visit(channel, first element) for the taps of each pair of channels.
  template <class Visit>
  static void for_each_column(const ProductPlan& plan, Visit&& visit) {
    const Index in = plan.outer.in / plan.outer.groups, out = plan.outer.out / plan.outer.groups;
    Index first = 0;
    for (Index o = 0; o < plan.outer.out; ++o) {
      for (Index c = 0; c < in; ++c, first += plan.taps) visit(o / out * in + c, first);
    }
  }
};

}  // namespace concertina::detail
