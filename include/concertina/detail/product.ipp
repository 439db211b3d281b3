// How a product is computed: its shape, the cheapest order of a chain, and one algorithm for each
// pair of shapes.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/product.hpp>

#include <Eigen/Core>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <numeric>
#include <string>

namespace concertina {

template <int Rank>
Index multiply_adds(const ConvShape<Rank>& outer, const ConvShape<Rank>& inner) {
  constexpr const char* what = "multiply-adds";
  const Index taps = detail::checked_multiply(volume(outer.kernel), volume(inner.kernel), what);
  const Index block = detail::checked_multiply(outer.out / outer.geometry.groups,
                                               inner.in / inner.geometry.groups, what);
  return detail::checked_multiply(detail::checked_multiply(taps, block, what), inner.out, what);
}

namespace detail {

template <class Scalar>
using RowMajor = Eigen::Matrix<Scalar, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
template <class Scalar>
using ConstMatrix = Eigen::Map<const RowMajor<Scalar>, 0, Eigen::OuterStride<>>;
template <class Scalar>
using MutableMatrix = Eigen::Map<RowMajor<Scalar>, 0, Eigen::OuterStride<>>;

/// Channels between two layers that one group of each shares. There the product of two
/// block-diagonal matrices is dense, and each segment fills a block of the result of its own.
struct Segment {
  Index begin, end;    // channels between the layers
  Index outer, inner;  // the groups
};

template <int Rank>
std::vector<Segment> segments(const ConvShape<Rank>& outer, const ConvShape<Rank>& inner) {
  const Index outer_width = outer.in / outer.geometry.groups;
  const Index inner_width = inner.out / inner.geometry.groups;
  std::vector<Segment> result;
  for (Index begin = 0; begin < inner.out;) {
    const Index g2 = begin / outer_width, g1 = begin / inner_width;
    const Index end = std::min((g2 + 1) * outer_width, (g1 + 1) * inner_width);
    result.push_back({begin, end, g2, g1});
    begin = end;
  }
  return result;
}

/// The algorithms of a dense block. Which one runs depends on shapes only, never on the scalar, so
/// that what is proved over a prime field is what runs on floats.
enum class PairPath {
  outer_diagonal,  ///< 1x1 depthwise after kxk: the rows scaled
  inner_diagonal,  ///< kxk after 1x1 depthwise: the columns scaled
  direct,  ///< plain loops: depthwise and tiny blocks, where a matrix product costs more than it
           ///< saves
  outer_pointwise,  ///< 1x1 after kxk: one matrix product, in place
  inner_pointwise,  ///< kxk after 1x1: matrix products over panels of output channels
  general           ///< kxk after kxk: for each tap of the result one product per row of tap pairs
};

/// One factor for each channel: a batch norm or a scale as a layer.
template <int Rank>
bool is_diagonal(const ConvShape<Rank>& shape) {
  return volume(shape.kernel) == 1 && shape.in == shape.geometry.groups &&
         shape.out == shape.geometry.groups;
}

template <int Rank>
PairPath pair_path(const ConvShape<Rank>& outer, const ConvShape<Rank>& inner) {
  if (is_diagonal(outer)) return PairPath::outer_diagonal;
  if (is_diagonal(inner)) return PairPath::inner_diagonal;
  const Index out = outer.out / outer.geometry.groups, in = inner.in / inner.geometry.groups;
  const Index between =
      std::min(outer.in / outer.geometry.groups, inner.out / inner.geometry.groups);
  // Below this, Eigen's packing and call cost about what the loops do.
  constexpr Index smallest_block = 256;
  const bool outer_pointwise = volume(outer.kernel) == 1,
             inner_pointwise = volume(inner.kernel) == 1;
  const Index columns = outer_pointwise ? volume(inner.kernel) : 1;
  if (out * between * in * columns < smallest_block) return PairPath::direct;
  if (outer_pointwise) return PairPath::outer_pointwise;
  return inner_pointwise ? PairPath::inner_pointwise : PairPath::general;
}

/// Time of one product in units of a multiply-add at full speed. Moving a number costs about what
/// 16 of them do, and so does a multiply-add outside a matrix product (AVX-512, both from cache).
template <int Rank>
double pair_cost(const ConvShape<Rank>& outer, const ConvShape<Rank>& inner) {
  constexpr double slow = 16;
  const auto flops = static_cast<double>(multiply_adds(outer, inner));
  const auto numbers = [](const ConvShape<Rank>& shape) {
    return static_cast<double>(weight_count(shape));
  };
  const double result = numbers(product_shape(outer, inner));
  switch (pair_path(outer, inner)) {
    case PairPath::outer_diagonal:
    case PairPath::inner_diagonal: return 2 * result;  // streamed, so bound by memory
    case PairPath::direct: return slow * (flops + result);
    case PairPath::outer_pointwise: return flops + slow * result;
    case PairPath::inner_pointwise: return flops + slow * (numbers(outer) + 2 * result);
    case PairPath::general: break;
  }
  return flops + slow * (numbers(outer) + numbers(inner) + 2 * result);
}

/// Row-major index in the result's kernel of each tap of a factor: the taps (b, a) meet at outer[b]
/// + inner[a].
template <int Rank>
std::vector<Index> tap_positions(const ConvShape<Rank>& factor, const PerAxis<Rank>& spacing,
                                 const ConvShape<Rank>& product) {
  std::vector<Index> positions;
  for_each_position(factor.kernel, [&](const PerAxis<Rank>& tap) {
    PerAxis<Rank> at;
    for (int axis = 0; axis < Rank; ++axis) {
      at[axis] = tap[axis] * spacing[axis] / product.geometry.dilation[axis];
    }
    positions.push_back(flat(at, product.kernel));
  });
  return positions;
}

/// One dense block of a product. Weights are [out][between][outer taps] and [between][in][inner
/// taps], the result [out][in][taps]; steps between rows are those of the whole tensors.
template <class Scalar>
struct Block {
  Index out, between, in;
  const Scalar* outer;
  Index outer_step;
  const Scalar* inner;
  Index inner_step;
  Scalar* result;
  Index result_step;
  std::span<const Index> outer_taps, inner_taps;  // their positions in the result's kernel
  Index taps;                                     // of the result

