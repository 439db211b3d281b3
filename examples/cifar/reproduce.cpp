// SPDX-License-Identifier: Apache-2.0
#include "reproduce.hpp"

#include "commands.hpp"
#include "log.hpp"
#include "plot.hpp"
#include "similarity.hpp"
#include "text.hpp"
#include "text_file.hpp"
#include "trained_network.hpp"

#include <algorithm>
#include <cmath>
#include <condition_variable>
#include <iostream>
#include <map>
#include <mutex>
#include <optional>
#include <set>
#include <thread>
#include <utility>

namespace cifar {
namespace {

namespace fs = std::filesystem;
using concertina::io::read_safetensors;

fs::path folder_of(const Run& run, const fs::path& out) { return out / "runs" / run.name; }

/// What a finished training came to; nothing for one that is not finished. Accuracies in 0 .. 1.
struct Outcome {
  double best_test = 0, last_test = 0, last_train = 0;
  bool contracted = false;  ///< to a network with the same test accuracy
  std::vector<EpochRecord> epochs;
};

std::optional<Outcome> outcome_of(const Run& run, const fs::path& out) {
  const fs::path folder = folder_of(run, out), log = folder / "log.csv";
  if (!fs::exists(log) || !fs::exists(folder / "best.safetensors")) return std::nullopt;
  Outcome outcome;
  try {
    outcome.epochs = CsvLog::read(log);
  } catch (const concertina::FormatError&) {  // interrupted while it was written
    return std::nullopt;
  }
  if (outcome.epochs.empty() || outcome.epochs.back().epoch < run.recipe.epochs) {
    return std::nullopt;
  }
  for (const EpochRecord& epoch : outcome.epochs) {
    outcome.best_test = std::max(outcome.best_test, epoch.test_accuracy);
  }
  outcome.last_test = outcome.epochs.back().test_accuracy;
  outcome.last_train = outcome.epochs.back().train_accuracy;
  outcome.contracted = fs::exists(folder / "compact.safetensors");
  return outcome;
}

/// The sets of a folder, each read once.
class Datasets {
 public:
  explicit Datasets(fs::path folder) : folder_(std::move(folder)) {}
  const Dataset& operator[](const std::string& name) {
    auto found = sets_.find(name);
    if (found == sets_.end()) found = sets_.emplace(name, read_dataset(folder_, name)).first;
    return found->second;
  }

 private:
  fs::path folder_;
  std::map<std::string, Dataset> sets_;
};

/// Runs that wait for others, taken by as many threads as ask.
class Queue {
 public:
  explicit Queue(const std::vector<Run>& runs) {
    for (const Run& run : runs) waiting_.push_back(&run);
  }

  /// A run whose needs are met, or null when no other will be: what is left then needs one that
  /// failed.
  const Run* take() {
    std::unique_lock lock(mutex_);
    for (;;) {
      const auto ready = std::ranges::find_if(waiting_, [this](const Run* run) {
        return (run->init.empty() || done_.contains(run->init)) &&
               (run->teacher.empty() || done_.contains(run->teacher));
      });
      if (ready != waiting_.end()) {
        const Run* run = *ready;
        waiting_.erase(ready);
        ++running_;
        return run;
      }
      if (running_ == 0) return nullptr;
      changed_.wait(lock);
    }
  }

  void finish(const Run& run, bool succeeded) {
    const std::lock_guard lock(mutex_);
    --running_;
    if (succeeded) done_.insert(run.name);
    changed_.notify_all();
  }

