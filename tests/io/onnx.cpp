// ONNX models: what is read, what is refused and with which words, and what stays as it was.
// SPDX-License-Identifier: Apache-2.0
#include <concertina/io/onnx.hpp>  // first: the header must stand alone

#include "io/files.hpp"

#include <catch2/catch.hpp>

#include <sys/mman.h>  // a tensor of 2 GB that takes no memory
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <complex>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <limits>
#include <span>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

using namespace concertina;
using namespace concertina::onnx;
using namespace concertina::test;
namespace fs = std::filesystem;

namespace {

using Dims = std::vector<std::int64_t>;
using Names = std::vector<std::string>;

// ---- models from bytes: each function encodes one field

std::string varint(std::uint64_t value) {
  std::string text;
  for (; value > 127; value >>= 7) text += static_cast<char>(value | 128);
  return text + static_cast<char>(value);
}

std::string tag(std::uint64_t number, int wire_type) {
  return varint(number << 3 | static_cast<std::uint64_t>(wire_type));
}

std::string integer(std::uint64_t number, std::int64_t value) {
  return tag(number, 0) + varint(static_cast<std::uint64_t>(value));
}

std::string bytes(std::uint64_t number, std::string_view value) {
  return tag(number, 2) + varint(value.size()) + std::string(value);
}

/// The elements' bits, as they are in memory.
template <class T>
std::string bits(const std::vector<T>& values) {
  std::string text;
  for (const T value : values) {
    const auto chars = std::bit_cast<std::array<char, sizeof(T)>>(value);
    text.append(chars.data(), chars.size());
  }
  return text;
}

std::string bits(const std::vector<bool>& values) { return {values.begin(), values.end()}; }

// ---- the messages of a model

std::string value(const std::string& name) { return bytes(1, name); }

/// Inputs and outputs are comma-separated.
std::string node(const std::string& op_type, const std::string& inputs, const std::string& outputs,
                 const std::string& rest = "") {
  const auto split = [](std::uint64_t number, std::string list) {
    std::string fields;
    if (list.empty()) return fields;
    for (std::size_t comma = 0; comma != std::string::npos;) {
      comma = list.find(',');
      fields += bytes(number, list.substr(0, comma));
      list.erase(0, comma == std::string::npos ? comma : comma + 1);
    }
    return fields;
  };
  return split(1, inputs) + split(2, outputs) + bytes(3, "n") + bytes(4, op_type) + rest;
}

std::string tensor(const std::string& name, const Dims& dims, DataType type,
                   const std::string& rest) {
  std::string text;
  for (const std::int64_t dimension : dims) text += integer(1, dimension);
  return text + integer(2, static_cast<std::int64_t>(type)) + bytes(8, name) + rest;
}

std::string raw(const std::string& elements) { return bytes(9, elements); }

/// The entries of a tensor in another file; those that are empty are left out.
std::string outside(const std::string& location, const std::string& offset = "",
                    const std::string& length = "") {
  const auto entry = [](const std::string& key, const std::string& text) {
    return text.empty() ? "" : bytes(13, bytes(1, key) + bytes(2, text));
  };
  return entry("location", location) + entry("offset", offset) + entry("length", length) +
         integer(14, 1);
}

std::string attribute(const std::string& name, AttributeType type, const std::string& rest) {
  return bytes(5, bytes(1, name) + rest + integer(20, static_cast<std::int64_t>(type)));
}

std::string model(const std::string& graph, const std::string& rest = "") {
  return integer(1, 8) + bytes(7, graph) + bytes(8, bytes(1, "") + integer(2, 17)) + rest;
}

/// x -> op -> y, with more in the graph's fields that come after its nodes.
std::string identity(const std::string& rest = "") {
  return bytes(1, node("Identity", "x", "y")) + rest + bytes(11, value("x")) +
         bytes(12, value("y"));
}

std::string with_tensor(const std::string& encoded) { return model(identity(bytes(5, encoded))); }

Model parse(const std::string& file, const fs::path& folder = {}) {
  return parse_model(bytes_of(file), "f", folder);
}

std::string written(const Model& from) {
  const std::vector<std::byte> file = serialize_model(from);
  return {reinterpret_cast<const char*>(file.data()), file.size()};
}

std::string parse_refusal(const std::string& file) {
  return refusal([&] { parse(file); });
}

std::string tensor_refusal(const std::string& encoded) {
  return parse_refusal(with_tensor(encoded));
}

std::string graph_refusal(const std::string& graph) { return parse_refusal(model(graph)); }

template <class Scalar>
std::vector<Scalar> values_of(const std::string& encoded) {
  return parse(with_tensor(encoded)).initializers.at(0).values<Scalar>();
}

Names names_of(const auto& list) {
  Names names;
  for (const auto& each : list) names.push_back(each.name);
  return names;
}

std::string text_of(std::span<const std::byte> view) {
  return {reinterpret_cast<const char*>(view.data()), view.size()};
}

/// A model with a bit of everything that the API writes.
Model example() {
  Model result;
  result.origin = "example";
  result.ir_version = 9;
  result.opsets = {{"", 18}, {"custom", 2}};
  result.graph_name = "g";
  result.producer = "a test";
  result.metadata = {{"key", "value"}, {"none", ""}};
  result.inputs = {{.name = "x",
                    .type = DataType::float32,
                    .shape = {{{.value = 1}, {.name = "height"}, {}, {.value = 0}}}}};
  result.outputs = {{.name = "y", .type = DataType::float16}};
  result.values = {{.name = "t", .type = DataType::float64, .shape = {std::vector<Dimension>{}}}};
  result.initializers = {Tensor::of<float>("w", {2, 3}, std::vector<float>{1, 2, 3, 4, 5, 6}),
                         Tensor::of<std::int64_t>("i", {}, std::vector<std::int64_t>{-7})};
  const Tensor constant = Tensor::of<double>("", {2}, std::vector{0.5, -1.0});
  result.nodes = {
      {.name = "first",
       .op_type = "Op",
       .domain = "custom",
       .inputs = {"x", "", "w"},
       .outputs = {"t", ""},
       .attributes = {Attribute::of("i", std::int64_t{-3}),
                      Attribute::of("f", 1.5F),
                      Attribute::of("s", std::string("text")),
                      Attribute::of("is", std::vector<std::int64_t>{1, -2, 3}),
                      {.name = "fs", .type = AttributeType::floats, .floats = {0.5F, -0.0F}},
                      {.name = "ss", .type = AttributeType::strings, .strings = {"a", ""}},
                      {.name = "t",
                       .type = AttributeType::tensor,
                       .tensor = std::make_shared<const Tensor>(constant)}}},
      {.name = "second", .op_type = "Add", .inputs = {"t", "i"}, .outputs = {"y"}}};
  return result;
}

using AllStored = std::tuple<float, std::uint8_t, std::int8_t, std::uint16_t, std::int16_t,
                             std::int32_t, std::int64_t, bool, Eigen::half, double, std::uint32_t,
                             std::uint64_t, Eigen::bfloat16>;

/// Values at the edges of what a type holds.
template <class T>
std::vector<T> edges() {
  using L = std::numeric_limits<T>;
  if constexpr (std::same_as<T, bool>)
    return {false, true};
  else
    return {L::lowest(), T(0), T(1), T(3), L::max()};
}

}  // namespace

// ---- what is read

TEST_CASE("a model reads as it was written", "[onnx]") {
  const Model from = example();
  const Model again = parse(written(from));
  CHECK(again.origin == "f");
  CHECK(again.ir_version == 9);
  CHECK(again.opsets == from.opsets);
  CHECK(again.opset() == 18);
  CHECK(again.graph_name == "g");
  CHECK(again.producer == "a test");
  CHECK(again.metadata == from.metadata);
  REQUIRE(names_of(again.inputs) == Names{"x"});
  CHECK(again.inputs[0].type == DataType::float32);
  CHECK(again.inputs[0].shape == from.inputs[0].shape);
  REQUIRE(names_of(again.outputs) == Names{"y"});
  CHECK(again.outputs[0].type == DataType::float16);
  CHECK_FALSE(again.outputs[0].shape);
  REQUIRE(names_of(again.values) == Names{"t"});
  CHECK(again.values[0].shape == from.values[0].shape);
  REQUIRE(names_of(again.initializers) == Names{"w", "i"});
  CHECK(again.initializers[0].type == DataType::float32);
  CHECK(again.initializers[0].dims == Dims{2, 3});
  CHECK(again.initializers[0].values<float>() == std::vector<float>{1, 2, 3, 4, 5, 6});
  CHECK(again.initializers[1].dims.empty());
  CHECK(again.initializers[1].values<std::int64_t>() == std::vector<std::int64_t>{-7});
  CHECK(again.initializers[1].external.empty());

  REQUIRE(names_of(again.nodes) == Names{"first", "second"});
  const Node& first = again.nodes[0];
  CHECK(first.op_type == "Op");
  CHECK(first.domain == "custom");
  CHECK(first.inputs == Names{"x", "", "w"});
  CHECK(first.outputs == Names{"t", ""});
  CHECK(names_of(first.attributes) == Names{"i", "f", "s", "is", "fs", "ss", "t"});
  CHECK(first.integer("i", 0) == -3);
  CHECK(first.real("f", 0) == 1.5F);
  CHECK(first.text("s", "") == "text");
  CHECK(first.integers("is", {}) == Dims{1, -2, 3});
  CHECK(first.attribute("fs")->floats == std::vector<float>{0.5F, -0.0F});
  CHECK(first.attribute("ss")->strings == Names{"a", ""});
  CHECK(first.attribute("t")->tensor->values<double>() == std::vector{0.5, -1.0});
  CHECK(first.attribute("T") == nullptr);
  CHECK(written(again) == written(from));
}

