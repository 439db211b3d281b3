// How far rounding can carry a contraction from the exact one: constants, counts of terms, and a
// plain reference.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/contract.hpp>
#include <concertina/detail/same_map.hpp>

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

namespace concertina::detail {

/// gamma_n(u) = n*u / (1 - n*u) bounds the relative error of n roundings in a row (Higham, Accuracy
/// and Stability of Numerical Algorithms, Lemma 3.1). Throws VerificationError where n*u reaches 1
/// and it bounds nothing.
inline long double gamma(Index n, long double u) {
  const long double product = static_cast<long double>(n) * u;
  if (!(product < 1)) {
    throw VerificationError(
        "a sum of " + std::to_string(n) +
        " terms is too long for this precision to bound; use a wider accumulator");
  }
  return product / (1 - product);
}

/// Roundings on the way to one tap of a contraction and to one bias, whatever the order of its
/// chains.
struct Terms {
  Index weight = 0, bias = 0;
};

/// The shape of a form that fits.
inline AnyShape whole_shape(const AnyForm& form) {
  if (form.is_leaf()) return form.leaf();
  std::vector<AnyShape> parts;
  for (const AnyForm& part : form.parts()) parts.push_back(whole_shape(part));
  return joined_shape(form.join(), parts);
}

/// Roundings in the elements of a leaf: none where they are stored, see to_conv where they are not.
template <class Scalar, int Rank>
Terms own_terms(const Leaf<Scalar, Rank>& leaf) {
  const ChannelMap<Scalar>* map = leaf.channel_map();
  if (!map) return {};
  const Index weight = (map->variance.empty() ? 0 : 4) + (map->divisor == 1 ? 0 : 2);
  return {.weight = weight, .bias = map->mean.empty() ? 0 : weight + 3};
}

/// At the boundary between two parts of a chain, an element of the product sums over the channels
/// there and over the tap pairs that meet. In every order the two sides are parts of what stands
/// left and right of the boundary, so the counts for the whole sides bound them all. Branches add
/// one rounding for each but the first. Summed over all stages and branches. `leaf` is the index of
/// the next leaf, whose own roundings leaf_terms has, or none has any.
inline Terms terms(const AnyForm& form, std::span<const Terms> leaf_terms, std::size_t& leaf) {
  if (form.is_leaf()) return leaf_terms.empty() ? Terms{} : leaf_terms[leaf++];
  Terms count;
  Index own_bias = 0;
  std::vector<AnyShape> shapes;
  for (const AnyForm& part : form.parts()) {
    const Terms own = terms(part, leaf_terms, leaf);
    count.weight = checked_add(count.weight, own.weight, "terms");
    own_bias = checked_add(own_bias, own.bias, "terms");
    shapes.push_back(whole_shape(part));
  }
  if (form.join() != Join::chain) {
    const Index additions = std::ssize(form.parts()) - 1;
    return {count.weight + additions, own_bias + additions};
  }
  const std::span<const AnyShape> layers(shapes);
  for (std::size_t boundary = 1; boundary < layers.size(); ++boundary) {
    const AnyShape inner = joined_shape(Join::chain, layers.first(boundary)),
                   outer = joined_shape(Join::chain, layers.subspan(boundary));
    const Index channels = std::min(outer.in / outer.groups, inner.out / inner.groups);
    Index pairs = 1;
    for (int axis = 0; axis < max_rank; ++axis) {
      pairs = checked_multiply(pairs, std::min(outer.kernel_size[axis], inner.kernel_size[axis]),
                               "terms");
    }
    count.weight += checked_multiply(channels, pairs, "terms");
    count.bias += outer.in / outer.groups + numel(outer.kernel_size) + 1;
  }
  count.bias += count.weight + own_bias;
  return count;
}

/// Of shapes whose elements are stored.
inline Terms terms(const AnyForm& form) {
  std::size_t leaf = 0;
  return terms(form, {}, leaf);
}

template <class Scalar, int Rank>
Terms terms(const Tree<Leaf<Scalar, Rank>>& tree) {
  std::vector<Terms> own;
  tree.for_each_leaf([&](const Leaf<Scalar, Rank>& leaf) { own.push_back(own_terms(leaf)); });
  std::size_t leaf = 0;
  return terms(form_of(tree), own, leaf);
}

/// `inner`, then `outer`, written from the rule of a product in plain loops: a second opinion for
/// the proofs, which shares no code with the contraction.
template <class Scalar, int Rank>
Conv<Scalar, Rank> multiply_by_definition(const Conv<Scalar, Rank>& outer,
                                          const Conv<Scalar, Rank>& inner) {
  Conv<Scalar, Rank> product(product_shape(outer.shape(), inner.shape()).template as<Rank>());
  const Index outer_taps = numel(outer.shape().kernel_size),
              inner_taps = numel(inner.shape().kernel_size);
  const Index taps = numel(product.shape().kernel_size);
  std::vector<Index> meet;
  for_each_position(outer.shape().kernel_size, [&](const PerAxis<Rank>& b) {
    for_each_position(inner.shape().kernel_size, [&](const PerAxis<Rank>& a) {
      PerAxis<Rank> tap;
      for (int axis = 0; axis < Rank; ++axis) {
        tap[axis] = (b[axis] * outer.shape().dilation[axis] * inner.shape().stride[axis] +
                     a[axis] * inner.shape().dilation[axis]) /
                    product.shape().dilation[axis];
      }
      meet.push_back(flat(tap, product.shape().kernel_size));
    });
  });
  const auto width = [](const auto& layer) { return layer.shape().in / layer.shape().groups; };
  const auto height = [](const auto& layer) { return layer.shape().out / layer.shape().groups; };
  for (Index o = 0; o < product.shape().out; ++o) {
    const auto at = static_cast<std::size_t>(o);
    if (outer.shape().bias) product.bias()[at] = outer.bias()[at];
    for (Index between = 0; between < width(outer); ++between) {
      const Index m = o / height(outer) * width(outer) + between;
      const Scalar* w2 = outer.weight().data() + (o * width(outer) + between) * outer_taps;
      for (Index b = 0; b < outer_taps && inner.shape().bias; ++b) {
        product.bias()[at] = product.bias()[at] + w2[b] * inner.bias()[static_cast<std::size_t>(m)];
      }
      for (Index in = 0; in < width(inner); ++in) {
        const Index c = m / height(inner) * width(inner) + in;
        const Scalar* w1 = inner.weight().data() + (m * width(inner) + in) * inner_taps;
        Scalar* result = product.weight().data() + (o * width(product) + c % width(product)) * taps;
        const Index* to = meet.data();
        for (Index b = 0; b < outer_taps; ++b) {
          for (Index a = 0; a < inner_taps; ++a, ++to) result[*to] = result[*to] + w2[b] * w1[a];
        }
      }
    }
  }
  return product;
}

/// A value, or its absolute value: what a contraction by definition is made of.
enum class Part { value, magnitude };

template <class Ref>
Ref absolute(const Ref& value) {
  if constexpr (rounds<Ref>) {
    return std::abs(value);
  } else {
    return value;
  }
}

/// A channel map as a layer, from its definition. The magnitude of a bias is the sum of its terms'.
template <class Ref, int Rank, class Scalar>
Conv<Ref, Rank> channel_map_by_definition(const ChannelMap<Scalar>& map, Part part) {
  Conv<Ref, Rank> layer(map.template shape<Rank>());
  const Index width = layer.shape().in / layer.shape().groups;
  for (Index o = 0; o < map.out; ++o) {
    const auto at = static_cast<std::size_t>(o);
    const auto element = [&](const std::vector<Scalar>& list, int otherwise) {
      return list.empty() ? Ref(otherwise) : convert<Ref>(list[at]);
    };
    Ref factor = element(map.weight, 1), bias = element(map.bias, 0);
    if constexpr (rounds<Ref>) {
      if (!map.variance.empty())
        factor /= std::sqrt(element(map.variance, 1) + static_cast<Ref>(map.eps));
    }
    if constexpr (requires { factor / factor; }) {
      if (map.divisor != 1) factor = factor / Ref(map.divisor);
    }
    if constexpr (requires { bias - bias; }) {
      const Ref shift = element(map.mean, 0) * factor;
      bias = part == Part::value ? bias - shift : absolute(bias) + absolute(shift);
    }
    const Index c = map.source.empty() ? o : map.source[at];
    layer.weight()[static_cast<std::size_t>(o * width + c % width)] =
        part == Part::value ? factor : absolute(factor);
    if (layer.shape().bias) layer.bias()[at] = bias;
  }
  return layer;
}

/// A leaf of an expression in the reference scalar.
template <class Ref, class Scalar, int Rank>
Conv<Ref, Rank> leaf_by_definition(const Leaf<Scalar, Rank>& leaf, Part part) {
  if (leaf.channel_map()) return channel_map_by_definition<Ref, Rank>(*leaf.channel_map(), part);
  Conv<Ref, Rank> layer = leaf.view()->template cast<Ref>();
  if (part == Part::value) return layer;
  for (Ref& element : layer.weight()) element = absolute(element);
  for (Ref& element : layer.bias()) element = absolute(element);
  return layer;
}

/// Parallel layers as one, tap by tap, wherever their kernels lie.
template <class Ref, int Rank>
Conv<Ref, Rank> add_by_definition(Join join, const ConvShape<Rank>& shape,
                                  const std::vector<Conv<Ref, Rank>>& branches) {
  Conv<Ref, Rank> sum(shape);
  const Index width = shape.in / shape.groups;
  Index first_out = 0, first_in = 0;
  for (const Conv<Ref, Rank>& branch : branches) {
    for_each_weight(ConvView<const Ref, Rank>(branch),
                    [&](Index o, Index c, const PerAxis<Rank>& offset, const Ref& element) {
                      PerAxis<Rank> tap;
                      for (int axis = 0; axis < Rank; ++axis) {
                        tap[axis] =
                            (offset[axis] + shape.padding.start[axis]) / shape.dilation[axis];
                      }
                      const Index row = (first_out + o) * width + (first_in + c) % width;
                      Ref& at = sum.weight()[static_cast<std::size_t>(
                          row * numel(shape.kernel_size) + flat(tap, shape.kernel_size))];
                      at = at + element;
                    });
    for (std::size_t o = 0; o < branch.bias().size(); ++o) {
      Ref& at = sum.bias()[static_cast<std::size_t>(first_out) + o];
      at = at + branch.bias()[o];
    }
    if (join == Join::concat_outputs) first_out += branch.shape().out;
    if (join == Join::concat_inputs) first_in += branch.shape().in;
  }
  return sum;
}

/// An expression in the reference scalar, contracted from the first layer on in plain loops.
template <class Ref, class Scalar, int Rank>
Conv<Ref, Rank> contract_by_definition(const Tree<Leaf<Scalar, Rank>>& node, Part part) {
  if (node.is_leaf()) return leaf_by_definition<Ref>(node.leaf(), part);
  std::vector<Conv<Ref, Rank>> parts;
  for (const auto& each : node.parts()) parts.push_back(contract_by_definition<Ref>(each, part));
  if (node.join() != Join::chain) {
    return add_by_definition(node.join(), whole_shape(form_of(node)).template as<Rank>(), parts);
  }
  Conv<Ref, Rank> product = std::move(parts.front());
  for (std::size_t p = 1; p < parts.size(); ++p) {
    product = multiply_by_definition(parts[p], product);
  }
  return product;
}

/// The largest absolute row or column sum of [weight bias; 0 1], at least 1; of an expression a
/// bound that its matrix and those of its parts do not exceed.
template <class Scalar, int Rank>
long double scale_bound(const Tree<Leaf<Scalar, Rank>>& node) {
  if (node.is_leaf()) {
    const auto layer = leaf_by_definition<long double>(node.leaf(), Part::magnitude);
    std::vector<long double> rows(static_cast<std::size_t>(layer.shape().out));
    std::vector<long double> columns(static_cast<std::size_t>(layer.shape().in + 1));
    for_each_weight(ConvView<const long double, Rank>(layer),
                    [&](Index o, Index c, const PerAxis<Rank>&, long double element) {
                      rows[static_cast<std::size_t>(o)] += element;
                      columns[static_cast<std::size_t>(c)] += element;
                    });
    for (std::size_t o = 0; o < layer.bias().size(); ++o) {
      rows[o] += layer.bias()[o];
      columns.back() += layer.bias()[o];
    }
    return std::max({1.0L, *std::ranges::max_element(rows), *std::ranges::max_element(columns)});
  }
  long double product = 1, sum = 0;
  for (const auto& part : node.parts()) {
    const long double scale = scale_bound(part);
    product *= scale;
    sum += scale;
  }
  return node.join() == Join::chain ? product : sum;
}

/// Bounds what underflow adds to any element of a contraction: each of `terms` products loses at
/// most one smallest subnormal, which the remaining factors then scale.
template <class A, class Scalar, int Rank>
long double underflow(const Tree<Leaf<Scalar, Rank>>& expression, Index terms) {
  return static_cast<long double>(terms) * smallest_subnormal<A>() * scale_bound(expression);
}

/// Bounds |computed - reference| for an element whose factors' absolute values contract to
/// `magnitude`.
template <class Scalar, class A>
struct ErrorBound {
  using Ref = Reference<A>;

