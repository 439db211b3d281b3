// Contraction against numbers that other people's code, or plain loops, computed:
// tests/reference/README.md.
// SPDX-License-Identifier: Apache-2.0
#include "onnx/compare_models.hpp"
#include "onnx/contract_model.hpp"
#include "onnx/evaluate.hpp"

#include <catch2/catch.hpp>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <limits>
#include <map>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace {

using namespace tool;
using onnx::DataType;
namespace fs = std::filesystem;

// ---- what is stored

/// A folder: a model, what others contracted it to, and what both compute.
struct Reference {
  onnx::Model model;
  std::optional<onnx::Model> expected;
  Value input, output;
  std::optional<Value> expected_output;
  Equality exact = Equality::everywhere;  ///< where a single layer equals the model

  GraphOptions graph(Index more = 0) const {
    Dims dims = std::visit([](const auto& array) { return Dims(array.shape); }, input);
    for (std::size_t axis = 2; axis < dims.size(); ++axis) dims[axis] += more;
    GraphOptions options;
    options.inputs["input"] = dims;
    return options;
  }
};

Reference read_reference(const fs::path& folder) {
  const auto value = [&](const std::string& name) {
    return value_of(onnx::read_tensor(folder / "test_data_set_0" / (name + "_0.pb")));
  };
  Reference reference{.model = onnx::read_model(folder / "model.onnx"),
                      .expected = {},
                      .input = value("input"),
                      .output = value("output"),
                      .expected_output = {}};
  if (fs::exists(folder / "expected.onnx")) {
    reference.expected = onnx::read_model(folder / "expected.onnx");
  }
  if (fs::exists(folder / "test_data_set_0" / "expected_output_0.pb")) {
    reference.expected_output = value("expected_output");
  }
  if (const auto exact = reference.model.metadata.find("exact");
      exact != reference.model.metadata.end()) {
    const std::map<std::string, Equality> claims = {{"size", Equality::size},
                                                    {"interior", Equality::interior}};
    reference.exact = claims.at(exact->second);
  }
  return reference;
}

std::vector<fs::path> folders(const fs::path& kind) {
  std::vector<fs::path> result;
  for (const auto& entry : fs::directory_iterator(kind)) {
    if (entry.is_directory()) result.push_back(entry.path());
  }
  std::ranges::sort(result);
  return result;
}

const fs::path reference_folder = CONCERTINA_SMALL_REFERENCE;

std::vector<double> elements(const Value& value) {
  return std::visit(
      [](const auto& array) {
        return std::vector<double>(array.values.begin(), array.values.end());
      },
      value);
}

std::vector<std::int64_t> shape_of(const Value& value) {
  return std::visit([](const auto& array) { return array.shape; }, value);
}

Value run(const onnx::Model& model, const Value& input, bool wide = false) {
  return Evaluator(model, wide)({{"input", input}}).at("output");
}

// ---- models changed

/// Calls change(elements) where these are floating point.
template <class Change>
void edit(onnx::Tensor& tensor, const Change& change) {
  const auto edit_as = [&]<class Scalar>(std::type_identity<Scalar>) {
    auto values = tensor.values<Scalar>();
    change(std::span<Scalar>(values));
    tensor = onnx::Tensor::of<Scalar>(tensor.name, tensor.dims, values);
  };
  if (tensor.type == DataType::float32) edit_as(std::type_identity<float>());
  if (tensor.type == DataType::float64) edit_as(std::type_identity<double>());
  if (tensor.type == DataType::bfloat16) edit_as(std::type_identity<Eigen::bfloat16>());
}

/// Flips a bit of the largest element: the second of the significand, but of double the 20th, far
/// above what rounding is in all.
template <class Scalar>
void flip_bit(std::span<Scalar> values) {
  using Bits =
      std::conditional_t<sizeof(Scalar) == 8, std::uint64_t,
                         std::conditional_t<sizeof(Scalar) == 4, std::uint32_t, std::uint16_t>>;
  constexpr int bit = sizeof(Scalar) == 8 ? 52 - 20 : (sizeof(Scalar) == 4 ? 23 : 7) - 2;
  Scalar& largest = *std::ranges::max_element(
      values, {}, [](Scalar x) { return std::abs(static_cast<double>(x)); });
  largest = std::bit_cast<Scalar>(static_cast<Bits>(std::bit_cast<Bits>(largest) ^ Bits{1} << bit));
}

