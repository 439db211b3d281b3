// A backend of the CIFAR example on the host: programs run in the executor, which checks them, and
// are recorded and replayed as on a device. Programs of different streams run in a random order,
// which each backend draws anew, but for what waits for another.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cifar/cuda/device_tape.hpp"
#include "cuda/executor.hpp"
#include "cuda/on_host.hpp"

#include <concertina/cuda/detail/tensor_table.hpp>
#include <concertina/error.hpp>

#include <cstddef>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace cifar::test {

class HostBackend {
 public:
  /// Memory that is used again would confuse the executor.
  template <class T>
  T* allocate(Index count) {
    const auto numbers = std::make_shared<std::vector<T>>(static_cast<std::size_t>(count));
    if (count > 0) memory_.lend_unwritten(*numbers);
    buffers_.push_back(numbers);
    return numbers->data();
  }

  /// Throw  concertina::Error where a recording would not have the copy
  template <class T>
  void upload(std::span<const T> from, T* to) {
    refuse_to_record("an upload");
    finish();
    execute(Upload<T>{{std::ssize(from)}, from.data(), to}, memory_);
    ++uploads;
  }
  template <class T>
  void download(const T* from, std::span<T> to) {
    refuse_to_record("a download");
    finish();
    execute(Download<T>{{std::ssize(to)}, from, to.data()}, memory_);
    ++downloads;
  }

  cuda::Stream stream(int) {
    queues_.emplace_back();
    return static_cast<cuda::Stream>(queues_.size() - 1);
  }

  /// Until a copy. There it throws  concertina::Error naming the purpose, where a program does what
  /// it must not
  template <class Program>
  void run(const Program& program, const std::string& purpose, cuda::Stream stream) {
    sequence.push_back(name_of(stream) + ": " + purpose + ", " + std::to_string(program.blocks()) +
                       "x" + std::to_string(Program::threads) + ", " +
                       std::to_string(program.shared_bytes()));
    issue(stream, [this, program, purpose] {
      try {
        execute(program, memory_);
      } catch (const concertina::test::ProgramError& error) {
        throw concertina::Error(purpose + ": " + error.what());
      }
    });
  }

  /// As a device does: the plan's programs, on the numbers where they lie.
  template <class Scalar>
  class Contraction {
   public:
    Contraction(HostBackend& backend, const concertina::cuda::PlannedForm& form,
                cuda::Stream stream)
        : backend_(backend),
          stream_(stream),
          plan_(std::vector{form}),
          workspace_(backend.allocate<Scalar>(plan_.workspace())) {}
    Contraction(const Contraction&) = delete;
    Contraction& operator=(const Contraction&) = delete;
    ~Contraction() {
      if (on_end_of_contraction) on_end_of_contraction(backend_.recordings());
    }

    void forward(const cuda::Expansion<Scalar>& at) {
      concertina::cuda::detail::AddressTable table(plan_);
      table.add<const Scalar>(Role::layer, at.layers);
      table.add<Scalar>(Role::result, at.products);
      run(plan_.forward(), table, "contraction");
    }
    void backward(const cuda::Expansion<Scalar>& at) {
      concertina::cuda::detail::AddressTable table(plan_);
      table.add<const Scalar>(Role::layer, at.layers);
      table.add<const Scalar>(Role::result_gradient, at.product_gradients);
      table.add<Scalar>(Role::layer_gradient, at.layer_gradients);
      run(plan_.backward(), table, "gradient of a contraction");
    }

   private:
    using Role = concertina::cuda::TensorUse::Role;

    void run(const concertina::cuda::detail::Sequence& pass,
             const concertina::cuda::detail::AddressTable& table, const std::string& purpose) {
      constexpr int most = concertina::cuda::ContractionPlan::most_tensors;
      backend_.sequence.push_back(name_of(stream_) + ": " + purpose);
      backend_.issue(stream_, [this, addresses = table.addresses<most>(), &pass] {
        execute<Scalar, Scalar>(pass, addresses, workspace_, 1, backend_.memory());
      });
    }

    HostBackend& backend_;
    cuda::Stream stream_;
    concertina::cuda::ContractionPlan plan_;
    Scalar* workspace_;
  };

  /// What is no program takes part in recordings too.
  void issue(cuda::Stream stream, std::function<void()> work) {
    add({stream, stream, std::move(work)});
  }

  void wait(cuda::Stream later, cuda::Stream earlier) {
    if (later == earlier) return;
    sequence.push_back(name_of(later) + " after " + name_of(earlier));
    add({later, earlier, [] {}});
  }

