// What the paper's networks cost, compact and expanded, beside what the paper prints.
// SPDX-License-Identifier: Apache-2.0
//
//     complexity > docs/results/complexity.md
//
// Every row is derived from the layers of a description (networks/paper_networks.cpp) and of its
// expansion; nothing is fitted here. Fails if a digit that the paper prints differs.
#include "networks/expansion.hpp"
#include "networks/paper_networks.hpp"
#include "text.hpp"

#include <concertina/error.hpp>

#include <CLI/CLI.hpp>

#include <cmath>
#include <fstream>
#include <iostream>
#include <map>
#include <sstream>
#include <string>
#include <vector>

namespace {

using concertina::Index;
using tool::Cost, tool::Architecture;

const std::map<std::string, std::string> names = {
    {"SmallNet (7x7)", "smallnet7"}, {"MobileNet", "mobilenet"},
    {"MobileNetV2", "mobilenetv2"},  {"ShuffleNetV2 0.5x", "shufflenetv2"},
    {"YOLO-LITE", "yololite"},       {"U-Net", "unet"}};
const std::map<std::string, std::string> strategies = {{"ExpandNet-CL", "cl"},
                                                       {"ExpandNet-CL+FC", "cl+fc"},
                                                       {"ExpandNet-CK", "ck"},
                                                       {"ExpandNet-CK+FC", "ck+fc"}};

/// A published row: parameters in millions and multiply-adds, to train and to test.
struct Row {
  std::string network, form;
  double parameters_train, parameters_test, multiply_adds_train, multiply_adds_test;
};

std::vector<Row> read_rows(const std::string& path) {
  std::ifstream in(path);
  std::string line;
  if (!std::getline(in, line)) throw concertina::IoError(path + ": cannot be read");
  std::vector<Row> rows;
  while (std::getline(in, line)) {
    std::istringstream fields(line);
    std::vector<std::string> cells;
    for (std::string cell; std::getline(fields, cell, ',');) cells.push_back(cell);
    const std::string where = path + ": row " + std::to_string(rows.size() + 1) + ": ";
    if (cells.size() < 6) throw concertina::FormatError(where + "fewer than six fields");
    const auto number = [&](std::size_t field) {
      std::size_t end = 0;
      double value = 0;
      try {
        value = std::stod(cells[field], &end);
      } catch (const std::exception&) {
      }
      if (end != cells[field].size() || end == 0) {
        throw concertina::FormatError(where + "found " + tool::in_quotes(cells[field]) +
                                      ", expected a number");
      }
      return value;
    };
    if (!names.contains(cells[0]) ||
        (!strategies.contains(cells[1]) && cells[1] != "compact" && cells[1] != "SmallNet")) {
      throw concertina::FormatError(where + "no network " + tool::in_quotes(cells[0]) + ", " +
                                    tool::in_quotes(cells[1]));
    }
    rows.push_back({cells[0], cells[1], number(2), number(3), number(4), number(5)});
  }
  constexpr std::size_t published = 15;
  if (rows.size() != published) {
    throw concertina::FormatError(path + ": " + std::to_string(rows.size()) +
                                  " rows, expected the table's 15");
  }
  return rows;
}

/// Whether `ours` rounds to what the paper prints at the paper's unit: millions, or 10^9 where it
/// says so, two digits after the point.
bool agrees(Index ours, double printed, double unit) {
  return std::llround(static_cast<double>(ours) / unit * 100) == std::llround(printed / unit * 100);
}

/// The unit in which a row's multiply-adds are printed: 10^9 but for SmallNet's.
double unit_of(const Row& row) { return row.network.starts_with("SmallNet") ? 1e6 : 1e9; }

Cost cost_of(const Row& row, bool stride_last) {
  const Architecture compact = tool::paper_network(names.at(row.network));
  const auto strategy = strategies.find(row.form);
  if (strategy == strategies.end()) return total(layer_costs(compact));
  return total(layer_costs(
      tool::expanded(compact, {.strategy = strategy->second,
                               .stride_last = stride_last && strategy->second.starts_with("cl")})));
}

/// Prints the table of a Markdown page. Returns how many rows are not exact.
int print_costs(const std::vector<Row>& rows) {
  std::cout << "| network | form | parameters | paper | multiply-adds | paper | |\n"
               "|---|---|---|---|---|---|---|\n";
  int wrong = 0;
  for (const Row& row : rows) {
    const Cost train = cost_of(row, true);
    const Cost test = total(layer_costs(tool::paper_network(names.at(row.network))));
    const double unit = unit_of(row);
    const bool exact = agrees(train.parameters, row.parameters_train * 1e6, 1e6) &&
                       agrees(test.parameters, row.parameters_test * 1e6, 1e6) &&
                       agrees(train.multiply_adds, row.multiply_adds_train, unit) &&
                       agrees(test.multiply_adds, row.multiply_adds_test, unit);
    wrong += exact ? 0 : 1;
    std::ostringstream parameters, multiply_adds;
    parameters.precision(2);
    parameters << std::fixed << row.parameters_train << "M";
    multiply_adds.precision(2);
    multiply_adds << std::fixed << row.multiply_adds_train / unit << (unit < 1e9 ? "M" : "G");
    std::cout << "| " << row.network << " | " << row.form << " | "
              << tool::grouped(train.parameters) << " | " << parameters.str() << " | "
              << tool::grouped(train.multiply_adds) << " | " << multiply_adds.str() << " | "
              << (exact ? "exact" : "**differs**") << " |\n";
  }
  return wrong;
}

void print_strides(const std::vector<Row>& rows) {
  std::cout << "| network | stride on the last 1x1 | on the kxk | saved |\n|---|---|---|---|\n";
  for (const Row& row : rows) {
    const Cost last = cost_of(row, true), kernel = cost_of(row, false);
    if (last == kernel) continue;
    const double saved =
        1 - static_cast<double>(kernel.multiply_adds) / static_cast<double>(last.multiply_adds);
    std::cout << "| " << row.network << " " << row.form << " | "
              << tool::grouped(last.multiply_adds) << " | " << tool::grouped(kernel.multiply_adds)
              << " | " << std::lround(100 * saved) << "% |\n";
  }
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Prints what the paper's networks cost, beside the paper's Table S10, as Markdown.",
               "complexity");
  std::string paper = "examples/data/complexity.csv";
  app.add_option("--paper", paper, "The published figures")->capture_default_str();
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return tool::finish("complexity", app.exit(error));
  }
  try {
    const std::vector<Row> rows = read_rows(paper);
    std::cout <<
        R"(# The paper's networks: what they cost

Written by `build/release/examples/complexity`, which derives each figure from the layers of the network and of its
expansion at rate 4, and fails if a digit that the paper prints differs. The layers are in
`examples/networks/paper_networks.cpp`; `concertina info --network NAME --expand cl` shows each.

)";
    const int wrong = print_costs(rows);
    std::cout
        << "\n"
        << rows.size() - static_cast<std::size_t>(wrong) << " of " << rows.size() << " rows exact:"
        << R"( parameters and multiply-adds to train, and those of the compact network to test, round to what is
