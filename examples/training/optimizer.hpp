// Stochastic gradient descent, and Adam.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "tape.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace training {

/// A parameter and the weight decay that it has.
template <class Scalar>
struct Trained {
  Tensor<Scalar>* tensor;
  double weight_decay = 0;
};

/// What updates parameters by their gradients, and remembers for it numbers for each of theirs.
template <class Scalar>
class Optimizer {
 public:
  /// Numbers that are kept for each parameter, in the parameters' order.
  struct State {
    std::string name;
    std::vector<std::vector<Scalar>> numbers = {};
  };

  virtual ~Optimizer() = default;
  Optimizer(const Optimizer&) = delete;
  Optimizer& operator=(const Optimizer&) = delete;

  void step(double learning_rate) {
    ++steps_;
    update(learning_rate);
    tape_.tensors_changed();
  }

  /// Forgets the past, as an optimizer made anew.
  void reset() {
    steps_ = 0;
    for (State& state : states_) {
      for (auto& numbers : state.numbers) std::ranges::fill(numbers, Scalar(0));
    }
  }

  std::vector<State>& states() { return states_; }
  const std::vector<Trained<Scalar>>& parameters() const { return parameters_; }
  Index steps() const { return steps_; }  ///< since it was made or reset
  void set_steps(Index steps) { steps_ = steps; }

 protected:
  Optimizer(Tape<Scalar>& tape, std::vector<Trained<Scalar>> parameters,
            std::vector<std::string> states)
      : tape_(tape), parameters_(std::move(parameters)) {
    for (std::string& name : states) states_.push_back({std::move(name)});
    for (std::size_t p = 0; p < parameters_.size(); ++p) {
      const auto count = parameters_[p].tensor->value.size();
      for (State& state : states_) state.numbers.emplace_back(count, Scalar(0));
      constexpr std::size_t longest = 1 << 15;  // so that threads share a large tensor
      for (std::size_t first = 0; first < count; first += longest) {
        blocks_.push_back({p, first, std::min(longest, count - first)});
      }
    }
  }

  /// Calls each(weight, gradient, decay, states...) with references to each parameter's numbers:
  /// one loop over what does not fit a cache, where Eigen would make two.
  template <std::size_t... State, class Each>
  void for_each_number(std::index_sequence<State...>, Each&& each) {
    tape_.pool().run(std::ssize(blocks_), [&](Index task, Index) {
      const auto& [p, first, count] = blocks_[static_cast<std::size_t>(task)];
      const auto& [tensor, weight_decay] = parameters_[p];
      const auto decay = static_cast<Scalar>(weight_decay);
      Scalar* const weight = tensor->value.data() + first;
      const Scalar* const gradient = tensor->gradient.data() + first;
      Scalar* const states[] = {states_[State].numbers[p].data() + first...};
      for (std::size_t i = 0; i < count; ++i) {
        each(weight[i], gradient[i] + decay * weight[i], states[State][i]...);
      }
    });
  }

 private:
  struct Block {
    std::size_t parameter, first, count;
  };

  virtual void update(double learning_rate) = 0;

  Tape<Scalar>& tape_;
  std::vector<Trained<Scalar>> parameters_;
  std::vector<State> states_;
  std::vector<Block> blocks_;
  Index steps_ = 0;
};

/// v = momentum * v + gradient + weight_decay * w; w -= learning_rate * v, as torch.optim.SGD.
template <class Scalar>
class Sgd final : public Optimizer<Scalar> {
 public:
  Sgd(Tape<Scalar>& tape, std::vector<Trained<Scalar>> parameters, double momentum)
      : Optimizer<Scalar>(tape, std::move(parameters), {"velocity"}),
        momentum_(static_cast<Scalar>(momentum)) {}

 private:
  void update(double learning_rate) override {
    const auto rate = static_cast<Scalar>(learning_rate);
    this->for_each_number(std::index_sequence<0>(),
                          [rate, momentum = momentum_](Scalar& w, Scalar gradient, Scalar& v) {
                            v = momentum * v + gradient;
                            w -= rate * v;
                          });
  }

  Scalar momentum_;
};

/// As torch.optim.Adam, with its betas of 0.9 and 0.999 and eps of 1e-8.
/// Source  Kingma, Ba, "Adam: a method for stochastic optimization", ICLR 2015
template <class Scalar>
class Adam final : public Optimizer<Scalar> {
 public:
  Adam(Tape<Scalar>& tape, std::vector<Trained<Scalar>> parameters)
      : Optimizer<Scalar>(tape, std::move(parameters), {"mean", "square"}) {}

 private:
  void update(double learning_rate) override {
    constexpr double beta1 = 0.9, beta2 = 0.999;
    const auto steps = static_cast<double>(this->steps());
    const auto rate = static_cast<Scalar>(learning_rate / (1 - std::pow(beta1, steps)));
    const auto root = static_cast<Scalar>(1 / std::sqrt(1 - std::pow(beta2, steps)));
    constexpr auto b1 = static_cast<Scalar>(beta1), b2 = static_cast<Scalar>(beta2),
                   eps = static_cast<Scalar>(1e-8);
    this->for_each_number(std::index_sequence<0, 1>(),
                          [=](Scalar& w, Scalar gradient, Scalar& mean, Scalar& square) {
                            mean += (1 - b1) * (gradient - mean);
                            square = b2 * square + (1 - b2) * gradient * gradient;
                            w -= rate * mean / (root * std::sqrt(square) + eps);
                          });
  }
};

}  // namespace training
