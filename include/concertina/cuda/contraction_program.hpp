// The block programs that contract and differentiate: a launch runs the tiles of many jobs, each a
// matrix product over strided numbers, or what has to happen before or after one.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/cuda/block.hpp>

#include <cstddef>
#include <cstdint>

namespace concertina::cuda {

using Offset = std::int64_t;

/// Where an index along an axis lies: (i / divisor) * high + (i % divisor) * low, the divisor being
/// the job's. So channels and taps can be one axis although other channels lie between.
struct Stride {
  Offset high = 0, low = 0;

  CONCERTINA_HOST_DEVICE constexpr Offset operator()(int i, int divisor) const {
    return divisor == 1 ? i * high : (i / divisor) * high + (i % divisor) * low;
  }
};

/// The first number of a matrix, and how far apart those of a job's groups are.
struct Place {
  static constexpr int workspace = -1, none = -2;

  int operand = none;  ///< number in the table of addresses, or one of the above
  Offset offset = 0, group_step = 0;

  CONCERTINA_HOST_DEVICE constexpr bool exists() const { return operand != none; }
  CONCERTINA_HOST_DEVICE constexpr Offset of_group(int group) const {
    return offset + group * group_step;
  }
};

/// result(row, column) = sum over a tap's pairs, and over `inner`, of left(row, inner) *
/// right(inner, column), for every group and tap; then what the epilogue adds.
struct Job {
  enum class Kind {
    multiply,        ///< tiles of 64 x 64
    multiply_small,  ///< tiles of 32 x 32
    reduce,          ///< `lanes` threads for each number of the result
    combine,         ///< result = sum of the splits of a product, at `left`
    move,            ///< result(row, column) = left(row, column)
    copy             ///< `columns` numbers in a row; zeros where there is no left
  };

  Kind kind = Kind::multiply;
  int first_tile = 0;  ///< in its phase
  int groups = 1, taps = 1, rows = 1, columns = 1, inner = 0;
  int row_divisor = 1, inner_divisor = 1;
  Place left = {}, right = {}, result = {};
  Stride left_row = {}, left_inner = {}, right_inner = {}, result_row = {};
  Offset right_column = 0, result_column = 0, left_column = 0;  // left_column: move
  int first_tap = 0;
  int splits = 1, split_inner = 0;  ///< parts of the inner length, and the length of one
  int lanes = 1;
  bool left_inner_is_near = true;    ///< neighbours along it lie nearer than along the rows
  bool right_column_is_near = true;  ///< move: of the left's columns
  /// Epilogue: + addend(row) + factors(row / row_divisor) * bias(column).
  Place addend = {}, factors = {}, bias = {};

