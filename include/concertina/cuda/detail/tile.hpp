// What one thread block does for a tile of a job.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/cuda/detail/job.hpp>
#include <concertina/cuda/detail/matrices.hpp>

namespace concertina::cuda::detail {

/// What one thread block does for a tile of a job, with code for tiled products or without.
template <class Stored, class Sum, bool Products, ThreadBlock B>
class ContractionTile {
 public:
  CONCERTINA_DEVICE ContractionTile(B& block, const ContractionTables& tables,
                                    const ContractionMemory<Stored, Sum>& memory, const Job& job)
      : block_(block), tables_(tables), memory_(memory), job_(job) {}

  CONCERTINA_DEVICE void run(int tile) {
    if (job_.kind == Job::Kind::reduce) return reduce(tile);
    if constexpr (Products) {
      switch (job_.kind) {
        case Job::Kind::multiply: return multiply<tuning::large_tile>(tile);
        case Job::Kind::multiply_small: return multiply<tuning::small_tile>(tile);
        case Job::Kind::multiply_narrow: return multiply<tuning::narrow_tile>(tile);
        default: break;
      }
    }
    if (job_.kind == Job::Kind::combine) return combine(tile);
    block_.wait();
    switch (job_.kind) {
      case Job::Kind::depthwise_chain: return depthwise_chain(tile);
      case Job::Kind::combine_tiles: return combine_tiles(tile);
      case Job::Kind::fold: return fold(tile);
      case Job::Kind::unfold: return unfold(tile);
      case Job::Kind::copy: return copy(tile);
      case Job::Kind::add_branches: return add_branches(tile);
      case Job::Kind::take_branch: return take_branch(tile);
      default: break;
    }
  }

 private:
  struct Element {
    int group, row, column, tap;
  };

  CONCERTINA_DEVICE Tap tap_of(const Job& job, int index) const {
    return job.first_tap == Job::identity_tap ? Tap{0, 0, 1} : tables_.taps[job.first_tap + index];
  }
  CONCERTINA_DEVICE TapPair pair_of(int index) const {
    return index == 0 ? TapPair{} : tables_.pairs[index];
  }

  /// In the order of weights: taps lie next to each other, then columns.
  CONCERTINA_DEVICE static Element element(const Job& job, ElementIndex index) {
    const auto [in_row, tap] = job.taps.divide(index);
    const auto [row_index, column] = job.n.divide(static_cast<ElementIndex>(in_row));
    const auto [group, row] = job.m.divide(static_cast<ElementIndex>(row_index));
    return {group, row, column, tap};
  }
  /// In the order of a product's partial sums.
  CONCERTINA_DEVICE static Element element_of_sums(const Job& job, ElementIndex index) {
    const auto [row_index, column] = job.n.divide(index);
    const auto [matrix, row] = job.m.divide(static_cast<ElementIndex>(row_index));
    const auto [group, tap] = job.taps.divide(static_cast<ElementIndex>(matrix));
    return {group, row, column, tap};
  }

  /// A thread's fragment of an operand's tile, `size` x `depth`: elements on their way from global
  /// to shared memory.
  template <int size, int depth>
  class Fragment {
   public:
    static constexpr int ld = size + tuning::bank_padding;

    /// The k of all elements of a thread where k is the major mode: 8 threads load neighbours, a
    /// sector of global memory, and 4 groups of them store to different banks.
    CONCERTINA_DEVICE static int k_of(int thread) {
      return thread / 32 % (depth / 8) * 8 + thread % 8;
    }

    /// Coalesced: neighbours in memory are loaded by neighbouring threads. offset(side, k) is where
    /// an element is in the first step.
    template <class Offsets>
    CONCERTINA_DEVICE void place(int thread, bool is_k_major, Offsets&& offset) {
      const int side = is_k_major ? thread / (4 * depth) * 4 + thread / 8 % 4 : thread % size,
                side_step = is_k_major ? contraction_threads / depth : 0;
      k_ = is_k_major ? k_of(thread) : thread / size;
      k_step_ = is_k_major ? 0 : contraction_threads / size;
      shared_ = k_ * ld + side;
      shared_step_ = k_step_ * ld + side_step;
      CONCERTINA_UNROLL
      for (int l = 0; l < loads; ++l) at_[l] = offset(side + l * side_step, k_ + l * k_step_);
    }
    /// A step's elements, so much further on, and zeros from k = rest on.
    CONCERTINA_DEVICE void load(B& block, int thread, const Source<Stored, Sum>& from, int offset,
                                int rest) {
      const auto load_if = [&](auto&& inside) {
        CONCERTINA_UNROLL
        for (int l = 0; l < loads; ++l) {
          elements_[l] =
              exists(thread, l) && inside(l) ? from.read(block, offset + at_[l]) : Sum(0);
        }
      };
      if (rest >= depth) {
        load_if([](int) { return true; });
      } else {
        load_if([&](int l) { return k_ + l * k_step_ < rest; });
      }
    }
    template <class Tile>
    CONCERTINA_DEVICE void store(int thread, Tile& tiles, int first) const {
      CONCERTINA_UNROLL
      for (int l = 0; l < loads; ++l) {
        if (exists(thread, l)) tiles.set(first + shared_ + l * shared_step_, elements_[l]);
      }
    }

