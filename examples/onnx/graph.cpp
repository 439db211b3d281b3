// SPDX-License-Identifier: Apache-2.0
#include "onnx/graph.hpp"

#include "onnx/data_types.hpp"
#include "onnx/evaluate.hpp"
#include "text.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <numeric>
#include <set>
#include <utility>

namespace tool {

namespace {

constexpr Index oldest_opset = 7;
// Multiply-adds that take as long as the evaluator of one node, and as a byte that it reads or
// makes.
constexpr double each_folded = 2e4, each_byte_read = 0.5, each_byte_folded = 2;
constexpr Index assumed_extent = 224;  // of a spatial axis, where an input does not say

[[noreturn]] void refuse(const onnx::Model& model, const std::string& what) {
  throw concertina::FormatError(model.origin + ": " + what);
}

Index product(std::span<const Index> extents) {
  Index result = 1;
  for (const Index extent : extents) {
    if (extent == unknown) return unknown;
    if (extent != 0 && result > (Index{1} << 62) / extent) return unknown;
    result *= extent;
  }
  return result;
}

/// Shapes of a node's outputs from those of its inputs; what it does not know stays unknown.
class ShapeInference {
 public:
  ShapeInference(const Graph& graph, int node, std::vector<std::optional<Dims>> inputs)
      : graph_(graph), index_(node), node_(graph.node(node)), in_(std::move(inputs)) {}

  static bool is_unary(const std::string& op) {
    static const std::set<std::string, std::less<>> unary = {"Abs",
                                                             "BatchNormalization",
                                                             "Cast",
                                                             "Ceil",
                                                             "Clip",
                                                             "Cos",
                                                             "Dropout",
                                                             "Elu",
                                                             "Erf",
                                                             "Exp",
                                                             "Floor",
                                                             "Gelu",
                                                             "HardSigmoid",
                                                             "HardSwish",
                                                             "Identity",
                                                             "InstanceNormalization",
                                                             "LRN",
                                                             "LayerNormalization",
                                                             "LeakyRelu",
                                                             "Log",
                                                             "LogSoftmax",
                                                             "LpNormalization",
                                                             "MeanVarianceNormalization",
                                                             "Mish",
                                                             "Neg",
                                                             "Not",
                                                             "PRelu",
                                                             "Reciprocal",
                                                             "Relu",
                                                             "Round",
                                                             "Selu",
                                                             "Sigmoid",
                                                             "Sign",
                                                             "Sin",
                                                             "Softmax",
                                                             "Softplus",
                                                             "Softsign",
                                                             "Sqrt",
                                                             "Swish",
                                                             "Tanh",
                                                             "ThresholdedRelu"};
    return unary.contains(op);
  }

  std::vector<std::optional<Dims>> outputs() const {
    const std::size_t count = node_.outputs.size();
    std::vector<std::optional<Dims>> result(count);
    if (count == 0 || !node_.domain.empty() || !is_ordinary()) return result;
    if (node_.op_type == "Split") return split();
    result[0] = first();
    return result;
  }

 private:
  using Shape = std::optional<Dims>;

  static constexpr Index limit = Index{1} << 30;  // products of two, and sums of such, fit

  static bool is_ordinary(Index number) { return -limit <= number && number <= limit; }

  /// Whether nothing of it can overflow; Slice clamps.
  bool is_ordinary() const {
    const auto all = [](const auto& numbers) {
      return std::ranges::all_of(numbers, [](Index number) { return is_ordinary(number); });
    };
    return std::ranges::all_of(in_, [&](const Shape& shape) { return !shape || all(*shape); }) &&
           (node_.op_type == "Slice" ||
            std::ranges::all_of(node_.attributes, [&](const onnx::Attribute& attribute) {
              return is_ordinary(attribute.i) && all(attribute.ints);
            }));
  }

  const Shape& in(std::size_t i) const {
    static const Shape none;
    return i < in_.size() ? in_[i] : none;
  }

  static bool is_elementwise(const std::string& op) {
    static const std::set<std::string, std::less<>> elementwise = {
        "Add", "Sub", "Mul", "Div", "Pow", "Sum", "Min", "Max", "Mean", "Where", "And", "Or"};
    return elementwise.contains(op);
  }

  Shape first() const {
    const std::string& op = node_.op_type;
    if (is_unary(op)) return in(0);
    if (is_elementwise(op)) return broadcast();
    if (op == "Conv") return convolution();
    if (op == "ConvTranspose") return transposed();
    if (op == "MaxPool" || op == "AveragePool") return pool();
    if (op == "GlobalAveragePool" || op == "GlobalMaxPool") return global_pool();
    if (op == "Gemm") return gemm();
    if (op == "MatMul") return matmul();
    if (op == "Concat") return concat();
    if (op == "Flatten") return flatten();
    if (op == "Reshape") return reshape();
    if (op == "Transpose") return transpose();
    if (op == "Pad") return pad();
    if (op == "Slice") return slice();
    if (op == "ReduceMean" || op == "ReduceSum" || op == "ReduceMax") return reduce();
    if (op == "Resize" || op == "Upsample") return resize();
    if (op == "DepthToSpace" || op == "SpaceToDepth") return depth_space();
    if (op == "Squeeze" || op == "Unsqueeze") return squeeze();
    if (op == "Gather") return gather();
    return std::nullopt;
  }

