// A training step of one expanded convolution, contracted and layer by layer, where contracting
// begins to pay: the rule of Form::cheaper_contracted beside the clock. Both are compared before
// anything is timed. One thread.
// SPDX-License-Identifier: Apache-2.0
#include "training/contractions.hpp"
#include "training/operations.hpp"

#include <concertina/contract.hpp>
#include <concertina/expand.hpp>
#include <concertina/random.hpp>

#include <benchmark/benchmark.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

using namespace training;
using concertina::ConvShape, concertina::Form;

constexpr ConvShape<2> layer{.out = 256, .in = 256, .kernel_size = 3, .padding = 1};

/// CL with rate 4 on a batch of maps, in either way, from the same weights and images.
struct Step {
  ThreadPool pool{1};
  Tape<float> tape;
  Contractions<float> contractions{tape};
  Maps<float>*x, *y;

  Step(Index batch, Index side, bool contracted) : tape(batch, pool) {
    x = &tape.maps(layer.in, side, side);
    std::mt19937_64 generator(1);
    const auto fill = [&](float* to, Index count, double bound) {
      std::generate_n(to, count, [&] {
        return static_cast<float>(concertina::random_uniform(generator, bound));
      });
    };
    Chain<float, 2> expanded{expand_cl(layer, {.rate = 4}), {}};
    for (const ConvShape<2>& each : expanded.shapes) {
      Tensor<float>& weight =
          tape.tensor("weight", {each.out, each.in, each.kernel_size[0], each.kernel_size[1]});
      fill(weight.value.data(), std::ssize(weight.value),
           std::sqrt(3.0 / static_cast<double>(each.in * numel(each.kernel_size))));
      expanded.layers.push_back({&weight, nullptr});
    }
    for (Index chunk = 0; chunk < tape.chunk_capacity(); ++chunk) {
      fill(x->values(chunk), x->numbers() * lanes, 1);
    }
    y = x;
    if (contracted) {
      const auto [weights, shape] = contractions.add(expanded);
      y = &convolution(tape, *x, shape, weights);
    } else {
      for (std::size_t l = 0; l < expanded.shapes.size(); ++l) {
        y = &convolution(tape, *y, expanded.shapes[l], expanded.layers[l]);
      }
    }
    for (Index chunk = 0; chunk < tape.chunk_capacity(); ++chunk) {
      std::fill_n(y->gradients(chunk), y->numbers() * lanes, 1.0F);
    }
  }

  void run() {
    tape.forward(tape.capacity(), true);
    tape.backward();
  }
};

/// Whether both ways give the same outputs, up to float's rounding of sums of some 10,000 terms.
void require_alike(Index batch, Index side) {
  Step contracted(batch, side, true), layered(batch, side, false);
  contracted.run();
  layered.run();
  for (Index chunk = 0; chunk < contracted.tape.chunk_capacity(); ++chunk) {
    const float *a = contracted.y->values(chunk), *b = layered.y->values(chunk);
    for (Index i = 0; i < contracted.y->numbers() * lanes; ++i) {
      if (std::abs(a[i] - b[i]) > 1e-3F) throw std::logic_error("contracted and layered differ");
    }
  }
}

/// The rows of docs/results/cifar.md: batch * side * side positions.
void step(benchmark::State& state, const std::string& way) {
  const Index batch = state.range(0), side = state.range(1);
  const bool cheaper = Form<2>(expand_cl(layer, {.rate = 4})).cheaper_contracted(batch, side);
  require_alike(batch, side);
  Step step(batch, side, way == "contracted" || (way == "auto" && cheaper));
  for (auto _ : state) step.run();
  state.counters["positions"] = static_cast<double>(batch * side * side);
  state.counters["auto contracts"] = cheaper ? 1 : 0;
}

void register_all() {
  for (const char* way : {"contracted", "layered", "auto"}) {
    benchmark::RegisterBenchmark(("step/" + std::string(way)).c_str(),
                                 [way](benchmark::State& state) { step(state, way); })
        ->Args({16, 2})
        ->Args({16, 3})
        ->Args({16, 4})
        ->Args({16, 5})
        ->Args({16, 7})
        ->Args({16, 10})
        ->Unit(benchmark::kMillisecond);
  }
}

const bool registered = (register_all(), true);

}  // namespace
