// Products as one matrix product of unfolded kernels: which of them, and the jobs that move taps.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/cuda/detail/plan/form_planner.ipp>

#include <utility>

namespace concertina::cuda::detail {

/// Whether a product is computed as one matrix product of unfolded kernels: of two kernels of
/// several taps, where it is not small; with one of a single tap, where it is cuBLAS's.
inline bool FormPlanner::is_unfolded(const PlannedProduct& product, const BlockRun& run) const {
  const DenseBlock& block = run.first;
  const Index outer_taps = product.outer_taps(), inner_taps = product.inner_taps(),
              work = product.plan.multiply_adds_of(block);
  if (!product.is_pointwise()) {
    return work >= planning_.options.least_unfolded &&
           block.out * block.in * outer_taps * inner_taps <= tuning::most_unfolded;
  }
  return work >= planning_.options.least_gemm &&
         !planning_.forward.fits_tensor_cores(block.out * outer_taps, block.in * inner_taps,
                                              block.hidden);
}

/// Whether our own tiles compute an unfolded product and its gradients. They take the kernels'
/// taps from between the channels, others need them moved before.
inline bool FormPlanner::is_tiled(const PlannedProduct& product, const BlockRun& run) const {
  const PlanOptions& options = planning_.options;
  const Index work = product.plan.multiply_adds_of(run.first);
  return !product.is_pointwise() && work < options.least_gemm &&
         (options.math != Math::bf16x6 || work < options.least_bf16x6);
}

/// Whether its gradients are; those of a kernel and a 1x1 layer also where they are large.
inline bool FormPlanner::is_gradient_unfolded(const PlannedProduct& product,
                                              const BlockRun& run) const {
  const DenseBlock& block = run.first;
  if (!product.is_pointwise()) return is_unfolded(product, run);
  return is_unfolded(product, run) ||
         product.plan.multiply_adds_of(block) >= planning_.options.least_gemm ||
         (product.inner_taps() == 1 && product.outer_taps() > 1 &&
          planning_.backward.fits_tensor_cores(block.hidden, block.in,
                                               block.out * product.outer_taps()));
}

/// The product's taps in the unfolded matrix, rows (o, b) and columns (a, c), or (c, a).
inline int FormPlanner::unfolded_taps(Schedule& schedule, const PlannedProduct& product,
                                      const DenseBlock& block, bool tiled) {
  const Index width = block.in * product.inner_taps();
  return result_taps(schedule, product, [&](Index b, Index a) {
    return TapPair{narrow(b * width + a * (tiled ? 1 : block.in))};
  });
}

/// Taps so far apart.
inline int FormPlanner::strided_taps(Schedule& schedule, Index taps, Index stride) {
  const int first = schedule.next_tap();
  for (Index t = 0; t < taps; ++t) schedule.add_tap(narrow(t), {TapPair{narrow(t * stride)}});
  return first;
}

/// [row][channel][tap] from rows of an unfolded matrix, whose channels are so far apart and where
/// each tap has the sum of its pairs.
inline Job FormPlanner::fold(const Matrix& from, const Matrix& to, Index rows, Index channels,
                             Index taps, int first_tap, Index channel_stride) {
  return {.kind = Job::Kind::fold,
          .taps = narrow(taps),
          .m = narrow(rows),
          .n = narrow(channels),
          .a = from.ref,
          .c = to.ref,
          .a_m = stride(from.ld),
          .c_m = stride(to.ld),
          .c_n = narrow(taps),
          .a_n = narrow(channel_stride),
          .first_tap = first_tap};
}

/// The other way round: each of a tap's pairs has its element.
inline Job FormPlanner::unfold(const Matrix& from, const Matrix& to, Index rows, Index channels,
                               Index taps, int first_tap, Index channel_stride) {
  return {.kind = Job::Kind::unfold,
          .taps = narrow(taps),
          .m = narrow(rows),
          .n = narrow(channels),
          .a = from.ref,
          .c = to.ref,
          .a_m = stride(from.ld),
          .c_m = stride(to.ld),
          .c_n = narrow(channel_stride),
          .a_n = narrow(taps),
          .first_tap = first_tap};
}

/// A layer's kernels [row][channel][tap] as [row][tap][channel], in the workspace.
inline TensorRef FormPlanner::taps_first(Schedule& schedule, int level, const Matrix& kernels,
                                         Index rows, Index taps, Index channels) {
  const TensorRef to = planning_.allocate(rows * taps * channels);
  schedule.add(level, unfold(kernels, {to, taps * channels}, rows, channels, taps,
                             strided_taps(schedule, taps, channels)));
  return to;
}

/// The other way round, of a gradient.
inline Job FormPlanner::channels_first(const TensorRef& from, const Matrix& kernels, Index rows,
                                       Index taps, Index channels) {
  return fold({from, taps * channels}, kernels, rows, channels, taps,
              strided_taps(planning_.backward, taps, channels));
}

/// C = A B; returns the level from which on it can be read. Where tensors are stored narrower
/// than sums, cuBLAS reads copies and writes one; the epilogue, which needs a rank-one update, is
/// added as C is moved.
inline int FormPlanner::gemm(Schedule& schedule, int level, Matrix a, Matrix b, const Matrix& c,
                             Index m, Index n, Index k, const Epilogue& epilogue) {
  if (schedule.fits_tensor_cores(m, n, k) || m * n * k < planning_.options.least_gemm) {
    return planning_.multiply(schedule, level,
                              {.m = narrow(m),
                               .n = narrow(n),
                               .k = narrow(k),
                               .a = a.ref,
                               .b = b.ref,
                               .c = c.ref,
                               .a_m = stride(a.transposed ? 1 : a.ld),
                               .a_k = stride(a.transposed ? a.ld : 1),
                               .b_k = stride(b.transposed ? 1 : b.ld),
                               .c_m = stride(c.ld),
                               .b_n = narrow(b.transposed ? b.ld : 1),
                               .c_n = 1,
                               .first_tap = Job::identity_tap,
                               .a_is_k_major = !a.transposed,
                               .b_is_n_major = !b.transposed,
                               .epilogue = epilogue});
  }
  const auto move = [](const Matrix& from, const Matrix& to, Index rows, Index columns) {
    return fold(from, to, rows, columns, 1, Job::identity_tap);
  };
  const auto is_stored = [&](const Matrix& matrix) {
    return planning_.options.mixed && matrix.ref.tensor != TensorRef::workspace;
  };
  int start = level;
  const auto widen = [&](Matrix& matrix, Index rows, Index columns) {
    if (!is_stored(matrix)) return;
    if (matrix.transposed) std::swap(rows, columns);  // as it is stored
    const Matrix copied{planning_.allocate(rows * columns), columns, matrix.transposed};
    schedule.add(level, move(matrix, copied, rows, columns));
    matrix = copied;
    start = level + 1;
  };
  widen(a, m, k);
  widen(b, k, n);
  const bool moves = is_stored(c) || epilogue.u.exists();
  const Matrix sums = moves ? Matrix{planning_.allocate(m * n), n} : c;
  schedule.add(start, Gemm{.a = a.ref,
                           .b = b.ref,
                           .c = sums.ref,
                           .m = narrow(m),
                           .n = narrow(n),
                           .k = narrow(k),
                           .lda = a.ld,
                           .ldb = b.ld,
                           .ldc = sums.ld,
                           .transpose_a = a.transposed,
                           .transpose_b = b.transposed});
  if (!moves) return start + 1;
  Job last = move(sums, c, m, n);
  last.epilogue = epilogue;
  schedule.add(start + 1, last);
  return start + 2;
}

}  // namespace concertina::cuda::detail
