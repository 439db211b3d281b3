// SPDX-License-Identifier: Apache-2.0
#include "onnx/linear.hpp"

#include "text.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <set>
#include <utility>

namespace tool {

namespace {

using Kind = LinearNode::Kind;

bool is_float(onnx::DataType type) {
  return type == onnx::DataType::float32 || type == onnx::DataType::float64 ||
         type == onnx::DataType::float16 || type == onnx::DataType::bfloat16;
}

/// Of a tensor whose type may not be known.
bool may_be_float(onnx::DataType type) {
  return type == onnx::DataType::undefined || is_float(type);
}

/// Reads one node. Functions return none for what is not linear, having said why.
class NodeReader {
 public:
  NodeReader(const Graph& graph, int node, Flattenings flattenings, Budget& lists,
             std::string& reason)
      : graph_(graph),
        index_(node),
        node_(graph.node(node)),
        flattenings_(flattenings),
        lists_(lists),
        reason_(reason) {
    result_.nodes = {node};
    result_.operands = {graph.input(node, 0)};
    for (std::size_t o = 0; graph.output(node, o) >= 0; ++o)
      result_.outputs.push_back(graph.output(node, o));
  }

  std::optional<LinearNode> read() {
    if (!node_.domain.empty() && node_.domain != "ai.onnx")
      return no("of the domain " + in_quotes(node_.domain));
    const std::string& op = node_.op_type;
    if (graph_.input(index_, 0) < 0 || result_.outputs.empty()) return std::nullopt;
    if (op == "Identity") return identity();
    if (op == "Dropout") return dropout();
    if (op == "Cast") return cast();
    if (op == "Conv") return conv();
    if (op == "ConvTranspose") return conv_transpose();
    if (op == "BatchNormalization") return batch_norm();
    if (op == "Gemm") return gemm();
    if (op == "MatMul") return matmul();
    if (op == "Add" || op == "Sub" || op == "Mul" || op == "Div" || op == "Sum")
      return arithmetic();
    if (op == "Neg") return neg();
    if (op == "AveragePool") return average_pool();
    if (op == "GlobalAveragePool" || op == "ReduceMean") return mean();
    if (op == "Pad") return pad();
    if (op == "SpaceToDepth" || op == "DepthToSpace") return depth();
    if (op == "Resize" || op == "Upsample") return upsample();
    if (op == "Slice") return slice();
    if (op == "Split") return split();
    if (op == "Gather") return gather();
    if (op == "Concat") return concat();
    if (op == "Flatten" || op == "Reshape") return reshape();
    if (op == "Transpose") return transpose();
    return std::nullopt;
  }

 private:
  std::optional<LinearNode> no(const std::string& reason) {
    reason_ = reason;
    return std::nullopt;
  }
  [[noreturn]] void wrong(const std::string& what) const {
    throw concertina::FormatError(graph_.model().origin + ": " + describe(graph_, index_) + ": " +
                                  what);
  }

  const std::optional<Dims>& dims(std::size_t input = 0) const {
    static const std::optional<Dims> none;
    const int tensor = graph_.input(index_, input);
    return tensor < 0 ? none : graph_[tensor].dims;
  }
  int rank(std::size_t input = 0) const {
    return dims(input) ? static_cast<int>(dims(input)->size()) : -1;
  }
  /// The constant, where it holds elements that a layer can have.
  const onnx::Tensor* weights(std::size_t input) {
    const onnx::Tensor* tensor = graph_.constant(index_, input);
    if (!tensor || !is_float(tensor->type)) return nullptr;
    result_.type = tensor->type;
    return tensor;
  }
  bool left_out(std::size_t input) const { return graph_.input(index_, input) < 0; }

  void channels_first() { result_.in = result_.out = Layout::channels_first; }

  /// Channels along an axis of a tensor of this rank; none where the axis is neither.
  static std::optional<Layout> layout_of(Index axis, int rank) {
    if (axis < 0) axis += rank;
    if (axis == 1 && rank == 2) return Layout::channels_first;
    if (axis == 1) return Layout::channels_first;
    if (axis == rank - 1) return Layout::channels_last;
    return std::nullopt;
  }
  void set_layout(Layout layout) { result_.in = result_.out = layout; }

  Index extent_of_channels(Layout layout, std::size_t input = 0) const {
    if (!dims(input) || dims(input)->size() < 2) return unknown;
    return layout == Layout::channels_first ? (*dims(input))[1] : dims(input)->back();
  }

  std::optional<LinearNode> identity() { return result_; }

