// The block programs of the loss and of what teachers add to it.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "program.hpp"

#include <cmath>
#include <cstddef>
#include <cstdint>

namespace cifar::cuda {

namespace detail {

/// softmax(logits / temperature) of one image, a class at a time.
template <class Scalar>
struct Softmax {
  const Scalar* logits;
  Scalar temperature, largest, sum = 0;
  int winner = 0;  ///< the first of the largest

  template <class B>
  CONCERTINA_DEVICE Softmax(B& block, const Scalar* logits_, int classes, Scalar temperature_)
      : logits(logits_), temperature(temperature_), largest(block.read(logits_)) {
    for (int k = 1; k < classes; ++k) {
      const Scalar logit = block.read(logits + k);
      if (logit > largest) largest = logit, winner = k;
    }
    for (int k = 0; k < classes; ++k) sum += exponential(block, k);
  }
  template <class B>
  CONCERTINA_DEVICE Scalar exponential(B& block, int k) const {
    return std::exp((block.read(logits + k) - largest) / temperature);
  }
  template <class B>
  CONCERTINA_DEVICE Scalar probability(B& block, int k) const {
    return exponential(block, k) / sum;
  }
};

}  // namespace detail

/// The mean over a step's images of the cross-entropy of softmax(logits) with their labels, and the
/// images whose largest logit is the label's, into losses[step] and corrects[step]; the gradient of
/// the mean, if it is asked for; and the next step. One block: what it adds up is small.
template <class Scalar>
struct CrossEntropy {
  static constexpr int threads = detail::program_threads;

  Pass<Scalar> pass;
  const Scalar* logits;  ///< [image][class]
  Scalar* gradient;      ///< [image][class]; null for none
  int images, classes;
  Scalar weight = 1;  ///< of the gradient

  Index blocks() const { return 1; }
  std::size_t shared_bytes() const {
    return shared_size<double>(threads) + shared_size<std::int32_t>(threads);
  }

  template <ThreadBlock B>
  CONCERTINA_DEVICE void operator()(B& block, Index) const {
    auto sums = block.template shared<double>(threads);
    auto counts = block.template shared<std::int32_t>(threads);
    block.each_thread([&](int thread) {
      const Index first = block.read(pass.clock).step * pass.batch;
      double loss = 0;
      std::int32_t correct = 0;
      for (int image = thread; image < images; image += threads) {
        const int label = block.read(pass.labels + block.read(pass.order + first + image));
        correct += add(block, image, label, loss) ? 1 : 0;
      }
      sums.set(thread, loss);
      counts.set(thread, correct);
    });
    detail::add_up<threads>(block, sums, counts);
    block.each_thread([&](int thread) {
      if (thread != 0) return;
      Clock now = block.read(pass.clock);
      block.write(pass.losses + now.step, sums.get(0) / images);
      block.write(pass.corrects + now.step, counts.get(0));
      ++now.step;
      block.write(pass.clock, now);
    });
  }

 private:
  /// Adds an image's loss and says whether its largest logit is the label's.
  template <class B>
  CONCERTINA_DEVICE bool add(B& block, int image, int label, double& loss) const {
    const Index first = static_cast<Index>(image) * classes;
    const detail::Softmax<Scalar> given(block, logits + first, classes, Scalar(1));
    const Scalar of_label = block.read(logits + first + label) - given.largest;
    loss += static_cast<double>(std::log(given.sum) - of_label);
    if (gradient == nullptr) return given.winner == label;
    const Scalar share = weight / static_cast<Scalar>(images);
    for (int k = 0; k < classes; ++k) {
      const Scalar target = k == label ? Scalar(1) : Scalar(0);
      block.write(gradient + first + k, (given.probability(block, k) - target) * share);
    }
    return given.winner == label;
  }
};

// ---- teachers -----------------------------------------------------------------------------------

/// gradient += share * (softmax(logits / temperature) - softmax(teacher / temperature)), a thread
/// for each image, as distillation().
template <class Scalar>
struct Distill : detail::Elementwise<Distill<Scalar>> {
  const Scalar *logits, *teacher;  ///< [image][class]
  Scalar* gradient;
  int classes;
  Scalar temperature, share;

