// A training's epochs on a backend: the data set and the network stay there, numbers come and go.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "accelerator.hpp"
#include "network.hpp"

#include <concertina/error.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

namespace cifar::cuda {

/// Batches, crops and their order are those of Training, and so are the numbers but for rounding.
template <class Scalar, Backend B>
class BackendTraining final : public Accelerator<Scalar> {
 public:
  /// Throws  as SmallNet; ShapeError where a set's pixels do not fit its labels, or those the classes
  explicit BackendTraining(const TrainingPlan& plan,
                           const MakeContractor<Scalar, B>& make_contractor = {})
      : batch_(static_cast<int>(plan.batch)),
        augmented_(plan.augmented),
        seed_(plan.seed),
        network_(backend_, plan.network, plan.descent, batch_, plan.overlap.forked,
                 make_contractor),
        values_(uploaded(normalized_values<Scalar>(plan.mean, plan.deviation))),
        clock_(backend_.template allocate<Clock>(1)),
        train_(set_of(plan.train, "the training set")),
        test_(set_of(plan.test, "the test set")) {
    std::vector<std::uint32_t> order(plan.test.labels.size());
    std::iota(order.begin(), order.end(), 0U);
    backend_.upload(std::span<const std::uint32_t>(order), test_.order.data());
    for (const Set* const set : std::array<const Set*, 2>{&train_, &test_}) {
      if (set->images % batch_ != 0) network_.reserve(static_cast<int>(set->images % batch_));
    }
  }

  BackendTraining(const BackendTraining&) = delete;
  BackendTraining& operator=(const BackendTraining&) = delete;
  /// What was recorded goes first: it may not outlive the numbers and contraction that it refers
  /// to.
  ~BackendTraining() override { backend_.forget(); }

  /// Throws  as SmallNet::begin_epoch(); ShapeError where the order is not one of the set's images
  Steps epoch(const Epoch& epoch, const Numbers<Scalar>& numbers) override {
    require_order(epoch.order);
    network_.begin_epoch(numbers);
    backend_.upload(epoch.order, train_.order.data());
    const Steps steps = run(train_, {epoch.number, 0, epoch.learning_rate}, augmented_, true);
    const auto is_finite = [](double loss) { return std::isfinite(loss); };
    if (std::ranges::all_of(steps.losses, is_finite)) network_.end_epoch(numbers);
    return steps;
  }

  Steps test(const Numbers<Scalar>& numbers) override {
    network_.begin_tests(numbers);
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
  Set set_of(const ImageSet& set, const std::string& name) {
    require_fitting(set, name);
    const Index images = std::ssize(set.labels), steps = (images + batch_ - 1) / batch_;
    return {images,
            uploaded(set.pixels),
            uploaded(set.labels),
            backend_.template allocate<std::uint32_t>(images),
            backend_.template allocate<double>(steps),
            backend_.template allocate<std::int32_t>(steps)};
  }

  void require_fitting(const ImageSet& set, const std::string& name) const {
    if (set.pixels.size() != set.labels.size() * static_cast<std::size_t>(image_size)) {
      throw concertina::ShapeError(name + " has " + std::to_string(set.pixels.size()) +
                                   " pixels for " + std::to_string(set.labels.size()) +
                                   " images of " + std::to_string(image_size));
    }
    for (std::size_t i = 0; i < set.labels.size(); ++i) {
      if (set.labels[i] < network_.classes()) continue;
      throw concertina::ShapeError(name + "'s image " + std::to_string(i) + " has class " +
                                   std::to_string(set.labels[i]) + ", where the network has " +
                                   std::to_string(network_.classes()));
    }
  }
  void require_order(std::span<const std::uint32_t> order) const {
    if (std::ssize(order) != train_.images) {
      throw concertina::ShapeError("an order of " + std::to_string(order.size()) +
                                   " images, where the training set has " +
                                   std::to_string(train_.images));
    }
    for (std::size_t i = 0; i < order.size(); ++i) {
      if (order[i] < train_.images) continue;
      throw concertina::ShapeError("the order's entry " + std::to_string(i) + " is image " +
                                   std::to_string(order[i]) + ", where the training set has " +
                                   std::to_string(train_.images));
    }
  }

  /// All of a set's batches, one after another, without waiting for any.
  Steps run(Set& set, const Clock& start, bool augmented, bool training) {
    backend_.upload(std::span<const Clock>(&start, 1), clock_.data());
    const Pass<Scalar> pass{
        set.pixels.data(), set.labels.data(),   set.order.data(), clock_.data(), values_.data(),
        set.losses.data(), set.corrects.data(), batch_,           augmented,     seed_};
    for (Index first = 0; first < set.images; first += batch_) {
      const int images = static_cast<int>(std::min<Index>(batch_, set.images - first));
      backend_.repeat({training, images}, [&] {
        if (training) {
          network_.train(pass, images);
        } else {
          network_.test(pass, images);
        }
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
