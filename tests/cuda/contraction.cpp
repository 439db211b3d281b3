// SPDX-License-Identifier: Apache-2.0
#include <concertina/cuda/contraction.hpp>

#include "support.hpp"

#include <concertina/expand.hpp>

#include <span>
#include <string>
#include <utility>
#include <vector>

namespace concertina::test {
namespace {

using cuda::Chain, cuda::ContractionPlan, cuda::PlanOptions, cuda::TensorUse;

TEST_CASE("without a gradient a plan has none", "[cuda]") {
  const std::vector<Chain> chains{
      Chain(expand_cl<2>({.out = 8, .in = 4, .kernel_size = 3, .bias = true})),
      Chain(std::vector<ConvShape<0>>{{.out = 2, .in = 3}})};
  const ContractionPlan both(chains), one(chains, {.gradient = false});
  CHECK(one.backward().stages.empty());
  CHECK(one.tensors().size() == both.tensors().size() / 2);
  CHECK(one.tensors(TensorUse::Role::layer_gradient).empty());
  CHECK(one.workspace() < both.workspace());
  CHECK(one.forward().multiply_adds == both.forward().multiply_adds);
}

TEST_CASE("a plan's multiply-adds are those of its chains", "[cuda]") {
  const std::vector<ConvShape<2>> cl{
      {.out = 8, .in = 4}, {.out = 16, .in = 8, .kernel_size = 3}, {.out = 5, .in = 16}};
  const std::vector<Chain> chains{
      Chain(cl), Chain(std::vector<ConvShape<0>>{{.out = 7, .in = 3}, {.out = 2, .in = 7}})};
  CHECK(ContractionPlan(chains).forward().multiply_adds ==
        5 * 16 * 8 * 9 + 5 * 8 * 4 * 9 + 2 * 7 * 3);
}

TEST_CASE("a network's expanded layers are contracted in one launch", "[cuda]") {
  const auto smallnet = [](auto&& expand) {
    std::vector<Chain> chains;
    for (const Index in : {4, 8, 16}) {
      chains.emplace_back(
          expand({.out = 2 * in, .in = in, .kernel_size = 7, .padding = 3, .bias = true}));
    }
    chains.emplace_back(expand_fc({.out = 64, .in = 512, .bias = true}));
    return chains;
  };
  std::vector<Chain> mobilenet;
  for (const Index channels : {32, 64, 128, 256, 512, 512, 512, 512, 512, 1024}) {
    mobilenet.emplace_back(expand_cl<2>(
        {.out = channels, .in = channels, .kernel_size = 3, .padding = 1, .groups = channels}));
  }
  for (const auto& chains :
       {smallnet([](const ConvShape<2>& shape) { return expand_cl(shape); }),
        smallnet([](const ConvShape<2>& shape) { return expand_ck(shape); }), mobilenet}) {
    const ContractionPlan plan(chains);
    CHECK(plan.forward().launches() == 1);
    CHECK(plan.backward().launches() == 1);
    CHECK(plan.forward().gemms.empty());
    CHECK(plan.forward().phases.size() <= 3);  // two products, and the sum of split ones
    CHECK(plan.backward().phases.size() <= 4);
  }
}

TEST_CASE("products large enough are cuBLAS's", "[cuda]") {
  const std::vector<Chain> chains{
      Chain(expand_cl<2>({.out = 512, .in = 512, .kernel_size = 3, .bias = true}))};
  const ContractionPlan plan(chains);
  CHECK(plan.forward().gemms.size() == 2);
  CHECK(plan.backward().gemms.size() == 4);
  for (const auto* sequence : {&plan.forward(), &plan.backward()}) {
    Index multiply_adds = 0;
    for (const cuda::Gemm& gemm : sequence->gemms) {
      multiply_adds += Index{gemm.rows} * gemm.columns * gemm.inner;
    }
    CHECK(multiply_adds == sequence->multiply_adds);
  }
}

TEST_CASE("what cannot be planned is refused", "[cuda]") {
  const auto plan = [](Chain chain) {
    const std::vector<Chain> chains{std::move(chain)};
    return ContractionPlan(chains);
  };
  using Shapes = std::vector<ConvShape<2>>;
  CHECK_THROWS_AS(plan(Shapes{}), ShapeError);
  CHECK_THROWS_AS(plan(Shapes{{.out = 3, .in = 2}, {.out = 3, .in = 2}}), ShapeError);
  const Shapes padded{{.out = 2, .in = 2, .bias = true},
                      {.out = 2, .in = 2, .kernel_size = 3, .padding = 1}};
  CHECK_THROWS_AS(plan(padded), InexactError);
  CHECK_NOTHROW(plan(Chain(padded, interior_only)));
  CHECK_THROWS_AS(plan(Shapes{{.out = 1 << 16, .in = 1 << 16}}), SizeError);
  const std::vector<Chain> many(257, Chain(Shapes{{.out = 1, .in = 1}, {.out = 1, .in = 1}}));
  CHECK(message_of<SizeError>([&] { ContractionPlan{many}; }).find("2048") != std::string::npos);
  CHECK(ContractionPlan(std::span<const Chain>()).forward().stages.empty());
  for (const PlanOptions& options : {PlanOptions{.least_gemm = 0}, PlanOptions{.wanted_tiles = 0},
                                     PlanOptions{.least_split = 0}}) {
    CHECK_THROWS_AS(ContractionPlan(std::span<const Chain>(), options), SizeError);
  }
}

TEST_CASE("a plan names its tensors", "[cuda]") {
  const std::vector<Chain> chains{
      Chain(std::vector<ConvShape<1>>{{.out = 2, .in = 1, .kernel_size = 3, .bias = true},
                                      {.out = 4, .in = 2}}),
      Chain(std::vector<ConvShape<0>>{{.out = 2, .in = 3}})};
  const ContractionPlan plan(chains);
  REQUIRE(plan.tensors().size() == 20);
  CHECK(plan.tensors()[0].name() == "chain 1, layer 1, weight (conv1d 1->2 @3 +bias)");
  CHECK(plan.tensors()[1].numbers == 2);
  CHECK(plan.tensors()[3].numbers == 0);
  CHECK(plan.tensors(TensorUse::Role::result).size() == 4);
  CHECK(plan.tensors(TensorUse::Role::result)[1].name() ==
        "chain 1, result, bias (conv1d 1->4 @3 +bias)");
  CHECK(plan.tensors(TensorUse::Role::layer_gradient).back().name() ==
        "chain 2, gradient of layer 1, bias (linear 3->2)");
}

}  // namespace
}  // namespace concertina::test
