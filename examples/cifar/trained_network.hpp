// Networks in files: loaded, and contracted with a check.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "training.hpp"

#include <concertina/error.hpp>
#include <concertina/io/onnx.hpp>
#include <concertina/io/safetensors.hpp>

#include <cmath>
#include <string>

namespace cifar {

/// Whether a file's numbers are double.
bool is_double(const concertina::io::Safetensors& file);

/// Throws FormatError where a file's network is not for a data set: other classes, or images that
/// were normalised otherwise.
void require_data(const concertina::io::Safetensors& file, const Dataset& data);

/// That of a network on a set's test images.
/// Throws  NumericalError naming `origin` where its loss is not finite
template <class Scalar>
Score tested(Network<Scalar>& network, const Dataset& data, const std::string& origin) {
  const Score score = evaluate(network, data, data.test);
  if (std::isfinite(score.loss)) return score;
  throw concertina::NumericalError(origin + ": the network's loss on the test images of " +
                                   data.name + " is not finite");
}

/// Calls use(network) with the network of a file, in its scalar.
template <class Use>
auto with_network(const concertina::io::Safetensors& file, ThreadPool& pool, Use&& use) {
  constexpr Index batch = 128;
  const auto run = [&]<class Scalar>(Scalar) {
    Network<Scalar> network(file, batch, pool);
    return use(network);
  };
  return is_double(file) ? run(double()) : run(float());
}

/// A network and the compact one that it contracts to, on all test images.
struct ContractionCheck {
  Score expanded, compact;
  Index expanded_parameters = 0, compact_parameters = 0;
  concertina::onnx::Model network;  ///< the compact one

  bool identical() const { return expanded.correct == compact.correct; }
};

/// Throws  as require_data and Network::contract
ContractionCheck check_contraction(const concertina::io::Safetensors& file, const Dataset& data,
                                   ThreadPool& pool);

}  // namespace cifar