  Shape broadcast() const {
    Dims result;
    for (const Shape& shape : in_) {
      if (!shape) return std::nullopt;
      const std::size_t rank = std::max(result.size(), shape->size());
      Dims joined(rank, 1);
      for (std::size_t axis = 0; axis < rank; ++axis) {
        const auto extent = [&](const Dims& dims) {
          return axis + dims.size() < rank ? Index{1} : dims[axis + dims.size() - rank];
        };
        const Index a = extent(result), b = extent(*shape);
        joined[axis] = a == 1 ? b : b == 1 || a == b ? a : a == unknown ? b : a;
      }
      result = std::move(joined);
    }
    return result;
  }

  Dims window_output(const Dims& image, const Windows& windows, bool ceil_mode) const {
    Dims result;
    for (std::size_t axis = 0; axis < image.size(); ++axis) {
      if (image[axis] == unknown) {
        result.push_back(unknown);
        continue;
      }
      const Index span = image[axis] + windows.pads_begin[axis] + windows.pads_end[axis] -
                         (windows.dilations[axis] * (windows.kernel[axis] - 1) + 1);
      const Index stride = windows.strides[axis];
      Index count = span < 0 ? 0 : (ceil_mode ? (span + stride - 1) / stride : span / stride) + 1;
      // A window that would start in the padding at the end is none.
      if (ceil_mode && (count - 1) * stride >= image[axis] + windows.pads_begin[axis]) --count;
      result.push_back(count);
    }
    return result;
  }

  /// [batch, channels, ...] with the rank of `windows`; spatial extents unknown where they are.
  Shape windowed(Index channels, std::size_t rank, const std::optional<Windows>& windows,
                 bool ceil_mode = false) const {
    Dims image(rank, unknown);
    Index batch = unknown;
    if (in(0) && in(0)->size() == rank + 2) {
      batch = in(0)->front();
      image.assign(in(0)->begin() + 2, in(0)->end());
    }
    Dims result = {batch, channels};
    const std::string same = node_.text("auto_pad", "NOTSET");
    if (same == "SAME_UPPER" || same == "SAME_LOWER") {
      const Dims strides = node_.integers("strides", Dims(rank, 1));
      for (std::size_t axis = 0; axis < rank; ++axis) {
        result.push_back(
            image[axis] == unknown ? unknown : (image[axis] + strides[axis] - 1) / strides[axis]);
      }
      return result;
    }
    if (!windows) return std::nullopt;
    const Dims out = window_output(image, *windows, ceil_mode);
    result.insert(result.end(), out.begin(), out.end());
    return result;
  }

  Shape convolution() const {
    const Shape& weight = in(1);
    if (!weight || weight->size() < 2) return std::nullopt;
    const Dims kernel(weight->begin() + 2, weight->end());
    return windowed(weight->front(), kernel.size(), windows_of(graph_, index_, kernel));
  }

  Shape transposed() const {
    const Shape& weight = in(1);
    if (!weight || weight->size() < 2) return std::nullopt;
    const Dims kernel(weight->begin() + 2, weight->end());
    const std::size_t rank = kernel.size();
    Dims result = {in(0) && !in(0)->empty() ? in(0)->front() : unknown,
                   (*weight)[1] * node_.integer("group", 1)};
    const auto windows = windows_of(graph_, index_, kernel);
    const Dims extra = node_.integers("output_padding", Dims(rank, 0)),
               exact = node_.integers("output_shape", {});
    if (extra.size() != rank) return std::nullopt;
    for (std::size_t axis = 0; axis < rank; ++axis) {
      if (exact.size() == rank) {
        result.push_back(exact[axis]);
      } else if (!windows || !in(0) || in(0)->size() != rank + 2 || (*in(0))[axis + 2] == unknown) {
        result.push_back(unknown);
      } else {
        const Index whole = ((*in(0))[axis + 2] - 1) * windows->strides[axis] +
                            windows->dilations[axis] * (kernel[axis] - 1) + 1 + extra[axis];
        result.push_back(
            std::max<Index>(whole - windows->pads_begin[axis] - windows->pads_end[axis], 0));
      }
    }
    return result;
  }

  Shape pool() const {
    const Dims kernel = node_.integers("kernel_shape", {});
    if (!in(0) || in(0)->size() < 2) return std::nullopt;
    return windowed((*in(0))[1], kernel.size(), windows_of(graph_, index_, kernel),
                    node_.integer("ceil_mode", 0) != 0);
  }

  Shape global_pool() const {
    if (!in(0) || in(0)->size() < 2) return std::nullopt;
    Dims result(in(0)->size(), 1);
    std::copy_n(in(0)->begin(), 2, result.begin());
    return result;
  }

  Shape gemm() const {
    if (!in(0) || !in(1) || in(0)->size() != 2 || in(1)->size() != 2) return std::nullopt;
    return Dims{(*in(0))[node_.integer("transA", 0) ? 1 : 0],
                (*in(1))[node_.integer("transB", 0) ? 0 : 1]};
  }

