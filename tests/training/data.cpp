// The training program's images: what is read, generated and refused, in which order and crop, and
// where each pixel lands.
// SPDX-License-Identifier: Apache-2.0
#include "training/data.hpp"  // first: the header must stand alone

#include "support.hpp"

#include <concertina/error.hpp>

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <functional>
#include <limits>
#include <map>
#include <numeric>
#include <set>
#include <span>
#include <string>
#include <tuple>
#include <vector>

using namespace training;
using Catch::Matchers::Contains, Catch::Matchers::Equals;
using concertina::test::message_of;
namespace fs = std::filesystem;

namespace {

constexpr int lanes = 16;

/// A folder that lives as long as the test.
class Folder {
 public:
  Folder() : path_(fs::temp_directory_path() / ("cifar-data-" + std::to_string(::getpid()))) {
    fs::remove_all(path_);
    fs::create_directory(path_);
  }
  ~Folder() { fs::remove_all(path_); }
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;

  const fs::path& path() const { return path_; }

 private:
  fs::path path_;
};

/// The value of a pixel in the files that these tests write, different for neighbours, channels,
/// records and files.
std::uint8_t pixel_of(int file, int record, int pixel) {
  return static_cast<std::uint8_t>(pixel * 7 + pixel / 32 * 3 + pixel / 1024 * 50 + record * 11 +
                                   file * 17);
}

/// A record for each row of label bytes.
void put_records(const fs::path& path, int file, const std::vector<std::vector<int>>& labels) {
  std::ofstream out(path, std::ios::binary);
  for (int record = 0; record < std::ssize(labels); ++record) {
    for (const int label : labels[static_cast<std::size_t>(record)]) {
      out.put(static_cast<char>(label));
    }
    for (int pixel = 0; pixel < 3072; ++pixel) {
      out.put(static_cast<char>(pixel_of(file, record, pixel)));
    }
  }
}

std::string batch(int number) { return "data_batch_" + std::to_string(number) + ".bin"; }

/// Files 1 to 5 with as many records as their number, and a test file of two.
void put_cifar10(const fs::path& folder) {
  fs::create_directories(folder);
  for (int file = 1; file <= 5; ++file) {
    std::vector<std::vector<int>> labels;
    for (int record = 0; record < file; ++record) labels.push_back({(file + record) % 10});
    put_records(folder / batch(file), file, labels);
  }
  put_records(folder / "test_batch.bin", 6, {{9}, {0}});
}

void put_cifar100(const fs::path& folder) {
  fs::create_directories(folder);
  put_records(folder / "train.bin", 1, {{19, 99}, {0, 0}, {3, 42}});
  put_records(folder / "test.bin", 2, {{7, 13}});
}

/// Whether these are the pixels that a file was written with, from an image on.
bool holds(const Images& images, Index first, int file, int records) {
  for (int record = 0; record < records; ++record) {
    for (int pixel = 0; pixel < 3072; ++pixel) {
      const Index at = (first + record) * 3072 + pixel;
      if (images.pixels[static_cast<std::size_t>(at)] != pixel_of(file, record, pixel)) {
        return false;
      }
    }
  }
  return true;
}

Images random_images(int count) {
  concertina::test::Rng rng(1);
  Images images;
  for (int n = 0; n < count; ++n) images.labels.push_back(static_cast<std::uint8_t>(n));
  for (int n = 0; n < count * 3072; ++n) {
    images.pixels.push_back(static_cast<std::uint8_t>(rng() >> 56));
  }
  return images;
}

Dataset normalisation() {
  return {.name = "test",
          .classes = 10,
          .train = {},
          .test = {},
          .mean = {0.5, 0.25, 0.125},
          .deviation = {0.25, 0.5, 2}};
}

/// How many numbers of load_images are not those of the definition: what the image framed by black
/// pixels has where the crop, perhaps mirrored, looks; zeros in lanes beyond.
template <class Scalar>
Index wrong_numbers(const Images& images, const std::vector<std::uint32_t>& which,
                    const Augmentation* augmentation) {
  const Dataset norm = normalisation();
  std::vector<Scalar> to(3 * 32 * 32 * lanes + 1, Scalar(1234));
  load_images<Scalar, lanes>(norm, images, which, augmentation, to.data());
  Index wrong = to.back() != 1234;
  std::size_t number = 0;
  for (std::size_t channel = 0; channel < 3; ++channel) {
    for (Index y = 0; y < 32; ++y) {
      for (Index x = 0; x < 32; ++x) {
        for (std::size_t lane = 0; lane < lanes; ++lane, ++number) {
          if (lane >= which.size()) {
            wrong += to[number] != 0;
            continue;
          }
          const Crop crop = augmentation ? crop_of(*augmentation, which[lane]) : Crop{};
          const Index row = y + crop.top - 4, column = (crop.flip ? 31 - x : x) + crop.left - 4;
          const bool inside = row >= 0 && row < 32 && column >= 0 && column < 32;
          const auto at = static_cast<std::size_t>(row * 32 + column);
          const int value = inside ? images.pixels[(which[lane] * 3 + channel) * 1024 + at] : 0;
          wrong += to[number] != static_cast<Scalar>((value / 255.0 - norm.mean[channel]) /
                                                     norm.deviation[channel]);
        }
      }
    }
  }
  return wrong;
}

/// How far counts are from a thousand each.
template <class Key>
double chi_squared(const std::map<Key, int>& counts) {
  double sum = 0;
  for (const auto& [key, count] : counts) sum += (count - 1000.0) * (count - 1000) / 1000;
  return sum;
}

/// Fowler, Noll and Vo's hash.
std::uint64_t checksum(const std::vector<std::uint8_t>& bytes) {
  std::uint64_t hash = 0xcbf29ce484222325U;
  for (const std::uint8_t byte : bytes) hash = (hash ^ byte) * 0x100000001b3U;
  return hash;
}

}  // namespace

