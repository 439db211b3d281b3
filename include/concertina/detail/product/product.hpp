// The product of two layers and its gradient, by the algorithm that its plan names.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/detail/product/bias.hpp>
#include <concertina/detail/product/diagonal.hpp>
#include <concertina/detail/product/direct.hpp>
#include <concertina/detail/product/general.hpp>
#include <concertina/detail/product/operands.hpp>
#include <concertina/detail/product/pointwise.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>

namespace concertina::detail {

/// Uninitialised scratch memory; data() is null where there is none.
template <class Scalar>
class Scratch {
 public:
  Scratch() = default;
  explicit Scratch(Index size) : size_(size) {
    if (size == 0) return;
    elements_ = std::make_unique_for_overwrite<Scalar[]>(static_cast<std::size_t>(size + spare));
    if constexpr (spare > 0) {
      const auto address = reinterpret_cast<std::uintptr_t>(elements_.get());
      first_ = static_cast<Index>((line - address % line) % line / sizeof(Scalar));
    }
  }

  Scratch(const Scratch& other) : Scratch(other.size_) { std::copy_n(other.data(), size_, data()); }
  Scratch(Scratch&& other) noexcept
      : elements_(std::move(other.elements_)),
        first_(std::exchange(other.first_, 0)),
        size_(std::exchange(other.size_, 0)) {}
  Scratch& operator=(Scratch other) noexcept {
    elements_.swap(other.elements_);
    std::swap(first_, other.first_);
    std::swap(size_, other.size_);
    return *this;
  }

  /// Null for none; at a cache line's start for scalars that fill one.
  Scalar* data() const { return elements_ ? elements_.get() + first_ : nullptr; }

 private:
  // Matrix products on memory that vectors straddle lines of take some 5% longer.
  static constexpr std::size_t line = 64;
  static constexpr Index spare = alignof(std::max_align_t) % sizeof(Scalar) == 0
                                     ? static_cast<Index>(line / sizeof(Scalar))
                                     : 0;

  std::unique_ptr<Scalar[]> elements_;
  Index first_ = 0, size_ = 0;
};

/// One product after another of the same shapes; scratch memory is allocated once.
template <class Scalar>
class Product {
 public:
  /// With `parallel`, panels that are copied have scratch of their own, so that they can be
  /// computed at the same time. With `gradient`, backward() has scratch too.
  Product(ProductPlan plan, bool parallel, bool gradient)
      : plan_(std::move(plan)), parallel_(parallel), covered_(plan_.covers_product()) {
    Index elements = ProductBias<Scalar>::forward_scratch(plan_);
    if (gradient) elements = std::max(elements, ProductBias<Scalar>::backward_scratch(plan_));
    for (const DenseBlock& block : plan_.blocks) {
      const auto grow = [&](Index to) { elements = std::max(elements, to); };
      if (plan_.algorithm == Algorithm::inner_pointwise) {
        grow(InnerPointwise<Scalar>::forward_scratch(plan_, block, parallel));
        if (gradient) grow(InnerPointwise<Scalar>::backward_scratch(plan_, block));
      } else if (plan_.algorithm == Algorithm::general) {
        grow(General<Scalar>::forward_scratch(plan_, block));
        if (gradient) grow(General<Scalar>::backward_scratch(plan_, block));
      }
    }
    scratch_ = Scratch<Scalar>(elements);
  }

  const ProductPlan& plan() const { return plan_; }

  /// outer * inner.
  void forward(const LayerData<const Scalar>& outer, const LayerData<const Scalar>& inner,
               const LayerData<Scalar>& result, const ParallelFor& run) {
    if (!covered_) std::fill_n(result.weight, weight_numel(plan_.product), Scalar(0));
    const ForwardOperands<Scalar> all{outer.weight, inner.weight, result.weight};
    if (plan_.algorithm == Algorithm::outer_diagonal) OuterDiagonal<Scalar>::forward(plan_, all);
    if (plan_.algorithm == Algorithm::inner_diagonal) InnerDiagonal<Scalar>::forward(plan_, all);
    Scalar* const scratch = scratch_.data();
    for (const DenseBlock& block : plan_.blocks) {
      const ForwardOperands<Scalar> at{all.outer + block.outer, all.inner + block.inner,
                                       all.result + block.result};
      switch (plan_.algorithm) {
        case Algorithm::outer_diagonal:
        case Algorithm::inner_diagonal: break;
        case Algorithm::direct: Direct<Scalar>::forward(plan_, block, at); break;
        case Algorithm::outer_pointwise:
          OuterPointwise<Scalar>::forward(plan_, block, at, run);
          break;
        case Algorithm::inner_pointwise:
          InnerPointwise<Scalar>::forward(plan_, block, at, scratch, parallel_, run);
          break;
        case Algorithm::general: General<Scalar>::forward(plan_, block, at, scratch, run); break;
      }
    }
    if (!plan_.product.bias) return;
    ProductBias<Scalar>::forward(plan_, outer.weight, outer.bias, inner.bias, result.bias,
                                 scratch_.data());
  }

  /// From the gradient of the product to those of its factors, but for one of null.
  void backward(const LayerData<const Scalar>& outer, const LayerData<const Scalar>& inner,
                const LayerData<const Scalar>& gradient, const LayerData<Scalar>& outer_gradient,
                const LayerData<Scalar>& inner_gradient, const ParallelFor& run) {
    const BackwardOperands<Scalar> all{outer.weight, inner.weight, gradient.weight,
                                       outer_gradient.weight, inner_gradient.weight};
    if (plan_.algorithm == Algorithm::outer_diagonal) OuterDiagonal<Scalar>::backward(plan_, all);
    if (plan_.algorithm == Algorithm::inner_diagonal) InnerDiagonal<Scalar>::backward(plan_, all);
    if (plan_.algorithm == Algorithm::direct) {
      if (all.outer_gradient) {
        std::fill_n(all.outer_gradient, weight_numel(plan_.outer), Scalar(0));
      }
      if (all.inner_gradient) {
        std::fill_n(all.inner_gradient, weight_numel(plan_.inner), Scalar(0));
      }
    }
    Scalar* const scratch = scratch_.data();
    for (const DenseBlock& block : plan_.blocks) {
      const BackwardOperands<Scalar> at{
          all.outer + block.outer, all.inner + block.inner, all.result_gradient + block.result,
          all.outer_gradient ? all.outer_gradient + block.outer : nullptr,
          all.inner_gradient ? all.inner_gradient + block.inner : nullptr};
      switch (plan_.algorithm) {
        case Algorithm::outer_diagonal:
        case Algorithm::inner_diagonal: break;
        case Algorithm::direct: Direct<Scalar>::backward(plan_, block, at); break;
        case Algorithm::outer_pointwise:
          OuterPointwise<Scalar>::backward(plan_, block, at, run);
          break;
        case Algorithm::inner_pointwise:
          InnerPointwise<Scalar>::backward(plan_, block, at, scratch, run);
          break;
        case Algorithm::general: General<Scalar>::backward(plan_, block, at, scratch, run); break;
      }
    }
    if (outer_gradient.bias) std::copy_n(gradient.bias, plan_.outer.out, outer_gradient.bias);
    if (!plan_.inner.bias) return;
    ProductBias<Scalar>::backward(plan_, outer.weight, inner.bias, gradient.bias,
                                  outer_gradient.weight, inner_gradient.bias, scratch_.data());
  }

 private:
  ProductPlan plan_;
  bool parallel_, covered_;
  Scratch<Scalar> scratch_;
};

}  // namespace concertina::detail
