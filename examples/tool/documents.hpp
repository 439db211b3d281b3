// The man page and the completion for bash, from the options themselves.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <CLI/CLI.hpp>

#include <string>

namespace tool {

/// For man(7).
std::string man_page(const CLI::App& app, const std::string& version);

/// Completes subcommands, their options, the values of those that have few, and file names.
std::string bash_completion(const CLI::App& app);

}  // namespace tool
