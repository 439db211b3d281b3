// What becomes of a region if it is contracted, what that costs, and how a chain is best cut.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "onnx/contract_model.hpp"
#include "onnx/layer.hpp"
#include "onnx/regions.hpp"

#include <memory>
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
  Planner(const Graph& graph, const ModelOptions& options);

  Plan plan(Segments segments) const;
  /// The same with the shift of what it begins with left before it.
  Plan plan_with_shift(Segments segments) const;

 private:
  template <class Expression>
  void judge(Segments segments, Plan& plan) const;
  Plan plan(Segments segments, std::size_t shifted) const;

  const Graph& graph_;
  const ModelOptions& options_;
  std::size_t most_elements_ = 1;             // of a constant
  std::unique_ptr<const double[]> elements_;  // in place of weights: never read, so never in memory
};

/// Segments [begin, end) of a chain, the last applied first.
struct Group {
  std::size_t begin, end;
  Plan plan;
};

/// The cheapest way to cut a chain into groups that are contracted, or single segments that are
/// not.
std::vector<Group> best_groups(const Planner& planner, Segments segments, When when);

/// Of the whole graph.
ModelCost cost_of(const LinearGraph& linear);

}  // namespace tool
