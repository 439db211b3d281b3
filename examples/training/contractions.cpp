// SPDX-License-Identifier: Apache-2.0
#include "contractions.hpp"

#include "operations.hpp"

#include <concertina/contract.hpp>
#include <concertina/layers.hpp>
#include <concertina/moments.hpp>

#include <algorithm>
#include <memory>
#include <utility>

namespace training {
namespace {

using concertina::ConvShape, concertina::ParallelFor, concertina::serial_for;

std::size_t size(Index count) { return static_cast<std::size_t>(count); }

/// The tensors of a contraction.
template <class Scalar, int Rank>
Weights<Scalar> computed_weights(Tape<Scalar>& tape, const ConvShape<Rank>& shape) {
  return {&tape.tensor("", weight_extents(shape)),
          shape.bias ? &tape.tensor("", {shape.out}) : nullptr};
}

}  // namespace

template <class Scalar>
Contractions<Scalar>::Contractions(Tape<Scalar>& tape) : tape_(tape) {
  Operation operation;
  operation.prepare = [this] {
    if (computed_ == tape_.version()) return;
    for (const auto& [multiply_adds, forward] : large_) forward(tape_.pool());
    std::vector<const Work*> apart;
    for (const auto& [multiply_adds, forward] : small_) apart.push_back(&forward);
    tape_.pool()(std::ssize(apart), [&](Index i) { (*apart[size(i)])(serial_for); });
    computed_ = tape_.version();
  };
  operation.last = [this] {
    for (const Work& backward : after_) backward(tape_.pool());
  };
  tape_.record(std::move(operation));
}

template <class Scalar>
template <int Rank>
std::pair<Weights<Scalar>, ConvShape<Rank>> Contractions<Scalar>::add(
    const Chain<Scalar, Rank>& chain) {
  struct State {
    concertina::Expr<Scalar, Rank> expression;
    concertina::Contraction<Scalar, Rank> contraction;
    std::vector<Scalar> weight_gradient = {}, bias_gradient = {};  // with the decay
  };
  for (const Weights<Scalar>& layer : chain.layers) {
    mark_read(*layer.weight);
    if (layer.bias) mark_read(*layer.bias);
  }
  const auto expression = concertina::chain(chain.views());
  const concertina::Form form(expression);
  const auto state =
      std::make_shared<State>(State{expression, concertina::Contraction<Scalar, Rank>(form)});
  const ConvShape<Rank> shape = state->contraction.shape();
  const Weights<Scalar> whole = computed_weights(tape_, shape);
  const Work forward = [=](const ParallelFor& run) {
    state->contraction.forward(state->expression, view_of(shape, whole), run);
  };
  const Work backward = [=, this, layers = chain.layers](const ParallelFor& run) {
    const concertina::ConvView<const Scalar, Rank> gradient(
        shape, decayed(*whole.weight, state->weight_gradient),
        whole.bias ? decayed(*whole.bias, state->bias_gradient) : std::span<const Scalar>());
    const auto gradients = state->contraction.backward(state->expression, gradient, run);
    for (std::size_t l = 0; l < layers.size(); ++l) {
      layers[l].weight->gradient = gradients[l].weight();
      if (layers[l].bias) layers[l].bias->gradient = gradients[l].bias();
    }
  };
  const Index multiply_adds = form.multiply_adds();
  const bool large = multiply_adds >= 8'000'000;  // a sixth of a millisecond
  if (large && tape_.pool().size() > 2) {
    after_.push_back(backward);
  } else {
    whole.weight->pullback = [=] { backward(serial_for); };
  }
  (large ? large_ : small_).emplace(multiply_adds, forward);
  computed_ = -1;
  return {whole, shape};
}

template <class Scalar>
std::span<const Scalar> Contractions<Scalar>::decayed(const Tensor<Scalar>& tensor,
                                                      std::vector<Scalar>& sum) const {
  if (decay_ == Scalar(0)) return tensor.gradient;
  sum.resize(tensor.value.size());
  for (std::size_t i = 0; i < sum.size(); ++i) {
    sum[i] = tensor.gradient[i] + decay_ * tensor.value[i];
  }
  return sum;
}

template <class Scalar>
concertina::Expr<Scalar, 2> expression_of(const NormedBranches<Scalar>& branches, double eps) {
  using Expression = concertina::Expr<Scalar, 2>;
  std::vector<Expression> summands;
  for (const auto& branch : branches) {
    std::vector<Expression> chain;
    for (const auto& [shape, weights, norm, margin] : branch) {
      if (weights.weight) {
        chain.push_back(view_of(shape, weights));
      } else {
        chain.push_back(
            concertina::average_pool<Scalar, 2>(shape.in, shape.kernel_size, shape.stride));
      }
      chain.push_back(concertina::batch_norm(
          concertina::BatchNorm<Scalar>{.running_mean = norm.running_mean->value,
                                        .running_var = norm.running_var->value,
                                        .weight = norm.weight->value,
                                        .bias = norm.bias->value,
                                        .eps = eps}));
    }
    summands.push_back(concertina::chain(chain));
  }
  return concertina::sum(summands);
}

namespace {

template <class Scalar>
std::vector<NormedLayer<Scalar>> layers_of(const NormedBranches<Scalar>& branches) {
  std::vector<NormedLayer<Scalar>> layers;
  for (const auto& branch : branches) layers.insert(layers.end(), branch.begin(), branch.end());
  return layers;
}

template <class Scalar>
concertina::TrainingContraction<Scalar, 2> contraction_of(const NormedBranches<Scalar>& branches,
                                                          const concertina::PerAxis<2>& size) {
  std::vector<concertina::Padding<2>> margins;
  for (const auto& layer : layers_of(branches)) margins.push_back(layer.margin);
  return concertina::TrainingContraction<Scalar, 2>(expression_of(branches), size, margins);
}

}  // namespace

template <class Scalar>
bool cheaper_contracted(const NormedBranches<Scalar>& branches, const concertina::PerAxis<2>& size,
                        Index images) {
  // Most of it are moments of few channels, whose multiply-adds take longer than those of
  // convolutions here: at kernel 3 up to 1.5 times as long, at kernel 7 up to 5 times (cifar bench
  // --models mobileone,dbb,cl+norms). With these it is never slower.
  const auto contraction = contraction_of(branches, size);
  const Index slower = numel(contraction.shape().kernel_size) > 9 ? 5 : 2;
  const auto [layered, contracted] = contraction.cost(images);
  return contracted < layered / slower;
}

template <class Scalar>
Maps<Scalar>& contracted_block(Tape<Scalar>& tape, Maps<Scalar>& x,
                               const NormedBranches<Scalar>& branches) {
  struct State {
    concertina::TrainingContraction<Scalar, 2> contraction;
    std::vector<Scalar> batch, gradient;  // [image][channel][y][x]
    Index computed = -1;                  // version of the tensors, in inference
  };
  const auto state =
      std::make_shared<State>(State{contraction_of(branches, {x.height, x.width}), {}, {}});
  state->batch.resize(size(tape.capacity() * x.numbers()));
  state->gradient.resize(x.differentiable ? state->batch.size() : 0);
  const std::vector<NormedLayer<Scalar>> layers = layers_of(branches);
  for (const auto& layer : layers) {
    for (Tensor<Scalar>* tensor :
         {layer.weights.weight, layer.weights.bias, layer.norm.weight, layer.norm.bias}) {
      if (tensor) mark_read(*tensor);
    }
  }
  const ConvShape<2> shape = state->contraction.shape();
  const Weights<Scalar> whole = computed_weights(tape, shape);
  whole.weight->late = true;
  whole.weight->pullback = [=] {
    const auto gradients = state->contraction.backward(concertina::ConvView<const Scalar, 2>(
        shape, whole.weight->gradient,
        whole.bias ? whole.bias->gradient : std::span<const Scalar>()));
    auto leaf = gradients.begin();
    for (const NormedLayer<Scalar>& layer : layers) {
      const Weights<Scalar>& weights = layer.weights;
      if (weights.weight) weights.weight->gradient = leaf->weight();
      if (weights.bias) weights.bias->gradient = leaf->bias();
      leaf += weights.weight ? 1 : 2;  // a pool is a window and a divisor
      layer.norm.weight->gradient = leaf->weight();
      layer.norm.bias->gradient = leaf->bias();
      ++leaf;
    }
  };

  const Index positions = x.height * x.width;
  /// Calls each(element of x, the same in [image][channel][y][x]) for the images of a chunk.
  const auto for_each_element = [&tape, positions, channels = x.channels](Index chunk,
                                                                          auto&& each) {
    const Index first = chunk * lanes, images = std::min<Index>(lanes, tape.images() - first);
    for (Index c = 0; c < channels; ++c) {
      for (Index lane = 0; lane < images; ++lane) {
        const Index to = ((first + lane) * channels + c) * positions;
        for (Index i = 0; i < positions; ++i) each((c * positions + i) * lanes + lane, to + i);
      }
    }
  };
  const auto batch_in = [&tape, &x](std::vector<Scalar>& maps) {
    const concertina::MapShape<2> batch{
        .batch = tape.images(), .channels = x.channels, .size = {x.height, x.width}};
    return concertina::FeatureMapView<Scalar, 2>(batch, std::span(maps).first(size(numel(batch))));
  };

  Operation operation;
  operation.forward.each([=, &tape, &x](Index chunk, Index) {
    if (!tape.training()) return;
    const Scalar* const from = x.values(chunk);
    for_each_element(chunk, [&](Index i, Index to) { state->batch[size(to)] = from[i]; });
  });
  operation.forward.then([=, &tape] {
    if (!tape.training()) {
      if (std::exchange(state->computed, tape.version()) == tape.version()) return;
      const concertina::Conv<Scalar, 2> layer = concertina::contract(expression_of(branches));
      std::ranges::copy(layer.weight(), whole.weight->value.begin());
      if (whole.bias) std::ranges::copy(layer.bias(), whole.bias->value.begin());
      return;
    }
    state->computed = -1;
    state->contraction.forward(expression_of(branches),
                               state->contraction.moments(batch_in(state->batch), tape.pool()),
                               view_of(shape, whole), tape.pool());
    for (std::size_t l = 0; l < layers.size(); ++l) {
      const concertina::BatchStatistics& statistics = state->contraction.statistics()[l];
      concertina::BatchNorm<Scalar> norm{layers[l].norm.running_mean->value,
                                         layers[l].norm.running_var->value};
      concertina::update_running_statistics(norm, statistics);
      layers[l].norm.running_mean->value = norm.running_mean;
      layers[l].norm.running_var->value = norm.running_var;
    }
  });
  if (x.differentiable) {  // through the statistics; the convolution adds the rest before
    const auto first_writer = tape.first_writer(x);
    operation.backward.then([=, &tape] {
      tape.pool().wait();  // for the pullback
      std::ranges::fill(state->gradient, Scalar(0));
      state->contraction.add_input_gradient(batch_in(state->batch), batch_in(state->gradient),
                                            tape.pool());
    });
    operation.backward.each([=, &x](Index chunk, Index) {
      Scalar* const to = x.gradients(chunk);
      if (first_writer()) std::fill_n(to, x.numbers() * lanes, Scalar(0));
      for_each_element(chunk, [&](Index i, Index from) { to[i] += state->gradient[size(from)]; });
    });
  }
  tape.record(std::move(operation));
  return convolution(tape, x, shape, whole);
}

#define TRAINING_INSTANTIATE(Scalar)                                                             \
  template class Contractions<Scalar>;                                                           \
  template std::pair<Weights<Scalar>, ConvShape<0>> Contractions<Scalar>::add(                   \
      const Chain<Scalar, 0>&);                                                                  \
  template std::pair<Weights<Scalar>, ConvShape<2>> Contractions<Scalar>::add(                   \
      const Chain<Scalar, 2>&);                                                                  \
  template Maps<Scalar>& contracted_block(Tape<Scalar>&, Maps<Scalar>&,                          \
                                          const NormedBranches<Scalar>&);                        \
  template concertina::Expr<Scalar, 2> expression_of(const NormedBranches<Scalar>&, double);     \
  template bool cheaper_contracted(const NormedBranches<Scalar>&, const concertina::PerAxis<2>&, \
                                   Index);
TRAINING_INSTANTIATE(float)
TRAINING_INSTANTIATE(double)
#undef TRAINING_INSTANTIATE

}  // namespace training