TEST_CASE("attributes that are not there have defaults, of another type are refused", "[onnx]") {
  const Node node = example().nodes[0];
  CHECK(node.integer("none", 5) == 5);
  CHECK(node.real("none", 5) == 5);
  CHECK(node.text("none", "five") == "five");
  CHECK(node.integers("none", {5}) == Dims{5});
  const std::string which = "node \"first\" (Op): attribute ";
  CHECK(refusal([&] { node.integer("f", 0); }) ==
        which + "\"f\" is of type 1, expected an integer");
  CHECK(refusal([&] { node.real("i", 0); }) == which + "\"i\" is of type 2, expected a float");
  CHECK(refusal([&] { node.text("is", ""); }) == which + "\"is\" is of type 7, expected a string");
  CHECK(refusal([&] { node.integers("s", {}); }) ==
        which + "\"s\" is of type 3, expected integers");
}

TEST_CASE("a model is written as protobuf writes it", "[onnx]") {
  Model from;
  from.opsets = {{"", 17}};
  from.inputs = {{.name = "x", .type = DataType::int8, .shape = {{{.value = 3}, {.name = "n"}}}}};
  from.outputs = {{.name = "y"}};
  from.initializers = {Tensor::of<std::int8_t>("w", {1, 2}, std::vector<std::int8_t>{1, -1})};
  from.nodes = {{.name = "n",
                 .op_type = "Op",
                 .domain = "d",
                 .inputs = {"x", "w"},
                 .outputs = {"y"},
                 .attributes = {Attribute::of("axis", std::int64_t{-1})}}};
  const std::string type =
      integer(1, 3) + bytes(2, bytes(1, integer(1, 3)) + bytes(1, bytes(2, "n")));
  CHECK(written(from) ==
        model(bytes(1, node("Op", "x,w", "y",
                            attribute("axis", AttributeType::integer, integer(3, -1)) +
                                bytes(7, "d"))) +
              bytes(5, tensor("w", {1, 2}, DataType::int8, raw("\x01\xff"))) +
              bytes(11, bytes(1, "x") + bytes(2, bytes(1, type))) + bytes(12, bytes(1, "y"))));
}

TEST_CASE("what the format allows is read", "[onnx]") {
  SECTION("an initializer that is an input, an optional input that is left out, an unused output") {
    const Model read =
        parse(model(bytes(1, node("Clip", "x,,w", "y,")) +
                    bytes(5, tensor("w", {1}, DataType::float32, raw("1234"))) +
                    bytes(11, value("x")) + bytes(11, value("w")) + bytes(12, value("y"))));
    CHECK(read.nodes[0].inputs == Names{"x", "", "w"});
    CHECK(read.nodes[0].outputs == Names{"y", ""});
    CHECK(names_of(read.inputs) == Names{"x", "w"});
  }
  SECTION("an input or initializer that is an output") {
    CHECK(graph_refusal(bytes(5, tensor("w", {0}, DataType::float32, "")) + bytes(11, value("x")) +
                        bytes(12, value("x")) + bytes(12, value("w"))) == "not refused");
  }
  SECTION("no version, or more than one of each domain") {
    CHECK(parse(bytes(7, "")).opset() == 0);
    CHECK(parse(bytes(7, "")).ir_version == 0);
    const auto opset = [](const char* domain, int version) {
      return bytes(8, bytes(1, domain) + integer(2, version));
    };
    CHECK(parse(bytes(7, "") + opset("com.other", 1)).opset() == 0);
    CHECK(parse(bytes(7, "") + opset("com.other", 1) + opset("ai.onnx", 6)).opset() == 6);
    CHECK(parse(bytes(7, "") + bytes(8, integer(2, 6))).opset() == 6);
  }
  SECTION("a number or text that is there again: the last") {
    const Model read = parse(integer(1, 3) + model(bytes(2, "a") + bytes(2, "b") + identity()));
    CHECK(read.ir_version == 8);
    CHECK(read.graph_name == "b");
    CHECK(values_of<int>(integer(2, 1) + bytes(8, "v") +
                         tensor("w", {}, DataType::int8, raw("a") + raw("b"))) ==
          std::vector<int>{'b'});
  }
  SECTION("packed numbers, and one by one") {
    const std::string ints = integer(8, 1) + bytes(8, varint(300) + varint(2)) + integer(8, -1);
    const std::string floats = tag(7, 5) + bits<float>({1}) + bytes(7, bits<float>({2, 3}));
    const Node read =
        parse(model(bytes(1, node("Op", "", "y",
                                  attribute("i", AttributeType::integers, ints) +
                                      attribute("f", AttributeType::floats, floats)))))
            .nodes[0];
    CHECK(read.integers("i", {}) == Dims{1, 300, 2, -1});
    CHECK(read.attribute("f")->floats == std::vector<float>{1, 2, 3});
    CHECK(values_of<int>(bytes(1, varint(2) + varint(1)) +
                         tensor("w", {}, DataType::int8, raw("ab"))) == std::vector<int>{'a', 'b'});
  }
  SECTION("types that are no tensor, and dimensions of every kind") {
    const std::string sequence = bytes(2, bytes(4, bytes(1, bytes(1, integer(1, 1)))));
    const std::string dims = bytes(1, integer(1, 2)) + bytes(1, bytes(2, "n")) + bytes(1, "") +
                             bytes(1, bytes(2, "n") + integer(1, 3) + bytes(3, "CHANNEL"));
    const Model read = parse(
        model(bytes(11, bytes(1, "a") + sequence) +
              bytes(11, bytes(1, "b") + bytes(2, bytes(1, integer(1, 99) + bytes(2, dims))))));
    CHECK(read.inputs[0].type == DataType::undefined);
    CHECK_FALSE(read.inputs[0].shape);
    CHECK(read.inputs[1].type == static_cast<DataType>(99));
    CHECK(read.inputs[1].shape ==
          std::vector<Dimension>{{.value = 2}, {.name = "n"}, {}, {.value = 3}});
  }
}

TEMPLATE_LIST_TEST_CASE("every type makes the round trip", "[onnx]", AllStored) {
  const std::vector<TestType> values = edges<TestType>();
  constexpr DataType type = data_type_of<TestType>();
  CHECK(size_of(type) == sizeof(TestType));
  const Dims dims{std::ssize(values)};
  // The text is one byte longer than before: the elements are aligned in one of the two models.
  for (const char* name : {"w", "w2"}) {
    const Tensor read =
        parse(with_tensor(tensor(name, dims, type, raw(bits(values))))).initializers.at(0);
    CHECK(read.type == type);
    CHECK(read.values<TestType>() == values);
    CHECK(text_of(read.elements) == bits(values));
  }
  if constexpr (!std::same_as<TestType, bool>) {
    const Tensor made = Tensor::of<TestType>("w", dims, values);
    CHECK(made.type == type);
    CHECK(made.values<TestType>() == values);
  }
}

TEST_CASE("types have names and sizes", "[onnx]") {
  CHECK(to_string(DataType::undefined) == "undefined");
  CHECK(to_string(DataType::float32) == "float32");
  CHECK(to_string(DataType::boolean) == "boolean");
  CHECK(to_string(DataType::bfloat16) == "bfloat16");
  CHECK(to_string(static_cast<DataType>(17)) == "type 17");
  CHECK(to_string(static_cast<DataType>(-1)) == "type -1");
  CHECK(size_of(DataType::complex64) == 8);
  CHECK(size_of(DataType::complex128) == 16);
  CHECK(size_of(DataType::string) == 0);
  CHECK(size_of(static_cast<DataType>(17)) == 0);
  static_assert(data_type_of<long>() == data_type_of<long long>());
  static_assert(data_type_of<long double>() == DataType::undefined);
}

