// A backend of the CIFAR example on the host: programs run in the executor, which checks them, and
// are recorded and replayed as on a device.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cifar/cuda/network.hpp"
#include "cuda/executor.hpp"

#include <concertina/error.hpp>

#include <cstddef>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace cifar::test {

class HostBackend {
 public:
  /// Its numbers are the backend's, which keeps them: that memory is used again would confuse the
  /// executor.
  template <class T>
  class Buffer {
   public:
    Buffer() = default;
    explicit Buffer(T* numbers) : numbers_(numbers) {}
    T* data() { return numbers_; }
    const T* data() const { return numbers_; }

   private:
    T* numbers_ = nullptr;
  };

  template <class T>
  Buffer<T> allocate(Index count) {
    const auto numbers = std::make_shared<std::vector<T>>(static_cast<std::size_t>(count));
    if (count > 0) memory_.lend_unwritten(*numbers);
    buffers_.push_back(numbers);
    return Buffer<T>(numbers->data());
  }

  /// Throw  concertina::Error where a recording would not have the copy
  template <class T>
  void upload(std::span<const T> from, T* to) {
    refuse_to_record("an upload");
    execute(Upload<T>{from, to}, memory_);
    ++uploads;
  }
  template <class T>
  void download(const T* from, std::span<T> to) {
    refuse_to_record("a download");
    execute(Download<T>{from, to}, memory_);
    ++downloads;
  }

  /// Throws  concertina::Error naming the purpose, where a program does what it must not
  template <class Program>
  void run(const Program& program, const std::string& purpose) {
    issue([this, program, purpose] {
      try {
        execute(program, memory_);
      } catch (const concertina::test::ProgramError& error) {
        throw concertina::Error(purpose + ": " + error.what());
      }
      purposes.push_back(purpose);
    });
  }

  /// What is no program takes part in recordings too.
  void issue(std::function<void()> work) {
    if (recording_) {
      recording_->push_back(std::move(work));
    } else {
      work();
    }
  }

  /// As on a device: launched, then recorded with the values that programs have then, then
  /// replayed.
  template <class Launches>
  void repeat(const cuda::StepKind& kind, Launches&& launches) {
    const auto [found, first] = recordings_.try_emplace(kind);
    if (first) return launches();
    if (found->second.empty()) {
      recording_ = &found->second;
      launches();
      recording_ = nullptr;
    }
    for (const auto& work : found->second) work();
  }
  void forget() { recordings_.clear(); }
  std::size_t recordings() const { return recordings_.size(); }

  concertina::test::Memory& memory() { return memory_; }

  std::vector<std::string> purposes;  ///< of what was run
  int uploads = 0, downloads = 0;

 private:
  /// The executor sees one side; the other is the test's.
  template <class T>
  struct Upload {
    static constexpr int threads = 1;
    std::span<const T> from;
    T* to;

    Index blocks() const { return 1; }
    std::size_t shared_bytes() const { return 0; }
    template <concertina::cuda::ThreadBlock B>
    void operator()(B& block, Index) const {
      block.each_thread([&](int) {
        for (std::size_t i = 0; i < from.size(); ++i) block.write(to + i, from[i]);
      });
    }
  };
  template <class T>
  struct Download {
    static constexpr int threads = 1;
    const T* from;
    std::span<T> to;

    Index blocks() const { return 1; }
    std::size_t shared_bytes() const { return 0; }
    template <concertina::cuda::ThreadBlock B>
    void operator()(B& block, Index) const {
      block.each_thread([&](int) {
        for (std::size_t i = 0; i < to.size(); ++i) to[i] = block.read(from + i);
      });
    }
  };

  void refuse_to_record(const std::string& what) const {
    if (recording_) throw concertina::Error(what + " cannot be recorded");
  }

  concertina::test::Memory memory_;
  std::vector<std::shared_ptr<void>> buffers_;
  std::map<cuda::StepKind, std::vector<std::function<void()>>> recordings_;
  std::vector<std::function<void()>>* recording_ = nullptr;
};

static_assert(cuda::Backend<HostBackend>);

}  // namespace cifar::test
