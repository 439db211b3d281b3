// The command line of the CIFAR experiments.
// SPDX-License-Identifier: Apache-2.0
#include "commands.hpp"
#include "text.hpp"
#include "text_file.hpp"

#include <CLI/CLI.hpp>

#include <algorithm>
#include <cctype>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <iostream>
#include <limits>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

namespace {

using namespace cifar;

/// The command, quoted such that a shell reads the same words.
std::string command_line(int argc, char** argv) {
  std::string text = "cifar";
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    const bool plain = !word.empty() && std::ranges::all_of(word, [](unsigned char c) {
      return std::isalnum(c) ||
             std::string_view("_-+=./,:").find(static_cast<char>(c)) != std::string_view::npos;
    });
    text += plain ? ' ' + word : " '";
    if (plain) continue;
    for (const char c : word) text += c == '\'' ? std::string("'\\''") : std::string(1, c);
    text += '\'';
  }
  return text;
}

/// A value that is one of a few, by name.
struct Choice {
  std::vector<std::string> names;
  std::string now;
  std::function<void(const std::string&)> set;
};

template <class T>
Choice choice(T& to, const tool::Names<T>& names) {
  return {names.all(), names.of(to),
          [&to, &names](const std::string& name) { to = names.of(name); }};
}
Choice choice(std::string& to, const std::vector<std::string>& names) {
  return {names, to, [&to](const std::string& name) { to = name; }};
}

const std::vector<std::string> datasets = {"cifar10", "cifar100", "mnist"};
const tool::Names<bool> optimizers{"optimizer", {{false, "sgd"}, {true, "adam"}}};
const tool::Names<bool> decays{"decay", {{false, "layers"}, {true, "product"}}};
const tool::Names<bool> projections{"projection", {{false, "fixed"}, {true, "learned"}}};

/// What an option asks for besides its value.
struct Rule {
  std::vector<std::string> one_of = {};  ///< of a list's values
  std::pair<Index, Index> range = {};    ///< of a number; the default is any
  const char* needs = nullptr;           ///< another option
  bool required = false;
  const char* shown = nullptr;  ///< as the default; otherwise the value, unless 0 or empty
  /// Without it the option would change nothing in a training, and is refused: it is for `use`.
  std::function<bool()> used = {};
  const char* use = nullptr;
};

/// An option of some subcommands: where its value goes, and what it is.
struct Option {
  const char* commands;  ///< the first letters of those that take it
  const char* name;
  std::variant<bool*, Index*, std::uint64_t*, double*, std::string*, std::filesystem::path*,
               std::vector<std::string>*, Choice>
      to;
  const char* help;
  Rule rule = {};
};

/// A whole number as people write it, and that fits: CLI11 takes 010 for 8, and what is too large
/// for the largest.
const CLI::Validator whole_number(
    [](const std::string& text) -> std::string {
      const bool octal = text.size() > 1 && text.find_first_not_of("+-") < text.size() - 1 &&
                         text[text.find_first_not_of("+-")] == '0';
      if (number_in<Index>(text) && !octal) return {};
      return '"' + text + "\" is no whole number up to 9223372036854775807";
    },
    "");
const CLI::Validator not_empty(
    [](const std::string& text) { return text.empty() ? std::string("it is empty") : ""; }, "");

void add(CLI::App& command, const Option& option) {
  const char *const name = option.name, *const help = option.help;
  const Rule& rule = option.rule;
  CLI::Option* const added = std::visit(
      [&](const auto& value) -> CLI::Option* {
        using Value = std::remove_cvref_t<decltype(value)>;
        if constexpr (std::is_same_v<Value, Choice>) {
          auto* const each = command.add_option_function<std::string>(name, value.set, help);
          if (!value.now.empty()) each->default_str(value.now);
          return each->check(CLI::IsMember(value.names));
        } else if constexpr (std::is_same_v<Value, bool*>) {
          return command.add_flag(name, *value, help);
        } else if constexpr (std::is_same_v<Value, std::vector<std::string>*>) {
          return command.add_option(name, *value, help)->delimiter(',');
        } else {
          auto* const each = command.add_option(name, *value, help);
          if constexpr (std::is_same_v<Value, std::uint64_t*>) {  // a seed
            each->check(CLI::Range(std::int64_t{0}, std::numeric_limits<std::int64_t>::max()));
          }
          if constexpr (std::is_same_v<Value, std::uint64_t*> || std::is_same_v<Value, Index*>) {
            each->check(whole_number);
          } else if constexpr (!std::is_same_v<Value, double*>) {
            each->check(not_empty);
          }
          const bool none =
              !std::is_same_v<Value, double*> && *value == std::decay_t<decltype(*value)>();
          return none ? each : each->capture_default_str();
        }
      },
      option.to);
  if (rule.shown) added->default_str(rule.shown);
  if (!rule.one_of.empty()) added->check(CLI::IsMember(rule.one_of));
  if (rule.range.first < rule.range.second) {
    added->check(CLI::Range(rule.range.first, rule.range.second));
  }
  if (rule.needs) added->needs(command.get_option(rule.needs));
  added->required(rule.required);
}

}  // namespace

