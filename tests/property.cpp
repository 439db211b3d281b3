// Thousands of random chains over the prime field: contraction and chain agree off the border, and
// differ on it.
// SPDX-License-Identifier: Apache-2.0
#include <concertina/modular.hpp>
#include <concertina/product.hpp>

#include "support.hpp"

#include <catch2/catch.hpp>

#include <array>
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
      wide ? Largest{.channels = 12, .groups = 2, .kernel = 3, .stride = 2, .dilation = 2}
           : Largest{};
  std::vector<ConvShape<Rank>> shapes{random_shape<Rank>(rng, largest)};
  const Index count = random_index(rng, 2, 4);
  while (std::ssize(shapes) < count) {
    shapes.push_back(random_shape_after(shapes.back(), rng, largest));
  }
  return shapes;
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
  std::set<detail::PairPath> paths;
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
    tally.paths.insert(detail::pair_path(shapes[l], shapes[l - 1]));
  }
  return "";
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

TEST_CASE("10,500 random chains equal their contraction off a border that is exactly as stated",
          "[property]") {
  const std::array tallies{run<0>(1000), run<1>(5000), run<2>(3500), run<3>(1000)};
  std::set<detail::PairPath> paths;
  Index chains = 0;
  for (const Tally& tally : tallies) {
    chains += tally.chains;
    paths.insert(tally.paths.begin(), tally.paths.end());
    CHECK(tally.exact >= tally.chains / 20);
  }
  for (std::size_t rank = 1; rank < tallies.size(); ++rank) CHECK(tallies[rank].bordered >= 100);
  CHECK(chains >= 10'000);
  CHECK(paths.size() == 4);  // every algorithm was proved
}

/// At every size from 1 on, the border is within the worst; and where the worst has a border, some
/// size shows it.
TEST_CASE(
    "the worst border over all sizes is attained, and none is refused that is exact at every size",
    "[property]") {
  Rng rng(7);
  for (int n = 0; n < 1500; ++n) {
    const std::vector<ConvShape<1>> shapes = random_chain<1>(rng);
    const std::span<const ConvShape<1>> chain(shapes);
    const Exactness<1> worst = exactness<1>(chain);
    Index start = 0, end = 0;
    for (Index size = 1; size <= 250; ++size) {
      Index extent = size;
      for (const ConvShape<1>& shape : shapes) {
        if (extent > 0) extent = counted_positions(shape, extent, 0);
      }
      if (extent < 1) continue;
      const Exactness<1> here = exactness<1>(chain, size);
      start = std::max(start, here.start[0]);
      end = std::max(end, here.end[0]);
    }
    INFO(describe<1>(shapes, 250));
    REQUIRE(start == worst.start[0]);
    REQUIRE(end == worst.end[0]);
  }
}

}  // namespace concertina::test
