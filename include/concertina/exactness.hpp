// Where a contraction equals its expression: everywhere, or everywhere but a border of known width;
// and what a caller accepts there.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/form.hpp>

#include <algorithm>
#include <concepts>
#include <limits>
#include <optional>
#include <span>
#include <string>
#include <type_traits>
#include <variant>
#include <vector>

namespace concertina {

/// Outputs at which a contraction may differ from its chain: those fewer than `start` positions
/// from the start of an axis or fewer than `end` from its end. Elsewhere the two agree before
/// rounding, for all weights. The widths are attained: for generic weights some output at that
/// depth does differ. (Behind a concatenation, whose channels are not told apart, they may be wider
/// than that.)
template <int Rank>
struct Exactness {
  PerAxis<Rank> start = 0;
  PerAxis<Rank> end = 0;
  std::string reason;  ///< which factor pads what, and why that matters; empty where exact

  /// True where the product equals its factors everywhere.
  bool exact() const noexcept { return start == PerAxis<Rank>(0) && end == PerAxis<Rank>(0); }
  explicit operator bool() const noexcept { return exact(); }
};

namespace detail {

/// What one layer does along one axis.
struct AxisStep {
  Index kernel_size, stride, dilation, start, end;
  bool bias;
};

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
  explicit AxisPaths(Tree<AxisStep> form) : form_(std::move(form)) {}

