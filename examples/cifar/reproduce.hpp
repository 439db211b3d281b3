// The paper's tables and figures: runs what is missing of their trainings, and sets ours beside
// theirs.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "experiments.hpp"
#include "results_table.hpp"

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

namespace cifar {

struct ReproduceOptions {
  std::filesystem::path data, out;
  Index jobs = 0;                            ///< trainings side by side; one for each core for 0
  Device device = Device::cpu;               ///< of those that it computes; others stay on the CPU
  std::string command;                       ///< for the table
  std::map<std::string, Outcome> done = {};  ///< rows' trainings that are not run again, by name
};

/// A training of a row that is neither in `out` nor done.
struct Missing {
  std::string row;
  std::uint64_t seed = 1;
  std::vector<std::string> runs;  ///< as runs_of, without those that have ended in `out`
};
std::vector<Missing> missing_of(const std::vector<Experiment>& rows, Index seeds,
                                const Budget& budget, const ReproduceOptions& options);

/// The runs of a figure that are not in `out`; what is done has no curves.
std::vector<std::string> missing_of(const std::vector<Curve>& curves,
                                    const ReproduceOptions& options);

/// Runs trainings, each in out/runs/NAME: resumes those that were interrupted and skips those that
/// are done. Those that others start or learn from come first. What a contracting network
/// contracts to is written beside it as compact.onnx if it has the same test accuracy.
/// Progress is a line an epoch on standard error.
/// Returns  what went wrong, a line for each training that did not end well; the others go on
/// Throws   IoError, FormatError of the data; Error where another program is at work in `out`
std::vector<std::string> run_trainings(const std::vector<Run>& runs,
                                       const ReproduceOptions& options);

/// A table: runs its trainings with seeds 1 to `seeds`, and writes it into `out` as Markdown and
/// CSV (results_table.hpp). Rows of a data set that is not there stay without ours. Without data,
/// nothing is trained.
/// Returns  as run_trainings
/// Throws   as run_trainings, and where no data set is there
std::vector<std::string> reproduce_table(const std::vector<Experiment>& rows, Index seeds,
                                         const Budget& budget, const ReproduceOptions& options);

/// Where reproduce_table writes: table-S1.md for the paper's budget, table-S1-e10.md for ten
/// epochs.
std::filesystem::path table_path(const std::string& table, const Budget& budget,
                                 const std::filesystem::path& out, const char* extension);

/// What a figure's files are named by: figure-S2-cifar10-k3.
std::string figure_name(const std::string& figure, const std::string& dataset, Index kernel);

/// A figure, as experiments.hpp lists its curves: runs its trainings, and writes into `out`
/// figure-NAME-*.csv, a gnuplot script, and what gnuplot draws from it, SVG and PNG.
/// Returns  as run_trainings; where a training is missing there is no figure
/// Throws   as run_trainings; Error where gnuplot fails, after everything else was written
std::vector<std::string> reproduce_figure(const std::string& figure, const std::string& dataset,
                                          Index kernel, std::uint64_t seed, Index epochs,
                                          const ReproduceOptions& options);

}  // namespace cifar
