// The proofs' bodies.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/detail/verify/rounding.hpp>
#include <concertina/detail/verify/smallest_input.ipp>
#include <concertina/detail/verify/worst.ipp>
#include <concertina/random.hpp>
#include <concertina/verify.hpp>

#include <random>
#include <sstream>

namespace concertina {

inline std::ostream& operator<<(std::ostream& out, const Report& report) {
  std::ostringstream line;
  line.precision(3);
  line << report.proof << ": ";
  if (report) {
    line << "holds for " << report.compared << " elements";
  } else {
    line << (report.undecided ? "not proved: " : "FAILS: ") << report.failure;
  }
  if (!report.worst.empty()) {
    line << "; worst " << report.worst << ": " << report.fraction() << " of its bound, "
         << report.ulps << " ulp";
  }
  if (report.sampled > 0) {
    constexpr long double probability = 1e-6L;
    line << "; sampled " << report.sampled << " of " << report.rows << " rows: were a share of "
         << report.missable(probability)
         << " of them wrong, that is missed with probability at most " << probability;
  }
  return out << line.str();
}

namespace detail {

/// Why `given` cannot be a contraction of shape `expected`, or nothing.
template <int Rank>
std::string misfit(const ConvShape<Rank>& expected, const ConvShape<Rank>& given) {
  const std::string why = incomparable(expected, given);
  return why.empty() ? why
                     : why + ": the layers contract to " + to_string(expected) + ", given is " +
                           to_string(given);
}

/// Of maps of which every `spacing`-th position has an element.
template <int Rank>
Report prove_algebra(const Form<Rank>& form, const ConvShape<Rank>& contraction, std::uint64_t seed,
                     const std::optional<PerAxis<Rank>>& input_size, const PerAxis<Rank>& spacing) {
  const std::vector<ConvShape<Rank>> leaves = form.leaves();
  if (leaves.size() + 1 >= (std::size_t{1} << 11)) {
    throw VerificationError("an expression of " + std::to_string(leaves.size()) +
                            " layers is too long for the field of 2^61 - 1 elements");
  }
  Report report{.proof = "algebra"};
  report.failure = misfit(form.shape(input_size), contraction);
  if (!report) return report;

  std::mt19937_64 generator(seed);
  using Random = Leaf<PrimeField, Rank>;
  const Tree<Random> random = form.tree().map([&](const AnyShape& shape) {
    Conv<PrimeField, Rank> layer(shape.as<Rank>());
    for (PrimeField& element : layer.weight()) element = random_bits(generator);
    for (PrimeField& element : layer.bias()) element = random_bits(generator);
    return Random(std::move(layer));
  });
  const PerAxis<Rank> size = input_size ? *input_size : smallest_size<Rank>(form, {}, spacing);
  FeatureMap<PrimeField, Rank> x({.channels = contraction.in, .size = size});
  auto element = x.values().begin();
  for (Index channel = 0; channel < contraction.in; ++channel) {
    for_each_position(size, [&](const PerAxis<Rank>& position) {
      *element++ =
          is_spaced(position, spacing) ? PrimeField(random_bits(generator)) : PrimeField(0);
    });
  }

  const FeatureMap<PrimeField, Rank> whole = evaluate<PrimeField>(random)(x);
  x = Expr<PrimeField, Rank>(random)(x);
  const Exactness<Rank> border = find_exactness<Rank>(form, size, spacing);
  const MapShape<Rank>& shape = x.shape();
  std::size_t at = 0;
  for (Index channel = 0; channel < shape.channels; ++channel) {
    for_each_position(shape.size, [&](const PerAxis<Rank>& position) {
      const bool same = whole.values()[at] == x.values()[at];
      ++at;
      if (!off_border(position, shape.size, border)) return;
      ++report.compared;
      if (!same && report) {
        report.failure = "output channel " + std::to_string(channel) + " at position " +
                         concertina::to_string(position) + " differs over the prime field";
      }
    });
  }
  if (report.compared == 0) refuse_empty(report, size);
  return report;
}

template <class A, class Scalar, int Rank>
Report prove_rounding(const Tree<Leaf<Scalar, Rank>>& tree,
                      const ConvView<const Scalar, Rank>& given,
                      const std::optional<PerAxis<Rank>>& input_size) {
  using Ref = Reference<A>;
  Report report{.proof = "rounding"};
  report.failure = misfit(Form<Rank>(form_of(tree)).shape(input_size), given.shape());
  if (!report) return report;

  const auto reference = contract_by_definition<Ref>(tree, Measure::value);
  const auto magnitude = contract_by_definition<Ref>(tree, Measure::magnitude);
  const Terms count = terms(tree);
  const ConvView<const Ref, Rank> right(reference), size(magnitude);
  const auto bounds = bounds_of<A>(tree, count, [&] {
    return std::min(least_positive(size.weight()), least_positive(size.bias()));
  });
  const Precision precision = precision_of<A>();
  Worst<Scalar> worst(report, smallest_of(precision), precision.unit);
  const auto place = [](Index o, Index c, const PerAxis<Rank>& offset) {
    std::string text = "weight[" + std::to_string(o) + "][" + std::to_string(c) + "]";
    return Rank == 0 ? text : text + " at offset " + concertina::to_string(offset);
  };
  const auto compare_weight = [&](const Scalar& n, const Ref& r, Index o, Index c,
                                  const PerAxis<Rank>& offset) {
    worst.compare(
        o, n, r, tap_at(size, o, c, offset),
        [&](auto... numbers) { return bounds.weight(o, c, offset, numbers...); },
        [&] { return place(o, c, offset); });
  };
  for_each_weight(right, [&](Index o, Index c, const PerAxis<Rank>& offset, const Ref& r) {
    compare_weight(tap_at(given, o, c, offset), r, o, c, offset);
  });
  for_each_weight(given, [&](Index o, Index c, const PerAxis<Rank>& offset, const Scalar& n) {
    if (n == Scalar(0))
      return;  // nothing to explain, and taps beyond the chain's reach must be zero
    compare_weight(n, tap_at(right, o, c, offset), o, c, offset);
    --report.compared;
  });
  const auto element = [](auto bias, Index o) {
    return bias.empty() ? decltype(bias[0] + bias[0])(0) : bias[static_cast<std::size_t>(o)];
  };
  for (Index o = 0; o < given.shape().out; ++o) {
    if (given.bias().empty() && right.bias().empty()) break;
    worst.compare(
        given.shape().out + o, static_cast<Scalar>(element(given.bias(), o)),
        element(right.bias(), o), element(size.bias(), o),
        [&](auto... numbers) { return bounds.bias(o, numbers...); },
        [&] { return "bias[" + std::to_string(o) + "]"; });
  }
  worst.judge();
  return report;
}

}  // namespace detail
}  // namespace concertina

