// The errors.
// SPDX-License-Identifier: Apache-2.0
#include <concertina/error.hpp>

#include <catch2/catch.hpp>

#include <stdexcept>
#include <string>
#include <type_traits>

namespace concertina::test {

TEST_CASE("errors are one family", "[error]") {
  static_assert(std::is_base_of_v<std::runtime_error, Error>);
  const auto is_one = []<class E>(const E& error) {
    try {
      throw error;
    } catch (const Error& caught) {
      return std::string(caught.what()) == "text";
    }
  };
  CHECK(is_one(ShapeError("text")));
  CHECK(is_one(SizeError("text")));
  CHECK(is_one(InexactError("text")));
  CHECK(is_one(NotToeplitzError("text")));
  CHECK(is_one(ExpansionError("text")));
  CHECK(is_one(VerificationError("text")));
  CHECK(is_one(FormatError("text")));
  CHECK(is_one(IoError("text")));
}

}  // namespace concertina::test
