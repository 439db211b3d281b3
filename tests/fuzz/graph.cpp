// Any model: either refused with an Error, or contracted to a model that is written, read again and
// compared, which nothing but the budget may refuse, and proved, or not, but never wrong.
// SPDX-License-Identifier: Apache-2.0
#include "onnx/compare_models.hpp"
#include "onnx/contract_model.hpp"
#include "text.hpp"

#include <concertina/error.hpp>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <optional>
#include <span>

namespace onnx = concertina::onnx;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) try {
  if (size < 2) return 0;
  const std::uint8_t choice = data[0];
  const tool::ModelOptions options{.graph = {.budget = {.memory = 1e7, .effort = 1e7}},
                                   .when = static_cast<tool::When>(choice % 3),
                                   .equality = static_cast<tool::Equality>(choice / 3 % 3)};
  std::optional<onnx::Model> model;
  std::optional<tool::ContractedModel> result;
  try {
    model = onnx::parse_model(std::as_bytes(std::span(data + 1, size - 1)));
    result = tool::contract_model(*model, options);
  } catch (const concertina::Error&) {
    return 0;
  } catch (const tool::UsageError&) {
    return 0;
  }
  const onnx::Model again = onnx::parse_model(onnx::serialize_model(result->model));
  if (tool::compare_models(*model, again, options.graph, {.equality = options.equality}).failed())
    std::abort();
  return 0;
} catch (const tool::BudgetError&) {
  return 0;
}
