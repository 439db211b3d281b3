// SPDX-License-Identifier: Apache-2.0
#include <concertina/cuda/detail/tensor_table.hpp>

#include "support.hpp"

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace concertina::test {
namespace {

using cuda::ContractionPlan, cuda::PlannedForm, cuda::TensorUse;

TEST_CASE("addresses that do not fit a plan are refused", "[cuda]") {
  const std::vector<PlannedForm> forms{PlannedForm(std::vector<ConvShape<1>>{
      {.out = 2, .in = 1, .kernel_size = 3, .bias = true}, {.out = 4, .in = 2}})};
  const ContractionPlan plan(forms);
  std::vector<float> elements(64);
  using Layer = cuda::DeviceLayer<const float>;
  const auto of = [&](std::size_t count) { return std::span<const float>(elements).first(count); };
  const auto refusal = [&](const std::vector<Layer>& layers) {
    cuda::detail::AddressTable table(plan);
    return message_of<ShapeError>([&] { table.add<const float>(TensorUse::Role::layer, layers); });
  };
  const Layer first{of(6), of(2)}, second{of(8)};
  cuda::detail::AddressTable table(plan);
  const std::vector<Layer> right{first, second};
  CHECK_NOTHROW(table.add<const float>(TensorUse::Role::layer, right));
  CHECK(table[0] == elements.data());
  CHECK(table[3] == nullptr);
  CHECK(refusal({first}).find("1 layers, where the plan has 2") != std::string::npos);
  CHECK(refusal({first, {of(7)}}) ==
        "form 1, layer 2, weight (conv1d 2->4 @1): 7 elements, where the plan has 8");
  CHECK(refusal({{of(6)}, second}).find("layer 1, bias") != std::string::npos);
  CHECK(refusal({first, {of(8), of(4)}}).find("layer 2, bias") != std::string::npos);
  const auto at = [&](std::uintptr_t address) {
    return std::span(reinterpret_cast<const float*>(address), 8);
  };
  CHECK(refusal({first, {at(0)}}).find("null") != std::string::npos);
  const auto odd = reinterpret_cast<std::uintptr_t>(elements.data()) + 1;
  CHECK(refusal({first, {at(odd)}}).find("multiple of 4") != std::string::npos);
}

TEST_CASE("what is written overlaps nothing", "[cuda]") {
  const std::vector<PlannedForm> forms{PlannedForm(std::vector<ConvShape<0>>{
                                           {.out = 2, .in = 4}, {.out = 3, .in = 2, .bias = true}}),
                                       PlannedForm(std::vector<ConvShape<0>>{{.out = 3, .in = 4}})};
  const ContractionPlan plan(forms);
  std::vector<float> elements(64);
  const auto at = [&](std::size_t first, std::size_t count) {
    return std::span(elements).subspan(first, count);
  };
  const auto check = [&](std::size_t layer, std::size_t result, std::size_t bias,
                         std::size_t other_result) {
    cuda::detail::AddressTable table(plan);
    const std::vector<cuda::DeviceLayer<const float>> layers{
        {at(0, 8)}, {at(8, 6), at(14, 3)}, {at(layer, 12)}};
    const std::vector<cuda::DeviceLayer<float>> results{{at(result, 12), at(bias, 3)},
                                                        {at(other_result, 12)}};
    table.add<const float>(TensorUse::Role::layer, layers);
    table.add<float>(TensorUse::Role::result, results);
    table.require_disjoint();
  };
  const auto refusal = [&](auto... firsts) {
    return message_of<ShapeError>([&] { check(firsts...); });
  };
  CHECK_NOTHROW(check(17, 29, 41, 44));
  CHECK_NOTHROW(check(2, 29, 41, 44));  // what is only read may overlap
  CHECK(refusal(17, 28, 41, 44) ==
        "form 1, result, weight (linear 4->3 +bias): overlaps form 2, layer 1, weight (linear "
        "4->3) by 4 bytes, "
        "and one of them is written");
  CHECK(refusal(40, 29, 52, 17) ==
        "form 2, layer 1, weight (linear 4->3): overlaps form 1, result, weight (linear 4->3 "
        "+bias) by 4 bytes, "
        "and one of them is written");
  CHECK(refusal(17, 29, 30, 44).find("result, bias") == 8);
  CHECK(refusal(17, 29, 41, 29).find("by 48 bytes") != std::string::npos);
  CHECK(refusal(17, 29, 15, 44).find("layer 2, bias") != std::string::npos);
}

TEST_CASE("a workspace that is lent overlaps no tensor", "[cuda]") {
  const ContractionPlan plan(std::vector{PlannedForm(
      std::vector<ConvShape<0>>{{.out = 2, .in = 4}, {.out = 3, .in = 2, .bias = true}})});
  std::vector<float> elements(32);
  const auto at = [&](std::size_t first, std::size_t count) {
    return std::span<const float>(elements).subspan(first, count);
  };
  cuda::detail::AddressTable table(plan);
  const std::vector<cuda::DeviceLayer<const float>> layers{{at(4, 8)}, {at(12, 6), at(18, 3)}};
  table.add<const float>(TensorUse::Role::layer, layers);
  CHECK_NOTHROW(table.require_apart(std::as_bytes(at(0, 4))));
  CHECK_NOTHROW(table.require_apart(std::as_bytes(at(21, 11))));
  for (const auto& [first, count] : {std::pair(20, 12), std::pair(0, 32), std::pair(19, 1)}) {
    const auto lent = at(static_cast<std::size_t>(first), static_cast<std::size_t>(count));
    CHECK(message_of<ShapeError>([&] {
            table.require_apart(std::as_bytes(lent));
          }).find(": lies in the workspace") != std::string::npos);
  }
}

}  // namespace
}  // namespace concertina::test
