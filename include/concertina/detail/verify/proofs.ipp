// The proofs' bodies.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/detail/verify/rounding.hpp>
#include <concertina/random.hpp>
#include <concertina/verify.hpp>

#include <algorithm>
#include <cmath>
#include <functional>
#include <random>
#include <span>
#include <sstream>
#include <utility>
#include <vector>

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

/// Keeps the element nearest to its bound, and whether the bounds say anything. A row is what one
/// output channel multiplies, or its bias.
template <class Scalar>
class Worst {
 public:
  /// Below `least` elements have no relative precision: it is the smallest normal number of what
  /// computes or stores them.
  explicit Worst(Report& report, long double least = 0) : report_(report), least_(least) {}

  /// `magnitude` is the same element contracted from absolute values; it is unused for exact
  /// scalars. bound(magnitude, computed, reference) is what they may differ by.
  template <class Computed, class Ref, class Bound, class Where>
  void compare(Index row, const Computed& computed, const Ref& reference, const Ref& magnitude,
               const Bound& bound, Where&& where) {
    ++report_.compared;
    if constexpr (rounds<Scalar>) {
      const auto c = static_cast<long double>(computed), r = static_cast<long double>(reference);
      const auto size = static_cast<long double>(magnitude);
      const long double error = std::abs(c - r), allowed = bound(size, c, r);
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
      if (allowed < std::abs(r)) told_ = true;
      rows_.resize(std::max(rows_.size(), static_cast<std::size_t>(row) + 1));
      rows_[static_cast<std::size_t>(row)].add(r, size, error, where);
      if (error > 0 && !(allowed < size)) {
        if (unsure_.empty() || allowed > least_) unsure_ = where();
        if (allowed > least_) emptied_ = true;
      }
      differs_ = differs_ || error > 0;
    } else if (!(computed == static_cast<Computed>(reference))) {
      note(where(), 1, 0, 0, "differs");
    }
  }

  /// A bound that exceeds what it bounds proves nothing: below the smallest normal number that is
  /// so by nature, and then some other element must tell the layer from one of zeros.
  void judge() {
    if (!report_.failure.empty()) return;
    if (emptied_) {
      report_.undecided = true;
      report_.failure = "the bound of " + unsure_ +
                        " exceeds its magnitude, since its factors may have underflowed; use a "
                        "wider accumulator";
    } else if (differs_ && !told_) {
      report_.undecided = true;
      report_.failure =
          "every element is smaller than its bound; use a wider accumulator, or layers of another "
          "scale";
    } else if (const auto row = lost_row(); row != rows_.end()) {
      report_.undecided = true;
      report_.failure = "the bound of " + row->lost_at +
                        " exceeds its value, and so does its error; use a wider accumulator";
    }
  }

 private:
  /// What cancellation loses of a row: elements whose error is no smaller than they are.
  struct Row {
    long double largest = 0, magnitude = 0, lost = 0;
    std::string lost_at;

    template <class Where>
    void add(long double reference, long double size, long double error, Where&& where) {
      largest = std::max(largest, std::abs(reference));
      magnitude = std::max(magnitude, size);
      if (error >= std::abs(reference) && error > lost) {
        lost = error;
        lost_at = where();
      }
    }

    /// Whether that matters beside `other`, the largest element.
    bool is_lost_beside(long double other) const {
      return lost * lost > ulp<Scalar>(1) * other * other;
    }
    /// Whether it is nothing but what rounding its factors left of a zero.
    bool is_zero() const { return largest <= ulp<Scalar>(1) * magnitude; }
  };

  /// A row with an element that matters, of which cancellation left nothing.
  auto lost_row() const {
    long double largest = 0;
    for (const Row& row : rows_) largest = std::max(largest, row.largest);
    return std::ranges::find_if(rows_, [&](const Row& row) {
      return row.is_lost_beside(largest) ||
             (row.lost > least_ && !row.is_zero() && row.is_lost_beside(row.largest));
    });
  }

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
  long double least_;
  std::vector<Row> rows_;
  std::string unsure_;
  bool emptied_ = false, told_ = false, differs_ = false;
};

/// Why `given` cannot be a contraction of shape `expected`, or nothing.
template <int Rank>
std::string misfit(const ConvShape<Rank>& expected, const ConvShape<Rank>& given) {
  const std::string why = incomparable(expected, given);
  return why.empty() ? why
                     : why + ": the layers contract to " + to_string(expected) + ", given is " +
                           to_string(given);
}

