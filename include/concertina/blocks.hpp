// Re-parameterised blocks by the names of their papers: their tensors, and the expression that each
// is. Blocks that train from a given kernel.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/contract.hpp>
#include <concertina/layers.hpp>
#include <concertina/random.hpp>
#include <concertina/toeplitz.hpp>

#include <optional>
#include <span>
#include <utility>
#include <vector>

namespace concertina {

/// Where a block can hold any kernel, and any bias: what `preserve` solves for.
template <class Scalar, int Rank>
struct Principal {
  Conv<Scalar, Rank>& conv;
  std::span<Scalar> bias;  ///< one for each output channel, or for as many neighbouring ones each
  Expr<Scalar, any_rank> after_conv, after_bias;  ///< how they reach the output: channel maps
};

/// A convolution and the batch norm after it. Like every block here, its expression views its
/// layers, so the block must outlive it.
template <class Scalar, int Rank>
struct ConvBatchNorm {
  Conv<Scalar, Rank> conv;
  BatchNorm<Scalar> norm;

  Expr<Scalar, Rank> expression() const& { return batch_norm(norm) * conv; }
  void expression() && = delete;
  /// What preserve() solves for; gives the norm a bias, of zeros, where it has none.
  Principal<Scalar, Rank> principal() {
    const Index channels = conv.shape().out;
    norm.bias.resize(static_cast<std::size_t>(channels));
    return {conv, norm.bias, batch_norm(norm), identity<Scalar>(channels)};
  }
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
  Principal<Scalar, 2> principal() { return square.principal(); }

  /// For a layer of this shape, filled as PyTorch does (see initialize_uniform).
  /// Requires  stride and padding are the block's; dilation 1; odd extents; the shape's bias plays
  ///           no part, as each block has one
  /// Throws    ShapeError for an impossible shape, or one that the block does not have
  template <BitGenerator Generator>
  static AcNet initialize(const ConvShape<2>& shape, Generator& generator);
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
  Principal<Scalar, Rank> principal() { return dense.principal(); }

  /// See AcNet.
  template <BitGenerator Generator>
  static RepVgg initialize(const ConvShape<Rank>& shape, Generator& generator);
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
  Principal<Scalar, Rank> principal() { return origin.principal(); }

  /// What the statistics of its batch norms in training leave out, in the order of leaves: the
  /// padding that stands before the inner ones (TrainingContraction).
  std::vector<Padding<Rank>> margins() const {
    const auto padding = [](const ConvBatchNorm<Scalar, Rank>& branch) {
      return branch.conv.shape().padding;
    };
    std::vector<Padding<Rank>> result = {0, padding(reduce), 0};
    if (pointwise) result.push_back(0);
    if (before_pool) result.push_back(padding(*before_pool));
    result.push_back(0);
    return result;
  }

  /// See AcNet.
  template <BitGenerator Generator>
  static DiverseBranchBlock initialize(const ConvShape<Rank>& shape, Generator& generator);
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
  Principal<Scalar, Rank> principal() { return dense.front().principal(); }

  /// See AcNet; with this many kxk branches, a 1x1 branch unless k is 1, and a skip connection as
  /// RepVGG's.
  /// Throws  ShapeError for fewer branches than 1
  template <BitGenerator Generator>
  static MobileOne initialize(const ConvShape<Rank>& shape, Index branches, Generator& generator);
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

/// A token mixer beside a skip connection, x + scale * (mixer(x) - norm(x)): depthwise.
/// Source  Vasu et al., FastViT, ICCV 2023
template <class Scalar, int Rank>
struct RepMixer {
  MobileOne<Scalar, Rank> mixer;
  BatchNorm<Scalar> norm;
  std::vector<Scalar> layer_scale;

  Expr<Scalar, Rank> expression() const& {
    return identity<Scalar>(static_cast<Index>(layer_scale.size())) +
           channel_scale(layer_scale) * (mixer.expression() - batch_norm(norm));
  }
  void expression() && = delete;
  Principal<Scalar, Rank> principal() {
    const Principal<Scalar, Rank> of = mixer.principal();
    const Expr<Scalar, any_rank> scale = channel_scale(layer_scale);
    return {of.conv, of.bias, scale * of.after_conv, scale * of.after_bias};
  }

