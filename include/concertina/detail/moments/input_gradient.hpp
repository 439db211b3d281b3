// From the gradient of the moments of a batch's patches to that of the batch.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/detail/moments/sums.hpp>

#include <algorithm>
#include <vector>

namespace concertina::detail {

/// The gradient of one group's maps. At a pixel that tap a of patch t reads it is the sum, over all
/// such (a, t), of element a of  2 / count * quadratic (patch - mean) + mean gradient / count.
template <class Scalar>
class GroupInputGradient {
 public:
  GroupInputGradient(const PatchGeometry& geometry, const std::vector<Region>& all, Index count,
                     const double* mean, const double* mean_gradient, const double* quadratic)
      : geometry_(&geometry),
        regions_(&all),
        lags_(geometry.gradient_prefers_lags()),
        canvas_(geometry, lags_),
        centre_(static_cast<std::size_t>(geometry.width())),
        constant_(static_cast<std::size_t>(numel(geometry.positions) * geometry.patch())) {
    find_centre(mean);
    find_constant(count, mean, mean_gradient, quadratic);
    const double factor = 2 / static_cast<double>(count);
    if (lags_) {
      find_kernels(factor, quadratic);
      find_map();
    } else {
      const Index patch = geometry.patch();
      kernels_.resize(static_cast<std::size_t>(patch * patch));
      for (std::size_t i = 0; i < kernels_.size(); ++i) {
        kernels_[i] = static_cast<Scalar>(factor * quadratic[i]);
      }
    }
  }

  /// Adds the gradient of one map's channels of this group.
  void add(const Scalar* map, Scalar* gradient, std::vector<Scalar>& buffer) const {
    const Index elements = canvas_.numel_of(1);
    buffer.assign(static_cast<std::size_t>(2 * elements), Scalar(0));
    Scalar* const from = buffer.data() + canvas_.lead * canvas_.width;
    Scalar* const to = from + elements;
    canvas_.write(map, geometry_->size, centre_.data(), from);
    if (!lags_) {
      add_patches(from, to);
    } else if (canvas_.width == 1) {
      add_lines(from, to);
    } else {
      for (std::size_t r = 0; r < regions_->size(); ++r) add_region(r, from, to);
    }
    const Axes& size = geometry_->size;
    const Index width = canvas_.width, pixels = numel(size);
    for (Index z = 0; z < size[0]; ++z) {
      for (Index y = 0; y < size[1]; ++y) {
        const Scalar* line = to + canvas_.at(Axes{z, y, 0}) * width;
        const Index at = (z * size[1] + y) * size[2];
        for (Index c = 0; c < width; ++c) {
          Scalar* line_to = gradient + c * pixels + at;
          for (Index x = 0; x < size[2]; ++x) line_to[x] += line[x * width + c];
        }
        if (!lags_) continue;
        for (Index c = 0; c < width; ++c) {
          axpy(size[2], Scalar(1), map_.data() + c * pixels + at, gradient + c * pixels + at);
        }
      }
    }
  }

 private:
  /// The channels' means, from the tap that reads the map most often: any number near them will do.
  void find_centre(const double* mean) {
    std::vector<Index> reads(static_cast<std::size_t>(geometry_->taps()));
    for_each_position(geometry_->positions, [&](const Axes& t) {
      geometry_->for_each_tap(t, [&](Index a, Index pixel) {
        reads[static_cast<std::size_t>(a)] += pixel >= 0 ? 1 : 0;
      });
    });
    const auto most = std::ranges::max_element(reads);
    if (*most == 0) return;
    const double scale =
        static_cast<double>(numel(geometry_->positions)) / static_cast<double>(*most);
    for (Index c = 0; c < geometry_->width(); ++c) {
      centre_[static_cast<std::size_t>(c)] =
          mean[(most - reads.begin()) * geometry_->width() + c] * scale;
    }
  }

  /// What each patch's gradient has that no map decides: [position][patch].
  void find_constant(Index count, const double* mean, const double* mean_gradient,
                     const double* quadratic) {
    const Index patch = geometry_->patch(), width = geometry_->width(), taps = geometry_->taps();
    const double one = 1 / static_cast<double>(count);
    std::vector<double> everywhere(static_cast<std::size_t>(patch)),
        outside(static_cast<std::size_t>(taps * patch));  // [b]: where tap b is outside
    for (Index i = 0; i < patch; ++i) {
      double sum = 0;
      for (Index b = 0; b < taps; ++b) {
        double& edge = outside[static_cast<std::size_t>(b * patch + i)];
        for (Index c = 0; c < width; ++c) {
          const double centre = centre_[static_cast<std::size_t>(c)];
          const double factor = quadratic[i * patch + b * width + c];
          sum += factor * (mean[b * width + c] - centre);
          edge += factor * centre;
        }
      }
      everywhere[static_cast<std::size_t>(i)] = one * (mean_gradient[i] - 2 * sum);
    }
    double* to = constant_.data();
    for_each_position(geometry_->positions, [&](const Axes& t) {
      std::copy(everywhere.begin(), everywhere.end(), to);
      geometry_->for_each_tap(t, [&](Index b, Index pixel) {
        if (pixel < 0) axpy(patch, -2 * one, outside.data() + b * patch, to);
      });
      to += patch;
    });
  }

