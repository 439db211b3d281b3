// Reading, generating, drawing and laying out images.
// SPDX-License-Identifier: Apache-2.0
#include "data.hpp"

#include "text.hpp"

#include <concertina/detail/io/files.hpp>
#include <concertina/error.hpp>
#include <concertina/random.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <initializer_list>
#include <limits>
#include <numeric>
#include <random>
#include <span>
#include <system_error>
#include <tuple>
#include <utility>

namespace training {

namespace {

namespace fs = std::filesystem;
using detail::key, detail::mixed, detail::Stream;

constexpr Index plane_size = side * side;
constexpr Index border = crop_border;

// ---- files --------------------------------------------------------------------------------------

struct Label {
  std::string name;
  Index classes;
};

/// What a set's files are called and hold.
struct Layout {
  std::string name, folder, archive;
  std::vector<std::string> train, test;  // of MNIST the images, then the labels
  std::vector<Label> labels;             // one byte each before the pixels; the last is the class
  std::array<double, 3> mean, deviation;

  bool is_mnist() const { return name == "mnist"; }
  Index record() const { return std::ssize(labels) + image_size; }
};

/// Means and deviations are those with which the published accuracies were trained, rounded as
/// there.
Layout layout_of(const std::string& name) {
  if (name == "cifar10") {
    return {.name = name,
            .folder = "cifar-10-batches-bin",
            .archive = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
            .train = {"data_batch_1.bin", "data_batch_2.bin", "data_batch_3.bin",
                      "data_batch_4.bin", "data_batch_5.bin"},
            .test = {"test_batch.bin"},
            .labels = {{"class", 10}},
            .mean = {125.3 / 255, 123.0 / 255, 113.9 / 255},
            .deviation = {63.0 / 255, 62.1 / 255, 66.7 / 255}};
  }
  if (name == "cifar100") {
    return {.name = name,
            .folder = "cifar-100-binary",
            .archive = "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
            .train = {"train.bin"},
            .test = {"test.bin"},
            .labels = {{"coarse class", 20}, {"fine class", 100}},
            .mean = {0.5071, 0.4867, 0.4408},
            .deviation = {0.2675, 0.2565, 0.2761}};
  }
  if (name == "mnist") {
    return {.name = name,
            .folder = "MNIST/raw",
            .archive = "https://ossci-datasets.s3.amazonaws.com/mnist, to be unpacked",
            .train = {"train-images-idx3-ubyte", "train-labels-idx1-ubyte"},
            .test = {"t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"},
            .labels = {{"class", 10}},
            .mean = {0.1307, 0.1307, 0.1307},
            .deviation = {0.3081, 0.3081, 0.3081}};
  }
  throw concertina::Error("there is no data set \"" + name +
                          "\" to read; those that are read are cifar10, cifar100 and mnist");
}

std::vector<std::string> files_of(const Layout& layout) {
  std::vector<std::string> files = layout.train;
  files.insert(files.end(), layout.test.begin(), layout.test.end());
  return files;
}

/// What to do about a folder that is not the one.
std::string remedy(const Layout& layout) {
  return layout.name + " is read from " + tool::listed(files_of(layout)) +
         ", in the folder itself or in its folder " + layout.folder + "; they are in " +
         layout.archive;
}

fs::path find_files(const fs::path& folder, const Layout& layout) {
  std::error_code error;
  const auto fail = [&](const fs::path& path, const std::string& why) {
    throw concertina::IoError(path.string() + ": " + why + "; " + remedy(layout));
  };
  const fs::file_status status = fs::status(folder, error);
  if (!fs::exists(status)) fail(folder, error ? error.message() : "there is no such folder");
  if (!fs::is_directory(status)) fail(folder, "this is no folder");
  const std::vector<std::string> files = files_of(layout);
  const auto holds = [&error](const fs::path& candidate) {
    return [&error, candidate](const std::string& file) {
      return fs::exists(candidate / file, error);
    };
  };
  // With the files in both places, the folder that was asked for is meant.
  const bool outer = std::ranges::any_of(files, holds(folder));
  const fs::path found = outer ? folder : folder / layout.folder;
  if (std::ranges::none_of(files, holds(found))) {
    const auto holds_one = [&](std::initializer_list<const char*> names) {
      return std::ranges::any_of(
          names, [&](const char* name) { return fs::exists(folder / name, error); });
    };
    const bool python =
        (layout.name == "cifar10" && holds_one({"cifar-10-batches-py", "data_batch_1"})) ||
        (layout.name == "cifar100" && holds_one({"cifar-100-python", "train"}));
    const bool packed = layout.is_mnist() && holds_one({"train-images-idx3-ubyte.gz"});
    fail(folder, python   ? "this holds the Python version, and the binary version is needed"
                 : packed ? "the files are packed; unpack them with gunzip"
                          : "the images are not there");
  }
  std::vector<std::string> missing;
  for (const std::string& file : files) {
    if (!holds(found)(file)) missing.push_back(file);
  }
  if (!missing.empty()) {
    fail(found, tool::listed(missing) + (missing.size() == 1 ? " is missing" : " are missing"));
  }
  return found;
}

/// A file of images and its size.
struct OpenFile {
  fs::path path;
  concertina::io::detail::FileHandle file;
  Index bytes;

