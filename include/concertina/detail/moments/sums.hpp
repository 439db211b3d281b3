// Sums over the patches of a batch: of their elements, and of products of two.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/detail/moments/geometry.hpp>
#include <concertina/detail/product/gemm.hpp>
#include <concertina/moments.hpp>
#include <concertina/parallel.hpp>

#include <algorithm>
#include <span>
#include <vector>

namespace concertina::detail {

/// The mean of a channel over the batch, found about its first value: a constant channel's is
/// exact.
template <class Scalar>
double channel_mean(const Scalar* x, Index batch, Index channels, Index channel, Index pixels) {
  constexpr Index lanes = 16;
  const double origin = static_cast<double>(x[channel * pixels]);
  double partial[lanes] = {};
  for (Index n = 0; n < batch; ++n) {
    const Scalar* map = x + (n * channels + channel) * pixels;
    Index p = 0;
    for (; p + lanes <= pixels; p += lanes) {
      for (Index l = 0; l < lanes; ++l) partial[l] += static_cast<double>(map[p + l]) - origin;
    }
    for (; p < pixels; ++p) partial[0] += static_cast<double>(map[p]) - origin;
  }
  double sum = 0;
  for (const double part : partial) sum += part;
  return origin + sum / static_cast<double>(batch * pixels);
}

/// What the maps of one group, less their centres and with zeros around them, sum to: the products
/// of patch elements, and the pixels themselves. A share of the batch adds to it.
class GroupSums {
 public:
  GroupSums(const PatchGeometry& geometry, const std::vector<Region>& all)
      : geometry_(&geometry),
        regions_(&all),
        lags_(geometry.prefers_lags()),
        canvas_(geometry, lags_),
        pixels_(static_cast<std::size_t>(geometry.width() * numel(geometry.size))) {
    Index products = geometry.patch() * geometry.patch();
    if (lags_ && geometry.width() == 1) products = half() * canvas_.image;
    if (lags_ && geometry.width() > 1) {
      products = 0;
      for (const Region& region : all) {
        const Lags lags(geometry, region);
        offsets_.push_back(products);
        products += geometry.width() * geometry.width() * numel(lags.extent);
      }
    }
    products_.resize(static_cast<std::size_t>(products));
  }

  /// Doubles that it keeps.
  Index numel_of() const { return std::ssize(products_) + std::ssize(pixels_); }

  /// Adds `count` maps of the group, `distance` elements apart.
  template <class Scalar>
  void add(const Scalar* maps, Index count, Index distance, const double* centre) {
    const Index most =
        std::clamp<Index>(2048 / numel(geometry_->size), 1, std::max<Index>(count, 1));
    std::vector<double> buffer(static_cast<std::size_t>(canvas_.numel_of(most)));
    double* const origin = buffer.data() + canvas_.lead * canvas_.width;
    for (Index n = 0; n < count; n += most) {
      const Index here = std::min(most, count - n);
      for (Index i = 0; i < here; ++i) {
        double* const map = origin + i * canvas_.image * canvas_.width;
        canvas_.write(maps + (n + i) * distance, geometry_->size, centre, map);
        add_pixels(map);
      }
      if (!lags_) {
        add_patches(origin, here);
      } else if (geometry_->width() == 1) {
        add_line_products(origin, here);
      } else {
        for (std::size_t r = 0; r < regions_->size(); ++r) add_region(r, origin, here);
      }
    }
  }

  void operator+=(const GroupSums& other) {
    axpy(std::ssize(products_), 1.0, other.products_.data(), products_.data());
    axpy(std::ssize(pixels_), 1.0, other.pixels_.data(), pixels_.data());
  }

  /// Writes the sums about the centres over `batch` maps: of elements [patch], and of products
  /// [patch][patch].
  void finish(Index batch, const double* centre, double* elements, double* products) const {
    const Index patch = geometry_->patch();
    if (!lags_) {
      std::copy(products_.begin(), products_.end(), products);
    } else if (geometry_->width() == 1) {
      write_from_lines(products);
    } else {
      write_from_regions(products);
    }
    for (Index i = 0; i < patch; ++i) {
      for (Index j = 0; j < i; ++j) products[i * patch + j] = products[j * patch + i];
    }
    add_border(batch, centre, elements, products);
  }

