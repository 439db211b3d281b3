// A graph's linear nodes as expressions, at the rank and precision that are known when they are
// read.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "graph.hpp"

#include <concertina/expression.hpp>
#include <concertina/io/safetensors.hpp>

#include <optional>
#include <variant>
#include <vector>

namespace tool {

template <class Scalar, int Rank>
using Expr = concertina::Expr<Scalar, Rank>;

using AnyExpression =
    std::variant<Expr<float, 0>, Expr<float, 1>, Expr<float, 2>, Expr<float, 3>, Expr<double, 0>,
                 Expr<double, 1>, Expr<double, 2>, Expr<double, 3>>;

/// The widest dtype of a node's tensors; none for a node without any. Throws FormatError for a
/// dtype that layers do not have.
std::optional<concertina::io::Dtype> dtype_of(const concertina::io::Safetensors& file,
                                              const Node& node);

/// Spatial axes of a linear node's layers, those of the first that tells; 2 if none does.
int rank_of(const concertina::io::Safetensors& file, const Node& node);

/// A linear node with its elements. `channels` are those of its input, needed where its first layer
/// does not tell them.
/// Throws  FormatError, ShapeError or NumericalError naming the node
template <class Scalar, int Rank>
Expr<Scalar, Rank> read_linear_map(const concertina::io::Safetensors& file, const Node& node,
                                   std::optional<Index> channels = {});

/// The same at its own rank, in double where asked for.
AnyExpression read_linear_map(const concertina::io::Safetensors& file, const Node& node, bool wide,
                              std::optional<Index> channels = {});

/// The outermost nodes that stand for one layer, in order: those that is_expanded finds.
std::vector<const Node*> expanded_nodes(const Node& graph);

/// Numbers that a node's layers hold.
Index parameters(const concertina::io::Safetensors& file, const Node& node);

}  // namespace tool
