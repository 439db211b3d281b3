// What every consumer builds and runs, however it got the library.
// SPDX-License-Identifier: Apache-2.0
#include <concertina/concertina.hpp>

#include <random>

int main() {
  std::mt19937_64 generator(1);
  const auto layers = concertina::initialize<double>(
      concertina::expand_cl<1>({.out = 3, .in = 2, .kernel_size = 3, .bias = true}), generator);
  const concertina::Conv1d<double> product = layers[2] * layers[1] * layers[0];
  return concertina::verify(layers, product) ? 0 : 1;
}