  CONCERTINA_HOST_DEVICE constexpr bool is_multiply() const {
    return kind == Kind::multiply || kind == Kind::multiply_small;
  }
  CONCERTINA_HOST_DEVICE constexpr Offset numbers() const {
    return static_cast<Offset>(groups) * taps * rows * columns;
  }
};

/// A tap of the result, and the pairs of factors' taps that meet there.
struct Tap {
  Offset result = 0;
  int first_pair = 0, last_pair = 0;
};
struct TapPair {
  Offset left = 0, right = 0;
};

/// Jobs that do not depend on each other, and the tiles that they have together.
struct Phase {
  int first_job = 0, last_job = 0, tiles = 0;
};

inline constexpr int contraction_threads = 256;

namespace detail {

/// Sides of the tiles, in numbers.
struct TileShape {
  int side, depth;
};
inline constexpr TileShape large_tile{64, 16}, small_tile{32, 32};
inline constexpr int elementwise_tile = 4 * contraction_threads, move_side = 32;

constexpr int tiles_along(Offset count, int side) {
  return static_cast<int>((count + side - 1) / side);
}

/// Tiles that a job has.
constexpr int tiles_of(const Job& job) {
  const int matrices = job.groups * job.taps;
  const auto square = [&](int side) {
    return tiles_along(job.rows, side) * tiles_along(job.columns, side);
  };
  switch (job.kind) {
    case Job::Kind::multiply: return matrices * job.splits * square(large_tile.side);
    case Job::Kind::multiply_small: return matrices * job.splits * square(small_tile.side);
    case Job::Kind::reduce: return tiles_along(job.numbers(), contraction_threads / job.lanes);
    case Job::Kind::combine: return tiles_along(job.numbers(), elementwise_tile);
    case Job::Kind::move: return job.groups * square(move_side);
    case Job::Kind::copy: return tiles_along(job.columns, elementwise_tile);
  }
  return 0;
}

/// So that a column of a tile, which is what threads read together, does not fall on one bank.
inline constexpr int padding = 4;

template <class Sum>
constexpr std::size_t contraction_shared_bytes() {
  constexpr auto of = [](TileShape tile) {
    const auto numbers = static_cast<std::size_t>((tile.side + padding) * tile.depth);
    return 2 * shared_size<Sum>(numbers);
  };
  return of(large_tile) > of(small_tile) ? of(large_tile) : of(small_tile);
}

}  // namespace detail

/// The tables of a sequence of phases, in the device's memory.
struct ContractionTables {
  const Job* jobs;
  const Tap* taps;
  const TapPair* pairs;
  const Phase* phases;
};

/// Where tensors of Stored lie, and the workspace, whose numbers are sums.
template <class Stored, class Sum>
struct ContractionMemory {
  void* const* addresses;
  Sum* workspace;

  template <class B>
  CONCERTINA_DEVICE Sum read(B& block, const Place& place, Offset at) const {
    if (place.operand == Place::workspace) return block.read(workspace + at);
    return static_cast<Sum>(block.read(static_cast<const Stored*>(addresses[place.operand]) + at));
  }
  template <class B>
  CONCERTINA_DEVICE void write(B& block, const Place& place, Offset at, Sum value) const {
    if (place.operand == Place::workspace) {
      block.write(workspace + at, value);
    } else {
      block.write(static_cast<Stored*>(addresses[place.operand]) + at, static_cast<Stored>(value));
    }
  }
};

/// What one block does for a tile of a job.
template <class Stored, class Sum, Block B>
class ContractionTile {
 public:
  CONCERTINA_DEVICE ContractionTile(B& block, const ContractionTables& tables,
                                    const ContractionMemory<Stored, Sum>& memory, const Job& job)
      : block_(block), tables_(tables), memory_(memory), job_(job) {}

  CONCERTINA_DEVICE void run(int tile) {
    switch (job_.kind) {
      case Job::Kind::multiply: return multiply<detail::large_tile>(tile);
      case Job::Kind::multiply_small: return multiply<detail::small_tile>(tile);
      case Job::Kind::reduce: return reduce(tile);
      case Job::Kind::combine: return combine(tile);
      case Job::Kind::move: return move(tile);
      case Job::Kind::copy: return copy(tile);
    }
  }

