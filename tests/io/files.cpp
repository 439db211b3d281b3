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

TEST_CASE("a file that is linked twice keeps its other name", "[files]") {
  const Folder folder;
  put(folder / "a", "old");
  fs::create_hard_link(folder / "a", folder / ".concertina-0.tmp");  // killed between two files
  AtomicFile first(folder / "a"), second(folder / "b");
  CHECK(contents(folder / "a") == "old");
  first.write(bytes_of("1"));
  second.write(bytes_of("2"));
  AtomicFile::commit(first, second);
  CHECK(contents(folder / "a") == "1");
  CHECK(folder.count() == 2);
}

}  // namespace
}  // namespace concertina::io::detail
