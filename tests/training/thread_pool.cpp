// The thread pool: every task once, workers never shared, exceptions rethrown, many quick runs.
// SPDX-License-Identifier: Apache-2.0
#include "training/thread_pool.hpp"  // first: the header must stand alone

#include "support.hpp"

#include <concertina/error.hpp>

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

using namespace training;
using Catch::Matchers::Contains, Catch::Matchers::Equals;
using concertina::test::message_of;

namespace {

std::size_t at(Index index) { return static_cast<std::size_t>(index); }

constexpr std::initializer_list<Index> pool_sizes = {1, 2, 3, 5};

}  // namespace

TEST_CASE("every task runs once, and a worker runs one at a time", "[training][thread_pool]") {
  for (const Index threads : pool_sizes) {
    ThreadPool pool(threads);
    REQUIRE(pool.size() == threads);
    for (const Index count : {0, 1, 2, 3, 7, 1000}) {
      INFO(threads << " threads, " << count << " tasks");
      std::vector<std::atomic<int>> runs(at(count)), busy(at(threads));
      std::atomic<int> shared = 0, beyond = 0;
      pool.run(count, [&](Index task, Index worker) {
        if (task < 0 || task >= count || worker < 0 || worker >= threads) {
          ++beyond;
          return;
        }
        shared += busy[at(worker)].exchange(1);
        ++runs[at(task)];
        if (task % 8 == 0) std::this_thread::yield();
        busy[at(worker)] = 0;
      });
      CHECK(beyond == 0);
      CHECK(shared == 0);
      Index once = 0;
      for (const auto& each : runs) once += each == 1;
      CHECK(once == count);
    }
  }
}

TEST_CASE("what tasks wrote is there when the run returns, without atomics",
          "[training][thread_pool]") {
  ThreadPool pool(3);
  std::vector<Index> squares(100), by_worker(3);
  for (Index time = 1; time <= 100; ++time) {
    pool.run(100, [&](Index task, Index worker) {
      squares[at(task)] += task * task;
      ++by_worker[at(worker)];
    });
    Index sum = 0;
    for (const Index square : squares) sum += square;
    REQUIRE(sum == 328350 * time);
  }
  CHECK(by_worker[0] + by_worker[1] + by_worker[2] == 10000);
}

TEST_CASE("an exception of a task is rethrown, and the pool goes on", "[training][thread_pool]") {
  for (const Index threads : pool_sizes) {
    INFO(threads << " threads");
    ThreadPool pool(threads);
    for (const Index failing : {0, 1, 50, 99}) {
      std::atomic<Index> started = 0;
      const auto call = [&] {
        pool.run(100, [&](Index task, Index) {
          ++started;
          if (task == failing) throw std::runtime_error("task " + std::to_string(task));
        });
      };
      CHECK_THAT(message_of<std::runtime_error>(call), Equals("task " + std::to_string(failing)));
      CHECK(started <= 100);
      CHECK(started > failing);  // tasks start in order

      std::atomic<Index> done = 0;
      pool.run(100, [&](Index, Index) { ++done; });
      CHECK(done == 100);
    }
    // Where all fail, one is rethrown and none is kept for the next run.
    CHECK_THROWS_AS(pool.run(100, [](Index, Index) { throw std::runtime_error("all"); }),
                    std::runtime_error);
    CHECK_THROWS_AS(pool.run(1, [](Index, Index) { throw std::logic_error("alone"); }),
                    std::logic_error);
    CHECK_NOTHROW(pool.run(0, [](Index, Index) { throw std::logic_error("none"); }));
    CHECK_NOTHROW(pool.run(100, [](Index, Index) {}));
  }
}

