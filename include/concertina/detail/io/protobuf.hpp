// Protocol buffers: messages read field by field with distrust, and written in pieces, large ones
// not copied.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/detail/text.hpp>
#include <concertina/error.hpp>
#include <concertina/io/onnx.hpp>  // Field

#include <protozero/pbf_writer.hpp>
#include <protozero/types.hpp>
#include <protozero/varint.hpp>

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <limits>
#include <map>
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

  /// "model.onnx: byte 7"; without the byte where that is not in the file.
  std::string at(const char* place) const {
    const char* const begin = text_of(bytes).data();
    const std::less<const char*> before;
    if (before(place, begin) || before(begin + bytes.size(), place)) return name;
    return name + ": byte " + std::to_string(place - begin);
  }
};

/// A message, one field after another. next() takes a whole field; what it is, is asked with the
/// function of its type, which refuses any other.
class Message {
 public:
  /// `type` is the message's, for what is refused.
  Message(const Source& source, Bytes bytes, std::string_view type)
      : source_(&source),
        message_(type),
        at_(text_of(bytes).data()),
        end_(text_of(bytes).data() + bytes.size()) {}

  bool next() {
    begin_ = at_;
    if (at_ == end_) return false;
    const std::uint64_t tag = varint(at_, end_);
    number_ = static_cast<std::uint32_t>(tag >> 3);
    type_ = static_cast<WireType>(tag & 7);
    if (number_ == 0 || tag > std::numeric_limits<std::uint32_t>::max()) {
      refuse({"a field of number ", tag >> 3, ", expected 1 to 2^29 - 1"});
    }
    switch (type_) {
      case WireType::varint: value_ = varint(at_, end_); break;
      case WireType::fixed64: value_ = fixed(take(8)); break;
      case WireType::fixed32: value_ = fixed(take(4)); break;
      case WireType::length_delimited: bytes_ = take(varint(at_, end_)); break;
      default: refuse({"wire type ", tag & 7, ", expected 0, 1, 2 or 5"});
    }
    return true;
  }

  std::uint32_t number() const { return number_; }
  Bytes encoded() const { return bytes_of({begin_, at_}); }  // the whole field, with its tag

  Bytes bytes() const {
    expect(WireType::length_delimited);
    return bytes_;
  }
  std::string text() const { return std::string(text_of(bytes())); }
  std::int64_t integer() const {
    expect(WireType::varint);
    return static_cast<std::int64_t>(value_);
  }
  std::int32_t small_integer() const {
    const auto small = static_cast<std::int32_t>(integer());
    if (small != integer()) {
      refuse({"field ", number_, " of ", integer(), ", expected 32 bits"});
    }
    return small;
  }
  float real() const {
    expect(WireType::fixed32);
    return std::bit_cast<float>(static_cast<std::uint32_t>(value_));
  }

  /// visit(bits) with each number of a repeated field, packed or one alone.
  template <class Visit>
  void numbers(WireType type, const Visit& visit) const {
    if (type_ != WireType::length_delimited) {
      expect(type);
      return visit(value_);
    }
    const std::string_view packed = text_of(bytes_);
    const char *at = packed.data(), *const end = at + packed.size();
    const std::size_t width = type == WireType::fixed32 ? 4 : 8;
    if (type != WireType::varint && packed.size() % width != 0) {
      refuse({packed.size(), " bytes of packed numbers that take ", width, " each"});
    }
    while (at != end) {
      if (type == WireType::varint) {
        visit(varint(at, end));
      } else {
        visit(fixed(bytes_of({at, width})));
        at += width;
      }
    }
  }

  /// Throws FormatError naming file, offset, message type and what was found.
  [[noreturn]] void refuse(std::initializer_list<concertina::detail::Piece> found) const {
    fail<FormatError>(
        {source_->at(begin_), ": ", message_, " has ", concertina::detail::text(found)});
  }

 private:
  Bytes take(std::uint64_t size) {
    const auto left = static_cast<std::uint64_t>(end_ - at_);
    if (size > left) {
      refuse({"field ", number_, " of ", size, " bytes, but only ", left, " follow"});
    }
    const std::string_view taken(at_, size);
    at_ += size;
    return bytes_of(taken);
  }

  static std::uint64_t fixed(Bytes bytes) {
    std::uint64_t value = 0;
    std::memcpy(&value, bytes.data(), bytes.size());
    return value;
  }

