// The subcommands on the paper's networks: what each takes, and what it returns as the exit code.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "text.hpp"

#include <cstdint>
#include <string>
#include <vector>

namespace tool {

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

}  // namespace tool
