// Contractions that are kept: forward against contract, gradients against directions in exact
// arithmetic, central differences and layer-by-layer backpropagation; storage, threads, refusals.
// SPDX-License-Identifier: Apache-2.0
#include <concertina/contract.hpp>
#include <concertina/detail/verify/rounding.hpp>
#include <concertina/expand.hpp>
#include <concertina/layers.hpp>
#include <concertina/modular.hpp>
#include <concertina/threads.hpp>

#include "pairs.hpp"
#include "support.hpp"

#include <catch2/catch.hpp>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <numeric>
#include <set>
#include <span>
#include <stdexcept>
#include <type_traits>
#include <utility>
#include <vector>

namespace {

std::atomic<std::size_t> allocations = 0;

}  // namespace

// Counts what the library allocates. Eigen's packing buffers come from malloc. Not inlined, or GCC
// sees free() where it sees new.
[[gnu::noinline]] void* operator new(std::size_t size) {
  ++allocations;
  if (void* memory = std::malloc(size == 0 ? 1 : size)) return memory;
  throw std::bad_alloc();
}
// The sanitizers bring one of their own, which does not fit the deletion below.
[[gnu::noinline]] void* operator new(std::size_t size, const std::nothrow_t&) noexcept {
  ++allocations;
  return std::malloc(size == 0 ? 1 : size);
}
[[gnu::noinline]] void operator delete(void* memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }

