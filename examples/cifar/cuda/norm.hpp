// The block programs of a batch norm with the ReLU and the pool behind it. Sums over a batch are
// sums of slices of it, in a fixed order: results do not depend on which block ran first.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "program.hpp"

#include <cmath>
#include <cstddef>

namespace cifar::cuda {

/// Maps of a batch. A pool in windows drops the last rows and columns that fill none.
struct MapSize {
  int images = 0, channels = 0, height = 0, width = 0;

  CONCERTINA_HOST_DEVICE constexpr int positions() const { return height * width; }
  CONCERTINA_HOST_DEVICE constexpr MapSize pooled(int window) const {
    return {images, channels, height / window, width / window};
  }
  constexpr int of_image() const { return channels * positions(); }
  constexpr Index numbers() const { return Index{images} * of_image(); }

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
  Scalar *weight_gradient = nullptr, *bias_gradient = nullptr;

  CONCERTINA_HOST_DEVICE constexpr bool exists() const { return weight != nullptr; }
};

namespace detail {

/// What the programs of a norm and a pool in windows of Size x Size share: a block for each channel
/// and slice. A window of 1 is no pool.
template <class Scalar, int Size>
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

  /// The first / count and the second, which thread 0 has.
  template <class B, class Memory>
  CONCERTINA_DEVICE void store_slice(B& block, Index index, const Memory& first,
                                     const Memory& second, double count = 1) const {
    block.each_thread([&](int thread) {
      if (thread != 0) return;
      block.write(norm.sums + 2 * index, first.get(0) / count);
      block.write(norm.sums + 2 * index + 1, second.get(0));
    });
  }

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

  /// Calls each(window, number of y) for the thread's windows of the slice.
  template <class B, class Each>
  CONCERTINA_DEVICE void for_each_window(B& block, const Part& at, int thread, Scalar factor,
                                         Scalar offset, Each&& each) const {
    const int rows = size.height / Size, columns = size.width / Size, positions = rows * columns;
    for_each_position(at, rows, columns, thread, [&](Index map, int row, int column) {
      const Scalar* const from =
          x + map * size.positions() + Size * row * size.width + Size * column;
      each(window(block, from, factor, offset), map * positions + row * columns + column);
    });
  }
};

}  // namespace detail

/// Each slice's mean and squared deviations from it, for each channel.
/// Source  Chan, Golub, LeVeque, The American Statistician 1983
template <class Scalar, int Size>
struct NormMoments : detail::NormProgram<Scalar, Size> {
  using Base = detail::NormProgram<Scalar, Size>;
  using Base::threads, Base::size, Base::x, Base::norm;

  std::size_t shared_bytes() const { return 2 * shared_size<double>(threads); }

  template <ThreadBlock B>
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
    this->store_slice(block, index, sums, squares, count);
  }
};

/// y = pool(relu(norm(x))), [image][channel][height / Size][width / Size]. In training by the
/// statistics of the batch, from its moments, which move the running ones; in inference by the
/// running ones.
template <class Scalar, int Size>
struct NormReluPool : detail::NormProgram<Scalar, Size> {
  using Base = detail::NormProgram<Scalar, Size>;
  using Base::threads, Base::size, Base::x, Base::norm;

  Scalar* y;
  bool training;

  std::size_t shared_bytes() const {
    return shared_size<Scalar>(2) + 3 * shared_size<double>(Slices::most);
  }

