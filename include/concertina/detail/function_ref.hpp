// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concepts>
#include <memory>
#include <type_traits>
#include <utility>

namespace concertina::detail {

/// A callable that somebody else owns and that outlives the call: two pointers, no allocation.
template <class Signature>
class FunctionRef;
template <class Result, class... Arguments>
class FunctionRef<Result(Arguments...)> {
 public:
  template <class F>
    requires(!std::same_as<std::remove_cvref_t<F>, FunctionRef>) &&
                std::is_invocable_r_v<Result, F&, Arguments...>
  FunctionRef(F&& callable) noexcept
      : callable_(const_cast<void*>(reinterpret_cast<const void*>(std::addressof(callable)))),
        call_([](void* to, Arguments... arguments) -> Result {
          return (*reinterpret_cast<std::add_pointer_t<F>>(to))(
              std::forward<Arguments>(arguments)...);
        }) {}

  Result operator()(Arguments... arguments) const {
    return call_(callable_, std::forward<Arguments>(arguments)...);
  }

 private:
  void* callable_;
  Result (*call_)(void*, Arguments...);
};

}  // namespace concertina::detail