   private:
    static constexpr int loads = (size * depth + contraction_threads - 1) / contraction_threads;
    CONCERTINA_DEVICE static bool exists(int thread, int l) {
      return size * depth % contraction_threads == 0 ||
             thread + l * contraction_threads < size * depth;
    }

    Sum elements_[loads];
    int at_[loads], k_, k_step_, shared_, shared_step_;
  };

  /// A tiled GEMM, double-buffered through registers: the next step's loads are in flight while
  /// this one's tiles are multiplied. Rows and columns beyond C's are computed from its last ones
  /// and not written.
  template <TileShape shape>
  CONCERTINA_DEVICE void multiply(int tile) {
    constexpr int slices = shape.slices(), slice_k = shape.k / slices,
                  rows_of_slice = shape.thread_m / slices;
    static_assert(slices * shape.threads() == contraction_threads && slice_k * slices == shape.k &&
                  rows_of_slice * slices == shape.thread_m);
    using FragmentOfA = Fragment<shape.m, shape.k>;
    using FragmentOfB = Fragment<shape.n, shape.k>;
    struct Registers {
      Sum sums[shape.thread_m][shape.thread_n];
      FragmentOfA a;
      FragmentOfB b;
      int k_outer, k_inner, first_k_outer, first_k_inner;  // of the step, of a pair's first
    };
    const Job& job = job_;
    const auto next = [&](int extent) {  // mode of the tile's index
      const auto [rest, index] = divide(static_cast<ElementIndex>(tile), extent);
      tile = rest;
      return index;
    };
    const int first_column = next((job.n + shape.n - 1) / shape.n) * shape.n,
              first_row = next((job.m + shape.m - 1) / shape.m) * shape.m;
    const int split = next(job.splits), tap_index = next(job.taps), group = tile;
    const Tap tap = tap_of(job, tap_index);
    const bool shares_pairs = job.shares_pairs();
    const int pairs = tap.last_pair - tap.first_pair,
              first_pair = tap.first_pair + (shares_pairs ? pairs * split / job.splits : 0),
              last_pair =
                  shares_pairs ? tap.first_pair + pairs * (split + 1) / job.splits : tap.last_pair;
    const int first_k = shares_pairs ? 0 : split * job.split_k,
              end_k = first_k + job.split_k < job.k ? first_k + job.split_k : job.k;
    const Source<Stored, Sum> a(memory_, job.a, group), b(memory_, job.b, group);
    // In registers, or it would be read again after each barrier.
    const TwoModeStride a_k = job.a_k, b_k = job.b_k;
    const int k_inner_extent = job.k_inner_extent;
    const auto k_step = job.k_inner_extent.divide(shape.k);
    // Where k is two modes, a thread's elements have one k, that of both operands.
    const bool k_is_one_mode = k_inner_extent == 1,
               a_is_k_major = job.a_is_k_major || !k_is_one_mode,
               b_is_k_major = !job.b_is_n_major || !k_is_one_mode;

    constexpr int b_tile = FragmentOfA::ld * shape.k,  // after A's
        shared_elements = detail::shared_elements(shape);
    auto tiles = block_.template shared<Sum>(shared_elements);
    typename B::template PerThread<Registers> registers(block_);

    int pair_index = first_pair, rest = end_k - first_k;  // of the step that is loaded next
    bool more = pair_index < last_pair && rest > 0;
    TapPair pair = more ? pair_of(pair_index) : TapPair{};
    const auto load = [&](Registers& mine, int thread) {
      const auto along = [&](const TwoModeStride& stride) {
        return mine.k_outer * stride.outer + mine.k_inner * stride.inner;
      };
      mine.a.load(block_, thread, a, pair.a + along(a_k), rest);
      mine.b.load(block_, thread, b, pair.b + along(b_k), rest);
    };

    // Of a thread's sums.
    const auto row_of = [](int thread) {
      return thread % shape.threads() / shape.threads_n() * shape.thread_m;
    };
    const auto column_of = [](int thread) { return thread % shape.threads_n() * shape.thread_n; };

    block_.each_thread([&](int thread) {
      Registers& mine = registers[thread];
      const auto inside = [](int i, int size) { return i < size ? i : size - 1; };
      mine.a.place(thread, a_is_k_major, [&](int row, int k) {
        return job.a_m(inside(first_row + row, job.m), job.m_inner_extent) +
               (k_is_one_mode ? k * a_k.outer : 0);
      });
      mine.b.place(thread, b_is_k_major, [&](int column, int k) {
        return inside(first_column + column, job.n) * job.b_n + (k_is_one_mode ? k * b_k.outer : 0);
      });
      CONCERTINA_UNROLL
      for (int i = 0; i < shape.thread_m; ++i) {
        CONCERTINA_UNROLL
        for (int j = 0; j < shape.thread_n; ++j) mine.sums[i][j] = Sum(0);
      }
      const int k = first_k + (k_is_one_mode ? 0 : FragmentOfA::k_of(thread));
      const auto [k_outer, k_inner] = job.k_inner_extent.divide(static_cast<ElementIndex>(k));
      mine.first_k_outer = mine.k_outer = k_outer;
      mine.first_k_inner = mine.k_inner = k_inner;
      block_.wait();
      if (more) load(mine, thread);
    });
    while (more) {
      block_.each_thread([&](int thread) {
        registers[thread].a.store(thread, tiles, 0);
        registers[thread].b.store(thread, tiles, b_tile);
      });
      rest -= shape.k;
      const bool starts_pair = rest <= 0;
      if (starts_pair) {
        rest = end_k - first_k;
        more = ++pair_index < last_pair;
        if (more) pair = pair_of(pair_index);
      }
      block_.each_thread([&](int thread) {
        Registers& mine = registers[thread];
        mine.k_outer += k_step.quotient;
        mine.k_inner += k_step.remainder;
        if (mine.k_inner >= k_inner_extent) {
          mine.k_inner -= k_inner_extent;
          ++mine.k_outer;
        }
        if (starts_pair) {
          mine.k_outer = mine.first_k_outer;
          mine.k_inner = mine.first_k_inner;
        }
        if (more) load(mine, thread);
        const int first = thread / shape.threads() * slice_k;
        CONCERTINA_UNROLL
        for (int k = 0; k < slice_k; ++k) {
          Sum rows[shape.thread_m], columns[shape.thread_n];
          tiles.get((first + k) * FragmentOfA::ld + row_of(thread), rows);
          tiles.get(b_tile + (first + k) * FragmentOfB::ld + column_of(thread), columns);
          CONCERTINA_UNROLL
          for (int i = 0; i < shape.thread_m; ++i) {
            CONCERTINA_UNROLL
            for (int j = 0; j < shape.thread_n; ++j) mine.sums[i][j] += rows[i] * columns[j];
          }
        }
      });
    }
    const Offset matrix = (static_cast<Offset>(split) * job.groups + group) * job.taps + tap_index;
    const Destination<Stored, Sum> c =
        job.splits > 1 ? Destination<Stored, Sum>(
                             memory_.workspace + job.c.offset + matrix * job.m * job.n, job.n)
                       : Destination<Stored, Sum>(memory_, job, group, tap);
    // The slices' sums are exchanged, and each writes some of the rows.
    const auto sum_at = [](int slice, int i, int j, int thread) {
      return ((slice * shape.thread_m + i) * shape.thread_n + j) * shape.threads() +
             thread % shape.threads();
    };
    if constexpr (slices > 1) {
      block_.each_thread([&](int thread) {
        CONCERTINA_UNROLL
        for (int i = 0; i < shape.thread_m; ++i) {
          CONCERTINA_UNROLL
          for (int j = 0; j < shape.thread_n; ++j) {
            tiles.set(sum_at(thread / shape.threads(), i, j, thread), registers[thread].sums[i][j]);
          }
        }
      });
    }
    const int rows = job.m - first_row, columns = job.n - first_column;
    block_.each_thread([&](int thread) {
      CONCERTINA_UNROLL
      for (int r = 0; r < rows_of_slice; ++r) {
        const int i = thread / shape.threads() * rows_of_slice + r, row = row_of(thread) + i;
        if (row >= rows) break;
        const auto row_of_c = c.row(block_, first_row + row);
        CONCERTINA_UNROLL
        for (int j = 0; j < shape.thread_n; ++j) {
          const int column = column_of(thread) + j;
          if (column >= columns) break;
          Sum sum(0);
          if constexpr (slices == 1) {
            sum = registers[thread].sums[r][j];
          } else {
            CONCERTINA_UNROLL
            for (int slice = 0; slice < slices; ++slice) {
              sum += tiles.get(sum_at(slice, i, j, thread));
            }
          }
          c.write(block_, row_of_c, first_column + column, sum);
        }
      }
    });
  }

