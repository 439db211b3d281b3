// A plan run on the host: phases through the executor, cuBLAS's part by plain loops.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "executor.hpp"
#include "passes.hpp"

#include <concertina/cuda/detail/bf16x6.hpp>
#include <concertina/cuda/plan.hpp>
#include <concertina/modular.hpp>

#include <cstddef>
#include <cstdint>
#include <span>
#include <type_traits>
#include <utility>
#include <vector>

namespace concertina::test {

inline bool can_run() { return true; }

/// A GEMM by its definition.
template <class Stored, class Sum>
void execute(const cuda::detail::Gemm& gemm, const cuda::detail::ContractionMemory<Stored, Sum>& at,
             Memory& memory) {
  HostBlock<1> block(memory, 0, 0);
  block.each_thread([&](int) {
    for (int row = 0; row < gemm.m; ++row) {
      for (int column = 0; column < gemm.n; ++column) {
        Sum sum(0);
        for (int k = 0; k < gemm.k; ++k) {
          const auto offset = [](bool transpose, cuda::detail::Offset ld, int i, int j) {
            return transpose ? j * ld + i : i * ld + j;
          };
          sum +=
              at.read(block, gemm.a, gemm.a.offset + offset(gemm.transpose_a, gemm.lda, row, k)) *
              at.read(block, gemm.b, gemm.b.offset + offset(gemm.transpose_b, gemm.ldb, k, column));
        }
        at.write(block, gemm.c, gemm.c.offset + row * gemm.ldc + column, sum);
      }
    }
  });
  ++memory.epoch;
}

/// What one pass issues, in its order; tensor cores on so many blocks.
template <class Stored, class Sum, int Capacity>
void execute(const cuda::detail::Sequence& sequence,
             const cuda::detail::Addresses<Capacity>& addresses, Sum* workspace,
             int tensor_core_blocks, Memory& memory) {
  const cuda::detail::ContractionTables tables{sequence.jobs.data(), sequence.taps.data(),
                                               sequence.pairs.data(), sequence.branches.data(),
                                               sequence.phases.data()};
  for (const cuda::detail::Launch& launch : sequence.launches) {
    const auto index = static_cast<std::size_t>(launch.index);
    if (launch.kind == cuda::detail::Launch::Kind::tensor_cores) {
      if constexpr (std::is_same_v<Sum, float>) {
        execute(cuda::detail::TensorCoreProgram<Stored, Capacity>{tables, workspace, launch.index,
                                                                  addresses},
                tensor_core_blocks, memory);
      }
    } else if (launch.kind == cuda::detail::Launch::Kind::gemm) {
      execute(sequence.gemms[index],
              cuda::detail::ContractionMemory<Stored, Sum>{addresses.at, workspace}, memory);
    } else {
      const cuda::detail::Phase& phase = sequence.phases[index];
      const auto execute_with = [&]<bool Products>(std::bool_constant<Products>) {
        execute(
            cuda::detail::PhaseProgram<Stored, Sum, Capacity, Products>{
                tables, workspace, phase, sequence.first_tiles(phase), addresses},
            memory);
      };
      if (sequence.has_products(phase)) {
        execute_with(std::true_type());
      } else {
        execute_with(std::false_type());
      }
    }
  }
}

/// Runs both passes, blocks in an order that the seed chooses: every element that they must write
/// is checked to be written, and every other rule of the executor's.
template <class Stored>
void run(const cuda::ContractionPlan& plan, Passes<Stored>& passes, std::uint64_t seed) {
  using Sum = cuda::detail::AccumulatorOf<Stored>;
  using Role = cuda::TensorUse::Role;
  std::vector<Sum> workspace(static_cast<std::size_t>(plan.workspace()));
  Memory memory(seed);
  memory.lend_unwritten(workspace);
  for (auto* tensors : {&passes.layers, &passes.result_gradients}) {
    for (auto& tensor : *tensors) memory.lend(std::as_const(tensor));
  }
  for (auto* tensors : {&passes.results, &passes.layer_gradients}) {
    for (auto& tensor : *tensors) memory.lend_unwritten(tensor);
  }
  const auto layers = layers_of<const Stored>(std::as_const(passes.layers));
  const auto given = layers_of<const Stored>(std::as_const(passes.result_gradients));
  const auto run_pass = [&](const cuda::detail::Sequence& sequence,
                            cuda::detail::AddressTable& table,
                            typename Passes<Stored>::Tensors& written, Role role) {
    const auto outputs = layers_of<Stored>(written);
    table.add<const Stored>(Role::layer, layers);
    table.add<Stored>(role, outputs);
    table.require_disjoint();
    execute<Stored, Sum>(sequence, table.addresses<cuda::ContractionPlan::most_tensors>(),
                         workspace.data(), static_cast<int>(1 + seed % 3), memory);
    for (const auto& tensor : written) memory.require_written(tensor);
  };
  cuda::detail::AddressTable forward(plan), backward(plan);
  run_pass(plan.forward(), forward, passes.results, Role::result);
  backward.add<const Stored>(Role::result_gradient, given);
  run_pass(plan.backward(), backward, passes.layer_gradients, Role::layer_gradient);
}

/// Of PrimeField as what a device computes with.
inline void run(const cuda::ContractionPlan& plan, Passes<PrimeField>& passes, std::uint64_t seed) {
  auto residues = cast<cuda::Residue>(passes);
  run(plan, residues, seed);
  passes = cast<PrimeField>(residues);
}

}  // namespace concertina::test