  Shape matmul() const {
    if (!in(0) || !in(1) || in(0)->size() < 2 || in(1)->size() != 2) return std::nullopt;
    Dims result = *in(0);
    result.back() = in(1)->back();
    return result;
  }

  Shape concat() const {
    if (!in(0)) return std::nullopt;
    Dims result = *in(0);
    const auto axis = axis_in(node_.integer("axis", 1), result.size());
    if (!axis) return std::nullopt;
    for (std::size_t i = 1; i < in_.size(); ++i) {
      if (!in_[i] || in_[i]->size() != result.size()) return std::nullopt;
      const Index more = (*in_[i])[*axis];
      result[*axis] = result[*axis] == unknown || more == unknown ? unknown : result[*axis] + more;
    }
    return result;
  }

  bool has_input(std::size_t i) const {
    return i < node_.inputs.size() && !node_.inputs[i].empty();
  }

  static std::optional<std::size_t> axis_in(Index axis, std::size_t rank) {
    if (axis < 0) axis += static_cast<Index>(rank);
    if (axis < 0 || axis >= static_cast<Index>(rank)) return std::nullopt;
    return static_cast<std::size_t>(axis);
  }

  Shape flatten() const {
    if (!in(0)) return std::nullopt;
    Index axis = node_.integer("axis", 1);
    if (axis < 0) axis += static_cast<Index>(in(0)->size());
    if (axis < 0 || axis > static_cast<Index>(in(0)->size())) return std::nullopt;
    const std::span all(*in(0));
    return Dims{product(all.first(static_cast<std::size_t>(axis))),
                product(all.subspan(static_cast<std::size_t>(axis)))};
  }

  Shape reshape() const {
    auto shape = graph_.integers(index_, 1);
    if (!shape) return std::nullopt;
    const bool copies = node_.integer("allowzero", 0) == 0;
    for (std::size_t axis = 0; axis < shape->size(); ++axis) {
      if ((*shape)[axis] == 0 && copies) {
        (*shape)[axis] = in(0) && axis < in(0)->size() ? (*in(0))[axis] : unknown - 1;
      }
    }
    const Index all = in(0) ? product(*in(0)) : unknown;
    const auto inferred = std::ranges::find(*shape, Index{-1});
    if (inferred != shape->end()) {
      Dims rest = *shape;
      rest.erase(rest.begin() + (inferred - shape->begin()));
      const bool known = std::ranges::all_of(rest, [](Index extent) { return extent > 0; });
      *inferred = known && all != unknown ? all / product(rest) : unknown;
    }
    for (Index& extent : *shape) extent = std::max(extent, unknown);
    return shape;
  }

  Shape transpose() const {
    if (!in(0)) return std::nullopt;
    Dims reversed(in(0)->size());
    std::iota(reversed.rbegin(), reversed.rend(), Index{0});
    const Dims perm = node_.integers("perm", reversed);
    if (perm.size() != in(0)->size()) return std::nullopt;
    Dims result;
    for (const Index axis : perm) {
      if (axis < 0 || axis >= static_cast<Index>(perm.size())) return std::nullopt;
      result.push_back((*in(0))[static_cast<std::size_t>(axis)]);
    }
    return result;
  }

  Shape pad() const {
    auto pads = node_.attribute("pads") ? std::optional(node_.integers("pads", {}))
                                        : graph_.integers(index_, 1);
    if (!in(0)) return std::nullopt;
    const std::size_t rank = in(0)->size();
    if (!pads || pads->size() != 2 * rank ||
        !std::ranges::all_of(*pads, [](Index pad) { return is_ordinary(pad); }) || has_input(3)) {
      return Dims(rank, unknown);
    }
    Dims result = *in(0);
    for (std::size_t axis = 0; axis < rank; ++axis) {
      if (result[axis] == unknown) continue;
      result[axis] = std::max<Index>(result[axis] + (*pads)[axis] + (*pads)[axis + rank], 0);
    }
    return result;
  }

  Shape slice() const {
    if (!in(0)) return std::nullopt;
    const bool old = node_.attribute("starts") != nullptr;
    const auto list = [&](const char* name, std::size_t i) {
      return old ? std::optional(node_.integers(name, {})) : graph_.integers(index_, i);
    };
    const auto starts = list("starts", 1), ends = list("ends", 2);
    auto axes = list("axes", 3), steps = old ? std::nullopt : graph_.integers(index_, 4);
    const bool vary = (!axes && has_input(3)) || (!steps && has_input(4));
    if (!starts || !ends || vary || starts->size() != ends->size()) {
      return Dims(in(0)->size(), unknown);
    }
    if (!axes || axes->empty()) {
      axes.emplace(starts->size());
      std::iota(axes->begin(), axes->end(), Index{0});
    }
    if (!steps || steps->empty()) steps.emplace(starts->size(), 1);
    if (axes->size() != starts->size() || steps->size() != starts->size()) return std::nullopt;
    Dims result = *in(0);
    for (std::size_t i = 0; i < starts->size(); ++i) {
      const auto axis = axis_in((*axes)[i], result.size());
      if (!axis) return std::nullopt;
      const Index extent = result[*axis];
      if (extent == unknown || (*steps)[i] <= 0) {
        result[*axis] = unknown;
        continue;
      }
      const Index step = std::min((*steps)[i], limit);
      const auto place = [&](Index at) {
        return std::clamp<Index>(at < 0 ? at + extent : at, 0, extent);
      };
      const Index begin = place((*starts)[i]), end = place((*ends)[i]);
      result[*axis] = begin < end ? (end - begin + step - 1) / step : 0;
    }
    return result;
  }