  Index outer_count() const { return static_cast<Index>(outer_taps.size()); }
  Index inner_count() const { return static_cast<Index>(inner_taps.size()); }
};

template <class Scalar>
void multiply_direct(const Block<Scalar>& block) {
  for (Index o = 0; o < block.out; ++o) {
    for (Index m = 0; m < block.between; ++m) {
      const Scalar* w2 = block.outer + o * block.outer_step + m * block.outer_count();
      for (Index c = 0; c < block.in; ++c) {
        const Scalar* w1 = block.inner + m * block.inner_step + c * block.inner_count();
        Scalar* result = block.result + o * block.result_step + c * block.taps;
        for (const Index b : block.outer_taps) {
          const Scalar& factor = *w2++;
          for (std::size_t a = 0; a < block.inner_taps.size(); ++a) {
            Scalar& sum = result[b + block.inner_taps[a]];
            sum = sum + factor * w1[a];
          }
        }
        w2 -= block.outer_count();
      }
    }
  }
}

/// In panels of columns, because Eigen sizes its blocks by the last-level cache, which for a very
/// wide product spills the second: 512 x 2048 x 18432 in float took 41 G multiply-adds/s at once
/// and 51 in panels of 1024 (Xeon, AVX-512).
template <class Scalar>
void multiply_outer_pointwise(const Block<Scalar>& block) {
  constexpr Index panel = 1024;
  const ConstMatrix<Scalar> outer(block.outer, block.out, block.between,
                                  Eigen::OuterStride<>(block.outer_step));
  for (Index first = 0; first < block.in * block.taps; first += panel) {
    const Index columns = std::min(panel, block.in * block.taps - first);
    MutableMatrix<Scalar>(block.result + first, block.out, columns,
                          Eigen::OuterStride<>(block.result_step))
        .noalias() = outer * ConstMatrix<Scalar>(block.inner + first, block.between, columns,
                                                 Eigen::OuterStride<>(block.inner_step));
  }
}

/// For one output channel the result [in][taps] is a matrix product with few columns. Taking
/// several output channels side by side makes it wide: their kernels are copied into
/// [between][channel, tap], whose copies are contiguous runs of a kernel, as are those of the
/// result.
template <class Scalar>
void multiply_inner_pointwise(const Block<Scalar>& block) {
  constexpr Index wanted_columns = 512;
  const Index taps = block.outer_count();
  const Index panel = std::clamp<Index>(wanted_columns / taps, 1, block.out);
  RowMajor<Scalar> kernels(block.between, panel * taps), products(block.in, panel * taps);
  const ConstMatrix<Scalar> inner(block.inner, block.between, block.in,
                                  Eigen::OuterStride<>(block.inner_step));
  for (Index first = 0; first < block.out; first += panel) {
    const Index rows = std::min(panel, block.out - first);
    for (Index m = 0; m < block.between; ++m) {
      for (Index o = 0; o < rows; ++o) {
        std::copy_n(block.outer + (first + o) * block.outer_step + m * taps, taps,
                    &kernels(m, o * taps));
      }
    }
    products.leftCols(rows * taps).noalias() = inner.transpose() * kernels.leftCols(rows * taps);
    for (Index o = 0; o < rows; ++o) {
      for (Index c = 0; c < block.in; ++c) {
        std::copy_n(&products(c, o * taps), taps,
                    block.result + (first + o) * block.result_step + c * block.taps);
      }
    }
  }
}

/// The result's tap t is the sum over tap pairs (b, a) that meet there of the matrix products W2_b
/// W1_a. Pairs that are neighbours in the outer kernel's last axis are neighbours, in reverse, in
/// the inner one's; so with W2 stored [out][b][between] and W1 stored [reversed a][between][in]
/// such a row of pairs is one matrix product, whose inner length is between * pairs. It needs no
/// atomics, no scatter, and no multiplications by zero.
template <class Scalar>
void multiply_general(const Block<Scalar>& block) {
  const Index outer_taps = block.outer_count(), inner_taps = block.inner_count();
  RowMajor<Scalar> outer(block.out, outer_taps * block.between);
  for (Index o = 0; o < block.out; ++o) {
    for (Index m = 0; m < block.between; ++m) {
      const Scalar* from = block.outer + o * block.outer_step + m * outer_taps;
      for (Index b = 0; b < outer_taps; ++b) outer(o, b * block.between + m) = from[b];
    }
  }
  RowMajor<Scalar> inner(inner_taps * block.between, block.in);
  for (Index m = 0; m < block.between; ++m) {
    const Scalar* from = block.inner + m * block.inner_step;
    for (Index a = 0; a < inner_taps; ++a) {
      Scalar* to = &inner((inner_taps - 1 - a) * block.between + m, 0);
      for (Index c = 0; c < block.in; ++c) to[c] = from[c * inner_taps + a];
    }
  }

  // runs[t] lists outer taps b, b + 1, ... with inner taps a, a - 1, ...
  struct Run {
    Index b, a, length;
  };
  std::vector<std::vector<Run>> runs(static_cast<std::size_t>(block.taps));
  for (Index b = 0; b < outer_taps; ++b) {
    for (Index a = 0; a < inner_taps; ++a) {
      const Index t = block.outer_taps[static_cast<std::size_t>(b)] +
                      block.inner_taps[static_cast<std::size_t>(a)];
      auto& at = runs[static_cast<std::size_t>(t)];
      if (!at.empty() && at.back().b + at.back().length == b &&
          at.back().a - at.back().length == a) {
        ++at.back().length;
      } else {
        at.push_back({b, a, 1});
      }
    }
  }

  // All of [tap][out][in] first, then transposed as a whole.
  RowMajor<Scalar> sums(block.taps * block.out, block.in);
  for (Index t = 0; t < block.taps; ++t) {
    auto sum = sums.middleRows(t * block.out, block.out);
    const auto& at = runs[static_cast<std::size_t>(t)];
    if (at.empty()) sum.setZero();  // between spread taps
    for (const Run& run : at) {
      const auto left = outer.middleCols(run.b * block.between, run.length * block.between);
      const auto right =
          inner.middleRows((inner_taps - 1 - run.a) * block.between, run.length * block.between);
      if (&run == &at.front()) {
        sum.noalias() = left * right;
      } else {
        sum.noalias() += left * right;
      }
    }
  }
  // Reading along rows and writing with a stride stays in the first-level cache. The other way
  // round the taps' rows lie powers of two apart and evict each other.
  constexpr Index panel = 256;
  for (Index o = 0; o < block.out; ++o) {
    for (Index first = 0; first < block.in; first += panel) {
      const Index last = std::min(first + panel, block.in);
      for (Index t = 0; t < block.taps; ++t) {
        const Scalar* from = &sums(t * block.out + o, 0);
        Scalar* to = block.result + o * block.result_step + t;
        for (Index c = first; c < last; ++c) to[c * block.taps] = from[c];
      }
    }
  }
}

/// to[i] = factor * from[i].
template <class Scalar>
void scale(const Scalar& factor, const Scalar* from, Scalar* to, Index count) {
  for (Index i = 0; i < count; ++i) to[i] = factor * from[i];
}

/// The weight of a product of which one factor is diagonal. The other one's kernel is the
/// product's, so its numbers stay where they are.
template <class Scalar, int Rank>
void multiply_diagonal(const ConvView<Scalar, Rank>& outer, const ConvView<Scalar, Rank>& inner,
                       Conv<Scalar, Rank>& product) {
  const bool scales_rows = is_diagonal(outer.shape());
  const ConvView<Scalar, Rank>& layer = scales_rows ? inner : outer;
  const Scalar* factors = (scales_rows ? outer : inner).weight().data();
  const Index groups = layer.geometry().groups, taps = volume(layer.shape().kernel);
  const Index in = layer.shape().in / groups, out = layer.shape().out / groups;
  const Scalar* from = layer.weight().data();
  Scalar* to = product.weight().data();
  for (Index o = 0; o < layer.shape().out; ++o) {
    if (scales_rows) {
      scale(factors[o], from, to, in * taps);
      from += in * taps, to += in * taps;
      continue;
    }
    for (Index c = 0; c < in; ++c, from += taps, to += taps) {
      scale(factors[o / out * in + c], from, to, taps);
    }
  }
}

/// The weight of a product as dense blocks, one for each segment.
template <class Scalar, int Rank>
void multiply_blocks(const ConvView<Scalar, Rank>& outer, const ConvView<Scalar, Rank>& inner,
                     PairPath path, Conv<Scalar, Rank>& product) {
  const auto groups = [](const auto& layer) { return layer.geometry().groups; };
  const Index outer_in = outer.shape().in / groups(outer),
              inner_in = inner.shape().in / groups(inner);
  const Index out = outer.shape().out / groups(outer);
  const Index product_in = product.shape().in / groups(product);
  const Index outer_taps = volume(outer.shape().kernel), inner_taps = volume(inner.shape().kernel);
  const Index taps = volume(product.shape().kernel);

  PerAxis<Rank> outer_spacing;
  for (int axis = 0; axis < Rank; ++axis) {
    outer_spacing[axis] = outer.geometry().dilation[axis] * inner.geometry().stride[axis];
  }
  const std::vector<Index> outer_at = tap_positions(outer.shape(), outer_spacing, product.shape());
  const std::vector<Index> inner_at =
      tap_positions(inner.shape(), inner.geometry().dilation, product.shape());
  for (const Segment& segment : segments(outer.shape(), inner.shape())) {
    const Index first_out = segment.outer * out;
    const Index first_in = segment.inner * inner_in % product_in;
    const Block<Scalar> block{
        .out = out,
        .between = segment.end - segment.begin,
        .in = inner_in,
        .outer =
            outer.weight().data() + (first_out * outer_in + segment.begin % outer_in) * outer_taps,
        .outer_step = outer_in * outer_taps,
        .inner = inner.weight().data() + segment.begin * inner_in * inner_taps,
        .inner_step = inner_in * inner_taps,
        .result = product.weight().data() + (first_out * product_in + first_in) * taps,
        .result_step = product_in * taps,
        .outer_taps = outer_at,
        .inner_taps = inner_at,
        .taps = taps};
    switch (path) {
      case PairPath::outer_diagonal:  // not in blocks; their rows or columns would do
      case PairPath::inner_diagonal:
      case PairPath::direct: multiply_direct(block); break;
      case PairPath::outer_pointwise: multiply_outer_pointwise(block); break;
      case PairPath::inner_pointwise: multiply_inner_pointwise(block); break;
      case PairPath::general: multiply_general(block); break;
    }
  }
}

/// The bias of a product that has one: b2 plus the outer layer on a map that is b1 everywhere.
template <class Scalar, int Rank>
void multiply_bias(const ConvView<Scalar, Rank>& outer, const ConvView<Scalar, Rank>& inner,
                   Conv<Scalar, Rank>& product) {
  const Index in = outer.shape().in / outer.geometry().groups;
  const Index out = outer.shape().out / outer.geometry().groups;
  const Index taps = volume(outer.shape().kernel);
  for (Index o = 0; o < product.shape().out; ++o) {
    Scalar& bias = product.bias()[static_cast<std::size_t>(o)];
    if (outer.shape().bias) bias = outer.bias()[static_cast<std::size_t>(o)];
    if (!inner.shape().bias) continue;
    const Scalar* weight = outer.weight().data() + o * in * taps;
    const Scalar* b1 = inner.bias().data() + o / out * in;
    for (Index m = 0; m < in; ++m) {
      Scalar sum(0);
      for (Index b = 0; b < taps; ++b) sum = sum + *weight++;
      bias = bias + sum * b1[m];
    }
  }
}

/// outer * inner, as one layer.
template <class Scalar, int Rank>
Conv<Scalar, Rank> multiply(const ConvView<Scalar, Rank>& outer,
                            const ConvView<Scalar, Rank>& inner) {
  const ConvShape<Rank> shape = product_shape(outer.shape(), inner.shape());
  require_few_zeros(shape, multiply_adds(outer.shape(), inner.shape()), [&] {
    return to_string(outer.shape()) + " after " + to_string(inner.shape());
  });
  Conv<Scalar, Rank> product(shape);
  const PairPath path = pair_path(outer.shape(), inner.shape());
  if (path == PairPath::outer_diagonal || path == PairPath::inner_diagonal) {
    multiply_diagonal(outer, inner, product);
  } else {
    multiply_blocks(outer, inner, path, product);
  }
  if (shape.bias) multiply_bias(outer, inner, product);
  return product;
}

/// The cheapest order of a chain: for each run of layers, where its last product splits it.
/// Source  Cormen et al., Introduction to Algorithms, "Matrix-chain multiplication"
template <int Rank>
class ChainOrder {
 public:
  explicit ChainOrder(std::span<const ConvShape<Rank>> layers) : count_(layers.size()) {
    shapes_.resize(count_ * count_);
    cost_.assign(count_ * count_, 0);
    split_.assign(count_ * count_, 0);
    for (std::size_t i = 0; i < count_; ++i) shapes_[at(i, i)] = layers[i];
    for (std::size_t length = 1; length < count_; ++length) {
      for (std::size_t i = 0; i + length < count_; ++i) decide(i, i + length);
    }
  }

