// Products of floats on tensor cores at the accuracy of float: BF16x6. A float is exactly the sum
// of three bfloat16 elements; of the nine products of two such sums the six large ones are added
// up, small ones first, and each 32 terms of a dot product go to a sum in float.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/cuda/detail/matrices.hpp>
#include <concertina/cuda/detail/phase_program.hpp>

#include <bit>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace concertina::cuda::detail {

/// Eight neighbours along k in bfloat16, the first in the low half of the first word.
struct alignas(16) Bf16Chunk {
  std::uint32_t pairs[4];
};

/// To bfloat16, rounded to nearest, ties to even; `low` in the low half.
CONCERTINA_HOST_DEVICE inline std::uint32_t bf16_pair(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  return 0;  // has no tensor cores for it: the host refuses
#elif defined(__CUDA_ARCH__)
  std::uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#else
  const auto rounded = [](float element) {
    const auto bits = std::bit_cast<std::uint32_t>(element);
    if ((bits & 0x7fffffff) > 0x7f800000) return std::uint32_t{0x7fff};
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  };
  return rounded(low) | rounded(high) << 16;
#endif
}
CONCERTINA_HOST_DEVICE inline float float_of_bits(std::uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  return std::bit_cast<float>(bits);
#endif
}
CONCERTINA_HOST_DEVICE inline float bf16_low(std::uint32_t pair) {
  return float_of_bits(pair << 16);
}
CONCERTINA_HOST_DEVICE inline float bf16_high(std::uint32_t pair) {
  return float_of_bits(pair & 0xffff0000U);
}

/// How many bfloat16 elements a float is the sum of.
inline constexpr int bf16_parts = 3;

/// Eight floats as the sum of three chunks, each the rest of those before, rounded. Exact for
/// elements from 2^-110 on.
struct Bf16Split {
  Bf16Chunk parts[bf16_parts];

  CONCERTINA_DEVICE explicit Bf16Split(const float (&elements)[8]) {
    CONCERTINA_UNROLL
    for (int i = 0; i < 4; ++i) {
      float low = elements[2 * i], high = elements[2 * i + 1];
      CONCERTINA_UNROLL
      for (int part = 0; part < bf16_parts; ++part) {
        const std::uint32_t pair = parts[part].pairs[i] = bf16_pair(low, high);
        low -= bf16_low(pair);
        high -= bf16_high(pair);
      }
    }
  }
};

/// A product's operand in shared memory as tensor cores read it: 128 rows (of A, or columns of B)
/// of 32 elements along k. A row's four chunks change places with its number, so that neither
/// writing neighbours along k nor writing neighbouring rows meets the same banks.
struct TensorCoreTile {
  static constexpr int rows = tuning::tensor_core_side, k = tuning::tensor_core_depth,
                       chunks = rows * k / 8;

  CONCERTINA_HOST_DEVICE static constexpr int place(int row, int chunk) {
    return row * (k / 8) + (chunk ^ (row >> 1 & 3));
  }
};

/// Of D, 64 x 128, kept by the 128 threads of a warp group: where element i of thread `thread` is.
struct AccumulatorLayout {
  static constexpr int elements = 64, m = 64;

  CONCERTINA_HOST_DEVICE static constexpr int row(int thread, int i) {
    return thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8;
  }
  CONCERTINA_HOST_DEVICE static constexpr int column(int thread, int i) {
    return i / 4 * 8 + thread % 4 * 2 + i % 2;
  }
};

/// A thread block with tensor cores:
/// - begin_multiply(), multiply_tiles(registers, member, a, a_first, b, b_first, half, add),
///   end_multiply() start D = A B^T, or D += A B^T, of two tiles' first or second 16 elements
///   along k, which start at chunks a_first and b_first; D is the member of each thread's
///   registers, of AccumulatorLayout, a warp group's rows 64 apart;
/// - wait_for_multiply(registers, member): only then may D be read, or what was multiplied be
///   written;
/// - publish(), by each thread after it has written tiles, before a barrier;
/// - each_thread_apart(f) is each_thread without a barrier;
/// - read(address, to) reads neighbours in global memory.
template <class B>
concept TensorCoreBlock = ThreadBlock<B> && requires(B& block, void (*of_thread)(int),
                                                     const float* from, float (&to)[8]) {
  block.begin_multiply();
  block.end_multiply();
  block.publish();
  block.each_thread_apart(of_thread);
  block.read(from, to);
};

/// The blocks of a launch, as one of them sees it, and what a program that shares tiles out among
/// any number of them asks of it:
/// - index() is the block's, of blocks();
/// - run(f) calls f(block); shared memory is uninitialised each time.
template <class G>
concept Grid = requires(G& grid) {
  { G::threads } -> std::convertible_to<int>;
  { grid.index() } -> std::convertible_to<int>;
  { grid.blocks() } -> std::convertible_to<int>;
};

/// Steps whose tiles are in shared memory: one that is multiplied, one that another warp group
/// still multiplies, one that is written.
inline constexpr int bf16x6_stages = 3;