/// With a bit of the largest of all elements, or of the first `count`, flipped.
Value flipped(Value value, std::size_t count = std::dynamic_extent) {
  std::visit([&](auto& array) { flip_bit(std::span(array.values).subspan(0, count)); }, value);
  return value;
}

/// The model with a bit of this initializer flipped, of its first row: OREPA's filter `prior` is
/// zero in some channels, where what precedes it has no effect.
onnx::Model flipped(onnx::Model model, std::size_t initializer) {
  onnx::Tensor& tensor = model.initializers[initializer];
  const auto row = static_cast<std::size_t>(tensor.numel() / tensor.dims.front());
  edit(tensor, [&](auto values) { flip_bit(values.first(row)); });
  return model;
}

// ---- bounds on rounding

const onnx::Tensor* initializer(const onnx::Model& model, const std::string& name) {
  const auto found = std::ranges::find(model.initializers, name, &onnx::Tensor::name);
  return found == model.initializers.end() ? nullptr : &*found;
}

/// Roundings that a term of a linear node's sum goes through: its product, and every addition; for
/// a batch norm also those of the factor, which is a quotient with a root of a sum.
double roundings(const onnx::Model& model, const onnx::Node& node) {
  if (node.op_type == "BatchNormalization") return 8;
  if (node.op_type == "AveragePool") {
    double count = 1;
    for (const auto extent : node.integers("kernel_shape", {}))
      count *= static_cast<double>(extent);
    return count;
  }
  if (node.op_type != "Conv" && node.op_type != "Gemm") return 1;
  std::string weight = node.inputs.at(1);
  for (const onnx::Node& cast : model.nodes) {
    if (cast.outputs.front() == weight) weight = cast.inputs.front();
  }
  const onnx::Tensor& tensor = *initializer(model, weight);
  REQUIRE((node.op_type == "Conv" || node.integer("transB", 0) == 1));
  return static_cast<double>(tensor.numel()) / static_cast<double>(tensor.dims.front()) + 1;
}

/// On the longest path.
double roundings(const onnx::Model& model) {
  std::map<std::string, double> counts;  // by tensor
  for (const onnx::Node& node : model.nodes) {
    double most = 0;
    for (const std::string& input : node.inputs) most = std::max(most, counts[input]);
    counts[node.outputs.front()] = most + roundings(model, node);
  }
  return counts.at("output");
}

/// The model whose outputs for |x| are the sums of the absolute values of all terms: of products
/// along the paths from an input, a bias or a mean.
onnx::Model absolute(onnx::Model model) {
  std::set<std::string> means, variances;
  for (const onnx::Node& node : model.nodes) {
    if (node.op_type != "BatchNormalization") continue;
    means.insert(node.inputs.at(3));
    variances.insert(node.inputs.at(4));
  }
  for (onnx::Tensor& tensor : model.initializers) {
    const bool subtracted = means.contains(tensor.name), kept = variances.contains(tensor.name);
    edit(tensor, [&]<class Scalar>(std::span<Scalar> values) {
      for (Scalar& x : values) {
        if (!kept && (x < Scalar(0)) != subtracted) x = -x;
      }
    });
  }
  return model;
}

/// How far apart two outputs may be that were rounded differently, per element. Both are sums over
/// the paths of the linear model, a term off by no more than gamma_n of its absolute value (Higham,
/// Section 3.1); their sum is the absolute model's output M, and |a - b| <= 2 gamma_n M. Whoever
/// contracts first rounds in making each weight, where sums are part of those of the model, and
/// then in applying the layer: n counts the roundings of both, and 1 for storing the weight.
std::vector<double> bound(const Reference& reference, const onnx::Model& contraction) {
  double n = roundings(contraction);
  if (reference.expected) n = std::max(n, roundings(*reference.expected));
  n += roundings(reference.model) + 1;
  const bool wide = std::holds_alternative<Array<double>>(reference.output);
  const double unit = std::ldexp(1.0, wide ? -53 : -24), gamma = n * unit / (1 - n * unit);
  Value input = reference.input;
  std::visit(
      [](auto& array) {
        for (auto& x : array.values) x = x < 0 ? -x : x;
      },
      input);
  std::vector<double> result = elements(run(absolute(reference.model), input, true));
  // M too has been rounded, in double.
  for (double& magnitude : result) magnitude *= 2 * gamma * 1.001;
  return result;
}

