// SPDX-License-Identifier: Apache-2.0
#include <concertina/cuda/detail/phase_program.hpp>

#ifdef CONCERTINA_ON_DEVICE
#include "on_device.hpp"
#else
#include "on_host.hpp"
#endif
#include "support.hpp"

#include <concertina/blocks.hpp>
#include <concertina/contract.hpp>
#include <concertina/cuda/plan.hpp>
#include <concertina/expand.hpp>
#include <concertina/random.hpp>
#include <concertina/verify.hpp>

#include <Eigen/Core>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <set>
#include <span>
#include <type_traits>
#include <utility>
#include <vector>

namespace concertina::test {
namespace {

using cuda::ContractionPlan, cuda::PlannedForm, cuda::PlanOptions;

/// The form as an expression that views the layers from `next` on.
template <class Scalar, int Rank>
Expr<Scalar, Rank> expression_of(const Form<Rank>& form,
                                 typename std::vector<Conv<Scalar, Rank>>::const_iterator& next) {
  if (form.join() == Join::none) return ConvView<const Scalar, Rank>(*next++);
  std::vector<Expr<Scalar, Rank>> parts;
  for (const Form<Rank>& part : form.parts()) parts.push_back(expression_of<Scalar>(part, next));
  return {form.join(), parts};
}

/// A network's tensors in the order of a plan, and what they must become.
template <class Stored>
class Network {
 public:
  using Sum = typename DefaultAccumulator<Stored>::type;

  /// With integers of up to `most` either side of zero, those of each form's layers times its
  /// factor.
  explicit Network(Rng& rng, Index most = 4, std::vector<Index> factors = {})
      : rng_(rng), most_(most), factors_(std::move(factors)) {}

  template <int Rank>
  void add_form(const Form<Rank>& form) {
    forms_.emplace_back(form, interior_only);
    std::vector<Conv<Sum, Rank>> layers;
    for (const auto& shape : form.leaves()) {
      layers.push_back(
          integers(shape, factors_.empty() ? 1 : factors_[layers.size() % factors_.size()]));
    }
    auto next = layers.cbegin();
    const Expr<Sum, Rank> expression = expression_of<Sum>(form, next);
    Contraction<Sum, Rank> contraction(expression, interior_only);  // nothing in it is fixed
    const Conv<Sum, Rank> result = contraction.forward(expression);
    const Conv<Sum, Rank> gradient = integers(result.shape());
    for (const auto& layer : layers) keep(layers_, layer);
    keep(results_, result);
    keep(result_gradients_, gradient);
    for (const auto& each : contraction.backward(expression, gradient)) {
      keep(layer_gradients_, each);
    }
  }
  template <int Rank>
  void add(const std::vector<ConvShape<Rank>>& shapes) {
    add_form(Form<Rank>(shapes));
  }

  const std::vector<PlannedForm>& forms() const { return forms_; }

  /// Runs both passes of the plan and compares every element.
  void check(const ContractionPlan& plan) {
    if (!can_run()) return;
    Passes<Stored> passes{layers_, blank(results_), result_gradients_, blank(layer_gradients_)};
    run(plan, passes, rng_());
    REQUIRE(passes.results == results_);
    REQUIRE(passes.layer_gradients == layer_gradients_);
  }

 private:
  using Tensors = typename Passes<Stored>::Tensors;

  template <int Rank>
  Conv<Sum, Rank> integers(const ConvShape<Rank>& shape, Index factor = 1) {
    Conv<Sum, Rank> layer(shape);
    for (const std::span<Sum> elements : {layer.weight(), layer.bias()}) {
      for (Sum& element : elements) {
        if constexpr (std::is_same_v<Sum, PrimeField>) {
          element = random_bits(rng_);
        } else {
          element = static_cast<Sum>(factor * random_index(rng_, -most_, most_));
        }
      }
    }
    return layer;
  }

