// The block programs of the loss and of what teachers add to it.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "program.hpp"

#include <concertina/cuda/block.hpp>

#include <cmath>
#include <cstddef>
#include <cstdint>

namespace cifar::cuda {

/// The mean over a step's images of the cross-entropy of softmax(logits) with their labels, and the
/// images whose largest logit is the label's, into losses[step] and corrects[step]; the gradient of
/// the mean, if it is asked for; and the next step. One block: what it adds up is small.
template <class Scalar>
struct CrossEntropy {
  static constexpr int threads = detail::program_threads;

  const Scalar* logits;        ///< [image][class]
  const std::uint8_t* labels;  ///< of the set's images
  const std::uint32_t* order;
  Clock* clock;
  double* losses;
  std::int32_t* corrects;
  Scalar* gradient;  ///< [image][class]; null for none
  int images, batch, classes;
  Scalar weight = 1;  ///< of the gradient

  Index blocks() const { return 1; }
  std::size_t shared_bytes() const {
    return shared_size<double>(threads) + shared_size<std::int32_t>(threads);
  }

  template <concertina::cuda::ThreadBlock B>
  CONCERTINA_DEVICE void operator()(B& block, Index) const {
    auto sums = block.template shared<double>(threads);
    auto counts = block.template shared<std::int32_t>(threads);
    block.each_thread([&](int thread) {
      const Index first = block.read(clock).step * batch;
      double loss = 0;
      std::int32_t correct = 0;
      for (int image = thread; image < images; image += threads) {
        const int label = block.read(labels + block.read(order + first + image));
        const bool found = add(block, image, label, loss);
        correct += found ? 1 : 0;
      }
      sums.set(thread, loss);
      counts.set(thread, correct);
    });
    detail::add_up<threads>(block, sums, counts);
    block.each_thread([&](int thread) {
      if (thread != 0) return;
      Clock now = block.read(clock);
      block.write(losses + now.step, sums.get(0) / images);
      block.write(corrects + now.step, counts.get(0));
      ++now.step;
      block.write(clock, now);
    });
  }

 private:
  /// Adds an image's loss and says whether its largest logit is the label's.
  template <class B>
  CONCERTINA_DEVICE bool add(B& block, int image, int label, double& loss) const {
    const Scalar* const z = logits + static_cast<Index>(image) * classes;
    Scalar largest = block.read(z);
    int found = 0;
    for (int k = 1; k < classes; ++k) {
      const Scalar logit = block.read(z + k);
      if (logit > largest) largest = logit, found = k;
    }
    Scalar sum(0);
    for (int k = 0; k < classes; ++k) sum += std::exp(block.read(z + k) - largest);
    loss += static_cast<double>(std::log(sum) - (block.read(z + label) - largest));
    if (gradient == nullptr) return found == label;
    const Scalar share = weight / static_cast<Scalar>(images);
    for (int k = 0; k < classes; ++k) {
      const Scalar target = k == label ? Scalar(1) : Scalar(0);
      const Scalar own = std::exp(block.read(z + k) - largest) / sum - target;
      block.write(gradient + static_cast<Index>(image) * classes + k, own * share);
    }
    return found == label;
  }
};

// ---- teachers -----------------------------------------------------------------------------------

/// gradient += share * (softmax(logits / temperature) - softmax(teacher / temperature)), a thread
/// for each image, as distillation().
template <class Scalar>
struct Distill {
  static constexpr int threads = detail::program_threads;

  const Scalar *logits, *teacher;  ///< [image][class]
  Scalar* gradient;
  int images, classes;
  Scalar temperature, share;

  Index blocks() const { return detail::blocks_for(images, threads); }
  std::size_t shared_bytes() const { return 0; }

  template <concertina::cuda::ThreadBlock B>
  CONCERTINA_DEVICE void operator()(B& block, Index index) const {
    block.each_thread([&](int thread) {
      const Index image = index * threads + thread;
      if (image >= images) return;
      const Softmax own = softmax(block, logits + image * classes),
                    wanted = softmax(block, teacher + image * classes);
      for (int k = 0; k < classes; ++k) {
        const Index i = image * classes + k;
        const Scalar more =
            probability(block, own, logits + i) - probability(block, wanted, teacher + i);
        block.write(gradient + i, block.read(gradient + i) + share * more);
      }
    });
  }

 private:
  struct Softmax {
    Scalar largest, sum;
  };
  template <class B>
  CONCERTINA_DEVICE Scalar exponential(B& block, const Scalar* z, Scalar largest) const {
    return std::exp((block.read(z) - largest) / temperature);
  }
  template <class B>
  CONCERTINA_DEVICE Softmax softmax(B& block, const Scalar* z) const {
    Softmax result{block.read(z), Scalar(0)};
    for (int k = 1; k < classes; ++k) {
      const Scalar other = block.read(z + k);
      if (other > result.largest) result.largest = other;
    }
    for (int k = 0; k < classes; ++k) result.sum += exponential(block, z + k, result.largest);
    return result;
  }
  template <class B>
  CONCERTINA_DEVICE Scalar probability(B& block, const Softmax& of, const Scalar* z) const {
    return exponential(block, z, of.largest) / of.sum;
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

  template <concertina::cuda::ThreadBlock B>
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

  template <concertina::cuda::ThreadBlock B>
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