  OpenFile(const fs::path& at, const Layout& layout) : path(at) {
    // The largest official file has 153.7 MB; a sparse one can claim to be of any size.
    constexpr Index limit = 256 << 20;
    std::tie(file, bytes) = concertina::io::detail::open_file(path);
    if (bytes <= limit) return;
    throw concertina::SizeError(path.string() + ": " + std::to_string(bytes) +
                                " bytes, more than the " + std::to_string(limit) +
                                " that a file of " + layout.name + " may have");
  }
  void read(std::vector<std::uint8_t>& to) const {
    concertina::io::detail::read_next(path, file.get(), std::as_writable_bytes(std::span(to)));
  }
};

const std::string again = "; extract the file from its archive again";

/// Appends the images of a file of CIFAR.
void read_records(const fs::path& path, const Layout& layout, Images& images) {
  const OpenFile file(path, layout);
  const Index record = layout.record();
  const std::string records =
      "the records of " + layout.name + " have " + std::to_string(record) + " bytes";
  if (file.bytes == 0) {
    throw concertina::FormatError(path.string() + ": the file is empty, and " + records + again);
  }
  const Index count = file.bytes / record;
  if (file.bytes % record != 0) {
    throw concertina::FormatError(path.string() + ": record " + std::to_string(count) +
                                  ", at byte " + std::to_string(count * record) + ", has " +
                                  std::to_string(file.bytes % record) +
                                  " bytes up to the end of the file, but " + records + again);
  }
  const auto before = static_cast<std::size_t>(images.count());
  images.labels.resize(before + static_cast<std::size_t>(count));
  images.pixels.resize(images.labels.size() * image_size);
  std::vector<std::uint8_t> bytes_of_record(static_cast<std::size_t>(record));
  for (Index n = 0; n < count; ++n) {
    file.read(bytes_of_record);
    for (std::size_t k = 0; k < layout.labels.size(); ++k) {
      const auto& [label, classes] = layout.labels[k];
      if (bytes_of_record[k] < classes) continue;
      throw concertina::FormatError(path.string() + ": record " + std::to_string(n) + ", at byte " +
                                    std::to_string(n * record + static_cast<Index>(k)) + ": " +
                                    label + " " + std::to_string(bytes_of_record[k]) +
                                    ", but they are 0 to " + std::to_string(classes - 1) +
                                    "; is this a file of " + layout.name + ", binary version?");
    }
    const std::size_t to = before + static_cast<std::size_t>(n);
    images.labels[to] = bytes_of_record[layout.labels.size() - 1];
    std::copy(bytes_of_record.end() - image_size, bytes_of_record.end(),
              images.pixels.begin() + static_cast<Index>(to) * image_size);
  }
}

/// The bytes of a file of MNIST, whose header must say as many of these extents.
/// Source  http://yann.lecun.com/exdb/mnist, "the IDX file format"
std::vector<std::uint8_t> read_idx(const fs::path& path, const Layout& layout,
                                   std::span<const Index> extents) {
  const OpenFile file(path, layout);
  const std::size_t words = 2 + extents.size();  // a magic number, how many, the extents of each
  std::vector<std::uint8_t> header(4 * words);
  const auto refuse = [&](const std::string& why) {
    throw concertina::FormatError(path.string() + ": " + why + again);
  };
  if (file.bytes < std::ssize(header)) {
    refuse("the file has " + std::to_string(file.bytes) + " bytes, its header alone " +
           std::to_string(header.size()));
  }
  file.read(header);
  const auto word = [&](std::size_t n) {
    Index value = 0;
    for (std::size_t byte = 4 * n; byte < 4 * n + 4; ++byte) value = value << 8 | header[byte];
    return value;
  };
  const Index magic = 0x801 + std::ssize(extents);  // unsigned bytes, and how many dimensions
  if (word(0) != magic) {
    refuse("the magic number at byte 0 is " + std::to_string(word(0)) + ", expected " +
           std::to_string(magic));
  }
  Index size = 1;
  for (std::size_t e = 0; e < extents.size(); ++e) {
    size *= extents[e];
    if (word(2 + e) == extents[e]) continue;
    refuse("the extent at byte " + std::to_string(8 + 4 * e) + " is " +
           std::to_string(word(2 + e)) + ", expected " + std::to_string(extents[e]));
  }
  const Index count = word(1);
  if (count == 0 || std::ssize(header) + count * size != file.bytes) {
    refuse(std::to_string(count) + " of " + std::to_string(size) + " bytes each do not make the " +
           std::to_string(file.bytes) + " bytes that there are");
  }
  std::vector<std::uint8_t> bytes(static_cast<std::size_t>(count * size));
  file.read(bytes);
  return bytes;
}

/// The images of MNIST, each in the middle of 32 by 32 pixels and in all three colours.
Images read_mnist(const fs::path& folder, const std::vector<std::string>& files,
                  const Layout& layout) {
  constexpr std::array<Index, 2> extents = {28, 28};
  constexpr Index margin = (side - extents[0]) / 2;
  const auto digits = read_idx(folder / files[0], layout, extents);
  Images images{.pixels = {}, .labels = read_idx(folder / files[1], layout, {})};
  const Index count = images.count();
  if (std::ssize(digits) != count * extents[0] * extents[1]) {
    throw concertina::FormatError((folder / files[1]).string() + ": " + std::to_string(count) +
                                  " labels, but " + files[0] + " has " +
                                  std::to_string(std::ssize(digits) / (extents[0] * extents[1])) +
                                  " images" + again);
  }
  for (Index n = 0; n < count; ++n) {
    const auto label = images.labels[static_cast<std::size_t>(n)];
    if (label < 10) continue;
    throw concertina::FormatError((folder / files[1]).string() + ": the label at byte " +
                                  std::to_string(8 + n) + " is " + std::to_string(label) +
                                  ", but they are 0 to 9" + again);
  }
  images.pixels.resize(static_cast<std::size_t>(count * image_size));
  for (Index n = 0; n < count; ++n) {
    for (Index colour = 0; colour < colours; ++colour) {
      for (Index y = 0; y < extents[0]; ++y) {
        std::copy_n(digits.begin() + (n * extents[0] + y) * extents[1], extents[1],
                    images.pixels.begin() + n * image_size + colour * plane_size +
                        (y + margin) * side + margin);
      }
    }
  }
  return images;
}

// ---- random numbers -----------------------------------------------------------------------------

/// SplitMix64, a generator whose every state is as good as any other to start from.
class SplitMix {
 public:
  using result_type = std::uint64_t;
  explicit SplitMix(std::uint64_t state) : state_(state) {}
  static constexpr result_type min() { return 0; }
  static constexpr result_type max() { return std::numeric_limits<result_type>::max(); }
  result_type operator()() { return mixed(state_ += 0x9e3779b97f4a7c15U); }

