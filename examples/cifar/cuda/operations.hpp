// The block programs that networks are made of, but for their convolutions: images, batch norm with
// the ReLU and the pool behind it, grids and sums of maps, fully connected layers, the loss, the
// descent.
//
// Maps are [image][channel][y][x]. Sums over a batch are sums of slices of it, in a fixed order:
// results do not depend on which block ran first.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "training/crop.hpp"

#include <concertina/cuda/block.hpp>
#include <concertina/shape.hpp>

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace cifar::cuda {

using namespace training;

using concertina::cuda::shared_size;

/// Where a training stands, in the device's memory: launches are the same in every step, so that a
/// graph of them can be replayed.
struct Clock {
  Index epoch = 0, step = 0;  ///< the step within the epoch; the loss counts it on
  Index steps_before = 0;     ///< of the optimizer, before the epoch
  double learning_rate = 0;
};

namespace detail {

inline constexpr int program_threads = 256;

/// The first of each becomes the sum of all, always in the same order.
template <int count, class B, class... Parts>
CONCERTINA_DEVICE void add_up(B& block, const Parts&... parts) {
  static_assert((count & (count - 1)) == 0, "halves");
  for (int half = count / 2; half > 0; half /= 2) {
    block.each_thread([&](int thread) {
      if (thread >= half) return;
      (parts.set(thread, parts.get(thread) + parts.get(thread + half)), ...);
    });
  }
}

constexpr Index blocks_for(Index count, int each) { return (count + each - 1) / each; }

}  // namespace detail

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

  const std::uint8_t* pixels;  ///< [image][3][32][32]
  const std::uint32_t* order;
  const Clock* clock;
  const Scalar* values;  ///< of normalized_values
  Scalar* to;
  int images, batch;
  bool augmented;
  std::uint64_t seed;

  Index blocks() const { return images; }
  std::size_t shared_bytes() const { return 0; }

  template <concertina::cuda::ThreadBlock B>
  CONCERTINA_DEVICE void operator()(B& block, Index image) const {
    constexpr int width = side, plane = width * width, size = image_size;
    block.each_thread([&](int thread) {
      const Clock now = block.read(clock);
      const std::uint32_t index = block.read(order + now.step * batch + image);
      const Crop crop = augmented ? crop_of({seed, now.epoch}, index) : Crop{};
      const int top = static_cast<int>(crop.top - crop_border),
                left = static_cast<int>(crop.left - crop_border);
      for (int i = thread; i < size; i += threads) {
        const int channel = i / plane, y = i % plane / width, x = i % width;
        const int from_y = y + top, from_x = (crop.flip ? width - 1 - x : x) + left;
        const bool inside = from_y >= 0 && from_y < width && from_x >= 0 && from_x < width;
        const int pixel = inside ? block.read(pixels + static_cast<Index>(index) * size +
                                              channel * plane + from_y * width + from_x)
                                 : 0;
        block.write(to + image * size + i, block.read(values + channel * 256 + pixel));
      }
    });
  }
};

// ---- batch norm, ReLU and max pool --------------------------------------------------------------

/// Maps of a batch. A pool in windows drops the last rows and columns that fill none.
struct MapSize {
  int images = 0, channels = 0, height = 0, width = 0;

  CONCERTINA_HOST_DEVICE constexpr int positions() const { return height * width; }
  CONCERTINA_HOST_DEVICE constexpr MapSize pooled(int window) const {
    return {images, channels, height / window, width / window};
  }
  CONCERTINA_HOST_DEVICE constexpr Index numbers() const {
    return static_cast<Index>(images) * channels * positions();
  }

  friend bool operator==(const MapSize&, const MapSize&) = default;
};

/// A batch cut into parts of whole images; each channel of a slice is a block's work.
struct Slices {
  static constexpr int most = 32;  ///< every block that needs the whole sum adds up so many

  int images = 0, each = 0, count = 0;

