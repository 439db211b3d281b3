// Reads descriptions of layers from JSON and from the command line, with distrust.
// SPDX-License-Identifier: Apache-2.0
#include "layer_description.hpp"

#include "json_fields.hpp"
#include "text.hpp"

#include <algorithm>
#include <array>
#include <charconv>
#include <string_view>

namespace tool {
namespace {

using fields::Json, fields::integer, fields::integers, fields::is_modest, fields::object;
using fields::parse, fields::refuse, fields::string;

constexpr std::size_t longest_chain = 256;  // the order of a chain takes its length cubed to find

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

std::vector<LayerDescription> named_chain(const std::string& text) {
  std::vector<LayerDescription> chain;
  const auto fail = [&](std::string_view layer, const std::string& why) {
    throw UsageError("--chain: layer " + in_quotes(layer) + ": " + why +
                     "; expected NAME or NAME:s2p1e0d1g4");
  };
  for (std::size_t begin = 0; begin <= text.size();) {
    const std::size_t end = std::min(text.find(',', begin), text.size());
    const std::string_view item = std::string_view(text).substr(begin, end - begin);
    begin = end + 1;
    const std::size_t colon = item.rfind(':');
    LayerDescription layer;
    layer.name = item.substr(0, colon);
    if (layer.name.empty()) fail(item, "there is no name");
    std::string_view rest =
        colon == std::string_view::npos ? std::string_view() : item.substr(colon + 1);
    if (colon != std::string_view::npos && rest.empty())
      fail(item, "there is nothing after the colon");
    std::string seen;
    while (!rest.empty()) {
      const char letter = rest.front();
      if (std::string_view("spedg").find(letter) == std::string_view::npos) {
        fail(item,
             "found " + in_quotes(rest) + " where one of the letters s, p, e, d, g should be");
      }
      if (seen.find(letter) != std::string::npos)
        fail(item, "the letter " + in_quotes({&letter, 1}) + " is there twice");
      seen += letter;
      std::vector<Index> values;
      do {
        rest.remove_prefix(1);
        Index value = 0;
        const auto [stop, error] = std::from_chars(rest.data(), rest.data() + rest.size(), value);
        if (error != std::errc() || !is_modest(value))
          fail(item, "found " + in_quotes(rest) + " where an integer of at most 2^40 should be");
        rest.remove_prefix(static_cast<std::size_t>(stop - rest.data()));
        values.push_back(value);
      } while (rest.starts_with('x') && values.size() < 3);
      if (letter == 'g') {
        if (values.size() != 1 || values.front() < 1) fail(item, "groups are one positive integer");
        layer.groups = values.front();
      } else {
        (letter == 's'   ? layer.stride
         : letter == 'p' ? layer.padding
         : letter == 'e' ? layer.padding_end
                         : layer.dilation) = values;
      }
    }
    chain.push_back(std::move(layer));
    if (chain.size() > longest_chain) {
      throw UsageError("--chain: more than " + std::to_string(longest_chain) + " layers");
    }
  }
  return chain;
}

}  // namespace tool
