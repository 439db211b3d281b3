// The contraction as the tool computes it: accumulated in the next wider scalar, judged at the
// border.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "linear_map.hpp"

#include <concertina/contract.hpp>

#include <string>
#include <type_traits>

namespace tool {

/// What layers of this scalar is accumulated in, so that its result is right to its last bit or
/// nearly so.
template <class Scalar>
using Accumulator = std::conditional_t<std::is_same_v<Scalar, float>, double, long double>;

/// The contraction, right everywhere or in the interior. Defined for float and double, ranks 0
/// to 3.
template <class Scalar, int Rank>
concertina::Conv<Scalar, Rank> contracted(const Expr<Scalar, Rank>& expression);

/// Throws SizeError, naming the file, where the contraction would take more than 4 GiB: metadata
/// can ask for anything.
template <int Rank>
void require_modest(const concertina::Form<Rank>& form, const std::string& file);

}  // namespace tool