/// A tile of 128 x 128 of a job of kind multiply_bf16x6, by two warp groups. While a step of 32
/// terms is multiplied, the next one's elements are split, and those after it loaded.
/// Source  Henry, Tang and Heinecke, "Leveraging the bfloat16 Artificial Intelligence Datatype for
///         Higher-Precision Computations", 2019; the bound is derived in docs/cuda.md
template <class Stored, TensorCoreBlock B>
class Bf16x6Tile {
 public:
  CONCERTINA_DEVICE Bf16x6Tile(B& block, const ContractionTables& tables,
                               const ContractionMemory<Stored, float>& memory, const Job& job)
      : block_(block), tables_(tables), memory_(memory), job_(job) {}

  CONCERTINA_DEVICE void run(int tile) {
    const Job job = job_;
    const int split = tile / job.c_tiles, c_tile = tile % job.c_tiles;
    const auto [group, tap_index, first_row, first_column] =
        tile_place(job, job.first_c_tile + c_tile);
    const Tap tap = tables_.taps[job.first_tap + tap_index];
    const int chunks = (job.k + depth - 1) / depth,
              all_steps = (tap.last_pair - tap.first_pair) * chunks,
              split_steps = (all_steps + job.splits - 1) / job.splits,
              first_step = split * split_steps;
    const int steps = all_steps - first_step < split_steps ? all_steps - first_step : split_steps;
    const Source<Stored, float> a(memory_, job.a, group), b(memory_, job.b, group);
    const int a_k = job.a_k.outer, b_k = job.b_k.outer;
    const bool a_is_k_major = job.a_is_k_major, b_is_k_major = !job.b_is_n_major;

    auto tiles = block_.template shared<Bf16Chunk>(stages * stage_chunks);
    typename B::template PerThread<Registers> registers(block_);
    struct Place {
      int row, chunk;
    };
    // Coalesced: neighbours in memory are loaded by neighbouring threads.
    const auto place = [](int thread, int load, bool is_k_major) {
      const int unit = thread + load * contraction_threads;
      return is_k_major ? Place{unit / (depth / 8), unit % (depth / 8)}
                        : Place{unit % side, unit / side};
    };
    // The step that is loaded next.
    int pair = tap.first_pair + first_step / chunks, chunk = first_step % chunks;
    const auto load = [&](Registers& to, int thread) {
      const TapPair offsets = tables_.pairs[pair];
      const int at_k = chunk * depth;
      const auto read = [&](const Source<Stored, float>& source, int at, int offset, int k,
                            int stride, float(&elements)[8]) {
        const int left = at < 0 ? 0 : job.k - at_k - k, first = at + offset + at_k * stride;
        if (left >= 8) {
          source.read(block_, first, stride, elements);
        } else {
          CONCERTINA_UNROLL
          for (int i = 0; i < 8; ++i) {
            elements[i] = i < left ? source.read(block_, first + i * stride) : 0.0F;
          }
        }
      };
      CONCERTINA_UNROLL
      for (int l = 0; l < loads; ++l) {
        read(a, to.a_at[l], offsets.a, place(thread, l, a_is_k_major).chunk * 8, a_k, to.a[l]);
        read(b, to.b_at[l], offsets.b, place(thread, l, b_is_k_major).chunk * 8, b_k, to.b[l]);
      }
    };
    const auto store = [&](const Registers& from, int thread, int step) {
      const int first = step % stages * stage_chunks;
      const auto write = [&](const float(&elements)[8], Place at, int operand) {
        const Bf16Split rounded(elements);
        CONCERTINA_UNROLL
        for (int part = 0; part < bf16_parts; ++part) {
          tiles.set(first + tile_of(operand, part) + TensorCoreTile::place(at.row, at.chunk),
                    rounded.parts[part]);
        }
      };
      CONCERTINA_UNROLL
      for (int l = 0; l < loads; ++l) {
        write(from.a[l], place(thread, l, a_is_k_major), 0);
        write(from.b[l], place(thread, l, b_is_k_major), 1);
      }
      block_.publish();
    };
    const auto advance = [&] {
      if (++chunk == chunks) chunk = 0, ++pair;
    };

    block_.each_thread([&](int thread) {
      Registers& mine = registers[thread];
      CONCERTINA_UNROLL
      for (int l = 0; l < loads; ++l) {
        const Place in_a = place(thread, l, a_is_k_major), in_b = place(thread, l, b_is_k_major);
        const int row = first_row + in_a.row, column = first_column + in_b.row;
        mine.a_at[l] = row < job.m ? job.a_m(row, job.m_inner_extent) + in_a.chunk * 8 * a_k : -1;
        mine.b_at[l] = column < job.n ? column * job.b_n + in_b.chunk * 8 * b_k : -1;
      }
      CONCERTINA_UNROLL
      for (float& sum : mine.sums) sum = 0;
      if (steps <= 0) return;
      load(mine, thread);
      store(mine, thread, 0);
    });
    advance();
    if (steps > 1) block_.each_thread_apart([&](int thread) { load(registers[thread], thread); });
    advance();
    for (int step = 0; step < steps; ++step) {
      multiply(tiles, registers, step);
      if (step + 1 < steps) {
        block_.each_thread([&](int thread) {
          Registers& mine = registers[thread];
          store(mine, thread, step + 1);
          if (step + 2 < steps) load(mine, thread);
        });
        advance();
      }
      block_.wait_for_multiply(registers, &Registers::products);
      block_.each_thread_apart([&](int thread) {
        Registers& mine = registers[thread];
        CONCERTINA_UNROLL
        for (int i = 0; i < AccumulatorLayout::elements; ++i) mine.sums[i] += mine.products[i];
      });
    }
    block_.each_thread([&](int thread) {
      const auto& sums = registers[thread].sums;
      if (job.splits == 1) {
        const Destination<Stored, float> c(memory_, job, group, tap);
        write(c, first_row, first_column, job.m, job.n, thread, sums);
      } else {
        float* const tiles_of_split =
            memory_.workspace + job.c.offset +
            static_cast<Offset>(split * job.c_tiles + c_tile) * side * side;
        const Destination<Stored, float> c(tiles_of_split, side);
        write(c, 0, 0, side, side, thread, sums);
      }
    });
  }

