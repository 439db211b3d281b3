// A contraction reads its layers where they lie; those of a list that makes them are gone by then.
// SPDX-License-Identifier: Apache-2.0
// expect: the list makes its layers as it is read
#include <concertina/contract.hpp>

#include <ranges>
#include <vector>

using Layers = std::vector<concertina::Conv2d<float>>;

const concertina::Conv2d<float>& pass(const concertina::Conv2d<float>& layer) { return layer; }
concertina::Conv2d<float> copy(const concertina::Conv2d<float>& layer) { return layer; }

#ifdef CONCERTINA_CONTROL
constexpr auto each = pass;
#else
constexpr auto each = copy;
#endif

void run(concertina::Contraction<float, 2>& contraction, const Layers& layers) {
  contraction.forward(layers | std::views::transform(each));
}
