// Sums over the patches of a batch: of their elements, and of products of two.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/detail/moments/geometry.hpp>
#include <concertina/detail/product/gemm.hpp>
#include <concertina/moments.hpp>
#include <concertina/parallel.hpp>

#include <Eigen/Core>

#include <algorithm>
#include <span>
#include <utility>
#include <vector>

namespace concertina::detail {

/// The mean of a channel over the batch, found about its first value: a constant channel's is
/// exact.
template <class Scalar>
double channel_mean(const Scalar* x, Index batch, Index channels, Index channel, Index pixels) {
  constexpr Index lanes = tuning::dot_lanes;
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
        narrow_(lags_ && geometry.width() <= tuning::few_channels),
        canvas_(geometry, lags_),
        pixels_(static_cast<std::size_t>(geometry.width() * numel(geometry.size))) {
    Index products = geometry.patch() * geometry.patch();
    if (narrow_) canvas_.width = 1;  // a canvas for each channel, one after the other
    if (lags_) {
      products = 0;
      for (std::size_t r = 0; r < all.size(); ++r) {
        const Region& region = all[r];
        region_lags_.emplace_back(geometry, region);
        offsets_.push_back(products);
        products += geometry.width() * columns_of(region_lags_.back());
        const auto same = [&](const std::vector<std::size_t>& band) {
          const Region& other = all[band.front()];
          return other.first[0] == region.first[0] && other.first[1] == region.first[1];
        };
        const auto found = std::ranges::find_if(bands_, same);
        (found == bands_.end() ? bands_.emplace_back() : *found).push_back(r);
      }
    }
    products_.resize(static_cast<std::size_t>(products));
  }

  /// Doubles that it keeps.
  Index numel_of() const { return std::ssize(products_) + std::ssize(pixels_); }

  /// Adds `count` maps of the group, `distance` elements apart.
  template <class Scalar>
  void add(const Scalar* maps, Index count, Index distance, const double* centre) {
    const Index width = geometry_->width(), pixels = numel(geometry_->size);
    const Index planes = narrow_ ? width : 1;
    const Index most = std::clamp<Index>(
        narrow_ ? tuning::moment_elements / (width * canvas_.image) : 2048 / pixels, 1,
        std::max<Index>(count, 1));
    std::vector<double> buffer(
        static_cast<std::size_t>(canvas_.numel_of(most * planes) + tuning::product_lanes));
    double* const origin = buffer.data() + canvas_.lead * canvas_.width;
    for (Index n = 0; n < count; n += most) {
      const Index here = std::min(most, count - n);
      for (Index i = 0; i < here; ++i) {
        for (Index plane = 0; plane < planes; ++plane) {
          double* const map = origin + (i * planes + plane) * canvas_.image * canvas_.width;
          canvas_.write(maps + (n + i) * distance + plane * pixels, geometry_->size, centre + plane,
                        map);
          add_pixels(map, pixels_.data() + plane);
        }
      }
      if (!lags_) {
        add_patches(origin, here);
      } else if (narrow_) {
        add_lags(origin, here);
      } else {
        for (std::size_t r = 0; r < regions_->size(); ++r) add_region(r, origin, here);
      }
    }
  }

  void operator+=(const GroupSums& other) {
    axpy(std::ssize(products_), 1.0, other.products_.data(), products_.data());
    axpy(std::ssize(pixels_), 1.0, other.pixels_.data(), pixels_.data());
  }

  /// Writes the sums about the centres [patch] over `batch` maps: of elements [patch], and of
  /// products [patch][patch].
  void finish(Index batch, const double* centre, double* elements, double* products) const {
    const Index patch = geometry_->patch();
    if (lags_) {
      write_from_regions(products);
    } else {
      std::copy(products_.begin(), products_.end(), products);
    }
    for (Index i = 0; i < patch; ++i) {
      for (Index j = 0; j < i; ++j) products[i * patch + j] = products[j * patch + i];
    }
    add_border(batch, centre, elements, products);
  }

 private:
  void add_pixels(const double* map, double* to) const {
    const Axes& size = geometry_->size;
    const Index width = geometry_->width(), step = canvas_.width == width ? 1 : width;
    for (Index z = 0; z < size[0]; ++z) {
      for (Index y = 0; y < size[1]; ++y) {
        const double* from = map + canvas_.at(Axes{z, y, 0}) * canvas_.width;
        const Index line = size[2] * canvas_.width;
        for (Index i = 0; i < line; ++i) to[i * step] += from[i];
        to += size[2] * width;
      }
    }
  }

  /// Calls visit(lag) for the lags from which the other half follows by symmetry.
  template <class Visit>
  void for_each_half_lag(Visit&& visit) const {
    Axes extent;
    for (int axis = 0; axis < max_rank; ++axis) extent[axis] = 2 * geometry_->kernel_size[axis] - 1;
    Index index = -(numel(extent) - 1) / 2;
    for_each_position(extent, [&](Axes lag) {
      for (int axis = 0; axis < max_rank; ++axis) lag[axis] -= geometry_->kernel_size[axis] - 1;
      if (index++ >= 0) visit(lag);
    });
  }

  /// Pixels times those at a lag, channel by channel, summed over the images at each pixel and then
  /// over the regions.
  void add_lags(const double* maps, Index count) {
    const Index width = geometry_->width();
    constexpr Index together = tuning::product_channels;
    std::vector<double> products(
        static_cast<std::size_t>(together * (canvas_.image + tuning::product_lanes)));
    std::vector<double> line(static_cast<std::size_t>(geometry_->size[2]));
    for (Index c = 0; c < width; ++c) {
      for_each_half_lag([&](const Axes& lag) {
        const double* const other = maps + canvas_.at(*geometry_, lag);
        // At lag 0 the channels before are known by symmetry.
        for (Index d = lag == Axes(0) ? c : 0; d < width; d += together) {
          const Index here = std::min(together, width - d);
          const double *from = maps + c * canvas_.image, *to = other + d * canvas_.image;
          switch (here) {
            case 1: multiply<1, 4>(from, to, count, products.data()); break;
            case 2: multiply<2, 4>(from, to, count, products.data()); break;
            case 3: multiply<3, 2>(from, to, count, products.data()); break;
            default: multiply<together, 2>(from, to, count, products.data());
          }
          for (Index j = 0; j < here; ++j) {
            add_bands(products.data() + j * (canvas_.image + tuning::product_lanes), lag, c, d + j,
                      line);
          }
        }
      });
    }
  }

  /// Sums over the images of one channel's pixels times those of `Count` others: [Count][pixel].
  template <int Count, int Vectors>
  void multiply(const double* from, const double* other, Index images, double* to) const {
    constexpr int lanes = 8 * Vectors;
    using Lanes = Eigen::Array<double, lanes, 1>;
    const Index plane = canvas_.image, image = geometry_->width() * plane;
    for (Index p = 0; p < plane; p += lanes) {
      Lanes sums[Count];
      for (Lanes& sum : sums) sum.setZero();
      for (Index n = 0; n < images; ++n) {
        const Lanes own = Eigen::Map<const Lanes>(from + n * image + p);
        for (Index j = 0; j < Count; ++j) {
          sums[j] += own * Eigen::Map<const Lanes>(other + n * image + j * plane + p);
        }
      }
      for (Index j = 0; j < Count; ++j) {
        Eigen::Map<Lanes>(to + j * (plane + tuning::product_lanes) + p) = sums[j];
      }
    }
  }

  /// Adds products of pixels of channels c and d to the regions' sums of this lag.
  void add_bands(const double* products, const Axes& lag, Index c, Index d,
                 std::vector<double>& line) {
    for (const std::vector<std::size_t>& band : bands_) {
      bool summed = false;
      for (const std::size_t r : band) {
        const Lags& lags = region_lags_[r];
        Axes at;
        bool inside = true;
        for (int axis = 0; axis < max_rank; ++axis) {
          at[axis] = lag[axis] - lags.first[axis];
          inside = inside && at[axis] >= 0 && at[axis] < lags.extent[axis];
        }
        if (!inside) continue;
        const Region& region = (*regions_)[r];
        if (!std::exchange(summed, true)) {
          std::ranges::fill(line, 0.0);
          for (Index z = 0; z < region.extent[0]; ++z) {
            for (Index y = 0; y < region.extent[1]; ++y) {
              const double* from =
                  products + canvas_.at(Axes{region.first[0] + z, region.first[1] + y, 0});
              for (std::size_t x = 0; x < line.size(); ++x) line[x] += from[x];
            }
          }
        }
        products_[static_cast<std::size_t>(offsets_[r] + c * columns_of(lags) +
                                           flat(at, lags.extent) * geometry_->width() + d)] +=
            sum(line.data() + region.first[2], region.extent[2]);
      }
    }
  }

  static double sum(const double* values, Index count) {
    constexpr Index lanes = 8;
    double partial[lanes] = {}, total = 0;
    Index i = 0;
    for (; i + lanes <= count; i += lanes) {
      for (Index l = 0; l < lanes; ++l) partial[l] += values[i + l];
    }
    for (; i < count; ++i) total += values[i];
    for (const double part : partial) total += part;
    return total;
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
    const Lags& lags = region_lags_[r];
    if (numel(lags.extent) == 0) return;
    const Index width = canvas_.width;
    const std::vector<Index> pixels = canvas_.pixels_of(region, count);
    constexpr Index most = tuning::moment_rows;
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
  Index columns_of(const Lags& lags) const { return numel(lags.extent) * geometry_->width(); }

  void write_from_regions(double* products) const {
    const Axes& kernel = geometry_->kernel_size;
    const Index width = geometry_->width(), patch = geometry_->patch();
    std::fill_n(products, patch * patch, 0.0);
    for_each_position(kernel, [&](const Axes& tap) {
      for_each_position(kernel, [&](const Axes& other) {
        const Index a = flat(tap, kernel), b = flat(other, kernel);
        if (b < a) return;
        for (std::size_t r = 0; r < regions_->size(); ++r) {
          const Region& region = (*regions_)[r];
          if (!region.holds(tap)) continue;
          const Lags& lags = region_lags_[r];
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
    constexpr Index most = tuning::moment_rows, side = tuning::moment_side;
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

  /// Outside of the map a patch element is zero, so less its centre [patch] it is not: the sums of
  /// elements, and what such elements add to the products.
  void add_border(Index batch, const double* centre, double* elements, double* products) const {
    const Index width = geometry_->width(), taps = geometry_->taps(), patch = geometry_->patch();
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
          const double* const other = centre + b * width;
          const double own = centre[a * width + c];
          for (Index d = 0; d < width; ++d) {
            row[d] += outside * own * other[d] - here * other[d] - own * there[d];
          }
        }
      }
      for (Index c = 0; c < width; ++c) {
        elements[a * width + c] -=
            both[static_cast<std::size_t>(a * taps + a)] * centre[a * width + c];
      }
    }
  }

  const PatchGeometry* geometry_;
  const std::vector<Region>* regions_;
  bool lags_, narrow_;
  Canvas canvas_;
  std::vector<std::vector<std::size_t>> bands_;  // regions of the same lines
  std::vector<Lags> region_lags_;
  std::vector<Index> offsets_;    // of each region's products
  std::vector<double> products_;  // by lags: [region][channel][lag][channel]
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
  Index shares = std::clamp<Index>((tuning::moment_shares + groups - 1) / groups, 1, batch);
  shares = std::clamp<Index>(tuning::moment_share_elements / GroupSums(geometry, all).numel_of(), 1,
                             shares);
  const auto share = [&](Index group, Index s) {
    GroupSums sums(geometry, all);
    const Index begin = batch * s / shares, end = batch * (s + 1) / shares;
    sums.add(x + begin * map + group * width * pixels, end - begin, map,
             centre.data() + group * width);
    return sums;
  };
  // A tap that reads nothing is zero, so that its centre is.
  const std::vector<bool> reading = geometry.reading_taps();
  const auto finish = [&](Index group, const GroupSums& sums) {
    std::vector<double> centres(static_cast<std::size_t>(patch));
    for (Index i = 0; i < patch; ++i) {
      if (!reading[static_cast<std::size_t>(i / width)]) continue;
      centres[static_cast<std::size_t>(i)] =
          centre[static_cast<std::size_t>(group * width + i % width)];
    }
    double* const mean = result.mean.data() + group * patch;
    double* const scatter = result.scatter.data() + group * patch * patch;
    sums.finish(batch, centres.data(), mean, scatter);
    const double count = static_cast<double>(result.count);
    for (Index i = 0; i < patch; ++i) mean[i] /= count;
    for (Index i = 0; i < patch; ++i) axpy(patch, -count * mean[i], mean, scatter + i * patch);
    axpy(patch, 1.0, centres.data(), mean);
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