  template <int Rank>
  static void keep(Tensors& to, const Conv<Sum, Rank>& layer) {
    for (const std::span<const Sum> elements : {layer.weight(), layer.bias()}) {
      auto& tensor = to.emplace_back();
      for (const Sum element : elements) {
        tensor.push_back(static_cast<Stored>(element));
        REQUIRE(static_cast<Sum>(tensor.back()) == element);  // or == would not be the assertion
      }
    }
  }
  static Tensors blank(const Tensors& like) {
    Tensors tensors;
    for (const auto& tensor : like) tensors.emplace_back(tensor.size());
    return tensors;
  }
  Rng& rng_;
  Index most_;
  std::vector<Index> factors_;
  std::vector<PlannedForm> forms_;
  Tensors layers_, results_, result_gradients_, layer_gradients_;
};

/// Ways to plan: as a device would have it; in the largest tiles; everything split; unfolded on our
/// own tiles; everything on cuBLAS; and, but for double, on tensor cores, split or not.
template <class Stored>
std::vector<PlanOptions> every_plan(bool with_tensor_cores = true) {
  constexpr bool mixed = sizeof(Stored) < sizeof(float), is_double = sizeof(Stored) == 8;
  constexpr cuda::Math math = std::is_same_v<Stored, PrimeField> ? cuda::Math::prime_field
                              : is_double                        ? cuda::Math::fp64
                                                                 : cuda::Math::fp32;
  const PlanOptions usual{.mixed = mixed, .math = is_double ? math : cuda::Math::bf16x6};
  std::vector<PlanOptions> plans(is_double || !with_tensor_cores ? 5 : 7, usual);
  plans[1].wanted_tiles = 1;
  plans[2].wanted_tiles = 1'000'000, plans[2].least_split = 1;
  plans[3].math = math, plans[3].least_unfolded = 1;
  plans[4].math = math, plans[4].least_unfolded = 1, plans[4].least_gemm = 1;
  for (std::size_t p = 5; p < plans.size(); ++p) {
    plans[p].least_unfolded = plans[p].least_bf16x6 = plans[p].least_bf16x6_terms = 1;
    plans[p].wanted_tiles = p == 5 ? 2 : 1'000'000;
  }
  return plans;
}

template <int Rank>
std::vector<ConvShape<Rank>> random_chain(Rng& rng, const Largest& largest, Index length) {
  std::vector<ConvShape<Rank>> shapes{random_shape<Rank>(rng, largest)};
  while (std::ssize(shapes) < length) {
    shapes.push_back(random_shape_after(shapes.back(), rng, largest));
  }
  return shapes;
}

TEMPLATE_TEST_CASE_SIG("pairs of every geometry are contracted and differentiated on blocks",
                       "[cuda]", ((int Rank), Rank), 0, 1, 2, 3) {
  Rng rng(1);
  for (const PlanOptions& options : every_plan<float>()) {
    for (const ConvShape<Rank>& inner : edge_shapes<Rank>()) {
      Network<float> network(rng);
      network.add<Rank>({inner, random_shape_after(inner, rng)});
      network.add<Rank>({inner, {.out = 3, .in = inner.out, .bias = true}});
      network.add<Rank>({{.out = inner.in, .in = 2, .bias = true}, inner});
      network.add<Rank>({inner});
      network.check(ContractionPlan(network.forms(), options));
    }
  }
}

TEMPLATE_TEST_CASE("networks of random chains are contracted and differentiated on blocks",
                   "[cuda]", float, PrimeField) {
  Rng rng(2);
  for (const PlanOptions& options : every_plan<TestType>()) {
    for (int n = 0; n < 10; ++n) {
      Network<TestType> network(rng);
      const Largest few{.kernel_size = 2};
      network.add(random_chain<0>(rng, {}, random_index(rng, 1, 4)));
      network.add(random_chain<1>(rng, {}, random_index(rng, 1, 4)));
      network.add(random_chain<2>(rng, few, random_index(rng, 1, 4)));
      network.add(random_chain<3>(rng, few, random_index(rng, 1, 3)));
      network.check(ContractionPlan(network.forms(), options));
    }
  }
}

TEST_CASE("tiles, splits and thread counts of every size are contracted on blocks", "[cuda]") {
  Rng rng(3);
  const Index channels = GENERATE(1, 2, 7, 8, 9, 16, 17, 31, 32, 33, 64, 65, 129);
  for (const PlanOptions& options : every_plan<float>(false)) {
    Network<float> network(rng);
    network.add<0>(
        {{.out = channels, .in = 33, .bias = true}, {.out = 12, .in = channels, .bias = true}});
    network.add<2>({{.out = channels, .in = 9, .kernel_size = 2},
                    {.out = 10, .in = channels, .kernel_size = 2, .bias = true}});
    network.add<1>({{.out = 34, .in = channels, .kernel_size = 2, .bias = true},
                    {.out = 35, .in = 34, .kernel_size = 3}});
    network.add<1>({{.out = channels, .in = channels, .groups = channels},
                    {.out = channels, .in = channels, .kernel_size = 3, .groups = channels}});
    network.check(ContractionPlan(network.forms(), options));
  }
}

TEST_CASE("more jobs than a kernel's parameters list are contracted on blocks", "[cuda]") {
  Rng rng(16);
  Network<float> network(rng);
  for (int n = 0; n < 150; ++n) {
    network.add<0>({{.out = 2, .in = 3, .bias = true}, {.out = 4, .in = 2, .bias = true}});
  }
  const ContractionPlan plan(network.forms());
  CHECK(plan.forward().phases.front().last_job > cuda::detail::FirstTiles::most);
  network.check(plan);
}

TEST_CASE("kernels of every geometry are multiplied on cuBLAS", "[cuda]") {
  Rng rng(15);
  for (const bool only_large : {false, true}) {  // or every product, however small
    const PlanOptions options{
        .math = cuda::Math::fp32, .least_unfolded = 1, .least_gemm = only_large ? 20'000 : 1};
    Network<float> network(rng);
    // More columns than a block folds at a time, and more taps.
    network.add<1>({{.out = 3, .in = 300, .kernel_size = 5, .bias = true},
                    {.out = 4, .in = 3, .kernel_size = 4, .bias = true}});
    network.add<2>(
        {{.out = 9, .in = 33, .kernel_size = {3, 9}, .stride = {1, 2}, .dilation = {2, 1}},
         {.out = 5, .in = 9, .kernel_size = {7, 2}, .dilation = {1, 3}, .bias = true}});
    network.add<2>({{.out = 8, .in = 4, .kernel_size = 3, .groups = 2, .bias = true},
                    {.out = 12, .in = 8, .kernel_size = {2, 3}, .groups = 4, .bias = true},
                    {.out = 6, .in = 12, .kernel_size = 3, .dilation = 3, .groups = 3}});
    network.add<3>({{.out = 5, .in = 6, .kernel_size = {3, 1, 2}, .stride = {2, 1, 3}},
                    {.out = 7, .in = 5, .kernel_size = {2, 3, 3}, .bias = true}});
    const ContractionPlan plan(network.forms(), options);
    CHECK_FALSE(plan.forward().gemms.empty());
    network.check(plan);
  }
}

/// Everything on tensor cores.
constexpr PlanOptions tensor_cores(int wanted_tiles = 2) {
  return {.least_unfolded = 1,
          .least_bf16x6 = 1,
          .least_bf16x6_terms = 1,
          .wanted_tiles = wanted_tiles};
}

TEST_CASE("each part of a float is multiplied on tensor cores", "[cuda]") {
  Rng rng(31);
  // Rounded to bfloat16, 262657 leaves 513, and that 1; 257 leaves 1.
  for (const std::vector<Index>& factors :
       {std::vector<Index>{1, 262657}, {262657, 1}, {257, 257}, {1, 1}}) {
    Network<float> network(rng, 1, factors);
    network.add(
        std::vector<ConvShape<0>>{{.out = 60, .in = 50, .bias = true}, {.out = 40, .in = 60}});
    network.add(std::vector<ConvShape<1>>{{.out = 33, .in = 7, .kernel_size = 3},
                                          {.out = 17, .in = 33, .kernel_size = 2, .bias = true}});
    for (const int wanted_tiles : {2, 1'000'000}) {
      network.check(ContractionPlan(network.forms(), tensor_cores(wanted_tiles)));
    }
  }
}

TEST_CASE("whole rounds of tiles and split ones are one product", "[cuda]") {
  Rng rng(33);
  Network<float> network(rng);
  network.add(std::vector<ConvShape<0>>{{.out = 256, .in = 100}, {.out = 300, .in = 256}});
  const ContractionPlan plan(network.forms(), tensor_cores(4));
  const auto is_split_rest = [](const cuda::detail::Job& job) {
    return job.kind == cuda::detail::Job::Kind::multiply_bf16x6 && job.first_c_tile > 0 &&
           job.splits > 1;
  };
  CHECK(std::ranges::any_of(plan.forward().jobs, is_split_rest));
  network.check(plan);
}

TEST_CASE("products on tensor cores are more accurate than sums of floats in order", "[cuda]") {
  if (!can_run()) return;
  Rng rng(32);
  const std::vector<ConvShape<0>> shapes{{.out = 2048, .in = 3}, {.out = 4, .in = 2048}};
  std::vector<Conv<float, 0>> layers;
  for (const auto& shape : shapes) {
    for (float& element : layers.emplace_back(shape).weight()) {
      element = static_cast<float>(random_uniform(rng, 1));
      if (element < 0) element = -element;  // so that nothing cancels
    }
  }
  Passes<float> passes;
  const auto keep = [](auto& to, std::span<const float> elements) {
    to.emplace_back(elements.begin(), elements.end());
    to.emplace_back();
  };
  for (const auto& layer : layers) keep(passes.layers, layer.weight());
  passes.layer_gradients = passes.layers;
  keep(passes.results, std::vector<float>(12));
  passes.result_gradients = passes.results;
  const std::vector<PlannedForm> forms{shapes};
  run(ContractionPlan(forms, tensor_cores()), passes, rng());

  double in_order = 0, on_tensor_cores = 0;  // largest errors
  for (int row = 0; row < 4; ++row) {
    for (int column = 0; column < 3; ++column) {
      double exact = 0;
      float sum = 0;
      for (int k = 0; k < 2048; ++k) {
        const float a = layers[1].weight()[static_cast<std::size_t>(row * 2048 + k)],
                    b = layers[0].weight()[static_cast<std::size_t>(k * 3 + column)];
        exact += static_cast<double>(a) * static_cast<double>(b);
        sum = std::fma(a, b, sum);
      }
      const auto error = [&](float found) {
        return std::abs(static_cast<double>(found) - exact) / exact;
      };
      in_order = std::max(in_order, error(sum));
      on_tensor_cores = std::max(
          on_tensor_cores, error(passes.results[0][static_cast<std::size_t>(row * 3 + column)]));
    }
  }
  CHECK(on_tensor_cores < in_order);
  const double u = std::ldexp(1.0, -std::numeric_limits<float>::digits);
  CHECK(on_tensor_cores <= (76 + 2048 / 32) * u);  // as derived in docs/cuda.md
}

TEST_CASE("groups that fill tiles, with biases, are contracted on blocks", "[cuda]") {
  Rng rng(7);
  const Index groups = GENERATE(2, 3);
  for (const PlanOptions& options : every_plan<float>()) {
    Network<float> network(rng);
    const auto conv = [&](Index out, Index in, Index kernel, Index of_groups) {
      return ConvShape<1>{.out = out * groups,
                          .in = in * groups,
                          .kernel_size = kernel,
                          .groups = of_groups,
                          .bias = true};
    };
    network.add<1>({conv(16, 17, 1, groups), conv(18, 16, 3, groups), conv(33, 18, 1, groups)});
    network.add<1>({conv(16, 16, 3, groups), conv(16, 16, 2, groups)});
    network.add<1>({conv(16, 16, 3, groups), conv(16, 16, 2, 1)});
    network.add<1>({conv(16, 16, 1, 1), conv(16, 16, 3, groups)});
    network.check(ContractionPlan(network.forms(), options));
  }
}

TEST_CASE("sums too long for one block's threads are contracted on blocks", "[cuda]") {
  Rng rng(8);
  for (const PlanOptions& options : every_plan<double>()) {
    Network<double> network(rng);
    network.add<1>({{.out = 300, .in = 3, .kernel_size = 2, .bias = true},
                    {.out = 9, .in = 300, .kernel_size = 9, .bias = true}});
    network.check(ContractionPlan(network.forms(), options));
  }
}

TEST_CASE("partial sums of every number are combined on blocks", "[cuda]") {
  Rng rng(15);
  std::set<int> threads;
  for (const Index k : {11, 12, 16, 17, 21, 31, 33, 49, 64, 65, 98}) {
    Network<float> alone(rng), together(rng);
    alone.add<0>({{.out = k, .in = 9}, {.out = 11, .in = k}});
    together.add<0>({{.out = k, .in = 9, .bias = true}, {.out = 11, .in = k, .bias = true}});
    together.add<1>({{.out = k, .in = 8, .kernel_size = 2},
                     {.out = 33, .in = k, .kernel_size = 2, .bias = true}});
    together.add<1>({{.out = 3, .in = 9, .kernel_size = k, .bias = true},  // pairs, not channels
                     {.out = 10, .in = 3, .kernel_size = 12}});
    for (const int wanted_tiles : {2, 5, 9, 1'000'000}) {
      for (Network<float>* const network : {&alone, &together}) {
        const ContractionPlan plan(network->forms(),
                                   {.wanted_tiles = wanted_tiles, .least_split = 1});
        for (const cuda::detail::Job& job : plan.forward().jobs) {
          if (job.kind == cuda::detail::Job::Kind::combine) threads.insert(job.threads_per_element);
        }
        network->check(plan);
      }
    }
  }
  CHECK(threads == std::set{1, 2, 4, 8});
}

TEST_CASE("every kind of job is run by these tests' plans", "[cuda]") {
  // What a plan chooses follows from sizes; should that change, so must the cases above.
  std::set<std::pair<cuda::detail::Job::Kind, bool>> kinds;
  std::set<int> reducing, combining;  // threads for each element
  bool several_of_groups = false, several_of_taps = false, several_with_epilogue = false;
  for (const PlanOptions& options : every_plan<float>()) {
    const std::vector<PlannedForm> forms{
        PlannedForm(std::vector<ConvShape<1>>{{.out = 33, .in = 34},
                                              {.out = 35, .in = 33, .kernel_size = 3}}),
        PlannedForm(
            std::vector<ConvShape<1>>{{.out = 129, .in = 9, .kernel_size = 2},
                                      {.out = 10, .in = 129, .kernel_size = 2, .bias = true}}),
        PlannedForm(
            std::vector<ConvShape<1>>{{.out = 300, .in = 3, .kernel_size = 2, .bias = true},
                                      {.out = 9, .in = 300, .kernel_size = 9, .bias = true}}),
        PlannedForm(std::vector<ConvShape<1>>{{.out = 4, .in = 4, .groups = 2},
                                              {.out = 4, .in = 4, .kernel_size = 3}}),
        PlannedForm(std::vector<ConvShape<1>>{
            {.out = 200, .in = 200, .kernel_size = 2, .groups = 100, .bias = true},
            {.out = 200, .in = 200, .kernel_size = 3, .groups = 100}}),
        Form<1>(detail::AnyForm(
            Join::sum, std::vector<detail::AnyForm>{
                           detail::AnyShape(ConvShape<1>{.out = 2, .in = 2}),
                           detail::AnyShape(ConvShape<1>{.out = 2, .in = 2, .groups = 2})}))};
    const ContractionPlan plan(forms, options);
    for (const auto* sequence : {&plan.forward(), &plan.backward()}) {
      for (const cuda::detail::Job& job : sequence->jobs) {
        kinds.insert({job.kind, job.splits > 1});
        several_of_groups |= job.has_several && job.groups > 1;
        several_of_taps |= job.has_several && job.taps > 1;
        several_with_epilogue |= job.has_several && job.epilogue.u.exists();
        if (job.kind == cuda::detail::Job::Kind::reduce) reducing.insert(job.threads_per_element);
        if (job.kind == cuda::detail::Job::Kind::combine) combining.insert(job.threads_per_element);
      }
    }
  }
  using Kind = cuda::detail::Job::Kind;
  for (const Kind kind :
       {Kind::multiply, Kind::multiply_small, Kind::multiply_narrow, Kind::reduce, Kind::fold,
        Kind::unfold, Kind::copy, Kind::add_branches, Kind::take_branch}) {
    CAPTURE(static_cast<int>(kind));
    CHECK(kinds.contains({kind, false}));
  }
  CHECK(kinds.contains({Kind::multiply_small, true}));
  CHECK(kinds.contains({Kind::multiply_narrow, true}));
  CHECK(kinds.contains({Kind::combine, true}));
  CHECK(kinds.contains({Kind::multiply_bf16x6, false}));
  CHECK(kinds.contains({Kind::multiply_bf16x6, true}));
  CHECK(kinds.contains({Kind::combine_tiles, true}));
  CHECK(several_of_groups);
  CHECK(several_of_taps);
  CHECK(several_with_epilogue);
  CHECK(*reducing.begin() == 1);
  CHECK(*reducing.rbegin() == cuda::detail::contraction_threads);
  CHECK(*combining.rbegin() == cuda::detail::tuning::most_combining_threads);
}

TEST_CASE("a depthwise chain is one sum for each element, on blocks", "[cuda]") {
  Rng rng(27);
  for (const Index groups : {1, 5, 300}) {
    Network<float> network(rng);
    const auto add = [&](Index i, Index j, ConvShape<2> middle, bool bias = false) {
      middle.out = groups * i;
      middle.in = groups * j;
      middle.groups = groups;
      network.add<2>({{.out = groups * j, .in = groups, .groups = groups},
                      middle,
                      {.out = groups, .in = groups * i, .groups = groups, .bias = bias}});
    };
    add(1, 1, {});
    add(4, 4, {.kernel_size = 3, .padding = 1}, true);
    add(2, 3, {.kernel_size = {1, 4}, .stride = 2, .dilation = {2, 3}});
    add(3, 9, {.kernel_size = 2}, true);
    for (const PlanOptions& options : every_plan<float>()) {
      const ContractionPlan plan(network.forms(), options);
      using Kind = cuda::detail::Job::Kind;
      CHECK(plan.forward().phases.size() == 1);
      CHECK(plan.backward().phases.size() == 1);
      CHECK(std::ranges::count(plan.forward().jobs, Kind::depthwise_chain,
                               &cuda::detail::Job::kind) == 4);
      CHECK(std::ranges::count(plan.backward().jobs, Kind::depthwise_chain,
                               &cuda::detail::Job::kind) == 12);
      network.check(plan);
    }
    add(3, 2, {.kernel_size = 2, .bias = true});  // with a bias below another layer it is two
    const ContractionPlan plan(network.forms());
    CHECK(plan.forward().phases.size() == 2);
    network.check(plan);
  }
}

TEMPLATE_TEST_CASE("every scalar is contracted and differentiated on blocks", "[cuda]", float,
                   double, Eigen::half, Eigen::bfloat16, PrimeField) {
  Rng rng(4);
  // One term for each element, so that 8 bits hold every result.
  const std::vector<ConvShape<2>> thin{{.out = 2, .in = 1, .kernel_size = 2},
                                       {.out = 2, .in = 2, .groups = 2},
                                       {.out = 2, .in = 2, .kernel_size = 1, .groups = 2}};
  for (const PlanOptions& options : every_plan<TestType>()) {
    Network<TestType> network(rng);
    network.add(thin);
    network.add(std::vector<ConvShape<0>>{{.out = 1, .in = 1}, {.out = 1, .in = 1}});
    network.check(ContractionPlan(network.forms(), options));
  }
}

TEMPLATE_TEST_CASE("half precision fills tiles, splits sums and adds biases", "[cuda]", Eigen::half,
                   Eigen::bfloat16) {
  Rng rng(9);
  for (const PlanOptions& options : every_plan<TestType>()) {
    Network<TestType> network(rng, 1);  // small enough that results have few bits
    network.add(std::vector<ConvShape<0>>{{.out = 16, .in = 8, .bias = true},
                                          {.out = 9, .in = 16, .bias = true}});
    network.add(std::vector<ConvShape<1>>{{.out = 16, .in = 8, .bias = true},
                                          {.out = 9, .in = 16, .kernel_size = 3, .bias = true}});
    network.check(ContractionPlan(network.forms(), options));
  }
}

TEMPLATE_TEST_CASE("the paper's expansions are contracted and differentiated on blocks", "[cuda]",
                   double, PrimeField) {
  Rng rng(5);
  const ConvShape<2> compact{.out = 8, .in = 4, .kernel_size = 5, .padding = 2, .bias = true};
  ConvShape<2> depthwise{
      .out = 8, .in = 8, .kernel_size = 3, .padding = 1, .groups = 8, .bias = true};
  const ConvShape<0> linear{.out = 10, .in = 24, .bias = true};
  for (const PlanOptions& options : every_plan<TestType>()) {
    Network<TestType> network(rng);
    network.add(expand_cl(compact, {.rate = 2}));
    network.add(expand_ck(compact, {.rate = 2}));
    network.add(expand_cl(depthwise, {.rate = 2}));
    network.add(expand_fc(linear, {.rate = 2}));
    const ContractionPlan plan(network.forms(), options);
    network.check(plan);
    CHECK((plan.forward().gemms.empty() || plan.backward().gemms.size() >= 2));
    CHECK(plan.backward().multiply_adds == 2 * plan.forward().multiply_adds);
  }
}

// ---- sums and concatenations --------------------------------------------------------------------

/// What every branch of a sum must have in common: channels and, along each axis, stride and
/// padding.start + padding.end + 1 - effective kernel size.
template <int Rank>
struct Ends {
  Index out, in;
  PerAxis<Rank> stride, growth;
};

/// Draws forms of these ends.
template <int Rank>
class RandomForms {
 public:
  RandomForms(Rng& rng, Index most_kernel_size = 3) : rng_(rng), most_(most_kernel_size) {}

  detail::AnyForm leaf(const Ends<Rank>& ends) {
    ConvShape<Rank> shape{
        .out = ends.out, .in = ends.in, .stride = ends.stride, .bias = draw(0, 1) == 1};
    const Index common = std::gcd(ends.out, ends.in);
    do {
      shape.groups = draw(1, common);
    } while (common % shape.groups != 0);
    for (int axis = 0; axis < Rank; ++axis) {
      shape.kernel_size[axis] = draw(1, most_);
      shape.dilation[axis] = draw(1, 2);
      Padding<Rank>& padding = shape.padding;
      padding.start[axis] = draw(-1, 2);
      padding.end[axis] =
          ends.growth[axis] + effective_kernel_size(shape, axis) - 1 - padding.start[axis];
    }
    return detail::AnyShape(shape);
  }

  detail::AnyForm join(Join join, const Ends<Rank>& ends, int depth) {
    std::vector<detail::AnyForm> parts;
    if (join == Join::chain) {
      Ends<Rank> inner = ends, outer = ends;
      inner.out = outer.in = draw(1, 6);
      const bool strides_first = draw(0, 1) == 1;
      (strides_first ? outer : inner).stride = 1;
      for (int axis = 0; axis < Rank; ++axis) {
        outer.growth[axis] = draw(-1, 1);
        inner.growth[axis] = ends.growth[axis] - inner.stride[axis] * outer.growth[axis];
      }
      return {join, std::vector{form(inner, depth), form(outer, depth)}};
    }
    for (Index count = draw(2, 3); count > 0; --count) {
      Ends<Rank> part = ends;
      if (detail::splits_outputs(join)) part.out = draw(1, 4);
      if (detail::splits_inputs(join)) part.in = draw(1, 4);
      parts.push_back(form(part, depth));
    }
    return {join, parts};
  }

  detail::AnyForm form(const Ends<Rank>& ends, int depth) {
    if (depth == 0 || draw(0, 3) == 0) return leaf(ends);
    // Concatenations choose their own channels, so below the top they would have to fit.
    return join(draw(0, 1) == 1 ? Join::chain : Join::sum, ends, depth - 1);
  }

  Ends<Rank> ends() {
    Ends<Rank> ends{.out = 2 * draw(1, 3), .in = 2 * draw(1, 3), .stride = {}, .growth = {}};
    for (int axis = 0; axis < Rank; ++axis) {
      ends.stride[axis] = draw(1, 2);
      ends.growth[axis] = draw(-2, 1);
    }
    return ends;
  }

 private:
  Index draw(Index least, Index most) { return random_index(rng_, least, most); }

  Rng& rng_;
  Index most_;
};

TEMPLATE_TEST_CASE_SIG("branches of every geometry are joined and differentiated on blocks",
                       "[cuda]", ((int Rank), Rank), 0, 1, 2, 3) {
  Rng rng(10);
  RandomForms<Rank> random(rng, Rank == 3 ? 2 : 3);
  for (const PlanOptions& options : every_plan<double>()) {
    Network<double> network(rng);
    for (const Join join :
         {Join::sum, Join::concat_outputs, Join::concat_inputs, Join::direct_sum}) {
      for (int n = 0; n < 6; ++n) {
        network.add_form(Form<Rank>(random.join(join, random.ends(), 0)));  // of leaves
      }
    }
    network.check(ContractionPlan(network.forms(), options));
  }
}

TEMPLATE_TEST_CASE_SIG("nested chains of sums and sums of chains are contracted on blocks",
                       "[cuda]", ((int Rank), Rank), 0, 1, 2) {
  Rng rng(11);
  RandomForms<Rank> random(rng, 2);
  for (const PlanOptions& options : every_plan<double>()) {
    Network<double> network(rng, 2);
    for (const Join join :
         {Join::chain, Join::sum, Join::concat_outputs, Join::concat_inputs, Join::direct_sum}) {
      for (int n = 0; n < 4; ++n) {
        network.add_form(Form<Rank>(random.join(join, random.ends(), 2)));
      }
    }
    // A concatenation that another one undoes, inside a chain.
    const auto wide = [&](Index out, Index in) {
      return random.leaf({.out = out, .in = in, .stride = 1, .growth = 0});
    };
    const detail::AnyForm cut(Join::concat_outputs, std::vector{wide(2, 3), wide(4, 3)}),
        joined(Join::concat_inputs, std::vector{wide(5, 2), wide(5, 4)});
    network.add_form(
        Form<Rank>(detail::AnyForm(Join::chain, std::vector{cut, joined, wide(2, 5)})));
    network.check(ContractionPlan(network.forms(), options));
  }
}

TEST_CASE("branches that fill several tiles are joined on blocks", "[cuda]") {
  Rng rng(12);
  using Branches = std::vector<detail::AnyForm>;
  const auto leaf = [](const ConvShape<2>& shape) {
    return detail::AnyForm(detail::AnyShape(shape));
  };
  const Index groups = GENERATE(1, 2, 8, 16);
  for (const PlanOptions& options : every_plan<float>()) {
    Network<float> network(rng);
    network.add_form(Form<2>(detail::AnyForm(
        Join::sum,
        Branches{
            leaf({.out = 32, .in = 16, .kernel_size = 3, .padding = 1, .groups = groups}),
            leaf({.out = 32, .in = 16, .kernel_size = {1, 3}, .padding = {0, 1}, .bias = true}),
            leaf({.out = 32,
                  .in = 16,
                  .kernel_size = 3,
                  .padding = 2,
                  .dilation = 2,
                  .groups = 2 * groups > 16 ? 16 : 2 * groups,
                  .bias = true}),
            leaf({.out = 32, .in = 16, .groups = 16})})));
    network.check(ContractionPlan(network.forms(), options));
  }
}

/// What contracts in half precision is added up before it is rounded.
TEMPLATE_TEST_CASE("half precision adds branches", "[cuda]", Eigen::half, Eigen::bfloat16) {
  Rng rng(13);
  RandomForms<2> random(rng);
  for (const PlanOptions& options : every_plan<TestType>()) {
    Network<TestType> network(rng, 1);
    network.add_form(Form<2>(random.join(Join::sum, random.ends(), 0)));
    network.add_form(Form<2>(random.join(Join::concat_outputs, random.ends(), 0)));
    network.check(ContractionPlan(network.forms(), options));
  }
}

TEMPLATE_TEST_CASE("blocks are contracted side by side, batch norms as 1x1 depthwise layers",
                   "[cuda]", double, PrimeField) {
  Rng rng(14);
  const ConvShape<2> shape{.out = 8, .in = 8, .kernel_size = 3, .padding = 1, .groups = 2};
  const auto acnet = AcNet<double>::initialize(shape, rng);
  const auto repvgg = RepVgg<double, 2>::initialize(shape, rng);
  const auto branches = DiverseBranchBlock<double, 2>::initialize(shape, rng);
  const auto mobile_one = MobileOne<double, 2>::initialize(shape, 2, rng);
  const auto orepa = [&] {
    using Chain = std::vector<Conv<double, 2>>;
    const auto factors = [&] {
      std::vector<double> of_channels(8);
      for (double& factor : of_channels) factor = random_uniform(rng, 1);
      return of_channels;
    };
    const Conv<double, 2> dense({.out = 8, .in = 8, .kernel_size = 3, .padding = 1}),
        down({.out = 6, .in = 8}), up({.out = 8, .in = 6, .kernel_size = 3, .padding = 1});
    return Orepa<double, 2>{.branches = {{.layers = Chain{dense}, .factors = factors()},
                                         {.layers = Chain{down, up}, .factors = factors()}},
                            .norm = BatchNorm<double>::initialize(8)};
  }();
  const ConvShape<2> norm{.out = 8, .in = 8, .groups = 8, .bias = true};
  CHECK(std::ranges::count(Form(repvgg.expression()).leaves(), norm) == 3);
  for (const PlanOptions& options : every_plan<TestType>()) {
    Network<TestType> network(rng);
    network.add_form(Form(acnet.expression()));
    network.add_form(Form(repvgg.expression()));
    network.add_form(Form(branches.expression()));
    network.add_form(Form(mobile_one.expression()));
    network.add_form(Form(orepa.expression()));
    network.check(ContractionPlan(network.forms(), options));
  }
}

#ifndef CONCERTINA_ON_DEVICE
TEST_CASE("a phase that reads what it writes is found", "[cuda]") {
  const std::vector<PlannedForm> forms{PlannedForm(
      std::vector<ConvShape<0>>{{.out = 9, .in = 8}, {.out = 7, .in = 9}, {.out = 6, .in = 7}})};
  const ContractionPlan plan(forms);
  cuda::detail::Sequence sequence = plan.forward();
  REQUIRE(sequence.phases.size() == 2);
  cuda::detail::Phase &first = sequence.phases[0], &second = sequence.phases[1];
  for (int index = second.first_job; index < second.last_job; ++index) {
    sequence.jobs[static_cast<std::size_t>(index)].first_tile += first.tiles;
  }
  first.tiles += second.tiles;
  first.last_job = second.last_job;
  sequence.launches = {{cuda::detail::Launch::Kind::phase, 0}};
  std::vector<std::vector<float>> tensors;
  cuda::detail::Addresses<ContractionPlan::most_tensors> addresses{};
  std::vector<float> workspace(static_cast<std::size_t>(plan.workspace()));
  Memory memory(GENERATE(1, 2, 3));
  memory.lend_unwritten(workspace);
  for (const auto& use : plan.tensors()) {
    auto& tensor = tensors.emplace_back(static_cast<std::size_t>(use.size));
    addresses.at[tensors.size() - 1] = tensor.data();
    memory.lend(tensor);
  }
  CHECK_THROWS_AS((execute<float, float>(sequence, addresses, workspace.data(), 2, memory)),
                  ProgramError);
}
#endif

/// The most additions and products that an element of a pass's results has gone through.
Index longest_sum(const cuda::detail::Sequence& sequence) {
  Index sum = 0;
  for (const cuda::detail::Phase& phase : sequence.phases) {
    Index longest = 0;
    for (int index = phase.first_job; index < phase.last_job; ++index) {
      const cuda::detail::Job& job = sequence.jobs[static_cast<std::size_t>(index)];
      Index terms = job.splits + 2;  // and what the epilogue adds
      for (int t = job.first_tap; t < job.first_tap + job.taps; ++t) {
        const cuda::detail::Tap& tap = sequence.taps[static_cast<std::size_t>(t)];
        const Index pairs = tap.last_pair - tap.first_pair;  // a fold adds them up
        terms = std::max<Index>(terms, std::max(job.k, 1) * pairs + 2);
      }
      longest = std::max(longest, terms);
    }
    sum += longest;
  }
  for (const cuda::detail::Gemm& gemm : sequence.gemms) sum += gemm.k;
  return sum;
}

TEST_CASE("floats on blocks are within the certified bound, gradients within theirs", "[cuda]") {
  if (!can_run()) return;
  Rng rng(6);
  const ConvShape<2> compact{.out = 8, .in = 4, .kernel_size = 5, .padding = 2, .bias = true};
  for (const auto& shapes : {expand_cl(compact, {.rate = 2}), expand_ck(compact, {.rate = 2})}) {
    const auto layers = initialize<float>(shapes, rng);
    Contraction<double, 2> exact(shapes), sizes(shapes);
    std::vector<Conv<double, 2>> wide, absolute;
    const auto absolute_of = [](Conv<double, 2> layer) {
      for (double& element : layer.weight()) element = std::abs(element);
      for (double& element : layer.bias()) element = std::abs(element);
      return layer;
    };
    for (const auto& layer : layers) {
      wide.push_back(layer.cast<double>());
      absolute.push_back(absolute_of(wide.back()));
    }
    exact.forward(wide);
    sizes.forward(absolute);
    Conv<float, 2> gradient(exact.shape());
    for (float& element : gradient.weight()) element = static_cast<float>(random_uniform(rng, 1));
    for (float& element : gradient.bias()) element = static_cast<float>(random_uniform(rng, 1));
    const Conv<double, 2> wide_gradient = gradient.cast<double>(),
                          absolute_gradient = absolute_of(wide_gradient);
    const auto gradients = exact.backward(wide, wide_gradient);
    const auto bounds = sizes.backward(absolute, absolute_gradient);

    for (PlanOptions options : every_plan<float>()) {
      const std::vector<PlannedForm> forms{shapes};
      options.least_bf16x6_terms = std::max(options.least_bf16x6_terms, 80);
      const ContractionPlan plan(forms, options);
      Passes<float> passes;
      const auto keep = [](auto& to, const Conv<float, 2>& layer) {
        to.emplace_back(layer.weight().begin(), layer.weight().end());
        to.emplace_back(layer.bias().begin(), layer.bias().end());
      };
      for (const auto& layer : layers) {
        keep(passes.layers, layer);
        keep(passes.layer_gradients, layer);
      }
      keep(passes.results, gradient);
      keep(passes.result_gradients, gradient);
      run(plan, passes, rng());

      const Report report = prove_rounding(
          layers, Conv<float, 2>(exact.shape(), passes.results[0], passes.results[1]));
      INFO(report);
      CHECK(report);
      // Gradients read what forward computed, so both passes' roundings add up.
      const auto n =
          static_cast<double>(longest_sum(plan.forward()) + longest_sum(plan.backward()));
      const double u = std::numeric_limits<float>::epsilon() / 2, gamma = n * u / (1 - n * u);
      for (std::size_t l = 0; l < layers.size(); ++l) {
        const auto within = [&](const std::vector<float>& found, std::span<const double> right,
                                std::span<const double> size) {
          for (std::size_t i = 0; i < found.size(); ++i) {
            REQUIRE(std::abs(static_cast<double>(found[i]) - right[i]) <= gamma * size[i]);
          }
        };
        within(passes.layer_gradients[2 * l], gradients[l].weight(), bounds[l].weight());
        within(passes.layer_gradients[2 * l + 1], gradients[l].bias(), bounds[l].bias());
      }
    }
  }
}

}  // namespace
}  // namespace concertina::test