namespace concertina::test {
namespace {

using Catch::Contains;

// ---- numbers ------------------------------------------------------------------------------------

template <class Scalar>
void fill(std::span<Scalar> numbers, Rng& rng) {
  if constexpr (std::is_same_v<Scalar, PrimeField>) {
    fill_random(numbers, rng);
  } else if constexpr (std::is_floating_point_v<Scalar>) {
    for (Scalar& number : numbers) number = static_cast<Scalar>(random_uniform(rng, 1));
  } else {
    fill_small_integers(numbers, rng);
  }
}

template <class Scalar, int Rank>
Conv<Scalar, Rank> random_layer(const ConvShape<Rank>& shape, Rng& rng) {
  Conv<Scalar, Rank> layer(shape);
  fill(layer.weight(), rng);
  fill(layer.bias(), rng);
  return layer;
}

/// The sum of products of all numbers of two layers, biases included.
template <class Scalar, int Rank>
Scalar inner_product(const Conv<Scalar, Rank>& f, const Conv<Scalar, Rank>& g) {
  REQUIRE(f.shape() == g.shape());
  Scalar sum(0);
  const auto add = [&](auto a, auto b) {
    for (std::size_t i = 0; i < a.size(); ++i) sum = sum + a[i] * b[i];
  };
  add(f.weight(), g.weight());
  add(f.bias(), g.bias());
  return sum;
}

/// f + factor * g, number by number.
template <class Scalar, int Rank>
Conv<Scalar, Rank> moved(Conv<Scalar, Rank> f, const Conv<Scalar, Rank>& g, Scalar factor) {
  REQUIRE(f.shape() == g.shape());
  const auto add = [&](auto a, auto b) {
    for (std::size_t i = 0; i < a.size(); ++i) a[i] = a[i] + factor * b[i];
  };
  add(f.weight(), g.weight());
  add(f.bias(), g.bias());
  return f;
}

template <class Scalar, int Rank>
bool same_bits(const Conv<Scalar, Rank>& f, const Conv<Scalar, Rank>& g) {
  const auto same = [](std::span<const Scalar> a, std::span<const Scalar> b) {
    return a.size() == b.size() &&
           (a.empty() || std::memcmp(a.data(), b.data(), a.size_bytes()) == 0);
  };
  return f.shape() == g.shape() && same(f.weight(), g.weight()) && same(f.bias(), g.bias());
}

/// Leaves of an expression as layers.
template <class Scalar, int Rank>
std::vector<Conv<Scalar, Rank>> leaves_of(const Expr<Scalar, Rank>& expression) {
  std::vector<Conv<Scalar, Rank>> leaves;
  expression.tree().for_each_leaf(
      [&](const auto& leaf) { leaves.push_back(leaf.template to<Scalar>()); });
  return leaves;
}

/// The expression with another layer as its leaf of this number.
template <class Scalar, int Rank>
Expr<Scalar, Rank> with_leaf(const Expr<Scalar, Rank>& expression, std::size_t number,
                             const Conv<Scalar, Rank>& layer) {
  using Leaf = detail::Leaf<Scalar, Rank>;
  std::size_t at = 0;
  return Expr<Scalar, Rank>(expression.tree().map(
      [&](const Leaf& leaf) { return at++ == number ? Leaf(Conv<Scalar, Rank>(layer)) : leaf; }));
}

/// The expression contracted in plain loops.
template <class Scalar, int Rank>
Conv<Scalar, Rank> by_definition(const Expr<Scalar, Rank>& expression) {
  return detail::contract_by_definition<Scalar>(expression.tree(), detail::Measure::value);
}

// ---- forms --------------------------------------------------------------------------------------

/// A layer that can stand beside one of this shape: other kernel, dilation, paddings, groups, bias.
template <int Rank>
ConvShape<Rank> random_branch(const ConvShape<Rank>& like, Rng& rng) {
  ConvShape<Rank> shape = random_shape<Rank>(rng);
  shape.in = like.in, shape.out = like.out;
  Index& groups = shape.groups;
  while (shape.in % groups != 0 || shape.out % groups != 0) --groups;
  shape.stride = like.stride;
  for (int axis = 0; axis < Rank; ++axis) {
    shape.padding.end[axis] = detail::growth(like, axis) - shape.padding.start[axis] +
                              effective_kernel_size(shape, axis) - 1;
  }
  return shape;
}

/// A channel map: a scale, an affine one, or a selection where channels differ.
template <class Scalar, int Rank>
Expr<Scalar, Rank> random_channel_map(Index out, Index in, Rng& rng) {
  ChannelMap<Scalar> map{.in = in, .out = out};
  const auto numbers = [&] {
    std::vector<Scalar> result(static_cast<std::size_t>(out), Scalar(0));
    fill(std::span(result), rng);
    return result;
  };
  if (in != out || random_index(rng, 0, 3) == 0) {
    for (Index o = 0; o < out; ++o) map.source.push_back(random_index(rng, 0, in - 1));
  }
  if (random_index(rng, 0, 1) == 0) map.weight = numbers();
  if (random_index(rng, 0, 1) == 0) map.bias = numbers();
  if (random_index(rng, 0, 1) == 0) map.mean = numbers();
  return Expr<Scalar, any_rank>(map);
}

/// Layers, channel maps, chains, sums and concatenations in each other, that read, write, stride
/// and pad as a layer of this shape does.
template <class Scalar, int Rank>
Expr<Scalar, Rank> random_expression(const ConvShape<Rank>& like, int depth, Rng& rng) {
  using Result = Expr<Scalar, Rank>;
  const auto part = [&](Index out, Index in) {
    ConvShape<Rank> shape = like;
    shape.out = out, shape.in = in, shape.groups = 1;
    return random_expression<Scalar, Rank>(shape, depth - 1, rng);
  };
  if (depth > 0) {
    switch (random_index(rng, 0, 6)) {
      case 0:
      case 1: {  // the inner one neither strides nor changes the size
        ConvShape<Rank> inner{.out = random_index(rng, 1, 6), .in = like.in};
        for (int axis = 0; axis < Rank; ++axis) inner.padding.end[axis] = 0;
        return Result(Join::chain, {random_expression<Scalar, Rank>(inner, depth - 1, rng),
                                    part(like.out, inner.out)});
      }
      case 2: {
        Result outer = random_channel_map<Scalar, Rank>(like.out, like.out, rng);
        return Result(Join::chain, {part(like.out, like.in), std::move(outer)});
      }
      case 3: {
        std::vector<Result> branches;
        for (Index b = random_index(rng, 2, 3); b > 0; --b) {
          branches.push_back(part(like.out, like.in));
        }
        return Result(Join::sum, std::move(branches));
      }
      case 4:
        if (like.out < 2) break;
        return Result(Join::concat_outputs, {part(1, like.in), part(like.out - 1, like.in)});
      case 5:
        if (like.in < 2 || like.out < 2) break;
        return Result(Join::direct_sum, {part(like.out - 1, 1), part(1, like.in - 1)});
      default:
        if (like.in < 2) break;
        return Result(Join::concat_inputs, {part(like.out, like.in - 1), part(like.out, 1)});
    }
  }
  const bool could_be_map = like.stride == PerAxis<Rank>(1) && [&] {
    for (int axis = 0; axis < Rank; ++axis) {
      if (detail::growth(like, axis) != 0) return false;
    }
    return true;
  }();
  if (could_be_map && random_index(rng, 0, 2) == 0) {
    return random_channel_map<Scalar, Rank>(like.out, like.in, rng);
  }
  return random_layer<Scalar, Rank>(random_branch(like, rng), rng);
}

/// Chains of every geometry option, and expressions of every kind.
template <class Scalar, int Rank>
std::vector<Expr<Scalar, Rank>> random_expressions(int count, Rng& rng) {
  std::vector<Expr<Scalar, Rank>> result;
  for (int n = 0; n < count; ++n) {
    Expr<Scalar, Rank> chain = random_layer<Scalar, Rank>(random_shape<Rank>(rng), rng);
    for (Index layers = random_index(rng, 0, 2); layers > 0; --layers) {
      const ConvShape<Rank> before = Form(chain).shape();
      chain.then(random_layer<Scalar, Rank>(random_shape_after<Rank>(before, rng), rng));
    }
    result.push_back(std::move(chain));
    ConvShape<Rank> like = random_shape<Rank>(rng);
    like.groups = 1;
    result.push_back(random_expression<Scalar, Rank>(like, 3, rng));
  }
  return result;
}

// ---- checks -------------------------------------------------------------------------------------

/// Every leaf moved in a random direction: what the contraction gains is what the gradient says.
/// Over the prime field a wrong gradient agrees by chance once in 2^61.
template <class Scalar, int Rank>
void check_directions(const Expr<Scalar, Rank>& expression, Rng& rng,
                      const Border<Rank>& border = interior_only) {
  INFO(to_string(Form(expression)));
  Contraction<Scalar, Rank> contraction(expression, border);
  const Conv<Scalar, Rank> whole = contraction.forward(expression);
  REQUIRE(whole == by_definition(expression));
  const auto gradient = random_layer<Scalar, Rank>(contraction.shape(), rng);
  const auto gradients = contraction.backward(expression, gradient);
  const auto leaves = leaves_of(expression);
  REQUIRE(gradients.size() == leaves.size());
  for (std::size_t l = 0; l < leaves.size(); ++l) {
    REQUIRE(gradients[l].shape() == leaves[l].shape());
    const auto direction = random_layer<Scalar, Rank>(leaves[l].shape(), rng);
    const auto there =
        by_definition(with_leaf(expression, l, moved(leaves[l], direction, Scalar(1))));
    CHECK(inner_product(gradient, moved(there, whole, -Scalar(1))) ==
          inner_product(gradients[l], direction));
  }
}

template <int Rank>
void check_random_directions(int count) {
  Rng rng(40 + Rank);
  for (const auto& expression : random_expressions<PrimeField, Rank>(count, rng)) {
    check_directions(expression, rng);
  }
}

/// A layer's gradients by its definition: of its numbers and of its input.
template <class Scalar, int Rank>
struct Backpropagated {
  Conv<Scalar, Rank> layer;
  FeatureMap<Scalar, Rank> input;
};

template <class Scalar, int Rank>
Backpropagated<Scalar, Rank> backpropagate(const Conv<Scalar, Rank>& layer,
                                           const FeatureMap<Scalar, Rank>& x,
                                           const FeatureMap<Scalar, Rank>& y_gradient) {
  const ConvShape<Rank>& shape = layer.shape();
  const auto& groups = shape.groups;
  const PerAxis<Rank> size = x.shape().size, positions = y_gradient.shape().size;
  const Index in = shape.in / groups, out = shape.out / groups;
  Backpropagated<Scalar, Rank> result{Conv<Scalar, Rank>(shape),
                                      FeatureMap<Scalar, Rank>(x.shape())};
  std::size_t at = 0;
  for (Index n = 0; n < x.shape().batch; ++n) {
    for (Index o = 0; o < shape.out; ++o) {
      detail::for_each_position(positions, [&](const PerAxis<Rank>& j) {
        const Scalar g = y_gradient.values()[at++];
        if (shape.bias) result.layer.bias()[static_cast<std::size_t>(o)] += g;
        for (Index c = 0; c < in; ++c) {
          const Index channel = o / out * in + c;
          detail::for_each_position(shape.kernel_size, [&](const PerAxis<Rank>& a) {
            PerAxis<Rank> i;
            for (int axis = 0; axis < Rank; ++axis) {
              i[axis] = j[axis] * shape.stride[axis] - shape.padding.start[axis] +
                        a[axis] * shape.dilation[axis];
              if (i[axis] < 0 || i[axis] >= size[axis]) return;
            }
            const auto w = static_cast<std::size_t>((o * in + c) * numel(shape.kernel_size) +
                                                    detail::flat(a, shape.kernel_size));
            const auto pixel = static_cast<std::size_t>((n * shape.in + channel) * numel(size) +
                                                        detail::flat(i, size));
            result.layer.weight()[w] += g * x.values()[pixel];
            result.input.values()[pixel] += g * layer.weight()[w];
          });
        }
      });
    }
  }
  return result;
}

/// Calls its tasks last first.
struct Reversed {
  std::vector<Index> counts = {};

