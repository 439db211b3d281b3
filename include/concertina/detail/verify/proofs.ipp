// The proofs' bodies.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/detail/verify/rounding.hpp>
#include <concertina/random.hpp>
#include <concertina/verify.hpp>

#include <algorithm>
#include <cmath>
#include <random>
#include <sstream>
#include <vector>

namespace concertina {

inline std::ostream& operator<<(std::ostream& out, const Report& report) {
  std::ostringstream line;
  line.precision(3);
  line << report.proof << ": ";
  if (report) {
    line << "holds for " << report.compared << " numbers";
  } else {
    line << "FAILS: " << report.failure;
  }
  if (!report.worst.empty()) {
    line << "; worst " << report.worst << ": " << report.fraction() << " of its bound, "
         << report.ulps << " ulp";
  }
  return out << line.str();
}

namespace detail {

/// Keeps the number nearest to its bound.
template <class Scalar, class A>
class Worst {
 public:
  explicit Worst(Report& report) : report_(report) {}

  /// `magnitude` is the same number contracted from absolute values; it is unused for exact
  /// scalars.
  template <class Ref, class Bound, class Where>
  void compare(const Scalar& computed, const Ref& reference, const Ref& magnitude,
               const Bound& bound, Where&& where) {
    ++report_.compared;
    if constexpr (rounds<Scalar>) {
      const auto c = static_cast<long double>(computed), r = static_cast<long double>(reference);
      const long double error = std::abs(c - r);
      const long double allowed = bound(static_cast<long double>(magnitude), c, r);
      if (!std::isfinite(c) || !std::isfinite(r) || !std::isfinite(allowed)) {
        note(where(), error, allowed, 0, "is not finite");
        return;
      }
      const long double ulps = error / ulp<Scalar>(r);
      report_.ulps = std::max(report_.ulps, ulps);
      if (error > allowed) {
        note(where(), error, allowed, ulps, "exceeds its bound");
      } else if (error > 0 && report_.failure.empty() &&
                 (report_.worst.empty() || error * report_.bound > report_.error * allowed)) {
        note(where(), error, allowed, ulps, "");
      }
    } else if (!(computed == static_cast<Scalar>(reference))) {
      note(where(), 1, 0, 0, "differs");
    }
  }

 private:
  void note(const std::string& where, long double error, long double bound, long double ulps,
            const std::string& failure) {
    if (!report_.failure.empty()) return;
    report_.worst = where;
    report_.error = error;
    report_.bound = bound;
    report_.ulps = std::max(report_.ulps, ulps);
    if (!failure.empty()) report_.failure = where + " " + failure;
  }

