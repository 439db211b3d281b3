// SPDX-License-Identifier: Apache-2.0
#include "thread_pool.hpp"

#include <concertina/error.hpp>

#include <algorithm>
#include <string>
#include <system_error>
#include <utility>

namespace training {
namespace {

/// Waits until the value is another one: a while by asking again, because the next tasks usually
/// come within microseconds and a sleeping thread takes fifty of them to wake.
template <class T>
void wait_while_equal(const std::atomic<T>& value, T old) {
  for (int spin = 0; spin < 4000; ++spin) {
    if (value.load(std::memory_order_acquire) != old) return;
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
  value.wait(old, std::memory_order_acquire);
}

}  // namespace

ThreadPool::ThreadPool(Index threads) {
  if (threads < 1) {
    throw concertina::Error(std::to_string(threads) + " threads; at least one is needed");
  }
  try {
    for (Index worker = 1; worker < threads; ++worker) {
      workers_.emplace_back([this, worker] { work(worker); });
    }
  } catch (const std::system_error& error) {
    stop();
    throw concertina::Error("only " + std::to_string(size()) + " of " + std::to_string(threads) +
                            " threads could be started: " + error.what());
  }
}

ThreadPool::~ThreadPool() { stop(); }

void ThreadPool::wake() {
  news_.fetch_add(1, std::memory_order_release);
  news_.notify_all();
}

void ThreadPool::stop() {
  stopping_ = true;
  wake();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::keep(std::exception_ptr& failure) {
  const std::lock_guard lock(mutex_);
  if (!failure) failure = std::current_exception();
}

void ThreadPool::run(Index count, Task task) {
  task_ = &task;
  count_ = count;
  done_.store(0, std::memory_order_relaxed);
  left_.store(count, std::memory_order_release);
  if (!workers_.empty() && count > 1) wake();
  take_tasks(0);
  for (Index done; (done = done_.load(std::memory_order_acquire)) != count;) {
    wait_while_equal(done_, done);
  }
  if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
}

void ThreadPool::submit(std::function<void()> task) {
  {
    const std::lock_guard lock(mutex_);
    submitted_.push_back(std::move(task));
  }
  pending_.fetch_add(1, std::memory_order_relaxed);
  if (!workers_.empty()) wake();
}

void ThreadPool::wait() {
  while (take_submitted()) {
  }
  for (Index pending; (pending = pending_.load(std::memory_order_acquire)) != 0;) {
    wait_while_equal(pending_, pending);
  }
  if (submitted_failure_) std::rethrow_exception(std::exchange(submitted_failure_, nullptr));
}

void ThreadPool::work(Index worker) {
  for (;;) {
    const std::uint32_t seen = news_.load(std::memory_order_acquire);
    take_tasks(worker);
    if (take_submitted()) continue;
    if (stopping_) return;
    wait_while_equal(news_, seen);
  }
}

void ThreadPool::take_tasks(Index worker) {
  // A task that was taken keeps the run from ending, so its call is there to be read.
  for (Index left; (left = left_.fetch_sub(1, std::memory_order_acq_rel)) > 0;) {
    const Index count = count_;
    Index finished = 1;
    try {
      (*task_)(count - left, worker);
    } catch (...) {
      keep(failure_);
      finished += std::max<Index>(0, left_.exchange(0, std::memory_order_acq_rel));
    }
    if (done_.fetch_add(finished, std::memory_order_acq_rel) + finished == count) {
      done_.notify_one();
    }
  }
}

bool ThreadPool::take_submitted() {
  std::function<void()> task;
  {
    const std::lock_guard lock(mutex_);
    if (submitted_.empty()) return false;
    task = std::move(submitted_.front());
    submitted_.pop_front();
  }
  try {
    task();
  } catch (...) {
    keep(submitted_failure_);
  }
  if (pending_.fetch_sub(1, std::memory_order_acq_rel) == 1) pending_.notify_all();
  return true;
}

}  // namespace training
