// A network's layers contracted on a device, by a project that has the library installed.
// SPDX-License-Identifier: Apache-2.0
#include <concertina/cuda/contraction.cuh>

#include <cstdio>
#include <vector>

int main() {
  using concertina::ConvShape;
  namespace cuda = concertina::cuda;
  const std::vector<ConvShape<2>> shapes{{.out = 4, .in = 2},
                                         {.out = 3, .in = 4, .kernel_size = 3}};
  const std::vector<cuda::PlannedForm> forms{shapes};
  const cuda::ContractionPlan plan(forms);

  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::puts("planned; there is no CUDA device to run it");
    return plan.forward().phases.size() == 1 ? 0 : 1;
  }
  std::vector<cuda::Buffer<float>> weights;
  for (const auto& use : plan.tensors(cuda::TensorUse::Role::layer)) {
    if (!use.bias) {
      const std::vector<float> ones(static_cast<std::size_t>(use.size), 1.0F);
      weights.emplace_back(ones, "a layer");
    }
  }
  const cuda::Buffer<float> product(3 * 2 * 9, "the product");
  const std::vector<cuda::DeviceLayer<const float>> layers{{weights[0].span()},
                                                           {weights[1].span()}};
  const std::vector<cuda::DeviceLayer<float>> results{{product.span()}};
  cuda::Contraction<float> contraction(plan);
  contraction.forward(layers, results, nullptr);
  std::vector<float> elements(3 * 2 * 9);
  product.copy_to(elements, "the product");
  for (const float element : elements) {
    if (element != 4.0F) return 1;  // the sum over the four channels between
  }
  return 0;
}