TEST_CASE("values widen exactly or not at all", "[onnx]") {
  const auto of = [](auto values) {
    return Tensor::of<typename decltype(values)::value_type>("w", {std::ssize(values)}, values);
  };
  const Tensor half = of(std::vector{Eigen::half(0.1F), Eigen::half(-2)});
  CHECK(half.values<double>() == std::vector<double>{0.0999755859375, -2});
  CHECK(half.values<long double>() == std::vector<long double>{0.0999755859375, -2});
  CHECK(of(std::vector<std::int8_t>{-1}).values<Eigen::half>() == std::vector{Eigen::half(-1)});
  CHECK(of(std::vector<std::int64_t>{-1}).values<long double>() == std::vector<long double>{-1});
  const Tensor brain = of(std::vector{Eigen::bfloat16(1)});
  CHECK(refusal([&] { brain.values<Eigen::half>(); }) ==
        "tensor \"w\": bfloat16 does not fit float16 exactly; read it as a wider type and round as "
        "you wish");
  CHECK_THAT(refusal([&] { of(std::vector{1.0}).values<float>(); }),
             Catch::StartsWith("tensor \"w\": float64 does not fit float32 exactly"));
  CHECK_THAT(refusal([&] { of(std::vector<std::int32_t>{1}).values<std::uint32_t>(); }),
             Catch::StartsWith("tensor \"w\": int32 does not fit uint32 exactly"));
  const Tensor strings =
      parse(with_tensor(tensor("w", {1}, DataType::string, bytes(6, "text")))).initializers.at(0);
  CHECK(strings.elements.empty());
  CHECK(refusal([&] { strings.values<float>(); }) ==
        "tensor \"w\": elements of string cannot be read");
  Tensor broken = half;
  broken.dims = {3};
  CHECK(refusal([&] { broken.values<float>(); }) ==
        "tensor \"w\": float16 of shape [3] takes 6 bytes, but there are 4");
}

TEST_CASE("a tensor has as many elements as its shape", "[onnx]") {
  CHECK(Tensor::of<float>("w", {}, std::vector<float>{1}).numel() == 1);
  CHECK(Tensor::of<float>("w", {2, 0, 3}, std::vector<float>{}).numel() == 0);
  CHECK(refusal<ShapeError>([] { Tensor::of<float>("w", {2, 3}, std::vector<float>(5)); }) ==
        "tensor \"w\": shape [2, 3] has 6 elements, but there are 5");
  CHECK(refusal([] { Tensor::of<float>("w", {-1}, std::vector<float>(1)); }) ==
        "tensor \"w\": shape [-1] has a negative dimension");
  const Tensor copied = Tensor(Tensor::of<float>("w", {1}, std::vector<float>{3}));
  CHECK(copied.values<float>() == std::vector<float>{3});
}

TEST_CASE("elements one by one are read as their type", "[onnx]") {
  const auto packed = [](const std::vector<std::int64_t>& integers) {
    std::string text;
    for (const std::int64_t each : integers) text += varint(static_cast<std::uint64_t>(each));
    return text;
  };
  const auto int32s = [&]<class T>(std::type_identity<T>, const Dims& integers) {
    return values_of<T>(
        tensor("w", {std::ssize(integers)}, data_type_of<T>(), bytes(5, packed(integers))));
  };
  CHECK(int32s(std::type_identity<std::int32_t>{}, {-1, 1 << 30}) ==
        std::vector<std::int32_t>{-1, 1 << 30});
  CHECK(int32s(std::type_identity<std::int32_t>{}, {0xffffffff}) == std::vector<std::int32_t>{-1});
  CHECK(int32s(std::type_identity<std::int16_t>{}, {-5, 5}) == std::vector<std::int16_t>{-5, 5});
  CHECK(int32s(std::type_identity<std::int8_t>{}, {-128, 127}) ==
        std::vector<std::int8_t>{-128, 127});
  CHECK(int32s(std::type_identity<std::uint16_t>{}, {65535}) == std::vector<std::uint16_t>{65535});
  CHECK(int32s(std::type_identity<std::uint8_t>{}, {255}) == std::vector<std::uint8_t>{255});
  CHECK(int32s(std::type_identity<bool>{}, {0, 1}) == std::vector<bool>{false, true});
  CHECK(int32s(std::type_identity<Eigen::half>{}, {0x3c00, 0xc000}) ==
        std::vector<Eigen::half>{Eigen::half(1), Eigen::half(-2)});
  CHECK(int32s(std::type_identity<Eigen::bfloat16>{}, {0x3f80}) ==
        std::vector<Eigen::bfloat16>{Eigen::bfloat16(1)});

  const std::string two_floats = tag(4, 5) + bits<float>({1}) + bytes(4, bits<float>({2}));
  CHECK(values_of<float>(tensor("w", {2}, DataType::float32, two_floats)) ==
        std::vector<float>{1, 2});
  CHECK(values_of<double>(tensor("w", {2}, DataType::float64,
                                 bytes(10, bits<double>({1})) + tag(10, 1) + bits<double>({2}))) ==
        std::vector<double>{1, 2});
  CHECK(values_of<std::int64_t>(tensor("w", {2}, DataType::int64, bytes(7, packed({-1, 9})))) ==
        std::vector<std::int64_t>{-1, 9});
  CHECK(values_of<std::uint64_t>(tensor("w", {1}, DataType::uint64, integer(11, -1))) ==
        std::vector<std::uint64_t>{~std::uint64_t{0}});
  CHECK(values_of<std::uint32_t>(tensor("w", {1}, DataType::uint32, integer(11, 0xffffffff))) ==
        std::vector<std::uint32_t>{0xffffffff});
  const Model complex =
      parse(with_tensor(tensor("w", {1}, DataType::complex64, bytes(4, bits<float>({1, 2})))));
  CHECK(text_of(complex.initializers[0].elements) == bits<float>({1, 2}));
  CHECK(refusal([&] { complex.initializers[0].values<double>(); }) ==
        "tensor \"w\": elements of complex64 cannot be read");
  // The type may come after its elements.
  CHECK(values_of<int>(bytes(5, packed({7})) + tensor("w", {1}, DataType::int8, "")) ==
        std::vector{7});
}

TEST_CASE("tensors of other types are kept, but not read", "[onnx]") {
  const std::string file = model(
      identity(bytes(5, tensor("a", {3}, static_cast<DataType>(17), raw("abc"))) +
               bytes(5, tensor("b", {3}, static_cast<DataType>(22), raw("ab"))) +
               bytes(5, tensor("c", {3}, static_cast<DataType>(21), bytes(5, "\x01\x02\x03"))) +
               bytes(5, tensor("d", {2}, DataType::string, bytes(6, "one") + bytes(6, "two")))));
  const Model read = parse(file);
  CHECK(text_of(read.initializers.at(0).elements) == "abc");
  CHECK(text_of(read.initializers.at(1).elements) == "ab");
  CHECK(read.initializers.at(2).elements.empty());
  CHECK(read.initializers.at(3).elements.empty());
  CHECK(refusal([&] { read.initializers[0].values<float>(); }) ==
        "tensor \"a\": elements of type 17 cannot be read");
  CHECK(written(read) == file);
}

// ---- what is refused

TEST_CASE("a file that is no model is refused", "[onnx]") {
  CHECK(parse_refusal("") == "f: there is no graph; this may not be an ONNX model");
  CHECK(parse_refusal(integer(1, 8)) == "f: there is no graph; this may not be an ONNX model");
  CHECK(parse_refusal(integer(7, 8)) ==
        "f: byte 0: ModelProto has field 7 of wire type 0, expected 2");
  CHECK(parse_refusal(bytes(7, "") + bytes(7, "")) == "f: byte 2: ModelProto has field 7 twice");
  CHECK(parse_refusal("{\"a\": 1}") ==
        "f: byte 0: ModelProto has wire type 3, expected 0, 1, 2 or 5");
}

