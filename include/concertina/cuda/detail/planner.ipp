// How a plan is made: the jobs of each product and of its gradient, and the order of all.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/cuda/contraction.hpp>
#include <concertina/detail/product/plan.hpp>

#include <algorithm>
#include <cstddef>
#include <limits>
#include <map>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace concertina::cuda {
namespace detail {

/// Jobs and matrix products by levels: those of a level depend on lower ones only.
class Schedule {
 public:
  explicit Schedule(const PlanOptions& options) : options_(options) { identity_tap_ = add_taps(1); }

  Sequence sequence;

  int chain = 0;  ///< of what is added, for messages

  void add(int level, Job job) {
    job.chain = chain;
    at(level).jobs.push_back(job);
  }
  void add(int level, Gemm gemm) {
    gemm.chain = chain;
    at(level).gemms.push_back(gemm);
  }

  /// Taps of the result that no pair reaches are zeros.
  int add_taps(int count) {
    const int first = static_cast<int>(sequence.taps.size());
    if (count == 1) add_tap(0, {TapPair{}});
    return first;
  }
  void add_tap(int result, const std::vector<TapPair>& pairs) {
    const int first = static_cast<int>(sequence.pairs.size());
    sequence.pairs.insert(sequence.pairs.end(), pairs.begin(), pairs.end());
    sequence.taps.push_back({result, first, static_cast<int>(sequence.pairs.size())});
  }
  int next_tap() const { return static_cast<int>(sequence.taps.size()); }
  int identity_tap() const { return identity_tap_; }

  /// A matrix product on our own kernels, split where it has too few tiles. Returns the level from
  /// which on its result can be read. `workspace(numbers)` allocates.
  template <class Allocate>
  int add_product(int level, Job job, Allocate&& workspace) {
    Index terms = 0;
    for (int t = 0; t < job.taps; ++t) {
      const Tap& tap = sequence.taps[static_cast<std::size_t>(job.first_tap + t)];
      terms = std::max<Index>(terms, Index{tap.last_pair - tap.first_pair} * job.inner);
    }
    constexpr int narrow_columns = 16, least_rows = 32, least_terms = 8;
    const bool is_narrow = job.columns > 1 && job.columns <= narrow_columns &&
                           job.rows >= least_rows && terms >= least_terms;
    constexpr int least_side = 8;  // of a matrix that fills tiles halfway well
    const bool is_thin = std::min(job.rows, job.columns) < least_side;
    if (job.inner == 0 || (is_thin && !is_narrow)) {
      job.kind = Job::Kind::reduce;
      // So many lanes that a thread adds some 8 terms, or that threads are as many as the device's.
      constexpr Index each = 8, most_threads = Index{264} * 1024;
      while (job.lanes < contraction_threads && terms > each * job.lanes &&
             job.numbers() * job.lanes < most_threads) {
        job.lanes *= 2;
      }
      add(level, job);
      return level + 1;
    }
    const auto tiles = [&](Job::Kind kind) {
      job.kind = kind;
      return tiles_of(job);
    };
    job.split_inner = std::max(job.inner, 1);
    if (is_narrow) {
      job.kind = Job::Kind::multiply_narrow;
    } else if (tiles(Job::Kind::multiply) < options_.wanted_tiles) {
      job.kind = Job::Kind::multiply_small;
    }
    const int enough = options_.wanted_tiles / std::max(tiles_of(job), 1),
              splits = std::min(enough, job.inner / options_.least_split);
    constexpr int worthwhile = 4;  // a split adds a barrier of the grid, some 2 us, and its sum
    if (splits < worthwhile) {
      add(level, job);
      return level + 1;
    }
    job.split_inner = (job.inner + splits - 1) / splits;
    job.splits = (job.inner + job.split_inner - 1) / job.split_inner;
    Job sum = job;
    sum.kind = Job::Kind::combine;
    sum.left = {.operand = Place::workspace, .offset = workspace(job.splits * job.numbers())};
    job.result = sum.left;
    job.addend = job.factors = job.bias = {};
    add(level, job);
    add(level + 1, sum);
    return level + 2;
  }

