// Layers, results and gradients in memory of yours: views, from a framework's flat buffers, with
// nothing copied in or out.
// SPDX-License-Identifier: Apache-2.0
#include <concertina/concertina.hpp>

#include <cstdlib>
#include <iostream>
#include <numeric>
#include <span>
#include <vector>

int main() {
  using namespace concertina;
  const auto shapes =
      expand_cl(ConvShape<2>{.out = 2, .in = 3, .kernel_size = 3, .padding = 1}, {.rate = 2});
  const auto size = [](const ConvShape<2>& shape) {
    return static_cast<std::size_t>(weight_numel(shape));
  };
  const std::size_t total = std::accumulate(
      shapes.begin(), shapes.end(), std::size_t{0},
      [&](std::size_t sum, const ConvShape<2>& shape) { return sum + size(shape); });

  // One buffer for all parameters and one for all gradients, as optimizers like them.
  std::vector<double> parameters(total), gradients(total);
  for (std::size_t i = 0; i < total; ++i) parameters[i] = static_cast<double>(i % 7) - 3;
  std::vector<ConvView<const double, 2>> layers;
  std::vector<ConvView<double, 2>> layer_gradients;
  std::size_t begin = 0;
  for (const ConvShape<2>& shape : shapes) {
    layers.emplace_back(shape, std::span(parameters).subspan(begin, size(shape)));
    layer_gradients.emplace_back(shape, std::span(gradients).subspan(begin, size(shape)));
    begin += size(shape);
  }

  Contraction<double, 2> contraction{Form(layers)};
  std::vector<double> kernel(size(contraction.shape()));
  const ConvView<double, 2> result(contraction.shape(), kernel);
  contraction.forward(layers, result);

  // The optimizer changes its buffer; the views see it, and the next step needs nothing new.
  const std::vector<double> before = kernel;
  for (double& parameter : parameters) parameter *= 2;
  contraction.forward(layers, result);
  bool good = true;
  for (std::size_t i = 0; i < kernel.size(); ++i) good = good && kernel[i] == 8 * before[i];

  // L = sum of the kernel, so dL/dF is one everywhere. L is homogeneous of degree 1 in each layer
  // (Euler): each layer's <parameters, gradient> is L.
  const std::vector<double> ones(kernel.size(), 1.0);
  contraction.backward(layers, ConvView<const double, 2>(contraction.shape(), ones),
                       layer_gradients);
  const double loss = std::accumulate(kernel.begin(), kernel.end(), 0.0);
  for (std::size_t l = 0; l < layers.size(); ++l) {
    const auto weight = layers[l].weight();
    const double product =
        std::inner_product(weight.begin(), weight.end(), layer_gradients[l].weight().begin(), 0.0);
    std::cout << layers[l].shape() << ": <parameters, gradient> = " << product << '\n';
    good = good && product == loss;
  }
  std::cout << "the loss is " << loss << '\n';
  if (!std::cout.flush()) std::cerr << "standard output: not all of it could be written\n";
  return std::cout && good ? EXIT_SUCCESS : EXIT_FAILURE;
}
