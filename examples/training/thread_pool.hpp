// Threads that run numbered tasks: which thread runs which is left open, so tasks must not depend
// on it.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "lanes.hpp"

#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

namespace training {

class ThreadPool {
 public:
  /// `threads` of them, the caller's own included. Throws Error where they cannot be started.
  explicit ThreadPool(Index threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  Index size() const { return 1 + static_cast<Index>(workers_.size()); }

  /// task(i, worker) for each i below count, where worker is below size() and no two tasks at a
  /// time have the same. Returns when all are done. Rethrows the first exception; then some tasks
  /// may not have run. Not from within a task.
  template <class Task>
  void run(Index count, Task&& task) {
    using Decayed = std::remove_reference_t<Task>;
    run(count, const_cast<void*>(static_cast<const void*>(&task)),
        [](void* context, Index i, Index worker) { (*static_cast<Decayed*>(context))(i, worker); });
  }

 private:
  using Call = void (*)(void* context, Index i, Index worker);

  void run(Index count, void* context, Call call);
  void work(Index worker);
  void stop();
  void take_tasks(Index worker);

  std::vector<std::thread> workers_;
  Call call_ = nullptr;
  void* context_ = nullptr;
  Index count_ = 0;
  std::atomic<Index> next_ = 0;
  std::atomic<std::uint32_t> generation_ = 0;  // of the tasks; changes wake the workers
  std::atomic<Index> busy_ = 0;                // workers that have not finished this generation
  bool stopping_ = false;
  std::mutex failure_mutex_;
  std::exception_ptr failure_;
};

}  // namespace training
