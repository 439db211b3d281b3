// From the nodes of a graph to what they do with a batch.
// SPDX-License-Identifier: Apache-2.0
#include "inference.hpp"

#include "read_layer.hpp"
#include "text.hpp"
#include "windows.hpp"

#include <concertina/conv.hpp>

#include <Eigen/Core>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <functional>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

namespace tool {
namespace {

using concertina::io::Safetensors;

template <class Scalar>
using Map = std::function<Tensor<Scalar>(Tensor<Scalar>)>;

// ---- layers with weights

template <class Scalar>
Map<Scalar> linear(Conv<Scalar, 0> layer, const std::string& where) {
  return [layer = std::move(layer), where](const Tensor<Scalar>& x) {
    const ConvShape<0>& shape = layer.shape();
    require_axes(x, 2, where);
    require_channels(x, shape.in, where);
    Tensor<Scalar> y = zeros<Scalar>({x.shape[0], shape.out}, where);
    const Index groups = shape.groups, in = shape.in / groups, out = shape.out / groups;
    const Eigen::Map<const Matrix<Scalar>> weight(layer.weight().data(), shape.out, in);
    const Eigen::Map<const Matrix<Scalar>> input(x.values.data(), x.shape[0], shape.in);
    Eigen::Map<Matrix<Scalar>> output(y.values.data(), x.shape[0], shape.out);
    for (Index g = 0; g < groups; ++g) {
      output.middleCols(g * out, out).noalias() =
          input.middleCols(g * in, in) * weight.middleRows(g * out, out).transpose();
    }
    if (shape.bias) {
      output.rowwise() +=
          Eigen::Map<const Eigen::RowVectorX<Scalar>>(layer.bias().data(), shape.out);
    }
    return y;
  };
}

/// A conv_transpose without padding: what each input position adds to its window of the output.
template <class Scalar>
Map<Scalar> conv_transpose(const Safetensors& file, const Node& node) {
  const std::string name = node.layer.tensor("weight"), bias_name = node.layer.tensor("bias");
  const std::vector<Index> shape = file.tensor(name).shape;
  if (shape.size() != 4 || std::ranges::min(shape) < 1) {
    refuse_shape(node.where, "a conv_transpose of weight " + to_text(shape) +
                                 "; expected [in, out, height, width], none of them 0");
  }
  ConvShape<2> adjoint = geometry_of<2>(node.layer, node.where);
  adjoint.out = shape[0];
  adjoint.in = shape[1];
  adjoint.kernel_size = {shape[2], shape[3]};
  const auto weight = finite_values<Scalar>(file, name, node.where);
  std::vector<Scalar> bias(static_cast<std::size_t>(shape[1]), Scalar(0));
  if (file.contains(bias_name)) {
    if (file.tensor(bias_name).shape != std::vector<Index>{shape[1]}) {
      refuse_shape(node.where, "a bias of " + to_text(file.tensor(bias_name).shape) + " for " +
                                   std::to_string(shape[1]) + " channels");
    }
    bias = finite_values<Scalar>(file, bias_name, node.where);
  }
  return [=, where = node.where](const Tensor<Scalar>& x) {
    return convolve_transposed<Scalar>(adjoint, weight, bias, x, where);
  };
}

/// A conv or linear layer of the file.
template <class Scalar>
Map<Scalar> weighted(const Safetensors& file, const LayerDescription& layer,
                     const std::string& where) {
  switch (rank_of_layer(file, layer)) {
    case 0: return linear(read_layer<Scalar, 0>(file, layer), where);
    case 2:
      return [conv = read_layer<Scalar, 2>(file, layer), where](const Tensor<Scalar>& x) {
        return convolve(conv, x, where);
      };
    default:
      throw concertina::FormatError(where + ": layer " + in_quotes(layer.name) + " has " +
                                    std::to_string(rank_of_layer(file, layer)) +
                                    " spatial axes; only two of them, or none, can be run");
  }
}

// ---- the other layers

/// One element per channel.
template <class Scalar>
std::vector<Scalar> channel_factors(const Safetensors& file, const Node& node, const char* suffix) {
  const std::string name = node.layer.tensor(suffix);
  if (file.tensor(name).shape.size() != 1) {
    refuse_shape(node.where, "tensor " + in_quotes(name) + " is " +
                                 to_text(file.tensor(name).shape) +
                                 ", expected one element for each channel");
  }
  return finite_values<Scalar>(file, name, node.where);
}

/// Replaces channel c's elements x by change(c, x), an expression of Eigen's.
template <class Scalar, class Change>
Map<Scalar> by_channel(std::size_t channels, const std::string& where, Change change) {
  return [=](Tensor<Scalar> x) {
    require_channels(x, static_cast<Index>(channels), where);
    for_each_channel(
        x, [&](Index c, Row<Scalar> row) { row = change(static_cast<std::size_t>(c), row); });
    return x;
  };
}

template <class Scalar>
Map<Scalar> batch_norm(const Safetensors& file, const Node& node) {
  const auto mean = channel_factors<Scalar>(file, node, "running_mean");
  const auto weight = channel_factors<Scalar>(file, node, "weight");
  const auto bias = channel_factors<Scalar>(file, node, "bias");
  auto deviation = channel_factors<Scalar>(file, node, "running_var");
  const std::size_t channels = mean.size();
  if (weight.size() != channels || bias.size() != channels || deviation.size() != channels) {
    refuse_shape(node.where, "weight, bias, running_mean and running_var of " +
                                 in_quotes(node.layer.name) + " differ in length");
  }
  for (Scalar& variance : deviation) {
    variance += static_cast<Scalar>(node.eps);
    if (!(variance > 0)) {
      throw concertina::FormatError(node.where + ": running_var + eps of " +
                                    in_quotes(node.layer.name) + " is not always positive");
    }
    variance = std::sqrt(variance);
  }
  return by_channel<Scalar>(channels, node.where, [=](std::size_t c, const Row<Scalar>& x) {
    return (x - mean[c]) / deviation[c] * weight[c] + bias[c];
  });
}

template <class Scalar>
Map<Scalar> scale(const Safetensors& file, const Node& node) {
  const auto weight = channel_factors<Scalar>(file, node, "weight");
  return by_channel<Scalar>(weight.size(), node.where,
                            [=](std::size_t c, const Row<Scalar>& x) { return x * weight[c]; });
}

template <class Scalar>
Map<Scalar> normalize(const Node& node) {
  const auto divide = static_cast<Scalar>(node.divide);
  const std::vector<Scalar> mean(node.mean.begin(), node.mean.end());
  const std::vector<Scalar> deviation(node.std.begin(), node.std.end());
  return by_channel<Scalar>(mean.size(), node.where, [=](std::size_t c, const Row<Scalar>& x) {
    return (x / divide - mean[c]) / deviation[c];
  });
}

/// max_pool or avg_pool.
template <class Scalar>
Map<Scalar> pooled(const Node& node) {
  for (const auto* list : {&node.kernel, &node.layer.stride, &node.layer.padding}) {
    if (list->size() > 2 || (list == &node.kernel && list->empty())) {
      throw concertina::FormatError(node.where +
                                    ": only pools of two spatial axes can be run, "
                                    "but this has " +
                                    std::to_string(list->size()));
    }
  }
  ConvShape<2> shape = geometry_of<2>(node.layer, node.where);
  shape.kernel_size = {node.kernel.front(), node.kernel.back()};
  const Pooling pooling = node.type == LayerType::max_pool ? Pooling::max : Pooling::average;
  return [pooling, shape, where = node.where](const Tensor<Scalar>& x) {
    return pool(pooling, shape, x, where);
  };
}

template <class Scalar>
Tensor<Scalar> global_avg_pool(Tensor<Scalar> x, const std::string& where) {
  if (x.shape.size() < 3 || per_channel(x) == 0) {
    refuse_shape(where, "there is nothing to take the mean of in " + to_text(x.shape));
  }
  Tensor<Scalar> y = zeros<Scalar>({x.shape[0], x.shape[1]}, where);
  auto to = y.values.begin();
  for_each_channel(x, [&](Index, Row<Scalar> row) { *to++ = row.mean(); });
  return y;
}

/// Channel c of the output is channel from[c] of the input.
template <class Scalar>
Tensor<Scalar> take_channels(Tensor<Scalar> x, const std::vector<Index>& from,
                             const std::string& where) {
  std::vector<Index> shape = x.shape;
  shape[1] = static_cast<Index>(from.size());
  Tensor<Scalar> y = zeros<Scalar>(std::move(shape), where);
  const Index size = per_channel(x), channels = x.shape[1];
  const Scalar* image = x.values.data();
  for_each_channel(y, [&](Index c, Row<Scalar> row) {
    std::copy_n(image + from[static_cast<std::size_t>(c)] * size, size, row.data());
    if (c + 1 == y.shape[1]) image += channels * size;
  });
  return y;
}

template <class Scalar>
Tensor<Scalar> channel_slice(Tensor<Scalar> x, const Node& node) {
  if (node.end > x.shape[1]) {
    refuse_shape(node.where, "it takes channels " + std::to_string(node.begin) + " to " +
                                 std::to_string(node.end) + ", but is given " + to_text(x.shape));
  }
  std::vector<Index> from(static_cast<std::size_t>(node.end - node.begin));
  std::iota(from.begin(), from.end(), node.begin);
  return take_channels(std::move(x), from, node.where);
}

template <class Scalar>
Tensor<Scalar> channel_shuffle(Tensor<Scalar> x, const Node& node) {
  const Index groups = node.layer.groups, channels = x.shape[1];
  if (channels % groups != 0) {
    refuse_shape(node.where, std::to_string(groups) + " groups do not divide the channels of " +
                                 to_text(x.shape));
  }
  std::vector<Index> from;
  for (Index c = 0; c < channels; ++c)
    from.push_back(c % groups * (channels / groups) + c / groups);
  return take_channels(std::move(x), from, node.where);
}

template <class Scalar>
Map<Scalar> layer(const Safetensors& file, const Node& node) {
  switch (node.type) {
    case LayerType::conv:
    case LayerType::linear: return weighted<Scalar>(file, node.layer, node.where);
    case LayerType::conv_transpose: return conv_transpose<Scalar>(file, node);
    case LayerType::batch_norm: return batch_norm<Scalar>(file, node);
    case LayerType::scale: return scale<Scalar>(file, node);
    case LayerType::normalize: return normalize<Scalar>(node);
    case LayerType::avg_pool:
    case LayerType::max_pool: return pooled<Scalar>(node);
    case LayerType::global_avg_pool:
      return
          [where = node.where](Tensor<Scalar> x) { return global_avg_pool(std::move(x), where); };
    case LayerType::channel_slice:
      return [node](Tensor<Scalar> x) { return channel_slice(std::move(x), node); };
    case LayerType::channel_shuffle:
      return [node](Tensor<Scalar> x) { return channel_shuffle(std::move(x), node); };
    case LayerType::flatten:
      return [](Tensor<Scalar> x) {
        x.shape = {x.shape[0], x.shape[1] * per_channel(x)};
        return x;
      };
    case LayerType::relu:  // both keep what is not a number
      return [](Tensor<Scalar> x) {
        for (Scalar& value : x.values) value = value < 0 ? 0 : value;
        return x;
      };
    case LayerType::relu6:
      return [](Tensor<Scalar> x) {
        for (Scalar& value : x.values) value = value < 0 ? 0 : value > 6 ? 6 : value;
        return x;
      };
    case LayerType::leaky_relu:
      return [slope = static_cast<Scalar>(node.negative_slope)](Tensor<Scalar> x) {
        for (Scalar& value : x.values) value = value < 0 ? slope * value : value;
        return x;
      };
  }
  throw concertina::FormatError(node.where + ": a layer of no known type");
}

// ---- composites

template <class Scalar>
Tensor<Scalar> sum(const std::vector<Map<Scalar>>& branches, const Tensor<Scalar>& x,
                   const std::string& where) {
  Tensor<Scalar> y = branches.front()(x);
  for (std::size_t i = 1; i < branches.size(); ++i) {
    const Tensor<Scalar> other = branches[i](x);
    if (other.shape != y.shape) {
      refuse_shape(where, "branch 0 gives " + to_text(y.shape) + ", branch " + std::to_string(i) +
                              " " + to_text(other.shape) + "; they cannot be added");
    }
    std::ranges::transform(y.values, other.values, y.values.begin(), std::plus<>());
  }
  return y;
}

template <class Scalar>
Tensor<Scalar> concat(const std::vector<Map<Scalar>>& branches, const Tensor<Scalar>& x,
                      const std::string& where) {
  std::vector<Tensor<Scalar>> results;
  std::vector<Index> shape;
  for (const Map<Scalar>& branch : branches) {
    std::vector<Index> found = results.emplace_back(branch(x)).shape;
    const Index channels = shape.empty() ? 0 : std::exchange(shape[1], found[1]);
    if (!shape.empty() && found != shape) {
      refuse_shape(where, "branch " + std::to_string(results.size() - 1) + " gives " +
                              to_text(found) + ", which cannot be joined along the channels of " +
                              to_text(results.front().shape));
    }
    found[1] += channels;
    shape = std::move(found);
  }
  Tensor<Scalar> y{shape, {}};
  y.values.reserve(static_cast<std::size_t>(modest_count<Scalar>(shape, where)));
  for (Index n = 0; n < shape[0]; ++n) {
    for (const Tensor<Scalar>& each : results) {
      const Index size = each.shape[1] * per_channel(each);
      const auto image = each.values.begin() + n * size;
      y.values.insert(y.values.end(), image, image + size);
    }
  }
  return y;
}

template <class Scalar>
using Observer = typename Network<Scalar>::Observer;

template <class Scalar>
Map<Scalar> map_of(const Safetensors& file, const Node& node, Form form,
                   const Observer<Scalar>& observe) {
  if (observe && is_expanded(node)) {
    return [&node, observe, map = map_of<Scalar>(file, node, form, {})](Tensor<Scalar> x) {
      observe(node, x);
      return map(std::move(x));
    };
  }
  if (form == Form::compact && node.expected) {
    if (!node.expected->has_geometry) {
      throw concertina::FormatError(node.where +
                                    ": without expected_geometry the compact layer cannot be run");
    }
    return weighted<Scalar>(file, node.expected->layer, node.where);
  }
  if (node.kind == Node::Kind::layer) return layer<Scalar>(file, node);
  std::vector<Map<Scalar>> parts;
  for (const Node& part : node.parts) parts.push_back(map_of<Scalar>(file, part, form, observe));
  if (node.kind == Node::Kind::chain) {
    return [parts](Tensor<Scalar> x) {
      for (const Map<Scalar>& part : parts) x = part(std::move(x));
      return x;
    };
  }
  const bool add = node.kind == Node::Kind::sum;
  return [parts, add, where = node.where](const Tensor<Scalar>& x) {
    return add ? sum(parts, x, where) : concat(parts, x, where);
  };
}

}  // namespace

template <class Scalar>
Network<Scalar>::Network(const Safetensors& file, const Node& graph, Form form, Observer observe)
    : map_(map_of<Scalar>(file, graph, form, observe)) {}

template <class Scalar>
Tensor<Scalar> Network<Scalar>::operator()(Tensor<Scalar> batch) const {
  const std::string where = "a batch of shape " + to_text(batch.shape);
  if (batch.shape.size() < 2 || std::ranges::min(batch.shape) < 0) {
    refuse_shape(where, "expected [batch, channels, spatial...]");
  }
  if (std::cmp_not_equal(modest_count<Scalar>(batch.shape, where), batch.values.size())) {
    refuse_shape(where, "it has " + std::to_string(batch.values.size()) + " values");
  }
  return map_(std::move(batch));
}

template class Network<float>;
template class Network<double>;

}  // namespace tool