 private:
  Index half() const { return (geometry_->lags() + 1) / 2; }

  void add_pixels(const double* map) {
    const Axes& size = geometry_->size;
    double* to = pixels_.data();
    for (Index z = 0; z < size[0]; ++z) {
      for (Index y = 0; y < size[1]; ++y) {
        const Index line = size[2] * canvas_.width;
        axpy(line, 1.0, map + canvas_.at(Axes{z, y, 0}) * canvas_.width, to);
        to += line;
      }
    }
  }

  /// Calls visit(index, lag) for the lags from which the other half follows by symmetry.
  template <class Visit>
  void for_each_half_lag(Visit&& visit) const {
    Axes extent;
    for (int axis = 0; axis < max_rank; ++axis) extent[axis] = 2 * geometry_->kernel_size[axis] - 1;
    Index index = -(numel(extent) - 1) / 2;
    for_each_position(extent, [&](Axes lag) {
      for (int axis = 0; axis < max_rank; ++axis) lag[axis] -= geometry_->kernel_size[axis] - 1;
      if (index >= 0) visit(index, lag);
      ++index;
    });
  }

  /// One channel: products of each pixel, summed over the batch alone.
  void add_line_products(const double* maps, Index count) {
    const Index span = canvas_.image;
    for (Index n = 0; n < count; ++n) {
      const double* map = maps + n * span;
      for_each_half_lag([&](Index index, const Axes& lag) {
        const double* other = map + canvas_.at(*geometry_, lag);
        double* to = products_.data() + index * span;
        for (Index p = 0; p < span; ++p) to[p] += map[p] * other[p];
      });
    }
  }

  void write_from_lines(double* products) const {
    const Axes& kernel = geometry_->kernel_size;
    const Index patch = geometry_->patch();
    for_each_half_lag([&](Index index, const Axes& lag) {
      const double* sums = products_.data() + index * canvas_.image;
      for_each_position(kernel, [&](const Axes& tap) {
        Axes other, first, extent;
        for (int axis = 0; axis < max_rank; ++axis) {
          other[axis] = tap[axis] + lag[axis];
          if (other[axis] < 0 || other[axis] >= kernel[axis]) return;
          const Index begin = geometry_->offset(axis, tap[axis]);
          first[axis] = std::max<Index>(0, begin);
          extent[axis] = std::max<Index>(
              0, std::min(geometry_->size[axis], begin + geometry_->positions[axis]) - first[axis]);
        }
        double sum = 0;
        for (Index z = first[0]; z < first[0] + extent[0]; ++z) {
          for (Index y = first[1]; y < first[1] + extent[1]; ++y) {
            const double* line = sums + canvas_.at(Axes{z, y, first[2]});
            for (Index x = 0; x < extent[2]; ++x) sum += line[x];
          }
        }
        products[flat(tap, kernel) * patch + flat(other, kernel)] = sum;
      });
    });
  }

  /// Calls visit(lag, index, count) for lines of lags of which a half of all has to be known: lag
  /// is the line's first, index its place among the region's.
  template <class Visit>
  void for_each_line(const Lags& lags, Visit&& visit) const {
    Index index = 0;
    for (Index z = 0; z < lags.extent[0]; ++z) {
      for (Index y = 0; y < lags.extent[1]; ++y, index += lags.extent[2]) {
        Axes lag = {lags.first[0] + z, lags.first[1] + y, lags.first[2]};
        const bool positive = lag[0] > 0 || (lag[0] == 0 && lag[1] > 0);
        if (!positive && (lag[0] != 0 || lag[1] != 0)) continue;
        const Index skip = positive ? 0 : -lag[2];
        lag[2] += skip;
        visit(lag, index + skip, lags.extent[2] - skip);
      }
    }
  }

