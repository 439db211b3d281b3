// ONNX operators against their definitions in plain loops, or values by hand; and programs of them.
// What others make of random models is compared by evaluate.py.
// SPDX-License-Identifier: Apache-2.0
#include "onnx/evaluate.hpp"

#include "support.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <numeric>
#include <optional>
#include <span>
#include <string>
#include <thread>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

namespace concertina::test {
namespace {

using Catch::Contains;
using onnx::Attribute;
using onnx::DataType;
using onnx::Model;
using onnx::Node;
using onnx::Tensor;
using tool::Evaluator, tool::Value, tool::value_of, tool::Values;

using Shape = std::vector<std::int64_t>;
using Floats = tool::Array<float>;
using Doubles = tool::Array<double>;
using Integers = tool::Array<std::int64_t>;
using Attributes = std::vector<Attribute>;
using Inputs = std::vector<std::optional<Value>>;

// ---- models of one node

Node node_of(const std::string& type, std::vector<std::string> inputs,
             std::vector<std::string> outputs, Attributes attributes = {}) {
  return {.name = "n",
          .op_type = type,
          .inputs = std::move(inputs),
          .outputs = std::move(outputs),
          .attributes = std::move(attributes)};
}

Model model_of(std::vector<Node> nodes, std::vector<std::string> inputs,
               std::vector<std::string> outputs, std::int64_t opset = 17) {
  Model model;
  model.opsets = {{"", opset}};
  model.nodes = std::move(nodes);
  for (std::string& name : inputs) model.inputs.push_back({.name = std::move(name)});
  for (std::string& name : outputs) model.outputs.push_back({.name = std::move(name)});
  return model;
}

/// Equal, or both not numbers, element by element.
bool same(const Value& a, const Value& b) {
  return std::visit(
      [](const auto& x, const auto& y) {
        if constexpr (std::is_same_v<decltype(x), decltype(y)>) {
          return x.shape == y.shape && std::ranges::equal(x.values, y.values, [](auto p, auto q) {
                   return p == q || (p != p && q != q);
                 });
        } else {
          return false;
        }
      },
      a, b);
}

/// The outputs of a node, the same whether its inputs are constants or not.
std::vector<Value> run_all(const std::string& type, const Inputs& inputs,
                           const Attributes& attributes, std::int64_t opset, std::size_t outputs) {
  std::vector<std::string> names, given, results;
  Values values;
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    names.push_back(inputs[i] ? "i" + std::to_string(i) : "");
    if (!inputs[i]) continue;
    values[names.back()] = *inputs[i];
    given.push_back(names.back());
  }
  for (std::size_t i = 0; i < outputs; ++i) results.push_back("o" + std::to_string(i));
  Model model = model_of({node_of(type, names, results, attributes)}, given, results, opset);
  const Values found = Evaluator(model)(values);
  model.inputs.clear();
  for (const auto& [name, value] : values) {
    model.initializers.push_back(tool::tensor_of(name, value));
  }
  const Values constant = Evaluator(model)({});
  std::vector<Value> all;
  for (const std::string& name : results) {
    CHECK(same(constant.at(name), found.at(name)));
    all.push_back(found.at(name));
  }
  return all;
}

Value run(const std::string& type, const Inputs& inputs, const Attributes& attributes = {},
          std::int64_t opset = 17) {
  return run_all(type, inputs, attributes, opset, 1)[0];
}

template <class Scalar>
tool::Array<Scalar> array(const std::string& type, const Inputs& inputs,
                          const Attributes& attributes = {}, std::int64_t opset = 17) {
  return std::get<tool::Array<Scalar>>(run(type, inputs, attributes, opset));
}

Doubles doubles(const std::string& type, const Inputs& inputs, const Attributes& attributes = {},
                std::int64_t opset = 17) {
  return array<double>(type, inputs, attributes, opset);
}

Integers integers(const std::string& type, const Inputs& inputs, const Attributes& attributes = {},
                  std::int64_t opset = 17) {
  return array<std::int64_t>(type, inputs, attributes, opset);
}

Attribute integer(std::string name, std::int64_t value) {
  return Attribute::of(std::move(name), value);
}
Attribute real(std::string name, float value) { return Attribute::of(std::move(name), value); }
Attribute text(std::string name, std::string value) {
  return Attribute::of(std::move(name), std::move(value));
}
Attribute list(std::string name, Shape values) {
  return Attribute::of(std::move(name), std::move(values));
}

Integers vector(Shape values) { return {{std::ssize(values)}, values}; }

std::int64_t numel(const Shape& shape) {
  return std::accumulate(shape.begin(), shape.end(), std::int64_t{1}, std::multiplies<>());
}

/// 0, 1, 2, ...
Doubles counting(Shape shape) {
  Doubles x{shape, std::vector<double>(static_cast<std::size_t>(numel(shape)))};
  std::iota(x.values.begin(), x.values.end(), 0);
  return x;
}

template <class Scalar>
tool::Array<Scalar> small_integers(const Shape& shape, Rng& rng) {
  tool::Array<Scalar> x{shape, std::vector<Scalar>(static_cast<std::size_t>(numel(shape)))};
  fill_small_integers(std::span(x.values), rng);
  return x;
}

void check_close(const Doubles& found, const Doubles& expected) {
  CHECK(found.shape == expected.shape);
  REQUIRE(found.values.size() == expected.values.size());
  for (std::size_t i = 0; i < found.values.size(); ++i) {
    CHECK(found.values[i] == Approx(expected.values[i]).epsilon(1e-13).margin(1e-13));
  }
}

/// The index of each axis of element number n.
Shape place_of(std::int64_t n, const Shape& shape) {
  Shape place(shape.size());
  for (std::size_t i = shape.size(); i-- > 0; n /= shape[i]) place[i] = n % shape[i];
  return place;
}

template <class Array>
auto& at(Array& x, const Shape& place) {
  std::int64_t n = 0;
  for (std::size_t i = 0; i < place.size(); ++i) n = n * x.shape[i] + place[i];
  return x.values[static_cast<std::size_t>(n)];
}

/// By numpy's broadcasting: axes from the last one, those of one position repeated.
template <class Scalar>
Scalar at_broadcast(const tool::Array<Scalar>& x, Shape place) {
  place.erase(place.begin(), place.begin() + std::ssize(place) - std::ssize(x.shape));
  for (std::size_t i = 0; i < place.size(); ++i) {
    if (x.shape[i] == 1) place[i] = 0;
  }
  return at(x, place);
}

// ---- elementwise

TEMPLATE_TEST_CASE("operators on each element follow their formulas", "[onnx]", float, double) {
  using Scalar = TestType;
  const auto s = [](double x) { return 1 / (1 + std::exp(-x)); };
  const auto e = [](double a, double x) { return x < 0 ? a * (std::exp(x) - 1) : x; };
  const auto soft = [](double x) { return std::log(1 + std::exp(x)); };
  const auto unit = [](double x) { return std::min(std::max(x, 0.0), 1.0); };
  struct Formula {
    std::string type;
    Attributes attributes;
    std::function<double(double)> f;
    std::int64_t opset = 20;
  };
  const std::vector<Formula> formulas = {
      {"Abs", {}, [](double x) { return std::abs(x); }},
      {"Neg", {}, [](double x) { return -x; }},
      {"Sign", {}, [](double x) { return (x > 0) - (x < 0); }},
      {"Relu", {}, [](double x) { return std::max(x, 0.0); }},
      {"Ceil", {}, [](double x) { return std::ceil(x); }},
      {"Floor", {}, [](double x) { return std::floor(x); }},
      {"Round", {}, [](double x) { return x - std::remainder(x, 1.0); }},
      {"Exp", {}, [](double x) { return std::exp(x); }},
      {"Erf", {}, [](double x) { return std::erf(x); }},
      {"Sin", {}, [](double x) { return std::sin(x); }},
      {"Cos", {}, [](double x) { return std::cos(x); }},
      {"Tanh", {}, [](double x) { return std::tanh(x); }},
      {"Sigmoid", {}, s},
      {"HardSigmoid", {}, [&](double x) { return unit(0.2F * x + 0.5); }},
      {"HardSigmoid",
       {real("alpha", 0.5F), real("beta", 0.25F)},
       [&](double x) { return unit(0.5 * x + 0.25); }},
      {"HardSwish", {}, [&](double x) { return x * unit(x / 6 + 0.5); }},
      {"Elu", {}, [&](double x) { return e(1, x); }},
      {"Elu", {real("alpha", 0.5F)}, [&](double x) { return e(0.5, x); }},
      {"Celu", {real("alpha", 0.5F)}, [&](double x) { return x < 0 ? e(0.5, x / 0.5) : x; }},
      {"Selu",
       {},
       [&](double x) { return 1.05070102214813232421875 * e(1.67326319217681884765625, x); }},
      {"Selu", {real("alpha", 2), real("gamma", 3)}, [&](double x) { return 3 * e(2, x); }},
      {"LeakyRelu", {}, [](double x) { return x < 0 ? 0.01F * x : x; }},
      {"LeakyRelu", {real("alpha", 0.5F)}, [](double x) { return x < 0 ? 0.5 * x : x; }},
      {"ThresholdedRelu", {real("alpha", 0.5F)}, [](double x) { return x > 0.5 ? x : 0; }},
      {"Softplus", {}, soft},
      {"Softsign", {}, [](double x) { return x / (1 + std::abs(x)); }},
      {"Mish", {}, [&](double x) { return x * std::tanh(soft(x)); }},
      {"Gelu", {}, [](double x) { return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0))); }},
      {"Gelu",
       {text("approximate", "tanh")},
       [](double x) {
         return 0.5 * x *
                (1 + std::tanh(std::sqrt(2 / 3.14159265358979323846) * (x + 0.044715 * x * x * x)));
       }},
      {"Clip",
       {real("min", -1), real("max", 2)},
       [](double x) { return std::min(std::max(x, -1.0), 2.0); },
       9},
      {"Clip", {real("min", -1)}, [](double x) { return std::max(x, -1.0); }, 9},
  };
  const tool::Array<Scalar> x{
      {3, 2, 2},
      {-7, -2, Scalar(-0.75), Scalar(-0.5), 0, Scalar(0.25), Scalar(0.5), 1, 2, Scalar(2.5), 4, 9}};
  for (const auto& [type, attributes, f, opset] : formulas) {
    CAPTURE(type);
    const auto y = array<Scalar>(type, {x}, attributes, opset);
    CHECK(y.shape == x.shape);
    for (std::size_t i = 0; i < x.values.size(); ++i) {
      const double expected = f(static_cast<double>(x.values[i]));
      const double epsilon = std::is_same_v<Scalar, float> ? 1e-6 : 1e-14;
      CHECK(static_cast<double>(y.values[i]) == Approx(expected).epsilon(epsilon).margin(epsilon));
    }
  }
  const tool::Array<Scalar> positive{{2}, {1, Scalar(6.25)}};
  CHECK(array<Scalar>("Sqrt", {positive}).values == std::vector<Scalar>{1, Scalar(2.5)});
  CHECK(array<Scalar>("Log", {positive}).values == std::vector<Scalar>{0, std::log(Scalar(6.25))});
  CHECK(array<Scalar>("Reciprocal", {positive}).values == std::vector<Scalar>{1, Scalar(0.16)});
}

