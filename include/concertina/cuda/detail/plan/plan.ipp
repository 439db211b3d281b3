// How a plan is made: each form's jobs, and where all tensors lie.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/cuda/detail/plan/form_planner.ipp>
#include <concertina/cuda/plan.hpp>

#include <limits>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace concertina::cuda {

inline ContractionPlan::ContractionPlan(std::span<const PlannedForm> forms,
                                        const PlanOptions& wanted)
    : options_(wanted) {
  if (options_.math == Math::prime_field) options_.least_gemm = std::numeric_limits<Index>::max();
  const PlanOptions& options = options_;
  using Role = TensorUse::Role;
  using concertina::detail::AnyShape;
  const auto require = [](bool holds, const char* option, Index value) {
    if (holds) return;
    throw SizeError(std::string("PlanOptions::") + option + " " + std::to_string(value) +
                    "; it starts at 1");
  };
  require(options.least_unfolded > 0, "least_unfolded", options.least_unfolded);
  require(options.least_bf16x6 > 0, "least_bf16x6", options.least_bf16x6);
  require(options.least_bf16x6_terms > 0, "least_bf16x6_terms", options.least_bf16x6_terms);
  require(options.least_gemm > 0, "least_gemm", options.least_gemm);
  require(options.wanted_tiles > 0, "wanted_tiles", options.wanted_tiles);
  require(options.least_split > 0, "least_split", options.least_split);
  int layers = 0;
  for (const PlannedForm& form : forms) {
    form.tree().for_each_leaf([&](const AnyShape&) { ++layers; });
  }
  const int form_count = static_cast<int>(forms.size());
  const int count = (options.gradient ? 4 : 2) * (layers + form_count);
  if (count > most_tensors) {
    throw SizeError("a plan of " + std::to_string(count) + " tensors, where " +
                    std::to_string(most_tensors) +
                    " are possible; plan parts of the network on their own");
  }
  std::vector<TensorUse> results, result_gradients, layer_gradients;
  struct Planned {
    concertina::detail::Program program;
    std::vector<detail::PlannedValue> layers;
    detail::PlannedValue result;
  };
  std::vector<Planned> planned;
  int index = 0, first_layer = 0;
  for (const PlannedForm& form : forms) {
    const AnyShape contracted = form.contracted();
    const auto use = [&](Role role, int layer, const AnyShape& shape, std::vector<TensorUse>& to) {
      detail::require_int_offsets(shape);
      for (const bool bias : {false, true}) {
        const Index size = !bias ? weight_numel(shape) : shape.bias ? shape.out : 0;
        to.push_back({role, index, layer, bias, size, to_string(shape)});
      }
    };
    const auto value = [&](const AnyShape& shape, int at, int gradient_at) {
      return detail::PlannedValue{
          shape, {2 * at}, {2 * at + 1}, {2 * gradient_at}, {2 * gradient_at + 1}};
    };
    concertina::detail::Program program(
        form.tree(), [&](const AnyShape& outer, const AnyShape& inner, const AnyShape& product) {
          return detail::device_cost(options, outer, inner, product);
        });
    std::vector<detail::PlannedValue> values;
    for (const AnyShape& layer : program.leaves()) {
      const int at = static_cast<int>(values.size());
      use(Role::layer, at, layer, tensors_);
      use(Role::layer_gradient, at, layer, layer_gradients);
      values.push_back(value(layer, first_layer + at, layers + 2 * form_count + first_layer + at));
    }
    first_layer += static_cast<int>(values.size());
    use(Role::result, 0, contracted, results);
    use(Role::result_gradient, 0, contracted, result_gradients);
    planned.push_back({std::move(program), std::move(values),
                       value(contracted, layers + index, layers + form_count + index)});
    ++index;
  }
  if (!options.gradient) {
    result_gradients.clear();
    layer_gradients.clear();
  }
  for (const auto* more : {&results, &result_gradients, &layer_gradients}) {
    tensors_.insert(tensors_.end(), more->begin(), more->end());
  }
  const auto plan = [&](const detail::Planning* earlier) {
    detail::Planning planning(options, earlier);
    for (std::size_t f = 0; f < planned.size(); ++f) {
      planning.forward.form = planning.backward.form = static_cast<int>(f);
      const auto& [program, values, result] = planned[f];
      detail::FormPlanner(planning, program, values, result).plan();
    }
    return planning;
  };
  // What is beside a job is known once all are planned; what then is not split moves others.
  detail::Planning planning = plan(nullptr);
  for (int again = 0; again < 2; ++again) planning = plan(&planning);
  planning.forward.finish();
  planning.backward.finish();
  forward_ = std::move(planning.forward.sequence);
  backward_ = std::move(planning.backward.sequence);
  workspace_ = planning.workspace;
}

}  // namespace concertina::cuda
