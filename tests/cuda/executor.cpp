// SPDX-License-Identifier: Apache-2.0
#include "executor.hpp"

#include "support.hpp"

#include <cstdint>
#include <numeric>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace {

using concertina::Index;
using concertina::test::execute, concertina::test::Memory, concertina::test::ProgramError;
using concertina::test::message_of;

enum class Mistake {
  none,
  early,           // memory touched before it waits
  no_wait,         // a block that never does
  no_barrier,      // threads read what others have just written
  unwritten,       // read before anything is there
  outside,         // beyond the buffer
  twice,           // two blocks write one element
  across_blocks,   // a block reads what another writes
  shared_outside,  // beyond the block's memory
  shared_bytes     // more of it than announced
};

/// to[i] = from[n - 1 - i], through shared memory; one of the mistakes is made.
struct Reverse {
  static constexpr int threads = 8;
  static constexpr bool waits = true;
  const float* from;
  float* to;
  Mistake mistake = Mistake::none;

  Index blocks() const { return 3; }
  std::size_t shared_bytes() const { return concertina::cuda::shared_size<float>(threads); }

  template <concertina::cuda::ThreadBlock B>
  void operator()(B& block, Index index) const {
    const bool more = mistake == Mistake::shared_bytes;
    auto tile = block.template shared<float>(more ? 2 * threads : threads);
    typename B::template PerThread<float> kept(block);
    const Index first = index * threads, last = 3 * threads - 1 - first;
    if (mistake == Mistake::no_wait) return;
    const auto load = [&](int thread) {
      if (mistake != Mistake::early || thread != 0) block.wait();
      tile.set(thread, block.read(from + last - thread));
      kept[thread] = static_cast<float>(thread);
    };
    const auto store = [&](int thread) {
      const int other = mistake == Mistake::no_barrier ? threads - 1 - thread : thread;
      if (kept[thread] != static_cast<float>(thread)) throw std::logic_error("not kept");
      block.write(to + first + other, tile.get(other));
    };
    if (mistake == Mistake::no_barrier) {
      block.each_thread([&](int thread) {
        load(thread);
        store(thread);
      });
      return;
    }
    block.each_thread(load);
    block.each_thread(store);
    block.each_thread([&](int thread) {
      if (thread != 0) return;
      switch (mistake) {
        case Mistake::unwritten: block.read(to + (index == 0 ? 3 * threads : first)); break;
        case Mistake::outside: block.write(to + 3 * threads + 1, 0.0F); break;
        case Mistake::twice: block.write(to, 0.0F); break;
        case Mistake::across_blocks: block.read(to); break;
        case Mistake::shared_outside: tile.get(threads); break;
        default: break;
      }
    });
  }
};

TEST_CASE("the executor runs every block and every thread", "[executor]") {
  std::vector<float> from(24), to(24);
  for (std::size_t i = 0; i < from.size(); ++i) from[i] = static_cast<float>(i);
  Memory memory(GENERATE(1, 2, 3));
  memory.lend(std::as_const(from));
  memory.lend_unwritten(to);
  CHECK_THROWS_AS(memory.require_written(to), ProgramError);
  execute(Reverse{from.data(), to.data()}, memory);
  memory.require_written(to);
  for (std::size_t i = 0; i < to.size(); ++i) CHECK(to[i] == from[from.size() - 1 - i]);
}

TEST_CASE("the executor finds what a program must not do", "[executor]") {
  std::vector<float> from(24), to(25);  // the last is never written
  Memory memory(GENERATE(1, 2, 3));
  memory.lend(std::as_const(from));
  memory.lend_unwritten(to);
  const auto run = [&](Mistake mistake) {
    return message_of<ProgramError>(
        [&] { execute(Reverse{from.data(), to.data(), mistake}, memory); });
  };
  CHECK(run(Mistake::early).find("before wait()") != std::string::npos);
  CHECK(run(Mistake::no_wait).find("has not waited") != std::string::npos);
  CHECK_FALSE(run(Mistake::no_barrier).empty());  // unwritten or unordered, as threads come
  CHECK(run(Mistake::unwritten).find("before it was written") != std::string::npos);
  CHECK(run(Mistake::outside).find("outside") != std::string::npos);
  CHECK(run(Mistake::twice).find("no barrier") != std::string::npos);
  CHECK(run(Mistake::across_blocks).find("no barrier") != std::string::npos);
  CHECK(run(Mistake::shared_outside).find("shared element 8 of 8") != std::string::npos);
  CHECK(run(Mistake::shared_bytes).find("64 bytes") != std::string::npos);
  const Reverse in_place{from.data(), from.data()};
  CHECK(message_of<ProgramError>([&] { execute(in_place, memory); }).find("only read") !=
        std::string::npos);
}

/// to[i] = 2 * from[i], tiles shared out among any number of blocks.
struct Double {
  static constexpr int threads = 8;
  std::span<const float> from;
  float* to;
  bool reads_other_tiles = false;

  std::size_t shared_bytes() const { return 0; }

  template <concertina::cuda::detail::Grid G>
  void operator()(G& grid) const {
    const auto tiles = static_cast<int>(from.size()) / threads;
    for (int tile = grid.index(); tile < tiles; tile += grid.blocks()) {
      grid.run([&](auto& block) {
        block.each_thread([&](int thread) {
          const auto i = static_cast<std::size_t>(tile * threads + thread);
          block.write(to + i, 2 * block.read(&from[i]));
          if (reads_other_tiles) block.read(to + (from.size() - 1 - i));
        });
      });
    }
  }
};

TEST_CASE("the executor shares tiles out among any number of blocks", "[executor]") {
  const int blocks = GENERATE(1, 2, 3, 5);
  std::vector<float> from(24), to(24);
  std::iota(from.begin(), from.end(), 0.0F);
  Memory memory(GENERATE(1, 2, 3));
  memory.lend(std::as_const(from));
  memory.lend(to);
  execute(Double{from, to.data()}, blocks, memory);
  for (std::size_t i = 0; i < to.size(); ++i) CHECK(to[i] == 2 * from[i]);
  const std::string refusal =
      message_of<ProgramError>([&] { execute(Double{from, to.data(), true}, blocks, memory); });
  CHECK(refusal.find("no barrier") == 0);
}

}  // namespace
