// Reading an ONNX model, and contracting it, which is proved before it is timed. The argument is
// one of the models that come with the repository.
// SPDX-License-Identifier: Apache-2.0
#include "onnx/compare_models.hpp"
#include "onnx/contract_model.hpp"

#include <benchmark/benchmark.h>

#include <string>

namespace {

std::string path_of(const std::string& name) {
  return CONCERTINA_EXAMPLES_DATA "/models/" + name + ".onnx";
}

void Read(benchmark::State& state, const std::string& name) {
  if (concertina::onnx::read_model(path_of(name)).nodes.empty()) {
    return state.SkipWithError("it is empty");
  }
  for (auto _ : state) {
    benchmark::DoNotOptimize(concertina::onnx::read_model(path_of(name)).nodes.data());
  }
}

void Contract_model(benchmark::State& state, const std::string& name) {
  const auto model = concertina::onnx::read_model(path_of(name));
  const auto contract = [&] { return tool::contract_model(model, {}).model; };
  if (!tool::compare_models(model, contract()).proved()) return state.SkipWithError("not proved");
  for (auto _ : state) benchmark::DoNotOptimize(contract().nodes.data());
}

void Prove_model(benchmark::State& state, const std::string& name) {
  const auto model = concertina::onnx::read_model(path_of(name));
  const auto result = tool::contract_model(model, {}).model;
  for (auto _ : state) {
    if (!tool::compare_models(model, result).proved()) return state.SkipWithError("not proved");
  }
}

[[maybe_unused]] const bool registered = [] {
  for (const std::string name : {"smallnet", "repvgg", "mobileone"}) {
    const auto add = [&](const char* what, auto* run) {
      benchmark::RegisterBenchmark((what + name).c_str(), run, name)->Unit(benchmark::kMillisecond);
    };
    add("Read/", Read);
    add("Contract_model/", Contract_model);
    add("Prove_model/", Prove_model);
  }
  return true;
}();

}  // namespace
