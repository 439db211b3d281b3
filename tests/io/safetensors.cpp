// Safetensors files: what is read, what is refused and with which words, and what is left when
// writing fails.
// SPDX-License-Identifier: Apache-2.0
#include <concertina/io/safetensors.hpp>  // first: the header must stand alone

#include "io/files.hpp"

#include <catch2/catch.hpp>

#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <iterator>
#include <limits>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

using namespace concertina;
using namespace concertina::io;
using namespace concertina::test;
namespace fs = std::filesystem;

namespace {

using Shape = std::vector<std::ptrdiff_t>;

/// A file with this header and so many bytes of data, its length field right or as stated.
std::vector<std::byte> file_with(const std::string& header, std::size_t data_size = 0,
                                 std::uint64_t length = std::numeric_limits<std::uint64_t>::max()) {
  if (length == std::numeric_limits<std::uint64_t>::max()) length = header.size();
  std::string text;
  for (int shift = 0; shift < 64; shift += 8) text += static_cast<char>(length >> shift & 0xff);
  return bytes_of(text + header + std::string(data_size, '\x01'));
}

std::string parse_refusal(const std::vector<std::byte>& file) {
  return refusal([&] { parse_safetensors(file, "f"); });
}

std::string header_refusal(const std::string& header, std::size_t data_size = 0) {
  return parse_refusal(file_with(header, data_size));
}

/// The same for a header with one tensor, "w", that has these fields.
std::string fields_refusal(const std::string& fields, std::size_t data_size = 0) {
  return header_refusal(R"({"w":{)" + fields + "}}", data_size);
}

Safetensors example() {
  Safetensors file;
  file.metadata = {{"source", "a test"}, {"quotes \" and \xc3\xb6", "line\nbreak"}};
  file.add("a", {3}, std::array<std::uint8_t, 3>{1, 2, 3});
  file.add("b.weight", {2, 1, 2}, std::array{1.5F, -2.0F, 0.25F, 1e30F});
  file.add("c \"\\\xe2\x82\xac", {}, std::array{0.1});
  file.add("d", {4, 0, 7}, std::vector<float>{});
  return file;
}

/// Values at the edges of what a type holds.
template <class T>
std::vector<T> edges() {
  using L = std::numeric_limits<T>;
  if constexpr (std::same_as<T, bool>)
    return {false, true};
  else if constexpr (std::integral<T>)
    return {L::min(), T(0), T(1), T(3), L::max()};
  else
    return {T(0),          T(1),        T(-1.5F), L::lowest(), L::max(), L::min(), L::denorm_min(),
            L::infinity(), L::epsilon()};
}

template <class T>
Tensor edge_tensor() {
  const std::vector<T> values = edges<T>();
  Tensor tensor{*dtype_of<T>(), {std::ssize(values)}, {}};
  for (const T value : values) {
    const auto bytes = std::bit_cast<std::array<std::byte, sizeof(T)>>(value);
    tensor.bytes.insert(tensor.bytes.end(), bytes.begin(), bytes.end());
  }
  return tensor;
}

template <class File, class Scalar>
concept Viewable = requires(File&& file) { std::forward<File>(file).template view<Scalar>("w"); };

template <class File>
concept Lookable = requires(File&& file) { std::forward<File>(file).tensor("w"); };

using AllStored = std::tuple<bool, std::uint8_t, std::int8_t, std::uint16_t, std::int16_t,
                             Eigen::half, Eigen::bfloat16, std::uint32_t, std::int32_t, float,
                             std::uint64_t, std::int64_t, double>;

}  // namespace

TEST_CASE("a file reads as it was written", "[safetensors]") {
  const Safetensors file = example();
  const Safetensors again = parse_safetensors(serialize_safetensors(file), "again");
  CHECK(again == file);
  CHECK(again.origin == "again");
  CHECK(again.metadata == file.metadata);
  CHECK(again.values<std::uint8_t>("a") == std::vector<std::uint8_t>{1, 2, 3});
  CHECK(again.values<double>("b.weight") == std::vector<double>{1.5, -2, 0.25, double(1e30F)});
  CHECK(again.tensor("b.weight").shape == Shape{2, 1, 2});
  CHECK(again.tensor("c \"\\\xe2\x82\xac").shape.empty());
  CHECK(again.values<double>("c \"\\\xe2\x82\xac") == std::vector{0.1});
  CHECK(again.tensor("d").shape == Shape{4, 0, 7});
  CHECK(again.values<float>("d").empty());
  CHECK(again.view<float>("d").empty());
  CHECK(again.contains("a"));
  CHECK_FALSE(again.contains("A"));
}

TEST_CASE("equality is of everything but the origin", "[safetensors]") {
  const Safetensors file = example();
  Safetensors other = file;
  other.origin = "elsewhere";
  CHECK(other == file);
  SECTION("metadata") { other.metadata["source"] += '.'; }
  SECTION("a byte") { other.tensors.at("a").bytes[1] ^= std::byte{1}; }
  SECTION("a shape") { other.tensors.at("a").shape = {1, 3}; }
  SECTION("a dtype") { other.tensors.at("a").dtype = Dtype::I8; }
  SECTION("a name") { other.tensors.erase("d"); }
  CHECK_FALSE(other == file);
}

TEMPLATE_LIST_TEST_CASE("every dtype makes the round trip", "[safetensors]", AllStored) {
  Safetensors file;
  file.tensors["w"] = edge_tensor<TestType>();
  const Safetensors again = parse_safetensors(serialize_safetensors(file));
  CHECK(again == file);
  CHECK(again.values<TestType>("w") == edges<TestType>());
  CHECK(size_of(*dtype_of<TestType>()) == sizeof(TestType));
  if constexpr (!std::same_as<TestType, bool>) {
    const auto view = again.view<TestType>("w");
    CHECK(std::vector<TestType>(view.begin(), view.end()) == edges<TestType>());
    CHECK(static_cast<const void*>(view.data()) == again.tensor("w").bytes.data());

    Safetensors added;
    added.add("w", {std::ssize(view)}, edges<TestType>());
    CHECK(added == file);
  }
}

