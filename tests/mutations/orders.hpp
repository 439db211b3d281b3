// Contractions in plain loops from the definition, in any order and scalar: what is right in every
// one of them, and in long double what errors are judged by.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "expressions.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

namespace concertina::mutations {

/// Which neighbours of a chain are multiplied next, and how the terms of an element are summed.
struct Order {
  enum Chain { from_the_left, from_the_right, anywhere } chain = from_the_left;
  enum Terms { forwards, backwards, shuffled, largest_first, smallest_first } terms = forwards;
  enum Sum { one_by_one, fused, pairwise } sum = one_by_one;
};

/// Where an element of the matrix stands: its output, its input or -1 for the bias, its offset.
using Place = std::array<std::int16_t, 5>;
inline Place place(Index o, Index c, const PerAxis<3>& offset) {
  const auto narrow = [](Index i) { return static_cast<std::int16_t>(i); };
  return {narrow(o), narrow(c), narrow(offset[0]), narrow(offset[1]), narrow(offset[2])};
}
inline Place bias_place(Index o) { return place(o, -1, 0); }

/// A layer without zeros: elements in ascending order of their places.
template <class C>
struct Elements {
  PerAxis<3> stride = 1;
  std::vector<std::pair<Place, C>> list = {};
};

/// Calls visit(place, element) for each element of a layer.
template <class L, class Visit>
void for_each_element(L& layer, Visit&& visit) {
  const Shape& shape = layer.shape();
  const Index in = shape.in / shape.groups, out = shape.out / shape.groups;
  auto weight = layer.weight().begin();
  for (Index o = 0; o < shape.out; ++o) {
    if (shape.bias) visit(bias_place(o), layer.bias()[static_cast<std::size_t>(o)]);
    for (Index c = o / out * in; c < (o / out + 1) * in; ++c) {
      detail::for_each_position(shape.kernel_size, [&](PerAxis<3> tap) {
        for (int axis = 0; axis < 3; ++axis) {
          tap[axis] = tap[axis] * shape.dilation[axis] - shape.padding.start[axis];
        }
        visit(place(o, c, tap), *weight++);
      });
    }
  }
}

template <class C>
class Contractor {
 public:
  /// Of the elements, or of their absolute values.
  Contractor(const Order& order, bool absolute, Rng& rng)
      : order_(order), absolute_(absolute), rng_(rng) {}

  Elements<C> operator()(const Tree& tree) {
    if (tree.is_leaf()) return leaf(tree.leaf());
    std::vector<Elements<C>> parts;
    for (const Tree& part : tree.parts()) parts.push_back((*this)(part));
    if (tree.join() != Join::chain) return joined(tree, parts);
    while (parts.size() > 1) {
      const std::size_t last = parts.size() - 2, inner = order_.chain == Order::from_the_left ? 0
                                                         : order_.chain == Order::from_the_right
                                                             ? last
                                                             : pick(rng_, last + 1);
      parts[inner] = product(parts[inner + 1], parts[inner]);
      parts.erase(parts.begin() + static_cast<std::ptrdiff_t>(inner) + 1);
    }
    return parts.front();
  }

 private:
  struct Term {
    Place place;
    C a, b;
    double rank = 0;
  };

  C kept(C number) const { return absolute_ ? std::abs(number) : number; }

  Elements<C> leaf(const Leaf& leaf) const {
    Elements<C> result{.stride = leaf.shape().stride};
    const auto add = [&](const Place& place, double number) {
      if (number != 0) result.list.emplace_back(place, kept(static_cast<C>(number)));
    };
    if (leaf.view()) {
      for_each_element(*leaf.view(), add);
      std::ranges::sort(result.list, {}, &std::pair<Place, C>::first);
      return result;
    }
    const ChannelMap<double>& map = *leaf.channel_map();
    const auto or_else = [](const std::vector<double>& list, Index o, int otherwise) {
      return static_cast<C>(list.empty() ? otherwise : list[static_cast<std::size_t>(o)]);
    };
    for (Index o = 0; o < map.out; ++o) {
      const Index c = map.source.empty() ? o : map.source[static_cast<std::size_t>(o)];
      C factor = or_else(map.weight, o, 1);
      if (!map.variance.empty()) {
        factor /= std::sqrt(or_else(map.variance, o, 1) + static_cast<C>(map.eps));
      }
      factor /= static_cast<C>(map.divisor);
      const C mean = or_else(map.mean, o, 0) * factor;
      result.list.emplace_back(bias_place(o), kept(or_else(map.bias, o, 0)) + kept(-mean));
      result.list.emplace_back(place(o, c, 0), kept(factor));
    }
    return result;
  }

