// Thousands of random expressions over the prime field: contraction and expression agree off the
// border, and chains differ on it.
// SPDX-License-Identifier: Apache-2.0
#include <concertina/contract.hpp>
#include <concertina/modular.hpp>
#include <concertina/verify.hpp>

#include "support.hpp"

#include <catch2/catch.hpp>

#include <array>
#include <numeric>
#include <optional>
#include <set>
#include <string>
#include <vector>

namespace concertina::test {
namespace {

template <int Rank>
std::string describe(const std::vector<ConvShape<Rank>>& shapes, const PerAxis<Rank>& size) {
  std::string text = "input " + to_string(size);
  for (const ConvShape<Rank>& shape : shapes) text += ", " + to_string(shape);
  return text;
}

/// Two to four layers with every option drawn at random. Every eighth is wide enough for matrix
/// products.
template <int Rank>
std::vector<ConvShape<Rank>> random_chain(Rng& rng) {
  const bool wide = random_index(rng, 0, 7) == 0;
  const Largest largest =
      wide ? Largest{.channels = 12, .groups = 2, .kernel_size = 3, .stride = 2, .dilation = 2}
           : Largest{};
  std::vector<ConvShape<Rank>> shapes{random_shape<Rank>(rng, largest)};
  const Index count = random_index(rng, 2, 4);
  while (std::ssize(shapes) < count) {
    shapes.push_back(random_shape_after(shapes.back(), rng, largest));
  }
  return shapes;
}

/// A branch that can stand beside `first` in a sum: the same channels, stride and output size, all
/// else drawn at random.
template <int Rank>
ConvShape<Rank> random_branch(const ConvShape<Rank>& first, Rng& rng) {
  ConvShape<Rank> branch = first;
  branch.bias = random_index(rng, 0, 1) == 1;
  Index& groups = branch.groups;
  groups = random_index(rng, 1, std::gcd(first.in, first.out));
  while (first.in % groups != 0 || first.out % groups != 0) --groups;
  for (int axis = 0; axis < Rank; ++axis) {
    branch.kernel_size[axis] = random_index(rng, 1, 3);
    branch.dilation[axis] = random_index(rng, 1, 3);
    auto& [start, end] = branch.padding;
    start[axis] = random_index(rng, -2, 2);
    end[axis] = detail::growth(first, axis) + effective_kernel_size(branch, axis) - 1 - start[axis];
  }
  return branch;
}

/// Channels of a layer changed where its groups allow it.
template <int Rank>
ConvShape<Rank> with_channels(ConvShape<Rank> shape, Index in, Index out) {
  shape.in = in;
  shape.out = out;
  shape.groups = std::gcd(shape.groups, std::gcd(in, out));
  return shape;
}

/// An expression that acts like one layer of this shape but for its numbers: that layer, or a join
/// of such expressions, nested to `depth`.
template <int Rank>
Form<Rank> random_form(const ConvShape<Rank>& like, int depth, Rng& rng) {
  const Index kind = depth == 0 ? 0 : random_index(rng, 0, 7);
  std::vector<Form<Rank>> parts;
  const Index count = random_index(rng, 2, 3);
  if (kind <= 1) return Form(like);
  if (kind == 2) {  // a chain: the layer, and 1x1 layers around it
    const Index between = random_index(rng, 1, 4);
    const bool first = random_index(rng, 0, 1) == 1;
    const ConvShape<Rank> pointwise{
        .out = between, .in = first ? like.in : like.out, .bias = random_index(rng, 0, 1) == 1};
    if (first) {
      parts.push_back(random_form(pointwise, depth - 1, rng));
      parts.push_back(random_form(with_channels(like, between, like.out), depth - 1, rng));
    } else {
      parts.push_back(random_form(with_channels(like, like.in, between), depth - 1, rng));
      parts.push_back(random_form(with_channels(pointwise, between, like.out), depth - 1, rng));
    }
    return joined(Join::chain, parts);
  }
  if (kind == 7) {  // a block of groups that are equal
    if (like.groups % 2 != 0) return Form(like);
    ConvShape<Rank> half = like;
    half.in /= 2, half.out /= 2, half.groups /= 2;
    parts.push_back(random_form(half, depth - 1, rng));
    parts.push_back(random_form(half, depth - 1, rng));
    return joined(Join::direct_sum, parts);
  }
  const Join join = kind <= 4 ? Join::sum : kind == 5 ? Join::concat_outputs : Join::concat_inputs;
  const Index channels = join == Join::concat_inputs ? like.in : like.out;
  Index used = 0;
  for (Index n = 0; n < count; ++n) {
    ConvShape<Rank> branch = random_branch(like, rng);
    if (join != Join::sum) {
      const Index width = n + 1 == count ? channels - used : random_index(rng, 1, channels);
      if (width < 1 || used + width > channels) break;
      used += width;
      branch = join == Join::concat_inputs ? with_channels(branch, width, like.out)
                                           : with_channels(branch, like.in, width);
    }
    parts.push_back(random_form(branch, depth - 1, rng));
  }
  if (join != Join::sum && used < channels) return Form(like);
  return joined(join, parts);
}

/// One to three of them one after another.
template <int Rank>
Form<Rank> random_form(Rng& rng) {
  std::vector<Form<Rank>> parts;
  ConvShape<Rank> shape = random_shape<Rank>(rng, {.stride = 2, .padding = 1});
  const Index count = random_index(rng, 1, 3);
  for (Index n = 0; n < count; ++n) {
    if (n > 0) shape = random_shape_after(shape, rng, {.stride = 2, .padding = 1});
    parts.push_back(random_form(shape, 2, rng));
  }
  return joined(Join::chain, parts);
}

/// The smallest size that every layer takes, and up to three more; none below 40.
template <int Rank>
std::optional<PerAxis<Rank>> random_size(const std::vector<ConvShape<Rank>>& shapes, Rng& rng) {
  PerAxis<Rank> size;
  for (int axis = 0; axis < Rank; ++axis) {
    const auto fits = [&](Index extent) {
      for (const ConvShape<Rank>& shape : shapes) {
        extent = counted_positions(shape, extent, axis);
        if (extent < 1) return false;
      }
      return true;
    };
    Index extent = 1;
    while (extent < 40 && !fits(extent)) ++extent;
    if (extent == 40) return std::nullopt;
    size[axis] = extent + random_index(rng, 0, 3);
  }
  return size;
}

struct Tally {
  Index chains = 0, exact = 0, bordered = 0;
  std::set<detail::Algorithm> algorithms;
};

/// Checks one chain at one size; an empty string, or what is wrong.
template <int Rank>
std::string check(const std::vector<ConvShape<Rank>>& shapes, const PerAxis<Rank>& size, Rng& rng,
                  Tally& tally) {
  std::vector<Conv<PrimeField, Rank>> layers;
  for (const ConvShape<Rank>& shape : shapes) {
    Conv<PrimeField, Rank>& layer = layers.emplace_back(shape);
    fill_random(layer.weight(), rng);
    fill_random(layer.bias(), rng);
  }
  FeatureMap<PrimeField, Rank> x({.channels = shapes.front().in, .size = size});
  fill_random(x.values(), rng);

  const Conv<PrimeField, Rank> product = contract(layers, interior_only);
  const FeatureMap<PrimeField, Rank> whole = product(x);
  FeatureMap<PrimeField, Rank> y = x;
  for (const auto& layer : layers) y = layer(y);
  if (whole.shape() != y.shape()) return "the output's size is wrong";

  const Exactness<Rank> here = exactness(layers, size), everywhere = exactness(layers);
  PerAxis<Rank> deepest_start = 0,
                deepest_end = 0;  // differing outputs' depth within the stated border
  bool outside = false;
  std::size_t at = 0;
  for (Index channel = 0; channel < y.shape().channels; ++channel) {
    detail::for_each_position(y.shape().size, [&](const PerAxis<Rank>& position) {
      const bool differs = !(whole.values()[at] == y.values()[at]);
      ++at;
      if (!differs) return;
      bool covered = false;
      for (int axis = 0; axis < Rank; ++axis) {
        const Index from_start = position[axis] + 1,
                    from_end = y.shape().size[axis] - position[axis];
        if (from_start <= here.start[axis]) {
          covered = true;
          deepest_start[axis] = std::max(deepest_start[axis], from_start);
        }
        if (from_end <= here.end[axis]) {
          covered = true;
          deepest_end[axis] = std::max(deepest_end[axis], from_end);
        }
      }
      outside = outside || !covered;
    });
  }
  if (outside) return "differs off the stated border";
  if (deepest_start != here.start || deepest_end != here.end) {
    return "the border is stated wider than it is: " + to_string(here.start) + ", " +
           to_string(here.end) + " but found " + to_string(deepest_start) + ", " +
           to_string(deepest_end);
  }
  for (int axis = 0; axis < Rank; ++axis) {
    if (here.start[axis] > everywhere.start[axis] || here.end[axis] > everywhere.end[axis]) {
      return "the border at this size is wider than the worst over all sizes";
    }
  }
  if (here.exact() != here.reason.empty()) return "a reason without a border, or none with one";
  bool refused = false;
  try {
    static_cast<void>(contract(layers));
  } catch (const InexactError&) {
    refused = true;
  }
  if (refused == everywhere.exact()) return "refused although exact, or not although inexact";

  ++tally.chains;
  ++(here ? tally.exact : tally.bordered);
  for (std::size_t l = 1; l < shapes.size(); ++l) {
    tally.algorithms.insert(detail::algorithm_for(shapes[l], shapes[l - 1]));
  }
  return "";
}

/// Random numbers in an expression's layers.
template <int Rank>
Expr<PrimeField, Rank> random_expression(const Form<Rank>& form, Rng& rng) {
  using Leaf = detail::Leaf<PrimeField, Rank>;
  return Expr<PrimeField, Rank>(form.tree().map([&](const detail::AnyShape& shape) {
    Conv<PrimeField, Rank> layer(shape.as<Rank>());
    fill_random(layer.weight(), rng);
    fill_random(layer.bias(), rng);
    return Leaf(std::move(layer));
  }));
}

struct MixedTally {
  Index expressions = 0, exact = 0, joins[6] = {};
};

template <class Leaf>
void count_joins(const detail::Tree<Leaf>& tree, MixedTally& tally) {
  ++tally.joins[static_cast<int>(tree.join())];
  for (const auto& part : tree.parts()) count_joins(part, tally);
}

template <class Leaf>
bool concatenates(const detail::Tree<Leaf>& tree) {
  return detail::splits_outputs(tree.join()) || detail::splits_inputs(tree.join()) ||
         std::ranges::any_of(tree.parts(), [](const auto& part) { return concatenates(part); });
}

/// Checks one expression at one size; an empty string, or what is wrong.
template <int Rank>
std::string check(const Form<Rank>& form, const PerAxis<Rank>& size, Rng& rng, MixedTally& tally) {
  const Expr<PrimeField, Rank> expression = random_expression(form, rng);
  const ConvShape<Rank> shape = form.shape();
  const Conv<PrimeField, Rank> whole = contract(expression, interior_only);
  if (whole.shape() != shape) return "the contraction has another shape than was said";
  FeatureMap<PrimeField, Rank> x({.channels = shape.in, .size = size});
  fill_random(x.values(), rng);
  const FeatureMap<PrimeField, Rank> y = expression(x), z = whole(x);
  if (y.shape() != z.shape()) return "the output's size is wrong";
  if (form.output_size(size) != y.shape().size) return "output_size is wrong";
  const Exactness<Rank> here = exactness(form, size), everywhere = exactness(form);
  if (everywhere.exact() && !here.exact()) return "exact everywhere, but not here";
  if (here.exact() != here.reason.empty()) return "a reason without a border, or none with one";
  std::string wrong;
  std::size_t at = 0;
  bool differs = false;
  for (Index map = 0; map < y.shape().channels; ++map) {
    detail::for_each_position(y.shape().size, [&](const PerAxis<Rank>& position) {
      const bool same = y.values()[at] == z.values()[at];
      ++at;
      differs = differs || !same;
      if (!same && detail::off_border(position, y.shape().size, here)) {
        wrong = "differs off the stated border";
      }
    });
  }
  // Concatenated channels are not told apart, so there a border may be stated too wide.
  if (!here.exact() && !differs && !concatenates(form.tree())) {
    return "a border is stated where nothing differs";
  }
  bool refused = false;
  try {
    static_cast<void>(contract(expression));
  } catch (const InexactError&) {
    refused = true;
  }
  if (refused == everywhere.exact()) return "refused although exact, or not although inexact";
  ++tally.expressions;
  if (here) ++tally.exact;
  count_joins(form.tree(), tally);
  return wrong;
}

template <int Rank>
MixedTally run_mixed(Index expressions) {
  Rng rng(static_cast<std::uint64_t>(4040 + Rank));
  MixedTally tally;
  while (tally.expressions < expressions) {
    const Form<Rank> form = random_form<Rank>(rng);
    PerAxis<Rank> size;
    try {
      size = smallest_input(form);
    } catch (const SizeError&) {
      continue;  // no input shows every tap
    }
    for (int axis = 0; axis < Rank; ++axis) size[axis] += random_index(rng, 0, 2);
    // A few of rank 3 would take as long as all others.
    const double multiply_adds = static_cast<double>(weight_numel(form.shape())) *
                                 static_cast<double>(numel(form.output_size(size)));
    if (multiply_adds > 4e6) continue;
    const std::string wrong = check(form, size, rng, tally);
    if (!wrong.empty())
      FAIL(wrong << " (input " << to_string(size) << ", " << to_string(form) << ")");
  }
  return tally;
}

template <int Rank>
Tally run(Index chains) {
  Rng rng(static_cast<std::uint64_t>(2020 + Rank));
  Tally tally;
  while (tally.chains < chains) {
    const std::vector<ConvShape<Rank>> shapes = random_chain<Rank>(rng);
    const std::optional<PerAxis<Rank>> size = random_size(shapes, rng);
    if (!size) continue;
    const std::string wrong = check(shapes, *size, rng, tally);
    if (!wrong.empty()) FAIL(wrong << " (" << describe(shapes, *size) << ")");
  }
  return tally;
}

}  // namespace

/// How many times as many of the 10,500 chains and 10,000 expressions below: 10^6 in all in the
/// nightly preset.
#ifdef CONCERTINA_NIGHTLY
constexpr int times = 50;
#else
constexpr int times = 1;
#endif

TEMPLATE_TEST_CASE_SIG(
    "random chains equal their contraction off a border that is exactly as stated", "[property]",
    ((int Rank), Rank), 0, 1, 2, 3) {
  constexpr std::array<Index, 4> chains{1000, 5000, 3500, 1000};
  const Tally tally = run<Rank>(times * chains[Rank]);
  CHECK(tally.exact >= tally.chains / 20);
  CHECK(tally.bordered >= (Rank == 0 ? 0 : 100));
  // At rank 0 the outer layer is pointwise, so neither the inner alone nor none of them.
  CHECK(tally.algorithms.size() == (Rank == 0 ? 4 : 6));
}

TEMPLATE_TEST_CASE_SIG(
    "random expressions of sums, products and concatenations equal their contraction", "[property]",
    ((int Rank), Rank), 0, 1, 2, 3) {
  constexpr std::array<Index, 4> expressions{1000, 5000, 3500, 500};
  const MixedTally tally = run_mixed<Rank>(times * expressions[Rank]);
  CHECK(tally.exact >= tally.expressions / 4);
  CHECK(tally.expressions - tally.exact >= (Rank == 0 ? 0 : 50));
  for (const Index joins : tally.joins) CHECK(joins >= tally.expressions / 20);
}

/// At every size from 1 on, the border is within the worst; and where the worst has a border, some
/// size shows it.
TEST_CASE(
    "the worst border over all sizes is attained, and none is refused that is exact at every size",
    "[property]") {
  Rng rng(7);
  for (int n = 0; n < 1500; ++n) {
    const std::vector<ConvShape<1>> shapes = random_chain<1>(rng);
    const Form<1> chain(shapes);
    const Exactness<1> worst = exactness(chain);
    Index start = 0, end = 0;
    for (Index size = 1; size <= 250; ++size) {
      Index extent = size;
      for (const ConvShape<1>& shape : shapes) {
        if (extent > 0) extent = counted_positions(shape, extent, 0);
      }
      if (extent < 1) continue;
      const Exactness<1> here = exactness(chain, PerAxis<1>(size));
      start = std::max(start, here.start[0]);
      end = std::max(end, here.end[0]);
    }
    INFO(describe<1>(shapes, 250));
    REQUIRE(start == worst.start[0]);
    REQUIRE(end == worst.end[0]);
  }
}

}  // namespace concertina::test
