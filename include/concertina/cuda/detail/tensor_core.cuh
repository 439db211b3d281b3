// Tensor cores: products of tiles in bfloat16 with sums in float, by a warp group's asynchronous
// instructions where the code is compiled for them (sm_90a), otherwise by a warp's (sm_80 on).
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/cuda/detail/bf16x6.hpp>
#include <concertina/cuda/launch.cuh>

#include <cstdint>

namespace concertina::cuda::detail {

/// DeviceBlock with tensor cores.
template <int Threads>
class TensorCoreDeviceBlock : public DeviceBlock<Threads> {
 public:
  using DeviceBlock<Threads>::DeviceBlock, DeviceBlock<Threads>::read;

  template <class F>
  __device__ void each_thread_apart(F&& f) {
    f(static_cast<int>(threadIdx.x));
  }

  /// In accesses of 16 bytes where the address allows.
  template <class T>
  __device__ void read(const T* address, T (&to)[8]) const {
    constexpr int at_once = 16 / sizeof(T);
    struct alignas(16) Neighbours {
      T elements[at_once];
    };
    if (reinterpret_cast<std::uintptr_t>(address) % 16 == 0) {
      CONCERTINA_UNROLL
      for (int n = 0; n < 8; n += at_once) {
        const auto some = *reinterpret_cast<const Neighbours*>(address + n);
        CONCERTINA_UNROLL
        for (int i = 0; i < at_once; ++i) to[n + i] = some.elements[i];
      }
    } else {
      CONCERTINA_UNROLL
      for (int n = 0; n < 8; ++n) to[n] = address[n];
    }
  }

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  __device__ void begin_multiply() const {
    __syncwarp();  // branches may lie before, and what follows is for whole warps
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
  }
  __device__ void end_multiply() const {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  }
  template <class Registers, class Member>
  __device__ void wait_for_multiply(Registers& registers, Member member) const {
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    // Or the compiler could read D before: it sees no other connection.
    CONCERTINA_UNROLL
    for (float& sum : registers[0].*member) asm volatile("" : "+f"(sum)::"memory");
  }
  /// What tensor cores read asynchronously goes another way than ordinary accesses.
  __device__ void publish() const { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

  template <class Registers, class Member, class Tiles>
  __device__ void multiply_tiles(Registers& registers, Member member, const Tiles& tiles,
                                 int a_first, int b_first, int half, bool add) const {
    auto& d = registers[0].*member;
    const int group = static_cast<int>(threadIdx.x) / 128;
    const std::uint64_t a = descriptor(tiles, a_first + group * TensorCoreTile::chunks / 2, half),
                        b = descriptor(tiles, b_first, half);
    asm volatile(
        "{\n.reg .pred add;\nsetp.ne.b32 add, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
        "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,"
        "%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,"
        "%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63},"
        "%64, %65, add, 1, 1, 0, 0;\n}\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
          "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),
          "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]),
          "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]),
          "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]),
          "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]),
          "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]),
          "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),
          "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]),
          "+f"(d[63])
        : "l"(a), "l"(b), "r"(static_cast<int>(add)));
  }

 private:
  /// Of a tile in shared memory, along k, in the order of TensorCoreTile: rows of 64 bytes, whose
  /// chunks change places with a period of 512.
  template <class Tiles>
  __device__ static std::uint64_t descriptor(const Tiles& tiles, int first, int half) {
    constexpr std::uint64_t swizzle_64_bytes = std::uint64_t{2} << 62,
                            group_of_rows = std::uint64_t{512 / 16} << 32,
                            ignored = std::uint64_t{1} << 16;
    const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(tiles.address(first)) +
                                                    static_cast<unsigned>(half) * 32);
    return swizzle_64_bytes | group_of_rows | ignored | (address & 0x3ffff) >> 4;
  }
#else
  __device__ void begin_multiply() const { __syncwarp(); }
  __device__ void end_multiply() const {}
  template <class Registers, class Member>
  __device__ void wait_for_multiply(Registers&, Member) const {}
  __device__ void publish() const {}

  template <class Registers, class Member, class Tiles>
  __device__ void multiply_tiles(Registers& registers, Member member, const Tiles& tiles,
                                 int a_first, int b_first, int half, bool add) const {
    auto& d = registers[0].*member;
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    std::uint32_t a[4];
    load_matrices(tiles, a_first, warp * 16 + lane % 16, half * 2 + lane / 16, a);
    CONCERTINA_UNROLL
    for (int column = 0; column < TensorCoreTile::rows; column += 16) {
      std::uint32_t b[4];  // of eight columns, then of the next eight
      load_matrices(tiles, b_first, column + lane % 8 + lane / 16 * 8, half * 2 + lane / 8 % 2, b);
      CONCERTINA_UNROLL
      for (int next = 0; next < 2; ++next) {
        float* const sums = d + (column / 8 + next) * 4;
        if (!add) sums[0] = sums[1] = sums[2] = sums[3] = 0;
#if __CUDA_ARCH__ >= 800  // elsewhere the host refuses
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
            "{%8,%9}, {%0,%1,%2,%3};"
            : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[2 * next]), "r"(b[2 * next + 1]));
#endif
      }
    }
  }

 private:
  /// Four matrices of 8 x 8, of which each lane names a row.
  template <class Tiles>
  __device__ static void load_matrices(const Tiles& tiles, int first, int row, int chunk,
                                       std::uint32_t (&to)[4]) {
    const auto address = static_cast<std::uint32_t>(
        __cvta_generic_to_shared(tiles.address(first + TensorCoreTile::place(row, chunk))));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
  }
#endif
};

}  // namespace concertina::cuda::detail
