// Any bytes: either refused with an Error, or a model that serialises and parses to itself, and
// does so too when its nodes, tensors and types are encoded anew.
// SPDX-License-Identifier: Apache-2.0
#include <concertina/io/onnx.hpp>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <random>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace {

using namespace concertina;
using namespace concertina::onnx;

void require(bool holds) {
  if (!holds) std::abort();
}

/// Where external data is looked for: 64 bytes in the file "data".
const std::filesystem::path& folder() {
  static const std::filesystem::path path = [] {
    auto made = std::filesystem::temp_directory_path() / "concertina-fuzz-onnx";
    std::filesystem::create_directories(made);
    std::ofstream(made / "data") << std::string(64, 'x');
    return made;
  }();
  return path;
}

/// Reads a tensor as T where that is legal; then, and only then, there are as many values as the
/// shape says.
template <class T>
void read_values(const Tensor& tensor) {
  try {
    require(static_cast<std::int64_t>(tensor.values<T>().size()) == tensor.numel());
  } catch (const FormatError&) {
    require(data_type_of<T>() != tensor.type || size_of(tensor.type) == 0);
  }
}

void check_tensor(const Tensor& tensor) {
  read_values<bool>(tensor);
  read_values<std::int64_t>(tensor);
  read_values<Eigen::half>(tensor);
  read_values<float>(tensor);
  read_values<long double>(tensor);
}

void check_round_trip(const Model& model) {
  const std::vector<std::byte> written = serialize_model(model);
  const Model again = parse_model(written);
  require(serialize_model(again) == written);
  require(again.nodes.size() == model.nodes.size());
  for (std::size_t i = 0; i < model.nodes.size(); ++i) {
    require(again.nodes[i].captured == model.nodes[i].captured);
    require(again.nodes[i].attributes.size() == model.nodes[i].attributes.size());
  }
  require(again.initializers.size() == model.initializers.size());
  for (std::size_t i = 0; i < model.initializers.size(); ++i) {
    const auto before = model.initializers[i].elements, after = again.initializers[i].elements;
    require(before.size() == after.size());
    require(before.empty() || std::memcmp(before.data(), after.data(), before.size()) == 0);
  }
}

// ---- mutation that keeps lengths right

struct Part {
  std::string tag, payload;  // the payload without its length
  bool has_length;
};

bool read_varint(std::string_view& text, std::uint64_t& value) {
  value = 0;
  for (int shift = 0; shift < 64 && !text.empty(); shift += 7) {
    const auto byte = static_cast<unsigned char>(text.front());
    text.remove_prefix(1);
    value |= std::uint64_t{byte & 127U} << shift;
    if (byte < 128) return true;
  }
  return false;
}

/// The fields of a message; none where the text is not one.
std::vector<Part> split(std::string_view text) {
  std::vector<Part> parts;
  while (!text.empty()) {
    const std::string_view begin = text;
    std::uint64_t tag = 0, size = 0;
    if (!read_varint(text, tag)) return {};
    const std::string_view payload = text;
    switch (tag & 7) {
      case 0:
        if (!read_varint(text, size)) return {};
        size = payload.size() - text.size();
        text = payload;
        break;
      case 1: size = 8; break;
      case 2:
        if (!read_varint(text, size)) return {};
        break;
      case 5: size = 4; break;
      default: return {};
    }
    if (size > text.size()) return {};
    parts.push_back({std::string(begin.substr(0, begin.size() - payload.size())),
                     std::string(text.substr(0, size)), (tag & 7) == 2});
    text.remove_prefix(size);
  }
  return parts;
}

std::string joined(const std::vector<Part>& parts) {
  std::string text;
  for (const Part& part : parts) {
    text += part.tag;
    if (part.has_length) {
      std::uint64_t size = part.payload.size();
      for (; size > 127; size >>= 7) text += static_cast<char>(size | 128);
      text += static_cast<char>(size);
    }
    text += part.payload;
  }
  return text;
}

}  // namespace

extern "C" std::size_t LLVMFuzzerMutate(std::uint8_t* data, std::size_t size, std::size_t max_size);

namespace {

std::string mutated(const std::string& text, std::minstd_rand& random) {
  std::vector<Part> parts = split(text);
  if (parts.empty() || random() % 8 == 0) {
    std::string result = text;
    result.resize(text.size() + 16);
    result.resize(LLVMFuzzerMutate(reinterpret_cast<std::uint8_t*>(result.data()), text.size(),
                                   result.size()));
    return result;
  }
  const auto at = static_cast<std::ptrdiff_t>(random() % parts.size());
  switch (random() % 8) {
    case 0: parts.erase(parts.begin() + at); break;
    case 1: parts.insert(parts.begin() + at, parts[random() % parts.size()]); break;
    default:
      Part& part = parts[static_cast<std::size_t>(at)];
      part.payload = mutated(part.payload, random);
  }
  return joined(parts);
}

}  // namespace

/// Mutates a field somewhere; now and then anything.
extern "C" std::size_t LLVMFuzzerCustomMutator(std::uint8_t* data, std::size_t size,
                                               std::size_t max_size, unsigned seed) {
  if (seed % 8 == 0) return LLVMFuzzerMutate(data, size, max_size);
  std::minstd_rand random(seed);
  const std::string result =
      mutated(std::string(reinterpret_cast<const char*>(data), size), random);
  if (result.size() > max_size) return size;
  std::memcpy(data, result.data(), result.size());
  return result.size();
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) try {
  Model model = parse_model(std::as_bytes(std::span(data, size)), "model", folder());
  for (const Tensor& tensor : model.initializers) check_tensor(tensor);
  for (const Node& node : model.nodes) {
    for (const Attribute& attribute : node.attributes) {
      if (attribute.tensor) check_tensor(*attribute.tensor);
      try {
        node.integer(attribute.name, 0);
      } catch (const FormatError&) {
      }
    }
  }
  check_round_trip(model);

  for (Node& node : model.nodes) node.encoded = {};
  for (Tensor& tensor : model.initializers) {
    if (size_of(tensor.type) != 0) tensor.encoded = {};
  }
  for (auto* values : {&model.inputs, &model.outputs, &model.values}) {
    for (ValueInfo& value : *values) value.encoded = {};
  }
  model.producer += '.';
  model.opsets.push_back({"fuzz", 1});
  check_round_trip(model);
  return 0;
} catch (const Error&) {
  return 0;
}
