// What becomes of a region if it is contracted, what that costs, and how a chain is best cut.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "onnx/contract_model.hpp"
#include "onnx/layer.hpp"
#include "onnx/regions.hpp"

#include <concertina/detail/form.hpp>

#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace tool {

/// What becomes of a region if it is contracted, decided before that; or why it cannot be.
struct Plan {
  bool possible = false;
  std::string reason, remedy;  // otherwise
  NewLayer layer = {};
  Equality where = Equality::everywhere;
  std::string border = {};
  /// Segments at the source whose factors the layer takes in while their shift stays before it, as
  /// a constant that is added: at the border, padding's zeros are no shifted zeros.
  std::size_t shifted = 0;
  ModelCost before, after;
  double nodes_before = 0, nodes_after = 0;

  /// Of what is best done with the region alone.
  const ModelCost& cost() const { return possible ? after : before; }
};

/// "5,456,640 to 14,751,744".
std::string change(double before, double after);

/// Decides for one region.
class Planner {
 public:
  using Shape = concertina::detail::AnyShape;

  /// What it does is taken from the budget.
  Planner(const Graph& graph, const ModelOptions& options, Budget& budget);

  /// Says that of the nodes, from the last on, those down to this one are planned for.
  void reach(int node) { reached_ = node; }

  Plan plan(Segments segments) const;
  /// The same with the shift of what it begins with left before it.
  Plan plan_with_shift(Segments segments) const;
  ModelCost cost_before(Segments segments) const;
  /// What the layer would cost that has this shape, at least.
  ModelCost least_cost(Segments segments, const Shape& shape) const;
  /// The shape of a segment alone, where that is known and no transposed one.
  std::optional<Shape> shape_of(const Segment& segment) const;

 private:
  template <class Expression>
  void judge(Segments segments, Plan& plan) const;
  Plan plan(Segments segments, std::size_t shifted) const;
  void take(Segments segments, double multiply_adds) const;

  const Graph& graph_;
  const ModelOptions& options_;
  Budget& budget_;
  int reached_;
  std::size_t most_elements_ = 1;             // of a constant
  std::unique_ptr<const double[]> elements_;  // in place of weights: never read, so never in memory
};

/// Segments [begin, end) of a chain, the last applied first.
struct Group {
  std::size_t begin, end;
  Plan plan;
};

inline constexpr std::size_t longest_group = 64;  // segments

/// The cheapest way to cut a chain into groups that are contracted, or single segments that are
/// not.
std::vector<Group> best_groups(Planner& planner, Segments segments, When when);

/// Of the whole graph.
ModelCost cost_of(const LinearGraph& linear);

}  // namespace tool
