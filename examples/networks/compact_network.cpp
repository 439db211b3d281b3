// Walks a network's graph and makes the compact one's, with its tensors.
// SPDX-License-Identifier: Apache-2.0
#include "compact_network.hpp"

#include "contraction.hpp"
#include "read_layer.hpp"
#include "text.hpp"

#include <concertina/layers.hpp>

#include <cmath>
#include <span>
#include <utility>
#include <vector>

namespace tool {

using concertina::Conv;
using concertina::io::Dtype;
using concertina::io::Safetensors;

namespace {

template <class To, class Scalar>
void add_tensor(Safetensors& file, const std::string& name, std::vector<Index> shape,
                std::span<const Scalar> elements) {
  std::vector<To> values;
  values.reserve(elements.size());
  for (const Scalar element : elements) {
    values.push_back(static_cast<To>(element));
    if (!std::isfinite(static_cast<double>(values.back()))) {
      throw concertina::Error(file.origin + ": the contracted " + name + " is not finite in " +
                              std::string(name_of(*concertina::io::dtype_of<To>())) +
                              "; check the layers' elements, or name a --dtype of larger range");
    }
  }
  file.add(name, std::move(shape), values);
}

bool follows_a_layer(const Node& node) {
  return node.kind == Node::Kind::layer &&
         (node.type == LayerType::batch_norm || node.type == LayerType::scale);
}

bool is_layer(const Node& node) {
  return node.kind == Node::Kind::layer &&
         (node.type == LayerType::conv || node.type == LayerType::linear);
}

bool has_weights(const Node& node) {
  return is_layer(node) || std::ranges::any_of(node.parts, has_weights);
}

const Node& first_layer(const Node& node) {
  if (is_layer(node)) return node;
  for (const Node& part : node.parts) {
    if (has_weights(part)) return first_layer(part);
  }
  return node;
}

class Compactor {
 public:
  Compactor(const Safetensors& file, std::optional<Dtype> dtype) : file_(file), dtype_(dtype) {
    result_.file.origin = file.origin;
    result_.file.metadata = file.metadata;
    for (const char* key : {"chain", "conv"}) result_.file.metadata.erase(key);
  }

  CompactNetwork run(const Node& graph) && {
    Node root = node(graph);
    if (root.kind == Node::Kind::layer) {
      Node chain;
      chain.parts.push_back(std::move(root));
      root = std::move(chain);
    }
    result_.file.metadata["chain"] = to_json(root).dump();
    return std::move(result_);
  }

 private:
  Node node(const Node& from) {
    if (becomes_one(from) || is_layer(from)) return contract(from, {});
    if (from.kind == Node::Kind::layer) return copied(from);
    Node to;
    to.kind = from.kind;
    for (std::size_t p = 0; p < from.parts.size(); ++p) {
      const Node& part = from.parts[p];
      if (from.kind == Node::Kind::chain && (becomes_one(part) || is_layer(part))) {
        std::span<const Node> after(from.parts.data() + p + 1, 0);
        while (p + 1 < from.parts.size() && follows_a_layer(from.parts[p + 1])) {
          after = {after.data(), after.size() + 1};
          ++p;
        }
        to.parts.push_back(contract(part, after));
      } else {
        to.parts.push_back(node(part));
      }
    }
    return to;
  }

  /// Whether a node becomes one layer.
  bool becomes_one(const Node& node) const {
    if (node.kind == Node::Kind::layer || !is_linear(node) || !has_weights(node)) return false;
    if (is_expanded(node)) return true;
    try {
      return adds_no_parameters(node);
    } catch (const concertina::FormatError&) {
      return false;  // such as channels that only the whole network tells; its layers are read
                     // alone
    }
  }

  bool adds_no_parameters(const Node& node) const {
    return std::visit(
        [&](const auto& expression) {
          const auto form = concertina::Form(expression);
          return exactness(form).exact() && parameters(form.shape()) <= parameters(file_, node);
        },
        read_linear_map(file_, node, false));
  }

  /// The layer that a node and the batch norms after it are.
  Node contract(const Node& node, std::span<const Node> after) {
    const std::string name = is_expanded(node) ? compact_name(node) : first_layer(node).layer.name;
    Node whole;
    whole.where = node.where;
    whole.parts.push_back(node);
    whole.parts.insert(whole.parts.end(), after.begin(), after.end());
    result_.contracted += is_layer(node) ? 0 : 1;
    result_.folded += std::ssize(after);
    const Dtype layers = dtype_of(file_, whole).value_or(Dtype::F32);
    const bool wide = layers == Dtype::F64 || dtype_ == Dtype::F64;
    return std::visit(
        [&](const auto& expression) {
          require_modest(concertina::Form(expression), file_.origin);
          const auto border = concertina::exactness(expression);
          if (!border) {
            throw concertina::InexactError(node.where + ": no single layer equals this node: " +
                                           border.reason + "; pad its first layer instead");
          }
          const auto layer = contracted(expression);
          add_layer(result_.file, name, layer, dtype_.value_or(compact_dtype(layers)));
          return layer_node(name, layer.shape());
        },
        read_linear_map(file_, whole, wide));
  }

  /// A layer that stays, with its tensors.
  Node copied(Node node) {
    for (const char* suffix : {"weight", "bias", "running_mean", "running_var"}) {
      const std::string name = node.layer.tensor(suffix);
      if (!node.layer.name.empty() && file_.contains(name)) {
        result_.file.tensors.insert_or_assign(name, file_.tensor(name));
      }
    }
    node.expected.reset();  // its layer is not written
    return node;
  }

  const Safetensors& file_;
  std::optional<Dtype> dtype_;
  CompactNetwork result_;
};

}  // namespace

Dtype compact_dtype(Dtype layers) { return layers == Dtype::F64 ? Dtype::F64 : Dtype::F32; }

template <class Scalar, int Rank>
void add_layer(Safetensors& file, const std::string& name, const Conv<Scalar, Rank>& layer,
               Dtype dtype) {
  const std::string prefix = name.empty() ? "" : name + ".";
  std::vector<Index> shape{layer.shape().out, layer.shape().in / layer.shape().groups};
  shape.insert(shape.end(), layer.shape().kernel_size.begin(), layer.shape().kernel_size.end());
  const auto add_all = [&]<class To>(To) {
    add_tensor<To>(file, prefix + "weight", shape, layer.weight());
    if (layer.shape().bias) {
      add_tensor<To>(file, prefix + "bias", {layer.shape().out}, layer.bias());
    }
  };
  switch (dtype) {
    case Dtype::F64: add_all(double{}); break;
    case Dtype::F32: add_all(float{}); break;
    case Dtype::F16: add_all(Eigen::half{}); break;
    default: add_all(Eigen::bfloat16{}); break;
  }
}

CompactNetwork compact_network(const Safetensors& file, const Node& graph,
                               std::optional<Dtype> dtype) {
  return Compactor(file, dtype).run(graph);
}

// clang-format off
#define TOOL_INSTANTIATE(SCALAR, RANK) \
  template void add_layer(Safetensors&, const std::string&, const Conv<SCALAR, RANK>&, Dtype);
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
