// Which tensors of a model, or of two, hold the same values whatever the inputs: by value
// numbering.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "onnx/regions.hpp"

#include <cstddef>
#include <map>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace tool {

/// Whether two constants are of the same type, shape and bytes, whatever their names.
bool same_constant(const onnx::Tensor& a, const onnx::Tensor& b);

/// Whether all that an attribute may hold is kept as numbers, strings or a tensor, whatever type it
/// says it is of; graphs and the like are not.
bool is_plain(const onnx::Attribute& attribute);

/// Numbers of values: of constants by what they hold, of others by the operator that makes them of
/// which values. Models that share it have the same numbers for the same values.
class ValueTable {
 public:
  int of(const onnx::Tensor& constant);
  int of(const std::string& made);
  int fresh() { return count_++; }
  int count() const { return count_; }

 private:
  int count_ = 0;
  std::unordered_map<std::string, int> made_;
  std::unordered_multimap<std::size_t, std::pair<const onnx::Tensor*, int>> constants_;
};

/// The value number of each tensor of a model. Nodes that differ in names, in the order of operands
/// that commute or in attributes that are the defaults make the same values, and Identity, what is
/// multiplied by one or padded by nothing is what it reads. What is drawn at random, or of
/// operators that nobody knows, is of one node alone.
class ValueNumbers {
 public:
  /// Random nodes that read the same are those of `other`, one each: of the same name, or else in
  /// order.
  ValueNumbers(const LinearGraph& linear, ValueTable& table, ValueNumbers* other = nullptr);

  int operator[](int tensor) const { return numbers_[static_cast<std::size_t>(tensor)]; }
  /// Takes a tensor for a value from now on, for another reason.
  void set(int tensor, int number) {
    numbers_[static_cast<std::size_t>(tensor)] = number;
    is_set_[static_cast<std::size_t>(tensor)] = true;
  }
  /// Numbers what the node makes again, as what it reads may have other numbers now.
  void update(int node);
  /// Whether the node only passes on what it reads.
  bool passes_on(int node) const;

 private:
  /// Nodes that draw by the same key.
  struct Random {
    std::vector<int> numbers;
    std::vector<bool> taken;                               // by a node of the other model
    std::size_t next = 0;                                  // none before it is free
    std::unordered_map<std::string, std::size_t> by_name;  // of the first output
  };

  std::string key_of(int node);
  int random_number(int node, const std::string& key);

  const LinearGraph& linear_;
  const Graph& graph_;
  ValueTable& table_;
  ValueNumbers* other_;
  std::vector<int> numbers_;
  std::vector<bool> is_set_;
  std::unordered_map<std::string, Random> random_;
  std::map<std::pair<int, std::string>, int> random_of_;  // numbers, of nodes and keys
};

}  // namespace tool