 private:
  /// Each thread keeps side / 16 x side / 16 neighbouring sums in registers: for a multiply-add of
  /// a warp, shared memory is asked twice for two numbers each or, in the large tile, once for two
  /// times four. The next tiles of the factors are on their way from memory while this one's are
  /// multiplied.
  template <detail::TileShape shape>
  CONCERTINA_DEVICE void multiply(int tile) {
    constexpr int across = 16, each = shape.side / across,
                  loads = shape.side * shape.depth / contraction_threads,
                  step = shape.side + detail::padding;
    struct Registers {
      Sum sums[each][each], left[loads], right[loads];
    };
    const Job& job = job_;
    const int column_tiles = (job.columns + shape.side - 1) / shape.side,
              row_tiles = (job.rows + shape.side - 1) / shape.side;
    const int first_column = tile % column_tiles * shape.side;
    tile /= column_tiles;
    const int first_row = tile % row_tiles * shape.side;
    tile /= row_tiles;
    const int split = tile % job.splits;
    tile /= job.splits;
    const int tap_number = tile % job.taps, group = tile / job.taps;
    const Tap tap = tables_.taps[job.first_tap + tap_number];
    const int first_inner = split * job.split_inner,
              end_inner = first_inner + job.split_inner < job.inner ? first_inner + job.split_inner
                                                                    : job.inner;
    const int chunks = (end_inner - first_inner + shape.depth - 1) / shape.depth,
              steps = (tap.last_pair - tap.first_pair) * chunks;
    const Offset left = job.left.of_group(group), right = job.right.of_group(group);

    auto left_tile = block_.template shared<Sum>(step * shape.depth),
         right_tile = block_.template shared<Sum>(step * shape.depth);
    typename B::template PerThread<Registers> registers(block_);

    // Which of the tile's numbers a thread loads: neighbours in memory by neighbouring threads.
    struct Position {
      int side, depth;
    };
    const auto position = [](int thread, int load, bool depth_is_near) {
      const int number = thread + load * contraction_threads;
      return depth_is_near ? Position{number / shape.depth, number % shape.depth}
                           : Position{number % shape.side, number / shape.side};
    };
    const auto load = [&](Registers& to, int thread, int number) {
      const TapPair pair = tables_.pairs[tap.first_pair + number / chunks];
      const int inner = first_inner + number % chunks * shape.depth;
      CONCERTINA_UNROLL
      for (int l = 0; l < loads; ++l) {
        const auto [row, depth] = position(thread, l, job.left_inner_is_near);
        const bool inside = first_row + row < job.rows && inner + depth < end_inner;
        to.left[l] = inside ? memory_.read(block_, job.left,
                                           left + pair.left +
                                               job.left_row(first_row + row, job.row_divisor) +
                                               job.left_inner(inner + depth, job.inner_divisor))
                            : Sum(0);
      }
      CONCERTINA_UNROLL
      for (int l = 0; l < loads; ++l) {
        const auto [column, depth] = position(thread, l, !job.right_column_is_near);
        const bool inside = first_column + column < job.columns && inner + depth < end_inner;
        to.right[l] =
            inside ? memory_.read(block_, job.right,
                                  right + pair.right + (first_column + column) * job.right_column +
                                      job.right_inner(inner + depth, job.inner_divisor))
                   : Sum(0);
      }
    };

    block_.each_thread([&](int thread) {
      Registers& mine = registers[thread];
      CONCERTINA_UNROLL
      for (int i = 0; i < each; ++i) {
        CONCERTINA_UNROLL
        for (int j = 0; j < each; ++j) mine.sums[i][j] = Sum(0);
      }
      if (steps > 0) load(mine, thread, 0);
    });
    for (int number = 0; number < steps; ++number) {
      block_.each_thread([&](int thread) {
        const Registers& mine = registers[thread];
        CONCERTINA_UNROLL
        for (int l = 0; l < loads; ++l) {
          const auto [row, left_depth] = position(thread, l, job.left_inner_is_near);
          left_tile.set(left_depth * step + row, mine.left[l]);
          const auto [column, right_depth] = position(thread, l, !job.right_column_is_near);
          right_tile.set(right_depth * step + column, mine.right[l]);
        }
      });
      block_.each_thread([&](int thread) {
        Registers& mine = registers[thread];
        if (number + 1 < steps) load(mine, thread, number + 1);
        CONCERTINA_UNROLL
        for (int depth = 0; depth < shape.depth; ++depth) {
          Sum rows[each], columns[each];
          left_tile.get(depth * step + thread / across * each, rows);
          right_tile.get(depth * step + thread % across * each, columns);
          CONCERTINA_UNROLL
          for (int i = 0; i < each; ++i) {
            CONCERTINA_UNROLL
            for (int j = 0; j < each; ++j) mine.sums[i][j] += rows[i] * columns[j];
          }
        }
      });
    }
    block_.each_thread([&](int thread) {
      const Registers& mine = registers[thread];
      CONCERTINA_UNROLL
      for (int i = 0; i < each; ++i) {
        CONCERTINA_UNROLL
        for (int j = 0; j < each; ++j) {
          const int row = first_row + thread / across * each + i,
                    column = first_column + thread % across * each + j;
          if (row >= job.rows || column >= job.columns) continue;
          if (job.splits > 1) {
            const Offset matrix =
                (static_cast<Offset>(split) * job.groups + group) * job.taps + tap_number;
            memory_.write(block_, job.result,
                          job.result.offset + (matrix * job.rows + row) * job.columns + column,
                          mine.sums[i][j]);
          } else {
            finish(group, tap, row, column, mine.sums[i][j]);
          }
        }
      }
    });
  }