  /// See AcNet; for a depthwise shape that keeps maps' size: a mixer of one branch, a scale of
  /// 1e-5.
  template <BitGenerator Generator>
  static RepMixer initialize(const ConvShape<Rank>& shape, Generator& generator);
};

/// RepVGG for quantised networks: no batch norm on the 1x1 and the skip connection, one after the
/// sum.
/// Source  Chu, Li, Zhang, QARepVGG, AAAI 2024
template <class Scalar, int Rank>
struct QaRepVgg {
  ConvBatchNorm<Scalar, Rank> dense;
  Conv<Scalar, Rank> pointwise;
  bool skips = false;
  BatchNorm<Scalar> norm;

  Expr<Scalar, Rank> expression() const& {
    const auto branches = dense.expression() + pointwise;
    return batch_norm(norm) *
           (skips ? branches + identity<Scalar>(pointwise.shape().in) : branches);
  }
  void expression() && = delete;
  Principal<Scalar, Rank> principal() {
    const Principal<Scalar, Rank> of = dense.principal();
    const Expr<Scalar, any_rank> after = batch_norm(norm);
    return {of.conv, of.bias, after * of.after_conv, after * of.after_bias};
  }

  /// See AcNet.
  template <BitGenerator Generator>
  static QaRepVgg initialize(const ConvShape<Rank>& shape, Generator& generator);
};

/// A large depthwise kernel and small dilated ones beside it, each with a batch norm.
/// Source  Ding et al., UniRepLKNet, CVPR 2024: the dilated re-parameterised block
template <class Scalar, int Rank>
struct DilatedBlock {
  ConvBatchNorm<Scalar, Rank> large;
  std::vector<ConvBatchNorm<Scalar, Rank>> dilated;

  Expr<Scalar, Rank> expression() const& {
    std::vector<Expr<Scalar, Rank>> branches{large.expression()};
    for (const auto& branch : dilated) branches.push_back(branch.expression());
    return sum(branches);
  }
  void expression() && = delete;
  Principal<Scalar, Rank> principal() { return large.principal(); }

  /// See AcNet; of a depthwise kernel of odd size, 5 or more, with the published kernels and
  /// dilations for sizes up to 17 (3x3 with every dilation that fits along the shortest axis for
  /// others).
  template <BitGenerator Generator>
  static DilatedBlock initialize(const ConvShape<Rank>& shape, Generator& generator);
};

/// 3x3; 1x1 and 3x3; and 1x1 with a Sobel or Laplace filter after it, each filter with a factor and
/// a bias for each channel. Its padding is the published one: 1x1 layers pad, so that what comes
/// after them reads their biases there.
/// Source  Zhang, Zeng, Zhang, Edge-oriented convolution block, ACM MM 2021
template <class Scalar>
struct Ecb {
  struct Edge {
    Conv<Scalar, 2> pointwise;  ///< padded
    std::vector<Scalar> factors, bias;
  };
  Conv<Scalar, 2> dense, widen, narrow;
  Edge sobel_x, sobel_y, laplace;
  bool skips = false;

  Expr<Scalar, 2> expression() const& {
    const auto edge = [](const Edge& branch, const std::vector<int>& filter) {
      const Index channels = branch.pointwise.shape().out;
      Conv<Scalar, 2> filters(
          {.out = channels, .in = channels, .kernel_size = 3, .groups = channels});
      for (std::size_t i = 0; i < filters.weight().size(); ++i) {
        filters.weight()[i] = Scalar(filter[i % 9]);
      }
      return channel_bias(branch.bias) * channel_scale(branch.factors) * fixed(std::move(filters)) *
             branch.pointwise;
    };
    const auto branches = dense + narrow * widen + edge(sobel_x, {1, 0, -1, 2, 0, -2, 1, 0, -1}) +
                          edge(sobel_y, {1, 2, 1, 0, 0, 0, -1, -2, -1}) +
                          edge(laplace, {0, 1, 0, 1, -4, 1, 0, 1, 0});
    return skips ? branches + identity<Scalar>(dense.shape().in) : branches;
  }
  void expression() && = delete;
  Principal<Scalar, 2> principal() {
    const Expr<Scalar, any_rank> after = identity<Scalar>(dense.shape().out);
    return {dense, dense.bias(), after, after};
  }

