// Any text as what the command line takes for a chain or an input: either refused with a
// UsageError, or layers and shapes that say what the text does.
// SPDX-License-Identifier: Apache-2.0
#include "onnx/chain.hpp"
#include "text.hpp"
#include "tool/input_shape.hpp"

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>

namespace {

void require(bool holds) {
  if (!holds) std::abort();
}

void check_chain(const std::string& text) try {
  std::string joined;
  bool first = true;
  for (const tool::ChainLayer& layer : tool::parse_chain(text)) {
    joined += (first ? "" : ",") + layer.text;
    first = false;
    require(layer.text.starts_with(layer.name));
    require(!layer.eps || (*layer.eps >= 0 && *layer.eps < 1e39));
  }
  require(joined == text);
} catch (const tool::UsageError&) {
}

void check_input(const std::string& text) try {
  const auto [name, dims] = tool::parse_input(text);
  require(!name.empty() && !dims.empty());
  std::string shape;  // without leading zeros, which may be there
  for (const auto extent : dims) {
    require(extent >= 1);
    shape += (shape.empty() ? "" : "x") + std::to_string(extent);
  }
  require(tool::parse_input(name + "=" + shape) == std::pair(name, dims));
  require(text.starts_with(name + "=") && text.size() >= name.size() + 1 + shape.size());
} catch (const tool::UsageError&) {
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string text(reinterpret_cast<const char*>(data), size);
  check_chain(text);
  check_input(text);
  for (const char c : tool::printable(text)) require(c >= ' ' && c < 127);
  return 0;
}
