// Which pixels the patches of a kernel read, cut into boxes whose pixels are read by the same taps.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/detail/box.hpp>
#include <concertina/detail/tuning.hpp>
#include <concertina/shape.hpp>

#include <algorithm>
#include <vector>

namespace concertina::detail {

/// The last axes instead of the first, so that the innermost one is that of neighbours in memory.
constexpr Axes last_axes(const Axes& values, int rank, Index otherwise) {
  Axes result = otherwise;
  for (int axis = 0; axis < rank; ++axis) result[max_rank - rank + axis] = values[axis];
  return result;
}

/// The patches that a kernel reads of maps of one size. Tap a of patch t reads pixel
/// t * stride + first + a * dilation, and zero where that is outside. An element of a patch is
/// numbered tap * width() + channel within its group.
struct PatchGeometry {
  Index channels = 0, groups = 1;
  Axes kernel_size = 1, dilation = 1, stride = 1, first = 0;
  Axes size = 1;       ///< of the maps
  Axes positions = 1;  ///< patches along each axis

  PatchGeometry() = default;

  /// Those of a layer's outputs but for `margin` at each side.
  PatchGeometry(const AnyShape& shape, const Axes& input_size, const Axes& margin_start = 0,
                const Axes& margin_end = 0)
      : channels(shape.in),
        groups(shape.groups),
        kernel_size(last_axes(shape.kernel_size, shape.rank, 1)),
        dilation(last_axes(shape.dilation, shape.rank, 1)),
        stride(last_axes(shape.stride, shape.rank, 1)),
        size(last_axes(input_size, shape.rank, 1)) {
    const Axes outputs = last_axes(output_size(shape, input_size), shape.rank, 1),
               padding = last_axes(shape.padding.start, shape.rank, 0),
               skipped = last_axes(margin_start, shape.rank, 0),
               more = last_axes(margin_end, shape.rank, 0);
    for (int axis = 0; axis < max_rank; ++axis) {
      positions[axis] = outputs[axis] - skipped[axis] - more[axis];
      first[axis] = skipped[axis] * stride[axis] - padding[axis];
      if (skipped[axis] >= 0 && more[axis] >= 0 && positions[axis] > 0) continue;
      fail<ShapeError>({"a batch norm's statistics leave out ", skipped[axis], " and ", more[axis],
                        " of ", outputs[axis], " positions (", shape, ")"});
    }
  }

  Index width() const { return channels / groups; }
  Index taps() const { return numel(kernel_size); }
  Index patch() const { return width() * taps(); }
  Index offset(int axis, Index tap) const { return first[axis] + tap * dilation[axis]; }

  /// Differences of two taps.
  Index lags() const {
    Index count = 1;
    for (const Index extent : kernel_size) count *= 2 * extent - 1;
    return count;
  }

  /// Multiply-adds for a map of the batch.
  Index by_lags() const { return channels * width() * (lags() + 1) / 2 * numel(size); }
  Index by_patches() const { return groups * (patch() * (patch() + 1) / 2) * numel(positions); }
  Index gradient_by_lags() const { return channels * width() * lags() * numel(size); }
  Index gradient_by_patches() const { return channels * taps() * patch() * numel(positions); }

  /// Products of pixels serve every pair of taps as far apart, at stride 1.
  bool prefers_lags() const {
    return stride == Axes(1) && tuning::lag_price * by_lags() < by_patches();
  }
  bool gradient_prefers_lags() const {
    return stride == Axes(1) && tuning::lag_price * gradient_by_lags() < gradient_by_patches();
  }

  Index multiply_adds() const { return prefers_lags() ? by_lags() : by_patches(); }
  Index gradient_multiply_adds() const {
    return gradient_prefers_lags() ? gradient_by_lags() : gradient_by_patches();
  }

  /// Calls visit(a, pixel) for each tap of patch t, the pixel flat, or -1 where it is outside.
  template <class Visit>
  void for_each_tap(const Axes& t, Visit&& visit) const {
    Index a = 0;
    for_each_position(kernel_size, [&](const Axes& tap) {
      Axes at;
      bool inside = true;
      for (int axis = 0; axis < max_rank; ++axis) {
        at[axis] = t[axis] * stride[axis] + offset(axis, tap[axis]);
        inside = inside && at[axis] >= 0 && at[axis] < size[axis];
      }
      visit(a++, inside ? flat(at, size) : Index{-1});
    });
  }

