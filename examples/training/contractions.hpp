// What this project is about: chains and blocks on a tape, computed as the one layer that they are.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "tape.hpp"

#include <concertina/expression.hpp>
#include <concertina/parallel.hpp>
#include <concertina/shape.hpp>

#include <functional>
#include <map>
#include <span>
#include <utility>
#include <vector>

namespace training {

/// Contractions of chains: before each batch the chains' numbers become those of single layers, and
/// gradients of those are pulled back to the chains. Chains are contracted side by side, but a
/// large one by all threads together. A pullback runs beside the layers' below passes back, but a
/// large one, where there are more than two threads, after them by all together.
template <class Scalar>
class Contractions {
 public:
  explicit Contractions(Tape<Scalar>& tape);
  Contractions(const Contractions&) = delete;  // the tape refers to it
  Contractions& operator=(const Contractions&) = delete;

  /// The single layer's numbers, for an operation to read, and its shape.
  /// Throws  InexactError where no single layer equals the chain at the border
  template <int Rank>
  std::pair<Weights<Scalar>, concertina::ConvShape<Rank>> add(const Chain<Scalar, Rank>& chain);

  /// Adds decay / 2 times the squared norm of each contraction, its bias included, to the loss:
  /// what weight decay does to a compact layer, pulled back to the layers of the expansion.
  void set_decay(double decay) { decay_ = static_cast<Scalar>(decay); }

 private:
  /// The gradient of a contraction with that of the decay.
  std::span<const Scalar> decayed(const Tensor<Scalar>& tensor, std::vector<Scalar>& sum) const;

  using Work = std::function<void(const concertina::ParallelFor&)>;
  Tape<Scalar>& tape_;
  Scalar decay_ = 0;
  std::multimap<Index, Work, std::greater<>> large_, small_;  // forward, by its multiply-adds
  std::vector<Work> after_;                                   // backward, of large ones
  Index computed_ = -1;                                       // version of the tensors
};

/// A convolution, or without weights an average pool of the shape's kernel, and the batch norm of
/// what it gives.
template <class Scalar>
struct NormedLayer {
  concertina::ConvShape<2> shape;
  Weights<Scalar> weights;
  NormTensors<Scalar> norm;
  concertina::Padding<2> margin = 0;  ///< that the norm's statistics leave out
};

/// Branches of such layers, the first applied first; a block is their sum.
template <class Scalar>
using NormedBranches = std::vector<std::vector<NormedLayer<Scalar>>>;

/// A block as an expression of its tensors, its batch norms as in inference.
template <class Scalar>
concertina::Expr<Scalar, 2> expression_of(const NormedBranches<Scalar>& branches,
                                          double eps = 1e-5);

/// A block as one convolution: in training by the statistics of the batch, which follow from the
/// moments of the input's patches and move the running ones; in inference by the running ones.
/// Outputs and gradients are those of the layers one by one, before rounding.
/// Source  concertina::TrainingContraction
/// Throws  InexactError where no single layer equals the block at the border
template <class Scalar>
Maps<Scalar>& contracted_block(Tape<Scalar>& tape, Maps<Scalar>& x,
                               const NormedBranches<Scalar>& branches);

/// Whether a training step on so many images of this size should take less time that way, by its
/// multiply-adds.
template <class Scalar>
bool cheaper_contracted(const NormedBranches<Scalar>& branches, const concertina::PerAxis<2>& size,
                        Index images);

}  // namespace training