  /// Some sixteen numbers for each thread, which is enough to hide what a sum costs at its end.
  CONCERTINA_HOST_DEVICE static constexpr Slices of(const MapSize& size) {
    constexpr int numbers = 16 * detail::program_threads;
    int each = (size.images + most - 1) / most;
    if (each * size.positions() < numbers) each = (numbers - 1) / size.positions() + 1;
    return {size.images, each, (size.images + each - 1) / each};
  }
  CONCERTINA_HOST_DEVICE constexpr int images_of(int slice) const {
    return slice + 1 < count ? each : images - slice * each;
  }
};

/// A batch norm as torch.nn.BatchNorm2d with eps 1e-5 and momentum 0.1, in the device's memory;
/// without a weight there is none, and maps are what they are.
template <class Scalar>
struct Norm {
  const Scalar *weight = nullptr, *bias = nullptr;
  Scalar *running_mean = nullptr, *running_var = nullptr;
  /// Of the slices: [channel][slice][2], at most 2 * Slices::most numbers a channel.
  double* sums = nullptr;
  /// Of the batch, which a pass back needs: [channel][4], mean, 1 / deviation, factor, offset.
  Scalar* batch = nullptr;

  CONCERTINA_HOST_DEVICE constexpr bool exists() const { return weight != nullptr; }
};

namespace detail {

/// What the programs of a norm share: a block for each channel and slice.
template <class Scalar>
struct NormProgram {
  static constexpr int threads = program_threads;

  MapSize size;
  const Scalar* x;
  Norm<Scalar> norm;
  Scalar floor = 0;  ///< 0 for a ReLU, minus infinity for none

  Index blocks() const { return static_cast<Index>(size.channels) * Slices::of(size).count; }

 protected:
  struct Part {
    Slices slices;
    int channel, slice;
  };
  CONCERTINA_HOST_DEVICE Part part(Index index) const {
    const Slices slices = Slices::of(size);
    const int at = static_cast<int>(index);
    return {slices, at / slices.count, at % slices.count};
  }

  /// A position of a slice's maps.
  struct Place {
    int image, row, column;

    CONCERTINA_HOST_DEVICE static Place of(int i, int rows, int columns) {
      const int line = i / columns;
      return {line / rows, line % rows, i % columns};
    }
  };

  /// Calls each(map, row, column) for the thread's positions of the slice's maps, of rows by
  /// columns, `threads` apart. Divisions, some twenty instructions each, are in front of the loop.
  template <class Each>
  CONCERTINA_DEVICE void for_each_position(const Part& at, int rows, int columns, int thread,
                                           Each&& each) const {
    if (rows == 0 || columns == 0) return;
    const int images = at.slices.images_of(at.slice);
    const Index first = static_cast<Index>(at.slice) * at.slices.each;
    const Place step = Place::of(threads, rows, columns);
    for (Place next = Place::of(thread, rows, columns); next.image < images;) {
      each((first + next.image) * size.channels + at.channel, next.row, next.column);
      next.image += step.image;
      next.row += step.row;
      next.column += step.column;
      if (next.column >= columns) next.column -= columns, ++next.row;
      if (next.row >= rows) next.row -= rows, ++next.image;
    }
  }

  /// A channel's pairs of all slices, a thread for each, and zeros beyond them.
  template <class B, class Memory>
  CONCERTINA_DEVICE void load_slices(B& block, const Part& at, const Memory& first,
                                     const Memory& second) const {
    block.each_thread([&](int thread) {
      if (thread >= Slices::most) return;
      const bool there = thread < at.slices.count;
      const double* const from =
          norm.sums + 2 * (static_cast<Index>(at.channel) * at.slices.count + thread);
      first.set(thread, there ? block.read(from) : 0);
      second.set(thread, there ? block.read(from + 1) : 0);
    });
  }
};

/// The programs behind a pool in windows of size x size; a window of 1 is no pool.
template <class Scalar, int Size>
struct PoolProgram : NormProgram<Scalar> {
  using NormProgram<Scalar>::size, NormProgram<Scalar>::floor;

 protected:
  static constexpr int taps = Size * Size;
  static_assert((taps & (taps - 1)) == 0, "halves");

