// SPDX-License-Identifier: Apache-2.0
#include "experiments.hpp"

#include "text.hpp"
#include "text_file.hpp"

#include <concertina/error.hpp>

#include <algorithm>
#include <array>
#include <string_view>
#include <utility>

namespace cifar {
namespace {

using concertina::Error, concertina::FormatError;

struct Name {
  std::string_view ours, published;
};
constexpr std::array models = {Name{"compact", "SmallNet"},      Name{"fc", "FC(Arora18)"},
                               Name{"acnet", "ACNet"},           Name{"cl", "ExpandNet-CL"},
                               Name{"cl+fc", "ExpandNet-CL+FC"}, Name{"ck", "ExpandNet-CK"},
                               Name{"ck+fc", "ExpandNet-CK+FC"}};
constexpr std::array datasets = {Name{"cifar10", "CIFAR-10"}, Name{"cifar100", "CIFAR-100"},
                                 Name{"mnist", "MNIST"}};
constexpr std::array transfers = {Name{"kd", "KD"}, Name{"hint", "Hint"}, Name{"pkt", "PKT"}};
constexpr std::string_view init_suffix = "+Init";
constexpr std::string_view corrupted_prefix = "corrupted-";

template <class Names>
std::string ours(const Names& names, std::string_view published) {
  const auto found = std::ranges::find(names, published, &Name::published);
  return found == std::end(names) ? "" : std::string(found->ours);
}

/// What the words of a row mean.
struct Meaning {
  std::string dataset, model;
  bool init = false;
  Transfer transfer = Transfer::none;
  Index corrupted = 0;  // percent of the labels
};

Meaning meaning_of(const Experiment& row) {
  const auto refuse = [](const std::string& what, const std::string& value) {
    throw FormatError("the " + what + " '" + value + "' of a row of the paper means no training");
  };
  Meaning meaning{.dataset = ours(datasets, row.dataset), .model = {}};
  if (meaning.dataset.empty()) refuse("data set", row.dataset);
  std::string_view model = row.model;
  meaning.init = model.ends_with(init_suffix);
  if (meaning.init) model.remove_suffix(init_suffix.size());
  meaning.model = ours(models, model);
  if (meaning.model.empty()) refuse("model", row.model);
  std::string_view setting = row.setting;
  if (setting.starts_with(corrupted_prefix) && setting.ends_with('%')) {
    setting.remove_prefix(corrupted_prefix.size());
    setting.remove_suffix(1);
    meaning.corrupted = number_in<Index>(setting).value_or(0);
    if (meaning.corrupted < 1 || meaning.corrupted > 100) refuse("setting", row.setting);
  } else if (setting != "none") {
    const std::string transfer = ours(transfers, setting);
    if (transfer.empty()) refuse("setting", row.setting);
    meaning.transfer = transfer_names.of(transfer);
  }
  return meaning;
}

std::string seed_and_epochs(const Recipe& recipe) {
  return "-e" + std::to_string(recipe.epochs) + "-s" + std::to_string(recipe.seed);
}

bool is_expanded(const std::string& model) { return NetworkOptions{.model = model}.is_expanded(); }

/// What tells a network from another in a name: k7-cl+fc-r4.
std::string network_name(const std::string& model, Index kernel, std::optional<double> rate) {
  return "k" + std::to_string(kernel) + "-" + model +
         (rate && is_expanded(model) ? "-r" + shortest(*rate) : "");
}

Run teacher_of(const std::string& dataset, const Budget& budget) {
  Run run{.name = {},
          .dataset = dataset,
          .network = {.model = "resnet18", .width = budget.teacher_width},
          .recipe = {.epochs = budget.teacher_epochs,
                     .learning_rate = 0.1,
                     .keep_momentum = true,
                     .weight_decay = 5e-4}};
  run.name =
      dataset + "-resnet18-w" + std::to_string(budget.teacher_width) + seed_and_epochs(run.recipe);
  return run;
}

}  // namespace

std::string published_dataset(const std::string& name) {
  const auto found = std::ranges::find(datasets, name, &Name::ours);
  if (found != datasets.end()) return std::string(found->published);
  throw Error("there is no data set '" + name + "'; there are cifar10, cifar100, mnist");
}

std::string dataset_name(const std::string& published) {
  const std::string name = ours(datasets, published);
  if (!name.empty()) return name;
  throw Error("there is no data set '" + published + "'; there are CIFAR-10, CIFAR-100, MNIST");
}

bool has_teacher(const Experiment& experiment) {
  return meaning_of(experiment).transfer != Transfer::none;
}

const std::vector<std::string>& metric_names() {
  static const std::vector<std::string> names = {"top1", "best_test_error", "last_test_error",
                                                 "train_error"};
  return names;
}

std::string Budget::marks() const {
  const Budget usual;
  std::string text;
  if (epochs != usual.epochs) text += "-e" + std::to_string(epochs);
  if (teacher_width != usual.teacher_width || teacher_epochs != usual.teacher_epochs) {
    text += "-w" + std::to_string(teacher_width) + "-e" + std::to_string(teacher_epochs);
  }
  if (uniform_norms) text += "-uniform";
  return text;
}

std::string Experiment::name() const {
  const Meaning meaning = meaning_of(*this);
  std::string text = meaning.dataset + "-" + network_name(meaning.model, kernel, rate);
  if (meaning.init) text += "-init";
  if (meaning.transfer != Transfer::none) text += "-" + transfer_names.of(meaning.transfer);
  if (meaning.corrupted > 0) text += "-corrupted" + std::to_string(meaning.corrupted);
  return text;
}

std::vector<Experiment> read_experiments(const std::filesystem::path& path) {
  constexpr std::string_view header = "table,dataset,kernel,model,rate,setting,metric,mean,std";
  const std::string text = read_text(path, 1 << 20, "the paper's figures");
  std::vector<Experiment> experiments;
  Index number = 0;
  for (std::string_view line : split(text, '\n')) {
    ++number;
    const auto refuse = [&](const std::string& why) {
      throw FormatError(path.string() + ": line " + std::to_string(number) + ": " + why);
    };
    if (line.ends_with('\r')) line.remove_suffix(1);
    if (number == 1) {
      if (line != header) refuse("expected \"" + std::string(header) + '"');
      continue;
    }
    if (line.empty()) continue;
    const std::vector<std::string_view> fields = split(line, ',');
    if (fields.size() != 9) refuse(std::to_string(fields.size()) + " fields, expected 9");
    const auto kernel = number_in<Index>(fields[2]);
    const auto rate = number_in<double>(fields[4]);
    const auto mean = number_in<double>(fields[7]), deviation = number_in<double>(fields[8]);
    if (!kernel || (!rate && !fields[4].empty()) || !mean || !deviation) {
      refuse("kernel, rate, mean and std are numbers");
    }
    if (std::ranges::find(metric_names(), fields[6]) == metric_names().end()) {
      refuse("there is no measure '" + std::string(fields[6]) + "'; there are " +
             tool::listed(metric_names()));
    }
    Experiment row{.table = std::string(fields[0]),
                   .dataset = std::string(fields[1]),
                   .model = std::string(fields[3]),
                   .setting = std::string(fields[5]),
                   .kernel = *kernel,
                   .rate = rate,
                   .published = {}};
    try {
      static_cast<void>(meaning_of(row));
    } catch (const FormatError& error) {
      refuse(error.what());
    }
    const auto same = [&](const Experiment& other) {
      return other.table == row.table && other.name() == row.name();
    };
    auto found = std::ranges::find_if(experiments, same);
    if (found == experiments.end()) found = experiments.insert(found, std::move(row));
    found->published.push_back({std::string(fields[6]), *mean, *deviation});
  }
  return experiments;
}

std::vector<Run> runs_of(const Experiment& experiment, std::uint64_t seed, const Budget& budget) {
  const Meaning meaning = meaning_of(experiment);
  const bool deeper = experiment.table == "S5";
  Run run{
      .name = {},
      .dataset = meaning.dataset,
      .network = {.model = meaning.model, .kernel = experiment.kernel, .blocks = deeper ? 4 : 3},
      .recipe = {.epochs = budget.epochs,
                 .weight_decay = deeper ? 5e-4 : 0,
                 .uniform_norms = budget.uniform_norms,
                 .seed = seed}};
  if (run.network.is_block()) run.network.compute = Compute::automatic;
  if (experiment.rate) run.network.rate = *experiment.rate;
  const std::string prefix = meaning.dataset + (deeper ? "-deeper" : "") + "-" +
                             network_name(meaning.model, experiment.kernel, experiment.rate) +
                             (budget.uniform_norms ? "-uniform" : "");
  std::vector<Run> runs;
  std::string marks;
  if (meaning.init) {
    Run& nonlinear = runs.emplace_back(run);
    nonlinear.network.compute = Compute::nonlinear;
    nonlinear.name = prefix + "-nonlinear" + seed_and_epochs(run.recipe);
    run.init = nonlinear.name;
    marks += "-init";
  }
  if (meaning.transfer != Transfer::none) {
    const Run& teacher = runs.emplace_back(teacher_of(meaning.dataset, budget));
    run.teacher = teacher.name;
    run.recipe.transfer.method = meaning.transfer;
    run.recipe.adam = meaning.transfer != Transfer::kd;
    if (run.recipe.adam) run.recipe.learning_rate = 1e-4;
    marks += "-" + transfer_names.of(meaning.transfer) + "-w" +
             std::to_string(budget.teacher_width) + "-e" + std::to_string(budget.teacher_epochs);
  }
  if (meaning.corrupted > 0) {
    run.recipe.corrupted = static_cast<double>(meaning.corrupted) / 100;
    marks += "-corrupted" + std::to_string(meaning.corrupted);
  }
  run.name = prefix + marks + seed_and_epochs(run.recipe);
  runs.push_back(std::move(run));
  return runs;
}

std::vector<Curve> curves_of(const std::string& figure, const std::string& dataset, Index kernel,
                             std::uint64_t seed, Index epochs) {
  std::vector<Curve> curves;
  const auto add = [&](const std::string& model, bool decayed, bool products) {
    const auto name = std::ranges::find(models, model, &Name::ours);
    Curve& curve = curves.emplace_back();
    Run& run = curve.run;
    curve.title = name->published;
    run.dataset = dataset;
    run.network = {.model = model, .kernel = kernel};
    run.recipe = {.epochs = epochs, .seed = seed};
    std::string marks = decayed ? "-decayed" : "-similarities";
    if (decayed) {
      run.recipe.weight_decay = 5e-4;
      run.recipe.decay_products = products;
      if (is_expanded(model)) curve.title += products ? " product L2" : " normal L2";
      if (products) marks += "-product";
    } else {
      run.similarities = 100;
    }
    run.name = dataset + "-" + network_name(model, kernel, run.network.rate) + marks +
               seed_and_epochs(run.recipe);
  };
  if (figure == "S4") {
    add("compact", true, false);
    for (const char* model : {"fc", "cl"}) {
      add(model, true, true);
      add(model, true, false);
    }
  } else if (figure == "S1" || figure == "S2" || figure == "S3") {
    for (const char* model : {"compact", "fc", "cl", "cl+fc"}) add(model, false, false);
    if (kernel > 3) {
      for (const char* model : {"ck", "ck+fc"}) add(model, false, false);
    }
  } else {
    throw Error("there is no figure '" + figure + "'; there are S1, S2, S3, S4");
  }
  return curves;
}

}  // namespace cifar
