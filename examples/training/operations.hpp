// The operations that the networks are made of, each with its gradient; recorded on a tape.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "convolution.hpp"
#include "tape.hpp"

#include <concertina/shape.hpp>

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

namespace training {

/// Fills a chunk of the maps, [channel][y][x][lane], at the start of each pass forward.
template <class Scalar>
void record_source(Tape<Scalar>& tape, Maps<Scalar>& x,
                   std::function<void(Index chunk, Scalar* to)> source);

/// A convolution, as torch.nn.Conv2d.
/// Requires  stride 1 or 2, dilation 1, one group, equal padding on both sides of an axis
/// Cost      the input's gradient at stride 2 is computed as at stride 1
/// Throws    ShapeError where the maps have other channels, or are smaller than the kernel, or the
///           weights are not those of the shape; as below, Error for a tensor that is already read
template <class Scalar>
Maps<Scalar>& convolution(Tape<Scalar>& tape, Maps<Scalar>& x,
                          const concertina::ConvShape<2>& shape, Weights<Scalar> weights);

/// A fully connected layer on the flattened maps, as torch.nn.Linear.
template <class Scalar>
Maps<Scalar>& linear(Tape<Scalar>& tape, Maps<Scalar>& x, const concertina::ConvShape<0>& shape,
                     Weights<Scalar> weights);

/// A batch norm, as torch.nn.BatchNorm2d with eps 1e-5 and momentum 0.1: in training by the
/// statistics of the batch, which move the running ones; in inference by the running ones.
/// Statistics are of each chunk's mean and squared deviations from it, combined in double. They
/// leave out a margin of the maps, as where padding was put before a layer instead of after its
/// norm.
/// Throws  ShapeError where tensors have other channels, or the margin leaves nothing
/// Source  Ioffe, Szegedy, ICML 2015; Chan, Golub, LeVeque, The American Statistician 1983
template <class Scalar>
Maps<Scalar>& batch_norm(Tape<Scalar>& tape, Maps<Scalar>& x, NormTensors<Scalar> tensors,
                         const concertina::Padding<2>& margin = 0);

/// max(x, 0) in place; NaN stays. What wrote x does without its own output for its gradient: of max
/// pools, which compare with theirs, because negative windows have no gradient to give.
/// Throws  Error where something else has read x
template <class Scalar>
void relu(Tape<Scalar>& tape, Maps<Scalar>& x);

/// The largest of each 2x2 window; odd last rows and columns are dropped. The gradient goes to the
/// first of equal ones.
template <class Scalar>
Maps<Scalar>& max_pool(Tape<Scalar>& tape, Maps<Scalar>& x);

/// The mean of each window, as torch.nn.AvgPool2d(kernel, stride=1).
/// Throws  ShapeError where maps are smaller than the window
template <class Scalar>
Maps<Scalar>& average_pool(Tape<Scalar>& tape, Maps<Scalar>& x,
                           const concertina::PerAxis<2>& kernel);

/// A copy through which no gradient flows back.
template <class Scalar>
Maps<Scalar>& detached(Tape<Scalar>& tape, Maps<Scalar>& x);

/// The sum of maps of one size: parallel branches.
/// Throws  ShapeError where sizes differ
template <class Scalar>
Maps<Scalar>& add(Tape<Scalar>& tape, std::vector<Maps<Scalar>*> branches);

/// The mean over the batch of the cross-entropy of softmax(logits) with the images' labels.
template <class Scalar>
class CrossEntropy {
 public:
  /// The last operation on the logits: its forward pass sets their gradient.
  CrossEntropy(Tape<Scalar>& tape, Maps<Scalar>& logits);
  CrossEntropy(const CrossEntropy&) = delete;  // the tape refers to it
  CrossEntropy& operator=(const CrossEntropy&) = delete;

  /// The classes of the batch's images. Throws ShapeError for one that there is not.
  void set_labels(std::span<const std::uint8_t> labels);

  /// A factor of the gradient; loss() is without it.
  void set_weight(double weight) { weight_ = static_cast<Scalar>(weight); }

  double loss() const { return loss_; }       ///< of the last batch, its mean
  Index correct() const { return correct_; }  ///< images whose largest logit is the label's

 private:
  Tape<Scalar>& tape_;
  Index classes_;
  std::vector<std::uint8_t> labels_;
  std::vector<double> losses_;  // of chunks
  std::vector<Index> corrects_;
  Scalar weight_ = 1;
  double loss_ = 0;
  Index correct_ = 0;
};

}  // namespace training