  /// A window of the pool: its values behind the ReLU, the largest, and which it was.
  struct Window {
    Scalar x[taps];
    Scalar largest, winning_x;
    int winner;  ///< -1 where the ReLU lets no gradient through
  };
  CONCERTINA_HOST_DEVICE constexpr int offset_in_window(int i) const {
    return (i / Size) * size.width + i % Size;
  }
  template <class B>
  CONCERTINA_DEVICE Window window(B& block, const Scalar* from, Scalar factor,
                                  Scalar offset) const {
    // Either number is kept where it is NaN, so that a diverged training is noticed.
    const auto larger = [](Scalar p, Scalar q) { return p > q || p != p ? p : q; };
    Window window{};
    Scalar y[taps], best[taps];
    CONCERTINA_UNROLL
    for (int i = 0; i < taps; ++i) {
      window.x[i] = block.read(from + offset_in_window(i));
      y[i] = factor * window.x[i] + offset;
      best[i] = y[i] = y[i] < floor ? floor : y[i];
    }
    CONCERTINA_UNROLL
    for (int half = taps / 2; half > 0; half /= 2) {
      CONCERTINA_UNROLL
      for (int i = 0; i < half; ++i) best[i] = larger(best[i], best[i + half]);
    }
    window.largest = best[0];
    window.winner = -1;
    CONCERTINA_UNROLL
    for (int i = taps - 1; i >= 0; --i) {
      if (!(y[i] > floor && y[i] == window.largest)) continue;
      window.winner = i;
      window.winning_x = window.x[i];
    }
    return window;
  }
};

}  // namespace detail

/// Each slice's mean and squared deviations from it, for each channel.
/// Source  Chan, Golub, LeVeque, The American Statistician 1983
template <class Scalar>
struct NormMoments : detail::NormProgram<Scalar> {
  using Base = detail::NormProgram<Scalar>;
  using Base::threads, Base::size, Base::x, Base::norm;

  std::size_t shared_bytes() const { return 2 * shared_size<double>(threads); }

  template <concertina::cuda::ThreadBlock B>
  CONCERTINA_DEVICE void operator()(B& block, Index index) const {
    const auto at = this->part(index);
    const double count = at.slices.images_of(at.slice) * size.positions();
    auto sums = block.template shared<double>(threads),
         squares = block.template shared<double>(threads);
    block.each_thread([&](int thread) {
      Scalar sum(0);
      this->for_each_position(at, 1, size.positions(), thread, [&](Index map, int, int i) {
        sum += block.read(x + map * size.positions() + i);
      });
      sums.set(thread, static_cast<double>(sum));
    });
    detail::add_up<threads>(block, sums);
    block.each_thread([&](int thread) {
      const auto shift = static_cast<Scalar>(sums.get(0) / count);
      Scalar sum(0);
      this->for_each_position(at, 1, size.positions(), thread, [&](Index map, int, int i) {
        const Scalar deviation = block.read(x + map * size.positions() + i) - shift;
        sum += deviation * deviation;
      });
      squares.set(thread, static_cast<double>(sum));
    });
    detail::add_up<threads>(block, squares);
    block.each_thread([&](int thread) {
      if (thread != 0) return;
      block.write(norm.sums + 2 * index, sums.get(0) / count);
      block.write(norm.sums + 2 * index + 1, squares.get(0));
    });
  }
};

/// y = pool(relu(norm(x))), [image][channel][height / Size][width / Size]. In training by the
/// statistics of the batch, from its moments, which move the running ones; in inference by the
/// running ones.
template <class Scalar, int Size>
struct NormReluPool : detail::PoolProgram<Scalar, Size> {
  using Base = detail::PoolProgram<Scalar, Size>;
  using Base::threads, Base::size, Base::x, Base::norm;

  Scalar* y;
  bool training;

  std::size_t shared_bytes() const {
    return shared_size<Scalar>(2) + 3 * shared_size<double>(Slices::most);
  }

