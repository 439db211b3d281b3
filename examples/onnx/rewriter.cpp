// SPDX-License-Identifier: Apache-2.0
#include "onnx/rewriter.hpp"

#include "onnx/data_types.hpp"

#include <algorithm>
#include <ranges>
#include <utility>

namespace tool {

namespace {

/// Whether a layer reads the whole of its source once: a linear layer after a flattening.
bool covers(const NewLayer& layer, const GraphTensor& source) {
  const auto zero = [](Index pad) { return pad == 0; };
  const Dims ones(layer.kernel.size(), 1);
  return layer.groups == 1 && source.dims &&
         std::ranges::equal(layer.kernel, *source.dims | std::views::drop(2)) &&
         std::ranges::all_of(layer.pads_begin, zero) && std::ranges::all_of(layer.pads_end, zero) &&
         layer.dilations == ones && layer.strides == ones;
}

/// Whether a layer is a linear one of each position.
bool is_linear(const NewLayer& layer) {
  return layer.rank == 0 || (is_pointwise(layer) && layer.in_layout == Layout::channels_last &&
                             layer.out_layout == Layout::channels_last);
}

}  // namespace

Rewriter::Rewriter(const Graph& graph) : graph_(graph), model_(graph.model()) {
  for (const GraphTensor& tensor : graph.tensors()) names_.insert(tensor.name);
  // Types may be declared of tensors that nothing makes.
  for (const onnx::ValueInfo& value : model_.values) names_.insert(value.name);
  for (const onnx::Node& node : model_.nodes) {
    node_names_.insert(node.name);
    // Names in graphs that nodes hold, which are to be no others': wherever they stand there.
    const bool graphs = std::ranges::any_of(node.attributes, [](const onnx::Attribute& attribute) {
      return attribute.type == onnx::AttributeType::graph ||
             attribute.type == onnx::AttributeType::graphs;
    });
    if (graphs)
      bodies_.emplace_back(reinterpret_cast<const char*>(node.encoded.data()), node.encoded.size());
  }
  removed_.resize(model_.nodes.size());
  inserted_.resize(model_.nodes.size());
}

bool Rewriter::writes_convolution(Segments segments, const NewLayer& layer) const {
  return !is_linear(layer) && !(layer.flat && covers(layer, graph_[segments.back().from]));
}

void Rewriter::replace(Segments segments, const NewLayer& layer, std::span<const double> weight,
                       std::span<const double> bias, std::span<const double> shift) {
  weight_ = weight;
  bias_ = bias;
  for (const Segment& segment : segments) {
    for (const LinearNode* map : segment.maps) {
      for (const int node : map->nodes) removed_[static_cast<std::size_t>(node)] = true;
    }
  }
  const GraphTensor& result = graph_[segments.front().to];
  result_ = &result;
  const auto last = static_cast<std::size_t>(result.producer);
  nodes_ = &inserted_[last];
  node_name_ = model_.nodes[last].name;
  type_ = type_of(segments);
  source_ = &graph_[segments.back().from];
  sources_.insert(segments.back().from);
  std::string x = source_->name;
  if (!shift.empty()) {
    const bool first = layer.in_layout == Layout::channels_first;
    Dims dims(first ? static_cast<std::size_t>(layer.rank) + 1 : 1, 1);
    dims.front() = std::ssize(shift);
    x = node("Add", {x, constant(".shift", dims, shift)});
  }
  write(layer, x);
  // In the order in which they run, the last one under the old node's name.
  nodes_->back().name = node_name_;
  nodes_->back().outputs = {result.name};
}

onnx::Model Rewriter::finished() && {
  remove_dead();
  onnx::Model result = model_;
  result.nodes.clear();
  for (std::size_t n = 0; n < model_.nodes.size(); ++n) {
    if (!removed_[n]) result.nodes.push_back(model_.nodes[n]);
    for (onnx::Node& node : inserted_[n]) result.nodes.push_back(std::move(node));
  }
  std::set<std::string, std::less<>> alive;
  for (const onnx::Node& node : result.nodes) {
    alive.insert(node.outputs.begin(), node.outputs.end());
    alive.insert(node.inputs.begin(), node.inputs.end());
  }
  const auto lost = [&](const std::string& name) {
    if (alive.contains(name)) return false;
    const int tensor = graph_.find(name);
    return tensor >= 0 && !graph_[tensor].escapes && !graph_[tensor].consumers.empty();
  };
  std::set<std::string, std::less<>> gone;
  std::erase_if(result.initializers, [&](const onnx::Tensor& tensor) {
    return lost(tensor.name) && graph_[graph_.find(tensor.name)].constant &&
           gone.insert(tensor.name).second;
  });
  std::erase_if(result.inputs,
                [&](const onnx::ValueInfo& input) { return gone.contains(input.name); });
  std::erase_if(result.values, [&](const onnx::ValueInfo& value) { return lost(value.name); });
  for (onnx::Tensor& tensor : constants_) {
    if (model_.ir_version < 4) {  // every initializer is an input there
      onnx::ValueInfo info{.name = tensor.name,
                           .type = tensor.type,
                           .shape = std::vector<onnx::Dimension>(),
                           .encoded = {}};
      for (const auto extent : tensor.dims) info.shape->push_back({.value = extent, .name = {}});
      result.inputs.push_back(std::move(info));
    }
    result.initializers.push_back(std::move(tensor));
  }
  return result;
}

std::string Rewriter::fresh(const std::string& wanted, std::set<std::string, std::less<>>& names) {
  const auto taken = [&](const std::string& name) {
    return !names.insert(name).second || is_in_bodies(name);
  };
  std::string name = wanted;
  for (int i = 2; taken(name); ++i) name = wanted + "_" + std::to_string(i);
  return name;
}

/// The bodies are searched once for each suffix, which many names share.
bool Rewriter::is_in_bodies(const std::string& name) {
  const std::string suffix = name.substr(std::min(name.rfind('.'), name.size()));
  const auto [found, added] = up_to_suffix_.try_emplace(suffix);
  if (added) {
    for (const std::string_view body : bodies_) {
      for (auto at = body.find(suffix); at != body.npos; at = body.find(suffix, at + 1))
        found->second.push_back(body.substr(0, at + suffix.size()));
    }
  }
  return std::ranges::any_of(found->second,
                             [&](std::string_view text) { return text.ends_with(name); });
}

std::string Rewriter::constant(const std::string& suffix, const Dims& dims,
                               std::span<const double> values) {
  constants_.push_back(rounded_tensor(fresh(result_->name + suffix, names_), dims, values, type_));
  return constants_.back().name;
}

std::string Rewriter::constant(const std::string& suffix, const Dims& values) {
  constants_.push_back(
      onnx::Tensor::of<std::int64_t>(fresh(result_->name + suffix, names_), {std::ssize(values)},
                                     std::vector<std::int64_t>(values.begin(), values.end())));
  return constants_.back().name;
}

std::string Rewriter::node(const std::string& op, std::vector<std::string> inputs,
                           std::vector<onnx::Attribute> attributes) {
  std::string output = fresh(result_->name + "." + op, names_);
  nodes_->push_back({.name = node_name_.empty() ? "" : fresh(node_name_ + "." + op, node_names_),
                     .op_type = op,
                     .inputs = std::move(inputs),
                     .outputs = {output},
                     .attributes = std::move(attributes)});
  return output;
}

std::string Rewriter::move_channels(const std::string& x, int rank, Layout to) {
  const Index axes = rank + 2;
  Dims perm = {0};
  if (to == Layout::channels_first) perm.push_back(axes - 1);
  for (Index axis = 1; axis < axes - 1; ++axis)
    perm.push_back(to == Layout::channels_first ? axis : axis + 1);
  if (to == Layout::channels_last) perm.push_back(1);
  return node("Transpose", {x}, {onnx::Attribute::of("perm", perm)});
}

void Rewriter::write(const NewLayer& layer, std::string x) {
  const bool two_axes = result_->dims && result_->dims->size() == 2;
  if (is_linear(layer)) {
    return write_linear(layer.in, layer.out, x, layer.rank == 0 && two_axes);
  }
  if (layer.in_layout == Layout::channels_last)
    x = move_channels(x, layer.rank, Layout::channels_first);
  if (layer.flat && covers(layer, *source_)) {
    x = node("Flatten", {x}, {onnx::Attribute::of("axis", std::int64_t{1})});
    Index in = layer.in;
    for (const Index extent : layer.kernel) in *= extent;
    return write_linear(in, layer.out, x, true);
  }
  x = layer.transposed ? write_conv_transpose(layer, x) : write_conv(layer, x);
  if (layer.flat) {
    node("Flatten", {x}, {onnx::Attribute::of("axis", std::int64_t{1})});
  } else if (layer.out_layout == Layout::channels_last) {
    move_channels(x, layer.rank, Layout::channels_last);
  }
}

std::vector<std::string> Rewriter::inputs_of(const std::string& x, const Dims& weight) {
  std::vector<std::string> inputs = {x, constant(".weight", weight, weight_)};
  if (!bias_.empty()) inputs.push_back(constant(".bias", {std::ssize(bias_)}, bias_));
  return inputs;
}

void Rewriter::write_linear(Index in, Index out, const std::string& x, bool gemm) {
  if (gemm && (!bias_.empty() || graph_.opset() >= 11)) {
    node("Gemm", inputs_of(x, {out, in}), {onnx::Attribute::of("transB", std::int64_t{1})});
    return;
  }
  std::vector<double> columns(weight_.size());
  for (Index o = 0; o < out; ++o) {
    for (Index i = 0; i < in; ++i) {
      columns[static_cast<std::size_t>(i * out + o)] =
          weight_[static_cast<std::size_t>(o * in + i)];
    }
  }
  const std::string product = node("MatMul", {x, constant(".weight", {in, out}, columns)});
  if (!bias_.empty()) node("Add", {product, constant(".bias", {out}, bias_)});
}

std::string Rewriter::write_conv_transpose(const NewLayer& layer, const std::string& x) {
  Dims ends = layer.pads_end, extra(ends.size(), 0), weight = {layer.in, layer.out / layer.groups};
  for (std::size_t axis = 0; axis < ends.size(); ++axis) {
    extra[axis] = std::max<Index>(-ends[axis], 0);
    ends[axis] = std::max<Index>(ends[axis], 0);
  }
  Dims pads = layer.pads_begin;
  pads.insert(pads.end(), ends.begin(), ends.end());
  weight.insert(weight.end(), layer.kernel.begin(), layer.kernel.end());
  return node("ConvTranspose", inputs_of(x, weight),
              {onnx::Attribute::of("dilations", layer.dilations),
               onnx::Attribute::of("group", layer.groups),
               onnx::Attribute::of("kernel_shape", layer.kernel),
               onnx::Attribute::of("output_padding", extra), onnx::Attribute::of("pads", pads),
               onnx::Attribute::of("strides", layer.strides)});
}

std::string Rewriter::write_pad(const Dims& begin, const Dims& end, const std::string& x) {
  Dims pads = {0, 0};
  pads.insert(pads.end(), begin.begin(), begin.end());
  pads.insert(pads.end(), {0, 0});
  pads.insert(pads.end(), end.begin(), end.end());
  if (graph_.opset() >= 11) return node("Pad", {x, constant(".pads", pads)});
  return node("Pad", {x}, {onnx::Attribute::of("pads", pads)});
}

std::string Rewriter::write_conv(const NewLayer& layer, std::string x) {
  Dims begin = layer.pads_begin, end = layer.pads_end;
  const auto is_crop = [](Index pad) { return pad < 0; };
  if (std::ranges::any_of(begin, is_crop) || std::ranges::any_of(end, is_crop)) {
    // Conv has no negative pads. What one side adds to a small map, the other may take away, so
    // that comes first.
    Dims crops_begin, crops_end;
    bool both = false;
    for (std::size_t axis = 0; axis < begin.size(); ++axis) {
      both = both || (std::min(begin[axis], end[axis]) < 0 && std::max(begin[axis], end[axis]) > 0);
      crops_begin.push_back(std::min<Index>(begin[axis], 0));
      crops_end.push_back(std::min<Index>(end[axis], 0));
      begin[axis] -= crops_begin[axis];
      end[axis] -= crops_end[axis];
    }
    if (both) {
      x = write_pad(begin, end, x);
      std::ranges::fill(begin, 0);
      std::ranges::fill(end, 0);
    }
    x = write_pad(crops_begin, crops_end, x);
  }
  Dims pads = begin;
  pads.insert(pads.end(), end.begin(), end.end());
  Dims weight = {layer.out, layer.in / layer.groups};
  weight.insert(weight.end(), layer.kernel.begin(), layer.kernel.end());
  return node("Conv", inputs_of(x, weight),
              {onnx::Attribute::of("dilations", layer.dilations),
               onnx::Attribute::of("group", layer.groups),
               onnx::Attribute::of("kernel_shape", layer.kernel), onnx::Attribute::of("pads", pads),
               onnx::Attribute::of("strides", layer.strides)});
}

void Rewriter::remove_dead() {
  for (int n = static_cast<int>(removed_.size()) - 1; n >= 0; --n) {
    if (removed(n)) continue;
    const onnx::Node& each = graph_.node(n);
    bool used = each.outputs.empty();
    for (std::size_t o = 0; o < each.outputs.size() && !used; ++o) {
      const int tensor = graph_.output(n, o);
      if (tensor < 0) continue;
      const GraphTensor& written = graph_[tensor];
      used = written.escapes || written.consumers.empty() ||
             std::ranges::any_of(written.consumers, [&](int node) { return !removed(node); }) ||
             sources_.contains(tensor);
    }
    if (!used) removed_[static_cast<std::size_t>(n)] = true;
  }
}

}  // namespace tool