TEST_CASE("bytes that are no message are refused", "[onnx]") {
  const std::string start = integer(1, 8);
  const auto refused = [&](const std::string& field) {
    const std::string said = parse_refusal(start + field);
    const std::string where = "f: byte 2: ModelProto has ";
    return said.starts_with(where) ? said.substr(where.size()) : said;
  };
  const std::string ff(9, '\xff');
  CHECK(refused(tag(0, 0) + "a") == "a field of number 0, expected 1 to 2^29 - 1");
  CHECK(refused(tag(std::uint64_t{1} << 29, 0) + "a") ==
        "a field of number 536870912, expected 1 to 2^29 - 1");
  CHECK(refused(tag((std::uint64_t{1} << 32) + 7, 2) + "a") ==
        "a field of number 4294967303, expected 1 to 2^29 - 1");
  for (const int type : {3, 4, 6, 7}) {
    CHECK(refused(tag(9, type)) == "wire type " + std::to_string(type) + ", expected 0, 1, 2 or 5");
  }
  CHECK(refused("\xff") == "a varint that is cut short");
  CHECK(refused(tag(9, 0)) == "a varint that is cut short");
  CHECK(refused(tag(9, 2)) == "a varint that is cut short");
  CHECK(refused(tag(9, 0) + ff + "\x01") == "f: there is no graph; this may not be an ONNX model");
  CHECK(refused(tag(9, 0) + ff + "\x02") == "a varint of more than 64 bits");
  CHECK(refused(tag(9, 0) + ff + "\x7f") == "a varint of more than 64 bits");
  CHECK(refused(tag(9, 0) + ff + "\xff\x01") == "a varint of more than 10 bytes");
  CHECK(refused(tag(9, 5) + "abc") == "field 9 of 4 bytes, but only 3 follow");
  CHECK(refused(tag(9, 1) + "abcdefg") == "field 9 of 8 bytes, but only 7 follow");
  CHECK(refused(tag(9, 2) + varint(4) + "abc") == "field 9 of 4 bytes, but only 3 follow");
  // Modulo 2^32 this length would fit.
  CHECK(refused(tag(9, 2) + varint((std::uint64_t{1} << 32) + 3) + "abc") ==
        "field 9 of 4294967299 bytes, but only 3 follow");
  CHECK(refused(tag(9, 2) + varint(~std::uint64_t{0}) + "abc") ==
        "field 9 of 18446744073709551615 bytes, but only 3 follow");
}

TEST_CASE("fields of another wire type are refused", "[onnx]") {
  const auto refused = [](const std::string& file) {
    const std::string said = parse_refusal(file);
    return said.substr(said.find(" has ") + 5);
  };
  CHECK(refused(bytes(7, "") + bytes(1, "8")) == "field 1 of wire type 2, expected 0");
  CHECK(refused(bytes(7, "") + integer(2, 8)) == "field 2 of wire type 0, expected 2");
  CHECK(refused(bytes(7, "") + integer(8, 8)) == "field 8 of wire type 0, expected 2");
  for (const int number : {1, 5, 11, 12, 13, 15}) {
    CHECK(refused(model(integer(static_cast<std::uint64_t>(number), 1))) ==
          "field " + std::to_string(number) + " of wire type 0, expected 2");
  }
  for (const int number : {1, 2, 3, 4, 5, 7}) {
    CHECK(refused(model(bytes(1, integer(static_cast<std::uint64_t>(number), 1)))) ==
          "field " + std::to_string(number) + " of wire type 0, expected 2");
  }
  const auto in_tensor = [&](const std::string& field) { return refused(with_tensor(field)); };
  CHECK(in_tensor(tag(1, 5) + "abcd") == "field 1 of wire type 5, expected 0");
  CHECK(in_tensor(bytes(2, "")) == "field 2 of wire type 2, expected 0");
  CHECK(in_tensor(integer(2, std::int64_t{1} << 32 | 1)) ==
        "field 2 of 4294967297, expected 32 bits");
  CHECK(in_tensor(integer(8, 1)) == "field 8 of wire type 0, expected 2");
  CHECK(in_tensor(integer(9, 1)) == "field 9 of wire type 0, expected 2");
  CHECK(in_tensor(integer(13, 1)) == "field 13 of wire type 0, expected 2");
  CHECK(in_tensor(bytes(14, "")) == "field 14 of wire type 2, expected 0");
  CHECK(in_tensor(integer(14, 2)) == "data location 2, expected 0 or 1");
  CHECK(in_tensor(tensor("w", {1}, DataType::float32, integer(4, 1))) ==
        "field 4 of wire type 0, expected 5");
  CHECK(in_tensor(tensor("w", {1}, DataType::float32, bytes(4, "abc"))) ==
        "3 bytes of packed numbers that take 4 each");
  CHECK(in_tensor(tensor("w", {1}, DataType::float64, bytes(10, "abcd"))) ==
        "4 bytes of packed numbers that take 8 each");
  CHECK(in_tensor(tensor("w", {1}, DataType::int64, bytes(7, "\xff"))) ==
        "a varint that is cut short");
  const auto in_attribute = [&](const std::string& field) {
    return refused(model(bytes(1, node("Op", "", "y", bytes(5, field)))));
  };
  CHECK(in_attribute(integer(1, 1)) == "field 1 of wire type 0, expected 2");
  CHECK(in_attribute(integer(2, 1)) == "field 2 of wire type 0, expected 5");
  CHECK(in_attribute(bytes(3, "")) == "field 3 of wire type 2, expected 0");
  CHECK(in_attribute(integer(7, 1)) == "field 7 of wire type 0, expected 5");
  CHECK(in_attribute(integer(6, 1)) == "field 6 of wire type 0, expected 2");
  CHECK(in_attribute(bytes(20, "")) == "field 20 of wire type 2, expected 0");
  CHECK(in_attribute(bytes(5, "") + bytes(5, "")) == "field 5 twice");
  const auto in_input = [&](const std::string& field) { return refused(model(bytes(11, field))); };
  CHECK(in_input(integer(2, 1)) == "field 2 of wire type 0, expected 2");
  CHECK(in_input(bytes(2, "") + bytes(2, "")) == "field 2 twice");
  CHECK(in_input(bytes(2, bytes(1, "") + bytes(1, ""))) == "field 1 twice");
  CHECK(in_input(bytes(2, bytes(1, bytes(1, "")))) == "field 1 of wire type 2, expected 0");
  CHECK(in_input(bytes(2, bytes(1, bytes(2, bytes(1, integer(2, 1)))))) ==
        "field 2 of wire type 0, expected 2");
}

TEST_CASE("tensors whose elements do not fit their shape are refused", "[onnx]") {
  const auto refused = [](const std::string& encoded) {
    const std::string said = tensor_refusal(encoded), where = "f: tensor \"w\": ";
    return said.starts_with(where) ? said.substr(where.size()) : said;
  };
  const auto shaped = [&](const Dims& dims, const std::string& elements = "") {
    return refused(tensor("w", dims, DataType::float32, elements));
  };
  constexpr std::int64_t large = std::int64_t{1} << 32;
  CHECK(shaped({2, 0}) == "not refused");
  CHECK(shaped({2, 0}, raw("")) == "not refused");
  CHECK(shaped({}) == "float32 of shape [] takes 4 bytes, but there are 0");
  CHECK(shaped({2, 3}, raw("1234")) == "float32 of shape [2, 3] takes 24 bytes, but there are 4");
  CHECK(shaped({0}, raw("1")) == "float32 of shape [0] takes 0 bytes, but there are 1");
  CHECK(shaped({-1, -1}, raw("1234")) == "shape [-1, -1] has a negative dimension");
  CHECK(shaped({large, large}, raw("1234")) ==
        "shape [4294967296, 4294967296] has 2^63 elements or more");
  CHECK(shaped({large, 0, large}) == "shape [4294967296, 0, 4294967296] has 2^63 elements or more");
  CHECK(shaped({large, large / 8}, raw("1234")) ==
        "shape [4294967296, 536870912] of float32 takes 2^63 bytes or more");
  // Modulo 2^64 these are 4 bytes.
  CHECK(shaped({(large << 30) + 1}, raw("1234")) ==
        "shape [4611686018427387905] of float32 takes 2^63 bytes or more");
  CHECK(shaped({1 << 30}) ==
        "float32 of shape [1073741824] takes 4294967296 bytes, but there are 0");
  CHECK(shaped({2}, bytes(4, bits<float>({1}))) ==
        "float32 of shape [2] takes 8 bytes, but there are 4");
  CHECK(shaped({1}, bytes(7, "\x01")) == "float32 has its elements in field 7, expected 4");
  CHECK(shaped({1}, bytes(4, bits<float>({1})) + raw("1234")) == "its elements are in two places");
  CHECK(shaped({1}, raw("1234") + outside("data")) == "its elements are in two places");
  CHECK_THAT(shaped({1}, bytes(3, "")),
             Catch::EndsWith("TensorProto has a segment; tensors in parts are not supported"));
  CHECK_THAT(shaped({1}, bytes(4, bits<float>({1})) + bytes(7, "\x01")),
             Catch::EndsWith("TensorProto has elements in fields 4 and 7"));
  CHECK(refused(tensor("w", {-1}, static_cast<DataType>(17), raw("a"))) ==
        "shape [-1] has a negative dimension");
  CHECK(refused(tensor("w", {1}, DataType::string, raw("a"))) == "its strings are raw bytes");
  CHECK(refused(tensor("w", {1}, DataType::string, outside("data"))) ==
        "its strings are raw bytes");

  const auto element = [&](DataType type, int field, std::int64_t integer_value) {
    const std::string said =
        refused(tensor("w", {1}, type, integer(static_cast<std::uint64_t>(field), integer_value)));
    return said.substr(said.find("element "));
  };
  CHECK(element(DataType::int8, 5, 256) == "element 256, which is no int8");
  CHECK(element(DataType::uint8, 5, -129) == "element -129, which is no uint8");
  CHECK(element(DataType::float16, 5, 65536) == "element 65536, which is no float16");
  CHECK(element(DataType::int32, 5, std::int64_t{1} << 32) ==
        "element 4294967296, which is no int32");
  CHECK(element(DataType::uint32, 11, std::numeric_limits<std::int64_t>::min()) ==
        "element -9223372036854775808, which is no uint32");
}

