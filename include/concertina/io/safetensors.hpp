// Safetensors files: named arrays and string metadata, read with distrust, written all or nothing.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/error.hpp>  // FormatError, IoError

#include <bit>
#include <concepts>
#include <cstddef>
#include <filesystem>
#include <functional>
#include <map>
#include <optional>
#include <ranges>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace concertina::io {

static_assert(std::endian::native == std::endian::little,
              "safetensors data is little-endian and kept as it is in the file; a big-endian host "
              "needs the bytes of each element swapped in values and add, and has no view");

/// What the elements of a tensor are, smallest first. In the file the names are the same, and BOOL.
/// Other is any other dtype, such as F8_E4M3: kept and written back, but its values are not read.
enum class Dtype { Bool, U8, I8, U16, I16, F16, BF16, U32, I32, F32, U64, I64, F64, Other };

/// The name in the file; "other" for Other, whose name the tensor has.
std::string to_string(Dtype dtype);

/// Bytes per element. Throws FormatError for Other.
std::size_t size_of(Dtype dtype);

/// The dtype that stores a Scalar, bit by bit; none for long double and for what is no number.
template <class Scalar>
constexpr std::optional<Dtype> dtype_of();

/// A type that tensors store.
template <class Scalar>
concept Stored = dtype_of<Scalar>().has_value();

namespace detail {

/// A type that values can be read as.
template <class Scalar>
concept Readable = Stored<Scalar> || std::same_as<Scalar, long double>;

}  // namespace detail

/// An array, row-major. An empty shape is a scalar; a dimension may be zero.
struct Tensor {
  Dtype dtype{};
  std::vector<std::ptrdiff_t> shape;
  std::vector<std::byte> bytes;  // little-endian; std::vector aligns them for every dtype
  std::string other_dtype = {};  // the name in the file if the dtype is Other, otherwise empty

  /// The name in the file, Other or not.
  std::string dtype_name() const { return dtype == Dtype::Other ? other_dtype : to_string(dtype); }

  friend bool operator==(const Tensor&, const Tensor&) = default;
};

/// The contents of a file. Plain data: what it holds is checked when it is used and when it is
/// written.
struct Safetensors {
  std::string origin = "safetensors";  // what messages call the file; not compared and not written
  std::map<std::string, std::string> metadata;
  std::map<std::string, Tensor, std::less<>> tensors;

  bool contains(std::string_view name) const { return tensors.contains(name); }

  /// Throws FormatError with some of the names there are if this is not one of them.
  const Tensor& tensor(std::string_view name) const&;
  const Tensor& tensor(std::string_view name) const&& = delete;

  /// A copy of the elements, widened where Scalar holds every value of the dtype exactly.
  /// Throws FormatError naming both types where it does not: rounding is left to the caller; and
  /// naming the dtype if it is Other.
  template <detail::Readable Scalar>
  std::vector<Scalar> values(std::string_view name) const;

  /// The elements themselves, no copy; valid until the tensor changes or goes.
  /// Not for bool: a byte in a file may be neither 0 nor 1; values<bool>() reads it as true.
  /// Throws FormatError naming both types if the dtype is not that of Scalar.
  template <Stored Scalar>
    requires(!std::same_as<Scalar, bool>)
  std::span<const Scalar> view(std::string_view name) const&;
  template <Stored Scalar>
  std::span<const Scalar> view(std::string_view name) const&& = delete;

  /// Adds a copy of the values, which are in row-major order; of an Eigen::VectorX v, of
  /// std::span(v.data(), v.data() + v.size()).
  /// Throws FormatError if the name is taken or reserved, or the shape has another number of
  /// elements; then nothing is added.
  template <std::ranges::contiguous_range Values>
    requires Stored<std::ranges::range_value_t<Values>>
  void add(std::string name, std::vector<std::ptrdiff_t> shape, const Values& values);

  /// Equal names, dtypes, shapes, bytes and metadata.
  friend bool operator==(const Safetensors& a, const Safetensors& b) {
    return a.metadata == b.metadata && a.tensors == b.tensors;
  }
};

/// Reads and checks a whole file. Everything that the format forbids is refused, and so are fields
/// that it does not know. Tensors of a dtype that is not known are read as bytes, whose number is
/// then not checked against the shape.
/// Cost      one read; memory for the data once, and for at most some ten times the header
/// Throws    FormatError naming the place, what is there, and what was expected;
///           IoError if the path is not a readable regular file
/// Source    github.com/huggingface/safetensors, README.md, "Format"
Safetensors read_safetensors(const std::filesystem::path& path);

/// The same for a file in memory; `origin` names it in messages.
Safetensors parse_safetensors(std::span<const std::byte> file, std::string origin = "safetensors");

/// Writes a file under a temporary name in the same folder and renames it when it is complete. If
/// anything fails, whatever was at the path is still there, and nothing else. A link is followed,
/// not replaced; permissions are those of a new file. Power failures are left to the file system.
/// Ensures   read_safetensors(path) == file; each tensor is aligned to its element size;
///           equal files have equal bytes
/// Throws    FormatError if bytes do not fit their shape, or a name is reserved or not UTF-8 or
///           none of a dtype;
///           IoError if the file cannot be created, completed or renamed
void write_safetensors(const std::filesystem::path& path, const Safetensors& file);

/// The bytes that write_safetensors writes.
std::vector<std::byte> serialize_safetensors(const Safetensors& file);

}  // namespace concertina::io

#include <concertina/detail/io/safetensors.ipp>
