// The one job of a depthwise chain, and those of its gradient.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/cuda/detail/plan/form_planner.ipp>

#include <array>
#include <optional>

namespace concertina::cuda::detail {

/// Three layers of one channel in and out for each group, the outer and inner of one tap: an
/// element of anything computed from them is so few terms that nothing between need be stored.
inline std::optional<FormPlanner::DepthwiseChain> FormPlanner::depthwise_chain() const {
  const auto instructions = program_.instructions();
  if (instructions.size() != 2 || instructions[0].join != Join::chain ||
      instructions[1].join != Join::chain) {
    return std::nullopt;
  }
  const Instruction &first = instructions[0], &last = instructions[1];
  const DepthwiseChain chain = last.inner() == values_.size()
                                   ? DepthwiseChain{last.outer(), first.outer(), first.inner()}
                                   : DepthwiseChain{first.outer(), first.inner(), last.inner()};
  const AnyShape &outer = values_[chain.outer].shape, &middle = values_[chain.middle].shape,
                 &inner = values_[chain.inner].shape;
  const Index groups = outer.out;
  const bool fits = outer.groups == groups && middle.groups == groups && inner.groups == groups &&
                    inner.in == groups && numel(outer.kernel_size) == 1 &&
                    numel(inner.kernel_size) == 1 && !middle.bias && !inner.bias &&
                    weight_numel(middle) / groups <= tuning::most_depthwise_chain_elements;
  return fits ? std::optional(chain) : std::nullopt;
}

/// P[t] = sum over i of W3[i] times the sum over j of W2[i][j][t] W1[j], for each group.
inline void FormPlanner::plan_depthwise_chain(const DepthwiseChain& chain) {
  const PlannedValue &outer = values_[chain.outer], &middle = values_[chain.middle],
                     &inner = values_[chain.inner];
  const AnyShape& shape = middle.shape;
  const Index groups = shape.groups, i = shape.out / groups, j = shape.in / groups,
              t = numel(shape.kernel_size);
  const auto job = [&](Index m, Index n, Index k_outer, Index k_inner) {
    return Job{.kind = Job::Kind::depthwise_chain,
               .groups = narrow(groups),
               .m = narrow(m),
               .n = narrow(n),
               .k = narrow(k_outer * k_inner),
               .k_inner_extent = narrow(k_inner),
               .a_k = stride(1),
               .b_k = stride(0, 1),
               .c_m = stride(n),
               .c_n = 1,
               .first_tap = Job::identity_tap};
  };
  const TensorRef w3 = shifted(outer.weight, 0, i), w2 = shifted(middle.weight, 0, i * j * t),
                  w1 = shifted(inner.weight, 0, j);
  Job product = job(1, t, i, j);
  product.a = w3;
  product.b = w1;
  product.c = shifted(result_.weight, 0, t);
  product.inner = {
      .d = w2, .n_inner_extent = narrow(t), .d_n = stride(0, 1), .d_k = stride(j * t, t)};
  add_depthwise_chain(planning_.forward, product);
  if (outer.shape.bias) planning_.forward.add(0, copy(outer.bias, result_.bias, groups));
  planning_.forward.sequence.multiply_adds += groups * t * i * (j + 1);
  if (!planning_.options.gradient) return;

  const TensorRef gradient = shifted(result_.weight_gradient, 0, t);
  Job of_outer = job(i, 1, t, j);  // dW3[i] = sum of G[t] times the sum of W2[i][j][t] W1[j]
  of_outer.a = gradient;
  of_outer.b = w1;
  of_outer.c = shifted(outer.weight_gradient, 0, i);
  of_outer.inner = {.d = w2, .d_m = narrow(j * t), .d_k = stride(1, t)};
  add_depthwise_chain(planning_.backward, of_outer);
  Job of_inner = job(1, j, t, i);  // dW1[j] = sum of G[t] times the sum of W2[i][j][t] W3[i]
  of_inner.a = gradient;
  of_inner.b = w3;
  of_inner.c = shifted(inner.weight_gradient, 0, j);
  of_inner.inner = {.d = w2, .d_n = stride(t), .d_k = stride(1, j * t)};
  add_depthwise_chain(planning_.backward, of_inner);
  Job of_middle = job(i, j * t, 1, 1);  // dW2[i][j][t] = W3[i] W1[j] G[t]
  of_middle.a = w3;
  of_middle.a_m = stride(1);
  of_middle.b = w1;
  of_middle.b_n = 1;
  of_middle.c = shifted(middle.weight_gradient, 0, i * j * t);
  of_middle.inner = {.d = gradient, .n_inner_extent = narrow(t), .d_n = stride(0, 1)};
  add_depthwise_chain(planning_.backward, of_middle);
  if (outer.shape.bias) {
    planning_.backward.add(0, copy(result_.bias_gradient, outer.bias_gradient, groups));
  }
  planning_.backward.sequence.multiply_adds += groups * t * (i * (j + 1) + j * (i + 1) + 2 * i * j);
}

inline void FormPlanner::add_depthwise_chain(Schedule& schedule, const Job& job) {
  Job several = job;
  several.has_several = true;
  schedule.add_best(0, std::array{job, several}, [](Job&) {});
}

}  // namespace concertina::cuda::detail
