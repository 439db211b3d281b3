// Windows that move over maps: convolutions as matrix products, pools as loops.
// SPDX-License-Identifier: Apache-2.0
#include "operators.hpp"

#include "matrix.hpp"

#include <cmath>
#include <limits>
#include <string>

namespace tool::evaluation {
namespace {

using PerAxis = std::array<Index, 3>;  // maps of fewer axes are one position high, or deep

Index positions(const PerAxis& sizes) { return sizes[0] * sizes[1] * sizes[2]; }

Index floor_divide(Index a, Index b) { return a / b - (a % b < 0); }

/// begin <= position < end
struct Range {
  Index begin, end;
};

/// One channel's sizes and how the window moves: output i's tap k is at input i * stride + k *
/// dilation - start.
struct Window {
  PerAxis kernel{1, 1, 1}, stride{1, 1, 1}, dilation{1, 1, 1}, start{}, end{}, in{1, 1, 1},
      out{1, 1, 1};

  /// The output positions at which a tap falls on the map.
  Range on_map(std::size_t axis, Index tap) const {
    const Index offset = tap * dilation[axis] - start[axis];
    const Index begin = std::clamp<Index>(-floor_divide(offset, stride[axis]), 0, out[axis]);
    const Index after = floor_divide(in[axis] - 1 - offset, stride[axis]) + 1;
    return {begin, std::clamp(after, begin, out[axis])};
  }
  bool is_pointwise() const {
    return kernel == PerAxis{1, 1, 1} && stride == kernel && start == PerAxis{} && end == start;
  }
};

/// Calls each(tap, to, from, length) for every line of output positions that a tap of the kernel
/// reads: output to + i reads input from + i * stride[2], i < length. What falls on the padding is
/// left out, and lines, of out[0] * out[1], that are not in `lines`.
template <class Each>
void for_each_tap(const Window& window, Range lines, const Each& each) {
  const auto& [kernel, stride, dilation, start, end, in, out] = window;
  Index tap = 0;
  for (Index kz = 0; kz < kernel[0]; ++kz) {
    const Range z = window.on_map(0, kz);
    for (Index ky = 0; ky < kernel[1]; ++ky) {
      const Range y = window.on_map(1, ky);
      for (Index kx = 0; kx < kernel[2]; ++kx, ++tap) {
        const Range x = window.on_map(2, kx);
        if (x.begin == x.end) continue;
        const Index column = x.begin * stride[2] - start[2] + kx * dilation[2];
        for (Index k = z.begin; k < z.end; ++k) {
          const Index plane = (k * stride[0] - start[0] + kz * dilation[0]) * in[1];
          const Index last = std::min(y.end, lines.end - k * out[1]);
          for (Index j = std::max(y.begin, lines.begin - k * out[1]); j < last; ++j) {
            const Index row = plane + j * stride[1] - start[1] + ky * dilation[1];
            each(tap, (k * out[1] + j) * out[2] + x.begin, row * in[2] + column, x.end - x.begin);
          }
        }
      }
    }
  }
}

// ---- from attributes to windows

/// What a node says of its window.
struct Geometry {
  Shape kernel_shape, strides, dilations, pads, output_padding, output_shape;
  std::string auto_pad;
  bool ceil;

  explicit Geometry(const concertina::onnx::Node& node)
      : kernel_shape(node.integers("kernel_shape", {})),
        strides(node.integers("strides", {})),
        dilations(node.integers("dilations", {})),
        pads(node.integers("pads", {})),
        output_padding(node.integers("output_padding", {})),
        output_shape(node.integers("output_shape", {})),
        auto_pad(node.text("auto_pad", "NOTSET")),
        ceil(node.integer("ceil_mode", 0) != 0) {
    if (auto_pad == "VALID") pads.clear();
    constexpr std::array known = {"NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"};
    if (std::ranges::find(known, auto_pad) == known.end()) {
      throw concertina::FormatError("its auto_pad is " + auto_pad);
    }
    if (node.op_type.starts_with("Conv") && auto_pad != "NOTSET" && node.attribute("pads")) {
      throw concertina::FormatError("it has pads beside auto_pad " + auto_pad);
    }
  }

  bool same() const { return auto_pad.starts_with("SAME"); }

  /// How to pad so much.
  Index at_start(Index padding) const {
    return auto_pad == "SAME_UPPER" ? padding / 2 : padding - padding / 2;
  }