TEST_CASE("values widen exactly or not at all", "[safetensors]") {
  // A row per dtype, a column per requested type, both in the order of Dtype, then long double.
  constexpr std::array<std::string_view, 13> widens = {
      "11111111111111",  // BOOL
      "01011111111111",  // U8
      "00101110110111",  // I8
      "00010001111111",  // U16
      "00001000110111",  // I16
      "00000100010011",  // F16
      "00000010010011",  // BF16
      "00000001001111",  // U32
      "00000000100111",  // I32
      "00000000010011",  // F32
      "00000000001001",  // U64
      "00000000000101",  // I64
      "00000000000011",  // F64
  };
  const auto check = [&]<class From, class To>(std::size_t row, std::size_t column) {
    Safetensors file;
    file.tensors["w"] = edge_tensor<From>();
    const bool long_integers =
        std::same_as<To, long double> && std::integral<From> && sizeof(From) == 8;
    if (long_integers && std::numeric_limits<long double>::digits < 64)
      return;  // long double is a double here
    CAPTURE(row, column);
    const std::string said = refusal([&] {
      const std::vector<To> values = file.values<To>("w");
      const std::vector<From> expected = edges<From>();
      REQUIRE(values.size() == expected.size());
      for (std::size_t i = 0; i < values.size(); ++i) {
        CHECK(static_cast<long double>(values[i]) == static_cast<long double>(expected[i]));
      }
    });
    const std::string from = to_string(*dtype_of<From>());
    const std::string to = std::same_as<To, long double> ? "long double" : to_string(Dtype(column));
    CHECK(said == (widens[row][column] == '1'
                       ? "not refused"
                       : "safetensors: tensor \"w\": " + from + " does not fit " + to +
                             " exactly; read it as a wider type and round as you wish"));
  };
  const auto check_row = [&]<class From, std::size_t... Columns>(std::size_t row,
                                                                 std::index_sequence<Columns...>) {
    (check.template operator()<From, std::tuple_element_t<Columns, AllStored>>(row, Columns), ...);
    check.template operator()<From, long double>(row, 13);
  };
  [&]<std::size_t... Rows>(std::index_sequence<Rows...> all) {
    (check_row.template operator()<std::tuple_element_t<Rows, AllStored>>(Rows, all), ...);
  }(std::make_index_sequence<13>());
}

TEST_CASE("every 16-bit float widens to the number its bits say", "[safetensors]") {
  std::vector<std::uint16_t> patterns;
  for (std::uint32_t i = 0; i < 65536; ++i) patterns.push_back(static_cast<std::uint16_t>(i));
  Safetensors file;
  file.add("f16", {65536}, patterns);
  file.tensors.at("f16").dtype = Dtype::F16;
  file.tensors["bf16"] = file.tensors.at("f16");
  file.tensors.at("bf16").dtype = Dtype::BF16;

  const auto decoded = [](std::uint32_t bits, int exponent_bits) {
    const int fraction_bits = 15 - exponent_bits, bias = (1 << (exponent_bits - 1)) - 1;
    const auto fraction = static_cast<double>(bits & ((1U << fraction_bits) - 1));
    const int exponent = static_cast<int>(bits >> fraction_bits & ((1U << exponent_bits) - 1));
    const double sign = bits >> 15 ? -1 : 1;
    if (exponent == 2 * bias + 1) return fraction == 0 ? sign * INFINITY : static_cast<double>(NAN);
    const double significand = std::ldexp(fraction, -fraction_bits) + (exponent == 0 ? 0 : 1);
    return sign * std::ldexp(significand, (exponent == 0 ? 1 : exponent) - bias);
  };
  const std::vector<float> half = file.values<float>("f16"), brain = file.values<float>("bf16");
  int wrong = 0;
  for (std::size_t i = 0; i < 65536; ++i) {
    const double a = decoded(static_cast<std::uint32_t>(i), 5),
                 b = decoded(static_cast<std::uint32_t>(i), 8);
    wrong += std::isnan(a) ? !std::isnan(half[i]) : static_cast<double>(half[i]) != a;
    wrong += std::isnan(b) ? !std::isnan(brain[i]) : static_cast<double>(brain[i]) != b;
  }
  CHECK(wrong == 0);
}

TEST_CASE("views and values name what they cannot do", "[safetensors]") {
  static_assert(Stored<long> && Stored<long long> && Stored<Eigen::half> && Stored<char>);
  static_assert(!Stored<long double> && !Stored<const float> && detail::Readable<long double> &&
                !detail::Readable<std::string> && !detail::Readable<void*>);
  // A view of a temporary would dangle, and one of bool would show bytes that are no bool.
  static_assert(Viewable<const Safetensors&, float> && !Viewable<Safetensors, float>);
  static_assert(!Viewable<const Safetensors&, bool> && !Viewable<const Safetensors&, long double>);
  static_assert(Lookable<const Safetensors&> && !Lookable<Safetensors>);

  const Safetensors none;
  CHECK(refusal([&] { none.tensor("w"); }) ==
        "safetensors: there is no tensor \"w\", and no other either");
  Safetensors file = example();
  CHECK(refusal([&] { file.view<double>("b.weight"); }) ==
        "safetensors: tensor \"b.weight\": F32 cannot be viewed as F64; values() converts where "
        "that is exact");
  CHECK(refusal([&] { file.tensor("F.weight"); }) ==
        "safetensors: there is no tensor \"F.weight\" among the 4 in the file: "
        "\"a\", \"b.weight\", \"c \"\\\\xe2\\x82\\xac\", \"d\"");
  for (int i = 0; i < 100; ++i)
    file.add(std::string("b").append(std::to_string(i)), {}, std::array{i});
  CHECK(refusal([&] { file.values<float>("zero"); }) ==
        "safetensors: there is no tensor \"zero\" among the 104 in the file: "
        "\"a\", \"b.weight\", \"b0\", \"b1\", \"b10\", \"b11\", \"b12\", \"b13\", ...");

  file.tensors.at("a").bytes.pop_back();
  const std::string broken =
      "safetensors: tensor \"a\": U8 of shape [3] takes 3 bytes, but there are 2";
  CHECK(refusal([&] { file.values<std::uint8_t>("a"); }) == broken);
  CHECK(refusal([&] { file.view<std::uint8_t>("a"); }) == broken);
  CHECK(refusal([&] { serialize_safetensors(file); }) == broken);
  file.tensors.at("a").dtype = Dtype(99);
  CHECK(refusal([&] { file.values<std::uint8_t>("a"); }) == "Dtype 99 is none of the enumerators");
}

