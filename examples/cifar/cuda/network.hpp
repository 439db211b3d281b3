// SmallNet as a sequence of block programs, on a backend that runs them: a device, or in tests the
// host.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "accelerator.hpp"
#include "convolution.hpp"
#include "operations.hpp"

#include <concertina/error.hpp>
#include <concertina/shape.hpp>

#include <algorithm>
#include <cctype>
#include <compare>
#include <concepts>
#include <cstddef>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <variant>
#include <vector>

namespace cifar::cuda {

/// Which programs a step runs: the same ones for the same kind.
struct StepKind {
  bool training;
  int images;

  friend auto operator<=>(const StepKind&, const StepKind&) = default;
};

/// Programs on a stream run one after another, those on different streams side by side.
enum class Stream : int { origin };

/// Where programs run and numbers lie:
/// - allocate<T>(count): a Buffer<T>, which owns numbers without a value, at data();
/// - upload(span, address): a copy from the host, after what the origin runs; done when it returns;
/// - download(address, span): a copy to the host, likewise;
/// - stream(rank): one more; the lower its rank, the earlier its programs have their turn, those of
///   rank 0 with the origin's;
/// - run(program, purpose, stream): runs it after what was run there before, and returns at once;
/// - wait(later, earlier): what will be run on `later` comes after what was run on `earlier`;
/// - repeat(kind, launches): launches(), which runs programs and does nothing else; from the second
///   time on they may be those that were recorded for the kind. Other streams fork from the origin
///   by waiting for it, and are joined by its waiting for them;
/// - forget(): drops what was recorded, when it is done; throws nothing.
template <class B>
concept Backend = requires(B& backend, std::span<const float> from, std::span<float> to,
                           float* numbers, void (*launches)()) {
  {
    backend.template allocate<float>(Index{1})
  } -> std::same_as<typename B::template Buffer<float>>;
  { backend.template allocate<float>(Index{1}).data() } -> std::same_as<float*>;
  backend.upload(from, numbers);
  backend.download(numbers, to);
  { backend.stream(0) } -> std::same_as<Stream>;
  backend.run(Fill<float>{}, "", Stream::origin);
  backend.wait(Stream::origin, Stream::origin);
  backend.repeat(StepKind{}, launches);
  backend.forget();
};

/// Where tensors lie in a buffer, one behind the other. Each starts at a multiple of 128 bytes, if
/// they are floats, for cuBLAS and wide loads. Programs for all numbers at once run over the gaps,
/// which are zero and remain so.
class Layout {
 public:
  static constexpr Index alignment = 32;  ///< numbers
  struct Range {
    Index first, count;
  };

  /// Returns  where the tensor starts
  Index add(Index numbers) {
    const Index first = count_, end = first + numbers;
    count_ = (end + alignment - 1) / alignment * alignment;
    if (count_ > end) gaps_.push_back({end, count_ - end});
    return first;
  }
  Index count() const { return count_; }  ///< numbers, with gaps
  const std::vector<Range>& gaps() const { return gaps_; }

