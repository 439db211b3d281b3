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
#include <limits>
#include <numeric>
#include <random>
#include <span>
#include <system_error>
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
struct Format {
  std::string name, folder, archive;
  std::vector<std::string> train, test;  // of MNIST the images, then the labels
  std::vector<Label> labels;             // one byte each before the pixels; the last is the class
  std::array<double, 3> mean, deviation;
  std::vector<std::string> unreadable;  // what another version is called
  std::string why;                      // that cannot be read

  bool is_mnist() const { return name == "mnist"; }
  std::vector<std::string> files() const {
    std::vector<std::string> all = train;
    all.insert(all.end(), test.begin(), test.end());
    return all;
  }
};

/// Means and deviations are those with which the published accuracies were trained, rounded as
/// there.
const Format& format_of(const std::string& name) {
  static const std::string python =
      "this holds the Python version, and the binary version is needed";
  static const std::array formats = {
      Format{.name = "cifar10",
             .folder = "cifar-10-batches-bin",
             .archive = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
             .train = {"data_batch_1.bin", "data_batch_2.bin", "data_batch_3.bin",
                       "data_batch_4.bin", "data_batch_5.bin"},
             .test = {"test_batch.bin"},
             .labels = {{"class", 10}},
             .mean = {125.3 / 255, 123.0 / 255, 113.9 / 255},
             .deviation = {63.0 / 255, 62.1 / 255, 66.7 / 255},
             .unreadable = {"cifar-10-batches-py", "data_batch_1"},
             .why = python},
      Format{.name = "cifar100",
             .folder = "cifar-100-binary",
             .archive = "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
             .train = {"train.bin"},
             .test = {"test.bin"},
             .labels = {{"coarse class", 20}, {"fine class", 100}},
             .mean = {0.5071, 0.4867, 0.4408},
             .deviation = {0.2675, 0.2565, 0.2761},
             .unreadable = {"cifar-100-python", "train"},
             .why = python},
      Format{.name = "mnist",
             .folder = "MNIST/raw",
             .archive = "https://ossci-datasets.s3.amazonaws.com/mnist, to be unpacked",
             .train = {"train-images-idx3-ubyte", "train-labels-idx1-ubyte"},
             .test = {"t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"},
             .labels = {{"class", 10}},
             .mean = {0.1307, 0.1307, 0.1307},
             .deviation = {0.3081, 0.3081, 0.3081},
             .unreadable = {"train-images-idx3-ubyte.gz"},
             .why = "the files are packed; unpack them with gunzip"}};
  const auto found = std::ranges::find(formats, name, &Format::name);
  if (found != formats.end()) return *found;
  throw concertina::Error("there is no data set \"" + name +
                          "\" to read; those that are read are cifar10, cifar100 and mnist");
}

/// The folder that holds the files: this one, or the one in it.
fs::path find_files(const fs::path& folder, const Format& format) {
  std::error_code error;
  const std::vector<std::string> files = format.files();
  const auto fail = [&](const fs::path& path, const std::string& why) {
    throw concertina::IoError(path.string() + ": " + why + "; " + format.name + " is read from " +
                              tool::listed(files) + ", in the folder itself or in its folder " +
                              format.folder + "; they are in " + format.archive);
  };
  const fs::file_status status = fs::status(folder, error);
  if (!fs::exists(status)) fail(folder, error ? error.message() : "there is no such folder");
  if (!fs::is_directory(status)) fail(folder, "this is no folder");
  const auto in = [&error](const fs::path& candidate) {
    return [&error, candidate](const std::string& name) {
      return fs::exists(candidate / name, error);
    };
  };
  // With the files in both places, the folder that was asked for is meant.
  const bool outer = std::ranges::any_of(files, in(folder));
  const fs::path found = outer ? folder : folder / format.folder;
  std::vector<std::string> missing = files;
  std::erase_if(missing, in(found));
  if (missing == files) {
    const bool unreadable = std::ranges::any_of(format.unreadable, in(folder));
    fail(folder, unreadable ? format.why : "the images are not there");
  }
  if (!missing.empty()) {
    fail(found, tool::listed(missing) + (missing.size() == 1 ? " is missing" : " are missing"));
  }
  return found;
}

