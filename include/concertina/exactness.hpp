// Where a contraction equals its expression: everywhere, or everywhere but a border of known width;
// and what a caller accepts there.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/expression.hpp>

#include <concepts>
#include <optional>
#include <string>
#include <type_traits>

namespace concertina {

/// Outputs at which a contraction may differ from its expression: those fewer than `start`
/// positions from the start of an axis or fewer than `end` from its end. Elsewhere the two agree
/// before rounding, for all weights. The widths are attained: for generic weights some output at
/// that depth does differ. (Behind a concatenation, whose channels are not told apart, they may be
/// wider than that.)
template <int Rank>
struct Exactness {
  PerAxis<Rank> start = 0;
  PerAxis<Rank> end = 0;
  std::string reason;  ///< which layer pads what, and why that matters; empty where exact

  /// True where the contraction equals the expression everywhere.
  bool exact() const noexcept { return start == PerAxis<Rank>(0) && end == PerAxis<Rank>(0); }
  explicit operator bool() const noexcept { return exact(); }
};

/// Where the contraction of an expression equals it, judged from its form alone: the widest border
/// over all input sizes; or that at one input size, which may be narrower: 3x3 p1 and then 3x3
/// stride 2 p1 have none at the end for even sizes and one for odd ones.
/// Throws  ShapeError for channels or branches that do not fit, naming both, and where a map
///         becomes smaller than the next kernel
template <FormSource E>
Exactness<detail::form_rank<E>> exactness(
    const E& expression,
    const std::type_identity_t<std::optional<PerAxis<detail::form_rank<E>>>>& input_size = {});

/// What a caller accepts at the border; by default equality at every input size.
template <int Rank>
struct Border {
  /// Contract although the result differs at the border that `exactness` states.
  bool interior_only = false;
  /// Contract where the result equals the expression at this input size, even if it does not at
  /// all.
  std::optional<PerAxis<Rank>> input_size = std::nullopt;

  /// Throws InexactError, with the border's widths and what to do, unless the form satisfies this.
  void require(const Form<Rank>& form) const;
};

namespace detail {

struct InteriorOnly {
  template <int Rank>
  constexpr operator Border<Rank>() const {
    return {.interior_only = true};
  }
};

}  // namespace detail

/// A border of any rank for which equality in the interior is enough.
inline constexpr detail::InteriorOnly interior_only{};

/// exact_at(224, 224): one extent per spatial axis.
template <std::integral... Extents>
Border<static_cast<int>(sizeof...(Extents))> exact_at(Extents... extents) {
  return {.input_size =
              PerAxis<static_cast<int>(sizeof...(Extents))>{static_cast<Index>(extents)...}};
}

}  // namespace concertina

#include <concertina/detail/exactness.ipp>
