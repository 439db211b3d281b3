// ONNX models with their linear regions contracted: what is merged, what it saves, why the rest is
// left.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "onnx/graph.hpp"

#include <concertina/expression.hpp>  // Join

#include <cstdint>
#include <string>
#include <vector>

namespace tool {

/// When a region is contracted.
enum class When {
  smaller,  ///< neither parameters nor multiply-adds grow
  faster,   ///< multiply-adds do not grow
  always
};

/// Where a layer must equal its region.
enum class Equality {
  everywhere,  ///< at every input size
  size,        ///< or at the model's, where that is known
  interior     ///< or off the border
};

struct ModelOptions {
  GraphOptions graph = {};
  When when = When::smaller;
  Equality equality = Equality::size;
  std::vector<std::string> only = {};  ///< regions that make these tensors, or hold these nodes
  bool tap_norms = false;              ///< those of regions are wanted
};

/// Layers joined, as a picture shows them.
struct TapNorms {
  concertina::Join join = concertina::Join::none;
  std::vector<TapNorms> parts = {};  ///< the first applied first
  std::string layer = {};            ///< what it is, if it is one
  Dims kernel = {};                  ///< its size along two axes or three
  std::vector<double> norms = {};    ///< of each tap's weights, all channels together
};

/// Elements of constants, and multiply-adds of one pass at the model's size (an assumed one where
/// it is not known): a tap for each element that a convolution or linear layer writes, 1 for a bias
/// or an addition, 2 for a batch norm.
struct ModelCost {
  double parameters = 0, multiply_adds = 0;
};

/// One region that became one layer.
struct ContractedRegion {
  std::string source, result;      ///< tensors
  std::vector<std::string> nodes;  ///< that it was; by output where they have no name
  std::string layer;               ///< what it is
  Equality where = Equality::everywhere;
  std::string border;  ///< in words, where it is not everywhere
  ModelCost before, after;
  TapNorms taps_before = {}, taps_after = {};  ///< where wanted; none of transposed layers
};

/// Where linear nodes meet that stay apart, or a node that is not taken for linear.
struct LeftAlone {
  std::string where, reason, remedy;
};

struct ContractedModel {
  onnx::Model model;
  std::vector<ContractedRegion> regions;
  std::vector<LeftAlone> left;
  ModelCost before, after;
  bool assumed_size = false;  ///< the costs are for a size that the model does not state
};

/// The model with every region contracted for which that pays.
/// Ensures   the same outputs before rounding, where each region says; tensors that stay keep their
///           names; nodes, attributes and constants that no region takes in are untouched
/// Throws    FormatError, UsageError as Graph does; UsageError for names in `only` that
///           the graph does not have; NumericalError naming the region for weights that are not
///           finite
ContractedModel contract_model(const onnx::Model& model, const ModelOptions& options);

}  // namespace tool