 private:
  Index count_ = 0;
  std::vector<Range> gaps_;
};

/// A layer's numbers on the device, and their gradients.
template <class Scalar>
struct LayerNumbers {
  Scalar *weight = nullptr, *bias = nullptr;
  Scalar *weight_gradient = nullptr, *bias_gradient = nullptr;
  Index weights = 0, biases = 0;  ///< how many
};

/// An expanded layer: its layers, the first applied first, and the one that they are.
template <class Scalar>
struct ExpandedLayer {
  std::string name;
  std::variant<std::vector<concertina::ConvShape<0>>, std::vector<concertina::ConvShape<2>>> shapes;
  std::vector<LayerNumbers<Scalar>> layers;
  LayerNumbers<Scalar> product;
};

/// Contracts an expanded layer, and pulls gradients back. Either runs programs on one stream and
/// returns at once; the same ones each time.
class Contractor {
 public:
  virtual ~Contractor() = default;
  virtual void forward() = 0;   ///< sets the product's numbers
  virtual void backward() = 0;  ///< sets the layers' gradients, from those of the product
};

template <class Scalar, Backend B>
using MakeContractor = std::function<std::unique_ptr<Contractor>(
    B& backend, const ExpandedLayer<Scalar>& layer, Stream stream)>;

/// A set of images on the device, and a pass over it in batches.
template <class Scalar>
struct Pass {
  const std::uint8_t *pixels, *labels;
  const std::uint32_t* order;
  Clock* clock;
  const Scalar* values;    ///< of normalized_values
  double* losses;          ///< [step]
  std::int32_t* corrects;  ///< [step]
  int batch;
  bool augmented;
  std::uint64_t seed;
};

/// The network, its gradients and its velocities, for batches of up to `capacity` images.
///
/// Of a training's step, the origin has what all layers wait for: forward, and backward to the
/// layers' inputs. If `forked`, each layer has a stream for the rest: its contraction, the gradient
/// of its weights, that of its expansion, and the descent of the latter. Numbers are the same
/// either way.
template <class Scalar, Backend B>
class SmallNet {
 public:
  /// Throws  ShapeError where a tensor is missing, or no layer uses it, or the network has expanded
  ///         layers and nothing to contract them
  SmallNet(B& backend, const NetworkPlan& plan, const Descent& descent, int capacity, bool forked,
           const MakeContractor<Scalar, B>& make_contractor = {})
      : backend_(backend),
        plan_(plan),
        descent_(descent),
        capacity_(capacity),
        forked_(forked),
        make_contractor_(make_contractor),
        images_(allocate(Index{capacity} * image_size)) {
    place_parameters();
    place_statistics();
    make_layers();
    require_all_used();
    reserve(capacity);
  }
  SmallNet(const SmallNet&) = delete;
  SmallNet& operator=(const SmallNet&) = delete;

  /// Makes room for batches of just so many images, before the first of any; for those of
  /// `capacity` there is.
  void reserve(int images) {
    for (ConvBlock& block : blocks_) {
      const Index count = convolution_workspace<Scalar>(of_batch(block.conv, images));
      if (count <= block.workspace_count) continue;
      block.workspace = allocate(count);
      block.workspace_count = count;
    }
  }

  int classes() const { return linear_.back().out; }

  /// Takes the numbers that steps change.
  /// Throws  ShapeError where they are of other lengths than the plan's tensors
  void begin_epoch(const Numbers<Scalar>& numbers) {
    require_lengths(numbers, true);
    upload(numbers.parameters, places_, weights_);
    upload(numbers.velocities, places_, velocities_);
    upload(numbers.statistics, statistics_places_, statistics_);
  }
  /// Returns them.
  /// Throws  as begin_epoch()
  void end_epoch(const Numbers<Scalar>& numbers) {
    require_lengths(numbers, true);
    download(numbers.parameters, places_, weights_);
    download(numbers.velocities, places_, velocities_);
    download(numbers.statistics, statistics_places_, statistics_);
  }
  /// Takes all numbers but the velocities, and does what tests have in common: the contraction.
  /// Throws  as begin_epoch()
  void begin_tests(const Numbers<Scalar>& numbers) {
    require_lengths(numbers, false);
    upload(numbers.parameters, places_, weights_);
    upload(numbers.statistics, statistics_places_, statistics_);
    contract();
    for_each_layer([&](Layer& layer) { await_contraction(layer); });
  }

  /// One step of a training: forward, backward, update.
  void train(const Pass<Scalar>& pass, int images) {
    contract();
    forward(pass, images, true);
    backward(pass, images);
    const auto join = [&](bool expanded) {
      for_each_layer([&](const Layer& layer) {
        if (layer.is_expanded() == expanded) backend_.wait(Stream::origin, layer.stream);
      });
    };
    join(false);
    descend(own_, decay(), pass, "the descent", Stream::origin);
    join(true);
  }

  /// One step of a test: forward.
  void test(const Pass<Scalar>& pass, int images) { forward(pass, images, false); }