  template <concertina::cuda::ThreadBlock B>
  CONCERTINA_DEVICE void operator()(B& block, Index index) const {
    const auto at = this->part(index);
    auto affine = block.template shared<Scalar>(2);
    auto means = block.template shared<double>(Slices::most),
         sums = block.template shared<double>(Slices::most),
         squares = block.template shared<double>(Slices::most);
    if (norm.exists() && training) {
      this->load_slices(block, at, means, squares);
      block.each_thread([&](int thread) {
        if (thread >= Slices::most) return;
        sums.set(thread, at.slices.images_of(thread) * means.get(thread));
      });
      detail::add_up<Slices::most>(block, sums);
      block.each_thread([&](int thread) {
        if (thread >= at.slices.count) return;
        const double distance = means.get(thread) - sums.get(0) / size.images;
        const int numbers = at.slices.images_of(thread) * size.positions();
        squares.set(thread, squares.get(thread) + distance * distance * numbers);
      });
      detail::add_up<Slices::most>(block, squares);
    }
    block.each_thread([&](int thread) {
      if (thread == 0) set_affine(block, at.channel, at.slice == 0, sums, squares, affine);
    });
    block.each_thread([&](int thread) {
      const Scalar factor = affine.get(0), offset = affine.get(1);
      const int rows = size.height / Size, columns = size.width / Size, positions = rows * columns;
      this->for_each_position(at, rows, columns, thread, [&](Index map, int row, int column) {
        const Scalar* const from =
            x + map * size.positions() + Size * row * size.width + Size * column;
        block.write(y + map * positions + row * columns + column,
                    this->window(block, from, factor, offset).largest);
      });
    });
  }

 private:
  template <class B, class Moments, class Affine>
  CONCERTINA_DEVICE void set_affine(B& block, int channel, bool keep, const Moments& sums,
                                    const Moments& squares, const Affine& affine) const {
    if (!norm.exists()) {
      affine.set(0, Scalar(1));
      affine.set(1, Scalar(0));
      return;
    }
    constexpr double eps = 1e-5, momentum = 0.1;
    double mean = 0, variance = 0;
    if (training) {
      const double all = static_cast<double>(size.images) * size.positions();
      mean = sums.get(0) / size.images;
      variance = squares.get(0) / all;
      if (keep) {
        Scalar* const running_mean = norm.running_mean + channel;
        Scalar* const running_var = norm.running_var + channel;
        const auto moved = [&](const Scalar* from, double to) {
          return static_cast<Scalar>((1 - momentum) * static_cast<double>(block.read(from)) +
                                     momentum * to);
        };
        block.write(running_mean, moved(running_mean, mean));
        block.write(running_var, moved(running_var, squares.get(0) / (all > 1 ? all - 1 : 1)));
      }
    } else {
      mean = static_cast<double>(block.read(norm.running_mean + channel));
      variance = static_cast<double>(block.read(norm.running_var + channel));
    }
    const double inverse = 1 / std::sqrt(variance + eps),
                 factor = inverse * static_cast<double>(block.read(norm.weight + channel)),
                 offset = static_cast<double>(block.read(norm.bias + channel)) - mean * factor;
    affine.set(0, static_cast<Scalar>(factor));
    affine.set(1, static_cast<Scalar>(offset));
    if (!training || !keep) return;
    const double batch[4] = {mean, inverse, factor, offset};
    for (int i = 0; i < 4; ++i) {
      block.write(norm.batch + 4 * channel + i, static_cast<Scalar>(batch[i]));
    }
  }
};

/// For each channel and slice the sum of dL/dnorm(x), and of that with x - mean; from dL/dy.
template <class Scalar, int Size>
struct NormReluPoolSums : detail::PoolProgram<Scalar, Size> {
  using Base = detail::PoolProgram<Scalar, Size>;
  using Base::threads, Base::size, Base::x, Base::norm;

  const Scalar* gradient;  ///< of y

  std::size_t shared_bytes() const { return 2 * shared_size<double>(threads); }

