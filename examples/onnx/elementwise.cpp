// Operators that change each element, or two that broadcasting brings together.
// SPDX-License-Identifier: Apache-2.0
#include "operators.hpp"

#include <cmath>
#include <limits>
#include <numbers>

namespace tool::evaluation {
namespace {

using concertina::onnx::DataType;

// ---- one operand

template <class F>
Step floats_by(F f) {
  return of_floats([f]<class Scalar>(Arguments& in) {
    auto x = in.take_as<Scalar>(0);
    for (Scalar& value : x.values) value = f(value);
    return x;
  });
}

/// f(x).
template <class F>
Operator unary(F f) {
  return {1, 1, "", [f](const Definition&) { return floats_by(f); }};
}

/// f(x, alpha, beta), of attributes.
template <class F>
Operator unary(F f, float alpha, float beta = 0, std::string_view names = "alpha beta") {
  return {1, 1, names, [=](const Definition& of) {
            const double a = of.node.real(names.substr(0, 5), alpha);
            const double b = names.size() > 5 ? of.node.real(names.substr(6), beta) : beta;
            return floats_by([=](auto x) {
              return f(x, static_cast<decltype(x)>(a), static_cast<decltype(x)>(b));
            });
          }};
}

/// f(x), integers too.
template <class F>
Operator unary_of_numbers(F f) {
  return {1, 1, "", [f](const Definition&) {
            return of_numbers([f]<class Scalar>(Arguments& in) {
              auto x = in.take_as<Scalar>(0);
              for (Scalar& value : x.values) value = f(value);
              return x;
            });
          }};
}

template <class Scalar>
Scalar sigmoid(Scalar x) {
  return 1 / (1 + std::exp(-x));
}
template <class Scalar>
Scalar softplus(Scalar x) {
  return std::max(x, Scalar(0)) + std::log1p(std::exp(-std::abs(x)));
}

Step clip(const Definition& of) {
  const float infinity = std::numeric_limits<float>::infinity();
  const float low = of.node.real("min", -infinity), high = of.node.real("max", infinity);
  return of_numbers([=]<class Scalar>(Arguments& in) {
    auto x = in.take_as<Scalar>(0);
    const auto bound = [&](std::size_t i, float attribute, const auto& change) {
      if (!in.has(i) && std::isinf(attribute)) return;
      const Scalar limit = in.has(i) ? in.scalar<Scalar>(i) : static_cast<Scalar>(attribute);
      for (Scalar& value : x.values) value = change(value, limit);
    };
    bound(1, low, [](Scalar value, Scalar limit) { return value < limit ? limit : value; });
    bound(2, high, [](Scalar value, Scalar limit) { return value > limit ? limit : value; });
    return x;
  });
}

/// std::erf is what the definition says; the other is its usual approximation.
Step gelu(const Definition& of) {
  if (of.node.text("approximate", "none") == "none") {
    return floats_by([](auto x) {
      using Scalar = decltype(x);
      return x / 2 * (1 + std::erf(x * static_cast<Scalar>(std::numbers::sqrt2 / 2)));
    });
  }
  return floats_by([](auto x) {
    using Scalar = decltype(x);
    const auto factor = static_cast<Scalar>(std::numbers::sqrt2 * std::numbers::inv_sqrtpi);
    return x / 2 * (1 + std::tanh(factor * (x + static_cast<Scalar>(0.044715) * x * x * x)));
  });
}

/// Integers wrap around; NaN and what is too large become the least one.
template <class Integer>
Index to_integer(double value) {
  constexpr double limit = 9223372036854775808.0;
  return value >= -limit && value < limit ? static_cast<Integer>(static_cast<Index>(value)) : 0;
}
template <class Integer>
Index to_integer(Index value) {
  return static_cast<Integer>(value);
}

Step cast(const Definition& of) {
  const auto to = static_cast<DataType>(of.node.integer("to", 0));
  const auto converted = []<class Result>(const auto& convert) {
    return of_numbers([convert]<class Scalar>(Arguments& in) {
      if constexpr (std::same_as<Scalar, Result>) {
        if (std::floating_point<Scalar>) return in.take_as<Scalar>(0);
      }
      const auto& x = in.as<Scalar>(0);
      Array<Result> y{x.shape, {}};
      y.values.reserve(x.values.size());
      for (const Scalar value : x.values) y.values.push_back(convert(value));
      return y;
    });
  };
  const auto to_integers = [&]<class Integer>(Integer) {
    return converted.template operator()<Index>(
        [](auto value) { return to_integer<Integer>(value); });
  };
  switch (to) {
    case DataType::float16:
    case DataType::bfloat16:
    case DataType::float32:
      if (!of.wide) {
        return converted.template operator()<float>(
            [](auto value) { return static_cast<float>(value); });
      }
      [[fallthrough]];
    case DataType::float64:
      return converted.template operator()<double>(
          [](auto value) { return static_cast<double>(value); });
    case DataType::boolean:
      return converted.template operator()<Index>([](auto value) { return Index{value != 0}; });
    case DataType::uint8: return to_integers(std::uint8_t{});
    case DataType::int8: return to_integers(std::int8_t{});
    case DataType::uint16: return to_integers(std::uint16_t{});
    case DataType::int16: return to_integers(std::int16_t{});
    case DataType::uint32: return to_integers(std::uint32_t{});
    case DataType::int32: return to_integers(std::int32_t{});
    case DataType::int64: return to_integers(std::int64_t{});
    default:
      throw concertina::FormatError("it casts to " + to_string(to) + ", which is not supported");
  }
}

// ---- two operands and more

template <class F>
Operator binary(F f) {
  return {2, 2, "", [f](const Definition&) {
            return of_numbers(
                [f]<class Scalar>(Arguments& in) { return broadcast<Scalar>(in, 0, 1, f); });
          }};
}

/// 0 or 1.
template <class F>
Operator comparison(F f) {
  return {2, 2, "", [f](const Definition&) {
            return of_numbers([f]<class Scalar>(Arguments& in) {
              return broadcast<Scalar, Index>(in, 0, 1,
                                              [f](auto a, auto b) { return Index{f(a, b)}; });
            });
          }};
}

constexpr auto divide = []<class Scalar>(Scalar a, Scalar b) {
  if constexpr (std::integral<Scalar>) {
    if (b == 0) throw concertina::NumericalError("an integer is divided by 0");
    return b == -1 ? static_cast<Scalar>(-static_cast<std::uint64_t>(a)) : a / b;
  } else {
    return a / b;
  }
};

constexpr auto power = []<class Scalar>(Scalar a, Scalar b) {
  if constexpr (std::integral<Scalar>) {
    if (b < 0) {
      const Scalar inverse = divide(Scalar(1), a);
      return b % 2 == 0 ? inverse * inverse : inverse;
    }
    std::uint64_t result = 1;  // which wraps around
    for (auto square = static_cast<std::uint64_t>(a); b > 0; b /= 2, square *= square) {
      if (b % 2 != 0) result *= square;
    }
    return static_cast<Scalar>(result);
  } else {
    return b == 2 ? a * a : static_cast<Scalar>(std::pow(a, b));
  }
};

/// The exponent may have another type.
Step pow(const Definition&) {
  return of_numbers([]<class Scalar>(Arguments& in) {
    if (in[1].index() == in[0].index()) return broadcast<Scalar>(in, 0, 1, power);
    const auto exponents = in.reals(1);
    const Array<Scalar> b{in.shape(1), {exponents.begin(), exponents.end()}};
    auto y = zeros<Scalar>(broadcast(in.shape(0), b.shape));
    combine(in.as<Scalar>(0), b, y.shape, y.values.data(), power);
    return y;
  });
}

/// One after another; divided by their number for means.
template <class F>
Operator variadic(F f, bool mean = false) {
  return {1, any, "", [=](const Definition&) {
            return of_numbers([=]<class Scalar>(Arguments& in) {
              auto y = in.take_as<Scalar>(0);
              for (std::size_t i = 1; i < in.size(); ++i) {
                const auto& x = in.as<Scalar>(i);
                const Shape shape = broadcast(y.shape, x.shape);
                if (shape != y.shape) {
                  auto wider = zeros<Scalar>(shape);
                  combine(y, x, shape, wider.values.data(), f);
                  y = std::move(wider);
                } else {
                  combine(y, x, shape, y.values.data(), f);
                }
              }
              if (mean) {
                for (Scalar& value : y.values) value /= static_cast<Scalar>(in.size());
              }
              return y;
            });
          }};
}

Step where(const Definition&) {
  return [](Arguments& in) {
    return std::visit(
        [&]<class Scalar>(const Array<Scalar>& a) -> Value {
          const auto& condition = in.as<Index>(0);
          const auto& b = in.as<Scalar>(2);
          const Shape shape = broadcast(condition.shape, broadcast(a.shape, b.shape));
          auto y = zeros<Scalar>(shape);
          Scalar* to = y.values.data();
          for_each_run<3>(shape,
                          {broadcast_strides(condition.shape, shape),
                           broadcast_strides(a.shape, shape), broadcast_strides(b.shape, shape)},
                          [&](const auto& offsets, Index length, const auto& steps) {
                            for (Index i = 0; i < length; ++i) {
                              *to++ = condition.values[offsets[0] + i * steps[0]] != 0
                                          ? a.values[offsets[1] + i * steps[1]]
                                          : b.values[offsets[2] + i * steps[2]];
                            }
                          });
          return y;
        },
        in[1]);
  };
}

}  // namespace

void add_elementwise(Operators& operators) {
  const auto larger = [](auto a, auto b) { return a > b || a != a ? a : b; };  // NaN stays
  const auto smaller = [](auto a, auto b) { return a < b || a != a ? a : b; };
  const auto add = wrapping([](auto a, auto b) { return a + b; });
  const auto negate = wrapping([](auto a, auto) { return -a; });
  operators.insert({
      {"Abs", unary_of_numbers([negate](auto x) { return x < 0 ? negate(x, x) : x; })},
      {"Neg", unary_of_numbers([negate](auto x) { return negate(x, x); })},
      {"Relu", unary_of_numbers([](auto x) { return x < 0 ? decltype(x)(0) : x; })},
      {"Sign",
       unary_of_numbers([](auto x) { return static_cast<decltype(x)>((x > 0) - (x < 0)); })},
      {"Not", unary_of_numbers([](auto x) { return decltype(x)(x == 0); })},

      {"Ceil", unary([](auto x) { return std::ceil(x); })},
      {"Cos", unary([](auto x) { return std::cos(x); })},
      {"Erf", unary([](auto x) { return std::erf(x); })},
      {"Exp", unary([](auto x) { return std::exp(x); })},
      {"Floor", unary([](auto x) { return std::floor(x); })},
      {"HardSwish", unary([](auto x) {
         return x * std::clamp(x / 6 + decltype(x)(0.5), decltype(x)(0), decltype(x)(1));
       })},
      {"Log", unary([](auto x) { return std::log(x); })},
      {"Mish", unary([](auto x) { return x * std::tanh(softplus(x)); })},
      {"Reciprocal", unary([](auto x) { return 1 / x; })},
      {"Round", unary([](auto x) { return std::nearbyint(x); })},
      {"Sigmoid", unary([](auto x) { return sigmoid(x); })},
      {"Sin", unary([](auto x) { return std::sin(x); })},
      {"Softplus", unary([](auto x) { return softplus(x); })},
      {"Softsign", unary([](auto x) { return x / (1 + std::abs(x)); })},
      {"Sqrt", unary([](auto x) { return std::sqrt(x); })},
      {"Tanh", unary([](auto x) { return std::tanh(x); })},

      {"Celu", unary([](auto x, auto a, auto) { return x < 0 ? a * std::expm1(x / a) : x; }, 1, 0,
                     "alpha")},
      {"Elu",
       unary([](auto x, auto a, auto) { return x < 0 ? a * std::expm1(x) : x; }, 1, 0, "alpha")},
      {"HardSigmoid",
       unary([](auto x, auto a,
                auto b) { return std::clamp(a * x + b, decltype(x)(0), decltype(x)(1)); },
             0.2F, 0.5F)},
      {"LeakyRelu",
       unary([](auto x, auto a, auto) { return x < 0 ? a * x : x; }, 0.01F, 0, "alpha")},
      {"Selu", unary([](auto x, auto a, auto b) { return b * (x < 0 ? a * std::expm1(x) : x); },
                     1.67326319217681884765625F, 1.05070102214813232421875F, "alpha gamma")},
      {"ThresholdedRelu",
       unary([](auto x, auto a, auto) { return x > a ? x : decltype(x)(0); }, 1, 0, "alpha")},

      {"Cast", {1, 1, "to saturate round_mode", cast}},
      {"Clip", {1, 3, "min max", clip}},
      {"Gelu", {1, 1, "approximate", gelu}},

      {"Add", binary(add)},
      {"Sub", binary(wrapping([](auto a, auto b) { return a - b; }))},
      {"Mul", binary(wrapping([](auto a, auto b) { return a * b; }))},
      {"Div", binary(divide)},
      {"PRelu", binary([](auto x, auto slope) { return x < 0 ? slope * x : x; })},
      {"Pow", {2, 2, "", pow}},
      {"Sum", variadic(add)},
      {"Mean", variadic(add, true)},
      {"Max", variadic(larger)},
      {"Min", variadic(smaller)},
      {"And", comparison([](auto a, auto b) { return a != 0 && b != 0; })},
      {"Or", comparison([](auto a, auto b) { return a != 0 || b != 0; })},
      {"Xor", comparison([](auto a, auto b) { return (a != 0) != (b != 0); })},
      {"Equal", comparison([](auto a, auto b) { return a == b; })},
      {"Less", comparison([](auto a, auto b) { return a < b; })},
      {"LessOrEqual", comparison([](auto a, auto b) { return a <= b; })},
      {"Greater", comparison([](auto a, auto b) { return a > b; })},
      {"GreaterOrEqual", comparison([](auto a, auto b) { return a >= b; })},
      {"Where", {3, 3, "", where}},
  });
}

}  // namespace tool::evaluation
