// Contraction beside its limit: multiply-adds per second as a share of Eigen's own for a 1024^3
// product.
// SPDX-License-Identifier: Apache-2.0
#include <concertina/contract.hpp>
#include <concertina/expand.hpp>

#include "gemm.hpp"

#include <benchmark/benchmark.h>

#include <cmath>
#include <random>
#include <string>
#include <vector>

namespace {

using namespace concertina;

/// One output and input channel of the contraction, by the rule of a product, in double.
template <class Scalar, int Rank>
bool agrees_somewhere(const std::vector<Conv<Scalar, Rank>>& layers,
                      const Conv<Scalar, Rank>& product) {
  // A chain applied to an impulse shows the taps of one input channel at one output channel's
  // positions.
  if (product.shape().groups != 1) return true;
  FeatureMap<Scalar, Rank> x({.channels = product.shape().in, .size = product.shape().kernel_size});
  x.values()[0] = Scalar(1);
  FeatureMap<Scalar, Rank> y = x;
  for (const auto& layer : layers) {
    ConvShape<Rank> shape = layer.shape();
    shape.padding = 0;
    y = ConvView<const Scalar, Rank>(shape, layer.weight(), layer.bias())(y);
  }
  const double tap = static_cast<double>(product.weight()[0]);
  const double bias = product.bias().empty() ? 0 : static_cast<double>(product.bias()[0]);
  return std::abs(static_cast<double>(y.values()[0]) - tap - bias) <= 1e-3 * (std::abs(tap) + 1);
}

template <class Scalar, class A = Scalar, int Rank>
void contract_chain(benchmark::State& state, const std::vector<ConvShape<Rank>>& shapes) {
  std::mt19937_64 generator(1);
  const auto layers = initialize<Scalar>(shapes, generator);
  const Index work = Form(shapes).multiply_adds();
  if (work < 1'000'000'000 && !agrees_somewhere(layers, contract<A>(layers))) {
    state.SkipWithError("the contraction is wrong");
    return;
  }
  for (auto _ : state) benchmark::DoNotOptimize(contract<A>(layers).weight().data());
  using Counter = benchmark::Counter;
  state.counters["MAC"] = static_cast<double>(work);
  state.counters["MAC/s"] = {static_cast<double>(work), Counter::kIsIterationInvariantRate};
  state.counters["share_of_gemm"] = benchmarks::share_of_gemm<A>(static_cast<double>(work), [&] {
    benchmark::DoNotOptimize(contract<A>(layers).weight().data());
  });
}

ConvShape<2> conv(Index out, Index in, Index kernel) {
  return {.out = out, .in = in, .kernel_size = kernel, .bias = true};
}

const bool registered = [] {
  const auto add = [](const std::string& name, const std::vector<ConvShape<2>>& shapes) {
    benchmark::RegisterBenchmark(name.c_str(), contract_chain<float, float, 2>, shapes)
        ->Unit(benchmark::kMicrosecond);
  };
  add("CL_512_r4_k3", expand_cl(conv(512, 512, 3)));
  add("CK_128_3x3_3x3", {conv(128, 128, 3), conv(128, 128, 3)});
  add("CK_256_3x3_3x3", {conv(256, 256, 3), conv(256, 256, 3)});
  add("SmallNet_CL_8_32_64_16_k7", expand_cl(conv(16, 8, 7)));
  add("SmallNet_CL_16_64_128_32_k7", expand_cl(conv(32, 16, 7)));
  add("SmallNet_CK_8_32_64_16_k7", expand_ck(conv(16, 8, 7)));
  add("SmallNet_CK_16_64_128_32_k7", expand_ck(conv(32, 16, 7)));
  add("MobileNet_depthwise_CL_512",
      expand_cl<2>({.out = 512, .in = 512, .kernel_size = 3, .padding = 1, .groups = 512}));
  benchmark::RegisterBenchmark("SmallNet_FC_512_2048_256_64", contract_chain<float, float, 0>,
                               expand_fc({.out = 64, .in = 512, .bias = true}))
      ->Unit(benchmark::kMicrosecond);
  benchmark::RegisterBenchmark("SmallNet_CL_16_64_128_32_k7_in_double",
                               contract_chain<float, double, 2>, expand_cl(conv(32, 16, 7)))
      ->Unit(benchmark::kMicrosecond);
  return true;
}();

}  // namespace