int main(int argc, char** argv) {
  CommandLine line;
  TrainOptions& training = line.training;
  NetworkOptions& network = training.network;
  Recipe& recipe = training.recipe;
  network.compute = Compute::automatic;
  training.out = "cifar-out";
  std::string drifting = "cl";
  const auto expands = [&] { return network.is_expanded(); };
  const auto used_for = [](const char* use, std::function<bool()> used) {
    return Rule{.used = std::move(used), .use = use};
  };

  struct Command {
    char letter;
    const char *name, *help;
    int (*run)(CommandLine&);
  };
  const std::vector<Command> commands = {
      {'t', "train", "Train a network", run_train},
      {'e', "eval", "Test accuracy of a file that train wrote", run_eval},
      {'c', "contract", "Write the compact network, if its test accuracy is the expanded one's",
       run_contract},
      {'l', "landscape",
       "The loss around a trained network, along two filter-normalised directions", run_landscape},
      {'b', "bench", "Images per second of a training step: compact, contracted, layered",
       run_bench},
      {'d', "drift",
       "How far contracted and layered trainings are apart, beside what rounding does", run_drift}};

  const std::vector<Option> table = {
      // What the commands work on.
      {"ecl", "FILE", &line.file, "The network", {.required = true}},
      {"c", "-o,--output", &line.output, "The model to write, *.onnx", {.required = true}},
      {"l", "-o,--output", &line.output, "The CSV file to write", {.required = true}},
      {"tecld", "--data", &line.data.folder,
       "Folder of the data set's binary version; without it, generated images"},
      {"t", "--dataset", choice(line.data.name, datasets), "The data set",
       used_for("mnist with --data",
                [&] { return !line.data.folder.empty() || line.data.name != "mnist"; })},
      {"ecld", "--dataset", choice(line.data.name, datasets), "The data set"},

      // The network.
      {"t", "--model", choice(network.model, model_names()), "The network"},
      {"d", "--model", choice(drifting, model_names()), "The network"},
      {"b",
       "--models",
       &line.models,
       "The networks; by default compact and all expansions but fc that the kernel has",
       {.one_of = model_names()}},
      {"tbd", "--kernel", &network.kernel, "Kernel of the convolutions",
       used_for("SmallNet and its forms", [&] { return !network.is_resnet(); })},
      {"tbd", "--rate", &network.rate, "Expansion rate r",
       used_for("expanded networks", [&] { return expands() || network.model == "cl+norms"; })},
      {"tbd", "--blocks", &network.blocks, "3: SmallNet, 4: the deeper network of Section A.4",
       used_for("SmallNet and its forms", [&] { return !network.is_resnet(); })},
      {"tbd", "--width", &network.width, "Channels of resnet18's first stage",
       used_for("resnet18", [&] { return network.is_resnet(); })},
      {"t", "--compute", choice(network.compute, compute_names),
       "How expansions are computed: contracted; layered, as frameworks do; auto, whichever costs "
       "each fewer multiply-adds at this batch; nonlinear, with a ReLU between the layers",
       used_for("expanded networks and blocks", [&] { return expands() || network.is_block(); })},

      // The recipe.
      {"t", "--epochs", &recipe.epochs, "Epochs; the rate falls after a third and two"},
      {"tbd", "--batch", &recipe.batch, "Images of a step"},
      {"d", "--steps", &line.steps, "Steps of each training", {.range = {1, 100'000}}},
      {"t", "--optimizer", choice(recipe.adam, optimizers),
       "sgd, whose rate falls and which starts anew each epoch, as published; adam at a constant "
       "rate"},
      {"t",
       "--learning-rate",
       &recipe.learning_rate,
       "At the start; 0.01 by default, 0.0001 for adam",
       {.shown = ""}},
      {"t", "--momentum", &recipe.momentum, "Of the gradient descent",
       used_for("--optimizer sgd", [&] { return !recipe.adam; })},
      {"t", "--keep-momentum", &recipe.keep_momentum,
       "Keep velocities from epoch to epoch; as published they start anew in each",
       used_for("--optimizer sgd", [&] { return !recipe.adam; })},
      {"t", "--weight-decay", &recipe.weight_decay, "0.0005 in the paper's Table S5"},
      {"t", "--decay-of", choice(recipe.decay_products, decays),
       "What an expanded layer's decay is of: its layers; or their product, as that of a compact "
       "layer",
       used_for("expanded networks with --weight-decay",
                [&] { return expands() && recipe.weight_decay > 0; })},
      {"t", "--corrupt", &recipe.corrupted, "Share of the training labels drawn at random"},
      {"t", "--transfer", choice(recipe.transfer.method, transfer_names),
       "What to learn from the teacher: none; kd, its softened classes; hint, its projected "
       "features; pkt, the similarities of its features"},
      {"t", "--teacher", &training.teacher,
       "The teacher: a file that train wrote, or a ResNet-18 with torchvision's names"},
      {"t", "--temperature", &recipe.transfer.temperature, "Of kd",
       used_for("--transfer kd", [&] { return recipe.transfer.method == Transfer::kd; })},
      {"t", "--transfer-weight", &recipe.transfer.weight,
       "Of the teacher in kd; the labels have the rest",
       used_for("--transfer kd", [&] { return recipe.transfer.method == Transfer::kd; })},
      {"t", "--projection", choice(recipe.transfer.learned_projection, projections),
       "Of the teacher's features to the student's in hint: fixed as drawn, or learned",
       used_for("--transfer hint", [&] { return recipe.transfer.method == Transfer::hint; })},
      {"t", "--uniform-norms", &recipe.uniform_norms,
       "Start the weights of batch norms uniform in 0 to 1, as PyTorch 0.4 did, in which the "
       "paper's networks were trained; by default at 1"},
      {"td", "--seed", &recipe.seed, "Of everything that is drawn"},
      {"l", "--seed", &line.landscape.seed, "Of the directions"},

      // What a training writes, and where it runs.
      {"t",
       "--similarities",
       &training.similarities,
       "After each epoch, log the least cosine between the gradients of so many batches, those of "
       "the compact parameters; at the end, all of them",
       {.range = {2, 10'000}}},
      {"t",
       "--trained-gradients",
       &training.trained_gradients,
       "Compare the gradients of the expanded parameters instead",
       {.needs = "--similarities"}},
      {"t", "--out", &training.out, "Folder for log.csv, checkpoint and best network"},
      {"t", "--init", &training.init,
       "Start from this file's tensors, such as those of a nonlinear training"},
      {"t", "--resume", &training.resume, "Go on from the folder's checkpoint, if there is one"},
      {"t", "--double", &training.in_double, "Compute in double"},

      // Landscapes, rates, and where all is computed.
      {"l", "--points", &line.landscape.points, "Along each direction; odd"},
      {"l", "--range", &line.landscape.range, "Of the coordinates, to either side"},
      {"l", "--images", &line.landscape.images, "Of the training set"},
      {"l", "--expanded", &line.expanded,
       "Among the expanded network's parameters; by default among those of the compact one, so "
       "that networks compare"},
      {"b", "--seconds", &line.seconds, "For each form"},

      {"tb", "--device", choice(line.device, device_names),
       "cpu; or cuda, a GPU: all but dbb and contracted blocks. A training can go on on either, "
       "one of blocks if it is --compute layered"},
      {"tecldb", "--threads", &line.threads,
       "Threads; by default one for each core. Results do not depend on their number",
       used_for("--device cpu", [&] { return line.device == Device::cpu; })},
      {"eb", "--json", &line.json, "Print JSON"},
  };

  CLI::App app(
      "Trains the networks of the ExpandNets paper on CIFAR, expanded at the compact "
      "network's price: each step contracts the expanded layers, computes the compact "
      "network, and pulls its gradients back.",
      "cifar");
  app.require_subcommand(1);
  app.footer(
      "Exit codes: 0 all is well; 1 a check failed; 2 the command line is wrong; 3 a file is "
      "not what it should be, or a training diverged; 5 reading, writing or memory failed.");
  for (const Command& command : commands) {
    CLI::App& parser = *app.add_subcommand(command.name, command.help);
    for (const Option& option : table) {
      if (std::string_view(option.commands).find(command.letter) != std::string_view::npos) {
        add(parser, option);
      }
    }
  }

  try {
    app.parse(argc, argv);
    const auto command = std::ranges::find_if(
        commands, [&](const Command& each) { return app.got_subcommand(each.name); });
    const CLI::App& parser = *app.get_subcommand(command->name);
    if (command->letter == 'd') network.model = drifting;
    if (recipe.adam && parser.count("--learning-rate") == 0) recipe.learning_rate = 1e-4;
    for (const auto& [letters, name, to, help, rule] : table) {
      const bool taken = std::string_view(letters).find('t') != std::string_view::npos;
      if (command->letter != 't' || !taken || !rule.used || rule.used()) continue;
      if (parser.count(name) == 0) continue;
      throw tool::UsageError(std::string(name) + " says nothing here: it is for " + rule.use);
    }
    line.words = command_line(argc, argv);
    return tool::finish("cifar", command->run(line));
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == 0) return tool::finish("cifar", app.exit(error));  // --help
    std::cerr << "cifar: error: " << tool::printable(error.what()) << "; see cifar --help\n";
    return tool::usage;
  } catch (...) {
    return tool::report_error("cifar");
  }
}
