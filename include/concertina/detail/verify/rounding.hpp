// How far rounding can carry a contraction from the exact one: constants, counts of terms, and a
// plain reference.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/contract.hpp>
#include <concertina/detail/same_map.hpp>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <optional>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
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
/// one rounding for each but the first. Summed over all products and branches. `leaf` is the index
/// of the next leaf, whose own roundings leaf_terms has, or none has any.
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
    count.bias += checked_multiply(outer.in / outer.groups, numel(outer.kernel_size), "terms") + 1;
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
/// the proofs, which shares only the shapes' rules with the contraction; prove_algebra checks
/// those.
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
enum class Measure { value, magnitude };

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
Conv<Ref, Rank> channel_map_by_definition(const ChannelMap<Scalar>& map, Measure measure) {
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
      bias = measure == Measure::value ? bias - shift : absolute(bias) + absolute(shift);
    }
    const Index c = map.source.empty() ? o : map.source[at];
    layer.weight()[static_cast<std::size_t>(o * width + c % width)] =
        measure == Measure::value ? factor : absolute(factor);
    if (layer.shape().bias) layer.bias()[at] = bias;
  }
  return layer;
}

/// A leaf of an expression in the reference scalar.
template <class Ref, class Scalar, int Rank>
Conv<Ref, Rank> leaf_by_definition(const Leaf<Scalar, Rank>& leaf, Measure measure) {
  if (leaf.channel_map()) return channel_map_by_definition<Ref, Rank>(*leaf.channel_map(), measure);
  Conv<Ref, Rank> layer = leaf.view()->template cast<Ref>();
  if (measure == Measure::value) return layer;
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
    if (splits_outputs(join)) first_out += branch.shape().out;
    if (splits_inputs(join)) first_in += branch.shape().in;
  }
  return sum;
}