TEST_CASE("tensors of other dtypes are kept, but not read", "[safetensors]") {
  const std::string header = R"({"w":{"dtype":"F32","shape":[2],"data_offsets":[19,27]},)"
                             R"("a":{"dtype":"F8_E4M3","shape":[2,3],"data_offsets":[0,6]},)"
                             R"("b":{"dtype":"F4","shape":[10],"data_offsets":[6,11]},)"
                             R"("c":{"dtype":"C64","shape":[1],"data_offsets":[11,19]}})";
  const Safetensors file = parse_safetensors(file_with(header, 27), "f");
  CHECK(file.tensor("a").dtype == Dtype::Other);
  CHECK(file.tensor("a").dtype_name() == "F8_E4M3");
  CHECK(file.tensor("w").dtype_name() == "F32");
  CHECK(file.tensor("b").shape == Shape{10});
  CHECK(file.tensor("b").bytes == std::vector<std::byte>(5, std::byte{1}));
  CHECK(file.values<float>("w").size() == 2);

  const std::string expected =
      "f: tensor \"a\": values of dtype F8_E4M3 cannot be read, only "
      "BOOL, U8, I8, U16, I16, F16, BF16, U32, I32, F32, U64, I64, F64";
  CHECK(refusal([&] { file.values<float>("a"); }) == expected);
  CHECK(refusal([&] { file.values<long double>("a"); }) == expected);
  CHECK(refusal([&] { file.view<std::uint8_t>("a"); }) == expected);
  CHECK(refusal([] { size_of(Dtype::Other); }) == "dtype Other has no type that stores it");
  CHECK(to_string(Dtype::Other) == "other");

  const std::vector<std::byte> written = serialize_safetensors(file);
  const Safetensors again = parse_safetensors(written);
  CHECK(again == file);
  CHECK(serialize_safetensors(again) == written);
  Safetensors other = file;
  other.tensors.at("a").other_dtype = "F8_E5M2";
  CHECK_FALSE(other == file);

  const auto sized = [](const std::string& dtype, int bytes) {
    return fields_refusal(R"("dtype":")" + dtype + R"(","shape":[3],"data_offsets":[0,)" +
                              std::to_string(bytes) + ']',
                          static_cast<std::size_t>(bytes));
  };
  for (const char* dtype : {"F8_E5M2", "F8_E4M3", "F8_E8M0"}) {
    CHECK(sized(dtype, 3) == "not refused");
    CHECK(sized(dtype, 6) == "f: tensor \"w\", data_offsets [0, 6]: " + std::string(dtype) +
                                 " of shape [3] takes 3 bytes, but there are 6");
  }
  CHECK(sized("C64", 24) == "not refused");
  CHECK(sized("C64", 12) ==
        "f: tensor \"w\", data_offsets [0, 12]: C64 of shape [3] takes 24 bytes, but there are 12");
  for (const char* dtype : {"F4", "F6_E2M3", "C128", "OTHER"}) {
    for (const int bytes : {0, 2, 100}) CHECK(sized(dtype, bytes) == "not refused");
  }
  CHECK(fields_refusal(R"("dtype":"F4","shape":[4294967296,4294967296],"data_offsets":[0,0])") ==
        "f: tensor \"w\", data_offsets [0, 0]: shape [4294967296, 4294967296] of F4 has 2^63 "
        "elements or more");
  CHECK(fields_refusal(R"("dtype":"F4","shape":[9],"data_offsets":[0,9])", 8) ==
        "f: tensor \"w\": data_offsets [0, 9] reaches beyond the data, which has 8 bytes; "
        "the file is cut short, or its header is wrong");
  CHECK(header_refusal(R"({"a":{"dtype":"F4","shape":[8],"data_offsets":[0,4]},)"
                       R"("b":{"dtype":"F4","shape":[8],"data_offsets":[3,7]}})",
                       7) ==
        "f: tensor \"b\": begins at byte 3 of the data, within tensor \"a\", which ends at 4");
  CHECK(header_refusal(R"({"a":{"dtype":"F4","shape":[8],"data_offsets":[0,4]}})", 5) ==
        "f: the tensors end at byte 4 of the data, but it goes on to 5; the format forbids that");
}

TEST_CASE("any byte but zero is true", "[safetensors]") {
  Safetensors file;
  file.tensors["w"] = {Dtype::Bool, {3}, {std::byte{0}, std::byte{1}, std::byte{200}}};
  CHECK(file.values<bool>("w") == std::vector<bool>{false, true, true});
  CHECK(file.values<float>("w") == std::vector<float>{0, 1, 1});
}

