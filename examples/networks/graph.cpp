// Reads the description of a network from JSON, with distrust.
// SPDX-License-Identifier: Apache-2.0
#include "graph.hpp"

#include "json_fields.hpp"
#include "text.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <initializer_list>
#include <span>
#include <utility>

namespace tool {
namespace {

using fields::integer, fields::integers, fields::Json, fields::refuse, fields::string;

constexpr int deepest = 32;                  // nodes within nodes
constexpr Index longest_window = 1 << 12;    // of a pool, along an axis; a file costs it nothing
constexpr std::size_t most_nodes = 1 << 16;  // each takes some hundred bytes, in the file ten

constexpr std::array<std::string_view, 15> type_names = {
    "conv",           "linear",          "batch_norm",    "scale",           "avg_pool",
    "max_pool",       "global_avg_pool", "relu",          "relu6",           "leaky_relu",
    "conv_transpose", "flatten",         "channel_slice", "channel_shuffle", "normalize"};
static_assert(type_names[static_cast<std::size_t>(LayerType::normalize)] == "normalize");

/// The fields of a layer that parse_layer does not read.
std::vector<std::string_view> fields_of(LayerType type) {
  switch (type) {
    case LayerType::batch_norm: return {"name", "eps"};
    case LayerType::scale: return {"name"};
    case LayerType::leaky_relu: return {"negative_slope"};
    case LayerType::conv_transpose: return {"name", "stride"};
    case LayerType::avg_pool:
      return {"kernel", "stride", "padding", "ceil_mode", "count_include_pad"};
    case LayerType::max_pool: return {"kernel", "stride", "padding"};
    case LayerType::channel_slice: return {"begin", "end"};
    case LayerType::channel_shuffle: return {"groups"};
    case LayerType::normalize: return {"divide", "mean", "std"};
    default: return {};
  }
}

bool is_one_of(std::string_view key, std::span<const std::string_view> keys) {
  return std::ranges::find(keys, key) != keys.end();
}

void require_positive(const std::vector<Index>& values, const std::string& where) {
  for (const Index value : values) {
    if (value < 1) refuse(where, "found " + std::to_string(value) + ", expected at least 1");
  }
}

void require_positive_geometry(const LayerDescription& layer, const std::string& where) {
  require_positive(layer.stride, where + ".stride");
  require_positive(layer.dilation, where + ".dilation");
}

class GraphParser {
 public:
  Node node(const Json& json, const std::string& where, int depth) {
    fields::object(json, where);
    if (++nodes_ > most_nodes) {
      refuse(where, "the network has more than " + std::to_string(most_nodes) + " nodes");
    }
    Node node = json.contains("kind") ? composite(json, where, depth) : layer(json, where);
    node.where = where;
    node.expected = expectation(json, where);
    return node;
  }

 private:
  Node composite(const Json& json, const std::string& where, int depth) {
    const std::string kind = string(json["kind"], where + ".kind");
    Node node;
    node.kind = kind == "chain"    ? Node::Kind::chain
                : kind == "sum"    ? Node::Kind::sum
                : kind == "concat" ? Node::Kind::concat
                                   : Node::Kind::layer;
    if (node.kind == Node::Kind::layer) {
      refuse(where, "nodes of kind " + in_quotes(kind) +
                        " are unknown; supported are chain, sum and concat, and layers without a "
                        "kind");
    }
    if (depth >= deepest) {
      refuse(where, "nodes are nested more than " + std::to_string(deepest) + " deep");
    }
    const std::string list = node.kind == Node::Kind::chain ? "layers" : "branches";
    for (const auto& [key, value] : json.items()) {
      if (key == "exact" && depth == 0) {
        const std::string claim = string(value, where + ".exact");
        if (claim != "interior" && claim != "everywhere") {
          refuse(where + ".exact",
                 "found " + in_quotes(claim) + R"(, expected "interior" or "everywhere")");
        }
        node.exact = claim == "everywhere";
      } else if (key == "name" && node.kind == Node::Kind::chain) {
        node.layer.name = string(value, where + ".name");
        if (node.layer.name.empty() || json.contains("expected")) {
          refuse(where + ".name",
                 "a chain is named for the layer that it contracts to, unless "
                 "that is expected; found " +
                     in_quotes(node.layer.name) +
                     (json.contains("expected") ? " and an expected layer" : ""));
        }
      } else if (key != "kind" && key != list && key != "expected" && key != "expected_geometry") {
        refuse(where, "field " + in_quotes(key) + " of a " + kind +
                          " is unknown; supported are kind, " + list +
                          (node.kind == Node::Kind::chain ? ", name" : "") +
                          ", expected and expected_geometry, and exact at the root");
      }
    }
    if (!json.contains(list) || !json[list].is_array()) {
      refuse(where, "a " + kind + " needs a list of " + list);
    }
    if (node.kind != Node::Kind::chain && json[list].empty()) {
      refuse(where, "a " + kind + " needs at least one branch");
    }
    for (const Json& part : json[list]) {
      const std::string index = "[" + std::to_string(node.parts.size()) + "]";
      node.parts.push_back(this->node(part, where + "." + list + index, depth + 1));
    }
    return node;
  }