TEST_CASE("CIFAR-10 is read from its folder and from its parent", "[training]") {
  const Folder folder;
  put_cifar10(folder.path() / "cifar-10-batches-bin");
  const auto place = GENERATE(as<std::string>(), "", "cifar-10-batches-bin");
  const Dataset data = read_dataset(folder.path() / place, "cifar10");
  CHECK(data.name == "cifar10");
  CHECK(data.classes == 10);
  CHECK(data.train.labels ==
        std::vector<std::uint8_t>{1, 2, 3, 3, 4, 5, 4, 5, 6, 7, 5, 6, 7, 8, 9});
  CHECK(data.train.count() == 15);
  CHECK(data.train.pixels.size() == 15 * 3072);
  Index first = 0;
  for (int file = 1; file <= 5; ++file) {
    CHECK(holds(data.train, first, file, file));
    first += file;
  }
  CHECK(data.test.labels == std::vector<std::uint8_t>{9, 0});
  CHECK(data.test.pixels.size() == 2 * 3072);
  CHECK(holds(data.test, 0, 6, 2));
  CHECK(data.mean[0] == Approx(0.4914).margin(5e-5));
  CHECK(data.mean[2] == Approx(0.4467).margin(5e-5));
  CHECK(data.deviation[1] == Approx(0.2435).margin(5e-5));
}

TEST_CASE("CIFAR-100 is read with its fine labels", "[training]") {
  const Folder folder;
  put_cifar100(folder.path() / "cifar-100-binary");
  const auto place = GENERATE(as<std::string>(), "", "cifar-100-binary");
  const Dataset data = read_dataset(folder.path() / place, "cifar100");
  CHECK(data.name == "cifar100");
  CHECK(data.classes == 100);
  CHECK(data.train.labels == std::vector<std::uint8_t>{99, 0, 42});
  CHECK(data.test.labels == std::vector<std::uint8_t>{13});
  CHECK(holds(data.train, 0, 1, 3));
  CHECK(holds(data.test, 0, 2, 1));
  CHECK(data.mean == std::array{0.5071, 0.4867, 0.4408});
  CHECK(data.deviation == std::array{0.2675, 0.2565, 0.2761});
}

TEST_CASE("with files in the folder and in the one inside, those in the folder are meant",
          "[training]") {
  const Folder folder;
  put_cifar100(folder.path());
  put_cifar100(folder.path() / "cifar-100-binary");
  put_records(folder.path() / "test.bin", 5, {{1, 2}});
  CHECK(read_dataset(folder.path(), "cifar100").test.labels == std::vector<std::uint8_t>{2});
}

/// A folder, or a file in one, that read_dataset refuses: how it is made and what is said.
struct Refused {
  std::string what;
  std::string name;  ///< of the data set
  std::function<void(const fs::path& folder)> make;
  std::string message;    ///< "@" stands for the folder; after dots there is a part
  std::string read = "";  ///< in the folder
};