  /// Everything in order: each level's jobs in a phase, as many phases in a launch as matrix
  /// products between them allow.
  void finish() {
    bool open = false;  // the last stage is a launch that can have more phases
    for (Level& level : levels_) {
      if (!level.jobs.empty()) {
        Phase phase{static_cast<int>(sequence.jobs.size()), 0, 0};
        for (Job& job : level.jobs) {
          job.first_tile = phase.tiles;
          phase.tiles += tiles_of(job);
          sequence.jobs.push_back(job);
        }
        phase.last_job = static_cast<int>(sequence.jobs.size());
        const int number = static_cast<int>(sequence.phases.size());
        sequence.phases.push_back(phase);
        if (open) {
          sequence.stages.back().last = number + 1;
        } else {
          sequence.stages.push_back({false, number, number + 1});
        }
        open = true;
      }
      for (const Gemm& gemm : level.gemms) {
        const int number = static_cast<int>(sequence.gemms.size());
        sequence.gemms.push_back(gemm);
        sequence.stages.push_back({true, number, number + 1});
        open = false;
      }
    }
    levels_.clear();
  }

 private:
  struct Level {
    std::vector<Job> jobs;
    std::vector<Gemm> gemms;
  };

  Level& at(int level) {
    if (levels_.size() <= static_cast<std::size_t>(level)) {
      levels_.resize(static_cast<std::size_t>(level) + 1);
    }
    return levels_[static_cast<std::size_t>(level)];
  }

  PlanOptions options_;
  std::vector<Level> levels_;
  int identity_tap_ = 0;
};

/// What the planners of all chains share.
struct Planning {
  explicit Planning(const PlanOptions& with) : options(with), forward(with), backward(with) {}

  PlanOptions options;
  Schedule forward, backward;
  Index workspace = 0;

  Place allocate(Index numbers) {
    constexpr Index alignment = 64;
    const Offset at = workspace;
    workspace = concertina::detail::checked_add(
        workspace, (numbers + alignment - 1) / alignment * alignment, "the workspace");
    return {.operand = Place::workspace, .offset = at};
  }

  int multiply(Schedule& schedule, int level, const Job& job) {
    return schedule.add_product(level, job,
                                [&](Index numbers) { return allocate(numbers).offset; });
  }
};

/// Blocks of a product that are alike and equally far apart, and the channels at which they start.
struct BlockRun {
  concertina::detail::Block first;
  Index out = 0, between = 0;  ///< first channels
  int count = 1;
  Index outer_step = 0, inner_step = 0, result_step = 0, out_step = 0, between_step = 0;
};

template <int Rank>
std::vector<BlockRun> block_runs(const concertina::detail::PairPlan<Rank>& pair) {
  using concertina::detail::Block;
  std::vector<BlockRun> runs;
  pair.for_each_block([&](const Block& block) {
    const Index out = block.outer / block.outer_step, between = block.inner / block.inner_step;
    if (!runs.empty()) {
      BlockRun& run = runs.back();
      const Block& first = run.first;
      const bool alike =
          block.out == first.out && block.between == first.between && block.in == first.in;
      const auto continues = [&](Index now, Index start, Index& step) {
        if (run.count == 1) step = now - start;
        return now == start + run.count * step;
      };
      if (alike && continues(block.outer, first.outer, run.outer_step) &&
          continues(block.inner, first.inner, run.inner_step) &&
          continues(block.result, first.result, run.result_step) &&
          continues(out, run.out, run.out_step) &&
          continues(between, run.between, run.between_step)) {
        ++run.count;
        return;
      }
      if (run.count == 1) {
        run.outer_step = run.inner_step = run.result_step = run.out_step = run.between_step = 0;
      }
    }
    runs.push_back({.first = block, .out = out, .between = between});
  });
  return runs;
}

/// Time of a product in multiply-adds: on an H100 a number that comes from or goes to memory takes
/// as long as some 16. For cuBLAS, taps between the channels are moved out of the way and back.
template <int Rank>
double device_cost(const PlanOptions& options, const ConvShape<Rank>& outer,
                   const ConvShape<Rank>& inner) {
  const auto numbers = [](const ConvShape<Rank>& shape) {
    return static_cast<double>(weight_numel(shape));
  };
  const Index work = multiply_adds(outer, inner);
  const double result = numbers(product_shape(outer, inner));
  const bool moves = numel(outer.kernel_size) > 1 && numel(inner.kernel_size) == 1 &&
                     work / outer.groups >= options.least_gemm;
  const double moved = moves ? 2 * (numbers(outer) + result) : 0;
  return static_cast<double>(work) + 16 * (numbers(outer) + numbers(inner) + result + moved);
}

/// Plans one chain.
template <int Rank>
class ChainPlanner {
 public:
  /// A layer or an intermediate: where its numbers and those of its gradient are, and from which
  /// level on.
  struct Value {
    ConvShape<Rank> shape;
    Place weight = {}, bias = {}, weight_gradient = {}, bias_gradient = {};
    int ready = 0, gradient_ready = 0;
  };