 private:
  template <class T>
  using Buffer = typename B::template Buffer<T>;

  /// Tensors on the device, and as they are copied: at once.
  struct Packed {
    Buffer<Scalar> device;
    std::vector<Scalar> host;  // gaps are zero
  };

  /// What the operation of a layer reads: its parameters, or the product of an expansion.
  struct Layer {
    std::string name;
    LayerNumbers<Scalar> numbers;
    Stream stream;
    Layout::Range expansion;  // where the parameters of its layers are
    Buffer<Scalar> product, product_gradient;
    Index product_count;
    std::unique_ptr<Contractor> contractor;

    bool is_expanded() const { return contractor != nullptr; }
  };
  /// A convolution with the norm, ReLU and pool behind it.
  struct ConvBlock : Layer {
    ConvolutionShape conv{};  // of a batch as large as there can be
    Norm<Scalar> norm{};
    Scalar *norm_weight_gradient = nullptr, *norm_bias_gradient = nullptr;
    Buffer<Scalar> maps{}, maps_gradient{}, pooled{}, workspace{};
    Index workspace_count = 0;
    Buffer<double> norm_sums{};
    Buffer<Scalar> norm_batch{};
  };
  struct Linear : Layer {
    int in, out;
    Buffer<Scalar> result, gradient;
  };

  template <class Each>
  void for_each_layer(Each&& each) {
    for (ConvBlock& block : blocks_) each(block);
    for (Linear& layer : linear_) each(layer);
  }

  Buffer<Scalar> allocate(Index count) { return backend_.template allocate<Scalar>(count); }
  Packed pack(Index count) {
    return {allocate(count), std::vector<Scalar>(static_cast<std::size_t>(count))};
  }
  void zero_gaps(const Layout& layout, Scalar* numbers) {
    for (const auto& [first, count] : layout.gaps()) {
      run(Fill<Scalar>{numbers + first, count, Scalar(0)}, "a gap between tensors");
    }
  }

  using Tensors = std::vector<std::span<Scalar>>;
  void upload(const Tensors& tensors, const std::vector<Index>& places, Packed& to) {
    for (std::size_t t = 0; t < tensors.size(); ++t) {
      std::ranges::copy(tensors[t], to.host.begin() + places[t]);
    }
    backend_.upload(std::span<const Scalar>(to.host), to.device.data());
  }
  void download(const Tensors& tensors, const std::vector<Index>& places, Packed& from) {
    backend_.download(from.device.data(), std::span<Scalar>(from.host));
    for (std::size_t t = 0; t < tensors.size(); ++t) {
      std::copy_n(from.host.begin() + places[t], tensors[t].size(), tensors[t].begin());
    }
  }

  void require_lengths(const Numbers<Scalar>& numbers, bool velocities) const {
    require_lengths(numbers.parameters, plan_.parameters, "parameters");
    if (velocities) require_lengths(numbers.velocities, plan_.parameters, "velocities");
    require_lengths(numbers.statistics, plan_.statistics, "statistics");
  }
  static void require_lengths(const Tensors& tensors, const std::vector<NamedShape>& shapes,
                              const std::string& what) {
    if (tensors.size() != shapes.size()) {
      throw concertina::ShapeError(what + " of " + std::to_string(tensors.size()) +
                                   " tensors, where the network has " +
                                   std::to_string(shapes.size()));
    }
    for (std::size_t t = 0; t < shapes.size(); ++t) {
      if (std::ssize(tensors[t]) == shapes[t].count()) continue;
      throw concertina::ShapeError(what + ": " + std::to_string(tensors[t].size()) +
                                   " numbers for " + shapes[t].name + ", which has " +
                                   std::to_string(shapes[t].count()));
    }
  }
  void require_all_used() const {
    for (std::size_t t = 0; t < is_used_.size(); ++t) {
      if (is_used_[t]) continue;
      throw concertina::ShapeError("no layer uses the tensor " + plan_.parameters[t].name + " of " +
                                   std::to_string(plan_.parameters[t].count()) + " numbers");
    }
  }

