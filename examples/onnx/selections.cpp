// Operators that put elements elsewhere: each axis of the result says which index it reads.
// SPDX-License-Identifier: Apache-2.0
#include "operators.hpp"

#include <cmath>
#include <limits>
#include <numeric>
#include <optional>

namespace tool::evaluation {
namespace {

/// For each axis the indices to read, -1 outside of the array; none: all of them.
using Indices = std::vector<std::optional<Shape>>;

/// 0, 1, ..., n - 1
Shape upto(Index n) {
  Shape indices(static_cast<std::size_t>(count(Shape{n})));
  std::iota(indices.begin(), indices.end(), Index{0});
  return indices;
}

/// y[i, j, ...] = x[offsets[0][i] + offsets[1][j] + ...], `outside` where one is negative.
template <class Scalar>
Array<Scalar> collect(const Array<Scalar>& x, const std::vector<Shape>& offsets,
                      Scalar outside = 0) {
  Shape shape;
  for (const Shape& axis : offsets) shape.push_back(std::ssize(axis));
  auto y = zeros<Scalar>(shape);
  // The last axes in one piece, as far as they are.
  std::size_t axes = offsets.size();
  Index block = 1;
  const auto in_order = [&](const Shape& axis) {
    for (Index i = 0; i < std::ssize(axis); ++i) {
      if (axis[i] != i * block) return false;
    }
    return true;
  };
  while (axes > 0 && in_order(offsets[axes - 1])) block *= shape[--axes];
  if (y.values.empty()) return y;
  Scalar* to = y.values.data();
  const auto copy = [&](const auto& self, std::size_t axis,
                        const Scalar* from) -> void {  // null: outside
    if (axis == axes) {
      to = from ? std::copy_n(from, block, to) : std::fill_n(to, block, outside);
    } else if (axis + 1 == axes && block == 1) {
      for (const Index offset : offsets[axis]) *to++ = from && offset >= 0 ? from[offset] : outside;
    } else {
      for (const Index offset : offsets[axis]) {
        self(self, axis + 1, from && offset >= 0 ? from + offset : nullptr);
      }
    }
  };
  copy(copy, 0, x.values.data());
  return y;
}

template <class Scalar>
Array<Scalar> select(const Array<Scalar>& x, const Indices& indices, Scalar outside = 0) {
  const Shape strides = strides_of(x.shape);
  std::vector<Shape> offsets;
  for (std::size_t axis = 0; axis < indices.size(); ++axis) {
    Shape& each = offsets.emplace_back(indices[axis] ? *indices[axis] : upto(x.shape[axis]));
    for (Index& index : each) index *= strides[axis];
  }
  return collect(x, offsets, outside);
}

template <class Scalar>
Array<Scalar> transpose(const Array<Scalar>& x, const Shape& order) {
  const Shape strides = strides_of(x.shape);
  std::vector<Shape> offsets;
  for (const Index axis : order) {
    for (Index& offset : offsets.emplace_back(upto(x.shape[axis]))) offset *= strides[axis];
  }
  return collect(x, offsets);
}

/// A step of what find(arguments) selects of the first input.
template <class Find>
Step selection(Find find) {
  return of_numbers(
      [find]<class Scalar>(Arguments& in) { return select(in.as<Scalar>(0), find(in)); });
}

// ---- ranges of an axis

/// A list of an attribute or, where there is one, of an input.
Shape list_of(const Arguments& in, std::size_t input, const Shape& attribute) {
  return in.has(input) ? in.integers(input) : attribute;
}

/// begin, begin + step, ... before end; both are bounded as the operator says, not as Python does.
Shape every(Index begin, Index end, Index step, Index size) {
  if (step == 0) refuse("it slices in steps of 0");
  step = std::max(step, -std::numeric_limits<Index>::max());
  const Index least = step < 0 ? -1 : 0, most = step < 0 ? size - 1 : size;
  begin = std::clamp<Index>(begin < 0 ? begin + size : begin, 0, std::max<Index>(most, 0));
  end = std::clamp(end < 0 ? end + size : end, least, most);
  Shape indices;
  const Index room = step < 0 ? begin - end : end - begin;
  for (Index i = 0; size > 0 && i < room; i += std::abs(step)) {
    indices.push_back(begin + (step < 0 ? -i : i));
  }
  return indices;
}

Step slice(const Definition& of) {
  return selection([starts = of.node.integers("starts", {}), ends = of.node.integers("ends", {}),
                    axes = of.node.integers("axes", {})](const Arguments& in) {
    const Shape &x = in.shape(0), begin = list_of(in, 1, starts), end = list_of(in, 2, ends);
    Shape along = list_of(in, 3, axes);
    if (along.empty()) along = upto(std::ssize(begin));
    const Shape step = list_of(in, 4, Shape(begin.size(), 1));
    if (end.size() != begin.size() || along.size() != begin.size() || step.size() != begin.size()) {
      refuse("its starts, ends, axes and steps differ in length");
    }
    Indices indices(x.size());
    for (std::size_t i = 0; i < begin.size(); ++i) {
      const Index axis = axis_of(along[i], x.size());
      indices[axis] = every(begin[i], end[i], step[i], x[axis]);
    }
    return indices;
  });
}

/// One of the parts of an axis, and the sum of all.
struct SplitPart {
  Index begin = 0, length = 0, sum = -1;  // -1: it is none of them, or one has no length

