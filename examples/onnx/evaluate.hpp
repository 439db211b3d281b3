// What an ONNX model computes: each operator by its definition, one after another.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/io/onnx.hpp>

#include <cstdint>
#include <functional>
#include <map>
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

/// A model ready to run: float tensors in float (16 bits widened), double ones in double; or, with
/// `wide`, all in double. It shares no code with contraction.
class Evaluator {
 public:
  /// The model must outlive it. Throws FormatError naming the nodes whose operators are not
  /// implemented, or that are not what their operator says.
  explicit Evaluator(const concertina::onnx::Model& model, bool wide = false);
  ~Evaluator();
  Evaluator(Evaluator&&) noexcept;

  /// The values of the graph's outputs. May be called from several threads at once.
  /// Throws  ShapeError naming the node that its inputs do not fit; FormatError for inputs that the
  ///         graph does not have, or has and are not given; SizeError for more than 4 GiB at once
  Values operator()(const Values& inputs) const;

 private:
  struct Program;
  std::unique_ptr<const Program> program_;
};

}  // namespace tool