  std::vector<Shape> split() const {
    std::vector<Shape> result(node_.outputs.size());
    if (!in(0)) return result;
    const auto axis = axis_in(node_.integer("axis", 0), in(0)->size());
    if (!axis) return result;
    auto parts = node_.attribute("split") ? std::optional(node_.integers("split", {}))
                                          : graph_.integers(index_, 1);
    const bool varies = !parts && has_input(1);
    const auto count = static_cast<Index>(result.size());
    const Index extent = varies ? unknown : (*in(0))[*axis];
    for (Index i = 0; i < count; ++i) {
      Dims part = *in(0);
      const Index chunk = (extent + count - 1) / count;
      part[*axis] = parts && static_cast<Index>(parts->size()) == count
                        ? (*parts)[static_cast<std::size_t>(i)]
                    : extent == unknown ? unknown
                                        : std::min(chunk, extent - i * chunk);
      result[static_cast<std::size_t>(i)] = std::move(part);
    }
    return result;
  }

  Shape reduce() const {
    if (!in(0)) return std::nullopt;
    auto axes = node_.attribute("axes") ? std::optional(node_.integers("axes", {}))
                                        : graph_.integers(index_, 1);
    if (!axes && has_input(1)) return std::nullopt;
    const bool none = !axes || axes->empty();
    if (none && node_.integer("noop_with_empty_axes", 0) != 0) return in(0);
    const bool keep = node_.integer("keepdims", 1) != 0;
    std::vector<bool> reduced(in(0)->size(), none);
    if (axes) {
      for (const Index each : *axes) {
        const auto axis = axis_in(each, reduced.size());
        if (!axis) return std::nullopt;
        reduced[*axis] = true;
      }
    }
    Dims result;
    for (std::size_t axis = 0; axis < reduced.size(); ++axis) {
      if (!reduced[axis]) result.push_back((*in(0))[axis]);
      if (reduced[axis] && keep) result.push_back(1);
    }
    return result;
  }

  Shape resize() const {
    if (!in(0)) return std::nullopt;
    Dims result = *in(0);
    std::vector<Index> axes(result.size());
    std::iota(axes.begin(), axes.end(), Index{0});
    if (const auto* attribute = node_.attribute("axes")) {
      axes.assign(attribute->ints.begin(), attribute->ints.end());
    }
    for (Index& axis : axes) {
      if (axis < 0) axis += std::ssize(result);
      if (axis < 0 || axis >= std::ssize(result)) return std::nullopt;
    }
    const bool scales_second = node_.op_type == "Upsample" || graph_.opset() < 11;
    const onnx::Tensor* scales = graph_.constant(index_, scales_second ? 1 : 2);
    const auto sizes = graph_.integers(index_, 3);
    const bool stretches = node_.text("keep_aspect_ratio_policy", "stretch") == "stretch";
    std::vector<float> factors;
    if (const auto* attribute = node_.attribute("scales")) factors = attribute->floats;
    if (scales && scales->type == onnx::DataType::float32) factors = scales->values<float>();
    for (std::size_t i = 0; i < axes.size(); ++i) {
      Index& extent = result[static_cast<std::size_t>(axes[i])];
      const Index from = std::exchange(extent, unknown);
      if (sizes && sizes->size() == axes.size()) {
        if (stretches) extent = (*sizes)[i];
      } else if (factors.size() == axes.size() && from != unknown) {
        const double scaled = static_cast<double>(from) * static_cast<double>(factors[i]);
        // Programs that multiply in float may round to the next integer.
        const bool told = std::floor(scaled) == std::floor(static_cast<float>(from) * factors[i]);
        if (told && scaled >= 0 && scaled <= static_cast<double>(limit)) {
          extent = static_cast<Index>(scaled);
        }
      }
    }
    return result;
  }

  Shape depth_space() const {
    if (!in(0) || in(0)->size() != 4) return std::nullopt;
    const Index block = std::max<Index>(node_.integer("blocksize", 1), 1);
    if (block > Index{1} << 15) return std::nullopt;
    const bool to_space = node_.op_type == "DepthToSpace";
    const auto scaled = [&](Index extent, bool grows, Index factor) {
      return extent == unknown ? unknown : grows ? extent * factor : extent / factor;
    };
    const Dims& dims = *in(0);
    return Dims{dims[0], scaled(dims[1], !to_space, block * block),
                scaled(dims[2], to_space, block), scaled(dims[3], to_space, block)};
  }

