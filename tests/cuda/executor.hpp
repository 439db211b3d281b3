// Block programs on the host: threads in a shuffled order between barriers, blocks in a shuffled
// order between launches. Every access is checked: that it is inside what a test has lent, that
// what is read has been written, and that no barrier is missing between two threads or blocks.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/cuda/block.hpp>
#include <concertina/cuda/detail/bf16x6.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace concertina::test {

/// A program that did what it must not.
struct ProgramError : std::logic_error {
  using std::logic_error::logic_error;
};

/// Who touched an element last, and when.
struct Trace {
  struct Access {
    std::int64_t epoch = -1;  // launches
    std::int64_t block = -1, phase = -1, thread = -1;
    bool other_threads = false, other_blocks = false;  // since the last barrier, too
  };
  Access written, read;
  bool initialised = false;

  /// Whether a barrier of the block or the end of a launch is between the two.
  static bool ordered(const Access& before, const Access& now) {
    if (before.epoch != now.epoch) return true;
    if (before.other_blocks || before.block != now.block) return false;
    return before.phase != now.phase || (!before.other_threads && before.thread == now.thread);
  }

  static Access later(const Access& before, Access now) {
    if (before.epoch != now.epoch) return now;
    now.other_blocks = before.other_blocks || before.block != now.block;
    now.other_threads =
        before.phase == now.phase && (before.other_threads || before.thread != now.thread);
    return now;
  }

  /// describe() names the element in messages.
  template <class Describe>
  void on_read(const Access& now, Describe&& describe) {
    if (!initialised) throw ProgramError("read before it was written: " + describe());
    if (!ordered(written, now)) throw ProgramError("no barrier after the write: " + describe());
    read = later(read, now);
  }
  template <class Describe>
  void on_write(const Access& now, Describe&& describe) {
    if (!ordered(written, now)) throw ProgramError("no barrier between writes: " + describe());
    if (!ordered(read, now)) throw ProgramError("no barrier after the read: " + describe());
    written = now;
    initialised = true;
  }
};

/// The device's memory: buffers of the test's, with a trace for each element.
class Memory {
 public:
  explicit Memory(std::uint64_t seed = 1) : random_(seed) {}

  /// Lends elements that a program may read and write.
  template <class T>
  void lend(std::vector<T>& elements) {
    add(elements.data(), elements.size(), sizeof(T), true, true);
  }
  template <class T>
  void lend(const std::vector<T>& elements) {
    add(elements.data(), elements.size(), sizeof(T), true, false);
  }

  /// Lends elements that are uninitialised until they are written; they are poisoned.
  template <class T>
    requires std::is_trivially_copyable_v<T>
  void lend_unwritten(std::vector<T>& elements) {
    if (elements.empty()) return;
    std::memset(static_cast<void*>(elements.data()), 0xff, elements.size() * sizeof(T));
    add(elements.data(), elements.size(), sizeof(T), false, true);
  }

  /// Throws ProgramError unless every element has been written.
  template <class T>
  void require_written(const std::vector<T>& elements) {
    for (std::size_t i = 0; i < elements.size(); ++i) {
      if (!find(&elements[i], sizeof(T), "require_written").trace->initialised) {
        throw ProgramError("element " + std::to_string(i) + " of " +
                           std::to_string(elements.size()) + " was never written");
      }
    }
  }

  template <class T>
  T read(const T* address, const Trace::Access& now) {
    const Found found = find(address, sizeof(T), "read");
    found.trace->on_read(now, [&] { return found.name(); });
    return *address;
  }
  template <class T>
  void write(T* address, const T& value, const Trace::Access& now) {
    const Found found = find(address, sizeof(T), "write");
    if (!found.buffer->writable) throw ProgramError("write to what is only read: " + found.name());
    found.trace->on_write(now, [&] { return found.name(); });
    *address = value;
  }

  std::int64_t epoch = 0;
  std::mt19937_64& random() { return random_; }

 private:
  struct Buffer {
    std::size_t count, size;  // elements, bytes of one
    bool writable;
    std::vector<Trace> traces;
  };
  struct Found {
    Buffer* buffer;
    std::size_t index;
    Trace* trace;

    std::string name() const {
      return "element " + std::to_string(index) + " of a buffer of " +
             std::to_string(buffer->count);
    }
  };

  void add(const void* first, std::size_t count, std::size_t size, bool initialised,
           bool writable) {
    if (count == 0) return;
    Buffer buffer{count, size, writable, std::vector<Trace>(count)};
    for (Trace& trace : buffer.traces) trace.initialised = initialised;
    buffers_[reinterpret_cast<std::uintptr_t>(first)] = std::move(buffer);
  }