  template <class Program>
  void run(const Program& program, const std::string& purpose, Stream stream = Stream::origin) {
    backend_.run(program, purpose, stream);
  }
  auto runner(const std::string& name, Stream stream = Stream::origin) {
    return [this, &name, stream](const auto& program, const std::string& purpose) {
      this->run(program, name + ", " + purpose, stream);
    };
  }
  static ConvolutionShape of_batch(ConvolutionShape shape, Index images) {
    shape.batch = images;
    return shape;
  }
  static MapSize maps_of(const ConvBlock& block, int images) {
    return {images, static_cast<int>(block.conv.out), static_cast<int>(block.conv.out_height()),
            static_cast<int>(block.conv.out_width())};
  }
  Scalar decay() const { return static_cast<Scalar>(descent_.decay); }

  /// Tensors of expansions are "conv1.0.weight", others "conv1.weight".
  static bool is_of_expansion(const std::string& name) {
    const std::size_t dot = name.find('.');
    return dot + 1 < name.size() && std::isdigit(static_cast<unsigned char>(name[dot + 1])) != 0;
  }

  /// Those of each expansion together, so that they alone can descend.
  void place_parameters() {
    places_.resize(plan_.parameters.size());
    is_used_.resize(plan_.parameters.size());
    std::map<std::string, std::vector<std::size_t>> tensors;  // of expansions, and "" of the others
    for (std::size_t t = 0; t < places_.size(); ++t) {
      const std::string& name = plan_.parameters[t].name;
      parameter_at_[name] = t;
      tensors[is_of_expansion(name) ? name.substr(0, name.find('.')) : ""].push_back(t);
    }
    for (const auto& [name, of_one] : tensors) {
      const Index first = layout_.count();
      for (const std::size_t t : of_one) places_[t] = layout_.add(plan_.parameters[t].count());
      Layout::Range& range = name.empty() ? own_ : expansion_at_[name];
      range = {first, layout_.count() - first};
    }
    weights_ = pack(layout_.count());
    velocities_ = pack(layout_.count());
    gradients_ = allocate(layout_.count());
    zero_gaps(layout_, gradients_.data());  // those of the others are copied
  }
  void place_statistics() {
    Layout layout;
    for (std::size_t t = 0; t < plan_.statistics.size(); ++t) {
      statistic_at_[plan_.statistics[t].name] = t;
      statistics_places_.push_back(layout.add(plan_.statistics[t].count()));
    }
    statistics_ = pack(layout.count());
  }

  Scalar* statistic(const std::string& name) {
    return statistics_.device.data() + statistics_places_[index_of(statistic_at_, name)];
  }
  static std::size_t index_of(const std::map<std::string, std::size_t>& numbers,
                              const std::string& name) {
    const auto found = numbers.find(name);
    if (found != numbers.end()) return found->second;
    throw concertina::ShapeError("the network has no tensor " + name);
  }

  bool has(const std::string& name) const { return parameter_at_.contains(name); }
  const NamedShape& tensor(const std::string& name) const {
    return plan_.parameters[index_of(parameter_at_, name)];
  }
  const std::vector<Index>& shape_of(const std::string& name) const { return tensor(name).shape; }
  LayerNumbers<Scalar> numbers_of(const std::string& name) {
    LayerNumbers<Scalar> numbers;
    const Index weight = use(name + ".weight");
    numbers.weight = weights_.device.data() + weight;
    numbers.weight_gradient = gradients_.data() + weight;
    numbers.weights = tensor(name + ".weight").count();
    if (!has(name + ".bias")) return numbers;
    const Index bias = use(name + ".bias");
    numbers.bias = weights_.device.data() + bias;
    numbers.bias_gradient = gradients_.data() + bias;
    numbers.biases = tensor(name + ".bias").count();
    return numbers;
  }
  /// Returns  where a parameter lies
  Index use(const std::string& name) {
    const std::size_t t = index_of(parameter_at_, name);
    is_used_[t] = true;
    return places_[t];
  }

