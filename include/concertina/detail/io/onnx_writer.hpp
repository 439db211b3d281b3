// ONNX models written: what was read as it was, what is new from its members.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/detail/io/onnx_graph.hpp>
#include <concertina/detail/io/onnx_reader.hpp>
#include <concertina/detail/io/onnx_tensor.hpp>
#include <concertina/detail/io/protobuf.hpp>
#include <concertina/io/onnx.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace concertina::onnx::detail {

inline Pieces verbatim(Bytes encoded) {
  Pieces out;
  out.add(encoded);
  return out;
}

inline Pieces encode(const Source& source, const Tensor& tensor,
                     const std::optional<ExternalPlace>& place = {}) {
  const std::string where = source.name + ": " + about(tensor);
  if (tensor.type == DataType::string && tensor.encoded.empty()) {
    fail<FormatError>({where, ": strings cannot be written, but as they were read"});
  }
  check_size(where, tensor);
  const bool changed = tensor.encoded.empty() || !tensor.external.empty() || place;
  return changed ? with_elements(source, tensor, place) : verbatim(tensor.encoded);
}

inline Pieces encode(const Source& source, const Attribute& attribute) {
  if (!attribute.encoded.empty()) return verbatim(attribute.encoded);
  Pieces out;
  out.text(1, attribute.name);
  switch (attribute.type) {
    case AttributeType::float_: out.real(2, attribute.f); break;
    case AttributeType::integer: out.integer(3, attribute.i); break;
    case AttributeType::string: out.text(4, attribute.s); break;
    case AttributeType::tensor:
      if (!attribute.tensor) {
        fail<FormatError>(
            {source.name, ": attribute ", in_quotes(attribute.name), " of type 4 has no tensor"});
      }
      out.message(5, encode(source, *attribute.tensor));
      break;
    case AttributeType::floats:
      for (const float value : attribute.floats) out.real(7, value);
      break;
    case AttributeType::integers:
      for (const std::int64_t value : attribute.ints) out.integer(8, value);
      break;
    case AttributeType::strings:
      for (const std::string& value : attribute.strings) out.text(9, value);
      break;
    default:
      fail<FormatError>({source.name, ": attribute ", in_quotes(attribute.name), " of type ",
                         static_cast<int>(attribute.type),
                         " cannot be written, but as it was read"});
  }
  out.integer(20, static_cast<std::int32_t>(attribute.type));
  return out;
}

inline Pieces encode(const Source& source, const Node& node) {
  if (!node.encoded.empty()) return verbatim(node.encoded);
  Ordered out(node.fields);
  for (const std::string& name : node.inputs) out.at(1).text(1, name);
  for (const std::string& name : node.outputs) out.at(2).text(2, name);
  if (!node.name.empty()) out.at(3).text(3, node.name);
  out.at(4).text(4, node.op_type);
  for (const Attribute& attribute : node.attributes) {
    out.at(5).message(5, encode(source, attribute));
  }
  if (!node.domain.empty()) out.at(7).text(7, node.domain);
  return out.finish();
}

inline Pieces encode(const ValueInfo& value) {
  if (!value.encoded.empty()) return verbatim(value.encoded);
  Pieces out;
  if (!value.name.empty()) out.text(1, value.name);
  if (value.type == DataType::undefined && !value.shape) return out;
  Pieces tensor;
  tensor.integer(1, static_cast<std::int32_t>(value.type));
  if (value.shape) {
    Pieces shape;
    for (const Dimension& extent : *value.shape) {
      Pieces dimension;
      if (extent.value) {
        dimension.integer(1, *extent.value);
      } else if (!extent.name.empty()) {
        dimension.text(2, extent.name);
      }
      shape.message(1, std::move(dimension));
    }
    tensor.message(2, std::move(shape));
  }
  Pieces type;
  type.message(1, std::move(tensor));
  out.message(2, std::move(type));
  return out;
}

/// Where each initializer is written, one after another; inline where there is no location.
using Places = std::vector<std::optional<ExternalPlace>>;

inline Places places_of(const Model& model, const std::string& location, std::int64_t threshold) {
  constexpr std::size_t alignment = 64;
  Places places(model.initializers.size());
  std::size_t end = 0;
  for (std::size_t i = 0; i < places.size(); ++i) {
    const std::size_t size = model.initializers[i].elements.size();
    if (location.empty() || size == 0 || std::cmp_less(size, threshold)) continue;
    const std::size_t begin = (end + alignment - 1) / alignment * alignment;
    places[i] = {location, begin};
    end = begin + size;
  }
  return places;
}

inline Pieces encode(const Model& model, const Places& places) {
  const Source source{model.origin, {}};
  check_graph(model);

  // Fields that say the same as the member are written as they were.
  Model was;
  was.model_fields = model.model_fields;
  was.graph_fields = model.graph_fields;
  was.origin = model.origin;
  read_header(source, was);
  const auto changed = [](std::vector<Field>& fields, std::uint32_t number, bool same) {
    if (!same) std::erase_if(fields, [&](const Field& field) { return field.number == number; });
    return !same;
  };
  const bool new_name = changed(was.graph_fields, 2, was.graph_name == model.graph_name);
  const bool new_version = changed(was.model_fields, 1, was.ir_version == model.ir_version);
  const bool new_producer = changed(was.model_fields, 2, was.producer == model.producer);
  const bool new_metadata = changed(was.model_fields, 14, was.metadata == model.metadata);
  const bool new_opsets = changed(was.model_fields, 8, was.opsets == model.opsets);

  Ordered graph(was.graph_fields);
  for (const Node& node : model.nodes) graph.at(1).message(1, encode(source, node));
  if (new_name) graph.at(2).text(2, model.graph_name);
  for (std::size_t i = 0; i < model.initializers.size(); ++i) {
    graph.at(5).message(5, encode(source, model.initializers[i], places[i]));
  }
  for (const ValueInfo& value : model.inputs) graph.at(11).message(11, encode(value));
  for (const ValueInfo& value : model.outputs) graph.at(12).message(12, encode(value));
  for (const ValueInfo& value : model.values) graph.at(13).message(13, encode(value));

  Ordered out(was.model_fields);
  if (new_version) out.at(1).integer(1, model.ir_version);
  if (new_producer) out.at(2).text(2, model.producer);
  out.at(7).message(7, graph.finish());
  if (new_opsets) {
    for (const OperatorSet& opset : model.opsets) {
      Pieces import;
      import.text(1, opset.domain);
      import.integer(2, opset.version);
      out.at(8).message(8, std::move(import));
    }
  }
  if (new_metadata) {
    for (const auto& [key, value] : model.metadata) {
      Pieces entry;
      entry.text(1, key);
      entry.text(2, value);
      out.at(14).message(14, std::move(entry));
    }
  }
  return out.finish();
}

}  // namespace concertina::onnx::detail
