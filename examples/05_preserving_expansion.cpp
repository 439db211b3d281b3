// Expands a trained layer without changing what it computes, so that it can train on, wider.
// SPDX-License-Identifier: Apache-2.0
#include <concertina/concertina.hpp>

#include <iostream>
#include <random>
#include <string>
#include <vector>

int main() {
  using namespace concertina;
  std::mt19937_64 generator(1);
  const ConvShape<2> shape{.out = 16, .in = 8, .kernel_size = 5, .padding = 2, .bias = true};
  Conv<float, 2> trained(shape);
  initialize_uniform(trained, generator);

  struct Expansion {
    std::string name;
    std::vector<ConvShape<2>> shapes;
    Ends ends;
  };
  const std::vector<Expansion> expansions = {
      {"CL, orthonormal ends", expand_cl(shape, {.rate = 4}), Ends::orthonormal},
      {"CK, orthonormal ends", expand_ck(shape, {.rate = 4}), Ends::orthonormal},
      {"CK, ends that shift", expand_ck(shape, {.rate = 4}), Ends::shift}};
  bool good = true;
  for (const auto& [name, shapes, ends] : expansions) {
    const auto layers = preserve(trained, shapes, generator, ends);
    std::cout << name << ":\n";
    for (const auto& layer : layers) std::cout << "  " << to_string(layer.shape()) << '\n';
    // The layer that they were made from is their contraction, within what rounding explains.
    const auto proofs = verify(layers, trained);
    const bool same = contract(layers) == trained;
    std::cout << "  contract to " << to_string(shape) << (same ? ", to the last bit\n" : "\n")
              << proofs << '\n';
    good = good && proofs && same == (ends == Ends::shift);
  }
  if (!std::cout.flush()) std::cerr << "standard output: not all of it could be written\n";
  return std::cout && good ? 0 : 1;
}