  Found find(const void* address, std::size_t size, const char* what) {
    const auto at = reinterpret_cast<std::uintptr_t>(address);
    auto after = buffers_.upper_bound(at);
    if (after == buffers_.begin()) throw ProgramError(std::string(what) + " outside all buffers");
    Buffer& buffer = std::prev(after)->second;
    const std::size_t offset = at - std::prev(after)->first, number = offset / buffer.size;
    if (number >= buffer.count || offset % buffer.size != 0 || size != buffer.size) {
      throw ProgramError(std::string(what) + " outside all buffers: " + std::to_string(offset) +
                         " bytes from the start of " + std::to_string(buffer.count) + " elements");
    }
    return {&buffer, number, &buffer.traces[number]};
  }

  std::map<std::uintptr_t, Buffer> buffers_;
  std::mt19937_64 random_;
};

/// How tensor cores add up the products of bfloat16 elements, as measurements of others found:
/// aligned to the largest, so many bits further than float has, and truncated. How many differs
/// between devices; the seed chooses.
/// Source  Fasi, Higham, Mikaitis and Pranesh, "Numerical behavior of NVIDIA tensor cores", 2021
class TensorCoreEmulation {
 public:
  static constexpr int terms = 16;

  explicit TensorCoreEmulation(std::uint64_t seed) : more_bits_(static_cast<int>(seed % 3)) {}

  float dot(const double* a, const double* b, float added) const {
    double products[terms + 1], most = std::abs(static_cast<double>(added));
    for (int k = 0; k < terms; ++k) {
      products[k] = a[k] * b[k];
      most = std::max(most, std::abs(products[k]));
    }
    products[terms] = static_cast<double>(added);
    if (most == 0 || !std::isfinite(most)) return static_cast<float>(most);
    const double quantum = std::ldexp(1.0, std::ilogb(most) + 1 - float_bits - more_bits_);
    double sum = 0;
    for (const double product : products) sum += std::trunc(product / quantum) * quantum;
    if (sum == 0) return 0;
    const double ulp = std::ldexp(1.0, std::ilogb(sum) + 1 - float_bits);
    return static_cast<float>(std::trunc(sum / ulp) * ulp);
  }

 private:
  static constexpr int float_bits = std::numeric_limits<float>::digits;
  int more_bits_;
};

/// A block of threads on the host.
template <int Threads>
class HostBlock {
 public:
  static constexpr int threads = Threads;

  /// With `waits`, earlier launches may go on until wait().
  HostBlock(Memory& memory, std::int64_t index, std::size_t shared_bytes, bool waits = false)
      : memory_(memory), index_(index), waited_(!waits), shared_bytes_(shared_bytes) {
    std::iota(order_.begin(), order_.end(), 0);
  }

  template <class T>
  class PerThread {
   public:
    explicit PerThread(const HostBlock&) : values_(Threads) {}
    T& operator[](int thread) { return values_.at(static_cast<std::size_t>(thread)); }

   private:
    std::vector<T> values_;
  };

  template <class T>
  class Shared {
   public:
    Shared(HostBlock& block, std::size_t count)
        : block_(block), elements_(std::make_shared<Elements>(count)) {}

    T get(int i) const {
      const std::size_t at = index(i);
      elements_->traces[at].on_read(block_.now(), [&] { return name(i); });
      return elements_->values[at];
    }
    template <int N>
    void get(int i, T (&to)[N]) const {
      if (i % N != 0) throw ProgramError(name(i) + " is no multiple of " + std::to_string(N));
      for (int n = 0; n < N; ++n) to[n] = get(i + n);
    }
    void set(int i, const T& value) const {
      const std::size_t at = index(i);
      elements_->traces[at].on_write(block_.now(), [&] { return name(i); });
      elements_->values[at] = value;
      if constexpr (std::is_same_v<T, cuda::detail::Bf16Chunk>) {
        block_.unpublished_.insert(block_.thread_);
      }
    }
    /// Unchecked.
    const T& peek(int i) const { return elements_->values[index(i)]; }

   private:
    struct Elements {
      explicit Elements(std::size_t count) : values(count), traces(count) {}
      std::vector<T> values;
      std::vector<Trace> traces;
    };
    std::string name(int i) const {
      return "shared element " + std::to_string(i) + " of " +
             std::to_string(elements_->values.size());
    }
    std::size_t index(int i) const {
      if (i < 0 || static_cast<std::size_t>(i) >= elements_->values.size()) {
        throw ProgramError(name(i));
      }
      return static_cast<std::size_t>(i);
    }
    HostBlock& block_;
    std::shared_ptr<Elements> elements_;
  };

