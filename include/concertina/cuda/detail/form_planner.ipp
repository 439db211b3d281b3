// The jobs of each instruction of a form's program, and of its gradient.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/cuda/detail/schedule.ipp>
#include <concertina/detail/branch_place.hpp>
#include <concertina/detail/program.hpp>

#include <algorithm>
#include <array>
#include <cstddef>
#include <limits>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace concertina::cuda::detail {

using concertina::detail::AnyShape, concertina::detail::BranchPlace, concertina::detail::DenseBlock,
    concertina::detail::Instruction, concertina::detail::ProductPlan, concertina::detail::Value;

/// What the planners of all forms share.
struct Planning {
  /// `earlier` planned the same.
  explicit Planning(const PlanOptions& with, const Planning* earlier = nullptr)
      : options(with),
        forward(with, earlier ? earlier->forward.deadlines() : Schedule::Deadlines()),
        backward(with, earlier ? earlier->backward.deadlines() : Schedule::Deadlines()) {}

  PlanOptions options;
  Schedule forward, backward;
  Index workspace = 0;

  TensorRef allocate(Index elements) {
    constexpr Index alignment = tuning::workspace_alignment;
    const Offset at = workspace;
    workspace = concertina::detail::checked_add(
        workspace, (elements + alignment - 1) / alignment * alignment, "the workspace");
    return {.tensor = TensorRef::workspace, .offset = at};
  }

  int multiply(Schedule& schedule, int level, const Job& job) {
    return schedule.add_product(level, job,
                                [&](Index elements) { return allocate(elements).offset; });
  }
};

/// Blocks of a product that are alike and equally far apart, and the channels at which they start.
struct BlockRun {
  DenseBlock first;
  Index out = 0, hidden = 0;  ///< first channels
  int count = 1;
  Index outer_stride = 0, inner_stride = 0, result_stride = 0, out_stride = 0, hidden_stride = 0;
};

inline std::vector<BlockRun> block_runs(const ProductPlan& plan) {
  std::vector<BlockRun> runs;
  for (const DenseBlock& block : plan.blocks) {
    const Index out = block.outer / block.outer_ld, hidden = block.inner / block.inner_ld;
    if (!runs.empty()) {
      BlockRun& run = runs.back();
      const DenseBlock& first = run.first;
      const bool alike =
          block.out == first.out && block.hidden == first.hidden && block.in == first.in;
      const auto continues = [&](Index now, Index start, Index& stride) {
        if (run.count == 1) stride = now - start;
        return now == start + run.count * stride;
      };
      if (alike && continues(block.outer, first.outer, run.outer_stride) &&
          continues(block.inner, first.inner, run.inner_stride) &&
          continues(block.result, first.result, run.result_stride) &&
          continues(out, run.out, run.out_stride) &&
          continues(hidden, run.hidden, run.hidden_stride)) {
        ++run.count;
        continue;
      }
      if (run.count == 1) {
        run.outer_stride = run.inner_stride = run.result_stride = run.out_stride =
            run.hidden_stride = 0;
      }
    }
    runs.push_back({.first = block, .out = out, .hidden = hidden});
  }
  return runs;
}

/// Time of a product in multiply-adds, where it is unfolded with that of moving elements.
inline double device_cost(const PlanOptions& options, const AnyShape& outer,
                          const AnyShape& inner) {
  const auto elements = [](const AnyShape& shape) {
    return static_cast<double>(weight_numel(shape));
  };
  const Index work = concertina::detail::multiply_adds(outer, inner);
  const double result = elements(concertina::detail::product_shape(outer, inner));
  double moved = 0;  // read and written
  const Index inner_taps = numel(inner.kernel_size);
  if (numel(outer.kernel_size) > 1 && inner_taps > 1 &&
      work / outer.groups >= options.least_unfolded) {
    const Index rows = outer.out * numel(outer.kernel_size),
                columns = inner.in / inner.groups * inner_taps;
    moved = 2 * (elements(outer) + static_cast<double>(rows) * static_cast<double>(columns) +
                 elements(inner));
  }
  return static_cast<double>(work) +
         tuning::multiply_adds_per_element * (elements(outer) + elements(inner) + result + moved);
}

