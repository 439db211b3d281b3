// From nodes to expressions.
// SPDX-License-Identifier: Apache-2.0
#include "linear_map.hpp"

#include "read_layer.hpp"
#include "text.hpp"

#include <concertina/layers.hpp>

#include <algorithm>
#include <array>

namespace tool {

using concertina::io::Dtype;
using concertina::io::Safetensors;

namespace {

constexpr std::array suffixes{"weight", "bias", "running_mean", "running_var"};

/// Tensors that a layer owns, of those that the file has.
std::vector<std::string> tensors_of(const Safetensors& file, const Node& node) {
  std::vector<std::string> names;
  if (node.kind != Node::Kind::layer) return names;
  const bool named = node.type == LayerType::conv || node.type == LayerType::linear ||
                     node.type == LayerType::conv_transpose || node.type == LayerType::batch_norm ||
                     node.type == LayerType::scale;
  for (const char* suffix : suffixes) {
    const std::string name = node.layer.tensor(suffix);
    if (named && file.contains(name)) names.push_back(name);
  }
  return names;
}

/// The nodes that `is` holds for and that are in no other such, in order.
template <class Is>
std::vector<const Node*> outermost(const Node& graph, const Is& is) {
  if (is(graph)) return {&graph};
  std::vector<const Node*> nodes;
  for (const Node& part : graph.parts) {
    const auto more = outermost(part, is);
    nodes.insert(nodes.end(), more.begin(), more.end());
  }
  return nodes;
}

/// One element per channel.
template <class Scalar>
std::vector<Scalar> channel_elements(const Safetensors& file, const Node& node, const char* suffix,
                                     bool optional = false) {
  const std::string name = node.layer.tensor(suffix);
  if (optional && !file.contains(name)) return {};
  if (file.tensor(name).shape.size() != 1) {
    throw concertina::FormatError(node.where + ": tensor " + in_quotes(name) +
                                  " is not a list of one element for each channel");
  }
  return finite_values<Scalar>(file, name, node.where);
}

template <class Scalar, int Rank>
class Reader {
 public:
  explicit Reader(const Safetensors& file) : file_(file) {}

  Expr<Scalar, Rank> node(const Node& node, std::optional<Index> channels) const {
    switch (node.kind) {
      case Node::Kind::layer: return layer(node, channels);
      case Node::Kind::chain: return chain(node, channels);
      case Node::Kind::sum: return branches(concertina::Join::sum, node, channels);
      case Node::Kind::concat: break;
    }
    return branches(concertina::Join::concat_outputs, node, channels);
  }

 private:
  using Parts = std::vector<Expr<Scalar, Rank>>;

  static Index writes(const Expr<Scalar, Rank>& part) {
    return concertina::detail::channels(part.tree()).out;
  }
  static Index reads(const Expr<Scalar, Rank>& part) {
    return concertina::detail::channels(part.tree()).in;
  }

  static Index known(std::optional<Index> channels, const Node& node) {
    if (channels) return *channels;
    throw concertina::FormatError(
        node.where + ": it has no layers that tell how many channels it reads; put one before it");
  }

  Expr<Scalar, Rank> chain(const Node& node, std::optional<Index> channels) const {
    if (node.parts.empty()) return concertina::identity<Scalar>(known(channels, node));
    constexpr std::size_t longest = 256;  // the cheapest order takes the length cubed to find
    if (node.parts.size() > longest) {
      throw concertina::FormatError(node.where + ": a chain of more than " +
                                    std::to_string(longest) + " layers");
    }
    Parts parts;
    for (const Node& part : node.parts) {
      parts.push_back(this->node(part, channels));
      channels = writes(parts.back());
    }
    return joined(concertina::Join::chain, node, std::move(parts));
  }

  /// A branch that tells its channels tells them for all.
  Expr<Scalar, Rank> branches(concertina::Join join, const Node& node,
                              std::optional<Index> channels) const {
    for (std::size_t b = 0; !channels && b < node.parts.size(); ++b) {
      try {
        channels = reads(this->node(node.parts[b], std::nullopt));
      } catch (const concertina::FormatError&) {
        if (b + 1 == node.parts.size()) throw;
      }
    }
    Parts parts;
    for (const Node& part : node.parts) parts.push_back(this->node(part, channels));
    return joined(join, node, std::move(parts));
  }

  static Expr<Scalar, Rank> joined(concertina::Join join, const Node& node, Parts parts) try {
    return {join, std::move(parts)};
  } catch (const concertina::ShapeError& error) {
    throw concertina::ShapeError(located(node, error.what()));
  }

  concertina::PerAxis<Rank> per_axis(const std::vector<Index>& values, const Node& node) const {
    LayerDescription as_stride;
    as_stride.stride = values;
    return geometry_of<Rank>(as_stride, node.where).stride;
  }

