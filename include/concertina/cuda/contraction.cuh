// The contractions of a network on the device, again and again, with their gradient: for training
// loops that contract in every step, and for tools that fold networks.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/cuda/buffer.cuh>
#include <concertina/cuda/detail/matrices.hpp>
#include <concertina/cuda/detail/phase_kernels.cuh>
#include <concertina/cuda/detail/tensor_table.hpp>
#include <concertina/cuda/launch.cuh>
#include <concertina/cuda/plan.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <set>
#include <span>
#include <string>
#include <type_traits>
#include <utility>

namespace concertina::cuda {

/// What lies between layers and results is kept in memory of the contraction's own, or in what is
/// lent to each pass: by a framework's allocator, or so that passes on several streams overlap.
enum class Workspace { own, lent };

namespace detail {

inline int current_device() {
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice", "a contraction");
  return device;
}

inline int attribute(int device, cudaDeviceAttr which) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute", "a contraction");
  return value;
}

/// Whether a device can compute Math::bf16x6: it has tensor cores for it, and a block's memory.
template <class Stored>
bool computes_bf16x6(int device) {
  constexpr std::size_t bytes =
      TensorCoreProgram<Stored, ContractionPlan::most_tensors>::shared_bytes();
  return attribute(device, cudaDevAttrComputeCapabilityMajor) >= 8 &&
         attribute(device, cudaDevAttrMaxSharedMemoryPerBlockOptin) >= static_cast<int>(bytes);
}

}  // namespace detail

/// The fastest arithmetic that the current device computes for tensors of Stored within the bound
/// of prove_rounding(), for PlanOptions::math.
/// Throws    DeviceError where there is no device
template <class Stored>
Math fastest_math() {
  if constexpr (std::is_same_v<Stored, double>) {
    return Math::fp64;
  } else if constexpr (std::is_same_v<Stored, Residue>) {
    return Math::prime_field;
  } else {
    return detail::computes_bf16x6<Stored>(detail::current_device()) ? Math::bf16x6 : Math::fp32;
  }
}

/// A plan with its tables and workspace in the memory of the current device. Both passes return
/// before the device has run them; they allocate nothing on it and wait for nothing, so they can be
/// captured in a CUDA graph, which must not outlive the object. One at a time: an object's passes
/// belong on one stream, or must be ordered otherwise, unless each is lent a workspace; one host
/// thread at a time calls it. Making and destroying it allocates and frees, which no stream may be
/// capturing meanwhile; what is thrown during a capture leaves that open.
///
/// Stored is float, double, __half, __nv_bfloat16 or Residue; halves are accumulated in float.
/// Ensures   results within the bound of prove_rounding(), as far as PlanOptions::math says; those
///           of contract() where all sums are exact; the same bit for bit each time
/// Throws    DeviceError naming the call, its reason and its purpose
template <class Stored>
class Contraction {
 public:
  using Accumulator = detail::AccumulatorOf<Stored>;
  static constexpr bool is_mixed = !std::is_same_v<Stored, Accumulator>;

  /// Cost    allocates the workspace and the tables, and waits for them; where the plan has GEMMs
  ///         for cuBLAS also its workspace of 32 MiB, and runs each of them three times, on
  ///         addresses of every alignment; on the thread's own stream, so that another thread may
  ///         capture any
  /// Throws  Error where the plan is not mixed for half precision or mixed for another, or is not of
  ///         fp64 for double or prime_field for Residue, or is for another; DeviceError where it
  ///         has products on tensor cores and the device's cannot compute them
  explicit Contraction(ContractionPlan plan, Workspace workspace = Workspace::own)
      : plan_(accepted(std::move(plan))),
        device_(detail::current_device()),
        phases_wait_(compiled_to_wait()),
        forward_(plan_.forward(), "the tables of a contraction"),
        backward_(plan_.backward(), "the tables of a contraction's gradient"),
        workspace_(workspace == Workspace::own ? workspace_bytes() : 0,
                   "the workspace of a contraction") {
    prepare_tensor_cores();
    if (blas_bytes() == 0) return;
    cublasHandle_t handle = nullptr;
    check(cublasCreate(&handle), "cublasCreate", "a contraction");
    blas_.reset(handle);
    warm_up();
  }

  const ContractionPlan& plan() const { return plan_; }

