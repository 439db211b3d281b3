// Rows of numbers that read back exactly, and lines for people.
// SPDX-License-Identifier: Apache-2.0
#include "log.hpp"

#include "text.hpp"
#include "text_file.hpp"

#include <concertina/error.hpp>

#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <iostream>
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

// ---- the bar ------------------------------------------------------------------------------------

namespace {

/// At most seven significant digits, whatever the number: a diverging loss must not fill the line.
std::string significant(double number) {
  std::array<char, 32> text;
  std::snprintf(text.data(), text.size(), "%.4g", number);
  return text.data();
}

std::string percentage(double part, int decimals) {
  std::array<char, 32> text;
  std::snprintf(text.data(), text.size(), "%.*f%%", decimals,
                std::clamp(100 * part, -999.0, 999.0));
  return text.data();
}

std::string rate(double images_per_second) {
  std::array<char, 32> text;
  std::snprintf(text.data(), text.size(), "%.0f images/s",
                std::clamp(images_per_second, 0.0, 999'999'999.0));
  return text.data();
}

std::string epoch_of(Index epoch, Index epochs) {
  const std::string all = std::to_string(epochs);
  std::string text = std::to_string(epoch);
  if (text.size() < all.size()) text.insert(0, all.size() - text.size(), ' ');
  return "epoch " + text + '/' + all;
}

double quotient(double a, double b) { return b > 0 ? a / b : 0; }

/// Of the terminal that standard error is.
Index terminal_width() {
  winsize size{};
  return ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0 ? size.ws_col : 80;
}

double steady_seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

std::string clock_time(double seconds) {
  if (!(seconds >= 0 && seconds < 3600.0 * 10'000 - 1)) return "-:--:--";
  const long whole = std::lround(seconds);
  std::array<char, 32> text;
  std::snprintf(text.data(), text.size(), "%ld:%02ld:%02ld", whole / 3600, whole / 60 % 60,
                whole % 60);
  return text.data();
}

std::string progress_line(const Progress& progress, Index width) {
  const double part = std::clamp(
      quotient(static_cast<double>(progress.images), static_cast<double>(progress.total)), 0.0,
      1.0);
  const std::string before = epoch_of(progress.epoch, progress.epochs) + " ";
  const std::string after =
      "  loss " + significant(progress.loss) + "  accuracy " + percentage(progress.accuracy, 1) +
      "  " + rate(progress.images_per_second) + "  " + clock_time(progress.seconds_left) + " left";
  const Index words = std::ssize(before) + std::ssize(after);
  std::string line = before;
  // A bar of fewer than four steps says less than the numbers do.
  if (const Index room = std::min<Index>(width - words - 2, 40); room >= 4) {
    const auto full = static_cast<std::size_t>(part * static_cast<double>(room));
    line += '[' + std::string(full, '#') + std::string(static_cast<std::size_t>(room) - full, '.') +
            ']';
  } else {
    line += percentage(part, 0);
  }
  line += after;
  return line.substr(0, static_cast<std::size_t>(std::max<Index>(width, 0)));
}

ProgressBar::ProgressBar(Index epochs, Index images, Index finished)
    : ProgressBar(epochs, images, finished, std::cerr, isatty(STDERR_FILENO) != 0, steady_seconds) {
}

ProgressBar::ProgressBar(Index epochs, Index images, Index finished, std::ostream& out,
                         bool terminal, std::function<double()> clock)
    : epochs_(epochs),
      images_(images),
      finished_(finished),
      out_(out),
      terminal_(terminal),
      clock_(std::move(clock)),
      start_(clock_()),
      epoch_start_(start_),
      drawn_(-std::numeric_limits<double>::infinity()) {}

void ProgressBar::begin_epoch(Index epoch) {
  epoch_ = epoch;
  epoch_start_ = clock_();
}

void ProgressBar::update(Index images, double loss, double accuracy) {
  if (!terminal_) return;
  const double now = clock_();
  if (now < drawn_ + 0.1) return;
  drawn_ = now;
  const auto seen = static_cast<double>(images);
  const double part = std::min(quotient(seen, static_cast<double>(images_)), 1.0);
  const Progress progress{.epoch = epoch_,
                          .epochs = epochs_,
                          .images = images,
                          .total = images_,
                          .loss = loss,
                          .accuracy = accuracy,
                          .images_per_second = quotient(seen, now - epoch_start_),
                          .seconds_left = seconds_left(static_cast<double>(epoch_ - 1) + part)};
  // In the last column a terminal may already go on to the next line.
  out_ << "\r\x1b[K" << progress_line(progress, terminal_width() - 1) << std::flush;
  shown_ = true;
}

void ProgressBar::end_epoch(const EpochRecord& record) {
  clear();
  out_ << epoch_of(record.epoch, epochs_) << "  loss " << significant(record.train_loss)
       << "  accuracy " << percentage(record.train_accuracy, 2) << "  test loss "
       << significant(record.test_loss) << "  test accuracy " << percentage(record.test_accuracy, 2)
       << "  " << rate(record.images_per_second) << "  " << clock_time(record.seconds) << "  "
       << clock_time(seconds_left(static_cast<double>(record.epoch))) << " left" << std::endl;
}

void ProgressBar::clear() {
  if (shown_) out_ << "\r\x1b[K" << std::flush;
  shown_ = false;
}

double ProgressBar::seconds_left(double epochs_finished) const {
  const double done = epochs_finished - static_cast<double>(finished_);
  if (!(done > 0)) return std::numeric_limits<double>::quiet_NaN();
  return (clock_() - start_) * std::max(static_cast<double>(epochs_) - epochs_finished, 0.0) / done;
}

}  // namespace cifar