  std::optional<LinearNode> dropout() {
    if (node_.outputs.size() > 1 && !node_.outputs[1].empty()) return no("its mask is an output");
    if (!left_out(2)) {
      const onnx::Tensor* training = graph_.constant(index_, 2);
      if (!training || training->type != onnx::DataType::boolean ||
          training->values<bool>() != std::vector{false}) {
        return no("it may be in training mode");
      }
    }
    return result_;
  }

  std::optional<LinearNode> cast() {
    const auto to = static_cast<onnx::DataType>(node_.integer("to", 0));
    if (graph_.input(index_, 0) < 0 || graph_[graph_.input(index_, 0)].type != to)
      return no("it changes the type");
    return result_;
  }

  std::optional<LinearNode> windowed(Kind kind) {
    result_.weight = weights(1);
    if (!result_.weight) return no("its weight is not a constant");
    const auto& shape = result_.weight->dims;
    if (shape.size() < 3 || shape.size() > 5)
      return no("it has other than one to three spatial axes");
    if (!left_out(2) && !(result_.bias = weights(2))) return no("its bias is not a constant");
    result_.kind = kind;
    result_.spatial_axes = static_cast<int>(shape.size()) - 2;
    result_.groups = node_.integer("group", 1);
    result_.windows = windows_of(graph_, index_, Dims(shape.begin() + 2, shape.end()));
    channels_first();
    if (!result_.windows) return no("its padding (auto_pad) depends on a size that is not known");
    const Index groups = result_.groups;
    if (groups < 1 || shape[0] % groups != 0)
      wrong("group " + std::to_string(groups) + " does not divide " + std::to_string(shape[0]) +
            " channels");
    const Index out = kind == Kind::conv ? shape[0] : shape[1] * groups;
    const Index in = kind == Kind::conv ? shape[1] * groups : shape[0];
    if (result_.bias && (result_.bias->dims.size() != 1 || result_.bias->dims[0] != out)) {
      wrong("a bias of shape [" + to_text(result_.bias->dims) + "] for " + std::to_string(out) +
            " channels");
    }
    const Index given = extent_of_channels(Layout::channels_first);
    if (given != unknown && given != in) {
      wrong("its weight reads " + std::to_string(in) + " channels, its input has " +
            std::to_string(given));
    }
    return result_;
  }

  std::optional<LinearNode> conv() { return windowed(Kind::conv); }

  std::optional<LinearNode> conv_transpose() {
    auto found = windowed(Kind::conv_transpose);
    if (!found) return found;
    const auto axes = static_cast<std::size_t>(found->spatial_axes);
    if (node_.attribute("output_shape")) return no("it states output_shape");
    found->output_padding = node_.integers("output_padding", Dims(axes, 0));
    if (found->output_padding.size() != axes)
      wrong("output_padding for other than its spatial axes");
    return found;
  }

  std::optional<LinearNode> batch_norm() {
    if (node_.integer("training_mode", 0) != 0) return no("it is in training mode");
    for (std::size_t o = 1; o < node_.outputs.size(); ++o) {
      if (!node_.outputs[o].empty()) return no("it also writes its statistics, as in training");
    }
    if (node_.integer("spatial", 1) == 0)
      return no("its statistics are not one a channel (spatial 0)");
    for (std::size_t i = 1; i < 5; ++i) {
      result_.statistics.push_back(weights(i));
      if (!result_.statistics.back()) return no("its statistics are not constants");
      if (result_.statistics.back()->dims != result_.statistics.front()->dims ||
          result_.statistics.back()->dims.size() != 1) {
        wrong("statistics of other shapes than [channels]");
      }
    }
    result_.kind = Kind::batch_norm;
    // Its statistics may be of a wider type than what it normalises.
    const int input = graph_.input(index_, 0);
    result_.type = input < 0 ? onnx::DataType::undefined : graph_[input].type;
    result_.eps = static_cast<double>(node_.real("epsilon", 1e-5F));
    channels_first();
    if (rank() >= 0) result_.spatial_axes = rank() - 2;
    result_.channels = result_.statistics.front()->dims[0];
    return result_;
  }