/// `put` writes the files that are damaged.
template <class Error>
void check_refused(const std::vector<Refused>& all, void (*put)(const fs::path&) = nullptr) {
  for (const auto& [what, name, make, message, read] : all) {
    INFO(what);
    const Folder folder;
    if (put) put(folder.path());
    make(folder.path());
    std::string expected = message;
    for (std::size_t at; (at = expected.find('@')) != std::string::npos;) {
      expected.replace(at, 1, folder.path().string());
    }
    const std::string said = message_of<Error>(
        [&] { read_dataset(read.empty() ? folder.path() : folder.path() / read, name); });
    if (expected.starts_with("...")) {
      CHECK_THAT(said, Contains(expected.substr(3)));
    } else {
      CHECK(said == expected);
    }
  }
}

TEST_CASE("a folder without the files is refused with what it should hold", "[training]") {
  const std::string needs =
      "; cifar10 is read from data_batch_1.bin, data_batch_2.bin, data_batch_3.bin, "
      "data_batch_4.bin, data_batch_5.bin, test_batch.bin, in the folder itself or in its "
      "folder cifar-10-batches-bin; they are in "
      "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz";
  const std::string python = "...the Python version, and the binary version is needed";
  const auto nothing = [](const fs::path&) {};
  const auto put_text = [](const std::string& name) {
    return [name](const fs::path& folder) { std::ofstream(folder / name) << "text"; };
  };
  const auto put_without = [](const std::string& inner, const std::vector<std::string>& files) {
    return [inner, files](const fs::path& folder) {
      put_cifar10(folder / inner);
      for (const std::string& file : files) fs::remove(folder / inner / file);
    };
  };
  check_refused<concertina::IoError>({
      {"empty", "cifar10", nothing, "@: the images are not there" + needs},
      {"of CIFAR-100", "cifar100", nothing,
       "@: the images are not there; cifar100 is read from train.bin, test.bin, in the folder "
       "itself or in its folder cifar-100-binary; they are in "
       "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz"},
      {"not there", "cifar10", nothing, "@/none: No such file or directory" + needs, "none"},
      {"a file", "cifar10", put_text("file"), "@/file: this is no folder" + needs, "file"},
      {"Python's version", "cifar10",
       [](const fs::path& folder) { fs::create_directory(folder / "cifar-10-batches-py"); },
       python},
      {"Python's version of CIFAR-100", "cifar100", put_text("train"), python},
      {"one missing", "cifar10", put_without("cifar-10-batches-bin", {batch(3)}),
       "@/cifar-10-batches-bin: data_batch_3.bin is missing" + needs},
      {"several missing", "cifar10", put_without("", {batch(2), batch(4), "test_batch.bin"}),
       "...data_batch_2.bin, data_batch_4.bin, test_batch.bin are missing"},
  });
}

TEST_CASE("a set that is not CIFAR is refused by name", "[training]") {
  CHECK(message_of<concertina::Error>([] { read_dataset("/", "imagenet"); }) ==
        "there is no data set \"imagenet\" to read; those that are read are cifar10, cifar100 and "
        "mnist");
}

TEST_CASE("a damaged file is refused with the place", "[training]") {
  const auto resized = [](const std::string& file, std::uintmax_t bytes) {
    return [=](const fs::path& folder) { fs::resize_file(folder / file, bytes); };
  };
  const auto with = [](const std::string& file, const std::vector<std::vector<int>>& labels) {
    return [=](const fs::path& folder) { put_records(folder / file, 4, labels); };
  };
  const auto put_both = [](const fs::path& folder) {
    put_cifar10(folder);
    put_cifar100(folder);
  };
  check_refused<concertina::FormatError>(
      {
          {"empty", "cifar10", resized(batch(2), 0),
           "@/data_batch_2.bin: the file is empty, and the records of cifar10 have 3073 bytes; "
           "extract the file from its archive again"},
          {"cut short", "cifar10", resized(batch(5), 5 * 3073 - 1),
           "@/data_batch_5.bin: record 4, at byte 12292, has 3072 bytes up to the end of the "
           "file, but the records of cifar10 have 3073 bytes; extract the file from its archive "
           "again"},
          {"longer by a byte", "cifar100", resized("test.bin", 3075),
           "...record 1, at byte 3074, has 1 bytes"},
          {"class", "cifar10", with(batch(4), {{9}, {10}}),
           "@/data_batch_4.bin: record 1, at byte 3073: class 10, but they are 0 to 9; is this a "
           "file of cifar10, binary version?"},
          {"fine class", "cifar100", with("train.bin", {{1, 99}, {1, 1}, {19, 100}}),
           "...record 2, at byte 6149: fine class 100, but they are 0 to 99"},
          {"coarse class", "cifar100", with("test.bin", {{20, 0}}),
           "...record 0, at byte 0: coarse class 20, but they are 0 to 19"},
      },
      put_both);
}