  void add_region(std::size_t r, const double* maps, Index count) {
    const Region& region = (*regions_)[r];
    const Lags lags(*geometry_, region);
    if (numel(lags.extent) == 0) return;
    const Index width = canvas_.width;
    const std::vector<Index> pixels = canvas_.pixels_of(region, count);
    constexpr Index most = tuning::panel_columns / 2;
    const Index columns = lags.extent[2] * width;
    std::vector<double> left(static_cast<std::size_t>(most * width)),
        right(static_cast<std::size_t>(most * columns));
    for (Index begin = 0; begin < std::ssize(pixels); begin += most) {
      const Index here = std::min(most, std::ssize(pixels) - begin);
      const Index* const at = pixels.data() + begin;
      for (Index i = 0; i < here; ++i) {
        std::copy_n(maps + at[i] * width, width, left.data() + i * width);
      }
      for_each_line(lags, [&](const Axes& lag, Index index, Index length) {
        const double* from = maps + canvas_.at(*geometry_, lag) * width;
        const Index line = length * width;
        for (Index i = 0; i < here; ++i) {
          canvas_.copy_line(from + at[i] * width, length, geometry_->dilation[2],
                            right.data() + i * line);
        }
        gemm<double>(Op::transpose, Op::none, width, line, here, {left.data(), width},
                     {right.data(), line}, true,
                     {products_.data() + offsets_[r] + index * width, columns_of(lags)});
      });
    }
  }

  /// Products of a region lie as [channel][lag][channel].
  Index columns_of(const Lags& lags) const { return numel(lags.extent) * canvas_.width; }

  void write_from_regions(double* products) const {
    const Axes& kernel = geometry_->kernel_size;
    const Index width = canvas_.width, patch = geometry_->patch();
    std::fill_n(products, patch * patch, 0.0);
    for_each_position(kernel, [&](const Axes& tap) {
      for_each_position(kernel, [&](const Axes& other) {
        const Index a = flat(tap, kernel), b = flat(other, kernel);
        if (b < a) return;
        for (std::size_t r = 0; r < regions_->size(); ++r) {
          const Region& region = (*regions_)[r];
          if (!region.holds(tap)) continue;
          const Lags lags(*geometry_, region);
          Axes lag;
          for (int axis = 0; axis < max_rank; ++axis) {
            lag[axis] = other[axis] - tap[axis] - lags.first[axis];
          }
          const double* from = products_.data() + offsets_[r] + flat(lag, lags.extent) * width;
          for (Index c = 0; c < width; ++c) {
            axpy(width, 1.0, from + c * columns_of(lags),
                 products + (a * width + c) * patch + b * width);
          }
        }
      });
    });
  }

  void add_patches(const double* maps, Index count) {
    const Index width = canvas_.width, patch = geometry_->patch();
    const std::vector<Index> starts = canvas_.patch_starts(*geometry_, count),
                             taps = canvas_.tap_distances(*geometry_);
    constexpr Index most = tuning::panel_columns / 2, side = 64;
    std::vector<double> rows(static_cast<std::size_t>(most * patch));
    for (Index begin = 0; begin < std::ssize(starts); begin += most) {
      const Index here = std::min(most, std::ssize(starts) - begin);
      double* to = rows.data();
      for (Index i = 0; i < here; ++i) {
        for (const Index tap : taps) {
          to = std::copy_n(maps + starts[static_cast<std::size_t>(begin + i)] + tap, width, to);
        }
      }
      for (Index i = 0; i < patch; i += side) {  // the upper triangle
        gemm<double>(Op::transpose, Op::none, std::min(side, patch - i), patch - i, here,
                     {rows.data() + i, patch}, {rows.data() + i, patch}, true,
                     {products_.data() + i * patch + i, patch});
      }
    }
  }

