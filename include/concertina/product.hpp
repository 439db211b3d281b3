// The product of two layers' matrices, and the order in which a chain is multiplied.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/conv.hpp>
#include <concertina/form.hpp>

#include <Eigen/Core>

namespace concertina {

/// Multiply-adds of one product, as it is computed.
template <int Rank>
Index multiply_adds(const ConvShape<Rank>& outer, const ConvShape<Rank>& inner);

}  // namespace concertina

#include <concertina/detail/product/product.ipp>
