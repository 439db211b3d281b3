// Planted errors: contractions changed in one of many ways, which the proofs must find, and right
// ones computed in several orders, which they must not. What is wrong is judged on its own: by the
// difference from a contraction in long double, against four times the rounding of the sums.
// SPDX-License-Identifier: Apache-2.0
#include <concertina/concertina.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <functional>
#include <iostream>
#include <limits>
#include <map>
#include <random>
#include <string>
#include <utility>
#include <vector>

namespace {

using namespace concertina;
using Kernel = Conv2d<float>;
using Layers = std::vector<Kernel>;
using Rng = std::mt19937_64;

std::size_t pick(Rng& rng, std::size_t count) { return rng() % count; }

// ---- expressions -------------------------------------------------------------------------------

/// Chains of two to four layers, strided, dilated, grouped, depthwise, with biases and without.
std::vector<Form<2>> forms() {
  const ConvShape<2> first{.out = 4, .in = 3, .kernel_size = 3, .padding = 1},
      point{.out = 4, .in = 4}, last{.out = 3, .in = 4};
  std::vector<Form<2>> result;
  const auto add = [&](std::vector<ConvShape<2>> shapes) { result.emplace_back(shapes); };
  for (const bool bias : {false, true}) {
    auto f = first, p = point, l = last;
    f.bias = p.bias = l.bias = bias;
    auto strided = f, dilated = f, rectangular = f, unpadded = f;
    strided.stride = 2;
    dilated.dilation = 2;
    rectangular.kernel_size = {1, 3};
    rectangular.padding = {0, 1};
    unpadded.padding = 0;
    auto grouped = p, depthwise = p, wide = p, spatial = l;
    grouped.groups = 2;
    depthwise.groups = 4;
    depthwise.kernel_size = 2;
    wide.out = 8;
    auto after_wide = l;
    after_wide.in = 8;
    spatial.kernel_size = 3;
    for (const auto& start : {f, strided, dilated, rectangular, unpadded}) {
      add({start, p, l});
      add({start, grouped, l});
      add({start, p, p, l});
    }
    add({f, l});
    add({f, depthwise, l});
    add({unpadded, wide, after_wide});
    add({unpadded, spatial});
    add({unpadded, depthwise, spatial});
  }
  return result;
}

constexpr int scales = 5;
constexpr const char* scale_names[scales] = {"one", "2^73 2^-73", "2^-12", "2^60 first",
                                             "dead channel"};

Layers layers_of(const Form<2>& form, int scale, Rng& rng) {
  Layers layers = initialize<float>(form.leaves(), rng);
  for (std::size_t i = 0; i < layers.size(); ++i) {
    const bool even = i % 2 == 0;
    if (scale == 1) layers[i] = (even ? 0x1p73F : 0x1p-73F) * layers[i];
    if (scale == 2) layers[i] = 0x1p-12F * layers[i];
    if (scale == 3 && i == 0) layers[i] = 0x1p60F * layers[i];
  }
  if (scale == 4) {  // output channel 3 of the first layer is huge, and read by none
    const auto row = layers[0].weight().size() / static_cast<std::size_t>(layers[0].shape().out);
    std::ranges::fill(layers[0].weight().subspan(3 * row, row), 1e25F);
    const ConvShape<2>& next = layers[1].shape();
    const Index width = next.in / next.groups, taps = numel(next.kernel_size);
    for (Index o = 0; o < next.out; ++o) {
      if (o / (next.out / next.groups) != 3 / width) continue;
      const auto at = static_cast<std::size_t>((o * width + 3 % width) * taps);
      std::ranges::fill(layers[1].weight().subspan(at, static_cast<std::size_t>(taps)), 0.0F);
    }
  }
  return layers;
}

// ---- errors ------------------------------------------------------------------------------------

struct Mutant {
  Kernel layer;
  bool applies = true;
};

std::size_t row_of(const Kernel& f) {
  return f.weight().size() / static_cast<std::size_t>(f.shape().out);
}
std::size_t taps_of(const Kernel& f) {
  return static_cast<std::size_t>(numel(f.shape().kernel_size));
}

float largest(std::span<const float> numbers) {
  float most = 0;
  for (const float number : numbers) most = std::max(most, std::abs(number));
  return most;
}

/// Elements moved: to[i] = from[source(o, c, y, x)].
template <class Source>
Mutant permuted(const Kernel& f, Source&& source) {
  Mutant result{f};
  const ConvShape<2>& shape = f.shape();
  const Index width = shape.in / shape.groups;
  const PerAxis<2>& k = shape.kernel_size;
  std::size_t to = 0;
  for (Index o = 0; o < shape.out; ++o) {
    for (Index c = 0; c < width; ++c) {
      for (Index y = 0; y < k[0]; ++y) {
        for (Index x = 0; x < k[1]; ++x) {
          const std::array<Index, 4> at = source(o, c, y, x);
          const Index from = ((at[0] * width + at[1]) * k[0] + at[2]) * k[1] + at[3];
          result.layer.weight()[to++] = f.weight()[static_cast<std::size_t>(from)];
        }
      }
    }
  }
  return result;
}

/// The same elements under another shape.
template <class Change>
Mutant reshaped(const Kernel& f, Change&& change) {
  ConvShape<2> shape = f.shape();
  change(shape);
  return {Kernel(ConvView<const float, 2>(shape, f.weight(), f.bias()))};
}

using Change = std::function<Mutant(const Kernel&, const Layers&, Rng&)>;

std::vector<std::pair<std::string, Change>> kinds() {
  std::vector<std::pair<std::string, Change>> all;
  const auto add = [&](const char* name, Change change) {
    all.emplace_back(name, std::move(change));
  };
  // Of a span of the weight or the bias.
  const auto each = [&](const char* name, auto&& where, auto&& what) {
    add(name, [=](const Kernel& f, const Layers&, Rng& rng) {
      Mutant result{f};
      const std::span<float> numbers = where(result.layer, rng);
      result.applies = !numbers.empty();
      for (float& number : numbers) number = what(number, result.layer);
      return result;
    });
  };
  const auto everything = [](Kernel& f, Rng&) { return f.weight(); };
  const auto one = [](Kernel& f, Rng& rng) {
    return f.weight().subspan(pick(rng, f.weight().size()), 1);
  };
  const auto row = [](Kernel& f, Rng& rng) {
    return f.weight().subspan(pick(rng, static_cast<std::size_t>(f.shape().out)) * row_of(f),
                              row_of(f));
  };
  const auto kernel = [](Kernel& f, Rng& rng) {
    return f.weight().subspan(pick(rng, f.weight().size() / taps_of(f)) * taps_of(f), taps_of(f));
  };
  const auto bias = [](Kernel& f, Rng&) { return f.bias(); };
  const auto one_bias = [](Kernel& f, Rng& rng) {
    return f.bias().empty() ? f.bias() : f.bias().subspan(pick(rng, f.bias().size()), 1);
  };
  const auto negate = [](float x, const Kernel&) { return -x; };
  const auto zero = [](float, const Kernel&) { return 0.0F; };
  const auto twice = [](float x, const Kernel&) { return 2 * x; };
  const auto percent = [](float x, const Kernel&) { return 1.01F * x; };
  const auto little = [](float x, const Kernel&) { return x * (1 + 0x1p-9F); };
  const auto shift = [](float x, const Kernel& f) { return x + largest(f.weight()) / 64; };
  const auto nan = [](float, const Kernel&) { return std::numeric_limits<float>::quiet_NaN(); };
  const auto infinite = [](float, const Kernel&) { return std::numeric_limits<float>::infinity(); };
  const auto half = [](float x, const Kernel&) { return static_cast<float>(Eigen::bfloat16(x)); };
  const auto absolute = [](float x, const Kernel&) { return std::abs(x); };
  each("negated", everything, negate);
  each("one negated", one, negate);
  each("row negated", row, negate);
  each("kernel negated", kernel, negate);
  each("zeroed", everything, zero);
  each("one zeroed", one, zero);
  each("row zeroed", row, zero);
  each("kernel zeroed", kernel, zero);
  each("doubled", everything, twice);
  each("one doubled", one, twice);
  each("row doubled", row, twice);
  each("a percent more", everything, percent);
  each("one a percent more", one, percent);
  each("row a percent more", row, percent);
  each("kernel a percent more", kernel, percent);
  each("2^-9 more", everything, little);
  each("one 2^-9 more", one, little);
  each("shifted", everything, shift);
  each("one shifted", one, shift);
  each("row shifted", row, shift);
  each("one NaN", one, nan);
  each("one infinite", one, infinite);
  each("rounded to bfloat16", everything, half);
  each("absolute", everything, absolute);
  each("bias negated", bias, negate);
  each("bias zeroed", bias, zero);
  each("bias doubled", bias, twice);
  each("bias a percent more", bias, percent);
  each("one bias negated", one_bias, negate);
  each("one bias zeroed", one_bias, zero);
  each("one bias NaN", one_bias, nan);

  const auto moved = [&](const char* name, auto&& source) {
    add(name, [=](const Kernel& f, const Layers&, Rng&) {
      const ConvShape<2>& s = f.shape();
      return permuted(f, [&](Index o, Index c, Index y, Index x) { return source(s, o, c, y, x); });
    });
  };
  using At = std::array<Index, 4>;
  using S = const ConvShape<2>&;
  moved("flipped in x", [](S s, Index o, Index c, Index y, Index x) {
    return At{o, c, y, s.kernel_size[1] - 1 - x};
  });
  moved("flipped in y", [](S s, Index o, Index c, Index y, Index x) {
    return At{o, c, s.kernel_size[0] - 1 - y, x};
  });
  moved("rotated", [](S s, Index o, Index c, Index y, Index x) {
    return At{o, c, s.kernel_size[0] - 1 - y, s.kernel_size[1] - 1 - x};
  });
  moved("taps transposed", [](S s, Index o, Index c, Index y, Index x) {
    return s.kernel_size[0] == s.kernel_size[1] ? At{o, c, x, y} : At{o, c, y, x};
  });
  moved("taps moved in x", [](S s, Index o, Index c, Index y, Index x) {
    return At{o, c, y, (x + 1) % s.kernel_size[1]};
  });
  moved("taps moved in y", [](S s, Index o, Index c, Index y, Index x) {
    return At{o, c, (y + 1) % s.kernel_size[0], x};
  });
  moved("outputs rotated",
        [](S s, Index o, Index c, Index y, Index x) { return At{(o + 1) % s.out, c, y, x}; });
  moved("outputs swapped",
        [](S, Index o, Index c, Index y, Index x) { return At{o < 2 ? 1 - o : o, c, y, x}; });
  moved("output copied",
        [](S, Index o, Index c, Index y, Index x) { return At{o == 0 ? 1 : o, c, y, x}; });
  moved("inputs reversed", [](S s, Index o, Index c, Index y, Index x) {
    return At{o, s.in / s.groups - 1 - c, y, x};
  });
  moved("input copied", [](S, Index o, Index, Index y, Index x) { return At{o, 0, y, x}; });
  moved("channels transposed", [](S s, Index o, Index c, Index y, Index x) {
    return s.in == s.out && s.groups == 1 ? At{c, o, y, x} : At{o, c, y, x};
  });

  const auto of_shape = [&](const char* name, auto&& change) {
    add(name, [=](const Kernel& f, const Layers&, Rng&) { return reshaped(f, change); });
  };
  of_shape("stride 3", [](ConvShape<2>& s) { s.stride = 3; });
  of_shape("padding moved", [](ConvShape<2>& s) { ++s.padding.start[0], --s.padding.end[0]; });
  of_shape("padding one more", [](ConvShape<2>& s) { ++s.padding.end[1]; });
  of_shape("dilated", [](ConvShape<2>& s) { ++s.dilation[0], ++s.dilation[1]; });

  // Contractions of other layers.
  const auto remade = [&](const char* name, auto&& change) {
    add(name, [=](const Kernel&, const Layers& layers, Rng& rng) {
      Layers others = layers;
      change(others, rng);
      return Mutant{contract(others, interior_only)};
    });
  };
  remade("first layer negated", [](Layers& l, Rng&) { l[0] = -1 * l[0]; });
  remade("last layer a percent more", [](Layers& l, Rng&) { l.back() = 1.01F * l.back(); });
  remade("an element of a layer doubled",
         [](Layers& l, Rng& rng) { l.back().weight()[pick(rng, l.back().weight().size())] *= 2; });
  remade("a layer's bias forgotten", [](Layers& l, Rng&) { std::ranges::fill(l[0].bias(), 0.0F); });
  remade("a layer's bias counted twice", [](Layers& l, Rng&) {
    for (float& b : l.back().bias()) b *= 2;
  });
  remade("a layer twice", [](Layers& l, Rng&) {
    if (l[1].shape().in == l[1].shape().out) l.insert(l.begin() + 1, l[1]);
  });
  remade("a layer left out", [](Layers& l, Rng&) {
    if (l[1].shape().in == l[1].shape().out && l.size() > 2) l.erase(l.begin() + 1);
  });
  return all;
}

// ---- the judge ---------------------------------------------------------------------------------

/// Elements in long double: the exact ones, and what sums of float are off by, four times.
class Judge {
 public:
  explicit Judge(const Layers& layers) {
    std::vector<Conv2d<long double>> wide, sizes;
    Index sums = 0;
    for (const Kernel& layer : layers) {
      wide.push_back(layer.cast<long double>());
      sizes.push_back(wide.back());
      for (long double& x : sizes.back().weight()) x = std::abs(x);
      for (long double& x : sizes.back().bias()) x = std::abs(x);
      sums += layer.shape().in / layer.shape().groups * numel(layer.shape().kernel_size) + 1;
    }
    exact_ = contract(wide, interior_only);
    size_ = contract(sizes, interior_only);
    most_ = 4 * 2 * static_cast<long double>(sums) * 0x1p-24L;
  }

