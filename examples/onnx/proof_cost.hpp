// What the proofs of a contraction take, from shapes alone.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/verify.hpp>

#include <algorithm>
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

// One in each arithmetic, in multiply-adds of the processor, estimated: in the prime
// field; in long double, in plain loops; of sparse matrices; a column of a row that is compared.
constexpr double field = 10, plain = 6, sparse = 60, scanned = 2;

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

/// Entries of the matrices of a form, and multiply-adds of their products.
template <int Rank>
ProofCost of_matrices(const Form<Rank>& form, PerAxis<Rank> size) {
  const auto entries = [&](const Form<Rank>& whole, const PerAxis<Rank>& at) {
    return static_cast<double>(concertina::detail::toeplitz_entries<Rank>(whole.shape(at), at));
  };
  ProofCost cost{.bytes = entries(form, size)};
  if (form.join() == Join::none) return cost;
  const std::span<const AnyForm> parts(form.tree().parts());
  double in_a_row = 0;  // of what stands before a part
  for (std::size_t p = 0; p < parts.size(); ++p) {
    const Form<Rank> part(parts[p]);
    const ProofCost own = of_matrices<Rank>(part, size);
    cost.bytes += own.bytes;
    cost.multiply_adds += own.multiply_adds + own.bytes;
    if (form.join() != Join::chain) continue;
    if (p > 0) cost.multiply_adds += own.bytes * in_a_row;
    size = part.output_size(size);
    const AnyShape whole =
        concertina::detail::whole_shape(AnyForm(Join::chain, parts.first(p + 1)));
    in_a_row = weights(whole) / static_cast<double>(whole.out);
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
ProofCost rounding(const Form<Rank>& form) {
  double largest = 0;
  const double cost = by_definition(form.tree(), largest);
  return {.bytes = 64 * largest, .multiply_adds = 2 * plain * (cost + 4 * largest)};
}

template <int Rank>
ProofCost structure(const Form<Rank>& form, const PerAxis<Rank>& size) {
  const ProofCost matrices = of_matrices<Rank>(form, size);
  const auto whole = concertina::detail::toeplitz_size<Rank>(form.shape(size), size);
  const double compared = static_cast<double>(whole.rows) * static_cast<double>(whole.columns);
  return {.bytes = 80 * matrices.bytes + 64 * static_cast<double>(whole.columns),
          .multiply_adds = sparse * matrices.multiply_adds + scanned * compared};
}

}  // namespace proof_cost

}  // namespace tool