  template <ThreadBlock B>
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
      if (thread != 0) return;
      affine.set(0, Scalar(1));
      affine.set(1, Scalar(0));
      if (!norm.exists()) return;
      constexpr double eps = 1e-5, momentum = 0.1;
      double mean = 0, variance = 0;
      if (training) {
        const double all = static_cast<double>(size.images) * size.positions();
        mean = sums.get(0) / size.images;
        variance = squares.get(0) / all;
        if (at.slice == 0) {
          Scalar* const running_mean = norm.running_mean + at.channel;
          Scalar* const running_var = norm.running_var + at.channel;
          const auto moved = [&](const Scalar* from, double to) {
            return static_cast<Scalar>((1 - momentum) * static_cast<double>(block.read(from)) +
                                       momentum * to);
          };
          block.write(running_mean, moved(running_mean, mean));
          block.write(running_var, moved(running_var, squares.get(0) / (all > 1 ? all - 1 : 1)));
        }
      } else {
        mean = static_cast<double>(block.read(norm.running_mean + at.channel));
        variance = static_cast<double>(block.read(norm.running_var + at.channel));
      }
      const double inverse = 1 / std::sqrt(variance + eps),
                   factor = inverse * static_cast<double>(block.read(norm.weight + at.channel)),
                   offset = static_cast<double>(block.read(norm.bias + at.channel)) - mean * factor;
      affine.set(0, static_cast<Scalar>(factor));
      affine.set(1, static_cast<Scalar>(offset));
      if (!training || at.slice != 0) return;
      const double batch[4] = {mean, inverse, factor, offset};
      for (int i = 0; i < 4; ++i) {
        block.write(norm.batch + 4 * at.channel + i, static_cast<Scalar>(batch[i]));
      }
    });
    block.each_thread([&](int thread) {
      this->for_each_window(
          block, at, thread, affine.get(0), affine.get(1),
          [&](const auto& window, Index i) { block.write(y + i, window.largest); });
    });
  }
};

/// For each channel and slice the sum of dL/dnorm(x), and of that with x - mean; from dL/dy.
template <class Scalar, int Size>
struct NormReluPoolSums : detail::NormProgram<Scalar, Size> {
  using Base = detail::NormProgram<Scalar, Size>;
  using Base::threads, Base::size, Base::x, Base::norm;

  const Scalar* gradient;  ///< of y

  std::size_t shared_bytes() const { return 2 * shared_size<double>(threads); }

  template <ThreadBlock B>
  CONCERTINA_DEVICE void operator()(B& block, Index index) const {
    const auto at = this->part(index);
    auto sums = block.template shared<double>(threads),
         products = block.template shared<double>(threads);
    block.each_thread([&](int thread) {
      const Scalar* const batch = norm.batch + 4 * at.channel;
      const Scalar mean = block.read(batch), factor = block.read(batch + 2),
                   offset = block.read(batch + 3);
      Scalar sum(0), product(0);
      this->for_each_window(block, at, thread, factor, offset, [&](const auto& window, Index i) {
        if (window.winner < 0) return;
        const Scalar own = block.read(gradient + i);
        sum += own;
        product += own * (window.winning_x - mean);
      });
      sums.set(thread, static_cast<double>(sum));
      products.set(thread, static_cast<double>(product));
    });
    detail::add_up<threads>(block, sums, products);
    this->store_slice(block, index, sums, products);
  }
};

/// dL/dx from dL/dy and, where there is a norm, its sums; and the norm's own gradients. Of a norm
/// it is factor * (dy - mean(dy) - xhat * mean(dy * xhat)), with xhat = (x - mean) * inverse: the
/// means over the batch are a level and a slope.
template <class Scalar, int Size>
struct NormReluPoolGradient : detail::NormProgram<Scalar, Size> {
  using Base = detail::NormProgram<Scalar, Size>;
  using Base::threads, Base::size, Base::x, Base::norm;

  const Scalar* gradient;  ///< of y
  Scalar* x_gradient;

  std::size_t shared_bytes() const {
    return shared_size<Scalar>(2) + 2 * shared_size<double>(Slices::most);
  }

  template <ThreadBlock B>
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
      if (thread != 0) return;
      line.set(0, Scalar(0));
      line.set(1, Scalar(0));
      if (!norm.exists()) return;
      const auto inverse = static_cast<double>(block.read(norm.batch + 4 * at.channel + 1));
      const double all = static_cast<double>(size.images) * size.positions(), sum = sums.get(0),
                   product = products.get(0) * inverse;
      line.set(0, static_cast<Scalar>(sum / all));
      line.set(1, static_cast<Scalar>(inverse * (product / all)));
      if (at.slice != 0) return;
      block.write(norm.weight_gradient + at.channel, static_cast<Scalar>(product));
      block.write(norm.bias_gradient + at.channel, static_cast<Scalar>(sum));
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
};

}  // namespace cifar::cuda
