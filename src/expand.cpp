// SPDX-License-Identifier: Apache-2.0
#define CONCERTINA_COMPILING_EXPANSIONS
#include <concertina/expand.hpp>
