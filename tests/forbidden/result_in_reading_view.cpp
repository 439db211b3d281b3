// A contraction writes its result where it may.
// SPDX-License-Identifier: Apache-2.0
// expect: no matching function for call to|no matching member function
#include <concertina/contract.hpp>

#include <vector>

using concertina::Contraction;
using concertina::Conv2d;
using concertina::ConvView;

#ifdef CONCERTINA_CONTROL
using Element = float;
#else
using Element = const float;
#endif

void run(Contraction<float, 2>& contraction, const std::vector<Conv2d<float>>& layers,
         const ConvView<Element, 2>& result) {
  contraction.forward(layers, result);
}