using File = std::pair<concertina::io::detail::FileHandle, Index>;  // and its bytes

File open_images(const fs::path& path, const Format& format) {
  // The largest official file has 153.7 MB; a sparse one can claim to be of any size.
  constexpr Index limit = 256 << 20;
  File file = concertina::io::detail::open_file(path);
  if (file.second <= limit) return file;
  throw concertina::SizeError(path.string() + ": " + std::to_string(file.second) +
                              " bytes, more than the " + std::to_string(limit) +
                              " that a file of " + format.name + " may have");
}

std::vector<std::uint8_t> read_bytes(const fs::path& path, const File& file, Index count) {
  std::vector<std::uint8_t> bytes(static_cast<std::size_t>(count));
  concertina::io::detail::read_next(path, file.first.get(),
                                    std::as_writable_bytes(std::span(bytes)));
  return bytes;
}

[[noreturn]] void refuse(const fs::path& path, const std::string& why,
                         const std::string& remedy = "extract the file from its archive again") {
  throw concertina::FormatError(path.string() + ": " + why + "; " + remedy);
}

/// Appends the images of a file of CIFAR.
void read_records(const fs::path& path, const Format& format, Images& images) {
  const File file = open_images(path, format);
  const Index record = std::ssize(format.labels) + image_size;
  const Index count = file.second / record, rest = file.second % record;
  const std::string records =
      "the records of " + format.name + " have " + std::to_string(record) + " bytes";
  if (file.second == 0) refuse(path, "the file is empty, and " + records);
  const auto place = [&](Index n, Index byte) {
    return "record " + std::to_string(n) + ", at byte " + std::to_string(n * record + byte);
  };
  if (rest != 0) {
    refuse(path, place(count, 0) + ", has " + std::to_string(rest) +
                     " bytes up to the end of the file, but " + records);
  }
  images.pixels.reserve(images.pixels.size() + static_cast<std::size_t>(count * image_size));
  for (Index n = 0; n < count; ++n) {
    const std::vector<std::uint8_t> bytes = read_bytes(path, file, record);
    auto byte = bytes.begin();
    for (const auto& [label, classes] : format.labels) {
      if (*byte++ < classes) continue;
      refuse(path,
             place(n, byte - 1 - bytes.begin()) + ": " + label + " " + std::to_string(*(byte - 1)) +
                 ", but they are 0 to " + std::to_string(classes - 1),
             "is this a file of " + format.name + ", binary version?");
    }
    images.labels.push_back(*(byte - 1));
    images.pixels.insert(images.pixels.end(), byte, bytes.end());
  }
}

/// The bytes of a file of MNIST, whose header must say as many of these extents.
/// Source  http://yann.lecun.com/exdb/mnist, "the IDX file format"
std::vector<std::uint8_t> read_idx(const fs::path& path, const Format& format,
                                   const std::vector<Index>& extents) {
  const File file = open_images(path, format);
  // Of unsigned bytes, with so many dimensions; how many records (read); the extents of each.
  std::vector<Index> words = {0x801 + std::ssize(extents), 0};
  words.insert(words.end(), extents.begin(), extents.end());
  const Index header = 4 * std::ssize(words);
  if (file.second < header) {
    refuse(path, "the file has " + std::to_string(file.second) + " bytes, its header alone " +
                     std::to_string(header));
  }
  const std::vector<std::uint8_t> bytes = read_bytes(path, file, header);
  Index size = 1;
  for (std::size_t w = 0; w < words.size(); ++w) {
    Index word = 0;
    for (std::size_t byte = 4 * w; byte < 4 * w + 4; ++byte) word = word << 8 | bytes[byte];
    if (w == 1) words[w] = word;
    if (w > 1) size *= words[w];
    if (word == words[w]) continue;
    refuse(path, (w == 0 ? "the magic number at byte " : "the extent at byte ") +
                     std::to_string(4 * w) + " is " + std::to_string(word) + ", expected " +
                     std::to_string(words[w]));
  }
  const Index count = words[1];
  if (count == 0 || header + count * size != file.second) {
    refuse(path, std::to_string(count) + " of " + std::to_string(size) +
                     " bytes each do not make the " + std::to_string(file.second) +
                     " bytes that there are");
  }
  return read_bytes(path, file, count * size);
}