TEST_CASE("what is not a number stays so", "[onnx]") {
  const Floats x{{1}, {std::numeric_limits<float>::quiet_NaN()}}, one{{1}, {1}};
  for (const char* type : {"Relu", "LeakyRelu", "Sigmoid", "HardSwish", "Clip"}) {
    CAPTURE(type);
    CHECK(std::isnan(array<float>(type, {x}, {}).values[0]));
  }
  for (const char* type : {"Add", "Mul", "Max", "Min"}) {
    CAPTURE(type);
    CHECK(std::isnan(array<float>(type, {x, one}).values[0]));
    CHECK(std::isnan(array<float>(type, {one, x}).values[0]));
  }
  CHECK(std::isnan(array<float>("ReduceMax", {x}).values[0]));
}

TEST_CASE("two operands are broadcast", "[onnx]") {
  Rng rng(1);
  const std::map<std::string, std::function<double(double, double)>> formulas = {
      {"Add", [](double a, double b) { return a + b; }},
      {"Sub", [](double a, double b) { return a - b; }},
      {"Mul", [](double a, double b) { return a * b; }},
      {"Div", [](double a, double b) { return a / b; }},
      {"Pow", [](double a, double b) { return std::pow(a, b); }},
      {"PRelu", [](double a, double b) { return a < 0 ? a * b : a; }},
      {"Sum", [](double a, double b) { return a + b; }},
      {"Mean", [](double a, double b) { return (a + b) / 2; }},
      {"Max", [](double a, double b) { return std::max(a, b); }},
      {"Min", [](double a, double b) { return std::min(a, b); }}};
  const std::map<std::string, std::function<bool(double, double)>> comparisons = {
      {"Equal", std::equal_to<>()},
      {"Less", std::less<>()},
      {"Greater", std::greater<>()},
      {"LessOrEqual", std::less_equal<>()},
      {"And", std::logical_and<>()},
      {"GreaterOrEqual", std::greater_equal<>()},
      {"Or", std::logical_or<>()},
      {"Xor", [](double a, double b) { return (a != 0) != (b != 0); }}};
  const auto [left, right, shape] = GENERATE(table<Shape, Shape, Shape>({
      {{2, 3, 4}, {2, 3, 4}, {2, 3, 4}},
      {{2, 3, 4}, {}, {2, 3, 4}},
      {{2, 3, 2, 2}, {3, 1, 1}, {2, 3, 2, 2}},
      {{4}, {2, 3, 4}, {2, 3, 4}},
      {{2, 1, 4}, {3, 1}, {2, 3, 4}},
      {{1, 1}, {5, 1}, {5, 1}},
      {{2, 0}, {2, 1}, {2, 0}},
      {{}, {}, {}},
  }));
  const auto a = small_integers<double>(left, rng);
  auto b = small_integers<double>(right, rng);
  const auto expected = [&](const auto& f, auto result) {
    result.shape = shape;
    for (std::int64_t n = 0; n < numel(shape); ++n) {
      const Shape place = place_of(n, shape);
      result.values.push_back(f(at_broadcast(a, place), at_broadcast(b, place)));
    }
    return result;
  };
  for (const auto& [type, f] : comparisons) {
    CAPTURE(type);
    CHECK(integers(type, {a, b}, {}, 17) == expected(f, Integers{}));
  }
  for (double& value : b.values) value = value == 0 ? 1 : value;
  for (const auto& [type, f] : formulas) {
    CAPTURE(type);
    CHECK(same(doubles(type, {a, b}), expected(f, Doubles{})));
  }
}

TEST_CASE("integers are computed as integers", "[onnx]") {
  const Integers a{{3}, {7, -7, std::numeric_limits<std::int64_t>::min()}}, b{{3}, {2, 2, -1}};
  CHECK(integers("Div", {a, b}) == Integers{{3}, {3, -3, a.values[2]}});
  CHECK(integers("Add", {a, b}) ==
        Integers{{3}, {9, -5, std::numeric_limits<std::int64_t>::max()}});
  CHECK(integers("Mul", {a, b}) == Integers{{3}, {14, -14, a.values[2]}});
  CHECK(integers("Abs", {vector({-3, 4})}) == vector({3, 4}));
  CHECK(integers("Not", {vector({0, 1})}) == vector({1, 0}));
  CHECK(doubles("Pow", {Doubles{{2}, {3, 4}}, vector({2, -1})}) == Doubles{{2}, {9, 0.25}});
  CHECK_THAT(message_of<NumericalError>([&] { run("Div", {a, vector({0})}); }),
             Contains("node \"n\" (Div) of [3], [1]: an integer is divided by 0"));
}

