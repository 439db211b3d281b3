// Runs a trained network over CIFAR-10's test images, expanded and compact, and compares what it
// recognises with what the file says.
// SPDX-License-Identifier: Apache-2.0
//
//     classify NETWORK.safetensors cifar-10-batches-bin/test_batch.bin
//
// The images are those of https://www.cs.toronto.edu/~kriz/cifar.html, "CIFAR-10 binary version":
// records of one byte for the class and 3072 for the pixels, red, green, blue, each row-major.
#include "networks/graph.hpp"
#include "networks/inference.hpp"
#include "text.hpp"

#include <concertina/io/safetensors.hpp>

#include <CLI/CLI.hpp>

#include <algorithm>
#include <atomic>
#include <charconv>
#include <chrono>
#include <cstddef>
#include <fstream>
#include <future>
#include <iostream>
#include <iterator>
#include <optional>
#include <sstream>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace {

using tool::Form, tool::Index, tool::Tensor;

constexpr Index pixels = 3 * 32 * 32, record = 1 + pixels, classes = 10;
constexpr Index test_images = 10'000;  // what the counts in a file are counts of

/// The first records of a batch, at most `limit`.
std::string read_images(const std::string& path, Index limit) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw concertina::IoError(path + ": cannot be opened");
  std::string bytes{std::istreambuf_iterator<char>(file), {}};
  if (file.bad()) throw concertina::IoError(path + ": cannot be read");
  const auto size = static_cast<Index>(bytes.size());
  if (size == 0 || size % record != 0) {
    throw concertina::FormatError(path + ": " + std::to_string(size) +
                                  " bytes are no batch of CIFAR-10's binary version, whose records "
                                  "have " +
                                  std::to_string(record) + " bytes");
  }
  bytes.resize(static_cast<std::size_t>(std::min(size / record, limit) * record));
  for (std::size_t i = 0; i < bytes.size(); i += record) {
    if (static_cast<unsigned char>(bytes[i]) >= classes) {
      throw concertina::FormatError(
          path + ": record " + std::to_string(i / record) + " is of class " +
          std::to_string(static_cast<unsigned char>(bytes[i])) + ", but classes are 0 to 9");
    }
  }
  return bytes;
}

Index image_count(const std::string& records) {
  return static_cast<Index>(records.size()) / record;
}

Tensor<float> images(const std::string& records, Index begin, Index end) {
  Tensor<float> batch{{end - begin, 3, 32, 32}, {}};
  batch.values.reserve(static_cast<std::size_t>((end - begin) * pixels));
  for (Index i = begin; i < end; ++i) {
    for (Index pixel = 1; pixel < record; ++pixel) {
      const char byte = records[static_cast<std::size_t>(i * record + pixel)];
      batch.values.push_back(static_cast<float>(static_cast<unsigned char>(byte)));
    }
  }
  return batch;
}

/// The class with the largest logit, for each image; on every core.
std::vector<Index> predictions(const tool::Network<float>& network, const std::string& records) {
  constexpr Index batch = 50;
  const Index count = image_count(records);
  std::vector<Index> result(static_cast<std::size_t>(count));
  std::atomic<Index> next = 0;
  const auto work = [&] {
    for (Index begin = 0; (begin = next.fetch_add(batch)) < count;) {
      const Index end = std::min(begin + batch, count);
      const Tensor<float> logits = network(images(records, begin, end));
      if (logits.shape != std::vector<Index>{end - begin, classes}) {
        throw concertina::ShapeError("the network does not give a number for each of " +
                                     std::to_string(classes) + " classes");
      }
      for (Index i = begin; i < end; ++i) {
        const auto row = logits.values.begin() + (i - begin) * classes;
        result[static_cast<std::size_t>(i)] = std::max_element(row, row + classes) - row;
      }
    }
  };
  std::vector<std::future<void>> workers;
  for (unsigned i = 0; i < std::max(1U, std::thread::hardware_concurrency()); ++i) {
    workers.push_back(std::async(std::launch::async, work));
  }
  for (auto& worker : workers) worker.get();
  return result;
}