  AxisBorder border(Index input_size) const {
    const Index outputs = positions(form_, input_size);
    const Range all{0, outputs - 1};
    Index work = 0;
    const Range read = reach(form_, all, work);
    if (work > most_work || read.last - read.first >= most_work) {
      throw SizeError("exactness: following " + std::to_string(work) +
                      " taps of a padded chain is too much; pad the first layer only");
    }
    Map input(read);
    for (Index i = std::max<Index>(read.first, 0); i <= std::min(read.last, input_size - 1); ++i) {
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

  /// The product of the strides.
  Index period() const { return stride(form_); }

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
      throw SizeError("exactness: strides of " + std::to_string(period()) +
                      " in all are too many input sizes to follow; name the input size");
    }
    for (Index size = settled; size < settled + period(); ++size) {
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
  using Node = Tree<AxisStep>;

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

  static Index positions(const Node& node, Index size) {
    if (node.is_leaf()) {
      const AxisStep& layer = node.leaf();
      const Index span = layer.dilation * (layer.kernel_size - 1);
      return floor_divide(size + layer.start + layer.end - span - 1, layer.stride) + 1;
    }
    if (node.join() != Join::chain) return positions(node.parts().front(), size);
    for (const Node& part : node.parts()) size = positions(part, size);
    return size;
  }

  /// The input positions that outputs of a range read, and the taps on the way.
  static Range reach(const Node& node, Range range, Index& work) {
    if (node.is_leaf()) {
      const AxisStep& layer = node.leaf();
      const auto read = [&](Index output, Index offset) {
        return checked_multiply(output, layer.stride, "exactness") - layer.start + offset;
      };
      work = checked_add(
          work, checked_multiply(range.last - range.first + 1, layer.kernel_size, "exactness"),
          "exactness");
      return {read(range.first, 0), read(range.last, layer.dilation * (layer.kernel_size - 1))};
    }
    if (node.join() == Join::chain) {
      for (auto part = node.parts().rbegin(); part != node.parts().rend(); ++part) {
        range = reach(*part, range, work);
      }
      return range;
    }
    Range all = reach(node.parts().front(), range, work);
    for (const Node& part : std::span(node.parts()).subspan(1)) {
      const Range more = reach(part, range, work);
      all = {std::min(all.first, more.first), std::max(all.last, more.last)};
    }
    return all;
  }

  /// The paths from outputs of a range, given those from the input that they read.
  static Map lead(const Node& node, const Map& below, Index size, Range range) {
    Map here(range);
    if (node.is_leaf()) {
      const AxisStep& layer = node.leaf();
      for (Index i = range.first; i <= range.last; ++i) {
        unsigned char paths = layer.bias ? biased : 0;
        const Index first = i * layer.stride - layer.start;
        for (Index a = 0; a < layer.kernel_size; ++a) paths |= below.at(first + a * layer.dilation);
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
      ranges[p - 1] = reach(parts[p], ranges[p], unused);
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
  static Index extent(const Node& node, Index scale) {
    if (node.is_leaf()) {
      const AxisStep& layer = node.leaf();
      return checked_multiply(scale,
                              layer.dilation * (layer.kernel_size - 1) + std::abs(layer.start) +
                                  std::abs(layer.end) + layer.stride,
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

  static Index stride(const Node& node) {
    if (node.is_leaf()) return node.leaf().stride;
    if (node.join() != Join::chain) return stride(node.parts().front());
    Index product = 1;
    for (const Node& part : node.parts()) {
      product = checked_multiply(product, stride(part), "exactness");
    }
    return product;
  }

  Node form_;
};

/// Throws SizeError for distances beyond any map, so that positions are computed without overflow.
template <int Rank>
void require_traceable(const ConvShape<Rank>& layer) {
  constexpr Index farthest = Index{1} << 40;
  const auto too_far = [](Index distance) { return distance > farthest || distance < -farthest; };
  const auto& padding = layer.padding;
  for (int axis = 0; axis < Rank; ++axis) {
    if (too_far(padding.start[axis]) || too_far(padding.end[axis]) || too_far(layer.stride[axis]) ||
        too_far(span(layer, axis))) {
      throw SizeError("exactness: a padding, stride or kernel beyond any map (" + to_string(layer) +
                      ")");
    }
  }
}

/// Whether a layer pads what another one wrote; where none does, no path ever leaves a map.
template <int Rank>
bool pads_between(const Form<Rank>& form, bool first = true) {
  if (form.is_leaf()) {
    const auto positive = [](Index p) { return p > 0; };
    const Padding<Rank>& padding = form.leaf().padding;
    return !first && (std::ranges::any_of(padding.start, positive) ||
                      std::ranges::any_of(padding.end, positive));
  }
  for (const Form<Rank>& part : form.parts()) {
    if (pads_between(part, first)) return true;
    if (form.join() == Join::chain) first = false;
  }
  return false;
}

/// The border of the contraction, without a reason.
template <int Rank>
Exactness<Rank> border(const Form<Rank>& form, const std::optional<PerAxis<Rank>>& input_size) {
  Exactness<Rank> result;
  if (!pads_between(form)) return result;
  form.for_each_leaf([](const ConvShape<Rank>& layer) { require_traceable(layer); });
  std::vector<AxisBorder> axes;
  for (int axis = 0; axis < Rank; ++axis) {
    const AxisPaths paths(form.map([&](const ConvShape<Rank>& layer) {
      const auto& padding = layer.padding;
      return AxisStep{layer.kernel_size[axis], layer.stride[axis], layer.dilation[axis],
                      padding.start[axis],     padding.end[axis],  layer.bias};
    }));
    axes.push_back(input_size ? paths.border(paths.equivalent_size((*input_size)[axis]))
                              : paths.worst());
  }
  const auto blind = std::ranges::count(axes, false, &AxisBorder::sees_input);
  for (int axis = 0; axis < Rank; ++axis) {
    const AxisBorder& at = axes[static_cast<std::size_t>(axis)];
    // An output that sees only padding along another axis is a bias either way.
    const bool matters = blind == 0 || (blind == 1 && !at.sees_input);
    result.start[axis] = std::max(matters ? at.taps_start : 0, at.bias_start);
    result.end[axis] = std::max(matters ? at.taps_end : 0, at.bias_end);
  }
  return result;
}

/// Which layer pads so that the expression, whose border is not empty, has one.
template <int Rank>
std::string culprit(const Form<Rank>& form, const std::optional<PerAxis<Rank>>& input_size) {
  const std::vector<Form<Rank>>& parts = form.parts();
  std::optional<PerAxis<Rank>> size = input_size;  // of the part's input
  std::size_t p = 0;
  for (bool found = false; !found; ++p) {
    if (!parts[p].is_leaf() && !border(parts[p], size)) return culprit(parts[p], size);
    if (form.join() != Join::chain) continue;
    if (size) size = output_size(parts[p], *size);
    const Form<Rank> so_far(Join::chain,
                            {parts.begin(), parts.begin() + static_cast<Index>(p) + 1});
    found = !border(so_far, input_size);
  }
  return "layer " + std::to_string(p) + " (" + to_string(parts[p - 1]) + ")";
}

template <int Rank>
Exactness<Rank> exactness(const Form<Rank>& form, const std::optional<PerAxis<Rank>>& input_size) {
  require_valid(form, "exactness", input_size);
  if (input_size) static_cast<void>(output_size(form, *input_size));
  Exactness<Rank> result = border(form, input_size);
  if (result.exact()) return result;
  result.reason = culprit(form, input_size) +
                  " pads with zeros where its input, continued beyond its border, is not zero";
  return result;
}

}  // namespace detail

/// Where the contraction of an expression equals it, judged from its form alone: the widest border
/// over all input sizes.
/// Throws  ShapeError for channels or branches that do not fit, naming both
template <int Rank>
Exactness<Rank> exactness(const Form<Rank>& form) {
  return detail::exactness<Rank>(form, std::nullopt);
}

/// The same at one input size, where the border may be narrower: 3x3 p1 and then 3x3 stride 2 p1
/// have none at the end for even sizes and one for odd ones.
/// Throws  ShapeError also where a map becomes smaller than the next kernel
template <int Rank>
Exactness<Rank> exactness(const Form<Rank>& form, std::type_identity_t<PerAxis<Rank>> input_size) {
  return detail::exactness<Rank>(form, input_size);
}

/// The same for layers one after another, the first applied first.
template <int Rank>
Exactness<Rank> exactness(std::span<const ConvShape<Rank>> layers) {
  detail::require_chain(layers, "exactness");
  return detail::exactness<Rank>(chain_form(layers), std::nullopt);
}
template <int Rank>
Exactness<Rank> exactness(std::span<const ConvShape<Rank>> layers,
                          std::type_identity_t<PerAxis<Rank>> input_size) {
  detail::require_chain(layers, "exactness");
  return detail::exactness<Rank>(chain_form(layers), input_size);
}

/// Contract although the result differs from the chain at the border that `exactness` states.
struct InteriorOnly {};
inline constexpr InteriorOnly interior_only{};

/// Contract if the result equals the chain at this input size, even if it does not at all sizes.
template <int Rank>
struct ExactAt {
  PerAxis<Rank> input_size;
};

/// exact_at(224, 224): one extent per spatial axis.
template <std::integral... Extents>
ExactAt<static_cast<int>(sizeof...(Extents))> exact_at(Extents... extents) {
  return {{static_cast<Index>(extents)...}};
}

/// What a caller accepts at the border; by default equality at every input size.
template <int Rank>
class BorderPolicy {
 public:
  BorderPolicy() = default;
  BorderPolicy(InteriorOnly policy) : policy_(policy) {}
  BorderPolicy(const ExactAt<Rank>& policy) : policy_(policy) {}

  /// The input size that is named, if one is.
  std::optional<PerAxis<Rank>> input_size() const {
    const auto* at = std::get_if<ExactAt<Rank>>(&policy_);
    return at ? std::optional(at->input_size) : std::nullopt;
  }

  /// Throws InexactError, with the border's widths and what to do, unless the expression satisfies
  /// the policy.
  void require(const Form<Rank>& form) const;

 private:
  std::variant<std::monostate, InteriorOnly, ExactAt<Rank>> policy_;
};

template <int Rank>
void BorderPolicy<Rank>::require(const Form<Rank>& form) const {
  if (std::holds_alternative<InteriorOnly>(policy_)) return;
  const std::optional<PerAxis<Rank>> at = input_size();
  const Exactness<Rank> found = at ? exactness(form, *at) : exactness(form);
  if (found) return;
  throw InexactError("no single layer equals this chain" +
                     (at ? " at input size " + to_string(*at) : std::string()) + ": " +
                     found.reason + "; a border of " + to_string(found.start) +
                     " outputs at the start and " + to_string(found.end) +
                     " at the end differs. Pad the first layer instead, or contract with " +
                     (at ? "interior_only" : "interior_only or exact_at(size)"));
}

}  // namespace concertina
