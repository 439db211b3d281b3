// The command line of the CIFAR experiments.
// SPDX-License-Identifier: Apache-2.0
#include "commands.hpp"
#include "text.hpp"

#include <CLI/CLI.hpp>

#include <algorithm>
#include <cctype>
#include <cstdint>
#include <initializer_list>
#include <iostream>
#include <limits>
#include <string>
#include <string_view>

namespace {

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

/// Throws where an option was given that only means something with another.
void require_use(const CLI::App& command, bool used, std::initializer_list<const char*> options,
                 const std::string& with) {
  for (const char* option : options) {
    if (!used && command.count(option) > 0) {
      throw tool::UsageError(std::string(option) + " says nothing here: it is for " + with);
    }
  }
}

/// Refuses options of a training that would change nothing.
void require_use(const CLI::App& command, const cifar::TrainCommand& training) {
  const cifar::NetworkOptions& network = training.options.network;
  const cifar::Recipe& recipe = training.options.recipe;
  const cifar::Transfer transfer = recipe.transfer.method;
  require_use(command, network.is_resnet(), {"--width"}, "resnet18");
  require_use(command, !network.is_resnet(), {"--kernel", "--blocks"}, "SmallNet and its forms");
  require_use(command, network.is_expanded() || network.model == "cl+norms", {"--rate"},
              "expanded networks");
  require_use(command, network.is_expanded() || network.is_block(), {"--compute"},
              "expanded networks and blocks");
  require_use(command, network.is_expanded() && recipe.weight_decay > 0, {"--decay-of"},
              "expanded networks with --weight-decay");
  require_use(command, !recipe.adam, {"--momentum", "--keep-momentum"}, "--optimizer sgd");
  require_use(command, transfer == cifar::Transfer::kd, {"--temperature", "--transfer-weight"},
              "--transfer kd");
  require_use(command, transfer == cifar::Transfer::hint, {"--projection"}, "--transfer hint");
  require_use(command, training.options.device == cifar::Device::cpu, {"--threads"},
              "--device cpu");
  require_use(command, !training.data.folder.empty() || training.data.name != "mnist",
              {"--dataset"}, "mnist with --data");
}

}  // namespace

