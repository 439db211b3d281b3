// In which order and in which of several ways jobs run: those of a level side by side.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/cuda/plan.hpp>

#include <algorithm>
#include <cstddef>
#include <initializer_list>
#include <limits>
#include <optional>
#include <span>
#include <tuple>
#include <utility>
#include <vector>

namespace concertina::cuda::detail {

/// Jobs and GEMMs by levels: those of a level depend on lower ones only.
class Schedule {
 public:
  /// In microseconds, of each level that has jobs.
  using Deadlines = std::vector<std::optional<double>>;

  /// `deadlines` are those of an earlier schedule of the same, so that jobs share the device with
  /// those beside them; without them each has all of it.
  explicit Schedule(const PlanOptions& options, Deadlines deadlines = {})
      : options_(options), deadlines_(std::move(deadlines)) {
    add_tap(0, {TapPair{}});
  }

  Sequence sequence;

  int form = 0;  ///< of what is added, for messages

  void add(int level, const Job& job) {
    add_best(level, std::span(&job, 1), [](Job&) {});
  }
  /// Adds one of several jobs that compute the same, that which suits its phase best, once it has
  /// been given to `prepare`.
  template <class Prepare>
  Job add_best(int level, std::span<const Job> candidates, Prepare&& prepare) {
    std::vector<Way> ways;
    for (const Job& job : candidates) {
      ways.push_back({time_of(job), tiles_of(job), is_product(job.kind),
                      job.splits > 1 && job.kind != Job::Kind::combine});
    }
    const auto l = static_cast<std::size_t>(level);
    const double within = l < deadlines_.size() && deadlines_[l]
                              ? *deadlines_[l]
                              : deadline(std::span(&std::as_const(ways), 1));
    Job job = candidates[best(ways, within)];
    prepare(job);
    job.form = form;
    job.k_outer_extent = std::max(job.k / job.k_inner_extent, 1);
    Level& at_level = at(level);
    if (job.kind == Job::Kind::multiply_bf16x6) {
      at_level.on_tensor_cores.push_back(job);
    } else {
      at_level.jobs.push_back(job);
      ways_.resize(levels_.size());
      ways_[l].push_back(std::move(ways));
    }
    return job;
  }
  void add(int level, Gemm gemm) {
    gemm.form = form;
    at(level).gemms.push_back(gemm);
  }

  /// Taps of C that no pair reaches are zeros.
  void add_tap(int c, std::span<const TapPair> pairs) {
    const int first = static_cast<int>(sequence.pairs.size());
    sequence.pairs.insert(sequence.pairs.end(), pairs.begin(), pairs.end());
    sequence.taps.push_back({c, first, static_cast<int>(sequence.pairs.size())});
  }
  void add_tap(int c, std::initializer_list<TapPair> pairs) {
    add_tap(c, std::span(pairs.begin(), pairs.size()));
  }
  int next_tap() const { return static_cast<int>(sequence.taps.size()); }
  int next_branch() const { return static_cast<int>(sequence.branches.size()); }
  void add_branch(const Branch& branch) { sequence.branches.push_back(branch); }