  /// All but the sizes of maps, for an input [batch, channels, maps...].
  Window window(const Shape& x, const Shape& kernel) const {
    if (x.size() < 3 || x.size() > 5) refuse("maps have 1 to 3 axes, not as in " + to_text(x));
    if (std::ranges::find(x.begin() + 2, x.end(), 0) != x.end()) {
      refuse("maps without positions, " + to_text(x));
    }
    if (!kernel_shape.empty() && kernel_shape != kernel) {
      refuse("a kernel_shape of " + to_text(kernel_shape) + ", but the weight's is " +
             to_text(kernel));
    }
    Window window;
    fill(window.kernel, kernel, x, 1, "kernel_shape");
    fill(window.stride, strides, x, 1, "strides");
    fill(window.dilation, dilations, x, 1, "dilations");
    const auto half = pads.begin() + std::ssize(pads) / 2;
    if (pads.size() % 2 != 0) refuse("pads of " + to_text(pads));
    if (!same()) fill(window.start, {pads.begin(), half}, x, -largest, "pads");
    if (!same()) fill(window.end, {half, pads.end()}, x, -largest, "pads");
    return window;
  }

  /// With x's maps as inputs.
  Window forward(const Shape& x, const Shape& kernel) const {
    Window window = this->window(x, kernel);
    fill(window.in, {x.begin() + 2, x.end()}, x, 0, "sizes");
    auto& [k, stride, dilation, start, end, in, out] = window;
    for (std::size_t i = 0; i < 3; ++i) {
      const Index extent = (k[i] - 1) * dilation[i] + 1;
      if (same()) {
        const Index padding =
            std::max<Index>((in[i] - 1) / stride[i] * stride[i] + extent - in[i], 0);
        start[i] = at_start(padding);
        end[i] = padding - start[i];
      }
      const Index room = in[i] + start[i] + end[i] - extent;
      if (room < 0) refuse("a window larger than its input " + to_text(x));
      out[i] = (room + (ceil ? stride[i] - 1 : 0)) / stride[i] + 1;
      if (ceil && (out[i] - 1) * stride[i] >= in[i] + start[i]) {
        --out[i];  // it would start on the padding
      }
    }
    return window;
  }

  /// With x's maps as outputs: that of the convolution whose transpose is meant.
  Window transposed(const Shape& x, const Shape& kernel) const {
    Window window = this->window(x, kernel);
    fill(window.out, {x.begin() + 2, x.end()}, x, 0, "sizes");
    PerAxis more{}, wanted{};
    fill(more, output_padding, x, 0, "output_padding");
    fill(wanted, output_shape, x, 1, "output_shape");
    auto& [k, stride, dilation, start, end, in, out] = window;
    for (std::size_t i = 0; i < 3; ++i) {
      const Index all = (out[i] - 1) * stride[i] + (k[i] - 1) * dilation[i] + 1 + more[i];
      if (wanted[i] == 0 && same()) wanted[i] = out[i] * stride[i];
      if (wanted[i] != 0) {  // more than all of it is left empty at the end
        start[i] = at_start(std::max<Index>(all - wanted[i], 0));
        end[i] = all - wanted[i] - start[i];
      }
      in[i] = all - start[i] - end[i];
      if (in[i] < 1) refuse("nothing is left of " + to_text(x) + " but padding");
    }
    return window;
  }

 private:
  static constexpr Index largest = Index{1} << 30;

  /// The last axes of `to`, if there is anything in the list.
  static void fill(PerAxis& to, const Shape& from, const Shape& x, Index least, const char* name) {
    if (from.empty()) return;
    if (from.size() != x.size() - 2 || std::ranges::min(from) < least ||
        std::ranges::max(from) > largest) {
      refuse(std::string(name) + " of " + to_text(from) + " for " + to_text(x));
    }
    std::ranges::copy(from, to.end() - std::ssize(from));
  }
};

/// [batch, channels, sizes...], of as many axes as x.
Shape maps(const Shape& x, Index channels, const PerAxis& sizes) {
  Shape shape = {x[0], channels};
  shape.insert(shape.end(), sizes.end() - (std::ssize(x) - 2), sizes.end());
  return shape;
}

// ---- convolutions

template <class Scalar>
struct Convolution {
  Window window;
  Index groups, in, out, taps;  // channels of one group
  const Scalar *weight, *bias;  // no bias: null

