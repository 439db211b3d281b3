// A matrix is no layer, and does not become one in a product.
// SPDX-License-Identifier: Apache-2.0
// expect: no match for .operator\*.|invalid operands to binary expression
#include <concertina/contract.hpp>

using concertina::Linear;

#ifdef CONCERTINA_CONTROL
using Outer = Linear<float>;
#else
using Outer = Eigen::MatrixXf;
#endif

auto product(const Outer& outer, const Linear<float>& inner) { return outer * inner; }
