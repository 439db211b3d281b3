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

/// Memory of a model's, with whatever else has to stay for as long.
struct Storage {
  std::shared_ptr<const void> other;
  std::unique_ptr<std::byte[]> bytes;
};

inline std::pair<std::shared_ptr<Storage>, std::span<std::byte>> allocate(
    std::size_t size, std::shared_ptr<const void> other = {}) {
  auto storage = std::make_shared<Storage>();
  storage->other = std::move(other);
  storage->bytes = std::make_unique_for_overwrite<std::byte[]>(size);
  return {storage, {storage->bytes.get(), size}};
}

/// What a tensor says of the range of another file that has its elements.
struct ExternalRange {
  std::string location;
  std::int64_t offset = 0;
  std::optional<std::int64_t> length = {};
};

/// The file beside the model; throws FormatError if the location is not one, links followed.
inline std::filesystem::path external_path(const std::string& where,
                                           const std::filesystem::path& folder,
                                           const std::string& location) {
  const std::string shown_location = "external data " + in_quotes(location);
  const std::filesystem::path path(location);
  if (location.empty() || location.find('\0') != std::string::npos || path.has_root_path()) {
    fail<FormatError>({where, ": ", shown_location, " is not a path from the model's folder"});
  }
  std::error_code error;
  const auto root = std::filesystem::canonical(folder, error);
  const auto file = error ? path : std::filesystem::canonical(root / path, error);
  if (error) fail<FormatError>({where, ": ", shown_location, ": ", error.message()});
  const auto relative = file.lexically_relative(root);
  if (relative.empty() || *relative.begin() == "..") {
    fail<FormatError>({where, ": ", shown_location, " is outside of the model's folder"});
  }
  return file;
}

/// The files beside a model. Ranges are read once; those that overlap, never more than the file
/// has: so a small model cannot ask for more memory than its files take.
class ExternalData {
 public:
  /// An empty folder has no files.
  explicit ExternalData(std::filesystem::path folder) : folder_(std::move(folder)) {}

  struct Found {
    std::shared_ptr<const void> storage;
    Bytes bytes;
  };

  /// The range, which has to have `size` bytes where that is known. Where it is shared, tensors of
  /// equal ranges have equal storage.
  Found read(const std::string& where, const ExternalRange& range, std::optional<std::int64_t> size,
             const std::shared_ptr<const void>& other, bool shared) {
    if (folder_.empty()) {
      fail<FormatError>({where, ": its elements are in a file beside the model, ",
                         in_quotes(range.location), ", but the model is in memory alone"});
    }
    File& file = open(where, range.location);
    const std::int64_t left = file.size - range.offset;
    const std::int64_t length = range.length.value_or(size.value_or(left));
    if (range.offset > file.size || length > left) {
      fail<FormatError>({where, ": external data ", in_quotes(range.location), " has ", file.size,
                         " bytes, but the tensor takes ", length, " from byte ", range.offset});
    }
    if (shared) {
      const auto before = file.ranges.find({range.offset, length});
      if (before != file.ranges.end()) return before->second;
    }
    file.read += length;
    if (file.read > file.size) {
      fail<FormatError>({where, ": external data ", in_quotes(range.location), " of ", file.size,
                         " bytes is read by tensors that overlap"});
    }
    auto [storage, bytes] = allocate(static_cast<std::size_t>(length), other);
    if (std::fseek(handle_.get(), static_cast<long>(range.offset), SEEK_SET) != 0) {
      throw IoError("cannot read " + path_.string() + ": " + io::detail::system_message());
    }
    io::detail::read_next(path_, handle_.get(), bytes);
    const Found found{std::move(storage), bytes};
    if (shared) file.ranges[{range.offset, length}] = found;
    return found;
  }

 private:
  struct File {
    std::int64_t size = 0, read = 0;
    std::map<std::pair<std::int64_t, std::int64_t>, Found> ranges;
  };

  /// The file, which is open until another is.
  File& open(const std::string& where, const std::string& location) {
    auto path = external_path(where, folder_, location);
    File& file = files_[path];
    if (path != path_) {
      std::tie(handle_, file.size) = io::detail::open_file(path);
      path_ = std::move(path);
    }
    return file;
  }

