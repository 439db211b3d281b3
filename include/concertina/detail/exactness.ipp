// How the border of a contraction is found: paths from an output down to the input, axis by axis.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/exactness.hpp>

#include <algorithm>
#include <span>
#include <vector>

namespace concertina {
namespace detail {

/// Border of an expression along one axis, and whether any output sees the input there at all.
struct AxisBorder {
  Index taps_start = 0, taps_end = 0;  ///< because a padded position would have seen the input
  Index bias_start = 0, bias_end = 0;  ///< because a padded position would have had a bias
  bool sees_input = false;
};

/// Paths from an output position through one tap of every layer down to the input decide
/// everything. The contraction sums over all paths that end on the input; the chain drops those
/// which leave an intermediate map on the way, because there the next layer's padding says zero. So
/// an output is affected where such a path exists. The same holds for a bias on the way, which the
/// contraction always adds. Parallel branches only offer more paths.
///
/// Judging neighbouring pairs is not enough: in 3x3 p1, 1x1, 3x3 p1 without biases each pair is
/// exact, yet the padding of the last layer stands for values of the first that are not zero. So
/// whole paths are followed, by dynamic programming from the input upwards: for each position of
/// each map, virtual ones included, which kinds of path lead down from it.
/// Cost  sum over layers of positions * kernel
class AxisPaths {
 public:
  /// Only every `spacing`-th input, from the first to the last, is not zero.
  AxisPaths(const AnyForm& form, int axis, Index spacing)
      : form_(form), axis_(axis), spacing_(spacing) {}

  AxisBorder border(Index input_size) const {
    const Index outputs = positions(form_, input_size);
    const Range all{0, outputs - 1};
    Index work = 0;
    const Range read = read_range(form_, all, work);
    if (work > most_work || read.last - read.first >= most_work) {
      fail<SizeError>({"exactness: following ", work,
                       " taps of a padded chain is too much; pad the first layer only"});
    }
    Map input(read);
    const Index first = -floor_divide(-std::max<Index>(read.first, 0), spacing_) * spacing_;
    for (Index i = first; i <= std::min(read.last, input_size - 1); i += spacing_) {
      input.at(i) = sees;
    }
    Map output = lead(form_, input, input_size, all);

    AxisBorder border;
    for (Index j = 0; j < outputs; ++j) {
      const unsigned char paths = output.at(j);
      const auto widen = [&](Path kind, Index& width, Index depth) {
        if (paths & kind) width = std::max(width, depth);
      };
      border.sees_input = border.sees_input || (paths & sees) != 0;
      widen(taps_start, border.taps_start, j + 1);
      widen(bias_start, border.bias_start, j + 1);
      widen(taps_end, border.taps_end, outputs - j);
      widen(bias_end, border.bias_end, outputs - j);
    }
    return border;
  }

  /// From this size on, the start and the end of a map are too far apart to meet, and the border
  /// depends only on the size modulo the period. Smaller maps have no wider borders: they see less.
  Index settled_size() const {
    return checked_multiply(4, checked_add(1, extent(form_, 1), "exactness"), "exactness");
  }

  /// The product of the strides and the spacing.
  Index period() const { return checked_multiply(stride(form_), spacing_, "exactness"); }

  /// The same border as that of `size`, at a size that is not much larger than it needs to be.
  Index equivalent_size(Index size) const {
    const Index settled = settled_size();
    return size <= settled ? size : settled + (size - settled) % period();
  }

  /// The widest border over all input sizes.
  AxisBorder worst() const {
    AxisBorder worst;
    const Index settled = settled_size();
    if (checked_multiply(period(), settled, "exactness") >= most_work) {
      fail<SizeError>({"exactness: strides of ", period(),
                       " in all are too many input sizes to follow; name the input size"});
    }
    for (Index size = settled; size < settled + period(); ++size) {
      if ((size - 1) % spacing_ != 0) continue;
      const AxisBorder at_size = border(size);
      worst.taps_start = std::max(worst.taps_start, at_size.taps_start);
      worst.taps_end = std::max(worst.taps_end, at_size.taps_end);
      worst.bias_start = std::max(worst.bias_start, at_size.bias_start);
      worst.bias_end = std::max(worst.bias_end, at_size.bias_end);
    }
    worst.sees_input = true;
    return worst;
  }

