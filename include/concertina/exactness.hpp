// Where a product of layers equals its factors: everywhere, or everywhere but a border of known
// width.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/geometry.hpp>

#include <algorithm>
#include <limits>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace concertina {

/// Outputs at which a contraction may differ from its chain: those fewer than `start` positions
/// from the start of an axis or fewer than `end` from its end. Elsewhere the two agree before
/// rounding, for all weights. The widths are attained: for generic weights some output at that
/// depth does differ.
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
  Index kernel, stride, dilation, start, end;
};

/// Border of a product along one axis, and whether any output sees the input there at all.
struct AxisBorder {
  Index taps_start = 0, taps_end = 0;  ///< because a padded position would have seen the input
  Index bias_start = 0, bias_end = 0;  ///< because a padded position would have had a bias
  bool sees_input = false;
};

/// Paths from an output position through one tap of every layer down to the input decide
/// everything. The contraction sums over all paths that end on the input; the chain drops those
/// which leave an intermediate map on the way, because there the next layer's padding says zero. So
/// an output is affected where such a path exists. The same holds for a bias on the way, which the
/// contraction always adds.
///
/// Judging neighbouring pairs is not enough: in 3x3 p1, 1x1, 3x3 p1 without biases each pair is
/// exact, yet the padding of the last layer stands for values of the first that are not zero. So
/// whole paths are followed, by dynamic programming from the input upwards: for each position of
/// each map, virtual ones included, which kinds of path lead down from it.
/// Cost  sum over layers of positions * kernel
class AxisPaths {
 public:
  /// `first_bias` is the first layer with a bias (of those before the last), or `layers.size()` for
  /// none.
  AxisPaths(std::span<const AxisStep> layers, std::size_t first_bias)
      : layers_(layers), first_bias_(first_bias) {}

  AxisBorder border(Index input_size) const {
    const std::size_t count = layers_.size();
    std::vector<Index> size(count + 1, input_size), low(count + 1), high(count + 1);
    for (std::size_t l = 0; l < count; ++l) size[l + 1] = positions(layers_[l], size[l]);
    low[count] = 0;
    high[count] = size[count] - 1;
    Index work = 0;
    for (std::size_t l = count; l-- > 0;) {
      const AxisStep& layer = layers_[l];
      low[l] = checked_multiply(low[l + 1], layer.stride, "exactness") - layer.start;
      high[l] = checked_multiply(high[l + 1], layer.stride, "exactness") - layer.start +
                layer.dilation * (layer.kernel - 1);
      work = checked_add(work,
                         checked_multiply(high[l + 1] - low[l + 1] + 1, layer.kernel, "exactness"),
                         "exactness");
    }
    if (work > most_work || high[0] - low[0] >= most_work) {
      throw SizeError("exactness: following " + std::to_string(work) +
                      " taps of a padded chain is too much; pad the first layer only");
    }

    std::vector<unsigned char> below, here(static_cast<std::size_t>(high[0] - low[0] + 1));
    for (Index i = std::max<Index>(low[0], 0); i <= std::min(high[0], input_size - 1); ++i) {
      here[static_cast<std::size_t>(i - low[0])] = sees;
    }
    for (std::size_t l = 0; l < count; ++l) {
      below = std::move(here);
      here.assign(static_cast<std::size_t>(high[l + 1] - low[l + 1] + 1), 0);
      const AxisStep& layer = layers_[l];
      const bool output = l + 1 == count;
      for (Index i = low[l + 1]; i <= high[l + 1]; ++i) {
        unsigned char& paths = here[static_cast<std::size_t>(i - low[l + 1])];
        const Index first = i * layer.stride - layer.start - low[l];
        for (Index a = 0; a < layer.kernel; ++a) {
          paths |= below[static_cast<std::size_t>(first + a * layer.dilation)];
        }
        if (output || (i >= 0 && i < size[l + 1])) continue;
        if (paths & sees) paths |= i < 0 ? taps_start : taps_end;
        if (l >= first_bias_) paths |= i < 0 ? bias_start : bias_end;
      }
    }

    AxisBorder border;
    for (Index j = 0; j < size[count]; ++j) {
      const unsigned char paths = here[static_cast<std::size_t>(j)];
      const auto widen = [&](Path kind, Index& width, Index reach) {
        if (paths & kind) width = std::max(width, reach);
      };
      border.sees_input = border.sees_input || (paths & sees) != 0;
      widen(taps_start, border.taps_start, j + 1);
      widen(bias_start, border.bias_start, j + 1);
      widen(taps_end, border.taps_end, size[count] - j);
      widen(bias_end, border.bias_end, size[count] - j);
    }
    return border;
  }

  /// From this size on, the start and the end of a map are too far apart to meet, and the border
  /// depends only on the size modulo the period. Smaller maps have no wider borders: they see less.
  Index settled_size() const {
    Index reach = 1, scale = 1;
    for (const AxisStep& layer : layers_) {
      const Index local = layer.dilation * (layer.kernel - 1) + std::abs(layer.start) +
                          std::abs(layer.end) + layer.stride;
      reach = checked_add(reach, checked_multiply(scale, local, "exactness"), "exactness");
      scale = checked_multiply(scale, layer.stride, "exactness");
    }
    return checked_multiply(4, reach, "exactness");
  }