  const std::vector<const Run*>& left() const { return waiting_; }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<const Run*> waiting_;
  std::set<std::string> done_;
  Index running_ = 0;
};

/// Trains and contracts, as far as that is not done.
void complete(const Run& run, const Dataset& data, const ReproduceOptions& options,
              ThreadPool& pool, const std::function<void(const EpochRecord&)>& report) {
  const fs::path folder = folder_of(run, options.out);
  const fs::path best = folder / "best.safetensors", compact = folder / "compact.safetensors";
  if (!outcome_of(run, options.out)) {
    TrainOptions training{.network = run.network,
                          .recipe = run.recipe,
                          .out = folder,
                          .similarities = run.similarities,
                          .resume = true,
                          .command = options.command,
                          .report = report};
    training.network.classes = data.classes;
    const auto file_of = [&](const std::string& name) {
      return name.empty() ? fs::path() : options.out / "runs" / name / "best.safetensors";
    };
    training.init = file_of(run.init);
    training.teacher = file_of(run.teacher);
    static_cast<void>(train(training, data, pool));
  }
  if (!run.contracts() || fs::exists(compact)) return;
  const ContractionCheck check = check_contraction(read_safetensors(best), data, pool);
  if (!check.identical()) {
    throw concertina::Error("contracted, " + std::to_string(check.compact.correct) +
                            " test images are right, and not " +
                            std::to_string(check.expanded.correct));
  }
  concertina::io::write_safetensors(compact, check.network);
}

struct Measured {
  Index seeds = 0;
  double mean = 0;
  std::optional<double> deviation = {};  // of the sample; nothing for one seed
};

Measured measured(const std::vector<Outcome>& outcomes, const std::string& metric) {
  std::vector<double> values;
  for (const Outcome& outcome : outcomes) {
    if (metric == "top1") values.push_back(100 * outcome.best_test);
    if (metric == "best_test_error") values.push_back(100 * (1 - outcome.best_test));
    if (metric == "last_test_error") values.push_back(100 * (1 - outcome.last_test));
    if (metric == "train_error") values.push_back(100 * (1 - outcome.last_train));
  }
  Measured result{.seeds = std::ssize(values)};
  const auto count = static_cast<double>(values.size());
  for (const double value : values) result.mean += value / count;
  if (values.size() < 2) return result;
  double squares = 0;
  for (const double value : values) squares += (value - result.mean) * (value - result.mean);
  result.deviation = std::sqrt(squares / (count - 1));
  return result;
}

std::string signed_number(double number) {
  return (number < 0 ? "" : "+") + tool::fixed(number, 2);
}

std::string words_of(const std::string& metric) {
  if (metric == "top1") return "best test accuracy";
  std::string words = metric;
  std::ranges::replace(words, '_', ' ');
  return words;
}

/// The runs of some rows, none twice.
std::vector<Run> all_runs(const std::vector<Experiment>& rows, Index seeds, const Budget& budget) {
  std::vector<Run> runs;
  for (Index seed = 1; seed <= seeds; ++seed) {
    for (const Experiment& row : rows) {
      for (Run& run : runs_of(row, static_cast<std::uint64_t>(seed), budget)) {
        if (std::ranges::find(runs, run.name, &Run::name) == runs.end()) {
          runs.push_back(std::move(run));
        }
      }
    }
  }
  return runs;
}

void make_folder(const fs::path& path) {
  std::error_code failure;
  fs::create_directories(path, failure);
  if (failure) cannot_write(path.string(), "it cannot be made a folder, " + failure.message());
}

void write_table(const std::vector<Experiment>& rows, Index seeds, const Budget& budget,
                 const ReproduceOptions& options) {
  const std::string& table = rows.front().table;
  const Budget published;
  std::string csv =
      "table,dataset,kernel,model,rate,setting,metric,seeds,epochs,teacher_width,teacher_epochs,"
      "mean,std,paper_mean,paper_std,difference,deviations,contracted\n";
  std::string text =
      "# Table " + table + ", reproduced\n\n`" + options.command +
      "`\n\nIn percent; seeds from 1 on. The paper's are means and standard "
      "deviations of five trainings of 150 epochs.\n\n"
      "| data | kernel | network | setting | measure | seeds | epochs | ours | paper "
      "| difference | within 3 deviations | contracted |\n"
      "|---|---|---|---|---|---|---|---|---|---|---|---|\n";
  for (const Experiment& row : rows) {
    std::vector<Outcome> outcomes;
    bool teacher = false;
    for (Index seed = 1; seed <= seeds; ++seed) {
      const Run run = runs_of(row, static_cast<std::uint64_t>(seed), budget).back();
      teacher = !run.teacher.empty();
      auto outcome = outcome_of(run, options.out);
      if (outcome) outcomes.push_back(std::move(*outcome));
    }
    const bool shortened = budget.epochs != published.epochs ||
                           (teacher && (budget.teacher_width != published.teacher_width ||
                                        budget.teacher_epochs != published.teacher_epochs));
    const std::string teacher_width = teacher ? std::to_string(budget.teacher_width) : "",
                      teacher_epochs = teacher ? std::to_string(budget.teacher_epochs) : "";
    const bool contracted = std::ranges::all_of(outcomes, &Outcome::contracted);
    const std::string rate = row.rate ? shortest(*row.rate) : "";
    for (const auto& [metric, paper_mean, paper_deviation] : row.published) {
      const Measured ours = measured(outcomes, metric);
      const bool any = ours.seeds > 0;
      const double difference = ours.mean - paper_mean, deviations = difference / paper_deviation;
      const std::string deviation = ours.deviation ? tool::fixed(*ours.deviation, 2) : "";
      const std::string contraction = !any ? "" : contracted ? "identical" : "different";
      csv += table + ',' + row.dataset + ',' + std::to_string(row.kernel) + ',' + row.model + ',' +
             rate + ',' + row.setting + ',' + metric + ',' + std::to_string(ours.seeds) + ',' +
             std::to_string(budget.epochs) + ',' + teacher_width + ',' + teacher_epochs + ',' +
             (any ? tool::fixed(ours.mean, 2) : "") + ',' + deviation + ',' +
             tool::fixed(paper_mean, 2) + ',' + tool::fixed(paper_deviation, 2) + ',' +
             (any ? signed_number(difference) : "") + ',' +
             (any ? tool::fixed(deviations, 1) : "") + ',' + contraction + '\n';
      std::string within;
      if (any && shortened) within = "shortened";
      if (any && !shortened) {
        within = std::abs(deviations) <= 3 ? "yes" : "**no**, " + signed_number(deviations);
      }
      const std::string model = row.model + (rate.empty() ? "" : ", r = " + rate);
      const std::string epochs =
          std::to_string(budget.epochs) +
          (teacher ? " (teacher of width " + teacher_width + ": " + teacher_epochs + ')' : "");
      const std::string mean =
          any ? tool::fixed(ours.mean, 2) + (ours.deviation ? " ± " + deviation : "") : "";
      text += "| " + row.dataset + " | " + std::to_string(row.kernel) + " | " + model + " | " +
              row.setting + " | " + words_of(metric) + " | " + std::to_string(ours.seeds) + " | " +
              (any ? epochs : "") + " | " + mean + " | " + tool::fixed(paper_mean, 2) + " ± " +
              tool::fixed(paper_deviation, 2) + " | " + (any ? signed_number(difference) : "") +
              " | " + within + " | " + contraction + " |\n";
    }
  }
  write_text(options.out / ("table-" + table + ".csv"), csv);
  write_text(options.out / ("table-" + table + ".md"), text);
}

}  // namespace

std::vector<std::string> run_trainings(const std::vector<Run>& runs,
                                       const ReproduceOptions& options) {
  make_folder(options.out / "runs");
  Datasets datasets(options.data);
  for (const Run& run : runs) static_cast<void>(datasets[run.dataset]);
  const Index cores = thread_count(0);
  const Index jobs =
      std::max<Index>(1, std::min(options.jobs > 0 ? options.jobs : cores, std::ssize(runs)));
  Queue queue(runs);
  std::mutex mutex;  // of what follows, and of standard error
  std::vector<std::string> failures;
  const auto work = [&] {
    ThreadPool pool(std::max<Index>(1, cores / jobs));
    while (const Run* run = queue.take()) {
      const auto report = [&](const EpochRecord& epoch) {
        const std::lock_guard lock(mutex);
        std::cerr << run->name << ": epoch " << epoch.epoch << '/' << run->recipe.epochs
                  << ", loss " << tool::brief(epoch.train_loss) << ", test accuracy "
                  << tool::fixed(100 * epoch.test_accuracy, 2) << "%, " << clock_time(epoch.seconds)
                  << '\n';
      };
      bool succeeded = false;
      try {
        complete(*run, datasets[run->dataset], options, pool, report);
        succeeded = true;
      } catch (const std::exception& error) {
        const std::lock_guard lock(mutex);
        failures.push_back(run->name + ": " + error.what());
      }
      queue.finish(*run, succeeded);
    }
  };
  std::vector<std::jthread> threads;
  for (Index job = 1; job < jobs; ++job) threads.emplace_back(work);
  work();
  threads.clear();  // joins
  for (const Run* run : queue.left()) {
    failures.push_back(run->name + ": not run, for it needs one that failed");
  }
  return failures;
}

std::vector<std::string> reproduce_table(const std::vector<Experiment>& rows, Index seeds,
                                         const Budget& budget, const ReproduceOptions& options) {
  std::vector<Experiment> possible;
  std::vector<std::string> notes;
  std::string why;
  for (const char* name : {"cifar10", "cifar100"}) {
    const std::string published = published_dataset(name);
    std::vector<Experiment> own;
    std::ranges::copy_if(rows, std::back_inserter(own),
                         [&](const Experiment& row) { return row.dataset == published; });
    if (own.empty()) continue;
    try {
      require_files(options.data, name);
      possible.insert(possible.end(), own.begin(), own.end());
    } catch (const concertina::IoError& error) {
      why = error.what();
      notes.push_back("Without " + published + ", whose rows stay empty: " + why);
    }
  }
  if (possible.empty()) throw concertina::IoError(why);
  for (const std::string& note : notes) std::cerr << tool::printable(note) << '\n';
  const auto failures = run_trainings(all_runs(possible, seeds, budget), options);
  write_table(rows, seeds, budget, options);
  return failures;
}

std::vector<std::string> reproduce_figure(const std::string& figure, const std::string& dataset,
                                          Index kernel, std::uint64_t seed, Index epochs,
                                          const ReproduceOptions& options) {
  const std::vector<Curve> curves = curves_of(figure, dataset, kernel, seed, epochs);
  std::vector<Run> runs;
  for (const Curve& curve : curves) runs.push_back(curve.run);
  auto failures = run_trainings(runs, options);
  if (!failures.empty()) return failures;
  const std::string name = "figure-" + figure + "-" + dataset + "-k" + std::to_string(kernel);
  const std::string title = published_dataset(dataset) + ", kernel " + std::to_string(kernel) +
                            ", " + tool::counted(epochs, "epoch");
  if (figure == "S1") {
    std::vector<Panel> panels;
    const Dataset data = read_dataset(options.data, dataset);
    ThreadPool pool(thread_count(0));
    for (const Curve& curve : curves) {
      const fs::path csv = options.out / (name + "-" + curve.run.network.model + ".csv");
      const auto compact =
          read_safetensors(folder_of(curve.run, options.out) / "compact.safetensors");
      const Landscape found = with_network(compact, pool, [&](auto& network) {
        return landscape(network, data, LandscapeOptions());
      });
      write_landscape(csv, found);
      const auto [least, most] = std::ranges::minmax(found.losses);
      panels.push_back({curve.title, csv.filename().string(), least, most});
    }
    plot_landscapes(options.out, name, title, panels);
    return failures;
  }
  std::vector<Line> lines;
  for (const Curve& curve : curves) {
    const Outcome outcome = outcome_of(curve.run, options.out).value();
    Line& line = lines.emplace_back(Line{.title = curve.title, .epochs = outcome.epochs});
    if (curve.run.similarities > 0) {
      line.similarities = read_similarities(folder_of(curve.run, options.out) / "similarities.csv");
    }
  }
  plot_training(options.out, name, title, lines);
  return failures;
}

}  // namespace cifar
