// Expressions run layer by layer on a batch with their batch norms in training, forward and
// backward, in plain loops written from the definitions.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/expression.hpp>

#include <cmath>
#include <memory>
#include <vector>

namespace concertina::test {

/// Maps in T, [batch][channels][pixels].
template <class T, int Rank>
struct Maps {
  Index batch = 0, channels = 0;
  PerAxis<Rank> size;
  std::vector<T> values = {};

  Index pixels() const { return numel(size); }
  T& at(Index n, Index c, Index p) {
    return values[static_cast<std::size_t>((n * channels + c) * pixels() + p)];
  }
};

template <class T, int Rank>
Maps<T, Rank> zeros(Index batch, Index channels, const PerAxis<Rank>& size) {
  return {batch, channels, size,
          std::vector<T>(static_cast<std::size_t>(batch * channels * numel(size)))};
}

/// A layer in T, and its gradient; of a batch norm, weight and bias.
template <class T, int Rank>
struct Parameters {
  ConvShape<Rank> shape;
  std::vector<T> weight, bias, weight_gradient = {}, bias_gradient = {};
  bool fixed = false;  // gradients stay zero
};

template <class T, int Rank>
class Layered {
 public:
  /// `margins` of the batch norms, in the order of leaves.
  template <class Scalar>
  explicit Layered(const Expr<Scalar, Rank>& expression, std::vector<Padding<Rank>> margins = {})
      : margins_(std::move(margins)), root_(build(expression.tree())) {}

  Maps<T, Rank> forward(const Maps<T, Rank>& x) { return forward(*root_, x); }
  Maps<T, Rank> backward(const Maps<T, Rank>& gradient) { return backward(*root_, gradient); }

  /// After forward: everything without its sign, so that backward then sums the absolute values of
  /// the terms that make the gradients.
  void make_absolute() {
    make_absolute(*root_);
    for (Parameters<T, Rank>& leaf : leaves) make_absolute(leaf.weight);
    absolute_ = true;
  }

  std::vector<Parameters<T, Rank>> leaves;
  std::vector<std::vector<T>> means, variances;  // of each norm
  Index count = 0;                               // values of the last norm's channels
  Index additions = 0;                           // of a value to a sum, one after another, forward

 private:
  struct Node {
    Join join = Join::none;
    std::vector<std::unique_ptr<Node>> parts = {};
    std::size_t leaf = 0;
    bool is_norm = false;
    std::size_t norm = 0;
    T eps = 0;
    Maps<T, Rank> input = {}, normalised = {};  // as forward saw them
    std::vector<T> deviation = {};
  };

  static void make_absolute(std::vector<T>& values) {
    for (T& value : values) value = std::abs(value);
  }
  static void make_absolute(Node& node) {
    make_absolute(node.input.values);
    make_absolute(node.normalised.values);
    for (const auto& part : node.parts) make_absolute(*part);
  }

  template <class Scalar>
  std::unique_ptr<Node> build(const detail::Tree<detail::Leaf<Scalar, Rank>>& tree) {
    auto node = std::make_unique<Node>();
    node->join = tree.join();
    for (const auto& part : tree.parts()) node->parts.push_back(build(part));
    if (!tree.is_leaf()) return node;
    node->leaf = leaves.size();
    const auto* map = tree.leaf().channel_map();
    const auto wide = [](const auto& from) { return std::vector<T>(from.begin(), from.end()); };
    if (map && !map->variance.empty()) {
      node->is_norm = true;
      node->norm = means.size();
      node->eps = static_cast<T>(map->eps);
      means.emplace_back();
      variances.emplace_back();
      const auto channels = static_cast<std::size_t>(map->out);
      leaves.push_back({tree.leaf().shape(), wide(map->weight), wide(map->bias)});
      leaves.back().weight.resize(channels, T(1));
      leaves.back().bias.resize(channels, T(0));
      leaves.back().fixed = tree.leaf().fixed;
    } else {
      const auto layer = tree.leaf().template to<Scalar>();
      leaves.push_back({layer.shape(), wide(layer.weight()), wide(layer.bias())});
      leaves.back().fixed = tree.leaf().fixed;
    }
    return node;
  }

  /// Calls visit(output, pixel, weight) for every tap that reads the map.
  template <class Visit>
  static void for_each_read(const ConvShape<Rank>& shape, const PerAxis<Rank>& size,
                            const PerAxis<Rank>& positions, Visit&& visit) {
    const Index in = shape.in / shape.groups, out = shape.out / shape.groups;
    const Index taps = numel(shape.kernel_size);
    Index position = 0;
    detail::for_each_position(positions, [&](const PerAxis<Rank>& j) {
      Index tap = 0;
      detail::for_each_position(shape.kernel_size, [&](const PerAxis<Rank>& a) {
        Index pixel = 0;
        bool inside = true;
        for (int axis = 0; axis < Rank; ++axis) {
          const Index i = j[axis] * shape.stride[axis] - shape.padding.start[axis] +
                          a[axis] * shape.dilation[axis];
          inside = inside && i >= 0 && i < size[axis];
          pixel = pixel * size[axis] + i;
        }
        for (Index o = 0; inside && o < shape.out; ++o) {
          for (Index c = 0; c < in; ++c) {
            visit(o, position, o / out * in + c, pixel,
                  static_cast<std::size_t>((o * in + c) * taps + tap));
          }
        }
        ++tap;
      });
      ++position;
    });
  }