TEST_CASE("what cannot be written is not added", "[safetensors]") {
  Safetensors file = example();
  const Safetensors before = file;
  const std::vector<float> six(6);
  CHECK(refusal([&] { file.add("a", {6}, six); }) ==
        "safetensors: tensor \"a\": the name is taken");
  CHECK(refusal([&] { file.add("__metadata__", {6}, six); }) ==
        "safetensors: \"__metadata__\" is reserved by the format; rename the tensor");
  CHECK(refusal([&] { file.add("w", {2, 2}, six); }) ==
        "safetensors: tensor \"w\": F32 of shape [2, 2] takes 16 bytes, but there are 24");
  CHECK(refusal([&] { file.add("w", {-2, -3}, six); }) ==
        "safetensors: tensor \"w\": shape [-2, -3] has a negative dimension");
  CHECK(refusal([&] { file.add("w", {std::ptrdiff_t{1} << 40, std::ptrdiff_t{1} << 40}, six); }) ==
        "safetensors: tensor \"w\": shape [1099511627776, 1099511627776] of F32 takes 2^63 bytes "
        "or more");
  CHECK(file == before);
}

TEST_CASE("what the format allows is read", "[safetensors]") {
  SECTION("nothing") {
    CHECK(parse_safetensors(file_with("{}")) == Safetensors{});
    CHECK(parse_safetensors(file_with(R"({"__metadata__":{}})")) == Safetensors{});
  }
  SECTION("a header that is not aligned, and so are its tensors") {
    const auto file =
        parse_safetensors(file_with(R"({"b":{"dtype":"F64","shape":[2],"data_offsets":[1,17]},)"
                                    R"("a":{"data_offsets":[0,1],"shape":[],"dtype":"U8"}})",
                                    17));
    CHECK(file.view<double>("b").size() == 2);  // even so: the tensors are aligned in memory
    CHECK(file.values<int>("a") == std::vector{1});
  }
  SECTION("empty tensors between others, and at the end") {
    const auto file =
        parse_safetensors(file_with(R"({"a":{"dtype":"F32","shape":[0],"data_offsets":[4,4]},)"
                                    R"("b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]},)"
                                    R"("c":{"dtype":"F32","shape":[3,0],"data_offsets":[0,0]},)"
                                    R"("d":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},)"
                                    R"("e":{"dtype":"F32","shape":[0,0],"data_offsets":[8,8]}}   )",
                                    8));
    CHECK(file.tensors.size() == 5);
    CHECK(parse_safetensors(serialize_safetensors(file)) == file);
  }
  SECTION("escapes, any name, white space") {
    const auto file = parse_safetensors(
        file_with("{ \"\" :\n{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]},"
                  "\"\\u0000\\ud83d\\ude00\":{\"dtype\":\"U8\",\"shape\":[0],"
                  "\"data_offsets\":[0,0]}}\n "));
    CHECK(file.contains(""));
    CHECK(file.contains(std::string_view("\0\xf0\x9f\x98\x80", 5)));
    CHECK(parse_safetensors(serialize_safetensors(file)) == file);
  }
}

TEST_CASE("a file that is no safetensors file is refused", "[safetensors]") {
  CHECK(parse_refusal({}) == "f: the file has 0 bytes, but the header's length alone takes 8");
  CHECK(parse_refusal(bytes_of("1234567")) ==
        "f: the file has 7 bytes, but the header's length alone takes 8");
  CHECK(parse_refusal(file_with("{}", 0, 3)) ==
        "f: byte 0: the header's length is 3, but only 2 bytes follow; the file is cut short");
  CHECK(parse_refusal(file_with("{}", 0, 100'000'000)) ==
        "f: byte 0: the header's length is 100000000, but only 2 bytes follow; the file is cut "
        "short");
  CHECK(parse_refusal(file_with("{}", 0, 100'000'001)) ==
        "f: byte 0: the header's length is 100000001, but at most 100000000 is allowed; "
        "this may not be a safetensors file");
  CHECK(parse_refusal(file_with("{}", 0, ~std::uint64_t{1})) ==
        "f: byte 0: the header's length is 18446744073709551614, but at most 100000000 is allowed; "
        "this may not be a safetensors file");
}