printed.

## The rule

Multiply-adds of one image, as the paper counts them:

- a convolution: its taps times the channels that it reads, for each number that it writes, and one more if it has a
  bias;
- a transposed convolution: its weights, for each position that it reads;
- a linear layer: its weights, not its bias;
- a batch norm: 2 for each number;
- ReLU, ReLU6 and LeakyReLU modules: 1 for each number; pooling modules: 1 for each number that they read. Function
  calls count nothing: all of SmallNet's activations and pools, and the means at the end of MobileNetV2 and ShuffleNetV2
  (MobileNet has a pooling module there).

Parameters are all that is trained: weights, biases, and both numbers of each channel of a batch norm.

Not published but derived from the figures: SmallNet's first 1x1 maps three channels to three; MobileNet's depthwise
layers expand within their groups (1x1 to 4, 3x3 from 4 to 4, 1x1 back, in each), ShuffleNetV2's with a 3x3 that mixes
none; the expansions of U-Net have biases on the first 1x1 and on the 3x3, those of MobileNets, ShuffleNetV2 and
YOLO-LITE have none; padding stands on the first 1x1, so the kxk layer's input is larger by it; YOLO-LITE is counted at
608x608 and U-Net at 1024x2048 with 20 classes.

## Where the stride stands

The paper counts the stride of an expansion on its last 1x1. On the kxk layer it gives the same contraction and the same
outputs, and the layers between compute only what is kept. That is the default here; `--stride last` is the paper's.

)";
    print_strides(rows);
    return tool::finish("complexity", wrong == 0 ? tool::ok : tool::failed);
  } catch (...) {
    return tool::report_error("complexity");
  }
}