  ErrorBound(Index terms, long double lost)
      : relative_(gamma(terms, unit_roundoff<A>()) + gamma(terms, unit_roundoff<Ref>())),
        // The magnitude is itself computed in the reference scalar.
        inflation_(1 / (1 - gamma(terms, unit_roundoff<Ref>()))),
        lost_(2 * lost) {}

  long double operator()(long double magnitude, long double computed, long double reference) const {
    const long double final_rounding =
        std::is_same_v<A, Scalar>
            ? 0
            : ulp<Scalar>(std::max(std::abs(computed), std::abs(reference))) / 2;
    return relative_ * inflation_ * magnitude + lost_ + final_rounding;
  }

 private:
  long double relative_, inflation_, lost_;
};

/// How a scalar rounds; all zero for one that does not.
struct Precision {
  long double unit = 0, subnormal = 0;  ///< unit roundoff, smallest subnormal
};

template <class Scalar>
Precision precision_of() {
  return {unit_roundoff<Scalar>(), smallest_subnormal<Scalar>()};
}

/// Outputs off by at most `relative` of their magnitude, and by what underflow lost.
struct OutputError {
  long double relative, lost;

  OutputError stored(const Precision& storage) const {
    return {compound(relative, storage.unit), lost + storage.subnormal};
  }

