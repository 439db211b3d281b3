// A training step of a block with batch norms, contracted by the moments of its input and layer by
// layer, on one core. Layers run as im2col and a matrix product (1x1 without the copy, depthwise
// tap by tap), the same for both. Outputs and gradients are compared before anything is timed.
// SPDX-License-Identifier: Apache-2.0
#include <concertina/blocks.hpp>
#include <concertina/expand.hpp>
#include <concertina/moments.hpp>

#include <benchmark/benchmark.h>

#include <Eigen/Core>

#include <cmath>
#include <functional>
#include <random>
#include <span>
#include <string>
#include <vector>

namespace {

using namespace concertina;
using Matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using View = Eigen::Map<Matrix>;
using ConstView = Eigen::Map<const Matrix>;

/// A batch, [batch][channels][height * width].
struct Maps {
  Index batch, channels, height, width;
  std::vector<float> values;

  Maps(Index n, Index c, Index h, Index w)
      : batch(n),
        channels(c),
        height(h),
        width(w),
        values(static_cast<std::size_t>(n * c * h * w)) {}
  Index pixels() const { return height * width; }
  float* image(Index n) { return values.data() + n * channels * pixels(); }
  const float* image(Index n) const { return values.data() + n * channels * pixels(); }
};

/// A convolution of stride 1, dense or depthwise: forward, then backward to weight and input.
class Layer {
 public:
  Layer(const ConvShape<2>& shape, std::span<const float> weight, std::span<const float> bias = {})
      : shape_(shape), weight_(weight), bias_(bias) {}

  std::vector<float> weight_gradient, bias_gradient;

  Maps forward(const Maps& x) {
    x_ = &x;
    Maps y(x.batch, shape_.out, output_size(shape_, x.height, 0), output_size(shape_, x.width, 1));
    for (Index n = 0; n < x.batch; ++n) {
      View to(y.image(n), shape_.out, y.pixels());
      if (shape_.groups > 1) {
        load(x.image(n), x.height, x.width);
        for (Index c = 0; c < shape_.out; ++c) {
          for_each_line(x, y, c, [&](Index tap, const float* from, Index row) {
            axpy(y.width, weight_[static_cast<std::size_t>(c * taps() + tap)], from,
                 &to(c, row * y.width));
          });
        }
      } else {
        to.noalias() = ConstView(weight_.data(), shape_.out, shape_.in * taps()) * columns(x, y, n);
      }
      if (bias_.empty()) continue;
      for (Index c = 0; c < shape_.out; ++c) {
        to.row(c).array() += bias_[static_cast<std::size_t>(c)];
      }
    }
    return y;
  }

  Maps backward(const Maps& gradient) {
    const Maps& x = *x_;
    Maps dx(x.batch, x.channels, x.height, x.width);
    weight_gradient.assign(weight_.size(), 0);
    bias_gradient.assign(bias_.size(), 0);
    View dw(weight_gradient.data(), shape_.out, shape_.in / shape_.groups * taps());
    const ConstView w(weight_.data(), dw.rows(), dw.cols());
    for (Index n = 0; n < x.batch; ++n) {
      const ConstView dy(gradient.image(n), shape_.out, gradient.pixels());
      for (std::size_t c = 0; c < bias_.size(); ++c) {
        bias_gradient[c] += dy.row(static_cast<Index>(c)).sum();
      }
      if (shape_.groups > 1) {
        load(x.image(n), x.height, x.width);
        std::vector<float> to(padded_.size());
        for (Index c = 0; c < shape_.out; ++c) {
          for_each_line(x, gradient, c, [&](Index tap, const float* from, Index row) {
            const float* line = dy.data() + c * gradient.pixels() + row * gradient.width;
            dw(c, tap) += ConstView(from, 1, gradient.width)
                              .row(0)
                              .dot(ConstView(line, 1, gradient.width).row(0));
            axpy(gradient.width, w(c, tap), line, to.data() + (from - padded_.data()));
          });
        }
        store(to, dx.image(n), x.height, x.width);
      } else {
        dw.noalias() += dy * columns(x, gradient, n).transpose();
        if (pointwise()) {
          View(dx.image(n), x.channels, x.pixels()).noalias() = w.transpose() * dy;
        } else {
          columns_.noalias() = w.transpose() * dy;
          scatter(gradient, dx.image(n), x.height, x.width);
        }
      }
    }
    return dx;
  }

