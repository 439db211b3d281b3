// SPDX-License-Identifier: Apache-2.0
#include "outputs.hpp"

#include "onnx/evaluate.hpp"
#include "text.hpp"

#include <concertina/random.hpp>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>
#include <optional>
#include <random>
#include <set>
#include <string_view>
#include <system_error>
#include <utility>

namespace tool {

namespace {

/// Of the memory that running two models may take.
constexpr double of_inputs = 1.0 / 8;

/// Names of the inputs that a caller gives, in order.
std::vector<std::string> inputs_of(const onnx::Model& model) {
  std::set<std::string, std::less<>> initialized;
  for (const onnx::Tensor& tensor : model.initializers) initialized.insert(tensor.name);
  std::vector<std::string> names;
  for (const onnx::ValueInfo& input : model.inputs) {
    if (!initialized.contains(input.name)) names.push_back(input.name);
  }
  return names;
}

/// The folders test_data_set_N beside a model's file, by N.
std::vector<std::string> test_data_sets(const std::filesystem::path& folder) {
  constexpr std::string_view prefix = "test_data_set_";
  std::vector<std::string> names;
  std::error_code ignored;
  for (const auto& entry : std::filesystem::directory_iterator(
           folder.empty() ? std::filesystem::path(".") : folder, ignored)) {
    const std::string name = entry.path().filename().string();
    if (entry.is_directory(ignored) && name.starts_with(prefix)) names.push_back(name);
  }
  std::ranges::sort(names, {}, [](const std::string& name) {
    return std::pair(name.size(), name);  // 2 before 10
  });
  return names;
}

/// Throws IoError, FormatError where an input is missing, or no tensor.
Values test_inputs(const onnx::Model& model, const std::filesystem::path& folder) {
  Values values;
  int i = 0;
  for (const std::string& input : inputs_of(model)) {
    const auto file = folder / ("input_" + std::to_string(i++) + ".pb");
    values.insert_or_assign(input, value_of(onnx::read_tensor(file)));
  }
  return values;
}

template <class Scalar>
Array<Scalar> random_array(const Dims& dims, Budget& budget) {
  Array<Scalar> array{{dims.begin(), dims.end()}, {}};
  Index count = 1;
  for (const Index extent : dims)
    count = concertina::detail::checked_multiply(count, extent, "input");
  const auto elements = static_cast<double>(count);
  budget.take("a random input of " + to_text(dims), sizeof(double) * elements, 4 * elements);
  budget.kept += sizeof(double) * elements;
  array.values.reserve(static_cast<std::size_t>(count));
  std::mt19937_64 generator(1);
  for (Index i = 0; i < count; ++i) {
    array.values.push_back(
        static_cast<Scalar>(static_cast<float>(concertina::random_uniform(generator, 1))));
  }
  return array;
}

Values random_inputs(const Graph& graph) {
  Values values;
  Budget budget = graph.budget().part(of_inputs);
  for (const std::string& name : inputs_of(graph.model())) {
    const GraphTensor& tensor = graph[graph.find(name)];
    if (!tensor.sizes)
      throw concertina::FormatError("input " + in_quotes(name) + " states no shape");
    switch (tensor.type) {
      case onnx::DataType::float64:
        values.emplace(name, random_array<double>(*tensor.sizes, budget));
        break;
      case onnx::DataType::float32:
      case onnx::DataType::float16:
      case onnx::DataType::bfloat16:
        values.emplace(name, random_array<float>(*tensor.sizes, budget));
        break;
      case onnx::DataType::uint8: {  // an image
        const Array<double> x = random_array<double>(*tensor.sizes, budget);
        Array<Index> bytes{x.shape, {}};
        for (const double value : x.values)
          bytes.values.push_back(std::llround(127.5 + 127.5 * value));
        values.emplace(name, std::move(bytes));
        break;
      }
      default:
        throw concertina::FormatError("input " + in_quotes(name) + " is of " +
                                      onnx::to_string(tensor.type));
    }
  }
  return values;
}

std::string position(const std::vector<std::int64_t>& shape, std::size_t flat) {
  std::string text;
  for (std::size_t axis = shape.size(); axis-- > 0;) {
    const auto extent = static_cast<std::size_t>(shape[axis]);
    text = "[" + std::to_string(flat % extent) + "]" + text;
    flat /= extent;
  }
  return text;
}

/// Largest difference and element of a part of two arrays.
struct PartDifference {
  double largest = 0, magnitude = -1;  // no element is finite
  std::size_t at = 0;

