// SPDX-License-Identifier: Apache-2.0
#include "results_table.hpp"

#include "text.hpp"
#include "text_file.hpp"

#include <concertina/error.hpp>

#include <algorithm>
#include <cmath>
#include <limits>

namespace cifar {
namespace {

std::string with_sign(double number, int digits) {
  return (number < 0 ? "" : "+") + tool::fixed(number, digits);
}

std::string words_of(const std::string& metric) {
  if (metric == "top1") return "best test accuracy";
  std::string words = metric;
  std::ranges::replace(words, '_', ' ');
  return words;
}

/// Cells as a line of either format; the first is empty in neither.
std::string markdown_line(const std::vector<std::string>& cells) {
  std::string line = "|";
  for (const std::string& cell : cells) line += ' ' + cell + " |";
  return line + '\n';
}
std::string csv_line(const std::vector<std::string>& cells) {
  std::string line;
  for (const std::string& cell : cells) line += (line.empty() ? "" : ",") + cell;
  return line + '\n';
}

}  // namespace

std::optional<Outcome> outcome_of(const std::filesystem::path& folder, Index epochs) {
  const auto log = folder / "log.csv";
  if (!is_there(log)) return std::nullopt;
  Outcome outcome{.epochs = CsvLog::read(log)};
  if (outcome.epochs.empty() || outcome.epochs.back().epoch < epochs) return std::nullopt;
  for (const EpochRecord& epoch : outcome.epochs) {
    outcome.best_test = std::max(outcome.best_test, epoch.test_accuracy);
  }
  outcome.last_test = outcome.epochs.back().test_accuracy;
  outcome.last_train = outcome.epochs.back().train_accuracy;
  outcome.contracted = is_there(folder / "compact.onnx");
  return outcome;
}

std::map<std::string, Outcome> read_trainings(const std::filesystem::path& path) {
  constexpr std::string_view header =
      "training,seed,epochs,best,best_epoch,last,train_error,contracted,seconds,commit,machine";
  const std::string text = read_text(path, 1 << 24, "the finished trainings");
  std::map<std::string, Outcome> outcomes;
  Index number = 0;
  for (const std::string_view line : split(text, '\n')) {
    ++number;
    const auto refuse = [&](const std::string& why) {
      throw concertina::FormatError(path.string() + ": line " + std::to_string(number) + ": " +
                                    why);
    };
    if (number == 1) {
      if (line != header) refuse("expected \"" + std::string(header) + '"');
      continue;
    }
    if (line.empty()) continue;
    if (line.data() + line.size() == text.data() + text.size()) refuse("the line does not end");
    const std::vector<std::string_view> fields = split(line, ',');
    if (fields.size() != 11) refuse(std::to_string(fields.size()) + " fields, expected 11");
    const auto count = [&](std::size_t field, Index least, Index most) {
      const Index value = number_in<Index>(fields[field]).value_or(least - 1);
      if (value < least || value > most) {
        refuse('"' + std::string(fields[field].substr(0, 40)) + "\" is no whole number from " +
               std::to_string(least) + " to " + std::to_string(most));
      }
      return value;
    };
    constexpr Index most = std::numeric_limits<Index>::max();
    static_cast<void>(count(1, 0, most));
    const Index epochs = count(2, 1, 1'000'000);
    if (!fields[4].empty()) static_cast<void>(count(4, 1, epochs));
    const double seconds = number_in<double>(fields[8]).value_or(fields[8].empty() ? 0 : -1);
    if (!(seconds >= 0 && std::isfinite(seconds))) {
      refuse('"' + std::string(fields[8].substr(0, 40)) + "\" are no seconds");
    }
    if (fields[7] != "yes" && fields[7] != "no" && !fields[7].empty()) {
      refuse("contracted is yes or no, not \"" + std::string(fields[7].substr(0, 40)) + '"');
    }
    const auto percent = [&](std::string_view field) {
      if (field.empty()) return std::numeric_limits<double>::quiet_NaN();
      const double value = number_in<double>(field).value_or(-1);
      if (!(value >= 0 && value <= 100)) {
        refuse('"' + std::string(field.substr(0, 40)) + "\" is not from 0 to 100");
      }
      return value / 100;
    };
    outcomes[std::string(fields[0]) + "-e" + std::string(fields[2]) + "-s" +
             std::string(fields[1])] = {.best_test = percent(fields[3]),
                                        .last_test = percent(fields[5]),
                                        .last_train = 1 - percent(fields[6]),
                                        .contracted = fields[7] == "yes"};
    if (percent(fields[5]) > percent(fields[3])) refuse("the last accuracy is above the best");
  }
  return outcomes;
}

Measured measured(const std::vector<Outcome>& outcomes, const std::string& metric) {
  const auto value_of = [&](const Outcome& outcome) {
    if (metric == "top1") return 100 * outcome.best_test;
    if (metric == "best_test_error") return 100 * (1 - outcome.best_test);
    if (metric == "last_test_error") return 100 * (1 - outcome.last_test);
    if (metric == "train_error") return 100 * (1 - outcome.last_train);
    throw concertina::Error("there is no measure '" + metric + "'; there are " +
                            tool::listed(metric_names()));
  };
  std::vector<double> values;
  for (const Outcome& outcome : outcomes) {
    if (const double value = value_of(outcome); !std::isnan(value)) values.push_back(value);
  }
  Measured result{.seeds = std::ssize(values)};
  const auto count = static_cast<double>(values.size());
  for (const double value : values) result.mean += value / count;
  if (values.size() < 2) return result;
  double squares = 0;
  for (const double value : values) squares += std::pow(value - result.mean, 2);
  result.deviation = std::sqrt(squares / (count - 1));
  return result;
}

Table results_table(const std::vector<TableRow>& rows, const Budget& budget,
                    const std::string& command) {
  const std::string& name = rows.front().experiment.table;
  Table table;
  table.csv =
      "table,dataset,kernel,model,rate,setting,norms,metric,seeds,epochs,teacher_width,"
      "teacher_epochs,mean,std,paper_mean,paper_std,difference,deviations,within,contracted\n";
  table.markdown =
      "# Table " + name + ", reproduced\n\n`" + command +
      "`\n\nIn percent; seeds from 1 on. The paper's are means and standard deviations of five "
      "trainings of 150 epochs; three deviations count the paper's and ours. "
      "\"Contracted\" says that each compact network recognises as many test images as the "
      "expanded one it came from.\n\n" +
      markdown_line({"data", "kernel", "network", "setting", "norms start at", "measure", "seeds",
                     "epochs", "ours", "paper", "difference", "within 3 deviations",
                     "contracted"}) +
      "|---|---|---|---|---|---|---|---|---|---|---|---|---|\n";
  Index empty = 0;
  for (const auto& [row, outcomes] : rows) {
    if (outcomes.empty()) {
      ++empty;
      continue;
    }
    const bool teacher = has_teacher(row);
    const bool published = budget.epochs == Budget().epochs &&
                           (!teacher || (budget.teacher_width == Budget().teacher_width &&
                                         budget.teacher_epochs == Budget().teacher_epochs));
    const std::string kernel = std::to_string(row.kernel),
                      rate = row.rate ? shortest(*row.rate) : "",
                      norms = budget.uniform_norms ? "uniform" : "ones",
                      epochs = std::to_string(budget.epochs),
                      width = teacher ? std::to_string(budget.teacher_width) : "",
                      teacher_epochs = teacher ? std::to_string(budget.teacher_epochs) : "",
                      contracted =
                          std::ranges::all_of(outcomes, &Outcome::contracted) ? "yes" : "no";
    for (const auto& [metric, paper_mean, paper_deviation] : row.published) {
      const Measured ours = measured(outcomes, metric);
      if (ours.seeds == 0) continue;
      const double difference = ours.mean - paper_mean,
                   both = std::hypot(paper_deviation, ours.deviation.value_or(0)),
                   deviations = difference / both;
      const bool within = std::abs(difference) <= 3 * both;
      const std::string seeds = std::to_string(ours.seeds), mean = tool::fixed(ours.mean, 2),
                        deviation = ours.deviation ? tool::fixed(*ours.deviation, 2) : "",
                        paper = tool::fixed(paper_mean, 2),
                        paper_std = tool::fixed(paper_deviation, 2);
      table.csv += csv_line({name, row.dataset, kernel, row.model, rate, row.setting, norms, metric,
                             seeds, epochs, width + ',' + teacher_epochs, mean, deviation, paper,
                             paper_std, with_sign(difference, 2), with_sign(deviations, 2),
                             published ? (within ? "yes" : "no") : "other budget", contracted});
      table.markdown += markdown_line(
          {row.dataset, kernel, row.model + (rate.empty() ? "" : ", r = " + rate), row.setting,
           budget.uniform_norms ? "0 to 1" : "1", words_of(metric), seeds,
           epochs + (teacher ? " (teacher of width " + width + ": " + teacher_epochs + ')' : ""),
           mean + (deviation.empty() ? "" : " ± " + deviation), paper + " ± " + paper_std,
           with_sign(difference, 2),
           !published ? "other budget"
           : within   ? "yes"
                      : "**no**, " + with_sign(deviations, 1),
           contracted});
    }
  }
  if (empty > 0) {
    table.markdown += '\n' + tool::counted(empty, "row") + " of the table without a training.\n";
  }
  return table;
}

}  // namespace cifar