  /// As on a device: launched, then recorded with the values that programs have then, then
  /// replayed.
  /// Throws  concertina::Error where a capture would not have all that is launched
  template <class Launches>
  void repeat(const cuda::StepKind& kind, Launches&& launches) {
    const auto [found, first] = recordings_.try_emplace(kind);
    if (first) return launches();
    if (found->second.empty()) {
      recording_ = &found->second;
      forked_ = {cuda::Stream::origin};
      open_ = {};
      launches();
      recording_ = nullptr;
      if (!open_.empty()) throw concertina::Error("a stream is not joined");
    }
    for (const Item& item : found->second) enqueue(item);
  }
  void forget() {
    queues_.assign(queues_.size(), {});
    recordings_.clear();
  }
  std::size_t recordings() const { return recordings_.size(); }

  concertina::test::Memory& memory() { return memory_; }

  /// "stream: purpose, blocks x threads, bytes of shared memory" of what was launched, not
  /// replayed; and "stream after stream".
  std::vector<std::string> sequence;
  int uploads = 0, downloads = 0;
  /// Called with the recordings that there are when one is destroyed.
  inline static std::function<void(std::size_t)> on_end_of_contraction;

 private:
  /// What runs on a stream, after what was issued there before and so far on `earlier`.
  struct Item {
    cuda::Stream stream, earlier;
    std::function<void()> work;
  };
  struct Queue {
    struct Entry {
      Item item;
      std::size_t earlier;  // how many of that stream
    };
    std::deque<Entry> entries;
    std::size_t issued = 0, done = 0;
  };
  Queue& queue(cuda::Stream stream) { return queues_[static_cast<std::size_t>(stream)]; }

  static std::string name_of(cuda::Stream stream) {
    return std::to_string(static_cast<int>(stream));
  }
  void add(Item item) {
    if (!recording_) return enqueue(item);
    if (!forked_.contains(item.earlier)) throw concertina::Error("a stream is not forked");
    forked_.insert(item.stream);
    if (item.stream != cuda::Stream::origin) open_.insert(item.stream);
    if (item.stream == cuda::Stream::origin) open_.erase(item.earlier);
    recording_->push_back(std::move(item));
  }
  void enqueue(const Item& item) {
    const std::size_t earlier = queue(item.earlier).issued;
    queue(item.stream).entries.push_back({item, earlier});
    ++queue(item.stream).issued;
  }
  /// Runs all that was issued, unless it is running.
  void finish() {
    if (std::exchange(finishing_, true)) return;
    const auto is_ready = [this](const Queue& which) {
      if (which.entries.empty()) return false;
      const auto& [item, earlier] = which.entries.front();
      return queue(item.earlier).done >= (item.earlier == item.stream ? 0 : earlier);
    };
    for (;;) {
      std::vector<Queue*> ready;
      for (Queue& which : queues_) {
        if (is_ready(which)) ready.push_back(&which);
      }
      if (ready.empty()) break;
      Queue& next = *ready[random_() % ready.size()];
      const auto work = std::move(next.entries.front().item.work);
      next.entries.pop_front();
      work();
      ++next.done;
    }
    finishing_ = false;
  }

  /// The executor sees one side; the other is the test's.
  template <class T>
  struct Upload : cuda::detail::Elementwise<Upload<T>> {
    const T* from;
    T* to;

    template <class B>
    void at(B& block, Index i) const {
      block.write(to + i, from[i]);
    }
  };
  template <class T>
  struct Download : cuda::detail::Elementwise<Download<T>> {
    const T* from;
    T* to;

    template <class B>
    void at(B& block, Index i) const {
      to[i] = block.read(from + i);
    }
  };

  void refuse_to_record(const std::string& what) const {
    if (recording_) throw concertina::Error(what + " cannot be recorded");
  }

  concertina::test::Memory memory_;
  std::vector<std::shared_ptr<void>> buffers_;
  inline static unsigned seed_ = 0;
  std::minstd_rand random_{++seed_};
  std::vector<Queue> queues_ = std::vector<Queue>(1);
  bool finishing_ = false;
  std::map<cuda::StepKind, std::vector<Item>> recordings_;
  std::vector<Item>* recording_ = nullptr;
  std::set<cuda::Stream> forked_, open_;  // in the recording; not joined yet
};

static_assert(cuda::Backend<HostBackend>);

}  // namespace cifar::test