  static long double compound(long double e, long double f) { return e + f + e * f; }
};

/// What rounding adds to the outputs of a map, computed by its layers or by a contraction;
/// docs/proofs.md derives it.
class OutputErrors {
 public:
  /// Inputs are at most `largest`, and that at least 1.
  template <class Scalar, int Rank>
  OutputErrors(const Tree<Leaf<Scalar, Rank>>& tree, const ConvShape<Rank>& contraction,
               long double largest)
      : contracting_(terms(tree).bias),
        applying_(output_terms(contraction)),
        scale_(scale_bound(tree)),
        largest_(largest) {
    // A branch is one more addition, and a batch norm takes seven roundings.
    tree.for_each_leaf([&](const Leaf<Scalar, Rank>& leaf) {
      layers_ = checked_add(layers_, output_terms(leaf.shape()) + 8, "terms");
    });
  }

  /// Of the layers in turn.
  OutputError of_layers(const Precision& sums) const {
    return {gamma(layers_, sums.unit), static_cast<long double>(layers_) * scale_ * sums.subnormal};
  }

  /// Of a contraction in `sums`, rounded once more to `storage`, and applied in `applied`.
  OutputError of_contraction(const Precision& sums, const Precision& storage,
                             const Precision& applied) const {
    const long double weights = OutputError::compound(gamma(contracting_, sums.unit), storage.unit);
    return {OutputError::compound(weights, gamma(applying_, applied.unit)),
            static_cast<long double>(applying_) * largest_ *
                (static_cast<long double>(contracting_) * scale_ * sums.subnormal +
                 storage.subnormal + applied.subnormal)};
  }

  /// Relative error of the magnitude of outputs, computed in Ref.
  template <class Ref>
  long double of_magnitude() const {
    return gamma(checked_add(contracting_, applying_, "terms"), unit_roundoff<Ref>());
  }

 private:
  template <int Rank>
  static Index output_terms(const ConvShape<Rank>& shape) {
    return shape.in / shape.groups * numel(shape.kernel_size) + 1;
  }

  Index layers_ = 0, contracting_, applying_;
  long double scale_, largest_;
};

}  // namespace concertina::detail