  CONCERTINA_DEVICE void reduce(int tile) {
    if (job_.has_several) return reduce_several(tile);
    add_up<true>(
        tile, [&](ElementIndex index) { return element(job_, index); },
        [&](const Element& at, ElementIndex, int lane) { return terms_of(at, lane); });
  }

  CONCERTINA_DEVICE void combine(int tile) {
    add_up<false>(
        tile, [&](ElementIndex index) { return element_of_sums(job_, index); },
        [&](const Element&, ElementIndex index, int lane) {
          const Offset size = job_.size();
          const Sum* const sums = memory_.workspace + job_.a.offset + index;
          const int splits = job_.splits, threads = job_.threads_per_element;
          return [=, this] {
            Sum sum(0);
            CONCERTINA_UNROLL_BY(tuning::loads_in_flight)
            for (int split = lane; split < splits; split += threads) {
              sum += block_.read(sums + split * size);
            }
            return sum;
          };
        });
  }

  /// C, each element the sum of what its threads find, which is added in a tree. The threads of an
  /// element are neighbours, or those of neighbouring elements are: whose loads lie side by side.
  /// find(element, index, lane) looks up where a thread's share is, and what it returns adds it up.
  template <bool are_neighbours, class Place, class Find>
  CONCERTINA_DEVICE void add_up(int tile, Place&& place, Find&& find) {
    using C = Destination<Stored, Sum>;
    struct Result {
      C c;
      typename C::Element element;
    };
    const int threads = job_.threads_per_element,
              elements = divide(contraction_threads, threads).quotient,
              distance = are_neighbours ? 1 : elements;
    const auto size = static_cast<ElementIndex>(job_.size());
    auto sums = block_.template shared<Sum>(contraction_threads);
    typename B::template PerThread<Result> results(block_);
    // Both numbers are powers of two.
    const auto lane_of = [&](int thread) {
      return are_neighbours ? thread & (threads - 1) : thread * threads / contraction_threads;
    };
    const auto index_of = [&](int thread) {
      return static_cast<ElementIndex>(tile) * static_cast<ElementIndex>(elements) +
             static_cast<ElementIndex>(are_neighbours ? thread * elements / contraction_threads
                                                      : thread & (elements - 1));
    };
    block_.each_thread([&](int thread) {
      const ElementIndex index = index_of(thread);
      const bool exists = index < size;
      const ElementIndex found = exists ? index : size - 1;
      const Element at = place(found);
      auto add = find(at, found, lane_of(thread));
      C c(memory_, job_, at.group, tap_of(job_, at.tap));
      block_.wait();
      if (!exists) return;
      const auto result = c.element(block_, c.row(block_, at.row), at.column);
      const Sum sum = add();
      if (threads == 1) return c.write(block_, result, sum);
      sums.set(thread, sum);
      results[thread] = {c, result};
    });
    for (int left = threads; left > 1;) {
      constexpr int at_once = 8;
      const int next = left > at_once ? left / at_once : 1;
      block_.each_thread([&](int thread) {
        if (lane_of(thread) >= next || index_of(thread) >= size) return;
        Sum sum(0);
        CONCERTINA_UNROLL
        for (int i = 0; i < at_once; ++i) {
          if (i * next < left) sum += sums.get(thread + i * next * distance);
        }
        if (next > 1) return sums.set(thread, sum);
        results[thread].c.write(block_, results[thread].element, sum);
      });
      left = next;
    }
  }

