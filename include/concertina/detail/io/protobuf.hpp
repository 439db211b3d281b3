// Protocol buffers: messages read field by field with distrust, and written in pieces that are not
// copied.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/detail/text.hpp>
#include <concertina/error.hpp>
#include <concertina/io/onnx.hpp>  // Field

#include <protozero/pbf_reader.hpp>
#include <protozero/pbf_writer.hpp>

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace concertina::onnx::detail {

using concertina::detail::fail;
using Bytes = std::span<const std::byte>;
using WireType = protozero::pbf_wire_type;

inline constexpr std::size_t message_limit = 0x7fffffff;  // bytes: the format's own

inline Bytes bytes_of(std::string_view text) { return std::as_bytes(std::span(text)); }

inline std::string_view text_of(Bytes bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

/// A file that messages are part of.
struct Source {
  std::string name;
  Bytes bytes;

  /// "model.onnx: byte 7"
  std::string at(const char* place) const {
    const char* const begin = text_of(bytes).data();
    const std::less<const char*> before;
    if (before(place, begin) || before(begin + bytes.size(), place)) return name;  // rewritten
    return name + ": byte " + std::to_string(place - begin);
  }
};

/// A message, one field after another. What next() has returned is a whole field; it is taken by
/// the function of its wire type, which refuses another.
class Message {
 public:
  /// `name` is the message's type, for what is refused.
  Message(const Source& source, Bytes bytes, const char* name)
      : source_(&source), name_(name), reader_(text_of(bytes).data(), bytes.size()) {}

  bool next() {
    begin_ = place();
    if (!reader_) return false;
    const char* after = begin_;
    const std::uint64_t tag = varint(after, end());
    if (tag > std::numeric_limits<std::uint32_t>::max()) refuse(begin_, "a tag above 32 bits");
    try {
      reader_.next();
      number_ = reader_.tag();  // protozero forgets both with the value
      type_ = reader_.wire_type();
      take_value();
    } catch (const protozero::invalid_tag_exception&) {
      refuse(begin_, "a field of number " + std::to_string(tag >> 3));
    } catch (const protozero::unknown_pbf_wire_type_exception&) {
      refuse(begin_, "wire type " + std::to_string(tag & 7) + ", expected 0, 1, 2 or 5");
    } catch (const protozero::exception&) {
      refuse(begin_, "a field that is cut short");
    }
    return true;
  }

  std::uint32_t number() const { return number_; }

  /// The whole field, its tag included.
  Bytes encoded() const { return bytes_of({begin_, static_cast<std::size_t>(place() - begin_)}); }

  Bytes bytes() const {
    expect(WireType::length_delimited, "bytes");
    return bytes_;
  }
  std::string text() const { return std::string(text_of(bytes())); }
  std::int64_t integer() const {
    expect(WireType::varint, "an integer");
    return static_cast<std::int64_t>(value_);
  }
  std::int32_t small_integer() const {
    const std::int64_t value = integer();
    if (value != static_cast<std::int32_t>(value)) {
      refuse(begin_, "field " + std::to_string(number()) + " of " + std::to_string(value) +
                         ", expected 32 bits");
    }
    return static_cast<std::int32_t>(value);
  }
  float real() const {
    expect(WireType::fixed32, "a float");
    return std::bit_cast<float>(static_cast<std::uint32_t>(value_));
  }

  /// visit(bits) with each number of a repeated field, packed or one alone.
  template <class Visit>
  void numbers(WireType type, const Visit& visit) const {
    if (type_ != WireType::length_delimited) {
      expect(type, "numbers");
      return visit(value_);
    }
    const char* at = text_of(bytes_).data();
    const char* const stop = at + bytes_.size();
    const std::ptrdiff_t width = type == WireType::fixed32 ? 4 : 8;
    if (type != WireType::varint && (stop - at) % width != 0) {
      refuse(begin_, std::to_string(stop - at) + " bytes of packed numbers that take " +
                         std::to_string(width) + " each");
    }
    while (at != stop) {
      std::uint64_t value = 0;
      if (type == WireType::varint) {
        value = varint(at, stop);
      } else {
        for (std::ptrdiff_t i = 0; i < width; ++i) {
          value |= std::uint64_t{static_cast<unsigned char>(*at++)} << (8 * i);
        }
      }
      visit(value);
    }
  }

  /// Throws FormatError naming file, offset, message type and what was found.
  [[noreturn]] void refuse(const char* place, const std::string& what) const {
    fail<FormatError>({source_->at(place), ": ", name_, " has ", what});
  }
  [[noreturn]] void refuse(const std::string& what) const { refuse(begin_, what); }

 private:
  const char* place() const { return reader_.data().data(); }
  const char* end() const { return place() + reader_.data().size(); }

  void take_value() {
    switch (type_) {
      case WireType::varint: {
        const char* at = place();
        value_ = varint(at, end());
        return reader_.skip();
      }
      case WireType::fixed32: value_ = reader_.get_fixed32(); return;
      case WireType::fixed64: value_ = reader_.get_fixed64(); return;
      default: break;
    }
    const char* at = place();
    const std::uint64_t length = varint(at, end());
    const auto left = static_cast<std::uint64_t>(end() - at);
    if (length > left || length > message_limit) {
      refuse(begin_, "field " + std::to_string(number_) + " of " + std::to_string(length) +
                         " bytes, but only " + std::to_string(left) + " follow");
    }
    const protozero::data_view view = reader_.get_view();
    bytes_ = bytes_of({view.data(), view.size()});
  }

  /// protozero drops bits beyond the 64th, and takes lengths modulo 2^32; here both are refused.
  std::uint64_t varint(const char*& at, const char* stop) const {
    const char* const start = at;
    std::uint64_t value = 0;
    try {
      value = protozero::decode_varint(&at, stop);
    } catch (const protozero::varint_too_long_exception&) {
      refuse(start, "a varint of more than 10 bytes");
    } catch (const protozero::exception&) {
      refuse(start, "a varint that is cut short");
    }
    if (at - start == protozero::max_varint_length && at[-1] > 1) {
      refuse(start, "a varint above 64 bits");
    }
    return value;
  }

  void expect(WireType type, const char* what) const {
    if (type_ == type) return;
    refuse(begin_, "field " + std::to_string(number()) + " of wire type " +
                       std::to_string(static_cast<unsigned>(type_)) + ", expected " +
                       std::to_string(static_cast<unsigned>(type)) + ", " + what);
  }

  const Source* source_;
  const char* name_;
  protozero::pbf_reader reader_;
  const char* begin_ = nullptr;
  std::uint32_t number_ = 0;
  WireType type_ = WireType::unknown;
  std::uint64_t value_ = 0;
  Bytes bytes_;
};

/// A message to write, in pieces: text of its own, and views of what is not copied.
class Pieces {
 public:
  std::size_t size() const { return size_; }

  void add(Bytes bytes) {
    constexpr std::size_t small = 512;  // copied: fewer pieces
    if (bytes.size() < small) {
      tail() += text_of(bytes);
    } else {
      pieces_.emplace_back(bytes);
    }
    size_ += bytes.size();
  }

  void bytes(std::uint32_t number, Bytes value) {
    head(number, value.size());
    add(value);
  }
  void text(std::uint32_t number, std::string_view value) { bytes(number, bytes_of(value)); }
  void integer(std::uint32_t number, std::int64_t value) {
    write([&](auto& writer) { writer.add_int64(number, value); });
  }
  void real(std::uint32_t number, float value) {
    write([&](auto& writer) { writer.add_float(number, value); });
  }
  void message(std::uint32_t number, Pieces&& value) {
    head(number, value.size());
    for (auto& piece : value.pieces_) {
      if (const auto* text = std::get_if<std::string>(&piece)) {
        tail() += *text;
      } else {
        pieces_.push_back(std::move(piece));
      }
    }
    size_ += value.size_;
  }

  template <class Visit>
  void for_each(const Visit& visit) const {
    for (const auto& piece : pieces_) {
      const auto* text = std::get_if<std::string>(&piece);
      visit(text ? bytes_of(*text) : std::get<Bytes>(piece));
    }
  }

  std::string joined() const {
    std::string result;
    result.reserve(size_);
    for_each([&](Bytes bytes) { result += text_of(bytes); });
    return result;
  }

 private:
  std::string& tail() {
    if (pieces_.empty() || !std::holds_alternative<std::string>(pieces_.back())) {
      pieces_.emplace_back(std::string());
    }
    return std::get<std::string>(pieces_.back());
  }

  template <class Write>
  void write(const Write& write) {
    std::string& to = tail();
    const std::size_t before = to.size();
    protozero::pbf_writer writer(to);
    write(writer);
    size_ += to.size() - before;
  }

  void head(std::uint32_t number, std::size_t length) {
    std::string& to = tail();
    const std::size_t before = to.size();
    protozero::add_varint_to_buffer(&to, number << 3 | 2);
    protozero::add_varint_to_buffer(&to, length);
    size_ += to.size() - before;
  }

  std::vector<std::variant<std::string, Bytes>> pieces_;
  std::size_t size_ = 0;
};

/// A message in the order of its fields' numbers, some of which are known in advance.
class Ordered {
 public:
  explicit Ordered(std::vector<Field> known) : known_(std::move(known)) {
    std::ranges::stable_sort(known_, {}, &Field::number);
  }

  /// Where to add what has this number: after all that is known of lower ones.
  Pieces& at(std::uint32_t number) {
    for (; next_ < known_.size() && known_[next_].number < number; ++next_) {
      pieces_.add(known_[next_].encoded);
    }
    return pieces_;
  }

  Pieces finish() {
    at(std::numeric_limits<std::uint32_t>::max());
    return std::move(pieces_);
  }

 private:
  std::vector<Field> known_;
  std::size_t next_ = 0;
  Pieces pieces_;
};

}  // namespace concertina::onnx::detail
