// Forward pass and gradient of contractions as training runs them, beside Eigen's rate for a 1024^3
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

/// The sum of products of two layers' numbers.
template <class Scalar, int Rank>
double inner_product(const ConvView<const Scalar, Rank>& f, const ConvView<const Scalar, Rank>& g) {
  double sum = 0;
  const auto add = [&](std::span<const Scalar> a, std::span<const Scalar> b) {
    for (std::size_t i = 0; i < a.size(); ++i) {
      sum += static_cast<double>(a[i]) * static_cast<double>(b[i]);
    }
  };
  add(f.weight(), g.weight());
  add(f.bias(), g.bias());
  return sum;
}

/// F is linear in each layer's weight and all biases from it on, so for each layer <dL/dF, F> is
/// <dL/dW, W> plus <dL/db, b> of its own and the later ones.
template <class Scalar, int Rank>
bool agrees(const std::vector<Conv<Scalar, Rank>>& layers, const Conv<Scalar, Rank>& whole,
            const Conv<Scalar, Rank>& gradient, std::span<const Conv<Scalar, Rank>> gradients) {
  const double expected = inner_product<Scalar, Rank>(gradient, whole);
  double magnitude = 0, later_biases = 0;
  for (std::size_t i = 0; i < whole.weight().size(); ++i) {
    magnitude += std::abs(static_cast<double>(whole.weight()[i] * gradient.weight()[i]));
  }
  for (std::size_t l = layers.size(); l-- > 0;) {
    const double found = inner_product<Scalar, Rank>(gradients[l], layers[l]) + later_biases;
    if (std::abs(found - expected) > 1e-4 * magnitude) return false;
    for (std::size_t o = 0; o < layers[l].bias().size(); ++o) {
      later_biases += static_cast<double>(gradients[l].bias()[o] * layers[l].bias()[o]);
    }
  }
  return true;
}

template <int Rank>
void train_chain(benchmark::State& state, const std::vector<ConvShape<Rank>>& shapes,
                 bool backward) {
  std::mt19937_64 generator(1);
  const auto layers = initialize<float>(shapes, generator);
  const Form<Rank> planned(layers);
  Contraction<float, Rank> contraction(planned, interior_only);
  const Conv<float, Rank> whole = contraction.forward(layers);
  Conv<float, Rank> gradient(whole.shape());
  initialize_uniform(gradient, generator);
  if (!agrees<float, Rank>(layers, whole, gradient, contraction.backward(layers, gradient))) {
    state.SkipWithError("the gradient is wrong");
    return;
  }
  const auto call = [&] {
    if (backward) {
      benchmark::DoNotOptimize(contraction.backward(layers, gradient).data());
    } else {
      benchmark::DoNotOptimize(contraction.forward(layers).weight().data());
    }
  };
  for (auto _ : state) call();
  const double work = static_cast<double>(planned.multiply_adds()) * (backward ? 2 : 1);
  using Counter = benchmark::Counter;
  state.counters["MAC"] = work;
  state.counters["MAC/s"] = {work, Counter::kIsIterationInvariantRate};
  state.counters["share_of_gemm"] = benchmarks::share_of_gemm<float>(work, call);
}

template <int Rank>
void add(const std::string& name, const std::vector<ConvShape<Rank>>& shapes) {
  for (const bool backward : {false, true}) {
    benchmark::RegisterBenchmark((name + (backward ? "/backward" : "/forward")).c_str(),
                                 train_chain<Rank>, shapes, backward)
        ->Unit(benchmark::kMicrosecond);
  }
}

ConvShape<2> conv(Index out, Index in, Index kernel) {
  return {.out = out, .in = in, .kernel_size = kernel, .bias = true};
}

const bool registered = [] {
  add("SmallNet_CL_8_32_64_16_k7", expand_cl(conv(16, 8, 7)));
  add("SmallNet_CL_16_64_128_32_k7", expand_cl(conv(32, 16, 7)));
  add("SmallNet_CK_8_32_64_16_k7", expand_ck(conv(16, 8, 7)));
  add("SmallNet_CK_16_64_128_32_k7", expand_ck(conv(32, 16, 7)));
  add("SmallNet_FC_512_2048_256_64", expand_fc({.out = 64, .in = 512, .bias = true}));
  add("MobileNet_depthwise_CL_512",
      expand_cl<2>({.out = 512, .in = 512, .kernel_size = 3, .padding = 1, .groups = 512}));
  add("CK_128_3x3_3x3", std::vector<ConvShape<2>>{conv(128, 128, 3), conv(128, 128, 3)});
  return true;
}();

}  // namespace