/// A value of a form's program: where its elements and those of its gradient are, and from which
/// level on.
struct PlannedValue {
  AnyShape shape;
  TensorRef weight = {}, bias = {}, weight_gradient = {}, bias_gradient = {};
  int ready = 0, gradient_ready = 0;
};

inline void require_int_offsets(const AnyShape& shape) {
  if (weight_numel(shape) <= std::numeric_limits<int>::max()) return;
  throw SizeError("a tensor of " + std::to_string(weight_numel(shape)) +
                  " elements, where a plan for a device takes less than 2^31 (" + to_string(shape) +
                  ")");
}

/// Plans one form.
class FormPlanner {
 public:
  /// `layers` are the program's leaves.
  FormPlanner(Planning& planning, const concertina::detail::Program& program,
              std::vector<PlannedValue> layers, const PlannedValue& result)
      : planning_(planning), program_(program), values_(std::move(layers)), result_(result) {}

  void plan() {
    const auto instructions = program_.instructions();
    if (instructions.empty()) return plan_copy();
    if (const auto chain = depthwise_chain()) return plan_depthwise_chain(*chain);
    for (const Instruction& instruction : instructions) {
      add_value(instruction.shape);
      if (instruction.join == Join::chain) {
        products_.push_back(PlannedProduct(program_, instruction, values_.size() - 1));
        multiply(*products_.back());
      } else {
        products_.emplace_back();
        add_branches(instruction, values_.back());
      }
    }
    if (!planning_.options.gradient) return;
    for (std::size_t i = instructions.size(); i-- > 0;) {
      if (products_[i]) {
        differentiate(*products_[i]);
      } else {
        take_branches(instructions[i], values_[program_.leaves().size() + i]);
      }
    }
  }

 private:
  struct Matrix {
    TensorRef ref;
    Offset ld;
    bool transposed = false;

    Matrix transpose() const { return {ref, ld, !transposed}; }
  };
  /// A product's weights, rows (o, b) and columns m, rows m and columns (a, c), and the matrix of
  /// its elements before they are added up, rows (o, b) and columns (a, c); later of its
  /// gradient's. Columns are (c, a), as they are stored, where our own tiles compute it.
  struct Unfolded {
    Matrix outer, inner;
    TensorRef product;
  };
  struct PlannedProduct {
    PlannedProduct(const concertina::detail::Program& program, const Instruction& instruction,
                   Value value)
        : plan(program.shape(instruction.outer()), program.shape(instruction.inner()),
               concertina::detail::Algorithm::direct),
          runs(block_runs(plan)),
          outer(instruction.outer()),
          inner(instruction.inner()),
          result(value) {}

    ProductPlan plan;
    std::vector<BlockRun> runs;
    Value outer, inner, result;
    std::map<std::pair<std::size_t, int>, Unfolded> unfolded = {};  // of each run and group

    Index outer_taps() const { return plan.outer_count(); }
    Index inner_taps() const { return plan.inner_count(); }
    bool is_pointwise() const { return outer_taps() == 1 || inner_taps() == 1; }
  };

  static int narrow(Index value) { return static_cast<int>(value); }
  static TwoModeStride stride(Index outer, Index inner = 0) {
    return {narrow(outer), narrow(inner)};
  }

  static TensorRef shifted(TensorRef ref, Index offset, Index group_stride = 0) {
    ref.offset += offset;
    ref.group_stride = group_stride;
    return ref;
  }
  static Job copy(const TensorRef& from, const TensorRef& to, Index elements) {
    return {.kind = Job::Kind::copy, .n = narrow(elements), .a = from, .c = to};
  }

  /// A layer alone is its contraction.
  void plan_copy() {
    const PlannedValue& layer = values_.front();
    const AnyShape& shape = layer.shape;
    const Index elements = weight_numel(shape);
    planning_.forward.add(0, copy(layer.weight, result_.weight, elements));
    if (shape.bias) planning_.forward.add(0, copy(layer.bias, result_.bias, shape.out));
    if (!planning_.options.gradient) return;
    planning_.backward.add(0, copy(result_.weight_gradient, layer.weight_gradient, elements));
    if (!shape.bias) return;
    planning_.backward.add(0, copy(result_.bias_gradient, layer.bias_gradient, shape.out));
  }

