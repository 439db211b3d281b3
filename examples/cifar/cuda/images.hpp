// The block program that loads the images of a step.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "program.hpp"
#include "training/crop.hpp"

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace cifar::cuda {

/// What a pixel's value becomes, [channel][value], as load_images computes it.
template <class Scalar>
std::vector<Scalar> normalized_values(const std::array<double, 3>& mean,
                                      const std::array<double, 3>& deviation) {
  std::vector<Scalar> values;
  for (std::size_t channel = 0; channel < 3; ++channel) {
    for (int value = 0; value < 256; ++value) {
      values.push_back(static_cast<Scalar>((value / 255.0 - mean[channel]) / deviation[channel]));
    }
  }
  return values;
}

/// The images of a step, to[image][3][32][32]: those of order[step * batch + image], cropped and
/// mirrored if augmented, and normalised.
template <class Scalar>
struct LoadImages {
  static constexpr int threads = detail::program_threads;

  Pass<Scalar> pass;
  Scalar* to;
  int images;

  Index blocks() const { return images; }
  std::size_t shared_bytes() const { return 0; }

  template <ThreadBlock B>
  CONCERTINA_DEVICE void operator()(B& block, Index image) const {
    constexpr int width = side, plane = width * width, size = image_size;
    block.each_thread([&](int thread) {
      const Clock now = block.read(pass.clock);
      const std::uint32_t index = block.read(pass.order + now.step * pass.batch + image);
      const Crop crop = pass.augmented ? crop_of({pass.seed, now.epoch}, index) : Crop{};
      const int top = static_cast<int>(crop.top - crop_border),
                left = static_cast<int>(crop.left - crop_border);
      for (int i = thread; i < size; i += threads) {
        const int channel = i / plane, y = i % plane / width, x = i % width;
        const int from_y = y + top, from_x = (crop.flip ? width - 1 - x : x) + left;
        const bool inside = from_y >= 0 && from_y < width && from_x >= 0 && from_x < width;
        const int pixel = inside ? block.read(pass.pixels + static_cast<Index>(index) * size +
                                              channel * plane + from_y * width + from_x)
                                 : 0;
        block.write(to + image * size + i, block.read(pass.values + channel * 256 + pixel));
      }
    });
  }
};

}  // namespace cifar::cuda
