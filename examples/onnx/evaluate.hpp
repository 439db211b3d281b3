// What an ONNX model computes: each operator by its definition, one after another.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "onnx/budget.hpp"

#include <concertina/io/onnx.hpp>

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <variant>
#include <vector>

namespace tool {

/// An array of floats or doubles, row-major; integers and booleans, such as shapes and indices, are
/// int64.
template <class Scalar>
struct Array {
  std::vector<std::int64_t> shape;
  std::vector<Scalar> values;

  friend bool operator==(const Array&, const Array&) = default;
};
using Value = std::variant<Array<float>, Array<double>, Array<std::int64_t>>;

/// Tensors by name.
using Values = std::map<std::string, Value, std::less<>>;

/// A tensor's elements: 16 bits widened to float, and with `wide` all floats to double. Throws
/// FormatError for elements that are no numbers, or that their type here does not hold.
Value value_of(const concertina::onnx::Tensor& tensor, bool wide = false);

/// A tensor of float32, float64 or int64.
concertina::onnx::Tensor tensor_of(std::string name, const Value& value);

/// A model ready to run: float tensors in float (16 bits widened), double ones in double; or, with
/// `wide`, all in double. It shares no code with contraction.
class Evaluator {
 public:
  /// The model is not needed afterwards; `budget` is that of a run. Throws FormatError naming the
  /// nodes whose operators are not implemented, or that are not what their operator says.
  explicit Evaluator(const concertina::onnx::Model& model, bool wide = false, Budget budget = {});
  ~Evaluator();
  Evaluator(Evaluator&&) noexcept;

  /// The values of the graph's outputs; what is computed is released once it has been read. May be
  /// called from several threads at once.
  /// Throws  ShapeError naming the node that its inputs do not fit; FormatError for inputs that the
  ///         graph does not have, or has and are not given; SizeError for an array of more than
  ///         2^29 elements, and above the budget; NumericalError where an integer is divided by 0
  Values operator()(const Values& inputs) const;

 private:
  struct Program;
  std::unique_ptr<const Program> program_;
};

}  // namespace tool
