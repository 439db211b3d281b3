// Layers contracted on a GPU: planned on the host from shapes alone, run where the weights are.
// SPDX-License-Identifier: Apache-2.0
#include <concertina/cuda/contraction.cuh>

#include <cstdio>
#include <cstdlib>
#include <vector>

int main() {
  using concertina::ConvShape;
  namespace cuda = concertina::cuda;
  // 2 channels, 4 hidden ones, 3 channels; a plan may hold a whole network of such forms.
  const std::vector<ConvShape<2>> shapes{{.out = 4, .in = 2, .padding = 1},
                                         {.out = 3, .in = 4, .kernel_size = 3}};
  const cuda::ContractionPlan plan(std::vector<cuda::PlannedForm>{shapes});
  std::printf("planned: %zu launches forward, %zu backward\n", plan.forward().launches.size(),
              plan.backward().launches.size());

  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::puts("there is no CUDA device to run it");
    return EXIT_SUCCESS;
  }
  const std::vector<float> ones(4 * 2, 1.0F), twos(3 * 4 * 9, 2.0F);
  const cuda::Buffer<float> first(ones, "a layer"), second(twos, "a layer"),
      kernel(3 * 2 * 9, "the kernel"), first_gradient(ones.size(), "a gradient"),
      second_gradient(twos.size(), "a gradient");
  const std::vector<cuda::DeviceLayer<const float>> layers{{first.span()}, {second.span()}};
  const std::vector<cuda::DeviceLayer<float>> results{{kernel.span()}},
      gradients{{first_gradient.span()}, {second_gradient.span()}};

  cuda::Contraction<float> contraction(plan);
  contraction.forward(layers, results, nullptr);  // the default stream; nothing waits
  // As if the loss were half the sum of squares: its gradient with respect to the kernel is the
  // kernel.
  const std::vector<cuda::DeviceLayer<const float>> result_gradients{{kernel.span()}};
  contraction.backward(layers, result_gradients, gradients, nullptr);

  std::vector<float> elements(3 * 2 * 9), slopes(4 * 2);
  kernel.copy_to(elements, "the kernel");
  first_gradient.copy_to(slopes, "a gradient");
  bool good = true;
  for (const float element : elements) good = good && element == 8.0F;  // 4 hidden, 1 * 2 each
  for (const float slope : slopes)
    good = good && slope == 3 * 9 * 2 * 8.0F;  // outputs, taps, 2 * 8
  std::printf("kernel %g, gradient %g\n", static_cast<double>(elements[0]),
              static_cast<double>(slopes[0]));
  const bool printed = std::fflush(stdout) == 0;
  if (!printed) std::fputs("standard output: not all of it could be written\n", stderr);
  return printed && good ? EXIT_SUCCESS : EXIT_FAILURE;
}
