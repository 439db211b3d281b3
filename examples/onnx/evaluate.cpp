// From a model to steps, and the values that go from one to the next.
// SPDX-License-Identifier: Apache-2.0
#include "evaluate.hpp"

#include "data_types.hpp"
#include "operators.hpp"

#include <optional>
#include <set>
#include <string_view>
#include <type_traits>

namespace tool {

using concertina::FormatError;
using concertina::onnx::DataType, concertina::onnx::Model, concertina::onnx::Node,
    concertina::onnx::Tensor;
using evaluation::Arguments, evaluation::Definition, evaluation::Operator, evaluation::Operators,
    evaluation::Shape;
using evaluation::shape_of, evaluation::Step;

// ---- tensors

namespace {

enum class Kind { float_, double_, integer };

/// How elements of a type are kept; nothing for those that are not.
std::optional<Kind> kind_of(DataType type, bool wide) {
  switch (type) {
    case DataType::float16:
    case DataType::bfloat16:
    case DataType::float32: return wide ? Kind::double_ : Kind::float_;
    case DataType::float64: return Kind::double_;
    case DataType::uint8:
    case DataType::int8:
    case DataType::uint16:
    case DataType::int16:
    case DataType::int32:
    case DataType::int64:
    case DataType::boolean:
    case DataType::uint32: return Kind::integer;
    default: return std::nullopt;
  }
}

std::string quoted(const std::string& name) { return '"' + name + '"'; }

}  // namespace

Value value_of(const Tensor& tensor, bool wide) {
  const auto kind = kind_of(tensor.type, wide);
  if (!kind) {
    throw FormatError("tensor " + quoted(tensor.name) + " is of " + to_string(tensor.type) +
                      ", which is not supported");
  }
  switch (*kind) {
    case Kind::float_: return Array<float>{tensor.dims, tensor.values<float>()};
    case Kind::double_: return Array<double>{tensor.dims, tensor.values<double>()};
    default: return Array<std::int64_t>{tensor.dims, tensor.values<std::int64_t>()};
  }
}

Tensor tensor_of(std::string name, const Value& value) {
  return std::visit(
      [&]<class Scalar>(const Array<Scalar>& array) {
        return Tensor::of<Scalar>(std::move(name), array.shape, array.values);
      },
      value);
}

// ---- programs

namespace {

const Operators& operators() {
  static const Operators all = [] {
    Operators result;
    evaluation::add_elementwise(result);
    evaluation::add_products(result);
    evaluation::add_reductions(result);
    evaluation::add_selections(result);
    evaluation::add_shapes(result);
    evaluation::add_windows(result);
    return result;
  }();
  return all;
}

std::string described(const Node& node) {
  return "node " +
         quoted(node.name.empty() && !node.outputs.empty() ? node.outputs[0] : node.name) + " (" +
         node.op_type + ")";
}

constexpr std::size_t none = static_cast<std::size_t>(-1);

/// A step and where its values are.
struct Instruction {
  Step step;
  std::string where;
  double each = 1;                         // multiply-adds for an element
  double names = 0;                        // inputs and outputs of its node
  std::vector<std::size_t> inputs = {};    // none: left out
  std::vector<bool> movable = {};          // nothing else reads this input, now or afterwards
  std::vector<std::size_t> released = {};  // nothing reads these afterwards
  std::size_t output = none;
  DataType type = DataType::undefined;  // of the output's elements, where it is known
};

/// Integers as their type holds them, which wrap around.
void wrap(Value& value, DataType type) {
  auto* const array = std::get_if<Array<std::int64_t>>(&value);
  if (array == nullptr) return;
  with_integer(type, [&]<class Integer>(Integer) {
    for (std::int64_t& element : array->values) element = static_cast<Integer>(element);
  });
}

/// The type of what a node makes: that of its first input, unless its operator says another.
DataType type_of(const Node& node, const std::vector<DataType>& inputs) {
  static const std::set<std::string, std::less<>> others = {
      "And", "ArgMax", "ArgMin", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual",
      "Not", "Or",     "Shape",  "Size",  "Xor"};  // of booleans or int64
  if (others.contains(node.op_type)) return DataType::int64;
  if (node.op_type == "Cast") return static_cast<DataType>(node.integer("to", 0));
  if (node.op_type == "Constant" || node.op_type == "ConstantOfShape") {
    const auto* const value = node.attribute("value");
    return value && value->tensor ? value->tensor->type : DataType::undefined;
  }
  const std::size_t first = node.op_type == "Where" ? 1 : 0;
  return first < inputs.size() ? inputs[first] : DataType::undefined;
}

double elements_of(const Value& value) {
  return std::visit([](const auto& array) { return static_cast<double>(array.values.size()); },
                    value);
}

double bytes_of(const Value& value) {
  return std::visit(
      [](const auto& array) {
        return static_cast<double>(sizeof(array.values[0]) * array.values.size());
      },
      value);
}

/// Multiply-adds of a nanosecond that an operator takes for an element of what it reads and makes,
/// measured on an AMD EPYC on arrays of 9 million floats; four at least, as in rows of one or two.
double each_element(const std::string& op) {
  static const std::map<std::string, double, std::less<>> slow = {
      {"Mish", 45},     {"Gelu", 22},      {"Tanh", 22},       {"Pow", 20},    {"Softplus", 20},
      {"Cos", 15},      {"Sin", 15},       {"Celu", 12},       {"Elu", 12},    {"Selu", 12},
      {"Concat", 12},   {"Transpose", 12}, {"LogSoftmax", 10}, {"Resize", 10}, {"Softmax", 10},
      {"Upsample", 10}, {"Erf", 8},        {"Exp", 8},         {"Log", 8},     {"Sigmoid", 8}};
  const auto found = slow.find(op);
  return found == slow.end() ? 4 : found->second;
}

/// What an operator takes whatever it reads, and for each input and output that its node has.
constexpr double each_step = 1000, each_name = 20;

/// Where the values of a run are: constants and the caller's inputs elsewhere, the rest owned.
struct Frame {
  std::vector<const Value*> at;
  std::vector<Value> owned;
  std::vector<double> bytes;  // of those that are owned
  double kept = 0;            // their sum