  std::optional<LinearNode> gemm() {
    if (node_.integer("transA", 0) != 0) return no("transA is set");
    result_.weight = weights(1);
    if (!result_.weight) return no("its weight is not a constant");
    if (result_.weight->dims.size() != 2) wrong("a weight of other than two axes");
    result_.transposed = node_.integer("transB", 0) == 0;
    result_.alpha = static_cast<double>(node_.real("alpha", 1));
    result_.beta = static_cast<double>(node_.real("beta", 1));
    result_.kind = Kind::linear;
    result_.spatial_axes = 0;
    channels_first();
    const Index out = result_.weight->dims[result_.transposed ? 1 : 0];
    const Index in = result_.weight->dims[result_.transposed ? 0 : 1];
    result_.channels = in;
    const Index given = extent_of_channels(Layout::channels_first);
    if (given != unknown && given != in) {
      wrong("its weight reads " + std::to_string(in) + " channels, its input has " +
            std::to_string(given));
    }
    if (!left_out(2)) {
      result_.bias = weights(2);
      if (!result_.bias) return no("its bias is not a constant");
      const auto& shape = result_.bias->dims;
      const bool one = result_.bias->numel() == 1 && shape.size() <= 2;
      const bool row = !shape.empty() && shape.back() == out &&
                       (shape.size() == 1 || (shape.size() == 2 && shape[0] == 1));
      if (!one && !row) return no("its bias differs from row to row");
    }
    take_in_flatten();
    return result_;
  }

  std::optional<LinearNode> matmul() {
    result_.weight = weights(1);
    if (!result_.weight) return no("its second operand is not a constant");
    if (result_.weight->dims.size() != 2) return no("its second operand is no matrix");
    if (rank() < 2) return no("the rank of its input is not known");
    result_.kind = Kind::linear;
    result_.transposed = true;
    result_.in = result_.out = rank() == 2 ? Layout::channels_first : Layout::channels_last;
    if (rank() == 2) result_.spatial_axes = 0;
    const Index given = dims()->back();
    if (given != unknown && given != result_.weight->dims[0]) {
      wrong("its weight reads " + std::to_string(result_.weight->dims[0]) +
            " channels, its input has " + std::to_string(given));
    }
    result_.channels = result_.weight->dims[0];
    if (rank() == 2) take_in_flatten();
    return result_;
  }

  /// A constant that broadcasts along the channels of a tensor of `rank` axes: one number for all
  /// (then of either layout), or one a channel.
  struct PerChannel {
    std::vector<double> values;
    std::optional<Layout> layout;
  };
  std::optional<PerChannel> per_channel(const onnx::Tensor& tensor, int rank) const {
    if (static_cast<int>(tensor.dims.size()) > rank || tensor.numel() == 0) return std::nullopt;
    if (tensor.numel() == 1) return PerChannel{tensor.values<double>(), std::nullopt};
    std::optional<int> axis;
    const int offset = rank - static_cast<int>(tensor.dims.size());
    for (std::size_t i = 0; i < tensor.dims.size(); ++i) {
      if (tensor.dims[i] == 1) continue;
      if (axis) return std::nullopt;
      axis = static_cast<int>(i) + offset;
    }
    if (!axis) return std::nullopt;
    const auto layout = layout_of(*axis, rank);
    if (!layout || *axis == 0) return std::nullopt;
    return PerChannel{tensor.values<double>(), layout};
  }

  std::optional<LinearNode> arithmetic() {
    const std::string& op = node_.op_type;
    std::vector<std::size_t> variables;
    std::size_t constants = 0;
    for (std::size_t i = 0; i < node_.inputs.size(); ++i) {
      if (weights(i)) {
        ++constants;
      } else {
        variables.push_back(i);
      }
    }
    if (variables.empty()) return std::nullopt;
    const int tensor = graph_.input(index_, variables.front());
    if (tensor < 0 || !may_be_float(graph_[tensor].type)) return std::nullopt;
    if (constants == 0) {
      if (op == "Mul" || op == "Div")
        return variables.size() == 2 ? no("both operands vary") : std::nullopt;
      return sum(variables);
    }
    if (constants > 1 || variables.size() != 1) return no("it has several constants");
    const std::size_t at = variables.front(), other = at == 0 ? 1 : 0;
    result_.operands = {tensor};
    if (op == "Div" && at == 1) return no("it divides by its input");
    if (rank(at) < 2) return no("the rank of its input is not known");
    const auto constant = per_channel(*weights(other), rank(at));
    if (!constant) return no("its constant is not one number a channel");
    result_.kind = Kind::channel_scale;
    if (constant->layout) set_layout(*constant->layout);
    if (constant->values.size() > 1) {
      const Index given = extent_of_channels(*constant->layout, at);
      if (given == unknown) return no("the number of its channels is not known");
      if (given == 1) return no("it broadcasts its input");
    }
    std::vector<double> values = constant->values;
    if (op == "Mul" || op == "Div") {
      if (op == "Div") {
        for (double& value : values) {
          if (value == 0) return no("it divides by zero");
          value = 1 / value;
        }
      }
      result_.scale = std::move(values);
    } else {
      if (op == "Sub" && at == 0) {
        for (double& value : values) value = -value;
      }
      if (op == "Sub" && at == 1) result_.scale = {-1};
      result_.shift = std::move(values);
    }
    result_.channels = channels_or_unknown(constant->layout, at,
                                           std::max(result_.scale.size(), result_.shift.size()));
    return result_;
  }

