// SPDX-License-Identifier: Apache-2.0
#define CONCERTINA_COMPILING_PROOFS
#include <concertina/verify.hpp>
