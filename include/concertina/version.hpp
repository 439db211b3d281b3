// The version of the library; CMakeLists.txt reads it from here.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#define CONCERTINA_VERSION_MAJOR 0
#define CONCERTINA_VERSION_MINOR 2
#define CONCERTINA_VERSION_PATCH 0

/// One number to compare with: 1.2.3 is 10203.
#define CONCERTINA_VERSION \
  (CONCERTINA_VERSION_MAJOR * 10000 + CONCERTINA_VERSION_MINOR * 100 + CONCERTINA_VERSION_PATCH)