 private:
  using Node = AnyForm;

  /// Kinds of path that lead down from a position; a set of them is a sum.
  enum Path : unsigned char {
    sees = 1,
    taps_start = 2,
    taps_end = 4,
    bias_start = 8,
    bias_end = 16,
    biased = 32  ///< a bias was added on the way, so a position off the map would not be zero
  };

  struct Range {
    Index first, last;
  };

  /// The kinds of path from each position of a range, which may lie off the map.
  struct Map {
    explicit Map(Range positions)
        : range(positions), paths(static_cast<std::size_t>(positions.last - positions.first + 1)) {}
    unsigned char& at(Index i) { return paths[static_cast<std::size_t>(i - range.first)]; }
    unsigned char at(Index i) const { return paths[static_cast<std::size_t>(i - range.first)]; }

    Range range;
    std::vector<unsigned char> paths;
  };

  static constexpr Index most_work = Index{1} << 28;  // a second; real layers need thousands

  Index positions(const Node& node, Index size) const {
    if (node.is_leaf()) {
      const AnyShape& layer = node.leaf();
      const Index last = layer.dilation[axis_] * (layer.kernel_size[axis_] - 1);
      return floor_divide(size + layer.padding.start[axis_] + layer.padding.end[axis_] - last - 1,
                          layer.stride[axis_]) +
             1;
    }
    if (node.join() != Join::chain) return positions(node.parts().front(), size);
    for (const Node& part : node.parts()) size = positions(part, size);
    return size;
  }

  /// The input positions that outputs of a range read, and the taps on the way.
  Range read_range(const Node& node, Range range, Index& work) const {
    if (node.is_leaf()) {
      const AnyShape& layer = node.leaf();
      const auto read = [&](Index output, Index offset) {
        return checked_multiply(output, layer.stride[axis_], "exactness") -
               layer.padding.start[axis_] + offset;
      };
      work = checked_add(
          work,
          checked_multiply(range.last - range.first + 1, layer.kernel_size[axis_], "exactness"),
          "exactness");
      return {read(range.first, 0),
              read(range.last, layer.dilation[axis_] * (layer.kernel_size[axis_] - 1))};
    }
    if (node.join() == Join::chain) {
      for (auto part = node.parts().rbegin(); part != node.parts().rend(); ++part) {
        range = read_range(*part, range, work);
      }
      return range;
    }
    Range all = read_range(node.parts().front(), range, work);
    for (const Node& part : std::span(node.parts()).subspan(1)) {
      const Range more = read_range(part, range, work);
      all = {std::min(all.first, more.first), std::max(all.last, more.last)};
    }
    return all;
  }

  /// The paths from outputs of a range, given those from the input that they read.
  Map lead(const Node& node, const Map& below, Index size, Range range) const {
    Map here(range);
    if (node.is_leaf()) {
      const AnyShape& layer = node.leaf();
      for (Index i = range.first; i <= range.last; ++i) {
        unsigned char paths = layer.bias ? biased : 0;
        const Index first = i * layer.stride[axis_] - layer.padding.start[axis_];
        for (Index a = 0; a < layer.kernel_size[axis_]; ++a)
          paths |= below.at(first + a * layer.dilation[axis_]);
        here.at(i) = paths;
      }
      return here;
    }
    if (node.join() != Join::chain) {
      for (const Node& part : node.parts()) {
        const Map branch = lead(part, below, size, range);
        for (Index i = range.first; i <= range.last; ++i) here.at(i) |= branch.at(i);
      }
      return here;
    }
    const std::vector<Node>& parts = node.parts();
    std::vector<Range> ranges(parts.size(), range);  // of each part's output
    Index unused = 0;
    for (std::size_t p = parts.size() - 1; p > 0; --p) {
      ranges[p - 1] = read_range(parts[p], ranges[p], unused);
    }
    here = lead(parts.front(), below, size, ranges.front());
    for (std::size_t p = 1; p < parts.size(); ++p) {
      size = positions(parts[p - 1], size);
      leave_map(here, size);
      here = lead(parts[p], here, size, ranges[p]);
    }
    return here;
  }