  template <concertina::cuda::ThreadBlock B>
  CONCERTINA_DEVICE void operator()(B& block, Index index) const {
    const auto at = this->part(index);
    auto sums = block.template shared<double>(threads),
         products = block.template shared<double>(threads);
    block.each_thread([&](int thread) {
      const Scalar* const batch = norm.batch + 4 * at.channel;
      const Scalar mean = block.read(batch), factor = block.read(batch + 2),
                   offset = block.read(batch + 3);
      const int rows = size.height / Size, columns = size.width / Size, positions = rows * columns;
      Scalar sum(0), product(0);
      this->for_each_position(at, rows, columns, thread, [&](Index map, int row, int column) {
        const Scalar* const from =
            x + map * size.positions() + Size * row * size.width + Size * column;
        const auto window = this->window(block, from, factor, offset);
        if (window.winner < 0) return;
        const Scalar own = block.read(gradient + map * positions + row * columns + column);
        sum += own;
        product += own * (window.winning_x - mean);
      });
      sums.set(thread, static_cast<double>(sum));
      products.set(thread, static_cast<double>(product));
    });
    detail::add_up<threads>(block, sums, products);
    block.each_thread([&](int thread) {
      if (thread != 0) return;
      block.write(norm.sums + 2 * index, sums.get(0));
      block.write(norm.sums + 2 * index + 1, products.get(0));
    });
  }
};

/// dL/dx from dL/dy and, where there is a norm, its sums; and the norm's own gradients.
template <class Scalar, int Size>
struct NormReluPoolGradient : detail::PoolProgram<Scalar, Size> {
  using Base = detail::PoolProgram<Scalar, Size>;
  using Base::threads, Base::size, Base::x, Base::norm;

  const Scalar* gradient;  ///< of y
  Scalar* x_gradient;
  Scalar *weight_gradient = nullptr, *bias_gradient = nullptr;

  std::size_t shared_bytes() const {
    return shared_size<Scalar>(2) + 2 * shared_size<double>(Slices::most);
  }

  template <concertina::cuda::ThreadBlock B>
  CONCERTINA_DEVICE void operator()(B& block, Index index) const {
    const auto at = this->part(index);
    auto line = block.template shared<Scalar>(2);
    auto sums = block.template shared<double>(Slices::most),
         products = block.template shared<double>(Slices::most);
    if (norm.exists()) {
      this->load_slices(block, at, sums, products);
      detail::add_up<Slices::most>(block, sums, products);
    }
    block.each_thread([&](int thread) {
      if (thread == 0) set_line(block, at.channel, at.slice == 0, sums, products, line);
    });
    block.each_thread([&](int thread) {
      const bool exists = norm.exists();
      const auto of_batch = [&](int i, Scalar otherwise) {
        return exists ? block.read(norm.batch + 4 * at.channel + i) : otherwise;
      };
      const Scalar mean = of_batch(0, Scalar(0)), factor = of_batch(2, Scalar(1)),
                   offset = of_batch(3, Scalar(0));
      const Scalar level = line.get(0), slope = line.get(1);
      // Windows, and what is left of them at the last rows and columns.
      const int rows = size.height / Size, columns = size.width / Size,
                all_rows = (size.height + Size - 1) / Size,
                all_columns = (size.width + Size - 1) / Size;
      const auto set = [&](Index map, int row, int column) {
        const Index first = map * size.positions() + Size * row * size.width + Size * column;
        const auto own = [&](Scalar dy, Scalar value) {
          return exists ? factor * (dy - level - slope * (value - mean)) : dy;
        };
        if (row < rows && column < columns) {
          const auto window = this->window(block, x + first, factor, offset);
          const Scalar given =
              block.read(gradient + map * (rows * columns) + row * columns + column);
          CONCERTINA_UNROLL
          for (int k = 0; k < Base::taps; ++k) {
            block.write(x_gradient + first + this->offset_in_window(k),
                        own(k == window.winner ? given : Scalar(0), window.x[k]));
          }
          return;
        }
        CONCERTINA_UNROLL
        for (int k = 0; k < Base::taps; ++k) {
          if (Size * row + k / Size >= size.height || Size * column + k % Size >= size.width) {
            continue;
          }
          const Index place = first + this->offset_in_window(k);
          block.write(x_gradient + place, own(Scalar(0), block.read(x + place)));
        }
      };
      this->for_each_position(at, all_rows, all_columns, thread, set);
    });
  }

