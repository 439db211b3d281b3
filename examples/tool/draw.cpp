// SPDX-License-Identifier: Apache-2.0
#include "draw.hpp"

#include "text.hpp"

#include <algorithm>
#include <array>
#include <utility>
#include <vector>

namespace tool {

namespace {

using concertina::Join;

/// Part of a picture, drawn from its upper left corner on.
struct Box {
  double width = 0, height = 0;
  std::string svg = {};
};

std::string number(double value) { return fixed(value, 1); }

std::string escaped(const std::string& text) {
  std::string result;
  for (const char c : printable(text)) {
    if (c == '&') {
      result += "&amp;";
    } else if (c == '<') {
      result += "&lt;";
    } else if (c == '>') {  // "]]>" ends what has not begun
      result += "&gt;";
    } else {
      result += c;
    }
  }
  return result;
}

Box words(const std::string& text) {
  constexpr double em = 6.5, line = 15;  // at least as wide as the font is
  return {em * static_cast<double>(text.size()), line,
          "<text y=\"11\">" + escaped(text) + "</text>\n"};
}

void place(Box& picture, const Box& part, double x, double y) {
  picture.svg +=
      "<g transform=\"translate(" + number(x) + " " + number(y) + ")\">\n" + part.svg + "</g>\n";
  picture.width = std::max(picture.width, x + part.width);
  picture.height = std::max(picture.height, y + part.height);
}

/// Side by side, or one below the other, each in the middle.
Box line_up(const std::vector<Box>& parts, bool down) {
  double across = 0, at = 0;
  for (const Box& part : parts) across = std::max(across, down ? part.width : part.height);
  Box picture;
  for (const Box& part : parts) {
    const double middle = (across - (down ? part.width : part.height)) / 2;
    place(picture, part, down ? middle : at, down ? at : middle);
    at += (down ? part.height : part.width) + (down ? 4 : 12);
  }
  return picture;
}

/// A square for each tap, slices of a third axis side by side.
Box grid(const TapNorms& layer) {
  const Index columns = layer.kernel.back(), rows = layer.kernel[layer.kernel.size() - 2],
              slice = rows * columns;
  const double cell = std::clamp(160 / static_cast<double>(std::max(rows, columns)), 2.0, 16.0);
  const double largest = std::max(*std::ranges::max_element(layer.norms), 1e-300);
  Box picture;
  for (Index tap = 0; tap < std::ssize(layer.norms); ++tap) {
    const double norm = layer.norms[static_cast<std::size_t>(tap)];
    const auto x = static_cast<double>(tap / slice * (columns + 1) + tap % columns) * cell,
               y = static_cast<double>(tap % slice / columns) * cell;
    picture.svg += "<rect x=\"" + number(x) + "\" y=\"" + number(y) + "\" width=\"" + number(cell) +
                   "\" height=\"" + number(cell) + "\" fill-opacity=\"" + fixed(norm / largest, 3) +
                   "\"><title>" + brief(norm) + "</title></rect>\n";
    picture.width = std::max(picture.width, x + cell);
    picture.height = std::max(picture.height, y + cell);
  }
  return picture;
}

/// A layer with what it is below, in two lines; or its parts, joined.
Box draw(const TapNorms& taps) {
  if (taps.join == Join::none) {
    const std::size_t end = taps.layer.find(" @");
    std::vector<Box> lines = {grid(taps), words(taps.layer.substr(0, end))};
    if (end != std::string::npos) lines.push_back(words(taps.layer.substr(end + 1)));
    return line_up(lines, true);
  }
  const bool chain = taps.join == Join::chain;
  const std::string sign = chain                               ? "then"
                           : taps.join == Join::sum            ? "+"
                           : taps.join == Join::concat_outputs ? "|"
                                                               : "&";
  std::vector<Box> parts;
  for (const TapNorms& part : taps.parts) {
    if (!parts.empty()) parts.push_back(words(sign));
    parts.push_back(draw(part));
  }
  Box joined = line_up(parts, !chain), framed;
  if (chain) return joined;
  place(framed, joined, 8, 4);
  framed.width += 8;
  framed.height += 4;
  framed.svg += "<path d=\"M4 0H0V" + number(framed.height) + "H4M" + number(framed.width - 4) +
                " 0h4v" + number(framed.height) + "h-4\" fill=\"none\" stroke=\"#222\"/>\n";
  return framed;
}

std::size_t count_taps(const TapNorms& taps) {
  std::size_t count = taps.norms.size();
  for (const TapNorms& part : taps.parts) count += count_taps(part);
  return count;
}

}  // namespace

std::string draw_taps(const ContractedModel& contracted) {
  if (contracted.regions.empty())
    throw UsageError("--svg: nothing is contracted, so nothing is to see");
  std::size_t count = 0;
  for (const ContractedRegion& region : contracted.regions) {
    if (region.taps_after.norms.empty()) {
      throw UsageError("--svg: the region that makes " + in_quotes(region.result) +
                       " has transposed layers, which are not drawn; name others with --only");
    }
    count += count_taps(region.taps_before) + count_taps(region.taps_after);
  }
  constexpr std::size_t most = 50'000;
  if (count > most) {
    throw UsageError("--svg: a picture of " + grouped(static_cast<std::ptrdiff_t>(count)) +
                     " taps, more than " + grouped(most) +
                     "; name some of its regions with --only");
  }
  Box picture;
  for (const ContractedRegion& region : contracted.regions) {
    place(picture, words(region.source + " to " + region.result), 12, picture.height + 12);
    const std::array row = {draw(region.taps_before), words("="), draw(region.taps_after)};
    place(picture, line_up({row.begin(), row.end()}, false), 12, picture.height + 6);
  }
  const std::string width = number(picture.width + 12), height = number(picture.height + 12);
  return "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 " + width + " " + height +
         "\" width=\"" + width + "\" height=\"" + height +
         "\" font-family=\"sans-serif\" font-size=\"11\">\n"
         "<title>Taps before and after contraction</title>\n"
         "<style>rect{fill:#1f4e9c;stroke:#999;stroke-width:.5}text{fill:#222}</style>\n"
         "<path d=\"M0 0H" +
         width + "V" + height + "H0z\" fill=\"#fff\"/>\n" + picture.svg + "</svg>\n";
}

}  // namespace tool