  /// Elements of few terms, several for each thread: a term of each at a time, whose loads are in
  /// flight together.
  CONCERTINA_DEVICE void reduce_several(int tile) {
    constexpr int several = tuning::loads_in_flight;
    using C = Destination<Stored, Sum>;
    const auto size = static_cast<ElementIndex>(job_.size()),
               first = static_cast<ElementIndex>(tile * several * contraction_threads);
    block_.each_thread([&](int thread) {
      const Job& job = job_;
      const Source<Stored, Sum> a(memory_, job.a, 0), b(memory_, job.b, 0);
      const auto a_group = static_cast<int>(job.a.group_stride),
                 b_group = static_cast<int>(job.b.group_stride);
      Element at[several];
      Tap tap[several];
      int a_at[several], b_at[several], terms[several], most = 0;
      CONCERTINA_UNROLL
      for (int e = 0; e < several; ++e) {
        const ElementIndex index =
            first + static_cast<ElementIndex>(e * contraction_threads + thread);
        at[e] = element(job, index < size ? index : size - 1);
        tap[e] = tap_of(job, at[e].tap);
        a_at[e] = at[e].group * a_group + job.a_m(at[e].row, job.m_inner_extent);
        b_at[e] = at[e].group * b_group + at[e].column * job.b_n;
        terms[e] = (tap[e].last_pair - tap[e].first_pair) * job.k;
        most = most < terms[e] ? terms[e] : most;
      }
      block_.wait();
      Sum sums[several] = {};
      for (int term = 0; term < most; ++term) {
        const auto [rest, k_inner] = job.k_inner_extent.divide(static_cast<ElementIndex>(term));
        const auto [pair_index, k_outer] =
            job.k_outer_extent.divide(static_cast<ElementIndex>(rest));
        const int a_k = k_outer * job.a_k.outer + k_inner * job.a_k.inner,
                  b_k = k_outer * job.b_k.outer + k_inner * job.b_k.inner;
        Sum left[several], right[several];
        CONCERTINA_UNROLL
        for (int e = 0; e < several; ++e) {
          const bool exists = term < terms[e];
          const TapPair pair = exists ? pair_of(tap[e].first_pair + pair_index) : TapPair{};
          left[e] = exists ? a.read(block_, a_at[e] + pair.a + a_k) : Sum(0);
          right[e] = exists ? b.read(block_, b_at[e] + pair.b + b_k) : Sum(0);
        }
        CONCERTINA_UNROLL
        for (int e = 0; e < several; ++e) sums[e] += left[e] * right[e];
      }
      struct Result {
        C c;
        typename C::Element element;
      };
      Result results[several];
      CONCERTINA_UNROLL
      for (int e = 0; e < several; ++e) {
        const C c(memory_, job, at[e].group, tap[e]);
        results[e] = {c, c.element(block_, c.row(block_, at[e].row), at[e].column)};
      }
      CONCERTINA_UNROLL
      for (int e = 0; e < several; ++e) {
        if (first + static_cast<ElementIndex>(e * contraction_threads + thread) >= size) break;
        results[e].c.write(block_, results[e].element, sums[e]);
      }
    });
  }

