// ONNX models read: every message that a model is made of.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/detail/io/onnx_graph.hpp>
#include <concertina/detail/io/onnx_tensor.hpp>
#include <concertina/detail/io/protobuf.hpp>
#include <concertina/io/onnx.hpp>

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <iterator>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_set>
#include <utility>
#include <vector>

namespace concertina::onnx::detail {

inline constexpr int depth_limit = 100;  // of messages in messages: protobuf's own

/// Sets the members of the model that its fields have too.
inline void read_header(const Source& source, Model& model) {
  model.ir_version = 0;
  model.opsets.clear();
  model.producer.clear();
  model.graph_name.clear();
  model.metadata.clear();
  for (const Field& field : model.model_fields) {
    Message message(source, field.encoded, "ModelProto");
    while (message.next()) {
      if (message.number() == 1) model.ir_version = message.integer();
      if (message.number() == 2) model.producer = message.text();
      if (message.number() == 8) {
        OperatorSet& opset = model.opsets.emplace_back();
        Message import(source, message.bytes(), "OperatorSetIdProto");
        while (import.next()) {
          if (import.number() == 1) opset.domain = import.text();
          if (import.number() == 2) opset.version = import.integer();
        }
      }
      if (message.number() == 14) {
        std::string key, value;
        Message entry(source, message.bytes(), "StringStringEntryProto");
        while (entry.next()) {
          if (entry.number() == 1) key = entry.text();
          if (entry.number() == 2) value = entry.text();
        }
        if (model.metadata.contains(key)) entry.refuse({in_quotes(key), " is there twice"});
        model.metadata.emplace(std::move(key), std::move(value));
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

/// Messages that tensors are in.
struct Part {
  std::string_view whole;
  std::uint32_t number;
  std::string_view part;
};
inline constexpr Part parts[] = {{"ModelProto", 20, "TrainingInfoProto"},
                                 {"ModelProto", 25, "FunctionProto"},
                                 {"TrainingInfoProto", 1, "GraphProto"},
                                 {"TrainingInfoProto", 2, "GraphProto"},
                                 {"FunctionProto", 7, "NodeProto"},
                                 {"FunctionProto", 11, "AttributeProto"},
                                 {"GraphProto", 1, "NodeProto"},
                                 {"GraphProto", 5, "TensorProto"},
                                 {"GraphProto", 15, "SparseTensorProto"},
                                 {"NodeProto", 5, "AttributeProto"},
                                 {"AttributeProto", 5, "TensorProto"},
                                 {"AttributeProto", 6, "GraphProto"},
                                 {"AttributeProto", 10, "TensorProto"},
                                 {"AttributeProto", 11, "GraphProto"},
                                 {"AttributeProto", 22, "SparseTensorProto"},
                                 {"AttributeProto", 23, "SparseTensorProto"},
                                 {"SparseTensorProto", 1, "TensorProto"},
                                 {"SparseTensorProto", 2, "TensorProto"}};

/// Reads one model, or one tensor.
class Reader {
 public:
  Reader(Source source, std::shared_ptr<const void> storage, std::filesystem::path folder)
      : source_(std::move(source)), external_(std::move(folder)) {
    model_.origin = source_.name;
    model_.storage.push_back(std::move(storage));
  }

  Tensor read_tensor() { return complete(tensor_fields(source_, source_.bytes), file(), true); }

  Model read() {
    const auto graph = only(source_.bytes, "ModelProto", 7);
    if (!graph) {
      fail<FormatError>({source_.name, ": there is no graph; this may not be an ONNX model"});
    }
    Message message(source_, source_.bytes, "ModelProto");
    while (message.next()) {
      if (message.number() != 7) model_.model_fields.push_back(field(message, "ModelProto"));
    }
    read_graph(*graph);
    read_header(source_, model_);
    check_graph(model_);
    return std::move(model_);
  }

 private:
  using Names = std::unordered_set<std::string_view>;

  /// The one field of this number, of bytes; nothing where there is none. protobuf would merge two.
  std::optional<Bytes> only(Bytes whole, const char* type, std::uint32_t number) const {
    std::optional<Bytes> found;
    Message message(source_, whole, type);
    while (message.next()) {
      if (message.number() != number) continue;
      if (found) message.refuse({"field ", number, " twice"});
      found = message.bytes();
    }
    return found;
  }

  std::string_view name_in(Bytes whole, const char* type, std::uint32_t number) const {
    return text_of(only(whole, type, number).value_or(Bytes()));
  }
  std::string_view sparse_name(Bytes sparse) const {
    return name_in(only(sparse, "SparseTensorProto", 1).value_or(Bytes()), "TensorProto", 8);
  }

  /// The message with each tensor in it inline, however deep; nothing where they all are so.
  std::optional<std::string> inlined(Bytes bytes, std::string_view type, int depth = 0) {
    if (type == "TensorProto") {
      const TensorFields fields = tensor_fields(source_, bytes);
      if (!fields.external) return std::nullopt;
      return with_elements(source_, complete(fields, file(), false)).joined();
    }
    std::optional<std::string> result;
    Message message(source_, bytes, type);
    while (message.next()) {
      const Bytes field = message.encoded();
      const auto changed = inlined_field(message, type, depth);
      if (changed && !result) {
        result.emplace(text_of({bytes.data(), field.data()}));
      }
      if (result) *result += changed ? *changed : text_of(field);
    }
    return result;
  }

  std::optional<std::string> inlined_field(const Message& message, std::string_view type,
                                           int depth = 0) {
    const auto part = std::ranges::find_if(parts, [&](const Part& each) {
      return each.whole == type && each.number == message.number();
    });
    if (part == std::end(parts)) return std::nullopt;
    if (depth == depth_limit) message.refuse({"messages in it nested too deeply"});
    const auto changed = inlined(message.bytes(), part->part, depth + 1);
    if (!changed) return std::nullopt;
    if (changed->size() > message_limit) {
      fail<SizeError>({source_.name, ": external data in a node or function takes ",
                       changed->size(), " bytes, but a message has at most 2^31 - 1"});
    }
    std::string field;
    protozero::pbf_writer(field).add_message(message.number(), *changed);
    return field;
  }

  /// What was written anew, for as long as the model; the bytes of the file where nothing was.
  Kept kept(std::optional<std::string> anew, Bytes bytes) {
    if (!anew) return {file(), bytes};
    const auto text = std::make_shared<const std::string>(std::move(*anew));
    model_.storage.push_back(text);
    return {text, bytes_of(*text)};
  }
  const std::shared_ptr<const void>& file() const { return model_.storage.front(); }

  Field field(const Message& message, std::string_view type) {
    return {message.number(), kept(inlined_field(message, type), message.encoded()).bytes};
  }

  void read_graph(Bytes bytes) {
    Message message(source_, bytes, "GraphProto");
    while (message.next()) {
      const std::uint32_t number = message.number();
      if (number == 1) {
        model_.nodes.push_back(read_node(message.bytes()));
      } else if (number == 5) {
        const TensorFields fields = tensor_fields(source_, message.bytes());
        model_.initializers.push_back(complete(fields, file(), true));
      } else if (11 <= number && number <= 13) {
        auto& list = number == 11 ? model_.inputs : number == 12 ? model_.outputs : model_.values;
        list.push_back(read_value(message.bytes()));
      } else {
        if (number == 15) model_.sparse_initializers.emplace_back(sparse_name(message.bytes()));
        model_.graph_fields.push_back(field(message, "GraphProto"));
      }
    }
  }

  /// The tensor with its elements, checked; `storage` has the message that it is in.
  Tensor complete(TensorFields fields, const std::shared_ptr<const void>& storage, bool share) {
    Tensor& tensor = fields.tensor;
    const std::string where = source_.name + ": " + about(tensor);
    const bool sized = size_of(tensor.type) != 0;
    if (fields.external + !fields.raw.empty() + (fields.typed != 0) > 1) {
      fail<FormatError>({where, ": its elements are in two places"});
    }
    const std::uint32_t expected = typed_field(tensor.type);
    if (fields.typed != 0 && expected != 0 && fields.typed != expected) {
      fail<FormatError>({where, ": ", to_string(tensor.type), " has its elements in field ",
                         fields.typed, ", expected ", expected});
    }
    if (tensor.type == DataType::string && (fields.external || !fields.raw.empty())) {
      fail<FormatError>({where, ": its strings are raw bytes"});
    }
    Kept elements{storage, fields.raw};
    if (fields.external) {
      std::optional<std::int64_t> size;
      if (sized) size = bytes_in(where, tensor);
      elements = external_.read(where, fields.range, size, share, storage);
    } else if (fields.typed != 0 && sized) {
      elements = keep(typed_elements(source_, tensor, fields.typed), storage);
    }
    tensor.storage = std::move(elements.storage);
    tensor.elements = elements.bytes;
    if (fields.external) tensor.external = fields.range.location;
    check_size(where, tensor);
    return std::move(tensor);
  }

  Node read_node(Bytes encoded) {
    Node node;
    const Kept whole = kept(inlined(encoded, "NodeProto"), encoded);
    node.encoded = whole.bytes;
    Captured captured{{}, {}, node.captured};
    Message message(source_, node.encoded, "NodeProto");
    while (message.next()) {
      switch (message.number()) {
        case 1: node.inputs.push_back(message.text()); break;
        case 2: node.outputs.push_back(message.text()); break;
        case 3: node.name = message.text(); break;
        case 4: node.op_type = message.text(); break;
        case 5:
          node.attributes.push_back(read_attribute(message.bytes(), whole.storage));
          read_graphs(message.bytes(), captured);
          break;
        case 7: node.domain = message.text(); break;
        default: node.fields.push_back({message.number(), message.encoded()});
      }
    }
    if (node.op_type.empty()) message.refuse({"no operator"});  // now: 2 bytes take 200
    return node;
  }

  Attribute read_attribute(Bytes encoded, const std::shared_ptr<const void>& storage) {
    Attribute attribute;
    attribute.encoded = encoded;
    if (const auto tensor = only(encoded, "AttributeProto", 5)) {
      attribute.tensor =
          std::make_shared<const Tensor>(complete(tensor_fields(source_, *tensor), storage, false));
    }
    Message message(source_, encoded, "AttributeProto");
    while (message.next()) {
      switch (message.number()) {
        case 1: attribute.name = message.text(); break;
        case 2: attribute.f = message.real(); break;
        case 3: attribute.i = message.integer(); break;
        case 4: attribute.s = message.text(); break;
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
    if (attribute.name.empty()) message.refuse({"no name"});
    return attribute;
  }

  /// Names that graphs in an attribute read and that are in none of the scopes around them.
  struct Captured {
    std::vector<Names> scopes;  // innermost last
    Names seen;
    std::vector<std::string>& names;

    void read(std::string_view name) {
      const auto defines = [&](const Names& scope) { return scope.contains(name); };
      if (!name.empty() && std::ranges::none_of(scopes, defines) && seen.insert(name).second) {
        names.emplace_back(name);
      }
    }
  };

  void read_graphs(Bytes attribute, Captured& captured) const {
    Message message(source_, attribute, "AttributeProto");
    while (message.next()) {
      if (message.number() == 6 || message.number() == 11) read_names(message.bytes(), captured);
    }
  }

  void read_names(Bytes graph, Captured& captured) const {
    Names defined;
    std::vector<std::string_view> outputs;
    Message message(source_, graph, "GraphProto");
    while (message.next()) {
      const std::uint32_t number = message.number();
      if (number == 5) defined.insert(name_in(message.bytes(), "TensorProto", 8));
      if (number == 11) defined.insert(name_in(message.bytes(), "ValueInfoProto", 1));
      if (number == 12) outputs.push_back(name_in(message.bytes(), "ValueInfoProto", 1));
      if (number == 15) defined.insert(sparse_name(message.bytes()));
    }
    captured.scopes.push_back(std::move(defined));
    message = Message(source_, graph, "GraphProto");
    while (message.next()) {
      if (message.number() != 1) continue;
      std::vector<std::string_view> written;
      Message node(source_, message.bytes(), "NodeProto");
      while (node.next()) {
        if (node.number() == 1) captured.read(text_of(node.bytes()));
        if (node.number() == 2) written.push_back(text_of(node.bytes()));
        if (node.number() == 5) read_graphs(node.bytes(), captured);
      }
      captured.scopes.back().insert(written.begin(), written.end());
    }
    for (const std::string_view name : outputs) captured.read(name);
    captured.scopes.pop_back();
  }

  ValueInfo read_value(Bytes encoded) const {
    ValueInfo value;
    value.encoded = encoded;
    value.name = name_in(encoded, "ValueInfoProto", 1);
    const auto type = only(encoded, "ValueInfoProto", 2);
    const auto tensor = only(type.value_or(Bytes()), "TypeProto", 1).value_or(Bytes());
    Message element(source_, tensor, "TypeProto.Tensor");
    while (element.next()) {
      if (element.number() == 1) value.type = static_cast<DataType>(element.small_integer());
    }
    const auto shape = only(tensor, "TypeProto.Tensor", 2);
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

  Source source_;
  ExternalData external_;
  Model model_;
};

}  // namespace concertina::onnx::detail