  /// Threads of a number add what is `lanes` apart, and then each other's sums.
  CONCERTINA_DEVICE void reduce(int tile) {
    const Job& job = job_;
    const int numbers = contraction_threads / job.lanes;
    auto sums = block_.template shared<Sum>(contraction_threads);
    // Taps lie next to each other, then columns.
    const auto position = [&](int thread) {
      Offset number = static_cast<Offset>(tile) * numbers + thread / job.lanes;
      Element element{};
      element.exists = number < job.numbers();
      element.tap = static_cast<int>(number % job.taps);
      number /= job.taps;
      element.column = static_cast<int>(number % job.columns);
      number /= job.columns;
      element.row = static_cast<int>(number % job.rows);
      element.group = static_cast<int>(number / job.rows);
      return element;
    };
    block_.each_thread([&](int thread) {
      const Element at = position(thread);
      Sum sum(0);
      if (at.exists) {
        const Tap tap = tables_.taps[job.first_tap + at.tap];
        const Offset left = job.left.of_group(at.group) + job.left_row(at.row, job.row_divisor),
                     right = job.right.of_group(at.group) + at.column * job.right_column;
        const int terms = (tap.last_pair - tap.first_pair) * job.inner;
        for (int term = thread % job.lanes; term < terms; term += job.lanes) {
          const TapPair pair = tables_.pairs[tap.first_pair + term / job.inner];
          const int inner = term % job.inner;
          sum += memory_.read(block_, job.left,
                              left + pair.left + job.left_inner(inner, job.inner_divisor)) *
                 memory_.read(block_, job.right,
                              right + pair.right + job.right_inner(inner, job.inner_divisor));
        }
      }
      sums.set(thread, sum);
    });
    for (int half = job.lanes / 2; half > 0; half /= 2) {
      block_.each_thread([&](int thread) {
        if (thread % job.lanes < half) sums.set(thread, sums.get(thread) + sums.get(thread + half));
      });
    }
    block_.each_thread([&](int thread) {
      const Element at = position(thread);
      if (!at.exists || thread % job.lanes != 0) return;
      finish(at.group, tables_.taps[job.first_tap + at.tap], at.row, at.column, sums.get(thread));
    });
  }

  CONCERTINA_DEVICE void combine(int tile) {
    const Job& job = job_;
    each_element(tile, job.numbers(), [&](Offset number) {
      Sum sum(0);
      for (int split = 0; split < job.splits; ++split) {
        sum += memory_.read(block_, job.left, job.left.offset + split * job.numbers() + number);
      }
      const int column = static_cast<int>(number % job.columns);
      number /= job.columns;
      const int row = static_cast<int>(number % job.rows);
      number /= job.rows;
      finish(static_cast<int>(number / job.taps),
             tables_.taps[job.first_tap + static_cast<int>(number % job.taps)], row, column, sum);
    });
  }

