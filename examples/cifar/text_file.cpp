// SPDX-License-Identifier: Apache-2.0
#include "text_file.hpp"

#include "text.hpp"

#include <concertina/error.hpp>

#include <cstddef>
#include <cstdio>
#include <system_error>

namespace cifar {

namespace fs = std::filesystem;

void cannot_write(const std::string& path, const std::string& why) {
  throw concertina::IoError("cannot write " + path + ": " + why);
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
  const auto fail = [&path](const std::string& why) {
    throw concertina::IoError("cannot read " + path.string() + ": " + why);
  };
  std::error_code error;
  const fs::file_status status = fs::status(path, error);
  if (!fs::exists(status)) fail(error ? error.message() : "there is no such file");
  if (fs::is_directory(status)) fail("it is a folder; name a file in it");
  if (!fs::is_regular_file(status)) fail("it is not a regular file");
  const std::uintmax_t size = fs::file_size(path, error);
  if (error) fail(error.message());
  if (size > limit) {
    throw concertina::SizeError(path.string() + ": " + std::to_string(size) +
                                " bytes, more than the " + std::to_string(limit) + " that " + what +
                                " may have");
  }
  std::FILE* const file = std::fopen(path.string().c_str(), "rb");
  if (!file) fail(tool::system_message());
  std::string text(static_cast<std::size_t>(size), '\0');
  text.resize(std::fread(text.data(), 1, text.size(), file));
  const bool failed = std::ferror(file) != 0;
  const std::string message = tool::system_message();
  std::fclose(file);
  if (failed) fail(message);
  return text;
}

void write_text(const fs::path& path, std::string_view text) {
  std::error_code error;
  fs::path target = path;
  const fs::file_status status = fs::status(path, error);
  if (fs::exists(status)) {
    if (!fs::is_regular_file(status)) {
      cannot_write(path.string(), "there is something that is not a regular file");
    }
    target = fs::canonical(path, error);
    if (error) cannot_write(path.string(), error.message());
  }
  fs::path temporary = target;
  temporary += ".tmp";
  std::FILE* const file = std::fopen(temporary.string().c_str(), "wb");
  if (!file) {
    cannot_write(path.string(),
                 "cannot create " + temporary.string() + ", " + tool::system_message());
  }
  bool written = std::fwrite(text.data(), 1, text.size(), file) == text.size();
  std::string message = tool::system_message();
  if (std::fclose(file) != 0 && written) {
    written = false;
    message = tool::system_message();
  }
  if (written) {
    fs::rename(temporary, target, error);
    if (!error) return;
    message = error.message();
  }
  fs::remove(temporary, error);
  cannot_write(path.string(), message);
}

}  // namespace cifar
