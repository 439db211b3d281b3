// How safetensors files are read, checked and written.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/detail/io/elements.hpp>
#include <concertina/detail/io/files.hpp>
#include <concertina/detail/io/text.hpp>
#include <concertina/io/safetensors.hpp>

#include <Eigen/Core>  // half, bfloat16
#include <nlohmann/json.hpp>

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <limits>
#include <tuple>
#include <type_traits>
#include <utility>

namespace concertina::io {

namespace detail {

inline constexpr std::ptrdiff_t header_limit = 100'000'000;  // the format's own
inline constexpr std::ptrdiff_t length_bytes = 8;            // before the header, its length
inline constexpr std::ptrdiff_t integer_limit = std::numeric_limits<std::ptrdiff_t>::max();
inline constexpr std::string_view metadata_name = "__metadata__";

inline constexpr std::array<std::string_view, 13> dtype_names = {
    "BOOL", "U8", "I8", "U16", "I16", "F16", "BF16", "U32", "I32", "F32", "U64", "I64", "F64"};

/// Dtypes whose values are not read, but whose elements' bytes are known.
inline constexpr std::array<std::pair<std::string_view, std::ptrdiff_t>, 4> other_widths = {
    {{"F8_E5M2", 1}, {"F8_E4M3", 1}, {"F8_E8M0", 1}, {"C64", 8}}};

/// Whether a name can be that of a dtype Other: as the format's are, and none that is known.
inline bool names_other_dtype(std::string_view name) {
  constexpr std::size_t longest = 32;
  const auto is_upper = [](char c) { return 'A' <= c && c <= 'Z'; };
  return !name.empty() && name.size() <= longest && is_upper(name.front()) &&
         std::ranges::all_of(
             name, [&](char c) { return is_upper(c) || ('0' <= c && c <= '9') || c == '_'; }) &&
         std::ranges::find(dtype_names, name) == dtype_names.end();
}

/// visit(std::type_identity<T>{}) with the type that stores the dtype.
template <class Visit>
constexpr auto with_storage(Dtype dtype, const Visit& visit) {
  switch (dtype) {
    case Dtype::Bool: return visit(std::type_identity<bool>{});
    case Dtype::U8: return visit(std::type_identity<std::uint8_t>{});
    case Dtype::I8: return visit(std::type_identity<std::int8_t>{});
    case Dtype::U16: return visit(std::type_identity<std::uint16_t>{});
    case Dtype::I16: return visit(std::type_identity<std::int16_t>{});
    case Dtype::F16: return visit(std::type_identity<Eigen::half>{});
    case Dtype::BF16: return visit(std::type_identity<Eigen::bfloat16>{});
    case Dtype::U32: return visit(std::type_identity<std::uint32_t>{});
    case Dtype::I32: return visit(std::type_identity<std::int32_t>{});
    case Dtype::F32: return visit(std::type_identity<float>{});
    case Dtype::U64: return visit(std::type_identity<std::uint64_t>{});
    case Dtype::I64: return visit(std::type_identity<std::int64_t>{});
    case Dtype::F64: return visit(std::type_identity<double>{});
    case Dtype::Other: throw FormatError("dtype Other has no type that stores it");
  }
  throw FormatError("Dtype " + std::to_string(static_cast<int>(dtype)) +
                    " is none of the enumerators");
}

template <class Scalar>
std::string scalar_name() {
  if constexpr (Stored<Scalar>) return to_string(*dtype_of<Scalar>());
  return "long double";
}

inline std::string about(const std::string& origin, std::string_view tensor) {
  return origin + ": tensor " + in_quotes(tensor);
}

/// Bytes per element; 0 where they are not known, and may be less than one.
inline std::ptrdiff_t width_of(const Tensor& tensor) {
  if (tensor.dtype != Dtype::Other) return static_cast<std::ptrdiff_t>(size_of(tensor.dtype));
  const auto found = std::ranges::find(other_widths, std::string_view(tensor.other_dtype),
                                       [](const auto& each) { return each.first; });
  return found == other_widths.end() ? 0 : found->second;
}

/// Refuses a name of another dtype that no file could have, or that is there without need.
inline void check_dtype(const std::string& where, const Tensor& tensor) {
  const bool fits = tensor.dtype == Dtype::Other ? names_other_dtype(tensor.other_dtype)
                                                 : tensor.other_dtype.empty();
  if (!fits) {
    refuse(where, "other_dtype is " + in_quotes(tensor.other_dtype) + ", where the dtype is " +
                      to_string(tensor.dtype));
  }
}

/// Refuses a shape that has a negative dimension, that does not take `found` bytes, or whose size
/// overflows even if the zeros in it are left out: so no product of dimensions overflows elsewhere.
/// Where the bytes of an element are not known, any number of bytes fits.
inline void check_size(const std::string& where, const Tensor& tensor, std::size_t found) {
  const std::ptrdiff_t width = width_of(tensor);
  const std::string dtype = tensor.dtype_name();
  auto needed = std::max<std::ptrdiff_t>(width, 1);
  bool empty = false;
  for (const std::ptrdiff_t dimension : tensor.shape) {
    if (dimension < 0) refuse(where, "shape " + shown(tensor.shape) + " has a negative dimension");
    empty = empty || dimension == 0;
    const std::ptrdiff_t factor = std::max<std::ptrdiff_t>(dimension, 1);
    if (needed > integer_limit / factor) {
      refuse(where, "shape " + shown(tensor.shape) + " of " + dtype +
                        (width > 0 ? " takes 2^63 bytes or more" : " has 2^63 elements or more"));
    }
    needed *= factor;
  }
  if (empty) needed = 0;
  if (width > 0 && std::cmp_not_equal(needed, found)) {
    refuse(where, dtype + " of shape " + shown(tensor.shape) + " takes " + std::to_string(needed) +
                      " bytes, but there are " + std::to_string(found));
  }
}

/// Refuses a tensor whose elements have no type here, or whose bytes do not fit its shape.
inline void check_readable(const std::string& where, const Tensor& tensor) {
  if (tensor.dtype == Dtype::Other) {
    refuse(where, "values of dtype " + shown(tensor.other_dtype) + " cannot be read, only " +
                      listed(
                          dtype_names, [](std::string_view name) { return std::string(name); },
                          static_cast<int>(dtype_names.size())));
  }
  check_size(where, tensor, tensor.bytes.size());
}

inline void check_name(const std::string& origin, std::string_view name) {
  if (name == metadata_name) {
    refuse(origin, in_quotes(name) + " is reserved by the format; rename the tensor");
  }
}

// ---- reading

/// Where a tensor's bytes are, counted from the end of the header.
struct Range {
  std::ptrdiff_t begin, end;
  std::pair<const std::string, Tensor>* tensor;
};

/// Takes the header's JSON one token at a time and refuses the first that does not belong where it
/// is; so nothing nests deeper than the format does, and nothing is stored but tensors and
/// metadata. Its public names are those that nlohmann::json::sax_parse calls.
class HeaderParser {
 public:
  HeaderParser(Safetensors& file, std::ptrdiff_t data_size) : file_(file), data_size_(data_size) {}