#include <concertina/detail/verify/outputs.ipp>
#include <concertina/detail/verify/structure.ipp>

namespace concertina {
namespace detail {

/// Elements in the scalar that they are compared in.
template <class Ref, class Scalar, int Rank>
FeatureMap<Ref, Rank> in_reference(const FeatureMapView<const Scalar, Rank>& map) {
  static_assert(
      !rounds<Ref> || std::numeric_limits<Scalar>::digits <= std::numeric_limits<Ref>::digits,
      "maps are compared in the next wider scalar of the layers', which does not hold these");
  std::vector<Ref> values;
  values.reserve(map.values().size());
  for (const Scalar& element : map.values()) values.push_back(convert<Ref>(element));
  return {map.shape(), std::move(values)};
}

/// prove(tree, layer, spacing) of a linear map and a layer, or of the dense forms of a product with
/// transposed layers and a transposed layer.
template <class E, class F, class Prove>
Report prove_dense(const char* proof, const E& expression, const F& contraction, Prove&& prove) {
  using View = ConvView<const typename F::Scalar, F::Rank>;
  if constexpr (LinearMap<E>) {
    return prove(tree_of(expression), View(contraction), PerAxis<F::Rank>(1));
  } else {
    const TransposedExprOf<E> product(expression);
    if (contraction.layer().shape().stride != product.stride()) {
      return {.proof = proof, .failure = "strides differ"};
    }
    const Conv<typename F::Scalar, F::Rank> dense = to_dense(contraction);
    return prove(product.dense().tree(), View(dense), product.stride());
  }
}

/// Of an expression, where it may be at a size, or a product with transposed layers.
template <int Rank, class E>
PerAxis<Rank> smallest_input_of(const E& expression,
                                const std::optional<PerAxis<Rank>>& input_size = {}) {
  if constexpr (LinearMap<E>) {
    return smallest_input(Form(expression), input_size);
  } else {
    return smallest_input(TransposedExprOf<E>(expression));
  }
}

}  // namespace detail

template <class E, class F>
  requires detail::Provable<E, F>
Report prove_algebra(const E& expression, const F& contraction,
                     const detail::ProofOptionsOf<F>& options) {
  return detail::prove_dense(
      "algebra", expression, contraction,
      [&](const auto& tree, const auto& layer, const PerAxis<F::Rank>& spacing) {
        return detail::prove_algebra<F::Rank>(
            Form<F::Rank>(detail::form_of(tree)), layer.shape(), options.seed,
            detail::dense_size(options.input_size, spacing), spacing);
      });
}

template <class A, class E, class F>
  requires detail::Provable<E, F>
Report prove_rounding(const E& expression, const F& contraction,
                      const detail::ProofOptionsOf<F>& options) {
  using Scalar = typename F::Scalar;
  static_assert(detail::provable<Scalar>, "prove real and imaginary parts as layers of their own");
  return detail::prove_dense(
      "rounding", expression, contraction,
      [&](const auto& tree, const auto& layer, const PerAxis<F::Rank>& spacing) {
        return detail::prove_rounding<detail::AccumulatorOf<A, Scalar>, Scalar, F::Rank>(
            tree, layer, detail::dense_size(options.input_size, spacing));
      });
}

template <class A, class E, class F>
  requires detail::Provable<E, F>
Report prove_structure(const E& expression, const F& contraction,
                       const detail::ProofOptionsOf<F>& options) {
  using Scalar = typename F::Scalar;
  static_assert(detail::provable<Scalar>, "prove real and imaginary parts as layers of their own");
  const PerAxis<F::Rank> size =
      options.input_size ? *options.input_size : detail::smallest_input_of<F::Rank>(expression);
  return detail::prove_dense(
      "structure", expression, contraction,
      [&](const auto& tree, const auto& layer, const PerAxis<F::Rank>& spacing) {
        return detail::prove_structure<detail::AccumulatorOf<A, Scalar>, Scalar, F::Rank>(
            tree, layer, detail::dense_size(size, spacing), spacing, options.limit, options.sample);
      });
}

template <class A, class E, class F, class Input, class Outputs>
  requires detail::Provable<E, F>
Report prove_outputs(const E& expression, const F& contraction, const Input& input,
                     const Outputs& outputs, ComputedBy by) {
  using Scalar = typename F::Scalar;
  static_assert(detail::provable<Scalar>, "prove real and imaginary parts as layers of their own");
  using Ref = detail::Reference<Scalar>;
  constexpr int Rank = F::Rank;
  using Given = typename Outputs::Scalar;
  const auto precision = []<class S>(std::type_identity<S>) {
    if constexpr (detail::rounds<S>) return detail::precision_of<S>();
    return detail::Precision{};
  };
  return detail::prove_dense(
      "outputs", expression, contraction,
      [&](const auto& tree, const auto& layer, const PerAxis<Rank>& spacing) {
        const auto x =
            detail::in_reference<Ref>(FeatureMapView<const typename Input::Scalar, Rank>(input));
        return detail::prove_outputs<Scalar, Rank>(
            tree, layer, detail::dense_map<Ref, Rank>(x, spacing), spacing,
            detail::in_reference<Ref>(FeatureMapView<const Given, Rank>(outputs)),
            precision(std::type_identity<detail::AccumulatorOf<A, Scalar>>()),
            precision(std::type_identity<Given>()), by);
      });
}

template <class A, class E, class F>
  requires detail::Provable<E, F>
Verification verify(const E& expression, const F& contraction,
                    const detail::ProofOptionsOf<F>& options) {
  detail::ProofOptionsOf<F> smallest = options;
  smallest.input_size = detail::smallest_input_of<F::Rank>(expression, options.input_size);
  return {.algebra = prove_algebra(expression, contraction, smallest),
          .rounding = prove_rounding<A>(expression, contraction, options),
          .structure = prove_structure<A>(expression, contraction, smallest)};
}

}  // namespace concertina

#include <concertina/detail/compiled/verify.hpp>
