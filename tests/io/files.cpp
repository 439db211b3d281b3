// Files written where the system has none without a name: what killed writers leave is removed.
// SPDX-License-Identifier: Apache-2.0
#include <fcntl.h>
#undef O_TMPFILE
#include "files.hpp"

#include <concertina/detail/io/files.hpp>

#include <catch2/catch.hpp>

#include <sys/wait.h>

namespace concertina::io::detail {
namespace {

namespace fs = std::filesystem;
using test::bytes_of, test::contents, test::Folder, test::put;

/// A process that is killed while it writes two files, the first of which it may have complete.
void kill_writer(const Folder& folder) {
  const pid_t child = ::fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    AtomicFile first(folder / "a"), second(folder / "b");
    first.write(bytes_of("half"));
    ::raise(SIGKILL);
  }
  int status = 0;
  REQUIRE(::waitpid(child, &status, 0) == child);
  REQUIRE(WIFSIGNALED(status));
}

TEST_CASE("what a killed writer left, the next one removes", "[files]") {
  const Folder folder;
  put(folder / "a", "before");
  kill_writer(folder);
  CHECK(contents(folder / "a") == "before");
  REQUIRE(folder.count() == 3);
  AtomicFile file(folder / "a");
  CHECK(folder.count() == 2);  // what is there, and its own
  file.write(bytes_of("after"));
  file.commit();
  CHECK(contents(folder / "a") == "after");
  CHECK(folder.count() == 1);
}

TEST_CASE("what a living writer needs, nobody removes", "[files]") {
  const Folder folder;
  AtomicFile first(folder / "a");
  first.write(bytes_of("1"));
  {
    AtomicFile second(folder / "b");
    second.write(bytes_of("2"));
    second.commit();
  }
  CHECK(folder.count() == 2);
  first.commit();
  CHECK(contents(folder / "a") == "1");
  CHECK(contents(folder / "b") == "2");
}

TEST_CASE("what is no temporary file of this user stays", "[files]") {
  const Folder folder;
  put(folder / "precious", "precious");
  fs::create_symlink("precious", folder / ".concertina-0.tmp");
  fs::create_directory(folder / ".concertina-1.tmp");
  REQUIRE(::mkfifo((folder / ".concertina-2.tmp").c_str(), 0600) == 0);
  int more = 0;
  if (::geteuid() == 0) {
    put(folder / ".concertina-3.tmp", "another user's");
    REQUIRE(::chown((folder / ".concertina-3.tmp").c_str(), 1, 1) == 0);
    more = 1;
  }
  AtomicFile file(folder / "a");
  file.write(bytes_of("new"));
  file.commit();
  CHECK(contents(folder / "a") == "new");
  CHECK(contents(folder / "precious") == "precious");
  CHECK(folder.count() == 5 + more);
}

/// Writes a file that names data, as "name: text".
void write(const Folder& folder, const std::string& text) {
  AtomicFile data(folder / "data"), file(folder / "file");
  data.write(bytes_of(text));
  file.write(bytes_of("data: " + text));
  AtomicFile::commit(data, file, [&](AtomicFile& between, const std::string& name) {
    CHECK(contents(folder / name) == text);
    between.write(bytes_of(name + ": " + text));
  });
}

TEST_CASE("a file and its data are replaced together", "[files]") {
  const Folder folder;
  const bool linked = GENERATE(false, true);
  for (const auto* text : {"1", "2"}) {
    write(folder, text);
    CHECK(contents(folder / "file") == std::string("data: ") + text);
    CHECK(contents(folder / "data") == text);
    CHECK(folder.count() == 2);
    // Killed while both were replaced.
    if (linked) fs::create_hard_link(folder / "file", folder / ".concertina-0.tmp");
    if (linked) fs::create_hard_link(folder / "data", folder / ".concertina-data-0.tmp");
  }
}

TEST_CASE("a file and its data are replaced, or neither is", "[files]") {
  const Folder folder;
  const bool file_was = GENERATE(false, true), data_was = GENERATE(false, true);
  if (file_was) put(folder / "file", "file");
  if (data_was) put(folder / "data", "data");
  const auto blocked = GENERATE(as<std::string>(), "file", "data");
  {
    AtomicFile data(folder / "data"), file(folder / "file");
    data.write(bytes_of("new"));
    file.write(bytes_of("new"));
    fs::remove(folder / blocked);
    fs::create_directory(folder / blocked);
    const auto commit = [&] {
      AtomicFile::commit(data, file, [](AtomicFile& between, const std::string& name) {
        between.write(bytes_of(name));
      });
    };
    CHECK_THAT(test::refusal<IoError>(commit),
               Catch::StartsWith("cannot write " + (folder / blocked).string()));
  }
  CHECK(fs::is_directory(folder / blocked));
  const std::string other = blocked == "file" ? "data" : "file";
  const bool was = other == "file" ? file_was : data_was;
  CHECK(fs::exists(folder / other) == was);
  CHECK(contents(folder / other) == (was ? other : ""));
  CHECK(folder.count() == 1 + was);
}

}  // namespace
}  // namespace concertina::io::detail
