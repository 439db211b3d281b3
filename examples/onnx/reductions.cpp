// Operators that bring elements of an axis together: sums, softmax, norms.
// SPDX-License-Identifier: Apache-2.0
#include "operators.hpp"

#include "matrix.hpp"

#include <cmath>
#include <limits>

namespace tool::evaluation {
namespace {

/// What floats are summed in.
template <class Scalar>
using Sum = std::conditional_t<std::floating_point<Scalar>, double, Scalar>;

// ---- sums and the like

/// Folds a = f(a, element) over the axes, from `initial`; then finish(a, number of elements).
template <class Scalar, class F, class Finish>
Array<Scalar> reduce(const Array<Scalar>& x, const Shape& axes, Sum<Scalar> initial, const F& f,
                     const Finish& finish) {
  Shape kept = x.shape;
  Index folded = 1;
  for (const Index axis : axes) folded *= std::exchange(kept[static_cast<std::size_t>(axis)], 1);
  auto y = zeros<Scalar>(kept);
  std::vector<Sum<Scalar>> sums(y.values.size(), initial);
  for_each_run<2>(x.shape, {strides_of(x.shape), broadcast_strides(kept, x.shape)},
                  [&](const auto& offsets, Index length, const auto& steps) {
                    const Scalar* from = x.values.data() + offsets[0];
                    Sum<Scalar>* to = sums.data() + offsets[1];
                    for (Index i = 0; i < length; ++i) {
                      Sum<Scalar>& sum = to[i * steps[1]];
                      sum = f(sum, static_cast<Sum<Scalar>>(from[i]));
                    }
                  });
  std::ranges::transform(sums, y.values.begin(), [&](Sum<Scalar> sum) {
    return static_cast<Scalar>(finish(sum, static_cast<Sum<Scalar>>(folded)));
  });
  return y;
}

constexpr auto as_it_is = [](auto sum, auto) { return sum; };
constexpr auto mean = []<class Scalar>(Scalar sum, Scalar number) {
  if (std::integral<Scalar> && number == 0) refuse("a mean of no integers");
  return sum / number;
};

constexpr auto zero = []<class Scalar>(Scalar) { return Scalar(0); };
constexpr auto one = []<class Scalar>(Scalar) { return Scalar(1); };
constexpr auto lowest = []<class Scalar>(Scalar) {
  using Limits = std::numeric_limits<Scalar>;
  return Limits::has_infinity ? -Limits::infinity() : Limits::lowest();
};
constexpr auto highest = []<class Scalar>(Scalar) {
  using Limits = std::numeric_limits<Scalar>;
  return Limits::has_infinity ? Limits::infinity() : Limits::max();
};

constexpr auto larger = [](auto a, auto x) { return x > a || x != x ? x : a; };
constexpr auto smaller = [](auto a, auto x) { return x < a || x != x ? x : a; };

/// Over the axes of an attribute or, later, of an input; none of them: all.
template <class Initial, class F, class Finish>
Operator reduction(Initial initial, F f, Finish finish) {
  return {1, 2, "axes keepdims noop_with_empty_axes", [=](const Definition& of) {
            const Shape axes = of.node.integers("axes", {});
            const bool keep = of.node.integer("keepdims", 1) != 0;
            const bool none = of.node.integer("noop_with_empty_axes", 0) != 0;
            return of_numbers([=]<class Scalar>(Arguments& in) {
              const auto& x = in.as<Scalar>(0);
              Shape over = in.has(1) ? in.integers(1) : axes;
              for (std::size_t i = 0; i < x.shape.size() && !none && over.size() == i; ++i) {
                over.push_back(static_cast<Index>(i));
              }
              over = axes_of(over, x.shape.size());
              auto y = reduce(x, over, initial(Sum<Scalar>{}), f, finish);
              for (std::size_t i = over.size(); i-- > 0 && !keep;) {
                y.shape.erase(y.shape.begin() + over[i]);
              }
              return y;
            });
          }};
}

/// Over all axes after the channels'.
template <class Initial, class F, class Finish>
Operator global_pool(Initial initial, F f, Finish finish) {
  return {1, 1, "", [=](const Definition&) {
            return of_floats([=]<class Scalar>(Arguments& in) {
              const auto& x = in.as<Scalar>(0);
              Shape axes;
              for (Index axis = 2; axis < std::ssize(x.shape); ++axis) axes.push_back(axis);
              return reduce(x, axes, initial(Sum<Scalar>{}), f, finish);
            });
          }};
}

// ---- along an axis

/// Axes [begin, end) as one, those before and those after.
struct Lanes {
  Index outer, length, inner;

