// The proofs' bodies.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/detail/rounding.hpp>
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

template <class Scalar, class A, int Rank>
auto error_bound(const std::vector<ConvView<Scalar, Rank>>& layers, Index count) {
  if constexpr (rounds<Scalar>) {
    return ErrorBound<Scalar, A>(count, underflow<A>(layers, count));
  } else {
    return 0;
  }
}

template <class Ref>
Ref absolute(const Ref& number) {
  if constexpr (rounds<Ref>) {
    return std::abs(number);
  } else {
    return number;
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
                     : why + ": the chain contracts to " + to_string(expected) + ", given is " +
                           to_string(given);
}

/// The layer along one axis, as a single-channel layer.
template <int Rank>
ConvShape<1> along(const ConvShape<Rank>& shape, int axis) {
  const auto& [stride, padding, dilation, groups] = shape.geometry;
  return {.out = 1,
          .in = 1,
          .kernel = shape.kernel[axis],
          .geometry = {.stride = stride[axis],
                       .padding = Padding<1>::sides(padding.start[axis], padding.end[axis]),
                       .dilation = dilation[axis]},
          .bias = shape.bias};
}

/// Whether every layer fits, every tap of the product reads the map, and an output lies off the
/// border.
inline bool shows_everything(std::span<const ConvShape<1>> layers, const ConvShape<1>& product,
                             Index size) {
  Index positions = size;
  for (const ConvShape<1>& layer : layers) {
    if (positions < 1) return false;
    positions = output_size(layer, positions, 0);
  }
  if (positions < 1) return false;
  const auto& [stride, padding, dilation, groups] = product.geometry;
  for (Index tap = 0; tap < product.kernel[0]; ++tap) {
    const Index offset = tap * dilation[0] - padding.start[0];
    const Index first = std::max<Index>(0, -floor_divide(offset, stride[0]));
    if (first >= positions || first * stride[0] + offset >= size) return false;
  }
  const Exactness<1> border = exactness<1>(layers, size);
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
PerAxis<Rank> smallest_input(std::span<const ConvShape<Rank>> layers) {
  const ConvShape<Rank> product = product_shape(layers);
  PerAxis<Rank> size;
  for (int axis = 0; axis < Rank; ++axis) {
    std::vector<ConvShape<1>> line;
    for (const ConvShape<Rank>& layer : layers) line.push_back(detail::along(layer, axis));
    const ConvShape<1> whole = detail::along(product, axis);
    const Padding<1>& padding = whole.geometry.padding;
    Index& extent = size[axis];
    extent = std::max<Index>(1, span(whole, 0) + 1 - padding.start[0] - padding.end[0]);
    constexpr Index most_steps = 4096;  // real layers take a few
    const Index least = extent;
    while (!detail::shows_everything(line, whole, extent)) {
      if (++extent == least + most_steps) {
        throw SizeError("no input up to " + std::to_string(extent) +
                        " shows every tap and an output off the border (" + to_string(product) +
                        ")");
      }
    }
  }
  return size;
}

template <Chain E, Layer F>
Report prove_algebra(const E& chain, const F& contraction, std::uint64_t seed,
                     std::optional<PerAxis<rank_of<E>>> input_size) {
  constexpr int Rank = rank_of<E>;
  const std::vector<ConvShape<Rank>> layers = shapes(chain);
  if (layers.size() + 1 >= (std::size_t{1} << 11)) {
    throw VerificationError("a chain of " + std::to_string(layers.size()) +
                            " layers is too long for the field of 2^61 - 1 elements");
  }
  Report report{.proof = "algebra"};
  report.failure = detail::misfit<Rank>(product_shape<Rank>(layers), contraction.shape());
  if (!report) return report;

  std::mt19937_64 generator(seed);
  std::vector<Conv<PrimeField, Rank>> random;
  for (const ConvShape<Rank>& shape : layers) {
    Conv<PrimeField, Rank>& layer = random.emplace_back(shape);
    for (PrimeField& number : layer.weight()) number = random_bits(generator);
    for (PrimeField& number : layer.bias()) number = random_bits(generator);
  }
  const PerAxis<Rank> size = input_size ? *input_size : smallest_input<Rank>(layers);
  FeatureMap<PrimeField, Rank> x({.channels = layers.front().in, .size = size});
  for (PrimeField& number : x.values()) number = random_bits(generator);

  const Conv<PrimeField, Rank> product = contract(random, interior_only);
  const FeatureMap<PrimeField, Rank> whole = product(x);
  for (const auto& layer : random) x = layer(x);
  const Exactness<Rank> border = exactness<Rank>(layers, size);
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

template <class A, Chain E, Layer F>
Report prove_rounding(const E& chain, const F& contraction) {
  using Scalar = ScalarOf<E>;
  using Accumulator = detail::AccumulatorOf<A, Scalar>;
  using Ref = detail::Reference<Accumulator>;
  constexpr int Rank = rank_of<E>;
  static_assert(std::is_same_v<Scalar, typename F::Scalar>);
  static_assert(detail::provable<Scalar>, "prove real and imaginary parts as layers of their own");
  const auto layers = detail::factors(chain);
  const std::vector<ConvShape<Rank>> layer_shapes = shapes(chain);
  Report report{.proof = "rounding"};
  report.failure = detail::misfit<Rank>(product_shape<Rank>(layer_shapes), contraction.shape());
  if (!report) return report;

  const auto contracted = [&](auto&& each) {
    return detail::contract_by_definition<Ref, Scalar, Rank>(layers, each);
  };
  const Conv<Ref, Rank> reference = contracted([](const Ref& number) { return number; });
  const Conv<Ref, Rank> magnitude = contracted(detail::absolute<Ref>);
  const detail::Terms count = detail::terms<Rank>(layer_shapes);
  const auto weight_bound = detail::error_bound<Scalar, Accumulator>(layers, count.weight);
  const auto bias_bound = detail::error_bound<Scalar, Accumulator>(layers, count.bias);

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

template <class A, Chain E, Layer F>
Report prove_structure(const E& chain, const F& contraction, const PerAxis<rank_of<E>>& input_size,
                       MemoryLimit limit) {
  using Scalar = ScalarOf<E>;
  using Accumulator = detail::AccumulatorOf<A, Scalar>;
  using Ref = detail::Reference<Accumulator>;
  constexpr int Rank = rank_of<E>;
  static_assert(detail::provable<Scalar>, "prove real and imaginary parts as layers of their own");
  const auto layers = detail::factors(chain);
  const std::vector<ConvShape<Rank>> layer_shapes = shapes(chain);
  Report report{.proof = "structure"};
  report.failure = detail::misfit<Rank>(product_shape<Rank>(layer_shapes), contraction.shape());
  if (!report) return report;

  for (std::size_t l = 1; l < layer_shapes.size(); ++l) {  // products fill in
    const ConvShape<Rank> part =
        product_shape(std::span<const ConvShape<Rank>>(layer_shapes).first(l + 1));
    const detail::MatrixSize size = detail::toeplitz_size(part, input_size);
    const Index entries = detail::toeplitz_entries(part, input_size);
    detail::require_memory(
        size, detail::checked_multiply(entries, sizeof(Ref) + sizeof(int), "structure"), limit);
  }
  const auto product = [&](auto&& each) {
    PerAxis<Rank> size = input_size;
    decltype(augmented(std::declval<Conv<Ref, Rank>>(), size, limit)) result;
    for (const auto& view : layers) {
      Conv<Ref, Rank> layer = view.template cast<Ref>();
      for (Ref& number : layer.weight()) number = each(number);
      for (Ref& number : layer.bias()) number = each(number);
      auto matrix = augmented(layer, size, limit);
      if (&view == &layers.front()) {
        result = std::move(matrix);
      } else {
        result = (matrix * result).eval();
      }
      size = output_size(layer.shape(), size);
    }
    return result;
  };
  const auto reference = product([](const Ref& number) { return number; });
  const auto magnitude = product(detail::absolute<Ref>);
  const auto given = augmented(contraction, input_size, limit);
  const detail::Terms count = detail::terms<Rank>(layer_shapes);
  const auto bound = detail::error_bound<Scalar, Accumulator>(layers, count.bias);

  const Exactness<Rank> border = exactness<Rank>(layer_shapes, input_size);
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

template <class A, Chain E, Layer F>
Verification verify(const E& chain, const F& contraction, std::uint64_t seed, MemoryLimit limit) {
  const std::vector<ConvShape<rank_of<E>>> layers = shapes(chain);
  return {.algebra = prove_algebra(chain, contraction, seed),
          .rounding = prove_rounding<A>(chain, contraction),
          .structure =
              prove_structure<A>(chain, contraction, smallest_input<rank_of<E>>(layers), limit)};
}

}  // namespace concertina