  /// Bytes that a pass works in: the plan's workspace, and cuBLAS's where it has GEMMs for that.
  Index workspace_bytes() const {
    return blas_bytes() + plan_.workspace() * static_cast<Index>(sizeof(Accumulator));
  }

  /// One result for each form, from all forms' layers in the order of Form::leaves.
  /// Throws    ShapeError naming the form, the layer and its shape where an address is missing or
  ///           misaligned, a length is another than the plan's, or a result overlaps another
  ///           tensor, before anything is launched
  /// Gradient  backward()
  void forward(std::span<const DeviceLayer<const Stored>> layers,
               std::span<const DeviceLayer<Stored>> results, cudaStream_t stream) {
    forward(layers, results, stream, own_workspace());
    has_run_ = true;
  }

  /// In a lent workspace, which must be free of other uses until the device has run this, and the
  /// backward() that may follow.
  /// Throws    also where it has fewer than workspace_bytes(), is misaligned or overlaps a tensor
  void forward(std::span<const DeviceLayer<const Stored>> layers,
               std::span<const DeviceLayer<Stored>> results, cudaStream_t stream,
               std::span<std::byte> workspace) {
    detail::AddressTable table(plan_);
    table.add(TensorUse::Role::layer, layers);
    table.add(TensorUse::Role::result, results);
    table.require_disjoint();
    run(plan_.forward(), forward_, table, stream, workspace);
  }

  /// From the derivatives of a loss with respect to the results to those with respect to all
  /// layers, which are overwritten.
  /// Requires  the layers to be as forward() last saw them, on a stream after it
  /// Throws    as forward(); Error where that has not been called or no gradient is planned
  void backward(std::span<const DeviceLayer<const Stored>> layers,
                std::span<const DeviceLayer<const Stored>> result_gradients,
                std::span<const DeviceLayer<Stored>> layer_gradients, cudaStream_t stream) {
    if (!has_run_) throw Error("backward: forward has not been called");
    backward(layers, result_gradients, layer_gradients, stream, own_workspace());
  }

  /// In the workspace lent to forward().
  void backward(std::span<const DeviceLayer<const Stored>> layers,
                std::span<const DeviceLayer<const Stored>> result_gradients,
                std::span<const DeviceLayer<Stored>> layer_gradients, cudaStream_t stream,
                std::span<std::byte> workspace) {
    if (!plan_.options().gradient) throw Error("backward: the plan has no gradient");
    detail::AddressTable table(plan_);
    table.add(TensorUse::Role::layer, layers);
    table.add(TensorUse::Role::result_gradient, result_gradients);
    table.add(TensorUse::Role::layer_gradient, layer_gradients);
    table.require_disjoint();
    run(plan_.backward(), backward_, table, stream, workspace);
  }

 private:
  struct BlasDeleter {
    void operator()(cublasContext* handle) const { static_cast<void>(cublasDestroy(handle)); }
  };
  static constexpr int few_tensors = 256;  // whose addresses fit the 4 KiB that cost no extra

  static ContractionPlan accepted(ContractionPlan plan) {
    if (plan.options().mixed != is_mixed) {
      throw Error(is_mixed ? "a contraction in half precision needs a plan with mixed = true"
                           : "a plan with mixed = true is for half precision");
    }
    const auto require_own = [&](Math math, bool is_own, const std::string& scalar,
                                 const std::string& name) {
      if ((plan.options().math == math) == is_own) return;
      throw Error(is_own ? "a contraction of " + scalar + " needs a plan with math = " + name
                         : "a plan with math = " + name + " is for " + scalar);
    };
    require_own(Math::fp64, std::is_same_v<Accumulator, double>, "double", "Math::fp64");
    require_own(Math::prime_field, std::is_same_v<Accumulator, Residue>, "Residue",
                "Math::prime_field");
    return plan;
  }

  /// Whether the code that was loaded waits for earlier launches: which the device does not tell,
  /// as code for an older one runs there too.
  bool compiled_to_wait() const {
    return with_program(false, []<class Program>(const Program*) {
      cudaFuncAttributes attributes{};
      check(cudaFuncGetAttributes(&attributes, detail::run_phase<Program>), "cudaFuncGetAttributes",
            "a contraction");
      return attributes.ptxVersion >= 90;
    });
  }