  /// Marks what a chain drops: positions off a map between two layers that would not be zero.
  static void leave_map(Map& map, Index size) {
    for (Index i = map.range.first; i <= map.range.last; ++i) {
      if (i >= 0 && i < size) continue;
      unsigned char& paths = map.at(i);
      if (paths & biased) paths |= i < 0 ? bias_start : bias_end;
      if (paths & sees) paths |= i < 0 ? taps_start : taps_end;
    }
  }

  /// How far a map's ends carry, where one step of its input is `scale` of the first input's.
  Index extent(const Node& node, Index scale) const {
    if (node.is_leaf()) {
      const AnyShape& layer = node.leaf();
      return checked_multiply(scale,
                              layer.dilation[axis_] * (layer.kernel_size[axis_] - 1) +
                                  std::abs(layer.padding.start[axis_]) +
                                  std::abs(layer.padding.end[axis_]) + layer.stride[axis_],
                              "exactness");
    }
    Index result = 0;
    for (const Node& part : node.parts()) {
      const Index more = extent(part, scale);
      if (node.join() == Join::chain) {
        result = checked_add(result, more, "exactness");
        scale = checked_multiply(scale, stride(part), "exactness");
      } else {
        result = std::max(result, more);
      }
    }
    return result;
  }

  Index stride(const Node& node) const {
    if (node.is_leaf()) return node.leaf().stride[axis_];
    if (node.join() != Join::chain) return stride(node.parts().front());
    Index product = 1;
    for (const Node& part : node.parts()) {
      product = checked_multiply(product, stride(part), "exactness");
    }
    return product;
  }

  const AnyForm& form_;
  int axis_;
  Index spacing_;
};

/// Throws SizeError for distances beyond any map, so that positions are computed without overflow.
inline void require_traceable(const AnyShape& layer) {
  constexpr Index farthest = Index{1} << 40;
  const auto too_far = [](Index distance) { return distance > farthest || distance < -farthest; };
  for (int axis = 0; axis < max_rank; ++axis) {
    if (too_far(layer.padding.start[axis]) || too_far(layer.padding.end[axis]) ||
        too_far(layer.stride[axis]) || too_far(effective_kernel_size(layer, axis))) {
      fail<SizeError>({"exactness: a padding, stride or kernel beyond any map (", layer, ")"});
    }
  }
}

/// Whether a layer pads what another one wrote; where none does, no path ever leaves a map.
inline bool pads_between(const AnyForm& form, bool first = true) {
  if (form.is_leaf()) {
    const auto positive = [](Index p) { return p > 0; };
    const auto& [start, end] = form.leaf().padding;
    return !first && (std::ranges::any_of(start, positive) || std::ranges::any_of(end, positive));
  }
  for (const AnyForm& part : form.parts()) {
    if (pads_between(part, first)) return true;
    if (form.join() == Join::chain) first = false;
  }
  return false;
}

/// Exactness of any rank.
struct AnyExactness {
  Axes start = 0, end = 0;
  std::string reason = {};

