// Where one layer equals a chain, and where it cannot: a chain that is padded in the middle, its
// border, and the three ways on.
// SPDX-License-Identifier: Apache-2.0
#include <concertina/concertina.hpp>

#include <array>
#include <cstdlib>
#include <iostream>
#include <numeric>
#include <vector>

int main() {
  using namespace concertina;
  const auto counting = [](const ConvShape<2>& shape) {  // small integers, so == is exact
    Conv2d<int> layer(shape);
    std::iota(layer.weight().begin(), layer.weight().end(), -4);
    return layer;
  };
  const auto first = counting({.out = 2, .in = 1, .kernel_size = 3, .padding = 1});
  const auto second = counting({.out = 1, .in = 2, .kernel_size = 3, .padding = 1});
  const auto chain = second * first;

  const Exactness<2> where = exactness(chain);
  std::cout << chain << "\nborder " << where.start << " at the start, " << where.end
            << " at the end: " << where.reason << '\n';

  bool refused = false;
  try {
    static_cast<void>(contract(chain));
  } catch (const InexactError& error) {
    refused = true;
    std::cout << "\nrefused: " << error.what() << '\n';
  }

  // 1. Say that the interior is enough: outputs differ at the border, and there only.
  FeatureMap<int, 2> image({.channels = 1, .size = {6, 6}});
  std::iota(image.values().begin(), image.values().end(), 1);
  const Conv2d<int> product = contract(chain, interior_only);
  const auto by_layers = chain(image), by_product = product(image);
  std::cout << "\nwhere the outputs are equal:\n";
  bool as_stated = true;
  for (Index row = 0; row < 6; ++row) {
    for (Index column = 0; column < 6; ++column) {
      const auto at = static_cast<std::size_t>(row * 6 + column);
      const bool same = by_layers.values()[at] == by_product.values()[at];
      const bool inside = row >= where.start[0] && row < 6 - where.end[0] &&
                          column >= where.start[1] && column < 6 - where.end[1];
      as_stated = as_stated && (same || !inside);
      std::cout << (same ? " =" : " .");
    }
    std::cout << '\n';
  }

  // 2. Pad the first layer by all that the product pads: exact for all weights and sizes.
  const auto padded = counting({.out = 2, .in = 1, .kernel_size = 3, .padding = 2});
  const auto bare = counting({.out = 1, .in = 2, .kernel_size = 3});
  const bool exact =
      exactness(bare * padded).exact() && contract(bare * padded)(image) == bare(padded(image));

  // 3. Name the size that you use, where the border vanishes there: a stride that skips the
  // padding.
  const std::array strided{
      ConvShape<2>{.out = 1, .in = 1, .kernel_size = 3, .padding = {0, 0}},
      ConvShape<2>{
          .out = 1, .in = 1, .kernel_size = 2, .stride = 2, .padding = Padding<2>::sides(0, 1)}};
  const bool at_some_size = !exactness(strided).exact() && exactness(strided, {{6, 6}}).exact();
  std::cout << "\npadded first: " << (exact ? "exact" : "not exact")
            << "; strided at 6x6: " << (at_some_size ? "exact there" : "not exact") << '\n';
  if (!std::cout.flush()) std::cerr << "standard output: not all of it could be written\n";
  return std::cout && refused && as_stated && exact && at_some_size ? EXIT_SUCCESS : EXIT_FAILURE;
}