/// The largest |a - b| / bound of elements that are `border` or more away from the edges of each
/// map; infinite where one is not finite or the shapes differ.
double distance(const Value& a, const Value& b, const std::vector<double>& bound,
                Index border = 0) {
  const auto x = elements(a), y = elements(b);
  const auto shape = shape_of(a);
  if (shape != shape_of(b) || x.size() != bound.size())
    return std::numeric_limits<double>::infinity();
  double worst = 0;
  for (std::size_t i = 0; i < x.size(); ++i) {
    bool inside = true;
    auto rest = static_cast<Index>(i);
    for (std::size_t axis = shape.size(); axis-- > 2; rest /= shape[axis]) {
      const Index at = rest % shape[axis];
      inside = inside && at >= border && at < shape[axis] - border;
    }
    if (!inside) continue;
    const double error = std::abs(x[i] - y[i]);
    if (!(error <= std::numeric_limits<double>::max()))
      return std::numeric_limits<double>::infinity();
    if (error > 0) worst = std::max(worst, error / bound[i]);
  }
  return worst;
}

/// How wide the border is that paddings behind the first layer are seen at, of stride 1.
Index border_of(const onnx::Model& model) {
  Index border = 0;
  for (const onnx::Node& node : model.nodes) {
    REQUIRE(std::ranges::all_of(node.integers("strides", {}), [](auto s) { return s == 1; }));
    if (node.inputs.front() != "input") border += std::ranges::max(node.integers("pads", {0}));
  }
  return border;
}

// ---- the checks

/// What is read is written again byte for byte.
void check_bytes(const onnx::Model& model, const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  const std::string bytes{std::istreambuf_iterator<char>(file), {}};
  const auto written = onnx::serialize_model(model);
  CHECK(std::ranges::equal(std::as_bytes(std::span(bytes)), written));
}

/// All three proofs hold of the one node that differs, if one does.
void check_proved(const onnx::Model& model, const onnx::Model& result, const Reference& reference) {
  const ModelComparison comparison =
      compare_models(model, result, reference.graph(), {.equality = reference.exact});
  CHECK(comparison.proved());
  CHECK(comparison.regions.size() + comparison.identical == 1);
  for (const ComparedRegion& region : comparison.regions) {
    INFO(region.unproved);
    CHECK(region.skipped.empty());
    CHECK(region.proofs.size() == 3);
    for (const concertina::Report& report : region.proofs) {
      INFO(report);
      CHECK(report);
    }
  }
}

void check_wrong(const onnx::Model& model, const onnx::Model& result, const Reference& reference) {
  CHECK_FALSE(
      compare_models(model, result, reference.graph(), {.equality = reference.exact}).proved());
}

