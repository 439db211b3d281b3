// SPDX-License-Identifier: Apache-2.0
#include "commands.hpp"

#include "text.hpp"

#include <concertina/io/safetensors.hpp>

#include <nlohmann/json.hpp>

#include <algorithm>
#include <chrono>
#include <iostream>
#include <memory>
#include <optional>
#include <sstream>
#include <thread>

namespace cifar {
namespace {

using concertina::Error, concertina::FormatError;

std::string fixed(double number, int digits) {
  std::ostringstream text;
  text.precision(digits);
  text << std::fixed << number;
  return text.str();
}

std::string percentage(double share) { return fixed(100 * share, 2) + '%'; }

bool is_double(const concertina::io::Safetensors& file) {
  return file.tensor("fc2.weight").dtype == concertina::io::Dtype::F64;
}

/// Calls use(network) with the network of a file, in its scalar.
template <class Use>
auto with_network(const concertina::io::Safetensors& file, ThreadPool& pool, Use&& use) {
  constexpr Index batch = 128;
  const NetworkOptions options = options_of(file);
  const auto run = [&]<class Scalar>(Scalar) {
    Network<Scalar> network(options, batch, pool);
    network.load(file);
    return use(network);
  };
  return is_double(file) ? run(double()) : run(float());
}

/// Errors of options are mistakes in the command line.
template <class Check>
void as_usage(Check&& check) {
  try {
    check();
  } catch (const Error& error) {
    throw tool::UsageError(error.what());
  }
}

/// The data set that a file's network is for.
void require_data(const concertina::io::Safetensors& file, const Dataset& data) {
  const Index classes = options_of(file).classes;
  const auto normalization = normalization_of(file);
  if (normalization && *normalization != Normalization{data.mean, data.deviation}) {
    throw FormatError(file.origin +
                      ": the network was trained on images normalised otherwise than "
                      "those of the data set " +
                      data.name + "; name its own with --data and --dataset");
  }
  if (classes == data.classes) return;
  throw FormatError(file.origin + ": a network of " + std::to_string(classes) +
                    " classes; the data set " + data.name + " has " + std::to_string(data.classes));
}

}  // namespace

Index thread_count(Index asked) {
  if (asked < 0 || asked > 1024) {
    throw tool::UsageError(std::to_string(asked) +
                           " threads; 1 to 1024 are possible, 0 for every core");
  }
  return asked > 0 ? asked : std::max<Index>(1, std::thread::hardware_concurrency());
}

Dataset open_dataset(const DataOptions& options) {
  if (!options.folder.empty()) return read_dataset(options.folder, options.name);
  std::cerr
      << "No --data: using a small set of generated images, which says nothing about CIFAR.\n";
  return generated_dataset(options.name == "cifar100" ? 100 : 10, 2000, 500, 1);
}

int run_train(TrainCommand command) {
  as_usage([&] {
    command.options.network.validate();
    command.options.recipe.validate();
  });
  const Dataset data = open_dataset(command.data);
  ThreadPool pool(thread_count(command.threads));
  command.options.network.classes = data.classes;
  const TrainResult result = train(command.options, data, pool);
  std::cout << command.options.network.model << ", " << tool::grouped(result.parameters)
            << " parameters, on " << data.name << ": best test accuracy "
            << percentage(result.best_accuracy) << " in epoch " << result.best_epoch << ", last "
            << percentage(result.last_accuracy) << '\n';
  return tool::ok;
}

int run_eval(const EvalCommand& command) {
  const auto file = concertina::io::read_safetensors(command.file);
  const Dataset data = open_dataset(command.data);
  require_data(file, data);
  ThreadPool pool(thread_count(command.threads));
  const Score score =
      with_network(file, pool, [&](auto& network) { return evaluate(network, data, data.test); });
  if (command.json) {
    std::cout << nlohmann::json{{"file", command.file},   {"data", data.name},
                                {"loss", score.loss},     {"correct", score.correct},
                                {"images", score.images}, {"accuracy", score.accuracy()}}
                     .dump(2)
              << '\n';
  } else {
    std::cout << tool::grouped(score.correct) << " of " << tool::grouped(score.images)
              << " test images of " << data.name << " right, " << percentage(score.accuracy())
              << "; loss " << fixed(score.loss, 4) << '\n';
  }
  return tool::ok;
}

int run_contract(const ContractCommand& command) {
  const auto file = concertina::io::read_safetensors(command.in);
  const Dataset data = open_dataset(command.data);
  require_data(file, data);
  ThreadPool pool(thread_count(command.threads));
  concertina::io::Safetensors compact;
  Index expanded_count = 0;
  const Score expanded = with_network(file, pool, [&](auto& network) {
    compact = network.contract();
    expanded_count = network.parameter_count();
    return evaluate(network, data, data.test);
  });
  compact.origin = command.out;
  Index compact_count = 0;
  const Score contracted = with_network(compact, pool, [&](auto& network) {
    compact_count = network.parameter_count();
    return evaluate(network, data, data.test);
  });
  const auto row = [](const char* form, Index parameters, const Score& score) {
    return std::vector<std::string>{form, tool::grouped(parameters), tool::grouped(score.correct),
                                    tool::grouped(score.images), percentage(score.accuracy())};
  };
  std::cout << tool::table({{"form", "parameters", "right", "of", "accuracy"},
                            row("expanded", expanded_count, expanded),
                            row("compact", compact_count, contracted)});
  if (expanded.correct != contracted.correct) {
    std::cout << "DIFFERENT: the compact network was not written.\n";
    return tool::failed;
  }
  concertina::io::write_safetensors(command.out, compact);
  std::cout << "Identical accuracy; the compact network is in " << tool::printable(command.out)
            << ".\n";
  return tool::ok;
}

int run_drift(DriftCommand command) {
  as_usage([&] {
    command.network.validate();
    command.recipe.validate();
  });
  const Dataset data = open_dataset(command.data);
  ThreadPool pool(thread_count(command.threads));
  command.network.classes = data.classes;
  const Drift found = drift(command.network, command.recipe, data, command.steps, pool);
  std::cout << "Largest relative difference of a loss, " << tool::counted(command.steps, "step")
            << " of " << command.network.model << " with kernel " << command.network.kernel
            << " on " << data.name << ":\n"
            << tool::table(
                   {{"trainings", "difference"},
                    {"double, contracted and layered", tool::brief(found.contracted_in_double)},
                    {"float, contracted and layered", tool::brief(found.contracted)},
                    {"float, layered in two orders of summation", tool::brief(found.reversed)}});
  return tool::ok;
}

int run_bench(const BenchCommand& command) {
  struct Row {
    std::string model;
    Compute compute;
    std::unique_ptr<Training<float>> training;
    std::vector<double> rates = {};
    double median = 0;
  };
  if (!(command.seconds > 0 && command.seconds <= 3600)) {
    throw tool::UsageError("seconds " + fixed(command.seconds, 3) + "; up to an hour is possible");
  }
  ThreadPool pool(thread_count(command.threads));
  const Dataset data = generated_dataset(10, 2048, 16, 1);
  const Recipe recipe{.epochs = 1'000'000, .batch = command.batch};
  as_usage([&] { recipe.validate(); });
  std::vector<std::string> models = command.models;
  if (models.empty()) {
    models = {"compact", "cl", "cl+fc"};
    if (command.network.kernel > 3) models.insert(models.end(), {"ck", "ck+fc"});
  }
  std::vector<Row> rows;
  for (const std::string& model : models) {
    for (const Compute compute : {Compute::contracted, Compute::layered}) {
      if ((model == "compact" || model == "acnet") && compute == Compute::layered) continue;
      NetworkOptions network = command.network;
      network.model = model;
      network.compute = compute;
      as_usage([&] { network.validate(); });
      rows.push_back(
          {model, compute, std::make_unique<Training<float>>(network, recipe, data, pool)});
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
        if (!row.training->more_batches()) row.training->begin_epoch();
        images += row.training->step().images;
        seconds = std::chrono::duration<double>(Clock::now() - start).count();
      } while (seconds < command.seconds / rounds);
      if (round >= 0) row.rates.push_back(static_cast<double>(images) / seconds);
    }
  }
  nlohmann::json json = {{"threads", pool.size()},           {"batch", command.batch},
                         {"kernel", command.network.kernel}, {"rate", command.network.rate},
                         {"blocks", command.network.blocks}, {"augmentation", true},
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
    auto sorted = row.rates;
    std::ranges::nth_element(sorted, sorted.begin() + rounds / 2);
    row.median = sorted[rounds / 2];
    const std::optional<double> of_compact =
        ratio_to(row, [](const Row& other) { return other.model == "compact"; });
    const std::optional<double> of_layered = ratio_to(row, [&](const Row& other) {
      return other.model == row.model && other.compute == Compute::layered;
    });
    json["rows"].push_back({{"model", row.model},
                            {"mode", name_of(row.compute)},
                            {"parameters", row.training->network().parameter_count()},
                            {"images_per_second", row.median},
                            {"of_compact", of_compact ? nlohmann::json(*of_compact) : nullptr},
                            {"of_layered", of_layered ? nlohmann::json(*of_layered) : nullptr},
                            {"images_per_second_by_round", row.rates}});
    table.push_back(
        {row.model, name_of(row.compute), tool::grouped(row.training->network().parameter_count()),
         tool::grouped(static_cast<Index>(row.median)), of_compact ? fixed(*of_compact, 2) : "",
         of_layered ? fixed(*of_layered, 2) : ""});
  }
  if (command.json) {
    std::cout << json.dump(2) << '\n';
  } else {
    std::cout << "A training step (augmentation, forward, backward, update): kernel "
              << command.network.kernel << ", batch " << command.batch << ", "
              << tool::counted(pool.size(), "thread") << "; ratios are medians of rounds in turn.\n"
              << tool::table(table);
  }
  return tool::ok;
}

}  // namespace cifar