  SplitPart(const Shape& parts, std::size_t output) {
    if (output >= parts.size() || std::ranges::min(parts) < 0) return;
    sum = 0;
    for (std::size_t i = 0; i < parts.size() && sum >= 0; ++i) {
      if (i == output) begin = sum;
      sum = parts[i] <= std::numeric_limits<Index>::max() - sum ? sum + parts[i] : -1;
    }
    length = parts[output];
  }
};

Step split(const Definition& of) {
  const Index outputs = std::ssize(of.node.outputs);
  const Shape attribute = of.node.integers("split", {});
  std::optional<SplitPart> given;  // and not the list, as each output has its own step
  if (!attribute.empty()) given.emplace(attribute, of.output);
  return selection([=, output = of.output, axis = of.node.integer("axis", 0)](const Arguments& in) {
    const Shape& x = in.shape(0);
    const Index at = axis_of(axis, x.size()), size = x[at],
                part = (size + outputs - 1) / std::max<Index>(outputs, 1);
    Indices indices(x.size());
    if (!given && (!in.has(1) || in.integers(1).empty())) {  // the last one is what is left
      const Index begin = std::min(static_cast<Index>(output) * part, size);
      indices[at] = every(begin, std::min(begin + part, size), 1, size);
      return indices;
    }
    const SplitPart found = in.has(1) ? SplitPart(in.integers(1), output) : *given;
    if (found.sum != size) {
      refuse((found.sum < 0 ? "no such parts"
                            : "parts of " + std::to_string(found.sum) + " positions in all") +
             ", for the " + std::to_string(size) + " of axis " + std::to_string(at));
    }
    indices[at] = every(found.begin, found.begin + found.length, 1, size);
    return indices;
  });
}

/// The index that padding reads at i, -1 for none.
Index padded(const std::string& mode, Index i, Index size) {
  if (i >= 0 && i < size) return i;
  if (mode == "constant" || size == 0) return -1;
  if (mode == "edge") return i < 0 ? 0 : size - 1;
  const Index period = mode == "wrap" ? size : std::max<Index>(2 * (size - 1), 1);
  i = (i % period + period) % period;
  return i < size ? i : period - i;
}

Step pad(const Definition& of) {
  const std::string mode = of.node.text("mode", "constant");
  constexpr std::array known = {"constant", "edge", "reflect", "wrap"};
  if (std::ranges::find(known, mode) == known.end()) {
    throw concertina::FormatError("its mode is " + mode);
  }
  return of_numbers([=, given = of.node.integers("pads", {}),
                     value = of.node.real("value", 0)]<class Scalar>(Arguments& in) {
    const auto& x = in.as<Scalar>(0);
    const Shape pads = list_of(in, 1, given), axes = list_of(in, 3, upto(std::ssize(x.shape)));
    if (pads.size() != 2 * axes.size()) {
      refuse("pads of " + to_text(pads) + " for " + to_text(x.shape));
    }
    Indices indices(x.shape.size());
    for (std::size_t i = 0; i < axes.size(); ++i) {
      const Index axis = axis_of(axes[i], x.shape.size()), size = x.shape[axis];
      constexpr Index most = Index{1} << 30;
      const Index begin = std::clamp(pads[i], -most, most),
                  end = std::clamp(pads[i + axes.size()], -most, most);
      if (begin + size + end < 0) {
        refuse("pads of " + to_text(pads) + " leave nothing of " + to_text(x.shape));
      }
      Shape& each = indices[axis].emplace(upto(begin + size + end));
      for (Index& index : each) index = padded(mode, index - begin, size);
    }
    return select(x, indices, in.has(2) ? in.scalar<Scalar>(2) : static_cast<Scalar>(value));
  });
}

// ---- other selections

Step gather(const Definition& of) {
  return of_numbers([axis = of.node.integer("axis", 0)]<class Scalar>(Arguments& in) {
    const auto& x = in.as<Scalar>(0);
    const Shape& which = in.shape(1);
    const Index at = axis_of(axis, x.shape.size()), size = x.shape[at];
    Shape indices = in.integers(1);
    for (Index& index : indices) {
      if (index < -size || index >= size) {
        refuse("there is no index " + std::to_string(index) + " of " + std::to_string(size));
      }
      if (index < 0) index += size;
    }
    Indices selected(x.shape.size());
    selected[at] = std::move(indices);
    auto y = select(x, selected);
    y.shape.erase(y.shape.begin() + at);
    y.shape.insert(y.shape.begin() + at, which.begin(), which.end());
    return y;
  });
}

Step expand(const Definition&) {
  return of_numbers([]<class Scalar>(Arguments& in) {
    auto x = in.as<Scalar>(0);
    const Shape shape = broadcast(x.shape, in.integers(1));
    x.shape.insert(x.shape.begin(), shape.size() - x.shape.size(), 1);
    Indices indices(shape.size());
    for (std::size_t i = 0; i < shape.size(); ++i) {
      if (shape[i] != x.shape[i]) {
        indices[i] = Shape(static_cast<std::size_t>(count(Shape{shape[i]})), 0);
      }
    }
    return select(x, indices);
  });
}

Step tile(const Definition&) {
  return selection([](const Arguments& in) {
    const Shape &x = in.shape(0), &repeats = in.integers(1);
    if (repeats.size() != x.size()) refuse("repeats of " + to_text(repeats) + " for " + to_text(x));
    Indices indices(x.size());
    for (std::size_t i = 0; i < x.size(); ++i) {
      count(Shape{x[i], repeats[i]});
      indices[i] = upto(x[i] * repeats[i]);
      for (Index& index : *indices[i]) index %= x[i];
    }
    return indices;
  });
}

Step permute(const Definition& of) {
  return of_numbers([perm = of.node.integers("perm", {})]<class Scalar>(Arguments& in) {
    const auto& x = in.as<Scalar>(0);
    Shape order = perm.empty() ? upto(std::ssize(x.shape)) : perm;
    if (perm.empty()) std::ranges::reverse(order);
    if (order.size() != x.shape.size()) {
      refuse("perm " + to_text(perm) + " for " + to_text(x.shape));
    }
    axes_of(order, x.shape.size());  // each once
    for (Index& axis : order) axis = axis_of(axis, x.shape.size());
    return transpose(x, order);
  });
}

/// DepthToSpace, or back: axes split into blocks, exchanged and joined.
Step blocks(const Definition& of, bool to_space) {
  const Index b = of.node.integer("blocksize", 1);
  const bool columns = of.node.text("mode", "DCR") == "CRD";
  return of_numbers([=]<class Scalar>(Arguments& in) {
    auto x = in.take_as<Scalar>(0);
    const Shape shape = x.shape;
    const bool fits = shape.size() == 4 && b > 0 &&
                      (to_space ? shape[1] % b == 0 && shape[1] / b % b == 0
                                : shape[2] % b == 0 && shape[3] % b == 0);
    if (!fits) refuse("blocks of " + std::to_string(b) + " of " + to_text(shape));
    if (!to_space) {
      x.shape = {shape[0], shape[1], shape[2] / b, b, shape[3] / b, b};
      auto y = transpose(x, {0, 3, 5, 1, 2, 4});
      y.shape = {shape[0], shape[1] * b * b, shape[2] / b, shape[3] / b};
      return y;
    }
    const Index channels = shape[1] / b / b;
    x.shape = columns ? Shape{shape[0], channels, b, b, shape[2], shape[3]}
                      : Shape{shape[0], b, b, channels, shape[2], shape[3]};
    auto y = transpose(x, columns ? Shape{0, 1, 4, 2, 5, 3} : Shape{0, 3, 4, 1, 5, 2});
    y.shape = {shape[0], channels, shape[2] * b, shape[3] * b};
    return y;
  });
}

Step concat(const Definition& of) {
  return of_numbers([axis = of.node.integer("axis", 1)]<class Scalar>(Arguments& in) {
    Shape shape = in.shape(0);
    const Index at = axis_of(axis, shape.size());
    Index joined = 0;
    for (std::size_t i = 0; i < in.size(); ++i) {
      Shape other = in.as<Scalar>(i).shape;
      if (other.size() == shape.size()) joined += std::exchange(other[at], shape[at]);
      if (other != shape) {
        refuse(to_text(in.shape(i)) + " cannot be joined to " + to_text(shape) + " on axis " +
               std::to_string(at));
      }
    }
    shape[at] = joined;
    const Index outer = count({shape.data(), static_cast<std::size_t>(at)});
    count(shape);
    Array<Scalar> y{shape, {}};
    y.values.reserve(static_cast<std::size_t>(count(shape)));
    for (Index n = 0; n < outer; ++n) {
      for (std::size_t i = 0; i < in.size(); ++i) {
        const auto& x = in.as<Scalar>(i).values;
        const Index size = std::ssize(x) / outer;
        y.values.insert(y.values.end(), x.begin() + n * size, x.begin() + (n + 1) * size);
      }
    }
    return y;
  });
}

// ---- resizing

/// One axis: from `in` positions to `out`.
struct Resized {
  Index in, out;
  double scale;

