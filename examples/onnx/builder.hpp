// Models built layer by layer, as a program describes them.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "onnx/graph.hpp"

#include <concertina/shape.hpp>

#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace tool {

/// The elements of a parameter, by its name and shape.
using Parameters = std::function<onnx::Tensor(const std::string& name, const Dims& dims)>;

/// Turns every graph input but the first, of which a Builder makes parameters, into an initializer.
/// Throws ShapeError where a tensor has another shape; what `parameters` throws.
void initialize(onnx::Model& model, const Parameters& parameters);

/// Builds a model from "input" to "output", each layer reading what the one before writes. A layer
/// NAME is the node NAME; its parameters NAME.weight, NAME.bias, NAME.running_mean and
/// NAME.running_var, as PyTorch calls them, are graph inputs until they get elements, so that a
/// network can be counted and expanded before it takes memory. Layers throw ShapeError naming the
/// one that does not fit.
class Builder {
 public:
  /// [batch, channels, spatial...]; an extent may be unknown. Parameters are of the input's type,
  /// or of the one that it is cast to.
  Builder(std::string graph_name, onnx::DataType type, Dims input);

  /// One that reads what the next layer here would, in the same model.
  Builder branch() const { return *this; }
  const Dims& dims() const { return dims_; }
  Index channels() const { return dims_[1]; }

  /// `shape.in` is filled in. Padding that is negative is a Pad before it.
  template <int Rank>
  Builder& conv(const std::string& name, concertina::ConvShape<Rank> shape);
  /// Windows of `kernel` side by side, without bias.
  Builder& conv_transpose(const std::string& name, Index out, Index kernel);
  Builder& linear(const std::string& name, Index out, bool bias = true);
  Builder& batch_norm(const std::string& name, double eps = 1e-5);
  /// Times NAME.weight, plus NAME.bias if there is one, channel by channel.
  Builder& scale(const std::string& name, bool bias);
  Builder& relu() { return plain("Relu"); }
  Builder& relu6();
  Builder& leaky_relu(float negative_slope);
  Builder& flatten();
  /// The mean over all spatial axes, which vanish.
  Builder& global_avg_pool();
  /// One number per spatial axis, of kernel, stride and padding; the average counts the padding.
  Builder& max_pool(Dims kernel, Dims stride, Dims padding) {
    return pool("MaxPool", std::move(kernel), std::move(stride), std::move(padding));
  }
  Builder& avg_pool(Dims kernel, Dims stride, Dims padding) {
    return pool("AveragePool", std::move(kernel), std::move(stride), std::move(padding));
  }
  /// begin <= channel < end
  Builder& channel_slice(Index begin, Index end);
  /// Channels seen as [groups, n] become [n, groups]. Extents must be known.
  Builder& channel_shuffle(Index groups);
  Builder& cast(onnx::DataType type);
  /// Add, Sub, Mul or Div with a constant that broadcasts to the map.
  Builder& with_constant(const std::string& op_type, std::vector<double> values, Dims dims);
  Builder& sum(const std::vector<Builder>& branches) { return join("Add", branches); }
  Builder& concat(const std::vector<Builder>& branches) { return join("Concat", branches); }

  /// The model, with parameters as graph inputs. Nothing can be added afterwards.
  onnx::Model finish();
  /// With elements. An epsilon of a batch norm that ONNX's float does not hold moves into the
  /// variance of a double one.
  onnx::Model finish(const Parameters& parameters);

 private:
  struct State;

  std::string unique(const std::string& name) const;
  std::string parameter(const std::string& name, Dims dims);
  std::string constant(onnx::Tensor tensor);
  std::string numbers(const std::string& name, const std::vector<double>& values, Dims dims);
  Builder& node(const std::string& op_type, const std::string& name,
                std::vector<std::string> inputs, std::vector<onnx::Attribute> attributes,
                Dims dims);
  Builder& plain(const std::string& op_type) { return node(op_type, "", {tensor_}, {}, dims_); }
  Builder& pool(const std::string& op_type, Dims kernel, Dims stride, Dims padding);
  Builder& join(const std::string& op_type, const std::vector<Builder>& branches);
  /// Moves what of a layer's pads is negative to a Pad.
  void crop(const std::string& name, Dims& pads);
  [[noreturn]] void refuse(const std::string& name, const std::string& what) const;

  std::shared_ptr<State> state_;
  std::string tensor_;
  Dims dims_;
};

}  // namespace tool
