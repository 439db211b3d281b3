// A form as a list of instructions on values: what contracts, differentiates, counts and
// plans for a device follows it.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/detail/chain_order.hpp>

#include <cstddef>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace concertina::detail {

/// Index into a program's values: leaves first, in the order of Form::leaves, then the results of
/// instructions.
using Value = std::size_t;

/// Operands become one layer: two, the one applied first first, multiply; branches are added.
struct Instruction {
  Join join;
  std::vector<Value> operands;
  AnyShape shape;  ///< of the result

  Value inner() const { return operands[0]; }
  Value outer() const { return operands[1]; }
};

/// Each value is an operand of one instruction, but for the last, which is the contraction.
class Program {
 public:
  /// Products in the cheapest order by `cost`; of a chain longer than 32 layers, of each 32 in a
  /// row, and of what these give.
  /// Requires  what contracted_shape checks
  /// Throws    SizeError where a layer would be almost only zeros
  explicit Program(const AnyForm& form, ProductCost cost = processor_cost) {
    form.for_each_leaf([&](const AnyShape& leaf) { leaves_.push_back(leaf); });
    Value leaf = 0;
    add(form, leaf, cost);
  }

  std::span<const AnyShape> leaves() const { return leaves_; }
  std::span<const Instruction> instructions() const { return instructions_; }

  /// The value that is the contraction.
  Value result() const { return leaves_.size() + instructions_.size() - 1; }

  const AnyShape& shape(Value value) const {
    return value < leaves_.size() ? leaves_[value] : instructions_[value - leaves_.size()].shape;
  }

  std::vector<AnyShape> shapes_of(std::span<const Value> values) const {
    std::vector<AnyShape> shapes;
    for (const Value value : values) shapes.push_back(shape(value));
    return shapes;
  }

  /// Of the gradients of all products' factors but fixed ones: two for each forward where there
  /// are none.
  Index backward_multiply_adds() const {
    Index sum = 0;
    for (const Instruction& each : instructions_) {
      if (each.join != Join::chain) continue;
      const AnyShape &outer = shape(each.outer()), &inner = shape(each.inner());
      const Index product = detail::multiply_adds(outer, inner);
      for (const AnyShape* factor : {&outer, &inner}) {
        if (!factor->fixed) sum = checked_add(sum, product, "multiply-adds");
      }
    }
    return sum;
  }

  /// Of all products; additions of branches not counted.
  Index multiply_adds() const {
    Index sum = 0;
    for (const Instruction& each : instructions_) {
      if (each.join != Join::chain) continue;
      sum = checked_add(sum, detail::multiply_adds(shape(each.outer()), shape(each.inner())),
                        "multiply-adds");
    }
    return sum;
  }

 private:
  Value add(const AnyForm& node, Value& leaf, ProductCost cost) {
    if (node.is_leaf()) return leaf++;
    std::vector<Value> parts;
    for (const AnyForm& part : node.parts()) parts.push_back(add(part, leaf, cost));
    if (node.join() == Join::chain) return add_chain(std::move(parts), cost);
    const std::vector<AnyShape> shapes = shapes_of(parts);
    Index elements = 0;
    for (const AnyShape& branch : shapes) elements += weight_numel(branch);
    const AnyShape joined = joined_shape(node.join(), shapes);
    require_few_zeros(joined, elements, [&] { return text({shapes.size(), " branches"}); });
    return emit({node.join(), std::move(parts), joined});
  }

  Value add_chain(std::vector<Value> parts, ProductCost cost) {
    constexpr std::size_t longest = 32;  // the order takes the cube of that many steps
    while (parts.size() > 1) {
      std::vector<Value> products;
      for (std::size_t first = 0; first < parts.size(); first += longest) {
        const auto run =
            std::span<const Value>(parts).subspan(first, std::min(longest, parts.size() - first));
        products.push_back(add_run(ChainOrder(shapes_of(run), cost), run, 0, run.size() - 1));
      }
      parts = std::move(products);
    }
    return parts.front();
  }

  /// Parts first .. last of a chain.
  Value add_run(const ChainOrder& order, std::span<const Value> parts, std::size_t first,
                std::size_t last) {
    if (first == last) return parts[first];
    const std::size_t middle = order.split(first, last);
    const Value inner = add_run(order, parts, first, middle - 1),
                outer = add_run(order, parts, middle, last);
    const AnyShape product = product_shape(shape(outer), shape(inner));
    require_few_zeros(product, detail::multiply_adds(shape(outer), shape(inner)),
                      [&] { return text({shape(outer), " after ", shape(inner)}); });
    return emit({Join::chain, {inner, outer}, product});
  }

  Value emit(Instruction instruction) {
    instructions_.push_back(std::move(instruction));
    return result();
  }

  std::vector<AnyShape> leaves_;
  std::vector<Instruction> instructions_;
};

}  // namespace concertina::detail
