// A single layer: applied, compared as a map, scaled, converted and viewed, over numbers of many
// kinds.
// SPDX-License-Identifier: Apache-2.0
#include <concertina/conv.hpp>

#include <concertina/contract.hpp>
#include <concertina/modular.hpp>

#include "support.hpp"

#include <array>
#include <thread>
#include <type_traits>

namespace concertina::test {
namespace {

using Catch::Contains;

/// The layer applied by plain loops over three axes, of which the last Rank are its own.
template <class Scalar, int Rank>
FeatureMap<Scalar, Rank> applied_in_loops(const Conv<Scalar, Rank>& layer,
                                          const FeatureMap<Scalar, Rank>& x) {
  struct Axis {
    Index kernel = 1, stride = 1, dilation = 1, start = 0, size = 1, positions = 1;
  };
  std::array<Axis, 3> axes;
  PerAxis<Rank> positions;
  for (int axis = 0; axis < Rank; ++axis) {
    const ConvShape<Rank>& shape = layer.shape();
    positions[axis] = counted_positions(layer.shape(), x.shape().size[axis], axis);
    axes[static_cast<std::size_t>(3 - Rank + axis)] = {
        shape.kernel_size[axis],   shape.stride[axis],   shape.dilation[axis],
        shape.padding.start[axis], x.shape().size[axis], positions[axis]};
  }
  const auto& [p, q, r] = axes;
  const Index in = layer.shape().in, out = layer.shape().out, groups = layer.shape().groups;
  std::vector<Scalar> numbers;
  for (Index n = 0; n < x.shape().batch; ++n) {
    for (Index o = 0; o < out; ++o) {
      for (Index j0 = 0; j0 < p.positions; ++j0) {
        for (Index j1 = 0; j1 < q.positions; ++j1) {
          for (Index j2 = 0; j2 < r.positions; ++j2) {
            Scalar sum(0);
            for (Index c = 0; c < in; ++c) {
              if (c * groups / in != o * groups / out) continue;
              const Index row = o * (in / groups) + c % (in / groups);
              for (Index i0 = 0; i0 < p.size; ++i0) {
                for (Index i1 = 0; i1 < q.size; ++i1) {
                  for (Index i2 = 0; i2 < r.size; ++i2) {
                    // Which tap sees input i from output j, if any does.
                    const auto tap = [](const Axis& axis, Index j, Index i) -> Index {
                      for (Index a = 0; a < axis.kernel; ++a) {
                        if (i + axis.start == j * axis.stride + a * axis.dilation) return a;
                      }
                      return -1;
                    };
                    const Index a0 = tap(p, j0, i0), a1 = tap(q, j1, i1), a2 = tap(r, j2, i2);
                    if (a0 < 0 || a1 < 0 || a2 < 0) continue;
                    const Index at = ((row * p.kernel + a0) * q.kernel + a1) * r.kernel + a2;
                    const Index from = (((n * in + c) * p.size + i0) * q.size + i1) * r.size + i2;
                    sum = sum + layer.weight()[static_cast<std::size_t>(at)] *
                                    x.values()[static_cast<std::size_t>(from)];
                  }
                }
              }
            }
            if (layer.shape().bias) sum = sum + layer.bias()[static_cast<std::size_t>(o)];
            numbers.push_back(sum);
          }
        }
      }
    }
  }
  return {{.batch = x.shape().batch, .channels = out, .size = positions}, numbers};
}

template <class Scalar, int Rank>
void check_application(const ConvShape<Rank>& shape, Rng& rng) {
  INFO(to_string(shape));
  const auto layer = small_integers<Scalar>(shape, rng);
  const auto x = small_integers<Scalar, Rank>(
      {.batch = 2, .channels = shape.in, .size = random_input_size(shape, rng, 3)}, rng);
  CHECK(layer(x) == applied_in_loops(layer, x));
  CHECK(ConvView<const Scalar, Rank>(layer)(x) == layer(x));
}

/// a + b i for integers a and b, with no more operations than a ring has.
struct Gaussian {
  Gaussian(int real = 0) : re(real) {}
  Gaussian(int real, int imaginary) : re(real), im(imaginary) {}
  friend Gaussian operator+(Gaussian a, Gaussian b) { return {a.re + b.re, a.im + b.im}; }
  friend Gaussian operator*(Gaussian a, Gaussian b) {
    return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
  }
  Gaussian& operator+=(Gaussian b) { return *this = *this + b; }
  friend bool operator==(Gaussian, Gaussian) = default;