  static bool has_tensor_cores(const detail::Sequence& sequence) {
    return std::ranges::any_of(sequence.launches, [](const detail::Launch& launch) {
      return launch.kind == detail::Launch::Kind::tensor_cores;
    });
  }

  void prepare_tensor_cores() {
    if constexpr (std::is_same_v<Accumulator, float>) {
      if (!has_tensor_cores(plan_.forward()) && !has_tensor_cores(plan_.backward())) return;
      multiprocessors_ = detail::attribute(device_, cudaDevAttrMultiProcessorCount);
      if (!detail::computes_bf16x6<Stored>(device_)) {
        throw DeviceError(
            "products on tensor cores need a device with 144 KiB of shared memory for a block "
            "(8.0, 9.0, 10.0); plan with math = fastest_math<Stored>()");
      }
      constexpr std::size_t bytes = detail::TensorCoreProgram<Stored, few_tensors>::shared_bytes();
      with_tensor_core_program([&]<class Program>(const Program*) {
        detail::allow_shared_bytes(&detail::run_tensor_cores<Program>, bytes,
                                   "products on tensor cores");
      });
    }
  }

  /// In front of the plan's workspace. As recommended on Hopper, by cuBLAS's documentation.
  Index blas_bytes() const {
    return plan_.forward().gemms.empty() && plan_.backward().gemms.empty() ? 0 : Index{32} << 20;
  }

  std::span<std::byte> own_workspace() const {
    if (workspace_.size() < workspace_bytes()) {
      throw Error("a contraction made to be lent its workspace was not lent one");
    }
    return workspace_.span();
  }

  /// Runs every planned GEMM once on uninitialised buffers, so that cuBLAS allocates before a graph
  /// capture; for each alignment, by which it chooses kernels: tensors may be parts of one flat
  /// buffer.
  void warm_up() {
    constexpr Index shifts = 3;  // by 1 and 2 elements: floats at multiples of 16, 4 and 8 bytes
    Index most = 0;
    for (const detail::Sequence* sequence : {&plan_.forward(), &plan_.backward()}) {
      for (const detail::Gemm& gemm : sequence->gemms) {
        const auto elements = [](detail::Offset ld, int rows, int columns, bool transposed) {
          return ld * (transposed ? columns : rows);
        };
        most = std::max({most, elements(gemm.lda, gemm.m, gemm.k, gemm.transpose_a),
                         elements(gemm.ldb, gemm.k, gemm.n, gemm.transpose_b),
                         elements(gemm.ldc, gemm.m, gemm.n, false)});
      }
    }
    const Buffer<Accumulator> a(most + shifts, "a first GEMM"), b(most + shifts, "a first GEMM"),
        c(most + shifts, "a first GEMM");
    const Buffer<std::byte> workspace(blas_bytes(), "the workspace of cuBLAS");
    bind_blas(cudaStreamPerThread, workspace.data());
    for (const detail::Sequence* sequence : {&plan_.forward(), &plan_.backward()}) {
      for (const detail::Gemm& gemm : sequence->gemms) {
        for (Index shift = 0; shift < shifts; ++shift) {
          multiply(gemm, a.data() + shift, b.data() + shift, c.data() + shift,
                   sequence == &plan_.backward());
        }
      }
    }
    check(cudaStreamSynchronize(cudaStreamPerThread), "cudaStreamSynchronize", "the first GEMMs");
  }

  /// In this order: a new stream resets the workspace.
  void bind_blas(cudaStream_t stream, void* workspace) {
    check(cublasSetStream(blas_.get(), stream), "cublasSetStream", "a contraction");
    check(cublasSetWorkspace(blas_.get(), workspace, static_cast<std::size_t>(blas_bytes())),
          "cublasSetWorkspace", "a contraction");
  }

  /// A sequence's tables in the device's memory.
  struct DeviceTables {
    DeviceTables(const detail::Sequence& sequence, const std::string& purpose)
        : jobs(sequence.jobs, purpose),
          taps(sequence.taps, purpose),
          pairs(sequence.pairs, purpose),
          branches(sequence.branches, purpose),
          phases(sequence.phases, purpose) {}
    Buffer<detail::Job> jobs;
    Buffer<detail::Tap> taps;
    Buffer<detail::TapPair> pairs;
    Buffer<detail::Branch> branches;
    Buffer<detail::Phase> phases;
  };