  /// protozero would drop bits beyond the 64th.
  std::uint64_t varint(const char*& at, const char* end) const try {
    const char* const start = at;
    const std::uint64_t value = protozero::decode_varint(&at, end);
    if (at - start == protozero::max_varint_length && at[-1] > 1) {
      refuse({"a varint of more than 64 bits"});
    }
    return value;
  } catch (const protozero::varint_too_long_exception&) {
    refuse({"a varint of more than 10 bytes"});
  } catch (const protozero::end_of_buffer_exception&) {
    refuse({"a varint that is cut short"});
  }

  void expect(WireType type) const {
    if (type_ == type) return;
    refuse({"field ", number_, " of wire type ", static_cast<int>(type_), ", expected ",
            static_cast<int>(type)});
  }

  const Source* source_;
  std::string_view message_;
  const char *at_, *end_, *begin_ = nullptr;
  std::uint32_t number_ = 0;
  WireType type_ = WireType::unknown;
  std::uint64_t value_ = 0;
  Bytes bytes_;
};

/// A message to write: text of its own, and views of what is not copied.
class Pieces {
 public:
  std::size_t size() const { return size_; }

  void add(Bytes bytes) {
    constexpr std::size_t small = 512;  // where a copy costs less than a piece
    if (bytes.size() < small) {
      append([&](std::string& text) { text += text_of(bytes); });
    } else {
      pieces_.emplace_back(bytes);
      size_ += bytes.size();
    }
  }

  void bytes(std::uint32_t number, Bytes value) {
    head(number, value.size());
    add(value);
  }
  void text(std::uint32_t number, std::string_view value) { bytes(number, bytes_of(value)); }
  void integer(std::uint32_t number, std::int64_t value) {
    append([&](std::string& text) { protozero::pbf_writer(text).add_int64(number, value); });
  }
  void real(std::uint32_t number, float value) {
    append([&](std::string& text) { protozero::pbf_writer(text).add_float(number, value); });
  }
  void message(std::uint32_t number, Pieces&& value) {
    head(number, value.size());
    for (auto& piece : value.pieces_) {
      if (const auto* own = std::get_if<std::string>(&piece)) {
        append([&](std::string& text) { text += *own; });
      } else {
        add(std::get<Bytes>(piece));
      }
    }
  }

  template <class Visit>
  void for_each(const Visit& visit) const {
    for (const auto& piece : pieces_) {
      const auto* own = std::get_if<std::string>(&piece);
      visit(own ? bytes_of(*own) : std::get<Bytes>(piece));
    }
  }

  std::string joined() const {
    std::string result;
    for_each([&](Bytes bytes) { result += text_of(bytes); });
    return result;
  }

 private:
  template <class Write>
  void append(const Write& write) {
    if (pieces_.empty() || pieces_.back().index() != 0) pieces_.emplace_back(std::string());
    std::string& text = std::get<std::string>(pieces_.back());
    size_ -= text.size();
    write(text);
    size_ += text.size();
  }

  void head(std::uint32_t number, std::size_t length) {
    append([&](std::string& text) {
      protozero::add_varint_to_buffer(&text, number << 3 | 2);
      protozero::add_varint_to_buffer(&text, length);
    });
  }

  std::vector<std::variant<std::string, Bytes>> pieces_;
  std::size_t size_ = 0;
};

/// A message written in the order of its fields' numbers, some fields known in advance.
class Ordered {
 public:
  explicit Ordered(const std::vector<Field>& known) {
    for (const Field& field : known) known_.emplace(field.number, field.encoded);  // stable
    next_ = known_.begin();
  }
  Ordered(const Ordered&) = delete;

  /// Where to add what has this number: after all that is known of lower ones.
  Pieces& at(std::uint32_t number) {
    for (; next_ != known_.end() && next_->first < number; ++next_) pieces_.add(next_->second);
    return pieces_;
  }

  Pieces finish() {
    at(std::numeric_limits<std::uint32_t>::max());
    return std::move(pieces_);
  }

 private:
  std::multimap<std::uint32_t, Bytes> known_;
  std::multimap<std::uint32_t, Bytes>::const_iterator next_;
  Pieces pieces_;
};

}  // namespace concertina::onnx::detail
