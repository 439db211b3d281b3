// Threads for one call: every task once, on several threads, and what tasks throw.
// SPDX-License-Identifier: Apache-2.0
#include <concertina/threads.hpp>

#include "support.hpp"

#include <catch2/catch.hpp>

#include <atomic>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace concertina::test {

TEST_CASE("every task is called once, however many threads there are", "[threads]") {
  for (const int threads : {1, 2, 3, 8}) {
    for (const Index tasks : {0, 1, 2, 7, 1000}) {
      INFO(threads << " threads, " << tasks << " tasks");
      std::vector<std::atomic<int>> calls(static_cast<std::size_t>(tasks));
      Threads{threads}(tasks, [&](Index i) { ++calls[static_cast<std::size_t>(i)]; });
      CHECK(std::ranges::all_of(calls, [](const auto& count) { return count == 1; }));
    }
  }
  CHECK(Threads().count >= 1);
  Index sum = 0;  // no number of threads is too small to call the tasks
  Threads{0}(4, [&](Index i) { sum += i; });
  CHECK(sum == 6);
}

TEST_CASE("tasks run at the same time", "[threads]") {
  // Each task waits for the other two, which a single thread would never reach.
  std::mutex mutex;
  std::set<std::thread::id> threads;
  std::atomic<int> started = 0;
  Threads{3}(3, [&](Index) {
    {
      const std::lock_guard lock(mutex);
      threads.insert(std::this_thread::get_id());
    }
    ++started;
    while (started < 3) std::this_thread::yield();
  });
  CHECK(threads.size() == 3);
  CHECK(threads.contains(std::this_thread::get_id()));  // the caller's works too

  threads.clear();
  Threads{1}(3, [&](Index) { threads.insert(std::this_thread::get_id()); });
  CHECK(threads == std::set{std::this_thread::get_id()});
}

TEST_CASE("what the first task to throw throws comes out, when all threads have ended",
          "[threads]") {
  for (const int threads : {1, 2, 4}) {
    for (int n = 0; n < 20; ++n) {
      std::atomic<int> inside = 0, called = 0;
      const auto run = [&] {
        Threads{threads}(1000, [&](Index i) {
          ++inside, ++called;
          const bool fails = i == 10;
          std::this_thread::yield();
          --inside;
          if (fails) throw std::runtime_error("task 10");
        });
      };
      CHECK_THROWS_WITH(run(), "task 10");
      CHECK(inside == 0);
      CHECK(called >= 11);
      if (threads == 1) CHECK(called == 11);  // no further task is begun
    }
  }
  // Where several throw, one of them comes out.
  const auto all = [] {
    Threads{4}(100, [](Index i) { throw std::runtime_error("task " + std::to_string(i)); });
  };
  CHECK_THROWS_AS(all(), std::runtime_error);
}

}  // namespace concertina::test