  static std::optional<Expectation> expectation(const Json& json, const std::string& where) {
    const auto geometry = json.find("expected_geometry");
    if (!json.contains("expected")) {
      if (geometry == json.end()) return std::nullopt;
      refuse(where, R"(there is an expected_geometry, but no field "expected" to name the layer)");
    }
    Expectation expected;
    expected.has_geometry = geometry != json.end();
    if (expected.has_geometry && !geometry->is_null()) {
      expected.layer = parse_geometry(*geometry, where + ".expected_geometry");
      require_positive_geometry(expected.layer, where + ".expected_geometry");
    }
    expected.layer.linear = expected.has_geometry && geometry->is_null();
    expected.layer.name = string(json["expected"], where + ".expected");
    return expected;
  }

  static LayerType layer_type(const Json& json, const std::string& where) {
    if (!json.contains("type")) return LayerType::conv;
    const std::string type = string(json["type"], where + ".type");
    const auto found = std::ranges::find(type_names, type);
    if (found == type_names.end()) {
      refuse(where, "layers of type " + in_quotes(type) + " are unknown; supported are " +
                        listed(type_names));
    }
    return static_cast<LayerType>(found - type_names.begin());
  }

  static Node layer(const Json& json, const std::string& where) {
    Node node;
    node.kind = Node::Kind::layer;
    node.type = layer_type(json, where);
    if (node.type == LayerType::conv || node.type == LayerType::linear) {
      node.layer = parse_layer(json, where);
      require_positive_geometry(node.layer, where);
      return node;
    }
    const std::string a_layer = "a layer of type " + std::string(name_of(node.type));
    const std::vector<std::string_view> known = fields_of(node.type);
    for (const auto& [key, value] : json.items()) {
      if (key == "type" || key == "expected" || key == "expected_geometry") continue;
      if (!is_one_of(key, known)) {  // it might change what the layer does
        refuse(where, "field " + in_quotes(key) + " of " + a_layer + " is unknown; " +
                          (known.empty() ? "it has none" : "supported are " + listed(known)));
      }
      read_field(node, key, value, where + "." + key);
    }
    for (const std::string_view key : known) {
      if (!is_optional(key) && !json.contains(key)) {
        refuse(where, a_layer + " needs the field " + std::string(key));
      }
    }
    finish(node, where);
    return node;
  }

  static bool is_optional(std::string_view key) {
    constexpr std::array<std::string_view, 4> optional = {"stride", "padding", "ceil_mode",
                                                          "count_include_pad"};
    return is_one_of(key, optional);
  }

  static void read_field(Node& node, const std::string& key, const Json& value,
                         const std::string& place) {
    if (key == "name") {
      node.layer.name = string(value, place);
    } else if (key == "kernel") {
      node.kernel = integers(value, place);
      if (node.kernel.empty()) refuse(place, "found no number, expected one for each axis");
      require_positive(node.kernel, place);
      if (std::ranges::max(node.kernel) > longest_window) {
        refuse(place, "found " + std::to_string(std::ranges::max(node.kernel)) +
                          ", expected at most " + std::to_string(longest_window));
      }
    } else if (key == "stride") {
      node.layer.stride = integers(value, place);
      require_positive(node.layer.stride, place);
    } else if (key == "padding") {
      node.layer.padding = integers(value, place);
    } else if (key == "groups") {
      node.layer.groups = integer(value, place);
      require_positive({node.layer.groups}, place);
    } else if (key == "begin") {
      node.begin = integer(value, place);
    } else if (key == "end") {
      node.end = integer(value, place);
    } else if (key == "eps") {
      node.eps = fields::number(value, place);
    } else if (key == "negative_slope") {
      node.negative_slope = fields::number(value, place);
      if (std::abs(node.negative_slope) > 1e6) {
        refuse(place, "found " + shown(value) + ", expected a slope of at most a million");
      }
    } else if (key == "divide") {
      node.divide = fields::number(value, place);
    } else if (key == "mean") {
      node.mean = fields::numbers(value, place);
    } else if (key == "std") {
      node.std = fields::numbers(value, place);
    } else if (key == "ceil_mode") {
      if (fields::boolean(value, place)) {
        refuse(place,
               "true is not supported: windows that hang over the end are no linear layer "
               "with zero padding");
      }
    } else if (!fields::boolean(value, place)) {  // count_include_pad
      refuse(place,
             "false is not supported: a mean that leaves padding out is no linear layer "
             "with zero padding");
    }
  }

