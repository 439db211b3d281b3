// Function-preserving expansion with random orthonormal ends: the one free layer, by linear least
// squares.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/contract.hpp>
#include <concertina/detail/expand/order.hpp>
#include <concertina/detail/row_major.hpp>
#include <concertina/random.hpp>

#include <Eigen/Dense>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <utility>
#include <vector>

namespace concertina::detail {

template <class Real>
using Dense = Eigen::Matrix<Real, Eigen::Dynamic, Eigen::Dynamic>;

template <class Real>
Dense<Real> random_matrix(Index rows, Index columns, AnyGenerator& generator) {
  Dense<Real> matrix(rows, columns);
  for (Index i = 0; i < rows; ++i) {
    for (Index j = 0; j < columns; ++j)
      matrix(i, j) = static_cast<Real>(random_uniform(generator, 1));
  }
  return matrix;
}

/// Random with orthonormal columns, or rows where there are fewer of them.
template <class Real>
Dense<Real> random_orthonormal(Index rows, Index columns, AnyGenerator& generator) {
  if (rows < columns) return random_orthonormal<Real>(columns, rows, generator).transpose();
  const Dense<Real> random = random_matrix<Real>(rows, columns, generator);
  return Eigen::HouseholderQR<Dense<Real>>(random).householderQ() *
         Dense<Real>::Identity(rows, columns);
}

/// `total` channels in `parts` parts whose sizes differ by at most one; where part `i` begins.
inline Index part_begin(Index total, Index parts, Index i) { return total * i / parts; }

/// One group of a function-preserving expansion: a dense layer, into dense layers.
///
/// All layers but one, X, are given; L stands for those after it and R for those before it, and L X
/// R = F is linear in X. For 1x1 layers around X that is a matrix equation, solved by their
/// pseudo-inverses, which for orthonormal ends are their transposes. Where L or R has a kernel the
/// system has a row for each element of F and a column for each of X, too many at once. So channels
/// are taken in small channel blocks: each of the inputs' has hidden channels of its own in R, each
/// of the outputs' in L; each pair of them is then a small system, and all pairs share one matrix.
/// A random rotation of each map between two layers, absorbed by the layers on its sides, mixes the
/// channels again.
template <class Real>
class OrthonormalEnds {
 public:
  static constexpr int Rank = max_rank;
  using Layers = std::vector<Conv<Real, Rank>>;

  OrthonormalEnds(const Conv<Real, Rank>& target, std::vector<ConvShape<Rank>> shapes,
                  AnyGenerator& generator)
      : target_(target), shapes_(std::move(shapes)), generator_(generator) {}

  /// The layers, or those of the smallest residual where no choice of the free layer can represent
  /// the target.
  Layers layers() {
    const auto pointwise = [&](std::size_t l) { return numel(shapes_[l].kernel_size) == 1; };
    const std::vector<std::size_t> order = largest_first(shapes_);
    Layers best;
    for (const std::size_t free : order) {
      bool others_pointwise = true;
      for (std::size_t l = 0; l < shapes_.size(); ++l) {
        others_pointwise = others_pointwise && (l == free || pointwise(l));
      }
      if (others_pointwise) {
        keep_better(best, solve_pointwise(free));
        if (residual_ < tolerance) return best;
        continue;
      }
      for (const Index channels : {1, 2, 3, 4, 6, 8, 12, 16}) {
        if (channels > std::max(target_.shape().in, target_.shape().out)) break;
        auto found = solve_blocks(free, channels);
        if (found.empty()) continue;
        keep_better(best, std::move(found));
        if (residual_ < tolerance) return best;
      }
    }
    return best;
  }

 private:
  /// A relative residual below this means a solved system; an unsolvable one leaves far more.
  static constexpr Real tolerance = Real(1e-10);

  void keep_better(Layers& best, Layers candidate) {
    const Conv<Real, Rank> product = contract(candidate, interior_only);
    Real error = 0, norm = 0;
    for (std::size_t i = 0; i < target_.weight().size(); ++i) {
      const Real difference = product.weight()[i] - target_.weight()[i];
      error += difference * difference;
      norm += target_.weight()[i] * target_.weight()[i];
    }
    const Real residual = norm > 0 ? std::sqrt(error / norm) : std::sqrt(error);
    if (best.empty() || residual < residual_) {
      best = std::move(candidate);
      residual_ = residual;
    }
  }