  struct DepthwiseChain {
    Value outer, middle, inner;
  };

  /// Three layers of one channel in and out for each group, the outer and inner of one tap: an
  /// element of anything computed from them is so few terms that nothing between need be stored.
  std::optional<DepthwiseChain> depthwise_chain() const {
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
  void plan_depthwise_chain(const DepthwiseChain& chain) {
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
    planning_.backward.sequence.multiply_adds +=
        groups * t * (i * (j + 1) + j * (i + 1) + 2 * i * j);
  }
  static void add_depthwise_chain(Schedule& schedule, const Job& job) {
    Job several = job;
    several.has_several = true;
    schedule.add_best(0, std::array{job, several}, [](Job&) {});
  }

  /// The result of the next instruction.
  void add_value(const AnyShape& shape) {
    require_int_offsets(shape);
    if (values_.size() == program_.result()) return values_.push_back(result_);
    PlannedValue value{.shape = shape};
    const Index elements = weight_numel(shape), biases = shape.bias ? shape.out : 0;
    value.weight = planning_.allocate(elements);
    value.bias = planning_.allocate(biases);
    if (planning_.options.gradient) {
      value.weight_gradient = planning_.allocate(elements);
      value.bias_gradient = planning_.allocate(biases);
    }
    values_.push_back(value);
  }

  /// Whether a product is computed as one matrix product of unfolded kernels: of two kernels of
  /// several taps, where it is not small; with one of a single tap, where it is cuBLAS's.
  bool is_unfolded(const PlannedProduct& product, const BlockRun& run) const {
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
  bool is_tiled(const PlannedProduct& product, const BlockRun& run) const {
    const PlanOptions& options = planning_.options;
    const Index work = product.plan.multiply_adds_of(run.first);
    return !product.is_pointwise() && work < options.least_gemm &&
           (options.math != Math::bf16x6 || work < options.least_bf16x6);
  }
  /// Whether its gradients are; those of a kernel and a 1x1 layer also where they are large.
  bool is_gradient_unfolded(const PlannedProduct& product, const BlockRun& run) const {
    const DenseBlock& block = run.first;
    if (!product.is_pointwise()) return is_unfolded(product, run);
    return is_unfolded(product, run) ||
           product.plan.multiply_adds_of(block) >= planning_.options.least_gemm ||
           (product.inner_taps() == 1 && product.outer_taps() > 1 &&
            planning_.backward.fits_tensor_cores(block.hidden, block.in,
                                                 block.out * product.outer_taps()));
  }

  // ---- sums and concatenations -----------------------------------------------------------------

  std::vector<BranchPlace> places_of(const Instruction& instruction) const {
    return concertina::detail::branch_places(instruction.join, instruction.shape,
                                             program_.shapes_of(instruction.operands));
  }

  /// The entry of the device's table.
  static Branch entry(const TensorRef& weight, const BranchPlace& place) {
    const AnyShape &shape = place.branch(), &whole = place.whole();
    return {.tensor = weight,
            .first_m = narrow(place.first_out()),
            .m = narrow(shape.out),
            .group_m = narrow(shape.out / shape.groups),
            .first_n = narrow(place.first_in()),
            .n = narrow(shape.in / shape.groups),
            .whole_n = narrow(whole.in / whole.groups),
            .taps = narrow(numel(shape.kernel_size))};
  }

  void add_branches(const Instruction& instruction, PlannedValue& result) {
    Schedule& schedule = planning_.forward;
    const AnyShape& whole = instruction.shape;
    const std::vector<Value>& branches = instruction.operands;
    const std::vector<BranchPlace> places = places_of(instruction);
    int level = 0;
    for (const Value branch : branches) level = std::max(level, values_[branch].ready);
    std::vector<std::vector<TapPair>> reaching(
        static_cast<std::size_t>(numel(whole.kernel_size)));  // each tap of the whole
    for (std::size_t b = 0; b < branches.size(); ++b) {
      const std::vector<Index>& taps = places[b].taps();
      for (std::size_t t = 0; t < taps.size(); ++t) {
        reaching[static_cast<std::size_t>(taps[t])].push_back(
            {static_cast<int>(b), static_cast<int>(t)});
      }
    }
    schedule.add(level, Job{.kind = Job::Kind::add_branches,
                            .taps = static_cast<int>(reaching.size()),
                            .m = narrow(whole.out),
                            .n = narrow(whole.in / whole.groups),
                            .c = result.weight,
                            .first_tap = schedule.next_tap(),
                            .first_branch = schedule.next_branch()});
    for (std::size_t t = 0; t < reaching.size(); ++t) {
      schedule.add_tap(static_cast<int>(t), reaching[t]);
    }
    for (std::size_t b = 0; b < branches.size(); ++b) {
      schedule.add_branch(entry(values_[branches[b]].weight, places[b]));
    }
    result.ready = level + 1;
    if (!whole.bias) return;

    std::vector<TapPair> biased;
    const int first_branch = schedule.next_branch();
    for (std::size_t b = 0; b < branches.size(); ++b) {
      const PlannedValue& value = values_[branches[b]];
      if (!value.shape.bias) continue;
      biased.push_back({static_cast<int>(biased.size()), 0});
      const int out = narrow(value.shape.out);
      schedule.add_branch({.tensor = value.bias,
                           .first_m = narrow(places[b].first_out()),
                           .m = out,
                           .group_m = out,
                           .n = 1,
                           .whole_n = 1});
    }
    schedule.add(level, Job{.kind = Job::Kind::add_branches,
                            .m = narrow(whole.out),
                            .c = result.bias,
                            .first_tap = schedule.next_tap(),
                            .first_branch = first_branch});
    schedule.add_tap(0, biased);
  }

  void take_branches(const Instruction& instruction, const PlannedValue& result) {
    Schedule& schedule = planning_.backward;
    const AnyShape& whole = instruction.shape;
    const Index taps = numel(whole.kernel_size);
    const int level = result.gradient_ready;
    const std::vector<BranchPlace> places = places_of(instruction);
    for (std::size_t b = 0; b < places.size(); ++b) {
      const BranchPlace& place = places[b];
      PlannedValue& value = values_[instruction.operands[b]];
      const AnyShape& shape = value.shape;
      schedule.add(level, Job{.kind = Job::Kind::take_branch,
                              .taps = static_cast<int>(place.taps().size()),
                              .m = narrow(shape.out),
                              .n = narrow(shape.in / shape.groups),
                              .a = result.weight_gradient,
                              .c = value.weight_gradient,
                              .a_m = stride(whole.in / whole.groups * taps),
                              .a_n = narrow(taps),
                              .first_tap = schedule.next_tap(),
                              .first_branch = schedule.next_branch()});
      for (const Index tap : place.taps()) schedule.add_tap(narrow(tap), {});
      schedule.add_branch(entry(value.weight, place));
      if (shape.bias) {
        schedule.add(level, copy(shifted(result.bias_gradient, place.first_out()),
                                 value.bias_gradient, shape.out));
      }
      value.gradient_ready = level + 1;
    }
  }

  // ---- products, forward -----------------------------------------------------------------------

  void multiply(PlannedProduct& product) {
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
  int multiply_taps(const PlannedProduct& product, const BlockRun& run, int level) {
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

  /// For each tap of the product the pairs that meet there, as pair(b, a) has them.
  template <class Pair>
  static int result_taps(Schedule& schedule, const PlannedProduct& product, Pair&& pair) {
    std::vector<std::vector<TapPair>> meeting(static_cast<std::size_t>(product.plan.taps));
    for (Index b = 0; b < product.outer_taps(); ++b) {
      for (Index a = 0; a < product.inner_taps(); ++a) {
        meeting[static_cast<std::size_t>(meeting_tap(product.plan, b, a))].push_back(pair(b, a));
      }
    }
    const int first = schedule.next_tap();
    for (std::size_t t = 0; t < meeting.size(); ++t) {
      schedule.add_tap(static_cast<int>(t), meeting[t]);
    }
    return first;
  }
  static Index meeting_tap(const ProductPlan& plan, Index b, Index a) {
    return plan.outer_taps[static_cast<std::size_t>(b)] +
           plan.inner_taps[static_cast<std::size_t>(a)];
  }

  /// W2 [(o, b)][m] times W1 [m][(a, c)] is one matrix product, and folding adds up its elements
  /// where taps (b, a) meet. Where it needs that, taps are moved from between the channels first.
  int multiply_unfolded(PlannedProduct& product, std::size_t r, int level) {
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
        schedule.add(done,
                     fold({sums, taps * width}, {result, block.result_ld}, block.out, block.in,
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

  /// The product's taps in the unfolded matrix, rows (o, b) and columns (a, c), or (c, a).
  static int unfolded_taps(Schedule& schedule, const PlannedProduct& product,
                           const DenseBlock& block, bool tiled) {
    const Index width = block.in * product.inner_taps();
    return result_taps(schedule, product, [&](Index b, Index a) {
      return TapPair{narrow(b * width + a * (tiled ? 1 : block.in))};
    });
  }
  /// Taps so far apart.
  static int strided_taps(Schedule& schedule, Index taps, Index stride) {
    const int first = schedule.next_tap();
    for (Index t = 0; t < taps; ++t) schedule.add_tap(narrow(t), {TapPair{narrow(t * stride)}});
    return first;
  }

  /// [row][channel][tap] from rows of an unfolded matrix, whose channels are so far apart and where
  /// each tap has the sum of its pairs.
  static Job fold(const Matrix& from, const Matrix& to, Index rows, Index channels, Index taps,
                  int first_tap, Index channel_stride = 1) {
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
  static Job unfold(const Matrix& from, const Matrix& to, Index rows, Index channels, Index taps,
                    int first_tap, Index channel_stride = 1) {
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
  TensorRef taps_first(Schedule& schedule, int level, const Matrix& kernels, Index rows, Index taps,
                       Index channels) {
    const TensorRef to = planning_.allocate(rows * taps * channels);
    schedule.add(level, unfold(kernels, {to, taps * channels}, rows, channels, taps,
                               strided_taps(schedule, taps, channels)));
    return to;
  }
  /// The other way round, of a gradient.
  Job channels_first(const TensorRef& from, const Matrix& kernels, Index rows, Index taps,
                     Index channels) {
    return fold({from, taps * channels}, kernels, rows, channels, taps,
                strided_taps(planning_.backward, taps, channels));
  }

  /// C = A B; returns the level from which on it can be read. Where tensors are stored narrower
  /// than sums, cuBLAS reads copies and writes one; the epilogue, which needs a rank-one update, is
  /// added as C is moved.
  int gemm(Schedule& schedule, int level, Matrix a, Matrix b, const Matrix& c, Index m, Index n,
           Index k, const Epilogue& epilogue = {}) {
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

  /// b2 + (sum over the taps of W2) b1, for each group of the outer layer.
  int multiply_bias(const PlannedProduct& product, int level) {
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

  /// Channels so far apart, and their neighbouring taps, as one mode.
  static TwoModeStride channels_and_taps(Index taps, Index channel_stride) {
    return taps == 1 ? stride(channel_stride) : stride(channel_stride, 1);
  }

  // ---- products, backward ----------------------------------------------------------------------

  void differentiate(const PlannedProduct& product) {
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
  int outer_gradient(const PlannedProduct& product, const BlockRun& run, int level,
                     const Epilogue& epilogue) {
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
  int inner_gradient(const PlannedProduct& product, const BlockRun& run, int level) {
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
  void differentiate_unfolded(const PlannedProduct& product, std::size_t r, int level,
                              const Epilogue& epilogue) {
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
        schedule.add(done++, channels_first(inner_sums.ref, inner_gradient, block.hidden,
                                            inner_taps, block.in));
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
      done = gemm(schedule, level + 1, gradients, inner_matrix.transpose(), sums, rows,
                  block.hidden, width);
      Job last = channels_first(sums.ref, outer_gradient, block.out, taps, block.hidden);
      last.epilogue = added;
      schedule.add(done, last);
      raise(outer.gradient_ready, done + 1);
    }
  }

  /// db1[m] = sum over o and b of W2[o][m][b] db[o].
  int inner_bias(const PlannedProduct& product, int level) {
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

  Planning& planning_;
  const concertina::detail::Program& program_;
  std::vector<PlannedValue> values_;
  PlannedValue result_;
  std::vector<std::optional<PlannedProduct>> products_;  // of each instruction that is one
};

}  // namespace concertina::cuda::detail
