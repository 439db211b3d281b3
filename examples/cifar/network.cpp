// SPDX-License-Identifier: Apache-2.0
#include "network.hpp"

#include "on_tape.hpp"
#include "onnx/builder.hpp"
#include "text.hpp"

#include <concertina/contract.hpp>
#include <concertina/expand.hpp>
#include <concertina/random.hpp>

#include <nlohmann/json.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <memory>
#include <random>
#include <tuple>

namespace cifar {
namespace {

using concertina::ConvShape, concertina::Error, concertina::FormatError;
using nlohmann::json;
namespace onnx = concertina::onnx;

constexpr double onnx_eps = double{1e-5F};  // of batch norms, as a model holds it
constexpr Index hidden = 64;                // numbers of fc1's output

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

/// The layers that a convolution expands into; itself alone where the model leaves it.
std::vector<ConvShape<2>> expanded(const NetworkOptions& options, const ConvShape<2>& shape) {
  const bool cl = contains(options.model, "cl"), ck = contains(options.model, "ck");
  if (!cl && !ck) return {shape};
  concertina::ExpandOptions expand{.rate = options.rate};
  const Index layers = cl ? 3 : (options.kernel - 1) / 2;
  const bool first = shape.in == 3;
  if (first && layers > 2) {
    expand.widths.assign(static_cast<std::size_t>(layers - 1),
                         static_cast<Index>(std::llround(options.rate * 8)));
    expand.widths.front() = 3;
  }
  return cl ? expand_cl(shape, expand) : expand_ck(shape, expand);
}

json json_of(const Normalization& normalization) {
  return {{"mean", normalization.mean}, {"std", normalization.deviation}};
}

json json_of(const NetworkOptions& options) {
  return {{"model", options.model}, {"kernel", options.kernel},
          {"rate", options.rate},   {"blocks", options.blocks},
          {"width", options.width}, {"classes", options.classes},
          {"norms", options.norms}, {"compute", compute_names.of(options.compute)}};
}

/// Layers as nodes of a graph.
template <class Scalar>
struct InGraph {
  using Map = tool::Builder;
  static constexpr bool contracts = false;

