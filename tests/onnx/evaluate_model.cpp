// Runs ONNX models over inputs in files, for comparison with what others make of them.
// SPDX-License-Identifier: Apache-2.0
//
//     onnx_evaluate [--wide] [--repeat N] MODEL.onnx OUTPUTS.onnx INPUT.pb...
//
// Inputs are TensorProtos in the order of the graph's inputs, initializers left out. The outputs
// are initializers of a model that has nothing else.
#include "onnx/evaluate.hpp"

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <exception>
#include <iostream>
#include <set>
#include <string>
#include <vector>

namespace {

namespace onnx = concertina::onnx;

void evaluate(const std::vector<std::string>& arguments, bool wide, int repetitions) {
  const onnx::Model model = onnx::read_model(arguments.at(0));
  const tool::Evaluator evaluator(model, wide);
  std::set<std::string> constants;
  for (const auto& tensor : model.initializers) constants.insert(tensor.name);
  tool::Values inputs;
  std::size_t next = 2;
  for (const auto& input : model.inputs) {
    if (constants.contains(input.name)) continue;
    inputs[input.name] = tool::value_of(onnx::read_tensor(arguments.at(next++)));
  }
  tool::Values outputs = evaluator(inputs);
  double least = 1e9;
  for (int i = 0; i < repetitions; ++i) {
    const auto start = std::chrono::steady_clock::now();
    outputs = evaluator(inputs);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    least = std::min(least, seconds.count());
  }
  if (repetitions > 0) std::cout << least << '\n';
  onnx::Model result;
  for (const auto& [name, value] : outputs)
    result.initializers.push_back(tool::tensor_of(name, value));
  onnx::write_model(arguments.at(1), result);
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<std::string> arguments;
  bool wide = false;
  int repetitions = 0;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument == "--wide") {
      wide = true;
    } else if (argument == "--repeat" && i + 1 < argc) {
      repetitions = std::stoi(argv[++i]);
    } else {
      arguments.push_back(argument);
    }
  }
  try {
    evaluate(arguments, wide, repetitions);
    return 0;
  } catch (const std::exception& error) {
    std::cerr << "onnx_evaluate: " << error.what() << '\n';
    return 1;
  }
}
