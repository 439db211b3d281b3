// A network's contraction on the device, planned on the host: which products in which order, cut
// into jobs that run side by side, and where everything lies. Plain C++, tested without a device.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/cuda/detail/program.hpp>
#include <concertina/exactness.hpp>
#include <concertina/form.hpp>

#include <algorithm>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

namespace concertina::cuda {

/// Layers one after another, the first applied first, of any rank: the layers of a convolution, or
/// fully connected ones.
class Chain {
 public:
  template <int Rank>
  struct Of {
    std::vector<ConvShape<Rank>> layers;
    BorderPolicy<Rank> policy;
  };

  template <int Rank>
  Chain(std::vector<ConvShape<Rank>> layers,
        const std::type_identity_t<BorderPolicy<Rank>>& policy = {})
      : of_(Of<Rank>{std::move(layers), policy}) {}

  /// Calls visit(Of<Rank>).
  template <class Visit>
  decltype(auto) visit(Visit&& visit) const {
    return std::visit(std::forward<Visit>(visit), of_);
  }

 private:
  std::variant<Of<0>, Of<1>, Of<2>, Of<3>> of_;
};

struct PlanOptions {
  /// Tensors are stored in half or bfloat16, and sums are float.
  bool mixed = false;
  /// Whether backward() is planned too; tools that only fold networks need half the workspace.
  bool gradient = true;
  /// From so many multiply-adds on a matrix product is cuBLAS's; 2^27 take it some 10 us on an
  /// H100, about what starting it and copying for it cost.
  Index least_gemm = Index{1} << 27;
  /// Tiles that fill the device: the inner length of smaller products is split until there are as
  /// many. Two for each multiprocessor of an H100.
  int wanted_tiles = 264;
  /// The least inner length of a split, so that it is worth its sum.
  int least_split = 128;
};

/// A tensor whose address a plan needs, in the order of the table of addresses.
struct TensorUse {
  enum class Role { layer, result, result_gradient, layer_gradient };
  Role role;
  int chain, layer;  ///< numbers, from 0; of a result the layer is 0
  bool bias;
  Index numbers;      ///< 0 where a layer has no bias
  std::string shape;  ///< for messages

  std::string name() const {
    constexpr const char* roles[] = {"layer", "result", "gradient of the result",
                                     "gradient of layer"};
    const bool numbered = role == Role::layer || role == Role::layer_gradient;
    return "chain " + std::to_string(chain + 1) + ", " + roles[static_cast<int>(role)] +
           (numbered ? " " + std::to_string(layer + 1) : std::string()) +
           (bias ? ", bias (" : ", weight (") + shape + ")";
  }
};

/// A matrix product for cuBLAS, row-major: result = left * right, either factor transposed or not.
struct Gemm {
  Place left, right, result;
  int rows, columns, inner;
  Offset left_step, right_step, result_step;  ///< between rows as they are stored
  bool left_transposed, right_transposed;
  int chain = 0;  ///< for messages
};

/// What run() issues one after another: phases in one launch, or a matrix product.
struct Stage {
  bool is_gemm;
  int first, last;  ///< phases; a gemm's number and the next one
};

/// What one pass runs.
struct Sequence {
  std::vector<Job> jobs;
  std::vector<Tap> taps;
  std::vector<TapPair> pairs;
  std::vector<Phase> phases;
  std::vector<Gemm> gemms;
  std::vector<Stage> stages;
  Index multiply_adds = 0;

  int launches() const {
    return static_cast<int>(std::ranges::count(stages, false, &Stage::is_gemm));
  }
};

/// How the chains of a network are contracted and differentiated on a device, decided once.
///
/// Products are computed in the cheapest order of each chain. Those that do not depend on each
/// other run side by side, whatever chain they are of: each step of all chains is a phase of one
/// launch, with a barrier of the grid between phases. A product with a 1x1 side that is large
/// enough for cuBLAS runs there, between launches; kxk after kxk never does.
/// Cost    L - 1 phases for chains of up to L layers; one more for each step with split sums, one
///         where groups leave zeros between them, two around a product of cuBLAS's whose taps have
///         to be moved. The workspace holds every intermediate and its gradient, split sums and
///         what is moved; nothing is used twice
/// Source  the products and their gradients are those of docs/product.md and docs/pullback.md
class ContractionPlan {
 public:
  /// Throws  InexactError where a chain's policy is not met; ShapeError where layers do not fit or
  ///         there are none; SizeError where a tensor has 2^31 numbers or more, there are more than
  ///         most_tensors, or an option is not positive
  explicit ContractionPlan(std::span<const Chain> chains, const PlanOptions& options = {});

  /// So that their addresses fit a kernel's parameters.
  static constexpr int most_tensors = 2048;

  const PlanOptions& options() const { return options_; }
  /// Of weights and biases: all layers, results, gradients of results, gradients of layers (the
  /// last two where a gradient is planned), a chain after another, each weight followed by its
  /// bias.
  std::span<const TensorUse> tensors() const { return tensors_; }
  std::span<const TensorUse> tensors(TensorUse::Role role) const {
    const auto same = std::ranges::equal_range(tensors_, role, {}, &TensorUse::role);
    return {same.begin(), same.end()};
  }

  /// Numbers of the workspace, which are sums: of the tensors' scalar, or float.
  Index workspace() const { return workspace_; }

  /// From layers to results, and from results' gradients to layers'. The second needs what the
  /// first left in the workspace, and the layers as they were.
  const Sequence& forward() const { return forward_; }
  const Sequence& backward() const { return backward_; }

 private:
  PlanOptions options_;
  std::vector<TensorUse> tensors_;
  Index workspace_ = 0;
  Sequence forward_, backward_;
};

}  // namespace concertina::cuda

#include <concertina/cuda/detail/planner.ipp>
