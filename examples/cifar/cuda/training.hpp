// A training's epochs on a backend: the data set and the tape stay there, numbers come and go.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "accelerator.hpp"
#include "device_tape.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <span>
#include <type_traits>
#include <vector>

namespace cifar::cuda {

/// Batches, crops and their order are those of Training, and so are the numbers but for rounding.
template <class Scalar, Backend B>
class BackendTraining final : public Accelerator<Scalar> {
 public:
  explicit BackendTraining(const TrainingPlan& plan)
      : tape_(backend_, plan.descent, static_cast<int>(plan.batch),
              static_cast<int>(std::ssize(plan.train.labels) % plan.batch), plan.overlap.forked),
        values_(uploaded(normalized_values<Scalar>(plan.mean, plan.deviation))),
        clock_(backend_.template allocate<Clock>(1)),
        train_(set_of(plan.train, plan, plan.augmented)),
        test_(set_of(plan.test, plan, false)) {
    std::vector<std::uint32_t> order(plan.test.labels.size());
    std::iota(order.begin(), order.end(), 0U);
    backend_.upload(std::span<const std::uint32_t>(order), test_.pass.order);
  }

  BackendTraining(const BackendTraining&) = delete;
  BackendTraining& operator=(const BackendTraining&) = delete;
  /// What was recorded goes first: it may not outlive the numbers and contraction that it refers
  /// to.
  ~BackendTraining() override { backend_.forget(); }

  Recorder<Scalar>& recorder() override { return tape_; }

  Steps epoch(const Epoch& epoch, const States<Scalar>& states) override {
    tape_.begin_epoch(states);
    backend_.upload(epoch.order, train_.pass.order);
    const Clock start{
        .epoch = epoch.number, .steps_before = epoch.steps, .learning_rate = epoch.learning_rate};
    const Steps steps = run(train_, start, true);
    const auto is_finite = [](double loss) { return std::isfinite(loss); };
    if (std::ranges::all_of(steps.losses, is_finite)) tape_.end_epoch(states);
    return steps;
  }

  Steps test() override {
    tape_.begin_tests();
    return run(test_, {}, false);
  }

  B& backend() { return backend_; }

 private:
  struct Set {
    Index images;
    Pass<Scalar> pass;

    Index steps() const { return (images + pass.batch - 1) / pass.batch; }
  };

  template <class Numbers>
  auto uploaded(const Numbers& numbers) {
    using T = std::remove_cv_t<typename Numbers::value_type>;
    T* const to = backend_.template allocate<T>(std::ssize(numbers));
    backend_.upload(std::span<const T>(numbers), to);
    return to;
  }
  Set set_of(const ImageSet& images, const TrainingPlan& plan, bool augmented) {
    Set set{std::ssize(images.labels), {.batch = static_cast<int>(plan.batch)}};
    set.pass = {.pixels = uploaded(images.pixels),
                .labels = uploaded(images.labels),
                .order = backend_.template allocate<std::uint32_t>(set.images),
                .clock = clock_,
                .values = values_,
                .losses = backend_.template allocate<double>(set.steps()),
                .corrects = backend_.template allocate<std::int32_t>(set.steps()),
                .batch = set.pass.batch,
                .augmented = augmented,
                .seed = plan.seed};
    return set;
  }

  /// All of a set's batches, one after another, without waiting for any.
  Steps run(const Set& set, const Clock& start, bool training) {
    const Pass<Scalar>& pass = set.pass;
    backend_.upload(std::span<const Clock>(&start, 1), clock_);
    for (Index first = 0; first < set.images; first += pass.batch) {
      const int images = static_cast<int>(std::min<Index>(pass.batch, set.images - first));
      backend_.repeat({training, images}, [&] {
        if (training) {
          tape_.train(pass, images);
        } else {
          tape_.test(pass, images);
        }
      });
    }
    const auto count = static_cast<std::size_t>(set.steps());
    Steps steps{.losses = std::vector<double>(count), .corrects = std::vector<std::int32_t>(count)};
    backend_.download(pass.losses, std::span(steps.losses));
    backend_.download(pass.corrects, std::span(steps.corrects));
    return steps;
  }

  B backend_;  // before what refers to it
  DeviceTape<Scalar, B> tape_;
  Scalar* values_;
  Clock* clock_;
  Set train_, test_;
};

}  // namespace cifar::cuda
