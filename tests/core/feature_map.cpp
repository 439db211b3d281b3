// Batches of feature maps: their lengths, their owner and their view.
// SPDX-License-Identifier: Apache-2.0
#include <concertina/feature_map.hpp>

#include "support.hpp"

#include <concepts>
#include <limits>

namespace concertina::test {
namespace {

using Catch::Contains;

TEST_CASE("a batch has batch * channels * size numbers", "[feature_map]") {
  CHECK(numel(MapShape<2>{.batch = 2, .channels = 3, .size = {4, 5}}) == 120);
  CHECK(numel(MapShape<0>{.batch = 2, .channels = 3}) == 6);
  CHECK(numel(MapShape<3>{.size = {2, 3, 4}}) == 24);
  CHECK(numel(MapShape<1>{.batch = 0, .channels = 3, .size = 4}) == 0);
  CHECK(numel(MapShape<1>{.batch = 2, .channels = 3, .size = 0}) == 0);

  CHECK_THAT(message_of<ShapeError>([] { numel(MapShape<1>{.batch = -1}); }),
             Contains("negative size"));
  CHECK_THROWS_AS(numel(MapShape<1>{.channels = -1}), ShapeError);
  CHECK_THROWS_AS(numel(MapShape<1>{.batch = -1, .channels = -1}), ShapeError);
  CHECK_THROWS_AS(numel(MapShape<2>{.size = {-2, -3}}), ShapeError);

  constexpr Index most = std::numeric_limits<Index>::max();
  CHECK_THAT(message_of<SizeError>([] { numel(MapShape<1>{.batch = most, .channels = 2}); }),
             Contains("feature map") && Contains("overflows"));
  CHECK_THROWS_AS(numel(MapShape<1>{.channels = 2, .size = most}), SizeError);
  CHECK_THROWS_AS(numel(MapShape<2>{.size = Index{1} << 32}), SizeError);
}

TEST_CASE("a map starts as zeros, or with the numbers given", "[feature_map]") {
  const FeatureMap<float, 1> zeros({.batch = 2, .channels = 1, .size = 3});
  CHECK(zeros.values().size() == 6);
  CHECK(std::ranges::count(zeros.values(), 0.f) == 6);
  CHECK(zeros.shape() == MapShape<1>{.batch = 2, .channels = 1, .size = 3});

  std::vector<float> numbers{1, 2, 3, 4, 5, 6};
  const float* const memory = numbers.data();
  FeatureMap<float, 1> map({.batch = 2, .channels = 1, .size = 3}, std::move(numbers));
  CHECK(map.values().data() == memory);
  CHECK(map != zeros);
  map.values()[4] = 7;
  CHECK(std::as_const(map).values()[4] == 7);

  // The same numbers in another shape are another map.
  const std::vector<int> six{1, 2, 3, 4, 5, 6};
  CHECK(FeatureMap<int, 1>({.channels = 2, .size = 3}, six) ==
        FeatureMap<int, 1>({.channels = 2, .size = 3}, six));
  CHECK(FeatureMap<int, 1>({.channels = 2, .size = 3}, six) !=
        FeatureMap<int, 1>({.channels = 3, .size = 2}, six));
  CHECK(FeatureMap<int, 2>().values().empty());
  CHECK(numel(FeatureMap<int, 2>().shape()) == 0);
}

TEST_CASE("numbers that do not fill the shape are refused", "[feature_map]") {
  const MapShape<2> shape{.batch = 1, .channels = 2, .size = {2, 3}};
  CHECK_THAT(message_of<ShapeError>([&] { FeatureMap<int, 2>(shape, std::vector<int>(11)); }),
             Contains("FeatureMap: 11 values for a shape of 12"));
  CHECK_THROWS_AS((FeatureMap<int, 2>(shape, std::vector<int>(13))), ShapeError);
  CHECK_THROWS_AS((FeatureMap<int, 2>({.batch = -1})), ShapeError);
  CHECK_THROWS_AS((FeatureMap<int, 2>({.size = Index{1} << 32})), SizeError);

  const std::vector<int> numbers(13);
  CHECK_THAT(message_of<ShapeError>([&] { FeatureMapView<const int, 2>(shape, numbers); }),
             Contains("FeatureMapView: 13 values for a shape of 12"));
  CHECK_THROWS_AS((FeatureMapView<const int, 2>({.channels = -13, .size = -1}, numbers)),
                  ShapeError);
}

TEST_CASE("a view shows somebody else's memory", "[feature_map]") {
  std::vector<int> numbers{1, 2, 3, 4, 5, 6};
  const FeatureMapView<const int, 1> view({.channels = 2, .size = 3}, numbers);
  CHECK(view.values().data() == numbers.data());
  numbers[5] = 9;
  CHECK(view.values()[5] == 9);

  const FeatureMap<int, 1> owner({.channels = 2, .size = 3}, numbers);
  const auto first = [](FeatureMapView<const int, 1> of_owner) { return of_owner.values().data(); };
  CHECK(first(owner) == owner.values().data());
  CHECK(FeatureMapView<const int, 1>(owner).shape() == owner.shape());

  static_assert(std::convertible_to<FeatureMap<int, 1>, FeatureMapView<const int, 1>>);
  static_assert(!std::convertible_to<FeatureMap<int, 1>, FeatureMapView<const float, 1>>);
  static_assert(!std::convertible_to<FeatureMap<int, 1>, FeatureMapView<const int, 2>>);
}

TEST_CASE("a view writes where its element is not const", "[feature_map]") {
  FeatureMap<int, 1> owner({.channels = 2, .size = 3});
  const FeatureMapView<int, 1> view = owner;
  view.values()[4] = 7;
  CHECK(owner.values()[4] == 7);
  const FeatureMapView<const int, 1> reading = view;
  CHECK(reading.values().data() == owner.values().data());

  static_assert(!std::convertible_to<const FeatureMap<int, 1>&, FeatureMapView<int, 1>>);
  static_assert(!std::convertible_to<FeatureMap<int, 1>, FeatureMapView<int, 1>>);
  static_assert(!std::convertible_to<FeatureMapView<const int, 1>, FeatureMapView<int, 1>>);
}

}  // namespace
}  // namespace concertina::test
