// Implementation of onnx.hpp.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/detail/io/elements.hpp>
#include <concertina/detail/io/files.hpp>
#include <concertina/detail/io/onnx_graph.hpp>
#include <concertina/detail/io/onnx_reader.hpp>
#include <concertina/detail/io/onnx_writer.hpp>
#include <concertina/io/onnx.hpp>

#include <algorithm>
#include <array>
#include <concepts>
#include <limits>
#include <type_traits>
#include <utility>

namespace concertina::onnx {

namespace detail {

inline constexpr std::array<std::string_view, 17> type_names = {
    "undefined", "float32", "uint8",     "int8",       "uint16",  "int16",
    "int32",     "int64",   "string",    "boolean",    "float16", "float64",
    "uint32",    "uint64",  "complex64", "complex128", "bfloat16"};

struct Unreadable {};

/// visit(std::type_identity<T>{}) with the type that stores elements; Unreadable where none does.
template <class Visit>
constexpr auto with_storage(DataType type, const Visit& visit) {
  switch (type) {
    case DataType::float32: return visit(std::type_identity<float>{});
    case DataType::uint8: return visit(std::type_identity<std::uint8_t>{});
    case DataType::int8: return visit(std::type_identity<std::int8_t>{});
    case DataType::uint16: return visit(std::type_identity<std::uint16_t>{});
    case DataType::int16: return visit(std::type_identity<std::int16_t>{});
    case DataType::int32: return visit(std::type_identity<std::int32_t>{});
    case DataType::int64: return visit(std::type_identity<std::int64_t>{});
    case DataType::boolean: return visit(std::type_identity<bool>{});
    case DataType::float16: return visit(std::type_identity<Eigen::half>{});
    case DataType::float64: return visit(std::type_identity<double>{});
    case DataType::uint32: return visit(std::type_identity<std::uint32_t>{});
    case DataType::uint64: return visit(std::type_identity<std::uint64_t>{});
    case DataType::bfloat16: return visit(std::type_identity<Eigen::bfloat16>{});
    default: return visit(std::type_identity<Unreadable>{});
  }
}

template <class Scalar>
std::string scalar_name() {
  constexpr DataType type = data_type_of<Scalar>();
  return type == DataType::undefined ? "long double" : to_string(type);
}

/// The attribute of this name and type, or null.
inline const Attribute* typed(const Node& node, std::string_view name, AttributeType type,
                              const char* expected) {
  const Attribute* found = node.attribute(name);
  if (found && found->type != type) {
    fail<FormatError>({"node ", in_quotes(node.name), " (", shown(node.op_type), "): attribute ",
                       in_quotes(name), " is of type ", static_cast<int>(found->type),
                       ", expected ", expected});
  }
  return found;
}

inline Reader reader(std::string origin, std::vector<std::byte> file,
                     const std::filesystem::path& folder) {
  if (file.size() > message_limit) {
    fail<FormatError>(
        {origin, ": the file has ", file.size(), " bytes, but a message has at most 2^31 - 1"});
  }
  Kept kept = keep(std::move(file));
  return Reader({std::move(origin), kept.bytes}, std::move(kept.storage), folder);
}

inline Reader reader(const std::filesystem::path& path) {
  const auto [file, size] = io::detail::open_file(path);
  std::vector<std::byte> bytes(static_cast<std::size_t>(size));
  io::detail::read_next(path, file.get(), bytes);
  const auto folder = path.parent_path();
  return reader(path.string(), std::move(bytes), folder.empty() ? "." : folder);
}

/// Writes the tensors that have a place, each there.
inline void write_outside(io::detail::AtomicFile& file, const Model& model, const Places& places) {
  std::size_t end = 0;
  for (std::size_t i = 0; i < places.size(); ++i) {
    if (!places[i]) continue;
    const Bytes elements = model.initializers[i].elements;
    file.write(std::vector<std::byte>(places[i]->offset - end));
    file.write(elements);
    end = places[i]->offset + elements.size();
  }
}

/// The file beside the model, which read_model will look for there.
inline std::filesystem::path path_outside(const std::filesystem::path& model,
                                          const std::string& location) {
  const std::filesystem::path name(location);
  const auto folder = model.parent_path();
  if (name.filename() != name || name == "." || name == ".." ||
      location.find('\0') != std::string::npos) {
    fail<FormatError>({model.string(), ": external data ", in_quotes(location),
                       " is not the name of a file beside the model"});
  }
  std::error_code error;
  if (name == model.filename() || std::filesystem::equivalent(model, folder / name, error)) {
    fail<FormatError>(
        {model.string(), ": external data ", in_quotes(location), " is the model itself"});
  }
  if (std::filesystem::exists(folder / name, error)) {
    external_path(model.string(), folder.empty() ? "." : folder, location);
  }
  return folder / name;
}

inline void check_limit(const std::string& origin, std::size_t size) {
  if (size > message_limit) {
    fail<SizeError>(
        {origin, ": the model takes ", size, " bytes, but at most 2^31 - 1 can be in one file"});
  }
}

}  // namespace detail

inline std::string to_string(DataType type) {
  const auto number = static_cast<std::size_t>(type);
  return number < detail::type_names.size() ? std::string(detail::type_names[number])
                                            : "type " + std::to_string(static_cast<int>(type));
}

inline std::size_t size_of(DataType type) {
  if (type == DataType::complex64) return 8;
  if (type == DataType::complex128) return 16;
  return detail::with_storage(type, []<class T>(std::type_identity<T>) -> std::size_t {
    if constexpr (std::same_as<T, detail::Unreadable>) {
      return 0;
    } else {
      return sizeof(T);
    }
  });
}

template <class Scalar>
constexpr DataType data_type_of() {
  for (std::int32_t number = 1; number <= 16; ++number) {
    const auto type = static_cast<DataType>(number);
    if (detail::with_storage(type, []<class T>(std::type_identity<T>) {
          return io::detail::same_storage<T, Scalar>;
        })) {
      return type;
    }
  }
  return DataType::undefined;
}

template <class Scalar>
Tensor Tensor::of(std::string name, std::vector<std::int64_t> dims,
                  std::span<const Scalar> values) {
  static_assert(data_type_of<Scalar>() != DataType::undefined, "no tensor stores this type");
  Tensor tensor{.name = std::move(name), .dims = std::move(dims)};
  tensor.type = data_type_of<Scalar>();
  if (std::cmp_not_equal(tensor.numel(), values.size())) {
    detail::fail<ShapeError>({detail::about(tensor), ": shape ", detail::shown(tensor.dims),
                              " has ", tensor.numel(), " elements, but there are ", values.size()});
  }
  const auto bytes = std::as_bytes(values);
  detail::Kept kept = detail::keep({bytes.begin(), bytes.end()});
  tensor.storage = std::move(kept.storage);
  tensor.elements = kept.bytes;
  return tensor;
}

inline std::int64_t Tensor::numel() const { return detail::count(detail::about(*this), dims); }

template <class Scalar>
std::vector<Scalar> Tensor::values() const {
  static_assert(std::numeric_limits<Scalar>::is_specialized, "elements are numbers");
  const std::string where = detail::about(*this);
  detail::check_size(where, *this);
  return detail::with_storage(type, [&]<class T>(std::type_identity<T>) -> std::vector<Scalar> {
    if constexpr (std::same_as<T, detail::Unreadable>) {
      detail::fail<FormatError>({where, ": elements of ", to_string(type), " cannot be read"});
    } else if constexpr (io::detail::holds_exactly<Scalar, T>()) {
      return io::detail::widened<Scalar, T>(elements);
    } else {
      detail::fail<FormatError>({where, ": ", to_string(type), " does not fit ",
                                 detail::scalar_name<Scalar>(),
                                 " exactly; read it as a wider type and round as you wish"});
    }
  });
}

inline Attribute Attribute::of(std::string name, std::int64_t value) {
  return {.name = std::move(name), .type = AttributeType::integer, .i = value};
}

inline Attribute Attribute::of(std::string name, float value) {
  return {.name = std::move(name), .type = AttributeType::float_, .f = value};
}

inline Attribute Attribute::of(std::string name, std::string value) {
  return {.name = std::move(name), .type = AttributeType::string, .s = std::move(value)};
}

inline Attribute Attribute::of(std::string name, std::vector<std::int64_t> values) {
  return {.name = std::move(name), .type = AttributeType::integers, .ints = std::move(values)};
}

inline const Attribute* Node::attribute(std::string_view wanted) const {
  const auto found = std::ranges::find(attributes, wanted, &Attribute::name);
  return found == attributes.end() ? nullptr : &*found;
}

inline std::int64_t Node::integer(std::string_view wanted, std::int64_t otherwise) const {
  const Attribute* found = detail::typed(*this, wanted, AttributeType::integer, "an integer");
  return found ? found->i : otherwise;
}

inline float Node::real(std::string_view wanted, float otherwise) const {
  const Attribute* found = detail::typed(*this, wanted, AttributeType::float_, "a float");
  return found ? found->f : otherwise;
}

inline std::string Node::text(std::string_view wanted, std::string otherwise) const {
  const Attribute* found = detail::typed(*this, wanted, AttributeType::string, "a string");
  if (found) return found->s;
  return otherwise;
}

inline std::vector<std::int64_t> Node::integers(std::string_view wanted,
                                                std::vector<std::int64_t> otherwise) const {
  const Attribute* found = detail::typed(*this, wanted, AttributeType::integers, "integers");
  if (found) return found->ints;
  return otherwise;
}

inline std::int64_t Model::opset() const {
  const auto found = std::ranges::find_if(opsets, [](const OperatorSet& each) {
    return each.domain.empty() || each.domain == "ai.onnx";  // two names of one domain
  });
  return found == opsets.end() ? 0 : found->version;
}

inline Model read_model(const std::filesystem::path& path) { return detail::reader(path).read(); }

inline Tensor read_tensor(const std::filesystem::path& path) {
  return detail::reader(path).read_tensor();
}

inline Model parse_model(std::span<const std::byte> file, std::string origin,
                         const std::filesystem::path& folder) {
  return detail::reader(std::move(origin), {file.begin(), file.end()}, folder).read();
}

inline void write_model(const std::filesystem::path& path, const Model& model,
                        const WriteOptions& options) {
  std::string outside = options.external_data;
  auto places = detail::places_of(model, outside, options.external_threshold);
  detail::Pieces pieces = detail::encode(model, places);
  if (outside.empty() && pieces.size() > detail::message_limit) {
    outside = path.filename().string() + ".data";
    places = detail::places_of(model, outside, options.external_threshold);
    pieces = detail::encode(model, places);
  }
  detail::check_limit(path.string(), pieces.size());

  io::detail::AtomicFile file(path);
  pieces.for_each([&](detail::Bytes bytes) { file.write(bytes); });
  if (std::ranges::none_of(places, [](const auto& place) { return place.has_value(); })) {
    return file.commit();
  }
  io::detail::AtomicFile data(detail::path_outside(path, outside));
  detail::write_outside(data, model, places);
  io::detail::AtomicFile::commit(
      data, file, [&](io::detail::AtomicFile& to, const std::string& name) {
        const auto there = detail::places_of(model, name, options.external_threshold);
        detail::encode(model, there).for_each([&](detail::Bytes bytes) { to.write(bytes); });
      });
}

inline std::vector<std::byte> serialize_model(const Model& model) {
  const detail::Pieces pieces = detail::encode(model, detail::places_of(model, "", 0));
  detail::check_limit(model.origin, pieces.size());
  std::vector<std::byte> result;
  result.reserve(pieces.size());
  pieces.for_each(
      [&](detail::Bytes bytes) { result.insert(result.end(), bytes.begin(), bytes.end()); });
  return result;
}

}  // namespace concertina::onnx
