// How a job's matrices are read and written, wherever they lie.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/cuda/detail/job.hpp>

#include <type_traits>

namespace concertina::cuda::detail {

/// From a stored element to a sum and back, rounded to nearest. Specialised where that is not a
/// cast: for CUDA's half types in contraction.cuh.
template <class Stored, class Sum>
struct Conversion {
  CONCERTINA_DEVICE static Sum load(Stored element) { return static_cast<Sum>(element); }
  CONCERTINA_DEVICE static Stored store(Sum sum) { return static_cast<Stored>(sum); }
};

/// Where tensors of Stored lie, and the workspace, whose elements are sums.
template <class Stored, class Sum>
struct ContractionMemory {
  void* const* addresses;
  Sum* workspace;

  template <class B>
  CONCERTINA_DEVICE Sum read(B& block, const TensorRef& ref, Offset at) const {
    if (ref.tensor == TensorRef::workspace) return block.read(workspace + at);
    return Conversion<Stored, Sum>::load(
        block.read(static_cast<const Stored*>(addresses[ref.tensor]) + at));
  }
  template <class B>
  CONCERTINA_DEVICE void write(B& block, const TensorRef& ref, Offset at, Sum value) const {
    if (ref.tensor == TensorRef::workspace) {
      block.write(workspace + at, value);
    } else {
      block.write(static_cast<Stored*>(addresses[ref.tensor]) + at,
                  Conversion<Stored, Sum>::store(value));
    }
  }
};

/// A matrix that is read again and again, with its address looked up once; or none.
template <class Stored, class Sum>
class Source {
 public:
  Source() = default;
  CONCERTINA_DEVICE Source(const ContractionMemory<Stored, Sum>& memory, const TensorRef& ref,
                           int group) {
    if (!ref.exists()) return;
    const Offset at = ref.of_group(group);
    if (ref.tensor == TensorRef::workspace) {
      sums_ = memory.workspace + at;
    } else if constexpr (is_mixed) {
      stored_ = static_cast<const Stored*>(memory.addresses[ref.tensor]) + at;
    } else {
      sums_ = static_cast<const Sum*>(memory.addresses[ref.tensor]) + at;
    }
  }

  template <class B>
  CONCERTINA_DEVICE Sum read(B& block, int at) const {
    if constexpr (is_mixed) {
      if (stored_) return Conversion<Stored, Sum>::load(block.read(stored_ + at));
    }
    return block.read(sums_ + at);
  }
  CONCERTINA_DEVICE explicit operator bool() const {
    return sums_ != nullptr || stored_ != nullptr;
  }

  /// Eight elements `stride` apart.
  template <class B>
  CONCERTINA_DEVICE void read(B& block, int at, int stride, Sum (&to)[8]) const {
    if (stride == 1 && sums_) return block.read(sums_ + at, to);
    CONCERTINA_UNROLL
    for (int i = 0; i < 8; ++i) to[i] = read(block, at + i * stride);
  }

 private:
  static constexpr bool is_mixed = !std::is_same_v<Stored, Sum>;
  const Sum* sums_ = nullptr;
  const Stored* stored_ = nullptr;
};

/// C's matrix for a group and a tap, and its epilogue, with addresses looked up once.
template <class Stored, class Sum>
class Destination {
 public:
  /// What the elements of a row have in common.
  struct Row {
    int at;
    Sum bias, u;
  };
  /// Where an element is, and what is added to it.
  struct Element {
    int at;
    Sum bias, u, v;
  };

  Destination() = default;

  CONCERTINA_DEVICE Destination(const ContractionMemory<Stored, Sum>& memory, const Job& job,
                                int group, const Tap& tap)
      : c_m_(job.c_m),
        c_n_(job.c_n),
        m_inner_extent_(job.m_inner_extent),
        bias_(memory, job.epilogue.bias, group),
        u_(memory, job.epilogue.u, group),
        v_(memory, job.epilogue.v, group) {
    const Offset at = job.c.of_group(group) + tap.c;
    if (job.c.tensor == TensorRef::workspace) {
      sums_ = memory.workspace + at;
    } else if constexpr (is_mixed) {
      stored_ = static_cast<Stored*>(memory.addresses[job.c.tensor]) + at;
    } else {
      sums_ = static_cast<Sum*>(memory.addresses[job.c.tensor]) + at;
    }
  }

  /// One of a product's partial sums: dense, without an epilogue.
  CONCERTINA_DEVICE Destination(Sum* partial_sums, int columns)
      : sums_(partial_sums), c_m_{columns}, c_n_(1) {}

  template <class B>
  CONCERTINA_DEVICE Row row(B& block, int m) const {
    const auto at = m_inner_extent_.divide(static_cast<ElementIndex>(m));
    return {at.quotient * c_m_.outer + at.remainder * c_m_.inner,
            bias_ ? bias_.read(block, m) : Sum(0), u_ ? u_.read(block, at.quotient) : Sum(0)};
  }
  template <class B>
  CONCERTINA_DEVICE Element element(B& block, const Row& row, int n) const {
    return {row.at + n * c_n_, row.bias, row.u, u_ ? v_.read(block, n) : Sum(0)};
  }
  template <class B>
  CONCERTINA_DEVICE void write(B& block, const Element& element, Sum sum) const {
    sum += element.bias;
    if (u_) sum += element.u * element.v;
    if constexpr (is_mixed) {
      if (stored_) {
        return block.write(stored_ + element.at, Conversion<Stored, Sum>::store(sum));
      }
    }
    block.write(sums_ + element.at, sum);
  }
  template <class B>
  CONCERTINA_DEVICE void write(B& block, const Row& row, int n, Sum sum) const {
    write(block, element(block, row, n), sum);
  }

 private:
  static constexpr bool is_mixed = !std::is_same_v<Stored, Sum>;
  Sum* sums_ = nullptr;
  Stored* stored_ = nullptr;
  TwoModeStride c_m_ = {};
  int c_n_ = 0;
  Extent m_inner_extent_ = 1;
  Source<Stored, Sum> bias_ = {}, u_ = {}, v_ = {};
};

}  // namespace concertina::cuda::detail
