// Function-preserving expansion with shifting ends: ones that copy channels to shifted places,
// exact in any scalar.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/contract.hpp>
#include <concertina/detail/expand/order.hpp>
#include <concertina/detail/verify/rounding.hpp>
#include <concertina/random.hpp>

#include <algorithm>
#include <array>
#include <optional>
#include <utility>
#include <vector>

namespace concertina::detail {

/// Shifts along one axis on both sides of the free layer: every tap of the target is one of
/// `before`, plus one of `after`, plus a tap of the free layer.
struct Shifts {
  std::vector<Index> before, after;
};

/// `count` shifts from 0 to `reach`, evenly spaced.
inline std::vector<Index> evenly_spaced(Index count, Index reach) {
  std::vector<Index> shifts{0};
  for (Index i = 1; i < count; ++i) shifts.push_back(reach * i / (count - 1));
  return shifts;
}

/// The fewest copies of a channel that reach every tap of `kernel`, or nothing if no number of
/// copies does.
inline std::optional<Shifts> cover(Index kernel, Index free, Index reach_before,
                                   Index reach_after) {
  const auto covered = [&](const Shifts& shifts) {
    std::vector<bool> seen(static_cast<std::size_t>(kernel), false);
    for (const Index b : shifts.before) {
      for (const Index a : shifts.after) {
        for (Index s = 0; s < free; ++s) seen[static_cast<std::size_t>(b + a + s)] = true;
      }
    }
    return std::ranges::find(seen, false) == seen.end();
  };
  for (Index copies = 1; copies <= kernel * kernel; ++copies) {
    for (Index before = 1; before <= std::min(copies, reach_before + 1); ++before) {
      if (copies % before != 0 || copies / before > reach_after + 1) continue;
      Shifts shifts{evenly_spaced(before, reach_before),
                    evenly_spaced(copies / before, reach_after)};
      if (covered(shifts)) return shifts;
    }
  }
  return std::nullopt;
}

/// One group of a function-preserving expansion. The layers before the free one hold copies of each
/// input channel, each shifted by another amount; those after it collect shifted copies of each
/// output channel; the free layer's taps hold the target's. Hidden channels that no copy uses carry
/// zeros into the free layer, or are not read after it; what else they touch is random, so that
/// training can wake them.
template <class Scalar>
class ShiftEnds {
 public:
  static constexpr int Rank = max_rank;
  using Layers = std::vector<Conv<Scalar, Rank>>;

  ShiftEnds(const Conv<Scalar, Rank>& target, std::vector<ConvShape<Rank>> shapes,
            AnyGenerator& generator)
      : target_(target), shapes_(std::move(shapes)), generator_(generator) {}

  /// The layers, or none where no layer's neighbours can hold the copies that the kernel takes.
  Layers layers() {
    const std::vector<std::size_t> order = largest_first(shapes_);
    for (const std::size_t free : order) {
      if (find_shifts(free)) return build(free);
    }
    return {};
  }

 private:
  /// Fills shifts_ for this free layer; false where the maps are too narrow or the kernel out of
  /// reach.
  bool find_shifts(std::size_t free) {
    Index copies_before = 1, copies_after = 1;
    for (int axis = 0; axis < Rank; ++axis) {
      Index before = 0, after = 0;
      for (std::size_t l = 0; l < shapes_.size(); ++l) {
        if (l != free) (l < free ? before : after) += shapes_[l].kernel_size[axis] - 1;
      }
      const Index extent = target_.shape().kernel_size[axis], own = shapes_[free].kernel_size[axis];
      if (before + after + own != extent) return false;  // dilated taps, which cover never all
      const auto shifts = cover(extent, own, before, after);
      if (!shifts) return false;
      shifts_[static_cast<std::size_t>(axis)] = *shifts;
      copies_before *= static_cast<Index>(shifts->before.size());
      copies_after *= static_cast<Index>(shifts->after.size());
    }
    for (std::size_t map = 1; map < shapes_.size(); ++map) {
      const bool is_before = map <= free;
      const Index used =
          is_before ? copies_before * target_.shape().in : copies_after * target_.shape().out;
      if (shapes_[map].in < used) return false;
    }
    return true;
  }

