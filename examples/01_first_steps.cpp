// The README's program: expand a layer, contract it again, prove that nothing changed.
// SPDX-License-Identifier: Apache-2.0
#include <concertina/concertina.hpp>

#include <iostream>
#include <random>

int main() {
  using namespace concertina;
  std::mt19937_64 generator(1);
  const ConvShape<2> compact{.out = 16, .in = 8, .kernel_size = 7, .padding = 3, .bias = true};
  const auto layers = initialize<float>(expand_cl(compact, {.rate = 4}), generator);

  const auto product = contract<double>(layers[2] * layers[1] * layers[0]);
  const auto proofs = verify<double>(layers, product);
  for (const auto& layer : layers) std::cout << layer.shape() << '\n';
  std::cout << "contract to " << product.shape() << "\n\n" << proofs;

  FeatureMap<float, 2> image({.channels = 8, .size = {32, 32}});
  std::cout << "\noutput " << to_string(product(image).shape().size) << '\n';
  if (!std::cout.flush()) std::cerr << "standard output: not all of it could be written\n";
  return std::cout && proofs ? 0 : 1;
}
