// The block programs that contract and differentiate: a launch runs the tiles of many jobs, each a
// matrix product over strided numbers, or what has to happen before or after one.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/cuda/detail/block.hpp>

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace concertina::cuda {

using Offset = std::int64_t;

/// Where an index along an axis lies: (i / divisor) * high + (i % divisor) * low, the divisor being
/// the job's. So channels and taps can be one axis although other channels lie between. No tensor
/// has 2^31 numbers.
struct Stride {
  int high = 0, low = 0;

  CONCERTINA_HOST_DEVICE constexpr int operator()(int i, int divisor) const {
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
    multiply,         ///< tiles of 64 x 64
    multiply_small,   ///< tiles of 32 x 32
    multiply_narrow,  ///< tiles of 128 x 8
    reduce,           ///< `lanes` threads for each number of the result
    combine,          ///< result = sum of the splits of a product, at `left`
    move,             ///< result(row, column) = left(row, column)
    copy              ///< `columns` numbers in a row; zeros where there is no left
  };

  Kind kind = Kind::multiply;
  int first_tile = 0;  ///< in its phase
  int groups = 1, taps = 1, rows = 1, columns = 1, inner = 0;
  int row_divisor = 1, inner_divisor = 1;
  Place left = {}, right = {}, result = {};
  Stride left_row = {}, left_inner = {}, right_inner = {}, result_row = {};
  int right_column = 0, result_column = 0, left_column = 0;  // left_column: move
  int first_tap = 0;
  int splits = 1, split_inner = 0;  ///< parts of the inner length, and the length of one
  int lanes = 1;
  bool left_inner_is_near = true;    ///< neighbours along it lie nearer than along the rows
  bool right_column_is_near = true;  ///< move: of the left's columns
  /// Epilogue: + addend(row) + factors(row / row_divisor) * bias(column).
  Place addend = {}, factors = {}, bias = {};
  int chain = 0;  ///< for messages

  CONCERTINA_HOST_DEVICE constexpr Offset numbers() const {
    return static_cast<Offset>(groups) * taps * rows * columns;
  }
};

/// A tap of the result, and the pairs of factors' taps that meet there.
struct Tap {
  int result = 0, first_pair = 0, last_pair = 0;
};
struct TapPair {
  int left = 0, right = 0;
};

/// Jobs that do not depend on each other, and the tiles that they have together.
struct Phase {
  int first_job = 0, last_job = 0, tiles = 0;
};

inline constexpr int contraction_threads = 256;

namespace detail {

/// A tile of a result, how far the factors' tiles reach along the inner length, and the numbers of
/// the result that one thread keeps.
struct TileShape {
  int rows, columns, depth, each_row, each_column;

  CONCERTINA_HOST_DEVICE constexpr int left_loads() const {
    return (rows * depth + contraction_threads - 1) / contraction_threads;
  }
  CONCERTINA_HOST_DEVICE constexpr int right_loads() const {
    return (columns * depth + contraction_threads - 1) / contraction_threads;
  }
  /// Threads along a row.
  CONCERTINA_HOST_DEVICE constexpr int across() const { return columns / each_column; }
};
inline constexpr TileShape large_tile{64, 64, 16, 4, 4}, small_tile{32, 32, 32, 2, 2},
    narrow_tile{128, 8, 16, 4, 1};
inline constexpr int elementwise_tile = 4 * contraction_threads, move_side = 32;

constexpr int tiles_along(Offset count, int side) {
  return static_cast<int>((count + side - 1) / side);
}

/// Tiles that a job has.
constexpr int tiles_of(const Job& job) {
  const auto product = [&](TileShape tile) {
    return job.groups * job.taps * job.splits * tiles_along(job.rows, tile.rows) *
           tiles_along(job.columns, tile.columns);
  };
  switch (job.kind) {
    case Job::Kind::multiply: return product(large_tile);
    case Job::Kind::multiply_small: return product(small_tile);
    case Job::Kind::multiply_narrow: return product(narrow_tile);
    case Job::Kind::reduce: return tiles_along(job.numbers(), contraction_threads / job.lanes);
    case Job::Kind::combine: return tiles_along(job.numbers(), elementwise_tile);
    case Job::Kind::move:
      return tiles_along(job.rows, move_side) * tiles_along(job.columns, move_side);
    case Job::Kind::copy: return tiles_along(job.columns, elementwise_tile);
  }
  return 0;
}

/// So that a column of a tile, which is what threads read together, does not fall on one bank.
inline constexpr int padding = 4;

template <class Sum>
constexpr std::size_t contraction_shared_bytes() {
  std::size_t most = 0;
  for (const TileShape tile : {large_tile, small_tile, narrow_tile}) {
    const auto numbers = [&](int side) {
      return static_cast<std::size_t>((side + padding) * tile.depth);
    };
    const std::size_t bytes =
        shared_size<Sum>(numbers(tile.rows)) + shared_size<Sum>(numbers(tile.columns));
    most = bytes > most ? bytes : most;
  }
  return most;
}

}  // namespace detail

/// The tables of a sequence of phases, in the device's memory.
struct ContractionTables {
  const Job* jobs;
  const Tap* taps;
  const TapPair* pairs;
  const Phase* phases;
};

/// From a stored number to a sum and back, rounded to nearest. Specialised where that is not a
/// cast: for CUDA's half types in contraction.cuh.
template <class Stored, class Sum>
struct Conversion {
  CONCERTINA_DEVICE static Sum load(Stored number) { return static_cast<Sum>(number); }
  CONCERTINA_DEVICE static Stored store(Sum sum) { return static_cast<Stored>(sum); }
};

/// Where tensors of Stored lie, and the workspace, whose numbers are sums.
template <class Stored, class Sum>
struct ContractionMemory {
  void* const* addresses;
  Sum* workspace;

  template <class B>
  CONCERTINA_DEVICE Sum read(B& block, const Place& place, Offset at) const {
    if (place.operand == Place::workspace) return block.read(workspace + at);
    return Conversion<Stored, Sum>::load(
        block.read(static_cast<const Stored*>(addresses[place.operand]) + at));
  }
  template <class B>
  CONCERTINA_DEVICE void write(B& block, const Place& place, Offset at, Sum value) const {
    if (place.operand == Place::workspace) {
      block.write(workspace + at, value);
    } else {
      block.write(static_cast<Stored*>(addresses[place.operand]) + at,
                  Conversion<Stored, Sum>::store(value));
    }
  }
};

/// A matrix that is read again and again, with its address looked up once.
template <class Stored, class Sum>
class Source {
 public:
  CONCERTINA_DEVICE Source(const ContractionMemory<Stored, Sum>& memory, const Place& place,
                           int group) {
    const Offset at = place.of_group(group);
    if (place.operand == Place::workspace) {
      sums_ = memory.workspace + at;
    } else if constexpr (is_mixed) {
      stored_ = static_cast<const Stored*>(memory.addresses[place.operand]) + at;
    } else {
      sums_ = static_cast<const Sum*>(memory.addresses[place.operand]) + at;
    }
  }

  template <class B>
  CONCERTINA_DEVICE Sum read(B& block, int at) const {
    if constexpr (is_mixed) {
      if (stored_) return Conversion<Stored, Sum>::load(block.read(stored_ + at));
    }
    return block.read(sums_ + at);
  }

 private:
  static constexpr bool is_mixed = !std::is_same_v<Stored, Sum>;
  const Sum* sums_ = nullptr;
  const Stored* stored_ = nullptr;
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
      case Job::Kind::multiply_narrow: return multiply<detail::narrow_tile>(tile);
      case Job::Kind::reduce: return reduce(tile);
      case Job::Kind::combine: return combine(tile);
      case Job::Kind::move: return move(tile);
      case Job::Kind::copy: return copy(tile);
    }
  }

 private:
  /// Each thread keeps neighbouring sums in registers: in the large tile it reads twice four
  /// numbers of shared memory for sixteen multiply-adds, in the others two and two or four and one
  /// for four. Where a thread's numbers of the factors lie is worked out once; the next tiles are
  /// on their way from memory while this one's are multiplied.
  template <detail::TileShape shape>
  CONCERTINA_DEVICE void multiply(int tile) {
    constexpr int left_loads = shape.left_loads(), right_loads = shape.right_loads(),
                  left_step = shape.rows + detail::padding,
                  right_step = shape.columns + detail::padding;
    static_assert(shape.rows / shape.each_row * shape.across() == contraction_threads);
    struct Registers {
      Sum sums[shape.each_row][shape.each_column], left[left_loads], right[right_loads];
      int left_at[left_loads], right_at[right_loads];  // of the first step; negative for none
    };
    const Job& job = job_;
    const int column_tiles = (job.columns + shape.columns - 1) / shape.columns,
              row_tiles = (job.rows + shape.rows - 1) / shape.rows;
    const int first_column = tile % column_tiles * shape.columns;
    tile /= column_tiles;
    const int first_row = tile % row_tiles * shape.rows;
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
    const Source<Stored, Sum> left(memory_, job.left, group), right(memory_, job.right, group);
    // What each step needs, or it would be read again after each barrier.
    const Stride left_inner = job.left_inner, right_inner = job.right_inner;
    const int inner_divisor = job.inner_divisor;
    const bool inner_is_even = inner_divisor == 1, left_inner_is_near = job.left_inner_is_near,
               right_inner_is_near = !job.right_column_is_near;

    auto left_tile = block_.template shared<Sum>(left_step * shape.depth),
         right_tile = block_.template shared<Sum>(right_step * shape.depth);
    typename B::template PerThread<Registers> registers(block_);

    // Which of a tile's numbers a thread loads: neighbours in memory by neighbouring threads.
    struct Position {
      int side, depth;
    };
    const auto position = [](int thread, int load, int side, bool depth_is_near) {
      const int number = thread + load * contraction_threads;
      return depth_is_near ? Position{number / shape.depth, number % shape.depth}
                           : Position{number % side, number / side};
    };
    const auto left_position = [&](int thread, int load) {
      return position(thread, load, shape.rows, left_inner_is_near);
    };
    const auto right_position = [&](int thread, int load) {
      return position(thread, load, shape.columns, right_inner_is_near);
    };
    const auto load = [&](Registers& to, int thread, int step) {
      const TapPair pair = tables_.pairs[tap.first_pair + step / chunks];
      const int inner = first_inner + step % chunks * shape.depth;
      const auto read = [&](const Source<Stored, Sum>& source, int at, int depth, int pair_offset,
                            const Stride& stride) {
        if (at < 0 || inner + depth >= end_inner) return Sum(0);
        const int along =
            inner_is_even ? inner * stride.high : stride(inner + depth, inner_divisor);
        return source.read(block_, at + pair_offset + along);
      };
      CONCERTINA_UNROLL
      for (int l = 0; l < left_loads; ++l) {
        to.left[l] =
            read(left, to.left_at[l], left_position(thread, l).depth, pair.left, left_inner);
      }
      CONCERTINA_UNROLL
      for (int l = 0; l < right_loads; ++l) {
        to.right[l] =
            read(right, to.right_at[l], right_position(thread, l).depth, pair.right, right_inner);
      }
    };

    block_.each_thread([&](int thread) {
      Registers& mine = registers[thread];
      CONCERTINA_UNROLL
      for (int l = 0; l < left_loads; ++l) {
        const auto [row, depth] = left_position(thread, l);
        const bool inside = depth < shape.depth && row < shape.rows && first_row + row < job.rows;
        mine.left_at[l] = !inside ? -1
                                  : job.left_row(first_row + row, job.row_divisor) +
                                        (inner_is_even ? depth * left_inner.high : 0);
      }
      CONCERTINA_UNROLL
      for (int l = 0; l < right_loads; ++l) {
        const auto [column, depth] = right_position(thread, l);
        const bool inside =
            depth < shape.depth && column < shape.columns && first_column + column < job.columns;
        mine.right_at[l] = !inside ? -1
                                   : (first_column + column) * job.right_column +
                                         (inner_is_even ? depth * right_inner.high : 0);
      }
      CONCERTINA_UNROLL
      for (int i = 0; i < shape.each_row; ++i) {
        CONCERTINA_UNROLL
        for (int j = 0; j < shape.each_column; ++j) mine.sums[i][j] = Sum(0);
      }
      if (steps > 0) load(mine, thread, 0);
    });
    for (int step = 0; step < steps; ++step) {
      block_.each_thread([&](int thread) {
        const Registers& mine = registers[thread];
        CONCERTINA_UNROLL
        for (int l = 0; l < left_loads; ++l) {
          const auto [row, depth] = left_position(thread, l);
          if (depth < shape.depth && row < shape.rows) {
            left_tile.set(depth * left_step + row, mine.left[l]);
          }
        }
        CONCERTINA_UNROLL
        for (int l = 0; l < right_loads; ++l) {
          const auto [column, depth] = right_position(thread, l);
          if (depth < shape.depth && column < shape.columns) {
            right_tile.set(depth * right_step + column, mine.right[l]);
          }
        }
      });
      block_.each_thread([&](int thread) {
        Registers& mine = registers[thread];
        if (step + 1 < steps) load(mine, thread, step + 1);
        CONCERTINA_UNROLL_BY(8)
        for (int depth = 0; depth < shape.depth; ++depth) {
          Sum rows[shape.each_row], columns[shape.each_column];
          left_tile.get(depth * left_step + thread / shape.across() * shape.each_row, rows);
          right_tile.get(depth * right_step + thread % shape.across() * shape.each_column, columns);
          CONCERTINA_UNROLL
          for (int i = 0; i < shape.each_row; ++i) {
            CONCERTINA_UNROLL
            for (int j = 0; j < shape.each_column; ++j) mine.sums[i][j] += rows[i] * columns[j];
          }
        }
      });
    }
    block_.each_thread([&](int thread) {
      const Registers& mine = registers[thread];
      CONCERTINA_UNROLL
      for (int i = 0; i < shape.each_row; ++i) {
        CONCERTINA_UNROLL
        for (int j = 0; j < shape.each_column; ++j) {
          const int row = first_row + thread / shape.across() * shape.each_row + i,
                    column = first_column + thread % shape.across() * shape.each_column + j;
          if (row >= job.rows || column >= job.columns) continue;
          if (job.splits > 1) {
            const Offset matrix =
                (static_cast<Offset>(split) * job.groups + group) * job.taps + tap_number;
            memory_.write(block_, job.result,
                          job.result.offset + (matrix * job.rows + row) * job.columns + column,
                          mine.sums[i][j]);
          } else {
            finish(job, group, tap, row, column, mine.sums[i][j]);
          }
        }
      }
    });
  }

  /// Threads of a number add what is `lanes` apart, and then each other's sums.
  CONCERTINA_DEVICE void reduce(int tile) {
    const Job job = job_;
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
        const Source<Stored, Sum> left(memory_, job.left, at.group),
            right(memory_, job.right, at.group);
        const int left_at = job.left_row(at.row, job.row_divisor),
                  right_at = at.column * job.right_column;
        const int terms = (tap.last_pair - tap.first_pair) * job.inner;
        for (int term = thread % job.lanes; term < terms; term += job.lanes) {
          const TapPair pair = tables_.pairs[tap.first_pair + term / job.inner];
          const int inner = term % job.inner;
          sum +=
              left.read(block_, left_at + pair.left + job.left_inner(inner, job.inner_divisor)) *
              right.read(block_, right_at + pair.right + job.right_inner(inner, job.inner_divisor));
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
      finish(job, at.group, tables_.taps[job.first_tap + at.tap], at.row, at.column,
             sums.get(thread));
    });
  }

  CONCERTINA_DEVICE void combine(int tile) {
    const Job job = job_;
    each_element(tile, job.numbers(), [&](Offset number) {
      Sum sum(0);
      for (int split = 0; split < job.splits; ++split) {
        sum += memory_.read(block_, job.left, job.left.offset + split * job.numbers() + number);
      }
      const int column = static_cast<int>(number % job.columns);
      number /= job.columns;
      const int row = static_cast<int>(number % job.rows);
      number /= job.rows;
      finish(job, static_cast<int>(number / job.taps),
             tables_.taps[job.first_tap + static_cast<int>(number % job.taps)], row, column, sum);
    });
  }

  /// Through shared memory, so that both sides are touched along their near axis.
  CONCERTINA_DEVICE void move(int tile) {
    constexpr int side = detail::move_side, step = side + 1;
    const Job job = job_;
    const int column_tiles = (job.columns + side - 1) / side;
    const int first_column = tile % column_tiles * side, first_row = tile / column_tiles * side;
    const Source<Stored, Sum> left(memory_, job.left, 0);
    auto numbers = block_.template shared<Sum>(side * step);
    const auto for_each = [&](int thread, bool columns_are_near, auto&& visit) {
      CONCERTINA_UNROLL
      for (int number = thread; number < side * side; number += contraction_threads) {
        const int near = number % side, far = number / side;
        const int row = columns_are_near ? far : near, column = columns_are_near ? near : far;
        if (first_row + row < job.rows && first_column + column < job.columns) visit(row, column);
      }
    };
    block_.each_thread([&](int thread) {
      for_each(thread, job.right_column_is_near, [&](int row, int column) {
        numbers.set(row * step + column,
                    left.read(block_, job.left_row(first_row + row, job.row_divisor) +
                                          (first_column + column) * job.left_column));
      });
    });
    block_.each_thread([&](int thread) {
      for_each(thread, job.result_column == 1, [&](int row, int column) {
        finish(job, 0, Tap{}, first_row + row, first_column + column,
               numbers.get(row * step + column));
      });
    });
  }

  CONCERTINA_DEVICE void copy(int tile) {
    const Job job = job_;
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
  CONCERTINA_DEVICE void finish(const Job& job, int group, const Tap& tap, int row, int column,
                                Sum sum) {
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

/// Phases one after another, on any number of blocks: each runs its share of a phase's tiles, and
/// waits for the others before the next phase.
/// Requires  everything that earlier phases write to be written
template <class Stored, class Sum, int Capacity>
struct PhaseProgram {
  static constexpr int threads = contraction_threads, capacity = Capacity;
  /// Blocks that a multiprocessor is to hold, whatever the compiler would rather keep in registers.
  static constexpr int resident = sizeof(Sum) == sizeof(double) ? 1 : 2;

  ContractionTables tables;
  Sum* workspace;
  int first_phase, last_phase;  ///< first_phase .. last_phase - 1
  Addresses<Capacity> addresses;

  std::size_t shared_bytes() const { return detail::contraction_shared_bytes<Sum>(); }

  template <Grid G>
  CONCERTINA_DEVICE void operator()(G& grid) const {
    for (int phase = first_phase; phase < last_phase; ++phase) {
      const int tiles = tables.phases[phase].tiles;
      for (int tile = grid.number(); tile < tiles; tile += grid.blocks()) {
        grid.run([&](auto& block) { run(block, tables.phases[phase], tile); });
      }
      if (phase + 1 < last_phase) grid.sync();
    }
  }

 private:
  template <Block B>
  CONCERTINA_DEVICE void run(B& block, const Phase& phase, int tile) const {
    int first = phase.first_job, last = phase.last_job;  // the job is in first .. last - 1
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