TEST_CASE("an exception of any worker reaches the caller", "[training][thread_pool]") {
  ThreadPool pool(3);
  for (Index failing = 0; failing < 3; ++failing) {
    // Every worker is in a task before one of them fails.
    std::atomic<Index> present = 0;
    const auto call = [&] {
      pool.run(3, [&](Index, Index worker) {
        ++present;
        while (present < 3) std::this_thread::yield();
        if (worker == failing) throw std::runtime_error("worker " + std::to_string(worker));
      });
    };
    CHECK_THAT(message_of<std::runtime_error>(call), Equals("worker " + std::to_string(failing)));
  }
}

TEST_CASE("submitted tasks run once, beside runs, and are done after wait",
          "[training][thread_pool]") {
  for (const Index threads : pool_sizes) {
    INFO(threads << " threads");
    ThreadPool pool(threads);
    for (int time = 0; time < 200; ++time) {
      std::vector<Index> submitted(7), run(20);  // without atomics: wait() and run() order them
      for (Index& each : submitted) {
        pool.submit([&each] { ++each; });
        if (time % 3 == 0) pool.run(20, [&](Index task, Index) { ++run[at(task)]; });
      }
      pool.wait();
      CHECK(submitted == std::vector<Index>(7, 1));
      CHECK(run == std::vector<Index>(20, time % 3 == 0 ? 7 : 0));
      pool.wait();  // nothing is left
    }
  }
}

TEST_CASE("a long submitted task does not hold up a run", "[training][thread_pool]") {
  ThreadPool pool(2);
  std::atomic<bool> done = false;
  pool.submit([&] {
    while (!done) std::this_thread::yield();
  });
  for (int time = 0; time < 100; ++time) pool.run(10, [](Index, Index) {});
  done = true;
  pool.wait();
}

TEST_CASE("an exception of a submitted task is wait's", "[training][thread_pool]") {
  for (const Index threads : pool_sizes) {
    ThreadPool pool(threads);
    std::atomic<int> done = 0;
    pool.submit([] { throw std::runtime_error("submitted"); });
    pool.submit([&] { ++done; });
    CHECK_NOTHROW(pool.run(10, [](Index, Index) {}));
    CHECK_THAT(message_of<std::runtime_error>([&] { pool.wait(); }), Equals("submitted"));
    CHECK(done == 1);
    CHECK_NOTHROW(pool.wait());
  }
}

TEST_CASE("many quick runs", "[training][thread_pool]") {
  for (const Index threads : pool_sizes) {
    ThreadPool pool(threads);
    std::atomic<std::int64_t> sum = 0;
    std::int64_t expected = 0;
    for (Index time = 0; time < 3000; ++time) {
      const Index count = time % 7;
      pool.run(count, [&](Index task, Index) { sum += task + 1; });
      expected += count * (count + 1) / 2;
      if (sum != expected) FAIL(threads << " threads, run " << time);
    }
    CHECK(sum == expected);
  }
}

TEST_CASE("workers that fell asleep wake, for tasks and for the end", "[training][thread_pool]") {
  using namespace std::chrono_literals;
  ThreadPool pool(4);
  for (int time = 0; time < 5; ++time) {
    std::this_thread::sleep_for(5ms);
    std::atomic<Index> present = 0;
    pool.run(4, [&](Index, Index) {
      ++present;
      while (present < 4) std::this_thread::yield();  // returns only with all of them
    });
    CHECK(present == 4);
    // The caller falls asleep until the last worker is done.
    pool.run(4, [](Index, Index worker) {
      if (worker != 0) std::this_thread::sleep_for(5ms);
    });
  }
  std::this_thread::sleep_for(5ms);
}

TEST_CASE("pools come and go without a task", "[training][thread_pool]") {
  for (int time = 0; time < 50; ++time) ThreadPool(1 + time % 4);
  SUCCEED();
}

TEST_CASE("a pool without threads is refused", "[training][thread_pool]") {
  for (const Index threads : {0, -1}) {
    CHECK_THAT(message_of<concertina::Error>([&] { ThreadPool pool(threads); }),
               Contains(std::to_string(threads) + " threads"));
  }
}
