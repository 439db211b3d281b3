// Templates that concertina::compiled has compiled are only declared where it is linked.
// SPDX-License-Identifier: Apache-2.0
#pragma once

// X(Scalar, Rank) for each that is compiled.
#define CONCERTINA_FOR_EACH_RANK(X, Scalar) X(Scalar, 0) X(Scalar, 1) X(Scalar, 2) X(Scalar, 3)
#define CONCERTINA_FOR_EACH_LAYER(X) \
  CONCERTINA_FOR_EACH_RANK(X, float) CONCERTINA_FOR_EACH_RANK(X, double)