 private:
  /// factor * (dy - mean(dy) - xhat * mean(dy * xhat)), with xhat = (x - mean) * inverse: the means
  /// over the batch are a level and a slope.
  template <class B, class Sums, class Line>
  CONCERTINA_DEVICE void set_line(B& block, int channel, bool keep, const Sums& sums,
                                  const Sums& products, const Line& line) const {
    if (!norm.exists()) {
      line.set(0, Scalar(0));
      line.set(1, Scalar(0));
      return;
    }
    const auto inverse = static_cast<double>(block.read(norm.batch + 4 * channel + 1));
    const double all = static_cast<double>(size.images) * size.positions(), sum = sums.get(0),
                 product = products.get(0) * inverse;
    line.set(0, static_cast<Scalar>(sum / all));
    line.set(1, static_cast<Scalar>(inverse * (product / all)));
    if (!keep) return;
    block.write(weight_gradient + channel, static_cast<Scalar>(product));
    block.write(bias_gradient + channel, static_cast<Scalar>(sum));
  }
};

// ---- grids and sums of maps ---------------------------------------------------------------------

/// The positions (row, column) + step * (i, j) of planes, as smaller planes; or if `spread` the
/// other way round, with zeros between. It is a stride, what is around a smaller kernel, and the
/// gradient of either.
template <class Scalar>
struct Grid {
  static constexpr int threads = detail::program_threads;

  const Scalar* from;
  Scalar* to;
  Index planes;
  int small_height, small_width, height, width, row, column, step;
  bool spread;

  Index count() const { return planes * (spread ? height * width : small_height * small_width); }
  Index blocks() const { return detail::blocks_for(count(), threads); }
  std::size_t shared_bytes() const { return 0; }

  template <concertina::cuda::ThreadBlock B>
  CONCERTINA_DEVICE void operator()(B& block, Index index) const {
    block.each_thread([&](int thread) {
      const int columns = spread ? width : small_width,
                each = columns * (spread ? height : small_height);
      const Index at = index * threads + thread, plane = at / each;
      if (plane >= planes) return;
      const int i = static_cast<int>(at % each), y = i / columns, x = i % columns;
      if (!spread) {
        const int place = (row + step * y) * width + column + step * x;
        return block.write(to + at, block.read(from + plane * height * width + place));
      }
      const int down = y - row, right = x - column;
      const bool there = down >= 0 && right >= 0 && down % step == 0 && right % step == 0 &&
                         down / step < small_height && right / step < small_width;
      const Scalar* const source = from + plane * small_height * small_width;
      block.write(to + at, there ? block.read(source + down / step * small_width + right / step)
                                 : Scalar(0));
    });
  }
};

/// y = scale * (a + factor * b), without b scale * a; y may be either.
template <class Scalar>
struct Sum {
  static constexpr int threads = detail::program_threads;

  const Scalar *a, *b;
  Scalar* y;
  Index count;
  Scalar factor = 1, scale = 1;

  Index blocks() const { return detail::blocks_for(count, threads); }
  std::size_t shared_bytes() const { return 0; }

  template <concertina::cuda::ThreadBlock B>
  CONCERTINA_DEVICE void operator()(B& block, Index index) const {
    block.each_thread([&](int thread) {
      const Index i = index * threads + thread;
      if (i >= count) return;
      const Scalar more = b ? factor * block.read(b + i) : Scalar(0);
      block.write(y + i, scale * (block.read(a + i) + more));
    });
  }
};

// ---- fully connected layers ---------------------------------------------------------------------

/// Numbers with a row and a place in the sum of a product: row i's k-th at i * row + k * inner.
template <class Scalar>
struct Factor {
  const Scalar* numbers;
  int row, inner;
};

