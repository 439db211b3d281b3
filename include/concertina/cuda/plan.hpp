// The contractions of a network on the device, planned on the host: which products in which order,
// cut into jobs that run side by side, and where everything lies. Plain C++, tested without a
// device.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/cuda/detail/job.hpp>
#include <concertina/cuda/residue.hpp>
#include <concertina/exactness.hpp>

#include <algorithm>
#include <concepts>
#include <optional>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

namespace concertina::cuda {

/// What a plan contracts to one layer: layers, an expression, shapes one after another, or a form,
/// of any rank, and what is accepted at its border. Made implicitly from each of them, so that a
/// list of PlannedForms is a network. It views nothing: shapes are copied.
class PlannedForm {
 public:
  /// Throws ShapeError where channels do not fit, naming both layers, or there are none.
  template <FormSource E>
  PlannedForm(const E& source,
              const std::type_identity_t<Border<concertina::detail::form_rank<E>>>& border = {})
      : tree_(Form<concertina::detail::form_rank<E>>(source).tree()),
        interior_only_(border.interior_only),
        input_size_(concertina::detail::any_size(border.input_size)) {}

  const concertina::detail::AnyForm& tree() const noexcept { return tree_; }

  /// The shape of the contraction.
  /// Throws  as contract() does: InexactError where the border is not accepted; ShapeError;
  ///         SizeError
  concertina::detail::AnyShape contracted() const {
    const concertina::detail::AnyShape shape =
        concertina::detail::contracted_shape(tree_, input_size_);
    if (!interior_only_) concertina::detail::require_exact(tree_, input_size_);
    return shape;
  }

 private:
  concertina::detail::AnyForm tree_;
  bool interior_only_;
  std::optional<concertina::detail::Axes> input_size_;
};

/// How products of floats are computed. All but tf32 keep the bound of prove_rounding(), bf16x6
/// within the range that it has.
enum class Math {
  /// Large ones on tensor cores, of elements split into three bfloat16 ones: on devices with 144
  /// KiB of shared memory for a block (8.0, 9.0, 10.0); fastest compiled for sm_90a.
  /// The absolute error of a product has up to 2^-133 of its factors more; elements of 3.39e38 on,
  /// and infinite ones, give NaN.
  bf16x6,
  fp32,        ///< in float
  tf32,        ///< large ones on tensor cores, by cuBLAS, of elements rounded to 11 bits
  fp64,        ///< for tensors of double, in double
  prime_field  ///< for tensors of Residue, exactly; on our own tiles whatever the size
};

namespace detail {

/// The accumulator of a tensor's scalar.
template <class Stored>
using AccumulatorOf = std::conditional_t<sizeof(Stored) == 8, Stored, float>;

}  // namespace detail

/// What a plan is made for, and from which sizes on a product is computed in which way; their
/// defaults were chosen for an H100 and an H200.
struct PlanOptions {
  /// Tensors are stored in half or bfloat16, and accumulated in float.
  bool mixed = false;
  /// Whether backward() is planned too; tools that only fold networks need half the workspace.
  bool gradient = true;
  Math math = Math::bf16x6;
  /// From so many multiply-adds on a product of two kernels of several taps is one matrix product
  /// of unfolded kernels.
  Index least_unfolded = detail::tuning::least_unfolded;
  /// From so many multiply-adds, and terms of a sum, on a matrix product is on tensor cores. Below
  /// 80 terms the bound of prove_rounding() is not kept.
  Index least_bf16x6 = detail::tuning::least_bf16x6;
  int least_bf16x6_terms = detail::tuning::least_bf16x6_terms;
  /// From so many multiply-adds on any other matrix product is cuBLAS's.
  Index least_gemm = detail::tuning::least_gemm;
  /// Tiles that fill the device, two on each multiprocessor, of those on tensor cores one: a phase
  /// has larger tiles where it would have more, and splits sums where it has fewer.
  int wanted_tiles = detail::tuning::wanted_tiles;
  /// The least k of a split, but on tensor cores.
  int least_split = detail::tuning::least_split;
};

/// A tensor whose address a plan needs, in the order of the table of addresses.
struct TensorUse {
  enum class Role { layer, result, result_gradient, layer_gradient };
  Role role;
  int form, layer;  ///< from 0; of a result the layer is 0
  bool bias;
  Index size;         ///< elements; 0 where a layer has no bias
  std::string shape;  ///< for messages