  template <class Task>
  void operator()(Index count, Task&& task) {
    counts.push_back(count);
    for (Index i = count; i-- > 0;) task(i);
  }
};

/// Calls its tasks in another order each time.
struct Shuffled {
  Rng rng{1};

  void operator()(Index count, ParallelFor::Task task) {
    std::vector<Index> order(static_cast<std::size_t>(count));
    std::iota(order.begin(), order.end(), Index{0});
    std::ranges::shuffle(order, rng);
    for (const Index i : order) task(i);
  }
};

/// Memory of a caller: layers one after another, each with a guard behind its weight and its bias.
template <class Scalar, int Rank>
class Arena {
 public:
  explicit Arena(const std::vector<ConvShape<Rank>>& shapes) {
    std::size_t size = 0;
    for (const auto& shape : shapes) {
      size += static_cast<std::size_t>(weight_numel(shape) + shape.out) + 2;
    }
    elements_.resize(size, guard);
    std::size_t at = 0;
    const auto take = [&](Index count) {
      const std::span<Scalar> taken =
          std::span(elements_).subspan(at, static_cast<std::size_t>(count));
      at += taken.size() + 1;
      return taken;
    };
    for (const auto& shape : shapes) {
      const auto weight = take(weight_numel(shape));
      const auto bias = take(shape.bias ? shape.out : 0);
      views_.emplace_back(shape, weight, bias);
    }
  }

  const std::vector<ConvView<Scalar, Rank>>& views() const { return views_; }

  /// Elements that hold what was there before anyone wrote.
  Index untouched() const { return std::ranges::count(elements_, guard); }