  /// A GEMM on our own kernels, its sums split where it has too few tiles. Returns the level from
  /// which on C can be read. `workspace(elements)` allocates.
  template <class Allocate>
  int add_product(int level, Job job, Allocate&& workspace) {
    if (fits_tensor_cores(job)) return add_bf16x6(level, job, workspace);
    const Index terms = most_pairs(job) * job.k;
    const bool is_narrow = job.n > 1 && job.n <= tuning::narrow_n &&
                           job.m >= tuning::narrow_least_m && terms >= tuning::narrow_least_k;
    const bool is_thin = std::min(job.m, job.n) < tuning::least_tiled_side;
    std::vector<Job> ways;
    if (job.k == 0 || (is_thin && !is_narrow)) {
      job.kind = Job::Kind::reduce;
      add_ways_to_share(job, terms, contraction_threads, ways);
    } else if (is_narrow) {
      add_ways_to_multiply(job, Job::Kind::multiply_narrow, ways);
    } else {
      add_ways_to_multiply(job, Job::Kind::multiply, ways);
      add_ways_to_multiply(job, Job::Kind::multiply_small, ways);
    }
    if (terms <= tuning::most_terms_of_several) {
      Job several = job;
      several.kind = Job::Kind::reduce;
      several.has_several = true;
      ways.push_back(several);
    }
    const Job best = add_best(level, ways, [&](Job& way) {
      if (way.splits == 1) return;
      way.c = {.tensor = TensorRef::workspace, .offset = workspace(way.splits * way.size())};
      way.epilogue = {};
    });
    if (best.splits == 1) return level + 1;
    job.kind = Job::Kind::combine;
    job.a = best.c;
    job.splits = best.splits;
    ways.clear();
    add_ways_to_share(job, job.splits, tuning::most_combining_threads, ways);
    add_best(level + 1, ways, [](Job&) {});
    return level + 2;
  }

  /// Whether tensor cores take a matrix product of one tap.
  bool fits_tensor_cores(const Job& job) const {
    return job.k_inner_extent == 1 && job.taps == 1 &&
           fits_tensor_cores(job.m, job.n, job.k, job.groups);
  }
  bool fits_tensor_cores(Index m, Index n, Index k, Index groups = 1) const {
    return options_.math == Math::bf16x6 && k >= options_.least_bf16x6_terms &&
           std::min(m, n) >= std::min<Index>(tuning::least_bf16x6_side, options_.least_bf16x6) &&
           groups * m * n * k >= options_.least_bf16x6;
  }

  /// For each level with jobs, how long its tiles may take so that it is done soonest.
  Deadlines deadlines() const {
    Deadlines found;
    for (const auto& jobs : ways_) {
      found.push_back(jobs.empty() ? std::nullopt : std::optional(deadline(jobs)));
    }
    return found;
  }

  /// Everything in order: each level's jobs in a phase.
  void finish() {
    for (Level& level : levels_) {
      if (!level.on_tensor_cores.empty()) {
        sequence.launches.push_back({Launch::Kind::tensor_cores, add_phase(level.on_tensor_cores)});
      }
      if (!level.jobs.empty()) {
        sequence.launches.push_back({Launch::Kind::phase, add_phase(level.jobs)});
      }
      for (const Gemm& gemm : level.gemms) {
        sequence.launches.push_back({Launch::Kind::gemm, static_cast<int>(sequence.gemms.size())});
        sequence.gemms.push_back(gemm);
      }
    }
    levels_.clear();
  }

 private:
  struct Level {
    std::vector<Job> jobs, on_tensor_cores;
    std::vector<Gemm> gemms;
  };

  Level& at(int level) {
    if (levels_.size() <= static_cast<std::size_t>(level)) {
      levels_.resize(static_cast<std::size_t>(level) + 1);
    }
    return levels_[static_cast<std::size_t>(level)];
  }

  /// One of the ways to compute a job.
  struct Way {
    double time;  // of a tile
    int tiles;
    bool is_product, is_split;
  };

  /// Of those that keep a deadline the one of least work, unsplit where there is one; otherwise the
  /// one whose tiles are done first.
  static std::size_t best(std::span<const Way> ways, double deadline) {
    const auto cost = [&](const Way& way) {
      const bool is_late = way.time > deadline;
      return std::tuple(is_late, is_late ? way.time : way.is_split, way.time * way.tiles);
    };
    return static_cast<std::size_t>(std::ranges::min_element(ways, {}, cost) - ways.begin());
  }

