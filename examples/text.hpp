// What the tool prints: one-line errors, aligned tables, readable numbers, progress on a terminal.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/error.hpp>

#include <algorithm>
#include <ranges>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace tool {

/// A command line that cannot be understood.
struct UsageError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// Exit codes, as --help lists them.
enum ExitCode : int {
  ok = 0,
  failed = 1,
  usage = 2,
  bad_file = 3,
  not_exact = 4,
  broken = 5,
  not_proved = 6
};

/// Prints the exception that is being handled as one line to standard error, and returns its exit
/// code.
ExitCode report_error(const char* program);

/// The exit code of a program that is done: its own, unless standard output could not all be
/// written, which is reported.
int finish(const char* program, int code);

/// What errno says.
std::string system_message();

/// Text safe to print on one line: everything but printable ASCII as \xNN.
std::string printable(std::string_view text, std::size_t limit = 1000);

/// The same in quotes, shortened.
std::string in_quotes(std::string_view text);

/// "cl, ck, fc": the choices of a message.
template <std::ranges::range Names>
std::string listed(const Names& names) {
  std::string text;
  for (const std::string_view name : names) text.append(text.empty() ? "" : ", ").append(name);
  return text;
}

/// The names of an enumeration's values, as on the command line and in files.
template <class Enum>
struct Names {
  std::string what;  ///< that they name, for messages
  std::vector<std::pair<Enum, std::string>> values;

  /// Throws concertina::Error with the choices for a name that there is not.
  Enum of(const std::string& name) const {
    const auto found =
        std::ranges::find(values, name, [](const auto& each) { return each.second; });
    if (found != values.end()) return found->first;
    throw concertina::Error("there is no " + what + " '" + name + "'; there are " + listed(all()));
  }
  const std::string& of(Enum value) const {
    return std::ranges::find(values, value, [](const auto& each) { return each.first; })->second;
  }
  std::vector<std::string> all() const {
    std::vector<std::string> names;
    for (const auto& [value, name] : values) names.push_back(name);
    return names;
  }
};

/// Three significant digits: "0.0213", "4.7e-07".
std::string brief(long double number);

/// So many digits after the point.
std::string fixed(double number, int digits);

/// "1 layer", "3 layers".
std::string counted(std::ptrdiff_t count, const std::string& noun);

/// 1234567 as "1,234,567".
std::string grouped(std::ptrdiff_t number);

/// Rows of cells with columns aligned, numbers to the right; the first row is the head.
std::string table(const std::vector<std::vector<std::string>>& rows);

/// A line on standard error that says what takes so long; nothing if that is not a terminal.
class Progress {
 public:
  Progress();
  ~Progress() { clear(); }
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  void show(const std::string& what);
  void clear();

 private:
  bool terminal_, shown_ = false;
};

}  // namespace tool