void check(const fs::path& folder) {
  CAPTURE(folder);
  const Reference reference = read_reference(folder);
  const onnx::Model& model = reference.model;
  CHECK((model.metadata.contains("source") || folder.parent_path().filename() == "made"));

  check_bytes(model, folder / "model.onnx");
  if (reference.expected) check_bytes(*reference.expected, folder / "expected.onnx");

  const auto contracted = [&](Equality equality, Index more = 0) {
    return contract_model(
        model, {.graph = reference.graph(more), .when = When::always, .equality = equality});
  };
  const ContractedModel result = contracted(reference.exact);
  const onnx::Model& contraction = result.model;
  CHECK(contraction.nodes.size() == 1);
  if (model.nodes.size() > 1) {
    REQUIRE(result.regions.size() == 1);
    CHECK(result.regions.front().where == reference.exact);
  }
  // What it is said not to equal, it does not.
  const auto refused = [&](Equality equality, Index more = 0) {
    return contracted(equality, more).model.nodes.size() == model.nodes.size();
  };
  if (reference.exact != Equality::everywhere) CHECK(refused(Equality::everywhere));
  if (reference.exact == Equality::interior) CHECK(refused(Equality::size));
  if (reference.exact == Equality::size) {
    CHECK(refused(Equality::size, 1));
    CHECK_FALSE(refused(Equality::size, 2));
  }
  CHECK(contract_model(contraction, {.graph = reference.graph(), .when = When::always})
            .regions.empty());

  check_proved(model, contraction, reference);
  if (reference.expected) check_proved(model, *reference.expected, reference);

  const std::vector<double> bounds = bound(reference, contraction);
  const Index border = reference.exact == Equality::interior ? border_of(model) : 0;
  const auto distance_of = [&](const onnx::Model& each, const Value& input, const Value& output) {
    return distance(run(each, input), output, bounds, &each == &model ? 0 : border);
  };
  const auto& input = reference.input;
  CHECK(distance_of(model, input, reference.output) <= 1);
  CHECK(distance_of(contraction, input, reference.output) <= 1);
  if (border > 0) CHECK(distance(run(contraction, input), reference.output, bounds) > 1);
  if (reference.expected) CHECK(distance_of(*reference.expected, input, reference.output) <= 1);
  if (reference.expected_output) {
    for (const onnx::Model* each : {&model, &contraction, &*reference.expected}) {
      CHECK(distance_of(*each, input, *reference.expected_output) <= 1);
    }
  }

  // A wrong number is found, wherever it is.
  // Of the input, the first element: a stride may skip others.
  CHECK(distance_of(model, flipped(input, 1), reference.output) > 1);
  CHECK(distance_of(model, input, flipped(reference.output)) > 1);
  if (reference.expected_output) {
    CHECK(distance_of(*reference.expected, input, flipped(*reference.expected_output)) > 1);
  }
  const auto check_flips = [&](const onnx::Model& of, const auto& check_flip) {
    for (std::size_t i = 0; i < of.initializers.size(); ++i) {
      if (of.initializers[i].type == DataType::int64) continue;
      CAPTURE(of.initializers[i].name);
      const onnx::Model wrong = flipped(of, i);
      check_flip(wrong);
      CHECK(distance(run(wrong, input), reference.output, bounds, border) > 1);
    }
  };
  check_flips(model, [&](const auto& wrong) { check_wrong(wrong, contraction, reference); });
  check_flips(contraction, [&](const auto& wrong) { check_wrong(model, wrong, reference); });
  if (reference.expected) {
    check_flips(*reference.expected,
                [&](const auto& wrong) { check_wrong(model, wrong, reference); });
  }
}

void check_all(const std::string& kind, std::size_t count) {
  const auto all = folders(reference_folder / kind);
  REQUIRE(all.size() == count);
  for (const fs::path& folder : all) check(folder);
}

}  // namespace

TEST_CASE("listings of the paper are one layer", "[reference]") { check_all("listings", 3); }
TEST_CASE("chains are one layer", "[reference]") { check_all("chains", 37); }
TEST_CASE("chains padded in the middle are one layer off the border", "[reference]") {
  check_all("inexact", 3);
}
TEST_CASE("blocks are one layer", "[reference]") { check_all("blocks", 34); }
TEST_CASE("chains computed in plain loops are one layer", "[reference]") { check_all("made", 10); }

TEST_CASE("what is not a number is found by name", "[reference]") {
  const Reference reference = read_reference(reference_folder / "made" / "cl-1-3-1");
  const auto spoiled = [](onnx::Model model, const std::string& name, float value) {
    const auto tensor = std::ranges::find(model.initializers, name, &onnx::Tensor::name);
    edit(*tensor, [&]<class Scalar>(std::span<Scalar> values) {
      values.front() = static_cast<Scalar>(value);
    });
    return model;
  };
  for (const float value : {std::numeric_limits<float>::quiet_NaN(), -HUGE_VALF}) {
    const onnx::Model wrong = spoiled(reference.model, "F2.weight", value);
    CHECK_THROWS_WITH(contract_model(wrong, {.when = When::always}),
                      Catch::Contains("not finite") && Catch::Contains("\"F2.weight\""));
    check_wrong(reference.model, spoiled(*reference.expected, "F.weight", value), reference);
  }
}

