// The cheapest order in which a chain is multiplied.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/detail/function_ref.hpp>
#include <concertina/detail/product/algorithm.hpp>

#include <cstddef>
#include <limits>
#include <span>
#include <vector>

namespace concertina::detail {

/// cost(outer, inner, product) of one product, in any unit.
using ProductCost = FunctionRef<double(const AnyShape&, const AnyShape&, const AnyShape&)>;

/// For each run of a chain's layers, where its last product splits it.
/// Cost    (number of layers)^3 steps
/// Source  Cormen et al., Introduction to Algorithms, "Matrix-chain multiplication"
class ChainOrder {
 public:
  explicit ChainOrder(std::span<const AnyShape> layers, ProductCost cost = processor_cost)
      : count_(layers.size()),
        shapes_(count_ * count_),
        cost_(count_ * count_, 0),
        split_(count_ * count_, 0) {
    for (std::size_t i = 0; i < count_; ++i) shapes_[at(i, i)] = layers[i];
    for (std::size_t length = 1; length < count_; ++length) {
      for (std::size_t i = 0; i + length < count_; ++i) decide(i, i + length, cost);
    }
  }

  /// The layer before which the product of first..last splits.
  std::size_t split(std::size_t first, std::size_t last) const { return split_[at(first, last)]; }

 private:
  std::size_t at(std::size_t first, std::size_t last) const { return first * count_ + last; }

  void decide(std::size_t first, std::size_t last, const ProductCost& cost_of) {
    double& best = cost_[at(first, last)];
    split_[at(first, last)] = last;  // where every split overflows, the product meets that
    best = std::numeric_limits<double>::infinity();
    AnyShape& product = shapes_[at(first, last)];
    bool is_shaped = false;
    for (std::size_t middle = first + 1; middle <= last; ++middle) {
      const double parts = cost_[at(first, middle - 1)] + cost_[at(middle, last)];
      if (!(parts < best)) continue;
      try {
        const auto &inner = shapes_[at(first, middle - 1)], &outer = shapes_[at(middle, last)];
        if (!is_shaped) product = product_shape(outer, inner);  // the same for every split
        is_shaped = true;
        const double cost = parts + cost_of(outer, inner, product);
        if (!(cost < best)) continue;
        best = cost;
        split_[at(first, last)] = middle;
      } catch (const SizeError&) {
        continue;  // an intermediate that overflows is never chosen
      }
    }
  }

  std::size_t count_;
  std::vector<AnyShape> shapes_;
  std::vector<double> cost_;
  std::vector<std::size_t> split_;
};

}  // namespace concertina::detail
