// SPDX-License-Identifier: Apache-2.0
#include "networks.hpp"

#include <concertina/detail/evaluator.hpp>
#include <concertina/expand.hpp>
#include <concertina/threads.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <span>
#include <utility>

namespace concertina::benchmarks {
namespace {

/// The first layer's expansion keeps the images' channels in its own first layer, as published.
ExpandOptions first_layer(Index wide, std::size_t layers) {
  std::vector<Index> widths(layers - 1, wide);
  widths.front() = 3;
  return {.rate = 4, .widths = std::move(widths)};
}

std::vector<cuda::PlannedForm> smallnet(bool ck) {
  const auto conv = [](Index out, Index in) {
    return ConvShape<2>{.out = out, .in = in, .kernel_size = 7, .padding = 3, .bias = true};
  };
  const auto expand = ck ? &expand_ck<2> : &expand_cl<2>;
  const auto first = expand(conv(8, 3), first_layer(32, 3)), second = expand(conv(16, 8), {}),
             third = expand(conv(32, 16), {});
  return {first, second, third};
}
std::vector<cuda::PlannedForm> with_linear(std::vector<cuda::PlannedForm> forms) {
  forms.emplace_back(expand_fc({.out = 64, .in = 512, .bias = true}));
  return forms;
}

std::vector<cuda::PlannedForm> mobilenet() {
  std::vector<cuda::PlannedForm> forms;
  forms.emplace_back(
      expand_cl<2>({.out = 32, .in = 3, .kernel_size = 3, .stride = 2, .padding = 1}));
  constexpr std::array<Index, 14> widths{32,  64,  128, 128, 256, 256,  512,
                                         512, 512, 512, 512, 512, 1024, 1024};
  for (std::size_t l = 0; l + 1 < widths.size(); ++l) {
    const Index in = widths[l], stride = widths[l + 1] > in && in > 32 ? 2 : 1;
    forms.emplace_back(expand_cl<2>(
        {.out = in, .in = in, .kernel_size = 3, .stride = stride, .padding = 1, .groups = in}));
  }
  return forms;
}

std::vector<cuda::PlannedForm> alexnet() {
  ExpandOptions widths{.rate = 4, .widths = std::vector<Index>{12, 256, 256, 256}};
  return {cuda::PlannedForm(expand_ck<2>(
              {.out = 64, .in = 3, .kernel_size = 11, .stride = 4, .padding = 2, .bias = true},
              widths)),
          cuda::PlannedForm(
              expand_ck<2>({.out = 192, .in = 64, .kernel_size = 5, .padding = 2, .bias = true}))};
}

std::vector<cuda::PlannedForm> unet() {
  return {cuda::PlannedForm(expand_cl<2>({.out = 512, .in = 512, .kernel_size = 3, .bias = true}))};
}

/// So many 3x3 layers one after another.
std::vector<cuda::PlannedForm> kernels(Index channels, std::size_t layers) {
  return {cuda::PlannedForm(
      std::vector<ConvShape<2>>(layers, {.out = channels, .in = channels, .kernel_size = 3}))};
}

}  // namespace

std::vector<NamedForms> networks() {
  return {{"SmallNet_CL", smallnet(false)},
          {"SmallNet_CK", smallnet(true)},
          {"SmallNet_CL_FC", with_linear(smallnet(false))},
          {"SmallNet_CK_FC", with_linear(smallnet(true))},
          {"MobileNet_CL", mobilenet()},
          {"AlexNet_CK_11_5", alexnet()},
          {"UNet_CL_512", unet()},
          {"CK_128", kernels(128, 2)},
          {"CK_256", kernels(256, 2)},
          {"CK_512", kernels(512, 2)},
          {"CK_256_of_3", kernels(256, 3)}};
}

bool are_contracted(const std::vector<cuda::PlannedForm>& forms,
                    const std::vector<std::vector<float>>& layers,
                    const std::vector<std::vector<float>>& results) {
  using concertina::detail::Evaluator, concertina::detail::LayerData, concertina::detail::Program;
  auto layer = layers.begin();
  auto result = results.begin();
  return std::ranges::all_of(forms, [&](const cuda::PlannedForm& form) {
    const Program program(form.tree());
    std::vector<std::vector<double>> tensors;
    for (std::size_t t = 0; t < 2 * program.leaves().size(); ++t, ++layer) {
      tensors.emplace_back(layer->begin(), layer->end());
    }
    std::vector<double> weight(result[0].size()), bias(result[1].size());
    Evaluator<double>(program, Evaluator<double>::Keep::nothing)
        .forward(
            [&](std::size_t leaf) -> LayerData<const double> {
              return {tensors[2 * leaf].data(), tensors[2 * leaf + 1].data()};
            },
            [](std::size_t) {}, {weight.data(), bias.data()}, Threads{});
    const auto agree = [](const std::vector<double>& expected, const std::vector<float>& found) {
      double largest = 0;
      for (const double element : expected) largest = std::max(largest, std::abs(element));
      return std::ranges::equal(expected, found, [&](double a, float b) {
        return std::abs(a - static_cast<double>(b)) <= 1e-3 * largest;
      });
    };
    const bool right = agree(weight, result[0]) && agree(bias, result[1]);
    result += 2;
    return right;
  });
}

}  // namespace concertina::benchmarks
