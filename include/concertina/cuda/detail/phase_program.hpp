// The contraction kernels: a launch runs the tiles of many jobs.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/cuda/detail/tile.hpp>

#include <cstddef>

namespace concertina::cuda::detail {

/// The last of first .. last - 1 whose first tile, as `first_tile` has it, is none after this one.
template <class FirstTile>
CONCERTINA_DEVICE int find_job(int first, int last, int tile, FirstTile&& first_tile) {
  while (last - first > 1) {
    const int middle = first + (last - first) / 2;
    if (first_tile(middle) <= tile) {
      first = middle;
    } else {
      last = middle;
    }
  }
  return first;
}

CONCERTINA_DEVICE inline const Job& job_of(const ContractionTables& tables, const Phase& phase,
                                           int tile) {
  return tables.jobs[find_job(phase.first_job, phase.last_job, tile,
                              [&](int job) { return tables.jobs[job].first_tile; })];
}

/// A phase, a block for each tile.
/// Requires  everything that earlier phases write to be written; without Products, no job to be one
template <class Stored, class Sum, int Capacity, bool Products = true>
struct PhaseProgram {
  static constexpr int threads = contraction_threads, capacity = Capacity;
  static constexpr bool products = Products;
  static constexpr bool waits = true;  ///< each block does, before its first access but to tables
  /// Of a thread, so that four blocks are resident on a multiprocessor where they wait for memory
  /// and need few, and otherwise two, or one beside a block that takes more than half; of double
  /// one.
  static constexpr int most_registers = !Products ? 64 : sizeof(Sum) == sizeof(double) ? 255 : 96;

  ContractionTables tables;
  Sum* workspace;
  Phase phase;
  FirstTiles first_tiles;
  Addresses<Capacity> addresses;

  Index blocks() const { return phase.tiles; }
  static constexpr std::size_t shared_bytes() { return contraction_shared_bytes<Sum>(); }

  template <ThreadBlock B>
  CONCERTINA_DEVICE void operator()(B& block, Index index) const {
    const int tile = static_cast<int>(index);
    const int jobs = phase.last_job - phase.first_job;
    const Job& job = block.share(
        jobs > FirstTiles::most ? job_of(tables, phase, tile)
                                : tables.jobs[phase.first_job + find_job(0, jobs, tile, [&](int j) {
                                                return first_tiles.of[j];
                                              })]);
    const ContractionMemory<Stored, Sum> memory{addresses.at, workspace};
    ContractionTile<Stored, Sum, Products, B>(block, tables, memory, job)
        .run(tile - job.first_tile);
  }
};

}  // namespace concertina::cuda::detail