  static Eigen::Map<RowMajor<Real>> matrix(Conv<Real, Rank>& layer) {
    const Index columns = layer.shape().in * numel(layer.shape().kernel_size);
    return {layer.weight().data(), layer.shape().out, columns};
  }

  /// The tap's slice of a weight, [out][in].
  static auto slice(Conv<Real, Rank>& layer, Index tap) {
    const Index taps = numel(layer.shape().kernel_size);
    using Step = Eigen::Stride<Eigen::Dynamic, Eigen::Dynamic>;
    return Eigen::Map<RowMajor<Real>, 0, Step>(layer.weight().data() + tap, layer.shape().out,
                                               layer.shape().in,
                                               Step(layer.shape().in * taps, taps));
  }

  /// Only the free layer may have a kernel; the others are matrices.
  Layers solve_pointwise(std::size_t free) {
    Layers layers;
    Dense<Real> right = Dense<Real>::Identity(target_.shape().in, target_.shape().in);
    Dense<Real> left = Dense<Real>::Identity(shapes_[free].out, shapes_[free].out);
    for (std::size_t l = 0; l < shapes_.size(); ++l) {
      Conv<Real, Rank>& layer = layers.emplace_back(shapes_[l]);
      if (l == free) continue;
      matrix(layer) = random_orthonormal<Real>(shapes_[l].out, shapes_[l].in, generator_);
      Dense<Real>& side = l < free ? right : left;
      side = (matrix(layer) * side).eval();
    }
    const Dense<Real> undo_left = pseudo_inverse(left), undo_right = pseudo_inverse(right);
    for (Index tap = 0; tap < numel(target_.shape().kernel_size); ++tap) {
      slice(layers[free], tap) = undo_left * slice(target_, tap) * undo_right;
    }
    return layers;
  }

  static Dense<Real> pseudo_inverse(const Dense<Real>& matrix) {
    Dense<Real> gram;
    if (matrix.rows() < matrix.cols()) {
      gram = matrix * matrix.transpose();
    } else {
      gram = matrix.transpose() * matrix;
    }
    if (gram.isIdentity(tolerance)) return matrix.transpose();  // as for ends wider than the layer
    return matrix.completeOrthogonalDecomposition().pseudoInverse();
  }

  /// The given layers on one side of X for one channel block: `widths` from the outside of the
  /// chain to X.
  struct Side {
    std::vector<Index> widths;
    Layers layers;                            // in the chain's order
    std::optional<Conv<Real, Rank>> product;  // none where X itself is the end
  };

  /// Widths of channel block `i` of `blocks` in the maps begin..end; empty where a map is too
  /// narrow for so many blocks.
  std::vector<Index> block_widths(std::size_t begin, std::size_t end, Index blocks, Index i) const {
    std::vector<Index> widths;
    for (std::size_t map = begin; map < end; ++map) {
      const Index total = map == 0 ? shapes_[0].in : shapes_[map - 1].out;
      if (total < blocks) return {};
      widths.push_back(part_begin(total, blocks, i + 1) - part_begin(total, blocks, i));
    }
    return widths;
  }

  Side make_side(std::size_t begin, const std::vector<Index>& widths) {
    Side side{.widths = widths, .layers = {}, .product = std::nullopt};
    for (std::size_t i = 0; i + 1 < widths.size(); ++i) {
      ConvShape<Rank> shape = shapes_[begin + i];
      shape.in = widths[i];
      shape.out = widths[i + 1];
      shape.bias = false;
      Conv<Real, Rank>& layer = side.layers.emplace_back(shape);
      matrix(layer) =
          random_orthonormal<Real>(shape.out, shape.in * numel(shape.kernel_size), generator_);
    }
    if (!side.layers.empty()) side.product = contract(side.layers, interior_only);
    return side;
  }

