// SPDX-License-Identifier: Apache-2.0
#define CONCERTINA_COMPILING_CONTRACT
#include <concertina/contract.hpp>
