// Tensors of ONNX models: where their elements are, in the file or beside it.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/detail/io/files.hpp>
#include <concertina/detail/io/onnx_graph.hpp>
#include <concertina/detail/io/protobuf.hpp>
#include <concertina/io/onnx.hpp>

#include <charconv>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <system_error>
#include <tuple>
#include <utility>
#include <vector>

namespace concertina::onnx::detail {

/// Bytes, and what keeps them where they are.
struct Kept {
  std::shared_ptr<const void> storage;
  Bytes bytes;
};

/// Bytes kept for as long as the storage, and with them what `other` keeps.
inline Kept keep(std::vector<std::byte> bytes, std::shared_ptr<const void> other = {}) {
  const auto both =
      std::make_shared<std::pair<std::vector<std::byte>, std::shared_ptr<const void>>>(
          std::move(bytes), std::move(other));
  return {both, both->first};
}

/// What a tensor says of the range of another file that has its elements.
struct ExternalRange {
  std::string location;
  std::int64_t offset = 0;
  std::optional<std::int64_t> length = {};
};

/// The file beside the model. Refuses a location that is outside of the folder, links followed.
inline std::filesystem::path external_path(const std::string& where,
                                           const std::filesystem::path& folder,
                                           const std::string& location) {
  const auto refuse = [&](const std::string& why) {
    fail<FormatError>({where, ": external data ", in_quotes(location), ": ", why});
  };
  const std::filesystem::path path(location);
  if (location.empty() || location.find('\0') != std::string::npos || path.has_root_path()) {
    refuse("not a path from the model's folder");
  }
  std::error_code error;
  const auto root = std::filesystem::canonical(folder, error);
  const auto file = error ? path : std::filesystem::canonical(root / path, error);
  if (error) refuse(error.message());
  if (*file.lexically_relative(root).begin() == "..") refuse("outside of the model's folder");
  return file;
}

/// The files beside a model. A range is read once for all tensors that share it; those that overlap
/// are read while that takes no more memory than the file.
class ExternalData {
 public:
  /// An empty folder has no files.
  explicit ExternalData(std::filesystem::path folder) : folder_(std::move(folder)) {}

  /// The range, which has to have `size` bytes where that is known.
  Kept read(const std::string& where, const ExternalRange& range, std::optional<std::int64_t> size,
            bool share, const std::shared_ptr<const void>& other) {
    const auto refuse = [&](std::initializer_list<concertina::detail::Piece> why) {
      fail<FormatError>({where, ": external data ", in_quotes(range.location), ": ",
                         concertina::detail::text(why)});
    };
    if (folder_.empty()) refuse({"the model is not in a folder"});
    File& file = open(where, range.location);
    const std::int64_t left = file.size - range.offset;
    const std::int64_t length = size.value_or(range.length.value_or(left));
    if (range.length.value_or(length) != length) {
      refuse({*range.length, " bytes, but the tensor takes ", length});
    }
    if (left < 0 || length > left) {
      refuse({length, " bytes from byte ", range.offset, " of a file of ", file.size});
    }
    const auto shared = file.ranges.find({range.offset, length});
    if (share && shared != file.ranges.end()) return shared->second;
    file.read += length;
    if (file.read > file.size) refuse({"tensors in it overlap"});
    std::vector<std::byte> bytes(static_cast<std::size_t>(length));
    if (std::fseek(handle_.get(), static_cast<long>(range.offset), SEEK_SET) != 0) {
      throw IoError("cannot read " + path_.string() + ": " + io::detail::system_message());
    }
    io::detail::read_next(path_, handle_.get(), bytes);
    Kept kept = keep(std::move(bytes), other);
    if (share) file.ranges.emplace(std::pair(range.offset, length), kept);
    return kept;
  }

 private:
  struct File {
    std::int64_t size = 0, read = 0;
    std::map<std::pair<std::int64_t, std::int64_t>, Kept> ranges;
  };

  /// The file, which is open until another is.
  File& open(const std::string& where, const std::string& location) {
    auto path = external_path(where, folder_, location);
    File& file = files_[path];
    if (path != path_) {
      std::error_code ignored;
      if (!std::filesystem::is_regular_file(path, ignored)) {
        fail<FormatError>({where, ": external data ", in_quotes(location), ": not a regular file"});
      }
      std::tie(handle_, file.size) = io::detail::open_file(path);
      path_ = std::move(path);
    }
    return file;
  }

