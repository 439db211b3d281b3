// The proof by matrices, all rows or a sample of them.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/detail/verify/rounding.hpp>
#include <concertina/detail/verify/smallest_input.ipp>
#include <concertina/detail/verify/worst.ipp>
#include <concertina/random.hpp>
#include <concertina/verify.hpp>

#include <algorithm>
#include <utility>
#include <vector>

namespace concertina::detail {

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

  const Precision precision = precision_of<A>();
  Worst<Scalar> worst(report, smallest_of(precision), precision.unit);
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

}  // namespace concertina::detail
