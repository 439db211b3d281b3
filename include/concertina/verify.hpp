// Proofs that a contraction is right: its algebra over a prime field, its rounding against a bound,
// its matrices.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/contract.hpp>
#include <concertina/modular.hpp>
#include <concertina/toeplitz.hpp>
#include <concertina/transposed.hpp>

#include <cmath>
#include <concepts>
#include <cstdint>
#include <optional>
#include <ostream>
#include <string>
#include <type_traits>

namespace concertina {

/// What one proof found. Converts to true where it holds.
struct Report {
  std::string proof = {};    ///< "algebra", "rounding", "structure" or "outputs"
  std::string failure = {};  ///< why it does not hold; empty where it does
  bool undecided = false;    ///< whether that is only a bound too wide to tell: nothing is proved
  Index compared = 0;        ///< elements looked at
  /// The element nearest to its bound, "weight[4][5] at offset 2x0"; empty where all are equal.
  std::string worst = {};
  long double error = 0;  ///< of that element, absolute
  long double bound = 0;  ///< what the proof allows there; 0 for exact scalars
  /// Largest error of any element, in units in the last place of the layers' scalar.
  long double ulps = 0;
  Index sampled = 0, rows = 0;  ///< how many rows were drawn of how many; 0 where all were compared

  explicit operator bool() const noexcept { return failure.empty(); }

  /// error / bound, 0 where there is no error; above 1 the proof has failed.
  long double fraction() const noexcept { return error == 0 ? 0 : error / bound; }

  /// The largest share of the rows that could all be wrong and yet be missed by the sample with
  /// more than this probability; 0 where all rows were compared.
  long double missable(long double probability) const noexcept {
    if (sampled == 0) return 0;
    return 1 - std::pow(probability, 1 / static_cast<long double>(sampled));
  }

