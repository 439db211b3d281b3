// Threads that run numbered tasks: which thread runs which is left open, so tasks must not depend
// on it.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "lanes.hpp"

#include <concertina/detail/function_ref.hpp>

#include <atomic>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace training {

class ThreadPool {
 public:
  using Task = concertina::detail::FunctionRef<void(Index i, Index worker)>;

  /// `threads` of them, the caller's own included. Throws Error where they cannot be started.
  explicit ThreadPool(Index threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  Index size() const { return 1 + static_cast<Index>(workers_.size()); }

  /// task(i, worker) for each i below count, where worker is below size() and no two tasks at a
  /// time have the same. Returns when all are done. Rethrows the first exception; then some tasks
  /// may not have run. Not from within a task.
  void run(Index count, Task task);

  /// task(i), as concertina::ParallelFor calls it.
  template <class Each>
  void operator()(Index count, Each&& task) {
    run(count, [&task](Index i, Index) { task(i); });
  }

  /// Leaves a task to a thread that has nothing else to do: beside the tasks of runs, at the latest
  /// in wait(). Which of several runs first is open.
  void submit(std::function<void()> task);

  /// Returns when all submitted tasks are done; takes part in it. Rethrows the first exception of
  /// theirs.
  void wait();

 private:
  void work(Index worker);
  void wake();
  void stop();
  void take_tasks(Index worker);
  bool take_submitted();
  void keep(std::exception_ptr& failure);

  std::vector<std::thread> workers_;
  std::atomic<std::uint32_t> news_ = 0;  // changes wake the workers
  std::atomic<bool> stopping_ = false;

  const Task* task_ = nullptr;  // of the run; who took one of its tasks may read it
  Index count_ = 0;
  std::atomic<Index> left_ = 0, done_ = 0;  // tasks nobody has taken; tasks that are done

  std::mutex mutex_;  // of what follows
  std::deque<std::function<void()>> submitted_;
  std::exception_ptr failure_, submitted_failure_;
  std::atomic<Index> pending_ = 0;  // submitted, not done
};

}  // namespace training
