// Who runs tasks: what may be handed over, and what a plain loop does.
// SPDX-License-Identifier: Apache-2.0
#include <concertina/parallel.hpp>

#include "support.hpp"

#include <catch2/catch.hpp>

#include <functional>
#include <stdexcept>
#include <type_traits>
#include <vector>

namespace concertina::test {
namespace {

std::vector<Index> order_of(const ParallelFor& run, Index count) {
  std::vector<Index> order;
  run(count, [&](Index i) { order.push_back(i); });
  return order;
}

void backwards(Index count, ParallelFor::Task task) {
  for (Index i = count; i-- > 0;) task(i);
}

struct Counting {
  Index calls = 0;

  template <class Task>
  void operator()(Index count, Task&& task) {
    ++calls;
    for (Index i = 0; i < count; ++i) task(i);
  }
};

}  // namespace

TEST_CASE("a plain loop calls its tasks in turn", "[parallel]") {
  CHECK(order_of(serial_for, 4) == std::vector<Index>{0, 1, 2, 3});
  CHECK(order_of(serial_for, 1) == std::vector<Index>{0});
  CHECK(order_of(serial_for, 0).empty());
}

TEST_CASE("whatever is called with a count and a task runs tasks", "[parallel]") {
  const std::vector<Index> reversed{2, 1, 0};
  CHECK(order_of(backwards, 3) == reversed);
  CHECK(order_of(&backwards, 3) == reversed);
  CHECK(order_of([](Index count, auto task) { backwards(count, task); }, 3) == reversed);
  const auto named = [](Index count, const ParallelFor::Task& task) { backwards(count, task); };
  CHECK(order_of(named, 3) == reversed);
  // Tasks fit where pools take a std::function, and so does a pool in one.
  const std::function<void(Index, std::function<void(Index)>)> pool =
      [](Index count, const std::function<void(Index)>& task) {
        for (Index i = count; i-- > 0;) task(i);
      };
  CHECK(order_of(pool, 3) == reversed);
  // It is a reference: what it is made of is called itself, not a copy.
  Counting counting;
  const ParallelFor run = counting, copy = run;
  order_of(run, 3);
  order_of(copy, 2);
  CHECK(counting.calls == 2);

  static_assert(std::is_convertible_v<decltype(serial_for), ParallelFor> &&
                !std::is_convertible_v<int, ParallelFor> &&
                !std::is_convertible_v<void (*)(Index), ParallelFor>);
  CHECK(ParallelFor(serial_for).is_serial());
  CHECK_FALSE(run.is_serial());
}

TEST_CASE("what a task throws passes through", "[parallel]") {
  Index called = 0;
  const auto fails = [&](Index i) {
    ++called;
    if (i == 2) throw std::runtime_error("the third");
  };
  const ParallelFor run = serial_for;
  CHECK_THROWS_WITH(run(5, fails), "the third");
  CHECK(called == 3);
}

}  // namespace concertina::test