  /// How long a phase takes, at least: its longest tile, all tiles on the places there are, and
  /// where they are more than those, the two that share one, the longest having been begun first.
  double phase_time(std::vector<Way>& phase) const {
    std::ranges::sort(phase, std::ranges::greater(), &Way::time);
    const auto is = [&](bool Way::* what) { return std::ranges::any_of(phase, what); };
    // Those of products: two on each multiprocessor, of double one; of other tiles four.
    const Index of_products = options_.math == Math::fp64 || options_.math == Math::prime_field
                                  ? std::max(options_.wanted_tiles / 2, 1)
                                  : options_.wanted_tiles,
                places = is(&Way::is_product) ? of_products : 2 * Index{options_.wanted_tiles};
    double work = 0, last_alone = 0, shared = 0;
    Index tiles = 0;
    for (const Way& way : phase) {
      work += way.time * way.tiles;
      tiles += way.tiles;
      if (last_alone == 0 && tiles >= places) last_alone = way.time;
      if (shared == 0 && tiles > places) shared = last_alone + way.time;
    }
    return std::max({phase.front().time, work / static_cast<double>(places), shared}) +
           (is(&Way::is_split) ? tuning::combine_time : 0);
  }

  /// With which jobs side by side are done soonest.
  double deadline(std::span<const std::vector<Way>> jobs) const {
    double least = std::numeric_limits<double>::max(), most = 0;
    for (const auto& ways : jobs) {
      for (const Way& way : ways) {
        least = std::min(least, way.time);
        most = std::max(most, way.time);
      }
    }
    constexpr double step = 1.1;
    double found = most, soonest = std::numeric_limits<double>::max(), deadline = least;
    while (deadline < most * step) {
      std::vector<Way> phase;
      for (const auto& ways : jobs) phase.push_back(ways[best(ways, deadline)]);
      const double time = phase_time(phase);
      if (time < soonest) {
        soonest = time;
        found = deadline;
      }
      deadline *= step;
    }
    return found;
  }

  /// An element's terms by one thread, or more and more of them.
  static void add_ways_to_share(Job job, Index terms, int most_threads, std::vector<Job>& ways) {
    job.threads_per_element = 1;
    do {
      ways.push_back(job);
      job.threads_per_element *= 2;
    } while (job.threads_per_element <= most_threads && job.threads_per_element <= terms);
  }

  /// Whole, and split along k, or where a tap's pairs are more, by those.
  void add_ways_to_multiply(Job job, Job::Kind kind, std::vector<Job>& ways) const {
    job.kind = kind;
    job.split_k = job.k;
    ways.push_back(job);
    const int depth = std::min(tile_shape(kind).k, options_.least_split),
              chunks = tiles_along(job.k, depth), pairs = static_cast<int>(most_pairs(job)),
              longer = std::max(chunks, pairs), shorter = std::min(chunks, pairs),
              most = std::min(options_.wanted_tiles / std::max(tiles_of(job), 1), longer);
    for (int splits = 2; splits <= most && shorter > 0; ++splits) {
      const int of_split =
          std::max(tiles_along(longer, splits), tiles_along(options_.least_split / depth, shorter));
      job.splits = tiles_along(longer, of_split);
      if (job.splits == ways.back().splits) continue;
      if (chunks >= pairs) job.split_k = of_split * depth;
      ways.push_back(job);
    }
  }

  /// Heavy tiles first, so that none is left when the others are done.
  int add_phase(std::vector<Job>& jobs) {
    Phase phase{static_cast<int>(sequence.jobs.size()), 0, 0};
    std::vector<std::pair<double, std::size_t>> order;
    for (std::size_t j = 0; j < jobs.size(); ++j) order.emplace_back(-time_of(jobs[j]), j);
    std::ranges::sort(order);
    for (const auto& [time, j] : order) {
      Job& job = jobs[j];
      job.first_tile = phase.tiles;
      phase.tiles += tiles_of(job);
      sequence.jobs.push_back(job);
    }
    phase.last_job = static_cast<int>(sequence.jobs.size());
    sequence.phases.push_back(phase);
    return static_cast<int>(sequence.phases.size()) - 1;
  }

