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
  Index jobs = 0;               ///< trainings side by side; one for each core for 0
  Device device = Device::cpu;  ///< of those that it computes; others stay on the CPU
  std::string command;          ///< for the table
};

/// Runs trainings, each in out/runs/NAME: resumes those that were interrupted and skips those that
/// are done. Those that others start or learn from come first. What a contracting network
/// contracts to is written beside it as compact.safetensors if it has the same test accuracy.
/// Progress is a line an epoch on standard error.
/// Returns  what went wrong, a line for each training that did not end well; the others go on
/// Throws   IoError, FormatError of the data; Error where another program is at work in `out`
std::vector<std::string> run_trainings(const std::vector<Run>& runs,
                                       const ReproduceOptions& options);

/// A table: runs its trainings with seeds 1 to `seeds`, and writes it into `out` as Markdown and
/// CSV (results_table.hpp). Rows of a data set that is not there stay without ours.
/// Returns  as run_trainings
/// Throws   as run_trainings, and where no data set is there
std::vector<std::string> reproduce_table(const std::vector<Experiment>& rows, Index seeds,
                                         const Budget& budget, const ReproduceOptions& options);

/// Where reproduce_table writes: table-S1.md for the paper's budget, table-S1-e10.md for ten
/// epochs.
std::filesystem::path table_path(const std::string& table, const Budget& budget,
                                 const std::filesystem::path& out, const char* extension);

/// A figure, as experiments.hpp lists its curves: runs its trainings, and writes into `out`
/// figure-NAME-*.csv, a gnuplot script, and what gnuplot draws from it, SVG and PNG.
/// Returns  as run_trainings; where a training is missing there is no figure
/// Throws   as run_trainings; Error where gnuplot fails, after everything else was written
std::vector<std::string> reproduce_figure(const std::string& figure, const std::string& dataset,
                                          Index kernel, std::uint64_t seed, Index epochs,
                                          const ReproduceOptions& options);

}  // namespace cifar