  template <class B>
  CONCERTINA_DEVICE void at(B& block, Index image) const {
    const Index first = image * classes;
    const detail::Softmax<Scalar> own(block, logits + first, classes, temperature),
        wanted(block, teacher + first, classes, temperature);
    for (int k = 0; k < classes; ++k) {
      const Scalar more = own.probability(block, k) - wanted.probability(block, k);
      block.write(gradient + first + k, block.read(gradient + first + k) + share * more);
    }
  }
};

namespace detail {

/// Inner products of the features of a batch's images, [image][image].
template <class Scalar>
struct Gram {
  const Scalar* products;
  int images;

  template <class B>
  CONCERTINA_DEVICE double norm(B& block, int i) const {
    const auto square = static_cast<double>(block.read(products + Index{i} * images + i));
    return square > 1e-60 ? std::sqrt(square) : 1e-30;  // 0 has no direction
  }
  template <class B>
  CONCERTINA_DEVICE double cosine(B& block, int i, int j) const {
    const auto product = static_cast<double>(block.read(products + Index{i} * images + j));
    return product / (norm(block, i) * norm(block, j));
  }
  template <class B>
  CONCERTINA_DEVICE double similarity(B& block, int i, int j) const {
    return (cosine(block, i, j) + 1) / 2 + 1e-7;
  }
};

}  // namespace detail

/// The gradient of similarity_transfer() for the cosines of the student's features, slopes
/// [image][image]: a block for each row.
template <class Scalar>
struct SimilaritySlopes {
  static constexpr int threads = detail::program_threads;

  detail::Gram<Scalar> own, teacher;
  double* slopes;

  Index blocks() const { return own.images; }
  std::size_t shared_bytes() const { return 2 * shared_size<double>(threads); }

  template <ThreadBlock B>
  CONCERTINA_DEVICE void operator()(B& block, Index index) const {
    const int i = static_cast<int>(index), images = own.images;
    auto sums = block.template shared<double>(threads),
         wanted = block.template shared<double>(threads);
    block.each_thread([&](int thread) {
      double sum = 0, other = 0;
      for (int j = thread; j < images; j += threads) {
        sum += own.similarity(block, i, j), other += teacher.similarity(block, i, j);
      }
      sums.set(thread, sum);
      wanted.set(thread, other);
    });
    detail::add_up<threads>(block, sums, wanted);
    block.each_thread([&](int thread) {
      for (int j = thread; j < images; j += threads) {
        const double share = teacher.similarity(block, i, j) / wanted.get(0);
        const double slope = 1 / sums.get(0) - share / own.similarity(block, i, j);
        block.write(slopes + index * images + j, slope / (2.0 * images));
      }
    });
  }
};

/// What the features are multiplied by for their gradient, weights[image][image], from the slopes:
/// along the others' directions, less what would change their own length. A block for each row.
template <class Scalar>
struct SimilarityWeights {
  static constexpr int threads = detail::program_threads;

  detail::Gram<Scalar> own;
  const double* slopes;
  Scalar* weights;

  Index blocks() const { return own.images; }
  std::size_t shared_bytes() const { return shared_size<double>(threads); }

  template <ThreadBlock B>
  CONCERTINA_DEVICE void operator()(B& block, Index index) const {
    const int i = static_cast<int>(index), images = own.images;
    const auto slope = [&](int j) {
      return block.read(slopes + index * images + j) +
             block.read(slopes + Index{j} * images + index);
    };
    auto radial = block.template shared<double>(threads);
    block.each_thread([&](int thread) {
      double sum = 0;
      for (int j = thread; j < images; j += threads) sum += slope(j) * own.cosine(block, i, j);
      radial.set(thread, sum);
    });
    detail::add_up<threads>(block, radial);
    block.each_thread([&](int thread) {
      const double norm = own.norm(block, i);
      for (int j = thread; j < images; j += threads) {
        const double other = own.norm(block, j);
        double weight = slope(j) / (norm * other);
        if (i == j) weight -= radial.get(0) / (norm * norm);
        if (norm <= 1e-30 || other <= 1e-30) weight = 0;
        block.write(weights + index * images + j, static_cast<Scalar>(weight));
      }
    });
  }
};

}  // namespace cifar::cuda