TEST_CASE("several operands, clipped and chosen ones", "[onnx]") {
  const Doubles a{{2}, {1, 5}}, b{{2, 1}, {3, 4}}, one{{}, {1}}, two{{}, {2}};
  CHECK(doubles("Mean", {a, b, one}) == Doubles{{2, 2}, {5.0 / 3, 3, 2, 10.0 / 3}});
  CHECK(doubles("Max", {a, b, two}) == Doubles{{2, 2}, {3, 5, 4, 5}});
  CHECK(doubles("Sum", {a}) == a);
  CHECK(doubles("Clip", {a, std::nullopt, two}) == Doubles{{2}, {1, 2}});
  CHECK(doubles("Clip", {a, two}) == Doubles{{2}, {2, 5}});
  CHECK(doubles("Clip", {a, two, one}) == Doubles{{2}, {1, 1}});  // the maximum wins
  CHECK(doubles("Clip", {a}) == a);
  CHECK(doubles("Where", {Integers{{2, 1}, {1, 0}}, a, two}) == Doubles{{2, 2}, {1, 5, 2, 2}});
}

TEST_CASE("casts", "[onnx]") {
  const auto to = [](DataType type) {
    return Attributes{integer("to", static_cast<std::int64_t>(type))};
  };
  const Doubles x{{4}, {-1.5, 0, 0.5, 300}};
  CHECK(integers("Cast", {x}, to(DataType::int64)) == vector({-1, 0, 0, 300}));
  CHECK(integers("Cast", {x}, to(DataType::boolean)) == vector({1, 0, 1, 1}));
  CHECK(integers("Cast", {vector({300, -1})}, to(DataType::uint8)) == vector({44, 255}));
  CHECK(integers("Cast", {vector({200})}, to(DataType::int8)) == vector({-56}));
  CHECK(array<float>("Cast", {x}, to(DataType::float32)) == Floats{{4}, {-1.5F, 0, 0.5F, 300}});
  CHECK(array<float>("Cast", {vector({3})}, to(DataType::float16)) == Floats{{1}, {3}});
  CHECK_THAT(message_of<FormatError>([&] { run("Cast", {x}, to(DataType::string)); }),
             Contains("casts to string"));
}

// ---- windows

/// A window on one axis.
struct Axis {
  std::int64_t kernel, stride, dilation, start, end, size;

  std::int64_t extent() const { return dilation * (kernel - 1) + 1; }
};

/// A window, its attributes, and what it reads.
struct Window {
  std::vector<Axis> axes;
  Attributes attributes;
  Shape sizes, kernel, outputs;
  std::vector<Shape> starts;  // of windows on each axis, one after another until one does not fit

  explicit Window(std::vector<Axis> given) : axes(std::move(given)) {
    Shape strides, dilations, pads, ends;
    for (const Axis& axis : axes) {
      kernel.push_back(axis.kernel);
      strides.push_back(axis.stride);
      dilations.push_back(axis.dilation);
      pads.push_back(axis.start);
      ends.push_back(axis.end);
      sizes.push_back(axis.size);
      starts.emplace_back();
      for (auto at = -axis.start; at + axis.extent() <= axis.size + axis.end; at += axis.stride) {
        starts.back().push_back(at);
      }
      outputs.push_back(std::ssize(starts.back()));
    }
    pads.insert(pads.end(), ends.begin(), ends.end());
    attributes = {list("kernel_shape", kernel), list("strides", strides),
                  list("dilations", dilations), list("pads", pads)};
  }

  /// Maps large enough for a window.
  static Window random(Rng& rng, std::int64_t least_padding) {
    std::vector<Axis> axes(static_cast<std::size_t>(random_index(rng, 1, 3)));
    for (Axis& axis : axes) {
      axis = {random_index(rng, 1, 3), random_index(rng, 1, 3), random_index(rng, 1, 2), 0, 0, 0};
      axis.start = random_index(rng, least_padding, axis.kernel - 1);
      axis.end = random_index(rng, least_padding, axis.kernel - 1);
      axis.size = std::max<std::int64_t>(axis.extent() - axis.start - axis.end, 1);
      axis.size += random_index(rng, 0, 4);
    }
    return Window(axes);
  }

  /// Calls each(tap, position) for every tap of the window at this output that falls on the map.
  template <class Each>
  void for_each_read(std::span<const std::int64_t> output, const Each& each) const {
    Shape position(axes.size());
    for (std::int64_t tap = 0; tap < numel(kernel); ++tap) {
      const Shape offset = place_of(tap, kernel);
      bool on_map = true;
      for (std::size_t i = 0; i < axes.size(); ++i) {
        const std::int64_t start = starts[i][static_cast<std::size_t>(output[i])];
        position[i] = start + axes[i].dilation * offset[i];
        on_map = on_map && position[i] >= 0 && position[i] < axes[i].size;
      }
      if (on_map) each(offset, position);
    }
  }
};

