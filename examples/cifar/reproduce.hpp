// The paper's tables and figures: runs what is missing of their trainings, and sets ours beside
// theirs.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "experiments.hpp"

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

namespace cifar {

struct ReproduceOptions {
  std::filesystem::path data, out;
  Index jobs = 0;       ///< trainings side by side; one for each core for 0
  std::string command;  ///< for the table
};

/// Runs trainings, each in out/runs/NAME: resumes those that were interrupted and skips those that
/// are done. One that others start or learn from comes before them. What a contracting network
/// contracts to is written beside it as compact.safetensors if it has the same test accuracy.
/// Progress is a line an epoch on standard error.
/// Returns  what went wrong, a line for each training that did not end well; the others go on
/// Throws   IoError, FormatError of the data
std::vector<std::string> run_trainings(const std::vector<Run>& runs,
                                       const ReproduceOptions& options);

/// A table: runs its trainings with seeds 1 to `seeds`, and writes table-NAME.md and table-NAME.csv
/// into `out`: ours beside the paper's for each row and measure, a mark where they are more than
/// three of the paper's deviations apart. Rows of a data set that is not there stay without ours.
/// Returns  as run_trainings
/// Throws   as run_trainings, and where no data set is there
std::vector<std::string> reproduce_table(const std::vector<Experiment>& rows, Index seeds,
                                         const Budget& budget, const ReproduceOptions& options);

/// A figure, as experiments.hpp lists its curves: runs its trainings, and writes into `out`
/// figure-NAME-*.csv, a gnuplot script, and what gnuplot draws from it, SVG and PNG.
/// Returns  as run_trainings; where a training is missing there is no figure
/// Throws   as run_trainings; Error where gnuplot fails, after everything else was written
std::vector<std::string> reproduce_figure(const std::string& figure, const std::string& dataset,
                                          Index kernel, std::uint64_t seed, Index epochs,
                                          const ReproduceOptions& options);

}  // namespace cifar
