// For a browser: a 3x3 convolution and a 1x1 as one layer, over integers, so outputs are equal.
// SPDX-License-Identifier: Apache-2.0
#include <concertina/concertina.hpp>  // there: the address of a release's concertina.hpp

#include <iostream>
#include <numeric>

int main() {
  using namespace concertina;
  Conv2d<int> first({.out = 3, .in = 2, .kernel_size = 3, .padding = 1}),
      second({.out = 2, .in = 3});
  std::iota(first.weight().begin(), first.weight().end(), -20);
  std::iota(second.weight().begin(), second.weight().end(), 1);
  const Conv2d<int> product = second * first;

  FeatureMap<int, 2> image({.channels = 2, .size = {4, 4}});
  std::iota(image.values().begin(), image.values().end(), -9);
  const bool same = product(image) == second(first(image));
  std::cout << second * first << "\nis " << product.shape() << (same ? ", exactly\n" : "?\n");
  return same ? 0 : 1;
}