  std::filesystem::path folder_, path_;
  io::detail::FileHandle handle_;
  std::map<std::filesystem::path, File> files_;
};

/// A TensorProto as it is, its elements not looked at.
struct TensorFields {
  Tensor tensor;
  Bytes raw;
  std::uint32_t typed = 0;  // the number of the field that has elements, if it is not raw_data
  bool external = false;
  ExternalRange range;
};

/// Fields of TensorProto.
inline constexpr std::uint32_t raw_data = 9, external_data = 13, data_location = 14;

/// The field that has the elements of the type one by one; 0 for types that are not known.
inline std::uint32_t typed_field(DataType type) {
  switch (type) {
    case DataType::float32:
    case DataType::complex64: return 4;
    case DataType::int64: return 7;
    case DataType::float64:
    case DataType::complex128: return 10;
    case DataType::uint32:
    case DataType::uint64: return 11;
    case DataType::string: return 6;
    default: return size_of(type) == 0 ? 0 : 5;
  }
}

inline std::pair<std::string, std::string> string_entry(const Message& field,
                                                        const Source& source) {
  std::pair<std::string, std::string> entry;
  Message message(source, field.bytes(), "StringStringEntryProto");
  while (message.next()) {
    if (message.number() == 1) entry.first = message.text();
    if (message.number() == 2) entry.second = message.text();
  }
  return entry;
}

inline std::int64_t decimal(const Message& message, const std::string& text) {
  std::int64_t value = -1;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || value < 0) {
    message.refuse("external data from or of " + in_quotes(text) +
                   " bytes, expected a number from 0 to 2^63 - 1");
  }
  return value;
}

inline TensorFields tensor_fields(const Source& source, Bytes encoded) {
  TensorFields found;
  Tensor& tensor = found.tensor;
  tensor.encoded = encoded;
  Message message(source, encoded, "TensorProto");
  while (message.next()) {
    switch (message.number()) {
      case 1:
        message.numbers(WireType::varint, [&](std::uint64_t dimension) {
          tensor.dims.push_back(static_cast<std::int64_t>(dimension));
        });
        break;
      case 2: tensor.type = static_cast<DataType>(message.small_integer()); break;
      case 3: message.refuse("a segment: tensors in parts are not supported");
      case 4:
      case 5:
      case 6:
      case 7:
      case 10:
      case 11:
        if (found.typed != 0 && found.typed != message.number()) {
          message.refuse("elements in field " + std::to_string(message.number()) +
                         " and in field " + std::to_string(found.typed));
        }
        found.typed = message.number();
        break;
      case 8: tensor.name = message.text(); break;
      case raw_data: found.raw = message.bytes(); break;
      case external_data: {
        const auto [key, value] = string_entry(message, source);
        if (key == "location") found.range.location = value;
        if (key == "offset") found.range.offset = decimal(message, value);
        if (key == "length") found.range.length = decimal(message, value);
        break;
      }
      case data_location: {
        const std::int32_t location = message.small_integer();
        if (location != 0 && location != 1) {
          message.refuse("data location " + std::to_string(location) + ", expected 0 or 1");
        }
        found.external = location == 1;
        break;
      }
      default: break;
    }
  }
  return found;
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
    switch (message.number()) {
      case 4:
      case 5:
      case 7:
      case 9:
      case 10:
      case 11:
      case 13:
      case 14: break;
      default: others.push_back({message.number(), message.encoded()});
    }
  }
  const bool is_new = tensor.encoded.empty();
  Ordered out(std::move(others));
  if (is_new) {
    for (const std::int64_t dimension : tensor.dims) out.at(1).integer(1, dimension);
    out.at(2).integer(2, static_cast<std::int32_t>(tensor.type));
    out.at(8).text(8, tensor.name);
  }
  if (!place) {
    out.at(9).bytes(9, tensor.elements);
    return out.finish();
  }
  const auto entry = [&](const char* key, const std::string& value) {
    Pieces pair;
    pair.text(1, key);
    pair.text(2, value);
    out.at(13).message(13, std::move(pair));
  };
  entry("location", place->location);
  entry("offset", std::to_string(place->offset));
  entry("length", std::to_string(tensor.elements.size()));
  out.at(14).integer(14, 1);
  return out.finish();
}

}  // namespace concertina::onnx::detail