  CONCERTINA_DEVICE void depthwise_chain(int tile) {
    constexpr int several = tuning::loads_in_flight;
    if (job_.has_several) return depthwise_chain<several, 1>(tile);
    depthwise_chain<1, 2 * several>(tile);
  }

  /// So many elements for each thread, and so many terms of each at once.
  template <int elements, int at_once>
  CONCERTINA_DEVICE void depthwise_chain(int tile) {
    const Job& job = job_;
    const Source<Stored, Sum> a(memory_, job.a, 0), b(memory_, job.b, 0),
        d(memory_, job.inner.d, 0);
    const auto size = static_cast<ElementIndex>(job.size()),
               first = static_cast<ElementIndex>(tile * elements * contraction_threads);
    const int terms = job.k;
    const auto group_stride = [](const TensorRef& ref) {
      return static_cast<int>(ref.group_stride);
    };
    block_.each_thread([&](int thread) {
      Element at[elements];
      int a_at[elements], b_at[elements], d_at[elements];
      CONCERTINA_UNROLL
      for (int e = 0; e < elements; ++e) {
        const ElementIndex index =
            first + static_cast<ElementIndex>(e * contraction_threads + thread);
        at[e] = element(job, index < size ? index : size - 1);
        const auto& [group, row, column, tap] = at[e];
        const auto n = job.inner.n_inner_extent.divide(static_cast<ElementIndex>(column));
        a_at[e] = group * group_stride(job.a) + row * job.a_m.outer;
        b_at[e] = group * group_stride(job.b) + n.quotient * job.b_n;
        d_at[e] = group * group_stride(job.inner.d) + row * job.inner.d_m +
                  n.quotient * job.inner.d_n.outer + n.remainder * job.inner.d_n.inner;
      }
      Sum sums[elements] = {}, inner[elements] = {};
      for (int term = 0; term < terms; term += at_once) {
        Sum of_a[at_once][elements], of_b[at_once][elements], of_d[at_once][elements];
        bool is_last[at_once];  // of k_inner
        CONCERTINA_UNROLL
        for (int t = 0; t < at_once; ++t) {
          const bool exists = term + t < terms;
          const auto k = job.k_inner_extent.divide(static_cast<ElementIndex>(term + t));
          is_last[t] = k.remainder == job.k_inner_extent - 1;
          CONCERTINA_UNROLL
          for (int e = 0; e < elements; ++e) {
            of_a[t][e] = exists && is_last[t] ? a.read(block_, a_at[e] + k.quotient * job.a_k.outer)
                                              : Sum(0);
            of_b[t][e] = exists ? b.read(block_, b_at[e] + k.remainder * job.b_k.inner) : Sum(0);
            of_d[t][e] = exists ? d.read(block_, d_at[e] + k.quotient * job.inner.d_k.outer +
                                                     k.remainder * job.inner.d_k.inner)
                                : Sum(0);
          }
        }
        CONCERTINA_UNROLL
        for (int t = 0; t < at_once; ++t) {
          CONCERTINA_UNROLL
          for (int e = 0; e < elements; ++e) {
            inner[e] += of_b[t][e] * of_d[t][e];
            if (!is_last[t]) continue;
            sums[e] += of_a[t][e] * inner[e];
            inner[e] = Sum(0);
          }
        }
      }
      CONCERTINA_UNROLL
      for (int e = 0; e < elements; ++e) {
        if (first + static_cast<ElementIndex>(e * contraction_threads + thread) < size) {
          finish(at[e], sums[e]);
        }
      }
    });
  }

