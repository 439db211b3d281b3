// A re-parameterised block is an expression: RepVGG's three branches, written as the paper does,
// printed, and contracted to the convolution that ships; then by its name, to train on from there.
// SPDX-License-Identifier: Apache-2.0
#include <concertina/concertina.hpp>

#include <cstdlib>
#include <iostream>
#include <random>

int main() {
  using namespace concertina;
  std::mt19937_64 generator(1);
  Conv2d<float> c3({.out = 8, .in = 8, .kernel_size = 3, .padding = 1}), c1({.out = 8, .in = 8});
  initialize_uniform(c3, generator);
  initialize_uniform(c1, generator);
  const auto norm = [&] {  // as if it had been trained
    auto trained = BatchNorm<float>::initialize(8);
    for (float& mean : trained.running_mean) {
      mean = static_cast<float>(random_uniform(generator, 1));
    }
    return trained;
  };

  const auto block = batch_norm(norm()) * c3 + batch_norm(norm()) * c1 + batch_norm(norm());
  const Conv2d<float> deployed = contract<double>(block);
  const Verification proofs = verify<double>(block, deployed);
  std::cout << block << "\nis " << deployed.shape() << "\n\n" << proofs;

  // The same by its name: new branches, and a kernel with which they are what was deployed.
  const auto fresh = RepVgg<float, 2>::initialize(c3.shape(), generator);
  const auto resumed = preserve(deployed, fresh);
  const Report same = prove_rounding(resumed.expression(), deployed);
  std::cout << "\nRepVgg, to train on from it\n" << same << '\n';
  const bool resumes = same && resumed.pointwise.conv == fresh.pointwise.conv;

  // A block of your own is an expression of your own: here the 3x3 twice, the second time scaled.
  const auto own = c3 + 0.5F * c3 - c1 * c1;
  std::cout << '\n' << own << "\nis " << Form(own).shape() << '\n';
  if (!std::cout.flush()) std::cerr << "standard output: not all of it could be written\n";
  const bool right = proofs && resumes && Form(own).shape() == c3.shape();
  return std::cout && right ? EXIT_SUCCESS : EXIT_FAILURE;
}