  Lanes(const Shape& shape, std::size_t begin, std::size_t end)
      : outer(count({shape.data(), begin})),
        length(count({shape.data() + begin, end - begin})),
        inner(count({shape.data() + end, shape.size() - end})) {}
};

template <bool logarithm>
Step softmax(const Definition& of) {
  const bool to_the_end = of.opset < 13;
  const Index axis = of.node.integer("axis", to_the_end ? 1 : -1);
  return of_floats([=]<class Scalar>(Arguments& in) {
    auto x = in.take_as<Scalar>(0);
    const std::size_t rank = x.shape.size();
    // The old ones take a matrix, of which `axis` may be the end.
    const bool empty = to_the_end && axis == static_cast<Index>(rank);
    const auto begin = empty ? rank : static_cast<std::size_t>(axis_of(axis, rank));
    const Lanes lanes(x.shape, begin, to_the_end ? rank : begin + 1);
    spend(each_matrix * static_cast<double>(lanes.outer));
    for (Index i = 0; i < lanes.outer && !x.values.empty(); ++i) {
      auto lane =
          matrix(x.values.data() + i * lanes.length * lanes.inner, lanes.length, lanes.inner)
              .array();
      using Row = Eigen::Array<Scalar, 1, Eigen::Dynamic>;
      const Row largest = lane.colwise().maxCoeff();
      lane.rowwise() -= largest;
      if constexpr (logarithm) {
        const Row sums = lane.exp().colwise().sum().log();
        lane.rowwise() -= sums;
      } else {
        lane = lane.exp().eval();
        const Row sums = lane.colwise().sum();
        lane.rowwise() /= sums;
      }
    }
    return x;
  });
}

/// The first position of the best element, or the last.
template <class Better>
Operator best(Better better) {
  return {1, 1, "axis keepdims select_last_index", [=](const Definition& of) {
            const Index axis = of.node.integer("axis", 0);
            const bool keep = of.node.integer("keepdims", 1) != 0;
            const bool last = of.node.integer("select_last_index", 0) != 0;
            return of_numbers([=]<class Scalar>(Arguments& in) {
              const auto& x = in.as<Scalar>(0);
              const auto at = static_cast<std::size_t>(axis_of(axis, x.shape.size()));
              const Lanes lanes(x.shape, at, at + 1);
              if (lanes.length == 0) refuse("axis " + std::to_string(at) + " is empty");
              Array<Index> y{x.shape, {}};
              y.shape[at] = 1;
              if (!keep) y.shape.erase(y.shape.begin() + static_cast<Index>(at));
              for (Index i = 0; i < lanes.outer * lanes.inner; ++i) {
                const Scalar* lane = x.values.data() +
                                     i / lanes.inner * lanes.length * lanes.inner + i % lanes.inner;
                Index found = 0;
                for (Index k = 1; k < lanes.length; ++k) {
                  const Scalar a = lane[k * lanes.inner], b = lane[found * lanes.inner];
                  if (better(a, b) || (last && a == b)) found = k;
                }
                y.values.push_back(found);
              }
              return y;
            });
          }};
}

// ---- norms

template <class Scalar>
Array<Scalar> affine(Array<Scalar> x, const Array<Scalar>& scale, const Array<Scalar>* bias) {
  if (broadcast(x.shape, scale.shape) != x.shape ||
      (bias && broadcast(x.shape, bias->shape) != x.shape)) {
    refuse("a scale of " + to_text(scale.shape) + " and its bias do not fit " + to_text(x.shape));
  }
  combine(x, scale, x.shape, x.values.data(), std::multiplies<>());
  if (bias) combine(x, *bias, x.shape, x.values.data(), std::plus<>());
  return x;
}

/// Mean 0 and variance 1 of all that follows axis `begin`.
template <class Scalar>
Array<Scalar> normalize(Array<Scalar> x, std::size_t begin, double epsilon) {
  const Lanes lanes(x.shape, begin, x.shape.size());
  spend(each_row * static_cast<double>(lanes.outer));
  for (Index i = 0; i < lanes.outer && !x.values.empty(); ++i) {
    auto lane = matrix(x.values.data() + i * lanes.length, 1, lanes.length).array();
    const double center = lane.template cast<double>().mean();
    const double variance = (lane.template cast<double>() - center).square().mean();
    lane = ((lane.template cast<double>() - center) / std::sqrt(variance + epsilon))
               .template cast<Scalar>();
  }
  return x;
}

Step layer_norm(const Definition& of) {
  const Index axis = of.node.integer("axis", -1);
  const double epsilon = of.node.real("epsilon", 1e-5F);
  return of_floats([=]<class Scalar>(Arguments& in) {
    const auto begin = static_cast<std::size_t>(axis_of(axis, in.shape(0).size()));
    return affine(normalize(in.take_as<Scalar>(0), begin, epsilon), in.as<Scalar>(1),
                  in.has(2) ? &in.as<Scalar>(2) : nullptr);
  });
}

/// One element for each channel of x, as an array that is broadcast to it.
template <class Scalar>
Array<Scalar> by_channel(const Arguments& in, std::size_t i) {
  const Shape& x = in.shape(0);
  if (x.size() < 2 || in.shape(i) != Shape{x[1]}) {
    refuse("its input " + std::to_string(i) + " has no element for each channel of " + to_text(x));
  }
  Array<Scalar> y = in.as<Scalar>(i);
  y.shape.resize(x.size() - 1, 1);
  return y;
}

Step instance_norm(const Definition& of) {
  return of_floats([epsilon = of.node.real("epsilon", 1e-5F)]<class Scalar>(Arguments& in) {
    const auto scale = by_channel<Scalar>(in, 1), bias = by_channel<Scalar>(in, 2);
    return affine(normalize(in.take_as<Scalar>(0), 2, epsilon), scale, &bias);
  });
}

Step batch_norm(const Definition& of) {
  if (of.node.integer("training_mode", 0) != 0 || of.node.integer("spatial", 1) != 1) {
    throw concertina::FormatError("only its inference, with spatial 1, is supported");
  }
  return of_floats([epsilon = of.node.real("epsilon", 1e-5F)]<class Scalar>(Arguments& in) {
    const auto scale = by_channel<Scalar>(in, 1), bias = by_channel<Scalar>(in, 2),
               center = by_channel<Scalar>(in, 3), variance = by_channel<Scalar>(in, 4);
    auto x = in.take_as<Scalar>(0);
    const Lanes lanes(x.shape, 1, 2);
    spend(each_row * static_cast<double>(lanes.outer * lanes.length));
    for (Index i = 0; i < lanes.outer * lanes.length; ++i) {
      const auto c = static_cast<std::size_t>(i % lanes.length);
      const double deviation = std::sqrt(static_cast<double>(variance.values[c]) + epsilon);
      const auto factor = static_cast<Scalar>(static_cast<double>(scale.values[c]) / deviation);
      auto row = matrix(x.values.data() + i * lanes.inner, 1, lanes.inner).array();
      row = (row - center.values[c]) * factor + bias.values[c];
    }
    return x;
  });
}

}  // namespace

void add_reductions(Operators& operators) {
  const auto add = wrapping([](auto a, auto x) { return a + x; });
  const auto multiply = wrapping([](auto a, auto x) { return a * x; });
  const auto add_square = wrapping([](auto a, auto x) { return a + x * x; });
  const auto add_absolute = [](auto a, auto x) { return a + (x < 0 ? -x : x); };
  const auto root = []<class Scalar>(Scalar sum, auto) {
    return static_cast<Scalar>(std::sqrt(sum));
  };
  operators.insert({
      {"ReduceSum", reduction(zero, add, as_it_is)},
      {"ReduceMean", reduction(zero, add, mean)},
      {"ReduceMax", reduction(lowest, larger, as_it_is)},
      {"ReduceMin", reduction(highest, smaller, as_it_is)},
      {"ReduceProd", reduction(one, multiply, as_it_is)},
      {"ReduceL1", reduction(zero, add_absolute, as_it_is)},
      {"ReduceL2", reduction(zero, add_square, root)},
      {"ReduceSumSquare", reduction(zero, add_square, as_it_is)},
      {"GlobalAveragePool", global_pool(zero, add, mean)},
      {"GlobalMaxPool", global_pool(lowest, larger, as_it_is)},
      {"ArgMax", best(std::greater<>())},
      {"ArgMin", best(std::less<>())},
      {"Softmax", {1, 1, "axis", softmax<false>}},
      {"LogSoftmax", {1, 1, "axis", softmax<true>}},
      {"LayerNormalization", {2, 3, "axis epsilon stash_type", layer_norm}},
      {"InstanceNormalization", {3, 3, "epsilon", instance_norm}},
      {"BatchNormalization", {5, 5, "epsilon momentum spatial training_mode", batch_norm}},
  });
}

}  // namespace tool::evaluation
