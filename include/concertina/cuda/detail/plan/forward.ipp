// The jobs of products.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/cuda/detail/plan/form_planner.ipp>

#include <algorithm>
#include <cstddef>

namespace concertina::cuda::detail {

inline void FormPlanner::multiply(PlannedProduct& product) {
  Schedule& schedule = planning_.forward;
  const PlannedValue &outer = values_[product.outer], &inner = values_[product.inner];
  PlannedValue& result = values_[product.result];
  int level = std::max(outer.ready, inner.ready);
  Index written = 0;
  for (const BlockRun& run : product.runs) written += run.count * run.first.out * run.first.in;
  if (written * product.plan.taps < weight_numel(result.shape)) {  // zeros between the blocks
    schedule.add(0, copy({}, result.weight, weight_numel(result.shape)));
    level = std::max(level, 1);
  }
  for (std::size_t r = 0; r < product.runs.size(); ++r) {
    const BlockRun& run = product.runs[r];
    const int ready = is_unfolded(product, run) ? multiply_unfolded(product, r, level)
                                                : multiply_taps(product, run, level);
    result.ready = std::max(result.ready, ready);
  }
  if (result.shape.bias) {
    result.ready = std::max(result.ready, multiply_bias(product, level));
  }
  schedule.sequence.multiply_adds += concertina::detail::multiply_adds(outer.shape, inner.shape);
}

/// P[o][c][t] = sum over the pairs that meet at t, and m, of W2[o][m][b] W1[m][c][a].
inline int FormPlanner::multiply_taps(const PlannedProduct& product, const BlockRun& run,
                                      int level) {
  Schedule& schedule = planning_.forward;
  const DenseBlock& block = run.first;
  const Index outer_taps = product.outer_taps(), inner_taps = product.inner_taps();
  Job job{.groups = run.count,
          .m = narrow(block.out),
          .n = narrow(block.in),
          .k = narrow(block.hidden),
          .a = shifted(values_[product.outer].weight, block.outer, run.outer_stride),
          .b = shifted(values_[product.inner].weight, block.inner, run.inner_stride),
          .c = shifted(values_[product.result].weight, block.result, run.result_stride),
          .a_m = stride(block.outer_ld),
          .a_k = stride(outer_taps),
          .b_k = stride(block.inner_ld),
          .c_m = stride(block.result_ld),
          .b_n = narrow(inner_taps),
          .c_n = narrow(product.plan.taps),
          .first_tap = Job::identity_tap};
  if (outer_taps == 1) {  // channel and tap of the inner kernel are one mode
    job.n = narrow(block.in * inner_taps);
    job.b_n = job.c_n = 1;
  } else if (inner_taps == 1) {  // output channel and tap of the outer kernel are one
    job.m = narrow(block.out * outer_taps);
    job.m_inner_extent = narrow(outer_taps);
    job.a_m = stride(block.outer_ld, 1);
    job.c_m = stride(block.result_ld, 1);
    job.a_is_k_major = false;
  } else {
    job.taps = narrow(product.plan.taps);
    job.first_tap = result_taps(schedule, product,
                                [](Index b, Index a) { return TapPair{narrow(b), narrow(a)}; });
  }
  return planning_.multiply(schedule, level, job);
}

/// W2 [(o, b)][m] times W1 [m][(a, c)] is one matrix product, and folding adds up its elements
/// where taps (b, a) meet. Where it needs that, taps are moved from between the channels first.
inline int FormPlanner::multiply_unfolded(PlannedProduct& product, std::size_t r, int level) {
  Schedule& schedule = planning_.forward;
  const BlockRun& run = product.runs[r];
  const DenseBlock& block = run.first;
  const Index taps = product.outer_taps(), rows = block.out * taps,
              width = block.in * product.inner_taps();
  const bool tiled = is_tiled(product, run);
  const int meeting = taps == 1 ? 0 : unfolded_taps(schedule, product, block, tiled);
  int ready = level;
  for (int group = 0; group < run.count; ++group) {
    const TensorRef outer = shifted(values_[product.outer].weight,
                                    block.outer + group * run.outer_stride),
                    result = shifted(values_[product.result].weight,
                                     block.result + group * run.result_stride);
    Matrix inner{shifted(values_[product.inner].weight, block.inner + group * run.inner_stride),
                 block.inner_ld};
    if (taps == 1) {
      ready = std::max(ready, gemm(schedule, level, {outer, block.outer_ld}, inner,
                                   {result, block.result_ld}, block.out, width, block.hidden));
      continue;
    }
    const auto fold_product = [&](int done, const TensorRef& sums) {
      schedule.add(done, fold({sums, taps * width}, {result, block.result_ld}, block.out, block.in,
                              product.plan.taps, meeting, tiled ? product.inner_taps() : 1));
      ready = std::max(ready, done + 1);
    };
    if (tiled) {
      const TensorRef sums = planning_.allocate(rows * width);
      product.unfolded[{r, group}] = {{}, inner, sums};
      fold_product(planning_.multiply(schedule, level,
                                      {.m = narrow(rows),
                                       .n = narrow(width),
                                       .k = narrow(block.hidden),
                                       .m_inner_extent = narrow(taps),
                                       .a = outer,
                                       .b = inner.ref,
                                       .c = sums,
                                       .a_m = stride(block.outer_ld, 1),
                                       .a_k = stride(taps),
                                       .b_k = stride(inner.ld),
                                       .c_m = stride(taps * width, width),
                                       .b_n = 1,
                                       .c_n = 1,
                                       .first_tap = Job::identity_tap,
                                       .a_is_k_major = false}),
                   sums);
      continue;
    }
    int unfolded = values_[product.inner].ready;
    if (product.inner_taps() > 1) {
      inner.ref =
          taps_first(schedule, unfolded++, inner, block.hidden, product.inner_taps(), block.in);
      inner.ld = width;
    }
    const int outer_ready = values_[product.outer].ready;
    unfolded = std::max({unfolded, outer_ready + 1, level});
    const Matrix kernels{
        taps_first(schedule, outer_ready, {outer, block.outer_ld}, block.out, taps, block.hidden),
        block.hidden},
        sums{planning_.allocate(rows * width), width};
    product.unfolded[{r, group}] = {kernels, inner, sums.ref};
    fold_product(gemm(schedule, unfolded, kernels, inner, sums, rows, width, block.hidden),
                 sums.ref);
  }
  return ready;
}

/// b2 + (sum over the taps of W2) b1, for each group of the outer layer.
inline int FormPlanner::multiply_bias(const PlannedProduct& product, int level) {
  const PlannedValue &outer = values_[product.outer], &inner = values_[product.inner],
                     &result = values_[product.result];
  Schedule& schedule = planning_.forward;
  if (!inner.shape.bias) {
    schedule.add(level, copy(outer.bias, result.bias, result.shape.out));
    return level + 1;
  }
  const Index groups = outer.shape.groups, out = outer.shape.out / groups,
              in = outer.shape.in / groups, taps = product.outer_taps();
  Job job{.groups = narrow(groups),
          .m = narrow(out),
          .k = narrow(in * taps),
          .k_inner_extent = narrow(taps),
          .a = shifted(outer.weight, 0, out * in * taps),
          .b = shifted(inner.bias, 0, in),
          .c = shifted(result.bias, 0, out),
          .a_m = stride(in * taps),
          .a_k = channels_and_taps(taps, taps),
          .b_k = stride(1),
          .c_m = stride(1),
          .first_tap = Job::identity_tap};
  if (outer.shape.bias) job.epilogue.bias = shifted(outer.bias, 0, out);
  return planning_.multiply(schedule, level, job);
}

}  // namespace concertina::cuda::detail