  /// Of each tap, whether any patch reads the map with it.
  std::vector<bool> reading_taps() const {
    std::vector<bool> reading;
    for_each_position(kernel_size, [&](const Axes& tap) {
      bool reads = true;
      for (int axis = 0; axis < max_rank; ++axis) {
        bool inside = false;
        for (Index t = 0; t < positions[axis] && !inside; ++t) {
          const Index at = t * stride[axis] + offset(axis, tap[axis]);
          inside = at >= 0 && at < size[axis];
        }
        reads = reads && inside;
      }
      reading.push_back(reads);
    });
    return reading;
  }

  friend bool operator==(const PatchGeometry&, const PatchGeometry&) = default;
};

/// A linear function of the moments: dL = sum of mean[i] d(mean i) + quadratic[i][j] d(covariance i
/// j) over the groups. Quadratic parts are symmetric.
struct MomentGradient {
  std::vector<double> mean;       // [groups][patch]
  std::vector<double> quadratic;  // [groups][patch][patch]
};

/// Pixels first .. first + extent - 1 along each axis, which taps tap_first .. tap_last - 1 read
/// and no others; where no tap reads them, tap_first is the number of taps and tap_last 1.
struct Region {
  Axes first, extent, tap_first, tap_last;

  /// Whether tap a reads these pixels.
  bool holds(const Axes& tap) const {
    for (int axis = 0; axis < max_rank; ++axis) {
      if (tap[axis] < tap_first[axis] || tap[axis] >= tap_last[axis]) return false;
    }
    return true;
  }
};

/// All pixels, at stride 1. The first region is the largest.
inline std::vector<Region> regions(const PatchGeometry& geometry) {
  std::vector<Region> result = {{.first = 0, .extent = 1, .tap_first = 0, .tap_last = 1}};
  for (int axis = 0; axis < max_rank; ++axis) {
    const Index size = geometry.size[axis], taps = geometry.kernel_size[axis];
    std::vector<Index> cuts = {0, size};
    for (Index tap = 0; tap < taps; ++tap) {
      const Index begin = geometry.offset(axis, tap);
      for (const Index cut : {begin, begin + geometry.positions[axis]}) {
        if (cut > 0 && cut < size) cuts.push_back(cut);
      }
    }
    std::ranges::sort(cuts);
    cuts.erase(std::unique(cuts.begin(), cuts.end()), cuts.end());
    std::vector<Region> finer;
    for (std::size_t cut = 0; cut + 1 < cuts.size(); ++cut) {
      Index tap_first = taps, tap_last = 0;
      for (Index tap = 0; tap < taps; ++tap) {
        const Index begin = geometry.offset(axis, tap);
        if (begin > cuts[cut] || begin + geometry.positions[axis] < cuts[cut + 1]) continue;
        tap_first = std::min(tap_first, tap);
        tap_last = tap + 1;
      }
      if (tap_last == 0) tap_last = 1;  // none: Region::holds no tap, Lags are empty
      for (Region region : result) {
        region.first[axis] = cuts[cut];
        region.extent[axis] = cuts[cut + 1] - cuts[cut];
        region.tap_first[axis] = tap_first;
        region.tap_last[axis] = tap_last;
        finer.push_back(region);
      }
    }
    result = std::move(finer);
  }
  std::ranges::swap(result.front(), *std::ranges::max_element(result, {}, [](const Region& region) {
                      return numel(region.extent);
                    }));
  return result;
}

/// Lags between a tap that reads the region and any tap: `first` .. `first + extent - 1` along each
/// axis, in taps.
struct Lags {
  Axes first, extent;

  Lags(const PatchGeometry& geometry, const Region& region) {
    for (int axis = 0; axis < max_rank; ++axis) {
      first[axis] = 1 - region.tap_last[axis];
      extent[axis] = geometry.kernel_size[axis] - region.tap_first[axis] - first[axis];
    }
  }
};

/// One group's maps with zeros between, channel by channel at each pixel: a pixel at a lag is at a
/// fixed distance in memory whatever the pixel, and zero where it is outside.
struct Canvas {
  Axes extent;  ///< with the zeros after each axis, which are those before the next line's
  Index lead;   ///< zeros before the first pixel, and after the last
  Index image;  ///< pixels from a map to the next one
  Index width;  ///< elements at each pixel

