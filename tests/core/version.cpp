// The version's macros are those of the package.
// SPDX-License-Identifier: Apache-2.0
#include <concertina/version.hpp>

#include <catch2/catch.hpp>

#include <string>

TEST_CASE("the macros are the package's version", "[version]") {
  const std::string macros = std::to_string(CONCERTINA_VERSION_MAJOR) + '.' +
                             std::to_string(CONCERTINA_VERSION_MINOR) + '.' +
                             std::to_string(CONCERTINA_VERSION_PATCH);
  CHECK(macros == PACKAGE_VERSION);
  CHECK(CONCERTINA_VERSION == CONCERTINA_VERSION_MAJOR * 10000 + CONCERTINA_VERSION_MINOR * 100 +
                                  CONCERTINA_VERSION_PATCH);
}