  ChainPlanner(Planning& planning, std::vector<Value> layers, Value result)
      : planning_(planning), values_(std::move(layers)), result_(std::move(result)) {}

  void plan() {
    std::vector<ConvShape<Rank>> shapes;
    for (const Value& layer : values_) shapes.push_back(layer.shape);
    if (values_.size() == 1) return plan_copy();
    const concertina::detail::ChainOrder<Rank> order(
        std::span<const ConvShape<Rank>>(shapes), [&](const auto& outer, const auto& inner) {
          return device_cost<Rank>(planning_.options, outer, inner);
        });
    plan_run(order, 0, shapes.size() - 1, true);
    if (!planning_.options.gradient) return;
    for (auto product = products_.rbegin(); product != products_.rend(); ++product) {
      differentiate(*product);
    }
  }

 private:
  struct Product {
    concertina::detail::PairPlan<Rank> pair;
    std::vector<BlockRun> runs;
    std::size_t outer, inner, result;
    std::map<std::pair<std::size_t, int>, Place> moved;  // outer kernels, taps before channels

    Index outer_taps() const { return pair.outer_count(); }
    Index inner_taps() const { return pair.inner_count(); }
  };
  struct Matrix {
    Place place;
    Offset step;
    bool transposed = false;
  };

  static int narrow(Index value) { return static_cast<int>(value); }
  static Stride stride(Index high, Index low = 0) { return {narrow(high), narrow(low)}; }

  static Place shifted(Place place, Index offset, Index group_step = 0) {
    place.offset += offset;
    place.group_step = group_step;
    return place;
  }

  /// A layer alone is its contraction.
  void plan_copy() {
    const Value& layer = values_.front();
    const auto copy = [](Schedule& schedule, const Place& from, const Place& to, Index numbers) {
      schedule.add(
          0, Job{.kind = Job::Kind::copy, .columns = narrow(numbers), .left = from, .result = to});
    };
    const Index numbers = weight_numel(layer.shape);
    copy(planning_.forward, layer.weight, result_.weight, numbers);
    if (layer.shape.bias) copy(planning_.forward, layer.bias, result_.bias, layer.shape.out);
    if (!planning_.options.gradient) return;
    copy(planning_.backward, result_.weight_gradient, layer.weight_gradient, numbers);
    if (!layer.shape.bias) return;
    copy(planning_.backward, result_.bias_gradient, layer.bias_gradient, layer.shape.out);
  }

  /// The value of layers first .. last.
  std::size_t plan_run(const concertina::detail::ChainOrder<Rank>& order, std::size_t first,
                       std::size_t last, bool whole) {
    if (first == last) return first;
    const std::size_t middle = order.split(first, last);
    const std::size_t inner = plan_run(order, first, middle - 1, false),
                      outer = plan_run(order, middle, last, false);
    Product product{
        {values_[outer].shape, values_[inner].shape, concertina::detail::PairPath::direct},
        {},
        outer,
        inner,
        values_.size(),
        {}};
    product.runs = block_runs(product.pair);
    const ConvShape<Rank>& shape = product.pair.product;
    require_narrow(shape);
    if (whole) {
      values_.push_back(result_);
    } else {
      Value value{.shape = shape};
      const Index numbers = weight_numel(shape), biases = shape.bias ? shape.out : 0;
      value.weight = planning_.allocate(numbers);
      value.bias = planning_.allocate(biases);
      if (planning_.options.gradient) {
        value.weight_gradient = planning_.allocate(numbers);
        value.bias_gradient = planning_.allocate(biases);
      }
      values_.push_back(std::move(value));
    }
    multiply(product);
    products_.push_back(std::move(product));
    return values_.size() - 1;
  }

 public:
  static void require_narrow(const ConvShape<Rank>& shape) {
    if (weight_numel(shape) <= std::numeric_limits<int>::max()) return;
    throw SizeError("a tensor of " + std::to_string(weight_numel(shape)) +
                    " numbers, where a plan for a device takes less than 2^31 (" +
                    to_string(shape) + ")");
  }

 private:
  bool is_large(const Product& product, const BlockRun& run) const {
    const bool pointwise = product.outer_taps() == 1 || product.inner_taps() == 1;
    return pointwise && product.pair.work(run.first) >= planning_.options.least_gemm;
  }

  // ---- forward ---------------------------------------------------------------------------------