  Expr<Scalar, Rank> layer(const Node& node, std::optional<Index> channels) const try {
    switch (node.type) {
      case LayerType::conv:
      case LayerType::linear: return read_layer<Scalar, Rank>(file_, node.layer);
      case LayerType::batch_norm:
        return concertina::batch_norm<Scalar>(
            {.running_mean = channel_elements<Scalar>(file_, node, "running_mean"),
             .running_var = channel_elements<Scalar>(file_, node, "running_var"),
             .weight = channel_elements<Scalar>(file_, node, "weight", true),
             .bias = channel_elements<Scalar>(file_, node, "bias", true),
             .eps = node.eps});
      case LayerType::scale:
        return concertina::channel_scale(channel_elements<Scalar>(file_, node, "weight"));
      case LayerType::avg_pool: {
        const auto geometry = geometry_of<Rank>(node.layer, node.where);
        return concertina::average_pool<Scalar, Rank>(
            known(channels, node), per_axis(node.kernel, node), geometry.stride, geometry.padding);
      }
      case LayerType::channel_shuffle:
        return concertina::channel_shuffle<Scalar>(known(channels, node), node.layer.groups);
      case LayerType::channel_slice: {
        std::vector<Index> source;
        for (Index c = node.begin; c < std::min(node.end, known(channels, node) + 1); ++c) {
          source.push_back(c);
        }
        return concertina::channel_select<Scalar>(*channels, std::move(source));
      }
      default: break;
    }
    throw concertina::FormatError(node.where + ": a layer of type " +
                                  in_quotes(name_of(node.type)) +
                                  " is not linear and cannot be contracted");
  } catch (const concertina::ShapeError& error) {
    throw concertina::ShapeError(located(node, error.what()));
  } catch (const concertina::NumericalError& error) {
    throw concertina::NumericalError(located(node, error.what()));
  }

  static std::string located(const Node& node, const std::string& what) {
    const std::string name = node.layer.name.empty() ? "" : in_quotes(node.layer.name) + ": ";
    return what.starts_with(node.where) ? what : node.where + ": " + name + what;
  }

  const Safetensors& file_;
};

}  // namespace

std::optional<Dtype> dtype_of(const Safetensors& file, const Node& node) {
  std::optional<Dtype> widest;
  for_each_layer(node, [&](const Node& layer) {
    for (const std::string& name : tensors_of(file, layer)) {
      const Dtype dtype = supported_dtype(file, name);
      if (!widest || size_of(dtype) > size_of(*widest)) widest = dtype;
    }
  });
  return widest;
}

int rank_of(const Safetensors& file, const Node& node) {
  std::optional<int> rank;
  for_each_layer(node, [&](const Node& layer) {
    if (rank) return;
    if (layer.type == LayerType::conv || layer.type == LayerType::linear) {
      rank = rank_of_layer(file, layer.layer);
    } else if (layer.type == LayerType::avg_pool && layer.kernel.size() > 1) {
      rank = static_cast<int>(layer.kernel.size());
    }
  });
  return rank.value_or(2);
}

template <class Scalar, int Rank>
Expr<Scalar, Rank> read_linear_map(const Safetensors& file, const Node& node,
                                   std::optional<Index> channels) {
  return Reader<Scalar, Rank>(file).node(node, channels);
}

AnyExpression read_linear_map(const Safetensors& file, const Node& node, bool wide,
                              std::optional<Index> channels) {
  const auto read = [&]<class Scalar>(Scalar) -> AnyExpression {
    switch (rank_of(file, node)) {
      case 0: return read_linear_map<Scalar, 0>(file, node, channels);
      case 1: return read_linear_map<Scalar, 1>(file, node, channels);
      case 2: return read_linear_map<Scalar, 2>(file, node, channels);
      default: return read_linear_map<Scalar, 3>(file, node, channels);
    }
  };
  return wide ? read(double{}) : read(float{});
}

std::vector<const Node*> expanded_nodes(const Node& graph) { return outermost(graph, is_expanded); }

Index parameters(const Safetensors& file, const Node& node) {
  Index sum = 0;
  for_each_layer(node, [&](const Node& layer) {
    for (const std::string& name : tensors_of(file, layer)) {
      const auto& shape = file.tensor(name).shape;
      Index elements = 1;
      for (const Index extent : shape) elements *= extent;
      sum += elements;
    }
  });
  return sum;
}

// clang-format off
#define TOOL_INSTANTIATE(SCALAR, RANK) \
  template Expr<SCALAR, RANK> read_linear_map(const Safetensors&, const Node&, std::optional<Index>);
// clang-format on
TOOL_INSTANTIATE(float, 0)
TOOL_INSTANTIATE(float, 1)
TOOL_INSTANTIATE(float, 2)
TOOL_INSTANTIATE(float, 3)
TOOL_INSTANTIATE(double, 0)
TOOL_INSTANTIATE(double, 1)
TOOL_INSTANTIATE(double, 2)
TOOL_INSTANTIATE(double, 3)
#undef TOOL_INSTANTIATE

}  // namespace tool