  /// Where output i is among the inputs.
  double position(const std::string& mode, Index i) const {
    const auto at = static_cast<double>(i), read = static_cast<double>(in),
               made = static_cast<double>(out);
    if (mode == "asymmetric") return at / scale;
    if (mode == "align_corners") return out == 1 ? 0 : at * (read - 1) / (made - 1);
    if (mode == "tf_half_pixel_for_nn") return (at + 0.5) / scale;
    const double half = (at + 0.5) / scale - 0.5;
    if (mode == "half_pixel") return half;
    if (mode == "pytorch_half_pixel") return out > 1 ? half : 0;
    if (mode == "half_pixel_symmetric") return read / 2 * (1 - made / (scale * read)) + half;
    throw concertina::FormatError("its coordinate_transformation_mode is " + mode);
  }
};

Index nearest(const std::string& mode, double at, bool shrinks) {
  if (mode == "floor") return static_cast<Index>(std::floor(at));
  if (mode == "ceil") return static_cast<Index>(std::ceil(at));
  if (mode == "round_prefer_floor") return static_cast<Index>(std::ceil(at - 0.5));
  if (mode == "round_prefer_ceil") return static_cast<Index>(std::floor(at + 0.5));
  if (mode == "simple") return static_cast<Index>(shrinks ? std::ceil(at) : at);  // before opset 11
  throw concertina::FormatError("its nearest_mode is " + mode);
}

template <class Scalar>
Array<Scalar> interpolate(const Array<Scalar>& x, std::size_t axis, const Resized& to,
                          const std::string& mode) {
  Shape shape = x.shape;
  shape[axis] = to.out;
  auto y = zeros<Scalar>(shape);
  const Index inner = count({shape.data() + axis + 1, shape.size() - axis - 1}),
              outer = count({shape.data(), axis});
  for (Index i = 0; i < to.out; ++i) {
    const double at = std::clamp(to.position(mode, i), 0.0, static_cast<double>(to.in - 1));
    const auto low = static_cast<Index>(at), high = std::min(low + 1, to.in - 1);
    const auto share = static_cast<Scalar>(at - static_cast<double>(low));
    for (Index n = 0; n < outer; ++n) {
      const Scalar *a = x.values.data() + (n * to.in + low) * inner, *b = a + (high - low) * inner;
      Scalar* result = y.values.data() + (n * to.out + i) * inner;
      for (Index k = 0; k < inner; ++k) result[k] = a[k] * (1 - share) + b[k] * share;
    }
  }
  return y;
}

/// -1 for what cannot be one.
Index to_size(double value) { return value >= 0 && value < 1e9 ? static_cast<Index>(value) : -1; }

struct Resize {
  std::string mode, coordinates, rounding, policy;
  Shape axes;
  std::vector<float> factors;  // of the attribute
  std::size_t scales, sizes;   // inputs

