// The rows of the paper's CIFAR tables, and the trainings that each needs.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "training.hpp"

#include <filesystem>
#include <optional>
#include <string>
#include <vector>

namespace cifar {

/// What the paper prints of a row, in percent: of its five trainings.
struct Published {
  std::string metric;  ///< one of metric_names()
  double mean = 0, deviation = 0;
};

/// A row of a table.
struct Experiment {
  std::string table, dataset, model, setting;  ///< as the paper names them: CIFAR-10, ExpandNet-CL
  Index kernel = 0;
  std::optional<double> rate;
  std::vector<Published> published;

  /// What `cifar reproduce --rows` names it by, such as cifar10-k7-cl+fc-r4-init-kd.
  std::string name() const;
};

/// The rows of a file with the columns table, dataset, kernel, model, rate, setting, metric, mean,
/// std; rows that differ in the metric alone are one experiment.
/// Throws  IoError; FormatError naming the line
std::vector<Experiment> read_experiments(const std::filesystem::path& path);

/// How far trainings go and how. The paper's are 150 epochs and batch norms that start as they did
/// in its PyTorch; of the teacher it says little.
struct Budget {
  Index epochs = 150;
  Index teacher_width = 64, teacher_epochs = 200;
  bool uniform_norms = false;  ///< as in the PyTorch of the paper; see Recipe

  /// What tells it from the default in a file's name, such as -e10-w8-e12.
  std::string marks() const;
};

/// A training, by the folder that it is kept in.
struct Run {
  std::string name = {};  ///< says all that tells it from others
  std::string dataset;    ///< cifar10, cifar100 or mnist
  NetworkOptions network = {};
  Recipe recipe = {};
  std::string init = {}, teacher = {};  ///< the runs that it starts and learns from; empty for none
  Index similarities = 0;               ///< batches whose gradients are compared after each epoch
};

/// The trainings of an experiment with a seed: what it needs first, and itself last.
///
/// +Init: the nonlinear counterpart is trained by the same recipe, without teacher, and the best
/// network's parameters are where the linear one starts. KD: temperature 4, the teacher's weight
/// 0.9. Hint and PKT: Adam at 0.0001, as published; the last layer learns the labels on the
/// features and these do not learn from it; the hint's projection is fixed as drawn. The teacher,
/// one for all seeds, is a ResNet-18 trained with momentum kept, from the rate 0.1, with weight
/// decay 0.0005. Table S5: the network of four convolutions, weight decay 0.0005.
/// Throws  FormatError where the row's words mean no training
std::vector<Run> runs_of(const Experiment& experiment, std::uint64_t seed, const Budget& budget);

/// A training with the name of its curve.
struct Curve {
  std::string title;
  Run run = {};
};

/// The trainings of a figure on a data set. S1, S2 and S3: SmallNet and all its expansions with
/// this kernel, gradients compared; S4: SmallNet, FC and CL with weight decay, and these with that
/// of their products.
/// Throws  Error for another figure
std::vector<Curve> curves_of(const std::string& figure, const std::string& dataset, Index kernel,
                             std::uint64_t seed, Index epochs);

/// Whether a row is trained with a teacher.
bool has_teacher(const Experiment& experiment);

/// The measures of the tables.
const std::vector<std::string>& metric_names();

/// "CIFAR-10" of "cifar10", and the other way round.
/// Throws  Error for another name
std::string published_dataset(const std::string& name);
std::string dataset_name(const std::string& published);

}  // namespace cifar
