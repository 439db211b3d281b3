// SPDX-License-Identifier: Apache-2.0
#include "onnx/builder.hpp"

#include <concertina/error.hpp>

#include <algorithm>
#include <cctype>
#include <map>
#include <set>

namespace tool {

namespace {

using concertina::ShapeError;
using onnx::Attribute, onnx::DataType;

constexpr std::size_t first_axis = 2;  // of space

std::vector<onnx::Dimension> declared(const Dims& dims, const std::string& prefix) {
  static const std::string axes = "DHW";
  std::vector<onnx::Dimension> result;
  for (std::size_t axis = 0; axis < dims.size(); ++axis) {
    if (dims[axis] != unknown) {
      result.push_back({.value = dims[axis], .name = {}});
    } else {
      const std::size_t place = axis + axes.size() - dims.size();
      result.push_back({.value = {}, .name = axis == 0 ? "N" : prefix + axes.substr(place, 1)});
    }
  }
  return result;
}

Dims list(const auto& axes) { return {axes.begin(), axes.end()}; }

Dims begin_and_end(Dims begin, const Dims& end) {
  begin.insert(begin.end(), end.begin(), end.end());
  return begin;
}

/// "conv1.weight"; "weight" of a layer without a name.
std::string of(const std::string& layer, const char* parameter) {
  return layer.empty() ? parameter : layer + "." + parameter;
}

}  // namespace

struct Builder::State {
  onnx::Model model;
  DataType type = DataType::float32;
  std::set<std::string> names;               // of tensors and nodes
  std::map<std::string, double> remainders;  // of a variance: what its epsilon lacks as a float
};

void initialize(onnx::Model& model, const Parameters& parameters) {
  for (std::size_t i = 1; i < model.inputs.size(); ++i) {
    const onnx::ValueInfo& input = model.inputs[i];
    Dims dims;
    for (const onnx::Dimension& extent : input.shape.value()) dims.push_back(extent.value.value());
    onnx::Tensor tensor = parameters(input.name, dims);
    if (tensor.dims != dims) {
      throw ShapeError(model.origin + ": parameter " + input.name + " is " + to_text(tensor.dims) +
                       ", expected " + to_text(dims));
    }
    tensor.name = input.name;
    model.initializers.push_back(std::move(tensor));
  }
  model.inputs.erase(model.inputs.begin() + 1, model.inputs.end());
}

Builder::Builder(std::string graph_name, DataType type, Dims input)
    : state_(std::make_shared<State>()), tensor_("input"), dims_(std::move(input)) {
  onnx::Model& model = state_->model;
  model.origin = graph_name;
  model.graph_name = std::move(graph_name);
  model.opsets = {{"", type == DataType::bfloat16 ? 22 : 17}};  // of which Conv takes the type
  model.producer = "concertina";
  model.inputs = {{.name = tensor_, .type = type, .shape = declared(dims_, "")}};
  state_->type = type;
  state_->names = {"input", "output"};
}

std::string Builder::unique(const std::string& name) const {
  std::string result = name;
  for (int i = 1; !state_->names.insert(result).second; ++i) {
    result = name + "_" + std::to_string(i);
  }
  return result;
}

void Builder::refuse(const std::string& name, const std::string& what) const {
  throw ShapeError("layer " + name + " " + what + ", but is given " + to_text(dims_));
}

std::string Builder::parameter(const std::string& name, Dims dims) {
  auto& inputs = state_->model.inputs;
  if (std::ranges::find(inputs, name, &onnx::ValueInfo::name) == inputs.end()) {  // or it is shared
    if (!state_->names.insert(name).second)
      throw ShapeError("a layer has the name of the parameter " + name);
    inputs.push_back({.name = name, .type = state_->type, .shape = declared(dims, "")});
  }
  return name;
}

std::string Builder::constant(onnx::Tensor tensor) {
  tensor.name = unique(tensor.name);
  state_->model.initializers.push_back(std::move(tensor));
  return state_->model.initializers.back().name;
}

std::string Builder::numbers(const std::string& name, const std::vector<double>& values,
                             Dims dims) {
  if (state_->type == DataType::float64) {
    return constant(onnx::Tensor::of<double>(name, std::move(dims), values));
  }
  const std::vector<float> narrow(values.begin(), values.end());
  return constant(onnx::Tensor::of<float>(name, std::move(dims), narrow));
}

Builder& Builder::node(const std::string& op_type, const std::string& name,
                       std::vector<std::string> inputs, std::vector<Attribute> attributes,
                       Dims dims) {
  std::string label = name;
  if (label.empty()) {
    label = op_type;
    std::ranges::transform(label, label.begin(), [](unsigned char c) { return std::tolower(c); });
  }
  label = unique(label);
  state_->model.nodes.push_back({.name = label,
                                 .op_type = op_type,
                                 .inputs = std::move(inputs),
                                 .outputs = {label},
                                 .attributes = std::move(attributes)});
  tensor_ = std::move(label);
  dims_ = std::move(dims);
  return *this;
}

void Builder::crop(const std::string& name, Dims& pads) {
  if (std::ranges::none_of(pads, [](Index pad) { return pad < 0; })) return;
  const std::size_t rank = pads.size() / 2;
  Dims crops(2 * dims_.size()), dims = dims_;
  for (std::size_t i = 0; i < pads.size(); ++i) {
    const std::size_t axis = first_axis + i % rank;
    const Index taken = std::min<Index>(pads[i], 0);
    crops[axis + (i < rank ? 0 : dims.size())] = taken;
    if (dims[axis] != unknown) dims[axis] += taken;
    pads[i] -= taken;
  }
  const std::string amounts = constant(
      onnx::Tensor::of<std::int64_t>(of(name, "crop"), {std::ssize(crops)}, std::span(crops)));
  node("Pad", name.empty() ? "" : name + ".pad", {tensor_, amounts}, {}, std::move(dims));
}

template <int Rank>
Builder& Builder::conv(const std::string& name, concertina::ConvShape<Rank> shape) {
  if (dims_.size() != first_axis + Rank) {
    refuse(name, "has " + std::to_string(Rank) + " spatial axes");
  }
  shape.in = channels();
  Dims result = {dims_[0], shape.out};
  try {
    validate(shape);
    concertina::PerAxis<Rank> size;
    bool known = true;
    for (int axis = 0; axis < Rank; ++axis) {
      size[axis] = dims_[first_axis + static_cast<std::size_t>(axis)];
      known = known && size[axis] != unknown;
    }
    if (known) size = output_size(shape, size);
    for (int axis = 0; axis < Rank; ++axis) result.push_back(known ? size[axis] : unknown);
  } catch (const ShapeError& error) {
    throw ShapeError("layer " + name + ": " + error.what());
  }
  Dims pads = begin_and_end(list(shape.padding.start), list(shape.padding.end));
  crop(name, pads);
  Dims weight = {shape.out, shape.in / shape.groups};
  weight.insert(weight.end(), shape.kernel_size.begin(), shape.kernel_size.end());
  std::vector<std::string> inputs = {tensor_, parameter(of(name, "weight"), weight)};
  if (shape.bias) inputs.push_back(parameter(of(name, "bias"), {shape.out}));
  return node(
      "Conv", name, std::move(inputs),
      {Attribute::of("dilations", list(shape.dilation)), Attribute::of("group", shape.groups),
       Attribute::of("kernel_shape", list(shape.kernel_size)),
       Attribute::of("pads", std::move(pads)), Attribute::of("strides", list(shape.stride))},
      std::move(result));
}

template Builder& Builder::conv<1>(const std::string&, concertina::ConvShape<1>);
template Builder& Builder::conv<2>(const std::string&, concertina::ConvShape<2>);
template Builder& Builder::conv<3>(const std::string&, concertina::ConvShape<3>);

Builder& Builder::conv_transpose(const std::string& name, Index out, Index kernel) {
  Dims result = {dims_[0], out}, weight = {channels(), out}, window;
  for (std::size_t axis = first_axis; axis < dims_.size(); ++axis) {
    result.push_back(dims_[axis] == unknown ? unknown : dims_[axis] * kernel);
    weight.push_back(kernel);
    window.push_back(kernel);
  }
  return node("ConvTranspose", name, {tensor_, parameter(of(name, "weight"), weight)},
              {Attribute::of("kernel_shape", window), Attribute::of("strides", window)},
              std::move(result));
}

Builder& Builder::linear(const std::string& name, Index out, bool bias) {
  if (dims_.size() != first_axis) refuse(name, "is linear and reads [batch, channels]");
  std::vector<std::string> inputs = {tensor_, parameter(of(name, "weight"), {out, channels()})};
  if (bias) inputs.push_back(parameter(of(name, "bias"), {out}));
  return node("Gemm", name, std::move(inputs), {Attribute::of("transB", std::int64_t{1})},
              {dims_[0], out});
}

Builder& Builder::batch_norm(const std::string& name, double eps) {
  std::vector<std::string> inputs = {tensor_};
  for (const char* suffix : {"weight", "bias", "running_mean", "running_var"}) {
    inputs.push_back(parameter(of(name, suffix), {channels()}));
  }
  const auto rounded = static_cast<float>(eps);
  if (state_->type == DataType::float64) {
    const double remainder = eps - double{rounded};
    if (state_->remainders.emplace(inputs.back(), remainder).first->second != remainder) {
      throw ShapeError("layer " + name + " is there twice, with another epsilon");
    }
  }
  return node("BatchNormalization", name, std::move(inputs), {Attribute::of("epsilon", rounded)},
              dims_);
}

Builder& Builder::scale(const std::string& name, bool bias) {
  Dims dims(dims_.size() - 1, 1);
  dims.front() = channels();
  const Dims result = dims_;
  node("Mul", name, {tensor_, parameter(of(name, "weight"), dims)}, {}, result);
  if (bias)
    node("Add", name.empty() ? "" : name + ".add", {tensor_, parameter(of(name, "bias"), dims)}, {},
         result);
  return *this;
}

Builder& Builder::relu6() {
  std::vector<std::string> inputs = {tensor_, numbers("relu6.min", {0}, {}),
                                     numbers("relu6.max", {6}, {})};
  return node("Clip", "relu6", std::move(inputs), {}, dims_);
}

Builder& Builder::leaky_relu(float negative_slope) {
  return node("LeakyRelu", "", {tensor_}, {Attribute::of("alpha", negative_slope)}, dims_);
}

Builder& Builder::flatten() {
  Index features = 1;
  for (std::size_t axis = 1; axis < dims_.size(); ++axis) {
    if (dims_[axis] == unknown) refuse("flatten", "needs a known size");
    features = concertina::detail::checked_multiply(features, dims_[axis], "flatten");
  }
  return node("Flatten", "", {tensor_}, {Attribute::of("axis", std::int64_t{1})},
              {dims_[0], features});
}

Builder& Builder::global_avg_pool() {
  Dims dims(dims_.size(), 1);
  std::copy_n(dims_.begin(), first_axis, dims.begin());
  return node("GlobalAveragePool", "", {tensor_}, {}, std::move(dims)).flatten();
}

Builder& Builder::pool(const std::string& op_type, Dims kernel, Dims stride, Dims padding) {
  const std::string name = op_type == "MaxPool" ? "max_pool" : "avg_pool";
  const std::size_t rank = dims_.size() - first_axis;
  if (rank == 0 || kernel.size() != rank || stride.size() != rank || padding.size() != rank) {
    refuse(name, "has windows of " + std::to_string(kernel.size()) + " axes");
  }
  Dims result = {dims_[0], dims_[1]};
  for (std::size_t axis = 0; axis < rank; ++axis) {
    const Index size = dims_[first_axis + axis];
    try {
      const concertina::ConvShape<1> shape{.out = 1,
                                           .in = 1,
                                           .kernel_size = kernel[axis],
                                           .stride = stride[axis],
                                           .padding = padding[axis]};
      validate(shape);
      result.push_back(size == unknown ? unknown
                                       : output_size(shape, concertina::PerAxis<1>{size})[0]);
    } catch (const ShapeError& error) {
      throw ShapeError("layer " + name + ": " + error.what());
    }
  }
  std::vector<Attribute> attributes = {Attribute::of("kernel_shape", std::move(kernel)),
                                       Attribute::of("pads", begin_and_end(padding, padding)),
                                       Attribute::of("strides", std::move(stride))};
  if (op_type == "AveragePool") {
    attributes.push_back(Attribute::of("count_include_pad", std::int64_t{1}));
  }
  return node(op_type, name, {tensor_}, std::move(attributes), std::move(result));
}

Builder& Builder::channel_slice(Index begin, Index end) {
  if (begin < 0 || begin >= end || end > channels()) {
    refuse("slice", "takes channels " + std::to_string(begin) + " to " + std::to_string(end));
  }
  const auto integer = [&](const char* name, Index value) {
    return constant(onnx::Tensor::of<std::int64_t>(name, {1}, std::vector<std::int64_t>{value}));
  };
  std::vector<std::string> inputs = {tensor_, integer("slice.starts", begin),
                                     integer("slice.ends", end), integer("slice.axes", 1)};
  Dims result = dims_;
  result[1] = end - begin;
  return node("Slice", "", std::move(inputs), {}, std::move(result));
}

Builder& Builder::channel_shuffle(Index groups) {
  if (groups < 1 || channels() % groups != 0) {
    refuse("shuffle", "has " + std::to_string(groups) + " groups");
  }
  const Dims from = dims_;
  Dims split = from, order, target = from;
  split[1] = channels() / groups;
  split.insert(split.begin() + 1, groups);
  if (std::ranges::count(target, unknown) > 1) refuse("shuffle", "needs a known size");
  for (std::size_t axis = 0; axis < split.size(); ++axis) order.push_back(static_cast<Index>(axis));
  std::swap(order[1], order[2]);
  const auto shape = [&](const Dims& dims) {
    return constant(onnx::Tensor::of<std::int64_t>(
        "shuffle.shape", {static_cast<Index>(dims.size())}, std::span<const std::int64_t>(dims)));
  };
  Dims swapped = split;
  std::swap(swapped[1], swapped[2]);
  node("Reshape", "shuffle.split", {tensor_, shape(split)}, {}, split);
  node("Transpose", "shuffle.swap", {tensor_}, {Attribute::of("perm", order)}, swapped);
  return node("Reshape", "shuffle", {tensor_, shape(target)}, {}, from);
}

Builder& Builder::cast(DataType type) {
  state_->type = type;
  return node("Cast", "", {tensor_},
              {Attribute::of("to", static_cast<std::int64_t>(static_cast<std::int32_t>(type)))},
              dims_);
}

Builder& Builder::with_constant(const std::string& op_type, std::vector<double> values, Dims dims) {
  return node(op_type, "", {tensor_, numbers("constant", values, std::move(dims))}, {}, dims_);
}

Builder& Builder::join(const std::string& op_type, const std::vector<Builder>& branches) {
  Builder joined = branches.at(0);
  for (std::size_t b = 1; b < branches.size(); ++b) {
    Dims dims = branches[b].dims_;
    const Index more = dims.at(1);
    if (op_type == "Concat") dims[1] = joined.dims_[1];
    if (dims != joined.dims_) {
      joined.refuse(op_type, "has a branch that writes " + to_text(branches[b].dims_));
    }
    if (op_type == "Concat") {
      joined.dims_[1] += more;
    } else {
      joined.node(op_type, "", {joined.tensor_, branches[b].tensor_}, {}, dims);
    }
  }
  if (op_type == "Concat") {
    std::vector<std::string> inputs;
    for (const Builder& branch : branches) inputs.push_back(branch.tensor_);
    const Dims dims = joined.dims_;
    joined.node(op_type, "", std::move(inputs), {Attribute::of("axis", std::int64_t{1})}, dims);
  }
  return *this = joined;
}

onnx::Model Builder::finish() {
  onnx::Model& model = state_->model;
  if (model.nodes.empty() || model.nodes.back().outputs.front() != tensor_) plain("Identity");
  model.nodes.back().outputs = {"output"};
  model.outputs = {{.name = "output", .type = state_->type, .shape = declared(dims_, "out_")}};
  return std::move(model);
}

onnx::Model Builder::finish(const Parameters& parameters) {
  const auto remainders = std::move(state_->remainders);
  onnx::Model model = finish();
  initialize(model, [&](const std::string& name, const Dims& dims) {
    onnx::Tensor tensor = parameters(name, dims);
    const auto remainder = remainders.find(name);
    if (remainder == remainders.end() || remainder->second == 0) return tensor;
    std::vector<double> variance = tensor.values<double>();
    for (double& element : variance) element += remainder->second;
    return onnx::Tensor::of<double>(name, dims, variance);
  });
  return model;
}

}  // namespace tool