  /// What adds up every so manieth term of an element, from the lane's on.
  CONCERTINA_DEVICE auto terms_of(const Element& at, int lane) {
    const Job& job = job_;
    const Tap tap = tap_of(job, at.tap);
    const Source<Stored, Sum> a(memory_, job.a, at.group), b(memory_, job.b, at.group);
    const int a_at = job.a_m(at.row, job.m_inner_extent), b_at = at.column * job.b_n;
    const TwoModeStride a_k = job.a_k, b_k = job.b_k;
    const Extent k_inner_extent = job.k_inner_extent, k_outer_extent = job.k_outer_extent;
    const int terms = (tap.last_pair - tap.first_pair) * job.k, step = job.threads_per_element;
    constexpr int at_once = tuning::loads_in_flight;
    struct Offsets {
      int a[at_once], b[at_once];
    };
    const auto offsets = [=, this](int first) {
      Offsets found;
      CONCERTINA_UNROLL
      for (int i = 0; i < at_once; ++i) {
        const int index = first + i * step;
        const auto [rest, k_inner] = k_inner_extent.divide(static_cast<ElementIndex>(index));
        const auto [pair_index, k_outer] = k_outer_extent.divide(static_cast<ElementIndex>(rest));
        const TapPair pair = index < terms ? pair_of(tap.first_pair + pair_index) : TapPair{};
        found.a[i] = a_at + pair.a + k_outer * a_k.outer + k_inner * a_k.inner;
        found.b[i] = b_at + pair.b + k_outer * b_k.outer + k_inner * b_k.inner;
      }
      return found;
    };
    return [=, this, next = offsets(lane)]() mutable {
      Sum sum(0);
      for (int first = lane; first < terms;) {
        Sum left[at_once], right[at_once];
        CONCERTINA_UNROLL
        for (int i = 0; i < at_once; ++i) {
          const bool exists = first + i * step < terms;
          left[i] = exists ? a.read(block_, next.a[i]) : Sum(0);
          right[i] = exists ? b.read(block_, next.b[i]) : Sum(0);
        }
        first += at_once * step;
        if (first < terms) next = offsets(first);
        CONCERTINA_UNROLL
        for (int i = 0; i < at_once; ++i) sum += left[i] * right[i];
      }
      return sum;
    };
  }