  /// The axes as they become.
  std::vector<Resized> resized(const Arguments& in) const {
    const Shape& x = in.shape(0);
    std::vector<Resized> result;
    for (const Index extent : x) result.push_back({extent, extent, 1});
    Shape along = axes.empty() ? upto(std::ssize(x)) : axes;
    axes_of(along, x.size());
    if (in.has(sizes) && !in.integers(sizes).empty()) {
      const Shape& wanted = in.integers(sizes);
      if (wanted.size() != along.size()) {
        refuse("sizes of " + to_text(wanted) + " for " + to_text(x));
      }
      const auto ratio = [&](std::size_t i) {
        return static_cast<double>(wanted[i]) / static_cast<double>(x[axis_of(along[i], x.size())]);
      };
      double common = ratio(0);
      for (std::size_t i = 1; i < along.size(); ++i) {
        common = policy == "not_larger" ? std::min(common, ratio(i)) : std::max(common, ratio(i));
      }
      for (std::size_t i = 0; i < along.size(); ++i) {
        Resized& axis = result[axis_of(along[i], x.size())];
        axis.scale = policy == "stretch" ? ratio(i) : common;
        axis.out = policy == "stretch"
                       ? wanted[i]
                       : to_size(std::floor(common * static_cast<double>(axis.in) + 0.5));
      }
    } else {
      std::vector<double> wanted(factors.begin(), factors.end());
      if (in.has(scales)) wanted = in.reals(scales);
      if (wanted.size() != along.size()) {
        refuse(std::to_string(wanted.size()) + " scales for " + to_text(x));
      }
      for (std::size_t i = 0; i < along.size(); ++i) {
        Resized& axis = result[axis_of(along[i], x.size())];
        axis.scale = wanted[i];
        // In float, as the scales are: a third of three is one.
        const float size = static_cast<float>(wanted[i]) * static_cast<float>(axis.in);
        axis.out = to_size(std::floor(size));
      }
    }
    for (const Resized& axis : result) {
      if (axis.out < 0 || (axis.in == 0 && axis.out > 0)) {
        refuse("sizes that cannot be for " + to_text(x));
      }
      count(Shape{axis.out});
    }
    return result;
  }

