// Formatting and errors.
// SPDX-License-Identifier: Apache-2.0
#include "text.hpp"

#include <concertina/detail/io/text.hpp>
#include <concertina/error.hpp>

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <iostream>
#include <new>
#include <sstream>
#include <system_error>

namespace tool {

std::string system_message() { return std::generic_category().message(errno); }

ExitCode report_error(const char* program) {
  ExitCode code = broken;
  std::string what;
  try {
    throw;
  } catch (const UsageError& error) {
    code = usage;
    what = error.what() + std::string("; see ") + program + " --help";
  } catch (const concertina::InexactError& error) {
    code = not_exact;
    what = error.what();
  } catch (const concertina::IoError& error) {
    what = error.what();
  } catch (const concertina::Error& error) {
    code = bad_file;
    what = error.what();
  } catch (const std::bad_alloc&) {
    what = "not enough memory for layers of this size";
  } catch (const std::exception& error) {
    what = std::string("unexpected: ") + error.what() + "; please report this";
  }
  std::cerr << program << ": error: " << printable(what) << std::endl;
  return code;
}

int finish(const char* program, int code) {
  if (std::cout.flush()) return code;
  std::cerr << program << ": error: standard output: not all of it could be written" << std::endl;
  return broken;
}

std::string printable(std::string_view text, std::size_t limit) {
  return concertina::io::detail::shown(text, limit);
}

std::string in_quotes(std::string_view text) { return '"' + printable(text, 60) + '"'; }

std::string brief(long double number) {
  std::ostringstream text;
  text.precision(3);
  text << number;
  return text.str();
}

std::string fixed(double number, int digits) {
  std::ostringstream text;
  text.precision(digits);
  text << std::fixed << number;
  return text.str();
}

std::string counted(std::ptrdiff_t count, const std::string& noun) {
  return std::to_string(count) + " " + noun + (count == 1 ? "" : "s");
}

std::string grouped(std::ptrdiff_t number) {
  std::string text = std::to_string(number);
  for (std::size_t at = text.size(); at > 3 + (number < 0 ? 1U : 0U);) text.insert(at -= 3, ",");
  return text;
}

std::string table(const std::vector<std::vector<std::string>>& rows) {
  std::vector<std::size_t> width;
  for (const auto& row : rows) {
    width.resize(std::max(width.size(), row.size()));
    for (std::size_t i = 0; i < row.size(); ++i) width[i] = std::max(width[i], row[i].size());
  }
  const auto numeric = [](const std::string& cell) {
    return !cell.empty() && cell.find_first_not_of("0123456789,.e+-% ") == std::string::npos;
  };
  std::vector<bool> right(width.size());
  for (std::size_t i = 0; i < width.size(); ++i) {
    right[i] = rows.size() > 1 && std::all_of(rows.begin() + 1, rows.end(), [&](const auto& row) {
                 return i >= row.size() || row[i].empty() || numeric(row[i]);
               });
  }
  std::string result;
  for (const auto& row : rows) {
    std::string line;
    for (std::size_t i = 0; i < row.size(); ++i) {
      const std::string space(width[i] - row[i].size(), ' ');
      line += (i > 0 ? "  " : "") + (right[i] ? space + row[i] : row[i] + space);
    }
    line.erase(line.find_last_not_of(' ') + 1);
    result += line + '\n';
  }
  return result;
}

Progress::Progress() : terminal_(isatty(STDERR_FILENO) != 0) {}

void Progress::show(const std::string& what) {
  if (!terminal_) return;
  std::cerr << "\r\x1b[K" << printable(what, 78) << std::flush;
  shown_ = true;
}

void Progress::clear() {
  if (shown_) std::cerr << "\r\x1b[K" << std::flush;
  shown_ = false;
}

}  // namespace tool