 private:
  Index taps() const { return numel(shape_.kernel_size); }
  bool pointwise() const { return taps() == 1 && shape_.padding == Padding<2>(0); }
  static void axpy(Index count, float factor, const float* from, float* to) {
    for (Index i = 0; i < count; ++i) to[i] += factor * from[i];
  }

  /// The image with its padding, for depthwise layers.
  void load(const float* image, Index height, Index width) {
    const auto [p, q] = std::pair(shape_.padding.start[0], shape_.padding.start[1]);
    const Index ph = height + 2 * p, pw = width + 2 * q;
    padded_.assign(static_cast<std::size_t>(shape_.in * ph * pw), 0);
    for (Index c = 0; c < shape_.in; ++c) {
      for (Index y = 0; y < height; ++y) {
        std::copy_n(image + (c * height + y) * width, width,
                    padded_.data() + (c * ph + y + p) * pw + q);
      }
    }
  }
  void store(const std::vector<float>& padded, float* image, Index height, Index width) const {
    const auto [p, q] = std::pair(shape_.padding.start[0], shape_.padding.start[1]);
    const Index ph = height + 2 * p, pw = width + 2 * q;
    for (Index c = 0; c < shape_.in; ++c) {
      for (Index y = 0; y < height; ++y) {
        std::copy_n(padded.data() + (c * ph + y + p) * pw + q, width,
                    image + (c * height + y) * width);
      }
    }
  }
  template <class Visit>
  void for_each_line(const Maps& x, const Maps& y, Index c, Visit&& visit) const {
    const Index ph = x.height + 2 * shape_.padding.start[0],
                pw = x.width + 2 * shape_.padding.start[1];
    for (Index row = 0; row < y.height; ++row) {
      for (Index i = 0; i < shape_.kernel_size[0]; ++i) {
        for (Index j = 0; j < shape_.kernel_size[1]; ++j) {
          visit(i * shape_.kernel_size[1] + j, padded_.data() + (c * ph + row + i) * pw + j, row);
        }
      }
    }
  }

  ConstView columns(const Maps& x, const Maps& y, Index n) {
    if (pointwise()) return {x.image(n), x.channels, x.pixels()};
    columns_.setZero(x.channels * taps(), y.pixels());
    for_each_run(x.height, x.width, y, [&](Index row, Index to, Index c, Index from, Index count) {
      std::copy_n(x.image(n) + c * x.pixels() + from, count, &columns_(row, to));
    });
    return {columns_.data(), columns_.rows(), columns_.cols()};
  }
  void scatter(const Maps& y, float* image, Index height, Index width) const {
    for_each_run(height, width, y, [&](Index row, Index at, Index c, Index to, Index count) {
      axpy(count, 1, &columns_(row, at), image + c * height * width + to);
    });
  }
  template <class Visit>
  void for_each_run(Index height, Index width, const Maps& y, Visit&& visit) const {
    Index row = 0;
    for (Index c = 0; c < shape_.in; ++c) {
      for (Index i = 0; i < shape_.kernel_size[0]; ++i) {
        for (Index j = 0; j < shape_.kernel_size[1]; ++j, ++row) {
          const Index first = std::max<Index>(0, shape_.padding.start[1] - j),
                      last = std::min(y.width, width + shape_.padding.start[1] - j);
          for (Index r = 0; r < y.height; ++r) {
            const Index line = r + i - shape_.padding.start[0];
            if (line < 0 || line >= height || last <= first) continue;
            visit(row, r * y.width + first, c, line * width + first + j - shape_.padding.start[1],
                  last - first);
          }
        }
      }
    }
  }

  ConvShape<2> shape_;
  std::span<const float> weight_, bias_;
  const Maps* x_ = nullptr;
  Matrix columns_;
  std::vector<float> padded_;
};

/// A batch norm in training: a pass for the mean, one for the variance, one to normalise.
class Norm {
 public:
  explicit Norm(const BatchNorm<float>& norm) : norm_(&norm) {}
  std::vector<float> weight_gradient, bias_gradient;

