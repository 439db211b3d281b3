// What the proofs of a contraction take, from shapes alone.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/verify.hpp>

#include <algorithm>
#include <limits>
#include <span>
#include <vector>

namespace tool {

/// Bytes, and multiply-adds of a processor.
struct ProofCost {
  double bytes = 0, multiply_adds = 0;
};

namespace proof_cost {

using concertina::Form, concertina::Index, concertina::Join, concertina::PerAxis;
using concertina::detail::AnyForm, concertina::detail::AnyShape;

/// What a proof's reference is computed in: double for sums in float, long double for others.
enum class In { float64, extended };

// What one of each takes, in multiply-adds of a nanosecond, measured on an AMD EPYC on expansions,
// chains of 3x3 and of 1x1, and depthwise layers, which took 0.5 to 2.7 of the estimates: in the
// prime field; in plain loops; of sparse matrices; an element that is compared, with its bound.
constexpr double field = 2, compared = 250;
constexpr double plain(In in) { return in == In::float64 ? 2 : 8; }
constexpr double sparse(In in) { return in == In::float64 ? 4 : 12; }

inline double weights(const AnyShape& shape) {
  return static_cast<double>(concertina::weight_numel(shape)) + static_cast<double>(shape.out);
}

/// Multiply-adds of a contraction from the first layer on; `largest` becomes that of the weights on
/// the way.
inline double by_definition(const AnyForm& form, double& largest) {
  if (form.is_leaf()) {
    largest = std::max(largest, weights(form.leaf()));
    return 0;
  }
  double cost = 0;
  std::vector<AnyShape> shapes;
  for (const AnyForm& part : form.parts()) {
    cost += by_definition(part, largest);
    shapes.push_back(concertina::detail::whole_shape(part));
  }
  if (form.join() == Join::chain) {
    AnyShape product = shapes.front();
    for (const AnyShape& outer : std::span(shapes).subspan(1)) {
      cost += static_cast<double>(concertina::detail::multiply_adds(outer, product));
      product = concertina::detail::product_shape(outer, product);
      largest = std::max(largest, weights(product));
    }
    return cost;
  }
  const double sum = weights(concertina::detail::joined_shape(form.join(), shapes));
  largest = std::max(largest, sum);
  return cost + sum * static_cast<double>(shapes.size());
}

/// Entries that a row of a layer's matrix has at most.
template <int Rank>
double in_a_row(const concertina::ConvShape<Rank>& shape) {
  return static_cast<double>(shape.in / shape.groups) *
             static_cast<double>(concertina::numel(shape.kernel_size)) +
         1;
}

/// Entries that so many rows of a form's matrix have at most.
template <int Rank>
double entries(const Form<Rank>& form, const PerAxis<Rank>& size, double rows) {
  const auto shape = form.shape(size);
  return std::min(static_cast<double>(concertina::detail::toeplitz_entries<Rank>(shape, size)),
                  rows * in_a_row<Rank>(shape));
}

/// Entries of the matrices of a form of which so many rows are read, and multiply-adds of their
/// products, the outermost first.
template <int Rank>
ProofCost of_matrices(const Form<Rank>& form, const PerAxis<Rank>& size, double rows) {
  ProofCost cost{.bytes = entries<Rank>(form, size, rows)};
  if (form.join() == Join::none) return cost;
  const std::span<const AnyForm> parts(form.tree().parts());
  const bool chain = form.join() == Join::chain;
  std::vector<PerAxis<Rank>> sizes(parts.size(), size);
  for (std::size_t p = 1; chain && p < parts.size(); ++p) {
    sizes[p] = Form<Rank>(parts[p - 1]).output_size(sizes[p - 1]);
  }
  double reads = rows;  // how often the rows of a part are read
  for (std::size_t p = parts.size(); p-- > 0;) {
    const Form<Rank> part(parts[p]);
    const ProofCost own = of_matrices<Rank>(part, sizes[p], reads);
    cost.bytes += own.bytes;
    cost.multiply_adds += own.multiply_adds + own.bytes;
    if (!chain) continue;
    if (p + 1 < parts.size()) cost.multiply_adds += reads * in_a_row<Rank>(part.shape(sizes[p]));
    reads = entries<Rank>(Form<Rank>(AnyForm(Join::chain, parts.subspan(p))), sizes[p], rows);
  }
  return cost;
}

/// Of proving at this size of the (dense) form's input.
template <int Rank>
ProofCost algebra(const Form<Rank>& form, const PerAxis<Rank>& size) {
  double largest = 0;
  by_definition(form.tree(), largest);
  const auto shape = form.shape(size);
  const double outputs = static_cast<double>(shape.out) *
                         static_cast<double>(concertina::numel(form.output_size(size)));
  const double inputs =
      static_cast<double>(shape.in) * static_cast<double>(concertina::numel(size));
  const double taps = static_cast<double>(shape.in / shape.groups) *
                      static_cast<double>(concertina::numel(shape.kernel_size));
  return {.bytes = 24 * (largest + inputs + outputs),
          .multiply_adds = field * (static_cast<double>(form.multiply_adds(size)) +
                                    static_cast<double>(form.applied_multiply_adds(size)) +
                                    outputs * taps + largest)};
}

template <int Rank>
ProofCost rounding(const Form<Rank>& form, In in) {
  double largest = 0;
  const double cost = by_definition(form.tree(), largest);
  return {.bytes = 64 * largest,
          .multiply_adds = 2 * plain(in) * (cost + largest) +
                           compared * weights(concertina::detail::whole_shape(form.tree()))};
}

/// On a sample of so many rows; none for all.
template <int Rank>
ProofCost structure(const Form<Rank>& form, const PerAxis<Rank>& size, In in, Index sample = 0) {
  const auto whole = concertina::detail::toeplitz_size<Rank>(form.shape(size), size);
  const auto all = static_cast<double>(whole.rows),
             rows = sample > 0 ? std::min(all, static_cast<double>(sample)) : all;
  const bool sampled = rows < all;
  const ProofCost matrices =
      of_matrices<Rank>(form, size, sampled ? rows : std::numeric_limits<double>::infinity());
  return {.bytes = 80 * matrices.bytes + 64 * (all + static_cast<double>(whole.columns)),
          .multiply_adds =
              sparse(in) * matrices.multiply_adds + compared * entries<Rank>(form, size, rows)};
}

}  // namespace proof_cost

}  // namespace tool
