// Over-parameterisation: the layers into which one layer expands, initialised at random or to the
// very same map.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/contract.hpp>
#include <concertina/conv.hpp>
#include <concertina/random.hpp>

#include <cstddef>
#include <optional>
#include <vector>

namespace concertina {

/// How wide an expansion is and where its stride stands.
struct ExpandOptions {
  /// Width of the layers between, as a multiple of the layer's own: m, rm, rn, ..., rn, n. Rounded
  /// per group.
  double rate = 4;
  /// The widths themselves, one for each map between two layers; where given, `rate` is ignored.
  std::vector<Index> widths = {};
  /// Which layer has the stride, counted from 0. By default the kxk layer (CL) or the last (CK). It
  /// can stand on any layer after which only 1x1 layers follow; earlier it would spread the taps of
  /// the kernels behind it.
  std::optional<std::size_t> stride_on = std::nullopt;
  /// Whether the layers before the last have biases too, if the layer has one.
  bool inner_bias = true;
  /// CL only: the kxk layer reads one channel each (groups as wide as the map), and mixes none.
  bool depthwise_middle = false;
};

/// CL: 1x1, kxk, 1x1 with widths m, rm, rn, n. Groups are the layer's in every layer, so depthwise
/// layers expand depthwise. Padding stands on the first layer, where it keeps the contraction exact
/// at the border.
/// Ensures  Form(result).shape() == shape, with dilation 1 along axes of extent 1
/// Throws   ShapeError for an impossible shape, widths that groups do not divide, a stride that cannot stand there
/// Source   ExpandNets (NeurIPS 2020), Section 3.1
template <int Rank>
std::vector<ConvShape<Rank>> expand_cl(const ConvShape<Rank>& shape,
                                       const ExpandOptions& options = {});

/// CK: a chain of 3x3 layers, (k-1)/2 of them for odd k, with widths m, rm, rn, ..., rn, n. An even
/// extent ends with one 2 (k = 4: 3x3, 2x2), a smaller one with ones (7x3: 3x3, 3x1, 3x1).
/// Ensures  Form(result).shape() == shape
/// Throws   ShapeError as expand_cl, and where no extent exceeds 3: a single 3x3 has nothing to
///          expand into, use CL
/// Source   ExpandNets (NeurIPS 2020), Section 3.1
template <int Rank>
  requires(Rank > 0)
std::vector<ConvShape<Rank>> expand_ck(const ConvShape<Rank>& shape,
                                       const ExpandOptions& options = {});

/// FC: three fully connected layers with widths m, rm, rn, n.
/// Ensures  Form(result).shape() == shape
/// Throws   ShapeError as expand_cl
/// Source   ExpandNets (NeurIPS 2020), Section 3.1
inline std::vector<ConvShape<0>> expand_fc(const ConvShape<0>& shape,
                                           const ExpandOptions& options = {}) {
  return expand_cl(shape, options);
}

/// Layers of these shapes, each initialised as PyTorch does (see initialize_uniform), in order from
/// one generator.
template <class Scalar, int Rank, BitGenerator Generator>
std::vector<Conv<Scalar, Rank>> initialize(const std::vector<ConvShape<Rank>>& shapes,
                                           Generator& generator) {
  std::vector<Conv<Scalar, Rank>> layers;
  for (const ConvShape<Rank>& shape : shapes) {
    initialize_uniform(layers.emplace_back(shape), generator);
  }
  return layers;
}

/// What the layers of a function-preserving expansion are, but for the one that is solved for.
enum class Ends {
  orthonormal,  ///< random with orthonormal rows or columns; reaches the largest kernels
  shift         ///< ones that copy and shift channels; the contraction is the layer to the last bit
};

/// Layers of the given shapes whose contraction is `layer`: one layer is solved for by linear least
/// squares (in double, or the layer's scalar if that is wider), the others are `ends`. A trained
/// layer thus expands and trains on.
///
/// Inner biases are zero; the last is the layer's own. With shifts, weights that the map does not
/// depend on are random, so that no channel is dead in training.
/// Requires  Form(shapes).shape() == layer.shape(), a bias on the last layer just where the layer
///           has one, groups alike in all layers (or a depthwise middle)
/// Ensures   prove_rounding(result, layer); with Ends::shift contract(result) == layer in every scalar
/// Reach     orthonormal: CL at any rate from 1; CK at rate 4 up to k = 11, at rate 3 k = 5 (m >= 2) and 7.
///           shift: CL at any rate from 1; CK at rate 4 up to k = 9
/// Cost      CL: two products; CK: one small factorisation per shape of block, and rotations of the maps between
/// Throws    ExpansionError with the residual where these widths cannot represent the layer (half and
///           bfloat16 layers cannot hold orthonormal ends: take shifts, or expand in float), or
///           where it is not finite; ShapeError where the shapes do not contract to the layer's
template <Layer F, BitGenerator Generator>
std::vector<Conv<typename F::Scalar, F::Rank>> preserve(
    const F& layer, const std::vector<ConvShape<F::Rank>>& shapes, Generator& generator,
    Ends ends = Ends::orthonormal);

}  // namespace concertina

#include <concertina/detail/expand/expand.ipp>
