// The command line: subcommands, their options, exit codes.
// SPDX-License-Identifier: Apache-2.0
#include "documents.hpp"
#include "models.hpp"
#include "networks.hpp"
#include "onnx/chain.hpp"

#include <concertina/error.hpp>
#include <concertina/version.hpp>

#include <CLI/CLI.hpp>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdint>
#include <iostream>
#include <limits>
#include <string>
#include <string_view>
#include <vector>

namespace {

/// Whole numbers from `least` on that fit, in digits.
CLI::Validator whole_number(std::int64_t least) {
  return {[least](const std::string& text) {
            std::int64_t value = 0;
            const char* const end = text.data() + text.size();
            const auto [read, error] = std::from_chars(text.data(), end, value);
            return error == std::errc() && read == end && value >= least
                       ? ""
                       : "is no whole number from " + std::to_string(least) + " to " +
                             std::to_string(std::numeric_limits<std::int64_t>::max());
          },
          ""};
}

/// Finite numbers above 0, such as 1e12.
const CLI::Validator positive(
    [](const std::string& text) {
      double value = 0;
      const char* const end = text.data() + text.size();
      const auto [read, error] = std::from_chars(text.data(), end, value);
      const bool fits = error == std::errc() && read == end && value > 0 && std::isfinite(value);
      return std::string(fits ? "" : "is no finite number above 0");
    },
    "");

/// Digits that fit, before a unit such as GB.
const CLI::Validator begins_with_a_number(
    [](const std::string& text) {
      const auto digits = text.find_first_not_of("0123456789");
      const auto count = digits == std::string::npos ? text.size() : digits;
      constexpr std::size_t most = 18;
      return std::string(count > 0 && count <= most ? "" : "is no number of bytes");
    },
    "");

const CLI::Validator not_empty(
    [](const std::string& text) { return std::string(text.empty() ? "is empty" : ""); }, "");

}  // namespace