/// The form along one axis, of a single channel. Channels do not matter there: concatenations
/// become sums.
inline AnyForm along(const AnyForm& form, int axis) {
  if (form.is_leaf()) {
    const AnyShape& layer = form.leaf();
    return AnyForm(AnyShape(ConvShape<1>{
        .out = 1,
        .in = 1,
        .kernel_size = layer.kernel_size[axis],
        .stride = layer.stride[axis],
        .padding = Padding<1>::sides(layer.padding.start[axis], layer.padding.end[axis]),
        .dilation = layer.dilation[axis],
        .bias = layer.bias}));
  }
  std::vector<AnyForm> parts;
  for (const AnyForm& part : form.parts()) parts.push_back(along(part, axis));
  return {form.join() == Join::chain ? Join::chain : Join::sum, parts};
}

/// A size along one axis.
inline Axes line(Index size) { return all_axes(PerAxis<1>(size), 1); }

/// Whether every layer of a form along one axis fits on an input of this size.
inline bool fits(const AnyForm& form, Index size) {
  if (size < 1) return false;
  if (form.is_leaf()) return concertina::output_size(form.leaf(), size, 0) >= 1;
  for (const AnyForm& part : form.parts()) {
    if (!fits(part, size)) return false;
    if (form.join() == Join::chain) size = output_size(part, line(size))[0];
  }
  return true;
}

/// Whether every layer fits, every tap of the contraction reads an element of the map, of which
/// every `spacing`-th position has one, and an output lies off the border.
inline bool shows_everything(const AnyForm& form, const AnyShape& contraction, Index size,
                             Index spacing) {
  if (!fits(form, size)) return false;
  const Index positions = output_size(form, line(size))[0], stride = contraction.stride[0];
  for (Index tap = 0; tap < contraction.kernel_size[0]; ++tap) {
    const Index offset = tap * contraction.dilation[0] - contraction.padding.start[0];
    Index output = std::max<Index>(0, -floor_divide(offset, stride));
    while ((output * stride + offset) % spacing != 0) ++output;  // then the stride is 1
    if (output >= positions || output * stride + offset >= size) return false;
  }
  const AnyExactness found = find_exactness(form, line(size), spacing);
  return found.start[0] + found.end[0] < positions;
}

/// A proof that looked at nothing proves nothing.
template <int Rank>
void refuse_empty(Report& report, const PerAxis<Rank>& input_size) {
  if (report) {
    report.failure = "at input size " + to_string(input_size) +
                     " every output is on the border; take a larger input";
  }
}

/// Whether a position is a multiple of `spacing`.
template <int Rank>
bool is_spaced(const PerAxis<Rank>& position, const PerAxis<Rank>& spacing) {
  for (int axis = 0; axis < Rank; ++axis) {
    if (position[axis] % spacing[axis] != 0) return false;
  }
  return true;
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

/// The smallest size that shows everything; where one is named, of those that leave the same
/// remainders.
template <int Rank>
PerAxis<Rank> smallest_size(const Form<Rank>& form, const std::optional<PerAxis<Rank>>& input_size,
                            const PerAxis<Rank>& spacing) {
  const ConvShape<Rank> contraction = form.shape(input_size);
  PerAxis<Rank> size;
  for (int axis = 0; axis < Rank; ++axis) {
    const AnyForm line = along(form.tree(), axis);
    const AnyShape whole = along(AnyForm(contraction), axis).leaf();
    const Index step = (input_size ? contraction.stride[axis] : 1) * spacing[axis];
    Index& extent = size[axis];
    extent = std::max<Index>(
        1, effective_kernel_size(whole, 0) - whole.padding.start[0] - whole.padding.end[0]);
    const Index more = (input_size ? (*input_size)[axis] : 1) - extent;
    extent += more - step * floor_divide(more, step);
    constexpr Index most_steps = 4096;  // real layers take a few
    const Index most = extent + most_steps * step;
    while (!shows_everything(line, whole, extent, spacing[axis])) {
      extent += step;
      if (extent >= most) {
        throw SizeError("no input up to " + std::to_string(extent) +
                        " shows every tap and an output off the border (" +
                        concertina::to_string(contraction) + ")");
      }
    }
  }
  return size;
}

}  // namespace detail

