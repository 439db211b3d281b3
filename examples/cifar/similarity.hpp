// How alike the gradients of mini-batches are: the paper's measure of how well a network trains.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <filesystem>
#include <span>
#include <vector>

namespace cifar {

/// The cosines between all pairs of gradients, (0, 1), (0, 2), ..., computed in double.
/// Shapes    gradients[count][numbers]; count * (count - 1) / 2 cosines
/// Requires  two gradients or more of one length, none of them zero, otherwise throws ShapeError or
///           NumericalError
/// Cost      count^2 * numbers multiply-adds
/// Source    Sankararaman et al., "The impact of neural network overparameterization on gradient
///           confusion and stochastic gradient descent", ICML 2020
template <class Scalar>
std::vector<double> cosine_similarities(const std::vector<std::vector<Scalar>>& gradients);

/// A row for each, under the head "cosine_similarity".
/// Throws  IoError
void write_similarities(const std::filesystem::path& path, std::span<const double> similarities);

}  // namespace cifar
