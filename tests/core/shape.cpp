// Shapes of layers: how they are written, what follows from them, and which are impossible.
// SPDX-License-Identifier: Apache-2.0
#include <concertina/shape.hpp>

#include "support.hpp"

#include <array>
#include <limits>

namespace concertina::test {
namespace {

using Catch::Contains;

constexpr Index most = std::numeric_limits<Index>::max();
constexpr Index least = std::numeric_limits<Index>::min();

template <int Rank>
std::string refusal(const ConvShape<Rank>& shape) {
  return message_of<ShapeError>([&] { validate(shape); });
}

TEST_CASE("one number means all axes, several mean one each", "[geometry]") {
  CHECK(PerAxis<3>(2) == PerAxis<3>{2, 2, 2});
  CHECK(PerAxis<2>(short{2}) == PerAxis<2>(2u));
  CHECK(PerAxis<2>{} == PerAxis<2>{0, 0});
  CHECK(PerAxis<2>{1, 2} == PerAxis<2>(std::array<Index, 2>{1, 2}));
  CHECK(PerAxis<2>{1, 2} != PerAxis<2>{2, 1});
  CHECK(PerAxis<0>(5) == PerAxis<0>{});

  PerAxis<3> each = {7, 8, 9};
  CHECK(each[0] == 7);
  CHECK(each[2] == 9);
  each[1] = -1;
  Index sum = 0;
  for (const Index value : each) sum = 100 * sum + value;
  CHECK(sum == 7 * 10000 - 100 + 9);
  static_assert(PerAxis<2>(3)[1] == 3);

  CHECK_THAT(message_of<ShapeError>([] { PerAxis<2>{1, 2, 3}; }),
             Contains("3 values for 2 spatial axes"));
  CHECK_THAT(message_of<ShapeError>([] { PerAxis<2>{1}; }), Contains("1 values for 2"));
  CHECK_THAT(message_of<ShapeError>([] { PerAxis<0>{1}; }), Contains("1 values for 0"));
}

TEST_CASE("a padding means both sides, unless the sides are named", "[geometry]") {
  const Padding<2> one = 1, each = {1, 2}, none;
  CHECK(one.start == PerAxis<2>{1, 1});
  CHECK(one.end == PerAxis<2>{1, 1});
  CHECK(each.start == PerAxis<2>{1, 2});
  CHECK(each.end == PerAxis<2>{1, 2});
  CHECK(none == Padding<2>(0));
  CHECK(each == Padding<2>(PerAxis<2>{1, 2}));
  const Padding<2> sides = Padding<2>::sides({0, -1}, 3);
  CHECK(sides.start == PerAxis<2>{0, -1});
  CHECK(sides.end == PerAxis<2>{3, 3});
  CHECK(sides != Padding<2>::sides(3, {0, -1}));
  CHECK_THROWS_AS((Padding<2>{1, 2, 3}), ShapeError);
}

TEST_CASE("shapes compare field by field", "[geometry]") {
  const ConvShape<1> shape{.out = 4, .in = 2, .kernel_size = 3, .padding = 1};
  std::vector<ConvShape<1>> others(8, shape);
  others[0].out = 5;
  others[1].in = 5;
  others[2].kernel_size = 5;
  others[3].stride = 5;
  others[4].padding = Padding<1>::sides(1, 5);
  others[5].dilation = 5;
  others[6].groups = 2;
  others[7].bias = true;
  CHECK(ConvShape<1>(shape) == shape);
  for (const ConvShape<1>& other : others) CHECK(other != shape);
}

TEST_CASE("a shape reads as one line, without what is trivial", "[geometry]") {
  CHECK(to_string(PerAxis<2>{3, 5}) == "3x5");
  CHECK(to_string(PerAxis<1>{2}) == "2");
  CHECK(to_string(PerAxis<0>{}).empty());
  CHECK(to_string(ConvShape<0>{.out = 10, .in = 4, .bias = true}) == "linear 4->10 +bias");
  CHECK(to_string(ConvShape<0>{.out = 2, .in = 4, .groups = 2}) == "linear 4->2 g2");
  CHECK(to_string(ConvShape<1>{.out = 2, .in = 1, .kernel_size = 3}) == "conv1d 1->2 @3");
  CHECK(to_string(ConvShape<2>{.out = 32,
                               .in = 64,
                               .kernel_size = 3,
                               .stride = 2,
                               .padding = 1,
                               .dilation = {1, 2},
                               .groups = 4,
                               .bias = true}) == "conv2d 64->32 @3x3 s2x2 p1x1 d1x2 g4 +bias");
  CHECK(to_string(ConvShape<2>{.out = 1,
                               .in = 1,
                               .kernel_size = {3, 1},
                               .padding = Padding<2>::sides({1, 0}, {0, -2})}) ==
        "conv2d 1->1 @3x1 p1x0:0x-2");
  CHECK(to_string(ConvShape<3>{.out = 1, .in = 1}) == "conv3d 1->1 @1x1x1");
}

TEST_CASE("counts multiply, or are refused", "[geometry]") {
  CHECK(numel(PerAxis<3>{2, 3, 5}) == 30);
  CHECK(numel(PerAxis<2>{4, 0}) == 0);
  CHECK(numel(PerAxis<0>{}) == 1);
  CHECK(numel(PerAxis<2>{most, 1}) == most);
  CHECK_THAT(message_of<SizeError>([] { numel(PerAxis<2>{most / 2, 3}); }),
             Contains("numel") && Contains(std::to_string(most / 2) + " * 3 overflows"));

  const ConvShape<2> shape{
      .out = 6, .in = 4, .kernel_size = {2, 3}, .dilation = {3, 2}, .groups = 2};
  CHECK(weight_numel(shape) == 6 * 2 * 6);
  CHECK(effective_kernel_size(shape, 0) == 4);  // taps 0 and 3
  CHECK(effective_kernel_size(shape, 1) == 5);
}

TEST_CASE("checked arithmetic fits or throws", "[geometry]") {
  // Extremes and their neighbours; 128 bits hold every result.
  __extension__ using Wide = __int128;
  std::vector<Index> values{0, 1, -1, 2, -2, 3, -3};
  for (const Index edge :
       {most, least, most / 2, least / 2, most / 3, least / 3, Index{1} << 31, Index{1} << 32}) {
    values.insert(values.end(),
                  {edge, edge == most ? edge : edge + 1, edge == least ? edge : edge - 1});
  }
  const auto agrees = [](Wide exact, auto&& checked) {
    try {
      const Index value = checked();
      return exact == value;
    } catch (const SizeError&) {
      return exact > most || exact < least;
    }
  };
  for (const Index a : values) {
    for (const Index b : values) {
      INFO(a << ", " << b);
      CHECK(agrees(Wide{a} * b, [&] { return detail::checked_multiply(a, b, "test"); }));
      CHECK(agrees(Wide{a} + b, [&] { return detail::checked_add(a, b, "test"); }));
    }
  }
  CHECK_THAT(message_of<SizeError>([] { detail::checked_add(most, 1, "here"); }),
             Contains("here: ") && Contains(" + 1 overflows"));
  for (Index a = -12; a <= 12; ++a) {
    for (Index b = 1; b <= 5; ++b) {
      const Index quotient = detail::floor_divide(a, b);
      CHECK(quotient * b <= a);
      CHECK(a < (quotient + 1) * b);
    }
  }
}

TEST_CASE("the output has as many positions as can be counted", "[geometry]") {
  int fits = 0, too_small = 0;
  for (Index kernel = 1; kernel <= 4; ++kernel) {
    for (Index stride = 1; stride <= 4; ++stride) {
      for (Index dilation = 1; dilation <= 3; ++dilation) {
        for (Index start = -3; start <= 3; ++start) {
          for (Index end = -3; end <= 3; ++end) {
            const ConvShape<1> shape{.out = 1,
                                     .in = 1,
                                     .kernel_size = kernel,
                                     .stride = stride,
                                     .padding = Padding<1>::sides(start, end),
                                     .dilation = dilation};
            for (Index size = 1; size <= 9; ++size) {
              // The padded map, end to end; the kernel moves over it while its last tap is on it.
              Index counted = 0;
              for (Index first = 0; first < size + start + end; first += stride) {
                Index last = first;
                for (Index tap = 1; tap < kernel; ++tap) last += dilation;
                if (last < size + start + end) ++counted;
              }
              const bool right = counted > 0
                                     ? output_size(shape, size, 0) == counted &&
                                           output_size(shape, PerAxis<1>(size))[0] == counted
                                     : output_size(shape, size, 0) <= 0;
              if (!right) FAIL_CHECK(to_string(shape) << " at " << size << " has " << counted);
              ++(counted > 0 ? fits : too_small);
            }
          }
        }
      }
    }
  }
  CHECK(fits > 5000);
  CHECK(too_small > 5000);
}

TEST_CASE("the output size of every axis is its own", "[geometry]") {
  const ConvShape<3> shape{
      .out = 1, .in = 1, .kernel_size = {3, 2, 1}, .stride = {1, 2, 3}, .padding = {1, 0, 0}};
  CHECK(output_size(shape, {5, 6, 7}) == PerAxis<3>{5, 3, 3});
  CHECK(output_size(ConvShape<0>{.out = 1, .in = 1}, PerAxis<0>{}) == PerAxis<0>{});
  static_assert(output_size(ConvShape<1>{.out = 1, .in = 1, .kernel_size = 3}, PerAxis<1>(5)) == 3);
}

TEST_CASE("an input smaller than the kernel is refused", "[geometry]") {
  const ConvShape<2> shape{.out = 1, .in = 1, .kernel_size = {3, 1}};
  CHECK_THAT(message_of<ShapeError>([&] { output_size(shape, {2, 9}); }),
             Contains("an input of size 2x9 is smaller than the kernel") && Contains("@3x1"));
  ConvShape<2> cropped{.out = 1, .in = 1, .padding = -2};
  CHECK_THROWS_AS(output_size(cropped, {4, 5}), ShapeError);
  CHECK_THROWS_AS(output_size(ConvShape<1>{.out = 1, .in = 1, .stride = 0}, 7, 0), ShapeError);
  CHECK(output_size(cropped, {5, 5}) == PerAxis<2>(1));
  // An empty map has no positions, however wide its padding.
  const ConvShape<2> padded{.out = 1, .in = 1, .padding = 4};
  CHECK_THROWS_AS(output_size(padded, {0, 4}), ShapeError);
  CHECK_THROWS_AS(output_size(padded, {4, -1}), ShapeError);

  CHECK_THROWS_AS(output_size(padded, most, 0), SizeError);
  cropped.padding = least;
  CHECK_THAT(message_of<SizeError>([&] { output_size(cropped, Index{-1}, 0); }),
             Contains("output size"));
}

TEST_CASE("impossible shapes are refused, and named", "[geometry]") {
  ConvShape<2> shape{.out = 4, .in = 6, .kernel_size = 3, .groups = 2};
  CHECK_NOTHROW(validate(shape));
  SECTION("channels") {
    const auto [out, in] = GENERATE(table<Index, Index>({{0, 6}, {4, 0}, {-2, 6}, {4, -2}}));
    shape.out = out;
    shape.in = in;
    CHECK_THAT(refusal(shape), Contains("at least one channel on each side") &&
                                   Contains(std::to_string(in) + "->" + std::to_string(out)));
  }
  SECTION("groups") {
    shape.groups = GENERATE(0, -2, 3, 4, 5);  // 3 divides the inputs alone, 4 the outputs
    CHECK_THAT(refusal(shape), Contains("groups must divide the channels on both sides") &&
                                   Contains("g" + std::to_string(shape.groups)));
  }
  SECTION("an empty kernel") {
    shape.kernel_size = {3, GENERATE(0, -1)};
    CHECK_THAT(refusal(shape),
               Contains("an empty kernel") && Contains("@" + to_string(shape.kernel_size)));
  }
  SECTION("stride") {
    shape.stride = {GENERATE(0, -1), 1};
    CHECK_THAT(refusal(shape),
               Contains("strides start at 1") && Contains("s" + to_string(shape.stride)));
  }
  SECTION("dilation") {
    shape.dilation = {1, GENERATE(0, -1)};
    CHECK_THAT(refusal(shape),
               Contains("dilations start at 1") && Contains("d" + to_string(shape.dilation)));
  }
}

TEST_CASE("a shape whose numbers cannot be counted is refused", "[geometry]") {
  ConvShape<2> shape{.out = 2, .in = 2, .kernel_size = 3};
  SECTION("channels") {
    shape.out = Index{1} << 31;
    shape.in = Index{1} << 32;
    CHECK_THAT(message_of<SizeError>([&] { validate(shape); }), Contains("weight"));
    shape.groups = Index{1} << 31;  // depthwise, it would fit
    CHECK_NOTHROW(validate(shape));
  }
  SECTION("taps") {
    shape.kernel_size = Index{1} << 32;
    CHECK_THAT(message_of<SizeError>([&] { validate(shape); }), Contains("numel"));
  }
  SECTION("channels and taps") {
    shape.kernel_size = {Index{1} << 62, 1};
    CHECK_THAT(message_of<SizeError>([&] { validate(shape); }), Contains("weight"));
  }
  SECTION("distance between the taps") {
    shape.dilation = {1, most / 2 + 1};
    CHECK_THAT(message_of<SizeError>([&] { validate(shape); }), Contains("effective kernel size"));
    shape.kernel_size = 1;
    CHECK_NOTHROW(validate(shape));
  }
}

}  // namespace
}  // namespace concertina::test