  /// The same at each pixel: [channel][pixel].
  void find_map() {
    const Index width = geometry_->width(), pixels = numel(geometry_->size);
    std::vector<double> sum(static_cast<std::size_t>(width * pixels));
    const double* from = constant_.data();
    for_each_position(geometry_->positions, [&](const Axes& t) {
      geometry_->for_each_tap(t, [&](Index a, Index pixel) {
        if (pixel < 0) return;
        for (Index c = 0; c < width; ++c) {
          sum[static_cast<std::size_t>(c * pixels + pixel)] += from[a * width + c];
        }
      });
      from += geometry_->patch();
    });
    map_.assign(sum.begin(), sum.end());
  }

  /// For each region a kernel over lags, [lag][channel read][channel].
  void find_kernels(double factor, const double* quadratic) {
    const Axes& kernel = geometry_->kernel_size;
    const Index width = canvas_.width, patch = geometry_->patch();
    for (const Region& region : *regions_) {
      const Lags lags(*geometry_, region);
      offsets_.push_back(std::ssize(kernels_));
      std::vector<Index>& distances = distances_.emplace_back();
      for_each_position(lags.extent, [&](Axes lag) {
        for (int axis = 0; axis < max_rank; ++axis) lag[axis] += lags.first[axis];
        distances.push_back(canvas_.at(*geometry_, lag));
      });
      std::vector<double> sums(static_cast<std::size_t>(numel(lags.extent) * width * width));
      for_each_position(kernel, [&](const Axes& tap) {
        if (!region.holds(tap)) return;
        for_each_position(kernel, [&](const Axes& other) {
          Axes lag;
          for (int axis = 0; axis < max_rank; ++axis) {
            lag[axis] = other[axis] - tap[axis] - lags.first[axis];
          }
          double* to = sums.data() + flat(lag, lags.extent) * width * width;
          const double* from =
              quadratic + flat(other, kernel) * width * patch + flat(tap, kernel) * width;
          for (Index d = 0; d < width; ++d) axpy(width, factor, from + d * patch, to + d * width);
        });
      });
      kernels_.insert(kernels_.end(), sums.begin(), sums.end());
    }
  }

  void add_region(std::size_t r, const Scalar* from, Scalar* to) const {
    const Region& region = (*regions_)[r];
    const Lags lags(*geometry_, region);
    if (numel(lags.extent) == 0) return;
    const Index width = canvas_.width;
    const Index rows = numel(region.extent), columns = numel(lags.extent) * width;
    const std::vector<Index> pixels = canvas_.pixels_of(region, 1);
    std::vector<Index> lines;
    for (Index z = 0; z < lags.extent[0]; ++z) {
      for (Index y = 0; y < lags.extent[1]; ++y) {
        lines.push_back(
            canvas_.at(*geometry_, {lags.first[0] + z, lags.first[1] + y, lags.first[2]}));
      }
    }
    constexpr Index most = tuning::gradient_rows;
    std::vector<Scalar> read(static_cast<std::size_t>(std::min(most, rows) * columns)),
        sums(static_cast<std::size_t>(std::min(most, rows) * width));
    for (Index begin = 0; begin < rows; begin += most) {
      const Index here = std::min(most, rows - begin);
      Scalar* at = read.data();
      for (Index i = 0; i < here; ++i) {
        for (const Index line : lines) {
          const Scalar* pixel = from + (pixels[static_cast<std::size_t>(begin + i)] + line) * width;
          at = canvas_.copy_line(pixel, lags.extent[2], geometry_->dilation[2], at);
        }
      }
      gemm<Scalar>(Op::none, Op::none, here, width, columns, {read.data(), columns},
                   {kernels_.data() + offsets_[r], width}, false, {sums.data(), width});
      for (Index i = 0; i < here; ++i) {
        std::copy_n(sums.data() + i * width, width,
                    to + pixels[static_cast<std::size_t>(begin + i)] * width);
      }
    }
  }

