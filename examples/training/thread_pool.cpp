// SPDX-License-Identifier: Apache-2.0
#include "thread_pool.hpp"

#include <concertina/error.hpp>

#include <string>
#include <system_error>

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

void ThreadPool::stop() {
  stopping_ = true;
  generation_.fetch_add(1, std::memory_order_release);
  generation_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::run(Index count, void* context, Call call) {
  call_ = call;
  context_ = context;
  count_ = count;
  next_.store(0, std::memory_order_relaxed);
  const bool alone = workers_.empty() || count < 2;
  if (!alone) {
    busy_.store(std::ssize(workers_), std::memory_order_relaxed);
    generation_.fetch_add(1, std::memory_order_release);
    generation_.notify_all();
  }
  take_tasks(0);
  if (!alone) {
    for (Index busy; (busy = busy_.load(std::memory_order_acquire)) != 0;) {
      wait_while_equal(busy_, busy);
    }
  }
  if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
}

void ThreadPool::work(Index worker) {
  for (std::uint32_t seen = 0;; ++seen) {
    wait_while_equal(generation_, seen);
    if (stopping_) return;
    take_tasks(worker);
    if (busy_.fetch_sub(1, std::memory_order_acq_rel) == 1) busy_.notify_one();
  }
}

void ThreadPool::take_tasks(Index worker) {
  try {
    for (Index i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count_;) {
      call_(context_, i, worker);
    }
  } catch (...) {
    next_.store(count_, std::memory_order_relaxed);
    const std::lock_guard lock(failure_mutex_);
    if (!failure_) failure_ = std::current_exception();
  }
}

}  // namespace training
