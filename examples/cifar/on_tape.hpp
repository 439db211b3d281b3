// A network's operations on the processor's tape, by the names that a device's recorder has too.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/accelerator.hpp"
#include "training/contractions.hpp"
#include "transfer.hpp"

#include <concertina/shape.hpp>

#include <vector>

namespace cifar {

/// Layers as operations on the processor's tape.
template <class Scalar>
struct OnTape {
  using Map = Maps<Scalar>*;
  static constexpr bool contracts = true;
  Tape<Scalar>& tape;

  Map layer(Map x, const concertina::ConvShape<2>& shape, const Weights<Scalar>& weights,
            const Chain<Scalar, 2>&) const {
    return &convolution(tape, *x, shape, weights);
  }
  Map layer(Map x, const concertina::ConvShape<0>& shape, const Weights<Scalar>& weights,
            const Chain<Scalar, 0>&) const {
    return &linear(tape, *x, shape, weights);
  }
  Map norm(Map x, const NormTensors<Scalar>& norm, const concertina::Padding<2>& margin = 0) const {
    return &batch_norm(tape, *x, norm, margin);
  }
  Map relu(Map x) const {
    cifar::relu(tape, *x);
    return x;
  }
  Map max_pool(Map x) const { return &cifar::max_pool(tape, *x); }
  Map mean_pool(Map x) const { return average_pool(x, {x->height, x->width}); }
  Map average_pool(Map x, const concertina::PerAxis<2>& kernel) const {
    return &cifar::average_pool(tape, *x, kernel);
  }
  Map sum(const std::vector<Map>& branches) const { return &add(tape, branches); }
  Map detached(Map x) const { return &cifar::detached(tape, *x); }
  void begin(cuda::Part) const {}
  void distill(Map logits, Map teacher, double temperature, double weight) const {
    distillation(tape, *logits, *teacher, temperature, weight);
  }
  void hint(Map features, Map hint) const { hint_loss(tape, *features, *hint); }
  void match_similarities(Map features, Map teacher) const {
    similarity_transfer(tape, *features, *teacher);
  }
  /// As one convolution, which is in no other place.
  Map block(Map x, const NormedBranches<Scalar>& branches) const {
    return &contracted_block(tape, *x, branches);
  }
};

}  // namespace cifar
