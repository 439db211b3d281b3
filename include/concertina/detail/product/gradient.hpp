// The gradient of one product with respect to both factors, by the algorithm that mirrors the
// product's own.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/product.hpp>

#include <algorithm>
#include <span>

namespace concertina::detail {

/// The gradients of one product after another of the same shapes. With P = W2 W1, G = dL/dP and
/// taps b of W2 and a of W1 that meet at b + a,
///   dL/dW2[o][m][b] = sum over c, a of G[o][c][b + a] W1[m][c][a]
///   dL/dW1[m][c][a] = sum over o, b of W2[o][m][b] G[o][c][b + a]
/// in each block. A number of either factor is in one block only, so each gradient is written once.
template <class Scalar, int Rank>
class PairGradient {
 public:
  explicit PairGradient(const PairPlan<Rank>& plan) {
    Index numbers = 0;
    plan.for_each_block(
        [&](const Block& block) { numbers = std::max(numbers, space(plan, block)); });
    if (plan.inner.bias) numbers = std::max(numbers, 2 * bias_columns(plan));
    scratch_.resize(numbers);
  }

  /// From the gradient of the product to those of its factors.
  template <class Run>
  void operator()(const PairPlan<Rank>& plan, const ConvView<Scalar, Rank>& outer,
                  const ConvView<Scalar, Rank>& inner, const ConvView<Scalar, Rank>& gradient,
                  Conv<Scalar, Rank>& outer_gradient, Conv<Scalar, Rank>& inner_gradient,
                  Run& run) {
    weight(plan, outer.weight().data(), inner.weight().data(), gradient.weight().data(),
           outer_gradient.weight().data(), inner_gradient.weight().data(), run);
    if (outer.shape().bias) std::ranges::copy(gradient.bias(), outer_gradient.bias().begin());
    if (inner.shape().bias) {
      inner_bias(plan, outer.weight().data(), inner.bias(), gradient.bias(),
                 outer_gradient.weight().data(), inner_gradient.bias());
    }
  }

 private:
  struct Numbers {
    const Scalar *outer, *inner, *product_gradient;
    Scalar *outer_gradient, *inner_gradient;
  };
  using Matrix = Eigen::Map<RowMajor<Scalar>>;
  using Vector = Eigen::Matrix<Scalar, Eigen::Dynamic, 1>;

  static Index bias_columns(const PairPlan<Rank>& plan) {
    return plan.outer.in / plan.outer.groups * numel(plan.outer.kernel_size);
  }

  template <class Run>
  void weight(const PairPlan<Rank>& plan, const Scalar* outer, const Scalar* inner,
              const Scalar* product_gradient, Scalar* outer_gradient, Scalar* inner_gradient,
              Run& run) {
    if (plan.path == PairPath::outer_diagonal) {
      return outer_diagonal(plan, outer, inner, product_gradient, outer_gradient, inner_gradient);
    }
    if (plan.path == PairPath::inner_diagonal) {
      return inner_diagonal(plan, outer, inner, product_gradient, outer_gradient, inner_gradient);
    }
    if (plan.path == PairPath::direct) {
      std::fill_n(outer_gradient, weight_numel(plan.outer), Scalar(0));
      std::fill_n(inner_gradient, weight_numel(plan.inner), Scalar(0));
    }
    plan.for_each_block([&](const Block& block) {
      const Numbers at{outer + block.outer, inner + block.inner, product_gradient + block.result,
                       outer_gradient + block.outer, inner_gradient + block.inner};
      switch (plan.path) {
        case PairPath::outer_diagonal:
        case PairPath::inner_diagonal: break;
        case PairPath::direct: direct(plan, block, at); break;
        case PairPath::outer_pointwise: outer_pointwise(plan, block, at, run); break;
        case PairPath::inner_pointwise: inner_pointwise(plan, block, at, run); break;
        case PairPath::general: general(plan, block, at, run); break;
      }
    });
  }

  static bool has_panels_apart(const PairPlan<Rank>& plan, const Block& block) {
    return plan.work(block) >= least_shared;
  }