  /// The layers that make up one: itself, or those it was expanded into.
  std::vector<std::string> chain_of(const std::string& name) const {
    if (has(name + ".weight")) return {name};
    std::vector<std::string> chain;
    while (has(name + "." + std::to_string(chain.size()) + ".weight")) {
      chain.push_back(name + "." + std::to_string(chain.size()));
    }
    index_of(parameter_at_, chain.empty() ? name + ".weight" : chain.front() + ".weight");
    return chain;
  }

  /// Shapes of a chain's layers; all padding is the first one's.
  template <int Rank>
  std::vector<concertina::ConvShape<Rank>> shapes_of(const std::vector<std::string>& chain,
                                                     Index padding) const {
    std::vector<concertina::ConvShape<Rank>> shapes;
    for (const std::string& layer : chain) {
      const std::vector<Index>& extents = shape_of(layer + ".weight");
      if (extents.size() != 2 + Rank) {
        throw concertina::ShapeError(layer + ".weight has " + std::to_string(extents.size()) +
                                     " axes");
      }
      concertina::ConvShape<Rank> shape{
          .out = extents[0], .in = extents[1], .bias = has(layer + ".bias")};
      for (int axis = 0; axis < Rank; ++axis) {
        shape.kernel_size[axis] = extents[static_cast<std::size_t>(2 + axis)];
      }
      if (shapes.empty()) shape.padding = padding;
      shapes.push_back(shape);
    }
    return shapes;
  }

  void make_layers() {
    // As Network's: only SmallNet's kernel of 3 shrinks the maps.
    const Index padding = plan_.kernel == 3 && plan_.blocks == 3 ? 0 : (plan_.kernel - 1) / 2;
    Index size = side, channels = colours, most_pooled = 0;
    for (Index b = 0; b < plan_.blocks; ++b) {
      const std::string name = "conv" + std::to_string(b + 1);
      const auto chain = chain_of(name);
      ConvBlock& block = blocks_.emplace_back(ConvBlock{layer_of<2>(name, chain, padding)});
      const Index out = shape_of(chain.back() + ".weight")[0];
      block.conv = {.batch = capacity_,
                    .in = channels,
                    .out = out,
                    .height = size,
                    .width = size,
                    .kernel = plan_.kernel,
                    .padding = padding};
      validate(block.conv);
      if (plan_.norms) add_norm(block, static_cast<int>(out));
      const MapSize maps = maps_of(block, capacity_);
      size = maps.height / 2;
      channels = out;
      const Index pooled = channels * size * size * capacity_;
      block.maps = allocate(maps.numbers());
      block.maps_gradient = allocate(maps.numbers());
      block.pooled = allocate(pooled);
      most_pooled = std::max(most_pooled, pooled);
    }
    pooled_gradient_ = allocate(most_pooled);
    Index in = channels * size * size;
    for (const std::string name : {"fc1", "fc2"}) {
      const auto chain = chain_of(name);
      if (shape_of(chain.front() + ".weight")[1] != in) {
        throw concertina::ShapeError(name + " reads " +
                                     std::to_string(shape_of(chain.front() + ".weight")[1]) +
                                     " numbers, and there are " + std::to_string(in));
      }
      const Index out = shape_of(chain.back() + ".weight")[0];
      linear_.push_back({layer_of<0>(name, chain, 0), static_cast<int>(in), static_cast<int>(out),
                         allocate(out * capacity_), allocate(out * capacity_)});
      in = out;
    }
  }

  void add_norm(ConvBlock& block, int channels) {
    const std::string name = block.name + "_bn";
    const LayerNumbers<Scalar> own = numbers_of(name);
    block.norm_sums = backend_.template allocate<double>(Index{2} * Slices::most * channels);
    block.norm_batch = allocate(Index{4} * channels);
    block.norm = {own.weight,
                  own.bias,
                  statistic(name + ".running_mean"),
                  statistic(name + ".running_var"),
                  block.norm_sums.data(),
                  block.norm_batch.data()};
    block.norm_weight_gradient = own.weight_gradient;
    block.norm_bias_gradient = own.bias_gradient;
  }

