// SPDX-License-Identifier: Apache-2.0
#include "commands.hpp"

#include "text.hpp"
#include "text_file.hpp"
#include "trained_network.hpp"

#include <nlohmann/json.hpp>

#include <sched.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <iostream>
#include <memory>
#include <optional>
#include <sstream>
#include <thread>

namespace cifar {
namespace {

using concertina::Error, concertina::FormatError;

std::string percentage(double share) { return tool::fixed(100 * share, 2) + '%'; }

/// Errors of options are mistakes in the command line.
template <class Check>
void as_usage(Check&& check) {
  try {
    check();
  } catch (const Error& error) {
    throw tool::UsageError(error.what());
  }
}

void require_other_output(const CommandLine& line) {
  std::error_code ignored;
  if (!std::filesystem::equivalent(line.file, line.output, ignored)) return;
  throw tool::UsageError(line.output + " is the input, which would be lost; name another file");
}

/// The threads that are asked for; as many as there are cores for 0.
Index thread_count(Index asked) {
  if (asked < 0 || asked > 1024) {
    throw tool::UsageError(std::to_string(asked) +
                           " threads; 1 to 1024 are possible, 0 for every core");
  }
  if (asked > 0) return asked;
  cpu_set_t cores;  // that the process may run on, as taskset says; not all that there are
  if (sched_getaffinity(0, sizeof cores, &cores) == 0) return CPU_COUNT(&cores);
  return std::max<Index>(1, std::thread::hardware_concurrency());
}

}  // namespace

Dataset open_dataset(const DataOptions& options) {
  if (!options.folder.empty()) return read_dataset(options.folder, options.name);
  std::cerr
      << "No --data: using a small set of generated images, which says nothing about CIFAR.\n";
  return generated_dataset(options.name == "cifar100" ? 100 : 10, 2000, 500, 1);
}

int run_train(CommandLine& line) {
  TrainOptions& options = line.training;
  options.device = line.device;
  options.command = line.words;
  as_usage([&] { options.validate(); });
  const Dataset data = open_dataset(line.data);
  ThreadPool pool(thread_count(line.threads));
  options.network.classes = data.classes;
  const TrainResult result = train(options, data, pool);
  std::cout << options.network.model << ", " << tool::grouped(result.parameters)
            << " parameters, on " << data.name << ": best test accuracy "
            << percentage(result.best_accuracy) << " in epoch " << result.best_epoch << ", last "
            << percentage(result.last_accuracy) << '\n';
  return tool::ok;
}

int run_eval(CommandLine& line) {
  const auto file = read_network(line.file);
  const Dataset data = open_dataset(line.data);
  require_data(file, data);
  ThreadPool pool(thread_count(line.threads));
  const Score score =
      with_network(file, pool, [&](auto& network) { return tested(network, data, line.file); });
  if (line.json) {
    std::cout << nlohmann::json{{"file", line.file},      {"data", data.name},
                                {"loss", score.loss},     {"correct", score.correct},
                                {"images", score.images}, {"accuracy", score.accuracy()}}
                     .dump(2)
              << '\n';
  } else {
    std::cout << tool::grouped(score.correct) << " of " << tool::grouped(score.images)
              << " test images of " << data.name << " right, " << percentage(score.accuracy())
              << "; loss " << tool::fixed(score.loss, 4) << '\n';
  }
  return tool::ok;
}

int run_contract(CommandLine& line) {
  if (!line.output.ends_with(".onnx")) {
    throw tool::UsageError(line.output + ": what is written is an ONNX model, *.onnx");
  }
  require_other_output(line);
  const auto file = read_network(line.file);
  const Dataset data = open_dataset(line.data);
  ThreadPool pool(thread_count(line.threads));
  const ContractionCheck check = check_contraction(file, data, pool);
  const auto row = [](const char* form, Index parameters, const Score& score) {
    return std::vector<std::string>{form, tool::grouped(parameters), tool::grouped(score.correct),
                                    tool::grouped(score.images), percentage(score.accuracy())};
  };
  std::cout << tool::table({{"form", "parameters", "right", "of", "accuracy"},
                            row("expanded", check.expanded_parameters, check.expanded),
                            row("compact", check.compact_parameters, check.compact)});
  if (!check.identical()) {
    std::cout << "DIFFERENT: the compact network was not written.\n";
    return tool::failed;
  }
  concertina::onnx::write_model(line.output, check.network);
  std::cout << "Identical accuracy; the compact network is in " << tool::printable(line.output)
            << ".\n";
  return tool::ok;
}

int run_drift(CommandLine& line) {
  NetworkOptions& network = line.training.network;
  const Recipe& recipe = line.training.recipe;
  as_usage([&] {
    network.validate();
    recipe.validate();
  });
  const Dataset data = open_dataset(line.data);
  ThreadPool pool(thread_count(line.threads));
  network.classes = data.classes;
  const Drift found = drift(network, recipe, data, line.steps, pool);
  std::cout << "Largest relative difference of a loss, " << tool::counted(line.steps, "step")
            << " of " << network.model << " with kernel " << network.kernel << " on " << data.name
            << ":\n"
            << tool::table(
                   {{"trainings", "difference"},
                    {"double, contracted and layered", tool::brief(found.contracted_in_double)},
                    {"float, contracted and layered", tool::brief(found.contracted)},
                    {"float, layered in two orders of summation", tool::brief(found.reversed)}});
  return tool::ok;
}

int run_landscape(CommandLine& line) {
  as_usage([&] { line.landscape.validate(); });
  require_other_output(line);
  auto file = read_network(line.file);
  const Dataset data = open_dataset(line.data);
  require_data(file, data);
  ThreadPool pool(thread_count(line.threads));
  if (!line.expanded) {
    if (!contracts(options_of(file))) {
      throw FormatError(line.file +
                        ": a network that contracts to no compact one; name its own "
                        "parameters with --expanded");
    }
    file = with_network(file, pool, [](auto& network) { return tensors_of(network.contract()); });
    file.origin = line.file + ", contracted";
  }
  const Landscape found = with_network(
      file, pool, [&](auto& network) { return landscape(network, data, line.landscape); });
  write_landscape(line.output, found);
  const auto [least, most] = std::ranges::minmax(found.losses);
  std::cout << "Loss " << tool::brief(found.losses[found.losses.size() / 2]) << " at the network, "
            << tool::brief(least) << " to " << tool::brief(most) << " around it; "
            << tool::counted(std::ssize(found.losses), "point") << " in "
            << tool::printable(line.output) << ".\n";
  return tool::ok;
}

int run_bench(CommandLine& line) {
  struct Row {
    std::string model;
    Compute compute;
    bool forked;
    std::unique_ptr<Training<float>> training;
    std::vector<double> rates = {};
    double median = 0;
  };
  const Index batch = line.training.recipe.batch;
  const NetworkOptions& asked = line.training.network;
  ThreadPool pool(thread_count(line.threads));
  as_usage([&] {
    require_option(line.seconds > 0 && line.seconds <= 3600, "seconds", line.seconds,
                   "up to an hour is possible");
    require_built_for(line.device);
  });
  const bool on_device = line.device != Device::cpu;
  // A device is given whole epochs, so long that their ends do not count.
  const Dataset data = generated_dataset(10, on_device ? 100 * batch : 2048, 16, 1);
  const Recipe recipe{.epochs = 1'000'000, .batch = batch};
  as_usage([&] { recipe.validate(); });
  std::vector<std::string> models = line.models;
  if (models.empty()) {
    models = {"compact", "cl", "cl+fc"};
    if (asked.kernel > 3) models.insert(models.end(), {"ck", "ck+fc"});
  }
  std::vector<Row> rows;
  for (const std::string& model : models) {
    for (const Compute compute : {Compute::contracted, Compute::layered}) {
      NetworkOptions network = asked;
      network.model = model;
      const bool has_layers = network.is_expanded() || network.is_block();
      if (!has_layers && compute == Compute::layered) continue;
      // A device contracts expansions, but not blocks with norms.
      if (on_device && network.is_block() != (compute == Compute::layered)) continue;
      network.compute = compute;
      if (on_device) as_usage([&] { require_accelerable(network); });
      as_usage([&] { network.validate(); });
      // On a device also one launch after another, to see what streams bring.
      for (const bool forked : {true, false}) {
        if (!forked && !on_device) continue;
        rows.push_back({model, compute, forked,
                        std::make_unique<Training<float>>(network, recipe, data, pool)});
        rows.back().training->compute_on(line.device, {.forked = forked});
      }
    }
  }
  // Rounds of all forms in turn, so that what disturbs the machine disturbs each alike.
  constexpr int rounds = 7;
  for (int round = -1; round < rounds; ++round) {  // the first warms up
    for (Row& row : rows) {
      using Clock = std::chrono::steady_clock;
      const auto start = Clock::now();
      Index images = 0;
      double seconds = 0;
      do {
        if (on_device) {
          images += row.training->epoch().images;
        } else {
          if (!row.training->more_batches()) row.training->begin_epoch();
          images += row.training->step().images;
        }
        seconds = std::chrono::duration<double>(Clock::now() - start).count();
      } while (seconds < line.seconds / rounds);
      if (round >= 0) row.rates.push_back(static_cast<double>(images) / seconds);
    }
  }
  nlohmann::json json = {{"threads", pool.size()},
                         {"batch", batch},
                         {"kernel", asked.kernel},
                         {"rate", asked.rate},
                         {"blocks", asked.blocks},
                         {"augmentation", true},
                         {"device", device_names.of(line.device)},
                         {"rows", nlohmann::json::array()}};
  std::vector<std::vector<std::string>> table = {
      {"model", "computed", "parameters", "images/s", "of compact", "of layered"}};
  const auto ratio_to = [&](const Row& row, auto&& matches) -> std::optional<double> {
    const auto base = std::ranges::find_if(rows, matches);
    if (base == rows.end()) return std::nullopt;
    std::vector<double> ratios;
    for (std::size_t i = 0; i < row.rates.size(); ++i) {
      ratios.push_back(row.rates[i] / base->rates[i]);
    }
    std::ranges::nth_element(ratios, ratios.begin() + rounds / 2);
    return ratios[rounds / 2];
  };
  for (Row& row : rows) {
    const std::string mode = compute_names.of(row.compute) + (row.forked ? "" : ", not forked");
    auto sorted = row.rates;
    std::ranges::nth_element(sorted, sorted.begin() + rounds / 2);
    row.median = sorted[rounds / 2];
    const std::optional<double> of_compact = ratio_to(row, [&](const Row& other) {
      return other.model == "compact" && other.forked == row.forked;
    });
    const std::optional<double> of_layered = ratio_to(row, [&](const Row& other) {
      return other.model == row.model && other.compute == Compute::layered;
    });
    json["rows"].push_back({{"model", row.model},
                            {"mode", mode},
                            {"parameters", row.training->network().parameter_count()},
                            {"images_per_second", row.median},
                            {"of_compact", of_compact ? nlohmann::json(*of_compact) : nullptr},
                            {"of_layered", of_layered ? nlohmann::json(*of_layered) : nullptr},
                            {"images_per_second_by_round", row.rates}});
    table.push_back({row.model, mode, tool::grouped(row.training->network().parameter_count()),
                     tool::grouped(static_cast<Index>(row.median)),
                     of_compact ? tool::fixed(*of_compact, 2) : "",
                     of_layered ? tool::fixed(*of_layered, 2) : ""});
  }
  if (line.json) {
    std::cout << json.dump(2) << '\n';
  } else {
    std::cout << "A training step (augmentation, forward, backward, update): kernel "
              << asked.kernel << ", batch " << batch << ", "
              << (on_device ? device_names.of(line.device) : tool::counted(pool.size(), "thread"))
              << "; ratios are medians of rounds in turn.\n"
              << tool::table(table);
  }
  return tool::ok;
}

}  // namespace cifar