  template <class F>
  void each_thread(F&& f) {
    std::shuffle(order_.begin(), order_.end(), memory_.random());
    const bool waited = waited_;
    bool any_waited = false;
    for (const int thread : order_) {
      thread_ = thread;
      waited_ = waited;
      f(thread);
      any_waited = any_waited || waited_;
    }
    thread_ = -1;
    waited_ = any_waited;
    for (const auto& require_same : waited_for_) require_same();
    waited_for_.clear();
    ++phase_;
  }

  void wait() { waited_ = true; }
  bool has_waited() const { return waited_; }

  template <class T>
  Shared<T> shared(int count) {
    use<T>(static_cast<std::size_t>(count));
    return Shared<T>(*this, static_cast<std::size_t>(count));
  }
  template <class T>
  const T& share(const T& object) {
    use<T>(1);
    return object;
  }

  /// Without a barrier.
  template <class F>
  void each_thread_apart(F&& f) {
    std::shuffle(order_.begin(), order_.end(), memory_.random());
    for (const int thread : order_) {
      thread_ = thread;
      f(thread);
    }
    thread_ = -1;
  }

  // Tensor cores. What is multiplied is read when it is issued, and must still be there at the
  // barrier after it is waited for: other warps may be that late. Sums are there only when they are
  // waited for, and are poisoned meanwhile. They see what a thread wrote once it has published it.
  void publish() { unpublished_.erase(thread_); }
  void begin_multiply() { emulation_ = TensorCoreEmulation(memory_.random()()); }
  void end_multiply() {}
  template <class Registers, class Member>
  void wait_for_multiply(PerThread<Registers>&, Member) {
    for (const auto& multiply : multiplies_) multiply();
    multiplies_.clear();
    waited_for_.insert(waited_for_.end(), multiplied_.begin(), multiplied_.end());
    multiplied_.clear();
  }
  template <class Registers, class Member, class Tiles>
  void multiply_tiles(PerThread<Registers>& registers, Member member, const Tiles& tiles,
                      int a_first, int b_first, int half, bool add) {
    using cuda::detail::TensorCoreTile;
    const auto read = [this, &tiles, half](int first) {
      std::vector<cuda::detail::Bf16Chunk> chunks;
      each_thread_apart([&](int thread) {
        if (thread > 0) return;
        for (int row = 0; row < TensorCoreTile::rows; ++row) {
          for (const int chunk : {2 * half, 2 * half + 1}) {
            chunks.push_back(tiles.get(first + TensorCoreTile::place(row, chunk)));
          }
        }
      });
      return chunks;
    };
    const auto require_same = [tiles, half](int first,
                                            const std::vector<cuda::detail::Bf16Chunk>& chunks) {
      for (int i = 0; i < static_cast<int>(chunks.size()); ++i) {
        const int at = first + TensorCoreTile::place(i / 2, 2 * half + i % 2);
        if (std::memcmp(&tiles.peek(at), &chunks[static_cast<std::size_t>(i)],
                        sizeof(cuda::detail::Bf16Chunk)) != 0) {
          throw ProgramError("chunk " + std::to_string(at) +
                             " was written while it was multiplied");
        }
      }
    };
    const auto each_sum = [&registers, member](auto&& visit) {
      for (int thread = 0; thread < Threads; ++thread) {
        auto& sums = registers[thread].*member;
        for (int i = 0; i < cuda::detail::AccumulatorLayout::elements; ++i) {
          visit(sums[i],
                thread / 128 * cuda::detail::AccumulatorLayout::m +
                    cuda::detail::AccumulatorLayout::row(thread % 128, i),
                cuda::detail::AccumulatorLayout::column(thread % 128, i));
        }
      }
    };
    if (!unpublished_.empty()) {
      throw ProgramError("thread " + std::to_string(*unpublished_.begin()) +
                         " has not published what is multiplied");
    }
    const auto a = read(a_first), b = read(b_first);
    chain_ = add ? chain_ + 1 : 1;
    if (chain_ > longest_chain) throw ProgramError("more than 32 terms before they are promoted");
    if (!add) {
      each_sum([](float& sum, int, int) { sum = std::numeric_limits<float>::quiet_NaN(); });
    }
    multiplied_.push_back([=] {
      require_same(a_first, a);
      require_same(b_first, b);
    });
    multiplies_.push_back([=, emulation = emulation_] {
      const auto elements_of = [](const std::vector<cuda::detail::Bf16Chunk>& chunks) {
        std::vector<double> elements;
        for (const cuda::detail::Bf16Chunk& chunk : chunks) {
          for (const std::uint32_t pair : chunk.pairs) {
            elements.push_back(static_cast<double>(cuda::detail::bf16_low(pair)));
            elements.push_back(static_cast<double>(cuda::detail::bf16_high(pair)));
          }
        }
        return elements;
      };
      const auto rows = elements_of(a), columns = elements_of(b);
      each_sum([&](float& sum, int row, int column) {
        constexpr int k = TensorCoreEmulation::terms;
        sum = emulation.dot(&rows[static_cast<std::size_t>(row * k)],
                            &columns[static_cast<std::size_t>(column * k)], add ? sum : 0.0F);
      });
    });
  }

