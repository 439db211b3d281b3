// A backend of the CIFAR example on the host: programs run in the executor, which checks them.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cifar/cuda/network.hpp"
#include "executor.hpp"

#include <concertina/error.hpp>

#include <cstddef>
#include <memory>
#include <span>
#include <string>
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

  template <class T>
  void upload(std::span<const T> from, T* to) {
    execute(Upload<T>{from, to}, memory_);
  }
  template <class T>
  void download(const T* from, std::span<T> to) {
    execute(Download<T>{from, to}, memory_);
  }

  /// Throws  concertina::Error naming the purpose, where a program does what it must not
  template <class Program>
  void run(const Program& program, const std::string& purpose) {
    try {
      execute(program, memory_);
    } catch (const concertina::test::ProgramError& error) {
      throw concertina::Error(purpose + ": " + error.what());
    }
    purposes.push_back(purpose);
  }

  template <class Launches>
  void repeat(int, Launches&& launches) {
    launches();
  }

  concertina::test::Memory& memory() { return memory_; }

  std::vector<std::string> purposes;  ///< of what was run

 private:
  /// The executor sees one side; the other is the test's.
  template <class T>
  struct Upload {
    static constexpr int threads = 1;
    std::span<const T> from;
    T* to;

    Index blocks() const { return 1; }
    std::size_t shared_bytes() const { return 0; }
    template <concertina::cuda::Block B>
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
    template <concertina::cuda::Block B>
    void operator()(B& block, Index) const {
      block.each_thread([&](int) {
        for (std::size_t i = 0; i < to.size(); ++i) to[i] = block.read(from + i);
      });
    }
  };

  concertina::test::Memory memory_;
  std::vector<std::shared_ptr<void>> buffers_;
};

static_assert(cuda::Backend<HostBackend>);

}  // namespace cifar::test