/// A count in a file's metadata; none where it is not there.
std::optional<Index> stored_count(const concertina::io::Safetensors& file, const std::string& key) {
  const auto found = file.metadata.find(key);
  if (found == file.metadata.end()) return std::nullopt;
  Index count = 0;
  const char* const end = found->second.data() + found->second.size();
  if (std::from_chars(found->second.data(), end, count).ptr != end || found->second.empty()) {
    throw concertina::FormatError(file.origin + ": metadata " + tool::in_quotes(key) + " is " +
                                  tool::in_quotes(found->second) + ", expected a count");
  }
  return count;
}

std::string shown(const std::optional<Index>& count) {
  return count ? tool::grouped(*count) : "not stated";
}

/// With two decimals.
std::string percentage(Index part, Index whole) {
  std::ostringstream text;
  text.precision(2);
  text << std::fixed << 100.0 * static_cast<double>(part) / static_cast<double>(whole) << '%';
  return text.str();
}

struct Options {
  std::string network, images, form;
  Index limit = test_images;
};

/// Returns whether every count is what the file says, or cannot be compared.
bool classify(const Options& options) {
  const auto file = concertina::io::read_safetensors(options.network);
  const tool::Node graph = tool::parse_graph(file);
  const std::string records = read_images(options.images, options.limit);
  const Index count = image_count(records);
  std::vector<std::vector<std::string>> rows = {
      {"form", "right", "of", "accuracy", "in the file", "seconds"}};
  std::vector<std::vector<Index>> predicted;
  bool matched = true;
  for (const auto& [form, name] :
       {std::pair(Form::expanded, "expanded"), std::pair(Form::compact, "compact")}) {
    if (!options.form.empty() && options.form != name) continue;
    const tool::Network<float> network(file, graph, form);
    const auto start = std::chrono::steady_clock::now();
    predicted.push_back(predictions(network, records));
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    Index right = 0;
    for (Index i = 0; i < count; ++i) {
      right += predicted.back()[static_cast<std::size_t>(i)] ==
               static_cast<unsigned char>(records[static_cast<std::size_t>(i * record)]);
    }
    const auto stored = stored_count(file, std::string("correct.") + name);
    matched = matched && (!stored || count != test_images || right == *stored);
    rows.push_back({name, tool::grouped(right), tool::grouped(count), percentage(right, count),
                    shown(stored), tool::brief(seconds.count())});
  }
  std::cout << tool::table(rows);
  if (predicted.size() == 2) {
    Index differing = 0;
    for (std::size_t i = 0; i < predicted[0].size(); ++i) {
      differing += predicted[0][i] != predicted[1][i];
    }
    const auto stored = stored_count(file, "predictions.differing");
    matched = matched && (!stored || count != test_images || differing == *stored);
    std::cout << "images on which the two forms differ: " << tool::grouped(differing)
              << "; in the file: " << shown(stored) << '\n';
  }
  if (count != test_images) {
    std::cout << "The file's counts are of " << tool::grouped(test_images)
              << " images and are not compared.\n";
  } else if (!matched) {
    std::cout << "DIFFERENT from what the file states.\n";
  }
  return matched;
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app(
      "Runs a trained network over CIFAR-10's test images, expanded and compact, and compares what "
      "it recognises with what the file states.",
      "classify");
  app.footer(
      "Exit codes: 0 all is well; 1 a count is not the stated one; 2 the command line is wrong; 3 "
      "a "
      "file cannot be read, or is not what it should be.");
  Options options;
  app.add_option("NETWORK", options.network, "A network, as in the large reference data's trained/")
      ->required();
  app.add_option("BATCH", options.images, "test_batch.bin of CIFAR-10's binary version")
      ->required();
  app.add_option("--form", options.form, "Only this form")
      ->check(CLI::IsMember({"expanded", "compact"}));
  app.add_option("--limit", options.limit, "Only so many images")->check(CLI::PositiveNumber);
  try {
    app.parse(argc, argv);
    return classify(options) ? tool::ok : tool::failed;
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? tool::ok : tool::usage;
  } catch (const std::exception& error) {
    std::cerr << "classify: error: " << tool::printable(error.what()) << '\n';
    return tool::bad_file;
  }
}
