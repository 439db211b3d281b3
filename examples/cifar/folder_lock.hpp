// One program at a time in a folder of trainings.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "text.hpp"

#include <concertina/detail/io/files.hpp>
#include <concertina/error.hpp>

#include <fcntl.h>

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
    namespace files = concertina::io::detail;
    descriptor_ = files::Descriptor(::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    if (descriptor_ && files::lock(descriptor_.get())) return;
    if (descriptor_ && errno == EWOULDBLOCK) {
      throw concertina::IoError(folder.string() +
                                ": another process trains in it; wait until it has ended, or name "
                                "another folder");
    }
    std::cerr << tool::printable(folder.string()) << ": cannot be locked, "
              << tool::system_message() << "; see that nothing else trains in it\n";
  }

 private:
  concertina::io::detail::Descriptor descriptor_{-1};
};

}  // namespace cifar
