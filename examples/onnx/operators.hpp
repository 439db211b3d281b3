// How an operator is implemented: from a node to a step that computes one of its outputs.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "evaluate.hpp"

#include <concertina/error.hpp>

#include <algorithm>
#include <array>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

namespace tool::evaluation {

using Index = std::int64_t;
using Shape = std::vector<Index>;

// ---- shapes

std::string to_text(const Shape& shape);

/// Throws ShapeError; the program adds which node it is.
[[noreturn]] void refuse(const std::string& what);

/// The product of extents, of what is an array or a loop. Throws SizeError above 2^29 elements or
/// 64 axes, and above the run's budget; ShapeError for negative extents.
Index count(std::span<const Index> extents);

/// What the run of this thread may still take.
class RunBudget {
 public:
  explicit RunBudget(const Budget& budget) : outer_(std::exchange(current, budget)) {}
  ~RunBudget() { current = outer_; }
  RunBudget(const RunBudget&) = delete;
  RunBudget& operator=(const RunBudget&) = delete;

  static inline thread_local Budget current;
  static inline thread_local double each = 1;  // multiply-adds for an element, of what runs

 private:
  Budget outer_;
};

/// Takes the multiply-adds of an operator from the run's budget. Throws SizeError.
inline void spend(double multiply_adds) { RunBudget::current.take("it", 0, multiply_adds); }

/// What one takes in a product of matrices or a convolution; and what a product, a row or the like
/// takes however small it is.
constexpr double each_product = 0.25, each_row = 20, each_matrix = 100;

inline const Shape& shape_of(const Value& value) {
  return std::visit([](const auto& array) -> const Shape& { return array.shape; }, value);
}

/// Zeros.
template <class Scalar>
Array<Scalar> zeros(Shape shape) {
  const auto size = static_cast<std::size_t>(count(shape));
  return {std::move(shape), std::vector<Scalar>(size)};
}

/// Counted from the end where negative. Throws ShapeError outside of 0 .. rank - 1.
Index axis_of(Index axis, std::size_t rank);

/// The same for several, in order. Throws ShapeError where one is there twice.
Shape axes_of(Shape axes, std::size_t rank);

/// What numpy's broadcasting makes of both. Throws ShapeError.
Shape broadcast(const Shape& a, const Shape& b);

/// Of a row-major array of `shape`; 0 for axes that are repeated to get `result`.
Shape broadcast_strides(const Shape& shape, const Shape& result);
inline Shape strides_of(const Shape& shape) {
  Shape strides(shape.size(), 1);
  for (std::size_t i = shape.size(); i-- > 1;) strides[i - 1] = strides[i] * shape[i];
  return strides;
}

/// Calls each(offsets, length, steps) for every run of positions of an array of `extents`, in
/// order: element i of a run is at offsets[k] + i * steps[k] of array k, which has these strides.
/// Axes are joined to runs as long as the strides allow.
template <std::size_t N, class Each>
void for_each_run(const Shape& extents, const std::array<Shape, N>& strides, const Each& each) {
  struct Axis {
    Index extent;
    std::array<Index, N> strides;
  };
  std::vector<Axis> axes = {{1, {}}};  // innermost first
  for (std::size_t i = extents.size(); i-- > 0;) {
    if (extents[i] == 0) return;
    if (extents[i] == 1) continue;
    Axis axis{extents[i], {}};
    bool joins = true;
    for (std::size_t k = 0; k < N; ++k) {
      axis.strides[k] = strides[k][i];
      joins = joins && axis.strides[k] == axes.back().strides[k] * axes.back().extent;
    }
    if (axes.back().extent == 1) {
      axes.back() = axis;
    } else if (joins) {
      axes.back().extent *= axis.extent;
    } else {
      axes.push_back(axis);
    }
  }
  std::array<Index, N> offsets{};
  Shape at(axes.size(), 0);
  for (std::size_t i = 0; i < axes.size();) {
    each(offsets, axes[0].extent, axes[0].strides);
    for (i = 1; i < axes.size(); ++i) {
      const Index back = ++at[i] == axes[i].extent ? std::exchange(at[i], 0) - 1 : 0;
      for (std::size_t k = 0; k < N; ++k) {
        offsets[k] += axes[i].strides[k] * (back == 0 ? 1 : -back);
      }
      if (back == 0) break;
    }
  }
}

// ---- operators

/// What a node is given; an input that is left out is null.
class Arguments {
 public:
  struct Input {
    const Value* value;
    Value* owned;  // null where it is read again
  };
  explicit Arguments(std::span<const Input> inputs) : inputs_(inputs) {}

  std::size_t size() const { return inputs_.size(); }
  bool has(std::size_t i) const { return i < inputs_.size() && inputs_[i].value != nullptr; }
  const Value& operator[](std::size_t i) const { return *inputs_[i].value; }
  const Shape& shape(std::size_t i) const { return shape_of((*this)[i]); }

  /// Throws FormatError where its elements are of another type.
  template <class Scalar>
  const Array<Scalar>& as(std::size_t i) const {
    if (!std::holds_alternative<Array<Scalar>>((*this)[i])) refuse_type(i);
    return std::get<Array<Scalar>>((*this)[i]);
  }

