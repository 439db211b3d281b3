// SPDX-License-Identifier: Apache-2.0
#define CONCERTINA_COMPILING_EXPANSIONS_OF float
#define CONCERTINA_COMPILING_LAYOUTS
#include <concertina/expand.hpp>
