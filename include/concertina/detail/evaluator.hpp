// A program run: forward on the layers' elements, backward to their gradients. Knows no rank, so it
// is compiled once for each scalar.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/detail/branch_place.hpp>
#include <concertina/detail/product/product.hpp>
#include <concertina/detail/program.hpp>

#include <optional>
#include <span>
#include <utility>
#include <vector>

namespace concertina::detail {

/// A layer's elements, owned and uninitialised.
template <class Scalar>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(const AnyShape& shape)
      : weight_(weight_numel(shape)), bias_(shape.bias ? shape.out : 0) {}

  LayerData<Scalar> data() const { return {weight_.data(), bias_.data()}; }

 private:
  Scratch<Scalar> weight_, bias_;
};

/// Runs a program once, freeing each intermediate as soon as nothing reads it any more, or again
/// and again with its gradient, keeping everything.
template <class Scalar>
class Evaluator {
 public:
  /// With Keep::everything all memory is allocated here. `parallel` says whether tasks may run at
  /// the same time.
  enum class Keep { nothing, everything };
  Evaluator(Program program, Keep keep, bool parallel = true)
      : program_(std::move(program)),
        keeps_(keep == Keep::everything),
        parallel_(parallel),
        steps_(program_.instructions().size()) {
    if (!keeps_) return;
    for (std::size_t i = 0; i < steps_.size(); ++i) {
      prepare(i);
      if (i + 1 == steps_.size()) break;
      const AnyShape& shape = program_.instructions()[i].shape;
      steps_[i].value = Buffer<Scalar>(shape);
      if (!shape.fixed) steps_[i].gradient = Buffer<Scalar>(shape);
    }
  }

  const Program& program() const { return program_; }

  /// load(leaf) gives a leaf's elements, and release(leaf) is told when they are not read any more
  /// in this pass.
  using Load = FunctionRef<LayerData<const Scalar>(Value)>;
  using Release = FunctionRef<void(Value)>;

  /// Writes the contraction to `result`.
  void forward(Load load, Release release, const LayerData<Scalar>& result,
               const ParallelFor& run) {
    const std::size_t leaves = program_.leaves().size();
    if (steps_.empty()) {
      copy(program_.leaves().front(), load(0), result);
      return release(0);
    }
    for (std::size_t i = 0; i < steps_.size(); ++i) {
      const Instruction& instruction = program_.instructions()[i];
      Step& step = steps_[i];
      if (!keeps_) prepare(i);
      const bool last = i + 1 == steps_.size();
      if (!last && !keeps_) step.value = Buffer<Scalar>(instruction.shape);
      const LayerData<Scalar> to = last ? result : step.value.data();
      const auto free = [&](Value value) {
        if (value < leaves) return release(value);
        if (!keeps_) steps_[value - leaves].value = {};
      };
      if (step.product) {
        const LayerData<const Scalar> inner = value_of(load, instruction.inner()),
                                      outer = value_of(load, instruction.outer());
        step.product->forward(outer, inner, to, run);
        free(instruction.inner());
        free(instruction.outer());
      } else {
        std::fill_n(to.weight, weight_numel(instruction.shape), Scalar(0));
        if (instruction.shape.bias) std::fill_n(to.bias, instruction.shape.out, Scalar(0));
        for (std::size_t b = 0; b < step.places.size(); ++b) {
          const Value branch = instruction.operands[b];
          step.places[b].for_each(value_of(load, branch), to,
                                  [](const Scalar& from, Scalar& sum) { sum = sum + from; });
          free(branch);
        }
      }
      if (!keeps_) step.product.reset();
    }
  }

  /// From the gradient of the contraction to those of the leaves that are not fixed, which
  /// gradient_of(leaf) places.
  /// Requires everything to be kept, and the leaves to be as the last forward() saw them.
  void backward(Load load, const LayerData<const Scalar>& gradient,
                FunctionRef<LayerData<Scalar>(Value)> gradient_of, const ParallelFor& run) {
    const std::size_t leaves = program_.leaves().size();
    if (program_.shape(program_.result()).fixed) return;
    if (steps_.empty()) return copy(program_.leaves().front(), gradient, gradient_of(0));
    const auto at = [&](Value value) {
      if (program_.shape(value).fixed) return LayerData<Scalar>{};
      return value < leaves ? gradient_of(value) : steps_[value - leaves].gradient.data();
    };
    for (std::size_t i = steps_.size(); i-- > 0;) {
      const Instruction& instruction = program_.instructions()[i];
      Step& step = steps_[i];
      if (instruction.shape.fixed) continue;
      const LayerData<const Scalar> given =
          i + 1 == steps_.size() ? gradient : constant(step.gradient.data());
      if (step.product) {
        step.product->backward(value_of(load, instruction.outer()),
                               value_of(load, instruction.inner()), given, at(instruction.outer()),
                               at(instruction.inner()), run);
        continue;
      }
      for (std::size_t b = 0; b < step.places.size(); ++b) {
        if (program_.shape(instruction.operands[b]).fixed) continue;
        step.places[b].for_each(at(instruction.operands[b]), given,
                                [](Scalar& own, const Scalar& whole) { own = whole; });
      }
    }
  }

 private:
  struct Step {
    std::optional<Product<Scalar>> product;
    std::vector<BranchPlace> places;  // of a sum or concatenation
    Buffer<Scalar> value, gradient;   // not of the last, whose are the caller's
  };

  static LayerData<const Scalar> constant(const LayerData<Scalar>& data) {
    return {data.weight, data.bias};
  }

  static void copy(const AnyShape& shape, const LayerData<const Scalar>& from,
                   const LayerData<Scalar>& to) {
    std::copy_n(from.weight, weight_numel(shape), to.weight);
    if (shape.bias) std::copy_n(from.bias, shape.out, to.bias);
  }

  LayerData<const Scalar> value_of(const Load& load, Value value) {
    const std::size_t leaves = program_.leaves().size();
    return value < leaves ? load(value) : constant(steps_[value - leaves].value.data());
  }

  void prepare(std::size_t i) {
    const Instruction& instruction = program_.instructions()[i];
    if (instruction.join == Join::chain) {
      steps_[i].product.emplace(
          ProductPlan(program_.shape(instruction.outer()), program_.shape(instruction.inner())),
          parallel_, keeps_);
      return;
    }
    steps_[i].places = branch_places(instruction.join, instruction.shape,
                                     program_.shapes_of(instruction.operands));
  }

  Program program_;
  bool keeps_, parallel_;
  std::vector<Step> steps_;
};

}  // namespace concertina::detail
