// Figures: the numbers as CSV, a gnuplot script beside them, and what gnuplot draws from both.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "log.hpp"

#include <filesystem>
#include <string>
#include <vector>

namespace cifar {

/// A training as its curves are drawn.
struct Line {
  std::string title;
  std::vector<EpochRecord> epochs;
  std::vector<double> similarities = {};  ///< of gradients at the end; empty for none
};

/// A landscape, by its CSV file in the figure's folder, and the range of its losses.
struct Panel {
  std::string title, csv;
  double least = 0, most = 0;
};

/// Writes NAME-curves.csv (epoch, and for each line training and test error in percent and, if they
/// were measured, the least similarity of gradients), NAME-density.csv (the density of the
/// similarities at the end), NAME.gp, and draws NAME.svg and NAME.png from them: `gnuplot NAME.gp`
/// in the folder does it again. Lines are labelled at their ends.
/// Requires  lines of the same epochs, all with similarities or none, otherwise throws ShapeError
/// Throws    IoError where a file cannot be written; Error where gnuplot is missing or fails, after
///           the CSV files and the script were written
void plot_training(const std::filesystem::path& folder, const std::string& name,
                   const std::string& title, const std::vector<Line>& lines);

/// Landscapes side by side in one logarithmic scale, to 20 times the least loss, from files of
/// write_landscape; otherwise as above.
void plot_landscapes(const std::filesystem::path& folder, const std::string& name,
                     const std::string& title, const std::vector<Panel>& panels);

/// Where labels go that want to stand at these heights: in order, each at least `gap` above the one
/// below, moved as little as may be.
std::vector<double> spread_labels(const std::vector<double>& heights, double gap);

}  // namespace cifar