  void multiply(Product& product) {
    Schedule& schedule = planning_.forward;
    const Value &outer = values_[product.outer], &inner = values_[product.inner];
    Value& result = values_[product.result];
    int level = std::max(outer.ready, inner.ready);
    Index covered = 0;
    for (const BlockRun& run : product.runs) covered += run.count * run.first.out * run.first.in;
    const Index numbers = weight_numel(result.shape);
    if (covered * product.pair.taps < numbers) {  // zeros between the blocks
      schedule.add(
          0, Job{.kind = Job::Kind::copy, .columns = narrow(numbers), .result = result.weight});
      level = std::max(level, 1);
    }
    for (std::size_t r = 0; r < product.runs.size(); ++r) {
      const BlockRun& run = product.runs[r];
      const int ready = is_large(product, run) ? multiply_large(product, r, level)
                                               : multiply_small(product, run, level);
      result.ready = std::max(result.ready, ready);
    }
    if (result.shape.bias) {
      result.ready = std::max(result.ready, multiply_bias(product, level));
    }
    schedule.sequence.multiply_adds += multiply_adds(outer.shape, inner.shape);
  }

  /// What all jobs of a run's forward product have in common.
  int multiply_small(const Product& product, const BlockRun& run, int level) {
    Schedule& schedule = planning_.forward;
    const auto& block = run.first;
    const Index outer_taps = product.outer_taps(), inner_taps = product.inner_taps();
    Job job{.groups = run.count,
            .rows = narrow(block.out),
            .columns = narrow(block.in),
            .inner = narrow(block.between),
            .left = shifted(values_[product.outer].weight, block.outer, run.outer_step),
            .right = shifted(values_[product.inner].weight, block.inner, run.inner_step),
            .result = shifted(values_[product.result].weight, block.result, run.result_step),
            .left_row = stride(block.outer_step),
            .left_inner = stride(outer_taps),
            .right_inner = stride(block.inner_step),
            .result_row = stride(block.result_step),
            .right_column = narrow(inner_taps),
            .result_column = narrow(product.pair.taps),
            .first_tap = schedule.identity_tap()};
    if (outer_taps == 1) {  // channel and tap of the inner kernel are one axis
      job.columns = narrow(block.in * inner_taps);
      job.right_column = job.result_column = 1;
    } else if (inner_taps == 1) {  // output channel and tap of the outer kernel are one
      job.rows = narrow(block.out * outer_taps);
      job.row_divisor = narrow(outer_taps);
      job.left_row = stride(block.outer_step, 1);
      job.result_row = stride(block.result_step, 1);
      job.left_inner_is_near = false;
    } else {
      job.taps = narrow(product.pair.taps);
      job.first_tap = result_taps(schedule, product);
    }
    return planning_.multiply(schedule, level, job);
  }

  /// For each tap of the product the pairs that meet there.
  static int result_taps(Schedule& schedule, const Product& product) {
    const auto& pair = product.pair;
    std::vector<std::vector<TapPair>> meeting(static_cast<std::size_t>(pair.taps));
    for (Index b = 0; b < product.outer_taps(); ++b) {
      for (Index a = 0; a < product.inner_taps(); ++a) {
        meeting[static_cast<std::size_t>(meeting_tap(pair, b, a))].push_back(
            {narrow(b), narrow(a)});
      }
    }
    const int first = schedule.next_tap();
    for (std::size_t t = 0; t < meeting.size(); ++t) {
      schedule.add_tap(static_cast<int>(t), meeting[t]);
    }
    return first;
  }
  static Index meeting_tap(const concertina::detail::PairPlan<Rank>& pair, Index b, Index a) {
    return pair.outer_taps[static_cast<std::size_t>(b)] +
           pair.inner_taps[static_cast<std::size_t>(a)];
  }

  /// On cuBLAS, which wants one axis of each matrix to be dense: where the taps of the outer kernel
  /// lie between the channels, they are moved before them, and those of the result moved back.
  int multiply_large(Product& product, std::size_t number, int level) {
    Schedule& schedule = planning_.forward;
    const BlockRun& run = product.runs[number];
    const auto& block = run.first;
    const Index taps = product.outer_taps();
    int ready = level;
    for (int group = 0; group < run.count; ++group) {
      const Place outer =
                      shifted(values_[product.outer].weight, block.outer + group * run.outer_step),
                  inner =
                      shifted(values_[product.inner].weight, block.inner + group * run.inner_step),
                  result = shifted(values_[product.result].weight,
                                   block.result + group * run.result_step);
      if (taps == 1) {
        ready = std::max(ready, gemm(schedule, level, {outer, block.outer_step},
                                     {inner, block.inner_step}, {result, block.result_step},
                                     block.out, block.in * product.inner_taps(), block.between));
        continue;
      }
      const Place kernels = planning_.allocate(block.out * taps * block.between),
                  sums = planning_.allocate(block.out * taps * block.in);
      schedule.add(level,
                   taps_first(outer, block.outer_step, kernels, block.out, taps, block.between));
      product.moved[{number, group}] = kernels;
      const int done =
          gemm(schedule, level + 1, {kernels, block.between}, {inner, block.inner_step},
               {sums, block.in}, block.out * taps, block.in, block.between);
      schedule.add(done,
                   channels_first(sums, result, block.result_step, block.out, taps, block.in));
      ready = std::max(ready, done + 1);
    }
    return ready;
  }