  /// Outside of the map a patch element is zero, so less its centre it is not: the sums of
  /// elements, and what such elements add to the products.
  void add_border(Index batch, const double* centre, double* elements, double* products) const {
    const Index width = canvas_.width, taps = geometry_->taps(), patch = geometry_->patch();
    std::vector<Index> pixel(static_cast<std::size_t>(taps));         // that each tap reads, or -1
    std::vector<double> both(static_cast<std::size_t>(taps * taps)),  // patches with both outside
        mixed(static_cast<std::size_t>(taps * patch));  // [b]: sums of elements where b is outside
    std::fill_n(elements, patch, 0.0);
    for_each_position(geometry_->positions, [&](const Axes& t) {
      bool border = false;
      geometry_->for_each_tap(t, [&](Index a, Index read) {
        pixel[static_cast<std::size_t>(a)] = read;
        border = border || read < 0;
        if (read >= 0) axpy(width, 1.0, pixels_.data() + read * width, elements + a * width);
      });
      if (!border) return;
      for (Index b = 0; b < taps; ++b) {
        if (pixel[static_cast<std::size_t>(b)] >= 0) continue;
        for (Index a = 0; a < taps; ++a) {
          const Index read = pixel[static_cast<std::size_t>(a)];
          if (read < 0) {
            both[static_cast<std::size_t>(a * taps + b)] += static_cast<double>(batch);
          } else {
            axpy(width, 1.0, pixels_.data() + read * width, mixed.data() + b * patch + a * width);
          }
        }
      }
    });
    for (Index a = 0; a < taps; ++a) {
      for (Index b = 0; b < taps; ++b) {
        const double outside = both[static_cast<std::size_t>(a * taps + b)];
        for (Index c = 0; c < width; ++c) {
          double* row = products + (a * width + c) * patch + b * width;
          const double here = mixed[static_cast<std::size_t>(b * patch + a * width + c)];
          const double* there = mixed.data() + a * patch + b * width;
          for (Index d = 0; d < width; ++d) {
            row[d] += outside * centre[c] * centre[d] - here * centre[d] - centre[c] * there[d];
          }
        }
      }
      for (Index c = 0; c < width; ++c) {
        elements[a * width + c] -= both[static_cast<std::size_t>(a * taps + a)] * centre[c];
      }
    }
  }

  const PatchGeometry* geometry_;
  const std::vector<Region>* regions_;
  bool lags_;
  Canvas canvas_;
  std::vector<Index> offsets_;    // of each region's products
  std::vector<double> products_;  // by lags: [region][channel][lag][channel] or [lag][pixel]
  std::vector<double> pixels_;    // [pixel][channel], summed over the batch
};

/// See concertina::patch_moments.
template <class Scalar>
Moments patch_moments(const PatchGeometry& geometry, const Scalar* x, Index batch,
                      const ParallelFor& run) {
  const Index groups = geometry.groups, width = geometry.width(), patch = geometry.patch();
  const Index pixels = numel(geometry.size), map = geometry.channels * pixels;
  Moments result{batch * numel(geometry.positions),
                 std::vector<double>(static_cast<std::size_t>(groups * patch)),
                 std::vector<double>(static_cast<std::size_t>(groups * patch * patch))};
  std::vector<double> centre(static_cast<std::size_t>(geometry.channels));
  run(geometry.channels, [&](Index c) {
    centre[static_cast<std::size_t>(c)] = channel_mean(x, batch, geometry.channels, c, pixels);
  });
  const std::vector<Region> all = regions(geometry);
  // Sizes alone decide the shares, so results are the same bit for bit whatever `run` does.
  constexpr Index enough = 8, most_doubles = Index{1} << 25;
  Index shares = std::clamp<Index>((enough + groups - 1) / groups, 1, batch);
  shares = std::clamp<Index>(most_doubles / GroupSums(geometry, all).numel_of(), 1, shares);
  const auto share = [&](Index group, Index s) {
    GroupSums sums(geometry, all);
    const Index begin = batch * s / shares, end = batch * (s + 1) / shares;
    sums.add(x + begin * map + group * width * pixels, end - begin, map,
             centre.data() + group * width);
    return sums;
  };
  const auto finish = [&](Index group, const GroupSums& sums) {
    double* const mean = result.mean.data() + group * patch;
    double* const scatter = result.scatter.data() + group * patch * patch;
    sums.finish(batch, centre.data() + group * width, mean, scatter);
    const double count = static_cast<double>(result.count);
    for (Index i = 0; i < patch; ++i) mean[i] /= count;
    for (Index i = 0; i < patch; ++i) axpy(patch, -count * mean[i], mean, scatter + i * patch);
    for (Index i = 0; i < patch; ++i) {
      mean[i] += centre[static_cast<std::size_t>(group * width + i % width)];
    }
  };
  if (shares == 1) {
    run(groups, [&](Index group) { finish(group, share(group, 0)); });
    return result;
  }
  for (Index group = 0; group < groups; ++group) {
    std::vector<GroupSums> sums(static_cast<std::size_t>(shares), GroupSums(geometry, all));
    run(shares, [&](Index s) { sums[static_cast<std::size_t>(s)] = share(group, s); });
    for (Index s = 1; s < shares; ++s) sums.front() += sums[static_cast<std::size_t>(s)];
    finish(group, sums.front());
  }
  return result;
}

}  // namespace concertina::detail