  /// Through shared memory, so that both sides are touched along their near axis.
  CONCERTINA_DEVICE void move(int tile) {
    constexpr int side = detail::move_side, step = side + 1;
    const Job& job = job_;
    const int column_tiles = (job.columns + side - 1) / side,
              row_tiles = (job.rows + side - 1) / side;
    const int first_column = tile % column_tiles * side;
    tile /= column_tiles;
    const int first_row = tile % row_tiles * side, group = tile / row_tiles;
    auto numbers = block_.template shared<Sum>(side * step);
    const auto for_each = [&](int thread, bool columns_are_near, auto&& visit) {
      for (int number = thread; number < side * side; number += contraction_threads) {
        const int near = number % side, far = number / side;
        const int row = columns_are_near ? far : near, column = columns_are_near ? near : far;
        if (first_row + row < job.rows && first_column + column < job.columns) visit(row, column);
      }
    };
    block_.each_thread([&](int thread) {
      for_each(thread, job.right_column_is_near, [&](int row, int column) {
        numbers.set(
            row * step + column,
            memory_.read(block_, job.left,
                         job.left.of_group(group) + job.left_row(first_row + row, job.row_divisor) +
                             (first_column + column) * job.left_column));
      });
    });
    block_.each_thread([&](int thread) {
      for_each(thread, job.result_column == 1, [&](int row, int column) {
        finish(group, Tap{}, first_row + row, first_column + column,
               numbers.get(row * step + column));
      });
    });
  }

  CONCERTINA_DEVICE void copy(int tile) {
    const Job& job = job_;
    each_element(tile, job.columns, [&](Offset number) {
      memory_.write(
          block_, job.result, job.result.offset + number,
          job.left.exists() ? memory_.read(block_, job.left, job.left.offset + number) : Sum(0));
    });
  }

  struct Element {
    int group, tap, row, column;
    bool exists;
  };

  template <class Visit>
  CONCERTINA_DEVICE void each_element(int tile, Offset count, Visit&& visit) {
    block_.each_thread([&](int thread) {
      const Offset first = static_cast<Offset>(tile) * detail::elementwise_tile;
      for (Offset number = first + thread;
           number < count && number < first + detail::elementwise_tile;
           number += contraction_threads) {
        visit(number);
      }
    });
  }

  /// Writes a number of the result, with what the epilogue adds.
  CONCERTINA_DEVICE void finish(int group, const Tap& tap, int row, int column, Sum sum) {
    const Job& job = job_;
    if (job.addend.exists()) {
      sum += memory_.read(block_, job.addend, job.addend.of_group(group) + row);
    }
    if (job.factors.exists()) {
      sum +=
          memory_.read(block_, job.factors, job.factors.of_group(group) + row / job.row_divisor) *
          memory_.read(block_, job.bias, job.bias.of_group(group) + column);
    }
    memory_.write(block_, job.result,
                  job.result.of_group(group) + tap.result + job.result_row(row, job.row_divisor) +
                      column * job.result_column,
                  sum);
  }

  B& block_;
  const ContractionTables& tables_;
  const ContractionMemory<Stored, Sum>& memory_;
  const Job& job_;
};

/// Addresses of tensors by their number in the plan, copied to the device with each launch.
template <int Capacity>
struct Addresses {
  void* at[Capacity];
};

/// One phase: a block for each of its tiles.
/// Requires  everything that earlier phases write to be written
template <class Stored, class Sum, int Capacity>
struct PhaseProgram {
  static constexpr int threads = contraction_threads, capacity = Capacity;

  ContractionTables tables;
  Sum* workspace;
  int phase, tiles;
  Addresses<Capacity> addresses;

  Index blocks() const { return tiles; }
  std::size_t shared_bytes() const { return detail::contraction_shared_bytes<Sum>(); }

  template <Block B>
  CONCERTINA_DEVICE void operator()(B& block, Index tile) const {
    run(block, phase, static_cast<int>(tile));
  }

  template <Block B>
  CONCERTINA_DEVICE void run(B& block, int number, int tile) const {
    const Phase& at = tables.phases[number];
    int first = at.first_job, last = at.last_job;  // the job is in first .. last - 1
    while (last - first > 1) {
      const int middle = first + (last - first) / 2;
      if (tables.jobs[middle].first_tile <= tile) {
        first = middle;
      } else {
        last = middle;
      }
    }
    const Job& job = tables.jobs[first];
    const ContractionMemory<Stored, Sum> memory{addresses.at, workspace};
    ContractionTile<Stored, Sum, B>(block, tables, memory, job).run(tile - job.first_tile);
  }
};

}  // namespace concertina::cuda
