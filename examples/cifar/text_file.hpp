// Small text files: read whole, replaced when their successor is complete, and their numbers.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <charconv>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace cifar {

/// A whole file of at most `limit` bytes; `what` is what it is, for messages.
/// Throws  IoError naming the path where it is no regular file or cannot be read, SizeError where it
///         is larger
std::string read_text(const std::filesystem::path& path, std::uintmax_t limit,
                      const std::string& what);

/// Writes a file, in the place of one that may be there when all is written; a link is followed.
/// Throws  IoError naming the path where there is something other than a file, or it cannot be
///         written; what was there stays
void write_text(const std::filesystem::path& path, std::string_view text);

/// Whether there is something of that name. Throws IoError naming the path where the system does
/// not say.
bool is_there(const std::filesystem::path& path);

/// Throws IoError for a file that cannot be written.
[[noreturn]] void cannot_write(const std::string& path, const std::string& why);

/// The parts between separators, one more than there are separators.
std::vector<std::string_view> split(std::string_view text, char separator);

/// The fewest digits that read back as the same number.
template <class Number>
std::string shortest(Number number) {
  char text[32];
  return {text, std::to_chars(text, text + sizeof(text), number).ptr};
}

/// The number that a text is as a whole; nothing if it is none.
template <class Number>
std::optional<Number> number_in(std::string_view text) {
  Number number{};
  const char* const end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, number);
  if (stop != end || error != std::errc{}) return std::nullopt;
  return number;
}

}  // namespace cifar
