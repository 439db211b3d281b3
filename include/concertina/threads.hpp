// Threads for one call: what contract(e, {}, Threads{2}) is given.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/parallel.hpp>

#include <algorithm>
#include <atomic>
#include <exception>
#include <system_error>
#include <thread>
#include <vector>

namespace concertina {

/// So many threads, started for each call and joined at its end: some 10 us a thread. Where many
/// short calls are made, hand over a thread pool of your own instead.
/// Throws  what the first task to throw throws, when all threads have ended
struct Threads {
  int count = static_cast<int>(std::max(1U, std::thread::hardware_concurrency()));

  void operator()(Index tasks, ParallelFor::Task task) const {
    std::atomic<Index> next = 0;
    std::atomic_flag failed;
    std::exception_ptr error;
    const auto work = [&] {
      try {
        for (Index i = next++; i < tasks; i = next++) task(i);
      } catch (...) {
        next = tasks;
        if (!failed.test_and_set()) error = std::current_exception();
      }
    };
    std::vector<std::thread> others;
    try {
      for (Index t = 1; t < std::min<Index>(count, tasks); ++t) others.emplace_back(work);
    } catch (const std::system_error&) {  // NOLINT(bugprone-empty-catch)
      // As many as there are.
    }
    work();
    for (std::thread& other : others) other.join();
    if (error) std::rethrow_exception(error);
  }
};

}  // namespace concertina