  Index channels_or_unknown(const std::optional<Layout>& layout, std::size_t input,
                            std::size_t elements) const {
    if (elements > 1) return static_cast<Index>(elements);
    if (layout) return extent_of_channels(*layout, input);
    return unknown;
  }

  std::optional<LinearNode> sum(const std::vector<std::size_t>& variables) {
    result_.kind = Kind::sum;
    result_.operands.clear();
    for (const std::size_t i : variables) {
      const int tensor = graph_.input(index_, i);
      if (tensor < 0) return std::nullopt;
      if (rank(i) < 2 || rank(i) != rank(variables.front()))
        return no("its operands may broadcast");
      result_.operands.push_back(tensor);
      result_.signs.push_back(i == 1 && node_.op_type == "Sub" ? -1 : 1);
    }
    for (std::size_t axis = 0; axis < dims(0)->size(); ++axis) {
      std::set<Index> extents;
      for (const std::size_t i : variables) extents.insert((*dims(i))[axis]);
      if (extents.size() > 1 && extents.contains(1)) return no("it broadcasts an operand");
    }
    return result_;
  }

  std::optional<LinearNode> neg() {
    const int tensor = graph_.input(index_, 0);
    if (tensor < 0 || !may_be_float(graph_[tensor].type)) return std::nullopt;
    result_.kind = Kind::channel_scale;
    result_.scale = {-1};
    return result_;
  }

  std::optional<LinearNode> average_pool() {
    const Dims kernel = node_.integers("kernel_shape", {});
    if (kernel.empty() || kernel.size() > 3)
      return no("it has other than one to three spatial axes");
    result_.kind = Kind::average_pool;
    result_.spatial_axes = static_cast<int>(kernel.size());
    result_.windows = windows_of(graph_, index_, kernel);
    channels_first();
    if (!result_.windows) return no("its padding (auto_pad) depends on a size that is not known");
    if (result_.windows->dilations != Dims(kernel.size(), 1)) return no("its windows are dilated");
    const auto padded = [](Index pad) { return pad != 0; };
    const bool pads = std::ranges::any_of(result_.windows->pads_begin, padded) ||
                      std::ranges::any_of(result_.windows->pads_end, padded);
    if (pads && node_.integer("count_include_pad", 0) == 0) {
      return no("windows at the border divide by fewer (count_include_pad 0)");
    }
    if (node_.integer("ceil_mode", 0) != 0) {
      if (rank() != result_.spatial_axes + 2) return no("ceil_mode at a size that is not known");
      for (std::size_t axis = 0; axis < kernel.size(); ++axis) {
        const Index extent = (*dims())[axis + 2];
        if (extent == unknown) return no("ceil_mode at a size that is not known");
        const Windows& w = *result_.windows;
        const Index span = extent + w.pads_begin[axis] + w.pads_end[axis] -
                           (w.dilations[axis] * (w.kernel[axis] - 1) + 1);
        if (span % w.strides[axis] != 0) return no("ceil_mode: its last windows hang over");
      }
    }
    result_.channels = extent_of_channels(Layout::channels_first);
    if (result_.channels == unknown) return no("the number of its channels is not known");
    return result_;
  }

  /// The mean over all spatial axes, of a size that is known.
  std::optional<LinearNode> mean() {
    if (rank() < 3 || rank() > 5) return no("it has other than one to three spatial axes");
    const Dims size(dims()->begin() + 2, dims()->end());
    if (node_.op_type == "ReduceMean") {  // of integers it rounds
      if (!is_float(graph_[graph_.input(index_, 0)].type)) {
        return no("its elements are not known to be floating-point numbers");
      }
      auto axes = node_.attribute("axes") ? std::optional(node_.integers("axes", {}))
                                          : graph_.integers(index_, 1);
      if (!axes) return no("its axes are not constants");
      std::set<Index> reduced;
      for (const Index axis : *axes) reduced.insert(axis < 0 ? axis + rank() : axis);
      std::set<Index> spatial;
      for (int axis = 2; axis < rank(); ++axis) spatial.insert(axis);
      if (reduced != spatial) return no("it is not over all spatial axes");
      result_.flat = node_.integer("keepdims", 1) == 0;
    }
    if (std::ranges::any_of(size, [](Index extent) { return extent < 1; })) {
      return no("the size that it is taken over is not known");
    }
    result_.kind = Kind::average_pool;
    result_.spatial_axes = rank() - 2;
    const Dims ones(size.size(), 1), zeros(size.size(), 0);
    result_.windows = Windows{
        .kernel = size, .strides = ones, .dilations = ones, .pads_begin = zeros, .pads_end = zeros};
    result_.channels = (*dims())[1];
    channels_first();
    if (result_.channels == unknown) return no("the number of its channels is not known");
    return result_;
  }