  Index period() const {
    Index product = 1;
    for (const AxisStep& layer : layers_) product *= layer.stride;
    return product;
  }

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
  /// Kinds of path that lead down from a position; a set of them is a sum.
  enum Path : unsigned char {
    sees = 1,
    taps_start = 2,
    taps_end = 4,
    bias_start = 8,
    bias_end = 16
  };

  static constexpr Index most_work = Index{1} << 28;  // a second; real layers need thousands

  static Index positions(const AxisStep& layer, Index size) {
    return floor_divide(size + layer.start + layer.end - layer.dilation * (layer.kernel - 1) - 1,
                        layer.stride) +
           1;
  }

  std::span<const AxisStep> layers_;
  std::size_t first_bias_;
};

/// Throws ShapeError unless each layer reads as many channels as the one before it writes.
template <int Rank>
void require_chain(std::span<const ConvShape<Rank>> layers, const char* what) {
  if (layers.empty()) throw ShapeError(std::string(what) + ": no layers");
  for (std::size_t l = 0; l < layers.size(); ++l) {
    validate(layers[l]);
    if (l > 0 && layers[l].in != layers[l - 1].out) {
      throw ShapeError(std::string(what) + ": layer " + std::to_string(l + 1) + " reads " +
                       std::to_string(layers[l].in) + " channels (" + to_string(layers[l]) +
                       "), layer " + std::to_string(l) + " writes " +
                       std::to_string(layers[l - 1].out) + " (" + to_string(layers[l - 1]) + ")");
    }
  }
}

/// Throws SizeError for distances beyond any map, so that positions are computed without overflow.
template <int Rank>
void require_traceable(const ConvShape<Rank>& layer) {
  constexpr Index farthest = Index{1} << 40;
  const auto too_far = [](Index distance) { return distance > farthest || distance < -farthest; };
  const auto& [stride, padding, dilation, groups] = layer.geometry;
  for (int axis = 0; axis < Rank; ++axis) {
    if (too_far(padding.start[axis]) || too_far(padding.end[axis]) || too_far(stride[axis]) ||
        too_far(span(layer, axis))) {
      throw SizeError("exactness: a padding, stride or kernel beyond any map (" + to_string(layer) +
                      ")");
    }
  }
}

/// The border of the product, without a reason.
template <int Rank>
Exactness<Rank> border(std::span<const ConvShape<Rank>> layers,
                       const std::optional<PerAxis<Rank>>& input_size) {
  Exactness<Rank> result;
  // Where no layer but the first pads, no path ever leaves a map.
  const auto pads = [](const ConvShape<Rank>& layer) {
    const auto positive = [](Index p) { return p > 0; };
    return std::ranges::any_of(layer.geometry.padding.start, positive) ||
           std::ranges::any_of(layer.geometry.padding.end, positive);
  };
  if (std::none_of(layers.begin() + 1, layers.end(), pads)) return result;

  // The last layer's bias is added after everything; only those before it meet a padding.
  const auto biased = std::find_if(layers.begin(), layers.end() - 1,
                                   [](const ConvShape<Rank>& layer) { return layer.bias; });
  const auto first_bias = static_cast<std::size_t>(
      (biased == layers.end() - 1 ? layers.end() : biased) - layers.begin());
  for (const ConvShape<Rank>& layer : layers) require_traceable(layer);
  std::vector<AxisBorder> axes;
  for (int axis = 0; axis < Rank; ++axis) {
    std::vector<AxisStep> steps;
    for (const ConvShape<Rank>& layer : layers) {
      const auto& [stride, padding, dilation, groups] = layer.geometry;
      steps.push_back({layer.kernel[axis], stride[axis], dilation[axis], padding.start[axis],
                       padding.end[axis]});
    }
    const AxisPaths paths(steps, first_bias);
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

template <int Rank>
Exactness<Rank> exactness(std::span<const ConvShape<Rank>> layers,
                          const std::optional<PerAxis<Rank>>& input_size) {
  require_chain(layers, "exactness");
  if (input_size) {
    PerAxis<Rank> size = *input_size;
    for (const ConvShape<Rank>& layer : layers) size = output_size(layer, size);
  }
  Exactness<Rank> result = border(layers, input_size);
  if (result.exact()) return result;
  std::size_t culprit = 2;
  while (culprit < layers.size() && border(layers.first(culprit), input_size).exact()) ++culprit;
  const ConvShape<Rank>& layer = layers[culprit - 1];
  result.reason = "layer " + std::to_string(culprit) + " (" + to_string(layer) +
                  ") pads with zeros where its input, continued beyond its border, is not zero";
  return result;
}

}  // namespace detail

/// Where the product of `layers` (the first applied first) equals its factors, judged from shapes
/// alone: the widest border over all input sizes.
/// Throws  ShapeError for channels that do not fit, naming both layers
template <int Rank>
Exactness<Rank> exactness(std::span<const ConvShape<Rank>> layers) {
  return detail::exactness<Rank>(layers, std::nullopt);
}

/// The same at one input size, where the border may be narrower: 3x3 p1 and then 3x3 stride 2 p1
/// have none at the end for even sizes and one for odd ones.
/// Throws  ShapeError also where a map becomes smaller than the next kernel
template <int Rank>
Exactness<Rank> exactness(std::span<const ConvShape<Rank>> layers,
                          std::type_identity_t<PerAxis<Rank>> input_size) {
  return detail::exactness<Rank>(layers, input_size);
}

}  // namespace concertina
