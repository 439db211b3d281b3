// What the algorithms of a product read and write.
// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace concertina::detail {

/// A layer's elements, wherever they lie: weight [out][in / groups][taps], bias [out] or null.
template <class Element>
struct LayerData {
  Element* weight = nullptr;
  Element* bias = nullptr;
};

/// P = W2 W1: the weights of a product's factors and of its result, or of one dense block of them.
template <class Scalar>
struct ForwardOperands {
  const Scalar *outer, *inner;
  Scalar* result;
};

/// With G = dL/dP and taps b of W2 and a of W1 that meet at b + a,
///   dL/dW2[o][m][b] = sum over c, a of G[o][c][b + a] W1[m][c][a]
///   dL/dW1[m][c][a] = sum over o, b of W2[o][m][b] G[o][c][b + a]
/// in each dense block. An element of either factor is in one block only, so each gradient is
/// written once. One that is null is not computed, as of a fixed layer.
template <class Scalar>
struct BackwardOperands {
  const Scalar *outer, *inner, *result_gradient;
  Scalar *outer_gradient, *inner_gradient;
};

}  // namespace concertina::detail
