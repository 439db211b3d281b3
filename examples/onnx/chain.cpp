// SPDX-License-Identifier: Apache-2.0
#include "onnx/chain.hpp"

#include "onnx/builder.hpp"
#include "onnx/data_types.hpp"
#include "onnx/layer.hpp"
#include "text.hpp"

#include <concertina/error.hpp>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <limits>
#include <string_view>
#include <utility>

namespace tool {

namespace {

using concertina::FormatError;
using concertina::io::Dtype, concertina::io::Safetensors;

// ---- the grammar

constexpr std::size_t longest_chain = 64;         // what contract_model makes one layer of
constexpr Index most_magnitude = Index{1} << 40;  // sums of such numbers are far from overflowing

[[noreturn]] void wrong(const ChainLayer& layer, const std::string& what) {
  throw UsageError("layer " + in_quotes(layer.text) + ": " + what);
}

/// What follows a letter: an integer, or one per axis. Takes it from `text`.
Dims integers(const ChainLayer& layer, std::string_view& text) {
  Dims values;
  do {
    if (!values.empty()) text.remove_prefix(1);  // the x
    Index value = 0;
    const auto [stop, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (error != std::errc() || value > most_magnitude || value < -most_magnitude) {
      wrong(layer, "found " + in_quotes(text) + " where an integer of at most 2^40 should be");
    }
    text.remove_prefix(static_cast<std::size_t>(stop - text.data()));
    values.push_back(value);
  } while (text.starts_with('x') && values.size() < 3);
  return values;
}

void parse_geometry(ChainLayer& layer, std::string_view text) {
  if (text.starts_with("eps")) {
    text.remove_prefix(3);
    double eps = 0;
    const auto [stop, error] = std::from_chars(text.data(), text.data() + text.size(), eps);
    if (error != std::errc() || stop != text.data() + text.size() || !(eps >= 0) ||
        !std::isfinite(static_cast<float>(eps))) {
      wrong(layer, "found " + in_quotes(text) + " where a number such as 1e-5 should be");
    }
    layer.eps = eps;
    return;
  }
  while (!text.empty()) {
    const char letter = text.front();
    if (std::string_view("spedgk").find(letter) == std::string_view::npos) {
      wrong(layer, "found " + in_quotes(text) +
                       " where one of the letters s, p, e, d, g, k or eps should be");
    }
    text.remove_prefix(1);
    if (!layer.geometry.emplace(letter, integers(layer, text)).second) {
      wrong(layer, "the letter " + in_quotes({&letter, 1}) + " is there twice");
    }
  }
  const auto groups = layer.geometry.find('g');
  if (groups != layer.geometry.end() && (groups->second.size() != 1 || groups->second[0] < 1)) {
    wrong(layer, "groups are one positive integer");
  }
}

// ---- the tensors

enum class LayerKind { conv, linear, batch_norm, scale, avg_pool };

/// A layer with what its tensors say.
struct Layer {
  ChainLayer chain;
  LayerKind kind = LayerKind::avg_pool;
  Dims weight = {};  // its shape
  int rank = -1;     // spatial axes; -1: it fits any number
};

class ChainReader {
 public:
  ChainReader(const Safetensors& file, const ChainOptions& options) : file_(file) {
    for (const ChainLayer& layer : parsed(options)) layers_.push_back(described(layer));
    type_ = options.wide ? onnx::DataType::float64 : onnx::DataType::float32;
    for (const Layer& layer : layers_) {
      for (const char* suffix : {"weight", "bias", "running_mean", "running_var"})
        check(layer, suffix);
    }
  }

  onnx::Model model(const std::optional<Dims>& input) try {
    Builder builder("chain", type_, input ? fitting(*input) : open_input());
    for (const Layer& layer : layers_) append(builder, layer);
    onnx::Model model = builder.finish([this](const std::string& name, const Dims& dims) {
      return type_ == onnx::DataType::float64 ? parameter<double>(name, dims)
                                              : parameter<float>(name, dims);
    });
    model.origin = file_.origin;
    return model;
  } catch (const concertina::ShapeError& error) {
    throw concertina::ShapeError(file_.origin + ": " + error.what());
  } catch (const concertina::SizeError& error) {
    throw concertina::SizeError(file_.origin + ": " + error.what());
  }

 private:
  std::vector<ChainLayer> parsed(const ChainOptions& options) const {
    const auto metadata = file_.metadata.find("chain");
    try {
      if (options.chain) return parse_chain(*options.chain);
      if (metadata != file_.metadata.end()) return parse_chain(metadata->second);
    } catch (const UsageError& error) {
      if (options.chain) throw UsageError(std::string("--chain: ") + error.what());
      throw FormatError(file_.origin + ": metadata chain: " + error.what());
    }
    throw FormatError(file_.origin +
                      ": it has no metadata \"chain\", so its layers are not known; name them with "
                      "--chain");
  }

  [[noreturn]] void refuse(const Layer& layer, const std::string& what) const {
    throw FormatError(file_.origin + ": layer " + in_quotes(layer.chain.text) + ": " + what);
  }

  /// Refuses a geometry with other letters than these.
  void allow(const Layer& layer, const char* what, std::string_view letters, bool eps) const {
    for (const auto& [letter, values] : layer.chain.geometry) {
      if (letters.find(letter) == std::string_view::npos) {
        refuse(layer, std::string(what) + " has no " + letter);
      }
    }
    if (layer.chain.eps && !eps) refuse(layer, std::string(what) + " has no eps");
  }

  Layer described(const ChainLayer& chain) const {
    Layer layer{.chain = chain};
    if (chain.is_pool()) {
      allow(layer, "a pool", "ksp", false);
      if (!chain.geometry.contains('k')) refuse(layer, "a pool needs k, the size of its kernel");
      for (const auto& [letter, values] : chain.geometry) {
        if (values.size() > 1) layer.rank = static_cast<int>(values.size());
      }
      return layer;
    }
    const std::string weight = chain.tensor("weight");
    const bool statistics =
        file_.contains(chain.tensor("running_mean")) || file_.contains(chain.tensor("running_var"));
    layer.weight = file_.tensor(statistics ? chain.tensor("running_mean") : weight).shape;
    const std::size_t axes = layer.weight.size();
    if (axes == 1) {
      layer.kind = statistics ? LayerKind::batch_norm : LayerKind::scale;
      allow(layer, statistics ? "a batch norm" : "a factor for each channel", "", statistics);
    } else if (axes == 2) {
      layer.kind = LayerKind::linear;
      layer.rank = 0;
      allow(layer, "a linear layer", "", false);
    } else if (axes >= 3 && axes <= 5) {
      layer.kind = LayerKind::conv;
      layer.rank = static_cast<int>(axes) - 2;
      allow(layer, "a convolution", "spedg", false);
    } else {
      refuse(layer, "its weight has " + std::to_string(axes) + " axes, expected 1 to 5");
    }
    return layer;
  }

  /// Takes the dtype of one of its tensors, where there is one; refuses elements that are not
  /// finite.
  void check(const Layer& layer, const char* suffix) {
    const std::string name = layer.chain.tensor(suffix);
    if (layer.chain.is_pool() || !file_.contains(name)) return;
    const concertina::io::Tensor& tensor = file_.tensor(name);
    const std::string dtype = tensor.dtype_name();
    if (!layer_dtype(dtype)) {
      refuse(layer, "tensor " + in_quotes(name) + " is " + dtype +
                        "; layers may be F64, F32, F16 and BF16");
    }
    if (tensor.dtype == Dtype::F64) type_ = onnx::DataType::float64;
    const std::vector<double> elements = file_.values<double>(name);
    const auto found =
        std::ranges::find_if_not(elements, [](double element) { return std::isfinite(element); });
    if (found == elements.end()) return;
    refuse(layer, "tensor " + in_quotes(name) + " is not finite, element " +
                      std::to_string(found - elements.begin()) + " is " +
                      (std::isnan(*found) ? "NaN" : "infinite"));
  }

  /// Elements for the model, of its shape where it has one number a channel.
  template <class Scalar>
  onnx::Tensor parameter(const std::string& name, Dims dims) const {
    if (!file_.contains(name) && (name.ends_with("weight") || name.ends_with("bias"))) {
      // Of a batch norm that has none: the others are there, as described() saw.
      const Scalar value = name.ends_with("weight") ? 1 : 0;
      const std::vector<Scalar> values(static_cast<std::size_t>(dims.at(0)), value);
      return onnx::Tensor::of<Scalar>(name, std::move(dims), values);
    }
    const Dims& shape = file_.tensor(name).shape;
    const bool per_channel = shape.size() == 1 &&
                             std::ranges::count(dims, 1) + 1 >= std::ssize(dims) &&
                             dims.front() == shape.front();
    return onnx::Tensor::of<Scalar>(name, per_channel ? dims : shape, file_.values<Scalar>(name));
  }

  // ---- the model

  Index channels_read(const Layer& layer) const {
    if (layer.kind == LayerKind::avg_pool) return unknown;
    if (layer.kind == LayerKind::linear) return layer.weight[1];
    if (layer.kind != LayerKind::conv) return layer.weight[0];
    return concertina::detail::checked_multiply(layer.weight[1], groups(layer), "input channels");
  }
  static Index groups(const Layer& layer) {
    const auto found = layer.chain.geometry.find('g');
    return found == layer.chain.geometry.end() ? 1 : found->second.front();
  }

  /// `otherwise`: the spatial axes where no layer tells how many there are.
  Dims open_input(int otherwise = 2) const {
    int rank = -1;
    Index channels = unknown;
    for (const Layer& layer : layers_) {
      if (rank < 0) rank = layer.rank;
      if (channels == unknown) channels = channels_read(layer);
    }
    if (channels == unknown) {
      throw FormatError(file_.origin + ": no layer of the chain tells how many channels it reads");
    }
    Dims dims(static_cast<std::size_t>(rank < 0 ? otherwise : rank) + 2, unknown);
    dims[1] = channels;
    return dims;
  }

  Dims fitting(const Dims& input) const {
    const Dims open = open_input(std::clamp(static_cast<int>(input.size()) - 2, 0, 3));
    if (input.size() != open.size() || input[1] != open[1]) {
      throw UsageError("--input: " + file_.origin + " reads " + to_text(open) + ", not " +
                       to_text(input));
    }
    return input;
  }

  /// The letter's numbers, one per axis.
  Dims numbers(const Layer& layer, char letter, std::size_t rank, const Dims& otherwise) const {
    const auto found = layer.chain.geometry.find(letter);
    if (found == layer.chain.geometry.end()) return otherwise;
    const Dims& values = found->second;
    if (values.size() == 1) return Dims(rank, values.front());
    if (values.size() == rank) return values;
    refuse(layer, std::string(1, letter) + " has " + std::to_string(values.size()) +
                      " numbers, but there are " + std::to_string(rank) + " spatial axes");
  }

  template <int Rank>
  void append_conv(Builder& builder, const Layer& layer) const {
    concertina::ConvShape<Rank> shape{.out = layer.weight[0], .groups = groups(layer)};
    const auto axes = [&](char letter, const Dims& otherwise) {
      return per_axis<Rank>(numbers(layer, letter, Rank, otherwise), 0);
    };
    const Dims begin = numbers(layer, 'p', Rank, Dims(Rank, 0));
    shape.kernel_size = per_axis<Rank>(Dims(layer.weight.begin() + 2, layer.weight.end()), 1);
    shape.stride = axes('s', Dims(Rank, 1));
    shape.dilation = axes('d', Dims(Rank, 1));
    shape.padding = concertina::Padding<Rank>::sides(per_axis<Rank>(begin, 0), axes('e', begin));
    shape.bias = file_.contains(layer.chain.tensor("bias"));
    builder.conv(layer.chain.name, shape);
  }

  void append(Builder& builder, const Layer& layer) const {
    const auto rank = static_cast<int>(builder.dims().size()) - 2;
    const std::string& name = layer.chain.name;
    if (layer.rank >= 0 && layer.rank != rank) {
      refuse(layer, "it has " + std::to_string(layer.rank) + " spatial axes, the layers before " +
                        std::to_string(rank));
    }
    const Index reads = channels_read(layer);
    if (reads != unknown && reads != builder.channels()) {
      refuse(layer, "it reads " + std::to_string(reads) + " channels, but is given " +
                        std::to_string(builder.channels()));
    }
    const bool bias = file_.contains(layer.chain.tensor("bias"));
    switch (layer.kind) {
      case LayerKind::conv:
        if (rank == 1) append_conv<1>(builder, layer);
        if (rank == 2) append_conv<2>(builder, layer);
        if (rank == 3) append_conv<3>(builder, layer);
        return;
      case LayerKind::linear: builder.linear(name, layer.weight[0], bias); return;
      case LayerKind::batch_norm: builder.batch_norm(name, layer.chain.eps.value_or(1e-5)); return;
      case LayerKind::scale: builder.scale(name, bias); return;
      case LayerKind::avg_pool: break;
    }
    const auto axes = static_cast<std::size_t>(rank);
    const Dims kernel = numbers(layer, 'k', axes, {});
    const Dims padding = numbers(layer, 'p', axes, Dims(axes, 0));
    if (std::ranges::any_of(padding, [](Index pad) { return pad < 0; })) {
      refuse(layer, "a pool has no negative padding");
    }
    builder.avg_pool(kernel, numbers(layer, 's', axes, kernel), padding);
  }

  const Safetensors& file_;
  std::vector<Layer> layers_;
  onnx::DataType type_;
};

// ---- types

constexpr std::pair<Dtype, onnx::DataType> types[] = {{Dtype::F64, onnx::DataType::float64},
                                                      {Dtype::F32, onnx::DataType::float32},
                                                      {Dtype::F16, onnx::DataType::float16},
                                                      {Dtype::BF16, onnx::DataType::bfloat16}};

}  // namespace

std::vector<ChainLayer> parse_chain(const std::string& text) {
  std::vector<ChainLayer> chain;
  for (std::size_t begin = 0; begin <= text.size();) {
    const std::size_t end = std::min(text.find(',', begin), text.size());
    ChainLayer layer{.text = text.substr(begin, end - begin), .name = {}};
    const std::size_t colon = layer.text.rfind(':');
    layer.name = layer.text.substr(0, colon);
    if (layer.name.empty() && (begin > 0 || end < text.size())) {
      wrong(layer, "there is no name, as only a single layer may do without");
    }
    if (colon != std::string::npos) {
      if (colon + 1 == layer.text.size()) wrong(layer, "there is nothing after the colon");
      parse_geometry(layer, std::string_view(layer.text).substr(colon + 1));
    }
    begin = end + 1;
    chain.push_back(std::move(layer));
    if (chain.size() > longest_chain) {
      throw UsageError("more than " + std::to_string(longest_chain) + " layers");
    }
  }
  return chain;
}

onnx::Model chain_model(const Safetensors& file, const ChainOptions& options) {
  return ChainReader(file, options).model(options.input);
}

std::optional<Dtype> layer_dtype(const std::string& name) {
  for (const auto& [dtype, type] : types) {
    if (name == to_string(dtype)) return dtype;
  }
  return std::nullopt;
}

onnx::Model rounded(onnx::Model model, Dtype dtype) {
  const auto type =
      std::ranges::find(types, dtype, &std::pair<Dtype, onnx::DataType>::first)->second;
  const auto floats = [](onnx::DataType each) {
    return each == onnx::DataType::float32 || each == onnx::DataType::float64;
  };
  for (onnx::Tensor& tensor : model.initializers) {
    if (!floats(tensor.type) || tensor.type == type) continue;
    const std::vector<double> values = tensor.values<double>();
    const double largest = type == onnx::DataType::float16   ? 65504
                           : type == onnx::DataType::float64 ? std::numeric_limits<double>::max()
                                                             : std::numeric_limits<float>::max();
    if (std::ranges::any_of(values, [&](double value) { return std::abs(value) > largest; })) {
      throw concertina::NumericalError(model.origin + ": " + onnx::to_string(type) +
                                       " does not hold the elements of " + in_quotes(tensor.name) +
                                       "; write a wider type");
    }
    tensor = rounded_tensor(tensor.name, tensor.dims, values, type);
  }
  for (auto* list : {&model.inputs, &model.outputs}) {
    for (onnx::ValueInfo& info : *list) {
      info.type = type;
      info.encoded = {};
    }
  }
  if (type == onnx::DataType::bfloat16) {  // of which Conv takes it
    model.opsets = {{"", 22}};
    model.ir_version = 10;
  }
  return model;
}

onnx::Model as_rounded(onnx::Model model, const onnx::Model& rounded, onnx::DataType& stored) {
  for (std::size_t i = 0; i < model.initializers.size(); ++i) {
    onnx::Tensor& tensor = model.initializers[i];
    const onnx::Tensor& narrow = rounded.initializers[i];
    if (tensor.type == narrow.type) continue;
    stored = narrow.type;
    tensor = rounded_tensor(tensor.name, tensor.dims, narrow.values<double>(), tensor.type);
  }
  return model;
}

}  // namespace tool