  std::optional<LinearNode> pad() {
    if (node_.text("mode", "constant") != "constant") return no("it does not pad with zeros");
    if (node_.real("value", 0) != 0) return no("it does not pad with zeros");
    if (!left_out(2)) {
      const onnx::Tensor* value = weights(2);
      if (!value || value->numel() != 1 || value->values<double>()[0] != 0)
        return no("it does not pad with zeros");
    }
    const auto pads = node_.attribute("pads") ? std::optional(node_.integers("pads", {}))
                                              : graph_.integers(index_, 1);
    if (!pads) return no("its pads are not constants");
    if (!left_out(3)) return no("it names axes");
    const std::size_t axes = pads->size() / 2;
    if (pads->size() % 2 != 0 || axes < 3 || axes > 5)
      return no("it has other than one to three spatial axes");
    if ((*pads)[0] != 0 || (*pads)[1] != 0 || (*pads)[axes] != 0 || (*pads)[axes + 1] != 0) {
      return no("it pads batch or channels");
    }
    const Dims ones(axes - 2, 1);
    result_.kind = Kind::pad;
    result_.spatial_axes = static_cast<int>(axes) - 2;
    const auto at = [&](std::size_t i) { return pads->begin() + static_cast<std::ptrdiff_t>(i); };
    result_.windows = Windows{.kernel = ones,
                              .strides = ones,
                              .dilations = ones,
                              .pads_begin = Dims(at(2), at(axes)),
                              .pads_end = Dims(at(axes + 2), pads->end())};
    channels_first();
    result_.channels = extent_of_channels(Layout::channels_first);
    if (result_.channels == unknown) return no("the number of its channels is not known");
    return result_;
  }

  std::optional<LinearNode> depth() {
    const Index factor = node_.integer("blocksize", 0);
    if (factor < 1) wrong("a blocksize of " + std::to_string(factor));
    if (factor > 256) return no("its blocks are too large");
    result_.kind = node_.op_type == "SpaceToDepth" ? Kind::space_to_depth : Kind::depth_to_space;
    result_.spatial_axes = 2;
    result_.factors = {factor, factor};
    result_.positions_first = node_.text("mode", "DCR") != "CRD";
    result_.channels = extent_of_channels(Layout::channels_first);
    channels_first();
    return result_;
  }

  /// A Resize that repeats every position a whole number of times.
  std::optional<LinearNode> upsample() {
    if (node_.text("mode", "nearest") != "nearest") return no("it interpolates");
    if (rank() < 3 || rank() > 5) return no("it has other than one to three spatial axes");
    const bool old = node_.op_type == "Upsample" || graph_.opset() < 11;
    std::vector<double> scales;
    if (const auto* attribute = node_.attribute("scales"))
      scales.assign(attribute->floats.begin(), attribute->floats.end());
    if (const onnx::Tensor* given = weights(old ? 1 : 2)) scales = given->values<double>();
    std::vector<std::size_t> axes(dims()->size());
    std::iota(axes.begin(), axes.end(), std::size_t{0});
    if (const auto* attribute = node_.attribute("axes")) {
      axes.clear();
      for (const std::int64_t axis : attribute->ints) {
        axes.push_back(static_cast<std::size_t>(axis < 0 ? axis + std::ssize(*dims()) : axis));
        if (axes.back() >= dims()->size()) return no("an axis that it has not");
      }
    }
    const auto sizes = graph_.integers(index_, 3);
    if (scales.empty() && sizes && sizes->size() == axes.size()) {
      if (node_.text("keep_aspect_ratio_policy", "stretch") != "stretch") {
        return no("it keeps the aspect ratio");
      }
      for (std::size_t i = 0; i < sizes->size(); ++i) {
        scales.push_back(static_cast<double>((*sizes)[i]) /
                         static_cast<double>((*dims())[axes[i]]));
      }
    }
    if (scales.size() == axes.size()) {
      std::vector<double> of_all(dims()->size(), 1.0);
      for (std::size_t i = 0; i < axes.size(); ++i) of_all[axes[i]] = scales[i];
      scales = std::move(of_all);
    }
    result_.type = onnx::DataType::undefined;  // its scales are float whatever it reads
    if (scales.size() != dims()->size()) return no("its scales are not constants, one an axis");
    for (const double scale : scales) {
      if (!(scale >= 1 && scale <= 256) || scale != std::floor(scale))
        return no("its scales are not whole");
      result_.factors.push_back(static_cast<Index>(scale));
    }
    if (result_.factors[0] != 1 || result_.factors[1] != 1) return no("it scales the channels");
    result_.factors.erase(result_.factors.begin(), result_.factors.begin() + 2);
    const std::string reads =
        node_.text("coordinate_transformation_mode", old ? "asymmetric" : "half_pixel") + " " +
        node_.text("nearest_mode", old ? "floor" : "round_prefer_floor");
    // Of a scale s, output i is to be input i / s, rounded down.
    static const std::set<std::string, std::less<>> whole = {
        "asymmetric floor",
        "half_pixel round_prefer_floor",
        "half_pixel round_prefer_ceil",
        "half_pixel_symmetric round_prefer_floor",
        "half_pixel_symmetric round_prefer_ceil",
        "pytorch_half_pixel round_prefer_floor",
        "pytorch_half_pixel round_prefer_ceil",
        "tf_half_pixel_for_nn floor"};
    if (!whole.contains(reads))
      return no("it does not repeat every position as often (" + reads + ")");
    result_.kind = Kind::upsample;
    result_.spatial_axes = rank() - 2;
    result_.channels = extent_of_channels(Layout::channels_first);
    channels_first();
    return result_;
  }