  template <class Use>
  auto with_program(bool products, Use&& use) const {
    const auto with_capacity = [&]<int Capacity>(std::integral_constant<int, Capacity>) {
      if (products)
        return use(
            static_cast<const detail::PhaseProgram<Stored, Accumulator, Capacity>*>(nullptr));
      return use(
          static_cast<const detail::PhaseProgram<Stored, Accumulator, Capacity, false>*>(nullptr));
    };
    if (std::ssize(plan_.tensors()) <= few_tensors) {
      return with_capacity(std::integral_constant<int, few_tensors>());
    }
    return with_capacity(std::integral_constant<int, ContractionPlan::most_tensors>());
  }

  void run(const detail::Sequence& sequence, const DeviceTables& tables,
           const detail::AddressTable& table, cudaStream_t stream, std::span<std::byte> lent) {
    constexpr std::uintptr_t alignment = 256;  // cuBLAS asks for it
    if (std::ssize(lent) < workspace_bytes() ||
        reinterpret_cast<std::uintptr_t>(lent.data()) % alignment != 0) {
      throw ShapeError("a workspace of " + std::to_string(lent.size()) + " bytes, where " +
                       std::to_string(workspace_bytes()) + " are needed, at a multiple of " +
                       std::to_string(alignment));
    }
    table.require_apart(lent);
    if (const int current = detail::current_device(); current != device_) {
      throw DeviceError("the contraction is on device " + std::to_string(device_) +
                        ", and the current one is " + std::to_string(current) +
                        "; set that device, and use a stream of its own");
    }
    if (!sequence.gemms.empty()) bind_blas(stream, lent.data());
    Accumulator* const workspace = reinterpret_cast<Accumulator*>(lent.data() + blas_bytes());
    const auto is_phase = [&](std::size_t launch) {
      return launch < sequence.launches.size() &&
             sequence.launches[launch].kind == detail::Launch::Kind::phase;
    };
    for (std::size_t l = 0; l < sequence.launches.size(); ++l) {
      const detail::Launch& launch = sequence.launches[l];
      if (launch.kind == detail::Launch::Kind::tensor_cores) {
        launch_tensor_cores(sequence, tables, table, workspace, launch.index, stream);
      } else if (launch.kind == detail::Launch::Kind::gemm) {
        const detail::Gemm& gemm = sequence.gemms[static_cast<std::size_t>(launch.index)];
        const auto at = [&](const detail::TensorRef& ref) {
          Accumulator* const first = ref.tensor == detail::TensorRef::workspace
                                         ? workspace
                                         : static_cast<Accumulator*>(table[ref.tensor]);
          return first + ref.offset;
        };
        multiply(gemm, at(gemm.a), at(gemm.b), at(gemm.c), &sequence == &plan_.backward());
      } else {
        launch_phase(sequence, tables, table, workspace, launch.index, l > 0 && is_phase(l - 1),
                     is_phase(l + 1), stream);
      }
    }
  }

  template <class Use>
  void with_tensor_core_program(Use&& use) const {
    if (std::ssize(plan_.tensors()) <= few_tensors) {
      use(static_cast<const detail::TensorCoreProgram<Stored, few_tensors>*>(nullptr));
    } else {
      use(static_cast<const detail::TensorCoreProgram<Stored, ContractionPlan::most_tensors>*>(
          nullptr));
    }
  }

  void launch_tensor_cores(const detail::Sequence& sequence, const DeviceTables& tables,
                           const detail::AddressTable& table, Accumulator* workspace, int phase,
                           cudaStream_t stream) {
    if constexpr (std::is_same_v<Accumulator, float>) {
      with_tensor_core_program([&]<class Program>(const Program*) {
        const Program program{{tables.jobs.data(), tables.taps.data(), tables.pairs.data(),
                               tables.branches.data(), tables.phases.data()},
                              workspace,
                              phase,
                              table.template addresses<Program::capacity>()};
        const int tiles = sequence.phases[static_cast<std::size_t>(phase)].tiles;
        detail::run_tensor_cores<Program>
            <<<static_cast<unsigned>(std::min(tiles, multiprocessors_)),
               static_cast<unsigned>(Program::threads), Program::shared_bytes(), stream>>>(program);
        check(cudaGetLastError(), "cudaLaunchKernel", [&] { return name(sequence, phase); });
      });
    }
  }

