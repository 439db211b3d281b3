// The command line: subcommands, their options, exit codes.
// SPDX-License-Identifier: Apache-2.0
#include "commands.hpp"
#include "networks/layer_description.hpp"

#include <concertina/error.hpp>

#include <CLI/CLI.hpp>

#include <iostream>

int main(int argc, char** argv) {
  using namespace tool;
  CLI::App app(
      "Contracts the linear layers that a safetensors file describes into one, and proves that the "
      "result is right.",
      "concertina");
  app.require_subcommand(1);
  app.footer(
      "Exit codes: 0 all is well; 1 a verification failed; 2 the command line is wrong; 3 a file "
      "is not what it should "
      "be; 4 no single layer equals the chain at the border; 5 reading, writing or memory failed.");
  const std::string chain_help =
      std::string("For files whose metadata describes no layers: their names and geometry.\n") +
      chain_grammar;

  ContractOptions contract_options;
  CLI::App* contracting =
      app.add_subcommand("contract", "Write the single layer that equals a file's chain of layers");
  contracting->add_option("IN", contract_options.in, "The file with the layers")->required();
  contracting->add_option("-o,--output", contract_options.out,
                          "The file to write: weight, bias and metadata conv; without it, the "
                          "result is only described");
  contracting->add_option(
      "--dtype", contract_options.dtype,
      "F64, F32, F16 or BF16; by default the input's, and F32 for F16 and BF16. The contraction is "
      "accumulated in the next wider type, and rounded to F32 (or F64) before F16 and BF16");
  contracting->add_flag("--interior", contract_options.interior,
                        "Accept a layer that differs from the chain at the border");
  contracting->add_option(
      "--input-size", contract_options.input_size,
      "Accept a layer that equals the chain at this spatial size, such as 32,32");
  contracting->add_option("--chain", contract_options.chain, chain_help);
  contracting->add_flag("--json", contract_options.json, "Print JSON");

  FilesOptions options;
  const auto add_files = [&](const char* name, const char* help, const char* paths,
                             const char* json) {
    CLI::App* command = app.add_subcommand(name, help);
    command->add_option(paths, options.paths, "What to read")->required();
    command->add_option("--chain", options.chain, chain_help);
    command->add_flag("--json", options.json, json);
    return command;
  };
  CLI::App* verifying =
      add_files("verify",
                "Prove that files' chains contract rightly, and that the results agree with what "
                "the files expect: the layer "
                "that a chain's field \"expected\" names, and the tensors output and "
                "output.contracted on input",
                "FILE|FOLDER", "Print JSON: one object a file, with every finding");
  CLI::App* timing = add_files(
      "bench", "Time the contraction of files' layers beside the peak of a matrix product", "FILE",
      "Print JSON: one object a file");
  CLI::App* showing =
      add_files("info",
                "Show layers, parameters and multiply-adds: of files before and after contraction, "
                "or of a network of the paper as the paper counts",
                "FILE", "Print JSON: one object a file, or one of the network");
  showing->add_option("--input-size", options.input_size,
                      "Count multiply-adds at this spatial size; by default that of the file's "
                      "tensor input, or else "
                      "for one position of the output");

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
    if (contracting->parsed()) return contract(contract_options);
    if (verifying->parsed()) return verify(options);
    if (timing->parsed()) return bench(options);
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
