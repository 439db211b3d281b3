// Re-parameterised blocks by the names of their papers: their tensors, and the expression that each
// is. Blocks that train from a given kernel.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/contract.hpp>
#include <concertina/layers.hpp>
#include <concertina/random.hpp>

#include <optional>
#include <span>
#include <utility>
#include <vector>

namespace concertina {

/// A convolution and the batch norm after it. Like every block here, its expression views its
/// layers, so the block must outlive it.
template <class Scalar, int Rank>
struct ConvBatchNorm {
  Conv<Scalar, Rank> conv;
  BatchNorm<Scalar> norm;

  Expr<Scalar, Rank> expression() const& { return batch_norm(norm) * conv; }
  void expression() && = delete;
};

/// A square kernel and its skeleton, a column and a row, each with a batch norm.
/// Source  Ding et al., ACNet, ICCV 2019
template <class Scalar>
struct AcNet {
  ConvBatchNorm<Scalar, 2> square, vertical, horizontal;

  Expr<Scalar, 2> expression() const& {
    return square.expression() + vertical.expression() + horizontal.expression();
  }
  void expression() && = delete;

  /// The branch that can represent any kernel.
  ConvBatchNorm<Scalar, 2>& principal() { return square; }
};

/// kxk, 1x1, and, where input and output fit, a skip connection, each with a batch norm.
/// Source  Ding et al., RepVGG, CVPR 2021
template <class Scalar, int Rank>
struct RepVgg {
  ConvBatchNorm<Scalar, Rank> dense, pointwise;
  std::optional<BatchNorm<Scalar>> skip = {};

  Expr<Scalar, Rank> expression() const& {
    const auto branches = dense.expression() + pointwise.expression();
    return skip ? branches + batch_norm(*skip) : branches;
  }
  void expression() && = delete;
  ConvBatchNorm<Scalar, Rank>& principal() { return dense; }
};

/// The diverse branch block: kxk; 1x1; 1x1 and average pooling; 1x1 and kxk, with a batch norm
/// after each. Padding stands on the first layer of each branch: DBB pads between the layers with
/// what the batch norm gives to zero, and so do zeros before the 1x1 (docs/blocks.md). Depthwise
/// blocks have no 1x1 branch, and pool without one.
/// Source  Ding et al., Diverse Branch Block, CVPR 2021
template <class Scalar, int Rank>
struct DiverseBranchBlock {
  ConvBatchNorm<Scalar, Rank> origin;
  std::optional<ConvBatchNorm<Scalar, Rank>> pointwise, before_pool;
  Expr<Scalar, Rank> pool;
  BatchNorm<Scalar> pool_norm;
  ConvBatchNorm<Scalar, Rank> reduce, spatial;  ///< 1x1, then kxk

  Expr<Scalar, Rank> expression() const& {
    auto branches = origin.expression() + spatial.expression() * reduce.expression();
    if (pointwise) branches = branches + pointwise->expression();
    const auto average = batch_norm(pool_norm) * pool;
    return branches + (before_pool ? average * before_pool->expression() : average);
  }
  void expression() && = delete;
  ConvBatchNorm<Scalar, Rank>& principal() { return origin; }
};

/// Any number of kxk branches, a 1x1 branch and a skip connection, each with a batch norm.
/// Source  Vasu et al., MobileOne, CVPR 2023
template <class Scalar, int Rank>
struct MobileOne {
  std::vector<ConvBatchNorm<Scalar, Rank>> dense;  ///< at least one
  std::optional<ConvBatchNorm<Scalar, Rank>> scale = {};
  std::optional<BatchNorm<Scalar>> skip = {};

  Expr<Scalar, Rank> expression() const& {
    std::vector<Expr<Scalar, Rank>> branches;
    for (const auto& branch : dense) branches.push_back(branch.expression());
    if (scale) branches.push_back(scale->expression());
    if (skip) branches.push_back(batch_norm(*skip));
    return sum(branches);
  }
  void expression() && = delete;
  ConvBatchNorm<Scalar, Rank>& principal() { return dense.front(); }
};

/// Linear branches, each a chain and a factor for each output channel, summed, then one batch norm.
/// Source  Hu et al., OREPA, CVPR 2022
template <class Scalar, int Rank>
struct Orepa {
  struct Branch {
    std::vector<Conv<Scalar, Rank>> layers;  ///< the first applied first
    std::vector<Scalar> factors;
  };
  std::vector<Branch> branches;
  BatchNorm<Scalar> norm;

  Expr<Scalar, Rank> expression() const& {
    std::vector<Expr<Scalar, Rank>> sums;
    for (const Branch& branch : branches) {
      sums.push_back(channel_scale(branch.factors) * chain(branch.layers));
    }
    return batch_norm(norm) * sum(sums);
  }
  void expression() && = delete;
};

/// kxk into many channels, 1x1 back, and a residual connection.
/// Source  Bhardwaj et al., Collapsible linear blocks (SESR), MLSys 2022
template <class Scalar, int Rank>
struct Sesr {
  Conv<Scalar, Rank> widen, narrow;

  Expr<Scalar, Rank> expression() const& {
    return narrow * widen + identity<Scalar>(widen.shape().in);
  }
  void expression() && = delete;
};

/// A batch norm as PyTorch initialises one: it divides by sqrt(1 + eps).
template <class Scalar>
BatchNorm<Scalar> initial_batch_norm(Index channels) {
  const auto all = [&](int value) {
    return std::vector<Scalar>(static_cast<std::size_t>(channels), Scalar(value));
  };
  return {.running_mean = all(0), .running_var = all(1), .weight = all(1), .bias = all(0)};
}

/// Blocks for a layer of this shape, initialised as PyTorch does (see initialize_uniform).
/// Requires  stride and padding are the block's; dilation 1; odd extents; the shape's bias plays no
///           part, as batch norms have one
/// Throws    ShapeError for an impossible shape, or one that the block does not have
template <class Scalar, BitGenerator Generator>
AcNet<Scalar> initialize_acnet(const ConvShape<2>& shape, Generator& generator);
template <class Scalar, int Rank, BitGenerator Generator>
RepVgg<Scalar, Rank> initialize_repvgg(const ConvShape<Rank>& shape, Generator& generator);
template <class Scalar, int Rank, BitGenerator Generator>
DiverseBranchBlock<Scalar, Rank> initialize_diverse_branch_block(const ConvShape<Rank>& shape,
                                                                 Generator& generator);

/// The block with its principal branch changed such that it contracts to `layer`: it goes on
/// training from a trained kernel. All other branches stay, and the principal one's factors.
/// Ensures  prove_rounding(block.expression(), layer)
/// Cost     one contraction of the block in double, or in the scalar if that is wider
/// Throws   ShapeError where the block does not contract to the layer's shape; NumericalError where
///          the principal batch norm has a factor of zero, or an element is not finite
template <class Block, Layer F>
Block preserve(const F& layer, Block block);

}  // namespace concertina

#include <concertina/detail/blocks.ipp>