  std::vector<Range>& ranges() { return ranges_; }

  bool null() { unexpected("null"); }
  bool boolean(bool value) { unexpected(value ? "true" : "false"); }
  bool number_float(double, const std::string& digits) { unexpected(shown(digits)); }
  bool binary(std::vector<std::uint8_t>&) { unexpected("binary data"); }  // never from JSON text

  bool number_integer(std::int64_t value) {  // one with a minus sign
    unexpected(value == 0 ? "-0" : std::to_string(value));
  }

  bool number_unsigned(std::uint64_t value) {
    if (place_ != Place::Integer || std::cmp_greater(value, integer_limit)) {
      unexpected(std::to_string(value));
    }
    integers_->push_back(static_cast<std::ptrdiff_t>(value));
    return true;
  }

  bool string(const std::string& value) {
    if (place_ == Place::MetadataValue) {
      file_.metadata.emplace(key_, value);
      place_ = Place::Metadata;
    } else if (place_ == Place::Dtype) {
      const auto found = std::ranges::find(dtype_names, value);
      if (found != dtype_names.end()) {
        dtype_ = static_cast<Dtype>(found - dtype_names.begin());
      } else if (names_other_dtype(value)) {
        dtype_ = Dtype::Other;
        other_dtype_ = value;
      } else {
        refuse(where(), in_quotes(value) +
                            " is not the name of a dtype, which is upper-case as F32 or F8_E4M3");
      }
      place_ = Place::Fields;
    } else {
      unexpected(in_quotes(value));
    }
    return true;
  }

