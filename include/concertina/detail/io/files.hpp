// Files opened with distrust, and written all or nothing.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/error.hpp>  // IoError

#include <cerrno>
#include <cstddef>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <system_error>
#include <tuple>
#include <utility>

namespace concertina::io::detail {

struct CloseFile {
  void operator()(std::FILE* file) const { std::fclose(file); }
};
using FileHandle = std::unique_ptr<std::FILE, CloseFile>;

inline std::string system_message() { return std::generic_category().message(errno); }

/// A regular file to read, and its size. Throws IoError saying why there is none.
inline std::pair<FileHandle, std::ptrdiff_t> open_file(const std::filesystem::path& path) {
  const auto fail = [&path](const std::string& why) {
    throw IoError("cannot read " + path.string() + ": " + why);
  };
  std::error_code error;
  const auto status = std::filesystem::status(path, error);
  if (!std::filesystem::exists(status)) fail(error.message());
  if (std::filesystem::is_directory(status)) fail("it is a folder; name a file in it");
  if (!std::filesystem::is_regular_file(status)) fail("it is not a regular file");
  const auto size = static_cast<std::ptrdiff_t>(std::filesystem::file_size(path, error));
  if (error) fail(error.message());
  FileHandle file(std::fopen(path.string().c_str(), "rb"));
  if (!file) fail(system_message());
  return {std::move(file), size};
}

/// Fills `to` with the bytes that come next; `path` is for messages.
inline void read_next(const std::filesystem::path& path, std::FILE* file, std::span<std::byte> to) {
  if (std::fread(to.data(), 1, to.size(), file) == to.size()) return;
  throw IoError("cannot read " + path.string() + ": " +
                (std::ferror(file) ? system_message() : "it became shorter while it was read"));
}

/// A file that appears at its path when it is complete, or never.
class AtomicFile {
 public:
  explicit AtomicFile(const std::filesystem::path& path)
      : shown_path_(path.string()), target_(path) {
    std::error_code error;
    const auto status = std::filesystem::status(path, error);
    if (std::filesystem::exists(status)) {
      if (!std::filesystem::is_regular_file(status)) {
        fail("there is something that is not a regular file");
      }
      target_ = std::filesystem::canonical(path, error);
      if (error) fail(error.message());
    }
    std::tie(file_, temporary_) = create_temporary();
  }

  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  ~AtomicFile() {
    if (complete_) return;
    file_.reset();
    std::error_code ignored;
    std::filesystem::remove(temporary_, ignored);
  }

  void write(std::span<const std::byte> bytes) {
    const std::size_t written = std::fwrite(bytes.data(), 1, bytes.size(), file_.get());
    if (written != bytes.size()) fail(system_message());
  }

  void commit() {
    close();
    rename(temporary_, target_);
    complete_ = true;
  }

  /// Both or neither: what is at the first path comes back if the second cannot be replaced.
  static void commit(AtomicFile& first, AtomicFile& second) {
    first.close();
    second.close();
    std::error_code error;
    std::filesystem::path before;
    bool moved = false;
    try {
      if (std::filesystem::exists(first.target_, error)) {
        before = first.create_temporary().second;
        first.rename(first.target_, before);
        moved = true;
      }
      first.commit();
      second.commit();
    } catch (...) {
      if (first.complete_) std::filesystem::remove(first.target_, error);
      if (moved) std::filesystem::rename(before, first.target_, error);
      if (!moved) std::filesystem::remove(before, error);
      throw;
    }
    std::filesystem::remove(before, error);
  }

 private:
  /// A new file in the target's folder.
  std::pair<FileHandle, std::filesystem::path> create_temporary() const {
    for (int number = 0;; ++number) {
      auto path = target_.parent_path() / (".concertina-" + std::to_string(number) + ".tmp");
      // x: never opens a file that exists, nor follows a link that somebody put there.
      FileHandle file(std::fopen(path.string().c_str(), "wbx"));
      if (file) return {std::move(file), std::move(path)};
      if (errno != EEXIST || number == 1000) {
        fail("cannot create " + path.string() + ", " + system_message());
      }
    }
  }

  void close() {
    if (!file_) return;
    if (std::fflush(file_.get()) != 0 || std::fclose(file_.release()) != 0) fail(system_message());
  }

  void rename(const std::filesystem::path& from, const std::filesystem::path& to) const {
    std::error_code error;
    std::filesystem::rename(from, to, error);
    if (error) fail(error.message());
  }

  [[noreturn]] void fail(const std::string& why) const {
    throw IoError("cannot write " + shown_path_ + ": " + why);
  }

  std::string shown_path_;
  std::filesystem::path target_, temporary_;
  FileHandle file_;
  bool complete_ = false;
};

}  // namespace concertina::io::detail