  /// The layer before which the product of first..last splits.
  std::size_t split(std::size_t first, std::size_t last) const { return split_[at(first, last)]; }

 private:
  std::size_t at(std::size_t first, std::size_t last) const { return first * count_ + last; }

  void decide(std::size_t first, std::size_t last) {
    double& best = cost_[at(first, last)];
    split_[at(first, last)] = last;  // where every split overflows, multiply_run meets that
    best = std::numeric_limits<double>::infinity();
    for (std::size_t middle = first + 1; middle <= last; ++middle) {
      const double parts = cost_[at(first, middle - 1)] + cost_[at(middle, last)];
      if (!(parts < best)) continue;
      try {
        const auto &inner = shapes_[at(first, middle - 1)], &outer = shapes_[at(middle, last)];
        const double cost = parts + pair_cost(outer, inner);
        if (!(cost < best)) continue;
        best = cost;
        split_[at(first, last)] = middle;
        shapes_[at(first, last)] = product_shape(outer, inner);  // the same for every split
      } catch (const SizeError&) {
        continue;  // an intermediate that overflows is never chosen
      }
    }
  }

  std::size_t count_;
  std::vector<ConvShape<Rank>> shapes_;
  std::vector<double> cost_;
  std::vector<std::size_t> split_;
};

/// The product of layers first..last.
template <class Scalar, int Rank>
Conv<Scalar, Rank> multiply_run(std::span<const ConvView<Scalar, Rank>> layers,
                                const ChainOrder<Rank>& order, std::size_t first,
                                std::size_t last) {
  const std::size_t middle = order.split(first, last);
  const auto part = [&](std::size_t from, std::size_t to, auto&& use) {
    if (from == to) return use(layers[from]);
    const Conv<Scalar, Rank> product = multiply_run(layers, order, from, to);
    return use(ConvView<Scalar, Rank>(product));
  };
  return part(first, middle - 1, [&](const ConvView<Scalar, Rank>& inner) {
    return part(middle, last,
                [&](const ConvView<Scalar, Rank>& outer) { return multiply(outer, inner); });
  });
}

/// The product of a chain, the first layer applied first.
template <class Scalar, int Rank>
Conv<Scalar, Rank> multiply(std::span<const ConvView<Scalar, Rank>> layers) {
  if (layers.size() == 1) return Conv<Scalar, Rank>(layers.front());
  std::vector<ConvShape<Rank>> shapes;
  for (const auto& layer : layers) shapes.push_back(layer.shape());
  const ChainOrder<Rank> order(std::span<const ConvShape<Rank>>{shapes});
  return multiply_run(layers, order, 0, layers.size() - 1);
}

}  // namespace detail
}  // namespace concertina
