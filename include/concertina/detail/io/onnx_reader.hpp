// ONNX models read: the messages that a model is made of, and its external data.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/detail/io/files.hpp>
#include <concertina/detail/io/onnx_graph.hpp>
#include <concertina/detail/io/onnx_tensor.hpp>
#include <concertina/detail/io/protobuf.hpp>
#include <concertina/detail/io/text.hpp>
#include <concertina/io/onnx.hpp>

#include <algorithm>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <tuple>
#include <unordered_set>
#include <utility>
#include <vector>

namespace concertina::onnx::detail {

inline constexpr int depth_limit = 100;  // of messages in messages: protobuf's own

/// Sets what is a member of the model and a field too.
inline void read_header(const Source& source, Model& model) {
  model.ir_version = 0;
  model.opsets.clear();
  model.producer.clear();
  model.graph_name.clear();
  for (const Field& field : model.model_fields) {
    Message message(source, field.encoded, "ModelProto");
    while (message.next()) {
      switch (message.number()) {
        case 1: model.ir_version = message.integer(); break;
        case 2: model.producer = message.text(); break;
        case 8: {
          OperatorSet& opset = model.opsets.emplace_back();
          Message import(source, message.bytes(), "OperatorSetIdProto");
          while (import.next()) {
            if (import.number() == 1) opset.domain = import.text();
            if (import.number() == 2) opset.version = import.integer();
          }
          break;
        }
        default: break;
      }
    }
  }
  for (const Field& field : model.graph_fields) {
    Message message(source, field.encoded, "GraphProto");
    while (message.next()) {
      if (message.number() == 2) model.graph_name = message.text();
    }
  }
}

/// Reads one model.
class Reader {
 public:
  Reader(Source source, std::shared_ptr<const void> storage, const std::filesystem::path& folder)
      : source_(std::move(source)), external_(folder) {
    model_.origin = source_.name;
    model_.storage.push_back(std::move(storage));
  }

  Model read() {
    std::optional<Bytes> graph;
    Message message(source_, source_.bytes, "ModelProto");
    while (message.next()) {
      if (message.number() == 7) {
        if (graph) message.refuse("a second graph");
        graph = message.bytes();
      } else {
        add_field(model_.model_fields, message, Kind::model);
      }
    }
    if (!graph) {
      fail<FormatError>({source_.name, ": there is no graph; this may not be an ONNX model"});
    }
    read_graph(*graph);
    for (auto* fields : {&model_.model_fields, &model_.graph_fields}) {
      std::ranges::stable_sort(*fields, {}, &Field::number);
    }
    read_header(source_, model_);
    check_graph(model_);
    return std::move(model_);
  }

 private:
  /// Messages that tensors are in.
  enum class Kind { model, graph, node, attribute, tensor, sparse, function, training };

  struct Part {
    Kind whole;
    std::uint32_t number;
    Kind part;
  };

  static const Part* part_of(Kind whole, std::uint32_t number) {
    static constexpr Part parts[] = {
        {Kind::model, 20, Kind::training},   {Kind::model, 25, Kind::function},
        {Kind::graph, 1, Kind::node},        {Kind::graph, 5, Kind::tensor},
        {Kind::graph, 15, Kind::sparse},     {Kind::node, 5, Kind::attribute},
        {Kind::attribute, 5, Kind::tensor},  {Kind::attribute, 6, Kind::graph},
        {Kind::attribute, 10, Kind::tensor}, {Kind::attribute, 11, Kind::graph},
        {Kind::attribute, 22, Kind::sparse}, {Kind::attribute, 23, Kind::sparse},
        {Kind::sparse, 1, Kind::tensor},     {Kind::sparse, 2, Kind::tensor},
        {Kind::function, 7, Kind::node},     {Kind::function, 11, Kind::attribute},
        {Kind::training, 1, Kind::graph},    {Kind::training, 2, Kind::graph}};
    const auto found = std::ranges::find_if(
        parts, [&](const Part& part) { return part.whole == whole && part.number == number; });
    return found == std::end(parts) ? nullptr : found;
  }

  static const char* name_of(Kind kind) {
    static constexpr const char* names[] = {
        "ModelProto",  "GraphProto",        "NodeProto",     "AttributeProto",
        "TensorProto", "SparseTensorProto", "FunctionProto", "TrainingInfoProto"};
    return names[static_cast<std::size_t>(kind)];
  }