  Report& report_;
};

template <class A, class Scalar, int Rank>
auto error_bound(const Tree<Operator<Scalar, Rank>>& expression, Index count) {
  if constexpr (rounds<Scalar>) {
    return ErrorBound<Scalar, A>(count, underflow<A>(expression, count));
  } else {
    return 0;
  }
}

template <class A, class Scalar>
using AccumulatorOf =
    std::conditional_t<std::is_void_v<A>, typename DefaultAccumulator<Scalar>::type, A>;

/// Why `given` cannot be a contraction of shape `expected`, or nothing.
template <int Rank>
std::string misfit(const ConvShape<Rank>& expected, const ConvShape<Rank>& given) {
  const std::string why = incomparable(expected, given);
  return why.empty() ? why
                     : why + ": the layers contract to " + to_string(expected) + ", given is " +
                           to_string(given);
}

/// The layer along one axis, as a single-channel layer.
template <int Rank>
ConvShape<1> along(const ConvShape<Rank>& shape, int axis) {
  const auto& padding = shape.padding;
  return {.out = 1,
          .in = 1,
          .kernel_size = shape.kernel_size[axis],
          .stride = shape.stride[axis],
          .padding = Padding<1>::sides(padding.start[axis], padding.end[axis]),
          .dilation = shape.dilation[axis],
          .bias = shape.bias};
}

/// Channels do not matter along an axis: concatenations become sums.
template <int Rank>
Form<1> along(const Form<Rank>& form, int axis) {
  if (form.is_leaf()) return along(form.leaf(), axis);
  std::vector<Form<1>> parts;
  for (const Form<Rank>& part : form.parts()) parts.push_back(along(part, axis));
  return {form.join() == Join::chain ? Join::chain : Join::sum, std::move(parts)};
}

/// Whether every layer fits on an input of this size.
inline bool fits(const Form<1>& form, Index size) {
  if (size < 1) return false;
  if (form.is_leaf()) return output_size(form.leaf(), size, 0) >= 1;
  for (const Form<1>& part : form.parts()) {
    if (!fits(part, size)) return false;
    if (form.join() == Join::chain) size = output_size(part, PerAxis<1>(size))[0];
  }
  return true;
}

/// Whether every layer fits, every tap of the contraction reads the map, and an output lies off the
/// border.
inline bool shows_everything(const Form<1>& form, const ConvShape<1>& contraction, Index size) {
  if (!fits(form, size)) return false;
  const Index positions = output_size(form, PerAxis<1>(size))[0];
  const auto& stride = contraction.stride;
  for (Index tap = 0; tap < contraction.kernel_size[0]; ++tap) {
    const Index offset = tap * contraction.dilation[0] - contraction.padding.start[0];
    const Index first = std::max<Index>(0, -floor_divide(offset, stride[0]));
    if (first >= positions || first * stride[0] + offset >= size) return false;
  }
  const Exactness<1> border = exactness(form, size);
  return border.start[0] + border.end[0] < positions;
}

/// A proof that looked at nothing proves nothing.
template <int Rank>
void refuse_empty(Report& report, const PerAxis<Rank>& input_size) {
  if (report) {
    report.failure = "at input size " + to_string(input_size) +
                     " every output is on the border; take a larger input";
  }
}

template <int Rank>
bool off_border(const PerAxis<Rank>& position, const PerAxis<Rank>& size,
                const Exactness<Rank>& border) {
  for (int axis = 0; axis < Rank; ++axis) {
    if (position[axis] < border.start[axis]) return false;
    if (position[axis] >= size[axis] - border.end[axis]) return false;
  }
  return true;
}

}  // namespace detail

template <int Rank>
PerAxis<Rank> smallest_input(const Form<Rank>& form) {
  const ConvShape<Rank> contraction = contracted_shape(form);
  PerAxis<Rank> size;
  for (int axis = 0; axis < Rank; ++axis) {
    const Form<1> line = detail::along(form, axis);
    const ConvShape<1> whole = detail::along(contraction, axis);
    const Padding<1>& padding = whole.padding;
    Index& extent = size[axis];
    extent = std::max<Index>(1, span(whole, 0) + 1 - padding.start[0] - padding.end[0]);
    constexpr Index most_steps = 4096;  // real layers take a few
    const Index least = extent;
    while (!detail::shows_everything(line, whole, extent)) {
      if (++extent == least + most_steps) {
        throw SizeError("no input up to " + std::to_string(extent) +
                        " shows every tap and an output off the border (" + to_string(contraction) +
                        ")");
      }
    }
  }
  return size;
}

template <Expression E, Layer F>
Report prove_algebra(const E& expression, const F& contraction, std::uint64_t seed,
                     std::optional<PerAxis<rank_of<E>>> input_size) {
  constexpr int Rank = rank_of<E>;
  const Form<Rank> form = concertina::form(expression);
  std::size_t count = 0;
  form.for_each_leaf([&](const ConvShape<Rank>&) { ++count; });
  if (count + 1 >= (std::size_t{1} << 11)) {
    throw VerificationError("an expression of " + std::to_string(count) +
                            " layers is too long for the field of 2^61 - 1 elements");
  }
  Report report{.proof = "algebra"};
  report.failure = detail::misfit<Rank>(contracted_shape(form, input_size), contraction.shape());
  if (!report) return report;

  std::mt19937_64 generator(seed);
  using Leaf = detail::Operator<PrimeField, Rank>;
  const Tree<Leaf> random = form.map([&](const ConvShape<Rank>& shape) {
    Conv<PrimeField, Rank> layer(shape);
    for (PrimeField& number : layer.weight()) number = random_bits(generator);
    for (PrimeField& number : layer.bias()) number = random_bits(generator);
    return Leaf(std::move(layer));
  });
  const PerAxis<Rank> size = input_size ? *input_size : smallest_input(form);
  FeatureMap<PrimeField, Rank> x({.channels = contraction.shape().in, .size = size});
  for (PrimeField& number : x.values()) number = random_bits(generator);

  const FeatureMap<PrimeField, Rank> whole = detail::evaluate<PrimeField>(random)(x);
  x = Expr<PrimeField, Rank>(random)(x);
  const Exactness<Rank> border = exactness(form, size);
  const MapShape<Rank>& shape = x.shape();
  std::size_t at = 0;
  for (Index channel = 0; channel < shape.channels; ++channel) {
    detail::for_each_position(shape.size, [&](const PerAxis<Rank>& position) {
      const bool same = whole.values()[at] == x.values()[at];
      ++at;
      if (!detail::off_border(position, shape.size, border)) return;
      ++report.compared;
      if (!same && report) {
        report.failure = "output channel " + std::to_string(channel) + " at position " +
                         to_string(position) + " differs over the prime field";
      }
    });
  }
  if (report.compared == 0) detail::refuse_empty(report, size);
  return report;
}

template <class A, Expression E, Layer F>
Report prove_rounding(const E& expression, const F& contraction) {
  using Scalar = ScalarOf<E>;
  using Accumulator = detail::AccumulatorOf<A, Scalar>;
  using Ref = detail::Reference<Accumulator>;
  constexpr int Rank = rank_of<E>;
  static_assert(std::is_same_v<Scalar, typename F::Scalar>);
  static_assert(detail::provable<Scalar>, "prove real and imaginary parts as layers of their own");
  const auto tree = detail::tree_of(expression, "prove_rounding");
  Report report{.proof = "rounding"};
  report.failure =
      detail::misfit<Rank>(contracted_shape(detail::form_of(tree)), contraction.shape());
  if (!report) return report;

  const auto reference = detail::contract_by_definition<Ref>(tree, detail::Part::value);
  const auto magnitude = detail::contract_by_definition<Ref>(tree, detail::Part::magnitude);
  const detail::Terms count = detail::terms<Rank>(tree);
  const auto weight_bound = detail::error_bound<Accumulator>(tree, count.weight);
  const auto bias_bound = detail::error_bound<Accumulator>(tree, count.bias);

  const ConvView<Scalar, Rank> given(contraction);
  const ConvView<Ref, Rank> right(reference), size(magnitude);
  detail::Worst<Scalar, Accumulator> worst(report);
  const auto place = [](Index o, Index c, const PerAxis<Rank>& offset) {
    std::string text = "weight[" + std::to_string(o) + "][" + std::to_string(c) + "]";
    return Rank == 0 ? text : text + " at offset " + to_string(offset);
  };
  detail::for_each_tap(right, [&](Index o, Index c, const PerAxis<Rank>& offset, const Ref& r) {
    worst.compare(detail::tap_at(given, o, c, offset), r, detail::tap_at(size, o, c, offset),
                  weight_bound, [&] { return place(o, c, offset); });
  });
  detail::for_each_tap(given, [&](Index o, Index c, const PerAxis<Rank>& offset, const Scalar& n) {
    if (n == Scalar(0))
      return;  // nothing to explain, and taps beyond the chain's reach must be zero
    worst.compare(n, detail::tap_at(right, o, c, offset), detail::tap_at(size, o, c, offset),
                  weight_bound, [&] { return place(o, c, offset); });
    --report.compared;
  });
  const auto number = [](auto bias, std::size_t o) {
    return bias.empty() ? decltype(bias[o] + bias[o])(0) : bias[o];
  };
  for (std::size_t o = 0; o < static_cast<std::size_t>(given.shape().out); ++o) {
    if (given.bias().empty() && right.bias().empty()) break;
    worst.compare(static_cast<Scalar>(number(given.bias(), o)), number(right.bias(), o),
                  number(size.bias(), o), bias_bound,
                  [&] { return "bias[" + std::to_string(o) + "]"; });
  }
  return report;
}

namespace detail {

/// Throws SizeError where the matrix of a chain's part, which products fill in, exceeds the limit.
template <class Ref, int Rank>
void require_structure_fits(const Form<Rank>& form, PerAxis<Rank> input_size, MemoryLimit limit) {
  if (form.is_leaf()) return;
  const ConvShape<Rank> shape = contracted_shape(form, std::optional(input_size));
  require_memory(
      toeplitz_size(shape, input_size),
      checked_multiply(toeplitz_entries(shape, input_size), sizeof(Ref) + sizeof(int), "structure"),
      limit);
  PerAxis<Rank> size = input_size;
  for (std::size_t p = 0; p < form.parts().size(); ++p) {
    const Form<Rank>& part = form.parts()[p];
    require_structure_fits<Ref>(part, size, limit);
    if (form.join() != Join::chain) continue;
    size = output_size(part, size);
    if (p == 0) continue;
    const Form<Rank> so_far(
        Join::chain, {form.parts().begin(), form.parts().begin() + static_cast<Index>(p) + 1});
    const ConvShape<Rank> front = contracted_shape(so_far, std::optional(input_size));
    require_memory(toeplitz_size(front, input_size),
                   checked_multiply(toeplitz_entries(front, input_size), sizeof(Ref) + sizeof(int),
                                    "structure"),
                   limit);
  }
}

/// The matrix [T b; 0 1] of an expression, from those of its leaves.
template <class Ref, class Scalar, int Rank>
RowMajorSparse<Ref> augmented_by_definition(const Tree<Operator<Scalar, Rank>>& node, Part part,
                                            const PerAxis<Rank>& input_size, MemoryLimit limit) {
  if (node.is_leaf()) {
    return augmented(leaf_by_definition<Ref>(node.leaf(), part), input_size, limit);
  }
  if (node.join() == Join::chain) {
    RowMajorSparse<Ref> product;
    PerAxis<Rank> size = input_size;
    for (const auto& each : node.parts()) {
      RowMajorSparse<Ref> matrix = augmented_by_definition<Ref>(each, part, size, limit);
      size = output_size(form_of(each), size);
      if (product.rows() == 0) {
        product = std::move(matrix);
      } else {
        product = (matrix * product).eval();
      }
    }
    return product;
  }
  // Rows of branches are added, or stacked; columns stand where the branch's channels do.
  const Channels whole = channels(node);
  const Index positions = numel(output_size(form_of(node), input_size)), inputs = numel(input_size);
  const Index rows = checked_multiply(whole.out, positions, "structure"),
              columns = checked_multiply(whole.in, inputs, "structure");
  std::vector<Eigen::Triplet<Ref>> entries;
  Index out = 0, in = 0;
  for (const auto& each : node.parts()) {
    const RowMajorSparse<Ref> matrix = augmented_by_definition<Ref>(each, part, input_size, limit);
    for (Index row = 0; row + 1 < matrix.rows(); ++row) {
      for (typename RowMajorSparse<Ref>::InnerIterator entry(matrix, row); entry; ++entry) {
        const bool bias = entry.col() + 1 == matrix.cols();
        entries.emplace_back(static_cast<int>(out * positions + row),
                             static_cast<int>(bias ? columns : in * inputs + entry.col()),
                             entry.value());
      }
    }
    if (node.join() == Join::concat_outputs) out += channels(each).out;
    if (node.join() == Join::concat_inputs) in += channels(each).in;
  }
  entries.emplace_back(static_cast<int>(rows), static_cast<int>(columns), Ref(1));
  RowMajorSparse<Ref> sum(rows + 1, columns + 1);
  sum.setFromTriplets(entries.begin(), entries.end());
  return sum;
}

}  // namespace detail

template <class A, Expression E, Layer F>
Report prove_structure(const E& expression, const F& contraction,
                       const PerAxis<rank_of<E>>& input_size, MemoryLimit limit) {
  using Scalar = ScalarOf<E>;
  using Accumulator = detail::AccumulatorOf<A, Scalar>;
  using Ref = detail::Reference<Accumulator>;
  constexpr int Rank = rank_of<E>;
  static_assert(detail::provable<Scalar>, "prove real and imaginary parts as layers of their own");
  const auto tree = detail::tree_of(expression, "prove_structure");
  const Form<Rank> form = detail::form_of(tree);
  Report report{.proof = "structure"};
  report.failure =
      detail::misfit<Rank>(contracted_shape(form, std::optional(input_size)), contraction.shape());
  if (!report) return report;

  detail::require_structure_fits<Ref>(form, input_size, limit);
  const auto from_leaves = [&](detail::Part part) {
    return detail::augmented_by_definition<Ref>(tree, part, input_size, limit);
  };
  const auto reference = from_leaves(detail::Part::value);
  const auto magnitude = from_leaves(detail::Part::magnitude);
  const auto given = augmented(contraction, input_size, limit);
  const detail::Terms count = detail::terms<Rank>(tree);
  const auto bound = detail::error_bound<Accumulator>(tree, count.bias);

  const Exactness<Rank> border = exactness(form, input_size);
  const PerAxis<Rank> positions = output_size(contraction.shape(), input_size);
  detail::Worst<Scalar, Accumulator> worst(report);
  const auto columns = static_cast<std::size_t>(given.cols());
  std::vector<Scalar> computed(columns, Scalar(0));
  std::vector<Ref> right(columns, Ref(0)), size(columns, Ref(0));
  const auto scatter = [](const auto& matrix, Index row, auto& line, bool clear) {
    using Matrix = std::remove_cvref_t<decltype(matrix)>;
    for (typename Matrix::InnerIterator entry(matrix, row); entry; ++entry) {
      line[static_cast<std::size_t>(entry.col())] =
          clear ? typename Matrix::Scalar(0) : typename Matrix::Scalar(entry.value());
    }
  };
  Index row = 0;
  const auto compare_row = [&] {
    scatter(given, row, computed, false);
    scatter(reference, row, right, false);
    scatter(magnitude, row, size, false);
    for (std::size_t column = 0; column < columns; ++column) {
      if (computed[column] == Scalar(0) && right[column] == Ref(0)) continue;
      worst.compare(computed[column], right[column], size[column], bound, [&] {
        return "entry (" + std::to_string(row) + ", " + std::to_string(column) + ")";
      });
    }
    scatter(given, row, computed, true);
    scatter(reference, row, right, true);
    scatter(magnitude, row, size, true);
  };
  for (Index o = 0; o < contraction.shape().out; ++o) {
    detail::for_each_position(positions, [&](const PerAxis<Rank>& position) {
      if (detail::off_border(position, positions, border)) compare_row();
      ++row;
    });
  }
  if (report.compared == 0) detail::refuse_empty(report, input_size);
  compare_row();  // [0 1]
  return report;
}

template <class A, Expression E, Layer F>
Verification verify(const E& expression, const F& contraction, std::uint64_t seed,
                    MemoryLimit limit) {
  const PerAxis<rank_of<E>> size = smallest_input(form(expression));
  return {.algebra = prove_algebra(expression, contraction, seed),
          .rounding = prove_rounding<A>(expression, contraction),
          .structure = prove_structure<A>(expression, contraction, size, limit)};
}

}  // namespace concertina