/// The images of MNIST, each in the middle of 32 by 32 pixels and in all three colours.
Images read_mnist(const fs::path& folder, const std::vector<std::string>& files,
                  const Format& format) {
  constexpr Index extent = 28, margin = (side - extent) / 2;
  const fs::path label_file = folder / files[1];
  const auto digits = read_idx(folder / files[0], format, {extent, extent});
  Images images{.pixels = {}, .labels = read_idx(label_file, format, {})};
  const Index count = std::ssize(digits) / (extent * extent);
  if (images.count() != count) {
    refuse(label_file, std::to_string(images.count()) + " labels, but " + files[0] + " has " +
                           std::to_string(count) + " images");
  }
  const auto wrong = std::ranges::find_if(images.labels, [](int label) { return label > 9; });
  if (wrong != images.labels.end()) {
    refuse(label_file, "the label at byte " + std::to_string(8 + (wrong - images.labels.begin())) +
                           " is " + std::to_string(*wrong) + ", but they are 0 to 9");
  }
  images.pixels.resize(static_cast<std::size_t>(count * image_size));
  auto row = digits.begin();
  for (Index n = 0; n < count; ++n) {
    for (Index y = margin; y < margin + extent; ++y, row += extent) {
      for (Index colour = 0; colour < colours; ++colour) {
        std::copy_n(row, extent,
                    images.pixels.begin() + ((n * colours + colour) * side + y) * side + margin);
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

/// A permutation of 0 .. count - 1, every one as probable.
/// Source  the Fisher-Yates shuffle as Durstenfeld wrote it, Communications of the ACM 1964
std::vector<std::uint32_t> shuffled(std::size_t count, SplitMix generator) {
  std::vector<std::uint32_t> order(count);
  std::iota(order.begin(), order.end(), 0U);
  for (std::size_t n = count; n > 1; --n) {
    std::swap(order[n - 1], order[random_below(generator, static_cast<std::uint32_t>(n))]);
  }
  return order;
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
  const Format& format = format_of(name);
  const fs::path found = find_files(folder, format);
  Dataset dataset{.name = name,
                  .classes = format.labels.back().classes,
                  .train = {},
                  .test = {},
                  .mean = format.mean,
                  .deviation = format.deviation,
                  .augmented = !format.is_mnist()};
  for (const auto& [files, images] :
       {std::pair(&format.train, &dataset.train), std::pair(&format.test, &dataset.test)}) {
    if (format.is_mnist()) {
      *images = read_mnist(found, *files, format);
    } else {
      for (const std::string& file : *files) read_records(found / file, format, *images);
    }
  }
  return dataset;
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
  return shuffled(static_cast<std::size_t>(count), SplitMix(key(Stream::order, seed, epoch)));
}

std::vector<std::uint8_t> corrupted_labels(std::span<const std::uint8_t> labels, Index classes,
                                           double share, std::uint64_t seed) {
  if (!(share >= 0 && share <= 1)) {
    throw concertina::Error("a share of " + std::to_string(share) +
                            " of the labels to corrupt; 0 to 1 are possible");
  }
  auto order = shuffled(labels.size(), SplitMix(key(Stream::corrupted_order, seed, 0)));
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
