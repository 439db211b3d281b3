// What a training reports: numbers that read back, rows that a resumed training drops, refusals
// that name the line, and a line for people.
// SPDX-License-Identifier: Apache-2.0
#include "cifar/log.hpp"  // first: the header must stand alone

#include "support.hpp"

#include <concertina/error.hpp>

#include <sys/resource.h>  // RLIMIT_FSIZE: a disk that is full on demand
#include <sys/stat.h>
#include <unistd.h>

#include <bit>
#include <cmath>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <limits>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

using namespace cifar;
using Catch::Matchers::Contains;
using concertina::test::message_of;
namespace fs = std::filesystem;

namespace {

const std::string header =
    "epoch,learning_rate,train_loss,train_accuracy,test_loss,test_accuracy,best_test_accuracy,"
    "images_per_second,seconds,min_gradient_similarity\n";
const std::string row_1 = "1,0.1,1.5,0.45,1.25,0.55,0.55,2000,25,\n";
const std::string row_2 = "2,0.05,1.25,0.55,1.5,0.5,0.55,2000.5,24.75,-0.5\n";
const std::string row_3 = "3,0.01,1,0.65,1,0.6,0.6,1e+100,1e-07,1\n";

std::vector<EpochRecord> records() {
  return {{1, 0.1, 1.5, 0.45, 1.25, 0.55, 2000, 25},
          {2, 0.05, 1.25, 0.55, 1.5, 0.5, 2000.5, 24.75, -0.5},
          {3, 0.01, 1, 0.65, 1, 0.6, 1e100, 1e-7, 1.0}};
}

/// A folder that lives as long as the test.
class Folder {
 public:
  Folder() : path_(fs::temp_directory_path() / ("cifar-log-" + std::to_string(::getpid()))) {
    fs::remove_all(path_);
    fs::create_directory(path_);
  }
  ~Folder() { fs::remove_all(path_); }
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;

  fs::path operator/(const std::string& name) const { return path_ / name; }
  auto count() const {
    return std::distance(fs::directory_iterator(path_), fs::directory_iterator());
  }