  bool start_object(std::size_t) {
    switch (place_) {
      case Place::Header: place_ = Place::Names; break;
      case Place::MetadataObject: place_ = Place::Metadata; break;
      case Place::Tensor: place_ = Place::Fields; break;
      default: unexpected("an object");
    }
    return true;
  }

  bool key(const std::string& key) {
    key_ = key;
    switch (place_) {
      case Place::Names: start_entry(); break;
      case Place::Metadata: start_metadata_value(); break;
      default: start_field(); break;
    }
    return true;
  }

  bool end_object() {
    if (place_ == Place::Fields) finish_tensor();
    place_ = Place::Names;
    return true;
  }

  bool start_array(std::size_t) {
    if (place_ != Place::Array) unexpected("an array");
    place_ = Place::Integer;
    return true;
  }

  bool end_array() {
    place_ = Place::Fields;
    return true;
  }

  bool parse_error(std::size_t position, const std::string&,
                   const nlohmann::json::exception& error) {
    refuse(file_.origin + ": byte " +
               std::to_string(static_cast<std::size_t>(length_bytes) + position - 1),
           std::string("the header is not valid JSON; ") + shown(error.what(), 300));
  }

 private:
  /// What comes next: the value that is named, or a key where that is plural.
  enum class Place {
    Header,
    Names,
    MetadataObject,
    Metadata,
    MetadataValue,
    Tensor,
    Fields,
    Dtype,
    Array,
    Integer
  };

  void start_entry() {
    name_ = key_;
    if (name_ == metadata_name) {
      if (has_metadata_) refuse(file_.origin, in_quotes(name_) + " is there twice");
      has_metadata_ = true;
      place_ = Place::MetadataObject;
    } else {
      if (file_.contains(name_)) refuse(about(file_.origin, name_), "the name is there twice");
      dtype_.reset();
      other_dtype_.clear();
      shape_.reset();
      offsets_.reset();
      place_ = Place::Tensor;
    }
  }

  void start_metadata_value() {
    place_ = Place::MetadataValue;
    if (file_.metadata.contains(key_)) refuse(where(), "the key is there twice");
  }

  void start_field() {
    if (key_ == "dtype") {
      place_ = Place::Dtype;
      if (dtype_) refuse(where(), "the field is there twice");
    } else if (key_ == "shape" || key_ == "data_offsets") {
      place_ = Place::Array;
      auto& integers = key_ == "shape" ? shape_ : offsets_;
      if (integers) refuse(where(), "the field is there twice");
      integers_ = &integers.emplace();
    } else {
      refuse(about(file_.origin, name_), "field " + in_quotes(key_) + " is unknown, expected " +
                                             "dtype, shape or data_offsets");
    }
  }

  void finish_tensor() {
    const std::string tensor = about(file_.origin, name_);
    if (!dtype_) refuse(tensor, "dtype is missing");
    if (!shape_) refuse(tensor, "shape is missing");
    if (!offsets_) refuse(tensor, "data_offsets is missing");
    const std::string data_offsets = "data_offsets " + shown(*offsets_);
    if (offsets_->size() != 2) {
      refuse(tensor, data_offsets + " has to be two numbers, [begin, end]");
    }
    const std::ptrdiff_t begin = offsets_->front(), end = offsets_->back();
    if (begin > end) refuse(tensor, data_offsets + " ends before it begins");
    if (end > data_size_) {
      refuse(tensor, data_offsets + " reaches beyond the data, which has " +
                         std::to_string(data_size_) +
                         " bytes; the file is cut short, or its header is wrong");
    }
    Tensor read{*dtype_, std::move(*shape_), {}, other_dtype_};
    check_size(tensor + ", " + data_offsets, read, static_cast<std::size_t>(end - begin));
    const auto [at, added] = file_.tensors.emplace(name_, std::move(read));
    ranges_.push_back({begin, end, &*at});
  }

