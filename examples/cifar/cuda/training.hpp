// A training's epochs on a backend: the data set and the network stay there, numbers come and go.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "accelerator.hpp"
#include "network.hpp"

#include <algorithm>
#include <array>
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
  explicit BackendTraining(const TrainingPlan& plan,
                           const MakeContractor<Scalar, B>& make_contractor = {})
      : batch_(static_cast<int>(plan.batch)),
        augmented_(plan.augmented),
        seed_(plan.seed),
        network_(backend_, plan.network, plan.descent, batch_, make_contractor),
        values_(uploaded(normalized_values<Scalar>(plan.mean, plan.deviation))),
        clock_(backend_.template allocate<Clock>(1)),
        train_(set_of(plan.train)),
        test_(set_of(plan.test)) {
    std::vector<std::uint32_t> order(plan.test.labels.size());
    std::iota(order.begin(), order.end(), 0U);
    backend_.upload(std::span<const std::uint32_t>(order), test_.order.data());
    for (const Set* const set : std::array<const Set*, 2>{&train_, &test_}) {
      if (set->images % batch_ != 0) network_.reserve(static_cast<int>(set->images % batch_));
    }
  }

  Steps epoch(const Epoch& epoch, const Numbers<Scalar>& numbers) override {
    network_.upload(numbers);
    backend_.upload(epoch.order, train_.order.data());
    const Steps steps = run(train_, {epoch.number, 0, epoch.learning_rate}, augmented_, true);
    const auto is_finite = [](double loss) { return std::isfinite(loss); };
    if (std::ranges::all_of(steps.losses, is_finite)) network_.download(numbers);
    return steps;
  }

  Steps test(const Numbers<Scalar>& numbers) override {
    network_.upload(numbers);
    network_.begin_tests();
    return run(test_, {}, false, false);
  }

  B& backend() { return backend_; }

 private:
  template <class T>
  using Buffer = typename B::template Buffer<T>;

  /// A set of images, and what a pass over it leaves.
  struct Set {
    Index images;
    Buffer<std::uint8_t> pixels, labels;
    Buffer<std::uint32_t> order;
    Buffer<double> losses;
    Buffer<std::int32_t> corrects;
  };

  template <class Numbers>
  auto uploaded(const Numbers& numbers) {
    using T = std::remove_cv_t<typename Numbers::value_type>;
    auto buffer = backend_.template allocate<T>(std::ssize(numbers));
    backend_.upload(std::span<const T>(numbers), buffer.data());
    return buffer;
  }
  Set set_of(const ImageSet& set) {
    const Index images = std::ssize(set.labels), steps = (images + batch_ - 1) / batch_;
    return {images,
            uploaded(set.pixels),
            uploaded(set.labels),
            backend_.template allocate<std::uint32_t>(images),
            backend_.template allocate<double>(steps),
            backend_.template allocate<std::int32_t>(steps)};
  }

  /// All of a set's batches, one after another, without waiting for any.
  Steps run(Set& set, const Clock& start, bool augmented, bool training) {
    backend_.upload(std::span<const Clock>(&start, 1), clock_.data());
    const Pass<Scalar> pass{
        set.pixels.data(), set.labels.data(),   set.order.data(), clock_.data(), values_.data(),
        set.losses.data(), set.corrects.data(), batch_,           augmented,     seed_};
    for (Index first = 0; first < set.images; first += batch_) {
      const int images = static_cast<int>(std::min<Index>(batch_, set.images - first));
      backend_.repeat(training ? images : -images, [&] {
        training ? network_.train(pass, images) : network_.test(pass, images);
      });
    }
    const auto count = static_cast<std::size_t>((set.images + batch_ - 1) / batch_);
    Steps steps{.losses = std::vector<double>(count), .corrects = std::vector<std::int32_t>(count)};
    backend_.download(set.losses.data(), std::span(steps.losses));
    backend_.download(set.corrects.data(), std::span(steps.corrects));
    return steps;
  }

  B backend_;  // before what refers to it
  int batch_;
  bool augmented_;
  std::uint64_t seed_;
  SmallNet<Scalar, B> network_;
  Buffer<Scalar> values_;
  Buffer<Clock> clock_;
  Set train_, test_;
};

}  // namespace cifar::cuda