  /// Numbers of scratch that a block takes.
  static Index space(const PairPlan<Rank>& plan, const Block& block) {
    if (plan.path == PairPath::inner_pointwise) {
      const Index panels = plan.kernel_panels(block),
                  width = plan.kernels_in_panel(block) * plan.outer_count();
      return (panels * (block.between + block.in) +
              (has_panels_apart(plan, block) ? panels : 1) * block.between) *
             width;
    }
    if (plan.path != PairPath::general) return 0;
    const Index rows = block.out * plan.outer_count(), columns = plan.inner_count() * block.in;
    return block.out * plan.taps * block.in + rows * columns + 2 * rows * block.between +
           2 * block.between * columns;
  }

  static void outer_diagonal(const PairPlan<Rank>& plan, const Scalar* factors, const Scalar* inner,
                             const Scalar* product_gradient, Scalar* factor_gradient,
                             Scalar* inner_gradient) {
    const Index row = plan.inner.in / plan.inner.groups * plan.taps;
    for (Index o = 0; o < plan.inner.out; ++o) {
      Scalar sum(0);
      for (Index i = 0; i < row; ++i) {
        sum = sum + *product_gradient * *inner++;
        *inner_gradient++ = factors[o] * *product_gradient++;
      }
      factor_gradient[o] = sum;
    }
  }

  static void inner_diagonal(const PairPlan<Rank>& plan, const Scalar* outer, const Scalar* factors,
                             const Scalar* product_gradient, Scalar* outer_gradient,
                             Scalar* factor_gradient) {
    const Index groups = plan.outer.groups, in = plan.outer.in / groups,
                out = plan.outer.out / groups;
    std::fill_n(factor_gradient, plan.outer.in, Scalar(0));
    for (Index o = 0; o < plan.outer.out; ++o) {
      for (Index c = 0; c < in; ++c) {
        const Index channel = o / out * in + c;
        Scalar sum(0);
        for (Index t = 0; t < plan.taps; ++t) {
          sum = sum + *product_gradient * *outer++;
          *outer_gradient++ = factors[channel] * *product_gradient++;
        }
        factor_gradient[channel] = factor_gradient[channel] + sum;
      }
    }
  }

  static void direct(const PairPlan<Rank>& plan, const Block& block, const Numbers& at) {
    const std::span<const Index> outer_taps(plan.outer_taps), inner_taps(plan.inner_taps);
    const Index taps = plan.taps;
    for (Index o = 0; o < block.out; ++o) {
      const Scalar *w2 = at.outer + o * block.outer_step, *row = at.inner;
      Scalar *g2 = at.outer_gradient + o * block.outer_step, *row_gradient = at.inner_gradient;
      for (Index m = 0; m < block.between; ++m) {
        const Scalar *w1 = row, *gradient = at.product_gradient + o * block.result_step;
        Scalar* g1 = row_gradient;
        for (Index c = 0; c < block.in; ++c) {
          for (std::size_t b = 0; b < outer_taps.size(); ++b) {
            const Scalar* const at_b = gradient + outer_taps[b];
            Scalar sum = g2[b];
            for (std::size_t a = 0; a < inner_taps.size(); ++a) {
              const Scalar& g = at_b[inner_taps[a]];
              sum = sum + g * w1[a];
              g1[a] = g1[a] + w2[b] * g;
            }
            g2[b] = sum;
          }
          w1 += inner_taps.size(), g1 += inner_taps.size(), gradient += taps;
        }
        w2 += outer_taps.size(), g2 += outer_taps.size();
        row += block.inner_step, row_gradient += block.inner_step;
      }
    }
  }

  /// Two matrix products, in place.
  template <class Run>
  static void outer_pointwise(const PairPlan<Rank>& plan, const Block& block, const Numbers& at,
                              Run& run) {
    const Index columns = block.in * plan.taps;
    const ConstMatrix<Scalar> outer(at.outer, block.out, block.between,
                                    Eigen::OuterStride<>(block.outer_step)),
        inner(at.inner, block.between, columns, Eigen::OuterStride<>(block.inner_step)),
        gradient(at.product_gradient, block.out, columns, Eigen::OuterStride<>(block.result_step));
    MutableMatrix<Scalar> outer_gradient(at.outer_gradient, block.out, block.between,
                                         Eigen::OuterStride<>(block.outer_step)),
        inner_gradient(at.inner_gradient, block.between, columns,
                       Eigen::OuterStride<>(block.inner_step));
    multiply_both(plan, block, gradient, outer, inner, outer_gradient, inner_gradient, run);
  }

