// The loss around a trained network.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "training.hpp"

#include <cstdint>
#include <filesystem>
#include <random>
#include <vector>

namespace cifar {

struct LandscapeOptions {
  Index points = 31;    ///< along each direction; odd, so that the network itself is one
  double range = 1;     ///< coordinates go from -range to range
  Index images = 1000;  ///< of the training set, the first ones, without augmentation
  std::uint64_t seed = 1;

  /// Throws Error naming the option where one makes no sense.
  void validate() const;
};

struct Landscape {
  std::vector<double> coordinates;  ///< along either direction
  std::vector<double> losses;       ///< [second][first]
};

/// The mean loss at parameters + a * first + b * second, for two random directions that are
/// normalised by filter: the numbers of each output channel are Gaussian, scaled to the norm of the
/// network's own; biases and batch norms stay. The network is as before when this returns.
/// Cost    points^2 evaluations of the images
/// Source  Li et al., "Visualizing the loss landscape of neural nets", NeurIPS 2018
template <class Scalar>
Landscape landscape(Network<Scalar>& network, const Dataset& data, const LandscapeOptions& options);

/// A random direction in which to move a parameter, as landscape draws them. Of biases and batch
/// norms, which have one dimension, it is zero.
template <class Scalar>
std::vector<double> filter_direction(const Tensor<Scalar>& tensor, std::mt19937_64& generator);

/// A row for each point: first,second,loss. Rows of one second coordinate are followed by an empty
/// line, as gnuplot reads grids.
/// Throws  IoError
void write_landscape(const std::filesystem::path& path, const Landscape& landscape);

}  // namespace cifar
