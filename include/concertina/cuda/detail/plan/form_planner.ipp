// The jobs of each instruction of a form's program, and of its gradient.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/cuda/detail/plan/schedule.ipp>
#include <concertina/detail/branch_place.hpp>
#include <concertina/detail/program.hpp>

#include <cstddef>
#include <limits>
#include <map>
#include <optional>
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
inline double device_cost(const PlanOptions& options, const AnyShape& outer, const AnyShape& inner,
                          const AnyShape& product) {
  const auto elements = [](const AnyShape& shape) {
    return static_cast<double>(weight_numel(shape));
  };
  const Index work = concertina::detail::multiply_adds(outer, inner);
  const double result = elements(product);
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

  /// Channels so far apart, and their neighbouring taps, as one mode.
  static TwoModeStride channels_and_taps(Index taps, Index channel_stride) {
    return taps == 1 ? stride(channel_stride) : stride(channel_stride, 1);
  }

  // depthwise_chain.ipp
  struct DepthwiseChain {
    Value outer, middle, inner;
  };
  std::optional<DepthwiseChain> depthwise_chain() const;
  void plan_depthwise_chain(const DepthwiseChain& chain);
  static void add_depthwise_chain(Schedule& schedule, const Job& job);

  // sums.ipp
  std::vector<BranchPlace> places_of(const Instruction& instruction) const;
  static Branch entry(const TensorRef& weight, const BranchPlace& place);
  void add_branches(const Instruction& instruction, PlannedValue& result);
  void take_branches(const Instruction& instruction, const PlannedValue& result);

  // unfolding.ipp
  bool is_unfolded(const PlannedProduct& product, const BlockRun& run) const;
  bool is_tiled(const PlannedProduct& product, const BlockRun& run) const;
  bool is_gradient_unfolded(const PlannedProduct& product, const BlockRun& run) const;
  static int unfolded_taps(Schedule& schedule, const PlannedProduct& product,
                           const DenseBlock& block, bool tiled);
  static int strided_taps(Schedule& schedule, Index taps, Index stride);
  static Job fold(const Matrix& from, const Matrix& to, Index rows, Index channels, Index taps,
                  int first_tap, Index channel_stride = 1);
  static Job unfold(const Matrix& from, const Matrix& to, Index rows, Index channels, Index taps,
                    int first_tap, Index channel_stride = 1);
  TensorRef taps_first(Schedule& schedule, int level, const Matrix& kernels, Index rows, Index taps,
                       Index channels);
  Job channels_first(const TensorRef& from, const Matrix& kernels, Index rows, Index taps,
                     Index channels);
  int gemm(Schedule& schedule, int level, Matrix a, Matrix b, const Matrix& c, Index m, Index n,
           Index k, const Epilogue& epilogue = {});

  // forward.ipp
  void multiply(PlannedProduct& product);
  int multiply_taps(const PlannedProduct& product, const BlockRun& run, int level);
  int multiply_unfolded(PlannedProduct& product, std::size_t r, int level);
  int multiply_bias(const PlannedProduct& product, int level);

  // backward.ipp
  void differentiate(const PlannedProduct& product);
  int outer_gradient(const PlannedProduct& product, const BlockRun& run, int level,
                     const Epilogue& epilogue);
  int inner_gradient(const PlannedProduct& product, const BlockRun& run, int level);
  void differentiate_unfolded(const PlannedProduct& product, std::size_t r, int level,
                              const Epilogue& epilogue);
  int inner_bias(const PlannedProduct& product, int level);

  Planning& planning_;
  const concertina::detail::Program& program_;
  std::vector<PlannedValue> values_;
  PlannedValue result_;
  std::vector<std::optional<PlannedProduct>> products_;  // of each instruction that is one
};

}  // namespace concertina::cuda::detail

#include <concertina/cuda/detail/plan/backward.ipp>
#include <concertina/cuda/detail/plan/depthwise_chain.ipp>
#include <concertina/cuda/detail/plan/forward.ipp>
#include <concertina/cuda/detail/plan/sums.ipp>
#include <concertina/cuda/detail/plan/unfolding.ipp>
