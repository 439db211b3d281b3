// Where a plan's tensors lie in the device's memory, checked before anything is launched.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/cuda/device_layer.hpp>
#include <concertina/cuda/plan.hpp>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace concertina::cuda::detail {

/// The addresses that one pass needs, by their index in the plan; others are null.
class AddressTable {
 public:
  explicit AddressTable(const ContractionPlan& plan) : plan_(plan) {}
  explicit AddressTable(const ContractionPlan&&) = delete;

  /// Tensors of one role: the layers of each form in the order of Form::leaves; or one result for
  /// each form.
  /// Throws  ShapeError naming the tensor and its shape, where there are more or fewer than the
  ///         plan's, or an address is missing or misaligned, or a length is another one
  template <class T>
  void add(TensorUse::Role role, std::span<const DeviceLayer<T>> layers) {
    const auto uses = plan_.tensors(role);
    if (2 * layers.size() != uses.size()) {
      throw ShapeError(std::to_string(layers.size()) + " layers, where the plan has " +
                       std::to_string(uses.size() / 2) +
                       (uses.empty() ? std::string() : ", from " + uses.front().name()));
    }
    for (std::size_t l = 0; l < layers.size(); ++l) {
      set(uses[2 * l], layers[l].weight);
      set(uses[2 * l + 1], layers[l].bias);
    }
  }

  void* operator[](int tensor) const { return addresses_[static_cast<std::size_t>(tensor)]; }

  /// Throws  ShapeError naming both tensors where one that is written overlaps another
  /// Cost    O(n log n) for n tensors
  void require_disjoint() {
    std::ranges::sort(ranges_, {}, &Range::first);
    const Range *furthest = nullptr, *furthest_written = nullptr;  // of those that start earlier
    for (const Range& range : ranges_) {
      const Range* const other = range.is_written() ? furthest : furthest_written;
      if (other && other->last > range.first) {
        throw ShapeError(range.use->name() + ": overlaps " + other->use->name() + " by " +
                         std::to_string(std::min(other->last, range.last) - range.first) +
                         " bytes, and one of them is written");
      }
      if (!furthest || furthest->last < range.last) furthest = &range;
      if (range.is_written() && (!furthest_written || furthest_written->last < range.last)) {
        furthest_written = &range;
      }
    }
  }

  /// Throws  ShapeError naming a tensor that lies in the workspace
  void require_apart(std::span<const std::byte> workspace) const {
    const auto first = reinterpret_cast<std::uintptr_t>(workspace.data());
    for (const Range& range : ranges_) {
      if (range.last <= first || range.first >= first + workspace.size()) continue;
      throw ShapeError(range.use->name() + ": lies in the workspace");
    }
  }

  /// As a kernel's parameter. Requires no more tensors than it has room for.
  template <int Capacity>
  Addresses<Capacity> addresses() const {
    Addresses<Capacity> some;
    std::copy_n(addresses_.begin(), Capacity, some.at);
    return some;
  }

 private:
  template <class T>
  void set(const TensorUse& use, std::span<T> elements) {
    const auto refuse = [&](const std::string& why) { throw ShapeError(use.name() + ": " + why); };
    if (std::ssize(elements) != use.size) {
      refuse(std::to_string(elements.size()) + " elements, where the plan has " +
             std::to_string(use.size));
    }
    if (use.size > 0 && !elements.data()) refuse("a null address");
    if (reinterpret_cast<std::uintptr_t>(elements.data()) % alignof(T) != 0) {
      refuse("an address that is not a multiple of " + std::to_string(alignof(T)));
    }
    addresses_[static_cast<std::size_t>(&use - plan_.tensors().data())] =
        const_cast<void*>(static_cast<const void*>(elements.data()));
    if (elements.empty()) return;
    const auto first = reinterpret_cast<std::uintptr_t>(elements.data());
    ranges_.push_back({first, first + elements.size_bytes(), &use});
  }

  /// A tensor's addresses.
  struct Range {
    std::uintptr_t first, last;
    const TensorUse* use;

    bool is_written() const {
      return use->role == TensorUse::Role::result || use->role == TensorUse::Role::layer_gradient;
    }
  };

  const ContractionPlan& plan_;
  std::vector<Range> ranges_;
  std::array<void*, ContractionPlan::most_tensors> addresses_{};
};

}  // namespace concertina::cuda::detail
