// Any model: either refused with an Error, or contracted to a model that is written, read again,
// and proved, or not, but never wrong.
// SPDX-License-Identifier: Apache-2.0
#include "onnx/compare_models.hpp"
#include "onnx/contract_model.hpp"
#include "text.hpp"

#include <concertina/error.hpp>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <span>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) try {
  if (size < 2) return 0;
  const std::uint8_t choice = data[0];
  const auto model = concertina::onnx::parse_model(std::as_bytes(std::span(data + 1, size - 1)));
  const tool::ModelOptions options{.graph = {.budget = {.memory = 1e7, .effort = 1e7}},
                                   .when = static_cast<tool::When>(choice % 3),
                                   .equality = static_cast<tool::Equality>(choice / 3 % 3)};
  const tool::ContractedModel result = tool::contract_model(model, options);
  const auto again = concertina::onnx::parse_model(concertina::onnx::serialize_model(result.model));
  const tool::ModelComparison comparison =
      tool::compare_models(model, again, options.graph, {.equality = options.equality});
  if (comparison.failed()) std::abort();
  return 0;
} catch (const concertina::Error&) {
  return 0;
} catch (const tool::UsageError&) {
  return 0;
}