 private:
  fs::path path_;
};

std::string contents(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

void put(const fs::path& path, std::string_view text) {
  std::ofstream(path, std::ios::binary) << text;
}

template <class Error = concertina::FormatError>
std::string read_refusal(const fs::path& path) {
  return message_of<Error>([&] { CsvLog::read(path); });
}

}  // namespace

TEST_CASE("an epoch is a row, in the file at once", "[cifar]") {
  const Folder folder;
  const fs::path path = folder / "log.csv";
  put(path, "an older log\n");
  CsvLog log(path, {"cifar --seed 1", "seed 1"});
  CHECK(contents(path) == "# cifar --seed 1\n# seed 1\n" + header);
  CHECK(log.best_test_accuracy() == 0);
  log.add(records()[0]);
  CHECK(contents(path) == "# cifar --seed 1\n# seed 1\n" + header + row_1);
  log.add(records()[1]);
  CHECK(log.best_test_accuracy() == 0.55);
  log.add(records()[2]);
  CHECK(log.best_test_accuracy() == 0.6);
  CHECK(contents(path) == "# cifar --seed 1\n# seed 1\n" + header + row_1 + row_2 + row_3);
  CHECK(CsvLog::read(path) == records());
  CHECK(folder.count() == 1);
}

TEST_CASE("numbers read back bit by bit", "[cifar]") {
  const Folder folder;
  const fs::path path = folder / "log.csv";
  concertina::test::Rng rng(1);
  std::vector<double> numbers = {0.0,
                                 -0.0,
                                 1.0 / 3,
                                 0.1,
                                 std::numeric_limits<double>::denorm_min(),
                                 std::numeric_limits<double>::max()};
  while (numbers.size() < 5 * 200 + 1) {
    const double number = std::abs(std::bit_cast<double>(rng()));
    if (std::isfinite(number)) numbers.push_back(number);
  }
  std::vector<EpochRecord> written;
  CsvLog log(path, {});
  for (std::size_t n = 0; n + 5 < numbers.size(); n += 5) {
    const double train_accuracy = static_cast<double>(rng() >> 11) * 0x1p-53,
                 test_accuracy = static_cast<double>(rng() >> 11) * 0x1p-53;
    written.push_back({static_cast<Index>(n + 1), numbers[n], numbers[n + 1], train_accuracy,
                       numbers[n + 2], test_accuracy, numbers[n + 3], numbers[n + 4]});
    log.add(written.back());
  }
  const std::vector<EpochRecord> read = CsvLog::read(path);
  CHECK(read == written);
  CHECK(std::signbit(read[0].train_loss));  // -0.0 == 0.0
}

TEST_CASE("epochs cannot go back", "[cifar]") {
  const Folder folder;
  CsvLog log(folder / "log.csv", {});
  log.add({.epoch = 4});
  CHECK(message_of<concertina::Error>([&] { log.add({.epoch = 4}); }) ==
        (folder / "log.csv").string() + ": epoch 4 cannot follow epoch 4");
  CHECK(CsvLog::read(folder / "log.csv").size() == 1);
}

TEST_CASE("a resumed training drops the rows after its checkpoint", "[cifar]") {
  const Folder folder;
  const fs::path path = folder / "log.csv";
  const std::string all = "# cifar --seed 1\n#\n#tight\n" + header + row_1 + row_2 + row_3;
  const std::string head = "# cifar --seed 1\n# \n# tight\n";
  SECTION("some") {
    put(path, all);
    CsvLog log = CsvLog::resume(path, {"cifar --seed 1", "resumed after 2 epochs"}, 2);
    CHECK(contents(path) == head + "# resumed after 2 epochs\n" + header + row_1 + row_2);
    CHECK(log.best_test_accuracy() == 0.55);
    log.add(records()[2]);
    CHECK(CsvLog::read(path) == records());
    CHECK(folder.count() == 1);
  }
  SECTION("none") {
    put(path, all);
    CsvLog log = CsvLog::resume(path, {}, 3);
    CHECK(contents(path) == head + header + row_1 + row_2 + row_3);
    CHECK_THROWS_AS(log.add({.epoch = 3}), concertina::Error);
  }
  SECTION("all") {
    put(path, all);
    CsvLog log = CsvLog::resume(path, {}, 0);
    CHECK(contents(path) == head + header);
    CHECK(log.best_test_accuracy() == 0);
  }
  SECTION("a last line that was cut short, even where it would be a row") {
    put(path, all + "4,0.01,1,0.65,1,0.6,0.6,1,2");
    CsvLog::resume(path, {}, 9);
    CHECK(contents(path) == head + header + row_1 + row_2 + row_3);
  }
  SECTION("there is no file") {
    CsvLog::resume(path, {"new"}, 2).add(records()[2]);
    CHECK(contents(path) == "# new\n" + header + row_3);
  }
  SECTION("a link is followed") {
    put(folder / "real.csv", all);
    fs::create_symlink("real.csv", path);
    CsvLog::resume(path, {}, 1);
    CHECK(fs::is_symlink(path));
    CHECK(contents(folder / "real.csv") == head + header + row_1);
  }
  SECTION("a damaged file stays as it is") {
    put(path, all + "4,x,1,0.65,1,0.6,0.6,1,2\n");
    CHECK_THAT(message_of<concertina::FormatError>([&] { CsvLog::resume(path, {}, 2); }),
               Contains("line 8"));
    CHECK(contents(path) == all + "4,x,1,0.65,1,0.6,0.6,1,2\n");
  }
}

TEST_CASE("a comment stays on its line", "[cifar]") {
  const Folder folder;
  const fs::path path = folder / "log.csv";
  CsvLog(path, {"cifar --name 'a\nb\r\tc'"}).add(records()[0]);
  CHECK(contents(path) == "# cifar --name 'a b  c'\n" + header + row_1);
  CsvLog::resume(path, {"cifar --name 'a\nb\r\tc'"}, 1);
  CHECK(contents(path) == "# cifar --name 'a b  c'\n" + header + row_1);
}

TEST_CASE("a file that is no log is refused with the line", "[cifar]") {
  const Folder folder;
  const fs::path path = folder / "log.csv";
  const std::string columns = header.substr(0, header.size() - 1);
  const auto refusal = [&](const std::string& text) {
    put(path, text);
    std::string message = read_refusal(path);
    REQUIRE(message.starts_with(path.string() + ": "));
    return message.substr(path.string().size() + 2);
  };
  CHECK(refusal("") == "line 1: the file ends before the line \"" + columns + "\"");
  CHECK(refusal("# comment\n") == "line 2: the file ends before the line \"" + columns + "\"");
  CHECK(refusal("# comment\nepoch,loss\n") ==
        "line 2: expected \"" + columns + "\" before the rows");
  CHECK(refusal(columns) ==
        "line 1: the line does not end; resume the training, or remove the line");
  CHECK(refusal(header + row_1 + "2,0.05,1.2") ==
        "line 3: the line does not end; resume the training, or remove the line");
  CHECK(refusal(header + "\n") == "line 2: 1 fields, expected 10");
  CHECK(refusal(header + "1,2,3\n") == "line 2: 3 fields, expected 10");
  CHECK(refusal(header + "1,2,3,4,5,6,7,8,9,10,11\n") == "line 2: 11 fields, expected 10");
  CHECK(refusal(header + row_1 + "# comment\n") == "line 3: 1 fields, expected 10");
  CHECK(refusal(header + "2,0.05,1.25,0.55,1.5,0.5,0.5,2000.5,24.75,\n" + row_1) ==
        "line 3: the epoch is \"1\", expected a number from 3 on");
  CHECK(refusal(header + "0,2,3,4,5,6,7,8,9,\n") ==
        "line 2: the epoch is \"0\", expected a number from 1 on");
  CHECK(refusal(header + "1.5,2,3,4,5,6,7,8,9,\n") ==
        "line 2: the epoch is \"1.5\", expected a number from 1 on");
  CHECK(refusal(header + "99999999999999999999,2,3,4,5,6,7,8,9,\n") ==
        "line 2: the epoch is \"99999999999999999999\", expected a number from 1 on");
  CHECK(refusal("#\n" + header + "1,2,three,0.4,5,0.6,0.6,8,9,\n") ==
        "line 3: train_loss is \"three\", expected a number from 0 on");
  CHECK(refusal(header + "1,2,3,0.4,5,0.6,,8,9,\n") ==
        "line 2: best_test_accuracy is \"\", expected a number from 0 to 1");
  CHECK(refusal(header + "1,2,3,0.4,5,0.6,0.6,8,9,0\r\n") ==
        "line 2: min_gradient_similarity is \"0\r\", expected a number from -1 to 1");
  for (const char* none : {"nan", "-nan", "inf", "-1"}) {
    CHECK(refusal(header + "1,2,3,0.4," + none + ",0.6,0.6,8,9,\n") ==
          "line 2: test_loss is \"" + std::string(none) + "\", expected a number from 0 on");
  }
  for (const char* none : {"nan", "1.5", "-0.1", "9.9"}) {
    CHECK(refusal(header + "1,2,3," + none + ",5,0.6,0.6,8,9,\n") ==
          "line 2: train_accuracy is \"" + std::string(none) + "\", expected a number from 0 to 1");
  }
  CHECK(refusal(header + row_1 + "2,2,3,0.4,5,0.5,0.5,8,9,\n") ==
        "line 3: best_test_accuracy is 0.5, that of the rows so far is 0.55");
}

TEST_CASE("what is no file of a log is refused", "[cifar]") {
  const Folder folder;
  const fs::path path = folder / "log.csv";
  const auto write_refusal = [&] {
    return message_of<concertina::IoError>([&] { CsvLog(path, {}); });
  };
  SECTION("nothing") {
    CHECK_THAT(read_refusal<concertina::IoError>(path),
               Contains("cannot read " + path.string()) && Contains("No such file"));
  }
  SECTION("folder") {
    fs::create_directory(path);
    CHECK(read_refusal<concertina::IoError>(path) ==
          "cannot read " + path.string() + ": it is a folder; name a file in it");
    CHECK(write_refusal() ==
          "cannot write " + path.string() + ": there is something that is not a regular file");
  }
  SECTION("pipe") {
    REQUIRE(::mkfifo(path.c_str(), 0600) == 0);
    CHECK(read_refusal<concertina::IoError>(path) ==
          "cannot read " + path.string() + ": it is not a regular file");
    CHECK_THAT(write_refusal(), Contains("not a regular file"));
  }
  SECTION("sparse file of a terabyte") {
    put(path, "");
    fs::resize_file(path, std::uintmax_t{1} << 40);
    CHECK_THAT(read_refusal<concertina::SizeError>(path),
               Contains("1099511627776 bytes, more than the 67108864"));
  }
  SECTION("in no folder") {
    CHECK_THAT(message_of<concertina::IoError>([&] { CsvLog(folder / "none/log.csv", {}); }),
               Contains("cannot create") && Contains("No such file"));
  }
}

TEST_CASE("a full disk is reported, and the old file stays", "[cifar]") {
  const Folder folder;
  const fs::path path = folder / "log.csv";
  put(path, header + row_1);
  rlimit before{};
  REQUIRE(::getrlimit(RLIMIT_FSIZE, &before) == 0);
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  rlimit limit = before;
  limit.rlim_cur = 100;
  REQUIRE(::setrlimit(RLIMIT_FSIZE, &limit) == 0);
  std::string message;
  try {
    CsvLog::resume(path, {"comment"}, 1);
  } catch (const concertina::IoError& error) {
    message = error.what();
  }
  ::setrlimit(RLIMIT_FSIZE, &before);
  std::signal(SIGXFSZ, handler);
  CHECK_THAT(message, Contains("cannot write " + path.string()) && Contains("File too large"));
  CHECK(contents(path) == header + row_1);
  CHECK(folder.count() == 1);
}

TEST_CASE("a line for an epoch, of any numbers", "[cifar]") {
  const EpochRecord record{.epoch = 3,
                           .train_loss = 1.23456,
                           .train_accuracy = 0.5,
                           .test_loss = 1.25,
                           .test_accuracy = 0.55555,
                           .images_per_second = 1234.4,
                           .seconds = 59.5};
  CHECK(epoch_line(record, 100) ==
        "epoch   3/100  loss 1.235  accuracy 50.00%  test loss 1.25  test accuracy 55.55%  "
        "1234 images/s  0:01:00  1:36:12 left");
  const double infinity = std::numeric_limits<double>::infinity();
  for (const double number : {-1e300, 1e300, infinity, std::nan("")}) {
    const std::string line =
        epoch_line({.epoch = 1, .train_loss = number, .seconds = number}, 1'000'000);
    CHECK_THAT(line, Contains("-:--:--  -:--:-- left") && !Contains("\n"));
  }
}