  CONCERTINA_DEVICE void combine_tiles(int tile) {
    constexpr int side = tuning::tensor_core_side, size = tuning::tensor_core_tile_size;
    const Job job = job_;
    const Offset count = static_cast<Offset>(job.c_tiles) * size;
    each_element(tile, count, [&](ElementIndex index) {
      const auto [c_tile, in_tile] = divide(index, size);
      const auto place = tile_place(job, job.first_c_tile + c_tile);
      const int row = place.row + in_tile / side, column = place.column + in_tile % side;
      if (row >= job.m || column >= job.n) return;
      Sum sum(0);
      for (int split = 0; split < job.splits; ++split) {
        sum += block_.read(memory_.workspace + job.a.offset + split * count + index);
      }
      finish({place.group, row, column, place.tap}, sum);
    });
  }

  /// Both of these go through shared memory, so that neighbouring threads are at neighbouring
  /// columns of the unfolded matrix, and at neighbouring taps of the other.
  CONCERTINA_DEVICE void fold(int tile) {
    const FoldPlace place(job_, tile);
    auto elements = block_.template shared<Sum>(tuning::fold_elements);
    block_.each_thread([&](int thread) {
      const Source<Stored, Sum> a(memory_, job_.a, 0);
      const int column_stride = job_.a_n,
                row = job_.a_m(place.row, job_.m_inner_extent) + place.first_column * column_stride;
      // Several columns at once, so that their loads are in flight together.
      constexpr int together = 4;
      const int apart = (place.columns + together - 1) / together;
      for (Walk at(thread, apart); at.far < place.taps; at.advance()) {
        const Tap tap = tables_.taps[place.tap + at.far];
        Sum sums[together] = {};
        CONCERTINA_UNROLL_BY(2)
        for (int p = tap.first_pair; p < tap.last_pair; ++p) {
          const int pair = row + tables_.pairs[p].a;
          CONCERTINA_UNROLL
          for (int c = 0; c < together; ++c) {
            const int column = at.near + c * apart;
            sums[c] +=
                a.read(block_, pair + (column < place.columns ? column : at.near) * column_stride);
          }
        }
        CONCERTINA_UNROLL
        for (int c = 0; c < together; ++c) {
          const int column = at.near + c * apart;
          if (column < place.columns) elements.set(column * place.ld + at.far, sums[c]);
        }
      }
    });
    const Destination<Stored, Sum> c(memory_, job_, 0, Tap{});
    block_.each_thread([&](int thread) {
      const auto row = c.row(block_, place.row);
      for (Walk at(thread, place.taps); at.far < place.columns; at.advance()) {
        auto row_of_tap = row;
        row_of_tap.at += tables_.taps[place.tap + at.near].c;
        c.write(block_, row_of_tap, place.first_column + at.far,
                elements.get(at.far * place.ld + at.near));
      }
    });
  }

  CONCERTINA_DEVICE void unfold(int tile) {
    const FoldPlace place(job_, tile);
    auto elements = block_.template shared<Sum>(tuning::fold_elements);
    block_.each_thread([&](int thread) {
      // All loads before the first of them is waited for.
      constexpr int loads = tuning::fold_elements / contraction_threads;
      Sum loaded[loads];
      const Source<Stored, Sum> a(memory_, job_.a, 0);
      const int stride = job_.a_n, first = job_.a_m(place.row, job_.m_inner_extent) +
                                           place.first_column * stride + place.first_tap;
      Walk from(thread, place.taps);
      CONCERTINA_UNROLL
      for (int l = 0; l < loads; ++l, from.advance()) {
        if (from.far < place.columns) {
          loaded[l] = a.read(block_, first + from.far * stride + from.near);
        }
      }
      Walk to(thread, place.taps);
      CONCERTINA_UNROLL
      for (int l = 0; l < loads; ++l, to.advance()) {
        if (to.far < place.columns) elements.set(to.far * place.ld + to.near, loaded[l]);
      }
    });
    block_.each_thread([&](int thread) {
      const TensorRef c = job_.c;
      const int column_stride = job_.c_n;
      const Offset row =
          c.offset + job_.c_m(place.row, job_.m_inner_extent) + place.first_column * column_stride;
      for (Walk at(thread, place.columns); at.far < place.taps; at.advance()) {
        const Tap tap = tables_.taps[place.tap + at.far];
        const Sum element = elements.get(at.near * place.ld + at.far);
        for (int p = tap.first_pair; p < tap.last_pair; ++p) {
          memory_.write(block_, c, row + at.near * column_stride + tables_.pairs[p].a, element);
        }
      }
    });
  }

