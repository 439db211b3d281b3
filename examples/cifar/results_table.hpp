// A table of the paper, ours beside theirs: from what trainings came to, to Markdown and CSV.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "experiments.hpp"
#include "log.hpp"

#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <vector>

namespace cifar {

/// What a finished training came to. Accuracies in 0 .. 1; not a number for what is not known.
struct Outcome {
  double best_test = 0, last_test = 0, last_train = 0;
  bool contracted = false;  ///< to a network that recognises as many test images
  std::vector<EpochRecord> epochs = {};
};

/// What a training's folder holds; nothing where the training has not ended.
/// Throws  IoError; FormatError where its log is damaged
std::optional<Outcome> outcome_of(const std::filesystem::path& folder, Index epochs);

/// What finished trainings came to, by the names of their runs, without their epochs: of a file
/// with the columns training, seed, epochs, best, best_epoch, last, train_error, contracted,
/// seconds, commit, machine, in percent; empty is what is not known. Of a training that was done
/// again the last line counts.
/// Throws  IoError; FormatError naming the line
std::map<std::string, Outcome> read_trainings(const std::filesystem::path& path);

/// Several trainings by one of the paper's measures, in percent, as far as it is known of them.
struct Measured {
  Index seeds = 0;
  double mean = 0;
  std::optional<double> deviation = {};  ///< of the sample; nothing for one seed
};

/// Throws  Error for a measure that there is not
Measured measured(const std::vector<Outcome>& outcomes, const std::string& metric);

/// The trainings of a row that there are.
struct TableRow {
  Experiment experiment;
  std::vector<Outcome> outcomes;
};

/// A line for each row and measure. A difference of more than three deviations is marked, which are
/// sqrt(paper's² + ours²), and the paper's alone for one seed; but for another budget than the
/// paper's, which is named instead. Rows without a training are only counted, below the Markdown.
struct Table {
  std::string markdown, csv;
};
Table results_table(const std::vector<TableRow>& rows, const Budget& budget,
                    const std::string& command);

}  // namespace cifar
