// SPDX-License-Identifier: Apache-2.0
#include "reproduce.hpp"

#include "commands.hpp"
#include "folder_lock.hpp"
#include "log.hpp"
#include "plot.hpp"
#include "similarity.hpp"
#include "text.hpp"
#include "text_file.hpp"
#include "trained_network.hpp"

#include <algorithm>
#include <condition_variable>
#include <deque>
#include <functional>
#include <iostream>
#include <map>
#include <mutex>
#include <optional>
#include <ranges>
#include <set>
#include <thread>
#include <utility>

namespace cifar {
namespace {

namespace fs = std::filesystem;

fs::path folder_of(const Run& run, const fs::path& out) { return out / "runs" / run.name; }

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

  /// No run is taken any more.
  void stop() {
    const std::lock_guard lock(mutex_);
    waiting_.clear();
    changed_.notify_all();
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

/// Whether a training of blocks can be a device's, which computes them layer by layer: it has not
/// begun, or so.
bool is_layered(const fs::path& folder) {
  const fs::path checkpoint = folder / "checkpoint.safetensors";
  return !is_there(checkpoint) ||
         options_of(concertina::io::read_safetensors(checkpoint)).compute == Compute::layered;
}

/// Trains and contracts, as far as that is not done.
void complete(const Run& run, const Dataset& data, const ReproduceOptions& options,
              ThreadPool& pool, const std::function<void(const EpochRecord&)>& report) {
  const fs::path folder = folder_of(run, options.out);
  const fs::path best = folder / "best.onnx", compact = folder / "compact.onnx";
  const auto file_of = [&](const std::string& name) {
    return name.empty() ? fs::path() : options.out / "runs" / name / "best.onnx";
  };
  const bool accelerable = run.similarities == 0 && is_accelerable(run.network) &&
                           (!run.network.is_block() || is_layered(folder));
  TrainOptions training{
      .network = run.network,
      .recipe = run.recipe,
      .out = folder,
      .init = file_of(run.init),
      .teacher = file_of(run.teacher),
      .similarities = std::min(run.similarities, run.recipe.batches(data.train.count())),
      .resume = true,
      .command = options.command,
      .device = accelerable ? options.device : Device::cpu,
      .report = [&](const EpochRecord& epoch) {
        fs::remove(compact);  // of an earlier network
        report(epoch);
      }};
  training.network.classes = data.classes;
  static_cast<void>(train(training, data, pool));  // at its end already, checks that it is the same
  if (!outcome_of(folder, run.recipe.epochs) || !is_there(best) ||
      (run.similarities > 0 && !is_there(folder / "similarities.csv"))) {
    throw concertina::Error(
        folder.string() + ": files of the training are missing; remove the folder to train again");
  }
  if (!contracts(run.network)) return;
  if (is_there(compact)) {
    require_data(read_network(compact), data);
    return;
  }
  const ContractionCheck check = check_contraction(read_network(best), data, pool);
  if (!check.identical()) {
    throw concertina::Error("contracted, " + std::to_string(check.compact.correct) +
                            " test images are right, and not " +
                            std::to_string(check.expanded.correct));
  }
  concertina::onnx::write_model(compact, check.network);
}

/// The runs of some rows that are not done, none twice.
std::vector<Run> all_runs(const std::vector<Experiment>& rows, Index seeds, const Budget& budget,
                          const std::map<std::string, Outcome>& done) {
  std::vector<Run> runs;
  for (Index seed = 1; seed <= seeds; ++seed) {
    for (const Experiment& row : rows) {
      std::vector<Run> own = runs_of(row, static_cast<std::uint64_t>(seed), budget);
      if (done.contains(own.back().name)) continue;
      for (Run& run : own) {
        if (std::ranges::find(runs, run.name, &Run::name) == runs.end()) {
          runs.push_back(std::move(run));
        }
      }
    }
  }
  return runs;
}

/// The names of runs that have not ended in their folders.
std::vector<std::string> unfinished(const std::vector<Run>& runs, const fs::path& out) {
  std::vector<std::string> names;
  for (const Run& run : runs) {
    const auto outcome = outcome_of(folder_of(run, out), run.recipe.epochs);
    if (!outcome || (contracts(run.network) && !outcome->contracted)) names.push_back(run.name);
  }
  return names;
}

void make_folder(const fs::path& path) {
  std::error_code failure;
  fs::create_directories(path, failure);
  if (failure) cannot_write(path.string(), "it cannot be made a folder, " + failure.message());
}

void write_table(const std::vector<Experiment>& rows, Index seeds, const Budget& budget,
                 const ReproduceOptions& options) {
  std::vector<TableRow> filled;
  for (const Experiment& row : rows) {
    TableRow& each = filled.emplace_back(TableRow{row, {}});
    for (Index seed = 1; seed <= seeds; ++seed) {
      const Run run = runs_of(row, static_cast<std::uint64_t>(seed), budget).back();
      auto outcome = outcome_of(folder_of(run, options.out), run.recipe.epochs);
      const auto done = options.done.find(run.name);
      if (!outcome && done != options.done.end()) outcome = done->second;
      if (outcome) each.outcomes.push_back(std::move(*outcome));
    }
  }
  const Table table = results_table(filled, budget, options.command);
  write_text(table_path(rows.front().table, budget, options.out, ".csv"), table.csv);
  write_text(table_path(rows.front().table, budget, options.out, ".md"), table.markdown);
}

/// What others need first, teachers before all: they take longest.
std::vector<Run> in_order(const std::vector<Run>& runs) {
  const auto rank = [&](const Run& run) {
    if (run.network.is_resnet()) return 0;
    return std::ranges::any_of(runs, [&](const Run& other) { return other.init == run.name; }) ? 1
                                                                                               : 2;
  };
  std::vector<Run> ordered;
  for (const int wanted : {0, 1, 2}) {
    std::ranges::copy_if(runs, std::back_inserter(ordered),
                         [&](const Run& run) { return rank(run) == wanted; });
  }
  return ordered;
}

}  // namespace

std::string figure_name(const std::string& figure, const std::string& dataset, Index kernel) {
  return "figure-" + figure + "-" + dataset + "-k" + std::to_string(kernel);
}

std::vector<Missing> missing_of(const std::vector<Experiment>& rows, Index seeds,
                                const Budget& budget, const ReproduceOptions& options) {
  std::vector<Missing> missing;
  for (Index number = 1; number <= seeds; ++number) {
    const auto seed = static_cast<std::uint64_t>(number);
    for (const Experiment& row : rows) {
      const std::vector<Run> runs = runs_of(row, seed, budget);
      if (options.done.contains(runs.back().name)) continue;
      std::vector<std::string> names = unfinished(runs, options.out);
      if (names.empty() || names.back() != runs.back().name) continue;
      missing.push_back({row.name(), seed, std::move(names)});
    }
  }
  return missing;
}

std::vector<std::string> missing_of(const std::vector<Curve>& curves,
                                    const ReproduceOptions& options) {
  std::vector<Run> runs;
  for (const Curve& curve : curves) runs.push_back(curve.run);
  return unfinished(runs, options.out);
}

fs::path table_path(const std::string& table, const Budget& budget, const fs::path& out,
                    const char* extension) {
  return out / ("table-" + table + budget.marks() + extension);
}

std::vector<std::string> run_trainings(const std::vector<Run>& unordered,
                                       const ReproduceOptions& options) {
  const std::vector<Run> runs = in_order(unordered);
  const FolderLock lock_of_folder(options.out / "runs");
  Datasets datasets(options.data);
  for (const Run& run : runs) static_cast<void>(datasets[run.dataset]);
  const Index cores = thread_count(0);
  const Index jobs =
      std::max<Index>(1, std::min(options.jobs > 0 ? options.jobs : cores, std::ssize(runs)));
  Queue queue(runs);
  std::mutex mutex;  // of what follows, and of standard error
  std::vector<std::string> failures;
  std::deque<ThreadPool> pools;
  for (Index job = 0; job < jobs; ++job) pools.emplace_back(std::max<Index>(1, cores / jobs));
  const auto work = [&](ThreadPool& pool) {
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
  {
    std::vector<std::jthread> threads;
    try {
      for (ThreadPool& pool : pools | std::views::drop(1)) {
        threads.emplace_back(work, std::ref(pool));
      }
    } catch (...) {
      queue.stop();
      throw;
    }
    work(pools.front());
  }
  for (const Run* run : queue.left()) {
    failures.push_back(run->name + ": not run, for it needs one that failed");
  }
  return failures;
}

std::vector<std::string> reproduce_table(const std::vector<Experiment>& rows, Index seeds,
                                         const Budget& budget, const ReproduceOptions& options) {
  if (options.data.empty()) {
    make_folder(options.out);
    write_table(rows, seeds, budget, options);
    return {};
  }
  std::vector<Experiment> possible;
  std::vector<std::string> notes;
  std::string why;
  std::set<std::string> published_names;
  for (const Experiment& row : rows) published_names.insert(row.dataset);
  for (const std::string& published : published_names) {
    std::vector<Experiment> own;
    std::ranges::copy_if(rows, std::back_inserter(own),
                         [&](const Experiment& row) { return row.dataset == published; });
    try {
      require_files(options.data, dataset_name(published));
      possible.insert(possible.end(), own.begin(), own.end());
    } catch (const concertina::IoError& error) {
      why = error.what();
      notes.push_back("Without " + published + ", whose rows stay empty: " + why);
    }
  }
  if (possible.empty()) throw concertina::IoError(why);
  for (const std::string& note : notes) std::cerr << tool::printable(note) << '\n';
  const auto failures = run_trainings(all_runs(possible, seeds, budget, options.done), options);
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
  const std::string name = figure_name(figure, dataset, kernel);
  const std::string title = published_dataset(dataset) + ", kernel " + std::to_string(kernel) +
                            ", " + tool::counted(epochs, "epoch");
  if (figure == "S1") {
    std::vector<Panel> panels;
    const Dataset data = read_dataset(options.data, dataset);
    ThreadPool pool(thread_count(0));
    for (const Curve& curve : curves) {
      const fs::path csv = options.out / (name + "-" + curve.run.network.model + ".csv");
      const auto compact = read_network(folder_of(curve.run, options.out) / "compact.onnx");
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
    const Outcome outcome =
        outcome_of(folder_of(curve.run, options.out), curve.run.recipe.epochs).value();
    Line& line = lines.emplace_back(Line{.title = curve.title, .epochs = outcome.epochs});
    if (curve.run.similarities > 0) {
      line.similarities = read_similarities(folder_of(curve.run, options.out) / "similarities.csv");
    }
  }
  plot_training(options.out, name, title, lines);
  return failures;
}

}  // namespace cifar
