// The subcommands. They return exit codes and throw what tool::report_error knows.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "landscape.hpp"
#include "training.hpp"

#include <string>
#include <vector>

namespace cifar {

/// Where images come from; without a folder, a small set is generated.
struct DataOptions {
  std::string folder, name = "cifar10";
};
Dataset open_dataset(const DataOptions& options);

/// What a command line says; a subcommand reads what its options set.
struct CommandLine {
  DataOptions data;
  TrainOptions training;  ///< its network and recipe are bench's and drift's too
  Device device = Device::cpu;
  Index threads = 0;  ///< all cores
  bool json = false;
  std::string words;  ///< as a shell reads them

  std::string file, output;    ///< eval, contract, landscape
  LandscapeOptions landscape;  ///< landscape
  bool expanded = false;       ///< the parameters of the expanded network, not of the compact one
  std::vector<std::string> models;  ///< bench
  double seconds = 2;
  Index steps = 100;  ///< drift
};

int run_train(CommandLine& line);
int run_eval(CommandLine& line);
int run_contract(CommandLine& line);
int run_bench(CommandLine& line);
int run_drift(CommandLine& line);
int run_landscape(CommandLine& line);

}  // namespace cifar