  Elements<C> joined(const Tree& tree, const std::vector<Elements<C>>& parts) {
    std::vector<Term> terms;
    Index out = 0, in = 0;
    for (std::size_t p = 0; p < parts.size(); ++p) {
      for (const auto& [at, element] : parts[p].list) {
        const Index c = at[1] < 0 ? -1 : in + at[1];
        terms.push_back({place(out + at[0], c, {at[2], at[3], at[4]}), element, C(1)});
      }
      const auto& [own_in, own_out] = tree.parts()[p].channels();
      const Join join = tree.join();
      if (join == Join::concat_inputs || join == Join::direct_sum) in += own_in;
      if (join == Join::concat_outputs || join == Join::direct_sum) out += own_out;
    }
    return {parts.front().stride, summed(std::move(terms))};
  }

  Elements<C> product(const Elements<C>& outer, const Elements<C>& inner) {
    std::vector<Term> terms;
    PerAxis<3> stride;
    for (int axis = 0; axis < 3; ++axis) stride[axis] = outer.stride[axis] * inner.stride[axis];
    for (const auto& [at, w] : outer.list) {
      if (at[1] < 0) terms.push_back({at, w, C(1)});
      const auto row = std::ranges::equal_range(
          inner.list, at[1], {}, [](const auto& element) { return element.first[0]; });
      for (const auto& [from, element] : row) {
        PerAxis<3> offset = 0;
        for (int axis = 0; axis < 3 && from[1] >= 0; ++axis) {
          const auto i = static_cast<std::size_t>(axis) + 2;
          offset[axis] = at[i] * inner.stride[axis] + from[i];
        }
        terms.push_back({place(at[0], from[1], offset), w, element});
      }
    }
    return {stride, summed(std::move(terms))};
  }

  std::vector<std::pair<Place, C>> summed(std::vector<Term> terms) {
    for (std::size_t i = 0; i < terms.size(); ++i) {
      const auto size = static_cast<double>(std::abs(terms[i].a * terms[i].b));
      const double ranks[] = {static_cast<double>(i), -static_cast<double>(i),
                              static_cast<double>(rng_() >> 11), -size, size};
      terms[i].rank = ranks[order_.terms];
    }
    std::ranges::sort(terms, [](const Term& f, const Term& g) {
      return f.place == g.place ? f.rank < g.rank : f.place < g.place;
    });
    std::vector<std::pair<Place, C>> result;
    for (auto from = terms.begin(); from != terms.end();) {
      const auto to = std::ranges::find_if(
          from, terms.end(), [&](const Term& term) { return term.place != from->place; });
      result.emplace_back(from->place, sum({from, to}));
      from = to;
    }
    return result;
  }

  C sum(std::span<const Term> terms) const {
    if (order_.sum == Order::pairwise && terms.size() > 1) {
      return sum(terms.first(terms.size() / 2)) + sum(terms.subspan(terms.size() / 2));
    }
    C total = 0;
    for (const auto& [at, a, b, rank] : terms) {
      total = order_.sum == Order::fused ? std::fma(a, b, total) : total + a * b;
    }
    return total;
  }

  Order order_;
  bool absolute_;
  Rng& rng_;
};

/// The contraction as a layer of this shape, computed in C and not rounded to the layers' scalar.
template <class C>
Kernel in_order(const Expression& expression, const Shape& shape, const Order& order, Rng& rng) {
  const Elements<C> elements = Contractor<C>(order, false, rng)(expression.tree());
  Kernel layer(shape);
  for_each_element(layer, [&](const Place& at, double& number) {
    const auto found = std::ranges::lower_bound(elements.list, at, {}, &std::pair<Place, C>::first);
    if (found != elements.list.end() && found->first == at) {
      number = static_cast<double>(found->second);
    }
  });
  return layer;
}

}  // namespace concertina::mutations
