// The subcommands: what each takes. They return exit codes and throw what tool::report_error knows.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "landscape.hpp"
#include "reproduce.hpp"
#include "training.hpp"

#include <string>
#include <vector>

namespace cifar {

/// Where images come from; without a folder, a small set is generated.
struct DataOptions {
  std::string folder, name = "cifar10";
};
Dataset open_dataset(const DataOptions& options);

struct TrainCommand {
  DataOptions data;
  TrainOptions options;
  Index threads = 0;  // all cores
};
int run_train(TrainCommand command);

struct EvalCommand {
  DataOptions data;
  std::string file;
  Index threads = 0;
  bool json = false;
};
int run_eval(const EvalCommand& command);

struct ContractCommand {
  DataOptions data;
  std::string in, out;
  Index threads = 0;
};
int run_contract(const ContractCommand& command);

struct BenchCommand {
  std::vector<std::string> models;
  NetworkOptions network;
  Index batch = 128, threads = 0;
  double seconds = 2;
  Device device = Device::cpu;
  bool json = false;
};
int run_bench(const BenchCommand& command);

struct DriftCommand {
  DataOptions data;
  NetworkOptions network;
  Recipe recipe;
  Index steps = 100, threads = 0;
};
int run_drift(DriftCommand command);

struct LandscapeCommand {
  DataOptions data;
  std::string file, out;
  LandscapeOptions options;
  bool trained = false;  // the parameters of the expanded network, not of the compact one
  Index threads = 0;
};
int run_landscape(const LandscapeCommand& command);

struct ReproduceCommand {
  std::string table, figure;  // one of them
  std::string paper;
  std::vector<std::string> rows;  // patterns of their names
  Index kernel = 3, seeds = 5;
  std::string dataset;
  Budget budget;
  std::string trainings;  // the file of those that are done
  ReproduceOptions options;
  bool list = false, missing = false;
};
int run_reproduce(ReproduceCommand command);

/// The threads that are asked for; as many as there are cores for 0.
Index thread_count(Index asked);

}  // namespace cifar