  /// Elements gathered at once. With 2^17 a network of 7x7 kernels takes an eighth longer, with
  /// 2^15 twice as long: the product then has too few columns for its depth.
  static constexpr Index gathered = Index{1} << 19;

  /// Images are gathered together up to so many columns; with more they only leave the cache.
  static constexpr Index joined = 512;
};

/// Writes what each output position of these lines reads: a row for each channel and tap, from this
/// column on a column for each position.
template <class Scalar>
void gather(const Convolution<Scalar>& layer, Range lines, const Scalar* channels,
            Matrix<Scalar>& columns, Index column) {
  const Window& window = layer.window;
  const Index stride = window.stride[2], first = lines.begin * window.out[2] - column;
  if (std::max(std::ranges::max(window.start), std::ranges::max(window.end)) > 0) {
    columns.middleCols(column, (lines.end - lines.begin) * window.out[2]).setZero();
  }
  for (Index c = 0; c < layer.in; ++c, channels += positions(window.in)) {
    for_each_tap(window, lines, [&](Index tap, Index to, Index from, Index length) {
      Scalar* column_of_tap = &columns(c * layer.taps + tap, to - first);
      const Scalar* in = channels + from;
      if (stride == 1) {
        std::copy_n(in, length, column_of_tap);
      } else {
        for (Index i = 0; i < length; ++i) column_of_tap[i] = in[i * stride];
      }
    });
  }
}

/// One input channel a group: adds the shifted channel, tap for tap.
template <class Scalar>
void convolve_depthwise(const Convolution<Scalar>& layer, const Scalar* x, Index images,
                        Scalar* y) {
  const Window& window = layer.window;
  const Index size = positions(window.out), channels = layer.groups * layer.out,
              stride = window.stride[2];
  for (Index output = 0; output < images * channels; ++output, y += size) {
    const Index c = output % channels;
    if (layer.bias) std::fill_n(y, size, layer.bias[c]);
    const Scalar* channel = x + output / layer.out * positions(window.in);
    const Scalar* weight = layer.weight + c * layer.taps;
    for_each_tap(window, {0, window.out[0] * window.out[1]},
                 [&](Index tap, Index to, Index from, Index length) {
                   Scalar* sum = y + to;
                   const Scalar *in = channel + from, factor = weight[tap];
                   if (stride == 1) {  // so that the compiler sees it
                     for (Index i = 0; i < length; ++i) sum[i] += factor * in[i];
                   } else {
                     for (Index i = 0; i < length; ++i) sum[i] += factor * in[i * stride];
                   }
                 });
  }
}

/// The product of weight and gathered columns: some lines of an image at a time, or several images
/// that are small.
template <class Scalar>
void convolve_dense(const Convolution<Scalar>& layer, const Scalar* x, Index images, Scalar* y) {
  const Window& window = layer.window;
  const Index depth = layer.in * layer.taps, lines = window.out[0] * window.out[1];
  const Index size = positions(window.out), read = positions(window.in);
  const Index wanted = std::max<Index>(Convolution<Scalar>::gathered / depth, 1);
  const Index together = std::clamp<Index>(std::min(wanted, Convolution<Scalar>::joined) / size, 1,
                                           std::max<Index>(images, 1));
  const bool direct = window.is_pointwise() && (size >= 64 || together == 1);
  const Index height = direct ? lines : std::clamp<Index>(wanted / window.out[2], 1, lines);
  Matrix<Scalar> columns, sums;
  if (!direct) {
    count(Shape{depth, together, height, window.out[2]});
    columns.resize(depth, together * height * window.out[2]);
  }
  for (Index n = 0; n < images; n += direct ? 1 : together) {
    const Index these = direct ? 1 : std::min(together, images - n);
    for (Index g = 0; g < layer.groups; ++g) {
      const auto weight = matrix(layer.weight + g * layer.out * depth, layer.out, depth);
      const auto image = [&](Index i) {
        return x + ((n + i) * layer.groups + g) * layer.in * read;
      };
      const auto result = [&](Index i) {
        return y + ((n + i) * layer.groups + g) * layer.out * size;
      };
      const auto add_bias = [&](auto&& rows) {
        if (layer.bias) {
          rows.colwise() +=
              Eigen::Map<const Eigen::VectorX<Scalar>>(layer.bias + g * layer.out, layer.out);
        }
      };
      if (these > 1) {
        for (Index i = 0; i < these; ++i) gather(layer, {0, lines}, image(i), columns, i * size);
        sums.noalias() = weight * columns.leftCols(these * size);
        add_bias(sums);
        for (Index i = 0; i < these; ++i) {
          matrix(result(i), layer.out, size) = sums.middleCols(i * size, size);
        }
        continue;
      }
      for (Index top = 0; top < lines; top += height) {
        const Range block = {top, std::min(top + height, lines)};
        const Index width = (block.end - top) * window.out[2];
        auto to = matrix(result(0), layer.out, size).middleCols(top * window.out[2], width);
        if (direct) {
          to.noalias() = weight * matrix(image(0), depth, size);
        } else {
          gather(layer, block, image(0), columns, 0);
          to.noalias() = weight * columns.leftCols(width);
        }
        add_bias(to);
      }
    }
  }
}

/// The transpose of convolve_dense without its bias, from outputs x to inputs y: products with the
/// weight, each row then added where its channel and tap say.
template <class Scalar>
void convolve_transposed(const Convolution<Scalar>& layer, const Scalar* x, Index images,
                         Scalar* y) {
  const Window& window = layer.window;
  const Index rows = layer.in * layer.taps, size = positions(window.out),
              written = positions(window.in);
  const Index lines = window.out[0] * window.out[1], stride = window.stride[2];
  const Index height =
      std::clamp<Index>(Convolution<Scalar>::gathered / rows / window.out[2], 1, lines);
  count(Shape{rows, height, window.out[2]});
  Matrix<Scalar> added;
  for (Index i = 0; i < images * layer.groups; ++i) {
    const Index g = i % layer.groups;
    const auto weight = matrix(layer.weight + g * layer.out * rows, layer.out, rows);
    Scalar* result = y + i * layer.in * written;
    for (Index c = 0; c < layer.in && layer.bias; ++c) {
      std::fill_n(result + c * written, written, layer.bias[g * layer.in + c]);
    }
    for (Index top = 0; top < lines; top += height) {
      const Range block = {top, std::min(top + height, lines)};
      const Index first = top * window.out[2], width = (block.end - top) * window.out[2];
      added.noalias() = weight.transpose() *
                        matrix(x + i * layer.out * size, layer.out, size).middleCols(first, width);
      for (Index c = 0; c < layer.in; ++c) {
        for_each_tap(window, block, [&](Index tap, Index to, Index from, Index length) {
          const Scalar* terms = &added(c * layer.taps + tap, to - first);
          Scalar* sum = result + c * written + from;
          for (Index k = 0; k < length; ++k) sum[k * stride] += terms[k];
        });
      }
    }
  }
}

/// The weight's first axis is of the outputs of the convolution, or of its transpose's inputs.
template <class Scalar>
Convolution<Scalar> convolution(const Arguments& in, const Window& window, Index groups,
                                bool transposed) {
  const auto& w = in.as<Scalar>(1);
  const Shape& x = in.shape(0);
  if (groups < 1 || w.shape[0] < groups || w.shape[0] % groups != 0 || w.shape[1] < 1 ||
      x[1] != (transposed ? w.shape[0] : w.shape[1] * groups)) {
    refuse("a weight of " + to_text(w.shape) + " in " + std::to_string(groups) + " groups, for " +
           to_text(x));
  }
  const Index channels = transposed ? w.shape[1] * groups : w.shape[0];
  if (in.has(2) && in.shape(2) != Shape{channels}) {
    refuse("a bias of " + to_text(in.shape(2)) + " for " + std::to_string(channels) + " channels");
  }
  return {window,
          groups,
          w.shape[1],
          w.shape[0] / groups,
          positions(window.kernel),
          w.values.data(),
          in.has(2) ? in.as<Scalar>(2).values.data() : nullptr};
}

/// Conv or ConvTranspose.
template <bool transposed>
Step conv(const Definition& of) {
  return of_floats([geometry = Geometry(of.node),
                    groups = of.node.integer("group", 1)]<class Scalar>(Arguments& in) {
    const auto& x = in.as<Scalar>(0);
    const Shape& weight = in.shape(1);
    if (weight.size() < 3) refuse("a weight of " + to_text(weight));
    const Shape kernel(weight.begin() + 2, weight.end());
    const Window window =
        transposed ? geometry.transposed(x.shape, kernel) : geometry.forward(x.shape, kernel);
    const auto layer = convolution<Scalar>(in, window, groups, transposed);
    const Index channels = groups * (transposed ? layer.in : layer.out);
    auto y = zeros<Scalar>(maps(x.shape, channels, transposed ? window.in : window.out));
    const auto products = static_cast<double>(transposed ? x.values.size() : y.values.size()) *
                          static_cast<double>(layer.in * layer.taps);
    const double matrices = static_cast<double>(x.shape[0]) * static_cast<double>(groups),
                 rows = matrices * static_cast<double>(layer.in * layer.taps) *
                        static_cast<double>(window.out[0] * window.out[1]);
    spend(each_product * products + each_matrix * matrices + each_row * rows);
    const auto convolve = transposed      ? convolve_transposed<Scalar>
                          : layer.in == 1 ? convolve_depthwise<Scalar>
                                          : convolve_dense<Scalar>;
    convolve(layer, x.values.data(), x.shape[0], y.values.data());
    return y;
  });
}

// ---- pools

/// Each window's largest element; NaN where there is one.
template <class Scalar>
void max_pool(const Window& window, const Scalar* in, Scalar* out) {
  const Index stride = window.stride[2];
  std::fill_n(out, positions(window.out), -std::numeric_limits<Scalar>::infinity());
  for_each_tap(window, {0, window.out[0] * window.out[1]},
               [&](Index, Index to, Index from, Index length) {
                 for (Index i = 0; i < length; ++i) {
                   const Scalar value = in[from + i * stride];
                   if (value > out[to + i] || std::isnan(value)) out[to + i] = value;
                 }
               });
}

/// Each window's mean: of what is on the map, or with the padding's zeros.
template <class Scalar>
void average_pool(const Window& window, bool with_padding, const Scalar* in, Scalar* out) {
  const Index stride = window.stride[2];
  for_each_tap(window, {0, window.out[0] * window.out[1]},
               [&](Index, Index to, Index from, Index length) {
                 for (Index i = 0; i < length; ++i) out[to + i] += in[from + i * stride];
               });
  // How many taps of an axis count; beyond the padding, where rounding up leads, none do.
  const auto taps = [&](std::size_t axis, Index i) {
    Index number = 0;
    for (Index k = 0; k < window.kernel[axis]; ++k) {
      const Index at = i * window.stride[axis] + k * window.dilation[axis] - window.start[axis];
      const Index least = with_padding ? -window.start[axis] : 0;
      number += at >= least && at < window.in[axis] + (with_padding ? window.end[axis] : 0);
    }
    return number;
  };
  for (Index z = 0; z < window.out[0]; ++z) {
    for (Index y = 0; y < window.out[1]; ++y) {
      const Index number = taps(0, z) * taps(1, y);
      for (Index x = 0; x < window.out[2]; ++x) *out++ /= static_cast<Scalar>(number * taps(2, x));
    }
  }
}

Step pool(const Definition& of, bool max) {
  const Geometry geometry(of.node);
  const bool with_padding = of.node.integer("count_include_pad", 0) != 0;
  return of_floats([=]<class Scalar>(Arguments& in) {
    const auto& x = in.as<Scalar>(0);
    const Window window = geometry.forward(x.shape, geometry.kernel_shape);
    auto y = zeros<Scalar>(maps(x.shape, x.shape[1], window.out));
    const double rows =
        static_cast<double>(x.shape[0] * x.shape[1] * window.out[0] * window.out[1]);
    spend((static_cast<double>(y.values.size()) + each_row * rows) *
          static_cast<double>(positions(window.kernel)));
    for (Index c = 0; c < x.shape[0] * x.shape[1]; ++c) {
      const Scalar* from = x.values.data() + c * positions(window.in);
      Scalar* to = y.values.data() + c * positions(window.out);
      if (max) {
        max_pool(window, from, to);
      } else {
        average_pool(window, with_padding, from, to);
      }
    }
    return y;
  });
}

}  // namespace

void add_windows(Operators& operators) {
  operators.insert({
      {"Conv", {2, 3, "auto_pad dilations group kernel_shape pads strides", conv<false>}},
      {"ConvTranspose",
       {2, 3, "auto_pad dilations group kernel_shape output_padding output_shape pads strides",
        conv<true>}},
      {"MaxPool",
       {1, 1, "auto_pad ceil_mode dilations kernel_shape pads storage_order strides",
        [](const Definition& of) { return pool(of, true); }}},
      {"AveragePool",
       {1, 1, "auto_pad ceil_mode count_include_pad dilations kernel_shape pads strides",
        [](const Definition& of) { return pool(of, false); }}},
  });
}

}  // namespace tool::evaluation