  /// Takes the memory for a list of channels from the budget of all; false where there is too
  /// little.
  bool can_list(Index channels) {
    try {
      const double bytes = static_cast<double>(channels) * sizeof(Index);
      lists_.take("its list of channels", bytes, 0);
      lists_.kept += bytes;
      return true;
    } catch (const BudgetError& error) {
      reason_ = error.what();
      return false;
    }
  }

  std::optional<LinearNode> select(Index axis, std::vector<Index> source) {
    const auto layout = layout_of(axis, rank());
    if (!layout) return no("it is not along the channels");
    set_layout(*layout);
    result_.channels = extent_of_channels(*layout);
    result_.kind = Kind::channel_select;
    result_.source = std::move(source);
    if (result_.source.empty()) return no("it selects nothing");
    return result_;
  }

  std::optional<LinearNode> slice() {
    if (!dims()) return no("the rank of its input is not known");
    const bool old = node_.attribute("starts") != nullptr;
    const auto list = [&](const char* name, std::size_t i) {
      return old ? (node_.attribute(name) ? std::optional(node_.integers(name, {})) : std::nullopt)
                 : graph_.integers(index_, i);
    };
    const auto starts = list("starts", 1), ends = list("ends", 2), axes = list("axes", 3);
    const auto steps = old ? std::nullopt : graph_.integers(index_, 4);
    const bool vary = (!axes && !left_out(3)) || (!steps && !left_out(4));
    if (!starts || !ends || vary || starts->size() != 1 || ends->size() != 1)
      return no("it is not along one axis, by constants");
    const Index axis = axes && !axes->empty() ? axes->front() : 0,
                step = steps && !steps->empty() ? steps->front() : 1;
    const Index at = axis < 0 ? axis + rank() : axis;
    if (at < 0 || at >= rank()) wrong("axis " + std::to_string(axis) + " of " + to_text(*dims()));
    const Index extent = (*dims())[static_cast<std::size_t>(at)];
    if (extent == unknown || step < 1) return no("it is not of known channels");
    const auto place = [&](Index to) {
      return std::clamp<Index>(to < 0 ? to + extent : to, 0, extent);
    };
    const Index begin = place(starts->front()), end = place(ends->front());
    const Index count = begin < end ? (end - begin - 1) / step + 1 : 0;
    if (!layout_of(at, rank())) return no("it is not along the channels");
    if (!can_list(count)) return std::nullopt;
    std::vector<Index> source(static_cast<std::size_t>(count));
    for (Index i = 0; i < count; ++i) source[static_cast<std::size_t>(i)] = begin + i * step;
    return select(at, std::move(source));
  }

