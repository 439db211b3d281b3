// SPDX-License-Identifier: Apache-2.0
#define CONCERTINA_COMPILING_MOMENTS
#include <concertina/moments.hpp>
