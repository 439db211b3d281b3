// One program at a time in a folder of trainings.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "text.hpp"

#include <concertina/error.hpp>

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <cerrno>
#include <filesystem>
#include <iostream>
#include <system_error>

namespace cifar {

/// A folder, made if need be, that nobody else locks while this lives. The system unlocks it when
/// the process ends, however it does, so nothing is left to remove. Where the file system has no
/// locks, standard error says so.
class FolderLock {
 public:
  /// Throws IoError where it cannot be made, or somebody holds it.
  explicit FolderLock(const std::filesystem::path& folder) {
    std::error_code error;
    std::filesystem::create_directories(folder, error);
    if (error) {
      throw concertina::IoError(folder.string() + ": cannot be made a folder, " + error.message());
    }
    descriptor_ = ::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (descriptor_ >= 0 && ::flock(descriptor_, LOCK_EX | LOCK_NB) == 0) return;
    const bool held = descriptor_ >= 0 && errno == EWOULDBLOCK;
    const std::string why = tool::system_message();
    if (held) {
      ::close(descriptor_);
      throw concertina::IoError(folder.string() +
                                ": another process trains in it; wait until it has ended, or name "
                                "another folder");
    }
    std::cerr << tool::printable(folder.string()) << ": cannot be locked, " << why
              << "; see that nothing else trains in it\n";
  }
  ~FolderLock() {
    if (descriptor_ >= 0) ::close(descriptor_);
  }
  FolderLock(const FolderLock&) = delete;
  FolderLock& operator=(const FolderLock&) = delete;

 private:
  int descriptor_ = -1;
};

}  // namespace cifar