  /// The message with every tensor in it inline; nothing where they are already.
  std::optional<std::string> inlined(Kind kind, Bytes bytes, int depth = 0) {
    if (kind == Kind::tensor) return inlined_tensor(bytes);
    std::optional<std::string> result;
    Message message(source_, bytes, name_of(kind));
    while (message.next()) {
      const Bytes field = message.encoded();
      if (const Part* part = part_of(kind, message.number())) {
        if (depth == depth_limit) {
          message.refuse("messages in it that are nested deeper than " +
                         std::to_string(depth_limit));
        }
        if (const auto changed = inlined(part->part, message.bytes(), depth + 1)) {
          if (!result) result.emplace(text_of(bytes.first(offset(bytes, field))));
          check_length(changed->size());
          protozero::pbf_writer(*result).add_message(message.number(), *changed);
          continue;
        }
      }
      if (result) *result += text_of(field);
    }
    return result;
  }

  std::optional<std::string> inlined_tensor(Bytes encoded) {
    const TensorFields fields = tensor_fields(source_, encoded);
    if (!fields.external) return std::nullopt;
    return with_elements(source_, complete(fields, false)).joined();
  }

  static std::size_t offset(Bytes whole, Bytes part) {
    return static_cast<std::size_t>(part.data() - whole.data());
  }

  void check_length(std::size_t size) const {
    if (size > message_limit) {
      fail<SizeError>({source_.name, ": external data in an attribute takes ", size,
                       " bytes, but a message has at most 2^31 - 1"});
    }
  }

  /// Bytes that stay as long as the model.
  Bytes keep(std::string text) {
    const auto kept = std::make_shared<const std::string>(std::move(text));
    model_.storage.push_back(kept);
    return bytes_of(*kept);
  }

  void add_field(std::vector<Field>& fields, const Message& message, Kind kind) {
    Bytes encoded = message.encoded();
    if (const Part* part = part_of(kind, message.number())) {
      if (const auto changed = inlined(part->part, message.bytes(), 1)) {
        check_length(changed->size());
        std::string text;
        protozero::pbf_writer(text).add_message(message.number(), *changed);
        encoded = keep(std::move(text));
      }
    }
    fields.push_back({message.number(), encoded});
  }

  void read_graph(Bytes bytes) {
    Message message(source_, bytes, "GraphProto");
    while (message.next()) {
      switch (message.number()) {
        case 1: model_.nodes.push_back(read_node(message.bytes())); break;
        case 5:
          model_.initializers.push_back(complete(tensor_fields(source_, message.bytes()), true));
          break;
        case 11: model_.inputs.push_back(read_value(message.bytes())); break;
        case 12: model_.outputs.push_back(read_value(message.bytes())); break;
        case 13: model_.values.push_back(read_value(message.bytes())); break;
        case 15: {
          model_.sparse_initializers.push_back(sparse_name(message.bytes()));
          add_field(model_.graph_fields, message, Kind::graph);
          break;
        }
        default: model_.graph_fields.push_back({message.number(), message.encoded()});
      }
    }
  }

  std::string sparse_name(Bytes encoded) const {
    std::string name;
    Message message(source_, encoded, "SparseTensorProto");
    while (message.next()) {
      if (message.number() == 1) name = tensor_fields(source_, message.bytes()).tensor.name;
    }
    return name;
  }