  double bound(double tolerance) const { return 1e-7 + tolerance * std::max(magnitude, 0.0); }
};

/// By a tolerance, relative to the largest element, each channel (axis 1 of maps) is judged by
/// itself: what is shown is the one that is furthest off. Without one there is no bound.
/// Throws ShapeError for other shapes, and where there is nothing to compare.
void compare(const Value& a, const Value& b, std::optional<double> tolerance,
             OutputDifference& difference) {
  const auto shape_of = [](const auto& array) { return Dims(array.shape); };
  const Dims shape = std::visit(shape_of, a), other = std::visit(shape_of, b);
  const std::string output = "output " + in_quotes(difference.output) + " is ";
  if (shape != other) {
    throw concertina::ShapeError(output + to_text(shape) + " and " + to_text(other));
  }
  if (std::ranges::count(shape, 0) > 0) {
    throw concertina::ShapeError(output + to_text(shape) + ", so nothing was compared");
  }
  std::size_t channels = 1, positions = 1;
  if (tolerance && shape.size() > 2) {
    channels = static_cast<std::size_t>(shape[1]);
    for (std::size_t axis = 2; axis < shape.size(); ++axis) {
      positions *= static_cast<std::size_t>(shape[axis]);
    }
  }
  std::vector<PartDifference> parts(channels);
  const auto each = [&](const auto& first, const auto& second) {
    for (std::size_t i = 0; i < first.values.size(); ++i) {
      const auto x = static_cast<long double>(first.values[i]),  // as wide as any integer
          y = static_cast<long double>(second.values[i]);
      PartDifference& part = parts[i / positions % channels];
      if (std::isnan(x) || std::isnan(y)) ++difference.nans;
      if (std::isfinite(x)) {
        part.magnitude = std::max(part.magnitude, static_cast<double>(std::abs(x)));
      }
      if (x == y || (std::isnan(x) && std::isnan(y))) continue;
      const auto off = static_cast<double>(std::abs(x - y));
      // The first NaN stays.
      if (std::isnan(off) ? !std::isnan(part.largest) : off > part.largest) {
        part.largest = off;
        part.at = i;
      }
    }
  };
  std::visit(each, a, b);
  const double of = tolerance.value_or(1);
  const auto worst = std::ranges::max_element(parts, [&](const auto& p, const auto& q) {
    return std::isnan(q.largest) ? !std::isnan(p.largest)
                                 : p.largest / p.bound(of) < q.largest / q.bound(of);
  });
  difference.largest = worst->largest;
  difference.magnitude =
      worst->magnitude < 0 ? std::numeric_limits<double>::quiet_NaN() : worst->magnitude;
  if (tolerance) difference.bound = worst->bound(of);
  if (difference.largest != 0) difference.where = position(shape, worst->at);
}

bool has_integers(const Value& value) { return std::holds_alternative<Array<Index>>(value); }

/// What both models give, by name, against the files of a folder: integers, as labels, to the last.
void compare_with_stored(const onnx::Model& model, const std::string& set, const Values& before,
                         const Values& after, const std::filesystem::path& folder,
                         OutputComparison& comparison) {
  std::set<std::string> known;
  const std::size_t count = inputs_of(model).size();
  for (std::size_t i = 0; i < count; ++i) {
    known.insert("input_" + std::to_string(i) + ".pb");
  }
  for (std::size_t i = 0; i < model.outputs.size(); ++i) {
    const std::string file = "output_" + std::to_string(i) + ".pb", &name = model.outputs[i].name;
    known.insert(file);
    if (!std::filesystem::exists(folder / file)) {
      comparison.notes.push_back(set + " has no " + file);
      continue;
    }
    try {
      const onnx::Tensor tensor = onnx::read_tensor(folder / file);
      const bool narrow =
          tensor.type == onnx::DataType::float16 || tensor.type == onnx::DataType::bfloat16;
      const Value stored = value_of(tensor);
      const bool integers = has_integers(stored);
      if (integers != has_integers(before.at(name))) {
        throw concertina::FormatError("it is of " + onnx::to_string(tensor.type) + ", output " +
                                      in_quotes(name) + (integers ? " of floats" : " of integers"));
      }
      for (const auto& [which, outputs] :
           {std::pair("model", &before), std::pair("result", &after)}) {
        OutputDifference difference{.input = set, .output = name, .model = which, .stored = file};
        compare(stored, outputs->at(name), integers ? 0 : narrow ? 0.02 : 0.001, difference);
        comparison.differences.push_back(std::move(difference));
      }
    } catch (const concertina::Error& error) {
      comparison.notes.push_back(set + "/" + file + " is not compared: " + error.what());
    }
  }
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    const std::string file = entry.path().filename().string();
    if (!known.contains(file)) {
      comparison.notes.push_back(set + "/" + file + " is of no input or output, and not read");
    }
  }
}

/// The outputs, and the shortest time of runs that take a fiftieth of a second together.
Values timed(const Evaluator& evaluator, const Values& inputs, double& seconds) {
  using Clock = std::chrono::steady_clock;
  double best = std::numeric_limits<double>::infinity();
  for (double total = 0; true;) {
    const auto begin = Clock::now();
    Values outputs = evaluator(inputs);
    const double taken = std::chrono::duration<double>(Clock::now() - begin).count();
    best = std::min(best, taken);
    total += taken;
    if (total < 0.02) continue;
    seconds += best;
    return outputs;
  }
}

}  // namespace

