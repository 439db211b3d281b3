// Folding a whole network: MobileNetV1 with its first and its depthwise layers expanded (CL, r =
// 4), every layer followed by a batch norm, from weights in memory to kernels in memory.
// SPDX-License-Identifier: Apache-2.0
#include <concertina/blocks.hpp>
#include <concertina/expand.hpp>

#include <benchmark/benchmark.h>

#include <array>
#include <random>
#include <vector>

namespace {

using namespace concertina;

/// One layer of the compact network: what it is made of, and the batch norm after it.
struct Expanded {
  std::vector<Conv2d<float>> layers;
  BatchNorm<float> norm;
};

std::vector<Expanded> mobilenet() {
  std::mt19937_64 generator(1);
  std::vector<Expanded> network;
  const auto add = [&](const std::vector<ConvShape<2>>& shapes) {
    const auto channels = static_cast<std::size_t>(shapes.back().out);
    auto norm = BatchNorm<float>::initialize(shapes.back().out);
    for (std::size_t c = 0; c < channels; ++c) {
      norm.running_mean[c] = static_cast<float>(random_uniform(generator, 1));
      norm.running_var[c] = static_cast<float>(1.1 + random_uniform(generator, 1));
      norm.weight[c] = static_cast<float>(random_uniform(generator, 2));
      norm.bias[c] = static_cast<float>(random_uniform(generator, 1));
    }
    network.push_back({initialize<float>(shapes, generator), std::move(norm)});
  };
  add(expand_cl<2>({.out = 32, .in = 3, .kernel_size = 3, .stride = 2, .padding = 1}));
  constexpr std::array<Index, 14> widths{32,  64,  128, 128, 256, 256,  512,
                                         512, 512, 512, 512, 512, 1024, 1024};
  for (std::size_t l = 0; l + 1 < widths.size(); ++l) {
    const Index in = widths[l], out = widths[l + 1];
    const Index stride = out > in && in > 32 ? 2 : 1;
    add(expand_cl<2>(
        {.out = in, .in = in, .kernel_size = 3, .stride = stride, .padding = 1, .groups = in}));
    add({{.out = out, .in = in}});
  }
  return network;
}

template <class A>
void Fold_MobileNetV1(benchmark::State& state) {
  const std::vector<Expanded> network = mobilenet();
  for (auto _ : state) {
    for (const Expanded& layer : network) {
      const auto kernel = contract<A>(batch_norm(layer.norm) * chain(layer.layers));
      benchmark::DoNotOptimize(kernel.weight().data());
    }
  }
}

BENCHMARK(Fold_MobileNetV1<float>)->Name("Fold_MobileNetV1")->Unit(benchmark::kMicrosecond);
BENCHMARK(Fold_MobileNetV1<double>)
    ->Name("Fold_MobileNetV1_in_double")
    ->Unit(benchmark::kMicrosecond);

}  // namespace
