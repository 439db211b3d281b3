// SmallNet as a sequence of block programs, on a backend that runs them: a device, or in tests the
// host.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "accelerator.hpp"
#include "convolution.hpp"
#include "operations.hpp"

#include <concertina/error.hpp>
#include <concertina/geometry.hpp>

#include <algorithm>
#include <cctype>
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

/// Where programs run and numbers lie.
///
///     backend.template allocate<T>(count)   Buffer<T>, which owns numbers without a value: data()
///     backend.upload(span, address)         a copy from the host, done when it returns
///     backend.download(address, span)       and one back
///     backend.run(program, "what for")      after what was run before; returns at once
///     backend.repeat(key, launches)         launches(), which runs the same programs for the same
///                                           key, and does nothing else: it may be recorded
template <class B>
concept Backend = requires(B& backend, std::span<const float> from, std::span<float> to,
                           float* numbers, void (*launches)()) {
  {
    backend.template allocate<float>(Index{1})
  } -> std::same_as<typename B::template Buffer<float>>;
  { backend.template allocate<float>(Index{1}).data() } -> std::same_as<float*>;
  backend.upload(from, numbers);
  backend.download(numbers, to);
  backend.run(Fill<float>{}, "");
  backend.repeat(0, launches);
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

/// Contracts a network's expanded layers, and pulls gradients back. Either runs programs and
/// returns at once; the same ones each time.
class Contractor {
 public:
  virtual ~Contractor() = default;
  virtual void forward() = 0;   ///< sets the products' numbers
  virtual void pullback() = 0;  ///< sets the layers' gradients, from those of the products
};

template <class Scalar, Backend B>
using MakeContractor = std::function<std::unique_ptr<Contractor>(
    B& backend, const std::vector<ExpandedLayer<Scalar>>& layers)>;

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
template <class Scalar, Backend B>
class SmallNet {
 public:
  /// Throws  ShapeError where a tensor is missing, or the network has expanded layers and nothing
  ///         to contract them
  SmallNet(B& backend, const NetworkPlan& plan, const Descent& descent, int capacity,
           const MakeContractor<Scalar, B>& make_contractor = {})
      : backend_(backend),
        plan_(plan),
        descent_(descent),
        capacity_(capacity),
        images_(allocate(Index{capacity} * image_size)) {
    place_parameters();
    place_statistics();
    make_layers();
    reserve(capacity);
    if (expanded_.empty()) return;
    if (!make_contractor) {
      throw concertina::ShapeError(expanded_.front().name +
                                   " is expanded, and nothing was given to contract it");
    }
    contractor_ = make_contractor(backend_, expanded_);
  }
  SmallNet(const SmallNet&) = delete;
  SmallNet& operator=(const SmallNet&) = delete;

  /// Makes room for batches of just so many images, before the first of any; for those of
  /// `capacity` there is.
  void reserve(int images) {
    for (const Block& block : blocks_) {
      const Index count = convolution_workspace<Scalar>(of_batch(block.conv, images));
      if (count <= workspace_count_) continue;
      workspace_ = allocate(count);
      workspace_count_ = count;
    }
  }

  void upload(const Numbers<Scalar>& numbers) {
    for (std::size_t t = 0; t < places_.size(); ++t) {
      backend_.upload(std::span<const Scalar>(numbers.parameters[t]), weights_.data() + places_[t]);
      backend_.upload(std::span<const Scalar>(numbers.velocities[t]),
                      velocities_.data() + places_[t]);
    }
    for (std::size_t t = 0; t < statistics_places_.size(); ++t) {
      backend_.upload(std::span<const Scalar>(numbers.statistics[t]),
                      statistics_.data() + statistics_places_[t]);
    }
  }
  void download(const Numbers<Scalar>& numbers) {
    for (std::size_t t = 0; t < places_.size(); ++t) {
      backend_.download(weights_.data() + places_[t], numbers.parameters[t]);
      backend_.download(velocities_.data() + places_[t], numbers.velocities[t]);
    }
    for (std::size_t t = 0; t < statistics_places_.size(); ++t) {
      backend_.download(statistics_.data() + statistics_places_[t], numbers.statistics[t]);
    }
  }

  /// One step of a training: forward, backward, update.
  void train(const Pass<Scalar>& pass, int images) {
    if (contractor_) contractor_->forward();
    forward(pass, images, true);
    backward(images);
    if (contractor_) {
      if (descent_.decay_products) {
        run(AddDecay<Scalar>{products_.data(), product_gradients_.data(), product_count_, decay()},
            "the decay of products");
      }
      contractor_->pullback();
    }
    run(Descend<Scalar>{weights_.data(), gradients_.data(), velocities_.data(), pass.clock, count_,
                        descent_.decay_products ? own_count_ : count_,
                        static_cast<Scalar>(descent_.momentum), decay()},
        "the descent");
  }

  /// What tests of the same numbers have in common: the contraction.
  void begin_tests() {
    if (contractor_) contractor_->forward();
  }
  void test(const Pass<Scalar>& pass, int images) { forward(pass, images, false); }

 private:
  template <class T>
  using Buffer = typename B::template Buffer<T>;

  /// A convolution with the norm, ReLU and pool behind it.
  struct Block {
    std::string name;
    ConvolutionShape conv;  // of a batch as large as there can be
    LayerNumbers<Scalar> numbers;
    Norm<Scalar> norm;
    Scalar *norm_weight_gradient = nullptr, *norm_bias_gradient = nullptr;
    Buffer<Scalar> maps, pooled;
    Buffer<double> norm_sums;
    Buffer<Scalar> norm_batch;
  };
  struct Linear {
    std::string name;
    int in, out;
    LayerNumbers<Scalar> numbers;
    Buffer<Scalar> result, gradient;
  };

  Buffer<Scalar> allocate(Index count) { return backend_.template allocate<Scalar>(count); }
  template <class Program>
  void run(const Program& program, const std::string& purpose) {
    backend_.run(program, purpose);
  }
  auto runner(const std::string& name) {
    return [this, &name](const auto& program, const std::string& purpose) {
      this->run(program, name + ", " + purpose);
    };
  }
  static ConvolutionShape of_batch(ConvolutionShape shape, Index images) {
    shape.batch = images;
    return shape;
  }
  static MapSize maps_of(const Block& block, int images) {
    return {images, static_cast<int>(block.conv.out), static_cast<int>(block.conv.out_height()),
            static_cast<int>(block.conv.out_width())};
  }
  Scalar decay() const { return static_cast<Scalar>(descent_.decay); }

  /// Tensors of expansions are "conv1.0.weight", others "conv1.weight".
  static bool is_of_expansion(const std::string& name) {
    const std::size_t dot = name.find('.');
    return dot + 1 < name.size() && std::isdigit(static_cast<unsigned char>(name[dot + 1])) != 0;
  }

  /// One behind the other, those of expansions last, so that the others alone can decay.
  void place_parameters() {
    places_.resize(plan_.parameters.size());
    for (const bool expansions : {false, true}) {
      for (std::size_t t = 0; t < places_.size(); ++t) {
        const NamedShape& tensor = plan_.parameters[t];
        if (is_of_expansion(tensor.name) != expansions) continue;
        parameter_at_[tensor.name] = t;
        places_[t] = count_;
        count_ += tensor.count();
      }
      if (!expansions) own_count_ = count_;
    }
    weights_ = allocate(count_);
    gradients_ = allocate(count_);
    velocities_ = allocate(count_);
  }
  void place_statistics() {
    Index count = 0;
    for (std::size_t t = 0; t < plan_.statistics.size(); ++t) {
      statistic_at_[plan_.statistics[t].name] = t;
      statistics_places_.push_back(count);
      count += plan_.statistics[t].count();
    }
    statistics_ = allocate(count);
  }

  Scalar* statistic(const std::string& name) {
    return statistics_.data() + statistics_places_[index_of(statistic_at_, name)];
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
    const Index weight = places_[index_of(parameter_at_, name + ".weight")];
    numbers.weight = weights_.data() + weight;
    numbers.weight_gradient = gradients_.data() + weight;
    numbers.weights = tensor(name + ".weight").count();
    if (!has(name + ".bias")) return numbers;
    const Index bias = places_[index_of(parameter_at_, name + ".bias")];
    numbers.bias = weights_.data() + bias;
    numbers.bias_gradient = gradients_.data() + bias;
    numbers.biases = tensor(name + ".bias").count();
    return numbers;
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
        shape.kernel[axis] = extents[static_cast<std::size_t>(2 + axis)];
      }
      if (shapes.empty()) shape.geometry.padding = padding;
      shapes.push_back(shape);
    }
    return shapes;
  }

  void make_layers() {
    std::vector<std::pair<std::string, Index>> layers;  // names and taps
    for (Index b = 0; b < plan_.blocks; ++b) {
      layers.emplace_back("conv" + std::to_string(b + 1), plan_.kernel * plan_.kernel);
    }
    layers.emplace_back("fc1", 1), layers.emplace_back("fc2", 1);
    Index products = 0;
    for (const auto& [name, taps] : layers) products += numbers_of_product(chain_of(name), taps);
    products_ = allocate(products);
    product_gradients_ = allocate(products);

    // As Network's: only SmallNet's kernel of 3 shrinks the maps.
    const Index padding = plan_.kernel == 3 && plan_.blocks == 3 ? 0 : (plan_.kernel - 1) / 2;
    Index size = side, channels = colours, most_maps = 0, most_pooled = 0;
    for (Index b = 0; b < plan_.blocks; ++b) {
      const auto& [name, taps] = layers[static_cast<std::size_t>(b)];
      const auto chain = chain_of(name);
      Block& block = blocks_.emplace_back();
      block.name = name;
      const Index out = shape_of(chain.back() + ".weight")[0];
      block.conv = {.batch = capacity_,
                    .in = channels,
                    .out = out,
                    .height = size,
                    .width = size,
                    .kernel = plan_.kernel,
                    .padding = padding};
      validate(block.conv);
      block.numbers = computed(name, chain, shapes_of<2>(chain, padding), taps);
      if (plan_.norms) add_norm(block, static_cast<int>(out));
      const MapSize maps = maps_of(block, capacity_);
      size = maps.height / 2;
      channels = out;
      const Index pooled = channels * size * size * capacity_;
      block.maps = allocate(maps.numbers());
      block.pooled = allocate(pooled);
      most_maps = std::max(most_maps, maps.numbers());
      most_pooled = std::max(most_pooled, pooled);
    }
    maps_gradient_ = allocate(most_maps);
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
      linear_.push_back({name, static_cast<int>(in), static_cast<int>(out),
                         computed(name, chain, shapes_of<0>(chain, 0), 1),
                         allocate(out * capacity_), allocate(out * capacity_)});
      in = out;
    }
  }

  void add_norm(Block& block, int channels) {
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

  /// Weights and biases of a chain's product; none of a layer that is no chain.
  Index numbers_of_product(const std::vector<std::string>& chain, Index taps) const {
    if (chain.size() == 1) return 0;
    const Index out = shape_of(chain.back() + ".weight")[0];
    return out * shape_of(chain.front() + ".weight")[1] * taps + out;
  }

  /// The numbers that the operation of a layer reads: the parameters, or a product of them.
  template <int Rank>
  LayerNumbers<Scalar> computed(const std::string& name, const std::vector<std::string>& chain,
                                std::vector<concertina::ConvShape<Rank>> shapes, Index taps) {
    if (chain.size() == 1) return numbers_of(name);
    ExpandedLayer<Scalar> layer{
        .name = name, .shapes = std::move(shapes), .layers = {}, .product = {}};
    for (const std::string& each : chain) layer.layers.push_back(numbers_of(each));
    const Index count = numbers_of_product(chain, taps),
                biases = shape_of(chain.back() + ".weight")[0], weights = count - biases;
    Scalar* const numbers = products_.data() + product_count_;
    Scalar* const gradients = product_gradients_.data() + product_count_;
    product_count_ += count;
    layer.product = {numbers, numbers + weights, gradients, gradients + weights, weights, biases};
    expanded_.push_back(std::move(layer));
    return expanded_.back().product;
  }

  void forward(const Pass<Scalar>& pass, int images, bool training) {
    run(LoadImages<Scalar>{pass.pixels, pass.order, pass.clock, pass.values, images_.data(), images,
                           pass.batch, pass.augmented, pass.seed},
        "images");
    const Scalar* x = images_.data();
    for (Block& block : blocks_) {
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

  void backward(int images) {
    for (std::size_t l = linear_.size(); l-- > 0;) {
      Linear& layer = linear_[l];
      const Scalar* const x = l > 0 ? linear_[l - 1].result.data() : blocks_.back().pooled.data();
      Scalar* const x_gradient = l > 0 ? linear_[l - 1].gradient.data() : pooled_gradient_.data();
      run(linear_weight_gradient<Scalar>(images, layer.in, layer.out, x, layer.gradient.data(),
                                         layer.numbers.weight_gradient,
                                         layer.numbers.bias_gradient),
          layer.name + ", gradient");
      run(linear_input_gradient<Scalar>(images, layer.in, layer.out, layer.gradient.data(),
                                        layer.numbers.weight, x_gradient, l > 0 ? x : nullptr),
          layer.name + ", gradient of its input");
    }
    for (std::size_t b = blocks_.size(); b-- > 0;) {
      Block& block = blocks_[b];
      const detail::NormProgram<Scalar> norm{maps_of(block, images), block.maps.data(), block.norm};
      if (block.norm.exists()) {
        run(NormReluPoolSums<Scalar>{norm, pooled_gradient_.data()}, block.name + ", norm's sums");
      }
      run(NormReluPoolGradient<Scalar>{norm, pooled_gradient_.data(), maps_gradient_.data(),
                                       block.norm_weight_gradient, block.norm_bias_gradient},
          block.name + ", gradient of its maps");
      const ConvolutionShape conv = of_batch(block.conv, images);
      const Scalar* const x = b > 0 ? blocks_[b - 1].pooled.data() : images_.data();
      convolution_weight_gradient<Scalar>({.shape = conv,
                                           .x = x,
                                           .dy = maps_gradient_.data(),
                                           .workspace = workspace_.data(),
                                           .dw = block.numbers.weight_gradient,
                                           .db = block.numbers.bias_gradient},
                                          runner(block.name));
      if (b == 0) continue;
      convolution_input_gradient<Scalar>({.shape = conv,
                                          .dy = maps_gradient_.data(),
                                          .weight = block.numbers.weight,
                                          .dx = pooled_gradient_.data()},
                                         runner(block.name));
    }
  }

  B& backend_;
  NetworkPlan plan_;
  Descent descent_;
  int capacity_;
  std::map<std::string, std::size_t> parameter_at_, statistic_at_;  // numbers in the plan
  std::vector<Index> places_, statistics_places_;
  Index count_ = 0, own_count_ = 0, product_count_ = 0, workspace_count_ = 0;
  Buffer<Scalar> weights_, gradients_, velocities_, statistics_, products_, product_gradients_;
  Buffer<Scalar> images_, maps_gradient_, pooled_gradient_, workspace_;
  std::vector<Block> blocks_;
  std::vector<Linear> linear_;
  std::vector<ExpandedLayer<Scalar>> expanded_;
  std::unique_ptr<Contractor> contractor_;
};

}  // namespace cifar::cuda