  Shape squeeze() const {
    if (!in(0)) return std::nullopt;
    auto axes = node_.attribute("axes") ? std::optional(node_.integers("axes", {}))
                                        : graph_.integers(index_, 1);
    if (!axes) return std::nullopt;
    const bool removes = node_.op_type == "Squeeze";
    const std::size_t rank = in(0)->size() + (removes ? 0 : axes->size());
    std::set<std::size_t> marked;
    for (const Index each : *axes) {
      const auto axis = axis_in(each, rank);
      if (!axis || !marked.insert(*axis).second) return std::nullopt;
    }
    Dims result;
    std::size_t next = 0;
    for (std::size_t axis = 0; axis < rank; ++axis) {
      if (removes) {
        if (!marked.contains(axis)) result.push_back((*in(0))[axis]);
      } else {
        result.push_back(marked.contains(axis) ? 1 : (*in(0))[next++]);
      }
    }
    return result;
  }

  Shape gather() const {
    if (!in(0) || !in(1)) return std::nullopt;
    const auto axis = axis_in(node_.integer("axis", 0), in(0)->size());
    if (!axis) return std::nullopt;
    Dims result(in(0)->begin(), in(0)->begin() + static_cast<std::ptrdiff_t>(*axis));
    result.insert(result.end(), in(1)->begin(), in(1)->end());
    result.insert(result.end(), in(0)->begin() + static_cast<std::ptrdiff_t>(*axis) + 1,
                  in(0)->end());
    return result;
  }