  static std::string name_of(const Tensor<Scalar>& weight) {
    return weight.name.substr(0, weight.name.rfind('.'));
  }
  Map layer(Map x, const ConvShape<2>& shape, const Weights<Scalar>& weights,
            const Chain<Scalar, 2>&) const {
    return x.conv(name_of(*weights.weight), shape);
  }
  Map layer(Map x, const ConvShape<0>& shape, const Weights<Scalar>& weights,
            const Chain<Scalar, 0>&) const {
    if (x.dims().size() > 2) x.flatten();
    return x.linear(name_of(*weights.weight), shape.out, shape.bias);
  }
  Map norm(Map x, const NormTensors<Scalar>& norm, const concertina::Padding<2>& = 0) const {
    return x.batch_norm(name_of(*norm.weight), onnx_eps);
  }
  Map relu(Map x) const { return x.relu(); }
  Map max_pool(Map x) const { return x.max_pool({2, 2}, {2, 2}, {0, 0}); }
  Map mean_pool(Map x) const { return x.global_avg_pool(); }
  Map average_pool(Map x, const concertina::PerAxis<2>& kernel) const {
    return x.avg_pool({kernel[0], kernel[1]}, {1, 1}, {0, 0});
  }
  Map sum(const std::vector<Map>& branches) const { return Map(branches.front()).sum(branches); }
  Map detached(Map x) const { return x; }
};

}  // namespace

const tool::Names<Compute> compute_names{"way of computing an expansion",
                                         {{Compute::automatic, "auto"},
                                          {Compute::contracted, "contracted"},
                                          {Compute::layered, "layered"},
                                          {Compute::nonlinear, "nonlinear"}}};

void NetworkOptions::validate() const {
  if (std::ranges::find(model_names(), model) == model_names().end()) {
    throw Error("there is no model '" + model + "'; there are " + tool::listed(model_names()));
  }
  require_option(blocks == 3 || blocks == 4, "blocks", blocks,
                 "SmallNet has 3, the deeper network 4");
  require_option(kernel >= 1 && kernel <= 31 && kernel % 2 == 1, "kernel", kernel,
                 "odd ones from 1 to 31 are possible");
  require_option(!contains(model, "ck") || kernel > 3, "kernel", kernel,
                 "CK expands kernels from 5 on into 3x3 layers; CL expands any");
  require_option(!is_block() || kernel > 1, "kernel", kernel, model + " needs one from 3 on");
  if (is_block() && compute == Compute::nonlinear) {
    throw Error("there is no nonlinear counterpart of " + model);
  }
  require_option(classes >= 2 && classes <= 256, "classes", classes, "2 to 256 are possible");
  require_option(rate >= 1 && rate <= 64, "rate", rate, "1 to 64 are possible");
  require_option(width >= 1 && width <= 256, "width", width,
                 "1 to 256 are possible, ResNet-18 has 64");
}

const std::vector<std::string>& model_names() {
  static const std::vector<std::string> names = {"compact",   "fc",    "cl",       "cl+fc",
                                                 "ck",        "ck+fc", "acnet",    "repvgg",
                                                 "mobileone", "dbb",   "cl+norms", "resnet18"};
  return names;
}

bool NetworkOptions::is_block() const {
  return model == "acnet" || model == "repvgg" || model == "mobileone" || model == "dbb" ||
         model == "cl+norms";
}

bool contracts(const NetworkOptions& options) {
  const bool nonlinear = options.is_expanded() && options.compute == Compute::nonlinear;
  return !options.is_resnet() && !nonlinear;
}

concertina::io::Safetensors tensors_of(const onnx::Model& model) {
  using concertina::io::Dtype;
  concertina::io::Safetensors file{
      .origin = model.origin, .metadata = model.metadata, .tensors = {}};
  for (const onnx::Tensor& tensor : model.initializers) {
    const bool single = tensor.type == onnx::DataType::float32;
    const bool known = single || tensor.type == onnx::DataType::float64;
    file.tensors[tensor.name] = {.dtype = single  ? Dtype::F32
                                          : known ? Dtype::F64
                                                  : Dtype::Other,
                                 .shape = {tensor.dims.begin(), tensor.dims.end()},
                                 .bytes = {tensor.elements.begin(), tensor.elements.end()},
                                 .other_dtype = known ? "" : to_string(tensor.type)};
  }
  return file;
}

namespace {

template <class Stored>
void require_numbers(const concertina::io::Safetensors& file, const std::string& name) {
  const bool variance = name.ends_with(".running_var");
  const auto numbers = file.view<Stored>(name);
  for (std::size_t i = 0; i < numbers.size(); ++i) {
    const Stored number = numbers[i];
    if (std::isfinite(number) && !(variance && number < 0)) continue;
    throw FormatError(
        file.origin + ": tensor '" + name + "' has " + tool::brief(number) + " as element " +
        std::to_string(i) +
        (variance ? "; variances must be finite and not negative" : "; elements must be finite"));
  }
}

}  // namespace

concertina::io::Safetensors read_network(const std::filesystem::path& path) {
  concertina::io::Safetensors file = path.extension() == ".onnx"
                                         ? tensors_of(onnx::read_model(path))
                                         : concertina::io::read_safetensors(path);
  for (const auto& [name, tensor] : file.tensors) {
    if (tensor.dtype == concertina::io::Dtype::F32) require_numbers<float>(file, name);
    if (tensor.dtype == concertina::io::Dtype::F64) require_numbers<double>(file, name);
  }
  return file;
}

NetworkOptions options_of(const concertina::io::Safetensors& file) {
  const auto found = file.metadata.find("network");
  if (found == file.metadata.end() && file.contains("layer4.1.conv2.weight")) {
    const auto extent = [&](const char* name) {
      const auto& shape = file.tensor(name).shape;
      return shape.empty() ? 0 : shape.front();
    };
    NetworkOptions options{
        .model = "resnet18", .width = extent("conv1.weight"), .classes = extent("fc.weight")};
    try {
      options.validate();
    } catch (const Error& error) {
      throw FormatError(file.origin + ": " + error.what());
    }
    return options;
  }
  if (found == file.metadata.end()) {
    throw FormatError(file.origin +
                      ": no metadata 'network'; this program writes it into the "
                      "files that it can read");
  }
  try {
    const json network = json::parse(found->second);
    const auto count = [&](const char* key) {
      const json& number = network.at(key);
      if (number.is_number_integer()) return number.get<Index>();
      throw FormatError(file.origin + ": metadata 'network': " + key + " is " + number.dump() +
                        ", expected a whole number");
    };
    NetworkOptions options{.model = network.at("model"),
                           .kernel = count("kernel"),
                           .rate = network.at("rate"),
                           .blocks = count("blocks"),
                           .width = network.contains("width") ? count("width") : Index{64},
                           .classes = count("classes"),
                           .compute = compute_names.of(network.at("compute").get<std::string>()),
                           .norms = network.at("norms")};
    options.validate();
    return options;
  } catch (const json::exception& error) {
    throw FormatError(file.origin + ": metadata 'network' describe none: " + error.what());
  } catch (const FormatError&) {
    throw;
  } catch (const Error& error) {
    throw FormatError(file.origin + ": metadata 'network': " + error.what());
  }
}

std::optional<Normalization> normalization_of(const concertina::io::Safetensors& file) {
  const auto found = file.metadata.find("normalization");
  if (found == file.metadata.end()) return std::nullopt;
  try {
    const json numbers = json::parse(found->second);
    return Normalization{.mean = numbers.at("mean"), .deviation = numbers.at("std")};
  } catch (const json::exception& error) {
    throw FormatError(file.origin +
                      ": metadata 'normalization' has not a mean and a std for each "
                      "colour: " +
                      error.what());
  }
}

namespace {

/// Throws FormatError where a file's tensor is of another shape.
void require_shape(const concertina::io::Safetensors& file, const std::string& name,
                   const std::vector<Index>& shape) {
  const auto& given = file.tensor(name);
  if (given.shape == shape) return;
  throw FormatError(file.origin + ": tensor '" + name + "' is of shape " +
                    tool::to_text(given.shape) + ", the network's of " + tool::to_text(shape));
}

}  // namespace

template <class Scalar>
Tensor<Scalar>& Network<Scalar>::make_tensor(const std::string& name,
                                             const std::vector<Index>& shape) {
  if (file_) require_shape(*file_, name, shape);
  return tape_.tensor(name, shape);
}

template <class Scalar>
template <int Rank>
auto Network<Scalar>::make_layer(const std::string& name, std::vector<ConvShape<Rank>> chain,
                                 const concertina::PerAxis<Rank>& size) -> Layer<Rank> {
  Layer<Rank> layer{.chain = {.shapes = std::move(chain), .layers = {}}};
  const auto& shapes = layer.chain.shapes;
  const bool expanded = shapes.size() > 1;
  const bool contracts =
      expanded && (options_.compute == Compute::automatic
                       ? concertina::Form<Rank>(shapes).cheaper_contracted(tape_.capacity(), size)
                       : options_.compute == Compute::contracted);
  if (expanded) (contracts ? contracted_names_ : layered_names_).push_back(name);
  for (std::size_t l = 0; l < shapes.size(); ++l) {
    const ConvShape<Rank>& each = shapes[l];
    const std::string prefix = shapes.size() == 1 ? name : name + "." + std::to_string(l);
    Weights<Scalar> weights{&make_tensor(prefix + ".weight", weight_extents(each)),
                            each.bias ? &make_tensor(prefix + ".bias", {each.out}) : nullptr};
    const double bound = 1 / std::sqrt(static_cast<double>(each.in * numel(each.kernel_size)));
    for (Tensor<Scalar>* tensor : {weights.weight, weights.bias}) {
      if (!tensor) continue;
      parameters_.push_back(tensor);
      uniform_.emplace_back(tensor, bound);
      if (contracts) {
        contracted_.push_back(tensor);
      } else {
        computed_.push_back(tensor);
      }
    }
    layer.chain.layers.push_back(weights);
  }
  if (contracts) {
    layer.contraction = contractions_.add(layer.chain);
    const auto& [weight, bias] = layer.contraction.first;
    computed_.push_back(weight);
    if (bias) computed_.push_back(bias);
  }
  return layer;
}

template <class Scalar>
NormTensors<Scalar> Network<Scalar>::make_norm(const std::string& name, Index channels) {
  const NormTensors<Scalar> norm{&make_tensor(name + ".weight", {channels}),
                                 &make_tensor(name + ".bias", {channels}),
                                 &make_tensor(name + ".running_mean", {channels}),
                                 &make_tensor(name + ".running_var", {channels})};
  for (Tensor<Scalar>* ones : {norm.weight, norm.running_var}) {
    std::ranges::fill(ones->value, Scalar(1));
  }
  for (auto* list : {&parameters_, &computed_}) {
    list->insert(list->end(), {norm.weight, norm.bias});
  }
  norm_weights_.push_back(norm.weight);
  statistics_.insert(statistics_.end(), {norm.running_mean, norm.running_var});
  return norm;
}

template <class Scalar>
Network<Scalar>::Network(const NetworkOptions& options, Index capacity, ThreadPool& pool,
                         bool detached_classifier, const concertina::io::Safetensors* file)
    : options_((options.validate(), options)),
      file_(file),
      tape_(capacity, pool),
      contractions_(tape_),
      detached_classifier_(detached_classifier) {
  Maps<Scalar>& images = tape_.maps(3, 32, 32, false);
  record_source<Scalar>(tape_, images, [this](Index chunk, Scalar* to) {
    if (source_) source_(chunk, to);
  });
  options_.is_resnet() ? make_resnet() : make_smallnet();
  file_ = nullptr;
  if (options_.compute == Compute::automatic) {
    if (layered_names_.empty()) options_.compute = Compute::contracted;
    if (contracted_names_.empty() && !layered_names_.empty()) options_.compute = Compute::layered;
  }
  OnTape<Scalar> on{tape_};
  std::tie(features_, logits_) = heads(on, &images);
  loss_ = std::make_unique<CrossEntropy<Scalar>>(tape_, *logits_);
}

template <class Scalar>
void Network<Scalar>::make_smallnet() {
  const Index kernel = options_.kernel;
  const Index padding = kernel == 3 && options_.blocks == 3 ? 0 : (kernel - 1) / 2;
  Index size = 32, channels = 3;
  for (Index b = 0; b < options_.blocks; ++b) {
    const std::string name = "conv" + std::to_string(b + 1);
    const Index out = Index{8} << b;
    ConvShape<2> shape{
        .out = out, .in = channels, .kernel_size = kernel, .padding = padding, .bias = true};
    if (options_.is_block() && options_.norms) {
      shape.bias = false;
      make_block(name, shape, size);
    } else {
      Block& block = blocks_.emplace_back();
      block.conv.push_back(make_layer<2>(name, expanded(options_, shape), size));
      if (options_.norms) block.norm.push_back(make_norm(name + "_bn", out));
    }
    size = (size + 2 * padding - kernel + 1) / 2;
    channels = out;
  }
  const ConvShape<0> fc1{.out = hidden, .in = channels * size * size, .bias = true};
  const ConvShape<0> fc2{.out = options_.classes, .in = hidden, .bias = true};
  linear_.push_back(make_layer<0>("fc1", contains(options_.model, "fc")
                                             ? expand_fc(fc1, {.rate = options_.rate})
                                             : std::vector{fc1}));
  linear_.push_back(make_layer<0>("fc2", {fc2}));
}

template <class Scalar>
void Network<Scalar>::make_block(const std::string& name, const ConvShape<2>& shape, Index size) {
  Block& block = blocks_.emplace_back();
  const auto add = [&](std::vector<Normed>& branch, const std::string& own,
                       const ConvShape<2>& each, const concertina::Padding<2>& margin = 0) {
    branch.push_back({make_layer<2>(name + "." + own, {each}),
                      make_norm(name + "." + own + "_bn", each.out), margin});
  };
  /// A branch of a smaller kernel reads what the middle of the whole one reads: less padding.
  const auto smaller = [&](Index height, Index width) {
    ConvShape<2> branch = shape;
    branch.kernel_size = {height, width};
    branch.padding = {shape.padding.start[0] - (shape.kernel_size[0] - height) / 2,
                      shape.padding.start[1] - (shape.kernel_size[1] - width) / 2};
    return branch;
  };
  const Index kernel = options_.kernel;
  if (options_.model == "acnet") {
    add(block.branches.emplace_back(), "square", shape);
    add(block.branches.emplace_back(), "vertical", smaller(kernel, 1));
    add(block.branches.emplace_back(), "horizontal", smaller(1, kernel));
  } else if (options_.model == "repvgg") {
    add(block.branches.emplace_back(), "dense", shape);
    add(block.branches.emplace_back(), "point", smaller(1, 1));
  } else if (options_.model == "mobileone") {
    for (const char* own : {"dense0", "dense1", "dense2", "dense3"}) {
      add(block.branches.emplace_back(), own, shape);
    }
    add(block.branches.emplace_back(), "scale", smaller(1, 1));
  } else if (options_.model == "dbb") {
    add(block.branches.emplace_back(), "origin", shape);
    add(block.branches.emplace_back(), "point", smaller(1, 1));
    // Padding stands before the 1x1, whose norm does not count it.
    ConvShape<2> point = shape, window = shape;
    point.kernel_size = 1;
    window.padding = 0;
    auto& pooled = block.branches.emplace_back();
    add(pooled, "before_pool", point, point.padding);
    ConvShape<2> pool = window;
    pool.in = pool.groups = pool.out;
    pooled.push_back({{.chain = {{pool}, {{}}}}, make_norm(name + ".pool_bn", pool.out)});
    auto& chain = block.branches.emplace_back();
    point.out = point.in;
    add(chain, "reduce", point, point.padding);
    identities_.push_back(chain.front().conv.chain.layers.front().weight);
    add(chain, "spatial", window);
  } else {
    auto& branch = block.branches.emplace_back();
    for (const ConvShape<2>& each : expanded(options_, shape)) {
      add(branch, std::to_string(branch.size()), each);
    }
  }
  block.contracts =
      options_.compute == Compute::contracted ||
      (options_.compute == Compute::automatic &&
       cheaper_contracted(normed(block), concertina::PerAxis<2>(size), tape_.capacity()));
  (block.contracts ? contracted_names_ : layered_names_).push_back(name);
}

template <class Scalar>
NormedBranches<Scalar> Network<Scalar>::normed(const Block& block) const {
  NormedBranches<Scalar> branches;
  for (const auto& branch : block.branches) {
    auto& layers = branches.emplace_back();
    for (const auto& [conv, norm, margin] : branch) {
      layers.push_back({conv.chain.shapes.front(), conv.chain.layers.front(), norm, margin});
    }
  }
  return branches;
}

template <class Scalar>
void Network<Scalar>::make_resnet() {
  const auto conv = [&](const std::string& name, Index in, Index out, Index kernel, Index stride) {
    const ConvShape<2> shape{
        .out = out, .in = in, .kernel_size = kernel, .stride = stride, .padding = kernel / 2};
    return make_layer<2>(name, {shape});
  };
  Index channels = options_.width;
  Block& stem = blocks_.emplace_back();
  stem.conv.push_back(conv("conv1", 3, channels, 3, 1));
  stem.norm.push_back(make_norm("bn1", channels));
  for (Index stage = 0; stage < 4; ++stage) {
    for (Index block = 0; block < 2; ++block) {
      const std::string name =
          "layer" + std::to_string(stage + 1) + "." + std::to_string(block) + ".";
      const Index out = options_.width << stage, stride = stage > 0 && block == 0 ? 2 : 1;
      auto& branches = blocks_.emplace_back().branches;
      const auto add = [&](const char* own, const char* norm, Index in, Index kernel, Index by) {
        Layer<2> layer = conv(name + own, in, out, kernel, by);
        branches.back().push_back({std::move(layer), make_norm(name + norm, out)});
      };
      branches.emplace_back();
      add("conv1", "bn1", channels, 3, stride);
      add("conv2", "bn2", out, 3, 1);
      if (stride > 1) {
        branches.emplace_back();
        add("downsample.0", "downsample.1", channels, 1, stride);
      }
      channels = out;
    }
  }
  const ConvShape<0> fc{.out = options_.classes, .in = channels, .bias = true};
  linear_.push_back(make_layer<0>("fc", {fc}));
}

template <class Scalar>
std::vector<const Tensor<Scalar>*> Network<Scalar>::decay_contractions(double decay) {
  if (options_.compute != Compute::contracted) {
    throw Error("the decay of products needs contracted expansions; these are " +
                compute_names.of(options_.compute));
  }
  contractions_.set_decay(decay);
  return contracted_;
}

template <class Scalar>
template <class On, int Rank>
typename On::Map Network<Scalar>::apply(On& on, const Layer<Rank>& layer,
                                        typename On::Map x) const {
  const auto& [contraction, shape] = layer.contraction;
  if (On::contracts && contraction.weight) return on.layer(x, shape, contraction, layer.chain);
  for (std::size_t l = 0; l < layer.chain.shapes.size(); ++l) {
    if (l > 0 && options_.compute == Compute::nonlinear) x = on.relu(x);
    x = on.layer(x, layer.chain.shapes[l], layer.chain.layers[l], {});
  }
  return x;
}

template <class Scalar>
template <class On>
typename On::Map Network<Scalar>::apply(On& on, const Block& block, typename On::Map x) const {
  if (block.branches.empty()) {
    x = apply(on, block.conv.front(), x);
    if (!block.norm.empty()) x = on.norm(x, block.norm.front());
    return on.relu(x);
  }
  if constexpr (requires { &On::block; }) {
    if (block.contracts) return on.relu(on.block(x, normed(block)));
  }
  std::vector<typename On::Map> summands;
  for (const auto& branch : block.branches) {
    typename On::Map y = x;
    for (const Normed& each : branch) {
      if (options_.is_resnet() && &each != &branch.front()) y = on.relu(y);
      const auto& [shapes, layers] = each.conv.chain;
      y = layers.front().weight ? apply(on, each.conv, y)
                                : on.average_pool(y, shapes.front().kernel_size);
      y = on.norm(y, each.norm, each.margin);
    }
    summands.push_back(y);
  }
  if (options_.is_resnet() && summands.size() == 1) summands.push_back(x);
  return on.relu(summands.size() == 1 ? summands.front() : on.sum(summands));
}

template <class Scalar>
template <class On>
typename On::Map Network<Scalar>::apply_to_last(On& on, typename On::Map x) const {
  for (const Block& block : blocks_) {
    x = apply(on, block, x);
    if (!options_.is_resnet()) x = on.max_pool(x);
  }
  return options_.is_resnet() ? on.mean_pool(x) : on.relu(apply(on, linear_.front(), x));
}

template <class Scalar>
template <class On>
auto Network<Scalar>::heads(On& on, typename On::Map images) const
    -> std::pair<typename On::Map, typename On::Map> {
  typename On::Map features = apply_to_last(on, std::move(images));
  typename On::Map logits =
      apply(on, linear_.back(), detached_classifier_ ? on.detached(features) : features);
  return {std::move(features), std::move(logits)};
}

template <class Scalar>
auto Network<Scalar>::record(cuda::Recorder<Scalar>& on, Map images) const -> std::pair<Map, Map> {
  return heads(on, images);
}

template <class Scalar>
void Network<Scalar>::initialize(std::uint64_t seed, bool uniform_norms) {
  std::mt19937_64 generator(seed);
  for (const auto& [tensor, bound] : uniform_) {
    for (Scalar& number : tensor->value) {
      number = static_cast<Scalar>(concertina::random_uniform(generator, bound));
    }
  }
  for (Tensor<Scalar>* tensor : identities_) {
    Eigen::Map<Eigen::MatrixX<Scalar>>(tensor->value.data(), tensor->shape[0], tensor->shape[1])
        .setIdentity();
  }
  for (Tensor<Scalar>* tensor : norm_weights_) {
    for (Scalar& number : tensor->value) {
      number = uniform_norms
                   ? static_cast<Scalar>((concertina::random_uniform(generator, 1) + 1) / 2)
                   : Scalar(1);
    }
  }
  tape_.tensors_changed();
}

template <class Scalar>
Index Network<Scalar>::parameter_count() const {
  Index count = 0;
  for (const Tensor<Scalar>* tensor : parameters_) count += std::ssize(tensor->value);
  return count;
}

template <class Scalar>
concertina::io::Safetensors Network<Scalar>::save() const {
  concertina::io::Safetensors file;
  for (const auto* tensors : {&parameters_, &statistics_}) {
    for (const Tensor<Scalar>* tensor : *tensors) {
      file.add(tensor->name, tensor->shape, tensor->value);
    }
  }
  file.metadata["network"] = json_of(options_).dump();
  if (normalization_) file.metadata["normalization"] = json_of(*normalization_).dump();
  return file;
}

template <class Scalar>
onnx::Model Network<Scalar>::model() const {
  constexpr onnx::DataType type = onnx::data_type_of<Scalar>();
  tool::Builder x(options_.model, normalization_ ? onnx::DataType::uint8 : type,
                  {tool::unknown, 3, 32, 32});
  if (normalization_) {
    const auto& [mean, deviation] = *normalization_;
    x.cast(type).with_constant("Div", {255}, {});
    x.with_constant("Sub", {mean.begin(), mean.end()}, {3, 1, 1});
    x.with_constant("Div", {deviation.begin(), deviation.end()}, {3, 1, 1});
  }
  InGraph<Scalar> in_graph;
  x = heads(in_graph, std::move(x)).second;
  const concertina::io::Safetensors file = save();
  onnx::Model model = x.finish([&](const std::string& name, const tool::Dims& dims) {
    return onnx::Tensor::of<Scalar>(name, dims, file.view<Scalar>(name));
  });
  model.metadata = file.metadata;
  return model;
}

template <class Scalar>
void Network<Scalar>::load(const concertina::io::Safetensors& file) {
  std::vector<std::vector<Scalar>> values;
  for (const auto* tensors : {&parameters_, &statistics_}) {
    for (const Tensor<Scalar>* tensor : *tensors) {  // all are checked before one changes
      require_shape(file, tensor->name, tensor->shape);
      values.push_back(file.values<Scalar>(tensor->name));
    }
  }
  normalization_ = normalization_of(file);
  auto next = values.begin();
  for (const auto* tensors : {&parameters_, &statistics_}) {
    for (Tensor<Scalar>* tensor : *tensors) std::ranges::copy(*next++, tensor->value.begin());
  }
  tape_.tensors_changed();
}

template <class Scalar>
onnx::Model Network<Scalar>::contract() const {
  using Wide = std::conditional_t<std::is_same_v<Scalar, float>, double, long double>;
  if (!contracts(options_)) {
    throw Error(options_.is_resnet()
                    ? "resnet18 has no expanded layers to contract"
                    : "the nonlinear counterpart of " + options_.model +
                          " has ReLUs between its layers and contracts to nothing smaller");
  }
  NetworkOptions compact = options_;
  compact.model = "compact";
  compact.compute = Compute::contracted;
  compact.norms = options_.norms && !options_.is_block();
  ThreadPool alone(1);
  Network<Scalar> result(compact, 1, alone);
  result.normalization_ = normalization_;
  const auto copy = [](auto&& from, Tensor<Scalar>* to) {
    std::ranges::copy(from, to->value.begin());
  };
  const auto assign = [&](const auto& conv, const Weights<Scalar>& to) {
    copy(conv.weight(), to.weight);
    copy(conv.bias(), to.bias);
  };
  for (std::size_t b = 0; b < blocks_.size(); ++b) {
    const Weights<Scalar>& to = result.blocks_[b].conv.front().chain.layers.front();
    if (!blocks_[b].branches.empty()) {
      assign(concertina::contract<Wide>(expression_of(normed(blocks_[b]), onnx_eps)), to);
      continue;
    }
    assign(concertina::contract<Wide>(blocks_[b].conv.front().chain.views()), to);
    for (std::size_t n = 0; n < blocks_[b].norm.size(); ++n) {
      const auto &from = blocks_[b].norm[n], &norm = result.blocks_[b].norm[n];
      for (const auto tensor :
           {&NormTensors<Scalar>::weight, &NormTensors<Scalar>::bias,
            &NormTensors<Scalar>::running_mean, &NormTensors<Scalar>::running_var}) {
        copy((from.*tensor)->value, norm.*tensor);
      }
    }
  }
  for (std::size_t l = 0; l < linear_.size(); ++l) {
    assign(concertina::contract<Wide>(linear_[l].chain.views()),
           result.linear_[l].chain.layers.front());
  }
  return result.model();
}

template class Network<float>;
template class Network<double>;

}  // namespace cifar
