// Losses by which a network learns from a teacher; recorded on the student's tape after its own.
// The teacher has been run on the same batch, with the same chunks. In inference they do nothing.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "training/operations.hpp"

#include <vector>

namespace cifar {

using namespace training;

/// Adds weight * T^2 times the mean cross-entropy of softmax(logits / T) with
/// softmax(teacher / T), T the temperature, to the loss.
/// Requires  as many classes as the teacher's, otherwise throws ShapeError
/// Source    Hinton, Vinyals, Dean, "Distilling the knowledge in a neural network", 2015
template <class Scalar>
void distillation(Tape<Scalar>& tape, Maps<Scalar>& logits, Maps<Scalar>& teacher,
                  double temperature, double weight);

/// Adds the mean over images and numbers of (features - hint)^2 to the loss. The gradient goes to
/// both where the hint is differentiable, such as a learned projection of the teacher's features.
/// Requires  maps of one size, otherwise throws ShapeError
/// Source    Romero et al., "FitNets: hints for thin deep nets", ICLR 2015
template <class Scalar>
void hint_loss(Tape<Scalar>& tape, Maps<Scalar>& features, Maps<Scalar>& hint);

/// Adds the divergence of the teacher from the student to the loss: with the cosine similarities of
/// a batch's features scaled to 0 .. 1 and each row's divided by their sum, the mean over rows of
/// the Kullback-Leibler divergence.
/// Cost      images^2 * (features + teacher's features) multiply-adds, and as many back
/// Source    Passalis, Tefas, "Learning deep representations with probabilistic knowledge
///           transfer", ECCV 2018
template <class Scalar>
void similarity_transfer(Tape<Scalar>& tape, Maps<Scalar>& features, Maps<Scalar>& teacher);

}  // namespace cifar