TEST_CASE("what is no file of images is refused before anything is allocated", "[training]") {
  const auto put = [](const fs::path& folder) {
    put_cifar10(folder);
    fs::remove(folder / batch(1));
  };
  const auto as = [](auto make) {
    return [make](const fs::path& folder) { make(folder / batch(1)); };
  };
  std::vector<Refused> all = {
      {"folder", "cifar10", as([](const fs::path& path) { fs::create_directory(path); }),
       "cannot read @/data_batch_1.bin: it is a folder; name a file in it"},
      {"pipe, whose opening would wait for a writer", "cifar10",
       as([](const fs::path& path) { REQUIRE(::mkfifo(path.c_str(), 0600) == 0); }),
       "cannot read @/data_batch_1.bin: it is not a regular file"},
      {"endless device", "cifar10",
       as([](const fs::path& path) { fs::create_symlink("/dev/zero", path); }),
       "...it is not a regular file"}};
  if (::geteuid() != 0) {
    all.push_back({"not readable", "cifar10", as([](const fs::path& path) {
                     std::ofstream(path) << std::string(3073, '\0');
                     fs::permissions(path, fs::perms::none);
                   }),
                   "...Permission denied"});
  }
  check_refused<concertina::IoError>(all, put);
  check_refused<concertina::SizeError>(
      {{"sparse file of a terabyte", "cifar10", as([](const fs::path& path) {
          std::ofstream(path).close();
          fs::resize_file(path, std::uintmax_t{1} << 40);
        }),
        "@/data_batch_1.bin: 1099511627776 bytes, more than the 268435456 that a file of cifar10 "
        "may have"}},
      put);
}

TEST_CASE("generated images are the same everywhere", "[training]") {
  const Dataset data = generated_dataset(10, 200, 50, 1);
  CHECK(data.name == "generated");
  CHECK(data.classes == 10);
  CHECK(checksum(data.train.pixels) == 0x2ef4cfdc9a0ab680);
  CHECK(checksum(data.test.pixels) == 0x8b72ca118342d15e);
  CHECK(checksum(generated_dataset(10, 200, 50, 2).train.pixels) != checksum(data.train.pixels));
}

TEST_CASE("generated images are balanced, different and within reach of the normalisation",
          "[training]") {
  const Dataset data = generated_dataset(7, 500, 100, 3);
  for (const Images* images : {&data.train, &data.test}) {
    std::vector<Index> counts(7);
    for (const std::uint8_t label : images->labels) ++counts.at(label);
    const auto [least, most] = std::ranges::minmax(counts);
    CHECK(most - least <= 1);
    CHECK(images->pixels.size() == images->labels.size() * 3072);
  }
  std::set<std::vector<std::uint8_t>> distinct;
  for (const Images* images : {&data.train, &data.test}) {
    for (Index n = 0; n < images->count(); ++n) {
      const auto first = images->pixels.begin() + n * 3072;
      distinct.emplace(first, first + 3072);
    }
  }
  CHECK(distinct.size() == 600);
  for (std::size_t channel = 0; channel < 3; ++channel) {
    double sum = 0, squares = 0;
    for (std::size_t n = 0; n < 500; ++n) {
      for (std::size_t pixel = 0; pixel < 1024; ++pixel) {
        const double value = data.train.pixels[(n * 3 + channel) * 1024 + pixel] / 255.0;
        sum += value, squares += value * value;
      }
    }
    const double mean = sum / (500 * 1024);
    CHECK(mean == Approx(data.mean[channel]).margin(0.02));
    CHECK(std::sqrt(squares / (500 * 1024) - mean * mean) ==
          Approx(data.deviation[channel]).epsilon(0.15));
  }
}

