// SPDX-License-Identifier: Apache-2.0
#include "networks.hpp"

#include <concertina/contract.hpp>
#include <concertina/expand.hpp>

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

std::vector<cuda::Chain> smallnet(bool ck) {
  const auto conv = [](Index out, Index in) {
    return ConvShape<2>{.out = out, .in = in, .kernel_size = 7, .padding = 3, .bias = true};
  };
  const auto expand = ck ? &expand_ck<2> : &expand_cl<2>;
  const auto first = expand(conv(8, 3), first_layer(32, 3)), second = expand(conv(16, 8), {}),
             third = expand(conv(32, 16), {});
  return {cuda::Chain(first), cuda::Chain(second), cuda::Chain(third)};
}
std::vector<cuda::Chain> with_linear(std::vector<cuda::Chain> chains) {
  chains.emplace_back(expand_fc({.out = 64, .in = 512, .bias = true}));
  return chains;
}

std::vector<cuda::Chain> mobilenet() {
  std::vector<cuda::Chain> chains;
  chains.emplace_back(
      expand_cl<2>({.out = 32, .in = 3, .kernel_size = 3, .stride = 2, .padding = 1}));
  constexpr std::array<Index, 14> widths{32,  64,  128, 128, 256, 256,  512,
                                         512, 512, 512, 512, 512, 1024, 1024};
  for (std::size_t l = 0; l + 1 < widths.size(); ++l) {
    const Index in = widths[l], stride = widths[l + 1] > in && in > 32 ? 2 : 1;
    chains.emplace_back(expand_cl<2>(
        {.out = in, .in = in, .kernel_size = 3, .stride = stride, .padding = 1, .groups = in}));
  }
  return chains;
}

std::vector<cuda::Chain> alexnet() {
  ExpandOptions widths{.rate = 4, .widths = std::vector<Index>{12, 256, 256, 256}};
  return {cuda::Chain(expand_ck<2>(
              {.out = 64, .in = 3, .kernel_size = 11, .stride = 4, .padding = 2, .bias = true},
              widths)),
          cuda::Chain(
              expand_ck<2>({.out = 192, .in = 64, .kernel_size = 5, .padding = 2, .bias = true}))};
}

std::vector<cuda::Chain> unet() {
  return {cuda::Chain(expand_cl<2>({.out = 512, .in = 512, .kernel_size = 3, .bias = true}))};
}

}  // namespace

std::vector<NamedChains> networks() {
  return {{"SmallNet_CL", smallnet(false)},
          {"SmallNet_CK", smallnet(true)},
          {"SmallNet_CL_FC", with_linear(smallnet(false))},
          {"SmallNet_CK_FC", with_linear(smallnet(true))},
          {"MobileNet_CL", mobilenet()},
          {"AlexNet_CK_11_5", alexnet()},
          {"UNet_CL_512", unet()}};
}

bool are_contracted(const std::vector<cuda::Chain>& chains,
                    const std::vector<std::vector<float>>& layers,
                    const std::vector<std::vector<float>>& results) {
  auto tensor = layers.begin();
  auto result = results.begin();
  return std::ranges::all_of(chains, [&](const cuda::Chain& chain) {
    return chain.visit([&]<int Rank>(const cuda::Chain::Of<Rank>& of) {
      std::vector<ConvView<float, Rank>> views;
      for (const ConvShape<Rank>& shape : of.layers) {
        views.emplace_back(shape, tensor[0], tensor[1]);
        tensor += 2;
      }
      const auto expected = contract<double>(views, of.policy);
      const auto agree = [](std::span<const float> right, const std::vector<float>& found) {
        float largest = 0;
        for (const float number : right) largest = std::max(largest, std::abs(number));
        return std::ranges::equal(
            right, found, [&](float a, float b) { return std::abs(a - b) <= 1e-3F * largest; });
      };
      const bool right = agree(expected.weight(), result[0]) && agree(expected.bias(), result[1]);
      result += 2;
      return right;
    });
  });
}

}  // namespace concertina::benchmarks
