// Any bytes: either refused with a FormatError, or a model that serialises and parses to itself.
// SPDX-License-Identifier: Apache-2.0
#include <concertina/io/onnx.hpp>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <span>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) try {
  using namespace concertina::onnx;
  const std::vector<std::byte> written =
      serialize_model(parse_model(std::as_bytes(std::span(data, size))));
  if (serialize_model(parse_model(written)) != written) std::abort();
  return 0;
} catch (const concertina::FormatError&) {
  return 0;
}