  /// The tensor with its elements, checked.
  Tensor complete(TensorFields fields, bool shared) {
    Tensor& tensor = fields.tensor;
    const std::string where = source_.name + ": " + about(tensor);
    const std::size_t size = size_of(tensor.type);
    const std::uint32_t typed = typed_field(tensor.type);
    const auto& file = model_.storage.front();
    if (fields.external + !fields.raw.empty() + (fields.typed != 0) > 1) {
      fail<FormatError>({where, ": its elements are in two places"});
    }
    if (fields.external) {
      if (tensor.type == DataType::string) fail<FormatError>({where, ": strings are external"});
      const auto& length = fields.range.length;
      std::optional<std::int64_t> needed;
      if (size > 0) {
        const std::int64_t limit = std::numeric_limits<std::int64_t>::max();
        const auto width = static_cast<std::int64_t>(size);
        const std::int64_t count = tensor.numel();
        needed = length.value_or(count > limit / width ? limit : count * width);
        check_size(where, tensor, static_cast<std::size_t>(*needed));
      }
      const auto found = external_.read(where, fields.range, needed, file, shared);
      tensor.storage = found.storage;
      tensor.elements = found.bytes;
      tensor.external = true;
    } else if (fields.typed != 0) {
      if (typed != 0 && typed != fields.typed) {
        fail<FormatError>({where, ": ", to_string(tensor.type), " has its elements in field ",
                           fields.typed, ", expected ", typed});
      }
      if (size > 0) read_typed(where, tensor, fields.typed);
    } else {
      tensor.elements = fields.raw;
      tensor.storage = file;
    }
    if (tensor.type == DataType::string && !fields.raw.empty()) {
      fail<FormatError>({where, ": strings are in raw_data"});
    }
    check_size(where, tensor, tensor.elements.size());
    return std::move(tensor);
  }

  /// Elements one by one, as wide as the type; those of complex numbers are two.
  void read_typed(const std::string& where, Tensor& tensor, std::uint32_t field) {
    const std::size_t width = field == 4 ? 4 : field == 10 ? 8 : size_of(tensor.type);
    const WireType wire = field == 4    ? WireType::fixed32
                          : field == 10 ? WireType::fixed64
                                        : WireType::varint;
    std::vector<std::byte> elements;
    Message message(source_, tensor.encoded, "TensorProto");
    while (message.next()) {
      if (message.number() != field) continue;
      message.numbers(wire, [&](std::uint64_t bits) {
        const auto value = static_cast<std::int64_t>(bits);
        if (width < 8 && wire == WireType::varint &&
            (value >= std::int64_t{1} << (8 * width) ||
             value < -(std::int64_t{1} << (8 * width - 1)))) {
          fail<FormatError>({where, ": element ", value, " does not fit ", to_string(tensor.type)});
        }
        for (std::size_t i = 0; i < width; ++i) elements.push_back(std::byte(bits >> (8 * i)));
      });
    }
    const auto owned =
        std::make_shared<std::pair<std::shared_ptr<const void>, std::vector<std::byte>>>(
            model_.storage.front(), std::move(elements));
    tensor.elements = owned->second;
    tensor.storage = owned;
  }

  Node read_node(Bytes encoded) {
    if (auto changed = inlined(Kind::node, encoded, 1)) {
      check_length(changed->size());
      encoded = keep(std::move(*changed));
    }
    Node node;
    std::unordered_set<std::string_view> captured;
    node.encoded = encoded;
    Message message(source_, encoded, "NodeProto");
    while (message.next()) {
      switch (message.number()) {
        case 1: node.inputs.push_back(message.text()); break;
        case 2: node.outputs.push_back(message.text()); break;
        case 3: node.name = message.text(); break;
        case 4: node.op_type = message.text(); break;
        case 5: node.attributes.push_back(read_attribute(message.bytes(), node, captured)); break;
        case 7: node.domain = message.text(); break;
        default: node.fields.push_back({message.number(), message.encoded()});
      }
    }
    return node;
  }

  Attribute read_attribute(Bytes encoded, Node& node,
                           std::unordered_set<std::string_view>& captured) {
    Attribute attribute;
    attribute.encoded = encoded;
    Message message(source_, encoded, "AttributeProto");
    while (message.next()) {
      switch (message.number()) {
        case 1: attribute.name = message.text(); break;
        case 2: attribute.f = message.real(); break;
        case 3: attribute.i = message.integer(); break;
        case 4: attribute.s = message.text(); break;
        case 5:
          if (attribute.tensor) message.refuse("a second tensor");
          attribute.tensor = std::make_shared<const Tensor>(
              complete(tensor_fields(source_, message.bytes()), false));
          break;
        case 6:
        case 11:
          for (const std::string_view name : free_names(message.bytes())) {
            if (captured.insert(name).second) node.captured.emplace_back(name);
          }
          break;
        case 7:
          message.numbers(WireType::fixed32, [&](std::uint64_t bits) {
            attribute.floats.push_back(std::bit_cast<float>(static_cast<std::uint32_t>(bits)));
          });
          break;
        case 8:
          message.numbers(WireType::varint, [&](std::uint64_t bits) {
            attribute.ints.push_back(static_cast<std::int64_t>(bits));
          });
          break;
        case 9: attribute.strings.push_back(message.text()); break;
        case 20: attribute.type = static_cast<AttributeType>(message.small_integer()); break;
        default: break;
      }
    }
    return attribute;
  }