  int re, im = 0;
};

template <int Rank>
Conv<Gaussian, Rank> gaussian(const ConvShape<Rank>& shape, Rng& rng) {
  Conv<Gaussian, Rank> layer(shape);
  const auto fill = [&](std::span<Gaussian> numbers) {
    for (Gaussian& number : numbers) {
      number = {static_cast<int>(random_index(rng, -4, 4)),
                static_cast<int>(random_index(rng, -4, 4))};
    }
  };
  fill(layer.weight());
  fill(layer.bias());
  return layer;
}

TEST_CASE("a kernel and its output, by hand", "[conv]") {
  const Conv2d<int> layer({.out = 1, .in = 1, .kernel_size = 2}, {1, 2, 3, 4}, {10});
  CHECK(layer.shape().bias);
  const FeatureMap<int, 2> x({.size = {2, 3}}, {1, 0, 2, 0, 1, 0});
  CHECK(layer(x) == FeatureMap<int, 2>({.size = {1, 2}}, {10 + 1 + 4, 10 + 4 + 3}));
  const Linear<int> linear({.out = 2, .in = 3}, {1, 2, 3, 4, 5, 6}, {7, 8});
  CHECK(linear({{.channels = 3}, std::array{1, 0, -1}}) ==
        FeatureMap<int, 0>({.channels = 2}, {7 - 2, 8 - 2}));
}

TEMPLATE_TEST_CASE_SIG("a layer does what its definition says", "[conv]", ((int Rank), Rank), 0, 1,
                       2, 3) {
  Rng rng(1);
  for (const ConvShape<Rank>& shape : all_shapes<Rank>(rng, Rank == 3 ? 30 : 100)) {
    check_application<float>(shape, rng);
  }
  for (const Index multiplier : {1, 2, 3}) {  // depthwise
    ConvShape<Rank> shape{.out = 3 * multiplier, .in = 3, .kernel_size = 2, .groups = 3};
    check_application<float>(shape, rng);
    shape.bias = true;
    check_application<float>(shape, rng);
  }
}

TEMPLATE_TEST_CASE("a layer of any numbers", "[conv]", double, std::int64_t, PrimeField,
                   long double, Eigen::half) {
  Rng rng(2);
  for (const ConvShape<2>& shape : all_shapes<2>(rng, 10)) check_application<TestType>(shape, rng);
}

TEST_CASE("a batch of none, and a batch is its maps", "[conv]") {
  Rng rng(3);
  const auto layer =
      small_integers<float, 1>({.out = 2, .in = 1, .kernel_size = 2, .bias = true}, rng);
  CHECK(layer(FeatureMap<float, 1>({.batch = 0, .channels = 1, .size = 4})) ==
        FeatureMap<float, 1>({.batch = 0, .channels = 2, .size = 3}));
  const auto both = small_integers<float, 1>({.batch = 2, .size = 4}, rng);
  const auto whole = layer(both);
  for (const std::size_t n : {0u, 1u}) {
    const auto one = layer({{.size = 4}, both.values().subspan(n * 4, 4)});
    CHECK(std::ranges::equal(one.values(), whole.values().subspan(n * 6, 6)));
  }
}

TEST_CASE("a map that does not fit is refused", "[conv]") {
  const Conv2d<float> layer({.out = 2, .in = 3, .kernel_size = 3});
  CHECK_THAT(
      message_of<ShapeError>([&] { layer(FeatureMap<float, 2>({.channels = 2, .size = 5})); }),
      Contains("a map of 2 channels, where the layer reads 3 (conv2d 3->2 @3x3)"));
  CHECK_THAT(
      message_of<ShapeError>([&] { layer(FeatureMap<float, 2>({.channels = 3, .size = {5, 2}})); }),
      Contains("size 5x2 is smaller than the kernel (conv2d 3->2 @3x3)"));
}

TEST_CASE("a layer starts as zeros, or takes vectors over", "[conv]") {
  const Conv1d<float> zeros({.out = 4, .in = 6, .kernel_size = 3, .groups = 2, .bias = true});
  CHECK(zeros.weight().size() == 4 * 3 * 3);
  CHECK(zeros.bias().size() == 4);
  CHECK(std::ranges::count(zeros.weight(), 0.f) == 36);
  CHECK(std::ranges::count(zeros.bias(), 0.f) == 4);
  CHECK(Conv1d<float>({.out = 4, .in = 6}).bias().empty());

  std::vector<float> weight(36, 1), bias{1, 2, 3, 4};
  const float *weight_at = weight.data(), *bias_at = bias.data();
  ConvShape<1> unbiased = zeros.shape();
  unbiased.bias = false;
  Conv1d<float> layer(unbiased, std::move(weight), std::move(bias));
  CHECK(layer.weight().data() == weight_at);
  CHECK(layer.bias().data() == bias_at);
  CHECK(layer.shape() == zeros.shape());  // the bias itself says that there is one
  CHECK(layer.shape().groups == 2);
  layer.weight()[35] = 9;
  layer.bias()[0] = 8;
  CHECK(std::as_const(layer).weight()[35] == 9);
  CHECK(std::as_const(layer).bias()[0] == 8);
}

TEST_CASE("a view shows foreign memory without a copy", "[conv]") {
  std::vector<float> weight{1, 2, 3, 4}, bias{5, 6};
  const ConvView<const float, 1> view({.out = 2, .in = 1, .kernel_size = 2, .bias = true}, weight,
                                      bias);
  CHECK(view.weight().data() == weight.data());
  CHECK(view.bias().data() == bias.data());
  CHECK(ConvView<const float, 1>({.out = 2, .in = 1, .kernel_size = 2}, weight, bias).shape() ==
        view.shape());
  CHECK(ConvView<const float, 1>({.out = 2, .in = 1, .kernel_size = 2}, weight).bias().empty());
  weight[3] = 7;
  CHECK(view({{.size = 2}, std::array{0.f, 1.f}}).values()[1] == 7 + 6);

  const Conv1d<float> copy(view);
  CHECK(copy.weight().data() != weight.data());
  CHECK(copy == view);
  weight[3] = 8;
  CHECK(copy != view);
  const ConvView<const float, 1> of_owner = copy;
  CHECK(of_owner.weight().data() == copy.weight().data());
  CHECK(of_owner.bias().data() == copy.bias().data());
  CHECK(of_owner.shape() == copy.shape());
}

TEST_CASE("a view of elements that may change writes through", "[conv]") {
  static_assert(Layer<ConvView<int, 2>> && Layer<ConvView<const int, 2>> && Layer<Conv2d<int>>);
  static_assert(std::is_same_v<ConvView<int, 2>::Scalar, int> &&
                std::is_same_v<ConvView<const int, 2>::Scalar, int>);
  using Writes = ConvView<int, 2>;
  using Reads = ConvView<const int, 2>;
  static_assert(
      std::is_convertible_v<Conv2d<int>&, Writes> && std::is_convertible_v<Conv2d<int>&, Reads> &&
      std::is_convertible_v<const Conv2d<int>&, Reads> && std::is_convertible_v<Writes, Reads>);
  static_assert(!std::is_constructible_v<Writes, const Conv2d<int>&> &&
                !std::is_constructible_v<Writes, Reads> &&
                !std::is_constructible_v<Writes, Conv2d<int>> &&
                !std::is_constructible_v<Reads, Conv2d<int>>);
  static_assert(!std::is_constructible_v<Writes, ConvShape<2>, std::span<const int>>);
  static_assert(std::is_same_v<decltype(std::declval<const Writes&>().weight()), std::span<int>> &&
                std::is_same_v<decltype(std::declval<Reads&>().weight()), std::span<const int>>);

  Rng rng(9);
  Conv2d<int> layer =
      small_integers<int, 2>({.out = 2, .in = 3, .kernel_size = 2, .bias = true}, rng);
  const Conv2d<int> before = layer;
  const auto x = small_integers<int, 2>({.channels = 3, .size = 4}, rng);
  const Writes view = layer;
  const Reads reads = view, direct = layer;
  CHECK(view(x) == before(x));
  CHECK(view.shape() == layer.shape());
  CHECK(view == before);
  CHECK(before == view);
  CHECK(reads == view);
  view.weight()[23] += 5;
  view.bias()[1] = 9;
  CHECK(layer.weight()[23] == before.weight()[23] + 5);
  CHECK(layer.bias()[1] == 9);
  CHECK(reads.weight()[23] == layer.weight()[23]);
  CHECK(direct.bias().data() == layer.bias().data());
  CHECK(view != before);
  CHECK(view(x) == layer(x));
  CHECK(view.cast<double>() == layer.cast<double>());
  CHECK(Conv2d<int>(view) == layer);
  CHECK(3 * view == 3 * layer);
  CHECK(-view == -layer);

  // Of memory that is no layer's.
  std::vector<int> weight{1, 2, 3, 4}, bias{5, 6};
  const ConvShape<1> shape{.out = 2, .in = 1, .kernel_size = 2};
  const ConvView<int, 1> foreign(shape, weight, bias);
  const ConvView<int, 1> unbiased(shape, weight);
  unbiased.weight()[0] = 10;
  foreign.bias()[0] = 50;
  CHECK(weight == std::vector{10, 2, 3, 4});
  CHECK(bias == std::vector{50, 6});
  CHECK_THROWS_AS((ConvView<int, 1>(shape, std::span(weight).first(3))), ShapeError);

  // It stands in expressions and lists as a reading one does.
  Conv2d<int> after = small_integers<int, 2>({.out = 2, .in = 2}, rng);
  const Conv2d<int> product = after * layer;
  const Writes view_after = after;
  CHECK(view_after * view == product);
  CHECK(view_after * layer == product);
  CHECK(after * view == product);
  CHECK(view + view == 2 * layer);
  CHECK(view - reads == 0 * layer);
  CHECK(contract(std::vector{view, view_after}) == product);
  CHECK(contract(view) == layer);
}

TEST_CASE("elements that do not fill the shape are refused", "[conv]") {
  const ConvShape<2> shape{.out = 2, .in = 3, .kernel_size = {1, 2}};
  const auto refuses = [](const ConvShape<2>& of, std::size_t weights, std::size_t biases,
                          const std::string& why) {
    const std::vector<int> weight(weights), bias(biases);
    CHECK_THAT(message_of<ShapeError>([&] { ConvView<const int, 2>(of, weight, bias); }),
               Contains(why));
    CHECK_THAT(message_of<ShapeError>([&] { Conv2d<int>(of, weight, bias); }), Contains(why));
  };
  ConvShape<2> biased = shape, grouped = shape, huge = shape;
  biased.bias = true;
  grouped.groups = 2;
  huge.kernel_size = Index{1} << 32;
  refuses(shape, 11, 0, "weight has 11 elements instead of 12 (conv2d 3->2 @1x2)");
  refuses(shape, 13, 0, "weight has 13 elements instead of 12");
  refuses(shape, 0, 0, "weight has 0 elements");
  refuses(shape, 12, 3, "bias has 3 elements instead of 2 (conv2d 3->2 @1x2 +bias)");
  refuses(biased, 12, 1, "bias has 1 elements instead of 2");
  refuses(biased, 12, 0, "the shape has a bias, but none was given (conv2d 3->2 @1x2 +bias)");
  refuses(grouped, 12, 0, "groups must divide the channels");
  refuses({.out = 2, .in = 3, .kernel_size = 0}, 0, 0, "an empty kernel");
  refuses({}, 0, 0, "at least one channel");
  CHECK_THROWS_AS((Conv2d<int>(grouped)), ShapeError);
  CHECK_THROWS_AS((Conv2d<int>(huge)), SizeError);
  CHECK_THROWS_AS((Conv2d<int>(huge, {1})), SizeError);
}

TEST_CASE("a layer scaled, and its negative", "[conv]") {
  Rng rng(4);
  for (const ConvShape<2>& shape : all_shapes<2>(rng, 20)) {
    const auto layer = small_integers<int>(shape, rng);
    const auto x =
        small_integers<int, 2>({.channels = shape.in, .size = random_input_size(shape, rng)}, rng);
    const auto y = layer(x), scaled = (3 * layer)(x), negative = (-layer)(x);
    CHECK((3 * layer).shape() == shape);
    for (std::size_t n = 0; n < y.values().size(); ++n) {
      CHECK(scaled.values()[n] == 3 * y.values()[n]);
      CHECK(negative.values()[n] == -y.values()[n]);
    }
    CHECK(-(-layer) == layer);
    CHECK(0 * layer == Conv2d<int>(shape));
  }
}

TEST_CASE("numbers are converted one by one, and rounded once", "[conv]") {
  const Linear<double> layer({.out = 2, .in = 2}, {1, -0.1, 1e-300, 1 + 0x1p-30}, {0x1p-149, 3});
  const auto narrow = layer.cast<float>();
  static_assert(std::is_same_v<decltype(narrow), const Linear<float>>);
  CHECK(narrow == Linear<float>({.out = 2, .in = 2}, {1, -0.1f, 0, 1}, {0x1p-149f, 3}));
  CHECK(ConvView<const double, 0>(layer).cast<float>() == narrow);
  CHECK(narrow.cast<double>().cast<float>() == narrow);
  CHECK(layer.cast<long double>().cast<double>() == layer);
  CHECK(layer.cast<int>() == Linear<int>({.out = 2, .in = 2}, {1, 0, 0, 1}, {0, 3}));

  const ConvShape<1> shape{.out = 2, .in = 4, .kernel_size = 3, .stride = 2, .groups = 2};
  Rng rng(5);
  const auto whole = small_integers<std::int64_t>(shape, rng);
  CHECK(whole.cast<float>().shape() == shape);
  const auto residues = whole.cast<PrimeField>();
  for (std::size_t n = 0; n < whole.weight().size(); ++n) {
    CHECK(residues.weight()[n] + PrimeField(-whole.weight()[n]) == PrimeField(0));
  }
  const auto half =
      Linear<float>({.out = 1, .in = 3}, {0.1f, 65504, 1 + 0x1p-11f}).cast<Eigen::half>();
  // The neighbours of 0.1 are 0x1.998p-4 and 0x1.99cp-4; halfway goes to the even 1.
  CHECK(half.cast<float>() == Linear<float>({.out = 1, .in = 3}, {0x1.998p-4f, 65504, 1}));
}

/// The same map with a kernel of more taps: a layer without groups, dilation 1 and zeros all
/// around.
template <class Scalar, int Rank>
Conv<Scalar, Rank> zero_extended(const Conv<Scalar, Rank>& layer, const PerAxis<Rank>& before,
                                 const PerAxis<Rank>& after) {
  const ConvShape<Rank>& from = layer.shape();
  ConvShape<Rank> shape{.out = from.out, .in = from.in, .stride = from.stride, .bias = true};
  for (int axis = 0; axis < Rank; ++axis) {
    const Index extent = (from.kernel_size[axis] - 1) * from.dilation[axis] + 1;
    shape.kernel_size[axis] = before[axis] + extent + after[axis];
    shape.padding.start[axis] = from.padding.start[axis] + before[axis];
    shape.padding.end[axis] = from.padding.end[axis] + after[axis];
  }
  Conv<Scalar, Rank> result(shape);
  const Index in = from.in / from.groups, out = from.out / from.groups;
  auto number = layer.weight().begin();
  for (Index o = 0; o < from.out; ++o) {
    for (Index c = 0; c < in; ++c) {
      detail::for_each_position(from.kernel_size, [&](const PerAxis<Rank>& tap) {
        Index at = o * from.in + o / out * in + c;
        for (int axis = 0; axis < Rank; ++axis) {
          at = at * shape.kernel_size[axis] + before[axis] + tap[axis] * from.dilation[axis];
        }
        result.weight()[static_cast<std::size_t>(at)] = *number++;
      });
    }
  }
  std::ranges::copy(layer.bias(), result.bias().begin());
  return result;
}

TEMPLATE_TEST_CASE_SIG("layers are equal as maps, not as numbers", "[conv]", ((int Rank), Rank), 0,
                       1, 2, 3) {
  Rng rng(6);
  for (const ConvShape<Rank>& shape : all_shapes<Rank>(rng, 30)) {
    INFO(to_string(shape));
    const auto layer = small_integers<int>(shape, rng);
    PerAxis<Rank> before, after;
    for (int axis = 0; axis < Rank; ++axis) {
      before[axis] = random_index(rng, 0, 2);
      after[axis] = random_index(rng, 0, 2);
    }
    const auto wide = zero_extended(layer, before, after);
    const auto x = small_integers<int, Rank>(
        {.channels = shape.in, .size = random_input_size(shape, rng)}, rng);
    REQUIRE(layer(x) == wide(x));  // so they should be equal
    CHECK(layer == wide);
    CHECK(wide == layer);
    CHECK(ConvView<const int, Rank>(layer) == wide);
    CHECK(wide == ConvView<const int, Rank>(layer));

    // Any other number anywhere is another map.
    auto changed = wide;
    changed
        .weight()[static_cast<std::size_t>(random_index(rng, 0, std::ssize(wide.weight()) - 1))] +=
        1;
    CHECK(layer != changed);
    CHECK(changed != layer);
    auto shifted = wide;
    shifted.bias()[static_cast<std::size_t>(random_index(rng, 0, shape.out - 1))] += 1;
    CHECK(layer != shifted);
    CHECK(shifted != layer);
    auto own = layer;
    own.weight()[static_cast<std::size_t>(random_index(rng, 0, std::ssize(own.weight()) - 1))] += 1;
    CHECK(own != wide);
    CHECK(own != layer);
  }
}

TEST_CASE("what two layers must share to be equal", "[conv]") {
  const auto zeros = [](const ConvShape<1>& shape) { return Conv1d<int>(shape); };
  const ConvShape<1> plain{.out = 2, .in = 2, .kernel_size = 3, .padding = 1};
  const auto with = [&](auto&& change) {
    ConvShape<1> shape = plain;
    change(shape);
    return zeros(shape);
  };
  SECTION("the same size of the output, even for zeros") {
    CHECK(zeros(plain) != with([](auto& shape) { shape.padding = 2; }));
    CHECK(zeros(plain) != with([](auto& shape) { shape.kernel_size = 2; }));
    CHECK(zeros(plain) != with([](auto& shape) { shape.dilation = 2; }));
    CHECK(zeros(plain) != with([](auto& shape) { shape.stride = 2; }));
    CHECK(zeros(plain) == with([](auto& shape) { shape.groups = 2; }));
    CHECK(zeros(plain) == with([](auto& shape) { shape.bias = true; }));
    CHECK(zeros(plain) == with([](auto& shape) { shape.padding = Padding<1>::sides(0, 2); }));
    CHECK(zeros(plain) == with([](auto& shape) { shape.kernel_size = 1, shape.padding = 0; }));
    CHECK(zeros(plain) ==
          with([](auto& shape) { shape.kernel_size = 1, shape.padding = 0, shape.dilation = 7; }));
  }
  SECTION("the same channels") {
    CHECK(zeros(plain) != with([](auto& shape) { shape.in = 1; }));
    CHECK(zeros(plain) != with([](auto& shape) { shape.out = 1; }));
  }
  SECTION("the same place") {
    const Conv1d<int> left({.out = 1, .in = 1, .padding = Padding<1>::sides(1, 0)}, {5});
    const Conv1d<int> right({.out = 1, .in = 1, .padding = Padding<1>::sides(0, 1)}, {5});
    CHECK(left != right);
    CHECK(left ==
          Conv1d<int>({.out = 1, .in = 1, .kernel_size = 2, .padding = Padding<1>::sides(1, 1)},
                      {5, 0}));
    CHECK(right ==
          Conv1d<int>({.out = 1, .in = 1, .kernel_size = 2, .padding = Padding<1>::sides(1, 1)},
                      {0, 5}));
  }
  SECTION("dilations that reach the same places") {
    const Conv1d<int> spread({.out = 1, .in = 1, .kernel_size = 3, .dilation = 2}, {1, 0, 2});
    CHECK(spread == Conv1d<int>({.out = 1, .in = 1, .kernel_size = 2, .dilation = 4}, {1, 2}));
    CHECK(spread == Conv1d<int>({.out = 1, .in = 1, .kernel_size = 5}, {1, 0, 0, 0, 2}));
    CHECK(spread != Conv1d<int>({.out = 1, .in = 1, .kernel_size = 5}, {1, 0, 0, 2, 0}));
  }
  SECTION("nothing equals what is not a number") {
    const float nan = std::numeric_limits<float>::quiet_NaN();
    const Linear<float> layer({.out = 1, .in = 1}, {nan}), bias({.out = 1, .in = 1}, {1}, {nan});
    CHECK_FALSE(layer == layer);
    CHECK_FALSE(bias == bias);
  }
}

TEST_CASE("a ring of one's own is enough", "[conv]") {
  Rng rng(7);
  for (const ConvShape<1>& shape : all_shapes<1>(rng, 20)) {
    INFO(to_string(shape));
    const auto layer = gaussian(shape, rng);
    const auto x = gaussian<0>({.out = 1, .in = shape.in * 20}, rng);
    const FeatureMap<Gaussian, 1> map({.channels = shape.in, .size = 20},
                                      {x.weight().begin(), x.weight().end()});
    CHECK(layer(map) == applied_in_loops(layer, map));
    const Gaussian i(0, 1), minus_one(-1);
    CHECK(i * (i * layer) == minus_one * layer);
  }

  // Channels enough for every algorithm of a product: 1x1 after and before 3, 3 after 3, and plain
  // loops.
  const auto kernels =
      GENERATE(std::array<Index, 2>{1, 3}, std::array<Index, 2>{3, 1}, std::array<Index, 2>{3, 3});
  const Index channels = GENERATE(2, 12);
  const auto first = gaussian<1>(
      {.out = channels, .in = channels, .kernel_size = kernels[0], .padding = 1, .bias = true},
      rng);
  const auto second =
      gaussian<1>({.out = channels, .in = channels, .kernel_size = kernels[1], .bias = true}, rng);
  const auto numbers = gaussian<0>({.out = 1, .in = channels * 9}, rng);
  const FeatureMap<Gaussian, 1> map({.channels = channels, .size = 9},
                                    {numbers.weight().begin(), numbers.weight().end()});
  const Conv<Gaussian, 1> product = second * first;
  CHECK(product(map) == second(first(map)));
  CHECK(contract(std::vector{first, second}) == product);
}

TEST_CASE("a const layer is applied from two threads", "[conv]") {
  Rng rng(8);
  const auto layer = small_integers<float, 2>(
      {.out = 4, .in = 3, .kernel_size = 3, .padding = 1, .bias = true}, rng);
  const auto x = small_integers<float, 2>({.channels = 3, .size = 20}, rng);
  const auto expected = applied_in_loops(layer, x);
  std::array<int, 2> wrong{};
  std::vector<std::thread> threads;
  for (int& count : wrong) {
    threads.emplace_back([&] {
      for (int n = 0; n < 10; ++n) count += layer(x) != expected;
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(wrong == std::array<int, 2>{});
}

}  // namespace
}  // namespace concertina::test