  /// One channel: every pixel by the first region's kernel, then the pixels of the others anew.
  void add_lines(const Scalar* from, Scalar* to) const {
    for (std::size_t r = 0; r < regions_->size(); ++r) {
      const Region& region = (*regions_)[r];
      const Scalar* kernel = kernels_.data() + offsets_[r];
      const std::vector<Index>& lags = distances_[r];
      const auto write = [&](Index begin, Index count) {
        if (count == 1) {  // a column's pixel: its sum stays in a register
          Scalar sum(0);
          for (std::size_t l = 0; l < lags.size(); ++l) sum += kernel[l] * from[begin + lags[l]];
          to[begin] = sum;
          return;
        }
        std::fill_n(to + begin, count, Scalar(0));
        for (std::size_t l = 0; l < lags.size(); ++l) {
          axpy(count, kernel[l], from + begin + lags[l], to + begin);
        }
      };
      if (r == 0) {
        write(0, canvas_.image);
        continue;
      }
      for (Index z = 0; z < region.extent[0]; ++z) {
        for (Index y = 0; y < region.extent[1]; ++y) {
          const Axes line = {region.first[0] + z, region.first[1] + y, region.first[2]};
          write(canvas_.at(line), region.extent[2]);
        }
      }
    }
  }

  void add_patches(const Scalar* from, Scalar* to) const {
    const Index width = canvas_.width, patch = geometry_->patch();
    const std::vector<Index> starts = canvas_.patch_starts(*geometry_, 1),
                             taps = canvas_.tap_distances(*geometry_);
    constexpr Index most = tuning::gradient_rows;
    std::vector<Scalar> read(static_cast<std::size_t>(most * patch)), gradient(read.size());
    for (Index begin = 0; begin < std::ssize(starts); begin += most) {
      const Index here = std::min(most, std::ssize(starts) - begin);
      const Index* const start = starts.data() + begin;
      Scalar* at = read.data();
      for (Index i = 0; i < here; ++i) {
        for (const Index tap : taps) at = std::copy_n(from + start[i] + tap, width, at);
      }
      std::transform(constant_.data() + begin * patch, constant_.data() + (begin + here) * patch,
                     gradient.data(), [](double value) { return static_cast<Scalar>(value); });
      gemm<Scalar>(Op::none, Op::none, here, patch, patch, {read.data(), patch},
                   {kernels_.data(), patch}, true, {gradient.data(), patch});
      const Scalar* each = gradient.data();
      for (Index i = 0; i < here; ++i) {
        for (const Index tap : taps) {
          axpy(width, Scalar(1), each, to + start[i] + tap);  // outside falls between the lines
          each += width;
        }
      }
    }
  }

  const PatchGeometry* geometry_;
  const std::vector<Region>* regions_;
  bool lags_;
  Canvas canvas_;
  std::vector<double> centre_;
  std::vector<double> constant_;               // the same of each patch
  std::vector<Scalar> map_;                    // what no map decides, of each pixel
  std::vector<Index> offsets_;                 // of each region's kernel
  std::vector<std::vector<Index>> distances_;  // in pixels, of each region's lags
  std::vector<Scalar> kernels_;
};

/// Adds the gradient of a batch to `to`.
template <class Scalar>
void add_input_gradient(const PatchGeometry& geometry, const Moments& moments,
                        const MomentGradient& gradient, const Scalar* x, Index batch, Scalar* to,
                        const ParallelFor& run) {
  const Index groups = geometry.groups, width = geometry.width(), patch = geometry.patch();
  const Index pixels = numel(geometry.size), map = geometry.channels * pixels;
  const std::vector<Region> all = regions(geometry);
  const auto of_group = [&](Index group) {
    return GroupInputGradient<Scalar>(
        geometry, all, moments.count, moments.mean.data() + group * patch,
        gradient.mean.data() + group * patch, gradient.quadratic.data() + group * patch * patch);
  };
  const auto add = [&](const GroupInputGradient<Scalar>& group_gradient, Index group, Index begin,
                       Index end) {
    std::vector<Scalar> buffer;
    for (Index n = begin; n < end; ++n) {
      const Index at = n * map + group * width * pixels;
      group_gradient.add(x + at, to + at, buffer);
    }
  };
  if (groups >= tuning::moment_shares) {
    run(groups, [&](Index group) { add(of_group(group), group, 0, batch); });
    return;
  }
  const Index shares = std::min(tuning::moment_shares, batch);
  for (Index group = 0; group < groups; ++group) {
    const GroupInputGradient<Scalar> group_gradient = of_group(group);
    run(shares,
        [&](Index s) { add(group_gradient, group, batch * s / shares, batch * (s + 1) / shares); });
  }
}

}  // namespace concertina::detail