  /// The names that a graph reads and does not define, once each.
  std::vector<std::string_view> free_names(Bytes graph) const {
    std::unordered_set<std::string_view> defined, seen;
    std::vector<std::string_view> names;
    const auto name_in = [&](const Message& field, std::uint32_t number, const char* type) {
      std::string_view name;
      Message message(source_, field.bytes(), type);
      while (message.next()) {
        if (message.number() == number) name = text_of(message.bytes());
      }
      return name;
    };
    const auto read = [&](std::string_view name) {
      if (!name.empty() && !defined.contains(name) && seen.insert(name).second) {
        names.push_back(name);
      }
    };
    Message definitions(source_, graph, "GraphProto");
    while (definitions.next()) {
      switch (definitions.number()) {
        case 5: defined.insert(name_in(definitions, 8, "TensorProto")); break;
        case 11: defined.insert(name_in(definitions, 1, "ValueInfoProto")); break;
        case 15: {
          Message sparse(source_, definitions.bytes(), "SparseTensorProto");
          while (sparse.next()) {
            if (sparse.number() == 1) defined.insert(name_in(sparse, 8, "TensorProto"));
          }
          break;
        }
        default: break;
      }
    }
    std::vector<std::string_view> outputs;
    Message graph_message(source_, graph, "GraphProto");
    while (graph_message.next()) {
      if (graph_message.number() == 12) {
        outputs.push_back(name_in(graph_message, 1, "ValueInfoProto"));
      }
      if (graph_message.number() != 1) continue;
      std::vector<std::string_view> written;
      Message node(source_, graph_message.bytes(), "NodeProto");
      while (node.next()) {
        if (node.number() == 1) read(text_of(node.bytes()));
        if (node.number() == 2) written.push_back(text_of(node.bytes()));
        if (node.number() != 5) continue;
        Message attribute(source_, node.bytes(), "AttributeProto");
        while (attribute.next()) {
          if (attribute.number() != 6 && attribute.number() != 11) continue;
          for (const std::string_view name : free_names(attribute.bytes())) read(name);
        }
      }
      defined.insert(written.begin(), written.end());
    }
    for (const std::string_view name : outputs) read(name);
    return names;
  }

  ValueInfo read_value(Bytes encoded) const {
    ValueInfo value;
    value.encoded = encoded;
    std::optional<Bytes> type;
    Message message(source_, encoded, "ValueInfoProto");
    while (message.next()) {
      if (message.number() == 1) value.name = message.text();
      if (message.number() == 2) set_once(message, type);
    }
    std::optional<Bytes> tensor;
    Message types(source_, type.value_or(Bytes()), "TypeProto");
    while (types.next()) {
      if (types.number() == 1) set_once(types, tensor);
    }
    std::optional<Bytes> shape;
    Message tensors(source_, tensor.value_or(Bytes()), "TypeProto.Tensor");
    while (tensors.next()) {
      if (tensors.number() == 1) value.type = static_cast<DataType>(tensors.small_integer());
      if (tensors.number() == 2) set_once(tensors, shape);
    }
    if (!shape) return value;
    value.shape.emplace();
    Message dims(source_, *shape, "TensorShapeProto");
    while (dims.next()) {
      if (dims.number() != 1) continue;
      Dimension& dimension = value.shape->emplace_back();
      Message extent(source_, dims.bytes(), "TensorShapeProto.Dimension");
      while (extent.next()) {  // one of the two: the last
        if (extent.number() == 1) dimension = {extent.integer(), {}};
        if (extent.number() == 2) dimension = {{}, extent.text()};
      }
    }
    return value;
  }

  /// protobuf would merge a message with one that came before.
  static void set_once(const Message& message, std::optional<Bytes>& bytes) {
    if (bytes) message.refuse("field " + std::to_string(message.number()) + " twice");
    bytes = message.bytes();
  }

  Source source_;
  ExternalData external_;
  Model model_;
};

}  // namespace concertina::onnx::detail