  /// See AcNet; for a 3x3 of stride 1 and one group, twice as wide between as its output; the edge
  /// filters' factors and biases uniform with the published deviation, 1e-3.
  template <BitGenerator Generator>
  static Ecb initialize(const ConvShape<2>& shape, Generator& generator);
};

/// A layer and an update of low rank, scale * up * down; with a kernel, `down` has it (LoCon).
/// Source  Hu et al., LoRA, ICLR 2022; Yeh et al., LyCORIS, ICLR 2024
template <class Scalar, int Rank>
struct LoRa {
  Conv<Scalar, Rank> base, down, up;
  Scalar scale;  ///< alpha / rank

  Expr<Scalar, Rank> expression() const& { return base + scale * (up * down); }
  void expression() && = delete;

  /// An update of this rank that is zero until it is trained: it contracts to `base`, bit for bit.
  /// Requires  a base of one group
  /// Throws    ShapeError for more groups or no rank
  template <BitGenerator Generator>
  static LoRa initialize(Conv<Scalar, Rank> base, Index rank, double alpha, Generator& generator);
};

namespace detail {

/// The layer several times, each on channels of its own; of a batch norm each channel's statistics.
template <class Scalar, int Rank>
Conv<Scalar, Rank> repeated(const Conv<Scalar, Rank>& layer, Index times);
template <class Scalar>
BatchNorm<Scalar> repeated(const BatchNorm<Scalar>& norm, Index times);

}  // namespace detail

/// A layer and an update that is a Kronecker product, scale * (first x second): the kernel from
/// input channel j * m + l to output channel i * n + k is first[i][j] * second[k][l]. The
/// expression has each factor several times, one copy after the other; a factor's gradient is their
/// sum.
/// Source  Yeh et al., LyCORIS, ICLR 2024
template <class Scalar, int Rank>
struct LoKr {
  Conv<Scalar, Rank> base;
  Conv<Scalar, 0> first;
  Conv<Scalar, Rank> second;  ///< with the base's kernel, stride, padding and dilation
  Scalar scale = Scalar(1);

  Expr<Scalar, Rank> expression() const& {
    const Index rows = first.shape().out, columns = first.shape().in, n = second.shape().out;
    const Conv<Scalar, 0> copies = detail::repeated(first, n);
    // (first x 1) (1 x second)
    return base +
           scale *
               (channel_shuffle<Scalar>(n * rows, n) * Conv<Scalar, Rank>(pointwise<Rank>(copies)) *
                channel_shuffle<Scalar>(n * columns, columns) * detail::repeated(second, columns));
  }
  void expression() && = delete;

  /// An update whose first factor has these rows and columns, zero until it is trained: it
  /// contracts to `base`, bit for bit.
  /// Throws  ShapeError for a base of several groups, or where these do not divide its channels
  template <BitGenerator Generator>
  static LoKr initialize(Conv<Scalar, Rank> base, Index rows, Index columns, Generator& generator);
};

/// A kernel refocused by a map of kernels, kernel + map(kernel), where the kernel is read as a
/// feature map of out * in / groups channels. Only the map is trained.
/// Source  Cai et al., RefConv, 2023
template <class Scalar, int Rank>
struct RefConv {
  Conv<Scalar, Rank> base, map;

  /// Summed in double where that is wider, and rounded once. Throws ShapeError where the map is not
  /// one of such kernels to others of the same size.
  Conv<Scalar, Rank> kernel() const;
  Expr<Scalar, Rank> expression() const { return kernel(); }