/// result[i][j] = the sum over k of left(i, k) * right(j, k): the forward pass of a fully connected
/// layer and both of its gradients, by their strides.
///
/// The products are small and many blocks hide what waits: tiles of 8 x 8 numbers, four threads for
/// each of a tile's, and an inner length of 128 at a time, so that fc1's 512 are four rounds.
template <class Scalar>
struct Product {
  static constexpr int threads = detail::program_threads;

  Factor<Scalar> left, right;
  Scalar* result;
  int rows, columns, inner;
  const Scalar* bias = nullptr;  ///< added, [column]
  bool relu = false;             ///< and then what is negative becomes 0; NaN stays
  const Scalar* mask = nullptr;  ///< [row][column]: the result is 0 but where this is positive
  Scalar* row_sums = nullptr;    ///< of left: a bias's gradient

  Index blocks() const {
    return detail::blocks_for(rows, tile) * detail::blocks_for(columns, tile);
  }
  std::size_t shared_bytes() const {
    return 2 * shared_size<Scalar>(tile * step) + 2 * shared_size<Scalar>(threads);
  }

  template <concertina::cuda::ThreadBlock B>
  CONCERTINA_DEVICE void operator()(B& block, Index index) const {
    const int column_tiles = (columns + tile - 1) / tile, at = static_cast<int>(index);
    const int first_row = at / column_tiles * tile, first_column = at % column_tiles * tile;
    auto left_tile = block.template shared<Scalar>(tile * step),
         right_tile = block.template shared<Scalar>(tile * step);
    auto sums = block.template shared<Scalar>(threads),
         side_sums = block.template shared<Scalar>(threads);
    typename B::template PerThread<Scalar> sum(block), side_sum(block);
    block.each_thread([&](int thread) { sum[thread] = side_sum[thread] = Scalar(0); });
    for (int first = 0; first < inner; first += depth) {
      block.each_thread([&](int thread) {
        load(block, left, first_row, rows, first, thread, left_tile);
        load(block, right, first_column, columns, first, thread, right_tile);
      });
      block.each_thread([&](int thread) {
        const int row = thread / tile % tile, column = thread % tile, part = thread / (tile * tile);
        CONCERTINA_UNROLL
        for (int i = 0; i < depth / parts; ++i) {
          const int k = i * parts + part;
          const Scalar number_left = left_tile.get(row * step + k);
          sum[thread] += number_left * right_tile.get(column * step + k);
          side_sum[thread] += number_left;
        }
      });
    }
    block.each_thread([&](int thread) {
      sums.set(thread, sum[thread]);
      side_sums.set(thread, side_sum[thread]);
    });
    block.each_thread([&](int thread) {
      const int row = first_row + thread / tile, column = first_column + thread % tile;
      if (thread >= tile * tile || row >= rows || column >= columns) return;
      Scalar value(0), side_value(0);
      for (int part = 0; part < parts; ++part) {
        value += sums.get(part * tile * tile + thread);
        side_value += side_sums.get(part * tile * tile + thread);
      }
      const Index place = static_cast<Index>(row) * columns + column;
      if (bias != nullptr) value += block.read(bias + column);
      if (relu && value < Scalar(0)) value = Scalar(0);
      if (mask != nullptr && !(block.read(mask + place) > Scalar(0))) value = Scalar(0);
      block.write(result + place, value);
      if (row_sums != nullptr && column == 0) block.write(row_sums + row, side_value);
    });
  }

 private:
  static constexpr int tile = 8, parts = threads / (tile * tile), depth = 128;
  static constexpr int step = depth + 1;  // so that rows of a tile start on different banks

  /// Neighbours in memory by neighbouring threads; zeros beyond the matrix.
  template <class B, class Tile>
  CONCERTINA_DEVICE void load(B& block, const Factor<Scalar>& from, int first_row, int count,
                              int first, int thread, const Tile& to) const {
    CONCERTINA_UNROLL
    for (int i = 0; i < tile * depth / threads; ++i) {
      const int number = i * threads + thread;
      const int row = from.inner == 1 ? number / depth : number % tile,
                k = from.inner == 1 ? number % depth : number / tile;
      const bool inside = first_row + row < count && first + k < inner;
      to.set(row * step + k,
             inside ? block.read(from.numbers + static_cast<Index>(first_row + row) * from.row +
                                 static_cast<Index>(first + k) * from.inner)
                    : Scalar(0));
    }
  }
};

