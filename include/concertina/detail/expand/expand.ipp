// How expansions are laid out, and how the one free layer of a function-preserving expansion is
// solved for.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/detail/expand/orthonormal.hpp>
#include <concertina/detail/expand/shift.hpp>
#include <concertina/detail/verify/rounding.hpp>
#include <concertina/expand.hpp>

#include <Eigen/Dense>

#include <algorithm>
#include <cmath>
#include <limits>
#include <sstream>
#include <string>

namespace concertina {
namespace detail {

/// A kernel of one position has no dilation to speak of; the product writes 1.
template <int Rank>
ConvShape<Rank> normalized(ConvShape<Rank> shape) {
  for (int axis = 0; axis < Rank; ++axis) {
    if (shape.kernel_size[axis] == 1) shape.dilation[axis] = 1;
  }
  return shape;
}

/// Layers with these kernels, the widths of `options`, padding on the first and the stride where it
/// is wanted.
template <int Rank>
std::vector<ConvShape<Rank>> lay_out(const ConvShape<Rank>& shape,
                                     const std::vector<PerAxis<Rank>>& kernels,
                                     std::size_t default_stride, const ExpandOptions& options) {
  const std::size_t between = kernels.size() - 1;
  const Index groups = shape.groups;
  std::vector<Index> widths{shape.in};
  if (options.widths.empty()) {
    if (!(options.rate > 0 && options.rate < 1e6)) {
      throw ShapeError("expansion rate " + std::to_string(options.rate) + " is not in (0, 1e6)");
    }
    for (std::size_t map = 0; map < between; ++map) {
      const Index own = (map == 0 ? shape.in : shape.out) / groups;
      const auto wide = static_cast<Index>(std::llround(options.rate * static_cast<double>(own)));
      widths.push_back(checked_multiply(std::max<Index>(wide, 1), groups, "expansion"));
    }
  } else {
    if (options.widths.size() != between) {
      throw ShapeError("an expansion into " + std::to_string(kernels.size()) + " layers takes " +
                       std::to_string(between) + " widths, not " +
                       std::to_string(options.widths.size()) + " (" + to_string(shape) + ")");
    }
    widths.insert(widths.end(), options.widths.begin(), options.widths.end());
  }
  widths.push_back(shape.out);

  const std::size_t stride_on = options.stride_on.value_or(default_stride);
  std::vector<ConvShape<Rank>> layers;
  for (std::size_t l = 0; l < kernels.size(); ++l) {
    const bool last = l + 1 == kernels.size();
    ConvShape<Rank> layer{.out = widths[l + 1],
                          .in = widths[l],
                          .kernel_size = kernels[l],
                          .stride = l == stride_on ? shape.stride : 1,
                          .padding = l == 0 ? shape.padding : 0,
                          .dilation = shape.dilation,
                          .groups = groups,
                          .bias = shape.bias && (last || options.inner_bias)};
    if (options.depthwise_middle && l == 1) {
      if (layer.in != layer.out) {
        throw ShapeError("a depthwise middle needs equal widths on both sides (" +
                         to_string(layer) + ")");
      }
      layer.groups = layer.in;
    }
    validate(layer);
    layers.push_back(normalized(layer));
  }
  if (stride_on >= kernels.size() || Form(layers).shape() != normalized(shape)) {
    throw ShapeError("the stride cannot stand on layer " + std::to_string(stride_on) + " of " +
                     std::to_string(kernels.size()) +
                     " (counted from 0): only 1x1 layers may follow it (" + to_string(shape) + ")");
  }
  return layers;
}

}  // namespace detail

template <int Rank>
std::vector<ConvShape<Rank>> expand_cl(const ConvShape<Rank>& shape, const ExpandOptions& options) {
  validate(shape);
  return detail::lay_out<Rank>(shape, {1, shape.kernel_size, 1}, 1, options);
}

template <int Rank>
  requires(Rank > 0)
std::vector<ConvShape<Rank>> expand_ck(const ConvShape<Rank>& shape, const ExpandOptions& options) {
  validate(shape);
  if (options.depthwise_middle) {
    throw ShapeError("a depthwise middle is a form of CL, not of CK (" + to_string(shape) + ")");
  }
  const Index largest = *std::ranges::max_element(shape.kernel_size);
  if (largest <= 3) {
    throw ShapeError("CK expands kernels larger than 3 into 3x3 layers; expand this one with CL (" +
                     to_string(shape) + ")");
  }
  if (largest > 4096)
    throw ShapeError("CK of kernel " + to_string(shape.kernel_size) + " has too many layers");
  std::vector<PerAxis<Rank>> kernels;
  PerAxis<Rank> left = shape.kernel_size;
  while (*std::ranges::max_element(left) > 1) {
    PerAxis<Rank> kernel;
    for (int axis = 0; axis < Rank; ++axis) {
      kernel[axis] = std::min<Index>(left[axis], 3);
      left[axis] -= kernel[axis] - 1;
    }
    kernels.push_back(kernel);
  }
  return detail::lay_out<Rank>(shape, kernels, kernels.size() - 1, options);
}

namespace detail {

/// A shape that stands for one of lower rank.
inline AnyShape with_rank(const ConvShape<max_rank>& shape, int rank) {
  AnyShape result = shape;
  result.rank = rank;
  return result;
}

/// 1x1, one kernel a hidden channel, 1x1, for one group of `target`. The middle is linear in the
/// target tap by tap.
template <class Real>
std::vector<Conv<Real, max_rank>> preserve_depthwise_middle(
    const Conv<Real, max_rank>& target, const std::vector<ConvShape<max_rank>>& shapes,
    AnyGenerator& generator, Ends ends) {
  std::vector<Conv<Real, max_rank>> layers(shapes.begin(), shapes.end());
  const Index in = target.shape().in, out = target.shape().out, hidden = shapes[1].in;
  const Index taps = numel(target.shape().kernel_size);
  using Map = Eigen::Map<RowMajor<Real>>;
  Map first(layers[0].weight().data(), hidden, in), last(layers[2].weight().data(), out, hidden);
  Map middle(layers[1].weight().data(), hidden, taps);
  const Eigen::Map<const RowMajor<Real>> wanted(target.weight().data(), out * in, taps);
  if (ends == Ends::shift) {
    if (hidden < out * in) return {};
    if constexpr (rounds<Real>) {
      first = random_matrix<Real>(hidden, in, generator);
      middle = random_matrix<Real>(hidden, taps, generator);
    }
    first.topRows(out * in).setZero();
    for (Index o = 0; o < out; ++o) {
      for (Index c = 0; c < in; ++c) first(o * in + c, c) = last(o, o * in + c) = Real(1);
    }
    middle.topRows(out * in) = wanted;
    return layers;
  }
  if constexpr (rounds<Real>) {
    first = random_orthonormal<Real>(hidden, in, generator);
    last = random_orthonormal<Real>(out, hidden, generator);
    Dense<Real> system(out * in, hidden);
    for (Index o = 0; o < out; ++o) {
      for (Index c = 0; c < in; ++c) {
        system.row(o * in + c) = last.row(o).cwiseProduct(first.col(c).transpose());
      }
    }
    middle = system.completeOrthogonalDecomposition().solve(wanted);
  }
  return layers;
}

/// Throws ExpansionError unless the layers contract to the target within what rounding explains.
template <class Scalar>
void require_preserved(const std::vector<Conv<Scalar, max_rank>>& layers,
                       const ConvView<const Scalar, max_rank>& target, int rank) {
  constexpr int Rank = max_rank;
  using A = typename DefaultAccumulator<Scalar>::type;
  using Ref = Reference<A>;
  std::vector<Conv<Ref, Rank>> wide, sizes;
  for (const auto& layer : layers) {
    wide.push_back(layer.template cast<Ref>());
    Conv<Ref, Rank>& size = sizes.emplace_back(wide.back());
    if constexpr (rounds<Ref>) {
      for (Ref& element : size.weight()) element = std::abs(element);
    }
  }
  const Conv<Ref, Rank> product = contract(wide, interior_only);
  bool holds = true;
  long double error = 0, norm = 0;
  if constexpr (rounds<Scalar>) {
    const Conv<Ref, Rank> magnitude = contract(sizes, interior_only);
    const ContractionBounds<Scalar, A, Rank> bounds(tree_of(layers), terms(any_form(layers)),
                                                    least_positive(magnitude.weight()));
    std::size_t i = 0;
    for_each_weight(target, [&](Index o, Index c, const PerAxis<Rank>& offset, const Scalar& to) {
      const auto t = static_cast<long double>(to),
                 found = static_cast<long double>(product.weight()[i]),
                 size = static_cast<long double>(magnitude.weight()[i]);
      ++i;
      holds = holds && std::abs(found - t) <= bounds.weight(o, c, offset, size, t, found);
      error += (found - t) * (found - t);
      norm += t * t;
    });
  } else {
    holds = ConvView<const Scalar, Rank>(product) == target;
  }
  if (holds) return;
  std::ostringstream message;
  message.precision(3);
  message << "layers of these widths cannot represent the kernel: the best leave a relative "
             "residual of "
          << std::sqrt(norm > 0 ? error / norm : error) << " ("
          << to_string(with_rank(target.shape(), rank)) << " into";
  for (const auto& layer : layers) message << ", " << to_string(with_rank(layer.shape(), rank));
  message << "); expand at a higher rate, or another way";
  throw ExpansionError(message.str());
}

/// See concertina::preserve. Layers of lower rank are expanded as layers of this one, so that it is
/// compiled once; `rank` is theirs, for messages.
template <class Scalar>
std::vector<Conv<Scalar, max_rank>> preserve(const ConvView<const Scalar, max_rank>& target,
                                             const std::vector<ConvShape<max_rank>>& shapes,
                                             int rank, AnyGenerator generator, Ends ends) {
  constexpr int Rank = max_rank;
  const auto named = [&](const ConvShape<Rank>& each) { return to_string(with_rank(each, rank)); };
  // Shifts only copy elements, so any scalar will do; a system is solved in double, or in what is
  // wider.
  using Real = std::conditional_t<
      !rounds<Scalar>, Scalar,
      std::conditional_t<(std::numeric_limits<Scalar>::digits > 53), long double, double>>;
  const ConvShape<Rank>& shape = target.shape();
  if (Form(shapes).shape() != normalized(shape)) {
    throw ShapeError("these layers contract to " + named(Form(shapes).shape()) + ", not to " +
                     named(shape));
  }
  if (shapes.back().bias != shape.bias) {
    throw ShapeError("the last layer (" + named(shapes.back()) +
                     ") must have a bias just where the layer it expands has one (" + named(shape) +
                     ")");
  }
  if (!rounds<Scalar> && ends == Ends::orthonormal) {
    throw ShapeError("orthonormal ends need a floating-point scalar; use Ends::shift");
  }
  if constexpr (rounds<Scalar>) {
    const auto finite = [](const Scalar& n) { return std::isfinite(static_cast<long double>(n)); };
    if (!std::ranges::all_of(target.weight(), finite) ||
        !std::ranges::all_of(target.bias(), finite)) {
      throw ExpansionError("the layer has an element that is not finite (" + named(shape) + ")");
    }
  }
  const Index groups = shape.groups;
  const bool depthwise_middle = shapes.size() == 3 && numel(shapes[0].kernel_size) == 1 &&
                                numel(shapes[2].kernel_size) == 1 &&
                                shapes[1].groups == shapes[1].in && shapes[1].in == shapes[1].out &&
                                shapes[1].in > groups;
  std::vector<ConvShape<Rank>> parts;
  for (std::size_t l = 0; l < shapes.size(); ++l) {
    ConvShape<Rank> part = shapes[l];
    const bool middle = depthwise_middle && l == 1;
    if (part.groups != groups && !middle) {
      throw ShapeError("layer " + std::to_string(l + 1) + " (" + named(part) +
                       ") must have the groups of the layer it expands (" + named(shape) + ")");
    }
    part.in /= groups;
    part.out /= groups;
    part.groups = middle ? part.in : 1;
    part.bias = false;
    parts.push_back(part);
  }

  std::vector<Conv<Scalar, Rank>> layers(shapes.begin(), shapes.end());
  ConvShape<Rank> block = shape;
  block.in /= groups;
  block.out /= groups;
  block.groups = 1;
  block.bias = false;
  const auto chunk = static_cast<std::size_t>(weight_numel(block));
  for (Index g = 0; g < groups; ++g) {
    Conv<Real, Rank> wanted(block);
    for (std::size_t i = 0; i < chunk; ++i) {
      wanted.weight()[i] =
          static_cast<Real>(target.weight()[static_cast<std::size_t>(g) * chunk + i]);
    }
    std::vector<Conv<Real, Rank>> found;
    if (depthwise_middle) {
      found = preserve_depthwise_middle(wanted, parts, generator, ends);
    } else if (ends == Ends::shift) {
      found = ShiftEnds<Real>(wanted, parts, generator).layers();
    } else if constexpr (rounds<Real>) {
      found = OrthonormalEnds<Real>(wanted, parts, generator).layers();
    }
    if (found.empty()) {
      throw ExpansionError(
          "the maps between are too narrow to hold the shifted copies of every channel (" +
          named(shape) + "); expand at a higher rate, or with Ends::orthonormal");
    }
    for (std::size_t l = 0; l < found.size(); ++l) {
      const auto from = found[l].weight();
      const auto to =
          layers[l].weight().subspan(static_cast<std::size_t>(g) * from.size(), from.size());
      std::ranges::transform(from, to.begin(),
                             [](const Real& n) { return static_cast<Scalar>(n); });
    }
  }
  std::ranges::copy(target.bias(), layers.back().bias().begin());
  require_preserved(layers, target, rank);
  return layers;
}

}  // namespace detail

template <Layer F, BitGenerator Generator>
std::vector<Conv<typename F::Scalar, F::Rank>> preserve(
    const F& layer, const std::vector<ConvShape<F::Rank>>& shapes, Generator& generator,
    Ends ends) {
  using Scalar = typename F::Scalar;
  constexpr int Rank = F::Rank;
  const ConvView<const Scalar, Rank> view(layer);
  const std::vector<detail::AnyShape> all(shapes.begin(), shapes.end());
  const auto bits = [&] { return random_bits(generator); };
  const auto wide =
      detail::preserve<Scalar>({detail::AnyShape(view.shape()), view.weight(), view.bias()},
                               {all.begin(), all.end()}, Rank, detail::AnyGenerator(bits), ends);
  std::vector<Conv<Scalar, Rank>> layers;
  for (std::size_t l = 0; l < wide.size(); ++l) {
    const auto weight = wide[l].weight(), bias = wide[l].bias();
    layers.emplace_back(shapes[l], std::vector<Scalar>(weight.begin(), weight.end()),
                        std::vector<Scalar>(bias.begin(), bias.end()));
  }
  return layers;
}

}  // namespace concertina

#include <concertina/detail/compiled/expand.hpp>