  /// Pixels over which a norm takes its statistics.
  std::vector<Index> window(const Node& node, const PerAxis<Rank>& size) const {
    const Padding<Rank> margin =
        node.norm < margins_.size() ? margins_[node.norm] : Padding<Rank>(0);
    std::vector<Index> result;
    Index pixel = 0;
    detail::for_each_position(size, [&](const PerAxis<Rank>& p) {
      bool inside = true;
      for (int axis = 0; axis < Rank; ++axis) {
        inside = inside && p[axis] >= margin.start[axis] && p[axis] < size[axis] - margin.end[axis];
      }
      if (inside) result.push_back(pixel);
      ++pixel;
    });
    return result;
  }

  Maps<T, Rank> normalise(Node& node, Maps<T, Rank> x) {
    const std::vector<Index> pixels = window(node, x.size);
    count = x.batch * std::ssize(pixels);
    additions += 2 * count;
    Maps<T, Rank> y = x;
    node.deviation.clear();
    means[node.norm].clear();
    variances[node.norm].clear();
    for (Index c = 0; c < x.channels; ++c) {
      T mean = 0, variance = 0;
      for (Index n = 0; n < x.batch; ++n) {
        for (const Index p : pixels) mean += x.at(n, c, p);
      }
      mean /= static_cast<T>(count);
      for (Index n = 0; n < x.batch; ++n) {
        for (const Index p : pixels) variance += (x.at(n, c, p) - mean) * (x.at(n, c, p) - mean);
      }
      variance /= static_cast<T>(count);
      means[node.norm].push_back(mean);
      variances[node.norm].push_back(variance);
      node.deviation.push_back(std::sqrt(variance + node.eps));
      const auto& [shape, weight, bias, wg, bg, rest] = leaves[node.leaf];
      const auto channel = static_cast<std::size_t>(c);
      for (Index n = 0; n < x.batch; ++n) {
        for (Index p = 0; p < x.pixels(); ++p) {
          x.at(n, c, p) = (x.at(n, c, p) - mean) / node.deviation.back();
          y.at(n, c, p) = x.at(n, c, p) * weight[channel] + bias[channel];
        }
      }
    }
    node.normalised = std::move(x);
    return y;
  }

  Maps<T, Rank> normalise_backward(Node& node, Maps<T, Rank> gradient) {
    Maps<T, Rank>& z = node.normalised;
    const std::vector<Index> pixels = window(node, z.size);
    Parameters<T, Rank>& leaf = leaves[node.leaf];
    leaf.weight_gradient.clear();
    leaf.bias_gradient.clear();
    for (Index c = 0; c < z.channels; ++c) {
      T sum = 0, product = 0;
      for (Index n = 0; n < z.batch; ++n) {
        for (Index p = 0; p < z.pixels(); ++p) {
          sum += gradient.at(n, c, p);
          product += gradient.at(n, c, p) * z.at(n, c, p);
        }
      }
      leaf.bias_gradient.push_back(leaf.fixed ? T(0) : sum);
      leaf.weight_gradient.push_back(leaf.fixed ? T(0) : product);
      const auto channel = static_cast<std::size_t>(c);
      const T factor = leaf.weight[channel] / node.deviation[channel];
      const auto values = static_cast<T>(z.batch * std::ssize(pixels));
      for (Index n = 0; n < z.batch; ++n) {
        std::size_t next = 0;  // statistics depend on the window alone, outputs everywhere
        for (Index p = 0; p < z.pixels(); ++p) {
          T less = 0;
          if (next < pixels.size() && pixels[next] == p) {
            less = (sum + z.at(n, c, p) * product) / values;
            ++next;
          }
          if (absolute_) less = -less;
          gradient.at(n, c, p) = factor * (gradient.at(n, c, p) - less);
        }
      }
    }
    return gradient;
  }

  static Maps<T, Rank> slice(Maps<T, Rank>& x, Index first, Index count) {
    Maps<T, Rank> result = zeros<T>(x.batch, count, x.size);
    for (Index n = 0; n < x.batch; ++n) {
      for (Index c = 0; c < count; ++c) {
        for (Index p = 0; p < x.pixels(); ++p) result.at(n, c, p) = x.at(n, first + c, p);
      }
    }
    return result;
  }
  static void add(Maps<T, Rank>& to, Index first, Maps<T, Rank>& from) {
    for (Index n = 0; n < from.batch; ++n) {
      for (Index c = 0; c < from.channels; ++c) {
        for (Index p = 0; p < from.pixels(); ++p) to.at(n, first + c, p) += from.at(n, c, p);
      }
    }
  }

