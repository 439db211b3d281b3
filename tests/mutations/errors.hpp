// The errors that are planted: elements changed or moved, other shapes, contractions of other
// layers.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "expressions.hpp"
#include "orders.hpp"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace concertina::mutations {

struct Given {
  const Kernel& right;
  const Expression& expression;
  int rank;
};
using Change = std::function<std::optional<Kernel>(const Given&, Rng&)>;

inline std::size_t taps_of(const Kernel& f) {
  return static_cast<std::size_t>(numel(f.shape().kernel_size));
}

/// A part of a tree's, wherever it stands, and those beside it.
inline Tree edited(const Tree& tree, Rng& rng,
                   const std::function<void(std::vector<Tree>&, std::size_t)>& edit) {
  std::vector<Tree> parts = tree.parts();
  if (parts.empty()) return tree;
  const std::size_t p = pick(rng, parts.size());
  if (!parts[p].is_leaf() && pick(rng, 2) == 0) {
    parts[p] = edited(parts[p], rng, edit);
  } else {
    edit(parts, p);
  }
  return {tree.join(), parts};
}

inline std::vector<std::pair<std::string, Change>> kinds() {
  std::vector<std::pair<std::string, Change>> all;

  // Elements.
  using Span = std::span<double>;
  const auto one = [](Span numbers, Rng& rng, std::size_t size = 1) {
    return numbers.empty() ? numbers
                           : numbers.subspan(pick(rng, numbers.size() / size) * size, size);
  };
  const std::pair<const char*, std::function<Span(Kernel&, Rng&)>> places[] = {
      {"weight", [](Kernel& f, Rng&) { return f.weight(); }},
      {"element", [=](Kernel& f, Rng& rng) { return one(f.weight(), rng); }},
      {"kernel", [=](Kernel& f, Rng& rng) { return one(f.weight(), rng, taps_of(f)); }},
      {"row",
       [=](Kernel& f, Rng& rng) {
         return one(f.weight(), rng, f.weight().size() / static_cast<std::size_t>(f.shape().out));
       }},
      {"bias", [](Kernel& f, Rng&) { return f.bias(); }},
      {"element of the bias", [=](Kernel& f, Rng& rng) { return one(f.bias(), rng); }}};
  const std::pair<const char*, double (*)(double x, double largest)> changes[] = {
      {"negated", [](double x, double) { return -x; }},
      {"zeroed", [](double, double) { return 0.0; }},
      {"doubled", [](double x, double) { return 2 * x; }},
      {"a percent more", [](double x, double) { return 1.01 * x; }},
      {"2^-9 more", [](double x, double) { return x * (1 + 0x1p-9); }},
      {"shifted", [](double x, double largest) { return x + largest / 64; }},
      {"absolute", [](double x, double) { return std::abs(x); }},
      {"in bfloat16",
       [](double x, double) { return static_cast<double>(convert<Eigen::bfloat16>(x)); }},
      {"NaN", [](double, double) { return std::numeric_limits<double>::quiet_NaN(); }},
      {"infinite", [](double, double) { return std::numeric_limits<double>::infinity(); }}};
  for (const auto& [place, where] : places) {
    for (const auto& [name, what] : changes) {
      all.emplace_back(std::string(place) + " " + name, [=](const Given& given, Rng& rng) {
        Kernel result = given.right;
        const Span numbers = where(result, rng);
        double largest = 0;
        for (const double x : numbers) largest = std::max(largest, std::abs(x));
        for (double& x : numbers) x = what(x, largest);
        return numbers.empty() ? std::nullopt : std::optional(result);
      });
    }
  }

  // Elements in the wrong place.
  struct From {
    Index o, c;
    PerAxis<3> tap;
  };
  const auto moved = [&](const char* name, auto source) {
    all.emplace_back(name, [=](const Given& given, Rng&) {
      const Shape& s = given.right.shape();
      const Index width = s.in / s.groups;
      Kernel result = given.right;
      auto to = result.weight().begin();
      for (Index o = 0; o < s.out; ++o) {
        for (Index c = 0; c < width; ++c) {
          detail::for_each_position(s.kernel_size, [&](const PerAxis<3>& tap) {
            From from{o, c, tap};
            source(s, from);
            const Index at = (from.o * width + from.c) * numel(s.kernel_size) +
                             detail::flat(from.tap, s.kernel_size);
            *to++ = given.right.weight()[static_cast<std::size_t>(at)];
          });
        }
      }
      return std::optional(result);
    });
  };
  using S = const Shape&;
  const auto flip = [](S s, From& f, int axis) {
    f.tap[axis] = s.kernel_size[axis] - 1 - f.tap[axis];
  };
  moved("flipped along the first axis", [=](S s, From& f) { flip(s, f, 0); });
  moved("flipped along the second axis", [=](S s, From& f) { flip(s, f, 1); });
  moved("rotated", [=](S s, From& f) { flip(s, f, 0), flip(s, f, 1), flip(s, f, 2); });
  moved("taps transposed", [](S s, From& f) {
    if (s.kernel_size[0] == s.kernel_size[1]) std::swap(f.tap[0], f.tap[1]);
  });
  moved("taps moved along the first axis",
        [](S s, From& f) { f.tap[0] = (f.tap[0] + 1) % s.kernel_size[0]; });
  moved("taps moved along the last axis",
        [](S s, From& f) { f.tap[2] = (f.tap[2] + 1) % s.kernel_size[2]; });
  moved("outputs rotated", [](S s, From& f) { f.o = (f.o + 1) % s.out; });
  moved("outputs swapped", [](S, From& f) { f.o = f.o < 2 ? 1 - f.o : f.o; });
  moved("output copied", [](S, From& f) { f.o = std::max<Index>(f.o, 1); });
  moved("inputs reversed", [](S s, From& f) { f.c = s.in / s.groups - 1 - f.c; });
  moved("input copied", [](S, From& f) { f.c = 0; });
  moved("channels transposed", [](S s, From& f) {
    if (s.in == s.out && s.groups == 1) std::swap(f.o, f.c);
  });

  // The same elements under another shape.
  const auto of_shape = [&](const char* name, auto change) {
    all.emplace_back(name, [=](const Given& given, Rng&) {
      Shape shape = given.right.shape();
      change(shape);
      shape = fit(shape, given.rank);
      const Kernel result(
          ConvView<const double, 3>(shape, given.right.weight(), given.right.bias()));
      return shape == given.right.shape() ? std::nullopt : std::optional(result);
    });
  };
  of_shape("stride 3", [](Shape& s) { s.stride = 3; });
  of_shape("padding moved", [](Shape& s) { ++s.padding.start[0], --s.padding.end[0]; });
  of_shape("padding one more", [](Shape& s) { ++s.padding.end[0]; });
  of_shape("dilated", [](Shape& s) { ++s.dilation[0], ++s.dilation[1]; });

  // Contractions of other layers.
  const auto remade = [&](const char* name, auto change) {
    all.emplace_back(name, [=](const Given& given, Rng& rng) -> std::optional<Kernel> {
      try {
        const Tree tree = change(given.expression.tree(), rng);
        const Shape shape = Form<3>(detail::form_of(tree)).shape();
        if (shape != given.right.shape()) return {};
        return in_order<double>(Expression(tree), shape, {}, rng);
      } catch (const ShapeError&) {
        return {};  // the channels do not fit
      }
    });
  };
  const auto one_layer = [&](const char* name, auto change) {
    remade(name, [=](const Tree& tree, Rng& rng) {
      std::size_t left = 0;
      tree.for_each_leaf([&](const Leaf&) { ++left; });
      left = pick(rng, left) + 1;
      return tree.map([&](const Leaf& leaf) {
        if (--left != 0) return leaf;
        Kernel layer = leaf.to<double>();
        change(layer, rng);
        return Leaf(std::move(layer));
      });
    });
  };
  one_layer("a layer negated", [](Kernel& f, Rng&) { f = f.scaled(-1); });
  one_layer("a layer a percent more", [](Kernel& f, Rng&) { f = f.scaled(1.01); });
  one_layer("an element of a layer doubled",
            [](Kernel& f, Rng& rng) { f.weight()[pick(rng, f.weight().size())] *= 2; });
  one_layer("a layer's bias forgotten", [](Kernel& f, Rng&) { std::ranges::fill(f.bias(), 0.0); });
  one_layer("a layer's bias counted twice", [](Kernel& f, Rng&) {
    for (double& x : f.bias()) x *= 2;
  });
  const auto one_norm = [&](const char* name, auto change) {
    remade(name, [=](const Tree& tree, Rng&) {
      return tree.map([&](const Leaf& leaf) {
        if (!leaf.channel_map()) return leaf;
        ChannelMap<double> map = *leaf.channel_map();
        change(map);
        return Leaf(map);
      });
    });
  };
  using Map = ChannelMap<double>;
  one_norm("means forgotten", [](Map& map) { std::ranges::fill(map.mean, 0.0); });
  one_norm("variances not rooted", [](Map& map) {
    for (double& x : map.variance) x *= x;
  });
  one_norm("divisors forgotten", [](Map& map) { map.divisor = 1; });
  const auto one_part = [&](const char* name, auto edit) {
    remade(name, [=](const Tree& tree, Rng& rng) { return edited(tree, rng, edit); });
  };
  using List = std::vector<Tree>;
  one_part("a part twice", [](List& parts, std::size_t p) {
    parts.insert(parts.begin() + static_cast<std::ptrdiff_t>(p), Tree(parts[p]));
  });
  one_part("a part left out", [](List& parts, std::size_t p) {
    if (parts.size() > 1) parts.erase(parts.begin() + static_cast<std::ptrdiff_t>(p));
  });
  one_part("parts swapped",
           [](List& parts, std::size_t p) { std::swap(parts[p], parts[(p + 1) % parts.size()]); });
  return all;
}

}  // namespace concertina::mutations