  Layers build(std::size_t free) {
    Layers layers;
    for (const ConvShape<Rank>& shape : shapes_) layers.emplace_back(shape);
    PerAxis<Rank> before_count, after_count;
    for (int axis = 0; axis < Rank; ++axis) {
      before_count[axis] = static_cast<Index>(at(axis).before.size());
      after_count[axis] = static_cast<Index>(at(axis).after.size());
    }
    const Index in = target_.shape().in, out = target_.shape().out, last = std::ssize(shapes_) - 1;
    const Index used_before = free == 0 ? in : numel(before_count) * in;
    const Index used_after = std::cmp_equal(free, last) ? out : numel(after_count) * out;

    // What may be anything.
    for (std::size_t l = 0; l < layers.size(); ++l) {
      const bool reads_inputs = l == 0, writes_outputs = std::cmp_equal(l, last);
      const Index used_in = l <= free ? used_before : used_after;
      const Index used_out = l < free ? used_before : used_after;
      const auto arbitrary = [&](Index o, Index c) {
        const bool spare_in = !reads_inputs && c >= used_in,
                   spare_out = !writes_outputs && o >= used_out;
        if (l < free) return spare_in;   // a spare channel before the free layer stays zero
        if (l > free) return spare_out;  // one after it is never read
        return spare_in || spare_out;
      };
      randomize(layers[l], arbitrary);
    }

    // The copies before the free layer and after it.
    const auto carry = [&](std::size_t begin, std::size_t end, const PerAxis<Rank>& count,
                           Index channels, std::vector<Index> Shifts::* side, bool from_single,
                           bool to_single) {
      for_each_position(count, [&](const PerAxis<Rank>& copy) {
        PerAxis<Rank> left;
        for (int axis = 0; axis < Rank; ++axis) {
          left[axis] = (at(axis).*side)[static_cast<std::size_t>(copy[axis])];
        }
        const Index first = flat(copy, count) * channels;
        for (std::size_t l = begin; l < end; ++l) {
          PerAxis<Rank> tap;
          for (int axis = 0; axis < Rank; ++axis) {
            tap[axis] = std::min(left[axis], shapes_[l].kernel_size[axis] - 1);
            left[axis] -= tap[axis];
          }
          for (Index c = 0; c < channels; ++c) {
            const Index row = to_single && l + 1 == end ? c : first + c;
            const Index column = from_single && l == begin ? c : first + c;
            element(layers[l], row, column, tap) = Scalar(1);
          }
        }
      });
    };
    carry(0, free, before_count, in, &Shifts::before, true, false);
    carry(free + 1, layers.size(), after_count, out, &Shifts::after, false, true);

    // The target's elements, each where the first pair of copies that reaches its tap has it.
    std::vector<bool> placed(static_cast<std::size_t>(numel(target_.shape().kernel_size)), false);
    for_each_position(after_count, [&](const PerAxis<Rank>& after) {
      for_each_position(before_count, [&](const PerAxis<Rank>& before) {
        for_each_position(shapes_[free].kernel_size, [&](const PerAxis<Rank>& tap) {
          PerAxis<Rank> wanted;
          for (int axis = 0; axis < Rank; ++axis) {
            wanted[axis] = at(axis).after[static_cast<std::size_t>(after[axis])] +
                           at(axis).before[static_cast<std::size_t>(before[axis])] + tap[axis];
          }
          const auto index = static_cast<std::size_t>(flat(wanted, target_.shape().kernel_size));
          if (placed[index]) return;
          placed[index] = true;
          for (Index o = 0; o < out; ++o) {
            for (Index c = 0; c < in; ++c) {
              element(layers[free], flat(after, after_count) * out + o,
                      flat(before, before_count) * in + c, tap) = element(target_, o, c, wanted);
            }
          }
        });
      });
    });
    return layers;
  }

  const Shifts& at(int axis) const { return shifts_[static_cast<std::size_t>(axis)]; }

  static Scalar& element(Conv<Scalar, Rank>& layer, Index o, Index c, const PerAxis<Rank>& tap) {
    const PerAxis<Rank>& kernel = layer.shape().kernel_size;
    return layer.weight()[static_cast<std::size_t>((o * layer.shape().in + c) * numel(kernel) +
                                                   flat(tap, kernel))];
  }

  /// As initialize_uniform; zero in scalars that have no fractions.
  template <class Which>
  void randomize(Conv<Scalar, Rank>& layer, Which&& which) {
    if constexpr (rounds<Scalar>) {
      const Index taps = numel(layer.shape().kernel_size);
      const double bound = 1 / std::sqrt(static_cast<double>(layer.shape().in * taps));
      auto to = layer.weight().begin();
      for (Index o = 0; o < layer.shape().out; ++o) {
        for (Index c = 0; c < layer.shape().in; ++c) {
          const bool chosen = which(o, c);
          for (Index tap = 0; tap < taps; ++tap, ++to) {
            if (chosen) *to = static_cast<Scalar>(random_uniform(generator_, bound));
          }
        }
      }
    }
  }

  Conv<Scalar, Rank> target_;
  std::vector<ConvShape<Rank>> shapes_;
  AnyGenerator& generator_;
  std::array<Shifts, static_cast<std::size_t>(Rank)> shifts_;
};

}  // namespace concertina::detail
