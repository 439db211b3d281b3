// What a file's metadata says about layers: names and geometry, no elements yet.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/io/safetensors.hpp>
#include <concertina/shape.hpp>

#include <nlohmann/json.hpp>

#include <cstddef>
#include <optional>
#include <string>
#include <vector>

namespace tool {

using concertina::Index;

/// A layer as it is written. Each list has one number per spatial axis, or a single one for all
/// axes, or none for the default (stride and dilation 1, padding 0, padding_end as padding).
struct LayerDescription {
  std::string name;  // its tensors are name.weight and name.bias; weight and bias if it is empty
  bool linear = false;
  std::vector<Index> stride, padding, padding_end, dilation;
  Index groups = 1;

  std::string tensor(const std::string& suffix) const {
    return name.empty() ? suffix : name + "." + suffix;
  }
};

/// One layer from a JSON object with the fields of the format. `where` begins the messages.
LayerDescription parse_layer(const nlohmann::json& node, const std::string& where);

/// The geometry alone, from an object with no other fields.
LayerDescription parse_geometry(const nlohmann::json& value, const std::string& where);

/// {"stride":[2,2],"padding":[1,1],"dilation":[1,1],"groups":1}, and "padding_end" where it
/// differs.
template <int Rank>
nlohmann::json geometry_json(const concertina::ConvShape<Rank>& geometry) {
  const auto list = [](const concertina::PerAxis<Rank>& values) {
    nlohmann::json result = nlohmann::json::array();
    for (const Index value : values) result.push_back(value);
    return result;
  };
  nlohmann::json result{{"stride", list(geometry.stride)},
                        {"padding", list(geometry.padding.start)},
                        {"dilation", list(geometry.dilation)},
                        {"groups", geometry.groups}};
  if (geometry.padding.end != geometry.padding.start)
    result["padding_end"] = list(geometry.padding.end);
  return result;
}

/// A shape of which only stride, padding, dilation and groups are set.
/// Throws FormatError where a list has neither one number nor one per axis.
template <int Rank>
concertina::ConvShape<Rank> geometry_of(const LayerDescription& layer, const std::string& where) {
  const auto per_axis = [&](const std::vector<Index>& values, const char* field,
                            const concertina::PerAxis<Rank>& otherwise) {
    if (values.empty()) return otherwise;
    if (values.size() != 1 && values.size() != static_cast<std::size_t>(Rank)) {
      throw concertina::FormatError(where + ": " + field + " has " + std::to_string(values.size()) +
                                    " numbers, but the weight has " + std::to_string(Rank) +
                                    " spatial axes");
    }
    concertina::PerAxis<Rank> result;
    for (int axis = 0; axis < Rank; ++axis) {
      result[axis] = values[values.size() == 1 ? 0 : static_cast<std::size_t>(axis)];
    }
    return result;
  };
  concertina::ConvShape<Rank> geometry{.stride = per_axis(layer.stride, "stride", 1),
                                       .dilation = per_axis(layer.dilation, "dilation", 1),
                                       .groups = layer.groups};
  geometry.padding.start = per_axis(layer.padding, "padding", 0);
  geometry.padding.end = per_axis(layer.padding_end, "padding_end", geometry.padding.start);
  return geometry;
}

}  // namespace tool