  /// A layer of its own parameters, or the product of an expansion.
  template <int Rank>
  Layer layer_of(const std::string& name, const std::vector<std::string>& chain, Index padding) {
    auto shapes = shapes_of<Rank>(chain, padding);
    Layer layer{};
    layer.name = name;
    if (forked_) layer.stream = backend_.stream(static_cast<int>(blocks_.size() + linear_.size()));
    if (chain.size() == 1) {
      layer.numbers = numbers_of(name);
      return layer;
    }
    if (!make_contractor_) {
      throw concertina::ShapeError(name + " is expanded, and nothing was given to contract it");
    }
    const Index biases = shapes.back().out, taps = Rank == 0 ? 1 : plan_.kernel * plan_.kernel,
                weights = biases * shapes.front().in * taps;
    Layout layout;
    const Index weight = layout.add(weights), bias = layout.add(biases);
    const auto allocated = [&] {
      auto buffer = allocate(layout.count());
      zero_gaps(layout, buffer.data());
      return buffer;
    };
    layer.product = allocated();
    layer.product_gradient = allocated();
    layer.product_count = layout.count();
    Scalar* const numbers = layer.product.data();
    Scalar* const gradients = layer.product_gradient.data();
    layer.numbers = {numbers + weight, numbers + bias, gradients + weight,
                     gradients + bias, weights,        biases};
    ExpandedLayer<Scalar> expanded{
        .name = name, .shapes = std::move(shapes), .layers = {}, .product = layer.numbers};
    for (const std::string& each : chain) expanded.layers.push_back(numbers_of(each));
    layer.expansion = expansion_at_.at(name);
    layer.contractor = make_contractor_(backend_, expanded, layer.stream);
    return layer;
  }

  /// Sets what expanded layers are contracted to, on their streams.
  void contract() {
    for_each_layer([&](Layer& layer) {
      if (!layer.is_expanded()) return;
      backend_.wait(layer.stream, Stream::origin);
      layer.contractor->forward();
    });
  }
  void await_contraction(const Layer& layer) {
    if (layer.is_expanded()) backend_.wait(Stream::origin, layer.stream);
  }

  /// Behind the gradient of an expanded layer's product: that of its expansion, which descends.
  void pull_back(Layer& layer, const Pass<Scalar>& pass) {
    if (!layer.is_expanded()) return;
    if (descent_.decay_products) {
      run(AddDecay<Scalar>{layer.product.data(), layer.product_gradient.data(), layer.product_count,
                           decay()},
          layer.name + ", the decay of its product", layer.stream);
    }
    layer.contractor->backward();
    descend(layer.expansion, descent_.decay_products ? Scalar(0) : decay(), pass,
            layer.name + ", the descent", layer.stream);
  }
  void descend(const Layout::Range& range, Scalar decay, const Pass<Scalar>& pass,
               const std::string& purpose, Stream stream) {
    run(Descend<Scalar>{weights_.device.data() + range.first, gradients_.data() + range.first,
                        velocities_.device.data() + range.first, pass.clock, range.count,
                        static_cast<Scalar>(descent_.momentum), decay},
        purpose, stream);
  }