  /// From [row][channel][tap], rows `step` apart, to [row][tap][channel].
  static Job taps_first(const Place& from, Index step, const Place& to, Index rows, Index taps,
                        Index channels) {
    return {.kind = Job::Kind::move,
            .rows = narrow(rows * taps),
            .columns = narrow(channels),
            .row_divisor = narrow(taps),
            .left = from,
            .result = to,
            .left_row = stride(step, 1),
            .result_row = stride(taps * channels, channels),
            .result_column = 1,
            .left_column = narrow(taps),
            .right_column_is_near = false};
  }
  /// The other way round.
  static Job channels_first(const Place& from, const Place& to, Index step, Index rows, Index taps,
                            Index channels) {
    return {.kind = Job::Kind::move,
            .rows = narrow(rows * taps),
            .columns = narrow(channels),
            .row_divisor = narrow(taps),
            .left = from,
            .result = to,
            .left_row = stride(taps * channels, channels),
            .result_row = stride(step, 1),
            .result_column = narrow(taps),
            .left_column = 1};
  }

  /// result = left * right; returns the level from which on it can be read. Where tensors are
  /// stored narrower than sums, cuBLAS reads copies and writes one. `epilogue` may add to what is
  /// moved.
  int gemm(Schedule& schedule, int level, Matrix left, Matrix right, Matrix result, Index rows,
           Index columns, Index inner, const Job& epilogue = {}) {
    const auto rows_of = [](const Matrix& matrix, Index height, Index width) {
      return matrix.transposed ? std::pair(width, height) : std::pair(height, width);
    };
    const auto dense_move = [](const Matrix& from, const Matrix& to, Index height, Index width) {
      return Job{.kind = Job::Kind::move,
                 .rows = narrow(height),
                 .columns = narrow(width),
                 .left = from.place,
                 .result = to.place,
                 .left_row = stride(from.step),
                 .result_row = stride(to.step),
                 .result_column = 1,
                 .left_column = 1};
    };
    const auto is_stored = [&](const Matrix& matrix) {
      return planning_.options.mixed && matrix.place.operand != Place::workspace;
    };
    int start = level;
    const auto stage = [&](Matrix& matrix, Index height, Index width) {
      if (!is_stored(matrix)) return;
      const auto [stored_rows, stored_columns] = rows_of(matrix, height, width);
      const Matrix copy{planning_.allocate(stored_rows * stored_columns), stored_columns,
                        matrix.transposed};
      schedule.add(level, dense_move(matrix, copy, stored_rows, stored_columns));
      matrix = copy;
      start = level + 1;
    };
    stage(left, rows, inner);
    stage(right, inner, columns);
    const bool moves = is_stored(result) || epilogue.factors.exists();
    const Matrix sums = moves ? Matrix{planning_.allocate(rows * columns), columns} : result;
    schedule.add(start, Gemm{.left = left.place,
                             .right = right.place,
                             .result = sums.place,
                             .rows = narrow(rows),
                             .columns = narrow(columns),
                             .inner = narrow(inner),
                             .left_step = left.step,
                             .right_step = right.step,
                             .result_step = sums.step,
                             .left_transposed = left.transposed,
                             .right_transposed = right.transposed});
    if (!moves) return start + 1;
    Job move = dense_move(sums, result, rows, columns);
    move.factors = epilogue.factors;
    move.bias = epilogue.bias;
    schedule.add(start + 1, move);
    return start + 2;
  }

  /// b2 + (sum over the taps of W2) b1, for each group of the outer layer.
  int multiply_bias(const Product& product, int level) {
    const Value &outer = values_[product.outer], &inner = values_[product.inner],
                &result = values_[product.result];
    Schedule& schedule = planning_.forward;
    if (!inner.shape.bias) {
      schedule.add(level, Job{.kind = Job::Kind::copy,
                              .columns = narrow(result.shape.out),
                              .left = outer.bias,
                              .result = result.bias});
      return level + 1;
    }
    const Index groups = outer.shape.groups, out = outer.shape.out / groups,
                in = outer.shape.in / groups, taps = product.outer_taps();
    Job job{.groups = narrow(groups),
            .rows = narrow(out),
            .inner = narrow(in * taps),
            .inner_divisor = narrow(taps),
            .left = shifted(outer.weight, 0, out * in * taps),
            .right = shifted(inner.bias, 0, in),
            .result = shifted(result.bias, 0, out),
            .left_row = stride(in * taps),
            .left_inner = inner_axis(taps, taps),
            .right_inner = stride(1),
            .result_row = stride(1),
            .first_tap = schedule.identity_tap()};
    if (outer.shape.bias) job.addend = shifted(outer.bias, 0, out);
    return planning_.multiply(schedule, level, job);
  }