  Maps forward(Maps x) {
    deviation_.resize(static_cast<std::size_t>(x.channels));
    const auto count = static_cast<float>(x.batch * x.pixels());
    Maps y(x.batch, x.channels, x.height, x.width);
    for (Index c = 0; c < x.channels; ++c) {
      const auto at = static_cast<std::size_t>(c);
      float mean = 0, variance = 0;
      for (Index n = 0; n < x.batch; ++n) mean += row(x, n, c).sum();
      mean /= count;
      for (Index n = 0; n < x.batch; ++n) variance += (row(x, n, c) - mean).square().sum();
      deviation_[at] = std::sqrt(variance / count + static_cast<float>(norm_->eps));
      const float scale = 1 / deviation_[at];
      for (Index n = 0; n < x.batch; ++n) {
        row(x, n, c) = (row(x, n, c) - mean) * scale;
        row(y, n, c) = row(x, n, c) * norm_->weight[at] + norm_->bias[at];
      }
    }
    normalised_ = std::move(x.values);
    return y;
  }

  Maps backward(Maps gradient) {
    Maps z(gradient.batch, gradient.channels, gradient.height, gradient.width);
    z.values.swap(normalised_);
    weight_gradient.clear();
    bias_gradient.clear();
    const auto count = static_cast<float>(z.batch * z.pixels());
    for (Index c = 0; c < z.channels; ++c) {
      float sum = 0, product = 0;
      for (Index n = 0; n < z.batch; ++n) {
        sum += row(gradient, n, c).sum();
        product += (row(gradient, n, c) * row(z, n, c)).sum();
      }
      weight_gradient.push_back(product);
      bias_gradient.push_back(sum);
      const auto at = static_cast<std::size_t>(c);
      const float factor = norm_->weight[at] / deviation_[at];
      for (Index n = 0; n < z.batch; ++n) {
        row(gradient, n, c) =
            factor * (row(gradient, n, c) - sum / count - row(z, n, c) * (product / count));
      }
    }
    return gradient;
  }

 private:
  static Eigen::Map<Eigen::ArrayXf> row(Maps& x, Index n, Index c) {
    return {x.image(n) + c * x.pixels(), x.pixels()};
  }

  const BatchNorm<float>* norm_;
  std::vector<float> deviation_, normalised_;
};

/// Branches side by side, each layers and norms in turn.
struct Block {
  struct Step {
    std::optional<std::size_t> layer, norm;  ///< one of the two
  };
  std::vector<Conv2d<float>> layers;
  std::vector<BatchNorm<float>> norms;
  std::vector<std::vector<Step>> branches;
  float least_gradient = 1e-3F;  ///< with which gradients are compared whose elements are smaller

  Expr<float, 2> expression() const {
    std::vector<Expr<float, 2>> sums;
    for (const auto& branch : branches) {
      std::vector<Expr<float, 2>> steps;
      for (const Step& step : branch) {
        if (step.layer) steps.emplace_back(layers[*step.layer]);
        if (step.norm) steps.emplace_back(batch_norm(norms[*step.norm]));
      }
      sums.push_back(chain(steps));
    }
    return sum(sums);
  }

  Block& branch(const std::vector<ConvShape<2>>& shapes, std::mt19937_64& generator) {
    auto& steps = branches.emplace_back();
    for (const ConvShape<2>& shape : shapes) {
      initialize_uniform(layers.emplace_back(shape), generator);
      steps.push_back({.layer = layers.size() - 1, .norm = {}});
      add_norm(shape.out, generator);
    }
    return *this;
  }
  Block& skip(Index channels, std::mt19937_64& generator) {
    branches.emplace_back();
    add_norm(channels, generator);
    return *this;
  }