  std::optional<LinearNode> split() {
    if (!dims()) return no("the rank of its input is not known");
    const Index axis = node_.integer("axis", 0);
    const auto layout = layout_of(axis, rank());
    if (!layout || axis == 0) return no("it is not along the channels");
    Index begin = 0;
    std::vector<std::vector<Index>> sources;
    for (std::size_t o = 0; o < node_.outputs.size(); ++o) {
      const int output = graph_.output(index_, o);
      if (output < 0 || !graph_[output].dims) return no("its parts are not known");
      const Dims& part = *graph_[output].dims;
      const Index count = part[static_cast<std::size_t>(axis < 0 ? axis + rank() : axis)];
      if (count < 1) return no("its parts are not known");
      if (!can_list(count)) return std::nullopt;
      sources.emplace_back(static_cast<std::size_t>(count));
      std::iota(sources.back().begin(), sources.back().end(), begin);
      begin += count;
    }
    if (extent_of_channels(*layout) != begin) return no("its parts are not known");
    auto found = select(axis, sources.front());
    if (found) found->more_sources.assign(sources.begin() + 1, sources.end());
    return found;
  }

  std::optional<LinearNode> gather() {
    const onnx::Tensor* const list = graph_.constant(index_, 1);
    if (!dims() || !list) return no("its indices are not constants");
    if (list->dims.size() != 1) return no("its indices are no list");
    const Index axis = node_.integer("axis", 0);
    const auto layout = layout_of(axis, rank());
    if (!layout || axis == 0) return no("it is not along the channels");
    if (!can_list(list->numel())) return std::nullopt;
    auto indices = graph_.integers(index_, 1);
    if (!indices) return no("its indices are not constants");
    const Index extent = extent_of_channels(*layout);
    for (Index& c : *indices) {
      if (extent == unknown) return no("it is not of known channels");
      if (c < 0) c += extent;
      if (c < 0 || c >= extent)
        wrong("index " + std::to_string(c) + " of " + std::to_string(extent) + " channels");
    }
    return select(axis, std::move(*indices));
  }

  std::optional<LinearNode> concat() {
    const int first = graph_.input(index_, 0);
    if (first < 0 || !may_be_float(graph_[first].type)) return std::nullopt;
    if (!dims()) return no("the rank of its operands is not known");
    const Index axis = node_.integer("axis", 1);
    const auto layout = layout_of(axis, rank());
    if (!layout || axis == 0 || rank() == 1) return no("it is not along the channels");
    set_layout(*layout);
    result_.kind = Kind::concat;
    result_.operands.clear();
    for (std::size_t i = 0; i < node_.inputs.size(); ++i) {
      const int tensor = graph_.input(index_, i);
      if (tensor < 0 || graph_[tensor].constant) return no("an operand is a constant");
      result_.operands.push_back(tensor);
    }
    return result_;
  }

  /// Flatten, or a Reshape that flattens channels and positions of a known size. It is the identity
  /// where there is one position; otherwise only a linear layer that follows can take it in.
  std::optional<LinearNode> reshape() {
    if (node_.op_type == "Reshape") {
      if (auto found = shuffle()) return found;
    }
    const std::optional<Dims> size = flattened();
    if (!size) return no("it is no flattening of channels and positions of a known size");
    if (std::ranges::any_of(*size, [](Index extent) { return extent != 1; })) {
      return no("only a linear layer right after it can take it in");
    }
    result_.spatial_axes = rank() - 2;
    result_.flat = true;
    channels_first();
    return result_;
  }

  /// The spatial size that this node flattens; none where it does something else.
  std::optional<Dims> flattened() const {
    if (!dims() || rank() < 3 || rank() > 5) return std::nullopt;
    const Dims size(dims()->begin() + 2, dims()->end());
    Index elements = (*dims())[1];
    for (const Index extent : size)
      elements = elements < 1 || extent < 1 ? unknown : elements * extent;
    if (elements < 1) return std::nullopt;
    if (node_.op_type == "Flatten") {
      if (node_.integer("axis", 1) != 1) return std::nullopt;
      return size;
    }
    const auto shape = graph_.integers(index_, 1);
    const Index batch = (*dims())[0];
    if (!shape || shape->size() != 2) return std::nullopt;
    const bool keeps_batch = ((*shape)[0] == 0 && node_.integer("allowzero", 0) == 0) ||
                             (batch != unknown && (*shape)[0] == batch);
    const bool takes_rest = (*shape)[1] == elements;
    if (takes_rest ? keeps_batch || (*shape)[0] == -1 : keeps_batch && (*shape)[1] == -1)
      return size;
    return std::nullopt;
  }

  /// Takes in the flatten that makes the operand, where nothing else reads that.
  void take_in_flatten() {
    const int tensor = result_.operands.front();
    if (tensor < 0 || flattenings_ == Flattenings::apart) return;
    const GraphTensor& flat = graph_[tensor];
    if (flat.producer < 0 || flat.consumers.size() != 1 || flat.escapes) return;
    const onnx::Node& maker = graph_.node(flat.producer);
    if (!maker.domain.empty() || (maker.op_type != "Flatten" && maker.op_type != "Reshape")) return;
    std::string unused;
    const NodeReader flatten(graph_, flat.producer, flattenings_, lists_, unused);
    const auto size = flatten.flattened();
    if (!size) return;
    result_.size = *size;
    result_.spatial_axes = static_cast<int>(size->size());
    result_.flat = true;
    result_.channels = (*flatten.dims())[1];
    result_.operands = {graph_.input(flat.producer, 0)};
    result_.nodes = {flat.producer, index_};
  }

