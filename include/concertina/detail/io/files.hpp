// Files opened with distrust, and written all or nothing.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/error.hpp>  // IoError

#ifdef __linux__
#include <fcntl.h>   // O_TMPFILE
#include <unistd.h>  // linkat
#endif

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
  void operator()(std::FILE* file) const { static_cast<void>(std::fclose(file)); }
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
    // Links are followed, also one that leads to nothing yet.
    std::error_code error;
    for (int links = 0;
         std::filesystem::is_symlink(std::filesystem::symlink_status(target_, error)); ++links) {
      if (links == 40) fail("too many links lead on from it");  // as many as Linux follows
      target_ = target_.parent_path() / std::filesystem::read_symlink(target_, error);
      if (error) fail(error.message());
    }
    const auto status = std::filesystem::status(target_, error);
    if (std::filesystem::exists(status) && !std::filesystem::is_regular_file(status)) {
      fail("there is something that is not a regular file");
    }
    file_ = create_unnamed();
    if (!file_) std::tie(file_, temporary_) = create_temporary();
  }

  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  ~AtomicFile() {
    if (complete_) return;
    file_.reset();
    if (temporary_.empty()) return;
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
  /// The first name in the target's folder that `make` finds free.
  template <class Make>
  std::filesystem::path temporary_name(const Make& make) const {
    for (int number = 0;; ++number) {
      auto path = target_.parent_path() / (".concertina-" + std::to_string(number) + ".tmp");
      if (make(path.string().c_str())) return path;
      if (errno != EEXIST || number == 1000) {
        fail("cannot create " + path.string() + ", " + system_message());
      }
    }
  }

  /// A new file in the target's folder.
  std::pair<FileHandle, std::filesystem::path> create_temporary() const {
    FileHandle file;
    auto path = temporary_name([&](const char* name) {
      // x: never opens a file that exists, nor follows a link that somebody put there.
      file.reset(std::fopen(name, "wbx"));
      return file != nullptr;
    });
    return {std::move(file), std::move(path)};
  }

  /// The same without a name, of which nothing is left if the program is killed; null where the
  /// system has none.
  FileHandle create_unnamed() const {
#ifdef O_TMPFILE
    const auto folder = target_.has_parent_path() ? target_.parent_path() : ".";
    const int descriptor = ::open(folder.c_str(), O_TMPFILE | O_WRONLY | O_CLOEXEC, 0666);
    if (descriptor < 0) return nullptr;
    FileHandle file(::fdopen(descriptor, "wb"));
    if (!file || ::access(link_of(file.get()).c_str(), F_OK) != 0) {
      if (!file) ::close(descriptor);
      return nullptr;
    }
    return file;
#else
    return nullptr;
#endif
  }

#ifdef O_TMPFILE
  static std::string link_of(std::FILE* file) {
    return "/proc/self/fd/" + std::to_string(::fileno(file));
  }
#endif

  void close() {
    if (!file_) return;
    if (std::fflush(file_.get()) != 0) fail(system_message());
#ifdef O_TMPFILE
    if (temporary_.empty()) {
      const std::string link = link_of(file_.get());
      temporary_ = temporary_name([&](const char* name) {
        return ::linkat(AT_FDCWD, link.c_str(), AT_FDCWD, name, AT_SYMLINK_FOLLOW) == 0;
      });
    }
#endif
    if (std::fclose(file_.release()) != 0) fail(system_message());
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