  void forward(const Pass<Scalar>& pass, int images, bool training) {
    run(LoadImages<Scalar>{pass.pixels, pass.order, pass.clock, pass.values, images_.data(), images,
                           pass.batch, pass.augmented, pass.seed},
        "images");
    const Scalar* x = images_.data();
    for (ConvBlock& block : blocks_) {
      if (training) await_contraction(block);
      convolution_forward<Scalar>({.shape = of_batch(block.conv, images),
                                   .x = x,
                                   .weight = block.numbers.weight,
                                   .bias = block.numbers.bias,
                                   .y = block.maps.data()},
                                  runner(block.name));
      const detail::NormProgram<Scalar> norm{maps_of(block, images), block.maps.data(), block.norm};
      if (training && block.norm.exists()) run(NormMoments<Scalar>{norm}, block.name + ", moments");
      run(NormReluPool<Scalar>{norm, block.pooled.data(), training}, block.name + ", pool");
      x = block.pooled.data();
    }
    for (Linear& layer : linear_) {
      const bool last = &layer == &linear_.back();
      if (training) await_contraction(layer);
      run(linear<Scalar>(images, layer.in, layer.out, x, layer.numbers.weight, layer.numbers.bias,
                         layer.result.data(), !last),
          layer.name);
      x = layer.result.data();
    }
    Linear& last = linear_.back();
    run(CrossEntropy<Scalar>{last.result.data(), pass.labels, pass.order, pass.clock, pass.losses,
                             pass.corrects, training ? last.gradient.data() : nullptr, images,
                             pass.batch, last.out},
        "the loss");
  }

  void backward(const Pass<Scalar>& pass, int images) {
    for (std::size_t l = linear_.size(); l-- > 0;) {
      Linear& layer = linear_[l];
      const Scalar* const x = l > 0 ? linear_[l - 1].result.data() : blocks_.back().pooled.data();
      Scalar* const x_gradient = l > 0 ? linear_[l - 1].gradient.data() : pooled_gradient_.data();
      backend_.wait(layer.stream, Stream::origin);
      run(linear_weight_gradient<Scalar>(images, layer.in, layer.out, x, layer.gradient.data(),
                                         layer.numbers.weight_gradient,
                                         layer.numbers.bias_gradient),
          layer.name + ", gradient", layer.stream);
      pull_back(layer, pass);
      run(linear_input_gradient<Scalar>(images, layer.in, layer.out, layer.gradient.data(),
                                        layer.numbers.weight, x_gradient, l > 0 ? x : nullptr),
          layer.name + ", gradient of its input");
    }
    for (std::size_t b = blocks_.size(); b-- > 0;) {
      ConvBlock& block = blocks_[b];
      const detail::NormProgram<Scalar> norm{maps_of(block, images), block.maps.data(), block.norm};
      if (block.norm.exists()) {
        run(NormReluPoolSums<Scalar>{norm, pooled_gradient_.data()}, block.name + ", norm's sums");
      }
      run(NormReluPoolGradient<Scalar>{norm, pooled_gradient_.data(), block.maps_gradient.data(),
                                       block.norm_weight_gradient, block.norm_bias_gradient},
          block.name + ", gradient of its maps");
      const ConvolutionShape conv = of_batch(block.conv, images);
      const Scalar* const x = b > 0 ? blocks_[b - 1].pooled.data() : images_.data();
      backend_.wait(block.stream, Stream::origin);
      convolution_weight_gradient<Scalar>({.shape = conv,
                                           .x = x,
                                           .dy = block.maps_gradient.data(),
                                           .workspace = block.workspace.data(),
                                           .dw = block.numbers.weight_gradient,
                                           .db = block.numbers.bias_gradient},
                                          runner(block.name, block.stream));
      pull_back(block, pass);
      if (b == 0) continue;
      convolution_input_gradient<Scalar>({.shape = conv,
                                          .dy = block.maps_gradient.data(),
                                          .weight = block.numbers.weight,
                                          .dx = pooled_gradient_.data()},
                                         runner(block.name));
    }
  }

  B& backend_;
  NetworkPlan plan_;
  Descent descent_;
  int capacity_;
  bool forked_;
  MakeContractor<Scalar, B> make_contractor_;
  std::map<std::string, std::size_t> parameter_at_, statistic_at_;  // numbers in the plan
  std::map<std::string, Layout::Range> expansion_at_;
  std::vector<Index> places_, statistics_places_;
  std::vector<bool> is_used_;  // of the parameters
  Layout layout_;
  Layout::Range own_{};  // parameters of no expansion
  Packed weights_, velocities_, statistics_;
  Buffer<Scalar> gradients_, images_, pooled_gradient_;
  std::vector<ConvBlock> blocks_;
  std::vector<Linear> linear_;
};

}  // namespace cifar::cuda