  template <class T>
  T read(const T* address) {
    require_waited();
    return memory_.read(address, now());
  }
  template <class T>
  void read(const T* address, T (&to)[8]) {
    for (int i = 0; i < 8; ++i) to[i] = read(address + i);
  }
  template <class T>
  void write(T* address, const std::type_identity_t<T>& value) {
    require_waited();
    memory_.write(address, value, now());
  }

 private:
  template <class T>
  void use(std::size_t count) {
    used_ += cuda::shared_size<T>(count);
    if (used_ > shared_bytes_) {
      throw ProgramError("asks for " + std::to_string(used_) + " bytes of shared memory and said " +
                         std::to_string(shared_bytes_));
    }
  }

  void require_waited() const {
    if (!waited_) throw ProgramError("memory touched before wait()");
  }

  Trace::Access now() const {
    if (thread_ < 0) throw ProgramError("memory touched outside each_thread");
    return {memory_.epoch, index_, phase_, thread_};
  }

  Memory& memory_;
  std::int64_t index_, phase_ = 0, thread_ = -1;
  bool waited_;
  std::size_t shared_bytes_, used_ = 0;
  /// Six products of 32 terms, 16 at a time.
  static constexpr int longest_chain = 6 * 32 / TensorCoreEmulation::terms;
  int chain_ = 0;
  TensorCoreEmulation emulation_{0};
  std::vector<std::function<void()>> multiplies_;
  std::vector<std::function<void()>> multiplied_, waited_for_;  // that it is the same
  std::set<std::int64_t> unpublished_;                          // threads
  std::vector<int> order_ = std::vector<int>(static_cast<std::size_t>(Threads));
};

static_assert(cuda::ThreadBlock<HostBlock<32>>);

/// What a launch does: every block once, in a shuffled order.
template <cuda::BlockProgram Program>
void execute(const Program& program, Memory& memory) {
  std::vector<std::int64_t> blocks(static_cast<std::size_t>(program.blocks()));
  std::iota(blocks.begin(), blocks.end(), std::int64_t{0});
  std::shuffle(blocks.begin(), blocks.end(), memory.random());
  constexpr bool waits = requires { Program::waits; };
  for (const std::int64_t index : blocks) {
    HostBlock<Program::threads> block(memory, index, program.shared_bytes(), waits);
    program(block, static_cast<Index>(index));
    if (!block.has_waited()) throw ProgramError("a block ends that has not waited");
  }
  ++memory.epoch;
}

/// The blocks of a launch that share tiles out. What a block runs counts as blocks of their own for
/// the checks: it must not matter which block runs a tile.
template <int Threads>
class HostGrid {
 public:
  static constexpr int threads = Threads;

  HostGrid(Memory& memory, int index, int blocks, std::size_t shared_bytes)
      : memory_(memory), index_(index), blocks_(blocks), shared_bytes_(shared_bytes) {}

  int index() const { return index_; }
  int blocks() const { return blocks_; }
  template <class F>
  void run(F&& f) {
    HostBlock<Threads> block(memory_, index_ + blocks_ * runs_++, shared_bytes_);
    f(block);
  }

 private:
  Memory& memory_;
  int index_, blocks_;
  std::int64_t runs_ = 0;
  std::size_t shared_bytes_;
};

static_assert(cuda::detail::Grid<HostGrid<32>>);

/// What a launch of so many blocks does.
template <class Program>
  requires(!cuda::BlockProgram<Program>)
void execute(const Program& program, int blocks, Memory& memory) {
  std::vector<int> indices(static_cast<std::size_t>(blocks));
  std::iota(indices.begin(), indices.end(), 0);
  std::shuffle(indices.begin(), indices.end(), memory.random());
  for (const int index : indices) {
    HostGrid<Program::threads> grid(memory, index, blocks, program.shared_bytes());
    program(grid);
  }
  ++memory.epoch;
}

}  // namespace concertina::test
