// Matrix products.
// SPDX-License-Identifier: Apache-2.0
#include "operators.hpp"

#include "matrix.hpp"

namespace tool::evaluation {
namespace {

/// Batches of matrices, broadcast; a vector is a row on the left, a column on the right.
template <class Scalar>
Array<Scalar> multiply(const Array<Scalar>& a, const Array<Scalar>& b) {
  if (a.shape.empty() || b.shape.empty()) {
    refuse("scalars, " + to_text(a.shape) + " and " + to_text(b.shape) + ", are no matrices");
  }
  Shape left = a.shape, right = b.shape;
  if (left.size() == 1) left.insert(left.begin(), 1);
  if (right.size() == 1) right.push_back(1);
  const Index depth = left.back(), columns = right.back();
  if (right[right.size() - 2] != depth) {
    refuse(to_text(a.shape) + " and " + to_text(b.shape) + " cannot be multiplied");
  }
  if (right.size() == 2) {  // one matrix for every row
    const Index rows = count({left.data(), left.size() - 1});
    left = {rows, depth};
  }
  const Index rows = left[left.size() - 2];
  left.resize(left.size() - 2);
  right.resize(right.size() - 2);
  const Shape batch = broadcast(left, right);
  auto shape = batch;
  shape.insert(shape.end(), {rows, columns});
  auto y = zeros<Scalar>(shape);
  spend(each_product * static_cast<double>(y.values.size()) * static_cast<double>(depth) +
        each_matrix * static_cast<double>(count(batch)));
  Scalar* to = y.values.data();
  for_each_run<2>(
      batch, {broadcast_strides(left, batch), broadcast_strides(right, batch)},
      [&](const auto& offsets, Index length, const auto& steps) {
        for (Index i = 0; i < length; ++i, to += rows * columns) {
          const Scalar* p = a.values.data() + (offsets[0] + i * steps[0]) * rows * depth;
          const Scalar* q = b.values.data() + (offsets[1] + i * steps[1]) * depth * columns;
          matrix(to, rows, columns).noalias() = matrix(p, rows, depth) * matrix(q, depth, columns);
        }
      });
  y.shape = a.shape;
  y.shape.pop_back();
  if (b.shape.size() > 2) {
    y.shape = batch;
    if (a.shape.size() > 1) y.shape.push_back(rows);
  }
  if (b.shape.size() > 1) y.shape.push_back(columns);
  return y;
}

Step gemm(const Definition& of) {
  const auto alpha = of.node.real("alpha", 1), beta = of.node.real("beta", 1);
  const bool first = of.node.integer("transA", 0) != 0, second = of.node.integer("transB", 0) != 0;
  return of_floats([=]<class Scalar>(Arguments& in) {
    const auto &a = in.as<Scalar>(0), &b = in.as<Scalar>(1);
    if (a.shape.size() != 2 || b.shape.size() != 2 || a.shape[!first] != b.shape[second]) {
      refuse("its matrices " + to_text(a.shape) + " and " + to_text(b.shape) + " do not fit");
    }
    auto y = zeros<Scalar>({a.shape[first], b.shape[!second]});
    spend(each_product * static_cast<double>(y.values.size()) *
          static_cast<double>(a.shape[!first]));
    auto product = matrix(y.values.data(), y.shape[0], y.shape[1]);
    const auto left = matrix(a.values.data(), a.shape[0], a.shape[1]);
    const auto right = matrix(b.values.data(), b.shape[0], b.shape[1]);
    if (first) {
      if (second) {
        product.noalias() = left.transpose() * right.transpose();
      } else {
        product.noalias() = left.transpose() * right;
      }
    } else if (second) {
      product.noalias() = left * right.transpose();
    } else {
      product.noalias() = left * right;
    }
    if (alpha != 1) product *= static_cast<Scalar>(alpha);
    if (in.has(2)) {
      const auto& c = in.as<Scalar>(2);
      if (broadcast(c.shape, y.shape) != y.shape) {
        refuse("a bias of " + to_text(c.shape) + " for " + to_text(y.shape));
      }
      combine(
          y, c, y.shape, y.values.data(),
          [factor = static_cast<Scalar>(beta)](auto x, auto bias) { return x + factor * bias; });
    }
    return y;
  });
}

}  // namespace

void add_products(Operators& operators) {
  operators.insert({
      {"Gemm", {2, 3, "alpha beta transA transB", gemm}},
      {"MatMul",
       {2, 2, "",
        [](const Definition&) {
          return of_floats([]<class Scalar>(Arguments& in) {
            return multiply(in.as<Scalar>(0), in.as<Scalar>(1));
          });
        }}},
  });
}

}  // namespace tool::evaluation
