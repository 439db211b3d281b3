// Rows of numbers that read back exactly, and lines for people.
// SPDX-License-Identifier: Apache-2.0
#include "log.hpp"

#include "text.hpp"
#include "text_file.hpp"

#include <concertina/error.hpp>

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>
#include <string_view>
#include <system_error>
#include <utility>

namespace cifar {

namespace {

namespace fs = std::filesystem;

// ---- rows ---------------------------------------------------------------------------------------

struct EpochRow : EpochRecord {
  double best = 0;
};

/// The columns between the epoch and the similarity, which may be empty.
struct Column {
  std::string_view name;
  double EpochRow::* number;
  double most = std::numeric_limits<double>::max();  // it is not negative
};
constexpr std::array columns = {Column{"learning_rate", &EpochRow::learning_rate},
                                Column{"train_loss", &EpochRow::train_loss},
                                Column{"train_accuracy", &EpochRow::train_accuracy, 1},
                                Column{"test_loss", &EpochRow::test_loss},
                                Column{"test_accuracy", &EpochRow::test_accuracy, 1},
                                Column{"best_test_accuracy", &EpochRow::best, 1},
                                Column{"images_per_second", &EpochRow::images_per_second},
                                Column{"seconds", &EpochRow::seconds}};
constexpr std::string_view last_column = "min_gradient_similarity";

const std::string header = [] {
  std::string text = "epoch,";
  for (const Column& column : columns) text.append(column.name) += ',';
  return text.append(last_column);
}();

struct Contents {
  std::vector<std::string> comments;  // without "# "
  std::vector<EpochRow> rows;
};

std::string line_of(const EpochRow& row) {
  std::string line = shortest(row.epoch);
  for (const Column& column : columns) line += ',' + shortest(row.*column.number);
  return line + ',' + (row.min_similarity ? shortest(*row.min_similarity) : "") + '\n';
}

/// A comment on one line: an argument of a command line may have line breaks.
std::string one_line(std::string text) {
  for (char& c : text) {
    if (static_cast<unsigned char>(c) < ' ') c = ' ';
  }
  return text;
}

/// `cut_short` says whether a last line without an end is left out, or refused.
Contents parse(const fs::path& path, bool cut_short) {
  constexpr std::uintmax_t limit = 64 << 20;  // half a million epochs
  const std::string text = read_text(path, limit, "the log of a training");
  std::vector<std::string_view> lines = split(text, '\n');
  Contents contents;
  bool headed = false;
  for (std::size_t n = 0; n < lines.size(); ++n) {
    const std::string_view line = lines[n];
    const auto refuse = [&](const std::string& why) {
      throw concertina::FormatError(path.string() + ": line " + std::to_string(n + 1) + ": " + why);
    };
    if (n + 1 == lines.size()) {
      if (!line.empty() && !cut_short) {
        refuse("the line does not end; resume the training, or remove the line");
      }
      if (!headed) refuse("the file ends before the line \"" + header + '"');
      break;
    }
    if (!headed && line.starts_with('#')) {
      contents.comments.emplace_back(line.substr(line.starts_with("# ") ? 2 : 1));
      continue;
    }
    if (!headed) {
      if (line != header) refuse("expected \"" + header + "\" before the rows");
      headed = true;
      continue;
    }
    const std::vector<std::string_view> fields = split(line, ',');
    if (fields.size() != columns.size() + 2) {
      refuse(std::to_string(fields.size()) + " fields, expected " +
             std::to_string(columns.size() + 2));
    }
    const auto epoch = number_in<Index>(fields[0]);
    const Index last = contents.rows.empty() ? 0 : contents.rows.back().epoch;
    if (!epoch || *epoch <= last) {
      refuse("the epoch is \"" + std::string(fields[0].substr(0, 40)) +
             "\", expected a number from " + std::to_string(last + 1) + " on");
    }
    const auto number = [&](std::string_view name, std::string_view field, double least,
                            double most) {
      const auto read = number_in<double>(field);
      if (!read || !(*read >= least && *read <= most)) {
        const bool bounded = most < std::numeric_limits<double>::max();
        refuse(std::string(name) + " is \"" + std::string(field.substr(0, 40)) +
               "\", expected a number from " + shortest(least) +
               (bounded ? " to " + shortest(most) : " on"));
      }
      return *read;
    };
    const double best = contents.rows.empty() ? 0 : contents.rows.back().best;
    EpochRow& row = contents.rows.emplace_back();
    row.epoch = *epoch;
    for (std::size_t k = 0; k < columns.size(); ++k) {
      row.*columns[k].number = number(columns[k].name, fields[k + 1], 0, columns[k].most);
    }
    if (!fields.back().empty()) row.min_similarity = number(last_column, fields.back(), -1, 1);
    if (row.best != std::max(best, row.test_accuracy)) {
      refuse("best_test_accuracy is " + shortest(row.best) + ", that of the rows so far is " +
             shortest(std::max(best, row.test_accuracy)));
    }
  }
  return contents;
}

/// Replaces the file when all is written.
void write(const fs::path& path, const Contents& contents) {
  std::string text;
  for (const std::string& comment : contents.comments) text += "# " + one_line(comment) + '\n';
  text += header + '\n';
  for (const EpochRow& row : contents.rows) text += line_of(row);
  write_text(path, text);
}

}  // namespace

CsvLog::CsvLog(const fs::path& path, const std::vector<std::string>& comments) {
  write(path, {comments, {}});
  append_to(path);
}

CsvLog CsvLog::resume(const fs::path& path, const std::vector<std::string>& comments,
                      Index epochs) {
  std::error_code error;
  if (fs::status(path, error).type() == fs::file_type::not_found) return {path, comments};
  Contents contents = parse(path, true);
  std::erase_if(contents.rows, [epochs](const EpochRow& row) { return row.epoch > epochs; });
  for (const std::string& comment : comments) {
    if (std::ranges::find(contents.comments, one_line(comment)) == contents.comments.end()) {
      contents.comments.push_back(comment);
    }
  }
  write(path, contents);
  CsvLog log;
  log.epochs_ = std::ssize(contents.rows);
  if (!contents.rows.empty()) {
    log.last_epoch_ = contents.rows.back().epoch;
    log.best_ = contents.rows.back().best;
  }
  log.append_to(path);
  return log;
}

void CsvLog::append_to(const fs::path& path) {
  path_ = path.string();
  file_.reset(std::fopen(path_.c_str(), "ab"));
  if (!file_) cannot_write(path_, tool::system_message());
}

void CsvLog::add(const EpochRecord& record) {
  if (record.epoch <= last_epoch_) {
    throw concertina::Error(path_ + ": epoch " + std::to_string(record.epoch) +
                            " cannot follow epoch " + std::to_string(last_epoch_));
  }
  const double best = record.test_accuracy > best_ ? record.test_accuracy : best_;
  const std::string line = line_of({record, best});
  if (std::fwrite(line.data(), 1, line.size(), file_.get()) != line.size() ||
      std::fflush(file_.get()) != 0) {
    cannot_write(path_, tool::system_message());
  }
  ++epochs_;
  last_epoch_ = record.epoch;
  best_ = best;
}

std::vector<EpochRecord> CsvLog::read(const fs::path& path) {
  std::vector<EpochRecord> records;
  for (const EpochRow& row : parse(path, false).rows) records.push_back(row);
  return records;
}

// ---- lines for people ---------------------------------------------------------------------------

namespace {

/// Hours, minutes and seconds: 1:02:03.
std::string clock_time(double seconds) {
  if (!(seconds >= 0 && seconds < 3600.0 * 10'000 - 1)) return "-:--:--";
  const long whole = std::lround(seconds);
  std::array<char, 32> text;
  std::snprintf(text.data(), text.size(), "%ld:%02ld:%02ld", whole / 3600, whole / 60 % 60,
                whole % 60);
  return text.data();
}

}  // namespace

std::string epoch_line(const EpochRecord& record, Index epochs) {
  std::array<char, 256> text;
  std::snprintf(text.data(), text.size(),
                "epoch %*td/%td  loss %.4g  accuracy %.2f%%  test loss %.4g  test accuracy %.2f%%  "
                "%.0f images/s  %s  %s left",
                static_cast<int>(std::to_string(epochs).size()), record.epoch, epochs,
                record.train_loss, 100 * record.train_accuracy, record.test_loss,
                100 * record.test_accuracy, record.images_per_second,
                clock_time(record.seconds).c_str(),
                clock_time(record.seconds * static_cast<double>(epochs - record.epoch)).c_str());
  return text.data();
}

}  // namespace cifar