  /// Rows: elements of a block of F, [out][in][tap]; columns: elements of a block of X,
  /// [out][in][tap].
  Dense<Real> system(const Side& left, const Side& right, std::size_t free) const {
    const ConvShape<Rank> identity{.out = 1, .in = 1};
    const AnyShape after = left.product ? left.product->shape() : identity;
    const AnyShape before = right.product ? right.product->shape() : identity;
    const AnyShape x = shapes_[free], target = target_.shape();
    const Index out = left.widths.back(), x_out = left.widths.front();
    const Index in = right.widths.front(), x_in = right.widths.back();
    Axes after_spacing, x_spacing;
    for (int axis = 0; axis < max_rank; ++axis) {
      x_spacing[axis] = x.dilation[axis] * before.stride[axis];
      after_spacing[axis] = after.dilation[axis] * before.stride[axis] * x.stride[axis];
    }
    const auto after_at = tap_positions(after, after_spacing, target);
    const auto x_at = tap_positions(x, x_spacing, target);
    const auto before_at = tap_positions(before, before.dilation, target);
    const auto element = [](const Side& side, Index o, Index c, std::size_t tap) {
      if (!side.product) return o == c ? Real(1) : Real(0);
      const Index taps = numel(side.product->shape().kernel_size);
      return side.product->weight()[static_cast<std::size_t>(
          (o * side.product->shape().in + c) * taps + static_cast<Index>(tap))];
    };
    const Index taps = numel(target_.shape().kernel_size);
    const auto x_taps = static_cast<Index>(x_at.size());
    Dense<Real> matrix = Dense<Real>::Zero(out * in * taps, x_out * x_in * x_taps);
    for (Index o = 0; o < out; ++o) {
      for (Index p = 0; p < x_out; ++p) {
        for (std::size_t b = 0; b < after_at.size(); ++b) {
          const Real l = element(left, o, p, b);
          for (Index q = 0; l != 0 && q < x_in; ++q) {
            for (Index c = 0; c < in; ++c) {
              for (std::size_t a = 0; a < before_at.size(); ++a) {
                const Real value = l * element(right, q, c, a);
                for (Index s = 0; s < x_taps; ++s) {
                  const Index tap = after_at[b] + before_at[a] + x_at[static_cast<std::size_t>(s)];
                  matrix((o * in + c) * taps + tap, (p * x_in + q) * x_taps + s) += value;
                }
              }
            }
          }
        }
      }
    }
    return matrix;
  }