TEST_CASE("generated sets of absurd sizes are refused", "[training]") {
  const auto refused = [](Index classes, Index train, Index test) {
    return message_of<concertina::SizeError>([&] { generated_dataset(classes, train, test, 1); });
  };
  CHECK(refused(1, 10, 10) == "a generated data set with 1 classes; it has 2 to 256");
  CHECK(refused(257, 10, 10) == "a generated data set with 257 classes; it has 2 to 256");
  CHECK(refused(10, 0, 10) == "a generated data set with 0 training images; it has 1 to 100000");
  CHECK(refused(10, 10, -1) == "a generated data set with -1 test images; it has 1 to 100000");
  CHECK_THAT(refused(10, std::numeric_limits<Index>::max(), 1), Contains("training images"));
  CHECK(generated_dataset(256, 1, 1, 1).train.count() == 1);
}

TEST_CASE("an epoch's order is a permutation of its own", "[training]") {
  const Index count = GENERATE(0, 1, 2, 15, 16, 17, 1000);
  std::vector<std::uint32_t> all(static_cast<std::size_t>(count));
  std::iota(all.begin(), all.end(), 0U);
  for (Index epoch = 0; epoch < 3; ++epoch) {
    std::vector<std::uint32_t> order = epoch_order(count, 1, epoch);
    CHECK(order == epoch_order(count, 1, epoch));
    if (count > 10) {
      CHECK(order != all);
      CHECK(order != epoch_order(count, 1, epoch + 1));
      CHECK(order != epoch_order(count, 2, epoch));
    }
    std::ranges::sort(order);
    CHECK(order == all);
  }
}

TEST_CASE("an epoch's order is the same everywhere", "[training]") {
  CHECK(epoch_order(10, 1, 0) == std::vector<std::uint32_t>{7, 0, 8, 2, 3, 1, 9, 4, 6, 5});
  CHECK(epoch_order(10, 1, 1) == std::vector<std::uint32_t>{2, 9, 5, 8, 7, 0, 4, 6, 1, 3});
}