Shape joined(Shape a, const Shape& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

/// A convolution; channels of one group.
struct Layer {
  Window window;
  std::int64_t images, groups, in, out;
  bool bias;
};

/// Calls each(to, weight, from) for every product of the definition, with the places of its terms.
template <class Each>
void for_each_product(const Layer& layer, const Each& each) {
  const auto& [window, images, groups, in, out, bias] = layer;
  const Shape outputs = joined({images, groups * out}, window.outputs);
  for (std::int64_t n = 0; n < numel(outputs); ++n) {
    const Shape to = place_of(n, outputs);
    window.for_each_read(std::span(to).subspan(2), [&](const Shape& tap, const Shape& position) {
      for (std::int64_t c = 0; c < layer.in; ++c) {
        each(to, joined({to[1], c}, tap),
             joined({to[0], to[1] / layer.out * layer.in + c}, position));
      }
    });
  }
}

/// The bias of each channel everywhere, or zeros.
Floats biases(Shape shape, const Floats& bias, bool has_bias) {
  Floats y{shape, {}};
  for (std::int64_t n = 0; n < numel(shape); ++n) {
    const auto c = static_cast<std::size_t>(place_of(n, shape)[1]);
    y.values.push_back(has_bias ? bias.values[c] : 0);
  }
  return y;
}

/// Conv, and ConvTranspose back, of small integers.
void check_convolution(const Layer& layer, Rng& rng) {
  const auto& [window, images, groups, in, out, has_bias] = layer;
  const Shape inputs = joined({images, groups * in}, window.sizes);
  const Shape outputs = joined({images, groups * out}, window.outputs);
  const auto weight = small_integers<float>(joined({groups * out, in}, window.kernel), rng);
  const auto bias = small_integers<float>({groups * out}, rng);
  const auto x = small_integers<float>(inputs, rng);
  Floats y = biases(outputs, bias, has_bias);
  for_each_product(layer, [&](const Shape& to, const Shape& tap, const Shape& from) {
    at(y, to) += at(weight, tap) * at(x, from);
  });
  auto attributes = window.attributes;
  attributes.push_back(integer("group", groups));
  const std::optional<Value> no_bias;
  CHECK(array<float>("Conv", {x, weight, has_bias ? bias : no_bias}, attributes) == y);

  const auto back_bias = small_integers<float>({groups * in}, rng);
  const auto z = small_integers<float>(outputs, rng);
  Floats back = biases(inputs, back_bias, has_bias);
  for_each_product(layer, [&](const Shape& to, const Shape& tap, const Shape& from) {
    at(back, from) += at(weight, tap) * at(z, to);
  });
  Shape rest;  // of the map, beyond the last window
  for (std::size_t i = 0; i < window.axes.size(); ++i) {
    const Axis& axis = window.axes[i];
    rest.push_back(axis.size + axis.end - axis.extent() - window.starts[i].back());
  }
  attributes.push_back(list("output_padding", rest));
  CHECK(array<float>("ConvTranspose", {z, weight, has_bias ? back_bias : no_bias}, attributes) ==
        back);
}

TEST_CASE("convolutions and their transposes follow the definition", "[onnx]") {
  Rng rng(2);
  for (int repetition = 0; repetition < 150; ++repetition) {
    const Window window = Window::random(rng, -1);
    check_convolution(
        {window, random_index(rng, 1, 3), random_index(rng, 1, 3), random_index(rng, 1, 3),
         random_index(rng, 1, 3), random_index(rng, 0, 1) == 1},
        rng);
  }
  const auto square = [](Axis axis) { return Window({axis, axis}); };
  const Axis wide = {7, 1, 1, 3, 3, 11}, small = {3, 1, 1, 1, 1, 4}, point = {1, 1, 1, 0, 0, 9};
  check_convolution({square(wide), 1, 1, 90, 2, true}, rng);  // some lines at a time
  check_convolution({Window({small, small, {3, 1, 1, 1, 1, 70}}), 1, 1, 30, 2, false}, rng);
  check_convolution({square(small), 70, 2, 2, 3, true}, rng);  // some images at a time
  check_convolution({square(point), 2, 1, 5, 3, true}, rng);   // nothing gathered
  check_convolution({square({1, 1, 1, 0, 0, 2}), 200, 1, 5, 3, true}, rng);
}

TEST_CASE("pools follow the definition", "[onnx]") {
  Rng rng(3);
  for (int repetition = 0; repetition < 150; ++repetition) {
    const Window window = Window::random(rng, 0);
    const auto x = small_integers<double>(joined({2, 2}, window.sizes), rng);
    Doubles max{joined({2, 2}, window.outputs), {}}, mean = max, padded = max;
    for (std::int64_t n = 0; n < numel(max.shape); ++n) {
      const Shape place = place_of(n, max.shape);
      double largest = -std::numeric_limits<double>::infinity(), sum = 0, count = 0;
      window.for_each_read(std::span(place).subspan(2), [&](const Shape&, const Shape& position) {
        const double value = at(x, joined({place[0], place[1]}, position));
        largest = std::max(largest, value);
        sum += value;
        ++count;
      });
      max.values.push_back(largest);
      mean.values.push_back(sum / count);
      padded.values.push_back(sum / static_cast<double>(numel(window.kernel)));
    }
    CHECK(doubles("MaxPool", {x}, window.attributes) == max);
    const bool empty =
        std::ranges::any_of(mean.values, [](double value) { return std::isnan(value); });
    if (!empty) CHECK(doubles("AveragePool", {x}, window.attributes, 19) == mean);
    auto attributes = window.attributes;
    attributes.push_back(integer("count_include_pad", 1));
    CHECK(doubles("AveragePool", {x}, attributes, 19) == padded);
  }
}

TEST_CASE("windows that are rounded up or padded to keep sizes", "[onnx]") {
  const Doubles x = counting({1, 1, 5});
  const auto pooled = [&](const char* type, Attributes attributes, std::int64_t kernel,
                          std::int64_t stride) {
    attributes.push_back(list("kernel_shape", {kernel}));
    attributes.push_back(list("strides", {stride}));
    return doubles(type, {x}, attributes, 19).values;
  };
  const auto ceil = integer("ceil_mode", 1), with_padding = integer("count_include_pad", 1);
  CHECK(pooled("MaxPool", {}, 2, 2) == std::vector<double>{1, 3});
  CHECK(pooled("MaxPool", {ceil}, 2, 2) == std::vector<double>{1, 3, 4});
  CHECK(pooled("AveragePool", {ceil}, 2, 2) == std::vector<double>{0.5, 2.5, 4});
  CHECK(pooled("AveragePool", {ceil, with_padding}, 2, 2) == std::vector<double>{0.5, 2.5, 4});
  CHECK(pooled("AveragePool", {ceil, with_padding, list("pads", {1, 1})}, 3, 2) ==
        std::vector<double>{1.0 / 3, 2, 7.0 / 3});
  CHECK(pooled("MaxPool", {ceil, list("pads", {1, 1})}, 2, 3) ==
        std::vector<double>{0, 3});  // none that starts on padding
  CHECK(pooled("MaxPool", {text("auto_pad", "SAME_UPPER")}, 2, 1) ==
        std::vector<double>{1, 2, 3, 4, 4});
  CHECK(pooled("MaxPool", {text("auto_pad", "SAME_LOWER")}, 2, 1) ==
        std::vector<double>{0, 1, 2, 3, 4});
  CHECK(pooled("MaxPool", {text("auto_pad", "SAME_UPPER")}, 1, 2) == std::vector<double>{0, 2, 4});
  CHECK(pooled("MaxPool", {text("auto_pad", "VALID")}, 2, 2) == std::vector<double>{1, 3});

  const Doubles two{{1, 1, 2}, {1, 10}}, weight{{1, 1, 3}, {1, 2, 3}};
  const auto transposed = [&](Attributes attributes) {
    attributes.push_back(list("strides", {2}));
    return doubles("ConvTranspose", {two, weight}, attributes).values;
  };
  CHECK(transposed({}) == std::vector<double>{1, 2, 13, 20, 30});
  CHECK(transposed({list("output_padding", {1})}) == std::vector<double>{1, 2, 13, 20, 30, 0});
  CHECK(transposed({list("output_shape", {4}), text("auto_pad", "SAME_UPPER")}) ==
        std::vector<double>{1, 2, 13, 20});
  CHECK(transposed({list("output_shape", {4})}) == std::vector<double>{2, 13, 20, 30});
  CHECK(transposed({text("auto_pad", "SAME_UPPER")}) == std::vector<double>{1, 2, 13, 20});
  CHECK(transposed({text("auto_pad", "SAME_LOWER")}) == std::vector<double>{2, 13, 20, 30});
  CHECK(transposed({list("pads", {1, 1})}) == std::vector<double>{2, 13, 20});

  CHECK(doubles("GlobalAveragePool", {counting({1, 2, 2, 2})}) ==
        Doubles{{1, 2, 1, 1}, {1.5, 5.5}});
  CHECK(doubles("GlobalMaxPool", {counting({1, 2, 3})}) == Doubles{{1, 2, 1}, {2, 5}});
}

// ---- products, reductions, norms

TEST_CASE("matrix products", "[onnx]") {
  Rng rng(4);
  const auto [left, right, shape] = GENERATE(table<Shape, Shape, Shape>({
      {{3, 4}, {4, 2}, {3, 2}},
      {{5, 3, 4}, {4, 2}, {5, 3, 2}},
      {{2, 1, 3, 4}, {5, 4, 2}, {2, 5, 3, 2}},
      {{3, 4}, {2, 4, 5}, {2, 3, 5}},
      {{4}, {4, 2}, {2}},
      {{3, 4}, {4}, {3}},
      {{4}, {4}, {}},
      {{4}, {2, 4, 3}, {2, 3}},
      {{2, 3, 4}, {4}, {2, 3}},
      {{0, 4}, {4, 2}, {0, 2}},
  }));
  const auto a = small_integers<double>(left, rng), b = small_integers<double>(right, rng);
  const bool row = left.size() == 1, column = right.size() == 1;
  Doubles expected{shape, {}};
  for (std::int64_t n = 0; n < numel(shape); ++n) {
    Shape place = place_of(n, shape);
    Shape batch(place.begin(), place.end() - !row - !column);
    const auto i = row ? 0 : place[batch.size()], j = column ? 0 : place.back();
    double sum = 0;
    for (std::int64_t k = 0; k < 4; ++k) {
      sum += at_broadcast(a, row ? joined(batch, {k}) : joined(batch, {i, k})) *
             at_broadcast(b, column ? joined(batch, {k}) : joined(batch, {k, j}));
    }
    expected.values.push_back(sum);
  }
  CHECK(doubles("MatMul", {a, b}) == expected);
}

TEST_CASE("Gemm transposes, scales and adds what is broadcast", "[onnx]") {
  const Doubles a{{2, 3}, {1, 2, 3, 4, 5, 6}}, b{{3, 1}, {1, 10, 100}},
      at{{3, 2}, {1, 4, 2, 5, 3, 6}}, bt{{1, 3}, b.values};
  const Doubles c{{2, 1}, {1, 2}}, product{{2, 1}, {321, 654}};
  CHECK(doubles("Gemm", {a, b}) == product);
  CHECK(doubles("Gemm", {at, b}, {integer("transA", 1)}) == product);
  CHECK(doubles("Gemm", {a, bt}, {integer("transB", 1)}) == product);
  CHECK(doubles("Gemm", {at, bt, c},
                {integer("transA", 1), integer("transB", 1), real("alpha", 2),
                 real("beta", 0.5F)}) == Doubles{{2, 1}, {642.5, 1309}});
  CHECK(doubles("Gemm", {a, b, Doubles{{}, {1}}}) == Doubles{{2, 1}, {322, 655}});
  CHECK_THAT(message_of<ShapeError>([&] { run("Gemm", {a, b, Doubles{{3}, {1, 2, 3}}}); }),
             Contains("bias of [3]"));
}

TEST_CASE("reductions over some axes", "[onnx]") {
  const Doubles x{{2, 2, 3}, {1, 2, 3, 4, 5, 6, -1, -2, -3, -4, -5, -6}};
  CHECK(doubles("ReduceSum", {x, vector({1})}) == Doubles{{2, 1, 3}, {5, 7, 9, -5, -7, -9}});
  CHECK(doubles("ReduceSum", {x, vector({-1, 0})}, {integer("keepdims", 0)}) ==
        Doubles{{2}, {0, 0}});
  CHECK(doubles("ReduceSum", {x}) == Doubles{{1, 1, 1}, {0}});
  CHECK(doubles("ReduceSum", {x}, {integer("noop_with_empty_axes", 1)}) == x);
  CHECK(doubles("ReduceMean", {x}, {list("axes", {2}), integer("keepdims", 0)}) ==
        Doubles{{2, 2}, {2, 5, -2, -5}});
  CHECK(doubles("ReduceMean", {x, vector({0, 2})}, {}, 18) == Doubles{{1, 2, 1}, {0, 0}});
  CHECK(doubles("ReduceMax", {x}, {list("axes", {0})}) == Doubles{{1, 2, 3}, {1, 2, 3, 4, 5, 6}});
  CHECK(doubles("ReduceMin", {x}, {list("axes", {0, 1}), integer("keepdims", 0)}) ==
        Doubles{{3}, {-4, -5, -6}});
  CHECK(doubles("ReduceProd", {x}, {list("axes", {2})}) == Doubles{{2, 2, 1}, {6, 120, -6, -120}});
  CHECK(doubles("ReduceL1", {x}, {list("axes", {1, 2})}) == Doubles{{2, 1, 1}, {21, 21}});
  CHECK(doubles("ReduceSumSquare", {x}, {list("axes", {2})}) ==
        Doubles{{2, 2, 1}, {14, 77, 14, 77}});
  CHECK(doubles("ReduceL2", {Doubles{{2}, {3, 4}}}) == Doubles{{1}, {5}});
  CHECK(integers("ReduceMax", {vector({3, 7, 5})}) == vector({7}));
  CHECK(integers("ArgMax", {x}, {integer("axis", -1)}) == Integers{{2, 2, 1}, {2, 2, 0, 0}});
  CHECK(integers("ArgMin", {x}, {integer("axis", 0), integer("keepdims", 0)}) ==
        Integers{{2, 3}, {1, 1, 1, 1, 1, 1}});
  CHECK(integers("ArgMax", {vector({1, 3, 3})}, {integer("select_last_index", 1)}) == vector({2}));
  CHECK(integers("ArgMax", {vector({1, 3, 3})}) == vector({1}));
}

TEST_CASE("softmax along an axis, or of all that follows it before opset 13", "[onnx]") {
  Rng rng(5);
  const auto x = small_integers<double>({2, 3, 4}, rng);
  const std::int64_t axis = GENERATE(-3, -1, 0, 1, 2), opset = GENERATE(11, 13);
  const auto first = static_cast<std::size_t>((axis + 3) % 3), last = opset < 13 ? 3 : first + 1;
  Doubles expected{x.shape, {}}, logarithm = expected;
  for (std::int64_t n = 0; n < 24; ++n) {
    double sum = 0;
    for (std::int64_t m = 0; m < 24; ++m) {
      const Shape a = place_of(n, x.shape), b = place_of(m, x.shape);
      bool same = true;
      for (std::size_t i = 0; i < 3; ++i) same = same && (a[i] == b[i] || (i >= first && i < last));
      if (same) sum += std::exp(x.values[static_cast<std::size_t>(m)]);
    }
    const double value = x.values[static_cast<std::size_t>(n)];
    expected.values.push_back(std::exp(value) / sum);
    logarithm.values.push_back(value - std::log(sum));
  }
  check_close(doubles("Softmax", {x}, {integer("axis", axis)}, opset), expected);
  check_close(doubles("LogSoftmax", {x}, {integer("axis", axis)}, opset), logarithm);
  check_close(doubles("Softmax", {Doubles{{1, 2}, {1000, 1000}}}), Doubles{{1, 2}, {0.5, 0.5}});
}

TEST_CASE("norms", "[onnx]") {
  Rng rng(6);
  const Shape shape = {2, 3, 2, 2};
  const auto x = small_integers<double>(shape, rng);
  const Doubles scale{{3}, {1, -2, 3}}, bias{{3}, {4, 5, 6}}, mean{{3}, {1, 2, -1}},
      variance{{3}, {0.5, 1, 2}};
  const float epsilon = 0.25F;
  Doubles batch{shape, {}}, instance = batch, layer = batch;
  const Doubles scales = counting({2, 2}), biases{{2, 2}, {3, 2, 1, 0}};
  for (std::int64_t n = 0; n < 24; ++n) {
    const auto i = static_cast<std::size_t>(n), c = i / 4 % 3;
    batch.values.push_back((x.values[i] - mean.values[c]) / std::sqrt(variance.values[c] + 0.25) *
                               scale.values[c] +
                           bias.values[c]);
    double sum = 0, squares = 0;
    for (std::size_t k = i / 4 * 4; k < i / 4 * 4 + 4; ++k) {
      sum += x.values[k];
      squares += x.values[k] * x.values[k];
    }
    const double normal = (x.values[i] - sum / 4) / std::sqrt(squares / 4 - sum * sum / 16 + 0.25);
    instance.values.push_back(normal * scale.values[c] + bias.values[c]);
    layer.values.push_back(normal * scales.values[i % 4] + biases.values[i % 4]);
  }
  check_close(
      doubles("BatchNormalization", {x, scale, bias, mean, variance}, {real("epsilon", epsilon)}),
      batch);
  check_close(doubles("InstanceNormalization", {x, scale, bias}, {real("epsilon", epsilon)}),
              instance);
  check_close(doubles("LayerNormalization", {x, scales, biases},
                      {real("epsilon", epsilon), integer("axis", 2)}),
              layer);
  CHECK_THAT(message_of<FormatError>([&] {
               run("BatchNormalization", {x, scale, bias, mean, variance},
                   {integer("training_mode", 1)});
             }),
             Contains("inference"));
  CHECK_THAT(message_of<ShapeError>(
                 [&] { run("InstanceNormalization", {x, Doubles{{2}, {1, 1}}, bias}); }),
             Contains("channel"));
}

// ---- selections and shapes

TEST_CASE("slices", "[onnx]") {
  const Doubles x = counting({3, 4});
  CHECK(doubles("Slice", {x}, {list("starts", {1, -3}), list("ends", {3, 4})}, 9) ==
        Doubles{{2, 3}, {5, 6, 7, 9, 10, 11}});
  CHECK(doubles("Slice", {x}, {list("starts", {-2}), list("ends", {100}), list("axes", {1})}, 7) ==
        Doubles{{3, 2}, {2, 3, 6, 7, 10, 11}});
  const auto least = std::numeric_limits<std::int64_t>::min();
  CHECK(doubles("Slice", {x, vector({-1}), vector({least}), vector({-1}), vector({-2})}) ==
        Doubles{{3, 2}, {3, 1, 7, 5, 11, 9}});
  CHECK(doubles("Slice", {x, vector({2}), vector({1})}) == Doubles{{0, 4}, {}});
  CHECK(doubles("Slice", {x, vector({0}), vector({3}), vector({0}), vector({least})}) ==
        Doubles{{0, 4}, {}});
  CHECK_THAT(
      message_of<ShapeError>([&] { run("Slice", {x, vector({0}), vector({1}), vector({2})}); }),
      Contains("no axis 2"));
  CHECK_THAT(message_of<ShapeError>(
                 [&] { run("Slice", {x, vector({0}), vector({1}), vector({0}), vector({0})}); }),
             Contains("steps of 0"));
}

TEST_CASE("parts and their joints", "[onnx]") {
  const Doubles x = counting({2, 5}), left{{2, 2}, {0, 1, 5, 6}}, right{{2, 3}, {2, 3, 4, 7, 8, 9}};
  const auto axis = integer("axis", 1);
  using Parts = std::vector<Value>;
  CHECK(run_all("Split", {x, vector({2, 3})}, {axis}, 13, 2) == Parts{left, right});
  CHECK(run_all("Split", {x}, {axis, list("split", {2, 3})}, 7, 2) == Parts{left, right});
  CHECK(run_all("Split", {x}, {integer("axis", 0)}, 13, 2) ==
        Parts{Doubles{{1, 5}, {0, 1, 2, 3, 4}}, Doubles{{1, 5}, {5, 6, 7, 8, 9}}});
  CHECK(run_all("Split", {x}, {axis, integer("num_outputs", 2)}, 18, 2) ==
        Parts{Doubles{{2, 3}, {0, 1, 2, 5, 6, 7}}, Doubles{{2, 2}, {3, 4, 8, 9}}});
  CHECK_THAT(message_of<ShapeError>([&] { run_all("Split", {x, vector({2, 2})}, {axis}, 13, 2); }),
             Contains("parts of 4 positions in all, for the 5"));
  CHECK(doubles("Concat", {left, right}, {axis}) == x);
  CHECK(doubles("Concat", {left, right, Doubles{{2, 0}, {}}}, {integer("axis", -1)}) == x);
  CHECK(integers("Concat", {vector({1}), vector({2, 3})}, {integer("axis", 0)}) ==
        vector({1, 2, 3}));
  CHECK_THAT(message_of<ShapeError>([&] { run("Concat", {left, right}, {integer("axis", 0)}); }),
             Contains("[2, 3] cannot be joined to [2, 2]"));
}

TEST_CASE("pads", "[onnx]") {
  const Doubles x = counting({1, 3});
  const auto padded = [&](const char* mode, Shape pads) {
    return doubles("Pad", {x, vector(std::move(pads))}, {text("mode", mode)}, 19);
  };
  CHECK(padded("constant", {0, 1, 1, 2}) == Doubles{{2, 6}, {0, 0, 1, 2, 0, 0, 0, 0, 0, 0, 0, 0}});
  CHECK(padded("constant", {0, -1, 0, 1}) == Doubles{{1, 3}, {1, 2, 0}});
  CHECK(padded("constant", {0, -2, 0, -1}) == Doubles{{1, 0}, {}});
  CHECK(padded("reflect", {0, 2, 0, 3}) == Doubles{{1, 8}, {2, 1, 0, 1, 2, 1, 0, 1}});
  CHECK(padded("edge", {1, 2, 0, 1}) == Doubles{{2, 6}, {0, 0, 0, 1, 2, 2, 0, 0, 0, 1, 2, 2}});
  CHECK(padded("wrap", {0, 2, 0, 4}) == Doubles{{1, 9}, {1, 2, 0, 1, 2, 0, 1, 2, 0}});
  const Doubles seven{{1, 4}, {7, 0, 1, 2}};
  CHECK(doubles("Pad", {x, vector({0, 1, 0, 0}), Doubles{{}, {7}}}) == seven);
  CHECK(doubles("Pad", {x, vector({1, 0}), Doubles{{}, {7}}, vector({-1})}, {}, 18) == seven);
  CHECK(doubles("Pad", {x}, {list("pads", {0, 1, 0, 0}), real("value", 7)}, 7) == seven);
  CHECK_THAT(message_of<FormatError>([&] { padded("mirror", {0, 0, 0, 0}); }), Contains("mirror"));
  CHECK_THAT(message_of<ShapeError>([&] { padded("constant", {0, 0, 1}); }), Contains("[0, 0, 1]"));
}

TEST_CASE("gathered, repeated and permuted elements", "[onnx]") {
  const Doubles x = counting({2, 3});
  CHECK(doubles("Gather", {x, Integers{{2, 1}, {2, -3}}}, {integer("axis", 1)}) ==
        Doubles{{2, 2, 1}, {2, 0, 5, 3}});
  CHECK(doubles("Gather", {x, Integers{{}, {1}}}) == Doubles{{3}, {3, 4, 5}});
  CHECK_THAT(message_of<ShapeError>([&] { run("Gather", {x, vector({2})}); }),
             Contains("no index 2 of 2"));
  CHECK(doubles("Expand", {Doubles{{2, 1}, {1, 2}}, vector({2, 1, 3})}) ==
        Doubles{{2, 2, 3}, {1, 1, 1, 2, 2, 2, 1, 1, 1, 2, 2, 2}});
  CHECK(doubles("Expand", {x, vector({1})}) == x);
  CHECK(doubles("Tile", {Doubles{{1, 2}, {1, 2}}, vector({2, 2})}) ==
        Doubles{{2, 4}, {1, 2, 1, 2, 1, 2, 1, 2}});
  CHECK(doubles("Transpose", {x}) == Doubles{{3, 2}, {0, 3, 1, 4, 2, 5}});
  const Doubles y = counting({2, 3, 2});
  CHECK(doubles("Transpose", {y}, {list("perm", {1, 0, 2})}) ==
        Doubles{{3, 2, 2}, {0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11}});
  CHECK_THAT(message_of<ShapeError>([&] { run("Transpose", {y}, {list("perm", {0, 0, 1})}); }),
             Contains("axis twice"));
  const Doubles blocks = counting({1, 8, 1, 1});
  CHECK(doubles("DepthToSpace", {blocks}, {integer("blocksize", 2)}) ==
        Doubles{{1, 2, 2, 2}, {0, 2, 4, 6, 1, 3, 5, 7}});
  CHECK(doubles("DepthToSpace", {blocks}, {integer("blocksize", 2), text("mode", "CRD")}) ==
        Doubles{{1, 2, 2, 2}, {0, 1, 2, 3, 4, 5, 6, 7}});
  CHECK(doubles("SpaceToDepth", {Doubles{{1, 2, 2, 2}, {0, 2, 4, 6, 1, 3, 5, 7}}},
                {integer("blocksize", 2)}) == blocks);
}

TEST_CASE("resized maps", "[onnx]") {
  const Doubles x = counting({1, 1, 3});
  const Value scales = Floats{{3}, {1, 1, 2}};
  const auto resized = [&](const char* mode, const char* coordinates, const char* rounding) {
    return doubles("Resize", {x, std::nullopt, scales},
                   {text("mode", mode), text("coordinate_transformation_mode", coordinates),
                    text("nearest_mode", rounding)})
        .values;
  };
  using Row = std::vector<double>;
  CHECK(resized("nearest", "asymmetric", "floor") == Row{0, 0, 1, 1, 2, 2});
  CHECK(resized("nearest", "asymmetric", "ceil") == Row{0, 1, 1, 2, 2, 2});
  CHECK(resized("nearest", "asymmetric", "round_prefer_floor") == Row{0, 0, 1, 1, 2, 2});
  CHECK(resized("nearest", "asymmetric", "round_prefer_ceil") == Row{0, 1, 1, 2, 2, 2});
  CHECK(resized("nearest", "half_pixel", "round_prefer_floor") == Row{0, 0, 1, 1, 2, 2});
  CHECK(resized("linear", "asymmetric", "floor") == Row{0, 0.5, 1, 1.5, 2, 2});
  CHECK(resized("linear", "half_pixel", "floor") == Row{0, 0.25, 0.75, 1.25, 1.75, 2});
  CHECK(doubles("Resize", {x, std::nullopt, std::nullopt, vector({1, 1, 5})},
                {text("mode", "linear"), text("coordinate_transformation_mode", "align_corners")})
            .values == Row{0, 0.5, 1, 1.5, 2});
  CHECK_THAT(message_of<FormatError>([&] { resized("cubic", "half_pixel", "floor"); }),
             Contains("nearest and linear"));
  CHECK_THAT(message_of<FormatError>([&] { resized("linear", "tf_crop_and_resize", "floor"); }),
             Contains("tf_crop_and_resize"));
  const Doubles twice{{1, 1, 6}, {0, 0, 1, 1, 2, 2}};
  CHECK(doubles("Resize", {x, scales}, {}, 10) == twice);
  CHECK(doubles("Resize", {x, std::nullopt, std::nullopt, vector({1, 1, 6})}) == twice);
  CHECK(doubles("Resize", {x, std::nullopt, Floats{{1}, {2}}}, {list("axes", {2})}, 18) == twice);
  CHECK(doubles("Upsample", {x, scales}, {}, 9) == twice);
  Attribute attribute{.name = "scales", .type = onnx::AttributeType::floats, .floats = {1, 1, 2}};
  CHECK(doubles("Upsample", {x}, {attribute}, 7) == twice);
  CHECK(integers("Resize", {vector({1, 2}), std::nullopt, Floats{{1}, {0.5F}}}) == vector({1}));
  const Doubles map = counting({1, 1, 2, 4});
  CHECK(doubles("Resize", {map, std::nullopt, std::nullopt, vector({4, 4})},
                {list("axes", {2, 3}), text("keep_aspect_ratio_policy", "not_larger")}, 18)
            .shape == Shape{1, 1, 2, 4});
}

TEST_CASE("shapes", "[onnx]") {
  const Doubles x = counting({2, 3, 4});
  const auto shape_after = [&](const char* type, Inputs inputs, const Attributes& attributes = {},
                               std::int64_t opset = 17) {
    inputs.insert(inputs.begin(), x);
    const Doubles y = doubles(type, inputs, attributes, opset);
    CHECK(y.values == x.values);
    return y.shape;
  };
  CHECK(shape_after("Reshape", {vector({4, -1})}) == Shape{4, 6});
  CHECK(shape_after("Reshape", {vector({0, -1, 1})}) == Shape{2, 12, 1});
  CHECK(shape_after("Flatten", {}) == Shape{2, 12});
  CHECK(shape_after("Flatten", {}, {integer("axis", -1)}) == Shape{6, 4});
  CHECK(shape_after("Flatten", {}, {integer("axis", 3)}) == Shape{24, 1});
  CHECK(shape_after("Unsqueeze", {vector({-1, 0})}) == Shape{1, 2, 3, 4, 1});
  CHECK(shape_after("Unsqueeze", {}, {list("axes", {1, 2})}, 11) == Shape{2, 1, 1, 3, 4});
  CHECK(shape_after("Identity", {}) == x.shape);
  CHECK(shape_after("Dropout", {}, {real("ratio", 0.5F)}, 10) == x.shape);
  CHECK(shape_after("Dropout", {Floats{{}, {0.5F}}, Integers{{}, {0}}}) == x.shape);
  CHECK(run_all("Dropout", {vector({5})}, {}, 12, 2)[1] == Value(vector({1})));
  CHECK_THAT(message_of<FormatError>([&] { run("Dropout", {x, std::nullopt, Integers{{}, {1}}}); }),
             Contains("training"));
  CHECK(doubles("Squeeze", {counting({1, 2, 1})}).shape == Shape{2});
  CHECK(doubles("Squeeze", {counting({1, 2, 1}), vector({-1})}).shape == Shape{1, 2});
  CHECK(doubles("Squeeze", {counting({1, 2, 1})}, {list("axes", {0})}, 7).shape == Shape{2, 1});
  CHECK_THAT(message_of<ShapeError>([&] { run("Squeeze", {x, vector({0})}); }),
             Contains("axis 0 of [2, 3, 4] is not 1"));
  CHECK_THAT(message_of<ShapeError>([&] { run("Reshape", {x, vector({5, -1})}); }),
             Contains("node \"n\" (Reshape) of [2, 3, 4], [2]"));
  CHECK_THAT(message_of<ShapeError>([&] { run("Reshape", {x, vector({-1, -1})}); }),
             Contains("[-1, -1]"));
  CHECK(doubles("Reshape", {Doubles{{0, 2}, {}}, vector({0, -1})}).shape == Shape{0, 0});
  CHECK(
      doubles("Reshape", {Doubles{{0, 2}, {}}, vector({3, 0})}, {integer("allowzero", 1)}).shape ==
      Shape{3, 0});

  CHECK(integers("Shape", {x}) == vector({2, 3, 4}));
  CHECK(integers("Shape", {x}, {integer("start", -2), integer("end", -1)}) == vector({3}));
  CHECK(integers("Size", {x}) == Integers{{}, {24}});
  CHECK(array<float>("ConstantOfShape", {vector({2, 1})}) == Floats{{2, 1}, {0, 0}});
  Attribute value{.name = "value", .type = onnx::AttributeType::tensor};
  value.tensor = std::make_shared<const Tensor>(
      Tensor::of<std::int64_t>("", {1}, std::array<std::int64_t, 1>{7}));
  CHECK(integers("ConstantOfShape", {vector({2})}, {value}) == vector({7, 7}));
  CHECK(integers("Constant", {}, {value}) == vector({7}));
  CHECK(integers("Constant", {}, {integer("value_int", 3)}) == Integers{{}, {3}});
  CHECK(integers("Constant", {}, {list("value_ints", {3, 4})}) == vector({3, 4}));
  CHECK(array<float>("Constant", {}, {real("value_float", 3)}) == Floats{{}, {3}});
  CHECK(integers("Range", {Integers{{}, {5}}, Integers{{}, {0}}, Integers{{}, {-2}}}) ==
        vector({5, 3, 1}));
  CHECK(doubles("Range", {Doubles{{}, {0}}, Doubles{{}, {1}}, Doubles{{}, {0.5}}}) ==
        Doubles{{2}, {0, 0.5}});
  CHECK_THAT(message_of<ShapeError>(
                 [&] { run("Range", {Integers{{}, {5}}, Integers{{}, {0}}, Integers{{}, {0}}}); }),
             Contains("without end"));
  CHECK_THAT(message_of<SizeError>([&] { run("ConstantOfShape", {vector({1 << 20, 1 << 20})}); }),
             Contains("[1048576, 1048576]"));
}

// ---- programs

TEST_CASE("values that are read again are not changed in place", "[onnx]") {
  // y = relu(x) is an output, and is read twice by one node and once by another.
  const Model model = model_of({node_of("Relu", {"x"}, {"y"}), node_of("Add", {"y", "y"}, {"z"}),
                                node_of("Neg", {"z"}, {"u"}), node_of("Add", {"z", "u"}, {"v"}),
                                node_of("Sub", {"y", "v"}, {"w"}), node_of("Neg", {"c"}, {"d"}),
                                node_of("Add", {"x", "d"}, {"e"})},
                               {"x"}, {"w", "y", "e"});
  Model with_constant = model;
  with_constant.initializers.push_back(Tensor::of<double>("c", {1}, std::array{2.0}));
  const Evaluator evaluator(with_constant);
  const Values inputs = {{"x", Doubles{{3}, {-1, 2, 3}}}};
  const Values expected = {{"y", Doubles{{3}, {0, 2, 3}}},
                           {"w", Doubles{{3}, {0, 2, 3}}},
                           {"e", Doubles{{3}, {-3, 0, 1}}}};
  for (int i = 0; i < 3; ++i) {
    CHECK(evaluator(inputs) == expected);
    CHECK(inputs.at("x") == Value(Doubles{{3}, {-1, 2, 3}}));
  }
  std::vector<std::thread> threads;
  std::vector<Values> results(4);
  for (Values& result : results) threads.emplace_back([&] { result = evaluator(inputs); });
  for (std::thread& thread : threads) thread.join();
  CHECK(std::ranges::count(results, expected) == 4);
}

TEST_CASE("inputs and constants go through as they are", "[onnx]") {
  Model model = model_of({}, {"x", "c"}, {"x", "c"});
  model.initializers.push_back(
      Tensor::of<float>("c", {2}, std::array{1.0F, 2.0F}));  // an old model's
  const Values inputs = {{"x", vector({1})}};
  CHECK(Evaluator(model)(inputs) == Values{{"x", vector({1})}, {"c", Floats{{2}, {1, 2}}}});
  CHECK(Evaluator(model, true)(inputs).at("c") == Value(Doubles{{2}, {1, 2}}));
}

TEST_CASE("floats are widened on demand", "[onnx]") {
  Model model = model_of(
      {node_of("Add", {"x", "c"}, {"y"}), node_of("Cast", {"y"}, {"z"}, {integer("to", 10)})},
      {"x"}, {"z"});
  model.inputs[0].type = DataType::float32;
  model.initializers.push_back(Tensor::of<Eigen::half>("c", {1}, std::array{Eigen::half(1)}));
  const float tiny = std::ldexp(1.0F, -30);
  const Values inputs = {{"x", Floats{{1}, {tiny}}}};
  CHECK(Evaluator(model)(inputs).at("z") == Value(Floats{{1}, {1}}));
  CHECK(Evaluator(model, true)(inputs).at("z") ==
        Value(Doubles{{1}, {1.0 + static_cast<double>(tiny)}}));
  CHECK_THAT(message_of<FormatError>([&] { Evaluator{model}({{"x", vector({1})}}); }),
             Contains("input \"x\""));
  model.inputs[0].type = DataType::float64;
  CHECK_THAT(message_of<FormatError>([&] { Evaluator{model}(inputs); }),
             Contains("node \"n\" (Add) of [1], [1]: its input 1 has floats"));
}

TEST_CASE("programs are refused by what is wrong with them", "[onnx]") {
  const auto refused = [](std::vector<Node> nodes, std::int64_t opset = 17) {
    return message_of<FormatError>(
        [&] { Evaluator evaluator(model_of(nodes, {"x"}, {"y"}, opset)); });
  };
  Node custom = node_of("FusedConv", {"x"}, {"y"});
  custom.domain = "com.example";
  CHECK_THAT(refused({node_of("Loop", {"x"}, {"z"}), custom}),
             Contains("model: operators that are not supported: ") && Contains("\"n\" (Loop)") &&
                 Contains("\"n\" (FusedConv) of com.example"));
  CHECK_THAT(refused({node_of("Relu", {"x"}, {"y"})}, 6), Contains("version 6"));
  CHECK_THAT(refused({node_of("Relu", {"x", "x"}, {"y"})}), Contains("\"n\" (Relu) has 2 inputs"));
  CHECK_THAT(refused({node_of("Add", {"x", ""}, {"y"})}), Contains("lacks its input 1"));
  CHECK_THAT(refused({node_of("Concat", {"x", ""}, {"y"}, {integer("axis", 0)})}),
             Contains("lacks its input 1"));
  CHECK_THAT(refused({node_of("Relu", {"x"}, {"y", "z"})}), Contains("outputs"));
  CHECK_THAT(refused({node_of("Relu", {"x"}, {"y"}, {integer("axis", 1)})}),
             Contains("attribute \"axis\""));
  CHECK_THAT(refused({node_of("Softmax", {"x"}, {"y"}, {real("axis", 1)})}), Contains("axis"));
  CHECK_THAT(refused({node_of("Relu", {"z"}, {"y"})}), Contains("reads \"z\""));
  CHECK_THAT(refused({node_of("Relu", {"x"}, {"x"})}), Contains("\"x\" is there twice"));
  CHECK_THAT(refused({}), Contains("the graph reads \"y\""));
  CHECK_THAT(refused({node_of("Conv", {"x", "x"}, {"y"}, {text("auto_pad", "SAME")})}),
             Contains("auto_pad is SAME"));
  CHECK_THAT(refused({node_of("Conv", {"x", "x"}, {"y"},
                              {text("auto_pad", "VALID"), list("pads", {0, 0})})}),
             Contains("pads beside auto_pad VALID"));

  const Model model = model_of({node_of("MatMul", {"x", "z"}, {"y"})}, {"x", "z"}, {"y"});
  const Evaluator evaluator(model);
  const Values inputs = {{"x", counting({2, 3})}, {"z", counting({2, 3})}};
  CHECK_THAT(message_of<ShapeError>([&] { evaluator(inputs); }),
             Contains("node \"n\" (MatMul) of [2, 3], [2, 3]: "));
  CHECK_THAT(message_of<FormatError>([&] { evaluator({{"x", counting({2})}}); }),
             Contains("\"z\" is not given"));
  CHECK_THAT(message_of<FormatError>([&] {
               evaluator({{"x", counting({2})}, {"z", counting({2})}, {"a", counting({2})}});
             }),
             Contains("no input \"a\""));
  CHECK_THAT(
      message_of<ShapeError>([&] { evaluator({{"x", Doubles{{3}, {1}}}, {"z", counting({2})}}); }),
      Contains("has 1 values"));
}

TEST_CASE("a tensor is read from a file of its own", "[onnx]") {
  const auto folder = std::filesystem::temp_directory_path() / "concertina_test_onnx_evaluate";
  std::filesystem::create_directories(folder);
  const auto path = folder / "input_0.pb";
  {
    // dims 2 and 1, int32, elements one by one; its name
    std::ofstream file(path, std::ios::binary);
    file << "\x08\x02\x08\x01\x10\x06\x2a\x02\x05\x07\x42\x01x";
  }
  const Tensor tensor = onnx::read_tensor(path);
  CHECK(tensor.name == "x");
  CHECK(value_of(tensor) == Value(Integers{{2, 1}, {5, 7}}));
  std::ofstream(path, std::ios::binary) << "\x08\x02\x10\x06\x2a\x01\x05";
  CHECK_THAT(message_of<FormatError>([&] { onnx::read_tensor(path); }), Contains("input_0.pb"));
  std::filesystem::remove_all(folder);
  CHECK_THROWS_AS(onnx::read_tensor(path), IoError);
  CHECK_THAT(message_of<FormatError>([] { value_of({.name = "s", .type = DataType::string}); }),
             Contains("\"s\" is of string"));
}

}  // namespace
}  // namespace concertina::test