int main(int argc, char** argv) {
  using namespace tool;
  CLI::App app(
      "Contracts the linear layers of networks, and proves that the result is right. A network is "
      "an ONNX model, or a safetensors file whose layers are described by its metadata chain or by "
      "--chain.",
      "concertina");
  app.require_subcommand(1);
  const std::string version = std::to_string(CONCERTINA_VERSION_MAJOR) + "." +
                              std::to_string(CONCERTINA_VERSION_MINOR) + "." +
                              std::to_string(CONCERTINA_VERSION_PATCH);
  app.set_version_flag("--version", "concertina " + version, "Print the version and exit");
  app.footer(
      "Exit codes: 0 all is well; 1 a verification failed; 2 the command line is wrong; 3 a file "
      "is not what it should be; 4 no single layer equals the layers at the border; 5 reading, "
      "writing or memory failed; 6 models differ in a way that could not be proved right.");

  ModelCommand model;
  const auto add_model_options = [&](CLI::App* command) {
    command
        ->add_option("--chain", model.chain,
                     std::string("The layers of safetensors files whose metadata does not "
                                 "describe them.\n") +
                         chain_grammar)
        ->type_name("CHAIN");
    command
        ->add_option(
            "--input", model.inputs,
            "The shape of an input that the model leaves open: NAME=1x3x224x224; that of a "
            "chain is named input")
        ->type_name("NAME=SHAPE")
        ->take_all();
    command
        ->add_option("--border", model.border,
                     "Where a layer must equal what it replaces: everywhere, at every input size; "
                     "size, also where that holds at the model's input size; interior, also where "
                     "it holds off the border")
        ->check(CLI::IsMember({"everywhere", "size", "interior"}))
        ->capture_default_str();
    command->add_flag("--initializers-are-constant", model.initializers_are_constant,
                      "Take initializers for constants although they are inputs too");
    command
        ->add_option("--memory", model.memory,
                     "The most memory that any one step may take, such as 8GB; by default 900 MB "
                     "and 64 times the files")
        ->type_name("BYTES")
        ->transform(CLI::AsSizeValue(true))
        ->transform(begins_with_a_number);  // which sees the text before it is a size
    command
        ->add_option(
            "--effort", model.effort,
            "The most multiply-adds, such as 1e12, that contracting, proving or running a "
            "model may take, each; by default 1.5e9, 1500 for each byte of the larger file, "
            "and 20000 "
            "for each beyond the first 1e6")
        ->type_name("COUNT")
        ->check(positive);
    command->add_flag("--json", model.json, "Print JSON");
  };
  const auto add_choices = [&](CLI::App* command) {
    command
        ->add_option("--when", model.when,
                     "Which regions are contracted: smaller, where neither parameters nor "
                     "multiply-adds grow, as by default those of models; faster, where "
                     "multiply-adds do not; always, as by default those of chains")
        ->check(CLI::IsMember({"smaller", "faster", "always"}));
    command
        ->add_option("--only", model.only,
                     "Only the regions that make these tensors or hold these nodes")
        ->type_name("NAME,...")
        ->delimiter(',');
    command->add_option("--keep", model.keep, "Tensors that stay")
        ->type_name("NAME,...")
        ->delimiter(',');
  };

  CLI::App* contracting = app.add_subcommand(
      "contract",
      "Write a network with its linear regions contracted, or the single layer that it is");
  contracting->add_option("IN", model.in, "An ONNX model, or a safetensors file")->required();
  contracting
      ->add_option("-o,--output", model.out,
                   "The file to write: NAME.onnx, the model; NAME.safetensors, the one layer, as "
                   "tensors weight and bias and metadata chain; without it, the result is only "
                   "described")
      ->type_name("FILE");
  add_model_options(contracting);
  add_choices(contracting);
  contracting->add_flag("--verify", model.verify,
                        "Prove each contracted region, and that the rest is untouched; nothing is "
                        "written that could not be proved");
  contracting
      ->add_option("--external-data", model.external_data,
                   "The name of a file beside the output for large tensors; by default there is "
                   "one where the input has one, or the model exceeds 2 GB")
      ->type_name("NAME");
  contracting
      ->add_option("--dtype", model.dtype,
                   "Of what is written of a chain: F64, F32, F16 or BF16; by default F64 where a "
                   "tensor is, otherwise F32; --verify is of what is written, rounded to it")
      ->check(CLI::IsMember({"F64", "F32", "F16", "BF16"}));

  CLI::App* verifying = app.add_subcommand(
      "verify", "Prove that one network computes what another does, whoever made it of that");
  verifying->add_option("IN", model.in, "An ONNX model, or a safetensors file")->required();
  verifying->add_option("OUT", model.out, "What is compared with it")->required();
  add_model_options(verifying);
  verifying
      ->add_option("--sample", model.sample,
                   "Compare so many rows of each region's matrix, drawn at random, instead of all "
                   "in the proof of structure; the output says what a sample may miss")
      ->type_name("ROWS")
      ->check(whole_number(1));

  CLI::App* showing = app.add_subcommand(
      "info",
      "Show what of a network could be contracted, what that would save, and why the rest is left; "
      "or layers, parameters and multiply-adds of a network of the paper, as the paper counts");
  showing->add_option("FILE", model.in, "An ONNX model, or a safetensors file");
  add_model_options(showing);
  add_choices(showing);
  CLI::Option* picture =
      showing
          ->add_flag("--svg", model.svg,
                     "Print a picture instead: the taps of each region's layers and of the one "
                     "that they become, darker where weights are larger")
          ->excludes("--json");

  NetworkOptions network;
  const auto add_expansion = [&](CLI::App* command) {
    CLI::Option* name = command->add_option("--network", network.network,
                                            "A network, as concertina networks lists them");
    CLI::Option* expand =
        command->add_option("--expand", network.expand, "How its layers are expanded")
            ->check(CLI::IsMember({"cl", "ck", "fc", "cl+fc", "ck+fc"}))
            ->needs(name);
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
  add_expansion(showing)->excludes(showing->get_option("FILE"), showing->get_option("--chain"),
                                   showing->get_option("--input"), showing->get_option("--border"),
                                   showing->get_option("--initializers-are-constant"),
                                   showing->get_option("--memory"), showing->get_option("--effort"),
                                   showing->get_option("--when"), showing->get_option("--only"),
                                   showing->get_option("--keep"), picture);
  CLI::App* listing = app.add_subcommand(
      "networks", "List the paper's networks, and small ones of other blocks, with their cost");
  listing->add_flag("--json", network.json, "Print JSON: one object a network");
  CLI::App* writing = app.add_subcommand("expand",
                                         "Write one of the networks as an ONNX model, expanded if "
                                         "--expand says how, with random numbers");
  add_expansion(writing)->required();
  writing->add_option("--seed", network.seed, "Of the random numbers")
      ->check(whole_number(0))
      ->capture_default_str();
  writing->add_option("-o,--output", network.out, "The file to write")
      ->type_name("FILE")
      ->required();

  const std::vector<CLI::App*> commands = app.get_subcommands({});
  for (CLI::App* command : commands) {
    for (CLI::Option* option : command->get_options()) {
      const bool is_chain = option->check_lname("chain");  // of no layers
      if (option->get_items_expected_max() > 0 && !is_chain) option->check(not_empty);
    }
  }

  const auto run = [&] {
    if (listing->parsed()) return networks(network);
    if (writing->parsed()) return write_network(network);
    if (contracting->parsed()) return contract_file(model);
    if (verifying->parsed()) return verify_files(model);
    if (!network.network.empty()) {
      network.json = model.json;
      return network_info(network);
    }
    if (model.in.empty()) throw UsageError("info: name a file, or a network with --network");
    return show_file(model);
  };

  try {
    ExitCode code = ok;
    // For the build: what is installed beside the program.
    if (argc == 2 && std::string_view(argv[1]) == "--man") {
      std::cout << man_page(app, version);
    } else if (argc == 2 && std::string_view(argv[1]) == "--completion") {
      std::cout << bash_completion(app);
    } else {
      const auto names = [&](const CLI::App* command) { return command->check_name(argv[1]); };
      if (argc > 1 && argv[1][0] != '-' && std::ranges::none_of(commands, names)) {
        throw CLI::ExtrasError({argv[1]});
      }
      app.parse(argc, argv);
      code = run();
    }
    return finish("concertina", code);
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == 0) {  // --help, --version
      return finish("concertina", app.exit(error));
    }
    const auto parsed = app.get_subcommands();
    std::cerr << "concertina: error: " << printable(error.what()) << "; see concertina "
              << (parsed.empty() ? "" : parsed.front()->get_name() + " ") << "--help\n";
    return usage;
  } catch (...) {
    return report_error("concertina");
  }
}