  /// Reshape [n, g, c / g, ...], Transpose of axes 1 and 2, Reshape back: this node is the last.
  std::optional<LinearNode> shuffle() {
    const auto only = [&](int tensor, const char* op) {
      if (tensor < 0) return -1;
      const GraphTensor& t = graph_[tensor];
      const bool fits = t.producer >= 0 && t.consumers.size() == 1 && !t.escapes &&
                        graph_.node(t.producer).op_type == op &&
                        graph_.node(t.producer).domain.empty();
      return fits ? t.producer : -1;
    };
    const int transpose = only(graph_.input(index_, 0), "Transpose");
    const int first = transpose < 0 ? -1 : only(graph_.input(transpose, 0), "Reshape");
    if (first < 0) return std::nullopt;
    const int in = graph_.input(first, 0), seen = graph_.output(first), out = graph_.output(index_);
    if (in < 0 || !graph_[in].dims || !graph_[seen].dims || !graph_[out].dims) return std::nullopt;
    const Dims &whole = *graph_[in].dims, &cut = *graph_[seen].dims, &back = *graph_[out].dims;
    if (whole.size() < 3 || whole.size() > 5 || cut.size() != whole.size() + 1 ||
        back.size() != whole.size()) {
      return std::nullopt;
    }
    Dims perm(cut.size());
    std::iota(perm.begin(), perm.end(), Index{0});
    std::swap(perm[1], perm[2]);
    if (graph_.node(transpose).integers("perm", {}) != perm) return std::nullopt;
    // One extent alone may be unknown: the product fixes it.
    if (cut[1] < 1 || cut[2] < 1 || whole[1] % cut[1] != 0 || whole[1] / cut[1] != cut[2] ||
        back[1] != whole[1]) {
      return std::nullopt;
    }
    for (std::size_t axis = 0; axis < whole.size(); ++axis) {
      if (axis == 1) continue;
      const Index a = whole[axis], b = cut[axis == 0 ? 0 : axis + 1], c = back[axis];
      if (a != b || b != c || (a == unknown && axis != 0)) return std::nullopt;
    }
    if (!can_list(whole[1])) return std::nullopt;
    result_.kind = Kind::channel_select;
    result_.operands = {in};
    result_.nodes = {first, transpose, index_};
    result_.spatial_axes = static_cast<int>(whole.size()) - 2;
    result_.channels = whole[1];
    channels_first();
    for (Index i = 0; i < cut[2]; ++i) {
      for (Index group = 0; group < cut[1]; ++group) result_.source.push_back(group * cut[2] + i);
    }
    return result_;
  }

  std::optional<LinearNode> transpose() {
    if (!dims() || rank() < 3 || rank() > 5)
      return no("it is not between channels first and channels last");
    Dims to_last = {0}, to_first = {0, rank() - 1};
    for (Index axis = 2; axis < rank(); ++axis) to_last.push_back(axis);
    to_last.push_back(1);
    for (Index axis = 1; axis < rank() - 1; ++axis) to_first.push_back(axis);
    const Dims perm = node_.integers("perm", {});
    if (perm != to_last && perm != to_first)
      return no("it is not between channels first and channels last");
    result_.kind = Kind::move_channels;
    result_.spatial_axes = rank() - 2;
    // With one position axis both are the same permutation; the other operators decide.
    if (perm != to_first) {
      result_.in = Layout::channels_first;
      result_.out = Layout::channels_last;
    } else if (perm != to_last) {
      result_.in = Layout::channels_last;
      result_.out = Layout::channels_first;
    }
    return result_;
  }

  const Graph& graph_;
  int index_;
  const onnx::Node& node_;
  Flattenings flattenings_;
  Budget& lists_;
  std::string& reason_;
  LinearNode result_;
};

}  // namespace

std::optional<LinearNode> linear_node(const Graph& graph, int node, Flattenings flattenings,
                                      Budget& lists, std::string& reason) {
  reason.clear();
  if (!graph.node(node).captured.empty()) {
    reason = "it has graphs of its own";
    return std::nullopt;
  }
  return NodeReader(graph, node, flattenings, lists, reason).read();
}

}  // namespace tool