/// y = x W^T + b, with x[images][in] and W[out][in].
template <class Scalar>
Product<Scalar> linear(int images, int in, int out, const Scalar* x, const Scalar* weight,
                       const Scalar* bias, Scalar* y, bool relu = false) {
  return {.left = {x, in, 1},
          .right = {weight, in, 1},
          .result = y,
          .rows = images,
          .columns = out,
          .inner = in,
          .bias = bias,
          .relu = relu};
}

/// dL/dx from dL/dy; where x came from a ReLU, `mask` is x.
template <class Scalar>
Product<Scalar> linear_input_gradient(int images, int in, int out, const Scalar* y_gradient,
                                      const Scalar* weight, Scalar* x_gradient,
                                      const Scalar* mask = nullptr) {
  return {.left = {y_gradient, out, 1},
          .right = {weight, 1, in},
          .result = x_gradient,
          .rows = images,
          .columns = in,
          .inner = out,
          .mask = mask};
}

/// dL/dW and dL/db from dL/dy.
template <class Scalar>
Product<Scalar> linear_weight_gradient(int images, int in, int out, const Scalar* x,
                                       const Scalar* y_gradient, Scalar* weight_gradient,
                                       Scalar* bias_gradient) {
  return {.left = {y_gradient, 1, out},
          .right = {x, 1, in},
          .result = weight_gradient,
          .rows = out,
          .columns = in,
          .inner = images,
          .row_sums = bias_gradient};
}

// ---- the loss -----------------------------------------------------------------------------------

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

// ---- the descent --------------------------------------------------------------------------------

/// v = momentum * v + gradient + decay * w; w -= learning_rate * v, as Sgd; for tensors that lie
/// one behind the other.
template <class Scalar>
struct Descend {
  static constexpr int threads = detail::program_threads;

  Scalar* weights;
  const Scalar* gradients;
  Scalar* velocities;
  const Clock* clock;
  Index count;
  Scalar momentum, decay;

  Index blocks() const { return detail::blocks_for(count, threads); }
  std::size_t shared_bytes() const { return 0; }

  template <concertina::cuda::ThreadBlock B>
  CONCERTINA_DEVICE void operator()(B& block, Index index) const {
    block.each_thread([&](int thread) {
      const Index i = index * threads + thread;
      if (i >= count) return;
      const auto rate = static_cast<Scalar>(block.read(clock).learning_rate);
      const Scalar weight = block.read(weights + i);
      const Scalar gradient = block.read(gradients + i) + decay * weight;
      const Scalar velocity = momentum * block.read(velocities + i) + gradient;
      block.write(velocities + i, velocity);
      block.write(weights + i, weight - rate * velocity);
    });
  }
};

/// The same as Adam: its mean and square of each gradient, and the step that they make.
template <class Scalar>
struct DescendByAdam {
  static constexpr int threads = detail::program_threads;

  Scalar* weights;
  const Scalar* gradients;
  Scalar *means, *squares;
  const Clock* clock;
  Index count;
  Scalar decay;

  Index blocks() const { return detail::blocks_for(count, threads); }
  std::size_t shared_bytes() const { return shared_size<Scalar>(2); }

  template <concertina::cuda::ThreadBlock B>
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

template <class T>
struct Fill {
  static constexpr int threads = detail::program_threads;

  T* to;
  Index count;
  T value;

  Index blocks() const { return detail::blocks_for(count, threads); }
  std::size_t shared_bytes() const { return 0; }

  template <concertina::cuda::ThreadBlock B>
  CONCERTINA_DEVICE void operator()(B& block, Index index) const {
    block.each_thread([&](int thread) {
      const Index i = index * threads + thread;
      if (i < count) block.write(to + i, value);
    });
  }
};

}  // namespace cifar::cuda