TEST_CASE("every order is as probable", "[training]") {
  std::map<std::vector<std::uint32_t>, int> counts;
  for (Index epoch = 0; epoch < 24'000; ++epoch) ++counts[epoch_order(4, 9, epoch)];
  CHECK(counts.size() == 24);
  CHECK(chi_squared(counts) <
        49.7);  // 23 degrees of freedom: exceeded by chance once in a thousand
}

TEST_CASE("orders of more images than there are numbers are refused", "[training]") {
  CHECK(message_of<concertina::SizeError>([] { epoch_order(-1, 1, 0); }) ==
        "an order of -1 images; there can be 0 to 4294967295");
  CHECK_THROWS_AS(epoch_order(Index{1} << 32, 1, 0), concertina::SizeError);
}

TEST_CASE("corrupted labels are drawn anew, as many as asked for", "[training]") {
  std::vector<std::uint8_t> labels(50'000);
  for (std::size_t i = 0; i < labels.size(); ++i) labels[i] = static_cast<std::uint8_t>(i % 10);
  CHECK(corrupted_labels(labels, 10, 0, 1) == labels);
  const auto half = corrupted_labels(labels, 10, 0.5, 1);
  CHECK(half == corrupted_labels(labels, 10, 0.5, 1));
  CHECK(half != corrupted_labels(labels, 10, 0.5, 2));
  // A tenth of what is drawn is the true label: 22,500 differ, give or take five deviations of 47.
  std::vector<Index> drawn(10);
  Index changed = 0;
  for (std::size_t i = 0; i < labels.size(); ++i) {
    if (half[i] == labels[i]) continue;
    ++changed, ++drawn[half[i]];
  }
  CHECK(std::abs(changed - 22'500) < 5 * 47);
  for (const Index count : drawn) CHECK(std::abs(count - 2'250) < 5 * 47);
  // Not more than asked for: none of two images is the third.
  for (std::uint64_t seed = 0; seed < 50; ++seed) {
    const std::vector<std::uint8_t> three = {200, 200, 200};
    const auto two = corrupted_labels(three, 10, 2.0 / 3, seed);
    CHECK(std::ranges::count(two, 200) == 1);
  }
  CHECK_THAT(message_of<concertina::Error>([&] { corrupted_labels(labels, 10, 1.5, 1); }),
             Contains("0 to 1"));
}

TEST_CASE("crops are every one as probable, and independent from image to image", "[training]") {
  std::map<std::tuple<Index, Index, bool>, int> counts;
  constexpr int images = 162'000;
  const auto add = [&counts](const Crop& crop) { ++counts[{crop.top, crop.left, crop.flip}]; };
  SECTION("of the images of an epoch") {
    for (std::uint32_t image = 0; image < images; ++image)
      add(crop_of({.seed = 1, .epoch = 3}, image));
  }
  SECTION("of an image in many epochs") {
    for (Index epoch = 0; epoch < images; ++epoch) add(crop_of({.seed = 1, .epoch = epoch}, 17));
  }
  SECTION("of an image with many seeds") {
    for (std::uint64_t seed = 0; seed < images; ++seed)
      add(crop_of({.seed = seed, .epoch = 3}, 17));
  }
  CHECK(counts.size() == 162);
  int flips = 0;
  for (const auto& [crop, count] : counts) {
    const auto [top, left, flip] = crop;
    CHECK((top >= 0 && top <= 8 && left >= 0 && left <= 8));
    flips += flip ? count : 0;
  }
  CHECK(chi_squared(counts) <
        222);  // 161 degrees of freedom: exceeded by chance once in a thousand
  CHECK(flips == Approx(images / 2).margin(4 * std::sqrt(images / 4.0)));
}

TEST_CASE("a crop is the same everywhere", "[training]") {
  CHECK(crop_of({.seed = 1, .epoch = 2}, 3) == Crop{.top = 8, .left = 8, .flip = false});
  CHECK(crop_of({.seed = 1, .epoch = 2}, 6) == Crop{.top = 3, .left = 7, .flip = true});
}

TEMPLATE_TEST_CASE("images land where their definition puts them", "[training]", float, double) {
  const std::size_t count = GENERATE(as<std::size_t>(), 0, 1, 15, 16);
  const bool augmented = GENERATE(false, true);
  std::vector<std::uint32_t> which;
  for (std::size_t n = 0; n < count; ++n) which.push_back(static_cast<std::uint32_t>(39 - n * 2));
  if (count > 1) which[1] = which[0];  // an image may come twice
  const Augmentation augmentation{.seed = 5, .epoch = 2};
  const Images images = random_images(40);
  CHECK(wrong_numbers<TestType>(images, which, augmented ? &augmentation : nullptr) == 0);
}

TEST_CASE("every crop and flip moves an image as it says, black outside", "[training]") {
  const Images images = random_images(1);
  std::set<std::tuple<Index, Index, bool>> seen;
  for (Index epoch = 0; seen.size() < 162; ++epoch) {
    const Augmentation augmentation{.seed = 1, .epoch = epoch};
    const Crop crop = crop_of(augmentation, 0);
    if (!seen.emplace(crop.top, crop.left, crop.flip).second) continue;
    CHECK(wrong_numbers<float>(images, {0}, &augmentation) == 0);
  }
}

TEST_CASE("images that are not there, and more than there are lanes, are refused", "[training]") {
  const Dataset norm = normalisation();
  Images images = random_images(3);
  std::vector<float> to(3 * 32 * 32 * lanes);
  const auto refused = [&](const std::vector<std::uint32_t>& which) {
    return message_of<concertina::ShapeError>(
        [&] { load_images<float, lanes>(norm, images, which, nullptr, to.data()); });
  };
  CHECK(refused(std::vector<std::uint32_t>(17)) == "17 images for 16 lanes");
  CHECK(refused({0, 3}) == "image 3 of 3, counted from 0");
  CHECK(refused({0xffffffffU}) == "image 4294967295 of 3, counted from 0");
  images.pixels.pop_back();
  CHECK(refused({2}) == "image 2 of 3, counted from 0, has no pixels");
}

// ---- MNIST --------------------------------------------------------------------------------------

namespace {

/// A file of idx: magic number, count, extents, bytes.
void put_idx(const fs::path& path, const std::vector<std::uint32_t>& header,
             const std::vector<std::uint8_t>& bytes) {
  fs::create_directories(path.parent_path());
  std::ofstream file(path, std::ios::binary);
  for (const std::uint32_t word : header) {
    for (const int shift : {24, 16, 8, 0}) file.put(static_cast<char>(word >> shift));
  }
  for (const std::uint8_t byte : bytes) file.put(static_cast<char>(byte));
}

/// Byte i of a set of digits is i * 7 + first.
std::vector<std::uint8_t> digits(int count, int first) {
  std::vector<std::uint8_t> bytes;
  for (int i = 0; i < count * 28 * 28; ++i) {
    bytes.push_back(static_cast<std::uint8_t>(i * 7 + first));
  }
  return bytes;
}

void put_mnist(const fs::path& folder) {
  put_idx(folder / "train-images-idx3-ubyte", {0x803, 3, 28, 28}, digits(3, 1));
  put_idx(folder / "train-labels-idx1-ubyte", {0x801, 3}, {4, 0, 9});
  put_idx(folder / "t10k-images-idx3-ubyte", {0x803, 1, 28, 28}, digits(1, 2));
  put_idx(folder / "t10k-labels-idx1-ubyte", {0x801, 1}, {7});
}

}  // namespace

TEST_CASE("digits of MNIST stand in the middle of all three colours", "[training]") {
  const Folder folder;
  const auto place = GENERATE(as<std::string>(), "", "MNIST/raw");
  put_mnist(folder.path() / place);
  const Dataset data = read_dataset(folder.path(), "mnist");
  CHECK(data.classes == 10);
  CHECK_FALSE(data.augmented);
  CHECK(data.train.labels == std::vector<std::uint8_t>{4, 0, 9});
  CHECK(data.test.labels == std::vector<std::uint8_t>{7});
  CHECK(data.deviation == std::array{0.3081, 0.3081, 0.3081});
  std::size_t wrong = 0;
  for (int image = 0; image < 3; ++image) {
    for (int colour = 0; colour < 3; ++colour) {
      for (int y = 0; y < 32; ++y) {
        for (int x = 0; x < 32; ++x) {
          const int row = y - 2, column = x - 2;
          const bool inside = row >= 0 && row < 28 && column >= 0 && column < 28;
          const auto expected =
              static_cast<std::uint8_t>(inside ? ((image * 28 + row) * 28 + column) * 7 + 1 : 0);
          wrong +=
              data.train
                  .pixels[static_cast<std::size_t>(((image * 3 + colour) * 32 + y) * 32 + x)] !=
              expected;
        }
      }
    }
  }
  CHECK(wrong == 0);
}

TEST_CASE("damaged files of MNIST are refused with the place", "[training]") {
  const std::string images = "train-images-idx3-ubyte", labels = "train-labels-idx1-ubyte";
  const auto with = [](const std::string& file, const std::vector<std::uint32_t>& header,
                       const std::vector<std::uint8_t>& bytes) {
    return [=](const fs::path& folder) { put_idx(folder / file, header, bytes); };
  };
  const std::string again = "; extract the file from its archive again";
  check_refused<concertina::FormatError>(
      {
          {"other numbers", "mnist", with(images, {0x801, 3, 28, 28}, digits(3, 1)),
           "@/" + images + ": the magic number at byte 0 is 2049, expected 2051" + again},
          {"other sizes", "mnist", with(images, {0x803, 3, 28, 27}, digits(3, 1)),
           "@/" + images + ": the extent at byte 12 is 27, expected 28" + again},
          {"fewer bytes than it says", "mnist",
           with(images, {0x803, 0xffffffff, 28, 28}, digits(3, 1)), "...4294967295 of 784 bytes"},
          {"no header", "mnist", with(images, {0x803}, {}),
           "...the file has 4 bytes, its header alone 16"},
          {"no images", "mnist", with(images, {0x803, 0, 28, 28}, {}), "...0 of 784"},
          {"fewer labels than images", "mnist", with(labels, {0x801, 2}, {1, 2}),
           "@/" + labels + ": 2 labels, but " + images + " has 3 images" + again},
          {"a label that there is not", "mnist", with(labels, {0x801, 3}, {1, 2, 10}),
           "@/" + labels + ": the label at byte 10 is 10, but they are 0 to 9" + again},
      },
      put_mnist);
  const auto pack = [](const fs::path& folder) {
    for (const auto& entry : fs::directory_iterator(folder)) {
      fs::rename(entry.path(), entry.path().string() + ".gz");
    }
  };
  check_refused<concertina::IoError>({{"packed", "mnist", pack, "...gunzip"}}, put_mnist);
}
