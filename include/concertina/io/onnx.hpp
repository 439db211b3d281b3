// ONNX models: nodes, tensors and their types, read with distrust, changed, and written all or
// nothing. What is not changed survives byte for byte.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/error.hpp>  // FormatError, IoError, ShapeError, SizeError

#include <Eigen/Core>  // half, bfloat16

#include <bit>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace concertina::onnx {

static_assert(std::endian::native == std::endian::little,
              "raw tensor data is little-endian and kept as it is in the file");

/// TensorProto.DataType: what the elements of a tensor are. Numbers beyond these are kept and
/// written back, but their elements are not read.
enum class DataType : std::int32_t {
  undefined = 0,
  float32 = 1,
  uint8 = 2,
  int8 = 3,
  uint16 = 4,
  int16 = 5,
  int32 = 6,
  int64 = 7,
  string = 8,
  boolean = 9,
  float16 = 10,
  float64 = 11,
  uint32 = 12,
  uint64 = 13,
  complex64 = 14,
  complex128 = 15,
  bfloat16 = 16
};

/// "float32"; "type 17" for numbers without a name here.
std::string to_string(DataType type);

/// Bytes per element; 0 for strings and for what is not known.
std::size_t size_of(DataType type);

/// The type that stores a Scalar; undefined where none does.
template <class Scalar>
constexpr DataType data_type_of();

/// A constant, row-major. Elements are a view of the file that was read, of an external file, or of
/// storage of the tensor's own; copies share it.
struct Tensor {
  std::string name = {};
  DataType type = DataType::undefined;
  std::vector<std::int64_t> dims = {};  // none: a scalar
  // Little-endian, numel() * size_of(type) bytes. Strings have none here, and of types that are not
  // known there is what the file has as raw bytes.
  std::span<const std::byte> elements = {};
  std::shared_ptr<const void> storage = {};  // keeps the views alive
  std::span<const std::byte> encoded = {};   // as in the file, and written so; empty for new ones
  std::string external = {};                 // where the elements were: a file beside the model's

  /// Of these elements, copied. Throws ShapeError where dims have another number of elements.
  template <class Scalar>
  static Tensor of(std::string name, std::vector<std::int64_t> dims,
                   std::span<const Scalar> values);

  /// Elements in the shape. Throws FormatError for negative dimensions, and where a product of
  /// those that are not zero exceeds 2^63 - 1.
  std::int64_t numel() const;

  /// A copy of the elements, widened where Scalar holds every value of the type exactly.
  /// Throws  FormatError naming both types where it does not
  template <class Scalar>
  std::vector<Scalar> values() const;
};

/// AttributeProto.AttributeType.
enum class AttributeType : std::int32_t {
  undefined = 0,
  float_ = 1,
  integer = 2,
  string = 3,
  tensor = 4,
  graph = 5,
  floats = 6,
  integers = 7,
  strings = 8,
  tensors = 9,
  graphs = 10,
  sparse_tensor = 11,
  sparse_tensors = 12,
  type_proto = 13,
  type_protos = 14
};

/// A field of a message, kept as it is in the file.
struct Field {
  std::uint32_t number = 0;
  std::span<const std::byte> encoded = {};  // with its tag
};

/// One attribute of a node; what its type does not have is empty. Graphs are not taken apart: what
/// they read is in Node::captured.
struct Attribute {
  std::string name = {};
  AttributeType type = AttributeType::undefined;
  float f = 0;
  std::int64_t i = 0;
  std::string s = {};
  std::vector<float> floats = {};
  std::vector<std::int64_t> ints = {};
  std::vector<std::string> strings = {};
  std::shared_ptr<const Tensor> tensor = {};
  std::span<const std::byte> encoded = {};  // as above

  /// One that has this value, and its type.
  static Attribute of(std::string name, std::int64_t value);
  static Attribute of(std::string name, float value);
  static Attribute of(std::string name, std::string value);
  static Attribute of(std::string name, std::vector<std::int64_t> values);
};

/// An operator applied: tensors by name, an empty name for an optional one that is left out.
struct Node {
  std::string name = {}, op_type = {}, domain = {};
  std::vector<std::string> inputs = {}, outputs = {};
  std::vector<Attribute> attributes = {};
  std::vector<std::string> captured = {};   // names of outer tensors that graphs in attributes read
  std::vector<Field> fields = {};           // all else: documentation, metadata, the overload
  std::span<const std::byte> encoded = {};  // as above

  /// Null where there is none of this name.
  const Attribute* attribute(std::string_view name) const;

