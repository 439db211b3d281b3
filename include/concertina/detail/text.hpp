// Error messages, put together and thrown in one place: a chain of string additions compiles to as
// much code as the algorithm that it complains about.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concepts>
#include <initializer_list>
#include <string>
#include <string_view>

namespace concertina::detail {

/// Anything that is text or has a to_string, for the length of a call of text() or fail().
class Piece {
 public:
  Piece(const char* text)
      : value_(text),
        append_([](std::string& to, const void* given) { to += static_cast<const char*>(given); }) {
  }
  template <class T>
  Piece(const T& value)
      : value_(&value), append_([](std::string& text, const void* given) {
          const T& piece = *static_cast<const T*>(given);
          if constexpr (std::convertible_to<const T&, std::string_view>) {
            text += std::string_view(piece);
          } else {
            using std::to_string;
            text += to_string(piece);
          }
        }) {}

  void append_to(std::string& text) const { append_(text, value_); }

 private:
  const void* value_;
  void (*append_)(std::string&, const void*);
};

/// text({"reads ", 3, " channels"}) is "reads 3 channels".
[[gnu::noinline, gnu::cold]] inline std::string text(std::initializer_list<Piece> pieces) {
  std::string result;
  for (const Piece& piece : pieces) piece.append_to(result);
  return result;
}

/// Throws an Error of that text.
template <class Error>
[[noreturn, gnu::noinline, gnu::cold]] void fail(std::initializer_list<Piece> pieces) {
  throw Error(text(pieces));
}

}  // namespace concertina::detail