  /// Tiles in rounds of one for each multiprocessor; the sums of those that are left over are split
  /// where that saves more than it costs.
  template <class Allocate>
  int add_bf16x6(int level, Job job, Allocate&& workspace) {
    job.kind = Job::Kind::multiply_bf16x6;
    const int tiles = job.groups * tiles_along(job.m, tuning::tensor_core_side) *
                      tiles_along(job.n, tuning::tensor_core_side),
              at_once = std::max(options_.wanted_tiles / 2, 1), rest = tiles % at_once,
              steps = tiles_along(job.k, tuning::tensor_core_depth);
    const auto time = [&](int splits) {
      return tiles_along(Offset{rest} * splits, at_once) *
                 (tiles_along(steps, splits) + tuning::tensor_core_tile_overhead) +
             (splits > 1 ? tuning::combine_tiles_overhead : 0);
    };
    int splits = 1;
    for (int more = 2; rest > 0 && more <= steps; ++more) {
      if (time(more) < time(splits)) splits = more;
    }
    if (splits == 1) {
      job.c_tiles = tiles;
      add(level, job);
      return level + 1;
    }
    job.c_tiles = tiles - rest;
    if (job.c_tiles > 0) add(level, job);
    job.first_c_tile = job.c_tiles;
    job.c_tiles = rest;
    job.splits = splits;
    Job sum = job;
    sum.kind = Job::Kind::combine_tiles;
    sum.a = {.tensor = TensorRef::workspace,
             .offset = workspace(Index{splits} * rest * tuning::tensor_core_tile_size)};
    job.c = sum.a;
    job.epilogue = {};
    add(level, job);
    add(level + 1, sum);
    return level + 2;
  }

  /// Of a tap, at most.
  Index most_pairs(const Job& job) const {
    Index pairs = 0;
    for (int t = job.first_tap; t < job.first_tap + job.taps; ++t) {
      const Tap& tap = sequence.taps[static_cast<std::size_t>(t)];
      pairs = std::max(pairs, Index{tap.last_pair - tap.first_pair});
    }
    return pairs;
  }

  /// For how long a tile keeps its place on the device, in microseconds; on tensor cores in steps.
  double time_of(const Job& job) const {
    const auto multiply = [&](double step_time) {
      const int depth = std::min(tile_shape(job.kind).k, options_.least_split);
      const Index pairs = most_pairs(job),
                  steps = (job.shares_pairs() ? tiles_along(pairs, job.splits) : pairs) *
                          tiles_along(job.split_k, depth);
      return tuning::tile_time + static_cast<double>(steps) * step_time;
    };
    const auto add_up = [&](Index terms) {
      if (job.has_several) {
        return tuning::reduce_time + static_cast<double>(terms) * tuning::several_round_time;
      }
      const int threads = job.threads_per_element, exchanges = threads > 64  ? 3
                                                               : threads > 8 ? 2
                                                                             : threads > 1;
      return tuning::reduce_time + exchanges * tuning::exchange_time +
             tiles_along(terms, threads * tuning::loads_in_flight) * tuning::round_time;
    };
    switch (job.kind) {
      case Job::Kind::multiply: return multiply(tuning::large_step_time);
      case Job::Kind::multiply_small: return multiply(tuning::small_step_time);
      case Job::Kind::multiply_narrow: return multiply(tuning::narrow_step_time);
      case Job::Kind::multiply_bf16x6:
        return tiles_along(tiles_along(job.k, tuning::tensor_core_depth), job.splits);
      case Job::Kind::reduce: return add_up(most_pairs(job) * job.k);
      case Job::Kind::depthwise_chain:
        return job.has_several
                   ? add_up(job.k)
                   : tuning::reduce_time + tiles_along(job.k, 2 * tuning::loads_in_flight) *
                                               tuning::several_round_time;
      case Job::Kind::combine: return add_up(job.splits);
      case Job::Kind::combine_tiles:
      case Job::Kind::fold:
      case Job::Kind::unfold:
      case Job::Kind::copy:
      case Job::Kind::add_branches:
      case Job::Kind::take_branch: break;
    }
    return tuning::elementwise_time;
  }

  PlanOptions options_;
  Deadlines deadlines_;
  std::vector<std::vector<std::vector<Way>>> ways_;  // of each level's jobs
  std::vector<Level> levels_;
};

}  // namespace concertina::cuda::detail
