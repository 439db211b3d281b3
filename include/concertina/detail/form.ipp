// What forms cost; how they are made stands in expression.ipp.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/detail/program.hpp>
#include <concertina/form.hpp>

#include <optional>

namespace concertina {

template <int Rank>
Index Form<Rank>::multiply_adds(const std::optional<PerAxis<Rank>>& input_size) const {
  static_cast<void>(shape(input_size));  // throws where parts do not fit
  return detail::Program(tree_).multiply_adds();
}

template <int Rank>
Index Form<Rank>::backward_multiply_adds(const std::optional<PerAxis<Rank>>& input_size) const {
  static_cast<void>(shape(input_size));  // throws where parts do not fit
  return detail::Program(tree_).backward_multiply_adds();
}

template <int Rank>
bool Form<Rank>::cheaper_contracted(Index batch, const PerAxis<Rank>& input_size) const {
  if (batch < 1) detail::fail<ShapeError>({"a batch of ", batch, " maps"});
  const Index layered = applied_multiply_adds(input_size),
              compact = Form(shape(input_size)).applied_multiply_adds(input_size);
  const double saved = static_cast<double>(layered) - static_cast<double>(compact);
  return static_cast<double>(multiply_adds(input_size)) < static_cast<double>(batch) * saved;
}

}  // namespace concertina