  /// One line: "rounding: holds for 1168 elements; worst weight[10][3] at offset 1x-1: 0.999 of its
  /// bound, 0.5 ulp".
  friend std::ostream& operator<<(std::ostream& out, const Report& report);
};

namespace detail {

/// A linear map and a layer, or a product with transposed layers and a transposed layer.
template <class E, class F>
concept Provable =
    (LinearMap<E> && Layer<F> && std::same_as<ScalarOf<E>, typename F::Scalar> &&
     rank_of<E> == F::Rank) ||
    (TransposedFactor<E> && TransposedFactor<F> && !std::same_as<F, TransposedExprOf<F>> &&
     std::same_as<TransposedExprOf<E>, TransposedExprOf<F>>);

}  // namespace detail

/// The smallest input on which every layer fits, every tap of the contraction is used, and an
/// output lies between the borders; where a size is named, of those on which branches agree as they
/// do there. Throws as Form::shape and exactness do.
template <int Rank>
PerAxis<Rank> smallest_input(
    const Form<Rank>& form,
    const std::type_identity_t<std::optional<PerAxis<Rank>>>& input_size = {});
template <class Scalar, int Rank>
PerAxis<Rank> smallest_input(const TransposedExpr<Scalar, Rank>& expression);

/// Rows of which a proof compares a sample instead of all.
struct RowSample {
  Index rows = 0;          ///< how many are drawn, without putting one back; 0 for all
  std::uint64_t seed = 1;  ///< of the drawing: one that whoever made the layer did not know
};

/// What proofs are asked for, beside an expression and a layer.
template <int Rank>
struct ProofOptions {
  /// Where branches agree at one size only, as contract(e, exact_at(..)) admits: that. Matrices are
  /// built at it, otherwise at the smallest that shows every tap.
  std::optional<PerAxis<Rank>> input_size = std::nullopt;
  std::uint64_t seed = 1;  ///< of prove_algebra's elements
  MemoryLimit limit = {};  ///< of a matrix of prove_structure
  RowSample sample = {};   ///< of prove_structure
};

namespace detail {

template <class F>
using ProofOptionsOf = ProofOptions<F::Rank>;

}  // namespace detail

// The proofs are of a linear map and a layer, or of a product with transposed layers and a
// transposed layer, which are compared in their dense form.

/// Proves geometry and algorithm for all weights: the expression's shapes are filled with random
/// elements of the field of 2^61 - 1 elements, contracted by the code that contracts floats (what
/// runs is decided by shapes alone), and both are applied to a random input; every output off the
/// border must be equal, and the contraction of shapes must fit `contraction`. Both sides are
/// polynomials of degree L + 1, so different ones agree by chance with probability below
/// (L + 1) / 2^61 < 2^-50 for the L < 2047 layers accepted.
/// Requires  contraction: the layer to check; only its shape is looked at
/// Cost      the contraction, and expression and layer by their definition on the input, at some 5 ns a multiply-add
/// Throws    ShapeError, SizeError as `contract`; VerificationError for too many layers
/// Source    Schwartz 1980, Zippel 1979
template <class E, class F>
  requires detail::Provable<E, F>
Report prove_algebra(const E& expression, const F& contraction,
                     const detail::ProofOptionsOf<F>& options = {});

/// Proves that `contraction`, computed in A (by default as contract does), is off by no more than
/// rounding explains: each element against a plain-loop contraction in the next wider scalar,
/// within
///     gamma_n(u)|F| + gamma_n(u')|F| + underflow (+ half an ulp if A is wider than the layers'
///     scalar),
/// where |F| contracts the absolute values, n counts the terms of all products, gamma_n(u) = n*u
/// / (1 - n*u), and underflow is what this element's own products may lose. The report is undecided
/// where that exceeds |F|, where every bound exceeds what it bounds, and where an element is off by
/// more than the root of an ulp of its row's largest, whatever its bound.
/// Kernels are compared as maps, so one with more zeros around it passes. For exact scalars the
/// bound is zero.
/// Requires  rounding to nearest, gradual underflow
/// Cost      the contraction in plain loops, from the first layer on, twice
/// Throws    VerificationError where n*u >= 1
/// Source    Higham, Accuracy and Stability of Numerical Algorithms, Section 3.1
template <class A = void, class E, class F>
  requires detail::Provable<E, F>
Report prove_rounding(const E& expression, const F& contraction,
                      const detail::ProofOptionsOf<F>& options = {});

/// Proves that the matrices multiply: the product of the factors' [T b; 0 1] is that of
/// `contraction`, row by row of the outputs off the border, equal in exact scalars and within the
/// rounding bound in others. Of a sample of rows only these are computed, and where a share s of
/// the rows is wrong, n of them find it with probability 1 - (1 - s)^n at least: less than a proof,
/// and the report says so.
/// Cost    the sparse matrices of all layers at this input size, and their products; of a sample,
///         what its rows take of these
/// Throws  SizeError where a matrix would exceed `limit`, before allocating; ShapeError for an input too small
template <class A = void, class E, class F>
  requires detail::Provable<E, F>
Report prove_structure(const E& expression, const F& contraction,
                       const detail::ProofOptionsOf<F>& options = {});

/// How outputs were computed that prove_outputs is to judge.
enum class ComputedBy {
  layers,      ///< by one layer after another; compared off the border
  contraction  ///< by a contraction of them; compared everywhere
};

/// Proves that outputs which somebody computed, in the scalar of `outputs`, are what the layers
/// give for `input`: each against that of `contraction`, computed in A, applied in the layers' next
/// wider scalar, within what rounding explains of either. Half and bfloat16 are taken to store what
/// was computed in float. For exact scalars the bound is zero.
/// Shapes    input [n][in][size...], outputs [n][out][output size...]: feature maps, or views
/// Requires  rounding to nearest, gradual underflow; elements that the wider scalar represents
/// Ensures   holds where outputs and contraction were rounded as said; fails where an output is
///           further from the contraction's than that explains, or is not finite
/// Cost      the contraction of absolute values; `contraction` by its definition on the input, twice
/// Throws    ShapeError where a map does not fit; VerificationError where n*u >= 1
/// Source    docs/proofs.md, from Higham as above
template <class A = void, class E, class F, class Input, class Outputs>
  requires detail::Provable<E, F>
Report prove_outputs(const E& expression, const F& contraction, const Input& input,
                     const Outputs& outputs, ComputedBy by = ComputedBy::layers);

/// The three reports of one contraction.
struct Verification {
  Report algebra, rounding, structure;

  explicit operator bool() const noexcept { return algebra && rounding && structure; }
  friend std::ostream& operator<<(std::ostream& out, const Verification& verification) {
    return out << verification.algebra << '\n'
               << verification.rounding << '\n'
               << verification.structure << '\n';
  }
};

/// All three proofs, algebra and structure on the smallest input that shows every tap.
template <class A = void, class E, class F>
  requires detail::Provable<E, F>
Verification verify(const E& expression, const F& contraction,
                    const detail::ProofOptionsOf<F>& options = {});

}  // namespace concertina

#include <concertina/detail/verify/proofs.ipp>