  /// Blocks of about `channels` channels on either side of the free layer. Empty where the system
  /// is too large, or a map between too narrow.
  Layers solve_blocks(std::size_t free, Index channels) {
    const std::size_t maps = shapes_.size() + 1;
    const auto block_count = [&](Index total, bool has_side) {
      return has_side ? std::max<Index>(1, total / channels) : total;
    };
    const bool has_left = free + 1 < shapes_.size(), has_right = free > 0;
    const Index out_blocks = block_count(target_.shape().out, has_left);
    const Index in_blocks = block_count(target_.shape().in, has_right);

    // Blocks of the same widths share their given layers, and so their systems.
    const auto collect = [&](std::size_t begin, std::size_t end, Index blocks,
                             std::vector<Side>& sides, std::vector<std::size_t>& which) {
      for (Index i = 0; i < blocks; ++i) {
        const std::vector<Index> widths = block_widths(begin, end, blocks, i);
        if (widths.empty()) return false;
        const auto known = std::ranges::find(sides, widths, &Side::widths);
        which.push_back(static_cast<std::size_t>(known - sides.begin()));
        if (known == sides.end()) sides.push_back(make_side(begin, widths));
      }
      return true;
    };
    std::vector<Side> lefts, rights;
    std::vector<std::size_t> left_of, right_of;
    if (!collect(free + 1, maps, out_blocks, lefts, left_of)) return {};
    if (!collect(0, free + 1, in_blocks, rights, right_of)) return {};
    const Index taps = numel(target_.shape().kernel_size),
                x_taps = numel(shapes_[free].kernel_size);
    constexpr Index largest_system = Index{1} << 22;
    for (const Side& left : lefts) {
      for (const Side& right : rights) {
        const Index rows = left.widths.back() * right.widths.front() * taps;
        const Index columns = left.widths.front() * right.widths.back() * x_taps;
        if (rows > largest_system / columns) return {};
      }
    }

    Layers layers;
    for (const ConvShape<Rank>& shape : shapes_) layers.emplace_back(shape);
    place(layers, 0, rights, right_of);
    place(layers, free + 1, lefts, left_of);
    const Index x_in_total = shapes_[free].in, x_out_total = shapes_[free].out;
    for (std::size_t l = 0; l < lefts.size(); ++l) {
      for (std::size_t r = 0; r < rights.size(); ++r) {
        const Side &left = lefts[l], &right = rights[r];
        const Index out = left.widths.back(), in = right.widths.front();
        const Index x_out = left.widths.front(), x_in = right.widths.back();
        std::vector<std::pair<Index, Index>> pairs;
        for (Index i = 0; i < out_blocks; ++i) {
          for (Index j = 0; j < in_blocks; ++j) {
            if (left_of[static_cast<std::size_t>(i)] == l &&
                right_of[static_cast<std::size_t>(j)] == r) {
              pairs.emplace_back(i, j);
            }
          }
        }
        Dense<Real> wanted(out * in * taps, static_cast<Index>(pairs.size()));
        const auto run = [&](Conv<Real, Rank>& layer, Index o,
                             Index c) {  // the taps of one pair of channels
          const Index count = numel(layer.shape().kernel_size);
          return Eigen::Map<Eigen::Matrix<Real, Eigen::Dynamic, 1>>(
              layer.weight().data() + (o * layer.shape().in + c) * count, count);
        };
        for (std::size_t k = 0; k < pairs.size(); ++k) {
          const Index o0 = part_begin(target_.shape().out, out_blocks, pairs[k].first);
          const Index c0 = part_begin(target_.shape().in, in_blocks, pairs[k].second);
          for (Index o = 0; o < out; ++o) {
            for (Index c = 0; c < in; ++c) {
              wanted.col(static_cast<Index>(k)).segment((o * in + c) * taps, taps) =
                  run(target_, o0 + o, c0 + c);
            }
          }
        }
        const Dense<Real> a = system(left, right, free);
        const Eigen::CompleteOrthogonalDecomposition<Dense<Real>> factored(a);
        Dense<Real> x = factored.solve(wanted);
        x += factored.solve(wanted - a * x);  // one refinement
        for (std::size_t k = 0; k < pairs.size(); ++k) {
          const Index p0 = part_begin(x_out_total, out_blocks, pairs[k].first);
          const Index q0 = part_begin(x_in_total, in_blocks, pairs[k].second);
          for (Index p = 0; p < x_out; ++p) {
            for (Index q = 0; q < x_in; ++q) {
              run(layers[free], p0 + p, q0 + q) =
                  x.col(static_cast<Index>(k)).segment((p * x_in + q) * x_taps, x_taps);
            }
          }
        }
      }
    }
    for (std::size_t map = 1; map < shapes_.size(); ++map) rotate(layers[map - 1], layers[map]);
    return layers;
  }

  /// Puts the channel blocks' given layers on the diagonals of the chain's.
  void place(Layers& layers, std::size_t begin, const std::vector<Side>& sides,
             const std::vector<std::size_t>& which) {
    const auto blocks = static_cast<Index>(which.size());
    for (std::size_t l = 0; l < sides.front().layers.size(); ++l) {
      Conv<Real, Rank>& whole = layers[begin + l];
      for (Index i = 0; i < blocks; ++i) {
        Conv<Real, Rank> part = sides[which[static_cast<std::size_t>(i)]].layers[l];
        for (Index tap = 0; tap < numel(whole.shape().kernel_size); ++tap) {
          slice(whole, tap)
              .block(part_begin(whole.shape().out, blocks, i),
                     part_begin(whole.shape().in, blocks, i), part.shape().out, part.shape().in) =
              slice(part, tap);
        }
      }
    }
  }

  /// Turns the map between two layers by a random rotation, which their product does not notice.
  void rotate(Conv<Real, Rank>& before, Conv<Real, Rank>& after) {
    const Index width = before.shape().out;
    const Dense<Real> rotation = random_orthonormal<Real>(width, width, generator_);
    matrix(before) = (rotation * matrix(before)).eval();
    for (Index tap = 0; tap < numel(after.shape().kernel_size); ++tap) {
      slice(after, tap) = (slice(after, tap) * rotation.transpose()).eval();
    }
  }

  Conv<Real, Rank> target_;
  std::vector<ConvShape<Rank>> shapes_;
  AnyGenerator& generator_;
  Real residual_ = std::numeric_limits<Real>::infinity();  // relative, in the Frobenius norm
};

}  // namespace concertina::detail
