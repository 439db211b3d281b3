// The subcommands: what each takes, and what it returns as the exit code.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "text.hpp"

#include <nlohmann/json.hpp>

#include <cstdint>
#include <string>
#include <vector>

namespace tool {

struct ContractOptions {
  std::string in, out, chain, dtype, input_size;
  bool interior = false, json = false;
};

/// Contracts one file's chain and writes the layer. Throws what report_error reports.
ExitCode contract(const ContractOptions& options);

struct FilesOptions {
  std::vector<std::string> paths;
  std::string chain, input_size;
  bool json = false;
};

/// Verifies files and folders, one line each; goes on after a file that fails.
ExitCode verify(const FilesOptions& options);

/// Times the contraction of each file's layers beside the peak of a matrix product.
ExitCode bench(const FilesOptions& options);

/// Shows each file's layers before and after.
ExitCode info(const FilesOptions& options);

struct NetworkOptions {
  std::string network, expand, stride = "kernel", out;
  std::vector<std::string> layers;
  double rate = 4;
  std::uint64_t seed = 1;
  bool json = false;
};

/// Lists the paper's networks.
ExitCode networks(const NetworkOptions& options);

/// Shows a network's layers and their cost, expanded where asked for.
ExitCode network_info(const NetworkOptions& options);

/// Writes a network, expanded where asked for, with random numbers.
ExitCode write_network(const NetworkOptions& options);

/// Calls each(path), which returns an exit code or throws; errors are reported, added to `results`
/// as {"file", "error"}, and the next file follows. Returns `failed` if any has, otherwise the
/// first code that is not `ok`.
template <class Each>
ExitCode for_each_file(const std::vector<std::string>& paths, nlohmann::json& results,
                       Each&& each) {
  ExitCode worst = ok;
  for (const std::string& path : paths) {
    ExitCode code = ok;
    try {
      code = each(path);
    } catch (...) {
      std::string message;
      code = report_error(&message);
      results.push_back({{"file", path}, {"error", message}});
    }
    if (code == failed || worst == ok) worst = code;
  }
  return worst;
}

}  // namespace tool
