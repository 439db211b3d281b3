// Shapes, and what operators are given.
// SPDX-License-Identifier: Apache-2.0
#include "operators.hpp"

namespace tool::evaluation {

std::string to_text(const Shape& shape) {
  std::string text;
  for (const Index extent : shape) text += (text.empty() ? "" : ", ") + std::to_string(extent);
  return "[" + text + "]";
}

void refuse(const std::string& what) { throw concertina::ShapeError(what); }

Index count(std::span<const Index> extents) {
  constexpr Index most = Index{1} << 29;
  if (extents.size() > most_axes) {
    throw concertina::SizeError("an array of " + std::to_string(extents.size()) + " axes, of " +
                                std::to_string(most_axes) + " at most");
  }
  const Shape shape(extents.begin(), extents.end());
  Index result = 1;
  for (const Index extent : extents) {
    if (extent < 0) refuse("an array of " + to_text(shape) + " cannot be");
    // An extent of 0 does not make the others small: they are loops.
    if (extent > most / result) {
      throw concertina::SizeError("an array of " + to_text(shape) + " has more than 2^29 elements");
    }
    result *= std::max<Index>(extent, 1);
  }
  RunBudget::current.take("an array of " + to_text(shape),
                          sizeof(double) * static_cast<double>(result),
                          RunBudget::each * static_cast<double>(result));
  return std::ranges::find(extents, 0) == extents.end() ? result : 0;
}

Index axis_of(Index axis, std::size_t rank) {
  const auto axes = static_cast<Index>(rank);
  if (axis < -axes || axis >= axes) {
    refuse("there is no axis " + std::to_string(axis) + " of " + std::to_string(rank));
  }
  return axis < 0 ? axis + axes : axis;
}

Shape axes_of(Shape axes, std::size_t rank) {
  for (Index& axis : axes) axis = axis_of(axis, rank);
  std::ranges::sort(axes);
  if (std::ranges::adjacent_find(axes) != axes.end()) refuse("an axis twice, " + to_text(axes));
  return axes;
}

Shape broadcast(const Shape& a, const Shape& b) {
  if (a.size() < b.size()) return broadcast(b, a);
  Shape shape = a;
  const std::size_t more = a.size() - b.size();
  for (std::size_t i = more; i < a.size(); ++i) {
    const Index other = b[i - more];
    if (shape[i] == 1) shape[i] = other;
    if (other != shape[i] && other != 1) {
      refuse(to_text(a) + " and " + to_text(b) + " cannot be broadcast");
    }
  }
  return shape;
}

Shape broadcast_strides(const Shape& shape, const Shape& result) {
  Shape strides = strides_of(shape);
  for (std::size_t i = 0; i < shape.size(); ++i) {
    if (shape[i] != result[i + result.size() - shape.size()]) strides[i] = 0;
  }
  strides.insert(strides.begin(), result.size() - shape.size(), 0);
  return strides;
}

std::vector<double> Arguments::reals(std::size_t i) const {
  return std::visit(
      [](const auto& array) {
        std::vector<double> values;
        for (const auto value : array.values) values.push_back(static_cast<double>(value));
        return values;
      },
      (*this)[i]);
}

void Arguments::refuse_type(std::size_t i) const {
  constexpr std::array names = {"floats", "doubles", "integers"};
  throw concertina::FormatError("its input " + std::to_string(i) + " has " +
                                names[(*this)[i].index()] + ", which do not fit");
}

}  // namespace tool::evaluation