  /// Channels `step` apart and their neighbouring taps, as one axis.
  static Stride inner_axis(Index taps, Index step) {
    return taps == 1 ? stride(step) : stride(step, 1);
  }

  // ---- the gradient ----------------------------------------------------------------------------

  void differentiate(const Product& product) {
    const Value& result = values_[product.result];
    Value &outer = values_[product.outer], &inner = values_[product.inner];
    Schedule& schedule = planning_.backward;
    const int level = result.gradient_ready;
    const bool rank_one = inner.shape.bias;  // W2's share of the product's bias
    if (outer.shape.bias) {
      schedule.add(level, Job{.kind = Job::Kind::copy,
                              .columns = narrow(outer.shape.out),
                              .left = result.bias_gradient,
                              .result = outer.bias_gradient});
      outer.gradient_ready = level + 1;
    }
    if (inner.shape.bias) {
      inner.gradient_ready = std::max(inner.gradient_ready, inner_bias(product, level));
    }
    for (std::size_t r = 0; r < product.runs.size(); ++r) {
      const BlockRun& run = product.runs[r];
      Job epilogue;
      if (rank_one) {
        epilogue.factors = shifted(result.bias_gradient, run.out, run.out_step);
        epilogue.bias = shifted(inner.bias, run.between, run.between_step);
      }
      if (is_large(product, run)) {
        differentiate_large(product, r, level, epilogue);
      } else {
        outer.gradient_ready =
            std::max(outer.gradient_ready, outer_gradient(product, run, level, epilogue));
        inner.gradient_ready = std::max(inner.gradient_ready, inner_gradient(product, run, level));
      }
    }
    schedule.sequence.multiply_adds += 2 * multiply_adds(outer.shape, inner.shape);
  }

  /// dW2[o][m][b] = sum over c and a of G[o][c][tap of (b, a)] W1[m][c][a].
  int outer_gradient(const Product& product, const BlockRun& run, int level, const Job& epilogue) {
    Schedule& schedule = planning_.backward;
    const auto& block = run.first;
    const Index outer_taps = product.outer_taps(), inner_taps = product.inner_taps(),
                taps = product.pair.taps;
    Job job{.groups = run.count,
            .rows = narrow(block.out),
            .columns = narrow(block.between),
            .inner = narrow(block.in),
            .left = shifted(values_[product.result].weight_gradient, block.result, run.result_step),
            .right = shifted(values_[product.inner].weight, block.inner, run.inner_step),
            .result = shifted(values_[product.outer].weight_gradient, block.outer, run.outer_step),
            .left_row = stride(block.result_step),
            .left_inner = stride(taps),
            .right_inner = stride(inner_taps),
            .result_row = stride(block.outer_step),
            .right_column = narrow(block.inner_step),
            .result_column = narrow(outer_taps),
            .first_tap = schedule.identity_tap(),
            .right_column_is_near = false,
            .factors = epilogue.factors,
            .bias = epilogue.bias};
    if (outer_taps == 1) {
      job.inner = narrow(block.in * inner_taps);
      job.left_inner = job.right_inner = stride(1);
    } else if (inner_taps == 1) {
      job.rows = narrow(block.out * outer_taps);
      job.row_divisor = narrow(outer_taps);
      job.left_row = stride(block.result_step, 1);
      job.result_row = stride(block.outer_step, 1);
      job.left_inner_is_near = false;
    } else {
      job.taps = narrow(outer_taps);
      job.first_tap = schedule.next_tap();
      for (Index b = 0; b < outer_taps; ++b) {
        std::vector<TapPair> pairs;
        for (Index a = 0; a < inner_taps; ++a) {
          pairs.push_back({narrow(meeting_tap(product.pair, b, a)), narrow(a)});
        }
        schedule.add_tap(narrow(b), pairs);
      }
    }
    return planning_.multiply(schedule, level, job);
  }

