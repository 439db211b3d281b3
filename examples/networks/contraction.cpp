// One translation unit for the products in double and long double, which take long to compile.
// SPDX-License-Identifier: Apache-2.0
#include "contraction.hpp"

#include "text.hpp"

#include <concertina/contract.hpp>

#include <algorithm>
#include <charconv>

namespace tool {

using concertina::Conv;
using concertina::ConvShape;
using concertina::PerAxis;

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

template <int Rank>
PerAxis<Rank> parse_input_size(const std::string& text) {
  std::vector<Index> values;
  const char *at = text.data(), *end = at + text.size();
  for (bool more = true; more;) {
    Index value = 0;
    const auto [stop, error] = std::from_chars(at, end, value);
    if (error != std::errc() || value < 1 || (stop != end && *stop != ',' && *stop != 'x')) {
      throw UsageError("--input-size: found " + in_quotes(text) +
                       ", expected positive integers as 32,32");
    }
    values.push_back(value);
    more = stop != end;
    at = stop + 1;
  }
  if (Rank == 0 || (values.size() != 1 && values.size() != static_cast<std::size_t>(Rank))) {
    throw UsageError("--input-size: found " + counted(std::ssize(values), "number") +
                     ", but the layers have " + std::to_string(Rank) +
                     (Rank == 1 ? " spatial axis" : " spatial axes") + " (channels are not named)");
  }
  PerAxis<Rank> size;
  for (int axis = 0; axis < Rank; ++axis) {
    size[axis] = values[values.size() == 1 ? 0 : static_cast<std::size_t>(axis)];
  }
  return size;
}

// clang-format off
#define TOOL_INSTANTIATE(RANK)                                                              \
  template Conv<float, RANK> contracted(const Expr<float, RANK>&);                          \
  template Conv<double, RANK> contracted(const Expr<double, RANK>&);                        \
  template void require_modest(const concertina::Form<RANK>&, const std::string&);          \
  template PerAxis<RANK> parse_input_size(const std::string&);
// clang-format on
TOOL_INSTANTIATE(0)
TOOL_INSTANTIATE(1)
TOOL_INSTANTIATE(2)
TOOL_INSTANTIATE(3)
#undef TOOL_INSTANTIATE

}  // namespace tool