  /// The attribute's value, or `otherwise` where there is none. Throws FormatError naming node and
  /// attribute where it is of another type.
  std::int64_t integer(std::string_view name, std::int64_t otherwise) const;
  float real(std::string_view name, float otherwise) const;
  std::string text(std::string_view name, std::string otherwise) const;
  std::vector<std::int64_t> integers(std::string_view name,
                                     std::vector<std::int64_t> otherwise) const;
};

/// One extent of a declared shape: known, or a name ("batch", possibly empty) for what is not.
struct Dimension {
  std::optional<std::int64_t> value = {};
  std::string name = {};

  friend bool operator==(const Dimension&, const Dimension&) = default;
};

/// The declared type of a tensor. No shape: of unknown rank, or no tensor.
struct ValueInfo {
  std::string name = {};
  DataType type = DataType::undefined;
  std::optional<std::vector<Dimension>> shape = {};
  std::span<const std::byte> encoded = {};  // as above
};

/// Operators come from a domain ("" is ONNX's own) at a version.
struct OperatorSet {
  std::string domain = {};
  std::int64_t version = 0;

  friend bool operator==(const OperatorSet&, const OperatorSet&) = default;
};

/// A model: a graph of nodes in the order in which they run. Plain data: nodes, tensors and value
/// infos are removed, added or replaced; whoever changes a field of one that was read clears its
/// `encoded`, or the change is not written.
struct Model {
  std::string origin = "model";  // what messages call the file; not written
  std::int64_t ir_version = 8;
  std::vector<OperatorSet> opsets = {};
  std::string graph_name = {}, producer = {};
  std::map<std::string, std::string> metadata = {};  // metadata_props
  std::vector<Node> nodes = {};
  std::vector<Tensor> initializers = {};
  std::vector<ValueInfo> inputs = {}, outputs = {}, values = {};
  std::vector<std::string> sparse_initializers = {};  // their names; kept, not read

  /// What else the file holds, kept as it is: functions, annotations, fields that are not known.
  /// Those of the members ir_version, opsets, graph_name, producer and metadata are here too, and
  /// are written while they say the same as the member.
  std::vector<Field> model_fields = {}, graph_fields = {};
  std::vector<std::shared_ptr<const void>> storage = {};  // of all that is a view

  /// The version of ONNX's own operators; 0 where none is imported.
  std::int64_t opset() const;
};

/// Reads and checks a model, and what it keeps in files beside it. Tensors in attributes, functions
/// and the like that are kept so become inline; initializers say that they were external.
/// Ensures   names of tensors, of a node's attributes, domains of operators and keys of metadata are
///           there once; every node reads only graph inputs, initializers and
///           outputs of nodes before it; each tensor has as many bytes as its shape says
/// Cost      one read; memory for the files once, and for the nodes
/// Throws    FormatError naming the file, the offset or the node, what is there and what was
///           expected: also for external data that is missing, too short or outside of the model's
///           folder (links followed); IoError if the path is not a readable regular file
/// Source    github.com/onnx/onnx, onnx/onnx.proto and docs/ExternalData.md
Model read_model(const std::filesystem::path& path);

/// The same for a model in memory, which is copied; external data is looked for in `folder`, and
/// refused where that is empty.
Model parse_model(std::span<const std::byte> file, std::string origin = "model",
                  const std::filesystem::path& folder = {});

/// Reads and checks a file with one tensor, as in ONNX's test data (test_data_set_0/input_0.pb).
/// Throws  what read_model does
Tensor read_tensor(const std::filesystem::path& path);

/// Where tensors are written.
struct WriteOptions {
  /// Initializers of at least `external_threshold` bytes go to one file of this name beside the
  /// model, and no others; empty: inline, unless the model would exceed 2 GB, when the name is the
  /// model's with ".data".
  std::string external_data = {};
  std::int64_t external_threshold = 1024;
};

/// Writes a model, and its external data, under temporary names and renames them when they are
/// complete. If anything fails, whatever was there is still there, and nothing else. Links are
/// followed, not replaced. Fields are written in the order of their numbers, as protobuf does.
/// Ensures   read_model(path) holds the same; elements in external data are aligned to 64 bytes;
///           of a model that was read, everything but what has changed is as it was
/// Throws    FormatError where names are taken twice, a node reads what is not there, a tensor has
///           not as many bytes as its shape says, or external_data is not a name in the folder;
///           SizeError above 2 GB without the external data;
///           IoError if a file cannot be created, completed or renamed
void write_model(const std::filesystem::path& path, const Model& model,
                 const WriteOptions& options = {});

/// The bytes that write_model writes without external data. Throws SizeError above 2 GB.
std::vector<std::byte> serialize_model(const Model& model);

}  // namespace concertina::onnx

#include <concertina/detail/io/onnx.ipp>