  /// The layer with a map of this odd size that is zero until it is trained, a group for each pair
  /// of the layer's channels within its groups: it contracts to `base`, bit for bit.
  /// Throws  ShapeError for a map of even size
  static RefConv initialize(Conv<Scalar, Rank> base, Index map_size);
};

/// A fully connected layer on maps of one size, and depthwise convolutions beside it that keep the
/// size, each with a batch norm of one factor for all positions of a channel, in inference: flat
/// maps to flat maps. In training conv_as_linear_gradient goes on from the gradients of its leaves;
/// those of a repeated batch norm are summed over positions.
/// Source  Ding et al., RepMLPNet, CVPR 2022: channel and local perceptron
template <class Scalar, int Rank>
struct RepMlp {
  PerAxis<Rank> size;
  Conv<Scalar, 0> fc;  ///< a group for each channel
  BatchNorm<Scalar> norm;
  std::vector<ConvBatchNorm<Scalar, Rank>> local;

  Expr<Scalar, 0> expression() const& {
    const auto flat = [&](const BatchNorm<Scalar>& of) {
      return batch_norm(detail::repeated(of, numel(size)));
    };
    Expr<Scalar, 0> branches = flat(norm) * fc;
    for (const auto& branch : local) {
      branches = branches + flat(branch.norm) * conv_as_linear(branch.conv, size);
    }
    return branches;
  }
  void expression() && = delete;
  Principal<Scalar, 0> principal() {
    norm.bias.resize(norm.running_mean.size());
    return {fc, norm.bias, batch_norm(detail::repeated(norm, numel(size))),
            identity<Scalar>(fc.shape().out)};
  }

  /// Of that many channels, with convolutions of these odd sizes, filled as PyTorch does.
  /// Throws  ShapeError for an even size
  template <BitGenerator Generator>
  static RepMlp initialize(Index channels, const PerAxis<Rank>& size,
                           const std::vector<Index>& kernel_sizes, Generator& generator);
};

/// Two block-diagonal layers with channels transposed between and after them: of n = p * q
/// channels, the first has p blocks of q, the second q blocks of p.
/// Source  Dao et al., Monarch, ICML 2022
template <class Scalar>
struct Monarch {
  Conv<Scalar, 0> first, second;

  Expr<Scalar, 0> expression() const& {
    const Index p = first.shape().groups, q = second.shape().groups;
    return channel_shuffle<Scalar>(second.shape().out, q) * second *
           channel_shuffle<Scalar>(first.shape().out, p) * first;
  }
  void expression() && = delete;

  /// Of p * q channels, filled as PyTorch does. Throws ShapeError for no channels, SizeError for
  /// more than fit.
  template <BitGenerator Generator>
  static Monarch initialize(Index p, Index q, Generator& generator);
};

/// A kernel over-parameterised channel by channel: a depthwise layer that makes many of each
/// channel, and a 1x1.
/// Source  Cao et al., DO-Conv, IEEE TIP 2022
template <class Scalar, int Rank>
struct DoConv {
  Conv<Scalar, Rank> depthwise, pointwise;

  Expr<Scalar, Rank> expression() const& { return pointwise * depthwise; }
  void expression() && = delete;

  /// The layer as the 1x1 after a depthwise layer that copies each tap into a channel of its own:
  /// it contracts to `layer`, bit for bit.
  static DoConv initialize(const Conv<Scalar, Rank>& layer);
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

/// The block with the kernel and bias of principal() changed such that it contracts to `layer`: it
/// goes on training from a trained kernel. All else stays. Half and bfloat16 do not compile: they
/// only store, so preserve master weights in float.
/// Ensures  prove_rounding(block.expression(), layer)
/// Cost     one contraction of the block in double, or in the scalar if that is wider
/// Throws   ShapeError where the block does not contract to the layer's shape, or has one bias for
///          outputs that need different ones; NumericalError where an element that the kernel needs
///          is none of the scalar's, as the kernel reaches an output with a factor of zero
template <class Block, Layer F>
Block preserve(const F& layer, Block block);

}  // namespace concertina

#include <concertina/detail/blocks.ipp>