  std::string name() const {
    constexpr const char* roles[] = {"layer", "result", "gradient of the result",
                                     "gradient of layer"};
    const bool numbered = role == Role::layer || role == Role::layer_gradient;
    return "form " + std::to_string(form + 1) + ", " + roles[static_cast<int>(role)] +
           (numbered ? " " + std::to_string(layer + 1) : std::string()) +
           (bias ? ", bias (" : ", weight (") + shape + ")";
  }
};

/// How the forms of a network are contracted and differentiated on a device, decided once.
///
/// Products are computed in the cheapest order of each chain; sums and concatenations gather their
/// branches, element by element and in the branches' order, so without atomics. What does not
/// depend on each other runs side by side, whatever form it is of: each step of all forms is a
/// phase, one launch. Kernels of several taps that are not small are unfolded, so that their
/// product is one matrix product. Large matrix products are on tensor cores or cuBLAS's, between
/// phases.
///
/// Layers are the leaves of the forms. A leaf that is a batch norm or a scale is given, and its
/// gradient taken, as its 1x1 depthwise layer: weight [C] and, where it shifts, bias [C]; a
/// permutation as a dense 1x1 layer. ChannelMap::backward goes on from there. Fixed leaves have a
/// gradient here too.
/// Cost    L - 1 phases for chains of up to L layers, and one for each sum or concatenation on the
///         way; a depthwise expansion is one; one more for each step with split-K partial sums, one
///         where groups leave zeros between them, one after a product that is unfolded and, for
///         cuBLAS and tensor cores, one before; a step with products on tensor cores is a launch
///         more. The workspace holds every intermediate and its gradient, partial sums and what is
///         unfolded: of kxk after lxl, out * in * k * k * l * l elements. Only these are used twice
/// Source  the products and their gradients are those of docs/product.md and docs/backward.md
class ContractionPlan {
 public:
  /// Throws  InexactError where a form's border is not accepted; ShapeError where layers or
  ///         branches do not fit; SizeError where a tensor has 2^31 elements or more, there are
  ///         more than most_tensors, or an option is not positive
  explicit ContractionPlan(std::span<const PlannedForm> forms, const PlanOptions& options = {});

  /// So that their addresses fit a kernel's parameters.
  static constexpr int most_tensors = 2048;

  const PlanOptions& options() const { return options_; }
  /// Of weights and biases: all layers, results, gradients of results, gradients of layers (the
  /// last two where a gradient is planned), a form after another, its layers in the order of
  /// Form::leaves, each weight followed by its bias.
  std::span<const TensorUse> tensors() const { return tensors_; }
  std::span<const TensorUse> tensors(TensorUse::Role role) const {
    const auto same = std::ranges::equal_range(tensors_, role, {}, &TensorUse::role);
    return {same.begin(), same.end()};
  }

  /// Elements of the workspace, of the accumulator's type: the tensors' scalar, or float.
  Index workspace() const { return workspace_; }

  /// From layers to results, and from results' gradients to layers'. The second needs what the
  /// first left in the workspace, and the layers as they were.
  const detail::Sequence& forward() const { return forward_; }
  const detail::Sequence& backward() const { return backward_; }

 private:
  PlanOptions options_;
  std::vector<TensorUse> tensors_;
  Index workspace_ = 0;
  detail::Sequence forward_, backward_;
};

}  // namespace concertina::cuda

#include <concertina/cuda/detail/plan/plan.ipp>