  Maps<T, Rank> forward(Node& node, const Maps<T, Rank>& x) {
    node.input = x;
    if (node.is_norm) return normalise(node, x);
    if (node.join == Join::none) {
      const Parameters<T, Rank>& leaf = leaves[node.leaf];
      Maps<T, Rank> y = zeros<T>(x.batch, leaf.shape.out, output_size(leaf.shape, x.size));
      additions += std::ssize(leaf.weight) / leaf.shape.out;
      for (Index n = 0; n < x.batch; ++n) {
        for (Index o = 0; leaf.shape.bias && o < y.channels; ++o) {
          for (Index p = 0; p < y.pixels(); ++p) {
            y.at(n, o, p) = leaf.bias[static_cast<std::size_t>(o)];
          }
        }
        for_each_read(leaf.shape, x.size, y.size,
                      [&](Index o, Index j, Index c, Index p, std::size_t w) {
                        y.at(n, o, j) += leaf.weight[w] * node.input.at(n, c, p);
                      });
      }
      return y;
    }
    if (node.join == Join::chain) {
      Maps<T, Rank> y = x;
      for (const auto& part : node.parts) y = forward(*part, y);
      return y;
    }
    std::vector<Maps<T, Rank>> outputs;
    Index in = 0, out = 0;
    for (const auto& part : node.parts) {
      if (detail::splits_inputs(node.join)) {
        const Index width = inputs(*part);
        outputs.push_back(forward(*part, slice(node.input, in, width)));
        in += width;
      } else {
        outputs.push_back(forward(*part, x));
      }
      out = detail::splits_outputs(node.join) ? out + outputs.back().channels
                                              : outputs.back().channels;
    }
    Maps<T, Rank> y = zeros<T>(x.batch, out, outputs.front().size);
    Index first = 0;
    for (Maps<T, Rank>& each : outputs) {
      add(y, first, each);
      if (detail::splits_outputs(node.join)) first += each.channels;
    }
    return y;
  }

  Index inputs(const Node& node) const {
    if (node.join == Join::none) return leaves[node.leaf].shape.in;
    Index in = inputs(*node.parts.front());
    for (std::size_t p = 1; detail::splits_inputs(node.join) && p < node.parts.size(); ++p) {
      in += inputs(*node.parts[p]);
    }
    return in;
  }

  Index outputs(const Node& node) const {
    if (node.join == Join::none) return leaves[node.leaf].shape.out;
    Index out = outputs(node.join == Join::chain ? *node.parts.back() : *node.parts.front());
    for (std::size_t p = 1; detail::splits_outputs(node.join) && p < node.parts.size(); ++p) {
      out += outputs(*node.parts[p]);
    }
    return out;
  }

  Maps<T, Rank> backward(Node& node, Maps<T, Rank> gradient) {
    if (node.is_norm) return normalise_backward(node, std::move(gradient));
    Maps<T, Rank>& x = node.input;
    Maps<T, Rank> result = zeros<T>(x.batch, x.channels, x.size);
    if (node.join == Join::none) {
      Parameters<T, Rank>& leaf = leaves[node.leaf];
      leaf.weight_gradient.assign(leaf.weight.size(), T(0));
      leaf.bias_gradient.assign(leaf.bias.size(), T(0));
      for (Index n = 0; n < x.batch; ++n) {
        for (Index o = 0; leaf.shape.bias && !leaf.fixed && o < gradient.channels; ++o) {
          for (Index p = 0; p < gradient.pixels(); ++p) {
            leaf.bias_gradient[static_cast<std::size_t>(o)] += gradient.at(n, o, p);
          }
        }
        for_each_read(leaf.shape, x.size, gradient.size,
                      [&](Index o, Index j, Index c, Index p, std::size_t w) {
                        if (!leaf.fixed) {
                          leaf.weight_gradient[w] += gradient.at(n, o, j) * x.at(n, c, p);
                        }
                        result.at(n, c, p) += gradient.at(n, o, j) * leaf.weight[w];
                      });
      }
      return result;
    }
    if (node.join == Join::chain) {
      for (std::size_t p = node.parts.size(); p-- > 0;) {
        gradient = backward(*node.parts[p], std::move(gradient));
      }
      return gradient;
    }
    Index in = 0, out = 0;
    for (const auto& part : node.parts) {
      const Index width = outputs(*part);
      Maps<T, Rank> own = backward(
          *part, detail::splits_outputs(node.join) ? slice(gradient, out, width) : gradient);
      add(result, detail::splits_inputs(node.join) ? in : 0, own);
      in += own.channels;
      out += width;
    }
    return result;
  }

  std::vector<Padding<Rank>> margins_;
  std::unique_ptr<Node> root_;
  bool absolute_ = false;
};

}  // namespace concertina::test