  /// Requires  a contraction of these layers, or something else
  bool is_wrong(const Kernel& f) const {
    if (f.shape() != exact_.shape()) return true;
    return differ(f.weight(), exact_.weight(), size_.weight()) ||
           differ(f.bias(), exact_.bias(), size_.bias());
  }

 private:
  bool differ(std::span<const float> f, std::span<const long double> exact,
              std::span<const long double> size) const {
    for (std::size_t i = 0; i < f.size(); ++i) {
      if (!(std::abs(static_cast<long double>(f[i]) - exact[i]) <= most_ * size[i])) return true;
    }
    return false;
  }

  Conv2d<long double> exact_{ConvShape<2>{.out = 1, .in = 1}}, size_ = exact_;
  long double most_ = 0;
};

struct Tally {
  std::size_t wrong = 0, accepted = 0, within = 0, right = 0, refused = 0;
};

}  // namespace

int main() try {
  const auto changes = kinds();
  const auto all = forms();
  Tally tally;
  std::map<std::string, std::size_t> tried;
  const auto complain = [](const char* what, const std::string& kind, const Form<2>& form,
                           int scale, const auto& found) {
    std::cout << what << ": " << kind << ", scale " << scale_names[scale] << ", " << to_string(form)
              << '\n'
              << found;
  };
  for (std::size_t n = 0; n < all.size(); ++n) {
    const Form<2>& form = all[n];
    for (int scale = 0; scale < scales; ++scale) {
      Rng rng(100 * n + static_cast<std::size_t>(scale));
      const Layers layers = layers_of(form, scale, rng);
      const Judge judge(layers);
      const Kernel contracted = contract(layers, interior_only);

      // The same in other orders, in double, and with zeros around it.
      Kernel forwards = layers.front(), backwards = layers.back();
      for (std::size_t i = 1; i < layers.size(); ++i) {
        forwards = contract(layers[i] * forwards, interior_only);
        backwards = contract(backwards * layers[layers.size() - 1 - i], interior_only);
      }
      const std::pair<const char*, Kernel> rights[] = {
          {"contracted", contracted},
          {"forwards", forwards},
          {"backwards", backwards},
          {"in double", contract<double>(layers, interior_only)}};
      for (const auto& [kind, layer] : rights) {
        for (const std::uint64_t seed : {1, 2, 3}) {
          ++tally.right;
          const Verification found = verify(layers, layer, seed);
          if (found) continue;
          ++tally.refused;
          complain("REFUSED", kind, form, scale, found);
        }
      }
      for (const auto& [kind, change] : changes) {
        const Mutant mutant = change(contracted, layers, rng);
        if (!mutant.applies) continue;
        if (!judge.is_wrong(mutant.layer)) {
          ++tally.within;
          continue;
        }
        ++tally.wrong;
        ++tried[kind];
        const Verification found = verify(layers, mutant.layer);
        if (!found) continue;
        ++tally.accepted;
        complain("ACCEPTED", kind, form, scale, found);
      }
    }
  }
  std::cout << tried.size() << " kinds of errors on " << all.size() << " expressions at " << scales
            << " scales: wrong accepted " << tally.accepted << " of " << tally.wrong << " ("
            << tally.within
            << " more were no errors, or within four times the bound), right refused "
            << tally.refused << " of " << tally.right << '\n';
  return tally.accepted + tally.refused == 0 ? 0 : 1;
} catch (const std::exception& error) {
  std::cerr << "mutations: " << error.what() << '\n';
  return 2;
}