  /// outer_gradient = gradient inner^T and inner_gradient = outer^T gradient, in panels.
  template <class Run, class Gradient, class Outer, class Inner, class OuterOut, class InnerOut>
  static void multiply_both(const PairPlan<Rank>& plan, const Block& block,
                            const Gradient& gradient, const Outer& outer, const Inner& inner,
                            OuterOut& outer_gradient, InnerOut& inner_gradient, Run& run) {
    const Panels of_outer(gradient.rows(), inner.rows(), gradient.cols()),
        of_inner(outer.cols(), gradient.cols(), gradient.rows());
    share_out(2 * plan.work(block), of_outer.count() + of_inner.count(), run, [&](Index i) {
      if (i < of_outer.count()) {
        const auto [row, column, rows, columns] = of_outer[i];
        outer_gradient.block(row, column, rows, columns).noalias() =
            gradient.middleRows(row, rows) * inner.middleRows(column, columns).transpose();
      } else {
        const auto [row, column, rows, columns] = of_inner[i - of_outer.count()];
        inner_gradient.block(row, column, rows, columns).noalias() =
            outer.middleCols(row, rows).transpose() * gradient.middleCols(column, columns);
      }
    });
  }

  /// With several output channels side by side, as in the product: kernels [between][channel, tap]
  /// and gradients [in][channel, tap], panel after panel. Both are kept until the inner gradient,
  /// which sums over all panels, is computed.
  template <class Run>
  void inner_pointwise(const PairPlan<Rank>& plan, const Block& block, const Numbers& at,
                       Run& run) {
    const Index taps = plan.outer_count(), in_panel = plan.kernels_in_panel(block),
                panels = plan.kernel_panels(block), width = in_panel * taps;
    Scalar* const results = scratch_.data() + panels * (block.between + block.in) * width;
    const Index apart = has_panels_apart(plan, block) ? block.between * width : 0;
    const auto kernels = [&](Index i) {
      return Matrix(scratch_.data() + i * (block.between + block.in) * width, block.between, width);
    };
    const auto gradients = [&](Index i) {
      return Matrix(kernels(i).data() + block.between * width, block.in, width);
    };
    const auto used = [&](Index i) { return std::min(in_panel, block.out - i * in_panel) * taps; };
    const ConstMatrix<Scalar> inner(at.inner, block.between, block.in,
                                    Eigen::OuterStride<>(block.inner_step));
    share_out(plan.work(block), panels, run, [&](Index i) {
      const Index first = i * in_panel, rows = std::min(in_panel, block.out - first);
      Matrix kernel = kernels(i), gradient = gradients(i),
             result(results + i * apart, block.between, width);
      for (Index o = 0; o < rows; ++o) {
        const Scalar* from = at.outer + (first + o) * block.outer_step;
        for (Index m = 0; m < block.between; ++m, from += taps) {
          std::copy_n(from, taps, &kernel(m, o * taps));
        }
        from = at.product_gradient + (first + o) * block.result_step;
        for (Index c = 0; c < block.in; ++c, from += taps) {
          std::copy_n(from, taps, &gradient(c, o * taps));
        }
      }
      result.leftCols(used(i)).noalias() = inner * gradient.leftCols(used(i));
      for (Index o = 0; o < rows; ++o) {
        Scalar* to = at.outer_gradient + (first + o) * block.outer_step;
        for (Index m = 0; m < block.between; ++m, to += taps) {
          std::copy_n(&result(m, o * taps), taps, to);
        }
      }
    });
    MutableMatrix<Scalar> inner_gradient(at.inner_gradient, block.between, block.in,
                                         Eigen::OuterStride<>(block.inner_step));
    const Panels of_inner(block.between, block.in, block.out * taps);
    share_out(plan.work(block), of_inner.count(), run, [&](Index p) {
      const auto [row, column, rows, columns] = of_inner[p];
      auto sum = inner_gradient.block(row, column, rows, columns);
      for (Index i = 0; i < panels; ++i) {
        const Matrix kernel = kernels(i), gradient = gradients(i);
        const auto left = kernel.block(row, 0, rows, used(i));
        const auto right = gradient.block(column, 0, columns, used(i)).transpose();
        if (i == 0) {
          sum.noalias() = left * right;
        } else {
          sum.noalias() += left * right;
        }
      }
    });
  }