  bool exact() const { return start == Axes(0) && end == Axes(0); }
};

/// The border of the contraction, without a reason.
inline AnyExactness border(const AnyForm& form, const std::optional<Axes>& input_size,
                           const Axes& spacing = 1) {
  AnyExactness result;
  if (!pads_between(form)) return result;
  form.for_each_leaf([](const AnyShape& layer) { require_traceable(layer); });
  const int rank = rank_in(form);
  std::vector<AxisBorder> axes;
  for (int axis = 0; axis < rank; ++axis) {
    const AxisPaths paths(form, axis, spacing[axis]);
    axes.push_back(input_size ? paths.border(paths.equivalent_size((*input_size)[axis]))
                              : paths.worst());
  }
  const auto blind = std::ranges::count(axes, false, &AxisBorder::sees_input);
  for (int axis = 0; axis < rank; ++axis) {
    const AxisBorder& at = axes[static_cast<std::size_t>(axis)];
    // An output that sees only padding along another axis is a bias either way.
    const bool matters = blind == 0 || (blind == 1 && !at.sees_input);
    result.start[axis] = std::max(matters ? at.taps_start : 0, at.bias_start);
    result.end[axis] = std::max(matters ? at.taps_end : 0, at.bias_end);
  }
  return result;
}

/// Which layer pads so that the form, whose border is not empty, has one.
inline std::string culprit(const AnyForm& form, const std::optional<Axes>& input_size,
                           const Axes& spacing) {
  const std::vector<AnyForm>& parts = form.parts();
  std::optional<Axes> size = input_size;  // of the part's input
  std::size_t p = 0;
  for (bool found = false; !found; ++p) {
    if (!parts[p].is_leaf() && !border(parts[p], size, spacing).exact()) {
      return culprit(parts[p], size, spacing);
    }
    if (form.join() != Join::chain) continue;
    if (size) size = output_size(parts[p], *size);
    const AnyForm so_far(Join::chain, std::span(parts).first(p + 1));
    found = !border(so_far, input_size, spacing).exact();
  }
  return text({"layer ", p, " (", parts[p - 1], ")"});
}

/// Where only every `spacing`-th input is not zero, the layers have stride 1.
inline AnyExactness find_exactness(const AnyForm& form, const std::optional<Axes>& input_size,
                                   const Axes& spacing = 1) {
  require_valid(form, input_size);
  if (input_size) static_cast<void>(output_size(form, *input_size));
  AnyExactness result = border(form, input_size, spacing);
  if (result.exact()) return result;
  result.reason = culprit(form, input_size, spacing) +
                  " pads with zeros where its input, continued beyond its border, is not zero";
  return result;
}

/// The same of the rank that the form has.
template <int Rank>
Exactness<Rank> find_exactness(const Form<Rank>& form,
                               const std::optional<PerAxis<Rank>>& input_size,
                               const PerAxis<Rank>& spacing) {
  const AnyExactness found =
      find_exactness(form.tree(), any_size(input_size), all_axes(spacing, 1));
  return {first_axes<Rank>(found.start), first_axes<Rank>(found.end), found.reason};
}

inline void require_exact(const AnyForm& form, const std::optional<Axes>& input_size) {
  const AnyExactness found = find_exactness(form, input_size);
  if (found.exact()) return;
  const int rank = rank_in(form);
  fail<InexactError>({"no single layer equals this chain", input_size ? " at input size " : "",
                      input_size ? to_string(*input_size, rank) : std::string(), ": ", found.reason,
                      "; a border of ", Extents{found.start, rank}, " outputs at the start and ",
                      Extents{found.end, rank},
                      " at the end differs. Pad the first layer instead, or contract with ",
                      input_size ? "interior_only" : "interior_only or exact_at(size)"});
}

}  // namespace detail

template <FormSource E>
Exactness<detail::form_rank<E>> exactness(
    const E& expression,
    const std::type_identity_t<std::optional<PerAxis<detail::form_rank<E>>>>& input_size) {
  constexpr int Rank = detail::form_rank<E>;
  return detail::find_exactness<Rank>(Form<Rank>(expression), input_size, 1);
}

template <int Rank>
void Border<Rank>::require(const Form<Rank>& form) const {
  if (!interior_only) detail::require_exact(form.tree(), detail::any_size(input_size));
}

}  // namespace concertina