bool OutputDifference::failed() const {
  const bool off = bound < infinite && !(largest <= bound);
  return nans > 0 || off;
}

bool OutputComparison::failed() const {
  return std::ranges::any_of(differences, &OutputDifference::failed);
}

bool has_test_data(const std::filesystem::path& path) {
  return !test_data_sets(path.parent_path()).empty();
}

OutputComparison compare_outputs(const onnx::Model& model, const onnx::Model& result,
                                 const GraphOptions& options, const std::filesystem::path& path) {
  OutputComparison comparison;
  try {
    // Both are held at once.
    const Budget each = options.budget.part((1 - of_inputs) / 2);
    const Evaluator before(model, false, each), after(result, false, each);
    const auto run = [&](const std::string& name, const Values& inputs, bool stored) {
      const Values expected = timed(before, inputs, comparison.before),
                   found = timed(after, inputs, comparison.after);
      for (const auto& [output, value] : expected) {
        if (!found.contains(output)) {
          throw concertina::FormatError("the other model has no output " + in_quotes(output));
        }
        OutputDifference difference{.input = name, .output = output};
        compare(value, found.at(output), std::nullopt, difference);
        comparison.differences.push_back(std::move(difference));
      }
      if (stored) {
        compare_with_stored(model, name, expected, found, path.parent_path() / name, comparison);
      }
    };
    const auto sets = test_data_sets(path.parent_path());
    if (sets.empty()) run("random", random_inputs(Graph(model, options)), false);
    for (const std::string& name : sets) {
      try {
        run(name, test_inputs(model, path.parent_path() / name), true);
      } catch (const concertina::Error& error) {
        comparison.notes.push_back(name + " is not compared: " + error.what());
      }
    }
    if (comparison.differences.empty()) comparison.skipped = "no test data could be read";
    std::ranges::sort(comparison.notes);
  } catch (const concertina::Error& error) {
    comparison.differences.clear();
    comparison.skipped = error.what();
  }
  return comparison;
}

}  // namespace tool