int main(int argc, char** argv) {
  const CLI::Range seed(std::int64_t{0}, std::numeric_limits<std::int64_t>::max());
  using namespace cifar;
  CLI::App app(
      "Trains the networks of the ExpandNets paper on CIFAR, expanded at the compact "
      "network's price: each step contracts the expanded layers, computes the compact "
      "network, and pulls its gradients back.",
      "cifar");
  app.require_subcommand(1);
  app.footer(
      "Exit codes: 0 all is well; 1 a check failed; 2 the command line is wrong; 3 a file is "
      "not what it should be, or a training diverged; 5 reading, writing or memory failed.");
  const auto add_data = [](CLI::App* command, DataOptions& data) {
    command->add_option("--data", data.folder,
                        "Folder of the data set's binary version; without it, generated images");
    command->add_option("--dataset", data.name, "cifar10, cifar100 or mnist")
        ->check(CLI::IsMember({"cifar10", "cifar100", "mnist"}))
        ->capture_default_str();
  };
  const auto add_threads = [](CLI::App* command, Index& threads) {
    command->add_option("--threads", threads,
                        "Threads; by default one for each core. Results do "
                        "not depend on their number");
  };
  const auto add_network = [](CLI::App* command, NetworkOptions& network) {
    command->add_option("--kernel", network.kernel, "Kernel of the convolutions")
        ->capture_default_str();
    command->add_option("--rate", network.rate, "Expansion rate r")->capture_default_str();
    command
        ->add_option("--blocks", network.blocks,
                     "3: SmallNet, 4: the deeper network of "
                     "Section A.4")
        ->capture_default_str();
    command->add_option("--width", network.width, "Channels of resnet18's first stage")
        ->capture_default_str();
  };

  TrainCommand training;
  std::string compute = "auto";
  CLI::App* train_app = app.add_subcommand("train", "Train a network");
  add_data(train_app, training.data);
  TrainOptions& options = training.options;
  Recipe& recipe = options.recipe;
  std::string out = "cifar-out", init;
  train_app->add_option("--model", options.network.model, "The network")
      ->check(CLI::IsMember(model_names()))
      ->capture_default_str();
  add_network(train_app, options.network);
  train_app
      ->add_option(
          "--compute", compute,
          "How expansions are computed: contracted; layered, as frameworks do; auto, whichever "
          "costs each fewer multiply-adds at this batch; nonlinear, with a ReLU between "
          "the layers")
      ->check(CLI::IsMember(compute_names.all()))
      ->capture_default_str();
  train_app->add_option("--epochs", recipe.epochs, "Epochs; the rate falls after a third and two")
      ->capture_default_str();
  train_app->add_option("--batch", recipe.batch, "Images of a step")->capture_default_str();
  std::string optimizer = "sgd", decay = "layers", transfer = "none", projection = "fixed";
  train_app
      ->add_option("--optimizer", optimizer,
                   "sgd, whose rate falls and which starts anew each epoch, as published; adam at "
                   "a constant rate")
      ->check(CLI::IsMember({"sgd", "adam"}))
      ->capture_default_str();
  CLI::Option* const rate_option =
      train_app
          ->add_option("--learning-rate", recipe.learning_rate,
                       "At the start; 0.01 by default, 0.0001 for adam")
          ->default_str("");
  train_app->add_option("--momentum", recipe.momentum, "Of the gradient descent")
      ->capture_default_str();
  train_app->add_flag("--keep-momentum", recipe.keep_momentum,
                      "Keep velocities from epoch to epoch; as published they start anew in each");
  train_app->add_option("--weight-decay", recipe.weight_decay, "0.0005 in the paper's Table S5")
      ->capture_default_str();
  train_app
      ->add_option("--decay-of", decay,
                   "What an expanded layer's decay is of: its layers; or their product, as that of "
                   "a compact layer")
      ->check(CLI::IsMember({"layers", "product"}))
      ->capture_default_str();
  train_app
      ->add_option("--corrupt", recipe.corrupted, "Share of the training labels drawn at random")
      ->capture_default_str();
  train_app
      ->add_option("--transfer", transfer,
                   "What to learn from the teacher: none; kd, its softened classes; hint, its "
                   "projected features; pkt, the similarities of its features")
      ->check(CLI::IsMember(transfer_names.all()))
      ->capture_default_str();
  std::string teacher;
  train_app->add_option("--teacher", teacher,
                        "The teacher: a file that train wrote, or a ResNet-18 with torchvision's "
                        "names");
  train_app->add_option("--temperature", recipe.transfer.temperature, "Of kd")
      ->capture_default_str();
  train_app
      ->add_option("--transfer-weight", recipe.transfer.weight,
                   "Of the teacher in kd; the labels have the rest")
      ->capture_default_str();
  train_app
      ->add_option("--projection", projection,
                   "Of the teacher's features to the student's in hint: fixed as drawn, or learned")
      ->check(CLI::IsMember({"fixed", "learned"}))
      ->capture_default_str();
  train_app
      ->add_option("--similarities", options.similarities,
                   "After each epoch, log the least cosine between the gradients of so many "
                   "batches, those of the compact parameters; at the end, all of them")
      ->check(CLI::Range(2, 10'000));
  train_app
      ->add_flag("--trained-gradients", options.trained_gradients,
                 "Compare the gradients of the expanded parameters instead")
      ->needs("--similarities");
  train_app->add_flag("--uniform-norms", recipe.uniform_norms,
                      "Start the weights of batch norms uniform in 0 to 1, as PyTorch 0.4 did, in "
                      "which the paper's networks were trained; by default at 1");
  train_app->add_option("--seed", recipe.seed, "Of everything that is drawn")
      ->check(seed)
      ->capture_default_str();
  train_app->add_option("--out", out, "Folder for log.csv, checkpoint and best network")
      ->capture_default_str();
  train_app->add_option("--init", init,
                        "Start from this file's tensors, such as those of a nonlinear training");
  train_app->add_flag("--resume", options.resume,
                      "Go on from the folder's checkpoint, if there is one");
  train_app->add_flag("--double", options.in_double, "Compute in double");
  std::string device = "cpu";
  const auto add_device = [&](CLI::App* command, const char* help) {
    command->add_option("--device", device, help)
        ->check(CLI::IsMember(device_names.all()))
        ->capture_default_str();
  };
  add_device(
      train_app,
      "cpu; or cuda, a GPU: all but dbb, contracted blocks, --transfer and adam. A training can go "
      "on on either, one of blocks if it is --compute layered");
  add_threads(train_app, training.threads);

  EvalCommand evaluation;
  CLI::App* eval_app = app.add_subcommand("eval", "Test accuracy of a file that train wrote");
  eval_app->add_option("FILE", evaluation.file, "The network")->required();
  add_data(eval_app, evaluation.data);
  add_threads(eval_app, evaluation.threads);
  eval_app->add_flag("--json", evaluation.json, "Print JSON");

  ContractCommand contraction;
  CLI::App* contract_app = app.add_subcommand(
      "contract", "Write the compact network, if its test accuracy is the expanded one's");
  contract_app->add_option("FILE", contraction.in, "The network")->required();
  contract_app->add_option("-o,--output", contraction.out, "The model to write, *.onnx")
      ->required();
  add_data(contract_app, contraction.data);
  add_threads(contract_app, contraction.threads);

  LandscapeCommand seeing;
  CLI::App* landscape_app = app.add_subcommand(
      "landscape", "The loss around a trained network, along two filter-normalised directions");
  landscape_app->add_option("FILE", seeing.file, "The network")->required();
  landscape_app->add_option("-o,--output", seeing.out, "The CSV file to write")->required();
  add_data(landscape_app, seeing.data);
  landscape_app->add_option("--points", seeing.options.points, "Along each direction; odd")
      ->capture_default_str();
  landscape_app->add_option("--range", seeing.options.range, "Of the coordinates, to either side")
      ->capture_default_str();
  landscape_app->add_option("--images", seeing.options.images, "Of the training set")
      ->capture_default_str();
  landscape_app->add_option("--seed", seeing.options.seed, "Of the directions")
      ->check(seed)
      ->capture_default_str();
  landscape_app->add_flag("--expanded", seeing.trained,
                          "Among the expanded network's parameters; by default among those of the "
                          "compact one, so that networks compare");
  add_threads(landscape_app, seeing.threads);

  ReproduceCommand reproducing;
  reproducing.paper = CONCERTINA_EXAMPLES_DATA "/accuracy.csv";
  std::string reproduce_data, reproduce_out = "cifar-reproduced";
  CLI::App* reproduce_app = app.add_subcommand(
      "reproduce",
      "A table or a figure of the paper: runs what is missing of its trainings, resumes what was "
      "interrupted, and sets ours beside theirs");
  CLI::Option* const table =
      reproduce_app->add_option("--table", reproducing.table, "S1, S3, S4, S5, S7, S8 or S9")
          ->check(CLI::IsMember({"S1", "S3", "S4", "S5", "S7", "S8", "S9"}));
  CLI::Option* const figure =
      reproduce_app
          ->add_option("--figure", reproducing.figure,
                       "S1, landscapes; S2 and S3, curves and similarities of gradients on "
                       "CIFAR-10 and CIFAR-100; S4, weight decay of products")
          ->check(CLI::IsMember({"S1", "S2", "S3", "S4"}))
          ->excludes(table);
  reproduce_app->add_option("--data", reproduce_data, "Folder of the data sets' binary versions");
  reproduce_app->add_option(
      "--trainings", reproducing.trainings,
      "A file of finished trainings, as docs/results/trainings.csv: rows take them and "
      "run only the others, none without --data; figures need all their own");
  reproduce_app->add_flag("--missing", reproducing.missing,
                          "Print row, seed and runs of what is not done, and run nothing");
  reproduce_app->add_option("--out", reproduce_out, "Folder of trainings, tables and figures")
      ->capture_default_str();
  reproduce_app
      ->add_option("--epochs", reproducing.budget.epochs, "Of every training but the teacher's")
      ->capture_default_str();
  reproduce_app->add_option("--jobs", reproducing.options.jobs,
                            "Trainings side by side; by default one for each core");
  add_device(reproduce_app, "cpu; or cuda for the trainings that a GPU computes, as cifar train");
  reproduce_app
      ->add_option("--rows", reproducing.rows,
                   "Rows of the table, by their names; * stands for anything")
      ->delimiter(',')
      ->needs(table);
  reproduce_app->add_flag("--list", reproducing.list, "Print the rows' names and run nothing")
      ->needs(table);
  reproduce_app->add_option("--seeds", reproducing.seeds, "Trainings of each row")
      ->capture_default_str()
      ->needs(table);
  reproduce_app
      ->add_flag("--uniform-norms", reproducing.budget.uniform_norms,
                 "Start the weights of batch norms uniform in 0 to 1, as the paper's did")
      ->needs(table);
  reproduce_app
      ->add_option("--teacher-width", reproducing.budget.teacher_width,
                   "Channels of the ResNet-18's first stage; 64 is the usual one")
      ->capture_default_str()
      ->needs(table);
  reproduce_app
      ->add_option("--teacher-epochs", reproducing.budget.teacher_epochs, "Of its training")
      ->capture_default_str()
      ->needs(table);
  reproduce_app->add_option("--paper", reproducing.paper, "The published accuracies")
      ->default_str("examples/data/accuracy.csv of the sources")
      ->needs(table);
  reproduce_app->add_option("--kernel", reproducing.kernel, "Of the figure's networks")
      ->capture_default_str()
      ->needs(figure);
  reproduce_app
      ->add_option("--dataset", reproducing.dataset,
                   "Of the figure; cifar100 for S3, otherwise cifar10; mnist is possible too")
      ->check(CLI::IsMember({"cifar10", "cifar100", "mnist"}))
      ->needs(figure);

  BenchCommand bench;
  CLI::App* bench_app = app.add_subcommand(
      "bench", "Images per second of a training step: compact, contracted, layered");
  bench_app
      ->add_option("--models", bench.models,
                   "The networks; by default compact and all expansions but fc that the kernel has")
      ->delimiter(',')
      ->check(CLI::IsMember(model_names()));
  add_network(bench_app, bench.network);
  bench_app->add_option("--batch", bench.batch, "Images of a step")->capture_default_str();
  bench_app->add_option("--seconds", bench.seconds, "For each form")->capture_default_str();
  add_device(bench_app, "cpu; or cuda, compact and contracted networks on a GPU, with copies");
  add_threads(bench_app, bench.threads);
  bench_app->add_flag("--json", bench.json, "Print JSON");

  DriftCommand drifting;
  CLI::App* drift_app = app.add_subcommand(
      "drift", "How far contracted and layered trainings are apart, beside what rounding does");
  drift_app->add_option("--model", drifting.network.model = "cl", "The network")
      ->check(CLI::IsMember(model_names()))
      ->capture_default_str();
  add_network(drift_app, drifting.network);
  add_data(drift_app, drifting.data);
  drift_app->add_option("--steps", drifting.steps, "Steps of each training")
      ->check(CLI::Range(1, 100'000))
      ->capture_default_str();
  drift_app->add_option("--batch", drifting.recipe.batch, "Images of a step")
      ->capture_default_str();
  drift_app->add_option("--seed", drifting.recipe.seed, "Of weights, order and augmentation")
      ->check(seed)
      ->capture_default_str();
  add_threads(drift_app, drifting.threads);

  try {
    app.parse(argc, argv);
    if (train_app->parsed()) {
      options.network.compute = compute_names.of(compute);
      options.device = device_names.of(device);
      options.teacher = teacher;
      recipe.adam = optimizer == "adam";
      if (recipe.adam && rate_option->count() == 0) recipe.learning_rate = 1e-4;
      recipe.decay_products = decay == "product";
      recipe.transfer.method = transfer_names.of(transfer);
      recipe.transfer.learned_projection = projection == "learned";
      options.out = out;
      options.init = init;
      options.command = command_line(argc, argv);
      require_use(*train_app, training);
      return tool::finish("cifar", run_train(training));
    }
    if (eval_app->parsed()) return tool::finish("cifar", run_eval(evaluation));
    if (contract_app->parsed()) return tool::finish("cifar", run_contract(contraction));
    if (drift_app->parsed()) return tool::finish("cifar", run_drift(drifting));
    if (landscape_app->parsed()) return tool::finish("cifar", run_landscape(seeing));
    if (reproduce_app->parsed()) {
      reproducing.options.data = reproduce_data;
      reproducing.options.device = device_names.of(device);
      reproducing.options.out = reproduce_out;
      reproducing.options.command = command_line(argc, argv);
      return tool::finish("cifar", run_reproduce(reproducing));
    }
    bench.device = device_names.of(device);
    return tool::finish("cifar", run_bench(bench));
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == 0) return tool::finish("cifar", app.exit(error));  // --help
    std::cerr << "cifar: error: " << tool::printable(error.what()) << "; see cifar --help\n";
    return tool::usage;
  } catch (...) {
    return tool::report_error("cifar");
  }
}
