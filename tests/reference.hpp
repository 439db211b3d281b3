// Results that other people's code computed: tests/reference/README.md.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <catch2/catch.hpp>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <string>
#include <vector>

namespace concertina::test {

/// The folder of the large reference data. Where there is none it is empty, and the test says that
/// it was skipped.
inline std::filesystem::path large_reference() {
  const char* const folder = std::getenv("CONCERTINA_REFERENCE");
  if (folder && *folder) return folder;
  WARN("skipped: CONCERTINA_REFERENCE is empty");
  return {};
}

/// The files of these folders, at least one in each; none where `reference` is empty.
inline std::vector<std::filesystem::path> reference_files(const std::filesystem::path& reference,
                                                          const std::vector<std::string>& folders) {
  std::vector<std::filesystem::path> files;
  if (reference.empty()) return files;
  for (const std::string& folder : folders) {
    const std::size_t before = files.size();
    for (const auto& entry : std::filesystem::directory_iterator(reference / folder)) {
      if (entry.path().extension() == ".safetensors") files.push_back(entry.path());
    }
    REQUIRE(files.size() > before);
  }
  std::ranges::sort(files);
  return files;
}

}  // namespace concertina::test