  explicit Frame(std::size_t slots) : at(slots, nullptr), owned(slots), bytes(slots) {}

  void put(std::size_t slot, Value value) {
    owned[slot] = std::move(value);
    at[slot] = &owned[slot];
    account(slot, bytes_of(owned[slot]));
  }
  void release(std::size_t slot) {
    owned[slot] = {};
    at[slot] = nullptr;
    account(slot, 0);
  }
  void account(std::size_t slot, double now) {
    kept += now - bytes[slot];
    evaluation::RunBudget::current.kept += now - bytes[slot];
    bytes[slot] = now;
  }

  void run(const Instruction& instruction) {
    std::vector<Arguments::Input> inputs;
    for (std::size_t i = 0; i < instruction.inputs.size(); ++i) {
      const std::size_t slot = instruction.inputs[i];
      const bool own = slot != none && instruction.movable[i] && at[slot] == &owned[slot];
      inputs.push_back({slot == none ? nullptr : at[slot], own ? &owned[slot] : nullptr});
    }
    const auto given = [&] {
      std::string text;
      for (const auto& input : inputs) {
        text += (text.empty() ? "" : ", ") +
                (input.value ? evaluation::to_text(shape_of(*input.value)) : "none");
      }
      return instruction.where + (text.empty() ? ": " : " of " + text + ": ");
    };
    Arguments arguments(inputs);
    try {
      evaluation::RunBudget::each = instruction.each;
      double read = 0;
      for (const auto& input : inputs) read += input.value ? elements_of(*input.value) : 0;
      evaluation::spend(each_step + each_name * instruction.names + instruction.each * read);
      Value value = instruction.step(arguments);
      wrap(value, instruction.type);
      put(instruction.output, std::move(value));
    } catch (const concertina::ShapeError& error) {
      throw concertina::ShapeError(given() + error.what());
    } catch (const BudgetError& error) {
      throw BudgetError(given() + error.what());
    } catch (const concertina::SizeError& error) {
      throw concertina::SizeError(given() + error.what());
    } catch (const concertina::NumericalError& error) {
      throw concertina::NumericalError(given() + error.what());
    } catch (const FormatError& error) {
      throw FormatError(given() + error.what());
    }
    for (const std::size_t slot : instruction.released) release(slot);
    evaluation::RunBudget::current.take("what is kept after " + instruction.where, 1, 0);
  }
};

/// Throws FormatError where a node is not what its operator says.
void check(const Node& node, const Operator& definition) {
  const auto complain = [&](const std::string& what) {
    throw FormatError(described(node) + " " + what);
  };
  if (node.inputs.size() < definition.least || node.inputs.size() > definition.most) {
    complain("has " + std::to_string(node.inputs.size()) + " inputs");
  }
  // Of any number of inputs none is optional.
  const std::size_t needed =
      definition.most == evaluation::any ? node.inputs.size() : definition.least;
  for (std::size_t i = 0; i < needed; ++i) {
    if (node.inputs[i].empty()) complain("lacks its input " + std::to_string(i));
  }
  for (std::size_t i = definition.outputs; i < node.outputs.size(); ++i) {
    if (!node.outputs[i].empty()) complain("has outputs that are not supported");
  }
  for (const auto& attribute : node.attributes) {
    const std::string names = " " + std::string(definition.attributes) + " ";
    if (names.find(" " + attribute.name + " ") == std::string::npos) {
      complain("has an attribute " + quoted(attribute.name) + ", which is not supported");
    }
  }
}

}  // namespace

struct Evaluator::Program {
  struct Input {
    std::string name;
    std::size_t slot;
    std::optional<Kind> kind;  // nothing: as it is given
  };
  bool wide;
  Budget budget;
  std::vector<Input> inputs = {};
  std::vector<std::pair<std::string, std::size_t>> outputs = {};
  std::vector<Instruction> instructions = {};
  std::vector<DataType> types = {};  // of slots, until all instructions are added
  Frame constants;

