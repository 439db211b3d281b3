// A scalar of your own: dual numbers, which carry a derivative. Layers of them contract by the same
// code, and what comes out beside the kernel is its derivative along a direction.
// SPDX-License-Identifier: Apache-2.0
#include <concertina/concertina.hpp>

#include <cstdlib>
#include <iostream>
#include <numeric>
#include <vector>

/// value + slope * h with h * h = 0. A commutative ring is all that layers ask of a scalar.
struct Dual {
  double value = 0, slope = 0;

  Dual() = default;
  Dual(double v, double s = 0) : value(v), slope(s) {}
  Dual& operator+=(const Dual& b) { return *this = *this + b; }
  friend Dual operator+(const Dual& a, const Dual& b) {
    return {a.value + b.value, a.slope + b.slope};
  }
  friend Dual operator*(const Dual& a, const Dual& b) {
    return {a.value * b.value, a.value * b.slope + a.slope * b.value};
  }
  friend bool operator==(const Dual&, const Dual&) = default;
};

/// What Eigen's products ask beside.
template <>
struct Eigen::NumTraits<Dual> : Eigen::GenericNumTraits<Dual> {
  using Real = Dual;
  using NonInteger = Dual;
  using Nested = Dual;
  using Literal = Dual;
  static constexpr int IsComplex = 0, IsInteger = 0, IsSigned = 1, RequireInitialization = 1;
  static constexpr int ReadCost = 2, AddCost = 2, MulCost = 4;
};

int main() {
  using namespace concertina;
  const auto shapes = expand_cl(ConvShape<2>{.out = 3, .in = 2, .kernel_size = 3, .padding = 1});
  std::vector<Conv2d<Dual>> duals;
  std::vector<Conv2d<double>> layers, directions;
  int next = 0;
  for (const auto& shape : shapes) {  // small integers: sums and products of doubles are exact
    Conv2d<Dual> dual(shape);
    Conv2d<double> layer(shape), direction(shape);
    for (std::size_t i = 0; i < dual.weight().size(); ++i) {
      layer.weight()[i] = next++ % 5 - 2;
      direction.weight()[i] = next++ % 3 - 1;
      dual.weight()[i] = {layer.weight()[i], direction.weight()[i]};
    }
    duals.push_back(dual);
    layers.push_back(layer);
    directions.push_back(direction);
  }

  const Conv2d<Dual> product = contract(duals);
  const Conv2d<double> plain = contract(layers);
  double along = 0;  // d(sum of the kernel) along the direction, forward
  bool good = true;
  for (std::size_t i = 0; i < plain.weight().size(); ++i) {
    good = good && product.weight()[i].value == plain.weight()[i];
    along += product.weight()[i].slope;
  }

  // The same backward: the gradient times the direction.
  Contraction<double, 2> contraction{Form(layers)};
  contraction.forward(layers);
  Conv2d<double> ones(contraction.shape());
  for (double& element : ones.weight()) element = 1;
  const auto gradients = contraction.backward(layers, ones);
  double back = 0;
  for (std::size_t l = 0; l < layers.size(); ++l) {
    const auto along_layer = directions[l].weight();
    back += std::inner_product(along_layer.begin(), along_layer.end(),
                               gradients[l].weight().begin(), 0.0);
  }
  std::cout << product.shape() << "\nits derivative along the direction: " << along << " forward, "
            << back << " backward\n";
  if (!std::cout.flush()) std::cerr << "standard output: not all of it could be written\n";
  return std::cout && good && along == back && along != 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