template <int Rank>
PerAxis<Rank> smallest_input(const Form<Rank>& form,
                             const std::type_identity_t<std::optional<PerAxis<Rank>>>& input_size) {
  return detail::smallest_size<Rank>(form, input_size, 1);
}

template <class Scalar, int Rank>
PerAxis<Rank> smallest_input(const TransposedExpr<Scalar, Rank>& expression) {
  PerAxis<Rank> size =
      detail::smallest_size<Rank>(Form(expression.dense()), {}, expression.stride());
  for (int axis = 0; axis < Rank; ++axis) size[axis] = size[axis] / expression.stride()[axis] + 1;
  return size;
}

namespace detail {

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
  Worst<Scalar> worst(report, smallest_of(precision_of<A>()));
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

/// Throws SizeError where the matrix of a chain's part, which products fill in, exceeds the limit.
template <class Ref, int Rank>
void require_structure_fits(const Form<Rank>& form, const PerAxis<Rank>& input_size, Index rows,
                            MemoryLimit limit) {
  if (form.join() == Join::none) return;
  const auto require_fits = [&](const Form<Rank>& whole, const PerAxis<Rank>& size) {
    const ConvShape<Rank> shape = whole.shape(size);
    Index entries = toeplitz_entries(shape, size);
    if (rows > 0) {
      const Index in_a_row = shape.in / shape.groups * numel(shape.kernel_size) + 1;
      entries = std::min(entries, checked_multiply(rows + 1, in_a_row, "structure"));
    }
    require_memory(toeplitz_size(shape, size),
                   checked_multiply(entries, sizeof(Ref) + sizeof(int), "structure"), limit);
  };
  require_fits(form, input_size);
  PerAxis<Rank> size = input_size;
  const std::span<const AnyForm> parts(form.tree().parts());
  for (std::size_t p = 0; p < parts.size(); ++p) {
    const Form<Rank> part(parts[p]);
    require_structure_fits<Ref>(part, size, rows, limit);
    if (form.join() != Join::chain) continue;
    require_fits(Form<Rank>(AnyForm(Join::chain, parts.subspan(p))), size);
    size = part.output_size(size);
  }
}

/// The matrix [T b; 0 1] of an expression, from those of its leaves; where there are `rows`, they
/// times this matrix, of which then only what they read is computed.
template <class Ref, class Scalar, int Rank>
RowMajorSparse<Ref> augmented_by_definition(const Tree<Leaf<Scalar, Rank>>& node, Measure measure,
                                            const PerAxis<Rank>& input_size, MemoryLimit limit,
                                            const RowMajorSparse<Ref>* rows = nullptr) {
  if (node.is_leaf()) {
    const auto layer = leaf_by_definition<Ref>(node.leaf(), measure);
    if (!rows) return augmented(layer, input_size, limit);
    std::vector<bool> wanted(static_cast<std::size_t>(rows->cols()));
    for (Index row = 0; row < rows->rows(); ++row) {
      for (typename RowMajorSparse<Ref>::InnerIterator entry(*rows, row); entry; ++entry) {
        wanted[static_cast<std::size_t>(entry.col())] = true;
      }
    }
    return *rows * sparse<Ref, Rank>(layer, input_size, true, limit, &wanted);
  }
  if (node.join() == Join::chain) {
    std::vector<PerAxis<Rank>> sizes{input_size};
    for (const auto& each : node.parts()) {
      sizes.push_back(Form<Rank>(form_of(each)).output_size(sizes.back()));
    }
    RowMajorSparse<Ref> product;
    for (std::size_t p = node.parts().size(); p-- > 0;) {
      const bool last = product.rows() == 0;
      RowMajorSparse<Ref> next = augmented_by_definition<Ref>(
          node.parts()[p], measure, sizes[p], limit, rows && !last ? &product : rows);
      product = rows || last ? std::move(next) : RowMajorSparse<Ref>(product * next);
    }
    return product;
  }
  // Rows of branches are added, or stacked; columns stand where the branch's channels do.
  const Channels whole = channels(node);
  const Index positions = numel(Form<Rank>(form_of(node)).output_size(input_size)),
              inputs = numel(input_size);
  const Index outputs = checked_multiply(whole.out, positions, "structure"),
              columns = checked_multiply(whole.in, inputs, "structure");
  using Triplets = std::vector<Eigen::Triplet<Ref>>;
  using Iterator = typename RowMajorSparse<Ref>::InnerIterator;
  Triplets entries;
  const auto add = [](Triplets& to, Index row, Index column, const Ref& value) {
    to.emplace_back(static_cast<int>(row), static_cast<int>(column), value);
  };
  Index out = 0, in = 0;
  for (const auto& each : node.parts()) {
    const Index own = channels(each).out * positions;
    RowMajorSparse<Ref> read;  // of the rows, what reads this branch
    if (rows) {
      Triplets reads;
      for (Index row = 0; row < rows->rows(); ++row) {
        for (Iterator entry(*rows, row); entry; ++entry) {
          const Index column = entry.col() - out * positions;
          if (column >= 0 && column < own) add(reads, row, column, entry.value());
        }
      }
      read.resize(rows->rows(), own + 1);
      read.setFromTriplets(reads.begin(), reads.end());
    }
    const RowMajorSparse<Ref> matrix =
        augmented_by_definition<Ref>(each, measure, input_size, limit, rows ? &read : nullptr);
    for (Index row = 0; row < (rows ? matrix.rows() : own); ++row) {
      for (Iterator entry(matrix, row); entry; ++entry) {
        const bool bias = entry.col() + 1 == matrix.cols();
        add(entries, rows ? row : out * positions + row, bias ? columns : in * inputs + entry.col(),
            entry.value());
      }
    }
    if (splits_outputs(node.join())) out += channels(each).out;
    if (splits_inputs(node.join())) in += channels(each).in;
  }
  for (Index row = 0; rows && row < rows->rows(); ++row) {
    for (Iterator entry(*rows, row); entry; ++entry) {
      if (entry.col() == outputs) add(entries, row, columns, entry.value());
    }
  }
  if (!rows) add(entries, outputs, columns, Ref(1));
  RowMajorSparse<Ref> sum(rows ? rows->rows() : outputs + 1, columns + 1);
  sum.setFromTriplets(entries.begin(), entries.end());
  return sum;
}

/// A uniform integer below `bound`, from an unbiased draw.
template <BitGenerator Generator>
std::uint64_t random_below(Generator& generator, std::uint64_t bound) {
  const std::uint64_t biased = (0 - bound) % bound;  // 2^64 mod bound
  while (true) {
    const std::uint64_t bits = random_bits(generator);
    if (bits >= biased) return bits % bound;
  }
}

/// A row that is compared: of which output.
template <int Rank>
struct ComparedRow {
  Index row, channel;
  PerAxis<Rank> position;
};

/// Draws from the rows (Knuth, The Art of Computer Programming, volume 2, algorithm 3.4.2S), unless
/// all are to be compared.
template <int Rank>
void draw(std::vector<ComparedRow<Rank>>& rows, const RowSample& sample, Report& report) {
  const Index all = std::ssize(rows);
  if (sample.rows <= 0 || sample.rows >= all) return;
  report.sampled = sample.rows;
  report.rows = all;
  std::mt19937_64 generator(sample.seed);
  Index left = all, wanted = sample.rows;
  std::erase_if(rows, [&](const ComparedRow<Rank>&) {
    const bool taken = random_below(generator, static_cast<std::uint64_t>(left--)) <
                       static_cast<std::uint64_t>(wanted);
    wanted -= taken;
    return !taken;
  });
}

template <class A, class Scalar, int Rank>
Report prove_structure(const Tree<Leaf<Scalar, Rank>>& tree,
                       const ConvView<const Scalar, Rank>& contraction,
                       const PerAxis<Rank>& input_size, const PerAxis<Rank>& spacing,
                       MemoryLimit limit, const RowSample& sample) {
  using Ref = Reference<A>;
  const Form<Rank> form(form_of(tree));
  Report report{.proof = "structure"};
  report.failure = misfit(form.shape(input_size), contraction.shape());
  if (!report) return report;

  const Exactness<Rank> border = find_exactness<Rank>(form, input_size, spacing);
  const PerAxis<Rank> positions = concertina::output_size(contraction.shape(), input_size);
  const MatrixSize whole = toeplitz_size(contraction.shape(), input_size);
  std::vector<ComparedRow<Rank>> compared;
  for (Index o = 0, row = 0; o < contraction.shape().out; ++o) {
    for_each_position(positions, [&](const PerAxis<Rank>& position) {
      if (off_border(position, positions, border)) compared.push_back({row, o, position});
      ++row;
    });
  }
  if (compared.empty())
    refuse_empty(report, input_size);  // a layer of zeros has nothing to compare
  draw(compared, sample, report);
  compared.push_back({whole.rows, 0, {}});  // [0 1]

  const bool all = report.sampled == 0;
  require_structure_fits<Ref>(form, input_size, report.sampled, limit);
  RowMajorSparse<Ref> drawn;  // the rows of the product, one each
  std::vector<bool> wanted;
  if (!all) {
    drawn.resize(std::ssize(compared), whole.rows + 1);
    wanted.resize(static_cast<std::size_t>(whole.rows + 1));
    for (Index r = 0; r < drawn.rows(); ++r) {
      const Index row = compared[static_cast<std::size_t>(r)].row;
      drawn.insert(r, row) = Ref(1);
      wanted[static_cast<std::size_t>(row)] = true;
    }
  }
  const auto from_leaves = [&](Measure measure) {
    return augmented_by_definition<Ref>(tree, measure, input_size, limit, all ? nullptr : &drawn);
  };
  const auto reference = from_leaves(Measure::value);
  const auto magnitude = from_leaves(Measure::magnitude);
  const auto given =
      sparse<Scalar, Rank>(contraction, input_size, true, limit, all ? nullptr : &wanted);
  const Index count = terms(tree).bias;
  const auto bounds = bounds_of<A>(tree, Terms{.weight = count, .bias = count}, [&] {
    return least_positive(
        std::span(magnitude.valuePtr(), static_cast<std::size_t>(magnitude.nonZeros())));
  });

  Worst<Scalar> worst(report, smallest_of(precision_of<A>()));
  const auto columns = static_cast<std::size_t>(given.cols());
  std::vector<bool> reads(columns, true);     // an element, or the 1 of the bias
  std::vector<PerAxis<Rank>> place(columns);  // of an element
  for (Index channel = 0, column = 0; channel < contraction.shape().in; ++channel) {
    for_each_position(input_size, [&](const PerAxis<Rank>& position) {
      const auto at = static_cast<std::size_t>(column++);
      reads[at] = is_spaced(position, spacing);
      place[at] = position;
    });
  }
  const Index pixels = numel(input_size);
  // The entry of a row at this column, or zero; columns are asked for in ascending order.
  const auto take = [](auto& entries, Index column) {
    using Element = std::remove_cvref_t<decltype(entries.value())>;
    while (entries && entries.col() < column) ++entries;
    return entries && entries.col() == column ? entries.value() : Element(0);
  };
  for (std::size_t r = 0; r < compared.size(); ++r) {
    const auto& [row, o, position] = compared[r];
    const Index product_row = all ? row : static_cast<Index>(r);
    typename RowMajorSparse<Scalar>::InnerIterator computed(given, row);
    typename RowMajorSparse<Ref>::InnerIterator right(reference, product_row),
        size(magnitude, product_row);
    while (computed || right) {
      const Index column =
          std::min(computed ? computed.col() : given.cols(), right ? right.col() : given.cols());
      const auto at = static_cast<std::size_t>(column);
      const Scalar c = take(computed, column);
      const Ref e = take(right, column), m = take(size, column);
      if (computed && computed.col() == column) ++computed;
      if (right && right.col() == column) ++right;
      if (!reads[at] || (c == Scalar(0) && e == Ref(0))) continue;
      const Index channel = column / pixels;
      const bool is_bias = channel == contraction.shape().in;
      const auto bound = [&](auto... numbers) {
        if (is_bias) return bounds.bias(o, numbers...);
        PerAxis<Rank> offset;
        for (int axis = 0; axis < Rank; ++axis) {
          offset[axis] = place[at][axis] - position[axis] * contraction.shape().stride[axis];
        }
        return bounds.weight(o, channel, offset, numbers...);
      };
      worst.compare(is_bias ? contraction.shape().out + o : o, c, e, m, bound, [&] {
        return "entry (" + std::to_string(row) + ", " + std::to_string(column) + ")";
      });
    }
  }
  worst.judge();
  return report;
}

/// The contraction of a tree's absolute values.
template <class Ref, class Scalar, int Rank>
Conv<Ref, Rank> magnitude_of(const Tree<Leaf<Scalar, Rank>>& tree) {
  return evaluate<Ref>(tree.map([](const Leaf<Scalar, Rank>& leaf) {
    return Leaf<Ref, Rank>(leaf_by_definition<Ref>(leaf, Measure::magnitude));
  }));
}

/// `accumulator` is what `contraction` was computed in, `precision` what `outputs` were.
template <class Scalar, int Rank, class Ref = Reference<Scalar>>
Report prove_outputs(const Tree<Leaf<Scalar, Rank>>& tree,
                     const ConvView<const Scalar, Rank>& contraction,
                     const FeatureMap<Ref, Rank>& input, const PerAxis<Rank>& spacing,
                     const FeatureMap<Ref, Rank>& outputs, const Precision& accumulator,
                     const Precision& precision, ComputedBy by) {
  Report report{.proof = "outputs"};
  const PerAxis<Rank> input_size = input.shape().size;
  const Form<Rank> form(form_of(tree));
  report.failure = misfit(form.shape(input_size), contraction.shape());
  if (!report) return report;

  const FeatureMap<Ref, Rank> reference = contraction.template cast<Ref>()(input);
  const MapShape<Rank>& shape = reference.shape();
  if (outputs.shape() != shape) {
    fail<ShapeError>({"prove_outputs: ", outputs.shape().batch, " outputs of ",
                      outputs.shape().channels, " channels of size ", outputs.shape().size,
                      ", where the expression gives ", shape.batch, " of ", shape.channels,
                      " of size ", shape.size});
  }

  FeatureMap<Ref, Rank> magnitude = reference;
  std::optional<FeatureMap<Ref, Rank>> lost_each;  // where one number would say too little
  std::vector<long double> lost_channel(static_cast<std::size_t>(shape.channels));
  long double relative = 0, enlarged = 0, lost_all = 0, least = 0;
  if constexpr (rounds<Scalar>) {
    FeatureMap<Ref, Rank> absolutes = input;
    long double largest = 1;
    for (Ref& element : absolutes.values()) {
      element = std::abs(element);
      largest = std::max(largest, static_cast<long double>(element));
    }
    magnitude = magnitude_of<Ref>(tree)(absolutes);

    const OutputErrors errors(tree, contraction.shape(), largest);
    const auto storage = [](const Precision& sums, const Precision& stored) {
      return stored.unit > sums.unit ? stored : Precision{};
    };
    const Precision own = precision_of<Scalar>(), single = precision_of<float>(),
                    sums = precision.unit > single.unit ? single : precision,
                    stored = storage(sums, precision);
    const OutputError ours = errors.of_contraction(accumulator, storage(accumulator, own),
                                                   precision_of<Ref>()),
                      theirs =
                          (by == ComputedBy::layers ? errors.of_layers(sums)
                                                    : errors.of_contraction(sums, stored, sums))
                              .stored(stored);
    relative = (ours.relative + theirs.relative) / (1 - errors.of_magnitude<Ref>());
    enlarged = 2 * (1 + ours.relative) * (1 + theirs.relative);
    lost_all = enlarged * (ours.lost + theirs.lost);
    least = std::max(smallest_of(sums), smallest_of(precision));
    if (!is_negligible(lost_all, relative * least_positive(std::as_const(magnitude).values()))) {
      lost_all = enlarged * stored.subnormal;
      const auto lost = [&](const Precision& in, const Precision& narrow, const Precision& apply) {
        return lost_by_contraction(tree, absolutes, errors, in, narrow, apply);
      };
      lost_each = lost(accumulator, storage(accumulator, own), precision_of<Ref>());
      if (by == ComputedBy::layers) {
        lost_channel = lost_by_layers(
            tree, std::vector<long double>(static_cast<std::size_t>(contraction.shape().in)),
            sums.subnormal);
      } else {
        const auto more = lost(sums, stored, sums);
        std::ranges::transform(lost_each->values(), more.values(), lost_each->values().begin(),
                               std::plus<>());
      }
    }
  }

  const Exactness<Rank> border = by == ComputedBy::layers
                                     ? find_exactness<Rank>(form, input_size, spacing)
                                     : Exactness<Rank>{};
  Worst<Scalar> worst(report, least);
  std::size_t at = 0;
  for (Index n = 0; n < shape.batch; ++n) {
    for (Index channel = 0; channel < shape.channels; ++channel) {
      for_each_position(shape.size, [&](const PerAxis<Rank>& position) {
        const std::size_t i = at++;
        if (!off_border(position, shape.size, border)) return;
        const auto bound = [&](long double size, long double, long double) {
          long double lost = lost_channel[static_cast<std::size_t>(channel)];
          if (lost_each) lost += static_cast<long double>(lost_each->values()[i]);
          return relative * size + enlarged * lost + lost_all;
        };
        worst.compare(channel, outputs.values()[i], reference.values()[i], magnitude.values()[i],
                      bound, [&] {
                        const std::string text =
                            "output[" + std::to_string(n) + "][" + std::to_string(channel) + "]";
                        return Rank == 0 ? text : text + " at " + concertina::to_string(position);
                      });
      });
    }
  }
  if (shape.batch == 0) {
    report.failure = "the batch is empty: nothing was compared";
  } else if (report.compared == 0) {
    refuse_empty(report, input_size);
  }
  worst.judge();
  return report;
}

/// Elements in the scalar that they are compared in.
template <class Ref, class Scalar, int Rank>
FeatureMap<Ref, Rank> in_reference(const FeatureMapView<Scalar, Rank>& map) {
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

}  // namespace detail

template <class E, class F>
  requires detail::Provable<E, F>
Report prove_algebra(const E& expression, const F& contraction, std::uint64_t seed,
                     const std::optional<PerAxis<F::Rank>>& input_size) {
  return detail::prove_dense(
      "algebra", expression, contraction,
      [&](const auto& tree, const auto& layer, const PerAxis<F::Rank>& spacing) {
        return detail::prove_algebra<F::Rank>(Form<F::Rank>(detail::form_of(tree)), layer.shape(),
                                              seed, detail::dense_size(input_size, spacing),
                                              spacing);
      });
}

template <class A, class E, class F>
  requires detail::Provable<E, F>
Report prove_rounding(const E& expression, const F& contraction,
                      const std::optional<PerAxis<F::Rank>>& input_size) {
  using Scalar = typename F::Scalar;
  static_assert(detail::provable<Scalar>, "prove real and imaginary parts as layers of their own");
  return detail::prove_dense(
      "rounding", expression, contraction,
      [&](const auto& tree, const auto& layer, const PerAxis<F::Rank>& spacing) {
        return detail::prove_rounding<detail::AccumulatorOf<A, Scalar>, Scalar, F::Rank>(
            tree, layer, detail::dense_size(input_size, spacing));
      });
}

template <class A, class E, class F>
  requires detail::Provable<E, F>
Report prove_structure(const E& expression, const F& contraction,
                       const PerAxis<F::Rank>& input_size, MemoryLimit limit,
                       const RowSample& sample) {
  using Scalar = typename F::Scalar;
  static_assert(detail::provable<Scalar>, "prove real and imaginary parts as layers of their own");
  return detail::prove_dense(
      "structure", expression, contraction,
      [&](const auto& tree, const auto& layer, const PerAxis<F::Rank>& spacing) {
        return detail::prove_structure<detail::AccumulatorOf<A, Scalar>, Scalar, F::Rank>(
            tree, layer, detail::dense_size(input_size, spacing), spacing, limit, sample);
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
            detail::in_reference<Ref>(FeatureMapView<typename Input::Scalar, Rank>(input));
        return detail::prove_outputs<Scalar, Rank>(
            tree, layer, detail::dense_map<Ref, Rank>(x, spacing), spacing,
            detail::in_reference<Ref>(FeatureMapView<Given, Rank>(outputs)),
            precision(std::type_identity<detail::AccumulatorOf<A, Scalar>>()),
            precision(std::type_identity<Given>()), by);
      });
}

template <class A, class E, class F>
  requires detail::Provable<E, F>
Verification verify(const E& expression, const F& contraction, std::uint64_t seed,
                    MemoryLimit limit, const std::optional<PerAxis<F::Rank>>& input_size) {
  const PerAxis<F::Rank> size = [&] {
    if constexpr (LinearMap<E>) {
      return smallest_input(Form(expression), input_size);
    } else {
      return smallest_input(detail::TransposedExprOf<E>(expression));
    }
  }();
  return {.algebra = prove_algebra(expression, contraction, seed, size),
          .rounding = prove_rounding<A>(expression, contraction, input_size),
          .structure = prove_structure<A>(expression, contraction, size, limit)};
}

}  // namespace concertina

#include <concertina/detail/compiled/verify.hpp>
