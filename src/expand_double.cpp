// SPDX-License-Identifier: Apache-2.0
#define CONCERTINA_COMPILING_EXPANSIONS_OF double
#include <concertina/expand.hpp>
