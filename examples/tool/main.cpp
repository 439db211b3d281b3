// The command line: subcommands, their options, exit codes.
// SPDX-License-Identifier: Apache-2.0
#include "commands.hpp"
#include "models.hpp"
#include "networks/layer_description.hpp"

#include <concertina/error.hpp>

#include <CLI/CLI.hpp>

#include <algorithm>
#include <iostream>
#include <string>
#include <vector>

int main(int argc, char** argv) {
  using namespace tool;
  CLI::App app(
      "Contracts the linear layers of ONNX models, and those that a safetensors file describes, "
      "and "
      "proves that the result is right.",
      "concertina");
  app.require_subcommand(1);
  app.footer(
      "Exit codes: 0 all is well; 1 a verification failed; 2 the command line is wrong; 3 a file "
      "is not what it should "
      "be; 4 no single layer equals the chain at the border; 5 reading, writing or memory failed; "
      "6 "
      "models differ in a way that could not be proved right.");
  const std::string chain_help =
      std::string("For files whose metadata describes no layers: their names and geometry.\n") +
      chain_grammar;

  ModelCommand model;
  std::vector<CLI::Option*> for_models, for_layers;  // which the other kind of file does not take
  const auto add_model_options = [&](CLI::App* command) {
    const auto add = [&](CLI::Option* option) {
      for_models.push_back(option->group("Of ONNX models"));
    };
    add(command
            ->add_option("--input", model.inputs,
                         "The shape of an input that the model leaves open: NAME=1x3x224x224")
            ->take_all());
    add(command
            ->add_option("--border", model.border,
                         "Where a layer must equal what it replaces: everywhere, at every input "
                         "size; size, also where "
                         "that holds at the model's input size; interior, also where it holds off "
                         "the border")
            ->check(CLI::IsMember({"everywhere", "size", "interior"}))
            ->capture_default_str());
    add(command->add_flag("--initializers-are-constant", model.initializers_are_constant,
                          "Take initializers for constants although they are inputs too"));
  };
  const auto add_choices = [&](CLI::App* command) {
    const auto add = [&](CLI::Option* option) {
      for_models.push_back(option->group("Of ONNX models"));
    };
    add(command
            ->add_option("--when", model.when,
                         "Which regions are contracted: smaller, where neither parameters nor "
                         "multiply-adds grow; "
                         "faster, where multiply-adds do not; always")
            ->check(CLI::IsMember({"smaller", "faster", "always"}))
            ->capture_default_str());
    add(command
            ->add_option("--only", model.only,
                         "Only the regions that make these tensors or hold these nodes")
            ->delimiter(','));
    add(command->add_option("--keep", model.keep, "Tensors that stay")->delimiter(','));
  };

  ContractOptions contract_options;
  CLI::App* contracting = app.add_subcommand(
      "contract",
      "Write an ONNX model with its linear regions contracted, or the single layer that equals a "
      "safetensors file's chain of layers");
  contracting->add_option("IN", contract_options.in, "The model, or the file with the layers")
      ->required();
  contracting->add_option(
      "-o,--output", contract_options.out,
      "The file to write: a model, or weight, bias and metadata conv; without it, the "
      "result is only described");
  add_model_options(contracting);
  add_choices(contracting);
  for_models.push_back(
      contracting
          ->add_flag(
              "--verify", model.verify,
              "Prove each contracted region, and that the rest is untouched; nothing is written "
              "that could not be proved")
          ->group("Of ONNX models"));
  for_models.push_back(
      contracting
          ->add_option(
              "--external-data", model.external_data,
              "The name of a file beside the output for large tensors; by default there is "
              "one where the input has one, or the model exceeds 2 GB")
          ->group("Of ONNX models"));
  for_layers.push_back(contracting->add_option(
      "--dtype", contract_options.dtype,
      "F64, F32, F16 or BF16; by default the input's, and F32 for F16 and BF16. The contraction is "
      "accumulated in the next wider type, and rounded to F32 (or F64) before F16 and BF16"));
  for_layers.push_back(
      contracting->add_flag("--interior", contract_options.interior,
                            "Accept a layer that differs from the chain at the border"));
  for_layers.push_back(contracting->add_option(
      "--input-size", contract_options.input_size,
      "Accept a layer that equals the chain at this spatial size, such as 32,32"));
  for_layers.push_back(contracting->add_option("--chain", contract_options.chain, chain_help));
  contracting->add_flag("--json", contract_options.json, "Print JSON");

  FilesOptions options;
  const auto add_files = [&](const char* name, const char* help, const char* paths,
                             const char* json) {
    CLI::App* command = app.add_subcommand(name, help);
    command->add_option(paths, options.paths, "What to read")->required();
    for_layers.push_back(command->add_option("--chain", options.chain, chain_help));
    command->add_flag("--json", options.json, json);
    return command;
  };
  CLI::App* verifying =
      add_files("verify",
                "Prove that one ONNX model computes what another does, whoever made it of that: "
                "IN.onnx OUT.onnx. Or that "
                "files' chains contract rightly, and that the results agree with what the files "
                "expect: the layer "
                "that a chain's field \"expected\" names, and the tensors output and "
                "output.contracted on input",
                "FILE|FOLDER", "Print JSON: one object a file, with every finding");
  add_model_options(verifying);
  CLI::App* timing = add_files(
      "bench", "Time the contraction of files' layers beside the peak of a matrix product", "FILE",
      "Print JSON: one object a file");
  CLI::App* showing =
      add_files("info",
                "Show what of an ONNX model could be contracted, what that would save, and why the "
                "rest is left; or "
                "layers, parameters and multiply-adds: of files before and after contraction, "
                "or of a network of the paper as the paper counts",
                "FILE", "Print JSON: one object a file, or one of the network");
  add_model_options(showing);
  add_choices(showing);
  CLI::Option* counted_size =
      showing->add_option("--input-size", options.input_size,
                          "Count multiply-adds at this spatial size; by default that of the file's "
                          "tensor input, or else "
                          "for one position of the output");
  for_layers.push_back(counted_size);

  NetworkOptions network;
  const auto add_expansion = [&](CLI::App* command) {
    CLI::Option* name =
        command->add_option("--network", network.network,
                            "One of the paper's networks, as concertina networks lists them");
    CLI::Option* expand =
        command->add_option("--expand", network.expand, "cl, ck, fc, cl+fc or ck+fc")->needs(name);
    command->add_option("--rate", network.rate, "Expansion rate r")
        ->needs(expand)
        ->capture_default_str();
    command
        ->add_option(
            "--stride", network.stride,
            "Where the stride of a CL expansion stands: kernel, the kxk layer; or last, the "
            "last 1x1, where the paper counts it, the same map at a higher cost")
        ->needs(expand)
        ->check(CLI::IsMember({"kernel", "last"}))
        ->capture_default_str();
    command
        ->add_option(
            "--layers", network.layers,
            "Expand these only, such as conv1,conv2; by default those of the paper, or all "
            "that the expansion applies to")
        ->needs(expand)
        ->delimiter(',');
    return name;
  };
  showing->get_option("FILE")->required(false)->excludes(add_expansion(showing));
  CLI::App* listing = app.add_subcommand("networks", "List the paper's networks and their cost");
  listing->add_flag("--json", network.json, "Print JSON: one object a network");
  CLI::App* writing = app.add_subcommand("expand",
                                         "Write one of the paper's networks, expanded if --expand "
                                         "says how, with random numbers and an "
                                         "input");
  add_expansion(writing)->required();
  writing->add_option("--seed", network.seed, "Of the random numbers")->capture_default_str();
  writing->add_option("-o,--output", network.out, "The file to write")->required();

  const auto refuse = [](const std::vector<CLI::Option*>& given, const std::string& what) {
    for (const CLI::Option* option : given) {
      if (option->count() > 0) throw UsageError(option->get_name() + " is for " + what);
    }
  };
  // Whether the paths are ONNX models; then only their options may be given.
  const auto models = [&](const std::vector<std::string>& paths) {
    const bool any =
        std::ranges::any_of(paths, [](const std::string& path) { return is_model(path); });
    if (any) {
      refuse(for_layers, "safetensors files, not for ONNX models");
    } else {
      refuse(for_models, "ONNX models, not for safetensors files");
    }
    return any;
  };

  const auto run = [&] {
    if (listing->parsed()) return networks(network);
    if (writing->parsed()) return write_network(network);
    if (showing->parsed() && !network.network.empty()) {
      network.json = options.json;
      if (!options.chain.empty() || !options.input_size.empty()) {
        throw UsageError("--chain and --input-size are for files, not for --network");
      }
      return network_info(network);
    }
    if (showing->parsed() && options.paths.empty()) {
      throw UsageError("info: name a file, or a network with --network");
    }
    if (contracting->parsed()) {
      if (!models({contract_options.in})) return contract(contract_options);
      model.in = contract_options.in;
      model.out = contract_options.out;
      model.json = contract_options.json;
      return contract_model_file(model);
    }
    if (timing->parsed()) return bench(options);
    if (models(options.paths)) {
      model.in = options.paths.front();
      model.json = options.json;
      if (options.paths.size() != (verifying->parsed() ? 2U : 1U)) {
        throw UsageError(verifying->parsed() ? "verify: name two models, IN.onnx OUT.onnx"
                                             : "info: name one model");
      }
      if (showing->parsed()) return model_info(model);
      model.out = options.paths.back();
      return verify_models(model);
    }
    if (verifying->parsed()) return verify(options);
    if (showing->parsed()) return info(options);
    return usage;
  };

  try {
    app.parse(argc, argv);
    const ExitCode code = run();
    if (!std::cout.flush()) {
      throw concertina::IoError("standard output: not all of it could be written");
    }
    return code;
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == 0) return app.exit(error);  // --help
    std::cerr << "concertina: error: " << printable(error.what()) << "; see concertina --help\n";
    return usage;
  } catch (...) {
    return report_error();
  }
}