TEST_CASE("names are there once, and before they are read", "[onnx]") {
  const std::string x = bytes(11, value("x")), y = bytes(12, value("y"));
  const auto first = [](const char* inputs, const char* outputs) {
    return bytes(1, node("First", inputs, outputs));
  };
  const auto second = [](const char* inputs, const char* outputs) {
    return bytes(1, node("Second", inputs, outputs));
  };
  const std::string w = bytes(5, tensor("w", {0}, DataType::float32, ""));
  CHECK(graph_refusal(first("x", "t") + second("t", "y") + x + y) == "not refused");
  CHECK(
      graph_refusal(first("t", "y") + second("x", "t") + x + y) ==
      "f: node 0, \"n\" (First) reads tensor \"t\", which node 1, \"n\" (Second) writes after it");
  CHECK(
      graph_refusal(first("b", "a") + second("a", "b") + x) ==
      "f: node 0, \"n\" (First) reads tensor \"b\", which node 1, \"n\" (Second) writes after it");
  CHECK(graph_refusal(first("x", "y") + second("y,t", "t") + x + y) ==
        "f: node 1, \"n\" (Second) reads tensor \"t\", which it writes itself");
  CHECK(graph_refusal(first("z", "y") + x + y) ==
        "f: node 0, \"n\" (First) reads tensor \"z\", which nothing writes");
  CHECK(graph_refusal(first("x", "t") + x + y) ==
        "f: graph output \"y\" is not a tensor of the graph");
  CHECK(graph_refusal(first("x", "y") + x + bytes(12, "")) ==
        "f: graph output \"\" is not a tensor of the graph");
  CHECK(graph_refusal(first("x", "y") + second("x", "y") + x + y) ==
        "f: node 1, \"n\" (Second) writes tensor \"y\", which node 0, \"n\" (First) writes too");
  CHECK(graph_refusal(first("x", "y,y") + x + y) ==
        "f: node 0, \"n\" (First) writes tensor \"y\", which node 0, \"n\" (First) writes twice");
  CHECK(graph_refusal(first("x", "x") + x) ==
        "f: node 0, \"n\" (First) writes tensor \"x\", which is a graph input or initializer");
  CHECK(graph_refusal(first("x", "w") + w + x) ==
        "f: node 0, \"n\" (First) writes tensor \"w\", which is a graph input or initializer");
  CHECK(graph_refusal(x + x) == "f: graph input \"x\" is there twice");
  CHECK(graph_refusal(w + w) == "f: initializer \"w\" is there twice");
  CHECK(graph_refusal(w + bytes(15, bytes(1, tensor("w", {0}, DataType::float32, "")))) ==
        "f: initializer \"w\" is there twice");
  CHECK(graph_refusal(bytes(11, "")) == "f: graph input without a name");
  CHECK(graph_refusal(bytes(5, integer(2, 1) + integer(1, 0))) == "f: initializer without a name");
  CHECK(graph_refusal(bytes(15, "")) == "f: initializer without a name");
  CHECK(graph_refusal(bytes(1, "")) == "f: byte 6: NodeProto has no operator");
  CHECK(graph_refusal(bytes(1, node("Op", "", "", bytes(5, "")))) ==
        "f: byte 15: AttributeProto has no name");
}

TEST_CASE("names and messages from a file are safe to print", "[onnx]") {
  CHECK(graph_refusal(bytes(1, node(std::string(1000, 'A'), "\x1b[31m", "y"))) ==
        "f: node 0, \"n\" (" + std::string(100, 'A') +
            "...) reads tensor \"\\x1b[31m\", which nothing writes");
}

TEST_CASE("a damaged model is refused, or is another model", "[onnx]") {
  Model from = example();
  const std::string whole =
      written(from) + bytes(14, bytes(1, "key") + bytes(2, "value")) + bytes(25, bytes(1, "F"));
  for (std::size_t size = 0; size < whole.size(); ++size) {
    try {
      const std::string again = written(parse(whole.substr(0, size)));
      if (written(parse(again)) != again) FAIL("cut to " << size);
    } catch (const FormatError&) {
    }
  }
  for (std::size_t at = 0; at < whole.size(); ++at) {
    for (int bit = 0; bit < 8; ++bit) {
      std::string damaged = whole;
      damaged[at] = static_cast<char>(damaged[at] ^ (1 << bit));
      try {
        const std::string again = written(parse(damaged));
        if (written(parse(again)) != again) FAIL("byte " << at << ", bit " << bit);
      } catch (const FormatError&) {
      }
    }
  }
}

// ---- graphs in attributes

namespace {

/// An If whose branches are these graphs.
std::string branch(const std::string& inputs, const std::string& outputs, const std::string& then,
                   const std::string& otherwise = "") {
  return bytes(1, node("If", inputs, outputs,
                       attribute("then_branch", AttributeType::graph, bytes(6, then)) +
                           attribute("else_branch", AttributeType::graph, bytes(6, otherwise))));
}

std::string op(const std::string& inputs, const std::string& outputs) {
  return bytes(1, node("Op", inputs, outputs));
}

/// Of a node whose attribute is this graph; the tensors a to e and u are there to be read.
Names captured(const std::string& graph) {
  std::string inputs;
  for (const char* name : {"a", "b", "c", "d", "e", "u"}) inputs += bytes(11, value(name));
  return parse(model(branch("a", "y", graph) + inputs)).nodes.at(0).captured;
}

}  // namespace

TEST_CASE("a node captures what its graphs read and do not define", "[onnx]") {
  CHECK(captured("").empty());
  CHECK(captured(op("a,b", "t") + op("t,a,", "u") + bytes(12, value("u"))) == Names{"a", "b"});
  CHECK(captured(op("b,i", "t") + bytes(11, value("i"))) == Names{"b"});
  CHECK(captured(op("w,s,c", "t") + bytes(5, tensor("w", {0}, DataType::float32, "")) +
                 bytes(15, bytes(1, tensor("s", {0}, DataType::float32, "")))) == Names{"c"});
  // What is defined within hides what is outside; before it is defined, it is the outer one.
  CHECK(captured(op("b", "c") + op("c", "t")) == Names{"b"});
  CHECK(captured(op("c", "b") + op("b", "c")) == Names{"c"});
  CHECK(captured(bytes(12, value("d"))) == Names{"d"});
  CHECK(captured(op("a", "d") + bytes(12, value("d"))) == Names{"a"});
  // One branch does not see what the other defines.
  CHECK(captured(branch("a", "u", op("c", "b"), op("b", "t"))) == Names{"a", "c", "b"});
  // Graphs within graphs, which read what is outside of both.
  CHECK(captured(op("a", "t") + branch("b", "u", op("t,c", "v") + op("v,d", "z"), op("e,u", "x")) +
                 op("u", "z")) == Names{"a", "b", "c", "d", "e", "u"});
}

TEST_CASE("captured tensors have to be there", "[onnx]") {
  const std::string x = bytes(11, value("x"));
  const std::string reading = branch("x", "y", op("z", "t"));
  CHECK(graph_refusal(reading + x) ==
        "f: node 0, \"n\" (If) reads tensor \"z\", which nothing writes");
  CHECK(graph_refusal(reading + op("x", "z") + x) ==
        "f: node 0, \"n\" (If) reads tensor \"z\", which node 1, \"n\" (Op) writes after it");
  CHECK(graph_refusal(op("x", "z") + reading + x) == "not refused");
  CHECK(graph_refusal(branch("x", "y", "", op("y", "t")) + x) ==
        "f: node 0, \"n\" (If) reads tensor \"y\", which it writes itself");
  // Several graphs in one attribute.
  const std::string graphs = bytes(11, op("x", "t")) + bytes(11, op("z", "t"));
  const std::string many =
      bytes(1, node("Op", "", "y", attribute("g", AttributeType::graphs, graphs)));
  CHECK(graph_refusal(many + x) ==
        "f: node 0, \"n\" (Op) reads tensor \"z\", which nothing writes");
  CHECK(parse(model(op("x", "z") + many + x)).nodes.at(1).captured == Names{"x", "z"});
}