  /// The value that comes next. The header is known to begin with a brace, and where a key must
  /// come the JSON parser lets nothing else through; so the other places cannot be wrong.
  std::string where() const {
    switch (place_) {
      case Place::MetadataObject: return file_.origin + ": " + std::string(metadata_name);
      case Place::MetadataValue: return file_.origin + ": metadata " + in_quotes(key_);
      case Place::Tensor: return about(file_.origin, name_);
      default: return about(file_.origin, name_) + ", " + key_;
    }
  }

  std::string expected() const {
    switch (place_) {
      case Place::MetadataObject: return "an object of strings";
      case Place::MetadataValue: return "a string; write other values as text";
      case Place::Tensor: return "an object with dtype, shape and data_offsets";
      case Place::Dtype: return "a string";
      case Place::Array: return "an array of integers";
      default: return "an integer from 0 to " + std::to_string(integer_limit);
    }
  }

  [[noreturn]] void unexpected(const std::string& found) const {
    refuse(where(), "found " + found + ", expected " + expected());
  }

  Safetensors& file_;
  std::ptrdiff_t data_size_;
  std::vector<Range> ranges_;
  Place place_ = Place::Header;
  bool has_metadata_ = false;
  std::string name_, key_;  // of the entry, and within it
  std::optional<Dtype> dtype_;
  std::string other_dtype_;
  std::optional<std::vector<std::ptrdiff_t>> shape_, offsets_;
  std::vector<std::ptrdiff_t>* integers_ = nullptr;  // the one of them that is being read
};

/// Sorts the ranges and refuses any that leave a byte of the data to no tensor or to two.
inline void check_layout(const std::string& origin, std::vector<Range>& ranges,
                         std::ptrdiff_t data_size) {
  std::ranges::sort(ranges, {}, [](const Range& range) {
    return std::tuple(range.begin, range.end, std::string_view(range.tensor->first));
  });
  const Range* previous = nullptr;
  std::ptrdiff_t covered = 0;
  for (const Range& range : ranges) {
    const std::string& name = range.tensor->first;
    if (range.begin < covered) {
      refuse(about(origin, name),
             "begins at byte " + std::to_string(range.begin) + " of the data, within tensor " +
                 in_quotes(previous->tensor->first) + ", which ends at " + std::to_string(covered));
    }
    if (range.begin > covered) {
      refuse(about(origin, name), "begins at byte " + std::to_string(range.begin) +
                                      " of the data, but those from " + std::to_string(covered) +
                                      " on belong to no tensor; the format forbids holes");
    }
    covered = range.end;
    previous = &range;
  }
  if (covered != data_size) {
    refuse(origin, "the tensors end at byte " + std::to_string(covered) +
                       " of the data, but it goes on to " + std::to_string(data_size) +
                       "; the format forbids that");
  }
}

/// Reads a file of `size` bytes; next(span) fills a span with the bytes that follow those before.
template <class Next>
Safetensors read(std::string origin, std::ptrdiff_t size, const Next& next) {
  Safetensors file{.origin = std::move(origin), .metadata = {}, .tensors = {}};
  if (size < length_bytes) {
    refuse(file.origin, "the file has " + std::to_string(size) +
                            " bytes, but the header's length alone takes 8");
  }
  std::array<std::byte, length_bytes> length_field;
  next(std::span(length_field));
  const auto length = std::bit_cast<std::uint64_t>(length_field);
  if (std::cmp_greater(length, header_limit)) {
    refuse(file.origin, "byte 0: the header's length is " + std::to_string(length) +
                            ", but at most " + std::to_string(header_limit) +
                            " is allowed; this may not be a safetensors file");
  }
  const std::ptrdiff_t data_size = size - length_bytes - static_cast<std::ptrdiff_t>(length);
  if (data_size < 0) {
    refuse(file.origin, "byte 0: the header's length is " + std::to_string(length) + ", but only " +
                            std::to_string(size - length_bytes) +
                            " bytes follow; the file is cut short");
  }

  std::string header(length, '\0');
  next(std::as_writable_bytes(std::span(header)));
  // The JSON parser would skip a byte order mark, and take a NUL for the end of the text.
  if (!header.starts_with('{')) {
    refuse(file.origin,
           "byte 8: the header begins with " + in_quotes(header.substr(0, 1)) + ", expected \"{\"");
  }
  if (const auto nul = header.find('\0'); nul != std::string::npos) {
    refuse(file.origin, "byte " + std::to_string(static_cast<std::size_t>(length_bytes) + nul) +
                            ": the header has a NUL; pad it with spaces");
  }
  HeaderParser parser(file, data_size);
  nlohmann::json::sax_parse(header.data(), header.data() + header.size(), &parser);

  check_layout(file.origin, parser.ranges(), data_size);
  for (const Range& range : parser.ranges()) {
    std::vector<std::byte>& bytes = range.tensor->second.bytes;
    bytes.resize(static_cast<std::size_t>(range.end - range.begin));
    next(std::span(bytes));
  }
  return file;
}

// ---- writing

/// A file in parts: its length field and header, then the tensors in the order of their data.
struct FileParts {
  std::string head;
  std::vector<std::span<const std::byte>> data;
};

inline std::string json_text(const std::string& origin, const std::string& text) try {
  return nlohmann::json(text).dump();
} catch (const nlohmann::json::exception&) {
  refuse(origin, in_quotes(text) + " is not UTF-8, as names and metadata must be");
}

/// Largest elements first, those of unknown size last, then by name: each tensor is aligned,
/// because everything before it is a multiple of its element size, and the bytes depend on nothing
/// but the contents.
inline FileParts split(const std::string& origin, const Safetensors& file) {
  std::vector<const std::pair<const std::string, Tensor>*> order;
  for (const auto& entry : file.tensors) {
    check_name(origin, entry.first);
    check_dtype(about(origin, entry.first), entry.second);
    check_size(about(origin, entry.first), entry.second, entry.second.bytes.size());
    order.push_back(&entry);
  }
  std::ranges::sort(order, {}, [](const auto* entry) {
    return std::pair(-width_of(entry->second), std::string_view(entry->first));
  });

  FileParts parts;
  std::string header = "{";
  const auto separate = [&header] { header += header.back() == '{' ? "" : ","; };
  if (!file.metadata.empty()) {
    header += json_text(origin, std::string(metadata_name)) + ":{";
    for (const auto& [key, value] : file.metadata) {
      separate();
      header += json_text(origin, key) + ':' + json_text(origin, value);
    }
    header += '}';
  }
  std::size_t offset = 0;
  for (const auto* entry : order) {
    const auto& [name, tensor] = *entry;
    const std::size_t end = offset + tensor.bytes.size();
    separate();
    header += json_text(origin, name) + R"(:{"dtype":")" + tensor.dtype_name() + R"(","shape":)" +
              nlohmann::json(tensor.shape).dump() + R"(,"data_offsets":[)" +
              std::to_string(offset) + ',' + std::to_string(end) + "]}";
    parts.data.emplace_back(tensor.bytes);
    offset = end;
  }
  header += '}';
  header.resize((header.size() + 7) / 8 * 8, ' ');
  if (std::cmp_greater(header.size(), header_limit)) {
    refuse(origin, "the header takes " + std::to_string(header.size()) +
                       " bytes, but the format allows " + std::to_string(header_limit) +
                       "; shorten names or metadata, or split the file");
  }
  const auto length = std::bit_cast<std::array<char, length_bytes>>(std::uint64_t{header.size()});
  parts.head = std::string(length.data(), length.size()) + header;
  return parts;
}

}  // namespace detail

inline std::string to_string(Dtype dtype) {
  if (dtype == Dtype::Other) return "other";
  return std::string(detail::dtype_names.at(static_cast<std::size_t>(dtype)));
}

inline std::size_t size_of(Dtype dtype) {
  return detail::with_storage(dtype, []<class T>(std::type_identity<T>) { return sizeof(T); });
}

template <class Scalar>
constexpr std::optional<Dtype> dtype_of() {
  for (std::size_t i = 0; i < detail::dtype_names.size(); ++i) {
    const auto dtype = static_cast<Dtype>(i);
    if (detail::with_storage(dtype, []<class T>(std::type_identity<T>) {
          return detail::same_storage<T, Scalar>;
        })) {
      return dtype;
    }
  }
  return std::nullopt;
}

inline const Tensor& Safetensors::tensor(std::string_view name) const& {
  const auto found = tensors.find(name);
  if (found != tensors.end()) return found->second;
  const std::string missing = "there is no tensor " + detail::in_quotes(name);
  if (tensors.empty()) detail::refuse(origin, missing + ", and no other either");
  detail::refuse(
      origin, missing + " among the " + std::to_string(tensors.size()) +
                  " in the file: " + detail::listed(std::views::keys(tensors), detail::in_quotes));
}

template <detail::Readable Scalar>
std::vector<Scalar> Safetensors::values(std::string_view name) const {
  const Tensor& from = tensor(name);
  const std::string where = detail::about(origin, name);
  detail::check_readable(where, from);
  return detail::with_storage(from.dtype, [&]<class T>(std::type_identity<T>) {
    if constexpr (detail::holds_exactly<Scalar, T>()) {
      return detail::widened<Scalar, T>(from.bytes);
    } else {
      detail::refuse(where, to_string(from.dtype) + " does not fit " +
                                detail::scalar_name<Scalar>() +
                                " exactly; read it as a wider type and round as you wish");
      return std::vector<Scalar>();
    }
  });
}

template <Stored Scalar>
  requires(!std::same_as<Scalar, bool>)
std::span<const Scalar> Safetensors::view(std::string_view name) const& {
  static_assert(alignof(Scalar) <= __STDCPP_DEFAULT_NEW_ALIGNMENT__,
                "std::vector<std::byte> must align a Scalar");
  const Tensor& from = tensor(name);
  const std::string where = detail::about(origin, name);
  detail::check_readable(where, from);
  if (from.dtype != dtype_of<Scalar>()) {
    detail::refuse(where, to_string(from.dtype) + " cannot be viewed as " +
                              detail::scalar_name<Scalar>() +
                              "; values() converts where that is exact");
  }
  return {reinterpret_cast<const Scalar*>(from.bytes.data()), from.bytes.size() / sizeof(Scalar)};
}

template <std::ranges::contiguous_range Values>
  requires Stored<std::ranges::range_value_t<Values>>
void Safetensors::add(std::string name, std::vector<std::ptrdiff_t> shape, const Values& values) {
  constexpr Dtype dtype = *dtype_of<std::ranges::range_value_t<Values>>();
  const auto bytes = std::as_bytes(std::span(std::ranges::data(values), std::ranges::size(values)));
  const std::string where = detail::about(origin, name);
  detail::check_name(origin, name);
  Tensor tensor{dtype, std::move(shape), {}};
  detail::check_size(where, tensor, bytes.size());
  if (contains(name)) detail::refuse(where, "the name is taken");
  tensor.bytes.assign(bytes.begin(), bytes.end());
  tensors.emplace(std::move(name), std::move(tensor));
}

inline Safetensors read_safetensors(const std::filesystem::path& path) {
  const auto [file, size] = detail::open_file(path);
  return detail::read(path.string(), size, [&, handle = file.get()](std::span<std::byte> to) {
    detail::read_next(path, handle, to);
  });
}

inline Safetensors parse_safetensors(std::span<const std::byte> file, std::string origin) {
  std::span<const std::byte> rest = file;
  return detail::read(std::move(origin), std::ssize(file), [&rest](std::span<std::byte> to) {
    std::ranges::copy(rest.first(to.size()), to.begin());
    rest = rest.subspan(to.size());
  });
}

inline void write_safetensors(const std::filesystem::path& path, const Safetensors& file) {
  const detail::FileParts parts = detail::split(path.string(), file);
  detail::AtomicFile out(path);
  out.write(std::as_bytes(std::span(parts.head)));
  for (const auto bytes : parts.data) out.write(bytes);
  out.commit();
}

inline std::vector<std::byte> serialize_safetensors(const Safetensors& file) {
  const detail::FileParts parts = detail::split(file.origin, file);
  std::vector<std::byte> result;
  const auto append = [&result](std::span<const std::byte> bytes) {
    result.insert(result.end(), bytes.begin(), bytes.end());
  };
  append(std::as_bytes(std::span(parts.head)));
  for (const auto bytes : parts.data) append(bytes);
  return result;
}

}  // namespace concertina::io