  std::filesystem::path folder_, path_;
  io::detail::FileHandle handle_;
  std::map<std::filesystem::path, File> files_;
};

/// Fields of TensorProto; those that have elements one by one, by type.
inline constexpr std::uint32_t floats = 4, int32s = 5, strings = 6, int64s = 7, raw_data = 9,
                               doubles = 10, uint64s = 11, external_data = 13, data_location = 14;

inline bool is_typed(std::uint32_t field) {
  return (floats <= field && field <= int64s) || field == doubles || field == uint64s;
}

/// The typed field for this type; 0 for types that are not known.
inline std::uint32_t typed_field(DataType type) {
  switch (type) {
    case DataType::float32:
    case DataType::complex64: return floats;
    case DataType::int64: return int64s;
    case DataType::float64:
    case DataType::complex128: return doubles;
    case DataType::uint32:
    case DataType::uint64: return uint64s;
    case DataType::string: return strings;
    default: return size_of(type) == 0 ? 0 : int32s;
  }
}

/// A TensorProto as it is, its elements not looked at.
struct TensorFields {
  Tensor tensor;
  Bytes raw;
  std::uint32_t typed = 0;  // the typed field that it has
  bool external = false;
  ExternalRange range;
};

inline void read_external_entry(const Source& source, const Message& field, ExternalRange& range) {
  std::string key, value;
  Message entry(source, field.bytes(), "StringStringEntryProto");
  while (entry.next()) {
    if (entry.number() == 1) key = entry.text();
    if (entry.number() == 2) value = entry.text();
  }
  if (key == "location") range.location = value;
  if (key != "offset" && key != "length") return;
  std::int64_t number = -1;
  const char* const end = value.data() + value.size();
  const auto [stop, error] = std::from_chars(value.data(), end, number);
  if (error != std::errc() || stop != end || number < 0) {
    field.refuse({"external data with ", key, ' ' + in_quotes(value),
                  ", expected a number from 0 to 2^63 - 1"});
  }
  (key == "offset" ? range.offset : range.length.emplace()) = number;
}

inline TensorFields tensor_fields(const Source& source, Bytes encoded) {
  TensorFields found;
  Tensor& tensor = found.tensor;
  tensor.encoded = encoded;
  Message message(source, encoded, "TensorProto");
  while (message.next()) {
    const std::uint32_t number = message.number();
    switch (number) {
      case 1:
        message.numbers(WireType::varint, [&](std::uint64_t dimension) {
          tensor.dims.push_back(static_cast<std::int64_t>(dimension));
        });
        break;
      case 2: tensor.type = static_cast<DataType>(message.small_integer()); break;
      case 3: message.refuse({"a segment; tensors in parts are not supported"});
      case 8: tensor.name = message.text(); break;
      case raw_data: found.raw = message.bytes(); break;
      case external_data: read_external_entry(source, message, found.range); break;
      case data_location:
        if (message.integer() != 0 && message.integer() != 1) {
          message.refuse({"data location ", message.integer(), ", expected 0 or 1"});
        }
        found.external = message.integer() == 1;
        break;
      default:
        if (!is_typed(number)) break;
        if (found.typed != 0 && found.typed != number) {
          message.refuse({"elements in fields ", found.typed, " and ", number});
        }
        found.typed = number;
    }
  }
  return found;
}

/// Elements one by one, as wide as the type; those of complex numbers are two.
inline std::vector<std::byte> typed_elements(const Source& source, const Tensor& tensor,
                                             std::uint32_t field) {
  const std::size_t width = field == floats ? 4 : field == doubles ? 8 : size_of(tensor.type);
  const WireType wire = field == floats    ? WireType::fixed32
                        : field == doubles ? WireType::fixed64
                                           : WireType::varint;
  std::vector<std::byte> elements;
  Message message(source, tensor.encoded, "TensorProto");
  while (message.next()) {
    if (message.number() != field) continue;
    message.numbers(wire, [&](std::uint64_t bits) {
      // Signed or not: int8 takes -128 to 255.
      const auto above = static_cast<std::int64_t>(bits) >> (8 * width - 1);
      if (wire == WireType::varint && width < 8 && (above < -1 || above > 1)) {
        message.refuse({"element ", static_cast<std::int64_t>(bits), ", which is no ",
                        to_string(tensor.type)});
      }
      for (std::size_t i = 0; i < width; ++i) elements.push_back(std::byte(bits >> (8 * i)));
    });
  }
  return elements;
}

/// Where a tensor's elements are written.
struct ExternalPlace {
  std::string location;
  std::size_t offset = 0;
};

/// A tensor with its elements in raw_data or outside, and all else as it was.
inline Pieces with_elements(const Source& source, const Tensor& tensor,
                            const std::optional<ExternalPlace>& place = {}) {
  std::vector<Field> others;
  Message message(source, tensor.encoded, "TensorProto");
  while (message.next()) {
    const std::uint32_t number = message.number();
    if (is_typed(number) || number == raw_data || number == external_data ||
        number == data_location) {
      continue;
    }
    others.push_back({number, message.encoded()});
  }
  Ordered out(others);
  if (tensor.encoded.empty()) {
    for (const std::int64_t dimension : tensor.dims) out.at(1).integer(1, dimension);
    out.at(2).integer(2, static_cast<std::int32_t>(tensor.type));
    out.at(8).text(8, tensor.name);
  }
  if (!place) {
    out.at(raw_data).bytes(raw_data, tensor.elements);
    return out.finish();
  }
  const auto add = [&](std::string_view key, const std::string& value) {
    Pieces entry;
    entry.text(1, key);
    entry.text(2, value);
    out.at(external_data).message(external_data, std::move(entry));
  };
  add("location", place->location);
  add("offset", std::to_string(place->offset));
  add("length", std::to_string(tensor.elements.size()));
  out.at(data_location).integer(data_location, 1);
  return out.finish();
}

}  // namespace concertina::onnx::detail