  /// dW1[m][c][a] = sum over o and b of W2[o][m][b] G[o][c][tap of (b, a)].
  int inner_gradient(const Product& product, const BlockRun& run, int level) {
    Schedule& schedule = planning_.backward;
    const auto& block = run.first;
    const Index outer_taps = product.outer_taps(), inner_taps = product.inner_taps(),
                taps = product.pair.taps;
    Job job{
        .groups = run.count,
        .rows = narrow(block.between),
        .columns = narrow(block.in),
        .inner = narrow(block.out),
        .left = shifted(values_[product.outer].weight, block.outer, run.outer_step),
        .right = shifted(values_[product.result].weight_gradient, block.result, run.result_step),
        .result = shifted(values_[product.inner].weight_gradient, block.inner, run.inner_step),
        .left_row = stride(outer_taps),
        .left_inner = stride(block.outer_step),
        .right_inner = stride(block.result_step),
        .result_row = stride(block.inner_step),
        .right_column = narrow(taps),
        .result_column = narrow(inner_taps),
        .first_tap = schedule.identity_tap(),
        .left_inner_is_near = false};
    if (outer_taps == 1) {
      job.columns = narrow(block.in * inner_taps);
      job.right_column = job.result_column = 1;
    } else if (inner_taps == 1) {  // output channel and tap of the outer kernel are one axis
      job.inner = narrow(block.out * outer_taps);
      job.inner_divisor = narrow(outer_taps);
      job.left_inner = stride(block.outer_step, 1);
      job.right_inner = stride(block.result_step, 1);
      job.left_inner_is_near = true;
      job.right_column_is_near = false;
    } else {
      job.taps = narrow(inner_taps);
      job.first_tap = schedule.next_tap();
      for (Index a = 0; a < inner_taps; ++a) {
        std::vector<TapPair> pairs;
        for (Index b = 0; b < outer_taps; ++b) {
          pairs.push_back({narrow(b), narrow(meeting_tap(product.pair, b, a))});
        }
        schedule.add_tap(narrow(a), pairs);
      }
    }
    return planning_.multiply(schedule, level, job);
  }

  void differentiate_large(const Product& product, std::size_t number, int level,
                           const Job& epilogue) {
    Schedule& schedule = planning_.backward;
    const BlockRun& run = product.runs[number];
    const auto& block = run.first;
    Value &outer = values_[product.outer], &inner = values_[product.inner];
    const Index taps = product.outer_taps(), width = block.in * product.inner_taps();
    const auto raise = [](int& ready, int to) { ready = std::max(ready, to); };
    for (int group = 0; group < run.count; ++group) {
      const auto at = [&](const Place& place, Index offset, Index step) {
        return place.exists() ? shifted(place, offset + group * step) : place;
      };
      Job added = epilogue;
      added.factors = at(epilogue.factors, 0, run.out_step);
      added.bias = at(epilogue.bias, 0, run.between_step);
      const Place weight = at(outer.weight, block.outer, run.outer_step),
                  weight_gradient = at(outer.weight_gradient, block.outer, run.outer_step),
                  gradient =
                      at(values_[product.result].weight_gradient, block.result, run.result_step);
      const Matrix inner_weight{at(inner.weight, block.inner, run.inner_step), block.inner_step,
                                true},
          inner_gradient{at(inner.weight_gradient, block.inner, run.inner_step), block.inner_step};
      if (taps == 1) {
        raise(outer.gradient_ready,
              gemm(schedule, level, {gradient, block.result_step}, inner_weight,
                   {weight_gradient, block.outer_step}, block.out, block.between, width, added));
        raise(inner.gradient_ready,
              gemm(schedule, level, {weight, block.outer_step, true}, {gradient, block.result_step},
                   inner_gradient, block.between, width, block.out));
        continue;
      }
      const Index rows = block.out * taps;
      const Place moved = planning_.allocate(rows * block.in),
                  sums = planning_.allocate(rows * block.between),
                  kernels = product.moved.at({number, group});
      schedule.add(level,
                   taps_first(gradient, block.result_step, moved, block.out, taps, block.in));
      raise(inner.gradient_ready,
            gemm(schedule, level + 1, {kernels, block.between, true}, {moved, block.in},
                 inner_gradient, block.between, block.in, rows));
      const int done = gemm(schedule, level + 1, {moved, block.in}, inner_weight,
                            {sums, block.between}, rows, block.between, block.in);
      Job move =
          channels_first(sums, weight_gradient, block.outer_step, block.out, taps, block.between);
      move.factors = added.factors;
      move.bias = added.bias;
      schedule.add(done, move);
      raise(outer.gradient_ready, done + 1);
    }
  }

