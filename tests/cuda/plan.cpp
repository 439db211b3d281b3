// SPDX-License-Identifier: Apache-2.0
#include <concertina/cuda/plan.hpp>

#include "support.hpp"

#include <concertina/blocks.hpp>
#include <concertina/expand.hpp>
#include <concertina/layers.hpp>

#include <algorithm>
#include <limits>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace concertina::test {
namespace {

using cuda::ContractionPlan, cuda::PlannedForm, cuda::PlanOptions, cuda::TensorUse;

TEST_CASE("without a gradient a plan has none", "[cuda]") {
  const std::vector<PlannedForm> forms{
      PlannedForm(expand_cl<2>({.out = 8, .in = 4, .kernel_size = 3, .bias = true})),
      PlannedForm(std::vector<ConvShape<0>>{{.out = 2, .in = 3}})};
  const ContractionPlan both(forms), one(forms, {.gradient = false});
  CHECK(one.backward().launches.empty());
  CHECK(one.tensors().size() == both.tensors().size() / 2);
  CHECK(one.tensors(TensorUse::Role::layer_gradient).empty());
  CHECK(one.workspace() < both.workspace());
  CHECK(one.forward().multiply_adds == both.forward().multiply_adds);
}

TEST_CASE("a plan's multiply-adds are those of its forms", "[cuda]") {
  const std::vector<ConvShape<2>> cl{
      {.out = 8, .in = 4}, {.out = 16, .in = 8, .kernel_size = 3}, {.out = 5, .in = 16}};
  const std::vector<PlannedForm> forms{
      PlannedForm(cl),
      PlannedForm(std::vector<ConvShape<0>>{{.out = 7, .in = 3}, {.out = 2, .in = 7}})};
  CHECK(ContractionPlan(forms).forward().multiply_adds ==
        5 * 16 * 8 * 9 + 5 * 8 * 4 * 9 + 2 * 7 * 3);
}

TEST_CASE("a network's expanded layers are contracted in a few phases", "[cuda]") {
  const auto smallnet = [](auto&& expand) {
    std::vector<PlannedForm> forms;
    for (const Index in : {4, 8, 16}) {
      forms.emplace_back(
          expand({.out = 2 * in, .in = in, .kernel_size = 7, .padding = 3, .bias = true}));
    }
    forms.emplace_back(expand_fc({.out = 64, .in = 512, .bias = true}));
    return forms;
  };
  std::vector<PlannedForm> mobilenet;
  for (const Index channels : {32, 64, 128, 256, 512, 512, 512, 512, 512, 1024}) {
    mobilenet.emplace_back(expand_cl<2>(
        {.out = channels, .in = channels, .kernel_size = 3, .padding = 1, .groups = channels}));
  }
  for (const auto& forms :
       {smallnet([](const ConvShape<2>& shape) { return expand_cl(shape); }),
        smallnet([](const ConvShape<2>& shape) { return expand_ck(shape); }), mobilenet}) {
    const ContractionPlan plan(forms, {.math = cuda::Math::fp32});
    CHECK(plan.forward().gemms.empty());
    CHECK(plan.forward().phases.size() <= 7);  // of two products, unfolded, split and folded
    CHECK(plan.backward().phases.size() <= 7);
  }
}

TEST_CASE("products large enough are cuBLAS's", "[cuda]") {
  const std::vector<PlannedForm> forms{
      PlannedForm(expand_cl<2>({.out = 512, .in = 512, .kernel_size = 3, .bias = true}))};
  const ContractionPlan plan(forms, {.math = cuda::Math::fp32});
  CHECK(plan.forward().gemms.size() == 2);
  CHECK(plan.backward().gemms.size() == 4);
  for (const auto* sequence : {&plan.forward(), &plan.backward()}) {
    Index multiply_adds = 0;
    for (const cuda::detail::Gemm& gemm : sequence->gemms) {
      multiply_adds += Index{gemm.m} * gemm.n * gemm.k;
    }
    CHECK(multiply_adds == sequence->multiply_adds);
  }
}

TEST_CASE("products large enough are on tensor cores, of whole rounds of tiles and split ones",
          "[cuda]") {
  const std::vector<PlannedForm> forms{
      PlannedForm(expand_cl<2>({.out = 512, .in = 512, .kernel_size = 3, .bias = true}))};
  const ContractionPlan plan(forms);
  for (const auto* sequence : {&plan.forward(), &plan.backward()}) {
    CHECK(sequence->gemms.empty());
    Index multiply_adds = 0;
    for (const cuda::detail::Job& job : sequence->jobs) {
      if (job.kind != cuda::detail::Job::Kind::multiply_bf16x6) continue;
      CHECK(job.k >= 80);  // or the bound would not hold
      const Index of_c = (job.m + 127) / 128 * ((job.n + 127) / 128);
      multiply_adds += Index{job.m} * job.n * job.k * job.c_tiles / of_c;
      if (job.splits == 1) CHECK(job.c_tiles % 132 == 0);
    }
    CHECK(multiply_adds == sequence->multiply_adds);
  }
  CHECK(plan.forward().launches.size() == 6);
  // Too short sums, too few rows, and too small a product are not.
  const auto on_tensor_cores = [](Index out, Index hidden, Index in) {
    const std::vector<PlannedForm> form{
        std::vector<ConvShape<0>>{{.out = hidden, .in = in}, {.out = out, .in = hidden}}};
    const ContractionPlan small(form, {.gradient = false, .least_bf16x6 = Index{1} << 20});
    return std::ranges::any_of(small.forward().jobs, [](const cuda::detail::Job& job) {
      return job.kind == cuda::detail::Job::Kind::multiply_bf16x6;
    });
  };
  CHECK(on_tensor_cores(128, 128, 128));
  CHECK_FALSE(on_tensor_cores(128, 127, 256));
  CHECK_FALSE(on_tensor_cores(31, 256, 256));
  CHECK_FALSE(on_tensor_cores(64, 128, 127));
}

TEST_CASE("every offset of the largest products is an int", "[cuda]") {
  const auto product = [](Index channels, Index size) {
    return PlannedForm(
        std::vector<ConvShape<2>>(2, {.out = channels, .in = channels, .kernel_size = size}));
  };
  for (const PlannedForm& form : {product(1024, 7), product(2048, 5), product(1024, 5)}) {
    const ContractionPlan plan(std::vector<PlannedForm>{form});
    for (const auto* sequence : {&plan.forward(), &plan.backward()}) {
      for (const cuda::detail::Job& job : sequence->jobs) {
        const auto last = [](const cuda::detail::TwoModeStride& stride, Index count, Index inner) {
          return (count - 1) / inner * stride.outer + (inner - 1) * stride.inner;
        };
        const Index m = job.m, k = std::max<Index>(job.k, 1), m_inner = job.m_inner_extent,
                    k_inner = job.k_inner_extent;
        for (const Index offset : {last(job.a_m, m, m_inner), last(job.c_m, m, m_inner),
                                   last(job.a_k, k, k_inner), last(job.b_k, k, k_inner),
                                   (Index{job.n} - 1) * job.b_n, (Index{job.n} - 1) * job.c_n}) {
          CHECK(offset <= std::numeric_limits<int>::max());
        }
      }
    }
  }
}

TEST_CASE("sums that are long for their tiles are split", "[cuda]") {
  const auto product = [](const std::vector<ConvShape<1>>& shapes) {
    const std::vector<PlannedForm> forms{shapes};
    const ContractionPlan plan(forms, {.gradient = false, .least_unfolded = Index{1} << 40});
    const cuda::detail::Job job = plan.forward().jobs.front();
    CHECK(plan.forward().phases.size() == (job.splits > 1 ? 2 : 1));
    return job;
  };
  const cuda::detail::Job lonely = product({{.out = 392, .in = 64}, {.out = 16, .in = 392}});
  CHECK(lonely.splits == 4);  // of 13 steps
  CHECK(lonely.split_k == 128);
  CHECK_FALSE(lonely.shares_pairs());
  CHECK(product({{.out = 256, .in = 64}, {.out = 16, .in = 256}}).splits == 1);
  CHECK(product({{.out = 392, .in = 1024}, {.out = 256, .in = 392}}).splits == 1);  // 256 tiles
  const auto kernels = [&](Index size) {
    return product(
        {{.out = 8, .in = 32, .kernel_size = size}, {.out = 32, .in = 8, .kernel_size = size}});
  };
  CHECK(kernels(12).splits == 1);
  const cuda::detail::Job pairs = kernels(13);
  CHECK(pairs.splits == 4);
  CHECK(pairs.shares_pairs());
}

TEST_CASE("a phase begins with its longest sums", "[cuda]") {
  std::vector<PlannedForm> forms;
  for (const Index k : {32, 256, 64, 128, 96}) {
    forms.emplace_back(std::vector<ConvShape<0>>{{.out = k, .in = 32}, {.out = 32, .in = k}});
  }
  const ContractionPlan plan(forms, {.gradient = false});
  std::vector<int> sums, tiles;
  for (const cuda::detail::Job& job : plan.forward().jobs) {
    sums.push_back(job.k);
    tiles.push_back(job.first_tile);
  }
  CHECK(sums == std::vector{256, 128, 96, 64, 32});
  CHECK(tiles == std::vector{0, 1, 2, 3, 4});
}

TEST_CASE("a large product of kernels is one matrix product, its gradient two", "[cuda]") {
  for (const Index channels : {128, 256, 512}) {
    const std::vector<PlannedForm> forms{PlannedForm(std::vector<ConvShape<2>>(
        2, {.out = channels, .in = channels, .kernel_size = 3, .bias = true}))};
    const ContractionPlan plan(forms, {.math = cuda::Math::fp32});
    REQUIRE(plan.forward().gemms.size() == 1);
    CHECK(plan.backward().gemms.size() == 2);
    const cuda::detail::Gemm& gemm = plan.forward().gemms.front();
    CHECK(gemm.m == 9 * channels);
    CHECK(gemm.n == 9 * channels);
    CHECK(gemm.k == channels);
  }
}

TEST_CASE("branches are added in a phase of their own, whatever their number", "[cuda]") {
  Rng rng(1);
  const ConvShape<2> shape{.out = 8, .in = 8, .kernel_size = 3, .padding = 1};
  const auto repvgg = RepVgg<float, 2>::initialize(shape, rng);
  const auto square = small_integers<float>(shape, rng), another = square;
  const auto phases = [](const std::vector<PlannedForm>& forms) {
    const ContractionPlan plan(forms);
    CHECK(plan.forward().phases.size() == plan.backward().phases.size());
    return plan.forward().phases.size();
  };
  CHECK(phases({square}) == 1);
  CHECK(phases({square + another}) == 1);
  CHECK(phases({sum(std::vector(9, ConvView<const float, 2>(square)))}) == 1);
  CHECK(phases({repvgg.expression()}) == 2);  // batch norms, then the branches
  CHECK(phases({repvgg.expression(), repvgg.expression(), square + another}) == 2);
}

TEST_CASE("whatever has a form is planned", "[cuda]") {
  Rng rng(2);
  const auto square = small_integers<float>(
      ConvShape<2>{.out = 4, .in = 4, .kernel_size = 3, .padding = 1, .bias = true}, rng);
  const std::vector<ConvShape<2>> shapes{square.shape(), {.out = 2, .in = 4}};
  const std::vector<Conv<float, 2>> layers{square, Conv<float, 2>(shapes[1])};
  const std::vector<PlannedForm> forms{
      square,          ConvView<const float, 2>(square),
      square.shape(),  shapes,
      Form<2>(shapes), layers,
      square + square, channel_scale(std::vector<float>(4, 2)) * square};
  const ContractionPlan plan(forms);
  const auto uses = plan.tensors(TensorUse::Role::layer);
  REQUIRE(uses.size() == 2 * (1 + 1 + 1 + 2 + 2 + 2 + 2 + 2));
  CHECK(uses.back().size == 0);
  CHECK(uses.end()[-2].size == 4);  // a scale is a depthwise 1x1 layer
  CHECK(uses.end()[-2].name() == "form 8, layer 2, weight (conv2d 4->4 @1x1 g4)");
}

TEST_CASE("what cannot be planned is refused", "[cuda]") {
  const auto plan = [](PlannedForm form) {
    const std::vector<PlannedForm> forms{std::move(form)};
    return ContractionPlan(forms);
  };
  using Shapes = std::vector<ConvShape<2>>;
  CHECK_THROWS_AS(plan(Shapes{}), ShapeError);
  CHECK_THROWS_AS(plan(Shapes{{.out = 3, .in = 2}, {.out = 3, .in = 2}}), ShapeError);
  const Shapes padded{{.out = 2, .in = 2, .bias = true},
                      {.out = 2, .in = 2, .kernel_size = 3, .padding = 1}};
  CHECK_THROWS_AS(plan(padded), InexactError);
  CHECK_NOTHROW(plan(PlannedForm(padded, interior_only)));
  const ConvShape<2> twice{.out = 2, .in = 2, .kernel_size = 3, .stride = 2, .padding = 1};
  const Shapes at_even{{.out = 2, .in = 2, .kernel_size = 3, .padding = 1}, twice};
  CHECK_THROWS_AS(plan(at_even), InexactError);
  CHECK_THROWS_AS(plan(PlannedForm(at_even, exact_at(7, 7))), InexactError);
  const Conv<float, 2> strided(twice), dense(at_even.front()),
      unequal(ConvShape<2>{.out = 2, .in = 2, .kernel_size = 3});
  CHECK_THROWS_AS(plan(strided + dense), ShapeError);
  CHECK_THROWS_AS(plan(dense + unequal), ShapeError);
  const Conv<float, 2> pooled(ConvShape<2>{.out = 2, .in = 2, .kernel_size = 2, .stride = 2});
  CHECK_THROWS_AS(plan(strided + pooled), ShapeError);
  CHECK_NOTHROW(plan(PlannedForm(strided + pooled, exact_at(8, 8))));
  CHECK_THROWS_AS(plan(Shapes{{.out = 1 << 16, .in = 1 << 16}}), SizeError);
  const std::vector<PlannedForm> many(
      257, PlannedForm(Shapes{{.out = 1, .in = 1}, {.out = 1, .in = 1}}));
  CHECK(message_of<SizeError>([&] { ContractionPlan{many}; }).find("2048") != std::string::npos);
  CHECK(ContractionPlan(std::span<const PlannedForm>()).forward().launches.empty());
  for (const PlanOptions& options : {PlanOptions{.least_gemm = 0}, PlanOptions{.wanted_tiles = 0},
                                     PlanOptions{.least_split = 0}}) {
    CHECK_THROWS_AS(ContractionPlan(std::span<const PlannedForm>(), options), SizeError);
  }
}

TEST_CASE("a plan names its tensors", "[cuda]") {
  const std::vector<PlannedForm> forms{
      PlannedForm(std::vector<ConvShape<1>>{{.out = 2, .in = 1, .kernel_size = 3, .bias = true},
                                            {.out = 4, .in = 2}}),
      PlannedForm(std::vector<ConvShape<0>>{{.out = 2, .in = 3}})};
  const ContractionPlan plan(forms);
  REQUIRE(plan.tensors().size() == 20);
  CHECK(plan.tensors()[0].name() == "form 1, layer 1, weight (conv1d 1->2 @3 +bias)");
  CHECK(plan.tensors()[1].size == 2);
  CHECK(plan.tensors()[3].size == 0);
  CHECK(plan.tensors(TensorUse::Role::result).size() == 4);
  CHECK(plan.tensors(TensorUse::Role::result)[1].name() ==
        "form 1, result, bias (conv1d 1->4 @3 +bias)");
  CHECK(plan.tensors(TensorUse::Role::layer_gradient).back().name() ==
        "form 2, gradient of layer 1, bias (linear 3->2)");
}

}  // namespace
}  // namespace concertina::test
