// The block programs of images, of grids and sums of maps, of the loss and of the optimizers.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "program.hpp"
#include "training/crop.hpp"

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace cifar::cuda {

// ---- images -------------------------------------------------------------------------------------

/// What a pixel's value becomes, [channel][value], as load_images computes it.
template <class Scalar>
std::vector<Scalar> normalized_values(const std::array<double, 3>& mean,
                                      const std::array<double, 3>& deviation) {
  std::vector<Scalar> values;
  for (std::size_t channel = 0; channel < 3; ++channel) {
    for (int value = 0; value < 256; ++value) {
      values.push_back(static_cast<Scalar>((value / 255.0 - mean[channel]) / deviation[channel]));
    }
  }
  return values;
}

/// The images of a step, to[image][3][32][32]: those of order[step * batch + image], cropped and
/// mirrored if augmented, and normalised.
template <class Scalar>
struct LoadImages {
  static constexpr int threads = detail::program_threads;

  Pass<Scalar> pass;
  Scalar* to;
  int images;

  Index blocks() const { return images; }
  std::size_t shared_bytes() const { return 0; }

  template <ThreadBlock B>
  CONCERTINA_DEVICE void operator()(B& block, Index image) const {
    constexpr int width = side, plane = width * width, size = image_size;
    block.each_thread([&](int thread) {
      const Clock now = block.read(pass.clock);
      const std::uint32_t index = block.read(pass.order + now.step * pass.batch + image);
      const Crop crop = pass.augmented ? crop_of({pass.seed, now.epoch}, index) : Crop{};
      const int top = static_cast<int>(crop.top - crop_border),
                left = static_cast<int>(crop.left - crop_border);
      for (int i = thread; i < size; i += threads) {
        const int channel = i / plane, y = i % plane / width, x = i % width;
        const int from_y = y + top, from_x = (crop.flip ? width - 1 - x : x) + left;
        const bool inside = from_y >= 0 && from_y < width && from_x >= 0 && from_x < width;
        const int pixel = inside ? block.read(pass.pixels + static_cast<Index>(index) * size +
                                              channel * plane + from_y * width + from_x)
                                 : 0;
        block.write(to + image * size + i, block.read(pass.values + channel * 256 + pixel));
      }
    });
  }
};

// ---- maps ---------------------------------------------------------------------------------------

template <class Scalar>
struct Fill : detail::Elementwise<Fill<Scalar>> {
  Scalar* to;
  Scalar value;

  template <class B>
  CONCERTINA_DEVICE void at(B& block, Index i) const {
    block.write(to + i, value);
  }
};

/// y = scale * (a + factor * b), without b scale * a; y may be either.
template <class Scalar>
struct Sum : detail::Elementwise<Sum<Scalar>> {
  const Scalar *a, *b;
  Scalar* y;
  Scalar factor = 1, scale = 1;

  template <class B>
  CONCERTINA_DEVICE void at(B& block, Index i) const {
    const Scalar more = b ? factor * block.read(b + i) : Scalar(0);
    block.write(y + i, scale * (block.read(a + i) + more));
  }
};

/// The positions (row, column) + step * (i, j) of planes.
struct GridShape {
  Index planes;
  int small_height, small_width, height, width, step = 1, row = 0, column = 0;

  Index count(bool spread) const {
    return planes * (spread ? height * width : small_height * small_width);
  }
};

/// Those positions, as smaller planes; or if `spread` the other way round, with zeros between. It
/// is a stride, what is around a smaller kernel, and the gradient of either.
template <class Scalar>
struct Grid : detail::Elementwise<Grid<Scalar>> {
  GridShape shape;
  const Scalar* from;
  Scalar* to;
  bool spread;

  Grid(const GridShape& shape_, const Scalar* from_, Scalar* to_, bool spread_)
      : detail::Elementwise<Grid>{shape_.count(spread_)},
        shape(shape_),
        from(from_),
        to(to_),
        spread(spread_) {}

  template <class B>
  CONCERTINA_DEVICE void at(B& block, Index index) const {
    const auto& [planes, small_height, small_width, height, width, step, row, column] = shape;
    const int columns = spread ? width : small_width,
              each = columns * (spread ? height : small_height);
    const Index plane = index / each;
    const int i = static_cast<int>(index % each), y = i / columns, x = i % columns;
    if (!spread) {
      const int place = (row + step * y) * width + column + step * x;
      return block.write(to + index, block.read(from + plane * height * width + place));
    }
    const int down = y - row, right = x - column;
    const bool there = down >= 0 && right >= 0 && down % step == 0 && right % step == 0 &&
                       down / step < small_height && right / step < small_width;
    const Scalar* const source = from + plane * small_height * small_width;
    block.write(to + index,
                there ? block.read(source + down / step * small_width + right / step) : Scalar(0));
  }
};

// ---- the loss -----------------------------------------------------------------------------------

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

// ---- optimizers ---------------------------------------------------------------------------------

/// v = momentum * v + gradient + decay * w; w -= learning_rate * v, as Sgd; for tensors that lie
/// one behind the other.
template <class Scalar>
struct Descend : detail::Elementwise<Descend<Scalar>> {
  Scalar* weights;
  const Scalar* gradients;
  Scalar* velocities;
  const Clock* clock;
  Scalar momentum, decay;

  template <class B>
  CONCERTINA_DEVICE void at(B& block, Index i) const {
    const auto rate = static_cast<Scalar>(block.read(clock).learning_rate);
    const Scalar weight = block.read(weights + i);
    const Scalar gradient = block.read(gradients + i) + decay * weight;
    const Scalar velocity = momentum * block.read(velocities + i) + gradient;
    block.write(velocities + i, velocity);
    block.write(weights + i, weight - rate * velocity);
  }
};

/// The same as Adam: its mean and square of each gradient, and the step that they make.
template <class Scalar>
struct DescendByAdam {
  static constexpr int threads = detail::program_threads;

  Index count;
  Scalar* weights;
  const Scalar* gradients;
  Scalar *means, *squares;
  const Clock* clock;
  Scalar decay;

  Index blocks() const { return detail::blocks_for(count, threads); }
  std::size_t shared_bytes() const { return shared_size<Scalar>(2); }

  template <ThreadBlock B>
  CONCERTINA_DEVICE void operator()(B& block, Index index) const {
    constexpr double beta1 = 0.9, beta2 = 0.999;
    constexpr auto b1 = static_cast<Scalar>(beta1), b2 = static_cast<Scalar>(beta2),
                   eps = static_cast<Scalar>(1e-8);
    auto factors = block.template shared<Scalar>(2);
    block.each_thread([&](int thread) {
      if (thread != 0) return;
      const Clock now = block.read(clock);
      const auto steps = static_cast<double>(now.steps_before + now.step);  // this one included
      factors.set(0, static_cast<Scalar>(now.learning_rate / (1 - std::pow(beta1, steps))));
      factors.set(1, static_cast<Scalar>(1 / std::sqrt(1 - std::pow(beta2, steps))));
    });
    block.each_thread([&](int thread) {
      const Index i = index * threads + thread;
      if (i >= count) return;
      const Scalar weight = block.read(weights + i);
      const Scalar gradient = block.read(gradients + i) + decay * weight;
      Scalar mean = block.read(means + i), square = block.read(squares + i);
      mean += (1 - b1) * (gradient - mean);
      square = b2 * square + (1 - b2) * gradient * gradient;
      block.write(means + i, mean);
      block.write(squares + i, square);
      block.write(weights + i,
                  weight - factors.get(0) * mean / (factors.get(1) * std::sqrt(square) + eps));
    });
  }
};

}  // namespace cifar::cuda