TEST_CASE("graphs in graphs are read to a limit", "[onnx]") {
  const auto nested = [](int depth) {
    std::string graph = op("x", "t");
    for (int i = 0; i < depth; ++i) graph = branch("x", "y", graph);
    return model(graph + bytes(11, value("x")));
  };
  CHECK(parse(nested(30)).nodes.at(0).captured == Names{"x"});
  CHECK_THAT(parse_refusal(nested(34)), Catch::EndsWith("has messages in it nested too deeply"));
  std::string graph;
  for (int i = 0; i < 3000; ++i) graph = bytes(1, bytes(5, bytes(6, graph)));
  CHECK_THAT(parse_refusal(model(graph)), Catch::EndsWith("has messages in it nested too deeply"));
}

// ---- what stays as it was

TEST_CASE("what is not changed stays byte for byte", "[onnx]") {
  const std::string unknown =
      bytes(99, "unknown") + integer(1000, 5) + tag(1001, 5) + "abcd" + tag(1002, 1) + "abcdefgh";
  const std::string metadata = bytes(1, "key") + bytes(2, "value");
  const std::string body =
      bytes(1, node("Op", "x,w", "t",
                    attribute("a", AttributeType::undefined, unknown) + bytes(6, "doc") +
                        bytes(8, "overload") + bytes(9, metadata) + unknown)) +
      branch("t", "y", op("x", "z") + unknown) + bytes(2, "g") +
      bytes(5, integer(2, 1) + bytes(4, bits<float>({1})) + bytes(8, "w") + bytes(12, "doc") +
                   bytes(16, metadata) + unknown) +
      bytes(10, "doc") + bytes(11, bytes(1, "x") + bytes(3, "doc") + bytes(4, metadata) + unknown) +
      bytes(12, value("y")) + bytes(13, bytes(1, "t") + bytes(2, bytes(8, "") + bytes(6, "d"))) +
      bytes(14, bytes(1, "w") + bytes(2, metadata)) +
      bytes(15, bytes(1, tensor("s", {0}, DataType::float32, "")) + bytes(3, "\x02")) +
      bytes(16, metadata) + unknown;
  const std::string file = integer(1, 7) + bytes(2, "producer") + bytes(3, "1.0") + bytes(4, "d") +
                           integer(5, 3) + bytes(6, "doc") + bytes(7, body) +
                           bytes(8, bytes(1, "") + integer(2, 13) + unknown) + bytes(14, metadata) +
                           bytes(20, bytes(1, op("x", "y"))) +
                           bytes(25, bytes(1, "F") + bytes(7, node("Op", "x", "y"))) +
                           bytes(26, bytes(1, "config")) + unknown;
  Model read = parse(file);
  CHECK(written(read) == file);
  CHECK(read.sparse_initializers == Names{"s"});

  const auto changed = [&](const std::string& from, const std::string& to) {
    const std::size_t at = file.find(from);
    REQUIRE(at != std::string::npos);
    return file.substr(0, at) + to + file.substr(at + from.size());
  };
  SECTION("but for the version") {
    read.ir_version = 9;
    CHECK(written(read) == changed(integer(1, 7), integer(1, 9)));
  }
  SECTION("but for the producer") {
    read.producer = "another!";
    CHECK(written(read) == changed(bytes(2, "producer"), bytes(2, "another!")));
    read.producer.clear();
    CHECK(written(read) == changed(bytes(2, "producer"), bytes(2, "")));
  }
  SECTION("but for metadata") {
    CHECK(read.metadata == std::map<std::string, std::string>{{"key", "value"}});
    const std::string after = bytes(20, bytes(1, op("x", "y")));
    read.metadata["a"] = "b";
    CHECK(written(read) ==
          changed(bytes(14, metadata) + after,
                  bytes(14, bytes(1, "a") + bytes(2, "b")) + bytes(14, metadata) + after));
    read.metadata.clear();
    CHECK(written(read) == changed(bytes(14, metadata) + after, after));
    CHECK_THROWS_WITH(parse(file + bytes(14, bytes(1, "key") + bytes(2, "last"))),
                      Catch::Contains("\"key\" is there twice"));
  }
  SECTION("but for operator sets") {
    read.opsets = {{"", 14}, {"d", 1}};
    CHECK(written(read) == changed(bytes(8, bytes(1, "") + integer(2, 13) + unknown),
                                   bytes(8, bytes(1, "") + integer(2, 14)) +
                                       bytes(8, bytes(1, "d") + integer(2, 1))));
  }
  SECTION("but for the graph's name") {
    read.graph_name = "h";
    CHECK(written(read) == changed(bytes(2, "g"), bytes(2, "h")));
  }
  SECTION("and the rest of a node that changes") {
    for (Node& node : read.nodes) node.encoded = {};
    CHECK(written(read) == file);
    read.nodes[0].op_type = "Po";
    CHECK(written(read) == changed(bytes(4, "Op"), bytes(4, "Po")));
  }
  SECTION("in a copy that outlives what it is a copy of") {
    const Model copy = read;
    read = Model();
    CHECK(written(copy) == file);
    const Tensor tensor = parse(file).initializers.at(0);
    CHECK(text_of(tensor.encoded).find("doc") != std::string::npos);
    CHECK(tensor.values<float>() == std::vector<float>{1});
  }
}

TEST_CASE("fields in another order are written in the order of their numbers", "[onnx]") {
  const std::string nodes = op("x", "y") + op("y", "z");
  const std::string opset = bytes(8, integer(2, 17));
  const auto file = [&](const std::string& graph, const std::string& before,
                        const std::string& after) { return before + bytes(7, graph) + after; };
  const Model read =
      parse(file(bytes(16, "") + bytes(12, value("z")) + bytes(13, value("y")) + bytes(2, "g") +
                     bytes(11, value("x")) + nodes + bytes(10, "doc"),
                 bytes(14, bytes(1, "b")) + opset + bytes(14, bytes(1, "a")), integer(1, 8)));
  CHECK(written(read) == file(nodes + bytes(2, "g") + bytes(10, "doc") + bytes(11, value("x")) +
                                  bytes(12, value("z")) + bytes(13, value("y")) + bytes(16, ""),
                              integer(1, 8),
                              opset + bytes(14, bytes(1, "b")) + bytes(14, bytes(1, "a"))));
}

TEST_CASE("what cannot be written is refused", "[onnx]") {
  Model from = example();
  const auto writing = [&] { return refusal([&] { serialize_model(from); }); };
  CHECK(writing() == "not refused");
  SECTION("names") {
    from.nodes[1].inputs[0] = "missing";
    CHECK(writing() ==
          "example: node 1, \"second\" (Add) reads tensor \"missing\", which nothing "
          "writes");
  }
  SECTION("no operator") {
    from.nodes[1].op_type.clear();
    CHECK(writing() == "example: node 1, \"second\" (): there is no operator");
  }
  SECTION("captured names") {
    from.nodes[1].captured = {"missing"};
    CHECK_THAT(writing(), Catch::EndsWith("reads tensor \"missing\", which nothing writes"));
  }
  SECTION("a tensor of another size") {
    from.initializers[0].dims = {7};
    CHECK(writing() ==
          "example: tensor \"w\": float32 of shape [7] takes 28 bytes, but there are 24");
  }
  SECTION("new strings") {
    from.initializers.push_back({.name = "s", .type = DataType::string, .dims = {0}});
    CHECK(writing() == "example: tensor \"s\": strings cannot be written, but as they were read");
  }
  SECTION("a new graph") {
    from.nodes[0].attributes.push_back({.name = "g", .type = AttributeType::graph});
    CHECK(writing() == "example: attribute \"g\" of type 5 cannot be written, but as it was read");
  }
  SECTION("no tensor") {
    from.nodes[0].attributes.push_back({.name = "g", .type = AttributeType::tensor});
    CHECK(writing() == "example: attribute \"g\" of type 4 has no tensor");
  }
}

