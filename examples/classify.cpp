// Runs trained networks over CIFAR-10's test images and compares what they recognise with one
// another and with what the files say.
// SPDX-License-Identifier: Apache-2.0
//
//     classify MODEL.onnx [OTHER.onnx] cifar-10-batches-bin/test_batch.bin
//
// The images are those of https://www.cs.toronto.edu/~kriz/cifar.html, "CIFAR-10 binary version":
// records of one byte for the class and 3072 for the pixels, red, green, blue, each row-major.
#include "onnx/evaluate.hpp"
#include "text.hpp"

#include <concertina/io/onnx.hpp>

#include <CLI/CLI.hpp>

#include <algorithm>
#include <atomic>
#include <charconv>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <fstream>
#include <future>
#include <iostream>
#include <iterator>
#include <optional>
#include <sstream>
#include <string>
#include <thread>
#include <variant>
#include <vector>

namespace {

using concertina::onnx::DataType, concertina::onnx::Model;
using Index = std::ptrdiff_t;

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

template <class Scalar>
tool::Value images(const std::string& records, Index begin, Index end) {
  tool::Array<Scalar> batch{{end - begin, 3, 32, 32}, {}};
  batch.values.reserve(static_cast<std::size_t>((end - begin) * pixels));
  for (Index i = begin; i < end; ++i) {
    const auto* bytes = reinterpret_cast<const unsigned char*>(records.data()) + i * record;
    batch.values.insert(batch.values.end(), bytes + 1, bytes + record);
  }
  return batch;
}

/// In the numbers that the model's input asks for.
tool::Value images(DataType type, const std::string& records, Index begin, Index end) {
  switch (type) {
    case DataType::float16:
    case DataType::bfloat16:
    case DataType::float32: return images<float>(records, begin, end);
    case DataType::float64: return images<double>(records, begin, end);
    default: return images<std::int64_t>(records, begin, end);
  }
}

/// The class with the largest logit, for each image; on every core.
std::vector<Index> predictions(const Model& model, const std::string& records) {
  constexpr Index batch = 50;
  const Index count = image_count(records);
  const tool::Evaluator network(model);
  const auto input = std::ranges::find_if(model.inputs, [&](const auto& each) {
    const auto& constants = model.initializers;  // that old models count among their inputs
    return std::ranges::find(constants, each.name, &concertina::onnx::Tensor::name) ==
           constants.end();
  });
  if (input == model.inputs.end()) {
    throw concertina::FormatError(model.origin + ": a model without an input");
  }
  std::vector<Index> result(static_cast<std::size_t>(count));
  std::atomic<Index> next = 0;
  const auto work = [&] {
    for (Index begin = 0; (begin = next.fetch_add(batch)) < count;) {
      const Index end = std::min(begin + batch, count);
      const auto outputs = network({{input->name, images(input->type, records, begin, end)}});
      std::visit(
          [&](const auto& logits) {
            if (outputs.size() != 1 || logits.shape != std::vector<Index>{end - begin, classes}) {
              throw concertina::ShapeError(model.origin +
                                           ": the network does not give a number for each of " +
                                           std::to_string(classes) + " classes");
            }
            for (Index i = begin; i < end; ++i) {
              const auto row = logits.values.begin() + (i - begin) * classes;
              result[static_cast<std::size_t>(i)] = std::max_element(row, row + classes) - row;
            }
          },
          outputs.begin()->second);
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
std::optional<Index> stored_count(const Model& file, const std::string& key) {
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
  std::vector<std::string> files;  // models, one or two, and the batch
  Index limit = test_images;
};

/// Returns whether every count is what the files say, or cannot be compared.
bool classify(const Options& options) {
  std::vector<Model> models;
  for (std::size_t i = 0; i + 1 < options.files.size(); ++i) {
    models.push_back(concertina::onnx::read_model(options.files[i]));
  }
  const std::string records = read_images(options.files.back(), options.limit);
  const Index count = image_count(records);
  std::vector<std::vector<std::string>> rows = {
      {"model", "right", "of", "accuracy", "in the file", "seconds"}};
  std::vector<std::vector<Index>> predicted;
  bool matched = true;
  for (const Model& model : models) {
    const auto start = std::chrono::steady_clock::now();
    predicted.push_back(predictions(model, records));
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    Index right = 0;
    for (Index i = 0; i < count; ++i) {
      right += predicted.back()[static_cast<std::size_t>(i)] ==
               static_cast<unsigned char>(records[static_cast<std::size_t>(i * record)]);
    }
    const auto stored =
        stored_count(model, predicted.size() == 1 ? "correct.expanded" : "correct.compact");
    matched = matched && (!stored || count != test_images || right == *stored);
    rows.push_back({tool::printable(model.origin), tool::grouped(right), tool::grouped(count),
                    percentage(right, count), shown(stored), tool::brief(seconds.count())});
  }
  std::cout << tool::table(rows);
  if (predicted.size() == 2) {
    Index differing = 0;
    for (std::size_t i = 0; i < predicted[0].size(); ++i) {
      differing += predicted[0][i] != predicted[1][i];
    }
    const auto stored = stored_count(models[0], "predictions.differing");
    matched = matched && (!stored || count != test_images || differing == *stored);
    std::cout << "images on which the two models differ: " << tool::grouped(differing)
              << "; in the file: " << shown(stored) << '\n';
  }
  if (count != test_images) {
    std::cout << "The files' counts are of " << tool::grouped(test_images)
              << " images and are not compared.\n";
  } else if (!matched) {
    std::cout << "DIFFERENT from what the files state.\n";
  }
  return matched;
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app(
      "Runs one or two trained networks over CIFAR-10's test images, and compares what they "
      "recognise with one another and with what the files' metadata state: correct.expanded of the "
      "first, correct.compact of the second, predictions.differing of both.",
      "classify");
  app.footer(
      "Exit codes: 0 all is well; 1 a count is not the stated one; 2 the command line is wrong; 3 "
      "a file is not what it should be; 5 reading or memory failed.");
  Options options;
  app.add_option("FILES", options.files,
                 "ONNX models, one or two, and test_batch.bin of CIFAR-10's binary version")
      ->required()
      ->expected(2, 3);
  app.add_option("--limit", options.limit, "Only so many images")->check(CLI::PositiveNumber);
  try {
    app.parse(argc, argv);
    return tool::finish("classify", classify(options) ? tool::ok : tool::failed);
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == 0) return tool::finish("classify", app.exit(error));
    std::cerr << "classify: error: " << tool::printable(error.what()) << "; see classify --help\n";
    return tool::usage;
  } catch (...) {
    return tool::report_error("classify");
  }
}