 private:
  static constexpr int side = tuning::tensor_core_side, depth = TensorCoreTile::k;
  static constexpr int stages = bf16x6_stages,
                       stage_chunks = 2 * bf16_parts * TensorCoreTile::chunks;
  static constexpr int loads = TensorCoreTile::chunks / contraction_threads;

  struct Registers {
    float sums[AccumulatorLayout::elements], products[AccumulatorLayout::elements];
    float a[loads][8], b[loads][8];
    int a_at[loads], b_at[loads];  // of the first step; negative for none
  };

  CONCERTINA_HOST_DEVICE static constexpr int tile_of(int operand, int part) {
    return (operand * bf16_parts + part) * TensorCoreTile::chunks;
  }

  /// Small products first, so that they are not lost beside large ones.
  template <class Tiles>
  CONCERTINA_DEVICE void multiply(const Tiles& tiles,
                                  typename B::template PerThread<Registers>& registers, int step) {
    constexpr int a_parts[] = {2, 0, 1, 1, 0, 0}, b_parts[] = {0, 2, 1, 0, 1, 0};
    const int first = step % stages * stage_chunks;
    block_.begin_multiply();
    CONCERTINA_UNROLL
    for (int i = 0; i < 6; ++i) {
      CONCERTINA_UNROLL
      for (int half = 0; half < 2; ++half) {
        block_.multiply_tiles(registers, &Registers::products, tiles,
                              first + tile_of(0, a_parts[i]), first + tile_of(1, b_parts[i]), half,
                              i + half > 0);
      }
    }
    block_.end_multiply();
  }

  /// The thread's elements of a tile that starts there, as far as they are inside m x n.
  CONCERTINA_DEVICE void write(const Destination<Stored, float>& c, int first_row, int first_column,
                               int m, int n, int thread,
                               const float (&sums)[AccumulatorLayout::elements]) {
    const int in_group = thread % 128, group_row = first_row + thread / 128 * AccumulatorLayout::m;
    CONCERTINA_UNROLL
    for (int half = 0; half < 2; ++half) {  // the thread's two rows
      const int row = group_row + AccumulatorLayout::row(in_group, 2 * half);
      if (row >= m) continue;
      const auto row_of_c = c.row(block_, row);
      CONCERTINA_UNROLL
      for (int i = 2 * half; i < AccumulatorLayout::elements; i += 4) {
        CONCERTINA_UNROLL
        for (int next = i; next < i + 2; ++next) {
          const int column = first_column + AccumulatorLayout::column(in_group, next);
          if (column < n) c.write(block_, row_of_c, column, sums[next]);
        }
      }
    }
  }

  B& block_;
  const ContractionTables& tables_;
  const ContractionMemory<Stored, float>& memory_;
  const Job& job_;
};

/// The tiles of a phase of multiply_bf16x6, by any number of blocks.
template <class Stored, int Capacity>
struct TensorCoreProgram {
  static constexpr int threads = contraction_threads, capacity = Capacity;

  ContractionTables tables;
  float* workspace;
  int phase;
  Addresses<Capacity> addresses;

  CONCERTINA_HOST_DEVICE static constexpr std::size_t shared_bytes() {
    constexpr int chunks = bf16x6_stages * 2 * bf16_parts * TensorCoreTile::chunks;
    return shared_size<Bf16Chunk>(chunks);
  }

  template <Grid G>
  CONCERTINA_DEVICE void operator()(G& grid) const {
    const Phase& here = tables.phases[phase];
    for (int tile = grid.index(); tile < here.tiles; tile += grid.blocks()) {
      grid.run([&](auto& block) {
        const Job& job = job_of(tables, here, tile);
        const ContractionMemory<Stored, float> memory{addresses.at, workspace};
        Bf16x6Tile<Stored, std::remove_reference_t<decltype(block)>>(block, tables, memory, job)
            .run(tile - job.first_tile);
      });
    }
  }
};

}  // namespace concertina::cuda::detail