 private:
  static constexpr Scalar guard = Scalar(12345);
  std::vector<Scalar> elements_;
  std::vector<ConvView<Scalar, Rank>> views_;
};

template <class Scalar, int Rank>
bool same_bits(const ConvView<Scalar, Rank>& f, const Conv<Scalar, Rank>& g) {
  return same_bits(Conv<Scalar, Rank>(f), g);
}

}  // namespace

// ---- forward ------------------------------------------------------------------------------------

TEST_CASE("fixed leaves take part and get no gradient", "[backward]") {
  Rng rng(31);
  Index skipped = 0;
  for (const auto& expression : random_expressions<PrimeField, 2>(200, rng)) {
    const Expr<PrimeField, 2> some(expression.tree().map([&](auto leaf) {
      leaf.fixed = random_index(rng, 0, 1) == 1;
      return leaf;
    }));
    INFO(to_string(Form(expression)));
    Contraction<PrimeField, 2> all(expression, interior_only), part(some, interior_only);
    const auto whole = all.forward(expression);
    REQUIRE(part.forward(some) == whole);
    const auto gradient = random_layer<PrimeField, 2>(whole.shape(), rng);
    const auto expected = all.backward(expression, gradient);
    const auto found = part.backward(some, gradient);
    Arena<PrimeField, 2> arena(part.form().leaves());
    part.backward(some, gradient, arena.views());
    std::size_t l = 0;
    some.tree().for_each_leaf([&](const auto& leaf) {
      const Conv<PrimeField, 2> zero(expected[l].shape());
      CHECK(found[l] == (leaf.fixed ? zero : expected[l]));
      if (leaf.fixed) {
        ++skipped;
        for (const auto& element : arena.views()[l].weight()) {
          CHECK(element == PrimeField(12345));
        }
      } else {
        CHECK(Conv<PrimeField, 2>(arena.views()[l]) == expected[l]);
      }
      ++l;
    });
  }
  CHECK(skipped > 200);
}

TEST_CASE("fixed leaves and what only they make cost nothing backward", "[backward]") {
  // Products, by hand: b a is 6*4*2*9 = 432, c (b a) 5*6*2*9 = 540.
  Rng rng(32);
  const auto a = random_layer<double, 2>({.out = 4, .in = 2, .kernel_size = 3}, rng);
  const auto b = random_layer<double, 2>({.out = 6, .in = 4}, rng),
             c = random_layer<double, 2>({.out = 5, .in = 6}, rng);
  const auto counts = [](const auto& expression) {
    const Form<2> form(expression);
    return std::pair(form.multiply_adds(), form.backward_multiply_adds());
  };
  const Index orders = Form<2>(c * b * a).multiply_adds();  // c b first: 5*6*4 + 5*4*2*9 = 480
  CHECK(orders == 120 + 360);
  CHECK(counts(c * b * a) == std::pair(orders, 2 * orders));
  CHECK(counts(fixed(c) * b * a) == std::pair(orders, 2 * orders - 120));
  CHECK(counts(fixed(c) * fixed(b) * a) == std::pair(orders, Index{360}));
  CHECK(counts(c * b * fixed(a)) == std::pair(orders, 2 * orders - 360));
  CHECK(counts(fixed(c * b * a)) == std::pair(orders, Index{0}));
  // A frozen layer beside an update of low rank: only the update's product counts.
  const auto base = random_layer<double, 2>({.out = 5, .in = 2, .kernel_size = 3}, rng);
  CHECK(counts(fixed(base) + c * b * a) == std::pair(orders, 2 * orders));
  CHECK(Form<2>(fixed(base)).leaves() == Form<2>(base).leaves());
}

TEST_CASE("forward is contract, bit for bit, again and again", "[backward]") {
  Rng rng(1);
  std::vector<Expr<float, 2>> expressions = random_expressions<float, 2>(60, rng);
  for (const auto& [outer, inner] : pairs()) {
    expressions.push_back(random_layer<float>(outer, rng) * random_layer<float>(inner, rng));
  }
  for (const auto& expression : expressions) {
    INFO(to_string(Form(expression)));
    Contraction<float, 2> contraction(expression, interior_only);
    const auto expected = contract(expression, interior_only);
    CHECK(contraction.shape() == expected.shape());
    CHECK(contraction.form() == Form(expression));
    CHECK(same_bits(contraction.forward(expression), expected));
    // Other numbers in between leave no trace.
    const auto leaves = leaves_of(expression);
    contraction.forward(with_leaf(expression, 0, random_layer<float>(leaves[0].shape(), rng)));
    contraction.backward(expression, expected);
    CHECK(same_bits(contraction.forward(expression), expected));
  }
}

TEST_CASE("layers in a list, in views and joined by operators are one form", "[backward]") {
  Rng rng(2);
  const auto layers = [&] {
    std::vector<Conv1d<float>> result;
    for (const auto& shape : std::vector<ConvShape<1>>{
             {.out = 6, .in = 4, .kernel_size = 3, .padding = 1, .bias = true},
             {.out = 6, .in = 6},
             {.out = 2, .in = 6, .bias = true}}) {
      result.push_back(random_layer<float>(shape, rng));
    }
    return result;
  }();
  const std::vector<ConvView<const float, 1>> views(layers.begin(), layers.end());
  const auto expression = layers[2] * layers[1] * layers[0];
  Contraction<float, 1> contraction(expression);
  const Conv1d<float> expected = expression;
  CHECK(same_bits(contraction.forward(expression), expected));
  CHECK(same_bits(contraction.forward(layers), expected));
  CHECK(same_bits(contraction.forward(views), expected));
  std::vector<Conv1d<float>> owners = layers;
  const std::vector<ConvView<float, 1>> writing(owners.begin(), owners.end());
  CHECK(same_bits(contraction.forward(writing), expected));
  const std::vector<Expr<float, 1>> parts{layers[0], layers[2] * layers[1]};
  CHECK(same_bits(contraction.forward(parts), expected));
  const auto gradient = random_layer<float>(expected.shape(), rng);
  const auto spans = contraction.backward(expression, gradient);
  const std::vector<Conv1d<float>> gradients(spans.begin(), spans.end());
  const auto again = contraction.backward(views, gradient);
  for (std::size_t l = 0; l < 3; ++l) CHECK(same_bits(again[l], gradients[l]));
  for (std::size_t l = 0; l < 3; ++l) {
    CHECK(same_bits(contraction.backward(writing, gradient)[l], gradients[l]));
    CHECK(same_bits(contraction.backward(parts, gradient)[l], gradients[l]));
  }

  // Copies have storage of their own.
  Contraction<float, 1> copy = contraction;
  const auto twice = moved(gradient, gradient, 1.0F);
  const auto of_twice = copy.backward(layers, twice);
  for (std::size_t l = 0; l < 3; ++l) {
    CHECK(same_bits(again[l], gradients[l]));
    CHECK(same_bits(of_twice[l], moved(gradients[l], gradients[l], 1.0F)));
  }
  contraction = Contraction<float, 1>(Form(expression));
  const auto other = random_layer<float>(layers[1].shape(), rng);
  contraction.forward(layers[2] * other * layers[0]);
  CHECK(same_bits(copy.forward(layers), expected));
  const auto of_copy = copy.backward(layers, gradient);
  for (std::size_t l = 0; l < 3; ++l) CHECK(same_bits(of_copy[l], gradients[l]));

  // A layer alone is what it is, and so is its gradient.
  Contraction<float, 1> one(layers[0]);
  const auto same = random_layer<float>(layers[0].shape(), rng);
  const auto check_one = [&](const auto& source) {
    CHECK(same_bits(one.forward(source), layers[0]));
    CHECK(same_bits(one.backward(source, same)[0], same));
  };
  check_one(layers[0]);
  check_one(views[0]);
  check_one(std::span(layers).first(1));
  check_one(Expr<float, 1>(layers[0]));
}

// ---- gradients, exactly -------------------------------------------------------------------------

TEST_CASE("the pairs take every algorithm, and each one's gradients are the product's",
          "[backward]") {
  Rng rng(3);
  std::set<detail::Algorithm> algorithms;
  for (const auto& [outer, inner] : pairs()) {
    algorithms.insert(detail::algorithm_for(outer, inner));
    check_directions<PrimeField, 2>(
        random_layer<PrimeField>(outer, rng) * random_layer<PrimeField>(inner, rng), rng);
    check_directions<std::int64_t, 2>(
        random_layer<std::int64_t>(outer, rng) * random_layer<std::int64_t>(inner, rng), rng);
  }
  CHECK(algorithms.size() == 6);
}

TEST_CASE("each leaf's gradient is the transposed of what the contraction does with it",
          "[backward]") {
  SECTION("fully connected") { check_random_directions<0>(200); }
  SECTION("1-d") { check_random_directions<1>(150); }
  SECTION("2-d") { check_random_directions<2>(100); }
  SECTION("3-d") { check_random_directions<3>(25); }
}

TEST_CASE("large pairs, whose panels are many", "[backward]") {
  Rng rng(4);
  const auto check = [&](const ConvShape<2>& outer, const ConvShape<2>& inner) {
    check_directions<std::int64_t, 2>(
        random_layer<std::int64_t>(outer, rng) * random_layer<std::int64_t>(inner, rng), rng);
  };
  check({.out = 70, .in = 65, .kernel_size = 3}, {.out = 65, .in = 130, .bias = true});
  check({.out = 33, .in = 64, .kernel_size = 3, .bias = true},
        {.out = 64, .in = 35, .kernel_size = 3});
  check({.out = 130, .in = 140, .bias = true}, {.out = 140, .in = 30, .kernel_size = {3, 5}});
}

// ---- gradients, rounded -------------------------------------------------------------------------

TEST_CASE("gradients in double against central differences", "[backward]") {
  // A contraction is linear in each leaf, so a difference of any width is the derivative but for
  // rounding. Every number in it and in the gradient is a sum of products of leaves' numbers, in
  // which no stage sums more terms than the contraction has numbers, or than an intermediate has on
  // one side: with absolute values everywhere that bounds the sum, gamma_n times it the error.
  Rng rng(5);
  for (const auto& expression : random_expressions<double, 2>(40, rng)) {
    INFO(to_string(Form(expression)));
    Contraction<double, 2> contraction(expression, interior_only);
    contraction.forward(expression);
    const auto gradient = random_layer<double>(contraction.shape(), rng);
    const auto gradients = contraction.backward(expression, gradient);
    const auto leaves = leaves_of(expression);
    const ConvShape<2>& whole = contraction.shape();
    const Index terms =
        (std::ssize(leaves) + 1) * (whole.in + whole.out + 12) * numel(whole.kernel_size) +
        std::ssize(gradient.weight());
    for (std::size_t l = 0; l < leaves.size(); ++l) {
      const auto direction = random_layer<double>(leaves[l].shape(), rng);
      const auto along = [&](double step) {
        return inner_product(
            gradient,
            contract(with_leaf(expression, l, moved(leaves[l], direction, step)), interior_only));
      };
      const auto absolute = [](Conv2d<double> layer) {
        for (double& number : layer.weight()) number = std::abs(number);
        for (double& number : layer.bias()) number = std::abs(number);
        return layer;
      };
      auto magnitudes = expression;
      for (std::size_t k = 0; k < leaves.size(); ++k) {
        auto magnitude = absolute(leaves[k]);
        if (k == l) magnitude = moved(magnitude, absolute(direction), 1.0);
        magnitudes = with_leaf(magnitudes, k, magnitude);
      }
      const double magnitude =
          inner_product(absolute(gradient), contract(magnitudes, interior_only));
      const double difference = (along(1) - along(-1)) / 2;
      const double rounding = static_cast<double>(terms) * 0x1p-53;
      CHECK(std::abs(difference - inner_product(gradients[l], direction)) <=
            2 * rounding / (1 - rounding) * magnitude);
    }
  }
}

TEST_CASE("a loss after the compact convolution", "[backward]") {
  // sum of tanh(F(x))^2 along a direction, differentiated by the five-point rule: its error is that
  // of the fourth power of the step, here below 1e-11, and rounding some 1e-13.
  Rng rng(6);
  const auto c1 =
      random_layer<double>(ConvShape<2>{.out = 5, .in = 3, .padding = 1, .bias = true}, rng);
  const auto c2 = random_layer<double>(ConvShape<2>{.out = 4, .in = 5, .kernel_size = 3}, rng);
  const auto skip = random_layer<double>(
      ConvShape<2>{.out = 4, .in = 3, .kernel_size = 3, .padding = 1, .bias = true}, rng);
  FeatureMap<double, 2> x({.batch = 2, .channels = 3, .size = {5, 6}});
  fill(x.values(), rng);
  const Expr<double, 2> expression = 0.1 * (c2 * c1 + skip);
  const auto loss = [&](const Expr<double, 2>& e) {
    double sum = 0;
    const auto y = contract(e)(x);
    for (const double number : y.values()) sum += std::tanh(number) * std::tanh(number);
    return sum;
  };
  Contraction<double, 2> contraction(expression);
  const Conv2d<double>& compact = contraction.forward(expression);
  auto y = compact(x);
  for (double& number : y.values()) {
    const double tanh = std::tanh(number);
    number = 2 * tanh * (1 - tanh * tanh);
  }
  const auto of_compact = backpropagate(compact, x, y);
  const auto gradients = contraction.backward(expression, of_compact.layer);
  const auto leaves = leaves_of(expression);
  for (std::size_t l = 0; l < leaves.size(); ++l) {
    const auto direction = random_layer<double>(leaves[l].shape(), rng);
    constexpr double h = 0x1p-12;
    const auto along = [&](double step) {
      return loss(with_leaf(expression, l, moved(leaves[l], direction, step)));
    };
    const double difference =
        (8 * (along(h) - along(-h)) - (along(2 * h) - along(-2 * h))) / (12 * h);
    CHECK(inner_product(gradients[l], direction) == Approx(difference).epsilon(1e-8).margin(1e-9));
  }
}

// ---- channel maps -------------------------------------------------------------------------------

TEST_CASE("gradients of batch norms' and scales' own numbers", "[backward]") {
  Rng rng(7);
  const auto numbers = [&](Index count, double least) {
    std::vector<double> result;
    for (Index i = 0; i < count; ++i) result.push_back(least + std::abs(random_uniform(rng, 1)));
    return result;
  };
  const auto conv = random_layer<double>(
      ConvShape<2>{.out = 4, .in = 3, .kernel_size = 3, .padding = 1, .bias = true}, rng);
  using Map = ChannelMap<double>;
  const std::vector<Map> maps{
      {.in = 4,
       .out = 4,
       .mean = numbers(4, -0.5),
       .variance = numbers(4, 0.3),
       .weight = numbers(4, -0.5),
       .bias = numbers(4, -0.5),
       .eps = 1e-3},
      {.in = 4, .out = 4, .mean = numbers(4, 0), .variance = numbers(4, 0.3), .eps = 1e-3},
      {.in = 4, .out = 4, .weight = numbers(4, -0.5)},
      {.in = 4, .out = 4, .weight = {0, 0, 0, 0}, .bias = numbers(4, 0), .divisor = 3},
      {.in = 4, .out = 4},
      {.in = 4,
       .out = 6,
       .source = {3, 0, 0, 2, 1, 3},
       .mean = numbers(6, 0),
       .weight = numbers(6, 0)}};
  for (const Map& map : maps) {
    const auto expression_of = [&](const Map& m) { return Expr<double, any_rank>(m) * conv; };
    const auto expression = expression_of(map);
    Contraction<double, 2> contraction(expression);
    contraction.forward(expression);
    const auto gradient = random_layer<double>(contraction.shape(), rng);
    const Map found = map.backward(contraction.backward(expression, gradient)[1]);
    CHECK(found.source == map.source);
    const auto check = [&](std::vector<double> Map::* field) {
      const auto& own = found.*field;
      REQUIRE(own.size() == (map.*field).size());
      for (std::size_t i = 0; i < own.size(); ++i) {
        const auto at = [&](double step) {
          Map other = map;
          (other.*field)[i] += step;
          return inner_product(gradient, contract(expression_of(other)));
        };
        // Five points: exact but for rounding where the map is linear in the field, and of order
        // h^4 in the variance.
        constexpr double h = 0x1p-10;
        const double difference = (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h);
        CHECK(own[i] == Approx(difference).epsilon(1e-8).margin(1e-9));
      }
    };
    check(&Map::mean);
    check(&Map::variance);
    check(&Map::weight);
    check(&Map::bias);
  }
}

TEST_CASE("channel maps' gradients are exact where their scalars are", "[backward]") {
  Rng rng(8);
  for (int n = 0; n < 50; ++n) {
    const Index in = random_index(rng, 1, 4), out = random_index(rng, 1, 4);
    const auto expression = random_channel_map<PrimeField, 1>(out, in, rng);
    ChannelMap<PrimeField> map = *expression.tree().leaf().channel_map();
    map.divisor = 3;
    const auto layer = detail::to_conv<PrimeField, 1>(map);
    const auto gradient = random_layer<PrimeField>(layer.shape(), rng);
    const auto found = map.backward(gradient);
    const auto check = [&](std::vector<PrimeField> ChannelMap<PrimeField>::* field) {
      for (std::size_t i = 0; i < (map.*field).size(); ++i) {
        ChannelMap<PrimeField> other = map;
        (other.*field)[i] += 1;
        const auto there = detail::to_conv<PrimeField, 1>(other);
        CHECK(inner_product(gradient, there) - inner_product(gradient, layer) == (found.*field)[i]);
      }
    };
    check(&ChannelMap<PrimeField>::mean);
    check(&ChannelMap<PrimeField>::weight);
    check(&ChannelMap<PrimeField>::bias);
  }
  const Conv2d<double> other({.out = 3, .in = 3});
  CHECK_THAT(message_of<ShapeError>([&] { ChannelMap<double>{.in = 4, .out = 4}.backward(other); }),
             Contains("conv2d 3->3 @1x1") && Contains("conv2d 4->4 @1x1 g4"));
}

// ---- storage ------------------------------------------------------------------------------------

TEST_CASE("neither pass allocates after the first", "[backward]") {
  Rng rng(9);
  std::vector<Expr<float, 2>> expressions = random_expressions<float, 2>(40, rng);
  for (const auto& [outer, inner] : pairs()) {
    expressions.push_back(random_layer<float>(outer, rng) * random_layer<float>(inner, rng));
  }
  for (const auto& expression : expressions) {
    INFO(to_string(Form(expression)));
    // Where the caller has the memory the first does not either, but for a permutation.
    Contraction<float, 2> contraction(expression, interior_only);
    const auto gradient = random_layer<float>(contraction.shape(), rng);
    const Arena<float, 2> results({contraction.shape()}), gradients(contraction.form().leaves());
    bool permutes = false;
    expression.tree().for_each_leaf([&](const auto& leaf) {
      permutes = permutes || (leaf.channel_map() && !leaf.channel_map()->source.empty());
    });
    const auto pass = [&] {
      contraction.forward(expression, results.views()[0]);
      contraction.backward(expression, gradient, gradients.views());
    };
    const std::size_t unused = allocations;
    pass();
    if (!permutes) CHECK(allocations == unused);
    const std::size_t placed = allocations;
    pass();
    CHECK(allocations == placed);

    const auto own_pass = [&] {
      contraction.forward(expression);
      contraction.backward(expression, gradient);
    };
    own_pass();
    const std::size_t before = allocations;
    own_pass();
    own_pass();
    pass();
    CHECK(allocations == before);
  }
  // Lists of layers are no exception.
  std::vector<Conv2d<float>> layers;
  for (const auto& shape :
       expand_cl(ConvShape<2>{.out = 4, .in = 3, .kernel_size = 3}, {.rate = 2})) {
    layers.push_back(random_layer<float>(shape, rng));
  }
  const Form<2> planned(layers);
  Contraction<float, 2> contraction(planned);
  const auto gradient = random_layer<float>(contraction.shape(), rng);
  const Arena<float, 2> results({contraction.shape()}), gradients(planned.leaves());
  const std::size_t unused = allocations;
  contraction.forward(layers, results.views()[0]);
  contraction.backward(layers, gradient, gradients.views());
  CHECK(allocations == unused);
  contraction.forward(layers);
  contraction.backward(layers, gradient);
  const std::size_t before = allocations;
  contraction.forward(layers);
  contraction.backward(layers, gradient);
  CHECK(allocations == before);
}

TEST_CASE("results and gradients are written where the caller says, and nowhere else",
          "[backward]") {
  Rng rng(14);
  std::vector<Expr<float, 2>> expressions = random_expressions<float, 2>(20, rng);
  for (const auto& [outer, inner] : pairs()) {
    expressions.push_back(random_layer<float>(outer, rng) * random_layer<float>(inner, rng));
  }
  expressions.push_back(random_layer<float>(ConvShape<2>{.out = 3, .in = 2, .bias = true}, rng));
  for (const auto& expression : expressions) {
    INFO(to_string(Form(expression)));
    Contraction<float, 2> own(expression, interior_only), placed = own;
    const Arena<float, 2> results({own.shape()}), gradients(own.form().leaves());
    placed.forward(expression, results.views()[0]);
    const Conv2d<float> whole = own.forward(expression);
    CHECK(same_bits(results.views()[0], whole));
    const auto gradient = random_layer<float>(own.shape(), rng);
    placed.backward(expression, gradient, gradients.views());
    const auto expected = own.backward(expression, gradient);
    Index guards = 0;
    for (std::size_t l = 0; l < expected.size(); ++l) {
      CHECK(same_bits(gradients.views()[l], expected[l]));
      const ConvShape<2>& shape = expected[l].shape();
      guards += 2 + (shape.bias ? 0 : shape.out);
    }
    CHECK(gradients.untouched() == guards);
    CHECK(results.untouched() == 2 + (own.shape().bias ? 0 : own.shape().out));

    // A layer's gradient may be a view as well, and its own results stay as they were.
    placed.backward(expression, ConvView<const float, 2>(gradient), gradients.views(), serial_for);
    placed.forward(expression, results.views()[0], serial_for);
    CHECK(same_bits(results.views()[0], whole));
    for (std::size_t l = 0; l < expected.size(); ++l) {
      CHECK(same_bits(gradients.views()[l], expected[l]));
    }
  }

  // A layer that is not a view can be named as the result.
  const auto f = random_layer<float>(ConvShape<2>{.out = 4, .in = 3, .kernel_size = 3}, rng);
  const auto g = random_layer<float>(ConvShape<2>{.out = 2, .in = 4}, rng);
  Contraction<float, 2> contraction(g * f);
  Conv2d<float> result(contraction.shape());
  contraction.forward(g * f, result);
  CHECK(same_bits(result, contract(g * f)));
}

// ---- threads ------------------------------------------------------------------------------------

TEST_CASE("results are the same bit for bit whatever runs the panels", "[backward]") {
  Rng rng(10);
  const auto check = [&]<int Rank>(const std::vector<ConvShape<Rank>>& shapes) {
    std::vector<Conv<float, Rank>> layers;
    for (const auto& shape : shapes) layers.push_back(random_layer<float>(shape, rng));
    Contraction<float, Rank> contraction(layers, interior_only);
    INFO(to_string(contraction.form()));
    const Conv<float, Rank> whole = contraction.forward(layers);
    CHECK(same_bits(whole, contract(layers, interior_only)));
    const auto gradient = random_layer<float>(contraction.shape(), rng);
    const auto in_turn = contraction.backward(layers, gradient);
    const std::vector<Conv<float, Rank>> gradients(in_turn.begin(), in_turn.end());
    const auto check_run = [&](auto&& run) {
      CHECK(same_bits(contraction.forward(layers, run), whole));
      const auto again = contraction.backward(layers, gradient, run);
      for (std::size_t l = 0; l < layers.size(); ++l) CHECK(same_bits(again[l], gradients[l]));
    };
    Reversed reversed;
    check_run(reversed);
    Shuffled shuffled;
    check_run(shuffled);
    check_run(Threads{2});
    check_run(Threads{3});
    check_run(Threads{1});
    check_run(serial_for);
    check_run([](Index count, ParallelFor::Task task) { Threads{2}(count, task); });

    // Once, and to the caller's memory.
    CHECK(same_bits(contract(layers, interior_only, Threads{3}), whole));
    CHECK(same_bits(contract(layers, interior_only, shuffled), whole));
    CHECK(same_bits(contract(layers, interior_only, reversed), whole));
    reversed.counts.clear();
    const Arena<float, Rank> results({contraction.shape()}), placed(contraction.form().leaves());
    contraction.forward(layers, results.views()[0], reversed);
    CHECK(same_bits(results.views()[0], whole));
    contraction.backward(layers, gradient, placed.views(), reversed);
    for (std::size_t l = 0; l < layers.size(); ++l) {
      CHECK(same_bits(placed.views()[l], gradients[l]));
    }
    return reversed.counts;
  };
  const auto fully_connected = check(expand_fc({.out = 64, .in = 512, .bias = true}));
  CHECK(fully_connected.size() == 4);  // two products, two gradients of products
  for (const Index count : fully_connected) CHECK(count >= 4);
  CHECK(check(std::vector<ConvShape<2>>{{.out = 128, .in = 64, .bias = true},
                                        {.out = 96, .in = 128, .kernel_size = 3, .bias = true}})
            .size() >= 2);
  CHECK(check(std::vector<ConvShape<2>>{{.out = 64, .in = 40, .kernel_size = 3, .bias = true},
                                        {.out = 36, .in = 64, .kernel_size = 3, .bias = true}})
            .size() >= 2);
  CHECK(check(std::vector<ConvShape<2>>{{.out = 8, .in = 4, .kernel_size = 3}, {.out = 8, .in = 8}})
            .empty());  // too small to spread
}

TEST_CASE("what a task throws comes out, and the contraction can be used again", "[backward]") {
  Rng rng(15);
  std::vector<Conv<float, 0>> layers;
  for (const auto& shape : expand_fc({.out = 64, .in = 512, .bias = true})) {
    layers.push_back(random_layer<float>(shape, rng));
  }
  Contraction<float, 0> contraction(layers);
  const Conv<float, 0> whole = contraction.forward(layers);
  const auto gradient = random_layer<float>(contraction.shape(), rng);
  const auto own = contraction.backward(layers, gradient);
  const std::vector<Conv<float, 0>> gradients(own.begin(), own.end());

  struct TaskFailed : std::runtime_error {
    using std::runtime_error::runtime_error;
  };
  const auto failing = [](auto run) {
    return [run](Index count, ParallelFor::Task task) {
      run(count, [&](Index i) {
        if (i == count - 1) throw TaskFailed("the last task");
        task(i);
      });
    };
  };
  const auto check = [&](auto run) {
    CHECK_THROWS_AS(contract(layers, {}, run), TaskFailed);
    CHECK_THROWS_AS(contraction.backward(layers, gradient, run), TaskFailed);
    const auto again = contraction.backward(layers, gradient);
    for (std::size_t l = 0; l < layers.size(); ++l) CHECK(same_bits(again[l], gradients[l]));
    CHECK_THROWS_AS(contraction.forward(layers, run), TaskFailed);
    // Intermediates are of half a pass, so there is nothing to go back from.
    CHECK_THAT(message_of<Error>([&] { contraction.backward(layers, gradient); }),
               Contains("forward has not been called"));
    CHECK(same_bits(contraction.forward(layers), whole));
  };
  check(failing(serial_for));
  check(failing(Threads{2}));
  check(failing(Threads{3}));
}

// ---- refusals -----------------------------------------------------------------------------------

TEST_CASE("what does not fit the plan is refused", "[backward]") {
  Rng rng(12);
  const auto f = random_layer<float>(ConvShape<2>{.out = 4, .in = 3, .kernel_size = 3}, rng);
  const auto g = random_layer<float>(ConvShape<2>{.out = 2, .in = 4, .bias = true}, rng);
  const auto h = random_layer<float>(ConvShape<2>{.out = 2, .in = 4}, rng);
  Contraction<float, 2> contraction(g * f);
  const Conv2d<float> gradient(contraction.shape());
  CHECK_THAT(message_of<Error>([&] { contraction.backward(g * f, gradient); }),
             Contains("forward has not been called"));
  CHECK_THAT(message_of<ShapeError>([&] { contraction.forward(h * f); }),
             Contains("(conv2d 3->4 @3x3, conv2d 4->2 @1x1 +bias)") &&
                 Contains("(conv2d 3->4 @3x3, conv2d 4->2 @1x1)"));
  CHECK_THROWS_AS(contraction.forward(std::vector{f, h}), ShapeError);
  CHECK_THROWS_AS(contraction.forward(std::vector{f}), ShapeError);
  CHECK_THROWS_AS(contraction.forward(g * h * h * f), ShapeError);
  CHECK_THROWS_AS(contraction.forward(
                      std::vector{f, g, random_layer<float>(ConvShape<2>{.out = 2, .in = 2}, rng)}),
                  ShapeError);
  CHECK_THROWS_AS(contraction.forward(g * (f + f)), ShapeError);
  contraction.forward(g * f);
  CHECK_THROWS_AS(contraction.backward(h * f, gradient), ShapeError);
  const Conv2d<float> unbiased({.out = 2, .in = 3, .kernel_size = 3});
  CHECK_THAT(message_of<ShapeError>([&] { contraction.backward(g * f, unbiased); }),
             Contains("conv2d 3->2 @3x3, where the contraction is conv2d 3->2 @3x3 +bias"));

  // Where the caller has the memory, it is of the shapes that are written.
  Conv2d<float> result(contraction.shape()), other(unbiased), of_f(f), of_g(g), of_h(h);
  using Views = std::vector<ConvView<float, 2>>;
  CHECK_THAT(message_of<ShapeError>([&] { contraction.forward(g * f, other); }),
             Contains("a result of shape conv2d 3->2 @3x3, where the contraction is conv2d 3->2 "
                      "@3x3 +bias"));
  const auto refused = [&](const Views& gradients) {
    return message_of<ShapeError>([&] { contraction.backward(g * f, gradient, gradients); });
  };
  CHECK_THAT(message_of<Error>([&] { refused({of_f, of_g}); }),
             Contains("forward has not been called"));  // the refused pass was none
  contraction.forward(g * f, result);
  CHECK_THAT(refused({of_f}), Contains("1 gradients for 2 layers"));
  CHECK_THAT(refused({of_f, of_g, of_g}), Contains("3 gradients for 2 layers"));
  CHECK_THAT(refused({of_f, of_h}),
             Contains("gradient 2 of shape conv2d 4->2 @1x1, where the layer is conv2d 4->2 @1x1 "
                      "+bias"));
  CHECK_THAT(refused({of_g, of_f}), Contains("gradient 1 of shape"));
  CHECK_THROWS_AS(contraction.backward(g * f, unbiased, Views{of_f, of_g}), ShapeError);
  CHECK_NOTHROW(contraction.backward(g * f, gradient, Views{of_f, of_g}));

  Contraction<float, 2> sum(f + f);
  CHECK_THROWS_AS(sum.forward(std::vector{f, f}), ShapeError);
  Contraction<float, 2> nested(g * (f + f));
  CHECK_THROWS_AS(nested.forward(std::vector{f, f, g}), ShapeError);
}

TEST_CASE("branches that agree at a named size only have gradients", "[backward]") {
  Rng rng(14);
  const auto layer = [&](const ConvShape<2>& shape) {
    return random_layer<PrimeField, 2>(shape, rng);
  };
  const auto square = layer({.out = 3, .in = 2, .kernel_size = 2, .stride = 2, .bias = true}),
             point = layer({.out = 3, .in = 2, .stride = 2}),
             after = layer({.out = 4, .in = 3, .kernel_size = {1, 2}, .bias = true});
  check_directions(after * (square + point), rng, exact_at(6, 8));
  check_directions(after * (point + square), rng, exact_at(6, 8));
}

TEST_CASE("borders are refused as contract refuses them", "[backward]") {
  const Form padded(std::vector<ConvShape<2>>{{.out = 2, .in = 2, .bias = true},
                                              {.out = 2, .in = 2, .kernel_size = 3, .padding = 1}});
  CHECK_THAT(message_of<InexactError>([&] { Contraction<float, 2> refused(padded); }),
             Contains("layer 2 (conv2d 2->2 @3x3 p1x1) pads"));
  CHECK_NOTHROW(Contraction<float, 2>(padded, interior_only));
  const Form<2> even =
      joined<2>(Join::sum, {Form(ConvShape<2>{.out = 2, .in = 2, .kernel_size = 2, .stride = 2}),
                            Form(ConvShape<2>{.out = 2, .in = 2, .stride = 2})});
  CHECK_THROWS_AS((Contraction<float, 2>(even)), ShapeError);
  CHECK_NOTHROW(Contraction<float, 2>(even, exact_at(6, 8)));
  const Form far(std::vector<ConvShape<1>>{
      {.out = 64, .in = 64, .kernel_size = 2},
      {.out = 64, .in = 64, .kernel_size = 2, .dilation = (Index{1} << 30) + 1}});
  CHECK_THROWS_AS((Contraction<float, 1>(far)), SizeError);
}

// ---- a training step ----------------------------------------------------------------------------

TEMPLATE_TEST_CASE_SIG("a contracted training step computes the layers' own gradients",
                       "[backward]", ((int Rank), Rank), 0, 1, 2, 3) {
  Rng rng(13);
  for (int n = 0; n < 30; ++n) {
    std::vector<ConvShape<Rank>> shapes{random_shape<Rank>(rng)};
    while (shapes.size() < 3) {
      shapes.push_back(unpadded(random_shape_after<Rank>(shapes.back(), rng)));
    }
    std::vector<Conv<std::int64_t, Rank>> layers;
    for (const auto& shape : shapes) layers.push_back(small_integers<std::int64_t>(shape, rng));
    Contraction<std::int64_t, Rank> contraction(layers);
    INFO(to_string(contraction.form()));

    // Layer by layer: forward through all, then back through all.
    std::vector<FeatureMap<std::int64_t, Rank>> maps{small_integers<std::int64_t, Rank>(
        {.batch = 2, .channels = shapes[0].in, .size = random_input_size(shapes, rng)}, rng)};
    for (const auto& layer : layers) maps.push_back(layer(maps.back()));
    const auto y_gradient = small_integers<std::int64_t, Rank>(maps.back().shape(), rng);
    std::vector<Conv<std::int64_t, Rank>> expected;
    auto back = y_gradient;
    for (std::size_t l = layers.size(); l-- > 0;) {
      auto here = backpropagate(layers[l], maps[l], back);
      expected.insert(expected.begin(), std::move(here.layer));
      back = std::move(here.input);
    }

    // Contracted: one layer on the batch, its gradient pulled back.
    const Conv<std::int64_t, Rank>& compact = contraction.forward(layers);
    REQUIRE(compact(maps.front()) == maps.back());
    const auto of_compact = backpropagate(compact, maps.front(), y_gradient);
    CHECK(of_compact.input == back);
    const auto gradients = contraction.backward(layers, of_compact.layer);
    for (std::size_t l = 0; l < layers.size(); ++l) CHECK(same_bits(gradients[l], expected[l]));
  }
}

}  // namespace concertina::test
