// SPDX-License-Identifier: Apache-2.0
#include "onnx/value_numbers.hpp"

#include <concertina/detail/io/protobuf.hpp>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <span>
#include <string_view>
#include <variant>

namespace tool {

namespace {

using Kind = LinearNode::Kind;

/// What a file says of a tensor but its name: of strings and types that are not known the elements,
/// which are kept in no other way.
std::vector<std::byte> encoded(const onnx::Tensor& tensor) {
  constexpr std::uint32_t name = 8, doc_string = 12;
  const onnx::detail::Source source{tensor.name, tensor.encoded};
  onnx::detail::Message fields(source, tensor.encoded, "TensorProto");
  std::vector<std::byte> bytes;
  while (fields.next()) {
    if (fields.number() == name || fields.number() == doc_string) continue;
    bytes.insert(bytes.end(), fields.encoded().begin(), fields.encoded().end());
  }
  return bytes;
}

std::string_view text_of(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

/// Attributes that say nothing: what an operator does without them, from one version on.
struct Default {
  std::string_view operators, attribute;
  std::variant<std::int64_t, float, std::string_view> value;
  Index since = 1, until = std::numeric_limits<Index>::max();
};

constexpr Default defaults[] = {
    {"ArgMax ArgMin Gather GatherElements ScatterElements Split", "axis", 0},
    {"ArgMax ArgMin", "select_last_index", 0},
    {"ArgMax ArgMin ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin "
     "ReduceProd ReduceSum ReduceSumSquare",
     "keepdims", 1},
    {"AveragePool Conv ConvTranspose LpPool MaxPool", "auto_pad", "NOTSET"},
    {"AveragePool LpPool MaxPool", "ceil_mode", 0},
    {"AveragePool", "count_include_pad", 0},
    {"BatchNormalization GroupNormalization InstanceNormalization LayerNormalization", "epsilon",
     1e-5F},
    {"BatchNormalization", "momentum", 0.9F},
    {"BatchNormalization", "training_mode", 0},
    {"Celu Elu ThresholdedRelu", "alpha", 1.0F},
    {"Conv ConvTranspose", "group", 1},
    {"CumSum", "exclusive", 0},
    {"CumSum", "reverse", 0},
    {"DepthToSpace", "mode", "DCR"},
    {"Flatten", "axis", 1},
    {"GatherND", "batch_dims", 0},
    {"Gelu", "approximate", "none"},
    {"Gemm", "alpha", 1.0F},
    {"Gemm", "beta", 1.0F},
    {"Gemm", "transA", 0},
    {"Gemm", "transB", 0},
    {"HardSigmoid", "alpha", 0.2F},
    {"HardSigmoid", "beta", 0.5F},
    {"IsInf", "detect_negative", 1},
    {"IsInf", "detect_positive", 1},
    {"LayerNormalization LpNormalization OneHot TopK", "axis", -1},
    {"LayerNormalization", "stash_type", 1},
    {"LeakyRelu", "alpha", 0.01F},
    {"LRN", "alpha", 1e-4F},
    {"LRN", "beta", 0.75F},
    {"LRN", "bias", 1.0F},
    {"LpNormalization LpPool", "p", 2},
    {"MaxPool", "storage_order", 0},
    {"Mod", "fmod", 0},
    {"Pad", "mode", "constant"},
    {"Reshape", "allowzero", 0},
    {"Resize", "coordinate_transformation_mode", "half_pixel"},
    {"Resize", "cubic_coeff_a", -0.75F},
    {"Resize", "exclude_outside", 0},
    {"Resize Upsample", "mode", "nearest"},
    {"Resize", "nearest_mode", "round_prefer_floor"},
    {"Shape", "start", 0},
    {"Softmax LogSoftmax Hardmax", "axis", 1, 1, 12},
    {"Softmax LogSoftmax Hardmax", "axis", -1, 13},
    {"TopK", "largest", 1},
    {"TopK", "sorted", 1},
    {"Trilu", "upper", 1},
};

bool is_standard(const onnx::Node& node) { return node.domain.empty() || node.domain == "ai.onnx"; }

/// Whether a list has the word, between spaces.
bool contains_word(std::string_view list, std::string_view word) {
  for (std::size_t at = list.find(word); at != list.npos; at = list.find(word, at + 1)) {
    const std::size_t end = at + word.size();
    if ((at == 0 || list[at - 1] == ' ') && (end == list.size() || list[end] == ' ')) return true;
  }
  return false;
}

/// Whether it is one of ONNX's own operators, of these.
bool is_one_of(std::string_view operators, const onnx::Node& node) {
  return is_standard(node) && contains_word(operators, node.op_type);
}

bool is_default(const onnx::Node& node, const onnx::Attribute& attribute, Index opset) {
  const auto all = [&](std::int64_t value) {
    return attribute.type == onnx::AttributeType::integers &&
           std::ranges::all_of(attribute.ints, [&](std::int64_t each) { return each == value; });
  };
  if (is_one_of("AveragePool Conv LpPool MaxPool", node)) {
    if (attribute.name == "dilations" || attribute.name == "strides") return all(1);
    if (attribute.name == "pads") return all(0);
  }
  return std::ranges::any_of(defaults, [&](const Default& each) {
    if (attribute.name != each.attribute || opset < each.since || opset > each.until ||
        !is_one_of(each.operators, node)) {
      return false;
    }
    if (const auto* i = std::get_if<std::int64_t>(&each.value)) {
      return attribute.type == onnx::AttributeType::integer && attribute.i == *i;
    }
    if (const auto* f = std::get_if<float>(&each.value)) {
      return attribute.type == onnx::AttributeType::float_ && attribute.f == *f;
    }
    return attribute.type == onnx::AttributeType::string &&
           attribute.s == std::get<std::string_view>(each.value);
  });
}

/// Whether two runs of a node on the same inputs may differ, so that two nodes are two results; or
/// nobody knows.
bool is_random(const onnx::Node& node) {
  return !is_standard(node) || !std::ranges::all_of(node.attributes, is_plain) ||
         contains_word(
             "Bernoulli Dropout Multinomial RandomNormal RandomNormalLike RandomUniform "
             "RandomUniformLike",
             node.op_type);
}

/// What is appended can be told apart, whatever it is.
class Key {
 public:
  void append(std::int64_t number) {
    text_.append(reinterpret_cast<const char*>(&number), sizeof number);
  }
  void append(float number) {
    text_.append(reinterpret_cast<const char*>(&number), sizeof number);  // of -0 too
  }
  void append(std::string_view text) {
    append(std::ssize(text));
    text_.append(text);
  }
  template <class Element>
  void append(const std::vector<Element>& list) {
    append(std::ssize(list));
    for (const Element& each : list) append(each);
  }

  std::string take() && { return std::move(text_); }

 private:
  std::string text_;
};

/// Whether a map passes on what it reads, to the bit.
bool is_identity(const Graph& graph, const LinearNode& map) {
  const std::string& op = graph.node(map.nodes.back()).op_type;
  if (op == "Identity" || op == "Dropout" || op == "Cast") return map.kind == Kind::identity;
  const auto all = [](const auto& list, auto value) {
    return std::ranges::all_of(list, [&](auto each) { return each == value; });
  };
  const bool neutral =
      map.kind == Kind::identity ||
      (map.kind == Kind::channel_scale && map.shift.empty() && all(map.scale, 1.0)) ||
      (map.kind == Kind::pad && all(map.windows->pads_begin, Index{0}) &&
       all(map.windows->pads_end, Index{0}));
  if (!neutral) return false;
  const auto &before = graph[map.operands.front()].dims, &after = graph[map.outputs.front()].dims;
  // Nothing is broadcast or reshaped: one extent that is not known follows from the others.
  return before && before == after && std::ranges::count(*before, unknown) <= 1;
}

}  // namespace

bool is_plain(const onnx::Attribute& attribute) {
  if (attribute.type == onnx::AttributeType::graph ||
      attribute.type >= onnx::AttributeType::tensors) {
    return false;
  }
  constexpr std::uint32_t known[] = {1, 2, 3, 4, 5, 7, 8, 9, 13, 20};  // of AttributeProto
  const onnx::detail::Source source{attribute.name, attribute.encoded};
  onnx::detail::Message fields(source, attribute.encoded, "AttributeProto");
  while (fields.next()) {
    if (!std::ranges::count(known, fields.number())) return false;
  }
  return true;
}

bool same_constant(const onnx::Tensor& a, const onnx::Tensor& b) {
  return a.type == b.type && a.dims == b.dims && std::ranges::equal(a.elements, b.elements) &&
         (onnx::size_of(a.type) > 0 || encoded(a) == encoded(b));
}

int ValueTable::of(const onnx::Tensor& constant) {
  std::size_t hash = std::hash<std::string_view>()(
      onnx::size_of(constant.type) > 0 ? text_of(constant.elements) : text_of(encoded(constant)));
  hash += static_cast<std::size_t>(constant.type);
  for (const std::int64_t extent : constant.dims) {
    hash = 31 * hash + static_cast<std::size_t>(extent);
  }
  const auto [first, last] = constants_.equal_range(hash);
  for (auto each = first; each != last; ++each) {
    if (same_constant(*each->second.first, constant)) return each->second.second;
  }
  constants_.emplace(hash, std::pair(&constant, count_));
  return count_++;
}

int ValueTable::of(const std::string& made) {
  const auto [at, added] = made_.emplace(made, count_);
  if (added) ++count_;
  return at->second;
}

ValueNumbers::ValueNumbers(const LinearGraph& linear, ValueTable& table, ValueNumbers* other)
    : linear_(linear),
      graph_(linear.graph()),
      table_(table),
      other_(other),
      numbers_(graph_.tensors().size()),
      is_set_(numbers_.size()) {
  for (std::size_t t = 0; t < numbers_.size(); ++t) {
    const GraphTensor& tensor = graph_.tensors()[t];
    is_set_[t] = tensor.constant || tensor.producer < 0;
    if (is_set_[t]) {
      numbers_[t] = tensor.constant ? table.of(*tensor.constant) : table.of("input " + tensor.name);
    }
  }
  for (int n = 0; n < std::ssize(graph_.model().nodes); ++n) update(n);
}

bool ValueNumbers::passes_on(int node) const {
  const int output = graph_.output(node);
  if (output < 0 || graph_[output].constant) return false;
  const LinearNode* const map = linear_.maker(output);
  return map && map->nodes.size() == 1 && is_identity(graph_, *map);
}

void ValueNumbers::update(int node) {
  int number = -1;  // of what it does
  for (std::size_t o = 0; o < graph_.node(node).outputs.size(); ++o) {
    const int output = graph_.output(node, o);
    if (output < 0 || is_set_[static_cast<std::size_t>(output)]) continue;
    int& made = numbers_[static_cast<std::size_t>(output)];
    if (passes_on(node)) {
      made = (*this)[linear_.maker(output)->operands.front()];
      continue;
    }
    if (number < 0) {
      const std::string key = key_of(node);
      number = is_random(graph_.node(node)) ? random_number(node, key) : table_.of(key);
    }
    made = o == 0 ? number
                  : table_.of("output " + std::to_string(o) + " of " + std::to_string(number));
  }
}

std::string ValueNumbers::key_of(int index) {
  const onnx::Node& node = graph_.node(index);
  Key key;
  key.append(node.op_type);
  key.append(is_standard(node) ? std::string_view() : node.domain);
  constexpr std::uint32_t overload = 8;  // which function of a name it is
  for (const onnx::Field& field : node.fields) {
    if (field.number == overload) key.append(text_of(field.encoded));
  }
  key.append(std::ssize(node.outputs));

  std::vector<std::int64_t> inputs;
  for (std::size_t i = 0; i < node.inputs.size(); ++i) {
    const int input = graph_.input(index, i);
    inputs.push_back(input < 0 ? -1 : (*this)[input]);
  }
  while (!inputs.empty() && inputs.back() < 0) inputs.pop_back();
  if (inputs.size() == 2 &&
      is_one_of("Add And BitwiseAnd BitwiseOr BitwiseXor Equal Max Mean Min Mul Or Sum Xor",
                node)) {
    std::ranges::sort(inputs);
  }
  key.append(inputs);

  std::vector<const onnx::Attribute*> attributes;
  for (const onnx::Attribute& attribute : node.attributes) {
    if (!is_default(node, attribute, graph_.opset())) attributes.push_back(&attribute);
  }
  std::ranges::sort(attributes, {}, [](const onnx::Attribute* each) {
    return std::pair(std::string_view(each->name), each);
  });
  for (const onnx::Attribute* const attribute : attributes) {
    key.append(attribute->name);
    key.append(static_cast<std::int64_t>(attribute->type));
    key.append(attribute->f);
    key.append(attribute->i);
    key.append(attribute->s);
    key.append(attribute->floats);
    key.append(attribute->ints);
    key.append(attribute->strings);
    key.append(std::int64_t{attribute->tensor ? table_.of(*attribute->tensor) : -1});
    // The others are only compared as bytes.
    if (!is_plain(*attribute)) key.append(text_of(attribute->encoded));
  }
  // What graphs of a node read has its name in them.
  for (const std::string& name : node.captured) {
    const int tensor = graph_.find(name);
    key.append(name);
    key.append(std::int64_t{tensor < 0 ? -1 : (*this)[tensor]});
  }
  return std::move(key).take();
}

int ValueNumbers::random_number(int node, const std::string& key) {
  const auto [known, added] = random_of_.try_emplace({node, key});
  if (!added) return known->second;
  const auto name = [](const Graph& graph, int of) {
    const std::vector<std::string>& outputs = graph.node(of).outputs;
    return outputs.empty() ? std::string() : outputs.front();
  };
  known->second = table_.fresh();
  if (other_ && other_->random_.contains(key)) {
    Random& others = other_->random_.at(key);
    while (others.next < others.taken.size() && others.taken[others.next]) ++others.next;
    const auto namesake = others.by_name.find(name(graph_, node));
    const bool same = namesake != others.by_name.end() && !others.taken[namesake->second];
    const std::size_t pair = same ? namesake->second : others.next;
    if (pair < others.taken.size()) {
      others.taken[pair] = true;
      known->second = others.numbers[pair];
    }
  }
  Random& own = random_[key];
  own.by_name.emplace(name(graph_, node), own.numbers.size());
  own.numbers.push_back(known->second);
  own.taken.push_back(false);
  return known->second;
}

}  // namespace tool