  /// db1[m] = sum over o and b of W2[o][m][b] db[o].
  int inner_bias(const Product& product, int level) {
    const Value &outer = values_[product.outer], &inner = values_[product.inner],
                &result = values_[product.result];
    Schedule& schedule = planning_.backward;
    const Index groups = outer.shape.groups, out = outer.shape.out / groups,
                in = outer.shape.in / groups, taps = product.outer_taps();
    return planning_.multiply(schedule, level,
                              {.groups = narrow(groups),
                               .rows = narrow(in),
                               .inner = narrow(out * taps),
                               .inner_divisor = narrow(taps),
                               .left = shifted(outer.weight, 0, out * in * taps),
                               .right = shifted(result.bias_gradient, 0, out),
                               .result = shifted(inner.bias_gradient, 0, in),
                               .left_row = stride(taps),
                               .left_inner = inner_axis(taps, in * taps),
                               .right_inner = stride(1),
                               .result_row = stride(1),
                               .first_tap = schedule.identity_tap()});
  }

  Planning& planning_;
  std::vector<Value> values_;
  Value result_;
  std::vector<Product> products_;
};

}  // namespace detail

inline ContractionPlan::ContractionPlan(std::span<const Chain> chains, const PlanOptions& options)
    : options_(options) {
  using Role = TensorUse::Role;
  const auto require = [](bool holds, const char* option, Index value) {
    if (holds) return;
    throw SizeError(std::string("PlanOptions::") + option + " " + std::to_string(value) +
                    "; it starts at 1");
  };
  require(options.least_gemm > 0, "least_gemm", options.least_gemm);
  require(options.wanted_tiles > 0, "wanted_tiles", options.wanted_tiles);
  require(options.least_split > 0, "least_split", options.least_split);
  int layers = 0;
  for (const Chain& chain : chains) {
    chain.visit([&](const auto& of) { layers += static_cast<int>(of.layers.size()); });
  }
  const int chain_count = static_cast<int>(chains.size());
  const int count = (options.gradient ? 4 : 2) * (layers + chain_count);
  if (count > most_tensors) {
    throw SizeError("a plan of " + std::to_string(count) + " tensors, where " +
                    std::to_string(most_tensors) +
                    " are possible; plan parts of the network on their own");
  }
  std::vector<TensorUse> results, result_gradients, layer_gradients;
  detail::Planning planning(options);
  int number = 0, first_layer = 0;
  for (const Chain& chain : chains) {
    planning.forward.chain = planning.backward.chain = number;
    chain.visit([&]<int Rank>(const Chain::Of<Rank>& of) {
      const Form<Rank> form = chain_form<Rank>(of.layers);
      const ConvShape<Rank> shape = contracted_shape(form, of.policy.input_size());
      of.policy.require(form);
      using Planner = detail::ChainPlanner<Rank>;
      const auto use = [&](Role role, int layer, const ConvShape<Rank>& of_shape,
                           std::vector<TensorUse>& to) {
        Planner::require_narrow(of_shape);
        for (const bool bias : {false, true}) {
          const Index numbers = !bias ? weight_numel(of_shape) : of_shape.bias ? of_shape.out : 0;
          to.push_back({role, number, layer, bias, numbers, to_string(of_shape)});
        }
      };
      const auto value = [&](const ConvShape<Rank>& of_shape, int at, int gradient_at) {
        return typename Planner::Value{
            of_shape, {2 * at}, {2 * at + 1}, {2 * gradient_at}, {2 * gradient_at + 1}};
      };
      std::vector<typename Planner::Value> values;
      for (const ConvShape<Rank>& layer : of.layers) {
        const int at = static_cast<int>(values.size());
        use(Role::layer, at, layer, tensors_);
        use(Role::layer_gradient, at, layer, layer_gradients);
        values.push_back(
            value(layer, first_layer + at, layers + 2 * chain_count + first_layer + at));
      }
      use(Role::result, 0, shape, results);
      use(Role::result_gradient, 0, shape, result_gradients);
      Planner(planning, std::move(values),
              value(shape, layers + number, layers + chain_count + number))
          .plan();
      first_layer += static_cast<int>(of.layers.size());
    });
    ++number;
  }
  if (!options.gradient) {
    result_gradients.clear();
    layer_gradients.clear();
  }
  for (const auto* more : {&results, &result_gradients, &layer_gradients}) {
    tensors_.insert(tensors_.end(), more->begin(), more->end());
  }
  planning.forward.finish();
  planning.backward.finish();
  forward_ = std::move(planning.forward.sequence);
  backward_ = std::move(planning.backward.sequence);
  workspace_ = planning.workspace;
}

}  // namespace concertina::cuda