  const Graph& graph_;
  int index_;
  const onnx::Node& node_;
  std::vector<Shape> in_;
};

/// The type of what a node writes, where its operator keeps that of its first input or says
/// another.
onnx::DataType type_of_output(const Graph& graph, int node, std::size_t output) {
  const onnx::Node& n = graph.node(node);
  if (!n.domain.empty() || (output > 0 && n.op_type != "Split")) return onnx::DataType::undefined;
  if (n.op_type == "Cast") return static_cast<onnx::DataType>(n.integer("to", 0));
  static const std::set<std::string, std::less<>> keeping = {"Add",           "Sub",
                                                             "Mul",           "Div",
                                                             "Pow",           "Sum",
                                                             "Min",           "Max",
                                                             "Mean",          "Conv",
                                                             "ConvTranspose", "MaxPool",
                                                             "AveragePool",   "GlobalAveragePool",
                                                             "GlobalMaxPool", "Gemm",
                                                             "MatMul",        "Concat",
                                                             "Flatten",       "Reshape",
                                                             "Transpose",     "Pad",
                                                             "Slice",         "Split",
                                                             "ReduceMean",    "ReduceSum",
                                                             "ReduceMax",     "Resize",
                                                             "Upsample",      "DepthToSpace",
                                                             "SpaceToDepth",  "Squeeze",
                                                             "Unsqueeze",     "Gather",
                                                             "Expand",        "Tile",
                                                             "Where"};
  const bool keeps =
      keeping.contains(n.op_type) || (ShapeInference::is_unary(n.op_type) && n.op_type != "Not");
  const int input = graph.input(node, n.op_type == "Where" ? 1 : 0);
  return keeps && input >= 0 ? graph[input].type : onnx::DataType::undefined;
}

/// What both know, or none where they contradict each other's rank; `declared` fills gaps.
std::optional<Dims> merged(std::optional<Dims> inferred, const std::optional<Dims>& declared) {
  if (!inferred || !declared || inferred->size() != declared->size())
    return inferred ? inferred : declared;
  for (std::size_t axis = 0; axis < inferred->size(); ++axis) {
    if ((*inferred)[axis] == unknown) (*inferred)[axis] = (*declared)[axis];
  }
  return inferred;
}

std::optional<Dims> declared_dims(const onnx::ValueInfo& info) {
  if (!info.shape || info.shape->size() > most_axes) return std::nullopt;
  Dims dims;
  for (const onnx::Dimension& each : *info.shape)
    dims.push_back(each.value && *each.value > 0 ? *each.value : unknown);
  return dims;
}

/// What is known of no more axes than are read.
std::optional<Dims> readable(std::optional<Dims> dims) {
  return dims && dims->size() > most_axes ? std::nullopt : std::move(dims);
}

/// The output of a Constant node; null for what holds no numbers.
std::unique_ptr<onnx::Tensor> constant_of(const onnx::Node& node) {
  const auto& name = node.outputs.at(0);
  if (const auto* value = node.attribute("value"); value && value->tensor) {
    if (onnx::size_of(value->tensor->type) == 0) return nullptr;  // its elements are not read
    auto tensor = std::make_unique<onnx::Tensor>(*value->tensor);
    tensor->name = name;
    tensor->encoded = {};
    return tensor;
  }
  const auto make = [&](auto values, bool scalar) {
    using Scalar = typename decltype(values)::value_type;
    const std::vector<std::int64_t> dims =
        scalar ? std::vector<std::int64_t>{}
               : std::vector<std::int64_t>{static_cast<std::int64_t>(values.size())};
    return std::make_unique<onnx::Tensor>(onnx::Tensor::of<Scalar>(name, dims, values));
  };
  if (const auto* a = node.attribute("value_float")) return make(std::vector{a->f}, true);
  if (const auto* a = node.attribute("value_floats")) return make(a->floats, false);
  if (const auto* a = node.attribute("value_int")) return make(std::vector{a->i}, true);
  if (const auto* a = node.attribute("value_ints")) return make(a->ints, false);
  return nullptr;
}

/// Whether a type of integers or booleans holds a number, rounded towards zero.
bool holds(onnx::DataType type, long double value) {
  bool within = type == onnx::DataType::boolean;
  with_integer(type, [&]<class Integer>(Integer) {
    using Limits = std::numeric_limits<Integer>;
    within = std::trunc(value) >= Limits::min() && std::trunc(value) <= Limits::max();
  });
  return within;
}

/// Whether integers that a node makes are those that its type has: what was folded before is of 64
/// bits, which wrap around elsewhere, and of what a Cast gives where nothing fits programs differ.
bool is_of_type(const onnx::Node& node, onnx::DataType type, const onnx::Tensor& made,
                const onnx::Tensor& read) {
  const auto fits = [&](auto value) { return holds(type, static_cast<long double>(value)); };
  if (node.op_type == "Cast" && read.type != onnx::DataType::boolean) {
    return std::ranges::all_of(read.values<long double>(), fits);
  }
  return std::ranges::all_of(made.values<std::int64_t>(), fits);
}

/// Integers of 64 bits as such of the type, which holds them; of another type as they are.
onnx::Tensor narrowed(const onnx::Tensor& tensor, onnx::DataType type) {
  onnx::Tensor result = tensor;
  with_integer(type, [&]<class Integer>(Integer) {
    std::vector<Integer> values;
    for (const std::int64_t each : tensor.values<std::int64_t>()) {
      values.push_back(static_cast<Integer>(each));
    }
    result = onnx::Tensor::of<Integer>(tensor.name, tensor.dims, values);
  });
  return result;
}

/// What a node makes of constants, such as weights that are stored in 16 bits and cast, or lie
/// transposed; null where it reads others, or is none of these. Throws BudgetError.
std::unique_ptr<onnx::Tensor> folded(const Graph& graph, int node, Budget& budget) {
  static const std::set<std::string, std::less<>> foldable = {
      "Add", "Cast",    "Concat", "Div",  "Flatten", "Gather", "Identity",  "Mul",
      "Neg", "Reshape", "Slice",  "Sqrt", "Squeeze", "Sub",    "Transpose", "Unsqueeze"};
  const onnx::Node& n = graph.node(node);
  if (!n.domain.empty() || !foldable.contains(n.op_type) || n.outputs.size() != 1) return nullptr;
  onnx::Model model;
  model.opsets = {{"", graph.opset()}};
  std::map<std::string_view, const onnx::Tensor*> constants;
  double read = 0;
  for (std::size_t i = 0; i < n.inputs.size(); ++i) {
    if (n.inputs[i].empty()) continue;
    const onnx::Tensor* constant = graph.constant(node, i);
    if (!constant) return nullptr;
    if (constants.emplace(constant->name, constant).second)
      read += static_cast<double>(constant->elements.size());
  }
  if (constants.empty()) return nullptr;
  const std::string what = "making a constant of constants";
  budget.take(what, 0, each_folded + each_byte_read * read);
  for (const auto& [name, constant] : constants) model.initializers.push_back(*constant);
  model.nodes = {n};
  model.outputs = {{.name = n.outputs.front()}};
  try {
    const onnx::DataType type = type_of_output(graph, node, 0);
    const Values values = Evaluator(model, false, budget)({});
    auto tensor =
        std::make_unique<onnx::Tensor>(tensor_of(n.outputs.front(), values.begin()->second));
    const auto bytes = static_cast<double>(tensor->elements.size());
    budget.take(what, bytes, each_byte_folded * bytes);
    budget.kept += bytes;
    // What the evaluator widens is not of the type that the model would go on with.
    if (tensor->type == onnx::DataType::int64) {
      if (!is_of_type(n, type, *tensor, *graph.constant(node, 0))) return nullptr;
      *tensor = narrowed(*tensor, type);
    }
    return tensor->type == type ? std::move(tensor) : nullptr;
  } catch (const BudgetError&) {
    throw;
  } catch (const concertina::Error&) {
    return nullptr;  // whoever runs the model will see why
  }
}

}  // namespace

std::string to_text(const Dims& dims) {
  std::string text;
  for (const Index extent : dims) {
    text +=
        (text.empty() ? "" : "x") + (extent == unknown ? std::string("?") : std::to_string(extent));
  }
  return text.empty() ? "scalar" : text;
}

int Graph::add(const std::string& name) {
  const auto [at, added] = index_.emplace(name, static_cast<int>(tensors_.size()));
  if (added) tensors_.push_back({.name = name});
  return at->second;
}

Graph::Graph(const onnx::Model& model, const GraphOptions& options)
    : model_(model), opset_(model.opset()), budget_(options.budget) {
  if (opset_ < oldest_opset) {
    refuse(model, "operators of opset " + std::to_string(opset_) + "; " +
                      std::to_string(oldest_opset) +
                      " and later are read: convert it with onnx.version_converter");
  }
  std::set<std::string, std::less<>> inputs, initialized;
  for (const onnx::Tensor& tensor : model.initializers) initialized.insert(tensor.name);
  for (const auto& [name, dims] : options.inputs) {
    const auto found = std::ranges::find(model.inputs, name, &onnx::ValueInfo::name);
    if (found == model.inputs.end() || initialized.contains(name)) {
      std::vector<std::string> names;
      for (const onnx::ValueInfo& input : model.inputs) {
        if (!initialized.contains(input.name)) names.push_back(printable(input.name));
      }
      throw UsageError("--input: no input " + in_quotes(name) + "; there are " + listed(names));
    }
    const auto declared = declared_dims(*found);
    bool fits = !declared || declared->size() == dims.size();
    for (std::size_t axis = 0; fits && declared && axis < dims.size(); ++axis) {
      fits = (*declared)[axis] == unknown || (*declared)[axis] == dims[axis];
    }
    if (!fits) {
      throw UsageError("--input: " + in_quotes(name) + " is declared as " + to_text(*declared) +
                       ", not " + to_text(dims));
    }
  }
  for (const onnx::ValueInfo& input : model.inputs) {
    inputs.insert(input.name);
    GraphTensor& tensor = tensors_[static_cast<std::size_t>(add(input.name))];
    tensor.type = input.type;
    const auto given = options.inputs.find(input.name);
    tensor.dims = given == options.inputs.end() ? declared_dims(input) : given->second;
    tensor.sizes = tensor.dims;
    if (tensor.sizes) {
      for (std::size_t axis = 0; axis < tensor.sizes->size(); ++axis) {
        Index& extent = (*tensor.sizes)[axis];
        if (extent == unknown) extent = axis == 0 ? 1 : assumed_extent;
      }
    }
  }
  for (const onnx::Tensor& initializer : model.initializers) {
    GraphTensor& tensor = tensors_[static_cast<std::size_t>(add(initializer.name))];
    tensor.type = initializer.type;
    tensor.dims = tensor.sizes = readable(initializer.dims);
    // Up to IR 3 every initializer is an input too; since then that says that a caller may replace
    // it.
    const bool replaceable = inputs.contains(initializer.name) && model.ir_version > 3;
    if (!replaceable || options.initializers_are_constant) tensor.constant = &initializer;
  }
  for (const std::string& name : model.sparse_initializers) add(name);

  // What is folded is held as long as the graph, of which there may be several.
  Budget folding = budget_.part(1.0 / 8);
  std::map<std::string, const onnx::ValueInfo*, std::less<>> declared;
  for (const auto* list : {&model.values, &model.outputs}) {
    for (const onnx::ValueInfo& info : *list) declared.emplace(info.name, &info);
  }
  for (std::size_t n = 0; n < model.nodes.size(); ++n) {
    const onnx::Node& node = model.nodes[n];
    const int index = static_cast<int>(n);
    std::vector<std::optional<Dims>> dims, sizes;
    inputs_.emplace_back();
    for (const std::string& name : node.inputs) {
      const int input = name.empty() ? -1 : add(name);
      inputs_.back().push_back(input);
      if (input >= 0) tensors_[static_cast<std::size_t>(input)].consumers.push_back(index);
      dims.push_back(input < 0 ? std::nullopt : (*this)[input].dims);
      sizes.push_back(input < 0 ? std::nullopt : (*this)[input].sizes);
    }
    for (const std::string& name : node.captured)
      tensors_[static_cast<std::size_t>(add(name))].escapes = true;
    outputs_.emplace_back();
    for (const std::string& name : node.outputs)
      outputs_.back().push_back(name.empty() ? -1 : add(name));
    const auto inferred = ShapeInference(*this, index, std::move(dims)).outputs();
    const auto assumed = ShapeInference(*this, index, std::move(sizes)).outputs();
    for (std::size_t o = 0; o < node.outputs.size(); ++o) {
      if (outputs_.back()[o] < 0) continue;
      GraphTensor& tensor = tensors_[static_cast<std::size_t>(outputs_.back()[o])];
      tensor.producer = index;
      const auto info = declared.find(node.outputs[o]);
      const auto said = info == declared.end() ? std::nullopt : declared_dims(*info->second);
      tensor.dims = readable(merged(inferred[o], said));
      tensor.sizes = readable(merged(assumed[o], said));
      if (info != declared.end()) tensor.type = info->second->type;
      if (tensor.type == onnx::DataType::undefined) tensor.type = type_of_output(*this, index, o);
    }
    const bool constant =
        node.op_type == "Constant" && node.domain.empty() && node.outputs.size() == 1;
    std::unique_ptr<onnx::Tensor> made;
    try {
      made = constant ? constant_of(node) : folded(*this, index, folding);
    } catch (const BudgetError& error) {
      unfolded_.emplace(index, error.what());
    }
    if (made) {
      GraphTensor& tensor = tensors_[static_cast<std::size_t>(outputs_.back()[0])];
      tensor.constant = made.get();
      tensor.dims = tensor.sizes = readable(made->dims);
      tensor.type = made->type;
      made_.push_back(std::move(made));
    }
  }
  for (const onnx::ValueInfo& output : model.outputs) {
    tensors_[static_cast<std::size_t>(add(output.name))].escapes = true;
  }
  for (const std::string& name : options.keep) {
    const int tensor = find(name);
    if (tensor < 0) throw UsageError("--keep: no tensor " + in_quotes(name));
    tensors_[static_cast<std::size_t>(tensor)].escapes = true;
  }
}

int Graph::find(std::string_view name) const {
  const auto found = name.empty() ? index_.end() : index_.find(std::string(name));
  return found == index_.end() ? -1 : found->second;
}

int Graph::input(int node, std::size_t i) const {
  const auto& inputs = inputs_[static_cast<std::size_t>(node)];
  return i < inputs.size() ? inputs[i] : -1;
}

int Graph::output(int node, std::size_t i) const {
  const auto& outputs = outputs_[static_cast<std::size_t>(node)];
  return i < outputs.size() ? outputs[i] : -1;
}

const onnx::Tensor* Graph::constant(int node, std::size_t i) const {
  const int tensor = input(node, i);
  return tensor < 0 ? nullptr : (*this)[tensor].constant;
}

std::string Graph::unfolded(int node) const {
  const auto found = unfolded_.find(node);
  return found == unfolded_.end() ? std::string() : found->second;
}

std::optional<std::vector<Index>> Graph::integers(int node, std::size_t i) const {
  const onnx::Tensor* tensor = constant(node, i);
  if (!tensor || (tensor->type != onnx::DataType::int64 && tensor->type != onnx::DataType::int32))
    return std::nullopt;
  const auto values = tensor->values<std::int64_t>();
  return std::vector<Index>(values.begin(), values.end());
}

std::optional<Windows> windows_of(const Graph& graph, int node, Dims kernel) {
  const onnx::Node& n = graph.node(node);
  const std::size_t rank = kernel.size();
  Windows result{.kernel = n.integers("kernel_shape", kernel),
                 .strides = n.integers("strides", Dims(rank, 1)),
                 .dilations = n.integers("dilations", Dims(rank, 1)),
                 .pads_begin = {},
                 .pads_end = {}};
  Dims pads = n.integers("pads", Dims(2 * rank, 0));
  const auto wrong = [&](const std::string& what) {
    throw concertina::FormatError(graph.model().origin + ": " + describe(graph, node) + ": " +
                                  what);
  };
  if (result.strides.size() != rank || result.dilations.size() != rank || pads.size() != 2 * rank) {
    wrong("strides, dilations or pads are not for " + std::to_string(rank) + " spatial axes");
  }
  if (result.kernel != kernel)
    wrong("kernel_shape " + to_text(result.kernel) + ", but a weight of " + to_text(kernel));
  for (const Dims* positive : {&result.kernel, &result.strides, &result.dilations}) {
    if (std::ranges::any_of(*positive, [](Index extent) { return extent < 1; })) {
      wrong("kernel_shape, strides and dilations must be positive");
    }
  }
  const std::string automatic = n.text("auto_pad", "NOTSET");
  if (n.op_type.starts_with("Conv") && automatic != "NOTSET" && n.attribute("pads")) {
    wrong("pads beside auto_pad " + automatic);
  }
  if (automatic == "VALID") pads.assign(2 * rank, 0);
  if (automatic == "SAME_UPPER" || automatic == "SAME_LOWER") {
    if (n.op_type == "ConvTranspose") return std::nullopt;
    const int x = graph.input(node, 0);
    const auto& dims = graph[x].dims;
    for (std::size_t axis = 0; axis < rank; ++axis) {
      const Index reach = result.dilations[axis] * (result.kernel[axis] - 1) + 1;
      const bool unit = result.strides[axis] == 1;
      if (!unit && (!dims || dims->size() != rank + 2 || (*dims)[axis + 2] == unknown))
        return std::nullopt;
      const Index extent = unit ? 1 : (*dims)[axis + 2];
      const Index out = (extent + result.strides[axis] - 1) / result.strides[axis];
      const Index total = std::max<Index>(0, (out - 1) * result.strides[axis] + reach - extent);
      const Index small = total / 2;
      pads[axis] = automatic == "SAME_UPPER" ? small : total - small;
      pads[axis + rank] = total - pads[axis];
    }
  }
  result.pads_begin.assign(pads.begin(), pads.begin() + static_cast<std::ptrdiff_t>(rank));
  result.pads_end.assign(pads.begin() + static_cast<std::ptrdiff_t>(rank), pads.end());
  return result;
}

std::string describe(const Graph& graph, int node) {
  const onnx::Node& n = graph.node(node);
  const std::string operation = printable(n.op_type, 40);
  if (!n.name.empty()) return operation + ' ' + in_quotes(n.name);
  return operation + " that makes " + in_quotes(n.outputs.empty() ? "" : n.outputs.front());
}

}  // namespace tool
