// Any bytes: either refused with a FormatError, or a file that serialises and parses to itself.
// SPDX-License-Identifier: Apache-2.0
#include <concertina/io/safetensors.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <span>
#include <string>
#include <vector>

namespace {

using namespace concertina;
using namespace concertina::io;

void require(bool holds) {
  if (!holds) std::abort();
}

/// Reads a tensor as T where that is legal; then, and only then, there are as many values as the
/// shape says.
template <class T>
void read_values(const Safetensors& file, const std::string& name) {
  const Tensor& tensor = file.tensor(name);
  try {
    const std::size_t count = file.values<T>(name).size();
    require(count * size_of(tensor.dtype) == tensor.bytes.size());
  } catch (const FormatError&) {
    require(dtype_of<T>() != tensor.dtype);
  }
}

template <class T>
void view_values(const Safetensors& file, const std::string& name) {
  const Tensor& tensor = file.tensor(name);
  try {
    const auto bytes = std::as_bytes(file.view<T>(name));
    require(dtype_of<T>() == tensor.dtype && std::ranges::equal(bytes, tensor.bytes));
  } catch (const FormatError&) {
    require(dtype_of<T>() != tensor.dtype);
  }
}

template <class... Ts>
void read_as(const Safetensors& file, const std::string& name) {
  (read_values<Ts>(file, name), ...);
  (view_values<Ts>(file, name), ...);
}

}  // namespace

extern "C" std::size_t LLVMFuzzerMutate(std::uint8_t* data, std::size_t size, std::size_t max_size);

/// Mutates anything, and then usually makes the length field right again: the header ends with the
/// last brace and the spaces after it.
extern "C" std::size_t LLVMFuzzerCustomMutator(std::uint8_t* data, std::size_t size,
                                               std::size_t max_size, unsigned seed) {
  size = LLVMFuzzerMutate(data, size, max_size);
  std::size_t end = size;
  while (end > 8 && data[end - 1] != '}') --end;
  while (end > 8 && end < size && data[end] == ' ') ++end;
  if (end <= 8 || seed % 8 == 0) return size;
  for (std::size_t i = 0; i < 8; ++i) data[i] = static_cast<std::uint8_t>((end - 8) >> (8 * i));
  return size;
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) try {
  const Safetensors file = parse_safetensors(std::as_bytes(std::span(data, size)));
  for (const auto& [name, tensor] : file.tensors) {
    read_values<bool>(file, name);
    read_values<long double>(file, name);
    read_as<std::uint8_t, std::int8_t, std::uint16_t, std::int16_t, Eigen::half, Eigen::bfloat16,
            std::uint32_t, std::int32_t, float, std::uint64_t, std::int64_t, double>(file, name);
  }
  const std::vector<std::byte> written = serialize_safetensors(file);
  const Safetensors again = parse_safetensors(written);
  require(again == file);
  require(serialize_safetensors(again) == written);
  return 0;
} catch (const FormatError&) {
  return 0;
}
