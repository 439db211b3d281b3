// The proof of outputs that somebody computed.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/detail/verify/rounding.hpp>
#include <concertina/detail/verify/smallest_input.ipp>
#include <concertina/detail/verify/worst.ipp>
#include <concertina/verify.hpp>

#include <algorithm>
#include <functional>
#include <optional>
#include <string>
#include <vector>

namespace concertina::detail {

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
  long double relative = 0, enlarged = 0, lost_all = 0, least = 0, unit = 0;
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
    unit = std::max(precision.unit, accumulator.unit);
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
  Worst<Scalar> worst(report, least, unit);
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

}  // namespace concertina::detail
