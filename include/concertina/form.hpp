// What can be contracted, and its form: an expression without its weights, of which everything is
// asked that shapes decide.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/detail/form.hpp>
#include <concertina/detail/linear_traits.hpp>
#include <concertina/join.hpp>
#include <concertina/shape.hpp>

#include <concepts>
#include <optional>
#include <ostream>
#include <ranges>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace concertina {

/// Anything that can be contracted: a layer, layers joined by operators, or a list of these one
/// after another, the first applied first.
template <class E>
concept LinearMap = requires { typename detail::LinearTraits<std::remove_cvref_t<E>>::Scalar; } &&
                    detail::LinearTraits<std::remove_cvref_t<E>>::Rank >= 0;

/// The scalar and the rank of what can be contracted.
template <LinearMap E>
using ScalarOf = typename detail::LinearTraits<std::remove_cvref_t<E>>::Scalar;
template <LinearMap E>
inline constexpr int rank_of = detail::LinearTraits<std::remove_cvref_t<E>>::Rank;

template <int Rank>
class Form;

namespace detail {

template <class E>
struct FormTraits;
template <LinearMap E>
struct FormTraits<E> {
  static constexpr int Rank = rank_of<E>;
};
template <int R>
struct FormTraits<ConvShape<R>> {
  static constexpr int Rank = R;
};
template <int R>
struct FormTraits<Form<R>> {
  static constexpr int Rank = R;
};
template <std::ranges::forward_range E>
  requires(!LinearMap<E>) && requires { FormTraits<std::ranges::range_value_t<E>>::Rank; }
struct FormTraits<E> : FormTraits<std::ranges::range_value_t<E>> {};

template <class E>
  requires requires { FormTraits<std::remove_cvref_t<E>>::Rank; }
inline constexpr int form_rank = FormTraits<std::remove_cvref_t<E>>::Rank;

/// The form of whatever has shapes, as a tree.
template <class E>
AnyForm any_form(const E& source);

template <int Rank>
std::optional<Axes> any_size(const std::optional<PerAxis<Rank>>& size) {
  return size ? std::optional(all_axes(*size, 1)) : std::nullopt;
}

}  // namespace detail

/// What has a form: anything contractible, a shape, or a list of shapes one after another.
template <class E>
concept FormSource = requires { detail::FormTraits<std::remove_cvref_t<E>>::Rank; };

/// An expression without its weights: everything that is decided by shapes is asked of it.
template <int Rank>
class Form {
 public:
  /// Throws ShapeError where channels do not fit, naming both layers, or there are none.
  template <FormSource E>
    requires(detail::form_rank<E> == Rank && !std::same_as<std::remove_cvref_t<E>, Form>)
  Form(const E& source) : tree_(detail::any_form(source)) {}

  /// Of a tree that has this rank, as the library's own parts have it.
  explicit Form(detail::AnyForm tree) : tree_(std::move(tree)) {}

  /// The shape of the one layer that acts as the expression. Naming the input size admits sums
  /// whose branches have equal output sizes for it but not for every input.
  /// Throws  ShapeError naming two layers or branches that do not fit; SizeError where a kernel
  ///         overflows
  ConvShape<Rank> shape(const std::optional<PerAxis<Rank>>& input_size = {}) const {
    return detail::contracted_shape(tree_, detail::any_size(input_size)).template as<Rank>();
  }

  /// The spatial size of the output. Throws ShapeError where a map on the way is smaller than the
  /// next kernel, or branches differ.
  PerAxis<Rank> output_size(const PerAxis<Rank>& input_size) const {
    return detail::first_axes<Rank>(detail::output_size(tree_, detail::all_axes(input_size, 1)));
  }

  /// Multiply-adds of the contraction, in the order that it takes; additions of branches not
  /// counted. Throws as shape() does.
  Index multiply_adds(const std::optional<PerAxis<Rank>>& input_size = {}) const;

  /// Multiply-adds of Contraction::backward, to all leaves that are not fixed.
  Index backward_multiply_adds(const std::optional<PerAxis<Rank>>& input_size = {}) const;

  /// Multiply-adds of applying its layers, one after another, to one map of this size; additions
  /// of branches and biases not counted. Throws as output_size() does.
  Index applied_multiply_adds(const PerAxis<Rank>& input_size) const {
    static_cast<void>(output_size(input_size));  // throws where branches differ
    detail::Axes size = detail::all_axes(input_size, 1);
    return detail::applied_multiply_adds(tree_, size);
  }

  /// Whether a training step on `batch` maps takes fewer multiply-adds if it contracts the
  /// expression and applies the one layer, than if it applies its layers one after another:
  ///
  ///     multiply_adds() + batch * contraction's < batch * applied_multiply_adds()
  ///
  /// A step's backward pass costs twice the forward pass on either side, so that this decides for
  /// both together. Does not say that the two are equal, see exactness(). Throws as shape() does
  /// for this size; ShapeError for a batch below 1.
  bool cheaper_contracted(Index batch, const PerAxis<Rank>& input_size) const;

  /// The shapes of the layers, in the order in which they are applied, branch after branch.
  std::vector<ConvShape<Rank>> leaves() const {
    std::vector<ConvShape<Rank>> result;
    tree_.for_each_leaf(
        [&](const detail::AnyShape& leaf) { result.push_back(leaf.template as<Rank>()); });
    return result;
  }

  /// How its parts are joined; Join::none for one layer.
  Join join() const { return tree_.join(); }
  /// What it joins, in order; empty for one layer.
  std::vector<Form> parts() const {
    std::vector<Form> result;
    for (const detail::AnyForm& part : tree_.parts()) result.emplace_back(part);
    return result;
  }

  const detail::AnyForm& tree() const& noexcept { return tree_; }
  detail::AnyForm tree() && noexcept { return std::move(tree_); }

  friend bool operator==(const Form&, const Form&) = default;

 private:
  detail::AnyForm tree_;
};

template <FormSource E>
Form(const E&) -> Form<detail::form_rank<E>>;

/// "(conv2d 3->8 @3x3, conv2d 8->4 @1x1)" for a chain, with " + " for sums, " | " and " & " for
/// concatenated outputs and inputs, " (+) " for direct sums.
template <int Rank>
std::string to_string(const Form<Rank>& form) {
  return detail::to_string(form.tree());
}
/// Writes to_string of it.
template <int Rank>
std::ostream& operator<<(std::ostream& out, const Form<Rank>& form) {
  return out << to_string(form);
}

}  // namespace concertina

#include <concertina/detail/form.ipp>
#include <concertina/expression.hpp>  // whose forms are made here too
