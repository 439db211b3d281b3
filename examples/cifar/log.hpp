// What a training reports: a row of a CSV file for every epoch, and a line for people.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/detail/io/files.hpp>  // FileHandle
#include <concertina/shape.hpp>            // Index

#include <cstdio>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace cifar {

using concertina::Index;

/// What is known of an epoch when it is over. Accuracies are in 0 .. 1. Losses are cross-entropies
/// with the labels, whatever else is learned from.
struct EpochRecord {
  Index epoch = 0;  ///< counted from 1
  double learning_rate = 0, train_loss = 0, train_accuracy = 0, test_loss = 0, test_accuracy = 0;
  double images_per_second = 0, seconds = 0;
  std::optional<double> min_similarity = {};  ///< of gradients, if it was measured

  friend bool operator==(const EpochRecord&, const EpochRecord&) = default;
};

/// A CSV file with a row for every epoch, after comments and a line with the columns' names:
///
///     # cifar --seed 1
///     epoch,learning_rate,train_loss,train_accuracy,test_loss,test_accuracy,best_test_accuracy,
///       images_per_second,seconds,min_gradient_similarity    (on one line)
///     1,0.1,1.5,0.45,1.25,0.55,0.55,2000,25,-0.5
///
/// Numbers have the fewest digits that read back as the same numbers; what was not measured is
/// empty.
class CsvLog {
 public:
  /// Starts a file, in the place of one that may be there: each comment a line after "# ".
  /// Throws    IoError if there is something other than a file, or the file cannot be written
  CsvLog(const std::filesystem::path& path, const std::vector<std::string>& comments);

  /// Continues a file after `epochs` epochs: later rows go, and so does a last line that was cut
  /// short; comments are added to those there unless they are there already. If there is no file,
  /// starts one. Until everything is written, the old file stays.
  /// Throws    as above, and as read()
  static CsvLog resume(const std::filesystem::path& path, const std::vector<std::string>& comments,
                       Index epochs);

  /// Appends a row, and passes it to the system at once.
  /// Requires  an epoch after those there are, otherwise throws Error
  /// Throws    IoError if it cannot be written
  void add(const EpochRecord& record);

  /// Rows that there are.
  Index epochs() const { return epochs_; }

  /// The best test accuracy of all rows; 0 before the first.
  double best_test_accuracy() const { return best_; }

  /// The rows of a file.
  /// Throws    IoError if it is no regular file or cannot be read, SizeError if it is beyond
  ///           64 MiB, FormatError naming the line: no header, another number of fields, a field
  ///           that is no number or beyond its range, a best accuracy that is not the rows', epochs
  ///           that do not rise, a last line that was cut short
  static std::vector<EpochRecord> read(const std::filesystem::path& path);

 private:
  CsvLog() = default;
  void append_to(const std::filesystem::path& path);

  std::string path_;
  concertina::io::detail::FileHandle file_;
  Index epochs_ = 0, last_epoch_ = 0;
  double best_ = 0;
};

/// An epoch for people, with the time that those after it take at its pace:
///
///     epoch  3/150  loss 1.235  accuracy 50.00%  test loss 1.2  test accuracy 55.55%
///       1234 images/s  0:00:12  0:29:24 left    (on one line)
std::string epoch_line(const EpochRecord& record, Index epochs);

}  // namespace cifar
