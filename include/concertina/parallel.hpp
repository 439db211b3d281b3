// Who runs independent tasks: a plain loop, or the caller's threads.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/detail/function_ref.hpp>
#include <concertina/shape.hpp>

#include <concepts>
#include <type_traits>

namespace concertina {

namespace detail {

struct SerialFor;

}  // namespace detail

/// The caller's threads: anything that is called as run(count, task), calls task(i) once for each i
/// in 0 .. count - 1, in any order, at the same time if it likes, and returns when all are done. A
/// reference: the callable must outlive it, as a temporary argument of a function does.
class ParallelFor {
 public:
  using Task = detail::FunctionRef<void(Index)>;

  template <class Run>
    requires(!std::same_as<std::remove_cvref_t<Run>, ParallelFor>) &&
                std::invocable<Run&, Index, Task>
  ParallelFor(Run&& run) noexcept
      : run_(run), is_serial_(std::same_as<std::remove_cvref_t<Run>, detail::SerialFor>) {}

  void operator()(Index count, Task task) const { run_(count, task); }

  /// Whether it is serial_for, so that tasks can share memory.
  bool is_serial() const noexcept { return is_serial_; }

 private:
  detail::FunctionRef<void(Index, Task)> run_;
  bool is_serial_;
};

/// A plain loop.
struct detail::SerialFor {
  void operator()(Index count, ParallelFor::Task task) const {
    for (Index i = 0; i < count; ++i) task(i);
  }
};
/// A plain loop, what is done without threads.
inline constexpr detail::SerialFor serial_for{};

}  // namespace concertina