  /// Rows (o, b) and columns (a, c) of G[o][c][b + a]: with that matrix both gradients are one
  /// matrix product each. Neighbouring taps a are neighbours in the result, so where G is stored
  /// [o][tap][c] its rows are copied in long runs.
  template <class Run>
  void general(const PairPlan<Rank>& plan, const Block& block, const Numbers& at, Run& run) {
    const Index outer_taps = plan.outer_count(), inner_taps = plan.inner_count();
    const Index rows = block.out * outer_taps, columns = inner_taps * block.in;
    Scalar* free = scratch_.data();
    const auto matrix = [&](Index height, Index width) {
      Matrix result(free, height, width);
      free += height * width;
      return result;
    };
    Matrix taps_first = matrix(block.out * plan.taps, block.in), gradient = matrix(rows, columns),
           outer = matrix(rows, block.between), inner = matrix(block.between, columns),
           outer_gradient = matrix(rows, block.between),
           inner_gradient = matrix(block.between, columns);
    for (Index o = 0; o < block.out; ++o) {
      transpose(at.product_gradient + o * block.result_step, plan.taps, block.in, plan.taps,
                &taps_first(o * plan.taps, 0), block.in);
      transpose(at.outer + o * block.outer_step, outer_taps, block.between, outer_taps,
                &outer(o * outer_taps, 0), block.between);
    }
    for (Index m = 0; m < block.between; ++m) {
      transpose(at.inner + m * block.inner_step, inner_taps, block.in, inner_taps, &inner(m, 0),
                block.in);
    }
    for (Index o = 0; o < block.out; ++o) {
      for (Index b = 0; b < outer_taps; ++b) {
        const Index first = o * plan.taps + plan.outer_taps[static_cast<std::size_t>(b)];
        Scalar* to = &gradient(o * outer_taps + b, 0);
        for (std::size_t a = 0; a < plan.inner_taps.size();) {
          const std::size_t start = a++;
          while (a < plan.inner_taps.size() && plan.inner_taps[a] == plan.inner_taps[a - 1] + 1)
            ++a;
          to = std::copy_n(&taps_first(first + plan.inner_taps[start], 0),
                           static_cast<Index>(a - start) * block.in, to);
        }
      }
    }
    multiply_both(plan, block, gradient, outer, inner, outer_gradient, inner_gradient, run);
    for (Index o = 0; o < block.out; ++o) {
      transpose(&outer_gradient(o * outer_taps, 0), block.between, outer_taps, block.between,
                at.outer_gradient + o * block.outer_step, outer_taps);
    }
    for (Index m = 0; m < block.between; ++m) {
      transpose(&inner_gradient(m, 0), block.in, inner_taps, block.in,
                at.inner_gradient + m * block.inner_step, inner_taps);
    }
  }

  /// What the term of the product's bias that b1 is in, (sum over the taps of W2) b1, adds to the
  /// gradients: it is W2 times a vector with b1 at every tap.
  void inner_bias(const PairPlan<Rank>& plan, const Scalar* outer, std::span<const Scalar> b1,
                  std::span<const Scalar> gradient, Scalar* outer_gradient,
                  std::span<Scalar> b1_gradient) {
    const Index groups = plan.outer.groups, in = plan.outer.in / groups,
                out = plan.outer.out / groups, taps = numel(plan.outer.kernel_size),
                columns = bias_columns(plan);
    for (Index g = 0; g < groups; ++g) {
      const Eigen::Map<const Vector> of_bias(gradient.data() + g * out, out);
      Eigen::Map<Vector> everywhere(scratch_.data(), columns),
          of_everywhere(scratch_.data() + columns, columns);
      for (Index m = 0; m < in; ++m) {
        std::fill_n(&everywhere[m * taps], taps, b1[static_cast<std::size_t>(g * in + m)]);
      }
      Matrix(outer_gradient + g * out * columns, out, columns).noalias() +=
          of_bias * everywhere.transpose();
      of_everywhere.noalias() =
          Eigen::Map<const RowMajor<Scalar>>(outer + g * out * columns, out, columns).transpose() *
          of_bias;
      for (Index m = 0; m < in; ++m) {
        b1_gradient[static_cast<std::size_t>(g * in + m)] =
            of_everywhere.segment(m * taps, taps).sum();
      }
    }
  }

  Scratch<Scalar> scratch_;
};

}  // namespace concertina::detail