/// An expression in the reference scalar, contracted from the first layer on in plain loops.
template <class Ref, class Scalar, int Rank>
Conv<Ref, Rank> contract_by_definition(const Tree<Leaf<Scalar, Rank>>& node, Measure measure) {
  if (node.is_leaf()) return leaf_by_definition<Ref>(node.leaf(), measure);
  std::vector<Conv<Ref, Rank>> parts;
  for (const auto& part : node.parts()) parts.push_back(contract_by_definition<Ref>(part, measure));
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
    const auto layer = leaf_by_definition<long double>(node.leaf(), Measure::magnitude);
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

/// An element of a contraction of absolute values, with what underflow may have added to it.
///
/// A product of two numbers loses at most one smallest subnormal w, nothing where one is 0. In any
/// order of a chain, an element of the layers i .. j sums at most as many products as there are
/// paths through them, and at most the terms of the chain; what they lose is scaled by the layers
/// before i and after j. Summed over all i and j, that bounds every order. The layers are folded in
/// from the first on: `open` has the counts of i .. j, scaled by the layers before i, for the j
/// reached; `lost` has what all others add.
/// Docs  docs/proofs.md, Rounding
template <class Ref>
struct Carried {
  Ref magnitude = 0, lost = 0, open = 0, spanning = 0;

  Carried() = default;
  explicit Carried(int) {}
  Carried(Ref value, Ref off) : magnitude(value), lost(off), open(zero() ? 0 : 1) {}

  /// At most this is what was computed.
  Ref largest() const { return magnitude + lost; }
  bool zero() const { return largest() == 0; }

  /// A product of two layers' elements: `spanning` continues what is open, `open` starts anew.
  friend Carried operator*(const Carried& outer, const Carried& inner) {
    Carried product;
    product.magnitude = outer.magnitude * inner.magnitude;
    product.lost = outer.magnitude * inner.lost + outer.lost * inner.largest();
    if (outer.zero()) return product;
    product.open = inner.largest();
    product.spanning = inner.open;
    return product;
  }
  friend Carried operator+(Carried f, const Carried& g) {
    f.magnitude += g.magnitude;
    f.lost += g.lost;
    f.open += g.open;
    f.spanning += g.spanning;
    return f;
  }

  /// After all sums of a product: `most` bounds what spans it, `each` is what a product loses.
  void settle(Ref most, Ref each) {
    const Ref products = std::min(spanning, most);
    lost += each * products;
    open += products;
    spanning = 0;
  }
};

/// The leaf, whose elements are stored, or lose what computing them of a batch norm may.
template <class Ref, class Scalar, int Rank>
Conv<Carried<Ref>, Rank> carried_leaf(const Leaf<Scalar, Rank>& leaf, Ref each) {
  const Conv<Ref, Rank> layer = leaf_by_definition<Ref>(leaf, Measure::magnitude);
  const ChannelMap<Scalar>* map = leaf.channel_map();
  const Ref factor = map && (!map->variance.empty() || map->divisor != 1) ? 4 * each : 0;
  Conv<Carried<Ref>, Rank> result(layer.shape());
  for (std::size_t i = 0; i < layer.weight().size(); ++i) {
    const Ref element = layer.weight()[i];
    result.weight()[i] = {element, element == 0 ? 0 : factor};
  }
  for (std::size_t o = 0; o < layer.bias().size(); ++o) {
    const bool shifts = map && !map->mean.empty();
    const Ref mean = shifts ? std::abs(convert<Ref>(map->mean[o])) : 0;
    result.bias()[o] = {layer.bias()[o], shifts ? factor * mean + each : 0};
  }
  return result;
}

/// Requires  terms: of the whole expression; each: the smallest subnormal of what computes it
template <class Ref, class Scalar, int Rank>
Conv<Carried<Ref>, Rank> carry(const Tree<Leaf<Scalar, Rank>>& node, Ref terms, Ref each) {
  using Layer = Conv<Carried<Ref>, Rank>;
  using View = ConvView<const Carried<Ref>, Rank>;
  if (node.is_leaf()) return carried_leaf<Ref>(node.leaf(), each);
  std::vector<Layer> parts;
  for (const auto& part : node.parts()) parts.push_back(carry<Ref>(part, terms, each));
  if (node.join() != Join::chain) {
    Layer sum =
        add_by_definition(node.join(), whole_shape(form_of(node)).template as<Rank>(), parts);
    const auto close = [](Carried<Ref>& at) { at = {at.magnitude, at.lost}; };
    std::ranges::for_each(sum.weight(), close);
    std::ranges::for_each(sum.bias(), close);
    return sum;
  }
  Layer product = std::move(parts.front());
  // The sums of the columns of all layers before some i, the 1 of the bias last.
  std::vector<Ref> columns(static_cast<std::size_t>(product.shape().in) + 1, Ref(1));
  for (std::size_t p = 1; p < parts.size(); ++p) {
    const Layer inner = std::exchange(product, multiply_by_definition(parts[p], product));
    auto element = product.weight().begin();
    for_each_weight(View(product), [&](Index, Index c, const PerAxis<Rank>&, const Carried<Ref>&) {
      (element++)->settle(terms * columns[static_cast<std::size_t>(c)], each);
    });
    for (Carried<Ref>& bias : product.bias()) bias.settle(terms * columns.back(), each);
    for_each_weight(View(inner),
                    [&](Index, Index c, const PerAxis<Rank>&, const Carried<Ref>& weight) {
                      columns[static_cast<std::size_t>(c)] += weight.largest();
                    });
    columns.back() += 1;
    for (const Carried<Ref>& bias : inner.bias()) columns.back() += bias.largest();
  }
  return product;
}

/// The least that is above 0, or infinity.
template <class Ref>
long double least_positive(std::span<const Ref> magnitudes) {
  long double least = std::numeric_limits<long double>::infinity();
  for (const Ref& magnitude : magnitudes) {
    if (magnitude > 0) least = std::min(least, static_cast<long double>(magnitude));
  }
  return least;
}

/// Whether an allowance for all elements is too small to matter beside any other error.
inline bool is_negligible(long double lost, long double least) { return lost <= least * 0x1p-10L; }

/// What underflow may add to each element of a contraction in A. One number for all where that is
/// negligible beside `least`, the smallest rounding error that elements are allowed.
template <class Ref, int Rank>
class Underflow {
 public:
  template <class Scalar>
  Underflow(const Tree<Leaf<Scalar, Rank>>& tree, Index terms, long double subnormal,
            long double least)
      : all_(static_cast<long double>(terms) * subnormal * scale_bound(tree)) {
    if (is_negligible(all_, least)) return;
    const auto carried = carry<Ref>(tree, static_cast<Ref>(terms), static_cast<Ref>(subnormal));
    each_.emplace(carried.shape());
    const auto lost = [](const Carried<Ref>& element) { return element.lost; };
    std::ranges::transform(carried.weight(), each_->weight().begin(), lost);
    std::ranges::transform(carried.bias(), each_->bias().begin(), lost);
  }

  long double weight(Index o, Index c, const PerAxis<Rank>& offset) const {
    return each_ ? static_cast<long double>(tap_at(ConvView<const Ref, Rank>(*each_), o, c, offset))
                 : all_;
  }
  long double bias(Index o) const {
    if (!each_) return all_;
    return each_->bias().empty()
               ? 0
               : static_cast<long double>(each_->bias()[static_cast<std::size_t>(o)]);
  }

 private:
  long double all_;
  std::optional<Conv<Ref, Rank>> each_;
};

/// Bounds |computed - reference| for an element whose factors' absolute values contract to
/// `magnitude`, and to which underflow added `lost`.
template <class Scalar, class A>
class ErrorBound {
  using Ref = Reference<A>;

 public:
  explicit ErrorBound(Index terms)
      : relative_((gamma(terms, unit_roundoff<A>()) + gamma(terms, unit_roundoff<Ref>())) /
                  // The magnitude is itself computed in the reference scalar.
                  (1 - gamma(terms, unit_roundoff<Ref>()))) {}

  /// Of the magnitude.
  long double relative() const { return relative_; }

  long double operator()(long double magnitude, long double lost, long double computed,
                         long double reference) const {
    const long double final_rounding =
        std::is_same_v<A, Scalar>
            ? 0
            : ulp<Scalar>(std::max(std::abs(computed), std::abs(reference))) / 2;
    return relative_ * magnitude + 2 * lost + final_rounding;
  }

 private:
  long double relative_;
};

/// What rounding explains of each element of a contraction in A, stored as Scalar.
template <class Scalar, class A, int Rank>
class ContractionBounds {
 public:
  /// `least`: the smallest magnitude above 0.
  ContractionBounds(const Tree<Leaf<Scalar, Rank>>& tree, const Terms& count, long double least)
      : weight_(count.weight),
        bias_(count.bias),
        lost_(tree, count.bias, smallest_subnormal<A>(), weight_.relative() * least) {}

  long double weight(Index o, Index c, const PerAxis<Rank>& offset, long double magnitude,
                     long double computed, long double reference) const {
    return weight_(magnitude, lost_.weight(o, c, offset), computed, reference);
  }
  long double bias(Index o, long double magnitude, long double computed,
                   long double reference) const {
    return bias_(magnitude, lost_.bias(o), computed, reference);
  }

 private:
  ErrorBound<Scalar, A> weight_, bias_;
  Underflow<Reference<A>, Rank> lost_;
};

/// What exact scalars are allowed.
struct NoBounds {
  long double weight(const auto&...) const { return 0; }
  long double bias(const auto&...) const { return 0; }
};

template <class A, class Scalar, int Rank, class Least>
auto bounds_of(const Tree<Leaf<Scalar, Rank>>& tree, const Terms& count, const Least& least) {
  if constexpr (rounds<Scalar>) {
    return ContractionBounds<Scalar, A, Rank>(tree, count, least());
  } else {
    return NoBounds{};
  }
}

/// How a scalar rounds; all zero for one that does not.
struct Precision {
  long double unit = 0, subnormal = 0;  ///< unit roundoff, smallest subnormal
};

/// The smallest normal number: the smallest subnormal is that by 2u.
inline long double smallest_of(const Precision& precision) {
  return precision.unit == 0 ? 0 : precision.subnormal / (2 * precision.unit);
}

template <class Scalar>
Precision precision_of() {
  if constexpr (rounds<Scalar>) {
    return {unit_roundoff<Scalar>(), smallest_subnormal<Scalar>()};
  } else {
    return {};
  }
}

/// Outputs off by at most `relative` of their magnitude, and by what underflow lost.
struct OutputError {
  long double relative, lost;

  OutputError stored(const Precision& storage) const {
    return {compound(relative, storage.unit), lost + storage.subnormal};
  }

  static long double compound(long double e, long double f) { return e + f + e * f; }
};

/// Adds to each channel what underflow of the layers in turn may: `each` for every product with a
/// weight that is not 0, scaled by the layers that follow.
template <class Scalar, int Rank>
std::vector<long double> lost_by_layers(const Tree<Leaf<Scalar, Rank>>& node,
                                        const std::vector<long double>& given, long double each) {
  if (node.is_leaf()) {
    const auto layer = leaf_by_definition<long double>(node.leaf(), Measure::magnitude);
    std::vector<long double> lost(static_cast<std::size_t>(layer.shape().out));
    for_each_weight(ConvView<const long double, Rank>(layer),
                    [&](Index o, Index c, const PerAxis<Rank>&, long double weight) {
                      if (weight == 0) return;
                      // A batch norm has seven roundings more, of which four are products.
                      const long double own = node.leaf().channel_map() ? 8 * each : each;
                      lost[static_cast<std::size_t>(o)] +=
                          weight * given[static_cast<std::size_t>(c)] + own;
                    });
    return lost;
  }
  if (node.join() == Join::chain) {
    std::vector<long double> lost = given;
    for (const auto& part : node.parts()) lost = lost_by_layers(part, lost, each);
    return lost;
  }
  std::vector<long double> lost(static_cast<std::size_t>(channels(node).out));
  auto to = lost.begin();
  auto from = given.begin();
  for (const auto& part : node.parts()) {
    const Channels own = channels(part);
    const auto of_part = lost_by_layers(
        part, std::vector<long double>(from, from + static_cast<std::ptrdiff_t>(own.in)), each);
    std::transform(of_part.begin(), of_part.end(), to, to, std::plus<>());
    if (splits_outputs(node.join())) to += static_cast<std::ptrdiff_t>(own.out);
    if (splits_inputs(node.join())) from += static_cast<std::ptrdiff_t>(own.in);
  }
  return lost;
}

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

  /// Terms of a bias of the contraction, and of one of its outputs.
  Index contracting() const { return contracting_; }
  Index applying() const { return applying_; }

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

/// What underflow adds to the outputs of a contraction of this tree in `sums`, rounded once more to
/// `storage` and applied in `applied`, to inputs of these absolute values: each element as far as
/// its own inputs reach.
template <class Ref, class Scalar, int Rank>
FeatureMap<Ref, Rank> lost_by_contraction(const Tree<Leaf<Scalar, Rank>>& tree,
                                          const FeatureMap<Ref, Rank>& inputs,
                                          const OutputErrors& errors, const Precision& sums,
                                          const Precision& storage, const Precision& applied) {
  const auto carried =
      carry<Ref>(tree, static_cast<Ref>(errors.contracting()), static_cast<Ref>(sums.subnormal));
  Conv<Ref, Rank> lost(carried.shape());
  const auto each = [&](const Carried<Ref>& element) {
    return element.zero() ? Ref(0) : element.lost + static_cast<Ref>(storage.subnormal);
  };
  std::ranges::transform(carried.weight(), lost.weight().begin(), each);
  std::ranges::transform(carried.bias(), lost.bias().begin(), each);
  FeatureMap<Ref, Rank> result = lost(inputs);
  const auto products =
      static_cast<Ref>(static_cast<long double>(errors.applying()) * applied.subnormal);
  for (Ref& element : result.values()) element += products;
  return result;
}

}  // namespace concertina::detail