TEMPLATE_TEST_CASE("a layer stored in 16 bits is the rounded contraction", "[reference]",
                   Eigen::half, Eigen::bfloat16) {
  for (const char* const name : {"cl-1-3-1", "linear"}) {
    CAPTURE(name);
    Reference reference = read_reference(reference_folder / "made" / name);
    for (onnx::Tensor& tensor : reference.model.initializers) {
      const auto values = tensor.values<float>();
      const std::vector<TestType> narrow(values.begin(), values.end());
      tensor = onnx::Tensor::of<TestType>(tensor.name, tensor.dims, narrow);
    }
    const auto off_by = [&](int ulps) {
      onnx::Model result = contract_model(reference.model, {.when = When::always}).model;
      onnx::Tensor& weight = result.initializers.front();
      auto values = weight.values<TestType>();
      const auto bits = std::bit_cast<std::uint16_t>(values[0]);
      values[0] = std::bit_cast<TestType>(static_cast<std::uint16_t>(bits + ulps));
      weight = onnx::Tensor::of<TestType>(weight.name, weight.dims, values);
      return compare_models(reference.model, result);
    };
    CHECK(off_by(0).proved());
    // A neighbour of the contraction may be stored, and half a unit is rounding.
    CHECK(off_by(2).failed());
    CHECK(off_by(-2).failed());
  }
}

// ---- the large reference data

namespace {

double largest(const std::vector<double>& values) {
  double result = 0;
  for (const double x : values) result = std::max(result, std::abs(x));
  return result;
}

double largest_difference(const Value& a, const Value& b) {
  auto x = elements(a);
  const auto y = elements(b);
  REQUIRE(shape_of(a) == shape_of(b));
  for (std::size_t i = 0; i < x.size(); ++i) x[i] -= y[i];
  REQUIRE(std::ranges::none_of(x, [](double each) { return std::isnan(each); }));
  return largest(x);
}

/// The index of each row's largest logit.
std::vector<std::ptrdiff_t> classes(const Value& logits) {
  const auto values = elements(logits);
  std::vector<std::ptrdiff_t> result;
  for (auto row = values.begin(); row != values.end(); row += shape_of(logits).at(1)) {
    result.push_back(std::max_element(row, row + shape_of(logits).at(1)) - row);
  }
  return result;
}

/// Convolutions and linear layers.
std::ptrdiff_t layers(const onnx::Model& model) {
  return std::ranges::count_if(model.nodes, [](const onnx::Node& node) {
    return node.op_type == "Conv" || node.op_type == "Gemm";
  });
}

}  // namespace

TEST_CASE("whole networks contract as published, and give the stored logits", "[reference]") {
  const char* const large = std::getenv("CONCERTINA_REFERENCE");
  if (!large || !*large) {
    WARN("skipped: CONCERTINA_REFERENCE is empty");
    return;
  }
  const std::vector<std::string> names = {
      "trained/cifar10-k3-cl-fc",    "trained/cifar10-k7-ck-fc",
      "trained/cifar10-k7-cl-fc",    "imagenet/mobilenetv1-expand",
      "imagenet/mobilenetv2-expand", "imagenet/shufflenet-v2-x0-5-expand"};
  for (const std::string& name : names) {
    CAPTURE(name);
    const Reference reference = read_reference(fs::path(large) / name);
    const onnx::Model &model = reference.model, &expected = *reference.expected;
    const onnx::Model contraction = contract_model(model, {.when = When::always}).model;
    CHECK(layers(expected) < layers(model));
    CHECK(layers(contraction) <= layers(expected));
    for (const onnx::Model* each : {&contraction, &expected}) {
      const ModelComparison comparison = compare_models(model, *each);
      CHECK(comparison.proved());
      for (const ComparedRegion& region : comparison.regions) {
        CAPTURE(region.result, region.unproved);
        CHECK(region.skipped.empty());
        CHECK(region.proofs.size() == 3);
      }
    }
    // Rounding goes through nonlinear layers, whose effect on it is not bounded: what is required
    // of float is 1e-5 of the largest logit, of some 1e-6 that are measured, and the same classes.
    const Value exact = run(model, reference.input, true);
    const double scale = largest(elements(exact));
    const auto check_logits = [&](const Value& logits) {
      CHECK(largest_difference(logits, exact) < 1e-5 * scale);
      CHECK(classes(logits) == classes(exact));
    };
    check_logits(reference.output);
    check_logits(*reference.expected_output);
    for (const onnx::Model* each : {&model, &contraction, &expected}) {
      check_logits(run(*each, reference.input));
    }
  }
}
