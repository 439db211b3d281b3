// Reads descriptions of layers from JSON, with distrust.
// SPDX-License-Identifier: Apache-2.0
#include "layer_description.hpp"

#include "json_fields.hpp"
#include "text.hpp"

namespace tool {
namespace {

using fields::Json, fields::integer, fields::integers, fields::object;
using fields::parse, fields::refuse, fields::string;

/// Takes the geometry's fields; false for any other.
bool read_geometry_field(LayerDescription& layer, const std::string& key, const Json& value,
                         const std::string& where) {
  const std::string place = where + "." + key;
  if (key == "stride") {
    layer.stride = integers(value, place);
  } else if (key == "padding") {
    layer.padding = integers(value, place);
  } else if (key == "padding_end") {
    layer.padding_end = integers(value, place);
  } else if (key == "dilation") {
    layer.dilation = integers(value, place);
  } else if (key == "groups") {
    layer.groups = integer(value, place);
    if (layer.groups < 1)
      refuse(place, "found " + std::to_string(layer.groups) + ", but groups start at 1");
  } else {
    return false;
  }
  return true;
}

}  // namespace

LayerDescription parse_geometry(const Json& value, const std::string& where) {
  LayerDescription layer;
  for (const auto& [key, each] : object(value, where).items()) {
    if (!read_geometry_field(layer, key, each, where)) {
      refuse(where,
             "field " + in_quotes(key) +
                 " is unknown; a geometry has stride, padding, padding_end, dilation and groups");
    }
  }
  return layer;
}

LayerDescription parse_layer(const Json& node, const std::string& where) {
  LayerDescription layer;
  const std::string type = node.contains("type") ? string(node["type"], where + ".type") : "conv";
  if (type != "conv" && type != "linear") {
    refuse(where, "layers of type " + in_quotes(type) +
                      " are not contracted by this version; supported are conv and linear");
  }
  layer.linear = type == "linear";
  if (!node.contains("name"))
    refuse(where, "the layer has no name, so its tensors cannot be found");
  for (const auto& [key, value] : node.items()) {
    if (key == "name") {
      layer.name = string(value, where + ".name");
    } else if (key == "type" || key == "expected" || key == "expected_geometry") {
      continue;
    } else if (!read_geometry_field(layer, key, value, where)) {
      // It might change what the layer does.
      refuse(where, "field " + in_quotes(key) +
                        " of a layer is unknown; supported are name, type, stride, padding, "
                        "padding_end, dilation and groups");
    } else if (layer.linear) {
      refuse(where, "a linear layer has no " + key);
    }
  }
  return layer;
}

}  // namespace tool
