// Files opened with distrust, and written all or nothing.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/error.hpp>  // IoError

#if defined(__unix__) || defined(__APPLE__)
#include <fcntl.h>     // O_TMPFILE
#include <sys/file.h>  // flock
#include <sys/stat.h>
#include <unistd.h>  // linkat
#define CONCERTINA_LOCKS_FILES
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

#ifdef CONCERTINA_LOCKS_FILES

/// A file descriptor, closed with its owner.
class Descriptor {
 public:
  explicit Descriptor(int descriptor) : descriptor_(descriptor) {}
  Descriptor(Descriptor&& other) noexcept : descriptor_(std::exchange(other.descriptor_, -1)) {}
  Descriptor& operator=(Descriptor&& other) noexcept {
    std::swap(descriptor_, other.descriptor_);
    return *this;
  }
  ~Descriptor() {
    if (descriptor_ >= 0) ::close(descriptor_);
  }
  explicit operator bool() const { return descriptor_ >= 0; }
  int get() const { return descriptor_; }

 private:
  int descriptor_;
};

/// Locks an open file until all copies of its descriptor are closed; false where somebody else has.
inline bool lock(int descriptor) { return ::flock(descriptor, LOCK_EX | LOCK_NB) == 0; }

/// Whether a path leads to the open file, and it is a regular one of this user.
inline bool is_at(const std::filesystem::path& path, int descriptor) {
  struct stat here, open;
  return ::lstat(path.c_str(), &here) == 0 && ::fstat(descriptor, &open) == 0 &&
         here.st_ino == open.st_ino && here.st_dev == open.st_dev && S_ISREG(open.st_mode) &&
         open.st_uid == ::geteuid();
}

/// Removes what a killed writer left: writers lock their temporary files while they need them.
inline void remove_abandoned(const std::filesystem::path& path) {
  const Descriptor file(::open(path.c_str(), O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC));
  if (file && lock(file.get()) && is_at(path, file.get())) ::unlink(path.c_str());
}

#endif

/// A file that appears at its path when it is complete, or never. What killed writers left in its
/// folder is removed.
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
#ifdef CONCERTINA_LOCKS_FILES
    for (int number = 0; number < most_abandoned; ++number) {
      remove_abandoned(temporary_path(target_, number));
    }
#endif
    file_ = create_unnamed();
    if (!file_) std::tie(file_, temporary_) = create_temporary();
#ifdef CONCERTINA_LOCKS_FILES
    lock_ = Descriptor(::fcntl(::fileno(file_.get()), F_DUPFD_CLOEXEC, 0));
#endif
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

  /// Both or neither, of data and of a file that says by which name they are found. Data that are
  /// there cannot be replaced at once with the file: `write(between, name)` is to write the file
  /// with another name, by which the new data are found until they have their own. So what is there
  /// belongs together whenever the program is killed.
  template <class Write>
  static void commit(AtomicFile& data, AtomicFile& file, const Write& write) {
    data.close();
    file.close();
    std::error_code error;
    if (!std::filesystem::exists(data.target_, error)) {
      data.commit();
      try {
        file.commit();
      } catch (...) {
        std::filesystem::remove(data.target_, error);
        throw;
      }
      return;
    }
    const std::filesystem::path shown(data.shown_path_);
    const std::string tag = shown.filename().string() + "-";
    const auto name = data.link(data.temporary_, shown, tag);
    std::filesystem::path before;
#ifdef CONCERTINA_LOCKS_FILES
    const Descriptor kept(::open(file.target_.c_str(), O_RDONLY | O_NOFOLLOW | O_CLOEXEC));
    if (kept) lock(kept.get());  // so that nobody takes `before` for abandoned
#endif
    try {
      AtomicFile between(file.target_);
      write(between, name.filename().string());
      between.close();
      if (std::filesystem::exists(file.target_, error)) {
        before = file.link(file.target_, file.target_);
      }
      between.commit();
      try {
        data.commit();
      } catch (...) {
        if (before.empty()) std::filesystem::remove(file.target_, error);
        throw;
      }
    } catch (...) {
      if (!before.empty()) std::filesystem::rename(before, file.target_, error);
      std::filesystem::remove(before, error);  // renamed to another name of its own, it stays
      std::filesystem::remove(name, error);
      throw;
    }
    std::filesystem::remove(before, error);
    file.commit();
    // Nothing reads another name any more, nor those that killed writers left.
    for (int number = 0; number < most_abandoned; ++number) {
      std::filesystem::remove(temporary_path(shown, number, tag), error);
    }
  }

 private:
  /// How many names that killed writers may have left are looked for.
  static constexpr int most_abandoned = 16;

  /// The first name for a temporary file beside `place` that `make` finds free.
  template <class Make>
  std::filesystem::path temporary_name(const std::filesystem::path& place, const Make& make,
                                       const std::string& tag = "") const {
    for (int number = 0;; ++number) {
      auto path = temporary_path(place, number, tag);
      if (make(path.string().c_str())) return path;
      if (errno != EEXIST || number == 1000) {
        fail("cannot create " + path.string() + ", " + system_message());
      }
    }
  }

  /// A temporary name beside `place` for a complete file.
  std::filesystem::path link(const std::filesystem::path& file, const std::filesystem::path& place,
                             const std::string& tag = "") const {
    const auto make = [&](const char* name) {
      std::error_code error;
      std::filesystem::create_hard_link(file, name, error);
      if (error && error != std::errc::file_exists) {
        std::filesystem::copy_file(file, name, error);  // where there are no links
      }
      errno = error.default_error_condition().value();
      return !error;
    };
    return temporary_name(place, make, tag);
  }

  static std::filesystem::path temporary_path(const std::filesystem::path& place, int number,
                                              const std::string& tag = "") {
    return place.parent_path() / (".concertina-" + tag + std::to_string(number) + ".tmp");
  }

  /// A new file in the target's folder.
  std::pair<FileHandle, std::filesystem::path> create_temporary() const {
    FileHandle file;
    auto path = temporary_name(target_, [&](const char* name) {
      // x: never opens a file that exists, nor follows a link that somebody put there.
      file.reset(std::fopen(name, "wbx"));
#ifdef CONCERTINA_LOCKS_FILES
      // Before it is locked, somebody may take it for abandoned.
      if (file && (!lock(::fileno(file.get())) ? errno == EWOULDBLOCK
                                               : !is_at(name, ::fileno(file.get())))) {
        file.reset();
        errno = EEXIST;
      }
#endif
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
    lock(descriptor);  // before it gets a name
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
      temporary_ = temporary_name(target_, [&](const char* name) {
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
#ifdef CONCERTINA_LOCKS_FILES
  Descriptor lock_{-1};  // of the same file, until it has its final name
#endif
  bool complete_ = false;
};

}  // namespace concertina::io::detail