  /// A phase after another begins before that one's end, finds its jobs, and waits. Every block of
  /// every phase does, so that none ends before the one before it, and what is read and written
  /// there is in order with all earlier phases. What follows another launch begins after it.
  void launch_phase(const detail::Sequence& sequence, const DeviceTables& tables,
                    const detail::AddressTable& table, Accumulator* workspace, int index,
                    bool follows_phase, bool is_followed, cudaStream_t stream) {
    const detail::Phase& phase = sequence.phases[static_cast<std::size_t>(index)];
    with_program(sequence.has_products(phase), [&]<class Program>(const Program*) {
      const Program program{{tables.jobs.data(), tables.taps.data(), tables.pairs.data(),
                             tables.branches.data(), tables.phases.data()},
                            workspace,
                            phase,
                            sequence.first_tiles(phase),
                            table.template addresses<Program::capacity>()};
      cudaLaunchAttribute early{};
      early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      early.val.programmaticStreamSerializationAllowed = 1;
      cudaLaunchConfig_t config{};
      config.gridDim = static_cast<unsigned>(phase.tiles);
      config.blockDim = static_cast<unsigned>(Program::threads);
      config.dynamicSmemBytes = Program::shared_bytes();
      config.stream = stream;
      config.attrs = &early;
      config.numAttrs = follows_phase && phases_wait_ ? 1 : 0;
      check(cudaLaunchKernelEx(&config, detail::run_phase<Program>, program, is_followed),
            "cudaLaunchKernelEx", [&] { return name(sequence, index); });
    });
  }

  /// For messages: a form's contraction, or its gradient.
  std::string name(int form, bool is_gradient) const {
    const auto results = plan_.tensors(TensorUse::Role::result);
    return std::string(is_gradient ? "the gradient of form " : "form ") + std::to_string(form + 1) +
           ", " + results[static_cast<std::size_t>(2 * form)].shape;
  }
  std::string name(const detail::Sequence& sequence, int phase) const {
    const auto& [first_job, last_job, tiles] = sequence.phases[static_cast<std::size_t>(phase)];
    std::set<int> forms;
    for (int job = first_job; job < last_job; ++job) {
      forms.insert(sequence.jobs[static_cast<std::size_t>(job)].form);
    }
    std::string text;
    for (const int form : forms) {
      text += (text.empty() ? "" : "; ") + name(form, &sequence == &plan_.backward());
    }
    return text;
  }

  /// cuBLAS's matrices are column-major: it computes the transposed product.
  void multiply(const detail::Gemm& gemm, const Accumulator* a, const Accumulator* b,
                Accumulator* c, bool is_gradient) {
    if constexpr (std::is_same_v<Accumulator, Residue>) return;  // there are none
    constexpr bool is_double = std::is_same_v<Accumulator, double>;
    constexpr cudaDataType type = is_double ? CUDA_R_64F : CUDA_R_32F;
    const cublasComputeType_t compute = is_double ? CUBLAS_COMPUTE_64F
                                        : plan_.options().math == Math::tf32
                                            ? CUBLAS_COMPUTE_32F_FAST_TF32
                                            : CUBLAS_COMPUTE_32F;
    const std::conditional_t<is_double, double, float> one(1), zero(0);
    const auto operation = [](bool transpose) { return transpose ? CUBLAS_OP_T : CUBLAS_OP_N; };
    check(cublasGemmEx(blas_.get(), operation(gemm.transpose_b), operation(gemm.transpose_a),
                       gemm.n, gemm.m, gemm.k, &one, b, type, static_cast<int>(gemm.ldb), a, type,
                       static_cast<int>(gemm.lda), &zero, c, type, static_cast<int>(gemm.ldc),
                       compute, CUBLAS_GEMM_DEFAULT),
          "cublasGemmEx", [&] {
            return "a GEMM of " + std::to_string(gemm.m) + "x" + std::to_string(gemm.k) + " and " +
                   std::to_string(gemm.k) + "x" + std::to_string(gemm.n) + " of " +
                   name(gemm.form, is_gradient);
          });
  }

  ContractionPlan plan_;
  int device_, multiprocessors_ = 0;
  bool phases_wait_;
  DeviceTables forward_, backward_;
  Buffer<std::byte> workspace_;
  std::unique_ptr<cublasContext, BlasDeleter> blas_;
  bool has_run_ = false;
};

}  // namespace concertina::cuda