  Program(const Model& model, bool wide_floats, const Budget& of_run);
  void add(const Definition& definition, const std::vector<std::size_t>& from, std::size_t to);
  void find_last_readers();
  std::optional<Value> widened(const Input& input, const Value& value) const;
};

Evaluator::Program::Program(const Model& model, bool wide_floats, const Budget& of_run)
    : wide(wide_floats), budget(of_run), constants(0) {
  const evaluation::RunBudget scope(budget);
  const auto complain = [&](const std::string& what) {
    throw FormatError(model.origin + ": " + what);
  };
  if (model.opset() < 7) {
    complain("operators of version " + std::to_string(model.opset()) +
             "; supported are 7 and later");
  }
  std::set<std::string> unknown;
  for (const Node& node : model.nodes) {
    const bool standard = node.domain.empty() || node.domain == "ai.onnx";
    if (standard && operators().contains(node.op_type)) {
      check(node, operators().at(node.op_type));
    } else {
      unknown.insert(described(node) + (standard ? "" : " of " + node.domain));
    }
  }
  if (!unknown.empty()) {
    std::string text;
    for (const std::string& node : unknown) text += (text.empty() ? "" : ", ") + node;
    complain("operators that are not supported: " + text);
  }

  std::map<std::string, std::size_t, std::less<>> slots;
  const auto define = [&](const std::string& name) {
    const std::size_t slot = slots.size();
    if (!slots.emplace(name, slot).second) complain("tensor " + quoted(name) + " is there twice");
    return slot;
  };
  std::map<std::size_t, const Tensor*> initializers;
  for (const Tensor& tensor : model.initializers) {
    initializers[define(tensor.name)] = &tensor;
    types.push_back(tensor.type);
  }
  for (const auto& [name, type, shape, encoded] : model.inputs) {
    if (slots.contains(name)) continue;  // an old model's constant
    const auto kind = kind_of(type, wide);
    if (!kind && type != DataType::undefined) {
      complain("input " + quoted(name) + " is of " + to_string(type));
    }
    inputs.push_back({name, define(name), kind});
    types.push_back(type);
  }
  std::set<std::string, std::less<>> read;
  for (const auto& output : model.outputs) read.insert(output.name);
  std::size_t size = slots.size();
  for (const Node& node : model.nodes) {
    size += node.outputs.size();
    read.insert(node.inputs.begin(), node.inputs.end());
  }
  constants = Frame(size);
  types.resize(size, DataType::undefined);
  // The slot of what has been computed; initializers become values when they are read.
  const auto find = [&](const std::string& reader, const std::string& name) {
    const auto found = slots.find(name);
    if (found == slots.end()) complain(reader + " reads " + quoted(name) + ", which is not there");
    const auto tensor = initializers.find(found->second);
    if (tensor != initializers.end() && constants.at[found->second] == nullptr) {
      evaluation::count(tensor->second->dims);
      constants.put(found->second, value_of(*tensor->second, wide));
    }
    return found->second;
  };
  for (const Node& node : model.nodes) {
    std::vector<std::size_t> from;
    for (const std::string& name : node.inputs) {
      from.push_back(name.empty() ? none : find(described(node), name));
    }
    for (std::size_t i = 0; i < node.outputs.size(); ++i) {
      if (node.outputs[i].empty()) continue;
      const std::size_t to = define(node.outputs[i]);
      if (read.contains(node.outputs[i])) add({node, model.opset(), wide, i}, from, to);
    }
  }
  for (const auto& output : model.outputs) {
    outputs.emplace_back(output.name, find("the graph", output.name));
  }
  find_last_readers();
  types = {};
  budget.kept = evaluation::RunBudget::current.kept;
  budget.effort = evaluation::RunBudget::current.effort;
  budget.taken = evaluation::RunBudget::current.taken;
}

/// Adds an instruction; what reads constants only is run at once, and is a constant.
void Evaluator::Program::add(const Definition& definition, const std::vector<std::size_t>& from,
                             std::size_t to) {
  const Node& node = definition.node;
  Instruction instruction{.step = {},
                          .where = described(node),
                          .each = each_element(node.op_type),
                          .names = static_cast<double>(node.inputs.size() + node.outputs.size()),
                          .inputs = from,
                          .movable = std::vector<bool>(from.size()),
                          .output = to};
  std::vector<DataType> of_inputs;
  for (const std::size_t slot : from)
    of_inputs.push_back(slot == none ? DataType::undefined : types[slot]);
  instruction.type = types[to] = type_of(node, of_inputs);
  evaluation::spend(each_step + each_name * instruction.names);
  try {
    instruction.step = operators().at(definition.node.op_type).compile(definition);
  } catch (const FormatError& error) {
    throw FormatError(instruction.where + ": " + error.what());
  }
  if (std::ranges::all_of(from,
                          [&](std::size_t slot) { return slot == none || constants.at[slot]; })) {
    constants.run(instruction);
  } else {
    instructions.push_back(std::move(instruction));
  }
}

void Evaluator::Program::find_last_readers() {
  std::vector<bool> needed(constants.at.size());
  for (const auto& output : outputs) needed[output.second] = true;
  for (auto instruction = instructions.rbegin(); instruction != instructions.rend();
       ++instruction) {
    const auto& from = instruction->inputs;
    std::map<std::size_t, std::size_t> times;
    for (const std::size_t slot : from) ++times[slot];
    for (std::size_t i = 0; i < from.size(); ++i) {
      if (from[i] == none) continue;
      instruction->movable[i] = !needed[from[i]] && times[from[i]] == 1;
      if (!needed[from[i]]) instruction->released.push_back(from[i]);
    }
    for (const std::size_t slot : from) {
      if (slot != none) needed[slot] = true;
    }
  }
  for (std::size_t slot = 0; slot < needed.size(); ++slot) {
    if (!needed[slot]) constants.release(slot);
  }
}

/// As the graph declares it, if that is wider; nothing if it is so.
std::optional<Value> Evaluator::Program::widened(const Input& input, const Value& value) const {
  const bool floats = std::holds_alternative<Array<float>>(value);
  if (floats && (input.kind == Kind::double_ || (!input.kind && wide))) {
    const auto& [shape, values] = std::get<Array<float>>(value);
    return Array<double>{shape, {values.begin(), values.end()}};
  }
  if (input.kind && value.index() != static_cast<std::size_t>(*input.kind)) {
    throw FormatError("input " + quoted(input.name) +
                      " is not given as the numbers that the graph declares");
  }
  return std::nullopt;
}

Values Evaluator::operator()(const Values& inputs) const {
  const evaluation::RunBudget scope(program_->budget);
  Frame frame(0);
  frame.at = program_->constants.at;
  frame.owned.resize(frame.at.size());
  frame.bytes.resize(frame.at.size());
  for (const auto& input : program_->inputs) {
    const auto given = inputs.find(input.name);
    if (given == inputs.end()) throw FormatError("input " + quoted(input.name) + " is not given");
    std::visit(
        [&](const auto& array) {
          if (evaluation::count(array.shape) != std::ssize(array.values)) {
            throw concertina::ShapeError("input " + quoted(input.name) + " of " +
                                         evaluation::to_text(array.shape) + " has " +
                                         std::to_string(array.values.size()) + " values");
          }
        },
        given->second);
    frame.at[input.slot] = &given->second;
    evaluation::RunBudget::each = 1;
    if (auto wider = program_->widened(input, given->second)) {
      frame.put(input.slot, std::move(*wider));
    }
  }
  std::set<std::string_view> known;
  for (const auto& input : program_->inputs) known.insert(input.name);
  for (const auto& [name, value] : inputs) {
    if (!known.contains(name)) {
      throw FormatError("the graph has no input " + quoted(name));
    }
  }
  for (const Instruction& instruction : program_->instructions) frame.run(instruction);
  Values results;
  for (const auto& [name, slot] : program_->outputs) {
    const bool own = frame.at[slot] == &frame.owned[slot];
    if (!own) {
      evaluation::RunBudget::current.take("output " + quoted(name), bytes_of(*frame.at[slot]), 0);
      evaluation::RunBudget::current.kept += bytes_of(*frame.at[slot]);
    }
    results.emplace(name, own ? std::move(frame.owned[slot]) : *frame.at[slot]);
  }
  return results;
}

Evaluator::Evaluator(const Model& model, bool wide, Budget budget)
    : program_(std::make_unique<Program>(model, wide, budget)) {}
Evaluator::~Evaluator() = default;
Evaluator::Evaluator(Evaluator&&) noexcept = default;

}  // namespace tool