 private:
  void add_norm(Index channels, std::mt19937_64& generator) {
    auto norm = BatchNorm<float>::initialize(channels);
    for (float& weight : norm.weight) weight += static_cast<float>(random_uniform(generator, 0.5));
    norms.push_back(std::move(norm));
    branches.back().push_back({.layer = {}, .norm = norms.size() - 1});
  }
};

/// A step's results that are compared.
struct Result {
  Maps output, input_gradient;
  std::vector<std::vector<float>> gradients;  // in the order of leaves: weights
};

Result layered_step(const Block& block, const Maps& x, const Maps& gradient) {
  std::optional<Maps> y;
  std::vector<Layer> layers;
  std::vector<Norm> norms;
  std::vector<Maps> between;
  for (const auto& layer : block.layers) layers.emplace_back(layer.shape(), layer.weight());
  for (const auto& norm : block.norms) norms.emplace_back(norm);
  between.reserve(block.layers.size() + block.norms.size());
  for (const auto& branch : block.branches) {
    const Maps* at = &x;
    for (const Block::Step& step : branch) {
      between.push_back(step.layer ? layers[*step.layer].forward(*at)
                                   : norms[*step.norm].forward(*at));
      at = &between.back();
    }
    if (!y) {
      y = *at;
    } else {
      for (std::size_t i = 0; i < y->values.size(); ++i) y->values[i] += at->values[i];
    }
  }
  Maps dx(x.batch, x.channels, x.height, x.width);
  Result result{std::move(*y), std::move(dx), {}};
  for (const auto& branch : block.branches) {
    Maps own = gradient;
    for (auto step = branch.rbegin(); step != branch.rend(); ++step) {
      own = step->layer ? layers[*step->layer].backward(own)
                        : norms[*step->norm].backward(std::move(own));
    }
    for (std::size_t i = 0; i < own.values.size(); ++i) {
      result.input_gradient.values[i] += own.values[i];
    }
    for (const Block::Step& step : branch) {
      result.gradients.push_back(step.layer ? layers[*step.layer].weight_gradient
                                            : norms[*step.norm].weight_gradient);
    }
  }
  return result;
}

MapShape<2> shape_of(const Maps& x) {
  return {.batch = x.batch, .channels = x.channels, .size = {x.height, x.width}};
}
FeatureMapView<const float, 2> view_of(const Maps& x) { return {shape_of(x), x.values}; }
FeatureMapView<float, 2> view_of(Maps& x) { return {shape_of(x), x.values}; }

Result contracted_step(TrainingContraction<float, 2>& contraction, const Block& block,
                       const Maps& x, const Maps& gradient) {
  const Conv2d<float>& kernel = contraction.forward(block.expression(), view_of(x));
  Layer layer(kernel.shape(), kernel.weight(), kernel.bias());
  Maps y = layer.forward(x);
  Maps dx = layer.backward(gradient);
  const auto gradients = contraction.backward(
      {kernel.shape(), std::span<const float>(layer.weight_gradient), layer.bias_gradient});
  contraction.add_input_gradient(view_of(x), view_of(dx));
  Result result{std::move(y), std::move(dx), {}};
  for (const Conv2d<float>& leaf : gradients) {
    result.gradients.emplace_back(leaf.weight().begin(), leaf.weight().end());
  }
  return result;
}

bool agree(const std::vector<float>& f, const std::vector<float>& g, float least = 1e-3F) {
  float difference = 0, largest = least;
  for (std::size_t i = 0; i < f.size(); ++i) {
    difference = std::max(difference, std::abs(f[i] - g[i]));
    largest = std::max(largest, std::abs(f[i]));
  }
  return f.size() == g.size() && difference < 1e-3F * largest;
}

void train(benchmark::State& state, const std::function<Block(std::mt19937_64&)>& make,
           Index channels, Index size, bool contracted) {
  std::mt19937_64 generator(1);
  const Block block = make(generator);
  constexpr Index batch = 128;
  Maps x(batch, channels, size, size);
  for (float& value : x.values) {
    value = std::max(0.0F, static_cast<float>(random_uniform(generator, 1)));
  }
  TrainingContraction<float, 2> contraction(block.expression(), {size, size});
  const PerAxis<2> positions = output_size(contraction.shape(), PerAxis<2>(size));
  Maps gradient(batch, contraction.shape().out, positions[0], positions[1]);
  for (float& value : gradient.values) value = static_cast<float>(random_uniform(generator, 1));

  const Result expected = layered_step(block, x, gradient),
               found = contracted_step(contraction, block, x, gradient);
  bool same = agree(expected.output.values, found.output.values) &&
              agree(expected.input_gradient.values, found.input_gradient.values);
  for (std::size_t leaf = 0; leaf < expected.gradients.size(); ++leaf) {
    same = same && agree(expected.gradients[leaf], found.gradients[leaf], block.least_gradient);
  }
  if (!same) return state.SkipWithError("contracted and layered steps differ");

  for (auto _ : state) {
    const Result result = contracted ? contracted_step(contraction, block, x, gradient)
                                     : layered_step(block, x, gradient);
    benchmark::DoNotOptimize(result.output.values.data());
  }
  const auto cost = contraction.cost(batch);
  state.counters["MAC_ratio"] =
      static_cast<double>(cost.layered) / static_cast<double>(cost.contracted);
}

/// The parts of a contracted step: moments, then the gradient of the input.
void train_part(benchmark::State& state, const std::function<Block(std::mt19937_64&)>& make,
                Index channels, Index size, int part) {
  std::mt19937_64 generator(1);
  const Block block = make(generator);
  Maps x(128, channels, size, size);
  for (float& value : x.values) value = static_cast<float>(random_uniform(generator, 1));
  TrainingContraction<float, 2> contraction(block.expression(), {size, size});
  const Expr<float, 2> expression = block.expression();
  const auto moments = contraction.moments(view_of(x));
  const Conv2d<float> kernel = contraction.forward(expression, moments);
  contraction.backward(kernel);
  Maps dx = x;
  for (auto _ : state) {
    if (part == 0) benchmark::DoNotOptimize(contraction.moments(view_of(x)).data());
    if (part == 1) contraction.add_input_gradient(view_of(x), view_of(dx));
    if (part == 2) {
      contraction.forward(expression, moments);
      contraction.backward(kernel);
    }
  }
}

void add(const std::string& name, Index channels, Index size,
         std::function<Block(std::mt19937_64&)> make) {
  const auto time = [](benchmark::internal::Benchmark* run) { run->Unit(benchmark::kMillisecond); };
  time(benchmark::RegisterBenchmark((name + "/layered").c_str(), train, make, channels, size,
                                    false));
  time(benchmark::RegisterBenchmark((name + "/contracted").c_str(), train, make, channels, size,
                                    true));
  const char* const parts[] = {"/moments", "/input_gradient", "/algebra"};
  for (int part = 0; part < 3; ++part) {
    time(benchmark::RegisterBenchmark((name + parts[part]).c_str(), train_part, make, channels,
                                      size, part));
  }
}

const bool registered = [] {
  using Generator = std::mt19937_64;
  const ConvShape<2> dense{.out = 32, .in = 32, .kernel_size = 3, .padding = 1},
      one{.out = 32, .in = 32},
      depthwise{.out = 32, .in = 32, .kernel_size = 3, .padding = 1, .groups = 32},
      diagonal{.out = 32, .in = 32, .groups = 32};
  add("CL_r4", 32, 16, [](Generator& g) {
    return Block().branch({{.out = 128, .in = 32, .padding = 1},
                           {.out = 128, .in = 128, .kernel_size = 3},
                           {.out = 32, .in = 128}},
                          g);
  });
  add("MobileOne_1x1_k4", 32, 16, [one](Generator& g) {
    return Block().branch({one}, g).branch({one}, g).branch({one}, g).branch({one}, g).skip(32, g);
  });
  add("MobileOne_depthwise_k4", 32, 16, [depthwise, diagonal](Generator& g) {
    Block block;
    for (int branch = 0; branch < 4; ++branch) block.branch({depthwise}, g);
    return block.branch({diagonal}, g).skip(32, g);
  });
  add("DBB", 32, 16, [dense, one, depthwise](Generator& g) {  // its pool as any depthwise layer
    ConvShape<2> first = one, pool = depthwise, spatial = dense;
    first.padding = 1;
    pool.padding = spatial.padding = 0;
    Block block;
    block.branch({dense}, g).branch({one}, g).branch({first, pool}, g).branch({first, spatial}, g);
    // Of a factor before the pool and its norm nothing is left of the sum of 32,768 terms but how
    // they are rounded, up to 32,768 * 2^-24 = 2e-3 for terms of size 1.
    block.least_gradient = 1;
    return block;
  });
  add("RepVGG", 32, 16, [dense, one](Generator& g) {
    return Block().branch({dense}, g).branch({one}, g).skip(32, g);
  });
  add("ACNet", 32, 16, [dense](Generator& g) {
    return Block()
        .branch({dense}, g)
        .branch({{.out = 32, .in = 32, .kernel_size = {3, 1}, .padding = {1, 0}}}, g)
        .branch({{.out = 32, .in = 32, .kernel_size = {1, 3}, .padding = {0, 1}}}, g);
  });
  return true;
}();

}  // namespace