  /// With zeros as far as lags reach, or else as patches do.
  Canvas(const PatchGeometry& geometry, bool lags) : width(geometry.width()) {
    Axes gap;
    for (int axis = 0; axis < max_rank; ++axis) {
      const Index reach = (geometry.kernel_size[axis] - 1) * geometry.dilation[axis];
      const Index last =
          (geometry.positions[axis] - 1) * geometry.stride[axis] + geometry.first[axis] + reach;
      gap[axis] = lags
                      ? reach
                      : std::max({Index{0}, -geometry.first[axis], last - geometry.size[axis] + 1});
      extent[axis] = geometry.size[axis] + gap[axis];
    }
    lead = at(gap);
    image = numel(extent);
  }

  /// Distance of a pixel, or of a lag in pixels, from the first pixel of its map.
  Index at(const Axes& pixel) const {
    return (pixel[0] * extent[1] + pixel[1]) * extent[2] + pixel[2];
  }
  Index at(const PatchGeometry& geometry, const Axes& taps) const {
    Axes pixel;
    for (int axis = 0; axis < max_rank; ++axis) pixel[axis] = taps[axis] * geometry.dilation[axis];
    return at(pixel);
  }

  Index numel_of(Index images) const { return (images * image + 2 * lead) * width; }

  /// Where the patches of `count` maps begin, and how far their taps are from there, in elements.
  std::vector<Index> patch_starts(const PatchGeometry& geometry, Index count) const {
    std::vector<Index> starts;
    for (Index n = 0; n < count; ++n) {
      for_each_position(geometry.positions, [&](Axes t) {
        for (int axis = 0; axis < max_rank; ++axis) {
          t[axis] = t[axis] * geometry.stride[axis] + geometry.first[axis];
        }
        starts.push_back((n * image + at(t)) * width);
      });
    }
    return starts;
  }
  std::vector<Index> tap_distances(const PatchGeometry& geometry) const {
    std::vector<Index> taps;
    for_each_position(geometry.kernel_size,
                      [&](const Axes& tap) { taps.push_back(at(geometry, tap) * width); });
    return taps;
  }

  /// The region's pixels of `count` maps.
  std::vector<Index> pixels_of(const Region& region, Index count) const {
    std::vector<Index> pixels;
    for (Index n = 0; n < count; ++n) {
      for_each_position(region.extent, [&](Axes pixel) {
        for (int axis = 0; axis < max_rank; ++axis) pixel[axis] += region.first[axis];
        pixels.push_back(n * image + at(pixel));
      });
    }
    return pixels;
  }

  /// Copies `length` pixels, `dilation` apart along the last axis.
  template <class T, class To>
  To* copy_line(const T* from, Index length, Index dilation, To* to) const {
    if (dilation == 1) return std::copy_n(from, length * width, to);
    for (Index x = 0; x < length; ++x) to = std::copy_n(from + x * dilation * width, width, to);
    return to;
  }

  /// Writes one group of a map, less its centres, to where its first pixel is. What lies between is
  /// left as it is.
  template <class T, class Scalar>
  void write(const Scalar* map, const Axes& size, const double* centre, T* to) const {
    const Index pixels = numel(size);
    for (Index z = 0; z < size[0]; ++z) {
      for (Index y = 0; y < size[1]; ++y) {
        const Scalar* line = map + (z * size[1] + y) * size[2];
        T* line_to = to + at(Axes{z, y, 0}) * width;
        if (width == 1) {
          for (Index x = 0; x < size[2]; ++x) {
            line_to[x] = static_cast<T>(static_cast<double>(line[x]) - *centre);
          }
          continue;
        }
        for (Index x = 0; x < size[2]; ++x) {
          for (Index c = 0; c < width; ++c) {
            line_to[x * width + c] =
                static_cast<T>(static_cast<double>(line[c * pixels + x]) - centre[c]);
          }
        }
      }
    }
  }
};

}  // namespace concertina::detail