  /// Moved where nothing reads it again, else copied; its shape stays.
  Value take(std::size_t i) {
    if (inputs_[i].owned == nullptr) {
      count(shape(i));
      return (*this)[i];
    }
    return std::visit(
        [](auto& array) {
          return Value(std::decay_t<decltype(array)>{array.shape, std::move(array.values)});
        },
        *inputs_[i].owned);
  }
  template <class Scalar>
  Array<Scalar> take_as(std::size_t i) {
    as<Scalar>(i);
    return std::get<Array<Scalar>>(take(i));
  }
  bool movable(std::size_t i) const { return inputs_[i].owned != nullptr; }

  const Shape& integers(std::size_t i) const { return as<Index>(i).values; }
  std::vector<double> reals(std::size_t i) const;

  /// The only element. Throws ShapeError where there are more.
  template <class Scalar>
  Scalar scalar(std::size_t i) const {
    if (as<Scalar>(i).values.size() != 1) {
      refuse("its input " + std::to_string(i) + " is no scalar");
    }
    return as<Scalar>(i).values[0];
  }

  [[noreturn]] void refuse_type(std::size_t i) const;

 private:
  std::span<const Input> inputs_;
};

/// One output from the inputs.
using Step = std::function<Value(Arguments&)>;

/// One output of a node.
struct Definition {
  const concertina::onnx::Node& node;
  Index opset;
  bool wide;
  std::size_t output;
};

struct Operator {
  std::size_t least, most;      // inputs
  std::string_view attributes;  // those it knows, with a space between
  std::function<Step(const Definition&)> compile;
  std::size_t outputs = 1;
};
using Operators = std::map<std::string_view, Operator>;
constexpr std::size_t any = 1 << 20;

void add_elementwise(Operators& operators);
void add_products(Operators& operators);
void add_reductions(Operators& operators);
void add_selections(Operators& operators);
void add_shapes(Operators& operators);
void add_windows(Operators& operators);

/// A step of f<Scalar>(arguments), for the type of the first input.
template <class F>
Step of_numbers(F f) {
  return [f](Arguments& in) {
    return std::visit(
        [&]<class Scalar>(const Array<Scalar>&) -> Value {
          return f.template operator()<Scalar>(in);
        },
        in[0]);
  };
}

/// The same, of floats and doubles only.
template <class F>
Step of_floats(F f) {
  return [f](Arguments& in) {
    return std::visit(
        [&]<class Scalar>(const Array<Scalar>&) -> Value {
          if constexpr (std::floating_point<Scalar>) {
            return f.template operator()<Scalar>(in);
          } else {
            in.refuse_type(0);
          }
        },
        in[0]);
  };
}

/// f of integers as unsigned ones, which wrap around.
template <class F>
auto wrapping(F f) {
  return [f]<class Scalar>(Scalar a, Scalar b) {
    if constexpr (std::integral<Scalar>) {
      return static_cast<Scalar>(f(static_cast<std::uint64_t>(a), static_cast<std::uint64_t>(b)));
    } else {
      return f(a, b);
    }
  };
}

/// to[..] = f(a[..], b[..]), broadcast to `shape`; `to` may be where a or b is, if that has the
/// shape.
template <class Scalar, class Result, class F>
void combine(const Array<Scalar>& a, const Array<Scalar>& b, const Shape& shape, Result* to,
             const F& f) {
  for_each_run<2>(shape, {broadcast_strides(a.shape, shape), broadcast_strides(b.shape, shape)},
                  [&](const auto& offsets, Index length, const auto& steps) {
                    const Scalar* const p = a.values.data() + offsets[0];
                    const Scalar* const q = b.values.data() + offsets[1];
                    if (steps[0] == 1 && steps[1] == 1) {
                      for (Index i = 0; i < length; ++i) to[i] = f(p[i], q[i]);
                    } else if (steps[0] == 1) {
                      const Scalar right = *q;
                      for (Index i = 0; i < length; ++i) to[i] = f(p[i], right);
                    } else {
                      const Scalar left = *p;
                      for (Index i = 0; i < length; ++i) to[i] = f(left, q[i * steps[1]]);
                    }
                    to += length;
                  });
}

/// f(a, b) of two inputs, broadcast; in place of one that nothing reads again.
template <class Scalar, class Result = Scalar, class F>
Array<Result> broadcast(Arguments& in, std::size_t a, std::size_t b, const F& f) {
  const Shape shape = broadcast(in.as<Scalar>(a).shape, in.as<Scalar>(b).shape);
  if constexpr (std::same_as<Scalar, Result>) {
    if (in.movable(a) && in.shape(a) == shape) {
      auto y = in.take_as<Scalar>(a);
      combine(y, in.as<Scalar>(b), shape, y.values.data(), f);
      return y;
    }
    if (in.movable(b) && in.shape(b) == shape) {
      auto y = in.take_as<Scalar>(b);
      combine(in.as<Scalar>(a), y, shape, y.values.data(), f);
      return y;
    }
  }
  auto y = zeros<Result>(shape);
  combine(in.as<Scalar>(a), in.as<Scalar>(b), shape, y.values.data(), f);
  return y;
}

}  // namespace tool::evaluation
