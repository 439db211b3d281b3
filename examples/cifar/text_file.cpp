// SPDX-License-Identifier: Apache-2.0
#include "text_file.hpp"

#include <concertina/detail/io/files.hpp>
#include <concertina/error.hpp>

#include <cstddef>
#include <span>
#include <system_error>

namespace cifar {

namespace fs = std::filesystem;
namespace files = concertina::io::detail;

void cannot_write(const std::string& path, const std::string& why) {
  throw concertina::IoError("cannot write " + path + ": " + why);
}

bool is_there(const fs::path& path) {
  std::error_code error;
  const fs::file_type type = fs::status(path, error).type();
  if (type == fs::file_type::none)
    throw concertina::IoError(path.string() + ": " + error.message());
  return type != fs::file_type::not_found;
}

std::vector<std::string_view> split(std::string_view text, char separator) {
  std::vector<std::string_view> parts;
  for (std::size_t at; (at = text.find(separator)) != text.npos; text.remove_prefix(at + 1)) {
    parts.push_back(text.substr(0, at));
  }
  parts.push_back(text);
  return parts;
}

std::string read_text(const fs::path& path, std::uintmax_t limit, const std::string& what) {
  const auto [file, size] = files::open_file(path);
  if (static_cast<std::uintmax_t>(size) > limit) {
    throw concertina::SizeError(path.string() + ": " + std::to_string(size) +
                                " bytes, more than the " + std::to_string(limit) + " that " + what +
                                " may have");
  }
  std::string text(static_cast<std::size_t>(size), '\0');
  files::read_next(path, file.get(), std::as_writable_bytes(std::span(text)));
  return text;
}

void write_text(const fs::path& path, std::string_view text) {
  files::AtomicFile file(path);
  file.write(std::as_bytes(std::span(text)));
  file.commit();
}

}  // namespace cifar
