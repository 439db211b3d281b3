// Leaves joined by products, sums and concatenations: what expressions and their forms are.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/detail/function_ref.hpp>
#include <concertina/detail/text.hpp>
#include <concertina/error.hpp>
#include <concertina/join.hpp>
#include <concertina/shape.hpp>

#include <algorithm>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace concertina::detail {

/// Whether parts read channels of their own, one part's after the other's; and write them.
constexpr bool splits_inputs(Join join) {
  return join == Join::concat_inputs || join == Join::direct_sum;
}
constexpr bool splits_outputs(Join join) {
  return join == Join::concat_outputs || join == Join::direct_sum;
}

struct Channels {
  Index in, out;
};

/// Leaves, joined. Chains of chains and sums of sums are flattened, and one part alone is that
/// part, so equal expressions have equal trees whatever their parentheses. Trees do not change, so
/// copies share their nodes. A tree that was moved from is empty, and throws ShapeError when used.
template <class T>
class Tree {
 public:
  Tree(T leaf) {
    const Channels channels{leaf.in, leaf.out};
    node_ = std::make_shared<const Node>(Node{Join::none, std::move(leaf), {}, channels, 0});
  }

  /// Throws ShapeError where there are no parts, SizeError where they are nested too deep.
  Tree(Join join, std::span<const Tree> parts);

  Join join() const { return node().join; }
  bool is_leaf() const { return join() == Join::none; }
  const T& leaf() const { return *node().leaf; }
  const std::vector<Tree>& parts() const { return node().parts; }
  const Channels& channels() const { return node().channels; }

  /// The same tree with each(leaf) at its leaves.
  template <class Each>
  auto map(Each&& each) const -> Tree<std::invoke_result_t<Each&, const T&>> {
    using Result = Tree<std::invoke_result_t<Each&, const T&>>;
    if (is_leaf()) return Result(each(leaf()));
    std::vector<Result> mapped;
    for (const Tree& part : parts()) mapped.push_back(part.map(each));
    return Result(join(), mapped);
  }

  /// Calls visit(leaf) for every leaf, in the order in which they are written down.
  template <class Visit>
  void for_each_leaf(Visit&& visit) const {
    if (is_leaf()) return static_cast<void>(visit(leaf()));
    for (const Tree& part : parts()) part.for_each_leaf(visit);
  }

  friend bool operator==(const Tree& f, const Tree& g) {
    return f.node_ == g.node_ ||
           (f.join() == g.join() && f.node().leaf == g.node().leaf && f.parts() == g.parts());
  }

 private:
  struct Node {
    Join join;
    std::optional<T> leaf;
    std::vector<Tree> parts;
    Channels channels;
    int depth;  ///< of nodes below
  };

  const Node& node() const {
    if (!node_) throw ShapeError("an expression that was moved from");
    return *node_;
  }

  std::shared_ptr<const Node> node_;
};

/// The channels of parts joined.
template <class T>
Channels joined_channels(Join join, const std::vector<Tree<T>>& parts) {
  Channels whole = parts.front().channels();
  if (join == Join::chain) return {whole.in, parts.back().channels().out};
  for (const Tree<T>& part : std::span(parts).subspan(1)) {
    const Channels& more = part.channels();
    if (splits_outputs(join)) whole.out = checked_add(whole.out, more.out, "concat");
    if (splits_inputs(join)) whole.in = checked_add(whole.in, more.in, "concat");
  }
  return whole;
}

template <class T>
Tree<T>::Tree(Join join, std::span<const Tree> parts) {
  if (parts.empty()) throw ShapeError("an expression of no layers");
  if (parts.size() == 1) {
    parts.front().node();
    node_ = parts.front().node_;
    return;
  }
  Node node{join, {}, {}, {}, 0};
  for (const Tree& part : parts) {
    node.depth = std::max(node.depth, part.node().depth + (part.join() == join ? 0 : 1));
    if (part.join() == join) {
      for (const Tree& inner : part.parts()) node.parts.push_back(inner);
    } else {
      node.parts.push_back(part);
    }
  }
  constexpr int deepest = 1000;  // everything that walks a tree calls itself for each level
  if (node.depth > deepest) {
    fail<SizeError>({"an expression of sums and products nested deeper than ", deepest,
                     "; contract the inner ones first"});
  }
  node.channels = joined_channels(join, node.parts);
  node_ = std::make_shared<const Node>(std::move(node));
}

template <class T>
const Channels& channels(const Tree<T>& tree) {
  return tree.channels();
}

/// Throws ShapeError where the channels of parts that are to be joined differ. describe(p) names a
/// part in the message.
inline void require_channels(Join join, std::span<const Channels> parts,
                             FunctionRef<std::string(std::size_t)> describe) {
  for (std::size_t p = 1; p < parts.size(); ++p) {
    const Channels before = parts[p - 1], here = parts[p];
    if (join == Join::chain) {
      if (before.out == here.in) continue;
      fail<ShapeError>({"product: layer ", p + 1, " reads ", here.in, " channels (", describe(p),
                        "), layer ", p, " writes ", before.out, " (", describe(p - 1), ")"});
    }
    const bool reads_other = !splits_inputs(join) && before.in != here.in,
               writes_other = !splits_outputs(join) && before.out != here.out;
    if (!reads_other && !writes_other) continue;
    fail<ShapeError>({"branch ", p, " (", describe(p - 1), ") and branch ", p + 1, " (",
                      describe(p), ") cannot be joined: they ", reads_other ? "read " : "write ",
                      reads_other ? before.in : before.out, " and ",
                      reads_other ? here.in : here.out, " channels"});
  }
}

}  // namespace concertina::detail
