// A training loop of one's own around a contraction: an expanded layer learns what another layer
// does, but each step computes only the compact convolution.
// SPDX-License-Identifier: Apache-2.0
#include <concertina/concertina.hpp>

#include <cstdlib>
#include <iostream>
#include <random>
#include <span>
#include <vector>

using namespace concertina;

/// What a framework does, here by the definition: the gradient of a loss with respect to a kernel,
/// from that with respect to the layer's output.
void kernel_gradient(const FeatureMap<float, 2>& x, const FeatureMap<float, 2>& dy,
                     Conv2d<float>& gradient) {
  const ConvShape<2>& shape = gradient.shape();
  const auto [height, width] = std::array{x.shape().size[0], x.shape().size[1]};
  for (float& element : gradient.weight()) element = 0;
  for (float& element : gradient.bias()) element = 0;
  const float* error = dy.values().data();
  for (Index n = 0; n < dy.shape().batch; ++n) {
    for (Index o = 0; o < shape.out; ++o) {
      for (Index j = 0; j < dy.shape().size[0]; ++j) {
        for (Index i = 0; i < dy.shape().size[1]; ++i, ++error) {
          gradient.bias()[static_cast<std::size_t>(o)] += *error;
          float* to = gradient.weight().data() + o * shape.in * numel(shape.kernel_size);
          for (Index c = 0; c < shape.in; ++c) {
            for (Index ky = 0; ky < shape.kernel_size[0]; ++ky) {
              for (Index kx = 0; kx < shape.kernel_size[1]; ++kx, ++to) {
                const Index row = j + ky - shape.padding.start[0];
                const Index column = i + kx - shape.padding.start[1];
                if (row < 0 || row >= height || column < 0 || column >= width) continue;
                const Index pixel = ((n * shape.in + c) * height + row) * width + column;
                *to += *error * x.values()[static_cast<std::size_t>(pixel)];
              }
            }
          }
        }
      }
    }
  }
}

int main() {
  std::mt19937_64 generator(1);
  const ConvShape<2> shape{.out = 4, .in = 3, .kernel_size = 5, .padding = 2, .bias = true};
  Conv2d<float> teacher(shape);
  initialize_uniform(teacher, generator);
  auto layers = initialize<float>(expand_ck(shape, {.rate = 4}), generator);

  Contraction<float, 2> contraction{Form(layers)};  // once: order, algorithms, storage
  Conv2d<float> gradient(contraction.shape());
  float first = 0, last = 0;
  for (int step = 0; step < 200; ++step) {
    FeatureMap<float, 2> x({.batch = 4, .channels = 3, .size = {8, 8}});
    for (float& pixel : x.values()) pixel = static_cast<float>(random_uniform(generator, 1));

    const Conv2d<float>& compact = contraction.forward(layers);  // the expanded layers as one
    FeatureMap<float, 2> y = compact(x);
    const FeatureMap<float, 2> wanted = teacher(x);
    float loss = 0;
    const auto count = static_cast<float>(y.values().size());
    for (std::size_t i = 0; i < y.values().size(); ++i) {
      float& element = y.values()[i];
      const float error = element - wanted.values()[i];
      loss += error * error / count;
      element = 2 * error / count;  // y becomes the gradient of the loss
    }
    kernel_gradient(x, y, gradient);
    const auto gradients = contraction.backward(layers, gradient);  // one for each layer

    const auto descend = [](std::span<float> elements, std::span<const float> along) {
      for (std::size_t i = 0; i < elements.size(); ++i) elements[i] -= 0.5F * along[i];
    };
    for (std::size_t l = 0; l < layers.size(); ++l) {
      descend(layers[l].weight(), gradients[l].weight());
      descend(layers[l].bias(), gradients[l].bias());
    }
    (step == 0 ? first : last) = loss;
  }
  std::cout << "loss " << first << " at the start, " << last << " after 200 steps\n";
  if (!std::cout.flush()) std::cerr << "standard output: not all of it could be written\n";
  return std::cout && last < first / 20 ? EXIT_SUCCESS : EXIT_FAILURE;
}