TEST_CASE("a header that is not JSON is refused", "[safetensors]") {
  using Catch::Matchers::StartsWith;
  CHECK(header_refusal("") == "f: byte 8: the header begins with \"\", expected \"{\"");
  CHECK(header_refusal(" {}") == "f: byte 8: the header begins with \" \", expected \"{\"");
  CHECK(header_refusal("\xef\xbb\xbf{}") ==
        "f: byte 8: the header begins with \"\\xef\", expected \"{\"");
  CHECK(header_refusal("[]") == "f: byte 8: the header begins with \"[\", expected \"{\"");
  CHECK(header_refusal(std::string("{}\0]", 4)) ==
        "f: byte 10: the header has a NUL; pad it with spaces");
  CHECK(header_refusal(R"({"w":)" + std::string(1, '\0') + "1}") ==
        "f: byte 13: the header has a NUL; pad it with spaces");
  CHECK_THAT(header_refusal("{"), StartsWith("f: byte 9: the header is not valid JSON; "));
  CHECK_THAT(header_refusal("{} {}"), StartsWith("f: byte 11: the header is not valid JSON; "));
  CHECK_THAT(header_refusal("{\"a\" 1}"), StartsWith("f: byte 13: the header is not valid JSON; "));
  CHECK_THAT(header_refusal("{\"__metadata__\":{\"k\":\"v\",}}"),
             StartsWith("f: byte 33: the header is not valid JSON; "));
  CHECK_THAT(header_refusal("{/**/}"), StartsWith("f: byte 9: the header is not valid JSON; "));
  CHECK_THAT(header_refusal("{\"w\":1e999}"), StartsWith("f: byte"));
  // Not UTF-8: a lone byte, an overlong slash, half of a surrogate pair.
  for (const std::string text : {"\xff", "\xc0\xaf", "\xed\xa0\x80", "\\ud800"}) {
    CHECK_THAT(header_refusal("{\"" + text + "\":1}"), StartsWith("f: byte 1"));
    CHECK_THAT(header_refusal("{\"" + text + "\":1}"),
               Catch::Contains("the header is not valid JSON; "));
  }
  // What is shown is printable and short, whatever is there.
  const std::string said = header_refusal("{\"" + std::string(100'000, 'x') + "\x1b[2J");
  CHECK(said.size() < 500);
  for (const char c : said) CHECK((c >= ' ' && c <= '~'));
}

TEST_CASE("a header that is not what the format says is refused", "[safetensors]") {
  const std::string good = R"({"dtype":"U8","shape":[0],"data_offsets":[0,0]})";

  CHECK(header_refusal(R"({"w":1})") ==
        "f: tensor \"w\": found 1, expected an object with dtype, shape and data_offsets");
  CHECK(header_refusal(R"({"w":[)" + std::string(1'000'000, '[')) ==
        "f: tensor \"w\": found an array, expected an object with dtype, shape and data_offsets");
  CHECK(header_refusal(R"({"w":null})") ==
        "f: tensor \"w\": found null, expected an object with dtype, shape and data_offsets");
  CHECK(header_refusal(R"({"w":)" + good + R"(,"v":)" + good + R"(,"w":)" + good + "}") ==
        "f: tensor \"w\": the name is there twice");
  CHECK(header_refusal(R"({"w":)" + good + R"(,"\u0077":)" + good + "}") ==
        "f: tensor \"w\": the name is there twice");

  CHECK(header_refusal(R"({"__metadata__":null})") ==
        "f: __metadata__: found null, expected an object of strings");
  CHECK(header_refusal(R"({"__metadata__":"x"})") ==
        "f: __metadata__: found \"x\", expected an object of strings");
  CHECK(header_refusal(R"({"__metadata__":{},"__metadata__":{}})") ==
        "f: \"__metadata__\" is there twice");
  CHECK(header_refusal(R"({"__metadata__":{"a":"1","b":"2","a":"1"}})") ==
        "f: metadata \"a\": the key is there twice");
  CHECK(header_refusal(R"({"__metadata__":{"a":1}})") ==
        "f: metadata \"a\": found 1, expected a string; write other values as text");
  CHECK(header_refusal(R"({"__metadata__":{"a":-1.5}})") ==
        "f: metadata \"a\": found -1.5, expected a string; write other values as text");
  CHECK(header_refusal(R"({"__metadata__":{"a":true}})") ==
        "f: metadata \"a\": found true, expected a string; write other values as text");
  CHECK(header_refusal(R"({"__metadata__":{"a":{"b":"c"}}})") ==
        "f: metadata \"a\": found an object, expected a string; write other values as text");
  CHECK(header_refusal(R"({"__metadata__":{"a":["b"]}})") ==
        "f: metadata \"a\": found an array, expected a string; write other values as text");

  CHECK(fields_refusal("") == "f: tensor \"w\": dtype is missing");
  CHECK(fields_refusal(R"("dtype":"U8","data_offsets":[0,0])") ==
        "f: tensor \"w\": shape is missing");
  CHECK(fields_refusal(R"("dtype":"U8","shape":[0])") ==
        "f: tensor \"w\": data_offsets is missing");
  CHECK(fields_refusal(R"("dtype":"U8","dtype":"U8")") ==
        "f: tensor \"w\", dtype: the field is there twice");
  CHECK(fields_refusal(R"("shape":[],"shape":[])") ==
        "f: tensor \"w\", shape: the field is there twice");
  CHECK(fields_refusal(R"("data_offsets":[],"data_offsets":[])") ==
        "f: tensor \"w\", data_offsets: the field is there twice");
  CHECK(fields_refusal(R"("strides":[1])") ==
        "f: tensor \"w\": field \"strides\" is unknown, expected dtype, shape or data_offsets");

  for (const std::string& name :
       {std::string("f32"), std::string(), std::string("8F"), std::string("F8 "),
        std::string("F8-E4M3"), std::string(33, 'F')}) {
    CHECK(fields_refusal(R"("dtype":")" + name + '"') ==
          "f: tensor \"w\", dtype: \"" + name +
              "\" is not the name of a dtype, which is upper-case as F32 or F8_E4M3");
  }
  CHECK(fields_refusal(R"("dtype":32)") == "f: tensor \"w\", dtype: found 32, expected a string");
  CHECK(fields_refusal(R"("dtype":["F32"])") ==
        "f: tensor \"w\", dtype: found an array, expected a string");
  CHECK(fields_refusal(R"("shape":3)") ==
        "f: tensor \"w\", shape: found 3, expected an array of integers");
  CHECK(fields_refusal(R"("shape":{})") ==
        "f: tensor \"w\", shape: found an object, expected an array of integers");
}

TEST_CASE("numbers that are no sizes are refused", "[safetensors]") {
  for (const std::string field : {"shape", "data_offsets"}) {
    for (const std::string& found :
         {std::string("-1"), std::string("1.5"), std::string("1.0"), std::string("1e3"),
          std::string("true"), std::string("null"), std::string("\"4\""),
          std::string("9223372036854775808"), std::string("18446744073709551615"),
          std::string("18446744073709551616"), std::string("-9223372036854775809")}) {
      CHECK(fields_refusal("\"" + field + "\":[0," + found + "]") ==
            "f: tensor \"w\", " + field + ": found " + found +
                ", expected an integer from 0 to 9223372036854775807");
    }
    CHECK(fields_refusal("\"" + field + "\":[[") ==
          "f: tensor \"w\", " + field +
              ": found an array, expected an integer from 0 to 9223372036854775807");
    CHECK(fields_refusal("\"" + field + "\":[{") ==
          "f: tensor \"w\", " + field +
              ": found an object, expected an integer from 0 to 9223372036854775807");
    CHECK(fields_refusal("\"" + field + "\":[-0]") ==
          "f: tensor \"w\", " + field +
              ": found -0, expected an integer from 0 to 9223372036854775807");
    CHECK(fields_refusal("\"" + field + "\":[" + std::string(200, '9') + "]") ==
          "f: tensor \"w\", " + field + ": found " + std::string(100, '9') +
              "..., expected an integer from 0 to 9223372036854775807");
  }
}

TEST_CASE("shapes and data that do not fit each other are refused", "[safetensors]") {
  CHECK(fields_refusal(R"("dtype":"F32","shape":[2,3],"data_offsets":[0,20])", 20) ==
        "f: tensor \"w\", data_offsets [0, 20]: F32 of shape [2, 3] takes 24 bytes, but there are "
        "20");
  CHECK(fields_refusal(R"("dtype":"F64","shape":[],"data_offsets":[0,4])", 4) ==
        "f: tensor \"w\", data_offsets [0, 4]: F64 of shape [] takes 8 bytes, but there are 4");
  CHECK(fields_refusal(R"("dtype":"F64","shape":[5,0],"data_offsets":[0,8])", 8) ==
        "f: tensor \"w\", data_offsets [0, 8]: F64 of shape [5, 0] takes 0 bytes, but there are 8");
  CHECK(fields_refusal(R"("dtype":"I16","shape":[1,2,3,4,5,6,7,8,9,10],"data_offsets":[0,0])") ==
        "f: tensor \"w\", data_offsets [0, 0]: "
        "I16 of shape [1, 2, 3, 4, 5, 6, 7, 8, ...] takes 7257600 bytes, but there are 0");
  // Modulo 2^64 these take 0, 8 and 0 bytes.
  CHECK(fields_refusal(R"("dtype":"U8","shape":[4294967296,4294967296],"data_offsets":[0,0])") ==
        "f: tensor \"w\", data_offsets [0, 0]: shape [4294967296, 4294967296] of U8 takes 2^63 "
        "bytes or more");
  CHECK(fields_refusal(R"("dtype":"F64","shape":[2305843009213693953],"data_offsets":[0,8])", 8) ==
        "f: tensor \"w\", data_offsets [0, 8]: shape [2305843009213693953] of F64 takes 2^63 bytes "
        "or more");
  CHECK(fields_refusal(R"("dtype":"U8","shape":[0,4294967296,4294967296],"data_offsets":[0,0])") ==
        "f: tensor \"w\", data_offsets [0, 0]: shape [0, 4294967296, 4294967296] of U8 takes 2^63 "
        "bytes or more");
  CHECK(fields_refusal(R"("dtype":"U8","shape":[9223372036854775807],"data_offsets":[0,0])") ==
        "f: tensor \"w\", data_offsets [0, 0]: "
        "U8 of shape [9223372036854775807] takes 9223372036854775807 bytes, but there are 0");

  CHECK(fields_refusal(R"("dtype":"U8","shape":[0],"data_offsets":[0])") ==
        "f: tensor \"w\": data_offsets [0] has to be two numbers, [begin, end]");
  CHECK(fields_refusal(R"("dtype":"U8","shape":[0],"data_offsets":[0,0,0])") ==
        "f: tensor \"w\": data_offsets [0, 0, 0] has to be two numbers, [begin, end]");
  CHECK(fields_refusal(R"("dtype":"U8","shape":[4],"data_offsets":[8,4])", 8) ==
        "f: tensor \"w\": data_offsets [8, 4] ends before it begins");
  CHECK(fields_refusal(R"("dtype":"U8","shape":[9],"data_offsets":[0,9])", 8) ==
        "f: tensor \"w\": data_offsets [0, 9] reaches beyond the data, which has 8 bytes; "
        "the file is cut short, or its header is wrong");
  CHECK(fields_refusal(R"("dtype":"U8","shape":[0],"data_offsets":[9,9])", 8) ==
        "f: tensor \"w\": data_offsets [9, 9] reaches beyond the data, which has 8 bytes; "
        "the file is cut short, or its header is wrong");
  CHECK(
      fields_refusal(
          R"("dtype":"U8","shape":[9223372036854775807],"data_offsets":[0,9223372036854775807])") ==
      "f: tensor \"w\": data_offsets [0, 9223372036854775807] reaches beyond the data, which has 0 "
      "bytes; "
      "the file is cut short, or its header is wrong");
}

TEST_CASE("every byte belongs to one tensor", "[safetensors]") {
  const auto two = [](int begin_a, int end_a, int begin_b, int end_b, std::size_t data_size) {
    const auto entry = [](int begin, int end) {
      return R"({"dtype":"U8","shape":[)" + std::to_string(end - begin) + R"(],"data_offsets":[)" +
             std::to_string(begin) + ',' + std::to_string(end) + "]}";
    };
    return header_refusal(
        R"({"a":)" + entry(begin_a, end_a) + R"(,"b":)" + entry(begin_b, end_b) + "}", data_size);
  };
  CHECK(two(0, 4, 4, 8, 8) == "not refused");
  CHECK(two(4, 8, 0, 4, 8) == "not refused");
  CHECK(two(0, 4, 3, 8, 8) ==
        "f: tensor \"b\": begins at byte 3 of the data, within tensor \"a\", which ends at 4");
  CHECK(two(0, 8, 4, 4, 8) ==
        "f: tensor \"b\": begins at byte 4 of the data, within tensor \"a\", which ends at 8");
  CHECK(two(0, 8, 0, 8, 8) ==
        "f: tensor \"b\": begins at byte 0 of the data, within tensor \"a\", which ends at 8");
  CHECK(two(0, 4, 5, 8, 8) ==
        "f: tensor \"b\": begins at byte 5 of the data, but those from 4 on belong to no tensor; "
        "the format forbids holes");
  CHECK(two(4, 8, 1, 4, 8) ==
        "f: tensor \"b\": begins at byte 1 of the data, but those from 0 on belong to no tensor; "
        "the format forbids holes");
  CHECK(two(0, 4, 4, 8, 9) ==
        "f: the tensors end at byte 8 of the data, but it goes on to 9; the format forbids that");
  CHECK(header_refusal("{}", 1) ==
        "f: the tensors end at byte 0 of the data, but it goes on to 1; the format forbids that");
}

TEST_CASE("a damaged file is refused, or is another valid file", "[safetensors]") {
  const std::vector<std::byte> whole = serialize_safetensors(example());
  for (std::size_t size = 0; size < whole.size(); ++size) {
    CHECK(parse_refusal({whole.begin(), whole.begin() + static_cast<std::ptrdiff_t>(size)}) !=
          "not refused");
  }
  for (std::size_t at = 0; at < whole.size(); ++at) {
    for (int bit = 0; bit < 8; ++bit) {
      std::vector<std::byte> damaged = whole;
      damaged[at] ^= std::byte{1} << bit;
      try {
        const Safetensors file = parse_safetensors(damaged);
        if (parse_safetensors(serialize_safetensors(file)) != file)
          FAIL("byte " << at << ", bit " << bit);
      } catch (const FormatError&) {
      }
    }
  }
}

TEST_CASE("equal files are written as equal bytes, aligned and padded", "[safetensors]") {
  Safetensors forwards, backwards;
  const auto add = [](Safetensors& file, int i) {
    switch (i) {
      case 0: return file.add("a", {3}, std::array<std::uint8_t, 3>{1, 2, 3});
      case 1: return file.add("z", {1}, std::array{1.5});
      case 2: return file.add("b", {1}, std::array<std::int16_t, 1>{-7});
      case 3: return file.add("y", {2}, std::array{1.0F, 2.0F});
      default: return file.add("c", {2}, std::array{3.0F, 4.0F});
    }
  };
  for (int i = 0; i < 5; ++i) {
    add(forwards, i);
    add(backwards, 4 - i);
  }
  const std::vector<std::byte> bytes = serialize_safetensors(forwards);
  CHECK(bytes == serialize_safetensors(backwards));
  const std::string header = R"({"z":{"dtype":"F64","shape":[1],"data_offsets":[0,8]},)"
                             R"("c":{"dtype":"F32","shape":[2],"data_offsets":[8,16]},)"
                             R"("y":{"dtype":"F32","shape":[2],"data_offsets":[16,24]},)"
                             R"("b":{"dtype":"I16","shape":[1],"data_offsets":[24,26]},)"
                             R"("a":{"dtype":"U8","shape":[3],"data_offsets":[26,29]}})";
  const std::size_t length = (header.size() + 7) / 8 * 8;
  const std::string text(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  CHECK(text.substr(0, 8) ==
        std::string{static_cast<char>(length & 0xff), static_cast<char>(length >> 8)} +
            std::string(6, '\0'));
  CHECK(text.substr(8, length) == header + std::string(length - header.size(), ' '));
  CHECK(text.size() == 8 + length + 29);
  CHECK(text.substr(8 + length + 26) == "\1\2\3");

  CHECK(serialize_safetensors({}) == file_with("{}      "));
  Safetensors described;
  described.metadata = {{"b", "2"}, {"a", "\"1\""}};
  CHECK(serialize_safetensors(described) ==
        file_with(R"({"__metadata__":{"a":"\"1\"","b":"2"}}  )"));
}

TEST_CASE("what the format cannot hold is not written", "[safetensors]") {
  Safetensors file;
  SECTION("a reserved name") {
    file.tensors["__metadata__"] = {Dtype::U8, {0}, {}};
    CHECK(refusal([&] { serialize_safetensors(file); }) ==
          "safetensors: \"__metadata__\" is reserved by the format; rename the tensor");
  }
  SECTION("no name of a dtype, or one too many") {
    const auto refused = [&](Dtype dtype, const std::string& name) {
      file.tensors["w"] = {dtype, {0}, {}, name};
      return refusal([&] { serialize_safetensors(file); });
    };
    CHECK(refused(Dtype::Other, "F8_E4M3") == "not refused");
    for (const char* name : {"", "F32", "f4", "\"F4"}) {
      CHECK(refused(Dtype::Other, name) == "safetensors: tensor \"w\": other_dtype is \"" +
                                               std::string(name) + "\", where the dtype is other");
    }
    CHECK(refused(Dtype::F32, "F4") ==
          "safetensors: tensor \"w\": other_dtype is \"F4\", where the dtype is F32");
  }
  SECTION("names and metadata that are not UTF-8") {
    const std::string expected =
        "safetensors: \"a\\xff\" is not UTF-8, as names and metadata must be";
    SECTION("name") { file.add("a\xff", {0}, std::vector<float>{}); }
    SECTION("key") { file.metadata["a\xff"] = ""; }
    SECTION("value") { file.metadata["a"] = "a\xff"; }
    CHECK(refusal([&] { serialize_safetensors(file); }) == expected);
  }
  SECTION("a header beyond the limit") {
    file.metadata["a"] = std::string(100'000'000, ' ');
    CHECK(refusal([&] { serialize_safetensors(file); }) ==
          "safetensors: the header takes 100000032 bytes, but the format allows 100000000; "
          "shorten names or metadata, or split the file");
  }
}

TEST_CASE("a file on disk reads as it was written", "[safetensors]") {
  const Folder folder;
  const fs::path path = folder / "a.safetensors";
  write_safetensors(path, example());
  const Safetensors file = read_safetensors(path);
  CHECK(file == example());
  CHECK(file.origin == path.string());
  CHECK(bytes_of(contents(path)) == serialize_safetensors(example()));
  CHECK(folder.count() == 1);

  write_safetensors(path, {});
  CHECK(read_safetensors(path) == Safetensors{});
  CHECK(folder.count() == 1);
}

TEST_CASE("a path that holds no file to read is refused", "[safetensors]") {
  const Folder folder;
  const std::string name = (folder / "a").string();
  const auto reading = [&]<class E = IoError>(std::type_identity<E> = {}) {
    return refusal<E>([&] { read_safetensors(name); });
  };
  CHECK(reading() == "cannot read " + name + ": No such file or directory");
  SECTION("folder") {
    fs::create_directory(name);
    CHECK(reading() == "cannot read " + name + ": it is a folder; name a file in it");
  }
  SECTION("pipe, which would block") {
    REQUIRE(::mkfifo(name.c_str(), 0600) == 0);
    CHECK(reading() == "cannot read " + name + ": it is not a regular file");
  }
  SECTION("no permission, but for root") {
    put(name, "");
    fs::permissions(name, fs::perms::none);
    if (::geteuid() != 0) CHECK(reading() == "cannot read " + name + ": Permission denied");
  }
  SECTION("bad contents, with the path in the message") {
    put(name, "");
    CHECK(reading(std::type_identity<FormatError>{}) ==
          name + ": the file has 0 bytes, but the header's length alone takes 8");
    put(name, "abcdefghijklmnop");
    CHECK_THAT(reading(std::type_identity<FormatError>{}),
               Catch::StartsWith(name + ": byte 0: the header's length is ") &&
                   Catch::EndsWith("this may not be a safetensors file"));
  }
}

TEST_CASE("whatever fails, what was at the path stays, and nothing else", "[safetensors]") {
  const Folder folder;
  const fs::path path = folder / "a";
  put(path, "precious");
  Safetensors file;
  file.add("w", {100'000}, std::vector<float>(100'000, 1.0F));

  SECTION("bad contents") {
    file.tensors.at("w").shape = {2};
    CHECK(refusal([&] { write_safetensors(path, file); }) ==
          path.string() + ": tensor \"w\": F32 of shape [2] takes 8 bytes, but there are 400000");
  }
  SECTION("a disk that is full half way") {
    const FullDisk disk(200'000);
    CHECK(refusal<IoError>([&] { write_safetensors(path, file); }) ==
          "cannot write " + path.string() + ": File too large");
  }
  SECTION("a disk that is full at the last flush") {
    Safetensors tiny;
    tiny.add("w", {1}, std::array{1.0F});
    const FullDisk disk(10);
    CHECK(refusal<IoError>([&] { write_safetensors(path, tiny); }) ==
          "cannot write " + path.string() + ": File too large");
  }
  CHECK(contents(path) == "precious");
  CHECK(folder.count() == 1);
}

TEST_CASE("a path where no file can be put is refused", "[safetensors]") {
  const Folder folder;
  const auto writing = [](const fs::path& path) {
    return refusal<IoError>([&] { write_safetensors(path, example()); });
  };
  SECTION("no such folder") {
    const fs::path path = folder / "missing" / "a";
    CHECK(writing(path) == "cannot write " + path.string() + ": cannot create " +
                               (folder / "missing" / ".concertina-0.tmp").string() +
                               ", No such file or directory");
    CHECK(folder.count() == 0);
  }
  SECTION("a folder, a pipe") {
    const fs::path path = folder / "a";
    SECTION("folder") { fs::create_directory(path); }
    SECTION("pipe") { REQUIRE(::mkfifo(path.c_str(), 0600) == 0); }
    CHECK(writing(path) ==
          "cannot write " + path.string() + ": there is something that is not a regular file");
    CHECK(folder.count() == 1);
  }
  SECTION("no name") {
    fs::create_directory(folder / "b");
    CHECK_THAT(writing(folder / "b" / ""),
               Catch::EndsWith("there is something that is not a regular file"));
    CHECK(fs::is_empty(folder / "b"));
  }
  SECTION("a folder without permission, but for root") {
    fs::create_directory(folder / "b");
    fs::permissions(folder / "b", fs::perms::owner_read | fs::perms::owner_exec);
    if (::geteuid() != 0)
      CHECK_THAT(writing(folder / "b" / "a"), Catch::EndsWith("Permission denied"));
    fs::permissions(folder / "b", fs::perms::owner_all);
  }
}

TEST_CASE("writing leaves other files alone", "[safetensors]") {
  const Folder folder;
  SECTION("another writer's temporary file") {
    put(folder / ".concertina-0.tmp", "another writer");
    const detail::Descriptor writer(::open((folder / ".concertina-0.tmp").c_str(), O_RDONLY));
    REQUIRE(detail::lock(writer.get()));
    write_safetensors(folder / "a", example());
    CHECK(contents(folder / ".concertina-0.tmp") == "another writer");
    CHECK(read_safetensors(folder / "a") == example());
    CHECK(folder.count() == 2);
  }
  SECTION("a link keeps pointing to the file, which is replaced") {
    put(folder / "a", "old");
    fs::create_symlink("a", folder / "link");
    write_safetensors(folder / "link", example());
    CHECK(fs::is_symlink(folder / "link"));
    CHECK(read_safetensors(folder / "a") == example());
    CHECK(folder.count() == 2);
  }
}

TEST_CASE("a file that the format's own library wrote is read", "[safetensors]") {
  const Safetensors file = read_safetensors(CONCERTINA_TEST_DATA "/python.safetensors");
  CHECK(file.metadata == std::map<std::string, std::string>{{"source", "safetensors 0.8.0"}});
  CHECK(file.tensors.size() == 5);
  CHECK(file.tensor("layer.weight").shape == Shape{2, 3, 2});
  CHECK(file.values<float>("layer.weight") ==
        std::vector<float>{-1.5, -1.25, -1, -0.75, -0.5, -0.25, 0, 0.25, 0.5, 0.75, 1, 1.25});
  CHECK(file.values<double>("layer.bias") == std::vector{0.5, -1e300});
  CHECK(file.values<float>("half") == std::vector<float>{1.5, -2});
  CHECK(file.values<std::int64_t>("steps") == std::vector<std::int64_t>{7});
  CHECK(file.values<float>("empty").empty());
  CHECK(parse_safetensors(serialize_safetensors(file)) == file);
}
