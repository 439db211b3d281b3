// One translation unit for the products in double and long double, which take long to compile.
// SPDX-License-Identifier: Apache-2.0
#include "contraction.hpp"

#include <concertina/contract.hpp>

namespace tool {

using concertina::Conv;
using concertina::ConvShape;

template <class Scalar, int Rank>
Conv<Scalar, Rank> contracted(const Expr<Scalar, Rank>& expression) {
  return concertina::contract<Accumulator<Scalar>>(expression, concertina::interior_only);
}

template <int Rank>
void require_modest(const concertina::Form<Rank>& form, const std::string& file) {
  constexpr Index most_elements = Index{1} << 29;
  const ConvShape<Rank> product = form.shape();
  if (weight_numel(product) <= most_elements) return;
  throw concertina::SizeError(file + ": the layers contract to " + to_string(product) +
                              ", which has " + std::to_string(weight_numel(product)) +
                              " elements; more than " + std::to_string(most_elements) +
                              " are refused, check strides and dilations");
}

// clang-format off
#define TOOL_INSTANTIATE(RANK)                                                              \
  template Conv<float, RANK> contracted(const Expr<float, RANK>&);                          \
  template Conv<double, RANK> contracted(const Expr<double, RANK>&);                        \
  template void require_modest(const concertina::Form<RANK>&, const std::string&);
// clang-format on
TOOL_INSTANTIATE(0)
TOOL_INSTANTIATE(1)
TOOL_INSTANTIATE(2)
TOOL_INSTANTIATE(3)
#undef TOOL_INSTANTIATE

}  // namespace tool