  template <class Scalar>
  Value operator()(Arguments& in) const {
    const std::vector<Resized> axes_to = resized(in);
    if (mode == "nearest") {
      Indices indices(axes_to.size());
      for (std::size_t axis = 0; axis < axes_to.size(); ++axis) {
        const Resized& to = axes_to[axis];
        if (to.scale == 1 && to.in == to.out) continue;
        indices[axis] = upto(to.out);
        for (Index& i : *indices[axis]) {
          i = std::clamp<Index>(nearest(rounding, to.position(coordinates, i), to.scale < 1), 0,
                                to.in - 1);
        }
      }
      return select(in.as<Scalar>(0), indices);
    }
    if constexpr (!std::floating_point<Scalar>) {
      in.refuse_type(0);
    } else {
      auto x = in.take_as<Scalar>(0);
      for (std::size_t axis = 0; axis < axes_to.size(); ++axis) {
        if (axes_to[axis].scale != 1 || axes_to[axis].in != axes_to[axis].out) {
          x = interpolate(x, axis, axes_to[axis], coordinates);
        }
      }
      return x;
    }
  }
};

Step resize(const Definition& of) {
  const bool old = of.node.op_type == "Upsample" || of.opset < 11;
  Resize resize{of.node.text("mode", "nearest"),
                of.node.text("coordinate_transformation_mode", old ? "asymmetric" : "half_pixel"),
                of.node.text("nearest_mode", old ? "simple" : "round_prefer_floor"),
                of.node.text("keep_aspect_ratio_policy", "stretch"),
                of.node.integers("axes", {}),
                {},
                old ? 1U : 2U,
                3};
  if (const auto* scales = of.node.attribute("scales")) resize.factors = scales->floats;
  if ((resize.mode != "nearest" && resize.mode != "linear") ||
      of.node.integer("antialias", 0) != 0) {
    throw concertina::FormatError(
        "only nearest and linear modes, without antialias, are supported");
  }
  Resized{1, 1, 1}.position(resize.coordinates, 0);  // known ones
  nearest(resize.rounding, 0, false);
  return of_numbers(std::move(resize));
}

}  // namespace

void add_selections(Operators& operators) {
  operators.insert({
      {"Slice", {1, 5, "axes ends starts", slice}},
      {"Split", {1, 2, "axis num_outputs split", split, any}},
      {"Pad", {1, 4, "mode pads value", pad}},
      {"Gather", {2, 2, "axis", gather}},
      {"Expand", {2, 2, "", expand}},
      {"Tile", {2, 2, "", tile}},
      {"Transpose", {1, 1, "perm", permute}},
      {"Concat", {1, any, "axis", concat}},
      {"DepthToSpace",
       {1, 1, "blocksize mode", [](const Definition& of) { return blocks(of, true); }}},
      {"SpaceToDepth", {1, 1, "blocksize", [](const Definition& of) { return blocks(of, false); }}},
      {"Resize",
       {1, 4,
        "antialias axes coordinate_transformation_mode cubic_coeff_a extrapolation_value "
        "keep_aspect_ratio_policy mode nearest_mode",
        resize}},
      {"Upsample", {1, 2, "mode scales", resize}},
  });
}

}  // namespace tool::evaluation
