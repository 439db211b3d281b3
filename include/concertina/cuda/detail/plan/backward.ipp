// The jobs of products' gradients.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/cuda/detail/plan/form_planner.ipp>

#include <algorithm>
#include <cstddef>
#include <vector>

namespace concertina::cuda::detail {

inline void FormPlanner::differentiate(const PlannedProduct& product) {
  const PlannedValue& result = values_[product.result];
  PlannedValue &outer = values_[product.outer], &inner = values_[product.inner];
  Schedule& schedule = planning_.backward;
  const int level = result.gradient_ready;
  if (outer.shape.bias) {
    schedule.add(level, copy(result.bias_gradient, outer.bias_gradient, outer.shape.out));
    outer.gradient_ready = level + 1;
  }
  if (inner.shape.bias) {
    inner.gradient_ready = std::max(inner.gradient_ready, inner_bias(product, level));
  }
  for (std::size_t r = 0; r < product.runs.size(); ++r) {
    const BlockRun& run = product.runs[r];
    Epilogue epilogue;
    if (inner.shape.bias) {  // W2's share of the product's bias
      epilogue.u = shifted(result.bias_gradient, run.out, run.out_stride);
      epilogue.v = shifted(inner.bias, run.hidden, run.hidden_stride);
    }
    if (is_gradient_unfolded(product, run)) {
      differentiate_unfolded(product, r, level, epilogue);
    } else {
      outer.gradient_ready =
          std::max(outer.gradient_ready, outer_gradient(product, run, level, epilogue));
      inner.gradient_ready = std::max(inner.gradient_ready, inner_gradient(product, run, level));
    }
  }
  schedule.sequence.multiply_adds +=
      2 * concertina::detail::multiply_adds(outer.shape, inner.shape);
}

/// dW2[o][m][b] = sum over c and a of G[o][c][tap of (b, a)] W1[m][c][a].
inline int FormPlanner::outer_gradient(const PlannedProduct& product, const BlockRun& run,
                                       int level, const Epilogue& epilogue) {
  Schedule& schedule = planning_.backward;
  const DenseBlock& block = run.first;
  const Index outer_taps = product.outer_taps(), inner_taps = product.inner_taps(),
              taps = product.plan.taps;
  Job job{.groups = run.count,
          .m = narrow(block.out),
          .n = narrow(block.hidden),
          .k = narrow(block.in),
          .a = shifted(values_[product.result].weight_gradient, block.result, run.result_stride),
          .b = shifted(values_[product.inner].weight, block.inner, run.inner_stride),
          .c = shifted(values_[product.outer].weight_gradient, block.outer, run.outer_stride),
          .a_m = stride(block.result_ld),
          .a_k = stride(taps),
          .b_k = stride(inner_taps),
          .c_m = stride(block.outer_ld),
          .b_n = narrow(block.inner_ld),
          .c_n = narrow(outer_taps),
          .first_tap = Job::identity_tap,
          .b_is_n_major = false,
          .epilogue = epilogue};
  if (outer_taps == 1) {
    job.k = narrow(block.in * inner_taps);
    job.a_k = job.b_k = stride(1);
  } else if (inner_taps == 1) {
    job.m = narrow(block.out * outer_taps);
    job.m_inner_extent = narrow(outer_taps);
    job.a_m = stride(block.result_ld, 1);
    job.c_m = stride(block.outer_ld, 1);
    job.a_is_k_major = false;
  } else {
    job.taps = narrow(outer_taps);
    job.first_tap = schedule.next_tap();
    for (Index b = 0; b < outer_taps; ++b) {
      std::vector<TapPair> pairs;
      for (Index a = 0; a < inner_taps; ++a) {
        pairs.push_back({narrow(meeting_tap(product.plan, b, a)), narrow(a)});
      }
      schedule.add_tap(narrow(b), pairs);
    }
  }
  return planning_.multiply(schedule, level, job);
}

/// dW1[m][c][a] = sum over o and b of W2[o][m][b] G[o][c][tap of (b, a)].
inline int FormPlanner::inner_gradient(const PlannedProduct& product, const BlockRun& run,
                                       int level) {
  Schedule& schedule = planning_.backward;
  const DenseBlock& block = run.first;
  const Index outer_taps = product.outer_taps(), inner_taps = product.inner_taps(),
              taps = product.plan.taps;
  Job job{.groups = run.count,
          .m = narrow(block.hidden),
          .n = narrow(block.in),
          .k = narrow(block.out),
          .a = shifted(values_[product.outer].weight, block.outer, run.outer_stride),
          .b = shifted(values_[product.result].weight_gradient, block.result, run.result_stride),
          .c = shifted(values_[product.inner].weight_gradient, block.inner, run.inner_stride),
          .a_m = stride(outer_taps),
          .a_k = stride(block.outer_ld),
          .b_k = stride(block.result_ld),
          .c_m = stride(block.inner_ld),
          .b_n = narrow(taps),
          .c_n = narrow(inner_taps),
          .first_tap = Job::identity_tap,
          .a_is_k_major = false};
  if (outer_taps == 1) {
    job.n = narrow(block.in * inner_taps);
    job.b_n = job.c_n = 1;
  } else if (inner_taps == 1) {  // output channel and tap of the outer kernel are one mode
    job.k = narrow(block.out * outer_taps);
    job.k_inner_extent = narrow(outer_taps);
    job.a_k = stride(block.outer_ld, 1);
    job.b_k = stride(block.result_ld, 1);
    job.a_is_k_major = true;
    job.b_is_n_major = false;
  } else {
    job.taps = narrow(inner_taps);
    job.first_tap = schedule.next_tap();
    for (Index a = 0; a < inner_taps; ++a) {
      std::vector<TapPair> pairs;
      for (Index b = 0; b < outer_taps; ++b) {
        pairs.push_back({narrow(b), narrow(meeting_tap(product.plan, b, a))});
      }
      schedule.add_tap(narrow(a), pairs);
    }
  }
  return planning_.multiply(schedule, level, job);
}

/// With the gradient unfolded, rows (o, b) and columns (a, c), both are one matrix product each.
inline void FormPlanner::differentiate_unfolded(const PlannedProduct& product, std::size_t r,
                                                int level, const Epilogue& epilogue) {
  Schedule& schedule = planning_.backward;
  const BlockRun& run = product.runs[r];
  const DenseBlock& block = run.first;
  PlannedValue &outer = values_[product.outer], &inner = values_[product.inner];
  const Index taps = product.outer_taps(), inner_taps = product.inner_taps(),
              rows = block.out * taps, width = block.in * inner_taps;
  const bool tiled = is_tiled(product, run);
  const int meeting = taps == 1 ? 0 : unfolded_taps(schedule, product, block, tiled);
  const auto raise = [](int& ready, int to) { ready = std::max(ready, to); };
  const bool outer_is_direct =
      taps > 1 && inner_taps == 1 && schedule.fits_tensor_cores(rows, block.hidden, block.in);
  if (outer_is_direct) {
    raise(outer.gradient_ready, outer_gradient(product, run, level, epilogue));
  }
  for (int group = 0; group < run.count; ++group) {
    const auto at = [&](const TensorRef& ref, Index offset, Index group_stride) {
      return ref.exists() ? shifted(ref, offset + group * group_stride) : ref;
    };
    const Epilogue added{.u = at(epilogue.u, 0, run.out_stride),
                         .v = at(epilogue.v, 0, run.hidden_stride)};
    const Matrix outer_gradient{at(outer.weight_gradient, block.outer, run.outer_stride),
                                block.outer_ld},
        inner_gradient{at(inner.weight_gradient, block.inner, run.inner_stride), block.inner_ld},
        gradient{at(values_[product.result].weight_gradient, block.result, run.result_stride),
                 block.result_ld};
    if (taps == 1) {
      const Matrix weight{at(outer.weight, block.outer, run.outer_stride), block.outer_ld},
          inner_weight{at(inner.weight, block.inner, run.inner_stride), block.inner_ld};
      raise(outer.gradient_ready, gemm(schedule, level, gradient, inner_weight.transpose(),
                                       outer_gradient, block.out, block.hidden, width, added));
      raise(inner.gradient_ready, gemm(schedule, level, weight.transpose(), gradient,
                                       inner_gradient, block.hidden, width, block.out));
      continue;
    }
    const auto found = product.unfolded.find({r, group});
    Unfolded unfolded =
        found != product.unfolded.end()
            ? found->second
            : Unfolded{.outer = {},
                       .inner = {at(inner.weight, block.inner, run.inner_stride), block.inner_ld},
                       .product = planning_.allocate(rows * width)};
    if (!unfolded.outer.ref.exists()) {
      unfolded.outer = {
          taps_first(schedule, level,
                     {at(outer.weight, block.outer, run.outer_stride), block.outer_ld}, block.out,
                     taps, block.hidden),
          block.hidden};
    }
    const auto& [kernels, inner_matrix, product_matrix] = unfolded;
    const Matrix gradients{product_matrix, width};
    schedule.add(level, unfold(gradient, {product_matrix, taps * width}, block.out, block.in,
                               product.plan.taps, meeting, tiled ? inner_taps : 1));
    const bool is_moved = inner_taps > 1 && !tiled;
    const Matrix inner_sums =
        is_moved ? Matrix{planning_.allocate(block.hidden * width), width} : inner_gradient;
    int done = gemm(schedule, level + 1, kernels.transpose(), gradients, inner_sums, block.hidden,
                    width, rows);
    if (is_moved) {
      schedule.add(done++, channels_first(inner_sums.ref, inner_gradient, block.hidden, inner_taps,
                                          block.in));
    }
    raise(inner.gradient_ready, done);
    if (outer_is_direct) continue;
    if (tiled) {
      done = planning_.multiply(schedule, level + 1,
                                {.m = narrow(rows),
                                 .n = narrow(block.hidden),
                                 .k = narrow(width),
                                 .m_inner_extent = narrow(taps),
                                 .a = product_matrix,
                                 .b = inner_matrix.ref,
                                 .c = outer_gradient.ref,
                                 .a_m = stride(taps * width, width),
                                 .a_k = stride(1),
                                 .b_k = stride(1),
                                 .c_m = stride(block.outer_ld, 1),
                                 .b_n = narrow(inner_matrix.ld),
                                 .c_n = narrow(taps),
                                 .first_tap = Job::identity_tap,
                                 .b_is_n_major = false,
                                 .epilogue = added});
      raise(outer.gradient_ready, done);
      continue;
    }
    const Matrix sums{planning_.allocate(rows * block.hidden), block.hidden};
    done = gemm(schedule, level + 1, gradients, inner_matrix.transpose(), sums, rows, block.hidden,
                width);
    Job last = channels_first(sums.ref, outer_gradient, block.out, taps, block.hidden);
    last.epilogue = added;
    schedule.add(done, last);
    raise(outer.gradient_ready, done + 1);
  }
}

/// db1[m] = sum over o and b of W2[o][m][b] db[o].
inline int FormPlanner::inner_bias(const PlannedProduct& product, int level) {
  const PlannedValue &outer = values_[product.outer], &inner = values_[product.inner],
                     &result = values_[product.result];
  Schedule& schedule = planning_.backward;
  const Index groups = outer.shape.groups, out = outer.shape.out / groups,
              in = outer.shape.in / groups, taps = product.outer_taps();
  return planning_.multiply(schedule, level,
                            {.groups = narrow(groups),
                             .m = narrow(in),
                             .k = narrow(out * taps),
                             .k_inner_extent = narrow(taps),
                             .a = shifted(outer.weight, 0, out * in * taps),
                             .b = shifted(result.bias_gradient, 0, out),
                             .c = shifted(inner.bias_gradient, 0, in),
                             .a_m = stride(taps),
                             .a_k = channels_and_taps(taps, in * taps),
                             .b_k = stride(1),
                             .c_m = stride(1),
                             .first_tap = Job::identity_tap});
}

}  // namespace concertina::cuda::detail