  /// What fields must be to each other.
  static void finish(Node& node, const std::string& where) {
    const std::vector<Index>& kernel = node.kernel;
    const std::vector<Index>& padding = node.layer.padding;
    if (node.type == LayerType::avg_pool || node.type == LayerType::max_pool) {
      // As in PyTorch; LayerDescription would take no stride for 1.
      if (node.layer.stride.empty()) node.layer.stride = kernel;
    }
    if (node.type == LayerType::max_pool) {
      for (std::size_t i = 0; i < std::max(kernel.size(), padding.size()) && !padding.empty();
           ++i) {
        const Index pad = padding[std::min(i, padding.size() - 1)];
        if (pad < 0 || pad > kernel[std::min(i, kernel.size() - 1)] / 2) {
          refuse(where + ".padding", "found " + std::to_string(pad) +
                                         ", expected 0 to half of the kernel, so that no window is "
                                         "all padding");
        }
      }
    } else if (node.type == LayerType::channel_slice &&
               (node.begin < 0 || node.begin >= node.end)) {
      refuse(where, "channels " + std::to_string(node.begin) + " <= c < " +
                        std::to_string(node.end) + " are none; expected 0 <= begin < end");
    } else if (node.type == LayerType::normalize) {
      if (node.mean.empty() || node.mean.size() != node.std.size()) {
        refuse(where, "there are " + std::to_string(node.mean.size()) + " numbers in mean and " +
                          std::to_string(node.std.size()) +
                          " in std; expected one of each per channel");
      }
      if (node.divide == 0 || std::ranges::count(node.std, 0.0) > 0) {
        refuse(where, "divide or std is zero");
      }
    }
  }

  std::size_t nodes_ = 0;
};

}  // namespace

Node parse_graph(const concertina::io::Safetensors& file) {
  if (const auto text = file.metadata.find("chain"); text != file.metadata.end()) {
    const std::string where = file.origin + R"(: metadata "chain")";
    return GraphParser().node(fields::parse(text->second, where), where, 0);
  }
  if (const auto conv = file.metadata.find("conv"); conv != file.metadata.end()) {
    Node node;
    node.kind = Node::Kind::layer;
    node.where = file.origin + R"(: metadata "conv")";
    node.layer = parse_geometry(fields::parse(conv->second, node.where), node.where);
    require_positive_geometry(node.layer, node.where);
    return node;
  }
  refuse(file.origin,
         "there is no metadata \"chain\" or \"conv\", which would describe a network; name layers "
         "with --chain 'conv1,conv2:s2p1', see --help of the subcommand for its grammar");
}

nlohmann::json to_json(const Node& node) {
  using Kind = Node::Kind;
  if (node.kind != Kind::layer) {
    const char* kind = node.kind == Kind::chain ? "chain"
                       : node.kind == Kind::sum ? "sum"
                                                : "concat";
    nlohmann::json parts = nlohmann::json::array();
    for (const Node& part : node.parts) parts.push_back(to_json(part));
    nlohmann::json json{{"kind", kind}};
    if (!node.layer.name.empty()) json["name"] = node.layer.name;
    json[node.kind == Kind::chain ? "layers" : "branches"] = std::move(parts);
    return json;
  }
  nlohmann::json json{{"type", name_of(node.type)}};
  const LayerDescription& layer = node.layer;
  const auto add = [&json](const char* key, const std::vector<Index>& values) {
    if (!values.empty()) json[key] = values;
  };
  if (!layer.name.empty()) json["name"] = layer.name;
  add("stride", layer.stride);
  add("padding", layer.padding);
  switch (node.type) {
    case LayerType::conv:
      add("padding_end", layer.padding_end);
      add("dilation", layer.dilation);
      json["groups"] = layer.groups;
      break;
    case LayerType::avg_pool:
    case LayerType::max_pool: add("kernel", node.kernel); break;
    case LayerType::channel_shuffle: json["groups"] = layer.groups; break;
    case LayerType::batch_norm: json["eps"] = node.eps; break;
    case LayerType::leaky_relu: json["negative_slope"] = node.negative_slope; break;
    case LayerType::channel_slice:
      json["begin"] = node.begin;
      json["end"] = node.end;
      break;
    case LayerType::normalize:
      json["divide"] = node.divide;
      json["mean"] = node.mean;
      json["std"] = node.std;
      break;
    default: break;
  }
  return json;
}

bool is_linear(const Node& node) {
  if (node.kind != Node::Kind::layer) return std::ranges::all_of(node.parts, is_linear);
  switch (node.type) {
    case LayerType::conv:
    case LayerType::linear:
    case LayerType::batch_norm:
    case LayerType::scale:
    case LayerType::avg_pool:
    case LayerType::channel_slice:
    case LayerType::channel_shuffle: return true;
    default: return false;
  }
}

bool is_expanded(const Node& node) {
  return node.expected || (node.kind == Node::Kind::chain && !node.layer.name.empty());
}

const std::string& compact_name(const Node& node) {
  return node.expected ? node.expected->layer.name : node.layer.name;
}

std::string_view name_of(LayerType type) { return type_names[static_cast<std::size_t>(type)]; }

}  // namespace tool