  /// Where a tile of fold or unfold starts, and its extent there, which is less at the ends.
  struct FoldPlace {
    int row, first_column, first_tap, columns, taps, ld;
    int tap;  ///< first_tap's place in the table

    CONCERTINA_DEVICE FoldPlace(const Job& job, int tile) {
      const FoldTile most = fold_tile(job.taps);
      const int column_tiles = (job.n + most.columns - 1) / most.columns,
                tap_tiles = (job.taps + most.taps - 1) / most.taps;
      first_tap = tile % tap_tiles * most.taps;
      tile /= tap_tiles;
      first_column = tile % column_tiles * most.columns;
      row = tile / column_tiles;
      columns = job.n - first_column < most.columns ? job.n - first_column : most.columns;
      taps = job.taps - first_tap < most.taps ? job.taps - first_tap : most.taps;
      ld = most.ld();
      tap = job.first_tap + first_tap;
    }
  };

  /// A thread's elements of a row-major matrix with `size` columns, without divisions on the way.
  struct Walk {
    int near, far;  // column and row
    int size, near_step, far_step;

    CONCERTINA_DEVICE Walk(int thread, int columns)
        : near(thread % columns),
          far(thread / columns),
          size(columns),
          near_step(contraction_threads % columns),
          far_step(contraction_threads / columns) {}

    CONCERTINA_DEVICE void advance() {
      near += near_step;
      far += far_step;
      if (near >= size) near -= size, ++far;
    }
  };

  CONCERTINA_DEVICE void copy(int tile) {
    const Job job = job_;
    each_element(tile, job.n, [&](ElementIndex index) {
      memory_.write(block_, job.c, job.c.offset + index,
                    job.a.exists() ? memory_.read(block_, job.a, job.a.offset + index) : Sum(0));
    });
  }

  /// Each element of the whole gathers those of the branches, in their order; zero where none has
  /// one.
  CONCERTINA_DEVICE void add_branches(int tile) {
    const Job job = job_;
    each_element(tile, job.size(), [&](ElementIndex index) {
      const Element at = element(job, index);
      const Tap tap = tables_.taps[job.first_tap + at.tap];
      Sum sum(0);
      for (int p = tap.first_pair; p < tap.last_pair; ++p) {
        const TapPair pair = tables_.pairs[p];
        const Branch branch = tables_.branches[job.first_branch + pair.a];
        const int row = at.row - branch.first_m;
        if (row < 0 || row >= branch.m) continue;
        const int column = at.column - branch.n_of(row);
        if (column < 0 || column >= branch.n) continue;
        const int from = (row * branch.n + column) * branch.taps + pair.b;
        sum += memory_.read(block_, branch.tensor, branch.tensor.offset + from);
      }
      memory_.write(block_, job.c, job.c.offset + index, sum);
    });
  }

  /// The gradient of add_branches for one branch: the whole's elements at its place.
  CONCERTINA_DEVICE void take_branch(int tile) {
    const Job job = job_;
    const Branch branch = tables_.branches[job.first_branch];
    each_element(tile, job.size(), [&](ElementIndex index) {
      const Element at = element(job, index);
      const int row = branch.first_m + at.row, column = branch.n_of(at.row) + at.column;
      const int from =
          row * job.a_m.outer + column * job.a_n + tables_.taps[job.first_tap + at.tap].c;
      memory_.write(block_, job.c, job.c.offset + index,
                    memory_.read(block_, job.a, job.a.offset + from));
    });
  }

  template <class Visit>
  CONCERTINA_DEVICE void each_element(int tile, Offset count, Visit&& visit) {
    constexpr auto elements = static_cast<ElementIndex>(tuning::elementwise_tile);
    const auto size = static_cast<ElementIndex>(count),
               first = static_cast<ElementIndex>(tile) * elements;
    block_.each_thread([&](int thread) {
      for (ElementIndex index = first + static_cast<ElementIndex>(thread);
           index < size && index < first + elements; index += contraction_threads) {
        visit(index);
      }
    });
  }

  /// Writes an element of C, after the epilogue.
  CONCERTINA_DEVICE void finish(const Element& at, Sum sum) {
    const Destination<Stored, Sum> c(memory_, job_, at.group, tap_of(job_, at.tap));
    c.write(block_, c.row(block_, at.row), at.column, sum);
  }

  B& block_;
  const ContractionTables& tables_;
  const ContractionMemory<Stored, Sum>& memory_;
  const Job& job_;
};

}  // namespace concertina::cuda::detail
