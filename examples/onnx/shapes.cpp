// Operators on shapes, and constants.
// SPDX-License-Identifier: Apache-2.0
#include "operators.hpp"

#include <cmath>

namespace tool::evaluation {
namespace {

/// The same elements in another shape, change(arguments).
template <class Change>
Step reshaping(Change change) {
  return [change](Arguments& in) {
    Shape shape = change(in);
    if (count(shape) != count(in.shape(0))) {
      refuse("elements of " + to_text(in.shape(0)) + " for " + to_text(shape));
    }
    Value x = in.take(0);
    std::visit([&](auto& array) { array.shape = std::move(shape); }, x);
    return x;
  };
}

Step reshape(const Definition& of) {
  return reshaping([allow_zero = of.node.integer("allowzero", 0) != 0](const Arguments& in) {
    const Shape& x = in.shape(0);
    Shape shape = in.integers(1);
    if (std::ranges::count(shape, -1) > 1) refuse("a shape of " + to_text(shape));
    Index known = 1;
    for (std::size_t i = 0; i < shape.size(); ++i) {
      if (shape[i] == 0 && !allow_zero) {
        if (i >= x.size()) refuse("a shape of " + to_text(shape) + " for " + to_text(x));
        shape[i] = x[i];
      }
    }
    const auto rest = std::ranges::find(shape, -1);
    if (rest != shape.end()) {
      *rest = 1;
      known = count(shape);
      *rest = known == 0 ? 0 : count(x) / known;
    }
    return shape;
  });
}

Step flatten(const Definition& of) {
  return reshaping([axis = of.node.integer("axis", 1)](const Arguments& in) {
    const Shape& x = in.shape(0);
    const auto begin =
        axis == std::ssize(x) ? x.size() : static_cast<std::size_t>(axis_of(axis, x.size()));
    return Shape{count({x.data(), begin}), count({x.data() + begin, x.size() - begin})};
  });
}

Step squeeze(const Definition& of) {
  return reshaping([given = of.node.integers("axes", {})](const Arguments& in) {
    const Shape& x = in.shape(0);
    const bool all = !in.has(1) && given.empty();
    const Shape axes = axes_of(in.has(1) ? in.integers(1) : given, x.size());
    Shape shape;
    for (Index i = 0; i < std::ssize(x); ++i) {
      const bool goes = all ? x[i] == 1 : std::ranges::binary_search(axes, i);
      if (goes && x[i] != 1) {
        refuse("axis " + std::to_string(i) + " of " + to_text(x) + " is not 1");
      }
      if (!goes) shape.push_back(x[i]);
    }
    return shape;
  });
}

Step unsqueeze(const Definition& of) {
  return reshaping([given = of.node.integers("axes", {})](const Arguments& in) {
    Shape shape = in.shape(0), axes = in.has(1) ? in.integers(1) : given;
    for (const Index axis : axes_of(axes, shape.size() + axes.size())) {
      shape.insert(shape.begin() + axis, 1);
    }
    return shape;
  });
}

Step shape(const Definition& of) {
  return [begin = of.node.integer("start", 0),
          end = of.node.integer("end", Index{1} << 30)](Arguments& in) {
    const Shape& x = in.shape(0);
    const Index rank = std::ssize(x);
    const auto at = [&](Index i) { return std::clamp<Index>(i < 0 ? i + rank : i, 0, rank); };
    Shape part(x.begin() + at(begin), x.begin() + std::max(at(begin), at(end)));
    return Array<Index>{{std::ssize(part)}, std::move(part)};
  };
}

Step size(const Definition&) {
  return [](Arguments& in) { return Array<Index>{{}, {count(in.shape(0))}}; };
}

/// As value_of would read it.
template <class Real>
Value reals(Shape shape, const std::vector<Real>& values, bool wide) {
  if (wide) return Array<double>{std::move(shape), {values.begin(), values.end()}};
  return Array<float>{std::move(shape), {values.begin(), values.end()}};
}

Step constant(const Definition& of) {
  if (of.node.attributes.size() != 1) throw concertina::FormatError("it has not one value");
  const auto& given = of.node.attributes[0];
  const Shape length = {std::max(std::ssize(given.floats), std::ssize(given.ints))};
  Value value;
  if (given.name == "value") {
    if (!given.tensor) throw concertina::FormatError("its value is no tensor");
    value = value_of(*given.tensor, of.wide);
  } else if (given.name == "value_float") {
    value = reals<float>({}, {of.node.real(given.name, 0)}, of.wide);
  } else if (given.name == "value_floats") {
    value = reals(length, given.floats, of.wide);
  } else if (given.name == "value_int") {
    value = Array<Index>{{}, {of.node.integer(given.name, 0)}};
  } else {
    value = Array<Index>{length, of.node.integers(given.name, {})};
  }
  return [value = std::move(value)](Arguments&) { return value; };
}

Step constant_of_shape(const Definition& of) {
  Value value = reals<float>({}, {0}, of.wide);
  if (const auto* given = of.node.attribute("value")) {
    if (!given->tensor || given->tensor->numel() != 1) {
      throw concertina::FormatError("its value is not one element");
    }
    value = value_of(*given->tensor, of.wide);
  }
  return [value = std::move(value)](Arguments& in) {
    return std::visit(
        [&]<class Scalar>(const Array<Scalar>& array) -> Value {
          const auto size = static_cast<std::size_t>(count(in.integers(0)));
          return Array<Scalar>{in.integers(0), std::vector<Scalar>(size, array.values[0])};
        },
        value);
  };
}

Step range(const Definition&) {
  return of_numbers([]<class Scalar>(Arguments& in) {
    const Scalar begin = in.scalar<Scalar>(0), end = in.scalar<Scalar>(1),
                 step = in.scalar<Scalar>(2);
    const double number = std::ceil((static_cast<double>(end) - static_cast<double>(begin)) /
                                    static_cast<double>(step));
    if (step == 0 || !(number < 1e9)) refuse("a range without end");
    auto y = zeros<Scalar>({static_cast<Index>(std::max(number, 0.0))});
    const auto element =
        wrapping([&](auto i, auto by) { return static_cast<decltype(i)>(begin) + i * by; });
    for (std::size_t i = 0; i < y.values.size(); ++i) {
      y.values[i] = element(static_cast<Scalar>(i), step);
    }
    return y;
  });
}

/// In inference nothing is left out.
Step dropout(const Definition& of) {
  return [mask = of.output == 1](Arguments& in) -> Value {
    if (in.has(2) && in.scalar<Index>(2) != 0) {
      throw concertina::FormatError("it is in training mode");
    }
    if (!mask) return in.take(0);
    return Array<Index>{in.shape(0), Shape(static_cast<std::size_t>(count(in.shape(0))), 1)};
  };
}

}  // namespace

void add_shapes(Operators& operators) {
  operators.insert({
      {"Reshape", {2, 2, "allowzero", reshape}},
      {"Flatten", {1, 1, "axis", flatten}},
      {"Squeeze", {1, 2, "axes", squeeze}},
      {"Unsqueeze", {1, 2, "axes", unsqueeze}},
      {"Shape", {1, 1, "end start", shape}},
      {"Size", {1, 1, "", size}},
      {"Constant", {0, 0, "value value_float value_floats value_int value_ints", constant}},
      {"ConstantOfShape", {1, 1, "value", constant_of_shape}},
      {"Range", {3, 3, "", range}},
      {"Identity",
       {1, 1, "",
        [](const Definition&) -> Step { return [](Arguments& in) { return in.take(0); }; }}},
      {"Dropout", {1, 3, "ratio seed", dropout, 2}},
  });
}

}  // namespace tool::evaluation