TEST_CASE("a model of more than 2 GB has its tensors in another file", "[onnx]") {
  constexpr std::size_t size = std::size_t{1} << 31;
  void* const mapped =
      ::mmap(nullptr, size, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  REQUIRE(mapped != MAP_FAILED);
  Model from;
  from.initializers = {{.name = "w",
                        .type = DataType::uint8,
                        .dims = {size},
                        .elements = {static_cast<const std::byte*>(mapped), size}}};
  CHECK(refusal<SizeError>([&] { serialize_model(from); }) ==
        "model: the model takes 2147483679 bytes, but at most 2^31 - 1 can be in one file");
  const Folder folder;
  const fs::path path = folder / "m.onnx";
  {
    const FullDisk disk(1'000'000);
    CHECK(refusal<IoError>([&] { write_model(path, from); }) ==
          "cannot write " + path.string() + ".data: File too large");
  }
  CHECK(folder.count() == 0);
  ::munmap(mapped, size);
}

// ---- external data

namespace {

/// Reads a model with this initializer from a folder with a file "data" of 16 bytes.
class External {
 public:
  External() { put(folder_ / "data", "0123456789abcdef"); }

  fs::path operator/(const std::string& name) const { return folder_ / name; }
  Model read(const std::string& file) const { return parse(file, folder_ / ""); }
  std::string refused(const std::string& file) const {
    const std::string said = refusal([&] { read(file); }), where = "f: tensor \"w\": ";
    return said.starts_with(where) ? said.substr(where.size()) : said;
  }
  std::string refused(const Dims& dims, const std::string& place) const {
    return refused(with_tensor(tensor("w", dims, DataType::float32, place)));
  }

 private:
  Folder folder_;
};

}  // namespace

TEST_CASE("elements are read from a file beside the model", "[onnx]") {
  const External at;
  const auto elements = [&](const Dims& dims, const std::string& place) {
    const Tensor read =
        at.read(with_tensor(tensor("w", dims, DataType::uint8, place))).initializers.at(0);
    CHECK(!read.external.empty());
    return text_of(read.elements);
  };
  CHECK(elements({3}, outside("data")) == "012");
  CHECK(elements({3}, outside("data", "4")) == "456");
  CHECK(elements({3}, outside("data", "13", "3")) == "def");
  CHECK(elements({0}, outside("data", "16", "0")).empty());
  CHECK(elements({16}, outside("./data")) == "0123456789abcdef");
  // The last entry of a key; others are for other readers.
  CHECK(elements({1}, bytes(13, bytes(1, "checksum") + bytes(2, "?")) + outside("none", "9") +
                          outside("data", "2")) == "2");
  SECTION("in a folder in the folder, through a link in it") {
    fs::create_directory(at / "sub");
    fs::create_symlink("../data", at / "sub" / "link");
    CHECK(elements({2}, outside("sub/link", "1")) == "12");
    CHECK(elements({2}, outside("sub/../data", "1")) == "12");
  }
  SECTION("of types that are not known, as many as are stated, or all there are") {
    const auto kept = [&](const std::string& place) {
      return text_of(at.read(with_tensor(tensor("w", {4}, static_cast<DataType>(22), place)))
                         .initializers.at(0)
                         .elements);
    };
    CHECK(kept(outside("data", "1", "2")) == "12");
    CHECK(kept(outside("data", "14")) == "ef");
  }
  SECTION("by a path to the model, which names the folder") {
    put(at / "m.onnx", with_tensor(tensor("w", {1}, DataType::uint8, outside("data"))));
    CHECK(text_of(read_model(at / "m.onnx").initializers.at(0).elements) == "0");
    const fs::path before = fs::current_path();
    fs::current_path(at / "");
    CHECK(text_of(read_model("m.onnx").initializers.at(0).elements) == "0");
    fs::current_path(before);
  }
}

TEST_CASE("external data that is not there, or elsewhere, is refused", "[onnx]") {
  const External at;
  const auto data = [](const std::string& location, const std::string& why) {
    return "external data \"" + location + "\": " + why;
  };
  CHECK(at.refused({1}, outside("none")) == data("none", "No such file or directory"));
  CHECK(at.refused({1}, outside("", "0")) == data("", "not a path from the model's folder"));
  CHECK(at.refused({1}, outside((at / "data").string())) ==
        data((at / "data").string(), "not a path from the model's folder"));
  CHECK(at.refused({1}, outside(std::string("data\0x", 6))) ==
        data("data\\x00x", "not a path from the model's folder"));
  CHECK(at.refused({1}, outside("..")) == data("..", "outside of the model's folder"));
  fs::create_symlink("/dev/zero", at / "zero");
  CHECK(at.refused({1}, outside("zero")) == data("zero", "outside of the model's folder"));
  fs::create_symlink("..", at / "parent");
  CHECK(at.refused({1}, outside("parent")) == data("parent", "outside of the model's folder"));

  CHECK(at.refused({5}, outside("data")) == data("data", "20 bytes from byte 0 of a file of 16"));
  CHECK(at.refused({1}, outside("data", "13")) ==
        data("data", "4 bytes from byte 13 of a file of 16"));
  CHECK(at.refused({1}, outside("data", "17")) ==
        data("data", "4 bytes from byte 17 of a file of 16"));
  CHECK(at.refused({0}, outside("data", "17")) ==
        data("data", "0 bytes from byte 17 of a file of 16"));
  CHECK(at.refused({1}, outside("data", "9223372036854775807")) ==
        data("data", "4 bytes from byte 9223372036854775807 of a file of 16"));
  CHECK(at.refused({1 << 30, 1 << 29}, outside("data")) ==
        data("data", "2305843009213693952 bytes from byte 0 of a file of 16"));
  CHECK(at.refused({1}, outside("data", "0", "8")) ==
        data("data", "8 bytes, but the tensor takes 4"));
  CHECK(at.refused({-1}, outside("data")) == "shape [-1] has a negative dimension");
  for (const char* number : {"-1", "9223372036854775808", " 1", "1 ", "0x1", "1.0"}) {
    for (const bool length : {false, true}) {
      const std::string place =
          length ? outside("data", "0", number) : outside("data", number, "4");
      CHECK_THAT(at.refused({1}, place),
                 Catch::EndsWith("TensorProto has external data with " +
                                 std::string(length ? "length" : "offset") + " \"" + number +
                                 "\", expected a number from 0 to 2^63 - 1"));
    }
  }
  CHECK_THAT(at.refused({1}, bytes(13, "\xff")), Catch::EndsWith("a varint that is cut short"));
  CHECK(tensor_refusal(tensor("w", {1}, DataType::float32, outside("data"))) ==
        "f: tensor \"w\": external data \"data\": the model is not in a folder");

  const auto unreadable = [&](const std::string& name) {
    return refusal<FormatError>(
        [&] { at.read(with_tensor(tensor("w", {1}, DataType::float32, outside(name)))); });
  };
  REQUIRE(::mkfifo((at / "pipe").c_str(), 0600) == 0);
  CHECK_THAT(unreadable("pipe"), Catch::EndsWith("\"pipe\": not a regular file"));
  CHECK_THAT(unreadable("."), Catch::EndsWith("\".\": not a regular file"));
}

TEST_CASE("a small model cannot ask for more memory than its files take", "[onnx]") {
  const External at;
  std::string tensors;
  const auto add = [&](int count, const std::string& offset) {
    for (int i = 0; i < count; ++i) {
      tensors += bytes(5, tensor("w" + std::to_string(tensors.size()), {8}, DataType::uint8,
                                 outside("data", offset)));
    }
  };
  add(100, "0");
  add(100, "8");
  const Model read = at.read(model(identity(tensors)));
  CHECK(read.initializers[0].elements.data() == read.initializers[99].elements.data());
  CHECK(text_of(read.initializers[199].elements) == "89abcdef");
  add(1, "4");
  CHECK_THAT(refusal([&] { at.read(model(identity(tensors))); }),
             Catch::EndsWith("external data \"data\": tensors in it overlap"));
}

TEST_CASE("external tensors in nodes and elsewhere become inline", "[onnx]") {
  const External at;
  const auto constant = [](const std::string& place) {
    const std::string doc = bytes(12, "doc");
    const std::string t = integer(1, 2) + integer(2, 2) + bytes(8, "t");
    return place.empty() ? t + raw("45") + doc : t + doc + place;
  };
  const auto everywhere = [&](const std::string& first, const std::string& second,
                              const std::string& third, const std::string& fourth,
                              const std::string& fifth) {
    const auto in_node = [&](const std::string& place) {
      return node(
          "Constant", "", "c",
          attribute("value", AttributeType::tensor, bytes(5, constant(place))) + bytes(6, "doc"));
    };
    return model(op("x", "a") + bytes(1, in_node(first)) +
                     branch("x", "y", op("x", "b") + bytes(1, in_node(second)) + bytes(99, "?")) +
                     bytes(11, value("x")) + bytes(15, bytes(1, constant(third)) + bytes(3, "\3")),
                 bytes(20, bytes(2, bytes(5, constant(fourth)))) +
                     bytes(25, bytes(1, "F") + bytes(7, in_node(fifth))));
  };
  const std::string place = outside("data", "4", "2");
  const std::string expected = everywhere("", "", "", "", "");
  CHECK(written(at.read(expected)) == expected);
  for (int which = 0; which < 5; ++which) {
    std::array<std::string, 5> places;
    places[static_cast<std::size_t>(which)] = place;
    const auto& [a, b, c, d, e] = places;
    const Model read = at.read(everywhere(a, b, c, d, e));
    CHECK(written(read) == expected);
    const Tensor tensor = *at.read(everywhere(a, b, c, d, e)).nodes[1].attribute("value")->tensor;
    CHECK(text_of(tensor.elements) == "45");  // though the model has gone
    CHECK(tensor.external.empty());
  }
  CHECK(written(at.read(everywhere(place, place, place, place, place))) == expected);
  // Each of these is a copy, so none may be there again and again.
  std::string many;
  for (int i = 0; i < 9; ++i) {
    many += bytes(1, node("Constant", "", "c" + std::to_string(i),
                          attribute("value", AttributeType::tensor, bytes(5, constant(place)))));
  }
  CHECK_THAT(refusal([&] { at.read(model(many)); }), Catch::EndsWith("tensors in it overlap"));
}

namespace {

/// Tensors inline, of 64, 65, 63 and 2 bytes; "one" has more fields, and "two" is one by one.
std::string some_tensors() {
  const std::string one(64, '1'), three(63, '3');
  std::string two;
  for (int i = 0; i < 65; ++i) two += '\2';
  return model(
      identity(bytes(5, integer(1, 64) + integer(2, 2) + bytes(8, "one") + raw(one) +
                            bytes(12, "doc") + bytes(99, "unknown")) +
               bytes(5, integer(1, 65) + integer(2, 3) + bytes(5, two) + bytes(8, "two")) +
               bytes(5, tensor("three", {63}, DataType::uint8, raw(three))) +
               bytes(5, tensor("four", {2}, DataType::string, bytes(6, "a") + bytes(6, "b"))) +
               bytes(5, tensor("five", {3}, static_cast<DataType>(22), raw("ab")))));
}

void check_same(const Model& a, const Model& b) {
  REQUIRE(names_of(a.initializers) == names_of(b.initializers));
  for (std::size_t i = 0; i < a.initializers.size(); ++i) {
    CHECK(text_of(a.initializers[i].elements) == text_of(b.initializers[i].elements));
    CHECK(a.initializers[i].dims == b.initializers[i].dims);
    CHECK(a.initializers[i].type == b.initializers[i].type);
  }
}

}  // namespace

TEST_CASE("large tensors are written to a file beside the model", "[onnx]") {
  const Folder folder;
  const Model from = parse(some_tensors());
  const fs::path path = folder / "m.onnx";
  write_model(path, from, {.external_data = "m.data", .external_threshold = 64});
  CHECK(folder.count() == 2);
  CHECK(contents(folder / "m.data") == std::string(64, '1') + std::string(65, '\2'));
  const std::string all = some_tensors(), rest = all.substr(all.find(bytes(8, "three")));
  CHECK(contents(path).ends_with(rest));
  const std::string one =
      bytes(5, integer(1, 64) + integer(2, 2) + bytes(8, "one") + bytes(12, "doc") +
                   outside("m.data", "0", "64") + bytes(99, "unknown"));
  const std::string two =
      bytes(5, integer(1, 65) + integer(2, 3) + bytes(8, "two") + outside("m.data", "64", "65"));
  CHECK(contents(path).find(one + two) != std::string::npos);
  const Model read = read_model(path);
  check_same(read, from);
  CHECK(!read.initializers[0].external.empty());
  CHECK(!read.initializers[1].external.empty());
  CHECK(read.initializers[2].external.empty());

  SECTION("each aligned to 64 bytes") {
    write_model(path, from, {.external_data = "m.data", .external_threshold = 0});
    CHECK(contents(folder / "m.data") == std::string(64, '1') + std::string(65, '\2') +
                                             std::string(63, '\0') + std::string(63, '3') + '\0' +
                                             "ab");
    check_same(read_model(path), from);
  }
  SECTION("and come back inline, in raw_data, with all else of them") {
    write_model(path, read);
    CHECK(written(read) == contents(path));
    check_same(read_model(path), from);
    const std::string typed = bytes(5, std::string(65, '\2')) + bytes(8, "two");
    const std::string untyped = bytes(8, "two") + raw(std::string(65, '\2'));
    std::string expected = all;
    CHECK(contents(path) == expected.replace(expected.find(typed), typed.size(), untyped));
  }
  SECTION("and only those that are there") {
    Model fewer = read;
    fewer.initializers.erase(fewer.initializers.begin());
    write_model(path, fewer, {.external_data = "m.data", .external_threshold = 64});
    CHECK(contents(folder / "m.data") == std::string(65, '\2'));
    check_same(read_model(path), fewer);
  }
  SECTION("which may be the one that was read") {
    write_model(path, read, {.external_data = "m.data", .external_threshold = 0});
    check_same(read_model(path), from);
    CHECK(folder.count() == 2);
  }
  SECTION("new ones too") {
    Model more = read;
    more.initializers.push_back(Tensor::of<float>("new", {16}, std::vector<float>(16, 1)));
    write_model(path, more, {.external_data = "m.data", .external_threshold = 64});
    check_same(read_model(path), more);
    CHECK(!read_model(path).initializers[5].external.empty());
  }
  SECTION("or to none, where they are all small") {
    write_model(folder / "small", from, {.external_data = "none"});
    CHECK(folder.count() == 3);
    CHECK(contents(folder / "small") == some_tensors());
  }
}

TEST_CASE("external data is written to a file beside the model, or not at all", "[onnx]") {
  const Folder folder;
  const fs::path path = folder / "m.onnx";
  const auto writing = [&](const std::string& name) {
    return refusal([&] {
      write_model(path, parse(some_tensors()), {.external_data = name, .external_threshold = 0});
    });
  };
  for (const char* name : {"a/b", "/tmp/b", "..", ".", "a/"}) {
    CHECK(writing(name) == path.string() + ": external data \"" + name +
                               "\" is not the name of a file beside the model");
  }
  CHECK_THAT(writing(std::string("a\0b", 3)), Catch::EndsWith("of a file beside the model"));
  CHECK(writing("m.onnx") == path.string() + ": external data \"m.onnx\" is the model itself");
  CHECK(folder.count() == 0);
  put(path, "precious");
  fs::create_symlink("m.onnx", folder / "link");
  CHECK(writing("link") == path.string() + ": external data \"link\" is the model itself");
  fs::create_symlink("/dev/null", folder / "null");
  CHECK(writing("null") ==
        path.string() + ": external data \"null\": outside of the model's folder");
  CHECK(contents(path) == "precious");
  CHECK(folder.count() == 3);
}

// ---- files

TEST_CASE("a file on disk is the model in memory", "[onnx]") {
  const Folder folder;
  const fs::path path = folder / "m.onnx";
  write_model(path, example());
  CHECK(contents(path) == written(example()));
  CHECK(read_model(path).origin == path.string());
  CHECK(written(read_model(path)) == contents(path));
  CHECK(folder.count() == 1);
  SECTION("over the file that was read") {
    Model read = read_model(path);
    read.producer = "longer than it was before";
    write_model(path, read);
    CHECK(read_model(path).producer == "longer than it was before");
    CHECK(read.initializers[0].values<float>().size() == 6);
  }
  SECTION("through a link, which stays") {
    fs::create_symlink("m.onnx", folder / "link");
    put(path, "old");
    write_model(folder / "link", example());
    CHECK(fs::is_symlink(folder / "link"));
    CHECK(contents(path) == written(example()));
  }
}

TEST_CASE("a path that holds no model to read is refused", "[onnx]") {
  const Folder folder;
  CHECK(refusal<IoError>([&] { read_model(folder / "none"); }) ==
        "cannot read " + (folder / "none").string() + ": No such file or directory");
  CHECK_THAT(refusal<IoError>([&] { read_model(folder / ""); }),
             Catch::EndsWith("it is a folder; name a file in it"));
  put(folder / "empty", "");
  CHECK(refusal([&] { read_model(folder / "empty"); }) ==
        (folder / "empty").string() + ": there is no graph; this may not be an ONNX model");
}

TEST_CASE("whatever fails, both files stay, and nothing else", "[onnx]") {
  const Folder folder;
  const fs::path path = folder / "m.onnx";
  put(path, "precious");
  Model from = parse(some_tensors());
  const WriteOptions options{.external_data = "m.data", .external_threshold = 0};
  SECTION("a bad model") {
    put(folder / "m.data", "precious");
    from.nodes[0].inputs[0] = "missing";
    CHECK_FALSE(refusal([&] { write_model(path, from, options); }) == "not refused");
  }
  SECTION("a disk that is full while the model, or its data, is written") {
    put(folder / "m.data", "precious");
    const bool in_model = GENERATE(false, true);
    const FullDisk disk(in_model ? 200 : 150);
    CHECK(refusal<IoError>([&] {
            write_model(path, from,
                        {.external_data = "m.data", .external_threshold = in_model ? 64 : 0});
          }) ==
          "cannot write " + (in_model ? path : folder / "m.data").string() + ": File too large");
  }
  SECTION("data that cannot be put in its place") {
    fs::create_directory(folder / "m.data");
    CHECK(refusal<IoError>([&] { write_model(path, from, options); }) ==
          "cannot write " + (folder / "m.data").string() +
              ": there is something that is not a regular file");
    fs::remove(folder / "m.data");
    put(folder / "m.data", "precious");
  }
  CHECK(contents(path) == "precious");
  CHECK(contents(folder / "m.data") == "precious");
  CHECK(folder.count() == 2);
}
