// The three proofs of a contraction, each of which has to hold, and an expansion that preserves the
// function of its layer; an argument is the channels of each layer.
// SPDX-License-Identifier: Apache-2.0
#include <concertina/expand.hpp>
#include <concertina/verify.hpp>

#include <benchmark/benchmark.h>

#include <random>
#include <vector>

namespace {

using namespace concertina;

/// An expanded convolution, CL with r = 4.
struct Expanded {
  std::vector<Conv2d<float>> layers;
  Conv2d<float> contraction;

  explicit Expanded(Index channels)
      : layers([&] {
          std::mt19937_64 generator(1);
          const ConvShape<2> compact{
              .out = channels, .in = channels, .kernel_size = 3, .padding = 1, .bias = true};
          return initialize<float>(expand_cl(compact, {.rate = 4}), generator);
        }()),
        contraction(contract(layers)) {}
};

/// Times prove(expanded), which gives a report.
template <class Prove>
void run(benchmark::State& state, const Prove& prove) {
  const Expanded expanded(state.range(0));
  if (!prove(expanded)) return state.SkipWithError("it does not hold");
  for (auto _ : state) benchmark::DoNotOptimize(prove(expanded).compared);
}

void Contract(benchmark::State& state) {
  const Expanded expanded(state.range(0));
  if (!prove_rounding(expanded.layers, expanded.contraction)) {
    return state.SkipWithError("it is another layer");
  }
  for (auto _ : state) benchmark::DoNotOptimize(contract(expanded.layers).weight().data());
}
void Prove_algebra(benchmark::State& state) {
  run(state, [](const Expanded& e) { return prove_algebra(e.layers, e.contraction); });
}
void Prove_rounding(benchmark::State& state) {
  run(state, [](const Expanded& e) { return prove_rounding(e.layers, e.contraction); });
}
void Prove_structure(benchmark::State& state) {
  run(state, [](const Expanded& e) {
    const auto size = smallest_input(Form<2>(Expr<float, 2>(chain(e.layers))));
    return prove_structure(e.layers, e.contraction, {.input_size = size});
  });
}

void Expand_preserving(benchmark::State& state) {
  std::mt19937_64 generator(1);
  const ConvShape<2> shape{
      .out = state.range(0), .in = state.range(0), .kernel_size = 3, .padding = 1, .bias = true};
  const Conv2d<float> compact = initialize<float>(std::vector{shape}, generator).front();
  const auto shapes = expand_cl(shape, {.rate = 4});
  const auto expand = [&] {
    std::mt19937_64 random(2);
    return preserve(compact, shapes, random);
  };
  if (!prove_rounding(expand(), compact)) return state.SkipWithError("it is another layer");
  for (auto _ : state) benchmark::DoNotOptimize(expand().front().weight().data());
}

BENCHMARK(Contract)->Arg(16)->Arg(64)->Unit(benchmark::kMillisecond);
BENCHMARK(Prove_algebra)->Arg(16)->Arg(64)->Unit(benchmark::kMillisecond);
BENCHMARK(Prove_rounding)->Arg(16)->Arg(64)->Unit(benchmark::kMillisecond);
BENCHMARK(Prove_structure)->Arg(16)->Unit(benchmark::kMillisecond);
BENCHMARK(Expand_preserving)->Arg(16)->Arg(64)->Unit(benchmark::kMillisecond);

}  // namespace
