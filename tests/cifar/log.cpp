// What a training reports: numbers that read back, rows that a resumed training drops, refusals
// that name the line, and a bar that copes with everything.
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
#include <sstream>
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

TEST_CASE("durations are hours, minutes and seconds", "[cifar]") {
  CHECK(clock_time(0) == "0:00:00");
  CHECK(clock_time(59.4) == "0:00:59");
  CHECK(clock_time(59.5) == "0:01:00");
  CHECK(clock_time(3600 + 2 * 60 + 3) == "1:02:03");
  CHECK(clock_time(123 * 3600) == "123:00:00");
  CHECK(clock_time(9999.0 * 3600 + 3598) == "9999:59:58");
  for (const double none : {-1.0, 36e6, 1e300, std::numeric_limits<double>::infinity(),
                            std::numeric_limits<double>::quiet_NaN()}) {
    CHECK(clock_time(none) == "-:--:--");
  }
}

TEST_CASE("a line of progress", "[cifar]") {
  const Progress half{.epoch = 3,
                      .epochs = 100,
                      .images = 25,
                      .total = 50,
                      .loss = 1.23456,
                      .accuracy = 0.5,
                      .images_per_second = 1234.4,
                      .seconds_left = 3661};
  CHECK(progress_line(half, 93) ==
        "epoch   3/100 [##########..........]  loss 1.235  accuracy 50.0%  1234 images/s  "
        "1:01:01 left");
  CHECK(progress_line(half, 77) ==
        "epoch   3/100 [##..]  loss 1.235  accuracy 50.0%  1234 images/s  1:01:01 left");
  CHECK(progress_line(half, 76) ==
        "epoch   3/100 50%  loss 1.235  accuracy 50.0%  1234 images/s  1:01:01 left");
  CHECK(progress_line(half, 13) == "epoch   3/100");
  CHECK(progress_line(half, 0).empty());
  CHECK(progress_line(half, -1).empty());
}

TEST_CASE("a line of progress of any numbers is a line of its width", "[cifar]") {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const double infinity = std::numeric_limits<double>::infinity();
  for (const double number : {0.0, -1e300, 1e300, infinity, -infinity, nan}) {
    for (const Index images : {Index{0}, Index{1}, Index{-5}, std::numeric_limits<Index>::max()}) {
      for (const Index width : {10, 79, 500}) {
        for (const Index total : {Index{0}, Index{3}, std::numeric_limits<Index>::max()}) {
          const Progress progress{.epoch = images,
                                  .epochs = total,
                                  .images = images,
                                  .total = total,
                                  .loss = number,
                                  .accuracy = number,
                                  .images_per_second = number,
                                  .seconds_left = number};
          const std::string line = progress_line(progress, width);
          CHECK(std::ssize(line) <= width);
          CHECK(line.find_first_of("\r\n") == std::string::npos);
        }
      }
    }
  }
  CHECK_THAT(progress_line({}, 100), Contains("epoch 0/0 [.....") && Contains(" 0 images/s"));
}

TEST_CASE("a terminal shows a bar ten times a second at most, and a line for every epoch",
          "[cifar]") {
  std::ostringstream out;
  double now = 100;
  const auto said = [&out] { return std::exchange(out, std::ostringstream()).str(); };
  ProgressBar bar(4, 1000, 1, out, true, [&now] { return now; });
  bar.begin_epoch(2);
  now += 5;
  bar.update(500, 2, 0.25);
  // Half an epoch in five seconds, and two and a half to go.
  CHECK_THAT(said(), Catch::StartsWith("\r\x1b[Kepoch 2/4 ") && Contains("loss 2  ") &&
                         Contains("accuracy 25.0%") && Contains("100 images/s") &&
                         Contains("0:00:25 left"));
  now += 0.05;
  bar.update(505, 2, 0.25);
  CHECK(said().empty());
  now += 0.06;
  bar.update(510, 2, 0.25);
  CHECK_THAT(said(), Contains("epoch 2/4"));
  now = 112;  // the pace includes the two seconds of testing
  bar.end_epoch({.epoch = 2,
                 .train_loss = 1.5,
                 .train_accuracy = 0.5,
                 .test_loss = 1.25,
                 .test_accuracy = 0.55555,
                 .images_per_second = 100,
                 .seconds = 12});
  CHECK(said() ==
        "\r\x1b[Kepoch 2/4  loss 1.5  accuracy 50.00%  test loss 1.25  test accuracy 55.55%  "
        "100 images/s  0:00:12  0:00:24 left\n");
  bar.clear();
  CHECK(said().empty());
  bar.begin_epoch(3);
  now += 5;
  bar.update(500, 1, 0.5);
  CHECK_THAT(said(), Contains("0:00:17 left"));  // 17 seconds for 1.5 epochs, and 1.5 to go
  bar.clear();
  CHECK(said() == "\r\x1b[K");
}

TEST_CASE("what is no terminal gets a line for every epoch", "[cifar]") {
  std::ostringstream out;
  double now = 0;
  ProgressBar bar(12, 1000, 0, out, false, [&now] { return now; });
  bar.begin_epoch(1);
  for (Index images = 0; images <= 1000; images += 100) {
    now += 1;
    bar.update(images, 2, 0.25);
  }
  CHECK(out.str().empty());
  bar.end_epoch({.epoch = 1, .seconds = 11});
  CHECK(out.str() ==
        "epoch  1/12  loss 0  accuracy 0.00%  test loss 0  test accuracy 0.00%  0 images/s  "
        "0:00:11  0:02:01 left\n");
}

TEST_CASE("a bar survives epochs without images, trainings without epochs, and a clock that stands",
          "[cifar]") {
  std::ostringstream out;
  double now = 0;
  {
    ProgressBar bar(0, 0, 0, out, true, [&now] { return now; });
    bar.update(0, 0, 0);
    now = 1;
    bar.begin_epoch(1);
    bar.update(0, 0, 0);
    bar.update(7, 0, 0);
    CHECK_THAT(out.str(), Contains("-:--:-- left") && Contains(" 0 images/s"));
    bar.end_epoch({.epoch = 1});
    CHECK_THAT(out.str(), Contains("0:00:00 left\n"));
    now = 2;
    bar.begin_epoch(2);
    bar.update(7, 0, 0);
    out.str("");
  }
  CHECK(out.str() == "\r\x1b[K");  // it does not stay behind
}