 private:
  std::uint64_t state_;
};

/// Uniform in 0 .. bound - 1, for a bound from 1 to 2^32 - 1; unbiased.
/// Source  Lemire, "Fast random integer generation in an interval", ACM TOMACS 2019
template <concertina::BitGenerator Generator>
std::uint32_t random_below(Generator& generator, std::uint32_t bound) {
  const std::uint32_t rejected = -bound % bound;  // 2^32 % bound
  std::uint64_t product;
  do {
    product = (concertina::random_bits(generator) >> 32) * bound;
  } while (static_cast<std::uint32_t>(product) < rejected);
  return static_cast<std::uint32_t>(product >> 32);
}

/// Source  the Fisher-Yates shuffle as Durstenfeld wrote it, Communications of the ACM 1964
void shuffle(std::vector<std::uint32_t>& order, SplitMix generator) {
  for (std::size_t n = order.size(); n > 1; --n) {
    std::swap(order[n - 1], order[random_below(generator, static_cast<std::uint32_t>(n))]);
  }
}

// ---- generated images ---------------------------------------------------------------------------

using Rng = std::mt19937_64;

/// Uniform in least .. most.
int random_int(Rng& rng, int least, int most) {
  return least + static_cast<int>(random_below(rng, static_cast<std::uint32_t>(most - least + 1)));
}

/// A wave of period 1024 and amplitude 256, two parabolas for a sine: libraries differ in the last
/// bits of theirs.
constexpr int wave(int phase) {
  const int half = phase & 511;
  const int rise = half * (512 - half) / 256;
  return (phase & 512) != 0 ? -rise : rise;
}
static_assert(wave(0) == 0 && wave(256) == 256 && wave(768) == -256 && wave(-256) == -256);

/// Stripes; their phase moves by so many 1024ths of a period from pixel to pixel.
struct Grating {
  int dx, dy;
  std::array<int, 3> colour;  // -256 .. 256
};

/// Periods of 5 to 16 pixels in any direction: at least two of them in an image.
Grating random_grating(Rng& rng) {
  Grating grating{};
  int square = 0;
  do {
    grating.dx = random_int(rng, -200, 200);
    grating.dy = random_int(rng, -200, 200);
    square = grating.dx * grating.dx + grating.dy * grating.dy;
  } while (square < 64 * 64 || square > 200 * 200);
  for (int& colour : grating.colour) colour = random_int(rng, -256, 256);
  return grating;
}

/// How far apart the images of a class are, in steps of a pixel's value. Three convolutions without
/// normalisation recognise 65% to 85% of ten classes after two epochs of 2,000 augmented images and
/// some 90% after four. With contrasts of 12 to 40 they stay near chance for two epochs; with 40 to
/// 90 they have some 90% after the first, which leaves little to watch.
constexpr int contrast_least = 20, contrast_most = 60, distraction = 45, brightness = 30,
              noise = 40;

/// A sum of two uniform numbers, in -2 * noise .. 2 * noise, from one draw for speed.
int random_noise(Rng& rng) {
  constexpr std::uint64_t span = 2 * noise + 1;
  const std::uint64_t bits = concertina::random_bits(rng);
  const std::uint64_t sum = ((bits & 0xffffffff) * span >> 32) + ((bits >> 32) * span >> 32);
  return static_cast<int>(sum) - 2 * noise;
}

void generate_image(const std::array<Grating, 2>& shared, Rng& rng, std::uint8_t* pixels) {
  struct Layer {
    Grating grating;
    int amplitude, phase;
  };
  const auto layer = [&rng](const Grating& grating, int least, int most) {
    const int amplitude = random_int(rng, least, most);  // one draw a statement: the order is fixed
    const int phase = random_int(rng, 0, 1023);
    return Layer{grating, amplitude, phase};
  };
  const Layer first = layer(shared[0], contrast_least, contrast_most);
  const Layer second = layer(shared[1], contrast_least, contrast_most);
  const Layer other = layer(random_grating(rng), 0, distraction);
  std::array<int, colours> base{};
  for (int& level : base) level = 128 + random_int(rng, -brightness, brightness);
  for (std::size_t channel = 0; channel < colours; ++channel) {
    for (int y = 0; y < side; ++y) {
      for (int x = 0; x < side; ++x, ++pixels) {
        int sum = 0;
        for (const auto& [grating, amplitude, phase] : {first, second, other}) {
          sum +=
              wave(phase + grating.dx * x + grating.dy * y) * amplitude * grating.colour[channel];
        }
        const int value = base[channel] + sum / (256 * 256) + random_noise(rng);
        *pixels = static_cast<std::uint8_t>(std::clamp(value, 0, 255));
      }
    }
  }
}

Images generate_images(const std::vector<std::array<Grating, 2>>& classes, Index count, Rng& rng) {
  Images images;
  images.pixels.resize(static_cast<std::size_t>(count * image_size));
  images.labels.resize(static_cast<std::size_t>(count));
  for (std::size_t n = 0; n < images.labels.size(); ++n) {
    const std::size_t label = n % classes.size();
    images.labels[n] = static_cast<std::uint8_t>(label);
    generate_image(classes[label], rng, images.pixels.data() + n * image_size);
  }
  return images;
}

void check_range(const std::string& what, Index number, Index least, Index most) {
  if (number >= least && number <= most) return;
  throw concertina::SizeError("a generated data set with " + std::to_string(number) + " " + what +
                              "; it has " + std::to_string(least) + " to " + std::to_string(most));
}

}  // namespace

Dataset read_dataset(const fs::path& folder, const std::string& name) {
  const Layout layout = layout_of(name);
  const fs::path found = find_files(folder, layout);
  Dataset dataset{.name = name,
                  .classes = layout.labels.back().classes,
                  .train = {},
                  .test = {},
                  .mean = layout.mean,
                  .deviation = layout.deviation,
                  .augmented = !layout.is_mnist()};
  if (layout.is_mnist()) {
    dataset.train = read_mnist(found, layout.train, layout);
    dataset.test = read_mnist(found, layout.test, layout);
    return dataset;
  }
  for (const std::string& file : layout.train) read_records(found / file, layout, dataset.train);
  for (const std::string& file : layout.test) read_records(found / file, layout, dataset.test);
  return dataset;
}

void require_files(const fs::path& folder, const std::string& name) {
  static_cast<void>(find_files(folder, layout_of(name)));
}

Dataset generated_dataset(Index classes, Index train, Index test, std::uint64_t seed) {
  check_range("classes", classes, 2, 256);
  check_range("training images", train, 1, 100'000);
  check_range("test images", test, 1, 100'000);
  Rng rng(seed);
  std::vector<std::array<Grating, 2>> shared(static_cast<std::size_t>(classes));
  for (auto& gratings : shared) {
    for (Grating& grating : gratings) grating = random_grating(rng);
  }
  // What is usual for such images. Numbers computed from the pixels would make the normalisation
  // depend on how many there are.
  Dataset dataset{.name = "generated",
                  .classes = classes,
                  .train = {},
                  .test = {},
                  .mean = {0.5, 0.5, 0.5},
                  .deviation = {0.18, 0.18, 0.18}};
  dataset.train = generate_images(shared, train, rng);
  dataset.test = generate_images(shared, test, rng);
  return dataset;
}

std::vector<std::uint32_t> epoch_order(Index count, std::uint64_t seed, Index epoch) {
  if (count < 0 || count > static_cast<Index>(std::numeric_limits<std::uint32_t>::max())) {
    throw concertina::SizeError("an order of " + std::to_string(count) +
                                " images; there can be 0 to 4294967295");
  }
  std::vector<std::uint32_t> order(static_cast<std::size_t>(count));
  std::iota(order.begin(), order.end(), 0U);
  shuffle(order, SplitMix(key(Stream::order, seed, epoch)));
  return order;
}

std::vector<std::uint8_t> corrupted_labels(std::span<const std::uint8_t> labels, Index classes,
                                           double share, std::uint64_t seed) {
  if (!(share >= 0 && share <= 1)) {
    throw concertina::Error("a share of " + std::to_string(share) +
                            " of the labels to corrupt; 0 to 1 are possible");
  }
  std::vector<std::uint32_t> order(labels.size());
  std::iota(order.begin(), order.end(), 0U);
  shuffle(order, SplitMix(key(Stream::corrupted_order, seed, 0)));
  order.resize(static_cast<std::size_t>(std::llround(share * static_cast<double>(labels.size()))));
  std::vector<std::uint8_t> result(labels.begin(), labels.end());
  SplitMix generator(key(Stream::label, seed, 0));
  for (const std::uint32_t image : order) {
    result[image] =
        static_cast<std::uint8_t>(random_below(generator, static_cast<std::uint32_t>(classes)));
  }
  return result;
}

template <class Scalar, int Lanes>
void load_images(const Dataset& normalisation, const Images& images,
                 std::span<const std::uint32_t> which, const Augmentation* augmentation,
                 Scalar* to) {
  if (which.size() > Lanes) {
    throw concertina::ShapeError(std::to_string(which.size()) + " images for " +
                                 std::to_string(Lanes) + " lanes");
  }
  struct Source {
    const std::uint8_t* pixels;
    Crop crop;
  };
  std::array<Source, Lanes> sources{};
  for (std::size_t lane = 0; lane < which.size(); ++lane) {
    const std::size_t needed = (which[lane] + std::size_t{1}) * image_size;
    if (which[lane] >= images.labels.size() || needed > images.pixels.size()) {
      throw concertina::ShapeError("image " + std::to_string(which[lane]) + " of " +
                                   std::to_string(images.count()) + ", counted from 0" +
                                   (which[lane] < images.labels.size() ? ", has no pixels" : ""));
    }
    sources[lane] = {images.pixels.data() + static_cast<Index>(which[lane]) * image_size,
                     augmentation ? crop_of(*augmentation, which[lane]) : Crop{}};
  }
  if (which.size() < Lanes) std::fill_n(to, image_size * Lanes, Scalar(0));
  for (Index channel = 0; channel < colours; ++channel) {
    const double mean = normalisation.mean[static_cast<std::size_t>(channel)];
    const double deviation = normalisation.deviation[static_cast<std::size_t>(channel)];
    std::array<Scalar, 256> normalised;
    for (int value = 0; value < 256; ++value) {
      normalised[static_cast<std::size_t>(value)] =
          static_cast<Scalar>((value / 255.0 - mean) / deviation);
    }
    for (Index y = 0; y < side; ++y, to += side * Lanes) {
      for (std::size_t lane = 0; lane < which.size(); ++lane) {
        const auto& [pixels, crop] = sources[lane];
        std::array<std::uint8_t, side + 2 * border> row{};
        const Index from = y + crop.top - border;
        if (from >= 0 && from < side) {
          std::copy_n(pixels + channel * plane_size + from * side, side, row.begin() + border);
        }
        const std::uint8_t* pixel = row.data() + crop.left + (crop.flip ? side - 1 : 0);
        const Index step = crop.flip ? -1 : 1;
        for (Index x = 0; x < side; ++x, pixel += step) {
          to[x * Lanes + static_cast<Index>(lane)] = normalised[*pixel];
        }
      }
    }
  }
}

template void load_images<float, 16>(const Dataset&, const Images&, std::span<const std::uint32_t>,
                                     const Augmentation*, float*);
template void load_images<double, 16>(const Dataset&, const Images&, std::span<const std::uint32_t>,
                                      const Augmentation*, double*);

}  // namespace training
